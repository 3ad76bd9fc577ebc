"""RLlib's nested results as flat metrics in a few groups, the same in every tracker: `bilevel/mixed_norm`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    EVALUATION_ITERATION_TIMER,
    EVALUATION_RESULTS,
    FAULT_TOLERANCE_STATS,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    TIMERS,
)
from ray.tune.result import TIME_THIS_ITER_S, TIME_TOTAL_S, TRAINING_ITERATION

EPISODE_RETURN = "returns/episode_return_mean"
EPISODES = "returns/episodes"
ENV_STEPS = "throughput/env_steps"
ENV_STEPS_PER_SECOND = "throughput/env_steps_per_second"
UPDATE_SECONDS = "throughput/update_seconds"
SECONDS = "throughput/seconds"
EVALUATION_RETURN = "returns/evaluation_return_mean"
EVALUATION_SECONDS = "throughput/evaluation_seconds"
CPU_SECONDS = "throughput/cpu_seconds"

# Where studies/comparison/compare.py puts what RLlib does not measure.
CPU_SECONDS_TOTAL = "cpu_seconds_total"

# Where each metric of a whole run stands in RLlib's results.
RUN_METRICS = {
    EPISODE_RETURN: f"{ENV_RUNNER_RESULTS}/{EPISODE_RETURN_MEAN}",
    "returns/episode_return_min": f"{ENV_RUNNER_RESULTS}/{EPISODE_RETURN_MIN}",
    "returns/episode_return_max": f"{ENV_RUNNER_RESULTS}/{EPISODE_RETURN_MAX}",
    "returns/episode_len_mean": f"{ENV_RUNNER_RESULTS}/{EPISODE_LEN_MEAN}",
    EPISODES: f"{ENV_RUNNER_RESULTS}/{NUM_EPISODES}",
    EVALUATION_RETURN: f"{EVALUATION_RESULTS}/{ENV_RUNNER_RESULTS}/{EPISODE_RETURN_MEAN}",
    ENV_STEPS: f"{ENV_RUNNER_RESULTS}/{NUM_ENV_STEPS_SAMPLED_LIFETIME}",
    SECONDS: TIME_TOTAL_S,
    "throughput/iteration_seconds": TIME_THIS_ITER_S,
    "throughput/sampling_seconds": f"{TIMERS}/{ENV_RUNNER_SAMPLING_TIMER}",
    EVALUATION_SECONDS: f"{TIMERS}/{EVALUATION_ITERATION_TIMER}",
    CPU_SECONDS: CPU_SECONDS_TOTAL,
    UPDATE_SECONDS: f"{TIMERS}/{LEARNER_UPDATE_TIMER}",
    # Population based training changes it on the way.
    "bilevel/bound": "config/hypergradient_bound",
    "faults/healthy_env_runners": f"{FAULT_TOLERANCE_STATS}/num_healthy_workers",
    "faults/env_runner_restarts": f"{FAULT_TOLERANCE_STATS}/num_remote_worker_restarts",
}

_PATHS = {name: tuple(path.split("/")) for name, path in RUN_METRICS.items()}

# The learner's metrics, per module, by group.
LEARNER_METRICS = {
    "bilevel": (
        "vf_loss_before_nesting",
        "vf_loss_after_nesting",
        "actor_grad_norm",
        "mixed_norm_unbounded",
        "mixed_norm",
        "hypergradient_norm",
        "mixed_grad_cosine",
        "bound_active_fraction",
        "ihvp_relative_residual",
        "damping",
    ),
    "policy": (
        "policy_loss",
        "vf_loss",
        "total_loss",
        "vf_explained_var",
        "entropy",
        "approx_kl",
        "clip_fraction",
        "mean_kl_loss",
        "epochs",
        "actor_rate_factor",
    ),
    "faults": ("hypergradient_fallbacks", "skipped_actor_updates", "skipped_critic_updates"),
}
_GROUP = {name: group for group, names in LEARNER_METRICS.items() for name in names}


def metric_name(name: str, module_id: str = DEFAULT_MODULE_ID) -> str:
    """What a learner's metric is called here: ``bilevel/NAME``, or ``bilevel/MODULE/NAME`` in a multi-agent run."""
    middle = "" if module_id == DEFAULT_MODULE_ID else f"{module_id}/"
    return f"{_GROUP[name]}/{middle}{name}"


def grouped(result: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of one of RLlib's results, by group."""
    metrics = {name: _at(result, path) for name, path in _PATHS.items()}
    for module_id, learner in result.get(LEARNER_RESULTS, {}).items():
        if module_id != ALL_MODULES:
            metrics |= {metric_name(name, module_id): learner[name] for name in _GROUP if name in learner}
    steps, seconds = _at(result, (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED)), result.get(TIME_THIS_ITER_S)
    if steps is not None and seconds:
        metrics[ENV_STEPS_PER_SECOND] = steps / seconds
    return {name: float(value) for name, value in metrics.items() if _is_finite(value)}


def iteration(result: Mapping[str, Any]) -> int:
    """The number of the iteration that a result reports."""
    return int(result[TRAINING_ITERATION])


def _at(result: Any, path: Iterable[str]) -> Any:
    # Not Ray's flatten_dict, which goes through all of a result, its configuration too: 0.2 ms with every row.
    for key in path:
        if not isinstance(result, Mapping) or key not in result:
            return None
        result = result[key]
    return result


def _is_finite(value: Any) -> bool:
    # RLlib hands out zero-dimensional arrays as well as numbers.
    return isinstance(value, (int, float, np.number, np.ndarray)) and np.ndim(value) == 0 and math.isfinite(value)
