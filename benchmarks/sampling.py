"""Times sampling alone: RLlib's EnvRunner and BLPO's, with gymnasium and with EnvPool, for vectors of several sizes.

    python -m benchmarks.sampling --env Hopper-v5 --num-envs 1 4 16 32 128 --num-env-runners 0 1 2

Each contestant samples with random weights of the reference's networks and, for continuous actions, with normalised
observations. Rounds of the contestants alternate; the table shows environment steps per second, medians over rounds of
one run, with remote EnvRunners' transport of episodes to the driver included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import ray
import torch
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample

from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.sampling.env_runner import BatchedEnvRunner

CONTESTANTS: dict[str, tuple[type, str]] = {
    "rllib": (SingleAgentEnvRunner, "{}"),
    "batched": (BatchedEnvRunner, "{}"),
    "batched_envpool": (BatchedEnvRunner, "EnvPool/{}"),
}


def sampler(name: str, env: str, num_envs: int, num_env_runners: int, steps: int) -> tuple[Any, Callable[[], Any]]:
    """A group of EnvRunners and a function that takes about ``steps`` steps on it, ``num_envs`` over all runners."""
    env_runner_cls, env_name = CONTESTANTS[name]
    each = max(1, num_envs // max(1, num_env_runners))
    continuous = isinstance(gym.make(env).action_space, gym.spaces.Box)
    config = (
        BLPOConfig()
        .environment(env_name.format(env))
        .env_runners(
            env_runner_cls=env_runner_cls,
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=each,
            env_to_module_connector=(lambda env, spaces, device: MeanStdFilter()) if continuous else None,
        )
        .training(train_batch_size_per_learner=steps, minibatch_size=steps)
        .debugging(seed=0, log_level="ERROR")
    )
    group = EnvRunnerGroup(config=config, local_env_runner=True)
    return group, lambda: synchronous_parallel_sample(
        worker_set=group, max_env_steps=steps, _uses_new_env_runners=True, _return_metrics=True
    )


def measure(env: str, num_envs: int, num_env_runners: int, steps: int, rounds: int) -> dict[str, float]:
    """Environment steps per second by contestant."""
    made = {name: sampler(name, env, num_envs, num_env_runners, steps) for name in CONTESTANTS}
    rates: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(rounds + 1):
        for name, (_, sample) in made.items():
            start = time.perf_counter()
            episodes, _ = sample()
            if round_:
                rates[name].append(sum(map(len, episodes)) / (time.perf_counter() - start))
    for group, _ in made.values():
        group.stop()
    return {name: round(statistics.median(values)) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="a name that gymnasium and EnvPool share")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 4, 16, 32, 128], help="over all EnvRunners")
    parser.add_argument("--num-env-runners", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2048, help="environment steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/sampling_<env>.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # One CPU for the driver, whose share of the work is small while remote EnvRunners sample.
    ray.init(num_cpus=max(args.num_env_runners) * len(CONTESTANTS) + 1, include_dashboard=False, log_to_driver=False)
    table = []
    for num_env_runners in args.num_env_runners:
        for num_envs in args.num_envs:
            if num_envs < num_env_runners:
                continue
            rates = measure(args.env, num_envs, num_env_runners, args.steps, args.rounds)
            table.append({"num_env_runners": num_env_runners, "num_envs": num_envs, "env_steps_per_s": rates})
            print(json.dumps(table[-1]), flush=True)
    output = args.output or Path(__file__).parent / "results" / f"sampling_{args.env}.json"
    report = {**provenance(), "envpool": version("envpool"), "env": args.env, "steps": args.steps, "table": table}
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
