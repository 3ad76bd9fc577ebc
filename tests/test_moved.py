"""A checkpoint that version 0.1.0 wrote, when the modules stood elsewhere, still loads."""

import json
from pathlib import Path

import pytest
import torch

from blpo_rllib import BLPO

DATA = Path(__file__).parent / "data"


def test_checkpoint_of_0_1_0_loads_and_trains_on(tmp_path):
    expected = json.loads((DATA / "checkpoint_0.1.0.json").read_text())
    algo = BLPO.from_checkpoint(str(DATA / "checkpoint_0.1.0"))
    try:
        learner = algo.learner_group._learner
        module, obs = learner.module["default_policy"], torch.linspace(-1, 1, 12).view(3, 4)
        with torch.no_grad():
            logits = module.forward_train({"obs": obs})["action_dist_inputs"]
            values = module.compute_values({"obs": obs})
        torch.testing.assert_close(logits, torch.tensor(expected["logits"]))
        torch.testing.assert_close(values, torch.tensor(expected["values"]))
        assert learner._reward_scale.scale("default_policy") == pytest.approx(expected["reward_scale"])
        moments = next(iter(learner.get_optimizer("default_policy", "actor").state.values()))
        assert float(moments["step"]) == expected["adam_steps"]
        assert algo.training_iteration == expected["training_iteration"]
        algo.train()
        assert algo.training_iteration == expected["training_iteration"] + 1
    finally:
        algo.stop()
