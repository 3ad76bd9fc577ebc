"""What runs in the process that Ray starts for each W&B run.

It goes there by value (:mod:`blpo_rllib.tracking` sees to that), so that this process, which starts beside training,
imports neither this package nor torch and RLlib. Hence this module uses nothing of the package.
"""

from __future__ import annotations

import logging

import wandb
from ray.air.integrations.wandb import _WandbLoggingActor

logger = logging.getLogger(__name__)


class OfflineFallback(_WandbLoggingActor):
    """Ray's process for a W&B run, which writes files where W&B cannot be reached."""

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
