"""InternVL: InternViT -> pixel shuffle -> projector -> decoder (InternLM2, Qwen2 or Qwen3).

    tiles (tile 3 448 448) -> 1024 patches -> 256 image tokens a tile -> rows of the LLM's input

Follows `modeling_internvl_chat.py`, `modeling_internlm2.py` and transformers' `modeling_qwen2.py`
and `modeling_qwen3.py`.  Attributes are named as in InternLM2's checkpoints, whatever the decoder,
but for `projector`, there `mlp1`.  How queries meet keys is passed in as `attend`:

    causal_attention    plain causal, the whole sequence at once
    TreeAttention       many trees (prompt + responses) in one flat sequence: training
    cache.KVCache       keys and values of the past: generation

The model knows nothing of processes, files or losses.

Shapes: b batch, s tokens, t key tokens, h query heads, g key/value heads, d channels.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from config import InternVLConfig, LLMConfig
from runtime import InputError
from vision import InternViT, RMSNorm, drawn

# (layer number, q (b s h d), k (b s g d), v (b s g d)) -> (b s h d)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
ALL = slice(None)  # of the tokens whose hidden states are wanted


# --------------------------------------------------------------------------- rotary positions


def rotary(config: LLMConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (b s d) float32, of positions (b s), a row's largest being its last key's.

    The first half of sin is negated, as `Attention` wants it.

    Dynamic NTK: past max_position_embeddings the base grows with the key length of the call.
    A full forward thus turns every position with one base; a cached step turns only its own new
    query and key.  Stateless, unlike the official module, which keeps a stretched table.
    """
    d, limit, factor = config.head_dim, config.max_position_embeddings, config.rope_factor
    lengths = (positions.amax(dim=1) + 1).double()
    stretch = factor * lengths / limit - (factor - 1)  # 1 where there is no factor
    base = config.rope_theta * torch.where(lengths > limit, stretch, 1.0) ** (d / (d - 2))
    exponent = torch.arange(0, d, 2, device=positions.device).float() / d
    inverse = 1.0 / base.float()[:, None] ** exponent  # (b d/2)
    angle = positions.float()[..., None] * inverse[:, None]  # (b s d/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


# --------------------------------------------------------------------------- ways to attend


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token i sees tokens 0..i of its own row."""
    return _attention(q, k, v, is_causal=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, **masking: object) -> Tensor:
    """torch's attention over (b s h d); each key head serves h / g consecutive query heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **masking).transpose(1, 2)


class TreeAttention:
    """Attention of packed trees: a query sees its own tree's trunk and its own branch, causally.

        k <= q  and  tree[k] == tree[q]  and  branch[k] in (0, branch[q])

    On CUDA a FlexAttention block mask.  Elsewhere by segments: neighbouring trees of at most `span`
    tokens together have one dense mask, the readable reference; a longer tree has its trunk attend
    causally, then each branch to the trunk's keys and its own.  No (s s) tensor either way.
    """

    def __init__(
        self, tree: Tensor, branch: Tensor, flex: bool | None = None, span: int = 128
    ) -> None:
        """tree, branch: (s) integers of the one flat row; branch 0 is the trunk."""
        self.flex = tree.is_cuda if flex is None else flex

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own_branch = (branch[k] == 0) | (branch[k] == branch[q])
            return (k <= q) & (tree[k] == tree[q]) & own_branch

        self.visible = visible  # a plain function: FlexAttention takes nothing else
        if self.flex:
            self.mask = block_mask(tree, branch, visible)
            self.attend = compiled(flex_attention) if tree.is_cuda else flex_attention
            return
        self.index = torch.arange(len(tree), device=tree.device)
        # (tokens, mask (token key) or None = causal); an answer's mask begins with its trunk's keys
        self.segments: list[tuple[int, Tensor | None]] = []
        for start, end in whole_trees(tree, span):
            index, small = self.index[start:end], end - start <= span
            runs = torch.unique_consecutive(branch[start:end], return_counts=True)[1].tolist()
            first, *answers = index.split([end - start] if small else runs)
            self.segments.append((len(first), self.dense_mask(first, first) if small else None))
            for answer in answers:
                mask = self.dense_mask(answer, torch.cat([first, answer]))
                self.segments.append((len(answer), mask))

    def dense_mask(self, q: Tensor, k: Tensor) -> Tensor:  # (q), (k) -> (q k) bool
        return self.visible(q, k, q[:, None], k[None, :])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.flex:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            options = {"enable_gqa": True, "kernel_options": FLEX_OPTIONS}
            return self.attend(q, k, v, None, self.mask, **options).transpose(1, 2)
        if torch.compiler.is_compiling():  # segments differ from pack to pack: no trace of each
            return _attention(q, k, v, attn_mask=self.dense_mask(self.index, self.index))
        # split, not slices: the gradient of each slice would be as long as the row
        lengths = [length for length, _ in self.segments]
        parts = zip(self.segments, *(x.split(lengths, dim=1) for x in (q, k, v)))
        out = []
        for (length, mask), queries, keys, values in parts:
            if mask is None or mask.shape[1] == length:
                trunk = keys, values
            else:  # an answer
                keys, values = torch.cat([trunk[0], keys], 1), torch.cat([trunk[1], values], 1)
            out.append(_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None))
        return torch.cat(out, dim=1)


def whole_trees(tree: Tensor, span: int) -> list[tuple[int, int]]:
    """(start, end) of consecutive trees that together hold `span` tokens, or of one longer tree."""
    spans, start, end = [], 0, 0
    for length in torch.unique_consecutive(tree, return_counts=True)[1].tolist():
        if end > start and end + length - start > span:
            spans.append((start, end))
            start = end
        end += length
    return [*spans, (start, end)]


BLOCK = 128  # tokens a side of a mask block
# below 128 tokens inductor would pick its decoding kernel, which has no choice for some lengths
FLEX_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
# FlexAttention is fast only compiled: once, on first use, where all packs have one length
compiled = functools.cache(torch.compile)


def block_mask(tree: Tensor, branch: Tensor, visible: Callable) -> BlockMask:
    """Which blocks of keys each block of queries meets, from the range of each block alone.

    May list an empty block and never misses one: `visible` decides each pair inside it, but where
    all of them see each other.  No (s s) tensor, unlike create_block_mask.
    """
    s = len(tree)
    blocks = -(-s // BLOCK)

    def lowest_and_highest(x: Tensor) -> tuple[Tensor, Tensor]:  # (s) -> (block), (block)
        x = torch.cat([x, x[-1:].expand(blocks * BLOCK - s)]).view(blocks, BLOCK)
        return x.amin(1), x.amax(1)

    (tree_low, tree_high), (low, high) = lowest_and_highest(tree), lowest_and_highest(branch)
    index = torch.arange(blocks, device=tree.device)
    q, k = index[:, None], index[None, :]
    met = (k <= q) & (tree_high[k] >= tree_low[q])  # trees stand in ascending order
    one_tree = (tree_low[k] == tree_high[k]) & (tree_low[q] == tree_high[q])
    same_tree = one_tree & (tree_low[k] == tree_low[q])
    one_branch = (low[k] == high[k]) & (low[q] == high[q])
    met &= ~(same_tree & one_branch & (low[k] != 0) & (low[k] != low[q]))  # of two answers
    own = (high[k] == 0) | (one_branch & (low[k] == low[q]))  # all trunk, or of one answer
    full = met & (k < q) & same_tree & own
    if s % BLOCK:
        full[-1] = False  # the last rows are padding

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:  # counts (1 1 q), indices (1 1 q k)
        order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(met & ~full), *listed(full), BLOCK, visible, seq_lengths=(s, s)
    )


# --------------------------------------------------------------------------- decoder


class Attention(nn.Module):
    """Grouped-query attention; `wqkv` is packed per key/value head: its queries, key, value.

    Qwen2 adds biases to these; Qwen3 normalises the d channels of each query and key head.
    """

    def __init__(self, config: LLMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.qk_norm = config.architecture == "qwen3"
        self.num_kv_heads = config.num_key_value_heads
        heads, d = config.num_attention_heads, config.head_dim
        packed = (heads + 2 * self.num_kv_heads) * d
        self.wqkv = nn.Linear(config.hidden_size, packed, bias=config.architecture == "qwen2")
        self.wo = nn.Linear(heads * d, config.hidden_size, bias=False)
        if self.qk_norm:
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, wanted: Tensor | slice
    ) -> Tensor:  # (b s d) -> (b wanted d)
        # few operations: a decoding step spends much of its time between small ones
        packed = self.wqkv(x).unflatten(2, (self.num_kv_heads, -1, self.head_dim))  # b s g slot d
        turned, v = packed[:, :, :, :-1], packed[:, :, :, -1]
        if self.qk_norm:
            q, k = turned.split([turned.shape[3] - 1, 1], dim=3)
            turned = torch.cat([self.q_norm(q), self.k_norm(k)], dim=3)
        # each pair of channels (i, i + d/2) turns by its angle
        turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, dims=-1), sin)
        q, k = turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1]  # (b s h d), (b s g d)
        return self.wo(attend(self.layer, q, k, v)[:, wanted].flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderBlock(nn.Module):
    def __init__(self, config: LLMConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, wanted: Tensor | slice
    ) -> Tensor:  # (b s d) -> (b wanted d)
        x = x[:, wanted] + self.attention(self.attention_norm(x), cos, sin, attend, wanted)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """Token embeddings, blocks and the final norm; `forward` starts from embeddings."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        # padding_idx: that row is loaded but never gets a gradient, as officially (InternLM2: </s>)
        table = drawn(config.vocab_size, config.hidden_size)
        self.tok_embeddings = nn.Embedding.from_pretrained(table, False, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | slice = ALL
    ) -> Tensor:
        """x (b s d), positions (b s) -> normed hidden (b wanted d).

        wanted: indices of the tokens that are asked for; of the others the last layer computes
        keys and values alone, which is most of its work saved.
        """
        turns = rotary(self.config, positions)
        cos, sin = (t.to(x.dtype)[:, :, None, None] for t in turns)  # for each head and slot
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cos, sin, attend, ALL)  # each layer called alike: one compilation
        return self.norm(last(x, cos, sin, attend, wanted))


class LanguageModel(nn.Module):
    """The decoder and its head, `output`; a tied model has none, its head is the embedding."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        if not config.tied:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:  # (vocab d)
        return (self.model.tok_embeddings if self.model.config.tied else self.output).weight


# --------------------------------------------------------------------------- InternVL


def pixel_shuffle(x: Tensor) -> Tensor:  # (tile patch d) -> (tile patch/4 4d)
    """Fold each 2 x 2 block of patches into channels: 1024 patches -> 256 image tokens a tile.

    Channel blocks in the order (2R,2Q) (2R,2Q+1) (2R+1,2Q) (2R+1,2Q+1)
    (`modeling_internvl_chat.py: pixel_shuffle`, ps_version v2).
    """
    rows = math.isqrt(x.shape[1]) // 2
    return rearrange(x, "tile (row i col j) d -> tile (row col) (i j d)", row=rows, i=2, j=2)


class InternVL(nn.Module):
    """The whole model.  `image_context_id` is the token whose rows the image features replace."""

    def __init__(self, config: InternVLConfig, image_context_id: int | None) -> None:
        super().__init__()
        self.config, self.image_context_id = config, image_context_id
        d, wide = config.llm.hidden_size, 4 * config.vision.hidden_size
        self.vision_model = InternViT(config.vision)
        self.projector = nn.Sequential(
            nn.LayerNorm(wide, eps=1e-5),  # not the ViT's eps
            nn.Linear(wide, d),
            nn.GELU(),
            nn.Linear(d, d),
        )
        self.language_model = LanguageModel(config.llm)

    def image_features(self, tiles: Tensor) -> Tensor:  # (tile 3 h w) -> (tile token d)
        """What the LLM sees of each tile."""
        x = self.vision_model(tiles, self.config.select_layer)[:, 1:]  # without the class token
        return self.projector(pixel_shuffle(x))

    def embed(
        self, input_ids: Tensor, tiles: Tensor | None, tile_order: Tensor | None = None
    ) -> Tensor:
        """Token embeddings (b s d), rows of <IMG_CONTEXT> replaced by image features in order.

        `tile_order` (run): for each run of tokens_per_tile <IMG_CONTEXT> tokens the number of its
        tile, as an image of several prompts comes once in `tiles`; without it each tile in order.
        """
        x = self.language_model.model.tok_embeddings(input_ids)
        if self.image_context_id is None and tiles is not None:
            raise InputError("no tokenizer came with the weights: set model.image_context_id first")
        features = x.new_empty(0, x.shape[-1])
        if tiles is not None:
            features = self.image_features(tiles)  # (tile token d)
            features = (features if tile_order is None else features[tile_order]).flatten(0, 1)
        slots = input_ids == (-1 if self.image_context_id is None else self.image_context_id)
        rows = slots.flatten().nonzero()[:, 0]  # of x as (b*s d); here the host waits for a GPU
        if len(features) != len(rows):
            told = f"the prompt has {len(rows)} image tokens, its tiles fill {len(features)}"
            raise InputError(f"{told}: build it by encode_chat with the tile counts of preprocess")
        return x.flatten(0, 1).index_put((rows,), features).view_as(x)

    def forward(
        self,
        input_ids: Tensor,
        tiles: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Attend = causal_attention,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
        tile_order: Tensor | None = None,
        wanted: Tensor | slice = ALL,
    ) -> Tensor:
        """(b s) ids, (tile 3 h w) uint8 or normalised -> logits (b s vocab) float32: plain causal.

        With `attend` and `positions` (b s): packed trees or cached decoding.  With `head`: what
        head(hidden (b s d), output weight (vocab d)) returns instead of all logits.  With `wanted`:
        only of tokens with these indices.
        """
        b, s = input_ids.shape
        if positions is None:
            positions = torch.arange(s, device=input_ids.device).expand(b, s)
        x = self.embed(input_ids, tiles, tile_order)
        x = self.language_model.model(x, positions, attend, wanted)
        if head is not None:
            return head(x, self.language_model.head)
        return F.linear(x, self.language_model.head).float()
