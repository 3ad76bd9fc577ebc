"""BLPO as an RLlib algorithm: spaces, multi-agent, remote workers, evaluation, callbacks, checkpoints."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import ray
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole
from ray.rllib.examples.envs.classes.random_env import RandomEnv
from ray.rllib.utils.filter import RunningStat
from test_learner import assert_equal

from blpo_rllib import BLPO, BLPOConfig


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(env="CartPole-v1", **env_config):
    return (
        BLPOConfig()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .training(train_batch_size_per_learner=64, minibatch_size=32, num_epochs=1, nystrom_rank=2)
        .debugging(seed=0, log_level="ERROR")
    )


def random_env(observation_space, action_space):
    spaces = {"observation_space": observation_space, "action_space": action_space}
    return config(RandomEnv, **spaces, p_terminated=0.05, max_episode_len=30)


VECTOR = gym.spaces.Box(-1, 1, (3,), np.float32)
IMAGE = gym.spaces.Box(0, 1, (10, 10, 3), np.float32)
NESTED = gym.spaces.Dict({"a": VECTOR, "b": gym.spaces.Discrete(3)})


def weights(algo, module_id="default_policy"):
    state = algo.learner_group.get_weights()[module_id]
    return {name: np.array(value) for name, value in state.items()}


def moved(before, after):
    """Names of the parameters that changed."""
    assert all(np.isfinite(x).all() for x in after.values())
    return {name for name in before if (before[name] != after[name]).any()}


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (VECTOR, gym.spaces.Discrete(3)),
        (VECTOR, gym.spaces.MultiDiscrete([2, 3])),
        (VECTOR, gym.spaces.Box(-2, 2, (2,), np.float32)),
        (IMAGE, gym.spaces.Discrete(2)),
        (NESTED, gym.spaces.Box(-1, 1, (1,), np.float32)),
        (gym.spaces.Discrete(4), gym.spaces.Discrete(2)),
    ],
    ids=["discrete", "multi-discrete", "box", "image", "dict", "discrete observations"],
)
def test_spaces(observation_space, action_space):
    c = random_env(observation_space, action_space)
    if not isinstance(observation_space, gym.spaces.Box):
        c.env_runners(env_to_module_connector=lambda env, spaces, device: FlattenObservations())
    algo = c.build_algo()
    before = weights(algo)
    algo.train()
    results = algo.train()["learners"]["default_policy"]
    # RLlib keeps constants (the log-std's clip) among the weights.
    constants = {name for name in before if name.endswith("log_std_clip_param_const")}
    assert moved(before, weights(algo)) == before.keys() - constants
    assert results["hypergradient_fallbacks"] == results["skipped_actor_updates"] == 0
    assert results["mixed_norm"] > 0
    algo.stop()


@pytest.mark.parametrize("hypergradient", ["cg", "exact", "none"])
def test_solvers_by_name(hypergradient):
    c = config().training(hypergradient=hypergradient).rl_module(model_config={"fcnet_hiddens": [8]})
    algo = c.build_algo()
    results = algo.train()["learners"]["default_policy"]
    assert ("ihvp_relative_residual" in results) == (hypergradient != "none")
    assert (results["mixed_norm"] == 0) == (hypergradient == "none")
    algo.stop()


def test_multi_agent_trains_the_chosen_modules_only():
    c = config(MultiAgentCartPole, num_agents=3).multi_agent(
        policies={"learns", "also_learns", "stays"},
        policy_mapping_fn=lambda agent_id, episode, **kw: ["learns", "also_learns", "stays"][int(agent_id) % 3],
        policies_to_train=["learns", "also_learns"],
        algorithm_config_overrides_per_module={"also_learns": BLPOConfig.overrides(num_critic_updates=1)},
    )
    algo = c.build_algo()
    before = {module_id: weights(algo, module_id) for module_id in ("learns", "also_learns", "stays")}
    results = algo.train()["learners"]
    for module_id in ("learns", "also_learns"):
        assert moved(before[module_id], weights(algo, module_id))
        assert results[module_id]["vf_loss_after_nesting"] < results[module_id]["vf_loss_before_nesting"]
    assert not moved(before["stays"], weights(algo, "stays"))
    assert "stays" not in results or "policy_loss" not in results["stays"]
    algo.stop()


def test_modules_can_be_added_and_removed():
    c = config(MultiAgentCartPole, num_agents=2).multi_agent(
        policies={"p0"}, policy_mapping_fn=lambda agent_id, episode, **kw: "p0"
    )
    algo = c.build_algo()
    algo.train()
    spec = algo.learner_group._learner.module["p0"]
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    algo.add_module(
        "p1",
        RLModuleSpec.from_module(spec.unwrapped()),
        new_agent_to_module_mapping_fn=lambda agent_id, episode, **kw: f"p{int(agent_id) % 2}",
    )
    before = weights(algo, "p1")
    for _ in range(3):
        algo.train()
    assert moved(before, weights(algo, "p1"))
    algo.remove_module("p1", new_agent_to_module_mapping_fn=lambda agent_id, episode, **kw: "p0")
    assert "p1" not in algo.learner_group._learner._bilevel_updates
    algo.train()
    algo.stop()


def test_remote_env_runners_evaluation_callbacks_and_normalisation(tmp_path):
    c = (
        config("Pendulum-v1")
        .env_runners(
            num_env_runners=1,
            num_envs_per_env_runner=2,
            env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
        )
        .training(train_batch_size_per_learner=800, minibatch_size=400, normalize_rewards=True)
        .evaluation(evaluation_interval=1, evaluation_num_env_runners=0, evaluation_duration=2)
        .callbacks(on_episode_end=lambda metrics_logger, **kw: metrics_logger.log_value("my_metric", 7.0))
    )
    algo = c.build_algo()
    for _ in range(2):
        results = algo.train()
    assert results["env_runners"]["my_metric"] == 7.0
    # Returns are the environment's: normalised rewards would give some −10 per episode, Pendulum gives −2,000 to 0.
    assert results["env_runners"]["episode_return_mean"] < -300
    assert results["evaluation"]["env_runners"]["num_episodes"] >= 2

    def statistics(runner):
        (connector,) = runner._env_to_module[MeanStdFilter]
        return RunningStat.from_state(connector.get_state()[None]["running_stats"][0])

    trained = statistics(algo.env_runner)
    assert trained.n >= 1600
    # Evaluation starts from the training statistics (of the first iteration at least) and not from nothing.
    assert statistics(algo.eval_env_runner_group.local_env_runner).n >= 800
    algo.save_to_path(tmp_path)
    scale = algo.learner_group._learner._reward_scale.scale("default_policy")
    restored = BLPO.from_checkpoint(str(tmp_path))
    assert restored.learner_group._learner._reward_scale.scale("default_policy") == scale != 1.0
    np.testing.assert_array_equal(statistics(restored.env_runner).mean, trained.mean)
    assert not moved(weights(algo), weights(restored))
    before = restored.iteration
    restored.train()
    assert restored.iteration == before + 1
    algo.stop()
    restored.stop()


def test_several_learners_stay_in_step():
    c = config().env_runners(num_envs_per_env_runner=4).learners(num_learners=2, num_cpus_per_learner=0.5)
    algo = c.build_algo()
    before = weights(algo)
    algo.train()
    results = algo.train()
    states = [
        learner["rl_module"]["default_policy"]
        for learner in (r.get() for r in algo.learner_group.foreach_learner(lambda x: x.get_state("rl_module")))
    ]
    assert moved(before, states[0])
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name])
    assert results["learners"]["default_policy"]["mixed_norm"] > 0
    algo.stop()


def test_restored_algorithm_makes_the_same_next_update_bit_for_bit(tmp_path):
    algo = config().training(normalize_rewards=True).build_algo()
    for _ in range(2):
        algo.train()
    algo.save_to_path(tmp_path)
    restored = BLPO.from_checkpoint(str(tmp_path))
    episodes = algo.env_runner.sample(num_timesteps=64)
    states = []
    for each in (algo, restored):
        each.learner_group.update(
            episodes=copy.deepcopy(episodes),
            timesteps={},
            num_epochs=2,
            minibatch_size=32,
            shuffle_batch_per_epoch=True,
        )
        states.append(each.learner_group.get_state()["learner"])
        each.stop()
    for component in ("rl_module", "optimizer", "bilevel", "learner_connector"):
        assert_equal(*(state[component] for state in states))
