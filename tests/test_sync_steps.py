"""Quick steps of gymnasium's SyncVectorEnv against its own."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from blpo_rllib.sampling.sync_steps import SyncSteps


class Telling(gym.Env):
    """Two-dimensional observations, actions of two numbers, and infos now and then; ends after some steps."""

    observation_space = gym.spaces.Box(-9, 9, (2, 3), np.float32)
    action_space = gym.spaces.MultiDiscrete([3, 2])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 6))
        return np.zeros((2, 3), np.float32), {"left": self.left}

    def step(self, action):
        self.left -= 1
        info = {"action": np.array(action), "name": "odd"} if self.left % 2 else {}
        obs = self.np_random.normal(size=(2, 3)).astype(np.float32)
        return obs, float(action[0]), self.left == 0, self.left == 2, info


ENVS = {"Telling": Telling, **{name: lambda name=name: gym.make(name) for name in ("CartPole-v1", "Pendulum-v1")}}


def assert_same(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert list(mine) == list(theirs)
        for name in mine:
            assert_same(mine[name], theirs[name])
    else:
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ENVS)
def test_steps_are_those_of_gymnasium(name):
    mine, theirs = (SyncVectorEnv([ENVS[name]] * 3) for _ in range(2))
    assert SyncSteps.apply(mine)
    mine.step = SyncSteps(mine)
    assert not SyncSteps.apply(mine), "once is enough"
    theirs.action_space.seed(0)
    ends, kept = 0, []
    for t in range(450):
        if t % 225 == 0:
            results = [vector.reset(seed=t) for vector in (mine, theirs)]
        elif t == 100:
            options = {"reset_mask": np.array([True, False, True])}
            results = [vector.reset(seed=t, options=dict(options)) for vector in (mine, theirs)]
        else:
            actions = theirs.action_space.sample()
            results = [vector.step(actions) for vector in (mine, theirs)]
            ends += np.sum(results[0][2] | results[0][3])
        for own, other in zip(*results, strict=True):
            assert_same(own, other)
        kept.append((results[0][0], results[1][0]))
    assert ends > 2
    for own, other in kept:
        np.testing.assert_array_equal(own, other, err_msg="a later step wrote to an earlier one's array")


def test_an_observation_of_another_shape_is_refused():
    vector = SyncVectorEnv([Telling] * 2)
    vector.step = SyncSteps(vector)
    vector.reset(seed=0)
    vector.envs[1].step = lambda action: (np.zeros((1, 3), np.float32), 0.0, False, False, {})
    with pytest.raises(ValueError, match="shape"):
        vector.step(np.zeros((2, 2), int))


@pytest.mark.parametrize("options", [{"copy": False}, {"autoreset_mode": AutoresetMode.SAME_STEP}], ids=str)
def test_other_vectors_are_left_alone(options):
    assert not SyncSteps.apply(SyncVectorEnv([Telling] * 2, **options))
    assert not SyncSteps.apply(type("Own", (SyncVectorEnv,), {})([Telling] * 2))
    assert not SyncSteps.apply(None)
