"""One step with each idea of this repository switched on in turn, against plain code.

    python train.py --bench --size 8b

Two tables with a line a mode: by formula for the model asked for (tools/plan.py), and measured on
one that fits here: TFLOP, GB of the head, GB at the peak, seconds, each beside its ratio to plain.
FLOPs are the useful ones of one pair; memory is beside the weights and their gradients.  What
scores and shards is train.py's own, so what is measured is what trains.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from config import InternVLConfig
from data import Pack, Tree, lay_out
from model import InternVL
from tools.plan import (
    GB,
    Activations,
    Load,
    activations_of,
    count,
    flops,
    load_of,
    meta_model,
    seconds_of,
    total_flops,
)
from tools.releases import named_config
from train import PARTS, TrainConfig, compute_dtype, prepare, score, switched_on, units_of

Row = dict[str, float]  # a table's column -> its value


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
        """Of each pack; the plain head meets the vocabulary at every token."""
        loads = [load_of(pack, self.share_prefix) for pack in self.packs(tree)]
        return loads if self.chunked else [replace(load, scored=load.tokens) for load in loads]

    def flops(self, config: InternVLConfig, tree: Tree) -> int:
        """Of a pair's step: the reference's forward, unless it is cached, and the policy's both."""
        parts = [flops(config, load) for load in self.loads(tree)]
        forward = 0 if self.cached else sum(total_flops(p, backward=False) for p in parts)
        return forward + sum(map(total_flops, parts))

    def room(self, cfg: TrainConfig, config: InternVLConfig, tree: Tree, size: int) -> Activations:
        """Of the larger pack, everything trained; `size`: bytes of a number."""
        rows, learns = (cfg.head_rows or 128) * self.chunked, dict.fromkeys(PARTS, (True, True))
        again = (cfg.recompute, cfg.recompute_blocks)
        rooms = [activations_of(config, n, size, *again, rows, learns) for n in self.loads(tree)]
        return max(rooms, key=lambda room: room.peak)


MODES = (
    Mode("plain, two passes", False, False, False),
    Mode("+ image once", True, False, False),
    Mode("+ prompt once", True, True, False),
    Mode("+ head by chunks"),
    Mode("+ cached reference", cached=True),
    Mode("+ compile", cached=True, compile=True),
)


def example_tree(config: InternVLConfig, tiles: int, prompt: int, answers: tuple[int, ...]) -> Tree:
    """A tree of lengths alone: id 1 stands for an image token, 0 for text."""
    trunk = [1] * (tiles * config.tokens_per_tile) + [0] * prompt
    images = [(Path("x"), tiles, False)]
    return Tree(trunk, [[0] * n for n in answers], [0], [1], images, [tiles], ["x"])


def paper_tree(config: InternVLConfig, shorter: int = 1) -> Tree:
    """A typical pair of the paper: 7 tiles, a prompt of 80 tokens, answers of 300 and 350.

    Small models get more tiles, so that tokens are as many.  All lengths are divided by `shorter`.
    """
    tiles = max(1, 7 * 256 // config.tokens_per_tile // shorter)
    return example_tree(config, tiles, 80 // shorter, (300 // shorter, 350 // shorter))


def example_pack(config: InternVLConfig, trees: list[Tree], share_prefix: bool = True) -> Pack:
    """A pack of example trees with noise for pixels."""
    pack, tiles = lay_out(trees, share_prefix), load_of(trees, share_prefix).tiles
    pack.tiles = torch.randn(tiles, 3, config.tile_size, config.tile_size)
    slots = int((pack.input_ids == 1).sum()) // config.tokens_per_tile
    pack.tile_order = torch.arange(slots) % max(1, tiles)
    return pack


def at_every_token(pack: Pack) -> Pack:
    """As the plain head does it: the logits of every position."""
    ids = pack.input_ids[0]
    everywhere, owner = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.long)
    return replace(pack, predictor=everywhere, target=ids, response=owner, num_responses=1)


def run_mode(mode: Mode, model: InternVL, packs: list[Pack], cfg: TrainConfig) -> None:
    """One pair: the reference's forward (here of the same weights), the policy's, backward."""
    for pack in packs:
        if not mode.cached:
            with torch.no_grad():
                score(model, pack, cfg)
        score(model, pack, cfg)[0].sum().backward()


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


def run_bench(cfg: TrainConfig, config: InternVLConfig) -> None:
    """Print both tables; --recompute auto is full here, as memory is what is compared."""
    cfg, tree = replace(cfg, recompute=cfg.recompute.replace("auto", "full")), paper_tree(config)
    say_size(config, tree, "shapes alone, torch.bfloat16")
    say_rows((mode, formula_row(mode, cfg, config, tree, 2)) for mode in MODES[:-1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 2 * GB
    if 3 * 2 * count(meta_model(config)) > memory:
        config = named_config("2b" if on_gpu else "toy")
        print(f"that is too large for this device; measured on a smaller model, {device}:")
    dtype, tree = compute_dtype(cfg, device), paper_tree(config, 1 if on_gpu else 4)
    model = prepare(meta_model(config).to(dtype), cfg).to_empty(device=device).train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    say_size(config, tree, f"{device}, {dtype}")
    modes = MODES if switched_on(cfg.compile, device) else MODES[:-1]
    say_rows((mode, measured_row(mode, cfg, model, tree, device)) for mode in modes)


def formula_row(mode: Mode, cfg: TrainConfig, config: InternVLConfig, tree: Tree, size: int) -> Row:
    room, tflop = mode.room(cfg, config, tree, size), mode.flops(config, tree) / 1e12
    return {"tflop": tflop, "head GB": room.logits / GB, "peak GB": room.peak / GB}


def measured_row(
    mode: Mode, cfg: TrainConfig, model: InternVL, tree: Tree, device: torch.device
) -> Row:
    """The formula's row with the peak of a run instead, and its seconds."""
    if mode.compile:
        for unit in units_of(model):
            unit.compile()
    packs = [example_pack(model.config, trees, mode.share_prefix) for trees in mode.packs(tree)]
    if not mode.chunked:
        packs, cfg = [at_every_token(pack) for pack in packs], replace(cfg, head_rows=0)
    once = partial(run_mode, mode, model, [pack.to(device) for pack in packs], cfg)
    row = formula_row(mode, cfg, model.config, tree, next(model.parameters()).itemsize)
    row["peak GB"] = measured_peak(once, device) / GB
    return row | {"seconds": min(seconds_of(once, device) for _ in range(3))}


def say_size(config: InternVLConfig, tree: Tree, place: str) -> None:
    size, answers = count(meta_model(config)) / 1e9, [len(answer) for answer in tree.responses]
    lengths = f"{sum(tree.tiles)} tiles, {len(tree.trunk)} prompt tokens, answers of {answers}"
    print(f"{size:.3g} B parameters, {lengths}; {place}; a pair:")


def say_rows(rows: Iterable[tuple[Mode, Row]]) -> None:
    plain: Row = {}
    for mode, row in rows:
        plain = plain or row
        cells = [f"{name} {value:9.4g} ({value / plain[name]:5.3f})" for name, value in row.items()]
        print(f"{mode.name:<20}", "  ".join(cells), flush=True)
