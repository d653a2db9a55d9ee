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
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

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
    image_size: int = flag(384, "longer side of the page's pictures in pixels", low=1)
    max_tiles: int = flag(0, "tile limit where meta.json gives none, 0 = the model's", 0, 128)
    seed: int = flag(42, "decides which records are shown")


@dataclass(frozen=True)
class StatsConfig:
    """Numbers of a set of pairs beside the paper's table, as text, JSON and histograms."""

    FIRST = "meta"  # may stand without its flag
    meta: Path = flag(Path("pairs/meta.json"), "meta.json of the pairs")
    model_dir: Path | None = flag(None, "count tokens with its tokenizer; empty = words")
    out_dir: Path | None = flag(None, "for stats.json and stats.png; empty = beside meta.json")
    workers: int = flag(0, "processes, 0 = one a core; the output is the same", low=0)


VERBS = {"check": CheckConfig, "show": ShowConfig, "stats": StatsConfig}

if __name__ == "__main__":
    parse_command(VERBS)  # --help and wrong flags need no torch, which takes seconds

from PIL import ImageDraw

from config import load_config
from data import encode_tree, epoch_order, fit_tree, seeded
from images import is_flat, load_image
from records import DataSet, PairRecord, in_order, read_meta
from tokenizer import IMAGE, Tokenizer, load_tokenizer
from tools.figures import inline_image, new_figure, page, png, text_table

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
    bad, odd, lengths = [], [], []
    tiles, overlong = Counter(), Counter()

    def check_records(data_set: DataSet, numbers: range) -> tuple:
        bad, odd, trees, overlong = [], [], [], []
        for number in numbers:
            try:
                record = data_set[number]
                tree = encode_tree(record, tokenizer, config)
                odd += look_at_images(record)
            except InputError as error:
                bad.append(str(error))
                continue
            trees.append((sum(tree.tiles), tree.longest))
            if tree.longest > max_length:
                odd.append(f"{record.name}: {tree.longest} tokens, more than {max_length}")
                overlong += outcomes(record, tokenizer, config, max_length)
        return bad, odd, trees, overlong

    for data_set in sets:
        print(f"{data_set.name}: {len(data_set)} records, repeat_time {data_set.repeat_time}")
        work, numbers = partial(check_records, data_set), range(len(data_set))
        for lines, more_odd, trees, results in in_order(work, numbers, 100, cfg.workers, "checked"):
            bad += lines
            odd += more_odd
            tiles.update(count for count, _ in trees)
            lengths += (length for _, length in trees)
            overlong.update(results)
    print(text_table(("tiles a record", "records", ""), bars(dict(sorted(tiles.items())))))
    print(text_table(("tokens a record", "records", ""), bars(token_bins(lengths))))
    for line in [*(f"bad: {line}" for line in bad), *(f"look: {line}" for line in odd)]:
        print(line)
    if overlong:
        print(f"{overlong.pop('too long')} records are longer than {max_length} tokens; they would")
        print("\n".join(f"  {name}: {count}" for name, count in sorted(overlong.items())))
    total = sum(map(len, sets))
    print(f"{total} records: {total - len(bad)} can be read, {len(bad)} are bad")
    if bad:
        raise SystemExit(1)


def look_at_images(record: PairRecord) -> list[str]:
    """Decode the record's images; lines about those of one colour.  Errors name the record."""
    with named(record.name):
        flat = [path for path in record.images if is_flat(load_image(path))]
    return [f"{record.name}: image {path} is of one colour" for path in flat]


def outcomes(record: PairRecord, *fit: Any) -> list[str]:
    """What becomes of a too long record under each --overlong; fit: arguments of `fit_tree`."""
    results = ["too long"]
    for choice in ("drop", "cut", "fewer_tiles"):
        result = "be trained on" if fit_tree(record, *fit, choice) else "be dropped"
        results.append(f"--overlong {choice}: {result}")
    return results


def token_bins(lengths: list[int]) -> dict[str, int]:
    """Counts by powers of two: 1-64, 65-128, ..."""
    counts = Counter(max(64, 1 << (n - 1).bit_length()) for n in lengths)
    return {f"{top // 2 + 1 if top > 64 else 1}-{top}": counts[top] for top in sorted(counts)}


def bars(counts: dict) -> list[tuple]:
    """(name, count, bar) of each count."""
    widest = max(counts.values(), default=1)
    return [(name, n, "#" * max(1, 40 * n // widest)) for name, n in counts.items()]


# --------------------------------------------------------------------------- show


def print_records(cfg: ShowConfig) -> None:
    """Print records as the model meets them: prompt plain, scored tokens marked."""
    config, tokenizer = load_config(cfg.model_dir), load_tokenizer(cfg.model_dir)
    sets = read_meta(cfg.meta, cfg.max_tiles or config.max_tiles)
    for i, number in epoch_order(sets, cfg.seed, 0)[: cfg.limit or 3]:
        record = sets[i][int(number)]
        tree = encode_tree(record, tokenizer, config)
        print(f"=== {record.name}: {len(tree.trunk)} prompt tokens, {sum(tree.tiles)} tiles")
        print(mark("masked", readable(tokenizer, tree.trunk), "2"))
        for name, ids, colour in zip(PARTS[1:], tree.responses, ("32", "31")):
            print(mark(name, readable(tokenizer, ids), colour))
            print(f"         {len(ids)} scored tokens, the last is <|im_end|>")


def mark(name: str, text: str, colour: str) -> str:
    """Each line of `text` behind `name`; control characters of the data are spelled out."""
    lines = "\n".join(f"{name:>8} | {printable(line)}" for line in text.split("\n"))
    return f"\x1b[{colour}m{lines}\x1b[0m" if sys.stdout.isatty() else lines


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
body { max-width: none }  header { position: sticky; top: 0; background: #fff; padding: .5rem 0 }
article { display: grid; grid-template-columns: minmax(180px, 1fr) 2fr 2fr; gap: 1rem;
  margin: 1rem 0; padding: 1rem; border-radius: 6px; box-shadow: 0 1px 3px #0003 }
article[hidden] { display: none }  pre { font: 13px/1.5 ui-monospace, monospace; margin: .3rem 0 }
.chosen h3 { color: #1a7f37 }  .rejected h3 { color: #b42318 }  h3 { margin: 0 }
.chosen .apart { background: #dcf5e3 }  .rejected .apart { background: #fde3e0 }
.apart::before { content: "▼"; color: #888; font-size: .8em }
.meta { color: #666; font-size: .85em }
"""

FILTER = """
<script>
const choosers = document.querySelectorAll("select");
function filter() {
  let shown = 0;
  for (const card of document.querySelectorAll("article")) {
    card.hidden = [...choosers].some(c => c.value && card.dataset[c.id] !== c.value);
    shown += !card.hidden;
  }
  document.getElementById("count").textContent = shown + " shown";
}
choosers.forEach(c => c.onchange = filter);
filter();
</script>
"""


def write_page(cfg: ShowConfig) -> None:
    """One self-contained HTML page of pairs of every data set."""
    sets = [s for s in read_meta(cfg.meta, 1) if len(s)]
    if not sets:
        raise InputError(f"{cfg.meta}: no pairs")
    each = max(1, (cfg.limit or 200) // len(sets))
    cards = []
    for data_set in sets:
        drawn = seeded("show", cfg.seed, data_set.name).permutation(len(data_set))[:each]
        for number in sorted(drawn.tolist()):
            raw = data_set.lines[number]
            pictures = [picture(path, cfg.image_size, raw) for path in data_set[number].images]
            cards.append((data_set.name, raw, pictures))
    write_atomic(cfg.out, render_page(cards))
    print(f"wrote {cfg.out}: {len(cards)} of {sum(map(len, sets))} pairs")


def render_page(cards: list[tuple[str, dict, list[str]]]) -> str:
    """The whole page from (data set, record as in its file, pictures as <img>)."""
    title = f"{len(cards)} preference pairs"
    header = f'<header><b>{title}</b> <span id="count"></span>'
    header += chooser("set", "data sets", {name for name, _, _ in cards})
    header += chooser("kind", "kinds", {pair_kind(name, raw) for name, raw, _ in cards})
    body = "\n".join([f"{header}</header>", *(pair_card(*card) for card in cards)])
    return page(title, body + FILTER, STYLE)


def chooser(id: str, label: str, values: set[str]) -> str:
    options = "".join(f"<option>{html.escape(value)}</option>" for value in sorted(values))
    return f' <select id="{id}"><option value="">all {label}</option>{options}</select>'


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


def picture(path: Path, size: int, raw: dict) -> str:
    """A small JPEG of an image as <img>, with the boxes that the record's texts mark."""
    image = load_image(path)
    image.thumbnail((size, size))
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


SHARES = {
    "chosen longer share": "chosen longer than rejected",
    "cut-off share": "with a cut-off response",
}


@dataclass
class Group:
    """Lengths and counts of pairs of one kind, or of one data set."""

    lengths: dict[str, list[int]] = field(default_factory=lambda: {part: [] for part in PARTS})
    counts: Counter = field(default_factory=Counter)
    per_query: Counter = field(default_factory=Counter)
    kind: str = ""

    def add(self, record: PairRecord, raw: dict, lengths: dict[str, int]) -> None:
        for part in PARTS:
            self.lengths[part].append(lengths[part])
        metas = [raw.get(side) for side in ("chosen_meta", "rejected_meta")]
        cut = [isinstance(m, dict) and m.get("finish_reason") == "length" for m in metas]
        self.counts["pairs"] += 1
        self.counts["chosen longer than rejected"] += lengths["chosen"] > lengths["rejected"]
        self.counts["with a cut-off response"] += any(cut)
        self.counts["with several images"] += len(record.images) > 1
        self.counts["with a missing image"] += not all(path.is_file() for path in record.images)
        self.per_query[(record.images, raw["question"], str(raw.get("answer_gt")))] += 1

    def join(self, other: "Group") -> None:
        for part in PARTS:
            self.lengths[part] += other.lengths[part]
        self.counts.update(other.counts)
        self.per_query.update(other.per_query)
        self.kind = other.kind

    def summary(self) -> dict:
        table = {}
        for part in PARTS:
            values = self.lengths[part]
            table[part] = {"mean": round(fmean(values), 1), "min": min(values), "max": max(values)}
        histogram, pairs = Counter(self.per_query.values()), self.counts["pairs"]
        return table | {
            "counts": dict(sorted(self.counts.items())),
            **{share: round(self.counts[name] / pairs, 4) for share, name in SHARES.items()},
            "pairs_per_query": {str(k): histogram[k] for k in sorted(histogram)},
        }


def stats(cfg: StatsConfig) -> None:
    unit, count = "words", lambda text: len(text.split())
    if cfg.model_dir:
        encode = load_tokenizer(cfg.model_dir).encode_plain
        unit, count = "tokens", lambda text: len(encode(text))

    def measure(data_set: DataSet, numbers: range) -> tuple[dict[str, Group], dict[str, Group]]:
        kinds, sets = defaultdict(Group), defaultdict(Group)
        for number in numbers:
            record, raw = data_set[number], data_set.lines[number]
            lengths = {part: count(raw[part].replace(IMAGE, "").strip()) for part in PARTS}
            meta = raw.get("chosen_meta")
            version = meta.get("prompt_version") or "none" if isinstance(meta, dict) else "none"
            name = f"{data_set.name} / {version}"
            for group in (kinds[gold_kind(data_set.name, raw)], sets[name]):
                group.add(record, raw, lengths)
            sets[name].kind = pair_kind(data_set.name, raw)
        return kinds, sets

    kinds, sets = defaultdict(Group), defaultdict(Group)
    for data_set in read_meta(cfg.meta, 1):
        work, numbers = partial(measure, data_set), range(len(data_set))
        for parts in in_order(work, numbers, 1000, cfg.workers, data_set.name):
            for groups, more in zip((kinds, sets), parts):
                for name, group in more.items():
                    groups[name].join(group)
    if not kinds:
        raise InputError(f"{cfg.meta}: no pairs")
    out = cfg.out_dir or cfg.meta.parent
    summary = {
        "unit": unit,
        "kinds": {k: v.summary() for k, v in sorted(kinds.items())},
        "data sets": {k: v.summary() | {"kind": v.kind} for k, v in sorted(sets.items())},
    }
    write_atomic(out / "stats.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(stats_text(summary))
    write_atomic(out / "stats.png", plot_stats(kinds, unit))
    print(f"wrote {out / 'stats.json'} and {out / 'stats.png'}")


def stats_text(summary: dict) -> str:
    """Our numbers beside the paper's table, then shares and each data set."""
    lines = []
    for kind, ours in summary["kinds"].items():
        lines.append(f"{kind}: {ours['counts']['pairs']} pairs (paper: {PAPER_PAIRS[kind]})")
        paper = [" / ".join(f"{value:,}" for value in values) for values in PAPER_LENGTHS[kind]]
        rows = [(part, *ours[part].values(), cell) for part, cell in zip(PARTS, paper)]
        lines.append(text_table((summary["unit"], "mean", "min", "max", "paper"), rows))
        lines += [f"{share}: {ours[share]:.1%}" for share in SHARES]
        lines.append(f"pairs with a missing image: {ours['counts']['with a missing image']}")
        lines.append(f"pairs a question: {ours['pairs_per_query']}")
    counts = ("pairs", "with several images")
    rows = [
        (
            name,
            ours["kind"],
            *(ours["counts"][n] for n in counts),
            *(ours[p]["mean"] for p in PARTS),
        )
        for name, ours in summary["data sets"].items()
    ]
    header = ("data set / prompt version", "kind", "pairs", "several images", *PARTS)
    lines.append(text_table(header, rows))
    return "\n".join(lines)


def plot_stats(kinds: dict[str, Group], unit: str) -> bytes:
    """Histograms of lengths and of pairs a question, one row a kind; paper means dashed."""
    figure, axes = new_figure(len(kinds), len(PARTS) + 1, 4, 3.6, squeeze=False)
    for row, (kind, ours) in zip(axes, sorted(kinds.items())):
        for axis, part, (mean, *_) in zip(row, PARTS, PAPER_LENGTHS[kind]):
            values = sorted(ours.lengths[part])
            # a few long ones would hide the rest
            top = max(values[int(0.99 * (len(values) - 1))], 1.1 * mean)
            axis.hist([min(v, top) for v in values], bins=40, range=(0, top))
            axis.axvline(mean, color="k", ls="--", label="mean in the paper")
            axis.set(title=f"{kind}: {part}", xlabel=f"{unit} (the last bar: and more)")
        row[0].legend()
        per_query = Counter(ours.per_query.values())
        row[-1].bar(list(per_query), list(per_query.values()))
        row[-1].xaxis.get_major_locator().set_params(integer=True)
        row[-1].set(title=f"{kind}: pairs a question")
    return png(figure, dpi=80)


def main() -> None:
    verb, cfg = parse_command(VERBS)
    show = write_page if verb == "show" and cfg.out else print_records
    {"check": check, "show": show, "stats": stats}[verb](cfg)


if __name__ == "__main__":
    run(main)
