"""What came out of a story beside the paper's numbers: tables, verdicts, curves, one HTML page.

    python report.py --story toy/story    report.html, report.md, results.json, PNGs in that folder

Reads the files that `toy.py --story` leaves (result.json of every model, metrics.jsonl of every
run) and computes everything that it says; an unfinished story gets a report of what is there.
Figures of the paper: Table 3 (base), Tables 6 and 7 (rows), Table 9 (keep ratio) of 2411.10442.
"""

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import InputError, flag, parse_cli, read_whole_lines, run, write_atomic

PAPER = {  # row -> M3CoT accuracy (Direct, CoT)
    "base": (59.3, 57.0), "SFT": (65.7, 68.5), "DPO": (75.8, 72.7), "RSO": (74.2, 74.3),
    "IPO": (72.8, 73.1), "cDPO": (76.2, 76.8), "RobustDPO": (75.1, 74.2), "BCO": (78.1, 78.4),
    "SPPO": (66.2, 67.4), "AOT": (76.7, 76.0), "TR-DPO": (75.9, 66.8), "ORPO": (66.6, 73.9),
    "DPO+": (76.4, 78.9), "cDPO+": (71.6, 74.2), "RobustDPO+": (76.5, 78.0), "BCO+": (77.4, 78.4),
    "AOT+": (76.3, 78.0), "MPO": (77.7, 79.1),
}  # fmt: skip
KEEP_RATIO = {0.25: (9.3, 4.8), 0.5: (7.6, 4.1), 0.75: (11.6, 6.2)}  # ObjHal responses, mentions
PAPER_GRID = {  # what the paper's Figure 4 and Table 9 try
    "data scale": "10K, 40K, 70K, 100K", "learning rate": "5e-7 to 5e-5",
    "w_p : w_q": "1:1, 3:1, 4:1, 5:1, 9:1", "w_g": "0.01, 0.5, 1, 2, 5",
    "keep ratio": "0.25, 0.5, 0.75",
}  # fmt: skip
SETTINGS = ("direct", "cot")
DRAWN = ("SFT", "DPO", "BCO", "DPO+", "MPO")
CURVES = ("rewards/chosen", "rewards/margin", "nll", "bco_shift")
NTP = "MPO+NTP"

Models = dict[int, dict]  # seed -> result.json


# --------------------------------------------------------------------------- reading


@dataclass
class Collected:
    """A story as its files tell it."""

    folder: Path
    about: dict
    seeds: list[int]  # with a base
    rows: dict[str, Models]  # base first, then in the paper's order
    ablations: list[dict]
    pairs: dict[int, dict]  # seed -> pairs.json


def collect(folder: Path) -> Collected:
    """Every result of the story in `folder`.  InputError where there is none or one is broken."""
    folder = Path(folder)
    about = read_json(folder / "story.json")
    need(folder / "story.json", about, ("settings", "seeds", "date", "machine", "commit", "torch"))
    rows: dict[str, Models] = {"base": {}}
    ablations, pairs = [], {}
    for seed in about["seeds"]:
        of_seed = folder / f"seed-{seed}"
        found = [of_seed / "result.json", *sorted(of_seed.glob("rows/*/result.json"))]
        for path in found:
            if path.exists():
                result = read_result(path)
                rows.setdefault(result["row"], {})[seed] = result
        for path in sorted(of_seed.glob("ablate/*/result.json")):
            ablations.append(read_result(path, "study", "value"))
        if (of_seed / "pairs.json").exists():
            pairs[seed] = read_json(of_seed / "pairs.json")
    if not rows["base"]:
        raise InputError(f"{folder}: no finished base model; run `python toy.py --story` first")
    order = [*PAPER, NTP]
    names = sorted(rows, key=lambda n: (order.index(n) if n in order else len(order), n))
    return Collected(
        folder, about, sorted(rows["base"]), {n: rows[n] for n in names}, ablations, pairs
    )


def read_result(path: Path, *more: str) -> dict:
    result = read_json(path)
    need(path, result, ("row", "seed", "test", *more))
    need(path, result["test"], SETTINGS)
    for setting in SETTINGS:
        need(path, result["test"][setting], ("score", "malformed"))
    return result


def need(path: Path, record: dict, keys: Iterable[str]) -> None:
    for key in keys:
        if key not in record:
            raise InputError(f"{path}: no {key!r}; delete it and run the story again")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no {path}; run `python toy.py --story` first") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it") from None


# --------------------------------------------------------------------------- numbers


def score(result: dict, setting: str, key: str = "score") -> float:
    return result["test"][setting][key]


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    values = list(values)
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(
    one: Models, other: Models, of: Callable[[dict], float | None]
) -> list[tuple[int, float]]:
    """(seed, one - other) of the seeds that both have: same base, same pairs."""
    both = [seed for seed in one if seed in other]
    values = [(seed, of(one[seed]), of(other[seed])) for seed in both]
    return [(seed, a - b) for seed, a, b in values if a is not None and b is not None]


def cot(result: dict) -> float:
    return score(result, "cot")


def gap(result: dict) -> float:
    return score(result, "cot") - score(result, "direct")


def worst_malformed(result: dict) -> float:
    return max(score(result, setting, "malformed") for setting in SETTINGS)


def tables(c: Collected) -> list[dict]:
    """A line a row: means and standard deviations over seeds, paired differences, the paper's."""
    lines = []
    for name, models in c.rows.items():
        line: dict[str, Any] = {"row": name, "seeds": sorted(models)}
        for key, of in (
            ("direct", lambda r: score(r, "direct")),
            ("cot", cot),
            ("gap", gap),
            ("malformed", worst_malformed),
        ):
            line[key], line[f"{key}_std"] = mean_std(map(of, models.values()))
        for key in ("chosen_shift", "rejected_shift"):
            line[key] = mean_std(
                r[key] for r in models.values() if r.get(key) is not None
            )[0]  # fmt: skip
        for other in ("base", "SFT"):
            differences = [d for _, d in paired(models, c.rows.get(other, {}), cot)]
            line[f"cot_minus_{other}"], std = mean_std(differences)
            line[f"cot_minus_{other}_se"] = std and std / math.sqrt(len(differences))
        line["flags"] = next(iter(models.values())).get("flags", {})
        line["paper"] = PAPER.get(name)
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Gate:
    """One claim of the paper, put to this story."""

    claim: str
    needed: str
    values: dict[int, float]  # seed -> number
    number: float | None
    holds: bool | None  # None: not run
    open: bool = False  # not expected of a toy: an open question

    @property
    def verdict(self) -> str:
        return {True: "agrees", False: "fails", None: "not run"}[self.holds]


def gate(
    claim: str,
    needed: str,
    values: list[tuple[int, float]],
    holds: Callable,
    each: bool = False,
    open: bool = False,
) -> Gate:
    """`holds` is asked of the mean, or (each) of every seed that is there."""
    if not values:
        return Gate(claim, needed, {}, None, None, open)
    number = statistics.fmean(v for _, v in values)
    asked = [v for _, v in values] if each else [number]
    return Gate(claim, needed, dict(values), number, all(map(holds, asked)), open)


def gates(c: Collected) -> list[Gate]:
    """Every claim with its number, its threshold and what each seed says."""
    base, mpo, dpo, sft, ntp = (c.rows.get(n, {}) for n in ("base", "MPO", "DPO", "SFT", NTP))

    def shift(r: dict) -> float | None:
        return r.get("chosen_shift")

    def made_up(r: dict) -> float | None:
        return (r.get("describe") or {}).get("mentions")

    ratios: dict[str, list] = {"mentions": [], "responses": []}
    for seed, found in c.pairs.items():
        for of in found.get("dropout", {}).values():
            for key, values in ratios.items():  # a chosen rate of 0 counts as half an answer
                least = 50 / max(1, of["pairs"])
                ratio = of["rejected"][key] / max(of["chosen"][key], least)
                values.append((seed, ratio))
    lowest = {k: sorted({s: min(x for t, x in v if t == s) for s, _ in v}.items())
              for k, v in ratios.items()}  # fmt: skip
    return [
        gate("The base answers worse with a chain of thought than directly (CoT - Direct)",
             "<= -5 on each seed", [(s, gap(r)) for s, r in base.items()], lambda x: x <= -5, True),
        gate("MPO improves chain of thought (CoT, MPO - base)",
             ">= +12 on each seed", paired(mpo, base, cot), lambda x: x >= 12, True),
        gate("MPO beats SFT on the chosen answers (CoT, MPO - SFT)",
             ">= +2 on average", paired(mpo, sft, cot), lambda x: x >= 2),
        gate("MPO beats DPO (CoT, MPO - DPO)",
             ">= +8 on average", paired(mpo, dpo, cot), lambda x: x >= 8),
        gate("MPO keeps the format of answers (malformed answers, %, worse of the two settings)",
             "<= 2 on average", [(s, worst_malformed(r)) for s, r in mpo.items()],
             lambda x: x <= 2),
        gate("DPO lowers the log-prob of chosen answers more than MPO (DPO - MPO, nats)",
             "< 0 on each seed", paired(dpo, mpo, shift), lambda x: x < 0, True),
        *(gate(f"DropoutNTP: rejected answers make up more than chosen ones ({key}, ratio)",
               ">= 2 on each seed", values, lambda x: x >= 2, True)
          for key, values in lowest.items()),
        gate("After MPO a chain of thought is better than a direct answer (CoT - Direct)",
             "> 0 on average", [(s, gap(r)) for s, r in mpo.items()], lambda x: x > 0, open=True),
        *(gate(f"DropoutNTP pairs lower hallucination (made-up mentions, %, MPO+NTP - {name})",
               "< 0 on average", paired(ntp, other, made_up), lambda x: x < 0, open=True)
          for name, other in (("MPO", mpo), ("base", base))),
    ]  # fmt: skip


def orderings(lines: list[dict], least: float = 1.0) -> dict:
    """Pairs of rows that the paper sets more than `least` points of CoT apart: how many agree."""
    known = [(line["cot"], line["paper"][1]) for line in lines if line["paper"]]
    pairs = [
        (a[0] - b[0]) * (a[1] - b[1]) > 0
        for i, a in enumerate(known)
        for b in known[:i]
        if abs(a[1] - b[1]) > least
    ]
    ranks = [ranked([k[side] for k in known]) for side in (0, 1)]
    told_apart = len(known) > 2 and all(len(set(r)) > 1 for r in ranks)
    spearman = statistics.correlation(*ranks) if told_apart else None
    return {"agree": sum(pairs), "of": len(pairs), "spearman": spearman, "rows": len(known)}


def ranked(values: list[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    return [
        sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values
    ]  # fmt: skip


def ablation_lines(c: Collected) -> list[dict]:
    """A line a value of a study, the plain run (MPO, or MPO+NTP) in its place: mean over seeds."""
    settings = c.about["settings"]
    usual = {
        "data scale": 1.0,
        "learning rate": settings.get("rates", {}).get("MPO"),
        "w_p : w_q": "4:1",
        "w_g": 1.0,
        "keep ratio": settings.get("keep_ratio", 0.5),
    }

    def place(value: Any) -> tuple[float, str]:
        p, _, q = str(value).partition(":")
        try:
            return float(p) / float(q or 1), ""
        except ValueError:  # a word: after the numbers
            return math.inf, str(value)

    found: dict[tuple, Models] = {}
    names: dict[tuple, str] = {}

    def put(study: str, value: Any, result: dict) -> None:
        key = (study, place(value))
        names.setdefault(key, str(value))
        found.setdefault(key, {}).setdefault(result["seed"], result)

    for a in c.ablations:
        put(a["study"], a["value"], a)
    for study in {a["study"] for a in c.ablations}:
        seeds = {a["seed"] for a in c.ablations if a["study"] == study}
        for seed, result in c.rows.get(NTP if study == "keep ratio" else "MPO", {}).items():
            if seed in seeds and usual.get(study) is not None:
                put(study, usual[study], result)

    lines = []
    for (study, at), models in sorted(found.items()):
        line: dict[str, Any] = {"study": study, "value": names[study, at], "seeds": sorted(models)}
        results = list(models.values())
        described = [r["describe"] for r in results if r.get("describe")]
        for key in SETTINGS:
            line[key], line[f"{key}_std"] = mean_std(score(r, key) for r in results)
        for key in ("responses", "mentions"):
            line[key], line[f"{key}_std"] = mean_std(d[key] for d in described)
        paper = KEEP_RATIO.get(at[0]) if study == "keep ratio" else None
        lines.append({**line, "paper": paper})
    return lines


# --------------------------------------------------------------------------- pictures


def figure(rows: int, cols: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib  # noqa: PLC0415  (numbers need no plots)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt.subplots(rows, cols, figsize=size, squeeze=False)


def png(drawn: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.tight_layout()
    drawn.savefig(buffer, format="png", dpi=110)
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.close(drawn)
    return buffer.getvalue()


def draw_bars(lines: list[dict]) -> bytes:
    """Direct and CoT of every row: ours above, the paper's below."""
    drawn, axes = figure(2, 1, (11, 6.4))
    ours = {line["row"]: (line["direct"], line["cot"]) for line in lines}
    errors = {line["row"]: (line["direct_std"] or 0, line["cot_std"] or 0) for line in lines}
    for axis, (title, of) in zip(axes[:, 0], (("ours", ours), ("paper, M3CoT", PAPER))):
        for side, (setting, colour) in enumerate((("Direct", "#9ab"), ("CoT", "#d62"))):
            at = [i + 0.4 * (side - 0.5) for i, name in enumerate(ours) if name in of]
            values = [of[name][side] for name in ours if name in of]
            spread = [errors[name][side] for name in ours] if of is ours else None
            axis.bar(at, values, 0.4, yerr=spread, color=colour, label=setting)
        axis.set_xticks(range(len(ours)), list(ours), rotation=40, ha="right", fontsize=8)
        axis.set_xlim(-0.7, len(ours) - 0.3)  # a row stands below itself, known to the paper or not
        heights = [v for name in ours if name in of for v in of[name]]
        room = max(e for pair in errors.values() for e in pair) if of is ours else 0
        low = max(0, min(heights) - room - 5)
        axis.set_ylim(low, max(heights) + room + 3)
        since = f" (from {low:.0f})" if low else ""
        axis.set_title(f"accuracy, %{since}: {title}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return png(drawn)


def draw_curves(c: Collected) -> bytes:
    """Rewards, margin, NLL and BCO's shift of a few rows: mean over seeds, each seed thin."""
    drawn, axes = figure(2, 2, (11, 7))
    colours = dict(zip(DRAWN, ("#777", "#c22", "#b80", "#26c", "#181")))
    for axis, metric in zip(axes.flat, CURVES):
        for name in DRAWN:
            runs = []
            for seed in c.rows.get(name, {}):
                path = c.folder / f"seed-{seed}" / "rows" / name / "metrics.jsonl"
                steps = read_whole_lines(path)[0]
                known = {s["step"]: s[metric] for s in steps if s.get(metric) is not None}
                if known and not (name == "SFT" and metric != "nll"):
                    runs.append(dict(zip(known, smooth(list(known.values())))))
            for curve in runs if len(runs) > 1 else ():
                axis.plot(*zip(*curve.items()), color=colours[name], alpha=0.25, linewidth=0.7)
            if runs:  # only steps that every seed has: the mean does not jump where one ends
                shared = sorted(set(runs[0]).intersection(*runs[1:]))
                mean = [statistics.fmean(curve[step] for curve in runs) for step in shared]
                axis.plot(shared, mean, color=colours[name], linewidth=1.6, label=name)
        axis.set_title("NLL of chosen answers" if metric == "nll" else metric, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return png(drawn)


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Mean over the last `width` steps."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw_ablations(lines: list[dict]) -> bytes:
    studies = list(dict.fromkeys(line["study"] for line in lines))
    drawn, axes = figure(1, len(studies), (3 * len(studies) + 1, 3))
    for axis, study in zip(axes[0], studies):
        of_study = [line for line in lines if line["study"] == study]
        names = [str(line["value"]) for line in of_study]
        labels = {"direct": "Direct", "cot": "CoT"}
        if study == "keep ratio":
            labels = {"mentions": "made-up mentions, %"}
        for key, label in labels.items():
            values = [math.nan if line[key] is None else line[key] for line in of_study]
            spread = [line[f"{key}_std"] or 0 for line in of_study]
            axis.errorbar(range(len(names)), values, spread, fmt="o-", capsize=3, label=label)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(study, fontsize=10)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return png(drawn)


# --------------------------------------------------------------------------- sample answers


def sample_answers(c: Collected, most: int = 6) -> list[dict]:
    """The first test questions of the first seed whose CoT answers the methods judge unlike."""
    seed = c.seeds[0]
    of_seed = c.folder / f"seed-{seed}"
    shown = [n for n in ("base", "SFT", "DPO", "MPO", NTP) if seed in c.rows.get(n, {})]
    folders = {n: of_seed if n == "base" else of_seed / "rows" / n for n in shown}
    said: dict[str, dict[str, dict]] = {}
    for name, folder in folders.items():
        for setting in SETTINGS:
            out = folder / f"test-{setting}"
            right = {r["id"]: r["correct"] for r in read_whole_lines(out / "items.jsonl")[0]}
            for row in read_whole_lines(out / "answers.jsonl")[0]:
                answers = said.setdefault(row["id"], {}).setdefault(name, {})
                answers[setting] = (row["response"], right.get(row["id"], False))
    samples = []
    for question in read_whole_lines(of_seed / "test.jsonl")[0]:
        answers = said.get(question["id"], {})
        verdicts = {a["cot"][1] for a in answers.values() if "cot" in a}
        if len(verdicts) == 2 and len(samples) < most:
            samples.append({**question, "answers": answers, "file": of_seed / "images"})
    return samples


def picture(path: Path) -> str:
    """A small image, enlarged without smoothing, as a data URI."""
    from PIL import Image  # noqa: PLC0415

    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.resize((image.width * 6, image.height * 6), Image.NEAREST).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


# --------------------------------------------------------------------------- text and page


def show(x: float | None, std: float | None = None, digits: int = 1, sign: bool = False) -> str:
    if x is None:
        return "-"
    text = f"{x:+.{digits}f}" if sign else f"{x:.{digits}f}"
    return text + (f" ± {std:.{digits}f}" if std is not None else "")


HEADER = (
    "row", "Direct", "CoT", "gap", "CoT - base", "CoT - SFT", "malformed", "chosen shift", "lr",
    "seeds", "paper Direct", "paper CoT", "paper gap",
)  # fmt: skip


def cells(line: dict) -> list[str]:
    paper = line["paper"]
    return [
        line["row"],
        show(line["direct"], line["direct_std"]),
        show(line["cot"], line["cot_std"]),
        show(line["gap"], sign=True),
        show(line["cot_minus_base"], line["cot_minus_base_se"], sign=True),
        show(line["cot_minus_SFT"], line["cot_minus_SFT_se"], sign=True),
        show(line["malformed"]),
        show(line["chosen_shift"], digits=2, sign=True),
        f"{line['flags']['lr']:g}" if "lr" in line["flags"] else "-",
        str(len(line["seeds"])),
        *(map(show, paper) if paper else "--"),
        show(paper[1] - paper[0], sign=True) if paper else "-",
    ]


def summary(c: Collected) -> str:
    """The table and the verdicts for a terminal."""
    rows = [HEADER, *(cells(line) for line in tables(c))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths)) for row in rows]
    for g in gates(c):
        seeds = ", ".join(f"{x:+.1f}" for x in g.values.values())
        said = f"{g.claim}: {show(g.number, sign=True)} [{seeds}] {g.needed}{partly(c, g)}"
        lines.append(f"{g.verdict:>8}  {said}")
    return "\n".join(lines)


def markdown(c: Collected) -> str:
    """Where it ran, the table and the verdicts; for a README."""
    about = c.about
    took = (f"{what} {s / 60:.0f} minutes" for what, s in about.get("seconds", {}).items())
    seeds = ", ".join(map(str, about["seeds"]))
    verdicts = []
    for g in gates(c):
        each = ", ".join(show(x, sign=True) for x in g.values.values()) + partly(c, g)
        claim = f"open question: {g.claim}" if g.open else g.claim
        verdicts.append((claim, g.needed, show(g.number, sign=True), each, g.verdict))
    header = ("claim", "needed", "mean", "each seed", "")
    return "\n".join([
        f"{about['date']}, {about['machine']}, torch {about['torch']}, commit {about['commit']}, "
        f"{', '.join([f'seeds {seeds}', *took])}:",
        "", *table_markdown(HEADER, map(cells, tables(c))),
        "", *table_markdown(header, verdicts),
    ])  # fmt: skip


def table_markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def partly(c: Collected, g: Gate) -> str:
    """A verdict on some of the seeds says so."""
    some = 0 < len(g.values) < len(c.about["seeds"])
    return f" (on {len(g.values)} of {len(c.about['seeds'])} seeds)" if some else ""


def table_html(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(str(x))}</th>" for x in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(x))}</td>" for x in row) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def headline(c: Collected) -> str:
    """The story in three sentences, with its own figures."""
    lines = {line["row"]: line for line in tables(c)}

    def said(name: str) -> str:
        of = lines[name]
        return f"{show(of['direct'])} % directly and {show(of['cot'])} % with a chain of thought"

    text = [f"A small model that was taught to count shapes answers {said('base')}."]
    trained = [f"{said(n)} ({n})" for n in ("SFT", "DPO", "MPO") if n in lines]
    if trained:
        text.append(
            "From its own sampled answers, right ones preferred to wrong ones, three ways of "
            f"training make of it: {'; '.join(trained)}."
        )
    tested = [g for g in gates(c) if g.holds is not None]
    holds, questions = ([g.holds for g in tested if g.open is x] for x in (False, True))
    said = f"{sum(holds)} of {len(holds)} claims of the paper that were tested here agree"
    asked = f", and {sum(questions)} of {len(questions)} open questions" if questions else ""
    text.append(f"{said}{asked}.")
    return " ".join(text)


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:1rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.2rem .5rem;border-bottom:1px solid
#ccc;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}
.claims td{white-space:normal;text-align:left}.wide{overflow-x:auto}img{max-width:100%}
.agrees{color:#161}.fails{color:#b11;font-weight:bold}.sample{display:flex;gap:1rem;flex-wrap:wrap;
margin:1rem 0}.sample img{image-rendering:pixelated;align-self:flex-start}.sample>div{
flex:1 1 16rem;min-width:0}h2{break-after:avoid}tr,img,.sample{break-inside:avoid}
code,pre{font-size:.8rem;white-space:pre-wrap}
.right{color:#161}.wrong{color:#b11}@media print{body{max-width:none;font-size:11px}
.wide{overflow:visible}table{font-size:7px}td,th{padding:.1rem .2rem}}"""


def claims_html(c: Collected) -> str:
    rows = []
    for g in gates(c):
        seeds = ", ".join(f"seed {s}: {show(x, sign=True)}" for s, x in g.values.items())
        rows.append(
            f"<tr><td class='{g.verdict}'>{g.verdict}</td><td>"
            f"{'Open question: ' if g.open else ''}{html.escape(g.claim)}</td>"
            f"<td>{show(g.number, sign=True)}</td><td>{html.escape(g.needed)}</td>"
            f"<td>{seeds}{partly(c, g)}</td></tr>"
        )
    head = "<tr><th></th><th>claim</th><th>mean</th><th>needed</th><th>each seed</th></tr>"
    return f"<div class=wide><table class=claims>{head}{''.join(rows)}</table></div>"


def sample_html(sample: dict) -> str:
    lines = []
    for name, answers in sample["answers"].items():
        for setting, (text, right) in sorted(answers.items()):
            mark = "right" if right else "wrong"
            what = f"<b>{html.escape(name)}</b> {setting}"
            lines.append(f"{what}: <span class={mark}>{html.escape(text)} ({mark})</span>")
    return (
        f"<div class=sample><img alt='' src='{picture(sample['file'] / sample['image'])}'>"
        f"<div><p><b>{html.escape(sample['question'])}</b> ({html.escape(sample['answer'])})</p>"
        f"{'<br>'.join(lines)}</div></div>"
    )


def ablation_rows(lines: list[dict]) -> Iterable[list[str]]:
    for line in lines:
        paper = line["paper"]
        yield [
            line["study"],
            line["value"],
            *(show(line[k], line[f"{k}_std"]) for k in (*SETTINGS, "responses", "mentions")),
            str(len(line["seeds"])),
            f"ObjHal {paper[0]} / {paper[1]}" if paper else "-",
            PAPER_GRID.get(line["study"], "-"),
        ]


def dropout_rows(c: Collected) -> Iterable[list[str]]:
    for seed, found in c.pairs.items():
        for ratio, of in found.get("dropout", {}).items():
            rates = [
                show(of[side][key]) for side in ("chosen", "rejected")
                for key in ("responses", "mentions")
            ]  # fmt: skip
            yield [str(seed), ratio, str(of["pairs"]), *rates]


def how_tuned(settings: dict) -> str:
    """Where the learning rates of the rows come from, as story.json tells."""
    if not (tuning := settings.get("tuning")):
        return ""
    low, *first, high = (f"{rate:g}" for rate in tuning["tried"])
    return (
        f" Learning rates: every row was tried at {' and '.join(first)}, then at {low} or {high}, "
        f"beyond the better of these, for {tuning['steps']} steps on seed {tuning['seed']}; the "
        "best mean of Direct and CoT on its development questions was chosen. The settings below "
        "hold the rates of this story."
    )


def page(c: Collected, pictures: dict[str, bytes]) -> str:
    lines, about = tables(c), c.about
    order, ablations = orderings(lines), ablation_lines(c)
    described = [
        [name, str(seed), show(r["describe"]["responses"]), show(r["describe"]["mentions"])]
        for name, models in c.rows.items()
        for seed, r in models.items()
        if r.get("describe")
    ]
    missing = [
        f"{name}, seed {seed}"
        for name in c.rows
        for seed in about["seeds"]
        if seed not in c.rows[name]
    ]
    not_run = [name for name in PAPER if name not in c.rows]
    untuned = [n for n in c.rows if n not in ("base", *about["settings"].get("rates", {}))]
    parts = [
        f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>The paper in miniature</title><style>{STYLE}</style>",
        f"<h1>The paper in miniature</h1><p>{html.escape(headline(c))}</p>",
        f"<p>{html.escape(about['date'])}, {html.escape(about['machine'])}, torch "
        f"{html.escape(about['torch'])}, commit {html.escape(about['commit'])}, seeds "
        f"{', '.join(map(str, about['seeds']))}.</p>",
        *([f"<p class=fails>Not there yet: {html.escape('; '.join(missing))}.</p>"] if missing
          else []),
        *([f"<p>Rows of the paper without a result here: {', '.join(not_run)}.</p>"] if not_run
          else []),
        "<h2>What agrees with the paper, and what does not</h2>", claims_html(c),
        f"<p>Of the {order['of']} pairs of rows whose CoT accuracy the paper sets more than a "
        f"point apart, {order['agree']} stand in the same order here; rank correlation "
        f"{show(order['spearman'], digits=2)} over {order['rows']} rows.</p>",
        "<h2>All rows</h2>", table_html(HEADER, map(cells, lines)),
        "<p>Accuracy on test questions, greedy, %: mean ± standard deviation over seeds. "
        "Differences are paired (same base, same pairs), mean ± standard error. Malformed: no "
        "answer, or not a number; the worse of the two settings. Chosen shift: mean change of a "
        "chosen answer's summed log-prob over the last 10 steps, nats."
        f"{html.escape(how_tuned(about['settings']))}</p>",
        *([f"<p>No rate of their own in the settings: {html.escape(', '.join(untuned))}.</p>"]
          if untuned else []),
        f"<img alt='accuracy of every row' src='{data_uri(pictures['rows.png'])}'>",
        "<h2>Training curves</h2>",
        f"<img alt='training curves' src='{data_uri(pictures['curves.png'])}'>",
        "<h2>DropoutNTP</h2>",
        table_html(
            ("seed", "kept", "pairs", "chosen: answers %", "chosen: mentions %",
             "rejected: answers %", "rejected: mentions %"), dropout_rows(c),
        ),
        "<p>Share of descriptions, and of mentions in them, that name what is not there.</p>",
        table_html(("model", "seed", "answers %", "mentions %"), described),
    ]  # fmt: skip
    if ablations:
        header = (
            "study", "value", "Direct", "CoT", "answers %", "mentions %", "seeds",
            "paper, Table 9", "the paper's grid",
        )  # fmt: skip
        parts += [
            "<h2>Ablations (Figure 4, Table 9)</h2>",
            f"<img alt='ablations' src='{data_uri(pictures['ablations.png'])}'>",
            table_html(header, ablation_rows(ablations)),
        ]
    parts += [
        "<h2>The same questions, put to every model</h2><p>The first test questions of the first "
        "seed whose CoT answers are right for some of these models and wrong for others.</p>",
        *map(sample_html, sample_answers(c)),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(json.dumps(about['settings'], indent=1))}</pre>",
    ]
    return "\n".join(parts) + "\n"


def write_report(folder: Path) -> Path:
    """results.json, PNGs, report.md and report.html of the story in `folder`; the page's path."""
    c = collect(folder)
    lines, ablations = tables(c), ablation_lines(c)
    pictures = {"rows.png": draw_bars(lines), "curves.png": draw_curves(c)}
    if ablations:
        pictures["ablations.png"] = draw_ablations(ablations)
    for name, content in pictures.items():
        write_atomic(c.folder / name, content)
    results = {
        "about": c.about,
        "headline": headline(c),
        "rows": lines,
        "claims": [{**vars(g), "verdict": g.verdict} for g in gates(c)],
        "orderings": orderings(lines),
        "pairs": c.pairs,
        "ablations": ablations,
    }
    write_atomic(c.folder / "report.md", markdown(c) + "\n")
    write_atomic(c.folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomic(c.folder / "report.html", page(c, pictures))
    return c.folder / "report.html"


@dataclass(frozen=True)
class ReportConfig:
    """Tables, verdicts, curves and one HTML page of a story."""

    story: Path = flag(Path("toy/story"), "folder that toy.py --story wrote")


def main() -> None:
    cfg = parse_cli(ReportConfig)
    print(f"report: {write_report(cfg.story)}")
    print(summary(collect(cfg.story)))


if __name__ == "__main__":
    run(main)
