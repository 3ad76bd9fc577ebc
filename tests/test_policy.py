"""A policy from a checkpoint acts as RLlib's own EnvRunner does, without Ray; and plays episodes on film."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from blpo_rllib import BLPOConfig, checkpoints, play
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG, BLPOTorchRLModule
from blpo_rllib.policy import LOOKBACK, Policy, evaluate, load_policy, load_settings

CHECKPOINT = Path(__file__).parent / "data/checkpoint_0.1.0"


class Recording(gym.Wrapper):
    """Keeps, by episode, what a policy sees and what the environment gets from it."""

    episodes: list = []

    def reset(self, **kwargs):
        self.obs, info = super().reset(**kwargs)
        self.episodes.append([])
        return self.obs, info

    def step(self, action):
        self.episodes[-1].append((self.obs, action))
        self.obs, *rest = super().step(action)
        return self.obs, *rest


class CartPole(Recording):
    def __init__(self, _=None):
        super().__init__(gym.make("CartPole-v1"))


class Pendulum(Recording):
    """With bounds that actions must be brought to, and observations whose mean is far from 0."""

    def __init__(self, _=None):
        env = gym.make("Pendulum-v1", max_episode_steps=60)
        env = gym.wrappers.TransformObservation(env, lambda obs: obs + 5, gym.spaces.Box(-20, 20, (3,), np.float32))
        super().__init__(gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(3.0)))


def config(env):
    c = BLPOConfig().environment(env)
    c.env_runners(num_env_runners=0, num_envs_per_env_runner=1, env_runner_cls=SingleAgentEnvRunner)
    c.training(train_batch_size_per_learner=128, minibatch_size=128, num_epochs=1)
    return c.debugging(seed=0, log_level="ERROR")


def discrete():
    return config(CartPole)


def box():
    c = config(Pendulum).env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    # Large steps, so that some actions reach the bounds.
    return c.training(actor_lr=0.05, num_epochs=5)


def trained(c, folder):
    """Leaves a checkpoint; the episodes of RLlib's own EnvRunner from there, on statistics that stand still."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    algo = c.build_algo()
    for _ in range(2):
        algo.train()
    algo.save_to_path(str(folder))
    for connector in algo.env_runner._env_to_module.connectors:
        if isinstance(connector, MeanStdFilter):
            connector._update_stats = False
    Recording.episodes = []
    algo.env_runner.sample(num_episodes=3, explore=False, force_reset=True)
    algo.stop()
    ray.shutdown()
    return [episode for episode in Recording.episodes if episode]


@pytest.mark.parametrize("make_config", [discrete, box])
def test_actions_are_rllibs(make_config, tmp_path):
    episodes = trained(make_config(), tmp_path / "checkpoint")
    policy = load_policy(tmp_path / "checkpoint")
    actions = []
    # The same observations again: what the policy sees does not change its statistics.
    for episode in 2 * episodes:
        policy.reset()
        for obs, expected in episode:
            actions.append(policy(obs))
            np.testing.assert_allclose(actions[-1], expected, rtol=1e-5, atol=1e-6)
            assert np.shape(actions[-1]) == np.shape(expected)
    assert len(actions) > 40
    assert len(np.unique(np.round(actions, 3))) > 1, "a policy that always does the same would pass too"
    if make_config is box:
        assert np.max(actions) <= 3
        assert np.min(actions) >= -1
    assert not ray.is_initialized()


class WithPrevious(ConnectorV2):
    """Puts the observation before the last beside the last one; zeros at the beginning of an episode."""

    def recompute_output_observation_space(self, input_observation_space, input_action_space):
        return gym.spaces.Box(-5, 5, (2 * input_observation_space.shape[0],), np.float32)

    def __call__(self, *, batch, episodes, **kwargs):
        for episode in self.single_agent_episode_iterator(episodes):
            last = episode.get_observations(slice(-2, None), fill=0.0)
            self.add_batch_item(batch, "obs", np.concatenate(list(last)), episode)
        return batch


def test_connectors_that_look_back_see_the_running_episode():
    spaces = {"__env_single__": (gym.spaces.Box(-5, 5, (4,), np.float32), gym.spaces.Discrete(3))}
    c = BLPOConfig().env_runners(env_to_module_connector=lambda env, spaces, device: WithPrevious())
    env_to_module = c.build_env_to_module_connector(spaces=spaces)
    module = RLModuleSpec(
        module_class=BLPOTorchRLModule,
        observation_space=env_to_module.observation_space,
        action_space=gym.spaces.Discrete(3),
        model_config=REFERENCE_MODEL_CONFIG | {"policy_head_gain": 1.0},
    ).build()
    policy = Policy(module, env_to_module, c.build_module_to_env_connector(spaces=spaces))
    generator = np.random.default_rng(0)
    chosen = set()
    for _ in range(2):
        policy.reset()
        before = np.zeros(4, np.float32)
        # More steps than an episode's memory holds.
        for _ in range(LOOKBACK + 20):
            obs = generator.normal(size=4).astype(np.float32)
            with torch.no_grad():
                both = torch.as_tensor(np.concatenate([before, obs]))[None]
                logits = module.forward_inference({"obs": both})["action_dist_inputs"]
            action = int(policy(obs))
            assert action == int(logits.argmax())
            chosen.add(action)
            before = obs
    assert len(chosen) > 1


def test_a_policy_explores_only_when_asked():
    policy = load_policy(CHECKPOINT)
    obs = np.zeros(4, np.float32)
    assert len({int(policy(obs)) for _ in range(40)}) == 1
    assert len({int(policy(obs, explore=True)) for _ in range(40)}) == 2


def test_the_newest_whole_checkpoint_of_a_run_is_taken(tmp_path):
    for number in (1, 2, 3):
        folder = tmp_path / f"run/seed_0/checkpoint_{number:06d}"
        folder.mkdir(parents=True)
        for path in CHECKPOINT.rglob("*"):
            target = folder / path.relative_to(CHECKPOINT)
            target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    (folder / "rllib_checkpoint.json").write_text("torn")
    local, _ = checkpoints.resolve(tmp_path)
    for place in (tmp_path, tmp_path / "run", tmp_path / "run/seed_0"):
        _, found = checkpoints.find(local, str(place))
        assert found.endswith("checkpoint_000002")
    assert load_settings(tmp_path)["env"] == "CartPole-v1"
    (tmp_path / "run/seed_1/checkpoint_000000").mkdir(parents=True)
    with pytest.raises(ValueError, match="several trials: name one of .*seed_0, .*seed_1"):
        load_policy(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match="does not exist or is empty"):
        load_policy(tmp_path / "nothing")


def run_play(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["play", *map(str, options)])
    play.main()
    return capsys.readouterr().out


def test_play_prints_the_returns_of_evaluate(monkeypatch, capsys):
    printed = run_play(monkeypatch, capsys, CHECKPOINT, "--episodes", 3, "--seed", 5)
    returns = evaluate(load_policy(CHECKPOINT), gym.make("CartPole-v1"), 3, seed=5)
    for number, value in enumerate(returns):
        assert f"episode {number + 1} (seed {5 + number}): return {value:.1f}" in printed
    assert f"mean return of 3 episodes: {returns.mean():.1f}" in printed
    assert not ray.is_initialized()


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_play_records_the_first_episode(tmp_path, monkeypatch, capsys, suffix):
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("pygame")
    path = tmp_path / f"film.{suffix}"
    options = ("--episodes", 2, "--video", path, "--fps", 10, "--seconds", 1, "--height", 120)
    printed = run_play(monkeypatch, capsys, CHECKPOINT, *options)
    (steps,) = evaluate(load_policy(CHECKPOINT), gym.make("CartPole-v1"), 1)
    # CartPole makes 50 steps a second, and a step is a point of return.
    expected = min(10, 1 + int(steps) // 5)
    frames = imageio.imread(path)
    assert frames.shape == (expected, 120, 180, 3)
    assert (frames[0] != frames[-1]).any()
    assert f"video: {path}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "film.avi"], "--video film.avi must end in .gif or .mp4"),
        (["--episodes", "0"], "--episodes 0 must be at least 1"),
        (["--env", "NoSuch-v0"], "env='NoSuch-v0' is not known to gymnasium"),
    ],
)
def test_wrong_options_are_explained(monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        run_play(monkeypatch, capsys, CHECKPOINT, *options)
    assert message in capsys.readouterr().err


def test_a_missing_recorder_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(SystemExit):
        run_play(monkeypatch, capsys, CHECKPOINT, "--video", "film.gif")
    assert 'a video needs imageio: pip install "blpo_rllib[video]"' in capsys.readouterr().err


def test_envpools_tasks_are_played_with_gymnasium():
    env = play.make_env({"env": "EnvPool/CartPole-v1", "env_config": {"num_threads": 2}}, {})
    assert env.spec.id == "CartPole-v1"


def test_runs_with_several_agents_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    names = ("p0", "p1")
    for name in names:
        (folder / "learner_group/learner/rl_module" / name).mkdir(parents=True)
        (folder / "learner_group/learner/rl_module" / name / "state").write_text("")
    local, path = checkpoints.resolve(folder)
    checkpoints.seal(local, path, {"progress": {}})
    with pytest.raises(ValueError, match="has the modules p0, p1: load_policy is for one agent"):
        load_policy(folder)
