"""The lab: objectives of your own, and every objective drawn, tabulated and checked.

    python tools/lab.py --out losses.png --mine my_loss.py     and then train.py --mine my_loss.py

Every public function of your file (the README has one) whose first parameter is `logps`, a
losses.PairLogps, is an objective under its own name.  Of `beta`, `label_smoothing` and `bco_shift`
it is passed what it names; other parameters keep their defaults.  Whether it looks at the reference
or at the whole step is found by trying.

The drawing has a panel an objective: the loss in colour, arrows where gradient descent pushes a
pair.  A check that fails is named in the table and ends in status 1.
"""

import inspect
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import Failure, InputError, command_line, flag, parse_cli, read_json, run, write_atomic


@command_line
class LabConfig:
    """Draw every objective over the (chosen, rejected) log-ratio plane, tabulate and check it."""

    out: Path = flag(Path("losses.png"), "the drawing")
    mine: tuple[Path, ...] = flag((), "a .py file with objectives of your own; may be repeated")
    beta: float = flag(0.1, "strength of the pull to the reference", 1e-9)
    label_smoothing: float = flag(0.1, "chance that a label is wrong: cdpo, robust", 0, 0.499)
    bco_shift: float = flag(0.0, "mean reward so far: bco")


import torch
from torch import Tensor

import losses
from losses import LOSSES, PRESETS, Loss, Objective, PairLogps, loss_and_gradient, parse_objective
from tools.figures import new_figure, png, text_table

GRID, REACH, TOKENS, START = 41, 20.0, 20.0, -30.0  # points a side, nats, tokens, log-prob of both


def register_file(path: Path, trained: Iterable[str] = ()) -> list[str]:
    """Add every objective of a user's Python file to losses.LOSSES; returns their names.

    What would fail, or train on something else, hours later is an InputError at once: also a file
    of which no --loss of `trained` takes anything.
    """
    path = Path(path).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"--mine {path}: expected an existing .py file")
    names = call_users_code(path, runpy.run_path, str(path), run_name=f"mine_{path.stem}")
    own = {name: value for name, value in names.items() if is_objective(name, value, path)}
    if not own:
        raise InputError(f"{path} defines no public function whose first parameter is `logps`")
    reserved = {"all", *PRESETS, *read_json(Path(__file__).with_name("rows.json"))}  # by --loss
    for name in own:
        taken = name in LOSSES and inspect.getfile(LOSSES[name].function) != str(path)
        if taken or name in reserved:
            raise InputError(f"{path}: an objective named {name} exists already; rename yours")
    LOSSES.update({name: probe(path, name, loss) for name, loss in own.items()})
    terms = [term for loss in trained if loss != "all" for _, term in parse_objective(loss)]
    if terms and not own.keys() & terms:
        raise InputError(f"--loss has nothing of {path}: name {', '.join(own)} there")
    return list(own)


def is_objective(name: str, value: object, path: Path) -> bool:
    """A public function of this file whose first parameter is `logps`."""
    ours = inspect.isfunction(value) and value.__module__ == f"mine_{path.stem}" and name[0] != "_"
    return ours and list(inspect.signature(value).parameters)[:1] == ["logps"]


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
    names = ("reference_chosen", "reference_rejected")
    other = replace(x, **{name: 1.25 * getattr(x, name) - 2 for name in names})
    moved = call_users_code(path, loss, other)
    alone = [call_users_code(path, loss, pair) for pair in split_pairs(x)]
    whole_step = not torch.allclose(value, torch.cat(alone))
    return Objective(loss, not torch.equal(value, moved), whole_step)


def example_pairs(kind: str = "ordinary", dtype: torch.dtype = torch.float64) -> PairLogps:
    """Those of lab_pairs.json: ordinary or extreme, whose keys say what is special about some."""
    pairs = read_json(Path(__file__).with_name("lab_pairs.json"))[kind]
    return make_pairs(sum(pairs.values(), []), dtype)


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
    except (Exception, SystemExit) as error:  # any: the code is not ours
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f"{path} line {lines[-1]}" if lines else str(path)
        raise InputError(f"{place}: {type(error).__name__}: {error}") from error


def check_loss(loss: Loss) -> dict[str, bool]:
    """Every check of one objective, by name; `loss` takes PairLogps alone."""
    x = example_pairs()
    value = loss(PairLogps(*(column.bfloat16() for column in vars(x).values())))

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(x, policy_chosen=chosen, policy_rejected=rejected))

    point = (x.policy_chosen.requires_grad_(), x.policy_rejected.requires_grad_())
    dtypes = (torch.float32, torch.bfloat16)
    extremes = [loss_and_gradient(loss, example_pairs("extreme", dtype)) for dtype in dtypes]
    return {
        "float32 per pair": value.dtype == torch.float32 and value.shape == x.policy_chosen.shape,
        "finite differences": torch.autograd.gradcheck(of_policy, point, raise_exception=False),
        "finite at extremes": all(y.isfinite().all() for values in extremes for y in values),
    }


def plane(loss: Loss, together: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(axis, loss, d/d chosen, d/d rejected) over the plane: (GRID), then (rejected chosen).

    Both responses have 20 tokens, and log-prob -30 under the reference.  `together`: the objective
    looks at a whole step, so that each point is a step of its own.
    """
    axis = torch.linspace(-REACH, REACH, GRID, dtype=torch.float64)
    rows = [(START + x, START + y, START, START, TOKENS, TOKENS) for y in axis for x in axis]
    apart = lambda x: torch.cat([loss(pair) for pair in split_pairs(x)])  # noqa: E731
    values = loss_and_gradient(apart if together else loss, make_pairs(rows))
    return axis, *(v.reshape(GRID, GRID) for v in values)


def draw(planes: dict[str, tuple[Tensor, ...]]) -> bytes:
    """PNG with a panel an objective: the loss in colour, arrows along the negative gradient."""
    figure, axes = new_figure(-(-len(planes) // 4), 4, width=4.1, height=3.8, squeeze=False)
    for panel in axes.flat[len(planes) :]:
        panel.set_visible(False)
    for panel, (name, (axis, loss, chosen, rejected)) in zip(axes.flat, planes.items()):
        colours = panel.contourf(axis, axis, loss, levels=16, cmap="YlGnBu_r")
        figure.colorbar(colours, ax=panel, shrink=0.8, pad=0.02, ticks=colours.levels[::4])
        some = slice(2, None, 4)
        u, v = -chosen[some, some], -rejected[some, some]
        longest = torch.hypot(u, v).max().item()
        arrows = {"scale": max(longest, 1e-30) / 3.7, "color": "#c2255c", "width": 0.006}
        panel.quiver(axis[some], axis[some], u, v, angles="xy", scale_units="xy", **arrows)
        panel.plot(0, 0, marker="o", ms=5, color="white", markeredgecolor="black")
        panel.set_title(f"{name}: largest gradient {longest:.3g}", loc="left")
        panel.set(xlabel="chosen log-ratio", ylabel="rejected log-ratio", aspect="equal")
    title = "Loss (colour), -gradient (arrows) of one pair; dot: policy = reference"
    figure.suptitle(f"{title}; right: chosen likelier than under it, down: rejected less likely")
    return png(figure)


def main() -> None:
    cfg = parse_cli(LabConfig)
    for path in cfg.mine:
        print(f"{path}: {', '.join(register_file(path))}")
    hyper = {name: getattr(cfg, name, None) for name in losses.HYPER}
    planes, rows, middle = {}, [], (GRID // 2, GRID // 2)  # there the policy is the reference
    for name in [*LOSSES, "mpo"]:
        terms = losses.parse_objective(name)
        loss = lambda logps, terms=terms: losses.objective(terms, logps, **hyper)[0]  # noqa: E731
        wrong = [check for check, passed in check_loss(loss).items() if not passed]
        planes[name] = axis, value, chosen, rejected = plane(loss, losses.whole_step(terms))
        r, c = divmod(int(value.argmin()), GRID)
        rows.append({
            "objective": name,
            "checks": ", ".join(wrong) or "passed",
            "at start": f"{value[middle]:.4g}",
            "d/d chosen": f"{chosen[middle]:+.4g}",
            "d/d rejected": f"{rejected[middle]:+.4g}",
            "lowest here (c, r)": f"{value[r, c]:.3g} at ({axis[c]:+.0f}, {axis[r]:+.0f})",
            "reference": "yes" if losses.needs_reference(terms) else "no",
            "looks at": "step" if losses.whole_step(terms) else "pair",
        })  # fmt: skip
    print(text_table(list(rows[0]), [row.values() for row in rows]))
    write_atomic(cfg.out, draw(planes))
    print(f"\n{cfg.out} drawn; beta {cfg.beta}, label smoothing {cfg.label_smoothing}")
    failed = [f"{row['objective']}: {row['checks']}" for row in rows if row["checks"] != "passed"]
    if failed:
        raise Failure(f"failed: {'; '.join(failed)}")
    print(f"{len(planes)} objectives, every check passed")


if __name__ == "__main__":
    run(main)
