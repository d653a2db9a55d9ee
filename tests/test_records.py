"""meta.json and jsonl files of pairs: what is read, and what is refused by name."""

import json
import os
from fractions import Fraction

import pytest
from PIL import Image

from records import JsonLines, find_beside, read_meta
from runtime import InputError

GOOD = {"question": "What is 1 plus 2?", "chosen": "It is 3.", "rejected": "It is 4."}


def write_set(folder, records, **entry):
    """A meta.json with one data set of the given records (objects, or raw lines)."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    meta = {"a": {"root": ".", "annotation": "a.jsonl", "repeat_time": 1, **entry}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def test_placeholders_are_put_in_front_when_missing_and_counted_when_there(tmp_path):
    one = {**GOOD, "image": "x.png"}
    assert read_meta(write_set(tmp_path, [one]), 12)[0][0].question.startswith("<image>\n")
    two = {**GOOD, "image": ["x.png", "x.png"]}
    question = read_meta(write_set(tmp_path, [two]), 12)[0][0].question
    assert question == "<image>\n<image>\n" + GOOD["question"]
    for absent in ("", [], None):
        empty = dict.fromkeys(("image", "images", "history", "system", "video"), absent)
        record = read_meta(write_set(tmp_path, [GOOD | empty]), 12)[0][0]
        assert record.images == () and record.question == GOOD["question"]


@pytest.mark.parametrize(("images", "tiles"), [(5, 2), (20, 1)])
def test_several_images_share_the_tile_limit(tmp_path, images, tiles):
    record = {**GOOD, "image": ["x.png"] * images}
    meta = write_set(tmp_path, [record], max_dynamic_patch=12)
    assert read_meta(meta, 6)[0][0].max_tiles == tiles


def test_a_repeat_time_is_exact_and_data_augment_reaches_each_record(tmp_path):
    meta = write_set(tmp_path, [GOOD], repeat_time=0.07, data_augment=True)
    [data_set] = read_meta(meta, 12)
    assert data_set.repeat_time == Fraction(7, 100) and data_set[0].augment


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"question": "x"', "a.jsonl line 2: not valid JSON"),
        (
            '{"question": "x", "question": "y"}',
            "a.jsonl line 2: .*the key 'question' stands .* twice",
        ),
        ('["x"]', "a.jsonl line 2: expected a JSON object"),
        ({"question": "x", "chosen": "y"}, "a.jsonl line 2: no 'rejected'"),
        ({**GOOD, "chosen": 3}, "line 2: 'chosen' must be str, got 3"),
        ({**GOOD, "chosen": " "}, "line 2: chosen is empty"),
        *(
            ({**GOOD, key: "half \ud800"}, "line 2: 'utf-8' codec can't encode")
            for key in ("question", "chosen", "rejected", "system_prompt")
        ),
        ({**GOOD, "rejected": " It is 3.\n"}, "line 2: chosen and rejected are the same text"),
        ({**GOOD, "rejected": GOOD["chosen"]}, "line 2: chosen and rejected are the same text"),
        (
            {**GOOD, "image": "/etc/passwd"},
            "line 2: image '/etc/passwd' is no path within its root",
        ),
        ({**GOOD, "image": "../x.png"}, "line 2: image '../x.png' is no path within its root"),
        (
            {**GOOD, "image": "s3://b/x.png"},
            "line 2: image 's3://b/x.png' is no path within its root",
        ),
        ({**GOOD, "image": "x\0.png"}, "line 2: image .* is no path within its root"),
        *(
            ({**GOOD, "image": image}, "line 2: 'image' must be a path or a list of paths, got")
            for image in (0, False, {}, 12, [["x"]], ["x.png", None], [""])
        ),
        ({**GOOD, "image": ["a.png"], "question": "<image> <image>"}, "line 2: .*2.*1"),
        (
            {**GOOD, "question": "<image>\nWhat?"},
            "line 2: .* has 1 <image> for 0 images: add .*'image'",
        ),
        ({**GOOD, "images": ["a.png"]}, "line 2: 'images' is not supported; name the key 'image'"),
        ({**GOOD, "image_path": "a.png"}, "line 2: 'image_path' is not supported; name the key"),
        ({**GOOD, "system": "x"}, "line 2: 'system' is not supported; name .* 'system_prompt'"),
        ({**GOOD, "history": [["a", "b"]]}, "line 2: 'history' is not supported; write earlier"),
        ({**GOOD, "system_prompt": ["x"]}, "line 2: 'system_prompt' must be"),
        ({**GOOD, "video": "x.mp4"}, "line 2: 'video' is not supported; remove the record"),
        ({**GOOD, "clip": [0, 1]}, "line 2: 'clip' is not supported"),
        ({**GOOD, "videos": ["x.mp4"]}, "line 2: 'videos' is not supported; remove the record"),
        ({**GOOD, "audio": "x.wav"}, "line 2: 'audio' is not supported; remove the record"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_key(tmp_path, record, message):
    sets = read_meta(write_set(tmp_path, [GOOD, record]), 12)
    assert sets[0][0].chosen == GOOD["chosen"]
    with pytest.raises(InputError, match=message):
        sets[0][1]


def test_lines_that_only_a_carriage_return_ends_are_told_with_the_remedy(tmp_path):
    meta = write_set(tmp_path, [])
    (tmp_path / "a.jsonl").write_bytes(b"\r".join([json.dumps(GOOD).encode()] * 3))
    remedy = r"a.jsonl line 1: .*write one object a line, ended by \\n"
    with pytest.raises(InputError, match=remedy):
        read_meta(meta, 12)[0][0]


def test_a_line_separator_within_a_text_ends_no_record(tmp_path):
    odd = {**GOOD, "chosen": "one\u2028two\x85three"}
    meta = write_set(tmp_path, [json.dumps(odd, ensure_ascii=False), GOOD])
    (data_set,) = read_meta(meta, 12)
    assert len(data_set) == 2 and data_set[0].chosen == odd["chosen"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"annotation": "b.jsonl"}, "no file .*b.jsonl"),
        ({"annotation": "a.json"}, "no file .*a.json"),
        ({"annotation": ["a.jsonl"]}, "'annotation' must be str, got"),
        ({"annotation": "fifo.jsonl"}, "no file .*fifo.jsonl"),
        ({"root": None}, "'root' must be str, got None"),
        ({"root": 3}, "'root' must be str, got 3"),
        ({"repeat_time": -1}, "repeat_time must be >= 0 .* got -1"),
        ({"repeat_time": "often"}, "'repeat_time' must be float, got 'often'"),
        ({"repeat_time": "1/0"}, "'repeat_time' must be float, got '1/0'"),
        ({"repeat_time": "1e99999999"}, "'repeat_time' must be float, got '1e99999999'"),
        ({"repeat_time": "nan"}, "'repeat_time' must be float"),
        ({"repeat_time": float("nan")}, "repeat_time must be >= 0 .* got nan"),
        ({"repeat_time": 10**400}, "repeat_time must be >= 0 .* got 1000"),
        ({"repeat_time": 2e6}, "repeat_time must be >= 0 and <= 1e\\+06, got 2000000.0"),
        ({"repeat_time": True}, "'repeat_time' must be"),
        ({"repeat_time": [1]}, "'repeat_time' must be"),
        ({"data_augment": "false"}, "'data_augment' must be bool, got 'false'"),
        ({"data_augment": 1}, "'data_augment' must be bool, got 1"),
        ({"length": "5"}, "'length' must be"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch must be >= 1"),
        ({"max_dynamic_patch": 3000}, "max_dynamic_patch must be .*<= 128"),
        ({"max_dynamic_patch": 2.5}, "'max_dynamic_patch' must be"),
    ],
)
def test_a_bad_entry_of_meta_json_is_named(tmp_path, entry, message):
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(InputError, match=f"meta.json: a: .*{message}"):
        read_meta(write_set(tmp_path, [GOOD], **entry), 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file .*meta.json"),
        (
            '[{"question": "q"}]',
            "no data set .name -> entry. in it; see tools/convert.py",
        ),
        ("{}", "no data set"),
        ('{"question": "q", "chosen": "a", "rejected": "b"}', "no data set"),
        ('{"a": 3}', "meta.json: a must be dict, got 3"),
        ('{"a": {}}', "meta.json: a: no 'annotation'"),
        ('{"a": {"annotation": "a.jsonl"}, "a": {}}', "the key 'a' stands there twice"),
        ('{"a": ' + "[" * 100_000, "not valid JSON"),
        ("{", "not valid JSON"),
    ],
)
def test_meta_json_itself_may_be_missing_or_broken(tmp_path, text, message):
    if text is not None:
        (tmp_path / "meta.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_meta(tmp_path / "meta.json", 12)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_table_of_pairs_is_for_the_converter(tmp_path, ending):
    (tmp_path / f"pairs.{ending}").write_bytes(b"question,chosen,rejected\n")
    with pytest.raises(InputError, match=f"pairs.{ending}: .*see tools/convert.py"):
        read_meta(tmp_path / f"pairs.{ending}", 12)


def test_a_byte_order_mark_is_taken_and_repeat_time_is_1_unless_said(tmp_path):
    meta = write_set(tmp_path, [GOOD])
    entry = {"a": {"annotation": "a.jsonl"}}
    meta.write_bytes(b"\xef\xbb\xbf" + json.dumps(entry).encode())
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    (data_set,) = read_meta(meta, 12)
    assert data_set.repeat_time == 1 and data_set[0].chosen == GOOD["chosen"]


def test_a_key_of_an_entry_that_nothing_reads_is_a_warning(tmp_path, capsys):
    read_meta(write_set(tmp_path, [GOOD], repeat_times=2), 12)
    assert "a: 'repeat_times' is not read" in capsys.readouterr().err


@pytest.mark.parametrize("length", [0, 2, 10**6])
def test_another_length_than_the_file_has_is_a_warning(tmp_path, capsys, length):
    assert len(read_meta(write_set(tmp_path, [GOOD], length=length), 12)[0]) == 1
    assert f"a: length says {length}, " in capsys.readouterr().err
    read_meta(write_set(tmp_path, [GOOD], length=1), 12)
    assert capsys.readouterr().err == ""


def test_paths_found_by_their_tails_hide_no_other_warning(tmp_path, capsys):
    entry, meta = json.loads(write_set(tmp_path, [GOOD]).read_text()), tmp_path / "meta.json"
    (entry,) = entry.values()
    entry["annotation"] = f"/their/disk/{entry['annotation']}"
    sets = dict.fromkeys("abcde", entry) | {"odd": entry | {"length": 9, "repeats": 2}}
    meta.write_text(json.dumps(sets))
    read_meta(meta, 12)
    told = capsys.readouterr().err
    assert "odd: length says 9, " in told and "odd: 'repeats' is not read" in told
    assert told.count("found by its tail") == 3 and "..." in told


# --------------------------------------------------------------------------- MMPR as published


@pytest.mark.parametrize(
    ("annotation", "root"),
    [
        ("annotations/x.jsonl", "images/ai2d"),  # v1.1
        ("MMPR-v1.2/annotations/x.jsonl", "MMPR-v1.2/images/ai2d"),
        (
            "/mnt/petrelfs/someone/MMPR/annotations/x.jsonl",
            "/mnt/petrelfs/someone/MMPR/images/ai2d/",
        ),
    ],
)
@pytest.mark.parametrize("above", [False, True], ids=["from its folder", "from above"])
def test_mmpr_loads_where_it_was_unpacked(tmp_path, monkeypatch, capsys, annotation, root, above):
    folder = tmp_path / "MMPR-v1.2"
    for name in ("annotations", "images/ai2d"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images/ai2d/1.png")
    (folder / "annotations/x.jsonl").write_text(json.dumps({**GOOD, "image": "1.png"}))
    entry = {"annotation": annotation, "root": root, "repeat_time": 0.5, "length": 1}
    (folder / "meta.json").write_text(json.dumps({"ai2d_correctness_rules": entry}))
    monkeypatch.chdir(tmp_path if above else folder)
    record = read_meta(folder / "meta.json", 12)[0][0]
    assert record.images[0].samefile(folder / "images/ai2d/1.png")
    by_tail = "found by its tail as" in capsys.readouterr().err
    assert by_tail == (annotation.startswith("/") or (annotation.startswith("MMPR") and not above))


def test_the_longest_tail_is_taken_and_two_different_ones_are_an_error(tmp_path):
    meta = tmp_path / "meta.json"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.jsonl").write_text("")
    notes = []
    assert find_beside(meta, "/x/a/b/c.jsonl", "set", notes) == tmp_path / "b/c.jsonl"
    assert notes == [f"set: /x/a/b/c.jsonl found by its tail as {tmp_path}/b/c.jsonl"]
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(InputError, match="could be .*b/c.jsonl or .*c.jsonl; write which"):
        find_beside(meta, "/x/a/b/c.jsonl", "set", notes)
    assert find_beside(meta, "/x/d.jsonl", "set", notes).name == "d.jsonl"  # nowhere: named later
    (tmp_path / "d.jsonl").write_text("")
    below = tmp_path / "b/meta.json"
    assert not find_beside(below, "/x/../d.jsonl", "set", notes).exists()  # its tail leaves b


def test_a_bare_jsonl_is_one_data_set_with_its_images_beside_it(tmp_path):
    write_set(tmp_path, [GOOD, {**GOOD, "image": "x.png"}])
    [data_set] = read_meta(tmp_path / "a.jsonl", 6)
    assert (data_set.name, len(data_set), data_set.repeat_time) == ("a", 2, 1)
    assert data_set[1].images == (tmp_path / "x.png",) and data_set[1].max_tiles == 6


def test_lines_of_any_length_are_read_in_any_order(tmp_path):
    texts = ["x" * (n * 7919 % 70_000) for n in range(60)]  # a read takes 32 KiB or a line
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n, "x": x}) + "\n\n" for n, x in enumerate(texts)))
    lines = JsonLines(path)
    for n in [*range(60), *reversed(range(60)), *(n * 37 % 60 for n in range(60))]:
        assert lines[n].record() == {"n": n, "x": texts[n]}
        assert str(lines[n]) == f"{path} line {2 * n + 1}"
