"""How far a reader goes: our calls from the command to the formula, from an image to logits."""

import sys
from types import FrameType

import pytest
import torch
from conftest import ROOT
from PIL import Image

import train
from toy import write_world
from vision import preprocess
from weights import load_model

OURS = {
    str(path) for folder in (".", "tools", "benchmarks") for path in (ROOT / folder).glob("*.py")
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    write_world(folder, 16, 0)
    return folder


def our_calls(frame: FrameType | None) -> list[str]:
    """Functions of this repository on the stack, outermost first; comprehensions do not count."""
    names = []
    while frame:
        code = frame.f_code
        if code.co_filename in OURS:
            names.append(code.co_name)
        frame = frame.f_back
    return [name for name in reversed(names) if not name.startswith("<")]


def watch(run, chosen) -> list[str]:
    """The deepest stack of ours at whose top `chosen(function name)` holds while `run` runs."""
    deepest: list[str] = []

    def look(frame, event, argument):
        if event == "call" and chosen(frame.f_code.co_name):
            calls = our_calls(frame)
            if len(calls) > len(deepest):
                deepest[:] = calls

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return deepest


def test_the_formula_of_the_loss_is_four_calls_from_main(toy, tmp_path, monkeypatch):
    flags = f"--config {toy / 'train.json'} --out_dir {tmp_path} --max_steps 2".split()
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    calls = watch(train.main, lambda name: name == "dpo")
    print(" -> ".join(calls))
    assert calls[0] == "main" and len(calls) - 1 <= 4


def test_from_an_image_to_logits_there_are_at_most_eight_calls(toy):
    model = load_model(toy / "model")
    image = Image.open(next((toy / "images").glob("*.png")))

    def see():
        tiles = preprocess(image, 12, model.config.tile_size)
        slots = len(tiles) * model.config.tokens_per_tile
        model(torch.full((1, slots), model.image_context_id), tiles)

    calls = watch(see, lambda name: True)
    print(" -> ".join(calls))
    assert len(calls) <= 8
