"""The RLAIF-V baseline: claims, their yes/no questions, pairs by score."""

import json
from pathlib import Path

import pytest
import torch
from test_pairs import read_lines, sampling
from test_pairs import world as world

import generate
import pairs
from runtime import InputError
from tools import rlaifv
from toy import write_model


@pytest.fixture
def judged(world, monkeypatch):
    """The world of the stand-in engine, which says yes and no as well."""
    stand_in = pairs.Generator.word_probs
    monkeypatch.setattr(rlaifv, "word_probs", stand_in)
    return world


def test_claims_by_rule_are_sentences():
    text = "There is a cat. It is red!\n- No dog is there\n三只猫。没有狗。"
    want = ["There is a cat.", "It is red!", "No dog is there", "三只猫。", "没有狗。"]
    assert rlaifv.split_sentences(text) == want
    assert rlaifv.bullets("Claims:\n- one\n 2. two\n* three\nplain") == ["one", "two", "three"]


def test_the_score_counts_claims_denied_and_needs_a_question_for_each(judged):
    rows = [{"rid": "a", "question": "q", "claims": ["x", "y"], "questions": ["x?", "y?"]}]
    rows.append({"rid": "b", "question": "q", "claims": ["x", "y"], "questions": ["x?"]})
    rlaifv.judge_claims(rows, pairs.Generator(), Path("images"), 6)
    denied = sum(no > yes for yes, no in rows[0]["yes_no"])
    assert [row["score"] for row in rows] == [-denied, None]


def test_pairs_by_score_skip_ties_mismatches_and_equal_texts():
    rows = [
        {"k": k, "score": s, "response": t}
        for k, (s, t) in enumerate([(0, "a"), (-1, "b"), (-1, "c"), (None, "d"), (-2, " a")])
    ]
    made = {(c["k"], r["k"]) for c, r in rlaifv.better_pairs(rows)}
    assert made == {(0, 1), (0, 2), (1, 4), (2, 4)}


def test_the_length_limit_brings_the_means_together():
    lengths = [(10, 12)] * 5 + [(12, 10)] * 5 + [(5, 50)] * 5
    limit = rlaifv.length_limit(lengths)
    kept = [(c, r) for c, r in lengths if (r - c) / r <= limit]
    assert len(kept) == 10 and sum(c - r for c, r in kept) == 0


def test_divide_and_conquer_runs_from_samples_to_pairs(judged):
    pairs.sample(sampling(prompts="none", num_samples=6))
    cfg = rlaifv.DivideConfig(model_dir=Path("model"), out_dir=Path("out"))
    rlaifv.divide_and_conquer(cfg)
    rows = read_lines("out/annotations/toys_pairs_divide_and_conquer.jsonl")
    assert 0 < len(rows) <= 12
    for row in rows:
        assert row["chosen_meta"]["score"] > row["rejected_meta"]["score"]
    report = json.loads(Path("out/pairs.report.json").read_text())["divide_and_conquer"]["sets"]
    assert list(json.loads(Path("out/meta.json").read_text())) == ["toys_pairs_divide_and_conquer"]
    spent = report["toys"]["tokens"]["spent"]["generated"]
    part = read_lines("out/divide/toys/part-0-of-1.jsonl")
    judged = sum(len(row["yes_no"]) for row in part)
    assert spent == 36 * 7 * 3 + judged  # answers, claims, questions
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    rlaifv.divide_and_conquer(cfg)
    assert before == {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}


def test_divide_and_conquer_pairs_the_responses_given_and_none_of_earlier_ones(judged):
    pairs.sample(sampling(prompts="none", num_samples=6))
    pairs.sample(sampling(prompts="none", num_samples=6, seed=1, out_dir=Path("others")))
    for samples, out in (("others", "fresh"), ("samples", "used"), ("others", "used")):
        cfg = rlaifv.DivideConfig(model_dir=Path("model"), samples=Path(samples), out_dir=Path(out))
        rlaifv.divide_and_conquer(cfg)
    name = "annotations/toys_pairs_divide_and_conquer.jsonl"
    assert Path("used", name).read_bytes() == Path("fresh", name).read_bytes()


def test_a_spoilt_line_of_scores_is_named(judged):
    pairs.sample(sampling(prompts="none", num_samples=2))
    cfg = rlaifv.DivideConfig(model_dir=Path("model"), out_dir=Path("out"))
    rlaifv.divide_and_conquer(cfg)
    part = Path("out/divide/toys/part-0-of-1.jsonl")
    first, *others = part.read_text().splitlines(keepends=True)
    part.write_text(first.replace('"score"', '"points"') + "".join(others))
    with pytest.raises(InputError, match="part-0-of-1.jsonl line 1: 'score' must be float"):
        rlaifv.divide_and_conquer(cfg)


def test_a_placeholder_that_the_model_wrote_is_no_image(judged, monkeypatch):
    rows = [{"rid": "a", "question": "<image>\nq", "response": "I see <image>"}]
    rlaifv.add_claims(rows, pairs.load_generator(rlaifv.DivideConfig(model_dir=Path("model"))))
    rows[0] |= {"claims": ["x"], "questions": ["Is <image> red?"], "image": "0.png"}
    seen = []
    engine = pairs.Generator()

    def word_probs(_, prompt, words):
        seen.append(prompt)
        return [0.0] * len(words)

    monkeypatch.setattr(rlaifv, "word_probs", word_probs)
    rlaifv.judge_claims(rows, engine, Path("images"), 6)
    assert not any("<image>" in prompt.question for prompt in [*engine.prompts, *seen])


def test_first_token_probabilities_are_the_models(tmp_path):
    write_model(tmp_path, 0)
    generator = generate.Generator.load(tmp_path)
    prompt = generate.Prompt("yes", "Is the picture wide?")
    found, _ = rlaifv.word_probs(generator, prompt, ["Yes", "No"])
    with torch.no_grad():
        probs = generator.model(torch.tensor([generator.encode(prompt).ids]))[0, -1].softmax(-1)
    token = generator.tokenizer.encode_plain("Yes")[0]
    assert found == pytest.approx(probs[token].item(), rel=1e-4)
