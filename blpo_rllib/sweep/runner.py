"""Runs a sweep with Ray Tune, so that it can be interrupted anywhere and gone on with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils.annotations import override
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import ProgressReporter

from blpo_rllib.blpo import BLPO, BLPOConfig
from blpo_rllib.experiments.progress import RichReporter
from blpo_rllib.experiments.tuner import make_tuner
from blpo_rllib.sweep.plan import PBT_FIELDS, Plan, SweepPlan
from blpo_rllib.sweep.records import Recorder, TrialFiles, write_whole
from blpo_rllib.sweep.search import STEPS, Points, PointSearch, scheduler_of

# Checkpoints on a trial's way, from which it goes on after an interruption.
CHECKPOINTS_PER_TRIAL = 5


class SweepTrial(BLPO):
    """BLPO on as many threads as the trial has cores: trials run side by side."""

    @override(BLPO)
    def setup(self, config: AlgorithmConfig) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus_for_main_process)))
        super().setup(config)


def run_sweep(
    config: BLPOConfig,
    plan: SweepPlan,
    output: Path,
    *,
    resume: bool = False,
    gpus_per_trial: float = 0.0,
    max_concurrent: int | None = None,
    callbacks: Sequence[tune.Callback] = (),
    reporter: ProgressReporter | None = None,
) -> TrialFiles:
    """Runs the trials of a plan that have not ended; a trial that fails does not end the others.

    Args:
        config: What the swept fields are set on.
        plan: What to try.
        output: The sweep's folder.
        resume: Go on with the sweep that is in the folder: trials that ended do not run again, those that failed do.
        gpus_per_trial: GPU of each trial's learner, 0.25 for four trials on one.
        max_concurrent: Trials at the same time; None for as many as there are resources.
        callbacks: Trackers and others.
        reporter: Progress at the terminal; None for :class:`~blpo_rllib.experiments.progress.RichReporter`.

    Returns:
        The files of the trials.

    Raises:
        ValueError: If the folder holds a sweep and ``resume`` is False, or another sweep than ``plan``.
    """
    output = Path(output).resolve()
    _take_folder(plan, output, resume)
    files = TrialFiles(output / "trials")
    points = Points(output / "points.json", plan, files)
    if plan.search == "optuna" or points.open():
        _tuner(config, points, output, gpus_per_trial, max_concurrent, callbacks, reporter).fit()
    return files


def _take_folder(plan: SweepPlan, output: Path, resume: bool) -> None:
    path = output / "sweep.json"
    if not path.exists():
        write_whole(path, plan.to_json())
        return
    if not resume:
        raise ValueError(f"{output} holds a sweep: add --resume to go on with it, or name another folder")
    if SweepPlan.from_json(path.read_text()) != plan:
        raise ValueError(f"{output} holds another sweep than this one; its settings are in {path}: {path.read_text()}")


def _tuner(
    config: BLPOConfig,
    points: Points,
    output: Path,
    gpus_per_trial: float,
    max_concurrent: int | None,
    callbacks: Sequence[tune.Callback],
    reporter: ProgressReporter | None,
) -> tune.Tuner:
    plan = points.plan
    config = config.copy(copy_frozen=False).learners(num_learners=0, num_gpus_per_learner=gpus_per_trial)
    scheduler, search = scheduler_of(points), None
    if plan.search == "pbt":
        # Tune's PBT takes no searcher. Members differ in their seeds, by which they find their points.
        open_members = {seed: _latest(points, point, seed) for point, seed in points.open().values()}
        config.debugging(seed=tune.grid_search(list(open_members)))
        for name in plan.values:
            setattr(config, name, tune.sample_from(_MemberValue(open_members, name)))
        num_samples = 1
    else:
        search = PointSearch(points)
        num_samples = plan.num_trials
        if max_concurrent is None:
            # Without a limit Tune asks for points ahead of time, before Optuna has anything to learn from.
            max_concurrent = os.cpu_count() if plan.search == "optuna" else None
    iterations = max(1, plan.stop_timesteps // config.total_train_batch_size)
    return make_tuner(
        SweepTrial,
        output,
        TrialName(plan),
        param_space=config,
        stop={STEPS: plan.stop_timesteps},
        checkpoint_config=tune.CheckpointConfig(
            checkpoint_frequency=-(-iterations // CHECKPOINTS_PER_TRIAL), checkpoint_at_end=True, num_to_keep=3
        ),
        callbacks=[Recorder(points.files, plan), *callbacks],
        reporter=reporter or RichReporter(plan.stop_timesteps, plan.num_trials),
        search_alg=search,
        scheduler=scheduler,
        num_samples=num_samples,
        max_concurrent_trials=max_concurrent,
    )


def _latest(points: Points, point: dict[str, float], seed: int) -> dict[str, float]:
    """Where a member of a population had got to, if it had begun."""
    rows = points.files.rows(points.plan.trial_name(point, seed))
    return point | {name: rows[-1][name] for name in PBT_FIELDS if rows and name in point}


class _MemberValue:
    """The value of one field for the member of a population that has a seed."""

    def __init__(self, members: dict[int, dict[str, float]], name: str):
        self._members, self._name = members, name

    def __call__(self, spec: Any) -> float:
        return self._members[spec.config.seed][self._name]


class TrialName:
    """Names a trial and its folder after its point, the same on every start, so that the trial finds its checkpoints.

    Args:
        plan: Knows the names.
    """

    def __init__(self, plan: Plan):
        self._plan = plan

    def __call__(self, trial: Trial) -> str:
        return self._plan.trial_name(trial.config, trial.config["seed"])
