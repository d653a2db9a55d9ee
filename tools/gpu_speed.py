"""The fast parts of tools/gpu_check.py: how fast each thing is at random weights, row by row."""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import train
from cache import Captured
from config import InternVLConfig
from generate import Generator, Group, Prompt, Scheduler, decode
from generate import Row as GeneratedRow
from images import load_image
from losses import parse_objective, token_logps
from model import InternVL
from runtime import parse_cli, start_process
from tokenizer import load_tokenizer
from tools import bench, plan, race
from tools.releases import named_config
from vision import cut_tiles, pixels


@dataclass(frozen=True)
class Setting:
    """What every part knows of this run."""

    folder: Path  # scratch, with the toy world in world/
    device: torch.device
    toy: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def config(self, size: str) -> InternVLConfig:
        return named_config("toy" if self.toy else size)


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


def noise_model(setting: Setting, config: InternVLConfig) -> InternVL:
    """A model of random weights, for speed alone."""
    noise = plan.meta_model(config).to(setting.dtype).to_empty(device=setting.device).eval()
    for p in noise.parameters():
        nn.init.normal_(p, std=0.02)
    return noise


def one_pair(setting: Setting, case: str) -> Iterator[Row]:
    """train.py --bench: a pair's step with each idea switched on in turn."""
    cfg = train.with_recipe(train.TrainConfig(), setting.config(case), print)
    policy = train.prepare(noise_model(setting, setting.config(case)).train(), cfg)
    tree = bench.paper_tree(policy.config, 32 if setting.toy else 1)
    for p in policy.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for mode in bench.MODES[3:4] if setting.toy else bench.MODES:
        row = bench.measured_row(mode, cfg, policy, tree, setting.device)
        yield measured(f"{mode.name}: seconds", row["seconds"])
        yield measured(f"{mode.name}: peak GB", row["peak GB"])


def flex_tiles(setting: Setting, case: str) -> Iterator[Row]:
    """FlexAttention of the 8B's shape: other lengths, dynamic shapes, smaller backward tiles."""
    length, *words = case.split()
    if "dynamic" in words:
        fast = torch.compile(model.flex_attention, dynamic=True)
        model.compiled_flex_attention = lambda: fast
    if "tiles" in words:
        sides = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
        model.FLEX_OPTIONS.update(sides)
    token = torch.arange(256 if setting.toy else int(length), device=setting.device)
    tree, branch = token * 3 // len(token), token * 9 // len(token) % 3
    attend, options = model.TreeAttention(tree, branch, True), {"dtype": setting.dtype}
    inputs = [torch.randn(1, len(token), h, 128, **options).to(token.device) for h in (32, 8, 8)]
    forward = torch.no_grad()(lambda: attend(0, *inputs))
    yield measured("forward, ms", 1e3 * race.timed(forward, setting.device, 5))
    if setting.on_gpu:
        wanted = [x.requires_grad_() for x in inputs]
        both = lambda: torch.autograd.grad(attend(0, *wanted).sum(), wanted)  # noqa: E731
        yield measured("forward and backward, ms", 1e3 * race.timed(both, setting.device, 5))


def vit(setting: Setting, case: str) -> Iterator[Row]:
    """Tiles a second through the 300M encoder, eager and compiled, forward and with backward."""
    policy, count = noise_model(setting, setting.config("2b")), 2 if setting.toy else 64
    size = policy.config.tile_size
    tiles = torch.randint(0, 255, (count, 3, size, size), device=setting.device).byte()
    if case == "compiled":
        for block in policy.vision_model.encoder.layers:
            block.compile()
    forward = torch.no_grad()(lambda: policy.image_features(tiles))
    rate = count / race.timed(forward, setting.device, 5)
    yield at_least(setting, "tiles/s, forward", rate, 550)
    both = lambda: policy.image_features(tiles).float().sum().backward()  # noqa: E731
    yield measured("tiles/s, forward and backward", count / race.timed(both, setting.device, 3))


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
    policy.to_empty(device=device).train()
    for p in policy.parameters():
        nn.init.normal_(p, std=0.02)
    tree = bench.paper_tree(config, 32 if setting.toy else 1)
    fit = max(1, cfg.pack_tokens // plan.load_of([tree]).tokens)
    trees = [replace(tree, images=[(Path(str(n)), *tree.images[0][1:])]) for n in range(fit)]
    packs = [(bench.example_pack(config, trees), n, n * fit) for n in range(2)]
    step = train.Step(0, packs, 2 * fit, [trees, trees], [], [], [])
    zeros = lambda pack, cfg: torch.zeros(pack.num_responses, device=device)  # noqa: E731
    state = train.Run(cfg, process, parse_objective("mpo"), policy, zeros)
    optimizer = train.make_optimizer(cfg, policy)
    hyper = {"beta": cfg.beta, "label_smoothing": None, "bco_shift": 0.0}
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]  # noqa: E731

    def once() -> None:
        train.step_gradient(state, step, hyper)
        train.clip_gradient(state)
        optimizer.step()
        optimizer.zero_grad()

    once()  # compiles
    compiled = graphs()
    seconds = race.timed(once, device, 1 if setting.toy else 2)
    peak = race.peak_memory(device)  # before a large product measures what the device can do
    load = plan.load_of(trees) + plan.load_of(trees)
    useful = plan.total_flops(plan.flops(config, load, cfg.trained_parts))
    mfu = useful / seconds / plan.device_peak(device, train.compute_dtype(cfg, device))[0]
    yield measured("tokens/s", load.tokens / seconds)
    yield measured("pairs/s", step.pairs / seconds)
    yield at_least(setting, "MFU", mfu, 0.4) if size == "2b" else measured("MFU", mfu)
    yield measured("peak GB", peak / 1e9)
    yield measured("blocks computed again", cfg.recompute_blocks)
    if setting.on_gpu:
        yield at_most("peak off the plan, share", abs(peak / planned.total - 1), 0.1)
    yield measured("graphs compiled in the first step", compiled)
    yield at_most("graphs compiled later", graphs() - compiled, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        once()
    yield measured("host syncs a step", sum("synchroniz" in str(w.message) for w in caught))


def sampling_speed(
    setting: Setting, policy: InternVL, length: int, rows: int, count: int
) -> tuple[float, float, race.Sampling]:
    """(seconds of a prefill, of a decoding step, the sampling) of many rows of one prompt."""
    step = Captured(decode) if setting.on_gpu else decode
    sampling = race.Sampling(policy, [3] * length, rows, count + 2, step)
    prefill = race.timed(sampling.prefill, setting.device, 2)
    return prefill, race.timed(sampling.step, setting.device, count), sampling


@torch.inference_mode()
def sample(setting: Setting, case: str) -> Iterator[Row]:
    """Prefill and captured decoding of the 8B in bfloat16, random weights."""
    size, rows = case.split()[0], int(case.split()[1])
    policy, length, count = noise_model(setting, setting.config(size)), 1024, 32
    if setting.toy:
        length, rows, count = 64, min(rows, 4), 2
    prefill, seconds, sampling = sampling_speed(setting, policy, length, rows, count)
    yield measured("prefill tokens/s", length / prefill)
    aim = {"1": 180.0, "256": 8000.0}.get(case.split()[1], 0.0)
    yield at_least(setting, "decode tokens/s", rows / seconds, aim)
    weights = sum(p.nbytes for p in policy.language_model.parameters())
    weights -= policy.language_model.model.tok_embeddings.weight.nbytes  # one row of it is read
    moved = weights + sum(x.nbytes for pair in sampling.cache.memory for x in pair)
    yield measured("share of copy bandwidth", moved / seconds / race.copy_bandwidth(setting.device))
    yield measured("peak GB", race.peak_memory(setting.device) / 1e9)


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
    tokenizer = load_tokenizer(setting.folder / "world" / "model")
    generator = KnownLengths(noise_model(setting, setting.config(case)), tokenizer, **settings)
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(190), 0.8, (questions, samples)).astype(int).clip(8, limit)
    lengths[draw.random(lengths.shape) < 0.01] = limit
    generator.lengths = lengths
    groups = [
        Group(Prompt(str(n), ""), [3] * prompt, [], 0, limit, list(range(samples)))
        for n in range(questions)
    ]
    all_rows = lambda: list(Scheduler(generator, iter(groups)).run())  # noqa: E731
    seconds = plan.seconds_of(all_rows, setting.device)
    yield measured("tokens/s, end to end", lengths.sum() / seconds)
    yield measured("peak GB", race.peak_memory(setting.device) / 1e9)


def peers(setting: Setting, case: str) -> Iterator[Row]:
    """transformers on a Qwen2 of our shape: greedy tokens/s, or seconds of a text pair's step."""
    if not importlib.util.find_spec("transformers"):
        yield Row("transformers is not installed", None, "", "skipped")
        return
    theirs, config = importlib.import_module("transformers"), named_config("3-2b").llm
    if setting.toy:
        config = replace(config, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        config = replace(config, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    shape = {name: getattr(config, name) for name in [*names.split(), "num_key_value_heads"]}
    with setting.device:
        other = theirs.Qwen2ForCausalLM(theirs.Qwen2Config(**shape)).to(setting.dtype).eval()
    ours = noise_model(setting, replace(named_config("3-2b"), llm=config))
    if case == "pair":
        yield from two_passes(setting, other, ours)
        return
    rows, (length, count) = int(case), (16, 4) if setting.toy else (512, 48)
    prompt = torch.full((rows, length), 3, device=setting.device)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    generate = lambda: other.generate(prompt, pad_token_id=0, **options)  # noqa: E731
    with torch.inference_mode():
        seconds = race.timed(generate, setting.device, 1)
        prefill, step, _ = sampling_speed(setting, ours, length, rows, count)
    yield measured("transformers' generate, tokens/s", rows * count / seconds)
    yield measured("ours, tokens/s", rows * count / (prefill + (count - 1) * step))


def two_passes(setting: Setting, other: nn.Module, ours: InternVL) -> Iterator[Row]:
    """The official step, each response with a prompt of its own, reference and policy; and ours."""
    shorter = 32 if setting.toy else 1
    tree = bench.example_tree(ours.config, 0, 1872 // shorter, (350 // shorter, 300 // shorter))
    pack, cfg = bench.example_pack(ours.config, [tree]).to(setting.device), train.TrainConfig()
    texts = [torch.tensor([tree.trunk + r], device=setting.device) for r in tree.responses]

    def official() -> None:
        for text in texts:
            with torch.no_grad():
                token_logps(other(text).logits, text)
            token_logps(other(text).logits, text)[0, len(tree.trunk) - 1 :].sum().backward()

    cached = lambda: train.score(ours, pack, cfg)[0].sum().backward()  # noqa: E731
    for name, step in (("official two passes", official), ("ours, cached reference", cached)):
        yield measured(f"{name}, seconds", race.timed(step, setting.device, 2))


def loader(setting: Setting, case: str) -> Iterator[Row]:
    """Reading and cutting a photo's worth of pixels in one process, as the prefetch thread does."""
    path, noise = setting.folder / "photo.jpg", torch.randint(0, 255, (84, 112, 3)).byte()
    Image.fromarray(noise.numpy()).resize((1344, 1008), Image.Resampling.BICUBIC).save(path)
    device, count = torch.device("cpu"), 2 if setting.toy else 20
    read = lambda: pixels(cut_tiles(load_image(path), 12))  # noqa: E731
    rate = 1 / race.timed(read, device, count)
    yield measured("images/s", rate)
    yield measured("tiles/s", len(read()) * rate)
