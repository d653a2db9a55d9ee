"""How fast generation is here: `python generate.py --bench --size 2b`."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime

if __name__ == "__main__":
    runtime.answer_early(__file__)

import torch

from cache import Captured, KVCache, Room, num_blocks  # noqa: E402
from generate import decode, prefill  # noqa: E402
from model import InternVL  # noqa: E402
from runtime import flag, parse_cli, run  # noqa: E402
from tools.releases import named_config  # noqa: E402


@dataclass(frozen=True)
class SpeedConfig:
    """Measure prefill and decode on random weights."""

    bench: bool = flag(True, "generate.py's word for this")
    size: str = flag("toy", "shape of the model: toy, 8b, 3.5-8b, ...")
    bench_prompt: int = flag(256, "tokens of the prompt", 1)
    bench_steps: int = flag(16, "decoding steps", 1)
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto = bf16 on GPU, fp32 on CPU")
    compile: bool = flag(False, "compile the decode step; on a GPU it is captured either way")


@torch.inference_mode()
def measure_generation(cfg: SpeedConfig) -> None:
    """Prefill and decode speed on random weights, beside what the memory allows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = names.get(cfg.dtype, names["bf16" if device.type == "cuda" else "fp32"])
    config = named_config(cfg.size)
    with torch.device("meta"):
        model = InternVL(config, image_context_id=2).to(dtype)
    model = model.to_empty(device=device).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    copy_rate = copy_bandwidth(device)
    name = f"{cfg.size}, {str(dtype)[6:]}, {device.type}, {torch.get_num_threads()} threads"
    print(f"{name}; measured copy bandwidth {copy_rate / 1e9:.1f} GB/s")
    prompt, steps = cfg.bench_prompt, cfg.bench_steps
    ids = torch.randint(3, config.llm.vocab_size, (prompt,)).tolist()
    on_gpu = device.type == "cuda"
    step = torch.compile(decode, dynamic=False) if cfg.compile else decode
    weights = sum(p.numel() for p in model.language_model.parameters()) * dtype.itemsize
    weights -= model.language_model.model.tok_embeddings.weight.nbytes  # one row of it is read
    print("rows  prefill tok/s  decode tok/s   ms/step  MB/step  of copy bandwidth  peak memory")
    for rows in (1, 8, 32):
        sampling = Sampling(model, ids, rows, steps + 2, Captured(step) if on_gpu else step)
        prefill_s = timed(sampling.prefill, device, 2)
        step_s = timed(sampling.step, device, steps)
        per_token = 2 * config.llm.num_hidden_layers * config.llm.num_key_value_heads
        per_token *= config.llm.head_dim * dtype.itemsize
        moved = weights + per_token * (prompt + rows * steps / 2)
        share = moved / step_s / copy_rate
        print(
            f"{rows:>4}  {prompt / prefill_s:>13.1f}  {rows / step_s:>12.1f}  {step_s * 1e3:>8.2f}"
            f"  {moved / 1e6:>7.1f}  {share:>17.0%}  {peak_memory(device) / 1e9:>8.2f} GB"
        )
    measure_fork(model, cfg, device, step)


class Sampling:
    """Many rows that continue one prompt."""

    def __init__(
        self,
        model: InternVL,
        ids: list[int],
        rows: int,
        steps: int,
        decode: Callable,
        tiles: torch.Tensor | None = None,
    ) -> None:
        self.model, self.ids, self.tiles, self.decode = model, ids, tiles, decode
        head, blocks = model.language_model.head, num_blocks(len(ids)) + rows * num_blocks(steps)
        rounded = head.device.type == "cuda"
        config = model.config.llm
        self.cache = KVCache(config, blocks, head.device, head.dtype, rows > 1, rounded=rounded)
        self.prompt, self.answers = Room(), [Room() for _ in range(rows)]
        self.cache.enlarge(self.prompt, len(ids), prompt=True)

    def prefill(self) -> None:
        prefill(self.model, self.ids, self.tiles, self.cache.prefill(self.prompt, len(self.ids)))

    def step(self) -> None:
        for answer in self.answers:
            self.cache.enlarge(answer, answer.length + 1)
        rows = [(self.prompt, answer) for answer in self.answers]
        self.decode(self.model, self.cache, self.cache.plan(rows, [3] * len(rows)))


def measure_fork(model: InternVL, cfg: SpeedConfig, device: torch.device, decode: Callable) -> None:
    """32 samples of one image prompt: one prefill forked into 32 rows, against 32 single calls."""
    config = model.config
    size, tokens = config.tile_size, 3 * config.tokens_per_tile
    tiles = torch.randn(3, 3, size, size, device=device)
    ids = [model.image_context_id] * tokens + [3] * 80

    def sample(rows: int) -> None:
        sampling = Sampling(model, ids, rows, cfg.bench_steps, decode, tiles)
        sampling.prefill()
        for _ in range(cfg.bench_steps):
            sampling.step()

    together, alone = timed(lambda: sample(32), device, 1), timed(lambda: sample(1), device, 4)
    print(
        f"32 samples of {cfg.bench_steps} tokens, 3 tiles: one forked prompt {together:.2f} s, "
        f"32 single calls {32 * alone:.2f} s, ratio {32 * alone / together:.1f}"
    )


def timed(work: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds a call, after one call to warm up."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, 5)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    measure_generation(parse_cli(SpeedConfig))


if __name__ == "__main__":
    run(main)
