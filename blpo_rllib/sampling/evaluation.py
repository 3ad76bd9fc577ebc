"""Evaluations by the training's filter statistics, and of one episode of each environment."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tree
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from blpo_rllib import rllib_private


class OneEpisodeEach:
    """One whole episode of each evaluation environment, from the same starts in each evaluation.

    RLlib's ``evaluation_duration`` takes the episodes that end first, among which short ones are too many. For RLlib's
    ``custom_evaluation_function``, of BLPO or PPO; BLPO's ``evaluation_one_episode_per_env=True`` sets it. It needs
    :class:`~blpo_rllib.sampling.env_runner.BatchedEnvRunner`.

    Args:
        seed: Of the environments; the i-th of all takes ``seed + i``.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, algorithm: Algorithm, group: Any) -> tuple[dict[str, Any], int, int]:
        if group is None:
            raise ValueError(
                "evaluation_one_episode_per_env=True needs EnvRunners for evaluation, of which "
                f"evaluation_interval={algorithm.config.evaluation_interval} makes none: set 1 or more"
            )
        use_training_statistics(algorithm)
        sample = functools.partial(_sample_one_each, seed=self.seed)
        results = group.foreach_env_runner(sample, local_env_runner=group.num_remote_env_runners() == 0)
        algorithm.metrics.aggregate([metrics for metrics, _ in results], key=(EVALUATION_RESULTS, ENV_RUNNER_RESULTS))
        num_steps = sum(steps for _, steps in results)
        return {}, num_steps, num_steps


def _sample_one_each(runner: Any, seed: int) -> tuple[Any, int]:
    """The metrics of an EnvRunner's episodes, and their steps."""
    first = max(0, (runner.worker_index or 0) - 1) * runner.num_envs
    episodes = runner.sample_one_each(seed + first, explore=runner.config.explore)
    rllib_private.count_episodes(runner, episodes)
    return runner.get_metrics(), sum(map(len, episodes))


def merge_training_statistics(algorithm: Algorithm) -> None:
    """Brings together what the training's EnvRunners saw in this iteration, as RLlib does at its end."""
    algorithm.env_runner_group.sync_env_runner_states(
        config=algorithm.config,
        env_steps_sampled=algorithm.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0),
        env_to_module=algorithm.env_to_module_connector,
        module_to_env=algorithm.module_to_env_connector,
    )


def use_training_statistics(algorithm: Algorithm) -> None:
    """Makes the evaluation's EnvRunners normalise observations by the training's statistics, and leave them at that.

    RLlib brings statistics to remote evaluation EnvRunners only (ray/rllib/env/env_runner_group.py,
    sync_env_runner_states), which then go on with what they see. Before training there are none, and the evaluation
    goes by its own.
    """
    pipeline = algorithm.env_to_module_connector
    if algorithm.env_runner is not None:
        pipeline = rllib_private.env_to_module_pipeline(algorithm.env_runner)
    states = [connector.get_state() for connector in _filters(pipeline)]
    if states:
        algorithm.eval_env_runner_group.foreach_env_runner(functools.partial(_take_statistics, states=states))


def _take_statistics(runner: Any, states: list[dict[str, Any]]) -> None:
    for connector, state in zip(_filters(rllib_private.env_to_module_pipeline(runner)), states, strict=False):
        connector.set_state(state)
        rllib_private.set_updating(connector, not _has_seen_any(connector))


@contextmanager
def kept_statistics(runner: Any) -> Iterator[None]:
    """Within this context an EnvRunner's statistics stay as they are, once there are any."""
    filters = [
        connector
        for connector in _filters(rllib_private.env_to_module_pipeline(runner))
        if rllib_private.is_updating(connector) and _has_seen_any(connector)
    ]
    for connector in filters:
        rllib_private.set_updating(connector, False)
    try:
        yield
    finally:
        for connector in filters:
            rllib_private.set_updating(connector, True)


def _filters(pipeline: Any) -> list[MeanStdFilter]:
    return [x for x in getattr(pipeline, "connectors", []) if isinstance(x, MeanStdFilter)]


def _has_seen_any(connector: MeanStdFilter) -> bool:
    found = rllib_private.all_filters(connector)
    return any(stat.num_pushes for each in found for stat in tree.flatten(each.running_stats))
