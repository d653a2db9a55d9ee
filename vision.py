"""From an image to ViT features: dynamic-resolution tiling and the InternViT encoder.

    tile_grid, cut_tiles, preprocess   image -> tiles (tile 3 448 448), thumbnail last
    InternViT                          tiles -> patch features (tile 1+patch d), class token first

Follows the official internvl_chat code: `dataset.py: dynamic_preprocess, build_transform` and
`modeling_intern_vit.py`.  Attributes are named as in the official checkpoints.

Shapes: tile, row, col, patch spelled out; s tokens of a tile, h heads, d channels.
"""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from images import open_image, to_rgb
from runtime import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# --------------------------------------------------------------------------- tiles


@functools.cache
def candidate_grids(max_tiles: int, min_tiles: int = 1) -> list[tuple[int, int]]:
    """All (cols, rows) of min_tiles to max_tiles tiles, by area; ties as in the official set."""
    sides = range(1, max_tiles + 1)
    grids = [(cols, rows) for cols in sides for rows in sides[: max_tiles // cols]]
    grids = [grid for grid in grids if math.prod(grid) >= min_tiles]
    grids.sort(key=lambda grid: max(*grid, min_tiles))  # the order in which they enter the set
    return sorted(set(grids), key=math.prod)


def tile_grid(
    width: int, height: int, max_tiles: int, min_tiles: int = 1, tile_size: int = 448
) -> tuple[int, int]:
    """The (cols, rows) whose aspect ratio is nearest to the image's.

    On an exact tie the larger grid wins iff the image has more than half of its pixels
    (official `find_closest_aspect_ratio`).
    """
    if width < 1 or height < 1:
        raise InputError(f"image of {width} x {height} pixels; both sides must be at least 1")
    if not 1 <= min_tiles <= max_tiles <= 1000:
        raise InputError(f"need 1 <= min_tiles <= max_tiles <= 1000, got {min_tiles}, {max_tiles}")
    aspect, best, best_difference = width / height, (1, 1), float("inf")
    for cols, rows in candidate_grids(max_tiles, min_tiles):
        difference = abs(aspect - cols / rows)
        if difference < best_difference:
            best, best_difference = (cols, rows), difference
        elif difference == best_difference and width * height > 0.5 * tile_size**2 * cols * rows:
            best = (cols, rows)
    return best


def num_tiles(path: Path, max_tiles: int, tile_size: int) -> int:
    """How many tiles `preprocess` makes of a file, thumbnail included; reads its size alone."""
    with open_image(path) as image:
        cols, rows = tile_grid(*image.size, max_tiles, tile_size=tile_size)
    return cols * rows + (cols * rows > 1)


def cut_tiles(
    image: Image.Image, max_tiles: int = 12, tile_size: int = 448, thumbnail: bool = True
) -> list[Image.Image]:
    """Row-major square tiles of the resized image; the whole image once more, last, if cut."""
    image = to_rgb(image)  # before resizing: a palette image would be resized by nearest
    cols, rows = tile_grid(*image.size, max_tiles, tile_size=tile_size)
    resized = image.resize((cols * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((col, row, col + tile_size, row + tile_size))
        for row in range(0, rows * tile_size, tile_size)
        for col in range(0, cols * tile_size, tile_size)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def pixels(tiles: list[Image.Image]) -> Tensor:  # (tile 3 h w) uint8
    stacked = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))
    return rearrange(stacked, "tile h w c -> tile c h w").contiguous()


def normalize(pixels: Tensor) -> Tensor:  # (tile 3 h w) uint8 -> float32
    """[0, 255] -> ImageNet mean 0 and deviation 1, on the device that the bytes are on."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=pixels.device).view(2, 3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)


def preprocess(
    image: Image.Image, max_tiles: int = 12, tile_size: int = 448, thumbnail: bool = True
) -> Tensor:  # (tile 3 h w) float32
    """The image as the ViT sees it: up to max_tiles tiles, plus the thumbnail if more than one."""
    return normalize(pixels(cut_tiles(image, max_tiles, tile_size, thumbnail)))


# --------------------------------------------------------------------------- encoder


def count(high: int = 1 << 24) -> Any:
    """A dataclass field that a checkpoint's config.json must give: a whole number from 1."""
    return field(metadata={"range": (1, high)})


@dataclass(frozen=True)
class VisionConfig:
    """`vision_config` of a checkpoint.  Fields of `count` must be in the file."""

    hidden_size: int = count()
    intermediate_size: int = count()
    num_hidden_layers: int = count(1000)
    num_attention_heads: int = count()
    image_size: int = count()
    patch_size: int = count()
    qkv_bias: bool = False
    qk_normalization: bool = True
    norm_type: Literal["layer_norm", "rms_norm"] = "rms_norm"
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu"] = "gelu"
    drop_path_rate: float = 0.0


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics and scaling in fp32 (torch's way), then times weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)


def drawn(*shape: int) -> Tensor:
    """Random numbers, but none on the meta device: torch imports its compiler for those."""
    return (torch.empty if torch.get_default_device().type == "meta" else torch.randn)(*shape)


class VisionEmbeddings(nn.Module):
    """Patches, class token, positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.grid = config.image_size // config.patch_size  # patches along one side of a tile
        self.class_embedding = nn.Parameter(drawn(1, 1, d))
        self.patch_embedding = nn.Conv2d(3, d, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(drawn(1, self.grid**2 + 1, d))

    def positions(self, rows: int, cols: int) -> Tensor:  # (1 1+patch d)
        """The position table, its patch part resized if the patch grid is not the native one."""
        table = self.position_embedding
        if (rows, cols) == (self.grid, self.grid):
            return table
        patches = rearrange(table[:, 1:], "1 (row col) d -> 1 d row col", row=self.grid)
        patches = F.interpolate(patches.float(), (rows, cols), mode="bicubic", align_corners=False)
        patches = rearrange(patches, "1 d row col -> 1 (row col) d").to(table.dtype)
        return torch.cat([table[:, :1], patches], dim=1)

    def forward(self, tiles: Tensor) -> Tensor:  # (tile 3 h w) -> (tile 1+patch d)
        tiles = normalize(tiles) if tiles.dtype == torch.uint8 else tiles
        patches = self.patch_embedding(tiles.to(self.patch_embedding.weight.dtype))
        rows, cols = patches.shape[-2:]
        patches = rearrange(patches, "tile d row col -> tile (row col) d")
        first = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.positions(rows, cols)


class VisionAttention(nn.Module):
    """Full attention within a tile; the packed projection is ordered [q | k | v]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.proj = nn.Linear(d, d)
        norm = RMSNorm if config.qk_normalization else nn.Identity
        self.q_norm = norm(d, config.layer_norm_eps)  # over the whole width, all heads together
        self.k_norm = norm(d, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:  # (tile s d)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rearrange(t, "tile s (h d) -> tile h s d", h=self.num_heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "tile h s d -> tile s (h d)"))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # the exact (erf) GELU


class VisionBlock(nn.Module):
    """Pre-norm block; layer scale and stochastic depth act on the branch, not on the residual."""

    def __init__(self, config: VisionConfig, drop_rate: float) -> None:
        super().__init__()
        self.attn, self.mlp = VisionAttention(config), VisionMLP(config)
        norm = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm  # InternViT-6B, -300M
        self.norm1 = norm(config.hidden_size, config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size))
        self.drop_rate = drop_rate

    def branch(self, x: Tensor) -> Tensor:  # (tile s d)
        """Stochastic depth: drop the branch of whole tiles, divide the others by the keep rate."""
        if not (self.training and self.drop_rate):
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_rate
        return x * keep.to(x.dtype) / (1 - self.drop_rate)

    def forward(self, x: Tensor) -> Tensor:  # (tile s d)
        x = x + self.branch(self.ls1 * self.attn(self.norm1(x)))
        return x + self.branch(self.ls2 * self.mlp(self.norm2(x)))


class InternViT(nn.Module):
    """InternViT (`modeling_intern_vit.py`): no final norm, class token first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.encoder = nn.Module()  # a bare name, as in checkpoints: forward runs its layers
        self.encoder.layers = nn.ModuleList(VisionBlock(config, rate) for rate in rates)

    def forward(self, tiles: Tensor, select_layer: int = -1) -> Tensor:  # (tile 1+patch d)
        """Output of block `select_layer`: -1 the last, 0 the embeddings, -2 the last but one."""
        depth = len(self.encoder.layers)
        x = self.embeddings(tiles)
        for layer in self.encoder.layers[: select_layer % (depth + 1)]:
            x = layer(x)
        return x
