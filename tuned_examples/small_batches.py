"""A MuJoCo example with a tenth of its batch, for runs of a million steps, which are 49 of the published batches.

python tuned_examples/small_batches.py hopper
python tuned_examples/small_batches.py halfcheetah --seed 3 --output results/halfcheetah_small --resume
"""

import argparse
import importlib
import math
import sys

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example

TASKS = ("halfcheetah", "hopper", "humanoid", "inverted_double_pendulum", "pusher", "reacher", "walker2d")


def small_batches(config: BLPOConfig) -> BLPOConfig:
    """16 environments × 128 steps, 10 epochs of 4 minibatches of 4 segments; the rest is the example's."""
    return config.env_runners(num_envs_per_env_runner=16).training(
        train_batch_size_per_learner=2048, minibatch_size=512, num_epochs=10
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("task", choices=TASKS)
    args, sys.argv[1:] = parser.parse_known_args()
    example = importlib.import_module(f"{args.task}_blpo").config()
    run_example(small_batches(example), stop_reward=math.inf, stop_timesteps=1_000_000)
