"""The same work done by us and by transformers' InternVL, in turns: times, ratios, FLOPs, memory.

    pip install .[peers]; python tools/race.py             the tables of docs/speed.md

Training is a pair's step without the optimizer.  `official` scores chosen and rejected as two
padded rows with an image each, by the reference and then by the policy, as InternVL's trainer does;
without transformers our own plain code does that.  Generation is transformers' `generate`.  Weights
are random, both models have one shape, and they take turns, so that a busy machine slows both.
"""

import importlib.util
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import flag, parse_cli, run


@dataclass(frozen=True)
class RaceConfig:
    """Do the same work as the peers, in turns, and print the tables of docs/speed.md."""

    only: tuple[str, ...] = flag((), "training or generation; may be repeated; default both")
    rounds: int = flag(5, "turns of each contestant; medians are shown", 1)
    tiny: bool = flag(False, "short lengths and a smaller model: does it run?")


if __name__ == "__main__":
    parse_cli(RaceConfig)  # --help and wrong flags need no torch, which takes seconds

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache import KVCache, Room, num_blocks
from config import InternVLConfig
from data import Tree
from generate import Generator, Group, Prompt, Scheduler, prefill
from model import InternVL
from tools.bench import MODES, Mode, example_pack, example_tree, measured_peak, run_mode
from tools.figures import markdown_table
from tools.releases import named_config
from train import TrainConfig, prepare

Contestants = dict[str, Callable[[], object]]  # the first one is what the others are held against
IMAGE_ID = 1  # as in example_tree


def shapes(tiny: bool) -> InternVLConfig:
    """A model of InternVL3's kind that a CPU trains on 7 tiles within seconds."""
    base = named_config("3-1b")
    vision = replace(base.vision, hidden_size=192, intermediate_size=768, num_hidden_layers=6)
    llm = replace(base.llm, hidden_size=384, intermediate_size=1024, num_hidden_layers=8)
    llm = replace(llm, num_attention_heads=6, num_key_value_heads=2, vocab_size=16384)
    if tiny:
        vision, llm = (replace(part, num_hidden_layers=1) for part in (vision, llm))
    return replace(base, vision=replace(vision, num_attention_heads=3), llm=llm)


def race(
    cfg: RaceConfig, lines: Iterator[tuple[str, Contestants]], memory: bool
) -> Iterator[tuple]:
    """A row a contestant: seconds, how many times as fast as the first, FLOPs and peak memory."""
    for name, contestants in lines:
        seconds: dict[str, list[float]] = {who: [] for who in contestants}
        counts = {}
        for who, work in contestants.items():  # also warms up
            with FlopCounterMode(display=False) as counter:
                peak = measured_peak(work, torch.device("cpu")) / 1e9 if memory else None
                peak or work()
            counts[who] = (counter.get_total_flops() / 1e12, peak)
        for _ in range(cfg.rounds):
            for who, work in contestants.items():
                seconds[who].append(timed(work, torch.device("cpu"), 1, warm=False))
        first = median(next(iter(seconds.values())))
        for who, times in seconds.items():
            tflop, peak = counts[who]
            cells = (f"{median(times):.3g}", f"{first / median(times):.2f}", f"{tflop:.3g}")
            row = (name, who, *cells, "-" if peak is None else f"{peak:.2f}")
            print(*row, sep="  ", file=sys.stderr, flush=True)
            yield row


# --------------------------------------------------------------------------- training


def training(
    cfg: RaceConfig, ours: InternVL, theirs: nn.Module | None
) -> Iterator[tuple[str, Contestants]]:
    """A pair with 7 tiles, 1 tile and none; answers of 300 and 350 tokens as in the paper."""
    answers = (8, 10) if cfg.tiny else (300, 350)
    for name, tiles, prompt in (("7 tiles", 7, 80), ("1 tile", 1, 80), ("text", 0, 80)):
        tree = example_tree(ours.config, 1 if cfg.tiny and tiles else tiles, prompt, answers)
        official = partial(two_passes, theirs, tree) if theirs else our_step(ours, MODES[0], tree)
        line = {"official": official}
        for recompute in ("off", "full"):
            for cached in (False, True):
                way = f"ours, {'cached' if cached else 'online'} reference, recompute {recompute}"
                line[way] = our_step(ours, Mode(way, cached=cached), tree, recompute)
        yield name, line


def our_step(model: InternVL, mode: Mode, tree: Tree, recompute: str = "off") -> Callable:
    cfg = TrainConfig(recompute=recompute)
    packs = [example_pack(model.config, trees, mode.share_prefix) for trees in mode.packs(tree)]

    def step() -> None:
        run_mode(mode, prepare(model, cfg), packs, cfg)
        model.zero_grad()

    return step


def hf_model(config: InternVLConfig) -> nn.Module:
    """transformers' InternVL of the same shape."""
    hf = importlib.import_module("transformers")  # may be absent
    v, llm = config.vision, config.llm
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    vision = hf.InternVLVisionConfig(
        **{name: getattr(v, name) for name in names},
        image_size=[config.tile_size] * 2,
        patch_size=[v.patch_size] * 2,
        attention_bias=True,
    )
    names += ["num_key_value_heads", "vocab_size", "max_position_embeddings"]
    text = hf.Qwen2Config(**{n: getattr(llm, n) for n in names}, tie_word_embeddings=llm.tied)
    whole = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)
    return hf.InternVLForConditionalGeneration(whole)


def as_rows(tree: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """ids, mask, labels (2 s) and pixels of a pair as two padded rows, each with its own image."""
    start, longest = len(tree.trunk), max(map(len, tree.responses))
    ids = torch.tensor([[*tree.trunk, *r, *[2] * (longest - len(r))] for r in tree.responses])
    lengths = torch.tensor([[start + len(r)] for r in tree.responses])
    place = torch.arange(ids.shape[1])
    mask = (place < lengths).long()
    labels = ids.masked_fill((mask == 0) | (place < start), -100)
    tiles = 2 * sum(tree.tiles)
    return ids, mask, labels, torch.randn(tiles, 3, 448, 448) if tiles else None


def two_passes(model: nn.Module, tree: Tree) -> None:
    """The reference's forward (here of the same weights), then the policy's, and backward."""
    ids, mask, labels, pixels = as_rows(tree)

    def logps() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1]
        chosen = labels[:, 1:].clamp(min=0)[..., None]
        picked = logits.float().log_softmax(-1).gather(-1, chosen)[..., 0]
        return (picked * (labels[:, 1:] >= 0)).sum(-1)

    with torch.no_grad():
        logps()
    logps().sum().backward()
    model.zero_grad()


# --------------------------------------------------------------------------- generation


class NoText:
    """In the place of a tokenizer: answers are ids alone and never end early."""

    im_end_id = -1

    def banned_ids(self, vocab: int) -> list[int]:
        return []


def generation(
    cfg: RaceConfig, ours: InternVL, theirs: nn.Module
) -> Iterator[tuple[str, Contestants]]:
    """One greedy answer, many prompts, many samples of one prompt with an image."""
    few, tiles = (4, 1) if cfg.tiny else (32, 7)
    pixels = torch.randn(tiles, 3, 448, 448)
    image = [IMAGE_ID] * tiles * ours.config.tokens_per_tile
    cases = (
        ("one greedy answer, prompt 200", [200], [], 1, 2 * few, 0.0),
        (f"{2 * few} prompts of 100, greedy", [100] * 2 * few, [], 1, few, 0.0),
        (f"{few} samples, {tiles} tiles", [80], image, few, few, 1.0),
    )
    for name, lengths, image, samples, new, temperature in cases:
        prompts = [[*image, *torch.randint(3, 16384, (n,)).tolist()] for n in lengths]
        tiles = pixels if image else None
        yield (
            name,
            {
                "transformers": partial(
                    hf_answers, theirs, prompts, tiles, samples, new, temperature
                ),
                "ours": partial(our_answers, ours, prompts, tiles, samples, new, temperature),
            },
        )


@torch.no_grad()
def hf_answers(
    model: nn.Module,
    prompts: list,
    pixels: Tensor | None,
    samples: int,
    new: int,
    temperature: float,
) -> Tensor:
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
    options = sampling if temperature else {"do_sample": False}
    ids, lengths = torch.tensor(prompts), {"max_new_tokens": new, "min_new_tokens": new}
    ones, model = torch.ones_like(ids), model.eval()
    options |= {"pad_token_id": 0, "attention_mask": ones}
    if pixels is not None:
        options["pixel_values"] = pixels
    return model.generate(ids, **options, **lengths)


def our_answers(
    model: InternVL,
    prompts: list,
    pixels: Tensor | None,
    samples: int,
    new: int,
    temperature: float,
) -> list:
    generator = Generator(model, NoText(), temperature=temperature, max_new_tokens=new)
    generator.tiles = lambda prompt: pixels
    groups = [
        Group(Prompt(str(n), ""), ids, [], 0, new, list(range(samples)))
        for n, ids in enumerate(prompts)
    ]
    return [row.ids for row in Scheduler(generator, iter(groups)).run() if row.finish_reason]


# --------------------------------------------------------------------------- shared with gpu_speed


class Sampling:
    """Many rows that continue one prompt, step by step."""

    def __init__(
        self, model: InternVL, ids: list[int], rows: int, steps: int, decode: Callable
    ) -> None:
        self.model, self.ids, self.decode = model, ids, decode
        head, blocks = model.language_model.head, num_blocks(len(ids)) + rows * num_blocks(steps)
        rounded = head.device.type == "cuda"
        config = model.config.llm
        self.cache = KVCache(config, blocks, head.device, head.dtype, rows > 1, rounded=rounded)
        self.prompt, self.answers = Room(), [Room() for _ in range(rows)]
        self.cache.enlarge(self.prompt, len(ids), prompt=True)

    def prefill(self) -> None:
        prefill(self.model, self.ids, None, self.cache.prefill(self.prompt, len(self.ids)))

    def step(self) -> None:
        for answer in self.answers:
            self.cache.enlarge(answer, answer.length + 1)
        rows = [(self.prompt, answer) for answer in self.answers]
        self.decode(self.model, self.cache, self.cache.plan(rows, [3] * len(rows)))


def timed(work: Callable[[], object], device: torch.device, count: int, warm: bool = True) -> float:
    """Seconds a call, after one call to warm up."""
    if warm:
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, 5)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    cfg = parse_cli(RaceConfig)
    peer = importlib.util.find_spec("transformers")
    if not peer:
        print("transformers is not installed: plain code of ours is `official`; no generation")
    cores = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, {platform.machine()}"
    print(f"torch {torch.__version__}, {cores}; medians of {cfg.rounds}")
    config = shapes(cfg.tiny)
    with torch.device("meta"):
        ours = InternVL(config, IMAGE_ID)
    ours = ours.to_empty(device="cpu")
    theirs = hf_model(config) if peer else None
    for model in filter(None, (ours, theirs)):
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
    if "training" in (cfg.only or ["training"]):
        rows = race(cfg, training(cfg, ours, theirs), memory=True)
        print(markdown_table(("a pair's step", "who", "s", "times", "TFLOP", "peak GB"), rows))
    if "generation" in (cfg.only or ["generation"]) and theirs:
        rows = race(cfg, generation(cfg, ours, theirs), memory=False)
        print(markdown_table(("generation", "who", "s", "times", "TFLOP", "peak GB"), rows))


if __name__ == "__main__":
    run(main)
