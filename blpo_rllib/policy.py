"""A trained policy in one's own program: from a checkpoint, without Ray running.

.. code-block:: python

    from blpo_rllib.policy import load_policy

    policy = load_policy("results/cartpole")
    action = policy(observation)
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow.fs
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.env_to_module import EnvToModulePipeline, MeanStdFilter
from ray.rllib.connectors.module_to_env import ModuleToEnvPipeline
from ray.rllib.core import (
    COMPONENT_ENV_RUNNER,
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_MODULE_TO_ENV_CONNECTOR,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.tune import Checkpoint

from blpo_rllib import checkpoints
from blpo_rllib.rllib_private import freeze

# Steps of the running episode that connectors may look back on.
LOOKBACK = 100


class Policy:
    """Maps observations of one environment to actions, with the connectors and the observation statistics of training.

    It remembers the running episode, for connectors that look back on it (stacked frames, recurrent states): call
    :meth:`reset` before each new one. Policies without such a memory need no :meth:`reset`.

    Args:
        module: The trained module.
        env_to_module: RLlib's pipeline from observations to the module's input. Its statistics no longer change.
        module_to_env: RLlib's pipeline from the module's output to actions.
    """

    def __init__(self, module: RLModule, env_to_module: EnvToModulePipeline, module_to_env: ModuleToEnvPipeline):
        for connector in env_to_module.connectors:
            if isinstance(connector, MeanStdFilter):
                freeze(connector)
        self._module, self._env_to_module, self._module_to_env = module, env_to_module, module_to_env
        self.reset()

    @property
    def observation_space(self) -> gym.Space:
        """The environment's."""
        return self._env_to_module.input_observation_space

    @property
    def action_space(self) -> gym.Space:
        """The environment's."""
        return self._env_to_module.input_action_space

    def reset(self) -> None:
        """Begins a new episode."""
        self._episode = SingleAgentEpisode(
            observation_space=self.observation_space, action_space=self.action_space, len_lookback_buffer=LOOKBACK
        )
        self._last: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, observation: Any, explore: bool = False) -> Any:
        """The action for an observation: the most likely one, or a random one with ``explore``.

        Actions are clipped or scaled to the environment's bounds as they were in training.
        """
        self._observe(observation)
        # What connectors hand each other within a step.
        shared: dict[str, Any] = {}
        step = {"episodes": [self._episode], "rl_module": self._module, "explore": explore, "shared_data": shared}
        batch = self._env_to_module(batch={}, **step)
        forward = self._module.forward_exploration if explore else self._module.forward_inference
        found = self._module_to_env(batch=forward(batch), **step)
        self._last = {name: values[0] for name, values in found.items()}
        return self._last.get(Columns.ACTIONS_FOR_ENV, self._last[Columns.ACTIONS])

    def _observe(self, observation: Any) -> None:
        if not self._last:
            self._episode.add_env_reset(observation)
            return
        extra = {n: v for n, v in self._last.items() if n not in (Columns.ACTIONS, Columns.ACTIONS_FOR_ENV)}
        self._episode.add_env_step(
            observation, action=self._last[Columns.ACTIONS], reward=0.0, extra_model_outputs=extra
        )
        self._episode = self._episode.cut(len_lookback_buffer=LOOKBACK)


def load_policy(path: str | Path, filesystem: pyarrow.fs.FileSystem | None = None) -> Policy:
    """The policy of a checkpoint of a run with one agent. Ray neither needs to run nor is it started.

    Args:
        path: A checkpoint, or the folder of a run, whose newest whole checkpoint is taken; a local path or a URL.
        filesystem: Of pyarrow, with ``path`` on it.

    Raises:
        CheckpointError: If there is no whole checkpoint.
        ValueError: If the folder holds several trials, or the checkpoint is of a run with several agents.
    """
    filesystem, found = checkpoints.find(*checkpoints.resolve(path, filesystem))
    with Checkpoint(found, filesystem).as_directory() as folder:
        modules = Path(folder, COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER, COMPONENT_RL_MODULE)
        names = sorted(module.name for module in modules.iterdir() if module.is_dir())
        if names != [DEFAULT_MODULE_ID]:
            raise ValueError(
                f"checkpoint {found} has the modules {', '.join(names)}: load_policy is for one agent, use "
                "BLPO.from_checkpoint(...).get_module(NAME) for these"
            )
        runner = Path(folder, COMPONENT_ENV_RUNNER)
        return Policy(
            RLModule.from_checkpoint(str(modules / DEFAULT_MODULE_ID)),
            EnvToModulePipeline.from_checkpoint(str(runner / COMPONENT_ENV_TO_MODULE_CONNECTOR)),
            ModuleToEnvPipeline.from_checkpoint(str(runner / COMPONENT_MODULE_TO_ENV_CONNECTOR)),
        )


def load_settings(path: str | Path, filesystem: pyarrow.fs.FileSystem | None = None) -> dict[str, Any]:
    """The settings that a checkpoint was trained with, by field of BLPOConfig; arguments as in :func:`load_policy`."""
    filesystem, found = checkpoints.find(*checkpoints.resolve(path, filesystem))
    with filesystem.open_input_stream(f"{found}/{RLModule.CLASS_AND_CTOR_ARGS_FILE_NAME}") as stream:
        (config, *_), _ = pickle.loads(stream.read())["ctor_args_and_kwargs"]
    return config.to_dict() if isinstance(config, AlgorithmConfig) else config


def evaluate(policy: Policy, env: gym.Env, episodes: int, seed: int = 0) -> np.ndarray:
    """Returns of whole episodes of the deterministic policy.

    Args:
        policy: Plays.
        env: A gymnasium environment.
        episodes: How many, with seeds ``seed``, ``seed`` + 1, ...
        seed: Of the first one.
    """
    return np.array([_episode_return(policy, env, seed + i) for i in range(episodes)])


def _episode_return(policy: Policy, env: gym.Env, seed: int) -> float:
    policy.reset()
    observation, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        total, done = total + float(reward), terminated or truncated
    return total
