"""The story: its lessons, its tasks, and the worker processes that share them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from paper import stages
from paper.report import PAPER, WITH_NTP
from paper.story import ABLATIONS, RATES, TINY, Seed, StoryConfig, begin, tasks_of
from runtime import Failure, InputError, parse_cli, read_jsonl, write_json
from tokenizer import load_tokenizer
from tools.sweep import ROWS
from tools.workers import Task, run_tasks
from toy import COLOURS, SHAPES, Thing, World, chain_of_thought, draw, random_things
from vision import preprocess
from weights import load_model

SMALL = replace(TINY, pictures=12, dev=4, test=5, questions=6, direct_questions=3, described=4)


# --------------------------------------------------------------------------- lessons


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    stages.write_lessons(Seed(1, folder, SMALL, quick=True, mine=None))
    return folder


def test_a_model_that_sees_starts_with_the_words_of_every_cell(lessons):
    model, tokenizer = load_model(lessons / "model"), load_tokenizer(lessons / "model")
    words = model.language_model.model.tok_embeddings.weight
    places = [f"{col}{row}" for row in "123" for col in "abc"]
    rng, right = np.random.default_rng(9), []
    for _ in range(20):
        things = random_things(rng)
        cells = model.image_features(preprocess(draw(things, rng), 1, 24))[0]
        for thing in things:
            for names, word in zip((places, COLOURS, SHAPES), thing.words.split()):
                near = words[[tokenizer.token_id(f" {n}") for n in names]]
                near = near @ cells[thing.row * 3 + thing.col] / near.norm(dim=1)
                right.append(list(names)[near.argmax()] == word)
    assert sum(right) / len(right) > 0.97


def test_lessons_development_and_test_questions_share_no_picture(lessons):
    splits = ("direct", "steps", "dev", "test", "new")
    shown = {
        split: {r["image"] for _, r in read_jsonl(lessons / f"{split}.jsonl")} for split in splits
    }
    assert shown["direct"] == shown["steps"]  # several lessons a picture
    apart = [shown[split] for split in splits[1:]]
    assert sum(map(len, apart)) == len(set().union(*apart)) == 12 + 4 + 5 + 6


def test_mentions_of_what_is_not_there_are_counted(lessons):
    seed = Seed(1, lessons, SMALL, quick=True, mine=None)
    _, things, _ = World(lessons, 1).picture("test", 3)
    absent = [Thing(0, 0, colour, "cross") for colour in COLOURS]
    added = next(thing for thing in absent if thing not in things)
    texts = [stages.describe(things), chain_of_thought([*things, added])]
    rows = [{"image": "test-00003.png", "response": text} for text in texts]
    assert stages.made_up(seed, rows, "response") == 100 / (2 * len(things) + 1)
    nothing = [{"image": "test-00003.png", "response": stages.describe([])}]
    assert stages.made_up(seed, nothing, "response") == 0


# --------------------------------------------------------------------------- tasks


def test_a_story_has_every_row_of_the_paper_and_tuning_tries_each_at_every_rate(tmp_path):
    def rows(**flags):
        tasks = tasks_of(StoryConfig(out=tmp_path, seeds=(7,), **flags), 7)
        return [task.name[7:] for task in tasks if task.function.endswith("train_row")]

    assert set(PAPER) == {"base", *ROWS}
    assert rows(quick=True) == ["MPO", "SFT", "DPO"]
    made = [{t.name: t.made.name for t in tasks_of(StoryConfig(quick=q), 1)} for q in (True, False)]
    assert [of["seed 1 SFT"] for of in made] == ["result.json", "mentions.json"]  # measured further
    assert rows()[0] == "MPO" and set(rows()) == {*ROWS, WITH_NTP}
    tried = {f"{row}: lr={lr:g}" for row in (*ROWS, WITH_NTP) for lr in RATES}
    assert set(rows(tune=True)) == {*rows(), *tried}
    assert rows(quick=True, ablate=True)[3:] == list(ABLATIONS) and "w_p : w_q=9:1" in ABLATIONS


def test_the_committed_rates_are_those_that_tuning_found_best():
    tuning = json.loads((ROOT / "paper/tuning.json").read_text())
    assert set(tuning["rows"]) == set(ROWS)
    for row, tried in tuning["rows"].items():
        means = {float(lr): sum(both) for lr, both in tried["Direct, CoT"].items()}
        assert len(means) == 3 and set(means) < set(RATES), row  # as many for every row
        assert means[tried["chosen"]] == max(means.values()), row


def test_a_folder_holds_one_setting_of_the_story(tmp_path):
    cfg = StoryConfig(out=tmp_path, tiny=True, seeds=(1,))
    begin(cfg)
    begin(cfg)
    with pytest.raises(InputError, match=r"another pictures \(200, now 4000\); pass another --out"):
        begin(replace(cfg, tiny=False, quick=True))


# --------------------------------------------------------------------------- workers


def stand_in(folder, name, *needs, action=""):
    return Task(name, "stand_in:note", (folder, name, action), folder / name, needs)


def played(folder):
    return [line.split()[0] for line in (folder / "order.txt").read_text().splitlines()]


def test_a_task_waits_for_what_it_needs_and_is_done_once(tmp_path, capfd):
    tasks = [
        stand_in(tmp_path, "last", "a", "b"),
        stand_in(tmp_path, "a"),
        stand_in(tmp_path, "b", "a"),
    ]
    run_tasks(tasks, 2)
    assert played(tmp_path) == ["a", "b", "last"]
    first, *_, end = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"0:00:0\d  0 of 3 done, 0:00:\d\d left  a: started", first)
    assert "3 of 3 done, 0:00:00 left  last: last was played" in end
    (tmp_path / "b").unlink()
    run_tasks(tasks, 2)
    assert played(tmp_path) == ["a", "b", "last", "b"]
    assert "2 of 3 tasks were done before" in capfd.readouterr().out


@pytest.mark.parametrize("action, words", [
    ("fail", r"bad: ValueError: no luck \(see .*log.txt\)"),
    ("die", r"a process was killed \(memory\?\) during slow, bad; start this again"),
])  # fmt: skip
def test_a_task_that_fails_ends_the_story_and_the_other_worker(tmp_path, action, words):
    began = time.time()
    with pytest.raises(Failure, match=words):
        run_tasks(
            [stand_in(tmp_path, "slow", action="wait"), stand_in(tmp_path, "bad", action=action)], 2
        )
    assert time.time() - began < 30
    if action == "fail":
        assert 'raise ValueError("no luck")' in (tmp_path / "log.txt").read_text()
    run_tasks([stand_in(tmp_path, "slow"), stand_in(tmp_path, "bad")], 2)
    assert (tmp_path / "slow").exists() and (tmp_path / "bad").exists()


def test_workers_end_with_a_story_that_is_killed(tmp_path):
    story = tmp_path / "killed.py"
    story.write_text(f"""
from pathlib import Path
from tools.workers import Task, run_tasks
if __name__ == "__main__":
    out = Path({str(tmp_path)!r})
    run_tasks([Task("slow", "stand_in:note", (out, "slow", "wait"), out / "slow")], 1)
""")
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.Popen([sys.executable, story], env={**os.environ, "PYTHONPATH": path})
    order = tmp_path / "order.txt"
    while not (order.exists() and order.read_text().endswith("\n")):
        time.sleep(0.1)
    worker = int(order.read_text().split()[1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {worker} goes on")


def test_an_own_row_is_not_kept_when_its_file_has_changed(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def simpo(logps):\n    return -logps.policy_chosen\n")
    cfg = StoryConfig(out=tmp_path / "story", tiny=True, quick=True, mine=mine)
    for _ in range(2):
        made = {task.name: task.made for task in tasks_of(cfg, 1)}["seed 1 simpo"]
    write_json(made, {})  # as if it was trained
    mine.write_text("def simpo(logps):\n    return -2 * logps.policy_chosen\n")
    with pytest.raises(InputError, match="rows/simpo was made with another --mine .*delete that"):
        tasks_of(cfg, 1)
    assert tasks_of(replace(cfg, mine=None), 1)  # which has no such row


def test_a_story_refused_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("x = 1\n")
    cfg = StoryConfig(out=tmp_path / "toy", tiny=True, seeds=(1,), mine=tmp_path / "mine.py")
    with pytest.raises(InputError, match="defines no public function"):
        tasks_of(cfg, 1)
    for flags, words in (
        (["--seeds=1", "--seeds=1"], "seeds must differ"),
        (["--jobs=0"], "jobs must be >= 1"),
    ):
        with pytest.raises(SystemExit):
            parse_cli(StoryConfig, flags)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "toy").exists()
