"""The same work done by us and by others, in turns: times, ratios, FLOPs, memory.

    pip install .[peers]; python tools/race.py | tee race.md      the tables of docs/speed.md

Training is a pair's step without the optimizer.  `official` scores chosen and rejected as two
padded rows with an image each, by the reference and then by the policy, as InternVL's trainer does,
on transformers' InternVL; TRL's DPOTrainer does its own step on the language model alone.
Generation is transformers' `generate`.  Whoever is not installed does not race.  Weights are
random, all models have one shape, and they take turns on one thread; seconds are the CPU's, so that
other programs hardly count.  A line is printed as soon as it is measured.
"""

import importlib.util
import platform
import sys
import tempfile
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

    only: tuple[str, ...] = flag((), "training, length or generation; may be repeated; default all")
    seconds: int = flag(40, "of CPU for the turns of a line; each has one at least", 1)
    tiny: bool = flag(False, "short lengths and a smaller model: does it run?")


if __name__ == "__main__":
    parse_cli(RaceConfig)  # --help and wrong flags need no torch, which takes seconds

import tokenizers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import InternVLConfig
from data import Tree
from generate import Generator, Group, Prompt, Scheduler
from model import InternVL
from tools.bench import example_pack, example_tree, measured_peak, noise_model, run_mode
from tools.figures import markdown_table
from tools.releases import named_config
from train import TrainConfig, prepare, units_of

Contestants = dict[str, Callable[[], object]]  # the first one is what the others are held against
Line = tuple[str, Contestants]
IMAGE_ID = 1  # as in example_tree
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


def race(cfg: RaceConfig, line: Line, memory: bool) -> None:
    """Print a row each: median seconds of CPU, times as fast as the first, FLOPs, peak memory."""
    name, contestants = line
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


# --------------------------------------------------------------------------- training


def training(cfg: RaceConfig, ours: InternVL, theirs: nn.Module | None) -> Iterator[Line]:
    """A pair with 7 tiles, 1 tile and none; answers of 300 and 350 tokens as in the paper."""
    answers = (8, 10) if cfg.tiny else (300, 350)
    for name, tiles in (("7 tiles", 2 if cfg.tiny else 7), ("1 tile", 1), ("text", 0)):
        tree = example_tree(ours.config, tiles, 80, answers)
        yield (
            f"a pair's step, {name}",
            ({"official": partial(two_passes, theirs, tree)} if theirs else {})
            | ({"TRL": trl_step(theirs, tree)} if theirs and not tiles and installed("trl") else {})
            | {
                "ours, online reference, recompute off": our_step(ours, [tree], cached=False),
                "ours, cached reference, recompute off": our_step(ours, [tree]),
                "ours, cached reference, recompute full": our_step(ours, [tree], recompute="full"),
            },
        )


def length(cfg: RaceConfig, ours: InternVL, theirs: nn.Module | None) -> Iterator[Line]:
    """About the same number of tokens as four, two or one tree: does a token cost the same?"""
    line, answers = {}, (8, 10) if cfg.tiny else (300, 350)
    for count, prompt in ((4, 500), (2, 1650), (1, 4000)):
        tree = example_tree(ours.config, 0, prompt // (20 if cfg.tiny else 1), answers)
        line[f"ours, {count} of {tree.size} tokens"] = our_step(ours, [tree] * count)
    yield "a step on trees without an image", line


def our_step(
    model: InternVL, trees: list[Tree], cached: bool = True, recompute: str = "off"
) -> Callable[[], None]:
    reference, size = "cached" if cached else "online", sum(tree.size for tree in trees)
    cfg = TrainConfig(recompute=recompute, reference=reference, pack_tokens=size)
    pack = example_pack(model.config, trees).to(model.language_model.head.device)

    def step() -> None:
        for block in units_of(model):  # what another contestant computed again
            vars(block).pop("forward", None)
        run_mode(cfg, prepare(model, cfg).train(), [pack])
        model.zero_grad()

    return step


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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


def trl_step(theirs: nn.Module, tree: Tree) -> Callable[[], None]:
    """DPOTrainer's loss and backward, its reference a second model, on texts of these lengths."""
    hf, trl, datasets = map(importlib.import_module, ("transformers", "trl", "datasets"))
    words = tokenizers.models.WordLevel({"w": 0, "</s>": 1}, unk_token="w")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    texts = {"prompt": "w " * len(tree.trunk)}
    for side, response in zip(("chosen", "rejected"), tree.responses):
        texts[side] = "w " * (len(response) - 1) + "</s>"
    datasets.disable_progress_bars()
    options = {"gradient_checkpointing": False, "bf16": False, "max_length": None}
    options |= {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 1}
    policy, reference = (hf.Qwen2ForCausalLM(theirs.config.text_config) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            policy,
            reference,
            args=trl.DPOConfig(folder, **options),
            train_dataset=datasets.Dataset.from_list([texts]),
            processing_class=hf.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>"
            ),
        )
    [pair] = trainer.get_train_dataloader()
    assert pair["attention_mask"].sum() == tree.size_apart

    def step() -> None:
        trainer.compute_loss(trainer.model, dict(pair)).backward()
        trainer.model.zero_grad()

    return step


# --------------------------------------------------------------------------- generation


class NoText:
    """In the place of a tokenizer: answers are ids alone and never end early."""

    im_end_id = -1

    def banned_ids(self, vocab: int) -> list[int]:
        return []


def generation(cfg: RaceConfig, ours: InternVL, theirs: nn.Module | None) -> Iterator[Line]:
    """One greedy answer, many prompts, many samples of one prompt with an image."""
    few, tiles = (4, 1) if cfg.tiny else (32, 7)
    pixels = torch.randn(tiles, 3, 448, 448)
    picture = [IMAGE_ID] * tiles * ours.config.tokens_per_tile
    for name, lengths, image, *settings in (
        ("one greedy answer, prompt 200", [200], [], 1, 2 * few, 0.0),
        (f"{2 * few} prompts of 100, greedy", [100] * 2 * few, [], 1, few, 0.0),
        (f"{few} samples, {tiles} tiles", [80], picture, few, few, 1.0),
    ):
        words = [torch.randint(3, ours.config.llm.vocab_size, (n,)).tolist() for n in lengths]
        prompts = [image + ids for ids in words]
        work = prompts, pixels if image else None, *settings
        peer = {"transformers": partial(hf_answers, theirs, *work)} if theirs else {}
        yield name, peer | {"ours": partial(our_answers, ours, *work)}


@torch.no_grad()
def hf_answers(
    model: nn.Module,
    prompts: list[list[int]],
    pixels: Tensor | None,
    samples: int,
    new: int,
    temperature: float,
) -> Tensor:
    sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
    options = sampling if temperature else {"do_sample": False}
    ids, lengths = torch.tensor(prompts), {"max_new_tokens": new, "min_new_tokens": new}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if pixels is not None:
        options["pixel_values"] = pixels
    return model.eval().generate(ids, **options, **lengths)


def our_answers(
    model: InternVL,
    prompts: list[list[int]],
    pixels: Tensor | None,
    samples: int,
    new: int,
    temperature: float,
) -> list:
    generator = Generator(model, NoText(), temperature=temperature, max_new_tokens=new)
    generator.tiles = lambda prompt: pixels
    groups = groups_of(prompts, samples, new)
    return [row.ids for row in Scheduler(generator, groups).run() if row.finish_reason]


def groups_of(prompts: list[list[int]], samples: int, new: int) -> Iterator[Group]:
    for n, ids in enumerate(prompts):
        yield Group(Prompt(str(n), ""), ids, [], 0, new, list(range(samples)))


SECTIONS = {"training": training, "length": length, "generation": generation}


def main() -> None:
    cfg = parse_cli(RaceConfig)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = shapes(cfg.tiny)
    ours = noise_model(config, torch.float32, torch.device("cpu"))
    theirs = hf_model(config) if installed("transformers") else None
    print(f"torch {torch.__version__}, one thread, {platform.machine()}; medians\n")
    print(markdown_table(HEADER, []), flush=True)
    for name in cfg.only or SECTIONS:
        for line in SECTIONS[name](cfg, ours, theirs):
            race(cfg, line, memory=name == "training")


if __name__ == "__main__":
    run(main)
