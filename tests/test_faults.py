"""The tuned example as a process: killed, resumed, ended by a signal; and the command line that says so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import chaos
import numpy as np
import pyarrow.fs
import pytest
import ray
import torch
from ray import tune

from blpo_rllib import BLPO, BLPOConfig, checkpoints
from blpo_rllib.experiments import command_line, faults
from blpo_rllib.learning.learner import BLPOTorchLearner
from blpo_rllib.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
LOCAL = pyarrow.fs.LocalFileSystem()


class Example:
    """tuned_examples/cartpole_blpo.py as a user starts it, with a Ray of its own."""

    def __init__(self, output, *options):
        command = [sys.executable, "tuned_examples/cartpole_blpo.py", "--output", str(output)]
        command += ["--checkpoint-freq", "4", "--stop-reward", "1000", "--num-cpus", "1", *options]
        self.trial = output / "run/seed_0"
        # Short, for Ray's sockets.
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        self.log = Path(self.folder, "log.txt")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": self.folder, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_checkpoint(self, number):
        deadline = time.monotonic() + 120
        while not (self.trial / f"checkpoint_{number:06d}" / checkpoints.SEAL).exists():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def kill_a_learner(self):
        """As soon as there is one: while it is being made."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if learners := chaos.descendants(chaos.psutil.Process(self.process.pid), "learner"):
                learners[0].kill()
                return
            time.sleep(0.02)
        raise AssertionError(self.log.read_text()[-3000:])

    def end_with(self, number):
        """Its exit status after the signal, which a terminal sends to the group, and others to the process."""
        (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)
        return self.process.wait(timeout=60)

    def rows(self):
        return [json.loads(line) for line in (self.trial / "result.json").read_text().splitlines()]

    def progress(self):
        return checkpoints.newest_valid(LOCAL, str(self.trial))[1]["progress"]


def steps(row):
    return row["env_runners"]["num_env_steps_sampled_lifetime"]


def assert_consecutive(rows):
    assert [row["training_iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert (np.diff([steps(row) for row in rows]) > 0).all()
    assert (np.diff([row["time_total_s"] for row in rows]) > 0).all()


def went_on_after(rows):
    """The iteration of the checkpoint that the last start went on from."""
    return rows[-1]["training_iteration"] - rows[-1]["iterations_since_restore"]


def uninterrupted(iterations):
    """The rows of the same training in this process, by RLlib alone."""
    torch.set_num_threads(1)
    algo = TASKS["cartpole"].config().debugging(seed=0, log_level="ERROR").build_algo()
    rows = [algo.train() for _ in range(iterations)]
    algo.stop()
    return rows


def curve(rows):
    return [
        (steps(r), r["env_runners"]["num_episodes_lifetime"], r["learners"]["default_policy"]["vf_loss"]) for r in rows
    ]


def test_killed_run_resumes_by_itself_and_ends_with_a_checkpoint_on_sigterm(tmp_path):
    with Example(tmp_path) as first:
        first.wait_for_checkpoint(1)
        time.sleep(0.3)
        first.kill()
        reached = first.progress()["training_iteration"]
        assert reached >= 8
        before = first.rows()[:reached]
        assert len(before) == reached, "the rows up to the checkpoint are there"
    with Example(tmp_path, "--resume") as second:
        second.wait_for_checkpoint(reached // 4 + 1)
        assert second.end_with(signal.SIGTERM) == 128 + signal.SIGTERM
        assert "SIGTERM: ending with a checkpoint" in second.log.read_text()
        rows, progress = second.rows(), second.progress()
    assert_consecutive(rows)
    assert went_on_after(rows) == reached
    assert curve(rows[:reached]) == curve(before)
    assert progress["training_iteration"] == rows[-1]["training_iteration"] > reached
    assert progress["num_env_steps_sampled_lifetime"] == steps(rows[-1])
    assert len(checkpoints.checkpoints(LOCAL, str(tmp_path / "run/seed_0"))) == 3
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    np.testing.assert_allclose(curve(before), curve(uninterrupted(reached)), rtol=1e-3)
    ray.shutdown()


@pytest.mark.slow
def test_resumes_from_exactly_where_ctrl_c_ended_it(tmp_path):
    with Example(tmp_path) as first:
        first.wait_for_checkpoint(1)
        assert first.end_with(signal.SIGINT) == 128 + signal.SIGINT
        ended = first.progress()["training_iteration"]
        assert ended == len(first.rows())
    with Example(tmp_path, "--resume", "--stop-iters", str(ended + 2)) as second:
        assert second.process.wait(timeout=120) == 0
        assert_consecutive(second.rows())
        assert len(second.rows()) == ended + 2
        assert went_on_after(second.rows()) == ended


def test_starts_again_when_a_learner_dies_while_it_is_made(tmp_path):
    with Example(tmp_path, "--num-learners", "1", "--num-gpus-per-learner", "0", "--num-cpus", "2") as example:
        example.kill_a_learner()
        example.wait_for_checkpoint(0)
        assert example.end_with(signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_learner_that_cannot_be_made_is_said_to_the_user(tmp_path):
    class Unmade(BLPOTorchLearner):
        def __init__(self, **kwargs):
            raise FileNotFoundError("the teacher's weights")

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = BLPOConfig().environment("CartPole-v1").learners(num_learners=1, learner_class=Unmade)
    results = tune.Tuner(BLPO, param_space=config, run_config=tune.RunConfig(storage_path=str(tmp_path))).fit()
    ray.shutdown()
    assert "FileNotFoundError: the teacher's weights" in str(results.errors[0])


@pytest.fixture
def parse(monkeypatch, capsys):
    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["example.py", *map(str, options)])
        parser = command_line.example_parser(100.0, 1000)
        args = parser.parse_args()
        command_line._check_options(parser, args)
        return args

    return parse


def test_defaults(parse, tmp_path):
    args = parse("--output", tmp_path, "--resume")
    assert (args.checkpoint_freq, args.checkpoint_at_end, args.checkpoint_keep) == (10, True, 3)
    assert args.output == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], r"--resume needs --output PATH"),
        (["--output", "{used}"], r"--output .* holds a run: add --resume to go on with it, or name another place"),
        (["--output", "{used}", "--resume", "--no-tune"], "need Tune: leave out --no-tune"),
        (["--output", "nosuch://bucket/x"], "--output nosuch://bucket/x cannot be used: "),
        (["--output", "az://bucket/x"], "--output az://bucket/x cannot be used: "),
        (["--checkpoint-keep", "0"], "--checkpoint-keep 0 must be at least 1"),
    ],
)
def test_wrong_options_are_explained(parse, tmp_path, capsys, options, message):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit):
        parse(*(option.replace("{used}", str(tmp_path)) for option in options))
    assert re.search(message, capsys.readouterr().err)


def test_callbacks_never_end_training(caplog):
    def full_disk():
        raise OSError("No space left on device")

    faults.guarded(full_disk)
    assert "full_disk failed; training goes on" in caplog.text
