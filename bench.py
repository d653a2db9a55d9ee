"""What training costs: FLOPs, bytes and seconds of a step, known before it runs and measured after.

    flops       useful FLOPs of a pack by part, forward and backward; recomputing is not useful
    dry_peak    peak bytes of a pack's activations: the real code, run on shapes without memory
    plan        bytes a GPU needs for weights, gradients, optimizer, activations, logits, reference
    bench       one step with each idea of this repository switched on in turn, against plain code

train.py prints the plan before every run and the FLOPs as MFU in its log; it also has the commands:

    python train.py --plan --size 8b --gpus 8
    python train.py --bench --size 8b

The functions that score and shard are train.py's and are passed in, so what is measured is what
trains.
"""

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from data import Pack, Tree, images_of, lay_out
from losses import row_logps, sum_by_response
from model import InternVL, InternVLConfig, TreeAttention, causal_attention

GB = 1e9
PARTS = ("vision_model", "projector", "language_model")


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
    kv = llm.num_key_value_heads * llm.head_dim
    layer = wide * (wide + 2 * kv) + wide * wide + 3 * wide * llm.intermediate_size
    decoder = 2 * load.tokens * llm.num_hidden_layers * layer
    attention = 4 * load.pairs * wide * llm.num_hidden_layers
    head = 2 * load.scored * llm.vocab_size * wide
    before = vision or projector
    return {
        "vit": (
            patching + vit + vit_attention,
            vision * (patching + 2 * vit + 2 * vit_attention),
        ),
        "projector": (project, project * (projector + before)),
        "llm": (decoder, decoder * (language + (language or before))),
        "attention": (attention, 2 * attention * (language or before)),
        "head": (head, head * (language + (language or before))),
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


# --------------------------------------------------------------------------- bytes


def measured_peak(function: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that a call holds above what stood before, as the allocator counts them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what earlier calls left must not be freed, and counted, in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while they live; meta tensors too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.enter(tensor.untyped_storage())
        return out

    def enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.leave, key, size)

    def leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class ShadowAttention(torch.autograd.Function):
    """Fused attention on shapes alone: keeps q, k, v, output and a number a row, as the real one.

    Without it torch spells attention out on the meta device, with a (head s s) tensor.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else q.new_empty(mask.shape)  # the CPU's copy of the mask
        ctx.save_for_backward(q, k, v, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def shadow_sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how) -> Tensor:
    """Stands in for torch's scaled_dot_product_attention during a dry run."""
    return ShadowAttention.apply(q, k, v, attn_mask)


def shadow_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as FlexAttention's on CUDA: no mask in memory."""
    return ShadowAttention.apply(*(t.transpose(1, 2) for t in (q, k, v)), None).transpose(1, 2)


def dry_embed(model: InternVL, input_ids: Tensor, tiles: Tensor, order: Tensor, _: bool) -> Tensor:
    """InternVL.embed without looking at values, which tensors without memory do not have."""
    x = model.language_model.model.tok_embeddings(input_ids)
    features = model.image_features(tiles).to(x.dtype)[order].flatten(0, 1)
    return x.masked_scatter((input_ids == 0)[..., None], features)


def meta_model(config: InternVLConfig, dtype: torch.dtype) -> InternVL:
    """A model of shapes alone that can be run."""
    with torch.device("meta"):
        model = InternVL(config, 0).to(dtype)
    model.embed = partial(dry_embed, model)
    return model


def units_of(model: InternVL) -> list[nn.Module]:
    """What FSDP gathers together: each block, then (the root) all the rest."""
    return [*model.vision_model.encoder.layers, *model.language_model.model.layers]


def hold_gradients(model: InternVL) -> None:
    """Keep a block's gradients until the next block has some, and the root's for good: as FSDP."""
    held: list[nn.Parameter] = []
    owner = {p: number for number, unit in enumerate(units_of(model)) for p in unit.parameters()}

    def hook(p: nn.Parameter) -> None:
        if held and owner[held[-1]] != owner[p]:
            for other in held:
                other.grad = None
            held.clear()
        held.append(p)

    for p in owner:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(hook)


def example_trees(config: InternVLConfig, tokens: int, answers: tuple[int, ...]) -> list[Tree]:
    """One tree of about `tokens` tokens, as many of them image tokens as possible."""
    image = config.tokens_per_tile
    tiles = max(1, (tokens - sum(answers) - 8) // image)
    text = max(8, tokens - sum(answers) - tiles * image)
    return [example_tree(config, tiles, text, answers)]


def example_tree(config: InternVLConfig, tiles: int, prompt: int, answers: tuple[int, ...]) -> Tree:
    """A tree of lengths alone: id 0 stands for an image token, 1 for text."""
    trunk = [0] * (tiles * config.tokens_per_tile) + [1] * prompt
    return Tree(
        trunk, [[1] * n for n in answers], [0], [1], [(Path("x"), tiles, False)], [tiles], ["x"]
    )


def example_pack(
    config: InternVLConfig, trees: list[Tree], device: torch.device | str, **how: bool
) -> Pack:
    """A pack of example trees with noise for pixels."""
    pack = lay_out(trees, how.get("share_prefix", True))
    load, size = load_of(trees, **how), config.tile_size
    pack.tiles = torch.empty(load.tiles, 3, size, size, device=device)
    slots = int((pack.input_ids == 0).sum()) // config.tokens_per_tile
    pack.tile_order = torch.arange(slots) % max(1, load.tiles)
    if torch.device(device).type != "meta":
        pack.tiles.normal_()
    return pack.to(torch.device(device))


def dry_peak(model: InternVL, pack: Pack, score: Callable, attend: Callable | None = None) -> int:
    """Peak bytes of a forward and backward pass of a meta_model, weights not counted."""
    model.zero_grad(set_to_none=True)
    with mock.patch.object(F, "scaled_dot_product_attention", shadow_sdpa), Ledger(model) as ledger:
        sums, _ = score(model, pack, attend)
        if sums.requires_grad:
            sums.sum().backward()
    return ledger.peak


# --------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU at the worst moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # whole weights and gradients of the blocks at work
    activations: int
    logits: int
    reference: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        cells = [f"{name} {n / GB:.4g}" for name, n in vars(self).items()]
        return f"plan, GB a GPU: {', '.join(cells)}; {self.total / GB:.4g} in all"


def shard_numel(shape: torch.Size, shards: int) -> int:
    """Elements of the largest shard, as torch.chunk splits the rows."""
    return -(-shape[0] // shards) * (shape.numel() // shape[0] if shape[0] else 0)


def make_plan(
    model: InternVL,
    pack: Pack,
    score: Callable,
    *,
    shards: int,
    head_rows: int,
    state_bytes: int,
    second_model: bool,
    flex: bool,
) -> Plan:
    """What one GPU needs for a step over packs like `pack`; `model` is a prepared meta_model.

    state_bytes: of a number of the shards, 4 or 2; the model's own dtype is that of compute.
    """
    params = list(model.parameters())
    size = params[0].element_size()
    held = sum(shard_numel(p.shape, shards) for p in params)
    trained = sum(shard_numel(p.shape, shards) for p in params if p.requires_grad)
    blocks = [sum(p.numel() for p in unit.parameters()) for unit in units_of(model)]
    learned = [sum(p.numel() for p in u.parameters() if p.requires_grad) for u in units_of(model)]
    root = sum(p.numel() for p in params) - sum(blocks)
    root_learned = sum(p.numel() for p in params if p.requires_grad) - sum(learned)

    hold_gradients(model)
    with_head = dry_peak(model, pack, score, shadow_attend if flex else None)
    rows = min(head_rows or len(pack.target), len(pack.target))
    logits = rows * model.config.llm.vocab_size * (4 + size)
    gathered = root + 2 * max(blocks)
    at_work = gathered * size + 4 * max(learned)
    at_end = (root + root_learned) * size + 4 * root_learned
    return Plan(
        weights=held * state_bytes,
        gradients=trained * state_bytes,
        optimizer=2 * trained * state_bytes,
        gathered=max(at_work, at_end - with_head),
        activations=max(0, with_head - logits),
        logits=min(logits, with_head),
        reference=(held * 4 + root * size) if second_model else 0,
    )


# --------------------------------------------------------------------------- the bench

PAPER = {"tiles": 7, "prompt": 80, "answers": (300, 350)}  # lengths of a typical pair


@dataclass(frozen=True)
class Mode:
    """A way to do one pair's step."""

    name: str
    share_images: bool = True
    share_prefix: bool = True
    chunked: bool = True
    cached: bool = False
    compile: bool = False

    def packs(self, tree: Tree) -> list[list[Tree]]:
        """The plain way takes each (prompt, response) alone."""
        if self.share_images:
            return [[tree]]
        return [[replace(tree, responses=[r], chosen=[0], rejected=[])] for r in tree.responses]

    def loads(self, tree: Tree) -> list[Load]:
        loads = [load_of(pack, self.share_prefix) for pack in self.packs(tree)]
        return loads if self.chunked else [replace(load, scored=load.tokens) for load in loads]

    def flops(self, config: InternVLConfig, tree: Tree) -> int:
        parts = [flops(config, load) for load in self.loads(tree)]
        forward = 0 if self.cached else sum(total_flops(p, backward=False) for p in parts)
        return forward + sum(map(total_flops, parts))


MODES = (
    Mode("plain, two passes", False, False, False),
    Mode("+ image once", True, False, False),
    Mode("+ prompt once", True, True, False),
    Mode("+ head by chunks"),
    Mode("+ cached reference", cached=True),
    Mode("+ compile", cached=True, compile=True),
)


def full_score(
    model: InternVL, pack: Pack, attend: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """The plain head: logits of every position, in float32, kept for backward."""
    if attend is None:
        lone = int(pack.tree.max()) == int(pack.branch.max()) - 1 == 0
        attend = causal_attention if lone else TreeAttention(pack.tree, pack.branch)
    order, where = pack.tile_order, pack.positions
    logits = model(pack.input_ids, pack.tiles, where, attend, None, order)
    logps = logits[0].log_softmax(-1)[pack.predictor, pack.target]
    return sum_by_response(logps, pack.response, pack.num_responses)


def run_mode(mode: Mode, model: InternVL, packs: list[Pack], score: Callable, attend=None) -> None:
    """One pair: the reference's forward (here of the same weights), the policy's, backward."""
    scorer = score if mode.chunked else full_score
    model.zero_grad(set_to_none=True)
    for pack in packs:
        if not mode.cached:
            with torch.no_grad():
                scorer(model, pack, attend)
        scorer(model, pack, attend)[0].sum().backward()


def dry_mode(mode: Mode, model: InternVL, tree: Tree, score: Callable) -> int:
    """Peak bytes of a mode, weights not counted, on shapes alone."""
    packs = packs_of(mode, model.config, tree, "meta")
    with mock.patch.object(F, "scaled_dot_product_attention", shadow_sdpa), Ledger(model) as ledger:
        run_mode(mode, model, packs, score, shadow_attend)
    model.zero_grad(set_to_none=True)
    return ledger.peak


def packs_of(
    mode: Mode, config: InternVLConfig, tree: Tree, device: torch.device | str
) -> list[Pack]:
    how = {"share_prefix": mode.share_prefix}
    return [example_pack(config, trees, device, **how) for trees in mode.packs(tree)]


def head_peak(config: InternVLConfig, rows: int, chunk: int, dtype: torch.dtype) -> int:
    """Peak bytes of the head over `rows` rows, beside its weight's gradient; chunk 0 = plain."""
    d, vocab = config.llm.hidden_size, config.llm.vocab_size
    with torch.device("meta"):
        hidden = torch.empty(rows, d, dtype=dtype, requires_grad=True)
        head = nn.Linear(d, vocab, bias=False, dtype=dtype).requires_grad_(False)
        target = torch.empty(rows, dtype=torch.long)
    with Ledger(head) as ledger:
        if chunk:
            logps = row_logps(hidden, head.weight, target, chunk)
        else:
            logps = head(hidden).float().log_softmax(-1).gather(-1, target[:, None])
        logps.sum().backward()
    return ledger.peak


def paper_tree(config: InternVLConfig, shorter: int = 1) -> Tree:
    """One pair of the paper's lengths; small models get more tiles, so that tokens are as many.

    All lengths are divided by `shorter`.
    """
    tiles = max(1, PAPER["tiles"] * 256 // config.tokens_per_tile // shorter)
    answers = tuple(n // shorter for n in PAPER["answers"])
    return example_tree(config, tiles, PAPER["prompt"] // shorter, answers)


def bench(
    config: InternVLConfig,
    score: Callable,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_rows: int,
    dry: bool,
    prepare: Callable[[InternVL], InternVL],
    say: Callable = print,
    compile_too: bool = False,
) -> list[dict[str, float]]:
    """A line for each mode: FLOPs, peak memory and seconds of one pair, and their ratio to plain.

    FLOPs are the useful ones; memory is beside the weights and their gradients.  With `dry`
    nothing is run: FLOPs by formula, memory by running shapes.
    """
    tree, rows = paper_tree(config, 1 if dry or device.type == "cuda" else 4), []
    model = meta_model(config, dtype) if dry else InternVL(config, 0).to(device, dtype)
    prepare(model).train()
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    parameters = sum(p.numel() for p in model.parameters()) / 1e9
    answers = [len(r) for r in tree.responses]
    say(
        f"{parameters:.3g} B parameters, {sum(tree.tiles)} tiles, {len(tree.trunk)} prompt tokens, "
        f"answers of {answers}; {'shapes alone' if dry else device}, {dtype}; a pair:"
    )
    for mode in MODES:
        if mode.compile and (dry or not compile_too):
            continue
        if mode.compile:
            for unit in units_of(model):
                unit.compile()
        row = {"tflop": mode.flops(config, tree) / 1e12}
        scored = max(load.scored for load in mode.loads(tree))
        row["head GB"] = head_peak(config, scored, head_rows * mode.chunked, dtype) / GB
        if dry:
            row["peak GB"] = dry_mode(mode, model, tree, score) / GB
        else:
            packs = packs_of(mode, config, tree, device)
            once = partial(run_mode, mode, model, packs, score)
            row["peak GB"] = measured_peak(once, device) / GB
            row["seconds"] = min(seconds_of(once, device) for _ in range(3))
        rows.append(row)
        cells = [f"{k} {v:9.4g} ({v / rows[0][k]:5.3f})" for k, v in row.items()]
        say(f"{mode.name:<20}", "  ".join(cells))
    return rows
