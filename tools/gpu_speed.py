"""The fast parts of tools/gpu_check.py: how fast each thing is at random weights, row by row."""

import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import train
from cache import Captured, KVCache, Room, num_blocks
from config import InternVLConfig
from generate import Generator, Scheduler, decode, prefill
from generate import Row as GeneratedRow
from images import load_image
from model import InternVL
from runtime import parse_cli, start_process
from tools import bench, plan, race
from tools.releases import named_config
from vision import cut_tiles, pixels


@dataclass(frozen=True)
class Setting:
    """What every part knows of this run."""

    folder: Path  # scratch, with the toy world in world/
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def toy(self) -> bool:
        """Small shapes and few steps, where there is no GPU."""
        return not self.on_gpu

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def config(self, size: str) -> InternVLConfig:
        return named_config("toy" if self.toy else size)

    def model(self, size: str) -> InternVL:
        """Random weights, for speed alone."""
        return bench.noise_model(self.config(size), self.dtype, self.device).eval()

    def seconds(self, work: Callable[[], object], count: int) -> float:
        """Of one call, after one to warm up."""
        work()
        return plan.seconds_of(lambda: [work() for _ in range(count)], self.device) / count

    def peak(self) -> "Row":
        if self.on_gpu:
            return measured("peak GB", torch.cuda.max_memory_allocated() / 1e9)
        return measured("peak GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    figure: float | None
    expected: str
    verdict: str  # ok, FAIL, below (an aim missed), measured or skipped


def at_most(name: str, figure: float, bound: float) -> Row:
    """A claim of correctness; NaN fails."""
    return Row(name, figure, f"<= {bound:g}", "ok" if figure <= bound else "FAIL")


def at_least(setting: Setting, name: str, figure: float, aim: float) -> Row:
    """An aim on one H100; at toy size there is none."""
    if setting.toy:
        return measured(name, figure)
    return Row(name, figure, f">= {aim:g}", "ok" if figure >= aim else "below")


def measured(name: str, figure: float) -> Row:
    return Row(name, figure, "", "measured")


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def one_pair(setting: Setting, case: str) -> Iterator[Row]:
    """train.py --bench: a pair's step with each idea switched on in turn."""
    config = setting.config(case)
    cfg = train.with_recipe(train.TrainConfig(), config, print)
    modes = bench.modes_of(cfg, setting.device)[3 if setting.toy else 0 : 4 if setting.toy else 9]
    tree = bench.paper_tree(config, 32 if setting.toy else 1)
    for name, row in bench.measured_rows(modes, config, tree, setting.device):
        yield measured(f"{name}: seconds", row["seconds"])
        yield measured(f"{name}: peak GB", row["peak GB"])


def flex_tiles(setting: Setting, case: str) -> Iterator[Row]:
    """FlexAttention of the 8B's shape: other lengths, dynamic shapes, smaller backward tiles."""
    length, *words = case.split()
    if "dynamic" in words:
        fast = torch.compile(model.flex_attention, dynamic=True)
        model.compiled_flex_attention = lambda: fast
    if "tiles" in words:
        sides = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
        model.FLEX_OPTIONS.update(sides)
    length = 256 if setting.toy else int(length)
    token, dtype = torch.arange(length, device=setting.device), setting.dtype
    attend = model.TreeAttention(token * 3 // length, token * 9 // length % 3, True)
    inputs = [torch.randn(1, length, h, 128, dtype=dtype).to(setting.device) for h in (32, 8, 8)]
    forward = torch.no_grad()(lambda: attend(0, *inputs))
    yield measured("forward, ms", 1e3 * setting.seconds(forward, 5))
    if setting.on_gpu:
        wanted = [x.requires_grad_() for x in inputs]
        both = lambda: torch.autograd.grad(attend(0, *wanted).sum(), wanted)  # noqa: E731
        yield measured("forward and backward, ms", 1e3 * setting.seconds(both, 5))


def vit(setting: Setting, case: str) -> Iterator[Row]:
    """Tiles a second through the 300M encoder, eager and compiled, forward and with backward."""
    policy, count = setting.model("2b"), 2 if setting.toy else 64
    size = policy.config.tile_size
    tiles = torch.randint(0, 255, (count, 3, size, size), device=setting.device).byte()
    for block in policy.vision_model.encoder.layers if case == "compiled" else ():
        block.compile()
    forward = torch.no_grad()(lambda: policy.image_features(tiles))
    yield at_least(setting, "tiles/s, forward", count / setting.seconds(forward, 5), 550)
    both = lambda: policy.image_features(tiles).float().sum().backward()  # noqa: E731
    yield measured("tiles/s, forward and backward", count / setting.seconds(both, 3))


def mpo(setting: Setting, case: str) -> Iterator[Row]:
    """A full MPO step at random weights: two packs, gradient, clipping, AdamW."""
    size, *flags = case.split()
    config, device = setting.config(size), setting.device
    flags += ["--pack_tokens", "80"] * setting.toy
    cfg = train.with_recipe(parse_cli(train.TrainConfig, flags), config, print)
    cfg = plan.settle(cfg, config, 1, device, print)
    planned = plan.plan_of(cfg, config, 1, device)
    memory = torch.cuda.mem_get_info(device)[1] if setting.on_gpu else 1e15
    if planned.needed > memory:
        yield Row("plan, GB", planned.needed / 1e9, f"<= {memory / 1e9:.0f}", "skipped")
        return
    process = replace(start_process(0), device=device)
    policy = train.prepare(plan.meta_model(config), cfg).to(train.state_dtype(cfg))
    train.shard(policy, cfg, process)
    bench.add_noise(policy.to_empty(device=device).train())
    tree = bench.paper_tree(config, 32 if setting.toy else 1)
    fit = max(1, cfg.pack_tokens // tree.size)
    trees = [replace(tree, images=[(Path(str(n)), *tree.images[0][1:])]) for n in range(fit)]
    packs = [(bench.example_pack(config, trees), n, n * fit) for n in range(2)]
    step = train.Step(0, packs, 2 * fit, [trees, trees], [], [], [])
    zeros = lambda pack, cfg: torch.zeros(pack.num_responses, device=device)  # noqa: E731
    state = SimpleNamespace(cfg=cfg, process=process, policy=policy, hyper={"beta": cfg.beta})
    state.terms, state.reference = train.parse_objective("mpo"), zeros
    optimizer = train.make_optimizer(cfg, policy)
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]  # noqa: E731

    def once() -> None:
        train.step_gradient(state, step)
        train.clip_gradient(state)
        optimizer.step()
        optimizer.zero_grad()

    plan.seconds_of(once, device)  # compiles
    compiled = graphs()
    seconds = setting.seconds(once, 1 if setting.toy else 2)
    peak = setting.peak()  # before a large product measures what the device can do
    load = plan.load_of(trees) + plan.load_of(trees)
    useful = sum(plan.flops(config, load, cfg.trained_parts))
    mfu = useful / seconds / plan.device_peak(device, train.compute_dtype(cfg, device))[0]
    yield measured("tokens/s", load.tokens / seconds)
    yield measured("pairs/s", step.pairs / seconds)
    yield at_least(setting, "MFU", mfu, 0.4) if size == "2b" else measured("MFU", mfu)
    yield peak
    yield measured("blocks computed again", cfg.recompute_blocks)
    if setting.on_gpu:
        yield at_most("peak off the plan, share", abs(peak.figure * 1e9 / planned.total - 1), 0.1)
    yield measured("graphs compiled in the first step", compiled)
    yield at_most("graphs compiled later", graphs() - compiled, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        once()
    yield measured("host syncs a step", sum("synchroniz" in str(w.message) for w in caught))


def decoding(
    setting: Setting, policy: InternVL, length: int, rows: int, count: int
) -> tuple[float, float, int]:
    """(seconds of a prefill, of a decoding step, bytes of its cache): many rows of one prompt."""
    head, blocks = policy.language_model.head, num_blocks(length) + rows * num_blocks(count + 2)
    options = {"rounded": setting.on_gpu}
    cache = KVCache(policy.config.llm, blocks, head.device, head.dtype, rows > 1, **options)
    prompt, answers = Room(), [Room() for _ in range(rows)]
    cache.enlarge(prompt, length, prompt=True)
    decode_once = Captured(decode) if setting.on_gpu else decode

    def step() -> None:
        for answer in answers:
            cache.enlarge(answer, answer.length + 1)
        plan_of_step = cache.plan([(prompt, answer) for answer in answers], [3] * rows)
        decode_once(policy, cache, plan_of_step)

    read = lambda: prefill(policy, [[3] * length], None, cache.prefill([prompt], [length]))  # noqa: E731
    size = sum(x.nbytes for pair in cache.memory for x in pair)
    return setting.seconds(read, 2), setting.seconds(step, count), size


@torch.inference_mode()
def sample(setting: Setting, case: str) -> Iterator[Row]:
    """Prefill and captured decoding of the 8B in bfloat16, random weights."""
    size, rows = case.split()
    policy, length, count, aim = setting.model(size), 1024, 32, {"1": 180.0, "256": 8000.0}
    if setting.toy:
        length, rows, count = 64, min(rows, "4"), 2
    prefill_seconds, seconds, cached = decoding(setting, policy, length, int(rows), count)
    yield measured("prefill tokens/s", length / prefill_seconds)
    yield at_least(setting, "decode tokens/s", int(rows) / seconds, aim.get(rows, 0.0))
    weights = sum(p.nbytes for p in policy.language_model.parameters())
    weights -= policy.language_model.model.tok_embeddings.weight.nbytes  # one row of it is read
    source = torch.empty(256 << 20, dtype=torch.uint8, device=setting.device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / setting.seconds(lambda: target.copy_(source), 5)
    yield measured("share of copy bandwidth", (weights + cached) / seconds / bandwidth)
    yield setting.peak()


class KnownLengths(Generator):
    """Answers end where `lengths` (question sample) says, whatever their tokens are."""

    lengths: np.ndarray

    def push(self, row: GeneratedRow, token: int, logp: float) -> None:
        row.ids.append(token)
        if len(row.ids) == self.lengths[int(row.group.prompt.id), row.sample]:
            row.finish_reason = "stop"


def mmpr(setting: Setting, case: str) -> Iterator[Row]:
    """Sampling at MMPR's lengths, end to end: 300 tokens in the mean, one in a hundred 4,097."""
    questions, samples, limit, prompt = (2, 3, 12, 40) if setting.toy else (16, 32, 4097, 1900)
    settings = {"temperature": 1.0, "max_new_tokens": limit, "cache_tokens": 4096 * setting.toy}
    generator = KnownLengths(setting.model(case), race.NoText(), **settings)
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(190), 0.8, (questions, samples)).astype(int).clip(8, limit)
    lengths[draw.random(lengths.shape) < 0.01] = limit
    generator.lengths = lengths
    groups = race.groups_of([[3] * prompt] * questions, samples, limit)
    all_rows = lambda: list(Scheduler(generator, groups).run())  # noqa: E731
    yield measured(
        "tokens/s, end to end", lengths.sum() / plan.seconds_of(all_rows, setting.device)
    )
    yield setting.peak()


def peers(setting: Setting, case: str) -> Iterator[Row]:
    """transformers' InternVL of our shape: greedy tokens/s, or seconds of a text pair's step."""
    if not race.installed("transformers"):
        yield Row("transformers is not installed", None, "", "skipped")
        return
    ours, shorter = setting.model("3-2b"), 32 if setting.toy else 1
    with setting.device:
        theirs = race.hf_model(ours.config).to(next(ours.parameters()).dtype)
        if case == "pair":
            lengths = (350 // shorter, 300 // shorter)
            tree = bench.example_tree(ours.config, 0, 1872 // shorter, lengths)
            official = lambda: race.two_passes(theirs, tree)  # noqa: E731
            yield measured("official two passes, seconds", setting.seconds(official, 2))
            step = race.our_step(ours, [tree])
            yield measured("ours, cached reference, seconds", setting.seconds(step, 2))
            return
        rows, length, count = int(case), 512 // shorter, 4 if setting.toy else 48
        generate = lambda: race.hf_answers(theirs, [[3] * length] * rows, None, 1, count, 0)  # noqa: E731
        rate = rows * count / setting.seconds(generate, 1)
        yield measured("transformers' generate, tokens/s", rate)
    with torch.inference_mode():
        prefill_seconds, step, _ = decoding(setting, ours, length, rows, count)
    yield measured("ours, tokens/s", rows * count / (prefill_seconds + (count - 1) * step))


def loader(setting: Setting, case: str) -> Iterator[Row]:
    """Reading and cutting a photo's worth of pixels in one process, as the prefetch thread does."""
    path, noise = setting.folder / "photo.jpg", torch.randint(0, 255, (84, 112, 3)).byte()
    Image.fromarray(noise.numpy()).resize((1344, 1008), Image.Resampling.BICUBIC).save(path)
    read = lambda: pixels(cut_tiles(load_image(path), 12))  # noqa: E731
    rate = 1 / setting.seconds(read, 2 if setting.toy else 20)
    yield measured("images/s", rate)
    yield measured("tiles/s", len(read()) * rate)
