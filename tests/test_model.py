"""InternVL2 against the official implementation's numbers (fp32, CPU)."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import OURS
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention

from cache import KVCache, Room
from config import LLMConfig, parse_config
from losses import row_logps, token_logps
from model import (
    InternVL,
    TreeAttention,
    causal_attention,
    pixel_shuffle,
    rotary,
)
from runtime import InputError
from weights import load_model

MICRO = OURS / "internvl2-micro"
ABS = {"atol": 1e-4, "rtol": 0}


def official(name):
    return name.replace("projector.", "mlp1.")


@pytest.fixture(scope="module")
def micro():
    model = load_model(MICRO / "checkpoint")
    model.image_context_id = 300
    return model, load_file(MICRO / "cases.safetensors")


@pytest.fixture(scope="module")
def tiny(golden_tiny):
    return load_model(golden_tiny / "checkpoint"), load_file(golden_tiny / "cases.safetensors")


@pytest.mark.parametrize("case", ["text", "one_tile", "two_images", "beyond_limit"])
@torch.no_grad()
def test_logits_equal_the_official_ones(micro, case):
    model, golden = micro
    logits = model(golden[f"{case}/input_ids"], golden.get(f"{case}/tiles"))
    torch.testing.assert_close(logits, golden[f"{case}/logits"], **ABS)


@torch.no_grad()
def test_vision_features_equal_the_official_ones(micro):
    model, golden = micro
    tiles = golden["vision/tiles"]
    hidden = model.vision_model(tiles)
    torch.testing.assert_close(hidden, golden["vision/last_hidden_state"], **ABS)
    shuffled = pixel_shuffle(hidden[:, 1:]).unflatten(1, (2, 2))
    torch.testing.assert_close(shuffled, golden["vision/pixel_shuffled"], **ABS)
    torch.testing.assert_close(model.image_features(tiles), golden["vision/features"], **ABS)
    other = InternVL(replace(model.config, select_layer=-2), 300)
    other.load_state_dict(model.state_dict())
    expected = golden["vision/features_select_layer_minus_2"]
    torch.testing.assert_close(other.image_features(tiles), expected, **ABS)


@torch.no_grad()
def test_norm_epsilons_are_those_of_each_part(micro):
    model, golden = micro
    check_epsilons(model, golden, "eps", "projector_input", "projector_output")


def check_epsilons(model, golden, case, projector_in, projector_out):
    """Inputs so small that each wrong epsilon shows."""
    projected = model.projector(golden[f"{case}/{projector_in}"])
    torch.testing.assert_close(projected, golden[f"{case}/{projector_out}"], **ABS)
    x = golden[f"{case}/vit_embeds"]
    for layer in model.vision_model.encoder.layers:
        x = layer(x)
    torch.testing.assert_close(x, golden[f"{case}/vit_output"], **ABS)
    x = golden[f"{case}/llm_embeds"]
    positions = torch.arange(x.shape[1])[None]
    from_embeds = model.language_model.model(x, positions, causal_attention)
    torch.testing.assert_close(from_embeds, golden[f"{case}/llm_hidden"], **ABS)


def test_loss_and_every_gradient_equal_the_official_ones(micro):
    model, golden = micro
    model.zero_grad()
    logits = model(golden["loss/input_ids"], golden["loss/tiles"])
    labels = golden["loss/labels"]
    loss = -token_logps(logits, labels).sum() / (labels[:, 1:] != -100).sum()
    loss.backward()
    torch.testing.assert_close(loss, golden["loss/loss"][0], atol=1e-5, rtol=0)
    expected = {k[len("loss/grad.") :]: v for k, v in golden.items() if k.startswith("loss/grad.")}
    ours = {official(n): p.grad for n, p in model.named_parameters()}
    assert set(expected) == set(ours)
    for name, grad in expected.items():
        torch.testing.assert_close(
            ours[name], grad, atol=1e-4 * max(1, grad.abs().max().item()), rtol=0, msg=name
        )
    embedding = model.language_model.model.tok_embeddings.weight.grad
    assert not embedding[300].any(), "the <IMG_CONTEXT> row is replaced: no gradient"
    model.zero_grad()


def test_the_padding_row_of_the_embedding_is_read_and_never_moved(micro):
    model, pad = micro[0], micro[0].config.llm.pad_token_id
    model(torch.tensor([[5, pad, 7]])).square().sum().backward()
    moved = model.language_model.model.tok_embeddings.weight.grad.any(1).nonzero()
    assert moved.flatten().tolist() == [5, 7]
    model.zero_grad()


def decode_all(model, ids, prefilled):
    """Logits of the tokens after the first `prefilled`, each in a step of its own."""
    cache, prompt, answer = (
        KVCache(model.config.llm, 9, "cpu", torch.float32),
        Room(),
        Room(high=True),
    )
    assert cache.enlarge(prompt, prefilled)
    model(ids[:, :prefilled], attend=cache.prefill([prompt], [prefilled]))
    steps = []
    for n in range(prefilled, ids.shape[1]):
        assert cache.enlarge(answer, n + 1 - prefilled)
        token, position, attend = cache.decode(cache.plan([(prompt, answer)], ids[0, n : n + 1]))
        steps.append(model(token[:, None], positions=position[:, None], attend=attend))
    return torch.cat(steps, dim=1)


@torch.no_grad()
def test_cached_decoding_past_the_limit_keeps_the_rotation_of_cached_keys(micro):
    model, golden = micro
    ids = golden["beyond_limit/input_ids"]
    logits = decode_all(model, ids[:, :106], 90)
    torch.testing.assert_close(logits, golden["beyond_limit_cached/logits"], **ABS)


def test_dynamic_ntk_stretches_the_base_by_the_official_rule():
    sizes = (10, 32, 8, 1, 2, 1, 16)
    config = LLMConfig("internlm2", *sizes, max_position_embeddings=100, rope_factor=2.0)
    plain, _ = rotary(config, torch.arange(100)[None])
    longer, _ = rotary(config, torch.arange(150)[None])
    assert not torch.equal(plain, longer[:, :100])
    base = config.rope_theta * (2 * 150 / 100 - 1) ** (16 / 14)
    inverse = 1.0 / base ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(longer[0, 2, :8], (2 * inverse).cos())


# --------------------------------------------------------------------------- the large golden set


def compare(golden, case, model, logits, kept=None):
    """Chosen columns, log-sum-exp, arg max and max of each kept position."""
    kept = slice(None) if kept is None else kept
    for name, value in {
        "logits_cols": logits[..., golden["logits_columns"]],
        "logits_lse": logits.logsumexp(-1),
        "logits_argmax": logits.argmax(-1),
        "logits_max": logits.max(-1).values,
    }.items():
        if f"{case}/{name}" in golden:
            expected = golden[f"{case}/{name}"]
            torch.testing.assert_close(value[kept], expected[kept], **ABS, msg=f"{case} {name}")


@pytest.mark.parametrize("case", ["a_text", "b_one_tile", "c_tiles_thumb", "d_two_images"])
@torch.no_grad()
def test_prompts_with_the_real_vocabulary_get_the_official_logits(tiny, case):
    model, golden = tiny
    compare(
        golden, case, model, model(golden[f"{case}/input_ids"], golden.get(f"{case}/pixel_values"))
    )


@pytest.mark.parametrize("case", ["e_right_pad", "e_left_pad"])
@torch.no_grad()
def test_rows_of_a_padded_official_batch_equal_each_row_alone(tiny, case):
    model, golden = tiny
    tiles, flags = golden["e_batch/pixel_values"], golden["e_batch/image_flags"].flatten().bool()
    used, first = tiles[flags], 0
    ids, mask = golden[f"{case}/input_ids"], golden[f"{case}/attention_mask"].bool()
    for row in range(3):
        alone = ids[row, mask[row]][None]
        count = int((alone == model.image_context_id).sum()) // 4
        logits = model(alone, used[first : first + count] if count else None)[0]
        first += count
        for name, value in (
            ("logits_lse", logits.logsumexp(-1)),
            ("logits_cols", logits[:, golden["logits_columns"]]),
        ):
            expected = golden[f"{case}/{name}"][row, mask[row]]
            torch.testing.assert_close(value, expected, **ABS)
    assert first == len(used)


@torch.no_grad()
def test_long_prompts_follow_the_full_and_the_cached_rule(tiny):
    model, golden = tiny
    ids = golden["f_long_full/input_ids"]
    logits = model(ids)
    torch.testing.assert_close(logits.logsumexp(-1), golden["f_long_full/logits_lse"], **ABS)
    last = logits[:, -16:, golden["logits_columns"]]
    torch.testing.assert_close(last, golden["f_long_full/logits_cols_last16"], **ABS)
    compare(golden, "f_long_full2", model, model(ids[:, :274])[:, -24:])
    compare(golden, "f_long_cached", model, decode_all(model, ids[:, :274], 250))


@torch.no_grad()
def test_each_layer_of_the_vision_tower_equals_the_official_one(tiny):
    model, golden = tiny
    tiles = golden["c_tiles_thumb/pixel_values"]
    torch.testing.assert_close(
        model.vision_model(tiles), golden["h_vision/last_hidden_state"], **ABS
    )
    for n in range(3):
        expected = golden[f"h_vision/hidden_states.{n}"]
        torch.testing.assert_close(model.vision_model(tiles, n)[: len(expected)], expected, **ABS)
    torch.testing.assert_close(model.image_features(tiles), golden["h_vision/features"], **ABS)
    for layer in (-2, 0, 1):
        other = InternVL(replace(model.config, select_layer=layer), 0)
        other.load_state_dict(model.state_dict())
        expected = golden[f"h_vision/features_select_layer_{layer}"]
        torch.testing.assert_close(other.image_features(tiles), expected, **ABS)
    shuffled = pixel_shuffle(model.vision_model(tiles)[:, 1:]).unflatten(1, (2, 2))
    torch.testing.assert_close(shuffled, golden["h_vision/pixel_shuffle_v2"], **ABS)
    # version 1, which no released InternVL2 uses, has the same vectors transposed
    transposed = golden["h_vision/pixel_shuffle_v1"].transpose(1, 2)
    torch.testing.assert_close(shuffled[:1], transposed, **ABS)


@torch.no_grad()
def test_epsilons_hold_in_the_large_golden_set(tiny):
    check_epsilons(*tiny, "n_eps", "mlp1_input", "mlp1_output")


def test_golden_loss_weighted_loss_and_gradients_are_met(tiny):
    model, golden = tiny
    model.zero_grad()
    labels = golden["m_loss/labels"]
    logits = model(golden["m_loss/input_ids"], golden["c_tiles_thumb/pixel_values"])
    per_token = -token_logps(logits, labels)
    kept = labels[:, 1:] != -100
    loss = per_token.sum() / kept.sum()
    torch.testing.assert_close(loss, golden["m_loss/loss"][0], atol=1e-5, rtol=0)
    weight = golden["m_loss/loss_weight"][:, 1:] * kept
    weighted = (per_token * weight).sum() / weight.sum()
    torch.testing.assert_close(weighted, golden["m_loss/loss_weighted"][0], atol=1e-5, rtol=0)
    loss.backward()
    grads = {official(n): p.grad for n, p in model.named_parameters()}
    for key, expected in golden.items():
        if key.startswith("m_loss/grad."):
            bound = 1e-4 * max(1, expected.abs().max().item())
            torch.testing.assert_close(
                grads[key[len("m_loss/grad.") :]], expected, atol=bound, rtol=0, msg=key
            )
    head, embedding = grads["language_model.output.weight"], "language_model.model.tok_embeddings"
    torch.testing.assert_close(head.norm(), golden["m_loss/grad_norm.output"][0], **ABS)
    torch.testing.assert_close(
        grads[f"{embedding}.weight"].norm(), golden["m_loss/grad_norm.tok_embeddings"][0], **ABS
    )
    torch.testing.assert_close(head[92542], golden["m_loss/grad_row.output_im_end"], **ABS)
    assert not grads[f"{embedding}.weight"][[2, 92546]].any(), "pad and <IMG_CONTEXT> rows"
    model.zero_grad()


# --------------------------------------------------------------------------- shapes of the release


@pytest.mark.parametrize(("size", "tensors"), [("internvl2-8b", 573), ("internvl2-2b", 517)])
def test_names_and_shapes_on_the_meta_device_are_the_released_ones(size, tensors):
    golden = json.loads((OURS / size / "shapes.json").read_text())
    config = parse_config(json.loads((OURS / size / "config.json").read_text()))
    with torch.device("meta"):
        model = InternVL(config, 92546)
    ours = {official(n): list(p.shape) for n, p in model.named_parameters()}
    assert ours == golden["shapes"]
    assert len(ours) == tensors
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
    assert not list(model.buffers())


# --------------------------------------------------------------------------- configuration


def raw_config():
    return json.loads((OURS / "internvl2-8b" / "config.json").read_text())


def without(part, key):
    return lambda c: (c[part] if part else c).pop(key)


def with_llm(**values):
    return lambda c: c["llm_config"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_llm(architectures=["Phi3ForCausalLM"]), "Phi3.*InternVL2-4B.*InternVL2_5-4B"),
        (with_llm(architectures=["LlamaForCausalLM"]), "Llama.*InternVL2-40B.*InternVL2_5-38B"),
        (with_llm(architectures=["InternLM3ForCausalLM"]), "InternLM3.*9B.*InternVL3-8B"),
        (with_llm(architectures=["Qwen3MoeForCausalLM"]), "Qwen3Moe.*30B-A3B.*InternVL3_5-38B"),
        (with_llm(architectures=["GptOssForCausalLM"]), "GptOss.*20B.*InternVL3_5-14B"),
        (with_llm(architectures=7), "language model is \\?"),
        (without("llm_config", "hidden_size"), "llm_config: no 'hidden_size'"),
        (without("vision_config", "patch_size"), "vision_config: no 'patch_size'"),
        (without("", "vision_config"), "no 'vision_config'"),
        (without("", "template"), "no 'template'"),
        (lambda c: c.update(template="phi3-chat"), "'template' must be .*Hermes-2.* 'phi3-chat'"),
        (lambda c: c.update(ps_version="v1"), "ps_version is 'v1'"),
        (lambda c: c["llm_config"].update(hidden_act="gelu"), "hidden_act is 'gelu'; .* 'silu'"),
        (lambda c: c["vision_config"].update(hidden_act="relu"), "vision_config: .*hidden_act"),
        (lambda c: c.update(projector_hidden_act="relu"), "projector_hidden_act is 'relu'"),
        (without("", "ps_version"), "ps_version is 'v1'"),  # the official class's default
        (without("", "use_thumbnail"), "use_thumbnail is False"),
        (lambda c: c.update(min_dynamic_patch=3), "min_dynamic_patch is 3"),
        (lambda c: c.update(max_dynamic_patch=3000), "max_dynamic_patch must be >= 1 and <= 128"),
        (lambda c: c.update(select_layer=-30), "no layer select_layer -30"),
        (lambda c: c.update(downsample_ratio=0.25), "downsample_ratio is 0.25"),
        (lambda c: c.update(force_image_size=450), "450 or image_size 448 pixels"),
        (lambda c: c["vision_config"].update(image_size=13), "448 or image_size 13 pixels"),
        (with_llm(rope_scaling={"type": "dynamic"}), "'rope_factor' must be float"),
        (with_llm(rope_scaling={"type": "dynamic", "factor": -2.0}), "rope_factor must be >= 0"),
        (with_llm(rope_theta=0), "rope_theta must be >= 1, got 0"),
        (with_llm(rms_norm_eps=-1e-6), "rms_norm_eps must be >= 0"),
        (with_llm(max_position_embeddings=0), "max_position_embeddings must be >= 1"),
        (with_llm(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling is .*'linear'"),
        (with_llm(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling is .*'yarn'"),
        (with_llm(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (with_llm(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "disagree"),
        (with_llm(rope_parameters={"type": "dynamic", "factor": 3.0}), "disagree"),
        (with_llm(use_sliding_window=True), "use_sliding_window is True"),
        (with_llm(num_key_value_heads=3), "key heads must divide heads"),
        (with_llm(head_dim=7), "head_dim be even and at least 4"),
        (with_llm(head_dim=2), "head_dim be even and at least 4"),
        (with_llm(hidden_size=7), "head_dim be even and at least 4"),
        (with_llm(layer_types=["sliding_attention"]), "layer_types has sliding windows"),
        (with_llm(rope_theta=10**400), "'rope_theta' must be float, got 1000"),
        (lambda c: c.update(min_dynamic_patch="1"), "min_dynamic_patch is '1'"),
        (lambda c: c.update(internvl_generation="4"), "'generation' must be .*'3.5'.*, got '4'"),
        (with_llm(num_hidden_layers=100_000), "num_hidden_layers must be >= 1 and <= 1000"),
        (with_llm(vocab_size="92553"), "'vocab_size' must be int, got '92553'"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(change, message):
    config = raw_config()
    change(config)
    with pytest.raises(InputError, match=message):
        parse_config(config)


def test_unknown_keys_are_tolerated_and_absent_ones_get_the_class_defaults():
    config = raw_config() | {"some_future_key": 1}
    config["llm_config"] |= {"beam_search": True}
    for key in ("rms_norm_eps", "pad_token_id", "rope_scaling"):
        del config["llm_config"][key]
    del config["max_dynamic_patch"]
    for key in "qkv_bias qk_normalization norm_type layer_norm_eps drop_path_rate".split():
        config["vision_config"].pop(key, None)
    parsed = parse_config(config)
    vit = parsed.vision
    assert (vit.qkv_bias, vit.qk_normalization, vit.norm_type) == (False, True, "rms_norm")
    assert (vit.layer_norm_eps, vit.drop_path_rate) == (1e-6, 0.0)
    assert (parsed.llm.rms_norm_eps, parsed.llm.pad_token_id, parsed.llm.rope_factor) == (
        1e-6,
        2,
        0,
    )
    assert parsed.max_tiles == 6
    config["llm_config"]["architectures"] = ["Qwen3ForCausalLM"]
    parsed = parse_config(config).llm
    assert (parsed.head_dim, parsed.pad_token_id, parsed.architecture) == (128, None, "qwen3")


# --------------------------------------------------------------------------- packed trees


def test_the_mask_is_the_one_line_of_its_docstring():
    tree = torch.tensor([0] * 9 + [1] * 6)
    branch = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2] + [0, 0, 1, 1, 2, 2])
    dense = TreeAttention(tree, branch, flex=False)
    by_hand = [
        [
            k <= q and tree[k] == tree[q] and (branch[k] == 0 or branch[k] == branch[q])
            for k in range(15)
        ]
        for q in range(15)
    ]
    assert dense.segments[0][1].tolist() == [[bool(x) for x in row] for row in by_hand]


def trees_of(sizes):
    """tree and branch of packed trees with the given (trunk, branch, branch, ...) sizes."""
    tree = [n for n, parts in enumerate(sizes) for _ in range(sum(parts))]
    branch = [b for parts in sizes for b, size in enumerate(parts) for _ in range(size)]
    return torch.tensor(tree), torch.tensor(branch)


@pytest.mark.parametrize(
    "sizes",
    [
        [(1000, 300, 350)],
        [(5, 3, 4)] * 60,
        [(200, 128, 128), (384, 256, 30, 7)],
        [(256, 128, 128), (128, 256, 256)],
        [(3,)],
    ],
)
def test_no_visible_pair_lies_outside_the_block_mask(sizes):
    tree, branch = trees_of(sizes)
    s = len(tree)
    flex = TreeAttention(tree, branch, flex=True)
    [(_, dense)] = TreeAttention(tree, branch, flex=False, span=s).segments
    blocks = -(-s // 128)
    padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:s, :s] = dense
    cells = padded.view(blocks, 128, blocks, 128).transpose(1, 2)
    met, full = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    for counts, indices, out in (
        (flex.mask.kv_num_blocks, flex.mask.kv_indices, met),
        (flex.mask.full_kv_num_blocks, flex.mask.full_kv_indices, full),
    ):
        for q in range(blocks):
            out[q, indices[0, 0, q, : counts[0, 0, q]].long()] = True
    assert not (met & full).any()
    seen = cells.any((2, 3))
    assert not (seen & ~(met | full)).any(), "a visible pair would be lost"
    if all(size % 128 == 0 for parts in sizes for size in parts):
        assert torch.equal(met | full, seen), "blocks of two answers meet in vain"
    assert cells.all(3).all(2)[full].all(), "a full block hides something"


@pytest.mark.parametrize("span", [1, 60, 128])
def test_attention_by_segments_is_attention_under_the_one_mask(span):
    tree, branch = trees_of([(50, 25, 25), (30, 20, 10), (4,), (20, 60, 40, 50), (3, 2)])
    s, gradients = len(tree), []
    torch.manual_seed(0)
    qkv = [torch.randn(1, s, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    outs = []
    for size in (s, span):
        attend = TreeAttention(tree, branch, flex=False, span=size)
        assert (len(attend.segments) > 1) == (size < s)
        outs.append(attend(0, *qkv))
        gradients.append(torch.autograd.grad(outs[-1].sin().sum(), qkv))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_flex_attention_gives_the_dense_result():
    torch.manual_seed(0)
    tree = torch.tensor([0] * 100 + [1] * 60)
    branch = torch.tensor([0] * 50 + [1] * 25 + [2] * 25 + [0] * 30 + [1] * 20 + [2] * 10)
    q = torch.randn(1, 160, 4, 16)
    k, v = torch.randn(2, 1, 160, 2, 16)
    flex = TreeAttention(tree, branch, flex=True)(0, q, k, v)
    dense = TreeAttention(tree, branch, flex=False)(0, q, k, v)
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)


def test_image_tokens_and_tiles_must_agree(micro):
    model, golden = micro
    ids, tiles = golden["one_tile/input_ids"], golden["one_tile/tiles"]
    with pytest.raises(InputError, match="4 image tokens, its tiles fill 8"):
        model(ids, torch.cat([tiles, tiles]))
    with pytest.raises(InputError, match="4 image tokens, its tiles fill 0"):
        model(ids)
    with pytest.raises(InputError, match="0 image tokens, its tiles fill 4"):
        model(golden["text/input_ids"], tiles)
    with pytest.raises(InputError, match="set model.image_context_id first"):
        InternVL(model.config, None)(ids, tiles)


def test_head_scores_only_the_rows_it_is_given(micro):
    model, golden = micro
    ids = golden["text/input_ids"]

    def head(hidden, weight):
        return row_logps(hidden[0, :-1], weight, ids[0, 1:], chunk=7)

    expected = token_logps(model(ids), ids)[0]
    torch.testing.assert_close(model(ids, head=head), expected, atol=1e-5, rtol=0)


def test_short_packs_ask_for_the_training_kernel_of_flex_attention(monkeypatch):
    options = []

    def kernel(q, k, v, score_mod, mask, enable_gqa, kernel_options):
        options.append(kernel_options)
        return flex_attention(q, k, v, score_mod, mask, enable_gqa=enable_gqa)

    monkeypatch.setattr("model.flex_attention", kernel)
    for s in (2, 40, 127):
        tree, branch = torch.zeros(s, dtype=torch.long), (torch.arange(s) > s // 2).long()
        q, k = torch.randn(1, s, 4, 16), torch.randn(1, s, 2, 16)
        fast = TreeAttention(tree, branch, flex=True)(0, q, k, k)
        plain = TreeAttention(tree, branch, flex=False)(0, q, k, k)
        torch.testing.assert_close(fast, plain)
    assert options == [{"FORCE_USE_FLEX_ATTENTION": True}] * 3
