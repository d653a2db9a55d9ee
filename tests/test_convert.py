"""Pairs of other programs become MMPR and come back; what cannot be a pair is counted and named."""

import csv
import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import train_in_process
from PIL import Image

from records import read_meta
from runtime import InputError, run
from tools import convert
from tools.convert import ConvertConfig
from toy import write_world
from train import TrainConfig

PYARROW = find_spec("pyarrow")
Q, C, R = "How many?", "Two.", "Five."
PLAIN = {"question": Q, "chosen": C, "rejected": R, "image": "a.png"}


def user(text=Q):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text=Q):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def parts(text):
    return [{"type": "image"}, {"type": "text", "text": text}]


SYSTEM = {"role": "system", "content": "Be brief."}
TRL = {"prompt": Q, "chosen": C, "rejected": R, "images": ["a.png"]}
TALK = {"prompt": [user(parts(Q))], "chosen": [assistant(C)], "rejected": [assistant(R)]}
TALK |= {"images": ["a.png"]}
SWIFT = {"messages": [user(f"<image>{Q}"), assistant(C)], "rejected_response": R}
SWIFT |= {"images": ["a.png"]}
FACTORY = {"conversations": [human(f"<image>{Q}")], "chosen": gpt(C), "rejected": gpt(R)}
FACTORY |= {"images": ["a.png"]}

# each as its program writes it, and all are the one pair
SAME = {
    "TRL, texts": TRL,
    "TRL, messages": TALK,
    "TRL, the prompt inside both answers": {
        "chosen": [user(parts(Q)), assistant(C)],
        "rejected": [user(parts(Q)), assistant(R)],
        "images": [{"bytes": None, "path": "a.png"}],
    },
    "ms-swift": SWIFT,
    "ms-swift, rejected messages": {
        "messages": SWIFT["messages"],
        "rejected_messages": [user(f"<image>{Q}"), assistant(R)],
        "images": ["a.png"],
    },
    "LLaMA-Factory, ShareGPT": FACTORY,
    "LLaMA-Factory, Alpaca": {"instruction": "How", "input": "many?", "chosen": C, "rejected": R}
    | {"images": ["a.png"]},
    "RLAIF-V": PLAIN | {"ds_name": "RLAIF-V", "origin_dataset": "LCS-558K", "idx": 3},
    "MMPR": PLAIN | {"chosen_meta": {"k": 1}},
}


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (30, 30), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def convert_rows(folder, rows, **flags):
    """(report, records of what is read back) of rows in a jsonl."""
    path = write_lines(folder / "in.jsonl", rows)
    report = convert.convert(ConvertConfig(input=path, out=folder / "out", **flags))
    return report, records(folder / "out/meta.json")


def records(meta):
    """Everything of a record but its name and set, image paths resolved."""
    read = [s[n] for s in read_meta(meta, 12) for n in range(len(s))]
    return [
        replace(r, name="", data_set="", images=tuple(p.resolve() for p in r.images)) for r in read
    ]


@pytest.mark.parametrize("form", SAME)
def test_every_program_s_record_becomes_the_same_pair(form, folder):
    report, [record] = convert_rows(folder, [SAME[form]])
    assert report == {"kept": 1, "dropped": []}
    assert re.sub(r"\s", " ", record.question) == f"<image> {Q}".replace(
        "> ", ">" if "swift" in form or "ShareGPT" in form else "> "
    )
    assert (record.chosen, record.rejected) == (C, R)
    assert record.images == ((folder / "a.png").resolve(),) and record.system_prompt is None


BAD = {  # record -> why it is no pair
    "no 'rejected'": TRL | {"rejected": None},
    "no 'rejected_response'": SWIFT | {"rejected_response": ""},
    "rejected is empty": PLAIN | {"rejected": " "},
    "chosen and rejected are the same text": PLAIN | {"rejected": C},
    "chosen and rejected are not one answer each": TALK | {"rejected": [user(), assistant(R)]},
    "several turns": SWIFT | {"messages": [user(), assistant("?"), *SWIFT["messages"]]},
    "the turns are not user, assistant": FACTORY | {"conversations": [human(), human()]},
    "'videos' is not supported": SWIFT | {"videos": ["a.mp4"]},
    "'tools' is not supported": FACTORY | {"tools": "[...]"},
    "'history' is not supported": {"instruction": Q, "history": [["a", "b"]], "chosen": C},
    "keys of no known format": {"text": Q},
    "a text, a message or an image is none (KeyError": TALK
    | {"prompt": [user([{"type": "audio"}])]},
    "a text, a message or an image is none (AttributeError": TRL | {"prompt": 3},
    "the question has 1 <image> for 2 images": SWIFT | {"images": ["a.png", "b.png"]},
    "no image": PLAIN | {"image": "absent.png"},
    "a text, a message or an image is none (TypeError": PLAIN | {"image": 3},
    "'utf-8' codec can't encode": PLAIN | {"chosen": "\ud800"},
    "image '../../etc/passwd' is no path within its root": PLAIN | {"image": "../../etc/passwd"},
    "image 's3://b/a.png'": PLAIN | {"image": "s3://b/a.png"},
    "'system_prompt' must be str": PLAIN | {"system_prompt": 3},
    "both 'system_prompt' and 'system'": PLAIN | {"system_prompt": "a", "system": "b"},
    "a system prompt beside that of the conversation": SWIFT
    | {"messages": [SYSTEM, *SWIFT["messages"]], "system": "Be long."},
    "both 'images' and 'image'": PLAIN | {"images": ["b.png"]},
    "both 'prompt' and 'question'": PLAIN | {"prompt": [user()]},
    "<image> in an answer is not supported": TALK | {"chosen": [assistant(parts(C))]},
    "a text, a message or an image is none (KeyError('image_url')": TALK
    | {"prompt": [user([{"type": "image_url", "image_url": "b.png", "text": Q}])]},
}


def test_what_is_no_pair_is_left_out_counted_and_named(folder):
    Path(folder / "etc").mkdir()
    report, kept = convert_rows(folder, [PLAIN, *BAD.values(), PLAIN | {"chosen": "Three."}])
    assert len(kept) == report["kept"] == 2
    assert report == json.loads((folder / "out/report.json").read_text())
    for number, (why, line) in enumerate(zip(BAD, report["dropped"], strict=True), 2):
        assert f"in.jsonl line {number}: {why}" in line


def test_earlier_turns_go_into_the_question_on_request(folder):
    messages = [SYSTEM, user("Is it red?"), assistant("Yes."), user(), assistant(C)]
    row = {"messages": messages, "rejected_response": R}
    _, [record] = convert_rows(folder, [row], flatten=True)
    assert record.question == f"User: Is it red?\n\nAssistant: Yes.\n\nUser: {Q}"
    assert record.system_prompt == "Be brief."


ROUND = [
    PLAIN,
    PLAIN | {"image": ["a.png", "b.png"], "question": "<image> or <image>?"},
    {
        "question": "1 + 1?",
        "chosen": 'It is "2",\nsurely.',
        "rejected": "3",
        "system_prompt": "Hm.",
    },
]


@pytest.mark.parametrize("to", ["trl", "ms-swift", "llama-factory", "plain"])
def test_mmpr_goes_out_and_comes_back(to, folder):
    _, first = convert_rows(folder, ROUND)
    theirs = ConvertConfig(input=folder / "out/meta.json", out=folder / "theirs.jsonl", to=to)
    convert.convert(theirs)
    back = ConvertConfig(input=theirs.out, out=folder / "back")
    assert convert.convert(back) == {"kept": 3, "dropped": []}
    if to == "trl":  # where a line ends behind an image
        lines = (re.sub(r"<image>(?!\n)", "<image>\n", r.question) for r in first)
        first = [replace(r, question=question) for r, question in zip(first, lines)]
    assert records(folder / "back/meta.json") == first


@pytest.mark.parametrize("to", ["trl", "ms-swift", "plain"])
def test_an_empty_system_prompt_stays_one(to, folder):
    _, [first] = convert_rows(folder, [PLAIN | {"system_prompt": ""}])
    assert first.system_prompt == ""
    theirs = ConvertConfig(input=folder / "out/meta.json", out=folder / "theirs.jsonl", to=to)
    convert.convert(theirs)
    convert.convert(ConvertConfig(input=theirs.out, out=folder / "back"))
    assert records(folder / "back/meta.json") == [first]


def test_trl_gets_a_part_for_each_image_since_it_reads_the_mark_as_text(folder, capsys):
    convert_rows(folder, ROUND)
    theirs = ConvertConfig(input=folder / "out/meta.json", out=folder / "theirs.jsonl", to="trl")
    convert.convert(theirs)
    assert "1 questions go on behind an image; in this format a line" in capsys.readouterr().err
    one, two, text = map(json.loads, theirs.out.read_text().splitlines())
    assert one["prompt"] == [user(parts(Q))] and len(one["images"]) == 1
    between, end = ({"type": "text", "text": text} for text in (" or ", "?"))
    assert two["prompt"] == [user([{"type": "image"}, between, {"type": "image"}, end])]
    # a language model's template may know texts alone
    assert text["prompt"] == [{"role": "system", "content": "Hm."}, user("1 + 1?")]
    assert "<image>" not in theirs.out.read_text()


def test_a_rejected_response_that_was_cut_off_stays_marked_or_is_told(folder, capsys):
    _, [first] = convert_rows(folder, [PLAIN | {"cut_off": True}])
    convert.convert(
        ConvertConfig(input=folder / "out/meta.json", out=folder / "p.jsonl", to="plain")
    )
    convert.convert(ConvertConfig(input=folder / "p.jsonl", out=folder / "back"))
    assert first.cut_off and records(folder / "back/meta.json") == [first]
    convert.convert(ConvertConfig(input=folder / "p.jsonl", out=folder / "trl.jsonl", to="trl"))
    assert "1 rejected answers never ended; in this format" in capsys.readouterr().err


def test_images_inside_a_parquet_file_are_written_once_by_what_they_hold(folder, monkeypatch):
    row = PLAIN | {"image": {"bytes": (folder / "a.png").read_bytes(), "path": "x.png"}}
    monkeypatch.setattr(convert, "read_table", lambda path: [row, row])
    (folder / "rlaifv.parquet").touch()
    convert.convert(ConvertConfig(input=folder / "rlaifv.parquet", out=folder / "out"))
    [image] = (folder / "out/images").iterdir()
    assert image.suffix == ".png" and image.read_bytes() == (folder / "a.png").read_bytes()
    assert [r.images for r in records(folder / "out/meta.json")] == [(image.resolve(),)] * 2


def test_no_image_of_a_pair_that_is_left_out_is_written(folder, monkeypatch):
    good, broken = ({"bytes": data} for data in ((folder / "a.png").read_bytes(), b"no image"))
    rows = [
        PLAIN | {"image": good, "chosen": R},
        PLAIN | {"image": [good, broken], "question": "Both?"},
        PLAIN | {"image": broken},
    ]
    monkeypatch.setattr(convert, "read_table", lambda path: rows)
    (folder / "in.parquet").touch()
    cfg = ConvertConfig(input=folder / "in.parquet", out=folder / "out")
    with pytest.raises(InputError, match="no pair can be kept"):
        convert.convert(cfg)
    assert not list(folder.glob("out/images/*"))
    rows.append(PLAIN | {"image": good})
    report = convert.convert(replace(cfg, out=folder / "more"))
    assert report["kept"] == 1 and len(list(folder.glob("more/images/*"))) == 1


def test_a_picture_beside_bytes_is_not_looked_for_under_another_name(folder, monkeypatch):
    """A pair has one root: of bytes it is the folder that they are written to."""
    content = {"bytes": (folder / "b.png").read_bytes()}
    for other, told in ((str(folder / "a.png"), "is no path within"), ("a.png", "no image")):
        rows = [PLAIN | {"image": "a.png"}, PLAIN | {"image": [content, other], "chosen": "x"}]
        monkeypatch.setattr(convert, "read_table", lambda path, rows=rows: rows)
        (folder / "in.parquet").touch()
        cfg = ConvertConfig(input=folder / "in.parquet", out=folder / f"out-{len(other)}")
        report = convert.convert(cfg)
        assert report["kept"] == 1 and told in report["dropped"][0]


def test_images_elsewhere_than_beside_the_file_need_a_root_that_holds_them(folder, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    rows = [PLAIN | {"image": str(folder / "a.png")}]
    (beside / "in.json").write_text(json.dumps(rows))
    cfg = ConvertConfig(input=beside / "in.json", out=tmp_path / "without")
    with pytest.raises(InputError, match="no pair can be kept"):
        convert.convert(cfg)
    assert "is no path within its root" in (tmp_path / "without/report.json").read_text()
    for number, root in enumerate((folder, Path("/"))):
        out = tmp_path / f"with-{number}"
        convert.convert(replace(cfg, out=out, root=root))
        [data_set] = read_meta(out / "meta.json", 0)
        assert data_set[0].images[0].samefile(folder / "a.png")


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_other_files_are_read_like_lines(folder, ending):
    path, rows = folder / f"in.{ending}", [PLAIN, PLAIN | {"chosen": 'It is "2",\nsurely.'}]
    _, expected = convert_rows(folder, rows)
    if ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, PLAIN)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow to run this")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert convert.convert(ConvertConfig(input=path, out=folder / "other"))["kept"] == 2
    assert records(folder / "other/meta.json") == expected


def test_a_line_of_a_csv_with_more_cells_than_columns_is_no_pair(folder):
    path = folder / "in.csv"
    path.write_text("question,chosen,rejected\nq,a,b\nq,a,b, and a comma\n")
    report = convert.convert(ConvertConfig(input=path, out=folder / "out"))
    assert report["kept"] == 1
    assert report["dropped"] == [f"{path} record 2: 'cells_without_a_column' is not supported"]


def test_a_line_of_a_csv_that_is_too_short_or_no_utf8_is_no_pair(folder):
    path = folder / "in.csv"
    path.write_bytes(b"question,chosen,rejected,image\nq,a,b\nq,\xe9,b,\nq,a,b,a.png\n")
    report = convert.convert(ConvertConfig(input=path, out=folder / "out"))
    short, latin = report["dropped"]
    assert report["kept"] == 1
    assert short == f"{path} record 1: 'columns_without_a_cell' is not supported"
    assert latin.startswith(f"{path} record 2: 'utf-8' codec can't encode")


def test_a_folder_of_images_that_is_given_holds_those_of_a_meta_json_too(folder, capsys):
    write_lines(folder / "in.jsonl", [PLAIN])
    (folder / "meta.json").write_text('{"a": {"annotation": "in.jsonl", "root": "nowhere"}}')
    asked = ConvertConfig(input=folder / "meta.json", out=folder / "out")
    with pytest.raises(InputError, match="no pair can be kept"):
        convert.convert(asked)
    assert convert.convert(replace(asked, out=folder / "own", root=folder))["kept"] == 1


def test_what_meta_json_says_of_its_sets_is_told_to_be_lost(folder, capsys):
    write_lines(folder / "in.jsonl", [PLAIN])
    sets = {"plain": {}, "thrice": {"repeat_time": 3}, "tiled": {"max_dynamic_patch": 12}}
    sets = {name: {"annotation": "in.jsonl"} | more for name, more in sets.items()}
    (folder / "meta.json").write_text(json.dumps(sets))
    flags = ("--to=trl", f"--out={folder / 'out.jsonl'}")
    sys.argv = ["convert.py", str(folder / "meta.json"), *flags]
    run(convert.main)
    told = "repeat_time, tiles, augmentation are not written"
    assert capsys.readouterr().err == f"thrice: {told}\ntiled: {told}\n"


def status_of(capsys, *argv):
    sys.argv = ["convert.py", *map(str, argv)]
    try:
        run(convert.main)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "x", "expected .jsonl, .json, .csv or .parquet"),
        ("a.json", "[1]", "expected a list of objects"),
        ("a.json", "[{", "not valid JSON"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", b'[{"question": "\xe9"}]', "a.json: not valid JSON ('utf-8' codec"),
        ("a.jsonl", "{", "line 1: not valid JSON"),
        ("a.jsonl", '{"text": "x"}', "no pair can be kept"),
        ("a.csv", 'question\n"x', "unexpected end of data"),
        ("a.csv", "question,chosen,chosen\nx,y,z\n", "a.csv line 1: two columns of one name: "),
        ("absent.jsonl", None, "no file"),
        ("a.parquet", "x", "no whole parquet file" if PYARROW else "pip install pyarrow"),
    ],
)
def test_a_file_that_cannot_be_read_ends_in_one_line(name, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, text = status_of(capsys, tmp_path / name, f"--out={tmp_path / 'out'}")
    assert status == 2 and message in text and text.count("\n") == 1


@pytest.mark.parametrize(("to", "out"), [("mmpr", "pairs.jsonl"), ("trl", "pairs"), ("trl", ".")])
def test_a_name_of_the_wrong_kind_is_refused(to, out, folder, capsys):
    path = write_lines(folder / "in.jsonl", [PLAIN])
    status, text = status_of(capsys, path, f"--out={folder / 'new' / out}", f"--to={to}")
    assert status == 2 and "--to mmpr writes a folder, any other a .jsonl file" in text
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("present", "flags"),
    [
        (".", "--out=."),
        ("set", "--out=set"),
        ("own.jsonl", "--out=own.jsonl --to=trl"),
        ("theirs.report.json", "--out=theirs.jsonl --to=plain"),
    ],
)
def test_nothing_that_is_there_is_written_over(present, flags, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    pair = {"question": "q", "chosen": "a", "rejected": "b"}
    Path("own.jsonl").write_text(json.dumps(pair) + "\n")
    Path("set").mkdir()
    Path("set/meta.json").write_text("a thesis")
    Path("theirs.report.json").write_text("a thesis")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, text = status_of(capsys, Path("own.jsonl"), *flags.split())
    assert status == 2 and f"{present} is there already" in text, text
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_of_two_conversions_into_one_folder_one_is_refused(folder, monkeypatch, capsys):
    (folder / "in.jsonl").write_text(json.dumps(PLAIN) + "\n")
    read_file, seen = convert.read_file, []

    def read_while_another_starts(*args):
        monkeypatch.setattr(convert, "read_file", read_file)
        seen.append(status_of(capsys, folder / "in.jsonl", f"--out={folder / 'both'}"))
        yield from read_file(*args)

    monkeypatch.setattr(convert, "read_file", read_while_another_starts)
    seen.append(status_of(capsys, folder / "in.jsonl", f"--out={folder / 'both'}"))
    assert [status for status, _ in seen] == [2, 0] and "another run works there" in seen[0][1]
    assert {path.name for path in folder.iterdir()} >= {"both"} and not list(folder.glob(".*"))


def test_a_converted_csv_trains(tmp_path, capsys):
    write_world(tmp_path, 8, 0)
    lines = (tmp_path / "toy_steps.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    with open(tmp_path / "images/own.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, PLAIN, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, rows[0] | {"chosen": ""}])
    status, text = status_of(capsys, tmp_path / "images/own.csv", f"--out={tmp_path / 'own'}")
    assert status == 0 and "kept 8 pairs, left out 1" in text, text
    shape = {"model_dir": tmp_path / "model", "drop_path": 0.0, "pack_tokens": 2000, "warmup": 0.0}
    shape |= {"lr": 1e-3, "batch_size": 8, "out_dir": tmp_path / "run"}
    [row] = train_in_process(TrainConfig(meta=tmp_path / "own/meta.json", **shape))
    assert row["pairs"] == 8 and row["sets/own/pairs"] == 8
