"""MinAtar's games (Young & Tian 2019): ``.environment("blpo_rllib.sampling.minatar:MinAtar/Breakout-v1")``.

Importing this registers them with gymnasium, whose versions from 1.0 on do not ask packages for theirs; the part of the
name before the colon does so in every process.
"""

from __future__ import annotations

from importlib import import_module

import gymnasium as gym

from blpo_rllib.extras import require

require("minatar", "minatar", "MinAtar")
if "MinAtar/Breakout-v1" not in gym.registry:
    import_module("minatar.gym").register_envs()
