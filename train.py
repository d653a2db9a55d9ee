"""Mixed Preference Optimization of InternVL2 (arXiv:2411.10442, section 4), on any number of GPUs.

    torchrun --standalone --nproc_per_node=8 train.py --model_dir weights/InternVL2-8B \\
        --meta MMPR/meta.json --out_dir runs/mpo
    python train.py --config toy/train.json           the same on a laptop
    python train.py --plan --size 8b --gpus 8         what it needs a GPU, without weights
    python train.py --bench --size 8b                 what each idea below saves

Reads top to bottom as the algorithm: shard the policy, get the reference's log-probs, and for each
step score the packs of a global batch, weigh the objectives, clip, update, log.  Every loss is a
mean over the pairs of the global batch, so 1 process x 8 packs, 2 x 4 and 8 x 1 are one update.

Differs from the official trainer_dpo.py: prompt and image are encoded once per pair, not four
times; the loss does not depend on how pairs fall on processes; BCO's shift is updated once a step,
after use, and is part of the checkpoint (losses.py says why); weight decay spares vectors.
"""

import hashlib
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from tqdm import tqdm

from bench import (
    Load,
    Plan,
    bench,
    device_peak,
    example_pack,
    example_trees,
    flops,
    load_of,
    make_plan,
    meta_model,
    total_flops,
    units_of,
)
from data import Pack, PairData, Tree, prefetch, read_meta, response_keys, seeded
from losses import (
    BcoShift,
    PairLogps,
    Terms,
    bco_rewards,
    blend,
    check_hyperparameters,
    coefficients,
    needs_reference,
    objective,
    pair_metrics,
    parse_objective,
    response_logps,
    sum_by_response,
    whole_step,
)
from model import Attend, InternVL, InternVLConfig, TreeAttention, load_config, named_config
from runtime import (
    AppendLog,
    InputError,
    MetricsLog,
    Process,
    alone_in,
    config_json,
    flag,
    parse_cli,
    read_whole_lines,
    run,
    start_process,
    stop_process,
    write_atomic,
)
from tokenizer import load_tokenizer
from weights import (
    CheckpointWriter,
    all_of,
    checkpoint_state,
    empty_model,
    load_checkpoint,
    load_weights,
    local,
    local_rows,
    named_tensors,
    newest_checkpoint,
    official_name,
    save_model,
    weight_files,
    whole,
)

LOCK_SECONDS = 20
SCORING_VERSION = "1"  # raise it when a change moves log-probs: cached ones are refused then


@dataclass(frozen=True)
class TrainConfig:
    """Train InternVL2 on preference pairs.  The defaults are the paper's 8B run."""

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder in the official layout")
    meta: Path = flag(Path("MMPR/meta.json"), "MMPR's meta.json: the preference data")
    out_dir: Path = flag(Path("runs/mpo"), "metrics, checkpoints and the final model go here")
    loss: str = flag(
        "mpo", "weighted sum as 0.8*dpo+0.2*bco+sft, or a preset; all = the paper's rows"
    )
    mine: Path = flag(Path(""), "Python file with objectives of your own")
    beta: float = flag(0.1, "KL coefficient")
    label_smoothing: float = flag(-1.0, "for cdpo and robust; -1 = the objective's default")
    bco_shift: Literal["on", "off"] = flag("on", "off: the shift stays 0, as in TRL 1.16")
    reference: Literal["cached", "online"] = flag("cached", "scored once, or a second model")
    reference_cache: Path = flag(
        Path(""), "folder to share between runs; default out_dir/reference"
    )
    reference_update_every: int = flag(0, "TR-DPO: steps between updates of the reference; 0 = off")
    reference_update_mix: float = flag(0.9, "TR-DPO: share of the policy in an update; 1 = hard")
    lr: float = flag(5e-6, "peak learning rate")
    lr_vision: float = flag(1.0, "times lr for the ViT; 0 = frozen")
    lr_projector: float = flag(1.0, "times lr for the projector; 0 = frozen")
    lr_language: float = flag(1.0, "times lr for the language model; 0 = frozen")
    warmup: float = flag(0.05, "share of the steps with rising rate; above 1: their number")
    decay: int = flag(-1, "last steps with falling rate, constant before; -1 = cosine to 0")
    weight_decay: float = flag(0.05, "AdamW's, for matrices")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; 0 = off")
    batch_size: int = flag(256, "pairs a step, over all processes")
    epochs: int = flag(1, "passes over the data")
    max_steps: int = flag(0, "stop the schedule here; 0 = all epochs")
    limit: int = flag(0, "use only this many pairs of the epoch's order; 0 = all")
    drop_path: float = flag(0.1, "stochastic depth in the policy's ViT")
    pack_tokens: int = flag(8192, "tokens of one forward pass, prompts and responses packed")
    max_length: int = flag(6144, "tokens of prompt + response, at most")
    max_tiles: int = flag(0, "tile limit where meta.json gives none; 0 = the model's")
    overlong: Literal["drop", "fewer_tiles", "error"] = flag("drop", "what a too long record gets")
    pairs_per_prompt: int = flag(1, "pairs of one question trained as one tree, at most")
    share_prefix: bool = flag(True, "compute a prompt once for all its responses")
    share_images: bool = flag(True, "encode an image once a pack")
    head_rows: int = flag(128, "scored tokens that meet the vocabulary at once; 0 = all, kept")
    recompute: Literal["full", "selective", "off"] = flag(
        "full", "of a block, keep for backward: its input, narrow products and attention, all"
    )
    compile: bool = flag(False, "torch.compile each block")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "compute; auto = bf16 on GPU, else fp32")
    state_dtype: Literal["fp32", "bf16"] = flag(
        "fp32", "weights, gradients and AdamW's moments; bf16 rounds at random: half the memory"
    )
    lora_rank: int = flag(0, "train only adapters of this rank; 0 = train the weights")
    lora_alpha: float = flag(32.0, "adapters count alpha / rank times")
    lora_parts: Literal["language", "vision", "both"] = flag("language", "blocks with adapters")
    replicate: int = flag(1, "groups of GPUs with a whole copy each, sharded within (HSDP)")
    save_every: int = flag(200, "steps between checkpoints")
    keep: int = flag(2, "checkpoints kept")
    async_save: Literal["auto", "on", "off"] = flag(
        "auto", "write checkpoints while training goes on; auto = beside a GPU"
    )
    seed: int = flag(42, "order of the data, stochastic depth")
    gpu_memory: float = flag(0.0, "GB a GPU has; 0 = ask the device")
    plan: bool = flag(False, "only print what a run would need a GPU, without weights")
    bench: bool = flag(False, "only measure a step, with each idea switched on in turn")
    size: Literal["", "8b", "2b", "toy"] = flag("", "for --plan and --bench: instead of model_dir")
    gpus: int = flag(1, "for --plan")

    def __post_init__(self) -> None:
        positive = "lr beta batch_size epochs pack_tokens save_every keep pairs_per_prompt gpus"
        for name in [*positive.split(), "replicate"]:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.drop_path < 1 or self.warmup < 0 or self.decay < -1:
            raise ValueError("drop_path must be in [0, 1), warmup >= 0 and decay >= -1")
        if self.state_dtype == "bf16" and self.dtype == "fp32":
            raise ValueError("state_dtype bf16 computes in bf16; dtype fp32 needs fp32 weights")
        if self.lora_rank < 0 or self.head_rows < 0:
            raise ValueError("lora_rank and head_rows must be >= 0")
        if min(self.lr_vision, self.lr_projector, self.lr_language) < 0:
            raise ValueError("lr_vision, lr_projector and lr_language must be >= 0")


# flags that may differ between a run and its continuation
FREE_FLAGS = set(
    """out_dir reference_cache save_every keep async_save compile recompute head_rows model_dir
    replicate gpu_memory plan bench size gpus""".split()
)


# --------------------------------------------------------------------------- models


def sharded_model(
    cfg: TrainConfig, process: Process, drop_path: float, trained: bool = True
) -> InternVL:
    """The model of cfg.model_dir, FSDP-sharded block by block, weights streamed into the shards.

    Parameters are fp32 for the policy; compute is cfg.dtype, gradients are reduced in fp32.
    """
    dtype = state_dtype(cfg) if trained else torch.float32  # TR-DPO's small steps need float32
    model = prepare(empty_model(cfg.model_dir, drop_path).to(dtype), cfg, trained)
    shard(model, cfg, process)
    model.to_empty(device=process.device)
    load_weights(model, cfg.model_dir)
    start_adapters(model, cfg)
    return model.train(trained)


def state_dtype(cfg: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if cfg.state_dtype == "bf16" else torch.float32


def shard(model: InternVL, cfg: TrainConfig, process: Process) -> None:
    """FSDP over the processes: each block is gathered alone, all the rest together."""
    mesh = make_mesh(cfg, process)
    precision = MixedPrecisionPolicy()
    if compute_dtype(cfg, process.device) is torch.bfloat16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in units_of(model):
        if cfg.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def prepare(model: InternVL, cfg: TrainConfig, trained: bool = True) -> InternVL:
    """What is trained, and what is computed again in backward."""
    for name in PARTS:
        getattr(model, name).requires_grad_(trained and name in trained_parts(cfg))
    if cfg.lora_rank and trained:
        add_adapters(model, cfg)
    for block in units_of(model):
        block.recompute = trained and cfg.recompute == "full"
        if trained and cfg.recompute == "selective":
            block.forward = partial(keep_some, block.forward)
    return model


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def keep_some(forward: Callable, *inputs: Any) -> Tensor:
    """A block's forward that keeps attention, and products no wider than their input."""
    if not torch.is_grad_enabled():
        return forward(*inputs)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        narrow = op in PRODUCTS and args[-1].shape[1] <= args[-1].shape[0]
        keep = narrow or op in ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


# --------------------------------------------------------------------------- adapters


class LoraLinear(nn.Linear):
    """A frozen linear layer plus a trained product of low rank (arXiv:2106.09685)."""

    on = True

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if not self.on:
            return out
        return out + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_adapters(model: InternVL, cfg: TrainConfig) -> None:
    """Give every linear layer of the chosen blocks an adapter; only adapters are trained."""
    for part in ("language_model", "vision_model"):
        if cfg.lora_parts not in ("both", part.removesuffix("_model")):
            continue
        for name, m in getattr(model, part).named_modules():
            if type(m) is nn.Linear and "layers." in name:
                m.__class__, m.scale = LoraLinear, cfg.lora_alpha / cfg.lora_rank
                rows, cols = m.weight.shape
                m.lora_down = nn.Parameter(m.weight.new_empty(cfg.lora_rank, cols))
                m.lora_up = nn.Parameter(m.weight.new_empty(rows, cfg.lora_rank))


def adapters(model: InternVL) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


@torch.no_grad()
def start_adapters(model: InternVL, cfg: TrainConfig) -> None:
    """Noise below, zeros above: the start is the model itself, for any number of processes."""
    for name, m in adapters(model).items():
        noise = seeded(cfg.seed, "lora", name).standard_normal(tuple(m.lora_down.shape))
        noise = torch.from_numpy(noise) / m.in_features**0.5
        local(m.lora_down).copy_(noise[local_rows(m.lora_down)])
        local(m.lora_up).zero_()


@torch.no_grad()
def merge_adapters(model: InternVL) -> None:
    """Add what was learned to the weights, each process to its own rows."""
    for m in adapters(model).values():
        learned = m.scale * whole(m.lora_up).float() @ whole(m.lora_down).float()
        local(m.weight).add_(learned[local_rows(m.weight)])
        m.on = False


class BareReference:
    """The policy with its adapters off is the reference: no second model."""

    def __init__(self, policy: InternVL) -> None:
        self.policy = policy

    @torch.no_grad()
    def __call__(self, pack: Pack, cfg: TrainConfig, process: Process) -> Tensor:
        layers = adapters(self.policy).values()
        for m in layers:
            m.on = False
        self.policy.eval()
        sums = score(self.policy, pack, cfg)[0]
        self.policy.train()
        for m in layers:
            m.on = True
        return sums


# --------------------------------------------------------------------------- processes


def make_mesh(cfg: TrainConfig, process: Process) -> DeviceMesh:
    """One dimension, shard; with --replicate two: (copy of the model, shard)."""
    if process.world % cfg.replicate:
        raise InputError(
            f"{process.world} processes do not divide into --replicate {cfg.replicate} groups"
        )
    if cfg.replicate == 1:
        return init_device_mesh(process.device.type, (process.world,))
    shape = (cfg.replicate, process.world // cfg.replicate)
    return init_device_mesh(process.device.type, shape, mesh_dim_names=("replicate", "shard"))


def compute_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype:
    if cfg.state_dtype == "bf16":
        return torch.bfloat16  # no float32 weights are there to compute with
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32


def part_rates(cfg: TrainConfig) -> dict[str, float]:
    """Part of the model -> its learning rate as a multiple of lr."""
    return {
        "vision_model": cfg.lr_vision,
        "projector": cfg.lr_projector,
        "language_model": cfg.lr_language,
    }


PARTS = ("vision_model", "projector", "language_model")


def trained_parts(cfg: TrainConfig) -> set[str]:
    """Parts whose own weights are trained."""
    return {part for part, scale in part_rates(cfg).items() if scale > 0 and not cfg.lora_rank}


def make_optimizer(cfg: TrainConfig, policy: InternVL, process: Process) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999, 1e-8); matrices decay, vectors do not."""
    groups = []
    for part, scale in part_rates(cfg).items():
        trained = [p for p in getattr(policy, part).parameters() if p.requires_grad]
        for decay, chosen in (
            (cfg.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "scale": scale})
    if not groups:
        raise InputError("nothing to train: lr_vision, lr_projector and lr_language are all 0")
    how = {"lr": cfg.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if cfg.state_dtype == "bf16":
        return RandomRoundingAdamW(groups, **how, seed=cfg.seed)
    return torch.optim.AdamW(groups, **how, fused=True)


class RandomRoundingAdamW(torch.optim.AdamW):
    """AdamW on bfloat16 weights and moments, computed in float32, a piece at a time.

    bfloat16 has 8 bits: at lr 5e-6 rounding to nearest would lose every update of a weight above
    0.003, and the second moment's decay of 0.1 %.  Rounding up or down at random, by how near each
    is, keeps them on average.  The draws are a function of (seed, step, tensor, shard).
    """

    PIECE = 1 << 24

    def __init__(self, groups: list[dict], *, seed: int, **how: Any) -> None:
        super().__init__(groups, **how)
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.update(p, group, (number, index))

    def update(self, p: Tensor, group: dict, place: tuple[int, int]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.tensor(0.0)}
            state |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        t = int(state["step"].item())
        shard_number = p.device_mesh.get_coordinate()[-1] if isinstance(p, DTensor) else 0
        w, grad, mean, square = (
            local(x).view(-1) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
        )
        generator = torch.Generator(w.device)
        key = (self.seed, "rounding", t, place, shard_number)
        generator.manual_seed(int(seeded(*key).integers(2**62)))
        for i in range(0, len(w), self.PIECE):
            at = slice(i, i + self.PIECE)
            g = grad[at].float()
            m = mean[at].float().lerp(g, 1 - b1)
            v = square[at].float() * b2 + (1 - b2) * g * g
            update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
            new = w[at].float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
            for kept, exact in ((w, new), (mean, m), (square, v)):
                kept[at] = round_at_random(exact, generator)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up with the chance that makes the mean exact."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).bfloat16()


def lr_at(step: int, total: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then cosine or constant and linear to 0; step counts from 0."""
    warm = math.ceil(cfg.warmup if cfg.warmup > 1 else cfg.warmup * total)
    if step < warm:
        return cfg.lr * step / warm
    if cfg.decay >= 0:
        return cfg.lr * min(1.0, (total - step) / (cfg.decay + 1))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


# --------------------------------------------------------------------------- scoring


def score(
    model: InternVL, pack: Pack, cfg: TrainConfig, attend: Attend | None = None
) -> tuple[Tensor, Tensor]:
    """(sums of log-probs, token counts) of the pack's responses, each (response) float32.

    Only the scored positions reach the vocabulary, in chunks that backward recomputes.
    """

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:  # (1 T d), (vocab d)
        rows = hidden[0, pack.predictor]
        if not cfg.head_rows:  # the readable way: all logits at once, kept for backward
            logps = (rows @ weight.T).float().log_softmax(-1)
            logps = logps.gather(-1, pack.target[:, None])[:, 0]
            return sum_by_response(logps, pack.response, pack.num_responses)
        return response_logps(
            rows, weight, pack.target, pack.response, pack.num_responses, cfg.head_rows
        )

    return model(
        pack.input_ids,
        pack.tiles,
        positions=pack.positions,
        attend=attend or TreeAttention(pack.tree, pack.branch),
        head=head,
        tile_order=pack.tile_order,
        always_vision=True,
    )


def pair_up(pack: Pack, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> PairLogps:
    """Scores of responses -> scores of pairs.  Without rejected responses their fields are 0."""
    none = torch.zeros(len(pack.chosen), device=policy.device)
    rejected = pack.rejected if len(pack.rejected) else None
    return PairLogps(
        policy[pack.chosen],
        none if rejected is None else policy[rejected],
        None if reference is None else reference[pack.chosen],
        None if reference is None else none if rejected is None else reference[rejected],
        lengths[pack.chosen],
        none + 1 if rejected is None else lengths[rejected],
    )


BLANK = "blank"


def blank_tree(like: list[Tree]) -> list[Tree]:
    """A stand-in for a process that has fewer packs than others: same collectives, weight 0."""
    t = like[0]
    return [Tree(t.trunk[:1], [[t.responses[0][-1]]], [0], [], [], [], [BLANK])]


# --------------------------------------------------------------------------- the reference


class OnlineReference:
    """A second sharded model with the start weights; TR-DPO moves it."""

    def __init__(self, cfg: TrainConfig, process: Process) -> None:
        self.model = sharded_model(cfg, process, drop_path=0.0, trained=False)

    @torch.no_grad()
    def __call__(self, pack: Pack, cfg: TrainConfig, process: Process) -> Tensor:
        return score(self.model, pack, cfg)[0]

    @torch.no_grad()
    def move(self, policy: InternVL, mix: float) -> None:
        """reference <- mix * policy + (1 - mix) * reference, on each process's own rows."""
        self.model.reshard()  # its forward left the root's parameters gathered
        for mine, other in zip(self.model.parameters(), policy.parameters()):
            blend(local(mine), local(other), mix)


class CachedReference:
    """Log-probs of every response of the run under the start weights, scored once.

    A folder of append-only part files shared by all runs on the same start weights; `run.json`
    says what the numbers depend on, and another value there is refused.  `covers-*.json` marks
    runs of which every response is there.
    """

    def __init__(self, folder: Path, facts: dict[str, str], process: Process) -> None:
        self.folder, self.process = folder, process
        about = folder / "run.json"
        if process.is_main and not about.exists():
            write_atomic(about, json.dumps(facts, indent=1) + "\n")
        dist.barrier()
        try:
            found = json.loads(about.read_text())
        except ValueError as error:
            raise InputError(f"{about}: not valid JSON ({error}); delete {folder}") from None
        for name, value in facts.items():
            if found.get(name) != value:
                raise InputError(
                    f"{folder} was made with another {name} ({found.get(name)}, now {value}); pass "
                    "another --reference_cache, or delete that folder"
                )
        self.logps: dict[str, float] = {}

    @torch.no_grad()
    def fill(self, policy: InternVL, data: PairData, total: int, cfg: TrainConfig) -> None:
        """Score what is missing, with the policy before its first step: it is the reference.

        A run's steps are looked through once; its mark tells the next runs that nothing is missing.
        """
        self.mark = self.folder / f"covers-{data.digest(total)}.json"
        with alone_in(self.folder, self.process, math.inf, ""):
            self.read()  # another run may have scored them meanwhile
            marked = json.loads(self.mark.read_text())["responses"] if self.mark.exists() else None
            if self.process.broadcast(marked is None or marked > len(self.logps)):
                self.score_missing(policy, data, total, cfg)
                if self.process.is_main:
                    write_atomic(self.mark, json.dumps({"responses": len(self.logps)}) + "\n")

    def read(self) -> None:
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for record in read_whole_lines(part)[0]:
                self.logps[record["key"]] = record["logp"]
        dist.barrier()  # nobody appends before everybody has read

    def score_missing(self, policy: InternVL, data: PairData, total: int, cfg: TrainConfig) -> None:
        process, todo, seen = self.process, [], set(self.logps)
        for step in range(total):
            for pack in data.plan(step)[0]:
                keys = [key for tree in pack for key in response_keys(tree)]
                if not seen.issuperset(keys):
                    todo.append(pack)
                    seen.update(keys)
        rounds = -(-len(todo) // process.world)
        part = AppendLog(self.folder / f"part-{process.rank:03d}-of-{process.world:03d}.jsonl")
        policy.eval()
        quiet = not process.is_main or not todo
        bar = tqdm(range(rounds), "reference log-probs", unit="pack", disable=quiet)
        for i in bar:
            n = i * process.world + process.rank
            trees = todo[n] if n < len(todo) else blank_tree(todo[0])
            pack = data.build(trees).to(process.device)
            sums, lengths = score(policy, pack, cfg)
            if n < len(todo):
                for key, logp, length in zip(pack.keys, sums.tolist(), lengths.tolist()):
                    part.append({"key": key, "logp": logp, "length": int(length)})
        part.close()
        policy.train()
        policy.reshard()  # a forward without backward leaves the root's parameters gathered
        dist.barrier()
        self.read()

    def __call__(self, pack: Pack, cfg: TrainConfig, process: Process) -> Tensor:
        blank = pack.where == [BLANK]
        if not blank and not self.logps.keys() >= set(pack.keys):
            raise InputError(
                f"{self.folder} lacks log-probs of responses in {', '.join(pack.where)}: an image "
                f"has changed since they were scored; delete {self.mark} and start again"
            )
        logps = [0.0 if blank else self.logps[key] for key in pack.keys]
        return torch.tensor(logps, device=process.device)


Reference = OnlineReference | BareReference | CachedReference


def cache_facts(cfg: TrainConfig, process: Process) -> dict[str, str]:
    """What cached log-probs depend on besides each response's own key."""
    hashes: list[str] = [""]
    if process.is_main:
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(set(weight_files(cfg.model_dir).values())):
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "blake2b").digest())
        hashes = [digest.hexdigest()]
    dtype = compute_dtype(cfg, process.device)
    # in bfloat16 the shape of a pack moves single tokens by 0.01 to 0.1 nats, in float32 by 1e-6
    packing = f"{cfg.pack_tokens} {cfg.share_prefix} {cfg.share_images}"
    return {
        "weights": share_text(hashes[0], process),
        "config": hashlib.blake2b(repr(load_config(cfg.model_dir)).encode()).hexdigest()[:32],
        "dtype": str(dtype),
        "packing": packing if dtype is torch.bfloat16 else "any",
        "scoring": SCORING_VERSION,
    }


def share_text(text: str, process: Process) -> str:
    """Rank 0's ASCII text of 32 characters, on every rank."""
    codes = torch.tensor([ord(c) for c in text] or [0] * 32, device=process.device)
    dist.broadcast(codes, 0)
    return "".join(map(chr, codes.tolist()))


# --------------------------------------------------------------------------- one step


@dataclass
class Step:
    """What one process does in one step: packs with their place among the step's pairs."""

    number: int
    packs: list[tuple[Pack, int, int]]  # (pack, number of the pack, first pair), -1 for blanks
    pairs: int  # of the whole step, all processes
    load: Load  # likewise: tokens, tiles, ...
    dropped: list[str]
    where: list[str]  # (pair) record names


def make_step(data: PairData, number: int, process: Process) -> Step:
    """Plan the whole step, then build every world-th pack of it."""
    planned, dropped = data.plan(number)
    if not planned:
        raise InputError(f"step {number}: all records are longer than max_length ({dropped[0]})")
    firsts = [0, *accumulate(len(tree_pairs(pack)) for pack in planned)]
    mine = []
    for n in range(process.rank, -(-len(planned) // process.world) * process.world, process.world):
        real = n < len(planned)
        trees = planned[n] if real else blank_tree(planned[0])
        mine.append((data.build(trees), n, firsts[n] if real else -1))
    load = sum((load_of(pack, data.share_prefix, data.share_images) for pack in planned), Load())
    where = [name for pack in planned for name in tree_pairs(pack)]
    return Step(number, mine, firsts[-1], load, dropped, where)


def tree_pairs(pack: list[Tree]) -> list[str]:
    return [name for tree in pack for name in tree.where]


def forward_pack(
    policy: InternVL, reference: Reference | None, pack: Pack, cfg: TrainConfig, process: Process
) -> PairLogps:
    """Log-probs of the pack's pairs, with gradient where it is enabled."""
    pack = pack.to(process.device)
    fixed = reference(pack, cfg, process) if reference else None
    scored, lengths = score(policy, pack, cfg)
    return pair_up(pack, scored, fixed, lengths)


def seed_pack(cfg: TrainConfig, step: int, number: int) -> None:
    """Stochastic depth is a function of (seed, step, pack): the same for any process count."""
    torch.manual_seed(int(seeded(cfg.seed, "drop path", step, number).integers(2**62)))


def gather(
    scored: list[tuple[int, PairLogps]], step: Step, with_reference: bool, process: Process
) -> PairLogps:
    """All pairs of the step on every process, in the order of the plan.

    Each writes its own columns into zeros; adding zeros is exact, so the result does not depend on
    the number of processes.
    """
    names = [f.name for f in fields(PairLogps)]
    columns = dict(zip(names, torch.zeros(len(names), step.pairs, device=process.device)))
    if not with_reference:
        columns |= {"reference_chosen": None, "reference_rejected": None}
    for first, logps in scored:
        for name, column in columns.items():
            if column is not None and first >= 0:
                mine = getattr(logps, name).detach()
                column[first : first + len(mine)] = mine
    for column in columns.values():
        if column is not None:
            dist.all_reduce(column)
    return PairLogps(**columns)


def backward_step(
    step: Step,
    policy: InternVL,
    reference: Reference | None,
    terms: Terms,
    hyper: dict[str, float],
    cfg: TrainConfig,
    process: Process,
) -> PairLogps:
    """Add the step's gradient to the policy; returns the log-probs of all its pairs.

    FSDP averages gradients over processes, so each pack's share is scaled by their number.
    """
    pulls = None
    if whole_step(terms):  # the objective sorts over the step: score first, then pull each pair
        with torch.no_grad():
            scored = []
            for pack, number, first in step.packs:
                seed_pack(cfg, step.number, number)
                scored.append((first, forward_pack(policy, reference, pack, cfg, process)))
            pulls = coefficients(
                terms, gather(scored, step, reference is not None, process), **hyper
            )
    scored = []
    for pack, number, first in step.packs:
        seed_pack(cfg, step.number, number)
        logps = forward_pack(policy, reference, pack, cfg, process)
        if first < 0:
            loss = 0.0 * logps.policy_chosen.sum()
        elif pulls is None:
            total, _ = objective(terms, logps, **hyper)
            loss = total.sum() / step.pairs
        else:
            mine = slice(first, first + len(logps.policy_chosen))
            loss = (pulls[0][mine] * logps.policy_chosen).sum()
            loss = loss + (pulls[1][mine] * logps.policy_rejected).sum()
        if not torch.isfinite(loss):
            stop_at(step, f"loss is {loss.item()}", pack.where, cfg, process)
        (loss * process.world).backward()
        scored.append((first, logps))
    return gather(scored, step, reference is not None, process)


def stop_at(step: Step, what: str, where: list[str], cfg: TrainConfig, process: Process) -> None:
    """Non-finite numbers are never trained on: name the step and its records, and stop."""
    path = cfg.out_dir / f"failed-step-{step.number + 1}-rank-{process.rank}.json"
    write_atomic(path, json.dumps({"step": step.number + 1, "what": what, "records": where}))
    raise FloatingPointError(
        f"{what} at step {step.number + 1}; records: {'; '.join(where[:4])} ... all in {path}"
    )


def step_metrics(
    terms: Terms, logps: PairLogps, hyper: dict[str, float], beta: float
) -> dict[str, float]:
    """Means over the pairs of the step; the names of losses.pair_metrics and each term's."""
    total, parts = objective(terms, logps, **hyper)
    metrics = {"loss": total.mean().item()}
    metrics |= {f"loss/{name}": value.mean().item() for name, value in parts.items()}
    without = trains_only_chosen(terms)
    for name, value in pair_metrics(logps, beta).items():
        if not (without and name.split("/")[-1] in ("rejected", "margin", "accuracy")):
            metrics[name] = value.mean().item()
    return metrics


def check_start(terms: Terms, logps: PairLogps, hyper: dict[str, float], dtype: torch.dtype) -> str:
    """A fresh policy is its reference: every log-ratio is 0 and the loss is known beforehand."""
    for ratio, length in (
        (logps.chosen_logratio, logps.chosen_length),
        (logps.rejected_logratio, logps.rejected_length),
    ):
        # bfloat16 moves single tokens by up to 0.1 nats with the shape of a pack, up and down
        bound = 0.1 * length.sqrt() if dtype is torch.bfloat16 else 1e-5 * length
        if (excess := ratio.abs() / bound).max() > 1:
            worst = int(excess.argmax())
            raise RuntimeError(
                f"start check failed: a fresh policy is {ratio[worst]:.2e} nats off its reference "
                f"on a response of {int(length[worst])} tokens; at most {bound[worst]:.2e} can be "
                "rounding: the reference comes from other weights or another scoring"
            )
    same = replace(
        logps, reference_chosen=logps.policy_chosen, reference_rejected=logps.policy_rejected
    )
    total, parts = objective(terms, same, **hyper)
    words = " + ".join(f"{w:g} x {parts[n].mean().item():.4f} ({n})" for w, n in terms)
    return f"start check: rewards are 0 and the loss is {total.mean().item():.4f} = {words}"


# --------------------------------------------------------------------------- diagnosis


def diagnose(history: list[dict[str, float]], total: int) -> dict[str, str]:
    """Classic troubles that the metrics so far show: name -> one line of advice."""
    found, now, first = {}, history[-1], history[0]
    recent = history[-max(5, total // 20) :]
    if "rewards/margin" in now and len(history) >= 10:
        early = history[len(history) // 2]
        falling = now["rewards/chosen"] < min(-0.1, early["rewards/chosen"])
        if falling and now["rewards/margin"] > early["rewards/margin"] + 0.05:
            found["slide"] = (
                "the chosen reward falls while the margin grows: DPO's known slide; "
                "add +sft, or more of bco"
            )
        sure = all(m["rewards/accuracy"] == 1.0 for m in recent)
        if sure and len(history) <= max(10, total // 20):
            found["too easy"] = (
                "accuracy is 1.0 within 5 % of the run: chosen and rejected may differ by a "
                "surface mark (length, format); look with tools/look.py show"
            )
        warm = len(history) > max(3, total // 10)
        if warm and all(m["rewards/chosen"] == m["rewards/rejected"] == 0 for m in recent):
            found["stuck"] = "all log-ratios are 0 after warm-up: nothing is being trained"
    if len(history) >= 10 and now["nll"] > 1.2 * first["nll"] + 0.05:
        found["forgetting"] = (
            "the NLL of chosen responses has risen by more than 20 %: lower lr or add +sft"
        )
    return found


# --------------------------------------------------------------------------- checkpoints


def state_tensors(
    policy: InternVL, optimizer: torch.optim.Optimizer, reference: Reference | None, moving: bool
) -> dict[str, Tensor]:
    """All tensors of a run by name; AdamW's moments are made where there are none yet."""
    tensors = {}
    everything = {official_name(name): p for name, p in policy.named_parameters()}
    for name, p in everything.items():
        if p.requires_grad or not adapters(policy):
            tensors[f"model/{name}"] = p
        if not p.requires_grad:
            continue
        if not optimizer.state[p]:
            optimizer.state[p] = {
                # beside its parameter: the fused kernel reads it there, also on a GPU
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[p][moment]
    if moving:
        for name, p in named_tensors(reference.model).items():
            tensors[f"reference/{name}"] = p
    return tensors


def run_flags(cfg: TrainConfig) -> dict[str, str]:
    """The flags that a continuation must share with the run it continues."""
    free = FREE_FLAGS - ({"model_dir"} if cfg.lora_rank else set())  # adapters belong to weights
    if cfg.decay >= 0:  # a constant rate does not know the run's length: it may be prolonged
        free = free | {"max_steps", "epochs", "decay"}
    return {k: str(v) for k, v in asdict(cfg).items() if k not in free} | {
        "schedule": "constant" if cfg.decay >= 0 else "cosine"
    }


def restore(
    cfg: TrainConfig, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, shift: BcoShift
) -> int:
    """Continue from the newest complete checkpoint in out_dir; returns the steps done."""
    checkpoint = newest_checkpoint(cfg.out_dir / "checkpoints")
    if checkpoint is None:
        return 0
    saved = checkpoint_state(checkpoint)["flags"]
    changed = [k for k, v in run_flags(cfg).items() if saved.get(k) != v]
    if changed:
        raise InputError(
            f"{checkpoint} belongs to a run with other flags: "
            + ", ".join(f"{k} was {saved.get(k)}, now {run_flags(cfg)[k]}" for k in changed)
            + "; pass those flags, or another --out_dir"
        )
    state = load_checkpoint(checkpoint, tensors)
    shift.load_state_dict(state["bco_shift"])
    for p in optimizer.state:
        optimizer.state[p]["step"].fill_(state["step"])
    return state["step"]


# --------------------------------------------------------------------------- the plan


def plan_of(cfg: TrainConfig, config: InternVLConfig, shards: int, device: torch.device) -> Plan:
    """What a GPU needs for packs full of image tokens, found by running shapes alone."""
    dtype = compute_dtype(cfg, device)
    model = meta_model(config.with_drop_path(cfg.drop_path), dtype)
    prepare(model, cfg).train()
    scored = max(1, cfg.pack_tokens // 8)
    trees = example_trees(config, cfg.pack_tokens, (scored, scored))
    terms = parse_objective(cfg.loss if cfg.loss != "all" else "mpo")
    return make_plan(
        model,
        example_pack(config, trees, "meta"),
        lambda model, pack, attend: score(model, pack, cfg, attend),
        shards=shards,
        head_rows=cfg.head_rows,
        state_bytes=state_dtype(cfg).itemsize,
        second_model=cfg.reference == "online" and needs_reference(terms) and not cfg.lora_rank,
        flex=device.type == "cuda",
    )


def say_plan(
    cfg: TrainConfig, config: InternVLConfig, shards: int, device: torch.device, say: Callable
) -> None:
    """Print the plan; InputError with a way out where it exceeds the GPU's memory."""
    plan = plan_of(cfg, config, shards, device)
    say(plan)
    memory = cfg.gpu_memory * 1e9
    if not memory and device.type == "cuda" and not cfg.plan:
        memory = torch.cuda.get_device_properties(device).total_memory
    if not memory:
        return
    if plan.total <= memory:
        say(f"fits into {memory / 1e9:.4g} GB")
        return
    ways = {
        "--reference cached": {"reference": "cached"},
        "--recompute full": {"recompute": "full"},
        "--head_rows 128": {"head_rows": 128},
        f"--pack_tokens {cfg.pack_tokens // 2}": {"pack_tokens": cfg.pack_tokens // 2},
        "--lora_rank 16": {"lora_rank": cfg.lora_rank or 16},
    }
    smaller = {}
    for words, change in ways.items():
        if replace(cfg, **change) == cfg:
            continue
        cfg = replace(cfg, **change)
        smaller[words] = plan_of(cfg, config, shards, device).total
        if smaller[words] <= memory:
            break
    helped, fits = f"this would fit: {' '.join(smaller)}", min(smaller.values()) <= memory
    for more in () if fits else (2, 4, 8, 16, 32, 64):
        if plan_of(cfg, config, shards * more, device).total <= memory:
            helped = f"this would fit: {shards * more} GPUs a model copy, {' '.join(smaller)}"
            break
    else:
        if not fits:
            helped = "lower --pack_tokens far more, or take larger GPUs"
    raise InputError(
        f"the plan needs {plan.total / 1e9:.4g} GB a GPU and there are {memory / 1e9:.4g}; {helped}"
    )


def run_bench(cfg: TrainConfig, config: InternVLConfig) -> None:
    """Shapes alone for a model that does not fit here, and seconds of one that does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = {"head_rows": cfg.head_rows, "prepare": partial(prepare, cfg=cfg)}

    def scorer(model: InternVL, pack: Pack, attend: Attend | None = None) -> tuple[Tensor, Tensor]:
        return score(model, pack, cfg, attend)

    bench(config, scorer, torch.device("cuda"), torch.bfloat16, dry=True, **how)
    need = 3 * 2 * sum(p.numel() for p in meta_model(config, torch.bfloat16).parameters())
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2e9
    if need > memory:
        config = named_config("2b" if device.type == "cuda" else "toy")
        print(f"that is too large for this device; measured on a smaller model, {device}:")
    compile_too = cfg.compile or device.type == "cuda"
    dtype = compute_dtype(cfg, device)
    bench(config, scorer, device, dtype, dry=False, compile_too=compile_too, **how)


# --------------------------------------------------------------------------- the run


def open_data(cfg: TrainConfig, terms: Terms, process: Process) -> PairData:
    config = load_config(cfg.model_dir)
    if cfg.batch_size % process.world:
        raise InputError(
            f"batch_size {cfg.batch_size} does not divide by {process.world} processes; "
            "choose a multiple"
        )
    data = PairData(
        read_meta(cfg.meta, cfg.max_tiles or config.max_tiles),
        load_tokenizer(cfg.model_dir),
        config,
        batch_size=cfg.batch_size,
        pack_tokens=cfg.pack_tokens,
        max_length=cfg.max_length,
        seed=cfg.seed,
        overlong=cfg.overlong,
        only_chosen=trains_only_chosen(terms),
        share_images=cfg.share_images,
        share_prefix=cfg.share_prefix,
        pairs_per_prompt=cfg.pairs_per_prompt,
        limit=cfg.limit,
    )
    for number, data_set in enumerate(data.sets):
        drawn = int((data.order(0)[:, 0] == number).sum())
        process.say(f"data: {data_set.name}: {len(data_set)} records, {drawn} an epoch")
    return data


def trains_only_chosen(terms: Terms) -> bool:
    """SFT never looks at rejected responses: they are not even read into packs."""
    return all(name == "sft" for _, name in terms)


def make_reference(
    cfg: TrainConfig, terms: Terms, policy: InternVL, data: PairData, total: int, process: Process
) -> Reference | None:
    """The reference's log-probs: none needed, scored beforehand, or a second model."""
    moving = cfg.reference_update_every > 0
    if moving and not needs_reference(terms):
        raise InputError(f"reference_update_every is set but {cfg.loss} uses no reference")
    if moving and cfg.reference != "online":
        raise InputError(
            "a moving reference (--reference_update_every) cannot use cached log-probs: they are "
            "those of the start weights; pass --reference online"
        )
    if cfg.reference_update_every > total:
        raise InputError(
            f"reference_update_every {cfg.reference_update_every} exceeds the run's {total} steps: "
            "the reference would never move"
        )
    if not needs_reference(terms):
        return None
    if moving and cfg.lora_rank:
        raise InputError("a moving reference cannot be the policy without adapters: no --lora_rank")
    if cfg.reference == "online":
        return BareReference(policy) if cfg.lora_rank else OnlineReference(cfg, process)
    folder = cfg.reference_cache if str(cfg.reference_cache) != "." else cfg.out_dir / "reference"
    reference = CachedReference(folder, cache_facts(cfg, process), process)
    reference.fill(policy, data, total, cfg)
    return reference


def train(cfg: TrainConfig, process: Process) -> None:
    """One run in its folder; processes of a killed one may take a moment to end."""
    with alone_in(cfg.out_dir, process, LOCK_SECONDS, "pass another --out_dir"):
        train_in_folder(cfg, process)


def train_in_folder(cfg: TrainConfig, process: Process) -> None:
    """The whole run: data, policy, reference, the steps, the export."""
    terms = parse_objective(cfg.loss)
    smoothing = None if cfg.label_smoothing < 0 else cfg.label_smoothing
    hyper = check_hyperparameters(terms, cfg.beta, smoothing)
    data = open_data(cfg, terms, process)
    total = data.steps_per_epoch * cfg.epochs
    total = min(total, cfg.max_steps) if cfg.max_steps else total
    config = load_config(cfg.model_dir)
    say_plan(cfg, config, process.world // cfg.replicate, process.device, process.say)
    peak, origin = device_peak(process.device, compute_dtype(cfg, process.device))
    process.say(f"MFU is of {peak / 1e12:.3g} TFLOP/s a process ({origin})")

    policy = sharded_model(cfg, process, cfg.drop_path)
    optimizer, shift = make_optimizer(cfg, policy, process), BcoShift()
    reference = make_reference(cfg, terms, policy, data, total, process)
    tensors = state_tensors(policy, optimizer, reference, cfg.reference_update_every > 0)
    done = restore(cfg, tensors, optimizer, shift)
    if done:
        process.say(f"continuing after step {done}")
    if process.is_main:
        write_atomic(cfg.out_dir / "config.json", config_json(cfg))
    background = (
        process.device.type == "cuda" if cfg.async_save == "auto" else cfg.async_save == "on"
    )
    writer = CheckpointWriter(cfg.out_dir / "checkpoints", cfg.keep, background)
    log = MetricsLog(cfg.out_dir, process, total, done)
    history, told = log.kept, set()

    began = time.perf_counter()
    for step in prefetch(lambda n: make_step(data, n, process), range(done, total)):
        lr = lr_at(step.number, total, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        used = {**hyper, "bco_shift": shift.mean if cfg.bco_shift == "on" else 0.0}
        logps = backward_step(step, policy, reference, terms, used, cfg, process)
        norm = clip_gradient(policy, cfg.max_grad_norm)
        if not math.isfinite(norm):
            stop_at(step, f"gradient norm is {norm}", step.where, cfg, process)
        if step.number == 0 and reference and cfg.drop_path == 0:
            process.say(check_start(terms, logps, used, compute_dtype(cfg, process.device)))
        optimizer.step()
        optimizer.zero_grad()
        if reference:
            shift.update(*bco_rewards(logps, cfg.beta).tolist())
        if cfg.reference_update_every and (step.number + 1) % cfg.reference_update_every == 0:
            reference.move(policy, cfg.reference_update_mix)

        metrics = step_metrics(terms, logps, used, cfg.beta)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        metrics |= {"bco_shift": used["bco_shift"], "lr": lr, "grad_norm": norm}
        metrics |= {"pairs": step.pairs, "tokens": step.load.tokens, "dropped": len(step.dropped)}
        metrics |= {"tokens_per_s": step.load.tokens / seconds, "pairs_per_s": step.pairs / seconds}
        metrics["mfu"] = step_flops(step, config, cfg, reference) / (seconds * peak * process.world)
        log(step.number + 1, metrics, SHOWN)
        for name in step.dropped:
            process.say(f"dropped, longer than max_length {cfg.max_length}: {name}")
        history.append(metrics)
        for name, advice in diagnose(history, total).items():
            if name not in told:
                told.add(name)
                process.say(f"diagnosis at step {step.number + 1}: {advice}")

        last, stop = step.number + 1 == total, asked_to_stop()
        if last or stop or (step.number + 1) % cfg.save_every == 0:
            state = {"flags": run_flags(cfg), "bco_shift": shift.state_dict()}
            writer.save(step.number + 1, tensors, state)
        writer.settle()
        if stop and not last:
            writer.finish()
            process.say(f"asked to stop: saved step {step.number + 1}; the same command continues")
            log.close()
            return
    writer.finish()
    log.close()
    merge_adapters(policy)
    save_model(policy, cfg.out_dir / "model", like=cfg.model_dir)
    process.say(f"saved {cfg.out_dir / 'model'}: read back and equal to the trained policy")


SHOWN = "loss rewards/margin rewards/accuracy nll lr grad_norm tokens_per_s mfu".split()


def step_flops(
    step: Step, config: InternVLConfig, cfg: TrainConfig, reference: Reference | None
) -> int:
    """Useful FLOPs of a step, all processes: the policy's, and an online reference's forward."""
    parts = flops(config, step.load, trained_parts(cfg))
    online = isinstance(reference, (OnlineReference, BareReference))
    return total_flops(parts) + online * total_flops(parts, backward=False)


def clip_gradient(policy: InternVL, max_norm: float) -> float:
    """Scale the gradient down to max_norm (0 = leave it); returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# --------------------------------------------------------------------------- all rows at once

# Tables 6 and 7 of the paper.  It gives beta 0.1 and nothing else per row: label smoothing 0.1 for
# cDPO and RobustDPO, and TR-DPO's period and mix (TRL 0.10's), are our choice.
ROWS: dict[str, dict[str, Any]] = {
    "SFT": {"loss": "sft"},
    "DPO": {"loss": "dpo"},
    "RSO": {"loss": "rso"},
    "IPO": {"loss": "ipo"},
    "cDPO": {"loss": "cdpo", "label_smoothing": 0.1},
    "RobustDPO": {"loss": "robust", "label_smoothing": 0.1},
    "BCO": {"loss": "bco"},
    "SPPO": {"loss": "sppo"},
    "AOT": {"loss": "aot"},
    "TR-DPO": {"loss": "dpo", "reference": "online", "reference_update_every": 64},
    "ORPO": {"loss": "orpo"},
    "DPO+": {"loss": "dpo+sft"},
    "cDPO+": {"loss": "cdpo+sft", "label_smoothing": 0.1},
    "RobustDPO+": {"loss": "robust+sft", "label_smoothing": 0.1},
    "BCO+": {"loss": "bco+sft"},
    "AOT+": {"loss": "aot+sft"},
    "MPO": {"loss": "mpo"},
}


def train_all(cfg: TrainConfig, mine: list[str], process: Process) -> None:
    """Every row from the same start and one reference cache; a table and a PNG of the curves."""
    total = open_data(replace(cfg, loss="dpo"), parse_objective("dpo"), process).steps_per_epoch
    total = min(total * cfg.epochs, cfg.max_steps or math.inf)
    cache = cfg.reference_cache if str(cfg.reference_cache) != "." else cfg.out_dir / "reference"
    curves: dict[str, list[dict]] = {}
    for name, flags in (ROWS | {name: {"loss": name} for name in mine}).items():
        flags = dict(flags)
        if (every := flags.get("reference_update_every", 0)) > total:
            flags["reference_update_every"] = max(1, total // 4)
            process.say(f"{name}: updates every {total // 4} steps, since {every} would never come")
        row = replace(cfg, out_dir=cfg.out_dir / name, reference_cache=cache, **flags)
        process.say(f"=== {name}: --loss {row.loss}")
        train(row, process)
        curves[name] = read_whole_lines(row.out_dir / "metrics.jsonl")[0]
    if process.is_main:
        print(table_of_rows(curves))
        write_atomic(cfg.out_dir / "rows.png", draw_rows(curves))
        process.say(f"curves: {cfg.out_dir / 'rows.png'}")


COLUMNS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "nll",
)


def table_of_rows(curves: dict[str, list[dict]]) -> str:
    """Metrics of the last step, one line a row; - where a row has no such number."""
    lines = ["row         " + "".join(f"{name.split('/')[-1]:>10}" for name in COLUMNS)]
    for name, curve in curves.items():
        cells = (curve[-1].get(column) for column in COLUMNS)
        lines.append(
            f"{name:<12}" + "".join("         -" if c is None else f"{c:>10.3f}" for c in cells)
        )
    return "\n".join(lines)


def draw_rows(curves: dict[str, list[dict]]) -> bytes:
    """PNG: a panel a metric, a line a row."""
    import matplotlib  # noqa: PLC0415  (a run that draws nothing does not need it)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    shown = ("rewards/margin", "rewards/chosen", "nll", "rewards/accuracy")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True)
    colours = plt.get_cmap("tab20").colors
    for axis, metric in zip(axes.flat, shown):
        for colour, (name, curve) in zip(colours, curves.items()):
            points = [(r["step"], r[metric]) for r in curve if metric in r]
            if points:
                axis.plot(*zip(*points), label=name, color=colour, linewidth=1.3)
        axis.set_title(metric)
        axis.grid(alpha=0.3)
        if metric != "rewards/accuracy":
            axis.set_yscale("symlog", linthresh=1)
    axes[0, 0].legend(fontsize=7, ncol=3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


# --------------------------------------------------------------------------- command line


_STOP: list[int] = []


def asked_to_stop() -> bool:
    """Whether any process got SIGTERM; all of them learn it at the same step."""
    return not all_of(not _STOP)


def main() -> None:
    cfg = parse_cli(TrainConfig)
    mine = []
    if str(cfg.mine) != ".":
        from tools.mine import register_file  # noqa: PLC0415  (the second ring)

        mine = register_file(cfg.mine)
    if cfg.loss != "all":
        parse_objective(cfg.loss)  # a typing mistake is told before anything is started
    if cfg.plan or cfg.bench:
        config = named_config(cfg.size) if cfg.size else load_config(cfg.model_dir)
        if cfg.gpus % cfg.replicate:
            raise InputError(f"{cfg.gpus} GPUs do not divide into --replicate {cfg.replicate}")
        if cfg.plan:
            say_plan(cfg, config, cfg.gpus // cfg.replicate, torch.device("cuda"), print)
        else:
            run_bench(cfg, config)
        return
    process = start_process(cfg.seed)
    signal.signal(signal.SIGTERM, lambda number, frame: _STOP.append(number))
    try:
        if cfg.loss == "all":
            train_all(cfg, mine, process)
        else:
            train(cfg, process)
        stop_process()  # not after an error: it would wait for peers that are inside a collective
    except FileNotFoundError:
        raise
    except (OSError, FloatingPointError) as error:
        end_with(f"rank {process.rank}: {error}")
    except RuntimeError as error:
        if process.world == 1 or not is_lost_connection(error):
            raise
        end_with(
            f"rank {process.rank}: another process has died or does not answer; its message says "
            "why; the same command continues from the newest checkpoint"
        )


def end_with(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


if __name__ == "__main__":
    run(main)
