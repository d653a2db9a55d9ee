"""The paper in miniature: a base model, its answers, preference pairs, every objective, a report.

    python -m paper.story --quick     one seed; SFT, DPO and MPO alone; some minutes
    python -m paper.story             make paper: every row of Tables 6 and 7 on three seeds
    python -m paper.story --ablate    also the paper's Figure 4 and Table 9, on the first seed

A story is a list of tasks.  Each calls functions of train.py, pairs.py and eval.py (stages.py),
starts when the tasks it needs are done, and leaves one last file.  Worker processes share them.
A task whose last file exists is not done again: a story that was stopped goes on where it was.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paper.report import PAPER, SETTINGS, WITH_NTP, write_report
from runtime import (
    alone_in,
    claim,
    flag,
    parse_cli,
    read_json,
    run,
    write_atomic,
)
from tools.workers import Task, run_tasks


@dataclass(frozen=True)
class Recipe:
    """Every setting of the story that is not a row's own; run.json and story.json repeat them."""

    pictures: int = 4000  # of the base's lessons: 2 direct, 1 step-by-step question, 1 description
    noise: float = 0.05  # of the pictures
    base_lr: float = 3e-3
    base_batch_size: int = 32
    first_leg: int = 500  # steps until the first look at the development questions
    leg: int = 100  # and between the others
    stop_at: float = 50.0  # Direct accuracy from which the base cools down
    cap: int = 1200  # steps after which it does so anyway
    cooldown: int = 80
    dev: int = 200
    test: int = 600
    questions: int = 1800  # new ones, to sample answers to
    direct_questions: int = 450  # the first of them, to sample direct answers to, too
    samples: int = 8
    pairs_per_query: int = 4
    described: int = 600  # pictures to describe for DropoutNTP
    keep_ratio: float = 0.5
    steps: int = 400
    batch_size: int = 16


TINY = Recipe(
    pictures=200, base_batch_size=8, first_leg=80, cap=80, stop_at=0.0, cooldown=10, dev=8,
    test=10, questions=24, direct_questions=8, described=8, steps=3,
)  # fmt: skip
RATES = (3e-4, 1e-3, 3e-3)  # that --tune tries for a row
LOW_RATES = (1e-4, 3e-4, 1e-3)  # and for one that does not hold the chosen answers' log-prob up
FALLING = ("DPO", "RSO", "IPO", "cDPO", "RobustDPO", "BCO", "AOT", "TR-DPO")  # such rows
TUNING_SEED = 100
BETA = 0.1
SPEED = {"pack_tokens": 2560, "recompute": "off", "drop_path": 0.0, "head_rows": 0}
QUICK_ROWS = ("MPO", "SFT", "DPO")  # the longest first
ABLATIONS: dict[str, dict[str, dict]] = {  # the paper's Figure 4 and Table 9; flags of MPO
    "data scale": {str(share): {"limit": share} for share in (0.1, 0.4, 0.7)},
    "learning rate": {str(lr): {"lr": lr} for lr in (1e-4, 3e-4, 3e-3, 1e-2)},
    "w_p : w_q": {
        f"{p}:{q}": {"loss": f"{p / (p + q):g}*dpo+{q / (p + q):g}*bco+sft"}
        for p, q in ((1, 1), (3, 1), (5, 1), (9, 1))
    },
    "w_g": {str(w): {"loss": f"0.8*dpo+0.2*bco+{w}*sft"} for w in (0.01, 0.5, 2.0, 5.0)},
    "keep ratio": {str(ratio): {"keep_ratio": ratio} for ratio in (0.25, 0.75)},
}


@dataclass(frozen=True)
class StoryConfig:
    """The paper in miniature: train a base, sample, pair, train every objective, report."""

    out: Path = flag(Path("toy"), "the story goes to the folder story inside it")
    quick: bool = flag(False, "one seed; SFT, DPO and MPO; some minutes")
    ablate: bool = flag(False, "also the paper's Figure 4 and Table 9, on the first seed")
    seeds: tuple[int, ...] = flag((), "may be repeated; default 1, 2 and 3 (quick: 1)")
    jobs: int = flag(2, "worker processes", low=1)
    mine: Path | None = flag(None, "Python file with objectives of your own, a row each")
    tune: bool = flag(False, "try each row at several rates on a seed kept for that")
    tiny: bool = flag(False, "a few seconds a stage, to see that everything works")

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise ValueError(f"seeds must differ and be >= 0, got {self.seeds}")

    @property
    def few(self) -> bool:
        return self.quick or self.tiny

    @property
    def recipe(self) -> Recipe:
        return TINY if self.tiny else Recipe()

    @property
    def split(self) -> str:
        """Questions that results are reported on; rates are chosen on others."""
        return "tune" if self.tune else "test"

    def folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"


def rates_of(row: str) -> tuple[float, ...]:
    """The learning rates that `--tune` tries: as many for every row."""
    return LOW_RATES if row in FALLING else RATES


def chosen_rates() -> dict[str, float]:
    """Row -> the learning rate that `--tune` chose."""
    rows = read_json(Path(__file__).parent / "tuning.json")["rows"]
    return {name: row["chosen"] for name, row in rows.items()}


# --------------------------------------------------------------------------- tasks


def row_names(cfg: StoryConfig) -> list[str]:
    """The rows of this story, those of a quick one first."""
    own = []
    if cfg.mine:
        from tools.mine import register_file  # noqa: PLC0415  (torch takes seconds to load)

        own = register_file(cfg.mine)
    names = [*QUICK_ROWS, *own]
    if not cfg.few:
        names += [name for name in PAPER if name not in ("base", *QUICK_ROWS)]
        names += [] if cfg.tune else [WITH_NTP]
    return names


def ratios(cfg: StoryConfig) -> tuple[float, ...]:
    """Shares of a description that DropoutNTP keeps."""
    few = cfg.few and not cfg.ablate
    return () if cfg.tune else (cfg.recipe.keep_ratio,) if few else (0.25, 0.5, 0.75)


def row_task(
    cfg: StoryConfig, row: str, folder: str = "", flags: dict | None = None,
    about: dict | None = None,
) -> tuple:  # fmt: skip
    """Train one row from the base and measure it; `flags` differ from the row's own."""
    folder = folder or f"rows/{row}"
    arguments, made = (row, folder, flags or {}, about or {}), f"{folder}/result.json"
    seconds = 0.06 * cfg.recipe.steps + 0.015 * cfg.recipe.test
    return Path(folder).name, "train_row", arguments, made, ("pairs",), seconds


def tasks_of(cfg: StoryConfig, seed: int) -> list[Task]:
    """A seed's base, its answers and pairs, and every row.

    The first row that scores the reference fills the cache, for which the others wait.
    """
    r, kept, made, base = cfg.recipe, ratios(cfg), "pairs.json", ("base",)
    sampling = 0.003 * r.questions * r.samples
    training, describing = 0.1 * (r.cap + r.cooldown), 0.01 * r.described * len(kept)
    answers = ("chains of thought", "direct answers", "descriptions")
    stages = [  # name, function, its arguments, last file, needs, seconds
        ("base", "train_base", (), "base/base.json", (), training),
        ("base measured", "measure_base", (), "result.json", base, 0.02 * r.test),
        (answers[0], "sample_answers", ("new", "en"), made, base, sampling),
        (answers[1], "sample_answers", ("new_direct", "direct"), made, base, sampling / 8),
        (answers[2], "drop_image", (kept,), made, base, describing),
        ("pairs", "make_pairs", (kept,), made, answers, 1.0),
    ]
    for name in row_names(cfg):
        for lr in rates_of(name) if cfg.tune else ():
            stages.append(row_task(cfg, name, f"rows/{name} {lr:g}", {"lr": lr}))
        if not cfg.tune:
            stages.append(row_task(cfg, name))
    for study, values in ABLATIONS.items() if cfg.ablate and seed == cfg.seeds[0] else ():
        name = WITH_NTP if study == "keep ratio" else "MPO"
        for value, flags in values.items():
            folder = f"ablate/{study}={value}".replace(" ", "-").replace(":", "-")
            about = {"study": study, "value": value}
            stages.append(row_task(cfg, name, folder, flags, about))
    start = f"seed {seed} "
    return [
        Task(
            start + name, f"paper.stages:{stage}", (cfg, seed, *arguments),
            cfg.folder(seed) / made, tuple(start + need for need in needs), seconds,
        )
        for name, stage, arguments, made, needs, seconds in stages
    ]  # fmt: skip


# --------------------------------------------------------------------------- rates


def best_rate(scores: dict[float, tuple[float, float]]) -> float:
    """The rate with the best mean of Direct and CoT; the lowest of equals."""
    return max(sorted(scores), key=lambda lr: sum(scores[lr]))


def write_tuning(cfg: StoryConfig, about: dict) -> None:
    """tuning.json, and a line a row: every rate that was tried and the one chosen."""
    rows: dict[str, dict] = {}
    for row in row_names(cfg):
        scores = {}
        for path in cfg.folder(cfg.seeds[0]).glob(f"rows/{row} */result.json"):
            result = read_json(path)
            both = tuple(result["measures"][setting] for setting in SETTINGS)
            scores[result["flags"]["lr"]] = both
        if scores:
            tried = {f"{lr:g}": scores[lr] for lr in sorted(scores)}
            rows[row] = {"Direct, CoT": tried, "chosen": best_rate(scores)}
            print(f"{row}: {tried}; chosen {best_rate(scores):g}")
    settings = {k: v for k, v in about["settings"].items() if k != "rates"}  # those of before
    about = about | {"settings": settings, "rows": rows}
    write_atomic(cfg.out / "tuning.json", json.dumps(about, indent=1) + "\n")


# --------------------------------------------------------------------------- command line


def settings_of(cfg: StoryConfig) -> dict:
    settings = asdict(cfg.recipe) | {"beta": BETA, "rates": chosen_rates()} | SPEED
    settings["ratios"] = ratios(cfg)
    settings["tuning"] = {"seed": TUNING_SEED, "steps": Recipe().steps}
    return settings


def begin(cfg: StoryConfig) -> dict:
    """Claim the folder for these settings; what story.json says of this run and earlier ones."""
    claim(cfg.out, settings_of(cfg), "pass another --out")
    path = cfg.out / "story.json"
    before = read_json(path) if path.exists() else {}
    commits = [*before.get("commit", "").split(", "), commit()]  # whose results lie here
    about = {
        "settings": settings_of(cfg),
        "seeds": list(cfg.seeds),
        "quick": cfg.quick,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}",
        "commit": ", ".join(dict.fromkeys(filter(None, commits))),
        "torch": importlib.metadata.version("torch"),
        "seconds": before.get("seconds", {}),  # of calls that came to their end
    }
    write_atomic(path, json.dumps(about, indent=1) + "\n")
    return about


def commit() -> str:
    """The commit that these files are of, "unknown" outside a git checkout."""
    ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    began, cfg = time.time(), parse_cli(StoryConfig)
    default = (TUNING_SEED,) if cfg.tune else (1,) if cfg.few else (1, 2, 3)
    cfg = replace(cfg, out=cfg.out / "story", seeds=cfg.seeds or default)
    tasks = [task for seed in cfg.seeds for task in tasks_of(cfg, seed)]  # --mine is read
    with alone_in(cfg.out, 5, "pass --out"):
        about = begin(cfg)
        run_tasks(tasks, cfg.jobs)
        kind = "ablations" if cfg.ablate else "rows"
        about["seconds"][kind] = round(about["seconds"].get(kind, 0) + time.time() - began)
        write_atomic(cfg.out / "story.json", json.dumps(about, indent=1) + "\n")
        if cfg.tune:
            write_tuning(cfg, about)
        else:
            print(write_report(cfg.out))


if __name__ == "__main__":
    from paper import story  # under the name by which its worker processes know it

    run(story.main)
