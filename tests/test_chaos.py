"""Nothing is lost when parts die, for ten minutes."""

import json
import os

import chaos
import pytest


@pytest.mark.chaos
def test_training_ends_as_it_should_whatever_dies(tmp_path):
    seconds = float(os.environ.get("CHAOS_SECONDS", 600))
    result = chaos.run(tmp_path, seconds, interval=20, stop_timesteps=int(2000 * seconds), num_learners=1)
    print(json.dumps(result, indent=2))
    assert result["exit_code"] == 0
    assert result["env_steps"] >= 2000 * seconds
    assert result["final_return"] >= 450
    assert result["iterations_without_gap"]
    assert result["steps_monotone"]
    assert sum(result["faults"].values()) >= 0.6 * seconds / 20
