"""Every plot and every table: one way to make a PNG, one to print rows, one to write a page.

Imports no other file of this repository; matplotlib is imported when something is drawn.
"""

import base64
import html
import importlib
import io
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any


def new_figure(rows: int = 1, cols: int = 1, width: float = 6, height: float = 4, **options: Any):
    """(figure, axes) with panels of `width` x `height` inches; options: of Figure.subplots."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (a command that draws nothing needs none)

    figure = Figure(figsize=(cols * width, rows * height))
    return figure, figure.subplots(rows, cols, **options)


def png(figure: Any, dpi: int = 110) -> bytes:
    """The figure as a PNG file's bytes."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")  # legends outside, too
    return buffer.getvalue()


TEMPLATES = Path(__file__).parent / "templates"
Panels = dict[str, dict[str, tuple[list[dict], str]]]  # title -> label -> (rows of a run, metric)
PENS = tuple(product(("-", "--", ":", "-."), (f"C{number}" for number in range(10))))


def curve_panels(panels: Panels, cols: int, y_scale: str = "linear", dpi: int = 110) -> bytes:
    """PNG of the panels, `cols` beside each other; what has no number of its metric is left out.

    A label has one colour and dash in all panels and stands beside the end of its curve.  y_scale
    symlog: logarithmic outside -1 ... 1.
    """
    shown = defaultdict(dict)
    for title, curves in panels.items():
        for label, (rows, name) in curves.items():
            values = ((row["step"], row.get(name, math.nan)) for row in rows)
            if points := [(step, value) for step, value in values if math.isfinite(value)]:
                shown[title][label] = points
    labels = list(dict.fromkeys(label for curves in shown.values() for label in curves))
    pens = dict(zip(labels, cycle(PENS)))
    lines, height = max(1, -(-len(shown) // cols)), 3.2 if len(labels) < 10 else 5
    figure, axes = new_figure(lines, cols, width=5, height=height, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, curves) in zip(axes.flat, shown.items()):
        for label, points in curves.items():
            dash, colour = pens[label]
            marker = "o" if len(points) < 12 else ""
            axis.plot(*zip(*points), dash, color=colour, marker=marker, label=label)
        axis.set(title=title, xlabel="step")
        if y_scale == "symlog" and max(map(abs, axis.get_ylim())) > 10:
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        label_ends(axis)
    return png(figure, dpi)


def label_ends(axes: Any) -> None:
    """Curves' labels one above the other on the right, in the order of the ends they point to."""
    lines = sorted(axes.lines, key=lambda line: line.get_ydata()[-1])
    for number, line in enumerate(lines):
        place, pen = (1.06, (number + 0.5) / len(lines)), {"color": line.get_color()}
        pointer = {"arrowstyle": "-", "linestyle": line.get_linestyle(), "relpos": (0, 0.5)}
        axes.annotate(
            line.get_label(), line.get_xydata()[-1], place, textcoords="axes fraction",
            arrowprops=pointer | pen, fontsize=8, va="center", annotation_clip=False, **pen,
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


def render(template: Path, **values: Any) -> str:
    """A Jinja template filled in; values are escaped in HTML, but for the body of page.html."""
    import jinja2  # noqa: PLC0415  (comes with torch)

    files = jinja2.FileSystemLoader([template.parent, TEMPLATES])
    pages = jinja2.Environment(
        loader=files, autoescape=template.suffix == ".html", trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return pages.get_template(template.name).render(values)


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


def markdown_html(text: str, folder: Path = Path()) -> str:
    """HTML of Markdown whose blocks, between empty lines, are of one kind each; pictures inside.

    A heading, a table, a picture, a list (`- `), code (four blanks before each line), or words.
    """
    body = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        hashes = len(block) - len(block.lstrip("#"))
        if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            image = inline_image((folder / picture[2]).read_bytes(), alt=picture[1])
            body.append(f'<div class="wide">{image}</div>')
        elif block.startswith("|"):
            lines = [line for line in block.splitlines() if not line.startswith("| ---")]
            rows = [re.sub(r" ?(?<!\\)\| ?", "<td>", spans(line).rstrip(" |")) for line in lines]
            body.append("<table><tr>" + "<tr>".join(rows).replace("\\|", "|") + "</table>")
        elif block.startswith("    "):
            body.append(f"<pre>{html.escape(textwrap.dedent(block))}</pre>")
        elif block.startswith("- "):
            body.append("<ul>" + re.sub("(?m)^- ", "<li>", spans(block)) + "</ul>")
        else:
            tag = f"h{hashes}" if hashes else "p"
            body.append(f"<{tag}>{spans(block[hashes:].strip())}</{tag}>")
    return "\n".join(body)


def spans(text: str) -> str:
    """HTML of words with `code`, **bold** and [links](to)."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)
