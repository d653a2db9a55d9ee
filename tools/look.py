"""Look at preference data before training on it.

    python tools/look.py check META --model_dir M      verify every record, decode every image
    python tools/look.py show META --model_dir M       prompts, and the tokens that are scored
    python tools/look.py show META --out pairs.html    a page of pairs beside their pictures
    python tools/look.py stats META --model_dir M      lengths and counts beside the paper's

META is the meta.json that train.py reads.  `check` ends with status 1 where a record is bad.
"""

import io
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import InputError, flag, named, parse_command, printable, run, write_atomic


@dataclass(frozen=True)
class CheckConfig:
    """Verify every record and decode every image; status 1 where one is bad."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("MMPR/meta.json"), "meta.json of the pairs (may stand first)")
    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder with config.json and tokenizer")
    max_tiles: int = flag(0, "tile limit where meta.json gives none, 0 = the model's", 0, 128)
    max_length: int | None = flag(None, "tokens of prompt + response; default: the generation's", 1)
    workers: int = flag(0, "processes, 0 = one a core; the output is the same", low=0)


@dataclass(frozen=True)
class ShowConfig:
    """Print records as the model meets them, or write a page of pairs beside their pictures."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("pairs/meta.json"), "meta.json of the pairs (may stand first)")
    model_dir: Path = flag(Path("weights/InternVL2-8B"), "config.json and tokenizer, for printing")
    out: Path | None = flag(None, "write this HTML page instead of printing")
    limit: int = flag(0, "records of all data sets; 0 = 3 printed, 200 on a page", low=0)
    max_tiles: int = flag(0, "tile limit where meta.json gives none, 0 = the model's", 0, 128)


@dataclass(frozen=True)
class StatsConfig:
    """Numbers of a set of pairs beside the paper's table."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("pairs/meta.json"), "meta.json of the pairs (may stand first)")
    model_dir: Path | None = flag(None, "count tokens with its tokenizer; empty = words")
    workers: int = flag(0, "processes, 0 = one a core; the output is the same", low=0)


VERBS = {"check": CheckConfig, "show": ShowConfig, "stats": StatsConfig}

if __name__ == "__main__":
    parse_command(VERBS)  # --help and wrong flags need no torch, which takes seconds

from PIL import ImageDraw

from config import load_config, recipe
from data import encode_tree, epoch_order, seeded
from images import load_image
from records import DataSet, in_order, read_meta
from tokenizer import IMAGE, Tokenizer, load_tokenizer
from tools.figures import TEMPLATES, inline_image, render, text_table

PARTS = ("question", "chosen", "rejected")
SIDES = PARTS[1:]


def read_pairs(meta: Path, max_tiles: int) -> list[DataSet]:
    """The data sets of META; InputError where none has a record."""
    sets = read_meta(meta, max_tiles)
    if not any(map(len, sets)):
        raise InputError(f"{meta}: no pairs")
    return sets


def each_record(sets: list[DataSet], workers: int, inspect: Callable) -> Iterator[Any]:
    """inspect(data set, number) of every record, in order, computed on `workers` processes."""
    for data_set in sets:
        some = lambda numbers, s=data_set: [inspect(s, number) for number in numbers]  # noqa: E731
        numbers = range(len(data_set))
        yield from chain.from_iterable(in_order(some, numbers, 100, workers, data_set.name))


def check(cfg: CheckConfig) -> None:
    """Verify all records; print tables of tiles and tokens, the bad records and the odd ones."""
    config, tokenizer = load_config(cfg.model_dir), load_tokenizer(cfg.model_dir)
    tokenizer.check_vocabulary(config.llm.vocab_size)
    asked = cfg.max_length or recipe(config).max_length
    max_length, pack = min(asked, config.llm.max_position_embeddings), max(8192, asked)
    sets = read_pairs(cfg.meta, cfg.max_tiles or config.max_tiles)

    def inspect(data_set: DataSet, number: int) -> tuple[list[str], tuple[int, int, bool] | None]:
        """(lines about the record; unless it is bad its tiles, tokens, whether it is too long)."""
        try:
            record = data_set[number]
            tree = encode_tree(record, tokenizer, config)
            with named(record.name):
                flat = [path for path in record.images if load_image(path).getcolors(1)]
        except InputError as error:
            return [f"bad: {error}"], None
        odd = [f"look: {record.name}: image {path} is of one colour" for path in flat]
        too_long = [
            f"look: {record.name}: {tokens} tokens, more than {limit}"
            for tokens, limit in ((tree.longest, max_length), (tree.size, pack))
            if tokens > limit
        ]
        return odd + too_long, (sum(tree.tiles), tree.longest, bool(too_long))

    for data_set in sets:
        print(f"{data_set.name}: {len(data_set)} records, repeat_time {data_set.repeat_time}")
    remarks, tiles, tokens, overlong = [], Counter(), Counter(), 0
    for lines, size in each_record(sets, cfg.workers, inspect):
        remarks += lines
        if size:
            tiles[size[0]] += 1
            tokens[max(64, 1 << (size[1] - 1).bit_length())] += 1
            overlong += size[2]
    print(text_table(("tiles a record", "records"), sorted(tiles.items())))
    print(text_table(("tokens a record, at most", "records"), sorted(tokens.items())))
    for remark in remarks:
        print(printable(remark))
    if overlong:
        limits = f"{max_length} tokens, or with both answers than {pack}"
        print(f"{overlong} records are longer than {limits}: see train.py --overlong")
    total, good = sum(map(len, sets)), tiles.total()
    print(f"{total} records: {good} can be read, {total - good} are bad")
    if good < total:
        raise SystemExit(1)


def print_records(cfg: ShowConfig) -> None:
    """Print records as the model meets them: prompt plain, scored tokens marked."""
    config, tokenizer = load_config(cfg.model_dir), load_tokenizer(cfg.model_dir)
    sets = read_pairs(cfg.meta, cfg.max_tiles or config.max_tiles)
    once = [replace(data_set, repeat_time=1) for data_set in sets]  # also what no run would draw
    for i, number in epoch_order(once, 42, 0)[: cfg.limit or 3]:
        record = sets[i][int(number)]
        tree = encode_tree(record, tokenizer, config)
        print(f"=== {record.name}: {len(tree.trunk)} prompt tokens, {sum(tree.tiles)} tiles")
        print(mark("masked", readable(tokenizer, tree.trunk)))
        for side, ids in zip(SIDES, tree.responses):
            print(mark(side, readable(tokenizer, ids)))
            end = "the last is <|im_end|>" if ids[-1] == tokenizer.im_end_id else "it never ended"
            print(f"         {len(ids)} scored tokens, {end}")


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


# <box>[[x1, y1, x2, y2], ...]</box> in thousandths of the image's sides
BOX = re.compile(r"\[(\d{1,4}), ?(\d{1,4}), ?(\d{1,4}), ?(\d{1,4})\](?=[^<]*</box>)")
PENS = {"rejected": "#b42318", "chosen": "#1a7f37", "question": "#0550ae"}  # colours of boxes
# how pairs were made -> words in the names of such data sets, ours and those of MMPR v1.1 and v1.2
KINDS = {"prefix_pair": r"prefix_pair|_sr\d"}  # DropoutNTP, also as ..._sr0.5_wo_image
KINDS |= {"correctness": "correctness", "format": "format", "direct": "direct_rules"}
KINDS |= {"divide_and_conquer": "divide_and_conquer"}


def write_page(cfg: ShowConfig) -> None:
    """One self-contained HTML page of pairs of every data set."""
    sets, limit, cards = [s for s in read_pairs(cfg.meta, 1) if len(s)], cfg.limit or 200, []
    each = max(1, limit // len(sets))
    for data_set in sets[:limit]:
        drawn = seeded("show", data_set.name).permutation(len(data_set))[:each]
        for number in sorted(drawn.tolist()):
            record, raw = data_set[number], data_set.lines[number].record()
            with named(record.name):
                pictures = [picture(path, raw) for path in record.images]
            cards.append({
                "set": data_set.name,
                "kind": kinds_of(data_set.name, raw)[1],
                "record": raw,
                "same": len(os.path.commonprefix([raw[side] for side in SIDES])),  # from there
                "pictures": pictures,
                "about": {side: meta_of(raw, side) for side in SIDES},
            })  # fmt: skip
    choices = sorted({card[name] for card in cards for name in ("set", "kind")})
    title = f"{len(cards)} preference pairs"
    text = render(TEMPLATES / "pairs.html", title=title, cards=cards, choices=choices)
    write_atomic(cfg.out, text)
    print(f"wrote {cfg.out}: {len(cards)} of {sum(map(len, sets))} pairs")


def meta_of(raw: dict, side: str) -> dict:
    """What the maker of a pair says about one of its responses."""
    meta = raw.get(f"{side}_meta")
    return meta if isinstance(meta, dict) else {}


def kinds_of(name: str, raw: dict) -> tuple[str, str]:
    """(whether a gold answer made the pair, how it was made by its set's name, else the former)."""
    kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), "")
    # a prefix pair may have one and not need it
    gold = raw.get("answer_gt") is not None and kind != "prefix_pair"
    made = "with gold" if gold else "without gold"
    return made, kind or made


def picture(path: Path, raw: dict) -> str:
    """A small JPEG of an image as <img>, with the boxes that the record's texts mark."""
    image = load_image(path)
    image.thumbnail((384, 384))
    pen = ImageDraw.Draw(image)
    for part, colour in PENS.items():
        for corners in BOX.findall(raw[part]):
            xs = sorted(int(x) * image.width / 1000 for x in corners[::2])
            ys = sorted(int(y) * image.height / 1000 for y in corners[1::2])
            pen.rectangle([*zip(xs, ys)], outline=colour, width=2)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return inline_image(buffer.getvalue(), "jpeg")


# section 3 of arXiv 2411.10442, which gives pairs and lengths
PAPER = {
    "without gold": ("about 750K", "25.0", "211.4 (20 to 1342)", "171.2 (17 to 1642)"),
    "with gold": ("about 2.5M", "79.5", "300.0 (32 to 2018)", "350.5 (33 to 4097)"),
}
COUNTED = ("chosen longer", "cut off", "several images", "missing an image")


def stats(cfg: StatsConfig) -> None:
    """Print numbers of the pairs, with and without gold answer beside the paper's, and by set."""
    unit = "tokens" if cfg.model_dir else "words"
    split = load_tokenizer(cfg.model_dir).encode_plain if cfg.model_dir else str.split

    def measure(data_set: DataSet, number: int) -> tuple[str, str, tuple, int]:
        """(gold kind, data set / kind / version of its prompt, a value a column, question)"""
        record, raw = data_set[number], data_set.lines[number].record()
        lengths = [len(split(raw[part].replace(IMAGE, "").strip())) for part in PARTS]
        metas = [meta_of(raw, side) for side in SIDES]
        cut = record.cut_off or any(meta.get("finish_reason") == "length" for meta in metas)
        missing = not all(path.is_file() for path in record.images)
        key = hash(repr((record.images, raw["question"], raw.get("answer_gt"))))
        gold, kind = kinds_of(data_set.name, raw)
        version = metas[0].get("prompt_version") or "none"
        values = *lengths, lengths[1] > lengths[2], cut, len(record.images) > 1, missing
        return gold, f"{data_set.name} / {kind} / {version}", values, key

    # of each group how often a column has each value: as much for millions of pairs as for few
    groups = defaultdict(lambda: [Counter() for _ in PARTS + COUNTED])
    questions = defaultdict(Counter)  # gold kind -> question -> its pairs
    for gold, name, values, key in each_record(read_pairs(cfg.meta, 1), cfg.workers, measure):
        questions[gold][key] += 1
        for column, value in zip(groups[gold] + groups[name], values * 2):
            column[value] += 1
    rows = []
    for name in sorted(groups, key=lambda name: (name not in PAPER, name)):
        lengths, flags = groups[name][: len(PARTS)], groups[name][len(PARTS) :]
        total = lengths[0].total()
        row = [f"{fmean(n, n.values()):.1f} ({min(n)} to {max(n)})" for n in lengths]
        row += [f"{n[True]} ({n[True] / total:.1%})" for n in flags]
        rows.append([name, total, *row])
        if name in PAPER:
            rows.append([f"  in the paper {name}", *PAPER[name], *"----"])
            histogram = dict(sorted(Counter(questions[name].values()).items()))
            print(f"{name}: pairs a question {histogram}")
    print(text_table((f"lengths in {unit}", "pairs", *PARTS, *COUNTED), rows))


def main() -> None:
    verb, cfg = parse_command(VERBS)
    show = write_page if verb == "show" and cfg.out else print_records
    {"check": check, "show": show, "stats": stats}[verb](cfg)


if __name__ == "__main__":
    run(main)
