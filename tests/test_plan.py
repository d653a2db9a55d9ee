"""What a step is said to cost, in bytes and FLOPs, is what it costs."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import run_forks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import apart, lay_out
from model import InternVL, TreeAttention
from runtime import InputError, parse_cli, process_group
from tools import race
from tools.bench import (
    MODES,
    example_pack,
    example_tree,
    formula_row,
    measured_peak,
    modes_of,
    paper_tree,
    plan_or_bench,
    run_bench,
)  # fmt: skip
from tools.plan import GB, RESERVE, flops, load_of, named_config, plan_of, say_plan, settle
from train import TrainConfig, prepare, score, shard, units_of, with_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def asked_of(size, **flags):
    """Flags with the recipe of that size, records as long as a pack at most, and its shapes."""
    config = named_config(size)
    flags.setdefault("max_length", flags.get("pack_tokens"))
    return with_recipe(TrainConfig(**flags), config, print), config


# --------------------------------------------------------------------------- bytes


@pytest.fixture
def device():
    with process_group(0) as device:
        yield device


@pytest.mark.parametrize(
    "change",
    [{"recompute": "full"}, {"recompute": "off"}, {"recompute": "selective", "pack_tokens": 512}],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(change, device):
    flags = {"pack_tokens": 256, "head_rows": 64, "dtype": "fp32", "drop_path": 0.1}
    cfg, config = asked_of("toy", **flags | change)
    scored = cfg.pack_tokens // 8
    tiles = (cfg.pack_tokens - 2 * scored - 8) // config.tokens_per_tile
    prompt = cfg.pack_tokens - 2 * scored - tiles * config.tokens_per_tile
    tree = example_tree(config, tiles, prompt, (scored, scored))

    def two_steps():
        vision = replace(config.vision, drop_path_rate=cfg.drop_path)
        policy = prepare(InternVL(replace(config, vision=vision), 1), cfg).train()
        shard(policy, cfg, device)
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        for packs in (1, 2):  # the second pack meets moments and gradients
            for _ in range(packs):
                score(policy, example_pack(config, [tree]), cfg)[0].sum().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    measured = measured_peak(two_steps, CPU)
    assert plan_of(cfg, config, 1, CPU).total == pytest.approx(measured, rel=0.15)


# Peaks that running the real code on shapes without memory gave (torch 2.13, a fake dispatch), with
# weights, gradients and moments; ViT attention that selective recompute keeps could not be seen.
DRY_RUNS = [  # size, GPUs, flags, GB
    ("8b", 1, {}, 139.34),
    ("8b", 8, {}, 26.30),
    ("8b", 64, {}, 12.17),
    ("8b", 8, {"recompute": "off"}, 98.54),
    ("8b", 8, {"recompute": "selective"}, 32.72),
    ("8b", 8, {"state_dtype": "bf16"}, 18.22),
    ("8b", 8, {"lora_rank": 16}, 10.87),
    ("8b", 8, {"lora_rank": 16, "lora_parts": "both", "recompute": "off"}, 77.19),
    ("8b", 8, {"reference": "online"}, 31.93),
    ("8b", 8, {"head_rows": 0}, 26.30),
    ("8b", 8, {"pack_tokens": 2048, "recompute": "off"}, 40.33),
    ("8b", 8, {"lr_vision": 0.0}, 24.65),
    ("8b", 8, {"lr_language": 0.0}, 12.60),
    ("2b", 8, {}, 9.53),
    ("2b", 8, {"recompute": "selective"}, 13.42),
    ("2b", 8, {"recompute": "off"}, 51.09),
    ("2b", 8, {"head_rows": 0}, 10.24),
    ("2b", 8, {"pack_tokens": 16384}, 12.99),
    ("2b", 8, {"state_dtype": "bf16", "reference": "online"}, 9.21),
    ("2b", 8, {"lr_vision": 0.0, "lr_projector": 0.0, "recompute": "off"}, 29.53),
]


@pytest.mark.parametrize("size, gpus, change, expected", DRY_RUNS)
def test_the_plan_is_within_10_percent_of_a_dry_run_of_the_code(size, gpus, change, expected):
    own = {"recompute": "full", "head_rows": 128, "compile": "off"}  # the dry run's
    plan = plan_of(*asked_of(size, **own | change), gpus, GPU)
    assert plan.total / GB == pytest.approx(expected, rel=0.1)
    assert plan.needed == pytest.approx((1 + RESERVE) * plan.total)


ON_AN_H100 = [  # size, flags, GB that tools/gpu_check.py --only mpo measured on one, at some commit
    ("2b", {"recompute_blocks": 4}, 72.42),
    ("2b", {"recompute_blocks": 4, "compile": "off"}, 79.87),
    ("2b", {"recompute_blocks": 5, "head_rows": 512}, 71.92),
    ("2b", {"recompute_blocks": 5, "head_rows": 1024}, 72.59),
    ("2b", {"recompute": "selective"}, 45.23),
    ("2b", {}, 40.25),
    ("2b", {"recompute_blocks": 3, "head_rows": 512, "sync": "step"}, 75.13),
    ("1b", {"recompute": "off"}, 46.17),
    ("8b", {"recompute": "off", "lora_rank": 16, "state_dtype": "bf16"}, 59.17),
    ("8b", {"recompute_blocks": 53, "head_rows": 512, "state_dtype": "bf16"}, 75.31),
]


@pytest.mark.parametrize("size, change, measured", ON_AN_H100)
def test_the_plan_is_within_4_percent_of_what_an_h100_measured(size, change, measured):
    asked = asked_of(size, **{"recompute": "full", "head_rows": 128} | change)
    assert plan_of(*asked, 1, GPU).total / GB == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    "size, gpus, memory, change, again, sync",
    [
        ("8b", 8, 80.0, {}, 15, "pack"),
        ("8b", 8, 40.0, {}, 47, "pack"),
        ("2b", 8, 80.0, {}, 0, "step"),
        ("2b", 1, 80.0, {}, 8, "step"),
        ("8b", 8, 80.0, {"lora_rank": 16}, 0, "step"),
        ("8b", 8, 0.0, {}, 56, "pack"),  # nobody says what a GPU has
    ],
)
def test_as_few_blocks_are_computed_again_as_the_plan_allows(
    size, gpus, memory, change, again, sync
):
    (cfg, config), lines = asked_of(size, gpu_memory=memory, plan=True, **change), []
    cfg = settle(cfg, config, gpus, GPU, lines.append)
    assert (cfg.recompute, cfg.recompute_blocks, cfg.sync) == ("full", again, sync)
    assert lines[0].startswith(f"recompute auto: {again} of ")
    if memory:
        assert plan_of(cfg, config, gpus, GPU).needed <= memory * GB
    if memory and again:
        one_less = replace(cfg, recompute_blocks=again - 1)
        assert plan_of(one_less, config, gpus, GPU).needed > memory * GB


def settle_with_memory_of_its_own(folder):
    (cfg, config), lines = asked_of("2b", gpu_memory=(80.0, 16.0)[int(os.environ["RANK"])]), []
    with process_group(0):
        cfg = settle(cfg, config, 8, GPU, lines.append)
    (folder / os.environ["RANK"]).write_text(f"{cfg.sync}: {lines[-1]}")


def test_processes_whose_memory_differs_exchange_alike_and_say_so(tmp_path):
    run_forks(2, settle_with_memory_of_its_own, tmp_path)
    told = "pack: sync auto: weights and gradients are exchanged once a pack"
    assert [(tmp_path / rank).read_text() for rank in "01"] == [told, told]


def test_one_gpu_that_computes_with_its_own_weights_keeps_no_others_for_a_step():
    alike = [asked_of("8b", state_dtype="bf16", sync=sync) for sync in ("pack", "step")]
    pack, step = (plan_of(*asked, 1, GPU) for asked in alike)
    assert pack == step
    pack, step = (plan_of(*asked, 2, GPU) for asked in alike)
    assert step.gathered > 5 * pack.gathered and step.gradients > pack.gradients


def test_recompute_auto_takes_the_first_blocks_and_none_on_a_cpu():
    cfg, config = asked_of("toy")
    cfg = settle(cfg, config, 1, CPU, print)
    assert (cfg.recompute_blocks, cfg.sync) == (0, "pack")
    for blocks, first in ((0, []), (2, [True, True]), (-1, [True] * 99)):
        model = prepare(InternVL(config, 1), replace(cfg, recompute_blocks=blocks))
        again = ["forward" in vars(block) for block in units_of(model)]
        assert again == (first + [False] * 99)[: len(again)]


@pytest.mark.parametrize("size", ["2.5-8b", "InternVL2_5-8B", "2_5-8B"])
def test_a_size_may_be_written_as_its_release_is_called(size):
    assert named_config(size) == named_config("2.5-8b") != named_config("8b")


def test_a_plan_that_does_not_fit_stops_with_the_ways_out():
    lines = []
    cfg, config = asked_of("8b", gpu_memory=24.0, recompute="full")
    with pytest.raises(InputError, match="the plan needs 28.02 GB a GPU .*--state_dtype bf16"):
        say_plan(cfg, config, 8, GPU, lines.append)
    toy, small = asked_of("toy", pack_tokens=2048, recompute="off", gpu_memory=0.25)
    with pytest.raises(InputError, match="would fit: --recompute full.*--lora_rank 16"):
        say_plan(toy, small, 1, GPU, lines.append)
    moving = replace(toy, reference="online", reference_update_every=2)
    with pytest.raises(InputError) as refusal:
        say_plan(moving, small, 1, GPU, lines.append)
    assert "cached" not in str(refusal.value) and "lora" not in str(refusal.value)
    frozen = replace(toy, lr_vision=0.0, lr_projector=0.0, lr_language=0.0)
    with pytest.raises(InputError, match="nothing to train"):
        say_plan(frozen, small, 1, GPU, lines.append)
    for refused in ({"lr_vision": 0.5}, {"lr_projector": 2.0}, {"lr_language": 0.0}):  # by train.py
        with pytest.raises(InputError) as refusal:
            say_plan(replace(toy, **refused, gpu_memory=0.02), small, 1, GPU, lines.append)
        assert "lora" not in str(refusal.value)
    for batch_size, last in ((256, "16 GPUs"), (40, "--lora_rank 16")):  # 40 is no multiple of 16
        with pytest.raises(InputError, match=f", or {last}$"):
            say_plan(replace(cfg, batch_size=batch_size), config, 8, GPU, lines.append)
    with pytest.raises(InputError, match="there are 40; this would fit: --replicate 1, or"):
        say_plan(replace(cfg, gpu_memory=40.0, replicate=2), config, 8, GPU, lines.append)
    with pytest.raises(InputError, match="none of these alone is enough: --recompute full"):
        say_plan(replace(cfg, gpu_memory=1.0), config, 8, GPU, lines.append)
    say_plan(replace(cfg, gpu_memory=80.0), config, 8, GPU, lines.append)
    assert lines[-1] == "fits into 80 GB"
    words = "weights gradients optimizer gathered activations logits reference reserve"
    assert all(word in str(lines[-2]) for word in words.split())


def test_the_plan_of_all_rows_has_the_second_model_of_one_of_them():
    (cfg, config), row = asked_of("8b"), {"reference": "online", "reference_update_every": 64}
    for more in ({}, {"lora_rank": 8}):
        plans = [
            plan_of(replace(cfg, **flags, **more), config, 2, GPU)
            for flags in ({"loss": "all"}, {"loss": "dpo", **row}, {"loss": "dpo"})
        ]
        assert plans[0] == plans[1] and bool(more) == (plans[1] == plans[2])


def test_the_race_names_a_section_that_it_does_not_have(capsys):
    with pytest.raises(SystemExit):
        parse_cli(race.RaceConfig, ["--only", "sprint"])
    sections = ", ".join(map(repr, race.SECTIONS))
    assert f"one of [{sections}], ...], got ('sprint',)" in capsys.readouterr().err


# --------------------------------------------------------------------------- FLOPs


def qwen3_toy():
    """Heads wider than the hidden size, each q and k normalised."""
    config = named_config("toy")
    return replace(config, llm=replace(config.llm, architecture="qwen3", head_dim=64))


@pytest.mark.parametrize("frozen", ["", "vision", "language"])
@pytest.mark.parametrize("config", [named_config("toy"), qwen3_toy()], ids=["toy", "qwen3"])
def test_useful_flops_are_those_that_torch_counts(config, frozen):
    cfg = TrainConfig(recompute="off", head_rows=0, drop_path=0.0)
    cfg = replace(cfg, **{f"lr_{frozen}": 0.0}) if frozen else cfg
    trees = [example_tree(config, 4, 23, (20, 13)), example_tree(config, 4, 8, (7, 9))]
    trees[1].images = [("y", 4, False)]
    model = prepare(InternVL(config, 1), cfg).train()
    pack = example_pack(config, trees)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        score(model, pack, cfg)[0].sum().backward()
    load = load_of(trees)
    assert load.tokens == pack.input_ids.shape[1] and load.tiles == len(pack.tiles)
    segments = TreeAttention(pack.tree, pack.branch).segments
    pairs = sum(n * (n if mask is None else mask.shape[1]) for n, mask in segments)
    load = replace(load, pairs=pairs)  # masked ones too
    assert sum(flops(cfg, config, load)) == counted.get_total_flops()


def test_backward_passes_through_frozen_layers_that_have_adapters():
    config, load = named_config("8b"), load_of([paper_tree(named_config("8b"))])
    forward, everything = flops(TrainConfig(), config, load)
    vision_alone = flops(TrainConfig(lr_projector=0.0, lr_language=0.0), config, load)[1]
    for parts, least, most in (("language", 0.7, 1), ("both", 1, 1.2), ("vision", 1, 1.2)):
        backward = flops(TrainConfig(lora_rank=8, lora_parts=parts), config, load)[1]
        assert least < backward / forward < most, parts
        assert backward < vision_alone < everything


def test_visible_pairs_are_those_of_the_mask():
    config = named_config("toy")
    trees = [example_tree(config, 2, 28, (5, 9)), example_tree(config, 2, 3, (3, 2))]
    for share in (True, False):
        parts = trees if share else [part for tree in trees for part in apart(tree)]
        pack = lay_out(parts)
        [(_, mask)] = TreeAttention(pack.tree, pack.branch, flex=False, span=999).segments
        assert load_of(parts).pairs == int(mask.sum())


def test_a_pair_of_the_8b_shape_costs_what_is_promised():
    config, cfg = named_config("8b"), TrainConfig()
    modes = modes_of(replace(cfg, compile="on"), CPU)
    rows = [formula_row(mode, config, paper_tree(config), 2) for _, mode in modes]
    tflop = [row["tflop"] for row in rows]
    assert tflop == pytest.approx([310.3, 289.5, 175.6, 170.0, 127.5, 127.5], rel=1e-3)
    head = [row["head GB"] for row in rows[:4]]
    assert head == pytest.approx([2.468, 4.880, 2.801, 0.200], rel=1e-2)
    assert [name for name, _ in modes_of(cfg, CPU)] == list(MODES)[:5]


def test_the_bench_prints_both_tables(capsys, monkeypatch):
    few = {name: MODES[name] for name in list(MODES)[::4]}
    monkeypatch.setattr("tools.bench.MODES", few | {"+ compile": {}})
    monkeypatch.setattr("tools.bench.paper_tree", lambda c, _=1: example_tree(c, 1, 8, (3, 4)))
    run_bench(TrainConfig(), named_config("8b"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8.08 B parameters, 1 tiles, 264 prompt tokens, answers of [3, 4]")
    assert [line[:20].strip() for line in lines[1:3]] == list(few)
    assert "that is too large" in lines[3] and "cpu, torch.float32; a pair:" in lines[4]
    assert len(lines) == 7 and all("seconds" in line for line in lines[5:])


def test_a_plan_and_a_measurement_are_asked_for_one_at_a_time():
    with pytest.raises(InputError, match="--plan and --bench: pass one of them"):
        TrainConfig(plan=True, bench=True)


REFUSED = [
    ({"gpus": 7}, "7 processes: batch_size 256 is no multiple of them"),
    ({"gpus": 8, "replicate": 3}, "8 processes do not divide into --replicate 3 groups"),
    ({"lora_rank": 4, "lr_vision": 0.5}, "0.5 times lr for the vision_model: --lora_rank gives"),
    ({"reference_update_every": 64}, "64 needs an objective with a .*, --reference online, no"),
    ({"reference_update_every": 64, "reference": "online", "lora_rank": 4}, "no --lora_rank"),
    ({"loss": "dpo", "label_smoothing": 0.1}, "--loss dpo does not use it; cdpo does"),
]


@pytest.mark.parametrize("flags, told", REFUSED)
def test_a_run_that_would_be_refused_is_not_planned_for(flags, told):
    with pytest.raises(InputError, match=told):
        plan_or_bench(TrainConfig(plan=True, size="toy", **flags))
