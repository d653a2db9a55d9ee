"""Records, order, packed trees: what reaches the model, and what is refused."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from test_records import GOOD, write_set
from tokenizers import normalizers

from config import load_config
from data import (
    PairData,
    add_tiles,
    encode_tree,
    epoch_order,
    first_fit,
    lay_out,
    prefetch,
    response_keys,
    seeded,
)
from images import jpeg
from losses import row_logps, sum_by_response, token_logps
from model import TreeAttention
from records import DataSet, JsonLines, read_meta
from runtime import InputError
from tokenizer import load_tokenizer
from toy import write_world
from weights import load_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, config, tokenizer, model) of a small toy world."""
    folder = tmp_path_factory.mktemp("toy")
    write_world(folder, 16, 0)
    model_dir = folder / "model"
    return folder, load_config(model_dir), load_tokenizer(model_dir), load_model(model_dir)


# --------------------------------------------------------------------------- order


def test_the_official_example_yields_thirteen_records_an_epoch(tmp_path):
    meta = {}
    for name, repeat, count in (("a", 1, 5), ("b", 0.5, 5), ("c", 2, 3)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(GOOD) + "\n") * count)
        meta[name] = {"annotation": f"{name}.jsonl", "repeat_time": repeat, "length": count}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    order = epoch_order(read_meta(tmp_path / "meta.json", 12), 0, 0)
    assert len(order) == 5 + 2 + 6
    assert np.bincount(order[:, 0]).tolist() == [5, 2, 6]


def data_set(n, repeat):
    return DataSet("s", "", range(n), Fraction(str(repeat)), 12, False)


@pytest.mark.parametrize(
    ("n", "repeat", "count"),
    [
        (100, 0.07, 7),
        (6910, 0.1, 691),
        (32798, 0.005, 163),
        (4, 2.5, 10),
        (5, 0, 0),
        (66457, 1, 66457),
    ],
)
def test_repeat_time_counts_exactly(n, repeat, count):
    assert len(epoch_order([data_set(n, repeat)], 0, 0)) == count


def test_fractions_draw_without_replacement_and_anew_each_epoch():
    first, second = (epoch_order([data_set(100, 0.3)], 0, epoch)[:, 1] for epoch in (0, 1))
    assert len(set(first)) == 30
    assert set(first) != set(second)
    assert (epoch_order([data_set(100, 0.3)], 0, 1)[:, 1] == second).all()


def test_another_seed_draws_others_and_orders_them_anew():
    assert set(epoch_order([data_set(100, 0.3)], 0, 0)[:, 1]) != set(
        epoch_order([data_set(100, 0.3)], 1, 0)[:, 1]
    )
    assert (epoch_order([data_set(100, 1)], 0, 0) != epoch_order([data_set(100, 1)], 1, 0)).any()


def test_the_draw_of_a_set_does_not_depend_on_the_other_sets():
    alone = epoch_order([data_set(50, 0.5)], 3, 0)[:, 1]
    other = data_set(20, 1)
    both = epoch_order([other, data_set(50, 0.5)], 3, 0)
    assert set(both[both[:, 0] == 1, 1]) == set(alone)
    renamed = epoch_order([replace(data_set(50, 0.5), name="t")], 3, 0)[:, 1]
    assert set(renamed) != set(alone), "two sets of one size have draws of their own"


# --------------------------------------------------------------------------- trees


def toy_trees(toy, only_chosen=False):
    """One tree of each toy data set: one image, wide image, two images, text only."""
    folder, config, tokenizer, _ = toy
    sets = read_meta(folder / "meta.json", config.max_tiles)
    return [encode_tree(s[0], tokenizer, config, only_chosen=only_chosen) for s in sets]


def test_the_toy_has_every_kind_of_record(toy):
    trees = toy_trees(toy)
    assert [len(t.images) for t in trees] == [1, 1, 1, 2, 0]
    assert [t.tiles for t in trees] == [[1], [1], [3], [1, 1], []]


def score(model, pack):
    def head(hidden, weight):
        rows = hidden[0, pack.predictor]
        logps = row_logps(rows, weight, pack.target, 7)
        return sum_by_response(logps, pack.response, pack.num_responses)

    return model(
        pack.input_ids,
        pack.tiles,
        positions=pack.positions,
        attend=TreeAttention(pack.tree, pack.branch),
        head=head,
        tile_order=pack.tile_order,
    )


def score_alone(model, trees, tile_size):
    """Each (prompt, response) as a sequence of its own, all logits, plain causal."""
    sums = []
    for tree in trees:
        tiles = add_tiles(lay_out([tree]), tile_size).tiles
        if tiles is not None:  # an image that stands twice in the prompt is wanted twice
            tiles = tiles[add_tiles(lay_out([tree]), tile_size).tile_order]
        for response in tree.responses:
            ids = torch.tensor([tree.trunk + response])
            labels = ids.clone()
            labels[:, : len(tree.trunk)] = -100
            sums.append(token_logps(model(ids, tiles), labels).sum())
    return torch.stack(sums)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prefix_sharing_tree(toy):
    """A text pair whose responses begin alike and part in the middle."""
    _, config, tokenizer, _ = toy
    folder = toy[0]
    record = {**GOOD, "chosen": "It is 3. It is 3.", "rejected": "It is 3. It is 4."}
    return encode_tree(read_meta(write_set(folder, [record]), 1)[0][0], tokenizer, config)


def test_a_packed_tree_equals_each_prompt_and_response_alone(toy):
    _, config, _, model = toy
    trees = [*toy_trees(toy), prefix_sharing_tree(toy)]
    pack = add_tiles(lay_out(trees), config.tile_size)
    assert pack.input_ids.shape[1] == sum(t.size for t in trees)
    weights = torch.randn(pack.num_responses, generator=torch.Generator().manual_seed(0))
    packed, lengths = score(model, pack)
    alone = score_alone(model, trees, config.tile_size)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-6)
    assert lengths.tolist() == [len(r) for t in trees for r in t.responses]
    expected = gradients(model, (alone * weights).mean())
    found = gradients(model, (packed * weights).mean())
    assert set(expected) == set(found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-5, msg=name)


def test_an_image_that_two_trees_show_is_encoded_once(toy):
    _, config, _, model = toy
    tree = toy_trees(toy)[2]
    trees = [tree, tree]
    shared = add_tiles(lay_out(trees), config.tile_size)
    apart = add_tiles(lay_out(trees), config.tile_size, share=False)
    assert (len(shared.tiles), len(apart.tiles)) == (3, 6)
    with torch.no_grad():
        torch.testing.assert_close(score(model, shared)[0], score(model, apart)[0])


def test_jpeg_augmentation_changes_pixels_and_is_the_same_each_time(toy, monkeypatch):
    _, config, _, _ = toy
    tree = toy_trees(toy)[2]
    augmented = replace(tree, images=[(path, limit, True) for path, limit, _ in tree.images])
    both = add_tiles(lay_out([tree, augmented]), config.tile_size).tiles
    plain, once = both.split(3)  # of one file, but not one image
    assert torch.equal(once, add_tiles(lay_out([augmented]), config.tile_size).tiles)
    assert not torch.equal(once, plain)
    qualities = []
    monkeypatch.setattr("data.jpeg", lambda tile, quality: qualities.append(quality) or tile)
    for _ in range(100):
        image, limit, _ = augmented.images[0]
        path = image.with_name(f"{len(qualities)}.png")
        path.write_bytes(image.read_bytes())
        add_tiles(lay_out([replace(tree, images=[(path, limit, True)])]), config.tile_size)
        path.unlink()
    assert set(qualities) == set(range(75, 101)), "as officially"


def test_the_quality_of_a_jpeg_is_the_one_asked_for():
    tile = Image.effect_noise((32, 32), 80).convert("RGB")
    off = [np.abs(np.subtract(jpeg(tile, q), tile, dtype=int)).mean() for q in (75, 100)]
    assert off[0] > 2 * off[1]


def test_response_keys_follow_what_the_log_prob_depends_on(toy):
    a, b = toy_trees(toy)[0], toy_trees(toy)[1]
    assert response_keys([a]) == response_keys(toy_trees(toy)[:1])
    assert len(set(response_keys([a, b]))) == 4
    [(path, limit, augment)] = a.images
    for image in ((path, limit + 1, augment), (path, limit, not augment)):
        assert not set(response_keys([replace(a, images=[image])])) & set(response_keys([a]))


def test_a_key_of_a_response_follows_the_content_of_its_image(tmp_path, toy):
    _, config, tokenizer, _ = toy
    keys = []
    for folder, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32), colour).save(tmp_path / folder / "x.bmp")
        meta = write_set(tmp_path / folder, [{**GOOD, "image": "x.bmp"}])
        keys.append(response_keys([encode_tree(read_meta(meta, 1)[0][0], tokenizer, config)]))
    assert keys[0] == keys[2] and not set(keys[0]) & set(keys[1])
    tree = encode_tree(read_meta(meta, 1)[0][0], tokenizer, config)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "c" / "x.bmp")  # of equal size
    assert not set(response_keys([tree])) & set(keys[2])


def test_first_fit_fills_packs_in_order():
    assert first_fit([5, 4, 3, 2, 1], 8) == [[0, 2], [1, 3, 4]]


# --------------------------------------------------------------------------- steps


def pair_data(toy, **changes):
    folder, config, tokenizer, _ = toy
    how = {"batch_size": 8, "pack_tokens": 600, "max_length": 512, "seed": 1} | changes
    return PairData(read_meta(folder / "meta.json", config.max_tiles), tokenizer, config, **how)


@pytest.fixture(autouse=True)
def restore_meta(toy):
    """Tests above overwrite meta.json of the shared folder; put it back."""
    path = toy[0] / "meta.json"
    before = path.read_text()
    yield
    path.write_text(before)


def test_an_epoch_visits_every_record_once_and_steps_are_repeatable(toy):
    data = pair_data(toy)
    steps = data.steps_per_epoch
    seen = [tuple(row) for n in range(steps) for row in data.rows(n)]
    assert len(seen) == len(set(seen)) == sum(map(len, data.sets))
    second = [tuple(row) for n in range(steps, 2 * steps) for row in data.rows(n)]
    assert sorted(second) == sorted(seen) and second != seen
    assert (pair_data(toy).rows(3) == data.rows(3)).all()
    distinct = [tuple(row) for row in data.distinct_rows(2 * steps)]
    assert distinct == seen and len(data.distinct_rows(2)) == 16


def test_a_digest_follows_all_that_decides_which_responses_a_run_has(toy, tmp_path):
    data, found = pair_data(toy), set()
    flags = {"batch_size": 4, "pack_tokens": 500, "max_length": 500, "seed": 2, "limit": 8}
    flags |= {"overlong": "cut", "pairs_per_prompt": 2, "share_prefix": False}
    others = [replace(data, **{name: value}) for name, value in flags.items()]
    others.append(replace(data, config=replace(data.config, system_message="Look.")))
    shutil.copy(data.tokenizer.source, tmp_path)
    with open(tmp_path / data.tokenizer.source.name, "a") as file:
        file.write("\n")
    others.append(replace(data, tokenizer=load_tokenizer(tmp_path)))
    first, *rest = data.sets
    lines = (toy[0] / "toy_text.jsonl").read_text().splitlines(keepends=True)
    changes = [{"name": "other"}, {"repeat_time": 2}, {"max_tiles": 9}, {"augment": True}]
    for n in range(3):  # of one file: as it is, its first line changed, its last
        texts = [line.replace("It", "it", n and 1) for line in lines]
        kept = {1: texts[:1] + lines[1:], 2: lines[:-1] + texts[-1:]}.get(n, lines)
        (tmp_path / f"{n}.jsonl").write_text("".join(kept))
        changes.append({"lines": JsonLines(tmp_path / f"{n}.jsonl")})
    others += [replace(data, sets=[replace(first, **change), *rest]) for change in changes]
    found = [data.digest(3), data.digest(4), *(other.digest(3) for other in others)]
    assert len(set(found)) == len(found) and pair_data(toy).digest(3) == found[0]


def test_a_plan_holds_the_whole_batch_within_the_token_budget(toy):
    data = pair_data(toy)
    packs, overlong = data.plan(data.rows(0))
    assert not overlong
    assert sum(len(tree.pairs) for pack in packs for tree in pack) == 8
    assert all(sum(tree.size for tree in pack) <= 600 for pack in packs)


def test_over_long_records_are_dropped_by_name_or_get_fewer_tiles(toy):
    long = max(t.longest for t in toy_trees(toy))
    data = pair_data(toy, max_length=long - 1, batch_size=100)
    packs, overlong = data.plan(data.rows(0))
    assert overlong and all(rule == "dropped" and "line" in name for rule, name in overlong)
    kept = sum(len(pack) for pack in packs)
    assert kept + len(overlong) == sum(map(len, data.sets))
    record = data.sets[2][0]  # a wide image
    wide = toy_trees(toy)[2]
    data = pair_data(toy, max_length=wide.longest - 1, overlong="fewer_tiles")
    tree, rule = data.fit(record)
    assert sum(tree.tiles) < sum(wide.tiles) and rule == "fewer_tiles"
    assert replace(data, max_length=10).fit(record)[0] is None  # one tile is too long, too


@pytest.mark.parametrize("share", [True, False])
def test_a_pair_whose_responses_do_not_fit_into_a_pack_is_dropped_by_name(toy, tmp_path, share):
    long = {**GOOD, "chosen": "3 " * 90, "rejected": "4 " * 90}
    sets = read_meta(write_set(tmp_path, [GOOD, long]), 1)
    length = encode_tree(sets[0][1], toy[2], toy[1]).longest
    limits = {"batch_size": 2, "max_length": length, "seed": 1, "share_prefix": share}
    data = PairData(sets, toy[2], toy[1], pack_tokens=length, **limits)
    [[tree, *copies]], overlong = data.plan(data.rows(0))
    assert len(copies) == (not share) and overlong == [("dropped", sets[0][1].name)]
    assert [record for record, _, _ in tree.pairs] == [sets[0][0]]
    cut = replace(data, overlong="cut")
    assert cut.fit(sets[0][1]) == (None, "dropped")
    assert data.digest(1) != replace(data, pack_tokens=2 * length).digest(1)
    assert not replace(data, pack_tokens=2 * length).plan(data.rows(0))[1]


def test_a_bush_without_a_shared_prefix_keeps_to_its_pack(toy, tmp_path):
    pairs = [{**GOOD, "rejected": f"It is {n}."} for n in range(4, 9)]
    sets = read_meta(write_set(tmp_path, pairs), 1)
    tree = encode_tree(sets[0][0], toy[2], toy[1])
    budget = 2 * (tree.size + len(tree.trunk))
    limits = {"batch_size": 5, "max_length": budget, "seed": 1, "pairs_per_prompt": 5}
    data = PairData(sets, toy[2], toy[1], pack_tokens=budget, share_prefix=False, **limits)
    packs, overlong = data.plan(data.rows(0))
    assert sum(len(tree.pairs) for pack in packs for tree in pack) == 5 and not overlong
    assert all(sum(tree.size for tree in pack) <= budget for pack in packs)


def text_pair(tmp_path, **changes):
    """The record of a text pair."""
    return read_meta(write_set(tmp_path, [{**GOOD, **changes}]), 1)[0][0]


def long_tree(toy, tmp_path, overlong, room):
    """A text pair that may have `room` tokens behind its prompt: (tree, rule, whole tree)."""
    record = text_pair(tmp_path, chosen="It is 3 it is 3", rejected="It is 4 it is 4")
    whole = encode_tree(record, toy[2], toy[1])
    data = pair_data(toy, max_length=len(whole.trunk) + room, overlong=overlong)
    return *data.fit(record), whole


def test_cut_responses_end_where_the_length_is_reached_without_their_end_token(toy, tmp_path):
    tree, rule, whole = long_tree(toy, tmp_path, "cut", 6)
    assert rule == "cut"
    assert tree.responses == [response[:6] for response in whole.responses]
    assert all(toy[2].im_end_id not in response for response in tree.responses)
    fits, rule, whole = long_tree(toy, tmp_path, "cut", 99)
    assert fits.responses == whole.responses and rule == ""


def test_a_rejected_response_that_its_sampler_cut_off_has_no_end_to_be_learned(toy, tmp_path):
    whole, open_ended = (
        encode_tree(text_pair(tmp_path, cut_off=cut_off), toy[2], toy[1]).responses
        for cut_off in (False, True)
    )
    assert open_ended == [whole[0], whole[1][:-1]] and whole[1][-1] == toy[2].im_end_id
    with pytest.raises(InputError, match="'cut_off' must be bool"):
        text_pair(tmp_path, cut_off="yes")


@pytest.mark.parametrize(("overlong", "room"), [("drop", 6), ("cut", 0), ("cut", 1)])
def test_what_cannot_be_cut_apart_is_dropped(toy, tmp_path, overlong, room):
    assert long_tree(toy, tmp_path, overlong, room)[:2] == (None, "dropped")


def test_of_a_chosen_response_without_room_for_a_token_nothing_is_left(toy, tmp_path):
    record = text_pair(tmp_path)
    trunk = encode_tree(record, toy[2], toy[1]).trunk
    data = pair_data(toy, max_length=len(trunk), overlong="cut", only_chosen=True)
    assert data.fit(record)[0] is None


def test_a_step_whose_records_are_all_too_long_has_no_pack_and_names_them(toy):
    data = pair_data(toy, max_length=10, batch_size=4)
    packs, overlong = data.plan(data.rows(0))
    assert packs == [] and len(overlong) == 4


@pytest.mark.parametrize("ending", ["", "\n", " \n\t"])
def test_a_question_is_stripped_as_the_template_strips_in_training(toy, tmp_path, ending):
    _, config, tokenizer, _ = toy
    padded = text_pair(tmp_path, question="\n" + GOOD["question"] + ending)
    trees = [encode_tree(r, tokenizer, config) for r in (padded, text_pair(tmp_path))]
    assert trees[0].trunk == trees[1].trunk
    keeps = replace(config, template="internvl2_5")
    trees = [encode_tree(r, tokenizer, keeps) for r in (padded, text_pair(tmp_path))]
    assert trees[0].trunk != trees[1].trunk


def test_responses_that_the_tokenizer_takes_alike_are_refused(toy, tmp_path):
    folder, config, _, _ = toy
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.backend.normalizer = normalizers.NFC()  # as Qwen's
    record = text_pair(tmp_path, chosen="caf\u00e9", rejected="cafe\u0301")
    with pytest.raises(InputError, match="a.jsonl line 1: chosen and rejected are the same tokens"):
        encode_tree(record, tokenizer, config)
    encode_tree(record, tokenizer, config, only_chosen=True)


def test_a_system_prompt_stands_in_the_place_of_the_models(toy, tmp_path):
    _, config, tokenizer, _ = toy
    ours = tokenizer.decode(encode_tree(text_pair(tmp_path), tokenizer, config).trunk)
    record = text_pair(tmp_path, system_prompt="It is 3.")
    theirs = tokenizer.decode(encode_tree(record, tokenizer, config).trunk)
    assert theirs == ours.replace("You are a careful observer.", "It is 3.") != ours
    empty = tokenizer.decode(
        encode_tree(text_pair(tmp_path, system_prompt=""), tokenizer, config).trunk
    )
    assert empty == ours.replace("You are a careful observer.", "")  # as officially


def test_nothing_to_train_on_is_an_error(tmp_path, toy):
    _, config, tokenizer, _ = toy
    sets = read_meta(write_set(tmp_path, [GOOD], repeat_time=0), 1)
    with pytest.raises(InputError, match="no records"):
        PairData(sets, tokenizer, config, batch_size=1, pack_tokens=9, max_length=9, seed=0)


def test_only_chosen_leaves_out_the_rejected_branch(toy):
    tree = toy_trees(toy, only_chosen=True)[0]
    assert len(tree.responses) == 1 and tree.pairs[0][1:] == (0, 0)


def test_a_limit_takes_the_same_pairs_in_every_epoch(toy):
    data = pair_data(toy, limit=24)
    first, *others = (data.order(epoch).tolist() for epoch in range(3))
    assert len(first) == 24 and all(sorted(rows) == sorted(first) for rows in others)
    assert first not in others
    assert len(data.distinct_rows(3 * data.steps_per_epoch)) == 24


def test_prefetching_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(n * n for n in range(3, 6))) == [9, 16, 25]
    assert list(prefetch([])) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetch(1 // n for n in range(2)))


def test_seeded_generators_depend_on_every_part_of_the_key():
    draws = [seeded(*key).integers(2**62) for key in ((1, "a"), (1, "b"), (2, "a"), ("1", "a"))]
    assert len(set(draws)) == 4
    assert seeded(1, "a").integers(2**62) == draws[0]
