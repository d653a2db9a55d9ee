"""Export: what other programs load is what was trained."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import tokenizers
import torch
from conftest import OURS, folder_from_environment
from safetensors.torch import load_file, save_file

from config import load_config
from runtime import InputError
from tokenizer import encode_chat, load_tokenizer
from tools.export import ExportConfig, chat_template, export, text_config, write_shards
from weights import INDEX, empty_model, load_model, new_export, save_model

MICRO = OURS / "internvl2-micro" / "checkpoint"


MICROS = ["internvl2-micro", "qwen2-micro", "qwen3-micro"]


def with_tokenizer(name, folder):
    """A copy of a micro checkpoint; InternLM2's gets a tokenizer, and a row for each of its ids."""
    shutil.copytree(OURS / name / "checkpoint", folder)
    if name != "internvl2-micro":
        return folder
    for path in (OURS / "tokenizer").glob("*token*"):
        shutil.copy(path, folder)
    size = load_tokenizer(folder).vocab_size
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["vocab_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        changed = load_file(path)
        for part in ("tok_embeddings", "output"):
            for table in [name for name in changed if f".{part}." in name]:
                rows = changed[table]
                changed[table] = rows.repeat(-(-size // len(rows)), 1)[:size].clone()
        save_file(changed, path, metadata={"format": "pt"})
    return folder


def test_two_exports_do_not_write_one_folder(tmp_path):
    cfg = ExportConfig(MICRO, tmp_path / "out", hf=True)
    with new_export(tmp_path / "out"), pytest.raises(InputError, match="another run works there"):
        export(cfg)
    assert (tmp_path / "out").is_dir()  # what the first one wrote
    export(replace(cfg, model_dir=with_tokenizer("qwen2-micro", tmp_path / "model")))


@pytest.fixture
def trained(tmp_path):
    """A trained model with the code and tokenizer files of its release."""
    folder = with_tokenizer("internvl2-micro", tmp_path / "trained")
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('remote code was run')\n")
    return folder


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert set(json.loads((folder / INDEX).read_text())["weight_map"]) == set(found)
    return found


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


@pytest.mark.parametrize("name", MICROS)
def test_official_to_hf_and_back_is_byte_equal(tmp_path, name):
    release, hf, back = with_tokenizer(name, tmp_path / "a"), tmp_path / "hf", tmp_path / "back"
    export(ExportConfig(release, hf, hf=True))
    save_model(load_model(hf), back, like=release)
    for path in release.glob("*.safetensors"):
        assert path.read_bytes() == (back / path.name).read_bytes()
    ours, theirs = load_config(release), load_config(hf)
    vision = replace(theirs.vision, drop_path_rate=ours.vision.drop_path_rate)
    llm = replace(theirs.llm, architecture=ours.llm.architecture)
    theirs = replace(theirs, vision=vision, llm=llm)
    assert replace(theirs, image_token_id=None) == ours
    assert load_tokenizer(hf).image_context_id == load_tokenizer(release).image_context_id


def test_a_dtype_that_only_the_top_of_config_json_names_is_kept():
    folder = OURS / "qwen2-micro/checkpoint"
    raw = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    raw["llm_config"] = {k: v for k, v in raw["llm_config"].items() if "dtype" not in k}
    assert text_config(load_config(folder), raw)["dtype"] == "float32"


def test_the_hf_layout_has_the_names_shapes_and_files_of_save_pretrained(tmp_path):
    """Against a folder that transformers 4.57.1 wrote; the tokenizer is one file here."""
    golden = folder_from_environment("GOLDEN") / "hf-tiny"
    for name, twin in (("qwen2-micro", "qwen2-micro"), ("internlm2-micro", "internvl2-micro")):
        expected = load_file(golden / name / "model.safetensors")
        release = OURS / twin / "checkpoint"
        (tmp_path / name).mkdir()
        write_shards(empty_model(release), release, "", tmp_path / name)
        written = {}
        for path in (tmp_path / name).glob("*.safetensors"):
            written |= load_file(path)
        assert set(expected) == set(written)
        assert all(torch.equal(expected[n], written[n]) for n in expected)
    export(ExportConfig(OURS / "qwen2-micro" / "checkpoint", tmp_path / "out", hf=True))
    theirs, ours = golden / "qwen2-micro-v4", tmp_path / "out"
    crop = {"crop_to_patches": True}
    for file in ("processor_config.json", "preprocessor_config.json"):
        expected, written = (json.loads((f / file).read_text()) for f in (theirs, ours))
        assert written == expected | (crop if "crop_to_patches" in expected else {})
    config, expected = (json.loads((f / "config.json").read_text()) for f in (ours, theirs))
    for part in ("text_config", "vision_config"):
        for key in set(config[part]) & set(expected[part]) - {"architectures"}:
            assert config[part][key] == expected[part][key], key
    for key, value in expected.items():
        if key not in ("text_config", "vision_config", "transformers_version"):
            assert config[key] == value, key


@torch.no_grad()
@pytest.mark.parametrize("name", MICROS)
def test_transformers_loads_the_hf_layout_gives_our_logits_and_stops_where_we_do(tmp_path, name):
    """Install 4.57 or 5 to run this: an eos token that the model writes ends both answers."""
    transformers = pytest.importorskip("transformers", reason="pip install .[hf] to run this")
    os.environ["HF_HUB_OFFLINE"] = "1"
    release, out = with_tokenizer(name, tmp_path / "a"), tmp_path / "hf"
    golden = load_file(OURS / name / "cases.safetensors")
    ids = golden[f"{'text' if name == 'internvl2-micro' else 'a_text'}/input_ids"]
    stop = load_tokenizer(release).im_end_id
    written = greedy(load_model(release), ids, None, 12)
    copy_head_row(release, written[8], stop)
    export(ExportConfig(release, out, hf=True))
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    ours = load_model(out)
    long = ids.repeat(1, 8)  # past max_position_embeddings
    for case in (ids, long):
        logits = theirs(input_ids=case, attention_mask=torch.ones_like(case)).logits
        torch.testing.assert_close(logits.float(), ours(case), atol=1e-4, rtol=0)
    if name != "internvl2-micro":  # its golden ids are not those of the tokenizer beside it
        case = golden["d_two_images/input_ids"]
        tiles = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        logits = theirs(input_ids=case, pixel_values=tiles).logits
        torch.testing.assert_close(logits, ours(case, tiles), atol=1e-4, rtol=0)
    answer = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )[0, ids.shape[1] :].tolist()
    assert answer == greedy(ours, ids, stop, 12) and answer[-1] == stop and len(answer) < 12


def greedy(model, ids, stop, count):
    """At most `count` ids that continue `ids`, the stop id included."""
    answer = []
    while len(answer) < count and stop not in answer:
        answer.append(model(torch.cat([ids, torch.tensor([answer]).long()], 1))[0, -1].argmax())
        answer[-1] = int(answer[-1])
    return answer


def copy_head_row(folder, source, target):
    """Let the model want token `target` more than it wanted `source`."""
    for path in folder.glob("*.safetensors"):
        changed = load_file(path)
        for name in ("language_model.lm_head.weight", "language_model.output.weight"):
            if name in changed:
                changed[name][target] = changed[name][source] * 1.5
        save_file(changed, path, metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "flags"),
    [("internvl2-micro", {"llama": True}), *[(n, {"llm_only": True}) for n in MICROS[1:]]],
)
def test_transformers_loads_the_language_model_alone_and_gives_our_logits(tmp_path, name, flags):
    transformers = pytest.importorskip("transformers", reason="pip install .[hf] to run this")
    os.environ["HF_HUB_OFFLINE"] = "1"
    release = with_tokenizer(name, tmp_path / "a")
    export(ExportConfig(release, tmp_path / "out", **flags))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    golden, ours = load_file(OURS / name / "cases.safetensors"), load_model(release)
    for case in ("text", "beyond_limit", "a_text", "f_long_full"):
        if f"{case}/input_ids" in golden:
            ids = golden[f"{case}/input_ids"]
            torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nHow  many? 猫<|im_end|>"
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    assert tokenizer(text).input_ids == [*bos, *load_tokenizer(release).encode(text)]
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}  # what generate() takes
    assert theirs.generation_config.eos_token_id == load_tokenizer(release).im_end_id


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


def test_the_chat_template_of_the_hf_layout_renders_as_the_releases_one():
    chats = folder_from_environment("GOLDEN") / "hf-tiny" / "chat.json"
    jinja2 = pytest.importorskip("jinja2")  # comes with torch
    template = jinja2.Template(chat_template("internvl2_5", with_bos=False))
    for chat in json.loads(chats.read_text())["chats"]:
        rendered = template.render(messages=chat["messages"], add_generation_prompt=True)
        assert rendered == chat["text"]


def test_only_an_internlm2_is_a_llama(tmp_path):
    release = with_tokenizer("qwen3-micro", tmp_path / "a")
    with pytest.raises(InputError, match="qwen3 is no Llama; pass --llm_only"):
        export(ExportConfig(release, tmp_path / "out", llama=True))
    assert not (tmp_path / "out").exists()


def test_an_export_needs_the_image_token_s_id(tmp_path):
    with pytest.raises(InputError, match="no tokenizer, which names the image token's id"):
        export(ExportConfig(MICRO, tmp_path / "out", hf=True))
    assert not (tmp_path / "out").exists()


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


def cut(tensor):
    return tensor.flatten()[:-1]


def spoil(tensor):
    return tensor / 0


@pytest.mark.parametrize("damage, told", [(cut, "has shape"), (spoil, "holds NaN or infinity")])
@pytest.mark.parametrize("layout", ["hf", "llama"])
def test_a_damaged_model_is_refused_and_nothing_is_written(damage, told, layout, trained, tmp_path):
    path = sorted(trained.glob("*.safetensors"))[0]
    changed = load_file(path)
    name = next(iter(changed))
    changed[name] = damage(changed[name]).clone()
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{re.escape(name.split('.')[-1])} {told}"):
        export(ExportConfig(trained, tmp_path / "out", **{layout: True}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{}, {"llm_only": True, "llama": True}])
def test_one_layout_at_a_time(tmp_path, flags):
    with pytest.raises(InputError, match="choose one"):
        ExportConfig(tmp_path, tmp_path / "out", **flags)
