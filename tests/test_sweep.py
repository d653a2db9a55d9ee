"""Runs of several settings side by side; a run's curves and the programs its metrics go to."""

import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import train
from losses import LOSSES
from runtime import InputError, need, read_jsonl, run, write_json
from tools import sweep, track
from toy import write_world


def test_flags_with_several_values_are_run_in_every_combination():
    argv = "--config=a.json --lr 1e-4,1e-3 --loss=mpo,0.5*dpo+sft --mine m.py --no-compile".split()
    runs = sweep.combinations(argv)
    assert list(runs) == [
        "lr=1e-4,loss=mpo", "lr=1e-4,loss=0.5xdpo+sft",
        "lr=1e-3,loss=mpo", "lr=1e-3,loss=0.5xdpo+sft",
    ]  # fmt: skip
    flags = "--config=a.json --lr=1e-3 --loss=0.5*dpo+sft --mine=m.py --no-compile".split()
    assert runs["lr=1e-3,loss=0.5xdpo+sft"] == flags


def test_of_a_repeated_flag_the_last_counts_and_an_equal_value_is_run_once():
    runs = sweep.combinations("--lr 1,2 --loss mpo,dpo --lr=1e-4,1e-3,1e-4".split())
    assert list(runs) == [
        f"lr={lr},loss={loss}" for lr in ("1e-4", "1e-3") for loss in ("mpo", "dpo")
    ]
    assert runs["lr=1e-3,loss=dpo"] == ["--lr=1e-3", "--loss=dpo"]


def test_help_is_that_of_train_py_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools/sweep.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--lr_vision X" in done.stdout
    assert "a flag with several values" in done.stdout and "| torch" not in done.stderr


def sweep_here(monkeypatch, capsys, *argv):
    """(exit status, stdout) of tools/sweep.py in this process."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, argv)])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    try:
        run(sweep.main)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["--plan", "--bench", "--mine MINE,OTHER", "--out_dir a,b", "--reference_cache a,b"]
)
def test_what_a_sweep_would_ignore_is_refused(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text("def low(logps):\n    return -logps.policy_chosen / 9\n")
    monkeypatch.setitem(LOSSES, "low", None)
    del LOSSES["low"]
    words = words.replace("MINE", str(tmp_path / "own.py")).replace("OTHER", "other.py")
    status, error = sweep_here(monkeypatch, capsys, "--lr=1,2", *words.split())
    assert status == 2 and "no --plan or --bench, and one --mine, --out_dir and" in error


def test_a_sweep_shares_one_cache_ends_in_one_table_and_resumes(tmp_path, monkeypatch, capsys):
    write_world(tmp_path, 8, 0)
    monkeypatch.setitem(LOSSES, "low", None)  # so that it is gone after this test
    del LOSSES["low"]
    (tmp_path / "own.py").write_text("def low(logps):\n    return -logps.policy_chosen / 9\n")
    flags = [f"--config={tmp_path / 'train.json'}", "--max_steps=2", "--warmup=0", "--batch_size=4"]
    flags += [f"--out_dir={tmp_path / 'sweep'}", f"--mine={tmp_path / 'own.py'}"]
    swept = ["--loss", "mpo,low"]
    status, table = sweep_here(monkeypatch, capsys, *flags, *swept)
    names = list(sweep.combinations(swept))
    assert status == 0 and [line.split()[0] for line in table.splitlines()] == ["row", *names]
    assert (tmp_path / "sweep/rows.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sweep, "curve_panels", lambda *_, **__: b"drawn again")
    assert len(list((tmp_path / "sweep").rglob("part-*.jsonl"))) == 1
    losses = [row["loss"] for _, row in read_jsonl(tmp_path / "sweep" / names[0] / "metrics.jsonl")]
    assert len(losses) == 2
    before = {p: p.read_bytes() for p in (tmp_path / "sweep").rglob("metrics.jsonl")}
    assert sweep_here(monkeypatch, capsys, *flags, *swept) == (0, table)
    assert before == {p: p.read_bytes() for p in (tmp_path / "sweep").rglob("metrics.jsonl")}
    status, error = sweep_here(monkeypatch, capsys, *flags)
    assert status == 2 and "nothing to compare" in error


def test_an_own_file_that_no_run_of_a_sweep_takes_is_refused(tmp_path, monkeypatch, capsys):
    write_world(tmp_path, 8, 0)
    (tmp_path / "own.py").write_text("def spare(logps):\n    return -logps.policy_chosen\n")
    monkeypatch.setitem(LOSSES, "spare", None)  # so that it is gone after this test
    del LOSSES["spare"]
    flags = [f"--config={tmp_path / 'train.json'}", f"--mine={tmp_path / 'own.py'}"]
    status, error = sweep_here(monkeypatch, capsys, *flags, "--loss=sft,dpo")
    assert status == 2 and "--loss has nothing of" in error and "name spare there" in error


def test_runs_whose_reference_scores_otherwise_have_a_cache_each(tmp_path, monkeypatch, capsys):
    write_world(tmp_path, 8, 0)
    flags = [f"--config={tmp_path / 'train.json'}", "--max_steps=1", "--warmup=0", "--batch_size=4"]
    flags += [f"--out_dir={tmp_path / 'sweep'}", "--dtype=fp32,bf16", "--beta=0.1,0.2"]
    status, table = sweep_here(monkeypatch, capsys, *flags)
    assert status == 0 and len(table.splitlines()) == 5
    claims = [path.parent.parent.name for path in (tmp_path / "sweep").rglob("run.json")]
    assert sorted(claims) == ["dtype=bf16,beta=0.1", "dtype=bf16,beta=0.2", "sweep"]


def test_rows_beside_adapters_leave_out_the_one_that_moves_a_second_model(
    tmp_path, monkeypatch, capsys
):
    write_world(tmp_path, 8, 0)
    monkeypatch.setattr(sweep, "ROWS", {row: sweep.ROWS[row] for row in ("SFT", "TR-DPO")})
    flags = f"--config={tmp_path / 'train.json'} --loss=all --lora_rank=2 --max_steps=2 --warmup=0"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), f"--out_dir={tmp_path / 'rows'}"])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    train.main()
    assert "TR-DPO is left out" in capsys.readouterr().err
    assert (tmp_path / "rows/SFT/model").is_dir() and not (tmp_path / "rows/TR-DPO").exists()


def test_the_users_flags_reach_the_rows_that_take_them_and_no_others(tmp_path, monkeypatch):
    write_world(tmp_path, 8, 0)
    runs, own = {}, "def soft(logps, label_smoothing=0.3):\n    return -logps.policy_chosen\n"
    (tmp_path / "own.py").write_text(own)
    monkeypatch.setitem(LOSSES, "soft", None)  # so that it is gone after this test
    del LOSSES["soft"]
    monkeypatch.setattr(sweep, "train_all", lambda rows, *_: runs.update(rows))
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    flags = f"train.py --config {tmp_path / 'train.json'} --loss all --mine {tmp_path / 'own.py'}"
    names = "label_smoothing", "reference_update_every", "reference_update_mix"
    told = "--label_smoothing 0.2 --reference_update_every 3 --reference_update_mix 0.5"
    for more, smoothing, own_smoothing, update in (
        ("", 0.1, None, (5, 0.9)),
        (told, 0.2, 0.2, (3, 0.5)),
    ):
        monkeypatch.setattr(sys, "argv", f"{flags} --batch_size 4 {more}".split())
        train.main()
        found = {name: tuple(getattr(cfg, flag) for flag in names) for name, cfg in runs.items()}
        expected = dict.fromkeys(found, (None, 0, 0.9))
        for row in ("cDPO", "cDPO+", "RobustDPO", "RobustDPO+"):
            expected[row] = (smoothing, 0, 0.9)
        expected |= {"soft": (own_smoothing, 0, 0.9), "TR-DPO": (None, *update)}
        assert found == expected and len(found) == len(sweep.ROWS) + 1


def test_a_run_that_diverges_ends_alone_and_is_not_started_again(tmp_path, monkeypatch, capsys):
    write_world(tmp_path, 8, 0)
    flags = [f"--config={tmp_path / 'train.json'}", "--max_steps=2", "--warmup=0", "--batch_size=4"]
    flags += [f"--out_dir={tmp_path / 'sweep'}", "--loss=sft", "--lr=1e20,1e-3"]
    status, table = sweep_here(monkeypatch, capsys, *flags)
    _, diverged, well = table.splitlines()
    assert status == 0 and diverged.startswith("lr=1e20, failed at step 2  ")
    assert well.startswith("lr=1e-3  ") and (tmp_path / "sweep/lr=1e-3/model").is_dir()
    monkeypatch.setattr(sweep, "train", lambda cfg, device: list(cfg.out_dir.glob("model/*"))[0])
    assert sweep_here(monkeypatch, capsys, *flags) == (0, table)


def test_a_sweep_whose_runs_all_diverge_at_once_ends_in_its_table(tmp_path, monkeypatch, capsys):
    write_world(tmp_path, 8, 0)

    def diverge(cfg, device):
        write_json(cfg.out_dir / "failed-step-1.json", {"step": 1})
        raise train.Diverged("loss is nan at step 1")

    monkeypatch.setattr(sweep, "train", diverge)
    flags = [f"--config={tmp_path / 'train.json'}", f"--out_dir={tmp_path / 'sweep'}", "--lr=1,2"]
    status, table = sweep_here(monkeypatch, capsys, *flags)
    assert status == 0 and table.count("failed at step 1") == 2


def test_a_run_has_left_no_model_behind_as_the_next_begins(tmp_path, monkeypatch, capsys):
    """A GPU that the plan fills has no room for both."""
    write_world(tmp_path, 8, 0)
    models, make = [], train.sharded_model

    def made(*arguments):
        assert not any(model() for model in models)
        models.append(weakref.ref(model := make(*arguments)))
        return model

    monkeypatch.setattr(train, "sharded_model", made)
    flags = [f"--config={tmp_path / 'train.json'}", "--max_steps=2", "--warmup=0", "--batch_size=4"]
    flags += [f"--out_dir={tmp_path / 'sweep'}", "--loss=sft", "--lr=1e-4,1e-3", "--dtype=bf16"]
    gc.disable()  # it may come in time by chance
    try:
        assert sweep_here(monkeypatch, capsys, *flags)[0] == 0
    finally:
        gc.enable()
    assert len(models) == 2


# --------------------------------------------------------------------------- where people look


class Writer:
    """Keeps what a SummaryWriter or a run of wandb would be given."""

    def __init__(self):
        self.given = []

    def add_scalar(self, *values):
        self.given.append(values)

    def log(self, row, step):
        self.given.append((row, step))


@dataclass
class Asked:
    """The flags of a run that say where its metrics go."""

    out_dir: Path
    tensorboard: bool = True
    wandb: str = "a project"


def test_each_row_goes_to_tensorboard_and_wandb_as_they_take_it(tmp_path, monkeypatch):
    board, run, asked = Writer(), Writer(), {}
    boards = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    programs = SimpleNamespace(init=lambda **settings: asked.update(settings) or run)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", boards)
    monkeypatch.setitem(sys.modules, "wandb", programs)
    row = {"step": 3, "loss": 0.5}
    for write in track.open_writers(Asked(tmp_path), done=2):
        write(row)
    assert board.given == [("step", 3, 3), ("loss", 0.5, 3)]
    assert run.given == [(row, 3)]
    assert asked["project"] == "a project" and asked["resume"] == "allow"


def test_a_continued_run_hides_no_step_that_it_has_done_after_a_skipped_one(tmp_path, monkeypatch):
    purged = []
    boards = SimpleNamespace(SummaryWriter=lambda folder, purge_step: purged.append(purge_step))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", boards)
    for rows in ([], [{"step": 1}, {"step": 3}]):
        track.Tracker(Asked(tmp_path, wandb=""), rows, 9)
    assert purged == [1, 4]


def test_a_missing_package_is_named_with_what_to_do():
    with pytest.raises(InputError, match="--this needs nosuch: pip install nosuch"):
        need("nosuch", "--this")
    for name, value in {"tensorboard": True, "wandb": "a project"}.items():
        if not find_spec(name):
            with pytest.raises(InputError, match=f"--{name} needs {name}"):
                train.TrainConfig(**{name: value})


def test_curves_are_drawn_at_the_end_and_not_of_a_handful_of_steps(tmp_path, monkeypatch):
    cfg = train.TrainConfig(out_dir=tmp_path)
    rows = [{"step": n, "loss": 1 / n, "loss/own": 0.1, "nll": float("nan")} for n in range(1, 30)]
    track.Tracker(cfg, rows[:5], 5).draw(last=True)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        track.Tracker(cfg, rows, 29).draw(last=True)
    assert not list(tmp_path.iterdir())
    track.Tracker(cfg, rows, 29).draw(last=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
