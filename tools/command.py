"""What `pip install .` installs: `internvl-mpo train --help` runs train.py, and so every script.

The files are installed side by side in one folder, as they lie here, and import each other there.
"""

import difflib
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    files = [path for folder in (".", "tools", "paper") for path in (ROOT / folder).glob("*.py")]
    files = [path for path in files if path.name != "command.py" and path.name[0] != "_"]
    scripts = {path.stem: path for path in sorted(files) if "\nif __name__" in path.read_text()}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in scripts:
        near = difflib.get_close_matches(name, scripts, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(scripts)}"
        asked = name in ("-h", "--help")
        print(f"usage: internvl-mpo SCRIPT [flags]; {hint}", file=None if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(scripts[name]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
