"""A tiny world in the real formats, so that every script of this repository runs on a laptop.

    python toy.py --out toy    writes in about two seconds:

    toy/model/        config.json, two safetensors shards with random weights, tokenizer.json
    toy/images/       coloured shapes on a grid; square (one tile) and wide (two tiles + thumbnail)
    toy/*.jsonl       preference pairs: with a chain of thought, direct, two images, text only
    toy/meta.json     the data sets, as MMPR's
    toy/train.json    flags of a short training run: train.py --config toy/train.json

The picture is a grid of cells of 8 pixels, 3 x 3 of them a tile.  With patches of 4 pixels and
the 2 x 2 pixel shuffle one image token looks at each cell: counting is learnable in a minute.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import runtime
from runtime import InputError, command_line, flag, parse_cli, run, write_json


@command_line
class ToyConfig:
    """Write a tiny world in the real formats: model, images, preference pairs, training flags."""

    out: Path = flag(Path("toy"), "folder to write")
    pairs: int = flag(128, "pairs of toy_steps; the sizes of the other sets follow", low=8)
    seed: int = flag(0, "another seed, another world", low=0)
    llm: Literal["internlm2", "qwen2", "qwen3"] = flag("internlm2", "the model's language model")
    demo: bool = flag(False, "a model that sees, and pairs enough to learn counting from")


import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer

from benchmarks.answers import PROMPTS
from config import parse_config
from data import seeded
from layouts import OFFICIAL_INTERNLM2, OFFICIAL_QWEN, split_stored, stored_pieces
from model import InternVL
from weights import INDEX, write_tensors

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230)}
SHAPES = ("circle", "square", "cross")
CELL = 8  # pixels
SIDE = 3  # cells along one side of a tile
MARKS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
SPECIAL = {"internlm2": ("<unk>", "<s>", "</s>", *MARKS)}  # tokens with names
SPECIAL |= dict.fromkeys(("qwen2", "qwen3"), ("<unk>", "<|endoftext|>", *MARKS))

STEPS, DIRECT = PROMPTS["en"], PROMPTS["direct"]
ON_ONE_LINE = DIRECT.replace("\n", " ")  # to type in a shell


# --------------------------------------------------------------------------- pictures, questions


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


def random_things(rng: np.random.Generator, cols: int = SIDE) -> list[Thing]:
    """3 to 7 objects in different cells, in reading order."""
    cells = rng.permutation(cols * SIDE)[: rng.integers(3, 8)]
    things, colours = [], tuple(COLOURS)
    for cell in sorted(cells):
        colour, shape = colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))]
        things.append(Thing(int(cell % cols), int(cell // cols), colour, shape))
    return things


def draw(things: list[Thing], rng: np.random.Generator, cols: int = SIDE) -> Image.Image:
    """The picture, with a pixel of jitter, uneven brightness and noise."""
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
    noisy = np.asarray(image) + rng.normal(0, 0.05 * 255, (*image.size[::-1], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


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


def build_tokenizer(llm: str = "internlm2") -> JsonTokenizer:
    """Word level, lossless: a piece is a word with the blank before it, a mark, or a line break.

    The long instructions that every question repeats are one piece each: they cost one token.
    """
    instructions = [prompt.replace("{question}", "") for prompt in (STEPS, DIRECT, ON_ONE_LINE)]
    pieces = "|".join(map(re.escape, instructions)) + r"| ?[A-Za-z0-9]+|[^A-Za-z0-9]"
    split = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    words = {piece for text in all_texts() for piece, _ in split.pre_tokenize_str(text)}
    names = [*SPECIAL[llm], *instructions, *sorted(words)]
    if len(names) % 2 == 0:  # odd, as InternVL2's 92,553: shards of the head are uneven
        names.append("[UNUSED]")
    tokenizer = JsonTokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL[llm]]
    tokenizer.add_special_tokens(special)
    return tokenizer


def model_config(vocab_size: int, llm: str = "internlm2") -> dict:
    """A config.json with the keys of the released one and the sizes of a toy."""
    language = {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2",
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rope_theta": 10000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rms_norm_eps": 1e-5, "bias": False,
        "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if llm != "internlm2":
        language |= {"architectures": [f"{llm.title()}ForCausalLM"], "model_type": llm}
        language |= {"pad_token_id": None, "rms_norm_eps": 1e-6, "head_dim": 24}
        del language["bias"], language["rope_scaling"]
    vision = {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 48,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": CELL * SIDE, "patch_size": CELL // 2, "qkv_bias": True,
        "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
        "hidden_act": "gelu", "drop_path_rate": 0.0,
    }  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": CELL * SIDE,
        "llm_config": language, "max_dynamic_patch": 4, "min_dynamic_patch": 1, "ps_version": "v2",
        "select_layer": -1, "system_message": "You are a careful observer.",
        "template": "internlm2-chat" if llm == "internlm2" else "internvl2_5",
        "torch_dtype": "bfloat16", "use_thumbnail": True, "vision_config": vision,
    }  # fmt: skip


def write_model(folder: Path, seed: int, llm: str = "internlm2", sees: bool = False) -> None:
    """Bf16 weights in the official layout: two shards and their index.

    Random ones; of a model that `sees`, the projector reads the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(llm)
    runtime.write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = model_config(tokenizer.get_vocab_size(), llm)
    write_json(folder / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVL(parse_config(config), tokenizer.token_to_id("<IMG_CONTEXT>"))
        torch.nn.init.normal_(model.language_model.model.tok_embeddings.weight, std=0.3)
        if sees:
            from paper.sight import fit_projector  # noqa: PLC0415  (it draws pictures of this file)

            fit_projector(model, tokenizer, seed)
    layout = OFFICIAL_INTERNLM2 if llm == "internlm2" else OFFICIAL_QWEN
    pieces, tensors = stored_pieces(model, layout), {}
    for name, p in model.named_parameters():
        tensors |= split_stored(p.detach().bfloat16(), pieces[name])
    names, half, weight_map = list(tensors), len(tensors) // 2, {}
    for number, held in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_tensors({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


# --------------------------------------------------------------------------- preference pairs


class World:
    """Draws numbered pictures and questions about them; the same seed gives the same world."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.images, self.seed = folder / "images", seed
        self.images.mkdir(parents=True, exist_ok=True)

    def picture(self, kind: str, number: int) -> tuple[str, list[Thing], np.random.Generator]:
        """(file name, its objects, a generator to go on with); 'wide' pictures have two tiles."""
        rng = seeded(self.seed, kind, number)
        cols = 2 * SIDE if kind.endswith("wide") else SIDE
        things = random_things(rng, cols)
        name = f"{kind}-{number:05d}.png"
        draw(things, rng, cols).save(self.images / name)
        return name, things, rng

    def counting_pair(self, kind: str, number: int, with_steps: bool) -> dict:
        """Count objects; the rejected answer misses one or makes one up."""
        name, things, rng = self.picture(kind, number)
        question = random_question(rng)
        if not with_steps:  # without them two colours are hard to add up
            question = Question(question.words[:1])
        right = question.matches(things)
        if right and rng.random() < 0.6:
            missed = rng.integers(len(right))
            wrong = [t for i, t in enumerate(right) if i != missed]
        else:
            wrong = [*right, *random_things(rng)[:1]]
        say, prompt = (chain_of_thought, STEPS) if with_steps else (direct, ON_ONE_LINE)
        prompt = "<image>\n" + prompt.replace("{question}", question.text)
        return {"image": name} | pair(prompt, say(right), say(wrong)) | {"answer_gt": direct(right)}

    def two_image_pair(self, number: int) -> dict:
        first, a, _ = self.picture("pair-a", number)
        second, b, _ = self.picture("pair-b", number)
        right = "The first." if len(a) > len(b) else "The second." if len(b) > len(a) else "Both."
        wrong = "The second." if right == "The first." else "The first."
        question = "Image 1: <image>\nImage-2: <image>\nWhich picture has more objects?"
        return {"image": [first, second]} | pair(question, right, wrong)


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"question": question, "chosen": chosen, "rejected": rejected}


def write_world(
    out: Path, pairs: int, seed: int, llm: str = "internlm2", demo: bool = False
) -> None:
    """All files of the toy; see the module docstring.

    `demo`: a projector that can read the pictures already, and enough direct questions to learn
    counting from in 1,000 steps.
    """
    world = World(out, seed)
    world.picture("new", 0)  # to ask about: in no pair
    few, short = max(2, pairs // 8), 5 * pairs if demo else pairs // 2
    sets = {
        "toy_steps": [world.counting_pair("square", i, True) for i in range(pairs)],
        "toy_direct": [world.counting_pair("square", pairs + i, False) for i in range(short)],
        "toy_wide": [world.counting_pair("wide", i, True) for i in range(few)],
        "toy_two_images": [world.two_image_pair(i) for i in range(few)],
        "toy_text": [
            pair(f"What is {a} plus {b}?", f"It is {a + b}.", f"It is {a + b + 1}.")
            for a, b in (divmod(i % 64, 8) for i in range(few))
        ],
    }
    write_sets(out, "meta.json", sets)
    write_model(out / "model", seed, llm, sees=demo)
    train = {
        "model_dir": str(out / "model"), "meta": str(out / "meta.json"),
        "out_dir": str(out / "run"), "loss": "mpo", "lr": 2e-3, "batch_size": 32, "epochs": 4,
        "pack_tokens": 1024, "recompute": "off", "drop_path": 0.0, "save_every": 10, "seed": seed,
    }  # fmt: skip
    if demo:
        train |= {"lr": 3e-3, "lr_vision": 0.0, "lr_projector": 0.0, "epochs": 5}
        train |= {"batch_size": 16, "pack_tokens": 2560, "head_rows": 0, "save_every": 200}
    write_json(out / "train.json", train)


def write_sets(folder: Path, meta_name: str, sets: dict[str, list[dict]]) -> None:
    """Each set of preference records as jsonl, and the file that lists them as MMPR's does."""
    meta = {}
    for name, records in sets.items():
        runtime.write_jsonl(folder / f"{name}.jsonl", records)
        meta[name] = {"root": "images", "annotation": f"{name}.jsonl", "data_augment": False}
        meta[name] |= {"repeat_time": 1, "length": len(records)}
    write_json(folder / meta_name, meta)


def main() -> None:
    cfg = parse_cli(ToyConfig)
    ours = (cfg.out / "toy_steps.jsonl").is_file()
    for name in ("model", "meta.json", "train.json"):
        if not ours and (cfg.out / name).exists():
            raise InputError(f"{cfg.out / name} is no earlier toy's; pass another folder")
    write_world(cfg.out, cfg.pairs, cfg.seed, cfg.llm, cfg.demo)
    flags = shlex.quote(str(cfg.out / "train.json"))
    print(f"wrote {cfg.out}; next: python train.py --config {flags}")


if __name__ == "__main__":
    run(main)
