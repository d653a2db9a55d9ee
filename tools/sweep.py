"""Many short runs from one start, side by side: settings of your choice, or the paper's rows.

    python tools/sweep.py --config toy/train.json --lr 1e-4,1e-3 --loss mpo,dpo+sft --out_dir sweep
    python train.py --config toy/train.json --loss all    every row of the paper's tables 6 and 7

Takes the flags of train.py; a flag with several values, separated by commas, is run with each of
them, several such flags in every combination.  Each run is an ordinary one of train.py in a folder
of out_dir and continues where it stopped.  Those whose reference scores alike share its cache; all
end in one table and one picture.  A run that diverges is not started again: delete its folder.
"""

import gc
import runpy
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    print(__doc__)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")  # its flags need no torch

import torch

import runtime
from config import load_config
from losses import LOSSES, parse_objective
from runtime import InputError, is_main, parse_cli, read_json, read_whole_lines, say, write_atomic
from tools.figures import curve_panels, text_table
from tools.lab import register_file
from train import Diverged, TrainConfig, asked_to_stop, in_group, open_data, train, with_recipe

# Tables 6 and 7 of the paper.  It gives beta 0.1 and nothing else per row: label smoothing 0.1 for
# cDPO and RobustDPO, and TR-DPO's period and mix (TRL 0.10's), are our choice.
TABLE = read_json(Path(__file__).with_name("rows.json"))
ROWS = {row: about["flags"] for row, about in TABLE.items() if "flags" in about}
# flags of some rows alone: the user's go before what the table says, the other rows have none
OF_SOME_ROWS = "label_smoothing reference_update_every reference_update_mix".split()
UNSET = {name: getattr(TrainConfig, name) for name in OF_SOME_ROWS}
# what log-probs of the reference depend on: a run with others than the first has a cache of its own
SCORED_WITH = "model_dir dtype state_dtype pack_tokens share_prefix share_images".split()
FAILED = "failed-step-*.json"  # what train.py leaves of a run that diverged
SHOWN = "loss rewards/chosen rewards/rejected rewards/margin rewards/accuracy nll".split()
SHOWN += ["heldout/loss", "heldout/rewards/accuracy", "heldout/nll"]


def train_rows(cfg: TrainConfig, own: list[str], device: torch.device) -> None:
    """Every row of the paper, and every objective of the user's `own`."""
    cfg = with_recipe(cfg, load_config(cfg.model_dir), say)
    total = open_data(cfg, parse_objective("dpo"))[0].steps_per_epoch
    total = min(total * cfg.epochs, cfg.max_steps or total * cfg.epochs)
    given, runs = {n: getattr(cfg, n) for n in UNSET if getattr(cfg, n) != UNSET[n]}, {}
    for row, flags in (ROWS | {name: {"loss": name} for name in own}).items():
        takes = LOSSES[row].keywords if row in own else flags
        told = {name: value for name, value in given.items() if name in takes}
        runs[row] = replace(cfg, **UNSET | flags | told)
    every, often = runs["TR-DPO"].reference_update_every, max(1, total // 4)
    if cfg.lora_rank:
        say("TR-DPO is left out: it moves a second model, and adapters share one")
        runs.pop("TR-DPO")
    elif every > total:
        say(f"TR-DPO: updates every {often} steps, since {every} would never come")
        runs["TR-DPO"] = replace(runs["TR-DPO"], reference_update_every=often)
    train_all(runs, cfg, device)


def combinations(argv: list[str]) -> dict[str, list[str]]:
    """Name of each run -> its flags, from flags of which some have several values."""
    values, words, runs = {}, list(argv), {}  # values: of each flag, "--lr=1e-4" and "--lr=1e-3"
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        values[name] = [f"{name}={one.strip()}" if one else name for one in value.split(",")]
    for flags in product(*map(dict.fromkeys, values.values())):  # of a repeated flag the last
        swept = [flag.lstrip("-") for flag in flags if len(values[flag.partition("=")[0]]) > 1]
        runs[",".join(swept).replace("*", "x")] = list(flags)  # a folder's name has no asterisk
    return runs


def train_all(runs: dict[str, TrainConfig], base: TrainConfig, device: torch.device) -> None:
    """Every run in a folder below that of `base`, which lends its cache; a table and a PNG."""
    curves: dict[str, list[dict]] = {}
    for name, cfg in runs.items():
        say(f"=== {name}: --loss {cfg.loss}")
        folder = base.out_dir / name
        alike = all(getattr(cfg, flag) == getattr(base, flag) for flag in SCORED_WITH)
        cache = base.cache_folder if alike else folder / "reference"
        try:
            if runtime.all_of(not list(folder.glob(FAILED))):
                gc.collect()  # FSDP's cycles still hold the weights of the run before
                train(replace(cfg, out_dir=folder, reference_cache=cache), device)
            else:
                say(f"it has failed before: delete {folder} to run it again")
        except Diverged as error:
            say(f"{error}; the other runs go on")
        if asked_to_stop():
            return
        for failed in folder.glob(FAILED):
            name += f", failed at step {read_json(failed)['step']}"
        curves[name] = read_whole_lines(folder / "metrics.jsonl", step=int)
    if is_main():
        print(table_of_rows(curves))
        panels = {  # a line a run, its name at the line's end
            metric: {name: (rows, metric) for name, rows in curves.items()}
            for metric in ("rewards/margin", "rewards/chosen", "nll", "rewards/accuracy")
        }
        write_atomic(base.out_dir / "rows.png", curve_panels(panels, 2, y_scale="symlog"))
        say(f"curves: {base.out_dir / 'rows.png'}")


def table_of_rows(curves: dict[str, list[dict]]) -> str:
    """Metrics of the last step, one line a row; - where a row has no such number."""
    last = {name: curve[-1] if curve else {} for name, curve in curves.items()}
    columns = [column for column in SHOWN if any(column in row for row in last.values())]
    cells = [[f"{row[c]:.3f}" if c in row else "-" for c in columns] for row in last.values()]
    rows = [[name, *numbers] for name, numbers in zip(last, cells)]
    titles = [column.replace("rewards/", "").replace("heldout/", "held-out ") for column in columns]
    return text_table(["row", *titles], rows)


def main() -> None:
    runs = combinations(sys.argv[1:])
    parsed = {name: parse_cli(TrainConfig, argv) for name, argv in runs.items()}
    base = next(iter(parsed.values()))
    if len(parsed) < 2:
        raise InputError("nothing to compare; give a flag several values, as --lr 1e-4,1e-3")
    shared = {(cfg.mine, cfg.out_dir, cfg.reference_cache) for cfg in parsed.values()}
    if len(shared) > 1 or any(cfg.plan or cfg.bench for cfg in parsed.values()):
        flags = "no --plan or --bench, and one --mine, --out_dir and --reference_cache"
        raise InputError(f"a sweep has {flags} for all of its runs")
    asked = [cfg.loss for cfg in parsed.values()]
    if base.mine:
        register_file(base.mine, asked)
    for loss in asked:
        parse_objective(loss)  # a typing mistake is told before anything is started
    with in_group(base.seed) as device:
        train_all(parsed, base, device)


if __name__ == "__main__":
    runtime.run(main)
