"""What tools/gpu_check.py checks and measures: a function a part, which yields rows of the table.

    start ... resume    right: against a dense mask, official numbers, plain.py, itself
    bench ... loader    fast: at random weights, since speed does not depend on them

Each is called with a case of gpu_parts.json, in a folder with the toy's world in world/.
Without a GPU shapes are small, nothing is compiled or captured, and aims do not count.  A figure
without a bound is only measured.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import generate
import plain
import train
from config import InternVLConfig
from generate import Generator, Prompt
from images import load_image
from layouts import OFFICIAL_INTERNLM2, OFFICIAL_QWEN, split_stored, stored_pieces
from losses import parse_objective, token_logps
from model import InternVL, TreeAttention
from records import read_meta
from runtime import InputError, parse_cli, process_group, read_json, read_jsonl
from tokenizer import load_tokenizer
from tools import bench as pair_bench
from tools import plan, race
from vision import cut_tiles, pixels
from weights import FLOATS, load_model

ROOT = Path(__file__).resolve().parent.parent
WORLD = Path("world")
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA must not start before a fork
CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
TOY = DEVICE == CPU
DTYPE = torch.float32 if TOY else torch.bfloat16  # where speed is measured
SHORTER = 32 if TOY else 1  # what lengths are divided by
Trained = tuple[Tensor, dict[str, Tensor]]  # losses (step) and final weights of a run


class Row(NamedTuple):
    """One line of the table."""

    name: str
    figure: float | None
    expected: str = ""
    verdict: str = "measured"  # or ok, FAIL, below (an aim missed), skipped


def at_most(name: str, figure: float, bound: float) -> Row:
    """A claim of correctness; NaN fails."""
    return Row(name, figure, f"<= {bound:g}", "ok" if figure <= bound else "FAIL")


def at_least(name: str, figure: float, aim: float | None) -> Row:
    """An aim on one H100, if there is one."""
    if TOY or aim is None:
        return Row(name, figure)
    return Row(name, figure, f">= {aim:g}", "ok" if figure >= aim else "below")


def largest(*differences: Tensor) -> float:
    """Their largest absolute number; NaN where one is NaN, which Python's max would lose."""
    return torch.stack([x.abs().max().float() for x in differences]).max().item()


def relative(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference, each divided by its tensor's largest number if that is above 1."""
    return largest(*((a - b) / b.abs().max().clamp(min=1) for a, b in zip(ours, theirs)))


def start(case: str) -> Iterator[Row]:
    """The first steps of a run with default flags, each kernel's error at its own line."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    losses, _ = run_toy(toy_config(f"--max_steps 3 {case}"))
    yield at_most("steps without a finite loss", 3 - losses.isfinite().sum().item(), 0)


def three_trees(length: int) -> tuple[Tensor, Tensor]:
    """(tree, branch) of so many tokens: each tree is a trunk and two branches."""
    token = torch.arange(length, device=DEVICE)
    return token * 3 // length, token * 9 // length % 3


def flex(case: str) -> Iterator[Row]:
    """FlexAttention against the dense mask, in the shape of the 2B's layers."""
    length, heads, d = int(case), *((4, 16) if TOY else (16, 128))
    trees = three_trees(length)
    dense, fast = TreeAttention(*trees, flex=False, span=length), TreeAttention(*trees, flex=True)
    spans = TreeAttention(*trees, flex=False) if TOY else fast  # for backward
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        q, k, v, pull = (
            torch.randn(1, length, h, d, device=DEVICE, dtype=dtype)
            for h in (heads, heads // 2, heads // 2, heads)
        )
        with torch.no_grad():
            expected = dense(0, q, k, v)
            error = largest(fast(0, q, k, v) - expected) / largest(expected)
        yield at_most(f"output, {dtype}, of the largest", error, bound)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        ours = torch.autograd.grad(spans(0, *inputs), inputs, pull)
        theirs = torch.autograd.grad(dense(0, *inputs), inputs, pull)
        yield at_most(f"gradients, {dtype}, of the largest", relative(ours, theirs), bound)


def golden(case: str) -> Iterator[Row]:
    """Logits, loss and gradients of the official code and of transformers, from tests/golden."""
    folder = ROOT / "tests" / "golden" / case
    facts = read_json(folder / "cases.json")
    tensors = load_file(folder / "cases.safetensors", device=str(DEVICE))
    models = [load_model(folder / "checkpoint", DEVICE, t) for t in (torch.float, torch.bfloat16)]
    for policy in models:
        policy.image_context_id = facts["image_context_token_id"]

    def logits_of(policy: InternVL, name: str) -> Tensor:
        ids, tiles = tensors[f"{name}/input_ids"], tensors.get(f"{name}/tiles")
        if tiles is None and (ids == policy.image_context_id).any():
            tiles = tensors["tiles_uint8"][facts["cases"][name].get("tiles", slice(None))]
        return policy(ids, tiles)

    exact, rounded = [], []
    for key, expected in tensors.items():
        name, kind = key.split("/")[0], key.split("/")[-1]
        if kind in ("logits", "logits_last4") and f"{name}/input_ids" in tensors:
            with torch.no_grad():
                full, half = (logits_of(policy, name) for policy in models)
            exact.append(full[:, -expected.shape[1] :] - expected)
            rounded.append(half - full)
    yield at_most("logits, fp32, largest difference", largest(*exact), 1e-4)
    yield at_most("logits, bf16 against fp32, largest difference", largest(*rounded), 0.5)

    policy, name = models[0], "loss" if "loss/labels" in tensors else "m_loss"
    labels = tensors[f"{name}/labels"]
    loss = -token_logps(logits_of(policy, name), labels).sum() / (labels[:, 1:] != -100).sum()
    loss.backward()
    yield at_most("loss, difference", largest(loss.detach() - tensors[f"{name}/loss"]), 1e-5)
    pieces = stored_pieces(policy, OFFICIAL_QWEN if "qwen" in case else OFFICIAL_INTERNLM2)
    ours, theirs = [], []
    for parameter, p in policy.named_parameters():
        for stored, gradient in split_stored(p.grad, pieces[parameter]).items():
            key = f"{name}/grad.{stored}"
            if key not in tensors:  # of the largest tensors only some rows are kept
                key, gradient = f"{key}[grad_rows]", gradient[tensors[f"{name}/grad_rows"]]
            ours.append(gradient)
            theirs.append(tensors[key])
    yield at_most("gradients, largest difference", relative(ours, theirs), 1e-4)


def make_world(case: str) -> Iterator[Row]:
    """The toy world, its weights in float32 so that saved ones keep every bit."""
    command = [sys.executable, str(ROOT / "toy.py"), "--out", str(WORLD), "--pairs", "32"]
    subprocess.run(command, check=True)
    files = list((WORLD / "model").glob("*.safetensors"))
    for path in files:
        tensors = {name: w.float() for name, w in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    yield Row("weight files", len(files))


def toy_config(flags: str) -> train.TrainConfig:
    """A run on the toy's world in a new folder."""
    fixed = f"--model_dir {WORLD}/model --meta {WORLD}/meta.json --lr 1e-3 --drop_path 0"
    fixed += f" --batch_size {4 if TOY else 8} --pack_tokens 900 --out_dir"
    return parse_cli(train.TrainConfig, [*fixed.split(), tempfile.mkdtemp(dir="."), *flags.split()])


def run_toy(cfg: train.TrainConfig, device: torch.device = DEVICE) -> Trained:
    with process_group(cfg.seed):
        train.train(cfg, device)
    return results(cfg)


def results(cfg: train.TrainConfig) -> Trained:
    losses = [row["loss"] for _, row in read_jsonl(cfg.out_dir / "metrics.jsonl")]
    return torch.tensor(losses), load_model(cfg.out_dir / "model").state_dict()


def steps(case: str) -> Iterator[Row]:
    """plain.py on the CPU against train.py here; switches plain.py lacks, against our CPU run."""
    count, bf16 = 2 if TOY else 8, "bf16" in case
    flags = f"--max_steps {count} {'' if bf16 else '--dtype fp32'} {case}"
    losses, weights = run_toy(toy_config(flags))
    cfg = toy_config(flags)
    if bf16 or "lora" in case:
        expected_losses, expected = run_toy(cfg, CPU)
    else:
        shared = cfg.model_dir, cfg.meta, cfg.max_steps, cfg.batch_size
        policy, numbers = plain.train(plain.PlainConfig(*shared, lr=cfg.lr))
        expected_losses, expected = torch.tensor(numbers), policy.state_dict()
    bound = 0.1 if bf16 else 1e-5 if TOY else 1e-4
    yield at_most(f"losses of {count} steps", largest(losses - expected_losses), bound)
    differences = {name: weights[name] - expected[name] for name in weights}
    for name, difference in differences.items():
        if name.endswith("attn.qkv.bias"):  # a key's bias has no gradient but rounding
            difference.chunk(3)[1].zero_()
        if bf16:  # rounded by other random numbers on each device: a few steps of bfloat16 apart
            differences[name] = (difference.abs() - expected[name].abs() / 64).relu()
    # Adam moves a weight by up to the rate a step, whatever its gradient's size
    bound = 2e-3 * count if bf16 else 10 * bound
    yield at_most("weights, largest difference", largest(*differences.values()), bound)


def ids(case: str) -> Iterator[Row]:
    """Answers of captured decoding against eager decoding here and on the CPU, fp32."""
    settings = {"temperature": float(case), "max_new_tokens": 8 if TOY else 64}
    records = [data_set[0] for data_set in read_meta(WORLD / "meta.json", 12)]
    prompts = [
        Prompt(str(n), r.question, r.images, max_tiles=r.max_tiles, samples=range(4))
        for n, r in enumerate(records[: 2 if TOY else None])
    ]

    def answers(device: torch.device = DEVICE, batches: Iterable[list] = (prompts,)) -> set[tuple]:
        policy, tokenizer = load_model(WORLD / "model", device), load_tokenizer(WORLD / "model")
        generator = Generator(policy, tokenizer, cache_tokens=8192, **settings)
        samples = [sample for batch in batches for sample in generator.run(batch)]
        return {(sample.prompt_id, sample.sample, sample.ids) for sample in samples}

    expected = answers()
    name = f"answers of {len(expected)} that differ: "
    yield Row(f"{name}decoding on the CPU", len(expected - answers(CPU)))
    yield Row(f"{name}each prompt alone", len(expected - answers(batches=[[p] for p in prompts])))
    alone = answers(batches=[[replace(prompt, samples=range(1)) for prompt in prompts]])
    yield Row(f"answers of {len(alone)} that differ: one sample alone", len(alone - expected))
    generate.Captured = lambda step: step
    yield at_most(f"{name}eager decoding", len(expected - answers()), 0)


def resume(case: str) -> Iterator[Row]:
    """A run killed after a checkpoint and continued, against one that was never stopped."""
    models, context = [], multiprocessing.get_context("fork")  # so CUDA may not start here
    for starts in ("whole", "whole", "killed, whole"):  # the first only chooses kernels, by speed
        cfg = toy_config(f"--save_every 1 --max_steps 3 {case}")
        for start in starts.split(", "):
            child = context.Process(target=run_toy, args=(cfg,))
            child.start()
            if start == "killed":
                while child.is_alive() and not list(cfg.out_dir.glob("checkpoints/step-*1")):
                    time.sleep(0.005)
                child.kill()
            child.join()
        losses, weights = results(cfg)
        models.append(weights)
        yield at_most("steps missing or repeated", abs(len(losses) - 3), 0)
    difference = largest(*(weights - models[1][name] for name, weights in models[2].items()))
    yield at_most("weights, largest difference", difference, 0)


def shape(size: str) -> InternVLConfig:
    return plan.named_config("toy" if TOY else size)


def noise(size: str) -> InternVL:
    return pair_bench.with_noise(plan.meta_model(shape(size)).to(DTYPE), DEVICE).eval()


def seconds(work: Callable[[], object], count: int) -> float:
    """Of one call, after one to warm up."""
    work()
    return plan.seconds_of(lambda: [work() for _ in range(count)], DEVICE) / count


def peak() -> Row:
    """What the GPU has held at most; a CPU does not count it."""
    return Row("peak GB", None if TOY else torch.cuda.max_memory_allocated() / plan.GB)


def bench(case: str) -> Iterator[Row]:
    """train.py --bench: a pair's step with each idea switched on in turn."""
    config = shape(case)
    modes = pair_bench.modes_of(train.with_recipe(train.TrainConfig(), config, print), DEVICE)
    modes, tree = modes[3:4] if TOY else modes, pair_bench.paper_tree(config, SHORTER)
    for name, row in pair_bench.measured_rows(modes, config, tree, DEVICE):
        yield Row(f"{name}: seconds", row["seconds"])
        yield Row(f"{name}: peak GB", row["peak GB"])


def tiles(case: str) -> Iterator[Row]:
    """FlexAttention of the 8B's shape, at a multiple of its block and one token less."""
    length = int(case) // SHORTER
    attend = TreeAttention(*three_trees(length), flex=True)
    inputs = [torch.randn(1, length, h, 128, dtype=DTYPE, device=DEVICE) for h in (32, 8, 8)]
    forward = torch.no_grad()(partial(attend, 0, *inputs))
    yield Row("forward, ms", 1e3 * seconds(forward, 5))
    if not TOY:
        wanted = [x.requires_grad_() for x in inputs]
        both = lambda: torch.autograd.grad(attend(0, *wanted).sum(), wanted)  # noqa: E731
        yield Row("forward and backward, ms", 1e3 * seconds(both, 5))


def mpo(case: str) -> Iterator[Row]:
    """A full MPO step at random weights: ten packs, gradient, clipping, AdamW."""
    size, *flags = case.split() + ["--pack_tokens", "80", "--max_length", "80"] * TOY
    config = shape(size)
    group = process_group(0)  # held, as it would end with its context
    group.__enter__()
    cfg = train.with_recipe(parse_cli(train.TrainConfig, flags), config, print)
    cfg = plan.settle(cfg, config, 1, DEVICE, print)
    try:
        meter = plan.Meter(cfg, config, DEVICE)
    except InputError as error:
        yield Row(str(error), None, "", "skipped")
        return
    policy = train.prepare(plan.meta_model(config), cfg).to(FLOATS[cfg.state_dtype])
    train.shard(policy, cfg, DEVICE)
    pair_bench.with_noise(policy, DEVICE).train()
    tree = pair_bench.paper_tree(config, SHORTER)
    fit = max(1, cfg.pack_tokens // tree.size)
    count = 2 if TOY else 10  # as one of eight GPUs gets of the paper's 256 pairs
    trees = [replace(tree, images=[(Path(str(n)), *tree.images[0][1:])]) for n in range(fit)]
    packs = [(pair_bench.example_pack(config, trees), n, n * fit) for n in range(count)]
    step = train.Step(0, packs, [None] * count * fit, [trees] * count, [])
    zeros = lambda pack: torch.zeros(pack.num_responses, device=DEVICE)  # noqa: E731
    run = SimpleNamespace(cfg=cfg, device=DEVICE, policy=policy, reference=zeros)
    run.terms, run.hyper = parse_objective("mpo"), {"beta": cfg.beta}
    optimizer = train.make_optimizer(cfg, policy)
    graphs = torch._dynamo.utils.counters["stats"]

    def once() -> dict[str, float]:
        train.step_gradient(run, step)
        train.clip_gradient(run)
        optimizer.step(cfg.lr)
        policy.zero_grad()
        return meter(step, None)

    once()  # compiles
    compiled = graphs["unique_graphs"]
    figures = max((once() for _ in range(1 if TOY else 3)), key=lambda row: row["mfu"])
    yield Row("tokens/s", figures["tokens_per_s"])
    yield Row("pairs/s", figures["pairs_per_s"])
    yield at_least("MFU", figures["mfu"], 0.4 if size == "2b" else None)
    yield peak()
    yield Row("blocks computed again", cfg.recompute_blocks)
    if not TOY:
        used = torch.cuda.max_memory_allocated() / plan.plan_of(cfg, config, 1, DEVICE).total
        yield at_most("peak off the plan, share", abs(used - 1), 0.1)
    yield Row("graphs compiled in the first step", compiled)
    yield at_most("graphs compiled later", graphs["unique_graphs"] - compiled, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not TOY:
            torch.cuda.set_sync_debug_mode("warn")
        once()
    yield Row("host syncs a step", sum("synchroniz" in str(w.message) for w in caught))


def sample(case: str) -> Iterator[Row]:
    """Prefill and captured decoding of the 8B, each step with the choice of its tokens."""
    size, rows = case.split()
    policy, length, rows, count = noise(size), 1024, int(rows), 32
    if TOY:
        length, rows, count = 64, min(rows, 4), 4
    asked = race.Asked([[3] * length], [count], None, rows, 1.0)
    for _ in range(2):  # the first time warms up
        scheduler = race.our_scheduler(policy, asked)
        ticks = [time.perf_counter()]
        ticks += [time.perf_counter() for row in scheduler.run() if row.sample == 0]
    prefill, _, *decoding = np.diff(ticks)  # the first step of decoding is captured
    step = median(decoding)
    yield Row("prefill tokens/s", length / prefill)
    yield at_least("decode tokens/s", rows / step, {1: 180, 256: 8000}.get(rows))
    read = sum(p.nbytes for p in policy.language_model.parameters())
    read -= policy.language_model.model.tok_embeddings.weight.nbytes  # one row of it is read
    read += sum(x.nbytes for pair in scheduler.cache.memory for x in pair)
    source = torch.ones(256 << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source), 5)
    yield Row("share of copy bandwidth", read / step / bandwidth)
    yield peak()


def vit(case: str) -> Iterator[Row]:
    """Tiles a second through the 300M encoder, eager and compiled, forward and with backward."""
    policy, count = noise("2b"), 2 if TOY else 64
    size = policy.config.tile_size
    tiles = torch.randint(0, 255, (count, 3, size, size), device=DEVICE).byte()
    if case == "compiled":
        train.compile_blocks(policy)
    forward = torch.no_grad()(partial(policy.image_features, tiles))
    yield at_least("tiles/s, forward", count / seconds(forward, 5), 550)
    both = lambda: policy.image_features(tiles).float().sum().backward()  # noqa: E731
    yield Row("tiles/s, forward and backward", count / seconds(both, 3))


def mmpr(case: str) -> Iterator[Row]:
    """Sampling at MMPR's lengths, end to end: 300 tokens in the mean, one in a hundred 4,097."""
    questions, samples, limit, prompt = (2, 3, 12, 40) if TOY else (16, 32, 4097, 1900)
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(190), 0.8, (questions, samples)).astype(int).clip(8, limit)
    lengths[draw.random(lengths.shape) < 0.01] = limit
    asked = race.Asked([[3] * prompt] * questions, [limit] * questions, None, samples, 1.0)
    scheduler = race.our_scheduler(noise(case), asked)

    def push(row: generate.Row, token: int, logp: float) -> None:
        """An answer ends at its length, whatever its tokens are."""
        row.ids.append(token)
        if len(row.ids) == lengths[int(row.group.prompt.id), row.sample]:
            row.finish_reason = "stop"

    scheduler.generator.push = push
    seconds = plan.seconds_of(lambda: list(scheduler.run()), DEVICE)
    yield Row("tokens/s, end to end", lengths.sum() / seconds)
    yield peak()


def peers(case: str) -> Iterator[Row]:
    """The lines of tools/race.py: transformers' InternVL of our shape, and ours, in seconds."""
    if not race.find_spec("transformers"):
        yield Row("transformers is not installed", None, "", "skipped")
        return
    ours = noise("3-2b")
    with DEVICE:
        theirs = race.hf_model(ours).to(DTYPE)
    for line, contestants in race.SECTIONS[case](TOY, ours, theirs):
        for who, work in contestants.items():
            torch._dynamo.reset()  # of the contestants before, which have other shapes
            yield Row(f"{line}: {who}, seconds", seconds(work, 1 if TOY else 3))


def loader(case: str) -> Iterator[Row]:
    """Reading and cutting a photo's worth of pixels in one process, as the prefetch thread does."""
    path, dots = Path("photo.jpg"), torch.randint(0, 255, (84, 112, 3)).byte()
    Image.fromarray(dots.numpy()).resize((1344, 1008), Image.Resampling.BICUBIC).save(path)
    read = lambda: pixels(cut_tiles(load_image(path), 12))  # noqa: E731
    rate = 1 / seconds(read, 2 if TOY else 20)
    yield Row("images/s", rate)
    yield Row("tiles/s", len(read()) * rate)
