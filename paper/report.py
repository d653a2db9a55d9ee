"""What came out of a story beside the paper's numbers: tables, claims with error bars, pictures.

    python -m paper.report --story toy/story    results.json, report.md, report.html and PNGs there

results.json is computed from the files of a story: result.json of every model, metrics.jsonl of
every run.  The report says only what results.json holds.  In a folder
that has that file alone, as paper/ has, the report is written again from it.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
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
BOTH = {"Direct": "direct", "CoT": "cot"}
MADE_UP = ("responses", "mentions")  # share of them that name what is not there, %
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
    about = read_checked(folder / "story.json", "settings seeds date machine commit torch")
    results, pairs = [], {}
    for seed in about["seeds"]:
        start = folder / f"seed-{seed}"
        for pattern in ("result.json", "rows/*/result.json", "ablate/*/result.json"):
            for path in sorted(start.glob(pattern)):
                results.append(read_checked(path, "row seed study value measures questions"))
        if (start / "pairs.json").exists():
            pairs[seed] = read_json(start / "pairs.json")
    rows: dict[str, dict] = {}
    for result in results:
        if not result["study"]:
            rows.setdefault(result["row"], {})[result["seed"]] = result
    if "base" not in rows:
        raise InputError(f"{folder}: no finished base model; run `python -m paper.story` first")
    order = [*PAPER, WITH_NTP, *sorted(rows)]
    rows = {name: rows[name] for name in sorted(rows, key=order.index)}
    return Collected(folder, about, rows, [r for r in results if r["study"]], pairs)


def read_checked(path: Path, keys: str) -> dict:
    if not path.exists():
        raise InputError(f"no {path}; run `python -m paper.story` first")
    record = read_json(path)
    for key in keys.split():
        if key not in record:
            raise InputError(f"{path}: no {key!r}; delete it and run the story again")
    return record


# --------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about `one` minus `other`, each a (row, measure), of the same seed."""

    text: str
    one: tuple[str, str]
    other: tuple[str, str] | None
    needed: str
    open: bool = False  # not expected of a toy: an open question


TWICE = "DropoutNTP: rejected answers make up twice what chosen ones do"
LOWER = "DropoutNTP pairs lower hallucination (made-up mentions, %, MPO+NTP - "
CLAIMS = (
    Claim("The base answers worse with a chain of thought than directly (CoT - Direct)",
          ("base", "cot"), ("base", "direct"), "<= -5"),
    Claim("MPO improves chain of thought (CoT, MPO - base)",
          ("MPO", "cot"), ("base", "cot"), ">= +12"),
    Claim("MPO beats SFT on the chosen answers (CoT, MPO - SFT)",
          ("MPO", "cot"), ("SFT", "cot"), ">= +2"),
    Claim("MPO beats DPO (CoT, MPO - DPO)",
          ("MPO", "cot"), ("DPO", "cot"), ">= +8"),
    Claim("MPO keeps the format of answers (malformed answers, %, worse of the two settings)",
          ("MPO", "malformed"), None, "<= +2"),
    Claim("DPO lowers the log-prob of chosen answers more than MPO (DPO - MPO, nats)",
          ("DPO", "chosen_shift"), ("MPO", "chosen_shift"), "<= +0"),
    Claim(f"{TWICE} (mentions, %, rejected - 2 x chosen)", ("pairs", "mentions"), None, ">= +0"),
    Claim(f"{TWICE} (responses, %, rejected - 2 x chosen)", ("pairs", "responses"), None, ">= +0"),
    Claim("After MPO a chain of thought is better than a direct answer (CoT - Direct)",
          ("MPO", "cot"), ("MPO", "direct"), ">= +0", open=True),
    Claim(f"{LOWER}MPO)", (WITH_NTP, "mentions"), ("MPO", "mentions"), "<= +0", open=True),
    Claim(f"{LOWER}base)", (WITH_NTP, "mentions"), ("base", "mentions"), "<= +0", open=True),
)  # fmt: skip
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of a mean (Student's t); None where there are fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


def measured(c: Collected, row: str, key: str, seed: int) -> tuple[float | None, dict]:
    """A measure of a row, and the values of its test questions that it is the mean of.

    The row "pairs": rejected - 2 x chosen, at the worst dropout ratio.
    """
    if row == "pairs":
        ratios = c.pairs.get(seed, {}).get("dropout", {}).values()
        return min((r["rejected"][key] - 2 * r["chosen"][key] for r in ratios), default=None), {}
    result = c.rows.get(row, {}).get(seed, {"measures": {}, "questions": {}})
    return result["measures"].get(key), result["questions"].get(key, {})


def paired(c: Collected, one: tuple, other: tuple | None) -> dict[int, tuple]:
    """Seed -> (one - other, half width of its interval over questions), where both are there."""
    values = {}
    for seed in c.about["seeds"]:
        a, questions = measured(c, *one, seed)
        b, others = measured(c, *other, seed) if other else (0.0, dict.fromkeys(questions, 0.0))
        if a is not None and b is not None:
            differences = [questions[i] - others[i] for i in questions if i in others]
            values[seed] = a - b, half_width(differences)
    return values


def judge(claim: Claim, values: dict[int, tuple]) -> dict:
    """The claim's line of results.json.  It is decided where the whole interval is on one side."""
    numbers = [value for value, _ in values.values()]
    bound, sign = float(claim.needed[2:]), 1 if claim.needed.startswith(">=") else -1
    line = {"claim": claim.text, "needed": claim.needed, "bound": bound, "open": claim.open}
    line["values"] = {seed: value for seed, (value, _) in values.items()}
    line["questions"] = {seed: half for seed, (_, half) in values.items()}
    line["number"] = statistics.fmean(numbers) if numbers else None
    line["half"], line["holds"] = half_width(numbers), None
    if line["half"] is not None:
        margin = sign * (line["number"] - bound)
        line["holds"] = None if abs(margin) <= line["half"] else margin > 0
    undecided = "undecided" if numbers else "not run"
    line["verdict"] = {True: "agrees", False: "disagrees", None: undecided}[line["holds"]]
    return line


def holds_on(line: dict) -> str:
    """On how many single seeds a claim's number is what is needed."""
    values, sign = line["values"].values(), 1 if line["needed"].startswith(">=") else -1
    return f"{sum(sign * value >= sign * line['bound'] for value in values)} of {len(values)}"


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
    for row, results in c.rows.items():
        line: dict[str, Any] = {"row": row, "seeds": sorted(results)}
        for key in (*SETTINGS, "malformed", "mentions", "chosen_shift", "rejected_shift"):
            line[key], line[f"{key}_std"] = mean_std(
                r["measures"].get(key) for r in results.values()
            )
        gaps = [value for value, _ in paired(c, (row, "cot"), (row, "direct")).values()]
        line["gap"], line["gap_std"] = mean_std(gaps)
        for other in ("base", "SFT"):
            values = [v for v, _ in paired(c, (row, "cot"), (other, "cot")).values()]
            line[f"cot_minus_{other}"], std = mean_std(values)
            line[f"cot_minus_{other}_se"] = std and std / math.sqrt(len(values))
            line[f"cot_minus_{other}_half"] = half_width(values)
        line["flags"] = next(iter(results.values())).get("flags", {})
        lines.append(line | {"paper": PAPER.get(row)})
    return lines


def orderings(lines: list[dict]) -> dict:
    """Pairs of rows that the paper sets more than a point of CoT apart: how many agree."""
    known = [(line["cot"], line["paper"][1]) for line in lines if line["paper"]]
    agree = [
        (a[0] - b[0]) * (a[1] - b[1]) > 0
        for i, a in enumerate(known)
        for b in known[:i]
        if abs(a[1] - b[1]) > 1
    ]
    ours, papers = (ranked([scores[side] for scores in known]) for side in (0, 1))
    differ = len(known) > 2 and len(set(ours)) > 1
    spearman = statistics.correlation(ours, papers) if differ else None
    return {"agree": sum(agree), "of": len(agree), "spearman": spearman, "rows": len(known)}


def ranked(values: list[float]) -> list[float]:
    """Ranks; equal values share the mean of theirs."""
    return [sum(w < v for w in values) + sum(w <= v for w in values) for v in values]


def ablation_lines(c: Collected) -> list[dict]:
    """A line a value of a study, the plain run (MPO, or MPO+NTP) in its place: mean over seeds."""
    settings, results = c.about["settings"], list(c.ablations)
    usual = {"data scale": 1.0, "learning rate": settings.get("rates", {}).get("MPO"), "w_g": 1.0,
             "w_p : w_q": "4:1", "keep ratio": settings.get("keep_ratio")}  # fmt: skip
    for study, seed in {(result["study"], result["seed"]) for result in c.ablations}:
        plain = c.rows.get(WITH_NTP if study == "keep ratio" else "MPO", {}).get(seed)
        if plain and usual[study]:
            results.append(plain | {"study": study, "value": str(usual[study])})
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        over, _, under = result["value"].partition(":")
        groups.setdefault((result["study"], float(over) / float(under or 1)), []).append(result)
    lines = []
    for (study, value), group in sorted(groups.items()):
        seeds = sorted(result["seed"] for result in group)
        line: dict[str, Any] = {"study": study, "value": group[0]["value"], "seeds": seeds}
        for key in (*SETTINGS, *MADE_UP):
            line[key], line[f"{key}_std"] = mean_std(r["measures"].get(key) for r in group)
        lines.append(line | {"paper": KEEP_RATIO.get(value) if study == "keep ratio" else None})
    return lines


# --------------------------------------------------------------------------- pictures


def draw_world(count: int = 4) -> bytes:
    """Pictures of the toy, each with a question and its two right answers."""
    import toy  # noqa: PLC0415  (torch takes seconds to load; a report of files needs none)

    drawn, axes = figures.new_figure(1, count, width=3, height=3.4, squeeze=False)
    for number, axis in enumerate(axes[0]):
        rng = toy.seeded("report", number)
        things, question = toy.random_things(rng), toy.random_question(rng)
        axis.imshow(toy.draw(things, rng))
        axis.set_xticks(range(4, 24, 8), "abc")
        axis.set_yticks(range(4, 24, 8), "123")
        axis.set_title(question.text.replace(" objects", "\nobjects"), fontsize=9)
        seen = question.matches(things)
        steps = toy.chain_of_thought(seen).replace(", ", ",\n").replace("see ", "see\n")
        axis.set_xlabel(f"Direct: {toy.direct(seen)}\nCoT: {steps}", fontsize=8, loc="left")
    return figures.png(drawn)


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


# --------------------------------------------------------------------------- text


def show(x: float | None, spread: float | None = None, form: str = ".1f") -> str:
    if x is None:
        return "-"
    return f"{x:{form}}" if spread is None else f"{x:{form}} ± {spread:{form.lstrip('+')}}"


def column(key: str, spread: str = "", form: str = ".1f") -> Callable[[dict], str]:
    """A cell that shows a number of its line."""
    return lambda line: show(line.get(key), line.get(spread), form)


# tables: header -> the cell of a line of results.json
ROW_TABLE: dict[str, Callable[[dict], object]] = {
    "row": lambda line: line["row"],
    "Direct": column("direct", "direct_std"),
    "CoT": column("cot", "cot_std"),
    "gap": column("gap", form="+.1f"),
    "CoT - base": column("cot_minus_base", "cot_minus_base_half", "+.1f"),
    "CoT - SFT": column("cot_minus_SFT", "cot_minus_SFT_half", "+.1f"),
    "malformed": column("malformed"),
    "made up": column("mentions"),
    "chosen shift": column("chosen_shift", form="+.2f"),
    "lr": lambda line: line["flags"].get("lr", "-"),
    "seeds": lambda line: len(line["seeds"]),
    "paper Direct": lambda line: show(line["paper"] and line["paper"][0]),
    "paper CoT": lambda line: show(line["paper"] and line["paper"][1]),
    "paper gap": lambda line: show(line["paper"] and line["paper"][1] - line["paper"][0],
                                   form="+.1f"),
}  # fmt: skip
CLAIM_TABLE: dict[str, Callable[[dict], object]] = {
    "claim": lambda line: f"{'open question: ' if line['open'] else ''}{line['claim']}",
    "needed": lambda line: line["needed"],
    "mean": column("number", "half", "+.1f"),
    "each seed": lambda line: ", ".join(
        show(value, line["questions"].get(seed), "+.1f") for seed, value in line["values"].items()
    ) or "-",
    "holds on": holds_on,
    "verdict": lambda line: line["verdict"],
}  # fmt: skip
COMMITTED_COLUMN: dict[str, Callable[[dict], object]] = {
    "beside the committed seeds": lambda line: (
        among(line["number"], line["committed"]) if "committed" in line else "-"
    )
}
ABLATION_TABLE: dict[str, Callable[[dict], object]] = {
    "study": lambda line: line["study"],
    "value": lambda line: line["value"],
    "seeds": lambda line: len(line["seeds"]),
    **{title: column(key, f"{key}_std") for title, key in BOTH.items()},
    **{key: column(key, f"{key}_std") for key in MADE_UP},
    "Table 9": lambda line: "ObjHal {} / {}".format(*line["paper"]) if line["paper"] else "-",
}


def table(columns: dict[str, Callable[[dict], object]], lines: list[dict]) -> str:
    rows = [[cell(line) for cell in columns.values()] for line in lines]
    return figures.markdown_table(list(columns), rows)


def headline(lines: list[dict], claims: list[dict]) -> str:
    """The story in some words, with its own figures."""
    accuracy = {line["row"]: f"{show(line['direct'])} / {show(line['cot'])} %" for line in lines}
    trained = [f"{accuracy[row]} ({row})" for row in ("SFT", "DPO", "MPO") if row in accuracy]
    verdicts = [line["verdict"] for line in claims if not line["open"]]
    return (
        f"A small model that was taught to count shapes answers {accuracy['base']} of questions "
        "rightly, directly / with a chain of thought. Trained on its own sampled answers, right "
        f"ones preferred to wrong ones: {', '.join(trained) or 'nothing yet'}. "
        f"Of {len(verdicts)} claims of the paper {verdicts.count('agrees')} agree, "
        f"{verdicts.count('disagrees')} disagree, {verdicts.count('undecided')} are undecided."
    )


def other_settings(settings: dict) -> str:
    """How the recipe differs from that of the committed seeds."""
    committed = read_json(COMMITTED)["about"]["settings"]
    other = [
        f"{name} {settings.get(name)} instead of {committed[name]}"
        for name in ("pictures", "questions", "steps", "test")
        if settings.get(name) != committed[name]
    ]
    return f" Beside the committed seeds a shift is expected: {', '.join(other)}." if other else ""


def report_of(results: dict, folder: Path) -> str:
    """The report as Markdown: page.md with its blanks filled in."""
    about, orderings, others = results["about"], results["orderings"], []
    took = [f"{what} {s / 60:.0f} minutes" for what, s in about.get("seconds", {}).items()]
    one_seed = len(about["seeds"]) == 1
    if (folder / "curves.png").exists():
        others.append("## Training curves\n\n![curves](curves.png)")
    if results["ablations"]:
        ablations = table(ABLATION_TABLE, results["ablations"])
        others.append("## Ablations (Figure 4, Table 9)\n\n![ablations](ablations.png)")
        others.append(ablations)
    text = (
        (Path(__file__).parent / "page.md")
        .read_text()
        .format(
            about=about,
            headline=results["headline"],
            took=", ".join(["seeds " + ", ".join(map(str, about["seeds"])), *took]),
            claims=table(CLAIM_TABLE | (COMMITTED_COLUMN if one_seed else {}), results["claims"]),
            recipe=other_settings(about["settings"]) if one_seed else "",
            orderings=orderings,
            spearman=show(orderings["spearman"], form=".2f"),
            rows=table(ROW_TABLE, results["rows"]),
            others="\n\n".join(others),
        )
    )
    return text.rstrip() + "\n"


def results_of(c: Collected) -> dict:
    """results.json: everything that the report says."""
    lines = row_lines(c)
    claims = [judge(claim, paired(c, claim.one, claim.other)) for claim in CLAIMS]
    if len(c.about["seeds"]) == 1:
        committed = {line["claim"]: line["values"] for line in read_json(COMMITTED)["claims"]}
        for line in claims:
            if line["values"]:
                line["committed"] = sorted(committed[line["claim"]].values())
    return {
        "about": c.about,
        "headline": headline(lines, claims),
        "rows": lines,
        "claims": claims,
        "orderings": orderings(lines),
        "pairs": c.pairs,
        "ablations": ablation_lines(c),
        "samples": [],  # of earlier reports; readers of results.json expect the key
    }


def write_report(folder: Path) -> str:
    """results.json, PNGs, report.md and report.html of the story in `folder`; the Markdown."""
    if (folder / "story.json").exists() or not (folder / "results.json").exists():
        c = collect(folder)
        write_atomic(folder / "results.json", json.dumps(results_of(c), indent=1) + "\n")
        write_atomic(folder / "curves.png", draw_curves(c))
    results = read_json(folder / "results.json")
    write_atomic(folder / "world.png", draw_world())
    write_atomic(folder / "rows.png", draw_rows(results["rows"]))
    if results["ablations"]:
        write_atomic(folder / "ablations.png", draw_ablations(results["ablations"]))
    markdown = report_of(results, folder)
    write_atomic(folder / "report.md", markdown)
    write_atomic(folder / "report.html", figures.markdown_page(markdown, folder))
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
