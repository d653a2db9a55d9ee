"""Whether all of it holds on one GPU, and how fast it is there: one command, one table.

    python tools/gpu_check.py --out gpu                       a card: at most 25 minutes
    python tools/gpu_check.py --out gpu --only flex --only steps --seconds 560

Parts stand in order of worth.  Every case of a part runs in a process of its own with its own time,
so that an illegal memory access, a hang or a lack of memory costs one case.  After each case
gpu.json and gpu.md are written anew; gpu.log has all that was printed.  Without a GPU the same
lines run at toy size: FlexAttention forward only and nothing compiled.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import flag, read_json, read_jsonl, write_atomic


@dataclass(frozen=True)
class CheckConfig:
    """Check this code on one GPU; without a GPU, at toy size on the CPU."""

    out: Path = flag(Path("gpu"), "folder of gpu.json, gpu.md and gpu.log")
    only: tuple[str, ...] = flag((), "name of a part to run; may be repeated")
    seconds: int = flag(1500, "time for everything; cases that would begin later are skipped", 1)
    world: Path | None = flag(None, "folder that toy.py wrote; default: a new one")


if __name__ == "__main__":
    runtime.parse_cli(CheckConfig)  # --help and wrong flags need no torch, which takes seconds

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import plain
import train
from generate import Generator, Prompt, Scheduler, decode
from layouts import OFFICIAL_INTERNLM2, OFFICIAL_QWEN, split_stored, stored_pieces
from losses import token_logps
from model import InternVL, TreeAttention
from records import read_meta
from tokenizer import load_tokenizer
from tools import gpu_speed
from tools.figures import markdown_table
from tools.gpu_speed import Row, Setting, at_most, largest, measured
from tools.releases import named_config
from weights import load_model

ROOT = Path(__file__).resolve().parent.parent


DTYPES = (torch.float32, torch.bfloat16)


# --------------------------------------------------------------------------- correct


def start(setting: Setting, case: str) -> Iterator[Row]:
    """The first steps of a run with default flags, each kernel's error at its own line."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    losses, _ = train_toy(setting, f"--max_steps 3 {case}", setting.device)
    yield at_most("steps without a finite loss", 3 - sum(map(torch.isfinite, losses)).item(), 0)


def flex(setting: Setting, case: str) -> Iterator[Row]:
    """FlexAttention against the dense mask, in the shape of the 2B's layers."""
    length, heads, d = int(case), *((4, 16) if setting.toy else (16, 128))
    token = torch.arange(length, device=setting.device)
    trees = token * 3 // length, token * 9 // length % 3
    dense, fast = TreeAttention(*trees, flex=False, span=length), TreeAttention(*trees, flex=True)
    spans = fast if setting.on_gpu else TreeAttention(*trees, flex=False)  # for backward
    for dtype, bound in zip(DTYPES, (1e-4, 2e-2)):
        torch.manual_seed(0)
        q, k, v, pull = (
            torch.randn(1, length, h, d, device=setting.device, dtype=dtype)
            for h in (heads, heads // 2, heads // 2, heads)
        )
        with torch.no_grad():
            expected = dense(0, q, k, v)
            error = largest(fast(0, q, k, v) - expected) / largest(expected)
        yield at_most(f"output, {dtype}, of the largest", error, bound)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        ours = torch.autograd.grad(spans(0, *inputs), inputs, pull)
        theirs = torch.autograd.grad(dense(0, *inputs), inputs, pull)
        error = max(largest(a - b) / max(1.0, largest(b)) for a, b in zip(ours, theirs))
        yield at_most(f"gradients, {dtype}, of the largest", error, bound)


def golden(setting: Setting, case: str) -> Iterator[Row]:
    """Logits, loss and gradients of the official code and of transformers, from tests/golden."""
    folder = ROOT / "tests" / "golden" / case
    facts = read_json(folder / "cases.json")
    tensors = {k: t.to(setting.device) for k, t in load_file(folder / "cases.safetensors").items()}
    pixels = tensors.get("tiles_uint8")
    models = [load_model(folder / "checkpoint", setting.device, dtype) for dtype in DTYPES]
    for model in models:
        model.image_context_id = facts["image_context_token_id"]

    def logits_of(model: InternVL, name: str) -> Tensor:
        ids, tiles = tensors[f"{name}/input_ids"], tensors.get(f"{name}/tiles", pixels)
        if pixels is not None and (chosen := facts["cases"][name].get("tiles")):
            tiles = tiles[chosen]
        return model(ids, tiles if (ids == model.image_context_id).any() else None)

    exact, rounded = [], []
    for key, expected in tensors.items():
        name, kind = key.split("/")[0], key.split("/")[-1]
        if kind in ("logits", "logits_last4") and f"{name}/input_ids" in tensors:
            with torch.no_grad():
                full, half = (logits_of(model, name) for model in models)
            exact.append(largest(full[:, full.shape[1] - expected.shape[1] :] - expected))
            rounded.append(largest(half - full))
    yield at_most("logits, fp32, largest difference", max(exact), 1e-4)
    yield at_most("logits, bf16 against fp32, largest difference", max(rounded), 0.5)

    model, name = models[0], "loss" if "loss/labels" in tensors else "m_loss"
    labels = tensors[f"{name}/labels"]
    loss = -token_logps(logits_of(model, name), labels).sum() / (labels[:, 1:] != -100).sum()
    loss.backward()
    yield at_most("loss, difference", largest(loss.detach() - tensors[f"{name}/loss"]), 1e-5)
    pieces = stored_pieces(model, OFFICIAL_QWEN if "qwen" in case else OFFICIAL_INTERNLM2)
    gradients: dict[str, Tensor] = {}
    for parameter, p in model.named_parameters():
        gradients |= split_stored(p.grad, pieces[parameter])
    errors, prefix = [], f"{name}/grad."
    for key in (key for key in tensors if key.startswith(prefix)):
        ours = gradients[key.removeprefix(prefix).removesuffix("[grad_rows]")]
        ours = ours[tensors[f"{name}/grad_rows"]] if key.endswith("[grad_rows]") else ours
        errors.append(largest(ours - tensors[key]) / max(1.0, largest(tensors[key])))
    yield at_most("gradients, largest difference", max(errors), 1e-4)


def toy_run(setting: Setting, out: Path, flags: str) -> train.TrainConfig:
    world, pairs = setting.folder / "world", 4 if setting.toy else 8
    fixed = f"--model_dir {world}/model --meta {world}/meta.json --out_dir {out} --lr 1e-3"
    fixed += f" --batch_size {pairs} --drop_path 0 --pack_tokens 900"
    return runtime.parse_cli(train.TrainConfig, [*fixed.split(), *flags.split()])


def train_toy(setting: Setting, flags: str, device: torch.device) -> tuple[Tensor, dict]:
    """Losses (step) and final weights of a run of train.py's own loop on the toy world."""
    cfg = toy_run(setting, Path(tempfile.mkdtemp(dir=setting.folder)), flags)
    train.train(cfg, replace(runtime.start_process(cfg.seed), device=device))
    losses = torch.tensor([row["loss"] for _, row in read_jsonl(cfg.out_dir / "metrics.jsonl")])
    return losses, dict(load_model(cfg.out_dir / "model").named_parameters())


def steps(setting: Setting, case: str) -> Iterator[Row]:
    """plain.py on the CPU against train.py here; switches plain.py lacks, against our CPU run."""
    count, oracle = (2 if setting.toy else 8), setting.folder / "oracle.safetensors"
    bf16 = "bf16" in case
    exact = not (bf16 or "lora" in case)
    if exact and not oracle.exists():
        world = setting.folder / "world"
        pairs = toy_run(setting, world, "").batch_size
        cfg = plain.PlainConfig(world / "model", world / "meta.json", count, pairs, lr=1e-3)
        policy, losses = plain.train(cfg)
        weights = {name: p.detach() for name, p in policy.named_parameters()}
        save_file(weights | {"losses": torch.tensor(losses)}, oracle)
    flags = f"--max_steps {count} {'' if bf16 else '--dtype fp32'} {case}"
    losses, weights = train_toy(setting, flags, setting.device)
    if exact:
        expected = load_file(oracle)
        expected_losses = expected.pop("losses")
    else:
        expected_losses, expected = train_toy(setting, flags, torch.device("cpu"))
    bound = 0.1 if bf16 else 1e-4 if setting.on_gpu else 1e-5
    yield at_most(f"losses of {count} steps", largest(losses - expected_losses), bound)
    worst = 0.0
    for name, p in weights.items():
        pair = (p, expected[name])
        if name.endswith("attn.qkv.bias"):  # a key's bias has no gradient but rounding
            pair = tuple(torch.cat(x.chunk(3)[::2]) for x in pair)
        worst = max(worst, largest(pair[0] - pair[1]))
    # Adam moves a weight by up to the rate a step, whatever its gradient's size
    yield at_most("weights, largest difference", worst, 2e-3 * count if bf16 else 10 * bound)


def ids(setting: Setting, case: str) -> Iterator[Row]:
    """Answers of captured decoding against eager decoding here and on the CPU, fp32."""
    folder = setting.folder / "world"
    config = named_config("toy")
    records = [data_set[0] for data_set in read_meta(folder / "meta.json", config.max_tiles)]
    prompts = [
        Prompt(str(n), r.question, r.images, max_tiles=r.max_tiles, num_samples=4)
        for n, r in enumerate(records[: 2 if setting.toy else None])
    ]

    def answers(device: torch.device | str, captured: bool, batch: int = 99) -> list:
        settings = {"temperature": float(case), "max_new_tokens": 8 if setting.toy else 64}
        settings["cache_tokens"] = 8192
        model = load_model(folder / "model", device)
        generator, rows = Generator(model, load_tokenizer(folder / "model"), **settings), []
        for begin in range(0, len(prompts), batch):
            groups = list(map(generator.encode, prompts[begin : begin + batch]))
            scheduler = Scheduler(generator, iter(groups))
            if not captured:
                scheduler.decode = decode
            rows += [row for row in scheduler.run() if row.finish_reason]
        return sorted((row.group.prompt.id, row.sample, row.ids) for row in rows)

    expected = answers(setting.device, True)

    def differing(*settings: object) -> int:
        return sum(a != b for a, b in zip(expected, answers(*settings), strict=True))

    name = f"answers of {len(expected)} that differ: "
    yield at_most(f"{name}eager decoding", differing(setting.device, False), 0)
    yield measured(f"{name}decoding on the CPU", differing("cpu", False))
    yield measured(f"{name}one prompt at a time", differing(setting.device, True, 1))


def resume(setting: Setting, case: str) -> Iterator[Row]:
    """A run killed after a checkpoint and continued, against one that was never stopped."""
    models, context = [], multiprocessing.get_context("fork")
    for killed in (False, True):
        out = setting.folder / f"resume-{killed}{case}"
        cfg = toy_run(setting, out, f"--save_every 1 --max_steps 3 {case}")
        for kill in (True, False)[not killed :]:
            child = context.Process(target=train_once, args=(cfg,))
            child.start()
            while kill and child.is_alive() and not list(out.glob("checkpoints/step-*1")):
                time.sleep(0.005)
            if kill:
                child.kill()
            child.join()
        models.append(load_model(out / "model").state_dict())
        steps_done = [row["step"] for _, row in read_jsonl(out / "metrics.jsonl")]
        yield at_most("steps missing or repeated", abs(len(steps_done) - 3), 0)
    difference = max(largest(models[0][name] - models[1][name]) for name in models[0])
    yield at_most("weights, largest difference", difference, 1e-3 if setting.on_gpu else 0)


def train_once(cfg: train.TrainConfig) -> None:
    train.train(cfg, runtime.start_process(cfg.seed))
    runtime.stop_process()


# --------------------------------------------------------------------------- one case after another


@dataclass(frozen=True)
class Part:
    """A function, the cases it is called with, and the seconds that one of them may take."""

    check: Callable[[Setting, str], Iterator[Row]]
    cases: tuple[str, ...]
    seconds: int
    toy: int = 9  # how many of the cases run at toy size


SWITCHES = ("", "--lora_rank 4", "--compile off", "--recompute selective", "--state_dtype bf16")
SWITCHES += ("--recompute full", "--reference online", "--lora_rank 4 --reference online")
LENGTHS = ("300", "2", "40", "127", "128", "1000", "8191")
STEPS = ("2b", "2b --compile off", "1b", "2b --recompute selective", "2b --recompute full")
STEPS += ("2b --head_rows 512", "2b --head_rows 1024")
STEPS += ("8b --lora_rank 16 --state_dtype bf16", "8b --state_dtype bf16")
TILES = ("8192", "8191", "8192 tiles", "8191 dynamic")
GOLDEN = ("internvl2-micro", "qwen3-micro", "qwen2-micro")
PARTS = {  # in order of worth
    "start": Part(start, ("--compile off", ""), 90, 1),
    "flex": Part(flex, LENGTHS, 90, 1),
    "golden": Part(golden, GOLDEN, 60, 1),
    "steps": Part(steps, SWITCHES, 180, 2),
    "ids": Part(ids, ("1", "0"), 90, 1),
    "resume": Part(resume, ("", "--async_save off"), 180, 1),
    "bench": Part(gpu_speed.one_pair, ("2b",), 180),
    "tiles": Part(gpu_speed.flex_tiles, TILES, 60, 1),
    "mpo": Part(gpu_speed.mpo, STEPS, 180, 1),
    "sample": Part(gpu_speed.sample, ("8b 1", "8b 256", "8b 8", "8b 64"), 120, 1),
    "vit": Part(gpu_speed.vit, ("eager", "compiled"), 120, 1),
    "mmpr": Part(gpu_speed.mmpr, ("8b",), 240),
    "peers": Part(gpu_speed.peers, ("8", "pair", "1", "64"), 120, 2),
    "loader": Part(gpu_speed.loader, ("one process",), 60),
}


def make_world(setting: Setting, source: str) -> Iterator[Row]:
    """The toy world, its weights in float32 so that saved ones keep every bit."""
    world = setting.folder / "world"
    if source:
        shutil.copytree(source, world)
    else:
        command = [sys.executable, str(ROOT / "toy.py"), "--out", str(world), "--pairs", "32"]
        subprocess.run(command, check=True)
    for path in (world / "model").glob("*.safetensors"):
        tensors = {name: w.float() for name, w in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    yield measured("weight files", len(list((world / "model").glob("*.safetensors"))))


def output_of(*command: str) -> str:
    """What a command prints; empty where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else ""


def in_child(setting: Setting, check: Callable, case: str, log: Path) -> None:
    """One case: what it prints goes to the log, its rows to a file as they come."""
    os.setsid()  # the parent ends this whole group
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if setting.on_gpu:
        torch.cuda.set_device(setting.device)
    with open(setting.folder / "rows.jsonl", "w") as file:
        for row in check(setting, case):
            print(json.dumps(asdict(row)), file=file, flush=True)


def run_case(setting: Setting, check: Callable, case: str, seconds: float, log: Path) -> list[Row]:
    """The rows of a case; one more that fails where it crashed or took too long."""
    rows = setting.folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=in_child, args=(setting, check, case, log))
    child.start()
    child.join(seconds)
    problem = f"still running after {seconds:.0f} s" if child.is_alive() else ""
    if child.is_alive() or child.exitcode:
        lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        problem = problem or f"ended with {child.exitcode}: {lines[-1][:200] if lines else ''}"
    with contextlib.suppress(ProcessLookupError):  # and what it has left behind
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    done = [Row(**row) for _, row in read_jsonl(rows)] if rows.exists() else []
    return done + ([Row(problem, None, "", "FAIL")] if problem else [])


def write_report(out: Path, facts: dict, table: list[dict]) -> None:
    """gpu.json and gpu.md, whole after every case."""
    write_atomic(out / "gpu.json", json.dumps({**facts, "rows": table}, indent=1) + "\n")
    header = ("part", "case", "measured", "figure", "expected", "verdict")
    words = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    write_atomic(out / "gpu.md", f"{words}\n\n{markdown_table(header, map(cells, table))}\n")


def cells(row: dict) -> list[str]:
    return [
        "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()
    ]


def main() -> None:
    cfg, began, table = runtime.parse_cli(CheckConfig), time.monotonic(), []
    if unknown := set(cfg.only) - set(PARTS):
        raise runtime.InputError(
            f"--only {', '.join(unknown)}: no such part; known: {', '.join(PARTS)}"
        )
    cfg.out.mkdir(parents=True, exist_ok=True)
    log = cfg.out / "gpu.log"
    log.unlink(missing_ok=True)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA must not start before a fork
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    card = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    facts = {"device": card if device.type == "cuda" else f"CPU, {os.cpu_count()} cores, toy size"}
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    facts |= {"commit": output_of("git", "rev-parse", "HEAD")}
    facts |= {"command": " ".join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), device)
        run_case(setting, make_world, str(cfg.world or ""), 120, log)
        for name in [name for name in PARTS if name in cfg.only or not cfg.only]:
            part = PARTS[name]
            for case in part.cases[: part.toy if setting.toy else None]:
                left = cfg.seconds - (time.monotonic() - began)
                rows = [Row("no time was left", None, "", "skipped")]
                if left > 5:
                    rows = run_case(setting, part.check, case, min(part.seconds, left), log)
                for row in rows:
                    table.append({"part": name, "case": case, **asdict(row)})
                    print(*cells(table[-1]), sep="  ", flush=True)
                write_report(cfg.out, facts, table)
    failed = sum(row["verdict"] == "FAIL" for row in table)
    print(f"{len(table)} rows, {failed} failed, {time.monotonic() - began:.0f} s: {cfg.out}/gpu.md")
    if failed:
        raise runtime.Failure(f"{failed} of {len(table)} rows failed; {log} says why")


if __name__ == "__main__":
    runtime.run(main)
