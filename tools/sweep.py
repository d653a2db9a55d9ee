"""Many short runs from one start: the rows of the paper's tables 6 and 7, side by side.

    python train.py --config toy/train.json --loss all    every row, one reference cache, one table

Each row is an ordinary run of train.py in out_dir/ROW and continues where it stopped.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import load_config
from losses import parse_objective
from runtime import Process, read_whole_lines, write_atomic
from tools.figures import new_figure, png, text_table
from train import TrainConfig, open_data, train, with_recipe

# Tables 6 and 7 of the paper.  It gives beta 0.1 and nothing else per row: label smoothing 0.1 for
# cDPO and RobustDPO, and TR-DPO's period and mix (TRL 0.10's), are our choice.
ROWS: dict[str, dict[str, Any]] = {
    "SFT": {"loss": "sft"},
    "DPO": {"loss": "dpo"},
    "RSO": {"loss": "rso"},
    "IPO": {"loss": "ipo"},
    "cDPO": {"loss": "cdpo", "label_smoothing": 0.1},
    "RobustDPO": {"loss": "robust", "label_smoothing": 0.1},
    "BCO": {"loss": "bco"},
    "SPPO": {"loss": "sppo"},
    "AOT": {"loss": "aot"},
    "TR-DPO": {"loss": "dpo", "reference": "online", "reference_update_every": 64},
    "ORPO": {"loss": "orpo"},
    "DPO+": {"loss": "dpo+sft"},
    "cDPO+": {"loss": "cdpo+sft", "label_smoothing": 0.1},
    "RobustDPO+": {"loss": "robust+sft", "label_smoothing": 0.1},
    "BCO+": {"loss": "bco+sft"},
    "AOT+": {"loss": "aot+sft"},
    "MPO": {"loss": "mpo"},
}
COLUMNS = "loss rewards/chosen rewards/rejected rewards/margin rewards/accuracy nll".split()


def train_rows(cfg: TrainConfig, own: list[str], process: Process) -> None:
    """Every row, and every objective of the user's `own`; a table and a PNG of the curves."""
    cfg = with_recipe(cfg, load_config(cfg.model_dir), process.say)
    total = open_data(replace(cfg, loss="dpo"), parse_objective("dpo"), process).steps_per_epoch
    total = min(total * cfg.epochs, cfg.max_steps or math.inf)
    curves: dict[str, list[dict]] = {}
    for name, flags in (ROWS | {name: {"loss": name} for name in own}).items():
        flags = dict(flags)
        if (every := flags.get("reference_update_every", 0)) > total:
            flags["reference_update_every"] = max(1, total // 4)
            process.say(f"{name}: updates every {total // 4} steps, since {every} would never come")
        row = replace(cfg, out_dir=cfg.out_dir / name, reference_cache=cfg.cache_folder, **flags)
        process.say(f"=== {name}: --loss {row.loss}")
        train(row, process)
        curves[name] = read_whole_lines(row.out_dir / "metrics.jsonl")[0]
    if process.is_main:
        print(table_of_rows(curves))
        write_atomic(cfg.out_dir / "rows.png", draw_rows(curves))
        process.say(f"curves: {cfg.out_dir / 'rows.png'}")


def table_of_rows(curves: dict[str, list[dict]]) -> str:
    """Metrics of the last step, one line a row; - where a row has no such number."""
    rows = []
    for name, curve in curves.items():
        cells = [curve[-1].get(column) for column in COLUMNS]
        rows.append([name, *("-" if cell is None else f"{cell:.3f}" for cell in cells)])
    return text_table(["row", *(column.split("/")[-1] for column in COLUMNS)], rows)


def draw_rows(curves: dict[str, list[dict]]) -> bytes:
    """PNG: a panel a metric, a line a row, each row's name at the line's end."""
    figure, axes = new_figure(2, 2, 7, 4.5, sharex=True)
    shown = ("rewards/margin", "rewards/chosen", "nll", "rewards/accuracy")
    for axis, metric in zip(axes.flat, shown):
        for number, (name, curve) in enumerate(curves.items()):
            points = [(row["step"], row[metric]) for row in curve if metric in row]
            if points:
                dashes = ("-", "--", ":")[number // 10 % 3]
                axis.plot(*zip(*points), dashes, color=f"C{number % 10}", label=name, linewidth=1.3)
                axis.annotate(name, points[-1], fontsize=6, color=f"C{number % 10}")
        axis.set_title(metric)
        axis.grid(alpha=0.3)
        if metric != "rewards/accuracy":
            axis.set_yscale("symlog", linthresh=1)
    axes[0, 0].legend(fontsize=7, ncol=3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return png(figure)
