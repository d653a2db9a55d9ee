"""Every plot and every table: one way to make a PNG, one to print rows, one to write a page.

Imports no other file of this repository, so that anyone may import it.  matplotlib is imported
when something is drawn.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
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
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(header), ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere }
img { max-width: 100% }  table { border-collapse: collapse; display: block; overflow-x: auto }
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
