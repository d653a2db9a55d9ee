"""Qwen2 and Qwen3 decoders against transformers' numbers (fp32, CPU), and the shapes of releases.

The micro folders are in the repository, the tiny ones with the real vocabulary in GOLDEN.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import OURS, folder_from_environment
from safetensors.torch import load_file
from test_model import decode_all

from config import load_config, parse_config, recipe
from layouts import OFFICIAL_QWEN, split_stored, stored_pieces
from losses import token_logps
from model import InternVL, causal_attention
from runtime import InputError
from tokenizer import load_tokenizer
from tools.plan import RELEASES, named_config
from vision import IMAGENET_MEAN, IMAGENET_STD
from weights import load_model

ABS = {"atol": 1e-4, "rtol": 0}


class Golden:
    """A golden model and its cases; expected tensors are golden["case/name"]."""

    def __init__(self, folder):
        self.facts = json.loads((folder / "cases.json").read_text())
        self.tensors = load_file(folder / "cases.safetensors")
        self.model = load_model(folder / "checkpoint")
        self.model.image_context_id = self.facts["image_context_token_id"]
        self.config = self.model.config
        if "tiles_uint8" in self.tensors:
            pixels = self.tensors["tiles_uint8"].float() / 255
            mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
            self.tiles = (pixels - mean[:, None, None]) / std[:, None, None]
        else:
            self.tiles = self.tensors["c_tiles_thumb/pixel_values"]

    def __getitem__(self, name):
        return self.tensors[name]

    def tiles_of(self, case):
        tiles = self.facts["cases"][case].get("tiles")
        if tiles is None:
            return None if case not in ("c_tiles_thumb", "m_loss") else self.tiles
        return self.tiles[tiles]


@pytest.fixture(scope="module", params=["qwen2-micro", "qwen3-micro", "qwen2-tiny", "qwen3-tiny"])
def golden(request):
    if request.param.endswith("micro"):
        return Golden(OURS / request.param)
    return Golden(folder_from_environment("GOLDEN") / request.param)


def hidden_of(model, ids, tiles=None):
    """Output of the final norm."""
    return model(ids, tiles, head=lambda hidden, weight: hidden)


def compare(golden, case, logits):
    """All that the golden file keeps of these logits (b s vocab)."""
    columns = golden.tensors.get("logits_columns")
    for name, value in {
        "logits_last4": lambda: logits[:, -4:],
        "logits_cols": lambda: logits[..., columns],
        "logits_cols_last16": lambda: logits[:, -16:, columns],
        "logits_lse": lambda: logits.logsumexp(-1),
        "logits_max": lambda: logits.max(-1).values,
        "logits_argmax": lambda: logits.argmax(-1),
        "logits_argmax_last16": lambda: logits[:, -16:].argmax(-1),
    }.items():
        if f"{case}/{name}" in golden.tensors:
            expected = golden[f"{case}/{name}"].to(value().dtype)  # stored as int16
            torch.testing.assert_close(value(), expected, **ABS, msg=name)


@pytest.mark.parametrize(
    "case", ["a_text", "b_one_tile", "c_tiles_thumb", "d_two_images", "f_long_full"]
)
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_transformers(golden, case):
    ids, tiles = golden[f"{case}/input_ids"], golden.tiles_of(case)
    compare(golden, case, golden.model(ids, tiles))
    hidden = hidden_of(golden.model, ids, tiles)
    if case == "f_long_full":
        torch.testing.assert_close(hidden[:, -16:], golden[f"{case}/hidden_last16"], **ABS)
    else:
        torch.testing.assert_close(hidden, golden[f"{case}/hidden"], **ABS)


@torch.no_grad()
def test_cached_steps_past_the_limit_follow_the_cached_rule(golden):
    facts, ids = golden.facts["cases"]["f_long_cached"], golden["f_long_full/input_ids"]
    start, end = facts["prefill"], facts["prefill"] + facts["steps"]
    logits = decode_all(golden.model, ids[:, :end], start)
    compare(golden, "f_long_cached", logits)


@pytest.mark.parametrize("case", ["e_right_pad", "e_left_pad"])
@torch.no_grad()
def test_rows_of_a_padded_batch_equal_each_row_alone(golden, case):
    if f"{case}/input_ids" not in golden.tensors:
        pytest.skip("the micro folders have no padded batch")
    mask, used = golden[f"{case}/attention_mask"].bool(), 0
    for row, ids in enumerate(golden[f"{case}/input_ids"]):
        ids = ids[mask[row]][None]
        count = int((ids == golden.model.image_context_id).sum()) // 4
        tiles = golden.tiles_of(case)[used : used + count] if count else None
        used += count
        logits = golden.model(ids, tiles)[0]
        expected = golden[f"{case}/logits_cols"][row, mask[row]]
        torch.testing.assert_close(logits[:, golden["logits_columns"]], expected, **ABS)
    assert used == 3


@pytest.mark.parametrize("case", ["g_chat_text", "g_chat_image", "g_eos"])
@torch.no_grad()
def test_greedy_ids_are_exact(golden, case):
    facts, tiles = golden.facts["cases"][case], golden.tiles_of(case)
    [expected], stop = facts["output_ids"], facts["eos_token_id"]
    ids, out = golden[f"{case}/prompt_ids"], []
    while len(out) < len(expected):
        last = golden.model(ids, tiles, head=lambda hidden, weight: hidden[:, -1] @ weight.T)
        next_id = last.argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_id], dim=1)
        out.append(int(next_id))
    assert out == expected
    if isinstance(stop, list):
        assert out[-1] in stop


@torch.no_grad()
def test_vision_tower_projector_and_epsilons_hold(golden):
    expected = golden["h_vision/last_hidden_state"]
    hidden = golden.model.vision_model(golden.tiles)[: len(expected)]
    torch.testing.assert_close(hidden, expected, **ABS)
    features = golden.model.image_features(golden.tiles)
    torch.testing.assert_close(features, golden["h_vision/features"], **ABS)
    projected = golden.model.projector(golden["n_eps/mlp1_input"])
    torch.testing.assert_close(projected, golden["n_eps/mlp1_output"], **ABS)
    x = golden["n_eps/llm_embeds"]
    x = golden.model.language_model.model(x, torch.arange(x.shape[1])[None], causal_attention)
    torch.testing.assert_close(x, golden["n_eps/llm_hidden"], **ABS)


def test_loss_and_gradients_are_those_of_transformers(golden):
    model, labels = golden.model, golden["m_loss/labels"]
    model.zero_grad()
    logps = token_logps(model(golden["m_loss/input_ids"], golden.tiles_of("m_loss")), labels)
    loss = -logps.sum() / (labels[:, 1:] != -100).sum()
    loss.backward()
    torch.testing.assert_close(loss, golden["m_loss/loss"][0], atol=1e-5, rtol=0)
    grads, pieces = {}, stored_pieces(model, OFFICIAL_QWEN)
    for name, p in model.named_parameters():
        grads |= split_stored(p.grad, pieces[name])
    prefix, rows = "m_loss/grad.", golden["m_loss/grad_rows"]
    expected = {k.removeprefix(prefix): t for k, t in golden.tensors.items() if prefix in k}
    assert {name.removesuffix("[grad_rows]") for name in expected} == set(grads)
    for name, grad in expected.items():
        ours = grads[name.removesuffix("[grad_rows]")]
        ours = ours[rows] if name.endswith("[grad_rows]") else ours
        bound = 1e-4 * max(1, grad.abs().max().item())
        torch.testing.assert_close(ours, grad, atol=bound, rtol=0, msg=name)
    embedding = model.language_model.model.tok_embeddings.weight.grad
    assert embedding[2].any(), "token 2 is an ordinary piece of Qwen's, no padding"
    assert not embedding[model.image_context_id].any()
    model.zero_grad()


@torch.no_grad()
def test_a_tied_model_has_its_embedding_as_its_head(golden):
    if "tied/logits_last4" not in golden.tensors:
        pytest.skip("only the micro folders have a tied case")
    config = replace(golden.config, llm=replace(golden.config.llm, tied=True))
    tied = InternVL(config, golden.model.image_context_id)
    weights = golden.model.state_dict()
    del weights["language_model.output.weight"]
    tied.eval().load_state_dict(weights)
    compare(golden, "tied", tied(golden["c_tiles_thumb/input_ids"], golden.tiles))


# --------------------------------------------------------------------------- releases


# spec: parameters of the language model and of the projector; InternViT-300M has 304,012,288
PARAMETERS = {
    "2-1b": (629_663_872, 4_482_816),
    "2-2b": (1_889_146_880, 12_595_200),
    "2-8b": (7_737_782_272, 33_570_816),
    "2.5-1b": (629_697_920, 4_482_816),
    "2.5-4b": (3_396_030_464, 12_595_200),
    "3-1b": (629_697_920, 4_482_816),
    "3-2b": (1_776_283_136, 8_662_016),
    "3-8b": (7_612_820_992, 27_540_480),
    "3-14b": (14_766_040_064, 47_204_352),
    "3.5-1b": (751_632_384, 5_253_120),
    "3.5-2b": (2_031_739_904, 12_595_200),
    "3.5-4b": (4_411_424_256, 17_052_672),
    "3.5-8b": (8_190_735_360, 33_570_816),
    "3.5-14b": (14_768_307_200, 47_204_352),
}


def on_meta(size):
    with torch.device("meta"):
        return InternVL(named_config(size), None)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", PARAMETERS)
def test_named_sizes_have_the_parameters_of_the_releases(size):
    model = on_meta(size)
    assert (parameters(model.language_model), parameters(model.projector)) == PARAMETERS[size]
    assert parameters(model.vision_model) == 304_012_288


def test_stored_names_and_shapes_of_a_release_are_the_official_ones():
    for size, bias in (("3-1b", True), ("3.5-4b", False)):
        model = on_meta(size)
        stored = stored_pieces(model, OFFICIAL_QWEN)
        rows = {piece.name: piece.stop for parts in stored.values() for piece in parts}
        layer, llm = "language_model.model.layers.23.", model.config.llm
        heads, groups, d = llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim
        assert rows[f"{layer}self_attn.q_proj.weight"] == heads * d
        assert rows[f"{layer}self_attn.k_proj.weight"] == groups * d
        assert (f"{layer}self_attn.v_proj.bias" in rows) == bias
        assert (f"{layer}self_attn.q_norm.weight" in rows) != bias
        assert rows[f"{layer}self_attn.o_proj.weight"] == llm.hidden_size
        assert rows[f"{layer}mlp.gate_proj.weight"] == llm.intermediate_size
        assert rows["language_model.lm_head.weight"] == llm.vocab_size
        wo = model.get_parameter("language_model.model.layers.23.attention.wo.weight")
        assert list(wo.shape) == [llm.hidden_size, heads * d]


def test_a_size_without_a_generation_is_the_first_that_has_it():
    for size, name in {"8b": "2-8b", "1b": "2-1b", "4b": "2.5-4b", "14b": "3-14b"}.items():
        assert named_config(size) == named_config(name)
    assert named_config("38b").vision.hidden_size == 3200, "InternViT-6B"
    with pytest.raises(InputError, match="unknown size '9b'; known: 2-1b, 2-2b"):
        named_config("9b")


@pytest.mark.parametrize(
    ("size", "lr", "max_length", "drop_path"),
    [
        ("2-1b", 5e-6, 6144, 0.1),
        ("2-8b", 5e-6, 6144, 0.1),
        ("2.5-4b", 1e-6, 8192, 0.1),
        ("2.5-38b", 1e-6, 8192, 0.4),
        ("3-8b", 2e-7, 12288, 0.1),
        ("3-38b", 2e-7, 8192, 0.4),
        ("3.5-4b", 2e-7, 16384, 0.0),
        ("3.5-8b", 2e-7, 16384, 0.1),
        ("3.5-38b", 2e-7, 16384, 0.4),
    ],
)
def test_the_recipe_is_that_of_the_generation_and_size(size, lr, max_length, drop_path):
    values = recipe(named_config(size))
    assert (values.lr, values.max_length, values.drop_path) == (lr, max_length, drop_path)


def test_every_named_size_has_a_recipe_and_whole_heads():
    for name in RELEASES:
        config = named_config(name)
        assert recipe(config).source and config.max_tiles == 12


# --------------------------------------------------------------------------- config.json


def qwen_config(name="qwen2-micro"):
    return json.loads((OURS / name / "checkpoint/config.json").read_text())


def in_transformers_layout(raw, version):
    """The -hf twin of an official config.json, as transformers 4 or 5 writes it."""
    llm, vision = dict(raw["llm_config"]), dict(raw["vision_config"])
    rope = {"rope_theta": llm.pop("rope_theta"), "rope_type": "default"}
    scaling = llm.pop("rope_scaling", None) or {}
    if version == 5:
        llm["rope_parameters"] = rope | scaling
    else:
        llm |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling or None}
    size, patch = vision.pop("image_size"), vision.pop("patch_size")
    vision |= {"image_size": [size, size], "patch_size": [patch, patch], "model_type": "x"}
    vision["attention_bias"] = vision.pop("qkv_bias")
    vision["use_qk_norm"] = vision.pop("qk_normalization")
    del vision["drop_path_rate"], llm["architectures"]
    return {
        "model_type": "internvl",
        "image_token_id" if version == 5 else "image_token_index": 344,
        "text_config": llm,
        "vision_config": vision,
    }


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ["qwen2-micro", "qwen3-micro"])
def test_both_layouts_say_the_same_of_a_model(name, version):
    raw = qwen_config(name)
    official, hf = parse_config(raw), parse_config(in_transformers_layout(raw, version))
    vision = replace(official.vision, drop_path_rate=0.0)
    assert replace(hf, image_token_id=None) == replace(official, vision=vision)
    assert hf.image_token_id == 344


@pytest.mark.parametrize("sides", [[], [14], [14, 28], [14, 14, 14], ["14"]])
def test_sides_of_the_hf_layout_are_two_equal_numbers(sides):
    raw = in_transformers_layout(qwen_config(), 5)
    raw["vision_config"]["patch_size"] = sides
    with pytest.raises(InputError, match="'patch_size' must be int"):
        parse_config(raw)


def test_tiles_of_the_hf_layout_are_those_of_its_processor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(in_transformers_layout(qwen_config(), 5)))
    assert load_config(tmp_path).max_tiles == 12
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 6}')
    assert load_config(tmp_path).max_tiles == 6
    processor = tmp_path / "processor_config.json"
    processor.write_text('{"image_seq_length": 256}')  # as transformers 4 writes it
    assert load_config(tmp_path).max_tiles == 6
    processor.write_text('{"image_processor": {"max_patches": 4, "min_patches": 1}}')  # 5
    assert load_config(tmp_path).max_tiles == 4
    processor.write_text('{"image_processor": {"min_patches": 2}}')
    with pytest.raises(InputError, match="min_dynamic_patch is 2; this code implements 1"):
        load_config(tmp_path)


def test_features_with_the_class_token_are_refused():
    raw = in_transformers_layout(qwen_config(), 5) | {"vision_feature_select_strategy": "full"}
    with pytest.raises(InputError, match="vision_feature_select_strategy is 'full'"):
        parse_config(raw)


def test_template_and_system_message_of_each_generation_are_read():
    assert parse_config(qwen_config()).system_message is None  # null in InternVL3
    assert parse_config(qwen_config() | {"system_message": ""}).system_message == ""
    assert parse_config(qwen_config() | {"template": "Hermes-2"}).generation == "2"


def test_generations_are_told_apart_by_their_configs():
    three = qwen_config()
    assert parse_config(three).generation == "3"
    three["llm_config"]["eos_token_id"] = 151645  # an InternVL3 that somebody mended
    assert parse_config(three).generation == "3"
    half = {key: value for key, value in three.items() if key != "system_message"}
    assert parse_config(half).generation == "2.5"
    assert parse_config(in_transformers_layout(half, 5)).generation == "3", "in doubt small steps"
    assert parse_config(qwen_config("qwen3-micro")).generation == "3.5"


@pytest.mark.parametrize("level", ["top", "llm"])
def test_a_tied_head_is_declared_at_either_level(level):
    raw = qwen_config()
    (raw if level == "top" else raw["llm_config"])["tie_word_embeddings"] = True
    assert parse_config(raw).llm.tied


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers():
    tokenizer = load_tokenizer(OURS / "qwen3-micro/checkpoint")
    tokenizer.check_vocabulary(355)
    with pytest.raises(InputError, match="tokens up to id 354, but the model's vocab_size is 350"):
        tokenizer.check_vocabulary(350)
