"""Batched sampling against RLlib's own EnvRunner: the same episodes, metrics, states and callbacks."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
import tree
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole
from ray.rllib.utils.filter import RunningStat

from blpo_rllib import BLPO, BLPOConfig
from blpo_rllib.sampling.acting import push, push_delta
from blpo_rllib.sampling.env_runner import BatchedEnvRunner

VECTOR = Box(-2, 2, (3,), np.float32)
DOUBLE = Box(-2, 2, (3,), np.float64)
IMAGE = Box(0, 1, (10, 10, 3), np.float32)

# Lengths of an environment's episodes in turn, and whether the end is a truncation (t), termination or both (b).
SCRIPTS = [[(1, "t"), (3, "."), (1, "."), (17, "t")], [(5, "b"), (40, ".")], [(1, "."), (1, ".")], [(2, "t"), (9, ".")]]


class Scripted(gym.Env):
    """Observations tell environment, episode and step; rewards depend on the action; ends follow a script."""

    made = 0

    def __init__(self, env_config=None, num_envs=None):
        env_config = env_config or {}
        self.observation_space = env_config.get("observation_space", VECTOR)
        self.action_space = env_config.get("action_space", Discrete(3))
        self.fail_at = env_config.get("fail_at")
        self.index = Scripted.made % len(SCRIPTS)
        Scripted.made += 1
        self.episode, self.total = -1, 0

    def _obs(self):
        rng, space = np.random.default_rng([self.index, self.episode, self.t]), self.observation_space
        if isinstance(space, Discrete):
            return int(rng.integers(space.n))
        return rng.uniform(space.low, space.high).astype(space.dtype)

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {"started": self.episode}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t, self.total = self.t + 1, self.total + 1
        if self.total == self.fail_at:
            raise ValueError("on purpose")
        script = SCRIPTS[self.index]
        length, end = script[self.episode % len(script)]
        over = self.t == length
        reward = float(np.sum(action) + 0.1 * self.t)
        info = {"t": self.t} if self.t % 2 else {}
        return self._obs(), reward, over and end in ".b", over and end in "tb", info


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


RECURRENT = {"use_lstm": True, "lstm_cell_size": 5, "fcnet_hiddens": [6], "max_seq_len": 4}


def config(env=Scripted, num_envs=4, filtered=False, recurrent=False, **env_config):
    return (
        BLPOConfig()
        .rl_module(model_config=RECURRENT if recurrent else {})
        .environment(env, env_config=env_config)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=num_envs,
            env_to_module_connector=(lambda env, spaces, device: MeanStdFilter()) if filtered else None,
        )
        .training(train_batch_size_per_learner=num_envs * 8, minibatch_size=8, num_epochs=1, nystrom_rank=2)
        .debugging(seed=0, log_level="ERROR")
    )


def runner(cls, c, seed=3, **kwargs):
    Scripted.made = 0
    made = cls(config=c, worker_index=kwargs.pop("worker_index", 0), **kwargs)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in made.module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return made


def runners(c):
    """A stock and a batched EnvRunner that should do the same."""
    return [runner(cls, c) for cls in (SingleAgentEnvRunner, BatchedEnvRunner)]


def assert_same_buffer(a, b, exact):
    assert (a.lookback, a.finalized, a.space) == (b.lookback, b.finalized, b.space)
    assert len(a.data) == len(b.data)
    tree.assert_same_structure(a.data, b.data)
    for x, y in zip(tree.flatten(a.data), tree.flatten(b.data)) if len(a.data) else []:
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        (np.testing.assert_array_equal if exact else lambda x, y: np.testing.assert_allclose(x, y, 2e-5, 2e-6))(x, y)


def assert_same_episodes(stock, batched):
    """Equal up to the rounding of the module's forward pass."""
    assert [len(e) for e in stock] == [len(e) for e in batched]
    ids = {}
    for a, b in zip(stock, batched, strict=True):
        assert ids.setdefault(a.id_, b.id_) == b.id_
        for name in ("t", "t_started", "is_terminated", "is_truncated", "is_numpy", "action_space"):
            assert getattr(a, name) == getattr(b, name), name
        assert a.observation_space == b.observation_space
        assert_same_buffer(a.observations, b.observations, exact=False)
        assert_same_buffer(a.actions, b.actions, exact=a.actions.data.dtype.kind == "i")
        assert_same_buffer(a.rewards, b.rewards, exact=False)
        assert (a.infos.data, a.infos.lookback) == (b.infos.data, b.infos.lookback)
        assert a.extra_model_outputs.keys() == b.extra_model_outputs.keys()
        for name, buffer in a.extra_model_outputs.items():
            assert_same_buffer(buffer, b.extra_model_outputs[name], exact=False)
        assert (b.get_duration_s() > 0) == (a.get_duration_s() > 0)
        b.validate()
    assert len(set(ids.values())) == len(ids)


def metrics(made):
    """What does not depend on the clock."""
    values = made.get_metrics()
    clocks = ("timer", "duration", "connector", "time_between")
    names = [n for n in values if n != "sample" and not any(word in n for word in clocks)]
    return {name: values[name] for name in names}


def flat(tree_):
    if isinstance(tree_, dict):
        return {k: flat(v) for k, v in tree_.items()}
    return tree_.peek() if hasattr(tree_, "peek") else tree_


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize("explore", [True, False], ids=["explore", "exploit"])
@pytest.mark.parametrize(
    ("observation_space", "action_space", "recurrent"),
    [
        (VECTOR, Discrete(3), False),
        (DOUBLE, Box(np.float32([-3, 0]), np.float32([1, 2])), False),
        (VECTOR, MultiDiscrete([2, 3]), False),
        (IMAGE, Discrete(2), False),
        (VECTOR, Discrete(3), True),
        (VECTOR, Box(np.float32([-3, 0]), np.float32([1, 2])), True),
    ],
    ids=["discrete", "box", "multi-discrete", "image", "recurrent discrete", "recurrent box"],
)
def test_the_same_episodes_and_metrics_over_several_fragments(
    observation_space, action_space, recurrent, explore, filtered
):
    c = config(observation_space=observation_space, action_space=action_space, filtered=filtered, recurrent=recurrent)
    pair = runners(c)
    assert pair[1].obstacle() is None
    for round_, num_timesteps in enumerate((None, 21, 1, None)):
        samples = []
        for made in pair:
            torch.manual_seed(round_)
            samples.append(made.sample(num_timesteps=num_timesteps, explore=explore, force_reset=round_ == 2))
        assert_same_episodes(*samples)
        stock, batched = (flat(metrics(made)) for made in pair)
        assert stock.keys() == batched.keys()
        lengths = {name: (stock.pop(name), batched.pop(name)) for name in list(stock) if "sum_episodes_length" in name}
        assert len(lengths) == 2
        for name, value in stock.items():
            if not name.endswith("throughput"):
                np.testing.assert_allclose(_numbers(batched[name]), _numbers(value), rtol=1e-5, atol=1e-4, err_msg=name)
    if filtered:
        stock, batched = (_filter(made) for made in pair)
        for name in ("running_stats", "buffer"):
            assert_same_statistics(getattr(stock, name), getattr(batched, name))


def _numbers(x):
    return [float(v) for v in x.values()] if isinstance(x, dict) else float(x)


def _filter(made):
    return made._env_to_module[MeanStdFilter][0]._filters[None]


def assert_same_statistics(a, b):
    assert a.num_pushes == b.num_pushes > 0
    for name in ("mean_array", "sum_sq_diff_array"):
        np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=1e-9, atol=1e-9, err_msg=name)


def test_whole_episodes():
    pair = runners(config(filtered=True))
    for num_episodes in (1, 6):
        samples = []
        for made in pair:
            torch.manual_seed(num_episodes)
            samples.append(made.sample(num_episodes=num_episodes, explore=False))
        assert_same_episodes(*samples)
        assert len(samples[1]) == num_episodes
        assert all(episode.is_done for episode in samples[1])


# RLlib's own loop needs the step before to go on in a recurrent module's state.
@pytest.mark.parametrize(("horizon", "recurrent"), [(0, False), (1, False), (4, False), (1, True), (4, True)])
def test_lookback_and_change_of_loop_between_fragments(horizon, recurrent):
    c = config(filtered=True, recurrent=recurrent).env_runners(episode_lookback_horizon=horizon)
    pair = runners(c)
    for round_ in range(5):
        samples = []
        for made in pair:
            torch.manual_seed(round_)
            # Odd fragments go through RLlib's own loop, in the batched EnvRunner too.
            made.episodes_to_numpy = not round_ % 2
            sample = made.sample()
            samples.append([episode.to_numpy() for episode in sample])
        assert_same_episodes(*samples)


def test_statistics_of_many_batches_are_those_of_single_pushes():
    rng = np.random.default_rng(0)
    stock, batched = RunningStat((2, 3)), RunningStat((2, 3))
    for size in (1, 5, 1, 300):
        x = rng.normal(1e3, 2.0, (size, 2, 3))
        expected = []
        for row in x:
            stock.push(row)
            expected.append((stock.mean.copy(), stock.var))
        for result, rows in zip(push(batched, x), zip(*expected, strict=True), strict=True):
            np.testing.assert_allclose(result, rows, rtol=1e-6)
        assert_same_statistics(stock, batched)


def test_weighted_values_count_as_many():
    rng = np.random.default_rng(0)
    once, weighted = RunningStat((3,)), RunningStat((3,))
    x = rng.normal(5.0, 2.0, (50, 3))
    push(once, x)
    push(weighted, x)
    y = rng.normal(-5.0, 1.0, (20, 3))
    push(once, np.repeat(y, 4, axis=0))
    mean, variance = push(weighted, y, weight=4)
    assert weighted.num_pushes == once.num_pushes == 130
    np.testing.assert_allclose(mean[-1], once.mean, rtol=1e-12)
    np.testing.assert_allclose(variance[-1], once.var, rtol=1e-6)


def test_a_runner_of_several_keeps_pace_with_all_of_them_and_reports_what_it_saw():
    """One of three EnvRunners, before any merge."""
    made = runner(BatchedEnvRunner, config(filtered=True).env_runners(num_env_runners=3), worker_index=1)
    for _ in range(20):
        made.sample()
    stat = _filter(made).running_stats
    # The first observations come from RLlib's own reset.
    assert 2.5 * stat.num_pushes_delta < stat.num_pushes <= 3 * stat.num_pushes_delta
    np.testing.assert_allclose(stat.mean_array, stat.mean_delta_array, atol=0.02)


def test_rllibs_merge_of_several_env_runners_gives_the_statistics_of_all_observations():
    """Which it does not from the deltas that its own filter leaves: the second merge shows it."""
    rng = np.random.default_rng(0)
    merged, stock, seen = RunningStat((3,)), RunningStat((3,)), np.empty((0, 3))
    for sizes in ((40, 7), (30, 60), (1, 500)):
        parts = [rng.normal([5.0, -1.0, 100.0], [1.0, 2.0, 3.0], (size, 3)) for size in sizes]
        for part in parts:
            batched, one_by_one = RunningStat((3,)), stock.copy()
            for stat, source in ((batched, merged), (one_by_one, stock)):
                stat.mean_array[...], stat.num_pushes = source.mean_array, source.num_pushes
                stat.sum_sq_diff_array[...] = source.sum_sq_diff_array
            for half in np.array_split(part, 2) if len(part) > 1 else [part]:
                push(batched, half)
                push_delta(batched, half)
            for row in part:
                one_by_one.push(row)
            merged.update(batched)
            stock.update(one_by_one)
        seen = np.concatenate([seen, *parts])
        np.testing.assert_allclose(merged.mean, seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged.std, seen.std(0, ddof=1), rtol=1e-6)
    assert not np.allclose(stock.mean, seen.mean(0), rtol=0.1)


def test_the_deltas_of_a_runner_are_the_statistics_of_what_it_has_seen():
    made = runner(BatchedEnvRunner, config(filtered=True))
    for _ in range(3):
        made.sample()
    for stat in (_filter(made).running_stats, _filter(made).buffer):
        assert stat.num_pushes_delta == stat.num_pushes
        np.testing.assert_allclose(stat.mean_delta_array, stat.mean_array, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stat.sum_sq_diff_delta_array, stat.sum_sq_diff_array, rtol=1e-6, atol=1e-9)


def test_log_probabilities_are_the_modules():
    for action_space in (Discrete(3), Box(-1, 1, (2,), np.float32)):
        made = runner(BatchedEnvRunner, config(action_space=action_space))
        for episode in made.sample():
            obs = torch.as_tensor(episode.get_observations(slice(0, len(episode))))
            with torch.no_grad():
                inputs = made.module.forward_exploration({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
                distribution = made.module.get_exploration_action_dist_cls().from_logits(inputs)
                logp = distribution.logp(torch.as_tensor(episode.get_actions()))
            np.testing.assert_allclose(episode.get_extra_model_outputs(Columns.ACTION_LOGP), logp, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS), inputs, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    "model_config",
    [
        {"fcnet_activation": "relu", "free_log_std": False},
        {"fcnet_activation": "swish"},
        {"fcnet_hiddens": [8], "fcnet_use_bias": False, "head_fcnet_hiddens": [5], "head_fcnet_activation": "relu"},
        {"log_std_clip_param": 0.1},
    ],
)
def test_networks(model_config):
    c = config(action_space=Box(-1, 1, (2,), np.float32)).rl_module(model_config=model_config)
    samples = []
    for made in runners(c):
        torch.manual_seed(0)
        samples.append(made.sample())
    assert_same_episodes(*samples)


def test_new_weights_are_used_at_the_next_call():
    made = runner(BatchedEnvRunner, config())
    made.sample()
    state = {name: np.zeros_like(value) for name, value in made.module.get_state().items()}
    made.set_state({"rl_module": state, "weights_seq_no": 7})
    for episode in made.sample():
        new = episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
        np.testing.assert_array_equal(new, np.zeros_like(new))
        assert set(episode.get_extra_model_outputs("weights_seq_no")) == {7}


def test_state_goes_from_one_runner_to_another():
    c = config(filtered=True)
    first, second = runner(BatchedEnvRunner, c), runner(SingleAgentEnvRunner, c, seed=4)
    first.sample()
    second.set_state(copy.deepcopy(first.get_state()))
    assert_same_statistics(_filter(first).running_stats, _filter(second).running_stats)
    for name, value in first.module.get_state().items():
        np.testing.assert_array_equal(value, second.module.get_state()[name])


class Journal(RLlibCallback):
    """Writes down what callbacks see."""

    def __init__(self):
        self.lines = []

    def on_environment_created(self, *, env, **kwargs):
        self.lines.append(("environment", env.num_envs))

    def on_episode_created(self, *, episode, env_index, **kwargs):
        self.lines.append(("created", env_index, len(episode), episode.is_reset))

    def on_episode_start(self, *, episode, env_index, **kwargs):
        episode.custom_data["started"] = len(self.lines)
        self.lines.append(("start", env_index, episode.get_observations(-1).round(4).tolist(), episode.get_infos()))

    def on_episode_end(self, *, episode, env_index, env, prev_episode_chunks, **kwargs):
        chunks = [len(chunk) for chunk in prev_episode_chunks]
        data = (type(episode.get_rewards()), len(episode), episode.get_infos(-1), round(float(episode.get_return()), 4))
        self.lines.append(("end", env_index, env.envs[env_index].unwrapped.t, *data, chunks, dict(episode.custom_data)))

    def on_sample_end(self, *, samples, metrics_logger, **kwargs):
        metrics_logger.log_value("journal", 1.0)
        self.lines.append(("sample", [len(episode) for episode in samples]))


def test_callbacks_see_the_same_at_the_same_time():
    c = config(filtered=True).callbacks(Journal)
    pair = runners(c)
    assert pair[1].obstacle() is None
    for round_ in range(3):
        for made in pair:
            torch.manual_seed(round_)
            made.sample()
    stock, batched = (made._callbacks[0].lines for made in pair)
    assert stock == batched
    assert {line[0] for line in stock} == {"environment", "created", "start", "end", "sample"}
    assert "journal" in pair[1].get_metrics()


def test_a_failing_environment_is_restarted_as_in_rllib():
    c = config(fail_at=30).fault_tolerance(restart_failed_sub_environments=True)
    pair = runners(c)
    for round_ in range(5):
        samples = []
        for made in pair:
            Scripted.made = 0
            torch.manual_seed(round_)
            samples.append(made.sample())
        assert_same_episodes(*samples)
    assert all(flat(made.get_metrics())["num_env_step_failures"] == 2 for made in pair)


class Custom(ConnectorV2):
    def __call__(self, *, batch, **kwargs):
        return batch


class NestedOutputs(DefaultPPOTorchRLModule):
    def _forward_exploration(self, batch, **kwargs):
        n = len(batch[Columns.OBS])
        return {**self._forward(batch), "nested": {"a": torch.zeros(n), "b": torch.zeros(n)}}


def obstacles():
    flatten = {"env_to_module_connector": lambda env, spaces, device: FlattenObservations()}
    yield (
        "custom connector",
        config().env_runners(env_to_module_connector=lambda env, spaces, device: Custom()),
        "Custom",
    )
    yield "to env", config().env_runners(module_to_env_connector=lambda env, spaces: Custom()), "module-to-env"
    yield "step function", config().callbacks(on_episode_step=lambda **kw: None), "on_episode_step"
    yield "step method", config().callbacks(type("C", (RLlibCallback,), {"on_episode_step": lambda s, **kw: 0})), "step"
    yield "lists", config().env_runners(episodes_to_numpy=False), "episodes_to_numpy"
    yield (
        "outputs",
        config(action_space=VECTOR).rl_module(rl_module_spec=RLModuleSpec(module_class=NestedOutputs)),
        "nested",
    )
    yield "observations", config(observation_space=Discrete(4)).env_runners(**flatten), "not a Box"


@pytest.mark.parametrize(("c", "reason"), [case[1:] for case in obstacles()], ids=[case[0] for case in obstacles()])
def test_what_stands_in_the_way_is_named_and_sampled_by_rllibs_loop(c, reason, caplog):
    made = runner(BatchedEnvRunner, c)
    assert reason in made.obstacle()
    with caplog.at_level("INFO", logger="blpo_rllib.sampling.env_runner"):
        for _ in range(2):
            assert sum(len(episode) for episode in made.sample(num_timesteps=8)) >= 8
    assert sum(reason in record.message for record in caplog.records) == 1


def test_random_actions_are_an_obstacle():
    made = runner(BatchedEnvRunner, config())
    assert made.obstacle(random_actions=True) == "random_actions=True"
    assert made.sample(num_timesteps=8, random_actions=True)


def test_an_observation_space_of_dictionaries_is_an_obstacle():
    made = runner(BatchedEnvRunner, config())
    made.env.single_observation_space = Dict({"a": VECTOR})
    assert "not a Box" in made.obstacle()


def test_which_env_runner_is_taken():
    def chosen(c):
        c.validate()
        return c.env_runner_cls

    assert chosen(config()) is BatchedEnvRunner
    assert chosen(config().env_runners(env_runner_cls=SingleAgentEnvRunner)) is SingleAgentEnvRunner
    c = config()
    c.validate()
    policies = {"p0"}
    assert chosen(c.multi_agent(policies=policies, policy_mapping_fn=lambda *a, **kw: "p0")) is None


def test_multi_agent_keeps_rllibs_env_runner():
    c = (
        config(MultiAgentCartPole, num_envs=2, num_agents=2)
        .multi_agent(policies={"p0"}, policy_mapping_fn=lambda agent_id, episode, **kw: "p0")
        .training(train_batch_size_per_learner=32, minibatch_size=16)
    )
    algo = c.build_algo()
    assert type(algo.env_runner) is MultiAgentEnvRunner
    algo.train()
    algo.stop()


def test_two_remote_runners_evaluation_and_checkpoint(tmp_path):
    c = (
        config("Pendulum-v1", num_envs=2, filtered=True)
        .env_runners(num_env_runners=2)
        .training(train_batch_size_per_learner=400, minibatch_size=100)
        .evaluation(evaluation_interval=1, evaluation_num_env_runners=0, evaluation_duration=2)
        .callbacks(on_episode_end=lambda metrics_logger, **kw: metrics_logger.log_value("my_metric", 7.0))
    )
    algo = c.build_algo()
    for _ in range(2):
        results = algo.train()
    assert results["env_runners"]["my_metric"] == 7.0
    assert results["env_runners"]["num_env_steps_sampled_lifetime"] >= 800
    assert -2000 < results["evaluation"]["env_runners"]["episode_return_mean"] < -300
    assert results["evaluation"]["env_runners"]["num_episodes"] == 2
    kinds = algo.env_runner_group.foreach_env_runner(
        lambda made: (type(made).__name__, made.obstacle()), local_env_runner=False
    )
    assert kinds == [("BatchedEnvRunner", None)] * 2
    assert algo.eval_env_runner.obstacle() is None

    def statistics(made):
        (connector,) = made._env_to_module[MeanStdFilter]
        return RunningStat.from_state(connector.get_state()[None]["running_stats"][0])

    # RLlib merges the runners' statistics into the local ones after each iteration.
    merged = statistics(algo.env_runner)
    assert merged.n >= 800
    algo.save_to_path(tmp_path)
    restored = BLPO.from_checkpoint(str(tmp_path))
    np.testing.assert_array_equal(statistics(restored.env_runner).mean, merged.mean)
    restored.train()
    algo.stop()
    restored.stop()


def test_filters_of_two_remote_runners_stay_at_what_they_see():
    """A hopper that has not fallen is between 0.7 and 1.3 high; by RLlib's own deltas its filter's mean tends to 0."""
    c = (
        BLPOConfig()
        .environment("Hopper-v5")
        .env_runners(
            num_env_runners=2,
            num_envs_per_env_runner=4,
            env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
        )
        .training(train_batch_size_per_learner=512, minibatch_size=128, num_epochs=1, nystrom_rank=1)
        .debugging(seed=0, log_level="ERROR")
    )
    algo = c.build_algo()
    for _ in range(4):
        algo.train()
    heights = algo.env_runner_group.foreach_env_runner(lambda made: _height(made.get_state()))
    algo.stop()
    assert len(heights) == 3
    for count, mean, std in heights:
        assert count >= 4 * 512
        assert 1.1 < mean < 1.3
        assert std < 0.1


def _height(state):
    """Number, mean and deviation of an EnvRunner's first observation."""
    connectors = state["env_to_module_connector"]
    (stat,) = (RunningStat.from_state(x) for f in _filters_in(connectors) for x in f["running_stats"])
    return stat.num_pushes, float(stat.mean[0]), float(stat.std[0])


def _filters_in(tree_):
    """The states of the filters in nested dictionaries."""
    if "running_stats" in tree_:
        return [tree_]
    return [f for v in tree_.values() if isinstance(v, dict) for f in _filters_in(v)]
