"""What fits a model into less memory: adapters, bfloat16 states, selective recompute.

    add_adapters, merge_adapters   LoRA (arXiv:2106.09685): train a product of low rank only
    AdamW                          also with weights and moments in bfloat16, rounded at random
    recompute_in_backward          keep little of a block and compute the rest again

Each is a switch of train.py, and off means the plain numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointPolicy

from data import seeded
from weights import local, local_rows, shard_place, whole


class LoraLinear(nn.Linear):
    """A frozen linear layer plus a trained product of low rank."""

    on = True

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if not self.on:
            return out
        return out + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_adapters(blocks: list[nn.Module], rank: int, alpha: float) -> None:
    """An adapter for every linear layer of `blocks`, scaled by alpha / rank."""
    for block in blocks:
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__, layer.scale = LoraLinear, alpha / rank
                rows, cols = layer.weight.shape
                layer.lora_down = nn.Parameter(layer.weight.new_empty(rank, cols))
                layer.lora_up = nn.Parameter(layer.weight.new_empty(rows, rank))


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int) -> None:
    """lora_down random, lora_up zero: training starts at the model itself."""
    for name, layer in adapters(model).items():
        noise = seeded(seed, "lora", name).standard_normal(tuple(layer.lora_down.shape))
        noise = torch.from_numpy(noise) / layer.in_features**0.5
        local(layer.lora_down).copy_(noise[local_rows(layer.lora_down)])
        local(layer.lora_up).zero_()


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one it started from; one without adapters is as it is."""
    layers = adapters(model).values()
    for layer in layers:
        layer.on = False
    yield
    for layer in layers:
        layer.on = True


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add what was learned to the weights, each process to its own rows."""
    for layer in adapters(model).values():
        learned = layer.scale * whole(layer.lora_up).float() @ whole(layer.lora_down).float()
        local(layer.weight).add_(learned[local_rows(layer.weight)])
        layer.on = False


class AdamW:
    """AdamW (arXiv:1711.05101), with the fields of torch's own, which imports all of torch.compile.

    float32 weights take torch's fused kernel.  bfloat16 has 8 bits: at lr 5e-6 rounding to nearest
    would lose every update of a weight above 0.003, and the second moment's decay of 0.1 %.  So all
    is computed in float32, a piece at a time, and rounded up or down at random, by how near each
    is: right on average.  The draws are a function of (seed, step, tensor, shard).
    """

    BETAS, EPS, PIECE = (0.9, 0.999), 1e-8, 1 << 24

    def __init__(self, groups: list[dict], seed: int) -> None:
        self.param_groups, self.seed, self.updates, self.state = groups, seed, 0, {}
        for p in (p for group in groups for p in group["params"]):
            self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter, at `lr` times the scale of its group."""
        self.updates += 1
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                place = number, index  # seeds its rounding
                self.update(p, lr * group["scale"], group["weight_decay"], place)

    def update(self, p: Tensor, lr: float, decay: float, place: tuple[int, int]) -> None:
        t, (b1, b2), eps = self.updates, self.BETAS, self.EPS
        tensors = [local(x) for x in (p, p.grad, *self.state[p].values())]
        if p.dtype is torch.float32:
            lists = *([x] for x in tensors), [], [torch.full((), float(t), device=p.device)]
            options = {"lr": lr, "beta1": b1, "beta2": b2, "weight_decay": decay, "eps": eps}
            torch._fused_adamw_(*lists, **options, amsgrad=False, maximize=False)
            return
        w, grad, mean, square = (x.view(-1) for x in tensors)
        generator = torch.Generator(w.device)
        key = (self.seed, "rounding", t, place, shard_place(p)[0])
        generator.manual_seed(int(seeded(*key).integers(2**62)))
        for i in range(0, len(w), self.PIECE):
            at = slice(i, i + self.PIECE)
            g = grad[at].float()
            m = mean[at].float().lerp(g, 1 - b1)
            v = square[at].float() * b2 + (1 - b2) * g * g
            update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
            new = w[at].float() * (1 - lr * decay) - lr * update
            for kept, exact in ((w, new), (mean, m), (square, v)):
                kept[at] = round_at_random(exact, generator)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up with the chance that makes the mean exact."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).bfloat16()


def keep_some(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps attention, by whichever kernel, and products no wider than their input."""
    attention = "scaled_dot_product" in str(op) or "flex_attention" in str(op)
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    # the last argument is the weight (in out): mm(x, weight), addmm(bias, x, weight)
    narrow = op in products and args[-1].shape[1] <= args[-1].shape[0]
    return CheckpointPolicy.MUST_SAVE if attention or narrow else CheckpointPolicy.PREFER_RECOMPUTE


def computed_again(forward: Callable, selective: bool, learns: bool, *inputs: Any) -> Tensor:
    """A block's forward that keeps its inputs for backward, or also what `keep_some` says."""
    # torch 2.13 compiles no checkpoint for a backward that never comes, as of a frozen ViT
    if not (torch.is_grad_enabled() and (learns or inputs[0].requires_grad)):
        return forward(*inputs)
    options = {}
    if selective:
        options["context_fn"] = partial(checkpoint.create_selective_checkpoint_contexts, keep_some)
    return checkpoint.checkpoint(forward, *inputs, use_reentrant=False, **options)


def recompute_in_backward(block: nn.Module, amount: str) -> None:
    """`amount`: full, selective, or off, which keeps everything."""
    if amount in ("full", "selective"):
        learns = any(p.requires_grad for p in block.parameters())
        block.forward = partial(computed_again, block.forward, amount == "selective", learns)
