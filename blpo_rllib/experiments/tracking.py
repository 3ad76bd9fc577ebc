"""Trackers: Weights & Biases and TensorBoard, with the metrics in groups, and never in training's way.

The W&B logger derives from Ray's ``WandbLoggerCallback`` and replaces the processes that Ray starts for each run. Ray's
own would do with less code, but misses three figures that these have to meet (``benchmarks/tracker_cost.py``):

- *W&B lengthens training by 2 % at most.* Ray's processes, with the grouped metrics and in a thread of their own, made
  CartPole 13 to 16 % longer (medians of 2 rounds for a server that is dead, never answers or refuses the key; 300,000
  steps in 28 s, 584 rows; 2026-11-24, AMD EPYC, 2 cores), and its later half, after their start, 6 to 17 %. They are
  two for each run, one of which only holds the queue; they import Ray Tune (1.2 s of processor time against 0.4 s for
  W&B alone); and each row is a transfer. The ones here cost 0.0 to 0.4 % ± 0.3 % (6 rounds; 500,000 steps in 65 s, 974
  iterations; 2026-11-25, Intel Xeon, 2 cores).
- *A refused key ends nothing.* With Ray's callback it ends the experiment.
- *A server that cannot be reached costs no rows.* Ray's run ends when ``wandb.init`` gives up; these go on in files.

A logger that calls ``wandb`` in Tune's own process has not been measured. It would have to end W&B's exit handlers,
which wait for a server that never answers; Ray kills the process of an actor instead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.air.integrations.wandb import WANDB_ENV_VAR, WANDB_MODE_ENV_VAR, WandbLoggerCallback
from ray.cloudpickle import register_pickle_by_value
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback, TBXLoggerCallback
from ray.tune.result import TRAINING_ITERATION

from blpo_rllib.experiments import wandb_process
from blpo_rllib.experiments.metrics import grouped
from blpo_rllib.extras import require
from blpo_rllib.rllib_private import on_current_node, wandb_queue_items

logger = logging.getLogger(__name__)

WandbQueueItem = wandb_queue_items()

# Seconds that W&B gets to begin a run, after which it is written to files instead.
INIT_SECONDS = 30.0
# Seconds between two transfers of rows to a W&B run.
SEND_SECONDS = 2.0
# Seconds that a tracker gets to finish once training has ended.
FINISH_SECONDS = 60.0
# Seconds from an event to the moment when a tracker handles it: Tune, in the same process, first sends the trial on.
HANDLING_DELAY_SECONDS = 0.015
# Length of the queue of events before a tracker; events that find it full are lost.
QUEUE_LENGTH = 1000

register_pickle_by_value(wandb_process)


def trackers(
    task: str,
    group: str,
    output: Path,
    wandb_project: str | None = None,
    upload_checkpoints: bool = False,
    tags: Sequence[str] = (),
) -> list[LoggerCallback]:
    """Callbacks for Tune: TensorBoard always, W&B if a project is named.

    Args:
        task: What is trained.
        group: What the runs have in common, as a sweep's name.
        output: Where the runs live; with a trial's name it tells its W&B run apart, so that a trial that is resumed
            continues its run.
        wandb_project: W&B's project.
        upload_checkpoints: Make artifacts of checkpoints.
        tags: Further tags of the W&B runs.

    Raises:
        ImportError: If a project is named and wandb is not installed.
    """
    found: list[LoggerCallback] = [GroupedTensorBoard()]
    if wandb_project:
        require("wandb", "wandb", "logging to Weights & Biases")
        about = {"group": group, "tags": ["BLPO", task, group, *tags], "upload_checkpoints": upload_checkpoints}
        found.append(InBackground(GroupedWandb(task=task, output=output, project=wandb_project, **about)))
    return found


def example_trackers(config: AlgorithmConfig, args: argparse.Namespace) -> list[LoggerCallback]:
    """The trackers of a tuned example, from RLlib's own options.

    W&B is on with ``--wandb-project`` or ``--wandb-key``; without a key it writes files.

    Args:
        config: What is trained.
        args: The options of a tuned example.
    """
    wanted = bool(args.wandb_project or args.wandb_key)
    if args.wandb_key:
        os.environ[WANDB_ENV_VAR] = args.wandb_key
    task = re.sub(r"\W+", "-", str(config.env).lower())
    group = args.wandb_run_name or f"blpo-{task}"
    # W&B writes to a local folder; where results go to a URL it has one of its own, the same on every start.
    mark = hashlib.sha256(args.output.encode()).hexdigest()[:8] if args.output else f"{time.time():.0f}"
    output = args.output if args.output and "://" not in args.output else f"~/ray_results/{group}-{mark}"
    project = (args.wandb_project or f"blpo-{task}") if wanted else None
    return trackers(task, group, Path(output).expanduser(), project, upload_checkpoints=wanted)


class GroupedTensorBoard(TBXLoggerCallback):
    """Ray's TensorBoard logger with :mod:`~blpo_rllib.experiments.metrics`' names; a failed write is only logged."""

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        try:
            if trial not in self._trial_writer:
                self.log_trial_start(trial)
            metrics = grouped(result)
            for name, value in metrics.items():
                self._trial_writer[trial].add_scalar(name, value, global_step=int(metrics["throughput/env_steps"]))
            self._trial_result[trial] = metrics
            self._trial_writer[trial].flush()
        except Exception:
            logger.exception("TensorBoard did not take a result of %s; training goes on", trial)


class Mailbox:
    """Where the rows of a W&B run wait for each other: a transfer costs training's processor more than its rows do.

    Args:
        actor: The run's process.
    """

    def __init__(self, actor: Any):
        self._actor, self._sent = actor, -SEND_SECONDS
        self._waiting: list[tuple[str, Any]] = []

    def put(self, item: tuple[Any, Any]) -> None:
        """Sends what waits if the last transfer was :data:`SEND_SECONDS` ago, or if ``item`` is not a row."""
        kind, content = item
        # The name alone: to read Ray's, the run's process would import Ray Tune.
        self._waiting.append((kind.name, content))
        now = time.monotonic()
        if kind != WandbQueueItem.RESULT or now - self._sent >= SEND_SECONDS:
            self._actor.put.remote(self._waiting)
            self._waiting, self._sent = [], now


class GroupedWandb(WandbLoggerCallback):
    """Ray's W&B logger with grouped metrics, provenance, and runs that go on when their trials do.

    Args:
        task: What is trained: the runs' job type.
        output: Where the runs live.
        **kwargs: Ray's own, and those of ``wandb.init``.
    """

    def __init__(self, *, task: str, output: Path, **kwargs: Any):
        self._output = str(Path(output).resolve())
        Path(self._output).mkdir(parents=True, exist_ok=True)
        # By trial, the part of the run's configuration that is sent with the next row.
        self._new_config: dict[Trial, dict[str, Any]] = {}
        # The folder is not the trial's, whose copy in Tune's storage is made before W&B has written all.
        super().__init__(dir=self._output, upload_timeout=int(FINISH_SECONDS - 10), job_type=task, **kwargs)

    def setup(self, *args: Any, **kwargs: Any) -> None:
        if not has_key():
            logger.warning("no W&B key: runs are written to files, for `wandb sync` (WANDB_API_KEY or `wandb login`)")
            self.kwargs["mode"] = os.environ[WANDB_MODE_ENV_VAR] = "offline"
        super().setup(*args, **kwargs)

    def _start_logging_actor(self, trial: Trial, exclude_results: list[str], **init: Any) -> None:
        # In place of Ray's, which starts a second process for the queue alone, and none of Ray's idle ones.
        # Plain values: to read an object of RLlib's, W&B's process would import RLlib and torch.
        config = json.loads(json.dumps(init["config"], default=str, skipkeys=True))
        if trial in self._trial_logging_actors:
            # It was stopped, and goes on with what its scheduler changed.
            self._new_config[trial] = config
            return
        self._new_config[trial] = {}
        about = {"algorithm": "BLPO", "git_revision": git_revision(), "sweep": self.group}
        run = {"id": self.run_id(trial), "resume": "allow", "name": str(trial), "config": config | about}
        process = ray.remote(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            concurrency_groups={wandb_process.ARRIVALS: 1},
            **on_current_node(),
        )(wandb_process.WandbRun)
        settings = {"init_timeout": INIT_SECONDS, "silent": True}
        key = os.environ.get(WANDB_ENV_VAR)
        actor = process.remote(trial.local_path, key, settings, **(init | run))
        ended = actor.run.remote()
        self._trial_logging_actors[trial], self._trial_queues[trial] = actor, Mailbox(actor)
        self._trial_logging_futures[trial], self._logging_future_to_trial[ended] = ended, trial

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        if trial not in self._trial_logging_actors:
            self.log_trial_start(trial)
        step = result[TRAINING_ITERATION]
        metrics = {name: value for name, value in grouped(result).items() if not self._is_excluded(name)}
        # The configuration only when it is new: to pickle and read it with each row costs more than the row.
        config: dict[str, Any] = {}
        if trial in self._new_config:
            about = {name: result[name] for name in self.AUTO_CONFIG_KEYS if name in result}
            config = about | self._new_config.pop(trial)
        row = step, {TRAINING_ITERATION: step, **metrics}, config
        self._trial_queues[trial].put((WandbQueueItem.RESULT, row))

    def _is_excluded(self, name: str) -> bool:
        return any(name == excluded or name.startswith(f"{excluded}/") for excluded in self.excludes)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for trial in self._trial_queues:
            # Those of an interrupted experiment have not heard that it ends, and would be waited for.
            self._signal_logging_actor_stop(trial)
        super().on_experiment_end(trials, **info)
        if any(Path(self._output).glob("wandb/offline-run-*")):
            logger.warning("W&B runs are in files: `wandb sync %s/wandb/offline-run-*` sends them", self._output)

    def run_id(self, trial: Trial) -> str:
        """The same whenever a trial is started in this folder."""
        return hashlib.sha256(f"{self._output}/{Path(trial.local_path).name}".encode()).hexdigest()[:16]


def has_key() -> bool:
    """Whether W&B can be logged in to, or was told what to do."""
    if os.environ.get(WANDB_ENV_VAR) or os.environ.get(WANDB_MODE_ENV_VAR):
        return True
    try:
        return bool(importlib.import_module("wandb").api.api_key)
    except Exception:
        return False


def git_revision(folder: Path | None = None) -> str | None:
    """The commit of the code in ``folder`` (this package's), with a mark if files differ from it; None without git."""
    command = ["git", "-C", str(folder or Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class InBackground(LoggerCallback):
    """Runs a logger in a thread of its own, so that one that fails, hangs or is slow costs training nothing.

    Events wait in a queue of bounded length. At the end the logger gets :data:`FINISH_SECONDS`.

    Args:
        inner: The logger.
        finish_seconds: How long to wait for it at the end.
    """

    def __init__(self, inner: LoggerCallback, finish_seconds: float = FINISH_SECONDS):
        self._inner, self._finish_seconds = inner, finish_seconds
        self._events: queue.Queue[tuple[Callable[..., Any], tuple, dict] | None] | None = None
        self._thread: threading.Thread | None = None
        self._failures = self._lost = 0

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of the run's settings; threads do not go there.
        return {**self.__dict__, "_events": None, "_thread": None}

    def get_state(self) -> None:
        """None: trackers keep their own."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self._events = queue.Queue(QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._work, args=(self._events,), daemon=True, name="tracker")
        self._thread.start()
        self._put(self._inner.setup, *args, **kwargs)

    def log_trial_start(self, trial: Trial) -> None:
        self._put(self._inner.log_trial_start, trial)

    def log_trial_restore(self, trial: Trial) -> None:
        self._put(self._inner.log_trial_restore, trial)

    def log_trial_save(self, trial: Trial) -> None:
        self._put(self._inner.log_trial_save, trial)

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        # A copy: Tune adds to a result after its callbacks have it (ray/tune/experiment/trial.py, update_last_result),
        # and a dictionary that grows while the logger goes through it costs the row.
        self._put(self._inner.log_trial_result, iteration, trial, dict(result))

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        self._put(self._inner.log_trial_end, trial, failed)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Waits for the logger, but not for ever."""
        self._put(self._inner.on_experiment_end, trials, **info)
        if self._events is None or self._thread is None:
            return
        try:
            self._events.put(None, timeout=self._finish_seconds)
        except queue.Full:
            pass
        else:
            self._thread.join(self._finish_seconds)
        if self._thread.is_alive():
            logger.warning("%s did not finish in %g s and is left behind", self._name, self._finish_seconds)
        if self._failures or self._lost:
            logger.warning("%s failed %d times and lost %d events", self._name, self._failures, self._lost)

    @property
    def _name(self) -> str:
        return type(self._inner).__name__

    def _put(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            assert self._events is not None
            self._events.put_nowait((function, args, kwargs))
        except queue.Full:
            self._lost += 1

    def _work(self, events: queue.Queue) -> None:
        while (event := events.get()) is not None:
            function, args, kwargs = event
            if events.empty():
                time.sleep(HANDLING_DELAY_SECONDS)
            try:
                function(*args, **kwargs)
            except Exception as error:
                self._failures += 1
                if self._failures == 1:
                    logger.warning("%s failed in %s (%s); training goes on", self._name, function.__name__, error)
