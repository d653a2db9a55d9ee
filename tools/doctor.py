"""Looks at a preference run and names its illnesses: what is seen, what it means, what to try.

    python tools/doctor.py runs/mpo                        a run of train.py
    python tools/doctor.py out/checkpoint-400 --meta M     one of TRL or ms-swift

Reads metrics.jsonl, ms-swift's logging.jsonl or the log_history of TRL's trainer_state.json, and
where they are there the run's config.json, its weights, the start weights and, with --meta, the
pairs.  Exit status: 0 without a finding, 3 with one, 2 for what cannot be read.  train.py asks the
rules that need metrics and flags alone after every step (`diagnose`).
"""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import InputError, check_type, fingerprint, fits, flag, read_json, read_whole_lines


@runtime.command_line
class DoctorConfig:
    """Name what is wrong with a preference run."""

    FIRST = "run_dir"  # may stand without its flag
    run_dir: Path = flag(Path("runs/mpo"), "folder of a run or its metrics file (may stand first)")
    meta: Path | None = flag(None, "meta.json of its pairs; default: as its config.json says")
    json: bool = flag(False, "print JSON")


from config import InternVLConfig, load_config, recipe
from records import PairRecord, read_meta
from weights import open_weights

PAIRS_READ = 20_000
RENAMED = {"learning_rate": "lr", "nll_loss": "nll"}  # TRL and ms-swift -> train.py
RENAMED |= {"rewards/accuracies": "rewards/accuracy", "rewards/margins": "rewards/margin"}
Rows = list[dict[str, float]]


@dataclass
class Case:
    """What is known of a run; every part but the rows may be missing."""

    rows: Rows  # one a logged step, under train.py's names
    total: int  # rows of the whole run
    flags: dict[str, Any] = field(default_factory=dict)  # config.json of train.py
    model: InternVLConfig | None = None
    weights: list[Path] = field(default_factory=list)  # safetensors of the trained model
    start: list[Path] = field(default_factory=list)  # and of the one it started from
    records: list[PairRecord] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def steps(self, name: str, wrong: Callable[[float], bool]) -> list[float]:
        """The steps at which the number called `name` is `wrong`; not every step may be logged."""
        return [row["step"] for row in self.rows if name in row and wrong(row[name])]

    def ends(self, name: str) -> tuple[float, float]:
        """Means over the first and the last fifth; 0 with fewer than 10 rows."""
        values = self.column(name)
        fifth = len(values) // 5
        return (fmean(values[:fifth]), fmean(values[-fifth:])) if len(values) >= 10 else (0.0, 0.0)


# Each rule yields (an illness of WORDS, what its "seen" is to hold) where it can be told; WORDS has
# of each what is seen, what it means, what to try, the source.
WORDS = read_json(Path(__file__).with_name("illnesses.json"))
Seen = Iterator[tuple[str, *tuple[float | str, ...]]]


def in_losses(case: Case) -> Seen:
    zeros = case.steps("loss", lambda loss: loss == 0)
    if len(zeros) >= 3 and max(case.column("rewards/margin"), default=0) <= 10:
        yield "loss is 0", len(zeros), zeros[0]

    first, last = case.ends("nll")
    if last > 1.2 * first + 0.05:
        yield "forgetting", first, last

    limit, norms = case.flags.get("max_grad_norm", 0), case.column("grad_norm")
    if limit and len(norms) >= 10 and min(norms) > limit and median(norms) > 10 * limit:
        yield "always clipped", limit, median(norms)

    shifts = case.column("bco_shift")
    late = shifts[len(shifts) // 2 :]
    one_way = len(shifts) >= 10 and late in (sorted(late), sorted(late, reverse=True))
    # rewards rise with all likelihoods where the model learns to write such answers
    healthy = one_way and late[-1] > 0 and last < first - 0.1
    if one_way and not healthy and abs(late[-1]) >= max(1, 1.2 * abs(late[0])):
        yield "shift drifts", late[0], late[-1]

    # not of a toy, and not of adapters, which take larger steps
    model, lora = case.model, case.flags.get("lora_rank")
    if model and model.llm.hidden_size >= 512 and not lora:
        peak, usual = max([case.flags.get("lr") or 0, *case.column("lr")]), recipe(model)
        if peak >= 4 * usual.lr:
            yield "learning rate", peak, peak / usual.lr, usual.lr, model.generation, usual.source


def in_rewards(case: Case) -> Seen:
    rows = case.rows[-max(5, case.total // 20) :]
    rewards = [row.get(f"rewards/{side}", 1) for row in rows for side in ("chosen", "rejected")]
    if len(case.rows) > max(3, case.total // 10) and not any(rewards):
        yield "stuck", len(rows)

    (first, last), (margin, wider) = case.ends("rewards/chosen"), case.ends("rewards/margin")
    if last <= min(-0.1, first - 0.1) and wider >= margin + 0.05:
        yield "slide", first, last, margin, wider
    if wider > 10:
        yield "margin explosion", margin, wider

    accuracy, soon = case.column("rewards/accuracy"), max(10, case.total // 20)
    early = range(min(soon, len(accuracy)) - 4 if len(accuracy) >= 10 else 0)
    sure = (n for n in early if min(accuracy[n : n + 5]) == 1 and fmean(accuracy[n:]) > 0.98)
    if (n := next(sure, None)) is not None:
        steps = case.steps("rewards/accuracy", lambda value: True)
        yield "too easy", steps[n], max(case.total, steps[-1]), surface_marks(case.records)

    late = accuracy[len(accuracy) // 2 :]
    if len(accuracy) >= 2 * soon and 0.42 < fmean(late) < 0.58 and abs(wider) <= 0.05:
        yield "not learning", fmean(late), len(late), wider


def in_weights(case: Case) -> Seen:
    values = {name: case.column(name) for name in ("lr", "grad_norm", "loss", "nll")}
    idle = [name for name in ("lr", "grad_norm") if values[name] and not any(values[name])]
    if idle and len(case.rows) == case.total:
        yield "no weight moved", f"{idle[0]} is 0 at all {len(values[idle[0]])} steps"
    elif case.weights and case.start and fingerprint(case.weights) == fingerprint(case.start):
        yield "no weight moved", "the trained weights are the start weights, byte for byte"

    lost = defaultdict(list)
    for path in case.weights:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118  (it has no iterator)
                tensor = file.get_tensor(name)
                if not tensor.isfinite().all():
                    lost["NaN or infinite"].append(name)
                elif not tensor.numel():
                    lost["empty"].append(name)
                elif tensor.ndim > 1 and not tensor.any():
                    lost["all 0"].append(name)
    seen = [f"{len(n)} tensors are {kind} ({n[0]})" for kind, n in lost.items()]
    for name in values:
        bad = case.steps(name, lambda value: not math.isfinite(value))
        seen += [f"{name} is not finite at {len(bad)} steps, first at {bad[0]:.0f}"] if bad else []
    if seen:
        yield "weights lost", " and ".join(seen)


def in_pairs(case: Case) -> Seen:
    unit, chosen, rejected = "tokens", case.column("length/chosen"), case.column("length/rejected")
    if not (chosen and rejected):
        unit, chosen = "characters", [len(record.chosen) for record in case.records]
        rejected = [len(record.rejected) for record in case.records]
    if chosen and not 2 * fmean(rejected) <= 3 * fmean(chosen) <= 4.5 * fmean(rejected):
        yield "length bias", fmean(chosen), unit, fmean(rejected)

    copies = Counter((r.question, r.images, r.chosen, r.rejected) for r in case.records)
    pairs, again = len(case.records), len(case.records) - len(copies)
    if again > pairs / 20:
        yield "repeated pairs", again, pairs, max(copies.values())


def examine(case: Case) -> list[dict[str, str]]:
    """The findings: name, what is seen, what it means, what to try, the source."""
    seen = chain(in_losses(case), in_rewards(case), in_weights(case), in_pairs(case))
    return [
        {"name": name} | WORDS[name] | {"seen": WORDS[name]["seen"].format(*values)}
        for name, *values in seen
    ]


# what a pair may be told apart by, unread: the mark of a response beside the other one
MARKS: dict[str, Callable[[str, str], object]] = {
    "length": lambda text, other: len(text) > len(other),
    "the first two words": lambda text, other: tuple(text.split()[:2]),
    "the final answer's form": lambda text, other: (  # a line of its own, a box, a few words
        re.search(r"final answer\s*:", text, re.I) is not None,
        "\\boxed" in text,
        len(text.split()) < 5,
    ),
}


def surface_marks(records: list[PairRecord]) -> str:
    """Marks that tell chosen from rejected: learned on half of the pairs, tried on the others."""
    text = ""
    for name, mark in MARKS.items() if len(records) >= 20 else ():
        marks = [(mark(r.chosen, r.rejected), mark(r.rejected, r.chosen)) for r in records]
        votes = Counter(chosen for chosen, _ in marks[::2])
        votes.subtract(rejected for _, rejected in marks[::2])
        gaps = [votes[chosen] - votes[rejected] for chosen, rejected in marks[1::2]]
        share = fmean((gap > 0) + (gap == 0) / 2 for gap in gaps)
        if share > 0.85:
            text += f"; {name} alone tells {share:.0%} of {len(gaps)} pairs apart"
    return text


def diagnose(history: Rows, total: int, flags: dict[str, Any]) -> dict[str, str]:
    """What a run's metrics and flags show so far: name of the illness -> one line."""
    findings = examine(Case(history, total, flags))
    return {f["name"]: f"{f['name']}: {f['seen']}. {f['means']} Try: {f['try']}" for f in findings}


def metrics_file(run_dir: Path) -> Path:
    """The metrics of a run's folder; of TRL's checkpoints the last."""
    if run_dir.is_file():
        return run_dir
    names = ("metrics.jsonl", "logging.jsonl", "trainer_state.json")
    for pattern in (*names, "*/trainer_state.json"):
        if paths := list(run_dir.glob(pattern)):
            return max(paths, key=lambda path: (len(path.parent.name), path))  # 9 before 10
    raise InputError(f"no {', '.join(names)} in {run_dir}; pass a run's folder or metrics file")


def read_rows(path: Path) -> Rows:
    """Training rows under train.py's names; evaluations and summaries are left out."""
    rows = read_whole_lines(path) if path.suffix == ".jsonl" else read_json(path).get("log_history")
    check_type(f"{path}: 'log_history'", rows, list[dict])
    rows = [row for row in rows if type(row.get("loss")) in (int, float)]
    if not rows:
        raise InputError(f"{path}: no row has a 'loss'; expected the metrics of a training run")
    for n, row in enumerate(rows, 1):
        swift = re.match(r"\d*", str(row.get("global_step/max_steps")))[0]  # "10/600"
        numbers = {RENAMED.get(k, k): v for k, v in row.items() if type(v) in (int, float)}
        rows[n - 1] = {"step": int(swift or n)} | numbers
    return rows


def read_case(path: Path, meta: Path | None) -> Case:
    """Metrics, and what lies beside them."""
    folder, flags = path.parent, {"max_grad_norm": 1.0}  # what TRL and ms-swift clip to
    if path.name == "metrics.jsonl" and (folder / "config.json").is_file():
        flags = read_json(folder / "config.json")
        for name in ("max_grad_norm", "lr"):  # what is no number limits nothing
            flags[name] = flags[name] if fits(flags.get(name), float) else 0
    start = Path(str(flags.get("model_dir", folder / "of TRL nobody knows")))
    trained = folder / "model" if (folder / "model").is_dir() else folder
    model, configs = None, [place / "config.json" for place in (trained, start)]
    shapes = [file for file in configs if file.is_file() and "vision_config" in read_json(file)]
    try:
        model = load_config(shapes[0].parent) if shapes else None
    except InputError as error:  # a model that is trained elsewhere
        runtime.say(f"its learning rate is not judged: {error}")
    pairs = meta or Path(str(flags.get("meta", folder / "meta.json")))
    sets = read_meta(pairs, 12) if meta or pairs.is_file() else []
    records = islice((s[n] for s in sets for n in range(len(s))), PAIRS_READ)
    weights, begun = (sorted(place.glob("*.safetensors")) for place in (trained, start))
    rows, records = read_rows(path), [*records]
    read = f"{len(rows)} rows, {len(weights)} files of weights, {len(begun)} of the start's"
    runtime.say(f"looked at {read}, {len(records)} of {sum(map(len, sets))} pairs")
    return Case(rows, len(rows), flags, model, weights, begun, records)


def main() -> None:
    cfg = runtime.parse_cli(DoctorConfig)
    path = metrics_file(cfg.run_dir)
    case = read_case(path, cfg.meta)
    findings, steps = examine(case), case.rows[-1]["step"]
    if cfg.json:
        print(json.dumps({"file": str(path), "steps": steps, "findings": findings}, indent=1))
    else:
        print(f"{path}: {steps:.0f} steps, findings: {len(findings)}")
        for finding in findings:
            print(f"\n{finding.pop('name')}")
            print("\n".join(f"  {key:<7} {text}" for key, text in finding.items()))
    if findings:
        raise SystemExit(3)


if __name__ == "__main__":
    runtime.run(main)
