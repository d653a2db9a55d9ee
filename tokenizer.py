"""Tokenizers of the InternVL family and their chat format: text -> ids -> text, prompts.

    load_tokenizer      InternLM2's tokenizer.model, Qwen's vocab.json and merges.txt, or a
                        tokenizer.json -> Tokenizer
    Tokenizer           encode (special tokens recognised), encode_plain (never), decode
    encode_chat         prompt ids, from the system message to the open assistant turn
    encode_response     ids of one response with its <|im_end|>: the labels behind such a prompt

Sources.  Ids: tokenization_internlm2.py (the slow class), transformers' tokenization_qwen2.py.
Prompts: conversation.py and modeling_internvl_chat.py (chat).  Labels: internvl/train/dataset.py
(preprocess_internlm, preprocess_mpt, preprocess_internvl2_5).  Files: sentencepiece_model.proto,
bpe_model.cc (neither sentencepiece nor protobuf is needed) and, for the names of special tokens,
the checkpoint's own tokenizer_config.json.

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
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from runtime import InputError, read_json

IMAGE = "<image>"  # the placeholder in texts; not a token
BLANK = "\u2581"  # stands for a space inside SentencePiece's pieces
MARKS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")  # tokens in anybody's text
# PreTrainedTokenizerBase.clean_up_tokenization, in its order; InternLM2Tokenizer always calls it
CLEAN_UP = [
    *[(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")],
    *[(" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")],
]


class Tokenizer:
    """What load_tokenizer returns.  Ids are plain ints; bos is never added here."""

    def __init__(self, backend: tokenizers.Tokenizer, source: Path) -> None:
        """`source`: the file to name in errors."""
        self.source, self.backend = source, backend
        backend.encode_special_tokens = True  # that is: as plain text
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.marks = {token.content: id for id, token in added.items() if token.content in MARKS}
        self.special = {token.content: id for id, token in added.items() if token.special}
        self.special_ids = frozenset(self.special.values())
        names = sorted(self.special, key=len, reverse=True)  # the longest name wins
        self._split_special = re.compile("(" + "|".join(map(re.escape, names)) + ")").split

        self.is_sentencepiece = getattr(backend.model, "byte_fallback", False)
        as_bytes = byte_level_bytes if "ByteLevel" in repr(backend.decoder) else str.encode
        as_bytes = sentencepiece_bytes if self.is_sentencepiece else as_bytes
        vocab = backend.get_vocab(with_added_tokens=True)
        self.pieces = {id: as_bytes(piece) for piece, id in vocab.items()}
        self.pieces |= {id: token.content.encode() for id, token in added.items()}
        self.vocab_size = 1 + max(self.pieces)
        self.bos_id = self.special.get("<s>")  # opens InternLM2's prompts; Qwen's have none
        self.im_end_id = self.token_id("<|im_end|>")  # the one id that ends an answer
        self.image_context_id = self.token_id("<IMG_CONTEXT>")
        if self.decode(self.encode_plain("a"))[:1] == " ":
            told = f"{source}: puts a blank before every text, as no InternVL does"
            raise InputError(f"{told}; turn add_prefix_space (prepend_scheme) off")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the names of special tokens in it recognised.  For trusted text only."""
        ids = []  # not by the backend's switch: another thread may encode plain text meanwhile
        for i, part in enumerate(self._split_special(text) if self.special else [text]):
            ids += [self.token_id(part)] if i % 2 else self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as it stands: `<|im_end|>` in it is ten characters, `<ref>` is a token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"half a character at {error.start} (a lone surrogate)") from None
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], marks: bool = False, final: bool = True) -> str:
        """Text of `ids` without special tokens, nothing stripped; `marks`: with grounding marks.

        An id that no token has becomes U+FFFD.  With tokenizer.model the official clean-up
        (`a , b` -> `a, b`) is applied: the class does so, whatever tokenizer_config.json says.
        final=False: only what stands whatever ids may follow, so without the first bytes of a
        character and without what clean-up may still change.
        """
        ids = [operator.index(id) for id in ids]
        if min(ids, default=0) < 0:
            raise InputError(f"{self.source}: no token has the id {min(ids)}")
        hidden = self.special_ids.union(() if marks else self.marks.values())
        unknown = "\ufffd".encode()
        shown = b"".join(self.pieces.get(id, unknown) for id in ids if id not in hidden)
        if not self.is_sentencepiece:
            return codecs.utf_8_decode(shown, "replace", final)[0]
        text = codecs.utf_8_decode(shown, "surrogateescape", final)[0]
        # sentencepiece shows one U+FFFD for each invalid byte, not one for a run of them
        text = re.sub("[\udc80-\udcff]", "\ufffd", text)
        for pattern, replacement in CLEAN_UP:
            *done, rest = text.split(pattern)
            starts = (pattern[:n] for n in range(len(pattern) - 1, 0, -1))
            held = "" if final else next(filter(rest.endswith, starts), "")
            text = replacement.join([*done, rest.removesuffix(held)])
        return text

    def token_id(self, name: str) -> int:
        """Id of the token called `name`."""
        id = self.backend.token_to_id(name)
        if id is None:
            raise InputError(f"{self.source}: no token {name!r}; is this an InternVL tokenizer?")
        return id

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError unless the model has a row for each id that a text or a prompt can hold.

        A special token beyond them that no prompt needs is allowed (<video> of InternVL3-hf).
        """
        text = self.pieces.keys() - self.special_ids
        largest = max(text | {self.im_end_id, self.image_context_id})
        if largest >= vocab_size:
            told = f"has tokens up to id {largest}, but the model's vocab_size is {vocab_size}"
            raise InputError(f"{self.source}: {told}; take both files from one checkpoint")

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
    text = piece.translate(BYTE_LEVEL)
    return text.encode("latin-1") if max(text, default="") < "\u0100" else piece.encode()


# --------------------------------------------------------------------------- tokenizer files

# how Qwen's byte-level BPE splits a text before it merges (tokenization_qwen2.py)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def named_token(name: str, special: bool) -> tokenizers.AddedToken:
    """A token with a name; special, to the package: decoding leaves it out."""
    return tokenizers.AddedToken(name, special=special and name not in MARKS, normalized=False)


def added_tokens(folder: Path) -> dict[int, tokenizers.AddedToken]:
    """The tokens that added_tokens_decoder in tokenizer_config.json names, by id."""
    path = folder / "tokenizer_config.json"
    tokens = read_json(path).get("added_tokens_decoder")
    try:
        return {int(id): named_token(t["content"], t["special"]) for id, t in tokens.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        told = f"{path}: expected added_tokens_decoder {{id: {{content, special}}}} ({error!r})"
        raise InputError(f"{told}; copy the file from the checkpoint") from None


def bpe(
    pieces: dict[int, str], merges: list, added: dict[int, tokenizers.AddedToken], **options: object
) -> tokenizers.Tokenizer:
    """A BPE with its named tokens, each of which is matched before anything merges."""
    # an id has one name: of two, hash order would choose the one that is saved
    names = pieces | {id: token.content for id, token in added.items()}
    vocab = {name: id for id, name in names.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    backend.add_tokens([*added.values()])
    return backend


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
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
    to_text = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(to_text)
    return backend


def from_vocab_and_merges(merges: Path) -> tokenizers.Tokenizer:
    """Qwen's byte-level BPE: merges.txt and the vocab.json beside it."""
    lines = merges.read_text("utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    pieces = {id: piece for piece, id in read_json(merges.with_name("vocab.json")).items()}
    added = added_tokens(merges.parent)
    made = set(map("".join, pairs)) | {token.content for token in added.values()}
    if lost := [piece for piece in pieces.values() if len(piece) > 1 and piece not in made]:
        raise InputError(f"{merges}: no merge makes {lost[0]!r} of vocab.json; fetch it again")
    backend = bpe(pieces, pairs, added)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """What transformers writes."""
    data = read_json(path)
    for token in data["added_tokens"]:
        token["special"] &= token["content"] not in MARKS
        # or the package would give it the id behind the vocabulary's last
        data["model"]["vocab"][token["content"]] = token["id"]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)  # ModelProto.SentencePiece.Type


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
        told = f"{path}: no SentencePiece model, or a part of one ({error})"
        raise InputError(f"{told}; copy the file again, or run git lfs pull") from None
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


TOKENIZERS = {  # file -> what reads it; a folder's first one counts
    "tokenizer.model": from_sentencepiece,
    "merges.txt": from_vocab_and_merges,
    "tokenizer.json": from_tokenizer_json,
}


def load_tokenizer(model_dir: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    for name, read in TOKENIZERS.items():
        if not (source := Path(model_dir) / name).is_file():
            continue
        try:
            return Tokenizer(read(source), source)
        except (InputError, OSError):  # an unreadable file says so itself
            raise
        except Exception as error:  # what `tokenizers` raises has no narrower type
            beside = " (or vocab.json beside it)" if name == "merges.txt" else ""
            raise InputError(f"{source}{beside}: not a tokenizer file ({error})") from error
    raise InputError(f"no {', '.join(TOKENIZERS)} in {model_dir}: copy them from the release")


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
CHAT_TEMPLATES = {  # by `template` of config.json
    "internlm2-chat": Template(FIRST_MESSAGE, strips=True),
    "Hermes-2": Template(FIRST_MESSAGE),
    "internvl2_5": Template(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合"
        "开发的多模态大语言模型。",
        after_end="\n",
    ),
}

Turns = list[tuple[str, str | None]]  # (question, answer); None: the turn to be answered, the last


def training_text(template: str, text: str) -> str:
    """A question or an answer as official training takes it; internlm2-chat strips it."""
    return text.strip() if CHAT_TEMPLATES[template].strips else text


def with_image_placeholders(question: str, num_images: int) -> str:
    """`question` with one <image> per image: those it has, or if it has none a line each in front.

    As chat() does it for the first turn of one image; the images of later turns need their own.
    """
    placeholders = question.count(IMAGE)
    if placeholders == 0:
        return f"{IMAGE}\n" * num_images + question
    if placeholders != num_images:
        told = f"the question has {placeholders} {IMAGE} for {num_images} images"
        raise InputError(f"{told}: add the missing 'image', write one for each, or none at all")
    return question


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    turns: Turns,
    image_tokens: list[int],
    *system_messages: str | None,
) -> list[int]:
    """Ids up to `<|im_start|>assistant\n`, or to the end of the last answer if it has one.

    image_tokens: <IMG_CONTEXT> tokens (256 per tile) of each <image> in the questions, left to
    right.  system_messages: the first but None, or else the template's.  Texts stay unstripped.
    """
    form = CHAT_TEMPLATES[template]
    slots = sum(question.count(IMAGE) for question, _ in turns)
    if image_tokens and slots != len(image_tokens):
        told = f"{slots} {IMAGE} in the user's text but {len(image_tokens)} images"
        raise InputError(f"{told}: one for each, see with_image_placeholders")
    if any(answer is None for _, answer in turns[:-1]):
        raise InputError("a turn before the last has no answer: only the last may be open")

    plain, special = tokenizer.encode_plain, tokenizer.token_id
    start, end = special("<|im_start|>"), [tokenizer.im_end_id, *plain(form.after_end)]
    system = next(text for text in (*system_messages, form.system_message) if text is not None)
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


def encode_response(tokenizer: Tokenizer, template: str, text: str, end: bool = True) -> list[int]:
    """Ids of a response to be learned or scored behind encode_chat; `end`: with its <|im_end|>."""
    ids = tokenizer.encode_plain(training_text(template, text))
    return [*ids, tokenizer.im_end_id] if end else ids
