"""RLlib's own example options (``--num-env-runners``, ``--as-test``, ...), without the Tuner that RLlib makes of them.

RLlib's parser reads the options. RLlib then has one function, ``run_rllib_example_script_experiment``, that sets them
on a config, makes a Tuner, which has neither storage nor restarts, and tests the results
(ray/rllib/examples/utils.py). The functions here do the first and the last as RLlib does;
``tests/test_command_line.py`` compares the two.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.rllib.utils.serialization import convert_numpy_to_python_primitives
from ray.tune.result import TRAINING_ITERATION
from ray.tune.utils import flatten_dict

EPISODE_RETURN = f"{ENV_RUNNER_RESULTS}/{EPISODE_RETURN_MEAN}"
ENV_STEPS = f"{ENV_RUNNER_RESULTS}/{NUM_ENV_STEPS_SAMPLED_LIFETIME}"


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what has no meaning for BLPO, and sets what ``--as-test`` and ``--as-release-test`` imply."""
    for option, remedy in {
        "local_mode": "RLlib no longer supports it",
        "enable_new_api_stack": "it is the default, and the only stack that BLPO runs on",
        "old_api_stack": "BLPO runs on RLlib's new API stack only",
        "num_gpus": "on the new API stack it is --num-gpus-per-learner and --num-learners",
        "num_agents": "the task has as many agents as its environment; set up others with BLPOConfig.multi_agent()",
    }.items():
        if getattr(args, option):
            parser.error(f"--{option.replace('_', '-')} has no meaning here: {remedy}")
    if args.algo != "BLPO":
        parser.error(f"--algo {args.algo} has no meaning here: the settings are BLPO's")
    args.as_test = args.as_test or args.as_release_test
    if args.as_test and args.no_tune:
        parser.error("--as-test and --as-release-test need Tune: leave out --no-tune")
    if args.as_test:
        args.verbose, args.tune_max_report_freq = 1, 30


def configured(config: AlgorithmConfig, args: argparse.Namespace) -> AlgorithmConfig:
    """Sets on the config what the options say. Ray must run, because the default number of GPUs is what Ray has."""
    config.framework(args.framework)
    if args.env is not None and config.env is None:
        config.environment(args.env)
    config.env_runners(**_given(args, "num_env_runners", "num_envs_per_env_runner"))
    config.learners(
        **_given(args, "num_learners", "num_cpus_per_learner", "num_aggregator_actors_per_learner"),
        num_gpus_per_learner=_gpus_per_learner(config, args),
    )
    if args.evaluation_interval > 0:
        names = ("num_env_runners", "interval", "duration", "duration_unit", "parallel_to_training")
        config.evaluation(**_given(args, *(f"evaluation_{name}" for name in names)))
    return config.debugging(**_given(args, "log_level"))


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that were given or have a default."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _gpus_per_learner(config: AlgorithmConfig, args: argparse.Namespace) -> float:
    """The GPUs that were asked for; without the option one for each learner if Ray has enough of them, else none.

    Raises:
        ValueError: If Ray has fewer GPUs than were asked for.
    """
    # With num_learners=0 there is a local one.
    num_learners = (config.num_learners if args.num_learners is None else args.num_learners) or 1
    available = ray.cluster_resources().get("GPU", 0)
    if args.num_gpus_per_learner is None:
        return 1 if available >= num_learners else 0
    if available < args.num_gpus_per_learner * num_learners:
        raise ValueError(
            f"--num-learners={args.num_learners} with --num-gpus-per-learner={args.num_gpus_per_learner} needs "
            f"{args.num_gpus_per_learner * num_learners:g} GPUs, but Ray has {available:g}: ask for fewer"
        )
    return args.num_gpus_per_learner


def stop_criteria(args: argparse.Namespace) -> dict[str, float]:
    """The values at which a trial ends, by name of the result."""
    return {
        EPISODE_RETURN: args.stop_reward,
        ENV_STEPS: args.stop_timesteps,
        TRAINING_ITERATION: args.stop_iters,
    }


def check_reward_reached(results: tune.ResultGrid, args: argparse.Namespace, seconds: float) -> None:
    """What ``--as-test`` and ``--as-release-test`` ask for: did one trial end with the return of ``--stop-reward``?

    Args:
        results: Tune's.
        args: The options.
        seconds: How long the experiment took.

    Raises:
        ValueError: If none did, with ``--as-test``; ``--as-release-test`` says so in its file instead, as RLlib does.
    """
    best = max(flatten_dict(result.metrics or {}).get(EPISODE_RETURN, float("-inf")) for result in results)
    passed = best >= args.stop_reward
    verdict = f"`{EPISODE_RETURN}` of {args.stop_reward} {'reached! ok' if passed else 'not reached!'}"
    if args.as_release_test:
        _write_release_test(results[0], seconds, best, args.stop_reward)
    elif not passed:
        raise ValueError(f"{verdict} Best value reached is {best}")
    print(verdict)


def _write_release_test(result: tune.Result, seconds: float, best: float, wanted: float) -> None:
    """The summary that Ray's release tests read, with RLlib's keys, at ``TEST_OUTPUT_JSON``."""
    passed, stats = best >= wanted, {name: value for name, value in (result.metrics or {}).items() if name != "config"}
    summary = {
        "time_taken": seconds,
        "trial_states": ["TERMINATED"],
        "last_update": time.time(),
        "stats": convert_numpy_to_python_primitives(stats),
        "passed": [passed],
        "not_passed": [not passed],
        "failures": {} if passed else {Path(result.path).name: 1},
        "success_metric": EPISODE_RETURN,
        "best_value": best,
        "target_value": wanted,
    }
    path = Path(os.environ.get("TEST_OUTPUT_JSON", "/tmp/release_test_output.json"))
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(summary))
    os.replace(draft, path)
