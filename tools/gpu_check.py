"""Whether all of it holds on one GPU, and how fast it is there: one command, one table.

    python tools/gpu_check.py --out gpu                       a card: at most 25 minutes
    python tools/gpu_check.py --out gpu --only flex --only steps --seconds 560

Parts stand in order of worth.  Every case of a part runs in a process of its own with its own time,
so that an illegal memory access, a hang or a lack of memory costs one case.  After each case
gpu.json and gpu.md are written anew; gpu.log has all that was printed.  Without a GPU the same
lines run at toy size: FlexAttention forward only and nothing compiled.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import flag, read_jsonl, write_atomic


@dataclass(frozen=True)
class CheckConfig:
    """Check this code on one GPU; without a GPU, at toy size on the CPU."""

    out: Path = flag(Path("gpu"), "folder of gpu.json, gpu.md and gpu.log")
    only: tuple[str, ...] = flag((), "name of a part to run; may be repeated")
    seconds: int = flag(1500, "time for everything; cases that would begin later are skipped", 1)
    world: Path | None = flag(None, "folder that toy.py wrote; default: a new one")


if __name__ == "__main__":
    runtime.parse_cli(CheckConfig)  # --help and wrong flags need no torch, which takes seconds

import torch

from tools import gpu_parts
from tools.figures import markdown_table
from tools.gpu_parts import PARTS, ROOT, TOY, Row


def output_of(*command: str) -> str:
    """What a command prints; empty where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else ""


def in_child(folder: Path, check: Callable, case: str, log: Path) -> None:
    """One case: what it prints goes to the log, its rows to a file as they come."""
    os.setsid()  # the parent ends this whole group
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with open("rows.jsonl", "w") as file:
        for row in check(case):
            print(json.dumps(row._asdict()), file=file, flush=True)


def run_case(folder: Path, check: Callable, case: str, seconds: float, log: Path) -> list[Row]:
    """The rows of a case; one more that fails where it crashed or took too long."""
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=in_child, args=(folder, check, case, log))
    child.start()
    child.join(seconds)
    problem = f"still running after {seconds:.0f} s" if child.is_alive() else ""
    if child.is_alive() or child.exitcode:
        lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        problem = problem or f"ended with {child.exitcode}: {lines[-1][:200] if lines else ''}"
    with contextlib.suppress(ProcessLookupError):  # and what it has left behind
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    done = [Row(**row) for _, row in read_jsonl(rows)] if rows.exists() else []
    return done + ([Row(problem, None, "", "FAIL")] if problem else [])


def write_report(out: Path, facts: dict, table: list[dict]) -> None:
    """gpu.json and gpu.md, whole after every case."""
    write_atomic(out / "gpu.json", json.dumps({**facts, "rows": table}, indent=1) + "\n")
    header = ("part", "case", "measured", "figure", "expected", "verdict")
    words = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    write_atomic(out / "gpu.md", f"{words}\n\n{markdown_table(header, map(cells, table))}\n")


def cells(row: dict) -> list[str]:
    return [
        "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()
    ]


def main() -> None:
    cfg, began, table = runtime.parse_cli(CheckConfig), time.monotonic(), []
    if unknown := set(cfg.only) - set(PARTS):
        raise runtime.InputError(
            f"--only {', '.join(unknown)}: no such part; known: {', '.join(PARTS)}"
        )
    cfg.out.mkdir(parents=True, exist_ok=True)
    log = cfg.out.resolve() / "gpu.log"
    log.unlink(missing_ok=True)
    card = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    facts = {
        "device": f"CPU, {os.cpu_count()} cores, toy size" if TOY else card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "command": " ".join(["python", *sys.argv]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder, world = Path(name), str(cfg.world.resolve()) if cfg.world else ""
        run_case(folder, gpu_parts.make_world, world, 120, log)
        for name, part in PARTS.items():
            for case in part.cases if name in cfg.only or not cfg.only else ():
                left = cfg.seconds - (time.monotonic() - began)
                rows = [Row("no time was left", None, "", "skipped")]
                if left > 5:
                    rows = run_case(folder, part.check, case, min(part.seconds, left), log)
                for row in rows:
                    table.append({"part": name, "case": case, **row._asdict()})
                    print(*cells(table[-1]), sep="  ", flush=True)
                write_report(cfg.out, facts, table)
    failed = sum(row["verdict"] == "FAIL" for row in table)
    print(f"{len(table)} rows, {failed} failed, {time.monotonic() - began:.0f} s: {cfg.out}/gpu.md")
    if failed:
        raise runtime.Failure(f"{failed} of {len(table)} rows failed; {log} says why")


if __name__ == "__main__":
    runtime.run(main)
