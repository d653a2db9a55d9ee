"""The lab: every objective on the plane of (chosen, rejected) log-ratios, in a table, and checked.

    python tools/lab.py --out losses.png --mine my_loss.py

The drawing has a panel an objective: the loss in colour, arrows where gradient descent pushes a
pair.  The table says where each objective starts, where it is lowest, what it needs and whether it
passes every check: one float32 value per pair, gradients equal to finite differences, everything
finite at extremes.  A check that fails is named and ends in status 1.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import flag, parse_cli, run, write_atomic


@dataclass(frozen=True)
class LabConfig:
    """Draw every objective over the (chosen, rejected) log-ratio plane, tabulate and check it."""

    out: Path = flag(Path("losses.png"), "the drawing")
    mine: tuple[Path, ...] = flag((), "a .py file with objectives of your own; may be repeated")
    beta: float = flag(0.1, "strength of the pull to the reference", 1e-9)
    label_smoothing: float = flag(0.1, "chance that a label is wrong: cdpo, robust", 0, 0.499)
    bco_shift: float = flag(0.0, "mean reward so far: bco")


if __name__ == "__main__":
    parse_cli(LabConfig)  # --help and wrong flags need no torch, which takes seconds

import torch
from torch import Tensor

import losses
from losses import Loss, PairLogps
from tools.figures import new_figure, png, text_table
from tools.mine import example_pairs, make_pairs, register_file, split_pairs

GRID, REACH, TOKENS, START = 41, 20.0, 20.0, -30.0  # points a side, nats, tokens, log-prob of both


# --------------------------------------------------------------------------- checks


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


def check_loss(loss: Loss) -> dict[str, bool]:
    """Every check of one objective, by name; `loss` takes PairLogps alone."""
    x = example_pairs()
    value = loss(PairLogps(*(column.bfloat16() for column in vars(x).values())))

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(x, policy_chosen=chosen, policy_rejected=rejected))

    point = (x.policy_chosen.requires_grad_(), x.policy_rejected.requires_grad_())
    dtypes = (torch.float32, torch.bfloat16)
    extremes = [loss_and_gradient(loss, extreme_pairs(dtype)) for dtype in dtypes]
    return {
        "float32 per pair": value.dtype == torch.float32 and value.shape == x.policy_chosen.shape,
        "finite differences": torch.autograd.gradcheck(of_policy, point, raise_exception=False),
        "finite at extremes": all(y.isfinite().all() for values in extremes for y in values),
    }


def loss_and_gradient(loss: Loss, x: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, d sum / d policy_chosen, d sum / d policy_rejected), each (pair)."""
    chosen = x.policy_chosen.detach().requires_grad_()
    rejected = x.policy_rejected.detach().requires_grad_()
    value = loss(replace(x, policy_chosen=chosen, policy_rejected=rejected))
    grads = torch.autograd.grad(value.sum(), (chosen, rejected), materialize_grads=True)
    return value.detach(), *grads


# --------------------------------------------------------------------------- plane, drawing, table


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


def table_row(axis: Tensor, loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, str]:
    """Loss and gradient at policy == reference, the middle of the plane; its lowest point."""
    start, (r, c) = (GRID // 2, GRID // 2), divmod(int(loss.argmin()), GRID)
    return {
        "at start": f"{loss[start]:.4g}",
        "d/d chosen": f"{chosen[start]:+.4g}",
        "d/d rejected": f"{rejected[start]:+.4g}",
        "lowest here (c, r)": f"{loss[r, c]:.3g} at ({axis[c]:+.0f}, {axis[r]:+.0f})",
    }


def main() -> None:
    cfg = parse_cli(LabConfig)
    for path in cfg.mine:
        print(f"{path}: {', '.join(register_file(path))}")
    hyper = {name: getattr(cfg, name) for name in losses.HYPER}
    planes, rows, failed = {}, [], []
    for name in [*losses.LOSSES, "mpo"]:
        terms = losses.parse_objective(name)
        loss = lambda logps, terms=terms: losses.objective(terms, logps, **hyper)[0]  # noqa: E731
        wrong = [check for check, passed in check_loss(loss).items() if not passed]
        failed += [f"{name}: {check}" for check in wrong]
        planes[name] = plane(loss, losses.whole_step(terms))
        row = {"objective": name, "checks": "FAILED" if wrong else "passed"}
        row |= table_row(*planes[name])
        row["reference"] = "yes" if losses.needs_reference(terms) else "no"
        row["looks at"] = "step" if losses.whole_step(terms) else "pair"
        rows.append(row)
    print(text_table(list(rows[0]), [row.values() for row in rows]))
    write_atomic(cfg.out, draw(planes))
    print(f"\n{cfg.out} drawn; beta {cfg.beta}, label smoothing {cfg.label_smoothing}")
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    print(f"{len(planes)} objectives, every check passed")


if __name__ == "__main__":
    run(main)
