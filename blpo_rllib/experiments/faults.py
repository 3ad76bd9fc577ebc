"""Keeps a run of Tune whole over faults: signals end it with a checkpoint, and rows stay in step with checkpoints."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray import tune
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_PROGRESS_FILE, EXPR_RESULT_FILE, TRAINING_ITERATION
from ray.tune.utils import flatten_dict

from blpo_rllib import checkpoints

logger = logging.getLogger(__name__)


class Signals:
    """Notes the first SIGINT or SIGTERM, so that the trials end with a checkpoint; the next one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catches signals until the block ends."""
        # Tune's own handler ends the run at once, without the trials' checkpoints (ray/tune/tune.py, run).
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self._restore()
        print(
            f"\n{signal.Signals(number).name}: ending with a checkpoint after this iteration (again: at once)",
            flush=True,
        )

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of the run's settings on disk; handlers do not go there.
        return {"number": 0, "_before": {}}


class Stopper(tune.Stopper):
    """Ends a trial at RLlib's stop criteria or at a signal; a trial that ends so writes a last checkpoint."""

    def __init__(self, criteria: dict[str, float], stopped: Signals):
        self._criteria, self._stopped = criteria, stopped

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        flat = flatten_dict(result)
        reached = any(flat.get(name, float("-inf")) >= value for name, value in self._criteria.items())
        return reached or bool(self._stopped.number)

    def stop_all(self) -> bool:
        return False


class Keeper(tune.Callback):
    """Deletes a trial's older checkpoints, and keeps its result rows in step with the newest one.

    Tune's own ``num_to_keep`` knows neither the checkpoints of an earlier start nor those whose writer died.
    """

    def __init__(self, keep: int):
        self._keep = keep
        # Per trial, the iteration whose row is in storage.
        self._stored: dict[str, Any] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._stored.pop(trial.trial_id, None)
        guarded(_cut_rows_to_checkpoint, trial)

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        # So that failures are counted between checkpoints, not over the days of a run.
        trial.run_metadata.num_failures = 0
        guarded(checkpoints.prune, trial.storage.storage_filesystem, trial.storage.trial_fs_path, self._keep)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # While the checkpoint is being written: rows must not be behind it when everything dies.
        for trial in trials:
            reached = (trial.last_result or {}).get(TRAINING_ITERATION)
            if trial.is_saving and self._stored.get(trial.trial_id) != reached:
                self._stored[trial.trial_id] = reached
                guarded(_store_rows, trial)


def guarded(function: Callable[..., None], *args: Any) -> None:
    """Calls a function and logs its exception, which from a Tune callback would end the experiment."""
    try:
        function(*args)
    except Exception:
        logger.exception("%s failed; training goes on", function.__name__)


def _store_rows(trial: Trial) -> None:
    """Copies a trial's result rows to storage; Tune itself does so every 10 seconds at the most."""
    for name in (EXPR_RESULT_FILE, EXPR_PROGRESS_FILE):
        local = Path(trial.local_path, name)
        if local.exists():
            pyarrow.fs.copy_files(
                str(local),
                f"{trial.storage.trial_fs_path}/{name}",
                source_filesystem=pyarrow.fs.LocalFileSystem(),
                destination_filesystem=trial.storage.storage_filesystem,
            )


def _cut_rows_to_checkpoint(trial: Trial) -> None:
    """Gives Tune's loggers, which append, the rows up to the checkpoint that the trial goes on from.

    Tune does so for trials whose checkpoint it knows, and keeps rows of iterations that training will make again.
    """
    filesystem, folder = trial.storage.storage_filesystem, trial.storage.trial_fs_path
    path = f"{folder}/{EXPR_RESULT_FILE}"
    found = checkpoints.newest_valid(filesystem, folder)
    if found is None or filesystem.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
        return
    _say_what_is_lost(trial, found[1]["progress"])
    reached = found[1]["progress"][TRAINING_ITERATION]
    with filesystem.open_input_stream(path) as stream:
        lines = stream.read().splitlines(keepends=True)
    kept = b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)[TRAINING_ITERATION] <= reached)
    Path(trial.local_path, EXPR_RESULT_FILE).write_bytes(kept)
    _store_rows(trial)


def _say_what_is_lost(trial: Trial, progress: dict[str, Any]) -> None:
    name = f"{ENV_RUNNER_RESULTS}/{NUM_ENV_STEPS_SAMPLED_LIFETIME}"
    before = flatten_dict(trial.last_result or {}).get(name, 0)
    lost = int(before - progress[NUM_ENV_STEPS_SAMPLED_LIFETIME])
    if lost > 0:
        print(f"{trial}: {lost} environment steps are done again, after checkpoint {progress}", flush=True)
