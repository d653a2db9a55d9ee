"""Whether all of it holds on one GPU, and how fast it is there: one command, one table.

    python tools/gpu_check.py --out gpu                       a card: at most 25 minutes
    python tools/gpu_check.py --out gpu --only flex --only steps --seconds 560

Every case of a part runs in a process of its own with its own time, so that an illegal memory
access, a hang or a lack of memory costs one case.  After each case gpu.json and gpu.md are written
anew; gpu.log has all that was printed.  Without a GPU the same lines run at toy size: FlexAttention
forward only and nothing compiled.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import getoutput
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import flag, read_whole_lines, write_atomic, write_json

# in order of worth: a function of gpu_parts -> seconds that a case may take, its cases
PARTS = runtime.read_json(Path(__file__).with_name("gpu_parts.json"))


@runtime.command_line
class CheckConfig:
    """Check this code on one GPU; without a GPU, at toy size on the CPU."""

    out: Path = flag(Path("gpu"), "folder of gpu.json, gpu.md and gpu.log")
    only: tuple[Literal[*PARTS], ...] = flag((), "a part to run; may be repeated; default all")
    seconds: int = flag(1500, "time for everything; cases that would begin later are skipped", 1)


import torch

from tools import gpu_parts
from tools.figures import markdown_table
from tools.gpu_parts import ROOT, TOY, Row


def in_child(folder: Path, check: Callable, case: str, log: Path) -> None:
    """One case: what it prints goes to the log, its rows to a file as they come."""
    os.setsid()  # the parent ends this whole group
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = runtime.AppendLog(Path("rows.jsonl"))
    for row in check(case):
        rows.append(row._asdict())


def run_case(folder: Path, check: Callable, case: str, seconds: float, log: Path) -> list[Row]:
    """The rows of a case; one more that fails where it crashed or took too long."""
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=in_child, args=(folder, check, case, log))
    child.start()
    child.join(seconds)
    problem = f"still running after {seconds:.0f} s" if child.is_alive() else ""
    if child.exitcode:
        lines = log.read_text(errors="replace").split("\n")
        last = next(filter(str.strip, reversed(lines)), "")
        problem = f"ended with {child.exitcode}: {last[:200]}"
    with contextlib.suppress(ProcessLookupError):  # and what it has left behind
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    done = [Row(**row) for row in read_whole_lines(rows)]
    return done + ([Row(problem, None, "", "FAIL")] if problem else [])


def write_report(out: Path, facts: dict, table: list[dict]) -> None:
    """gpu.json and gpu.md, whole after every case."""
    write_json(out / "gpu.json", {**facts, "rows": table})
    header = ("part", "case", "measured", "figure", "expected", "verdict")
    words = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    write_atomic(out / "gpu.md", f"{words}\n\n{markdown_table(header, map(cells, table))}\n")


def cells(row: dict) -> list[str]:
    rounded = (f"{x:.4g}" if isinstance(x, float) else x for x in row.values())
    return ["" if x is None else str(x) for x in rounded]


def main() -> None:
    cfg, began, table = runtime.parse_cli(CheckConfig), time.monotonic(), []
    cfg.out.mkdir(parents=True, exist_ok=True)
    log = cfg.out.resolve() / "gpu.log"
    log.write_text("")
    ask = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null"
    facts = {
        "device": f"CPU, {os.cpu_count()} cores, toy size" if TOY else getoutput(ask),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": getoutput(f"git -C '{ROOT}' rev-parse HEAD 2> /dev/null"),  # of a checkout
        "command": " ".join(["python", *sys.argv]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_case(folder, gpu_parts.make_world, "", 120, log)
        for part, (limit, cases) in PARTS.items():
            cases = cases if part in cfg.only or not cfg.only else ()
            for case in cases[:2] if TOY else cases:
                left = cfg.seconds - (time.monotonic() - began)
                rows = [Row("no time was left", None, "", "skipped")]
                if left > 5:
                    rows = run_case(folder, getattr(gpu_parts, part), case, min(limit, left), log)
                for row in rows:
                    table.append({"part": part, "case": case, **row._asdict()})
                    print(*cells(table[-1]), sep="  ", flush=True)
                write_report(cfg.out, facts, table)
    failed = sum(row["verdict"] == "FAIL" for row in table)
    print(f"{len(table)} rows, {failed} failed, {time.monotonic() - began:.0f} s: {cfg.out}/gpu.md")
    if failed:
        raise runtime.Failure(f"{failed} of {len(table)} rows failed; {log} says why")


if __name__ == "__main__":
    runtime.run(main)
