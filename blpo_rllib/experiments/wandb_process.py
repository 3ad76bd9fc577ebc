"""The process that Ray starts for each W&B run.

The class goes there by value (:mod:`blpo_rllib.experiments.tracking` sees to that), so that the process imports nothing
of the package, nor Ray Tune. It imports W&B only after it has lowered its priority, because training starts beside it.
"""

from __future__ import annotations

import logging
import os
import queue
from typing import Any

import ray

logger = logging.getLogger(__name__)

# Where `put` runs, beside `run`.
ARRIVALS = "arrivals"
# Added to the process' niceness: it takes what training leaves, but is not starved on a full machine.
NICENESS = 10


class WandbRun:
    """A W&B run's process, which writes files where W&B cannot be reached.

    In place of Ray's, whose module imports Ray Tune (1.2 s of processor time against 0.4 s for W&B alone), and which
    has one more process that only holds the queue.

    Args:
        folder: Working directory.
        key: W&B's; None if the machine has it.
        settings: For ``wandb.Settings``.
        **init: For ``wandb.init``.
    """

    def __init__(self, folder: str, key: str | None, settings: dict[str, Any], **init: Any):
        os.chdir(folder)
        if key:
            os.environ["WANDB_API_KEY"] = key
        self._folder, self._settings, self._init = folder, settings, init
        self._arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    @ray.method(concurrency_group=ARRIVALS)
    def put(self, items: list[tuple[str, Any]]) -> None:
        """Takes items in their order.

        Args:
            items: The name of one of Ray's ``_QueueItem`` with a row's step, metrics and configuration, the folder of
                a checkpoint, or nothing.
        """
        for item in items:
            self._arrived.put(item)

    def run(self) -> None:
        """Writes the run until it is told that it ends."""
        os.nice(NICENESS)
        import wandb

        settings = wandb.Settings(**self._settings)
        try:
            run = wandb.init(settings=settings, **self._init)
        except (wandb.errors.Error, OSError) as error:
            logger.warning("W&B could not begin run %s, which goes to files: %s", self._init["id"], error)
            # W&B's own process still holds the run that did not begin.
            wandb.teardown()
            run = wandb.init(settings=settings, **self._init | {"mode": "offline"})
        run.config.update({"trial_log_path": self._folder}, allow_val_change=True)
        if "WANDB_PROCESS_RUN_INFO_HOOK" in os.environ:
            from ray.air.integrations.wandb import _run_wandb_process_run_info_hook

            _run_wandb_process_run_info_hook(run)
        self._follow(run)
        run.finish()
        # Ray kills this process next; until W&B's own has ended, its last rows may not be in the file.
        wandb.teardown()

    def _follow(self, run: Any) -> None:
        while (item := self._arrived.get())[0] != "END":
            kind, content = item
            if kind == "CHECKPOINT":
                self._keep(run, content)
                continue
            step, metrics, config = content
            if config:
                run.config.update(config, allow_val_change=True)
            run.log(metrics, step=step)

    def _keep(self, run: Any, checkpoint: str) -> None:
        try:
            run.log_artifact(checkpoint, name=f"checkpoint_{self._init['name']}", type="model")
        except (OSError, ValueError) as error:
            # Tune may have deleted it, for a better one.
            logger.warning("no artifact of %s: %s", checkpoint, error)
