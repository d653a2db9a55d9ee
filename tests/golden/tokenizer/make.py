"""Make tokenizer.model and expected.json of this folder, with sentencepiece 0.2.0 itself.

    pip install sentencepiece==0.2.0 && python tests/golden/tokenizer/make.py

A BPE with the settings of InternLM2's tokenizer (byte fallback, no dummy prefix, identity
normaliser, blanks kept) trained on the lines below.  expected.json holds what sentencepiece's
own encode and decode give; nothing of this repository is imported here.
"""

import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
USER_DEFINED = [*(f"[UNUSED_TOKEN_{n}]" for n in range(4)), "——", "……", "Ｅ"]
NAMES = {"[UNUSED_TOKEN_2]": "<|im_end|>", "[UNUSED_TOKEN_3]": "<|im_start|>"}
ADDED = ["<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>", "<box>", "</box>"]
TEXT = """\
The small dog looks at the small cat, and the cat looks back at the dog.
There are three red kites in the picture: one is near the tree, two are over the water.
What is in the picture? What is the colour of the car? How many people are on the street?
The answer is 12. The answer is 3.14. The answer is (B). The final answer is 2024.
First count the boxes, then add the numbers: 12 + 30 = 42. Therefore the answer is 42.
  if there are more boxes than people:\n        count = count + 1\n\n    return count
the user asks the assistant\n\nthe assistant answers the user\n\n\nsystem user assistant
图片里有一只小狗和一只小猫。小猫在树上，小狗在树下。
图片里有多少个人？图片里有三个人。答案是三。
首先看图片，然后数一数，最后写出答案。答案是四十二。
这是什么颜色的车？这是一辆红色的车，在街上。
Façade, naïve, café: the café is near the façade. Straße, señor, über.
"""
CASES = [
    *["", " ", "  ", "\n", "\n\n", "\n\n\n", " \n ", "\t", "a", " a", "a ", "  a", "The", " The"],
    *[
        "What is in the picture?",
        "user\n\nthe answer",
        "assistant\n  if",
        "the answer is 1234567890",
    ],
    *[
        "图片里有一只小狗",
        "小猫——小狗……",
        "ＥＥ图Ｅ",
        "——",
        "中英mixed文本",
        "café naïve",
        "e\u0301",
    ],
    *[
        "🙂",
        "👨\u200d👩\u200d👧",
        "𠀀",
        "русский",
        "हिन्दी",
        "العربية",
        "\ufeff",
        "\u00a0",
        "\u200b",
    ],
    *["<|im_end|", "<image>", "<0x0A>", "▁", "a▁b", "[UNUSED_TOKEN_0]", "x[UNUSED_TOKEN_1]y"],
    *["def f(x):\n    return x ** 2\n", '{"key": [1, 2.5, null]}', "aaaaaaaaaaaaaaa", "\x01\x7f"],
]


def train() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") + [TEXT] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        split_by_whitespace=True,
        user_defined_symbols=USER_DEFINED,
        character_coverage=0.99,
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def random_texts(pieces: list[str], count: int) -> list[str]:
    """Mixtures of pieces, blanks and any unicode, the renamed pieces left out."""
    draw = random.Random(0)
    parts = [p.replace("▁", " ") for p in pieces if p not in NAMES]
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(draw.randint(1, 12)):
            other = chr(draw.choice([draw.randint(1, 0xD7FF), draw.randint(0xE000, 0x10FFFF)]))
            text += draw.choice([draw.choice(parts), draw.choice(parts), " ", "\n", other])
        if not any(name in text for name in NAMES):
            texts.append(text)
    return texts


def main() -> None:
    data = train()
    (HERE / "tokenizer.model").write_bytes(data)
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    added = {name: len(pieces) + n for n, name in enumerate(ADDED)}
    special = {i: NAMES.get(p, p) for i, p in enumerate(pieces) if i < 3 or p in NAMES}
    special |= {i: name for name, i in added.items()}
    config = {
        "added_tokens_decoder": {
            str(i): {"content": name, "normalized": False, "special": True}
            for i, name in special.items()
        },
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (HERE / "added_tokens.json").write_text(json.dumps(added, indent=1) + "\n")

    normal = [p for i, p in enumerate(pieces) if not (i < 3 or sp.is_byte(i))]
    texts = CASES + random_texts(normal, 200)
    draw, decode = random.Random(1), []
    bytes_ = [i for i in range(len(pieces)) if sp.is_byte(i)]
    plain = [i for i in range(3, len(pieces)) if i not in special]
    while len(decode) < 120:
        ids = [draw.choice([draw.choice(bytes_), draw.choice(plain)]) for _ in range(6)]
        text = sp.decode(ids)
        if not any(rule in text for rule in (" .", " ?", " !", " ,", " '", " n't")):
            decode.append({"ids": ids, "text": text})
    expected = {
        "readme": "ids = encode(text) and text = decode(ids) of the sentencepiece package, version "
        f"{sentencepiece.__version__}, on tokenizer.model of this folder; written by make.py. No "
        "special token and no decoded text that clean-up would change occurs, as sentencepiece "
        "knows neither.",
        "vocab_size": len(pieces) + len(added),
        "special": {name: i for i, name in special.items()},
        "encode": [{"text": t, "ids": sp.encode(t)} for t in texts],
        "decode": decode,
    }
    lines = json.dumps(expected, ensure_ascii=True, indent=None).replace('}, {"', '},\n{"')
    (HERE / "expected.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
