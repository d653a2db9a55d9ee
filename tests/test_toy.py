"""The toy world: real formats, learnable, and the same for the same seed."""

import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import forkserver

import numpy as np
import pytest
from conftest import run_forks
from PIL import Image

import toy as toy_module
from model import load_config
from runtime import InputError, read_jsonl, write_atomic
from tokenizer import load_tokenizer
from toy import (
    COLOURS,
    RATES,
    SHAPES,
    TINY,
    CommandFailed,
    Question,
    Story,
    Thing,
    ToyConfig,
    World,
    chain_of_thought,
    describe,
    draw,
    hallucination,
    random_things,
    run_processes,
    write_lessons,
    write_model,
    write_world,
)
from train import ROWS
from vision import preprocess
from weights import load_model


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


def test_the_vocabulary_is_odd_as_the_real_one(toy):
    assert load_config(toy / "model").llm.vocab_size % 2 == 1


def test_one_image_token_looks_at_one_cell(toy):
    config = load_config(toy / "model")
    assert config.tokens_per_tile == 9
    square = Image.open(next((toy / "images").glob("square-*.png")))
    wide = Image.open(next((toy / "images").glob("wide-*.png")))
    assert square.size == (24, 24) and wide.size == (48, 24)


def test_questions_count_objects_of_any_of_their_words():
    things = [
        Thing(0, 0, "red", "circle"),
        Thing(1, 0, "blue", "cross"),
        Thing(2, 0, "red", "cross"),
        Thing(1, 1, "green", "cross"),
    ]
    assert len(Question(("red",)).matches(things)) == 2
    assert len(Question(("red", "blue")).matches(things)) == 3
    assert Question(("red", "blue")).text == ("How many red and blue objects are there in total?")


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


def test_pictures_hold_three_to_seven_objects_in_different_cells(tmp_path):
    world = World(tmp_path, 0)
    for n in range(50):
        _, things, rng = world.picture("square", n)
        assert 3 <= len(things) <= 7
        assert len({(t.col, t.row) for t in things}) == len(things)
        assert all(t.col < 6 for t in random_things(rng, 6))


# --------------------------------------------------------------------------- the story

SMALL = replace(TINY, pictures=12, dev=4, test=5, questions=6, direct_questions=3, described=4)


def test_a_model_that_sees_starts_with_the_words_of_every_cell(tmp_path):
    write_model(tmp_path, 3, sees=True)
    model, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    words = model.language_model.model.tok_embeddings.weight
    places = [f"{col}{row}" for row in "123" for col in "abc"]
    rng, found = np.random.default_rng(9), []
    for _ in range(20):
        things = random_things(rng)
        cells = model.image_features(preprocess(draw(things, rng), 1, 24))[0]
        for thing in things:
            for names, right in zip((places, COLOURS, SHAPES), thing.words.split()):
                near = words[[tokenizer.token_id(f" {n}") for n in names]]
                near = near @ cells[thing.row * 3 + thing.col] / near.norm(dim=1)
                found.append(list(names)[near.argmax()] == right)
    assert sum(found) / len(found) > 0.97


def test_lessons_development_and_test_questions_share_no_picture(tmp_path):
    write_lessons(tmp_path, 1, replace(SMALL, wide=0.5))
    splits = ("direct", "steps", "dev", "tune", "test", "new")
    shown = {
        split: {r["image"] for _, r in read_jsonl(tmp_path / f"{split}.jsonl")} for split in splits
    }
    assert shown["direct"] == shown["steps"]  # several lessons a picture
    apart = [shown[split] for split in splits[1:]]
    assert sum(map(len, apart)) == len(set().union(*apart)) == 12 + 4 + 20 + 5 + 6
    assert any("wide" in name for name in shown["test"])
    assert load_config(tmp_path / "model").max_tiles >= 2


def test_habits_are_of_the_lessons_alone(tmp_path):
    write_lessons(tmp_path, 1, replace(SMALL, habit=1.0))
    truth = json.loads((tmp_path / "truth.json").read_text())

    def usual(split):
        words = [w for image, all_ in truth.items() if image.startswith(split) for w in all_]
        return {tuple(w.split()[1:]) in set(zip(COLOURS, SHAPES)) for w in words}

    assert usual("lesson") == {True}
    assert usual("test") == usual("new") == {True, False}


def test_hallucination_counts_answers_and_mentions_of_what_is_not_there():
    red, blue = Thing(0, 0, "red", "circle"), Thing(1, 2, "blue", "cross")
    truth = {"a.png": [red.words], "b.png": [red.words, blue.words]}
    said = [("a.png", describe([red, blue])), ("b.png", chain_of_thought([red, blue]))]
    assert hallucination(said, truth) == {"responses": 50.0, "mentions": 25.0, "n": 2}
    assert hallucination([("a.png", describe([]))], truth)["mentions"] == 0


def test_a_script_that_fails_ends_the_story_with_its_command_and_last_lines(tmp_path):
    story = Story(ToyConfig(out=tmp_path, story=True, tiny=True, seeds=(1,), jobs=1))
    with pytest.raises(CommandFailed, match=r"(?s)train.py --lss=mpo.*log.txt.*unknown flag --lss"):
        story.call(tmp_path / "log", "train.py", lss="mpo")


def play_without_scripts(out):
    """The story of two seeds in one of its processes; in place of scripts their calls are noted."""
    story, calls = Story(ToyConfig(out=out, story=True, tiny=True, seeds=(1, 2))), []
    scores = {setting: {"score": 60.0, "malformed": 0.0} for setting in ("direct", "cot")}

    def call(folder, script, *verb, **flags):
        calls.append([str(folder), script, *verb])
        story.together()

    def pairs(seed):
        sets = {"counts": {}, "responses": 1, "pairs": {"random": 1}}
        report = {"correctness": {"sets": {"new": sets, "new_direct": sets}}}
        if story.rank == 0:
            write_atomic(story.of(seed) / "pairs/pairs.report.json", json.dumps(report))
        story.together()

    def write_late(path, records):
        time.sleep(0.3)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def evaluate(model, folder, seed, split, settings=("direct", "cot")):
        return {setting: scores[setting] for setting in settings}

    toy_module.write_lines, toy_module.write_lessons = write_late, lambda *how: None
    story.call, story.pairs, story.evaluate = call, pairs, evaluate
    story.describe, story.dropout = lambda *how: [], lambda seed, ratio: {}
    story.truth, story.tell_result = lambda seed: {}, lambda: None
    story.play()
    (out / f"calls-{story.rank}.json").write_text(json.dumps(calls))


def test_two_processes_play_the_story_in_one_order_though_one_writes_late(tmp_path):
    run_forks(2, play_without_scripts, tmp_path)
    first, second = (json.loads((tmp_path / f"calls-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    trained = [folder.removeprefix(f"{tmp_path}/") for folder, script in first]
    rows = [f"seed-{seed}/rows/{name}" for seed in (1, 2) for name in ("SFT", "DPO")]
    base = ["base", "base", "rows/MPO"]
    assert trained == [f"seed-{seed}/{name}" for seed in (1, 2) for name in base] + rows


def test_every_row_is_tried_at_three_rates_and_the_best_mean_is_chosen(tmp_path):
    story = Story(ToyConfig(out=tmp_path, story=True, tune=True, seeds=(100,)))
    story.start()

    def measured(name, folder, more, direct, cot):
        tune = {"direct": {"score": direct}, "cot": {"score": cot}}
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"tune": tune} | more))

    low, high = RATES[1:-1]
    for task in story.tasks(100):  # DPO is better at the lower rate, all others at the higher one
        better = task[2]["flags"]["lr"] == (low if task[0] == "DPO" else high)
        measured(*task, 60 + better, 50)
    beyond = {task[0]: task[2]["flags"]["lr"] for task in story.beyond(100)}
    assert beyond == dict.fromkeys(ROWS, RATES[-1]) | {"DPO": RATES[0]}
    for task in story.beyond(100):
        measured(*task, 60, 52 if task[0] == "DPO" else 40)
    story.write_tuning(100)
    told = json.loads((tmp_path / "tuning.json").read_text())
    assert {n: row["chosen"] for n, row in told["rows"].items()} == dict.fromkeys(ROWS, high) | {
        "DPO": RATES[0]
    }
    assert told["rows"]["DPO"]["Direct, CoT"] == {"0.0001": [60, 52], "0.0003": [61, 50],
                                                  "0.001": [60, 50]}  # fmt: skip


def test_commands_that_end_at_the_same_time_keep_their_exit_status(monkeypatch):
    context = multiprocessing.get_context("forkserver")
    read = forkserver.read_signed
    monkeypatch.setattr(forkserver, "read_signed", lambda pipe: (time.sleep(0.02), read(pipe))[1])

    def play_rows(_):
        forks = [context.Process(target=time.sleep, args=(0.01,)) for _ in range(10)]
        for fork in forks:
            run_processes([fork])
        return forks

    with ThreadPoolExecutor(3) as pool:
        forks = sum(pool.map(play_rows, range(3)), [])
    assert [fork.exitcode for fork in forks] == [0] * len(forks)


def test_a_folder_holds_one_setting_of_the_story(tmp_path):
    cfg = ToyConfig(out=tmp_path, story=True, tiny=True, seeds=(1,))
    Story(cfg).start()
    Story(cfg).start()
    with pytest.raises(InputError, match=r"another pictures \(400, now 3000\): pass another --out"):
        Story(replace(cfg, tiny=False, quick=True)).start()


def test_a_story_refused_leaves_nothing_behind(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    story = ToyConfig(out=tmp_path / "story", story=True, tiny=True, mine=tmp_path / "mine.py")
    with pytest.raises(InputError, match="defines no public function"):
        Story(replace(story, seeds=(1,))).play()
    assert not (tmp_path / "story").exists()
    for wrong in ({"steps": -5}, {"seeds": (1, 1)}, {"seeds": (-1,)}, {"jobs": 0}, {"noise": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must "):
            replace(story, **wrong)
