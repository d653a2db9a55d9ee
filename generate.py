"""From a prompt to text: prefill once, sample many, the same text anywhere.

    python generate.py --model_dir weights/InternVL2-8B --image cat.jpg --question "What is this?"
    python generate.py --model_dir weights/InternVL2-8B --image cat.jpg          a chat, streaming
    python generate.py --bench --size 2b                                         how fast is it here

`prefill` reads a prompt into a group of the KV cache, `decode` makes one step for all rows,
`choose` picks their next tokens, the Scheduler keeps the rows busy: a finished row makes way for
the next sample of its prompt, a finished group for the next prompt.  A group's rows share the
prompt's keys and values: nothing is copied per sample.

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
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import load_image, open_image
from model import Attend, InternVL, KVCache, causal_attention
from runtime import InputError, check_ranges, flag, parse_cli, run
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


@dataclass(frozen=True)
class Settings:
    """How answers are drawn: keywords of a Generator, flags of the command line."""

    max_new_tokens: int = flag(1024, "tokens of an answer, at most", 1)
    temperature: float = flag(0.0, "0 = greedy", 0)
    top_k: int = flag(0, "sample from the k most probable tokens; 0 = off", 0)
    top_p: float = flag(1.0, "sample from the smallest set with this probability; 1 = off", 1e-6, 1)
    seed: int = flag(0, "with the prompt and the sample's number it decides the text")
    stop: tuple[str, ...] = flag((), "text that ends an answer; may be repeated")
    cache_tokens: int = flag(65536, "room of the KV cache: how many rows run at once", 1)
    compile: bool = flag(False, "compile the decode step (on a GPU: a captured graph)")

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


# --------------------------------------------------------------------------- prefill and decode


@torch.no_grad()
def prefill(model: InternVL, ids: list[int], tiles: Tensor | None, attend: Attend) -> Tensor:
    """Read a prompt in one pass; the logits (vocab) of what follows it.

    attend: `cache.prefill(group)` keeps the prompt's keys and values, `causal_attention` does not.
    """
    input_ids = torch.tensor([ids], device=model.language_model.head.device)
    head = lambda hidden, weight: (hidden[0, -1] @ weight.T).float()  # noqa: E731
    return model(input_ids, tiles, attend=attend, head=head)


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


# --------------------------------------------------------------------------- the scheduler


@dataclass
class Encoded:
    """A prompt as ids; its pixels are read when its turn comes."""

    prompt: Prompt
    ids: list[int]
    prefix: list[int]
    image_tokens: int
    samples: list[int]  # numbers of the wanted samples


@dataclass
class Row:
    """A sample under way, in one place of the batch."""

    encoded: Encoded
    sample: int
    place: int
    key: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    finish_reason: Literal["", "stop", "length"] = ""


class Group:
    """A prompt in the cache, and the rows that answer it.  A place without a row is idle."""

    def __init__(self, encoded: Encoded, first_logits: Tensor, places: range) -> None:
        self.encoded, self.first_logits, self.places = encoded, first_logits, places
        self.todo, self.rows = list(encoded.samples), {}

    def refill(self, seed: int) -> list[Row]:
        """Start the next samples in the idle places."""
        idle = [place for place in self.places if place not in self.rows]
        fresh = []
        for place, sample in zip(idle, self.todo):
            key = row_key(seed, self.encoded.prompt.id, sample)
            self.rows[place] = Row(self.encoded, sample, place, key)
            fresh.append(self.rows[place])
        del self.todo[: len(fresh)]
        return fresh


class Scheduler:
    """Keeps the rows of one cache busy with the samples of many prompts.

    refill    a finished row makes way for its prompt's next sample, a finished group for a prompt
    step      every row is fed its last token
    collect   every row gets its next token; rows that end here become idle
    """

    def __init__(self, generator: "Generator", window: list[Encoded]) -> None:
        self.generator, self.coming = generator, iter(window)
        self.shape = generator.layout(window)
        config, device = generator.model.config.llm, generator.device
        least_rows = generator.least_rows
        self.cache = KVCache(config, *self.shape, device, generator.dtype, least_rows)
        self.groups: list[Group | None] = [None] * self.shape[0]
        self.graphs: dict[int, GraphedDecode] = {}

    def run(self) -> Iterator[Row]:
        """Each row each time it got a token; `finish_reason` says whether that was its last."""
        while True:
            while fresh := self.refill():  # repeated, as a sample may end with its first token
                yield from self.collect([row for _, row in fresh], self.first_logits(fresh))
            if not (rows := self.rows()):
                return
            logits = self.step(rows)
            yield from self.collect(rows, logits[[row.place for row in rows]])

    def rows(self) -> list[Row]:
        return [row for group in self.groups if group for row in group.rows.values()]

    def refill(self) -> list[tuple[Group, Row]]:
        """The rows that begin now; reads a new prompt where a group has nothing left to do."""
        size, fresh = self.shape[1], []
        for n, group in enumerate(self.groups):
            if group is None or not (group.todo or group.rows):
                encoded = next(self.coming, None)
                places = range(n * size, (n + 1) * size)
                self.groups[n] = group = encoded and Group(encoded, self.read(n, encoded), places)
            if group:
                fresh += [(group, row) for row in group.refill(self.generator.settings.seed)]
        return fresh

    def read(self, n: int, encoded: Encoded) -> Tensor:  # (vocab)
        """Prefill group n with a prompt."""
        tiles = self.generator.tiles(encoded.prompt)
        return prefill(self.generator.model, encoded.ids, tiles, self.cache.prefill(n))

    def first_logits(self, fresh: list[tuple[Group, Row]]) -> Tensor:  # (row vocab)
        """A new row's first token follows from its prompt's prefill."""
        self.cache.answer_length.view(-1)[[row.place for _, row in fresh]] = 0
        return torch.stack([group.first_logits for group, _ in fresh])

    def step(self, rows: list[Row]) -> Tensor:  # (place vocab)
        """Feed each row its last token; idle rows are computed and ignored.

        A step reads no more keys than the longest live prompt and answer have.  A compiled step
        needs static shapes: all prompt keys, and answers in powers of two.
        """
        cache, generator = self.cache, self.generator
        prompt = max(len(row.encoded.ids) for row in rows)
        answer = max(len(row.ids) for row in rows)
        if generator.settings.compile:
            prompt, answer = self.shape[2], 1 << (max(answer, 64) - 1).bit_length()
        cache.narrow(prompt, answer)
        tokens = np.zeros(cache.answer_length.numel(), dtype=np.int64)
        for row in rows:
            tokens[row.place] = row.ids[-1]
        positions = (cache.prompt_length[:, None] + cache.answer_length).view(-1)
        step = generator.decode
        if generator.settings.compile and generator.device.type == "cuda":
            if cache.window not in self.graphs:
                self.graphs[cache.window] = GraphedDecode(step, generator.model, cache)
            step = self.graphs[cache.window]
        with torch.inference_mode(
            not generator.settings.compile
        ):  # faster, but nothing for torch.compile
            tokens = torch.from_numpy(tokens).to(generator.device)
            logits = step(generator.model, cache, tokens, positions)
        cache.answer_length.add_(1).clamp_(max=cache.answer[0].shape[4] - 1)
        return logits

    def collect(self, rows: list[Row], logits: Tensor) -> Iterator[Row]:  # logits (row vocab)
        """Choose each row's next token, and take out the rows that end with it."""
        for row, (token, logp) in zip(rows, self.generator.choose(logits, rows)):
            self.generator.push(row, token, logp)
            if row.finish_reason:
                del self.groups[row.place // self.shape[1]].rows[row.place]
            yield row


# --------------------------------------------------------------------------- the generator


class Generator:
    """A model with its tokenizer and the settings of sampling."""

    def __init__(self, model: InternVL, tokenizer: Tokenizer, **settings: object) -> None:
        self.settings = Settings(**settings)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model.language_model.head.device
        self.dtype = model.language_model.head.dtype
        self.stop_ids = {tokenizer.im_end_id}
        banned = tokenizer.banned_ids(model.config.llm.vocab_size)
        self.banned = torch.tensor(banned, device=self.device)
        # CPU libraries multiply fewer rows in another way, with other rounding; at temperature 0
        # that hardly matters, and one row alone is faster without company
        on_cpu = self.device.type == "cpu"
        self.least_rows = 16 if on_cpu and self.settings.temperature > 0 else 1
        self.decode = torch.compile(decode, dynamic=False) if self.settings.compile else decode

    @classmethod
    def load(
        cls,
        model_dir: Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **settings: object,
    ) -> "Generator":
        """From a folder in the official layout; on the GPU of this process if there is one."""
        if device is None:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
        return cls(load_model(model_dir, device, dtype), load_tokenizer(model_dir), **settings)

    # ----- prompts

    def encode(self, prompt: Prompt) -> Encoded:
        """Ids of the prompt; reads the sizes of its images."""
        config, question = self.model.config, prompt.question
        try:
            if not question.strip():
                raise InputError("the question is empty")
            if not prompt.history and (prompt.images or IMAGE in question):
                question = with_image_placeholders(question, len(prompt.images))
            tokens = []
            for path in prompt.images:
                with open_image(Path(path)) as image:
                    tiles = num_tiles(*image.size, prompt.max_tiles, config.tile_size)
                tokens.append(tiles * config.tokens_per_tile)
            turns = [*prompt.history, (question, None)]
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

    def limit(self, prompt: Prompt) -> int:
        return prompt.max_new_tokens or self.settings.max_new_tokens

    def layout(self, window: list[Encoded]) -> tuple[int, int, int, int]:
        """(groups, rows, prompt capacity, answer capacity) within cache_tokens."""
        longest = max(window, key=lambda e: len(e.ids))
        prompt, answer = len(longest.ids), max(self.limit(e.prompt) for e in window)
        if prompt + answer > self.settings.cache_tokens:
            raise InputError(
                f"prompt {longest.prompt.id}: {prompt} tokens and up to {answer} new ones do not "
                f"fit --cache_tokens {self.settings.cache_tokens}; raise it, or use fewer tiles"
            )

        def groups(rows: int) -> int:
            fitting = self.settings.cache_tokens // (prompt + rows * answer)
            return min(len(window), fitting, MAX_ROWS // rows)

        # as many rows as possible; among such layouts one whose groups get several rounds of
        # samples, since the rows of a group that wait for its last answer do nothing
        most = min(MAX_ROWS, max(len(e.samples) for e in window))
        rounds = sum(len(e.samples) for e in window) / len(window) / 2
        rows = max(range(1, most + 1), key=lambda r: (r * groups(r), -abs(r - rounds)))
        return groups(rows), rows, prompt, answer

    # ----- running

    def run(self, prompts: Iterable[Prompt], log: TextIO | None = None) -> Iterator[Sample]:
        """Each sample as it ends; prompts are read a window at a time, whose layout goes to log."""
        prompts = iter(prompts)
        while window := [self.encode(prompt) for prompt in islice(prompts, WINDOW)]:
            if window := [encoded for encoded in window if encoded.samples]:
                yield from self.run_window(window, log)

    def run_window(self, window: list[Encoded], log: TextIO | None = None) -> Iterator[Sample]:
        scheduler = Scheduler(self, window)
        if log:
            groups, rows, prompt, answer = scheduler.shape
            tokens = groups * (prompt + rows * answer)
            print(f"{groups} prompts x {rows} rows at once, {tokens} cache tokens", file=log)
        for row in scheduler.run():
            if row.finish_reason:
                yield self.sample(row)

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """The text of sample 0, piece by piece; together equal to run()'s text without prefix."""
        decoder = StreamDecoder(self.tokenizer)
        encoded = dataclasses.replace(self.encode(prompt), samples=[0])
        for row in Scheduler(self, [encoded]).run():
            if row.ids[-1] not in self.stop_ids:
                yield decoder.push(row.ids[-1])
        yield decoder.flush()

    def first_token_probs(
        self, prompts: Iterable[Prompt], words: list[str]
    ) -> list[dict[str, float]]:
        """For each prompt, the probability that its answer begins with each word's first token."""
        ids = {word: self.tokenizer.encode_plain(word)[0] for word in words}
        rows = []
        for prompt in prompts:
            encoded = self.encode(prompt)
            logits = prefill(self.model, encoded.ids, self.tiles(prompt), causal_attention)
            probs = logits.softmax(-1)
            rows.append({word: probs[i].item() for word, i in ids.items()})
        return rows

    # ----- one token

    def choose(self, logits: Tensor, rows: list[Row]) -> list[tuple[int, float]]:
        """(token, its plain log-prob) of each row, from logits (row vocab)."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        uniforms = uniform(keys, np.array([len(row.ids) for row in rows]))
        allowed = logits.index_fill(1, self.banned, -torch.inf)
        sampling = (self.settings.temperature, self.settings.top_k, self.settings.top_p)
        tokens = choose(allowed, torch.from_numpy(uniforms).to(self.device), *sampling)
        logps = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        return list(zip(tokens.tolist(), logps.tolist()))

    def push(self, row: Row, token: int, logp: float) -> None:
        """Add a token to a row, and say why if it was the row's last."""
        prompt = row.encoded.prompt
        if not math.isfinite(logp):
            raise InputError(
                f"prompt {prompt.id}, sample {row.sample}, token {len(row.ids)}: the model's "
                "logits are not finite; check the weights, or use another --dtype"
            )
        row.ids.append(token)
        row.logps.append(logp)
        if token in self.stop_ids or (self.settings.stop and self.stop_at(row) >= 0):
            row.finish_reason = "stop"
        elif len(row.ids) >= self.limit(prompt):
            row.finish_reason = "length"

    def text(self, row: Row) -> str:
        ids = row.ids[:-1] if row.ids[-1] in self.stop_ids else row.ids
        return self.tokenizer.decode(row.encoded.prefix + ids)

    def stop_at(self, row: Row) -> int:
        """Where the first stop string begins in the row's text; -1 without one."""
        text, begin = self.text(row), len(row.encoded.prompt.prefix)
        places = [text.find(string, begin) for string in self.settings.stop]
        return min((place for place in places if place >= 0), default=-1)

    def sample(self, row: Row) -> Sample:
        """The finished sample of a row, its text cut before a stop string."""
        text, encoded = self.text(row), row.encoded
        if row.ids[-1] not in self.stop_ids and (end := self.stop_at(row)) >= 0:
            text = text[:end]
        return Sample(
            encoded.prompt.id,
            row.sample,
            text,
            row.finish_reason,
            len(row.ids),
            len(encoded.ids),
            encoded.image_tokens,
            math.fsum(row.logps),
            tuple(row.ids),
            tuple(row.logps),
        )


# --------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """Ask an InternVL2 model.  The answer alone goes to stdout; without a question, a chat."""

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder in the official layout")
    image: tuple[Path, ...] = flag((), "an image; may be repeated")
    question: str = flag("", "the question; empty = an interactive chat")
    history: Path | None = flag(None, "JSON file: a list of [question, answer] of earlier turns")
    prefix: str = flag("", "beginning of the answer, to be continued")
    max_tiles: int = flag(0, "tiles an image, without the thumbnail; 0 = the model's", 0)
    num_samples: int = flag(1, "answers to the question", 1)
    json: bool = flag(False, "one object a line: text, tokens, finish reason, log-prob")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto = bf16 on GPU, fp32 on CPU")
    bench: bool = flag(False, "measure prefill and decode on random weights and stop")
    size: Literal["8b", "2b", "toy"] = flag("toy", "shape for --bench")
    bench_prompt: int = flag(256, "prompt tokens of --bench", 1)
    bench_steps: int = flag(16, "decode steps of --bench", 1)


def read_history(path: Path | None) -> tuple[tuple[str, str], ...]:
    """[[question, answer], ...] from a JSON file."""
    if path is None:
        return ()
    try:
        turns = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"no history file {path}") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
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
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype)
    if cfg.bench:
        from tools.speed import measure_generation  # noqa: PLC0415  (a tool, not for the reader)

        return measure_generation(cfg, dtype)
    history = read_history(cfg.history)
    settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Settings)}
    generator = Generator.load(cfg.model_dir, dtype=dtype, **settings)
    tiles = generator.model.config.max_tiles
    if not cfg.question:
        return chat(generator, cfg, tiles)
    samples = generator.run([make_prompt(cfg, cfg.question, history, tiles)], sys.stderr)
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
