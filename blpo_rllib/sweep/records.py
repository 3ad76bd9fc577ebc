"""The files of a sweep: for each trial one of rows and, once the trial has ended, one record.

Tune's own record of an experiment is written every few seconds and may be torn or behind after a kill
(ray/tune/execution/experiment_state.py). Here a trial has ended if, and only if, its record is there: records are
written whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial

from blpo_rllib.experiments.metrics import ENV_STEPS, EPISODE_RETURN, EPISODES, SECONDS, grouped, iteration
from blpo_rllib.sweep.plan import Plan

logger = logging.getLogger(__name__)

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
# The share of a trial's steps, at its end, over which final numbers are averaged.
FINAL_SHARE = 0.2

Row = dict[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)


class TrialFiles:
    """The files of a sweep's trials.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def ended(self) -> dict[str, dict[str, Any]]:
        """The records of the trials that ended, by name."""
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("[!.]*.json"))}

    def rows(self, name: str) -> list[Row]:
        """A trial's rows, one per iteration."""
        path = self.folder / f"{name}.jsonl"
        return _without_repeats(path.read_text().splitlines()) if path.exists() else []

    def append(self, name: str, row: Row) -> None:
        """Adds a row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def end(self, name: str, record: dict[str, Any]) -> None:
        """Declares a trial ended."""
        write_whole(self.folder / f"{name}.json", json.dumps(record, indent=1))


def _without_repeats(lines: Iterable[str]) -> list[Row]:
    """The rows without those that a trial came to again after an interruption, and without a torn one."""
    rows: list[Row] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        while rows and rows[-1]["iteration"] >= row["iteration"]:
            rows.pop()
        rows.append(row)
    return rows


def summary(rows: list[Row]) -> dict[str, float]:
    """What a trial's rows come to: final means over the last fifth of its steps, and the return over the whole run.

    Means of returns count each iteration by the episodes that ended in it.
    """
    if not rows:
        return {}
    steps = rows[-1][ENV_STEPS]
    last = [row for row in rows if row[ENV_STEPS] > (1 - FINAL_SHARE) * steps]
    numeric = {name for row in last for name, value in row.items() if isinstance(value, (int, float))}
    names = sorted(numeric - {"iteration", EPISODE_RETURN, EPISODES, SECONDS, ENV_STEPS})
    means = {name: float(np.mean([row[name] for row in last if name in row])) for name in names}
    return {
        "final_return": mean_return(last),
        "mean_return": mean_return(rows),
        "env_steps": steps,
        "iterations": rows[-1]["iteration"],
        "seconds": rows[-1].get(SECONDS, float("nan")),
        **means,
    }


def mean_return(rows: list[Row]) -> float:
    """Mean return of the episodes that ended in these rows; NaN if none did."""
    found = [(row[EPISODE_RETURN], row.get(EPISODES, 0.0)) for row in rows if EPISODE_RETURN in row]
    weights = [weight for _, weight in found]
    if not sum(weights):
        return found[-1][0] if found else float("nan")
    return float(np.average([value for value, _ in found], weights=weights))


class Recorder(tune.Callback):
    """Writes the rows and records of trials as Tune reports on them.

    Args:
        files: Where to.
        plan: The sweep.
        about: What else goes into the record of a trial when it ends.
    """

    def __init__(self, files: TrialFiles, plan: Plan, about: Callable[[], Mapping[str, Any]] = dict):
        self._files, self._plan, self._about = files, plan, about

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        try:
            self._files.append(name_of(trial), self._row(trial, result))
        except (OSError, KeyError, TypeError):
            logger.exception("a row of trial %s was not written; the sweep goes on", name_of(trial))

    def _row(self, trial: Trial, result: dict[str, Any]) -> Row:
        return {"iteration": iteration(result), **self._point(trial), **grouped(result)}

    def _point(self, trial: Trial) -> dict[str, Any]:
        """The trial's present point, which population based training changes."""
        return {name: trial.config[name] for name in self._plan.values}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, _last_line(trial))

    def _end(self, trial: Trial, error: str | None) -> None:
        name = name_of(trial)
        try:
            numbers = summary(self._files.rows(name))
            complete = numbers.get("env_steps", 0) >= self._plan.steps_of(trial.config)
            if not (error or complete or self._plan.stops_early):
                # Tune ends trials as complete when the whole sweep is interrupted, too.
                return
            status = FAILED if error else FINISHED if complete else STOPPED
            about = {"name": name, "status": status, "error": error, "seed": trial.config["seed"]}
            self._files.end(name, about | dict(self._about()) | numbers | self._point(trial))
        except (OSError, KeyError, TypeError, ValueError):
            logger.exception("the record of trial %s was not written; it will run again on --resume", name)


def name_of(trial: Trial) -> str:
    """The trial's name: that of its folder."""
    return Path(trial.local_path).name


def _last_line(trial: Trial) -> str:
    try:
        lines = [line for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
        return lines[-1].strip()
    except (OSError, TypeError, IndexError):
        return "unknown error"
