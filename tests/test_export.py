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
from tools.export import ExportConfig, export
from weights import INDEX, load_model

MICRO = OURS / "internvl2-micro" / "checkpoint"


@pytest.fixture
def trained(tmp_path):
    """A trained model with the code and tokenizer files of its release."""
    folder = shutil.copytree(MICRO, tmp_path / "trained")
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('remote code was run')\n")
    for path in (OURS / "tokenizer").glob("*token*"):
        shutil.copy(path, folder)
    return folder


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert set(json.loads((folder / INDEX).read_text())["weight_map"]) == set(found)
    return found


def test_the_language_model_alone_is_internlm2(trained, tmp_path):
    export(ExportConfig(trained, tmp_path / "out", llm_only=True))
    names = set(tensors(tmp_path / "out"))
    llm = "language_model."
    assert names == {n.removeprefix(llm) for n in tensors(trained) if n.startswith(llm)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["InternLM2ForCausalLM"]


def test_the_llama_layout_splits_wqkv_by_group(trained, tmp_path):
    export(ExportConfig(trained, tmp_path / "out", llama=True))
    ours, llama = tensors(trained), tensors(tmp_path / "out")
    packed = ours["language_model.model.layers.0.attention.wqkv.weight"].view(2, 5, 4, 24)
    q = llama["model.layers.0.self_attn.q_proj.weight"].view(2, 3, 4, 24)
    assert torch.equal(q, packed[:, :3])
    for slot, letter in ((3, "k"), (4, "v")):
        part = llama[f"model.layers.0.self_attn.{letter}_proj.weight"].view(2, 4, 24)
        assert torch.equal(part, packed[:, slot])
    assert not list((tmp_path / "out").glob("*.py")), "a Llama needs no code of its own"


@torch.no_grad()
def test_transformers_loads_the_llama_layout_and_gives_our_logits(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install .[llama] to run this")
    export(ExportConfig(trained, tmp_path / "out", llama=True))
    os.environ["HF_HUB_OFFLINE"] = "1"
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_model(trained)
    golden = load_file(OURS / "internvl2-micro" / "cases.safetensors")
    for case in ("text", "beyond_limit"):
        ids = golden[f"{case}/input_ids"]
        expected = ours(ids)
        torch.testing.assert_close(theirs(ids).logits.float(), expected, atol=1e-4, rtol=0)


def test_the_llama_layout_has_a_tokenizer_without_code_that_gives_our_ids(trained, tmp_path):
    export(ExportConfig(trained, tmp_path / "out", llama=True))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ours = load_tokenizer(trained)
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


def test_an_export_stops_where_the_chat_does(trained, tmp_path):
    export(ExportConfig(trained, tmp_path / "out", llama=True))
    tokenizer = load_tokenizer(trained)
    expected = {"bos_token_id": 1, "eos_token_id": tokenizer.im_end_id, "pad_token_id": 2}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.im_end_id


def test_an_export_replaces_nothing_but_an_earlier_export(trained, tmp_path):
    out = tmp_path / "out"
    for flags in ({"llama": True}, {"llm_only": True}):
        export(ExportConfig(trained, out, **flags))
    run = tmp_path / "runs/mpo"
    (run / "checkpoints").mkdir(parents=True)
    for target, message in [
        (run, "holds checkpoints"),
        (trained, "overlap"),
        (trained / "export", "overlap"),
        (tmp_path, "overlap"),
        (MICRO, "holds config.json"),
    ]:
        with pytest.raises(InputError, match=message):
            export(ExportConfig(trained, target, llama=True))
    assert (run / "checkpoints").is_dir() and not (trained / "export").exists()


def test_a_damaged_model_is_refused_by_name_and_nothing_is_written(trained, tmp_path):
    path = sorted(trained.glob("*.safetensors"))[0]
    changed = load_file(path)
    name = next(iter(changed))
    changed[name] = changed[name].flatten()[:-1].clone()
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        export(ExportConfig(trained, tmp_path / "out", llama=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{}, {"llm_only": True, "llama": True}])
def test_one_layout_at_a_time(tmp_path, flags):
    with pytest.raises(InputError, match="choose one"):
        ExportConfig(tmp_path, tmp_path / "out", **flags)
