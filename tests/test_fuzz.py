"""Random flags and random JSON: an answer in one line, status 0 or 2, and no traceback."""

import contextlib
import dataclasses
import io
import json
import math

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import eval as evaluation
import pairs
import plain
import toy
from config import parse_config
from generate import GenerateConfig
from paper.report import ReportConfig
from paper.story import StoryConfig
from records import read_meta
from runtime import InputError, parse_cli, parse_json, read_jsonl
from tools import convert, doctor, export, lab, look, rlaifv
from train import TrainConfig

CONFIGS = [
    TrainConfig,
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
    *(config for config, _ in pairs.COMMANDS.values()),
    *look.COMMANDS.values(),
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
