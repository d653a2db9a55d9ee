"""What came out of a story beside the paper's numbers: tables, claims with error bars, pictures.

    python -m paper.report --story toy/story    results.json, report.md, report.html and PNGs there

results.json is computed from the result.json of every model, and the report says only what it
holds: in a folder that has that file alone, as paper/ has, the report is written again from it.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import InputError, flag, parse_cli, read_json, run, write_atomic
from tools import figures

PAPER = {  # row -> M3CoT accuracy (Direct, CoT): Table 3 (base), Tables 6 and 7 of 2411.10442
    "base": (59.3, 57.0), "SFT": (65.7, 68.5), "DPO": (75.8, 72.7), "RSO": (74.2, 74.3),
    "IPO": (72.8, 73.1), "cDPO": (76.2, 76.8), "RobustDPO": (75.1, 74.2), "BCO": (78.1, 78.4),
    "SPPO": (66.2, 67.4), "AOT": (76.7, 76.0), "TR-DPO": (75.9, 66.8), "ORPO": (66.6, 73.9),
    "DPO+": (76.4, 78.9), "cDPO+": (71.6, 74.2), "RobustDPO+": (76.5, 78.0), "BCO+": (77.4, 78.4),
    "AOT+": (76.3, 78.0), "MPO": (77.7, 79.1),
}  # fmt: skip
WITH_NTP = "MPO+NTP"  # MPO on the pairs and DropoutNTP's
SETTINGS = ("direct", "cot")
COMMITTED = Path(__file__).parent / "results.json"


Rows = dict[str, dict[int, dict]]  # row -> seed -> what its result.json holds


def collect(folder: Path) -> tuple[dict, Rows, dict[int, dict]]:
    """What story.json tells of the story, its rows in the paper's order, and each seed's pairs."""
    about = read_json(folder / "story.json") if (folder / "story.json").exists() else {"seeds": ()}
    rows, pairs = {}, {}
    for seed in about["seeds"]:
        start = folder / f"seed-{seed}"
        for path in (start / "base/result.json", *sorted(start.glob("rows/*/result.json"))):
            if path.exists():
                result = read_json(path)
                rows.setdefault(result["row"], {})[seed] = result
        if (start / "pairs.json").exists():
            pairs[seed] = read_json(start / "pairs.json")
    if "base" not in rows:
        raise InputError(f"{folder}: no finished base model; run `python -m paper.story` first")
    order = [*PAPER, WITH_NTP, *rows]
    return about, {name: rows[name] for name in sorted(rows, key=order.index)}, pairs


# --------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about `one` minus `other`, each a (row, measure), of the same seed."""

    text: str
    one: tuple[str, str]
    other: tuple[str, str] | None
    needed: str
    open: bool = False  # not expected of a toy: an open question


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
    Claim("DropoutNTP: rejected answers make up twice what chosen ones do (mentions, %, rejected "
          "- 2 x chosen)", ("pairs", "twice"), None, ">= +0"),
    Claim("After MPO a chain of thought is better than a direct answer (CoT - Direct)",
          ("MPO", "cot"), ("MPO", "direct"), ">= +0", open=True),
    Claim(f"{LOWER}MPO)", (WITH_NTP, "mentions"), ("MPO", "mentions"), "<= +0", open=True),
    Claim(f"{LOWER}base)", (WITH_NTP, "mentions"), ("base", "mentions"), "<= +0", open=True),
)  # fmt: skip
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of a mean (Student's t); None where there are fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.6 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


def mean_half(values: dict[int, tuple]) -> tuple[float | None, float | None]:
    """Mean over seeds and half of its 95 % interval: over seeds, of one seed over its questions."""
    if len(values) == 1:
        return next(iter(values.values()))
    numbers = [value for value, _ in values.values()]
    return statistics.fmean(numbers) if numbers else None, half_width(numbers)


def paired(rows: Rows, one: tuple, other: tuple | None) -> dict[int, tuple]:
    """Seed -> (one - other, half width of its interval over questions), where both are there."""
    values = {}
    for seed, result in rows.get(one[0], {}).items():
        number, questions = (result[kind].get(one[1]) for kind in ("measures", "questions"))
        if other:
            against = rows.get(other[0], {}).get(seed, {"measures": {}, "questions": {}})
            minus, others = (against[kind].get(other[1]) for kind in ("measures", "questions"))
        else:
            minus, others = 0.0, dict.fromkeys(questions or (), 0.0)
        if number is not None and minus is not None:
            both = [i for i in questions or () if i in (others or ())]
            values[seed] = number - minus, half_width([questions[i] - others[i] for i in both])
    return values


def judge(claim: Claim, values: dict[int, tuple]) -> dict:
    """The claim's line of results.json.  It is decided where the whole interval is on one side."""
    line = {"claim": claim.text, "needed": claim.needed, "bound": float(claim.needed[2:])}
    line |= {"open": claim.open, "values": {seed: value for seed, (value, _) in values.items()}}
    line["questions"] = {seed: half for seed, (_, half) in values.items()}
    line["number"], line["half"] = mean_half(values)
    line["holds"], line["verdict"] = None, "undecided"
    margin = beyond(line, line["number"]) if len(values) > 1 else 0.0
    if abs(margin) > (line["half"] or 0.0):
        line["holds"], line["verdict"] = margin > 0, "agrees" if margin > 0 else "disagrees"
    return line


def beyond(line: dict, value: float) -> float:
    """How far a number is on the side of a claim's bound that the claim needs."""
    return (value - line["bound"]) * (1 if line["needed"].startswith(">=") else -1)


def holds_on(line: dict) -> str:
    """On how many single seeds a claim's number is what is needed."""
    values = line["values"].values()
    return f"{sum(beyond(line, value) >= 0 for value in values)} of {len(values)}"


def among(value: float, seeds: list[float]) -> str:
    """Where a number of this story falls among the committed seeds."""
    if not seeds:
        return "-"
    if min(seeds) <= value <= max(seeds):
        return f"within the {len(seeds)} seeds"
    return f"{'below' if value < min(seeds) else 'above'} all {len(seeds)} seeds"


# --------------------------------------------------------------------------- numbers


def mean_std(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of what is known; None where that is too little."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def row_line(rows: Rows, row: str) -> dict:
    """A row over its seeds: means and standard deviations, paired differences, the paper's."""
    results = rows[row]
    line: dict[str, Any] = {"row": row, "seeds": sorted(results)}
    for key in (*SETTINGS, "malformed", "mentions", "chosen_shift", "rejected_shift"):
        line[key], line[f"{key}_std"] = mean_std(r["measures"].get(key) for r in results.values())
    gaps = paired(rows, (row, "cot"), (row, "direct"))
    line["gap"], line["gap_std"] = mean_std(value for value, _ in gaps.values())
    for other in ("base", "SFT", "MPO"):
        values, name = paired(rows, (row, "cot"), (other, "cot")), f"cot_minus_{other}"
        line[name], line[f"{name}_half"] = mean_half(values)
        std = mean_std(value for value, _ in values.values())[1]
        line[f"{name}_se"] = std and std / math.sqrt(len(values))
    line["flags"], line["paper"] = next(iter(results.values()))["flags"], PAPER.get(row)
    return line


def orderings(lines: list[dict]) -> dict:
    """Do the rows stand in the paper's order?  Spearman's rank correlation of their CoT."""
    known = [(line["cot"], line["paper"][1]) for line in lines if line["paper"]]
    ours, papers = (ranked([scores[side] for scores in known]) for side in (0, 1))
    differ = len(known) > 2 and len(set(ours)) > 1
    spearman = statistics.correlation(ours, papers) if differ else None
    return {"spearman": spearman, "rows": len(known)}


def ranked(values: list[float]) -> list[float]:
    """Ranks; equal values share the mean of theirs."""
    return [sum(w < v for w in values) + sum(w <= v for w in values) for v in values]


def results_of(folder: Path) -> dict:
    """results.json: everything that the report says.  An ablated row is named study=value."""
    about, rows, pairs = collect(folder)
    lines = [row_line(rows, row) for row in rows]
    ablations = [line for line in lines if "=" in line["row"]]
    lines = [line for line in lines if line not in ablations]
    for line in ablations:
        line["study"], line["value"] = line["row"].split("=")
    rates = {seed: made["dropout"] for seed, made in pairs.items()}
    twice = {seed: rate["rejected"] - 2 * rate["chosen"] for seed, rate in rates.items()}
    dropped = {seed: {"measures": {"twice": x}, "questions": {}} for seed, x in twice.items()}
    rows = rows | {"pairs": dropped}
    claims = [judge(claim, paired(rows, claim.one, claim.other)) for claim in CLAIMS]
    claims = [line for line in claims if line["values"]]
    if len(about["seeds"]) == 1:
        committed = {line["claim"]: line["values"] for line in read_json(COMMITTED)["claims"]}
        for line in claims:
            line["committed"] = sorted(committed.get(line["claim"], {}).values())
    return {
        "about": about,
        "headline": headline(lines, claims),
        "rows": lines,
        "claims": claims,
        "orderings": orderings(lines),
        "pairs": pairs,
        "ablations": ablations,
        "samples": [],  # of earlier reports; readers of results.json expect the key
    }


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


def draw_claims(lines: list[dict]) -> bytes:
    """A claim a line: every seed, the mean with its interval, what is needed, committed seeds."""
    drawn, axes = figures.new_figure(len(lines), 1, width=9, height=0.8, squeeze=False)
    for axis, line in zip(axes[:, 0], lines):
        error = {"fmt": "_", "color": "C1", "capsize": 4, "label": "mean, 95 % interval"}
        if committed := line.get("committed"):
            axis.plot(committed, [0] * len(committed), "o", color="0.7", label="committed seeds")
        seeds = [*line["values"].values()]
        axis.plot(seeds, [0] * len(seeds), "o", color="C0", label="seeds of this story")
        axis.errorbar([line["number"]], [0], xerr=[line["half"] or 0], **error)
        axis.axvline(line["bound"], color="k", linestyle=":", label="needed")
        axis.set_title(f"{line['claim']}: {line['needed']}", fontsize=8, loc="left")
        axis.set_yticks([])
    axes[0, 0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 2.2), ncols=4)
    return figures.png(drawn)


def draw_rows(lines: list[dict]) -> bytes:
    """Direct and CoT of every row, the paper's beside ours."""
    drawn, axes = figures.new_figure(2, 1, width=11, height=3.4, squeeze=False)
    names = [line["row"] for line in lines]
    for side, (axis, key) in enumerate(zip(axes[:, 0], SETTINGS)):
        ours = [line[key] for line in lines], [line[f"{key}_std"] for line in lines]
        paper = [line["paper"] and line["paper"][side] for line in lines]
        series = {"ours (± standard deviation over seeds)": ours, "paper, M3CoT": (paper, None)}
        figures.grouped_bars(axis, names, series)
        axis.set_ylabel(f"{('Direct', 'CoT')[side]} accuracy, %")
    return figures.png(drawn)


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
    "row": lambda line: line.get("row") or f"{line['study']}={line['value']}",
    "Direct": column("direct", "direct_std"),
    "CoT": column("cot", "cot_std"),
    "gap": column("gap", form="+.1f"),
    "CoT - base": column("cot_minus_base", "cot_minus_base_half", "+.1f"),
    "CoT - SFT": column("cot_minus_SFT", "cot_minus_SFT_half", "+.1f"),
    "CoT - MPO": column("cot_minus_MPO", "cot_minus_MPO_half", "+.1f"),
    "malformed": column("malformed"),
    "made up": column("mentions"),
    "chosen shift": column("chosen_shift", form="+.2f"),
    "lr": lambda line: line.get("flags", {}).get("lr", "-"),
    "seeds": lambda line: len(line["seeds"]),
    "paper Direct": lambda line: show(line["paper"] and line["paper"][0]),
    "paper CoT": lambda line: show(line["paper"] and line["paper"][1]),
}
CLAIM_TABLE: dict[str, Callable[[dict], object]] = {
    "claim": lambda line: f"{'open question: ' if line['open'] else ''}{line['claim']}",
    "needed": lambda line: line["needed"],
    "mean": column("number", "half", "+.1f"),
    "each seed": lambda line: ", ".join(f"{value:+.1f}" for value in line["values"].values()),
    "holds on": holds_on,
    "verdict": lambda line: line["verdict"],
}
COMMITTED_COLUMN = {
    "beside the committed seeds": lambda line: among(line["number"], line["committed"])
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


def report_of(results: dict) -> str:
    """The report as Markdown: page.md with its blanks filled in."""
    about, claim_table = results["about"], CLAIM_TABLE
    if len(about["seeds"]) == 1:
        claim_table = CLAIM_TABLE | COMMITTED_COLUMN
    took = [f"{what} {s / 60:.0f} minutes" for what, s in about.get("seconds", {}).items()]
    ablations = "## Ablations (Figure 4)\n\n" + table(ROW_TABLE, results["ablations"])
    text = (Path(__file__).parent / "page.md").read_text()
    text = text.format(
        about=about,
        headline=results["headline"],
        took=", ".join(["seeds " + ", ".join(map(str, about["seeds"])), *took]),
        claims=table(claim_table, results["claims"]),
        orderings=results["orderings"],
        spearman=show(results["orderings"]["spearman"], form=".2f"),
        rows=table(ROW_TABLE, results["rows"]),
        ablations=ablations if results["ablations"] else "",
    )
    return text.rstrip() + "\n"


def write_report(folder: Path) -> str:
    """results.json, PNGs, report.md and report.html of the story in `folder`; the Markdown."""
    if (folder / "story.json").exists() or not (folder / "results.json").exists():
        text = json.dumps(results_of(folder), indent=1) + "\n"
        write_atomic(folder / "results.json", text)
    results = read_json(folder / "results.json")
    write_atomic(folder / "world.png", draw_world())
    write_atomic(folder / "claims.png", draw_claims(results["claims"]))
    write_atomic(folder / "rows.png", draw_rows(results["rows"]))
    markdown = report_of(results)
    write_atomic(folder / "report.md", markdown)
    write_atomic(folder / "report.html", figures.page(figures.markdown_html(markdown, folder)))
    return markdown


@dataclass(frozen=True)
class ReportConfig:
    """Tables, claims with error bars, pictures and one HTML page of a story."""

    story: Path = flag(Path("toy/story"), "folder that paper.story wrote")


if __name__ == "__main__":
    run(lambda: print(write_report(parse_cli(ReportConfig).story)))
