"""RLlib episodes with known contents."""

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

OBS_SIZE = 4


def episode(length, rng, *, terminated=False, truncated=False, t_started=0, id_=None):
    """An episode fragment of ``length`` random CartPole-like steps."""
    return SingleAgentEpisode(
        id_=id_,
        observations=list(rng.normal(size=(length + 1, OBS_SIZE)).astype(np.float32)),
        actions=list(rng.integers(2, size=length)),
        rewards=list(rng.normal(size=length)),
        terminated=terminated,
        truncated=truncated,
        extra_model_outputs={
            Columns.ACTION_LOGP: list(np.log(rng.uniform(0.3, 0.7, length)).astype(np.float32)),
            Columns.ACTION_DIST_INPUTS: list(rng.normal(size=(length, 2)).astype(np.float32)),
        },
        t_started=t_started,
        len_lookback_buffer=0,
    ).to_numpy()


def mixed_episodes(rng, count=9, longest=60):
    """Terminated, truncated and cut ones of all lengths."""
    kinds = [{"terminated": True}, {"truncated": True}, {}]
    return [episode(int(rng.integers(1, longest)), rng, **kinds[i % 3]) for i in range(count)]
