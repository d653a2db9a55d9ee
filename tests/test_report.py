"""The report of a story: every figure follows from the files."""

import json

import pytest
from conftest import ROOT

from paper import report
from runtime import InputError

FLAGS = {"loss": "mpo", "lr": 1e-3}


def model(row, direct, cot, malformed=0.0, shift=None, **more):
    measures = {"direct": direct, "cot": cot, "malformed": malformed}
    measures |= {"chosen_shift": shift, "rejected_shift": shift}
    record = {"row": row, "flags": FLAGS}
    return record | {"measures": measures, "questions": {}} | more


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_model(folder, record, right):
    """result.json, with whether each test question was answered rightly."""
    questions = {f"test-{i}": 100.0 * (right and i < 3) for i in range(4)}
    record |= {"questions": dict.fromkeys(("direct", "cot"), questions)}
    write(folder / "result.json", record)


@pytest.fixture
def story(tmp_path):
    """Two seeds with a base, SFT, DPO and MPO; the second one's DPO is not there yet."""
    about = {"settings": {"steps": 2}, "seeds": [1, 2], "quick": False, "date": "2026-01-02"}
    about |= {"machine": "a laptop", "commit": "abc", "torch": "2"}
    write(tmp_path / "story.json", about)
    for seed, more in ((1, 0.0), (2, 4.0)):
        folder = tmp_path / f"seed-{seed}"
        dropout = {"pairs": 100, "chosen": 2.0, "rejected": 3.0}
        write(folder / "pairs.json", {"dropout": dropout})
        write_model(folder / "base", model("base", 60.0, 50.0 + more), False)
        rows = [model("SFT", 62.0, 60.0 + more)]
        rows.append(model("MPO", 66.0, 63.0 + more, 1.0, -0.5))
        if seed == 1:
            rows.append(model("DPO", 55.0, 45.0, 8.0, -3.0))
        for row in rows:
            write_model(folder / "rows" / row["row"], row, row["row"] == "MPO")
    return tmp_path


def claims(story):
    lines = report.results_of(story)["claims"]
    return {line["claim"].split(" (")[0]: line for line in lines}


def test_rows_stand_in_the_papers_order_with_means_and_paired_differences(story):
    lines = report.results_of(story)["rows"]
    assert [line["row"] for line in lines] == ["base", "SFT", "DPO", "MPO"]
    mpo = lines[-1]
    assert (mpo["cot"], mpo["seeds"], mpo["paper"]) == (65.0, [1, 2], (77.7, 79.1))
    assert mpo["cot_std"] == pytest.approx(8**0.5)
    assert (mpo["cot_minus_base"], mpo["cot_minus_base_se"]) == (13.0, 0.0)
    assert mpo["cot_minus_SFT"] == 3.0
    assert lines[2]["cot_std"] is None  # one seed has no spread
    assert lines[2]["cot_minus_base_half"] == 0.0  # its questions have one: none changed


@pytest.mark.parametrize("values, half", [
    ([1.0], None),
    ([1.0, 2.0], 12.706 * 0.5),  # t(1) = 12.706, standard error 0.5
    ([9.0, 10.0, 11.0], 4.303 / 3**0.5),
    ([0.0, 100.0] * 300, 1.9639 * 50 * (600 / 599) ** 0.5 / 600**0.5),  # t(599) = 1.9639
])  # fmt: skip
def test_intervals_are_those_of_student(values, half):
    assert report.half_width(values) == (half and pytest.approx(half, rel=1e-3))


@pytest.mark.parametrize("values, verdict", [
    ([12.0, 13.0, 14.0], "agrees"),  # 13 +- 2.5, needed: 2
    ([2.0, 5.0, 8.0], "undecided"),  # 5 +- 7.5
    ([-2.0, -1.0, -3.0], "disagrees"),
    ([30.0], "undecided"),  # one seed never decides
])  # fmt: skip
def test_a_claim_is_decided_where_its_whole_interval_is_on_one_side(values, verdict):
    for needed, sign in ((">= +2", 1), ("<= -2", -1)):
        seeds = {seed: (sign * value, {}) for seed, value in enumerate(values)}
        claim = {"claim": "", "one": "MPO gap", "other": None, "needed": needed, "open": False}
        line = report.judge({"MPO gap": seeds}, claim)
        assert line["verdict"] == verdict


def test_claims_are_paired_differences_over_seeds_and_over_questions(story):
    lines = claims(story)
    mpo = lines["MPO improves chain of thought"]
    assert mpo["values"] == {1: 13.0, 2: 13.0} and mpo["half"] == 0 and mpo["verdict"] == "agrees"
    # of four questions three turn right: 75 +- 3.182 * 50 / 2
    assert mpo["questions"] == {1: pytest.approx(79.55), 2: pytest.approx(79.55)}
    dpo = lines["MPO beats DPO"]  # on the seed that has both
    assert (dpo["values"], dpo["verdict"]) == ({1: 18.0}, "undecided")
    base = lines["The base answers worse with a chain of thought than directly"]
    assert base["values"] == {1: -10.0, 2: -6.0} and base["verdict"] == "undecided"
    twice = lines["DropoutNTP: rejected answers make up twice what chosen ones do"]
    assert twice["values"] == {1: -1.0, 2: -1.0}  # 3 - 2 x 2
    assert twice["verdict"] == "disagrees"
    assert "DropoutNTP pairs lower hallucination" not in lines  # not run


def cells_of(story, **changes):
    """Of the report's first claim, with these changes of results.json."""
    report.write_report(story)
    results = json.loads((story / "results.json").read_text())
    results["claims"][0] |= changes
    write(story / "results.json", results)
    (story / "story.json").unlink()  # else the results are computed again
    lines = report.write_report(story).splitlines()
    return next(line for line in lines if line.startswith("| The base answers")).split(" | ")


@pytest.mark.parametrize("value, words", [
    (1.0, "below all 3 seeds"), (9.0, "above all 3 seeds"), (2.0, "within the 3 seeds"),
])  # fmt: skip
def test_one_seed_is_placed_among_the_committed_ones(story, value, words):
    assert cells_of(story, number=value, committed=[2.0, 4.0, 8.0])[-1] == f"{words} |"


@pytest.mark.parametrize("needed, words", [(">= +3", "2 of 3"), ("<= +3", "2 of 3")])
def test_a_claim_says_on_how_many_seeds_it_holds(story, needed, words):
    values = {"1": 2.0, "2": 3.0, "3": 4.0}
    assert cells_of(story, needed=needed, bound=3.0, values=values)[4] == words


def test_the_report_of_one_seed_says_where_it_falls(story, tmp_path, monkeypatch):
    texts = [claim["claim"] for claim in report.CLAIMS]
    text = next(text for text in texts if text.startswith("MPO beats SFT"))
    committed = {"claims": [{"claim": text, "values": {"1": 9.0, "2": 4.0}}]}
    write(tmp_path / "committed.json", committed)
    monkeypatch.setattr(report, "COMMITTED", tmp_path / "committed.json")
    about = json.loads((story / "story.json").read_text())
    write(story / "story.json", about | {"seeds": [1], "quick": True})
    markdown = report.write_report(story)
    lines = [line for line in markdown.splitlines() if line.startswith("| MPO")]
    shown = "| +3.0 ± 79.5 | +3.0 | 1 of 1 | undecided | below all 2 seeds |"
    assert next(line for line in lines if "beats SFT" in line).endswith(shown)
    assert next(line for line in lines if "keeps the format" in line).endswith("undecided | - |")
    assert "one seed never decides" in markdown


def test_markdown_and_page_hold_the_same_and_what_is_missing_shows(story):
    markdown = report.write_report(story)
    page = (story / "report.html").read_text()
    assert (story / "report.md").read_text() == markdown
    mpo = next(line for line in markdown.splitlines() if line.startswith("| MPO |")).split(" | ")
    assert mpo[1:4] == ["66.0 ± 0.0", "65.0 ± 2.8", "-1.0"]
    assert "| DPO | 55.0 | 45.0 | -10.0 |" in markdown  # one seed: no spread
    assert "2026-01-02, a laptop, torch 2, commit abc, seeds 1, 2." in markdown
    assert "<td>66.0 ± 0.0<td>65.0 ± 2.8<td>-1.0" in page
    assert "<td>&lt;= -5<td>" in page and "<td><code>L = 0.8 L_dpo" in page
    assert page.count("data:image/png;base64,") == 3  # the world, the claims, the rows
    assert "http" not in page and "<script" not in page
    results = json.loads((story / "results.json").read_text())
    assert results["rows"][-1]["cot"] == 65.0
    assert len(results["claims"]) == len(report.CLAIMS) - 2  # no MPO+NTP


def test_the_committed_report_follows_from_its_committed_results(tmp_path):
    results = (ROOT / "paper/results.json").read_text()
    write(tmp_path / "results.json", results)
    assert report.write_report(tmp_path) == (ROOT / "paper/report.md").read_text()
    assert "dirty" not in json.loads(results)["about"]["commit"]


def test_an_ablated_value_is_a_row_of_its_own_beside_the_plain_one(story):
    for seed, more in ((1, 0.0), (2, 4.0)):
        record = model("w_g=2.0", 60.0, 64.0 + more)
        write(story / f"seed-{seed}/rows/w_g=2.0/result.json", record)
    results = report.results_of(story)
    assert "w_g=2.0" not in [line["row"] for line in results["rows"]]
    line = results["ablations"][0]
    assert (line["study"], line["value"], line["cot"]) == ("w_g", "2.0", 66.0)
    assert (line["cot_minus_MPO"], line["cot_minus_MPO_half"]) == (1.0, 0.0)
    assert "| w_g=2.0 | 60.0 ± 0.0 | 66.0 ± 2.8 |" in report.write_report(story)


def test_rows_in_another_order_than_the_papers_lower_the_rank_correlation(story):
    def order():
        return report.results_of(story)["orderings"]

    # base < SFT < DPO < MPO in the paper; here DPO is last
    assert order() == {"spearman": pytest.approx(0.4), "rows": 4}
    for path in story.glob("seed-*/**/result.json"):
        record = json.loads(path.read_text())
        record["measures"]["cot"] = 0.0
        write(path, record)
    assert order()["spearman"] is None  # equal scores leave it open


def test_mentions_that_a_longer_story_adds_to_a_quick_one_are_read(story):
    write(story / "seed-1/rows/MPO/mentions.json", {"mentions": 7.5})
    rows = {line["row"]: line for line in report.results_of(story)["rows"]}
    assert (rows["MPO"]["mentions"], rows["SFT"]["mentions"]) == (7.5, None)


def test_a_folder_without_a_finished_base_is_named(tmp_path):
    with pytest.raises(InputError, match="no finished base model; run `python -m paper.story`"):
        report.collect(tmp_path)
