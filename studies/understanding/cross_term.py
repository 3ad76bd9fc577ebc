r"""The published estimate of ∇²_θw L beside the exact one, in expectation, on tabular games.

    python -m studies.understanding.cross_term     # seconds

The core's own hypergradient runs on "a batch" that holds every state and action once, weighted by d_θ(s) π_θ(a|s), with
expected advantages: what it computes is then the expectation of what training computes on samples, for a cross term
that is a mean over steps. Beside it stands the derivative of the critic's loss itself,

.. math::  \nabla^2_{\theta w} L\,x = \nabla_\theta \langle \nabla_w L(\theta, w), x \rangle, \qquad
           L(\theta, w) = \sum_s d_\theta(s)\,(V^{\pi_\theta}(s) - V_w(s))^2.

Both are used to correct the gradient of PPO's surrogate. studies/understanding/README.md says what follows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blpo_rllib.core.curvature import CriticLoss, Hessian
from blpo_rllib.core.exact_hypergradient import cosine
from blpo_rllib.core.gae import AdvantageOperator
from blpo_rllib.core.hypergradient import Correction, Hypergradient, LeaderLoss, hypergradient
from blpo_rllib.core.ihvp import Exact
from blpo_rllib.core.networks import AutogradActorPass, AutogradCriticPass, Coordinates
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch
from blpo_rllib.experiments.provenance import provenance
from studies.convergence.convergence import NUM_STATES, Game

OUTPUT = Path(__file__).parent / "results" / "solvers"
LAMBDAS = (0.0, 0.95, 1.0)


@dataclass(frozen=True)
class ExpectedAdvantage(AdvantageOperator):
    """E[GAE | s, a] under π_θ for one segment of all pairs (s, a), in the order of a [S, 2] table.

    With the expected temporal difference δ_π = r_π + γ P_π V − V:
    A(s, a) = r + γ P (V + λ (I − γλ P_π)⁻¹ δ_π) − V.
    """

    game: Game
    theta: Tensor
    lambda_: float
    factor: Tensor | float = 1.0

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        game, policy = self.game, self.game.policy(self.theta)
        r, v = rewards.view(NUM_STATES, 2), values.view(NUM_STATES, 2)[:, 0]
        chain = torch.einsum("sa,sat->st", policy, game.transitions)
        difference = (policy * r).sum(1) + game.gamma * chain @ v - v
        resolvent = torch.eye(NUM_STATES, dtype=v.dtype) - game.gamma * self.lambda_ * chain
        onward = v + self.lambda_ * torch.linalg.solve(resolvent, difference)
        return self.factor * (r + game.gamma * game.transitions @ onward - v[:, None]).view_as(values)

    def tangent(self, values: Tensor) -> Tensor:
        return self.advantages(torch.zeros_like(values), values)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.func.vjp(self.tangent, torch.zeros_like(y))[1](y)[0]

    def inverse(self, advantages: Tensor) -> Tensor:
        nothing = torch.zeros_like(advantages)
        matrix = torch.func.jacrev(lambda rewards: self.advantages(rewards, nothing).flatten())(nothing)
        return torch.linalg.solve(matrix.flatten(1), advantages.flatten()).view_as(advantages)

    def scaled(self, factor: Tensor) -> ExpectedAdvantage:
        return replace(self, factor=factor * self.factor)

    @property
    def tensors(self) -> list[Tensor]:
        return []

    def of_tensors(self, tensors: Sequence[Tensor]) -> ExpectedAdvantage:
        return self


def expected_hypergradient(game: Game, theta: Tensor, w: Tensor, lambda_: float) -> Hypergradient:
    """The core's hypergradient with the dense solution, no bound, and the cross term as a mean, in expectation."""
    theta, w = theta.clone().requires_grad_(), w.clone().requires_grad_()
    log_policy = game.policy(theta).log().flatten()
    features = game.features.repeat_interleave(2, 0)
    weights = (game.state_distribution(theta)[:, None] * game.policy(theta)).flatten().detach()
    targets = game.values(theta).repeat_interleave(2).detach()
    loss = CriticLoss(AutogradCriticPass(features @ w, [w]), targets, weights)
    ones = torch.ones(1, 2 * NUM_STATES, dtype=theta.dtype)
    batch = SegmentBatch(
        obs=None,
        actions=None,
        old_logp=log_policy.detach()[None],
        old_dist_inputs=ones[..., None],
        rewards=game.rewards.view(1, -1),
        step=ones,
        advantage=ExpectedAdvantage(game, theta.detach(), lambda_),
    )
    return hypergradient(
        actor=AutogradActorPass(log_policy, torch.zeros_like(log_policy), None, [theta]),
        loss=loss,
        batch=batch,
        leader=LeaderLoss(clip=0.2),
        correction=Correction(cross_clip=None, bound=None, cross_reduction="mean"),
        solver=Exact(damping=0.0),
        curvature=Hessian(loss, Reduction()),
        coordinates=Coordinates.of(np.arange(len(w)), w.device),
        reduction=Reduction(),
    )


def exact_mixed_product(game: Game, theta: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """∇²_θw L · x, [S]."""
    return torch.func.grad(lambda t: torch.func.grad(game.follower, 1)(t, w) @ x)(theta)


def compare(game: Game, theta: Tensor, lambda_: float) -> dict[str, float]:
    """The published correction c_p and the exact one c at w = w*(θ), beside g_θ and the gradient of the true return."""
    w = game.best_response(theta)
    found = expected_hypergradient(game, theta, w, lambda_)
    g, published = found.grad_actor, found.mixed_product
    exact = exact_mixed_product(game, theta, w, found.ihvp)
    ascent = torch.func.grad(lambda t: game.start @ game.values(t))(theta)
    return {
        "cos(c_p, c)": cosine(published, exact),
        "‖c_p‖ / ‖c‖": float(published.norm() / exact.norm()),
        "cos(c_p, g)": cosine(published, g),
        "cos(c, g)": cosine(exact, g),
        "‖c_p‖ / ‖g‖": float(published.norm() / g.norm()),
        "‖c‖ / ‖g‖": float(exact.norm() / g.norm()),
        "cos(−g, ∇return)": cosine(-g, ascent),
        "cos(−(g − c_p), ∇return)": cosine(published - g, ascent),
        "cos(−(g − c), ∇return)": cosine(exact - g, ascent),
    }


def study(num_features: int, lambda_: float, count: int) -> dict[str, float]:
    """Medians over random games and policies."""
    rows = []
    for seed in range(count):
        theta = torch.as_tensor(np.random.default_rng(seed).normal(size=NUM_STATES))
        rows.append(compare(Game.random(num_features, seed), theta, lambda_))
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="random games and policies")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"{p} features, λ = {lambda_:g}": study(p, lambda_, args.count) for p in (NUM_STATES, 3) for lambda_ in LAMBDAS
    }
    table = Table("", *found, title=f"medians over {args.count} games and policies")
    for key in next(iter(found.values())):
        table.add_row(key, *(f"{row[key]:.2g}" for row in found.values()))
    Console(width=150).print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    kept = {**provenance(), "count": args.count, "medians": found}
    (args.output / "cross_term.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
