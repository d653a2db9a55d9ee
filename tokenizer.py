"""Tokenizers of the InternVL family and their chat format: text -> ids -> text, prompts.

    load_tokenizer      InternLM2's tokenizer.model, Qwen's vocab.json and merges.txt, or a
                        tokenizer.json -> Tokenizer
    Tokenizer           encode (special tokens recognised), encode_plain (never), decode
    StreamDecoder       the same text as decode, piece by piece
    encode_chat         prompt ids, from the system message to the open assistant turn
    encode_response     ids of one response with its <|im_end|>: the labels behind such a prompt

Sources: tokenization_internlm2.py (the slow class), sentencepiece's bpe_model.cc and
sentencepiece_model.proto, transformers' tokenization_qwen2.py; conversation.py and
modeling_internvl_chat.py (chat) for prompts, internvl/train/dataset.py (preprocess_internlm,
preprocess_mpt, preprocess_internvl2_5) for labels.  Every kind of file is turned into what a
tokenizer.json would say; `tokenizers` runs its BPE.  No sentencepiece or protobuf is needed.

Tokens with names are of three kinds.  Special ones (<s>, <|im_end|>, <img>, <IMG_CONTEXT> ...)
enter prompts by id alone; their names in anybody's text are plain text, so no text can forge a turn
or an image.  Grounding marks (<ref>, <box>, <quad> and their ends) are tokens in every text, as
officially; decode leaves them out, as InternLM2's official one does, unless asked to keep them.
Tokens that a release flags special=false (Qwen's <think>, <tool_call> ...) are text.

A prompt is built of segments, <|im_start|> "user\\n{text}" <|im_end|>, each encoded by itself, so
image slots need no counting afterwards.  `user\\n` and the text are one segment, as BPE merges
across that border (two line breaks are one piece).  `assistant\\n` and the response are two: where
generation starts, so that a response has the same ids whether the model writes it or it is read.

Differs from the official code:
- a raw [UNUSED_TOKEN_145] is plain text (officially it becomes <|im_end|>);
- a response that opens with a line break does not merge into `assistant\\n`;
- as many <image> as images, else an error; an <image> in an assistant text, or in a conversation
  without images, is plain text;
- nothing is truncated or padded; NUL is piece 354, as in sentencepiece 0.2.0 (0.2.3: byte token 3).
"""

import codecs
import json
import operator
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from runtime import InputError, read_json

IMAGE = "<image>"  # the placeholder in texts; not a token
MARKS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
# what InternVL's prompts are made of
CHAT_NAMES = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
BLANK = "\u2581"  # stands for a space inside SentencePiece's pieces
LARGEST_ID = 1 << 20  # no vocabulary of the family is as large

# what tokenizer_config.json calls ids of InternLM2's tokenizer.model, and adds behind it
INTERNLM2_PIECES = 92544
INTERNLM2_NAMES = dict(
    enumerate(
        "<|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|> <|im_start|> "
        "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split(),
        start=92538,
    )
)
# names in Qwen's added_tokens.json, which has no flags, that tokenizer_config.json flags as text
NOT_SPECIAL = (
    "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think> <|fim_prefix|> "
    "<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()
)

# PreTrainedTokenizerBase.clean_up_tokenization, in its order; InternLM2Tokenizer always calls it
CLEAN_UP = [
    *[(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")],
    *[(" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")],
]

# --------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """What load_tokenizer returns.  Ids are plain ints; bos is never added here."""

    def __init__(self, data: dict, source: Path) -> None:
        """`data`: the content of a tokenizer.json; `source`: the file to name in errors."""
        self.source = source
        try:
            added = {token["content"]: token for token in data["added_tokens"]}
            flagged = {name: token["id"] for name, token in added.items() if token["special"]}
            tokens = [t | {"special": t["special"] and n not in MARKS} for n, t in added.items()]
            text = json.dumps(data | {"added_tokens": tokens})
            self.backend = tokenizers.Tokenizer.from_str(text)
            front = json.dumps([data["normalizer"], data["pre_tokenizer"]])
            decoder, model = json.dumps(data["decoder"]), data["model"]
        except Exception as error:  # what `tokenizers` raises has no narrower type
            raise InputError(f"{source}: not a tokenizer file of `tokenizers` ({error})") from error
        if re.search(
            r'"Prepend"|"prepend_scheme": "(always|first)"|"add_prefix_space": true', front
        ):
            raise InputError(
                f"{source}: puts a blank before every text, as no InternVL does, so prompts could "
                "not be built of segments; turn add_prefix_space (prepend_scheme) off"
            )
        self.backend.encode_special_tokens = True  # that is: as plain text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.marks = {name: id for name, id in flagged.items() if name in MARKS}
        self.special = {name: id for name, id in flagged.items() if name not in MARKS}
        self.special_ids = frozenset(self.special.values())
        self._never_plain = self.special_ids - {self.special.get("<unk>")}  # words stay unknown
        names = sorted(flagged, key=len, reverse=True)  # at one place the longest name wins
        self._split_special = re.compile("(" + "|".join(map(re.escape, names)) + ")").split

        vocab = self.backend.get_vocab(with_added_tokens=True)
        self.is_sentencepiece = bool(model.get("byte_fallback"))
        if self.is_sentencepiece:
            as_bytes = sentencepiece_bytes
        elif "ByteLevel" in decoder:
            as_bytes = byte_level_bytes
        elif '"Fuse"' in decoder:
            as_bytes = str.encode
        else:
            raise InputError(f"{source}: its decoder, {decoder:.60}, is not implemented")
        self.pieces = {id: as_bytes(piece) for piece, id in vocab.items()}
        self.vocab_size = 1 + max(self.pieces)
        if not self.is_sentencepiece:
            self.pieces |= {token["id"]: name.encode() for name, token in added.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the names of special tokens in it recognised.  For trusted text only."""
        ids = []
        for i, part in enumerate(self._split_special(text) if self.special else [text]):
            ids += [self.token_id(part)] if i % 2 else self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as it stands: `<|im_end|>` in it is ten characters, `<ref>` is a token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text has half a character at {error.start} (lone surrogate "
                f"{text[error.start]!a}): repair the file it comes from"
            ) from None
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not self._never_plain.isdisjoint(ids):
            raise InputError(
                f"{self.source}: its model makes a special token out of plain text {text[:40]!r}; "
                "let its pre_tokenizer split the names of special tokens"
            )
        return ids

    def decode(self, ids: Iterable[int], marks: bool = False) -> str:
        """Text of `ids` without special tokens, nothing stripped; `marks`: with grounding marks.

        An id that no token has becomes U+FFFD.  With tokenizer.model the official clean-up
        (`a , b` -> `a, b`) is applied: the class does so, whatever tokenizer_config.json says.
        """
        stream = StreamDecoder(self, marks)
        return stream.push(*ids) + stream.flush()

    def token_id(self, name: str) -> int:
        """Id of the token called `name`."""
        id = (self.special | self.marks).get(name, self.backend.token_to_id(name))
        if id is None:
            raise InputError(f"{self.source}: no token {name!r}; is this an InternVL tokenizer?")
        return id

    @property
    def bos_id(self) -> int | None:
        """`<s>`, which opens InternLM2's prompts; Qwen's have none."""
        return self.special.get("<s>")

    @property
    def pad_id(self) -> int:
        """What other programs pad with: InternLM2's `</s>`, Qwen's `<|endoftext|>`."""
        return self.token_id("<|endoftext|>" if self.bos_id is None else "</s>")

    @property
    def im_end_id(self) -> int:
        """The one id that ends an answer."""
        return self.token_id("<|im_end|>")

    @property
    def image_context_id(self) -> int:
        return self.token_id("<IMG_CONTEXT>")

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError unless the model has a row for each id that a text or a prompt can hold.

        A special token beyond them that no prompt needs is allowed (<video> of InternVL3-hf).
        """
        needed = {self.token_id(name) for name in CHAT_NAMES} | self.pieces.keys()
        largest = max(needed - self.special_ids.difference(map(self.token_id, CHAT_NAMES)))
        if largest >= vocab_size:
            raise InputError(
                f"{self.source}: has tokens up to id {largest}, but the model's vocab_size is "
                f"{vocab_size}; take tokenizer and config.json from one checkpoint"
            )

    def banned_ids(self, vocab_size: int) -> list[int]:
        """Rows of the head not to be chosen: special tokens but <|im_end|>, ids without a token."""
        self.check_vocabulary(vocab_size)
        allowed = self.pieces.keys() - self.special_ids | {self.im_end_id}
        return [id for id in range(vocab_size) if id not in allowed]


def sentencepiece_bytes(piece: str) -> bytes:
    """`<0x0A>` -> the byte; any other piece -> its text."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(BLANK, " ").encode()


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
# GPT-2's table: the code of the character that stands for each byte in a piece -> the byte
BYTE_LEVEL = dict(zip(PRINTABLE, PRINTABLE)) | {256 + n: byte for n, byte in enumerate(OTHERS)}


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece of byte-level BPE; of any other name, its text."""
    try:
        return piece.translate(BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


class StreamDecoder:
    """Text as its ids arrive: all pushes and the flush together equal Tokenizer.decode(ids).

    Held back: the first bytes of an unfinished character, and what clean-up may still change.
    """

    def __init__(self, tokenizer: Tokenizer, marks: bool = False) -> None:
        self.tokenizer = tokenizer
        self.hidden = tokenizer.special_ids.union(() if marks else tokenizer.marks.values())
        self.rules = CLEAN_UP if tokenizer.is_sentencepiece else []
        self.held = [""] * len(self.rules)  # by each rule: the start of what may be its pattern
        errors = "surrogateescape" if tokenizer.is_sentencepiece else "replace"
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, *ids: int) -> str:
        """The text that is certain with `ids`; often one character late, empty for a special."""
        ids = [operator.index(id) for id in ids]
        if min(ids, default=0) < 0:
            raise InputError(f"{self.tokenizer.source}: no token has the id {min(ids)}")
        pieces, unknown = self.tokenizer.pieces, "\ufffd".encode()
        shown = b"".join(pieces.get(id, unknown) for id in ids if id not in self.hidden)
        return self._clean_up(self.utf8.decode(shown))

    def flush(self) -> str:
        """What was held back; call it once, at the end."""
        return self._clean_up(self.utf8.decode(b"", final=True), final=True)

    def _clean_up(self, text: str, final: bool = False) -> str:
        """`text` through every rule in turn, each an online str.replace."""
        # sentencepiece shows one U+FFFD for each invalid byte, not one for a run of them
        text = re.sub("[\udc80-\udcff]", "\ufffd", text)
        for i, (pattern, replacement) in enumerate(self.rules):
            *done, rest = (self.held[i] + text).split(pattern)
            starts = (pattern[:n] for n in range(len(pattern) - 1, 0, -1))
            self.held[i] = "" if final else next(filter(rest.endswith, starts), "")
            text = replacement.join([*done, rest[: len(rest) - len(self.held[i])]])
        return text


# --------------------------------------------------------------------------- tokenizer files


def load_tokenizer(model_dir: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder: InternLM2's files, Qwen's, or else tokenizer.json."""
    model, vocab, merges, data = (
        Path(model_dir) / name
        for name in ("tokenizer.model", "vocab.json", "merges.txt", "tokenizer.json")
    )
    if model.is_file():
        return Tokenizer(_from_sentencepiece(model), model)
    if vocab.is_file() and merges.is_file():
        return Tokenizer(_from_vocab_and_merges(vocab, merges), vocab)
    if data.is_file():
        return Tokenizer(read_json(data), data)
    if vocab.is_file():
        raise InputError(f"{vocab} without merges.txt; copy merges.txt from the checkpoint")
    raise InputError(
        f"no tokenizer.model, vocab.json or tokenizer.json in {model_dir}: copy the tokenizer's "
        "files from the released checkpoint, with added_tokens.json and tokenizer_config.json"
    )


Added = dict[int, tuple[str, bool]]  # id -> (name, special)


def _added_tokens(folder: Path, known: dict[int, str], defaults: Added) -> Added:
    """The tokens that tokenizer_config.json and added_tokens.json name, at least one of them there.

    known: pieces that keep their names.  defaults: for files without <|im_end|>.
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
    added: Added = {} if "<|im_end|>" in [name for _, name, _ in tokens] else dict(defaults)
    known = known | {id: name for id, (name, _) in added.items()}
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


def _bpe(folder: Path, pieces: dict[int, str], merges: list, added: Added, **parts: Any) -> dict:
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


def _from_sentencepiece(path: Path) -> dict:
    pieces = read_pieces(path)
    verbatim = {
        id: (piece.text, piece.kind != USER_DEFINED)
        for id, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    known = {id: p.text for id, p in enumerate(pieces) if p.kind in (NORMAL, BYTE)}
    names = INTERNLM2_NAMES if len(pieces) == INTERNLM2_PIECES else {}
    blank = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}]
    return _bpe(
        path.parent,
        {id: piece.text for id, piece in enumerate(pieces)},
        bpe_merges(pieces),
        verbatim | _added_tokens(path.parent, known, {id: (n, True) for id, n in names.items()}),
        model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [*blank, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
    )


# how Qwen's byte-level BPE splits a text before it merges (tokenization_qwen2.py)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _from_vocab_and_merges(vocab: Path, merges: Path) -> dict:
    ids = read_json(vocab)
    pieces = {id: piece for piece, id in ids.items() if type(id) is int and 0 <= id < LARGEST_ID}
    if len(pieces) < len(ids):
        raise InputError(f"{vocab}: expected {{piece: id}}, ids from 0, each once; copy it again")
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated"}
    return _bpe(
        vocab.parent,
        pieces,
        pairs,
        _added_tokens(vocab.parent, pieces, {}),
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


# --------------------------------------------------------------------------- chat


@dataclass(frozen=True)
class Template:
    """The frame is the same for all: <|im_start|>role\n text <|im_end|>."""

    system_message: str
    after_end: str = ""  # behind each <|im_end|>
    strips: bool = False  # official training strips the texts of a conversation (chat never does)


FIRST_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
TEMPLATES = {
    "internlm2-chat": Template(FIRST_MESSAGE, strips=True),
    "Hermes-2": Template(FIRST_MESSAGE),
    "internvl2_5": Template(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合"
        "开发的多模态大语言模型。",
        after_end="\n",
    ),
}

Turns = list[tuple[str, str | None]]  # (question, answer); None: the turn to be answered, the last


def find_template(name: str) -> Template:
    """The template that `template` in config.json names."""
    if name not in TEMPLATES:
        raise InputError(f"config.json: unknown template {name!r}, known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def training_text(template: str, text: str) -> str:
    """A question or an answer as official training takes it; internlm2-chat strips it."""
    return text.strip() if find_template(template).strips else text


def with_image_placeholders(question: str, num_images: int) -> str:
    """`question` with one <image> per image: those it has, or if it has none a line each in front.

    As chat() does it for the first turn of one image; the images of later turns need their own.
    """
    placeholders = question.count(IMAGE)
    if placeholders == 0:
        return f"{IMAGE}\n" * num_images + question
    if placeholders != num_images:
        raise InputError(
            f"question has {placeholders} {IMAGE} for {num_images} images: write one for each, or "
            "none at all to have the images in front"
        )
    return question


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    turns: Turns,
    image_tokens: list[int],
    system_message: str | None = None,
) -> list[int]:
    """Ids up to `<|im_start|>assistant\n`, or to the end of the last answer if it has one.

    image_tokens: <IMG_CONTEXT> tokens (256 per tile) of each <image> in the questions, left to
    right.  system_message: None for the template's.  Texts are taken unstripped.
    """
    form = find_template(template)
    slots = sum(question.count(IMAGE) for question, _ in turns)
    if image_tokens and slots != len(image_tokens):
        raise InputError(
            f"{slots} {IMAGE} in the user's text but {len(image_tokens)} images: one for each, "
            "see with_image_placeholders"
        )
    if any(answer is None for _, answer in turns[:-1]):
        raise InputError("a turn before the last has no answer: only the last may be open")

    plain, special = tokenizer.encode_plain, tokenizer.token_id
    start, end = special("<|im_start|>"), [tokenizer.im_end_id, *plain(form.after_end)]
    system = form.system_message if system_message is None else system_message
    images = iter(image_tokens)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += [start, *plain(f"system\n{system}"), *end]
    for question, answer in turns:
        # without any image, <image> is plain text
        first, *rest = f"user\n{question}".split(IMAGE) if image_tokens else [f"user\n{question}"]
        ids += [start, *plain(first)]
        for text in rest:
            context = [tokenizer.image_context_id] * next(images)
            ids += [special("<img>"), *context, special("</img>"), *plain(text)]
        ids += [*end, start, *plain("assistant\n")]
        if answer is not None:
            ids += [*plain(answer), *end]
    return ids


def encode_response(tokenizer: Tokenizer, template: str, text: str) -> list[int]:
    """Ids of a response to be learned or scored behind encode_chat, with its <|im_end|>."""
    return [*tokenizer.encode_plain(training_text(template, text)), tokenizer.im_end_id]
