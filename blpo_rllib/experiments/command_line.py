"""The command line of the tuned examples: RLlib's own example options, ``--seed``, and runs that outlive faults.

RLlib's example function runs the experiment. This module adds what it leaves open: where checkpoints go, how many are
kept, that a failed run starts again from the last one, and that a signal ends the run with one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.fs
from ray import tune
from ray.rllib.examples.utils import add_rllib_example_script_args, run_rllib_example_script_experiment
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.tune.result import EXPR_PROGRESS_FILE, EXPR_RESULT_FILE, TRAINING_ITERATION
from ray.tune.utils import flatten_dict

from blpo_rllib import checkpoints
from blpo_rllib.blpo import BLPOConfig
from blpo_rllib.experiments.tracking import watched
from blpo_rllib.tasks import TASKS

logger = logging.getLogger(__name__)

# The folder of a run inside --output.
RUN = "run"
# A trial that fails more often than this without a checkpoint in between has a fault that no restart will mend.
MAX_FAILURES_IN_A_ROW = 10


def run_task(name: str) -> Any:
    """Trains a tuned task as the command line says: :func:`run_example` with its settings."""
    task = TASKS[name]
    return run_example(
        task.config(),
        stop_reward=task.stop_reward,
        stop_timesteps=task.stop_timesteps,
        published=task.reference if task.tune else None,
    )


def run_example(
    config: BLPOConfig,
    *,
    stop_reward: float,
    stop_timesteps: int,
    published: Callable[[], BLPOConfig] | None = None,
) -> Any:
    """Trains ``config`` as the command line says: ``--num-env-runners``, ``--num-learners``, ``--as-test`` and so on.

    Args:
        config: The tuned settings; the command line overrides them.
        stop_reward: Default of ``--stop-reward``, the mean episode return at which training ends.
        stop_timesteps: Default of ``--stop-timesteps``, the number of environment steps at which it ends.
        published: Makes the published settings, for ``--published-batches``; None: there is no such option.

    Returns:
        Tune's results, or with ``--no-tune`` the last result.

    Raises:
        SystemExit: With status 128 + its number after a signal, once the checkpoint is written.
    """
    args = parse_command_line(stop_reward, stop_timesteps, has_published_batches=published is not None)
    if published and args.published_batches:
        config = published()
    if args.no_tune:
        config.debugging(seed=args.seed)
        return run_rllib_example_script_experiment(config, args, **watched(config, args))
    config.debugging(seed=tune.grid_search(list(range(args.seed, args.seed + args.num_samples))))
    args.num_samples = 1
    stopped = _Signals()
    with _tuner_as_asked(args, stopped), stopped.restored():
        results = run_rllib_example_script_experiment(config, args, **watched(config, args))
    if results.errors:
        raise results.errors[0]
    if stopped.number:
        sys.exit(128 + stopped.number)
    return results


def parse_command_line(
    stop_reward: float, stop_timesteps: int, has_published_batches: bool = False
) -> argparse.Namespace:
    """The options, checked against each other and against what lies at ``--output``."""
    parser = add_rllib_example_script_args(
        argparse.ArgumentParser(conflict_handler="resolve"),
        default_reward=stop_reward,
        default_timesteps=stop_timesteps,
        default_iters=1_000_000,
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed; with --num-samples N, trials take seed ... seed+N-1."
    )
    # In RLlib's parser this is a folder for episodes (offline data), which BLPO, on-policy, has no use for.
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="Folder or URL (s3://, gs://, az://, ...) for checkpoints and results, which every node must reach "
        "(default: ~/ray_results, a new folder each time).",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the newest whole checkpoint at --output; start a new run if there is none.",
    )
    parser.add_argument("--checkpoint-keep", type=int, default=3, metavar="N", help="Keep the newest N checkpoints.")
    if has_published_batches:
        parser.add_argument(
            "--published-batches",
            action="store_true",
            help="Batches of 20,480 steps, as published, in place of the example's of 2,048.",
        )
    parser.set_defaults(algo="BLPO", verbose=1, checkpoint_freq=10, checkpoint_at_end=True)
    args = parser.parse_args()
    args.storage, args.output = args.output, None
    _check_options(parser, args)
    return args


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.checkpoint_keep < 1:
        parser.error("--checkpoint-keep must be at least 1")
    if args.resume and not args.storage:
        parser.error("--resume needs --output PATH, the folder or URL of the run to go on with")
    if not args.storage:
        return
    if args.no_tune:
        parser.error("--output and --resume need Tune: leave out --no-tune")
    try:
        filesystem, path = checkpoints.resolve(args.storage)
        used = filesystem.get_file_info(f"{path}/{RUN}").type != pyarrow.fs.FileType.NotFound
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"--output {args.storage} cannot be used: {error}")
    if used and not args.resume:
        parser.error(f"--output {args.storage} holds a run: add --resume to go on with it, or name another place")


@contextmanager
def _tuner_as_asked(args: argparse.Namespace, stopped: _Signals) -> Iterator[None]:
    """Lets RLlib's example function make its Tuner with storage, restarts and signals as asked.

    It makes it inside and takes neither a RunConfig nor a Tuner (ray/rllib/examples/utils.py,
    run_rllib_example_script_experiment); the name ``tune.Tuner`` is the narrowest place there is.

    Not ``Tuner.restore``: it goes by Tune's own record, which is written every 10 seconds and copied in place, so that
    a kill leaves it torn or behind the checkpoints (ray/tune/execution/experiment_state.py), and it fixes the stop
    criteria and settings of the first start. Here each trial finds its newest checkpoint itself (:class:`BLPO`).
    """
    tuner_class = tune.Tuner

    def tuner(trainable: Any, *, param_space: Any, run_config: Any, tune_config: Any) -> tune.Tuner:
        # Found here, a wrong setting is an error at once; found by the trial it looks like a fault to recover from.
        param_space.copy(copy_frozen=False).debugging(seed=args.seed).validate()
        stopped.catch()
        run_config = dataclasses.replace(
            run_config,
            **({} if args.storage is None else {**_storage(args.storage), "name": RUN}),
            stop=_Stopper(run_config.stop, stopped),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES_IN_A_ROW),
            callbacks=[_Keeper(args.checkpoint_keep), *(run_config.callbacks or [])],
        )
        # The same on every start, so that a trial finds its own folder.
        tune_config = dataclasses.replace(
            tune_config, trial_dirname_creator=lambda trial: f"seed_{trial.config['seed']}"
        )
        return tuner_class(trainable, param_space=param_space, run_config=run_config, tune_config=tune_config)

    with mock.patch.object(tune, "Tuner", tuner):
        yield


def _storage(output: str) -> dict[str, Any]:
    """Tune's settings for a folder or URL; Tune itself knows fewer URLs."""
    filesystem, path = checkpoints.resolve(output)
    return {"storage_path": path, "storage_filesystem": filesystem}


class _Signals:
    """Notes the first SIGINT or SIGTERM, for the trials to end with a checkpoint; the next acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def catch(self) -> None:
        # Tune's own handler ends the run at once, without the trials' checkpoints (ray/tune/tune.py, run).
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

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

    @contextmanager
    def restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._restore()

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of the run's settings on disk; handlers do not go there.
        return {"number": 0, "_before": {}}


class _Stopper(tune.Stopper):
    """RLlib's stop criteria, and the signal. A trial that is stopped so writes its last checkpoint."""

    def __init__(self, criteria: dict[str, float], stopped: _Signals):
        self._criteria, self._stopped = criteria, stopped

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        flat = flatten_dict(result)
        reached = any(flat.get(name, float("-inf")) >= value for name, value in self._criteria.items())
        return reached or bool(self._stopped.number)

    def stop_all(self) -> bool:
        return False


class _Keeper(tune.Callback):
    """Keeps a trial's newest checkpoints, and its result rows in step with them.

    Tune's own ``num_to_keep`` knows neither the checkpoints of an earlier start nor those whose writer died.
    """

    def __init__(self, keep: int):
        self._keep = keep
        # Per trial, the iteration whose row is in storage.
        self._stored: dict[str, Any] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._stored.pop(trial.trial_id, None)
        _guarded(_take_up_rows, trial)

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # So that failures are counted between checkpoints, not over the days of a run.
        trial.run_metadata.num_failures = 0
        _guarded(checkpoints.prune, trial.storage.storage_filesystem, trial.storage.trial_fs_path, self._keep)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # While the checkpoint is being written: rows must not be behind it when everything dies.
        for trial in trials:
            reached = (trial.last_result or {}).get(TRAINING_ITERATION)
            if trial.is_saving and self._stored.get(trial.trial_id) != reached:
                self._stored[trial.trial_id] = reached
                _guarded(_store_rows, trial)


def _guarded(function: Any, *args: Any) -> None:
    """Calls it; an exception from a callback would end the experiment, and the rows are not worth that."""
    try:
        function(*args)
    except Exception:
        logger.exception("%s failed; training goes on", function.__name__)


def _store_rows(trial: Any) -> None:
    """Copies the rows to storage; Tune itself does so every 10 seconds at the most."""
    for name in (EXPR_RESULT_FILE, EXPR_PROGRESS_FILE):
        local = Path(trial.local_path, name)
        if local.exists():
            pyarrow.fs.copy_files(
                str(local),
                f"{trial.storage.trial_fs_path}/{name}",
                source_filesystem=pyarrow.fs.LocalFileSystem(),
                destination_filesystem=trial.storage.storage_filesystem,
            )


def _take_up_rows(trial: Any) -> None:
    """Gives Tune's loggers, which append, the rows up to the checkpoint that the trial goes on from.

    Tune does so for trials whose checkpoint it knows, and leaves rows in that training will come to again.
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


def _say_what_is_lost(trial: Any, progress: dict[str, Any]) -> None:
    name = f"{ENV_RUNNER_RESULTS}/{NUM_ENV_STEPS_SAMPLED_LIFETIME}"
    before = flatten_dict(trial.last_result or {}).get(name, 0)
    lost = int(before - progress[NUM_ENV_STEPS_SAMPLED_LIFETIME])
    if lost > 0:
        print(f"{trial}: {lost} environment steps are done again, after checkpoint {progress}", flush=True)
