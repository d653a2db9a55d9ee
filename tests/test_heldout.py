"""Held-out pairs: the numbers of a separate computation; the training knows nothing of them."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from conftest import add_a_vit_block, exact_weights, run_forks, short_run, train_in_process
from safetensors.torch import load_file

import plain
import train as train_module
from records import read_meta
from runtime import InputError, read_jsonl
from tokenizer import load_tokenizer
from tools.export import ExportConfig, export_checkpoint
from toy import write_world
from train import best_row, train
from weights import complete_checkpoints, load_model

SETS = ("toy_direct", "toy_two_images")
TIMES = ("tokens_per_s", "pairs_per_s", "mfu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two worlds of one kind: 16 pairs to train on, and 6 others of two data sets."""
    folder = tmp_path_factory.mktemp("heldout")
    write_world(folder, 16, 0)
    write_world(folder / "other", 8, 1)
    add_a_vit_block(folder / "model")
    exact_weights(folder / "model")
    meta = json.loads((folder / "other/meta.json").read_text())
    (folder / "other/heldout.json").write_text(json.dumps({name: meta[name] for name in SETS}))
    return folder


@pytest.fixture(scope="module")
def base(toy):
    flags = {"max_steps": 3, "drop_path": 0.2, "warmup": 0.0, "recompute": "off"}
    heldout = {"heldout": toy / "other/heldout.json", "heldout_every": 1, "keep_best": True}
    return short_run(toy, **flags, **heldout)


@pytest.fixture(scope="module")
def watched(base, toy):
    """A run with held-out pairs: its flags and metrics."""
    cfg = replace(base, out_dir=toy / "watched")
    return cfg, train_in_process(cfg)


def without(rows, prefix):
    return [{k: v for k, v in r.items() if not k.startswith((prefix, *TIMES))} for r in rows]


def test_heldout_metrics_are_those_of_the_plain_way(watched, toy):
    cfg, metrics = watched
    policy, reference = load_model(cfg.out_dir / "model"), load_model(toy / "model")
    tokenizer, last = load_tokenizer(toy / "model"), metrics[-1]
    losses, wins = {}, {}
    with torch.no_grad():
        for data_set in read_meta(cfg.heldout, policy.config.max_tiles):
            for n in range(len(data_set)):
                loss, (chosen, rejected) = plain.pair_loss(
                    policy, reference, tokenizer, data_set[n], cfg.beta, last["bco_shift"]
                )
                losses.setdefault(data_set.name, []).append(loss.item())
                wins.setdefault(data_set.name, []).append(chosen > rejected)
    every = sum(losses.values(), [])
    assert last["heldout/loss"] == pytest.approx(sum(every) / len(every), abs=1e-5)
    assert last["heldout/pairs"] == len(every) == 6
    for name in SETS:
        assert last[f"heldout/sets/{name}/pairs"] == len(losses[name])
        share = sum(wins[name]) / len(wins[name])
        assert last[f"heldout/sets/{name}/rewards/accuracy"] == pytest.approx(share)


def test_training_is_bit_equal_with_and_without_heldout_pairs(watched, base, toy):
    cfg = replace(base, out_dir=toy / "alone", heldout=None, heldout_every=50, keep_best=False)
    metrics = train_in_process(cfg)
    assert not any("heldout" in name for row in metrics for name in row)
    assert without(watched[1], "heldout/") == without(metrics, "heldout/")
    trained, expected = (load_model(c.out_dir / "model") for c in (watched[0], cfg))
    for (name, a), b in zip(trained.named_parameters(), expected.parameters()):
        assert torch.equal(a, b), name


def test_two_processes_score_heldout_pairs_as_one_does(watched, base, toy):
    cfg = replace(base, out_dir=toy / "two", reference="online")
    run_forks(2, train_in_process, cfg)
    rows = [row for _, row in read_jsonl(cfg.out_dir / "metrics.jsonl")]
    for row, expected in zip(rows, watched[1], strict=True):
        names = [name for name in expected if name.startswith("heldout/")]
        assert len(names) > 20
        for name in names:
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def test_the_best_step_is_named_and_kept(watched, base, toy, capsys):
    cfg, metrics = watched
    best = max(metrics, key=lambda r: (r["heldout/rewards/accuracy"], -r["heldout/loss"]))["step"]
    [kept] = complete_checkpoints(cfg.out_dir / "best")
    assert kept.name == f"step-{best:08d}"
    kept_model = cfg.out_dir / "best/model"
    export_checkpoint(ExportConfig(cfg.model_dir, kept_model, cfg.out_dir / "best"))
    saved, trained = load_file(kept / "shard-000-of-001.safetensors"), load_model(kept_model)
    assert all(torch.equal(p, saved[f"model/{name}"]) for name, p in trained.named_parameters())
    export_checkpoint(ExportConfig(cfg.model_dir, toy / "last", cfg.out_dir))
    last = load_model(cfg.out_dir / "model").state_dict()
    for name, p in load_model(toy / "last").state_dict().items():
        assert torch.equal(p, last[name]), "of a run's folder it is the last"
    train_in_process(cfg)  # nothing left to do
    assert f"best step by held-out pairs: {best} of 3" in capsys.readouterr().err


def test_of_equally_accurate_steps_and_for_sft_the_one_of_lower_loss_is_the_best():
    rows = [
        {"step": step, "heldout/loss": loss, "heldout/rewards/accuracy": accuracy}
        for step, (accuracy, loss) in enumerate([(0.5, 2.0), (0.5, 1.0), (0.4, 0.1)], 1)
    ]
    assert best_row([{"step": 0}, *rows])["step"] == 2
    assert best_row([{k: r[k] for k in ("step", "heldout/loss")} for r in rows])["step"] == 3


def test_keep_best_in_mid_run_keeps_and_names_the_best_step_since(base, toy, monkeypatch, capsys):
    cfg = replace(base, out_dir=toy / "later", keep_best=False)
    scores = {1: 0.9, 2: 0.2, 3: 0.4}  # the best step comes before best/ is asked for

    def scored(run):
        step = len(run.rows) + 1
        return {"heldout/rewards/accuracy": scores[step], "heldout/loss": 1.0}

    monkeypatch.setattr(train_module, "score_heldout", scored)
    begun = cfg.out_dir / "metrics.jsonl"
    monkeypatch.setattr(train_module, "asked_to_stop", begun.exists)  # after step 1
    train_in_process(cfg)
    monkeypatch.undo()
    monkeypatch.setattr(train_module, "score_heldout", scored)
    capsys.readouterr()
    train_in_process(replace(cfg, keep_best=True))
    assert [path.name for path in complete_checkpoints(cfg.out_dir / "best")] == ["step-00000003"]
    assert "best step by held-out pairs: 3 of 3" in capsys.readouterr().err


def test_ctrl_c_saves_and_the_same_command_continues_bit_for_bit(
    watched, base, toy, monkeypatch, capsys
):
    cfg = replace(base, out_dir=toy / "interrupted", save_every=100)
    metrics_of = train_module.step_metrics

    def interrupt(*args):  # in the middle of step 1
        signal.raise_signal(signal.SIGINT)
        return metrics_of(*args)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "step_metrics", interrupt)
        patch.setattr(train_module, "_STOP", [])
        with train_module.in_group(cfg.seed) as device:
            train(cfg, device)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert "asked to stop: saved step 1; the same command continues" in capsys.readouterr().err
    rows = without(train_in_process(cfg), "none")
    assert "1 of 3 steps are done" in capsys.readouterr().err
    assert rows == without(watched[1], "none")


def test_a_continued_run_is_not_scored_on_other_held_out_pairs(base, toy, tmp_path, monkeypatch):
    lines = (toy / "other/toy_text.jsonl").read_text().splitlines(keepends=True)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(lines))
    cfg = replace(base, out_dir=tmp_path / "run", loss="sft", heldout=pairs)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "asked_to_stop", lambda: True)
        train_in_process(cfg)
    train_in_process(replace(cfg, heldout=None, heldout_every=50, keep_best=False))
    pairs.write_text("".join(lines[::-1]))
    with pytest.raises(InputError, match=r"held-out pairs was .*, now .*; undo it"):
        train_in_process(cfg)


def test_held_out_pairs_that_are_trained_on_are_told(base, toy, tmp_path, capsys):
    cfg = replace(base, max_steps=1, out_dir=tmp_path / "run", reference_cache=toy / "reference")
    [row] = train_in_process(replace(cfg, heldout=toy / "toy_text.jsonl", limit=1))
    lines = (toy / "toy_text.jsonl").read_text().splitlines()
    assert row["heldout/pairs"] == len(lines) > 1, "all of them, whatever --limit"
    told = f"its lines stand in {cfg.meta}, too: a leak"
    assert f"toy_text.jsonl: {len(lines)} of {told}" in capsys.readouterr().err
    fresh = json.dumps(json.loads(lines[0]) | {"chosen": "No one knows."})
    (tmp_path / "some.jsonl").write_text(f"{lines[1]}\n{fresh}\n")
    train_in_process(replace(cfg, heldout=tmp_path / "some.jsonl", out_dir=tmp_path / "some"))
    assert f"some.jsonl: 1 of {told}" in capsys.readouterr().err
    train_in_process(replace(cfg, out_dir=tmp_path / "other"))
    assert "a leak" not in capsys.readouterr().err


def test_every_data_set_has_its_metrics_and_they_add_up(watched):
    for row in watched[1]:
        names = [name.split("/")[1] for name in row if name.startswith("sets/")]
        pairs = {name: row[f"sets/{name}/pairs"] for name in names}
        assert len(pairs) > 1 and sum(pairs.values()) == row["pairs"]
        nll = sum(row[f"sets/{name}/nll"] * n for name, n in pairs.items()) / row["pairs"]
        assert nll == pytest.approx(row["nll"], abs=1e-5)


def test_heldout_pairs_that_cannot_be_scored_are_refused_before_anything_is_made(base, tmp_path):
    pair = {"question": "word " * 500, "chosen": "3", "rejected": "4"}
    (tmp_path / "long.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "long.json").write_text(json.dumps({"long": {"annotation": "long.jsonl"}}))
    cfg = replace(base, out_dir=tmp_path / "run", max_length=400, heldout=tmp_path / "long.json")
    with pytest.raises(InputError, match=r"long.json: every pair is longer than 400"):
        train_in_process(cfg)
    assert list(cfg.out_dir.iterdir()) == []
