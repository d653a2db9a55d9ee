"""Every plot and every table: one way to make a PNG, one to print rows, one to write a page.

Imports no other file of this repository; matplotlib is imported when something is drawn.
"""

import base64
import html
import importlib
import io
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def new_figure(rows: int = 1, cols: int = 1, width: float = 6, height: float = 4, **how: Any):
    """(figure, axes) with panels of `width` x `height` inches; how: matplotlib.pyplot.subplots'."""
    import matplotlib  # noqa: PLC0415  (a command that draws nothing does not need it)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt.subplots(rows, cols, figsize=(cols * width, rows * height), **how)


def png(figure: Any, dpi: int = 110) -> bytes:
    """The figure as a PNG file's bytes; the figure is closed."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")  # legends outside, too
    plt.close(figure)
    return buffer.getvalue()


def grouped_bars(axes: Any, names: Sequence[str], series: dict[str, tuple]) -> None:
    """Bars from 0, one of each series beside the other for every name, their values at the foot.

    series: label -> (values, half widths of their error bars or None); a value None has no bar.
    """
    width = 0.84 / len(series)
    for k, (label, (values, errors)) in enumerate(series.items()):
        known = [i for i, value in enumerate(values) if value is not None]
        places = [i + (k - (len(series) - 1) / 2) * width for i in known]
        error = [errors[i] or 0 for i in known] if errors else None
        axes.bar(places, [values[i] for i in known], width, yerr=error, label=label)
        for i, place in zip(known, places):  # at the foot no error bar runs through the number
            axes.text(place, 0, f" {values[i]:.0f}", ha="center", va="bottom", rotation=90)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series))


def curve_panels(
    panels: dict[str, dict[str, list[dict]]],
    cols: int,
    x_label: str = "",
    y_label: str = "",
    y_scale: str = "linear",  # symlog: logarithmic outside -1 ... 1
) -> Any:
    """One panel a title: for each label its runs (x -> y), each thin, and their mean, thick.

    A label has one colour and dash in all panels and stands at the right end of its curve.
    """
    shown = [(label, runs) for curves in panels.values() for label, runs in curves.items()]
    labels = list(dict.fromkeys(label for label, runs in shown if runs))
    pens = {}
    for number, label in enumerate(labels):
        dashes = ("-", "--", ":", "-.")[number // 10 % 4]
        pens[label] = {"color": f"C{number % 10}", "linestyle": dashes}
    rows = -(-len(panels) // cols)
    height = 3.2 if len(labels) < 10 else 5
    figure, axes = new_figure(rows, cols, width=5, height=height, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for label, runs in curves.items():
            for run in runs if len(runs) > 1 else ():
                axis.plot(*zip(*run.items()), **pens[label], alpha=0.25, linewidth=0.7)
            # only what every run has: the mean does not jump where one ends
            shared = [x for x in runs[0] if all(x in run for run in runs)] if runs else []
            if shared:
                mean = [sum(run[x] for run in runs) / len(runs) for x in shared]
                marker = "o" if len(shared) < 12 else ""
                axis.plot(shared, mean, **pens[label], linewidth=1.6, marker=marker, label=label)
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        if y_scale == "symlog" and max(map(abs, axis.get_ylim())) > 10:
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        label_ends(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    keys = [axes.flat[0].plot([], [], **pen)[0] for pen in pens.values()]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": min(9, len(labels))}
    figure.legend(keys, labels, **place)
    return figure


def label_ends(axes: Any) -> None:
    """Write every curve's label beside its right end, in its colour, none on top of another."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    if not lines:
        return
    axes.autoscale_view()  # else the limits are not those of the picture yet
    inches = axes.get_position().height * axes.figure.get_size_inches()[1]
    to_axes = axes.transData - axes.transAxes
    ends = [(to_axes.transform(line.get_xydata()[-1])[1], line) for line in lines]
    gap, top = 0.13 / inches, -float("inf")  # shares of the axis; the gap is a line of text
    heights = {}
    for height, line in sorted(ends, key=lambda end: end[0]):
        heights[line] = top = max(height, top + gap)
    for line, height in heights.items():
        place = (1.03, height - max(0.0, top - 1))  # a stack that would leave the axis begins lower
        colour, text = line.get_color(), line.get_label()
        pointer = {"arrowstyle": "-", "color": colour, "linewidth": 0.5}
        axes.annotate(
            text, line.get_xydata()[-1], place, textcoords="axes fraction", arrowprops=pointer,
            color=colour, fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars inside cells are escaped, line breaks are blanks."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere }
img { max-width: 100% }  table { border-collapse: collapse; display: block; overflow-x: auto }
img { min-width: 9rem; image-rendering: pixelated }
td, th { border-bottom: 1px solid #ccc; padding: .2rem .6rem; text-align: left }
pre { white-space: pre-wrap }"""
# of pages with drawings: on a phone one scrolls them and the code sideways, and they stay readable
WIDE = """ .wide { overflow-x: auto } .wide img { min-width: 44rem; image-rendering: auto }
pre { white-space: pre; overflow-x: auto; background: #f4f4f4; padding: .5rem; font-size: .85rem }
pre b { white-space: pre-wrap }  code { background: #f4f4f4 }
td, th { overflow-wrap: normal; vertical-align: top; font-size: .9rem; padding: .2rem .4rem }"""


def page(title: str, body: str, style: str = "") -> str:
    """One self-contained HTML page; `body` is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n{body}\n</html>\n"
    )


def inline_image(data: bytes, kind: str = "png", alt: str = "") -> str:
    """An <img> that carries its bytes."""
    text = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{text}">'


SHOWN = "\x1f"  # before a line of HTML on stdout: see `show`


def show(content: bytes | str) -> None:
    """A PNG or one line of HTML: displayed in a notebook; else printed, for tools/lecture.py."""
    text = inline_image(content) if isinstance(content, bytes) else content
    if "ipykernel" in sys.modules:
        display = importlib.import_module("IPython.display")
        display.display(display.HTML(text))
    else:
        print(SHOWN + text)


def markdown_page(text: str, folder: Path) -> str:
    """One self-contained HTML page of a Markdown text, with the pictures of `folder` inside."""
    title = text.partition("\n")[0].lstrip("# ")
    return page(title, markdown_html(text, folder), WIDE)


def markdown_html(text: str, folder: Path = Path()) -> str:
    """HTML of Markdown whose blocks, between empty lines, are of one kind each.

    A heading, a table, a picture, a list (`- `), code (four blanks before each line), or words.
    """
    body = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        hashes, words = re.fullmatch(r"(#*)(.*)", block, re.DOTALL).groups()
        if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            image = inline_image((folder / picture[2]).read_bytes(), alt=picture[1])
            body.append(f'<div class="wide">{image}</div>')
        elif block.startswith("|"):
            header, _, *rows = [table_cells(line) for line in block.splitlines()]
            cells = [f"<th>{'<th>'.join(header)}", *(f"<td>{'<td>'.join(row)}" for row in rows)]
            body.append(f"<table><tr>{'<tr>'.join(cells)}</table>")
        elif block.startswith("    "):
            body.append(f"<pre>{html.escape(textwrap.dedent(block))}</pre>")
        elif block.startswith("- "):
            points = [spans(point) for point in re.split(r"(?:^|\n)- ", block)[1:]]
            body.append(f"<ul><li>{'<li>'.join(points)}</ul>")
        else:
            tag = f"h{len(hashes)}" if hashes else "p"
            body.append(f"<{tag}>{spans(words.strip())}</{tag}>")
    return "\n".join(body)


def table_cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table, as HTML."""
    return [spans(c.strip().replace("\\|", "|")) for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def spans(text: str) -> str:
    """HTML of words with `code`, **bold** and [links](to)."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)
