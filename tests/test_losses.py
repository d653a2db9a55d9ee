"""Objectives against golden values, their properties, the chunked head, TRL's numbers."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import OURS
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import LOSSES, BcoShift, PairLogps, loss_and_gradient, objective, parse_objective
from runtime import InputError
from tools.lab import make_pairs, split_pairs
from train import OnlineReference

GOLDEN = json.loads((OURS / "losses.json").read_text())
DTYPES = [torch.float64, torch.float32]
TYPICAL = GOLDEN["aot_sharding"][0]["inputs"]


def pairs(inputs: dict, dtype: torch.dtype = torch.float64) -> PairLogps:
    return PairLogps(**{k: torch.tensor(v, dtype=dtype) for k, v in inputs.items()})


def close(got, expected, dtype: torch.dtype, gradient: bool = False) -> None:
    """At the tolerances the golden file states."""
    rtol, atol = (1e-4, 1e-7) if gradient else (2e-5, 2e-6)
    if dtype == torch.float64:
        rtol, atol = 1e-9, 1e-12
    got, expected = (torch.as_tensor(x, dtype=dtype) for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def close_grads(grads, expected: dict, dtype: torch.dtype) -> None:
    close(grads[0], expected["policy_chosen"], dtype, gradient=True)
    close(grads[1], expected["policy_rejected"], dtype, gradient=True)


def rows_of(x: PairLogps, rows) -> PairLogps:
    return PairLogps(*(getattr(x, f.name)[rows] for f in fields(x)))


def mean_gradient(terms, x: PairLogps, **hyper):
    value, *grads = loss_and_gradient(lambda p: objective(terms, p, **hyper)[0], x)
    return value, [g / len(value) for g in grads]


# --------------------------------------------------------------------------- golden values


def test_the_golden_file_holds_a_case_for_every_objective():
    assert {c["loss"] for c in GOLDEN["cases"]} == set(LOSSES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_the_golden_cases(name, dtype):
    for case in (c for c in GOLDEN["cases"] if c["loss"] == name):
        x = pairs(case["inputs"], dtype)
        value, *grads = loss_and_gradient(lambda p, c=case: LOSSES[name](p, **c["hyper"]), x)
        expected = torch.tensor(case["expected"]["losses"], dtype=dtype)
        if case.get("order") == "any":
            value, expected = value.sort().values, expected.sort().values
        close(value, expected, dtype)
        close(value.mean(), case["expected"]["mean"], dtype)
        close_grads(grads, case["expected"]["grad_of_sum"], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_objectives_equal_the_golden_sums(dtype):
    for case in GOLDEN["objectives"]:
        terms = [(w, n) for w, n in case["objective"]]
        x, expected = pairs(case["inputs"], dtype), case["expected"]
        total, parts = objective(terms, x, **case["hyper"])
        close(total.mean(), expected["loss"], dtype)
        assert parts.keys() == expected["parts"].keys()
        for name, part in parts.items():
            close(part.mean(), expected["parts"][name], dtype)
        close_grads(mean_gradient(terms, x, **case["hyper"])[1], expected["grad_of_loss"], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bco_shift_follows_the_golden_steps_over_ranks_and_micro_batches(dtype):
    for sequence in GOLDEN["bco_sequences"]:
        beta, shift = sequence["beta"], BcoShift()
        for step in sequence["steps"]:
            close(shift.mean, step["project_shift_used"], dtype)
            rewards, values = [], []
            for rank in (r for micro in step["micro_batches"] for r in micro["ranks"]):
                x = pairs(rank["inputs"], dtype)
                value, *grads = loss_and_gradient(
                    lambda p, s=shift.mean, b=beta: LOSSES["bco"](p, beta=b, bco_shift=s), x
                )
                close(value, rank["project"]["losses"], dtype)
                close_grads(grads, rank["project"]["grad_of_sum"], dtype)
                rewards += [beta * x.chosen_logratio, beta * x.rejected_logratio]
                values.append(value)
            close(torch.cat(values).mean(), step["project_loss"], dtype)
            shift.update(torch.cat(rewards))
            close(shift.mean, step["project_state_after"]["mean"], dtype)
            assert shift.count == step["project_state_after"]["responses"]


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aot_depends_on_how_much_of_the_step_is_sorted(name, dtype):
    golden = GOLDEN["aot_sharding"][0]
    x, expected = pairs(golden["inputs"], dtype), golden["expected"][name]
    loss = LOSSES[name]
    halves = torch.stack([loss(rows_of(x, slice(0, 3))), loss(rows_of(x, slice(3, 6)))])
    close(loss(x).mean(), expected["whole_step"], dtype)
    close(halves.mean(), expected["two_ranks_sorted_apart"], dtype)
    alone = torch.cat([loss(one) for one in split_pairs(x)])
    close(alone.mean(), expected["pairs_alone"], dtype)
    torch.testing.assert_close(alone, LOSSES["dpo"](x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sft_is_the_mean_per_response_then_over_pairs_in_any_layout(dtype):
    golden = GOLDEN["sft_layouts"][0]
    ranks = [[r for micro in rank for r in micro] for rank in golden["token_logps"]]
    responses = [torch.tensor(r, dtype=dtype) for rank in ranks for r in rank]
    owner = torch.cat([torch.full((len(r),), i) for i, r in enumerate(responses)])
    rows = torch.cat(responses).requires_grad_()
    sums, lengths = losses.sum_by_response(rows, owner, len(responses))
    loss = LOSSES["sft"](PairLogps(sums, sums, None, None, lengths, lengths)).mean()
    close(loss, golden["expected"]["per_response_mean"], dtype)
    (grad,) = torch.autograd.grad(loss, rows)
    expected = [
        g
        for rank in golden["expected"]["grad_of_per_response_mean"]
        for micro in rank
        for g in micro
    ]
    close(grad, torch.tensor(expected, dtype=dtype)[owner], dtype, gradient=True)


def vector(values, dtype=torch.float64):
    """A model of these weights."""
    model = torch.nn.Linear(len(values), 1, bias=False, dtype=dtype)
    model.weight.data[0] = torch.tensor(values, dtype=dtype)
    return model


def test_reference_updates_follow_the_golden_runs_soft_and_hard():
    golden = GOLDEN["reference_updates"][0]
    for case in golden["runs"]:
        reference = vector(golden["start"])
        updates = OnlineReference(reference, None)
        steps = zip(golden["policy_after_step"], case["reference_after_step"])
        for t, (policy, expected) in enumerate(steps, 1):
            if t % case["every"] == 0:
                updates.move(vector(policy), case["alpha"])
            close(reference.weight[0], expected, torch.float64)


def test_a_float32_reference_keeps_a_small_blend_with_a_bfloat16_policy():
    reference = vector([1.0], torch.float32)
    OnlineReference(reference, None).move(vector([2.0], torch.bfloat16), 1e-3)
    close(reference.weight[0], [1.001], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_metrics_equal_the_golden_values_and_ties_are_not_wins(dtype):
    for case in GOLDEN["metrics"]:
        metrics = losses.pair_metrics(pairs(case["inputs"], dtype), case["beta"])
        for name, expected in case["expected"].items():
            close(metrics[name].mean(), expected, dtype)


def test_metrics_without_a_reference_leave_the_rewards_out():
    x = replace(pairs(TYPICAL), reference_chosen=None, reference_rejected=None)
    names = {"logps/chosen", "logps/rejected", "nll", "length/chosen", "length/rejected"}
    assert losses.pair_metrics(x).keys() == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odds_ratio_is_finite_where_an_average_logp_is_exactly_zero(dtype):
    for case in GOLDEN["finite_only"]:
        x = pairs(case["inputs"], dtype)
        for value in loss_and_gradient(LOSSES[case["loss"]], x):
            assert value.isfinite().all()


@pytest.mark.parametrize("text, expected", GOLDEN["parse_objective"]["good"])
def test_good_objective_texts_are_read_as_in_the_golden_file(text, expected):
    assert parse_objective(text) == [tuple(term) for term in expected]


@pytest.mark.parametrize("text", GOLDEN["parse_objective"]["bad"])
def test_bad_objective_texts_are_input_errors(text):
    with pytest.raises(InputError):
        parse_objective(text)


def token_golden(dtype: torch.dtype):
    tensors = load_file(OURS / "losses_logits.safetensors")
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logps_and_their_gradient_equal_the_golden_tensors(dtype):
    golden, expected = token_golden(dtype), GOLDEN["token_logps"][0]
    logits = golden["logits"].requires_grad_()
    got = losses.token_logps(logits, golden["labels"])
    close(got, golden["token_logps"], dtype)
    close(got.sum(-1), expected["logps"], dtype)
    assert (golden["labels"][:, 1:] != -100).sum(-1).tolist() == expected["lengths"]
    got.sum().backward()
    close(logits.grad, golden["grad_logits_of_sum"], dtype, gradient=True)


@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chunked_head_equals_the_golden_tensors(dtype, chunk):
    golden, expected = token_golden(dtype), GOLDEN["token_logps"][0]
    kept = golden["labels"][:, 1:] != -100
    response, _ = kept.nonzero(as_tuple=True)
    hidden = golden["logits"][:, :-1][kept].requires_grad_()  # logits as hidden, identity as head
    head, target = torch.eye(hidden.shape[1], dtype=dtype), golden["labels"][:, 1:][kept]
    rows = losses.row_logps(hidden, head, target, chunk)
    sums, lengths = losses.sum_by_response(rows, response, len(kept))
    close(sums, expected["logps"], dtype)
    assert lengths.tolist() == expected["lengths"]
    sums.sum().backward()
    close(hidden.grad, golden["grad_logits_of_sum"][:, :-1][kept], dtype, gradient=True)


# --------------------------------------------------------------------------- the chunked head


def head_case(dtype: torch.dtype, rows: int = 50, d: int = 8, vocab: int = 23):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, d, generator=generator).to(dtype)
    weight = torch.randn(vocab, d, generator=generator).to(dtype)
    target = torch.randint(vocab, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def head_grads(logps, hidden, weight):
    upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    return torch.autograd.grad((logps * upstream).sum(), (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_a_chunked_head_equals_the_plain_one_in_values_and_gradients(chunk):
    hidden, weight, target = head_case(torch.float64)
    chunked = losses.row_logps(hidden, weight, target, chunk)
    plain = (hidden @ weight.T).log_softmax(-1)[torch.arange(len(target)), target]
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(
        head_grads(chunked, hidden, weight), head_grads(plain, hidden, weight)
    )


def test_the_chunked_head_passes_finite_differences():
    hidden, weight, target = head_case(torch.float64, rows=5, d=3, vocab=4)
    assert torch.autograd.gradcheck(
        lambda h, w: losses.row_logps(h, w, target, 2), (hidden, weight)
    )


def test_no_tensor_of_all_rows_by_the_vocabulary_ever_lives():
    rows, d, vocab, chunk = 60, 4, 200, 5
    hidden, weight, target = head_case(torch.float32, rows, d, vocab)
    made, saved = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    with Record(), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        losses.row_logps(hidden, weight, target, chunk).sum().backward()
    assert max(made) == chunk * vocab < rows * vocab
    assert max(saved) == vocab * d  # the head itself, nothing of a chunk


def test_the_heads_gradient_is_added_up_in_float32_under_bfloat16_states():
    hidden, weight, target = head_case(torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    one = losses.row_logps(hidden[:1], master, target[:1])
    # 1000 times the same row, a chunk each: a bfloat16 sum would stop growing at about 256
    rows = hidden[:1].expand(1000, -1)
    many = losses.row_logps(rows, master, target[:1].expand(1000), 1)
    assert one.dtype == many.dtype == torch.float32
    (grad_one,) = torch.autograd.grad(one.sum(), master)
    grad_hidden, grad_many = torch.autograd.grad(many.sum(), (hidden, master))
    assert (grad_hidden.dtype, grad_many.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(grad_many, 1000 * grad_one, rtol=1e-4, atol=1e-5)


def test_of_bfloat16_states_log_probs_and_slopes_are_computed_in_float32():
    hidden, weight, target = head_case(torch.bfloat16, vocab=24)
    logits = (hidden @ weight.T).float()
    plain = logits.log_softmax(-1)[torch.arange(len(target)), target]
    expected = head_grads(plain, hidden, weight)[0]
    for chunk in (0, 50):
        logps = losses.row_logps(hidden, weight, target, chunk)
        assert torch.equal(logps, plain)
        assert torch.equal(head_grads(logps, hidden, weight)[0], expected)


def test_a_frozen_head_and_an_empty_pack_are_served_too():
    hidden, weight, target = head_case(torch.float32)
    logps = losses.row_logps(hidden, weight.detach(), target, 8)
    assert torch.autograd.grad(logps.sum(), hidden)[0].isfinite().all()
    none = losses.row_logps(hidden[:0], weight, target[:0])
    sums, lengths = losses.sum_by_response(none, target[:0], 2)
    assert sums.tolist() == lengths.tolist() == [0, 0]
    assert torch.autograd.grad(sums.sum(), weight)[0].count_nonzero() == 0


def test_the_same_rows_in_another_order_give_the_same_float32_sums():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(6000, generator=generator)
    response = torch.arange(6000) % 3
    shuffled = torch.randperm(6000, generator=generator)
    sums = losses.sum_by_response(logps, response, 3)[0]
    assert torch.equal(sums, losses.sum_by_response(logps[shuffled], response[shuffled], 3)[0])


# --------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_inputs_are_computed_in_float32_to_the_bit(name):
    x = pairs(TYPICAL, torch.bfloat16)
    wide = PairLogps(*(getattr(x, f.name).float() for f in fields(x)))
    assert x.policy_chosen.dtype == torch.float32
    assert torch.equal(LOSSES[name](x), LOSSES[name](wide))


def test_without_label_smoothing_cdpo_and_robust_are_dpo():
    x = pairs(TYPICAL)
    for name in ("cdpo", "robust"):
        torch.testing.assert_close(LOSSES[name](x, label_smoothing=0.0), LOSSES["dpo"](x))


def test_a_misspelt_constant_is_refused_and_one_that_a_loss_does_not_look_at_is_not():
    x = pairs(TYPICAL)
    with pytest.raises(TypeError, match="no objective takes betta"):
        objective([(1.0, "dpo")], x, betta=5.0)
    torch.testing.assert_close(LOSSES["sft"](x, beta=5.0), LOSSES["sft"](x))


@pytest.mark.parametrize("shift", [-30.0, -1.75, 0.0, 4.0])
def test_bco_is_at_least_dpo_whatever_the_shift(shift):
    x = pairs(TYPICAL)
    assert (LOSSES["bco"](x, bco_shift=shift) >= LOSSES["dpo"](x)).all()


def test_at_the_start_every_value_and_slope_is_that_of_the_papers_formulas():
    start = pairs({k: [-30.0] if "length" not in k else [20.0] for k in TYPICAL})
    ln2 = math.log(2)
    expected = {  # value, d/d policy_chosen
        "dpo": (ln2, -0.05),
        "rso": (1, -0.1),
        "ipo": (25, -10 / 20),
        "cdpo": (ln2, -0.04),
        "robust": (ln2, -0.0625),
        "bco": (2 * ln2, -0.05),
        "sppo": (50, -10),
        "aot": (ln2, -0.05),
        "aot_unpaired": (ln2, -0.05),
        "sft": (1.5, -1 / 20),
    }
    for name, (value, slope) in expected.items():
        got, chosen, _ = loss_and_gradient(LOSSES[name], start)
        assert (got.item(), chosen.item()) == pytest.approx((value, slope)), name
    mpo = objective(parse_objective("mpo"), start)[0].item()
    assert mpo == pytest.approx(0.8 * ln2 + 0.2 * 2 * ln2 + 1.5)


def test_the_hinge_has_gradient_zero_exactly_at_its_corner():
    x = make_pairs([(-1, -3, -2, -3, 4, 4)])  # c = 1, r = 0
    value, chosen, rejected = loss_and_gradient(lambda p: LOSSES["rso"](p, beta=1.0), x)
    assert value.item() == chosen.item() == rejected.item() == 0


def test_log1mexp_is_exact_and_its_gradient_finite_where_e_to_x_rounds_to_one():
    x = torch.tensor([-1e-9, -(2.0**-27), -0.1, -math.log(2), -3.0, -100.0, -1e4]).requires_grad_()
    value = losses.log1mexp(x)
    exact = torch.log(-torch.expm1(x.detach().double()))
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-12)
    assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_of_the_built_in_objectives_two_need_no_reference_and_two_the_whole_step():
    terms = {name: [(1.0, name)] for name in LOSSES}
    assert {n for n in LOSSES if not losses.needs_reference(terms[n])} == {"odds_ratio", "sft"}
    assert {n for n in LOSSES if losses.whole_step(terms[n])} == {"aot", "aot_unpaired"}
    assert losses.whole_step(parse_objective("sft+aot"))
    assert not losses.needs_reference(parse_objective("orpo"))
    assert losses.needs_reference(parse_objective("mpo"))


@pytest.mark.parametrize("text", ["aot+sft", "0.3*rso+0.7*aot_unpaired+2*bco", "mpo"])
def test_pulls_on_pairs_make_micro_batches_equal_to_the_whole_step(text):
    terms, x = parse_objective(text), pairs(TYPICAL)
    _, *pulls = loss_and_gradient(lambda p: objective(terms, p)[0].mean(), x)
    chosen, rejected = pulls
    policy = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)  # scales both log-probs
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        micro = rows_of(x, rows)
        loss = (chosen[rows] * micro.policy_chosen * policy / 2).sum()
        loss = loss + (rejected[rows] * micro.policy_rejected * policy / 2).sum()
        loss.backward()
    whole = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    moved = replace(
        x,
        policy_chosen=x.policy_chosen * whole / 2,
        policy_rejected=x.policy_rejected * whole / 2,
    )
    objective(terms, moved)[0].mean().backward()
    torch.testing.assert_close(policy.grad, whole.grad)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "text, message",
    [
        ("bco_pair", "unknown objective 'bco_pair'; did you mean bco[?]"),
        ("dop", "unknown objective 'dop'; did you mean dpo[?] known: dpo, rso, .*, mpo, orpo"),
        ("DPO", "did you mean dpo[?]"),
        (
            "nan*dpo",
            "cannot read 'nan[*]dpo' of the objective .*; expected .weight[*].name",
        ),
        ("1_0*dpo", "cannot read '1_0[*]dpo'"),
        ("0*dpo", "weight of dpo must be finite and above 0, got 0.0"),
        ("1e999*dpo", "must be finite"),
        ("dpo+", "cannot read '' of the objective 'dpo[+]'"),
        ("0.8*dpo,0.2*bco", "joined by [+], for example"),
        ("dpo+2*dpo", "dpo stands in the objective twice"),
        ("mpo+sft", "mpo stands for 0.8[*]dpo"),
        ("  ", "cannot read '  '"),
    ],
)
def test_objective_errors_say_what_is_wrong_and_what_was_expected(text, message):
    with pytest.raises(InputError, match=message):
        parse_objective(text)


def test_each_term_takes_the_keywords_that_its_function_names():
    terms = parse_objective("cdpo+robust+dpo+sft")
    assert losses.takers(terms, "label_smoothing") == ["cdpo", "robust"]
    assert losses.takers(terms, "beta") == ["cdpo", "robust", "dpo"]


def test_label_smoothing_is_a_tenth_where_it_is_used_and_not_given():
    terms = parse_objective("cdpo+robust")
    given, _ = losses.objective(terms, pairs(TYPICAL), beta=0.2, label_smoothing=0.1)
    for absent in ({}, {"label_smoothing": None}):  # a run passes all its flags
        assert torch.equal(losses.objective(terms, pairs(TYPICAL), beta=0.2, **absent)[0], given)


def test_an_objective_keeps_its_own_default_of_what_is_not_given(monkeypatch):
    def own(logps, label_smoothing=0.3):
        return logps.policy_chosen * label_smoothing

    monkeypatch.setitem(LOSSES, "own", losses.Objective(own))
    x = pairs(TYPICAL)
    assert torch.equal(losses.objective([(1, "own")], x, beta=0.2)[0], own(x))
    assert torch.equal(losses.objective([(1, "own")], x, label_smoothing=0.2)[0], own(x, 0.2))


def test_an_objective_that_needs_a_reference_says_so_without_one():
    x = replace(pairs(TYPICAL), reference_chosen=None, reference_rejected=None)
    for name in LOSSES:
        if losses.needs_reference([(1.0, name)]):
            with pytest.raises(InputError, match="needs reference log-probs"):
                LOSSES[name](x)
        else:
            assert LOSSES[name](x).isfinite().all()


def test_log_probs_that_are_not_one_number_a_pair_are_refused_by_field():
    with pytest.raises(ValueError, match="reference_rejected is .5,.*policy_chosen, .6,"):
        replace(pairs(TYPICAL), reference_rejected=torch.zeros(5))
    with pytest.raises(ValueError, match="policy_chosen is .2, 3., not .pair."):
        PairLogps(*torch.zeros(6, 2, 3))


# --------------------------------------------------------------------------- beside TRL 1.16
# Each formula below is TRL's behaviour in our words; the numbers are those of docs/differences.md.


def test_trl_trains_dpo_when_asked_for_label_smoothing():
    ours = LOSSES["cdpo"](pairs(TYPICAL), label_smoothing=0.1).mean().item()
    trl = -F.logsigmoid(margin(pairs(TYPICAL), 0.1)).mean().item()  # `sigmoid`
    assert (ours, trl) == pytest.approx((5.1974, 5.1226), abs=5e-5)


def margin(x: PairLogps, beta: float) -> torch.Tensor:
    return beta * (
        (x.policy_chosen - x.reference_chosen) - (x.policy_rejected - x.reference_rejected)
    )


def trl_bco(x: PairLogps, beta: float) -> torch.Tensor:
    """`bco_pair` of DPOTrainer since v0.29: no shift."""
    chosen = F.logsigmoid(beta * (x.policy_chosen - x.reference_chosen))
    rejected = F.logsigmoid(-beta * (x.policy_rejected - x.reference_rejected))
    return -chosen - rejected


def test_trl_has_no_reward_shift_in_bco():
    step = GOLDEN["bco_sequences"][1]["steps"][3]  # the fourth step: the mean reward is -1.01
    inputs = [rank["inputs"] for micro in step["micro_batches"] for rank in micro["ranks"]]
    x = pairs({name: sum((i[name] for i in inputs), []) for name in inputs[0]})
    ours = LOSSES["bco"](x, bco_shift=step["project_shift_used"]).mean().item()
    assert (ours, trl_bco(x, 0.1).mean().item()) == pytest.approx((0.6693, 1.2213), abs=5e-5)


def trl_sft(x: PairLogps) -> torch.Tensor:
    """Token mean of one micro-batch."""
    return -x.policy_chosen.sum() / x.chosen_length.sum()


def test_trl_averages_sft_over_the_tokens_of_a_micro_batch():
    golden = GOLDEN["sft_layouts"][0]
    micros = [micro for rank in golden["token_logps"] for micro in rank]
    trl = sum(-sum(map(sum, m)) / sum(map(len, m)) for m in micros) / len(micros)
    assert (golden["expected"]["per_response_mean"], trl) == pytest.approx(
        (0.4495, 0.5802), abs=5e-5
    )
    assert trl == pytest.approx(golden["expected"]["official_mean_of_micro_batch_means"])
    one = rows_of(pairs(TYPICAL), slice(0, 1))  # with one pair a micro-batch both are the same
    torch.testing.assert_close(LOSSES["sft"](one)[0], trl_sft(one))


def test_trl_mpo_lacks_the_shift_and_weighs_long_responses_more():
    x = pairs(TYPICAL)
    ours = objective(parse_objective("mpo"), x, bco_shift=-1.75)[0].mean().item()
    trl = 0.8 * -F.logsigmoid(margin(x, 0.1)).mean() + 0.2 * trl_bco(x, 0.1).mean() + trl_sft(x)
    assert (ours, trl.item()) == pytest.approx((6.4571, 6.3354), abs=5e-5)


def test_trl_sorts_aot_within_a_device():
    x = pairs(TYPICAL)

    def per_device(name, size):
        shards = [rows_of(x, slice(i, i + size)) for i in range(0, 6, size)]
        return torch.cat([LOSSES[name](shard) for shard in shards]).mean().item()

    aot = [per_device("aot", size) for size in (6, 3, 1)]
    unpaired = [per_device("aot_unpaired", size) for size in (6, 3, 1)]
    assert aot == pytest.approx([3.2392, 3.3562, 5.1226], abs=5e-5)
    assert unpaired == pytest.approx([3.5427, 4.1756, 5.1226], abs=5e-5)


def test_trl_averages_micro_batches_of_unequal_size_as_equals():
    x = pairs(TYPICAL)
    loss = LOSSES["dpo"](x)
    trl = (loss[:4].mean() + loss[4:].mean()) / 2  # 4 pairs in one micro-batch, 2 in the other
    assert (loss.mean().item(), trl.item()) == pytest.approx((5.1226, 4.5760), abs=5e-5)


def test_trl_orpo_trains_on_the_prompt_as_well():
    prompt, response = [-3.0] * 30, [-0.5] * 10  # a prompt nobody trained on, a good response
    length = torch.tensor([10.0])
    x = PairLogps(torch.tensor([sum(response)]), length * -2, None, None, length, length)
    nll_trl = -(sum(prompt) + sum(response)) / 40
    odds = 0.1 * LOSSES["odds_ratio"](x).item()
    ours = objective(parse_objective("orpo"), x)[0].item()
    assert (ours, nll_trl + odds) == pytest.approx((0.5097, 2.3847), abs=5e-5)


def test_trl_odds_ratio_has_a_nan_gradient_for_a_sure_response():
    x = torch.tensor([-(2.0**-27)], requires_grad=True)
    trl = torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())
    assert torch.autograd.grad(trl.sum(), x)[0].isnan().all()
    ours = torch.autograd.grad(losses.log1mexp(x).sum(), x)[0].item()
    assert ours == pytest.approx(-(2.0**27), rel=1e-6)


def test_trl_log_probs_of_bfloat16_logits_are_rounded():
    golden = token_golden(torch.float32)
    logits, labels = golden["logits"][:1].bfloat16(), golden["labels"][:1]
    ours = losses.token_logps(logits, labels).sum().item()
    target = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    trl = logits[:, :-1].log_softmax(-1).gather(-1, target).squeeze(-1)
    trl = (trl * (labels[:, 1:] != -100)).sum().item()
    assert (ours, trl) == pytest.approx((-49.6985, -49.75), abs=5e-5)
