"""Kill -9 at random moments of a training run of two processes; run by hand, minutes.

    python tests/kill_test.py --kills 20
    python tests/kill_test.py --kills 10 --ctrl_c     SIGINT instead: it saves and ends by itself

Each run is killed four times: in the pass of the reference, in a checkpoint, at a random moment
of its steps, and in the export; the same command then continues until it ends.  Every other run
writes its checkpoints in the background.  In the end the last checkpoint and the exported model
must equal the uninterrupted run's byte for byte.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import start_forks, train_in_process  # noqa: E402

from toy import write_world  # noqa: E402
from train import TrainConfig, ask_to_stop  # noqa: E402


def train_until_asked(cfg: TrainConfig) -> None:
    """As the command line does: Ctrl-C saves after the step and ends."""
    signal.signal(signal.SIGINT, ask_to_stop)
    train_in_process(cfg)


def contents(out_dir: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint and of the exported model, by name."""
    newest = sorted((out_dir / "checkpoints").glob("step-*"))[-1]
    files = [*newest.iterdir(), *(out_dir / "model").iterdir()]
    return {p.name: p.read_bytes() for p in files if p.suffix == ".safetensors"}


def stage_of(out_dir: Path, since: int) -> str:
    """Where a run was when it was killed, from what lies in its folder."""
    for place in ("export", "checkpoint"):
        if reached(out_dir, place, since):
            return place
    return "step" if (out_dir / "config.json").exists() else "reference pass"


def finish(cfg: TrainConfig) -> float:
    """Run to the end; seconds from the first file to the last."""
    forks, began = start_forks(2, train_in_process, cfg), 0.0
    while any(fork.is_alive() for fork in forks):
        if not began and cfg.out_dir.exists():
            began = time.time()
        time.sleep(0.002)
    assert [fork.exitcode for fork in forks] == [0, 0], "the run failed"
    return time.time() - began


MARKS = {  # files that stand in out_dir only while a run is in that place
    "reference pass": "reference/part-*.jsonl",
    "checkpoint": "checkpoints/.partial",
    "export": ".model.partial",
}


def reached(out_dir: Path, place: str, since: int) -> bool:
    """Whether a file of that place was made or written after `since` (ns)."""
    marks = out_dir.glob(MARKS.get(place, "config.json"))
    try:
        return any(m.stat().st_mtime_ns > since and (m.is_dir() or m.stat().st_size) for m in marks)
    except FileNotFoundError:  # gone between glob and stat
        return False


def kill(cfg: TrainConfig, place: str, wait: float, number: int) -> str:
    """Start the run, wait for `place` and `wait` seconds more, send both the signal of this number;
    says where they were."""
    since = time.time_ns()
    forks = start_forks(2, train_until_asked, cfg)
    while not reached(cfg.out_dir, place, since) and any(fork.is_alive() for fork in forks):
        pass
    time.sleep(wait)
    stage = stage_of(cfg.out_dir, since)
    if not all(fork.is_alive() for fork in forks):
        stage = "already ended"
    for fork in forks:
        if fork.is_alive():
            os.kill(fork.pid, number)
    for fork in forks:
        fork.join()
    if number == signal.SIGINT:
        assert [fork.exitcode for fork in forks] == [0, 0], "Ctrl-C ended in an error"
    return stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ctrl_c", action="store_true", help="SIGINT instead of SIGKILL")
    args = parser.parse_args()
    draw, number_sent = random.Random(args.seed), signal.SIGINT if args.ctrl_c else signal.SIGKILL
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
            max_length=400,
            drop_path=0.2,
            save_every=1,
        )
        seconds = finish(cfg)
        expected = contents(cfg.out_dir)
        print(f"uninterrupted: {seconds:.1f} s, {len(expected)} files", flush=True)
        places, done, runs = Counter(), 0, -(-args.kills // 4)
        for number in range(1, runs + 1):
            background = "on" if number % 2 else "off"
            run = replace(cfg, out_dir=folder / f"killed-{number}", async_save=background)
            for place in ("reference pass", "checkpoint", "any", "export")[: args.kills - done]:
                wait = draw.uniform(0, seconds / 4) if place == "any" else draw.uniform(0, 0.002)
                found = kill(run, place, wait, number_sent)
                done += 1
                places[found] += 1
                print(f"kill {done}: run {number}, wanted: {place}, was in: {found}", flush=True)
            finish(run)
            found = contents(run.out_dir)
            assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
            differ = [n for n in expected if found[n] != expected[n]]
            assert not differ, f"run {number} differs in {differ}"
            print(f"run {number}: equal to the uninterrupted run, bit for bit", flush=True)
    counts = ", ".join(f"{count} in: {place}" for place, count in places.most_common())
    print(f"{done} kills ({counts}), {runs} runs: every one equal, bit for bit")


if __name__ == "__main__":
    main()
