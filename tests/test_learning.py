"""BLPO learns: the tuned CartPole example reaches what the published implementation reaches there."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from blpo_rllib import train
from blpo_rllib.experiments import learning_curve


def run_train(monkeypatch, *options):
    # The command line takes a Ray that runs already; without a dashboard it starts sooner.
    ray.init(num_cpus=2, include_dashboard=False)
    monkeypatch.setattr(sys, "argv", ["train", "cartpole", *map(str, options)])
    train.main()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole(seed, tmp_path, monkeypatch):
    # No mean return exceeds 500: the number of steps is what ends it.
    options = ("--seed", seed, "--stop-timesteps", 100_000, "--stop-reward", 501, "--output", tmp_path)
    run_train(monkeypatch, *options)
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    names = ("env_steps", "episodes", "return")
    rows = [dict(zip(names, values)) for values in zip(*(run["rows"][name] for name in names))]
    bins = learning_curve.binned_returns(rows)
    assert bins[100_000] >= 475
    assert Path(run["checkpoint"]).is_dir()


def test_training_writes_checkpoint_results_and_curve(tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, "--num-samples", 2, "--stop-timesteps", 1200, "--output", tmp_path)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["env"] == "CartPole-v1"
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    for run in results["runs"]:
        steps = run["rows"]["env_steps"]
        assert len(steps) == 3
        assert steps[-1] >= 1200
        assert (np.diff(run["rows"]["seconds"]) > 0).all()
        assert Path(run["checkpoint"]).is_dir()
        assert run["checkpoint"] in printed
        # The bin's mean, from Tune's own file.
        trial = tmp_path / f"run/seed_{run['seed']}/result.json"
        env = [json.loads(line)["env_runners"] for line in trial.read_text().splitlines()]
        returns = [e["episode_return_mean"] * e["num_episodes"] for e in env if e.get("num_episodes")]
        assert run["bins_of_25k"]["25000"] == pytest.approx(
            sum(returns) / sum(e.get("num_episodes", 0) for e in env), abs=0.06
        )
        assert f"seed {run['seed']}: mean return per 25k steps {run['bins_of_25k']}" in printed
    for name in ("results.json", "learning_curve.png"):
        assert str(tmp_path / name) in printed
    assert (tmp_path / "learning_curve.png").stat().st_size > 5_000


def test_help_names_the_tasks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(task in shown for task in train.TASKS)


def test_a_tasks_help_shows_rllibs_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "cartpole", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    shown = capsys.readouterr().out
    assert "usage: python -m blpo_rllib.train cartpole" in shown
    assert "--num-gpus-per-learner" in shown


def test_bins_weigh_episodes():
    rows = [
        {"env_steps": 10, "episodes": 1, "return": 4.0},
        {"env_steps": 20, "episodes": 3, "return": 8.0},
        {"env_steps": 30, "episodes": 0, "return": float("nan")},
        {"env_steps": 31, "episodes": 1, "return": 1.0},
    ]
    assert learning_curve.binned_returns(rows, width=20) == {20: 7.0, 40: 1.0}
