"""What training costs: FLOPs and bytes of a step, known before it runs; `--plan` of train.py.

    named_config  the shapes of a release or a toy, without weights
    Load, flops   useful FLOPs of a pack by part, forward and backward; recomputing is not useful
    Meter         tokens and pairs a second of a running step, and its share of the peak (MFU)
    plan_of       bytes a GPU needs, as sums and products that one can check by hand
    settle        --recompute auto and --sync auto, by the plan
    say_plan      prints it, and the ways out where it does not fit

    python train.py --plan --size 8b --gpus 8

Bytes are those of the worst moment of a step: every block has left for backward what --recompute
lets it keep, and either the vocabulary or the last block of the language model is at work.
"""

import functools
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import InternVLConfig, LLMConfig
from data import Tree
from losses import needs_reference, parse_objective
from model import InternVL
from runtime import InputError, all_of, rank_and_world, read_json, say
from train import PARTS, TrainConfig, compute_dtype, prepare, switched_on, units_of
from vision import VisionConfig

GB = 1e9
VISION, PROJECTOR, LANGUAGE = PARTS
RESERVE = 0.08  # of the plan: CUDA's context, NCCL's buffers, fragmentation
# of the releases' config.json; of 2.5-38B, 3-38B and 3.5-38B from those of their language models
TABLE = read_json(Path(__file__).with_name("releases.json"))
RELEASES = TABLE["releases"]  # name -> a value for each of TABLE["columns"]


def named_config(size: str) -> InternVLConfig:
    """A release by generation and size ("3.5-8b"), or a toy.

    A size alone ("8b") is that of the first generation that has it; "InternVL2_5-8B" does, too.
    """
    asked = size.lower().removeprefix("internvl").replace("_", ".")
    name = next((n for n in RELEASES if asked in (n, n.split("-")[-1])), None)
    if name is None:
        raise InputError(f"unknown size {size!r}; known: {', '.join(RELEASES)}; or 8b alone, ...")
    row = dict(zip(TABLE["columns"], RELEASES[name]))
    vit = VisionConfig(**TABLE["vision"][row.pop("vision")])
    own = {key: row.pop(key) for key in ("generation", "template")}
    return InternVLConfig(vit, LLMConfig(**row), tile_size=vit.image_size, max_tiles=12, **own)


@dataclass(frozen=True)
class Load:
    """What packs ask of the model."""

    tokens: int
    scored: int  # tokens that meet the vocabulary
    tiles: int  # that the ViT encodes
    pairs: int = 0  # (query, key) that see each other


def load_of(*packs: list[Tree], share_images: bool = True) -> Load:
    """The load of packs of these trees."""
    tokens = scored = tiles = pairs = 0
    for trees in packs:
        images = [image for tree in trees for image in zip(tree.images, tree.tiles)]
        tiles += sum(n for _, n in (set(images) if share_images else images))
        for tree in trees:
            trunk, answers = len(tree.trunk), [len(r) for r in tree.responses]
            tokens += tree.size
            scored += sum(answers)
            pairs += trunk * (trunk + 1) // 2
            pairs += sum(n * trunk + n * (n + 1) // 2 for n in answers)
    return Load(tokens, scored, tiles, pairs)


def flops(cfg: TrainConfig, config: InternVLConfig, load: Load) -> tuple[int, int]:
    """(forward, backward) FLOPs of the products, a multiply and an add counted as two.

    Backward has one product for a weight's gradient, if it is trained, and one for its input's, if
    anything before it is, or has an adapter (whose own products are small, and not counted);
    attention counts only pairs that see each other.
    """
    v, llm = config.vision, config.llm
    d, wide, patches = v.hidden_size, llm.hidden_size, (config.tile_size // v.patch_size) ** 2
    depth = config.select_layer % (v.num_hidden_layers + 1)
    rows, block = load.tiles * (patches + 1), 4 * d * d + 2 * d * v.intermediate_size
    project = config.tokens_per_tile * (4 * d * wide + wide * wide)
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    layer = wide * (q + 2 * kv) + q * wide + 3 * wide * llm.intermediate_size
    words = load.tokens * llm.num_hidden_layers * layer + load.scored * llm.vocab_size * wide
    work = (  # in the order of forward: a part, its products with weights, those of attention
        (VISION, rows * depth * block, 2 * rows * (patches + 1) * d * depth),
        (PROJECTOR, load.tiles * project, 0),
        (LANGUAGE, words, 2 * load.pairs * q * llm.num_hidden_layers),
    )
    forward = load.tiles * patches * 3 * v.patch_size**2 * d  # pixels, which get no gradient
    backward, reached = forward * (VISION in cfg.trained_parts), False
    for part, products, attention in work:
        reached |= part in cfg.learning_parts  # by the gradient, on its way to what learns
        forward += products + attention
        backward += products * (part in cfg.trained_parts) + reached * (products + 2 * attention)
    return 2 * forward, 2 * backward


# dense bf16, without sparsity, from the vendor's data sheets
DEVICE_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12}
DEVICE_PEAKS |= {"H100": 989e12, "A100": 312e12, "L40S": 362e12}


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOPs a second of a device at best, where that number is from)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, peak in DEVICE_PEAKS.items():
        if known in name and dtype is torch.bfloat16:
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

    def __init__(self, cfg: TrainConfig, config: InternVLConfig, device: torch.device) -> None:
        self.cfg, self.config, world = cfg, config, rank_and_world()[1]
        say_plan(cfg, config, world, device, say)
        peak, origin = device_peak(device, compute_dtype(cfg, device))
        say(f"an MFU of 1 would be {peak / 1e12:.3g} TFLOP/s a process ({origin})")
        self.peak = peak * world
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter()

    def __call__(self, step: Any, reference: Any) -> dict[str, float]:
        """Metrics of a train.Step, which has lasted since the call before."""
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        cfg, load = self.cfg, load_of(*step.trees, share_images=self.cfg.share_images)
        forward, backward = flops(cfg, self.config, load)
        online = cfg.reference == "online" and reference is not None
        return step.counts | {
            "tokens": load.tokens,
            "tokens_per_s": load.tokens / seconds,
            "pairs_per_s": len(step.pairs) / seconds,
            "mfu": (forward * (1 + online) + backward) / (seconds * self.peak),
        }


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
        cells = ", ".join(f"{name} {n / GB:.4g}" for name, n in vars(self).items())
        reserve = f"{self.needed / GB:.4g} with {RESERVE:.0%} in reserve"
        return f"plan, GB a GPU: {cells}; {self.total / GB:.4g} in all, {reserve}"


def activations_of(
    cfg: TrainConfig, config: InternVLConfig, load: Load, size: int, compiled: bool = False
) -> tuple[int, int, int, int]:
    """Bytes that a pack takes beside weights and gradients: (kept, block, logits, head).

    kept: by all blocks, until backward reaches them.  block: by the language model's last block at
    work.  logits: by the vocabulary at work, before that.  head: the gradient of the head's weight,
    added up over chunks in float32.  size: bytes of a number.

    A part that learns keeps the inputs of its linear layers; only one whose own weights do, not
    adapters, keeps what its norms are multiplied with.
    """
    v, llm = config.vision, config.llm
    d, f = llm.hidden_size, llm.intermediate_size
    layers, depth = llm.num_hidden_layers, config.select_layer % (v.num_hidden_layers + 1)
    q, kv = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    inputs, normed = (LANGUAGE in parts for parts in (cfg.learning_parts, cfg.trained_parts))
    # a token in a DecoderBlock: two norms' float32 input, normed values, output; those of q and k
    token = 2 * d * (4 + size * (normed + inputs))
    token += (llm.architecture == "qwen3") * (q + kv) * (4 + size * normed)  # norms of q and k
    token += size * (3 * q + 3 * kv)  # wqkv's output; rotated q and k; what attention gives
    token += size * f * (3 + inputs)  # w1 x; silu of it; w3 x; their product
    if compiled:  # neither the silu nor the norms' float32 input is kept (seen on an H100)
        token -= size * f + 2 * d * (4 - size)
    inputs, normed = (VISION in parts for parts in (cfg.learning_parts, cfg.trained_parts))
    rms, patches = v.norm_type == "rms_norm", (config.tile_size // v.patch_size) ** 2
    # a row in a VisionBlock: the same; of layer norms the normed values are not kept twice
    row = 2 * (4 + size * normed if rms else size) + 2 * size * inputs
    row += v.qk_normalization * 2 * (4 + size * normed + size)
    row += size * (3 + 1 + 2 * normed)  # qkv's output; attention's; what layer scales multiply
    row = v.hidden_size * row + size * v.intermediate_size * (1 + inputs)  # fc1 x; gelu of it
    again_token, again_row = {
        "full": (size * d, size * v.hidden_size),  # a block's input
        # the input, two products, and attention (but FlexAttention is computed again)
        "selective": (3 * size * d, 4 * size * v.hidden_size),
    }.get(cfg.recompute, (token, row))
    again = cfg.recompute_blocks if cfg.recompute_blocks >= 0 else depth + layers
    again_text, again_vision = max(0, again - depth), min(again, depth)
    kept = load.tokens * (again_text * again_token + (layers - again_text) * token)
    row = again_vision * again_row + (depth - again_vision) * row
    kept += inputs * load.tiles * (patches + 1) * row
    at_work = 2 * size * (f + d)  # gradients on their way through a block
    at_work += token if again_token < token and again_text == layers else 0
    if not cfg.head_rows:  # float32: log-softmax and two gradients
        return kept, load.tokens * at_work, 12 * load.scored * llm.vocab_size, 0
    # a chunk's product and probabilities, those of the chunk before; every hidden state
    logits = min(cfg.head_rows, load.scored) * llm.vocab_size * (12 + 4 * (size == 2))
    logits += 2 * size * load.scored * d
    head = (4 + size) * llm.vocab_size * d * (LANGUAGE in cfg.trained_parts)
    return kept, load.tokens * at_work, logits, head


def meta_model(config: InternVLConfig) -> InternVL:
    """A model of shapes alone, to count its parameters."""
    with torch.device("meta"):
        return InternVL(config, 1)


def count(module: nn.Module, trained: bool = False) -> int:
    """Its parameters, or those of them that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@functools.cache
def sizes_of(cfg: TrainConfig, config: InternVLConfig) -> tuple[int, int, list, list]:
    """Parameters of all and trained ones, and those of each block."""
    model = prepare(meta_model(config), cfg)
    blocks = [[count(unit, trained) for unit in units_of(model)] for trained in (False, True)]
    return count(model), count(model, True), *blocks


def plan_of(cfg: TrainConfig, config: InternVLConfig, gpus: int, device: torch.device) -> Plan:
    """What a GPU needs for packs full of image tokens, a quarter of them responses."""
    shards, size = gpus // cfg.replicate, compute_dtype(cfg, device).itemsize
    state = 2 if cfg.state_dtype == "bf16" else 4
    same = replace(cfg, recompute="off", recompute_blocks=-1, sync="pack")
    everything, trained, blocks, learned = sizes_of(same, config)
    root, root_learned = everything - sum(blocks), trained - sum(learned)
    scored = 2 * max(1, cfg.pack_tokens // 8)
    tiles = max(1, (cfg.pack_tokens - scored - 8) // config.tokens_per_tile)
    load = Load(cfg.pack_tokens, scored, tiles)
    compiled = switched_on(cfg.compile, device)
    kept, in_block, logits, head = activations_of(cfg, config, load, size, compiled)
    together = gpus > 1  # then whole gradients add up in float32
    at_once = cfg.sync == "step" and (together or size < state)  # all stays gathered, or cast
    gathered = size * (everything if at_once else root + 2 * max(blocks))  # one is fetched ahead
    # whole gradients wait for the rest of their block, then are reduced in float32
    in_block += (size + 4) * max(learned)
    if LANGUAGE in cfg.trained_parts:
        in_block += size * config.llm.vocab_size * config.llm.hidden_size
    in_backward = kept + max(in_block, logits + head)
    at_end = (size + 4) * root_learned - 2 * size * max(blocks)
    terms = parse_objective(cfg.loss if cfg.loss != "all" else "mpo")
    online = cfg.reference == "online" or cfg.loss == "all"  # of all rows TR-DPO's
    second = online and needs_reference(terms) and not cfg.lora_rank
    return Plan(
        weights=everything * state // shards,
        gradients=trained * state // shards + at_once * together * 4 * trained,
        optimizer=2 * trained * state // shards,
        gathered=gathered,
        activations=max(in_backward, at_end) - logits,
        logits=logits,
        reference=second * (everything * 4 // shards + size * root),
    )


def memory_of(cfg: TrainConfig, device: torch.device) -> float:
    """Bytes a GPU has, 0 where nobody says."""
    if not cfg.gpu_memory and device.type == "cuda" and not cfg.plan:
        return torch.cuda.get_device_properties(device).total_memory
    return cfg.gpu_memory * GB


def fits(cfg: TrainConfig, config: InternVLConfig, gpus: int, device: torch.device) -> bool:
    """Whether the plan does; where no memory is known none does."""
    return plan_of(cfg, config, gpus, device).needed <= memory_of(cfg, device)


def settle(
    cfg: TrainConfig, config: InternVLConfig, gpus: int, device: torch.device, say: Callable
) -> TrainConfig:
    """--recompute auto and --sync auto as flags: as little computed and sent as memory allows.

    A recomputed block costs a third of its time again; what is sent mostly hides behind products,
    so it waits where there is still room.  On one GPU the casts of all weights in each pack, a
    tenth of a 2B's step, hide behind nothing: there they come first.
    """
    flags_fit = lambda **change: fits(replace(cfg, **change), config, gpus, device)  # noqa: E731
    casts = compute_dtype(cfg, device) is torch.bfloat16 and cfg.state_dtype == "fp32"
    if gpus == 1 and cfg.sync == "auto" and casts:
        least = {"recompute": cfg.recompute.replace("auto", "full")}
        cfg = replace(cfg, sync="step" if flags_fit(sync="step", **least) else "pack")
    if cfg.recompute == "auto":
        cfg, memory = replace(cfg, recompute="full"), memory_of(cfg, device)
        blocks = config.vision.num_hidden_layers + config.llm.num_hidden_layers
        again = bisect_left(range(blocks), True, key=lambda n: flags_fit(recompute_blocks=n))
        reason = f"as few as fit into {memory / GB:.4g} GB"
        if not memory:
            again, reason = (blocks, "--gpu_memory is not known") if cfg.plan else (0, "on a CPU")
        cfg = replace(cfg, recompute_blocks=again)
        say(f"recompute auto: {again} of {blocks} blocks again in backward: {reason}")
    if cfg.sync == "auto":
        room = all_of(gpus > 1 and flags_fit(sync="step"))  # their memories may differ
        cfg = replace(cfg, sync="step" if room else "pack")
        if gpus > 1:
            say(f"sync auto: weights and gradients are exchanged once a {cfg.sync}")
    return cfg


def say_plan(
    cfg: TrainConfig, config: InternVLConfig, gpus: int, device: torch.device, say: Callable
) -> None:
    """Print the plan; InputError where it exceeds the GPU's memory, with flags that would help."""
    memory, plan = memory_of(cfg, device), plan_of(cfg, config, gpus, device)
    if not plan.optimizer:
        raise InputError("nothing to train: what would learn has rate 0 or no block that is run")
    say(plan)
    if plan.needed <= memory:
        say(f"fits into {memory / GB:.4g} GB")
    if not memory or plan.needed <= memory:
        return
    changes: list[dict[str, Any]] = [
        {"recompute": "full", "recompute_blocks": -1}, {"sync": "pack"}, {"replicate": 1},
        {"state_dtype": "bf16", "dtype": "auto"},
        {"pack_tokens": max(cfg.max_length, cfg.pack_tokens // 2)},
    ]  # fmt: skip
    if not cfg.reference_update_every:  # a moving reference is a second model
        changes.append({"reference": "cached"})
        if cfg.lr_language and {cfg.lr_vision, cfg.lr_projector} <= {0, 1}:  # what adapters ask
            changes.append({"lora_rank": 16})
    ways = {" ".join(f"--{name} {x}" for name, x in change.items()): change for change in changes}
    out = [way for way, flags in ways.items() if fits(replace(cfg, **flags), config, gpus, device)]
    more = [n * gpus for n in (2, 4, 8, 16) if cfg.batch_size % (n * gpus) == 0]
    out += [f"{n} GPUs" for n in more if fits(cfg, config, n, device)][:1]
    told = f"the plan needs {plan.needed / GB:.4g} GB a GPU and there are {memory / GB:.4g}"
    if not out:
        raise InputError(f"{told}; none of these alone is enough: {', '.join(ways)}")
    raise InputError(f"{told}; this would fit: {', or '.join(out)}")
