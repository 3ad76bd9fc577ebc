"""Every option of RLlib's examples does here what it does in RLlib's own function, which is run beside ours."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import ray
from ray import tune
from ray.rllib.examples.utils import run_rllib_example_script_experiment

from blpo_rllib import BLPO, BLPOConfig
from blpo_rllib.experiments import command_line
from blpo_rllib.tasks import TASKS

RETURN = "env_runners/episode_return_mean"
REACHED = 450.0


class Results(list):
    """As much of a ResultGrid as is looked at."""

    errors = ()

    def __init__(self):
        metrics = {"env_runners": {"episode_return_mean": REACHED}, "config": {}, "training_iteration": 3}
        super().__init__([SimpleNamespace(metrics=metrics, path="/run/seed_0")])
        trial = SimpleNamespace(status="TERMINATED", last_result=metrics)
        self._experiment_analysis = SimpleNamespace(trials=[trial])

    def get_dataframe(self):
        return pd.DataFrame([{RETURN: REACHED}])


class Recorder:
    """In place of Tune's Tuner: keeps what it was made of."""

    made: list = []

    def __init__(self, trainable, *, param_space, run_config, tune_config):
        about = SimpleNamespace(trainable=trainable, config=param_space, run=run_config, tune=tune_config)
        self.made.append(about)

    def fit(self):
        return Results()


@pytest.fixture
def tuners(monkeypatch):
    """Runs ours and RLlib's with the same options on the same config; what each made a Tuner of."""
    monkeypatch.setattr(tune, "Tuner", Recorder)
    monkeypatch.setattr(ray, "init", lambda **kwargs: started.append(kwargs))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(command_line, "_report", lambda *_: None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    started = []

    def run(*options, config=None):
        config = config or TASKS["cartpole"].config()
        parser = command_line.example_parser(475.0, 5000)
        args = parser.parse_args(options)
        made = []
        for function in (
            lambda c: command_line.run_example(c, stop_reward=475.0, stop_timesteps=5000, options=options),
            lambda c: run_rllib_example_script_experiment(c.debugging(seed=args.seed), args),
        ):
            Recorder.made, started[:] = [], []
            function(config.copy(copy_frozen=False))
            (tuner,), (init,) = Recorder.made, started
            tuner.init, tuner.criteria = init, dict(getattr(tuner.run.stop, "_criteria", tuner.run.stop))
            made.append(tuner)
        return made

    return run


def plain(config):
    # Which fields were set by hand is no setting itself.
    found = config.to_dict().items()
    return {name: value for name, value in found if not callable(value) and name != "set_by_user"}


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--num-env-runners 2",
        "--num-envs-per-env-runner 8",
        "--num-learners 2 --num-envs-per-env-runner 8",
        "--num-learners 3 --num-envs-per-env-runner 12",
        "--num-gpus-per-learner 0",
        "--num-gpus-per-learner 0.5 --num-learners 1",
        "--num-cpus-per-learner 2",
        "--evaluation-interval 5 --evaluation-num-env-runners 1",
        "--evaluation-interval 5 --evaluation-duration 7 --evaluation-duration-unit timesteps",
        "--evaluation-interval 1 --evaluation-num-env-runners 1 --evaluation-parallel-to-training "
        "--evaluation-duration auto",
        "--log-level ERROR",
        "--stop-reward 100 --stop-iters 7 --stop-timesteps 800",
        "--checkpoint-freq 4",
        "--max-concurrent-trials 1",
        "--verbose 0",
        "--num-cpus 3",
        "--env Acrobot-v1",
        "--stop-reward 450 --as-test --verbose 2",
        "--seed 3",
    ],
)
def test_options_do_what_they_do_in_rllib(tuners, options):
    ours, rllibs = tuners(*options.split())
    given = plain(ours.config)
    assert given.pop("seed") == {"grid_search": [plain(rllibs.config)["seed"]]}
    assert given == {name: value for name, value in plain(rllibs.config).items() if name != "seed"}
    assert ours.criteria == rllibs.criteria
    assert ours.run.verbose == rllibs.run.verbose
    assert ours.run.checkpoint_config == rllibs.run.checkpoint_config
    assert ours.tune.max_concurrent_trials == rllibs.tune.max_concurrent_trials
    assert ours.trainable is rllibs.trainable is BLPO
    assert ours.init == rllibs.init


def test_every_option_differs_from_the_default_in_this_test(tuners):
    """Without this the comparison above could pass by ignoring an option on both sides."""
    default, _ = tuners()
    for options, field, value in (
        ("--num-env-runners 2", "num_env_runners", 2),
        ("--num-envs-per-env-runner 8", "num_envs_per_env_runner", 8),
        ("--num-learners 2 --num-envs-per-env-runner 8", "num_learners", 2),
        ("--num-gpus-per-learner 0", "num_gpus_per_learner", 0),
        ("--num-cpus-per-learner 2", "num_cpus_per_learner", 2.0),
        ("--evaluation-interval 5", "evaluation_interval", 5),
        ("--log-level ERROR", "log_level", "ERROR"),
    ):
        ours, _ = tuners(*options.split())
        assert getattr(ours.config, field) == value != getattr(default.config, field)


def test_env_is_for_configs_without_one(tuners):
    ours, rllibs = tuners("--env", "Acrobot-v1", config=BLPOConfig())
    assert ours.config.env == rllibs.config.env == "Acrobot-v1"


def test_samples_are_seeds(tuners):
    ours, rllibs = tuners("--num-samples", "3", "--seed", "5")
    assert rllibs.tune.num_samples == 3
    assert ours.tune.num_samples == 1
    assert ours.config.seed == {"grid_search": [5, 6, 7]}


def test_more_gpus_than_there_are(tuners):
    with pytest.raises(ValueError, match="needs 3 GPUs, but Ray has 2: ask for fewer"):
        tuners("--num-learners", "3", "--num-gpus-per-learner", "1")


def test_a_missed_reward_fails_the_test(tuners):
    with pytest.raises(ValueError, match="of 475.0 not reached! Best value reached is 450.0"):
        command_line.run_task("cartpole", ["--as-test"])


@pytest.mark.parametrize("reward", ["450", "475"])
def test_release_tests_find_the_file_that_rllib_writes(tuners, reward, tmp_path, monkeypatch):
    options = ["--as-release-test", "--stop-reward", reward]
    summaries = []

    def ours():
        command_line.run_task("cartpole", options)

    def rllibs():
        args = command_line.example_parser(475.0, 5000).parse_args(options)
        run_rllib_example_script_experiment(TASKS["cartpole"].config(), args)

    for function in (ours, rllibs):
        path = tmp_path / "summary.json"
        monkeypatch.setenv("TEST_OUTPUT_JSON", str(path))
        function()
        summaries.append(json.loads(path.read_text()))
        path.unlink()
    ours, rllibs = summaries
    assert ours.keys() == rllibs.keys()
    assert len(ours.pop("failures")) == len(rllibs.pop("failures")) == (reward == "475")
    different = ("time_taken", "last_update")
    assert {k: v for k, v in ours.items() if k not in different} == {
        k: v for k, v in rllibs.items() if k not in different
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--local-mode", "--local-mode has no meaning here: RLlib no longer supports it"),
        ("--enable-new-api-stack", "it is the default"),
        ("--old-api-stack", "BLPO runs on RLlib's new API stack only"),
        ("--num-gpus 1", "it is --num-gpus-per-learner and --num-learners"),
        ("--num-agents 2", "--num-agents has no meaning here: the task has as many agents as its environment"),
        ("--algo PPO", "--algo PPO has no meaning here: the settings are BLPO's"),
        ("--as-test --no-tune", "--as-test and --as-release-test need Tune"),
        ("--num-samples 0", "--num-samples 0 must be at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message, capsys):
    parser = command_line.example_parser(475.0, 5000)
    with pytest.raises(SystemExit):
        command_line._check_options(parser, parser.parse_args(options.split()))
    assert message in capsys.readouterr().err


def test_wandb_options(tuners, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "")
    options = ["--wandb-key", "k", "--wandb-project", "p", "--wandb-run-name", "n"]
    ours, rllibs = tuners(*options)
    (wandb,) = [c._inner for c in ours.run.callbacks if type(c).__name__ == "InBackground"]
    (theirs,) = rllibs.run.callbacks
    assert (wandb.project, wandb.upload_checkpoints) == (theirs.project, theirs.upload_checkpoints) == ("p", True)
    assert wandb.group == theirs.kwargs["name"] == "n"
    without, _ = tuners()
    assert "InBackground" not in {type(c).__name__ for c in without.run.callbacks}


def test_no_tune_trains_in_this_process(capsys):
    ray.init(num_cpus=1, include_dashboard=False)
    result = command_line.run_task("cartpole", ["--no-tune", "--stop-iters", "2", "--stop-reward", "501"])
    assert result["training_iteration"] == 2
    assert "iter=1" in capsys.readouterr().out
