"""Tokenizer files of the releases, turned into what one tokenizer.json would say.

    from_sentencepiece      tokenizer.model of InternLM2: SentencePiece BPE with byte fallback
    from_vocab_and_merges   vocab.json and merges.txt of Qwen2 and Qwen3: byte-level BPE

Each with the names in tokenizer_config.json (added_tokens_decoder) and added_tokens.json; the
package `tokenizers` runs the result.  sentencepiece and protobuf are not needed: the file is read
by hand, after sentencepiece_model.proto and sentencepiece's bpe_model.cc.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runtime import InputError, read_json

BLANK = "\u2581"  # stands for a space inside SentencePiece's pieces
LARGEST_ID = 1 << 20  # no vocabulary of the family is as large
# names in Qwen's added_tokens.json, which has no flags, that tokenizer_config.json flags as text
NOT_SPECIAL = (
    "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think> <|fim_prefix|> "
    "<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()
)

Added = dict[int, tuple[str, bool]]  # id -> (name, special)


def added_tokens(folder: Path, known: dict[int, str]) -> Added:
    """The tokens that tokenizer_config.json and added_tokens.json name, at least one of them there.

    Neither may give another name to one of the `known` pieces.
    """
    config, names = folder / "tokenizer_config.json", folder / "added_tokens.json"
    flagged, unflagged = (read_json(file) if file.is_file() else {} for file in (config, names))
    try:
        tokens = [(int(id), name, name not in NOT_SPECIAL) for name, id in unflagged.items()]
        for id, token in flagged.get("added_tokens_decoder", {}).items():
            tokens.append((int(id), token["content"], token["special"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{folder}: expected added_tokens_decoder {{id: {{content, special}}}} in "
            f"{config.name} and {{name: id}} in {names.name}, got {error!r}; copy both from the "
            "checkpoint"
        ) from None
    added, known = {}, dict(known)
    for id, name, special in tokens:
        if known.setdefault(id, name) != name:
            raise InputError(
                f"{folder}: token {id} is {name!r} in one tokenizer file and {known[id]!r} in "
                "another; copy all of them from one checkpoint"
            )
        if not 0 <= id < LARGEST_ID:
            raise InputError(f"{folder}: {name!r} has the id {id}; no vocabulary is as large")
        added[id] = (name, special)
    if not added:
        raise InputError(
            f"{folder}: neither {names.name} nor added_tokens_decoder in {config.name}, so nothing "
            "names the special tokens; copy both from the checkpoint"
        )
    return added


def bpe_data(
    folder: Path, pieces: dict[int, str], merges: list, added: Added, **parts: Any
) -> dict:
    """The content of a tokenizer.json for a BPE; `parts`: its model's and its other settings."""
    names = pieces | {id: name for id, (name, _) in added.items()}
    vocab = {name: id for id, name in names.items()}
    if len(vocab) < len(names):
        twice = next(name for id, name in names.items() if vocab[name] != id)
        raise InputError(f"{folder}: two ids are called {twice!r}; compare added_tokens.json")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": name, "special": special, **plain}
            for id, (name, special) in sorted(added.items())
        ],
        "post_processor": None,
        **parts,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **parts["model"]},
    }


def from_sentencepiece(path: Path) -> dict:
    """InternLM2's tokenizer.model; user-defined pieces are matched before anything merges."""
    pieces = read_pieces(path)
    verbatim = {
        id: (piece.text, piece.kind != USER_DEFINED)
        for id, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    known = {id: p.text for id, p in enumerate(pieces) if p.kind in (NORMAL, BYTE)}
    return bpe_data(
        path.parent,
        {id: piece.text for id, piece in enumerate(pieces)},
        bpe_merges(pieces),
        verbatim | added_tokens(path.parent, known),
        model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    )


# how Qwen's byte-level BPE splits a text before it merges (tokenization_qwen2.py)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_vocab_and_merges(vocab: Path, merges: Path) -> dict:
    """Qwen's byte-level BPE."""
    ids = read_json(vocab)
    pieces = {id: piece for piece, id in ids.items() if type(id) is int and 0 <= id < LARGEST_ID}
    if len(pieces) < len(ids):
        raise InputError(f"{vocab}: expected {{piece: id}}, ids from 0, each once; copy it again")
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated"}
    return bpe_data(
        vocab.parent,
        pieces,
        pairs,
        added_tokens(vocab.parent, pieces),
        model={},
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        decoder=byte_level | {"use_regex": True},
    )


# --------------------------------------------------------------------------- tokenizer.model

# sentencepiece_model.proto: ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """The pieces of a tokenizer.model by id; an error if it needs more than this file does."""
    pieces, trainer, normalizer = [], None, None
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise InputError(
            f"{path}: no SentencePiece model, or a part of one ({error}); copy the file again "
            "(a few lines of text are a Git LFS pointer: git lfs pull)"
        ) from None
    if trainer is None or normalizer is None:  # these follow the pieces
        raise InputError(
            f"{path}: ends after {len(pieces)} pieces, without the trainer and normalizer settings "
            "behind them; copy the file again"
        )
    settings = {  # name: (value or the proto's default, what InternLM2 has)
        "model_type": (trainer.get(3, 1), 2),  # BPE
        "byte_fallback": (trainer.get(35, 0), 1),
        "precompiled_charsmap": (normalizer.get(2, b""), b""),
        "add_dummy_prefix": (normalizer.get(3, 1), 0),
        "remove_extra_whitespaces": (normalizer.get(4, 1), 0),
        "escape_whitespaces": (normalizer.get(5, 1), 1),
        "pieces of type UNUSED": (sum(piece.kind == UNUSED for piece in pieces), 0),
    }
    for name, (value, needed) in settings.items():
        if value != needed:
            raise InputError(
                f"{path}: {name} is {value!r:.40}, InternLM2 has {needed!r}; only SentencePiece "
                "models with InternLM2's settings are read here"
            )
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: a varint as int, anything else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 2, 5):
            size, at = _varint(message, at) if wire == 2 else (8 if wire == 1 else 4, at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError(f"{at - len(message)} bytes are missing")
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it): 7 bits a byte, low bits first, the top bit says "more"."""
    value = shift = 0
    while (byte := message[at]) & 0x80:
        if shift > 63:
            raise ValueError(f"no varint at byte {at}")
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def bpe_merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to put an ordinary piece together from two, the best piece first.

    SentencePiece has no merge list: it joins whichever neighbours make the piece of highest score.
    """
    normal = {piece.text: id for id, piece in enumerate(pieces) if piece.kind == NORMAL}
    ranked = []
    for text, id in normal.items():
        for cut in range(1, len(text)):
            if (left := text[:cut]) in normal and (right := text[cut:]) in normal:
                ranked.append((-pieces[id].score, id, normal[left], normal[right], left, right))
    return [merge[-2:] for merge in sorted(ranked)]
