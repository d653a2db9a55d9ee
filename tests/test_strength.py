"""What makes training fast and small changes no number, and its stated costs are its costs."""

import json
import os
import random
import shutil
import sys
import threading
import time
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_forks, short_run, start_forks
from safetensors.torch import save_file
from test_train import (
    base,
    close,
    close_weights,
    command,
    kill_after,
    read_metrics,
    run_here,
    run_there,
    toy,
    train_in_process,
    weights,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.nn.attention import flex_attention

import train as train_module
import weights as weights_module
from config import load_config
from data import PairData, grow_bushes, lay_out, merge
from memory import AdamW, adapters, merge_adapters, start_adapters
from model import InternVL, TreeAttention
from records import read_meta
from runtime import Failure, InputError, process_group, rank_and_world, run, say
from tokenizer import load_tokenizer
from tools.bench import example_pack, example_tree
from tools.export import ExportConfig, export, export_checkpoint
from tools.plan import named_config
from toy import write_world
from train import TrainConfig, compile_blocks, prepare, score, sharded_model
from weights import empty_model, load_model, local, newest_checkpoint

__all__ = ["base", "toy"]  # fixtures
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def device():
    with process_group(0) as device:
        yield device


# --------------------------------------------------------------------------- switches


def grads_of(toy, cfg, pad=1, **how):
    """(scores, gradients) of the same eight records under some switches."""
    config = load_config(toy / "model")
    tokenizer = load_tokenizer(toy / "model")
    data = PairData(
        read_meta(toy / "meta.json", config.max_tiles),
        tokenizer,
        config,
        batch_size=8,
        pack_tokens=4000,
        max_length=512,
        seed=1,
        **how,
    )
    pack = data.build(data.plan(data.rows(0))[0][0]).padded(pad)
    assert len(pack.tree) % pad == 0
    model = prepare(load_model(toy / "model"), cfg)
    sums, _ = score(model, pack, cfg)
    weight = torch.randn(len(sums), generator=torch.Generator().manual_seed(0))
    (sums * weight).mean().backward()
    return sums.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def all_off(toy):
    cfg = TrainConfig(head_rows=0, recompute="off")
    return cfg, grads_of(toy, cfg, share_prefix=False, share_images=False)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        ({}, {"share_images": False}),
        ({}, {"share_prefix": False}),
        ({}, {"pad": 2048}),
        ({"head_rows": 7}, {"share_prefix": False, "share_images": False}),
        ({"recompute": "full"}, {}),
        ({"recompute": "selective"}, {}),
        ({"recompute": "selective", "head_rows": 64}, {}),
    ],
)
def test_every_switch_on_is_off(toy, all_off, change, how):
    cfg, (sums, grads) = all_off
    found, found_grads = grads_of(toy, replace(cfg, **change), **how)
    torch.testing.assert_close(found, sums, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4}], ids=["all", "adapters"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_give_the_numbers_of_plain_ones(backend, change, tmp_path, monkeypatch):
    """aot_eager traces forward and backward as inductor does, and runs them without a compiler.

    Beside adapters the ViT is frozen: no backward comes for which its blocks were computed again.
    """
    if backend == "inductor" and not (shutil.which("g++") and os.environ.get("SLOW")):
        pytest.skip("inductor takes a minute: set SLOW=1; needs a C++ compiler")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    write_world(tmp_path, 8, 0)
    cfg = short_run(tmp_path, max_steps=1, warmup=0.0, limit=2, batch_size=2, recompute="full")
    cfg = replace(cfg, **change)
    plain = run_here(replace(cfg, out_dir=tmp_path / "plain"))
    close(run_here(replace(cfg, out_dir=tmp_path / "compiled", compile="on")), plain, bound=1e-5)


def test_twelve_different_packs_share_one_graph_a_kind_of_block(monkeypatch):
    """Packs padded as for a GPU, forward and backward; aot_eager traces as inductor does."""
    # on a CPU only flex attention's backward kernel is missing, and aot_eager takes none
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    toy = named_config("toy")
    two = {"num_hidden_layers": 2}
    config = replace(toy, llm=replace(toy.llm, **two), vision=replace(toy.vision, **two))
    cfg = TrainConfig(recompute="full")
    model = prepare(InternVL(config, 1), cfg)
    kept = {"head": lambda hidden, weight: hidden}
    torch._dynamo.reset()
    counted, draw = torch._dynamo.utils.counters, random.Random(0)
    counted.clear()
    graphs = []
    for number in range(12):
        sizes = [[draw.randint(2, 8) for _ in range(3)] for _ in range(draw.randint(2, 3))]
        trees = [example_tree(config, 1, prompt, (a, b)) for prompt, a, b in sizes]
        pack = example_pack(config, trees).padded(128)
        inputs = pack.input_ids, pack.tiles, pack.positions
        kept["tile_order"] = pack.tile_order
        flex = TreeAttention(pack.tree, pack.branch, flex=True)
        if number == 0:
            plain = model(*inputs, TreeAttention(pack.tree, pack.branch), **kept)
            compile_blocks(model, backend="aot_eager")
        hidden = model(*inputs, flex, **kept)
        if number == 0:
            torch.testing.assert_close(hidden, plain, atol=1e-4, rtol=1e-4)
        hidden.sum().backward()
        graphs.append((counted["stats"]["unique_graphs"], counted["aot_autograd"]["total"]))
    assert graphs[0][0] == 2 and set(graphs) == {graphs[0]} and not counted["graph_break"]


def test_a_pack_without_images_needs_no_tile_alone_and_two_small_ones_under_fsdp(toy, monkeypatch):
    cfg, model = TrainConfig(), load_model(toy / "model")
    pack = lay_out([example_tree(model.config, 0, 26, (5, 9))])
    tiles = []
    model.vision_model.register_forward_pre_hook(lambda _, args: tiles.append(args[0].shape))
    alone, _ = score(model, pack, cfg)
    assert not tiles
    monkeypatch.setattr("weights.is_sharded", lambda model: True)
    sharded, _ = score(model, pack, cfg)
    side = 2 * model.config.vision.patch_size
    assert tiles == [(2, 3, side, side)] and torch.equal(alone, sharded)
    sharded.sum().backward()
    assert all(p.grad is not None for p in model.vision_model.parameters())


def count_traffic(cfg, out):
    """Train; write calls and bytes of what FSDP gathers and reduces."""
    traffic = {}

    def counted(kind):
        real = kind.__call__

        def call(self, *args, **options):
            sizes = [x.nbytes for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
            calls, total = traffic.get(kind.__name__, (0, 0))
            traffic[kind.__name__] = calls + 1, total + max(sizes)
            return real(self, *args, **options)

        kind.__call__ = call

    counted(collectives.DefaultAllGather)
    counted(collectives.DefaultReduceScatter)
    train_in_process(cfg)
    out.write_text(json.dumps(traffic))


def test_exchanging_once_a_step_sends_less_and_trains_alike(base, toy, tmp_path):
    cfg = replace(base, drop_path=0.2, recompute="full", max_length=200, max_steps=3)
    cfg = replace(cfg, pack_tokens=200, reference_cache=tmp_path / "reference")
    traffic = {}
    for sync in ("pack", "step"):
        run = replace(cfg, sync=sync, out_dir=tmp_path / sync)
        run_forks(2, count_traffic, run, tmp_path / f"{sync}.json")
        traffic[sync] = json.loads((tmp_path / f"{sync}.json").read_text())
        print(sync, traffic[sync])
    close(*(read_metrics(tmp_path / sync) for sync in traffic))
    close_weights(*(replace(cfg, out_dir=tmp_path / sync) for sync in traffic))
    for name, (calls, size) in traffic["step"].items():
        assert calls < 0.6 * traffic["pack"][name][0] and size < 0.6 * traffic["pack"][name][1]


def test_casting_weights_once_a_step_trains_bit_for_bit_alike(base, tmp_path):
    """One process; held-out pairs are scored after a step; then continued from a checkpoint."""
    cfg = replace(base, dtype="bf16", drop_path=0.2, batch_size=4, pack_tokens=200, warmup=0.0)
    cfg = replace(cfg, max_length=200, max_steps=2, save_every=1, heldout=cfg.meta)
    cfg = replace(cfg, heldout_every=1)
    cfg = replace(cfg, reference_cache=tmp_path / "reference")
    packed, stepped = (
        replace(cfg, sync=sync, out_dir=tmp_path / sync) for sync in ("pack", "step")
    )
    expected = run_here(packed), weights(packed)
    for _ in range(2):
        metrics, found = run_here(stepped), weights(stepped)
        assert metrics == expected[0]
        assert all(torch.equal(found[name], w) for name, w in expected[1].items())
        shutil.rmtree(newest_checkpoint(stepped.out_dir / "checkpoints"))


# --------------------------------------------------------------------------- bushes


def write_bushes(toy, folder):
    """Two questions, three pairs each, some responses in several pairs, shuffled among others."""
    lines = (toy / "toy_steps.jsonl").read_text().splitlines()
    a, b, *others = (json.loads(line) for line in lines[:6])
    pairs = []
    for q in (a, b):
        right, wrong = [q["chosen"], "It is 3."], [q["rejected"], "It is 4."]
        pairs += [
            q | {"chosen": right[i], "rejected": wrong[j]} for i, j in ((0, 0), (0, 1), (1, 1))
        ]
    records = [pairs[0], others[0], pairs[3], pairs[1], others[1], pairs[4], pairs[2], pairs[5]]
    (folder / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    entry = {"root": str(toy / "images"), "annotation": "b.jsonl", "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"b": entry}))
    return folder / "meta.json"


def test_questions_are_gathered_where_their_first_record_stands(toy, tmp_path, monkeypatch):
    records = [{"question": q, "chosen": "It is 3.", "rejected": "It is 4."} for q in "abacaa"]
    path, model_dir = tmp_path / "pairs.jsonl", toy / "model"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    limits = {"batch_size": 6, "pack_tokens": 600, "max_length": 600, "seed": 0}
    parts = read_meta(path, 1), load_tokenizer(model_dir), load_config(model_dir)
    monkeypatch.setattr("data.epoch_order", lambda *_: np.array([(0, n) for n in range(6)]))
    order = PairData(*parts, **limits, pairs_per_prompt=2).order(0)
    assert order[:, 1].tolist() == [0, 2, 1, 3, 4, 5]


def test_a_bush_of_pairs_trains_as_its_pairs_alone_and_scores_no_response_twice(base, toy):
    folder = toy / "bush"
    folder.mkdir()
    meta = write_bushes(toy, folder)
    cfg = replace(base, meta=meta, max_steps=2, save_every=9, drop_path=0.0, warmup=0.0)
    cfg = replace(cfg, reference_cache=folder / "reference")
    alone = run_here(replace(cfg, out_dir=folder / "one"))
    found = run_here(replace(cfg, out_dir=folder / "many", pairs_per_prompt=3))
    assert found[0]["tokens"] < 0.7 * alone[0]["tokens"]
    for metrics in (*alone, *found):
        del metrics["tokens"]
    close(found, alone, bound=1e-5)  # a response of two pairs counts twice, in sft as well


def test_a_bush_keeps_to_its_limits(toy):
    config = load_config(toy / "model")
    one, other = (example_tree(config, 0, prompt, (5, 9)) for prompt in (46, 66))
    two = replace(one, responses=[[0] * 5, [0] * 3])
    assert merge(one, two).responses == [[0] * 5, [0] * 9, [0] * 3]
    assert merge(one, two).pairs == [(None, 0, 1), (None, 0, 2)]
    bushes = grow_bushes([one, two, one, other], 2, lambda tree: True)
    assert [len(bush.pairs) for bush in bushes] == [2, 1, 1]
    elsewhere = replace(two, images=[(Path("other.png"), 1, False)])  # the same words of another
    assert grow_bushes([one, elsewhere], 9, lambda tree: True) == [one, elsewhere]
    bushes = grow_bushes([one, two], 9, lambda tree: tree.size <= one.size + 2)
    assert [len(bush.pairs) for bush in bushes] == [1, 1]


# --------------------------------------------------------------------------- many processes


def test_replicas_train_as_one_process_and_continue_in_other_numbers(base, toy):
    cfg = replace(base, out_dir=toy / "hsdp", replicate=2, save_every=1)
    expected = run_here(replace(base, out_dir=toy / "hsdp-one"))
    run_there(replace(cfg, max_steps=4), 2)
    close(read_metrics(cfg.out_dir), expected)
    newest = sorted((cfg.out_dir / "checkpoints").glob("step-*"))[-1]
    assert [p.name for p in newest.glob("shard-*.safetensors")] == ["shard-000-of-001.safetensors"]
    one = weights(replace(base, out_dir=toy / "hsdp-one"))
    for name, w in weights(cfg).items():
        torch.testing.assert_close(w, one[name], atol=1e-6, rtol=0, msg=name)


def test_an_odd_vocabulary_survives_two_one_and_two_processes(base, toy):
    """Each continuation reads shards that another number of processes wrote."""
    cfg = replace(base, out_dir=toy / "odd", save_every=1)
    assert load_config(toy / "model").llm.vocab_size % 2
    expected = run_here(replace(base, out_dir=toy / "odd-one"))
    for processes, upto, replicate in ((2, 2, 1), (1, 3, 1), (2, 4, 2)):
        run_forks(processes, train_until, replace(cfg, replicate=replicate), upto)
    close(read_metrics(cfg.out_dir), expected)


def train_until(cfg, last):
    """Train; of the processes only the last one is asked to stop, after step `last`."""
    checkpoint = newest_checkpoint(cfg.out_dir / "checkpoints")
    steps = [int(checkpoint.name[5:]) if checkpoint else 0]
    real = train_module.asked_to_stop

    def stop():
        steps.append(1)
        if sum(steps) >= last and rank_and_world()[0] == rank_and_world()[1] - 1:
            train_module._STOP.append(1)
        return real()

    train_module.asked_to_stop = stop
    train_in_process(cfg)


# --------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_adapters_train_alone_and_are_merged_into_the_export(base, toy, reference):
    out = toy / f"lora-{reference}"
    cfg = replace(base, out_dir=out, lora_rank=4, lora_parts="both", reference=reference, lr=3e-3)
    metrics = run_here(cfg)
    assert metrics[0]["rewards/margin"] == 0 and metrics[-1]["rewards/margin"] != 0
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    names = json.loads((newest / "state.json").read_text())["shapes"]
    assert names and all(".lora_" in name for name in names)
    start = dict(load_model(toy / "model").named_parameters())
    for name, p in load_model(out / "model").named_parameters():
        adapted = "layers." in name and p.ndim == 2
        assert torch.equal(p, start[name]) != adapted, name
    assert metrics == run_here(cfg), "the finished run is found and exported again"
    export_checkpoint(ExportConfig(toy / "model", out / "again", out / "checkpoints"))
    for path in (out / "model").glob("*.safetensors"):
        assert (out / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="belongs to another start than .*model"):
        export_checkpoint(ExportConfig(out / "model", out / "other", out / "checkpoints"))


def test_adapters_with_the_bare_model_as_reference_give_cached_numbers(base, toy):
    cfg = replace(base, lora_rank=4, lora_parts="both", lr=3e-3)
    cached = run_here(replace(cfg, out_dir=toy / "lora-a", drop_path=0.2))
    online = run_here(replace(cfg, out_dir=toy / "lora-b", drop_path=0.2, reference="online"))
    close(online, cached)
    close(run_there(replace(cfg, out_dir=toy / "lora-c", drop_path=0.2), 2), cached, bound=1e-5)


@pytest.mark.parametrize("llm", ["qwen2", "qwen3"])
def test_each_decoder_trains_with_adapters_resumes_exports_and_goes_on_from_its_export(
    base, tmp_path, llm
):
    write_world(tmp_path, 8, 0, llm=llm)
    folders = {"model_dir": tmp_path / "model", "meta": tmp_path / "meta.json"}
    cfg = replace(base, **folders, max_steps=2, save_every=1, lora_rank=2, lora_parts="both")
    cfg = replace(cfg, reference_cache=None, out_dir=tmp_path / "cached", batch_size=4, lr=3e-3)
    cached = run_here(cfg)
    close(run_here(replace(cfg, out_dir=tmp_path / "online", reference="online")), cached)
    shutil.rmtree(cfg.out_dir / "checkpoints/step-00000002")
    assert run_here(cfg) == cached, "it goes on after step 1"
    release, hf = cfg.out_dir / "model", tmp_path / "hf"
    export(ExportConfig(release, hf, hf=True))
    runs = [(release, "official"), (hf, "again")]
    cfg = replace(cfg, max_steps=1, warmup=0.0)
    close(*(run_here(replace(cfg, model_dir=d, out_dir=tmp_path / name)) for d, name in runs))
    assert "text_config" in json.loads((tmp_path / "again/model/config.json").read_text())


def test_merged_adapters_compute_what_they_did_apart(device, toy):
    cfg = TrainConfig(lora_rank=3, lora_parts="both")
    model = prepare(load_model(toy / "model"), cfg)
    start_adapters(model, cfg.seed)
    for m in adapters(model).values():
        torch.nn.init.normal_(m.lora_up, std=0.1)
    config = load_config(toy / "model")
    pack = lay_out([example_tree(config, 0, 26, (5, 9))])
    with torch.no_grad():
        apart = score(model, pack, cfg)[0]
        merge_adapters(model)
        torch.testing.assert_close(score(model, pack, cfg)[0], apart, atol=1e-4, rtol=1e-5)


# --------------------------------------------------------------------------- bfloat16 states


def test_tiny_updates_do_not_stall_in_bfloat16():
    """At lr 5e-6 rounding to nearest moves no weight of 1; rounding at random does, on average."""
    p = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.ones(20000))
    tiny = AdamW([{"params": [p], "scale": 1.0, "weight_decay": 0.0}], seed=0)
    plain = torch.optim.AdamW([exact], lr=5e-6, weight_decay=0.0)
    for _ in range(100):
        p.grad, exact.grad = torch.ones_like(p), torch.ones_like(exact)
        tiny.step(5e-6)
        plain.step()
    moved = 1 - exact.mean().item()
    assert moved == pytest.approx(5e-4, rel=0.01)
    assert 1 - p.float().mean().item() == pytest.approx(moved, rel=0.1)
    second = tiny.state[p]["exp_avg_sq"].float().mean().item()
    assert second == pytest.approx(plain.state[exact]["exp_avg_sq"].mean().item(), rel=0.02)


def test_bfloat16_weights_decay_and_equal_ones_are_rounded_apart():
    a, b = (torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AdamW([{"params": [a, b], "scale": 1.0, "weight_decay": 0.1}], seed=0)
    for _ in range(100):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        optimizer.step(1e-2)
    for p in (a, b):
        assert p.float().mean().item() == pytest.approx((1 - 1e-3) ** 100, rel=1e-3)
    assert not torch.equal(a, b)


def test_bfloat16_states_learn_and_resume_bit_for_bit(base, toy):
    cfg = replace(base, out_dir=toy / "bf16", state_dtype="bf16", save_every=2)
    cfg = replace(cfg, reference_cache=toy / "bf16-reference", batch_size=2, max_steps=3)
    expected = run_here(cfg)
    assert {w.dtype for w in weights(cfg).values()} == {torch.bfloat16}
    full = run_here(replace(base, out_dir=toy / "fp32", batch_size=2, max_steps=3))
    assert expected[-1]["nll"] == pytest.approx(full[-1]["nll"], rel=0.05)
    killed = replace(cfg, out_dir=toy / "bf16-killed")
    kill_after(killed, 1, 2)
    assert run_here(killed) == expected


# --------------------------------------------------------------------------- streaming


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_one_tensor_beside_the_shard(tmp_path, toy):
    """A checkpoint of 100 MB: memory that is not mapped files, for each process of two."""
    model_dir = tmp_path / "model"
    shutil.copytree(toy / "model", model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    config["llm_config"] |= {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    (model_dir / "config.json").write_text(json.dumps(config))
    model = empty_model(model_dir)
    tensors = {
        n.replace("projector.", "mlp1."): torch.zeros(p.shape) for n, p in model.named_parameters()
    }
    for path in model_dir.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    largest = max(t.nbytes for t in tensors.values())
    total = sum(t.nbytes for t in tensors.values())
    assert total > 90e6
    run_forks(2, load_within, TrainConfig(model_dir=model_dir), total // 2 + 2 * largest + 10e6)


def load_within(cfg, limit):
    with process_group(0) as device:
        init_device_mesh("cpu", (2,))  # what gloo needs is not what is measured
        before, done, peak = private_bytes(), threading.Event(), [0]

        def watch():
            while not done.wait(0.001):
                peak[0] = max(peak[0], private_bytes() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = sharded_model(cfg, device)
        done.set()
        watcher.join()
        held = sum(local(p).nbytes for p in model.parameters())
        assert held <= peak[0] + 10e6, "the watcher slept"
        say(f"peak {peak[0] / 1e9:.3f} GB a process, its shard {held / 1e9:.3f} GB")
    assert peak[0] <= limit, (peak[0], limit)


def private_bytes():
    """Resident memory of this process that is not mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


# --------------------------------------------------------------------------- faults


def test_a_full_disk_names_the_file_and_the_old_checkpoint_survives(base, toy, monkeypatch):
    cfg = replace(base, out_dir=toy / "full", save_every=1)
    real, calls = weights_module.save_file, []

    def save(tensors, path, **how):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(tensors, path, **how)

    monkeypatch.setattr(weights_module, "save_file", save)
    with pytest.raises(Failure, match=r"cannot write .*/.partial/shard-000.*No space left"):
        run_here(cfg)
    assert newest_checkpoint(cfg.out_dir / "checkpoints").name == "step-00000002"
    monkeypatch.setattr(weights_module, "save_file", real)
    run_here(cfg)
    assert newest_checkpoint(cfg.out_dir / "checkpoints").name == "step-00000004"


def test_a_failure_while_running_ends_with_one_line_and_status_1(base, toy, monkeypatch, capsys):
    cfg = replace(base, out_dir=toy / "failing", reference_cache=toy / "reference")
    monkeypatch.setattr("sys.argv", command(cfg)[1:])
    monkeypatch.setattr(weights_module, "save_file", fail_to_save)
    with pytest.raises(SystemExit) as ended:
        run(train_module.main)
    assert ended.value.code == 1
    assert "error: cannot write" in capsys.readouterr().err


def fail_to_save(*args, **how):
    raise OSError(28, "No space left on device")


def test_a_nan_gradient_stops_the_run_and_names_the_records(base, toy, monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(torch.nan))
    cfg = replace(base, out_dir=toy / "nan", loss="sft")
    with pytest.raises(Failure, match="gradient norm is nan at step 1; records: toy_"):
        run_here(cfg)
    assert not (cfg.out_dir / "checkpoints").exists()


def test_when_a_process_dies_the_other_stops_with_a_message(base, toy):
    cfg = replace(base, out_dir=toy / "dies", max_steps=200, epochs=99)
    log = toy / "dies.log"
    forks = start_forks(2, main_there, cfg, log)
    deadline = time.time() + 60
    while not (cfg.out_dir / "metrics.jsonl").exists():
        assert time.time() < deadline
        time.sleep(0.01)
    forks[1].kill()
    forks[0].join(30)
    alive = forks[0].is_alive()
    for fork in forks:
        fork.kill()
    assert not alive, "it hangs"
    assert forks[0].exitcode == 1
    assert "another process has died" in log.read_text()


def main_there(cfg, log):
    sys.argv = command(cfg)[1:]
    sys.stderr = open(log, "a")  # noqa: SIM115  (until the process ends)
    train_module.main()
