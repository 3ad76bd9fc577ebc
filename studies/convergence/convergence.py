r"""Convergence of the hypergradient on the theory's own ground: a linear critic, known transitions, exact expectations.

    python -m studies.convergence.convergence            # about four minutes; --short: one

The game is tabular, everything in float64. The leader's policy has one logit per state, π_θ(1|s) = σ(θ_s), so that no
direction of θ leaves the policy unchanged, and the follower's critic is V_w = Φ w:

.. math::  J(\theta, w) = -\sum_s \mu(s) \sum_a \pi_\theta(a|s)\,\bigl(r(s,a) + \gamma\,(P\,V_w)(s,a)\bigr)
                          + \tfrac\beta2 \|\theta\|^2, \qquad
           L(\theta, w) = \sum_s d_\theta(s)\,\bigl(V^{\pi_\theta}(s) - V_w(s)\bigr)^2

with μ the start distribution, d_θ the discounted state distribution and V^π the true values. Printed and kept: the norm
of the total derivative of F(θ) = J(θ, w*(θ)) along the way against the rate of gradient descent, first- and
second-order conditions at the ends, and how far from stationary each rank and damping ends. README.md beside
this file says what follows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blpo_rllib.core.curvature import CriticLoss, Hessian
from blpo_rllib.core.hypergradient import bound_scale
from blpo_rllib.core.ihvp import Exact, IHVPSolver, Nystrom
from blpo_rllib.core.networks import AutogradCriticPass, Coordinates
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.experiments.provenance import provenance

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OUTPUT = Path(__file__).parent / "results"
FLOAT64 = torch.float64
NUM_STATES = 5
# α, below 1/Lipschitz constant of dF/dθ in all games here, as the report shows.
LEADER_RATE = 1.0
# ‖φ(s)‖ = 1, so that no eigenvalue of ∇²_ww L exceeds 2.
FOLLOWER_RATE = 0.5
DAMPINGS = tuple(10.0**e for e in range(-5, 3))
# What is played on the further games.
MAIN_RULES = ("exact, w = w*(θ)", "Nyström k = p, ρ = 1e-6, N = 10", "bound b = 0.8", "simultaneous")


@dataclass(frozen=True)
class Game:
    """A Markov decision process with two actions, and features for its critic.

    Attributes:
        transitions: P(s'|s, a), [S, 2, S].
        rewards: r(s, a), [S, 2].
        start: μ, [S], positive everywhere: d_θ >= (1 − γ) μ keeps L strongly convex in w, uniformly in θ.
        features: Φ, [S, p], of full column rank.
        gamma: γ.
        penalty: β, which keeps optimal policies inside of (0, 1).
    """

    transitions: Tensor
    rewards: Tensor
    start: Tensor
    features: Tensor
    gamma: float = 0.9
    penalty: float = 0.05

    @classmethod
    def random(cls, num_features: int, seed: int) -> Game:
        """A Garnet problem: each action leads to two random states (Bhatnagar et al. 2009)."""
        rng = np.random.default_rng(seed)
        transitions = np.zeros((NUM_STATES, 2, NUM_STATES))
        for row in transitions.reshape(-1, NUM_STATES):
            row[rng.choice(NUM_STATES, 2, replace=False)] = rng.dirichlet(np.ones(2))
        rewards, start = rng.normal(size=(NUM_STATES, 2)), rng.dirichlet(2 * np.ones(NUM_STATES))
        features = rng.normal(size=(NUM_STATES, NUM_STATES))[:, :num_features]
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return cls(*(torch.as_tensor(x) for x in (transitions, rewards, start, features)))

    def policy(self, theta: Tensor) -> Tensor:
        """π_θ(a|s), [S, 2]."""
        p = theta.sigmoid()
        return torch.stack([1 - p, p], 1)

    def values(self, theta: Tensor) -> Tensor:
        """V^π = (I − γ P_π)⁻¹ r_π, [S]."""
        return torch.linalg.solve(self._resolvent(theta), (self.policy(theta) * self.rewards).sum(1))

    def state_distribution(self, theta: Tensor) -> Tensor:
        """d_θ = (1 − γ) (I − γ P_πᵀ)⁻¹ μ, [S]."""
        return (1 - self.gamma) * torch.linalg.solve(self._resolvent(theta).T, self.start)

    def _resolvent(self, theta: Tensor) -> Tensor:
        """I − γ P_π."""
        chain = torch.einsum("sa,sat->st", self.policy(theta), self.transitions)
        return torch.eye(NUM_STATES, dtype=chain.dtype) - self.gamma * chain

    def leader(self, theta: Tensor, w: Tensor) -> Tensor:
        """J(θ, w)."""
        q = self.rewards + self.gamma * self.transitions @ (self.features @ w)
        return -(self.start[:, None] * self.policy(theta) * q).sum() + self.penalty / 2 * theta @ theta

    def follower(self, theta: Tensor, w: Tensor) -> Tensor:
        """L(θ, w)."""
        return (self.state_distribution(theta) * (self.values(theta) - self.features @ w).square()).sum()

    def best_response(self, theta: Tensor) -> Tensor:
        """w*(θ), by the normal equations Φᵀ D Φ w = Φᵀ D V^π."""
        weighted = self.state_distribution(theta)[:, None] * self.features
        return torch.linalg.solve(weighted.T @ self.features, weighted.T @ self.values(theta))

    def total(self, theta: Tensor) -> Tensor:
        """F(θ) = J(θ, w*(θ))."""
        return self.leader(theta, self.best_response(theta))

    def curvature(self, theta: Tensor, w: Tensor) -> Hessian:
        """∇²_ww L as training sees it: states are steps, weighted by d_θ."""
        w = w.clone().requires_grad_()
        critic = AutogradCriticPass(self.features @ w, [w])
        return Hessian(CriticLoss(critic, self.values(theta), self.state_distribution(theta)), Reduction())

    def true_return(self, theta: Tensor) -> float:
        """Σ_s μ(s) V^π(s)."""
        return float(self.start @ self.values(theta))


def hypergradient(
    game: Game, theta: Tensor, w: Tensor, solver: IHVPSolver, generator: np.random.Generator, bound: float | None = None
) -> Tensor:
    """∇_θ J − ∇²_θw L (∇²_ww L + ρI)⁻¹ ∇_w J with the core's curvature, solver and bound, [S]."""
    grad_actor, v = torch.func.grad(game.leader, (0, 1))(theta, w)
    curvature = game.curvature(theta, w)
    indices = solver.draw(curvature.size, generator)
    coordinates = None if indices is None else Coordinates.of(indices, w.device)
    x = solver.solve(curvature, v, coordinates, solver.local_terms(curvature, coordinates))
    mixed = torch.func.grad(lambda t: torch.func.grad(game.follower, 1)(t, w) @ x)(theta)
    return grad_actor - bound_scale(mixed.norm(), grad_actor.norm(), bound) * mixed


def finite_differences(function: Callable[[Tensor], Tensor], theta: Tensor, h: float = 1e-5) -> Tensor:
    """The gradient of a function by central differences, [n]."""
    steps = h * torch.eye(len(theta), dtype=theta.dtype)
    return torch.stack([(function(theta + e) - function(theta - e)) / (2 * h) for e in steps])


@dataclass(frozen=True)
class Rule:
    """How the players move.

    Attributes:
        solver: Makes the solver of the leader's hypergradient; None: the leader follows ∇_θ J.
        nested: Gradient steps of the follower before each of the leader's; None: it answers with w*(θ). 0: both move
            at once, from the same (θ, w).
        bound: b of the correction.
    """

    solver: Callable[[], IHVPSolver] | None
    nested: int | None
    bound: float | None = None


def undamped() -> IHVPSolver:
    """The exact product at ρ = 0, with which the hypergradient is the total derivative."""
    return Exact(damping=0.0)


def _nystrom(rank: int, damping: float, shift: float = 0.0) -> Callable[[], IHVPSolver]:
    return lambda: Nystrom(rank, damping, shift)


def rules(p: int) -> dict[str, Rule]:
    """The rules compared, for a critic of p parameters."""
    accurate = _nystrom(p, 1e-6)
    return {
        "exact, w = w*(θ)": Rule(undamped, None),
        "Nyström k = p, ρ = 1e-6, N = 10": Rule(accurate, 10),
        "Nyström k = p, ρ = 1e-6, N = 1": Rule(accurate, 1),
        f"Nyström k = {p - 1}, ρ = 0.1, N = 10": Rule(_nystrom(p - 1, 0.1), 10),
        "published: ρ = 50, δ = 1, N = 10": Rule(_nystrom(min(5, p), 50.0, 1.0), 10),
        "bound b = 1.4": Rule(accurate, 10, bound=1.4),
        "bound b = 0.8": Rule(accurate, 10, bound=0.8),
        "nested, no correction, N = 10": Rule(None, 10),
        "simultaneous": Rule(None, 0),
    }


def play(game: Game, rule: Rule, iterations: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(θ_t, w_t) for t = 0, …, T, from θ = 0 and w = 0."""
    theta = torch.zeros(NUM_STATES, dtype=FLOAT64)
    w = torch.zeros(game.features.shape[1], dtype=FLOAT64)
    solver, generator = rule.solver and rule.solver(), np.random.default_rng(seed)
    path = [(theta, w)]
    for _ in range(iterations):
        before, w = w, respond(game, theta, w, rule.nested)
        if solver is None:
            direction = torch.func.grad(game.leader)(theta, before if rule.nested == 0 else w)
        else:
            direction = hypergradient(game, theta, w, solver, generator, rule.bound)
        theta = theta - LEADER_RATE * direction
        path.append((theta, w))
    return path


def respond(game: Game, theta: Tensor, w: Tensor, nested: int | None) -> Tensor:
    """The follower's move."""
    if nested is None:
        return game.best_response(theta)
    for _ in range(max(1, nested)):
        w = w - FOLLOWER_RATE * torch.func.grad(game.follower, 1)(theta, w)
    return w


def conditions(game: Game, theta: Tensor, w: Tensor) -> dict[str, float]:
    """First- and second-order conditions of a differential Stackelberg equilibrium (Fiez et al. 2020) at (θ, w).

    L is a quadratic in w, so that a positive definite ∇²_ww L makes w* the only best response: a strict minimum of F is
    then a local strong Stackelberg equilibrium.
    """
    curvature = torch.func.hessian(game.follower, 1)(theta, w)
    return {
        "total_derivative": float(torch.func.grad(game.total)(theta).norm()),
        "leader_partial_derivative": float(torch.func.grad(game.leader)(theta, w).norm()),
        "follower_derivative": float(torch.func.grad(game.follower, 1)(theta, w).norm()),
        "follower_curvature_least_eigenvalue": float(torch.linalg.eigvalsh(curvature)[0]),
        "total_hessian_least_eigenvalue": float(torch.linalg.eigvalsh(torch.func.hessian(game.total)(theta))[0]),
        "distance_to_best_response": float((w - game.best_response(theta)).norm()),
        "F": float(game.total(theta)),
        "return": float(game.start @ game.values(theta)),
    }


def rate(game: Game, path: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """min_{t<T} ‖dF/dθ‖² for T = 1, 2, …, and what bounds it for gradient descent with α <= 1/Lipschitz constant:
    2 (F(θ_0) − F(θ_T)) / (α T)."""
    gradients, objectives = zip(*(torch.func.grad_and_value(game.total)(theta) for theta, _ in path), strict=True)
    squared = [float(g @ g) for g in gradients[:-1]]
    bounds = [2 * float(objectives[0] - f) / (LEADER_RATE * t) for t, f in enumerate(objectives) if t > 0]
    return {"running_minimum": np.minimum.accumulate(squared).tolist(), "bound": bounds}


def largest_curvature(game: Game, path: list[tuple[Tensor, Tensor]]) -> float:
    """The largest ‖∇²F‖ at 50 points along a path, for the Lipschitz constant of dF/dθ."""
    points = [path[i][0] for i in np.unique(np.geomspace(1, len(path), 50).astype(int) - 1)]
    return max(float(torch.linalg.matrix_norm(torch.func.hessian(game.total)(x), 2)) for x in points)


def study_rules(game: Game, names: Sequence[str], iterations: int) -> dict[str, dict]:
    """Rules from the same start: conditions at their ends, and how fast they got there, at some of the iterations."""
    found = {}
    kept = np.unique(np.geomspace(1, iterations, 60).round().astype(int))
    for name in names:
        path = play(game, rules(game.features.shape[1])[name], iterations)
        speed = rate(game, path)
        ratios = [m / b if b > 0 else np.inf for m, b in zip(*speed.values(), strict=True)]
        found[name] = conditions(game, *path[-1]) | {
            "curvature": largest_curvature(game, path),
            "rate_over_bound": max(ratios),
            "T": kept.tolist(),
            **{key: [values[t - 1] for t in kept] for key, values in speed.items()},
        }
    return found


def study_floors(game: Game, iterations: int, draws: int, dampings: Sequence[float]) -> dict[str, dict[str, float]]:
    """‖dF/dθ‖ at the end by rank and damping (w = w*(θ), δ = 0): the median over draws of the coordinates."""
    p = game.features.shape[1]
    found: dict[str, dict[str, float]] = {}
    for rank in range(1, p + 1):
        found[str(rank)] = {}
        for damping in dampings:
            rule = Rule(_nystrom(rank, damping), None)
            # With all coordinates there is nothing to draw.
            paths = [play(game, rule, iterations, seed) for seed in range(1 if rank == p else draws)]
            norms = [float(torch.func.grad(game.total)(path[-1][0]).norm()) for path in paths]
            found[str(rank)][f"{damping:g}"] = float(np.median(norms))
    return found


def gradient_errors(game: Game, generator: np.random.Generator) -> dict[str, float]:
    """Relative distance of the core's hypergradient to finite differences of F at a random θ, w = w*(θ)."""
    theta = torch.as_tensor(generator.normal(size=NUM_STATES))
    w, expected = game.best_response(theta), finite_differences(game.total, theta)
    p = len(w)
    solvers = {"exact": undamped(), "nystrom, k = p, ρ = 1e-6": Nystrom(p, 1e-6, 0.0)}
    return {
        name: float((hypergradient(game, theta, w, solver, generator) - expected).norm() / expected.norm())
        for name, solver in solvers.items()
    }


ENDS = {
    "total_derivative": "‖dF/dθ‖",
    "leader_partial_derivative": "‖∇_θ J‖",
    "follower_derivative": "‖∇_w L‖",
    "follower_curvature_least_eigenvalue": "min eig ∇²_ww L",
    "total_hessian_least_eigenvalue": "min eig ∇²F",
    "curvature": "max ‖∇²F‖",
    "rate_over_bound": "rate / bound",
    "F": "F",
    "return": "true return",
}


def ends_table(title: str, found: dict[str, dict]) -> Table:
    """Where the rules ended; rate / bound is the largest over T of min_{t<T} ‖dF/dθ‖² over its bound."""
    table = Table("rule", *ENDS.values(), title=title)
    for rule, row in found.items():
        table.add_row(rule, *(f"{row[key]:.3g}" for key in ENDS))
    return table


def floors_table(title: str, found: dict[str, dict[str, float]]) -> Table:
    """‖dF/dθ‖ at the end, rank down, damping across."""
    table = Table("k", *next(iter(found.values())), title=f"{title}: ‖dF/dθ‖ at the end, rank down, damping across")
    for rank, row in found.items():
        table.add_row(rank, *(f"{value:.2g}" for value in row.values()))
    return table


def draw(results: dict[str, dict], path: Path) -> None:
    """A row per game: running minima against the rate, and floors against damping."""
    figure, rows = plt.subplots(len(results), 2, figsize=(13, 4.6 * len(results)), layout="constrained", squeeze=False)
    for (left, right), (name, found) in zip(rows, results.items(), strict=True):
        _draw_rates(left, found["rules"])
        left.set_title(name)
        _draw_floors(right, found["floors"])
        right.set_title("where each rank and damping ends (w = w*(θ), δ = 0)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_rates(axes: Axes, found: dict[str, dict]) -> None:
    for name, row in found.items():
        axes.loglog(row["T"], np.maximum(row["running_minimum"], 1e-33), label=name)
    exact = next(iter(found.values()))
    axes.loglog(exact["T"], exact["bound"], "k--", label="bound: 2 (F(θ₀) − F(θ_T)) / (α T)")
    axes.set(xlabel="iterations T", ylabel="min over t < T of ‖dF/dθ‖²", ylim=(1e-20, None))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_floors(axes: Axes, found: dict[str, dict[str, float]]) -> None:
    for rank, row in found.items():
        axes.loglog([float(x) for x in row], row.values(), "o-", label=f"rank {rank}")
    axes.set(xlabel="damping ρ", ylabel="‖dF/dθ‖ at the end")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 0, 1, 3, 4], help="of the decision processes")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--draws", type=int, default=3, help="of the Nyström coordinates")
    parser.add_argument("--short", action="store_true", help="one decision process, few iterations and dampings")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.short:
        args.seeds, args.iterations, args.draws = args.seeds[:1], 300, 1
    torch.set_num_threads(1)
    console = Console()
    results: dict[str, dict] = {}
    for num_features in (NUM_STATES, 3):
        name = f"{NUM_STATES} states, {num_features} features"
        first, *further = (Game.random(num_features, seed) for seed in args.seeds)
        results[name] = {
            "errors_against_finite_differences": gradient_errors(first, np.random.default_rng(0)),
            "rules": study_rules(first, tuple(rules(num_features)), args.iterations),
            "floors": study_floors(first, args.iterations // 3, args.draws, DAMPINGS[:: 3 if args.short else 1]),
            "further": [study_rules(game, MAIN_RULES, args.iterations) for game in further],
        }
        console.print(results[name]["errors_against_finite_differences"])
        console.print(ends_table(name, results[name]["rules"]))
        console.print(floors_table(name, results[name]["floors"]))
        for seed, found in zip(args.seeds[1:], results[name]["further"], strict=True):
            console.print(ends_table(f"{name}, process {seed}", found))
    args.output.mkdir(parents=True, exist_ok=True)
    draw(results, args.output / "convergence.png")
    kept = {**provenance(), "seeds": args.seeds, "iterations": args.iterations, "games": _rounded(results)}
    (args.output / "convergence.json").write_text(json.dumps(kept) + "\n")


def _rounded(x: Any) -> Any:
    """Numbers to five significant digits."""
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_rounded(value) for value in x]
    return float(f"{x:.5g}")


if __name__ == "__main__":
    main()
