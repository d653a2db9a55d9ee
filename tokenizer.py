"""InternLM2's tokenizer and InternVL's chat format: text -> ids -> text, prompts, label ids.

    load_tokenizer      tokenizer.model (SentencePiece BPE) or tokenizer.json -> Tokenizer
    Tokenizer           encode (special tokens recognised), encode_plain (never), decode
    StreamDecoder       the same text as decode, piece by piece
    encode_chat         prompt ids, from <s> to the open assistant turn
    encode_response     ids of one response with its <|im_end|>
    encode_conversation ids and labels of a whole conversation

Sources: tokenization_internlm2.py (the slow class) and sentencepiece's bpe_model.cc for encoding
and decoding, sentencepiece_model.proto for the file, conversation.py and modeling_internvl_chat.py
(chat) for prompts, internvl/train/dataset.py (preprocess_internlm, preprocess_internvl2_5) for
labels.  No sentencepiece or protobuf is needed: the file is read by hand and its BPE runs in
`tokenizers`; the real tokenizer.model (92,544 pieces) loads in less than 2 seconds.

A prompt is built of segments, <|im_start|> "user\\n{text}" <|im_end|>, each encoded by itself, and
special tokens enter by id: no text can forge one, and image slots need no counting afterwards.
`user\\n` and the text are one segment, as BPE merges across that border (two line breaks are one
piece).  `assistant\\n` and the response are two, because generation starts there: a response that
the model writes and one that is read from a file get the same ids.

Differs from the official code:
- special tokens inside user or assistant text stay plain text, also <ref> and <box>;
- a raw [UNUSED_TOKEN_145] is plain text too (officially it becomes <|im_end|>);
- a response that opens with a blank line does not merge into `assistant\\n` (no other text would;
  internlm2-chat strips it in training anyway);
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

from runtime import InputError

IMAGE = "<image>"  # the placeholder in texts; not a token
IGNORE = -100  # label of a position without loss
BLANK = "\u2581"  # stands for a space inside pieces

# names that tokenizer_config.json gives to ids of InternLM2's tokenizer.model, and adds behind it
INTERNLM2_PIECES = 92544
INTERNLM2_NAMES = dict(
    enumerate(
        "<|plugin|> <|interpreter|> <|action_end|> <|action_start|> <|im_end|> <|im_start|> "
        "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split(),
        start=92538,
    )
)

# PreTrainedTokenizerBase.clean_up_tokenization, in its order; InternLM2Tokenizer always calls it
CLEAN_UP = [
    *[(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")],
    *[(" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")],
]

# --------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """What load_tokenizer returns.  Ids are plain ints; bos is never added here."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, int],
        pieces: list[bytes] | None,
        source: Path,
    ) -> None:
        """`backend` must not recognise special tokens; without `pieces` its own decoder is used."""
        self.backend, self.special, self.pieces, self.source = backend, special, pieces, source
        self.special_ids = frozenset(special.values())
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        names = sorted(special, key=len, reverse=True)  # at one place the longest name wins
        self._split_special = re.compile("(" + "|".join(map(re.escape, names)) + ")").split
        self._never_plain = self.special_ids - {special.get("<unk>")}  # unknown words stay unknown

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the names of special tokens in it recognised.  For trusted text only."""
        if not self.special:
            return self.encode_plain(text)
        ids = []
        for i, part in enumerate(self._split_special(text)):
            ids += [self.special[part]] if i % 2 else self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as it stands: `<|im_end|>` in it is ten characters, no token."""
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

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; nothing stripped, one U+FFFD per invalid byte.

        The official clean-up (`a , b` -> `a, b`, see CLEAN_UP) is applied, although
        tokenizer_config.json turns it off: the official class does so.
        """
        ids = [id for id in map(self.checked_id, ids) if id not in self.special_ids]
        if self.pieces is None:
            return self.backend.decode(ids)
        text = b"".join(self.pieces[id] for id in ids).decode("utf-8", "surrogateescape")
        text = show_invalid_bytes(text)
        for pattern, replacement in CLEAN_UP:
            text = text.replace(pattern, replacement)
        return text

    def checked_id(self, id: int) -> int:
        """`id` as an int; an error if no token has it (a label of -100, a padded vocabulary)."""
        id = operator.index(id)
        if not 0 <= id < self.vocab_size:
            raise InputError(f"{self.source}: no token {id}, ids end at {self.vocab_size - 1}")
        return id

    def token_id(self, name: str) -> int:
        """Id of the token called `name`."""
        token = self.special.get(name, self.backend.token_to_id(name))
        if token is None:
            raise InputError(f"{self.source}: no token {name!r}; is this an InternVL2 tokenizer?")
        return token

    @property
    def bos_id(self) -> int:
        return self.token_id("<s>")

    @property
    def pad_id(self) -> int:
        """`</s>`, officially both eos and pad; chat stops at im_end_id alone."""
        return self.token_id("</s>")

    @property
    def im_end_id(self) -> int:
        return self.token_id("<|im_end|>")

    @property
    def image_context_id(self) -> int:
        return self.token_id("<IMG_CONTEXT>")


def show_invalid_bytes(text: str) -> str:
    """One U+FFFD for each byte that surrogateescape could not decode, as sentencepiece does it.

    (errors="replace" would give one for a whole run of them.)
    """
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


class StreamDecoder:
    """Text as its ids arrive: all pushes and the flush together equal Tokenizer.decode(ids).

    Held back: the first bytes of an unfinished character, and what clean-up may still change.
    For a tokenizer.json with its own decoder this needs one that only appends, as usual ones do.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pieces is None:
            self.ids, self.shown = [], ""
        else:
            self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            self.held = [""] * len(CLEAN_UP)  # by each rule: the start of what may be its pattern

    def push(self, id: int) -> str:
        """The text that is certain with `id`; often one character late, empty for a special."""
        id = self.tokenizer.checked_id(id)
        if id in self.tokenizer.special_ids:
            return ""
        if self.tokenizer.pieces is not None:
            return self._clean_up(self.utf8.decode(self.tokenizer.pieces[id]))
        self.ids.append(id)
        return self._grow(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def flush(self) -> str:
        """What was held back; call it once, at the end."""
        if self.tokenizer.pieces is not None:
            return self._clean_up(self.utf8.decode(b"", final=True), final=True)
        return self._grow(self.tokenizer.decode(self.ids))

    def _grow(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new

    def _clean_up(self, text: str, final: bool = False) -> str:
        """`text` through every rule in turn, each an online str.replace."""
        text = show_invalid_bytes(text)
        for i, (pattern, replacement) in enumerate(CLEAN_UP):
            *done, rest = (self.held[i] + text).split(pattern)
            starts = (pattern[:n] for n in range(len(pattern) - 1, 0, -1))
            self.held[i] = "" if final else next(filter(rest.endswith, starts), "")
            text = replacement.join([*done, rest[: len(rest) - len(self.held[i])]])
        return text


# --------------------------------------------------------------------------- tokenizer files


def load_tokenizer(model_dir: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from tokenizer.model or else from tokenizer.json."""
    model_dir = Path(model_dir)
    if (path := model_dir / "tokenizer.model").is_file():
        return _from_sentencepiece(path)
    if (path := model_dir / "tokenizer.json").is_file():
        return _from_tokenizer_json(path)
    raise InputError(
        f"no tokenizer.model or tokenizer.json in {model_dir}: copy tokenizer.model, "
        "tokenizer_config.json and added_tokens.json from the released checkpoint"
    )


def _from_sentencepiece(path: Path) -> Tokenizer:
    pieces = read_pieces(path)
    named, special_ids = _read_names(path.parent, pieces)
    names = {id: piece.text for id, piece in enumerate(pieces)} | named
    vocab = {name: id for id, name in names.items()}
    if len(vocab) < len(names):
        twice = next(name for id, name in names.items() if vocab[name] != id)
        raise InputError(f"{path.parent}: two ids are called {twice!r}; compare added_tokens.json")

    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, bpe_merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    bpe.normalizer = tokenizers.normalizers.Replace(" ", BLANK)
    verbatim = [id for id, piece in enumerate(pieces) if piece.kind == USER_DEFINED] + list(named)
    bpe.add_tokens(
        [
            tokenizers.AddedToken(names[id], normalized=False)
            for id in dict.fromkeys(verbatim)
            if id not in special_ids
        ]
    )
    texts = [b""] * (1 + max(names))
    for id, name in names.items():
        is_byte = id < len(pieces) and pieces[id].kind == BYTE
        texts[id] = piece_bytes(name) if is_byte else piece_text(name)
    return Tokenizer(bpe, {names[id]: id for id in special_ids}, texts, path)


def piece_bytes(piece: str) -> bytes:
    """`<0x0A>` -> the byte."""
    return bytes([int(piece[3:5], 16)])


def piece_text(piece: str) -> bytes:
    return piece.replace(BLANK, " ").encode()


def _read_names(folder: Path, pieces: list["Piece"]) -> tuple[dict[int, str], set[int]]:
    """(names beside those in tokenizer.model, by id; ids of all special tokens)."""
    config, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    special = {id for id, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL)}
    files = [_read_json(file) if file.is_file() else {} for file in (config, added)]
    try:
        listed = files[0].get("added_tokens_decoder", {})
        named = {int(id): token["content"] for id, token in listed.items()}
        special |= {int(id) for id, token in listed.items() if token["special"]}
        others = {int(id): name for name, id in files[1].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{folder}: expected added_tokens_decoder {{id: {{content, special}}}} in "
            f"{config.name} and {{name: id}} in {added.name}, got {error!r}; copy both from the "
            "checkpoint"
        ) from None
    special |= set(others) - set(named)  # this file has no flags; InternVL's are all special
    if "<|im_end|>" not in [*named.values(), *others.values()] and len(pieces) == INTERNLM2_PIECES:
        others |= INTERNLM2_NAMES
        special |= set(INTERNLM2_NAMES)
    if not named and not others:
        raise InputError(
            f"{folder}: neither {added.name} nor added_tokens_decoder in {config.name}, so nothing "
            "names the special tokens; copy both from the checkpoint"
        )

    known = {id: p.text for id, p in enumerate(pieces) if p.kind in (NORMAL, BYTE)}
    for id, name in [*named.items(), *others.items()]:
        if known.setdefault(id, name) != name:
            raise InputError(
                f"{folder}: token {id} is {name!r} in one tokenizer file and {known[id]!r} in "
                "another; copy all of them from one checkpoint"
            )
    return others | named, special


def _from_tokenizer_json(path: Path) -> Tokenizer:
    """A Hugging Face `tokenizers` file.

    If it is SentencePiece's BPE (byte fallback, blanks as U+2581) decoding follows our rules, as
    its ByteFallback decoder turns a whole run of bytes into U+FFFD if one of them is invalid;
    anything else (word level, byte level) decodes as the file says.
    """
    data = _read_json(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        model, added = data["model"], data["added_tokens"]
        front = json.dumps([data["normalizer"], data["pre_tokenizer"]])
    except Exception as error:  # what `tokenizers` raises has no narrower type
        raise InputError(f"{path}: not a tokenizer file of `tokenizers` ({error})") from error
    if re.search(r'"Prepend"|"prepend_scheme": "(always|first)"|"add_prefix_space": true', front):
        raise InputError(
            f"{path}: puts a blank before every text, as InternLM2 does not, so prompts could not "
            "be built of segments; turn add_prefix_space (prepend_scheme) off"
        )
    backend.encode_special_tokens = True  # that is: as plain text
    backend.no_truncation()
    backend.no_padding()
    special = {token["content"]: token["id"] for token in added if token["special"]}
    pieces = None
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        vocab = backend.get_vocab(with_added_tokens=True)
        pieces = [b""] * (1 + max(vocab.values()))
        for name, id in vocab.items():
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", name)
            pieces[id] = piece_bytes(name) if is_byte else piece_text(name)
    return Tokenizer(backend, special, pieces, path)


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


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
    found = {  # name: (value or the proto's default, what InternLM2 has)
        "model_type": (trainer.get(3, 1), 2),  # BPE
        "byte_fallback": (trainer.get(35, 0), 1),
        "precompiled_charsmap": (normalizer.get(2, b""), b""),
        "add_dummy_prefix": (normalizer.get(3, 1), 0),
        "remove_extra_whitespaces": (normalizer.get(4, 1), 0),
        "escape_whitespaces": (normalizer.get(5, 1), 1),
        "pieces of type UNUSED": (sum(piece.kind == UNUSED for piece in pieces), 0),
    }
    for name, (value, needed) in found.items():
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
    after_end: str  # behind each <|im_end|>
    strip_labels: bool  # training strips the texts of a conversation (chat never does)


TEMPLATES = {
    "internlm2-chat": Template(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。",
        after_end="",
        strip_labels=True,
    ),
    "internvl2_5": Template(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合"
        "开发的多模态大语言模型。",
        after_end="\n",
        strip_labels=False,
    ),
}

Turns = list[tuple[str, str | None]]  # (question, answer); None: the turn to be answered, the last


def find_template(name: str) -> Template:
    """The template that `template` in config.json names."""
    if name not in TEMPLATES:
        raise InputError(f"config.json: unknown template {name!r}, known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def with_image_placeholders(question: str, num_images: int) -> str:
    """`question` with one <image> per image: those it has, or if it has none a line each in front.

    As chat() does it for the first turn of one image; the images of later turns need their own.
    """
    found = question.count(IMAGE)
    if found == 0:
        return f"{IMAGE}\n" * num_images + question
    if found != num_images:
        raise InputError(
            f"question has {found} {IMAGE} for {num_images} images: write one for each, or none "
            "at all to have the images in front"
        )
    return question


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    turns: Turns,
    image_tokens: list[int],
    system_message: str | None = None,
) -> list[int]:
    """Ids from <s> to `<|im_start|>assistant\n`, or to the end of the last answer if it has one.

    image_tokens: <IMG_CONTEXT> tokens (256 per tile) of each <image> in the questions, left to
    right.  system_message: that of config.json, else the template's.  Texts are taken unstripped.
    """
    segments = _segments(tokenizer, template, turns, image_tokens, system_message)
    return [id for ids, _ in segments for id in ids]


def encode_response(tokenizer: Tokenizer, template: str, text: str) -> list[int]:
    """Ids of a response to be learned or scored behind encode_chat, with its <|im_end|>.

    Stripped if the template's official training strips (internlm2-chat).
    """
    text = text.strip() if find_template(template).strip_labels else text
    return [*tokenizer.encode_plain(text), tokenizer.im_end_id]


def encode_conversation(
    tokenizer: Tokenizer,
    template: str,
    turns: Turns,
    image_tokens: list[int],
    system_message: str | None = None,
) -> tuple[list[int], list[int]]:
    """(ids, labels) for supervised training: labels are the ids of answers with their <|im_end|>.

    -100 elsewhere.  Arguments as in encode_chat; the texts are stripped if the template says so.
    """
    if find_template(template).strip_labels:
        turns = [(question.strip(), answer and answer.strip()) for question, answer in turns]
    ids, labels = [], []
    for segment, is_answer in _segments(tokenizer, template, turns, image_tokens, system_message):
        ids += segment
        labels += segment if is_answer else [IGNORE] * len(segment)
    return ids, labels


def _segments(
    tokenizer: Tokenizer,
    template: str,
    turns: Turns,
    image_tokens: list[int],
    system_message: str | None,
) -> Iterator[tuple[list[int], bool]]:
    """(ids, whether an answer) of the conversation, piece by piece."""
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
    start, end = [special("<|im_start|>")], [tokenizer.im_end_id]
    after_end = plain(form.after_end)
    system = form.system_message if system_message is None else system_message
    images = iter(image_tokens)
    yield [tokenizer.bos_id, *start, *plain(f"system\n{system}"), *end, *after_end], False
    for question, answer in turns:
        # without any image, <image> is plain text
        first, *rest = f"user\n{question}".split(IMAGE) if image_tokens else [f"user\n{question}"]
        user = plain(first)
        for text in rest:
            context = [tokenizer.image_context_id] * next(images)
            user += [special("<img>"), *context, special("</img>"), *plain(text)]
        yield [*start, *user, *end, *after_end], False
        yield [*start, *plain("assistant\n")], False
        if answer is not None:
            yield [*plain(answer), *end], True
            yield after_end, False
