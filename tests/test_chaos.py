"""Nothing is lost when parts die, for ten minutes."""

import json
import os

import chaos
import pytest


@pytest.mark.chaos
def test_training_ends_as_it_should_whatever_dies(tmp_path):
    seconds = float(os.environ.get("CHAOS_SECONDS", 600))
    # Two cores make 1,700 steps a second under such faults, and 4,400 before the first: training outlasts the strikes.
    steps = int(200_000 + 2000 * seconds)
    result = chaos.run(tmp_path, seconds, interval=20, stop_timesteps=steps, num_learners=1)
    print(json.dumps(result, indent=2))
    assert result["exit_code"] == 0
    assert result["env_steps"] >= steps
    assert result["final_return"] >= 450
    assert result["iterations_without_gap"]
    assert result["steps_monotone"]
    assert sum(result["faults"].values()) >= 0.6 * seconds / 20
