"""What runs in the process that Ray starts for each W&B run.

It goes there by value (:mod:`blpo_rllib.tracking` sees to that), so that this process, which starts beside training,
imports neither this package nor torch and RLlib. Hence this module uses nothing of the package.
"""

from __future__ import annotations

import logging
import os
import queue
from typing import Any

import ray
import wandb
from ray.air.integrations.wandb import WANDB_ENV_VAR, _WandbLoggingActor

logger = logging.getLogger(__name__)

# Where `put` runs, beside `run`.
ARRIVALS = "arrivals"


class WandbRun(_WandbLoggingActor):
    """Ray's process for a W&B run, which writes files where W&B cannot be reached.

    Its rows come to it straight: Ray's callback has one more process for each run, that only holds the queue.

    Args:
        key: W&B's; None if the machine has it.
        **kwargs: Ray's.
    """

    def __init__(self, key: str | None = None, **kwargs: Any):
        if key:
            os.environ[WANDB_ENV_VAR] = key
        super().__init__(queue=queue.SimpleQueue(), **kwargs)

    @ray.method(concurrency_group=ARRIVALS)
    def put(self, items: list[tuple[Any, Any]]) -> None:
        """Takes items of Ray's queue, in their order."""
        for item in items:
            self.queue.put(item)

    def run(self) -> None:
        try:
            super().run()
        except (wandb.errors.Error, OSError) as error:
            # Nothing was taken from the queue: it is the start of the run that fails so.
            logger.warning("W&B could not begin run %s, which goes to files: %s", self.kwargs["id"], error)
            # W&B's own process still holds the run that did not begin.
            self._wandb.teardown()
            self.kwargs["mode"] = "offline"
            super().run()
        # Ray kills this process next; until W&B's own has ended, its last rows may not be in the file.
        self._wandb.teardown()
