"""Random flags and random JSON: an answer in one line, status 0 or 2, and no traceback."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import sys

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import eval as evaluation
import generate
import pairs
import plain
import toy
import train
from config import load_config, parse_config
from generate import GenerateConfig
from paper.report import ReportConfig
from paper.story import StoryConfig
from records import read_meta
from runtime import InputError, parse_cli, parse_json, read_jsonl, run
from tools import convert, doctor, export, lab, look, rlaifv

CONFIGS = [
    train.TrainConfig,
    plain.PlainConfig,
    toy.ToyConfig,
    GenerateConfig,
    StoryConfig,
    ReportConfig,
    doctor.DoctorConfig,
    export.ExportConfig,
    convert.ConvertConfig,
    lab.LabConfig,
    rlaifv.DivideConfig,
    *pairs.VERBS.values(),
    *look.VERBS.values(),
    evaluation.Generate,
    evaluation.Score,
    evaluation.Judge,
    evaluation.Report,
]
odd_texts = st.sampled_from(
    ["", "0", "-1", "nan", "inf", "1e99", "-0.0", "9" * 400, "/", "..", "\0", "\ud800", "é" * 300]
)
texts = odd_texts | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | odd_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
fuzz = settings(max_examples=40, deadline=None, database=None)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.__module__}.{c.__name__}")
@seed(1)
@fuzz
@given(data=st.data())
def test_random_flags_are_taken_or_refused_in_one_line(config, data):
    names = [f.name for f in dataclasses.fields(config)]
    given_flags = data.draw(st.lists(st.tuples(st.sampled_from([*names, "lr_", "x"]), texts)))
    argv = [f"--{name}={text}" for name, text in given_flags]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cfg = parse_cli(config, argv)
        except SystemExit as stop:
            assert stop.code == 2, argv
            assert "error: " in errors.getvalue().splitlines()[-1]
            return
    for f in dataclasses.fields(config):  # what is taken is finite and in its range
        value, (low, high) = getattr(cfg, f.name), f.metadata.get("range", (-math.inf, math.inf))
        if isinstance(value, (int, float)):
            assert low <= value <= high and not math.isnan(value), (argv, f.name)


ENTRY = {"root": "images", "annotation": "a.jsonl", "repeat_time": 1, "max_dynamic_patch": 6}
RECORD = {"question": "q", "chosen": "a", "rejected": "b", "image": "x.png"}


@seed(2)
@fuzz
@given(data=st.data())
def test_random_values_in_meta_json_and_records_end_in_an_input_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    entry, record = dict(ENTRY), dict(RECORD)
    for target in (entry, record):
        keys = st.sampled_from([*target, "data_augment", "length", "images", "history"])
        target |= data.draw(st.dictionaries(keys, json_values, max_size=2))
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "meta.json").write_text(json.dumps({"set": entry}))
    try:
        for data_set in read_meta(folder / "meta.json", 6):
            for number in range(len(data_set)):
                data_set[number]
    except InputError as error:
        assert "\n" not in str(error).strip()
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "meta.json"]


@seed(3)
@fuzz
@given(change=st.dictionaries(st.text(max_size=12), json_values), part=st.integers(0, 2))
def test_random_values_in_config_json_end_in_an_input_error(change, part):
    raw = toy.model_config(100)
    target = (raw, raw["llm_config"], raw["vision_config"])[part]
    for (key, value), name in zip(change.items(), list(target)):
        target[name if len(key) % 2 else key] = value
    with contextlib.suppress(InputError):
        parse_config(raw)


@seed(4)
@fuzz
@given(content=st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()))
def test_random_bytes_are_json_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        parse_json(content, "a")
    with contextlib.suppress(InputError):
        list(read_jsonl(path))


# --------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy with a question and a sampled response."""
    folder = tmp_path_factory.mktemp("world")
    toy.write_world(folder, 8, 0)
    (folder / "samples/q").mkdir(parents=True)
    question = {"image": "pair-a-00000.png", "question": "How many?", "answer": 3}
    sample = question | {"prompt_version": "direct", "response": "3", "qid": "a", "k": 0}
    (folder / "q.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "samples/q/part-0-of-1.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "samples/q/info.json").write_text("{}")
    (folder / "sums.jsonl").write_text(
        json.dumps({"question": "1 + 2?", "answer": "#### 3"}) + "\n"
    )
    (folder / "replies.jsonl").write_text(json.dumps({"id": "0", "response": "3"}) + "\n")
    return folder


GENERATE = (generate.main, "--model_dir model --question hi --max_new_tokens 2")
SAMPLE = "sample --model_dir model --questions q.jsonl --root images --out_dir out --num_samples 1"
CORRECTNESS = (pairs.main, "correctness --samples samples --out_dir out")
CHECK = "check meta.json --model_dir model"
READERS = [  # file, the script that reads it, its words
    ("model/config.json", *GENERATE),
    ("model/tokenizer.json", *GENERATE),
    ("model/model.safetensors.index.json", *GENERATE),
    ("model/config.json", export.main, "--model_dir model --out out --hf"),
    ("meta.json", look.main, CHECK),
    ("toy_steps.jsonl", look.main, CHECK),
    ("meta.json", convert.main, "--input meta.json --to trl --out out/pairs.jsonl"),
    ("toy_steps.jsonl", convert.main, "--input toy_steps.jsonl --root images --out out"),
    ("toy_steps.jsonl", look.main, "show meta.json --out out/page.html"),
    ("q.jsonl", pairs.main, SAMPLE),
    ("samples/q/info.json", *CORRECTNESS),
    ("samples/q/part-0-of-1.jsonl", *CORRECTNESS),
]
DAMAGE = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a loop of links": lambda path: path.symlink_to(path),
    "empty": b"",
    "no UTF-8": b'{"a": "\xff\xfe"}\n',
    "100,000 deep": b"[" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 50_000 + b"\n",
    "null": b"null\n",
    "a number": b"1e999\n",
    "a list of objects": b'[{"question": "q"}]\n',
    "equal keys": b'{"a": 1, "a": 2}\n',
    "half a character": b'{"\\ud800": "\\ud800"}\n',
    "null characters": b"\0\0\0\n",
}


def files_of(folder):
    return {str(p): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("file", "main", "words"), READERS, ids=lambda v: getattr(v, "__module__", str(v)[:24])
)
def test_a_damaged_file_ends_a_script_in_one_line_and_nothing_else_is_touched(
    world, monkeypatch, capsys, file, main, words, damage
):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
    path, make, status = world / file, DAMAGE[damage], 0
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    before = files_of(world)
    try:
        run(main)
    except SystemExit as stop:
        status = stop.code
    finally:
        shutil.rmtree(world / "out", ignore_errors=True)
        after = files_of(world)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(whole)
    out, err = capsys.readouterr()
    assert after == before and status in (0, 1, 2)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 0 or len(errors) == 1 or "bad: " in out, (status, out, err)


TRAIN = "--model_dir model --meta meta.json --out_dir out --batch_size 4 --max_steps 1"


@pytest.mark.parametrize(
    ("main", "words"), [GENERATE, (pairs.main, SAMPLE), (train.main, TRAIN), (look.main, CHECK)]
)
@pytest.mark.parametrize("more", [1, 1000])
def test_ids_beyond_the_vocabulary_are_refused_before_a_run(
    world, monkeypatch, capsys, main, words, more
):
    path = world / "model/tokenizer.json"
    whole = path.read_text()
    content, size = json.loads(whole), load_config(world / "model").llm.vocab_size
    token = content["added_tokens"][-1] | {"id": size + more - 1, "special": False}
    content["added_tokens"].append(token | {"content": "beyond"})
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        run(main)
    path.write_text(whole)
    shutil.rmtree(world / "out", ignore_errors=True)
    assert stop.value.code == 2
    assert f"tokens up to id {size + more - 1}, but" in capsys.readouterr().err


# --------------------------------------------------------------------------- disks and pipes

SCORE = "score --bench gsm8k --data sums.jsonl --answers replies.jsonl"
WRITERS = [
    (pairs.main, f"{SAMPLE} --max_new_tokens 2"),
    CORRECTNESS,
    (evaluation.main, f"{SCORE} --out out"),
    (export.main, "--model_dir model --out out --hf"),
    (convert.main, "--input meta.json --to trl --out out/pairs.jsonl"),
    (look.main, "show meta.json --out out/page.html"),
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(("main", "words"), WRITERS, ids=lambda v: getattr(v, "__module__", v))
def test_a_full_disk_is_told_in_one_line_that_names_the_file(
    world, monkeypatch, capsys, main, words, number
):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(world)
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
    before = files_of(world)
    with pytest.raises(SystemExit) as stop:
        run(main)
    whole = [p for p in world.glob("out/**/*") if p.is_file() and p.name[0] != "."]
    shutil.rmtree(world / "out", ignore_errors=True)
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stop.value.code == 1 and len(errors) == 1
    assert re.match(rf"error: {os.strerror(number)}: '[^']*\bout\b[^']*'$", errors[0]), errors
    assert files_of(world) == before and whole == []


TALKERS = [
    GENERATE,
    (generate.main, f"{GENERATE[1]} --json"),
    (evaluation.main, SCORE),
    (look.main, "show meta.json --model_dir model"),
    (look.main, CHECK),
    CORRECTNESS,
]


@pytest.mark.parametrize("buffering", [1, -1], ids=["by line", "at the end"])
@pytest.mark.parametrize(("main", "words"), TALKERS, ids=lambda v: getattr(v, "__module__", v))
def test_a_closed_pipe_ends_a_script_without_a_word(
    world, monkeypatch, capsys, main, words, buffering
):
    """As under `| head`, whether the pipe is found closed by a line or by the last flush."""
    end, pipe = os.pipe()
    os.close(end)
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
    with open(pipe, "w", buffering) as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as stop:
            run(main)
    shutil.rmtree(world / "out", ignore_errors=True)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "Broken pipe" not in err and "Traceback" not in err
