"""Kill -9 at random moments of a training run of two processes; run by hand, minutes.

    python tests/kill_test.py --kills 20

Each kill falls into the reference pass, a step, a checkpoint or the export, at a moment drawn
from the length of an uninterrupted run; the same command then continues until it ends.  In the
end the last checkpoint and the exported model must equal the uninterrupted run's byte for byte.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import start_forks  # noqa: E402
from test_train import train_here  # noqa: E402

from toy import write_world  # noqa: E402
from train import TrainConfig  # noqa: E402


def contents(out_dir: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint and of the exported model, by name."""
    newest = sorted((out_dir / "checkpoints").glob("step-*"))[-1]
    files = [*newest.iterdir(), *(out_dir / "model").iterdir()]
    return {p.name: p.read_bytes() for p in files if p.suffix == ".safetensors"}


def stage_of(out_dir: Path) -> str:
    """Where a run was when it was killed, from what lies in its folder."""
    if (out_dir / ".model.partial").exists():
        return "export"
    if list((out_dir / "checkpoints").glob(".step-*")):
        return "checkpoint"
    metrics = out_dir / "metrics.jsonl"
    if metrics.exists():
        return f"step {len(metrics.read_bytes().splitlines()) + 1}"
    return "reference pass" if (out_dir / "reference").exists() else "start"


def finish(cfg: TrainConfig) -> float:
    """Run to the end; seconds from the first file to the last."""
    forks, began = start_forks(2, train_here, cfg), 0.0
    while any(fork.is_alive() for fork in forks):
        if not began and cfg.out_dir.exists():
            began = time.time()
        time.sleep(0.002)
    assert [fork.exitcode for fork in forks] == [0, 0], "the run failed"
    return time.time() - began


def kill(cfg: TrainConfig, after: float) -> str:
    """Start the run and kill both processes `after` seconds after its first new file."""
    forks, old = start_forks(2, train_here, cfg), stamp(cfg.out_dir)
    while stamp(cfg.out_dir) == old and all(fork.is_alive() for fork in forks):
        time.sleep(0.001)
    time.sleep(after)
    ended = not any(fork.is_alive() for fork in forks)
    for fork in forks:
        fork.kill()
    for fork in forks:
        fork.join()
    return "already ended" if ended else stage_of(cfg.out_dir)


def stamp(out_dir: Path) -> int:
    path = out_dir / "config.json"  # written anew by every start, after the reference pass
    first = out_dir / "reference" / "run.json"
    return sum(p.stat().st_mtime_ns for p in (path, first) if p.exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, 16, 0)
        cfg = TrainConfig(
            model_dir=folder / "model",
            meta=folder / "meta.json",
            out_dir=folder / "straight",
            lr=1e-3,
            batch_size=8,
            epochs=2,
            pack_tokens=400,
            drop_path=0.2,
            save_every=1,
        )
        seconds = finish(cfg)
        expected = contents(cfg.out_dir)
        print(f"uninterrupted: {seconds:.1f} s, {len(expected)} files", flush=True)
        number, done = 0, 0
        while done < args.kills:
            number += 1
            run = replace(cfg, out_dir=folder / f"killed-{number}")
            for _ in range(min(3, args.kills - done)):  # up to three kills of one run
                stage = kill(run, draw.uniform(0, seconds))
                done += 1
                print(f"kill {done}: run {number}, in: {stage}", flush=True)
            finish(run)
            found = contents(run.out_dir)
            assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
            differ = [n for n in expected if found[n] != expected[n]]
            assert not differ, f"run {number} differs in {differ}"
            print(f"run {number}: equal to the uninterrupted run, bit for bit", flush=True)
    print(f"{done} kills, {number} runs: every one equal, bit for bit")


if __name__ == "__main__":
    main()
