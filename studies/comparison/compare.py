"""Trains BLPO, its variants and PPO on all tasks for several seeds: the evidence that report.py turns into figures.

    python -m studies.comparison.compare --seeds 5 --max-concurrent 2
    python -m studies.comparison.compare --tasks cartpole hopper --algorithms blpo ppo --resume
    python -m studies.comparison.report --results results/compare

    python -m studies.comparison.compare --seeds 5 --output studies/comparison/results --resume    # goes on

One core and one thread per run. Runs that ended are in ``runs.parquet`` at any moment, a row per evaluation, and are
not run again; an interrupted one starts anew with --resume, which may also add tasks, algorithms and seeds. Who
competes, with what settings: contestants.py. Needs pip install "blpo_rllib[compare]".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import torch
from ray import tune
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EVALUATION_ITERATION_TIMER,
    EVALUATION_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    TIMERS,
)
from ray.tune.experiment import Trial
from ray.tune.result import DONE, TIME_THIS_ITER_S, TIME_TOTAL_S, TRAINING_ITERATION

from blpo_rllib.experiments.metrics import (
    CPU_SECONDS,
    CPU_SECONDS_TOTAL,
    ENV_STEPS,
    EPISODE_RETURN,
    EVALUATION_RETURN,
    EVALUATION_SECONDS,
    SECONDS,
    metric_name,
)
from blpo_rllib.experiments.progress import RichReporter
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.experiments.tuner import make_tuner
from blpo_rllib.sweep.records import FINISHED, Recorder, TrialFiles, write_whole
from blpo_rllib.sweep.runner import TrialName
from blpo_rllib.sweep.search import TrialSearch, open_trials
from studies.comparison.contestants import DESIGNS, NAMES, SIMULATORS, TASKS, contestant, contestants_of

# The columns of the results by the name of what a run records.
COLUMNS = {
    ENV_STEPS: "env_steps",
    SECONDS: "seconds",
    CPU_SECONDS: "cpu_seconds",
    EVALUATION_SECONDS: "evaluation_seconds",
    EVALUATION_RETURN: "evaluation_return",
    EPISODE_RETURN: "training_return",
} | {metric_name(name): name for name in ("approx_kl", "clip_fraction", "entropy", "mixed_grad_cosine")}


@dataclass(frozen=True)
class ComparePlan:
    """Tasks × algorithms × seeds.

    Attributes:
        tasks: Environment steps by task, in the order in which they run.
        algorithms: Of which a task takes those that there are settings for.
        seeds: Runs of each algorithm on each task, with seeds 0, 1, ...
        simulator: One of SIMULATORS.
        first_seed: The first of the seeds, if that is not 0.
    """

    tasks: Mapping[str, int]
    algorithms: Sequence[str]
    seeds: int
    simulator: str
    first_seed: int = 0

    stops_early = False

    @property
    def values(self) -> dict[str, Sequence[str]]:
        """What tells runs apart, beside their seeds."""
        return {"task": list(self.tasks), "algorithm": self.algorithms}

    def trials(self) -> dict[str, tuple[dict[str, Any], int]]:
        """Task and algorithm, and seed, by the run's name: task by task, and then seed by seed."""
        pairs = [
            ({"task": task, "algorithm": algorithm, "steps": steps, "simulator": self.simulator}, seed)
            for task, steps in self.tasks.items()
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for algorithm in contestants_of(task)
            if algorithm in self.algorithms
        ]
        return {self.trial_name(point, seed): (point, seed) for point, seed in pairs}

    @property
    def num_trials(self) -> int:
        """How many runs there are in all."""
        return len(self.trials())

    def steps_of(self, point: Mapping[str, Any]) -> int:
        """Environment steps of a run."""
        return point["steps"]

    def trial_name(self, point: Mapping[str, Any], seed: int) -> str:
        """``hopper_blpo_seed0``."""
        return f"{point['task']}_{point['algorithm']}_seed{seed}"


class Run(tune.Trainable):
    """One run on one thread: iterations as long as it is between two evaluations, the first of which trains nothing.

    Not RLlib's algorithm itself, because Tune takes one class for all trials, and to keep the evaluations' time apart.
    A run has no checkpoints: none is long, and its times are to be those of one start.
    """

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._steps, self._cpu_seconds = config["steps"], 0.0
        self._algorithm = contestant(**config).build_algo()

    def step(self) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        result = {ENV_RUNNER_RESULTS: {NUM_ENV_STEPS_SAMPLED_LIFETIME: 0}} if self.iteration == 0 else self._train()
        seconds = time.perf_counter() - wall
        self._cpu_seconds += time.process_time() - cpu
        result[EVALUATION_RESULTS] = self._algorithm.evaluate()
        evaluation_seconds = time.perf_counter() - wall - seconds
        steps = result[ENV_RUNNER_RESULTS][NUM_ENV_STEPS_SAMPLED_LIFETIME]
        return result | {
            TIME_THIS_ITER_S: seconds,
            CPU_SECONDS_TOTAL: self._cpu_seconds,
            TIMERS: result.get(TIMERS, {}) | {EVALUATION_ITERATION_TIMER: evaluation_seconds},
            DONE: steps >= self._steps,
        }

    def _train(self) -> dict[str, Any]:
        """RLlib's result, without its own count of iterations and times, which are Tune's here."""
        result = self._algorithm.train()
        return {k: v for k, v in result.items() if k not in (TRAINING_ITERATION, TIME_THIS_ITER_S, TIME_TOTAL_S, DONE)}

    def cleanup(self) -> None:
        self._algorithm.stop()


class Gatherer(tune.Callback):
    """Gathers the results whenever a run ends; stands behind the recorder.

    Args:
        files: The files of the runs.
        path: Of the gathered results.
    """

    def __init__(self, files: TrialFiles, path: Path):
        self._files, self._path = files, path

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        gather(self._files, self._path)


def gather(files: TrialFiles, path: Path) -> None:
    """Writes the evaluations of all runs that finished to one Parquet file, whole or not at all."""
    finished = {name: record for name, record in files.ended().items() if record["status"] == FINISHED}
    rows = [about(record) | evaluation(row) for name, record in finished.items() for row in files.rows(name)]
    if rows:
        draft = path.with_suffix(".draft")
        pd.DataFrame(rows).to_parquet(draft, index=False)
        os.replace(draft, path)


def about(record: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a run and says where it was made."""
    names = ("task", "algorithm", "seed", "simulator", *origin())
    return {name: record[name] for name in names}


def evaluation(row: Mapping[str, float]) -> dict[str, float]:
    """A row of the results: one evaluation of a run."""
    return {column: row[name] for name, column in COLUMNS.items() if name in row}


def origin() -> dict[str, Any]:
    """Date, machine and versions, as each run's record has them."""
    names = ("date", "machine", "python", "torch", "ray")
    here = provenance()
    return {name: here[name] for name in names} | {"envpool": version("envpool"), "mujoco": version("mujoco")}


def compare(plan: ComparePlan, output: Path, max_concurrent: int | None = None) -> TrialFiles:
    """Runs what has not run yet; a run that fails ends no other."""
    files = TrialFiles(output / "trials")
    results = output / "runs.parquet"
    trials = open_trials(plan.trials(), files)
    if trials:
        make_tuner(
            Run,
            output,
            TrialName(plan),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[
                Recorder(files, plan, lambda: {"simulator": plan.simulator} | origin()),
                Gatherer(files, results),
            ],
            reporter=RichReporter(max(plan.tasks.values()), len(trials)),
            search_alg=TrialSearch(trials.values()),
            num_samples=len(trials),
            max_concurrent_trials=max_concurrent,
        ).fit()
    gather(files, results)
    return files


def take_folder(plan: ComparePlan, output: Path, resume: bool) -> None:
    """Notes in the folder what its runs have in common.

    Raises:
        ValueError: If the folder holds runs and ``resume`` is False, or others than those of ``plan`` can stand beside.
    """
    path = output / "compare.json"
    known = json.loads(path.read_text()) if path.exists() else {"tasks": {}, "simulator": plan.simulator}
    if known["tasks"] and not resume:
        raise ValueError(f"{output} holds a comparison: add --resume to go on with it, or name another folder")
    differing = [task for task, steps in plan.tasks.items() if known["tasks"].get(task, steps) != steps]
    if differing or known["simulator"] != plan.simulator:
        raise ValueError(f"{output} holds runs with other steps or another simulator: {json.dumps(known)}")
    write_whole(path, json.dumps({"tasks": known["tasks"] | dict(plan.tasks), "simulator": plan.simulator}, indent=1))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--algorithms", nargs="+", choices=[*NAMES, *DESIGNS], default=NAMES)
    p.add_argument("--seeds", type=int, default=5, help="runs of each algorithm on each task")
    p.add_argument("--first-seed", type=int, default=0, help="seeds count from here on")
    p.add_argument("--steps", type=int, help="environment steps of each run (by task: see contestants.py)")
    p.add_argument("--simulator", choices=SIMULATORS, default="envpool", help="of the MuJoCo tasks")
    p.add_argument("--output", type=Path, default=Path("results/compare"))
    p.add_argument("--resume", action="store_true", help="go on with the comparison at --output, or add to it")
    p.add_argument("--max-concurrent", type=int, help="runs at the same time (as many as there are cores)")
    return p


def main() -> None:
    p = parser()
    args = p.parse_args()
    tasks = {task: args.steps or steps for task, steps in TASKS.items() if task in args.tasks}
    plan = ComparePlan(tasks, args.algorithms, args.seeds, args.simulator, args.first_seed)
    output = args.output.resolve()
    try:
        take_folder(plan, output, args.resume)
    except ValueError as error:
        p.error(str(error))
    ray.init(num_cpus=args.max_concurrent, log_to_driver=False, include_dashboard=False)
    files = compare(plan, output, args.max_concurrent)
    left = open_trials(plan.trials(), files)
    print(f"results: {output / 'runs.parquet'}")
    if left:
        sys.exit(f"{len(left)} of {plan.num_trials} runs are open: the same command with --resume goes on")


if __name__ == "__main__":
    main()
