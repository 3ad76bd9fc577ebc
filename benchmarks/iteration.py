"""Times whole training iterations, sampling and learning, of RLlib's PPO and of BLPO with gymnasium and with EnvPool.

    python -m benchmarks.iteration --tasks hopper cartpole --iterations 5 --steps 500000

All in one process, with the same networks, batches, epochs and minibatches, and a local EnvRunner each: RLlib's own for
PPO. They alternate by blocks of iterations; ratios are medians over the blocks of one run. ``--steps`` is how many
environment steps each takes on CartPole, ``--iterations`` how many iterations on Hopper. The same script times another
checkout, whose folder PYTHONPATH names:

    PYTHONPATH=OTHER python benchmarks/iteration.py --tasks hopper_small --contestants blpo_envpool --output OTHER.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.learning.learner import BLPOTorchLearner
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG

BASELINE = "rllib_ppo"


@dataclass(frozen=True)
class Task:
    """An environment and the settings all contestants share; a block is a number of iterations.

    Where the simulator is slow, environments in several processes (RLlib's mode "async") are compared too.
    """

    env: str
    num_envs: int
    length: int
    actor_lr: float
    critic_lr: float
    num_critic_updates: int
    continuous: bool
    block: int
    slow_simulator: bool
    num_epochs: int = 4

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.length


TASKS = {
    "hopper": Task("Hopper-v5", 32, 640, 3e-4, 1.2e-3, 3, True, 1, True),
    # Minibatches of 512 steps, ten epochs.
    "hopper_small": Task("Hopper-v5", 4, 512, 3e-4, 1.2e-3, 3, True, 5, False, num_epochs=10),
    "cartpole": Task("CartPole-v1", 4, 128, 2.5e-4, 1e-3, 5, False, 20, False),
}


def configure(config: Any, task: Task, env: str, seed: int, vectorize_mode: str = "sync", **training: Any) -> Any:
    """The settings that all contestants share."""
    return (
        config.environment(env)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=task.num_envs,
            gym_env_vectorize_mode=vectorize_mode,
            env_to_module_connector=(lambda env, spaces, device: MeanStdFilter()) if task.continuous else None,
        )
        .rl_module(model_config=REFERENCE_MODEL_CONFIG | {"free_log_std": task.continuous})
        .training(
            train_batch_size_per_learner=task.batch_size,
            minibatch_size=task.length,
            num_epochs=task.num_epochs,
            **training,
        )
        .debugging(seed=seed, log_level="ERROR")
    )


def contestants(task: Task, seed: int, only: Sequence[str]) -> dict[str, Any]:
    """The algorithms to compare, by name; ``only`` some of them if it is not empty."""
    ppo = {"lr": task.actor_lr, "use_kl_loss": False, "gamma": 0.99, "lambda_": 0.95, "clip_param": 0.2}
    blpo = {
        "actor_lr": task.actor_lr,
        "critic_lr": task.critic_lr,
        "num_critic_updates": task.num_critic_updates,
        "normalize_rewards": task.continuous,
    }
    configs = {
        BASELINE: configure(PPOConfig(), task, task.env, seed, **ppo),
        "blpo_gymnasium": configure(BLPOConfig(), task, task.env, seed, **blpo),
        "blpo_envpool": configure(BLPOConfig(), task, f"EnvPool/{task.env}", seed, **blpo),
    }
    if task.slow_simulator:
        configs["rllib_ppo_async"] = configure(PPOConfig(), task, task.env, seed, "async", **ppo)
        configs["blpo_gymnasium_async"] = configure(BLPOConfig(), task, task.env, seed, "async", **blpo)
    return {name: config.build_algo() for name, config in configs.items() if name in (only or configs)}


class Stopwatch:
    """Seconds spent in sampling, thereof in the environments, in the learner's connectors and in its update."""

    def __init__(self, algo: Any):
        self.seconds: dict[str, float] = defaultdict(float)
        learner = algo.learner_group._learner
        algo.env_runner.sample = self._timed("sampling", algo.env_runner.sample)
        algo.env_runner.env.step = self._timed("environments", algo.env_runner.env.step)
        # BLPO's learner and RLlib's name differently what turns episodes into a train batch.
        name = "_create_iterator_if_necessary" if isinstance(learner, BLPOTorchLearner) else "_make_batch_if_necessary"
        setattr(learner, name, self._timed("connectors", getattr(learner, name)))
        learner.update = self._timed("learner", learner.update)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call

    def shares(self, total: float) -> dict[str, float]:
        """Of ``total`` seconds; sampling without its environments, and RLlib's own around sampling and learning."""
        phases = {
            "environments": self.seconds["environments"],
            "sampling": self.seconds["sampling"] - self.seconds["environments"],
            "connectors": self.seconds["connectors"],
            "update": self.seconds["learner"] - self.seconds["connectors"],
            "rest": total - self.seconds["sampling"] - self.seconds["learner"],
        }
        return {name: round(seconds / total, 3) for name, seconds in phases.items()}


def measure(task: Task, iterations: int, seed: int, only: Sequence[str]) -> dict[str, Any]:
    """Alternating blocks of iterations, after one untimed block of each contestant."""
    algorithms = contestants(task, seed, only)
    for algo in algorithms.values():
        for _ in range(task.block):
            algo.train()
    stopwatches = {name: Stopwatch(algo) for name, algo in algorithms.items()}
    blocks: dict[str, list[float]] = {name: [] for name in algorithms}
    for _ in range(max(1, round(iterations / task.block))):
        for name, algo in algorithms.items():
            start = time.perf_counter()
            for _ in range(task.block):
                algo.train()
            blocks[name].append(time.perf_counter() - start)
    for algo in algorithms.values():
        algo.stop()
    return {name: summary(task, blocks, name, stopwatches[name]) for name in blocks}


def summary(task: Task, blocks: dict[str, list[float]], name: str, stopwatch: Stopwatch) -> dict[str, Any]:
    """Rates, speedups over the baseline (median and range over blocks), total time, and the phases' shares of it.

    The baseline is RLlib's PPO, or the first contestant where that is left out.
    """
    own, total = blocks[name], sum(blocks[name])
    others = blocks.get(BASELINE) or next(iter(blocks.values()))
    speedups = [baseline / mine for baseline, mine in zip(others, own, strict=True)]
    return {
        "env_steps_per_s": round(task.block * task.batch_size / statistics.median(own)),
        "speedup": round(statistics.median(speedups), 2),
        "speedup_range": [round(min(speedups), 2), round(max(speedups), 2)],
        "env_steps": len(own) * task.block * task.batch_size,
        "seconds": round(total, 2),
        "time_relative_to_baseline": round(total / sum(others), 3),
        "shares": stopwatch.shares(total),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations on Hopper")
    parser.add_argument("--contestants", nargs="+", default=[], help="only these; default: all")
    parser.add_argument("--steps", type=int, default=500_000, help="timed environment steps on CartPole")
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "iteration.json", help="JSON"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ray.init(include_dashboard=False, log_to_driver=False)
    results = {}
    for name in args.tasks:
        task = TASKS[name]
        iterations = round(args.steps / task.batch_size) if name == "cartpole" else args.iterations
        results[name] = {"settings": asdict(task), "results": measure(task, iterations, args.seed, args.contestants)}
        print(json.dumps(results[name]["results"], indent=2), flush=True)
    report = {**provenance(), "envpool": version("envpool"), "seed": args.seed, "tasks": results}
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
