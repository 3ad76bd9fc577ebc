"""Connectors of RLlib's and of users': what they make of an observation while sampling is what BLPO learns from."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.connectors.env_to_module import (
    FlattenObservations,
    MeanStdFilter,
    PrevActionsPrevRewards,
)
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.env_to_module.observation_preprocessor import SingleAgentObservationPreprocessor
from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
from ray.rllib.core import DEFAULT_MODULE_ID

from blpo_rllib import BLPOConfig
from blpo_rllib.core.players import slots
from blpo_rllib.sampling.env_runner import BatchedEnvRunner

LSTM = {"use_lstm": True, "lstm_cell_size": 6, "fcnet_hiddens": [5], "max_seq_len": 5}
SMALL = {"fcnet_hiddens": [8]}
CONV = {"conv_filters": [[4, 4, 2], [8, 4, 2]], "head_fcnet_hiddens": [8]}


class Noise(gym.Env):
    """Random observations of a given space; episodes of random length, terminated or truncated."""

    def __init__(self, env_config):
        self.observation_space = env_config["observation_space"]
        self.action_space = env_config["action_space"]
        self.rng = np.random.default_rng(0)

    def _obs(self):
        self.observation_space.seed(int(self.rng.integers(1 << 31)))
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        return self._obs(), {}

    def step(self, action):
        end = self.rng.random()
        return self._obs(), float(self.rng.normal()), end < 0.07, end > 0.93, {}


class Sines(SingleAgentObservationPreprocessor):
    """A user's own, which changes the space."""

    def recompute_output_observation_space(self, observation_space, action_space):
        return gym.spaces.Box(-1, 1, (2 * observation_space.shape[0],), np.float32)

    def preprocess(self, observation, episode):
        return np.concatenate([np.sin(observation), np.cos(observation)]).astype(np.float32)


VECTOR = gym.spaces.Box(-2, 2, (3,), np.float32)
NESTED = gym.spaces.Dict({"a": VECTOR, "b": gym.spaces.Discrete(3)})
IMAGE = gym.spaces.Box(0, 1, (10, 10, 1), np.float32)
STACK, STACK_LEARNER = lambda: FrameStackingEnvToModule(num_frames=3), lambda: FrameStackingLearner(num_frames=3)

# Observation space, env-to-module pieces, learner pieces, model config, and whether sampling goes in batches.
CASES = {
    "stacked images": (IMAGE, [STACK], [STACK_LEARNER], CONV, False),
    "images": (IMAGE, [], [], CONV, True),
    "previous actions and rewards": (
        VECTOR,
        [lambda: PrevActionsPrevRewards(n_prev_actions=2, n_prev_rewards=1), FlattenObservations],
        [],
        SMALL,
        False,
    ),
    "previous actions and rewards, LSTM": (VECTOR, [PrevActionsPrevRewards, FlattenObservations], [], LSTM, False),
    "dictionaries": (NESTED, [FlattenObservations], [], SMALL, False),
    "dictionaries, LSTM": (NESTED, [FlattenObservations], [], LSTM, False),
    "filter": (VECTOR, [MeanStdFilter], [], SMALL, True),
    "filter, LSTM": (VECTOR, [MeanStdFilter], [], LSTM, True),
    "a user's own": (VECTOR, [Sines], [], SMALL, False),
    "a user's own, filter, LSTM": (VECTOR, [Sines, MeanStdFilter], [], LSTM, False),
}


@pytest.mark.parametrize("name", CASES)
def test_policies_in_the_learner_are_those_met_while_sampling(name):
    """With the weights that sampled, log π of each step is the recorded one: the learner sees the same inputs, in the
    second fragment too, where episodes go on."""
    space, env_to_module, learner_pieces, model_config, in_batches = CASES[name]
    config = (
        BLPOConfig()
        .environment(Noise, env_config={"observation_space": space, "action_space": gym.spaces.Discrete(3)})
        .env_runners(
            num_envs_per_env_runner=3,
            env_to_module_connector=(lambda env, spaces, device: [make() for make in env_to_module])
            if env_to_module
            else None,
            episode_lookback_horizon=4,
        )
        .training(
            train_batch_size_per_learner=60,
            minibatch_size=20,
            segment_length=11,
            num_epochs=1,
            nystrom_rank=2,
            learner_connector=(lambda obs, action: [make() for make in learner_pieces]) if learner_pieces else None,
        )
        .rl_module(model_config=model_config)
        .debugging(seed=0, log_level="ERROR")
    )
    runner = BatchedEnvRunner(config=config, worker_index=0)
    assert (runner.obstacle() is None) == in_batches
    learner = config.build_learner(spaces=runner.get_spaces())
    with torch.no_grad():
        # So that policies differ between observations.
        for p in learner.module[DEFAULT_MODULE_ID].parameters():
            p.add_(0.3 * torch.randn(p.shape))
    runner.module.set_state(learner.module[DEFAULT_MODULE_ID].get_state(inference_only=runner.module.inference_only))
    for _ in range(2):
        episodes = runner.sample(num_timesteps=60)
        segments = learner.build_train_batch(copy.deepcopy(episodes), 20).policy_batches[DEFAULT_MODULE_ID].segments
        assert segments.step.sum() == sum(len(episode) for episode in episodes)
        players = learner._bilevel_updates[DEFAULT_MODULE_ID]._players
        logp = players.actor(slots(segments.obs), slots(segments.actions), None).logp.view_as(segments.step)
        steps = segments.step > 0
        assert logp[steps].std() > 0.05
        assert (logp - segments.old_logp)[steps].abs().max() < 1e-4
    before = players.actor_parameters[0].detach().clone(), players.critic_parameters[0].detach().clone()
    learner.update(episodes=episodes, minibatch_size=20, num_epochs=1, timesteps={})
    for old, new in zip(before, (players.actor_parameters[0], players.critic_parameters[0]), strict=True):
        assert new.isfinite().all()
        assert (new != old).any()
