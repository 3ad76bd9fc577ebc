"""BLPO learns: the tuned CartPole example reaches what the published implementation reaches there."""

import json
import sys

import pytest

from blpo_rllib import train


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole(seed, tmp_path):
    run = train.train("cartpole", seed, 100_000, tmp_path)
    bins = train.binned_returns(run["rows"])
    assert bins[100_000] >= 475
    assert (tmp_path / f"checkpoint_seed{seed}").is_dir()


def test_training_script_writes_checkpoint_results_and_curve(tmp_path, monkeypatch, capsys):
    argv = ["train.py", "cartpole", "--seeds", "0", "1", "--stop-timesteps", "600", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    for run in results["runs"]:
        assert run["rows"]["env_steps"][-1] >= 600
        assert run["checkpoint"] in printed
    for name in ("results.json", "learning_curve.png"):
        assert str(tmp_path / name) in printed
    assert (tmp_path / "learning_curve.png").stat().st_size > 5_000


def test_bins_weigh_episodes():
    rows = [
        {"env_steps": 10, "episodes": 1, "return": 4.0},
        {"env_steps": 20, "episodes": 3, "return": 8.0},
        {"env_steps": 30, "episodes": 0, "return": float("nan")},
        {"env_steps": 31, "episodes": 1, "return": 1.0},
    ]
    assert train.binned_returns(rows, width=20) == {20: 7.0, 40: 1.0}
    assert train.recent_return(rows, episodes=2) == pytest.approx((1.0 + 3 * 8.0) / 4)
