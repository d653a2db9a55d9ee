"""From a prompt to text: prefill once, sample many, the same text anywhere.

    python generate.py --model_dir weights/InternVL2-8B --image cat.jpg --question "What is this?"
    python generate.py --model_dir weights/InternVL2-8B --image cat.jpg          a chat, streaming

`prefill` reads a prompt into the KV cache, `decode` makes one step for all rows, `choose` picks
their next tokens, the Scheduler keeps the rows busy: a finished row makes way for the next sample,
a finished prompt for the next.  Rows share their prompt's keys and values: nothing is copied.

A sample is a function of (seed, prompt id, sample number) alone.  Each token consumes one uniform
number, a hash of these three and the token's index, through the inverse of the distribution's
cumulative sum in the order of ids: the same text for any batch, order, process count or restart.

Follows `modeling_internvl_chat.py: chat`: the end is <|im_end|> only.  Differs: other
control tokens are never produced (an image token in a response could not be scored again);
grounding marks are, and stay in the text unless `marks` is off, as chat() has it.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import runtime
from runtime import InputError, Settings, fits, flag, local_device, named, read_json


@runtime.command_line
class GenerateConfig(Settings):
    """Ask an InternVL model.  The answer alone goes to stdout; without a question, a chat."""

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder in the official layout")
    image: tuple[Path, ...] = flag((), "an image; may be repeated")
    question: str = flag("", "the question; empty = an interactive chat")
    prefix: str = flag("", "beginning of the answer, to be continued")
    history: Path | None = flag(None, "JSON file: a list of [question, answer] of earlier turns")
    max_tiles: int = flag(0, "tiles an image, without the thumbnail; 0 = the model's", 0, 128)
    num_samples: int = flag(1, "answers to the question", 1)
    marks: bool = flag(False, "show grounding marks: <ref>, <box>, <quad> and their ends")
    json: bool = flag(False, "one object a line: text, tokens, finish reason, log-prob")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto = bf16 on GPU, fp32 on CPU")
    NEEDS = {"num_samples": "--question", "json": "--question"}  # a chat has neither
    NEEDS |= dict.fromkeys(("top_k", "top_p"), "--temperature")  # greedy answers take neither


import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KEYS, Captured, KVCache, Plan, Room, most_blocks, num_blocks
from images import load_image, open_image
from losses import aligned
from model import Attend, InternVL, causal_attention
from tokenizer import IMAGE, Tokenizer, encode_chat, load_tokenizer, with_image_placeholders
from vision import num_tiles, preprocess
from weights import FLOATS, load_model

MAX_ROWS = 512  # rows of one decode step, at most
CUT_OFF = " [cut off: raise --max_new_tokens]"


@dataclass(frozen=True)
class Prompt:
    """One question, and which samples of its answer are wanted."""

    id: str  # names the prompt in the random numbers: keep it, keep the text
    question: str
    images: tuple[Path, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) of earlier turns
    prefix: str = ""  # the answer's beginning, to be continued
    max_tiles: int = 0  # of each image, without the thumbnail; 0 = the model's
    samples: Sequence[int] = range(1)  # the numbers of those that are wanted
    name: str = ""  # in errors, as "file line 3"; "" = its id
    system_prompt: str | None = None  # in the place of the model's system message

    @property
    def label(self) -> str:
        return self.name or f"prompt {self.id}"


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


# --------------------------------------------------------------------------- prefill and decode


@torch.no_grad()
def prefill(
    model: InternVL,
    prompts: list[list[int]],
    tiles: Tensor | None,
    attend: Attend = causal_attention,
) -> Tensor:  # (prompt vocab)
    """Read prompts side by side in one pass; the logits of what follows each.

    attend: `KVCache.prefill` keeps their keys and values, `causal_attention` (of one) does not.
    """
    lengths, device = [len(ids) for ids in prompts], model.language_model.head.device
    ids = torch.tensor([sum(prompts, [])], device=device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    last = (torch.tensor(lengths).cumsum(0) - 1).to(device)
    return model(ids, tiles, positions, attend, wanted=last)[0]


@torch.inference_mode()
def decode(model: InternVL, cache: KVCache, plan: Plan, head: Tensor | None = None) -> Tensor:
    """Feed each row of the plan its token; the logits of what follows, (row vocab).

    Text only, so not through InternVL.forward, which counts image slots on the host.
    head: the model's own, as a GPU likes it (`losses.aligned`).
    """
    llm = model.language_model
    tokens, positions, attend = cache.decode(plan)
    x = llm.model.tok_embeddings(tokens[:, None])
    x = llm.model(x, positions[:, None], attend)[:, 0]
    head = llm.head if head is None else head
    logits = x.new_empty(len(x), len(head))
    # a CPU multiplies rows with a wide matrix faster by parts of it: 1,024 columns take 0.8 to 0.9
    part = 1024 if x.device.type == "cpu" and len(x) > 1 else len(head)
    for weight, out in zip(head.split(part), logits.split(part, 1)):
        torch.mm(x, weight.T, out=out)
    return logits[:, : len(llm.head)].float()


def store_weights(model: InternVL, by_columns: bool) -> None:
    """Keep the decoder's tall matrices by columns, or all of them by rows.

    On a CPU a single row meets a matrix of few columns faster by columns (an AMD EPYC: 384 columns
    take 0.55 of the time, 896 0.7); many rows, and rows of a large model, do not.
    """
    llm = model.language_model
    linears = [module.weight for module in llm.modules() if isinstance(module, nn.Linear)]
    for weight in {*linears, llm.head}:
        rows, columns = weight.shape
        turn = by_columns and columns < rows and columns <= 2048
        weight.data = weight.data.t().contiguous().t() if turn else weight.data.contiguous()


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


PART = 256  # tokens whose probabilities are summed first: short sums are exact enough


def filtered_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(row vocab) probabilities after temperature, then top-k, then top-p; 0 and 1 mean off.

    Ties at the k-th place all stay.  Top-p keeps the smallest set of most probable tokens that
    reaches top_p, as the nucleus of arXiv:1904.09751.
    """
    logits = logits if temperature == 1 else logits / temperature
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
    if temperature < 1e-6:  # nothing else is left, and a smaller one would overflow
        return logits.argmax(-1)
    probs = filtered_probs(logits, temperature, top_k, top_p)
    # first the part of the vocabulary, then the token in it: sums of few numbers, in float64
    vocab = probs.shape[1]
    full, last = probs.split([vocab - vocab % PART, vocab % PART], 1)
    sums = torch.cat([full.unflatten(1, (-1, PART)).sum(-1), last.sum(-1, keepdim=True)], 1)
    ends = sums.double().cumsum(-1)
    part, rest = find(ends, uniforms.to(ends)[:, None] * ends[:, -1:])
    ids = part[:, None] * PART + torch.arange(PART, device=probs.device)
    inside = probs.gather(1, ids.clamp(max=vocab - 1)).masked_fill(ids >= vocab, 0)
    return part * PART + find(inside.double().cumsum(-1), rest)[0]


def find(ends: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the intervals that end at `ends` (row n) holds target (row 1), and how far inside.

    An interval of length 0 spans nothing and is never met, whatever the target was rounded to.
    """
    target = torch.minimum(target, ends[:, -1:].nextafter(ends.new_zeros(1)))
    index = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    return index[:, 0], target - F.pad(ends, (1, 0)).gather(1, index)


# --------------------------------------------------------------------------- the scheduler


@dataclass(eq=False)
class Group:
    """A prompt as ids, and its samples; in its turn its pixels are read and it enters the cache."""

    prompt: Prompt
    ids: list[int]
    prefix: list[int]  # the end of ids: the answer's beginning
    image_tokens: int
    limit: int  # new tokens of an answer, at most
    todo: list[int]  # numbers of the samples to be drawn
    rows: int = 0  # samples under way
    room: Room = dataclasses.field(default_factory=Room)
    first_logits: Tensor | None = None  # (vocab) of every sample's first token


@dataclass(eq=False)
class Row:
    """A sample under way."""

    group: Group
    sample: int
    key: int
    rooms: tuple[Room, ...]  # the prompt's and the answer's, or one of both
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    finish_reason: Literal["", "stop", "length"] = ""


class Scheduler:
    """Keeps the rows of one cache busy with the samples of many prompts.

    An answer takes memory as it grows.  A sample that had to go back begins again later and gets
    the same text, because it is a function of its name alone.
    """

    def __init__(self, generator: "Generator", coming: Iterator[Group]) -> None:
        self.generator, self.model, self.coming = generator, generator.model, coming
        self.waiting = deque(islice(coming, MAX_ROWS))  # seen, not in the cache
        self.groups: list[Group] = []  # in the cache
        self.rows: list[Row] = []  # the oldest first
        self.decode = decode
        if generator.device.type == "cuda":  # before the cache, which takes what memory is left
            head = aligned(self.model.language_model.head.detach())
            self.decode = Captured(partial(decode, head=head))
        self.cache = generator.make_cache(self.waiting)

    def run(self) -> Iterator[Row]:
        """Each row each time it got a token; `finish_reason` says whether that was its last."""
        while True:
            while fresh := self.refill():  # repeated, as a sample may end with its first token
                yield from self.collect(fresh, torch.stack([r.group.first_logits for r in fresh]))
            if not self.rows:
                return
            self.grow()
            if self.rows:
                yield from self.collect(list(self.rows), self.step())

    def refill(self) -> list[Row]:
        """Start samples, of prompts in the cache or of the next, while the rows can still grow."""
        before = len(self.rows)
        while len(self.rows) < MAX_ROWS:
            group = next((group for group in self.groups if group.todo), None) or self.read()
            if group is None:
                break
            if self.rows and not self.has_room(1, len(self.groups), group.rows + 1):
                break
            sample = group.todo.pop(0)
            only = not (group.rows or group.todo or self.cache.exact)  # continues the prompt's room
            rooms = (group.room,) if only else (group.room, Room(high=True))
            key = row_key(self.generator.settings.seed, group.prompt.id, sample)
            row = Row(group, sample, key, rooms)
            self.cache.enlarge(rooms[-1], rooms[-1].length + 1)
            group.rows += 1
            self.rows.append(row)
        return self.rows[before:]

    def read(self) -> Group | None:
        """Prefill the next prompt, if there is one and room for it, and short ones behind it."""
        batch: list[Group] = []
        while group := self.next(batch):
            self.cache.enlarge(group.room, len(group.ids))
            batch.append(group)
        if not batch:
            return None
        prompts = [group.ids for group in batch]
        attend = self.cache.prefill([group.room for group in batch], list(map(len, prompts)))
        tiles = [tiles for x in batch if (tiles := self.generator.tiles(x.prompt)) is not None]
        logits = prefill(self.model, prompts, torch.cat(tiles) if tiles else None, attend)
        for group, group.first_logits in zip(batch, logits):
            self.groups.append(group)
        return batch[0]

    def next(self, batch: list[Group]) -> Group | None:
        """The next prompt, if it can be read together with these: short, of one sample each."""
        self.waiting.extend(islice(self.coming, 0 if self.waiting else 1))
        if not self.waiting:
            return None
        group = self.waiting[0]
        length, together = len(group.ids), [*batch, group]
        if num_blocks(length) + num_blocks(group.limit) > self.cache.num_blocks:
            told = f"{group.prompt.label}: {length} tokens and up to {group.limit} new ones"
            remedy = "raise --cache_tokens, use fewer tiles, or free memory of the GPU"
            raise InputError(f"{told} exceed {self.cache.num_blocks * KEYS} of the cache; {remedy}")
        short = sum(len(group.ids) for group in together) <= self.cache.together
        single = all(len(group.todo) == 1 for group in together)
        if batch and not (short and single and len(self.rows) + len(together) <= MAX_ROWS):
            return None
        blocks = num_blocks(length) + len(together)  # and a block for each one's first token
        if (batch or self.rows) and not self.has_room(blocks, len(self.groups) + len(together), 1):
            return None
        return self.waiting.popleft()

    def has_room(self, blocks: int, groups: int, rows: int) -> bool:
        """Whether so many blocks are free beside half a block a row, or all that rows may yet need.

        A step computes as many rows for each group as the widest has: one wide group among many
        narrow ones has to wait.
        """
        widest = max([rows, *(group.rows for group in self.groups)])
        spare = int(self.cache.free.sum()) - blocks
        ends = [row.rooms[-1].length + row.group.limit - len(row.ids) for row in self.rows]
        growth = sum(map(num_blocks, ends)) - sum(len(r.rooms[-1].blocks) for r in self.rows)
        return groups * widest <= 4 * MAX_ROWS and spare >= min(len(self.rows) // 2, growth)

    def grow(self) -> None:
        """Room for one more token in every row; the youngest gives way where there is none."""
        grown = 0
        while grown < len(self.rows):
            row = self.rows[grown]
            if self.cache.enlarge(row.rooms[-1], row.rooms[-1].length + 1):
                grown += 1
            else:
                self.leave(self.rows[-1], again=True)

    def step(self) -> Tensor:  # (row vocab)
        """Feed each row its last token."""
        plan = self.cache.plan([row.rooms for row in self.rows], [row.ids[-1] for row in self.rows])
        return self.decode(self.model, self.cache, plan)[: len(self.rows)]

    def collect(self, rows: list[Row], logits: Tensor) -> Iterator[Row]:  # logits (row vocab)
        """Choose each row's next token, and take out the rows that end with it."""
        for row, (token, logp) in zip(rows, self.generator.choose(logits, rows)):
            self.generator.push(row, token, logp)
            if row.finish_reason:
                self.leave(row)
            yield row

    def leave(self, row: Row, again: bool = False) -> None:
        """Free a row's memory, and its prompt's after the last row; `again`: both come again."""
        group = row.group
        self.rows.remove(row)
        self.cache.release(row.rooms[-1])
        group.rows -= 1
        if again:
            group.todo.insert(0, row.sample)
        if not group.rows and (again or not group.todo):
            self.groups.remove(group)
            self.cache.release(group.room)
            if again:
                self.waiting.appendleft(group)


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
        self.banned = torch.tensor(banned, dtype=torch.long, device=self.device)

    @classmethod
    def load(
        cls, model_dir: Path, dtype: torch.dtype | None = None, **settings: object
    ) -> "Generator":
        """From a folder in the official layout; on the GPU of this process if there is one."""
        device = local_device()
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        return cls(load_model(model_dir, device, dtype), load_tokenizer(model_dir), **settings)

    # ----- prompts

    def encode(self, prompt: Prompt) -> Group:
        """Ids of the prompt; reads the sizes of its images."""
        config, llm, count = self.model.config, self.model.config.llm, len(prompt.images)
        with named(prompt.label):
            if not prompt.question.strip():
                raise InputError("the question is empty")
            turns = [*prompt.history, (prompt.question, None)]
            asked = "\n".join(question for question, _ in turns)
            if with_image_placeholders(asked, count) != asked:  # none yet: to the first turn
                turns[0] = with_image_placeholders(turns[0][0], count), turns[0][1]
            limits = prompt.max_tiles or config.max_tiles, config.tile_size
            tokens = [config.tokens_per_tile * num_tiles(Path(p), *limits) for p in prompt.images]
            systems = prompt.system_prompt, config.system_message
            ids = encode_chat(self.tokenizer, config.template, turns, tokens, *systems)
            if len(ids) > (most := llm.max_position_embeddings) and not llm.rope_factor:
                runtime.say(f"{prompt.label}: {len(ids)} tokens, the model was made for {most}")
            prefix = self.tokenizer.encode_plain(prompt.prefix)
        limit, todo = self.settings.max_new_tokens, list(prompt.samples)
        return Group(prompt, ids + prefix, prefix, sum(tokens), limit, todo)

    def tiles(self, prompt: Prompt) -> Tensor | None:
        """Pixels of the prompt's images, (tile 3 h w)."""
        config = self.model.config
        limits = prompt.max_tiles or config.max_tiles, config.tile_size
        parts = [preprocess(load_image(Path(path)), *limits) for path in prompt.images]
        return torch.cat(parts).to(self.device) if parts else None

    def make_cache(self, groups: Collection[Group]) -> KVCache:
        """A cache of these prompts, the largest if more may follow; weights stored as suits it."""
        settings, llm, on_gpu = self.settings, self.model.config.llm, self.device.type == "cuda"
        blocks = most_blocks(llm, self.device, self.dtype, settings.cache_tokens)
        samples = sum(len(group.todo) for group in groups)
        if len(groups) < MAX_ROWS:
            longest = max((group.limit for group in groups), default=0)
            needed = sum(num_blocks(len(group.ids)) for group in groups)
            blocks = min(blocks, needed + min(MAX_ROWS, samples) * num_blocks(longest))
        # CPU libraries multiply fewer rows in another way, with other rounding; at temperature 0
        # that hardly matters, and one row alone is faster without company
        exact = settings.exact_batches and not on_gpu and settings.temperature > 0
        alone = samples == 1 and not exact and not on_gpu
        store_weights(self.model, by_columns=alone and self.dtype == torch.float32)
        return KVCache(llm, blocks, self.device, self.dtype, rounded=on_gpu, exact=exact)

    # ----- running

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Each sample as it ends; prompts are read as their turn comes."""
        groups = (group for group in map(self.encode, prompts) if group.todo)
        for row in Scheduler(self, groups).run():
            if row.finish_reason:
                group, text = row.group, self.text(row)[0]
                tokens = (len(row.ids), len(group.ids), group.image_tokens, math.fsum(row.logps))
                lists = (tuple(row.ids), tuple(row.logps))
                yield Sample(group.prompt.id, row.sample, text, row.finish_reason, *tokens, *lists)

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """The text of sample 0, piece by piece; together equal to run()'s."""
        group, shown = dataclasses.replace(self.encode(prompt), todo=[0]), 0
        for row in Scheduler(self, iter([group])).run():
            text, _ = self.text(row, final=bool(row.finish_reason))
            yield text[shown:]
            shown = len(text)
        if row.finish_reason == "length":
            runtime.say(CUT_OFF)

    # ----- one token

    @torch.inference_mode()
    def choose(self, logits: Tensor, rows: list[Row]) -> list[tuple[int, float]]:
        """(token, its plain log-prob) of each row, from logits (row vocab)."""
        keys, uniforms = np.array([row.key for row in rows], dtype=np.uint64), np.zeros(len(rows))
        if self.settings.temperature > 0:
            uniforms = uniform(keys, np.array([len(row.ids) for row in rows]))
        plain = logits.index_select(1, self.banned)
        logits.index_fill_(1, self.banned, -torch.inf)  # for a moment, which saves a copy
        sampling = (self.settings.temperature, self.settings.top_k, self.settings.top_p)
        tokens = choose(logits, torch.from_numpy(uniforms).to(self.device), *sampling)
        tokens.clamp_(max=logits.shape[1] - 1)  # of NaN any token; `push` refuses it
        logits.index_copy_(1, self.banned, plain)
        logps = -F.cross_entropy(logits, tokens, reduction="none")
        return list(zip(tokens.tolist(), logps.tolist()))

    def push(self, row: Row, token: int, logp: float) -> None:
        """Add a token to a row, and say why if it was the row's last."""
        prompt = row.group.prompt
        if not math.isfinite(logp):
            place = f"{prompt.label}, sample {row.sample}, token {len(row.ids)}"
            raise InputError(f"{place}: logits are not finite; check weights, or --dtype")
        row.ids.append(token)
        row.logps.append(logp)
        if token in self.stop_ids or (self.settings.stop and self.text(row)[1]):
            row.finish_reason = "stop"
        elif len(row.ids) >= row.group.limit:
            row.finish_reason = "length"

    def text(self, row: Row, final: bool = True) -> tuple[str, bool]:
        """The text of prefix and answer before a stop string, and whether there was one.

        final=False: what stands however the answer goes on; its last letters may begin a stop.
        """
        decode = partial(self.tokenizer.decode, marks=self.settings.marks)
        prefix, ids = row.group.prefix, [id for id in row.ids if id not in self.stop_ids]
        text = decode(prefix + ids, final=final)
        begin = len(os.path.commonprefix([text, decode(prefix)]))  # `a ,` is decoded as `a,`
        places = [place for s in self.settings.stop if (place := text.find(s, begin)) >= 0]
        starts = [] if final else [s[:n] for s in self.settings.stop for n in range(len(s))]
        held = max(map(len, filter(text.endswith, starts)), default=0)
        return text[: min(places, default=len(text) - held)], bool(places)


# --------------------------------------------------------------------------- command line


def make_prompt(cfg: GenerateConfig, question: str, history: tuple) -> Prompt:
    plain = question.removeprefix(f"{IMAGE}\n" * len(cfg.image))  # which a chat puts in front
    digest = hashlib.blake2b(repr((plain, history, cfg.prefix)).encode(), digest_size=8)
    given = (cfg.image, history, cfg.prefix, cfg.max_tiles, range(cfg.num_samples))
    return Prompt(digest.hexdigest(), question, *given, name="the question")


def chat(generator: Generator, cfg: GenerateConfig, history: tuple) -> None:
    """Questions from stdin, answers streamed to stdout, until the input ends."""
    print("ask; an empty line or Ctrl-D ends the chat", file=sys.stderr)
    invitation = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while question := input(invitation).strip():
            answer = ""
            try:
                if not history and cfg.image:
                    question = with_image_placeholders(question, len(cfg.image))
                for piece in generator.stream(make_prompt(cfg, question, history)):
                    print(piece, end="", flush=True)
                    answer += piece
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            except InputError as error:  # of this question alone
                print(f"error: {error}", file=sys.stderr)
                continue
            print()
            history = (*history, (question, answer.strip()))


def main() -> None:
    cfg = runtime.parse_cli(GenerateConfig)
    turns = read_json(cfg.history, list) if cfg.history else []
    if not fits(turns, list[list[str]]) or any(len(turn) != 2 for turn in turns):
        raise InputError(f"{cfg.history}: expected a list of [question, answer] pairs of text")
    history = tuple((question, answer) for question, answer in turns)
    for path in cfg.image:  # before the weights, which may take minutes
        open_image(path).close()
    generator = Generator.load(cfg.model_dir, FLOATS.get(cfg.dtype), **cfg.settings())
    if not cfg.question:
        return chat(generator, cfg, history)
    samples = generator.run([make_prompt(cfg, cfg.question, history)])
    for s in sorted(samples, key=lambda s: s.sample):
        if cfg.json:
            shown = {"sample": s.sample, "text": s.text, "tokens": s.num_tokens}
            shown |= {"finish_reason": s.finish_reason, "logp": s.logp}
            print(json.dumps(shown, ensure_ascii=False))
        else:
            print(s.text.strip(), flush=True)
            if s.finish_reason == "length":
                runtime.say(CUT_OFF)


if __name__ == "__main__":
    runtime.run(main)
