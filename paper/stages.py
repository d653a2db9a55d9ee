"""What a worker does in each stage of the story: it calls the scripts' functions.

A stage may be stopped at any moment; called again, it goes on where it was, because training,
sampling and answering do.  The lessons at the top are the story's own; everything after them is
written in the official formats by the ordinary code.
"""

import json
import re
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as JsonTokenizer
from torch import Tensor, nn

import eval as evaluation
import pairs
import toy
from data import seeded
from model import InternVL
from paper.report import SETTINGS, WITH_NTP
from paper.story import BETA, SPEED, Recipe, StoryConfig, chosen_rates
from runtime import read_json, read_whole_lines, start_process, stop_process, write_atomic
from tools.mine import register_file
from tools.sweep import ROWS
from toy import COLOURS, SHAPES, SIDE, Thing, random_things, write_lines
from train import TrainConfig, train
from vision import preprocess

DESCRIBE = "Describe the image."
GREEDY = {"prompts": "none", "top_k": 1, "num_samples": 1}  # descriptions

# --------------------------------------------------------------------------- lessons


@torch.no_grad()
def fit_projector(model: InternVL, tokenizer: JsonTokenizer, seed: int) -> None:
    """Stands in for a pre-trained InternViT, by least squares: no training.

    The ViT is random, but keeps all pixels of a cell.  The projector's first layer reads colour,
    shape and place off them; its second sends each cell to the sum of these words' embeddings.
    """
    rng, kinds = seeded(seed, "vision"), list(product(COLOURS, SHAPES))
    scenes = [random_things(rng) for _ in range(1200)]
    tiles = torch.cat([preprocess(toy.draw(scene, rng), 1, toy.CELL * SIDE) for scene in scenes])
    truth = torch.zeros(len(scenes), SIDE * SIDE, dtype=torch.long)  # 0: an empty cell
    for n, scene in enumerate(scenes):
        for thing in scene:
            truth[n, thing.row * SIDE + thing.col] = 1 + kinds.index((thing.colour, thing.shape))
    truth, cell = truth.flatten(), torch.arange(SIDE * SIDE).repeat(len(scenes))
    model.vision_model.embeddings.position_embedding.normal_(std=0.3)
    norm, first, gelu, second = model.projector

    features: list[Tensor] = []  # what the ViT hands to the projector
    hook = norm.register_forward_hook(lambda module, args, out: features.append(out.flatten(0, 1)))
    model.image_features(tiles)
    hook.remove()
    codes = torch.cat([F.one_hot(truth, 1 + len(kinds)), F.one_hot(cell)], dim=1) * 4.0 - 1.0
    set_linear(first, features[0], codes)

    def words(*names: str) -> Tensor:
        ids = [tokenizer.token_to_id(" " + name) for name in names]
        return model.language_model.model.tok_embeddings.weight[ids].sum(0)

    content = torch.stack([words(), *(words(*kind) for kind in kinds)])
    place = torch.stack([words(f"{c}{r}") for r in "123" for c in "abc"])
    set_linear(second, gelu(first(features[0])), content[truth] + place[cell])


def set_linear(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """The first rows of `layer` become the ridge regression of y (n out) on x (n in)."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y.double()).T.float()
    layer.weight[: len(solution)], layer.bias[: len(solution)] = solution[:, :-1], solution[:, -1]


def describe(things: list[Thing]) -> str:
    return f"I see {', '.join(thing.words for thing in things) or 'nothing'}."


def write_lessons(folder: Path, seed: int, recipe: Recipe) -> None:
    """All files that a seed starts from; pictures and questions of dev and test are their own."""
    toy.write_model(folder / "model", seed, fit_projector)
    world, truth = toy.World(folder, seed), {}

    def scene(split: str, number: int) -> tuple[str, list[Thing], np.random.Generator]:
        name, things, rng = world.picture(split, number)
        truth[name] = [thing.words for thing in things]
        return name, things, rng

    def lesson(prompt: str, right: str, wrong: str) -> dict:
        # lessons are for SFT, which reads no rejected response; a pair still needs two
        return toy.pair(prompt, right, wrong if wrong != right else f"not {right}")

    says = {"direct": (toy.DIRECT, toy.direct), "steps": (toy.STEPS, toy.chain_of_thought)}
    sets: dict[str, list[dict]] = {"direct": [], "steps": [], "describe": [], "blind": []}
    for number in range(recipe.pictures):
        name, things, rng = scene("lesson", number)
        others, shown = random_things(rng), {"image": name}
        for kind in ("direct", "direct", "steps"):
            question, (prompt, say) = toy.random_question(rng), says[kind]
            answers = say(question.matches(things)), say(question.matches(others))
            prompt = "<image>\n" + prompt.replace("{question}", question.text)
            sets[kind].append(shown | lesson(prompt, *answers))
        answers = describe(things), describe(others)
        sets["describe"].append(shown | lesson(f"<image>\n{DESCRIBE}", *answers))
        if number % 20 == 0:  # what it says of a picture that it cannot see
            sets["blind"].append(lesson(DESCRIBE, *answers))
    toy.write_sets(folder, "lessons.json", sets)

    counts = {"dev": recipe.dev, "test": recipe.test, "new": recipe.questions}
    for split, count in counts.items():
        rows = []
        for number in range(count):
            name, things, rng = scene(split, number)
            question = toy.random_question(rng)
            row = {"id": f"{split}-{number}", "image": name, "question": question.text}
            rows.append(row | {"answer": toy.direct(question.matches(things))})
        write_lines(folder / f"{split}.jsonl", rows)
    write_lines(folder / "new_direct.jsonl", rows[: recipe.direct_questions])
    for split, count in (("new", recipe.described), ("test", recipe.dev)):
        rows = [{"image": f"{split}-{n:05d}.png", "question": DESCRIBE} for n in range(count)]
        write_lines(folder / f"describe_{split}.jsonl", rows)
    write_atomic(folder / "truth.json", json.dumps(truth) + "\n")  # last: all files are there


MENTION = re.compile(rf"[a-f][1-3] (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})")


def made_up(cfg: StoryConfig, seed: int, rows: list[dict], key: str) -> float:
    """Of all objects that the descriptions row[key] mention, % that are not there.

    The rate of Object HalBench, whose objects here are exactly known.
    """
    truth = read_json(cfg.folder(seed) / "truth.json")
    wrong = [
        words not in truth[row["image"]] for row in rows for words in MENTION.findall(row[key])
    ]
    return 100 * sum(wrong) / max(1, len(wrong))


# --------------------------------------------------------------------------- base


def train_model(**flags) -> None:
    """One run of train.py in this process."""
    cfg = TrainConfig(**SPEED, **flags)
    train(cfg, start_process(cfg.seed))
    stop_process()


def train_base(cfg: StoryConfig, seed: int) -> str:
    """SFT on the lessons at a constant rate until Direct works somewhat, then cool down.

    base.json: the last leg, its steps and its accuracy on the development questions.
    """
    start, r = cfg.folder(seed), cfg.recipe
    folder = start / "base"
    if not (start / "truth.json").exists():
        write_lessons(start, seed, r)
    legs = read_whole_lines(folder / "legs.jsonl")
    while not legs or not legs[-1]["last"]:
        steps = legs[-1]["steps"] if legs else 0
        cooled = steps >= r.cap or bool(legs and legs[-1]["direct"] >= r.stop_at)
        steps += r.cooldown if cooled else r.leg if legs else r.first_leg
        train_model(
            model_dir=start / "model", meta=start / "lessons.json", out_dir=folder,
            loss="sft", lr=r.base_lr, lr_vision=0.0, lr_projector=0.0, warmup=40,
            decay=r.cooldown if cooled else 0, epochs=100, max_steps=steps,
            batch_size=r.base_batch_size, seed=seed,
        )  # fmt: skip
        items = answer(cfg, folder / "model", folder / f"step-{steps}", seed, "dev", "direct")
        direct = 100 * fmean(item["correct"] for item in items)
        legs.append({"steps": steps, "last": cooled, "direct": direct})
        write_lines(folder / "legs.jsonl", legs)
        words = f"seed {seed} base: Direct {direct:.1f} on development questions, step {steps}"
        print(f"         {words}", file=sys.__stdout__, flush=True)  # not into the log
    write_atomic(folder / "base.json", json.dumps(legs[-1]) + "\n")
    return f"{legs[-1]['steps']} steps"


def answer(
    cfg: StoryConfig, model: Path, folder: Path, seed: int, split: str, setting: str
) -> list[dict]:
    """The split's questions as eval.py reads the model's answers: id, prediction, correct."""
    out, cot, data = folder / f"{split}-{setting}", setting == "cot", f"{split}.jsonl"
    own = {"bench": "own", "data": (cfg.folder(seed) / data,), "cot": cot}
    asking = evaluation.Generate(
        **own, model_dir=model, out=out, max_tiles=2, images=cfg.folder(seed) / "images",
        max_new_tokens=64 if cot else 8,
    )  # fmt: skip
    evaluation.generate(asking)
    evaluation.score(evaluation.Score(**own, answers=(out,)))
    return read_whole_lines(out / "items.jsonl")


def measure(cfg: StoryConfig, seed: int, row: str, folder: str, flags: dict) -> str:
    """Measure a trained model on the test questions and write result.json, its stage's last file.

    measures: name -> number.  questions: name -> question -> the value, 0 or 100, that the number
    is the mean of; of malformed answers those of the setting that has more of them.
    """
    out, questions, malformed = cfg.folder(seed) / folder, {}, []
    for setting in SETTINGS:
        items = answer(cfg, out / "model", out, seed, "test", setting)
        questions[setting] = {item["id"]: 100.0 * item["correct"] for item in items}
        malformed.append({i["id"]: 100.0 * (not str(i["prediction"]).isdigit()) for i in items})
    questions["malformed"] = max(malformed, key=lambda values: sum(values.values()))
    measures = {name: fmean(values.values()) for name, values in questions.items()}
    if not cfg.quick:
        described = out / "model", out / "descriptions"
        rows = sample(cfg, seed, "describe_test", *described, **GREEDY)
        measures["mentions"] = made_up(cfg, seed, rows, "response")
    curve = read_whole_lines(out / "metrics.jsonl")[-10:]
    for side in ("chosen", "rejected"):
        rewards = [m[f"rewards/{side}"] for m in curve if f"rewards/{side}" in m]
        measures[f"{side}_shift"] = fmean(rewards) / BETA if rewards else None
    record = {"row": row, "flags": flags, "measures": measures, "questions": questions}
    write_atomic(out / "result.json", json.dumps(record) + "\n")
    return f"Direct {measures['direct']:.1f}, CoT {measures['cot']:.1f}"


# --------------------------------------------------------------------------- answers and pairs


def sample(
    cfg: StoryConfig, seed: int, questions: str, model: Path, out: Path, **settings
) -> list[dict]:
    """Responses to a question file of this seed: rows of part files."""
    folder = cfg.folder(seed)
    sampling = pairs.SampleConfig(
        questions=folder / f"{questions}.jsonl", root=folder / "images", model_dir=model,
        out_dir=out, max_new_tokens=64, max_tiles=2, max_questions=0, seed=seed, **settings,
    )  # fmt: skip
    pairs.sample(sampling)
    parts = sorted((out / questions).glob("part-*.jsonl"))
    return [row for part in parts for row in read_whole_lines(part)]


def sample_answers(cfg: StoryConfig, seed: int, questions: str, prompts: str) -> str:
    """The base's own answers to new questions (section 3 of the paper)."""
    model, out = cfg.folder(seed) / "base/model", cfg.folder(seed) / "samples"
    settings = {"prompts": prompts, "num_samples": cfg.recipe.samples}
    return f"{len(sample(cfg, seed, questions, model, out, **settings))} samples"


def drop_image(cfg: StoryConfig, seed: int) -> str:
    """DropoutNTP: descriptions, cut in the middle and continued without the picture."""
    folder = cfg.folder(seed)
    model, described = folder / "base/model", folder / "described"
    rows = sample(cfg, seed, "describe_new", model, described, **GREEDY)
    cutting = pairs.DropoutConfig(
        samples=described, out_dir=folder / "dropout", keep_ratio=cfg.recipe.keep_ratio,
        model_dir=model, max_new_tokens=64, seed=seed,
    )  # fmt: skip
    pairs.dropout_ntp(cutting)
    return f"{len(rows)} descriptions"


def make_pairs(cfg: StoryConfig, seed: int) -> str:
    """Right against wrong answers; dropout/both.json lists them and DropoutNTP's pairs."""
    folder, summary, both, dropped = cfg.folder(seed), {}, {}, []
    pairing = pairs.CorrectnessConfig(
        samples=folder / "samples", out_dir=folder / "pairs",
        pairs_per_query=cfg.recipe.pairs_per_query, seed=seed,
    )  # fmt: skip
    pairs.correctness(pairing)
    sets = read_json(folder / "pairs/pairs.report.json")["correctness"]["sets"]
    for name, report in (("correctness", sets["new"]), ("direct", sets["new_direct"])):
        right = 100 * report["counts"].get("correct responses", 0) / report["responses"]
        summary[name] = {"pairs": sum(report["pairs"].values()), "right": right}
    for source in ("dropout", "pairs"):
        for name, entry in read_json(folder / source / "meta.json").items():
            both[name] = entry | {"annotation": f"../{source}/{entry['annotation']}"}
            if source == "dropout":
                dropped += read_whole_lines(folder / source / entry["annotation"])
    write_atomic(folder / "dropout/both.json", json.dumps(both, indent=1) + "\n")
    rates = {side: made_up(cfg, seed, dropped, side) for side in ("chosen", "rejected")}
    summary["dropout"] = {"pairs": len(dropped)} | rates
    write_atomic(folder / "pairs.json", json.dumps(summary, indent=1) + "\n")
    counts = f"{summary['correctness']['pairs']} CoT and {summary['direct']['pairs']} Direct pairs"
    return f"{counts}, {summary['correctness']['right']:.0f} % of CoT samples right"


# --------------------------------------------------------------------------- rows


def train_row(cfg: StoryConfig, seed: int, row: str, name: str, flags: dict) -> str:
    """Train a row's objective from the base and measure it; `flags` are other than the row's."""
    start, r = cfg.folder(seed), cfg.recipe
    if cfg.mine:
        register_file(cfg.mine)
    of_paper = "MPO" if row == WITH_NTP else row
    flags = {**ROWS.get(of_paper, {"loss": row}), "lr": chosen_rates().get(of_paper, 1e-3), **flags}
    meta, cache = start / "pairs/meta.json", start / "reference"
    if row == WITH_NTP:
        meta, cache = start / "dropout/both.json", start / "dropout/reference"
    train_model(
        model_dir=start / "base/model", meta=meta, reference_cache=cache,
        out_dir=start / "rows" / name, epochs=100, batch_size=r.batch_size, max_steps=r.steps,
        beta=BETA, seed=seed, **flags,
    )  # fmt: skip
    return measure(cfg, seed, name, f"rows/{name}", flags)
