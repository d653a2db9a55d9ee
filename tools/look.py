"""Look at preference data before training on it.

    python tools/look.py check META --model_dir M      verify every record, decode every image
    python tools/look.py show META --model_dir M       prompts, and the tokens that are scored
    python tools/look.py show META --out pairs.html    a page of pairs beside their pictures
    python tools/look.py stats META --model_dir M      lengths and counts beside the paper's

META is the meta.json that train.py reads.  `check` ends with status 1 where a record is bad.
"""

import html
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import InputError, flag, named, parse_command, printable, run, write_atomic


@dataclass(frozen=True)
class CheckConfig:
    """Verify every record and decode every image; status 1 where one is bad."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("MMPR/meta.json"), "meta.json of the pairs")
    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder with config.json and tokenizer")
    max_tiles: int = flag(0, "tile limit where meta.json gives none, 0 = the model's", 0, 128)
    max_length: int = flag(6144, "tokens of prompt and response, at most", low=1)
    workers: int = flag(0, "processes, 0 = one a core; the output is the same", low=0)


@dataclass(frozen=True)
class ShowConfig:
    """Print records as the model meets them, or write a page of pairs beside their pictures."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("pairs/meta.json"), "meta.json of the pairs")
    model_dir: Path = flag(Path("weights/InternVL2-8B"), "config.json and tokenizer, for printing")
    out: Path | None = flag(None, "write this HTML page instead of printing")
    limit: int = flag(0, "records of all data sets; 0 = 3 printed, 200 on a page", low=0)
    max_tiles: int = flag(0, "tile limit where meta.json gives none, 0 = the model's", 0, 128)


@dataclass(frozen=True)
class StatsConfig:
    """Numbers of a set of pairs beside the paper's table, as text and JSON."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("pairs/meta.json"), "meta.json of the pairs")
    model_dir: Path | None = flag(None, "count tokens with its tokenizer; empty = words")
    out_dir: Path | None = flag(None, "for stats.json; empty = beside meta.json")
    workers: int = flag(0, "processes, 0 = one a core; the output is the same", low=0)


VERBS = {"check": CheckConfig, "show": ShowConfig, "stats": StatsConfig}

if __name__ == "__main__":
    parse_command(VERBS)  # --help and wrong flags need no torch, which takes seconds

import numpy as np
from PIL import ImageDraw

from config import load_config
from data import encode_tree, epoch_order, seeded
from images import is_flat, load_image
from records import DataSet, in_order, read_meta
from tokenizer import IMAGE, Tokenizer, load_tokenizer
from tools.figures import inline_image, page, text_table

PARTS = ("question", "chosen", "rejected")
# <box>[[x1, y1, x2, y2], ...]</box> in thousandths of the image's sides
BOX = re.compile(r"\[(\d{1,4}), ?(\d{1,4}), ?(\d{1,4}), ?(\d{1,4})\](?=[^<]*</box>)")


# --------------------------------------------------------------------------- check


def check(cfg: CheckConfig) -> None:
    """Verify all records; print tables of tiles and tokens, the bad records and the odd ones."""
    config, tokenizer = load_config(cfg.model_dir), load_tokenizer(cfg.model_dir)
    tokenizer.check_vocabulary(config.llm.vocab_size)
    max_length = min(cfg.max_length, config.llm.max_position_embeddings)
    sets = read_meta(cfg.meta, cfg.max_tiles or config.max_tiles)
    bad, odd, sizes = [], [], []

    def check_records(data_set: DataSet, numbers: range) -> tuple[list, list, list]:
        bad, odd, sizes = [], [], []
        for number in numbers:
            try:
                record = data_set[number]
                tree = encode_tree(record, tokenizer, config)
                with named(record.name):
                    flat = [path for path in record.images if is_flat(load_image(path))]
            except InputError as error:
                bad.append(f"bad: {error}")
                continue
            sizes.append((sum(tree.tiles), tree.longest))
            odd += [f"look: {record.name}: image {path} is of one colour" for path in flat]
            if tree.longest > max_length:
                odd.append(f"look: {record.name}: {tree.longest} tokens, more than {max_length}")
        return bad, odd, sizes

    for data_set in sets:
        print(f"{data_set.name}: {len(data_set)} records, repeat_time {data_set.repeat_time}")
        work, numbers = partial(check_records, data_set), range(len(data_set))
        for lines in in_order(work, numbers, 100, cfg.workers, "checked"):
            for all_lines, more in zip((bad, odd, sizes), lines):
                all_lines += more
    tiles = Counter(count for count, _ in sizes)
    tokens = Counter(max(64, 1 << (length - 1).bit_length()) for _, length in sizes)
    print(text_table(("tiles a record", "records"), sorted(tiles.items())))
    print(text_table(("tokens a record, at most", "records"), sorted(tokens.items())))
    print(*bad, *odd, sep="\n", end="\n" * bool(bad or odd))
    if overlong := sum(length > max_length for _, length in sizes):
        print(f"{overlong} records are longer than {max_length} tokens: see train.py --overlong")
    total = sum(map(len, sets))
    print(f"{total} records: {total - len(bad)} can be read, {len(bad)} are bad")
    if bad:
        raise SystemExit(1)


# --------------------------------------------------------------------------- show


def print_records(cfg: ShowConfig) -> None:
    """Print records as the model meets them: prompt plain, scored tokens marked."""
    config, tokenizer = load_config(cfg.model_dir), load_tokenizer(cfg.model_dir)
    sets = read_meta(cfg.meta, cfg.max_tiles or config.max_tiles)
    for i, number in epoch_order(sets, 42, 0)[: cfg.limit or 3]:
        record = sets[i][int(number)]
        tree = encode_tree(record, tokenizer, config)
        print(f"=== {record.name}: {len(tree.trunk)} prompt tokens, {sum(tree.tiles)} tiles")
        print(mark("masked", readable(tokenizer, tree.trunk)))
        for name, ids in zip(PARTS[1:], tree.responses):
            print(mark(name, readable(tokenizer, ids)))
            print(f"         {len(ids)} scored tokens, the last is <|im_end|>")


def mark(name: str, text: str) -> str:
    """Each line of `text` behind `name`; control characters of the data are spelled out."""
    return "\n".join(f"{name:>8} | {printable(line)}" for line in text.split("\n"))


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decoded with special tokens by name; a run of one of them is counted."""
    names = {id: name for name, id in tokenizer.special.items()}
    text = ""
    for name, group in groupby(ids, key=lambda id: names.get(id, "")):
        run = list(group)
        count = f" x {len(run)}" if len(run) > 1 else ""
        text += name + count if name else tokenizer.decode(run, marks=True)
    return text


STYLE = """
body { max-width: none }
article { display: grid; grid-template-columns: minmax(180px, 1fr) 2fr 2fr; gap: 1rem;
  margin: 1rem 0; padding: 1rem; border-radius: 6px; box-shadow: 0 1px 3px #0003 }
article[hidden] { display: none }  pre { font: 13px/1.5 ui-monospace, monospace; margin: .3rem 0 }
.chosen h3 { color: #1a7f37 }  .rejected h3 { color: #b42318 }  h3 { margin: 0 }
.chosen .apart { background: #dcf5e3 }  .rejected .apart { background: #fde3e0 }
.apart::before { content: "▼"; color: #888; font-size: .8em }
.meta { color: #666; font-size: .85em }
"""
# shows the pairs of one data set, or of one kind
FILTER = """<select onchange="for (const card of document.querySelectorAll('article'))
  card.hidden = this.value && ![card.dataset.set, card.dataset.kind].includes(this.value)">
<option value="">all pairs</option>"""


def write_page(cfg: ShowConfig) -> None:
    """One self-contained HTML page of pairs of every data set."""
    sets = [s for s in read_meta(cfg.meta, 1) if len(s)]
    if not sets:
        raise InputError(f"{cfg.meta}: no pairs")
    each = max(1, (cfg.limit or 200) // len(sets))
    cards = []
    for data_set in sets:
        drawn = seeded("show", data_set.name).permutation(len(data_set))[:each]
        for number in sorted(drawn.tolist()):
            raw = data_set.lines[number]
            pictures = [picture(path, raw) for path in data_set[number].images]
            cards.append((data_set.name, raw, pictures))
    write_atomic(cfg.out, render_page(cards))
    print(f"wrote {cfg.out}: {len(cards)} of {sum(map(len, sets))} pairs")


def render_page(cards: list[tuple[str, dict, list[str]]]) -> str:
    """The whole page from (data set, record as in its file, pictures as <img>)."""
    title = f"{len(cards)} preference pairs"
    choices = {choice for name, raw, _ in cards for choice in (name, pair_kind(name, raw))}
    options = "".join(f"<option>{html.escape(choice)}</option>" for choice in sorted(choices))
    body = "\n".join(pair_card(*card) for card in cards)
    return page(title, f"<b>{title}</b> {FILTER}{options}</select>\n{body}", STYLE)


def pair_card(name: str, raw: dict, pictures: list[str]) -> str:
    """One pair as HTML; everything from the data is escaped."""
    same = len(os.path.commonprefix([raw["chosen"], raw["rejected"]]))
    sides = []
    for side in PARTS[1:]:
        text, meta = raw[side], raw.get(f"{side}_meta")
        shown = ", ".join(f"{k}: {v}" for k, v in meta.items()) if isinstance(meta, dict) else ""
        sides.append(
            f'<section class="{side}"><h3>{side}</h3><pre>{html.escape(text[:same])}'
            f'<span class="apart">{html.escape(text[same:])}</span></pre>'
            f'<div class="meta">{html.escape(shown)}</div></section>'
        )
    gold = f"<p>gold: <b>{html.escape(str(raw['answer_gt']))}</b>" if "answer_gt" in raw else ""
    return (
        f'<article data-set="{html.escape(name)}" data-kind="{pair_kind(name, raw)}">'
        f"<section>{''.join(pictures)}<pre>{html.escape(raw['question'])}</pre>{gold}"
        f'<div class="meta">{html.escape(name)}</div></section>{"".join(sides)}</article>'
    )


# how pairs were made -> words in the names of such data sets, ours and those of MMPR v1.1 and v1.2
KINDS = {
    "correctness": "correctness",
    "format": "format",
    "direct": "direct_rules",
    "prefix_pair": r"prefix_pair|_sr\d",  # DropoutNTP, also as ..._sr0.5_wo_image
    "divide_and_conquer": "divide_and_conquer",
}


def pair_kind(name: str, raw: dict) -> str:
    """How a pair was made, by its data set's name, else whether it has a gold answer."""
    made = (kind for kind, words in KINDS.items() if re.search(words, name))
    return next(made, gold_kind(name, raw))


def gold_kind(name: str, raw: dict) -> str:
    """Whether the gold answer made the pair; a prefix pair may have one that it did not need."""
    prefix = re.search(KINDS["prefix_pair"], name)
    return "with gold" if "answer_gt" in raw and not prefix else "without gold"


def picture(path: Path, raw: dict) -> str:
    """A small JPEG of an image as <img>, with the boxes that the record's texts mark."""
    image = load_image(path)
    image.thumbnail((384, 384))
    pen = ImageDraw.Draw(image)
    for side, colour in (("rejected", "#b42318"), ("chosen", "#1a7f37"), ("question", "#0550ae")):
        for corners in BOX.findall(raw[side]):
            left, top, right, bottom = (int(corner) / 1000 for corner in corners)
            xs = sorted((left * image.width, right * image.width))
            ys = sorted((top * image.height, bottom * image.height))
            pen.rectangle([xs[0], ys[0], xs[1], ys[1]], outline=colour, width=2)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return inline_image(buffer.getvalue(), "jpeg")


# --------------------------------------------------------------------------- stats

# section 3 of arXiv 2411.10442: pairs, and mean (min, max) of lengths where it gives them
PAPER_PAIRS = {"without gold": "about 750K", "with gold": "about 2.5M"}
PAPER_LENGTHS = {
    "without gold": ((25.0,), (211.4, 20, 1342), (171.2, 17, 1642)),
    "with gold": ((79.5,), (300.0, 32, 2018), (350.5, 33, 4097)),
}
COUNTED = ("chosen longer", "with a cut-off response", "with several images", "missing an image")


def stats(cfg: StatsConfig) -> None:
    """Print and write numbers of the pairs, of each kind and of each data set."""
    unit, count = "words", lambda text: len(text.split())
    if cfg.model_dir:
        encode = load_tokenizer(cfg.model_dir).encode_plain
        unit, count = "tokens", lambda text: len(encode(text))

    def measure(data_set: DataSet, numbers: range) -> dict[tuple[str, str], np.ndarray]:
        """(gold kind, name) -> (pair column): three lengths, the question's hash, what is counted.

        A name is that of a data set, how its pairs were made, and the version of their prompt.
        """
        rows = defaultdict(list)
        for number in numbers:
            record, raw = data_set[number], data_set.lines[number]
            lengths = [count(raw[part].replace(IMAGE, "").strip()) for part in PARTS]
            metas = [raw.get(side) for side in ("chosen_meta", "rejected_meta")]
            metas = [meta if isinstance(meta, dict) else {} for meta in metas]
            question = repr((record.images, raw["question"], raw.get("answer_gt"))).encode()
            hashed = int.from_bytes(blake2b(question, digest_size=7).digest(), "big")
            cut = any(meta.get("finish_reason") == "length" for meta in metas)
            missing = not all(path.is_file() for path in record.images)
            counted = lengths[1] > lengths[2], cut, len(record.images) > 1, missing
            version, kind = metas[0].get("prompt_version") or "none", pair_kind(data_set.name, raw)
            name = f"{data_set.name} / {kind} / {version}"
            rows[gold_kind(data_set.name, raw), name].append((*lengths, hashed, *counted))
        return {key: np.array(values, dtype=np.int64) for key, values in rows.items()}

    kinds, sets = defaultdict(list), defaultdict(list)
    for data_set in read_meta(cfg.meta, 1):
        work, numbers = partial(measure, data_set), range(len(data_set))
        for measured in in_order(work, numbers, 1000, cfg.workers, data_set.name):
            for (kind, name), rows in measured.items():
                kinds[kind].append(rows)
                sets[name].append(rows)
    if not kinds:
        raise InputError(f"{cfg.meta}: no pairs")
    kinds, sets = (
        {name: np.concatenate(rows) for name, rows in sorted(groups.items())}
        for groups in (kinds, sets)
    )
    summary = {"unit": unit, "kinds": {kind: summarise(rows) for kind, rows in kinds.items()}}
    summary["data sets"] = {name: summarise(rows) for name, rows in sets.items()}
    out = cfg.out_dir or cfg.meta.parent
    write_atomic(out / "stats.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print_stats(summary)
    print(f"wrote {out / 'stats.json'}")


def summarise(rows: np.ndarray) -> dict:
    """Of rows of `measure`: pairs, lengths, shares, and how many questions have how many pairs."""
    table: dict = {"pairs": len(rows)}
    for part, column in zip(PARTS, rows.T):
        mean = round(float(column.mean()), 1)
        table[part] = {"mean": mean, "min": int(column.min()), "max": int(column.max())}
    for name, column in zip(COUNTED, rows.T[4:]):
        table[name] = int(column.sum())
    _, copies = np.unique(rows[:, 3], return_counts=True)
    return table | {"pairs a question": dict(sorted(Counter(copies.tolist()).items()))}


def print_stats(summary: dict) -> None:
    """Our numbers beside the paper's table, then each data set."""
    for kind, ours in summary["kinds"].items():
        print(f"{kind}: {ours['pairs']} pairs (paper: {PAPER_PAIRS[kind]})")
        paper = [" / ".join(f"{value:,}" for value in values) for values in PAPER_LENGTHS[kind]]
        rows = [(part, *ours[part].values(), cell) for part, cell in zip(PARTS, paper)]
        print(text_table((summary["unit"], "mean", "min", "max", "paper"), rows))
        for name in COUNTED:
            print(f"pairs {name}: {ours[name]} ({ours[name] / ours['pairs']:.1%})")
        print(f"pairs a question: {ours['pairs a question']}")
    rows = [
        (name, ours["pairs"], ours["with several images"], *(ours[part]["mean"] for part in PARTS))
        for name, ours in summary["data sets"].items()
    ]
    header = ("data set / kind / prompt version", "pairs", "several images", *PARTS)
    print(text_table(header, rows))


def main() -> None:
    verb, cfg = parse_command(VERBS)
    show = write_page if verb == "show" and cfg.out else print_records
    {"check": check, "show": show, "stats": stats}[verb](cfg)


if __name__ == "__main__":
    run(main)
