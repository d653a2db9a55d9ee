"""The lab over all objectives, and objectives from a user's own file."""

import copy
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train
from losses import (
    HYPER,
    LOSSES,
    BcoShift,
    PairLogps,
    needs_reference,
    objective,
    parse_objective,
    whole_step,
)
from runtime import InputError, run
from tools import lab


def add(x, **amounts):
    """x with amounts added to some of its fields."""
    return replace(x, **{name: getattr(x, name) + amount for name, amount in amounts.items()})


def swap(x):
    """Chosen and rejected exchanged: fields come in pairs, the chosen response's first."""
    columns = list(vars(x).values())
    return PairLogps(*(columns[n ^ 1] for n in range(len(columns))))


# policy and reference move together, each response by an amount of its own
MOVES = {"policy_chosen": 3, "reference_chosen": 3, "policy_rejected": -2, "reference_rejected": -2}
# Each: (loss, pairs) -> by how much the invariance is broken, 0 where it holds.
INVARIANCES = {
    # only log-ratios matter
    "shift": lambda f, x: f(x) - f(add(x, **MOVES)),
    # only the margin matters, so nothing stops chosen and rejected from falling together
    "margin": lambda f, x: f(x) - f(add(x, policy_chosen=-3, policy_rejected=-3)),
    # swapping the responses gives the other probability
    "swap": lambda f, x: (-f(x)).exp() + (-f(swap(x))).exp() - 1,
    # lengths do not enter
    "length": lambda f, x: f(x) - f(add(x, chosen_length=7, rejected_length=2)),
    # only means over tokens enter
    "per_token": lambda f, x: f(x) - f(PairLogps(*(2 * column for column in vars(x).values()))),
    "nonnegative": lambda f, x: f(x).clamp(max=0),
}


def holding(loss):
    """The invariances that a loss has, on the example pairs in float64."""
    broken = {name: measure(loss, lab.example_pairs()) for name, measure in INVARIANCES.items()}
    return [name for name, amount in broken.items() if amount.abs().max().item() < 1e-9]


EXPECTED = {
    "dpo": "shift margin swap length nonnegative",
    "rso": "shift margin length nonnegative",
    "ipo": "shift per_token nonnegative",
    "cdpo": "shift margin length nonnegative",
    "robust": "shift margin length",
    "bco": "shift length nonnegative",
    "sppo": "shift length nonnegative",
    "aot": "shift margin swap length nonnegative",
    "aot_unpaired": "shift margin length nonnegative",
    "odds_ratio": "swap per_token nonnegative",
    "sft": "per_token nonnegative",
}


@pytest.fixture
def registry():
    """LOSSES as it was, after a test that registers."""
    before = dict(LOSSES)
    yield LOSSES
    LOSSES.clear()
    LOSSES.update(before)


def own_file(folder, text, name="my_loss.py"):
    path = folder / name
    path.write_text(text)
    return path


def documented_example():
    """The five-line objective of the README."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^    import torch.nn.functional.*?- gap\)\n", text, re.M | re.S)
    return "\n".join(line[4:] for line in block[0].splitlines()) + "\n"


# --------------------------------------------------------------------------- the lab


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_passes_the_checks_of_the_lab(name):
    checks = lab.check_loss(LOSSES[name])
    assert all(checks.values()), checks


@pytest.mark.parametrize("name", LOSSES)
def test_an_objective_has_the_invariances_of_its_formula_and_no_other(name):
    assert holding(LOSSES[name]) == EXPECTED[name].split()


@pytest.mark.parametrize("name", LOSSES)
def test_an_objective_needs_what_its_entry_says(name, tmp_path):
    entry = LOSSES[name]
    tried = lab.probe(tmp_path, name, entry.function)
    assert (tried.needs_reference, tried.whole_step) == (entry.needs_reference, entry.whole_step)


def test_the_lab_names_a_failing_check_and_exits_with_1(tmp_path, registry, monkeypatch, capsys):
    text = (
        "def bad(logps):\n"
        "    return (logps.policy_chosen - logps.policy_rejected.detach() / 2).exp()\n"
    )
    path = own_file(tmp_path, text)
    monkeypatch.setattr(lab, "draw", lambda *_: b"")
    monkeypatch.setattr(lab, "GRID", 3)
    monkeypatch.setattr(sys, "argv", ["lab.py", f"--mine={path}", f"--out={tmp_path / 'x'}"])
    with pytest.raises(SystemExit) as stop:
        run(lab.main)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: failed: bad: finite differences") and "dpo" not in message


def test_an_objective_may_have_a_keyword_of_its_own_and_a_flag_of_that_name(
    tmp_path, registry, monkeypatch, capsys
):
    monkeypatch.setattr("losses.HYPER", (*HYPER, "gap"))
    monkeypatch.setattr(train.TrainConfig, "gap", 3.0, raising=False)
    run = SimpleNamespace(cfg=train.TrainConfig(), shift=BcoShift())
    assert train.Run.hyper.fget(run) == {
        "beta": 0.1, "label_smoothing": None, "bco_shift": 0.0, "gap": 3.0
    }  # fmt: skip
    path = own_file(tmp_path, "def wide(logps, gap=2.0):\n    return gap - logps.policy_chosen\n")
    monkeypatch.setattr(lab, "draw", lambda *_: b"")
    monkeypatch.setattr(lab, "GRID", 3)
    monkeypatch.setattr(sys, "argv", ["lab.py", f"--mine={path}", f"--out={tmp_path / 'x'}"])
    lab.main()  # its own flags have no gap: the default
    assert re.search(r"^wide +passed +32 ", capsys.readouterr().out, re.M)
    logps = lab.example_pairs()
    total, _ = objective(parse_objective("wide"), logps, **train.Run.hyper.fget(run))
    torch.testing.assert_close(total, 3.0 - logps.policy_chosen)


def test_the_drawing_has_a_panel_an_objective():
    planes = {name: lab.plane(LOSSES[name], LOSSES[name].whole_step) for name in ("dpo", "sft")}
    assert lab.draw(planes).startswith(b"\x89PNG")


# --------------------------------------------------------------------------- own file


def test_an_own_objective_is_trainable_by_name_and_found_to_need_what_it_needs(tmp_path, registry):
    text = documented_example() + (
        "def centred(logps, beta=0.3):\n"
        "    z = beta * logps.chosen_logratio\n"
        "    return (z - z.mean()) ** 2\n"
        "def _helper(logps): return None\n"
        "def other(x): return None\n"
    )
    assert lab.register_file(own_file(tmp_path, text)) == ["simpo", "centred"]
    terms = parse_objective("0.5*simpo+centred")
    assert not needs_reference(terms[:1]) and not whole_step(terms[:1])
    assert needs_reference(terms[1:]) and whole_step(terms[1:])
    total, parts = objective(terms, lab.example_pairs(), beta=0.1)
    torch.testing.assert_close(total, 0.5 * parts["simpo"] + parts["centred"])
    again = lab.register_file(tmp_path / "my_loss.py")
    assert again == ["simpo", "centred"]
    with pytest.raises(InputError, match="simpo exists already"):
        lab.register_file(own_file(tmp_path, documented_example(), "another.py"))


@pytest.mark.parametrize("name", ["mpo", "all", "DPO", "cDPO", "base"])
def test_an_own_objective_takes_no_place_of_the_paper_s(name, tmp_path, registry):
    text = documented_example().replace("simpo", name)
    with pytest.raises(InputError, match=f"an objective named {name} exists already; rename"):
        lab.register_file(own_file(tmp_path, text))


def test_a_dataclass_of_an_own_file_works(tmp_path, registry):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Scale:\n    by: float = 2.0\n"
        "def scaled(logps): return Scale().by * -logps.policy_chosen\n"
    )
    assert lab.register_file(own_file(tmp_path, text)) == ["scaled"]
    assert LOSSES["scaled"](lab.example_pairs()).isfinite().all()


@pytest.mark.parametrize(
    "text, message",
    [
        ("def dpo(logps): return logps.policy_chosen", "an objective named dpo exists already"),
        ("def mpo(logps): return logps.policy_chosen", "an objective named mpo exists already"),
        ("def f(x): return x", "no public function whose first parameter is `logps`"),
        ("import nosuchmodule", r"my_loss.py line 1: ModuleNotFoundError"),
        ("\nimport sys\nsys.exit(0)", r"my_loss.py line 3: SystemExit: 0"),
        ("def f(logps)\n", r"my_loss.py: SyntaxError: .*line 1"),
        ("\ndef f(logps): return logps.chosen", r"my_loss.py line 2: AttributeError"),
        (
            "def f(logps): return logps.policy_chosen.mean()",
            r"one value per pair, .6,., got \(\)",
        ),
        ("def f(logps): return 1.0", "got float"),
        ("def f(logps): return logps.policy_chosen.sqrt()", "f is not finite on ordinary pairs"),
        ("def f(logps): return logps.chosen_length", "no gradient with respect to policy_chosen"),
        ("def f(logps, gamma): return logps.policy_chosen", "missing 1 .* argument: 'gamma'"),
        (
            "def f(logps):\n    assert len(logps.policy_chosen) > 1\n"
            "    return -logps.policy_chosen",
            r"my_loss.py line 2: AssertionError",
        ),
    ],
)
def test_an_own_file_that_would_fail_later_is_refused_at_once(tmp_path, registry, text, message):
    before = copy.copy(registry)
    with pytest.raises(InputError, match=message):
        lab.register_file(own_file(tmp_path, text))
    assert registry == before


def test_an_own_file_of_which_the_loss_takes_nothing_is_refused(tmp_path, registry, monkeypatch):
    path = own_file(tmp_path, "def simpo(logps):\n    return -logps.policy_chosen\n")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--mine={path}", "--loss=dpo+sft"])
    with pytest.raises(InputError, match="--loss has nothing of .*: name simpo there"):
        train.main()


def test_a_missing_own_file_and_a_wrong_flag_end_with_status_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="expected an existing .py file"):
        lab.register_file(tmp_path / "absent.py")
    for wrong in ("label_smoothing=0.7", "label_smoothing=-0.1", "beta=0", "beta=nan"):
        monkeypatch.setattr(sys, "argv", ["lab.py", f"--{wrong}"])
        with pytest.raises(SystemExit, match="2"):
            lab.main()
        assert f"{wrong.split('=')[0]} must be >= " in capsys.readouterr().err
