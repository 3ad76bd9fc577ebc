"""The learner: from RLlib episodes to segments, and its place in RLlib's machinery."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from episodes import OBS_SIZE, episode, mixed_episodes
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.common import NumpyToTensor
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from test_gae import loop_advantages

from blpo_rllib import BLPOConfig
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.learning.connectors import DivideRewards, PackSegments, RewardScale, pack_on_host


def config(**training):
    return (
        BLPOConfig()
        .environment(
            observation_space=gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32),
            action_space=gym.spaces.Discrete(2),
        )
        .env_runners(num_envs_per_env_runner=4)
        .training(train_batch_size_per_learner=256, minibatch_size=64, num_epochs=2, **training)
        .debugging(seed=3)
    )


def segments_of(learner, episodes, minibatch_size=64):
    batch = learner.build_train_batch(copy.deepcopy(episodes), minibatch_size)
    return batch.policy_batches["default_policy"].segments


@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_of_packed_episodes_are_those_of_the_episodes(seed):
    """Rows long enough to leave episodes whole: each step's advantage is that of a loop over its own episode, with V of
    the final observation behind truncated and cut ends and nothing behind terminated ones."""
    learner = config(segment_length=1000).build_learner()
    rng = np.random.default_rng(seed)
    episodes = mixed_episodes(rng)
    segments = segments_of(learner, episodes, minibatch_size=None)
    players = learner._bilevel_updates["default_policy"]._players
    values = players.critic(segments.obs.flatten(0, 1)).values.view_as(segments.step)
    advantages = segments.advantage.advantages(segments.rewards, values)
    found = {
        tuple(o): float(a) for o, a in zip(segments.obs[segments.step > 0].tolist(), advantages[segments.step > 0])
    }
    count = 0
    for e in episodes:
        length, obs = len(e), torch.as_tensor(e.get_observations())
        step = torch.tensor([[1.0] * length + [0.0]])
        terminated = torch.zeros_like(step)
        terminated[0, length - 1] = float(e.is_terminated)
        continues = torch.tensor([[1.0] * (length - 1) + [0.0, 0.0]])
        rewards = torch.tensor([[*e.get_rewards(), 0.0]], dtype=torch.float32)
        expected = loop_advantages(
            step, terminated, continues, rewards, players.critic(obs).values[None], gamma=0.99, lambda_=0.95
        )
        for t in range(length):
            assert found[tuple(obs[t].tolist())] == pytest.approx(float(expected[0, t]), abs=1e-5)
            count += 1
    assert count == len(found)


def test_segments_of_unequal_fragments():
    learner = config().build_learner()
    rng = np.random.default_rng(0)
    segments = segments_of(learner, [episode(n, rng, terminated=n < 60) for n in (66, 64, 63, 30, 32)])
    assert len(segments) == 4
    assert segments.step.sum() == 255


@pytest.mark.parametrize(
    "lengths", [[1], [3, 2], [700], [64] * 40, [5] * 3 + [200]], ids=["one step", "few", "one long", "many", "mixed"]
)
def test_any_batch_of_episodes_trains(lengths):
    learner = config().build_learner()
    rng = np.random.default_rng(1)
    before = {k: v.copy() for k, v in learner.module.get_state()["default_policy"].items()}
    learner.update(episodes=[episode(n, rng) for n in lengths], minibatch_size=64, num_epochs=2, timesteps={})
    after = learner.module.get_state()["default_policy"]
    assert all(np.isfinite(x).all() for x in after.values())
    assert any((after[k] != before[k]).any() for k in after)


def test_reward_scale_goes_on_across_fragments():
    rng = np.random.default_rng(0)
    fragments = [episode(5, rng, id_="a"), episode(7, rng, id_="a", terminated=True), episode(4, rng, id_="b")]
    module = {"default_policy": None}
    scale = RewardScale(0.9, Reduction())
    for fragment in fragments:
        scale(rl_module=module, batch={}, episodes=[fragment])
    returns, value = [], 0.0
    for i, fragment in enumerate(fragments):
        value = 0.0 if i == 2 else value
        for reward in fragment.get_rewards():
            value = 0.9 * value + reward
            returns.append(value)
    assert scale.scale("default_policy") == pytest.approx(np.std(returns))
    restored = RewardScale(0.9, Reduction())
    restored.set_state(scale.get_state())
    assert restored.get_state()["open_returns"] == scale.get_state()["open_returns"] != {}
    assert restored.scale("default_policy") == scale.scale("default_policy")


def test_rewards_are_divided_by_the_scale():
    rng = np.random.default_rng(0)
    episodes = [episode(64, rng) for _ in range(4)]
    plain = segments_of(config().build_learner(), episodes)
    learner = config(normalize_rewards=True).build_learner()
    scaled = segments_of(learner, episodes)
    torch.testing.assert_close(scaled.rewards * learner._reward_scale.scale("default_policy"), plain.rewards)
    assert learner._reward_scale.scale("default_policy") != 1.0


def test_segments_are_packed_before_tensors_are_made_unless_somebody_takes_these():
    class Reader(ConnectorV2):
        def __call__(self, *, batch, **kwargs):
            return batch

    for behind, last in ((None, DivideRewards), (Reader(), PackSegments)):
        pipeline = config(normalize_rewards=True).build_learner()._learner_connector
        if behind is not None:
            pipeline.insert_after(NumpyToTensor, behind)
        for _ in range(2):
            pack_on_host(pipeline)
            types = [type(c) for c in pipeline.connectors]
            assert types[-1] is last
            assert (types.index(PackSegments) < types.index(NumpyToTensor)) == (behind is None)


def test_learning_rate_schedules():
    learner = config(actor_lr=[[0, 1e-3], [1000, 0.0]], critic_lr=[[0, 2e-3], [1000, 1e-3]]).build_learner()
    rng = np.random.default_rng(0)
    results = learner.update(
        episodes=mixed_episodes(rng), minibatch_size=64, timesteps={"num_env_steps_sampled_lifetime": 500}
    )["default_policy"]
    assert results["actor_learning_rate"].peek() == pytest.approx(5e-4)
    assert learner.get_optimizer() is learner.get_optimizer(optimizer_name="actor")
    assert results["critic_learning_rate"].peek() == pytest.approx(1.5e-3)
    restored = config(actor_lr=[[0, 1e-3], [1000, 0.0]], critic_lr=[[0, 2e-3], [1000, 1e-3]]).build_learner()
    restored.set_state(learner.get_state())
    assert restored.get_optimizer(optimizer_name="actor").param_groups[0]["lr"] == pytest.approx(5e-4)
    restored.update(episodes=mixed_episodes(rng), minibatch_size=64, timesteps={})


def test_metrics_are_complete():
    learner = config(use_kl_loss=True).build_learner()
    results = learner.update(
        episodes=mixed_episodes(np.random.default_rng(0)), minibatch_size=64, num_epochs=2, timesteps={}
    )["default_policy"]
    expected = [
        "policy_loss",
        "vf_loss",
        "vf_loss_before_nesting",
        "vf_loss_after_nesting",
        "actor_grad_norm",
        "mixed_norm_unbounded",
        "mixed_norm",
        "hypergradient_norm",
        "mixed_grad_cosine",
        "bound_active_fraction",
        "ihvp_relative_residual",
        "vf_explained_var",
        "entropy",
        "approx_kl",
        "mean_kl_loss",
        "clip_fraction",
        "hypergradient_fallbacks",
        "skipped_actor_updates",
        "skipped_critic_updates",
        "actor_learning_rate",
        "critic_learning_rate",
        "curr_kl_coeff",
        "curr_entropy_coeff",
    ]
    values = {name: float(results[name].peek()) for name in expected}
    assert all(np.isfinite(list(values.values())))
    steps = sum(len(e) for e in mixed_episodes(np.random.default_rng(0)))
    assert results["num_module_steps_trained"].peek() == 2 * steps


def test_checkpointed_learner_makes_the_same_next_update_bit_for_bit(tmp_path):
    make = lambda: config(normalize_rewards=True).build_learner()
    rng = np.random.default_rng(0)
    batches = [[episode(60, rng, id_=f"e{i}") for i in range(4)] for _ in range(3)]
    learner = make()
    for batch in batches[:2]:
        learner.update(episodes=copy.deepcopy(batch), minibatch_size=64, num_epochs=2, timesteps={})
    learner.save_to_path(tmp_path)
    restored = make()
    restored.restore_from_path(tmp_path)
    states = []
    for each in (learner, restored):
        each.update(episodes=copy.deepcopy(batches[2]), minibatch_size=64, num_epochs=2, timesteps={})
        states.append(each.get_state(not_components="metrics_logger"))
    assert_equal(*states)
    fresh = make()
    fresh.update(episodes=copy.deepcopy(batches[2]), minibatch_size=64, num_epochs=2, timesteps={})
    with pytest.raises(AssertionError):
        assert_equal(states[0], fresh.get_state(not_components="metrics_logger"))


def assert_equal(a, b):
    """Nested states are equal to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        np.testing.assert_array_equal(a, b)


def test_a_batch_built_beforehand_trains_as_its_episodes_do():
    rng = np.random.default_rng(0)
    episodes = [episode(60, rng, id_=f"e{i}") for i in range(4)]
    states = []
    for beforehand in (False, True):
        learner = config(normalize_rewards=True).build_learner()
        data = {"episodes": copy.deepcopy(episodes)}
        if beforehand:
            data = {"batch": learner.build_train_batch(copy.deepcopy(episodes), minibatch_size=64, num_epochs=2)}
        results = learner.update(**data, minibatch_size=64, num_epochs=2, timesteps={})
        assert results["default_policy"]["num_module_steps_trained"].peek() == 2 * 240
        states.append(learner.get_state(not_components="metrics_logger"))
    assert_equal(*states)


def test_batches_without_segments_and_offline_data_are_refused():
    learner = config().build_learner()
    with pytest.raises(ValueError, match="on-policy"):
        learner.update(data_iterators=[object()], minibatch_size=64)
    with pytest.raises(ValueError, match="holds no segments.*PackSegments"):
        learner._segment_batch("default_policy", {Columns.OBS: None})


def test_result_keys_of_ppo_with_their_values():
    """Every key that PPO's learner reports is there, and means the same."""
    episodes = mixed_episodes(np.random.default_rng(0))
    arguments = {"minibatch_size": 64, "num_epochs": 1, "timesteps": {}}
    c = config(lr=1e-3, entropy_coeff=0.01, use_kl_loss=True)
    ppo = PPOConfig().environment(observation_space=c.observation_space, action_space=c.action_space)
    ppo.training(lr=1e-3, entropy_coeff=0.01, grad_clip=None)
    expected = ppo.build_learner().update(episodes=copy.deepcopy(episodes), **arguments)["default_policy"]
    penalised = c.build_learner().update(episodes=copy.deepcopy(episodes), **arguments)["default_policy"]
    assert not expected.keys() - penalised.keys()
    plain = config(entropy_coeff=0.01).build_learner().update(episodes=episodes, **arguments)["default_policy"]
    assert not expected.keys() - plain.keys()

    def values(results):
        return {name: float(results[name].peek()) for name in ("total_loss", "policy_loss", "vf_loss", "entropy")}

    assert penalised["default_optimizer_learning_rate"].peek() == penalised["actor_learning_rate"].peek() == 1e-3
    for results, penalty in ((penalised, 0.2 * float(penalised["mean_kl_loss"].peek())), (plain, 0.0)):
        x = values(results)
        assert x["total_loss"] == pytest.approx(x["policy_loss"] + x["vf_loss"] - 0.01 * x["entropy"] + penalty)
        assert results["vf_loss_unclipped"].peek() == results["vf_loss"].peek()
    assert (plain["mean_kl_loss"].peek(), plain["curr_kl_coeff"].peek()) == (0.0, 0.0)
    assert round(float(penalised["curr_kl_coeff"].peek()), 6) in (0.1, 0.2, 0.3)
