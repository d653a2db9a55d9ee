"""One step with each idea of this repository switched on in turn, against plain code.

    python train.py --bench --size 8b

Two tables with a line a mode: by formula for the model asked for (tools/plan.py), and measured on
one that fits here: TFLOP, GB of the head, GB at the peak, seconds, each beside its ratio to plain.
FLOPs are the useful ones of one pair; memory is beside the weights and their gradients.  What
scores and shards is train.py's own, so what is measured is what trains.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import train
from config import InternVLConfig, load_config
from data import Pack, Tree, apart, lay_out
from model import InternVL
from runtime import read_json
from tools import plan
from train import TrainConfig, compute_dtype, prepare, score

Row = dict[str, float]  # a table's column -> its value
# a mode's name -> the flags that it changes; each goes on from the one before
MODES = read_json(Path(__file__).with_name("modes.json"))


def modes_of(cfg: TrainConfig, device: torch.device) -> list[tuple[str, TrainConfig]]:
    """Name and flags of each mode; without the last where cfg does not compile."""
    compiled, modes = train.switched_on(cfg.compile, device), []
    cfg = replace(cfg, recompute=cfg.recompute.replace("auto", "full"))  # memory is compared
    for name, change in MODES.items():
        cfg = replace(cfg, **change)
        modes.append((name, cfg))
    return modes if compiled else modes[:-1]


def packs_of(cfg: TrainConfig, trees: list[Tree]) -> list[list[Tree]]:
    """The trees of each pack: the plain way takes each (prompt, response) alone."""
    parts = trees if cfg.share_prefix else [part for tree in trees for part in apart(tree)]
    return [parts] if cfg.share_images else [[part] for part in parts]


def example_tree(config: InternVLConfig, tiles: int, prompt: int, answers: tuple[int, ...]) -> Tree:
    """A tree of lengths alone: id 1 stands for an image token, 0 for text."""
    trunk = [1] * (tiles * config.tokens_per_tile) + [0] * prompt
    images = [(Path("x"), tiles, False)]
    return Tree(trunk, [[0] * n for n in answers], images, [tiles], [(None, 0, 1)])


def paper_tree(config: InternVLConfig, shorter: int = 1) -> Tree:
    """A typical pair of the paper: 7 tiles, a prompt of 80 tokens, answers of 300 and 350.

    Small models get more tiles, so that tokens are as many.  All lengths are divided by `shorter`.
    """
    tiles = max(1, 7 * 256 // config.tokens_per_tile // shorter)
    return example_tree(config, tiles, 80 // shorter, (300 // shorter, 350 // shorter))


def example_pack(config: InternVLConfig, trees: list[Tree]) -> Pack:
    """A pack of example trees with noise for pixels."""
    pack, tiles = lay_out(trees), plan.load_of(trees).tiles
    pack.tiles = torch.randn(tiles, 3, config.tile_size, config.tile_size)
    slots = int((pack.input_ids == 1).sum()) // config.tokens_per_tile
    pack.tile_order = torch.arange(slots) % max(1, tiles)
    return pack


def step_of(cfg: TrainConfig, model: InternVL, trees: list[Tree]) -> Callable[[], None]:
    """Scores and goes backward: the reference (here of the same weights), then the policy."""
    packs = []
    for part in packs_of(cfg, trees):
        pack = example_pack(model.config, part)
        if not cfg.head_rows:  # as the plain head does it: the logits of every position
            ids = pack.input_ids[0]
            every = {"predictor": torch.arange(len(ids)), "target": ids, "num_responses": 1}
            pack = replace(pack, response=torch.zeros_like(ids), **every)
        packs.append(pack.to(model.language_model.head.device))

    def step() -> None:
        for pack in packs:
            if cfg.reference == "online":
                with torch.no_grad():
                    score(model, pack, cfg)
            score(model, pack, cfg)[0].sum().backward()
        model.zero_grad()

    return step


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
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def with_noise(model: InternVL, device: torch.device) -> InternVL:
    """A model of shapes alone gets random weights there."""
    for p in model.to_empty(device=device).parameters():
        nn.init.normal_(p, std=0.02)
    return model


def plan_or_bench(cfg: TrainConfig) -> None:
    """train.py --plan or --bench, of a named --size or of the model in cfg.model_dir."""
    config = plan.named_config(cfg.size) if cfg.size else load_config(cfg.model_dir)
    cfg = train.with_recipe(cfg, config, print)
    if cfg.bench:
        run_bench(cfg, config)
    else:
        device = torch.device("cuda")
        cfg = plan.settle(cfg, config, cfg.gpus, device, print)
        plan.say_plan(cfg, config, cfg.gpus, device, print)


def run_bench(cfg: TrainConfig, config: InternVLConfig) -> None:
    """Print both tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes, on_gpu = modes_of(cfg, device), device.type == "cuda"
    say_size(config, tree := paper_tree(config), "shapes alone, torch.bfloat16")
    say_rows((name, formula_row(mode, config, tree, 2)) for name, mode in modes[:5])
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 2 * plan.GB
    if 3 * 2 * plan.count(plan.meta_model(config)) > memory:
        config = plan.named_config("2b" if on_gpu else "toy")
        print(f"that is too large for this device; measured on a smaller model, {device}:")
    tree = paper_tree(config, 1 if on_gpu else 4)
    say_size(config, tree, f"{device}, {compute_dtype(cfg, device)}")
    say_rows(measured_rows(modes, config, tree, device))


def formula_row(cfg: TrainConfig, config: InternVLConfig, tree: Tree, size: int) -> Row:
    """Of a pair's step; size: bytes of a number."""
    tflop, rooms = 0.0, []
    for trees in packs_of(cfg, [tree]):
        load = plan.load_of(trees)
        if not cfg.head_rows:
            load = replace(load, scored=load.tokens)  # see step_of
        forward, backward = plan.flops(cfg, config, load)
        tflop += (forward * (1 + (cfg.reference == "online")) + backward) / 1e12
        kept, block, logits, head = plan.activations_of(cfg, config, load, size)
        rooms.append((kept + max(block, logits + head), logits))
    peak, logits = max(rooms)
    return {"tflop": tflop, "head GB": logits / plan.GB, "peak GB": peak / plan.GB}


def measured_rows(
    modes: list[tuple[str, TrainConfig]], config: InternVLConfig, tree: Tree, device: torch.device
) -> Iterator[tuple[str, Row]]:
    """The formula's rows with the peak of a run instead, and its seconds."""
    dtype = compute_dtype(modes[0][1], device)
    model = with_noise(plan.meta_model(config).to(dtype), device)
    model = prepare(model, modes[0][1]).train()
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for name, cfg in modes:
        if cfg.compile == "on":
            train.compile_blocks(model)
        step, row = step_of(cfg, model, [tree]), formula_row(cfg, config, tree, dtype.itemsize)
        row["peak GB"] = measured_peak(step, device) / plan.GB
        yield name, row | {"seconds": min(plan.seconds_of(step, device) for _ in range(3))}


def say_size(config: InternVLConfig, tree: Tree, place: str) -> None:
    size, answers = plan.count(plan.meta_model(config)), [len(answer) for answer in tree.responses]
    lengths = f"{sum(tree.tiles)} tiles, {len(tree.trunk)} prompt tokens, answers of {answers}"
    print(f"{size / 1e9:.3g} B parameters, {lengths}; {place}; a pair:")


def say_rows(rows: Iterable[tuple[str, Row]]) -> None:
    plain: Row = {}
    for name, row in rows:
        plain = plain or row
        cells = [f"{key} {value:9.4g} ({value / plain[key]:5.3f})" for key, value in row.items()]
        print(f"{name:<20}", "  ".join(cells), flush=True)
