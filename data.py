"""Preference records from disk to packed trees on the device.

    read_meta      MMPR's meta.json -> data sets with repeat_time, tile limits, JPEG augmentation
    PairData       deterministic order of pairs; the packs of any step, so resuming needs no state
    Tree           prompt (trunk) + responses (branches) of one question, as token ids
    Pack           several trees laid one after another in ONE flat sequence, no padding

`tools/look.py` checks and shows what is read here.

Formats: the MMPR release (`meta.json` + jsonl).  Differs from the official loader: the image is
encoded once per tree and not four times, a bad record stops the run instead of being replaced by
a random one, nothing is truncated, image paths cannot leave their root.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import InternVLConfig
from runtime import InputError, parse_json_line
from tokenizer import (
    Tokenizer,
    encode_chat,
    encode_response,
    with_image_placeholders,
)
from vision import cut_tiles, normalize, num_tiles

MAX_PIXELS = 200_000_000  # an image bomb is refused before it is decoded
MAX_BYTES = 500_000_000


# --------------------------------------------------------------------------- images


def resolve_image(root: Path, relative: str) -> Path:
    """root/relative; absolute paths and whatever resolves outside root (links too) are refused."""
    if not isinstance(relative, str) or not relative:
        raise InputError(f"image path must be a non-empty text, got {relative!r}")
    if relative.startswith(("s3://", "http://", "https://")) or Path(relative).is_absolute():
        raise InputError(f"image {relative!r}: give a path relative to root {root}")
    path = Path(root) / relative
    if not path.resolve().is_relative_to(resolved(Path(root).absolute())):
        raise InputError(f"image {relative!r} leaves its root {root}")
    return path


def image_names(record: dict, name: str) -> list[str]:
    """Image paths of a record; absent, "" and [] all mean text only.  `name` is for errors."""
    if record.get("video") or record.get("clip"):
        raise InputError(f"{name}: video records are not supported; remove them")
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise InputError(f"{name}: 'image' must be a path or a list of paths")
    return images


def image_paths(root: Path, images: list[str], name: str) -> tuple[Path, ...]:
    """Paths of images under `root`, each of which must exist."""
    try:
        paths = tuple(resolve_image(root, image) for image in images)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    for path in paths:
        if not path.is_file():
            raise InputError(f"{name}: no image {path}")
    return paths


@lru_cache(maxsize=64)
def resolved(root: Path) -> Path:
    """The folder without links, looked up once: it is asked for with every image."""
    return root.resolve()


def open_image(path: Path) -> Image.Image:
    """The image with its size known but not yet decoded; limits on bytes and pixels."""
    if not path.is_file():
        raise InputError(f"no image {path}")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"image {path} has more than {MAX_BYTES} bytes")
    try:
        image = Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"image {path} has more than {MAX_PIXELS} pixels")
    return image


def load_image(path: Path) -> Image.Image:
    """The decoded RGB image; a broken or cut-off file is an InputError that names it."""
    with open_image(path) as image:
        try:
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise InputError(f"image {path} cannot be decoded: {error}") from None


def jpeg(tile: Image.Image, quality: int) -> Image.Image:
    """The tile after a round through JPEG (the official `data_augment`)."""
    buffer = io.BytesIO()
    tile.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


# --------------------------------------------------------------------------- records


@dataclass(frozen=True)
class PairRecord:
    """One preference pair as it stands in a jsonl file."""

    where: str  # "set name, file line N": for errors and the run record
    question: str
    chosen: str
    rejected: str
    images: tuple[Path, ...]
    max_tiles: int
    augment: bool


class JsonLines:
    """The objects of a jsonl file, each read when it is asked for; empty lines do not count."""

    def __init__(self, path: Path, part: bool = False) -> None:
        """part: written by a process that may be killed; a torn last line is left out."""
        self.path, self.file = Path(path), open(path, "rb")  # noqa: SIM115  (read from any time)
        starts, numbers, position = [], [], 0
        for number, line in enumerate(self.file, 1):
            if part and not line.endswith(b"\n"):
                break
            if line.strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)
        self.starts, self.numbers = np.array([*starts, position]), np.array(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, n: int) -> dict:
        start, end = int(self.starts[n]), int(self.starts[n + 1])
        line = os.pread(self.file.fileno(), end - start, start)  # threads share the file
        return parse_json_line(self.path, int(self.numbers[n]), line)

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        """("file line N", object) of each line."""
        return ((self.name(n), self[n]) for n in range(len(self)))

    def name(self, n: int) -> str:
        return f"{self.path} line {self.numbers[n]}"


@dataclass(frozen=True)
class DataSet:
    """One entry of meta.json."""

    name: str
    root: Path
    lines: JsonLines
    repeat_time: Fraction
    max_tiles: int
    augment: bool

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> PairRecord:
        return self.parse(self.lines[number], f"{self.name}, {self.lines.name(number)}")

    def parse(self, raw: dict, where: str) -> PairRecord:
        """Check one record.  Raises InputError naming set, file, line and key."""
        for key in ("question", "chosen", "rejected"):
            if not isinstance(raw.get(key), str):
                raise InputError(f"{where}: no text {key!r}")
            if not raw[key].strip():
                raise InputError(f"{where}: {key} is empty")
        names = image_names(raw, where)
        try:
            images = tuple(resolve_image(self.root, name) for name in names)
            question = raw["question"]
            if images:  # in a text-only question <image> is plain text
                question = with_image_placeholders(question, len(images))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return PairRecord(
            where,
            question,
            raw["chosen"],
            raw["rejected"],
            images,
            max(1, self.max_tiles // max(1, len(images))),
            self.augment,
        )


def read_meta(path: Path, max_tiles: int) -> list[DataSet]:
    """meta.json -> data sets.  `max_tiles` holds where an entry has no max_dynamic_patch."""
    try:
        meta = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"no {path}; expected MMPR's meta.json (see README)") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(meta, dict) or not meta:
        raise InputError(f"{path}: expected one object of data set name -> entry")
    return [_data_set(Path(path), name, entry, max_tiles) for name, entry in meta.items()]


def _data_set(meta: Path, name: str, entry: dict, max_tiles: int) -> DataSet:
    where = f"{meta}: {name}"
    for key in ("annotation", "repeat_time"):
        if key not in entry:
            raise InputError(f"{where}: no {key!r}")
    annotation = _beside(meta, entry["annotation"])
    if annotation.suffix != ".jsonl":
        raise InputError(f"{where}: annotation {annotation} must end in .jsonl")
    if not annotation.is_file():
        raise InputError(f"{where}: no annotation file {annotation}")
    try:
        repeat = Fraction(str(entry["repeat_time"]))  # exact: 0.07 * 100 is 7
    except ValueError:
        raise InputError(f"{where}: repeat_time must be a number") from None
    if repeat < 0:
        raise InputError(f"{where}: repeat_time is {repeat}; it must be >= 0")
    tiles = entry.get("max_dynamic_patch", max_tiles)
    if not isinstance(tiles, int) or tiles < 1:
        raise InputError(f"{where}: max_dynamic_patch must be a whole number >= 1, got {tiles!r}")
    lines = JsonLines(annotation)
    if "length" in entry and entry["length"] != len(lines):
        raise InputError(f"{where}: length says {entry['length']}, {annotation} has {len(lines)}")
    augment = bool(entry.get("data_augment", False))
    root = _beside(meta, entry.get("root", ""))
    return DataSet(name, root, lines, repeat, tiles, augment)


def _beside(meta: Path, path: str) -> Path:
    """A path of meta.json: beside it, else as it stands (officially: from the working folder)."""
    beside = meta.parent / path
    return Path(path) if path and not beside.exists() and Path(path).exists() else beside


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
    rows = []
    for i, data_set in enumerate(sets):
        whole, part = divmod(data_set.repeat_time, 1)
        n = len(data_set)
        drawn = seeded(seed, data_set.name, epoch).permutation(n)[: int(part * n)]
        records = np.concatenate([np.tile(np.arange(n), int(whole)), np.sort(drawn)])
        rows.append(np.stack([np.full(len(records), i), records], axis=1))
    rows = np.concatenate(rows).astype(np.int64)
    return rows[seeded(seed, "order", epoch).permutation(len(rows))]


# --------------------------------------------------------------------------- trees


@dataclass
class Tree:
    """One question as token ids: the trunk, and responses that branch off where it ends."""

    trunk: list[int]  # <s> system, image, question, <|im_start|>assistant\n
    responses: list[list[int]]  # each with its closing <|im_end|>
    chosen: list[int]  # (pair) index into responses
    rejected: list[int]  # (pair) index into responses; empty: no rejected ones
    images: list[tuple[Path, int, bool]]  # (file, tile limit, JPEG augmentation)
    tiles: list[int]  # (image) tile counts, thumbnails included
    where: list[str]  # (pair)

    @property
    def size(self) -> int:
        """Tokens in a pack."""
        return len(self.trunk) + sum(map(len, self.responses))

    @property
    def size_apart(self) -> int:
        """Tokens in a pack when every response gets a trunk of its own."""
        return self.size + len(self.trunk) * (len(self.responses) - 1)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest response: what the length limit is about."""
        return len(self.trunk) + max(map(len, self.responses))


def encode_tree(
    record: PairRecord,
    tokenizer: Tokenizer,
    config: InternVLConfig,
    max_tiles: int | None = None,
    only_chosen: bool = False,
) -> Tree:
    """Token ids of one record; reads image sizes, not pixels.  Errors name the record."""
    limit = max_tiles or record.max_tiles
    try:
        tiles = []
        for path in record.images:
            with open_image(path) as image:
                tiles.append(num_tiles(*image.size, limit, config.tile_size))
        trunk = encode_chat(
            tokenizer,
            config.template,
            [(record.question, None)],
            [config.tokens_per_tile * n for n in tiles],
            config.system_message,
        )
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None
    texts = [record.chosen] if only_chosen else [record.chosen, record.rejected]
    return Tree(
        trunk,
        [encode_response(tokenizer, config.template, text) for text in texts],
        [0],
        [] if only_chosen else [1],
        [(path, limit, record.augment) for path in record.images],
        tiles,
        [record.where],
    )


def same_question(a: Tree, b: Tree) -> bool:
    return a.trunk == b.trunk and a.images == b.images


def merge(a: Tree, b: Tree) -> Tree:
    """Two trees of one question as one bush; a response that both have is there once."""
    responses = list(a.responses)
    place = []
    for response in b.responses:
        if response not in responses:
            responses.append(response)
        place.append(responses.index(response))
    return Tree(
        a.trunk,
        responses,
        a.chosen + [place[i] for i in b.chosen],
        a.rejected + [place[i] for i in b.rejected],
        a.images,
        a.tiles,
        a.where + b.where,
    )


def grow_bushes(trees: list[Tree], pairs: int, budget: int) -> list[Tree]:
    """Neighbours of one question merged, up to `pairs` pairs and `budget` tokens a bush."""
    bushes: list[Tree] = []
    for tree in trees:
        if bushes and len(bushes[-1].where) < pairs and same_question(bushes[-1], tree):
            merged = merge(bushes[-1], tree)
            if merged.size <= budget:
                bushes[-1] = merged
                continue
        bushes.append(tree)
    return bushes


def gather_questions(rows: np.ndarray, questions: list[object], pairs: int) -> np.ndarray:
    """`rows` (n 2) reordered: up to `pairs` rows of a question stand where its first one stood."""
    groups: list[list[int]] = []
    open_group: dict[object, list[int]] = {}
    for n, question in enumerate(questions):
        group = open_group.get(question)
        if group is None or len(group) == pairs:
            group = open_group[question] = []
            groups.append(group)
        group.append(n)
    return rows[[n for group in groups for n in group]]


# --------------------------------------------------------------------------- packs


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
    rejected: Tensor  # (pair) response index; empty without rejected responses
    num_responses: int
    tiles: Tensor | None = None  # (tile 3 h w) distinct images, once each
    tile_order: Tensor | None = None  # (slot group) index into tiles
    where: list[str] = field(default_factory=list)  # (pair)
    keys: list[str] = field(default_factory=list)  # (response) what its log-prob depends on

    def to(self, device: torch.device) -> "Pack":
        moved = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in vars(self).items()
        }
        return Pack(**moved)


def lay_out(trees: list[Tree], share_prefix: bool = True) -> Pack:
    """The token side of a pack; `add_tiles` brings the pixels.

    With share_prefix=False every response stands in a tree of its own, after a copy of the trunk.
    """
    ids, positions, tree, branch, predictor, target, owner = [], [], [], [], [], [], []
    chosen, rejected, responses, number = [], [], 0, 0
    for t in trees:
        chosen += [responses + i for i in t.chosen]
        rejected += [responses + i for i in t.rejected]
        for group in [t.responses] if share_prefix else [[r] for r in t.responses]:
            start = len(ids)
            end = start + len(t.trunk) - 1  # the trunk's last token predicts every branch's first
            ids += t.trunk
            positions += range(len(t.trunk))
            branch += [0] * len(t.trunk)
            for i, response in enumerate(group):
                first, length = len(ids), len(response)
                predictor += [end, *range(first, first + length - 1)]
                target += response
                owner += [responses + i] * length
                ids += response
                positions += range(len(t.trunk), len(t.trunk) + length)
                branch += [i + 1] * length
            responses += len(group)
            tree += [number] * (len(ids) - start)
            number += 1
    as_tensor = torch.tensor
    return Pack(
        as_tensor(ids)[None],
        as_tensor(positions)[None],
        as_tensor(tree),
        as_tensor(branch),
        as_tensor(predictor),
        as_tensor(target),
        as_tensor(owner),
        as_tensor(chosen, dtype=torch.long),
        as_tensor(rejected, dtype=torch.long),
        responses,
        where=[where for t in trees for where in t.where],
    )


def response_keys(tree: Tree) -> list[str]:
    """What each response's log-prob depends on besides the weights: ids, and image files."""
    trunk = hashlib.blake2b(np.array(tree.trunk).tobytes(), digest_size=16)
    for (path, limit, augment), tiles in zip(tree.images, tree.tiles):
        trunk.update(repr((path.name, path.stat().st_size, limit, tiles, augment)).encode())
    keys = []
    for response in tree.responses:
        h = trunk.copy()
        h.update(np.array(response).tobytes())
        keys.append(h.hexdigest())
    return keys


def add_tiles(
    pack: Pack, trees: list[Tree], tile_size: int, share: bool = True, share_prefix: bool = True
) -> Pack:
    """Decode each distinct image of the pack once (with share=False: wherever it stands)."""
    first_tile: dict[tuple, int] = {}
    parts, order, count = [], [], 0
    for image, tiles, place in images_of(trees, share_prefix):
        key = image if share else place
        if key not in first_tile:
            first_tile[key] = count
            parts.append(image_tiles(*image, tile_size))
            count += tiles
            assert len(parts[-1]) == tiles, (image, len(parts[-1]), tiles)
        order += range(first_tile[key], first_tile[key] + tiles)
    if parts:
        pack.tiles, pack.tile_order = torch.cat(parts), torch.tensor(order)
    return pack


def images_of(trees: list[Tree], share_prefix: bool = True) -> Iterator[tuple[tuple, int, tuple]]:
    """(image, its tiles, its place) in the order of the prompts as `lay_out` writes them."""
    for number, t in enumerate(trees):
        for copy in range(1 if share_prefix else len(t.responses)):
            for slot, (image, tiles) in enumerate(zip(t.images, t.tiles)):
                yield image, tiles, (number, copy, slot)


def image_tiles(path: Path, max_tiles: int, augment: bool, tile_size: int) -> Tensor:
    """(tile 3 h w) of one file; augmentation is a function of the file's name, not of the epoch.

    So cached reference log-probs see the very pixels that the policy sees.
    """
    tiles = cut_tiles(load_image(path), max_tiles, tile_size)
    if augment:
        qualities = seeded("jpeg", path.name).integers(75, 101, len(tiles))
        tiles = [jpeg(tile, int(q)) for tile, q in zip(tiles, qualities)]
    return normalize(tiles)


def first_fit(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that no group's sizes exceed the budget: each into the first that fits."""
    packs: list[list[int]] = []
    room: list[int] = []
    for i, size in enumerate(sizes):
        if size > budget:
            raise InputError(
                f"a record of {size} tokens does not fit --pack_tokens {budget}; raise it to at "
                f"least {max(sizes)}"
            )
        fit = next((p for p, left in enumerate(room) if left >= size), None)
        if fit is None:
            packs.append([i])
            room.append(budget - size)
        else:
            packs[fit].append(i)
            room[fit] -= size
    return packs


# --------------------------------------------------------------------------- the steps of a run


class PairData:
    """Which pairs step t trains on, as packs.  A function of (files, seed, t): no state to save.

    Every process plans every step alike and then builds only its own packs, so the packs do not
    depend on the number of processes.
    """

    def __init__(
        self,
        sets: list[DataSet],
        tokenizer: Tokenizer,
        config: InternVLConfig,
        *,
        batch_size: int,
        pack_tokens: int,
        max_length: int,
        seed: int,
        overlong: Literal["drop", "fewer_tiles", "error"] = "drop",
        only_chosen: bool = False,
        share_images: bool = True,
        share_prefix: bool = True,
        pairs_per_prompt: int = 1,
        limit: int = 0,
    ) -> None:
        self.sets, self.tokenizer, self.config = sets, tokenizer, config
        self.batch_size, self.pack_tokens, self.seed = batch_size, pack_tokens, seed
        self.max_length = min(max_length, config.llm.max_position_embeddings)
        self.overlong, self.only_chosen, self.share_images = overlong, only_chosen, share_images
        self.share_prefix, self.pairs_per_prompt = share_prefix, pairs_per_prompt
        self.limit = limit
        self.orders: dict[int, np.ndarray] = {}
        self.steps_per_epoch = -(-len(self.order(0)) // batch_size)
        if not self.steps_per_epoch:
            raise InputError("no records: every data set is empty or has repeat_time 0")

    def order(self, epoch: int) -> np.ndarray:
        if epoch not in self.orders:
            order = epoch_order(self.sets, self.seed, epoch)
            order = order[: self.limit] if self.limit else order
            if self.pairs_per_prompt > 1:  # reads every record once an epoch
                found = [self.sets[i][int(n)] for i, n in order]
                questions = [(r.images, r.question, r.max_tiles, r.augment) for r in found]
                order = gather_questions(order, questions, self.pairs_per_prompt)
            self.orders = {epoch: order}
        return self.orders[epoch]

    def digest(self, steps: int) -> str:
        """Of all that decides which responses the first `steps` steps hold, but for image files."""
        digest = hashlib.blake2b(digest_size=16)
        facts = (steps, self.batch_size, self.seed, self.limit, self.max_length, self.overlong)
        digest.update(repr((*facts, self.pairs_per_prompt, self.config)).encode())
        for of in self.sets:
            facts = (of.name, of.root, of.repeat_time, of.max_tiles, of.augment)
            digest.update(repr(facts).encode())
            with open(of.lines.path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

    def records(self, step: int) -> list[PairRecord]:
        """The records of step 0, 1, 2, ...; the last step of an epoch may have fewer."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        rows = self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [self.sets[i][int(n)] for i, n in rows]

    def fitted_tree(self, record: PairRecord) -> Tree | None:
        """The record's tree; None if it is too long and `overlong` says to drop such."""
        tree = encode_tree(record, self.tokenizer, self.config, None, self.only_chosen)
        limit = record.max_tiles
        while self.overlong == "fewer_tiles" and tree.longest > self.max_length and limit > 1:
            limit //= 2
            tree = encode_tree(record, self.tokenizer, self.config, limit, self.only_chosen)
        if tree.longest <= self.max_length:
            return tree
        if self.overlong == "drop":
            return None
        raise InputError(
            f"{record.where}: {tree.longest} tokens, more than max_length {self.max_length}; "
            "shorten it, lower the tile limit, or pass --overlong drop or fewer_tiles"
        )

    def plan(self, step: int) -> tuple[list[list[Tree]], list[str]]:
        """(packs of trees of the step, names of the records dropped as too long)."""
        records = self.records(step)
        trees = [self.fitted_tree(record) for record in records]
        dropped = [record.where for record, tree in zip(records, trees) if tree is None]
        kept = [tree for tree in trees if tree is not None]
        if self.pairs_per_prompt > 1:
            kept = grow_bushes(kept, self.pairs_per_prompt, self.pack_tokens)
        sizes = [tree.size if self.share_prefix else tree.size_apart for tree in kept]
        packs = first_fit(sizes, self.pack_tokens)
        return [[kept[i] for i in pack] for pack in packs], dropped

    def build(self, trees: list[Tree]) -> Pack:
        pack = lay_out(trees, self.share_prefix)
        pack.keys = [key for t in trees for key in response_keys(t)]
        size = self.config.tile_size
        return add_tiles(pack, trees, size, self.share_images, self.share_prefix)


def prefetch(make: Callable[[int], Any], numbers: range) -> Iterator[Any]:
    """make(n) for each n in order, the next one under way in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, numbers[0]) if numbers else None
        for n in numbers:
            ready = coming.result()
            if n + 1 in numbers:
                coming = pool.submit(make, n + 1)
            yield ready
