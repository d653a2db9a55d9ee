"""What training costs: FLOPs and bytes of a step, known before it runs; `--plan` of train.py.

    Load, flops   useful FLOPs of a pack by part, forward and backward; recomputing is not useful
    Meter         tokens and pairs a second of a running step, and its share of the peak (MFU)
    plan_of       bytes a GPU needs, as sums and products that one can check by hand
    say_plan      prints them, and the ways out where they are too many

    python train.py --plan --size 8b --gpus 8

Bytes are those of the worst moment of a step: every block has left for backward what --recompute
lets it keep, and either the vocabulary or the last block of the language model is at work.
"""

import functools
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from config import InternVLConfig, LLMConfig, load_config
from data import Tree, images_of
from losses import needs_reference, parse_objective
from model import InternVL
from runtime import InputError, Process
from train import PARTS, TrainConfig, compute_dtype, prepare, units_of, with_recipe
from vision import VisionConfig

GB = 1e9
RESERVE = 0.08  # of the plan: CUDA's context, NCCL's buffers, fragmentation


# --------------------------------------------------------------------------- useful FLOPs


@dataclass(frozen=True)
class Load:
    """What a pack asks of the model."""

    tokens: int = 0
    scored: int = 0  # tokens that meet the vocabulary
    tiles: int = 0  # that the ViT encodes
    pairs: int = 0  # (query, key) that see each other

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


def load_of(trees: list[Tree], share_prefix: bool = True, share_images: bool = True) -> Load:
    """The load of a pack of these trees."""
    total, distinct = Load(), {}
    for tree in trees:
        trunk, answers = len(tree.trunk), [len(r) for r in tree.responses]
        copies = 1 if share_prefix else len(answers)
        own = sum(n * trunk + n * (n + 1) // 2 for n in answers)
        tokens = copies * trunk + sum(answers)
        total += Load(tokens, sum(answers), 0, copies * trunk * (trunk + 1) // 2 + own)
    for image, tiles, place in images_of(trees, share_prefix):
        distinct[image if share_images else place] = tiles
    return replace(total, tiles=sum(distinct.values()))


def flops(
    config: InternVLConfig, load: Load, trained: set[str] = frozenset(PARTS)
) -> dict[str, tuple[int, int]]:
    """Part -> (forward, backward) FLOPs of the products, a multiply and an add counted as two.

    Backward has one product for a weight's gradient, if it is trained, and one for its input's, if
    anything before it is; attention counts only pairs that see each other.
    """
    v, llm = config.vision, config.llm
    d, wide = v.hidden_size, llm.hidden_size
    patches = (config.tile_size // v.patch_size) ** 2
    depth = config.select_layer % (v.num_hidden_layers + 1)
    rows = load.tiles * (patches + 1)
    vision, projector, language = (part in trained for part in PARTS)

    patching = 2 * load.tiles * patches * 3 * v.patch_size**2 * d
    vit = 2 * rows * depth * (4 * d * d + 2 * d * v.intermediate_size)
    vit_attention = 4 * load.tiles * (patches + 1) ** 2 * d * depth
    project = 2 * load.tiles * config.tokens_per_tile * (4 * d * wide + wide * wide)
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    layer = wide * (q + 2 * kv) + q * wide + 3 * wide * llm.intermediate_size
    decoder = 2 * load.tokens * llm.num_hidden_layers * layer
    attention = 4 * load.pairs * q * llm.num_hidden_layers
    head = 2 * load.scored * llm.vocab_size * wide
    before = vision or projector
    through = language or before
    return {
        "vit": (patching + vit + vit_attention, vision * (patching + 2 * (vit + vit_attention))),
        "projector": (project, project * (projector + before)),
        "llm": (decoder, decoder * (language + through)),
        "attention": (attention, 2 * attention * through),
        "head": (head, head * (language + through)),
    }


def total_flops(parts: dict[str, tuple[int, int]], backward: bool = True) -> int:
    return sum(f + b * backward for f, b in parts.values())


# dense bf16, without sparsity, from the vendor's data sheets
DEVICE_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12}
DEVICE_PEAKS |= {"H100": 989e12, "A100": 312e12, "L40S": 362e12}


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOPs a second of a device at best, where that number is from)."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in DEVICE_PEAKS.items():
            if known in name:
                return peak, f"{name}, data sheet"
    n = 8192 if device.type == "cuda" else 256
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = min(seconds_of(lambda: a @ a, device) for _ in range(5))
    return 2 * n**3 / best, f"measured, a product of {n} x {n} matrices"


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class Meter:
    """Speed of a step: tokens and pairs a second, and MFU of useful FLOPs.  Says the plan first."""

    def __init__(self, cfg: TrainConfig, process: Process) -> None:
        self.cfg, self.config = cfg, load_config(cfg.model_dir)
        say_plan(cfg, self.config, process.world // cfg.replicate, process.device, process.say)
        peak, origin = device_peak(process.device, compute_dtype(cfg, process.device))
        process.say(f"MFU is of {peak / 1e12:.3g} TFLOP/s a process ({origin})")
        self.peak, self.began = peak * process.world, time.perf_counter()

    def __call__(self, step: Any, reference: Any) -> dict[str, float]:
        """Metrics of a train.Step, which has lasted since the call before."""
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        share = self.cfg.share_prefix, self.cfg.share_images
        load = sum((load_of(trees, *share) for trees in step.trees), Load())
        parts = flops(self.config, load, self.cfg.trained_parts)
        useful = total_flops(parts)
        if self.cfg.reference == "online" and reference:
            useful += total_flops(parts, backward=False)
        return {
            "pairs": step.pairs,
            "tokens": load.tokens,
            "dropped": len(step.dropped),
            "tokens_per_s": load.tokens / seconds,
            "pairs_per_s": step.pairs / seconds,
            "mfu": useful / (seconds * self.peak),
        }


# --------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU at the worst moment of a step."""

    weights: int  # the shard
    gradients: int  # of the shard
    optimizer: int  # two moments of each trained number of the shard
    gathered: int  # whole weights: the root's, and those of two blocks
    activations: int  # with the whole gradients of the block at work and of the head
    logits: int
    reference: int  # a second model

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def needed(self) -> float:
        """With the reserve."""
        return (1 + RESERVE) * self.total

    def __str__(self) -> str:
        cells = [f"{name} {n / GB:.4g}" for name, n in vars(self).items()]
        return (
            f"plan, GB a GPU: {', '.join(cells)}; {self.total / GB:.4g} in all, "
            f"{self.needed / GB:.4g} with {RESERVE:.0%} in reserve"
        )


def decoder_keeps(llm: LLMConfig, size: int, learns: bool, scales: bool) -> int:
    """Bytes a token that a model.DecoderBlock keeps for backward, in order of its lines.

    size: bytes of a number.  learns: its linear layers get gradients, so their inputs are kept.
    scales: its norms' weights get gradients, so the normed values are kept.
    """
    d, f = llm.hidden_size, llm.intermediate_size
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    norms = 2 * d * (4 + size * (scales + learns))  # the float32 input; normed; the output
    norms += llm.qk_norm * (q + kv) * (4 + size * scales)
    attention = size * ((q + 2 * kv) + (q + kv) + q)  # wqkv's output; rotated q, k; the result
    feed_forward = size * f * (3 + learns)  # w1 x; silu of it; w3 x; their product
    return norms + attention + feed_forward


def vision_keeps(vit: VisionConfig, size: int, learns: bool, scales: bool) -> int:
    """The same of a vision.VisionBlock."""
    d, f = vit.hidden_size, vit.intermediate_size
    norm = 4 + size * scales if vit.norm_type == "rms_norm" else size  # normed is not kept twice
    norms = 2 * d * (norm + size * learns)
    norms += vit.qk_normalization * 2 * d * (4 + size * scales + size)
    attention = size * d * (3 + 1)  # qkv's output; the result
    layer_scales = size * d * 2 * scales  # what ls1 and ls2 multiply
    mlp = size * f * (1 + learns)  # fc1 x; gelu of it
    return norms + attention + layer_scales + mlp


class Activations(NamedTuple):
    """Bytes of one pack's forward and backward, beside weights and what is kept of gradients."""

    kept: int  # by all blocks, until backward reaches them
    block: int  # the language model's last block at work
    logits: int  # the vocabulary at work, before the blocks' backward
    head: int  # gradient of the head's weight: added up over chunks in float32, then cast

    @property
    def peak(self) -> int:
        return self.kept + max(self.block, self.logits + self.head)


def activations_of(
    config: InternVLConfig,
    load: Load,
    size: int,  # bytes of a number
    recompute: str,
    again: int,  # blocks that this is for, the ViT's first; -1 = all
    head_rows: int,
    learns: dict[str, tuple[bool, bool]],  # part -> `learns`, `scales` of its blocks
) -> Activations:
    """What a pack of this load takes, image tokens as many as text allows."""
    v, llm = config.vision, config.llm
    rows = load.tiles * ((config.tile_size // v.patch_size) ** 2 + 1)
    d, block = llm.hidden_size, decoder_keeps(llm, size, *learns["language_model"])
    everything = (block, vision_keeps(v, size, *learns["vision_model"]))
    token, row = {
        "full": (size * d, size * v.hidden_size),  # a block's input
        # the input, two products, and attention (but FlexAttention is computed again)
        "selective": (3 * size * d, 4 * size * v.hidden_size),
    }.get(recompute, everything)
    layers, depth = llm.num_hidden_layers, config.select_layer % (v.num_hidden_layers + 1)
    again = v.num_hidden_layers + layers if again < 0 else again
    again_vision, again_text = min(again, depth), max(0, again - v.num_hidden_layers)
    kept = load.tokens * (again_text * token + (layers - again_text) * everything[0])
    if learns["vision_model"][0]:
        kept += rows * (again_vision * row + (depth - again_vision) * everything[1])
    at_work = 2 * size * (llm.intermediate_size + d)  # gradients on their way through a block
    at_work += block if token < block and again_text == layers else 0
    if not head_rows:  # float32: log-softmax and two gradients
        logits, head = 12 * load.scored * llm.vocab_size, 0
    else:  # a chunk's product and probabilities, those of the chunk before; every hidden state
        logits = min(head_rows, load.scored) * llm.vocab_size * (12 + 4 * (size == 2))
        logits += 2 * size * load.scored * d
        head = (4 + size) * llm.vocab_size * d * learns["language_model"][1]
    return Activations(kept, load.tokens * at_work, logits, head)


def meta_model(config: InternVLConfig) -> InternVL:
    """A model of shapes alone, to count its parameters."""
    with torch.device("meta"):
        return InternVL(config, 1)


def count(module: nn.Module, trained: bool = False) -> int:
    """Its parameters, or those of them that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@functools.cache
def sizes_of(cfg: TrainConfig, config: InternVLConfig) -> tuple[int, int, list, list, dict]:
    """Parameters of all and trained ones, those of each block, and which parts learn any, all."""
    model = prepare(meta_model(config), cfg)
    blocks = [[count(unit, trained) for unit in units_of(model)] for trained in (False, True)]
    grads = {part: [p.requires_grad for p in getattr(model, part).parameters()] for part in PARTS}
    learns = {part: (any(flags), all(flags)) for part, flags in grads.items()}
    return count(model), count(model, True), *blocks, learns


def plan_of(cfg: TrainConfig, config: InternVLConfig, shards: int, device: torch.device) -> Plan:
    """What a GPU needs for packs full of image tokens, a quarter of them responses."""
    cfg = with_recipe(cfg, config, lambda text: None)
    size = compute_dtype(cfg, device).itemsize
    state = 2 if cfg.state_dtype == "bf16" else 4
    same = replace(cfg, recompute="off", recompute_blocks=-1, sync="pack")
    everything, trained, blocks, learned, learns = sizes_of(same, config)
    root, root_learned = everything - sum(blocks), trained - sum(learned)
    scored = 2 * max(1, cfg.pack_tokens // 8)
    tiles = max(1, (cfg.pack_tokens - scored - 8) // config.tokens_per_tile)
    load = Load(cfg.pack_tokens, scored, tiles)
    again = (cfg.recompute, cfg.recompute_blocks)
    room = activations_of(config, load, size, *again, cfg.head_rows, learns)
    at_once = cfg.sync == "step"  # everything stays gathered, whole gradients add up in float32
    gathered = size * (everything if at_once else root + 2 * max(blocks))  # one is fetched ahead
    # whole gradients wait for the rest of their block, then are reduced in float32
    head = size * config.llm.vocab_size * config.llm.hidden_size * learns["language_model"][1]
    in_block = room.block + head + (size + 4) * max(learned)
    in_backward = room.kept + max(in_block, room.logits + room.head)
    at_end = (size + 4) * root_learned - 2 * size * max(blocks)
    terms = parse_objective(cfg.loss if cfg.loss != "all" else "mpo")
    second = cfg.reference == "online" and needs_reference(terms) and not cfg.lora_rank
    return Plan(
        weights=everything * state // shards,
        gradients=trained * state // shards + at_once * 4 * trained,
        optimizer=2 * trained * state // shards,
        gathered=gathered,
        activations=max(in_backward, at_end) - room.logits,
        logits=room.logits,
        reference=second * (everything * 4 // shards + size * root),
    )


def memory_of(cfg: TrainConfig, device: torch.device) -> float:
    """Bytes a GPU has, 0 where nobody says."""
    if not cfg.gpu_memory and device.type == "cuda" and not cfg.plan:
        return torch.cuda.get_device_properties(device).total_memory
    return cfg.gpu_memory * GB


def settle(
    cfg: TrainConfig, config: InternVLConfig, gpus: int, device: torch.device, say: Callable
) -> TrainConfig:
    """--recompute auto and --sync auto as flags: as little computed and sent as memory allows.

    A recomputed block costs a third of its time again; what is sent mostly hides behind products.
    So blocks come first, and gradients wait for the end of a step where there is still room.
    """
    shards, memory = gpus // cfg.replicate, memory_of(cfg, device)

    def fits(**change: Any) -> bool:
        plan = plan_of(replace(cfg, **change), config, shards, device)
        return plan.needed <= (memory or math.inf)

    if cfg.recompute == "auto":
        cfg = replace(cfg, recompute="full")
        blocks = config.vision.num_hidden_layers + config.llm.num_hidden_layers
        again = bisect_left(range(blocks), True, key=lambda n: fits(recompute_blocks=n))
        reason = f"as few as fit into {memory / GB:.4g} GB"
        if not memory:
            again, reason = (blocks, "the memory is not known") if cfg.plan else (0, "on a CPU")
        cfg = replace(cfg, recompute_blocks=again)
        say(f"recompute auto: {again} of {blocks} blocks again in backward: {reason}")
    if cfg.sync == "auto":
        cfg = replace(cfg, sync="step" if gpus > 1 and memory and fits(sync="step") else "pack")
        if gpus > 1:
            say(f"sync auto: weights and gradients are exchanged once a {cfg.sync}")
    return cfg


def say_plan(
    cfg: TrainConfig, config: InternVLConfig, shards: int, device: torch.device, say: Callable
) -> None:
    """Print the plan; InputError with the ways out where it exceeds the GPU's memory."""
    cfg = with_recipe(cfg, config, lambda text: None)
    plan = plan_of(cfg, config, shards, device)
    say(plan)
    memory = memory_of(cfg, device)

    def fits(cfg: TrainConfig, shards: int) -> bool:
        return plan_of(cfg, config, shards, device).needed <= memory

    if memory and plan.needed > memory:
        needed, there = plan.needed / GB, memory / GB
        ways = ways_out(cfg, shards, fits)
        raise InputError(f"the plan needs {needed:.4g} GB a GPU and there are {there:.4g}; {ways}")
    if memory:
        say(f"fits into {memory / GB:.4g} GB")


def ways_out(cfg: TrainConfig, shards: int, fits: Callable[[TrainConfig, int], bool]) -> str:
    """Flags that alone make it fit; else as many of them together as it takes, or more GPUs."""
    fewer, dtype = max(1, cfg.pack_tokens // 2), " --dtype auto" if cfg.dtype == "fp32" else ""
    ways: dict[str, dict[str, Any]] = {
        "--recompute full": {"recompute": "full", "recompute_blocks": -1},
        "--sync pack": {"sync": "pack"},
        "--head_rows 128": {"head_rows": 128},
        f"--state_dtype bf16{dtype}": {"state_dtype": "bf16", "dtype": "auto"},
        f"--pack_tokens {fewer}": {"pack_tokens": fewer},
    }
    if not cfg.reference_update_every:  # a moving reference is a second model
        ways["--reference cached"] = {"reference": "cached"}
        ways["--lora_rank 16"] = {"lora_rank": cfg.lora_rank or 16}
    ways = {words: change for words, change in ways.items() if replace(cfg, **change) != cfg}
    helpful = [words for words, change in ways.items() if fits(replace(cfg, **change), shards)]
    more = [shards * n for n in (2, 4, 8, 16, 32, 64) if fits(cfg, shards * n)]
    helpful += [f"{n} GPUs a model copy" for n in more[:1]]
    if helpful:
        return f"this would fit: {', or '.join(helpful)}"
    for n, words in enumerate(ways, 1):
        cfg = replace(cfg, **ways[words])
        if fits(cfg, shards):
            return f"this would fit: {' '.join(list(ways)[:n])}"
    return "lower --pack_tokens far more, or take more or larger GPUs"
