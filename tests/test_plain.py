"""plain.py is the oracle: every fast way of train.py gives its losses and its weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import exact_weights, run_forks, short_run, train_in_process

import plain
from generate import Generator, Prompt
from records import read_meta
from runtime import read_jsonl
from tokenizer import load_tokenizer
from toy import write_world
from weights import load_model


def write_toy(folder, llm="internlm2"):
    write_world(folder, 32, 0, llm)
    exact_weights(folder / "model")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def oracle(toy):
    """Eight steps of eight pairs in the plain way: (weights, losses)."""
    cfg = plain.PlainConfig(model_dir=toy / "model", meta=toy / "meta.json", lr=1e-3)
    policy, losses = plain.train(cfg)
    return dict(policy.named_parameters()), losses


@pytest.fixture(scope="module")
def fast(toy):
    """The same eight steps for train.py."""
    flags = {"max_steps": 8, "pack_tokens": 900, "save_every": 200}
    return short_run(toy, reference_cache=toy / "reference", **flags)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, {}),
        (1, {"reference": "online", "pack_tokens": 512}),
        (2, {"reference": "online", "recompute": "selective"}),
        (1, {"share_prefix": False, "share_images": False, "head_rows": 0, "recompute": "off"}),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else " ".join(x) or "defaults",
)
def test_eight_steps_end_where_the_plain_way_ends(oracle, fast, tmp_path, processes, flags):
    weights, losses = oracle
    cfg = replace(fast, out_dir=tmp_path / "run", **flags)
    if processes == 1:
        train_in_process(cfg)
    else:
        run_forks(processes, train_in_process, cfg)
    same_losses(cfg, losses)
    same_weights(cfg, weights)


@pytest.mark.parametrize(
    ("kinds", "max_grad_norm"),
    [(["text"], 1.0), (["text", "steps"], 1.0), (["text"], 0.0)],  # 0: not clipped
    ids=["text", "text-steps", "text-not-clipped"],
)
def test_steps_of_text_alone_are_those_of_the_plain_way(toy, fast, tmp_path, kinds, max_grad_norm):
    """Weight decay and momentum move the ViT in a step without an image, too."""
    lines = [(toy / f"toy_{kind}.jsonl").read_text().splitlines(keepends=True) for kind in kinds]
    meta = {}
    for kind, part in zip(kinds, lines):
        (tmp_path / f"{kind}.jsonl").write_text("".join((part * 8)[:8]))
        meta[kind] = {"annotation": f"{kind}.jsonl", "root": str(toy / "images")}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    flags = {"model_dir": toy / "model", "meta": tmp_path / "meta.json", "batch_size": 2}
    flags["max_grad_norm"] = max_grad_norm
    policy, losses = plain.train(plain.PlainConfig(**flags, lr=1e-3, steps=4, seed=1))
    cfg = replace(fast, **flags, max_steps=4, seed=1, out_dir=tmp_path / "run")
    train_in_process(cfg)
    same_losses(cfg, losses)
    same_weights(cfg, dict(policy.named_parameters()))


def same_losses(cfg, losses):
    metrics = [row for _, row in read_jsonl(cfg.out_dir / "metrics.jsonl")]
    assert [row["loss"] for row in metrics] == pytest.approx(losses, abs=1e-5)


def same_weights(cfg, weights):
    for name, trained in load_model(cfg.out_dir / "model").named_parameters():
        expected = weights[name]
        if name.endswith("attn.qkv.bias"):
            # softmax loses a key's bias: its gradient is rounding alone, which Adam scales up
            trained, expected = (torch.cat(x.chunk(3)[::2]) for x in (trained, expected))
        if name.endswith("wqkv.bias"):  # the decoder's likewise: of each head's q, q, k, v
            trained, expected = (x.view(2, 4, -1)[:, [0, 1, 3]] for x in (trained, expected))
        torch.testing.assert_close(trained, expected, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("llm", ["qwen2", "qwen3"])
def test_every_decoder_trains_as_in_the_plain_way_and_resumes(fast, tmp_path, llm):
    toy = write_toy(tmp_path, llm)
    flags = {"model_dir": toy / "model", "meta": toy / "meta.json"}
    policy, losses = plain.train(plain.PlainConfig(**flags, lr=1e-3, steps=4))
    cfg = replace(fast, **flags, max_steps=4, save_every=2, reference_cache=toy / "reference")
    alone = replace(cfg, out_dir=toy / "alone")
    train_in_process(alone)
    shutil.rmtree(alone.out_dir / "checkpoints/step-00000004")
    train_in_process(alone)  # goes on after step 2
    pair = replace(cfg, out_dir=toy / "pair")
    run_forks(2, train_in_process, pair)
    for run in (alone, pair):
        same_losses(run, losses)
        same_weights(run, dict(policy.named_parameters()))


@pytest.mark.parametrize("image_context_id", [3, None])
def test_the_plain_answer_never_holds_an_image_token(image_context_id):
    """A random model may find it the likeliest, and its rows are the image's."""

    def model(ids, tiles):
        return torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0]).expand(1, ids.shape[1], 5).clone()

    model.image_context_id = image_context_id
    answer = plain.greedy_ids(model, None, [1, 3], stop=2, max_new_tokens=3)
    assert answer == [4 if image_context_id else 3] * 3


def test_greedy_answers_are_those_of_calling_the_model_again_and_again(trained):
    folder = trained / "base" / "model"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for data_set in read_meta(trained / "meta.json", model.config.max_tiles):
        record = data_set[0]
        tiles, ids = plain.read_prompt(record, model, tokenizer)
        expected = plain.greedy_ids(model, tiles, ids, tokenizer.im_end_id, 24)
        prompt = Prompt("q", record.question, record.images, max_tiles=record.max_tiles)
        [sample] = Generator(model, tokenizer, max_new_tokens=24).run([prompt])
        assert list(sample.ids) == expected, data_set.name
