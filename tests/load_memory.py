"""Host memory while two processes load a model of the released shapes; run by hand, a minute.

    python tests/load_memory.py --size 8b --state_dtype bf16

The checkpoint holds zeros in a sparse file, so it takes no disk; every tensor is read all the same.
Each process must stay near its half of the weights plus the largest tensor.
"""

import argparse
import json
import shutil
import sys
import tempfile
from math import prod
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import OURS, run_forks  # noqa: E402
from test_strength import load_within  # noqa: E402

from train import TrainConfig  # noqa: E402
from weights import FLOATS  # noqa: E402


def write_hollow(model_dir: Path, size: str) -> dict[str, list[int]]:
    """config.json and a safetensors file of bfloat16 zeros with every official tensor."""
    model_dir.mkdir()
    shutil.copy(OURS / f"internvl2-{size}" / "config.json", model_dir)
    shapes = json.loads((OURS / f"internvl2-{size}" / "shapes.json").read_text())["shapes"]
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(model_dir / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("2b", "8b"), default="8b")
    parser.add_argument("--state_dtype", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model_dir = Path(name) / "model"
        shapes = write_hollow(model_dir, args.size)
        cfg = TrainConfig(model_dir=model_dir, state_dtype=args.state_dtype)
        item = FLOATS[cfg.state_dtype].itemsize
        total = item * sum(map(prod, shapes.values()))
        largest = item * max(map(prod, shapes.values()))
        print(f"{len(shapes)} tensors, {total / 1e9:.2f} GB, the largest {largest / 1e9:.2f} GB")
        run_forks(2, load_within, cfg, total // 2 + 2 * largest + 10e6)


if __name__ == "__main__":
    main()
