"""BLPO: bi-level policy optimization with Nyström hypergradients, as an RLlib algorithm.

Importing this package registers the trainable "BLPO" with Ray Tune.
"""

import importlib
import sys

from ray.tune.registry import register_trainable

from blpo_rllib.blpo import BLPO, BLPOConfig

__version__ = "0.1.0"
__all__ = ["BLPO", "BLPOConfig"]

# Checkpoints of version 0.1.0 find classes under the names that their modules had then.
_MOVED = {
    "connectors": "learning.connectors",
    "learner": "learning.learner",
    "players": "learning.players",
    "rl_module": "learning.rl_module",
    "acting": "sampling.acting",
    "env_runner": "sampling.env_runner",
    "envpool": "sampling.envpool",
    "process_env": "sampling.process_env",
}
for _old, _new in _MOVED.items():
    sys.modules[f"{__name__}.{_old}"] = importlib.import_module(f"{__name__}.{_new}")

register_trainable("BLPO", BLPO)
