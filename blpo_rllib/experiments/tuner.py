"""The one place where a Tuner is made: for the tuned examples, sweeps and comparisons."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import ProgressReporter

from blpo_rllib import checkpoints

# Tune's experiment inside the folder of an example, a sweep or a comparison.
RUN = "run"


def make_tuner(
    trainable: type,
    output: Path | str | None,
    trial_name: Callable[[Trial], str],
    *,
    param_space: Any = None,
    stop: Any = None,
    max_failures: int = 0,
    checkpoint_config: tune.CheckpointConfig | None = None,
    callbacks: Sequence[tune.Callback],
    reporter: ProgressReporter,
    verbose: int = 1,
    **tune_config: Any,
) -> tune.Tuner:
    """A Tuner whose trials have the same names and folders on every start, and in which no failure ends other trials.

    ``Tuner.restore`` has no place here. It reads Tune's own record of an experiment, which Tune writes every 10 seconds
    and copies in place, so that a kill leaves it torn or behind the checkpoints
    (ray/tune/execution/experiment_state.py), and it fixes the stop criteria and settings of the first start. Here each
    trial finds its newest checkpoint itself (:class:`~blpo_rllib.blpo.BLPO`), because its folder has the same name.

    Args:
        trainable: What Tune runs.
        output: The folder or URL that holds the experiment; None for a new folder in ``~/ray_results``.
        trial_name: Names a trial and its folder.
        param_space: As in Tune.
        stop: As in Tune.
        max_failures: How often a trial starts again after a failure.
        checkpoint_config: As in Tune.
        callbacks: As in Tune.
        reporter: Progress at the terminal.
        verbose: As in Tune.
        **tune_config: Arguments of Tune's TuneConfig.
    """
    # Tune's newer output ignores progress reporters.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # With a searcher Tune starts one trial after the other, and starting takes as long as a short trial.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(os.cpu_count()))
    # Tune would warn of how often it writes its own record of the experiment, which nobody reads.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    return tune.Tuner(
        trainable,
        param_space=param_space,
        run_config=tune.RunConfig(
            **({} if output is None else _storage(output)),
            stop=stop,
            failure_config=tune.FailureConfig(max_failures=max_failures, fail_fast=False),
            checkpoint_config=checkpoint_config,
            callbacks=list(callbacks),
            progress_reporter=reporter,
            verbose=verbose,
        ),
        tune_config=tune.TuneConfig(trial_dirname_creator=trial_name, trial_name_creator=trial_name, **tune_config),
    )


def _storage(output: Path | str) -> dict[str, Any]:
    """Tune's settings for a folder or URL; Tune itself knows fewer URLs."""
    filesystem, path = checkpoints.resolve(output)
    return {"name": RUN, "storage_path": path, "storage_filesystem": filesystem}
