"""Preference pairs on their way to the device: the order of a run, packed trees.

    PairData       deterministic order of pairs; the packs of any Step, so resuming needs no state
    Tree           prompt (trunk) + responses (branches) of one question, as token ids
    Pack           several trees laid one after another in ONE flat sequence

Differs from the official loader: the image is encoded once per tree and not four times, and a
record that is too long is dropped by name, unless --overlong asks for another way.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from images import jpeg, load_image
from model import InternVLConfig
from records import DataSet, PairRecord
from runtime import InputError, fingerprint, named
from tokenizer import Tokenizer, encode_chat, encode_response, training_text
from vision import cut_tiles, num_tiles, pixels

# --------------------------------------------------------------------------- order


def seeded(*key: object) -> np.random.Generator:
    """A random generator that is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def epoch_order(sets: list[DataSet], seed: int, epoch: int) -> np.ndarray:  # (n 2)
    """(set number, record number) in the order of training, a function of (seed, epoch).

    repeat_time r = k + f gives k copies of every record and floor(f * n) more drawn without
    replacement (anew each epoch).
    """
    records = []
    for data_set in sets:
        copies, part = divmod(data_set.repeat_time, 1)
        every = np.arange(len(data_set), dtype=np.int32)
        drawn = seeded(seed, data_set.name, epoch).permutation(every)
        drawn = np.sort(drawn[: int(part * len(data_set))])
        records.append(np.concatenate([np.tile(every, int(copies)), drawn]))
    numbers = np.repeat(np.arange(len(sets), dtype=np.int32), [*map(len, records)])
    places = seeded(seed, "order", epoch).permutation(np.arange(len(numbers), dtype=np.int32))
    return np.stack([numbers[places], np.concatenate(records)[places]], axis=1)


@dataclass
class Tree:
    """One question as token ids: the trunk, and responses that branch off where it ends."""

    trunk: list[int]  # <s> system, image, question, <|im_start|>assistant\n
    responses: list[list[int]]  # each with its closing <|im_end|>
    images: list[tuple[Path, int, bool]]  # (file, tile limit, JPEG augmentation)
    tiles: list[int]  # (image) tile counts, thumbnails included
    # (record, its chosen response, its rejected one, or the chosen where no loss looks at it)
    pairs: list[tuple[PairRecord, int, int]]

    @property
    def size(self) -> int:
        """Tokens in a pack."""
        return len(self.trunk) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest response: what the length limit is about."""
        return len(self.trunk) + max(map(len, self.responses))


def encode_tree(
    record: PairRecord, tokenizer: Tokenizer, config: InternVLConfig, only_chosen: bool = False
) -> Tree:
    """Token ids of one record; reads image sizes, not pixels.  Errors name the record."""
    with named(record.name):
        question = training_text(config.template, record.question)
        tiles = [num_tiles(p, record.max_tiles, config.tile_size) for p in record.images]
        image_tokens = [config.tokens_per_tile * n for n in tiles]
        asked = [(question, None)], image_tokens, record.system_prompt, config.system_message
        trunk = encode_chat(tokenizer, config.template, *asked)
        texts = [(record.chosen, True)]  # and whether its end is learned
        texts += [] if only_chosen else [(record.rejected, not record.cut_off)]
        responses = [encode_response(tokenizer, config.template, *text) for text in texts]
        if responses[1:] == responses[:1]:  # of texts that a tokenizer takes alike
            raise InputError("chosen and rejected are the same tokens; remove the record")
    images = [(path, record.max_tiles, record.augment) for path in record.images]
    return Tree(trunk, responses, images, tiles, [(record, 0, len(responses) - 1)])


def merge(a: Tree, b: Tree) -> Tree:
    """Two trees of one question as a bush, a tree of several pairs; no response twice."""
    responses = a.responses + [response for response in b.responses if response not in a.responses]
    place = [responses.index(response) for response in b.responses]
    pairs = a.pairs + [(record, place[c], place[r]) for record, c, r in b.pairs]
    return replace(a, responses=responses, pairs=pairs)


def apart(tree: Tree) -> list[Tree]:
    """Each response after a copy of the trunk; the first tree's pairs count on into the others."""
    first, *others = (replace(tree, responses=[response]) for response in tree.responses)
    return [first, *(replace(other, pairs=[]) for other in others)]


def grow_bushes(trees: list[Tree], pairs: int, fits: Callable[[Tree], bool]) -> list[Tree]:
    """Neighbours of one question merged, up to `pairs` pairs a bush, as long as a bush `fits`."""
    bushes: list[Tree] = []
    for tree in trees:
        last = bushes[-1] if bushes else STAND_IN
        same = (last.trunk, last.images) == (tree.trunk, tree.images)
        if same and len(last.pairs) < pairs and fits(merged := merge(last, tree)):
            bushes[-1] = merged
        else:
            bushes.append(tree)
    return bushes


@dataclass
class Pack:
    """Trees laid one after another; every index below is into the flat sequence of T tokens.

    A branch's first token is predicted at the trunk's last; `predictor`, `target` and `response`
    list the scored tokens only.
    """

    input_ids: Tensor  # (1 T)
    positions: Tensor  # (1 T) restart at each tree, and where the trunk ended at each branch
    tree: Tensor  # (T)
    branch: Tensor  # (T) 0 = trunk
    predictor: Tensor  # (token) index of the hidden state that predicts ...
    target: Tensor  # (token) ... this id ...
    response: Tensor  # (token) ... of this response
    chosen: Tensor  # (pair) response index
    rejected: Tensor  # (pair) response index
    num_responses: int
    tiles: Tensor | None = None  # (tile 3 h w) uint8, distinct images, once each
    tile_order: Tensor | None = None  # (run of <IMG_CONTEXT>) index into tiles
    trees: list[Tree] = field(default_factory=list)

    def to(self, device: torch.device) -> "Pack":
        """On a GPU through pinned memory, so that nobody waits for the copy."""

        def moved(x: Tensor) -> Tensor:
            x = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
            return x.to(device, non_blocking=True)

        return Pack(**{k: moved(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def padded(self, tokens: int) -> "Pack":
        """The same scores in one shape for all packs, so that a GPU compiles its kernels once.

        Up to a multiple of `tokens` the filler is a tree of its own that nothing scores.
        """
        n = -len(self.tree) % tokens
        return replace(
            self,
            input_ids=F.pad(self.input_ids, (0, n)),
            positions=F.pad(self.positions, (0, n)),
            tree=torch.cat([self.tree, (self.tree[-1:] + 1).expand(n)]),  # no wait for the GPU
            branch=F.pad(self.branch, (0, n)),
        )


def lay_out(trees: list[Tree]) -> Pack:
    """The token side of a pack; `add_tiles` brings the pixels."""
    ids, positions, tree, branch, predictor, target, owner = [], [], [], [], [], [], []
    chosen, rejected, responses = [], [], 0
    for number, t in enumerate(trees):
        chosen += [responses + i for _, i, _ in t.pairs]
        rejected += [responses + i for _, _, i in t.pairs]
        tree += [number] * t.size
        ids += t.trunk
        positions += range(len(t.trunk))
        branch += [0] * len(t.trunk)
        end = len(ids) - 1  # the trunk's last token predicts every branch's first
        for i, response in enumerate(t.responses):
            first, length = len(ids), len(response)
            predictor += [end, *range(first, first + length - 1)]
            target += response
            owner += [responses + i] * length
            ids += response
            positions += range(len(t.trunk), len(t.trunk) + length)
            branch += [i + 1] * length
        responses += len(t.responses)
    flat = tree, branch, predictor, target, owner, chosen, rejected
    tensors = [torch.tensor(x, dtype=torch.long) for x in ([ids], [positions], *flat)]
    return Pack(*tensors, responses, trees=trees)


def response_keys(trees: list[Tree]) -> list[str]:
    """What each response's log-prob depends on beside weights: ids, and the content of images."""
    keys = []
    for tree in trees:
        before = np.array(tree.trunk).tobytes()
        for (path, limit, augment), tiles in zip(tree.images, tree.tiles):
            before += repr((fingerprint([path]), limit, tiles, augment)).encode()
        contents = (before + np.array(response).tobytes() for response in tree.responses)
        keys += [hashlib.blake2b(content, digest_size=16).hexdigest() for content in contents]
    return keys


def add_tiles(pack: Pack, tile_size: int, share: bool = True) -> Pack:
    """Decode each distinct image of the pack once (with share=False: wherever it stands).

    Augmentation is a function of the file's name, not of the epoch, so that cached reference
    log-probs see the very pixels that the policy sees.
    """
    first_tile: dict[tuple | int, int] = {}
    parts, order = [], []
    for image, count in chain.from_iterable(zip(tree.images, tree.tiles) for tree in pack.trees):
        key = image if share else len(order)
        if key not in first_tile:
            path, limit, augment = image
            tiles = cut_tiles(load_image(path), limit, tile_size)
            assert len(tiles) == count, (image, len(tiles), count)
            if augment:
                qualities = seeded("jpeg", path.name).integers(75, 101, count)
                tiles = [jpeg(tile, int(quality)) for tile, quality in zip(tiles, qualities)]
            first_tile[key] = len(parts)
            parts += tiles
        order += range(first_tile[key], first_tile[key] + count)
    if parts:
        pack.tiles, pack.tile_order = pixels(parts), torch.tensor(order)
    return pack


def first_fit(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that no group's sizes exceed the budget: each into the first that fits."""
    packs: list[list[int]] = [[] for _ in sizes]
    room = [budget] * len(sizes)
    for i, size in enumerate(sizes):
        first = next(p for p, left in enumerate(room) if left >= size)
        packs[first].append(i)
        room[first] -= size
    return list(filter(None, packs))


# --------------------------------------------------------------------------- the steps of a run

# a stand-in for a process that has fewer packs than others: the same collectives, no pair
STAND_IN = Tree([0], [[0]], [], [], [])


@dataclass
class Step:
    """What one process does in one step: packs with their place among the step's pairs."""

    number: int  # from 0
    packs: list[tuple[Pack, int, int]]  # (pack, number of the pack, its first pair)
    pairs: list[PairRecord]  # of the whole step, all processes
    trees: list[list[Tree]]  # (pack) likewise
    overlong: list[tuple[str, str]]  # (dropped, cut or fewer_tiles, name) of too long records

    @property
    def counts(self) -> dict[str, int]:
        """Of pairs, and of records that were too long."""
        dropped = sum(rule == "dropped" for rule, _ in self.overlong)
        shortened = len(self.overlong) - dropped
        return {"pairs": len(self.pairs), "dropped": dropped, "shortened": shortened}


@dataclass(eq=False)
class PairData:
    """Which pairs step t trains on, as packs.  A function of (files, seed, t): no state to save.

    In training every process plans the whole step and then builds only its own packs, so the packs
    do not depend on the number of processes.
    """

    sets: list[DataSet]
    tokenizer: Tokenizer
    config: InternVLConfig
    batch_size: int
    pack_tokens: int
    max_length: int
    seed: int
    overlong: Literal["drop", "cut", "fewer_tiles"] = "drop"
    only_chosen: bool = False
    share_images: bool = True
    share_prefix: bool = True
    pairs_per_prompt: int = 1
    limit: int = 0

    def __post_init__(self) -> None:
        self.order = lru_cache(maxsize=1)(self.order)  # every step asks for that of its epoch
        self.steps_per_epoch = -(-len(self.order(0)) // self.batch_size)
        if not self.steps_per_epoch:
            raise InputError(f"no records: {self.sets[0].name} is empty or has repeat_time 0")

    def order(self, epoch: int) -> np.ndarray:  # (pair 2)
        order = epoch_order(self.sets, self.seed, 0 if self.limit else epoch)
        if self.limit:  # the same pairs in every epoch
            order = order[: self.limit]
            order = order[seeded(self.seed, "limit", epoch).permutation(len(order))]
        if self.pairs_per_prompt > 1:  # so many of a question stand where its first one does
            count, groups = Counter(), defaultdict(list)
            for place, (i, n) in enumerate(order):  # reads every record once an epoch
                record = self.sets[i][int(n)]
                question = record.images, record.question, record.max_tiles, record.augment
                groups[question, count[question] // self.pairs_per_prompt].append(place)
                count[question] += 1
            order = order[list(chain.from_iterable(groups.values()))]
        return order

    def digest(self, steps: int) -> str:
        """A hash of what decides which responses the first `steps` steps hold; no image is read."""
        facts = [steps, self.batch_size, self.seed, self.limit, self.max_length, self.overlong]
        facts += [self.pairs_per_prompt, self.pack_tokens, self.share_prefix, self.config]
        facts += [fingerprint([self.tokenizer.source])]
        for of in self.sets:
            facts += [of.name, of.repeat_time, of.max_tiles, of.augment, of.lines.checksum]
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def step(self, number: int, rank: int, world: int) -> Step:
        """Plan the whole step, then build every world-th pack of it."""
        planned, overlong = self.plan(self.rows(number))
        pairs = [pair for pack in planned for tree in pack for pair, _, _ in tree.pairs]
        trees = planned + [[STAND_IN]] * (-len(planned) % world)
        firsts = [0, *accumulate(sum(len(tree.pairs) for tree in pack) for pack in trees)]
        packs = [(self.build(trees[n]), n, firsts[n]) for n in range(rank, len(trees), world)]
        return Step(number, packs, pairs, planned, overlong)

    def rows(self, step: int) -> np.ndarray:  # (pair 2)
        """(set, record) of the pairs of step 0, 1, ...; an epoch's last step may have fewer."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def distinct_rows(self, steps: int) -> np.ndarray:  # (n 2)
        """(set, record) of the pairs of the first `steps` steps, each where it comes first."""
        sizes = [len(data_set) for data_set in self.sets]
        starts = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
        seen, parts = np.zeros(sum(sizes), bool), []
        for epoch in range(-(-steps // self.steps_per_epoch)):  # one sort of all takes 300 MB more
            rows = self.order(epoch)[: (steps - epoch * self.steps_per_epoch) * self.batch_size]
            records, first = np.unique(starts[rows[:, 0]] + rows[:, 1], return_index=True)
            parts.append(rows[np.sort(first[~seen[records]])])
            seen[records] = True
            if seen.all():
                break  # later epochs bring nothing new
        return np.concatenate(parts)

    def plan(self, rows: np.ndarray) -> tuple[list[list[Tree]], list[tuple[str, str]]]:
        """(packs of trees of these pairs, (what was done, name) of each too long record).

        Where all records are dropped there is no pack.
        """
        records = [self.sets[i][int(n)] for i, n in rows]
        trees, rules = zip(*map(self.fit, records))
        overlong = [(rule, record.name) for rule, record in zip(rules, records) if rule]
        kept = grow_bushes(list(filter(None, trees)), self.pairs_per_prompt, self.fits)
        parts = list(map(self.parts, kept))
        packs = first_fit([sum(tree.size for tree in part) for part in parts], self.pack_tokens)
        return [[tree for i in pack for tree in parts[i]] for pack in packs], overlong

    def parts(self, tree: Tree) -> list[Tree]:
        """What stands for the tree in a pack, always together."""
        return [tree] if self.share_prefix else apart(tree)

    def fits(self, tree: Tree) -> bool:
        """Whether prompt and response keep to max_length, and all responses to a pack."""
        size = sum(part.size for part in self.parts(tree))
        return tree.longest <= self.max_length and size <= self.pack_tokens

    def fit(self, record: PairRecord) -> tuple[Tree | None, str]:
        """(the record's tree, which fits, what was done to it: "", dropped, cut or fewer_tiles).

        cut: responses end where the length is reached, without <|im_end|> (the official way); a
        record whose prompt alone is too long, whose responses begin alike up to there, or which
        still is too long for a pack, is dropped.
        """
        tree = encode_tree(record, self.tokenizer, self.config, self.only_chosen)
        if self.fits(tree):
            return tree, ""
        room = self.max_length - len(tree.trunk)
        if self.overlong == "cut" and room > 0:
            tree = replace(tree, responses=[response[:room] for response in tree.responses])
            if tree.responses[1:] != tree.responses[:1] and self.fits(tree):
                return tree, "cut"
        if self.overlong == "fewer_tiles" and record.max_tiles > 1:
            tree, rule = self.fit(replace(record, max_tiles=record.max_tiles // 2))
            return tree, rule or "fewer_tiles"
        return None, "dropped"

    def build(self, trees: list[Tree]) -> Pack:
        return add_tiles(lay_out(trees), self.config.tile_size, self.share_images)


def prefetch(items: Iterable) -> Iterator:
    """The items (none is None), the next one under way in a thread while one is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (ready := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield ready
