"""Folders that tests read.  GOLDEN and BENCH name folders kept outside the repository."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from runtime import process_group, read_json, read_jsonl
from toy import write_world
from train import TrainConfig, train

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these numbers are a CPU's; a GPU has `make gpu`
# one thread a process, as torchrun sets: processes of these tests share the cores, and how matrix
# libraries split a product over threads can change its last bits, which resuming tests compare
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
OURS = Path(__file__).parent / "golden"  # golden files kept in the repository


def folder_from_environment(name: str) -> Path:
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"environment variable {name} names no folder (it is not in the repository)")
    return Path(value)


@pytest.fixture(scope="session")
def golden_tiny() -> Path:
    """The large golden folder internvl2-tiny, with the real tokenizer."""
    return folder_from_environment("GOLDEN") / "internvl2-tiny"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A toy world of 48 pairs and in base/model a model that has learned the form of an answer."""
    folder = tmp_path_factory.mktemp("trained")
    write_world(folder, 48, 0)
    flags = {"loss": "sft", "lr": 5e-3, "batch_size": 16, "epochs": 12, "pack_tokens": 2000}
    flags |= {"recompute": "off", "save_every": 10_000, "out_dir": folder / "base"}
    cfg = short_run(folder, **flags)
    assert train_in_process(cfg)[-1]["nll"] < 1
    return folder


def short_run(folder: Path, **flags: object) -> TrainConfig:
    """Flags of a run of a few steps of 8 pairs, in several packs a step, on the world there."""
    usual = {"lr": 1e-3, "batch_size": 8, "pack_tokens": 400, "drop_path": 0.0, "save_every": 2}
    usual |= {"max_length": min(400, flags.get("pack_tokens", 400))}
    return TrainConfig(folder / "model", folder / "meta.json", **(usual | flags))


def exact_weights(model_dir: Path) -> None:
    """Weights kept in float32: what is saved of them keeps every bit."""
    for path in model_dir.glob("*.safetensors"):
        weights = {name: w.float() for name, w in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def add_a_vit_block(model_dir: Path) -> None:
    """Stochastic depth spares the first, which is the toy's only one: its tests need a second."""
    config = read_json(model_dir / "config.json")
    config["vision_config"]["num_hidden_layers"] = 2
    (model_dir / "config.json").write_text(json.dumps(config))
    weights = {}
    for path in model_dir.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (model_dir / "model.safetensors.index.json").unlink(missing_ok=True)
    first, second = (f"vision_model.encoder.layers.{n}." for n in (0, 1))
    weights |= {k.replace(first, second): w.clone() for k, w in weights.items() if first in k}
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


def train_in_process(cfg: TrainConfig) -> list[dict]:
    """A run in this process; its metrics."""
    try:
        with process_group(cfg.seed) as device:
            train(cfg, device)
    finally:
        leave_group()
    return [r for _, r in read_jsonl(cfg.out_dir / "metrics.jsonl")]


@pytest.fixture(autouse=True)
def alone_again() -> Iterator[None]:
    """No test begins in the process group of an earlier one."""
    yield
    leave_group()


def leave_group() -> None:
    """After an error, which leaves a process in its group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def bench() -> Path:
    """Published benchmark questions, outputs and scores."""
    return folder_from_environment("BENCH")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_forks(count: int, function: Callable, *args: object) -> list:
    """function(*args) in `count` processes that find each other as torchrun's would.

    They fork from a clean server that has torch loaded, which saves its seconds of import and
    inherits no thread or lock of this process; one README command runs torchrun itself.
    """
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    modules = ["pytest", "conftest", "train", "toy", "pairs", "eval", "torch._dynamo"]
    context.set_forkserver_preload(modules)
    forks = [
        context.Process(target=as_rank, args=(rank, count, port, function, args))
        for rank in range(count)
    ]
    for fork in forks:
        fork.start()
    return forks


def as_rank(rank: int, count: int, port: int, function: Callable, args: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1")
    function(*args)


def run_forks(count: int, function: Callable, *args: object) -> None:
    """Run `start_forks` to the end; every process must succeed."""
    forks = start_forks(count, function, *args)
    for fork in forks:
        fork.join(240)
    assert [fork.exitcode for fork in forks] == [0] * count
