"""The closed form of the hypergradient against finite differences and against a problem with a known derivative."""

import numpy as np
import pytest
import torch
from problems import FLOAT64, NUM_ACTIONS, OBS_SIZE, SmallPlayers, critic_loss, flat_obs, gaussian_terms, random_batch
from torch import nn

from blpo_rllib.core.curvature import Hessian
from blpo_rllib.core.gae import BlockwiseAdvantage, Masks
from blpo_rllib.core.hypergradient import (
    CROSS_REDUCTIONS,
    Correction,
    LeaderLoss,
    Surrogate,
    bound_scale,
    hypergradient,
    leader_critic_gradient,
    leader_gradient,
    log_probability_ratio,
    mixed_product,
)
from blpo_rllib.core.ihvp import Exact, Nystrom
from blpo_rllib.core.networks import flatten, unflatten
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch

LEADER = LeaderLoss(clip=0.2)
NONE = Reduction()


def surrogate_sum(players, batch, w, theta, targets, clip, weights):
    """Σ weights · min(r·adv, clip(r)·adv) · f as autograd sees it; f = (y − V) if targets are given, else 1."""
    critic = dict(
        zip(
            dict(players.critic_network.named_parameters()),
            unflatten(w, players.critic_parameters),
            strict=True,
        )
    )
    *actor_tensors, log_std = unflatten(theta, players.actor_parameters)
    actor = dict(zip(dict(players.actor_network.named_parameters()), actor_tensors, strict=True))
    obs = flat_obs(batch)
    values = torch.func.functional_call(players.critic_network, critic, (obs,))[:, 0].view_as(batch.step)
    mean = torch.func.functional_call(players.actor_network, actor, (obs,))
    logp, *_ = gaussian_terms(mean, log_std, batch.actions.flatten(0, 1))
    adv = batch.advantage.advantages(batch.rewards, values)
    ratio = torch.where(batch.step > 0, logp.view_as(batch.step) - batch.old_logp, 0.0).exp()
    s = ratio * adv if clip is None else torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    factor = 1.0 if targets is None else targets.view_as(values) - values
    return (weights * s * factor).sum()


def vectors(players):
    w = flatten([p.detach() for p in players.critic_parameters]).requires_grad_()
    theta = flatten([p.detach() for p in players.actor_parameters]).requires_grad_()
    return w, theta


@pytest.fixture(params=[False, True], ids=["automatic", "by hand"])
def problem(request):
    players, batch = SmallPlayers(by_hand=request.param), random_batch()
    return players, batch, critic_loss(players, batch)


def actor_of(players, batch):
    return players.actor(flat_obs(batch), batch.actions.flatten(0, 1), batch.old_dist_inputs.flatten(0, 1))


def check(actual, expected, rtol=1e-9):
    assert (actual - expected).norm() <= rtol * expected.norm()


def test_leader_gradients_match_autograd(problem):
    players, batch, loss = problem
    weights = loss.weights.view_as(batch.step)
    adv = batch.advantage.advantages(batch.rewards, loss.critic.values.view_as(batch.step))
    surrogate, gradient = leader_gradient(actor_of(players, batch), batch, adv, weights, LEADER)
    v = leader_critic_gradient(loss, batch, surrogate, weights)
    assert 0 < surrogate.active[batch.step > 0].mean() < 1, "some steps must be clipped"
    w, theta = vectors(players)
    objective = -surrogate_sum(players, batch, w, theta, None, LEADER.clip, weights)
    expected_v, expected_gradient = torch.autograd.grad(objective, (w, theta))
    check(gradient, expected_gradient)
    check(v, expected_v)


def test_entropy_and_kl_enter_the_actor_gradient_only(problem):
    players, batch, loss = problem
    weights = loss.weights.view_as(batch.step)
    adv = batch.advantage.advantages(batch.rewards, loss.critic.values.view_as(batch.step))
    leader = LeaderLoss(clip=0.2, entropy_coeff=0.3, kl_coeff=0.7)
    _, gradient = leader_gradient(actor_of(players, batch), batch, adv, weights, leader)
    _, plain = leader_gradient(actor_of(players, batch), batch, adv, weights, LEADER)
    outputs = players.actor_network(flat_obs(batch))
    _, entropy, kl = gaussian_terms(outputs, players.log_std, outputs.detach(), batch.old_dist_inputs.flatten(0, 1))
    penalty = (loss.weights * (0.7 * kl - 0.3 * entropy)).sum()
    check(gradient - plain, flatten(torch.autograd.grad(penalty, players.actor_parameters)))


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("reduction", CROSS_REDUCTIONS)
def test_mixed_product_is_the_derivative_of_the_cross_gradient(problem, clip, reduction):
    players, batch, loss = problem
    adv = batch.advantage.advantages(batch.rewards, loss.critic.values.view_as(batch.step))
    actor, x = actor_of(players, batch), torch.randn(loss.critic.num_parameters, dtype=FLOAT64)
    surrogate = Surrogate.clipped(log_probability_ratio(batch, actor.logp), adv, LEADER.clip)
    product = mixed_product(actor, loss, batch, adv, surrogate, x, Correction(clip, None, reduction))
    weights = batch.step if reduction == "sum" else batch.step / batch.step.sum()
    w, theta = vectors(players)

    def cross_gradient(w):
        value = surrogate_sum(players, batch, w, theta, loss.targets, clip, -2 * weights)
        return torch.autograd.grad(value, theta)[0]

    h = 1e-6
    with torch.no_grad():
        forward, backward = w + h * x, w - h * x
    check(product, (cross_gradient(forward) - cross_gradient(backward)) / (2 * h), rtol=1e-6)


def test_bound():
    mixed, gradient = torch.tensor(20.0), torch.tensor(5.0)
    assert bound_scale(mixed, gradient, None) == 1
    assert bound_scale(mixed, gradient, 0.5) == 2.5 / 20
    assert bound_scale(0.1 * mixed, gradient, 0.5) == 1
    for bad in (0.0, float("nan"), float("inf")):
        assert bound_scale(torch.tensor(bad), gradient, 0.5) == 0
        assert bound_scale(torch.tensor(bad), gradient, None) == 0


def one_step_problem():
    """Bandit steps and a linear critic: adv = r − φ·w, and L(θ, ·) is a quadratic with a minimum in closed form."""
    players = SmallPlayers(hidden=())
    slots = 12
    obs = torch.randn(1, slots, OBS_SIZE, dtype=FLOAT64)
    actions = torch.randn(1, slots, NUM_ACTIONS, dtype=FLOAT64)
    old_logp, *_ = gaussian_terms(players.actor_network(obs[0]), players.log_std, actions[0])
    ones = torch.ones(1, slots, dtype=FLOAT64)
    batch = SegmentBatch(
        obs=obs,
        actions=actions,
        old_logp=old_logp.detach()[None] + 0.05 * torch.randn(1, slots, dtype=FLOAT64),
        old_dist_inputs=torch.zeros(1, slots, NUM_ACTIONS, dtype=FLOAT64),
        rewards=torch.randn(1, slots, dtype=FLOAT64),
        step=ones,
        advantage=BlockwiseAdvantage.of(Masks(ones, ones, 0 * ones), gamma=0.9, lambda_=0.9),
    )
    return players, batch, torch.randn(slots, dtype=FLOAT64)


@pytest.mark.parametrize(
    "solver",
    [Exact(damping=0.0), Nystrom(rank=OBS_SIZE + 1, damping=1e-7, core_shift=0.0)],
    ids=["exact", "nystrom of full rank"],
)
def test_hypergradient_is_the_total_derivative_of_a_quadratic_bilevel_problem(solver):
    """The follower minimises L(θ, w) = Σ m (y − V_w)² + S(θ, w) − S(θ₀, w); at θ₀ its curvature is the Hessian of the
    first term and its mixed derivative that of S, so the hypergradient at (θ₀, w*(θ₀)) is dJ(θ, w*(θ))/dθ."""
    players, batch, targets = one_step_problem()
    weights = batch.step / batch.step.sum()
    features = torch.cat([flat_obs(batch), torch.ones(batch.step.numel(), 1, dtype=FLOAT64)], 1)
    w0, theta0 = (x.detach() for x in vectors(players))

    def follower(theta, w):
        squares = (weights[0] * (targets - features @ w) ** 2).sum()
        cross = [surrogate_sum(players, batch, w, t, targets, None, -2 * batch.step) for t in (theta, theta0)]
        return squares + cross[0] - cross[1]

    def best_response(theta):
        """Exact minimiser: one Newton step on a quadratic."""
        gradient = torch.func.grad(follower, 1)(theta, w0)
        return w0 - torch.linalg.solve(torch.func.hessian(follower, 1)(theta, w0), gradient)

    def leader(theta):
        return -surrogate_sum(players, batch, best_response(theta), theta, None, LEADER.clip, weights)

    h = 1e-5
    expected = torch.stack(
        [(leader(theta0 + h * e) - leader(theta0 - h * e)) / (2 * h) for e in torch.eye(len(theta0), dtype=FLOAT64)]
    )
    with torch.no_grad():
        nn.utils.vector_to_parameters(best_response(theta0), players.critic_parameters)
    loss = critic_loss(players, batch, targets)
    coordinates = players.coordinates(solver.draw(len(w0), np.random.default_rng(0)))
    result = hypergradient(
        actor=actor_of(players, batch),
        loss=loss,
        batch=batch,
        leader=LEADER,
        correction=Correction(cross_clip=None, bound=None),
        solver=solver,
        curvature=Hessian(loss, NONE),
        coordinates=coordinates,
        reduction=NONE,
    )
    assert (result.scale * result.mixed_product).norm() > 0.05 * result.grad_actor.norm(), (
        "the correction must matter in this test"
    )
    check(result.direction, expected, rtol=1e-5)
