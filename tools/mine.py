"""Objectives of your own, from a file of yours: `--mine my_loss.py` of train.py and tools/lab.py.

    import torch.nn.functional as F

    def simpo(logps, scale=2.0, gap=1.0):
        chosen = logps.policy_chosen / logps.chosen_length
        rejected = logps.policy_rejected / logps.rejected_length
        return -F.logsigmoid(scale * (chosen - rejected) - gap)

Every public function there whose first parameter is `logps`, a losses.PairLogps, is an objective
under its own name.  Of `beta`, `label_smoothing` and `bco_shift` it is passed what it names; other
parameters keep their defaults.  Whether it looks at the reference or at the whole step is found by
trying.
"""

import inspect
import runpy
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losses import LOSSES, PRESETS, Loss, Objective, PairLogps
from runtime import InputError


def register_file(path: Path) -> list[str]:
    """Add every objective of a user's Python file to losses.LOSSES; returns their names.

    What would fail, or train on something else, hours later is an InputError at once.
    """
    path = Path(path).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"--mine {path}: expected an existing .py file")
    names = call_users_code(path, runpy.run_path, str(path), run_name=f"mine_{path.stem}")
    own = {name: value for name, value in names.items() if is_objective(name, value, path)}
    if not own:
        raise InputError(f"{path} defines no public function whose first parameter is `logps`")
    for name in own:
        taken = name in LOSSES and inspect.getfile(LOSSES[name].function) != str(path)
        if taken or name in PRESETS:
            raise InputError(f"{path}: an objective named {name} exists already; rename yours")
    LOSSES.update({name: probe(path, name, loss) for name, loss in own.items()})
    return list(own)


def is_objective(name: str, value: object, path: Path) -> bool:
    """A public function of this file whose first parameter is `logps`."""
    if not inspect.isfunction(value) or value.__module__ != f"mine_{path.stem}":
        return False
    return not name.startswith("_") and list(inspect.signature(value).parameters)[:1] == ["logps"]


def probe(path: Path, name: str, loss: Loss) -> Objective:
    """Try a loss on ordinary pairs: is it an objective, and what does it look at?"""
    x = example_pairs()
    x.policy_chosen.requires_grad_()
    value = call_users_code(path, loss, x)
    if not isinstance(value, Tensor) or value.shape != x.policy_chosen.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        expected = tuple(x.policy_chosen.shape)
        raise InputError(f"{path}: {name} must return one value per pair, {expected}, got {got}")
    if not value.isfinite().all():
        raise InputError(f"{path}: {name} is not finite on ordinary pairs: {value.tolist()}")
    if not value.requires_grad:
        raise InputError(f"{path}: {name} has no gradient with respect to policy_chosen")
    other_reference = replace(
        x,
        reference_chosen=x.reference_chosen * 1.25 - 2,
        reference_rejected=x.reference_rejected * 0.75 - 1,
    )
    moved = call_users_code(path, loss, other_reference)
    alone = [call_users_code(path, loss, pair) for pair in split_pairs(x)]
    whole_step = not torch.allclose(value, torch.cat(alone))
    return Objective(loss, not torch.equal(value, moved), whole_step)


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
    return make_pairs(rows)


def make_pairs(rows: list[tuple[float, ...]], dtype: torch.dtype = torch.float64) -> PairLogps:
    """One row a pair, in the order of the fields of PairLogps."""
    return PairLogps(*torch.tensor(rows, dtype=dtype).T.contiguous())


def split_pairs(x: PairLogps) -> list[PairLogps]:
    """Each pair alone."""
    return [PairLogps(*pair) for pair in zip(*(column.split(1) for column in vars(x).values()))]


def call_users_code(path: Path, function: Callable, *args: Any, **options: Any) -> Any:
    """Whatever a user's code raises becomes one line that names file and line."""
    try:
        return function(*args, **options)
    except Exception as error:  # any: the code is not ours
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f"{path} line {lines[-1]}" if lines else str(path)
        raise InputError(f"{place}: {type(error).__name__}: {error}") from error
