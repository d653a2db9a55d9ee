"""Kill -9 sampling at random moments, restart with another number of processes, compare.

    python tests/kill_sampling.py 10        (run by hand; two kills stay in the suite)

Prints one line a kill and fails unless the responses equal those of an uninterrupted run.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from runtime import read_whole_lines  # noqa: E402  (the repository is not installed)

FLAGS = "--prompts none --num_samples 8 --max_new_tokens 32 --cache_tokens 800".split()


def command(world: Path, out: Path, processes: int) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    files = ["--model_dir", world / "model", "--questions", world / "questions.jsonl"]
    files += ["--root", world / "images", "--out_dir", out]
    words = [sys.executable, *start, ROOT / "pairs.py", "sample", *files, *FLAGS]
    return list(map(str, words))


def responses(out: Path) -> dict:
    rows = [r for p in sorted(out.rglob("part-*.jsonl")) for r in read_whole_lines(p)]
    found = {(r["qid"], r["k"]): r for r in rows}
    assert len(found) == len(rows), "a response was drawn twice"
    return found


def main(kills: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        toy = [sys.executable, str(ROOT / "toy.py"), "--out", str(world), "--pairs", "24"]
        subprocess.run(toy, check=True, capture_output=True)
        lines = (world / "toy_steps.jsonl").read_text().replace('"answer_gt"', '"answer"')
        (world / "questions.jsonl").write_text(lines)
        began = time.time()
        subprocess.run(command(world, world / "straight", 1), check=True, capture_output=True)
        usual, expected = time.time() - began, responses(world / "straight")
        for n in range(kills):
            processes = random.choice([1, 2, 3])
            run = subprocess.Popen(
                command(world, world / "killed", processes),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(random.uniform(0.3, 1.2) * usual)
            # torchrun's workers lead sessions of their own
            subprocess.run(["pkill", "-9", "-f", str(world / "killed")], check=False)
            run.wait()
            print(f"kill {n + 1}: {processes} processes, {len(responses(world / 'killed'))} there")
        subprocess.run(command(world, world / "killed", 2), check=True, capture_output=True)
        assert responses(world / "killed") == expected
        print(f"{len(expected)} responses, identical to the uninterrupted run")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
