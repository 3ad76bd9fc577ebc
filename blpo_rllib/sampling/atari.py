"""Atari games as images of 42 × 42 × 4 bytes: ``.environment("blpo_rllib.sampling.atari:SmallPong-v0")``.

Importing this registers them with gymnasium; the part of the name before the colon does so in every process.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformObservation

from blpo_rllib.extras import require

GAMES = ("Breakout", "Freeway", "Pong", "SpaceInvaders")
SIZE = 42
NUM_FRAMES = 4


def make(game: str, **kwargs: object) -> gym.Env:
    """The game, a step of which is four frames; its observation is the last four steps' screens, in grey.

    Raises:
        ImportError: If the emulator is not installed.
    """
    gym.register_envs(require("ale_py", "atari", game))
    env = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0, **kwargs)
    env = AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=SIZE, grayscale_obs=True)
    space = gym.spaces.Box(0, 255, (SIZE, SIZE, NUM_FRAMES), np.uint8)
    return TransformObservation(FrameStackObservation(env, NUM_FRAMES), lambda x: np.moveaxis(x, 0, -1), space)


for _game in GAMES:
    if f"Small{_game}-v0" not in gym.registry:
        gym.register(f"Small{_game}-v0", entry_point="blpo_rllib.sampling.atari:make", kwargs={"game": _game})
