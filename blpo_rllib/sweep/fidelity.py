"""The exact hypergradient beside that of each finished trial: its final module, on a short on-policy batch."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID

from blpo_rllib import checkpoints
from blpo_rllib.blpo import BLPO
from blpo_rllib.core.exact_hypergradient import Fidelity, Oracle
from blpo_rllib.core.minibatch import UpdateSettings
from blpo_rllib.core.segments import SegmentBatch
from blpo_rllib.learning.players import RLModulePlayers
from blpo_rllib.rllib_private import local_learner
from blpo_rllib.sweep.plan import DAMPING, SweepPlan
from blpo_rllib.sweep.records import FINISHED, TrialFiles, write_whole

logger = logging.getLogger(__name__)


def measure_fidelity(output: Path, plan: SweepPlan, files: TrialFiles, seeds: int = 1) -> dict[str, dict[str, float]]:
    """Measures the trials that have not been measured yet, as many at a time as there are cores.

    The reference damping is the least of the plan. A trial that cannot be measured is left out with a warning.

    Args:
        output: The sweep's folder.
        plan: The sweep.
        files: The files of its trials.
        seeds: Measure the trials of the first so many seeds.

    Returns:
        The numbers of :class:`~blpo_rllib.core.exact_hypergradient.Fidelity`, by trial name.
    """
    folder = output / "fidelity"
    wanted = [n for n, record in files.ended().items() if record["status"] == FINISHED and record["seed"] < seeds]
    reference = min(plan.values[DAMPING])
    tasks = {}
    for name in wanted:
        found = checkpoints.newest_valid(*checkpoints.resolve(output / "run" / name))
        if found is not None and not (folder / f"{name}.json").exists():
            tasks[_measure.remote(found[0], reference)] = name
    while tasks:
        (task,), _ = ray.wait(list(tasks))
        name = tasks.pop(task)
        try:
            write_whole(folder / f"{name}.json", json.dumps(ray.get(task)))
        except (ray.exceptions.RayError, OSError) as error:
            logger.warning(
                "the exact hypergradient of trial %s was not computed: %s", name, str(error).splitlines()[-1]
            )
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("[!.]*.json")) if p.stem in wanted}


@ray.remote(num_cpus=1, max_retries=0)
def _measure(checkpoint: str, reference_damping: float) -> dict[str, float]:
    torch.set_num_threads(1)
    algo = BLPO.from_checkpoint(checkpoint)
    try:
        return dataclasses.asdict(fidelity_of(algo, reference_damping))
    finally:
        algo.stop()


def fidelity_of(algo: Any, reference_damping: float) -> Fidelity:
    """Compares an algorithm's solver with the exact one, on fresh steps of its own policy.

    Args:
        algo: See :func:`problem_of`.
        reference_damping: See :meth:`~blpo_rllib.core.exact_hypergradient.Oracle.compare`.
    """
    solver = algo.config.get_ihvp_solver()
    if solver is None:
        raise ValueError(
            'hypergradient="none" leaves nothing to compare with the exact hypergradient: set a solver, e.g. "nystrom"'
        )
    oracle = Oracle(*problem_of(algo), algo.config.get_curvature())
    return oracle.compare(solver, reference_damping, np.random.default_rng(algo.config.seed or 0))


def problem_of(algo: Any) -> tuple[RLModulePlayers, SegmentBatch, UpdateSettings]:
    """Copies of an algorithm's players, a fresh batch of their own policy, and its settings, in float64.

    Args:
        algo: A BLPO algorithm of one module with a local EnvRunner and learner.

    Raises:
        ValueError: If its learners are actors.
    """
    config, learner = algo.config, local_learner(algo.learner_group)
    if learner is None:
        raise ValueError(
            f"num_learners={config.num_learners} must be 0: this is measured on the learner of this process"
        )
    episodes = algo.env_runner.sample(num_timesteps=config.total_train_batch_size)
    part = learner.build_train_batch(episodes, config.minibatch_size).policy_batches[DEFAULT_MODULE_ID]
    module = copy.deepcopy(learner.module[DEFAULT_MODULE_ID].unwrapped()).double()
    return (
        RLModulePlayers(module, DEFAULT_MODULE_ID, kernels=learner.kernels),
        part.segments.to(torch.float64),
        learner.update_settings(DEFAULT_MODULE_ID, part.num_epochs),
    )
