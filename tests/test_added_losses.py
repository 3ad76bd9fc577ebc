"""Terms added to the objectives: the hypergradient is that of the sums, with the added derivatives in closed form."""

import numpy as np
import pytest
import torch
from problems import FLOAT64, SmallPlayers, critic_loss, flat_obs, random_batch

from blpo_rllib.core.added_losses import AddedCurvature, AddedLosses, AddedTerms
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.hypergradient import Correction, LeaderLoss, hypergradient
from blpo_rllib.core.ihvp import Exact, Nystrom
from blpo_rllib.core.networks import flatten
from blpo_rllib.core.players import Minibatch
from blpo_rllib.core.reduction import Reduction

NONE = Reduction()


class Polynomials(AddedLosses):
    """ℓ_J = aᵀθ + bᵀw, ℓ_L = wᵀBw/2 + θᵀAw, ℓ = dᵀ(θ ⊙ θ)/2 + eᵀ(w ⊙ w)/2 + θᵀFw."""

    def __init__(self, players):
        self.players = players
        q, p = (sum(x.numel() for x in group) for group in (players.actor_parameters, players.critic_parameters))
        self.a, self.b, self.d, self.e = (torch.randn(n, dtype=FLOAT64) for n in (q, p, q, p))
        self.A, self.F = (torch.randn(q, p, dtype=FLOAT64) for _ in range(2))
        half = torch.randn(p, p, dtype=FLOAT64)
        # Well conditioned, so that solutions can be compared to many digits.
        self.B = half @ half.T / p + 10 * torch.eye(p)

    def vectors(self):
        return flatten(self.players.actor_parameters), flatten(self.players.critic_parameters)

    def leader(self, batch):
        theta, w = self.vectors()
        return self.a @ theta + self.b @ w

    def follower(self, batch):
        theta, w = self.vectors()
        return w @ self.B @ w / 2 + theta @ self.A @ w

    def both(self, batch):
        theta, w = self.vectors()
        return self.d @ theta.square() / 2 + self.e @ w.square() / 2 + theta @ self.F @ w


def problem(by_hand):
    players, segments = SmallPlayers(by_hand=by_hand), random_batch()
    loss = critic_loss(players, segments)
    batch = Minibatch.of(segments, loss.targets.view_as(segments.step), segments.step.sum())
    return players, batch, loss


def found(players, batch, loss, solver, curvature, added, coordinates, cross_reduction="mean"):
    return hypergradient(
        actor=players.actor(flat_obs(batch.segments), batch.actions, batch.old_dist_inputs),
        loss=loss,
        batch=batch.segments,
        leader=LeaderLoss(clip=0.2),
        correction=Correction(1.0, None, cross_reduction),
        solver=solver,
        curvature=curvature,
        coordinates=coordinates,
        reduction=NONE,
        added=added,
    )


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("cross_reduction", ["mean", "sum"])
@pytest.mark.parametrize("curvature_class", [Hessian, GaussNewton])
def test_hypergradient_of_the_sums(by_hand, cross_reduction, curvature_class):
    players, batch, loss = problem(by_hand)
    added = Polynomials(players)
    terms = AddedTerms.of(added, batch, players)
    rho, solver = 0.3, Exact(0.3)
    plain = curvature_class(loss, NONE)
    coordinates = players.coordinates(np.arange(plain.size))
    without = found(players, batch, loss, solver, plain, None, coordinates, cross_reduction)
    result = found(
        players, batch, loss, solver, AddedCurvature(plain, terms, NONE), terms, coordinates, cross_reduction
    )
    theta, w = (x.detach() for x in added.vectors())
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)
    close(result.grad_actor, without.grad_actor + added.a + added.d * theta + added.F @ w)
    close(result.grad_critic, without.grad_critic + added.b)
    size = len(w)
    plain_matrix = torch.stack([plain.matvec(unit) for unit in torch.eye(size, dtype=FLOAT64)])
    matrix = plain_matrix + added.B + torch.diag(added.e) + rho * torch.eye(size)
    x = torch.linalg.solve(matrix, result.grad_critic)
    close(result.ihvp, x)
    weight = batch.segments.step.sum() if cross_reduction == "sum" else 1.0
    # The cross term is linear in x.
    unadded = found(players, batch, loss, Fixed(x), plain, None, coordinates, cross_reduction).mixed_product
    close(result.mixed_product, unadded + weight * (added.A + added.F) @ x)
    close(terms.follower_gradient(), added.B @ w + added.A.T @ theta + added.e * w + added.F.T @ theta)


class Fixed(Exact):
    """Returns a vector that is known already."""

    def __init__(self, x):
        super().__init__(0.0)
        self.x = x

    def solve(self, curvature, v, coordinates, terms):
        return self.x


def test_rows():
    players, batch, loss = problem(by_hand=True)
    added = Polynomials(players)
    curvature = AddedCurvature(Hessian(loss, NONE), AddedTerms.of(added, batch, players), NONE)
    coordinates = players.coordinates(np.array([3, 0, 11]))
    expected = torch.stack([curvature.matvec(unit) for unit in torch.eye(curvature.size, dtype=FLOAT64)[[3, 0, 11]]])
    torch.testing.assert_close(curvature.rows(coordinates), expected)
    # With all rows Nyström's formula is exact.
    solver = Nystrom(curvature.size, 0.7, 0.0)
    everything = players.coordinates(solver.draw(curvature.size, np.random.default_rng(0)))
    v = torch.randn(curvature.size, dtype=FLOAT64)
    x = solver.solve(curvature, v, everything, solver.local_terms(curvature, everything))
    torch.testing.assert_close(curvature.matvec(x) + 0.7 * x, v, rtol=1e-6, atol=1e-6)


def test_terms_without_derivatives_add_nothing():
    class Nothing(Polynomials):
        def leader(self, batch):
            return None

        def follower(self, batch):
            return torch.zeros((), dtype=FLOAT64)

        def both(self, batch):
            return flatten(self.players.actor_parameters).sum()

    players, batch, _ = problem(by_hand=False)
    terms = AddedTerms.of(Nothing(players), batch, players)
    assert (terms.leader_gradient() == 1).all()
    size = sum(p.numel() for p in players.critic_parameters)
    x = torch.randn(size, dtype=FLOAT64)
    for zero in (terms.leader_critic_gradient(), terms.follower_gradient(), terms.follower_product(x)):
        assert (zero == 0).all()
    assert (terms.mixed_product(x, "sum") == 0).all()
