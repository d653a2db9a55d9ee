"""The preference engine: prompts, part files, pairing, DropoutNTP."""

import fcntl
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OURS
from PIL import Image
from safetensors.torch import save_file

import generate
import pairs
from records import grouped, part_files, read_meta, read_parts
from runtime import InputError, read_json, run

ROWS = [json.loads(line) for line in (OURS / "pairs_in.jsonl").read_text().splitlines()]
EXPECTED = json.loads((OURS / "pairs_expected.json").read_text())


# --------------------------------------------------------------------------- a stand-in engine


def Sample(prompt_id, number, text):
    return generate.Sample(prompt_id, number, text, "stop", 7, 20, 9, 0.0)


class Generator:
    """Answers by hash of (seed, prompt id, sample number), finishing in a scrambled order."""

    loads = 0
    stop_after = None  # raise in the middle of a run
    prompts: list = []

    @classmethod
    def load(cls, model_dir, seed=0, **options):
        cls.loads += 1
        engine = cls()
        engine.seed = seed
        return engine

    def text(self, prompt, k):
        number = int(hashlib.md5(f"{self.seed} {prompt.id} {k}".encode()).hexdigest(), 16)
        if prompt.prefix:
            endings = ["", " and a dog that is not there.", " near a lake.", " by a car."]
            return prompt.prefix + endings[number % 4]
        if prompt.id.startswith("claims"):
            return "- There is a red cross.\n- There is a dog."
        if prompt.id.startswith("questions"):
            return "- Is there a red cross?\n- Is there a dog?" if number % 5 else "- Only one?"
        if "Final answer" in prompt.question:
            answer = ["Final answer: 3", "Final answer: 4", "**Final answer:** 3", "No idea."]
            return f"I look at it.\nThought {number % 97}.\n{answer[number % 4]}"
        return f"The picture shows a red cross and {number % 997} more things in the corner."

    def run(self, prompts):
        waiting, done = [], 0
        for prompt in prompts:
            type(self).prompts.append(prompt)
            for k in prompt.samples:
                waiting.append(Sample(prompt.id, k, self.text(prompt, k)))
            while len(waiting) > 5:
                done += 1
                if self.stop_after and done > self.stop_after:
                    raise KeyboardInterrupt
                yield waiting.pop(done % 5)
        yield from waiting

    def word_probs(self, prompt, words):
        yes = int(hashlib.md5(prompt.id.encode()).hexdigest(), 16) % 2
        return [0.4 * (yes == (word in ("Yes", "yes"))) for word in words]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a model's files, pictures and questions; `generate` is the stand-in."""
    monkeypatch.setattr(pairs, "Generator", Generator)
    pairs.load_generator.cache_clear()
    monkeypatch.setattr(Generator, "stop_after", None)
    monkeypatch.setattr(Generator, "prompts", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 10, 10)).save(tmp_path / "images" / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "question": f"How many {{red}} things, {i}?", "answer": 3}
        )
    rows[5] = {"image": ["0.png", "1.png"], "question": "Both?", "answer": "3"}
    write_lines(tmp_path / "toys.jsonl", rows)
    return tmp_path


@pytest.fixture
def run_pairs(monkeypatch, capsys):
    """pairs.py with some words: (exit status, what it prints)."""

    def run_with(*words):
        monkeypatch.setattr(sys, "argv", ["pairs.py", *map(str, words)])
        status = 0
        try:
            run(pairs.main)
        except SystemExit as stop:
            status = stop.code
        output = capsys.readouterr()
        return status, output.out + output.err

    return run_with


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sampling(**changes):
    defaults = {"model_dir": Path("model"), "questions": Path("toys.jsonl"), "root": Path("images")}
    return pairs.SampleConfig(**{**defaults, "prompts": "en", "num_samples": 8, **changes})


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def responses(folder):
    """{(qid, k): text} of all part files."""
    rows = [r for _, r in read_parts(part_files(Path(folder)))]
    found = {(r["qid"], r["k"]): r["response"] for r in rows}
    assert len(found) == len(rows)
    return found


# --------------------------------------------------------------------------- prompts


def test_the_cot_prompt_is_the_benchmarks_wording():
    assert pairs.wrap_question("Which?\nA. x\nB. y", 1, "en") == (
        "<image>\nYour task is to answer the question below. Give step by step reasoning before "
        'you answer, and when you\'re ready to answer, please use the format "Final answer: .."'
        "\n\nQuestion:\n\nWhich?\nA. x\nB. y"
    )


@pytest.mark.parametrize(
    "instruction",
    [
        "\nAnswer the question using a single word or phrase.",
        "\nAnswer with the option's letter from the given choices directly.",
        " Please answer yes or no.",
        "\nPlease answer the question and put the final answer within \\boxed{}.",
    ],
)
def test_a_closing_short_answer_instruction_is_cut(instruction):
    assert pairs.wrap_question("Is {it} red?" + instruction, 0, "en").endswith("\n\nIs {it} red?")
    assert pairs.wrap_question("Is {it} red?" + instruction, 0, "none").endswith(instruction)
    behind = pairs.wrap_question(f"Is {{it}} red?{instruction}\n<image>", 1, "en")
    assert behind.startswith("<image>\n") and behind.endswith("\n\nIs {it} red?")


def test_one_placeholder_moves_to_the_front_and_several_stay():
    assert pairs.wrap_question("What is <image> this?", 1, "none") == "<image>\nWhat is  this?"
    two = "Image 1: <image>\nImage 2: <image>\nWhich?"
    assert pairs.wrap_question(two, 2, "en").endswith(two)
    assert pairs.wrap_question("Both?", 2, "none") == "<image>\n<image>\nBoth?"
    with pytest.raises(InputError, match="has 1 <image> for 0 images: add the missing 'image'"):
        pairs.wrap_question("The tag <image> in text", 0, "none")
    with pytest.raises(InputError, match="2 <image>"):
        pairs.wrap_question("<image> and <image>", 1, "en")


def test_identity_tells_a_list_from_its_printed_form(world):
    rows = [
        {"image": ["a"], "question": "q", "answer": "1"},
        {"image": "['a']", "question": "q", "answer": "1"},
    ]
    write_lines(world / "q.jsonl", rows)
    found = pairs.read_questions(Path("q.jsonl"), "q", ["en"], 6)
    assert len({fields["qid"] for _, fields in found}) == 2


def test_a_question_that_was_not_wrapped_may_say_so_with_null():
    row = {"image": "a", "response": "r", "answer": "1", "question": "q", "question_orig": None}
    keys = {pairs.response_key(row | {"question": q}, "x") for q in ("q", "another")}
    assert len(keys) == 2 and pairs.response_key(row | {"question_orig": "q"}, "x") in keys


def test_one_question_with_two_gold_answers_is_two_and_a_number_is_its_digits():
    row = {"image": "a", "response": "r", "question": "q"}
    one, digits, two = (pairs.response_key(row | {"answer": a}, "x") for a in (1, "1", 2))
    assert one == digits != two


# --------------------------------------------------------------------------- judging, pairing


def golden_groups():
    return [ROWS[i : i + 8] for i in range(0, len(ROWS), 8)]


def judged_golden():
    return [pairs.judge_group(rows, EXPECTED["mode"])[0] for rows in golden_groups()]


def test_possible_pairs_equal_the_golden_ones():
    found = {"correctness": [], "format": []}
    for query, judged in enumerate(judged_golden()):
        for kind in found:
            made = pairs.possible_pairs(judged, kind)
            found[kind] += [[query, c.meta["k"], r.meta["k"]] for c, r in made]
    assert {kind: sorted(made) for kind, made in found.items()} == EXPECTED["ours"]


def test_the_cap_is_over_both_kinds_with_wrong_answers_first():
    judged = judged_golden()[4]  # 12 possible correctness pairs, 3 format pairs
    for cap, official, want in [(15, False, (12, 3)), (13, False, (12, 1)), (4, False, (4, 0)),
                                (4, True, (4, 3))]:  # fmt: skip
        made = pairs.draw_pairs(judged, "key", 0, cap, official)
        assert tuple(map(len, made.values())) == want
    assert pairs.draw_pairs(judged, "key", 0, 4) == pairs.draw_pairs(judged, "key", 0, 4)
    draws = [pairs.draw_pairs(judged, "key", seed, 4)["correctness"] for seed in range(40)]
    seen = {(c.meta["k"], r.meta["k"]) for made in draws for c, r in made}
    assert len(seen) == 12  # every possible pair gets its turn
    assert pairs.choose(list(range(50)), 9, "key") == sorted(
        pairs.choose(list(range(50)), 9, "key")
    )


def test_a_right_response_is_not_paired_with_the_same_text_that_was_cut_off():
    right, cut_off = ({**ROWS[2], "response": "A van.\nFinal answer: A"} for _ in range(2))
    judged, _ = pairs.judge_group([right, cut_off | {"finish_reason": "length"}], ["mc_score"])
    assert [response.verdict for response in judged] == ["correct", "format"]
    assert not pairs.possible_pairs(judged, "format")


def test_empty_responses_are_counted_and_never_paired():
    rows = [ROWS[0], {**ROWS[0], "response": " \n", "k": 9}]
    judged, counts = pairs.judge_group(rows, EXPECTED["mode"])
    assert len(judged) == 1 and counts["empty responses"] == 1
    assert counts["format responses"] == 1


def test_under_mc_score_the_wording_of_the_gold_option_is_right():
    row = {"question": "What is it?\nA. a van\nB. a car", "answer": "A", "prompt_version": "en"}
    rows = [row | {"response": f"I see.\nFinal answer: {text}"} for text in ("a van", "a car")]
    judged, _ = pairs.judge_group(rows, ["mc_score"])
    assert [response.verdict for response in judged] == ["correct", "wrong"]


def test_gold_rationales_join_only_where_asked():
    unsolved = [{**ROWS[2], "rationale": "It is a van."}]  # answers B, gold is A
    solved = [ROWS[0], {**ROWS[0], "rationale": "It is a van."}]  # no matter which line has it
    for rows, rationales, right in [
        (unsolved, "off", 0),
        (unsolved, "unsolved", 1),
        (solved, "unsolved", 1),
        (solved, "all", 2),
    ]:
        judged, _ = pairs.judge_group(rows, EXPECTED["mode"], rationales)
        assert sum(response.verdict == "correct" for response in judged) == right
    added = pairs.judge_group(unsolved, EXPECTED["mode"], "all")[0][-1]
    assert added.text == "It is a van.\nFinal answer: A"
    assert added.meta["reason"] == "gold rationale"


def test_a_response_in_the_official_format_is_paired_and_rerun_to_the_same_bytes(
    tmp_path, run_pairs
):
    for out in ("a", "b", "a"):
        words = ("--samples", OURS / "pairs_in.jsonl", "--root", tmp_path, "--out_dir")
        status, output = run_pairs("correctness", *words, tmp_path / out)
        assert status == 0 and "571.2" in output
    first, second = ({p.relative_to(tmp_path / d): p.read_bytes() for p in (tmp_path / d).rglob("*")
                      if p.suffix in (".json", ".jsonl")} for d in ("a", "b"))  # fmt: skip
    assert first == second and len(first) == 4
    report = json.loads((tmp_path / "a" / "pairs.report.json").read_text())
    counts = report["correctness"]["sets"]["pairs_in"]
    assert counts["pairs"] == {"correctness": 36, "format": 15}
    assert counts["counts"]["ambiguous responses"] == 1
    assert counts["counts"]["questions all right"] == 1
    assert counts["counts"]["duplicate responses"] == 2


def test_written_pairs_are_what_training_reads(world):
    pairs.sample(sampling())
    pairs.correctness(pairs.CorrectnessConfig(out_dir=Path("out")))
    sets = read_meta(Path("out/meta.json"), max_tiles=12)
    assert {s.name for s in sets} == {
        f"toys_pairs_vqa_{k}_rules" for k in ("correctness", "format")
    }
    for data_set in sets:
        assert len(data_set) > 0
        for i in range(len(data_set)):
            record = data_set[i]
            assert record.chosen != record.rejected and all(p.is_file() for p in record.images)
            assert "Final answer: 3" in record.chosen and "**" not in record.chosen


def test_a_root_that_is_no_folder_is_refused(world):
    pairs.sample(sampling(prompts="none", num_samples=2))
    for cls, verb in (
        (pairs.CorrectnessConfig, pairs.correctness),
        (pairs.DropoutConfig, pairs.dropout_ntp),
    ):
        more = {"model_dir": Path("model")} if cls is pairs.DropoutConfig else {}
        with pytest.raises(InputError, match="--root elsewhere is no folder"):
            verb(cls(root=Path("elsewhere"), **more))


def test_pairs_find_their_images_wherever_they_are_made_from(world, monkeypatch):
    pairs.sample(sampling())
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    pairs.correctness(pairs.CorrectnessConfig(samples=Path("../samples"), out_dir=Path("out")))
    for data_set in read_meta(Path("out/meta.json"), max_tiles=12):
        assert all(path.is_file() for path in data_set[0].images)


# --------------------------------------------------------------------------- sampling


def test_sampling_fills_every_response_once_with_its_prompt(world):
    pairs.sample(sampling(prompts="en,en_bg", num_samples=8))
    found = responses("samples/toys")
    assert len(found) == 6 * 8 and len({qid for qid, _ in found}) == 12
    row = read_lines("samples/toys/part-0-of-1.jsonl")[0]
    assert {"k", "seed", "finish_reason", "tokens", "prompt_tokens", "tiles"} <= set(row)
    asked = Generator.prompts[0]
    assert asked.images == (Path("images/0.png"),) and asked.max_tiles == 6
    both = next(p for p in Generator.prompts if len(p.images) == 2)
    assert both.max_tiles == 3  # the limit is shared among the images
    loads = Generator.loads
    pairs.sample(sampling(prompts="en,en_bg", num_samples=8))  # nothing to do, nothing is loaded
    assert Generator.loads == loads


def test_samples_are_shared_by_the_prompts_of_the_domain_and_flags_win_over_it(world):
    pairs.sample(sampling(prompts="", num_samples=5))
    rows = read_lines("samples/toys/part-0-of-1.jsonl")
    assert {row["prompt_version"] for row in rows} == {"en", "en_bg"} and len(rows) == 6 * 2 * 3
    assert {prompt.max_tiles for prompt in Generator.prompts} == {6, 3}
    Generator.prompts.clear()
    (world / "toys.jsonl").rename("toys_zh_.jsonl")  # as the official script has it
    pairs.sample(sampling(questions=Path("toys_zh_.jsonl"), prompts="", max_tiles=2))
    assert {prompt.max_tiles for prompt in Generator.prompts} == {2, 1}
    rows = read_lines("samples/toys_zh_/part-0-of-1.jsonl")
    assert {row["prompt_version"] for row in rows} == {"zh"}


def test_a_system_prompt_reaches_the_model_the_samples_and_the_pairs(world):
    rows = read_lines("toys.jsonl")
    systems = None, "Think.", ""  # an empty one is one
    write_lines(world / "toys.jsonl", [{**rows[0], "system_prompt": text} for text in systems])
    pairs.sample(sampling())
    assert {p.system_prompt for p in Generator.prompts} == set(systems)
    assert len({qid for qid, _ in responses("samples/toys")}) == 3, "three questions"
    pairs.correctness(pairs.CorrectnessConfig(max_format_share=1.0))
    written = [r for path in Path("pairs/annotations").glob("*") for r in read_lines(path)]
    assert {r.get("system_prompt") for r in written} == set(systems)
    dropping = pairs.DropoutConfig(model_dir=Path("model"))
    pairs.dropout_ntp(dropping)
    assert Generator.prompts[-1].images == ()
    assert {p.system_prompt for p in Generator.prompts if not p.images} == set(systems)


def test_stops_and_other_process_counts_lose_repeat_and_change_nothing(world, monkeypatch):
    pairs.sample(sampling(out_dir=Path("straight")))
    want = responses("straight/toys")
    for rank, count, stop in [(0, 2, 5), (1, 2, 3), (0, 3, 3), (0, 1, 11)]:
        as_rank(monkeypatch, rank, count)
        monkeypatch.setattr(Generator, "stop_after", stop)
        with pytest.raises(KeyboardInterrupt):
            pairs.sample(sampling())
        part = Path(f"samples/toys/part-{rank}-of-{count}.jsonl")
        with open(part, "ab") as f:
            f.write(b'{"qid": "torn')  # what a kill in the middle of a write leaves
    monkeypatch.setattr(Generator, "stop_after", None)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        pairs.sample(sampling())
    assert responses("samples/toys") == want


def test_other_settings_in_the_folder_are_refused_by_name(world):
    pairs.sample(sampling())
    with pytest.raises(InputError, match="another temperature .1.0, now 0.7"):
        pairs.sample(sampling(temperature=0.7))
    save_file({"w": torch.zeros(2)}, world / "model" / "model.safetensors")
    with pytest.raises(InputError, match="another model "):
        pairs.sample(sampling())


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question": "q"}], "line 1: no 'answer'"),
        ([{"question": "q", "answer": ""}], "line 1: the gold answer is empty"),
        ([{"question": "q", "answer": "\\frac{1"}], "line 1: the gold answer cannot be parsed"),
        ([{"question": "q", "answer": {"a": 1}}], "line 1: the gold answer is {'a': 1}, "),
        ([{"question": "q", "answer": 1}] * 2, "line 2: the same question as .* line 1"),
        ([{"image": 5, "question": "q", "answer": 1}], "line 1: 'image' must be"),
        ([{"image": "../a.png", "question": "q", "answer": 1}], "is no path within its root"),
        ([{"image": "/etc/passwd", "question": "q", "answer": 1}], "is no path within its root"),
        ([{"image": "none.png", "question": "q", "answer": 1}], "no image"),
        ([{"video": "a.mp4", "question": "q", "answer": 1}], "line 1: 'video' is not supported"),
        (
            [{"images": ["0.png"], "question": "q", "answer": 1}],
            "line 1: 'images' is not supported",
        ),
        ([{"system_prompt": ["x"], "question": "q", "answer": 1}], "'system_prompt' must be str"),
        ([{"history": [["a", "b"]], "question": "q", "answer": 1}], "line 1: 'history' is not"),
        ([{"image": False, "question": "q", "answer": 1}], "line 1: 'image' must be"),
        ([{"question": "<image> q", "answer": 1}], "line 1: the question has 1 <image>"),
        ([{"image": ["0.png"] * 2, "question": "<image> q", "answer": 1}], "line 1: .*1 <image>"),
        ([{"choices": ["x", "y"], "question": "q", "answer": "A"}], "line 1: choices .* into 'q"),
        ([{"options": {"A": "x"}, "question": "q", "answer": "A"}], "line 1: choices .* into 'q"),
        ([{"question": " ", "answer": 1}], "no 'question'"),
        ([{"image": "0.png", "question": "<image>\n", "answer": 1}], "no 'question'"),
        ([{"question": "Please answer yes or no.", "answer": "no"}], "no 'question'"),
        # half a character would be found when pairs are made, after hours of sampling
        ([{"question": "q", "answer": "\ud800"}], "line 1: .*surrogates"),
        ([{"question": "q", "answer": 1, "rationale": "\ud800"}], "line 1: .*surrogates"),
        ([{"question": "q", "answer": 1, "rationale": ["x"]}], "'rationale' must be str"),
        ([], "no questions in"),
    ],
)
def test_bad_questions_are_named(world, rows, message):
    write_lines(world / "bad.jsonl", rows)
    with pytest.raises(InputError, match=message):
        pairs.sample(sampling(questions=Path("bad.jsonl")))


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", ".", ".hidden", "/tmp/evil", " "])
def test_a_name_cannot_leave_the_output_folder(world, name):
    with pytest.raises(InputError, match="expected the name of one folder"):
        pairs.sample(sampling(name=name))
    assert not Path("samples").exists()


def test_two_starts_never_write_one_part_file_at_a_time(world):
    Path("samples/toys").mkdir(parents=True)
    with open("samples/toys/.lock-0", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other start holds it
        with pytest.raises(InputError, match="another run works there; wait for it"):
            pairs.sample(sampling(num_samples=1))
    pairs.sample(sampling(num_samples=1))
    assert len(responses("samples/toys")) == 6


def test_a_choice_of_questions_is_told_and_all_are_taken_by_default(world, capsys):
    pairs.sample(sampling(num_samples=1, max_questions=2))
    assert "kept 2 of 6 questions" in capsys.readouterr().err
    assert len(responses("samples/toys")) == 2
    pairs.sample(sampling(num_samples=1, max_questions=5))
    assert "kept 5 of 6 questions" in capsys.readouterr().err
    pairs.sample(sampling(num_samples=1))
    said = capsys.readouterr().err
    assert "kept" not in said and "not asked for" not in said
    assert len(responses("samples/toys")) == 6
    pairs.sample(sampling(num_samples=1, max_questions=2))
    assert "4 responses not asked for now are paired, too" in capsys.readouterr().err


def test_an_image_that_was_replaced_is_noticed_when_sampling_goes_on(world):
    pairs.sample(sampling(num_samples=4))
    Image.new("RGB", (40, 30), "white").save(world / "images" / "5.png")  # of no question
    pairs.sample(sampling(num_samples=5))
    Image.new("RGB", (40, 30), "white").save(world / "images" / "3.png")
    before = Path("samples/toys/info.json").read_bytes()
    for count in (6, 5):  # with something left to do, and without
        with pytest.raises(InputError, match="toys.jsonl line 4: an image has changed since"):
            pairs.sample(sampling(num_samples=count))
    with pytest.raises(InputError, match="toys.jsonl line 1: no image elsewhere"):
        pairs.sample(sampling(num_samples=5, root=Path("elsewhere")))
    assert Path("samples/toys/info.json").read_bytes() == before  # pairs go on to name the images


def test_questions_of_one_file_name_never_share_samples_where_their_images_lie_apart(world):
    pairs.sample(sampling())
    before = Path("samples/toys/info.json").read_bytes()
    shutil.copytree("images", "apart/images")  # pictures of the same names
    pairs.sample(sampling(num_samples=4, root=Path("apart/images")))  # of the same questions
    assert read_json(Path("samples/toys/info.json"))["root"] == "../../apart/images"
    pairs.sample(sampling())
    rows = [row | {"question": f"{row['question']} Now?"} for row in read_lines(Path("toys.jsonl"))]
    write_lines(Path("apart/toys.jsonl"), rows)
    with pytest.raises(InputError, match="48 responses have their images elsewhere; pass --name"):
        pairs.sample(sampling(questions=Path("apart/toys.jsonl"), root=Path("apart/images")))
    assert Path("samples/toys/info.json").read_bytes() == before


def test_pairs_of_other_samples_that_are_written_over_are_named(world, capsys):
    pairs.sample(sampling())
    pairs.sample(sampling(seed=1, out_dir=Path("others")))
    for samples, told in (("samples", ""), ("samples/toys", ""), ("others", "../samples/toys")):
        pairs.correctness(pairs.CorrectnessConfig(samples=Path(samples), out_dir=Path("out")))
        said = capsys.readouterr().err
        assert (f"toys: the pairs of {told} are written over" in said) == bool(told)


def test_responses_beyond_what_is_asked_for_now_are_told(world, capsys):
    pairs.sample(sampling(num_samples=3, max_questions=2))
    pairs.sample(sampling(num_samples=2, max_questions=2))
    said = capsys.readouterr().err
    assert "samples/toys: 2 responses not asked for now are paired, too" in said
    assert "all 4 responses are there" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": "0"}, "'k' must be int"),
        ({"qid": 7}, "'qid' must be str"),
        ({"tokens": [1]}, "'tokens' must be int"),
        ({"response": None}, "'response' must be str"),
        ({"answer": {"a": 1}}, "the gold answer is {'a': 1}, expected text"),
        ({"question_orig": 5}, "'question_orig' must be str"),
        ({"rationale": 5}, "'rationale' must be str"),
        ({"prompt_version": "fr"}, "'prompt_version' must be one of .*'en_bg'.*, got 'fr'"),
        ({"question": "<image> or <image>?"}, "the question has 2 <image> for 1 images"),
        ({"question": "a\ud800?"}, "'utf-8' codec can't encode"),
        ({"response": "a\ud800"}, "'utf-8' codec can't encode"),
        ({"rationale": "a\ud800"}, "'utf-8' codec can't encode"),
    ],
)
def test_a_spoilt_line_of_samples_is_named(world, change, message):
    pairs.sample(sampling())
    part = Path("samples/toys/part-0-of-1.jsonl")
    rows = read_lines(part)
    write_lines(part, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(InputError, match=f"part-0-of-1.jsonl line 2: .*{message}"):
        pairs.correctness(pairs.CorrectnessConfig())


@pytest.mark.parametrize("about", ['{"root": 3}', '{"modes": "x"}', '{"responses": "1"}', "[]"])
def test_a_spoilt_info_file_is_named(world, about):
    pairs.sample(sampling())
    Path("samples/toys/info.json").write_text(about)
    with pytest.raises(InputError, match="samples/toys/info.json: "):
        pairs.correctness(pairs.CorrectnessConfig())
    Path("samples/toys/info.json").unlink()  # else images and modes would be guessed
    with pytest.raises(InputError, match="no file samples/toys/info.json"):
        pairs.correctness(pairs.CorrectnessConfig())


def test_a_gold_answer_of_zero_is_kept(world):
    write_lines(world / "zero.jsonl", [{"question": "How many?", "answer": 0}])
    pairs.sample(sampling(questions=Path("zero.jsonl"), num_samples=1))
    assert read_lines("samples/zero/part-0-of-1.jsonl")[0]["answer"] == 0


@pytest.mark.parametrize("cap", [1, 5, 15])
def test_the_cap_counts_all_prompt_versions_of_a_question(world, cap):
    pairs.sample(sampling(prompts="en,en_bg", num_samples=32))
    pairs.correctness(pairs.CorrectnessConfig(out_dir=Path("out"), pairs_per_query=cap))
    rows = [r for f in sorted(Path("out/annotations").iterdir()) for r in read_lines(f)]
    asked = [r["question"].rsplit("Question:", 1)[1] for r in rows]
    assert max(map(asked.count, asked)) == cap
    versions = {
        (r["chosen_meta"]["prompt_version"], r["rejected_meta"]["prompt_version"]) for r in rows
    }
    both = {("en", "en"), ("en_bg", "en_bg")}  # a pair answers one prompt
    assert versions == both or (cap == 1 and versions < both)


def test_a_link_out_of_the_root_is_refused(world):
    (world / "secret.png").write_bytes(b"x")
    (world / "images" / "link.png").symlink_to(world / "secret.png")
    write_lines(world / "bad.jsonl", [{"image": "link.png", "question": "q", "answer": 1}])
    with pytest.raises(InputError, match="is no path within its root"):
        pairs.sample(sampling(questions=Path("bad.jsonl")))


def test_a_broken_line_in_the_middle_of_a_part_file_is_an_error(world):
    pairs.sample(sampling())
    part = Path("samples/toys/part-0-of-1.jsonl")
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]]))
    for verb in (
        lambda: pairs.correctness(pairs.CorrectnessConfig()),
        lambda: pairs.sample(sampling()),
    ):
        with pytest.raises(InputError, match="part-0-of-1.jsonl line 2: not valid JSON"):
            verb()


def test_pairs_can_be_made_while_another_process_still_writes_its_last_line(world):
    pairs.sample(sampling())
    with open("samples/toys/part-0-of-1.jsonl", "ab") as file:
        file.write(b'{"qid": "torn')
    pairs.correctness(pairs.CorrectnessConfig())
    pairs.dropout_ntp(pairs.DropoutConfig(model_dir=Path("model")))
    report = read_json(Path("pairs/pairs.report.json"))
    for verb in ("correctness", "dropout_ntp sr0.5"):
        assert report[verb]["sets"]["toys"]["responses"] == 48


def test_a_response_with_two_texts_is_an_error_and_a_repeated_line_is_not(world):
    pairs.sample(sampling())
    rows = read_lines("samples/toys/part-0-of-1.jsonl")
    write_lines(world / "samples" / "toys" / "part-0-of-2.jsonl", rows[:3])
    pairs.correctness(pairs.CorrectnessConfig())
    report = json.loads(Path("pairs/pairs.report.json").read_text())
    assert report["correctness"]["sets"]["toys"]["counts"]["repeated lines"] == 3
    stray = [{**row, "draw": "left"} for row in rows[:3]]  # a key of somebody's own
    write_lines(world / "samples" / "toys" / "part-0-of-1.jsonl", [*stray, *rows[3:]])
    write_lines(world / "samples" / "toys" / "part-0-of-2.jsonl", [])
    pairs.correctness(pairs.CorrectnessConfig())
    write_lines(
        world / "samples" / "toys" / "part-0-of-2.jsonl", [{**rows[0], "response": "other"}]
    )
    with pytest.raises(InputError, match="line 1: response .* two part files"):
        pairs.correctness(pairs.CorrectnessConfig())


def test_the_last_line_of_a_file_of_another_model_counts_without_its_end(world, run_pairs):
    rows = [json.dumps({"question": "q", "answer": 3, "response": f"a\nFinal answer: {n}",
                        "prompt_version": "en"}) for n in (3, 4)]  # fmt: skip
    words = ("correctness", "--samples", "other.jsonl")
    for text, status, message in (
        ("\n".join(rows), 0, ""),
        ("\n".join(rows)[:-9], 2, "other.jsonl line 2: not valid JSON"),
        (f"[{rows[0]}, {rows[1]}]", 2, "other.jsonl is a JSON list; write one object a line"),
    ):
        Path("other.jsonl").write_text(text)
        found, output = run_pairs(*words)
        assert found == status and message in output
    Path("other.jsonl").write_text("\n".join(rows))
    Path("pairs/meta.json").write_text("[]")  # seen before anything is judged
    written = Path("pairs/pairs.report.json").stat().st_mtime_ns
    assert run_pairs(*words)[0] == 2
    assert Path("pairs/pairs.report.json").stat().st_mtime_ns == written
    assert "unknown mode 'exact'" in run_pairs(*words, "--out_dir", "x", "--modes", "exact")[1]


def test_a_prompt_version_named_twice_is_one_and_a_blank_rationale_is_none(world):
    pairs.sample(sampling(prompts="en,en", num_samples=2))
    assert len(responses("samples/toys")) == len(read_lines("samples/toys/part-0-of-1.jsonl")) == 12
    row = {"question": "q", "answer": 3, "response": "a\nFinal answer: 4", "prompt_version": "en"}
    judged, counts = pairs.judge_group([row | {"rationale": " "}], ["vqa_score"], "all")
    assert len(judged) == 1 and not counts["gold rationales"]


def test_a_data_set_whose_first_response_is_not_there_yet_is_named(world, capsys):
    pairs.sample(sampling())
    pairs.sample(sampling(name="late"))
    Path("samples/late/part-0-of-1.jsonl").unlink()
    assert [data_set.name for data_set in pairs.find_sets(Path("samples"))] == ["toys"]
    assert "samples/late: left out, without a response so far" in capsys.readouterr().err


def test_no_pair_and_too_many_format_failures_end_with_status_1(world, run_pairs):
    write_lines(world / "none.jsonl", [r for r in ROWS if r["answer"] == 3])  # all right
    status, output = run_pairs("correctness", "--samples", "none.jsonl", "--root", "images")
    assert status == 1 and "none: no pair from 8 responses" in output
    assert read_json(Path("pairs/meta.json")) == {}, "an empty file has no entry"
    write_lines(world / "fails.jsonl", ROWS)
    words = ("--samples", "fails.jsonl", "--root", ".", "--max_format_share", "0.1")
    status, output = run_pairs("correctness", *words)
    assert status == 1 and "fails: 12% are format failures" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["correctness", "--samples", "."], "no part files"),
        (["correctness", "--sampels", "x"], "did you mean --samples"),
        (["corectness"], "did you mean correctness"),
        (["sample", "--temperature", "0"], "temperature must be >= 0.001"),
        (["sample", "--modes", "vqa_score,often"], "unknown mode 'often'; known are"),
        (["dropout_ntp", "--keep_ratio", "1"], "keep_ratio must be >= 0 and <= 0.99"),
    ],
)
def test_wrong_flags_and_missing_folders_end_with_status_2(world, run_pairs, words, message):
    status, output = run_pairs(*words)
    assert status == 2 and message in output


def test_what_killed_runs_have_left_goes_with_the_next_one(world):
    pairs.sample(sampling())
    names = [f"annotations/.{name}_pairs_vqa_correctness_rules.jsonl.{pid}.partial"
             for name in ("toys", "others") for pid in (7, 8)]  # fmt: skip
    for path in (Path("pairs") / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half a li")
    pairs.correctness(pairs.CorrectnessConfig())
    assert sorted(str(p.relative_to("pairs")) for p in Path("pairs").glob("*/.*")) == names[2:]


def test_groups_come_in_the_order_of_their_keys_and_leave_nothing_behind(world):
    pairs.sample(sampling())
    files = part_files(Path("samples/toys"))
    groups = grouped(files, pairs.response_key)
    assert list(groups) == sorted(groups)
    assert [len(lines) for lines in groups.values()] == [8] * 6


# --------------------------------------------------------------------------- DropoutNTP


def test_the_image_goes_and_the_wording_stays():
    two = "Image 1: <image>\nImage 2: <image>\nWhich?"
    assert pairs.without_image(two) == "Image 1: \nImage 2: \nWhich?"
    assert pairs.without_image("<image>\n<image>\nBoth?") == "Both?"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("A cat sits there", ""),
        ("A cat", "empty continuation"),
        ("A cat \n", "empty continuation"),
        ("A cat  is\nred", "same as chosen"),
        ("The cat is red", "the kept part came back changed"),
    ],
)
def test_a_useless_continuation_is_named(text, reason):
    assert pairs.useless({"prefix": "A cat", "response": "A cat is red"}, text) == reason


def test_a_line_break_at_the_cut_is_part_of_the_turn_and_a_blank_is_not(tmp_path):
    texts = ["one two three four", "one two \n three four"]
    rows = [{"image": "a.png", "question": "q", "response": text} for text in texts]
    write_lines(tmp_path / "s.jsonl", rows)
    data_set = pairs.find_sets(tmp_path / "s.jsonl")[0]
    cut = list(pairs.cut_responses(data_set, pairs.DropoutConfig(), pairs.Counter()))
    assert [row["kept"] for row in cut] == ["one two"] * 2
    assert [row["prefix"] for row in cut] == ["one two", "one two \n "]


def test_a_continuation_that_reached_the_limit_is_marked_as_cut_off(tmp_path):
    source = {"image": "a.png", "question": "q"}
    row = {"draw": 0, "reason": "ok", "source": source, "kept": 3, "glue": " ", "tokens": 2}
    row |= {"chosen": "one two three four", "rejected": "one two five"}
    reasons = ("length", "stop")
    rows = [row | {"rid": reason, "finish_reason": reason} for reason in reasons]
    write_lines(tmp_path / "part-0-of-1.jsonl", rows)
    groups = pairs.grouped([tmp_path / "part-0-of-1.jsonl"], lambda record, _: record["rid"])
    tally = pairs.defaultdict(pairs.Counter)
    made = [pairs.pair_draws(pairs.DropoutConfig(), group, tally) for group in groups.items()]
    assert [pair["dropout_ntp"][0].get("cut_off") for pair in made] == [True, None]
    assert tally["counts"]["cut off"] == 1


def test_dropout_ntp_pairs_a_response_with_its_blind_continuation(world):
    pairs.sample(sampling(prompts="none", num_samples=4))
    Generator.prompts.clear()
    cfg = pairs.DropoutConfig(model_dir=Path("model"), out_dir=Path("out"))
    pairs.dropout_ntp(cfg)
    for prompt in Generator.prompts:
        assert prompt.images == () and "<image>" not in prompt.question and prompt.prefix
    rows = read_lines("out/annotations/toys_prefix_pair_sr0.5_wo_image.jsonl")
    report = json.loads(Path("out/pairs.report.json").read_text())["dropout_ntp sr0.5"]["sets"]
    counts = report["toys"]["counts"]
    assert len(rows) == 24 - counts.get("dropped after redraws", 0) > 12
    assert counts["continuations: empty continuation"] > 0  # these were drawn again
    for row in rows:
        kept = row["chosen"][: row["rejected_meta"]["kept"]]
        assert row["rejected"].startswith(kept) and row["chosen"] != row["rejected"]
        assert row["rejected"].removeprefix(kept).strip(), "the first draw that is usable"
        assert "image" in row and row["rejected_meta"]["finish_reason"] == "stop"
    assert report["toys"]["tokens"]["per_pair"]["generated"] > 14  # chosen and continuation
    assert len(read_meta(Path("out/meta.json"), 12)[0]) == len(rows)
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    loads = Generator.loads
    pairs.dropout_ntp(cfg)
    assert before == {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    assert Generator.loads == loads


def test_dropout_ntp_shared_and_stopped_gives_the_same_pairs(world, monkeypatch, capsys):
    pairs.sample(sampling(prompts="none", num_samples=4))
    pairs.dropout_ntp(pairs.DropoutConfig(model_dir=Path("model"), out_dir=Path("straight")))
    name = "annotations/toys_prefix_pair_sr0.5_wo_image.jsonl"
    want = (Path("straight") / name).read_bytes()
    shared = pairs.DropoutConfig(model_dir=Path("model"), out_dir=Path("shared"))
    monkeypatch.setattr(Generator, "stop_after", 3)
    with pytest.raises(KeyboardInterrupt):
        pairs.dropout_ntp(shared)
    monkeypatch.setattr(Generator, "stop_after", None)
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        pairs.dropout_ntp(shared)
    assert (Path("shared") / name).read_bytes() == want
    assert "left to other processes" in capsys.readouterr().out


def test_a_spoilt_line_of_continuations_is_named(world):
    pairs.sample(sampling(prompts="none", num_samples=1))
    cfg = pairs.DropoutConfig(model_dir=Path("model"))
    pairs.dropout_ntp(cfg)
    [part] = Path("pairs/continuations/toys_sr0.5").glob("part-*")
    rows = read_lines(part)
    for key in rows[0].keys() - {"prompt_tokens", "image_tokens"}:
        write_lines(part, [{k: v for k, v in rows[0].items() if k != key}, *rows[1:]])
        with pytest.raises(InputError, match=f"part-0-of-1.jsonl line 1: '{key}' must be"):
            pairs.dropout_ntp(cfg)
    write_lines(part, [*rows, rows[0] | {"rejected": f"{rows[0]['rejected']} or so"}])
    with pytest.raises(InputError, match="with different text"):
        pairs.dropout_ntp(cfg)


def test_dropout_ntp_pairs_the_responses_given_and_none_of_earlier_ones(world):
    pairs.sample(sampling(prompts="none", num_samples=4))
    pairs.sample(sampling(prompts="none", num_samples=4, seed=1, out_dir=Path("others")))
    name = "annotations/toys_prefix_pair_sr0.5_wo_image.jsonl"
    for samples, out, most in (
        ("others", "fresh", 0),
        ("samples", "used", 0),
        ("others", "used", 0),
        ("others", "few", 0),
        ("others", "few", 9),
    ):
        cfg = pairs.DropoutConfig(
            model_dir=Path("model"), samples=Path(samples), max_responses=most
        )
        pairs.dropout_ntp(replace(cfg, out_dir=Path(out)))
    fresh = read_lines(Path("fresh") / name)
    assert read_lines(Path("used") / name) == fresh
    few = read_lines(Path("few") / name)
    assert 0 < len(few) <= 9 < len(fresh) and all(row in fresh for row in few)


def test_an_empty_response_is_not_chosen_and_a_bad_question_is_named_by_its_line(world):
    texts = ("", " ", "A cat", "A")
    rows = [{"image": "0.png", "question": "Q", "response": text} for text in texts]
    write_lines(world / "s.jsonl", rows)
    cfg = pairs.DropoutConfig(model_dir=Path("model"), samples=Path("s.jsonl"), keep_ratio=0)
    kept = list(pairs.cut_responses(pairs.find_sets(cfg.samples)[0], cfg, pairs.Counter()))
    assert [row["response"] for row in kept] == ["A cat", "A"]
    pairs.dropout_ntp(replace(cfg, root=Path("images"), keep_ratio=0.5))
    assert {prompt.name for prompt in Generator.prompts} == {
        "s.jsonl line 3"
    }  # a letter has no half


def test_one_text_that_was_drawn_twice_is_continued_twice(tmp_path):
    row = {"image": "0.png", "question": "Q", "response": "A cat", "qid": "q"}
    write_lines(tmp_path / "s.jsonl", [row | {"k": k} for k in (0, 1, 1)])
    [data_set] = pairs.find_sets(tmp_path / "s.jsonl")
    cut = pairs.cut_responses(data_set, pairs.DropoutConfig(), pairs.Counter())
    assert [row["k"] for row in cut] == [0, 1]


@pytest.mark.parametrize("prompts", ["en", "en_bg", "en,none"])
def test_dropout_ntp_continues_chains_of_thought_too(world, prompts):
    pairs.sample(sampling(prompts=prompts))
    pairs.dropout_ntp(pairs.DropoutConfig(model_dir=Path("model"), out_dir=Path("out")))
    rows = read_lines("out/annotations/toys_prefix_pair_sr0.5_wo_image.jsonl")
    assert rows and all(row["question"].startswith("<image>") for row in rows)
    asked = ["Final answer" in prompt.question for prompt in Generator.prompts]
    assert any(asked) and all(asked) == ("none" not in prompts)


def test_both_kinds_of_pairs_share_one_meta_file(world):
    pairs.sample(sampling())
    pairs.sample(sampling(prompts="none", name="plain"))
    pairs.correctness(pairs.CorrectnessConfig(samples=Path("samples/toys"), out_dir=Path("out")))
    pairs.dropout_ntp(
        pairs.DropoutConfig(
            model_dir=Path("model"), samples=Path("samples/plain"), out_dir=Path("out")
        )
    )
    assert len(read_meta(Path("out/meta.json"), 12)) == 3


def test_sets_that_are_paired_one_after_another_keep_their_reports_and_settings(world):
    for name, cap in (("one", 3), ("two", 15)):
        pairs.sample(sampling(name=name))
        flags = {"samples": Path("samples") / name, "pairs_per_query": cap}
        pairs.correctness(pairs.CorrectnessConfig(out_dir=Path("out"), **flags))
    sets = read_json(Path("out/pairs.report.json"))["correctness"]["sets"]
    assert {name: s["settings"]["pairs_per_query"] for name, s in sets.items()} == {
        "one": 3,
        "two": 15,
    }
    entries = read_json(Path("out/meta.json"))
    pair_counts = {f"{name}_pairs_vqa_{kind}_rules": count for name, s in sets.items()
                   for kind, count in s["pairs"].items() if count}  # fmt: skip
    assert {name: entry["length"] for name, entry in entries.items()} == pair_counts


# --------------------------------------------------------------------------- cost


def test_token_cost_counts_a_prompt_once_and_says_when_it_does_not_know():
    cost = pairs.Counter()
    for k in range(4):
        pairs.spend(cost, {"k": k, "tokens": 10, "prompt_tokens": 30, "image_tokens": 20})
    per_pair = pairs.token_cost(cost, 2)["per_pair"]
    assert per_pair == {"generated": 20.0, "with_prompt": 25.0, "with_prompt_and_image": 35.0}
    pairs.spend(cost, {"k": 4})
    assert pairs.token_cost(cost, 2)["per_pair"]["generated"] is None


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    """130 questions are three pieces of work; a bad line is named wherever it is read."""
    answers = [f"So it is.\nFinal answer: {n}" for n in (1, 2, 3)] + ["no idea"]
    rows = [
        {"question": f"Which, {q}?", "answer": q % 3 + 1, "response": text, "k": k, "qid": f"{q}"}
        | {"prompt_version": "en"}
        for q in range(130)
        for k, text in enumerate(answers)
    ]
    write_lines(tmp_path / "set.jsonl", rows)
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        pairs.correctness(
            pairs.CorrectnessConfig(tmp_path / "set.jsonl", folder, tmp_path, workers=workers)
        )
    written = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json*")}
        for folder in (tmp_path / "1", tmp_path / "3")
    ]
    assert written[0] == written[1] and len(written[0]) == 4
    write_lines(tmp_path / "set.jsonl", [*rows, {**rows[0], "k": "0"}, *rows * 2])
    with pytest.raises(InputError, match="line 521: 'k' must be int"):
        pairs.correctness(
            pairs.CorrectnessConfig(tmp_path / "set.jsonl", tmp_path / "4", tmp_path, workers=2)
        )


def test_lines_in_any_order_of_their_fields_are_grouped_alike(tmp_path):
    rows = [
        {"k": k, "qid": f"{q}", "question": f"Which, {q}?", "answer": 1, "response": f"{k}"}
        for q in range(3)
        for k in range(2)
    ]
    as_sampled = [{name: row[name] for name in ("qid", "question", "answer", *row)} for row in rows]
    for number, lines in enumerate((rows, as_sampled)):
        write_lines(path := tmp_path / f"{number}.jsonl", lines)
        groups = grouped([path], pairs.response_key).values()
        assert [[line.record()["k"] for line in lines] for lines in groups] == [[0, 1]] * 3
