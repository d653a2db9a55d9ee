"""The report of a story: every figure follows from the files."""

import json

import pytest
from conftest import ROOT
from PIL import Image

import report
from runtime import InputError
from toy import CHOSEN_RATES

FLAGS = {"loss": "mpo", "lr": 1e-3}


def model(row, seed, direct, cot, malformed=0.0, shift=None, **more):
    test = {"direct": {"score": direct, "malformed": 0.0, "n": 100}}
    test["cot"] = {"score": cot, "malformed": malformed, "n": 100}
    record = {"row": row, "seed": seed, "study": None, "value": None, "flags": FLAGS, "test": test}
    return record | {"describe": None, "chosen_shift": shift, "rejected_shift": shift} | more


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_model(folder, record, right):
    """result.json, a short curve, and one answer a setting."""
    write(folder / "result.json", record)
    steps = [
        {"step": i, "nll": 1 / (i + 1), "rewards/chosen": -i, "rewards/margin": i} for i in (0, 1)
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps))
    for setting in ("direct", "cot"):
        answer = {"id": "test-0", "response": f"<b>{record['row']}</b>"}
        write(folder / f"test-{setting}/answers.jsonl", json.dumps(answer) + "\n")
        item = {"id": "test-0", "correct": right}
        write(folder / f"test-{setting}/items.jsonl", json.dumps(item) + "\n")


@pytest.fixture
def story(tmp_path):
    """Two seeds with a base, SFT, DPO and MPO; the second one's DPO is not there yet."""
    about = {"settings": {"steps": 2}, "seeds": [1, 2], "quick": False, "date": "2026-01-02"}
    about |= {"machine": "a laptop", "commit": "abc", "torch": "2"}
    write(tmp_path / "story.json", about)
    for seed, more in ((1, 0.0), (2, 4.0)):
        folder = tmp_path / f"seed-{seed}"
        rates = {"n": 100, "mentions": 2.0, "responses": 4.0}
        lost = {"n": 100, "mentions": 10.0, "responses": 6.0}
        dropout = {"0.5": {"pairs": 100, "chosen": rates, "rejected": lost}}
        write(folder / "pairs.json", {"dropout": dropout})
        question = {"id": "test-0", "image": "a.png", "question": "How many?", "answer": "3"}
        write(folder / "test.jsonl", json.dumps(question) + "\n")
        (folder / "images").mkdir()
        Image.new("RGB", (24, 24), "red").save(folder / "images/a.png")
        write_model(folder, model("base", seed, 60.0, 50.0 + more), False)
        rows = [model("SFT", seed, 62.0, 60.0 + more)]
        rows.append(model("MPO", seed, 66.0, 63.0 + more, 1.0, -0.5))
        if seed == 1:
            rows.append(model("DPO", seed, 55.0, 45.0, 8.0, -3.0))
        for row in rows:
            write_model(folder / "rows" / row["row"], row, row["row"] == "MPO")
    return tmp_path


def test_rows_stand_in_the_papers_order_with_means_and_paired_differences(story):
    lines = report.tables(report.collect(story))
    assert [line["row"] for line in lines] == ["base", "SFT", "DPO", "MPO"]
    mpo = lines[-1]
    assert (mpo["cot"], mpo["seeds"], mpo["paper"]) == (65.0, [1, 2], (77.7, 79.1))
    assert mpo["cot_std"] == pytest.approx(8**0.5)
    assert (mpo["cot_minus_base"], mpo["cot_minus_base_se"]) == (13.0, 0.0)
    assert mpo["cot_minus_SFT"] == 3.0
    assert lines[2]["cot_std"] is None  # one seed has no spread


def test_markdown_tells_where_it_ran_and_has_the_table_and_the_verdicts(story):
    about = json.loads((story / "story.json").read_text()) | {"seconds": {"rows": 120}}
    write(story / "story.json", about)
    lines = report.markdown(report.collect(story)).splitlines()
    assert lines[0] == "2026-01-02, a laptop, torch 2, commit abc, seeds 1, 2, rows 2 minutes:"
    mpo = next(line for line in lines if line.startswith("| MPO |")).split(" | ")
    assert mpo[1:4] == ["66.0 ± 0.0", "65.0 ± 2.8", "-1.0"]
    verdicts = [line for line in lines if line.startswith("| MPO beats DPO")]
    assert verdicts[0].endswith("| >= +8 on average | +18.0 | +18.0 (on 1 of 2 seeds) | agrees |")


def test_the_readme_repeats_the_committed_results_word_for_word():
    paper, readme = ROOT / "paper", (ROOT / "README.md").read_text()
    assert (paper / "report.md").read_text() in readme
    results = json.loads((paper / "results.json").read_text())
    assert results["about"]["commit"] in readme and "dirty" not in results["about"]["commit"]
    assert results["about"]["settings"]["rates"] == CHOSEN_RATES


def test_the_rates_of_the_rows_are_those_that_tuning_chose():
    tuning = json.loads((ROOT / "paper/tuning.json").read_text())
    assert {row: of["chosen"] for row, of in tuning["rows"].items()} == CHOSEN_RATES
    for row, of in tuning["rows"].items():
        means = {float(lr): sum(both) for lr, both in of["Direct, CoT"].items()}
        assert len(means) == 3 and means[of["chosen"]] == max(means.values()), row


def test_the_page_tells_how_the_rates_were_chosen():
    said = report.how_tuned({"tuning": {"tried": [1, 2, 3, 4], "seed": 9, "steps": 7}})
    assert "tried at 2 and 3, then at 1 or 4, beyond the better of these" in said
    assert "for 7 steps on seed 9" in said


def test_claims_are_judged_on_every_seed_or_on_the_mean_as_they_say(story):
    found = {g.claim.split(" (")[0]: g for g in report.gates(report.collect(story))}
    verdicts = {claim: g.verdict for claim, g in found.items()}
    assert verdicts["MPO improves chain of thought"] == "agrees"
    assert found["MPO improves chain of thought"].values == {1: 13.0, 2: 13.0}
    assert verdicts["MPO beats DPO"] == "agrees"  # on the seed that has both
    assert verdicts["DPO lowers the log-prob of chosen answers more than MPO"] == "agrees"
    base = found["The base answers worse with a chain of thought than directly"]
    assert base.values == {1: -10.0, 2: -6.0} and base.holds
    assert verdicts["After MPO a chain of thought is better than a direct answer"] == "fails"
    assert verdicts["DropoutNTP pairs lower hallucination"] == "not run"
    made_up = [g for g in report.gates(report.collect(story)) if "make up" in g.claim]
    assert [g.number for g in made_up] == [5.0, 1.5]
    assert [g.verdict for g in made_up] == ["agrees", "fails"]


def test_a_claim_fails_where_a_single_seed_misses_it(story):
    path = story / "seed-2/rows/MPO/result.json"
    write(path, model("MPO", 2, 66.0, 65.0, 0.0, -0.5))
    found = {g.claim.split(" (")[0]: g for g in report.gates(report.collect(story))}
    assert found["MPO improves chain of thought"].values == {1: 13.0, 2: 11.0}
    assert found["MPO improves chain of thought"].verdict == "fails"


def test_orderings_count_pairs_that_the_paper_sets_apart(story):
    order = report.orderings(report.tables(report.collect(story)))
    # base < SFT < DPO < MPO in the paper; here DPO is last
    assert (order["agree"], order["of"], order["rows"]) == (4, 6, 4)
    assert order["spearman"] == pytest.approx(0.4)


def test_the_page_is_one_file_with_escaped_answers_and_names_what_is_missing(story):
    page = report.write_report(story).read_text()
    assert "Not there yet: DPO, seed 2" in page
    assert "&lt;b&gt;MPO&lt;/b&gt; (right)" in page and "<b>MPO</b> cot" in page
    assert page.count("data:image/png;base64,") == 3  # two plots and one picture
    assert "http" not in page and "<script" not in page
    results = json.loads((story / "results.json").read_text())
    assert results["rows"][-1]["cot"] == 65.0 and len(results["claims"]) == 11


def test_an_ablated_value_is_one_line_over_its_seeds_beside_the_plain_run(story):
    for seed, more in ((1, 0.0), (2, 4.0)):
        for value, cot in (("0.5", 61.0), ("1", 63.0), ("2.0", 64.0)):  # 1 is the plain run's
            record = model("MPO", seed, 60.0, cot + more, study="w_g", value=value)
            write(story / f"seed-{seed}/ablate/w_g={value}/result.json", record)
    record = model(report.NTP, 1, 60.0, 61.0, study="keep ratio", value="0.25")  # not described
    write(story / "seed-1/ablate/keep/result.json", record)
    lines = report.ablation_lines(report.collect(story))
    shown = [(line["value"], line["cot"], line["seeds"]) for line in lines]
    assert shown[1:] == [("0.5", 63.0, [1, 2]), ("1", 65.0, [1, 2]), ("2.0", 66.0, [1, 2])]
    assert shown[0] == ("0.25", 61.0, [1]) and lines[0]["paper"] == (9.3, 4.8)
    assert "0.01, 0.5, 1, 2, 5" in report.write_report(story).read_text()
    assert (story / "ablations.png").exists()


def test_a_verdict_on_some_of_the_seeds_says_so(story):
    text = report.summary(report.collect(story))
    assert (
        "MPO beats DPO (CoT, MPO - DPO): +18.0 [+18.0] >= +8 on average (on 1 of 2 seeds)" in text
    )
    assert text.count("(on 1 of 2 seeds)") == 2  # both of DPO's


def test_open_questions_are_not_counted_among_the_claims(story):
    c = report.collect(story)
    assert sum(g.open for g in report.gates(c)) == 3
    assert "7 of 8 claims of the paper that were tested here agree, and 0 of 1" in report.headline(
        c
    )


def test_equal_scores_leave_the_rank_correlation_open(story):
    for path in story.glob("seed-*/**/result.json"):
        record = json.loads(path.read_text())
        record["test"]["cot"]["score"] = 0.0  # a story that learned nothing still has a report
        write(path, record)
    assert report.orderings(report.tables(report.collect(story)))["spearman"] is None
    assert "rank correlation -" in report.write_report(story).read_text()


def test_the_same_folder_gives_the_same_page_and_numbers(story):
    def written():
        report.write_report(story)
        return [(story / name).read_bytes() for name in ("results.json", "report.html")]

    assert written() == written()


def test_a_folder_without_a_story_or_with_a_broken_file_is_named(tmp_path, story):
    with pytest.raises(InputError, match="story.json; run `python toy.py --story`"):
        report.collect(tmp_path / "none")
    write(story / "seed-1/rows/MPO/result.json", {"row": "MPO"})
    with pytest.raises(InputError, match="MPO/result.json: no 'seed'"):
        report.collect(story)
    write(story / "seed-1/rows/MPO/result.json", {"row": "MPO", "seed": 1, "test": {"direct": {}}})
    with pytest.raises(InputError, match="MPO/result.json: no 'cot'"):
        report.collect(story)
    write(story / "story.json", {"settings": {}})
    with pytest.raises(InputError, match="story.json: no 'seeds'"):
        report.collect(story)
