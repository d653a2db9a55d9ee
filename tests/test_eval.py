"""Scores equal the published ones; runs resume to identical files; bad input is named."""

import base64
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval as bench_eval
from eval import BENCHES, Generate, How, Judge, Judgement, Report, Score
from runtime import InputError

ROOT = Path(__file__).parent.parent


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(bench: str, data: Path | None, answers: Path | None = None, **more) -> dict:
    given = {"data": (data,) if data else (), "answers": (answers,) if answers else ()}
    return bench_eval.score(Score(bench=bench, **given, **more))


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
        items = bench_eval.load_items(BENCHES["mathvista"], (folder,))
        for item in items:
            row, rule = (
                rows[item["id"]],
                bench_eval.mathvista_plain(item, rows[item["id"]]["response"]),
            )
            rule = bench_eval.final_answer(row["response"]) if rule is None else rule
            assert rule == row["quick_extraction"], item["id"]
    if path.stem == "bard":
        assert result["correct"] == expected["published"]["correct"] == 348
        assert result["other_extractions"]["rule"] == 25.6
        for task, group in expected["by_task"].items():
            assert result["groups"]["task"][task]["correct"] == group["correct"]


def test_pope_counts_equal_the_official_ones_in_each_category(bench):
    folder = bench / "pope"
    for name, expected in json.loads((folder / "answers/scores.json").read_text()).items():
        result = scored("pope", folder, folder / f"answers/{name}.answers.jsonl")
        for category in bench_eval.POPE:
            ours, theirs = result["groups"]["category"][category], expected[category]
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
        assert round(result["score"], 4) == expected["overall_f1_mean_of_three_x100"]
        assert round(result["pooled_f1"], 4) == expected["WRONG_pooled_f1_x100_for_comparison"]
        assert result["n"] == 8910 and result["split"] == "COCO val2014"
    for case in read_jsonl(folder / "wording_cases.jsonl"):
        assert bench_eval.pope_answer(case["response"]) == case["official"], case


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
        tables = {"all": result, **result["groups"]["category"]}
        for group, theirs in expected.items():
            ours = {"relative" if key == "score" else key: v for key, v in tables[group].items()}
            assert {key: ours[key] for key in theirs} == theirs, (name, group)


def test_mmhal_mmvet_and_chair_equal_the_official_figures(bench):
    folder = bench / "mmhal"
    expected = json.loads((folder / "scores.json").read_text())
    records, said = folder / "records.synthetic.jsonl", folder / "judgements.synthetic.jsonl"
    result = scored("mmhal", records, records, judgements=(said,))
    assert result["score"] == expected["average_score_exact"]
    assert result["hallucination_rate"] == expected["hallucination_rate"]
    kinds = [row["question_type"] for row in read_jsonl(records)[:8]]
    groups = result["groups"]["question_type"]
    assert [round(groups[kind]["score"], 2) for kind in kinds] == expected["per_type"]

    folder = bench / "mmvet"
    expected = json.loads((folder / "scores.json").read_text())
    said = folder / "judgements.synthetic.jsonl"
    result = scored("mmvet", folder / "mm-vet.synthetic.json", judgements=(said,))
    ours = {name: g["score"] for name, g in result["groups"]["capability"].items()}
    assert {"total": result["score"], **ours} == pytest.approx(expected, abs=1e-4)
    assert result["unparsed"] == 2  # "n/a" and "1.5" count as 0.0, as officially, and are reported

    folder = bench / "object_halbench"
    expected = json.loads((folder / "scores.json").read_text())
    captions = folder / "captions.synthetic.jsonl"
    items = bench_eval.load_items(BENCHES["object_halbench"], (folder,))
    for item, theirs in zip(items, expected["per_caption"]):
        how = How("chair-rule", False)
        ours = bench_eval.read_object_halbench(item, item["caption"], None, how).prediction
        assert ours == theirs
    result, whole = scored("object_halbench", folder, captions), expected["scores"]
    assert round(result["score"] / 100, 4) == whole["CHAIRs_refine__response_level"]
    assert round(result["mention_level"] / 100, 4) == whole["CHAIRi__mention_level"]
    assert result["CHAIRs"] == whole["CHAIRs"] and result["extraction"] == "chair-rule"


def test_m3cot_letters_equal_both_official_rules(bench):
    for case in read_jsonl(bench / "m3cot/extraction_cases.jsonl"):
        reply, choices = case["response"], case["choices"]
        letter = bench_eval.m3cot_letter(bench_eval.final_answer(reply), choices)
        assert letter == case["internvl_pred"], case
        assert bench_eval.m3cot_own_letter(reply, choices) == case["official_m3cot_pred"], case


# --------------------------------------------------------------------------- the rules, by hand


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("so 12.\nFinal answer:\n\nB\nmore", "B"),  # blanks and newlines after the marker
        ("Answer: A is wrong. Final answer: B", "A is wrong. Final answer: B"),  # the first wins
        ("**Final answer:** B", "** B"),
        ("no marker", "no marker"),
    ],
)
def test_final_answer_takes_the_first_marker_to_the_end_of_its_line(reply, answer):
    assert bench_eval.final_answer(reply) == answer


@pytest.mark.parametrize(
    ("reply", "cleaned"),
    [
        ("The answer is (C).", "c"),
        ("(B)\nbecause", "b"),
        ("The value of x is 12.", "12"),
        ("\\boxed{7} and then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("the answer is 5. And more", "5"),
        ("x = 3\\sqrt2", "3\\sqrt{2}"),
        ("90^\\circ", "90"),
        ("\\boxed{3/4}", "\\frac{3}{4}"),
        (".5", "\\frac{1}{2}"),
        (".25", "0.25"),
    ],
)
def test_mathvision_cleans_an_answer_as_the_official_script(reply, cleaned):
    assert bench_eval.mathvision_answer(reply) == cleaned


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("2\\pi", "6.28", True),  # two decimals
        ("0.001", "0", True),
        ("2:4", "1:2", True),
        ("(1,\\frac{2}{4})", "(1,0.5)", True),
        ("(1,2)", "(2,1)", False),
        ("9\\sqrt{2}", "$9 \\sqrt{2}$", True),
        (
            "\\frac{3}{4}}.theansweris",
            "$\\displaystyle \\frac{3}{4}$",
            True,
        ),  # read as far as it goes
        ("12cm", "12", False),  # a letter is a symbol
        ("7\\frac{1}{2}", "7.5", False),  # a product, not a mixed number
        ("", "", False),
        ("[1,2]", "(1,2)", False),
        ("1,200", "1200", True),
        ("9" * 500, "1", False),
        ("__import__('os')", "1", False),
    ],
)
def test_mathvision_compares_text_tuples_and_rounded_values(answer, gold, equal):
    assert bench_eval.mathvision_equal(answer, gold) is equal


def test_mathvision_counts_the_letter_or_the_value_of_the_right_option():
    item = {"answer": "B", "options": ["3", "4", "5", "6", "7"]}
    read = lambda reply, cot=False: bench_eval.read_mathvision(item, reply, None, How("rule", cot))  # noqa: E731, E501
    assert read("\\boxed{4}").correct and read("B").correct
    assert not read("C").correct and not read("5").correct
    assert read("steps = 9\nFinal answer: B", cot=True).correct


def test_mathvista_always_picks_a_choice_and_reads_numbers_strictly():
    choice = {"question_type": "multi_choice", "choices": ["10 cm", "20 cm"], "answer": "20 cm"}
    choice["answer_type"] = "text"
    normalise = bench_eval.mathvista_normalise
    assert normalise(choice, "the answer is (b)").correct
    assert normalise(choice, "20cm").prediction == "20 cm" and not normalise(choice, "20cm").parsed
    assert normalise(choice, "").prediction == "10 cm"  # the first on a tie
    whole = {"question_type": "free_form", "answer_type": "integer", "answer": "2", "choices": []}
    assert normalise(whole, "2.0").correct
    assert (
        normalise(whole, "15%").prediction is None and normalise(whole, "1,200").prediction is None
    )
    decimal = {**whole, "answer_type": "float", "precision": 1, "answer": "1.2"}
    assert normalise(decimal, "1.24").correct
    offline = bench_eval.mathvista_offline(whole, "It has 3 sides and 1,200 dots, so 2")
    assert normalise(whole, offline).correct


def test_pope_official_quirks_are_kept():
    read = bench_eval.pope_answer
    for reply in ("NO", "None", "It isn't", "No;", "**No**", "", "No\nbut", "Nope."):
        assert read(reply) == "yes", reply
    assert read("Yes, no doubt") == "no" and read("There, not") == "no"


def test_crpe_needs_all_four_rotations_and_has_two_readings(tmp_path):
    options, rows = ["cat", "dog", "cow", "pig"], []
    for question in range(2):
        for turn in range(4):
            turned = options[turn:] + options[:turn]
            lines = "".join(f"\n{k}. {o}" for k, o in zip("ABCD", turned))
            rows.append(
                {"question_id": len(rows), "image": "a.jpg", "category": "subject",
                 "text": f"What?{lines}{bench_eval.LETTER_SUFFIX}",
                 "correct_option": "ABCD"[turned.index("cat")], "q": question}
            )  # fmt: skip
    data = write_jsonl(tmp_path / "crpe_relation.jsonl", rows)
    replies = [r["correct_option"] if r["q"] or r["question_id"] else "The Cat." for r in rows]
    replies[5] = replies[5] + ". cat"
    answers = write_jsonl(
        tmp_path / "answers.jsonl", [{"question_id": i, "text": t} for i, t in enumerate(replies)]
    )
    result = scored("crpe", data, answers)
    assert (result["score"], result["n"]) == (100, 2)
    assert result["other_extractions"] == {"strict": 0}
    prompt = BENCHES["crpe"].ask(rows[0], True)
    assert prompt.startswith(bench_eval.COT) and prompt.endswith("D. pig")


def test_judges_are_read_by_the_official_rules():
    item = {"id": "v1_3"}
    say = lambda read, text: read(item, "", Judgement(text), How("judge", False))  # noqa: E731
    assert say(bench_eval.read_mmvet, "0.7 | x").prediction == 0.7
    assert say(bench_eval.read_mmvet, "n/a") == bench_eval.Reading(0.0, parsed=False)
    assert say(bench_eval.read_llava, "8, 7\nwhy").prediction == (-1, -1)  # two blanks: three words
    assert say(bench_eval.read_llava, "8,7\nwhy").prediction == (8, 7)
    assert say(bench_eval.read_mmhal, "Rating: 5 ... Rating: 2").prediction == 0
    assert say(bench_eval.read_mmhal, "- Rating: 6, very").prediction == 6


@pytest.mark.parametrize(
    ("read", "said"),
    [("read_mmvet", 1.5), ("read_mmvet", [0.5, -1]), ("read_llava", "15 3\n"),
     ("read_llava", [11, 3]), ("read_mmhal", "Rating: 9"), ("read_mmhal", 7)],
)  # fmt: skip
def test_a_judgement_out_of_range_is_an_error_that_names_the_item(read, said):
    with pytest.raises(InputError, match="v1_3.*out of range"):
        getattr(bench_eval, read)({"id": "v1_3"}, "", Judgement(said), How("judge", False))


SYNONYMS = """person, man, woman, child, girl, police officer
bus, coach
train
knife
wine glass
hot dog
dog, puppy
bird, goose
chair, seat
toilet
tie
skis, ski
"""


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men, three women and the children's coaches", ["person", "person", "person", "bus"]),
        ("Buses and knives; a passenger train.", ["bus", "knife", "train"]),
        ("Hot dogs beside wine glasses. It is hot. Dogs run", ["hot dog", "wine glass", "dog"]),
        ("A baby bird, geese and a puppy", ["bird", "bird", "dog"]),
        ("The toilet seat; a bow tie", ["toilet", "tie"]),
        ("A seat near the toilet", ["toilet"]),
        ("He skis under blue skies on a glass floor", ["skis"]),
    ],
)
def test_chair_finds_plurals_double_words_and_no_false_persons(caption, objects, tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    assert bench_eval.chair_objects(caption, tmp_path / "synonyms.txt") == objects


def test_chair_uses_a_judges_object_list_and_says_so(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    first = {"image_id": 7, "caption": "two dogs and a man", "gt_objects": ["dog"]}
    rows = [first | {"gt_captions": ["a woman"]}, {**first, "image_id": 8, "gt_objects": []}]
    data = write_jsonl(tmp_path / "captions.jsonl", rows)
    rule = scored("object_halbench", data, data)
    assert (rule["extraction"], rule["response_level"]) == ("chair-rule", 50)
    assert (rule["mentions"], rule["hallucinated_mentions"]) == (4, 2)
    said = [{"id": "7", "judgement": 'So: ["dogs", "dog", "red bus"]', "judge": "j"}]
    said = write_jsonl(tmp_path / "j.jsonl", said)
    half = scored("object_halbench", data, data, judgements=(said,))
    assert half["score"] is None and half["missing_judgements"] == ["8"]
    assert (half["extraction"], half["judge"]) == ("chair-llm", "j")


def test_text_benchmarks_read_letters_matches_and_last_numbers(tmp_path):
    mc = {"id": "a", "question": "?", "choices": ["x", "y"], "answer": "B", "subject": "s"}
    mc = write_jsonl(tmp_path / "mc.jsonl", [mc, {**mc, "id": "b", "answer": 0}])
    said = [{"id": "a", "response": "It is (B)."}, {"id": "b", "response": "none"}]
    result = scored("text_mc", mc, write_jsonl(tmp_path / "a.jsonl", said))
    assert (result["score"], result["unparsed"]) == (50, 1)
    em = write_jsonl(
        tmp_path / "em.jsonl", [{"question": "?", "answer": ["The Nile", "nile river"]}]
    )
    said = write_jsonl(tmp_path / "a.jsonl", [{"id": 0, "response": "the answer is: the Nile!\nx"}])
    assert scored("text_em", em, said)["score"] == 100
    own = [{"question": "?", "answer": 3, "image": "a.png"}]
    own = write_jsonl(tmp_path / "own.jsonl", own)
    for reply, cot, right, unparsed in (
        ("3", False, 100, 0),
        ("Final answer: 3", False, 0, 1),
        ("So.\nFinal answer: 3", True, 100, 0),
        ("3", True, 0, 1),
    ):
        said = write_jsonl(tmp_path / "a.jsonl", [{"id": 0, "response": reply}])
        result = scored("own", own, said, cot=cot)
        assert (result["score"], result["unparsed"]) == (right, unparsed)
    gsm = write_jsonl(tmp_path / "g.jsonl", [{"question": "?", "answer": "so\n#### 1,200"}])
    for reply, right in (("1 + 2 = 1,200.00 $", 100), ("1200 or 12", 0), ("none", 0)):
        said = write_jsonl(tmp_path / "a.jsonl", [{"id": 0, "response": reply}])
        assert scored("gsm8k", gsm, said)["score"] == right


def test_prompts_are_exactly_the_published_ones():
    ask = lambda name, item, cot=False: BENCHES[name].ask(item, cot)  # noqa: E731
    item = {"question": "Which?", "choices": ["a", "b"], "hint": "Look."}
    question = "Look.\nWhich?\nA. a\nB. b"
    letter = "Answer with the option's letter from the given choices directly."
    cot = (
        "Your task is to answer the question below. Give step by step reasoning before you "
        "answer, and when you're ready to answer, please use the format "
        '"Final answer: .."\n\nQuestion:\n\n'
    )
    assert ask("m3cot", item) == f"{question}\n{letter}"
    assert ask("m3cot", item, True) == cot + question
    for text in ("Is it?", "Is it?\nAnswer the question using a single word or phrase."):
        direct = "Is it?\nAnswer the question using a single word or phrase."
        assert ask("pope", {"text": text}) == direct
        assert ask("pope", {"text": text}, True) == cot + "Is it?"
    drawn = {"question": "Q?\n<image1>\n<image2>", "options": list("ABCDE")}
    assert ask("mathvision", drawn) == "Q?"
    assert ask("mathvision", {**drawn, "options": ["1", "2"]}, True) == cot + "Q?\nA. 1\nB. 2"
    assert ask("mmvet", {"question": "Q?"}) == "Q? "
    free = "Your task is to answer the question below. Give step by step reasoning. \n\nQuestion:"
    assert ask("mmvet", {"question": "Q?"}, True) == f"{free}\n\nQ?"
    assert ask("llava_bench", {"text": "Q?"}) == "Q? Please give a detailed answer."


# --------------------------------------------------------------------------- input


POPE_ROWS = [
    {"question_id": i, "image": f"{i}.jpg", "text": "Is it?", "label": "yes" if i % 2 else "no"}
    for i in range(1, 5)
]


def pope_data(folder: Path) -> Path:
    for category in bench_eval.POPE:
        write_jsonl(folder / f"coco_pope_{category}.json", POPE_ROWS)
    return folder


def pope_answers(path: Path) -> Path:
    rows = [
        {"category": c, "question_id": r["question_id"], "response": r["label"].title()}
        for c in bench_eval.POPE
        for r in reversed(POPE_ROWS)
    ]
    return write_jsonl(path, rows)


def test_pope_is_paired_by_key_also_in_llavas_list(tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    assert scored("pope", data, answers)["score"] == 100
    rows = [
        {"question_id": n, "category": c, "image": r["image"],
         "text": r["text"] + bench_eval.PHRASE_SUFFIX}
        for n, (c, r) in enumerate((c, r) for c in bench_eval.POPE for r in POPE_ROWS)
    ]  # fmt: skip
    llava = write_jsonl(tmp_path / "d/llava_pope_test.jsonl", rows)
    said = [{"question_id": n, "text": "No" if n % 4 % 2 else "Yes"} for n in range(12)]
    result = scored("pope", llava, write_jsonl(tmp_path / "b.jsonl", said))
    assert result["score"] == 100  # the labels come from the official files beside the list
    assert result["groups"]["category"]["random"]["TP"] == 2


def test_bad_input_is_named(tmp_path, capsys):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    rows = read_jsonl(answers)
    with pytest.raises(InputError, match="no reply for 2 of 12 items: random/1, random/2"):
        scored("pope", data, write_jsonl(tmp_path / "b.jsonl", rows[:2] + rows[4:]))
    with pytest.raises(InputError, match=r"b.jsonl line 13: duplicate id 'random/4'"):
        scored("pope", data, write_jsonl(tmp_path / "b.jsonl", [*rows, rows[0]]))
    with pytest.raises(InputError, match="not in the data"):
        scored("pope", data, write_jsonl(tmp_path / "b.jsonl", [{**rows[0], "question_id": 99}]))
    with pytest.raises(InputError, match="may be .* needs its 'category'"):
        scored("pope", data, write_jsonl(tmp_path / "b.jsonl", [{"question_id": 1, "text": "no"}]))
    with pytest.raises(InputError, match="not a file of mathvista; it looks like pope"):
        scored("mathvista", data / "coco_pope_random.json", answers)
    with pytest.raises(InputError, match="duplicate ids: random/1"):
        twice = write_jsonl(tmp_path / "coco_pope_random.json", POPE_ROWS + POPE_ROWS[:1])
        scored("pope", twice, answers)
    with pytest.raises(InputError, match="no mm-vet"):
        scored("mmvet", data, answers)
    for argv in (
        ["score", "--bench", "pope", "--data", "nowhere", "--answers", "nowhere"],
        ["score", "--bench", "pope"],
        ["score", "--bench", "pope", "--data", "d", "--answers", "a", "--judgements", "j"],
        ["generate", "--bench", "llava_bench", "--cot"],
        ["score", "--bench", "pope", "--data", "d", "--answers", "a", "--extraction", "magic"],
    ):
        with pytest.raises(SystemExit) as stop:
            bench_eval.run(lambda argv=argv: bench_eval.main(argv))
        assert stop.value.code == 2
    assert "known: rule" in capsys.readouterr().err


MMVET = {
    f"v1_{i}": {
        "imagename": f"{i}.png",
        "question": "Q?",
        "answer": "a<AND>b",
        "capability": ["ocr"],
    }
    for i in range(3)
}


def test_judging_goes_through_files_and_is_incomplete_until_all_ids_are_there(tmp_path):
    data = tmp_path / "mm-vet.json"
    data.write_text(json.dumps(MMVET))
    answers = tmp_path / "model.json"  # the official format of results
    answers.write_text(json.dumps({name: f"reply {name}" for name in MMVET}))
    (tmp_path / "template.txt").write_text("OFFICIAL")
    flags = {"bench": "mmvet", "data": (data,), "answers": (answers,), "out": tmp_path / "r"}
    bench_eval.judge(Judge(**flags, judge_template=tmp_path / "template.txt"))
    requests = read_jsonl(tmp_path / "r/requests.jsonl")
    assert requests[1]["id"] == "v1_1" and requests[1]["max_tokens"] == 3
    assert requests[1]["messages"][0]["content"] == "OFFICIAL\nQ? | a <AND> b | reply v1_1 | "

    said = [
        {"id": r["id"], "judgement": "0.5", "judge": "gpt-x", "date": "2024-11-20"}
        for r in requests
    ]
    judgements = write_jsonl(tmp_path / "r/judgements.jsonl", said[:2])
    assert bench_eval.judge(Judge(**flags)) == ["v1_2"]
    half = scored("mmvet", data, answers, judgements=(judgements,), out=tmp_path / "r")
    assert (half["status"], half["score"], half["partial"]["n"]) == ("incomplete", None, 2)
    assert half["missing_judgements"] == ["v1_2"]
    assert "incomplete" in bench_eval.report(Report(dir=(tmp_path / "r",), out=tmp_path / "rep"))
    write_jsonl(judgements, said)
    whole = scored("mmvet", data, answers, judgements=(judgements,))
    assert (whole["score"], whole["judge"], whole["judge_date"]) == (50, "gpt-x", "2024-11-20")
    nothing = scored("mmvet", data, answers)
    assert nothing["score"] is None and len(nothing["missing_judgements"]) == 3
    write_jsonl(judgements, [*said, {"id": "v1_9", "judgement": "1.0"}])
    with pytest.raises(InputError, match="v1_9"):
        scored("mmvet", data, answers, judgements=(judgements,))


def test_scoring_never_imports_torch(tmp_path):
    data, answers = pope_data(tmp_path / "d"), pope_answers(tmp_path / "a.jsonl")
    code = (
        "import sys, eval\n"
        f"eval.main(['score','--bench','pope','--data',{str(data)!r},'--answers',{str(answers)!r}])\n"
        "assert not {'torch', 'matplotlib', 'PIL', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["score"] == 100 and "pope Direct: 100.00" in done.stderr
    needed = "n standard_error split setting extraction judge prompts unparsed groups"
    assert set(needed.split()) <= set(result)


# --------------------------------------------------------------------------- generate

FAKE = '''
import os
from dataclasses import dataclass

@dataclass
class Prompt:
    id: str
    question: str
    images: tuple = ()
    history: tuple = ()
    prefix: str = ""
    max_tiles: int = 12
    num_samples: int = 1
    samples: tuple | None = None
    max_new_tokens: int | None = None

@dataclass
class Sample:
    prompt_id: str
    sample: int
    text: str
    finish_reason: str
    num_tokens: int
    prompt_tokens: int = 1
    image_tokens: int = 256
    logp: float = 0.0

class Generator:
    loads = 0
    @classmethod
    def load(cls, model_dir, device=None, dtype=None, temperature=0.0, max_new_tokens=1024, **more):
        cls.loads += 1
        assert temperature == 0.0
        return cls()

    def run(self, prompts):
        """Replies in pairs, the later prompt first, as a batch that finishes out of order."""
        left, held = int(os.environ.get("DIES_AFTER", "-1")), []
        for prompt in list(prompts):
            held.append(prompt)
            while len(held) > 1:
                yield self.answer(held.pop(), prompt)
                left -= 1
                if left == 0:
                    os._exit(9)
        while held:
            yield self.answer(held.pop(), None)

    def answer(self, prompt, _):
        assert len(prompt.images) == 1 and prompt.images[0].is_file() and prompt.max_tiles == 6
        cot = "Final answer" in prompt.question
        number = int(prompt.images[0].stem)
        word = "Yes" if number % 2 or (number == 4 and not cot) else "No"
        text = f"I look \\u00e9. Final answer: {word}" if cot else f" {word} "
        return Sample(prompt.id, 0, text, "stop", len(text))
'''


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Questions with images, a model folder, and a generator that needs no model."""
    data = pope_data(tmp_path / "data")
    for row in POPE_ROWS:
        (data / row["image"]).write_bytes(b"not opened here")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/generate.py").write_text(FAKE)
    spec = importlib.util.spec_from_file_location("generate", tmp_path / "fake/generate.py")
    fake = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "generate", fake)
    spec.loader.exec_module(fake)
    return tmp_path


def asked(world: Path, out: str, **more) -> Generate:
    return Generate(bench="pope", data=(world / "data",), model_dir=world / "model",
                    out=world / out, **more)  # fmt: skip


def as_rank(monkeypatch, rank: int, size: int, cfg: Generate) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))
    bench_eval.generate(cfg)


def test_one_and_two_processes_write_the_same_answers(world, monkeypatch):
    bench_eval.generate(asked(world, "one"))
    as_rank(monkeypatch, 1, 2, asked(world, "two"))
    assert not (world / "two/answers.jsonl").exists()  # the other half is not there yet
    as_rank(monkeypatch, 0, 2, asked(world, "two"))
    one = (world / "one/answers.jsonl").read_bytes()
    assert one == (world / "two/answers.jsonl").read_bytes()
    rows = read_jsonl(world / "one/answers.jsonl")
    assert [row["id"] for row in rows[:2]] == ["adversarial/1", "adversarial/2"]  # file order
    assert rows[0]["response"] == "Yes" and rows[0]["finish_reason"] == "stop"
    assert sorted(p.name for p in (world / "two").glob("answers.*-of-*")) == [
        "answers.0-of-2.jsonl", "answers.1-of-2.jsonl",
    ]  # fmt: skip


def test_a_killed_run_resumes_with_any_number_of_processes(world, monkeypatch):
    bench_eval.generate(asked(world, "one", cot=True))
    command = [sys.executable, str(ROOT / "eval.py"), "generate", "--bench", "pope", "--cot",
               "--data", str(world / "data"), "--model_dir", str(world / "model"),
               "--out", str(world / "killed")]  # fmt: skip
    # the fake stands before the repository's own generate.py on the path
    start = (
        f"import sys; sys.path[:0] = [{str(world / 'fake')!r}, {str(ROOT)!r}]; import eval; "
        f"eval.main({command[2:]!r})"
    )
    for rank, after in ((0, 3), (1, 2)):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "DIES_AFTER": str(after)}
        run = subprocess.run([sys.executable, "-c", start], env=env, capture_output=True, text=True)
        assert run.returncode == 9, run.stderr
    part = world / "killed/answers.0-of-2.jsonl"
    part.write_bytes(part.read_bytes()[:-9])  # a torn last line
    assert len(read_jsonl(world / "killed/answers.1-of-2.jsonl")) == 2
    for rank in range(3):  # another number of processes than before
        as_rank(monkeypatch, rank, 3, asked(world, "killed", cot=True))
    one = (world / "one/answers.jsonl").read_bytes()
    assert (world / "killed/answers.jsonl").read_bytes() == one
    fake = sys.modules["generate"].Generator
    loads = fake.loads
    as_rank(monkeypatch, 0, 1, asked(world, "killed", cot=True))
    assert fake.loads == loads  # nothing left to do: no model is loaded


def test_other_settings_in_a_folder_are_refused(world):
    bench_eval.generate(asked(world, "one"))
    with pytest.raises(InputError, match="setting 'Direct', not 'CoT'"):
        bench_eval.generate(asked(world, "one", cot=True))
    with pytest.raises(InputError, match="max_tiles 6, not 12"):
        bench_eval.generate(asked(world, "one", max_tiles=12))
    (world / "model/config.json").write_text('{"other": 1}')
    with pytest.raises(InputError, match="weights"):
        bench_eval.generate(asked(world, "one"))


def test_all_missing_images_are_listed_before_any_model_is_loaded(world):
    (world / "data/2.jpg").unlink()
    (world / "data/3.jpg").unlink()
    with pytest.raises(InputError, match="6 of 12 images") as error:
        bench_eval.generate(asked(world, "one"))
    assert "random/2" in str(error.value) and "adversarial/3" in str(error.value)
    assert sys.modules["generate"].Generator.loads == 0


def test_images_stay_in_their_folder_and_may_stand_in_the_file_itself(world):
    outside = write_jsonl(world / "data/x_random.json", [{**POPE_ROWS[0], "image": "../model"}])
    with pytest.raises(InputError, match="leaves"):
        bench_eval.generate(
            Generate("pope", (outside,), model_dir=world / "model", out=world / "o")
        )
    picture = base64.b64encode(b"a picture" * 200).decode()
    row = {"question": "Q?", "gt_answer": "a", "image_content": [], "image": picture}
    items = bench_eval.load_items(BENCHES["mmhal"], (write_jsonl(world / "m.jsonl", [row]),))
    (path,) = bench_eval.image_paths(BENCHES["mmhal"], items, "", world / "o")
    assert path.read_bytes() == b"a picture" * 200


def test_no_reply_makes_a_reader_fail():
    """Published outputs hold anything: every offline reader returns a verdict, and quickly."""
    choices = ["a", "b c", "9"]
    item = {"id": "1", "choices": choices, "options": choices, "gold": "A", "golds": ["a"],
            "answer": "A", "label": "yes", "correct_option": "A", "text": "Q?\nA. a\nB. b",
            "precision": 2, "question_type": "free_form", "answer_type": "float"}  # fmt: skip
    replies = [
        "",
        " ",
        "(",
        "(A",
        "\\frac",
        "\\boxed{",
        "}{",
        "=",
        "is ",
        "1e999",
        "nan",
        "1/0",
        "٣",
    ]
    replies += [
        "9" * 5000,
        "(" * 3000,
        "Answer:",
        "Final answer:\n",
        "\x00\ud800",
        "²",
        "[1,",
        "(,)",
    ]
    for name in ("m3cot", "mathvista", "mathvision", "pope", "crpe", "text_mc", "text_em", "gsm8k"):
        gold = {**item, "gold": "3"} if name == "gsm8k" else item
        for mode in BENCHES[name].modes:
            for reply in replies:
                for kind in ("float", "integer", "list", "text"):
                    both = {"answer_type": kind, "question_type": "multi_choice"}
                    row = gold | (both if kind == "text" else {"answer_type": kind})
                    for cot in (False, True):
                        reading = BENCHES[name].read(row, reply, None, How(mode, cot))
                        assert reading.correct in (True, False)


def test_direct_cot_and_their_difference_are_reported_side_by_side(world, capsys):
    for cot in (False, True):
        out = asked(world, f"pope-{cot}", cot=cot).out
        bench_eval.generate(asked(world, f"pope-{cot}", cot=cot))
        flags = ["--bench", "pope", "--data", str(world / "data"), "--answers", str(out)]
        bench_eval.main(["score", *flags])
    capsys.readouterr()
    folders = [str(world / "pope-False"), str(world / "pope-True")]
    bench_eval.main(["report", *folders, "--out", str(world / "report")])
    text = capsys.readouterr().out
    assert text == (world / "report/report.txt").read_text()
    whole = json.loads((world / "report/report.json").read_text())
    pope = whole["ours"]["model"]["pope"]
    assert pope == {"Direct": pytest.approx(80), "CoT": 100, "difference": pytest.approx(20)}
    assert whole["scores"][1]["without_final_answer"] == 0
    for line in text.splitlines():
        if line.startswith("model CoT - Direct"):
            assert "+20.0" in line
    assert "paper InternVL2-8B-MPO" in text and "79.2" in text
    assert (world / "report/report.png").stat().st_size > 5000
    with pytest.raises(InputError, match="both hold model pope Direct"):
        bench_eval.report(Report(dir=(Path(folders[0]), Path(folders[0])), out=world / "report"))


def test_replies_of_the_wrong_setting_or_benchmark_are_refused(world):
    bench_eval.generate(asked(world, "one"))
    with pytest.raises(InputError, match="run.json beside the answers says Direct"):
        scored("pope", world / "data", world / "one", cot=True)
    with pytest.raises(InputError, match="to pope, not to crpe"):
        scored("crpe", world / "data", world / "one")


def test_the_flag_and_the_table_name_the_same_benchmarks():
    assert tuple(BENCHES) == bench_eval.BenchName.__args__
    for b in BENCHES.values():
        assert set(b.judged) <= set(b.modes) and (b.judge is not None) == bool(b.judged)
