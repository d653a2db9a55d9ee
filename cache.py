"""Keys and values of the past: what makes a decoding step cost one token, not the whole text.

    KVCache.prefill    attention for a prompt's first pass, which fills its blocks
    KVCache.plan       which blocks the rows of a step read, and where they write
    KVCache.decode     attention for one new token a row

Blocks as in PagedAttention (arXiv:2309.06180), partial softmax sums as in Flash-Decoding
(pytorch.org/blog/flash-decoding), a shared prompt read once for all its rows as in Hydragen
(arXiv:2402.05099); in plain torch operations.

Shapes: row, block, g or head = key/value heads, query = query heads of one of them, d channels.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LLMConfig
from model import Attend, causal_attention

CPU_TOKENS = 65536
TOGETHER = 512  # tokens of short prompts that a CPU reads in one pass: its products want more rows
GPU_RESERVE = 0.15  # of the card: a prefill's activations, logits, partial sums of attention
KEYS = 64  # tokens of a block of the cache
HIDDEN = -1e30  # a score without weight; finite, so that a row without any key stays finite


def num_blocks(tokens: int) -> int:
    return -(-tokens // KEYS)


class Room:
    """A prompt's or an answer's place in the cache: its blocks in order, and the tokens in them."""

    def __init__(self) -> None:
        self.blocks, self.length = np.zeros(0, np.int64), 0


class Span(NamedTuple):
    """The first blocks of the cache, or the last, each read by up to `seats` rows of a step."""

    start: int
    blocks: int
    seats: int
    width: int  # blocks that one row reads, at most
    ragged: bool  # some rows read fewer


class Plan(NamedTuple):
    """A decoding step: its shapes, and one tensor of numbers that says where to read and write."""

    rows: int
    spans: tuple[Span, ...]
    numbers: Tensor


class KVCache:
    """Keys and values of prompts and of their answers, in blocks of KEYS tokens.

    A prompt's blocks are read by all rows that continue it; an answer takes blocks as it grows.
    Each block is attended by itself, in place, and a row's partial sums are weighed in the end (as
    in Flash-Decoding): nothing is copied, and a row's numbers depend on no other row.  Keys are
    stored as they were turned; later steps never turn them again.

    apart: prompts take low blocks and answers high ones, as suits many answers a prompt.
    rounded: sizes are rounded up, so that few different shapes are captured.
    exact: rows, and the queries of a block, come in multiples of 16, and each prompt is read by
    itself.  With AVX-512 and one thread MKL and oneDNN then round alike in any batch (MKL with
    AVX2, or with two threads and 1024 terms, only under MKL_CBWR=AUTO,STRICT).
    """

    def __init__(
        self,
        config: LLMConfig,
        blocks: int,
        device: torch.device | str,
        dtype: torch.dtype,
        apart: bool = True,
        rounded: bool = False,
        exact: bool = False,
    ) -> None:
        self.heads, self.channels = config.num_key_value_heads, config.head_dim
        self.queries = config.num_attention_heads // self.heads  # that share a key head
        self.device, self.dtype = torch.device(device), dtype
        self.apart = apart or exact
        self.row_multiple = 16 if exact else 1
        self.seat_multiple = 16 // math.gcd(16, self.queries) if exact else 1
        self.round = rounded_up if rounded else int
        # longer prompts would turn the shorter ones beside them by another base (see `rotary`)
        alone = exact or self.device.type == "cuda"
        self.together = 0 if alone else min(TOGETHER, config.max_position_embeddings)
        self.num_blocks, self.free = blocks, np.ones(blocks, bool)
        # block head key d, and one more block where idle rows write
        shape = (blocks + 1, self.heads, KEYS, self.channels)
        zeros = lambda: torch.zeros(shape, device=self.device, dtype=dtype)  # noqa: E731
        self.memory = [(zeros(), zeros()) for _ in range(config.num_hidden_layers)]

    # ----- rooms

    def enlarge(self, room: Room, length: int, prompt: bool = False) -> bool:
        """Take blocks until the room holds `length` tokens; False if too few are free."""
        missing = num_blocks(length) - len(room.blocks)
        if missing > 0:
            free = np.flatnonzero(self.free)
            if missing > len(free):
                return False
            taken = free[::-1][:missing] if self.apart and not prompt else free[:missing]
            self.free[taken] = False
            room.blocks = np.concatenate([room.blocks, taken])
        return True

    def release(self, room: Room) -> None:
        self.free[room.blocks] = True
        room.blocks, room.length = room.blocks[:0], 0

    def compact(self, rooms: set[Room], high: bool) -> None:
        """Where a step would read a quarter of its blocks in vain, move the outermost inwards."""
        blocks = np.sort(np.concatenate([room.blocks for room in rooms]))
        used = self.num_blocks - blocks[0] if high else 1 + blocks[-1]
        if used >= 4 * self.free[:: -1 if high else 1][:used].sum():
            return
        free, step = np.flatnonzero(self.free), 1 if high else -1
        count = min(len(blocks), len(free))
        source, target = blocks[::step][:count], free[::-step][:count]
        nearer = (target - source) * step > 0
        source, target = source[nearer], target[nearer]
        moved = np.arange(self.num_blocks)
        moved[source] = target
        for room in rooms:
            room.blocks = moved[room.blocks]
        self.free[source], self.free[target] = True, False
        source, target = (torch.from_numpy(x.copy()).to(self.device) for x in (source, target))
        for memory in itertools.chain(*self.memory):
            memory[target] = memory[source]

    def index(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (t) -> (t head) together
        """Where the keys and values of tokens are kept; a place is block * KEYS + offset."""
        heads = torch.arange(self.heads, device=self.device)
        return (places // KEYS)[:, None], heads, (places % KEYS)[:, None]

    # ----- attention

    def prefill(self, rooms: list[Room], lengths: list[int]) -> Attend:
        """Attention for the first pass of prompts, side by side in (1 s ...): fills their rooms."""
        places = []
        for room, room.length in zip(rooms, lengths):
            t = np.arange(room.length)
            places.append(room.blocks[t // KEYS] * KEYS + t % KEYS)
        index = self.index(torch.from_numpy(np.concatenate(places)).to(self.device))

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            for memory, new in zip(self.memory[layer], qkv[1:]):
                memory.index_put_(index, new[0])
            prompts = zip(*(x.split(lengths, dim=1) for x in qkv))
            return torch.cat([causal_attention(layer, *prompt) for prompt in prompts], dim=1)

        return attend

    def plan(self, rows: list[tuple[Room, Room]], tokens: list[int]) -> Plan:
        """The step that feeds each row, (prompt, answer), a token; its answer grows by it.

        An answer must have room for it.  Idle rows, up to a rounded number of rows, are computed
        and ignored.
        """
        prompts, answers = [prompt for prompt, _ in rows], [answer for _, answer in rows]
        seats, taken = [], {}  # rows of one prompt sit side by side
        for prompt in prompts:
            seats.append(taken.get(id(prompt), 0))
            taken[id(prompt)] = seats[-1] + 1
        positions = [prompt.length + answer.length for prompt, answer in rows]
        for answer in answers:
            answer.length += 1
        padded = -(-self.round(len(rows)) // self.row_multiple) * self.row_multiple

        most_seats = -(-self.round(max(seats) + 1) // self.seat_multiple) * self.seat_multiple
        if self.apart or most_seats > 1:
            parts = [
                self._span([[p] for p in prompts], np.array(seats), most_seats, padded, False),
                self._span([[a] for a in answers], np.zeros(len(rows), int), 1, padded, self.apart),
            ]
        else:  # prompts and answers are read alike
            parts = [self._span([[*pair] for pair in rows], np.array(seats), 1, padded, False)]
        # only now, as blocks may have moved
        places = [a.blocks[(a.length - 1) // KEYS] * KEYS + (a.length - 1) % KEYS for a in answers]
        idle, sink = [0] * (padded - len(rows)), [self.num_blocks * KEYS] * (padded - len(rows))
        numbers = [np.array([*tokens, *idle, *positions, *idle, *places, *sink], int)]
        for _, arrays in parts:
            numbers += [array.ravel() for array in arrays]
        on_device = torch.from_numpy(np.concatenate(numbers)).to(self.device)
        return Plan(padded, tuple(span for span, _ in parts), on_device)

    def _span(
        self, rooms: list[list[Room]], seat: np.ndarray, seats: int, padded: int, high: bool
    ) -> tuple[Span, list[np.ndarray]]:
        """The span of each row's rooms; its readers (block seat), tokens (block), and the blocks of
        each row (row width), as the number of the first partial sum that they give it, or -1.
        """
        flat = [room for row in rooms for room in row]
        self.compact(set(flat), high)
        block = np.concatenate([room.blocks for room in flat])
        in_room = np.array([len(room.blocks) for room in flat])
        in_row = in_room.reshape(len(rooms), -1).sum(1)
        length = np.repeat([room.length for room in flat], in_room) - KEYS * counted(in_room)
        row = np.repeat(np.arange(len(rooms)), in_row)

        used = self.num_blocks - block.min() if high else 1 + block.max()
        blocks, width = min(self.round(used), self.num_blocks), self.round(in_row.max())
        ragged = padded > len(rooms) or bool((in_row < width).any())
        span = Span(self.num_blocks - blocks if high else 0, blocks, seats, width, ragged)
        block = block - span.start
        readers = np.zeros((span.blocks, seats), int)
        readers[block, seat[row]] = row
        filled = np.zeros(span.blocks, int)
        filled[block] = np.clip(length, 0, KEYS)
        table = np.full((padded, width), -1)
        table[row, counted(in_row)] = block * seats + seat[row]
        return span, [readers, filled, table]

    def decode(self, plan: Plan) -> tuple[Tensor, Tensor, Attend]:
        """(tokens (row), positions (row), attention for one new token a row) of a plan."""
        rows, g, j, d = plan.rows, self.heads, self.queries, self.channels
        lengths = [rows] * 3
        for span in plan.spans:
            lengths += [span.blocks * span.seats, span.blocks, rows * span.width]
        tokens, positions, places, *arrays = plan.numbers.split(lengths)
        index, key, spans = self.index(places), torch.arange(KEYS, device=self.device), []
        for span, readers, filled, table in zip(plan.spans, *(arrays[n::3] for n in range(3))):
            part = slice(span.start, span.start + span.blocks)
            hidden = (key >= filled[:, None]).view(span.blocks, 1, 1, KEYS)
            mask = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, HIDDEN)
            table = table.view(rows, 1, span.width)
            numbers = (
                table.clamp(min=0) * (j * g) + torch.arange(j * g, device=self.device)[:, None]
            )
            bags = torch.arange(0, numbers.numel(), span.width, device=self.device)
            spans.append((span, part, readers, mask, numbers, table < 0, bags))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.memory[layer]
            keys.index_put_(index, k[:, 0])
            values.index_put_(index, v[:, 0])
            q, outs, sums = q.view(rows, g, j, d).transpose(1, 2), [], []
            for span, part, readers, mask, numbers, absent, _ in spans:
                asked = q.index_select(0, readers).view(span.blocks, -1, g, d).transpose(1, 2)
                out, logsum = attend_blocks(asked, keys[part], values[part], mask)
                outs.append(out.transpose(1, 2).reshape(-1, d).float())  # (block seat query head) d
                logsum = logsum.transpose(1, 2).flatten()[numbers]  # row (query head) width
                sums.append(logsum.masked_fill(absent, 2 * HIDDEN) if span.ragged else logsum)
            weights = torch.cat(sums, -1).softmax(-1).split([span.width for span, *_ in spans], -1)
            # each row and head gathers its partial sums and weighs them, in one operation
            first, *others = (
                F.embedding_bag(
                    n.flatten(), out, bags, mode="sum", per_sample_weights=weight.flatten()
                )
                for (*_, n, _, bags), out, weight in zip(spans, outs, weights)
            )
            out = sum(others, first)
            return out.to(self.dtype).view(rows, j, g, d).transpose(1, 2).reshape(rows, 1, g * j, d)

        return tokens, positions, attend


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each block alone: q (block head query d), k and v (block head key d), mask (block 1 1 key).

    Returns the outputs, like q, and the logarithm of each softmax's sum, (block head query): what
    torch's scaled_dot_product_attention computes, in one operation, and does not return.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    mask = mask.expand(-1, q.shape[1], q.shape[2], -1)
    out, logsum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    return out, logsum[:, :, : q.shape[2]]  # of up to 31 queries more


def counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each count: [2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def rounded_up(n: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: at most a quarter more."""
    step = 1 << max(0, (int(n) - 1).bit_length() - 3)
    return -(-int(n) // step) * step


def most_blocks(config: LLMConfig, device: torch.device, dtype: torch.dtype, tokens: int) -> int:
    """Blocks of a cache of so many tokens; 0 = what a GPU has left but a reserve, or CPU_TOKENS."""
    if not tokens and device.type == "cuda":
        free, card = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        tokens = max(0, int((free - GPU_RESERVE * card) // (numbers * dtype.itemsize)))
        return tokens // KEYS
    return (tokens or CPU_TOKENS) // KEYS


class Captured:
    """A step on a GPU without launch costs: a CUDA graph, captured once for each shape of plan."""

    def __init__(self, step: Callable) -> None:
        self.step, self.graphs, self.pool = step, {}, torch.cuda.graph_pool_handle()

    def __call__(self, model: nn.Module, cache: KVCache, plan: Plan) -> Tensor:
        shape = (plan.rows, plan.spans)
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(model, cache, plan)
        graph, numbers, logits = self.graphs[shape]
        numbers.copy_(plan.numbers)
        graph.replay()
        return logits

    def capture(self, model: nn.Module, cache: KVCache, plan: Plan) -> tuple:
        plan = plan._replace(numbers=plan.numbers.clone())  # the graph reads its numbers here
        side = torch.cuda.Stream()  # capture wants a warmed-up allocator, off the main stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(model, cache, plan)  # writes what the replay will write again
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.step(model, cache, plan)
        return graph, plan.numbers, logits
