"""Tokenizer files of the releases, turned into tokenizers of the package `tokenizers`.

    from_sentencepiece      tokenizer.model of InternLM2: SentencePiece BPE with byte fallback
    from_vocab_and_merges   vocab.json and merges.txt of Qwen2 and Qwen3: byte-level BPE
    from_tokenizer_json     what transformers writes

The names of special tokens are in tokenizer_config.json beside the first two.  sentencepiece and
protobuf are not needed: the file is read by hand, after sentencepiece_model.proto and
sentencepiece's bpe_model.cc.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from runtime import InputError, open_file, read_json

BLANK = "\u2581"  # stands for a space inside SentencePiece's pieces
MARKS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")  # tokens in anybody's text
# how Qwen's byte-level BPE splits a text before it merges (tokenization_qwen2.py)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def named_token(name: str, special: bool) -> AddedToken:
    """A token with a name; to the package, special means that decoding leaves it out."""
    return AddedToken(name, special=special and name not in MARKS, normalized=False)


def added_tokens(folder: Path) -> dict[int, AddedToken]:
    """The tokens that added_tokens_decoder in tokenizer_config.json names, by id."""
    path = folder / "tokenizer_config.json"
    tokens = read_json(path).get("added_tokens_decoder")
    try:
        return {int(id): named_token(t["content"], t["special"]) for id, t in tokens.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: expected added_tokens_decoder {{id: {{content, special}}}}, which names the "
            f"special tokens ({error!r}); copy the file from the checkpoint"
        ) from None


def bpe(
    pieces: dict[int, str], merges: list, added: dict[int, AddedToken], **options: object
) -> Tokenizer:
    """A BPE with its named tokens, each of which is matched before anything merges."""
    # an id has one name: of two, hash order would choose the one that is saved
    names = pieces | {id: token.content for id, token in added.items()}
    vocab = {name: id for id, name in names.items()}
    backend = Tokenizer(models.BPE(vocab, merges, **options))
    backend.add_tokens([added[id] for id in sorted(added)])
    return backend


def from_sentencepiece(path: Path) -> Tokenizer:
    """InternLM2's tokenizer.model; user-defined pieces are matched before anything merges."""
    pieces = read_pieces(path)
    verbatim = {
        id: named_token(piece.text, piece.kind != USER_DEFINED)
        for id, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    texts = {id: piece.text for id, piece in enumerate(pieces)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = bpe(texts, bpe_merges(pieces), verbatim | added_tokens(path.parent), **options)
    backend.normalizer = normalizers.Replace(" ", BLANK)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def from_vocab_and_merges(merges: Path) -> Tokenizer:
    """Qwen's byte-level BPE: merges.txt and the vocab.json beside it."""
    with open_file(merges) as file:
        lines = file.read().decode().split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    pieces = {id: piece for piece, id in read_json(merges.with_name("vocab.json")).items()}
    backend = bpe(pieces, pairs, added_tokens(merges.parent))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def from_tokenizer_json(path: Path) -> Tokenizer:
    data = read_json(path)
    for token in data["added_tokens"]:
        token["special"] &= token["content"] not in MARKS
        # or the package would give it the id behind the vocabulary's last
        data["model"]["vocab"][token["content"]] = token["id"]
    return Tokenizer.from_str(json.dumps(data))


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
