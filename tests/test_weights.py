"""Official weights in and out, byte for byte; checkpoints whole or absent."""

import json
import os
import shutil
import threading

import pytest
import torch
from conftest import OURS, folder_from_environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights
from config import load_config
from losses import LOSSES, PairLogps, token_logps
from runtime import Failure, InputError
from vision import IMAGENET_MEAN, IMAGENET_STD
from weights import (
    EXPORT_MARK,
    INDEX,
    CheckpointWriter,
    complete_checkpoints,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    save_model,
)

MICRO = OURS / "internvl2-micro" / "checkpoint"
MPO = [(0.8, "dpo", {"beta": 0.1}), (0.2, "bco", {"beta": 0.1}), (1.0, "sft", {})]


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the micro checkpoint."""
    return shutil.copytree(MICRO, tmp_path / "model")


def all_tensors(folder):
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("name", ["internvl2-micro", "qwen2-micro", "qwen3-micro"])
def test_load_save_load_is_byte_equal(tmp_path, name):
    release, out = OURS / name / "checkpoint", tmp_path / "out"
    save_model(load_model(release), out, like=release)
    assert {p.name for p in out.iterdir()} == {p.name for p in release.iterdir()} | {EXPORT_MARK}
    for path in release.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


HF_FOLDERS = {  # of transformers' own layout -> (golden twin, case)
    "internlm2-micro": ("internvl2-micro", "beyond_limit"),
    "qwen2-micro": ("qwen2-micro", "c_tiles_thumb"),
    "qwen2-micro-v4": ("qwen2-micro", "f_long_full"),
    "qwen2-micro-other-names": ("qwen2-micro", "a_text"),
    "qwen3-micro": ("qwen3-micro", "c_tiles_thumb"),
    "qwen3-micro-tied": ("qwen3-micro", "tied"),
}


@pytest.mark.parametrize("name", HF_FOLDERS)
@torch.no_grad()
def test_transformers_own_layout_gives_the_golden_logits_and_comes_back(tmp_path, name):
    folder = folder_from_environment("GOLDEN") / "hf-tiny" / name
    twin, case = HF_FOLDERS[name]
    golden, model = load_file(OURS / twin / "cases.safetensors"), load_model(folder)
    ids, tiles = golden.get(f"{case}/input_ids"), None
    if case in ("c_tiles_thumb", "tied"):
        ids = golden["c_tiles_thumb/input_ids"]
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        tiles = (golden["tiles_uint8"] / 255 - mean) / std
    logits = model(ids, tiles)
    expected = golden.get(f"{case}/logits_last4", golden.get(f"{case}/logits"))
    expected = expected.view(1, -1, logits.shape[-1])
    last = logits[:, -expected.shape[1] :]
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=0)
    assert model.config.llm.tied == (case == "tied")
    save_model(model, tmp_path / "out", like=folder)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_a_single_file_loads_like_shards(folder, tmp_path):
    expected = load_model(MICRO).state_dict()
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(folder / "config.json", single)
    named = {"format": "pt", "made by": "somebody"}
    save_file(all_tensors(folder), single / "model.safetensors", metadata=named)
    loaded = load_model(single).state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    save_model(load_model(single), tmp_path / "again", like=single)
    assert [p.name for p in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(tmp_path / "again/model.safetensors", framework="pt") as file:
        assert file.metadata() == named


def test_a_model_has_the_dtype_asked_for_and_its_logits_are_float32():
    model = load_model(MICRO, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[5, 6]])).dtype == torch.float32


def rewrite(folder, change):
    """Apply `change` to the tensors of the first shard."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def copy_shard(folder):
    (folder / INDEX).unlink()
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "copy.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "missing shard .*00002-of-00002"),
        (lambda f: cut(sorted(f.glob("*.safetensors"))[1]), "00002-of-00002.*no whole"),
        (lambda f: rewrite(f, lambda t: t.popitem()), "disagree: 1 missing"),
        (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(2))), r"1 unexpected \(x\)"),
        (copy_shard, "00001-of-00002.safetensors and copy.safetensors both hold"),
        (lambda f: (f / INDEX).write_text("{}"), "index.json: unlisted shard model-00001-of-00002"),
        (
            lambda f: shutil.copy(sorted(f.glob("*.safetensors"))[0], f / "adapter.safetensors"),
            "index.json: unlisted shard adapter.safetensors; fetch what it lists, and no more",
        ),
        (lambda f: (f / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: [p.unlink() for p in f.glob("*.s*")], "missing shard|no .*safetensors"),
    ],
)
def test_damaged_folders_are_refused_with_the_file_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_wrong_shape_names_the_tensor_and_both_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 332
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"\[331, 24\] .* the model of config.json needs \[332, 24\]"
    ):
        load_model(folder)


def test_a_model_of_other_depth_is_refused_by_its_keys(folder):
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="missing .*layers.2.attention"):
        load_model(folder)


@pytest.fixture
def qwen(tmp_path):
    """A writable copy of the Qwen3 micro checkpoint."""
    return shutil.copytree(OURS / "qwen3-micro" / "checkpoint", tmp_path / "qwen")


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["llm_config"] |= changes.pop("llm_config", {})
    path.write_text(json.dumps(config | changes))


def rename(folder, change):
    """Give every tensor the name change(name), None to leave it out."""
    tensors = all_tensors(folder)
    for path in [folder / INDEX, *folder.glob("*.safetensors")]:
        path.unlink()
    renamed = {change(name): tensor for name, tensor in tensors.items() if change(name)}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def without_head(name):
    return None if "lm_head" in name else name


def test_a_head_in_the_files_is_the_head_whatever_the_flag_says(qwen, tmp_path):
    expected = load_model(qwen).state_dict()
    change_config(qwen, tie_word_embeddings=True, llm_config={"tie_word_embeddings": True})
    model = load_model(qwen)
    loaded = model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    save_model(model, tmp_path / "out", like=qwen)  # transformers 4 believes the flag
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert not written["tie_word_embeddings"] and not written["llm_config"]["tie_word_embeddings"]


@pytest.mark.parametrize("level", ["top", "llm_config"])
@torch.no_grad()
def test_without_a_head_in_the_files_the_flag_makes_the_embedding_the_head(qwen, tmp_path, level):
    rename(qwen, without_head)
    with pytest.raises(InputError, match=r"1 missing \(language_model.lm_head.weight\)"):
        load_model(qwen)
    tied = {"tie_word_embeddings": True}
    change_config(qwen, **tied if level == "top" else {"llm_config": tied})
    model, golden = load_model(qwen), load_file(OURS / "qwen3-micro" / "cases.safetensors")
    model.image_context_id = 348
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    logits = model(golden["c_tiles_thumb/input_ids"], (golden["tiles_uint8"] / 255 - mean) / std)
    expected = golden["tied/logits_last4"].view(4, -1)
    torch.testing.assert_close(logits[0, -4:], expected, atol=1e-4, rtol=0)
    save_model(model, tmp_path / "out", like=qwen)
    written = tmp_path / "out/model.safetensors"
    assert written.read_bytes() == (qwen / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: rename(f, lambda n: n.replace("mlp1.0.", "multi_modal_projector.layer_norm.")),
         r"2 missing \(mlp1.0.bias, .*2 unexpected \(multi_modal_projector.layer_norm.bias"),
        (lambda f: rename(f, lambda n: n.replace(".self_attn.q_norm.", ".self_attn.norm_q.")),
         r"2 missing \(language_model.model.layers.0.self_attn.q_norm"),
        (lambda f: rename(f, lambda n: n.replace(".self_attn.o_proj.", ".attention.wo.")),
         r"2 unexpected \(language_model.model.layers.0.attention.wo"),
        (lambda f: change_config(f, llm_config={"architectures": ["Qwen2ForCausalLM"]}),
         r"missing \(language_model.model.layers.0.self_attn.k_proj.bias"),
        (lambda f: change_config(f, llm_config={"architectures": ["InternLM2ForCausalLM"]}),
         r"4 unexpected \(language_model.model.layers.0.self_attn.k_norm.weight"),
        (lambda f: change_config(f, llm_config={"architectures": ["Phi3ForCausalLM"]}),
         "Phi3ForCausalLM.*InternVL2_5-4B"),
        (lambda f: change_config(f, llm_config={"head_dim": 4}), r"has shape \[.*needs \["),
    ],
)  # fmt: skip
def test_weights_of_another_layout_or_family_are_refused_by_name(qwen, change, message):
    change(qwen)
    with pytest.raises(InputError, match=message):
        load_model(qwen)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shards_of_packed_projections_hold_the_rows_of_the_whole(monkeypatch, world):
    """As FSDP splits rows, in the middle of a head too; each process reads its own rows alone."""
    folder = OURS / "qwen2-micro" / "checkpoint"
    model = load_model(folder)
    pieces = weights.pieces_of(model, folder)
    for name, p in model.named_parameters():
        parts = []
        for rank in range(world):
            monkeypatch.setattr(weights, "shard_place", lambda _, rank=rank: (rank, world, True))
            parts.append(weights.read_rows(pieces[name], p))
        chunks = [len(chunk) for chunk in torch.arange(len(p)).chunk(world)]
        assert [len(part) for part in parts if len(part)] == chunks
        assert torch.equal(torch.cat(parts).float(), p), name


@pytest.mark.parametrize("name", ["qwen2-micro", "qwen3-micro"])
def test_a_model_after_a_step_of_mpo_comes_back_as_it_was_trained(tmp_path, name):
    release = OURS / name / "checkpoint"
    model = load_model(release, dtype=torch.bfloat16)
    ids = load_file(OURS / name / "cases.safetensors")["a_text/input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    chosen, rejected = (token_logps(model(row), row).sum(1) for row in (ids, ids.flip(1)))
    start = torch.zeros(1)
    pairs = PairLogps(chosen, rejected, start, start, start + 20, start + 20)
    terms = [w * LOSSES[n](pairs, **k) for w, n, k in MPO]
    sum(terms).mean().backward()
    optimizer.step()
    save_model(model, tmp_path / "out", like=release)
    trained, loaded = model.state_dict(), load_model(tmp_path / "out", dtype=torch.bfloat16)
    before = load_model(release, dtype=torch.bfloat16).state_dict()
    for parameter, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[parameter]), parameter
    changed = [n for n in trained if not torch.equal(before[n], trained[n])]
    assert any("wqkv.weight" in n for n in changed) and any("output.weight" in n for n in changed)


def test_an_index_cannot_point_out_of_its_folder(folder):
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../evil.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="missing shard ../evil.safetensors"):
        load_model(folder)


def test_only_an_earlier_export_is_replaced_and_it_is_replaced_whole(folder, tmp_path):
    model, out = load_model(MICRO), tmp_path / "out"
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('remote code was run')\n")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    save_model(model, out, like=folder)
    for name in ("modeling_internvl_chat.py", "tokenizer.model"):
        assert (out / name).exists(), "it loads where the release does"
    save_model(model, out, like=MICRO)
    assert not (out / "modeling_internvl_chat.py").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    (out / "thesis.tex").write_text("years of work")
    os.mkfifo(tmp_path / "pipe")  # stands for any device
    for target, message in [
        (out, "holds thesis.tex"),
        (folder, r"overlap"),
        (folder / "model", "overlap"),
        (tmp_path, "overlap"),
        (out / "thesis.tex", "is no folder"),
        (tmp_path / "pipe", "is no folder"),
        (MICRO, "holds config.json"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=message):
            save_model(model, target, like=folder)
        assert sorted(tmp_path.rglob("*")) == before


def test_what_an_export_replaces_goes_only_once_the_new_one_is_in_place(tmp_path, monkeypatch):
    partial, final, real = tmp_path / "partial", tmp_path / "model", os.replace
    final.mkdir()
    (final / "weights").write_text("the only ones")

    def full(source, target):
        if source == partial:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError), weights.new_folder(partial, final):
        pass
    assert [path.read_text() for path in tmp_path.rglob("weights")] == ["the only ones"]


def test_a_folder_whose_name_safetensors_could_not_read_again_is_refused(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        save_model(load_model(MICRO), tmp_path / "latin \udcff", like=MICRO)
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    for _ in range(2):
        save_model(load_model(MICRO), tmp_path / "model", like=MICRO)
        assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / INDEX).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "model"]


@pytest.mark.parametrize("kind", ["int8", "float64", "float8_e4m3fn", "bool"])
def test_a_tensor_of_another_type_than_weights_have_is_refused_by_name(folder, kind):
    dtype, names = getattr(torch, kind), []

    def convert(tensors):
        names.append(next(iter(tensors)))
        tensors[names[0]] = tensors[names[0]].to(dtype)

    rewrite(folder, convert)
    with pytest.raises(InputError, match=rf"{names[0]} has .* type .*BF16, F16, F32"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_three_types_of_weights_are_read_and_written_back(folder, tmp_path, kind):
    dtype = getattr(torch, kind)
    rewrite(folder, lambda t: t.update({name: x.to(dtype) for name, x in t.items()}))
    save_model(load_model(folder), tmp_path / "out", like=folder)
    written = load_file(sorted((tmp_path / "out").glob("*.safetensors"))[0])
    assert {t.dtype for t in written.values()} == {dtype}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(folder, tmp_path, value):
    model = load_model(folder)
    rewrite(folder, lambda t: next(iter(t.values())).view(-1)[-1:].fill_(value))
    with pytest.raises(InputError, match=r"attention.wo.weight holds NaN or infinity"):
        load_model(folder)
    with torch.no_grad():
        model.projector[1].bias[0] = value
    with pytest.raises(Failure, match="projector.1.bias holds NaN or infinity"):
        save_model(model, tmp_path / "out", like=MICRO)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-written either


def test_a_number_that_the_stored_type_cannot_hold_is_named(folder, tmp_path):
    rewrite(folder, lambda t: t.update({name: x.half() for name, x in t.items()}))
    model = load_model(folder)
    with torch.no_grad():
        model.language_model.model.layers[0].attention.wo.weight[0] = 1e5  # float16: to 65,504
    with pytest.raises(Failure, match="layers.0.attention.wo.weight holds NaN or infinity"):
        save_model(model, tmp_path / "out", like=folder)


def test_a_model_that_the_disk_gives_back_changed_is_no_export(tmp_path, monkeypatch):
    real = weights.save_file

    def write_other_bits(tensors, *args, **how):
        real({name: t + (name == "mlp1.1.bias") for name, t in tensors.items()}, *args, **how)

    monkeypatch.setattr(weights, "save_file", write_other_bits)
    with pytest.raises(Failure, match="projector.1.bias read back differs from the model"):
        save_model(load_model(MICRO), tmp_path / "out", like=MICRO)
    assert not list(tmp_path.iterdir())


def test_the_config_of_the_release_is_read():
    config = load_config(OURS / "internvl2-8b")
    assert (config.template, config.tile_size, config.max_tiles) == ("internlm2-chat", 448, 12)


# --------------------------------------------------------------------------- checkpoints


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    tensors = {"a": torch.arange(7.0)}
    CheckpointWriter(tmp_path, 2).save(3, tensors, {"x": 1})
    partial = tmp_path / ".partial"
    shutil.copytree(tmp_path / "step-00000003", partial)
    (tmp_path / "step-00000005").mkdir()  # without its state.json
    assert newest_checkpoint(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_come_back_exactly_and_only_the_newest_are_kept(tmp_path, background):
    writer, tensors = CheckpointWriter(tmp_path, 2, background), {"a": torch.zeros(5, 2)}
    for step in (1, 2, 3):
        tensors["a"].fill_(step / 3)
        writer.save(step, tensors, {"x": step})
        tensors["a"].fill_(9)  # training goes on: what is written is the moment of `save`
    writer.finish()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    into = {"a": torch.zeros(5, 2)}
    state = load_checkpoint(newest_checkpoint(tmp_path), into)
    assert (state["x"], state["step"]) == (3, 3)
    assert torch.equal(into["a"], torch.full((5, 2), 1.0))


def test_a_checkpoint_in_the_background_counts_once_it_is_written(tmp_path, monkeypatch):
    writer, gate = CheckpointWriter(tmp_path, 2, background=True), threading.Event()
    real = weights.write_tensors
    monkeypatch.setattr(weights, "write_tensors", lambda *a: (gate.wait(20), real(*a)))
    writer.save(1, {"a": torch.zeros(3)}, {})
    writer.finish(wait=False)
    assert newest_checkpoint(tmp_path) is None
    gate.set()
    while newest_checkpoint(tmp_path) is None:
        writer.finish(wait=False)
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def test_a_full_disk_in_the_background_is_told_and_spares_the_last_one(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 2, background=True)
    writer.save(1, {"a": torch.zeros(3)}, {})
    writer.finish()

    def full(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    writer.save(2, {"a": torch.ones(3)}, {})
    with pytest.raises(Failure, match="shard-000-of-001.*No space.*saved before is intact"):
        writer.finish()
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def other_step(checkpoint):
    shard = "shard-000-of-001.safetensors"
    shutil.copy(checkpoint.with_name("step-00000001") / shard, checkpoint / shard)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def set_step(checkpoint):
    path = checkpoint / "state.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 9999'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_step, "step-00000002: shard-000-of-001.safetensors is not what was saved"),
        (lambda c: flip_a_bit(c / "shard-000-of-001.safetensors"), "shard-000.* is not what"),
        (lambda c: (c / "shard-000-of-001.safetensors").unlink(), "shard-000.* is not what"),
        (set_step, "step-00000002: state.json is not what was saved"),
        (lambda c: c.rename(c.with_name("step-00000007")), "step-00000007: state.json is not what"),
        (
            lambda c: (c / "state.json").write_text('{"a": ' + "[" * 99999),
            "state.json: not valid JSON",
        ),
        (lambda c: (c / "state.checksum").unlink(), "state.json is not what was saved"),
        (lambda c: (c / "shard-000-of-001.checksum").unlink(), "shard-000.* is not what"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    writer = CheckpointWriter(tmp_path, 2)
    for step in (1, 2):
        writer.save(step, {"a": torch.full((3,), float(step))}, {})
    damage(newest_checkpoint(tmp_path))
    with pytest.raises(InputError, match=message):
        load_checkpoint(newest_checkpoint(tmp_path), {"a": torch.zeros(3)})


def test_only_checkpoints_of_our_own_are_pruned(tmp_path):
    writer, kept = CheckpointWriter(tmp_path, 1), ["step-0.txt", "step-00000001-keep", "step-1"]
    writer.save(1, {"a": torch.zeros(3)}, {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-keep")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-1")
    (tmp_path / "step-0.txt").write_text("a note")
    writer.save(2, {"a": torch.zeros(3)}, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([*kept, "step-00000002"])


def test_a_run_that_went_back_keeps_what_it_saves_now_and_not_what_it_saved_later(tmp_path):
    writer = CheckpointWriter(tmp_path, 1)
    for step in (4, 3):
        writer.save(step, {"a": torch.zeros(3)}, {})
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003"]


@pytest.mark.parametrize("background", [False, True])
def test_the_next_save_removes_what_a_killed_one_left_and_nothing_else(tmp_path, background):
    kept = [".step-3.partial", ".step-00000001-keep.partial", "step-00000009.partial"]
    for name in [*kept, ".partial"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-000-of-001.safetensors").write_bytes(b"half")
    writer = CheckpointWriter(tmp_path, 2, background)
    for step in (4, 5):
        writer.save(step, {"a": torch.zeros(3)}, {})
    writer.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([*kept, "step-00000004", "step-00000005"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    CheckpointWriter(tmp_path, 1).save(1, {"a": torch.zeros(3)}, {})
    checkpoint = newest_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"1 missing \(a \[4\]\), 1 unexpected \(a \[3\]\)"):
        load_checkpoint(checkpoint, {"a": torch.zeros(4)})
    with pytest.raises(InputError, match=r"1 missing \(b \[3\]\), 1 unexpected \(a \[3\]\)"):
        load_checkpoint(checkpoint, {"b": torch.zeros(3)})
