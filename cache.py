"""Keys and values of the past: what makes a decoding step cost one token, not the whole text.

    KVCache.prefill    attention for a prompt's first pass, which fills its blocks
    KVCache.plan       which blocks the rows of a step read, and where they write
    KVCache.decode     attention for one new token a row

Blocks as in PagedAttention (arXiv:2309.06180), partial softmax sums as in Flash-Decoding
(pytorch.org/blog/flash-decoding), a shared prompt read once for all its rows as in Hydragen
(arXiv:2402.05099); in plain torch operations.

Shapes: row, piece, g or head = key/value heads, query = query heads of one of them, d channels.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LLMConfig
from model import Attend, causal_attention

TOGETHER = 1024  # tokens of short prompts that a CPU reads in one pass, a GPU four times as many
GPU_RESERVE = 0.15  # of the card: a prefill's activations, logits, partial sums of attention
KEYS = 64  # tokens of a block of the cache
STEADY = 32  # steps in which no shape shrinks: a new one costs a GPU as much as ten steps
HIDDEN = -1e30  # a score without weight; finite, so that a row without any key stays finite


def num_blocks(tokens: int) -> int:
    return -(-tokens // KEYS)


class Room:
    """A prompt's or an answer's place in the cache: its blocks in order, and the tokens in them.

    high: takes blocks from the end of the cache, as answers do that share their prompt.
    """

    def __init__(self, high: bool = False) -> None:
        self.high, self.blocks, self.length = high, np.zeros(0, np.int64), 0

    def place(self, t: int | np.ndarray) -> int | np.ndarray:
        """Where its token number t is kept."""
        return self.blocks[t // KEYS] * KEYS + t % KEYS


class Span(NamedTuple):
    """The first pieces of the cache, or the last, each read by up to `seats` rows of a step."""

    start: int  # block
    pieces: int
    blocks: int  # of a piece: neighbours, attended at once
    seats: int
    width: int  # pieces that one row reads, at most


class Plan(NamedTuple):
    """A decoding step: its shapes, and one tensor of numbers that says where to read and write."""

    rows: int
    spans: tuple[Span, ...]
    numbers: Tensor


class KVCache:
    """Keys and values of prompts and of their answers, in blocks of KEYS tokens.

    A prompt's blocks are read by all rows that continue it; an answer takes blocks as it grows.
    Each piece is attended by itself, in place, and a row's partial sums are weighed in the end:
    nothing is copied.  A piece is a block; on a CPU it is a whole room, if all rooms are equally
    many neighbouring blocks.  Keys are stored as they were turned, and never turned again.

    rounded: sizes are rounded up, and held for a while, so that few shapes are captured.
    exact: a row's numbers depend on no other row: pieces are blocks, rows and the queries of a
    block come in multiples of 16, and each prompt is read by itself.  With AVX-512 and one thread
    MKL and oneDNN then round alike in any batch (MKL with AVX2, or with two threads and 1024 terms,
    only under MKL_CBWR=AUTO,STRICT).
    """

    def __init__(
        self,
        config: LLMConfig,
        blocks: int,
        device: torch.device | str,
        dtype: torch.dtype,
        rounded: bool = False,
        exact: bool = False,
    ) -> None:
        self.heads, self.channels = config.num_key_value_heads, config.head_dim
        self.queries = config.num_attention_heads // self.heads  # that share a key head
        self.device, self.dtype = torch.device(device), dtype
        self.exact, self.row_multiple = exact, 16 if exact else 1
        self.seat_multiple = 16 // math.gcd(16, self.queries) if exact else 1
        self.rounded, self.steps, self.held = rounded, 0, {}
        # longer prompts would turn the shorter ones beside them by another base (see `rotary`)
        tokens = TOGETHER * (4 if self.device.type == "cuda" else 1)
        self.together = 0 if exact else min(tokens, config.max_position_embeddings)
        self.neighbours = not exact and self.device.type != "cuda"
        self.num_blocks, self.free = blocks, np.ones(blocks, bool)
        self.arranged: tuple[list, list] | None = None  # rows of the last step, what they read
        # token head d, and one more block where idle rows write
        shape = ((blocks + 1) * KEYS, self.heads, self.channels)
        zeros = lambda: torch.zeros(shape, device=self.device, dtype=dtype)  # noqa: E731
        self.memory = [(zeros(), zeros()) for _ in range(config.num_hidden_layers)]

    # ----- rooms

    def enlarge(self, room: Room, length: int) -> bool:
        """Take blocks until the room holds `length` tokens; False if too few are free."""
        missing = num_blocks(length) - len(room.blocks)
        if missing > 0:
            free = np.flatnonzero(self.free)
            if missing > len(free):
                return False
            taken = free[:: -1 if room.high else 1][:missing]
            self.free[taken], self.arranged = False, None
            room.blocks = np.concatenate([room.blocks, taken])
        return True

    def release(self, room: Room) -> None:
        self.free[room.blocks], self.arranged = True, None
        room.blocks, room.length = room.blocks[:0], 0

    def compact(self, rooms: set[Room], high: bool) -> None:
        """If over a quarter of a step's blocks are free, move the outermost into them."""
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
            memory = memory.unflatten(0, (-1, KEYS))
            memory[target] = memory[source]

    # ----- attention

    def prefill(self, rooms: list[Room], lengths: list[int]) -> Attend:
        """Attention for the first pass of prompts, side by side in (1 s ...): fills their rooms."""
        places = [room.place(np.arange(length)) for room, length in zip(rooms, lengths)]
        index = torch.from_numpy(np.concatenate(places)).to(self.device)
        for room, length in zip(rooms, lengths):
            room.length = length
        # attended as rows of one length: what is behind a prompt, no token of it sees
        shape = len(lengths), max(lengths)
        own = np.concatenate([n * shape[1] + np.arange(length) for n, length in enumerate(lengths)])
        own = torch.from_numpy(own).to(self.device)

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            for memory, new in zip(self.memory[layer], qkv[1:]):
                memory.index_copy_(0, index, new[0])
            rows = (
                x.new_zeros(math.prod(shape), *x.shape[2:]).index_copy_(0, own, x[0]) for x in qkv
            )
            out = causal_attention(layer, *(row.unflatten(0, shape) for row in rows))
            return out.flatten(0, 1).index_select(0, own)[None]

        return attend

    def plan(self, rows: list[tuple[Room, ...]], tokens: list[int]) -> Plan:
        """The step that feeds each row a token.  A row reads its rooms and writes to the last one.

        That one must have space for the token.  Idle rows, up to a rounded number of rows, are
        computed and ignored.
        """
        self.steps += 1
        if self.rounded and self.steps % STEADY == 0:
            self.held, self.arranged = {}, None
        padded = -(-self.round(len(rows), "rows") // self.row_multiple) * self.row_multiple
        if self.arranged is None or self.arranged[0] != rows:
            parts = range(max(map(len, rows)))
            self.arranged = rows, [self._span(rows, part, padded) for part in parts]
        numbers = np.zeros((3, padded), int)
        numbers[2] = self.num_blocks * KEYS
        positions = [sum(room.length for room in row) for row in rows]
        numbers[:, : len(rows)] = tokens, positions, [row[-1].place(row[-1].length) for row in rows]
        for *_, answer in rows:
            answer.length += 1
        parts = [numbers.ravel()]
        for span, table, piece, rooms, room, offset in self.arranged[1]:
            lengths = np.array([room.length for room in rooms])[room] - offset
            filled = np.zeros(span.pieces, int)
            filled[piece] = lengths.clip(0, KEYS * span.blocks)
            parts += [filled, table]
        on_device = torch.from_numpy(np.concatenate(parts)).to(self.device)
        return Plan(padded, tuple(span for span, *_ in self.arranged[1]), on_device)

    def round(self, n: int, *what: object) -> int:
        """Where steps are captured, n or a little more, and no less than lately of the same."""
        if not self.rounded:
            return int(n)
        self.held[what] = max(rounded_up(n), self.held.get(what, 0))
        return self.held[what]

    def _span(self, rows: list[tuple[Room, ...]], part: int, padded: int) -> tuple:
        """The span of every row's room number `part`: 0 the prompt's, 1 the answer's own, if any.

        With it a flat table: the rows that read each piece (piece seat), then which of these
        partial sums are a row's (row width), -1 for none.  Then, of each piece in use, its place in
        the span, its room (all rooms, and the number of each one's), the room's tokens before it.
        """
        readers = np.array([n for n, row in enumerate(rows) if part < len(row)])
        rooms, high = [rows[n][part] for n in readers], part == 1
        self.compact(set(rooms), high)
        taken = defaultdict(itertools.count)  # rows of one prompt sit side by side
        seat = np.array([next(taken[id(room)]) for room in rooms])
        seats = rounded_up(seat.max() + 1) if self.rounded else int(seat.max() + 1)
        if not high:  # an answer has one reader in any batch
            seats = -(-seats // self.seat_multiple) * self.seat_multiple
        piece = np.concatenate([room.blocks for room in rooms])
        used = self.num_blocks - piece.min() if high else 1 + piece.max()
        blocks = min(self.round(used, "blocks", seats, high), self.num_blocks)
        start = self.num_blocks - blocks if high else 0
        piece, in_room, size = piece - start, np.array([len(room.blocks) for room in rooms]), 1
        if self.neighbours and (in_room == in_room[0]).all():
            runs = piece.reshape(len(rooms), -1)
            if not (runs[:, 0] % in_room[0]).any() and (np.diff(runs) == 1).all():
                size = int(in_room[0])
                piece, in_room = runs[:, 0] // size, in_room // size

        room = np.repeat(np.arange(len(rooms)), in_room)
        of_room = np.arange(len(room)) - np.repeat(in_room.cumsum() - in_room, in_room)
        width = self.round(in_room.max(), "width", seats, high)
        span = Span(start, blocks // size, size, seats, width)
        of_piece = np.zeros((span.pieces, seats), int)
        of_piece[piece, seat[room]] = readers[room]
        table = np.full((padded, width), -1)
        table[readers[room], of_room] = piece * seats + seat[room]
        table = np.concatenate([of_piece.ravel(), table.ravel()])
        return span, table, piece, rooms, room, KEYS * of_room

    def decode(self, plan: Plan) -> tuple[Tensor, Tensor, Attend]:
        """(tokens (row), positions (row), attention for one new token a row) of a plan."""
        rows, g, j, d = plan.rows, self.heads, self.queries, self.channels
        lengths, spans = [rows] * 3, []
        for span in plan.spans:
            lengths += [span.pieces, span.pieces * span.seats, rows * span.width]
        tokens, positions, places, *arrays = plan.numbers.split(lengths)
        whole = sum(span.width for span in plan.spans) == 1  # a row is one piece: nothing to weigh
        for span, filled, readers, table in zip(plan.spans, *(arrays[n::3] for n in range(3))):
            part = slice(span.start * KEYS, (span.start + span.pieces * span.blocks) * KEYS)
            hidden = torch.arange(span.blocks * KEYS, device=self.device) >= filled[:, None]
            mask = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, HIDDEN)
            table, heads = table.view(rows, 1, span.width), torch.arange(j * g, device=self.device)
            numbers = table.clamp(min=0) * (j * g) + heads[:, None]  # row (query head) width
            spans.append((span, part, readers, mask, numbers.flatten(0, 1), table < 0))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for memory, new in zip(self.memory[layer], (k, v)):
                memory.index_copy_(0, places, new[:, 0])
            q, outs, sums = q.view(rows, g, j, d).transpose(1, 2), [], []
            for span, part, readers, mask, numbers, absent in spans:
                asked = q.index_select(0, readers), *(memory[part] for memory in self.memory[layer])
                asked = (x.view(span.pieces, -1, g, d).transpose(1, 2) for x in asked)
                out, logsum = attend_pieces(*asked, mask[:, None, None])
                outs.append(out.transpose(1, 2).reshape(-1, d))  # (piece seat query head) d
                if not whole:
                    logsum = logsum.transpose(1, 2).flatten()[numbers].view(rows, j * g, -1)
                    sums.append(logsum.masked_fill(absent, 2 * HIDDEN))
            if whole:
                out = outs[0].index_select(0, numbers.flatten())
            else:
                weights = torch.cat(sums, -1).softmax(-1).flatten(0, 1)
                weights = weights.split([span.width for span in plan.spans], -1)
                # each row and head gathers its partial sums and weighs them, in one operation
                out = sum(
                    F.embedding_bag(numbers, out.float(), mode="sum", per_sample_weights=weight)
                    for (*_, numbers, _), out, weight in zip(spans, outs, weights)
                )
            return out.to(self.dtype).view(rows, j, g, d).transpose(1, 2).reshape(rows, 1, g * j, d)

        return tokens, positions, attend


def attend_pieces(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each piece alone: q (piece head query d), k and v (piece head key d), mask (piece 1 1 key).

    Returns the outputs, like q, and the logarithm of each softmax's sum, (piece head query): what
    torch's scaled_dot_product_attention computes, in one operation, and does not return.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    mask = mask.expand(-1, q.shape[1], q.shape[2], -1)
    out, logsum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    return out, logsum[:, :, : q.shape[2]]  # of up to 31 queries more


def rounded_up(n: int) -> int:
    """The next of 1, 2, 4, 8, 12, ... 32, 40, ... 64, 80, ...: past 12 at most a quarter more."""
    step = 1 << max(2, (int(n) - 1).bit_length() - 3)
    return int(n) if n < 3 else -(-int(n) // step) * step


def most_blocks(config: LLMConfig, device: torch.device, dtype: torch.dtype, tokens: int) -> int:
    """Blocks of a cache of so many tokens; 0 = all that a GPU has left but a reserve, or 65536."""
    if not tokens and device.type == "cuda":
        free, card = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return max(0, int((free - GPU_RESERVE * card) // (numbers * dtype.itemsize))) // KEYS
    return (tokens or 65536) // KEYS


class Captured:
    """Steps on a GPU without launch costs: a CUDA graph for each shape of plan that comes twice.

    The first time runs as it is, and makes ready what a capture wants to find.
    """

    def __init__(self, step: Callable) -> None:
        self.step, self.graphs, self.pool = step, {}, torch.cuda.graph_pool_handle()

    def __call__(self, model: nn.Module, cache: KVCache, plan: Plan) -> Tensor:
        shape = (plan.rows, plan.spans)
        if shape not in self.graphs:
            self.graphs[shape] = None
            return self.step(model, cache, plan)
        if not self.graphs[shape]:
            plan = plan._replace(numbers=plan.numbers.clone())  # the graph reads its numbers here
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self.step(model, cache, plan)
            self.graphs[shape] = graph, plan.numbers, logits
        graph, numbers, logits = self.graphs[shape]
        numbers.copy_(plan.numbers)
        graph.replay()
        return logits
