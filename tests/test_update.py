"""The update phase: by hand = automatic, invariance to padding, safety against non-finite numbers, state."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import FLOAT64, SmallPlayers, compiled_kernels, random_batch

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.gae import BlockwiseAdvantage, Masks
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.ihvp import ConjugateGradient, Exact, IHVPSolver, Nystrom
from blpo_rllib.core.minibatch import Counts, MinibatchMeans, UpdateSettings
from blpo_rllib.core.networks import flatten
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.update import BilevelUpdate

SETTINGS = UpdateSettings(
    num_epochs=2,
    num_critic_updates=3,
    leader=LeaderLoss(clip=0.2),
    grad_clip=None,
    correction=Correction(cross_clip=1.0, bound=1.0),
)


class BrokenSolver(IHVPSolver):
    """Returns what is not a number."""

    damping = 1.0

    def solve(self, curvature, v, coordinates, terms):
        return torch.full_like(v, float("nan"))


def make(players, solver=None, curvature=Hessian, recorder=None):
    """The update of these players, by compiled kernels throughout if they have them."""
    optimizers = [
        torch.optim.Adam(parameters, lr=lr, eps=1e-5, fused=True)
        for parameters, lr in ((players.actor_parameters, 3e-3), (players.critic_parameters, 1e-2))
    ]
    return BilevelUpdate(
        players,
        *optimizers,
        curvature,
        solver,
        0,
        Reduction(),
        recorder,
        players.kernels,
    )


def optimizers_of(update):
    return [adam._optimizer for adam in update._adams]


def weights(players):
    return flatten([p.detach() for p in (*players.actor_parameters, *players.critic_parameters)])


def twins(count=2):
    """Equal players, the first differentiated automatically, the others by hand."""
    players = [SmallPlayers()]
    for _ in range(count - 1):
        players.append(copy.deepcopy(players[0]))
        players[-1].critic_parameters = list(players[-1].critic_network.parameters())
        players[-1].actor_parameters = [*players[-1].actor_network.parameters(), players[-1].log_std]
        players[-1].by_hand = True
    return players


def triplets():
    """Equal players: differentiated automatically, by hand, and by compiled kernels."""
    players = twins(3)
    players[2].kernels = compiled_kernels()
    return players


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
@pytest.mark.parametrize(
    "solver",
    [None, Nystrom(3, 0.1), Nystrom(3, 50.0, redraw=True), ConjugateGradient(5, 0.1), Exact(1.0)],
    ids=["none", "nystrom", "redrawn", "cg", "exact"],
)
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, leader=LeaderLoss(0.1, entropy_coeff=0.01, kl_coeff=0.5), grad_clip=0.1),
        replace(SETTINGS, correction=Correction(None, None), num_critic_updates=1),
    ],
    ids=["default", "penalties and clipping", "unbounded"],
)
def test_by_hand_equals_automatic(solver, curvature, settings):
    results = []
    for players in triplets():
        torch.manual_seed(0)
        batch = random_batch(num_segments=4, kernels=players.kernels)
        start = weights(players)
        update = make(players, copy.deepcopy(solver), curvature)
        metrics = [update.run(batch, 2, settings) for _ in range(2)][-1]
        assert not any(metrics[name] for name in Counts._fields)
        assert (weights(players) - start).abs().min() > 0, "every parameter must move"
        results.append((weights(players), metrics))
    automatic, automatic_metrics = results[0]
    for by_hand, by_hand_metrics in results[1:]:
        torch.testing.assert_close(by_hand, automatic, rtol=1e-7, atol=1e-9)
        assert by_hand_metrics == pytest.approx(automatic_metrics, rel=1e-5, abs=1e-8)


def padded(batch, extra):
    """The same segments with ``extra`` slots of rubbish behind."""

    def pad(x):
        rubbish = 7.0 * torch.ones(len(x), extra, *x.shape[2:], dtype=x.dtype)
        return torch.cat([x, rubbish], 1)

    step = torch.nn.functional.pad(batch.step, (0, extra))
    continues = step.clone()
    continues[:, :-1] *= step[:, 1:]
    continues[:, 5] = 0
    terminated = torch.zeros_like(step)
    terminated[:, 5] = 1
    return replace(
        batch,
        **{name: pad(getattr(batch, name)) for name in ("obs", "actions", "old_logp", "old_dist_inputs", "rewards")},
        step=step,
        advantage=BlockwiseAdvantage.of(Masks(step, terminated, continues), 0.9, 0.8),
    )


def test_padding_changes_nothing():
    batch = random_batch(num_segments=4)
    first, second = twins()
    metrics = make(first, Nystrom(3, 0.5)).run(batch, 2, SETTINGS)
    padded_metrics = make(second, Nystrom(3, 0.5)).run(padded(batch, 6), 2, SETTINGS)
    torch.testing.assert_close(weights(second), weights(first), rtol=1e-8, atol=1e-10)
    assert padded_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def test_no_solver_is_nested_ppo_and_a_broken_solver_falls_back_to_it():
    batch = random_batch(num_segments=2)
    plain, broken, working = twins(3)
    make(plain, None).run(batch, 2, SETTINGS)
    metrics = make(broken, BrokenSolver()).run(batch, 2, SETTINGS)
    torch.testing.assert_close(weights(broken), weights(plain), rtol=1e-9, atol=1e-11)
    assert metrics["hypergradient_fallbacks"] == 2 * SETTINGS.num_epochs
    assert metrics["skipped_actor_updates"] == metrics["skipped_critic_updates"] == 0
    assert all(np.isfinite(metrics[name]) for name in MinibatchMeans._fields)
    make(working, Nystrom(3)).run(batch, 2, SETTINGS)
    assert (weights(working) - weights(plain)).abs().max() > 1e-6, "a working solver must not fall back"


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_data_reaches_neither_weights_nor_optimizers(bad, kernels):
    kernels = compiled_kernels() if kernels else None
    batch = random_batch(num_segments=2, kernels=kernels)
    rewards = batch.rewards.clone()
    rewards[0, 1] = bad
    healthy, poisoned = twins()
    poisoned.kernels = kernels
    update = make(poisoned, Nystrom(3))
    metrics = update.run(replace(batch, rewards=rewards), 2, replace(SETTINGS, num_epochs=1))
    # One of the two minibatches is bad: its actor step and its nested critic steps are skipped, the other's are not.
    assert metrics["skipped_actor_updates"] == 1
    assert metrics["skipped_critic_updates"] == SETTINGS.num_critic_updates
    for optimizer in optimizers_of(update):
        for state in optimizer.state.values():
            assert all(torch.isfinite(x).all() for x in state.values())
    assert torch.isfinite(weights(poisoned)).all()
    assert not torch.equal(weights(poisoned), weights(healthy))
    steps = {int(s["step"]) for s in optimizers_of(update)[1].state.values()}
    assert steps == {SETTINGS.num_critic_updates}


def test_metrics_mean_what_they_say():
    batch = random_batch(num_segments=3)
    players, settings = twins(1)[0], replace(SETTINGS, num_epochs=1, correction=Correction(None, 0.5))
    metrics = make(players, Nystrom(3, 0.5)).run(batch, 1, settings)
    assert metrics["bound_active_fraction"] == 1.0
    assert metrics["mixed_norm"] == pytest.approx(0.5 * metrics["actor_grad_norm"])
    assert metrics["mixed_norm_unbounded"] > metrics["mixed_norm"]
    assert metrics["vf_loss_after_nesting"] < metrics["vf_loss_before_nesting"]
    assert -1 <= metrics["mixed_grad_cosine"] <= 1
    norm = metrics["actor_grad_norm"]
    expected = norm**2 + metrics["mixed_norm"] ** 2 - 2 * metrics["mixed_grad_cosine"] * norm * metrics["mixed_norm"]
    assert metrics["hypergradient_norm"] == pytest.approx(expected**0.5)
    assert metrics["vf_explained_var"] <= 1
    exact = make(SmallPlayers(), Exact(0.5)).run(batch, 1, settings)
    assert exact["ihvp_relative_residual"] < 1e-9 < metrics["ihvp_relative_residual"]


def test_state_restores_the_next_update_bit_for_bit():
    batch = random_batch(num_segments=4)
    players, _ = twins()
    update = make(players, Nystrom(3))
    update.run(batch, 4, SETTINGS)
    restored = copy.deepcopy(players)
    restored.critic_parameters = list(restored.critic_network.parameters())
    restored.actor_parameters = [*restored.actor_network.parameters(), restored.log_std]
    again = make(restored, Nystrom(3))
    again._order_generator, again._coordinate_generator = (np.random.default_rng(seed) for seed in (98, 99))
    again.set_state(copy.deepcopy(update.get_state()))
    for mine, theirs in zip(optimizers_of(again), optimizers_of(update), strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert update.run(batch, 4, SETTINGS) == again.run(batch, 4, SETTINGS)
    assert torch.equal(weights(players), weights(restored))
    assert weights(players).dtype == FLOAT64


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_parameters_of_any_memory_layout_and_moving_rates(kernels, max_norm, factor):
    """The fused steps against torch's plain Adam."""
    kernels = compiled_kernels() if kernels else None
    torch.manual_seed(1)
    mine = [torch.randn(3, 4, dtype=FLOAT64).T.requires_grad_(), torch.randn(3, dtype=FLOAT64).requires_grad_()]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    fused = torch.optim.Adam(mine, lr=0.1, eps=1e-5, fused=True)
    plain = torch.optim.Adam([{"params": [p]} for p in theirs], lr=0.1, eps=1e-5, foreach=False)
    steps = AdamSteps(fused, mine, kernels, [1.0, factor])
    for rate in (0.1, 0.1, 0.03):
        fused.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = rate
        plain.param_groups[1]["lr"] = factor * rate
        steps.refresh()
        gradient = torch.randn(15, dtype=FLOAT64)
        assert steps.step(gradient, max_norm) == 0
        assert steps.step(torch.full_like(gradient, float("nan")), max_norm) == 1
        clipped = gradient if max_norm is None else gradient / max(1.0, float(gradient.norm()) / max_norm)
        theirs[0].grad, theirs[1].grad = clipped[:12].view(4, 3), clipped[12:]
        plain.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_epochs_end_at_the_largest_kl():
    """A limit between the first two epochs' KL divergences, read off runs of one and of two epochs."""
    batch, start = random_batch(num_segments=4), SmallPlayers()

    def run(num_epochs, max_kl):
        players = copy.deepcopy(start)
        metrics = make(players, Nystrom(3)).run(batch, 2, replace(SETTINGS, num_epochs=num_epochs, max_kl=max_kl))
        return weights(players), metrics

    one, first = run(1, None)
    two, both = run(2, None)
    second = 2 * both["approx_kl"] - first["approx_kl"]
    assert second != pytest.approx(first["approx_kl"])
    stopped, metrics = run(4, (1 - 1e-6) * first["approx_kl"])
    assert torch.equal(stopped, one)
    assert metrics == first
    assert metrics["epochs"] == 1
    if second > first["approx_kl"]:
        stopped, metrics = run(4, (first["approx_kl"] + second) / 2)
        assert torch.equal(stopped, two)
        assert metrics == pytest.approx(both)


def test_the_actors_rate_follows_the_kl_and_is_part_of_the_state():
    batch = random_batch(num_segments=4)
    far, near = twins()
    for players, target, factors in ((far, 1e-9, (1, 1 / 1.5, 1 / 1.5**2)), (near, 1e9, (1, 1, 1))):
        update, settings = make(players, None), replace(SETTINGS, target_kl=target)
        found = [update.run(batch, 2, settings)["actor_rate_factor"] for _ in range(3)]
        assert found == pytest.approx(factors)
        actor, critic = (float(adam._lr) for adam in update._adams)
        assert (actor, critic) == pytest.approx((3e-3 * factors[-1], 1e-2))
        restored = make(copy.deepcopy(players), None)
        restored.set_state(copy.deepcopy(update.get_state()))
        following = restored.run(batch, 2, settings)["actor_rate_factor"]
        assert following == update.run(batch, 2, settings)["actor_rate_factor"]
        # It rises again, though not above the schedule; and without a target it is the schedule's.
        rising = [update.run(batch, 2, replace(SETTINGS, target_kl=1e9))["actor_rate_factor"] for _ in range(9)]
        assert rising[-1] == 1.0
        assert rising == sorted(rising)
        update.run(batch, 2, SETTINGS)
        assert float(update._adams[0]._lr) == 3e-3
