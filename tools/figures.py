"""Every plot and every table: one way to make a PNG, one to print rows, one to write a page.

Imports no other file of this repository, so that anyone may import it.  matplotlib is imported
when something is drawn.
"""

import base64
import html
import io
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
    """Bars from 0, one of each series beside the other for every name, their values on top.

    series: label -> (values, half widths of their error bars or None); a value None has no bar.
    """
    width = 0.84 / len(series)
    for k, (label, (values, errors)) in enumerate(series.items()):
        known = [i for i, value in enumerate(values) if value is not None]
        places = [i + (k - (len(series) - 1) / 2) * width for i in known]
        error = [errors[i] or 0 for i in known] if errors else None
        bars = axes.bar(places, [values[i] for i in known], width, yerr=error, label=label)
        texts = [f"{values[i]:.0f}" for i in known]
        axes.bar_label(bars, texts, label_type="center", fontsize=7, rotation=90)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series))


def curve_panels(
    panels: dict[str, dict[str, list[dict]]], cols: int, x_label: str = "", y_label: str = ""
) -> Any:
    """One panel a title: for each label its runs (x -> y), each thin, and their mean, thick.

    A label has one colour in all panels and stands at the right end of its curve.
    """
    shown = [(label, runs) for curves in panels.values() for label, runs in curves.items()]
    labels = list(dict.fromkeys(label for label, runs in shown if runs))
    rows = -(-len(panels) // cols)
    figure, axes = new_figure(rows, cols, width=5, height=3.2, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for label, runs in curves.items():
            colour = f"C{labels.index(label)}" if runs else ""
            for run in runs if len(runs) > 1 else ():
                axis.plot(*zip(*run.items()), color=colour, alpha=0.25, linewidth=0.7)
            # only what every run has: the mean does not jump where one ends
            shared = [x for x in runs[0] if all(x in run for run in runs)] if runs else []
            if shared:
                mean = [sum(run[x] for run in runs) / len(runs) for x in shared]
                marker = "o" if len(shared) < 12 else ""
                axis.plot(shared, mean, color=colour, linewidth=1.6, marker=marker, label=label)
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
        label_ends(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    keys = [axes.flat[0].plot([], [], color=f"C{k}")[0] for k in range(len(labels))]
    figure.legend(keys, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(labels))
    return figure


def label_ends(axes: Any) -> None:
    """Write every curve's label at its right end, in its colour; no two on top of each other."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    low, high = axes.get_ylim()
    place = -float("inf")
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        place = max(line.get_ydata()[-1], place + 0.05 * (high - low))
        end = (line.get_xdata()[-1], place)
        colour, text = line.get_color(), line.get_label()
        offset = {"xytext": (4, 0), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, end, color=colour, fontsize=8, va="center", **offset)


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


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"<th>{'<th>'.join(html.escape(str(cell)) for cell in header)}"]
    lines += [f"<td>{'<td>'.join(html.escape(str(cell)) for cell in row)}" for row in rows]
    return f"<table><tr>{'<tr>'.join(lines)}</table>"


# a paragraph or heading ("## ..."), a table (header, rows), or a PNG in the document's folder
Block = str | tuple[Sequence[str], Iterable[Sequence[Any]]] | Path


def document(title: str, blocks: Sequence[Block], folder: Path) -> tuple[str, str]:
    """The same content as Markdown, with links to its pictures, and as one HTML page with them."""
    markdown, body = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        if isinstance(block, Path):
            markdown.append(f"![{block.stem}]({block})")
            body.append(inline_image((folder / block).read_bytes(), alt=block.stem))
        elif isinstance(block, tuple):
            header, rows = block[0], list(block[1])
            markdown.append(markdown_table(header, rows))
            body.append(html_table(header, rows))
        else:
            markdown.append(block)
            level = len(block) - len(block.lstrip("#"))
            tag = f"h{level}" if level else "p"
            body.append(f"<{tag}>{html.escape(block[level:].strip())}</{tag}>")
    return "\n\n".join(markdown) + "\n", page(title, "\n".join(body))
