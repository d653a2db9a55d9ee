"""The paper in miniature: a base model, its answers, preference pairs, every objective, a report.

    python -m paper.story --quick --seeds 1 2    SFT, DPO and MPO; one seed by default: minutes
    python -m paper.story                        make paper: every row on three seeds
    python -m paper.story --ablate               also the paper's Figure 4

A story is a list of tasks.  Each calls functions of train.py, pairs.py and eval.py (stages.py),
starts when the tasks it needs are done, and leaves one last file.  Worker processes share them.
A task whose last file exists is not done again: a story that was stopped goes on where it was.
"""

import importlib.metadata
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from paper.report import PAPER, WITH_NTP, write_report
from runtime import CORES, alone_in, claim, fingerprint, flag, parse_cli, read_json, run, write_json
from tools.workers import Task, run_tasks


@dataclass(frozen=True)
class Recipe:
    """Every setting of the story that is not a row's own; run.json and story.json repeat them."""

    pictures: int = 4000  # of the base's lessons: 2 direct, 1 step-by-step question, 1 description
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
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # that --tune tries for every row
TUNING_SEED = 100  # in no report
TUNED = read_json(Path(__file__).parent / "tuning.json")["rows"]
CHOSEN_RATES = {row: tried["chosen"] for row, tried in TUNED.items()}  # best of Direct + CoT
BETA = 0.1
SPEED = {"pack_tokens": 2560, "recompute": "off", "drop_path": 0.0, "head_rows": 0}
QUICK_ROWS = ("MPO", "SFT", "DPO")  # the longest first
# of the paper's Figure 4: name of a value -> flags of MPO; data scales are shares of 6,400 pairs
ABLATIONS = read_json(Path(__file__).parent / "ablations.json")


@dataclass(frozen=True)
class StoryConfig:
    """The paper in miniature: train a base, sample, pair, train every objective, report."""

    out: Path = flag(Path("toy"), "the story goes to the folder story inside it")
    quick: bool = flag(False, "one seed; SFT, DPO and MPO; some minutes")
    ablate: bool = flag(False, "also the paper's Figure 4")
    seeds: tuple[int, ...] = flag((), "may be repeated; default 1, 2 and 3 (quick: 1)")
    jobs: int = flag(2, "worker processes", low=1)
    mine: Path | None = flag(None, "Python file with objectives of your own, a row each")
    tune: bool = flag(False, "also each row at several rates, on a seed kept for that")
    tiny: bool = flag(False, "a few seconds a stage, to see that everything works")

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise ValueError(f"seeds must differ and be >= 0, got {self.seeds}")

    @property
    def recipe(self) -> Recipe:
        return TINY if self.tiny else Recipe()


class Seed(NamedTuple):
    """One seed of a story: what its stages are given."""

    number: int
    folder: Path
    recipe: Recipe
    quick: bool
    mine: Path | None


def runs_of(cfg: StoryConfig) -> list[tuple[str, str, dict]]:
    """(row, name, flags other than the row's) of every training from the base, quick rows first."""
    rows = list(QUICK_ROWS)
    if cfg.mine:
        from tools.lab import register_file  # noqa: PLC0415  (torch takes seconds to load)

        rows += register_file(cfg.mine)
    if not cfg.quick:
        rows += [row for row in (*PAPER, WITH_NTP) if row not in ("base", *QUICK_ROWS)]
    tried = [(row, f"{row}: lr={lr:g}", {"lr": lr}) for row in rows for lr in RATES if cfg.tune]
    ablated = [("MPO", name, flags) for name, flags in ABLATIONS.items() if cfg.ablate]
    return [*((row, row, {}) for row in rows), *tried, *ablated]


def tasks_of(cfg: StoryConfig, number: int) -> list[Task]:
    """A seed's base, its answers and pairs, and every row; own ones of an unchanged --mine only."""
    r, start = cfg.recipe, f"seed {number} "
    seed = Seed(number, cfg.out / f"seed-{number}", r, cfg.quick, cfg.mine)

    def task(name: str, needs: list, seconds: float, made: str, stage: str, *arguments) -> Task:
        function, needs = f"paper.stages:{stage}", tuple(start + need for need in needs)
        return Task(start + name, function, (seed, *arguments), seed.folder / made, needs, seconds)

    base, answers = ["base"], ["chains of thought", "direct answers", "descriptions"]
    made, sampling = "pairs.json", 0.003 * r.questions * r.samples
    last = "result.json" if cfg.quick else "mentions.json"  # of a model's measuring
    tasks = [
        task("base", [], 0.1 * (r.cap + r.cooldown), "base/base.json", "train_base"),
        task("base measured", base, 0.02 * r.test, f"base/{last}", "measure", "base", {}),
        task("chains of thought", base, sampling, made, "sample_answers", "new", "en"),
        task("direct answers", base, sampling / 8, made, "sample_answers", "new_direct", "direct"),
        task("descriptions", base, 0.01 * r.described, made, "drop_image"),
        task("pairs", answers, 1.0, made, "make_pairs"),
    ]
    seconds = 0.06 * r.steps + 0.015 * r.test
    for row, name, flags in runs_of(cfg):
        made = f"rows/{name}/{last}"
        if row not in (*PAPER, WITH_NTP):
            claim(seed.folder / "rows" / name, {"--mine": fingerprint([cfg.mine])}, "rename it")
        tasks.append(task(name, ["pairs"], seconds, made, "train_row", row, name, flags))
    return tasks


def begin(cfg: StoryConfig) -> dict:
    """Claim the folder for these settings; what story.json says of this run and earlier ones."""
    settings = asdict(cfg.recipe) | {"beta": BETA, "rates": CHOSEN_RATES} | SPEED
    claim(cfg.out, settings, "pass another --out")
    path = cfg.out / "story.json"
    before = read_json(path) if path.exists() else {}
    ask = f"git -C '{Path(__file__).parent}' describe --always --dirty 2> /dev/null"
    commit = subprocess.getoutput(ask) or "unknown"  # outside a checkout, or without git
    commits = [*before.get("commit", "").split(", "), commit]  # whose results lie here
    about = {
        "settings": settings,
        "seeds": list(cfg.seeds),
        "quick": cfg.quick,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{CORES} CPU cores, {platform.machine()}",
        "commit": ", ".join(dict.fromkeys(filter(None, commits))),
        "torch": importlib.metadata.version("torch"),
        "seconds": before.get("seconds", {}),  # of calls that came to their end
    }
    write_json(path, about)
    return about


def main() -> None:
    began, cfg = time.time(), parse_cli(StoryConfig)
    quick = cfg.quick or cfg.tiny
    default = (TUNING_SEED,) if cfg.tune else (1,) if quick else (1, 2, 3)
    cfg = replace(cfg, out=cfg.out / "story", seeds=cfg.seeds or default, quick=quick)
    tasks = [task for seed in cfg.seeds for task in tasks_of(cfg, seed)]  # --mine is read
    with alone_in(cfg.out, 5, "pass --out"):
        about = begin(cfg)
        run_tasks(tasks, cfg.jobs)
        about["seconds"]["rows"] = round(about["seconds"].get("rows", 0) + time.time() - began)
        write_json(cfg.out / "story.json", about)
        print(f"{write_report(cfg.out)}\nwith pictures: {cfg.out}/report.html")


if __name__ == "__main__":
    from paper import story  # under the name by which its worker processes know it

    run(story.main)
