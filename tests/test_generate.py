"""Generation: cached equals uncached, and a sample's text depends on nothing but its name."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import OURS, ROOT
from safetensors.torch import load_file

from cache import HIDDEN, KEYS, KVCache, Room, attend_pieces, num_blocks
from generate import (
    MAX_ROWS,
    Generator,
    Group,
    Prompt,
    Row,
    Scheduler,
    Settings,
    choose,
    decode,
    filtered_probs,
    main,
    make_prompt,
    prefill,
    row_key,
    uniform,
)
from losses import aligned
from model import InternVL
from runtime import InputError, run
from tools.plan import named_config
from toy import model_config, parse_config, write_world
from weights import load_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_world(folder, 8, 0)
    return folder


@pytest.fixture(scope="module")
def generator(toy):
    return sampler(toy)


def sampler(toy, **how):
    how = {"temperature": 1.0, "max_new_tokens": 12, "seed": 3} | how
    return Generator.load(toy / "model", **how)


def prompts(toy, samples=3):
    """Ragged: no image, one tile, three tiles, two images; other lengths and sample counts."""
    square = sorted((toy / "images").glob("square-*.png"))
    wide = sorted((toy / "images").glob("wide-*.png"))
    return [
        Prompt("text", "What is 1 plus 2?", samples=range(samples)),
        Prompt("one", "How many red objects are there?", (square[0],), samples=range(1)),
        Prompt("wide", "How many blue objects are there?", (wide[0],), samples=range(samples + 2)),
        Prompt("two", "Which picture has more objects?", (square[0], square[1]), samples=range(2)),
        Prompt("long", "How many red objects are there?\n" * 8, (wide[1],), samples=range(samples)),
        Prompt("other", "How many red objects are there?", (square[1],)),
    ]


def texts(generator, prompts):
    return {(s.prompt_id, s.sample): s.text for s in generator.run(prompts)}


def bits(generator, prompts):
    """Every number of every sample: on a CPU they do not depend on the batch either."""
    return {(s.prompt_id, s.sample): s for s in generator.run(prompts)}


# --------------------------------------------------------------------------- against the official


def cache_of(model, tokens, **kinds):
    return KVCache(model.config.llm, num_blocks(tokens) + 8, "cpu", torch.float32, **kinds)


def read(model, cache, ids, tiles=None):
    """(room, logits) of a prompt that enters the cache."""
    room = Room()
    assert cache.enlarge(room, len(ids))
    [logits] = prefill(model, [ids], tiles, cache.prefill([room], [len(ids)]))
    return room, logits


def feed(model, cache, rows, tokens):
    """One step: a token for each row, (prompt, answer) or both in one room."""
    for *_, answer in rows:
        assert cache.enlarge(answer, answer.length + 1)
    return decode(model, cache, cache.plan(rows, tokens))[: len(rows)]


def steps(model, ids, tiles, count, banned=()):
    """Greedy ids by prefill and decode, and the logits of every step."""
    cache, answer = cache_of(model, len(ids)), Room(high=True)
    room, logits = read(model, cache, ids, tiles)
    out, seen = [], []
    for _ in range(count):
        seen.append(logits)
        out.append(int(logits.index_fill(0, torch.tensor(banned).long(), -torch.inf).argmax()))
        [logits] = feed(model, cache, [(room, answer)], out[-1:])
    return out, torch.stack(seen)


def test_greedy_ids_equal_the_official_ones():
    model = load_model(OURS / "internvl2-micro" / "checkpoint")
    model.image_context_id = 300
    golden = load_file(OURS / "internvl2-micro" / "cases.safetensors")
    ids, tiles = golden["greedy/input_ids"][0].tolist(), golden["greedy/tiles"]
    assert steps(model, ids, tiles, 24)[0] == golden["greedy/output_ids"][0].tolist()


class FromIds(Generator):
    """Takes prompts that are ids and pixels already."""

    def answer(self, rows, pixels, limit):
        """Sampled ids of each row of prompt ids (pads cut off), all rows in one batch."""
        self.pixels, self.rows = {str(n): p for n, p in enumerate(pixels)}, rows
        self.settings = replace(self.settings, max_new_tokens=limit)
        prompts = [Prompt(str(n), "", (None,) * (p is not None)) for n, p in enumerate(pixels)]
        return sorted(self.run(prompts), key=lambda sample: int(sample.prompt_id))

    def encode(self, prompt):
        ids = self.rows[int(prompt.id)]
        return Group(prompt, ids, [], 0, self.settings.max_new_tokens, [0])

    def tiles(self, prompt):
        return self.pixels[prompt.id]


@pytest.fixture(scope="module")
def tiny(golden_tiny):
    generator = FromIds.load(golden_tiny / "checkpoint")
    cases = json.loads((golden_tiny / "cases.json").read_text())["cases"]
    return generator, cases, load_file(golden_tiny / "cases.safetensors")


def golden_rows(golden, case):
    ids = golden[f"{case}/input_ids"]
    mask = golden.get(f"{case}/attention_mask", torch.ones_like(ids)).bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask)]


@pytest.mark.parametrize(
    ("case", "pixels", "tiles"),
    [
        ("g_chat_text", None, [0]),
        ("g_chat_image", "c_tiles_thumb", [4]),
        ("g_chat_image_turn2", "c_tiles_thumb", [4]),
        ("g_batch_chat", "g_batch_chat", [3, 1]),
        ("g_batch_chat_text", None, [0, 0, 0]),
        ("g_long", None, [0]),
        ("g_eos", None, [0]),
        ("g_eos_batch", "g_batch_chat", [3, 1]),
    ],
)
def test_every_golden_answer_is_met_id_by_id(tiny, case, pixels, tiles):
    generator, cases, golden = tiny
    eos = cases[case].get("eos_token_id", 92542)
    generator.stop_ids = set(eos) if isinstance(eos, list) else {eos}
    parts = golden[f"{pixels}/pixel_values"].split(tiles) if pixels else [None] * len(tiles)
    expected = []
    for row in golden[f"{case}/output_ids"].tolist():
        end = next((n + 1 for n, t in enumerate(row) if t in generator.stop_ids), len(row))
        expected.append(row[:end])  # finished official rows are filled with pads
    limit = golden[f"{case}/output_ids"].shape[1]
    samples = generator.answer(golden_rows(golden, case), parts, limit)
    assert [list(s.ids) for s in samples] == expected
    assert [s.finish_reason for s in samples] == [
        "stop" if row[-1] in generator.stop_ids else "length" for row in expected
    ]
    response = cases[case].get("responses", cases[case].get("response"))
    if response is not None:
        response = [response] if isinstance(response, str) else response
        assert [s.text.strip() for s in samples] == response


def test_a_golden_chat_is_met_from_its_question_and_history(golden_tiny, tiny):
    _, cases, _ = tiny
    generator = Generator.load(golden_tiny / "checkpoint", max_new_tokens=24)
    turn2 = cases["g_chat_image_turn2"]
    history = tuple((q, a) for q, a in turn2["history"])
    photo = golden_tiny / "photo.png"
    encoded = generator.encode(Prompt("x", turn2["question"], (photo,), history, max_tiles=3))
    golden = load_file(golden_tiny / "cases.safetensors")
    tail = len(generator.tokenizer.encode_plain(turn2["question"])) + 6
    assert encoded.ids[-tail:] == golden["g_chat_image_turn2/input_ids"][0, -tail:].tolist()
    [sample] = generator.run([Prompt("x", cases["g_chat_text"]["question"])])
    assert sample.text == cases["g_chat_text"]["response"]


def test_images_of_a_later_turn_stand_where_their_placeholder_stands(toy, generator):
    image = prompts(toy)[1].images
    first = Prompt("x", "What is 1 plus 2?", image, (("How many?", "It is 3."),))
    later = replace(first, question="<image>\nWhat is 1 plus 2?")
    first, later = generator.encode(first).ids, generator.encode(later).ids
    slot = generator.tokenizer.image_context_id
    assert sorted(first) == sorted(later) and first.index(slot) < later.index(slot)


def test_a_prompt_may_have_a_tile_limit_of_its_own(toy, generator):
    wide = prompts(toy)[2]
    for limit, tiles in ((0, 3), (1, 1)):
        prompt = replace(wide, max_tiles=limit)
        encoded, config = generator.encode(prompt), generator.model.config
        assert encoded.image_tokens == tiles * config.tokens_per_tile
        assert len(generator.tiles(prompt)) == tiles


# --------------------------------------------------------------------------- cached == uncached


def test_cached_logits_equal_uncached_ones_at_every_step(toy, generator):
    for prompt in prompts(toy):
        encoded, tiles = generator.encode(prompt), generator.tiles(prompt)
        out, cached = steps(generator.model, encoded.ids, tiles, 8, generator.banned.tolist())
        for n, logits in enumerate(cached):
            with torch.no_grad():
                full = generator.model(torch.tensor([encoded.ids + out[:n]]), tiles)[0, -1]
            torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)


def test_the_parts_of_a_wide_head_make_the_logits_of_one_product():
    torch.manual_seed(0)
    model, prompts = InternVL(parse_config(model_config(2500)), 7).eval(), [[11] * 5, [12] * 9]
    cache = cache_of(model, 99)
    rows = [(read(model, cache, ids)[0], Room(high=True)) for ids in prompts]
    logits = feed(model, cache, rows, [13, 14])
    for row, ids, token in zip(logits, prompts, (13, 14)):
        with torch.no_grad():
            full = model(torch.tensor([[*ids, token]]))[0, -1]
        torch.testing.assert_close(row, full, atol=1e-5, rtol=1e-5)


def test_past_the_limit_each_step_turns_only_its_own_key(toy):
    """The reference: keys computed one token at a time, each by the base of its own length."""
    raw = model_config(167)
    raw["llm_config"]["max_position_embeddings"] = 20
    torch.manual_seed(0)
    model = InternVL(parse_config(raw), 7).eval()
    ids = torch.randint(10, 160, (36,)).tolist()
    cache, answer, memory = cache_of(model, 36), Room(high=True), {}
    room, _ = read(model, cache, ids[:16])

    def uncached(n):
        """Logits after ids[: n + 1] with every key as its own step left it."""

        def attend(layer, q, k, v):
            if n < 16:
                memory[layer] = [k, v]
            else:
                memory[layer] = [torch.cat([m, x], 1) for m, x in zip(memory[layer], (k, v))]
            keys, values = (m.repeat_interleave(2, 2).transpose(1, 2) for m in memory[layer])
            seen = torch.ones(q.shape[1], keys.shape[2]).tril(keys.shape[2] - q.shape[1]).bool()
            weights = q.transpose(1, 2) @ keys.transpose(2, 3) / q.shape[-1] ** 0.5
            return (weights.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)

        new = torch.tensor([ids[:16] if n < 16 else ids[n : n + 1]])
        positions = torch.arange(16)[None] if n < 16 else torch.tensor([[n]])
        with torch.inference_mode():
            return model(new, positions=positions, attend=attend)[0, -1]

    uncached(15)
    for n in range(16, 36):
        [cached] = feed(model, cache, [(room, answer)], ids[n : n + 1])
        torch.testing.assert_close(cached, uncached(n), atol=1e-5, rtol=1e-5)


def test_forked_rows_equal_separate_prefills(toy, generator):
    prompt = prompts(toy)[2]
    ids, tiles = generator.encode(prompt).ids, generator.tiles(prompt)
    new, model = torch.randint(10, 60, (4, 150)), generator.model  # more than one block
    caches = [cache_of(model, 800) for _ in range(3)]
    forked = [(room, Room(high=True)) for room in [read(model, caches[0], ids, tiles)[0]] * 4]
    alone = [(read(model, caches[1], ids, tiles)[0], Room(high=True)) for _ in range(4)]
    continued = [(read(model, caches[2], ids, tiles)[0],) for _ in range(4)]  # at first one piece
    for n in range(0, 150, 2):
        a = feed(model, caches[0], forked, new[:, n].tolist())
        b = feed(model, caches[1], alone, new[:, n].tolist())
        c = feed(model, caches[2], continued, new[:, n].tolist())
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_read_in_one_pass_equal_prompts_read_alone(toy, monkeypatch):
    greedy = sampler(toy, temperature=0.0)
    some = [replace(p, samples=range(1)) for p in prompts(toy)]
    sizes = []
    monkeypatch.setattr(
        "generate.prefill",
        lambda model, ids, *_: (sizes.append([*map(len, ids)]), prefill(model, ids, *_))[1],
    )
    monkeypatch.setattr("cache.TOGETHER", 150)
    together = {s.prompt_id: s for s in greedy.run(some)}
    assert max(map(len, sizes)) > 1
    assert all(sum(lengths) <= 150 for lengths in sizes if len(lengths) > 1)
    for prompt in some:
        [alone] = greedy.run([prompt])
        assert alone.ids == together[prompt.id].ids
        assert alone.logp == pytest.approx(together[prompt.id].logp, abs=1e-5)


def test_a_sole_answer_in_its_prompts_room_shares_steps_with_answers_apart(toy):
    greedy = sampler(toy, temperature=0.0, max_new_tokens=KEYS + 8)
    greedy.stop_ids = set()
    together, alone = bits(greedy, prompts(toy)), {}
    for prompt in prompts(toy):
        alone |= bits(greedy, [replace(prompt, samples=range(1))])
    assert len({len(prompt.samples) for prompt in prompts(toy)}) > 2
    for (name, _), sample in together.items():
        assert sample.ids == alone[name, 0].ids
        assert sample.token_logps == pytest.approx(alone[name, 0].token_logps, abs=1e-4)


def test_matrices_are_stored_by_columns_for_one_greedy_row_alone_and_give_the_same(toy):
    [prompt], greedy = prompts(toy, samples=1)[:1], sampler(toy, temperature=0.0)
    weight, by_rows = greedy.model.language_model.model.layers[0].feed_forward.w1.weight, []
    answers = []
    for samples in (1, 2):
        answers += greedy.run([replace(prompt, samples=range(samples))])
        by_rows.append(weight.is_contiguous())
    assert by_rows == [False, True] and len({sample.ids for sample in answers}) == 1
    assert answers[0].token_logps == pytest.approx(answers[1].token_logps, abs=1e-5)
    exact = Generator(greedy.model, greedy.tokenizer, temperature=1.0, max_new_tokens=2)
    list(exact.run([prompt]))
    assert weight.is_contiguous()  # else one sample alone were rounded in another way


# --------------------------------------------------------------------------- the same text anywhere


@pytest.fixture(scope="module")
def expected(toy, generator):
    return texts(generator, prompts(toy))


def test_a_batch_of_any_size_and_order_gives_the_same_texts(toy, expected):
    assert len(set(expected.values())) > 5
    for dtype in (torch.float32, torch.bfloat16):
        wide = bits(sampler(toy, dtype=dtype), prompts(toy))
        if dtype == torch.float32:
            assert {name: s.text for name, s in wide.items()} == expected
        longest = num_blocks(max(s.prompt_tokens for s in wide.values()))
        for rows in (1, 3, 16):
            narrow = sampler(toy, dtype=dtype, cache_tokens=KEYS * (longest + rows))
            assert bits(narrow, prompts(toy)) == wide
        assert bits(sampler(toy, dtype=dtype), prompts(toy)[::-1]) == wide


def logps_that_differ(toy):
    """How many log-probs of 40 prompts change if few of them fit the cache at once."""
    many = [
        Prompt(f"p{n}", "Red objects? " * (1 + n % 3), samples=range(1 + n % 6)) for n in range(40)
    ]
    few, all_at_once = (bits(sampler(toy, cache_tokens=c), many) for c in (KEYS * 4, 65536))
    pairs = [zip(few[name].token_logps, s.token_logps) for name, s in all_at_once.items()]
    return sum(x != y for pair in pairs for x, y in pair)


def test_strict_mkl_rounds_alike_for_any_batch_without_avx512(toy):
    cpu = Path("/proc/cpuinfo")
    if not torch.backends.mkl.is_available() or not cpu.exists() or "Intel" not in cpu.read_text():
        pytest.skip("needs an Intel CPU and MKL")
    code = "import sys, test_generate as t; print(t.logps_that_differ(t.Path(sys.argv[1])))"
    settings = {
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AUTO,STRICT",
        "PYTHONPATH": "tests:.",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(toy)],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0", done.stderr


def test_a_cache_holds_what_is_needed_and_no_more_than_its_tokens(toy, generator):
    some = [generator.encode(Prompt("p", "What is 1 plus 2?", samples=range(32)))]
    assert generator.make_cache(some).num_blocks == num_blocks(len(some[0].ids)) + 32
    assert sampler(toy, cache_tokens=1000).make_cache(some).num_blocks == 1000 // KEYS
    assert generator.make_cache(some * 512).num_blocks == 65536 // KEYS
    some = [generator.encode(Prompt("p", "What is 1 plus 2?", samples=range(MAX_ROWS + 9)))]
    assert generator.make_cache(some).num_blocks == num_blocks(len(some[0].ids)) + MAX_ROWS


def test_all_samples_run_at_once_where_the_cache_was_made_for_them(toy):
    short = sampler(toy, max_new_tokens=4)
    scheduler = Scheduler(short, iter([short.encode(Prompt("p", "What?", samples=range(32)))]))
    assert len(scheduler.refill()) == 32


@pytest.mark.parametrize(("temperature", "count", "samples"), [(2.0, 1, 6), (0.0, 5, 1)])
def test_answers_that_outgrow_the_memory_begin_again_and_get_the_same_texts(
    toy, monkeypatch, temperature, count, samples
):
    """Greedy, each answer is its prompt's only one and continues its room."""
    how = {"temperature": temperature, "max_new_tokens": KEYS + 16}
    some, sent_back = [replace(p, samples=range(samples)) for p in prompts(toy)[:count]], []
    leave = Scheduler.leave

    def spy(scheduler, row, again=False):
        sent_back.extend([row.sample] * again)
        leave(scheduler, row, again)

    monkeypatch.setattr(Scheduler, "leave", spy)
    wide = sampler(toy, **how)
    prompt_blocks = sum(num_blocks(len(wide.encode(prompt).ids)) for prompt in some)
    narrow = sampler(toy, cache_tokens=KEYS * (prompt_blocks + 4), **how)
    wide.stop_ids = narrow.stop_ids = set()
    expected = bits(wide, some)
    assert not sent_back
    found = bits(narrow, some)
    assert sent_back and {name: s.ids for name, s in found.items()} == {
        name: s.ids for name, s in expected.items()
    }
    assert found == expected or not temperature  # greedy answers are rounded with their batch


# --------------------------------------------------------------------------- the scheduler alone


def mmpr_lengths(questions):
    """32 answers a question: 300 tokens in the mean, one in a hundred runs to the limit, 4,097."""
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(190), 0.8, (questions, 32)).astype(int).clip(8, 4097)
    lengths[draw.random(lengths.shape) < 0.01] = 4097
    return lengths


class WithoutModel:
    """Stands in for a Generator: answers end at lengths known beforehand."""

    model, device, decode = None, torch.device("cpu"), None

    def __init__(self, lengths, prompt, cache_tokens):
        self.lengths, self.settings = lengths, Settings(cache_tokens=cache_tokens)
        one_head = replace(named_config("toy").llm, num_hidden_layers=1, head_dim=1)
        self.cache = KVCache(one_head, cache_tokens // KEYS, "cpu", torch.float32)
        self.groups = [
            Group(
                Prompt(str(n), ""), [0] * prompt, [], 0, int(lengths.max()), list(range(len(row)))
            )
            for n, row in enumerate(lengths)
        ]

    def make_cache(self, groups):
        return self.cache

    def tiles(self, prompt):
        return None

    def choose(self, logits, rows):
        return [(0, 0.0)] * len(rows)

    def push(self, row, token, logp):
        row.ids.append(token)
        if len(row.ids) == self.lengths[int(row.group.prompt.id), row.sample]:
            row.finish_reason = "stop"


def steps_and_memory(lengths, prompt, cache_tokens, monkeypatch):
    """Steps of the Scheduler; memory reserved, over that of live tokens; the share drawn twice."""
    stand_in, leave = WithoutModel(lengths, prompt, cache_tokens), Scheduler.leave
    reserved = live = steps = lost = 0

    def step(scheduler):
        nonlocal reserved, live, steps
        steps += 1
        reserved += KEYS * int((~scheduler.cache.free).sum())
        live += sum(len(row.ids) for row in scheduler.rows) + prompt * len(scheduler.groups)
        for row in scheduler.rows:
            row.rooms[-1].length += 1

    def count_lost(scheduler, row, again=False):
        nonlocal lost
        lost += again * len(row.ids)
        leave(scheduler, row, again)

    monkeypatch.setattr(Scheduler, "step", step)
    monkeypatch.setattr(Scheduler, "leave", count_lost)
    monkeypatch.setattr("generate.prefill", lambda model, ids, *_: torch.zeros(len(ids), 1))
    done = [row for row in Scheduler(stand_in, iter(stand_in.groups)).run() if row.finish_reason]
    assert len(done) == lengths.size and stand_in.cache.free.all()
    return steps, reserved / live, lost / lengths.sum()


def ideal_steps(lengths, prompt, cache_tokens):
    """Steps of a scheduler that knows every length beforehand and wastes no token of memory.

    Samples begin in order, each as soon as it never meets a full memory.
    """
    used, now, ends = np.zeros(lengths.sum() + 4097, int), 0, []
    for question in lengths:
        prompt_end = now
        for length in question:
            while True:
                end = now + length
                more = np.zeros(max(end, prompt_end) - now, int)
                more[:length] += np.arange(1, length + 1)
                more[max(prompt_end - now, 0) : length] += prompt
                if (used[now : now + len(more)] + more).max() <= cache_tokens:
                    break
                now = min(e for e in ends if e > now)  # memory is freed when a row ends
            used[now : now + len(more)] += more
            prompt_end = max(prompt_end, end)
            ends.append(end)
    return max(ends)


@pytest.mark.parametrize("cache_tokens", [65536, 262144])
def test_sampling_at_the_lengths_of_mmpr_is_close_to_an_ideal_scheduler(cache_tokens, monkeypatch):
    lengths = mmpr_lengths(24 * cache_tokens // 65536)
    assert 280 < lengths.mean() < 320
    steps, memory, lost = steps_and_memory(lengths, 1900, cache_tokens, monkeypatch)
    ideal = ideal_steps(lengths, 1900, cache_tokens)
    print(
        f"{steps} steps, ideal {ideal}: {steps / ideal:.2f}; memory {memory:.2f}, lost {lost:.3f}"
    )
    assert steps <= 1.15 * ideal
    assert memory <= 1.1
    assert lost <= 0.04


def test_one_prompt_of_many_samples_does_not_widen_the_steps_of_many_prompts(monkeypatch):
    """A step computes as many rows for each prompt as the widest has."""
    widest, has_room = [], Scheduler.has_room

    def seen(scheduler, *args):
        rows = [group.rows for group in scheduler.groups]
        widest.append(len(rows) * max(rows, default=0))
        return has_room(scheduler, *args)

    monkeypatch.setattr(Scheduler, "has_room", seen)
    stand_in = WithoutModel(np.full((301, 32), 20), 10, 65536)
    for group in stand_in.groups[1:]:
        del group.todo[1:]
    monkeypatch.setattr(Scheduler, "step", lambda scheduler: None)
    monkeypatch.setattr("generate.prefill", lambda model, ids, *_: torch.zeros(len(ids), 1))
    done = [row for row in Scheduler(stand_in, iter(stand_in.groups)).run() if row.finish_reason]
    assert len(done) == 332 and max(widest) <= 4 * MAX_ROWS


# --------------------------------------------------------------------------- the same text anywhere


def test_finished_rows_are_refilled_with_the_next_sample(toy, generator):
    many = [Prompt(f"p{n}", "What is 1 plus 2?", samples=range(5)) for n in range(9)]
    narrow = sampler(toy, cache_tokens=KEYS * 3)
    assert texts(narrow, many) == texts(generator, many)


def test_a_restart_draws_only_what_is_missing_and_gets_the_same(toy, generator, expected):
    some = [replace(p, samples=(1,)) for p in prompts(toy) if len(p.samples) > 1]
    found = texts(generator, some)
    assert found == {key: expected[key] for key in found}
    assert {k for _, k in found} == {1}
    assert not texts(generator, [replace(prompts(toy)[0], samples=())])


def test_another_seed_or_prompt_id_gives_other_texts(toy, generator, expected):
    assert texts(sampler(toy, seed=4), prompts(toy)) != expected
    renamed = [replace(p, id=p.id + "x") for p in prompts(toy)]
    assert list(texts(generator, renamed).values()) != list(expected.values())


def a_step(model, device="cpu"):
    """A cache with a prompt of 100 tokens, and a plan for three rows that continue it."""
    dtype = model.language_model.head.dtype
    cache, prompt = KVCache(model.config.llm, 40, device, dtype, rounded=True), Room()
    rows = [(prompt, Room(high=True)) for _ in range(3)]
    assert cache.enlarge(prompt, 100)
    assert all(cache.enlarge(answer, 1) for _, answer in rows)
    return cache, prompt, cache.plan(rows, [3, 4, 5])


def test_steps_have_few_shapes_where_they_are_captured(toy, monkeypatch):
    """32 rows of which one ends at each step: a shape comes often, and no answer changes."""
    shapes = []

    class Rounded(KVCache):
        def __init__(self, *given, **kinds):
            super().__init__(*given, **kinds | {"rounded": True})

        def plan(self, rows, tokens):
            plan = super().plan(rows, tokens)
            shapes.append((plan.rows, plan.spans))
            return plan

    asked = [Prompt(str(n), f"What is {n} plus 2?") for n in range(1, 33)]
    generator = sampler(toy, temperature=0.0)
    generator.stop_ids, encode = set(), generator.encode
    generator.encode = lambda prompt: replace(encode(prompt), limit=int(prompt.id))
    expected = texts(generator, asked)
    monkeypatch.setattr("generate.KVCache", Rounded)
    assert texts(generator, asked) == expected
    assert len(shapes) == 31 and len(set(shapes)) <= 4


def test_a_head_with_rows_behind_its_vocabulary_gives_the_same_logits(generator):
    """What a GPU decodes with; the toy's vocabulary is odd."""
    model = generator.model
    head = aligned(model.language_model.head.detach())
    expected, logits = (decode(model, *a_step(model)[::2], head=h) for h in (None, head))
    assert len(head) == expected.shape[1] + 7 and logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_blocks_move_together_where_a_step_would_read_in_vain(generator):
    cache = KVCache(generator.model.config.llm, 40, "cpu", torch.float32)
    prompts, answers = [Room(), Room()], [Room(high=True), Room(high=True)]
    for prompt, answer in zip(prompts, answers):
        assert cache.enlarge(prompt, 3 * KEYS) and cache.enlarge(answer, 5 * KEYS)
        prompt.length, answer.length = 3 * KEYS, 4 * KEYS
    number = torch.arange(41.0).view(41, 1, 1, 1)
    memories = [x.unflatten(0, (41, KEYS)) for pair in cache.memory for x in pair]
    for memory in memories:
        memory.copy_(number.expand_as(memory))
    for room in (prompts[0], answers[0]):
        cache.release(room)
    before = [number[room.blocks] for room in (prompts[1], answers[1])]
    plan = cache.plan([(prompts[1], answers[1])], [7])
    assert [(span.start, span.pieces * span.blocks) for span in plan.spans] == [(0, 3), (35, 5)]
    assert np.flatnonzero(~cache.free).tolist() == [0, 1, 2, 35, 36, 37, 38, 39]
    place = answers[1].blocks[4] * KEYS  # of the token fed: the first of the moved fifth block
    assert plan.numbers[:3].tolist() == [7, 7 * KEYS, place]
    for memory in memories:
        for room, kept in zip((prompts[1], answers[1]), before):
            assert (memory[room.blocks] == kept).all()


def test_each_block_is_attended_alone():
    """Strided and half hidden, as the cache gives them; a block without a visible key is finite."""
    torch.manual_seed(0)
    q, k = torch.randn(5, 6, 2, 8).transpose(1, 2), torch.randn(5, 2, 64, 8)
    v, mask = torch.randn(5, 2, 64, 8), torch.zeros(5, 1, 1, 64)
    mask[1, ..., 3:], mask[2] = HIDDEN, HIDDEN
    out, logsum = attend_pieces(q, k, v, mask)
    scores = q @ k.transpose(2, 3) / 8**0.5 + mask
    plain, plain_logsum = scores.softmax(-1) @ v, scores.logsumexp(-1)
    assert out.isfinite().all() and (logsum[2] < HIDDEN / 2).all()
    met = [0, 1, 3, 4]
    torch.testing.assert_close(out[met], plain[met], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logsum[met], plain_logsum[met], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_step_needs_no_tensor_of_another_device(generator):
    """On the meta device a tensor left on the CPU is an error, as on a GPU."""
    model = InternVL(generator.model.config, 7).bfloat16().to("meta")
    cache, prompt, plan = a_step(model, "meta")
    logits = decode(model, cache, plan)[:3]
    assert logits.shape[0] == 3 and logits.dtype == torch.float32
    q = torch.zeros(1, 100, model.config.llm.num_attention_heads, 16, device="meta")
    k = q[:, :, : model.config.llm.num_key_value_heads]
    attended = cache.prefill([prompt], [100])(0, q.bfloat16(), k.bfloat16(), k.bfloat16())
    tokens = choose(logits, torch.zeros(3, dtype=torch.float64, device="meta"), 0.9, 5, 0.9)
    assert attended.is_meta and tokens.is_meta


# --------------------------------------------------------------------------- distributions


def test_uniform_numbers_are_uniform_and_differ_by_row_and_index():
    keys = np.array([row_key(0, "a", k) for k in range(200)], dtype=np.uint64)
    numbers = np.concatenate([uniform(keys, np.full(200, i)) for i in range(100)])
    assert (numbers >= 0).all() and (numbers < 1).all()
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
    assert len(np.unique(numbers)) == len(numbers)
    assert len({row_key(*name) for name in ((1, "1", 1), (11, "", 1), (1, "", 11))}) == 3


def test_sampling_follows_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 1.5
    keys = np.array([row_key(0, "chi", k) for k in range(20000)], dtype=np.uint64)
    numbers = torch.from_numpy(uniform(keys, np.zeros(20000)))
    tokens = choose(logits.expand(20000, -1), numbers, 0.7, 0, 1.0)
    wanted = (logits[0].double() / 0.7).softmax(-1) * 20000
    seen = torch.bincount(tokens, minlength=12)
    assert ((seen - wanted) ** 2 / wanted).sum() < 31.3  # chi-square, 11 degrees, p = 0.001


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (7, 0.8), (1, 1.0), (50, 0.01)])
def test_top_k_and_top_p_equal_a_plain_reference(top_k, top_p):
    torch.manual_seed(1)
    for row in torch.randn(50, 30) * 3:
        probs = (row.double() / 0.9).softmax(-1).tolist()
        ranked = sorted(range(30), key=lambda i: -probs[i])
        ranked = ranked[: top_k or None]
        mass = sum(probs[i] for i in ranked)
        kept, total = [], 0.0
        for i in ranked:
            if total >= top_p:
                break
            kept.append(i)
            total += probs[i] / mass
        found = filtered_probs(row[None], 0.9, top_k, top_p)[0]
        assert set(found.nonzero()[:, 0].tolist()) == set(kept)
        scale = sum(probs[i] for i in kept)
        for i in kept:
            assert found[i].item() == pytest.approx(probs[i] / scale)


def test_the_smallest_set_that_reaches_top_p_has_no_token_more():
    assert filtered_probs(torch.zeros(1, 4), 1.0, 0, 0.5).tolist() == [[0.5, 0.5, 0, 0]]


def test_of_a_wide_vocabulary_a_token_is_where_the_cumulative_sum_meets_its_number():
    torch.manual_seed(0)
    logits = torch.randn(1, 600) * 3  # two parts of 256 that are summed first, and a rest
    logits[:, 100:300] = -torch.inf
    numbers = (torch.arange(200.0).double() + 0.5) / 200
    plain = torch.searchsorted(logits[0].softmax(0).double().cumsum(0), numbers, right=True)
    found = choose(logits.expand(200, -1), numbers, 1.0, 0, 1.0)
    assert torch.equal(found, plain) and len(found.div(256, rounding_mode="floor").unique()) == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7, 1e-6])
def test_a_tiny_temperature_is_greedy_and_no_noise(temperature):
    logits = torch.tensor([[0.0, -torch.inf, 3.0, 2.5, -torch.inf]])
    assert choose(logits, torch.tensor([0.999]), temperature, 0, 1.0).item() == 2


def test_greedy_takes_the_most_probable_and_tokens_without_mass_never_come():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 3.0, -torch.inf]])
    assert choose(logits, torch.zeros(1), 0, 0, 1.0).item() == 3
    for u in (0.0, 0.04, 0.05, 0.9999999, 1.0):  # 1: what a product was rounded to
        assert choose(logits, torch.tensor([u]).double(), 1.0, 0, 1.0).item() in (1, 3)


def test_log_probs_are_those_of_the_model(toy, generator):
    [sample] = generator.run([replace(prompts(toy)[0], samples=range(1))])
    assert sample.logp == pytest.approx(sum(sample.token_logps))
    assert len(sample.token_logps) == sample.num_tokens
    ids = generator.encode(prompts(toy)[0]).ids
    with torch.no_grad():
        full = generator.model(torch.tensor([ids + list(sample.ids)]))[0].log_softmax(-1)
    rows = range(len(ids) - 1, len(ids) + sample.num_tokens - 1)
    again = [full[r, t].item() for r, t in zip(rows, sample.ids)]
    assert sample.token_logps == pytest.approx(again, abs=1e-4)


def test_special_tokens_never_come_out_but_the_end(toy):
    hot = sampler(toy, temperature=100.0, max_new_tokens=200)
    for sample in hot.run([Prompt("hot", "What is 1 plus 2?", samples=range(8))]):
        special = hot.tokenizer.special_ids & set(sample.ids)
        assert special <= hot.stop_ids


# --------------------------------------------------------------------------- grounding marks


QWEN3 = OURS / "qwen3-micro" / "checkpoint"


@pytest.fixture
def marking():
    """A generator that names a cat with its box at once."""
    generator = Generator.load(QWEN3, max_new_tokens=40)
    ids = generator.tokenizer.encode("<ref>cat</ref><box>[[1, 2, 3, 4]]</box><|im_end|>")
    generator.choose = lambda logits, rows: [(ids[len(row.ids)], 0.0) for row in rows]
    return generator


def test_grounding_marks_can_be_chosen_and_control_tokens_cannot(marking):
    tokenizer, banned = marking.tokenizer, set(marking.banned.tolist())
    for name in "<ref> </ref> <box> </box> <quad> </quad> <|im_end|>".split():
        assert tokenizer.token_id(name) not in banned
    for name in "<|im_start|> <|endoftext|> <img> </img> <IMG_CONTEXT>".split():
        assert tokenizer.token_id(name) in banned


def test_grounding_marks_stay_in_the_text_of_a_sample_and_are_hidden_on_request(marking):
    shown, hidden = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>", "cat[[1, 2, 3, 4]]"
    [sample] = marking.run([Prompt("x", "Where is the cat?")])
    assert sample.text == shown
    assert marking.tokenizer.encode_plain(sample.text) == list(sample.ids[:-1])  # scored as sampled
    assert "".join(marking.stream(Prompt("x", "Where is the cat?"))) == shown
    marking.settings = replace(marking.settings, marks=False)
    [sample] = marking.run([Prompt("x", "Where is the cat?")])
    assert sample.text == hidden
    assert "".join(marking.stream(Prompt("x", "Where is the cat?"))) == hidden


# --------------------------------------------------------------------------- text


def test_a_prefix_is_continued_without_losing_the_blank_at_the_seam(toy, generator):
    prompt = Prompt("c", "How many red objects are there?", prefix="I see a1 red", samples=range(6))
    for sample in generator.run([prompt]):
        assert sample.text.startswith("I see a1 red")
        assert sample.text == generator.tokenizer.decode(
            generator.tokenizer.encode_plain(prompt.prefix)
            + [i for i in sample.ids if i not in generator.stop_ids]
        )
        if sample.sample == 0:
            assert "".join(generator.stream(prompt)) == sample.text
    plain = generator.encode(replace(prompt, prefix=""))
    continued = generator.encode(prompt)
    assert continued.ids == plain.ids + generator.tokenizer.encode_plain("I see a1 red")


def test_streamed_pieces_make_the_whole_text(toy, generator, expected):
    for prompt in prompts(toy):
        assert "".join(generator.stream(prompt)) == expected[prompt.id, 0]


def test_a_stop_string_ends_the_text_before_it(toy, expected):
    firsts = {name: text for (name, k), text in expected.items() if k == 0}
    name, text = max(firsts.items(), key=lambda item: len(item[1]))
    word = text[len(text) // 2 :][:4]
    prompt = next(p for p in prompts(toy) if p.id == name)
    stopping = sampler(toy, stop=(word, text[:3] + "\n"))  # the last only seems to begin
    [sample] = stopping.run([replace(prompt, samples=(0,))])
    assert sample.text == text[: text.index(word)] == "".join(stopping.stream(prompt))
    assert sample.finish_reason == "stop"
    with pytest.raises(InputError, match="stop: an empty text would end every answer"):
        sampler(toy, stop=("", word))


def test_the_first_stop_string_behind_the_prefix_counts_and_its_beginning_waits(toy):
    stopping = sampler(toy, stop=("I see", "red", "a1", "objects 3"))
    row = Row(stopping.encode(Prompt("x", "Who?", prefix="I see")), 0, 0, ())
    row.ids += stopping.tokenizer.encode_plain(" objects")
    assert stopping.text(row) == ("I see objects", False)
    assert stopping.text(row, final=False) == ("I see ", False)
    row.ids[:] = stopping.tokenizer.encode_plain(" a1 red")
    assert stopping.text(row) == ("I see ", True)


def test_a_stop_string_is_found_where_the_seam_is_decoded_shorter(golden_tiny):
    stopping = Generator.load(golden_tiny / "checkpoint", stop=(",",))
    group = stopping.encode(Prompt("x", "Who?", prefix="Yes "))
    row = Row(group, 0, 0, ())
    row.ids += stopping.tokenizer.encode_plain(",")
    assert stopping.text(row) == ("Yes", True)  # `Yes ,` is decoded as `Yes,`


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "prompt text: the question is empty"),
        ({"question": "", "images": ("nowhere.png",)}, "prompt text: the question is empty"),
        ({"question": "<image> what?"}, "question has 1 <image> for 0 images"),
        ({"history": (("<image> what?", "A."),)}, "question has 1 <image> for 0 images"),
        ({"images": ("nowhere.png",)}, "no image nowhere.png"),
        ({"prefix": "\ud83d"}, "prompt text: half a character at 0"),
    ],
)
def test_a_bad_prompt_is_named(toy, generator, change, message):
    with pytest.raises(InputError, match=message):
        list(generator.run([replace(prompts(toy)[0], **change)]))


def test_logits_that_are_no_numbers_stop_the_run(toy):
    broken = sampler(toy)
    with torch.no_grad():
        broken.model.language_model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="prompt text, sample 0, token 0: .* not finite"):
        list(broken.run(prompts(toy)[:1]))


def test_a_prompt_beyond_the_positions_of_a_model_without_scaling_is_told(capsys):
    generator = Generator.load(QWEN3, max_new_tokens=1)
    list(generator.run([Prompt("short", "Hi.", system_prompt="x"), Prompt("long", "Hi. " * 40)]))
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("prompt long: ") and told.endswith("the model was made for 96")


def test_a_prompt_longer_than_the_cache_names_both_numbers(toy):
    [prompt, *_] = prompts(toy)
    without_answer = KEYS * num_blocks(len(sampler(toy).encode(prompt).ids))
    for tokens in (20, without_answer):
        with pytest.raises(InputError, match=r"prompt text: \d+ tokens .* raise --cache_tokens"):
            list(sampler(toy, cache_tokens=tokens).run([prompt]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"temperature": 1e300}, "temperature must be >= 0 and <= 1e.06"),
        ({"top_p": 0}, "top_p must be >= 1e-06 and <= 1"),
        ({"top_p": 1.5}, "top_p must be >= 1e-06 and <= 1"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
    ],
)
def test_impossible_sampling_is_refused(toy, how, message):
    with pytest.raises(InputError, match=message):
        sampler(toy, **how)


# --------------------------------------------------------------------------- command line


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def ask(toy, monkeypatch, capsys):
    """Run generate.py's command line on the toy model, in this process."""

    def run_main(*args, stdin=""):
        flags = ["generate.py", "--model_dir", toy / "model", *args]
        monkeypatch.setattr(sys, "argv", list(map(str, flags)))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            run(main)
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capsys.readouterr())

    return run_main


def test_the_command_line_prints_the_answer_alone(toy, ask):
    image = sorted((toy / "images").glob("square-*.png"))[0]
    question = "How many red objects are there?"
    flags = ["--image", image, "--max_new_tokens", 8]
    done = ask(*flags, "--question", question, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    generator = Generator.load(toy / "model", max_new_tokens=8)
    [sample] = generator.run([Prompt("x", question, (image,))])
    assert done.stdout == sample.text.strip() + "\n"
    assert ("cut off: raise --max_new_tokens" in done.stderr) == (sample.finish_reason == "length")
    for chat in (False, True):
        short = ask("--max_new_tokens=1", *([] if chat else ["--question=How?"]), stdin="How?\n")
        assert "cut off: raise --max_new_tokens" in short.stderr and len(short.stdout) > 1
    done = ask(*flags, "--question", question, "--temperature=1", "--num_samples=3", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["sample"] for r in rows] == [0, 1, 2]
    assert set(rows[0]) == {"sample", "text", "tokens", "finish_reason", "logp"}


def test_a_chat_answers_each_line_and_remembers(toy, ask):
    image = sorted((toy / "images").glob("square-*.png"))[0]
    flags = ["--image", image, "--max_new_tokens", 6, "--prefix", "I see"]
    done = ask(*flags, stdin="How many red objects are there?\nDescribe the image.\n\n")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    generator = Generator.load(toy / "model", max_new_tokens=6)
    [one] = generator.run([Prompt("x", "How many red objects are there?", (image,), (), "I see")])
    assert first.strip() == one.text.strip()
    history = (("<image>\nHow many red objects are there?", one.text.strip()),)
    [two] = generator.run([Prompt("x", "Describe the image.", (image,), history, "I see")])
    assert second.strip() == two.text.strip()


@pytest.mark.parametrize("images", [0, 1])
def test_a_chats_first_sampled_answer_is_that_of_the_question(toy, ask, images):
    flags = ["--max_new_tokens", 12, "--temperature", 1, "--seed", 5]
    flags += ["--image", sorted((toy / "images").glob("square-*.png"))[0]] * images
    question = "How many red objects are there?"
    asked, chatted = ask(*flags, "--question", question), ask(*flags, stdin=question)
    assert chatted.stdout.strip() == asked.stdout.strip() != ""


def test_a_question_that_cannot_be_asked_is_told_and_the_chat_goes_on(toy, ask):
    image = sorted((toy / "images").glob("square-*.png"))[0]
    flags = ["--image", image, "--max_new_tokens", 6, "--prefix", "I see"]
    asked = ask(*flags, stdin="How many red objects are there?\nDescribe the image.\n")
    first, second = asked.stdout.splitlines()
    for odd in ("<image> and <image>?", "What is <image>?"):
        lines = ["How many red objects are there?", odd, "Describe the image."]
        lines = lines if odd.startswith("What") else [odd, lines[0], lines[2]]
        done = ask(*flags, stdin="\n".join(lines))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [first, second]  # as if it had not been asked
        assert done.stderr.count("error: ") == 1 and "<image>" in done.stderr
    done = ask("--image", toy / "nowhere.png", stdin="What?\nWhat?\n")
    assert done.returncode == 2 and done.stderr.endswith(f"error: no image {toy}/nowhere.png\n")


def test_bad_files_on_the_command_line_end_in_one_line(tmp_path, ask):
    (tmp_path / "h.json").write_text('[["q"]]')
    done = ask("--question", "x", "--history", tmp_path / "h.json")
    assert done.returncode == 2
    assert "h.json: expected a list of [question, answer] pairs" in done.stderr
    (tmp_path / "a.png").write_bytes(b"no image")
    done = ask("--question", "x", "--image", tmp_path / "a.png")
    assert done.returncode == 2 and "a.png cannot be read" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    done = ask("--question", "<image> what?")
    assert done.returncode == 2 and done.stderr.startswith("error: the question: ")
    (tmp_path / "c.json").write_bytes(b"{\xff}")
    done = ask("--config", tmp_path / "c.json")
    assert done.returncode == 2 and "c.json: not valid JSON" in done.stderr
    for flag, value in (("num_samples", 0), ("temperature", "nan"), ("max_tiles", -1)):
        done = ask("--question", "x", f"--{flag}", value)
        assert done.returncode == 2 and f"{flag} must be >= " in done.stderr
    for flag in ("--num_samples=3", "--json"):
        done = ask(flag)
        name = flag.partition("=")[0]
        assert done.returncode == 2 and f"{name} does nothing without --question" in done.stderr
    for flag in ("--top_p=0.9", "--top_k=5"):  # greedy answers are the default
        done = ask("--question", "x", flag)
        name = flag.partition("=")[0]
        assert done.returncode == 2 and f"{name} does nothing without --temperature" in done.stderr


def test_the_prompt_of_a_question_does_not_depend_on_where_it_is_asked():
    class Config:
        prefix, image, max_tiles, num_samples = "", (), 0, 2

    class Finer(Config):
        max_tiles = 6

    assert make_prompt(Config, "a", ()).id == make_prompt(Finer, "a", ()).id
    others = make_prompt(Config, "b", ()).id, make_prompt(Config, "a", (("q", "a"),)).id
    assert make_prompt(Config, "a", ()).id not in others
