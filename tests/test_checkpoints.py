"""Checkpoints: whole or refused, kept through kills, and really taken back."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import ray
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.utils.filter import RunningStat
from ray.train._internal.storage import StorageContext
from test_learner import assert_equal

from blpo_rllib import BLPO, BLPOConfig, checkpoints
from blpo_rllib.checkpoints import CheckpointError

LOCAL = pyarrow.fs.LocalFileSystem()
# Ray's workers do not import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(env="CartPole-v1", config_class=BLPOConfig):
    c = config_class().environment(env).env_runners(num_env_runners=0, num_envs_per_env_runner=2)
    c.training(train_batch_size_per_learner=64, minibatch_size=32, num_epochs=1)
    return c.debugging(seed=0, log_level="ERROR")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints 0 and 1 of iterations 1 and 2."""
    folder = tmp_path_factory.mktemp("trial")
    algo = config().build_algo()
    for number in range(2):
        algo.train()
        algo.save_to_path(str(folder / f"checkpoint_{number:06d}"))
    algo.stop()
    return folder


def test_urls_that_only_fsspec_knows():
    filesystem, path = checkpoints.resolve("memory://bucket/run")
    assert checkpoints.newest_valid(filesystem, path) is None
    for number in range(2):
        folder = f"{path}/checkpoint_{number:06d}"
        filesystem.create_dir(folder)
        with filesystem.open_output_stream(f"{folder}/weights") as stream:
            stream.write(b"12345")
        checkpoints.seal(filesystem, folder, {"progress": number})
    assert checkpoints.newest_valid(filesystem, path)[1]["progress"] == 1
    with filesystem.open_output_stream(f"{path}/checkpoint_000001/weights") as stream:
        stream.write(b"123")
    assert checkpoints.newest_valid(filesystem, path)[1]["progress"] == 0
    checkpoints.prune(filesystem, path, keep=1)
    assert [checkpoints.index(found) for found in checkpoints.checkpoints(filesystem, path)] == [1]
    # Tune hands it to the trials.
    assert pickle.loads(pickle.dumps(filesystem)) == filesystem


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "run/seed_0"))


def truncate(checkpoint):
    file = checkpoint / "learner_group/learner/rl_module/default_policy/module_state.pkl"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(checkpoint):
    file = checkpoint / "learner_group/learner/state.pkl"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def other_folder(checkpoint):
    empty(checkpoint)
    (checkpoint / "holiday.jpg").write_bytes(b"...")


def other_algorithm(checkpoint):
    empty(checkpoint)
    ppo = config(config_class=PPOConfig).build_algo()
    ppo.save_to_path(str(checkpoint))
    ppo.stop()


UNUSABLE = {
    truncate: r"is torn: learner_group/learner/rl_module/default_policy/module_state.pkl has \d+ bytes",
    corrupt: r"is torn: learner_group/learner/state.pkl has \d+ bytes with checksum",
    lambda c: (c / "algorithm_state.pkl").unlink(): "is torn: algorithm_state.pkl is missing",
    lambda c: (
        c / checkpoints.SEAL
    ).unlink(): "its writing was cut off: it holds algorithm_state.pkl, .* but no blpo_ch",
    lambda c: (c / checkpoints.SEAL).write_text('{"files": {"a'): "is torn: blpo_checkpoint.json is unreadable",
    empty: "does not exist or is empty",
    other_folder: "is not a checkpoint of BLPO, or its writing was cut off: it holds holiday.jpg, but no",
    other_algorithm: "is not a checkpoint of BLPO, or its writing was cut off: it holds algorithm_state.pkl",
}


@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_unusable_checkpoint_is_named_and_the_one_before_is_used(folder, spoil, caplog):
    newest = folder / "checkpoint_000001"
    spoil(newest)
    with pytest.raises(CheckpointError, match=UNUSABLE[spoil]) as caught:
        BLPO.from_checkpoint(str(newest))
    assert str(newest) in str(caught.value)
    path, about = checkpoints.newest_valid(LOCAL, str(folder))
    assert path == str(folder / "checkpoint_000000")
    assert about["progress"]["training_iteration"] == 1
    assert str(caught.value) in caplog.text


def in_trial(folder, monkeypatch):
    """The algorithm as Tune makes it for the trial whose folder this is."""
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    storage = StorageContext(str(folder.parents[1]), folder.parent.name, trial_dir_name=folder.name)
    return BLPO(config=config(), storage=storage)


def test_trial_goes_on_from_the_newest_whole_checkpoint(folder, monkeypatch):
    truncate(folder / "checkpoint_000001")
    algo = in_trial(folder, monkeypatch)
    assert algo.iteration == 1
    algo.train()
    saved = algo.save()
    algo.stop()
    assert saved.checkpoint.path == str(folder / "checkpoint_000002"), "the torn one is not written into"
    assert saved.metrics["training_iteration"] == 2
    assert saved.metrics["env_runners"]["num_env_steps_sampled_lifetime"] == 128
    again = in_trial(folder, monkeypatch)
    assert again.iteration == 2
    # What Tune may know from before is older than that, and torn.
    again.restore(str(folder / "checkpoint_000001"))
    assert again.iteration == 2
    again.stop()


def test_trial_without_a_whole_checkpoint_starts_anew(folder, monkeypatch):
    for number in range(2):
        truncate(folder / f"checkpoint_{number:06d}")
    algo = in_trial(folder, monkeypatch)
    assert algo.iteration == 0
    with pytest.raises(CheckpointError, match="is torn"):
        algo.restore(str(folder / "checkpoint_000001"))
    algo.stop()


def test_old_checkpoints_are_deleted_and_what_cannot_be_is_left(folder, monkeypatch, caplog):
    (folder / "checkpoints.txt").touch()
    checkpoints.prune(LOCAL, str(folder), keep=2)
    assert len(checkpoints.checkpoints(LOCAL, str(folder))) == 2
    monkeypatch.setattr(checkpoints, "checkpoints", lambda *args: ["/no/such/checkpoint_000000", "newest"])
    checkpoints.prune(LOCAL, str(folder), keep=1)
    assert "old checkpoint /no/such/checkpoint_000000 was not deleted" in caplog.text


def kill_while_writing(folder, kills):
    script = Path(__file__).with_name("kill_while_writing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(kills)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_while_checkpoints_are_written_leave_a_whole_one(tmp_path, kills):
    outcome = kill_while_writing(tmp_path, kills)
    assert outcome["kills"] == kills
    assert kills < 100 or outcome["torn"] > 5, "too few kills struck in the middle: this shows little"


def module_weights(worker):
    return {name: np.array(value) for name, value in worker.module.get_state().items()}


def test_live_algorithm_really_goes_back(tmp_path):
    algo = config().env_runners(num_env_runners=1).build_algo()
    algo.train()
    algo.save_to_path(str(tmp_path))
    kept = algo.learner_group.get_state()["learner"]
    (acting,) = algo.env_runner_group.foreach_env_runner(module_weights, local_env_runner=False)
    for _ in range(3):
        algo.train()
    (moved,) = algo.env_runner_group.foreach_env_runner(module_weights, local_env_runner=False)
    assert any((moved[name] != acting[name]).any() for name in acting)
    algo.restore_from_path(str(tmp_path))
    state = algo.learner_group.get_state()["learner"]
    for component in ("rl_module", "optimizer", "bilevel", "learner_connector", "weights_seq_no"):
        assert_equal(kept[component], state[component])
    (restored,) = algo.env_runner_group.foreach_env_runner(module_weights, local_env_runner=False)
    assert_equal(restored, acting)
    # RLlib would ignore the weights of the next updates too, until there are as many as before.
    algo.train()
    (acting_now,) = algo.env_runner_group.foreach_env_runner(module_weights, local_env_runner=False)
    learned = algo.learner_group.get_weights()["default_policy"]
    assert_equal(acting_now, {name: np.array(learned[name]) for name in acting_now})
    algo.stop()


def test_checkpoint_on_another_filesystem(tmp_path):
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path), LOCAL)
    algo = config().build_algo()
    algo.train()
    algo.save_to_path("bucket/checkpoint", filesystem=remote)
    acting = module_weights(algo.env_runner)
    algo.train()
    algo.restore_from_path("bucket/checkpoint", filesystem=remote)
    assert algo.iteration == 1
    assert_equal(module_weights(algo.env_runner), acting)
    algo.stop()
    (tmp_path / "bucket/checkpoint/algorithm_state.pkl").unlink()
    with pytest.raises(CheckpointError, match="bucket/checkpoint is torn"):
        BLPO.from_checkpoint("bucket/checkpoint", filesystem=remote)


def filter_count(runner):
    (connector,) = runner._env_to_module[MeanStdFilter]
    return RunningStat.from_state(connector.get_state()[None]["running_stats"][0]).n


def test_killed_env_runner_is_replaced_with_statistics_and_counters_intact():
    c = config().env_runners(num_env_runners=2, env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    algo = c.build_algo()
    steps = [algo.train()["env_runners"]["num_env_steps_sampled_lifetime"] for _ in range(3)]
    before = min(algo.env_runner_group.foreach_env_runner(filter_count, local_env_runner=False))
    assert before >= 64
    victim = algo.env_runner_group.foreach_env_runner(lambda runner: os.getpid(), local_env_runner=False)[0]
    os.kill(victim, 9)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        steps.append(algo.train()["env_runners"]["num_env_steps_sampled_lifetime"])
        pids = algo.env_runner_group.foreach_env_runner(lambda runner: os.getpid(), local_env_runner=False)
        if len(pids) == 2 and victim not in pids:
            break
    assert len(pids) == 2
    steps.append(algo.train()["env_runners"]["num_env_steps_sampled_lifetime"])
    assert (np.diff(steps) >= 0).all()
    assert steps[-1] > steps[3]
    counts = algo.env_runner_group.foreach_env_runner(filter_count, local_env_runner=False)
    assert min(counts) > before, "the new EnvRunner has the statistics of all"
    algo.stop()


def kills_a_learner(folder):
    """RLlib callbacks, in the trial's process: kills a learner in iteration 5, once; keeps what is restored."""

    def on_train_result(algorithm, **kwargs):
        if algorithm.iteration == 5 and not (folder / "killed").exists():
            (folder / "killed").touch()
            (victim,) = algorithm.learner_group.foreach_learner(lambda learner: os.getpid())
            os.kill(victim.get(), 9)

    def on_checkpoint_loaded(algorithm, **kwargs):
        state = algorithm.learner_group.get_state()["learner"]
        (folder / "restored.pkl").write_bytes(pickle.dumps(state))

    return {"on_train_result": on_train_result, "on_checkpoint_loaded": on_checkpoint_loaded}


def test_killed_learner_sends_the_trial_back_to_its_checkpoint(tmp_path):
    c = config().learners(num_learners=1, num_cpus_per_learner=1).training(normalize_rewards=True)
    c.callbacks(**kills_a_learner(tmp_path))
    run = tune.RunConfig(
        storage_path=str(tmp_path),
        name="run",
        stop={"training_iteration": 7},
        verbose=0,
        failure_config=tune.FailureConfig(max_failures=1),
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=4, checkpoint_at_end=True),
    )
    (result,) = tune.Tuner(BLPO, param_space=c, run_config=run).fit()
    assert result.error is None
    assert result.metrics["training_iteration"] == 7
    # Not those of three iterations more.
    assert 7 * 64 <= result.metrics["env_runners"]["num_env_steps_sampled_lifetime"] < 8 * 64
    trial = Path(result.path)
    restored = pickle.loads((tmp_path / "restored.pkl").read_bytes())
    expected = config().training(normalize_rewards=True).build_algo()
    expected.restore_from_path(str(trial / "checkpoint_000000"))
    assert expected.iteration == 4
    state = expected.learner_group.get_state()["learner"]
    for component in ("rl_module", "optimizer", "bilevel", "learner_connector"):
        assert_equal(state[component], restored[component])
    expected.stop()
