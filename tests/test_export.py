"""Export: what other programs load is what was trained."""

import json
import os
import shutil

import pytest
import tokenizers
import torch
from conftest import OURS
from safetensors.torch import load_file, save_file

from runtime import InputError
from tokenizer import encode_chat, load_tokenizer
from weights import INDEX, ExportConfig, export, load_model

MICRO = OURS / "internvl2-micro" / "checkpoint"


@pytest.fixture
def release(tmp_path):
    """A released folder: weights, code and tokenizer files."""
    folder = shutil.copytree(MICRO, tmp_path / "release")
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('remote code was run')\n")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def trained(release, tmp_path):
    """The same model with other numbers."""
    folder = shutil.copytree(MICRO, tmp_path / "trained")
    for path in folder.glob("*.safetensors"):
        moved = {name: (t.float() * 1.25).bfloat16() for name, t in load_file(path).items()}
        save_file(moved, path, metadata={"format": "pt"})
    return folder


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert set(json.loads((folder / INDEX).read_text())["weight_map"]) == set(found)
    return found


def test_the_official_layout_gets_our_weights_and_the_releases_files(release, trained, tmp_path):
    export(ExportConfig(trained, release, tmp_path / "out"))
    ours, written = tensors(trained), tensors(tmp_path / "out")
    assert set(ours) == set(written)
    assert all(torch.equal(ours[name], written[name]) for name in ours)
    for name in ("config.json", "modeling_internlm2.py", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (release / name).read_bytes()
    load_model(tmp_path / "out")


def test_the_language_model_alone_is_internlm2(release, trained, tmp_path):
    export(ExportConfig(trained, release, tmp_path / "out", llm_only=True))
    names = set(tensors(tmp_path / "out"))
    llm = "language_model."
    assert names == {n.removeprefix(llm) for n in tensors(trained) if n.startswith(llm)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["InternLM2ForCausalLM"]


def test_the_llama_layout_splits_wqkv_by_group(release, trained, tmp_path):
    export(ExportConfig(trained, release, tmp_path / "out", llama=True))
    ours, llama = tensors(trained), tensors(tmp_path / "out")
    packed = ours["language_model.model.layers.0.attention.wqkv.weight"].view(2, 5, 4, 24)
    q = llama["model.layers.0.self_attn.q_proj.weight"].view(2, 3, 4, 24)
    assert torch.equal(q, packed[:, :3])
    for slot, letter in ((3, "k"), (4, "v")):
        part = llama[f"model.layers.0.self_attn.{letter}_proj.weight"].view(2, 4, 24)
        assert torch.equal(part, packed[:, slot])
    assert not list((tmp_path / "out").glob("*.py")), "a Llama needs no code of its own"


@torch.no_grad()
def test_transformers_loads_the_llama_layout_and_gives_our_logits(release, trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install .[llama] to run this")
    export(ExportConfig(trained, release, tmp_path / "out", llama=True))
    os.environ["HF_HUB_OFFLINE"] = "1"
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(trained)
    golden = load_file(OURS / "internvl2-micro" / "cases.safetensors")
    for case in ("text", "beyond_limit"):
        ids = golden[f"{case}/input_ids"]
        expected = ours(ids)
        torch.testing.assert_close(theirs(ids).logits.float(), expected, atol=1e-4, rtol=0)


def test_the_llama_layout_has_a_tokenizer_without_code_that_gives_our_ids(
    release, trained, tmp_path
):
    for path in (OURS / "tokenizer").glob("*token*"):
        shutil.copy(path, release)
    export(ExportConfig(trained, release, tmp_path / "out", llama=True))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ours = load_tokenizer(release)
    for text in (
        "The cat sat on a mat.",
        "<|im_start|>user\nA   b<|im_end|>",
        "猫 é \U0001f600",
        "",
    ):
        assert theirs.encode(text).ids == [ours.bos_id, *ours.encode(text)]
        assert theirs.decode(ours.encode_plain(text)) == ours.decode(ours.encode_plain(text))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    jinja2 = pytest.importorskip("jinja2")  # comes with torch
    rendered = jinja2.Template(settings["chat_template"]).render(
        bos_token="<s>",
        messages=[{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}],
        add_generation_prompt=True,
    )
    prompt = encode_chat(ours, "internlm2-chat", [("hi", None)], [], "S")
    assert ours.encode(rendered) == prompt


def test_an_export_refuses_a_model_of_another_shape(release, trained, tmp_path):
    path = sorted(trained.glob("*.safetensors"))[0]
    changed = load_file(path)
    name = next(iter(changed))
    changed[name] = changed[name].flatten()[:-1].clone()
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        export(ExportConfig(trained, release, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_layout_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="choose one"):
        ExportConfig(tmp_path, tmp_path, tmp_path, llm_only=True, llama=True)
