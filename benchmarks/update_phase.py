"""Times the update phase of BLPO, nested PPO and RLlib's own PPO learner on one random batch, in one process.

    python -m benchmarks.update_phase --shapes hopper cartpole --rank 5 --device cpu --threads 2
    python -m benchmarks.update_phase --shapes hopper large cnn --device cuda

Each learner gets the same episodes, turned into its train batch by its own connectors beforehand; what is timed is
``Learner.update(batch=...)``: all epochs and minibatches, metrics included. Rounds of the learners alternate, and the
ratios printed are medians over rounds of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.policy.sample_batch import MultiAgentBatch

from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.learning.learner import BLPOTorchLearner
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG
from blpo_rllib.tasks import as_ppo


@dataclass(frozen=True)
class Shape:
    """A batch of ``num_envs`` rollouts of ``length`` steps, in minibatches of one rollout each, or of some segments.

    Where ``segment_length`` is given, BLPO's minibatches are ``minibatch_size`` steps in segments of that length, and
    PPO's as many shuffled steps.
    """

    num_envs: int
    length: int
    num_epochs: int
    observation_shape: tuple[int, ...]
    action_space: gym.Space
    num_critic_updates: int
    model: dict[str, Any] = field(default_factory=dict)
    segment_length: int | None = None
    segments_per_minibatch: int = 1
    frozen_encoders: bool = False

    @property
    def minibatch_size(self) -> int:
        return (self.segment_length or self.length) * self.segments_per_minibatch

    @property
    def num_minibatches(self) -> int:
        return self.num_envs * self.length // self.minibatch_size * self.num_epochs


_BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
_WIDE = {"fcnet_hiddens": [256, 256, 256]}
# Mnih et al. 2015.
_NATURE = {
    "conv_filters": [[32, 8, 4], [64, 4, 2], [64, 3, 1]],
    "conv_activation": "relu",
    "head_fcnet_hiddens": [512],
    "head_fcnet_activation": "relu",
}
SHAPES = {
    "hopper": Shape(32, 640, 4, (11,), _BOX, 3),
    "cartpole": Shape(4, 128, 4, (4,), gym.spaces.Discrete(2), 5),
    # HalfCheetah with the small minibatches that learn fastest.
    "small": Shape(
        8, 256, 4, (17,), gym.spaces.Box(-1, 1, (6,), np.float32), 3, segment_length=16, segments_per_minibatch=4
    ),
    "wide": Shape(64, 4096, 1, (11,), _BOX, 3, _WIDE),
    "large": Shape(4096, 64, 1, (11,), _BOX, 3, _WIDE, segment_length=64, segments_per_minibatch=512),
    "cnn": Shape(4, 128, 1, (84, 84, 4), gym.spaces.Discrete(6), 2, _NATURE),
    "frozen_cnn": Shape(4, 128, 1, (84, 84, 4), gym.spaces.Discrete(6), 2, _NATURE, frozen_encoders=True),
}


def configure(config, shape: Shape, device: str, **training):
    """The settings that all learners share."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, shape.observation_shape, np.float32)
    model = REFERENCE_MODEL_CONFIG | shape.model | {"free_log_std": isinstance(shape.action_space, gym.spaces.Box)}
    return (
        config.environment(observation_space=observation_space, action_space=shape.action_space)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=shape.num_envs)
        .learners(num_learners=0, num_gpus_per_learner=int(device == "cuda"))
        .rl_module(model_config=model)
        .training(
            train_batch_size_per_learner=shape.num_envs * shape.length,
            minibatch_size=shape.minibatch_size,
            num_epochs=shape.num_epochs,
            **training,
        )
    )


def learners(shape: Shape, rank: int, device: str, own_ppo: bool = False) -> dict:
    """The learners to compare, by name; on a GPU BLPO also without its graphs, and PPO by BLPO's update on demand."""
    nested = {"num_critic_updates": shape.num_critic_updates, "segment_length": shape.segment_length}
    ppo = {"use_kl_loss": False, "lr": 3e-4, "gamma": 0.99, "lambda_": 0.95, "clip_param": 0.2}
    configs = {
        "rllib_ppo": configure(PPOConfig(), shape, device, **ppo),
        "nested_ppo": configure(BLPOConfig(), shape, device, hypergradient="none", **nested),
        "blpo": configure(BLPOConfig(), shape, device, nystrom_rank=rank, **nested),
    }
    if own_ppo:
        configs["own_ppo"] = as_ppo(configure(BLPOConfig(), shape, device))
    if device == "cuda":
        configs["blpo_eager"] = configs["blpo"].copy(copy_frozen=False).training(cuda_graphs=False)
    made = {name: config.build_learner() for name, config in configs.items()}
    if shape.frozen_encoders:
        for learner in made.values():
            learner.module[DEFAULT_MODULE_ID].unwrapped().encoder.requires_grad_(False)
    return made


def random_episodes(shape: Shape, seed: int) -> list[SingleAgentEpisode]:
    """One rollout fragment per environment, cut where it is."""
    rng = np.random.default_rng(seed)
    discrete = isinstance(shape.action_space, gym.spaces.Discrete)
    episodes = []
    for _ in range(shape.num_envs):
        size = (shape.length,) if discrete else (shape.length, *shape.action_space.shape)
        outputs = shape.action_space.n if discrete else 2 * shape.action_space.shape[0]
        episodes.append(
            SingleAgentEpisode(
                observations=list(rng.normal(size=(shape.length + 1, *shape.observation_shape)).astype(np.float32)),
                actions=list(rng.integers(shape.action_space.n, size=size) if discrete else rng.normal(size=size)),
                rewards=list(rng.normal(size=shape.length)),
                extra_model_outputs={
                    Columns.ACTION_LOGP: list(np.full(shape.length, -0.7 if discrete else -3.0, np.float32)),
                    Columns.ACTION_DIST_INPUTS: list(np.zeros((shape.length, outputs), np.float32)),
                },
                len_lookback_buffer=0,
            ).to_numpy()
        )
    return episodes


def train_batch(learner, episodes: list[SingleAgentEpisode], shape: Shape) -> MultiAgentBatch:
    """What a learner's connectors make of episodes."""
    if isinstance(learner, BLPOTorchLearner):
        return learner.build_train_batch(episodes, shape.minibatch_size, shape.num_epochs)
    # RLlib's learners have no public function for it.
    return learner._make_batch_if_necessary(TrainingData(episodes=episodes))


def time_round(learner, batch, shape: Shape) -> float:
    """Milliseconds per minibatch of one update phase."""
    synchronize = torch.cuda.synchronize if learner.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    learner.update(
        batch=batch,
        minibatch_size=shape.minibatch_size,
        num_epochs=shape.num_epochs,
        shuffle_batch_per_epoch=True,
        timesteps={},
    )
    synchronize()
    return 1e3 * (time.perf_counter() - start) / shape.num_minibatches


def peer(python: str, shape: Shape, rank: int, threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds per minibatch of the peer in JAX, by another interpreter: see ``jax_peer.py``."""
    discrete = isinstance(shape.action_space, gym.spaces.Discrete)
    about = {
        "num_minibatches": shape.num_minibatches,
        "num_segments": shape.segments_per_minibatch,
        "length": shape.segment_length or shape.length,
        "observation_size": int(np.prod(shape.observation_shape)),
        "hiddens": shape.model.get("fcnet_hiddens", [64, 64]),
        "discrete": discrete,
        "outputs": int(shape.action_space.n if discrete else shape.action_space.shape[0]),
        "num_critic_updates": shape.num_critic_updates,
        "rank": rank,
        "threads": threads,
        "rounds": rounds,
    }
    script = Path(__file__).parent / "jax_peer.py"
    run = subprocess.run([python, str(script), json.dumps(about)], check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(shape: Shape, rank: int, device: str, rounds: int, warmup: int, own_ppo: bool = False) -> dict:
    """Milliseconds per minibatch by learner, and their ratios to RLlib's PPO learner."""
    by_name = learners(shape, rank, device, own_ppo)
    batches, first_update, milliseconds = {}, {}, {name: [] for name in by_name}
    for name, learner in by_name.items():
        batches[name] = train_batch(learner, random_episodes(shape, seed=0), shape)
        first_update[name] = time_round(learner, batches[name], shape) * shape.num_minibatches / 1e3
    for round_ in range(warmup + rounds):
        for name, learner in by_name.items():
            elapsed = time_round(learner, batches[name], shape)
            if round_ >= warmup:
                milliseconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in milliseconds.items()}
    ratios = {
        name: statistics.median(x / y for x, y in zip(values, milliseconds["rllib_ppo"], strict=True))
        for name, values in milliseconds.items()
    }
    return {
        "ms_per_minibatch": {name: round(value, 3) for name, value in median.items()},
        "ratio_to_rllib_ppo": {name: round(value, 3) for name, value in ratios.items()},
        "ratio_range": {
            name: [
                round(f(x / y for x, y in zip(values, milliseconds["rllib_ppo"], strict=True)), 3) for f in (min, max)
            ]
            for name, values in milliseconds.items()
        },
        "first_update_s": {name: round(value, 2) for name, value in first_update.items()},
        "minibatches": shape.num_minibatches,
        "rounds": rounds,
    }


def matrix_product_ms(size: int = 512) -> float:
    """Milliseconds of a float32 product of two square matrices: how fast this machine is now."""
    a, b = torch.randn(2, size, size)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cartpole", "hopper", "small"])
    parser.add_argument("--rank", type=int, default=5, help="Nyström rank k")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads")
    parser.add_argument("--rounds", type=int, default=7, help="timed update phases per learner")
    parser.add_argument("--warmup", type=int, default=1, help="untimed update phases per learner after the first")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with jax: also time the peer in JAX")
    parser.add_argument("--output", type=Path, help="where to write the results too, as JSON")
    parser.add_argument("--own-ppo", action="store_true", help="also time PPO by BLPO's update (tasks.as_ppo)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = matrix_product_ms()
    results = {
        name: measure(SHAPES[name], args.rank, args.device, args.rounds, args.warmup, args.own_ppo)
        for name in args.shapes
    }
    for name in args.shapes if args.peer else ():
        milliseconds = peer(args.peer, SHAPES[name], args.rank, args.threads, args.rounds)
        results[name]["ms_per_minibatch"] |= {x: round(y, 3) for x, y in milliseconds.items()}
    report = json.dumps(
        {
            **provenance(),
            "rank": args.rank,
            "mm_512_ms": [round(before, 3), round(matrix_product_ms(), 3)],
            "shapes": {name: str(asdict(SHAPES[name])) for name in args.shapes},
            "results": results,
        },
        indent=2,
    )
    print(report)
    print(table(results))
    if args.output:
        args.output.write_text(report + "\n")


def table(results: dict) -> str:
    """Milliseconds per minibatch, a row per shape, and in brackets the ratio to RLlib's PPO learner."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["ms_per_minibatch"]))
    lines = ["| shape | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape, result in results.items():
        times, ratios = result["ms_per_minibatch"], result["ratio_to_rllib_ppo"]
        cells = [f"{times[x]:.2f}" + (f" ({ratios[x]:.2f})" if x in ratios else "") for x in names]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
