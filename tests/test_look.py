"""What is told about preference data before anyone trains on it."""

import base64
import io
import json
import shutil
import sys

import pytest
from PIL import Image
from test_data import GOOD, write_set

from runtime import run
from tools import look
from toy import write_world

EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small toy world."""
    folder = tmp_path_factory.mktemp("toy")
    write_world(folder, 16, 0)
    return folder


@pytest.fixture
def run_look(monkeypatch, capsys):
    """look.py with some words: (exit status, what it prints)."""

    def run_with(*words):
        monkeypatch.setattr(sys, "argv", ["look.py", *map(str, words)])
        status = 0
        try:
            run(look.main)
        except SystemExit as stop:
            status = stop.code
        output = capsys.readouterr()
        return status, output.out + output.err

    return run_with


def test_check_passes_a_good_set_and_lists_the_bad_records(toy, tmp_path, run_look):
    status, out = run_look("check", toy / "meta.json", "--model_dir", toy / "model")
    assert status == 0 and "0 are bad" in out and "tiles a record" in out
    (tmp_path / "broken.png").write_bytes(b"x")
    records = [GOOD, {**GOOD, "image": "broken.png"}, {**GOOD, "image": "none.png"}]
    meta = write_set(tmp_path, records)
    status, out = run_look("check", meta, "--model_dir", toy / "model")
    assert status == 1
    assert "bad: a, " in out and "line 2: image" in out and "line 3: no image" in out, out
    assert "3 records: 1 can be read, 2 are bad" in out


@pytest.mark.parametrize("verb", ["check", "show", "show --out page.html", "stats"])
def test_data_without_a_pair_is_told(verb, toy, tmp_path, run_look):
    verb, *words = verb.split()
    status, out = run_look(verb, write_set(tmp_path, []), "--model_dir", toy / "model", *words)
    assert status == 2 and "meta.json: no pairs" in out


def test_any_number_of_workers_prints_the_same(toy, tmp_path, run_look):
    texts = [{**GOOD, "chosen": f"{GOOD['chosen']} {n}"} for n in range(120)]
    texts[110] = {**texts[110], "image": "none.png"}
    meta = write_set(tmp_path, texts)
    for words in (("check", meta, "--model_dir", toy / "model"), ("stats", meta)):
        one, three = (run_look(*words, "--workers", n) for n in (1, 3))
        assert one == three and one[0] == (words[0] == "check")


def test_check_names_flat_images_and_records_that_are_too_long(toy, tmp_path, run_look):
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    long = {**GOOD, "chosen": GOOD["chosen"] + " It is so." * 20}
    meta = write_set(tmp_path, [{**GOOD, "image": "white.png"}, long])
    status, out = run_look("check", meta, "--model_dir", toy / "model", "--max_length", 50)
    assert status == 0 and "2 records: 2 can be read, 0 are bad" in out
    assert "line 1: image" in out and "white.png is of one colour" in out
    assert "line 2: " in out and " tokens, more than 50" in out
    assert "1 records are longer than 50 tokens" in out


def test_check_uses_the_length_that_training_uses_and_names_set_and_line(toy, tmp_path, run_look):
    shutil.copytree(toy / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 50
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    long, cut = {**GOOD, "chosen": "It is so. " * 40}, {**GOOD, "image": "cut.png"}
    (tmp_path / "cut.png").write_bytes(sorted((toy / "images").glob("*.png"))[0].read_bytes()[:70])
    meta = write_set(tmp_path, [long, cut])
    status, out = run_look("check", meta, "--model_dir", tmp_path / "model")
    assert status == 1 and "1 records are longer than 50 tokens" in out
    assert "bad: a, " in out and "line 2: image" in out, out


def test_check_counts_a_pair_that_no_pack_holds_though_each_response_keeps_the_limit(
    toy, tmp_path, run_look
):
    shutil.copytree(toy / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 8192
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    long = {**GOOD, "chosen": "It is so. " * 1200, "rejected": "It is so. " * 1201}
    words = ("check", write_set(tmp_path, [GOOD, long]), "--model_dir", tmp_path / "model")
    status, out = run_look(*words, "--max_length", 8192)
    assert status == 0, out
    assert out.count("look: ") == 1 and " tokens, more than 8192" in out
    assert "1 records are longer than 8192 tokens, or with both answers than 8192" in out


def test_show_tells_prompt_and_responses_apart(toy, run_look):
    words = ("show", toy / "meta.json", "--model_dir", toy / "model", "--limit", 4)
    status, out = run_look(*words)
    assert status == 0 and out.count("  chosen | ") >= 4
    assert "masked | " in out and "rejected | " in out
    assert "<IMG_CONTEXT> x " in out and "<|im_end|>" in out


def test_a_response_that_never_ended_is_shown_and_counted_as_one(toy, tmp_path, run_look):
    meta = write_set(tmp_path, [{**GOOD, "cut_off": True, "answer_gt": None}])
    _, out = run_look("show", meta, "--model_dir", toy / "model")
    chosen, rejected = (line for line in out.splitlines() if "scored tokens, " in line)
    assert chosen.endswith("the last is <|im_end|>") and rejected.endswith("it never ended")
    _, out = run_look("stats", meta)
    row = next(line for line in out.splitlines() if line.startswith("without gold "))
    assert " 1 (100.0%) " in row, row


def test_control_characters_of_the_data_are_spelled_out():
    assert look.mark("chosen", "a\x1b[31m\tb\x9b\n猫") == (
        "  chosen | a\\x1b[31m\tb\\x9b\n  chosen | 猫"
    )


def gold_pairs(tmp_path):
    """meta.json of pairs with gold answers and pictures."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    rows = [
        {**GOOD, "image": "0.png", "rejected": f"It is {n}.", "answer_gt": "3"}
        for n in range(4, 12)
    ]
    return write_set(tmp_path, rows)


def test_stats_stand_beside_the_papers_table(tmp_path, run_look):
    meta = gold_pairs(tmp_path)
    status, text = run_look("stats", meta)
    assert status == 0 and "about 2.5M" in text and "350.5 (33 to 4097)" in text
    assert "with gold: pairs a question {8: 1}" in text
    row = next(line for line in text.splitlines() if line.startswith("with gold  "))
    assert row.split("  ")[-1].strip() == "0 (0.0%)", "missing an image"
    assert " 8 " in row and " 3.0 (3 to 3) " in row


@pytest.mark.parametrize(
    ("name", "kind", "gold"),
    [
        ("m3cot_train_extracted_pairs_vqa_correctness_rules", "correctness", "with gold"),
        ("nlvr2_en_20240910_ov_pairs_vqa_format_rules", "format", "with gold"),
        ("m3cot_train_extracted_pairs_vqa_direct_rules", "direct", "with gold"),
        ("gqa_train_en_20240402_extracted_prefix_pair_sr0.0_with_image", "prefix_pair", None),
        ("RLAIF-V-Dataset_sr0.5_wo_image", "prefix_pair", None),
        ("own_pairs", "with gold", "with gold"),
    ],
)
def test_the_data_sets_of_mmpr_are_told_by_their_names(name, kind, gold):
    assert look.kinds_of(name, {"answer_gt": "3"}) == (gold or "without gold", kind)


def test_stats_say_how_a_data_set_was_made_and_how_many_pairs_have_several_images(
    tmp_path, run_look
):
    one = {**GOOD, "answer_gt": "3", "image": "0.png"}
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    meta = write_set(tmp_path, [one, {**one, "image": ["0.png", "0.png"], "rejected": "9"}])
    meta.write_text(meta.read_text().replace('"a":', '"x_pairs_vqa_direct_rules":'))
    status, text = run_look("stats", meta)
    row = next(line.split() for line in text.splitlines() if line.startswith("x_pairs"))
    assert status == 0 and row[:6] == "x_pairs_vqa_direct_rules / direct / none 2".split()
    assert row[-4:] == ["1", "(50.0%)", "0", "(0.0%)"], "several images, none missing"


def test_the_page_is_self_contained_escaped_and_marks_where_responses_part(tmp_path, run_look):
    record = {"question": EVIL, "chosen": "Same start, right", "rejected": f"Same start, {EVIL}"}
    record |= {"answer_gt": EVIL, "chosen_meta": {"verdict": "correct"}}
    meta = write_set(tmp_path, [record])
    meta.write_text(meta.read_text().replace('"a":', json.dumps(f"set{EVIL}") + ":"))
    assert run_look("show", meta, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert EVIL not in page and page.count("&lt;script&gt;") >= 4
    assert "Same start, <mark>right</mark>" in page
    assert "http:" not in page and "https:" not in page and "verdict: correct" in page


def test_boxes_of_grounding_marks_are_drawn_on_the_picture(tmp_path):
    Image.new("RGB", (100, 100), "white").save(tmp_path / "a.png")
    marked = "<ref>a cat</ref><box>[[100, 200, 500,600], [0, 0, 90, 90]]</box>"
    raw = {"question": "q", "chosen": marked, "rejected": "[[1, 2, 3, 4]] <box>[[9,9]]</box>"}
    assert look.BOX.findall(marked) == [("100", "200", "500", "600"), ("0", "0", "90", "90")]
    assert not look.BOX.findall(raw["rejected"])
    drawn, plain = (look.picture(tmp_path / "a.png", r) for r in (raw, {**raw, "chosen": ""}))
    pixels = Image.open(io.BytesIO(base64.b64decode(drawn.split("base64,")[1].split('"')[0])))
    red, green, _ = pixels.getpixel((10, 40))  # the left side of the first box
    assert drawn != plain and green > red + 40


def test_no_more_records_are_shown_than_asked(toy, tmp_path, run_look):
    words = ("show", toy / "meta.json", "--model_dir", toy / "model")
    meta = json.loads((toy / "meta.json").read_text())
    for limit in (1, 3, 1000):
        _, out = run_look(*words, "--limit", limit)
        total = sum(entry["length"] for entry in meta.values())
        assert out.count("=== ") == min(limit, total)
        _, out = run_look(*words, "--limit", limit, "--out", tmp_path / "page.html")
        assert f" {min(limit, total)} of {total} pairs" in out


def test_records_that_no_epoch_draws_are_shown(toy, tmp_path, run_look):
    meta = write_set(tmp_path, [GOOD], repeat_time=0)
    status, out = run_look("show", meta, "--model_dir", toy / "model")
    assert status == 0 and out.count("  chosen | ") == 1


def test_the_page_names_the_record_of_a_broken_picture(tmp_path, run_look):
    (tmp_path / "broken.png").write_bytes(b"x")
    meta = write_set(tmp_path, [{**GOOD, "image": "broken.png"}])
    status, out = run_look("show", meta, "--out", tmp_path / "page.html")
    assert status == 2 and "line 1: image " in out and not (tmp_path / "page.html").exists()


def test_the_page_holds_small_pictures(tmp_path, run_look):
    words = ("--out", tmp_path / "page.html", "--limit", 6)
    status, out = run_look("show", gold_pairs(tmp_path), *words)
    page = (tmp_path / "page.html").read_text()
    data = base64.b64decode(page.split("data:image/jpeg;base64,")[1].split('"')[0])
    assert status == 0 and "6 of 8 pairs" in out
    assert data.startswith(b"\xff\xd8") and page.count("<article") == 6
