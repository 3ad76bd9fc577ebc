"""The short way from episodes to columns and from learner to EnvRunner against RLlib's own."""

import copy

import numpy as np
import pytest
import torch
import tree
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics.stats import EmaStats, MeanStats

from blpo_rllib import BLPOConfig
from blpo_rllib.learning import direct
from blpo_rllib.learning.quick_stats import QuickEmaStats, QuickMeanStats
from blpo_rllib.sampling.env_runner import BatchedEnvRunner


class Nothing(ConnectorV2):
    """Changes nothing; RLlib's pipeline cannot know."""

    def __call__(self, *, batch, **kwargs):
        return batch


def learner_and_episodes(env, piece=None, **training):
    config = (
        BLPOConfig()
        .environment(env)
        .env_runners(num_envs_per_env_runner=3)
        .training(
            train_batch_size_per_learner=96,
            minibatch_size=32,
            num_epochs=1,
            nystrom_rank=2,
            learner_connector=piece and (lambda observations, actions: [piece()]),
            **training,
        )
        .debugging(seed=0, log_level="ERROR")
    )
    runner = BatchedEnvRunner(config=config, worker_index=0)
    learner = config.build_learner(spaces=runner.get_spaces())
    return learner, [runner.sample() for _ in range(2)]


@pytest.fixture
def counted(monkeypatch):
    """How often the short way was taken."""
    calls = []
    columns_of = direct.columns_of
    monkeypatch.setattr(direct, "columns_of", lambda episodes: calls.append(1) or columns_of(episodes))
    return calls


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_batches_are_those_of_the_whole_pipeline(env, normalize_rewards, counted):
    """Over two fragments, the second of which goes on with the first's episodes."""
    found = []
    for piece in (None, Nothing):
        torch.manual_seed(0)
        learner, samples = learner_and_episodes(env, piece, normalize_rewards=normalize_rewards)
        found.append([learner._packed_columns(copy.deepcopy(sample), 32) for sample in samples])
    assert len(counted) == 2
    for short, long in zip(*found, strict=True):
        tree.assert_same_structure(short, long)
        tree.map_structure(np.testing.assert_array_equal, short, long)


def test_episodes_stay_as_they_were(counted):
    """RLlib's pipeline extends them, and fragments that metrics still wait for with them."""
    learner, (episodes, _) = learner_and_episodes("CartPole-v1")
    lengths = [len(episode) for episode in episodes]
    learner.update(episodes=episodes, minibatch_size=32, num_epochs=1, timesteps={})
    assert counted
    assert [len(episode) for episode in episodes] == lengths


def test_weights_are_those_of_the_whole_way(monkeypatch):
    config = (
        BLPOConfig()
        .environment("CartPole-v1")
        .training(train_batch_size_per_learner=64, minibatch_size=32, num_epochs=1, nystrom_rank=2)
        .debugging(seed=0, log_level="ERROR")
    )
    found, taken = [], []
    hand_over = direct.hand_over_weights
    for short in (True, False):
        way = (lambda *args: taken.append(hand_over(*args)) or taken[-1]) if short else (lambda *args: False)
        monkeypatch.setattr(direct, "hand_over_weights", way)
        algo = config.build_algo()
        for _ in range(2):
            result = algo.train()
        state = algo.env_runner.get_state()
        found.append((state["rl_module"], state["weights_seq_no"], result["num_training_step_calls_per_iteration"]))
        acting = algo.learner_group.get_weights()[DEFAULT_MODULE_ID]
        for name, x in state["rl_module"].items():
            np.testing.assert_array_equal(x, acting[name])
        algo.stop()
    assert taken == [True, True]
    tree.map_structure(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(("quick", "rllibs"), [(QuickMeanStats, MeanStats), (QuickEmaStats, EmaStats)])
@pytest.mark.parametrize("values", [[1.5], [float("nan")], [1.0, 2.0, float("nan")], [np.float32(0.1)], [3]], ids=str)
def test_statistics_are_rllibs(quick, rllibs, values):
    made = []
    for cls in (quick, rllibs):
        own = {"window": 2} if issubclass(cls, MeanStats) else {}
        leaves, root = (
            [cls(is_root=False, is_leaf=True, **own) for _ in values],
            cls(is_root=True, is_leaf=False, **own),
        )
        for leaf, value in zip(leaves, values, strict=True):
            leaf.push(value)
        root.merge([leaf.reduce(compile=False) for leaf in leaves])
        made.append((root.peek(), root.reduce(compile=True)))
    np.testing.assert_allclose(*made)
