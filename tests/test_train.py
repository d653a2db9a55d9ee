"""The training loop: the same update for any number of processes, and nothing lost on a crash."""

import copy
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    add_a_vit_block,
    free_port,
    run_forks,
    short_run,
    start_forks,
    train_in_process,
)
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import runtime
import train as train_module
from data import PairData, epoch_order
from losses import LOSSES, Objective, PairLogps
from records import read_meta
from runtime import Failure, InputError, process_group, read_json, run
from tools.doctor import diagnose
from tools.plan import named_config
from toy import write_world
from train import TrainConfig, compare_start, lr_at, main, make_optimizer, with_recipe
from weights import load_model

TIMES = ("tokens_per_s", "pairs_per_s", "mfu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_world(folder, 16, 0)
    add_a_vit_block(folder / "model")
    return folder


@pytest.fixture(scope="module")
def base(toy):
    """Flags of a short run: 4 steps of 8 pairs, in several packs a step."""
    return short_run(toy, max_steps=4, warmup=0.25, reference_cache=toy / "reference")


def run_here(cfg):
    """Train in this process; returns the metrics of all steps."""
    train_in_process(cfg)
    return read_metrics(cfg.out_dir)


def read_metrics(out_dir):
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def command(cfg, processes=1):
    flags = [f"--{k}={v}" for k, v in vars(cfg).items() if not isinstance(v, bool | None)]
    flags += [f"--{'' if v else 'no-'}{k}" for k, v in vars(cfg).items() if isinstance(v, bool)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc_per_node={processes}"]
    return [*(start if processes > 1 else [sys.executable]), str(ROOT / "train.py"), *flags]


def run_there(cfg, processes):
    """Train in processes of their own."""
    run_forks(processes, train_in_process, cfg)
    return read_metrics(cfg.out_dir)


def weights(cfg):
    """The fp32 weights of the last checkpoint, by name, whichever processes wrote them."""
    newest = sorted((cfg.out_dir / "checkpoints").glob("step-*"))[-1]
    parts = [load_file(p) for p in sorted(newest.glob("shard-*.safetensors"))]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0] if k.startswith("model/")}


def close(a, b, bound=1e-6):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert set(x) == set(y)
        tied = abs(x.get("rewards/margin", 1)) < 1e-4  # rounding alone decides who is ahead
        for name in x:
            if tied and name.endswith("rewards/accuracy"):
                continue
            assert x[name] == pytest.approx(y[name], rel=1e-5, abs=bound * 10), (x["step"], name)


def close_weights(a, b):
    expected = weights(b)
    for name, w in weights(a).items():
        x = expected[name]
        if name.endswith("attn.qkv.bias"):
            # a key's bias adds the same to all scores of a query: softmax loses it, its gradient
            # is rounding alone, and Adam makes steps of any gradient's sign
            (q, k, v), (other_q, other_k, other_v) = w.chunk(3), x.chunk(3)
            torch.testing.assert_close(k, other_k, atol=1e-5, rtol=0, msg=name)
            w, x = torch.cat([q, v]), torch.cat([other_q, other_v])
        torch.testing.assert_close(w, x, atol=1e-6, rtol=0, msg=name)


# --------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def straight(base, toy):
    """An uninterrupted run in one process."""
    cfg = replace(base, out_dir=toy / "straight")
    return cfg, run_here(cfg)


def test_step_one_starts_where_theory_says(straight):
    _, metrics = straight
    first = metrics[0]
    expected = 0.8 * math.log(2) + 0.2 * 2 * math.log(2) + first["nll"]
    assert first["loss"] == pytest.approx(expected, abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margin", "bco_shift", "lr"):
        assert first[name] == 0


def test_metrics_carry_the_promised_names(straight):
    _, metrics = straight
    promised = """step loss loss/dpo loss/bco loss/sft rewards/chosen rewards/rejected
        rewards/margin rewards/accuracy bco_shift logps/chosen logps/rejected lr grad_norm nll
        logratio_per_token/chosen logratio_per_token/rejected length/chosen length/rejected"""
    assert set(promised.split()) <= set(metrics[0])
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]


def test_the_exported_model_is_the_trained_one_in_the_official_layout(straight, toy):
    cfg, _ = straight
    exported, start = load_model(cfg.out_dir / "model"), load_model(toy / "model")
    trained = weights(cfg)
    moved = 0
    for name, p in exported.named_parameters():
        assert torch.equal(p, trained[f"model/{name}"].bfloat16().float())
        moved += not torch.equal(p, dict(start.named_parameters())[name])
    assert moved > 30
    for name in ("config.json", "tokenizer.json"):
        assert (cfg.out_dir / "model" / name).exists()


def test_two_processes_make_the_same_updates_as_one(straight, base, toy):
    cfg, metrics = straight
    two = replace(base, out_dir=toy / "two")
    close(run_there(two, 2), metrics)
    close_weights(two, cfg)


def test_how_pairs_are_packed_changes_no_update(straight, base, toy):
    cfg, metrics = straight
    other = replace(base, out_dir=toy / "packs", pack_tokens=4000, head_rows=5)
    found = run_here(other)
    close(found, metrics, bound=1e-5)
    for name, w in weights(other).items():
        torch.testing.assert_close(w, weights(cfg)[name], atol=1e-5, rtol=0, msg=name)


def test_an_online_reference_gives_the_numbers_of_the_cached_one(straight, base, toy, monkeypatch):
    _, metrics = straight
    monkeypatch.setattr("train.response_keys", None)  # images are hashed for cached ones alone
    close(run_here(replace(base, out_dir=toy / "online", reference="online")), metrics)


# --------------------------------------------------------------------------- crashes


def kill_after(cfg, processes, lines):
    """Start a run, kill -9 its processes once metrics.jsonl has `lines` lines."""
    forks = start_forks(processes, train_in_process, cfg)
    wait_for_steps(cfg, forks, lines)
    for fork in forks:
        fork.kill()
    for fork in forks:
        fork.join()
    ended = [fork.exitcode for fork in forks]  # a lost peer may end one before its own signal does
    assert ended[0] == -signal.SIGKILL and 0 not in ended, "it ended before it was killed"


def wait_for_steps(cfg, forks, lines):
    path, deadline = cfg.out_dir / "metrics.jsonl", time.time() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert time.time() < deadline and all(fork.is_alive() for fork in forks)
        time.sleep(0.001)


def test_a_killed_run_continues_bit_for_bit(base, toy):
    straight = replace(base, out_dir=toy / "drop", drop_path=0.2)
    expected = run_here(straight)
    killed = replace(straight, out_dir=toy / "killed")
    kill_after(killed, 1, 3)
    assert run_here(killed) == expected
    for name, w in weights(killed).items():
        assert torch.equal(w, weights(straight)[name]), name


def run_that_skips(step, base, toy, folder):
    """A run of five steps of a pair each, of which that of one step is too long."""
    lines = (toy / "toy_text.jsonl").read_text().splitlines(keepends=True)[:1] * 5
    path, cfg = folder / "pairs.jsonl", replace(base, batch_size=1, warmup=0.0, max_steps=0)
    path.write_text("".join(lines))
    line = epoch_order(read_meta(path, 1), cfg.seed, 0)[step, 1]
    long = json.loads(lines[line]) | {"question": "far too long " * 99}
    path.write_text("".join(lines[:line] + [json.dumps(long) + "\n"] + lines[line + 1 :]))
    cfg = replace(cfg, meta=path, loss="sft", max_length=300, save_every=1, keep=9)
    return replace(cfg, out_dir=folder / "run", reference_cache=None)


def test_a_run_whose_first_step_is_skipped_is_checked_at_its_second(base, toy, tmp_path, capsys):
    cfg = replace(run_that_skips(0, base, toy, tmp_path), loss="dpo")
    assert [row["step"] for row in run_here(cfg)] == [2, 3, 4, 5]
    assert "start check: rewards are 0, so the first loss is 0.6931" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "takers"), [("mpo", "dpo, bco"), ("orpo", "no term"), ("half+sft", "half")]
)
def test_a_run_says_which_terms_its_beta_goes_to(base, tmp_path, monkeypatch, capsys, loss, takers):
    """TRL calls orpo's weight beta; an objective of one's own may have another default."""
    half = lambda logps, beta=2.0: -beta * logps.policy_chosen / 99  # noqa: E731
    monkeypatch.setitem(LOSSES, "half", Objective(half, needs_reference=False))
    run_here(replace(base, loss=loss, max_steps=1, warmup=0, out_dir=tmp_path))
    assert f"--beta 0.1 goes to {takers} of --loss {loss}" in capsys.readouterr().err


@pytest.mark.parametrize(("skipped", "steps"), [(1, [1, 3, 4, 5]), (4, [1, 2, 3, 4])])
def test_a_run_with_a_skipped_step_continues_bit_for_bit(base, toy, tmp_path, skipped, steps):
    """AdamW has made a step less than the run from there on; a run never ends with such a step."""
    cfg = run_that_skips(skipped, base, toy, tmp_path)
    expected = run_here(cfg)
    assert [row["step"] for row in expected] == steps
    assert expected[-1]["lr"] == lr_at(steps[-1] - 1, steps[-1], cfg), "the run ends there"
    for step in steps[-2:]:
        shutil.rmtree(cfg.out_dir / f"checkpoints/step-0000000{step}")
    assert run_here(cfg) == expected


def run_node(cfg, port):
    """One of two nodes: torchrun's agent with one process, in a session of its own."""
    os.setsid()
    node = LaunchConfig(2, 2, 1, run_id="mpo", rdzv_backend="c10d", start_method="fork")
    node.rdzv_endpoint, node.local_addr = f"127.0.0.1:{port}", "127.0.0.1"
    node.max_restarts, node.monitor_interval = 0, 0.05
    elastic_launch(node, train_in_process)(cfg)


def test_a_run_of_two_nodes_loses_one_and_continues_bit_for_bit(base, toy):
    straight = replace(base, out_dir=toy / "two-straight", drop_path=0.2)
    expected = run_there(straight, 2)
    killed = replace(straight, out_dir=toy / "two-killed", async_save="on")
    nodes = start_forks(2, run_node, killed, free_port())
    wait_for_steps(killed, nodes, 3)
    os.killpg(nodes[1].pid, signal.SIGKILL)  # the agent and its process
    for node in nodes:
        node.join(60)
    assert nodes[1].exitcode == -signal.SIGKILL and nodes[0].exitcode == 1
    run_forks(2, run_node, killed, free_port())
    assert read_metrics(killed.out_dir) == expected
    for name, w in weights(killed).items():
        assert torch.equal(w, weights(straight)[name]), name


def test_a_checkpoint_of_two_processes_continues_in_one(straight, base, toy):
    cfg, metrics = straight
    mixed = replace(base, out_dir=toy / "mixed")
    kill_after(mixed, 2, 3)
    assert (mixed.out_dir / "checkpoints" / "step-00000002").exists()
    damaged = replace(base, out_dir=toy / "damaged")
    shutil.copytree(mixed.out_dir, damaged.out_dir)
    shard = sorted(damaged.out_dir.glob("checkpoints/*/shard-001-of-002.safetensors"))[-1]
    *content, last = shard.read_bytes()
    shard.write_bytes(bytes([*content, last ^ 1]))
    with pytest.raises(InputError, match="shard-001-of-002.safetensors is not what was saved"):
        run_here(damaged)
    close(run_here(mixed), metrics)
    close_weights(mixed, cfg)


def test_two_runs_do_not_write_one_folder(base, toy, monkeypatch):
    cfg = replace(base, out_dir=toy / "taken")
    cfg.out_dir.mkdir()
    monkeypatch.setattr("train.LOCK_SECONDS", 0.3)
    with open(cfg.out_dir / ".lock", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="taken: another run works there; wait"):
            train_in_process(cfg)
    train_in_process(replace(cfg, max_steps=1, warmup=0.0))


def test_a_step_is_one_line_of_a_terminal(base, toy, capfd):
    run_here(replace(base, out_dir=toy / "line", max_steps=2))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step 2/2 ")]
    assert len(lines) == 1 and len(lines[0]) <= 80 and re.search("loss .* left 0:00:", lines[0])


def test_sigterm_saves_and_ends_cleanly(base, toy, straight):
    cfg = replace(base, out_dir=toy / "sigterm", save_every=100)
    process = subprocess.Popen(command(cfg), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stderr.read()
    assert process.wait() == 0
    assert "asked to stop: saved step" in said
    assert run_here(cfg) == straight[1]


def test_asked_to_stop_at_its_last_step_a_run_ends_as_usual(base, tmp_path, monkeypatch):
    cfg = replace(base, loss="sft", out_dir=tmp_path, max_steps=2)
    metrics = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(train_module, "asked_to_stop", lambda: len(read_metrics(tmp_path)) == 1)
    run_here(cfg)
    assert metrics.exists() and (tmp_path / "model/config.json").exists()


def test_a_second_signal_counts_only_later_than_torchrun_repeats_the_first(monkeypatch):
    monkeypatch.setattr(train_module, "_STOP", [])
    for _ in range(2):
        train_module.ask_to_stop(signal.SIGINT, None)
    later = time.monotonic() + 3
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        train_module.ask_to_stop(signal.SIGINT, None)


def test_ctrl_c_and_sigterm_both_ask_for_a_checkpoint(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(train_module, "train", lambda cfg, process: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    main()
    assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM), train_module.ask_to_stop)


@pytest.mark.parametrize(
    "change", [{"max_steps": 1}, {"limit": 8, "max_steps": 0}, {"limit": 3, "max_steps": 0}]
)
def test_a_run_in_which_no_weight_would_move_is_refused(base, toy, tmp_path, change):
    cfg = replace(base, out_dir=tmp_path / "run", reference_cache=toy / "reference", **change)
    with pytest.raises(
        InputError, match="lr 0.001 is not .*: 1 steps of .* allow 0: pass more --epochs"
    ):
        run_here(cfg)


@pytest.mark.parametrize("flags", [{"warmup": 500.0}, {"warmup": 0.0, "decay": 500}])
def test_a_rate_that_the_run_never_reaches_is_told(base, toy, tmp_path, capsys, flags):
    run_here(replace(base, loss="sft", out_dir=tmp_path / "run", **flags))
    told = "lr 0.001 is not reached: 4 steps of warm-up and decay allow [0-9.]+e-06"
    assert re.search(told, capsys.readouterr().err)


def test_a_run_without_any_gradient_fails_and_saves_no_model(base, tmp_path):
    """The weight of its loss is one that float32 takes for 0."""
    with pytest.raises(Failure, match="no weight has changed, so nothing is saved"):
        run_here(replace(base, out_dir=tmp_path / "run", loss="1e-320*sft"))
    assert not (tmp_path / "run" / "model").exists()


def test_adapters_where_no_block_of_the_vit_is_run_are_refused(base, tmp_path):
    shutil.copytree(base.model_dir, tmp_path / "model")
    config = json.loads((base.model_dir / "config.json").read_text()) | {"select_layer": 0}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    flags = {"model_dir": tmp_path / "model", "lora_rank": 2, "lora_parts": "vision"}
    with pytest.raises(InputError, match="nothing to train"):
        run_here(replace(base, **flags, loss="sft", max_steps=2, out_dir=tmp_path / "run"))


def test_a_finished_run_whose_metrics_were_deleted_is_exported_again(base, tmp_path, capsys):
    cfg = replace(base, loss="sft", out_dir=tmp_path / "run")
    run_here(cfg)
    (cfg.out_dir / "metrics.jsonl").unlink()
    shutil.rmtree(cfg.out_dir / "model")
    assert run_here(cfg) == [] and (cfg.out_dir / "model/config.json").exists()
    assert "metrics.jsonl: the rows of steps until 4 are gone" in capsys.readouterr().err


def test_a_checkpoint_of_other_flags_is_refused(straight):
    cfg, _ = straight
    with pytest.raises(InputError, match="beta was 0.1, now 0.2"):
        run_here(replace(cfg, beta=0.2))
    with pytest.raises(InputError, match="max_steps was 4, now 3"):  # a cosine knows its end
        run_here(replace(cfg, max_steps=3))


def test_what_a_checkpoint_refuses_is_told_before_a_reference_is_scored(
    base, tmp_path, monkeypatch
):
    cfg = replace(base, out_dir=tmp_path / "run", max_steps=1, warmup=0.0)
    run_here(cfg)
    monkeypatch.setattr("train.score", None)
    with pytest.raises(InputError, match="max_tiles was .*, now 2; .*undo it"):
        run_here(replace(cfg, max_tiles=2, reference_cache=tmp_path / "reference"))
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("reference", ["online", "cached"])
def test_a_run_is_not_continued_from_other_start_weights(base, toy, tmp_path, reference):
    write_world(tmp_path / "other", 8, 5)
    cfg = replace(base, out_dir=tmp_path / "run", reference=reference)
    run_here(cfg)
    shutil.copytree(toy / "model", tmp_path / "moved/model")
    run_here(replace(cfg, model_dir=tmp_path / "moved/model"))
    cfg = replace(cfg, model_dir=tmp_path / "other/model")
    with pytest.raises(InputError, match="start weights was .* undo it or take a new"):
        run_here(replace(cfg, reference_cache=tmp_path / "reference"))


def test_a_run_is_not_continued_on_pairs_that_were_edited(base, toy, tmp_path):
    lines = (toy / "toy_text.jsonl").read_text().splitlines(keepends=True) * 8
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    cfg = replace(base, meta=tmp_path / "pairs.jsonl", out_dir=tmp_path / "run", warmup=0.0)
    cfg = replace(cfg, reference_cache=None)
    run_here(cfg)
    times = (tmp_path / "pairs.jsonl").stat()
    (tmp_path / "pairs.jsonl").write_text("".join(lines[::-1]))
    os.utime(tmp_path / "pairs.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match="pairs was .*, now .*; undo it"):
        run_here(cfg)


def test_a_run_is_continued_where_its_data_folder_has_moved(base, toy, tmp_path):
    cfg = replace(base, loss="sft", out_dir=tmp_path / "run", max_steps=2)
    expected = run_here(cfg)
    shutil.copytree(toy / "images", tmp_path / "moved/images")
    for path in (*toy.glob("*.jsonl"), toy / "meta.json"):
        shutil.copy(path, tmp_path / "moved")
    cfg = replace(cfg, meta=tmp_path / "moved/meta.json")
    assert run_here(cfg) == expected


def test_a_run_is_not_continued_with_objectives_of_its_own_that_were_edited(base, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def double(logps):\n    return -2 * logps.policy_chosen\n")
    cfg = replace(base, loss="sft", mine=own, out_dir=tmp_path / "run")
    run_here(cfg)
    own.write_text(own.read_text().replace("2", "3"))
    with pytest.raises(InputError, match=r"content of .*own.py was .*, now .*; undo it"):
        run_here(cfg)


def test_a_run_is_not_continued_with_a_tokenizer_that_was_edited(base, toy, tmp_path):
    shutil.copytree(toy / "model", tmp_path / "model")
    cfg = replace(base, model_dir=tmp_path / "model", loss="sft", out_dir=tmp_path / "run")
    run_here(cfg)
    with open(tmp_path / "model/tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="pairs was .*, now .*; undo it"):
        run_here(cfg)


def test_the_reference_may_lie_in_the_folder_of_the_run_but_not_in_its_model(base, tmp_path):
    cfg = replace(base, out_dir=tmp_path / "run", max_steps=2, warmup=0.0)
    run_here(replace(cfg, reference_cache=cfg.out_dir))
    with pytest.raises(InputError, match=r"reference_cache lies in .*run/model"):
        run_here(replace(cfg, reference_cache=cfg.out_dir / "model"))


def test_a_reference_cache_of_other_weights_is_refused(base, toy, straight):
    other = toy / "other"
    write_world(other, 8, 5)
    cfg = replace(base, model_dir=other / "model", out_dir=toy / "foreign")
    with pytest.raises(InputError, match="made with another weights"):
        run_here(cfg)


def test_a_changed_digit_in_the_reference_cache_is_refused_by_file_and_line(base, toy, straight):
    cache = shutil.copytree(toy / "reference", toy / "changed-reference")
    part = sorted(cache.glob("part-*.jsonl"))[0]
    lines = part.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"logp": -', '"logp": -1')
    part.write_text("".join(lines))
    cfg = replace(base, reference_cache=cache, out_dir=toy / "changed")
    with pytest.raises(InputError, match=rf"{part.name} line 2: not as it was written"):
        run_here(cfg)


def test_a_run_refuses_at_its_start_to_overwrite_its_own_model(base, toy, monkeypatch):
    monkeypatch.setattr(train_module, "Run", None)
    with pytest.raises(InputError, match="overlap"):
        run_here(replace(base, out_dir=base.model_dir.parent))


def test_a_shared_reference_cache_is_not_scored_again(straight, base, toy):
    parts = list((toy / "reference").glob("part-*.jsonl"))
    before = {p: p.read_bytes() for p in parts}
    run_here(replace(base, out_dir=toy / "again", loss="dpo", max_steps=2))
    assert {p: p.read_bytes() for p in parts} == before


def test_only_the_first_run_on_some_pairs_looks_them_through_for_the_reference(
    base, toy, tmp_path, monkeypatch
):
    for folder in ("images", "toy_steps.jsonl"):
        (shutil.copytree if folder == "images" else shutil.copy)(toy / folder, tmp_path / folder)
    entry = {"root": "images", "annotation": "toy_steps.jsonl", "repeat_time": 1}
    (tmp_path / "meta.json").write_text(json.dumps({"own": entry}))
    cfg = replace(base, meta=tmp_path / "meta.json", reference_cache=tmp_path / "reference")
    planned = []
    fit = PairData.fit
    monkeypatch.setattr(PairData, "fit", lambda s, r: planned.append(r.name) or fit(s, r))

    def pairs_planned(name):
        planned.clear()
        run_here(replace(cfg, out_dir=tmp_path / name, max_steps=2))
        return Counter(Counter(planned).values())

    # those of the last step are planned once more: it may be empty
    assert pairs_planned("first") == {2: 8, 3: 8}
    assert pairs_planned("second") == {1: 8, 2: 8}
    lines = (tmp_path / "toy_steps.jsonl").read_text().splitlines()
    (tmp_path / "toy_steps.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert pairs_planned("other order") == {2: 8, 3: 8}
    for image in (tmp_path / "images").glob("*.png"):
        image.write_bytes(image.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"toy_steps.jsonl line .*delete covers-\*.json"):
        pairs_planned("changed images")


def count_planned(cfg, out):
    """A run whose process writes down how many pairs it plans."""
    fit, planned = PairData.fit, []
    PairData.fit = lambda self, record: planned.append(record) or fit(self, record)
    train_in_process(cfg)
    (out / f"planned-{os.environ['RANK']}").write_text(str(len(planned)))


def test_processes_share_the_planning_of_the_reference_and_its_numbers_stay(base, tmp_path):
    cfg = replace(base, max_steps=3, warmup=0.0, reference_cache=tmp_path / "one")
    two = replace(cfg, reference_cache=tmp_path / "two", out_dir=tmp_path)
    train_in_process(replace(cfg, out_dir=tmp_path / "run"))
    run_forks(2, count_planned, two, tmp_path)
    planned = [int(path.read_text()) for path in tmp_path.glob("planned-*")]
    # every step of training, two or one of the reference's, and the last step, which may be empty
    assert sorted(planned) == [24 + 8 + 8, 24 + 16 + 8]
    rows = [[], []]
    for place, folder in zip(rows, (cfg.cache_folder, two.cache_folder)):
        for part in folder.glob("part-*.jsonl"):
            place += runtime.read_whole_lines(part)
    scores = [{row["key"]: row["logp"] for row in place} for place in rows]
    assert [len(place) for place in rows] == [len(score) for score in scores] == [48, 48]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


# --------------------------------------------------------------------------- objectives


def test_overfitting_eight_pairs_raises_the_margin_and_lowers_the_nll(base, toy):
    cfg = replace(base, out_dir=toy / "overfit", limit=8, epochs=40, max_steps=0, lr=3e-3)
    metrics = run_here(replace(cfg, pack_tokens=4000, save_every=1000))
    assert metrics[-1]["rewards/margin"] > 1
    assert metrics[-1]["nll"] < 0.5 * metrics[0]["nll"]


def test_an_objective_that_sorts_the_step_does_not_depend_on_processes_or_packs(base, toy):
    cfg = replace(base, loss="aot+sft", max_steps=3)
    one = run_here(replace(cfg, out_dir=toy / "aot1"))
    two = run_there(replace(cfg, out_dir=toy / "aot2", pack_tokens=900), 2)
    close(two, one, bound=1e-5)


def test_computed_over_the_whole_step_an_objective_trains_as_pair_by_pair(
    straight, base, toy, monkeypatch
):
    for name in ("dpo", "bco", "sft"):
        monkeypatch.setitem(LOSSES, name, replace(LOSSES[name], whole_step=True))
    close(run_here(replace(base, out_dir=toy / "whole-step")), straight[1])


def test_stochastic_depth_is_drawn_anew_in_each_step_and_pack(straight, base, toy, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    [first, _] = run_here(replace(base, loss="sft", drop_path=0.2, max_steps=2, out_dir=toy / "dp"))
    assert len(seeds) > 4 and len(set(seeds)) == len(seeds)
    assert first["nll"] != straight[1][0]["nll"]


def test_sft_reads_no_rejected_response_and_needs_no_reference(base, toy, monkeypatch):
    monkeypatch.setattr("train.response_keys", None)
    metrics = run_here(replace(base, loss="sft", out_dir=toy / "sft", reference_cache=None))
    assert "rewards/chosen" not in metrics[0] and "logps/rejected" not in metrics[0]
    assert metrics[0]["loss"] == metrics[0]["nll"]
    assert not (toy / "sft" / "reference").exists()


def test_a_moving_reference_pulls_rewards_to_zero_and_resumes(base, toy):
    cfg = replace(base, loss="dpo", reference="online", reference_update_every=3)
    cfg = replace(cfg, reference_update_mix=1.0, save_every=1)
    straight = replace(cfg, out_dir=toy / "tr")
    expected = run_here(straight)
    assert expected[2]["rewards/margin"] != 0
    assert expected[3]["rewards/margin"] == 0, "hard update: the reference is the policy again"
    shutil.rmtree(straight.out_dir / "checkpoints/step-00000004")
    assert run_here(straight) == expected  # from step 3, after which the reference has moved


@pytest.mark.parametrize("flags", [{"lr_language": 0.0}, {"lora_rank": 2, "lora_parts": "vision"}])
def test_a_pack_of_text_alone_trains_a_model_whose_language_part_is_frozen(base, tmp_path, flags):
    cfg = replace(base, out_dir=tmp_path / "run", pack_tokens=90, max_length=90, **flags)
    assert all(math.isfinite(row["loss"]) for row in run_here(cfg))


@pytest.mark.parametrize(("data", "tokens", "layer"), [("toy_text", 40, -1), ("toy_steps", 90, 0)])
def test_blocks_that_no_pack_runs_do_not_stop_a_step_that_exchanges_once(
    base, toy, tmp_path, data, tokens, layer
):
    """FSDP's step without an exchange fails at a block that it has never gathered."""
    shutil.copytree(base.model_dir, tmp_path / "model")
    config = json.loads((base.model_dir / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"select_layer": layer}))
    meta = {"one": {"annotation": str(toy / f"{data}.jsonl"), "root": str(toy / "images")}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    cfg = replace(base, model_dir=tmp_path / "model", meta=tmp_path / "meta.json", loss="sft")
    cfg = replace(cfg, dtype="bf16", sync="step", pack_tokens=tokens, max_length=tokens, warmup=0)
    [row] = run_here(replace(cfg, max_steps=1, out_dir=tmp_path / "run"))
    assert 0 < row["grad_norm"] < math.inf


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_a_part_with_rate_zero_stays_as_it_was(base, toy, part):
    cfg = replace(base, out_dir=toy / f"frozen-{part}", max_steps=2, **{f"lr_{part}": 0.0})
    run_here(cfg)
    prefix = {"vision": "vision_model", "projector": "projector", "language": "language_model"}
    start = dict(load_model(toy / "model").named_parameters())
    for name, p in load_model(cfg.out_dir / "model").named_parameters():
        assert torch.equal(p, start[name]) or not name.startswith(prefix[part]), name
    changed = {
        n.split(".")[0]
        for n, p in load_model(cfg.out_dir / "model").named_parameters()
        if not torch.equal(p, start[n])
    }
    assert changed == set(prefix.values()) - {prefix[part]}
    assert weights(cfg).keys() == {f"model/{name}" for name in start}, "a checkpoint has them all"


def test_each_part_moves_at_its_own_rate(toy):
    cfg = TrainConfig(lr_vision=0.5, lr_projector=0.25, weight_decay=0.0)
    model = load_model(toy / "model")
    start, optimizer = copy.deepcopy(model.state_dict()), make_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():  # Adam's first step is the rate itself
        rate = 0.1 * cfg.rates[name.split(".")[0]]
        torch.testing.assert_close(start[name] - p, torch.full_like(p, rate), atol=1e-6, rtol=0)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dop"}, "unknown objective 'dop'; did you mean dpo"),
        ({"loss": "dpo", "label_smoothing": 0.1}, "--loss dpo does not use it"),
        ({"loss": "cdpo", "label_smoothing": 0.5}, "label_smoothing must be >= 0 and <= 0.499"),
        ({"beta": 0.0}, "beta must be >= 1e-09"),
        ({"beta": math.nan}, "beta must be"),
        ({"reference_update_every": 2}, "needs .*--reference online"),
        (
            {"reference_update_every": 9, "reference": "online"},
            "a run of 4 steps has none",
        ),
        ({"loss": "sft", "reference_update_every": 2}, "needs an objective with a reference"),
        ({"lr_vision": 0.0, "lr_projector": 0.0, "lr_language": 0.0}, "nothing to train"),
        ({"lora_rank": 2, "lr_language": 0.0}, "nothing to train"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be >= 1e-09"),
        ({"meta": Path("nowhere.json")}, "no file nowhere.json"),
        ({"model_dir": Path("nowhere")}, "no config.json in nowhere"),
        (
            {"pack_tokens": 20},
            "--pack_tokens 20 is below max_length 400, .* pass --pack_tokens 400",
        ),
        ({"pack_tokens": 511, "max_length": 6144}, "pack_tokens 511 is below max_length 512"),
        ({"replicate": 2}, "1 processes do not divide into --replicate 2 groups"),
        (
            {"lora_rank": 2, "lr_projector": 0.5},
            "0.5 times lr for the projector: --lora_rank gives",
        ),
        ({"reference_cache": Path("toy/model/x"), "model_dir": Path("toy/model")}, "own"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(base, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run_here(replace(base, out_dir=tmp_path / "run", **change))


def test_a_batch_that_does_not_divide_is_refused(base, tmp_path):
    cfg = replace(base, out_dir=tmp_path / "run", batch_size=7)
    forks = start_forks(2, refused_here, cfg, tmp_path / "said")
    for fork in forks:
        fork.join(120)
    assert (tmp_path / "said").read_text() == "2 processes: batch_size 7 is no multiple of them"


def refused_on_its_own_disk(cfg, folder):
    os.chdir(folder / os.environ["RANK"])
    refused_here(cfg, Path("said"))


def test_nodes_whose_copies_of_the_pairs_differ_are_refused(base, toy, tmp_path):
    lines = (toy / "toy_text.jsonl").read_text().splitlines(keepends=True) * 8
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "pairs.jsonl").write_text("".join(lines[rank:]))
    cfg = replace(base, meta=Path("pairs.jsonl"), loss="sft", out_dir=tmp_path / "run")
    for fork in start_forks(2, refused_on_its_own_disk, cfg, tmp_path):
        fork.join(120)
    for rank in (0, 1):
        said = (tmp_path / str(rank) / "said").read_text()
        assert "pairs.jsonl or " in said and "differs between nodes: share a disk" in said


def refused_here(cfg, said):
    try:
        train_in_process(cfg)
    except InputError as error:
        said.write_text(str(error))


def test_an_unknown_flag_gets_a_suggestion(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batchsize", "3"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert "did you mean --batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ("--recompute_blocks 30", "--recompute full, or --recompute selective"),
        ("--recompute off --recompute_blocks 0", "--recompute full, or --recompute selective"),
        ("--dtype fp32 --state_dtype bf16", "--dtype auto, or --dtype bf16"),
        ("--lora_parts both", "--lora_rank"),
        ("--lora_rank 0 --lora_alpha 16", "--lora_rank"),
        ("--reference_update_mix 0.5", "--reference_update_every, or --loss all"),
        ("--heldout_every 9", "--heldout"),
        ("--keep_best", "--heldout"),
        ("--size 8b", "--plan, or --bench"),
        ("--bench --gpus 8", "--plan"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused_with_what_it_needs(flags, needed, capsys):
    name = flags[flags.rindex("--") :].split()[0]
    with pytest.raises(SystemExit) as stop:
        runtime.parse_cli(TrainConfig, flags.split())
    assert stop.value.code == 2
    assert f"{name} does nothing without {needed};" in capsys.readouterr().err


def test_what_a_flag_needs_may_be_any_of_several():
    for flags in ("--recompute full --recompute_blocks 3", "--loss all --reference_update_mix 0.5"):
        runtime.parse_cli(TrainConfig, flags.split())
    saved = {"lora_parts": "language", "heldout_every": 50, "recompute_blocks": -1}  # the defaults
    assert TrainConfig(**saved) == TrainConfig()


@pytest.mark.parametrize("change", [{"lr": -1}, {"batch_size": 0}, {"drop_path": 1.0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**change)


def test_a_non_finite_loss_stops_the_run_and_names_the_records(base, tmp_path, toy, monkeypatch):
    def spoiled(terms, logps: PairLogps, **hyper):
        return logps.policy_chosen * math.nan, {}

    monkeypatch.setattr("train.objective", spoiled)
    cfg = replace(base, out_dir=tmp_path / "run", loss="sft")
    with pytest.raises(Failure, match="loss is nan at step 1; records: toy_"):
        run_here(cfg)
    dumped = json.loads((tmp_path / "run" / "failed-step-1.json").read_text())
    assert dumped["records"]


# --------------------------------------------------------------------------- schedule, diagnosis


def test_a_failure_leaves_the_process_free_for_another_group(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for _ in range(2):
        with pytest.raises(Failure, match="loss is nan"), train_module.in_group(0):
            raise Failure("loss is nan")


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    cfg = TrainConfig(lr=1.0, warmup=0.05)
    rates = [lr_at(step, 100, cfg) for step in range(100)]
    assert rates[:6] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5 + 95 // 2] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[-1] < 0.001
    assert lr_at(0, 1, replace(cfg, warmup=1.0)) == 0


def test_a_constant_rate_may_be_prolonged_and_falls_at_the_end(base, toy):
    cfg = replace(base, decay=2, warmup=2.0, lr=1.0)
    assert [lr_at(step, 8, cfg) for step in range(8)] == [0, 0.5, 1, 1, 1, 1, 2 / 3, 1 / 3]
    short = replace(base, decay=0, warmup=2.0, max_steps=3, epochs=2, out_dir=toy / "prolonged")
    whole = replace(short, max_steps=5, decay=2, out_dir=toy / "whole")
    run_here(short)
    assert run_here(replace(short, max_steps=5, decay=2)) == run_here(whole)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"warmup": 0.5}, {"max_steps": 9}),  # a share of the steps: it would rise again
        ({"decay": 2}, {"max_steps": 6}),  # it has fallen already
        ({}, {"max_steps": 2}),  # the third step would never have been
    ],
)
def test_a_run_whose_steps_had_other_rates_is_not_prolonged(base, tmp_path, before, now):
    flags = {"loss": "sft", "decay": 0, "warmup": 0.0, "max_steps": 3, "batch_size": 2} | before
    cfg = replace(base, out_dir=tmp_path / "run", save_every=1, **flags)
    run_here(cfg)
    with pytest.raises(InputError, match=r"metrics.jsonl: step [123] had another lr than"):
        run_here(replace(cfg, **now))


def test_more_steps_than_the_epochs_have_are_told(base, tmp_path, capsys):
    run_here(replace(base, loss="sft", max_steps=9, out_dir=tmp_path / "run"))
    assert "--max_steps 9: 1 --epochs have 4 steps" in capsys.readouterr().err


def history(steps, **curves):
    flat = {"rewards/chosen": 0.1, "rewards/rejected": 0, "rewards/margin": 0.1}
    flat |= {"rewards/accuracy": 0.5, "nll": 1.0}
    return [flat | {"step": i + 1} | {k: f(i) for k, f in curves.items()} for i in range(steps)]


@pytest.mark.parametrize(
    ("name", "steps", "total", "curves"),
    [
        (
            "slide",
            20,
            100,
            {"rewards/chosen": lambda i: -0.1 * i, "rewards/margin": lambda i: 0.1 * i},
        ),
        ("too easy", 10, 400, {"rewards/accuracy": lambda i: 1.0}),
        ("stuck", 20, 100, {"rewards/chosen": lambda i: 0, "rewards/rejected": lambda i: 0}),
        ("forgetting", 20, 100, {"nll": lambda i: 1 + 0.1 * i}),
    ],
)
def test_classic_troubles_are_told(name, steps, total, curves):
    assert list(diagnose(history(steps, **curves), total, {})) == [name]


def test_a_healthy_run_gets_no_diagnosis():
    healthy = history(50, nll=lambda i: 1 - i / 100)
    assert not any(diagnose(healthy[: n + 1], 50, {}) for n in range(50))


def test_the_start_check_knows_rounding_from_other_weights():
    length = torch.tensor([1.0, 400.0])
    policy = torch.tensor([-1.0, -300.0])

    def check(off, dtype):
        logps = PairLogps(policy, policy, policy + off, policy, length, length)
        compare_start(logps, dtype is torch.bfloat16)

    rounding, other = torch.tensor([0.05, 1.5]), torch.tensor([0.0, 2.5])
    check(rounding, torch.bfloat16)
    for off, dtype in (
        (other, torch.bfloat16),
        (rounding, torch.float32),
        (torch.tensor([torch.nan, 0.0]), torch.float32),
    ):
        with pytest.raises(Failure, match="start check failed.*a response of"):
            check(off, dtype)


def test_a_bf16_reference_cache_of_other_packs_dtype_or_config_is_refused(base, tmp_path):
    shutil.copytree(base.model_dir, tmp_path / "model")
    cfg = replace(
        base, dtype="bf16", max_steps=1, warmup=0.0, reference_cache=tmp_path / "reference"
    )
    cfg = replace(cfg, model_dir=tmp_path / "model")
    train_in_process(replace(cfg, out_dir=tmp_path / "first"))
    changes = {"pack_tokens": 401, "share_prefix": False, "share_images": False, "dtype": "fp32"}
    for name, value in changes.items():
        fact = "dtype" if name == "dtype" else "packing"
        with pytest.raises(InputError, match=f"was made with another {fact} "):
            train_in_process(replace(cfg, out_dir=tmp_path / "second", **{name: value}))
    config = read_json(tmp_path / "model/config.json") | {"system_message": "Look."}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="was made with another config "):
        train_in_process(replace(cfg, out_dir=tmp_path / "third"))


def test_an_address_that_another_run_left_in_the_shell_is_not_asked(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with process_group(0):
        assert runtime.all_of(True)


def two_wait_for_a_lock(folder):
    """Rank 0 gets the lock after a second; both ranks vote meanwhile instead of waiting."""
    votes = []
    all_of = runtime.all_of
    runtime.all_of = lambda vote: votes.append(1) or all_of(vote)
    with process_group(0), runtime.alone_in(folder, 30, "end it"):
        assert len(votes) >= 5, votes


def test_processes_vote_while_one_waits_for_a_lock(tmp_path):
    with open(tmp_path / ".lock", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        forks = start_forks(2, two_wait_for_a_lock, tmp_path)
        time.sleep(2.5)
    for fork in forks:
        fork.join(60)
    assert [fork.exitcode for fork in forks] == [0, 0]


@pytest.mark.parametrize(
    ("size", "max_length", "tokens"),
    [("8b", None, 8192), ("8b", 9000, 9000), ("3.5-8b", None, 16384)],
)
def test_a_pass_has_room_for_the_longest_record_unless_it_is_told(size, max_length, tokens):
    cfg = with_recipe(TrainConfig(max_length=max_length), named_config(size), print)
    assert cfg.pack_tokens == tokens


def test_settings_left_open_are_those_of_the_model_s_generation(base, tmp_path, capsys):
    cfg = replace(base, lr=None, max_length=None, pack_tokens=600, out_dir=tmp_path)
    cfg = replace(cfg, reference_cache=None)
    assert run_here(replace(cfg, max_steps=2, warmup=0.0))[0]["lr"] == 5e-6
    told = capsys.readouterr().err
    assert "recipe of InternVL2: lr 5e-06, max_length 6144 (as internvl_chat" in told
    assert "max_length is 512 and not 6144: the model has no more positions" in told
    assert read_json(tmp_path / "config.json")["lr"] == 5e-6
