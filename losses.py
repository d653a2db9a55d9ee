"""Every objective of the MPO paper (Wang et al. 2024, arXiv:2411.10442), and a lab to compare them.

    dpo           which of the two responses is better          arXiv:2305.18290
    rso           the same, with a hinge                        arXiv:2309.06657
    ipo           a fixed gap per token, no further             arXiv:2310.12036
    cdpo          some of the labels are wrong                  ericmitchell.ai/cdpo.pdf
    robust        the same, corrected for                       arXiv:2403.00409
    bco           is each response good at all                  arXiv:2404.04656
    sppo          a fixed log-ratio for each response           arXiv:2405.00675
    aot           the whole step's margins, sorted              arXiv:2406.05882
    odds_ratio    ORPO's penalty, no reference                  arXiv:2403.07691
    sft           still able to write the chosen response

An objective is a pure function of PairLogps: one value per pair, float32 (float64 stays), no model,
no config, no torch.distributed.  The loss of an optimizer step is the mean over all its pairs; what
a run trains is a weighted sum, `--loss 0.8*dpo+0.2*bco+sft`; `mpo` and `orpo` name such sums.

To try your own, write it in a file of yours; the lab and train.py take it with `--mine my_loss.py`:

    import torch.nn.functional as F

    def simpo(logps, scale=2.0, gap=1.0):
        chosen = logps.policy_chosen / logps.chosen_length
        rejected = logps.policy_rejected / logps.rejected_length
        return -F.logsigmoid(scale * (chosen - rejected) - gap)

Every public function there whose first parameter is `logps` is an objective under its own name.  Of
`beta`, `label_smoothing` and `bco_shift` it is passed what it names; other parameters keep their
defaults.  Whether it needs the reference or the whole step is found by trying it.

The lab draws loss and gradient of every objective, prints a table, and checks each one:

    python losses.py --out losses.png --mine my_loss.py

In formulas, for one pair:  c = policy_chosen - reference_chosen,  r = policy_rejected -
reference_rejected (log-ratios of sums over tokens),  nc and nr the lengths in tokens,  s = sigmoid,
e = label_smoothing.  "TRL" is version 1.16, "official" InternVL's trainer_dpo.py.
"""

import difflib
import functools
import importlib.util
import inspect
import io
import math
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime import InputError, flag, parse_cli, run, write_atomic

# b batch  s tokens  d channels; row (a position that predicts a response token), response, pair and
# vocab are spelled out

Loss = Callable[..., Tensor]  # (PairLogps, **keywords) -> (pair)
Terms = list[tuple[float, str]]  # a weighted sum of objectives


def at_least_float32(x: Tensor) -> Tensor:
    """Near -300, bfloat16 steps by 2: nothing here is computed below float32."""
    return x if x.dtype == torch.float64 else x.float()


# --------------------------------------------------------------------------- log-probs of responses


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:  # (b s vocab), (b s) -> (b s-1)
    """Log-prob of each label under the position before it; 0 where the label is -100.

    The label at position 0 is predicted by nothing and never scored.
    """
    labels = labels[:, 1:]
    kept = labels != -100
    logps = at_least_float32(logits[:, :-1]).log_softmax(-1)
    logps = logps.gather(-1, labels.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(~kept, 0)


class ChunkedHead(torch.autograd.Function):
    """log_softmax(hidden @ head_weight.T)[target] of every row, a chunk of rows at a time.

    Backward computes each chunk again, so no more than (chunk, vocab) ever lives.  Written by hand
    because autograd would add up the weight's gradient in the weight's dtype, rounding to bfloat16
    after every chunk; here it is added up in float32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head_weight: Tensor, target: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden, head_weight, target)
        ctx.chunk = chunk
        weight = head_weight.to(hidden.dtype)
        logps = hidden.new_zeros(len(target), dtype=at_least_float32(hidden[:0]).dtype)
        for i in range(0, len(target), chunk):
            rows = slice(i, i + chunk)
            chunk_logps = (hidden[rows] @ weight.T).log_softmax(-1, dtype=logps.dtype)  # row vocab
            logps[rows] = chunk_logps.gather(-1, target[rows].unsqueeze(-1)).squeeze(-1)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, head_weight, target = ctx.saved_tensors
        weight = head_weight.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for i in range(0, len(target), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            probs = (hidden[rows] @ weight.T).softmax(-1, dtype=grad.dtype)
            grad_logits = probs.mul_(-grad[rows].unsqueeze(-1))  # d logp = onehot(target) - probs
            grad_logits.scatter_add_(-1, target[rows].unsqueeze(-1), grad[rows].unsqueeze(-1))
            grad_logits = grad_logits.to(hidden.dtype)  # row vocab
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_weight.dtype)
        return grad_hidden, grad_weight, None, None


def row_logps(hidden: Tensor, head_weight: Tensor, target: Tensor, chunk: int = 1024) -> Tensor:
    """Log-prob of each row's target, (row), in float32: hidden (row d), head_weight (vocab d).

    The products run in the dtype of `hidden`; a float32 head under bfloat16 hidden states gets its
    gradient in float32, unrounded.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return ChunkedHead.apply(hidden, head_weight, target, chunk)


def sum_by_response(logps: Tensor, response: Tensor, num_responses: int) -> tuple[Tensor, Tensor]:
    """(sums, lengths), each (response), of row log-probs; response[i] owns row i."""
    # added in float64, where the order of CUDA's atomic adds cannot show after rounding: the same
    # pack scored twice gives the same float32, and log-ratios at the start are exactly 0
    zeros = logps.new_zeros(num_responses, dtype=torch.float64)
    sums = zeros.index_add(0, response, logps.double()).to(logps.dtype)
    lengths = zeros.index_add(0, response, torch.ones_like(logps, dtype=torch.float64))
    return sums, lengths.to(logps.dtype)


def response_logps(
    hidden: Tensor,  # (row d)
    head_weight: Tensor,  # (vocab d)
    target: Tensor,  # (row)
    response: Tensor,  # (row)
    num_responses: int,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:  # (response), (response)
    """Summed log-prob and length in tokens of each response; no (row, vocab) tensor ever lives."""
    return sum_by_response(row_logps(hidden, head_weight, target, chunk), response, num_responses)


# --------------------------------------------------------------------------- what an objective sees


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of the two responses of each pair; every field (pair), at least float32.

    Prompt, image and padding tokens never count; the closing <|im_end|> does.  The reference may be
    None where no term of the objective uses it.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_length: Tensor  # tokens
    rejected_length: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if value.shape != self.policy_chosen.shape or value.ndim != 1:
                raise ValueError(
                    f"{field.name} is {tuple(value.shape)}; every field of PairLogps is (pair), "
                    f"as policy_chosen, {tuple(self.policy_chosen.shape)}"
                )
            object.__setattr__(self, field.name, at_least_float32(value))

    @property
    def chosen_logratio(self) -> Tensor:  # c
        self.need_reference()
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:  # r
        self.need_reference()
        return self.policy_rejected - self.reference_rejected

    def need_reference(self) -> None:
        """What every objective that uses the reference asks first."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise InputError("this objective needs reference log-probs and there are none")


def claims(*names: str) -> Callable[[Loss], Loss]:
    """Say which INVARIANCES (below) an objective has; the lab and the tests hold it to them."""

    def mark(loss: Loss) -> Loss:
        loss.claims = names
        return loss

    return mark


# --------------------------------------------------------------------------- the objectives


@claims("shift", "margin", "swap", "length", "nonnegative")
def dpo(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """-log s(beta (c - r)).

    The preference loss of MPO, weight 0.8 (paper, eq. 3 and section 7).  TR-DPO is this with a
    reference that moves, see `blend`.
    """
    return -F.logsigmoid(beta * (logps.chosen_logratio - logps.rejected_logratio))


@claims("shift", "margin", "length", "nonnegative")
def rso(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """max(0, 1 - beta (c - r)).

    The paper's RSO row is this hinge alone: RSO's rejection-sampled data are not part of it
    (section 5.2.3).  TRL: `hinge`.
    """
    return F.relu(1 - beta * (logps.chosen_logratio - logps.rejected_logratio))


@claims("shift", "per_token", "nonnegative")
def ipo(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """(c/nc - r/nr - 1/(2 beta))^2.

    Averages over tokens, as the paper's section 5.2.3 says; in the official trainer only where ipo
    is the sole loss.  At beta 0.1 it asks for 5 nats per token, out of reach: it never stops
    pulling, with a gradient 1/nc times 200 that of dpo.
    """
    gap = logps.chosen_logratio / logps.chosen_length
    gap = gap - logps.rejected_logratio / logps.rejected_length
    return (gap - 1 / (2 * beta)) ** 2


@claims("shift", "margin", "length", "nonnegative")
def cdpo(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:  # (pair)
    """-(1-e) log s(z) - e log s(-z), z = beta (c - r): the labels are swapped with chance e.

    The paper does not state its e; 0.1 is our choice.  TRL's `sigmoid` ignores label smoothing
    since v0.29 and would train plain dpo.
    """
    z = beta * (logps.chosen_logratio - logps.rejected_logratio)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@claims("shift", "margin", "length")
def robust(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:  # (pair)
    """[-(1-e) log s(z) + e log s(-z)] / (1-2e), z = beta (c - r): on average dpo of true labels.

    Unbounded below: a negative loss is right.  The paper does not state its e; 0.1 is our choice.
    """
    z = beta * (logps.chosen_logratio - logps.rejected_logratio)
    noisy = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return noisy / (1 - 2 * label_smoothing)


@claims("shift", "length", "nonnegative")
def bco(logps: PairLogps, beta: float = 0.1, bco_shift: float = 0.0) -> Tensor:  # (pair)
    """-log s(beta c - shift) - log s(-(beta r - shift)).

    The quality loss of MPO, weight 0.2 (paper, eq. 3, 6 and 7).  The shift is the mean of earlier
    rewards, a plain number kept by `BcoShift`.  Official: a mean that includes the present batch
    and is lost on resume.  TRL: no shift at all.
    """
    chosen = -F.logsigmoid(beta * logps.chosen_logratio - bco_shift)
    rejected = -F.logsigmoid(-(beta * logps.rejected_logratio - bco_shift))
    return chosen + rejected


@claims("shift", "length", "nonnegative")
def sppo(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2.

    TRL: `sppo_hard`.  At beta 0.1 it starts at 50 with a gradient 200 times that of dpo; SPPO's own
    paper has beta 0.001.  To mix it with others, give it a far smaller weight.
    """
    goal = 1 / (2 * beta)
    return (logps.chosen_logratio - goal) ** 2 + (logps.rejected_logratio + goal) ** 2


@claims("shift", "margin", "swap", "length", "nonnegative")
def aot(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """-log s(beta (M_k - R_k)), M the sorted policy margins, R the sorted reference margins.

    Sorts over the pairs it is given, which must be those of the whole step (`whole_step`,
    `coefficients`).  TRL sorts within one device's micro-batch; with one pair there it is dpo.
    """
    logps.need_reference()
    margin = logps.policy_chosen - logps.policy_rejected
    reference_margin = logps.reference_chosen - logps.reference_rejected
    return -F.logsigmoid(beta * (margin - of_same_rank(reference_margin, margin)))


@claims("shift", "margin", "length", "nonnegative")
def aot_unpaired(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """-log s(beta (C_k - Q_k)), C the sorted c, Q the sorted r.

    C_k and Q_k may belong to different pairs; needs the whole step, as `aot`.  TRL 0.10 and the
    official trainer call this one `aot_pair` and the paired one `aot`.
    """
    c, r = logps.chosen_logratio, logps.rejected_logratio
    return -F.logsigmoid(beta * (c - of_same_rank(r, c)))


def of_same_rank(values: Tensor, others: Tensor) -> Tensor:  # (pair), (pair) -> (pair)
    """For each of `others`, the one of `values` that has the same rank.

    As sorting both, but each loss stays with a pair, where plain sorting leaves it with none.
    """
    rank = others.argsort().argsort()
    return values.sort().values[rank]


@claims("swap", "per_token", "nonnegative")
def odds_ratio(logps: PairLogps) -> Tensor:  # (pair)
    """-log s(o(pc/nc) - o(pr/nr)), o(x) = x - log(1 - exp x).

    ORPO's penalty, without a reference: ORPO is `sft+0.1*odds_ratio`.  TRL's `log1mexp` has a NaN
    gradient where exp x rounds to 1.
    """
    # an average log-prob of exactly 0 happens, on short sure answers; -1e-9 keeps all finite
    chosen = (logps.policy_chosen / logps.chosen_length).clamp(max=-1e-9)
    rejected = (logps.policy_rejected / logps.rejected_length).clamp(max=-1e-9)
    return -F.logsigmoid((chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected)))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp x) for x < 0, exact at both ends."""
    near = x > -math.log(2)
    # the branch not taken gets a safe value: `where` alone passes its infinite gradient on, as NaN
    at_near, at_far = x.where(near, -1.0), x.where(~near, -1.0)
    return torch.where(near, (-at_near.expm1()).log(), (-at_far.exp()).log1p())


@claims("per_token", "nonnegative")
def sft(logps: PairLogps) -> Tensor:  # (pair)
    """-pc/nc: the mean NLL per chosen token, then the mean over pairs (paper, eq. 8).

    The generation loss of MPO, weight 1.  Official code and TRL take the token mean of a
    micro-batch: the same number with one pair in it, with more long responses weigh more.
    """
    return -logps.policy_chosen / logps.chosen_length


# --------------------------------------------------------------------------- registry

LOSSES: dict[str, Loss] = {
    "dpo": dpo,
    "rso": rso,
    "ipo": ipo,
    "cdpo": cdpo,
    "robust": robust,
    "bco": bco,
    "sppo": sppo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "odds_ratio": odds_ratio,
    "sft": sft,
}

PRESETS = {
    "mpo": "0.8*dpo+0.2*bco+sft",
    "orpo": "sft+0.1*odds_ratio",
}

HYPER = ("beta", "label_smoothing", "bco_shift")  # what an objective is passed if it names it

TERM = re.compile(  # [weight "*"] name, up to "+" or the end
    r"\s*(?:(?P<weight>[^\s*]+)\s*\*\s*)??(?P<name>[^\W\d]\w*)\s*(?P<more>\+|$)"
)
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def parse_objective(text: str) -> Terms:
    """`0.8*dpo+0.2*bco+sft` or a preset -> [(weight, name), ...]; else an InputError."""
    text = PRESETS.get(text.strip(), text)
    if not text.strip():
        raise InputError("the objective is empty; expected, for example, mpo or dpo+sft")
    terms, at = [], 0
    while at is not None:
        found = TERM.match(text, at)
        if not found:
            raise InputError(
                f"cannot read {text[at:]!r} of the objective {text!r}; expected [weight*]name "
                "joined by +, for example 0.8*dpo+0.2*bco+sft"
            )
        terms.append((_weight(found["weight"], text), found["name"]))
        at = found.end() if found["more"] == "+" else None
    check_terms(terms)
    return terms


def _weight(word: str | None, text: str) -> float:
    if word is None:
        return 1.0
    if not NUMBER.fullmatch(word):
        raise InputError(f"weight {word!r} in {text!r} is not a number above 0")
    return float(word)


def check_terms(terms: Terms) -> None:
    """Known names, each once, with finite weights above 0."""
    if not terms:
        raise InputError("the objective has no terms")
    for weight, name in terms:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"weight of {name} must be finite and above 0, got {weight}")
        if name in PRESETS:
            raise InputError(f"{name} stands for {PRESETS[name]} and stands alone; write that out")
        if name not in LOSSES:
            near = difflib.get_close_matches(name.lower(), [*LOSSES, *PRESETS], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            known = ", ".join([*LOSSES, *PRESETS])
            raise InputError(f"unknown objective {name!r}; {hint}known: {known}")
    names = [name for _, name in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]} stands in the objective twice; add up its weights")


def keywords(loss: Loss) -> list[str]:
    """Those of HYPER that an objective takes."""
    return [name for name in inspect.signature(loss).parameters if name in HYPER]


def uses(terms: Terms, keyword: str) -> bool:
    """Whether any term takes this one of HYPER."""
    return any(keyword in keywords(LOSSES[name]) for _, name in terms)


def needs_reference(terms: Terms) -> bool:
    """Whether any term looks at the reference."""
    return any(_looks_at_reference(LOSSES[name]) for _, name in terms)


def whole_step(terms: Terms) -> bool:
    """Whether a pair's loss depends on the step's other pairs, as in aot: see `coefficients`."""
    return any(_looks_at_other_pairs(LOSSES[name]) for _, name in terms)


@functools.cache
def _looks_at_reference(loss: Loss) -> bool:
    """Found by trying: move the reference and see.  So it holds for a user's objective as well."""
    x = example_pairs()
    moved = replace(
        x,
        reference_chosen=x.reference_chosen * 1.25 - 2,
        reference_rejected=x.reference_rejected * 0.75 - 1,
    )
    return not torch.equal(loss(x), loss(moved))


@functools.cache
def _looks_at_other_pairs(loss: Loss) -> bool:
    """Found by trying: each pair alone and all together."""
    x = example_pairs()
    return not torch.allclose(loss(x), torch.cat([loss(one) for one in split_pairs(x)]))


def check_hyperparameters(
    terms: Terms,
    beta: float = 0.1,
    label_smoothing: float | None = None,
    have_reference: bool = True,
) -> dict[str, float]:
    """The hyper-parameters to pass to `objective`, checked; label_smoothing None = not given."""
    check_terms(terms)
    names = "+".join(name for _, name in terms)
    if not (math.isfinite(beta) and beta > 0):
        raise InputError(f"beta must be finite and above 0, got {beta}")
    if label_smoothing is not None and not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
    if label_smoothing is not None and not uses(terms, "label_smoothing"):
        takers = ", ".join(n for n, loss in LOSSES.items() if "label_smoothing" in keywords(loss))
        raise InputError(f"label_smoothing is given but {names} does not use it; {takers} do")
    if not have_reference and needs_reference(terms):
        without = ", ".join(n for n, loss in LOSSES.items() if not _looks_at_reference(loss))
        raise InputError(f"{names} needs a reference and there is none; these need none: {without}")
    return {"beta": beta, "label_smoothing": 0.1 if label_smoothing is None else label_smoothing}


# --------------------------------------------------------------------------- the step's loss


def objective(
    terms: Terms,
    logps: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    bco_shift: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (pair), {name: (pair)}
    """The weighted sum and its terms, unweighted.  The step's loss is the mean over all its pairs:

    a micro-batch contributes total.sum() / (pairs of the whole step), however many it holds.
    """
    hyper = {"beta": beta, "label_smoothing": label_smoothing, "bco_shift": bco_shift}
    parts = {}
    for _, name in terms:
        loss = LOSSES[name]
        parts[name] = loss(logps, **{k: hyper[k] for k in keywords(loss)})
    return sum(weight * parts[name] for weight, name in terms), parts


def coefficients(terms: Terms, logps: PairLogps, **hyper: float) -> tuple[Tensor, Tensor]:
    """d (mean loss) / d policy_chosen and / d policy_rejected, each (pair), as plain numbers.

    For objectives that look at the whole step: score all its micro-batches without gradient, gather
    the log-probs, call this, then run each micro-batch again with the loss
    (chosen * policy_chosen).sum() + (rejected * policy_rejected).sum() over its own pairs.
    """
    with torch.enable_grad():
        chosen = logps.policy_chosen.detach().requires_grad_()
        rejected = logps.policy_rejected.detach().requires_grad_()
        total, _ = objective(
            terms, replace(logps, policy_chosen=chosen, policy_rejected=rejected), **hyper
        )
        grads = torch.autograd.grad(total.mean(), (chosen, rejected), materialize_grads=True)
    return grads


@dataclass
class BcoShift:
    """The mean reward of all earlier steps, "moving average of previous rewards" (paper, eq. 6-7).

    Every response of every rank weighs the same.  Updated once a step, after use, so that all
    micro-batches of a step see one number; 0 at the first step.
    """

    mean: float = 0.0
    count: float = 0.0  # responses so far

    def update(self, reward_sum: float, count: float) -> None:
        """Add a step's rewards: `bco_rewards`, summed over all micro-batches and ranks."""
        if count:
            self.count += count
            self.mean += (reward_sum - count * self.mean) / self.count

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.count = float(state["mean"]), float(state["count"])


@torch.no_grad()
def bco_rewards(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (2)
    """(sum of rewards, responses) in float64: to be added over ranks, then given to BcoShift."""
    rewards = beta * torch.cat([logps.chosen_logratio, logps.rejected_logratio]).double()
    return torch.stack([rewards.sum(), rewards.new_tensor(len(rewards))])


@torch.no_grad()
def blend(reference: Tensor, policy: Tensor, mix: float) -> Tensor:
    """TR-DPO's update (arXiv:2404.09656), in place: reference <- mix policy + (1 - mix) reference.

    mix 1 is the hard update.  Keep the reference in float32: bfloat16 would round a small mix away.
    """
    return reference.lerp_(policy.to(reference.dtype), mix)


@torch.no_grad()
def pair_metrics(logps: PairLogps, beta: float = 0.1) -> dict[str, Tensor]:  # {name: (pair)}
    """What to log, per pair: sum over micro-batches and ranks, divide by the pairs of the step.

    Both rewards falling while the margin grows is dpo's known slide; sft or bco holds them up.
    """
    metrics = {
        "logps/chosen": logps.policy_chosen,
        "logps/rejected": logps.policy_rejected,
        "nll": sft(logps),
        "length/chosen": logps.chosen_length,
        "length/rejected": logps.rejected_length,
    }
    if logps.reference_chosen is None:
        return metrics
    c, r = logps.chosen_logratio, logps.rejected_logratio
    return metrics | {
        "rewards/chosen": beta * c,
        "rewards/rejected": beta * r,
        "rewards/margin": beta * (c - r),
        "rewards/accuracy": (c > r).to(c.dtype),  # strict: a tie, as all pairs at step 0, is no win
        # drift from the reference; not a KL, since the policy did not sample these responses
        "logratio_per_token/chosen": c / logps.chosen_length,
        "logratio_per_token/rejected": r / logps.rejected_length,
    }


# --------------------------------------------------------------------------- a user's own file


def register_file(path: Path) -> list[str]:
    """Add every objective of a user's Python file to LOSSES; returns their names."""
    path = Path(path).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"--mine {path}: expected an existing .py file")
    spec = importlib.util.spec_from_file_location(f"mine_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look themselves up here
    _as_user_error(path, spec.loader.exec_module, module)
    found = {name: f for name, f in vars(module).items() if _is_objective(module, name, f)}
    if not found:
        raise InputError(f"{path} defines no public function whose first parameter is `logps`")
    for name, loss in found.items():
        if name in PRESETS or (name in LOSSES and inspect.getfile(LOSSES[name]) != str(path)):
            raise InputError(f"{path}: an objective named {name} exists already; rename yours")
        _check_new(path, name, loss)
    LOSSES.update(found)
    return list(found)


def _is_objective(module: ModuleType, name: str, value: object) -> bool:
    if name.startswith("_") or not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    return next(iter(inspect.signature(value).parameters), "") == "logps"


def _check_new(path: Path, name: str, loss: Loss) -> None:
    """Refuse at once what would fail, or train on something else, hours later."""
    for p in list(inspect.signature(loss).parameters.values())[1:]:
        variadic = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name not in HYPER and p.default is p.empty and not variadic:
            raise InputError(
                f"{path}: parameter {p.name} of {name} needs a default; "
                f"an objective is passed {', '.join(HYPER)} only"
            )
    if unknown := set(getattr(loss, "claims", ())) - set(INVARIANCES):
        raise InputError(
            f"{path}: {name} claims {unknown.pop()!r}; known: {', '.join(INVARIANCES)}"
        )
    x = example_pairs()
    x.policy_chosen.requires_grad_()
    given = {k: v for k, v in zip(HYPER, (0.1, 0.1, 0.0)) if k in keywords(loss)}
    value = _as_user_error(path, loss, x, **given)
    if not isinstance(value, Tensor) or value.shape != x.policy_chosen.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        pairs = tuple(x.policy_chosen.shape)
        raise InputError(f"{path}: {name} must return one value per pair, {pairs}, got {got}")
    if not value.isfinite().all():
        raise InputError(f"{path}: {name} is not finite on ordinary pairs: {value.tolist()}")
    if not value.requires_grad:
        raise InputError(f"{path}: {name} has no gradient with respect to policy_chosen")


def _as_user_error(path: Path, call: Callable, *args, **kwargs):
    """Run the user's code; whatever it raises becomes one line that names file and line."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # any: the code is not ours
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(path)]
        where = f"{path} line {lines[-1]}" if lines else str(path)
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


# --------------------------------------------------------------------------- the lab: checks


def make_pairs(rows: list[tuple[float, ...]], dtype: torch.dtype) -> PairLogps:
    """One row a pair, in the order of the fields of PairLogps."""
    return PairLogps(*torch.tensor(rows, dtype=dtype).T.contiguous())


def example_pairs() -> PairLogps:
    """Ordinary pairs in float64: margins of both signs, no ties, lengths apart, off the kinks."""
    rows = [
        (-31.2, -44.9, -35.7, -42.3, 20, 31),
        (-12.8, -10.1, -11.6, -13.4, 9, 7),
        (-75.3, -60.7, -58.9, -66.2, 64, 50),
        (-22.1, -48.6, -29.5, -37.8, 25, 33),
        (-5.4, -9.3, -6.2, -5.9, 3, 11),
        (-41.7, -39.2, -40.1, -38.3, 40, 28),
    ]
    return make_pairs(rows, torch.float64)


def extreme_pairs(dtype: torch.dtype) -> PairLogps:
    """Log-ratios to 1e4, log-probs of 0 and next to it, one token and many, a tie."""
    rows = [
        (-1, -10001, -10001, -1, 400, 400),
        (-10044, -44, -1, -1, 400, 400),
        (0, -3, -1, -1, 5, 5),
        (-3, 0, -1, -1, 5, 5),
        (0, 0, 0, 0, 1, 6000),
        (-1e-7, -12000, -2e-7, -3, 1, 6000),
        (-12000, -1e-7, -3, -2e-7, 6000, 1),
        (-50, -50, -50, -50, 50, 50),
    ]
    return make_pairs(rows, dtype)


def split_pairs(x: PairLogps) -> list[PairLogps]:
    """Each pair alone."""
    return [
        PairLogps(*(getattr(x, f.name)[i : i + 1] for f in fields(x)))
        for i in range(len(x.policy_chosen))
    ]


def add(x: PairLogps, **amounts: float) -> PairLogps:
    """x with amounts added to some of its fields."""
    return replace(x, **{name: getattr(x, name) + amount for name, amount in amounts.items()})


# Each: (loss, pairs) -> by how much the invariance is broken, 0 where it holds.
INVARIANCES: dict[str, Callable[[Loss, PairLogps], Tensor]] = {
    # policy and reference move together: only log-ratios matter
    "shift": lambda f, x: (
        f(x)
        - f(add(x, policy_chosen=3, reference_chosen=3, policy_rejected=-2, reference_rejected=-2))
    ),
    # chosen and rejected move together: only the margin matters, so nothing stops both from falling
    "margin": lambda f, x: f(x) - f(add(x, policy_chosen=-3, policy_rejected=-3)),
    # swapping the responses gives the other probability
    "swap": lambda f, x: (-f(x)).exp() + (-f(swap(x))).exp() - 1,
    # lengths do not enter
    "length": lambda f, x: f(x) - f(add(x, chosen_length=7, rejected_length=2)),
    # only means over tokens enter: every response written twice is the same
    "per_token": lambda f, x: f(x) - f(PairLogps(*(2 * getattr(x, k.name) for k in fields(x)))),
    "nonnegative": lambda f, x: f(x).clamp(max=0),
}


def swap(x: PairLogps) -> PairLogps:
    """Chosen and rejected exchanged."""
    return PairLogps(
        x.policy_rejected,
        x.policy_chosen,
        x.reference_rejected,
        x.reference_chosen,
        x.rejected_length,
        x.chosen_length,
    )


def holds(invariance: str, loss: Loss) -> bool:
    """Whether a loss has an invariance, on the example pairs in float64."""
    return INVARIANCES[invariance](loss, example_pairs()).abs().max().item() < 1e-9


def check_loss(loss: Loss) -> dict[str, bool]:
    """Every check of one objective, by name; `loss` takes PairLogps alone."""
    return {
        "float32 per pair": _float32_per_pair(loss),
        "finite differences": _finite_differences(loss),
        "finite at extremes": all(_finite(loss, t) for t in (torch.float32, torch.bfloat16)),
        **{name: holds(name, loss) for name in getattr(loss, "claims", ())},
    }


def _float32_per_pair(loss: Loss) -> bool:
    x = example_pairs()
    bfloat16 = PairLogps(*(getattr(x, f.name).bfloat16() for f in fields(x)))
    value = loss(bfloat16)
    return value.dtype == torch.float32 and value.shape == x.policy_chosen.shape


def _finite_differences(loss: Loss) -> bool:
    x = example_pairs()

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(x, policy_chosen=chosen, policy_rejected=rejected))

    at = (x.policy_chosen.requires_grad_(), x.policy_rejected.requires_grad_())
    return torch.autograd.gradcheck(of_policy, at, raise_exception=False)


def _finite(loss: Loss, dtype: torch.dtype) -> bool:
    value, *grads = loss_and_gradient(loss, extreme_pairs(dtype))
    return all(bool(x.isfinite().all()) for x in (value, *grads))


def loss_and_gradient(loss: Loss, x: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, d sum / d policy_chosen, d sum / d policy_rejected), each (pair)."""
    chosen = x.policy_chosen.detach().requires_grad_()
    rejected = x.policy_rejected.detach().requires_grad_()
    value = loss(replace(x, policy_chosen=chosen, policy_rejected=rejected))
    grads = torch.autograd.grad(value.sum(), (chosen, rejected), materialize_grads=True)
    return value.detach(), *grads


# --------------------------------------------------------------------------- the lab: plane, table

GRID, REACH, TOKENS, START = 41, 20.0, 20.0, -30.0  # points a side, nats, tokens, log-prob of both


@dataclass(frozen=True)
class LabConfig:
    """Draw every objective over the (chosen, rejected) log-ratio plane, tabulate and check it."""

    out: Path = flag(Path("losses.png"), "the drawing")
    mine: tuple[Path, ...] = flag((), "a .py file with objectives of your own; may be repeated")
    beta: float = flag(0.1, "strength of the pull to the reference")
    label_smoothing: float = flag(0.1, "chance that a label is wrong: cdpo, robust")
    bco_shift: float = flag(0.0, "mean reward so far: bco")

    def __post_init__(self) -> None:
        check_hyperparameters(parse_objective("cdpo"), self.beta, self.label_smoothing)
        if not math.isfinite(self.bco_shift):
            raise InputError(f"bco_shift must be finite, got {self.bco_shift}")


def as_loss(text: str, cfg: LabConfig) -> Loss:
    """An objective or preset as a function of PairLogps alone, at the lab's hyper-parameters."""
    terms = parse_objective(text)
    hyper = {name: getattr(cfg, name) for name in HYPER}

    def loss(logps: PairLogps) -> Tensor:
        return objective(terms, logps, **hyper)[0]

    if text in LOSSES:
        loss.claims = getattr(LOSSES[text], "claims", ())
    return loss


def plane(loss: Loss, together: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(axis, loss, d/d chosen, d/d rejected) over the plane: (GRID), then (rejected chosen).

    Both responses have 20 tokens, and log-prob -30 under the reference.  An objective that looks at
    the whole step sees each point together with three other pairs that stay where they are, and
    its loss is the sum over the four.
    """
    axis = torch.linspace(-REACH, REACH, GRID, dtype=torch.float64)
    r, c = torch.meshgrid(axis, axis, indexing="ij")
    rows = [
        (START + x, START + y, START, START, TOKENS, TOKENS) for y, x in zip(r.ravel(), c.ravel())
    ]
    points = make_pairs(rows, torch.float64)
    values = loss_and_gradient(among_others(loss) if together else loss, points)
    return axis, *(v.reshape(GRID, GRID) for v in values)


def among_others(loss: Loss) -> Loss:
    """Each pair in a step of its own, with three fixed others: the sum over the four."""
    others = make_pairs(
        [
            (-38, -22, -30, -18, 20, 20),
            (-25, -34, -30, -30, 20, 20),
            (-19, -37, -30, -42, 20, 20),
        ],
        torch.float64,
    )

    def together(x: PairLogps) -> Tensor:
        names = [f.name for f in fields(x)]
        steps = [
            PairLogps(*(torch.cat([getattr(one, n), getattr(others, n)]) for n in names))
            for one in split_pairs(x)
        ]
        return torch.stack([loss(step).sum() for step in steps])

    return together


def draw(planes: dict[str, tuple[Tensor, ...]], notes: dict[str, str]) -> bytes:
    """A panel an objective: the loss in colour, arrows where gradient descent pushes a pair."""
    import matplotlib  # noqa: PLC0415  (only the lab draws)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    columns = 4
    rows = -(-len(planes) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.1 * columns, 3.9 * rows + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for panel in axes.flat:
        panel.set_visible(False)
    for panel, (name, (axis, loss, chosen, rejected)) in zip(axes.flat, planes.items()):
        panel.set_visible(True)
        colours = panel.contourf(axis, axis, loss, levels=16, cmap="YlGnBu_r")
        panel.contour(axis, axis, loss, levels=colours.levels, colors="white", linewidths=0.4)
        bar = figure.colorbar(colours, ax=panel, shrink=0.8, pad=0.02, ticks=colours.levels[::4])
        bar.ax.tick_params(labelsize=8)
        some = slice(2, None, 4)
        u, v = -chosen[some, some], -rejected[some, some]
        longest = torch.hypot(u, v).max().item()
        panel.quiver(
            axis[some], axis[some], u, v, angles="xy", scale_units="xy",
            scale=max(longest, 1e-30) / 3.7, color="#c2255c", width=0.006,
        )  # fmt: skip
        panel.plot(0, 0, marker="o", ms=5, color="white", markeredgecolor="black")
        panel.set_title(name, fontsize=13, fontweight="bold", loc="left", pad=18)
        note = f"largest gradient {longest:.3g}" + (f"; {notes[name]}" if name in notes else "")
        panel.text(0, 1.02, note, transform=panel.transAxes, fontsize=8, color="#495057")
        panel.set_xlim(-REACH, REACH)
        panel.set_ylim(-REACH, REACH)
        panel.set_aspect("equal")
        panel.set_xticks([-REACH, 0, REACH])
        panel.set_yticks([-REACH, 0, REACH])
        panel.tick_params(labelsize=8)
        panel.set_xlabel("chosen log-ratio", fontsize=9, labelpad=1)
        panel.set_ylabel("rejected log-ratio", fontsize=9, labelpad=-3)
    figure.suptitle(
        "Loss (colour) and -gradient (arrows) of one pair; "
        "right: chosen likelier than under the reference, down: rejected less likely; "
        "dot: policy = reference",
        fontsize=12,
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


def table_row(name: str, loss: Loss, axis: Tensor, grid: Tensor) -> list[str]:
    """Name, loss and gradient at policy == reference, lowest point of the plane, what it needs."""
    start = make_pairs([(START, START, START, START, TOKENS, TOKENS)], torch.float64)
    value, chosen, rejected = (x.item() for x in loss_and_gradient(loss, start))
    r, c = divmod(int(grid.argmin()), GRID)
    terms = parse_objective(name)
    return [
        name,
        f"{value:.4g}",
        f"{chosen:+.4g}",
        f"{rejected:+.4g}",
        f"{grid.min().item():.3g} at ({axis[c]:+.0f}, {axis[r]:+.0f})",
        "yes" if needs_reference(terms) else "no",
        "step" if whole_step(terms) else "pair",
        " ".join(i for i in INVARIANCES if holds(i, loss)),
    ]


def print_table(rows: list[list[str]]) -> None:
    head = ["objective", "at start", "d/d chosen", "d/d rejected"]
    head += ["lowest here (c, r)", "reference", "looks at", "invariances that hold"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main() -> None:
    cfg = parse_cli(LabConfig)
    for path in cfg.mine:
        print(f"{path}: {', '.join(register_file(path))}")
    losses = {name: as_loss(name, cfg) for name in [*LOSSES, "mpo"]}
    planes = {n: plane(loss, whole_step(parse_objective(n))) for n, loss in losses.items()}
    notes = {n: "sum with three fixed pairs" for n in losses if whole_step(parse_objective(n))}
    notes["ipo"] = f"flat only {1 / (2 * cfg.beta):.3g} nats per token apart"
    notes["mpo"] = PRESETS["mpo"]
    print_table([table_row(n, loss, planes[n][0], planes[n][1]) for n, loss in losses.items()])
    write_atomic(cfg.out, draw(planes, notes))
    print(f"\n{cfg.out} drawn; beta {cfg.beta}, label smoothing {cfg.label_smoothing}")
    failed = []
    for name, loss in losses.items():
        checks = check_loss(loss)
        failed += [f"{name}: {check}" for check, passed in checks.items() if not passed]
        print(f"{name}: " + ", ".join(f"{c} {'ok' if p else 'FAILED'}" for c, p in checks.items()))
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(losses)} objectives, every check passed")


if __name__ == "__main__":
    run(main)
