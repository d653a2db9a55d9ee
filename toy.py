"""A tiny world in the real formats, so that every script of this repository runs on a laptop.

    python toy.py --out toy        about two seconds
    python toy.py --story          the paper in miniature: make paper

The first writes a folder with
    model/        config.json, two safetensors shards with random weights, tokenizer.json
    images/       PNG: coloured shapes on a grid; square (one tile) and wide (two tiles + thumbnail)
    *.jsonl       preference pairs: with a chain of thought, direct, two images, text only
    meta.json     the data sets, as MMPR's
    train.json    flags of a short training run: train.py --config toy/train.json

The second calls train.py, pairs.py and eval.py on such folders, as a user would: a base model, its
own sampled answers, preference pairs, every objective from the same start, and a report of what
came out beside the paper's tables (report.py).

Nothing outside this file knows that the world is a toy.  The picture is a grid of cells of 8
pixels; a tile has 3 x 3 of them, and with patches of 4 pixels and the 2 x 2 pixel shuffle exactly
one image token looks at each cell, which is what makes counting learnable in a minute.
"""

import importlib
import json
import multiprocessing
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_pipes
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer
from torch import Tensor, nn

from benchmarks.answers import PROMPTS
from data import seeded
from model import InternVL, parse_config
from report import collect, summary, write_report
from runtime import (
    InputError,
    clock,
    flag,
    parse_cli,
    rank_and_world,
    read_whole_lines,
    run,
    start_process,
    stop_process,
    write_atomic,
)
from train import ROWS
from vision import preprocess
from weights import INDEX, official_name

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230)}
SHAPES = ("circle", "square", "cross")
CELL = 8  # pixels
SIDE = 3  # cells along one side of a tile
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

STEPS, DIRECT = PROMPTS["en"], PROMPTS["direct"]
ON_ONE_LINE = DIRECT.replace("\n", " ")  # to type in a shell
DESCRIBE = "Describe the image."


# --------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Thing:
    """One object: its cell (col, row), colour and shape."""

    col: int
    row: int
    colour: str
    shape: str

    @property
    def words(self) -> str:
        return f"{'abcdef'[self.col]}{self.row + 1} {self.colour} {self.shape}"


def random_things(
    rng: np.random.Generator, cols: int = SIDE, habit: float = 0.0
) -> list[Thing]:  # fmt: skip
    """3 to 7 objects in different cells, in reading order.

    `habit`: the share whose shape is the usual one of its colour; of the others any shape.
    """
    cells = rng.permutation(cols * SIDE)[: rng.integers(3, 8)]
    things = []
    for cell in sorted(cells):
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if habit and rng.random() < habit:
            shape = SHAPES[list(COLOURS).index(colour)]
        things.append(Thing(int(cell % cols), int(cell // cols), colour, shape))
    return things


def draw(
    things: list[Thing], rng: np.random.Generator, cols: int = SIDE, noise: float = 0.05
) -> Image.Image:
    """The picture, with a pixel of jitter, uneven brightness and noise (share of full white)."""
    image = Image.new("RGB", (cols * CELL, SIDE * CELL), (20, 20, 20))
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y = thing.col * CELL + rng.integers(0, 2), thing.row * CELL + rng.integers(0, 2)
        light = rng.uniform(0.8, 1.15)
        colour = tuple(int(min(255, c * light)) for c in COLOURS[thing.colour])
        if thing.shape == "circle":
            pen.ellipse((x, y, x + 6, y + 6), fill=colour)
        elif thing.shape == "square":
            pen.rectangle((x, y, x + 5, y + 5), fill=colour)
        else:
            pen.line((x, y, x + 6, y + 6), fill=colour, width=2)
            pen.line((x, y + 6, x + 6, y), fill=colour, width=2)
    noisy = np.asarray(image) + rng.normal(0, noise * 255, (*image.size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


# --------------------------------------------------------------------------- questions, answers


@dataclass(frozen=True)
class Question:
    """How many objects have one of `words`, one or two colours?"""

    words: tuple[str, ...]

    @property
    def text(self) -> str:
        kinds = " and ".join(self.words)
        return f"How many {kinds} objects are there{' in total' if len(self.words) > 1 else ''}?"

    def matches(self, things: list[Thing]) -> list[Thing]:
        return [thing for thing in things if thing.colour in self.words]


def random_question(rng: np.random.Generator) -> Question:
    """Three in five add up two colours: there the steps help, once they are right."""
    count = 2 if rng.random() < 0.6 else 1
    return Question(tuple(map(str, rng.permutation(list(COLOURS))[:count])))


def chain_of_thought(things: list[Thing]) -> str:
    """The matching objects with a running count, then the answer."""
    seen = ", ".join(f"{thing.words} {i + 1}" for i, thing in enumerate(things))
    return f"I see {seen or 'nothing'}.\nFinal answer: {len(things)}"


def direct(things: list[Thing]) -> str:
    return str(len(things))


# --------------------------------------------------------------------------- tokenizer, model


def all_texts() -> Iterator[str]:
    """Texts that between them hold every piece of the world: words, and words that open a line."""
    yield "system\nuser\nassistant\nYou are a careful observer. one two"
    yield "Image 1: \nImage-2: \nWhich picture has more objects?\nThe first.\nThe second.\nBoth."
    yield "What is 1 plus 2?\nIt is 3.\nIs the picture wide?\nYes.\nNo. yes no"
    yield "Describe the image.\nI see nothing, one.\nFinal answer: \nThere are 3 objects:"
    yield "Question: Answer: reply with the final answer: ( ) - ' \""
    for word in [*COLOURS, *SHAPES]:
        yield f"How many {word} and {word} objects are there in total?\n{word}"
    for col, row in product("abcdef", "123"):
        yield f"I see {col}{row} red, {col}{row} blue.\n{col}{row}"
    for n in range(20):
        yield f"1 {n} {n}\n{n}. {n}, {n} plus {n}"


def build_tokenizer() -> JsonTokenizer:
    """Word level, lossless: a piece is a word with the blank before it, a mark, or a line break.

    The long instructions that every question repeats are one piece each: they cost one token.
    """
    instructions = [prompt.replace("{question}", "") for prompt in (STEPS, DIRECT, ON_ONE_LINE)]
    pieces = "|".join(map(re.escape, instructions)) + r"| ?[A-Za-z0-9]+|[^A-Za-z0-9]"
    split = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    words = {piece for text in all_texts() for piece, _ in split.pre_tokenize_str(text)}
    names = [*SPECIAL, *instructions, *sorted(words)]
    if len(names) % 2 == 0:  # odd, as InternVL2's 92,553: shards of the head are uneven
        names.append("[UNUSED]")
    tokenizer = JsonTokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def model_config(vocab_size: int) -> dict:
    """A config.json with the keys of the released one and the sizes of a toy."""
    llm = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-5,
        "bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": CELL * SIDE,
        "patch_size": CELL // 2,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": CELL * SIDE,
        "llm_config": llm,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": "You are a careful observer.",
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }


def write_model(folder: Path, seed: int, sees: bool = False) -> None:
    """Random bf16 weights in the official layout: two shards and their index.

    `sees`: the projector starts with an idea of what stands in a cell (`fit_projector`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = model_config(tokenizer.get_vocab_size())
    write_atomic(folder / "config.json", json.dumps(config, indent=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVL(parse_config(config), tokenizer.token_to_id("<IMG_CONTEXT>"))
        torch.nn.init.normal_(model.language_model.model.tok_embeddings.weight, std=0.3)
        if sees:
            fit_projector(model, tokenizer, seeded(seed, "vision"))
    tensors = {official_name(n): p.detach().bfloat16() for n, p in model.named_parameters()}
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[: len(names) // 2]}
    shards["model-00002-of-00002.safetensors"] = names[len(names) // 2 :]
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    weight_map = {n: file for file, held in shards.items() for n in held}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(index, indent=1))


@torch.no_grad()
def fit_projector(model: InternVL, tokenizer: JsonTokenizer, rng: np.random.Generator) -> None:
    """Stands in for a pre-trained InternViT, by least squares: no training.

    The ViT is random, but keeps all pixels of a cell.  The projector's first layer reads colour,
    shape and place off them; its second sends each cell to the sum of these words' embeddings.
    """
    kinds = list(product(COLOURS, SHAPES))
    scenes = [random_things(rng) for _ in range(1200)]
    tiles = torch.cat([preprocess(draw(scene, rng), 1, CELL * SIDE) for scene in scenes])
    truth = torch.zeros(len(scenes), SIDE * SIDE, dtype=torch.long)  # 0: an empty cell
    for n, scene in enumerate(scenes):
        for thing in scene:
            truth[n, thing.row * SIDE + thing.col] = 1 + kinds.index((thing.colour, thing.shape))
    truth, cell = truth.flatten(), torch.arange(SIDE * SIDE).repeat(len(scenes))
    model.vision_model.embeddings.position_embedding.normal_(std=0.3)
    norm, first, gelu, second = model.projector

    seen: list[Tensor] = []  # what the ViT hands to the projector
    hook = norm.register_forward_hook(lambda module, args, out: seen.append(out.flatten(0, 1)))
    model.image_features(tiles)
    hook.remove()
    codes = torch.cat([F.one_hot(truth, 1 + len(kinds)), F.one_hot(cell)], dim=1) * 4.0 - 1.0
    set_linear(first, seen[0], codes)

    def words(*names: str) -> Tensor:
        ids = [tokenizer.token_to_id(" " + name) for name in names]
        return model.language_model.model.tok_embeddings.weight[ids].sum(0)

    what = torch.stack([words(), *(words(*kind) for kind in kinds)])
    where = torch.stack([words(f"{c}{r}") for r in "123" for c in "abc"])
    set_linear(second, gelu(first(seen[0])), what[truth] + where[cell])


def set_linear(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """The first rows of `layer` become the ridge regression of y (n out) on x (n in)."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y.double()).T.float()
    layer.weight[: len(solution)], layer.bias[: len(solution)] = solution[:, :-1], solution[:, -1]


# --------------------------------------------------------------------------- preference pairs


class World:
    """Draws numbered pictures and questions about them; the same seed gives the same world."""

    def __init__(self, folder: Path, seed: int, noise: float = 0.05) -> None:
        self.images, self.seed, self.noise = folder / "images", seed, noise
        self.images.mkdir(parents=True, exist_ok=True)

    def picture(
        self, kind: str, number: int, habit: float = 0.0
    ) -> tuple[str, list[Thing], np.random.Generator]:
        """(file name, its objects, a generator to go on with); 'wide' pictures have two tiles."""
        rng = seeded(self.seed, kind, number)
        cols = 2 * SIDE if kind.endswith("wide") else SIDE
        things = random_things(rng, cols, habit)
        name = f"{kind}-{number:05d}.png"
        draw(things, rng, cols, self.noise).save(self.images / name)
        return name, things, rng

    def counting_pair(self, kind: str, number: int, with_steps: bool) -> dict:
        """Count objects; the rejected answer misses one or makes one up."""
        name, things, rng = self.picture(kind, number)
        question = random_question(rng)
        right = question.matches(things)
        if right and rng.random() < 0.6:
            missed = rng.integers(len(right))
            wrong = [t for i, t in enumerate(right) if i != missed]
        else:
            wrong = [*right, *random_things(rng)[:1]]
        say = chain_of_thought if with_steps else direct
        prompt = STEPS if with_steps else ON_ONE_LINE
        return {
            "image": name,
            "question": "<image>\n" + prompt.replace("{question}", question.text),
            "chosen": say(right),
            "rejected": say(wrong),
            "answer_gt": str(len(right)),
        }

    def two_image_pair(self, number: int) -> dict:
        first, a, _ = self.picture("pair-a", number)
        second, b, _ = self.picture("pair-b", number)
        answers = ["The first.", "The second.", "Both."]
        right = answers[0 if len(a) > len(b) else 1 if len(b) > len(a) else 2]
        return {
            "image": [first, second],
            "question": "Image 1: <image>\nImage-2: <image>\nWhich picture has more objects?",
            "chosen": right,
            "rejected": next(t for t in answers if t != right),
        }

    def text_pair(self, number: int) -> dict:
        a, b = divmod(number % 64, 8)
        return {
            "question": f"What is {a} plus {b}?",
            "chosen": f"It is {a + b}.",
            "rejected": f"It is {a + b + 1}.",
        }


def write_world(out: Path, pairs: int, seed: int) -> None:
    """All files of the toy; see the module docstring."""
    write_model(out / "model", seed)
    world = World(out, seed)
    few = max(2, pairs // 8)
    sets = {
        "toy_steps": [world.counting_pair("square", i, True) for i in range(pairs)],
        "toy_direct": [world.counting_pair("square", pairs + i, False) for i in range(pairs // 2)],
        "toy_wide": [world.counting_pair("wide", i, True) for i in range(few)],
        "toy_two_images": [world.two_image_pair(i) for i in range(few)],
        "toy_text": [world.text_pair(i) for i in range(few)],
    }
    meta = {}
    for name, records in sets.items():
        lines = "".join(json.dumps(r) + "\n" for r in records)
        write_atomic(out / f"{name}.jsonl", lines)
        meta[name] = {
            "root": "images",
            "annotation": f"{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": len(records),
        }
    write_atomic(out / "meta.json", json.dumps(meta, indent=1) + "\n")
    train = {
        "model_dir": str(out / "model"),
        "meta": str(out / "meta.json"),
        "out_dir": str(out / "run"),
        "loss": "mpo",
        "lr": 2e-3,
        "batch_size": 32,
        "epochs": 4,
        "pack_tokens": 1024,
        "recompute": "off",  # memory is no concern here
        "drop_path": 0.0,
        "save_every": 10,
        "seed": seed,
    }
    write_atomic(out / "train.json", json.dumps(train, indent=1) + "\n")


# --------------------------------------------------------------------------- the story: settings


@dataclass(frozen=True)
class Recipe:
    """Every setting of the story that is not a row's own; story.json repeats them."""

    pictures: int = 4000  # of the base's lessons: 2 direct, 1 step-by-step question, 1 description
    wide: float = 0.0  # share of pictures with two tiles and a thumbnail
    noise: float = 0.05  # of the pictures
    habit: float = 0.0  # share of the lessons' objects with the usual shape of their colour
    base_lr: float = 3e-3
    base_batch_size: int = 32
    first_leg: int = 500  # steps until the first look at the development questions
    leg: int = 100  # and between the others
    stop_at: float = 50.0  # Direct accuracy from which the base cools down
    cap: int = 1200  # steps after which it does so anyway
    cooldown: int = 80
    dev: int = 200
    test: int = 600
    questions: int = 1800  # new ones, to sample answers to
    direct_questions: int = 450  # the first of them, to sample direct answers to, too
    samples: int = 8
    pairs_per_query: int = 4
    described: int = 600  # pictures to describe for DropoutNTP
    keep_ratio: float = 0.5
    steps: int = 400
    batch_size: int = 16


QUICK = Recipe(
    pictures=3000, cap=700, questions=800, direct_questions=200, described=200, test=400, steps=200,
)  # fmt: skip
TINY = Recipe(
    pictures=400, base_batch_size=16, first_leg=80, cap=80, stop_at=0.0, cooldown=10, dev=8,
    test=20, questions=24, direct_questions=8, described=8, steps=6,
)  # fmt: skip
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # to tune: the middle ones, then the neighbour of the better one
TUNING_SEED = 100
BETA = 0.1
RATIOS = (0.25, 0.5, 0.75)
SPEED = {"pack_tokens": 2560, "recompute": "off", "drop_path": 0.0, "head_rows": 0}
CHOSEN_RATES = {  # what `--tune` found: paper/tuning.json
    "SFT": 1e-3, "DPO": 3e-4, "RSO": 3e-4, "IPO": 1e-4, "cDPO": 3e-4, "RobustDPO": 1e-4,
    "BCO": 3e-4, "SPPO": 1e-3, "AOT": 3e-4, "TR-DPO": 1e-4, "ORPO": 1e-3, "DPO+": 1e-3,
    "cDPO+": 1e-3, "RobustDPO+": 1e-3, "BCO+": 3e-3, "AOT+": 1e-3, "MPO": 1e-3,
}  # fmt: skip
PAIRS_UNITS = 1.5  # time to measure a base and to make its pairs, for the progress: a row takes 1
QUICK_ROWS = ("SFT", "DPO", "MPO")
WITH_DROPOUT = "MPO+NTP"  # MPO on the pairs and DropoutNTP's
DESCRIBED = ("base", *QUICK_ROWS, WITH_DROPOUT)  # rows whose descriptions are measured, too
ABLATIONS: dict[str, dict[str, dict]] = {  # the paper's Figure 4 and Table 9; flags of MPO
    "data scale": {str(share): {"limit": share} for share in (0.1, 0.4, 0.7)},
    "learning rate": {str(lr): {"lr": lr} for lr in (1e-4, 3e-4, 3e-3, 1e-2)},
    "w_p : w_q": {
        f"{p}:{q}": {"loss": f"{p / (p + q):g}*dpo+{q / (p + q):g}*bco+sft"}
        for p, q in ((1, 1), (3, 1), (5, 1), (9, 1))
    },
    "w_g": {str(w): {"loss": f"0.8*dpo+0.2*bco+{w}*sft"} for w in (0.01, 0.5, 2.0, 5.0)},
    "keep ratio": {str(ratio): {"keep_ratio": ratio} for ratio in (0.25, 0.75)},
}


# --------------------------------------------------------------------------- the story: files


def describe(things: list[Thing]) -> str:
    return f"I see {', '.join(thing.words for thing in things) or 'nothing'}."


MENTION = re.compile(rf"[a-f][1-3] (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})")


def hallucination(answers: list[tuple[str, str]], truth: dict[str, list[str]]) -> dict:
    """Of (image, description): % with an object that is not there, and % of such mentions.

    The two rates of Object HalBench, whose objects here are exactly known.
    """
    made_up = [
        [words not in truth[image] for words in MENTION.findall(text)] for image, text in answers
    ]
    mentions = [wrong for answer in made_up for wrong in answer]
    responses = [any(answer) for answer in made_up]
    return {
        "responses": 100 * sum(responses) / max(1, len(responses)),
        "mentions": 100 * sum(mentions) / max(1, len(mentions)),
        "n": len(responses),
    }


def write_lines(path: Path, records: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def write_lessons(folder: Path, seed: int, recipe: Recipe) -> None:
    """All files that a seed starts from; pictures and questions of dev and test are their own."""
    write_model(folder / "model", seed, sees=True)
    world, truth = World(folder, seed, recipe.noise), {}

    def scene(split: str, number: int) -> tuple[str, list[Thing], np.random.Generator]:
        wide = seeded(seed, split, number).random() < recipe.wide
        habit = recipe.habit if split == "lesson" else 0.0
        name, things, rng = world.picture(f"{split}-wide" if wide else split, number, habit)
        truth[name] = [thing.words for thing in things]
        return name, things, rng

    def lesson(name: str | None, prompt: str, right: str, wrong: str) -> dict:
        image = {"image": name} if name else {}
        start = "<image>\n" if name else ""
        return image | {"question": start + prompt, "chosen": right, "rejected": wrong}

    sets: dict[str, list[dict]] = {"direct": [], "steps": [], "describe": [], "blind": []}
    for number in range(recipe.pictures):
        name, things, rng = scene("lesson", number)
        others = random_things(rng, habit=recipe.habit)
        for kind in ("direct", "direct", "steps"):
            question = random_question(rng)
            right, wrong = question.matches(things), question.matches(others)
            prompt, say = (STEPS, chain_of_thought) if kind == "steps" else (DIRECT, direct)
            text = prompt.replace("{question}", question.text)
            sets[kind].append(lesson(name, text, say(right), say(wrong)))
        sets["describe"].append(lesson(name, DESCRIBE, describe(things), describe(others)))
        if number % 20 == 0:  # what it says of a picture that it cannot see
            sets["blind"].append(lesson(None, DESCRIBE, describe(things), describe(others)))
    meta = {}
    for name, records in sets.items():
        write_lines(folder / f"{name}.jsonl", records)
        meta[name] = {"root": "images", "annotation": f"{name}.jsonl", "data_augment": False}
        meta[name] |= {"repeat_time": 1, "length": len(records)}
    write_atomic(folder / "lessons.json", json.dumps(meta, indent=1) + "\n")

    splits = {"dev": recipe.dev, "tune": 5 * recipe.dev, "test": recipe.test}
    splits["new"] = recipe.questions
    for split, count in splits.items():
        rows = []
        for number in range(count):
            name, things, rng = scene(split, number)
            question = random_question(rng)
            answer = str(len(question.matches(things)))
            rows.append({"id": f"{split}-{number}", "image": name, "question": question.text})
            rows[-1]["answer"] = answer
        write_lines(folder / f"{split}.jsonl", rows)
        if split == "new":
            write_lines(folder / "new_direct.jsonl", rows[: recipe.direct_questions])
    for split, source, count in (
        ("describe_new", "new", recipe.described),
        ("describe_test", "test", recipe.dev),
    ):
        names = [name for name in truth if name.startswith(source)][:count]
        write_lines(folder / f"{split}.jsonl", [{"image": n, "question": DESCRIBE} for n in names])
    write_atomic(folder / "truth.json", json.dumps(truth) + "\n")  # last: all files are there


# --------------------------------------------------------------------------- the story: running


class CommandFailed(RuntimeError):
    """A script of the story ended with an error."""


def as_script(argv: list[str], env: dict[str, str], log: str, threads: int) -> None:
    """Run `python argv` in this (forked) process, its output appended to `log`."""
    os.environ.update(env)
    torch.set_num_threads(threads)
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    print("$ python", shlex.join(argv), flush=True)
    sys.argv = argv
    run(importlib.import_module(argv[0].removesuffix(".py")).main)


EXIT_STATUS = threading.Lock()


def run_processes(forks: list[BaseProcess]) -> None:
    """Start processes and wait for their end; threads may do so at once.

    multiprocessing reads an exit status from a pipe, once, when any thread starts or joins a
    process; two that read at the same time leave 255 where a command ended well.
    """
    with EXIT_STATUS:
        for fork in forks:
            fork.start()
    for fork in forks:
        wait_for_pipes([fork.sentinel])
        with EXIT_STATUS:
            fork.join()


class Story:
    """The stages of the story, each done once: what is on disk is not done again."""

    def __init__(self, cfg: "ToyConfig") -> None:
        self.out, self.cfg = cfg.out, cfg
        recipe = TINY if cfg.tiny else QUICK if cfg.quick else Recipe()
        task = {"wide": cfg.wide, "noise": cfg.noise, "habit": cfg.habit}
        self.recipe = replace(recipe, **task, steps=cfg.steps or recipe.steps)
        self.rank, self.world = rank_and_world()
        # alone: so many commands at a time; while there is but one, it samples on so many processes
        # and trains on so many threads: processes would exchange for longer than a step takes
        self.processes = cfg.jobs if len(cfg.seeds) == 1 else 1
        self.group = start_process(0) if self.world > 1 else None
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts: small products
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train", "pairs", "eval", "torch._dynamo"])
        self.began, self.units, self.done, self.lock = time.time(), 0, 0, threading.Lock()
        self.base_units = (self.recipe.cap + self.recipe.cooldown) / self.recipe.steps  # at most

    # ------------------------------------------------------------------ calling the scripts

    def together(self, port: int = 0) -> int:
        """Wait for the other processes of torchrun; rank 0's port."""
        return self.group.broadcast(port) if self.group else port

    def call(
        self, folder: Path, script: str, *verb: str, alone: bool = False, **flags: Any
    ) -> None:
        """`python script verb --flag value ...`, by all processes or by one alone.

        Forked from a server that has torch loaded, which saves the seconds of its import.
        """
        argv = [script, *verb]
        for name, value in flags.items():
            if isinstance(value, bool):
                argv.append(f"--{name}" if value else f"--no-{name}")
            else:
                argv.append(f"--{name}={value}")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = self.together(s.getsockname()[1])
        count, here, threads = self.world, [self.rank], 1
        if self.world == 1 and script == "train.py":
            threads = self.processes
        elif self.world == 1:
            count, here = self.processes, range(self.processes)
        if alone:
            count, here = 1, [0] if self.rank == 0 else []
        folder.mkdir(parents=True, exist_ok=True)
        forks: dict[Path, Any] = {}  # by log
        for rank in here:
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            if count > 1:  # they meet at a port of their own, not at torchrun's
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env |= {"TORCHELASTIC_USE_AGENT_STORE": "False"}
            log = folder / (f"log-{rank}.txt" if rank else "log.txt")
            how = (argv, env, str(log), threads)
            forks[log] = self.context.Process(target=as_script, args=how)
        run_processes(list(forks.values()))
        if failed := [log for log, fork in forks.items() if fork.exitcode]:
            said = [f"python {shlex.join(argv)}"]
            for log in failed:
                said += [f"{log} ends with", *(f"  {s}" for s in log.read_text().splitlines()[-6:])]
            raise CommandFailed("\n".join(said))
        self.together()

    def tell(self, seed: int, what: str, units: float, cached: bool = False) -> None:
        """A line a stage, with the time left; what was there already took no time."""
        with self.lock:
            self.done += 0 if cached else units
            self.units -= units if cached else 0
            spent = time.time() - self.began
            left = spent / max(0.5, self.done) * max(0, self.units - self.done)
            then = f"  (left {clock(left)})" if self.done else ""
            if self.rank == 0:
                print(f"{clock(spent)}  seed {seed}  {what}{then}", flush=True)

    # ------------------------------------------------------------------ stages

    def evaluate(
        self, model: Path, folder: Path, seed: int, split: str,
        settings: tuple[str, ...] = ("direct", "cot"),
    ) -> dict:  # fmt: skip
        """Accuracy in percent on a split, with the share of malformed answers, of each setting."""
        data = self.of(seed) / f"{split}.jsonl"
        scores = {}
        for setting in settings:
            cot = setting == "cot"
            out = folder / f"{split}-{setting}"
            common = {"bench": "own", "data": data, "cot": cot}
            self.call(
                folder, "eval.py", "generate", **common, model_dir=model, out=out, max_tiles=2,
                images=self.of(seed) / "images", max_new_tokens=64 if cot else 8,
            )  # fmt: skip
            self.call(folder, "eval.py", "score", alone=True, **common, answers=out)
            items = read_whole_lines(out / "items.jsonl")[0]
            bad = sum(not str(item["prediction"]).isdigit() for item in items)
            score = json.loads((out / "score.json").read_text())["score"]
            scores[setting] = {"score": score, "malformed": 100 * bad / len(items)}
            scores[setting]["n"] = len(items)
        return scores

    def of(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def lessons(self, seed: int) -> None:
        if self.rank == 0 and not (self.of(seed) / "truth.json").exists():
            write_lessons(self.of(seed), seed, self.recipe)
        self.together()

    def base(self, seed: int) -> dict:
        """SFT on the lessons at a constant rate until Direct works somewhat, then cool down.

        Returns the last leg: its steps and its accuracy on the development questions.
        """
        folder, r = self.of(seed) / "base", self.recipe
        legs, spare = read_whole_lines(folder / "legs.jsonl")[0], self.base_units
        flags = SPEED | {
            "model_dir": self.of(seed) / "model", "meta": self.of(seed) / "lessons.json",
            "out_dir": folder, "loss": "sft", "lr": r.base_lr, "lr_vision": 0, "lr_projector": 0,
            "warmup": 40, "epochs": 100, "batch_size": r.base_batch_size,
            "seed": seed,
        }  # fmt: skip
        while not legs or not legs[-1]["last"]:
            steps = legs[-1]["steps"] if legs else 0
            cooled = steps >= r.cap or (legs and legs[-1]["direct"]["score"] >= r.stop_at)
            steps += r.cooldown if cooled else r.leg if legs else r.first_leg
            decay = r.cooldown if cooled else 0
            self.call(folder, "train.py", **flags, decay=decay, max_steps=steps)
            settings = ("direct", "cot") if cooled else ("direct",)
            look = folder / f"step-{steps}"
            scores = self.evaluate(folder / "model", look, seed, "dev", settings)
            legs.append({"steps": steps, "last": bool(cooled), **scores})
            if self.rank == 0:
                write_lines(folder / "legs.jsonl", legs)
            said = ", ".join(f"{of['score']:.1f} {setting}" for setting, of in scores.items())
            units = (steps - (legs[-2]["steps"] if len(legs) > 1 else 0)) / r.steps
            spare -= units
            self.tell(seed, f"base, step {steps}: {said} (development questions)", units)
        with self.lock:
            self.units -= spare
        return legs[-1]  # of this process: rank 0 may still be writing it

    def describe(self, model: Path, folder: Path, seed: int, questions: str) -> list[dict]:
        """Greedy descriptions of pictures, as rows of a part file."""
        self.call(
            folder, "pairs.py", "sample", model_dir=model, out_dir=folder, prompts="none",
            questions=self.of(seed) / f"{questions}.jsonl", root=self.of(seed) / "images", top_k=1,
            num_samples=1, max_new_tokens=64, max_tiles=2, max_questions=0,
        )  # fmt: skip
        parts = sorted((folder / questions).glob("part-*.jsonl"))
        return [row for part in parts for row in read_whole_lines(part)[0]]

    def truth(self, seed: int) -> dict[str, list[str]]:
        return json.loads((self.of(seed) / "truth.json").read_text())

    def result(self, folder: Path, seed: int, row: str, model: Path, **more: Any) -> dict:
        """Measure a model on the test questions and write result.json, the stage's last file."""
        test, described = self.evaluate(model, folder, seed, self.cfg.split), None
        if row in DESCRIBED and not self.cfg.tune:
            rows = self.describe(model, folder / "descriptions", seed, "describe_test")
            answers = [(answer["image"], answer["response"]) for answer in rows]
            described = hallucination(answers, self.truth(seed))
        curve = read_whole_lines(folder / "metrics.jsonl")[0][-10:]
        shift = {}
        for side in ("chosen", "rejected"):
            known = [m[f"rewards/{side}"] for m in curve if f"rewards/{side}" in m]
            shift[f"{side}_shift"] = sum(known) / len(known) / BETA if known else None
        record = {"row": row, "seed": seed, "study": None, "value": None, "flags": {}}
        record |= {self.cfg.split: test, "describe": described}
        record |= shift | more
        if self.rank == 0:
            write_atomic(folder / "result.json", json.dumps(record, indent=1) + "\n")
        self.together()
        return record

    def pairs(self, seed: int) -> None:
        """The base's own answers to new questions, judged and paired (section 3 of the paper)."""
        folder, r = self.of(seed), self.recipe
        how = {"model_dir": folder / "base/model", "root": folder / "images", "seed": seed}
        how |= {"out_dir": folder / "samples", "num_samples": r.samples, "max_new_tokens": 64}
        how |= {"max_tiles": 2, "max_questions": 0}
        for name, version in (("new", "en"), ("new_direct", "direct")):
            questions = folder / f"{name}.jsonl"
            self.call(folder, "pairs.py", "sample", **how, questions=questions, prompts=version)
        self.call(
            folder, "pairs.py", "correctness", alone=True, samples=folder / "samples",
            out_dir=folder / "pairs", pairs_per_query=r.pairs_per_query, seed=seed,
        )  # fmt: skip

    def dropout(self, seed: int, ratio: float) -> dict:
        """DropoutNTP pairs: descriptions, cut and continued without the picture."""
        folder = self.of(seed)
        self.describe(folder / "base/model", folder / "described", seed, "describe_new")
        out = folder / f"dropout-{ratio}"
        self.call(
            folder, "pairs.py", "dropout_ntp", samples=folder / "described", out_dir=out, seed=seed,
            model_dir=folder / "base/model", keep_ratio=ratio, max_new_tokens=64,
        )  # fmt: skip
        entries = json.loads((out / "meta.json").read_text())
        rows = [row for e in entries.values() for row in read_whole_lines(out / e["annotation"])[0]]
        found = {"pairs": len(rows)}
        for side in ("chosen", "rejected"):
            answers = [(row["image"], row[side]) for row in rows]
            found[side] = hallucination(answers, self.truth(seed))
        if self.rank == 0:  # one meta.json for both kinds of pairs
            meta = json.loads((folder / "pairs/meta.json").read_text())
            for name, where in [(n, folder / "pairs") for n in meta] + [(n, out) for n in entries]:
                entry = meta.get(name) or entries[name]
                annotation = os.path.relpath(where / entry["annotation"], out)
                entries[name] = entry | {"annotation": annotation}
            write_atomic(out / "both.json", json.dumps(entries, indent=1) + "\n")
        self.together()
        return found

    def prepare(self, seed: int) -> None:
        """Base, its test results, its pairs, the reference's log-probs (with the MPO row)."""
        folder = self.of(seed)
        self.lessons(seed)
        leg = self.base(seed)
        if not (cached := (folder / "result.json").exists()):
            more = {"dev": {k: leg[k] for k in ("direct", "cot")}, "steps": leg["steps"]}
            self.result(folder, seed, "base", folder / "base/model", **more)
        self.tell(seed, f"base, {self.shown(folder)}", 0.2 * PAIRS_UNITS, cached)
        if not (cached := (folder / "pairs.json").exists()):
            self.pairs(seed)
            dropout = {}
            few = (self.cfg.quick or self.cfg.tiny) and not self.cfg.ablate
            ratios = [self.recipe.keep_ratio] if few else RATIOS
            for ratio in () if self.cfg.tune else ratios:
                dropout[str(ratio)] = self.dropout(seed, ratio)
            report = json.loads((folder / "pairs/pairs.report.json").read_text())["correctness"]
            found = {}
            for name, data_set in (("correctness", "new"), ("direct", "new_direct")):
                of = report["sets"][data_set]
                right = 100 * of["counts"].get("correct responses", 0) / of["responses"]
                found[name] = {"pairs": sum(of["pairs"].values()), "right": right}
            if self.rank == 0:
                text = json.dumps(found | {"dropout": dropout}, indent=1) + "\n"
                write_atomic(folder / "pairs.json", text)
            self.together()
        said = json.loads((folder / "pairs.json").read_text())
        counts = f"{said['correctness']['pairs']} CoT and {said['direct']['pairs']} Direct pairs"
        right = f"{said['correctness']['right']:.0f} % of CoT samples right"
        self.tell(seed, f"{counts}, {right}", 0.8 * PAIRS_UNITS, cached)

    def shown(self, folder: Path) -> str:
        scores = json.loads((folder / "result.json").read_text())[self.cfg.split]
        return f"Direct {scores['direct']['score']:.1f}, CoT {scores['cot']['score']:.1f}"

    def row(self, seed: int, name: str, folder: Path, **more: Any) -> None:
        """Train one objective from the base and measure it."""
        if not (cached := (folder / "result.json").exists()):
            began, r, start = time.time(), self.recipe, self.of(seed)
            of_paper = "MPO" if name == WITH_DROPOUT else name
            of_row = ROWS.get(of_paper, {"loss": name})
            flags = dict(of_row) | {"lr": CHOSEN_RATES.get(of_paper, 1e-3)} | more.get("flags", {})
            ratio = flags.pop("keep_ratio", self.recipe.keep_ratio)
            meta, cache = start / "pairs/meta.json", start / "reference"
            if name == WITH_DROPOUT:
                meta, cache = start / f"dropout-{ratio}/both.json", start / f"dropout-{ratio}/cache"
            if "limit" in flags:
                flags["limit"] = max(1, round(flags["limit"] * r.steps * r.batch_size))
            if "reference_update_every" in flags:
                flags["reference_update_every"] = min(64, max(1, r.steps // 4))
            if str(self.cfg.mine) != ".":
                flags["mine"] = self.cfg.mine
            self.call(
                folder, "train.py", **SPEED, model_dir=start / "base/model", meta=meta,
                out_dir=folder, reference_cache=cache, epochs=100, batch_size=r.batch_size,
                max_steps=r.steps, beta=BETA, seed=seed, **flags,
            )  # fmt: skip
            more = {"study": None, "value": None} | more
            more["flags"] = {k: v for k, v in flags.items() if k != "mine"}
            more |= {"seconds": time.time() - began}
            self.result(folder, seed, name, folder / "model", **more)
        self.tell(seed, f"{folder.name}: {self.shown(folder)}", 1, cached)

    # ------------------------------------------------------------------ the whole

    def start(self) -> None:
        """Claim the folder: one set of settings a folder."""
        settings = asdict(self.recipe) | {"beta": BETA, "rates": CHOSEN_RATES} | SPEED
        settings["tuning"] = {"tried": RATES, "seed": TUNING_SEED, "steps": Recipe().steps}
        path, before = self.out / "story.json", {}
        if path.exists():
            before = json.loads(path.read_text())
            settings = json.loads(json.dumps(settings))
            for name, value in settings.items():
                if (found := before["settings"].get(name)) != value:
                    raise InputError(
                        f"{path} was made with another {name} ({found}, now {value}): pass another "
                        f"--out, or delete {self.out}"
                    )
        commits = [*before.get("commit", "").split(", "), commit()]  # whose results lie here
        about = {
            "settings": settings,
            "seeds": list(self.cfg.seeds),
            "quick": self.cfg.quick,
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}",
            "commit": ", ".join(dict.fromkeys(filter(None, commits))),
            "torch": torch.__version__,
            "seconds": before.get("seconds", {}),  # of calls that came to their end
        }
        if self.rank == 0:
            write_atomic(path, json.dumps(about, indent=1) + "\n")
        self.together()

    def rows(self) -> list[str]:
        """The rows of this story; MPO first, alone: it fills the cache of the reference."""
        mine = []
        if str(self.cfg.mine) != ".":
            from tools.mine import register_file  # noqa: PLC0415  (the second ring)

            mine = register_file(self.cfg.mine)
        few = self.cfg.quick or self.cfg.tiny
        names = list(QUICK_ROWS if few else ROWS)
        if not (self.cfg.tune or few) or self.recipe.habit:
            names.append(WITH_DROPOUT)
        return sorted([*names, *mine], key=lambda name: (name != "MPO", name not in QUICK_ROWS))

    def first(self, seed: int) -> None:
        self.prepare(seed)
        self.row(seed, "MPO", self.row_folder(seed, "MPO"))

    def row_folder(self, seed: int, name: str) -> Path:
        return self.of(seed) / "rows" / name

    def tasks(self, seed: int) -> list[tuple]:
        """(row, folder, what differs) of everything that follows `first`."""
        found = [(name, self.row_folder(seed, name), {}) for name in self.rows()[1:]]
        if self.cfg.tune:
            found = [self.trial(name, seed, lr) for name in self.rows() for lr in RATES[1:-1]]
        ablate = self.cfg.ablate and seed == self.cfg.seeds[0]
        for study, values in ABLATIONS.items() if ablate else ():
            name = WITH_DROPOUT if study == "keep ratio" else "MPO"
            for value, flags in values.items():
                more = {"study": study, "value": value, "flags": flags}
                folder = f"{study}={value}".replace(" ", "-").replace(":", "-")
                found.append((name, self.of(seed) / "ablate" / folder, more))
        return found

    def play(self) -> None:
        """Every seed's base and pairs, then every row, as many at a time as there are jobs."""
        plan = {seed: self.tasks(seed) for seed in self.cfg.seeds}  # --mine read: nothing written
        self.start()
        forkserver.ensure_running()  # loads torch while the lessons are drawn
        for seed, tasks in plan.items():
            plan[seed] = [task for task in tasks if not (task[1] / "result.json").exists()]
            if there := len(tasks) - len(plan[seed]):
                self.tell(seed, f"{there} rows are there already", 0)
        first = self.base_units + PAIRS_UNITS + 1  # the MPO row, too
        self.units = sum(first + len(tasks) for tasks in plan.values())
        self.units += len(self.rows()) if self.cfg.tune else 0  # the rates beyond
        (self.at_once if self.world == 1 else self.in_order)(plan)
        if self.rank == 0:
            self.tell_result()
        if self.group:
            stop_process()

    def in_order(self, plan: dict[int, list[tuple]]) -> None:
        """One stage after another: every process of torchrun must take part in each."""
        for seed in plan:
            self.first(seed)
        for seed, tasks in plan.items():
            for task in tasks:
                self.play_row(seed, task)
        for task in self.beyond(seed) if self.cfg.tune else ():
            self.play_row(seed, task)

    def at_once(self, plan: dict[int, list[tuple]]) -> None:
        """As many at a time as there are jobs; rows of a seed as soon as its base is there."""
        pool = ThreadPoolExecutor(self.cfg.jobs)
        try:
            firsts = {pool.submit(self.first, seed): seed for seed in plan}
            rest = []
            for future in as_completed(firsts):
                future.result()
                self.processes, seed = 1, firsts[future]
                rest += [pool.submit(self.play_row, seed, task) for task in plan[seed]]
            wait_for(rest)
            if self.cfg.tune:
                wait_for([pool.submit(self.play_row, seed, task) for task in self.beyond(seed)])
        finally:  # a failure ends the story once the commands under way have ended
            pool.shutdown(cancel_futures=True)

    def tell_result(self) -> None:
        """Add the time taken to story.json; write and print the report, or what tuning found."""
        path, what = self.out / "story.json", "ablations" if self.cfg.ablate else "rows"
        about = json.loads(path.read_text())
        took = about["seconds"].get(what, 0) + time.time() - self.began
        about["seconds"] |= {what: round(took)}
        write_atomic(path, json.dumps(about, indent=1) + "\n")
        if self.cfg.tune:
            self.write_tuning(self.cfg.seeds[0])
        else:
            print(f"report: {write_report(self.out)}")
            print(summary(collect(self.out)))

    def play_row(self, seed: int, task: tuple) -> None:
        name, folder, more = task
        self.row(seed, name, folder, **more)

    def trial(self, name: str, seed: int, lr: float) -> tuple:
        return name, self.row_folder(seed, f"{name} {lr:g}"), {"flags": {"lr": lr}}

    def tried(self, seed: int) -> dict[str, dict[float, tuple[float, float]]]:
        """Row -> rate -> (Direct, CoT) on the tuning questions."""
        found = {}
        for name in self.rows():
            found[name] = {}
            for path in self.row_folder(seed, "").glob(f"{name} */result.json"):
                result = json.loads(path.read_text())
                scores = result[self.cfg.split]
                both = scores["direct"]["score"], scores["cot"]["score"]
                found[name][result["flags"]["lr"]] = both
        return found

    def beyond(self, seed: int) -> Iterator[tuple]:
        """For each row one more rate, beyond the better of the two tried first."""
        low, high = RATES[1:-1]
        for name, scores in self.tried(seed).items():
            better = best_rate({low: scores[low], high: scores[high]})
            yield self.trial(name, seed, RATES[0] if better == low else RATES[-1])

    def write_tuning(self, seed: int) -> None:
        """tuning.json, and a line a row: every rate that was tried and the one chosen."""
        rows = {}
        for name, scores in self.tried(seed).items():
            tried = {f"{lr:g}": scores[lr] for lr in sorted(scores)}
            rows[name] = {"Direct, CoT": tried, "chosen": best_rate(scores)}
            said = ", ".join(f"{lr}: {d:.1f} {cot:.1f}" for lr, (d, cot) in tried.items())
            print(f"{name}: {said}; chosen {best_rate(scores):g}")
        about = json.loads((self.out / "story.json").read_text()) | {"rows": rows}
        del about["settings"]["rates"]  # those of before
        write_atomic(self.out / "tuning.json", json.dumps(about, indent=1) + "\n")


def best_rate(scores: dict[float, tuple[float, float]]) -> float:
    """The rate with the best mean of Direct and CoT; the lowest of equals."""
    return max(sorted(scores), key=lambda lr: sum(scores[lr]))


def wait_for(futures: list[Future]) -> None:
    for future in as_completed(futures):
        future.result()


def commit() -> str:
    """The commit that these files are of, "unknown" outside a git checkout."""
    ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class ToyConfig:
    """Write a tiny world in the real formats: model, images, preference pairs, training flags."""

    out: Path = flag(Path("toy"), "folder to write; for the story: story inside it")
    pairs: int = flag(128, "pairs of the largest data set; the others follow")
    seed: int = flag(0, "another seed, another world")
    story: bool = flag(False, "the paper in miniature: train, answer, pair, compare, report")
    quick: bool = flag(False, "story: one seed; SFT, DPO and MPO; some minutes")
    ablate: bool = flag(False, "story: also the paper's Figure 4 and Table 9, on the first seed")
    seeds: tuple[int, ...] = flag((), "story: may be repeated; default 1, 2 and 3 (quick: 1)")
    jobs: int = flag(2, "story: commands at a time, or processes of one where there is one seed")
    mine: Path = flag(Path(""), "story: Python file with objectives of your own, a row each")
    tune: bool = flag(False, "story: try each row at several rates on a seed kept for that")
    tiny: bool = flag(False, "story: a few seconds a stage, to see that everything works")
    steps: int = flag(0, "story: steps of every row; 0 = 400, quick 200, tiny 6")
    wide: float = flag(0.0, "story: share of pictures with two tiles and a thumbnail")
    noise: float = flag(0.05, "story: noise of the pictures, as a share of full white")
    habit: float = flag(0.0, "story: share of lesson objects with the usual shape of their colour")

    def __post_init__(self) -> None:
        if self.pairs < 8:
            raise ValueError(f"pairs must be >= 8, got {self.pairs}")
        for name in ("wide", "noise", "habit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be >= 1, got {self.jobs}")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise ValueError(f"seeds must differ and be >= 0, got {self.seeds}")
        of_story = ("quick", "ablate", "tune", "tiny", "steps", "wide", "habit")
        only = [name for name in of_story if getattr(self, name)]
        if only and not self.story:
            raise ValueError(f"--{only[0]} belongs to --story")

    @property
    def split(self) -> str:
        """Questions that results are reported on; settings are chosen on others."""
        return "tune" if self.tune else "test"


def main() -> None:
    cfg = parse_cli(ToyConfig)
    if not cfg.story:
        write_world(cfg.out, cfg.pairs, cfg.seed)
        print(f"wrote {cfg.out}; next: python train.py --config {cfg.out / 'train.json'}")
        return
    seeds = cfg.seeds or (
        (TUNING_SEED,) if cfg.tune else (1,) if cfg.quick or cfg.tiny else (1, 2, 3)
    )
    try:
        Story(replace(cfg, out=cfg.out / "story", seeds=seeds)).play()
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run(main)
