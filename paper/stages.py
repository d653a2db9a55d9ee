"""What a worker does in each stage of the story: it calls the scripts' functions.

A stage may be stopped at any moment; called again, it goes on where it was, because training,
sampling and answering do.  The lessons at the top are the story's own; everything after them is
written in the official formats by the ordinary code.
"""

import re
import sys
from pathlib import Path
from statistics import fmean

import eval as evaluation
import pairs
import toy
from data import seeded
from paper.report import SETTINGS, WITH_NTP
from paper.story import BETA, CHOSEN_RATES, SPEED, Seed
from records import part_files, read_parts
from runtime import process_group, read_json, read_whole_lines, write_json, write_jsonl
from tools.lab import register_file
from tools.sweep import ROWS
from toy import COLOURS, SHAPES, Thing, random_things
from train import TrainConfig, train

DESCRIBE = "Describe the image."


def describe(things: list[Thing]) -> str:
    return f"I see {', '.join(thing.words for thing in things) or 'nothing'}."


def write_lessons(seed: Seed) -> None:
    """All files that a seed starts from; pictures and questions of dev and test are their own."""
    toy.write_model(seed.folder / "model", seed.number, sees=True)
    world, recipe = toy.World(seed.folder, seed.number), seed.recipe
    direct, steps = ("direct", toy.DIRECT, toy.direct), ("steps", toy.STEPS, toy.chain_of_thought)
    sets: dict[str, list[dict]] = {"direct": [], "steps": [], "describe": [], "blind": []}

    def teach(kind: str, shown: dict, prompt: str, right: str, wrong: str) -> None:
        # lessons are for SFT, which reads no rejected response; a pair still needs two
        wrong = wrong if wrong != right else f"not {right}"
        sets[kind].append(shown | toy.pair(prompt, right, wrong))

    for number in range(recipe.pictures):
        name, things, rng = world.picture("lesson", number)
        others, shown = random_things(rng), {"image": name}
        for kind, prompt, say in (direct, direct, steps):
            question = toy.random_question(rng)
            prompt = "<image>\n" + prompt.replace("{question}", question.text)
            teach(kind, shown, prompt, *(say(question.matches(seen)) for seen in (things, others)))
        answers = describe(things), describe(others)
        teach("describe", shown, f"<image>\n{DESCRIBE}", *answers)
        if number % 20 == 0:  # what it says of a picture that it cannot see
            teach("blind", {}, DESCRIBE, *answers)
    toy.write_sets(seed.folder, "lessons.json", sets)

    for split, count in (("dev", recipe.dev), ("test", recipe.test), ("new", recipe.questions)):
        rows = []
        for number in range(count):
            name, things, rng = world.picture(split, number)
            question = toy.random_question(rng)
            row = {"id": f"{split}-{number}", "image": name, "question": question.text}
            rows.append(row | {"answer": toy.direct(question.matches(things))})
        write_jsonl(seed.folder / f"{split}.jsonl", rows)
    write_jsonl(seed.folder / "new_direct.jsonl", rows[: recipe.direct_questions])
    for split, count in (("test", recipe.dev), ("new", recipe.described)):
        rows = [{"image": f"{split}-{n:05d}.png", "question": DESCRIBE} for n in range(count)]
        write_jsonl(seed.folder / f"describe_{split}.jsonl", rows)


MENTION = re.compile(rf"[a-f][1-3] (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})")


def made_up(seed: Seed, rows: list[dict], key: str) -> float:
    """Of all objects that the descriptions row[key] mention, % that are not there.

    The rate of Object HalBench, whose objects here are exactly known: each picture of toy.World
    follows from its name.
    """
    wrong = []
    for row in rows:
        split, number = Path(row["image"]).stem.split("-")
        things = random_things(seeded(seed.number, split, int(number)))
        truth = {thing.words for thing in things}
        wrong += [words not in truth for words in MENTION.findall(row[key])]
    return 100 * sum(wrong) / max(1, len(wrong))


def train_model(seed: Seed, folder: str, **flags) -> None:
    """One run of train.py in this process."""
    flags |= SPEED | {"out_dir": seed.folder / folder, "epochs": 100, "seed": seed.number}
    with process_group(seed.number) as device:
        train(TrainConfig(**flags), device)


def train_base(seed: Seed) -> str:
    """SFT on the lessons at a constant rate until Direct works somewhat, then cool down.

    base.json: the last leg, its steps and its accuracy on the development questions.
    """
    folder, r = seed.folder / "base", seed.recipe
    if not (seed.folder / "describe_new.jsonl").exists():  # the last of the lessons' files
        write_lessons(seed)
    legs = read_whole_lines(folder / "legs.jsonl")
    while not legs or not legs[-1]["last"]:
        steps = legs[-1]["steps"] if legs else 0
        cooled = steps >= r.cap or bool(legs and legs[-1]["direct"] >= r.stop_at)
        steps += r.cooldown if cooled else r.leg if legs else r.first_leg
        train_model(
            seed, "base", model_dir=seed.folder / "model", meta=seed.folder / "lessons.json",
            loss="sft", lr=r.base_lr, lr_vision=0.0, lr_projector=0.0, max_steps=steps, warmup=40,
            decay=r.cooldown if cooled else 0, batch_size=r.base_batch_size,
        )  # fmt: skip
        items = answer(seed, folder / "model", folder / f"step-{steps}", "dev", "direct")
        direct = 100 * fmean(item["correct"] for item in items)
        legs.append({"steps": steps, "last": cooled, "direct": direct})
        write_jsonl(folder / "legs.jsonl", legs)
        words = f"Direct {direct:.1f} on development questions, step {steps}"
        print(f"         seed {seed.number} base: {words}", file=sys.__stdout__, flush=True)
    write_json(folder / "base.json", legs[-1])
    return f"{legs[-1]['steps']} steps"


def answer(seed: Seed, model: Path, folder: Path, split: str, setting: str) -> list[dict]:
    """The split's questions as eval.py reads the model's answers: id, prediction, correct."""
    out, cot = folder / f"{split}-{setting}", setting == "cot"
    own = {"bench": "own", "data": (seed.folder / f"{split}.jsonl",), "cot": cot}
    evaluation.generate(evaluation.Generate(
        **own, model_dir=model, out=out, max_tiles=2, images=seed.folder / "images",
        max_new_tokens=64 if cot else 8,
    ))  # fmt: skip
    evaluation.score(evaluation.Score(**own, answers=(out,)))
    return read_whole_lines(out / "items.jsonl")


def measure(seed: Seed, folder: str, flags: dict) -> str:
    """Measure a row's model on the test questions: result.json, and mentions.json unless quick.

    measures: name -> number.  questions: name -> question -> the value, 0 or 100, that the number
    is the mean of; of malformed answers those of the setting that has more of them.
    """
    out, questions, malformed = seed.folder / folder, {}, []
    for setting in SETTINGS:
        items = answer(seed, out / "model", out, "test", setting)
        questions[setting] = {item["id"]: 100.0 * item["correct"] for item in items}
        malformed.append({i["id"]: 100.0 * (not str(i["prediction"]).isdigit()) for i in items})
    questions["malformed"] = max(malformed, key=lambda values: sum(values.values()))
    measures = {name: fmean(values.values()) for name, values in questions.items()}
    moved = "reference_update_every" in flags  # the reference, so that rewards tell nothing
    curve = [] if moved else read_whole_lines(out / "metrics.jsonl")[-10:]
    for side in ("chosen", "rejected"):
        rewards = [m[f"rewards/{side}"] for m in curve if f"rewards/{side}" in m]
        measures[f"{side}_shift"] = fmean(rewards) / BETA if rewards else None
    record = {"row": out.name, "flags": flags, "measures": measures, "questions": questions}
    write_json(out / "result.json", record)
    if not seed.quick:
        rows = sample(seed, "describe_test", "none", folder, f"{folder}/descriptions")
        write_json(out / "mentions.json", {"mentions": made_up(seed, rows, "response")})
    return f"Direct {measures['direct']:.1f}, CoT {measures['cot']:.1f}"


def sample(
    seed: Seed, questions: str, prompts: str, start: str = "base", out: str = "samples"
) -> list[dict]:
    """Responses of start/model to a question file, one greedy response where `prompts` is none."""
    greedy, several = {"top_k": 1, "num_samples": 1}, {"num_samples": seed.recipe.samples}
    sampling = pairs.SampleConfig(
        questions=seed.folder / f"{questions}.jsonl", root=seed.folder / "images", prompts=prompts,
        model_dir=seed.folder / start / "model", out_dir=seed.folder / out, max_new_tokens=64,
        max_tiles=2, max_questions=0, seed=seed.number, **(several if prompts != "none" else greedy)
    )  # fmt: skip
    pairs.sample(sampling)
    return [row for _, row in read_parts(part_files(sampling.out_dir / questions))]


def sample_answers(seed: Seed, questions: str, prompts: str) -> str:
    """The base's own answers to new questions (section 3 of the paper)."""
    return f"{len(sample(seed, questions, prompts))} samples"


def drop_image(seed: Seed) -> str:
    """DropoutNTP: descriptions, cut in the middle and continued without the picture."""
    rows = sample(seed, "describe_new", "none", out="described")
    pairs.dropout_ntp(pairs.DropoutConfig(
        samples=seed.folder / "described", out_dir=seed.folder / "with_dropout",
        model_dir=seed.folder / "base/model", keep_ratio=seed.recipe.keep_ratio,
        max_new_tokens=64, seed=seed.number,
    ))  # fmt: skip
    return f"{len(rows)} descriptions"


def make_pairs(seed: Seed) -> str:
    """Right against wrong answers, alone in pairs/ and beside DropoutNTP's in with_dropout/."""
    for out in ("pairs", "with_dropout"):  # of any base, also one that seldom keeps the format
        pairs.correctness(pairs.CorrectnessConfig(
            samples=seed.folder / "samples", out_dir=seed.folder / out, max_format_share=1.0,
            pairs_per_query=seed.recipe.pairs_per_query, seed=seed.number,
        ))  # fmt: skip
    sets, summary = read_json(seed.folder / "pairs/pairs.report.json")["correctness"]["sets"], {}
    for name, report in (("correctness", sets["new"]), ("direct", sets["new_direct"])):
        right = 100 * report["counts"].get("correct responses", 0) / report["responses"]
        summary[name] = {"pairs": sum(report["pairs"].values()), "right": right}
    (annotations,) = (seed.folder / "with_dropout/annotations").glob("describe_new*.jsonl")
    dropped = read_whole_lines(annotations)
    rates = {side: made_up(seed, dropped, side) for side in ("chosen", "rejected")}
    summary["dropout"] = {"pairs": len(dropped)} | rates
    write_json(seed.folder / "pairs.json", summary)
    counts = f"{summary['correctness']['pairs']} CoT and {summary['direct']['pairs']} Direct pairs"
    return f"{counts}, {summary['correctness']['right']:.0f} % of CoT samples right"


def train_row(seed: Seed, row: str, name: str, flags: dict) -> str:
    """Train a row's objective from the base and measure it; `flags` are other than the row's."""
    if seed.mine:
        register_file(seed.mine)
    in_paper = "MPO" if row == WITH_NTP else row
    flags = {**ROWS.get(in_paper, {"loss": row}), "lr": CHOSEN_RATES.get(in_paper, 1e-3), **flags}
    given, r = seed.folder / ("with_dropout" if row == WITH_NTP else "pairs"), seed.recipe
    train_model(
        seed, f"rows/{name}", model_dir=seed.folder / "base/model", meta=given / "meta.json",
        reference_cache=given / "reference", batch_size=r.batch_size, max_steps=r.steps, beta=BETA,
        **flags,
    )  # fmt: skip
    return measure(seed, f"rows/{name}", flags)
