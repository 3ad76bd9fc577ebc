"""Tune searchers and schedulers over the points of a sweep: they choose the next trial, and stop poor ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from blpo_rllib.experiments.metrics import ENV_STEPS, EPISODE_RETURN, RUN_METRICS
from blpo_rllib.extras import require
from blpo_rllib.sweep.plan import AXES, PBT_FIELDS, Point, SweepPlan, rounded
from blpo_rllib.sweep.records import FAILED, TrialFiles, write_whole

# What schedulers compare and count by, in Tune's flat results. The return is RLlib's mean over the latest episodes.
SCORE, STEPS = RUN_METRICS[EPISODE_RETURN], RUN_METRICS[ENV_STEPS]
# Share of a trial's steps before ASHA may stop it, and between PBT's exchanges.
GRACE_SHARE, PERTURB_SHARE = 0.1, 0.2

# Point and seed.
Trial = tuple[Point, int]


class Points:
    """The points of a sweep, kept in a file as they are drawn.

    Args:
        path: The file.
        plan: The sweep.
        files: The files of its trials.
    """

    def __init__(self, path: Path, plan: SweepPlan, files: TrialFiles):
        self._path, self.plan, self.files = path, plan, files
        self.points: list[Point] = json.loads(path.read_text()) if path.exists() else []
        if not self.points:
            self.extend(plan.points())

    def extend(self, points: list[Point]) -> None:
        """Adds points that were drawn."""
        self.points += points
        write_whole(self._path, json.dumps(self.points))

    def trials(self) -> dict[str, Trial]:
        """Point and seed of each trial, by its name, seed by seed: a sweep cut short has all points with few seeds."""
        if self.plan.search == "pbt":
            pairs = [(point, seed) for seed, point in enumerate(self.points)]
        else:
            pairs = [(point, seed) for seed in range(self.plan.seeds_per_point) for point in self.points]
        return {self.plan.trial_name(point, seed): (point, seed) for point, seed in pairs}

    def open(self) -> dict[str, Trial]:
        """Those that have not ended, or that failed."""
        return open_trials(self.trials(), self.files)


def open_trials(trials: Mapping[str, Trial], files: TrialFiles) -> dict[str, Trial]:
    """Those of the trials that have not ended, or that failed."""
    ended = {name for name, record in files.ended().items() if record["status"] != FAILED}
    return {name: trial for name, trial in trials.items() if name not in ended}


class TrialSearch(Searcher):
    """Hands out trials one after the other.

    Args:
        trials: Point and seed of each.
    """

    def __init__(self, trials: Iterable[Trial]):
        super().__init__()
        self._waiting = list(trials)

    def suggest(self, trial_id: str) -> Any:
        if not self._waiting:
            return Searcher.FINISHED
        point, seed = self._waiting.pop(0)
        return point | {"seed": seed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: records say what has ended."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the files of the trials are the memory."""


class PointSearch(TrialSearch):
    """Hands out the points that are known, and lets Optuna propose more where the plan says so.

    Args:
        points: The sweep's points, to which proposals are added.
    """

    def __init__(self, points: Points):
        super().__init__(points.open().values())
        self._points = points
        self._optuna = OptunaPoints(points.plan) if points.plan.search == "optuna" else None

    def suggest(self, trial_id: str) -> Any:
        if not self._waiting and self._optuna is not None and len(self._points.points) < self._points.plan.num_points:
            self._optuna.learn(self._points)
            point = self._optuna.propose()
            known = point in self._points.points
            self._points.extend([point])
            self._waiting += [] if known else [(point, seed) for seed in range(self._points.plan.seeds)]
        return super().suggest(trial_id)


class OptunaPoints:
    """Optuna's proposals (TPE), from the means over seeds of the points that were tried.

    Args:
        plan: The sweep.

    Raises:
        ImportError: If Optuna is not installed.
    """

    def __init__(self, plan: SweepPlan):
        optuna = require("optuna", "sweep", "search='optuna'")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._plan = optuna, plan
        self._both = plan.objective == "return-and-time"
        # constant_liar: points under way count as poor, so that those that run side by side differ.
        sampler = optuna.samplers.TPESampler(seed=plan.draw_seed, constant_liar=True)
        directions = [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE][: 1 + self._both]
        self._study = optuna.create_study(sampler=sampler, directions=directions)
        self._distributions = {name: self._distribution(name) for name in plan.values}
        self._asked: dict[str, Any] = {}
        self._told: set[str] = set()

    def _distribution(self, name: str) -> Any:
        low, high = min(self._plan.values[name]), max(self._plan.values[name])
        if AXES[name].integer:
            return self._optuna.distributions.IntDistribution(int(low), int(high))
        return self._optuna.distributions.FloatDistribution(low, high, log=True)

    def propose(self) -> Point:
        """The next point to try."""
        trial = self._study.ask(self._distributions)
        point = rounded(trial.params)
        self._asked[json.dumps(point)] = trial
        return point

    def learn(self, points: Points) -> None:
        """Tells Optuna of the points whose trials have all ended since the last time."""
        ended = points.files.ended()
        for point in points.points:
            key = json.dumps(point)
            records = [ended.get(self._plan.trial_name(point, seed)) for seed in range(self._plan.seeds)]
            if key not in self._told and all(records):
                self._told.add(key)
                self._tell(key, point, [record for record in records if record and record["status"] != FAILED])

    def _tell(self, key: str, point: Point, records: list[dict[str, Any]]) -> None:
        values = [float(np.mean([r[name] for r in records])) if records else np.nan for name in self._objectives]
        states, usable = self._optuna.trial.TrialState, bool(np.isfinite(values).all())
        if asked := self._asked.pop(key, None):
            self._study.tell(asked, values if usable else None, None if usable else states.FAIL)
        elif usable:
            # Of an earlier start of this sweep.
            distributions = self._distributions
            known = self._optuna.create_trial(params=point, distributions=distributions, values=values)
            self._study.add_trial(known)

    @property
    def _objectives(self) -> list[str]:
        return ["final_return", "seconds"] if self._both else ["final_return"]


def scheduler_of(points: Points) -> TrialScheduler | None:
    """The scheduler that the plan's search implies; None for first come, first served."""
    plan = points.plan
    if plan.search == "asha":
        return _asha(points)
    if plan.search == "pbt":
        mutations = {
            name: tune.loguniform(min(values), max(values))
            for name, values in plan.values.items()
            if name in PBT_FIELDS and min(values) < max(values)
        }
        if not mutations:
            raise ValueError(
                f"values={dict(plan.values)} leave search='pbt' nothing to change: give two different values at least "
                f"for one of {', '.join(PBT_FIELDS)}"
            )
        # Tune draws PBT's changes from the global generator.
        random.seed(plan.draw_seed)
        return PopulationBasedTraining(
            time_attr=STEPS,
            metric=SCORE,
            mode="max",
            perturbation_interval=max(1, int(PERTURB_SHARE * plan.stop_timesteps)),
            hyperparam_mutations=mutations,
            # Until an episode has ended there is no return.
            require_attrs=False,
            # Members wait for each other: with more of them than fit at once, one that copies a waiting member would
            # otherwise be sent back to the same checkpoint again and again.
            synch=True,
            custom_explore_fn=lambda config: config | rounded({name: config[name] for name in mutations}),
        )
    return None


def _asha(points: Points) -> ASHAScheduler:
    """Successive halving, told of the trials that ended before an interruption."""
    limit = points.plan.stop_timesteps
    scheduler = ASHAScheduler(
        time_attr=STEPS,
        metric=SCORE,
        mode="max",
        max_t=limit,
        grace_period=max(1, int(GRACE_SHARE * limit)),
        reduction_factor=3,
        # The trial's own stop criterion ends it; ASHA would call a trial that reached the end stopped early.
        stop_last_trials=False,
    )
    for name in points.files.ended():
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        for row in points.files.rows(name):
            if EPISODE_RETURN in row:
                scheduler.on_trial_result(None, trial, {STEPS: row[ENV_STEPS], SCORE: row[EPISODE_RETURN]})
        scheduler.on_trial_remove(None, trial)
    return scheduler
