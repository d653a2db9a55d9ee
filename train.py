"""Mixed Preference Optimization of InternVL (arXiv:2411.10442, section 4), on any number of GPUs.

    torchrun --standalone --nproc_per_node=8 train.py --model_dir weights/InternVL2-8B \\
        --meta MMPR/meta.json --out_dir runs/mpo
    python train.py --config toy/train.json           the same on a laptop
    python train.py --plan --size 8b --gpus 8         what it needs a GPU, without weights
    python train.py --bench --size 8b                 what each idea saves
    python train.py --config toy/train.json --loss all    every row of the paper's tables 6 and 7

plain.py says what is computed: read it first.  This file gets the same numbers with two fifths of
the arithmetic.  It reads top to bottom: `train` is the loop, then follows what the loop calls, in
that order.  A pair's prompt is computed once for both responses (a packed tree, data.py); the
reference is scored once before training; every loss is a mean over the pairs of the global batch,
so that 1 process x 8 packs, 2 x 4 and 8 x 1 are one update.  docs/differences.md: what the
official trainer_dpo.py does in another way.
"""

import contextlib
import hashlib
import json
import math
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import runtime
from runtime import Failure, InputError, flag, is_main, rank_and_world, say, write_json


@runtime.command_line
class TrainConfig:
    """Train InternVL on preference pairs.  The defaults are the paper's run.

    lr, max_length and drop_path, left out, are those of the model's generation (config.RECIPES).
    """

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder in the official layout")
    meta: Path = flag(Path("MMPR/meta.json"), "meta.json or .jsonl of pairs; see tools/convert.py")
    heldout: Path | None = flag(None, "pairs, as --meta, that are scored and never trained on")
    heldout_every: int = flag(50, "steps between two scorings of --heldout", low=1)
    keep_best: bool = flag(False, "keep the best step by --heldout in out_dir/best: see export.py")
    out_dir: Path = flag(Path("runs/mpo"), "metrics, checkpoints and the final model go here")
    loss: str = flag("mpo", "a sum as 0.8*dpo+0.2*bco+sft, or a preset; all = the paper's rows")
    mine: Path | None = flag(None, "Python file with objectives of your own")
    beta: float = flag(0.1, "KL coefficient", low=1e-9)
    label_smoothing: float | None = flag(None, "of cdpo, robust; default: their own", 0, 0.499)
    reference: Literal["cached", "online"] = flag("cached", "scored once, or a second model")
    reference_cache: Path | None = flag(None, "folder to share; default out_dir/reference")
    reference_update_every: int = flag(0, "TR-DPO: steps between updates; 0 = off", low=0)
    reference_update_mix: float = flag(0.9, "TR-DPO: the policy's share of an update", 1e-6, 1)
    lr: float | None = flag(None, "peak learning rate; default: the generation's", low=1e-12)
    lr_vision: float = flag(1.0, "times lr for the ViT; 0 = frozen", low=0)
    lr_projector: float = flag(1.0, "times lr for the projector; 0 = frozen", low=0)
    lr_language: float = flag(1.0, "times lr for the language model; 0 = frozen", low=0)
    warmup: float = flag(0.05, "share of the steps with rising rate; above 1: their number", low=0)
    decay: int = flag(-1, "last steps with falling rate, constant before; -1 = cosine to 0", low=-1)
    weight_decay: float = flag(0.05, "AdamW's, for matrices", low=0)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; 0 = off", low=0)
    batch_size: int = flag(256, "pairs a step, over all processes", low=1)
    epochs: int = flag(1, "passes over the data", low=1)
    max_steps: int = flag(0, "stop the schedule here; 0 = all epochs", low=0)
    limit: int = flag(0, "use only this many pairs, the same in every epoch; 0 = all", low=0)
    drop_path: float | None = flag(None, "stochastic depth in the policy's ViT", 0, 0.99)
    pack_tokens: int | None = flag(None, "tokens of a pass; default max(8192, max_length)", low=1)
    max_length: int | None = flag(None, "tokens of prompt + response; default: the generation's", 1)
    max_tiles: int = flag(0, "tile limit where meta.json gives none; 0 = the model's", 0, 128)
    overlong: Literal["drop", "cut", "fewer_tiles"] = flag(
        "drop", "what becomes of a too long record; cut = the official way"
    )
    pairs_per_prompt: int = flag(1, "pairs of one question trained as one tree, at most", low=1)
    share_prefix: bool = flag(True, "compute a prompt once for all its responses")
    share_images: bool = flag(True, "encode an image once a pack")
    head_rows: int = flag(512, "scored tokens that meet the vocabulary at once; 0 = all, kept", 0)
    recompute: Literal["auto", "full", "selective", "off"] = flag(
        "auto",
        "what a block keeps for backward\nfull: its input\n"
        "selective: also attention and narrow products\noff: everything\n"
        "auto: full for as few blocks as a GPU's memory asks",
    )
    recompute_blocks: int = flag(-1, "so many blocks, the ViT's first; -1 = all", low=-1)
    sync: Literal["auto", "pack", "step"] = flag(
        "auto", "exchange weights and gradients in each pack, or once a step where they fit whole"
    )
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile blocks; auto = on a GPU")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "compute; auto = bf16 on GPU, else fp32")
    state_dtype: Literal["fp32", "bf16"] = flag(
        "fp32", "weights, gradients and AdamW's moments; bf16 rounds at random: half the memory"
    )
    lora_rank: int = flag(0, "train only adapters of this rank; 0 = train the weights", low=0)
    lora_alpha: float = flag(32.0, "an adapter's output is scaled by alpha / rank", low=1e-9)
    lora_parts: Literal["language", "vision", "both"] = flag("language", "blocks with adapters")
    replicate: int = flag(1, "groups of GPUs with a whole copy each, sharded within (HSDP)", low=1)
    save_every: int = flag(200, "steps between checkpoints", low=1)
    keep: int = flag(2, "checkpoints kept", low=1)
    tensorboard: bool = flag(False, "metrics also into out_dir/tensorboard; needs tensorboard")
    wandb: str = flag("", "metrics also into this Weights & Biases project; needs wandb")
    async_save: Literal["auto", "on", "off"] = flag("auto", "save beside training; auto = on a GPU")
    seed: int = flag(42, "order of the data, stochastic depth")
    gpu_memory: float = flag(0.0, "GB a GPU has; 0 = ask the device", low=0)
    plan: bool = flag(False, "only print what a run would need a GPU, without weights")
    bench: bool = flag(False, "only measure a step, with each idea switched on in turn")
    size: str = flag("", "for --plan and --bench: toy, 8b, 3.5-8b, ... instead of model_dir")
    gpus: int = flag(1, "for --plan", low=1)
    NEEDS = {  # flag -> the flags without which it would be ignored
        "heldout_every": "--heldout",
        "keep_best": "--heldout",
        "reference_update_mix": "--reference_update_every, or --loss all",
        "recompute_blocks": "--recompute full, or --recompute selective",
        "state_dtype": "--dtype auto, or --dtype bf16",
        "lora_alpha": "--lora_rank",
        "lora_parts": "--lora_rank",
        "size": "--plan, or --bench",
        "gpus": "--plan",
    }

    def __post_init__(self) -> None:
        runtime.check_flags(self)
        for name in ("tensorboard", "wandb"):
            if getattr(self, name):
                runtime.need(name, f"--{name}")
        if self.plan and self.bench:
            raise InputError("--plan and --bench: pass one of them")

    @property
    def cache_folder(self) -> Path:
        return self.reference_cache or self.out_dir / "reference"

    @property
    def rates(self) -> dict[str, float]:
        """Part of the model -> its learning rate as a multiple of lr."""
        return dict(zip(PARTS, (self.lr_vision, self.lr_projector, self.lr_language)))

    @property
    def trained_parts(self) -> set[str]:
        """Parts whose own weights are trained."""
        return set() if self.lora_rank else self.learning_parts

    @property
    def learning_parts(self) -> set[str]:
        """Parts that are trained, or have adapters that are."""
        names = ("language", "vision") if self.lora_parts == "both" else (self.lora_parts,)
        parts = {f"{name}_model" for name in names} if self.lora_rank else PARTS
        return {part for part in parts if self.rates[part] > 0}


import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import losses
import memory
import weights
from config import InternVLConfig, load_config, recipe
from data import STAND_IN, Pack, PairData, Step, Tree, prefetch, response_keys, seeded
from losses import BcoShift, PairLogps, Terms, objective, parse_objective
from model import InternVL, TreeAttention
from records import PairRecord, part_files, read_meta, read_parts
from tokenizer import load_tokenizer
from weights import FLOATS, local

LOCK_SECONDS = 20
SCORING_VERSION = "1"  # raise it when a change moves log-probs: cached ones are refused then
checksum = partial(hashlib.blake2b, digest_size=4)  # of a row of the cached reference
PARTS = ("vision_model", "projector", "language_model")
SHOWN = "loss rewards/margin rewards/accuracy nll grad_norm lr mfu tokens_per_s".split()

# flags that may differ between a run and its continuation
FREE_FLAGS = """out_dir reference_cache save_every keep async_save compile recompute sync head_rows
recompute_blocks model_dir meta replicate gpu_memory plan bench size gpus heldout heldout_every
keep_best tensorboard wandb""".split()

# --------------------------------------------------------------------------- the loop


def train(cfg: TrainConfig, device: torch.device) -> None:
    """One run in its folder: data, policy, reference, the steps, the export."""
    weights.export_folder(cfg.out_dir / "model", cfg.model_dir)  # refused now, not at the end
    for folder in (cfg.model_dir, cfg.out_dir / "model"):
        if cfg.cache_folder.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"reference_cache lies in {folder}; pass a folder of its own")
    with runtime.alone_in(cfg.out_dir, LOCK_SECONDS, "end it, or pass another --out_dir"):
        run = Run(cfg, device)
        run.meter.start()

        for step in run.steps():
            number = step.number + 1
            lr = lr_at(step.number, run.total, run.cfg)
            if run.optimizer.updates == 0 and run.reference:
                say(check_start(run, step))
                run.meter.start()  # it is no part of the step
            logps = step_gradient(run, step)
            norm = clip_gradient(run)
            check_finite(run, step, logps, norm)
            run.optimizer.step(lr)
            run.policy.zero_grad()
            if cfg.reference_update_every and number % cfg.reference_update_every == 0:
                run.reference.move(run.policy, cfg.reference_update_mix)

            metrics = step_metrics(run, logps, step.pairs) | run.meter(step, run.reference)
            metrics |= {"bco_shift": run.shift.mean, "lr": lr, "grad_norm": norm}
            if run.heldout and (number == run.total or number % cfg.heldout_every == 0):
                metrics |= score_heldout(run)
                run.meter.start()
            if run.reference:
                ratios = torch.cat([logps.chosen_logratio, logps.rejected_logratio])
                run.shift.update(cfg.beta * ratios.double())
            stop = asked_to_stop()
            run.log_and_save(number, metrics, stop)
            if stop and number < run.total:
                say(f"asked to stop: saved step {number}; the same command continues")
                return
        if run.rows and not any(row["grad_norm"] for row in run.rows):
            raise Failure("no weight has changed, so nothing is saved: all gradients were 0")
        if best := best_row(run.best if cfg.keep_best else run.rows):
            say(f"best step by held-out pairs: {best['step']} of {run.total}")
        memory.merge_adapters(run.policy)
        weights.save_model(run.policy, cfg.out_dir / "model", like=cfg.model_dir)
        say(f"saved {cfg.out_dir / 'model'}: read back and equal to the trained policy")


class Run:
    """A run in its folder, as the last checkpoint left it: what a step needs, what it leaves.

    metrics.jsonl has one JSON object a step; a resumed run drops those past its checkpoint.
    """

    def __init__(self, cfg: TrainConfig, device: torch.device) -> None:
        from tools.plan import Meter, settle  # noqa: PLC0415  (a run tells its memory and speed)
        from tools.track import Tracker  # noqa: PLC0415  (and its troubles)

        config = load_config(cfg.model_dir)
        asked = with_recipe(cfg, config, say)
        self.device, self.terms = device, parse_objective(cfg.loss)
        takers = ", ".join(losses.takers(self.terms, "beta")) or "no term"
        say(f"--beta {cfg.beta:g} goes to {takers} of --loss {cfg.loss}")
        self.data, self.heldout = open_data(asked, self.terms)
        newest, kept = (weights.newest_checkpoint(cfg.out_dir / x) for x in ("checkpoints", "best"))
        seen = int(seeded(self.data.digest(0), newest, kept).integers(2**62))
        extremes = torch.tensor([seen, -seen])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)  # the largest, and minus the smallest
        if extremes.sum():  # nodes may have disks of their own
            raise InputError(f"{cfg.meta} or {cfg.out_dir} differs between nodes: share a disk")
        self.cfg = cfg = settle(asked, config, dist.get_world_size(), device, say)
        self.total = last_step(cfg, self.data)
        self.meter = Meter(cfg, config, device)

        self.facts = run_facts(self, newest)
        self.policy = sharded_model(cfg, device)
        self.optimizer, self.shift = make_optimizer(cfg, self.policy), BcoShift()
        self.reference = make_reference(self)
        self.tensors, self.done = state_tensors(self), 0
        if newest:
            state = weights.load_checkpoint(newest, self.tensors)
            self.shift, self.done = BcoShift(**state["bco_shift"]), state["step"]
            self.optimizer.updates = state["updates"]
        say(f"{self.done} of {self.total} steps are done")

        background = switched_on(cfg.async_save, device)
        self.writer = weights.CheckpointWriter(cfg.out_dir / "checkpoints", cfg.keep, background)
        path = cfg.out_dir / "metrics.jsonl"
        rows = runtime.read_whole_lines(path, step=int, lr=float, grad_norm=float)
        self.rows = [row for row in rows if row["step"] <= self.done]
        if self.done and self.done not in {row["step"] for row in self.rows}:
            say(f"{path}: the rows of steps until {self.done} are gone; the run goes on without")
        self.best = [r for r in self.rows if kept and kept.name == f"step-{r['step']:08d}"]
        other = [r["step"] for r in self.rows if r["lr"] != lr_at(r["step"] - 1, self.total, cfg)]
        if other:
            told = f"step {other[0]} had another lr than {self.total} steps give it"
            remedy = "pass --warmup in steps, or continue from a checkpoint before the rate fell"
            raise InputError(f"{path}: {told}; {remedy}")
        if is_main():
            write_json(cfg.out_dir / "config.json", asdict(asked))
            runtime.write_jsonl(path, self.rows)
            self.log = runtime.AppendLog(path)
        self.tracker, self.began = Tracker(cfg, self.rows, self.total), time.time()

    @property
    def hyper(self) -> dict[str, float | None]:
        """What the objectives are passed; the shift moves at the end of a step."""
        flags = {name: getattr(self.cfg, name, None) for name in losses.HYPER}
        return flags | {"bco_shift": self.shift.mean}

    def steps(self) -> Iterator[Step]:
        """The steps that are left, each made while the one before is computed."""
        left = range(self.done, self.total)
        limits = f"max_length {self.cfg.max_length} or pack_tokens {self.cfg.pack_tokens}"
        for step in prefetch(self.data.step(n, *rank_and_world()) for n in left):
            for rule, name in step.overlong:
                say(f"{rule}, too long for {limits}: {name}")
            if step.pairs:
                yield step
            else:
                say(f"step {step.number + 1} is skipped, and what is due then: no pair is left")

    def log_and_save(self, number: int, metrics: dict[str, float], stop: bool) -> None:
        """Log step `number` (from 1); save it if it is the last, the best or its turn."""
        cfg, last = self.cfg, stop or number == self.total
        self.rows.append({"step": number, **metrics})
        if is_main():
            self.log.append(self.rows[-1])
        words = [f"{key.split('/')[-1]} {metrics[key]:.4g}" for key in SHOWN if key in metrics]
        left = (time.time() - self.began) / (number - self.done) * (self.total - number)
        words = [f"step {number}/{self.total}", *words, f"left {timedelta(seconds=int(left))}"]
        while len(" ".join(words)) > 80:  # columns of a terminal
            words.pop(-2)
        say(*words)
        self.tracker()
        updates = self.optimizer.updates  # fewer than steps, where one was skipped
        state = {"flags": self.facts, "bco_shift": asdict(self.shift), "updates": updates}
        if cfg.keep_best and best_row([*self.best, self.rows[-1]]) is self.rows[-1]:
            self.best = self.rows[-1:]
            weights.CheckpointWriter(cfg.out_dir / "best", keep=1).save(number, self.tensors, state)
        if last or number % cfg.save_every == 0:
            self.writer.save(number, self.tensors, state)
            self.tracker.draw(last)
        self.writer.finish(wait=last)
        if last and is_main():
            self.log.close()  # now it is on disk, too


# --------------------------------------------------------------------------- before the loop


def with_recipe(cfg: TrainConfig, config: InternVLConfig, say: Callable) -> TrainConfig:
    """Fill in what the user left open, as the release's MPO script has it; check what is given."""
    values = recipe(config)
    settings = {n: value for n, value in vars(values).items() if getattr(cfg, n, "") is None}
    if cfg.pack_tokens is None:
        settings["pack_tokens"] = max(8192, cfg.max_length or values.max_length)
    if settings:
        words = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        say(f"recipe of InternVL{config.generation}: {words} (as {values.source})")
    cfg = replace(cfg, **settings)
    if cfg.max_length > (most := config.llm.max_position_embeddings):
        say(f"max_length is {most} and not {cfg.max_length}: the model has no more positions")
        cfg = replace(cfg, max_length=most)
    if cfg.pack_tokens < cfg.max_length:
        told = f"--pack_tokens {cfg.pack_tokens} is below max_length {cfg.max_length}, a record's"
        raise InputError(f"{told}: pass --pack_tokens {cfg.max_length}, or a smaller --max_length")
    for part, rate in cfg.rates.items():
        if part not in cfg.learning_parts and rate not in (0, 1):
            raise InputError(f"{rate:g} times lr for the {part}: --lora_rank gives it no adapters")
    if cfg.loss != "all":  # of which some rows have these flags
        terms, every = parse_objective(cfg.loss), cfg.reference_update_every
        if cfg.label_smoothing is not None and not losses.takers(terms, "label_smoothing"):
            raise InputError(f"--label_smoothing: --loss {cfg.loss} does not use it; cdpo does")
        moves = losses.needs_reference(terms) and cfg.reference == "online" and not cfg.lora_rank
        if every and not moves:
            others = "an objective with a reference, --reference online, no --lora_rank"
            raise InputError(f"--reference_update_every {every} needs {others}")
    world = cfg.gpus if cfg.plan else rank_and_world()[1]
    if cfg.batch_size % world:
        raise InputError(f"{world} processes: batch_size {cfg.batch_size} is no multiple of them")
    if world % cfg.replicate:
        raise InputError(f"{world} processes do not divide into --replicate {cfg.replicate} groups")
    return cfg


def open_data(cfg: TrainConfig, terms: Terms) -> tuple[PairData, PairData | None]:
    """The pairs of cfg.meta in the order of a run, those of cfg.heldout; says what is there."""
    config, tokenizer = load_config(cfg.model_dir), load_tokenizer(cfg.model_dir)
    tokenizer.check_vocabulary(config.llm.vocab_size)
    limit = cfg.max_tiles or config.max_tiles
    sets = read_meta(cfg.meta, limit)
    only_chosen = all(name == "sft" for _, name in terms)  # SFT never looks at rejected responses
    flags = {f.name: getattr(cfg, f.name) for f in fields(PairData) if hasattr(cfg, f.name)}
    data = PairData(sets, tokenizer, config, only_chosen=only_chosen, **flags)
    drawn = np.bincount(data.order(0)[:, 0], minlength=len(sets))
    for data_set, count in zip(sets, drawn):
        say(f"{cfg.meta}: {data_set.name}: {len(data_set)} records, {count} an epoch")
    if not cfg.heldout:
        return data, None
    heldout = replace(data, sets=read_meta(cfg.heldout, limit), limit=0)
    known = set().union(*(s.lines.checksums for s in heldout.sets))
    if shared := set().union(*(known.intersection(s.lines.checksums) for s in sets)):
        say(f"{cfg.heldout}: {len(shared)} of its lines stand in {cfg.meta}, too: a leak")
    if not any(heldout.plan(heldout.rows(n))[0] for n in range(heldout.steps_per_epoch)):
        raise InputError(f"{cfg.heldout}: every pair is longer than {heldout.max_length}")
    return data, heldout


def last_step(cfg: TrainConfig, data: PairData) -> int:
    """The number of steps; the last one has a pair, so that a run ends with a step it makes."""
    there = data.steps_per_epoch * cfg.epochs
    total = min(there, cfg.max_steps or there)
    if cfg.max_steps > there:
        say(f"--max_steps {cfg.max_steps}: {cfg.epochs} --epochs have {there} steps")
    while total and not data.plan(data.rows(total - 1))[0]:
        say(f"step {total} is skipped: all of its records are too long")
        total -= 1
    if not total:
        raise InputError(f"every record is longer than max_length {data.max_length}")
    if (every := cfg.reference_update_every) > total:
        raise InputError(f"--reference_update_every {every}: a run of {total} steps has none")
    peak = max(lr_at(step, total, cfg) for step in range(total))
    if peak < cfg.lr:
        reached = f"lr {cfg.lr:g} is not reached: {total} steps of warm-up and decay allow {peak:g}"
        if not peak:
            remedy = "pass more --epochs or --max_steps, a smaller --batch_size, or --warmup 0"
            raise InputError(f"{reached}: {remedy}")
        say(reached)
    return total


def compute_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype:
    if cfg.state_dtype == "bf16":  # no float32 weights are there to compute with
        return torch.bfloat16
    return FLOATS.get(cfg.dtype) or FLOATS["bf16" if device.type == "cuda" else "fp32"]


def switched_on(setting: str, device: torch.device) -> bool:
    """Whether a flag means on; auto is on beside a GPU."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def sharded_model(cfg: TrainConfig, device: torch.device, trained: bool = True) -> InternVL:
    """The model of cfg.model_dir, FSDP-sharded block by block, weights streamed into the shards.

    Parameters are cfg.state_dtype; compute is cfg.dtype, gradients are reduced in fp32.
    """
    dtype = FLOATS[cfg.state_dtype if trained else "fp32"]  # TR-DPO's small steps need float32
    model = prepare(weights.empty_model(cfg.model_dir, cfg.drop_path).to(dtype), cfg, trained)
    shard(model, cfg, device)
    weights.load_weights(model, cfg.model_dir, device)
    memory.start_adapters(model, cfg.seed)
    return model.train(trained)


def units_of(model: InternVL, parts: Iterable[str] = PARTS) -> list[torch.nn.Module]:
    """The blocks of `parts` that are run: FSDP gathers each alone, the root all the rest."""
    depth = 1 + model.config.vision.num_hidden_layers
    read = model.vision_model.encoder.layers[: model.config.select_layer % depth]
    blocks = {"vision_model": read, "language_model": model.language_model.model.layers}
    return [block for part in blocks if part in parts for block in blocks[part]]


def prepare(model: InternVL, cfg: TrainConfig, trained: bool = True) -> InternVL:
    """What is trained, and what is computed again in backward."""
    for name in PARTS:
        getattr(model, name).requires_grad_(trained and name in cfg.trained_parts)
    if cfg.lora_rank and trained:
        memory.add_adapters(units_of(model, cfg.learning_parts), cfg.lora_rank, cfg.lora_alpha)
    blocks = units_of(model) if trained else []
    for block in blocks if cfg.recompute_blocks < 0 else blocks[: cfg.recompute_blocks]:
        memory.recompute_in_backward(block, cfg.recompute)
    return model


def compile_blocks(model: InternVL, **options: Any) -> None:
    """Compile each block, the ViT's for any number of tiles: compiled for the first number that
    comes, a continued run would get other kernels, and other last bits, than an unbroken one."""
    for block in model.vision_model.encoder.layers:
        block.compile(dynamic=True, **options)
    for block in model.language_model.model.layers:
        block.compile(**options)


def shard(model: InternVL, cfg: TrainConfig, device: torch.device) -> None:
    """FSDP of `units_of`; one process alone needs it only to compute in another dtype."""
    dtype, world = compute_dtype(cfg, device), dist.get_world_size()
    if switched_on(cfg.compile, device):
        compile_blocks(model)
    if world == 1 and dtype is next(model.parameters()).dtype:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415 (a second)

    shape, names = (world,), ("shard",)
    if cfg.replicate > 1:
        shape, names = (cfg.replicate, world // cfg.replicate), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if cfg.sync == "step" and any(p.requires_grad for p in model.parameters()):
        options["reshard_after_forward"] = False
    for unit in [*units_of(model), model]:
        fully_shard(unit, **options)


@contextlib.contextmanager
def scoring(model: InternVL) -> Iterator[None]:
    """Inside, no gradient and no stochastic depth; weights gathered there are forgotten after."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)
    if weights.is_sharded(model):
        for unit in [*units_of(model), model]:
            unit.reshard()


def make_optimizer(cfg: TrainConfig, policy: InternVL) -> memory.AdamW:
    """AdamW (0.9, 0.999, 1e-8); matrices decay, vectors do not."""
    groups = []
    for part, scale in cfg.rates.items():
        trained = [p for p in getattr(policy, part).parameters() if p.requires_grad]
        for wide, decay in ((True, cfg.weight_decay), (False, 0.0)):
            params = [p for p in trained if (p.ndim > 1) is wide]
            group = {"params": params, "scale": scale, "weight_decay": decay}
            groups += [group] if params else []
    return memory.AdamW(groups, cfg.seed)


# --------------------------------------------------------------------------- the reference


def make_reference(run: Run) -> "OnlineReference | CachedReference | None":
    """The reference's log-probs: none needed, scored beforehand, or a second model."""
    if not losses.needs_reference(run.terms):
        return None
    if run.cfg.reference == "cached":
        return CachedReference(run)
    model = run.policy if run.cfg.lora_rank else sharded_model(run.cfg, run.device, trained=False)
    return OnlineReference(model, run.cfg)


@dataclass(eq=False)
class OnlineReference:
    """A second sharded model with the start weights, or the policy without its adapters."""

    model: InternVL
    cfg: TrainConfig

    def __call__(self, pack: Pack) -> Tensor:  # (response)
        with scoring(self.model), memory.without_adapters(self.model):
            return score(self.model, pack, self.cfg)[0]

    @torch.no_grad()
    def move(self, policy: InternVL, mix: float) -> None:
        """TR-DPO (arXiv:2404.09656): reference <- mix * policy + (1 - mix) * reference.

        mix 1 is the hard update.  The reference is float32: bfloat16 would lose a small mix.
        """
        for reference_row, policy_row in zip(self.model.parameters(), policy.parameters()):
            own = local(reference_row)
            own.lerp_(local(policy_row).to(own.dtype), mix)


class CachedReference:
    """Log-probs of every response of the run, scored once by the policy before its first step.

    A folder of append-only part files (response key -> log-prob) shared by all runs on the same
    start weights; `run.json` says what the numbers depend on, `covers-*.json` marks runs of which
    every response is there.  In memory 20 bytes a response.
    """

    def __init__(self, run: Run) -> None:
        self.cfg, self.folder, self.device = run.cfg, run.cfg.cache_folder, run.device
        if is_main():
            runtime.claim(self.folder, cache_facts(run), "pass another --reference_cache")
        wanted = [(run.data, run.total)]
        if run.heldout:
            wanted.append((run.heldout, run.heldout.steps_per_epoch))
        with runtime.alone_in(self.folder, math.inf, "end it", ".scoring"):
            self.read()  # another run may have scored them meanwhile
            for data, steps in wanted:
                mark = self.folder / f"covers-{data.digest(steps)}.json"
                if not runtime.all_of(mark.exists()):
                    with scoring(run.policy):
                        self.score_missing(run.policy, data, steps)
                    self.read()
                    if is_main():
                        write_json(mark, {"steps": steps})

    def read(self) -> None:
        rows = bytearray(20)  # key and log-prob of each response, after one that is nobody's
        for _, row in read_parts(part_files(self.folder), scored_row):
            rows += row
        self.rows = np.frombuffer(rows, "S20")
        self.rows.sort()  # in place: there may be millions

    def look_up(self, trees: list[Tree]) -> tuple[np.ndarray, np.ndarray]:
        """(log-prob of each response, whether it is there at all)."""
        wanted = np.array([bytes.fromhex(key) for key in response_keys(trees)], "S16")
        places = self.rows.searchsorted(wanted).clip(max=len(self.rows) - 1)
        rows = self.rows[places].view([("key", "S16"), ("logp", "f4")])
        return rows["logp"], rows["key"] == wanted

    def score_missing(self, policy: InternVL, data: PairData, steps: int) -> None:
        """Plan this process's share of the records, a step's at a time, and score a pack at a time.

        Processes score in rounds of a pack each; one that has none left takes part with a stand-in.
        """
        rank, world = rank_and_world()
        pairs, size = data.distinct_rows(steps), data.batch_size
        starts = range(rank * size, len(pairs), world * size)
        starts = runtime.bar(starts, desc="reference", unit="step", unit_scale=world)
        plans = prefetch(data.plan(pairs[start : start + size])[0] for start in starts)
        missing = (trees for plan in plans for trees in plan if not self.look_up(trees)[1].all())
        packs, stand_in = prefetch(map(data.build, missing)), data.build([STAND_IN])
        part = runtime.AppendLog(self.folder / f"part-{rank:03d}-of-{world:03d}.jsonl")
        while not runtime.all_of((pack := next(packs, None)) is None):
            sums, _ = score(policy, (pack or stand_in).to(self.device), self.cfg)
            for key, logp in zip(response_keys(pack.trees) if pack else [], sums.tolist()):
                row = {"key": key, "logp": logp}
                part.append(row | {"checksum": checksum(json.dumps(row).encode()).hexdigest()})
            if asked_to_stop():
                say("asked to stop: scores are kept; the same command continues")
                raise SystemExit(0)
        part.close()
        dist.barrier()

    def __call__(self, pack: Pack) -> Tensor:  # (response)
        logps, there = self.look_up(pack.trees)
        if pack.trees != [STAND_IN] and not there.all():
            names = ", ".join(pair.name for tree in pack.trees for pair, _, _ in tree.pairs)
            remedy = "an image or the tokenizer has changed since; delete covers-*.json there"
            raise InputError(f"{self.folder} lacks log-probs of responses in {names}: {remedy}")
        return torch.from_numpy(logps).to(self.device)


def scored_row(line: bytes, name: str) -> bytes:
    """Key and log-prob of a line; there may be millions, too many to parse as JSON."""
    row, _, end = line.rpartition(b', "checksum": ')  # which is of all that stands before it
    if end != b'"%s"}\n' % checksum(row + b"}").hexdigest().encode():
        raise InputError(f"{name}: not as it was written; delete this part")
    key, logp = row.removeprefix(b'{"key": "').split(b'", "logp": ')
    return bytes.fromhex(key.decode()) + struct.pack("f", float(logp))


def cache_facts(run: Run) -> dict[str, str]:
    """What cached log-probs depend on besides each response's own key."""
    cfg, dtype = run.cfg, compute_dtype(run.cfg, run.device)
    # in bfloat16 the shape of a pack moves single tokens by 0.01 to 0.1 nats, in float32 by 1e-6
    packing = f"{cfg.pack_tokens} {cfg.share_prefix} {cfg.share_images}"
    return {
        "weights": weights.fingerprint(cfg.model_dir),
        "config": runtime.fingerprint([cfg.model_dir / "config.json"]),
        "dtype": str(dtype),
        "packing": packing if dtype is torch.bfloat16 else "any",
        "scoring": SCORING_VERSION,
    }


def check_start(run: Run, step: Step) -> str:
    """A fresh policy is its reference: every log-ratio is 0 and the loss is known beforehand."""
    with scoring(run.policy):
        logps = score_step(run, step)
    compare_start(logps, compute_dtype(run.cfg, run.device) is torch.bfloat16)
    total, parts = objective(run.terms, logps, **run.hyper)
    words = " + ".join(f"{w:g} x {parts[name].mean():.4f} ({name})" for w, name in run.terms)
    return f"start check: rewards are 0, so the first loss is {total.mean():.4f} = {words}"


def compare_start(logps: PairLogps, bfloat16: bool) -> None:
    """Failure where policy and reference differ by more than rounding."""
    ratio = torch.cat([logps.chosen_logratio, logps.rejected_logratio]).abs()
    length = torch.cat([logps.chosen_length, logps.rejected_length])
    # bfloat16 moves single tokens by up to 0.1 nats with the shape of a pack, up and down
    bound = 0.1 * length.sqrt() if bfloat16 else 1e-5 * length
    worst = int((ratio / bound).argmax())
    if not ratio[worst] <= bound[worst]:
        place = f"on a response of {int(length[worst])} tokens (rounding: {bound[worst]:.2e})"
        told = f"start check failed: a fresh policy is {ratio[worst]:.2e} nats off its reference"
        raise Failure(f"{told} {place}, which is of other weights or another scoring")


# --------------------------------------------------------------------------- continuing a run


def state_tensors(run: Run) -> dict[str, Tensor]:
    """All tensors of a run by name."""
    tensors = {}
    for name, p in run.policy.named_parameters():
        if p.requires_grad or not run.cfg.lora_rank:
            tensors[f"model/{name}"] = p
        for moment, tensor in run.optimizer.state.get(p, {}).items():
            tensors[f"{moment}/{name}"] = tensor
    if run.cfg.reference_update_every:
        tensors |= {f"reference/{n}": p for n, p in run.reference.model.named_parameters()}
    return tensors


def run_facts(run: Run, checkpoint: Path | None) -> dict[str, str]:
    """Flags, pairs, objectives, start weights: a continuation shares them with its checkpoint."""
    cfg, constant = run.cfg, run.cfg.decay >= 0
    # a constant rate does not know the run's length: it may be prolonged
    free = FREE_FLAGS + constant * ["max_steps", "epochs", "decay"]
    facts = {k: str(v) for k, v in asdict(cfg).items() if k not in free}
    facts |= {"schedule": "constant" if constant else "cosine", "pairs": run.data.digest(0)}
    if run.heldout:
        facts["held-out pairs"] = run.heldout.digest(0)
    if cfg.mine:
        facts[f"content of {cfg.mine}"] = runtime.fingerprint([cfg.mine])
    if is_main() and (cfg.lora_rank or losses.needs_reference(run.terms)):  # large: read once
        facts["start weights"] = weights.fingerprint(cfg.model_dir)
    old = weights.checkpoint_state(checkpoint)["flags"] if checkpoint else {}
    changed = [f"{k} was {old[k]}, now {v}" for k, v in facts.items() if old.get(k, v) != v]
    if changed:
        raise InputError(f"{checkpoint}: {'; '.join(changed)}; undo it or take a new --out_dir")
    return old | facts  # held-out pairs may be left out for a while


# --------------------------------------------------------------------------- one step: its gradient


def step_gradient(run: Run, step: Step) -> PairLogps:
    """Add the step's gradient to the policy; returns the log-probs of all its pairs.

    An objective that sorts over the whole step (AOT) has it scored first; then each pair is pulled
    by d loss / d its log-probs.  FSDP averages gradients over processes, so each pack's share is
    scaled by their number.
    """
    sorts_step, scored = losses.whole_step(run.terms), []
    if sorts_step:
        mean_loss = lambda logps: objective(run.terms, logps, **run.hyper)[0].mean()  # noqa: E731
        _, *pulls = losses.loss_and_gradient(mean_loss, score_step(run, step))
    for place, logps in forward_packs(run, step):
        if place.start == place.stop:  # a stand-in
            loss = logps.policy_chosen.sum()
        elif sorts_step:
            chosen, rejected = (pull[place] for pull in pulls)
            loss = (chosen * logps.policy_chosen).sum() + (rejected * logps.policy_rejected).sum()
        else:
            loss = objective(run.terms, logps, **run.hyper)[0].sum() / len(step.pairs)  # eq. 3
        if loss.requires_grad:  # or else what is trained is no part of this pack
            (loss * dist.get_world_size()).backward()
        scored.append((place, logps))
    return gather(run, step, scored)


@torch.no_grad()
def score_step(run: Run, step: Step) -> PairLogps:
    """Log-probs of all pairs of the step, without gradient."""
    return gather(run, step, forward_packs(run, step))


def forward_packs(run: Run, step: Step) -> Iterator[tuple[slice, PairLogps]]:
    """(place among the step's pairs, log-probs) of each of this process's packs."""
    for pack, number, first in step.packs:
        # stochastic depth is a function of (seed, step, pack): the same for any process count
        seed = seeded(run.cfg.seed, "drop path", step.number, number).integers(2**62)
        torch.manual_seed(int(seed))
        reduce_gradients(run, now=pack is step.packs[-1][0])
        pack = pack.to(run.device)
        reference = run.reference(pack) if run.reference else None
        sums, lengths = score(run.policy, pack, run.cfg)
        sides = pack.chosen, pack.rejected  # of each number PairLogps has both
        numbers = (sums, reference, lengths)
        columns = [None if x is None else x[side] for x in numbers for side in sides]
        yield slice(first, first + len(pack.chosen)), PairLogps(*columns)


def reduce_gradients(run: Run, now: bool) -> None:
    """Whether the next backward reduces gradients over processes, or adds them up here.

    With --sync step weights stay gathered meanwhile; with --replicate it is the reduction over
    copies of the model that waits.
    """
    if not weights.is_sharded(run.policy):
        return
    if run.cfg.sync == "step":
        run.policy.set_requires_gradient_sync(now)
        run.policy.set_reshard_after_backward(now)
    else:
        run.policy.set_requires_all_reduce(now)


def score(model: InternVL, pack: Pack, cfg: TrainConfig) -> tuple[Tensor, Tensor]:
    """(sums of log-probs, token counts) of the pack's responses, each (response) float32.

    Only the scored positions reach the vocabulary, in chunks that backward recomputes.
    """

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # (1 T d), (vocab d)
        rows = hidden[0, pack.predictor]
        logps = losses.row_logps(rows, weight, pack.target, cfg.head_rows)
        return losses.sum_by_response(logps, pack.response, pack.num_responses)

    compiled = switched_on(cfg.compile, pack.tree.device)
    if pack.tiles is None and weights.is_sharded(model):
        # No prompt shows these tiles: with them every process gathers the ViT's blocks, as FSDP
        # wants it.  Two, since torch.compile treats a batch of one apart, of the size compiled for.
        size = model.config.tile_size if compiled else 2 * model.config.vision.patch_size
        tiles = pack.tree.new_zeros((2, 3, size, size), dtype=torch.uint8)
        pack = replace(pack, tiles=tiles, tile_order=pack.tree.new_zeros(0))
    if pack.tree.is_cuda:  # one shape for all packs: kernels are compiled once
        pack = pack.padded(-(-cfg.pack_tokens // 128) * 128)
    attend = TreeAttention(pack.tree, pack.branch)
    return model(pack.input_ids, pack.tiles, pack.positions, attend, head, pack.tile_order)


def gather(run: Run, step: Step, scored: Iterable[tuple[slice, PairLogps]]) -> PairLogps:
    """All pairs of the step on every process, in the order of the plan.

    Each writes its own columns into zeros; adding zeros is exact, so the result does not depend on
    the number of processes.
    """
    table = torch.zeros(6 if run.reference else 4, len(step.pairs), device=run.device)
    for place, logps in scored:
        table[:, place] = torch.stack([x.detach() for x in vars(logps).values() if x is not None])
    dist.all_reduce(table)
    references = table[2:4] if run.reference else (None, None)
    return PairLogps(*table[:2], *references, *table[-2:])


# --------------------------------------------------------------------------- one step: its update


def lr_at(step: int, total: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then cosine or constant and linear to 0; step counts from 0."""
    warm = math.ceil(cfg.warmup if cfg.warmup > 1 else cfg.warmup * total)
    if step < warm:
        return cfg.lr * step / warm
    if cfg.decay >= 0:
        return cfg.lr * min(1.0, (total - step) / (cfg.decay + 1))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def clip_gradient(run: Run) -> float:
    """Scale the gradient down to max_grad_norm (0 = leave it); returns its norm before."""
    for p in run.policy.parameters():  # of the ViT, in a step without an image
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    limit = run.cfg.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), limit)
    return weights.whole(norm).item()


class Diverged(Failure):
    """A loss or gradient that is no number; out_dir/failed-step-N.json tells of it."""


def check_finite(run: Run, step: Step, logps: PairLogps, norm: float) -> None:
    """Non-finite numbers are never trained on: name the step and its records, and stop."""
    loss, number = objective(run.terms, logps, **run.hyper)[0], step.number + 1
    names = [pair.name for pair in step.pairs]
    bad = [name for name, finite in zip(names, loss.isfinite().tolist()) if not finite]
    if not bad and math.isfinite(norm):
        return
    problem = f"loss is {loss.mean().item()}" if bad else f"gradient norm is {norm}"
    path, records = run.cfg.out_dir / f"failed-step-{number}.json", bad or names
    if is_main():
        write_json(path, {"step": number, "what": problem, "records": records})
    raise Diverged(f"{problem} at step {number}; records: {'; '.join(records[:4])}; all in {path}")


# --------------------------------------------------------------------------- what a step says


def step_metrics(run: Run, logps: PairLogps, pairs: list[PairRecord]) -> dict[str, float]:
    """Means over the pairs: the loss, each term's, losses.pair_metrics; some of each data set."""
    sets = [pair.data_set for pair in pairs]
    total, parts = objective(run.terms, logps, **run.hyper)
    columns = {"loss": total} | {f"loss/{name}": value for name, value in parts.items()}
    for name, value in losses.pair_metrics(logps, run.cfg.beta).items():
        if not (run.data.only_chosen and name.endswith("/rejected")):
            columns[name] = value
    metrics = {name: column.mean().item() for name, column in columns.items()}
    for data_set in sorted(set(sets)):
        rows = torch.tensor([name == data_set for name in sets], device=total.device)
        metrics[f"sets/{data_set}/pairs"] = int(rows.sum())
        for name in ("rewards/accuracy", "nll"):
            if name in columns:
                metrics[f"sets/{data_set}/{name}"] = columns[name][rows].mean().item()
    return metrics


def score_heldout(run: Run) -> dict[str, float]:
    """The metrics of all held-out pairs under the policy as it stands; nothing is trained."""
    scored, pairs, counts = [], [], Counter()
    numbers = range(run.heldout.steps_per_epoch)
    for step in prefetch(run.heldout.step(n, *rank_and_world()) for n in numbers):
        counts.update(step.counts)
        pairs += step.pairs
        if step.pairs:
            with scoring(run.policy):
                scored.append(vars(score_step(run, step)).values())
    columns = [None if part[0] is None else torch.cat(part) for part in zip(*scored)]
    metrics = step_metrics(run, PairLogps(*columns), pairs)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    say(f"held out: loss {metrics['loss']:.4g}; {told}")
    return {f"heldout/{name}": value for name, value in (metrics | counts).items()}


def best_row(rows: list[dict[str, float]]) -> dict[str, float] | None:
    """The row of the highest held-out accuracy; of equal ones, and for SFT, the lowest loss."""
    scored = sorted((r for r in rows if "heldout/loss" in r), key=lambda r: r["heldout/loss"])
    return max(scored, key=lambda r: r.get("heldout/rewards/accuracy", 0.0), default=None)


# --------------------------------------------------------------------------- command line

_STOP: list[float] = []


def ask_to_stop(number: int, frame: Any) -> None:
    """SIGTERM or Ctrl-C: save after this step and end; asked again later, end at once."""
    if _STOP and time.monotonic() - _STOP[0] > 2:  # torchrun sends a Ctrl-C once more
        raise KeyboardInterrupt
    _STOP.append(time.monotonic())


def asked_to_stop() -> bool:
    """Whether any process was asked; all of them learn it at the same step."""
    return not runtime.all_of(not _STOP)


@contextlib.contextmanager
def in_group(seed: int) -> Iterator[torch.device]:
    """This process's device in the group.  A signal asks it to stop; a dead peer is reported."""
    try:
        with runtime.process_group(seed) as device:
            signal.signal(signal.SIGTERM, ask_to_stop)
            signal.signal(signal.SIGINT, ask_to_stop)
            yield device
    except RuntimeError as error:
        from_peers = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if not from_peers or rank_and_world()[1] == 1:
            raise
        told = "another process has died or does not answer; its message says why"
        raise Failure(f"{told}; the same command continues from the newest checkpoint") from None


def main() -> None:
    cfg = runtime.parse_cli(TrainConfig)
    own = []
    if cfg.mine:
        from tools.lab import register_file  # noqa: PLC0415  (a user's own objectives)

        own = register_file(cfg.mine, [cfg.loss])
    if cfg.loss != "all":
        parse_objective(cfg.loss)  # a typing mistake is told before anything is started
    if cfg.plan or cfg.bench:
        from tools.bench import plan_or_bench  # noqa: PLC0415

        return plan_or_bench(cfg)
    with in_group(cfg.seed) as device:
        if cfg.loss == "all":
            from tools.sweep import train_rows  # noqa: PLC0415

            train_rows(cfg, own, device)
        else:
            train(cfg, device)


if __name__ == "__main__":
    runtime.run(main)
