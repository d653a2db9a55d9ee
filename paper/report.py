"""What came out of a story beside the paper's numbers: tables, claims with error bars, pictures.

    python -m paper.report --story toy/story    results.json, report.md, report.html and PNGs there

results.json is computed from the files of a story (result.json of every model, metrics.jsonl of
every run, items.jsonl of every test); the report says only what it holds.  In a folder that has
results.json alone, as paper/ has, the report is written again from it.
"""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from runtime import InputError, flag, parse_cli, read_json, read_whole_lines, run, write_atomic
from tools import figures

PAPER = {  # row -> M3CoT accuracy (Direct, CoT): Table 3 (base), Tables 6 and 7 of 2411.10442
    "base": (59.3, 57.0), "SFT": (65.7, 68.5), "DPO": (75.8, 72.7), "RSO": (74.2, 74.3),
    "IPO": (72.8, 73.1), "cDPO": (76.2, 76.8), "RobustDPO": (75.1, 74.2), "BCO": (78.1, 78.4),
    "SPPO": (66.2, 67.4), "AOT": (76.7, 76.0), "TR-DPO": (75.9, 66.8), "ORPO": (66.6, 73.9),
    "DPO+": (76.4, 78.9), "cDPO+": (71.6, 74.2), "RobustDPO+": (76.5, 78.0), "BCO+": (77.4, 78.4),
    "AOT+": (76.3, 78.0), "MPO": (77.7, 79.1),
}  # fmt: skip
KEEP_RATIO = {0.25: (9.3, 4.8), 0.5: (7.6, 4.1), 0.75: (11.6, 6.2)}  # Table 9: responses, mentions
WITH_NTP = "MPO+NTP"  # MPO on the pairs and DropoutNTP's
SETTINGS = ("direct", "cot")
MADE_UP = ("responses", "mentions")  # share of them that name what is not there, %
BOTH = {"Direct": "direct", "CoT": "cot"}
DRAWN = ("SFT", "DPO", "BCO", "DPO+", "MPO")
CURVES = ("rewards/chosen", "rewards/margin", "nll", "bco_shift")
COMMITTED = Path(__file__).parent / "results.json"


# --------------------------------------------------------------------------- reading


@dataclass
class Collected:
    """A story as its files tell it."""

    folder: Path
    about: dict
    rows: dict[str, dict[int, dict]]  # row -> seed -> result.json; in the paper's order
    ablations: list[dict]
    pairs: dict[int, dict]  # seed -> pairs.json


def collect(folder: Path) -> Collected:
    """Every result of the story in `folder`.  InputError where there is none or one is broken."""
    about = read_checked(folder / "story.json", "settings seeds date machine commit torch".split())
    rows: dict[str, dict] = {"base": {}}
    ablations, pairs = [], {}
    for seed in about["seeds"]:
        start = folder / f"seed-{seed}"
        for path in [*start.glob("result.json"), *sorted(start.glob("rows/*/result.json"))]:
            result = read_result(path)
            rows.setdefault(result["row"], {})[seed] = result
        ablations += [read_result(path) for path in sorted(start.glob("ablate/*/result.json"))]
        if (start / "pairs.json").exists():
            pairs[seed] = read_json(start / "pairs.json")
    if not rows["base"]:
        raise InputError(f"{folder}: no finished base model; run `python -m paper.story` first")
    order = [*PAPER, WITH_NTP, *sorted(rows)]
    rows = {name: rows[name] for name in sorted(rows, key=order.index)}
    return Collected(folder, about, rows, ablations, pairs)


def read_checked(path: Path, keys: Iterable[str]) -> dict:
    if not path.exists():
        raise InputError(f"no {path}; run `python -m paper.story` first")
    record = read_json(path)
    if missing := [key for key in keys if key not in record]:
        raise InputError(f"{path}: no {missing[0]!r}; delete it and run the story again")
    return record


def read_result(path: Path) -> dict:
    """result.json, and of each test question whether it was right and well-formed, in percent."""
    result = read_checked(path, ("row", "seed", "study", "value", "test"))
    for setting in SETTINGS:
        if not {"score", "malformed"} <= set(result["test"].get(setting, ())):
            raise InputError(f"{path}: no {setting!r} scores; delete it and run the story again")
        items = read_whole_lines(path.parent / f"test-{setting}" / "items.jsonl")[0]
        result[setting] = {item["id"]: 100.0 * item["correct"] for item in items}
        result[f"malformed {setting}"] = {
            item["id"]: 100.0 * (not str(item["prediction"]).isdigit()) for item in items
        }
    return result


# --------------------------------------------------------------------------- claims


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of a mean (Student's t); None where there are fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: `one` minus `other`, each a (row, number), of the same seed."""

    text: str
    one: tuple[str, str]
    other: tuple[str, str] | None
    at_least: bool  # else at most
    bound: float
    open: bool = False  # not expected of a toy: an open question

    @property
    def needed(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:+g}"


CLAIMS = (
    Claim("The base answers worse with a chain of thought than directly (CoT - Direct)",
          ("base", "cot"), ("base", "direct"), False, -5),
    Claim("MPO improves chain of thought (CoT, MPO - base)",
          ("MPO", "cot"), ("base", "cot"), True, 12),
    Claim("MPO beats SFT on the chosen answers (CoT, MPO - SFT)",
          ("MPO", "cot"), ("SFT", "cot"), True, 2),
    Claim("MPO beats DPO (CoT, MPO - DPO)",
          ("MPO", "cot"), ("DPO", "cot"), True, 8),
    Claim("MPO keeps the format of answers (malformed answers, %, worse of the two settings)",
          ("MPO", "malformed"), None, False, 2),
    Claim("DPO lowers the log-prob of chosen answers more than MPO (DPO - MPO, nats)",
          ("DPO", "chosen_shift"), ("MPO", "chosen_shift"), False, 0),
    *(Claim(f"DropoutNTP: rejected answers make up twice what chosen ones do ({key}, %, "
            "rejected - 2 x chosen)", ("pairs", key), None, True, 0)
      for key in ("mentions", "responses")),
    Claim("After MPO a chain of thought is better than a direct answer (CoT - Direct)",
          ("MPO", "cot"), ("MPO", "direct"), True, 0, open=True),
    *(Claim(f"DropoutNTP pairs lower hallucination (made-up mentions, %, MPO+NTP - {name})",
            (WITH_NTP, "mentions"), (name, "mentions"), False, 0, open=True)
      for name in ("MPO", "base")),
)  # fmt: skip


def number_of(c: Collected, row: str, key: str, seed: int) -> tuple[float | None, dict]:
    """A number of a model, and the values of its test questions of which it is the mean."""
    if row == "pairs":
        kept = c.pairs.get(seed, {}).get("dropout", {}).values()
        return min((of["rejected"][key] - 2 * of["chosen"][key] for of in kept), default=None), {}
    if seed not in c.rows.get(row, {}):
        return None, {}
    result = c.rows[row][seed]
    if key in SETTINGS:
        return result["test"][key]["score"], result[key]
    if key == "malformed":
        worse = max(SETTINGS, key=lambda setting: result["test"][setting]["malformed"])
        return result["test"][worse]["malformed"], result[f"malformed {worse}"]
    if key == "mentions":
        return (result.get("describe") or {}).get("mentions"), {}
    return result.get(key), {}


def paired(c: Collected, one: tuple, other: tuple | None) -> dict[int, tuple]:
    """Seed -> (one - other, half width of its interval over questions), where both are there."""
    values = {}
    for seed in c.about["seeds"]:
        a, questions = number_of(c, *one, seed)
        b, others = number_of(c, *other, seed) if other else (0.0, dict.fromkeys(questions, 0.0))
        if a is not None and b is not None:
            differences = [questions[i] - others[i] for i in questions if i in others]
            values[seed] = a - b, half_width(differences)
    return values


def judge(claim: Claim, values: dict[int, tuple]) -> dict:
    """The claim's line of results.json.  It is decided where the whole interval is on one side."""
    numbers = [value for value, _ in values.values()]
    line = {"claim": claim.text, "needed": claim.needed, "bound": claim.bound, "open": claim.open}
    line["values"] = {seed: value for seed, (value, _) in values.items()}
    line["questions"] = {seed: half for seed, (_, half) in values.items()}
    line["number"] = statistics.fmean(numbers) if numbers else None
    line["half"], line["holds"] = half_width(numbers), None
    if line["half"] is not None:
        margin = (line["number"] - claim.bound) * (1 if claim.at_least else -1)
        line["holds"] = None if abs(margin) <= line["half"] else margin > 0
    undecided = "undecided" if numbers else "not run"
    line["verdict"] = {True: "agrees", False: "disagrees", None: undecided}[line["holds"]]
    return line


def among(value: float, seeds: list[float]) -> str:
    """Where a number of this story falls among the committed seeds."""
    if min(seeds) <= value <= max(seeds):
        return f"within the {len(seeds)} seeds"
    return f"{'below' if value < min(seeds) else 'above'} all {len(seeds)} seeds"


# --------------------------------------------------------------------------- numbers


def mean_std(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of what is known; None where that is too little."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def row_lines(c: Collected) -> list[dict]:
    """A line a row: means and standard deviations over seeds, paired differences, the paper's."""
    lines = []
    for row, models in c.rows.items():
        line: dict[str, Any] = {"row": row, "seeds": sorted(models)}
        for key in (*SETTINGS, "malformed", "mentions", "chosen_shift", "rejected_shift"):
            numbers = [number_of(c, row, key, seed)[0] for seed in models]
            line[key], line[f"{key}_std"] = mean_std(numbers)
        gaps = [value for value, _ in paired(c, (row, "cot"), (row, "direct")).values()]
        line["gap"], line["gap_std"] = mean_std(gaps)
        for other in ("base", "SFT"):
            values = [v for v, _ in paired(c, (row, "cot"), (other, "cot")).values()]
            line[f"cot_minus_{other}"], std = mean_std(values)
            line[f"cot_minus_{other}_se"] = std and std / math.sqrt(len(values))
            line[f"cot_minus_{other}_half"] = half_width(values)
        line["flags"] = next(iter(models.values())).get("flags", {})
        lines.append(line | {"paper": PAPER.get(row)})
    return lines


def orderings(lines: list[dict], least: float = 1.0) -> dict:
    """Pairs of rows that the paper sets more than `least` points of CoT apart: how many agree."""
    known = [(line["cot"], line["paper"][1]) for line in lines if line["paper"]]
    pairs = [
        (a[0] - b[0]) * (a[1] - b[1]) > 0
        for i, a in enumerate(known)
        for b in known[:i]
        if abs(a[1] - b[1]) > least
    ]
    ours, papers = (ranked([scores[side] for scores in known]) for side in (0, 1))
    told_apart = len(known) > 2 and len(set(ours)) > 1
    spearman = statistics.correlation(ours, papers) if told_apart else None
    return {"agree": sum(pairs), "of": len(pairs), "spearman": spearman, "rows": len(known)}


def ranked(values: list[float]) -> list[float]:
    """Ranks; equal values share the mean of theirs."""
    return [sum(w < v for w in values) + sum(w <= v for w in values) for v in values]


def ablation_lines(c: Collected) -> list[dict]:
    """A line a value of a study, the plain run (MPO, or MPO+NTP) in its place: mean over seeds."""
    settings = c.about["settings"]
    usual = {"data scale": 1.0, "learning rate": settings.get("rates", {}).get("MPO"), "w_g": 1.0,
             "w_p : w_q": "4:1", "keep ratio": settings.get("keep_ratio")}  # fmt: skip
    groups: dict[tuple, list[dict]] = {}
    for study, seed in {(result["study"], result["seed"]) for result in c.ablations}:
        plain = c.rows.get(WITH_NTP if study == "keep ratio" else "MPO", {}).get(seed)
        tried = [r for r in c.ablations if (r["study"], r["seed"]) == (study, seed)]
        if plain and usual[study]:
            tried.append(plain | {"value": str(usual[study])})
        for result in tried:
            over, _, under = result["value"].partition(":")
            groups.setdefault((study, float(over) / float(under or 1)), []).append(result)
    lines = []
    for (study, at), results in sorted(groups.items()):
        seeds = sorted(result["seed"] for result in results)
        line: dict[str, Any] = {"study": study, "value": results[0]["value"], "seeds": seeds}
        for key in SETTINGS:
            line[key], line[f"{key}_std"] = mean_std(r["test"][key]["score"] for r in results)
        for key in MADE_UP:
            rates = [(r.get("describe") or {}).get(key) for r in results]
            line[key], line[f"{key}_std"] = mean_std(rates)
        lines.append(line | {"paper": KEEP_RATIO.get(at) if study == "keep ratio" else None})
    return lines


def sample_answers(c: Collected, most: int = 6) -> list[dict]:
    """The first test questions of the first seed whose CoT answers are right for some rows only."""
    seed = next(iter(c.rows["base"]))
    start, answers = c.folder / f"seed-{seed}", {}
    for row in ("base", "SFT", "DPO", "MPO", WITH_NTP):
        folder = start if row == "base" else start / "rows" / row
        for setting in SETTINGS if seed in c.rows.get(row, {}) else ():
            right = c.rows[row][seed][setting]
            for line in read_whole_lines(folder / f"test-{setting}/answers.jsonl")[0]:
                verdict = "right" if right.get(line["id"]) else "wrong"
                answer = [row, setting, line["response"], verdict]
                answers.setdefault(line["id"], []).append(answer)
    samples = []
    for question in read_whole_lines(start / "test.jsonl")[0]:
        of_question = answers.get(question["id"], [])
        verdicts = {verdict for _, setting, _, verdict in of_question if setting == "cot"}
        if len(verdicts) == 2 and len(samples) < most:
            picture = f"seed-{seed}/images/{question['image']}"
            samples.append(question | {"picture": picture, "answers": of_question})
    return samples


# --------------------------------------------------------------------------- pictures


def draw_rows(lines: list[dict]) -> bytes:
    """Direct and CoT of every row, the paper's beside ours."""
    drawn, axes = figures.new_figure(2, 1, width=11, height=3.4, squeeze=False)
    names = [line["row"] for line in lines]
    for side, (axis, (title, key)) in enumerate(zip(axes[:, 0], BOTH.items())):
        ours = [line[key] for line in lines], [line[f"{key}_std"] for line in lines]
        paper = [line["paper"] and line["paper"][side] for line in lines]
        series = {"ours (± standard deviation over seeds)": ours, "paper, M3CoT": (paper, None)}
        figures.grouped_bars(axis, names, series)
        axis.set_ylabel(f"{title} accuracy, %")
    return figures.png(drawn)


def draw_curves(c: Collected) -> bytes:
    """Rewards, margin, NLL and BCO's shift of a few rows: mean over seeds, each seed thin."""
    panels: dict[str, dict] = {}
    for row, metric in product(DRAWN, CURVES):
        runs = []
        for seed in c.rows.get(row, {}):
            steps = read_whole_lines(c.folder / f"seed-{seed}/rows/{row}/metrics.jsonl")[0]
            known = {s["step"]: s[metric] for s in steps if s.get(metric) is not None}
            if known and not (row == "SFT" and metric != "nll"):
                runs.append(smooth(known))
        panels.setdefault(metric, {})[row] = runs
    return figures.png(figures.curve_panels(panels, cols=2, x_label="step"))


def smooth(curve: dict[int, float], width: int = 9) -> dict[int, float]:
    """Mean over the last `width` steps."""
    values = list(curve.values())
    means = [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
    return dict(zip(curve, means))


def draw_ablations(lines: list[dict]) -> bytes:
    """The paper's Figure 4 and Table 9: accuracy, or what is made up, against each setting."""
    panels: dict[str, dict] = {}
    for line in lines:
        keys = {"made-up mentions": "mentions"} if line["study"] == "keep ratio" else BOTH
        for label, key in keys.items():
            curve = panels.setdefault(line["study"], {}).setdefault(label, [{}])[0]
            if line[key] is not None:
                curve[line["value"]] = line[key]
    return figures.png(figures.curve_panels(panels, cols=min(3, len(panels)), y_label="%"))


def draw_placed(claims: list[dict]) -> bytes:
    """This story's number of every claim (black) among those of the committed seeds (grey)."""
    drawn, axis = figures.new_figure(width=9, height=0.5 + 0.4 * len(claims))
    for y, line in enumerate(reversed(claims)):
        axis.plot(line["committed"], [y] * len(line["committed"]), "o", color="#aaa")
        axis.plot(line["number"], y, "D", color="black")
        axis.annotate(f"{line['number']:+.1f}", (line["number"], y + 0.2), fontsize=7, ha="center")
    names = [line["claim"] for line in reversed(claims)]
    axis.set_yticks(range(len(claims)), names, fontsize=6)
    axis.set_xlabel("points, %; for log-probs nats")
    axis.grid(axis="x", alpha=0.3)
    return figures.png(drawn)


# --------------------------------------------------------------------------- text


def show(x: float | None, spread: float | None = None, form: str = ".1f") -> str:
    if x is None:
        return "-"
    return f"{x:{form}}" if spread is None else f"{x:{form}} ± {spread:{form.lstrip('+')}}"


COLUMNS = {  # of the table of rows: header -> (number, its spread, format)
    "Direct": ("direct", "direct_std", ".1f"), "CoT": ("cot", "cot_std", ".1f"),
    "gap": ("gap", "", "+.1f"), "CoT - base": ("cot_minus_base", "cot_minus_base_half", "+.1f"),
    "CoT - SFT": ("cot_minus_SFT", "cot_minus_SFT_half", "+.1f"),
    "malformed": ("malformed", "", ".1f"), "made up": ("mentions", "", ".1f"),
    "chosen shift": ("chosen_shift", "", "+.2f"),
}  # fmt: skip


def row_table(lines: list[dict]) -> tuple:
    rows = []
    for line in lines:
        numbers = [show(line.get(key), line.get(std), form) for key, std, form in COLUMNS.values()]
        direct, cot = line["paper"] or (None, None)
        paper = show(direct), show(cot), show(cot and cot - direct, form="+.1f")
        lr, seeds = line["flags"].get("lr", "-"), len(line["seeds"])
        rows.append([line["row"], *numbers, lr, seeds, *paper])
    return ("row", *COLUMNS, "lr", "seeds", "paper Direct", "paper CoT", "paper gap"), rows


def claim_table(lines: list[dict]) -> tuple:
    rows = []
    for line in lines:
        halves = line["questions"]
        seeds = [show(x, halves.get(seed), "+.1f") for seed, x in line["values"].items()]
        text = f"open question: {line['claim']}" if line["open"] else line["claim"]
        mean = show(line["number"], line["half"], "+.1f")
        rows.append([text, line["needed"], mean, ", ".join(seeds) or "-", line["verdict"]])
    return ("claim", "needed", "mean", "each seed", "verdict"), rows


def placed_table(claims: list[dict]) -> tuple:
    rows = []
    for line in claims:
        number, words = show(line["number"], form="+.1f"), among(line["number"], line["committed"])
        seeds = ", ".join(show(x, form="+.1f") for x in line["committed"])
        rows.append([line["claim"], number, words, seeds])
    return ("claim", "here", "that is", "committed seeds"), rows


def ablation_table(lines: list[dict]) -> tuple:
    rows = []
    for line in lines:
        numbers = [show(line[key], line[f"{key}_std"]) for key in (*SETTINGS, *MADE_UP)]
        paper = "ObjHal {} / {}".format(*line["paper"]) if line["paper"] else "-"
        rows.append([line["study"], line["value"], len(line["seeds"]), *numbers, paper])
    return ("study", "value", "seeds", *BOTH, *MADE_UP, "Table 9"), rows


def headline(lines: list[dict], claims: list[dict]) -> str:
    """The story in some words, with its own figures."""
    accuracy = {line["row"]: f"{show(line['direct'])} / {show(line['cot'])} %" for line in lines}
    trained = [f"{accuracy[row]} ({row})" for row in ("SFT", "DPO", "MPO") if row in accuracy]
    verdicts = [line["verdict"] for line in claims if not line["open"]]
    counts = {"agree": "agrees", "disagree": "disagrees", "are undecided": "undecided"}
    counted = [f"{verdicts.count(verdict)} {words}" for words, verdict in counts.items()]
    return (
        f"A small model that was taught to count shapes answers {accuracy['base']} of questions "
        "rightly, directly / with a chain of thought. Trained on its own sampled answers, right "
        f"ones preferred to wrong ones: {', '.join(trained) or 'nothing yet'}. "
        f"Of {len(verdicts)} claims of the paper {', '.join(counted)}."
    )


def placed_words(results: dict) -> str:
    """How the recipe of this story differs from that of the committed seeds."""
    committed = read_json(COMMITTED)["about"]
    ours, theirs = results["about"]["settings"], committed["settings"]
    other = [f"{name} {ours.get(name)} instead of {theirs[name]}"
             for name in ("pictures", "questions", "steps", "test")
             if ours.get(name) != theirs.get(name)]  # fmt: skip
    recipe = f" Its recipe differs ({', '.join(other)}), so a shift is expected." if other else ""
    return (
        f"The committed run has seeds {', '.join(map(str, committed['seeds']))} "
        f"({committed['date']}).{recipe} One seed decides nothing."
    )


def blocks_of(results: dict, folder: Path) -> list[figures.Block]:
    """The report as paragraphs, tables and pictures."""
    about, order = results["about"], results["orderings"]
    took = [f"{what} {s / 60:.0f} minutes" for what, s in about.get("seconds", {}).items()]
    blocks: list[figures.Block] = [
        results["headline"],
        f"{about['date']}, {about['machine']}, torch {about['torch']}, commit {about['commit']}, "
        f"{', '.join(['seeds ' + ', '.join(map(str, about['seeds'])), *took])}.",
        "## What agrees with the paper, and what does not",
        claim_table(results["claims"]),
        "Mean over seeds with its 95 % interval (Student's t, paired: same base, same pairs); of "
        "each seed the 95 % interval over its test questions, where the number is a mean of "
        "questions. A claim is decided where the whole interval over seeds lies on one side of "
        "what is needed; one seed never decides.",
        f"Of the {order['of']} pairs of rows whose CoT accuracy the paper sets more than a point "
        f"apart, {order['agree']} stand in the same order here; rank correlation "
        f"{show(order['spearman'], form='.2f')} over {order['rows']} rows.",
    ]
    if placed := [line for line in results["claims"] if line.get("committed")]:
        words, table = placed_words(results), placed_table(placed)
        blocks += ["## Among the committed seeds", words, table, Path("seeds.png")]
    blocks += [
        "## All rows",
        row_table(results["rows"]),
        "Accuracy on test questions, greedy, %: mean ± standard deviation over seeds; differences "
        "with their 95 % interval. Malformed: no answer, or not a number; the worse of the two "
        "settings. Made up: share of mentions in descriptions that name what is not there. Chosen "
        "shift: change of a chosen answer's summed log-prob over the last 10 steps, nats. Learning "
        "rates were chosen by `--tune`, with the same tries for every row, on a seed and questions "
        "kept for that.",
        Path("rows.png"),
    ]
    if (folder / "curves.png").exists():
        blocks += ["## Training curves", Path("curves.png")]
    if results["ablations"]:
        table = ablation_table(results["ablations"])
        blocks += ["## Ablations (Figure 4, Table 9)", table, Path("ablations.png")]
    if results.get("samples"):
        blocks.append("## The same questions, put to every model")
    for sample in results.get("samples", ()):
        question, table = f"{sample['question']} ({sample['answer']})", sample["answers"]
        blocks += [question, Path(sample["picture"]), (("row", "setting", "answer", ""), table)]
    return blocks


def write_report(folder: Path) -> str:
    """results.json, PNGs, report.md and report.html of the story in `folder`; the Markdown."""
    pictures = {}
    if (folder / "story.json").exists() or not (folder / "results.json").exists():
        c = collect(folder)
        claims = [judge(claim, paired(c, claim.one, claim.other)) for claim in CLAIMS]
        lines = row_lines(c)
        results = {"about": c.about, "headline": headline(lines, claims), "rows": lines}
        results |= {"claims": claims, "orderings": orderings(lines), "pairs": c.pairs}
        results |= {"ablations": ablation_lines(c), "samples": sample_answers(c)}
        if len(c.about["seeds"]) == 1:
            known = {line["claim"]: line["values"] for line in read_json(COMMITTED)["claims"]}
            for line in (placed := [line for line in claims if line["values"]]):
                line["committed"] = sorted(known[line["claim"]].values())
            pictures["seeds.png"] = draw_placed(placed)
        pictures["curves.png"] = draw_curves(c)
        write_atomic(folder / "results.json", json.dumps(results, indent=1) + "\n")
    results = read_json(folder / "results.json")
    pictures["rows.png"] = draw_rows(results["rows"])
    if results["ablations"]:
        pictures["ablations.png"] = draw_ablations(results["ablations"])
    for name, content in pictures.items():
        write_atomic(folder / name, content)
    title = "The paper in miniature"
    markdown, page = figures.document(title, blocks_of(results, folder), folder)
    write_atomic(folder / "report.md", markdown)
    write_atomic(folder / "report.html", page)
    return markdown


@dataclass(frozen=True)
class ReportConfig:
    """Tables, claims with error bars, pictures and one HTML page of a story."""

    story: Path = flag(Path("toy/story"), "folder that paper.story wrote")


def main() -> None:
    cfg = parse_cli(ReportConfig)
    print(write_report(cfg.story))


if __name__ == "__main__":
    run(main)
