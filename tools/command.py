"""What `pip install .` installs: `internvl-mpo train --help` runs train.py, and so every script.

The files are installed side by side in one folder, as they lie here, and import each other there.
"""

import ast
import runpy
import sys
from dataclasses import make_dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import parse_command


def main() -> None:
    files = [path for folder in (".", "tools", "paper") for path in (ROOT / folder).glob("*.py")]
    texts = {path: path.read_text() for path in sorted(files) if path.name != "command.py"}
    scripts = {path.stem: path for path, text in texts.items() if "\nif __name__" in text}
    about = {name: ast.get_docstring(ast.parse(texts[path])) for name, path in scripts.items()}
    verbs = {name: make_dataclass(name, (), namespace={"__doc__": about[name]}) for name in scripts}
    name, _ = parse_command(verbs, sys.argv[1:2])
    sys.argv = [str(scripts[name]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
