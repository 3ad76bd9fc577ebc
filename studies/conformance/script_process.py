"""The process of one example script: runs it as a program, and keeps account of what its algorithms did."""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from studies.conformance.scripts import EXAMPLES, Script

# Where a script sets nothing itself.
SMALL_BATCH = 256
COMMON = ["--stop-iters=1", "--num-env-runners=0"]
# Where processes of the script's Ray, such as Tune's trials, find the folder of its records.
FOLDER = "CONFORMANCE_FOLDER"


def run(script: Script, algorithm: str, folder: str, address: str) -> None:
    """Runs the script; leaves records of training steps, ``log.txt`` and ``end.json`` (the error, or null)."""
    os.setsid()
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RAY_ADDRESS": address,
        "WANDB_MODE": "offline",
        "SDL_VIDEODRIVER": "dummy",
        # Where `serve` is.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        FOLDER: folder,
        # What `ray.init` in the script takes over.
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": _of_workers(folder)}),
    }
    os.chdir(folder)
    options = COMMON if script.takes_examples_options else []
    if options and not script.needs_tune:
        options = [*options, "--no-tune"]
    algo = ["--algo=BLPO"] if algorithm == "BLPO" and script.takes_algo else []
    path = Path(folder) / Path(script.path).name
    path.write_text(script.with_blpo() if algorithm == "BLPO" else script.source)
    # What it looks for beside itself.
    (path.parent / "classes").symlink_to((EXAMPLES / script.path).parent / "classes")
    sys.argv = [str(path), *options, *algo, *script.options]
    # A script without these options trains until it has learnt.
    if script.takes_examples_options:
        _make_defaults_small(algorithm)
    record_training()
    error = None
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            error = {"message": f"exit status {exit_.code}", "by_blpo": False}
    except BaseException as exception:
        traceback.print_exc()
        error = {"message": f"{type(exception).__name__}: {exception}", "by_blpo": _is_refusal(exception)}
    (Path(folder) / "end.json").write_text(json.dumps(error))
    os._exit(0)


def _is_refusal(exception: BaseException) -> bool:
    """Whether this project raised it, as it does for settings that cannot be."""
    frames = traceback.extract_tb(exception.__traceback__)
    return isinstance(exception, ValueError) and any("blpo_rllib" in Path(f.filename).parts for f in frames[-3:])


def _make_defaults_small(algorithm: str) -> None:
    if algorithm == "BLPO":
        from blpo_rllib import BLPOConfig as Config

        small = {"train_batch_size_per_learner": SMALL_BATCH, "num_envs_per_env_runner": 4, "num_epochs": 1}
    else:
        from ray.rllib.algorithms.ppo import PPOConfig as Config

        small = {"train_batch_size": SMALL_BATCH, "num_epochs": 1}
    original = Config.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, value in small.items():
            # Not as if the user had set it.
            object.__setattr__(self, name, value)

    Config.__init__ = init


def _of_workers(folder: str) -> dict[str, Any]:
    """The runtime environment of the script's Ray."""
    hook = f"{record_training.__module__}.{record_training.__name__}"
    return {"env_vars": {FOLDER: folder}, "worker_process_setup_hook": hook}


def record_training() -> None:
    """After each step of an algorithm: its learner's class, and how many steps it has trained on."""
    from ray.rllib.algorithms.algorithm import Algorithm

    original, folder = Algorithm.step, Path(os.environ[FOLDER])

    def step(self: Any) -> Any:
        results = original(self)
        group = getattr(self, "learner_group", None)
        cls = self.config.learner_class if group is not None else None
        learners = results.get("learners", {})
        steps = sum(int(_value(x.get("num_module_steps_trained", 0))) for x in learners.values() if isinstance(x, dict))
        record = {
            "algorithm": type(self).__name__,
            "learner": None if cls is None else cls.__name__,
            "is_blpo": cls is not None and any(base.__name__ == "BLPOTorchLearner" for base in cls.__mro__),
            "steps": steps,
        }
        with open(folder / f"steps{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        return results

    Algorithm.step = step


def _value(x: Any) -> Any:
    return x.peek() if hasattr(x, "peek") else x
