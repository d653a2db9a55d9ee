"""The toy world: real formats, learnable, and the same for the same seed."""

import json
import shlex

import pytest
from PIL import Image

from config import load_config
from runtime import InputError, read_jsonl
from tokenizer import load_tokenizer
from toy import Question, Thing, World, main, random_things, write_world


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_world(folder, 64, 0)
    return folder


def records(toy):
    return [r for path in sorted(toy.glob("*.jsonl")) for _, r in read_jsonl(path)]


def test_every_text_of_the_world_is_in_its_vocabulary(toy):
    tokenizer = load_tokenizer(toy / "model")
    unknown = tokenizer.token_id("<unk>")
    texts = {load_config(toy / "model").system_message}
    texts |= {r[key] for r in records(toy) for key in ("question", "chosen", "rejected")}
    for text in texts:
        for part in text.split("<image>"):
            ids = tokenizer.encode_plain(part)
            assert unknown not in ids, (part, ids)
            assert tokenizer.decode(ids) == part


def test_chosen_and_rejected_differ_in_their_answer(toy):
    for r in records(toy):
        assert r["chosen"].split("\n")[-1] != r["rejected"].split("\n")[-1], r


def test_one_image_token_looks_at_one_cell_and_the_vocabulary_is_odd_as_the_real_one(toy):
    config = load_config(toy / "model")
    assert config.tokens_per_tile == 9 and config.llm.vocab_size % 2 == 1
    for kind, size in (("square", (24, 24)), ("wide", (48, 24))):
        assert Image.open(next((toy / "images").glob(f"{kind}-*.png"))).size == size


def test_questions_count_objects_of_any_of_their_words():
    kinds = [("red", "circle"), ("blue", "cross"), ("red", "cross"), ("green", "cross")]
    things = [Thing(i % 3, i // 3, *kind) for i, kind in enumerate(kinds)]
    assert len(Question(("red",)).matches(things)) == 2
    assert len(Question(("red", "blue")).matches(things)) == 3
    assert Question(("red", "blue")).text == "How many red and blue objects are there in total?"


def test_the_same_seed_writes_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_world(tmp_path / name, 8, seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 20
    for file in files:
        if file.name != "train.json":  # holds the folder's name
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    pairs = "toy_steps.jsonl"
    assert (tmp_path / "a" / pairs).read_bytes() != (tmp_path / "c" / pairs).read_bytes()
    assert json.loads((tmp_path / "a" / "train.json").read_text())["loss"] == "mpo"


def test_a_folder_of_other_files_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path), "--pairs", "8"])
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="meta.json is no earlier toy's; pass another"):
        main()
    (tmp_path / "meta.json").rename(tmp_path / "notes.json")
    (tmp_path / "story").mkdir()  # paper.story has the same default folder
    main()
    main()  # over its own


def test_a_toy_that_was_stopped_is_written_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path), "--pairs", "8"])
    for name in ("write_tensors", "write_sets"):
        with monkeypatch.context() as patch:
            patch.setattr(f"toy.{name}", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                main()
    main()
    assert (tmp_path / "train.json").is_file()


def test_pictures_hold_three_to_seven_objects_in_different_cells(tmp_path):
    world = World(tmp_path, 0)
    for n in range(50):
        _, things, rng = world.picture("square", n)
        assert 3 <= len(things) <= 7
        assert len({(t.col, t.row) for t in things}) == len(things)
        assert all(t.col < 6 for t in random_things(rng, 6))


def test_the_command_that_comes_next_may_be_copied_whatever_the_folder_is_called(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "my wörld"
    monkeypatch.setattr("sys.argv", ["toy.py", f"--out={out}", "--pairs=16"])
    main()
    command = capsys.readouterr().out.partition("next: ")[2]
    assert shlex.split(command) == ["python", "train.py", "--config", str(out / "train.json")]
