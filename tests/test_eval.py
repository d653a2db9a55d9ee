"""Scores equal the published ones; runs resume to identical files; bad input is named."""

import base64
import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT

import eval as evaluation
import generate as generation
from benchmarks import common, llava_bench, m3cot, mathvision, mathvista, mmhal, mmvet, pope, tables
from benchmarks import object_halbench as halbench
from benchmarks.common import Reading, Reply, final_answer
from benchmarks.files import load_items, read_rows
from eval import BENCHMARKS, Generate, Judge, Report, Score
from runtime import InputError, run


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(bench: str, data: Path | None, answers: Path | None = None, **more) -> dict:
    given = {"data": (data,) if data else (), "answers": (answers,) if answers else ()}
    return evaluation.score(Score(bench=bench, **given, **more))


def error_of(capsys, argv: list) -> str:
    """The one line of stderr with which a command ends in exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: evaluation.main([str(word) for word in argv]))
    assert stop.value.code == 2
    return capsys.readouterr().err


# --------------------------------------------------------------------------- published files


def test_mathvision_agrees_with_the_official_script_item_by_item(bench, tmp_path):
    folder = bench / "mathvision"
    published = sorted((folder / "outputs").glob("*.jsonl"))
    expected = json.loads((folder / "outputs/scores.json").read_text())
    for path in published:
        result = scored("mathvision", folder, path, out=tmp_path)
        rows = {row["id"]: row for row in read_jsonl(path)}
        items = read_jsonl(tmp_path / "items.jsonl")
        assert len(items) == len(rows) == 3040
        assert sum(i["prediction"] == rows[i["id"]]["model_answer"] for i in items) == 3040
        assert sum(i["correct"] == rows[i["id"]]["correct"] for i in items) >= 0.99 * 3040
        right = sum(row["correct"] for row in rows.values())
        assert abs(result["score"] - 100 * right / 3040) < 0.5
    if [path.stem for path in published] == [expected["model"]]:
        for name, group in expected["per_subject_and_level"].items():
            kind, key = ("level", name[5:]) if name.startswith("level") else ("subject", name)
            ours = result if name == "all" else result["groups"][kind][key]
            assert abs(ours["correct"] - group["correct"]) <= 0.01 * group["total"], name
        mini = scored("mathvision_mini", folder, published[0])
        assert mini["n"] == 304 and mini["split"] == "testmini"
        assert abs(mini["correct"] - expected["testmini304"]["correct"]) <= 1


def test_mathvista_normalises_every_published_extraction_as_published(bench, tmp_path):
    folder = bench / "mathvista"
    expected = json.loads((folder / "outputs/scores.json").read_text())
    for path in sorted((folder / "outputs").glob("*.jsonl")):
        rows = {row["pid"]: row for row in read_jsonl(path)}
        result = scored("mathvista", folder, path, out=tmp_path)
        assert result["extraction"] == "judge"
        for item in read_jsonl(tmp_path / "items.jsonl"):
            assert item["prediction"] == rows[item["id"]]["prediction"], item["id"]
            assert item["correct"] == rows[item["id"]]["true_false"], item["id"]
        for item in Score(bench="mathvista", data=(folder,), answers=(path,)).items():
            reply = rows[item["id"]]["response"]
            exact = mathvista.read_exactly(item, reply)
            quick = final_answer(reply) if exact is None else exact
            assert quick == rows[item["id"]]["quick_extraction"], item["id"]
    if path.stem == "bard":
        assert result["correct"] == expected["published"]["correct"] == 348
        assert result["other_extractions"] == {"rule": 25.6, "offline": 32.1}
        for task, group in expected["by_task"].items():
            assert result["groups"]["task"][task]["correct"] == group["correct"]


def test_pope_counts_equal_the_official_ones_in_each_category(bench):
    folder = bench / "pope"
    for name, expected in json.loads((folder / "answers/scores.json").read_text()).items():
        result = scored("pope", folder, folder / f"answers/{name}.answers.jsonl")
        for category in pope.CATEGORIES:
            ours, theirs = result["groups"]["category"][category], expected[category]
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
        assert round(result["score"], 4) == expected["overall_f1_mean_of_three_x100"]
        assert round(result["pooled_f1"], 4) == expected["WRONG_pooled_f1_x100_for_comparison"]
        assert result["n"] == 8910 and result["split"] == "COCO val2014"
    for case in read_jsonl(folder / "wording_cases.jsonl"):
        assert pope.official_answer(case["response"]) == case["official"], case


def test_crpe_equals_the_official_script(bench):
    folder = bench / "crpe"
    expected = json.loads((folder / "scores.json").read_text())
    result = scored("crpe", folder, folder / "answers.synthetic.jsonl", extraction="strict")
    for category in ("exist", "subject", "predicate", "object"):
        group = result["groups"]["category"][category]
        assert {"n_groups": group["n"], "acc": group["score"]} == expected[category]
    assert round(result["score"], 2) == expected["overall_relation_mean_subj_pred_obj"]
    single = expected["non_circular_relation_acc_for_comparison"]
    assert round(result["accuracy_of_single_replies"], 2) == single


def test_llava_bench_equals_the_official_summary_of_reviews(bench):
    for name, expected in json.loads((bench / "llava_bench/scores.json").read_text()).items():
        result = scored("llava_bench", None, judgements=(bench / f"llava_bench/{name}.jsonl",))
        groups = {"all": result, **result["groups"]["category"]}
        for group, theirs in expected.items():
            ours = {"relative" if key == "score" else key: v for key, v in groups[group].items()}
            assert {key: ours[key] for key in theirs} == theirs, (name, group)


def test_llava_benchs_reviews_are_paired_by_question_not_by_their_running_number(tmp_path):
    rows = [{"question_id": n, "image": "a", "text": "?", "category": "conv"} for n in range(3)]
    data = write_jsonl(tmp_path / "questions.jsonl", rows)
    reviews = [{"id": n + 1, "question_id": n, "tuple": [8, n]} for n in range(3)]
    for some in (reviews, reviews[:2]):  # as eval_gpt_review_bench.py writes them
        judgements = write_jsonl(tmp_path / "reviews.jsonl", some)
        result = scored("llava_bench", data, judgements=(judgements,), out=tmp_path)
        read = [(row["id"], row["prediction"]) for row in read_jsonl(tmp_path / "items.jsonl")]
        assert read == [(str(n), [8, n]) for n in range(len(some))]
    assert result["missing_judgements"] == ["2"]


def test_own_questions_are_known_by_id_where_question_id_counts_those_of_an_image(tmp_path):
    rows = [{"id": id, "question_id": 0, "question": "?", "answer": id} for id in ("a", "b")]
    data = write_jsonl(tmp_path / "q.jsonl", [row | {"image": "a.png"} for row in rows])
    replies = [{"id": id, "response": id} for id in ("b", "a")]
    for some in (replies, [row | {"question_id": 0} for row in replies]):
        assert scored("own", data, write_jsonl(tmp_path / "a.jsonl", some))["score"] == 100


def test_llava_bench_names_a_category_that_its_judge_left_unread(tmp_path):
    rows = [
        {"question_id": n, "category": f"llava_bench_{name}", "text": text}
        for n, (name, text) in enumerate([("conv", "8 9\nGood."), ("detail", "Both are good.")])
    ]
    with pytest.raises(InputError, match="llava_bench_detail: most judgements lack two scores"):
        scored("llava_bench", None, judgements=(write_jsonl(tmp_path / "j.jsonl", rows),))


def test_mmhals_replies_in_another_order_than_its_questions_are_noticed(tmp_path):
    rows = [{"question": q, "gt_answer": "a", "image_content": [], "image": "a.png"} for q in "?!"]
    data = write_jsonl(tmp_path / "mmhal.jsonl", rows)
    replies = [row | {"question": f"<image>\n{row['question']}", "text": "x"} for row in rows]
    flags = {"bench": "mmhal", "data": (data,), "out": tmp_path / "r"}
    answers = write_jsonl(tmp_path / "a.jsonl", replies)
    assert evaluation.judge(Judge(**flags, answers=(answers,))) == ["0", "1"]
    with pytest.raises(InputError, match="a.jsonl line 1: 'question' is not the data's at this"):
        write_jsonl(answers, replies[::-1])
        evaluation.judge(Judge(**flags, answers=(answers,)))


def test_mmhal_and_mmvet_equal_the_official_figures(bench):
    folder = bench / "mmhal"
    expected = json.loads((folder / "scores.json").read_text())
    records, judgements = folder / "records.synthetic.jsonl", folder / "judgements.synthetic.jsonl"
    result = scored("mmhal", records, records, judgements=(judgements,))
    assert result["score"] == expected["average_score_exact"]
    assert result["hallucination_rate"] == expected["hallucination_rate"]
    kinds = [row["question_type"] for row in read_jsonl(records)[:8]]
    groups = result["groups"]["question_type"]
    assert [round(groups[kind]["score"], 2) for kind in kinds] == expected["per_type"]

    folder = bench / "mmvet"
    expected = json.loads((folder / "scores.json").read_text())
    judgements = folder / "judgements.synthetic.jsonl"
    result = scored("mmvet", folder / "mm-vet.synthetic.json", judgements=(judgements,))
    ours = {name: g["score"] for name, g in result["groups"]["capability"].items()}
    assert {"total": result["score"], **ours} == pytest.approx(expected, abs=1e-4)
    assert result["unparsed"] == 2  # "n/a" and "1.5" count as 0.0, as officially, and are reported


def test_chair_equals_the_official_figures(bench):
    folder = bench / "object_halbench"
    expected = json.loads((folder / "scores.json").read_text())
    captions = folder / "captions.synthetic.jsonl"
    items = Score(bench="object_halbench", data=(folder,), answers=(captions,)).items()
    for item, theirs in zip(items, expected["per_caption"]):
        assert halbench.read(item, Reply(item["caption"]), "chair-rule").prediction == theirs
    result, official = scored("object_halbench", folder, captions), expected["scores"]
    assert round(result["score"] / 100, 4) == official["CHAIRs_refine__response_level"]
    assert round(result["mention_level"] / 100, 4) == official["CHAIRi__mention_level"]
    assert result["CHAIRs"] == official["CHAIRs"] and result["extraction"] == "chair-rule"


def test_m3cot_letters_equal_both_official_rules(bench):
    for case in read_jsonl(bench / "m3cot/extraction_cases.jsonl"):
        reply, choices = case["response"], case["choices"]
        assert m3cot.internvl_letter(final_answer(reply), choices) == case["internvl_pred"], case
        assert m3cot.m3cot_letter(reply, choices) == case["official_m3cot_pred"], case


# --------------------------------------------------------------------------- the rules, by hand

OFFLINE = {"question_type": "multi_choice", "answer_type": "text",
           "choices": ["10 cm", "20 cm", "-5", "A dog"]}  # fmt: skip
RULES: list[tuple[Callable, list[tuple]]] = [  # (function, [(*arguments, result), ...])
    (final_answer, [
        ("so 12.\nFinal answer:\n\nB\nmore", "B"),  # blanks and newlines after the marker
        ("Answer: A is wrong. Final answer: B", "A is wrong. Final answer: B"),  # the first wins
        ("**Final answer:** B", "** B"),
        ("no marker", "no marker"),
    ]),
    (common.last_number, [
        ("1 + 2 = 1,200.00 $", "1200.00"), ("1200 or 12", "12"), ("none", ""),
        ("9{,}500", "9500"), ("$9\\,500$", "9500"), ("9\\,\\!500", "9500"), ("9\u202f500", "9500"),
        ("so −5", "-5"), ("so –5.5", "-5.5"), ("x=-5", "-5"), ("10-5", "5"), ("A 4-5 mix", "5"),
        ("2.5e3", "2.5e3"), ("2.5E-3 m", "2.5E-3"), ("3e", "3"), ("2.5 \\times 10^{3}", "2.5e3"),
        ("1.2 × 10^-2", "1.2e-2"), ("1,2345", "2345"), (".5", ".5"), ("(1,500)", "1500"),
    ]),
    (pope.official_answer, [
        *((reply, "yes") for reply in ("NO", "None", "It isn't", "No;", "**No**", "", "No\nbut")),
        ("Nope.", "yes"), ("Yes, no doubt", "no"), ("There, not", "no"),
    ]),
    (pope.plain_answer, [
        *((reply, "no") for reply in ("NO", "No!", '"No"', "**No**", "_no_", "It isn't", "None")),
        ("It isn’t", "no"), ("Yes, no doubt", "yes"), ("**YES**", "yes"), ("Noon", None),
        ("", None), ("A dog.", None),
    ]),
    (mathvision.clean_answer, [
        ("The answer is (C).", "c"), ("(B)\nbecause", "b"), ("The value of x is 12.", "12"),
        ("\\boxed{7} and then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("the answer is 5. And more", "5"), ("x = 3\\sqrt2", "3\\sqrt{2}"), ("90^\\circ", "90"),
        ("\\boxed{3/4}", "\\frac{3}{4}"), (".5", "\\frac{1}{2}"), (".25", "0.25"),
    ]),
    (lambda reply, cot: mathvision.read(  # the letter or the value of the right option
        {"answer": "B", "options": ["3", "4", "5", "6", "7"]}, Reply(reply, cot), "rule").correct, [
        ("\\boxed{4}", False, True), ("B", False, True), ("C", False, False), ("5", False, False),
        ("steps = 9\nFinal answer: B", True, True),
    ]),
    (mathvision.equal, [
        ("\\frac{1}{2}", "0.5", True), ("2\\pi", "6.28", True),  # two decimals
        ("0.001", "0", True), ("2:4", "1:2", True), ("(1,\\frac{2}{4})", "(1,0.5)", True),
        ("(1,2)", "(2,1)", False), ("9\\sqrt{2}", "$9 \\sqrt{2}$", True), ("1,200", "1200", True),
        ("\\frac{3}{4}}.theansweris", "$\\displaystyle \\frac{3}{4}$", True),  # as far as it goes
        ("12cm", "12", False),  # a letter is a symbol
        ("7\\frac{1}{2}", "7.5", False),  # a product, not a mixed number
        ("", "", False), ("[1,2]", "(1,2)", False), ("9" * 500, "1", False),
        ("__import__('os')", "1", False),
    ]),
    (lambda reply: mathvista.normalise(
        {**OFFLINE, "answer": ""}, mathvista.read_offline(OFFLINE, reply)).prediction, [
        *((reply, "20 cm") for reply in ("**B**", "b", "B.", "Option B", "option b.", "(b)", "$B$",
                                         "The answer is B.", "the correct option is **B**",
                                         "It is 20 cm", "\\boxed{B}", "I think choice B, as drawn",
                                         "The answer is B because it is longer", "Answer: B")),
        ("It is −5", "-5"), ("so the answer is a dog", "A dog"), ("A dog", "A dog"),
        ("It is A dog", "A dog"), ("Option Z, 10 cm", "10 cm"),
    ]),
]  # fmt: skip
RULE_CASES = [(function, case) for function, cases in RULES for case in cases]


@pytest.mark.parametrize(
    ("function", "case"), RULE_CASES, ids=[repr(c)[:60] for _, c in RULE_CASES]
)
def test_a_rule_reads(function, case):
    assert function(*case[:-1]) == case[-1]


def test_mathvista_always_picks_a_choice_and_reads_numbers_strictly():
    choice = {**OFFLINE, "choices": ["10 cm", "20 cm"], "answer": "20 cm"}
    number = {"question_type": "free_form", "answer_type": "integer", "answer": "2", "choices": []}
    decimal = {**number, "answer_type": "float", "precision": 1, "answer": "1.2"}
    for item, extraction, prediction, parsed in (
        (choice, "the answer is (b)", "20 cm", True),
        (choice, "20cm", "20 cm", False),
        (choice, "", "10 cm", False),  # the first on a tie
        (number, "2.0", "2", True),
        (number, "15%", None, False),
        (number, "1,200", None, False),
        (decimal, "1.24", "1.2", True),
        (number, mathvista.read_offline(number, "3 sides and 1,200 dots, so 2"), "2", True),
    ):
        reading = mathvista.normalise(item, extraction)
        assert (reading.prediction, reading.parsed) == (prediction, parsed), extraction


def test_mathvista_reads_its_query_file_lists_and_precisions_of_any_kind(tmp_path):
    free = {"question": "?", "question_type": "free_form", "choices": None, "unit": None}
    rows = {"1": free | {"answer_type": "float", "precision": 1.0, "answer": "1.2"},
            "2": free | {"answer_type": "list", "answer": "[1, 2]"}}  # fmt: skip
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    (tmp_path / "query.json").write_text(json.dumps({"1": "Hint: one", "2": "Hint: two"}))
    replies = {"1": {"response": "1.24"}, "2": {"response": "The years [1, 2], I think."}}
    (tmp_path / "replies.json").write_text(json.dumps(replies))
    cfg = Score("mathvista", (tmp_path,), answers=(tmp_path / "replies.json",))
    items = cfg.items()
    assert [BENCHMARKS["mathvista"].ask(i, False) for i in items] == ["Hint: one", "Hint: two"]
    result = evaluation.score(replace(cfg, extraction="offline"))
    assert (result["score"], result["other_extractions"]) == (100, {"rule": 50})


def test_internvls_outputs_of_m3cot_are_paired_by_image(tmp_path):
    row = {"question": "?", "choices": ["a", "b"], "hint": None}
    rows = [row | {"image": f"{n}.png", "answer": n} for n in (0, 1)]
    data = write_jsonl(tmp_path / "test.jsonl", rows)
    replies = [{"image_path": f"{n}.png", "question": "?", "answer": "AB"[n]} for n in (1, 0)]
    assert scored("m3cot", data, write_jsonl(tmp_path / "a.jsonl", replies))["score"] == 100


def test_judges_see_captions_rules_and_final_answers_as_officially(tmp_path):
    question = {"question_id": 0, "image": "a.jpg", "text": "What?", "category": "conv"}
    data = write_jsonl(tmp_path / "questions.jsonl", [question])
    write_jsonl(tmp_path / "context.jsonl", [{"image": "a.jpg", "caption": ["One.", "Two."]}])
    write_jsonl(tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "text": "Reference."}])
    (item,) = Score("llava_bench", (data,), answers=(data,)).items()
    rule = json.dumps({"llava_bench_conv": {"role": "Assistant", "prompt": "RULE"}})
    _, asked = llava_bench.messages(item, Reply("Ours."), rule)
    assert asked["content"] == (
        "[Context]\nOne.\nTwo.\n\n[Question]\nWhat?\n\n"
        "[Assistant 1]\nReference.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nOurs.\n\n[End of Assistant 2]\n\n[System]\nRULE\n\n"
    )
    row = {"question": "Q?", "gt_answer": "a", "image_content": ["dog", "cat"]}
    row |= {"image_src": "https://a.b/c/picture_o.jpg"}
    data = write_jsonl(tmp_path / "mmhal.jsonl", [row])
    (item,) = Score("mmhal", (data,), judgements=(data,)).items()
    assert item["image"] == "picture_o.jpg"
    reply = Reply("Rationale: Answer: none\nAnswer: two", cot=True)
    (asked,) = mmhal.messages(item, reply, "{}|{}|{}|{}")
    assert asked["content"] == "dog, cat|Q?|a|two"


def test_crpe_needs_all_four_rotations_and_has_two_readings(tmp_path):
    rows, replies = [], []
    for n in range(8):  # two questions in four orders
        options = ["cat", "dog", "cow", "pig"][n % 4 :] + ["cat", "dog", "cow", "pig"][: n % 4]
        lines = "".join(f"\n{k}. {option}" for k, option in zip("ABCD", options))
        gold = "ABCD"[options.index("cat")]
        text = f"What?{lines}{common.LETTER_SUFFIX}"
        row = {"question_id": n, "image": "a.jpg", "text": text, "category": "subject"}
        rows.append({**row, "correct_option": gold})
        replies.append({"question_id": n, "text": {0: "The Cat.", 5: f"{gold}. cat"}.get(n, gold)})
    data = write_jsonl(tmp_path / "crpe_relation.jsonl", rows)
    result = scored("crpe", data, write_jsonl(tmp_path / "answers.jsonl", replies))
    assert (result["score"], result["n"]) == (100, 2)
    assert result["other_extractions"] == {"strict": 0}
    named = [row | {"category": "subject", "text": row["text"]} for row in replies]
    strict = scored("crpe", data, write_jsonl(tmp_path / "b.jsonl", named), extraction="strict")
    assert strict["unparsed"] == 2  # more than a letter
    meta = {"image": "a.jpg", "question": "What?", "choices": ["cat"], "correct_option": "cat"}
    write_jsonl(tmp_path / "crpe_relation_meta.jsonl", [meta])  # lies beside it officially
    assert len(Score(bench="crpe", data=(tmp_path,), answers=(data,)).items()) == 8
    prompt = BENCHMARKS["crpe"].ask(rows[0], True)
    assert prompt.startswith(common.COT) and prompt.endswith("D. pig")


def test_judges_are_read_by_the_official_rules_and_named_out_of_range():
    for module, judgement, reading in (
        (mmvet, "0.7 | x", Reading(0.7)),
        (mmvet, "n/a", Reading(0.0, parsed=False)),
        (llava_bench, "8, 7\nwhy", Reading((-1, -1), parsed=False)),  # two blanks: three words
        (llava_bench, "8,7\nwhy", Reading((8, 7))),
        (mmhal, "Rating: 5 ... Rating: 2", Reading(0.0, parsed=False)),
        (mmhal, "- Rating: 6, very", Reading(6.0)),
    ):
        assert module.read({"id": "v1_3"}, Reply("", judgement=judgement), "judge") == reading
    runs = mmvet.read({"id": "v1_3"}, Reply("", judgement=[0.5, 1.0]), "judge")
    assert runs == Reading(0.75)  # an official file holds the scores of several runs
    with pytest.raises(InputError, match="v1_3: judgement .* is not a pair"):
        llava_bench.read({"id": "v1_3"}, Reply("", judgement=[8, 7, 6]), "judge")
    wrong = {
        mmvet: (1.5, [0.5, -1], True),
        llava_bench: ("15 3\n", [11, 3]),
        mmhal: ("Rating: 9", 7),
    }
    for module, judgement in ((m, j) for m, judgements in wrong.items() for j in judgements):
        with pytest.raises(InputError, match="v1_3.*out of range"):
            module.read({"id": "v1_3"}, Reply("", judgement=judgement), "judge")


SYNONYMS = """person, man, woman, child, girl, police officer
bus, coach\ntrain\nknife\nwine glass\nhot dog\ndog, puppy\nbird, goose\nchair, seat\ntoilet\ntie
skis, ski
"""


CAPTIONS = {
    "Two men, three women and the children's coaches": ["person", "person", "person", "bus"],
    "Buses and knives; a passenger train.": ["bus", "knife", "train"],
    "Hot dogs beside wine glasses. It is hot. Dogs run": ["hot dog", "wine glass", "dog"],
    "A baby bird, geese and a puppy": ["bird", "bird", "dog"],
    "The toilet seat; a bow tie": ["toilet", "tie"],
    "A seat near the toilet": ["toilet"],
    "He skis under blue skies on a glass floor": ["skis"],
    "A dog on the train tracks, a train track and home plate": ["dog"],
    "A train on the track": ["train"],
}


def test_chair_finds_plurals_double_words_and_no_false_persons(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    for caption, objects in CAPTIONS.items():
        assert halbench.named_objects(caption, tmp_path / "synonyms.txt") == objects, caption


def test_chair_takes_its_truth_from_coco_and_misses_no_image_in_silence(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    rows = [{"image_id": id, "caption": "A dog and a train"} for id in (7, "8")]
    data = write_jsonl(tmp_path / "captions.jsonl", rows)
    coco = {"images": [{"id": 7}, {"id": 8}], "categories": [{"id": 1, "name": "dog"}]}
    dog, train = {"image_id": 7, "category_id": 1}, {"image_id": 7, "caption": "A train track"}
    with pytest.raises(InputError, match="line 1.*no 'gt_objects'; instances_.*lack image 7"):
        scored("object_halbench", data, data)
    (tmp_path / "instances_val2014.json").write_text(json.dumps(coco | {"annotations": [dog]}))
    halbench.coco_truth.cache_clear()
    with pytest.raises(InputError, match="no 'gt_captions'; captions_.*lack image 7"):
        scored("object_halbench", data, data)
    (tmp_path / "captions_val2014.json").write_text(json.dumps(coco | {"annotations": [train]}))
    halbench.coco_truth.cache_clear()
    result = scored("object_halbench", data, data)  # in 8 nothing is annotated
    assert (result["mentions"], result["hallucinated_mentions"]) == (4, 3)
    write_jsonl(data, [*rows, {"image_id": 9, "caption": "A dog"}])
    with pytest.raises(InputError, match="line 3.*lack image 9"):
        scored("object_halbench", data, data)


def test_chair_uses_a_judges_object_list_and_says_so(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    first = {"image_id": 7, "caption": "two dogs and a man", "gt_objects": ["dog"]}
    rows = [first | {"gt_captions": ["a woman"]}, {**first, "image_id": 8, "gt_objects": []}]
    data = write_jsonl(tmp_path / "captions.jsonl", rows)
    rule = scored("object_halbench", data, data)
    assert (rule["extraction"], rule["response_level"]) == ("chair-rule", 50)
    odd = write_jsonl(tmp_path / "odd.jsonl", [first | {"gt_objects": ["unicorn"]}])
    with pytest.raises(InputError, match="7: gt_objects .'unicorn'. are not in .*synonyms.txt"):
        scored("object_halbench", odd, odd)
    assert (rule["mentions"], rule["hallucinated_mentions"]) == (4, 2)
    judged = [{"id": "7", "judgement": 'So: ["dogs", "dog", "red bus"]', "judge": "j"}]
    judged = write_jsonl(tmp_path / "j.jsonl", judged)
    half = scored("object_halbench", data, data, judgements=(judged,))
    assert half["score"] is None and half["missing_judgements"] == ["8"]
    assert (half["extraction"], half["judge"]) == ("chair-llm", "j")
    assert rule["notes"] == ["chair-rule is not the paper's way"] and half["notes"] == []
    listed = ["dogs", "red dog", "puppy", "men", "women", "toilet", "seat", "hot", "dog tag"]
    judgement = Reply("", judgement=json.dumps(listed))
    item = first | {"synonyms": tmp_path / "synonyms.txt"}
    reading = halbench.read(item, judgement, "chair-llm").prediction
    assert reading["objects"] == ["dog", "dog", "person", "person", "toilet"]
    assert reading["hallucinated"] == ["person", "person", "toilet"]


@pytest.mark.parametrize(
    ("bench", "row", "reply", "cot", "score", "unparsed"),
    [
        ("text_mc", {"choices": ["x", "y"], "answer": "B"}, "It is (B).", False, 100, 0),
        ("text_mc", {"choices": ["x", "y"], "answer": 0}, "none", False, 0, 1),
        ("text_em", {"answer": ["The Nile", "nile river"]}, "the answer is: the Nile!\nx", False,
         100, 0),
        ("text_em", {"answer": ["The Nile", None, ""]}, "None of them", False, 0, 0),
        ("own", {"answer": 3, "image": "a.png"}, "3", False, 100, 0),
        ("own", {"answer": 3, "image": "a.png"}, "Final answer: 3", False, 0, 1),
        ("own", {"answer": 3, "image": "a.png"}, "So.\nFinal answer: 3", True, 100, 0),
        ("own", {"answer": 3, "image": "a.png"}, "3", True, 0, 1),
        ("gsm8k", {"answer": "so\n#### 1,200"}, "1 + 2 = 1,200.00 $", False, 100, 0),
        ("gsm8k", {"answer": "so\n#### 1,200"}, "1200 or 12", False, 0, 0),
        ("gsm8k", {"answer": "so\n#### 1,200"}, "none", False, 0, 1),
        ("gsm8k", {"answer": "#### 9,500"}, "It is $9{,}500$.", False, 100, 0),
        ("gsm8k", {"answer": "#### 2500"}, "2.5e3", False, 100, 0),
        ("gsm8k", {"answer": "#### -4"}, "Final answer: −4", True, 100, 0),
        ("gsm8k", {"answer": "#### 4"}, "Final answer: −4", True, 0, 0),
    ],
)  # fmt: skip
def test_our_own_rules_read_letters_matches_and_last_numbers(
    bench, row, reply, cot, score, unparsed, tmp_path
):
    data = write_jsonl(tmp_path / "data.jsonl", [{"id": 0, "question": "?", **row}])
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"id": 0, "response": reply}])
    result = scored(bench, data, answers, cot=cot)
    assert (result["score"], result["unparsed"]) == (score, unparsed)


def test_the_words_before_an_exact_match_may_be_written_in_any_case(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": 0, "question": "?", "answer": "Nile"}])
    answers = write_jsonl(tmp_path / "a.jsonl", [{"id": 0, "response": "The Answer Is the Nile."}])
    assert scored("text_em", data, answers, extraction="exact")["score"] == 100
    write_jsonl(answers, [{"id": 0, "response": "the Nile river"}])
    result = scored("text_em", data, answers, extraction="exact")
    assert (result["score"], result["other_extractions"]) == (0, {"substring": 100})


def test_prompts_are_exactly_the_published_ones():
    cot = (
        "Your task is to answer the question below. Give step by step reasoning before you "
        "answer, and when you're ready to answer, please use the format "
        '"Final answer: .."\n\nQuestion:\n\n'
    )
    free = "Your task is to answer the question below. Give step by step reasoning. \n\nQuestion:"
    choices = {"question": "Which?", "choices": ["a", "b"], "hint": "Look."}
    choices_text = "Look.\nWhich?\nA. a\nB. b"
    letter = "Answer with the option's letter from the given choices directly."
    phrase = "Is it?\nAnswer the question using a single word or phrase."
    drawn = {"question": "Q?\n<image1>\n<image2>", "options": list("ABCDE")}
    for name, item, is_cot, prompt in (
        ("m3cot", choices, False, f"{choices_text}\n{letter}"),
        ("m3cot", choices, True, cot + choices_text),
        ("pope", {"text": "Is it?"}, False, phrase),
        ("pope", {"text": phrase}, False, phrase),
        ("pope", {"text": phrase}, True, cot + "Is it?"),
        ("mathvision", drawn, False, "Q?"),
        ("mathvision", {**drawn, "options": ["1", "2"]}, True, cot + "Q?\nA. 1\nB. 2"),
        ("mmvet", {"question": "Q?"}, False, "Q? "),
        ("mmvet", {"question": "Q?"}, True, f"{free}\n\nQ?"),
        ("llava_bench", {"text": "Q?"}, False, "Q? Please give a detailed answer."),
        ("own", {"question": phrase.replace("\n", " ")}, False, phrase),  # as for pairs
        ("own", {"question": f"Is it?\n{letter}"}, True, cot + "Is it?"),
    ):
        assert BENCHMARKS[name].ask(item, is_cot) == prompt


def test_no_reply_makes_a_reader_fail():
    """Published outputs hold anything: every offline reader returns a verdict, and quickly."""
    choices = ["a", "b c", "9"]
    item = {"id": "1", "choices": choices, "options": choices, "gold": "A", "golds": ["a"],
            "answer": "A", "label": "yes", "correct_option": "A", "text": "Q?\nA. a\nB. b",
            "precision": 2, "question_type": "free_form", "answer_type": "float"}  # fmt: skip
    replies = ["", " ", "(", "(A", "\\frac", "\\boxed{", "}{", "=", "is ", "1e999", "nan", "1/0",
               "٣", "9" * 5000, "(" * 3000, "Answer:", "Final answer:\n", "\x00\ud800", "²", "[1,",
               "(,)", "option " * 1000, "1e" * 2000]  # fmt: skip
    for name in ("m3cot", "mathvista", "mathvision", "pope", "crpe", "text_mc", "text_em", "gsm8k"):
        gold = {**item, "gold": "3"} if name == "gsm8k" else item
        for kind in ("float", "integer", "list", "text"):
            row = {**gold, "answer_type": kind}
            row["question_type"] = "multi_choice" if kind == "text" else "free_form"
            for mode, text, cot in product(BENCHMARKS[name].modes, replies, (False, True)):
                reading = BENCHMARKS[name].read(row, Reply(text, cot), mode)
                assert reading.correct in (True, False)


# --------------------------------------------------------------------------- input

POPE_ROWS = [
    {"question_id": i, "image": f"{i}.jpg", "text": "Is it?", "label": "yes" if i % 2 else "no"}
    for i in range(1, 5)
]


def pope_data(folder: Path) -> Path:
    for category in pope.CATEGORIES:
        write_jsonl(folder / f"coco_pope_{category}.json", POPE_ROWS)
    return folder


def pope_answers(path: Path, **reply_to: str) -> Path:
    rows = [
        {"category": c, "question_id": r["question_id"],
         "response": reply_to.get(r["label"], r["label"].title())}
        for c in pope.CATEGORIES
        for r in reversed(POPE_ROWS)
    ]  # fmt: skip
    return write_jsonl(path, rows)


def test_pope_is_paired_by_key_also_in_llavas_list(tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    assert scored("pope", data, answers)["score"] == 100
    text = " Is it? " + common.PHRASE_SUFFIX
    rows = [
        {"question_id": n, "category": c, "image": r["image"], "text": text}
        for n, (c, r) in enumerate((c, r) for c in pope.CATEGORIES for r in POPE_ROWS)
    ]
    llava = write_jsonl(tmp_path / "d/llava_pope_test.jsonl", rows)
    replies = [{"question_id": n, "text": "No" if n % 4 % 2 else "Yes"} for n in range(12)]
    result = scored("pope", llava, write_jsonl(tmp_path / "b.jsonl", replies))
    assert result["score"] == 100  # the labels come from the official files beside the list
    assert result["groups"]["category"]["random"]["TP"] == 2
    assert pope.BENCHMARK.notes([{"category": "random"}] * 3000, "rule", False) == [pope.HEAD]


def test_a_rows_own_category_goes_before_that_of_its_files_name(tmp_path):
    rows = [row | {"category": "popular"} for row in POPE_ROWS]
    data = write_jsonl(tmp_path / "coco_pope_random.json", rows)
    items = Score(bench="pope", data=(data,), answers=(data,)).items()
    assert [item["id"] for item in items] == [f"popular/{n}" for n in range(1, 5)]


def test_the_error_of_a_mean_of_categories_is_that_of_independent_ones(tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl", no="Yes")
    result = scored("pope", data, answers)
    errors = [g["standard_error"] for g in result["groups"]["category"].values()]
    assert errors == [pytest.approx(100 * (2 / 3 * 1 / 3 / 4) ** 0.5)] * 3
    assert result["standard_error"] == pytest.approx(errors[0] / 3**0.5)


def test_empty_and_unfinished_replies_are_counted(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": n, "question": "?", "answer": "none"}
                                              for n in range(3)])  # fmt: skip
    rows = [{"response": None}, {"response": " "}, {"response": "x", "finish_reason": "length"}]
    answers = write_jsonl(tmp_path / "a.jsonl", [row | {"id": n} for n, row in enumerate(rows)])
    result = scored("text_em", data, answers)
    assert (result["score"], result["empty_replies"], result["cut_off"]) == (0, 2, 1)


def test_testmini_alone_needs_no_list_of_ids(tmp_path):
    row = {"question": "?", "options": [], "answer": "3", "level": 1, "subject": "s", "id": "7"}
    data = write_jsonl(tmp_path / "testmini.jsonl", [row])
    answers = write_jsonl(tmp_path / "a.jsonl", [{"id": "7", "response": "3"}])
    result = scored("mathvision_mini", data, answers)
    assert (result["n"], result["split"]) == (1, "testmini (1 of 304 items)")


def test_a_score_of_a_part_says_which_categories_are_absent(tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    assert scored("pope", data, answers)["notes"] == []
    rows = [row for row in read_jsonl(answers) if row["category"] == "random"]
    part = data / "coco_pope_random.json"
    notes = scored("pope", part, write_jsonl(tmp_path / "b.jsonl", rows))["notes"]
    assert notes == ["without adversarial, popular"]
    with pytest.raises(InputError, match="b.jsonl line 1: id 4 is not in the data"):
        scored("pope", data / "coco_pope_popular.json", tmp_path / "b.jsonl")  # numbered alike


@pytest.mark.parametrize("no", ["**No**", "NO", "No!", '"No"', "No\nThere is none.", "It isn't"])
def test_pope_counts_what_its_word_rule_misreads_and_shows_the_plain_score(no, tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl", no=no)
    result = scored("pope", data, answers)
    assert result["score"] == pytest.approx(200 / 3)  # the official score: all are read as yes
    assert result["unparsed"] == 6
    assert result["other_extractions"] == {"plain": 100}
    assert scored("pope", data, answers, extraction="plain")["unparsed"] == 0


def test_bad_input_is_named(tmp_path, capsys):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    rows, other = read_jsonl(answers), tmp_path / "b.jsonl"
    for changed, message in (
        (rows[:2] + rows[4:], "no reply for 2 of 12 items: random/1, random/2"),
        ([*rows, rows[0]], r"b.jsonl line 13: duplicate id 'random/4'"),
        ([{**rows[0], "question_id": 99}], "not in the data"),
        ([{"question_id": 1, "text": "no"}], "may be .* needs its 'category'"),
        ([{**rows[0], "category": "Random"}], "id 4 is not in the data"),
    ):
        with pytest.raises(InputError, match=message):
            scored("pope", data, write_jsonl(other, changed))
    with pytest.raises(InputError, match="not a file of mathvista"):
        scored("mathvista", data / "coco_pope_random.json", answers)
    with pytest.raises(InputError, match="duplicate ids: random/1"):
        twice = write_jsonl(tmp_path / "coco_pope_random.json", POPE_ROWS + POPE_ROWS[:1])
        scored("pope", twice, answers)
    with pytest.raises(InputError, match="no mm-vet"):
        scored("mmvet", data, answers)
    for command, message in (
        ("score --bench pope --data nowhere --answers nowhere", "no file nowhere"),
        ("score --bench pope", "--answers is needed"),
        ("score --bench pope --data d --answers a --judgements j", "without a judge"),
        ("score --bench pope --data d --answers a --extraction magic", "known: rule"),
        ("score --bench own --data d --answers a --synonyms s", "reads no --synonyms"),
        ("generate --bench llava_bench --cot", "no chain-of-thought setting"),
        ("generate --bench gsm8k --data d --model_dir m --images i", "--images does nothing"),
    ):
        assert message in error_of(capsys, command.split())


@pytest.mark.parametrize(
    ("bench", "row"),
    [
        ("pope", {"question_id": 1, "image": "a.jpg", "text": 3, "category": "random"}),
        ("pope", {"question_id": [1], "image": "a.jpg", "text": "?", "category": "random"}),
        ("m3cot", {"question": "?", "choices": "ab", "answer": 0, "image": "a.png"}),
        ("m3cot", {"question": "?", "choices": ["a"], "answer": 7, "image": "a.png"}),
        ("m3cot", {"question": "?", "choices": ["a"], "answer": 0, "image": None}),
        ("mathvision", {"question": "?", "options": None, "answer": "A", "level": 1,
                        "subject": "s"}),
        ("mmhal", {"question": "?", "gt_answer": "a", "image_content": "dog"}),
        ("object_halbench", {"image_id": 1, "gt_objects": "dog"}),
        ("gsm8k", {"question": "?", "answer": "#### x"}),
        ("text_em", {"question": None, "answer": "a"}),
        ("own", {"image": "a.png", "question": "?", "answer": "a", "history": [["a", "b"]]}),
        ("own", {"image": "a.png", "question": "?", "answer": "a", "system_prompt": "Be brief."}),
        ("pope", {"question_id": 1, "image": "a.jpg", "text": "?", "category": "random",
                  "label": "Yes"}),
        ("mathvista", {"question": "?", "question_type": "free_form", "answer_type": "number",
                       "answer": "1"}),
        ("mathvista", {"question": "?", "question_type": "free_form", "answer_type": "text",
                       "answer": None}),
        ("mathvista", {"question": "?", "question_type": "free_form", "answer_type": "float",
                       "answer": "1", "precision": 1e999}),
        ("mathvista", {"question": "?", "question_type": "free_form", "answer_type": "integer",
                       "answer": 2.0}),
        ("mathvista", {"question": "?", "question_type": "multi_choice", "answer_type": "text",
                       "answer": "c", "choices": ["a", "b"]}),
        ("mathvista", {"question": "?", "question_type": "multi_choice", "answer_type": "text",
                       "answer": "", "choices": None}),
        ("m3cot", {"question": "?", "choices": [{"text": "a"}], "answer": 0, "image": "a.png"}),
        ("own", {"image": "a.png", "question": "?", "answer": "a", "videos": ["a.mp4"]}),
        ("own", {"image": "a.png", "question": "?", "answer": [["a"]]}),
        ("own", {"image": "a.png", "question": "?", "answer": "a", "choices": ["a", "b"]}),
        ("text_em", {"question": "?", "answer": "a", "system": "Be brief."}),
        ("text_mc", {"question": "?", "choices": ["a"], "answer": 0, "history": [["a", "b"]]}),
        ("gsm8k", {"question": "?", "answer": "3", "images": ["a.png"]}),
        ("crpe", {"question_id": 1, "image": "a.jpg", "text": "?", "category": "Subject",
                  "correct_option": "A"}),
    ],
)  # fmt: skip
def test_a_row_of_the_wrong_type_ends_in_one_line_that_names_it(bench, row, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [row])
    error = error_of(capsys, ["score", "--bench", bench, "--data", data, "--answers", data])
    assert error.count("\n") == 1 and "data.jsonl line 1" in error


@pytest.mark.parametrize("answer", ["", [], [""], [None], [None, ""]])
@pytest.mark.parametrize("bench", ["own", "text_em"])
def test_a_split_without_published_answers_is_not_scored_as_wrong(bench, answer, tmp_path):
    rows = [
        {"image": "a.png", "question": "?", "answer": a, "response": "x"} for a in ("x", answer)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", [row | {"id": i} for i, row in enumerate(rows)])
    with pytest.raises(InputError, match="no gold answer to 1: a split whose answers are not"):
        scored(bench, data, data)


def test_a_judge_may_read_replies_to_a_split_without_published_answers(tmp_path):
    """MathVista's test split is scored by its authors, from what a judge has extracted."""
    item = OFFLINE | {"pid": "1", "question": "How wide?", "query": "How wide?", "answer": ""}
    data = write_jsonl(tmp_path / "data.jsonl", [item])
    replies = write_jsonl(tmp_path / "replies.jsonl", [{"pid": "1", "response": "It is red."}])
    flags = {"bench": "mathvista", "data": (data,), "answers": (replies,), "out": tmp_path}
    assert evaluation.judge(Judge(**flags)) == ["1"]
    assert "It is red." in (tmp_path / "requests.jsonl").read_text()


def test_a_judge_is_asked_only_where_mathvistas_rule_asks_one(tmp_path):
    item = OFFLINE | {"question": "How wide?", "query": "How wide?", "answer": "20 cm"}
    data = write_jsonl(tmp_path / "data.jsonl", [item | {"pid": n} for n in "01"])
    rows = [{"pid": "0", "response": "20 cm"}, {"pid": "1", "response": "It is 20 cm wide."}]
    flags = {"data": (data,), "answers": (write_jsonl(tmp_path / "a.jsonl", rows),)}
    assert evaluation.judge(Judge(bench="mathvista", **flags, out=tmp_path)) == ["1"]
    assert [row["id"] for row in read_jsonl(tmp_path / "requests.jsonl")] == ["1"]
    said = write_jsonl(tmp_path / "judgements.jsonl", [{"id": "1", "judgement": "B", "judge": "j"}])
    flags |= {"bench": "mathvista", "judgements": (said,)}
    judged, ruled = (evaluation.score(Score(**flags, extraction=e)) for e in ("", "rule"))
    assert (judged["status"], judged["score"], judged["judge"]) == ("complete", 100, "j")
    assert (ruled["extraction"], ruled["judge"]) == ("rule", None)


def test_a_chat_api_s_raw_answers_are_judgements_in_their_order(tmp_path):
    rows = [{"question": "?", "gt_answer": "a", "image_content": [], "image": "a.png"}] * 2
    data = write_jsonl(tmp_path / "mmhal.jsonl", rows)
    said = [{"id": f"chatcmpl-{n}", "choices": [{"message": {"content": f"Rating: {n}"}}]}
            for n in (2, 5)]  # fmt: skip
    judgements = write_jsonl(tmp_path / "j.jsonl", said)
    scored("mmhal", data, judgements=(judgements,), out=tmp_path)
    assert [item["prediction"] for item in read_jsonl(tmp_path / "items.jsonl")] == [2, 5]
    evaluation.report(Report(dir=(tmp_path,), out=tmp_path / "report"))
    lines = (tmp_path / "report/report.txt").read_text().splitlines()
    (table4,) = [line.split() for line in lines if line.startswith("j Direct") and "50.0" in line]
    assert table4 == ["j", "Direct", "-", "-", "3.5", "50.0"]  # the rate as in the paper, x 100
    assert tables.cell(100 * 30 / 96) == "31.3"  # 31.25


@pytest.mark.parametrize("reply", [{"text": "x"}, True])
def test_a_reply_that_is_no_text_is_named(reply, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": 1, "question": "?", "answer": "x"}])
    with pytest.raises(InputError, match="a.jsonl line 1: 'response' must be str"):
        scored("text_em", data, write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "response": reply}]))


def test_an_empty_choice_of_ids_and_images_that_nobody_asks_about_are_refused(tmp_path, capsys):
    rows = [{"id": 1, "question": "?", "answer": "x", "image": "a.png", "response": "x"}]
    data, ids = write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "ids.txt"
    ids.write_text("\n")
    flags = f"--bench text_em --data {data}"
    command = f"score {flags} --answers {data} --ids {ids}"
    assert "ids.txt: names no item of the data" in error_of(capsys, command.split())
    (tmp_path / "config.json").write_text("{}")
    command = f"generate {flags} --model_dir {tmp_path} --out {tmp_path}/out"
    assert "text_em shows no image, but items have one: 1" in error_of(capsys, command.split())


def test_a_part_of_a_file_of_any_length_is_said_to_be_one(tmp_path):
    rows = [{"id": n, "question": "?", "answer": n, "image": "a.png"} for n in range(3)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    replies = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "response": "1"}])
    (tmp_path / "ids").write_text("1")
    assert scored("own", data, replies, ids=tmp_path / "ids")["split"] == "test by --ids"
    (tmp_path / "ids").write_text("1 2")
    with pytest.raises(InputError, match="no reply for 1 of 2 items: 2"):
        scored("own", data, replies, ids=tmp_path / "ids")


@pytest.mark.parametrize("bench", ["own", "text_em", "gsm8k"])
def test_an_empty_question_is_not_asked(bench, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"id": 7, "question": " ", "answer": 1, "image": ""}])
    with pytest.raises(InputError, match="7: no question"):
        evaluation.asked(BENCHMARKS[bench], load_items(BENCHMARKS[bench], (data,)), cot=True)
    drawn = {"question": "<image1>", "options": list("ABCDE")}  # MathVision has such
    assert BENCHMARKS["mathvision"].ask(drawn, cot=False) == ""


@pytest.mark.parametrize("bench", ["m3cot", "text_mc"])
@pytest.mark.parametrize("key", ["hint", "context"])
def test_a_hint_that_is_no_text_is_refused(bench, key, tmp_path):
    row = {"question": "?", "choices": ["x", "y"], "answer": 0, "image": "", key: ["a", "b"]}
    with pytest.raises(InputError, match=f"line 1: .*'{key}' must be str . None, got "):
        load_items(BENCHMARKS[bench], (write_jsonl(tmp_path / "d.jsonl", [row]),))


@pytest.mark.parametrize("flag", ["--ids", "--synonyms", "--judge_template"])
def test_a_file_of_words_that_is_no_utf8_is_named(flag, tmp_path, capsys):
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe1")
    rows = [{"image_id": 1, "question": "?", "gt_objects": ["dog"], "response": "x"}]
    data, verb = write_jsonl(tmp_path / "d.jsonl", rows), "judge" if "judge" in flag else "score"
    command = f"{verb} --bench object_halbench --data {data} --answers {data} --out {tmp_path}"
    error = error_of(capsys, [*command.split(), flag, tmp_path / "words.txt"])
    assert f"{tmp_path}/words.txt: 'utf-8' codec can't decode" in error


MMVET = {
    f"v1_{i}": {"imagename": f"{i}.png", "question": "Q?", "answer": "a<AND>b",
                "capability": ["ocr"]}
    for i in range(3)
}  # fmt: skip


def test_judging_goes_through_files_and_is_incomplete_until_all_ids_are_there(tmp_path):
    data, answers = tmp_path / "mm-vet.json", tmp_path / "model.json"
    data.write_text(json.dumps(MMVET))
    answers.write_text(json.dumps({name: f"reply {name}" for name in MMVET}))  # official format
    (tmp_path / "template.txt").write_text("OFFICIAL")
    flags = {"bench": "mmvet", "data": (data,), "answers": (answers,), "out": tmp_path / "r"}
    evaluation.judge(Judge(**flags, judge_template=tmp_path / "template.txt"))
    requests = read_jsonl(tmp_path / "r/requests.jsonl")
    assert requests[1]["id"] == "v1_1" and requests[1]["max_tokens"] == 3
    assert requests[1]["messages"][0]["content"] == "OFFICIAL\nQ? | a <AND> b | reply v1_1 | "

    said = [{"id": name, "judgement": "0.5", "judge": "gpt-x", "date": "2024-11-20"}
            for name in MMVET]  # fmt: skip
    judgements = write_jsonl(tmp_path / "r/judgements.jsonl", said[:2])
    assert evaluation.judge(Judge(**flags)) == ["v1_2"]
    half = scored("mmvet", data, answers, judgements=(judgements,), out=tmp_path / "r")
    assert (half["status"], half["score"], half["partial"]["n"]) == ("incomplete", None, 2)
    assert half["missing_judgements"] == ["v1_2"]
    assert "incomplete" in evaluation.report(Report(dir=(tmp_path / "r",), out=tmp_path / "rep"))
    write_jsonl(judgements, said)
    complete = scored("mmvet", data, answers, judgements=(judgements,))
    assert (complete["score"], complete["judge"]) == (50, "gpt-x")
    assert complete["judge_date"] == "2024-11-20"
    nothing = scored("mmvet", data, answers)
    assert nothing["score"] is None and len(nothing["missing_judgements"]) == 3
    write_jsonl(judgements, [*said, {"id": "v1_9", "judgement": "1.0"}])
    with pytest.raises(InputError, match="v1_9"):
        scored("mmvet", data, answers, judgements=(judgements,))


@pytest.mark.parametrize("changed", ["reply", "question", "answer"])
def test_judgements_of_other_replies_or_questions_are_refused(changed, tmp_path):
    data, answers = tmp_path / "mm-vet.json", tmp_path / "model.json"
    data.write_text(json.dumps(MMVET))
    answers.write_text(json.dumps({name: f"reply {name}" for name in MMVET}))
    flags = {"bench": "mmvet", "data": (data,), "answers": (answers,), "out": tmp_path / "r"}
    evaluation.judge(Judge(**flags))
    said = [{"id": name, "judgement": "0.5"} for name in MMVET]
    judgements = write_jsonl(tmp_path / "r/judgements.jsonl", said)
    assert evaluation.judge(Judge(**flags)) == []  # of the same ones they count, again and again
    assert scored("mmvet", data, answers, judgements=(judgements,))["score"] == 50
    if changed == "reply":
        answers.write_text(json.dumps({name: f"other {name}" for name in MMVET}))
    else:
        data.write_text(json.dumps({k: row | {changed: "other"} for k, row in MMVET.items()}))
    with pytest.raises(InputError, match="'v1_0' had another reply or question .*another --out"):
        evaluation.judge(Judge(**flags))
    with pytest.raises(InputError, match="'v1_0' had another reply or question"):
        scored("mmvet", data, answers, judgements=(judgements,))
    judgements.unlink()
    assert len(evaluation.judge(Judge(**flags))) == 3  # nothing is judged yet: asked anew


def test_judgements_are_never_taken_for_those_of_another_template(tmp_path):
    data, answers, out = tmp_path / "mm-vet.json", tmp_path / "model.json", tmp_path / "r"
    data.write_text(json.dumps(MMVET))
    answers.write_text(json.dumps(dict.fromkeys(MMVET, "reply")))
    template, other = tmp_path / "official.txt", tmp_path / "other.txt"
    template.write_text("OFFICIAL")
    other.write_text("OTHER")
    (tmp_path / "ids").write_text("v1_0")
    flags = {"bench": "mmvet", "data": (data,), "answers": (answers,), "out": out}
    evaluation.judge(Judge(**flags, ids=tmp_path / "ids", judge_template=template))
    evaluation.judge(Judge(**flags, ids=tmp_path / "ids", judge_template=template))
    write_jsonl(out / "judgements.jsonl", [{"id": "v1_0", "judgement": "0.5"}])
    asked = read_jsonl(out / "requests.jsonl")
    with pytest.raises(
        InputError, match="--judge_template: judgements are by another .*use another --out"
    ):
        evaluation.judge(Judge(**flags, judge_template=other))
    assert read_jsonl(out / "requests.jsonl") == asked
    assert evaluation.judge(Judge(**flags, judge_template=template)) == ["v1_1", "v1_2"]
    assert evaluation.judge(Judge(**flags)) == ["v1_1", "v1_2"]
    requests = read_jsonl(out / "requests.jsonl")
    assert requests[0] == asked[0]
    assert [row["template"] for row in requests] == ["official.txt"] * 3


def test_answers_are_no_judgements_of_themselves(tmp_path):
    data, answers = tmp_path / "mm-vet.json", tmp_path / "model.json"
    data.write_text(json.dumps(MMVET))
    answers.write_text(json.dumps(dict.fromkeys(MMVET, "reply")))
    with pytest.raises(InputError, match="model.json key 'v1_0': the reply itself, no judgement"):
        scored("mmvet", data, answers, judgements=(answers,))


def test_scoring_never_imports_torch(tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    code = (
        "import sys, eval\neval.main(sys.argv[1:])\n"
        "assert not {'torch', 'matplotlib', 'PIL', 'numpy'} & set(sys.modules)\n"
    )
    flags = ["score", "--bench", "pope", "--data", data, "--answers", answers]
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["score"] == 100 and "pope Direct: 100.00" in done.stderr
    needed = "n standard_error split setting extraction judge prompts unparsed groups"
    assert set(needed.split()) <= set(result)


# --------------------------------------------------------------------------- generate


@dataclass
class StandIn:
    """Answers without a model, in pairs, the later prompt first: a batch that ends out of order."""

    stops_after: int = -1
    loads: int = 0
    swapped: bool = False  # answers yes for no

    def load(self, model_dir: Path, temperature: float, **settings: object) -> "StandIn":
        assert temperature == 0.0 and not settings["marks"]  # as chat() shows InternLM2's
        self.loads += 1
        self.swapped = b"other" in (model_dir / "model.safetensors").read_bytes()
        return self

    def run(self, prompts):
        prompts, number = list(prompts), 0
        for first in range(0, len(prompts), 2):
            for prompt in reversed(prompts[first : first + 2]):
                yield self.answer(prompt)
                number += 1
                if number == self.stops_after:
                    raise KeyboardInterrupt

    def answer(self, prompt):
        assert len(prompt.images) == 1 and prompt.images[0].is_file() and prompt.max_tiles == 6
        cot, number = "Final answer" in prompt.question, int(prompt.images[0].stem)
        yes = (number % 2 == 1 or (number == 4 and not cot)) != self.swapped
        word = "Yes" if yes else "No"
        text = f"I look \u00e9. Final answer: {word}" if cot else f" {word} "
        return generation.Sample(prompt.id, 0, text, "stop", len(text), 1, 256, 0.0)


def write_model(folder: Path, content: bytes = b"weights 1") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def generator(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(generation.Generator, "load", stand_in.load)
    return stand_in


@pytest.fixture
def world(tmp_path, generator):
    """Questions with images, a model folder, and a generator that needs no model."""
    data = pope_data(tmp_path / "data")
    for row in POPE_ROWS:
        (data / row["image"]).write_bytes(b"not opened here")
    write_model(tmp_path / "model")
    return tmp_path


def asked(world: Path, out: str | None, **more) -> Generate:
    given = {"model_dir": world / "model", "out": world / out if out else None, **more}
    return Generate(bench="pope", data=(world / "data",), **given)


def as_rank(monkeypatch, rank: int, size: int, cfg: Generate) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))
    evaluation.generate(cfg)


def test_one_and_two_processes_write_the_same_answers(world, monkeypatch):
    evaluation.generate(asked(world, "one"))
    as_rank(monkeypatch, 1, 2, asked(world, "two"))
    assert not (world / "two/answers.jsonl").exists()  # the other half is not there yet
    as_rank(monkeypatch, 0, 2, asked(world, "two"))
    one = (world / "one/answers.jsonl").read_bytes()
    assert one == (world / "two/answers.jsonl").read_bytes()
    rows = read_jsonl(world / "one/answers.jsonl")
    assert [row["id"] for row in rows[:2]] == ["adversarial/1", "adversarial/2"]  # file order
    assert rows[0]["response"] == "Yes" and rows[0]["finish_reason"] == "stop"
    parts = sorted(p.name for p in (world / "two").glob("answers.*-of-*"))
    assert parts == ["answers.0-of-2.jsonl", "answers.1-of-2.jsonl"]


def test_a_stopped_run_resumes_with_any_number_of_processes(world, monkeypatch, generator):
    evaluation.generate(asked(world, "one", cot=True))
    for rank, generator.stops_after in ((0, 3), (1, 2)):
        with pytest.raises(KeyboardInterrupt):
            as_rank(monkeypatch, rank, 2, asked(world, "stopped", cot=True))
    part = world / "stopped/answers.0-of-2.jsonl"
    part.write_bytes(part.read_bytes()[:-9])  # a torn last line
    assert len(read_jsonl(world / "stopped/answers.1-of-2.jsonl")) == 2
    generator.stops_after = -1
    for rank in range(3):  # another number of processes than before
        as_rank(monkeypatch, rank, 3, asked(world, "stopped", cot=True))
    one = (world / "one/answers.jsonl").read_bytes()
    assert (world / "stopped/answers.jsonl").read_bytes() == one
    loads = generator.loads
    as_rank(monkeypatch, 0, 1, asked(world, "stopped", cot=True))
    assert generator.loads == loads  # nothing left to do: no model is loaded


def test_a_file_of_questions_is_not_scored_as_its_own_answers(tmp_path):
    rows = [{"id": n, "question": "How many?", "answer": n, "image": "a.png"} for n in range(3)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match="d.jsonl line 1: 'answer' is the data's own, no reply"):
        scored("own", data, data)
    both = write_jsonl(tmp_path / "both.jsonl", [row | {"response": row["answer"]} for row in rows])
    assert scored("own", both, both)["score"] == 100  # as official outputs hold the questions, too


def test_our_replies_are_scored_as_answers_to_their_own_questions_only(world):
    evaluation.generate(asked(world, "one"))
    (world / "ids").write_text("random/1 random/2 popular/1")
    part = scored("pope", world / "data", world / "one", ids=world / "ids")
    assert (part["n"], part["split"]) == (3, "COCO val2014 (3 of 8910 items) by --ids")
    assert scored("pope", world / "data", world / "one")["n"] == 12  # in the place of the 3
    before = (world / "one/score.json").read_text()
    with pytest.raises(InputError, match="one holds a score of more items; use another --out"):
        scored("pope", world / "data", world / "one", ids=world / "ids")
    assert (world / "one/score.json").read_text() == before
    files = tuple(world / f"data/coco_pope_{name}.json" for name in pope.CATEGORIES[::-1])
    reordered = Score(bench="pope", data=files, answers=(world / "one",))
    assert evaluation.score(reordered)["n"] == 12
    other = pope_data(world / "other")  # the same ids and labels
    for path in other.iterdir():
        path.write_text(path.read_text().replace("Is it?", "Is it not?"))
    with pytest.raises(InputError, match="--data: run.json .* says that other ones were asked"):
        scored("pope", other, world / "one")


def test_what_was_asked_is_text_and_picture_wherever_the_pictures_lie():
    def asked_about(*images: str) -> str:
        items = [{"id": str(n), "question": "?", "image": image} for n, image in enumerate(images)]
        return evaluation.asked(BENCHMARKS["own"], items, False)

    assert asked_about("a/1.jpg", "2.jpg") == asked_about("b/c/1.jpg", "a/2.jpg")
    assert asked_about("1.jpg", "2.jpg") != asked_about("2.jpg", "1.jpg")
    one, two = (letter * 2000 + "/9k=" for letter in "AB")  # in base64, as JPEGs end
    assert asked_about(one, two) != asked_about(two, one)


def test_replies_to_prompts_of_another_version_are_scored_and_named(world):
    evaluation.generate(asked(world, "one"))
    about = json.loads((world / "one/run.json").read_text())
    (world / "one/run.json").write_text(json.dumps(about | {"prompts": "old", "questions": "?"}))
    assert scored("pope", world / "data", world / "one")["prompts"] == "old"


def test_folders_of_our_own_are_scored_together_where_they_were_made_alike(world):
    first, rest = world / "first", world / "rest"
    for path, categories in ((first, pope.CATEGORIES[:1]), (rest, pope.CATEGORIES[1:])):
        path.write_text(" ".join(f"{c}/{r['question_id']}" for c in categories for r in POPE_ROWS))
    evaluation.generate(asked(world, "one", ids=first))
    evaluation.generate(asked(world, "two", ids=rest))
    evaluation.generate(asked(world, "cot", ids=rest, cot=True))
    model = write_model(world / "models/other", b"weights 2")
    evaluation.generate(asked(world, "other", ids=rest, model_dir=model))
    evaluation.generate(asked(world, "short", ids=rest, max_new_tokens=3))

    def score_both(data: str, *names: str) -> dict:
        answers = tuple(world / name for name in names)
        return evaluation.score(Score(bench="pope", data=(world / data,), answers=answers))

    both = score_both("data", "one", "two")
    assert (both["n"], both["model"], both["setting"]) == (12, "model", "Direct")
    assert both["weights"] and not (world / "one/score.json").exists()
    for name in ("cot", "other", "short"):
        with pytest.raises(InputError, match="not all are of one model, benchmark and setting"):
            score_both("data", "one", name)
    with pytest.raises(InputError, match="not all are of one model, benchmark and setting"):
        score_both("data", "one", pope_answers(world / "foreign.jsonl").name)
    other = pope_data(world / "asked")
    path = other / f"coco_pope_{pope.CATEGORIES[1]}.json"
    path.write_text(path.read_text().replace("Is it?", "Is it not?"))
    with pytest.raises(InputError, match="run.json in .*two says that other ones were asked"):
        score_both("asked", "one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"v1_0": "a",\n "v1_0": "b"}', "'v1_0' stands there twice"),
        ('{"v1_0": "a",\n "v1_1": "b', "a.json: not valid JSON .Unterminated string"),
    ],
)
def test_replies_in_one_object_are_whole_and_each_once(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "a.json")


def test_two_runs_never_write_one_folder_at_a_time(world):
    (world / "one").mkdir()
    with open(world / "one/.lock-0", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other run holds it
        with pytest.raises(InputError, match="another run works there"):
            evaluation.generate(asked(world, "one"))
    assert evaluation.generate(asked(world, "one")) == world / "one"


def test_an_image_that_was_replaced_is_noticed_when_answering_goes_on(world):
    evaluation.generate(asked(world, "one"))
    image = world / "data" / POPE_ROWS[0]["image"]
    image.write_bytes(b"another picture")
    with pytest.raises(InputError, match="made with another images .*use another --out"):
        evaluation.generate(asked(world, "one"))


def test_a_benchmark_of_ones_own_is_answered_and_scored_as_the_docs_write_it(world, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/switches.md").read_text(), re.S)
    exec(code, names := {})
    monkeypatch.setitem(BENCHMARKS, "mine", names["BENCHMARK"])
    rows = [{"image": f"{n}.jpg", "question": "Odd?", "answer": "yes"} for n in (1, 2)]
    data = write_jsonl(world / "data/mine.jsonl", rows)
    for cot in (False, True):
        out, model = world / f"mine-{cot}", world / "model"
        evaluation.generate(Generate("mine", (data,), cot=cot, model_dir=model, out=out))
        assert scored("mine", data, out)["score"] == 50
    assert names["BENCHMARK"].ask(rows[0], False) == "Odd?\nAnswer in one word."


def test_two_questions_that_swapped_their_images_are_noticed(world):
    """Also where the images have one name, in two folders."""
    places = ["a/1.jpg", "b/1.jpg"]
    for place in places:
        (world / place).parent.mkdir()
        (world / place).write_bytes(place.encode())
    rows = [{"id": i, "image": p, "question": "?", "answer": "x"} for i, p in enumerate(places)]
    data = write_jsonl(world / "own.jsonl", rows)
    cfg = Generate("own", (data,), model_dir=world / "model", out=world / "one")
    evaluation.generate(cfg)
    evaluation.generate(cfg)  # the same ones, in any order
    write_jsonl(data, rows[::-1])
    evaluation.generate(cfg)
    write_jsonl(data, [row | {"image": p} for row, p in zip(rows, places[::-1])])
    with pytest.raises(InputError, match="made with another images"):
        evaluation.generate(cfg)


def test_other_settings_in_a_folder_are_refused_by_name(world):
    evaluation.generate(asked(world, "one"))
    for key, changes in (("setting", {"cot": True}), ("max_tiles", {"max_tiles": 12})):
        with pytest.raises(InputError, match=f"{key} .*use another --out"):
            evaluation.generate(asked(world, "one", **changes))
    (world / "model/config.json").write_text('{"other": 1}')
    with pytest.raises(InputError, match="weights"):
        evaluation.generate(asked(world, "one"))


def test_two_models_of_one_shape_and_name_never_share_answers(world, monkeypatch, capsys):
    """Weights are told apart by their content: names, sizes and folder names are equal here."""
    monkeypatch.chdir(world)
    first = write_model(world / "sft/model", b"weights of one ")
    second = write_model(world / "mpo/model", b"weights, other ")
    outs = [evaluation.generate(asked(world, None, model_dir=m)) for m in (first, second)]
    assert outs[0] != outs[1] and all(out.is_relative_to("results") for out in outs)
    replies = [[row["response"] for row in read_jsonl(out / "answers.jsonl")] for out in outs]
    assert replies[0][0] == "Yes" and replies[1][0] == "No"
    with pytest.raises(InputError, match="weights .*use another --out"):
        evaluation.generate(asked(world, str(outs[0]), model_dir=second))
    (first / "model.safetensors").write_bytes(b"other, retrained"[:15])  # in place, equal size
    assert evaluation.generate(asked(world, None, model_dir=first)) not in outs
    scores = [scored("pope", world / "data", out) for out in outs]
    assert scores[0]["weights"] != scores[1]["weights"]
    evaluation.main(["report", *map(str, outs), "--out", "report"])  # as --dir A B
    names = [f"model@{score['weights'][:8]}" for score in scores]
    assert list(json.loads(Path("report/report.json").read_text())["ours"]) == names
    assert all(f"{name} Direct" in capsys.readouterr().out for name in names[:1])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"weights 2"),  # of equal size
        ("model-2.safetensors", b"one more shard"),
        ("tokenizer.json", b"{}"),
        ("config.json", b"{ }"),
    ],
)
def test_whatever_changes_answers_counts_as_other_weights(world, file, content):
    evaluation.generate(asked(world, "one"))
    (world / "model" / file).write_bytes(content)
    with pytest.raises(InputError, match="weights .*use another --out"):
        evaluation.generate(asked(world, "one"))


def test_chain_of_thought_has_4096_new_tokens_and_in_mmhal_the_official_1024(world):
    row = {"question": "Q?", "gt_answer": "a", "image_content": [], "image": "data/1.jpg"}
    mmhal = (write_jsonl(world / "mmhal.jsonl", [row]),)
    for bench, data, given, tokens in (
        ("mmhal", mmhal, 0, 1024),
        ("mmhal", mmhal, 77, 77),  # a flag goes before
        ("pope", (world / "data",), 0, 4096),
        ("pope", (world / "data",), 1024, 1024),
    ):
        out, model = world / f"{bench}-{given}", world / "model"
        evaluation.generate(
            Generate(bench, data, cot=True, model_dir=model, out=out, max_new_tokens=given)
        )
        assert json.loads((out / "run.json").read_text())["max_new_tokens"] == tokens


def test_all_missing_images_are_listed_before_any_model_is_loaded(world, generator):
    (world / "data/2.jpg").unlink()
    (world / "data/3.jpg").unlink()
    with pytest.raises(InputError, match="6 of 12 images") as error:
        evaluation.generate(asked(world, "one"))
    assert "random/2" in str(error.value) and "adversarial/3" in str(error.value)
    assert generator.loads == 0


def test_images_stay_in_their_folder_and_may_stand_in_the_file_itself(world):
    outside = write_jsonl(world / "data/x_random.json", [{**POPE_ROWS[0], "image": "../model"}])
    for name in ("a\0b.png", "a\ud800.png"):
        odd = write_jsonl(world / "data/y_random.json", [{**POPE_ROWS[0], "image": name}])
        with pytest.raises(InputError, match="random/1: no "):
            evaluation.generate(replace(asked(world, "odd"), data=(odd,)))
    with pytest.raises(InputError, match="leaves"):
        cfg = Generate("pope", (outside,), model_dir=world / "model", out=world / "o")
        evaluation.generate(cfg)
    picture = base64.b64encode(b"a picture" * 200).decode()
    row = {"question": "Q?", "gt_answer": "a", "image_content": [], "image": picture}
    data = write_jsonl(world / "m.jsonl", [row])
    items = Generate("mmhal", (data,), model_dir=world / "model").items()
    ((path,),) = evaluation.image_paths(BENCHMARKS["mmhal"], items, None, world / "o")
    assert path.read_bytes() == b"a picture" * 200


def test_replies_of_the_wrong_setting_or_benchmark_are_refused(world):
    evaluation.generate(asked(world, "one"))
    with pytest.raises(InputError, match="run.json beside the answers says Direct"):
        scored("pope", world / "data", world / "one", cot=True)
    with pytest.raises(InputError, match="to pope, not to crpe"):
        scored("crpe", world / "data", world / "one")


# --------------------------------------------------------------------------- report


def test_direct_cot_and_their_difference_are_reported_side_by_side(world, capsys):
    folders = []
    for cot in (False, True):
        out = evaluation.generate(asked(world, f"pope-{cot}", cot=cot))
        flags = ["--bench", "pope", "--data", str(world / "data"), "--answers", str(out)]
        evaluation.main(["score", *flags])
        folders.append(str(out))
    capsys.readouterr()
    evaluation.main(["report", *folders, "--out", str(world / "report")])
    text = capsys.readouterr().out
    assert text == (world / "report/report.txt").read_text()
    report = json.loads((world / "report/report.json").read_text())
    expected = {"Direct": pytest.approx(80), "CoT": 100, "difference": pytest.approx(20)}
    assert report["ours"]["model"]["pope"] == expected
    assert report["scores"][1]["without_final_answer"] == 0
    (line,) = [line for line in text.splitlines() if line.startswith("model CoT - Direct")]
    assert "+20.0" in line and "paper InternVL2-8B-MPO" in text and "79.2" in text
    with pytest.raises(InputError, match="both hold model pope Direct"):
        evaluation.report(Report(dir=(Path(folders[0]),) * 2, out=world / "report"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", "{}", '{"model": 3}', {"score": "high"}, {"score": None}, {"notes": None},
     {"missing_judgements": [3]}, {"setting": "direct"}, {"n": 1.5}, {"judge": ["x"]},
     {"model": None}, {"weights": 7}, {"standard_error": None}, ["score"], ["standard_error"],
     ["n"], ["notes"], ["model"]],
)  # fmt: skip
def test_a_malformed_score_ends_in_one_line(content, tmp_path, capsys):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    score = scored("pope", data, answers)
    if isinstance(content, list):  # keys that are not there
        content = json.dumps({key: value for key, value in score.items() if key not in content})
    text = content if isinstance(content, str) else json.dumps({**score, **content})
    (tmp_path / "score.json").write_text(text)
    error = error_of(capsys, ["report", tmp_path, "--out", tmp_path / "report"])
    assert error.count("\n") == 1 and "score.json" in error
    assert not (tmp_path / "report").exists()
