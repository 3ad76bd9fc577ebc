r"""How far Nyström's hypergradient is from the exact one, along one training run.

    python -m studies.understanding.understanding cartpole
    python -m studies.understanding.understanding hopper       # needs EnvPool

Trains the tuned example with the published settings and keeps a checkpoint at six points. At each, the policy samples a
batch, and on its first minibatch the dense Hessian is written out in float64. With the dense solution at the same
damping ρ, and at the least one, are compared: Nyström's for each rank and damping, with core shift δ = 1 (published)
and δ = 0 (textbook); conjugate gradients; v/ρ; and all of them with Gauss–Newton curvature, which has no negative
eigenvalue. studies/understanding/README.md says what follows.

A point whose file is there is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import ray
import scipy.sparse.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blpo_rllib.blpo import BLPO, BLPOConfig
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.exact_hypergradient import Oracle, cosine
from blpo_rllib.core.ihvp import ConjugateGradient, IHVPSolver, Nystrom, ScaledIdentity
from blpo_rllib.experiments.metrics import ENV_STEPS, EPISODE_RETURN, grouped
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.sweep.fidelity import problem_of
from blpo_rllib.sweep.records import write_whole
from studies.comparison.contestants import example as published

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OUTPUT = Path(__file__).parent / "results" / "solvers"
RANKS = (1, 2, 5, 10, 20, 50)
DAMPINGS = (50.0, 10.0, 1.0, 0.1, 0.01, 0.001)
SHIFTS = (1.0, 0.0)
# Extreme eigenvalues computed, at both ends together.
NUM_EIGENVALUES = 60


@dataclass(frozen=True)
class Task:
    """A tuned example and where along its run to look, in environment steps."""

    env: str
    points: tuple[int, ...]


TASKS = {
    "cartpole": Task("CartPole-v1", (2_560, 10_240, 25_600, 51_200, 76_800, 102_400)),
    "hopper": Task("EnvPool/Hopper-v5", (20_480, 102_400, 204_800, 307_200, 409_600, 614_400)),
}


def configure(example: str, env: str, seed: int) -> BLPOConfig:
    """The tuned example's settings, with published batches."""
    return published(example, "gymnasium").environment(env).debugging(seed=seed, log_level="ERROR")


def train(config: BLPOConfig, points: Sequence[int], folder: Path) -> None:
    """Leaves a checkpoint and the return so far at each point."""
    algo = config.build_algo()
    for point in points:
        metrics: dict[str, float] = {}
        while metrics.get(ENV_STEPS, 0) < point:
            metrics = grouped(algo.train())
        algo.save_to_path(str((folder / str(point)).resolve()))
        write_whole(folder / f"{point}.json", json.dumps(metrics))
    algo.stop()


def measure(checkpoint: Path, ranks: Sequence[int], dampings: Sequence[float], draws: int) -> dict[str, Any]:
    """All comparisons on the first minibatch of a fresh batch."""
    algo = BLPO.from_checkpoint(str(checkpoint.resolve()))
    players, segments, settings = problem_of(algo)
    num_minibatches = algo.config.total_train_batch_size // algo.config.minibatch_size
    algo.stop()
    minibatch = segments.split(len(segments) // num_minibatches)[0]
    generator = np.random.default_rng(0)
    hessian = Oracle(players, minibatch, settings, Hessian)
    found = {
        "steps_of_minibatch": int(minibatch.step.sum()),
        "hessian": judge(hessian, ranks, dampings, draws, generator),
        "eigenvalues": eigenvalues(hessian.matrix),
    }
    gauss_newton = Oracle(players, minibatch, settings, GaussNewton)
    found["gauss_newton"] = judge(gauss_newton, ranks, dampings, draws, generator)
    found["gauss_newton_against_hessian"] = {
        f"{rho:g}": {
            "ihvp_cosine": cosine(gauss_newton.exact(rho).ihvp, hessian.exact(rho).ihvp),
            "correction_cosine": cosine(gauss_newton.exact(rho).mixed_product, hessian.exact(rho).mixed_product),
            "hypergradient_cosine": cosine(gauss_newton.exact(rho).direction, hessian.exact(rho).direction),
        }
        for rho in dampings
    }
    return found


def judge(
    oracle: Oracle, ranks: Sequence[int], dampings: Sequence[float], draws: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Every solver against the dense solution for one curvature."""
    least = min(dampings)

    def compared(solver: IHVPSolver, draws: int = 1) -> dict[str, float]:
        return dataclasses.asdict(oracle.compare(solver, least, generator, draws))

    return {
        "exact": {f"{rho:g}": exact_row(oracle, rho, least) for rho in dampings},
        "nystrom": {
            f"δ={shift:g}": {
                str(k): {f"{rho:g}": compared(Nystrom(k, rho, shift), draws) for rho in dampings} for k in ranks
            }
            for shift in SHIFTS
        },
        "cg": {f"{rho:g}": compared(ConjugateGradient(20, rho)) for rho in (*dampings, 0.0)},
        "scaled_identity": {f"{rho:g}": compared(ScaledIdentity(rho)) for rho in dampings},
    }


def exact_row(oracle: Oracle, damping: float, least: float) -> dict[str, float]:
    """The exact hypergradient at one damping: its correction beside g_θ, and itself beside that at the least one."""
    exact, reference = oracle.exact(damping), oracle.exact(least)
    return {
        "mixed_over_actor_norm": float(exact.mixed_norm / exact.actor_norm),
        "mixed_grad_cosine": cosine(exact.mixed_product, exact.grad_actor),
        "correction_cosine_to_least_damping": cosine(exact.mixed_product, reference.mixed_product),
        "hypergradient_cosine_to_least_damping": cosine(exact.direction, reference.direction),
    }


def eigenvalues(matrix: Tensor) -> dict[str, Any]:
    """The largest eigenvalues in size, from below and from above, and ‖H‖_F² for how much of H they are."""
    largest = scipy.sparse.linalg.eigsh(
        matrix.numpy(), NUM_EIGENVALUES, which="LM", return_eigenvectors=False, tol=1e-6
    )
    found = np.sort(largest)
    return {
        "negative": found[found < 0].tolist(),
        "positive": found[found > 0][::-1].tolist(),
        "share_of_squared_norm": float((found**2).sum() / matrix.square().sum()),
        "size": len(matrix),
    }


def tables(name: str, found: dict[str, Any], metrics: dict[str, float]) -> list[Table]:
    """What is printed of one point."""
    title = f"{name}, {metrics[ENV_STEPS]:.0f} steps, return {found['return']:.0f}"
    dampings = list(found["hessian"]["exact"])
    exact = Table("exact hypergradient; damping across", *dampings, title=title)
    cosines = Table("cosine of the correction to the exact one at the same ρ", *dampings, title=title)
    for curvature in ("hessian", "gauss_newton"):
        judged = found[curvature]
        for key in judged["exact"][dampings[0]]:
            exact.add_row(f"{curvature}: {key}", *(f"{judged['exact'][rho][key]:.3g}" for rho in dampings))
        rows = {f"Nyström k={k}, {shift}": row for shift, by in judged["nystrom"].items() for k, row in by.items()}
        rows |= {"CG, 20 iterations": judged["cg"], "v/ρ": judged["scaled_identity"]}
        for solver, row in rows.items():
            cosines.add_row(f"{curvature}: {solver}", *(f"{row[rho]['correction_cosine']:.3f}" for rho in dampings))
    row = found["gauss_newton_against_hessian"]
    cosines.add_row("hessian: exact Gauss–Newton", *(f"{row[rho]['correction_cosine']:.3f}" for rho in dampings))
    undamped = {name: found[name]["cg"]["0"] for name in ("hessian", "gauss_newton")}
    cosines.caption = "; ".join(
        f"CG undamped, {name}: its hypergradient's cosine to the exact one at ρ={dampings[-1]} "
        f"{row['reference_cosine']:.3f}, residual {row['ihvp_relative_residual']:.3g}"
        for name, row in undamped.items()
    )
    known = found["eigenvalues"]
    exact.caption = f"eigenvalues of H from {min(known['negative'], default=0.0):.3g} to {known['positive'][0]:.3g}"
    return [exact, cosines]


PANELS = tuple(
    (curvature, key, f"{name}: cosine of\n{what} to the exact one at ρ")
    for curvature, name in (("hessian", "Hessian"), ("gauss_newton", "Gauss–Newton"))
    for key, what in (("ihvp_cosine", "x"), ("correction_cosine", "the correction"))
)


def draw(name: str, points: dict[int, dict[str, Any]], shift: str, path: Path) -> None:
    """A column per point of the run, cosines against damping, a line per rank."""
    size = 3.3 * len(points), 2.8 * len(PANELS)
    figure, axes = plt.subplots(
        len(PANELS), len(points), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for column, (steps, found) in zip(axes.T, points.items(), strict=True):
        column[0].set_title(f"{steps:,} steps, return {found['return']:.0f}")
        column[-1].set_xlabel("damping ρ")
        for panel, (curvature, key, _) in zip(column, PANELS, strict=True):
            _draw_cosines(panel, found[curvature], shift, key)
    for panel, (_, _, label) in zip(axes[:, 0], PANELS, strict=True):
        panel.set_ylabel(label)
    axes[0, 0].legend(fontsize=7, loc="lower right")
    figure.suptitle(f"{name}: Nyström with core shift {shift} beside the exact solution on the same minibatch")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_cosines(axes: Axes, judged: dict[str, Any], shift: str, key: str) -> None:
    by_rank, dampings = judged["nystrom"][shift], list(judged["exact"])
    x = [float(rho) for rho in dampings]
    for color, (k, row) in zip(np.linspace(0, 1, len(by_rank)), by_rank.items(), strict=True):
        axes.plot(x, [row[rho][key] for rho in dampings], "o-", ms=3, color=plt.cm.viridis(color), label=f"rank {k}")
    axes.plot(x, [judged["cg"][rho][key] for rho in dampings], "s--", ms=3, color="tab:red", label="CG, 20 iterations")
    axes.plot(x, [judged["scaled_identity"][rho][key] for rho in dampings], ":", lw=2, color="0.3", label="v/ρ")
    axes.set(xscale="log", ylim=(-1.05, 1.05))
    axes.grid(alpha=0.3)


def study(example: str, task: Task, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Trains where that is not done yet, and measures each point."""
    folder = args.checkpoints / example
    points = task.points if args.points is None else args.points
    if not all((folder / f"{point}.json").exists() for point in points):
        train(configure(example, task.env, args.seed), points, folder)
    found = {}
    for point in points:
        path, metrics = folder / f"measured_{point}.json", json.loads((folder / f"{point}.json").read_text())
        if not path.exists():
            measured = measure(folder / str(point), args.ranks, args.dampings, args.draws)
            write_whole(path, json.dumps(measured | {"return": metrics.get(EPISODE_RETURN, float("nan"))}))
        found[point] = json.loads(path.read_text())
        for table in tables(example, found[point], metrics):
            args.console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--points", type=int, nargs="+", help="environment steps at which to look (the task's)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--dampings", type=float, nargs="+", default=DAMPINGS)
    parser.add_argument("--draws", type=int, default=5, help="of the Nyström coordinates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, default=Path("results") / "understanding")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    args.dampings = sorted(args.dampings, reverse=True)
    torch.set_num_threads(args.threads)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    args.console = Console(width=140)
    found = study(args.task, TASKS[args.task], args)
    args.output.mkdir(parents=True, exist_ok=True)
    for shift in SHIFTS:
        draw(args.task, found, f"δ={shift:g}", args.output / f"{args.task}_shift{shift:g}.png")
    kept = {"task": args.task, "seed": args.seed, **provenance(), "points": found}
    write_whole(args.output / f"{args.task}.json", json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
