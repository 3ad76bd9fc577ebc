"""Advantages over whole rollouts, kept or standardised, and a whole batch's correction, against RLlib and autograd."""

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from episodes import mixed_episodes
from problems import SmallPlayers, compiled_kernels, critic_loss, flat_obs, random_batch
from ray.rllib.core.columns import Columns
from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets
from test_hypergradient import actor_of
from test_learner import config
from test_update import SETTINGS, make, triplets, twins, weights

from blpo_rllib.core.advantages import AdvantageRule, anchored, full_advantages
from blpo_rllib.core.hypergradient import Correction, Surrogate, leader_critic_gradient, log_probability_ratio
from blpo_rllib.core.ihvp import Nystrom
from blpo_rllib.core.networks import flatten
from blpo_rllib.core.players import Minibatch
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch
from blpo_rllib.tasks import as_ppo

NONE = Reduction()
GAMMA, LAMBDA = 0.99, 0.95


def rllib_advantages(episodes, value_of):
    """RLlib's GAE over whole episodes and fragments, by observation."""
    found = {}
    for e in episodes:
        length, obs = len(e), e.get_observations()
        values = value_of(torch.as_tensor(obs))
        terminateds, truncateds = np.zeros(length + 1), np.zeros(length + 1)
        terminateds[length - 1] = e.is_terminated
        truncateds[length - 1] = not e.is_terminated
        rewards = np.append(e.get_rewards(), 0.0)
        targets = compute_value_targets(values, rewards, terminateds, truncateds, GAMMA, LAMBDA)
        found |= {tuple(o): a for o, a in zip(obs[:-1].tolist(), (targets - values)[:-1], strict=True)}
    return found


def by_observation(segments, x):
    steps = segments.step > 0
    return {tuple(o): float(a) for o, a in zip(segments.obs[steps].tolist(), x[steps], strict=True)}


def packed(length, native_kernels=True):
    """Segments of ``length`` steps of random episodes, with their learner, values and rollouts."""
    learner = config(segment_length=length, advantage_horizon="rollout", native_kernels=native_kernels).build_learner()
    episodes = mixed_episodes(np.random.default_rng(length))
    batch = learner.build_train_batch(copy.deepcopy(episodes), length if length < 50 else None)
    part = batch.policy_batches["default_policy"]
    players = learner._bilevel_updates["default_policy"]._players
    return episodes, part.segments, part.rollouts, lambda obs: players.critic(obs).values


@pytest.mark.parametrize("native_kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("length", [1, 4, 16, 1000])
def test_advantages_at_the_anchor_are_those_of_rllib_however_segments_are_cut(length, native_kernels):
    episodes, segments, rollouts, value_of = packed(length, native_kernels)
    values = value_of(flat_obs(segments)).view_as(segments.step)
    adv = full_advantages(segments, values, rollouts)
    expected = rllib_advantages(episodes, lambda obs: value_of(obs).numpy())
    cut = anchored(segments, values, adv, AdvantageRule(), NONE)
    for x in (adv, cut.advantage.advantages(cut.rewards, values)):
        found = by_observation(segments, x)
        assert found.keys() == expected.keys()
        assert all(found[o] == pytest.approx(expected[o], abs=2e-5) for o in expected)
    # Not so without the anchor, where segments are cut.
    plain = by_observation(segments, segments.advantage.advantages(segments.rewards, values))
    differ = max(abs(plain[o] - expected[o]) for o in expected)
    assert differ < 2e-5 if length == 1000 else differ > 1e-2


def test_away_from_the_anchor_the_change_ends_with_the_segment():
    episodes, segments, rollouts, value_of = packed(4)
    values = value_of(flat_obs(segments)).view_as(segments.step)
    cut = anchored(segments, values, full_advantages(segments, values, rollouts), AdvantageRule(), NONE)
    # A change that is a function of the observation.
    moved = values + segments.obs.sum(-1).sin()
    found = cut.advantage.advantages(cut.rewards, moved)
    expected = full_advantages(segments, values, rollouts) + segments.advantage.tangent(moved - values)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # On segments that are whole episodes nothing is left out.
    episodes, segments, rollouts, value_of = packed(1000)
    values = value_of(flat_obs(segments)).view_as(segments.step)
    cut = anchored(segments, values, full_advantages(segments, values, rollouts), AdvantageRule(), NONE)
    moved = values + segments.obs.sum(-1).sin()
    expected = rllib_advantages(episodes, lambda obs: (value_of(obs) + obs.sum(-1).sin()).numpy())
    found = by_observation(segments, cut.advantage.advantages(cut.rewards, moved))
    assert all(found[o] == pytest.approx(expected[o], abs=5e-5) for o in expected)


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def problem(request):
    kernels = compiled_kernels() if request.param else None
    players, batch = SmallPlayers(by_hand=True, kernels=kernels), random_batch(num_segments=3, kernels=kernels)
    values = players.critic(flat_obs(batch)).values.view_as(batch.step)
    return players, batch, values, full_advantages(batch, values, None)


@pytest.mark.parametrize("refresh", ["minibatch", "epoch"])
def test_standardised_advantages(problem, refresh):
    players, batch, values, adv = problem
    segments = anchored(batch, values, adv, AdvantageRule(refresh, standardize=True), NONE)
    steps = batch.step > 0
    expected = torch.zeros_like(adv)
    expected[steps] = (adv[steps] - adv[steps].mean()) / adv[steps].std(correction=0)
    torch.testing.assert_close(segments.advantage.advantages(segments.rewards, values), expected)
    change = torch.randn_like(values)
    scaled = batch.advantage.tangent(change) / adv[steps].std(correction=0)
    torch.testing.assert_close(segments.advantage.tangent(change), scaled)
    moved = segments.advantage.advantages(segments.rewards, values + change)
    torch.testing.assert_close(moved, expected + scaled if refresh == "minibatch" else expected)


@pytest.mark.parametrize("standardize", [False, True])
def test_kept_advantages_leave_the_derivative_in_the_critic(problem, standardize):
    """v = ∇_w J is autograd's through the unclipped branch of the surrogate, at advantages that are a function of w."""
    players, batch, values, adv = problem
    segments = anchored(batch, values, adv, AdvantageRule("iteration", standardize), NONE)
    loss = critic_loss(players, segments)
    weights = loss.weights.view_as(batch.step)
    log_ratio = log_probability_ratio(batch, actor_of(players, batch).logp)
    kept = segments.advantage.advantages(segments.rewards, values)
    surrogate = Surrogate.clipped(log_ratio, kept, 0.2)
    found = leader_critic_gradient(loss, segments, surrogate, weights)
    live = players.critic_network(flat_obs(batch))[:, 0].view_as(values)
    plain = random_free_operator(batch)
    deviation = adv[batch.step > 0].std(correction=0) if standardize else 1.0
    objective = -(weights * surrogate.slope * plain.advantages(batch.rewards, live) / deviation).sum()
    expected = flatten(torch.autograd.grad(objective, list(players.critic_network.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def random_free_operator(batch):
    """The operators of :func:`random_batch` in torch operations, which autograd sees."""
    torch_batch = random_batch(num_segments=len(batch))
    return torch_batch.advantage


class Recorder:
    """In the place of the actor's Adam: keeps the gradients and steps nowhere."""

    def __init__(self):
        self.gradients = []

    def step(self, gradient, grad_clip):
        self.gradients.append(gradient.clone())
        return torch.zeros(())


def directions(update, batch, num_minibatches, settings):
    recorder = update._minibatch_update._actor_adam = Recorder()
    metrics = update.run(batch, num_minibatches, settings)
    return torch.stack(recorder.gradients), metrics


@pytest.mark.parametrize("bound", [None, 0.7])
def test_a_correction_of_the_whole_batch_serves_every_step_of_the_epoch(bound):
    batch = random_batch(num_segments=6)
    alone, shared, whole = twins(3)
    correction = Correction(cross_clip=1.0, bound=bound, sample="batch")
    settings = replace(SETTINGS, num_epochs=1, correction=correction)
    # The whole batch as one minibatch, at the players before anything moves.
    update = make(whole, Nystrom(3, 0.5))
    values = whole.critic(flat_obs(batch)).values.view_as(batch.step)
    targets = values + batch.advantage.advantages(batch.rewards, values)
    expected = update._minibatch_update.hypergradient(
        Minibatch.of(batch, targets, batch.step.sum()), update._draw_coordinates(1)[0], settings
    )
    if bound is not None:
        assert expected.scale * expected.mixed_norm == pytest.approx(bound * float(expected.actor_norm))
    without, _ = directions(make(alone, None), batch, 3, settings)
    found, metrics = directions(make(shared, Nystrom(3, 0.5)), batch, 3, settings)
    assert len(found) == 3
    torch.testing.assert_close(without - found, (expected.scale * expected.mixed_product).expand(3, -1))
    assert metrics["mixed_norm"] == pytest.approx(float(expected.scale * expected.mixed_norm))
    assert 0 < metrics["ihvp_relative_residual"] < 10


def test_a_correction_of_the_whole_batch_that_is_not_finite_is_left_out():
    batch = random_batch(num_segments=4)
    rewards = batch.rewards.clone()
    rewards[0, 1] = float("nan")
    settings = replace(SETTINGS, num_epochs=1, correction=Correction(1.0, 1.0, sample="batch"))
    players = twins(1)[0]
    metrics = make(players, Nystrom(3)).run(replace(batch, rewards=rewards), 2, settings)
    assert metrics["hypergradient_fallbacks"] == 2
    assert metrics["skipped_actor_updates"] == 1
    assert torch.isfinite(flatten([p.detach() for p in players.actor_parameters])).all()


def test_the_published_form_is_the_default_and_the_others_differ():
    batch, start, results = random_batch(num_segments=4), SmallPlayers(), {}
    for rule in (
        None,
        AdvantageRule(),
        AdvantageRule("epoch"),
        AdvantageRule("iteration"),
        AdvantageRule("minibatch", True),
    ):
        players = copy.deepcopy(start)
        settings = SETTINGS if rule is None else replace(SETTINGS, advantages=rule)
        results[rule] = make(players, Nystrom(3, 0.5)).run(batch, 2, settings)["policy_loss"]
    assert results[None] == results[AdvantageRule()]
    assert len(set(results.values())) == len(results) - 1


def test_ppo_is_a_special_case():
    """Advantages kept and standardised, one critic step, no correction: PPO's update, here in a dozen lines."""
    settings = {"hypergradient": "none", "advantage_horizon": "rollout", "advantage_refresh": "iteration"}
    rates = {"actor_lr": 1e-2, "critic_lr": 1e-2, "adam_epsilon": 1e-8, "num_critic_updates": 1}
    learner = config(segment_length=1, standardize_advantages=True, **settings, **rates).build_learner()
    episodes = mixed_episodes(np.random.default_rng(5))
    module = copy.deepcopy(learner.module["default_policy"].unwrapped())
    for _ in range(2):
        learner.update(episodes=copy.deepcopy(episodes), minibatch_size=None, num_epochs=3, timesteps={})

    obs, actions, old_logp = (
        torch.cat([torch.as_tensor(get(e)) for e in episodes])
        for get in (
            lambda e: e.get_observations()[:-1],
            lambda e: e.get_actions(),
            lambda e: e.get_extra_model_outputs(Columns.ACTION_LOGP),
        )
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, eps=1e-8)
    for _ in range(2):
        with torch.no_grad():
            found = rllib_advantages(episodes, lambda o: module.compute_values({Columns.OBS: o}).numpy())
            adv = torch.tensor([found[tuple(o)] for o in obs.tolist()], dtype=torch.float32)
            targets = adv + module.compute_values({Columns.OBS: obs})
            adv = (adv - adv.mean()) / adv.std(correction=0)
        for _ in range(3):
            logits = module.forward_train({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
            ratio = (torch.distributions.Categorical(logits=logits).log_prob(actions) - old_logp).exp()
            surrogate = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
            loss = (module.compute_values({Columns.OBS: obs}) - targets).square() - surrogate
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    for name, p in learner.module["default_policy"].unwrapped().named_parameters():
        torch.testing.assert_close(p, dict(module.named_parameters())[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", range(3), ids=["automatic", "by hand", "kernels"])
@pytest.mark.parametrize("refresh", ["epoch", "iteration"])
def test_without_a_correction_kept_advantages_need_no_bootstrap_slots(kind, refresh, monkeypatch):
    results, rows = [], []
    for plain in (False, True):
        torch.manual_seed(0)
        players = triplets()[kind]
        batch, start = random_batch(num_segments=4, kernels=players.kernels), weights(players)
        critic = players.critic
        monkeypatch.setattr(players, "critic", lambda obs, critic=critic: rows.append(len(obs)) or critic(obs))
        if plain:
            monkeypatch.setattr(SegmentBatch, "without_bootstrap", lambda self, targets: (self, targets))
        settings = replace(SETTINGS, num_epochs=3, advantages=AdvantageRule(refresh, standardize=True))
        metrics = make(players).run(batch, 2, settings)
        assert (weights(players) - start).abs().min() > 0
        # A segment has seven steps and two other slots.
        assert min(rows) == 2 * (9 if plain else 7)
        results.append((weights(players), metrics))
        rows.clear()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("pixels", [False, True], ids=["vectors", "images"])
def test_ppo_evaluates_each_step_once_an_epoch(pixels, monkeypatch):
    """Single steps, as :func:`as_ppo` takes them: before, each brought the observation behind it along."""
    made, episodes = as_ppo(config(native_kernels=False)), mixed_episodes(np.random.default_rng(5))
    if pixels:
        space = gym.spaces.Box(0, 255, (6, 6, 1), np.uint8)
        model = {"conv_filters": [[2, 3, 2]], "conv_activation": "relu", "head_fcnet_hiddens": [4]}
        made = made.environment(observation_space=space).rl_module(model_config=model)
        for e in episodes:
            shape = len(e) + 1, *space.shape
            e.observations.data = np.random.default_rng(len(e)).integers(256, size=shape).astype(np.uint8)
    learner = made.build_learner()
    batch, num_steps = learner.build_train_batch(episodes, 64, num_epochs=3), sum(map(len, episodes))
    players, rows = learner._bilevel_updates["default_policy"]._players, {"critic": [], "actor": []}
    for name, calls in rows.items():
        own = getattr(players, name)
        monkeypatch.setattr(
            players, name, lambda obs, *rest, own=own, calls=calls: calls.append(len(obs)) or own(obs, *rest)
        )
    learner.update(batch=batch, timesteps={})
    # Minibatches of 62.25 steps.
    num_slots = 3 * 4 * 63
    assert num_steps == 249
    assert sum(rows["actor"]) == num_slots
    # V before the first epoch, of each observation once, and one nested step and the loss after it in each minibatch.
    assert sum(rows["critic"]) == num_steps + len(episodes) + 2 * num_slots
