"""From questions to a trained model and its scores, through the scripts' own files."""

import json
import signal
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from conftest import run_forks, start_forks, train_in_process

import eval as evaluation
import pairs
from records import read_meta
from runtime import read_jsonl
from train import TrainConfig

QUESTIONS = 20


@pytest.fixture(scope="module")
def world(trained):
    """The trained world, and questions to ask its model."""
    with open(trained / "questions.jsonl", "w") as f:
        for _, r in islice(read_jsonl(trained / "toy_steps.jsonl"), QUESTIONS):
            line = {"image": r["image"], "question": r["question"], "answer": r["answer_gt"]}
            f.write(json.dumps(line) + "\n")
    return trained


def sample_config(world, out, **changes):
    cfg = pairs.SampleConfig(
        model_dir=world / "base" / "model",
        questions=world / "questions.jsonl",
        root=world / "images",
        out_dir=out,
        prompts="none",
        num_samples=6,
        max_new_tokens=48,
        modes="math_score",
    )
    return replace(cfg, **changes)


def responses(folder):
    """{(question, number): the whole line}: each exactly once."""
    found = {}
    for part in sorted(Path(folder).rglob("part-*.jsonl")):
        for _, record in read_jsonl(part):
            key = (record["qid"], record["k"])
            assert key not in found, "drawn twice"
            found[key] = record
    return found


@pytest.fixture(scope="module")
def sampled(world):
    pairs.sample(sample_config(world, world / "samples"))
    found = responses(world / "samples")
    assert len(found) == QUESTIONS * 6
    return found


def test_two_processes_sample_what_one_does(world, sampled, tmp_path):
    run_forks(2, pairs.sample, sample_config(world, tmp_path))
    assert responses(tmp_path) == sampled


@pytest.mark.parametrize(("processes", "restart"), [(1, 2), (2, 1)])
def test_killed_sampling_goes_on_without_losing_or_changing_a_response(
    world, sampled, tmp_path, processes, restart
):
    cfg = sample_config(world, tmp_path, cache_tokens=600)
    forks, deadline = start_forks(processes, pairs.sample, cfg), time.time() + 60
    while sum(p.read_bytes().count(b"\n") for p in tmp_path.rglob("part-*")) < 20:
        assert time.time() < deadline and any(fork.is_alive() for fork in forks)
    for fork in forks:
        fork.kill()
        fork.join()
    assert any(fork.exitcode == -signal.SIGKILL for fork in forks)
    assert 20 <= len(responses_before_the_tear(tmp_path)) < len(sampled)
    run_forks(restart, pairs.sample, cfg)
    assert responses(tmp_path) == sampled


def responses_before_the_tear(folder):
    lines = [line for p in folder.rglob("part-*") for line in p.read_bytes().splitlines(True)]
    return [line for line in lines if line.endswith(b"\n")]


def test_correctness_pairs_are_right_against_wrong_and_train_as_they_are(world, sampled, tmp_path):
    cfg = pairs.CorrectnessConfig(samples=world / "samples", out_dir=tmp_path / "pairs")
    pairs.correctness(cfg)
    before = {p: p.read_bytes() for p in (tmp_path / "pairs").rglob("*") if p.is_file()}
    pairs.correctness(cfg)
    assert before == {p: p.read_bytes() for p in (tmp_path / "pairs").rglob("*") if p.is_file()}
    records = [s[n] for s in read_meta(tmp_path / "pairs" / "meta.json", 4) for n in range(len(s))]
    assert len(records) > 8
    gold = {r["question_orig"]: str(r["answer"]) for r in sampled.values()}
    assert gold
    for r in records:
        assert r.chosen != r.rejected and len(r.images) == 1
    metrics = train_in_process(
        TrainConfig(
            model_dir=world / "base" / "model",
            meta=tmp_path / "pairs" / "meta.json",
            out_dir=tmp_path / "mpo",
            lr=1e-3,
            batch_size=8,
            max_steps=3,
            pack_tokens=2000,
            drop_path=0.0,
        )
    )
    assert [m["step"] for m in metrics] == [1, 2, 3]


def test_dropout_pairs_reject_a_continuation_without_the_image(world, sampled, tmp_path):
    cfg = pairs.DropoutConfig(
        model_dir=world / "base" / "model",
        samples=world / "samples",
        out_dir=tmp_path / "one",
        max_new_tokens=48,
    )
    pairs.dropout_ntp(cfg)
    run_forks(2, pairs.dropout_ntp, replace(cfg, out_dir=tmp_path / "two"))
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one" / "annotations").iterdir()]
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    records = [s[n] for s in read_meta(tmp_path / "one" / "meta.json", 4) for n in range(len(s))]
    assert len(records) > 20
    for r in records:
        half = r.chosen.split(" ")[: len(r.chosen.split(" ")) // 2]
        assert r.rejected.startswith(" ".join(half)[:10].strip())
    metrics = train_in_process(
        TrainConfig(
            model_dir=world / "base" / "model",
            meta=tmp_path / "one" / "meta.json",
            out_dir=tmp_path / "mpo",
            batch_size=8,
            max_steps=2,
            pack_tokens=2000,
        )
    )
    assert metrics[-1]["step"] == 2


# --------------------------------------------------------------------------- benchmarks


def write_benchmark(world):
    """The toy's questions in M3CoT's format."""
    rows = []
    for number, r in read_jsonl(world / "toy_direct.jsonl"):
        row = {"id": f"q{number}", "image": r["image"], "question": r["question"].split("\n")[1]}
        row |= {"choices": ["0", "1", "2", "3", "4"], "hint": "", "image_id": number}
        rows.append(row | {"answer": min(4, int(r["answer_gt"]))})
    path = world / "m3cot_test.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def generate_config(world, out, cot):
    return evaluation.Generate(
        bench="m3cot",
        data=(write_benchmark(world),),
        model_dir=world / "base" / "model",
        images=world / "images",
        out=out,
        cot=cot,
        max_new_tokens=24,
    )


def test_benchmarks_run_from_questions_to_the_report(world, tmp_path):
    folders = []
    for cot in (False, True):
        out = tmp_path / ("cot" if cot else "direct")
        evaluation.generate(generate_config(world, out, cot))
        score = evaluation.score(
            evaluation.Score(
                bench="m3cot",
                data=(world / "m3cot_test.jsonl",),
                answers=(out,),
            )
        )
        assert score["n"] == 24 and score["setting"] == ("CoT" if cot else "Direct")
        folders.append(out)
    run_forks(2, evaluation.generate, generate_config(world, tmp_path / "two", False))
    same = [(tmp_path / name / "answers.jsonl").read_bytes() for name in ("direct", "two")]
    assert same[0] == same[1]
    text = evaluation.report(evaluation.Report(tuple(folders), tmp_path / "report"))
    assert "Direct" in text and "CoT" in text
    assert (tmp_path / "report" / "report.json").exists()
