"""Plays episodes with a trained policy: their returns, and with ``--video`` a recording of the first one.

The policy acts without noise, on the observation statistics that training had at the checkpoint.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from blpo_rllib.checkpoints import CheckpointError
from blpo_rllib.extras import require
from blpo_rllib.policy import Policy, evaluate, load_policy, load_settings
from blpo_rllib.sampling.envpool import envpool_task

PROG = "python -m blpo_rllib.play"
RENDER = {"render_mode": "rgb_array"}
# What the renderers of MuJoCo need where there is no display.
MUJOCO_RENDERERS = {"egl": "EGL", "osmesa": "OSMesa"}


class Recorder(gym.Wrapper):
    """Keeps the pictures of the first episode, as many per second as the video shows.

    Args:
        env: The environment, with ``render_mode="rgb_array"``.
        fps: Pictures per second of the environment's time.
        seconds: Length of the video at most, in the environment's time.
        height: Of the pictures, in pixels.
    """

    def __init__(self, env: gym.Env, fps: int, seconds: float, height: int):
        super().__init__(env)
        self._image = require("PIL.Image", "video", "a video")
        self._steps_per_frame = max(1.0, env.metadata.get("render_fps", fps) / fps)
        self._most, self._height = round(fps * seconds), height
        self.frames: list[np.ndarray] = []
        self._episodes = self._steps = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begins an episode, of which the first is recorded."""
        found = super().reset(**kwargs)
        self._episodes, self._steps = self._episodes + 1, 0
        self._record()
        return found

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Makes a step, and a picture of it if one is due."""
        found = super().step(action)
        self._steps += 1
        self._record()
        return found

    def _record(self) -> None:
        due = self._steps >= len(self.frames) * self._steps_per_frame
        if self._episodes == 1 and due and len(self.frames) < self._most:
            picture = self._image.fromarray(self.env.render())
            width = round(picture.width * self._height / picture.height / 2) * 2
            self.frames.append(np.asarray(picture.resize((width, self._height))))


def make_env(settings: Mapping[str, Any], options: Mapping[str, Any], name: str | None = None) -> gym.Env:
    """The environment that settings name, or the one called ``name``.

    Args:
        settings: Of the checkpoint.
        options: Further arguments of the environment.
        name: A gymnasium ID, for environments that are registered with Ray in the program that trained.

    Raises:
        ValueError: If the environment cannot be made here.
    """
    trained_in = settings["env"]
    env = name or envpool_task(trained_in) or trained_in
    # EnvPool's options are of its own kind, and another environment's are unknown.
    arguments = {**(settings["env_config"] if env == trained_in else {}), **options}
    if not isinstance(env, str):
        return env(arguments)
    try:
        return gym.make(env, **arguments)
    except gym.error.UnregisteredEnv as error:
        raise ValueError(f"env={env!r} is not known to gymnasium: name one that is with --env ({error})") from error


def choose_renderer() -> None:
    """Lets pygame and MuJoCo render without a display; variables that are set already are the user's own choice."""
    if "DISPLAY" in os.environ:
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if "MUJOCO_GL" in os.environ:
        return
    for name, library in MUJOCO_RENDERERS.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = name
            return


def write_video(frames: list[np.ndarray], path: Path, fps: int) -> None:
    """Writes the pictures to a file of the kind that its name says.

    Raises:
        ImportError: If imageio, or its plugin for this kind of file, is not installed.
    """
    imageio = require("imageio.v3", "video", "a video")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        imageio.imwrite(path, frames, duration=1000 / fps, loop=0)
        return
    require("imageio_ffmpeg", "video", "an MP4 file")
    imageio.imwrite(path, frames, fps=fps, macro_block_size=2, output_params=["-pix_fmt", "yuv420p"])


def play(policy: Policy, env: gym.Env, episodes: int, seed: int) -> np.ndarray:
    """Plays, and prints each return and their mean."""
    returns = evaluate(policy, env, episodes, seed)
    for number, value in enumerate(returns):
        print(f"episode {number + 1} (seed {seed + number}): return {value:.1f}")
    print(f"mean return of {episodes} episodes: {returns.mean():.1f} (± {returns.std():.1f})")
    return returns


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=PROG, description=__doc__)
    p.add_argument("checkpoint", help="a checkpoint, or the folder of a run, whose newest whole one is taken; or a URL")
    p.add_argument("--episodes", type=int, default=10, metavar="N", help="how many (10)")
    p.add_argument("--seed", type=int, default=0, help="of the first episode; the next ones take seed + 1, ... (0)")
    p.add_argument(
        "--env", metavar="ID", help="gymnasium environment in place of the one that the policy was trained in"
    )
    p.add_argument("--video", type=Path, metavar="FILE", help="record the first episode: FILE.gif or FILE.mp4")
    p.add_argument("--fps", type=int, default=25, help="pictures per second of the video (25)")
    p.add_argument("--seconds", type=float, default=20.0, help="length of the video at most (20)")
    p.add_argument("--height", type=int, default=240, help="of the video, in pixels (240)")
    return p


def main() -> None:
    p = parser()
    args = p.parse_args()
    if args.episodes < 1:
        p.error(f"--episodes {args.episodes} must be at least 1")
    if args.video and args.video.suffix not in (".gif", ".mp4"):
        p.error(f"--video {args.video} must end in .gif or .mp4")
    try:
        _play_as_asked(args)
    except (CheckpointError, ValueError, ImportError) as error:
        p.error(str(error))


def _play_as_asked(args: argparse.Namespace) -> None:
    if args.video:
        choose_renderer()
        require("imageio", "video", "a video")
    policy = load_policy(args.checkpoint)
    env = make_env(load_settings(args.checkpoint), RENDER if args.video else {}, args.env)
    if not args.video:
        play(policy, env, args.episodes, args.seed)
        return
    recorder = Recorder(env, args.fps, args.seconds, args.height)
    play(policy, recorder, args.episodes, args.seed)
    write_video(recorder.frames, args.video, args.fps)
    print(f"video: {args.video}, {args.video.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
