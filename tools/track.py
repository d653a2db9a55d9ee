"""A run's metrics where people look: the doctor's, curves.png, TensorBoard, Weights & Biases.

    python train.py --config toy/train.json --tensorboard --wandb my-project

train.py calls it after every step.  Both programs are optional and work offline (TensorBoard writes
into out_dir/tensorboard; WANDB_MODE=offline); curves.png needs matplotlib.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime import is_main, read_json, say, write_atomic
from tools.doctor import diagnose
from tools.figures import curve_panels

Row = dict[str, float]
FEWEST_ROWS = 20  # of which curves are drawn
SECONDS_APART = 30  # two drawings: one takes a second or two
# title of a panel -> name of a curve -> metric
PANELS = read_json(Path(__file__).with_name("curves.json"))


def open_writers(cfg: Any, done: int) -> list[Callable[[Row], Any]]:
    """What each row is handed to; `done` steps of an earlier start stand there already."""
    writers = []
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        board = SummaryWriter(str(cfg.out_dir / "tensorboard"), purge_step=done + 1)
        writers.append(
            lambda row: [board.add_scalar(name, x, row["step"]) for name, x in row.items()]
        )
    if cfg.wandb:
        import wandb  # noqa: PLC0415

        run = wandb.init(
            project=cfg.wandb, name=cfg.out_dir.name, dir=str(cfg.out_dir),
            id=hashlib.blake2b(bytes(cfg.out_dir.resolve()), digest_size=8).hexdigest(),
            resume="allow",  # the same folder is the same run
            config={name: str(value) for name, value in asdict(cfg).items()},
        )  # fmt: skip
        writers.append(lambda row: run.log(row, step=row["step"]))
    return writers


class Tracker:
    """On rank 0: diagnoses each new row of metrics, an illness once, hands it on and draws it."""

    def __init__(self, cfg: Any, rows: list[Row], total: int) -> None:
        """rows: those of a train.Run, which grow to `total`."""
        self.rows, self.total, self.flags = rows, total, vars(cfg)
        self.known: set[str] = set()  # illnesses
        self.picture, self.drawn = cfg.out_dir / "curves.png", time.monotonic()
        done = rows[-1]["step"] if rows else 0  # of which some may have been skipped
        self.writers = open_writers(cfg, done) if is_main() else []

    def __call__(self) -> None:
        findings = diagnose(self.rows, self.total, self.flags) if is_main() else {}
        for name in findings.keys() - self.known:
            say(f"diagnosis at step {self.rows[-1]['step']:.0f}: {findings[name]}")
        self.known |= findings.keys()
        for write in self.writers:
            write(self.rows[-1])

    def draw(self, last: bool) -> None:
        """Write out_dir/curves.png, which is called for with every checkpoint."""
        soon = time.monotonic() - self.drawn < SECONDS_APART
        if not is_main() or len(self.rows) < FEWEST_ROWS or (soon and not last):
            return
        terms = {name[5:]: name for name in self.rows[-1] if name.startswith("loss/")}
        panels = {
            title: {label: (self.rows, name) for label, name in curves.items()}
            for title, curves in (PANELS | {"terms of the loss": terms}).items()
        }
        with contextlib.suppress(ModuleNotFoundError):  # no matplotlib here
            write_atomic(self.picture, curve_panels(panels, 3, dpi=80))
        self.drawn = time.monotonic()
