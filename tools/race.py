"""The same work done by us and by others, in turns: times, ratios, FLOPs, memory.

    pip install .[peers]; python tools/race.py | tee race.md      the lines behind docs/speed.md

Training is a pair's step without the optimizer.  `official` scores chosen and rejected as two
padded rows with an image each, by the reference and then by the policy, as InternVL's trainer does,
on transformers' InternVL; TRL's DPOTrainer does its own step on the language model alone.
Generation is transformers' `generate`.  Whoever is not installed does not race.  All take turns on
one thread; seconds are the CPU's, so that other programs hardly count.
"""

import copy
import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import command_line, flag, parse_cli, run


@command_line
class RaceConfig:
    """Do the same work as the peers, in turns, and print the lines behind docs/speed.md."""

    only: tuple[Literal["training", "length", "generation"], ...] = flag((), "may be repeated")
    seconds: int = flag(40, "of CPU for the turns of a line; each has one at least", 1)
    tiny: bool = flag(False, "short lengths and a smaller model: does it run?")


import tokenizers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import InternVLConfig
from data import Tree
from generate import Generator, Group, Prompt, Scheduler
from model import InternVL
from tools.bench import example_tree, measured_peak, step_of, with_noise
from tools.export import hf_config, text_config
from tools.figures import markdown_table
from tools.plan import meta_model, named_config
from train import TrainConfig, compile_blocks, prepare, switched_on

Contestants = dict[str, Callable[[], object]]  # the first one is what the others are held against
Line = tuple[str, Contestants]
HEADER = ("work", "who", "s", "times", "turns", "TFLOP", "peak GB")


def shapes(tiny: bool) -> InternVLConfig:
    """InternVL3-1B made small: of a pair's FLOPs ViT, layers and head have the shares they have
    there (by formula official takes 2.73, 2.18 and 1.52 times ours with 7 tiles, 1 and none; the
    1B: 2.72, 2.25 and 1.50)."""
    base = named_config("3-1b")
    vision = replace(base.vision, hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    llm = replace(base.llm, hidden_size=384, intermediate_size=2048, vocab_size=8192)
    llm = replace(llm, num_attention_heads=6, num_hidden_layers=1 if tiny else 3)
    return replace(base, vision=replace(vision, num_hidden_layers=1 if tiny else 4), llm=llm)


def race(cfg: RaceConfig, name: str, contestants: Contestants, memory: bool) -> None:
    """Print a row each: median seconds of CPU, times as fast as the first, FLOPs, peak memory."""
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    counts = {}
    for who, work in contestants.items():  # also warms up
        with FlopCounterMode(display=False) as counter:
            peak = f"{measured_peak(work, torch.device('cpu')) / 1e9:.2f}" if memory else work()
        counts[who] = f"{counter.get_total_flops() / 1e12:.3g}", peak if memory else "-"
    began = time.process_time()
    while not seconds[who] or time.process_time() - began < cfg.seconds:
        for who, work in contestants.items():
            start = time.process_time()
            work()
            seconds[who].append(time.process_time() - start)
    first = median(next(iter(seconds.values())))
    rows = [
        (name, who, f"{median(s):.3g}", f"{first / median(s):.2f}", len(s), *counts[who])
        for who, s in seconds.items()
    ]
    print(*markdown_table(HEADER, rows).split("\n")[2:], sep="\n", flush=True)


def training(tiny: bool, ours: InternVL, theirs: nn.Module | None) -> Iterator[Line]:
    """A pair with 7 tiles, 1 tile and none; answers of 300 and 350 tokens as in the paper."""
    answers = (8, 10) if tiny else (300, 350)
    for name, tiles in (("7 tiles", 2 if tiny else 7), ("1 tile", 1), ("text", 0)):
        tree = example_tree(ours.config, tiles, 80, answers)
        contestants = {"official": partial(two_passes, theirs, tree)} if theirs else {}
        if theirs and not tiles and find_spec("trl") and theirs.device.type == "cpu":
            contestants["TRL"] = trl_step(theirs, tree)
        for reference, recompute in (("online", "off"), ("cached", "off"), ("cached", "full")):
            step = our_step(ours, [tree], reference, recompute)
            contestants[f"ours, {reference} reference, recompute {recompute}"] = step
        yield f"a pair's step, {name}", contestants


def length(tiny: bool, ours: InternVL, theirs: nn.Module | None) -> Iterator[Line]:
    """About the same number of tokens as four, two or one tree: does a token cost the same?"""
    line, answers = {}, (8, 10) if tiny else (300, 350)
    for count, prompt in ((4, 500), (2, 1650), (1, 4000)):
        tree = example_tree(ours.config, 0, prompt // (20 if tiny else 1), answers)
        line[f"ours, {count} of {tree.size} tokens"] = our_step(ours, [tree] * count)
    yield "a step on trees without an image", line


def our_step(
    model: InternVL, trees: list[Tree], reference: str = "cached", recompute: str = "off"
) -> Callable[[], None]:
    size = sum(tree.size for tree in trees)
    cfg = TrainConfig(recompute=recompute, reference=reference, pack_tokens=size)
    model = prepare(copy.deepcopy(model), cfg).train()
    if switched_on(cfg.compile, model.language_model.head.device):
        compile_blocks(model)
    return step_of(cfg, model, trees)


def hf_model(ours: InternVL) -> nn.Module:
    """transformers' InternVL of the same shape."""
    hf = importlib.import_module("transformers")  # may be absent
    text = text_config(ours.config, {"text_config": {"dtype": "float32"}})
    return hf.InternVLForConditionalGeneration(hf.InternVLConfig(**hf_config(ours, text)))


def two_passes(model: nn.Module, tree: Tree) -> None:
    """The reference's forward (here of the same weights), then the policy's, and backward.

    Chosen and rejected are two padded rows (2 s), each with its own image.
    """
    start, longest = len(tree.trunk), max(map(len, tree.responses))
    rows = [[*tree.trunk, *r, *[2] * (longest - len(r))] for r in tree.responses]
    with torch.device(model.device):
        ids, place = torch.tensor(rows), torch.arange(start + longest)
        lengths = torch.tensor([[start + len(r)] for r in tree.responses])
        shape = 2 * sum(tree.tiles), 3, *model.config.vision_config.image_size
        pixels = torch.randn(shape, dtype=model.dtype) if tree.tiles[0] else None
    mask, scored = (place < lengths).long(), ((place >= start) & (place < lengths))[:, 1:]

    def logps() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1]
        picked = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (picked * scored).sum(-1)

    with torch.no_grad():
        logps()
    logps().sum().backward()
    model.zero_grad()


def trl_step(theirs: nn.Module, tree: Tree) -> Callable[[], None]:
    """DPOTrainer's loss and backward, its reference a second model."""
    hf, trl, datasets = map(importlib.import_module, ("transformers", "trl", "datasets"))
    words = tokenizers.models.WordLevel({"w": 0, "</s>": 1}, unk_token="w")
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="</s>", pad_token="</s>"
    )
    datasets.disable_progress_bars()
    any_text = datasets.Dataset.from_dict({"prompt": ["w"], "chosen": ["w"], "rejected": ["w"]})
    options = {"gradient_checkpointing": False, "bf16": False, "max_length": None}
    options |= {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 1}
    build = hf.AutoModelForCausalLM.from_config
    policy, reference = (build(theirs.config.text_config) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(folder, **options)
        trainer = trl.DPOTrainer(
            policy, reference, args, train_dataset=any_text, processing_class=tokenizer
        )
    chosen, rejected = tree.responses
    pair = trainer.data_collator(
        [{"prompt_ids": tree.trunk, "chosen_ids": chosen, "rejected_ids": rejected}]
    )

    def step() -> None:
        trainer.compute_loss(trainer.model, dict(pair)).backward()
        trainer.model.zero_grad()

    return step


class Asked(NamedTuple):
    """What both sides are asked to write."""

    prompts: list[list[int]]
    new: list[int]  # tokens of an answer to each
    pixels: Tensor | None  # of the only prompt, (tile 3 h w)
    samples: int  # of each prompt
    temperature: float


def generation(tiny: bool, ours: InternVL, theirs: nn.Module | None) -> Iterator[Line]:
    """One greedy answer, many prompts, many samples of one prompt with an image."""
    few, tiles = (4, 1) if tiny else (32, 7)
    pixels = torch.randn(tiles, 3, ours.config.tile_size, ours.config.tile_size)
    pixels = pixels.to(ours.language_model.head)
    picture = [ours.image_context_id] * tiles * ours.config.tokens_per_tile
    many = 2 * few
    mixed = torch.linspace(20, 180, many).int().tolist()
    ends = torch.linspace(4, many - 4, many).int()[torch.randperm(many)].tolist()
    for name, lengths, new, image, *settings in (
        ("one greedy answer, prompt 200", [200], [many], [], 1, 0.0),
        (f"{many} prompts of 100, greedy", [100] * many, [few] * many, [], 1, 0.0),
        (f"{many} prompts of 20-180, answers of 4-{many - 4}", mixed, ends, [], 1, 0.0),
        (f"{few} samples, {tiles} tiles", [80], [few], picture, few, 1.0),
    ):
        words = [torch.randint(3, ours.config.llm.vocab_size, (n,)).tolist() for n in lengths]
        prompts = [image + ids for ids in words]
        asked = Asked(prompts, new, pixels if image else None, *settings)
        peer = {"transformers": partial(hf_answers, theirs, asked)} if theirs else {}
        yield name, peer | {"ours": lambda asked=asked: list(our_scheduler(ours, asked).run())}


@torch.no_grad()
def hf_answers(model: nn.Module, asked: Asked) -> Tensor:
    longest, new = max(map(len, asked.prompts)), max(asked.new)  # a batch ends with its last row
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked.prompts], device=model.device)
    options = {"pad_token_id": 0, "attention_mask": (ids > 0).long()}
    options |= {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    if asked.temperature:
        options |= {"do_sample": True, "top_k": 0, "num_return_sequences": asked.samples}
    if asked.pixels is not None:
        options["pixel_values"] = asked.pixels
    return model.eval().generate(ids, **options)


def our_scheduler(model: InternVL, asked: Asked) -> Scheduler:
    """Answers are ids alone, and never end early."""
    tokenizer = SimpleNamespace(im_end_id=-1, banned_ids=lambda vocab: [])
    generator = Generator(model, tokenizer, temperature=asked.temperature)
    generator.tiles = lambda prompt: asked.pixels
    groups = (
        Group(Prompt(str(n), ""), ids, [], 0, new, list(range(asked.samples)))
        for n, (ids, new) in enumerate(zip(asked.prompts, asked.new))
    )
    return Scheduler(generator, groups)


SECTIONS = {"training": training, "length": length, "generation": generation}


def main() -> None:
    cfg = parse_cli(RaceConfig)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = with_noise(meta_model(shapes(cfg.tiny)), torch.device("cpu"))
    theirs = hf_model(ours) if find_spec("transformers") else None
    print(f"torch {torch.__version__}, one thread, {platform.machine()}; medians\n")
    print(markdown_table(HEADER, []), flush=True)
    for name in cfg.only or SECTIONS:
        for line in SECTIONS[name](cfg.tiny, ours, theirs):
            race(cfg, *line, memory=name == "training")


if __name__ == "__main__":
    run(main)
