"""Tokenizer files of the releases, turned into what one tokenizer.json would say.

    from_sentencepiece      tokenizer.model of InternLM2: SentencePiece BPE with byte fallback
    from_vocab_and_merges   vocab.json and merges.txt of Qwen2 and Qwen3: byte-level BPE

The names of special tokens are in tokenizer_config.json beside them.  The package `tokenizers` runs
the result.  sentencepiece and protobuf are not needed: the file is read by hand, after
sentencepiece_model.proto and sentencepiece's bpe_model.cc.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runtime import InputError, open_file, read_json

BLANK = "\u2581"  # stands for a space inside SentencePiece's pieces
Added = dict[int, tuple[str, bool]]  # id -> (name, special)


def added_tokens(folder: Path) -> Added:
    """The tokens that added_tokens_decoder in tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    tokens = read_json(path).get("added_tokens_decoder")
    try:
        return {int(id): (token["content"], token["special"]) for id, token in tokens.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: expected added_tokens_decoder {{id: {{content, special}}}}, which names the "
            f"special tokens ({error!r}); copy the file from the checkpoint"
        ) from None


def bpe_data(pieces: dict[int, str], merges: list, added: Added, **parts: Any) -> dict:
    """The content of a tokenizer.json for a BPE; `parts`: its model's and its other settings."""
    names = pieces | {id: name for id, (name, _) in added.items()}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": name, "special": special, **plain}
            for id, (name, special) in sorted(added.items())
        ],
        "post_processor": None,
        **parts,
        "model": {
            "type": "BPE",
            "vocab": {name: id for id, name in names.items()},
            "merges": merges,
            **parts["model"],
        },
    }


def from_sentencepiece(path: Path) -> dict:
    """InternLM2's tokenizer.model; user-defined pieces are matched before anything merges."""
    pieces = read_pieces(path)
    verbatim = {
        id: (piece.text, piece.kind != USER_DEFINED)
        for id, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    return bpe_data(
        {id: piece.text for id, piece in enumerate(pieces)},
        bpe_merges(pieces),
        verbatim | added_tokens(path.parent),
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
    with open_file(merges) as file:
        lines = file.read().decode().split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated"}
    return bpe_data(
        {id: piece for piece, id in read_json(vocab).items()},
        pairs,
        added_tokens(vocab.parent),
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
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """The pieces of a tokenizer.model by id."""
    pieces, number = [], 0
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
        if number < 3:  # settings of trainer (2) and normalizer (3) follow the pieces
            raise ValueError(f"it ends after {len(pieces)} pieces")
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise InputError(
            f"{path}: no SentencePiece model, or a part of one ({error}); copy the file again "
            "(a few lines of text are a Git LFS pointer: git lfs pull)"
        ) from None
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
