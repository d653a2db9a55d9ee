"""Tiling and the ViT: what the official code decides, pixel for pixel."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OURS
from PIL import Image
from safetensors.torch import load_file

from config import parse_config
from runtime import InputError
from vision import (
    InternViT,
    RMSNorm,
    VisionBlock,
    VisionConfig,
    candidate_grids,
    cut_tiles,
    num_tiles,
    pixels,
    preprocess,
    tile_grid,
)

TINY = VisionConfig(24, 40, 2, 2, image_size=56, patch_size=14, norm_type="layer_norm")


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((448, 448), 12, (1, 1)),
        ((896, 448), 12, (2, 1)),
        ((448, 1344), 6, (1, 3)),
        ((800, 600), 12, (4, 3)),
        ((800, 600), 6, (3, 2)),
        ((3000, 200), 12, (12, 1)),
        ((1, 5000), 12, (1, 12)),
    ],
)
def test_known_sizes_get_the_official_grid(size, max_tiles, grid):
    assert tile_grid(*size, max_tiles) == grid


def test_a_tie_goes_to_the_larger_grid_only_for_a_large_image():
    # 1x1, 2x2 and 3x3 are the same ratio; the official rule compares pixels with half the grid's
    assert tile_grid(448, 448, 12) == (1, 1)
    assert tile_grid(700, 700, 12) == (2, 2)
    assert tile_grid(1200, 1200, 12) == (3, 3)


@pytest.mark.parametrize("size", [(40, 40), (90, 40), (40, 200), (300, 200)])
@pytest.mark.parametrize("max_tiles", [1, 2, 12])
def test_the_tiles_of_a_file_are_counted_as_they_are_made(tmp_path, size, max_tiles):
    Image.new("RGB", size).save(tmp_path / "x.png")
    made = preprocess(Image.open(tmp_path / "x.png"), max_tiles, 56)
    assert num_tiles(tmp_path / "x.png", max_tiles, 56) == len(made)


def test_grids_stand_in_the_order_of_the_official_set():
    """`dataset.py: dynamic_preprocess`; with the order, which of two equally near ones is taken."""
    for high in range(1, 13):
        for low in range(1, high + 1):
            sides = [(n, range(1, n + 1)) for n in range(low, high + 1)]
            official = {(i, j) for n, s in sides for i in s for j in s if low <= i * j <= high}
            assert candidate_grids(high, low) == sorted(
                official, key=lambda grid: grid[0] * grid[1]
            )


def test_every_golden_tiling_decision_is_met(golden_tiny, tmp_path):
    file = tmp_path / "size-alone.pbm"
    golden = json.loads((golden_tiny / "tiling.json").read_text())
    for row in golden["rows"]:
        (width, height), size = row["size"], row["image_size"]
        grid = tile_grid(width, height, row["max_num"], row["min_num"], size)
        assert list(grid) == row["grid"], row
        if row["use_thumbnail"] and row["min_num"] == 1:
            file.write_text(f"P4 {width} {height} ")
            assert num_tiles(file, row["max_num"], size) == row["n_tiles"], row


def test_golden_candidate_order_is_met(golden_tiny):
    golden = json.loads((golden_tiny / "tiling.json").read_text())["candidate_order"]
    assert golden
    for limits, order in golden:
        low, high = (int(n) for n in limits.split(".."))
        assert [list(grid) for grid in candidate_grids(high, low)] == order, limits


def test_the_thumbnail_is_the_whole_image_and_comes_last():
    image = Image.new("RGB", (896, 448), "black")
    image.paste("white", (0, 0, 448, 448))
    left, right, thumbnail = cut_tiles(image, 12)
    assert left.getextrema() == ((255, 255),) * 3
    # bicubic resizing rings by a few grey levels at the edge
    assert right.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) == (0, 0, 0)
    assert thumbnail.getpixel((10, 200)) == (255, 255, 255)
    assert thumbnail.getpixel((440, 200)) == (0, 0, 0)
    assert len(cut_tiles(image, 12, thumbnail=False)) == 2
    assert len(cut_tiles(image, 1)) == 1


def test_tiles_and_pixels_equal_the_golden_images(golden_tiny):
    golden = json.loads((golden_tiny / "images.json").read_text())["cases"]
    stored = load_file(golden_tiny / "images.safetensors")
    photo = Image.open(golden_tiny / "photo.png")
    for name in ("photo_max1", "photo_max4", "photo_max6", "photo_448"):
        case = golden[name]
        tiles = cut_tiles(photo, case["max_num"], case["image_size"])
        raw = b"".join(tile.tobytes() for tile in tiles)
        assert len(tiles) == case["n_tiles"]
        assert hashlib.sha256(raw).hexdigest() == case["tiles_uint8_sha256"]
        tensor = preprocess(photo, case["max_num"], case["image_size"])
        assert tensor.double().sum().item() == pytest.approx(case["pixel_values_sum"], abs=0.5)
        assert tensor.double().abs().sum().item() == pytest.approx(case["pixel_values_abs_sum"])
        if f"{name}/pixel_values" in stored:
            torch.testing.assert_close(tensor, stored[f"{name}/pixel_values"], atol=1e-6, rtol=0)
    strided = preprocess(photo, 6, 448)[:, :, ::32, ::32]
    expected = stored["photo_448/pixel_values_strided32"]
    torch.testing.assert_close(strided, expected, atol=1e-6, rtol=0)


def test_every_colour_mode_is_made_rgb_before_resizing():
    palette = Image.new("RGB", (60, 30), "red").convert("P")
    for mode in ("P", "L", "RGBA", "CMYK", "1"):
        tiles = preprocess(palette.convert("RGB").convert(mode), 4, 56)
        assert tiles.shape == (3, 3, 56, 56)


@pytest.mark.parametrize(
    ("image", "level"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 255),  # transparent: white
        (Image.new("LA", (8, 8), (0, 0)), 255),
        (Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), 128),  # half of 16 bits
    ],
)
def test_an_image_that_no_file_reader_has_seen_is_made_rgb_like_a_file(image, level):
    """The README's six lines give what Image.open returns."""
    assert torch.equal(
        preprocess(image, 1, 56), preprocess(Image.new("RGB", (8, 8), (level,) * 3), 1, 56)
    )


def test_bytes_are_normalised_by_the_vit_as_preprocess_does():
    image = Image.effect_noise((100, 60), 80).convert("RGB")
    vit = InternViT(TINY)
    with torch.no_grad():
        expected = vit(preprocess(image, 4, 56))
        assert torch.equal(vit(pixels(cut_tiles(image, 4, 56))), expected)


def test_positions_are_resized_for_another_patch_grid(golden_tiny):
    config = parse_config(json.loads((golden_tiny / "checkpoint/config.json").read_text()))
    vit = InternViT(config.vision).eval()
    weights = {}
    for path in (golden_tiny / "checkpoint").glob("*.safetensors"):
        weights |= {k: v.float() for k, v in load_file(path).items()}
    prefix = "vision_model."
    vit.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
    golden = load_file(golden_tiny / "cases.safetensors")
    case = "h_vision_other_grid"
    with torch.no_grad():
        tiles = golden[f"{case}/pixel_values"]
        torch.testing.assert_close(vit(tiles, 0), golden[f"{case}/embeddings"], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            vit(tiles), golden[f"{case}/last_hidden_state"], atol=1e-4, rtol=0
        )


@torch.no_grad()
def test_resized_positions_align_the_areas_of_patches_and_not_their_corners():
    embeddings = InternViT(TINY).embeddings
    table, larger = embeddings.position_embedding, embeddings.positions(8, 8)
    assert torch.equal(larger[:, 0], table[:, 0]) and larger.shape == (1, 65, 24)
    assert (larger[0, [1, 8, 57, 64]] - table[0, [1, 4, 13, 16]]).abs().amin(1).gt(0).all()


@torch.no_grad()
def test_layers_are_counted_from_the_embeddings_and_from_the_last_block():
    vit, tiles = InternViT(TINY).eval(), torch.randn(2, 3, 56, 56)
    outputs = [vit(tiles, layer) for layer in range(3)]
    assert torch.equal(outputs[0], vit.embeddings(tiles))
    for layer, output in zip((-3, -2, -1), outputs):
        assert torch.equal(vit(tiles, layer), output)
    assert not torch.equal(outputs[1], outputs[2])


def test_of_bfloat16_weights_positions_are_resized_and_norms_are_taken_in_float32():
    vit, norm = InternViT(TINY), RMSNorm(24, 1e-6)
    with torch.no_grad():
        norm.weight.normal_()
        x = torch.randn(50, 24).bfloat16()
        vit, norm = vit.bfloat16(), norm.bfloat16()
        found, normed = vit.embeddings.positions(3, 5), norm(x)
        root = (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert torch.equal(normed, norm.weight * (x / root).bfloat16())
        assert torch.equal(found, vit.float().embeddings.positions(3, 5).bfloat16())


def test_internvit_6b_normalises_queries_and_keys_over_the_whole_width():
    config = replace(TINY, qk_normalization=True, norm_type="rms_norm", layer_norm_eps=1e-7)
    norms = [module for module in InternViT(config).modules() if isinstance(module, RMSNorm)]
    assert [norm.eps for norm in norms] == [1e-7] * 8
    names = dict(InternViT(config).named_parameters())
    assert names["encoder.layers.0.attn.q_norm.weight"].shape == (24,)
    assert "encoder.layers.0.norm1.bias" not in names
    assert "encoder.layers.0.attn.qkv.bias" not in names
    vit, tiles = InternViT(config).eval(), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        before = vit(tiles)
        for layer in vit.encoder.layers:  # a norm hides the scale of what goes in
            layer.attn.qkv.weight[:48] *= 10
        torch.testing.assert_close(vit(tiles), before, atol=1e-4, rtol=1e-4)


def test_drop_path_drops_whole_tiles_and_keeps_the_mean():
    torch.manual_seed(0)
    out = VisionBlock(TINY, 0.25).branch(torch.ones(4000, 2, 3))
    per_tile = out.flatten(1)
    assert (per_tile == per_tile[:, :1]).all()
    kept = per_tile[:, 0][per_tile[:, 0] > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))
    assert out.mean().item() == pytest.approx(1, abs=0.03)


def test_drop_path_grows_with_depth_and_rests_in_eval():
    vit = InternViT(replace(TINY, drop_path_rate=0.5, num_hidden_layers=3))
    assert [layer.drop_rate for layer in vit.encoder.layers] == [0, 0.25, 0.5]
    tiles = torch.randn(4, 3, 56, 56)
    assert not torch.equal(vit(tiles), vit(tiles))
    vit.eval()
    assert torch.equal(vit(tiles), vit(tiles))


def test_impossible_tilings_are_refused():
    with pytest.raises(InputError, match="0 x 5"):
        tile_grid(0, 5, 12)
    with pytest.raises(InputError, match="min_tiles <= max_tiles"):
        tile_grid(5, 5, 0)
    with pytest.raises(InputError, match="max_tiles <= 1000"):
        tile_grid(5, 5, 1001)


def test_shapes_of_both_vision_towers_come_from_the_golden_files():
    for size in ("internvl2-8b", "internvl2-2b"):
        config = parse_config(json.loads((OURS / size / "config.json").read_text()))
        assert config.vision.image_size // config.vision.patch_size == 32
        assert config.tokens_per_tile == 256
