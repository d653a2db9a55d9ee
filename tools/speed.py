"""How fast generation is here: `python generate.py --bench --size 2b`."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import GenerateConfig, GraphedDecode, decode, prefill  # noqa: E402
from model import InternVL, KVCache, named_config  # noqa: E402


@torch.inference_mode()
def measure_generation(cfg: GenerateConfig, dtype: torch.dtype | None) -> None:
    """Prefill and decode speed on random weights, beside what the memory allows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
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
    compiled = torch.compile(decode, dynamic=False) if cfg.compile else decode
    weights = sum(p.numel() for p in model.language_model.parameters()) * dtype.itemsize
    weights -= model.language_model.model.tok_embeddings.weight.nbytes  # one row of it is read
    print("rows  prefill tok/s  decode tok/s   ms/step  MB/step  of copy bandwidth  peak memory")
    for rows in (1, 8, 32):
        cache = KVCache(config.llm, 1, rows, prompt, steps + 2, device, dtype)
        attend = cache.prefill(0)
        prefill_s = timed(lambda: prefill(model, ids, None, attend), device, 2)  # noqa: B023
        tokens = torch.ones(rows, dtype=torch.long, device=device)

        step = compiled
        if cfg.compile and device.type == "cuda":
            step = GraphedDecode(compiled, model, cache)

        def one_step(
            cache: KVCache = cache, tokens: torch.Tensor = tokens, step: Callable = step
        ) -> None:
            positions = (cache.prompt_length[:, None] + cache.answer_length).view(-1)
            step(model, cache, tokens, positions)
            cache.answer_length += 1

        step_s = timed(one_step, device, steps)
        per_token = 2 * config.llm.num_hidden_layers * config.llm.num_key_value_heads
        per_token *= config.llm.head_dim * dtype.itemsize
        moved = weights + per_token * (prompt + rows * steps / 2)
        share = moved / step_s / copy_rate
        print(
            f"{rows:>4}  {prompt / prefill_s:>13.1f}  {rows / step_s:>12.1f}  {step_s * 1e3:>8.2f}"
            f"  {moved / 1e6:>7.1f}  {share:>17.0%}  {peak_memory(device) / 1e9:>8.2f} GB"
        )
    measure_fork(model, cfg, device)


def measure_fork(model: InternVL, cfg: GenerateConfig, device: torch.device) -> None:
    """32 samples of one image prompt: one prefill forked into 32 rows, against 32 single calls."""
    config, dtype = model.config, model.language_model.head.dtype
    size, tokens = config.tile_size, 3 * config.tokens_per_tile
    tiles = torch.randn(3, 3, size, size, device=device)
    ids = [model.image_context_id] * tokens + [3] * 80

    def sample(rows: int) -> None:
        cache = KVCache(config.llm, 1, rows, len(ids), cfg.bench_steps, device, dtype)
        prefill(model, ids, tiles, cache.prefill(0))
        new = torch.full((rows,), 3, device=device)
        for n in range(cfg.bench_steps):
            cache.narrow(len(ids), n + 1)
            decode(model, cache, new, torch.full((rows,), len(ids) + n, device=device))
            cache.answer_length += 1

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
