"""The paper's Tables 2, 3 and 4 with our scores beside them, as text and JSON."""

from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from runtime import InputError, check_type, read_json
from tools.figures import text_table

PAPER = read_json(Path(__file__).with_name("paper.json"))  # table 3: [Direct, CoT]
TABLE2 = PAPER.pop("titles")  # of the benchmarks
TABLE4 = PAPER.pop("figures of table4")  # title -> [benchmark, key of score.json]
SETTINGS = ("Direct", "CoT")
# what a report needs of a score.json
SCORE_FIELDS = dict.fromkeys("benchmark model metric split extraction prompts".split(), str)
SCORE_FIELDS |= dict.fromkeys("judge judge_date weights".split(), str | None)
SCORE_FIELDS |= dict.fromkeys("score standard_error".split(), float | None)
SCORE_FIELDS |= dict.fromkeys([key for _, key in TABLE4.values()], float | None)
SCORE_FIELDS |= {"setting": Literal[SETTINGS], "status": Literal["complete", "incomplete"]}
SCORE_FIELDS |= {"n": int, "unparsed": int, "missing_judgements": list[str], "notes": list[str]}

Scores = dict[tuple[str, str, str], dict[str, Any]]  # (model, benchmark, setting) -> score.json


def load_scores(folders: Iterable[Path]) -> Scores:
    """Every score has one place; a second one for it is an error, never a choice.

    Models of one name but other weights are told apart by the weights' fingerprint.
    """
    files = []
    for folder in folders:
        score = dict.fromkeys(SCORE_FIELDS) | read_json(path := folder / "score.json")
        for key, kind in SCORE_FIELDS.items():
            check_type(f"{path}, as `eval.py score` writes it: {key!r}", score[key], kind)
        if score["status"] == "complete" and None in (score["score"], score["standard_error"]):
            raise InputError(f"{path}: complete, but without a score: run `eval.py score` again")
        files.append((folder, score))
    scores, folder_of = {}, {}
    for folder, score in files:
        model = score["model"]
        if len({s.get("weights") for _, s in files if s["model"] == model}) > 1:
            model += f"@{str(score.get('weights'))[:8]}"
        place = (model, score["benchmark"], score["setting"])
        if place in scores:
            raise InputError(f"{folder} and {folder_of[place]} both hold {' '.join(place)}")
        scores[place], folder_of[place] = score, folder
    return scores


def figure_of(scores: Scores, model: str, bench: str, setting: str, key: str) -> float | str | None:
    """A figure of a score, "incomplete" where judgements are missing, None without a score."""
    score = scores.get((model, bench, setting))
    if score is None or score["status"] == "incomplete":
        return score and "incomplete"
    return score[key] and 100 * score[key] if key == "hallucination_rate" else score.get(key)


def cell(x: float | str | None) -> str:
    if x is None or isinstance(x, str):
        return x or "-"
    return f"{x + 1e-9:.1f}"  # 31.25 is printed as 31.3, as in the paper


def setting_rows(name: str, columns: list[list[float | str | None]]) -> list[list[str]]:
    """Rows of Direct, CoT and their difference, if there are; a column holds the first two."""
    numbers = [all(isinstance(x, float | int) for x in pair) for pair in columns]
    gaps = [f"{b - a:+.1f}" if known else "-" for known, (a, b) in zip(numbers, columns)]
    rows = [*([cell(x) for x in row] for row in zip(*columns)), gaps]
    labelled = zip((*SETTINGS, "CoT - Direct"), rows)
    return [[f"{name} {label}", *row] for label, row in labelled if set(row) != {"-"}]


def report_text(scores: Scores) -> str:
    """The tables, and what each of our figures stands on."""

    def ours(benchmarks: Iterable[str], keys: Iterable[str] = repeat("score")) -> list[list[str]]:
        figures, rows = list(zip(benchmarks, keys)), []
        for model in dict.fromkeys(model for model, _, _ in scores):
            columns = [[figure_of(scores, model, b, s, k) for s in SETTINGS] for b, k in figures]
            rows += setting_rows(model, columns)
        return rows

    table2, table4 = (
        [[f"paper {name}", *map(cell, row.values())] for name, row in PAPER[table].items()]
        for table in ("table2", "table4")
    )
    for name, pairs in PAPER["table3"].items():
        table2 += setting_rows(f"paper {name}", [pairs.get(b, [None, None]) for b in TABLE2])
    others = sorted({b for _, b, _ in scores} - {*TABLE2, "object_halbench"})
    parts = {
        "Tables 2 and 3 (a row without a setting is the paper's Table 2: its MPO row is CoT, its "
        "InternVL2-8B row Direct)": text_table(["", *TABLE2.values()], table2 + ours(TABLE2)),
        "Table 4 (hallucination; lower is better but for the MMHal score)":
            text_table(["", *TABLE4], table4 + ours(*zip(*TABLE4.values()))),
        "Not in the paper's tables (text-only: own baseline only, not Table 5)":
            text_table(["", *others], ours(others)) if others else "",
        "What our figures stand on": "\n".join(map(footnote, scores.values())),
    }  # fmt: skip
    return "\n".join(f"{title}\n{body}\n" for title, body in parts.items() if body)


def footnote(s: dict[str, Any]) -> str:
    """One line a score: everything that has to be known to compare it."""
    if s["score"] is None:
        figure = f"incomplete ({s['n']} judged, {len(s['missing_judgements'])} missing)"
    else:
        figure = f"{s['score']:.2f} +- {s['standard_error']:.2f}"
    words = [
        f"{s['model']} {s['benchmark']} {s['setting']}: {figure}", s["metric"], f"n {s['n']}",
        s["split"], f"extraction {s['extraction']}", f"unparsed {s['unparsed']}",
        f"prompts {s['prompts']}", *s["notes"],
    ]  # fmt: skip
    if s["judge"]:
        words.append(f"judge {s['judge']} {s['judge_date'] or 'without a date'}")
    return "; ".join(words)


def report_json(scores: Scores) -> dict:
    ours: dict[str, dict] = {}
    for model, bench, _ in scores:
        direct, cot = (scores.get((model, bench, s), {}).get("score") for s in SETTINGS)
        gap = None if None in (direct, cot) else cot - direct
        ours.setdefault(model, {})[bench] = {"Direct": direct, "CoT": cot, "difference": gap}
    return {"ours": ours, "paper": PAPER, "scores": list(scores.values())}
