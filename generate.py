"""From a prompt to text: prefill once, sample many, the same text anywhere.

    python generate.py --model_dir weights/InternVL2-8B --image cat.jpg --question "What is this?"
    python generate.py --model_dir weights/InternVL2-8B --image cat.jpg          a chat, streaming
    python generate.py --bench --size 2b                                         how fast is it here

`prefill` reads a prompt into a group of the KV cache, `decode` makes one step for all rows; the
Generator keeps the rows busy: a finished row takes the next sample of its prompt, a finished group
the next prompt.  A group's rows share the prompt's keys and values, nothing is copied per sample.

A sample is a function of (seed, prompt id, sample number) alone.  Each token consumes one uniform
number, a hash of these three and the token's index, through the inverse of the distribution's
cumulative sum in the order of ids: the same text for any batch, order, process count or restart.

Follows `modeling_internvl_chat.py: chat`: the end is <|im_end|> only.  Differs: other special
tokens are never produced (an image token in a response could not be scored again).
"""

import dataclasses
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import load_image, open_image
from model import InternVL, KVCache, named_config
from runtime import InputError, flag, parse_cli, run
from tokenizer import (
    IMAGE,
    StreamDecoder,
    Tokenizer,
    encode_chat,
    load_tokenizer,
    with_image_placeholders,
)
from vision import num_tiles, preprocess
from weights import load_model

WINDOW = 512  # prompts whose lengths decide one layout of the cache
MAX_ROWS = 256  # rows of one decode step, at most


@dataclass(frozen=True)
class Prompt:
    """One question, and how many samples of its answer are wanted."""

    id: str  # names the prompt in the random numbers: keep it, keep the text
    question: str
    images: tuple[Path, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) of earlier turns
    prefix: str = ""  # the answer's beginning, to be continued
    max_tiles: int = 12
    num_samples: int = 1
    samples: tuple[int, ...] | None = None  # which sample numbers; None = range(num_samples)
    max_new_tokens: int | None = None  # None = the generator's


@dataclass(frozen=True)
class Sample:
    """One finished answer.  `text` includes the prompt's prefix, decoded together with it."""

    prompt_id: str
    sample: int
    text: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int  # sampled, the closing <|im_end|> included
    prompt_tokens: int
    image_tokens: int
    logp: float  # sum over sampled tokens, under the model's plain distribution (temperature 1)
    ids: tuple[int, ...] = ()  # sampled, likewise
    token_logps: tuple[float, ...] = ()


# --------------------------------------------------------------------------- choosing a token


def row_key(seed: int, prompt_id: str, sample: int) -> int:
    """64 bits that name a sample."""
    text = json.dumps([seed, prompt_id, sample]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(keys: np.ndarray, index: np.ndarray) -> np.ndarray:  # (row) uint64, (row) -> (row)
    """One number in [0, 1) a row: splitmix64 of the row's key at the token's index."""
    with np.errstate(over="ignore"):
        z = keys + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def filtered_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(row vocab) probabilities after temperature, then top-k, then top-p; 0 and 1 mean off.

    Ties at the k-th place all stay.  Top-p keeps the smallest set of most probable tokens that
    reaches top_p, as the nucleus of arXiv:1904.09751.
    """
    logits = logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def choose(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:  # (row vocab), (row) -> (row)
    """The most probable token at temperature 0, else the inverse of the cumulative sum."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = filtered_probs(logits, temperature, top_k, top_p).cumsum(-1)
    target = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    # right=True: a token of probability 0 spans nothing and is never met
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


# --------------------------------------------------------------------------- prefill and decode


@torch.no_grad()
def prefill(
    model: InternVL, cache: KVCache, group: int, ids: list[int], tiles: Tensor | None
) -> Tensor:  # (vocab)
    """Read a prompt into its group; returns the logits of what follows."""
    device = model.language_model.head.device
    last = model(
        torch.tensor([ids], device=device),
        tiles,
        attend=cache.prefill(group),
        head=lambda hidden, weight: (hidden[0, -1] @ weight.T).float(),
    )
    cache.answer_length[group] = 0
    return last


@torch.no_grad()
def decode(model: InternVL, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """One step: (group*row) tokens at their positions -> (group*row vocab) logits.

    Text only, so not through InternVL.forward, which counts image slots on the host.
    """
    llm, rows = model.language_model, len(tokens)
    extra = (0, max(0, cache.least_rows - rows))
    tokens, positions = F.pad(tokens, extra), F.pad(positions, extra)
    x = llm.model.tok_embeddings(tokens[:, None])
    x = llm.model(x, positions[:, None], positions + 1, cache.decode())
    return F.linear(x[:, 0], llm.head)[:rows].float()


class GraphedDecode:
    """`decode` on CUDA as one captured graph: no launch costs.  Needs static shapes and memory."""

    def __init__(self, step: Callable, model: InternVL, cache: KVCache) -> None:
        self.cache, rows = cache, cache.answer_length.numel()
        self.tokens, self.positions = torch.zeros(
            2, rows, dtype=torch.long, device=cache.answer_length.device
        )
        work = lambda: step(model, cache, self.tokens, self.positions)  # noqa: E731
        side = torch.cuda.Stream()  # capture wants a warmed-up allocator, off the main stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()  # writes where the first real step will write
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = work()

    def __call__(
        self, model: InternVL, cache: KVCache, tokens: Tensor, positions: Tensor
    ) -> Tensor:
        assert cache is self.cache
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits


# --------------------------------------------------------------------------- the generator


@dataclass
class Row:
    """A sample under way."""

    prompt: Prompt
    sample: int
    key: int
    limit: int
    prefix: list[int]
    prompt_tokens: int
    image_tokens: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)


@dataclass
class Encoded:
    """A prompt as ids; pixels are read when its turn comes."""

    prompt: Prompt
    ids: list[int]
    prefix: list[int]
    image_tokens: int
    wanted: list[int]  # sample numbers


class Generator:
    """Continuous batching over prompts of any length, image and sample count."""

    def __init__(
        self,
        model: InternVL,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int = 1024,
        stop_strings: tuple[str, ...] = (),
        cache_tokens: int = 65536,
        compile: bool = False,
        verbose: bool = False,
    ) -> None:
        check_sampling(temperature, top_k, top_p, max_new_tokens)
        self.model, self.tokenizer, self.seed = model.eval(), tokenizer, seed
        self.how = (temperature, top_k, top_p)
        self.max_new_tokens, self.stop_strings = max_new_tokens, tuple(stop_strings)
        self.cache_tokens, self.verbose = cache_tokens, verbose
        self.device = model.language_model.head.device
        self.dtype = model.language_model.head.dtype
        self.stop_ids = {tokenizer.im_end_id}
        vocab = model.config.llm.vocab_size
        banned = [i for i in tokenizer.special_ids if i not in self.stop_ids]
        banned += range(tokenizer.vocab_size, vocab)  # rows of the head that no token has
        self.banned = torch.tensor(sorted(banned), device=self.device)
        # CPU libraries multiply fewer rows in another way, with other rounding; at temperature 0
        # that hardly matters, and one row alone is faster without company
        self.least_rows = 16 if self.device.type == "cpu" and temperature > 0 else 1
        self.static = compile
        self.decode = torch.compile(decode, dynamic=False) if compile else decode

    @classmethod
    def load(
        cls,
        model_dir: Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **how: object,
    ) -> "Generator":
        """From a folder in the official layout; on the GPU of this process if there is one."""
        if device is None:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
        return cls(load_model(model_dir, device, dtype), load_tokenizer(model_dir), **how)

    # ----- prompts

    def encode(self, prompt: Prompt) -> Encoded:
        """Ids of the prompt; reads the sizes of its images."""
        try:
            question = prompt.question
            if not question.strip():
                raise InputError("the question is empty")
            if prompt.images or (IMAGE in question and not prompt.history):
                if not prompt.history:
                    question = with_image_placeholders(question, len(prompt.images))
            tokens = []
            for path in prompt.images:
                with open_image(Path(path)) as image:
                    tiles = num_tiles(*image.size, prompt.max_tiles, self.model.config.tile_size)
                tokens.append(tiles * self.model.config.tokens_per_tile)
            turns = [*prompt.history, (question, None)]
            config = self.model.config
            ids = encode_chat(self.tokenizer, config.template, turns, tokens, config.system_message)
        except InputError as error:
            raise InputError(f"prompt {prompt.id}: {error}") from None
        prefix = self.tokenizer.encode_plain(prompt.prefix)
        samples = range(prompt.num_samples) if prompt.samples is None else prompt.samples
        return Encoded(prompt, ids + prefix, prefix, sum(tokens), list(samples))

    def tiles(self, prompt: Prompt) -> Tensor | None:
        """Pixels of the prompt's images, (tile 3 h w)."""
        if not prompt.images:
            return None
        size = self.model.config.tile_size
        parts = [preprocess(load_image(Path(p)), prompt.max_tiles, size) for p in prompt.images]
        return torch.cat(parts).to(self.device)

    # ----- running

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Each sample as it ends; prompts are read a window at a time."""
        prompts = iter(prompts)
        while window := [self.encode(prompt) for prompt in islice(prompts, WINDOW)]:
            window = [e for e in window if e.wanted]
            if window:
                yield from self._run_window(window)

    def layout(self, window: list[Encoded]) -> tuple[int, int, int, int]:
        """(groups, rows, prompt capacity, answer capacity) within cache_tokens."""
        longest = max(window, key=lambda e: len(e.ids))
        prompt = len(longest.ids)
        answer = max(e.prompt.max_new_tokens or self.max_new_tokens for e in window)
        if prompt + answer > self.cache_tokens:
            raise InputError(
                f"prompt {longest.prompt.id}: {prompt} tokens and up to {answer} new ones do not "
                f"fit --cache_tokens {self.cache_tokens}; raise it, or use fewer tiles"
            )

        def groups(rows: int) -> int:
            fitting = self.cache_tokens // (prompt + rows * answer)
            return min(len(window), fitting, MAX_ROWS // rows)

        # as many rows as possible; among such layouts one whose groups get several rounds of
        # samples, since the rows of a group that wait for its last answer do nothing
        most = min(MAX_ROWS, max(len(e.wanted) for e in window))
        rounds = sum(len(e.wanted) for e in window) / len(window) / 2
        rows = max(range(1, most + 1), key=lambda r: (r * groups(r), -abs(r - rounds)))
        return groups(rows), rows, prompt, answer

    def _run_window(self, window: list[Encoded]) -> Iterator[Sample]:
        groups, rows, prompt, answer = self.layout(window)
        if self.verbose:
            tokens = groups * (prompt + rows * answer)
            print(f"{groups} prompts x {rows} rows at once, {tokens} cache tokens", file=sys.stderr)
        shape = (groups, rows, prompt, answer)
        cache = KVCache(self.model.config.llm, *shape, self.device, self.dtype, self.least_rows)
        graphs: dict[int, GraphedDecode] = {}
        coming = iter(window)
        left: list[tuple[Encoded, list[int]] | None] = [None] * groups
        first = torch.zeros(groups, self.model.config.llm.vocab_size, device=self.device)
        active: list[Row | None] = [None] * (groups * rows)
        tokens = np.zeros(groups * rows, dtype=np.int64)
        while True:
            fresh = []
            for n in range(groups):
                mine = range(n * rows, (n + 1) * rows)
                idle = all(active[i] is None for i in mine)
                if idle and (left[n] is None or not left[n][1]):
                    encoded = next(coming, None)
                    left[n] = encoded and (encoded, list(encoded.wanted))
                    if encoded:
                        pixels = self.tiles(encoded.prompt)
                        first[n] = prefill(self.model, cache, n, encoded.ids, pixels)
                for i in mine:
                    if active[i] is None and left[n] and left[n][1]:
                        active[i] = self._start(left[n][0], left[n][1].pop(0))
                        fresh.append(i)
            if fresh:  # a new row's first token follows from its prompt's prefill
                cache.answer_length.view(-1)[fresh] = 0
                chosen = self._choose(first[[i // rows for i in fresh]], [active[i] for i in fresh])
                for i, (token, logp) in zip(fresh, chosen):
                    tokens[i] = token
                    if sample := self._push(active[i], token, logp):
                        active[i] = None
                        yield sample
                continue  # a sample of one token may have freed its row
            busy = [i for i, row in enumerate(active) if row is not None]
            if not busy:
                return
            longest = max(len(left[i // rows][0].ids) for i in busy)
            logits = self._step(
                cache, tokens, longest, max(len(active[i].ids) for i in busy), graphs
            )
            chosen = self._choose(logits[busy], [active[i] for i in busy])
            for i, (token, logp) in zip(busy, chosen):
                tokens[i] = token
                if sample := self._push(active[i], token, logp):
                    active[i] = None
                    yield sample

    def _step(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        prompt: int,
        answer: int,
        graphs: dict[int, GraphedDecode],
    ) -> Tensor:
        """Feed each row its last token; rows without work compute rubbish nobody reads.

        prompt, answer: keys of the longest ones that are alive.  Static shapes: all prompt keys,
        and answers in powers of two, each compiled or captured when first met.
        """
        if self.static:
            prompt, answer = cache.prompt[0].shape[3], 1 << (max(answer, 64) - 1).bit_length()
        cache.narrow(prompt, answer)
        positions = (cache.prompt_length[:, None] + cache.answer_length).view(-1)
        step = self.decode
        if self.static and self.device.type == "cuda":
            if cache.window not in graphs:
                graphs[cache.window] = GraphedDecode(step, self.model, cache)
            step = graphs[cache.window]
        with torch.inference_mode(not self.static):  # faster, but nothing for torch.compile
            logits = step(self.model, cache, torch.from_numpy(tokens).to(self.device), positions)
        cache.answer_length.add_(1).clamp_(max=cache.answer[0].shape[4] - 1)
        return logits

    def _start(self, encoded: Encoded, sample: int) -> Row:
        prompt = encoded.prompt
        return Row(
            prompt,
            sample,
            row_key(self.seed, prompt.id, sample),
            prompt.max_new_tokens or self.max_new_tokens,
            encoded.prefix,
            len(encoded.ids),
            encoded.image_tokens,
        )

    def _choose(self, logits: Tensor, rows: list[Row]) -> list[tuple[int, float]]:
        """(token, its plain log-prob) of each row, from logits (row vocab)."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        uniforms = uniform(keys, np.array([len(row.ids) for row in rows]))
        allowed = logits.index_fill(1, self.banned, -torch.inf)
        tokens = choose(allowed, torch.from_numpy(uniforms).to(self.device), *self.how)
        logps = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        return list(zip(tokens.tolist(), logps.tolist()))

    def _push(self, row: Row, token: int, logp: float) -> Sample | None:
        """Add a token to a row; the sample if this was its last."""
        if not math.isfinite(logp):
            raise RuntimeError(
                f"prompt {row.prompt.id}, sample {row.sample}, token {len(row.ids)}: the model's "
                "logits are not finite; check the weights, or use another --dtype"
            )
        row.ids.append(token)
        row.logps.append(logp)
        reason, ids = "", row.ids
        if token in self.stop_ids:
            reason, ids = "stop", row.ids[:-1]
        text = None
        if not reason and self.stop_strings:
            text = self.tokenizer.decode(row.prefix + ids)
            begin = len(row.prompt.prefix)
            found = [at for s in self.stop_strings if (at := text.find(s, begin)) >= 0]
            if found:
                reason, text = "stop", text[: min(found)]
        if not reason and len(row.ids) >= row.limit:
            reason = "length"
        if not reason:
            return None
        if text is None:
            text = self.tokenizer.decode(row.prefix + ids)
        return Sample(
            row.prompt.id,
            row.sample,
            text,
            reason,
            len(row.ids),
            row.prompt_tokens,
            row.image_tokens,
            math.fsum(row.logps),
            tuple(row.ids),
            tuple(row.logps),
        )

    # ----- one row, streaming; and probabilities

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """The text of sample 0, piece by piece; together equal to run()'s text without prefix."""
        encoded = self.encode(prompt)
        _, _, length, answer = self.layout([encoded])
        shape = (1, 1, length, answer)
        cache = KVCache(self.model.config.llm, *shape, self.device, self.dtype, self.least_rows)
        graphs: dict[int, GraphedDecode] = {}
        logits = prefill(self.model, cache, 0, encoded.ids, self.tiles(prompt))[None]
        row, decoder = self._start(encoded, 0), StreamDecoder(self.tokenizer)
        while True:
            [(token, logp)] = self._choose(logits, [row])
            done = self._push(row, token, logp)
            if token not in self.stop_ids:
                yield decoder.push(token)
            if done:
                yield decoder.flush()
                return
            logits = self._step(cache, np.array([token]), length, len(row.ids), graphs)

    def first_token_probs(
        self, prompts: Iterable[Prompt], words: list[str]
    ) -> list[dict[str, float]]:
        """For each prompt, the probability that its answer begins with each word's first token."""
        ids = {word: self.tokenizer.encode_plain(word)[0] for word in words}
        found = []
        for prompt in prompts:
            encoded = self.encode(prompt)
            self.layout([encoded])
            cache = KVCache(
                self.model.config.llm, 1, 1, len(encoded.ids), 1, self.device, self.dtype
            )
            probs = prefill(self.model, cache, 0, encoded.ids, self.tiles(prompt)).softmax(-1)
            found.append({word: probs[i].item() for word, i in ids.items()})
        return found


def check_sampling(temperature: float, top_k: int, top_p: float, max_new_tokens: int) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be >= 0 (0 = greedy), got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1 (1 = off), got {top_p}")
    if top_k < 0:
        raise InputError(f"top_k must be >= 0 (0 = off), got {top_k}")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be >= 1, got {max_new_tokens}")


# --------------------------------------------------------------------------- benchmark


@torch.inference_mode()
def bench(cfg: "GenerateConfig", device: torch.device, dtype: torch.dtype) -> None:
    """Prefill and decode speed on random weights, beside what the memory allows."""
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
        prefill_s = timed(lambda: prefill(model, cache, 0, ids, None), device, 2)  # noqa: B023
        tokens = torch.ones(rows, dtype=torch.long, device=device)

        step = compiled
        if cfg.compile and device.type == "cuda":
            step = GraphedDecode(compiled, model, cache)

        def one_step(
            cache: KVCache = cache, tokens: Tensor = tokens, step: Callable = step
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
    bench_fork(model, cfg, device)


def bench_fork(model: InternVL, cfg: "GenerateConfig", device: torch.device) -> None:
    """32 samples of one image prompt: one prefill forked into 32 rows, against 32 single calls."""
    config, dtype = model.config, model.language_model.head.dtype
    size, tokens = config.tile_size, 3 * config.tokens_per_tile
    tiles = torch.randn(3, 3, size, size, device=device)
    ids = [model.image_context_id] * tokens + [3] * 80

    def sample(rows: int) -> None:
        cache = KVCache(config.llm, 1, rows, len(ids), cfg.bench_steps, device, dtype)
        prefill(model, cache, 0, ids, tiles)
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


def timed(work: object, device: torch.device, count: int) -> float:
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


# --------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class GenerateConfig:
    """Ask an InternVL2 model.  The answer alone goes to stdout; without a question, a chat."""

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder in the official layout")
    image: tuple[Path, ...] = flag((), "an image; may be repeated")
    question: str = flag("", "the question; empty = an interactive chat")
    history: str = flag("", "JSON file: a list of [question, answer] of earlier turns")
    prefix: str = flag("", "beginning of the answer, to be continued")
    max_tiles: int = flag(0, "tiles an image, at most, without the thumbnail; 0 = the model's")
    max_new_tokens: int = flag(1024, "tokens of an answer, at most")
    temperature: float = flag(0.0, "0 = greedy")
    top_k: int = flag(0, "sample from the k most probable tokens; 0 = off")
    top_p: float = flag(1.0, "sample from the smallest set with this probability; 1 = off")
    num_samples: int = flag(1, "answers to the question")
    seed: int = flag(0, "with the prompt and the sample's number it decides the text")
    stop: tuple[str, ...] = flag((), "text that ends an answer; may be repeated")
    json: bool = flag(False, "one object a line: text, tokens, finish reason, log-prob")
    cache_tokens: int = flag(65536, "room of the KV cache: how many rows run at once")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto = bf16 on GPU, fp32 on CPU")
    compile: bool = flag(False, "compile the decode step (on a GPU: a captured graph)")
    bench: bool = flag(False, "measure prefill and decode on random weights and stop")
    size: Literal["8b", "2b", "toy"] = flag("toy", "shape for --bench")
    bench_prompt: int = flag(256, "prompt tokens of --bench")
    bench_steps: int = flag(16, "decode steps of --bench")


def read_history(path: str) -> tuple[tuple[str, str], ...]:
    """[[question, answer], ...] from a JSON file."""
    if not path:
        return ()
    try:
        turns = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"no history file {path}") from None
    except ValueError as error:
        raise InputError(f"history {path}: not valid JSON ({error})") from None
    good = isinstance(turns, list) and all(
        isinstance(t, list) and len(t) == 2 and all(isinstance(s, str) for s in t) for t in turns
    )
    if not good:
        raise InputError(f"history {path}: expected a list of [question, answer] pairs of text")
    return tuple((question, answer) for question, answer in turns)


def make_prompt(cfg: GenerateConfig, question: str, history: tuple, tiles: int) -> Prompt:
    if history and cfg.image and IMAGE not in "".join(q for q, _ in history) + question:
        first, *rest = history  # the images belong to the first turn, as in chat()
        history = ((with_image_placeholders(first[0], len(cfg.image)), first[1]), *rest)
    name = hashlib.blake2b(repr((question, history, cfg.prefix)).encode(), digest_size=8)
    prompt = Prompt(name.hexdigest(), question, cfg.image, history, cfg.prefix)
    return dataclasses.replace(
        prompt, max_tiles=cfg.max_tiles or tiles, num_samples=cfg.num_samples
    )


def chat(generator: Generator, cfg: GenerateConfig, tiles: int) -> None:
    """Questions from stdin, answers streamed to stdout, until the input ends."""
    history = read_history(cfg.history)
    print("ask; an empty line or Ctrl-D ends the chat", file=sys.stderr)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            question = ""
        if not question:
            return
        if not history and cfg.image:
            question = with_image_placeholders(question, len(cfg.image))
        answer = ""
        try:
            for piece in generator.stream(make_prompt(cfg, question, history, tiles)):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()
        history = (*history, (question, answer.strip()))


def main() -> None:
    cfg = parse_cli(GenerateConfig)
    check_sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.max_new_tokens)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype)
    if cfg.bench:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        return bench(cfg, device, dtype or auto)
    history = read_history(cfg.history)
    generator = Generator.load(
        cfg.model_dir,
        dtype=dtype,
        seed=cfg.seed,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        max_new_tokens=cfg.max_new_tokens,
        stop_strings=cfg.stop,
        cache_tokens=cfg.cache_tokens,
        compile=cfg.compile,
        verbose=True,
    )
    tiles = generator.model.config.max_tiles
    if not cfg.question:
        return chat(generator, cfg, tiles)
    samples = generator.run([make_prompt(cfg, cfg.question, history, tiles)])
    for s in sorted(samples, key=lambda s: s.sample):
        if cfg.json:
            shown = {"sample": s.sample, "text": s.text, "tokens": s.num_tokens}
            shown |= {"finish_reason": s.finish_reason, "logp": s.logp}
            print(json.dumps(shown, ensure_ascii=False))
        else:
            print(s.text.strip())
    return None


if __name__ == "__main__":
    run(main)
