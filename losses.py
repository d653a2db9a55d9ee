"""Log-probs of responses, and every objective of the MPO paper (Wang et al., arXiv:2411.10442).

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

Your own comes from a file, `--mine FILE`, or has an entry of LOSSES; tools/lab.py draws them all.

In formulas, for one pair:  c = policy_chosen - reference_chosen,  r = policy_rejected -
reference_rejected (log-ratios of sums over tokens),  nc and nr the lengths in tokens,  s = sigmoid,
e = label_smoothing.  "TRL" is version 1.16, "official" InternVL's trainer_dpo.py.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import InputError

# b batch  s tokens  d channels; row: a position that predicts a response token

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


def aligned(head_weight: Tensor) -> Tensor:  # (vocab d) -> (multiple of 8, d)
    """Rows of zeros behind an odd vocabulary (92,553): an H100 multiplies by it 7 times as fast."""
    missing = -len(head_weight) % 8
    return F.pad(head_weight, (0, 0, 0, missing)) if missing else head_weight


class ChunkedHead(torch.autograd.Function):
    """log_softmax(hidden @ head_weight.T)[target] of every row, a chunk of rows at a time.

    Backward computes each chunk again: only tensors of (chunk vocab) live.  Written by hand
    because autograd would add up the weight's gradient in the weight's dtype, rounding to bfloat16
    after every chunk; here it is added up in float32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head_weight: Tensor, target: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden, head_weight, target)
        ctx.chunk = chunk
        weight, vocab = aligned(head_weight.to(hidden.dtype)), len(head_weight)
        logps = hidden.new_zeros(len(target), dtype=at_least_float32(hidden[:0]).dtype)
        for i in range(0, len(target), chunk):
            rows = slice(i, i + chunk)
            logits = (hidden[rows] @ weight.T)[:, :vocab]
            chunk_logps = logits.log_softmax(-1, dtype=logps.dtype)  # row vocab
            logps[rows] = chunk_logps.gather(-1, target[rows].unsqueeze(-1)).squeeze(-1)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, head_weight, target = ctx.saved_tensors
        weight, vocab = aligned(head_weight.to(hidden.dtype)), len(head_weight)
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for i in range(0, len(target), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            logits = hidden[rows] @ weight.T  # 0 behind the vocabulary
            probs = logits[:, :vocab].softmax(-1, dtype=grad.dtype)
            grad_logits = probs.mul_(-grad[rows].unsqueeze(-1))  # d logp = onehot(target) - probs
            grad_logits.scatter_add_(-1, target[rows].unsqueeze(-1), grad[rows].unsqueeze(-1))
            logits[:, :vocab] = grad_logits
            grad_hidden[rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight[:vocab].to(head_weight.dtype)
        return grad_hidden, grad_weight, None, None


def row_logps(hidden: Tensor, head_weight: Tensor, target: Tensor, chunk: int = 1024) -> Tensor:
    """Log-prob of each row's target, (row), in float32: hidden (row d), head_weight (vocab d).

    The products run in the dtype of `hidden`; a float32 head under bfloat16 hidden states gets its
    gradient in float32, unrounded.  chunk 0: the readable way, all logits at once.
    """
    if not chunk:
        logps = at_least_float32(hidden @ head_weight.T).log_softmax(-1)
        return logps.gather(-1, target[:, None])[:, 0]
    return ChunkedHead.apply(hidden, head_weight, target, chunk)


def sum_by_response(logps: Tensor, response: Tensor, num_responses: int) -> tuple[Tensor, Tensor]:
    """(sums, lengths), each (response), of row log-probs; response[i] owns row i."""
    # added in float64, where the order of CUDA's atomic adds cannot show after rounding: the same
    # pack scored twice gives the same float32, and log-ratios at the start are exactly 0
    zeros = logps.new_zeros(num_responses, dtype=torch.float64)
    sums = zeros.index_add(0, response, logps.double()).to(logps.dtype)
    lengths = zeros.index_add(0, response, torch.ones_like(logps, dtype=torch.float64))
    return sums, lengths.to(logps.dtype)


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
        for name, value in vars(self).items():
            if value is None:
                continue
            if value.shape != self.policy_chosen.shape or value.ndim != 1:
                shape, pair = tuple(value.shape), tuple(self.policy_chosen.shape)
                raise ValueError(f"{name} is {shape}, not (pair) as policy_chosen, {pair}")
            object.__setattr__(self, name, at_least_float32(value))

    @property
    def chosen_logratio(self) -> Tensor:  # c
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:  # r
        return self.policy_rejected - self.reference_rejected


# --------------------------------------------------------------------------- the objectives


def dpo(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """-log s(beta (c - r)).

    Eq. 4, the preference loss of MPO: weight 0.8 in eq. 3.  TR-DPO is this with a reference that
    moves (train.py).
    """
    return -F.logsigmoid(beta * (logps.chosen_logratio - logps.rejected_logratio))


def rso(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """max(0, 1 - beta (c - r)).

    The paper's RSO row is this hinge alone: RSO's rejection-sampled data are not part of it
    (section 5.2.3).  TRL: `hinge`.
    """
    return F.relu(1 - beta * (logps.chosen_logratio - logps.rejected_logratio))


def ipo(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """(c/nc - r/nr - 1/(2 beta))^2.

    Averages over tokens, as the paper's section 5.2.3 says; in the official trainer only where ipo
    is the sole loss.  At beta 0.1 it asks for 5 nats per token, out of reach: it never stops
    pulling, with a gradient 1/nc times 200 that of dpo.
    """
    gap = logps.chosen_logratio / logps.chosen_length
    gap = gap - logps.rejected_logratio / logps.rejected_length
    return (gap - 1 / (2 * beta)) ** 2


def cdpo(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:  # (pair)
    """-(1-e) log s(z) - e log s(-z), z = beta (c - r): the labels are swapped with chance e.

    The paper does not state its e; 0.1 is our choice.  TRL's `sigmoid` ignores label smoothing
    since v0.29 and would train plain dpo.
    """
    z = beta * (logps.chosen_logratio - logps.rejected_logratio)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:  # (pair)
    """[-(1-e) log s(z) + e log s(-z)] / (1-2e), z = beta (c - r): on average dpo of true labels.

    Unbounded below: a negative loss is right.  The paper does not state its e; 0.1 is our choice.
    """
    z = beta * (logps.chosen_logratio - logps.rejected_logratio)
    noisy = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return noisy / (1 - 2 * label_smoothing)


def bco(logps: PairLogps, beta: float = 0.1, bco_shift: float = 0.0) -> Tensor:  # (pair)
    """-log s(beta c - shift) - log s(-(beta r - shift)).

    Eq. 5 = eq. 6 + eq. 7, the quality loss of MPO: weight 0.2 in eq. 3.  The shift is the mean of
    earlier rewards, a plain number kept by `BcoShift`.  Official: a mean that includes the present
    batch and is lost on resume.  TRL: no shift at all.
    """
    chosen = -F.logsigmoid(beta * logps.chosen_logratio - bco_shift)
    rejected = -F.logsigmoid(-(beta * logps.rejected_logratio - bco_shift))
    return chosen + rejected


def sppo(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2.

    TRL: `sppo_hard`.  At beta 0.1 it starts at 50 with a gradient 200 times that of dpo; SPPO's own
    paper has beta 0.001.  To mix it with others, give it a far smaller weight.
    """
    goal = 1 / (2 * beta)
    return (logps.chosen_logratio - goal) ** 2 + (logps.rejected_logratio + goal) ** 2


def aot(logps: PairLogps, beta: float = 0.1) -> Tensor:  # (pair)
    """-log s(beta (M_k - R_k)), M the sorted policy margins, R the sorted reference margins.

    Sorts over the pairs it is given, which must be those of the whole step (`whole_step`,
    train.step_gradient).  TRL sorts within one device's micro-batch; with one pair there it is dpo.
    """
    margin = logps.policy_chosen - logps.policy_rejected
    reference_margin = logps.reference_chosen - logps.reference_rejected
    return -F.logsigmoid(beta * (margin - of_same_rank(reference_margin, margin)))


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


def sft(logps: PairLogps) -> Tensor:  # (pair)
    """-pc/nc: the mean NLL per chosen token, then the mean over pairs (paper, eq. 8).

    The generation loss of MPO, weight 1.  Official code and TRL take the token mean of a
    micro-batch: the same number with one pair in it, with more long responses weigh more.
    """
    return -logps.policy_chosen / logps.chosen_length


# --------------------------------------------------------------------------- registry

HYPER = ("beta", "label_smoothing", "bco_shift")  # keywords: flags of train.py, and the shift


@dataclass(frozen=True)
class Objective:
    """A loss and what it looks at; called as the loss itself."""

    function: Loss
    needs_reference: bool = True
    whole_step: bool = False  # a pair's loss depends on the step's other pairs

    def __call__(self, logps: PairLogps, **hyper: float | None) -> Tensor:  # (pair)
        return self.function(logps, **self.taken(logps, hyper))

    def taken(self, logps: PairLogps, hyper: dict[str, float | None]) -> dict[str, float]:
        """Those of HYPER that the function names; of what is None it has a default."""
        if unknown := hyper.keys() - set(HYPER):
            raise TypeError(f"no objective takes {', '.join(unknown)}; HYPER names what they take")
        if self.needs_reference and logps.reference_chosen is None:
            raise InputError("this objective needs reference log-probs and there are none")
        return {k: v for k, v in hyper.items() if k in self.keywords and v is not None}

    @property
    def keywords(self) -> Iterable[str]:
        return inspect.signature(self.function).parameters


# name -> objective, by what they look at
LOSSES = {loss.__name__: Objective(loss) for loss in (dpo, rso, ipo, cdpo, robust, bco, sppo)}
LOSSES |= {loss.__name__: Objective(loss, whole_step=True) for loss in (aot, aot_unpaired)}
LOSSES |= {loss.__name__: Objective(loss, needs_reference=False) for loss in (odds_ratio, sft)}

PRESETS = {"mpo": "0.8*dpo+0.2*bco+sft", "orpo": "sft+0.1*odds_ratio"}
TRL_NAMES = {"sigmoid": "dpo", "hinge": "rso", "bco_pair": "bco", "sppo_hard": "sppo"}

TERM = re.compile(  # [weight "*"] name ["+" the other terms]
    r"\s*((?P<weight>([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?)\s*\*\s*)?"
    r"(?P<name>[^\W\d]\w*)\s*(\+(?P<others>.*))?"
)


def parse_objective(text: str) -> Terms:
    """`0.8*dpo+0.2*bco+sft` or a preset -> [(weight, name), ...]; else an InputError."""
    weights: dict[str, float] = {}
    others = PRESETS.get(text.strip(), text)
    while others is not None:
        term = TERM.fullmatch(others)
        if not term:
            told = f"cannot read {others!r} of the objective {text!r}; expected [weight*]name"
            raise InputError(f"{told} joined by +, for example 0.8*dpo+0.2*bco+sft")
        name, weight = term["name"], float(term["weight"] or 1)
        if name in PRESETS:
            raise InputError(f"{name} stands for {PRESETS[name]} and stands alone; write that out")
        if name not in LOSSES:
            known, ours = [*LOSSES, *PRESETS], TRL_NAMES.get(name, name.lower())
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"unknown objective {name!r}; {hint}known: {', '.join(known)}")
        if name in weights:
            raise InputError(f"{name} stands in the objective twice; add up its weights")
        if not 0 < weight < math.inf:
            raise InputError(f"weight of {name} must be finite and above 0, got {weight}")
        weights[name], others = weight, term["others"]
    return [(weight, name) for name, weight in weights.items()]


def needs_reference(terms: Terms) -> bool:
    """Whether any term looks at the reference."""
    return any(LOSSES[name].needs_reference for _, name in terms)


def whole_step(terms: Terms) -> bool:
    """Whether a pair's loss depends on the step's other pairs, as in aot."""
    return any(LOSSES[name].whole_step for _, name in terms)


def takers(terms: Terms, keyword: str) -> list[str]:
    """Names of the terms that take this keyword of HYPER."""
    return [name for _, name in terms if keyword in LOSSES[name].keywords]


# --------------------------------------------------------------------------- the step's loss


def objective(terms: Terms, logps: PairLogps, **hyper: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum (pair) and its terms, unweighted: {name: (pair)}; hyper: some of HYPER.

    A micro-batch contributes total.sum() / (pairs of the whole step), however many it holds.
    """
    used = {name: LOSSES[name] for _, name in terms}
    parts = {name: loss.function(logps, **loss.taken(logps, hyper)) for name, loss in used.items()}
    return sum(weight * parts[name] for weight, name in terms), parts


def loss_and_gradient(loss: Loss, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d its sum / d policy_chosen and / d policy_rejected, (pair)), as plain numbers."""
    chosen = logps.policy_chosen.detach().requires_grad_()
    rejected = logps.policy_rejected.detach().requires_grad_()
    value = loss(replace(logps, policy_chosen=chosen, policy_rejected=rejected))
    grads = torch.autograd.grad(value.sum(), (chosen, rejected), materialize_grads=True)
    return value.detach(), *grads


@dataclass
class BcoShift:
    """The mean reward of all earlier steps, "moving average of previous rewards" (paper, eq. 6-7).

    Every response weighs the same.  Updated once a step, after use, so that all micro-batches of a
    step see one number; 0 at the first step.
    """

    mean: float = 0.0
    count: int = 0  # responses so far

    def update(self, rewards: Tensor) -> None:  # (response)
        """Add the rewards of a whole step: beta times the log-ratios of both responses."""
        self.count += len(rewards)
        self.mean += (rewards.double().sum().item() - len(rewards) * self.mean) / self.count


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
