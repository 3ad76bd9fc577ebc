"""A task that needs memory: CartPole without velocities, BLPO and RLlib's PPO with the same LSTM.

    python -m studies.recurrence.stateless_cartpole --seeds 0 1 2            # both algorithms, one after the other
    python -m studies.recurrence.stateless_cartpole --algorithms blpo --seeds 0

The environment is RLlib's example ``StatelessCartPole`` with episodes of at most 500 steps. Actor and critic have an
encoder of one layer and an LSTM each. PPO has RLlib's own learner with its defaults and, like BLPO, this project's
sampling, which makes the same episodes as RLlib's in less time. A run ends when the mean return of the last 50
episodes reaches ``--stop-reward``, or at ``--stop-timesteps``. Every run is kept in results/, and docs/results.md shows
them as a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.examples.envs.classes.stateless_cartpole import StatelessCartPole
from ray.tune.registry import register_env

from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.learning_curve import Row, row
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.sampling.env_runner import BatchedEnvRunner

OUTPUT = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
ENV = "stateless_cartpole"
NETWORK = {
    "use_lstm": True,
    "max_seq_len": 10,
    "lstm_cell_size": 32,
    "fcnet_hiddens": [32],
    "fcnet_activation": "tanh",
    "vf_share_layers": False,
}
BATCHES = {"train_batch_size_per_learner": 1024, "minibatch_size": 256, "num_epochs": 6}
SUCCESS = 350.0
# Returns are means over so many of the latest episodes.
EPISODES = 50


def falling(rate: float) -> list[list[float]]:
    """A rate that falls to a tenth over a whole run."""
    return [[0, rate], [300_000, 0.1 * rate]]


def config(algorithm: str, seed: int) -> PPOConfig:
    """The settings of one run."""
    register_env(ENV, lambda _: gym.wrappers.TimeLimit(StatelessCartPole(), 500))
    if algorithm == "blpo":
        base: PPOConfig = BLPOConfig().training(
            actor_lr=falling(1e-3), critic_lr=falling(3e-3), target_kl=0.02, **BATCHES
        )
    else:
        base = PPOConfig().training(lr=falling(1e-3), vf_clip_param=np.inf, **BATCHES)
    return (
        base.environment(ENV)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8, env_runner_cls=BatchedEnvRunner)
        .rl_module(model_config=NETWORK)
        .debugging(seed=seed, log_level="ERROR")
    )


def run(algorithm: str, seed: int, stop_timesteps: int, stop_reward: float) -> dict[str, Any]:
    """One run; its curve, steps and mean return of the last episodes after each iteration, is printed as it grows."""
    algo = config(algorithm, seed).build_algo()
    rows: list[Row] = []
    points: list[tuple[int, float]] = []
    while not points or (points[-1][0] < stop_timesteps and not points[-1][1] >= stop_reward):
        rows.append(row(algo.train()))
        points.append((rows[-1]["env_steps"], round(recent_return(rows), 1)))
        if len(rows) % 5 == 0:
            print(f"{algorithm} seed {seed}: {points[-1][0]:>7,} steps, return {points[-1][1]:.0f}", flush=True)
    algo.stop()
    return {"algorithm": algorithm, "seed": seed, "curve": points, "provenance": provenance()}


def recent_return(rows: list[Row]) -> float:
    """Mean return of about the last :data:`EPISODES` episodes; NaN before one has ended."""
    returns: list[float] = []
    for each in reversed(rows):
        if each["episodes"] and np.isfinite(each["return"]):
            returns += [each["return"]] * each["episodes"]
        if len(returns) >= EPISODES:
            break
    return float(np.mean(returns)) if returns else float("nan")


def load() -> list[dict[str, Any]]:
    """The kept runs."""
    return [json.loads(path.read_text()) for path in sorted(OUTPUT.glob("*.json"))]


def table(runs: list[dict[str, Any]]) -> str:
    """When each run first reached :data:`SUCCESS`, its best mean return, and where it ended."""
    about = runs[0]["provenance"]
    dates = sorted({each["provenance"]["date"] for each in runs})
    lines = [
        f"Runs of {' to '.join(dates)} on {about['machine']}, one thread each; torch {about['torch']}, "
        f"ray {about['ray']}.",
        "",
        f"| algorithm | seed | steps to {SUCCESS:.0f} | best return | last return | at steps |",
        "|---|---|---|---|---|---|",
    ]
    for each in sorted(runs, key=lambda x: (x["algorithm"], x["seed"])):
        curve = each["curve"]
        reached = [steps for steps, mean in curve if mean >= SUCCESS]
        first = f"{reached[0]:,}" if reached else "not reached"
        best, (steps, last) = max(mean for _, mean in curve), curve[-1]
        lines.append(f"| {each['algorithm']} | {each['seed']} | {first} | {best:.0f} | {last:.0f} | {steps:,} |")
    return "\n".join(lines)


def write_page() -> None:
    """Puts the table between its markers."""
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{table(load())}\n{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=["blpo", "ppo"], default=["blpo", "ppo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stop-timesteps", type=int, default=300_000)
    parser.add_argument("--stop-reward", type=float, default=SUCCESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUTPUT.mkdir(exist_ok=True)
    for algorithm in args.algorithms:
        for seed in args.seeds:
            result = run(algorithm, seed, args.stop_timesteps, args.stop_reward)
            (OUTPUT / f"{algorithm}_seed{seed}.json").write_text(json.dumps(result) + "\n")
    ray.shutdown()
    print(table(load()))
    write_page()


if __name__ == "__main__":
    main()
