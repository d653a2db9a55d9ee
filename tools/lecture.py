"""docs/lecture.html from docs/lecture.ipynb: its cells run in order, in a Python of their own.

    python tools/lecture.py    less than a minute on a CPU; needs no jupyter

The notebook holds no outputs; the page holds the code, what it printed and what it drew.
"""

import html
import subprocess
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import Failure, command_line, flag, parse_cli, read_json, run, write_atomic
from tools.figures import SHOWN, TEMPLATES, markdown_html, render

END = "\x1e"  # printed after each cell


@command_line
class LectureConfig:
    """Run the lecture's cells and write them with their outputs as one page."""

    out: Path = flag(ROOT / "docs/lecture.html", "the page")


def read_cells(notebook: Path) -> list[tuple[str, str]]:
    """(markdown or code, text) of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in read_json(notebook)["cells"]]


def run_cells(codes: list[str]) -> list[str]:
    """What each cell prints.  Failure with the traceback's end where one fails."""
    script = "\n".join(f"{code}\nprint({END!r})" for code in codes)
    command = [sys.executable, "-"]  # reads the script from its stdin
    done = subprocess.run(command, input=script, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"cell {done.stdout.count(END) + 1} of code failed:\n{done.stderr[-2000:]}")
    return done.stdout.split(END + "\n")[:-1]


def output_html(printed: str) -> str:
    """Printed lines as one block each; what `figures.show` printed is HTML already."""
    body = []
    for shown, lines in groupby(printed.splitlines(), key=lambda line: line.startswith(SHOWN)):
        text = "\n".join(lines)
        drawn = f'<div class="wide">{text.replace(SHOWN, "")}</div>'
        body.append(drawn if shown else f"<pre><b>{html.escape(text)}</b></pre>")
    return "\n".join(body)


def main() -> None:
    cfg = parse_cli(LectureConfig)
    cells = read_cells(ROOT / "docs/lecture.ipynb")
    outputs = iter(run_cells([text for kind, text in cells if kind == "code"]))
    body = []
    for kind, text in cells:
        if kind == "markdown":
            body.append(markdown_html(text))
        else:
            body += [f"<pre>{html.escape(text)}</pre>", output_html(next(outputs))]
    title = cells[0][1].partition("\n")[0].lstrip("# ")
    write_atomic(cfg.out, render(TEMPLATES / "page.html", title=title, body="\n".join(body)))
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main)
