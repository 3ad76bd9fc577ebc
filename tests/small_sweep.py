"""A sweep of seconds, for the tests; as a script, one to be killed: python small_sweep.py OUTPUT MARKERS [--resume]"""

import json
import sys
from pathlib import Path

import numpy as np

from blpo_rllib import BLPOConfig
from blpo_rllib.sweep import SweepPlan, run_sweep

BATCH = 128


class Mark:
    """Leaves a line for each start of a trial and for each of its iterations; fails where it is told to."""

    def __init__(self, folder, plan, failing=None):
        self.folder, self.plan, self.failing = str(folder), plan, failing

    def name(self, algorithm):
        return Path(algorithm.logdir).name if self.plan.search == "pbt" else self.plan.trial_name(
            vars(algorithm.config), algorithm.config.seed
        )  # fmt: skip

    def write(self, algorithm, event):
        flat = [np.ravel(x) for x in algorithm.learner_group.get_weights()["default_policy"].values()]
        weights = float(np.concatenate(flat).astype(np.float64).sum())
        acting = algorithm.env_runner.module.get_state()
        acts = float(np.concatenate([np.ravel(np.asarray(x)) for x in acting.values()]).astype(np.float64).sum())
        line = {"event": event, "weights": weights, "acting": acts, "iteration": algorithm.iteration}
        with open(f"{self.folder}/{self.name(algorithm)}", "a") as stream:
            stream.write(json.dumps(line) + "\n")

    def on_algorithm_init(self, algorithm, **kwargs):
        self.write(algorithm, "start")
        if self.failing == self.name(algorithm):
            raise RuntimeError("this trial fails on purpose")

    def on_train_result(self, algorithm, result, **kwargs):
        self.write(algorithm, "iteration")

    def on_checkpoint_loaded(self, algorithm, **kwargs):
        self.write(algorithm, "loaded")


def small_config(mark):
    return (
        BLPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .training(train_batch_size_per_learner=BATCH, minibatch_size=64, num_epochs=1, actor_lr=1e-3)
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .debugging(log_level="ERROR")
        .callbacks(
            on_algorithm_init=mark.on_algorithm_init,
            on_train_result=mark.on_train_result,
            on_checkpoint_loaded=mark.on_checkpoint_loaded,
        )
    )


def small_plan(**kwargs):
    settings = {
        "task": "cartpole",
        "values": {"nystrom_rank": (1, 4), "nystrom_damping": (0.5, 50.0)},
        "seeds": 1,
        "stop_timesteps": 8 * BATCH,
    }
    return SweepPlan(**(settings | kwargs))


def lines(markers):
    """What each trial left, by name."""
    return {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in sorted(Path(markers).iterdir())}


if __name__ == "__main__":
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    plan = small_plan(stop_timesteps=60 * BATCH, seeds=2)
    run_sweep(small_config(Mark(sys.argv[2], plan)), plan, Path(sys.argv[1]), resume="--resume" in sys.argv)
