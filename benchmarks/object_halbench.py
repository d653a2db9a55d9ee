"""Object HalBench: objects named that are not there.

CHAIR's word matching (LisaAnne/Hallucination, utils/chair.py), or the paper's way, in which a judge
lists the objects (RLHF-V and RLAIF-V).
"""

import contextlib
import functools
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Item, Judge, Reading, Readings, Reply, proportion
from benchmarks.files import near
from benchmarks.quantities import table
from runtime import InputError, named, read_json

_ENDINGS = table("plurals.txt")


def item(row: Item) -> None:
    """Objects that are there: `gt_objects`, else COCO 2014's annotation files in the folder."""
    row["synonyms"] = row["_file"].parent / "synonyms.txt"
    if row.get("gt_objects") is None:
        folder, image = row["_file"].parent, int(row["image_id"])
        for key, kind in (("gt_objects", "instances"), ("gt_captions", "captions")):
            if image not in (truth := coco_truth(folder, kind)):
                raise InputError(f"no {key!r}; {kind}_*2014.json in {folder} lack image {image}")
            row[key] = sorted(truth[image])
    row["question"] = row.get("question") or "Please describe this image in detail."


@functools.cache
def coco_truth(folder: Path, kind: str) -> dict[int, set[str]]:
    """image id -> classes of instances_*2014.json or texts of captions_*2014.json, or none."""
    truth: dict[int, set[str]] = {}
    for path in near(folder, f"{kind}_*2014.json"):
        content = read_json(path)
        truth |= {image["id"]: set() for image in content.get("images", ())}
        names = {c["id"]: c["name"] for c in content.get("categories", ())}
        for a in content["annotations"]:
            truth.setdefault(a["image_id"], set()).add(a.get("caption") or names[a["category_id"]])
    return truth


@functools.cache
def read_synonyms(path: Path) -> tuple[dict[str, str], frozenset[str]]:
    """(word or double word -> COCO class, all single words) of CHAIR's synonyms.txt."""
    if not path.is_file():
        raise InputError(f"no synonym list {path}: pass --synonyms (CHAIR's data/synonyms.txt)")
    classes: dict[str, str] = {}
    with named(path):
        for line in path.read_text("utf-8-sig").splitlines():
            words = [word.strip() for word in line.split(",") if word.strip()]
            classes |= dict.fromkeys(words, words[0])
    if len(set(classes.values())) < 2:
        raise InputError(f"{path}: expected one COCO class a line, `class, synonym, synonym`")
    classes |= {f"{a} {b}": classes.get(name, "") for a, b, name in table("doubles.txt")}
    return classes, frozenset(word for name in classes for word in name.split())


def singular(word: str, known: frozenset[str]) -> str:
    """The first way to take a plural off that gives a listed word."""
    forms = [word, word.removesuffix("s")]
    forms += [word.removesuffix(p) + s for p, s in _ENDINGS if word.endswith(p)]
    return next((form for form in forms if form in known), word)


def named_objects(caption: str, synonyms: Path, once: bool = False) -> list[str]:
    """The COCO classes that a caption mentions, in order: of every mention, or `once` a word."""
    classes, known = read_synonyms(synonyms)
    words = re.findall(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]", caption.lower())
    words = [singular(word, known) for word in words]
    mentions, i = [], 0
    while i < len(words):
        size = next(n for n in (3, 2, 1) if n == 1 or " ".join(words[i : i + n]) in classes)
        mentions.append(" ".join(words[i : i + size]))
        i += size
    if any(classes.get(m) == "toilet" for m in mentions):  # the seat of a toilet is no chair
        mentions = [m for m in mentions if m != "seat"]
    return [classes[m] for m in (dict.fromkeys(mentions) if once else mentions) if classes.get(m)]


def listed_names(judgement: Any) -> list | None:
    """A judge's list of objects, or the first JSON list in its reply; None if there is none."""
    if isinstance(judgement, list):
        return judgement
    for match in re.finditer(r"\[[^\[\]]*\]", str(judgement)):
        with contextlib.suppress(ValueError):
            return json.loads(match[0])
    return None


def read(item: Item, reply: Reply, mode: str) -> Reading:
    """Classes mentioned, and which of them are not in the image (or its reference captions)."""
    synonyms, judged = Path(item["synonyms"]), mode == "chair-llm"
    names = listed_names(reply.judgement) if judged else [reply.text]
    # RLAIF-V's eval_gpt_obj_halbench.py: a word counts once, "man" and "woman" are two
    objects = named_objects(", ".join(map(str, names or [])), synonyms, once=judged)
    classes = read_synonyms(synonyms)[0]
    if unknown := [name for name in item["gt_objects"] if name not in classes]:
        raise InputError(f"{item['id']}: gt_objects {unknown[:3]} are not in {synonyms}")
    truth = {classes[name] for name in item["gt_objects"]}
    truth |= {c for text in item.get("gt_captions") or () for c in named_objects(text, synonyms)}
    invented = [name for name in objects if name not in truth]
    return Reading({"objects": objects, "hallucinated": invented}, not invented, names is not None)


def chair(readings: Readings) -> dict:
    """CHAIR x100, lower is better; the response level divides by replies that name an object."""
    mentions = sum(len(r.prediction["objects"]) for _, r in readings)
    invented = sum(len(r.prediction["hallucinated"]) for _, r in readings)
    bad = sum(not r.correct for _, r in readings)
    naming = sum(r.prediction["objects"] != [] for _, r in readings)
    response = proportion(bad, naming)
    return {"score": response["score"], "standard_error": response["standard_error"],
            "n": len(readings), "response_level": response["score"],
            "mention_level": 100 * invented / max(mentions, 1), "CHAIRs": bad / len(readings),
            "replies_with_objects": naming, "hallucinated_replies": bad,
            "mentions": mentions, "hallucinated_mentions": invented}  # fmt: skip


def messages(item: Item, reply: Reply, template: str) -> list[dict]:
    text = template.replace("{question}", item["question"]).replace("{answer}", reply.text)
    return [{"role": "system", "content": text}]


BENCHMARK = Benchmark(
    name="object_halbench", files=("*halbench*.jsonl", "captions*.jsonl"),
    fields={"image_id": int | str, "question": str | None, "gt_objects": list[str] | None,
            "gt_captions": list[str] | None},
    item=item, new_tokens=1024, cot_tokens=0, read=read, modes=("chair-rule", "chair-llm"),
    judge=Judge(messages, max_tokens=512, mode="chair-llm"),
    metric="replies with an object that is not there (lower is better)", n_expected=300,
    split="COCO 2014", summary=chair,
    notes=lambda items, mode, cot: ["chair-rule is not the paper's way"] * (mode == "chair-rule"),
)  # fmt: skip
