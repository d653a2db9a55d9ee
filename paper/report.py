"""What came out of a story beside the paper's numbers: tables, claims with error bars, pictures.

    python -m paper.report --story toy/story    results.json, report.md, report.html and PNGs there

results.json is computed from the result.json of every model, and the report says only what it
holds: in a folder that has that file alone, as paper/ has, the report is written again from it.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import InputError, flag, parse_cli, read_json, run, write_atomic, write_json
from tools import figures

HERE = Path(__file__).parent
# row -> M3CoT accuracy (Direct, CoT): Table 3 (base), Tables 6 and 7 of 2411.10442
TABLE = read_json(HERE.parent / "tools/rows.json")
PAPER = {row: tuple(about["M3CoT"]) for row, about in TABLE.items()}
WITH_NTP = "MPO+NTP"  # MPO on the pairs and DropoutNTP's
SETTINGS = ("direct", "cot")
MEASURES = (*SETTINGS, "malformed", "mentions", "chosen_shift", "rejected_shift")
COMMITTED = HERE / "results.json"


def collect(folder: Path) -> tuple[dict, dict, dict, dict]:
    """(story.json, row -> flags in the paper's order, numbers, seed -> its pairs.json).

    numbers: "row measure" -> seed -> (its value, question -> the value there if it is a mean).
    """
    about = read_json(folder / "story.json") if (folder / "story.json").exists() else {"seeds": ()}
    flags, numbers, pairs = {}, defaultdict(dict), {}
    for seed in about["seeds"]:
        start = folder / f"seed-{seed}"
        for path in (*start.glob("base/result.json"), *sorted(start.glob("rows/*/result.json"))):
            result = read_json(path)
            flags.setdefault(result["row"], result["flags"])
            more = path.with_name("mentions.json")
            measures = result["measures"] | (read_json(more) if more.exists() else {})
            for name, value in measures.items():
                if value is not None:
                    by_question = result["questions"].get(name, {})
                    numbers[f"{result['row']} {name}"][seed] = value, by_question
        if (start / "pairs.json").exists():
            pairs[seed] = read_json(start / "pairs.json")
            made_up = pairs[seed]["dropout"]
            numbers["pairs twice"][seed] = made_up["rejected"] - 2 * made_up["chosen"], {}
    if "base" not in flags:
        raise InputError(f"{folder}: no finished base model; run `python -m paper.story` first")
    order = [*PAPER, WITH_NTP, *flags]
    return about, {row: flags[row] for row in sorted(flags, key=order.index)}, numbers, pairs


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of a mean (Student's t); None where there are fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.6 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


def compare(numbers: dict, one: str, other: str | None) -> dict[str, Any]:
    """One minus other, both "row measure": of every seed that has both, and the mean.

    questions: seed -> half of its 95 % interval over questions.  half: of the mean's over seeds;
    of one seed its own.
    """
    values, halves = {}, {}
    for seed, (number, questions) in numbers.get(one, {}).items():
        minus, others = 0.0, dict.fromkeys(questions, 0.0)
        if other:
            minus, others = numbers.get(other, {}).get(seed, (None, {}))
        if minus is not None:
            values[seed] = number - minus
            halves[seed] = half_width([questions[i] - others[i] for i in questions if i in others])
    mean = statistics.fmean(values.values()) if values else None
    half = half_width([*values.values()]) if len(values) > 1 else next(iter(halves.values()), None)
    return {"values": values, "questions": halves, "number": mean, "half": half}


def row_line(numbers: dict, row: str, flags: dict) -> dict:
    """The row's line of results.json: numbers over its seeds, differences to others, the paper's.

    An ablated row is named study=value.
    """
    cot = f"{row} cot"
    differences = {name: (f"{row} {name}", None) for name in MEASURES}
    differences |= {f"cot_minus_{other}": (cot, f"{other} cot") for other in ("base", "SFT", "MPO")}
    differences["gap"] = cot, f"{row} direct"
    line: dict[str, Any] = {"row": row, "seeds": sorted(numbers[cot])}
    for name, of in differences.items():
        found = compare(numbers, *of)
        values = found["values"].values()
        std = statistics.stdev(values) if len(values) > 1 else None
        line |= {name: found["number"], f"{name}_half": found["half"], f"{name}_std": std}
        line[f"{name}_se"] = std and std / math.sqrt(len(values))
    if "=" in row:
        line["study"], line["value"] = row.split("=")
    return line | {"flags": flags, "paper": PAPER.get(row)}


def orderings(lines: list[dict]) -> dict:
    """Do the rows stand in the paper's order?  Spearman's rank correlation of their CoT."""

    def ranks(values: tuple) -> list[int]:  # equal values share the mean of theirs, here doubled
        return [sum(w < v for w in values) + sum(w <= v for w in values) for v in values]

    known = [(line["cot"], line["paper"][1]) for line in lines if line["paper"]]
    ours, papers = map(ranks, zip(*known))
    differ = len(known) > 2 and len(set(ours)) > 1
    spearman = statistics.correlation(ours, papers) if differ else None
    return {"spearman": spearman, "rows": len(known)}


# each: "one" minus "other", both "row measure", and what that must be; open: not expected of a toy
CLAIMS = read_json(HERE / "claims.json", list)


def judge(numbers: dict, claim: dict) -> dict:
    """The claim's line of results.json.  It is decided where the whole interval is on one side."""
    text, needed = claim["claim"], claim["needed"]
    line = {"claim": text, "needed": needed, "bound": float(needed[2:]), "open": claim["open"]}
    line |= compare(numbers, claim["one"], claim["other"])
    line |= {"holds": None, "verdict": "undecided"}
    if len(line["values"]) > 1 and abs(line["number"] - line["bound"]) > line["half"]:
        holds = (line["number"] > line["bound"]) == needed.startswith(">=")
        line |= {"holds": holds, "verdict": "agrees" if holds else "disagrees"}
    return line


def results_of(folder: Path) -> dict:
    """results.json: everything that the report says."""
    about, rows, numbers, pairs = collect(folder)
    lines = [row_line(numbers, row, flags) for row, flags in rows.items()]
    plain = [line for line in lines if "study" not in line]
    claims = [line for claim in CLAIMS if (line := judge(numbers, claim))["values"]]
    if len(about["seeds"]) == 1:
        committed = {line["claim"]: line["values"] for line in read_json(COMMITTED)["claims"]}
        for line in claims:
            line["committed"] = sorted(committed.get(line["claim"], {}).values())
    headline = figures.render(HERE / "headline.md", rows=plain, claims=claims, show=show)
    return {
        "about": about,
        "headline": " ".join(headline.split()),
        "rows": plain,
        "claims": claims,
        "orderings": orderings(plain),
        "pairs": pairs,
        "ablations": [line for line in lines if "study" in line],
        "samples": [],  # of earlier reports; readers of results.json expect the key
    }


def draw_world() -> bytes:
    """Pictures of the toy, each with a question and its two right answers."""
    import toy  # noqa: PLC0415  (torch takes seconds to load; a report of files needs none)

    drawn, axes = figures.new_figure(1, 4, width=3, height=3.4)
    for number, axis in enumerate(axes.flat):
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
    for axis, line in zip(axes.flat, lines):
        error = {"fmt": "_", "color": "C1", "capsize": 4, "label": "mean, 95 % interval"}
        if committed := line.get("committed"):
            axis.plot(committed, [0] * len(committed), "o", color="0.7", label="committed seeds")
        seeds = [*line["values"].values()]
        axis.plot(seeds, [0] * len(seeds), "o", color="C0", label="seeds of this story")
        axis.errorbar([line["number"]], [0], xerr=[line["half"] or 0], **error)
        axis.axvline(line["bound"], color="k", linestyle=":", label="needed")
        axis.set_title(f"{line['claim']}: {line['needed']}", fontsize=8, loc="left")
        axis.set_yticks([])
    axes.flat[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 2.2), ncols=4)
    return figures.png(drawn)


def draw_rows(lines: list[dict]) -> bytes:
    """Direct and CoT of every row, the paper's beside ours."""
    drawn, axes = figures.new_figure(2, 1, width=11, height=3)
    known = [line for line in lines if line["paper"]]
    for side, (axis, key) in enumerate(zip(axes.flat, SETTINGS)):
        ours = {"fmt": "o", "capsize": 4, "label": "ours (± standard deviation over seeds)"}
        ours["yerr"] = [line[f"{key}_std"] or 0 for line in lines]
        axis.errorbar([line["row"] for line in lines], [line[key] for line in lines], **ours)
        paper = [line["paper"][side] for line in known]
        axis.plot([line["row"] for line in known], paper, "D", color="C1", label="paper, M3CoT")
        axis.set_ylabel(f"{('Direct', 'CoT')[side]} accuracy, %")
        axis.tick_params("x", rotation=40)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figures.png(drawn)


def show(line: dict, key: str, spread: str = "", form: str = ".1f") -> str:
    """A number of a line of results.json, ± another one; - where there is none."""
    number, half = line.get(key), line.get(spread)
    if number is None:
        return "-"
    return f"{number:{form}}" + ("" if half is None else f" ± {half:{form.lstrip('+')}}")


def write_report(folder: Path) -> str:
    """results.json, PNGs, report.md and report.html of the story in `folder`; the Markdown."""
    if (folder / "story.json").exists() or not (folder / "results.json").exists():
        write_json(folder / "results.json", results_of(folder))
    results = read_json(folder / "results.json")
    markdown = figures.render(HERE / "page.md", **results, show=show).rstrip() + "\n"
    write_atomic(folder / "world.png", draw_world())
    write_atomic(folder / "claims.png", draw_claims(results["claims"]))
    write_atomic(folder / "rows.png", draw_rows(results["rows"]))
    write_atomic(folder / "report.md", markdown)
    html = {"title": "The paper in miniature", "body": figures.markdown_html(markdown, folder)}
    write_atomic(folder / "report.html", figures.render(figures.TEMPLATES / "page.html", **html))
    return markdown


@dataclass(frozen=True)
class ReportConfig:
    """Tables, claims with error bars, pictures and one HTML page of a story."""

    story: Path = flag(Path("toy/story"), "folder that paper.story wrote")


if __name__ == "__main__":
    run(lambda: print(write_report(parse_cli(ReportConfig).story)))
