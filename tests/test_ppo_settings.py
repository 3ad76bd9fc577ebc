"""Settings of a PPO script in BLPO: they hold, or there is a word about what becomes of them."""

import logging

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.external.env_runner_server_for_external_inference import EnvRunnerServerForExternalInference
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.examples.learners.classes.custom_ppo_loss_fn_learner import PPOTorchLearnerWithWeightRegularizerLoss
from ray.rllib.policy.policy import PolicySpec

from blpo_rllib import BLPO, BLPOConfig, ppo_settings
from blpo_rllib.learning.learner import ACTOR_OPTIMIZER, CRITIC_OPTIMIZER, BLPOTorchLearner


def config():
    return BLPOConfig().environment("CartPole-v1")


def with_spaces(c=None):
    return (c or config()).environment(
        observation_space=gym.spaces.Box(-1, 1, (4,), np.float32), action_space=gym.spaces.Discrete(2)
    )


def small():
    """One whose training step takes a fraction of a second."""
    return (
        config()
        .env_runners(num_envs_per_env_runner=2)
        .training(num_epochs=1, nystrom_rank=2)
        .debugging(seed=0, log_level="ERROR")
    )


def rates(learner, module_id="default_policy"):
    return [
        learner.get_optimizer(module_id, name).param_groups[0]["lr"] for name in (ACTOR_OPTIMIZER, CRITIC_OPTIMIZER)
    ]


@pytest.fixture
def said(caplog):
    """What validation says, as one string."""

    def validate(c):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "blpo_rllib"):
            c.validate()
        return "\n".join(record.getMessage() for record in caplog.records)

    return validate


class TestBatchSizes:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: small().training(train_batch_size=256),
            lambda: BLPOConfig.from_dict({**small().to_dict(), "train_batch_size": 256}),
            lambda: small().update_from_dict({"train_batch_size": 256}),
            lambda: small().training(train_batch_size=256).copy(),
            lambda: BLPO(config={"env": "CartPole-v1", "train_batch_size": 256, "num_envs_per_env_runner": 2}).config,
        ],
        ids=["argument", "from_dict", "update_from_dict", "copy", "algorithm of a dict"],
    )
    def test_train_batch_size_is_what_a_batch_holds(self, make):
        c = make()
        assert c.train_batch_size_per_learner == c.total_train_batch_size == 256
        assert c.copy(copy_frozen=False).learners(num_learners=2).train_batch_size_per_learner == 128

    def test_steps_taken(self):
        algo = small().training(train_batch_size=256).build_algo()
        # The last round of the two environments may be one step too long.
        assert 256 <= algo.train()["env_runners"]["num_env_steps_sampled_lifetime"] <= 257
        algo.stop()

    def test_default_batch_is_the_reference(self):
        assert config().train_batch_size_per_learner == 20480
        assert config().training(train_batch_size_per_learner=512).total_train_batch_size == 512

    def test_old_names_in_dicts(self):
        c = BLPOConfig.from_dict({"num_sgd_iter": 7, "sgd_minibatch_size": 64, "lambda": 0.5, "num_workers": 3})
        assert (c.num_epochs, c.minibatch_size, c.lambda_, c.num_env_runners) == (7, 64, 0.5, 3)

    def test_unknown_names_in_dicts(self, said):
        assert "'nystrom_rnk' is no setting of BLPO's or RLlib's: did you mean 'nystrom_rank'?" in said(
            config().update_from_dict({"nystrom_rnk": 7})
        )

    def test_env_runners_that_are_not_rllibs_have_one_environment(self):
        """A batch is then one fragment; RLlib's server for external environments would wait for ever for a second."""
        for cls, expected in ((EnvRunnerServerForExternalInference, 1), (SingleAgentEnvRunner, 32), (None, 32)):
            c = config().env_runners(env_runner_cls=cls)
            c.validate()
            assert (c.num_envs_per_env_runner, c.get_rollout_fragment_length()) == (expected, 20480 / expected)
        c = config().env_runners(env_runner_cls=EnvRunnerServerForExternalInference, num_envs_per_env_runner=4)
        c.validate()
        assert c.num_envs_per_env_runner == 4

    def test_default_minibatches_of_a_smaller_batch_are_fragments(self, said):
        c = config().env_runners(num_envs_per_env_runner=4).training(train_batch_size_per_learner=512)
        assert "minibatch_size=128, one rollout fragment, as the batch of 512 steps is smaller" in said(c)
        assert (c.minibatch_size, c.get_segment_length()) == (128, 128)
        c.training(train_batch_size_per_learner=20480).validate()
        assert c.minibatch_size == 640

    def test_a_minibatch_size_that_was_set_stays(self, said):
        c = config().env_runners(num_envs_per_env_runner=4)
        c.training(train_batch_size_per_learner=512, minibatch_size=640)
        with pytest.raises(ValueError, match=r"`minibatch_size` \(640\) must be <="):
            c.validate()

    def test_segments_are_cut_where_minibatches_are_shorter_than_fragments(self, said):
        c = config().env_runners(num_envs_per_env_runner=1).training(train_batch_size=4000, minibatch_size=128)
        assert "segment_length=128, so that each minibatch of 128 steps gets a whole segment" in said(c)
        assert c.get_segment_length() == 128

    def test_fragments_rounded_up(self, said):
        """100 steps of 3 environments are 3 fragments of 34; Pendulum, since an episode that ends adds steps."""
        c = small().environment("Pendulum-v1").env_runners(num_envs_per_env_runner=3)
        c.training(train_batch_size_per_learner=100, minibatch_size=34)
        assert said(c) == ""
        algo = c.build_algo()
        results = algo.train()
        assert results["env_runners"]["num_env_steps_sampled_lifetime"] == 102
        assert results["learners"]["default_policy"]["num_module_steps_trained"] == 102
        (plan,) = algo.learner_group._learner._plan_segments({"default_policy": 102}, 34).values()
        assert (plan.num_minibatches, plan.num_segments) == (3, 3)
        algo.stop()


class TestLearningRates:
    def test_lr_stands_for_both(self, said):
        c = with_spaces().training(lr=1e-3)
        assert "lr=0.001 stands for actor_lr=0.001, critic_lr=0.004" in said(c)
        assert rates(c.build_learner()) == [1e-3, 4e-3]

    def test_schedule(self):
        c = with_spaces().training(lr=[[0, 1e-3], [1000, 0.0]])
        c.validate()
        assert (c.get_actor_lr(), c.get_critic_lr()) == ([[0, 1e-3], [1000, 0.0]], [[0, 4e-3], [1000, 0.0]])

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ([{}], (3e-4, 1.2e-3)),
            ([{"lr": 1e-3, "actor_lr": 1e-4}], (1e-4, 4e-3)),
            ([{"actor_lr": 1e-4, "lr": 1e-3}], (1e-4, 4e-3)),
            ([{"lr": 1e-3, "critic_lr": 1.2e-3}], (1e-3, 1.2e-3)),
            ([{"critic_lr": 1.2e-3}, {"lr": 1e-3}], (1e-3, 1.2e-3)),
            ([{"actor_lr": 1e-4}, {"lr": 1e-3}], (1e-3, 4e-3)),
            ([{"lr": 1e-3}, {"actor_lr": 1e-4}], (1e-4, 4e-3)),
            ([{"actor_lr": 1e-4}], (1e-4, 1.2e-3)),
        ],
    )
    def test_what_was_set_last_holds(self, settings, expected):
        by_call, by_dict, by_attribute = config(), config(), config()
        for each in settings:
            by_call.training(**each)
            by_dict.update_from_dict(each)
            for name in sorted(each, key=lambda name: name != "lr"):
                setattr(by_attribute, name, each[name])
        for c in (by_call, by_dict, by_attribute, by_call.copy(), BLPOConfig.from_dict(by_call.to_dict())):
            assert (c.get_actor_lr(), c.get_critic_lr()) == expected

    def test_searched_for_by_tune(self):
        """Tune draws in a dict of the whole config."""
        drawn = {**config().training(lr=tune.loguniform(1e-5, 1e-3)).to_dict(), "lr": 2e-4}
        c = BLPOConfig().update_from_dict(drawn)
        assert (c.get_actor_lr(), c.get_critic_lr()) == (2e-4, 8e-4)
        # As PBT does with a setting that the user left alone.
        c = BLPOConfig().update_from_dict({**config().to_dict(), "lr": 2e-4})
        assert (c.get_actor_lr(), c.get_critic_lr()) == (2e-4, 8e-4)

    def test_torch_schedulers_drive_both_optimizers(self, tmp_path):
        from episodes import OBS_SIZE, mixed_episodes

        c = (
            config()
            .environment(
                observation_space=gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32),
                action_space=gym.spaces.Discrete(2),
            )
            .training(lr=1e-3, train_batch_size=256, minibatch_size=64)
            .experimental(_torch_lr_scheduler_classes=[lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5)])
        )
        c.validate()
        learner, restored = c.build_learner(), c.build_learner()
        update = lambda x: x.update(episodes=mixed_episodes(np.random.default_rng(0)), minibatch_size=64, timesteps={})
        results = update(learner)["default_policy"]
        assert rates(learner) == [5e-4, 2e-3]
        assert results["actor_learning_rate"].peek() == 5e-4
        restored.set_state(learner.get_state())
        for each in (learner, restored):
            update(each)
            assert rates(each) == [2.5e-4, 1e-3]

    def test_torch_schedulers_and_a_schedule(self):
        c = config().training(actor_lr=[[0, 1e-3], [1000, 0.0]])
        c.experimental(_torch_lr_scheduler_classes=[lambda o: None])
        with pytest.raises(ValueError, match="actor_lr=.* or as torch schedulers, not both"):
            c.validate()


class TestLeftAside:
    def test_value_loss(self, said):
        message = said(config().training(vf_loss_coeff=0.01, vf_clip_param=10.0))
        assert "vf_loss_coeff=0.01 is left aside: the critic has an optimizer of its own" in message
        assert "vf_clip_param=10.0 is left aside: the critic's loss is the plain squared error" in message
        assert message.count("\n") == 1
        assert said(config().training(vf_loss_coeff=1.0, vf_clip_param=float("inf"))) == ""

    @pytest.mark.parametrize("model_config", [DefaultModelConfig(), {"vf_share_layers": True}])
    def test_shared_layers_become_separate(self, said, model_config):
        c = with_spaces(config().rl_module(model_config=model_config))
        assert "vf_share_layers=True in the model config is left aside" in said(c)
        learner = c.build_learner()
        encoder = learner.module["default_policy"].encoder
        assert encoder.actor_encoder is not encoder.critic_encoder
        assert said(config().rl_module(model_config=DefaultModelConfig(vf_share_layers=False))) == ""

    def test_defaults_need_no_word(self, said):
        assert said(config()) == ""


class TestSwitches:
    @pytest.mark.parametrize("penalty", [{"kl_coeff": 0.5}, {"kl_coeff": 0.2}, {"kl_target": 0.02}])
    def test_a_kl_penalty_that_was_set_is_on(self, penalty):
        assert config().training(**penalty).use_kl_loss
        assert BLPOConfig.from_dict(penalty).use_kl_loss
        c = config()
        for name, value in penalty.items():
            setattr(c, name, value)
        assert c.use_kl_loss
        assert BLPOConfig.from_dict(c.to_dict()).use_kl_loss

    def test_unless_it_was_switched_off(self, said):
        c = config().training(use_kl_loss=False, kl_coeff=0.5)
        assert not c.use_kl_loss
        assert "kl_coeff=0.5 has no effect without use_kl_loss=True" in said(c)
        assert not config().training(kl_coeff=0.0).use_kl_loss
        assert not config().use_kl_loss

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"nystrom_rank": 3, "hypergradient": "cg"}, "nystrom_rank=3 has no effect with hypergradient='cg'"),
            ({"cg_iterations": 3}, "cg_iterations=3 has no effect with hypergradient='nystrom'"),
            ({"hypergradient": "none", "hypergradient_bound": 2.0}, "hypergradient_bound=2.0 has no effect"),
        ],
    )
    def test_settings_of_another_solver(self, said, settings, message):
        assert message in said(config().training(**settings))


class TestLearnerClass:
    @pytest.mark.parametrize("learner_class", [PPOTorchLearner, PPOTorchLearnerWithWeightRegularizerLoss])
    def test_another_algorithms_learner_is_refused(self, learner_class):
        with pytest.raises(
            ValueError, match=rf"{learner_class.__name__} does not run BLPO.*derive it from.*BLPOTorchL"
        ):
            config().learners(learner_class=learner_class).validate()

    def test_a_subclass_is_taken(self):
        class Mine(BLPOTorchLearner):
            pass

        config().learners(learner_class=Mine).validate()


class TestModules:
    """Settings of single modules."""

    def two(self, **kwargs):
        return with_spaces().multi_agent(
            policies={"p0": PolicySpec(), "p1": PolicySpec(**kwargs)},
            policy_mapping_fn=lambda agent_id, episode, **kw: "p0",
        )

    @pytest.mark.parametrize(
        "make",
        [
            lambda own, two: two(config=own),
            lambda own, two: two().rl_module(algorithm_config_overrides_per_module={"p1": own}),
            lambda own, two: two(config={"actor_lr": 7.0}).rl_module(algorithm_config_overrides_per_module={"p1": own}),
        ],
        ids=["PolicySpec", "overrides", "overrides before PolicySpec"],
    )
    @pytest.mark.parametrize("own", [{"lr": 1e-2}, PPOConfig.overrides(lr=1e-2), BLPOConfig.overrides(actor_lr=1e-2)])
    def test_learning_rates(self, make, own):
        c = make(own, self.two).training(actor_lr=1e-3)
        c.validate()
        learner = c.build_learner()
        assert rates(learner, "p0") == [1e-3, 1.2e-3]
        assert rates(learner, "p1") == [1e-2, 4e-2 if "lr" in own else 1.2e-3]

    def test_what_holds_at_the_top_holds_per_module(self, said):
        message = said(self.two(config={"vf_loss_coeff": 0.5, "kl_coeff": 0.3, "lr": 1e-2, "num_epochs": 9}))
        assert "module 'p1': vf_loss_coeff=0.5 is left aside" in message
        assert "module 'p1': lr=0.01 stands for actor_lr=0.01" in message
        assert "module 'p1': num_epochs cannot differ between modules" in message
        assert self.two(config={"kl_coeff": 0.3}).get_config_for_module("p1").use_kl_loss
        assert not self.two(config={"kl_coeff": 0.3}).get_config_for_module("p0").use_kl_loss
        with pytest.raises(ValueError, match="module 'p1': use_critic=False has no meaning"):
            self.two(config={"use_critic": False}).validate()
        with pytest.raises(ValueError, match="module 'p1': nystrom_rank=0 must be"):
            self.two(config=BLPOConfig.overrides(nystrom_rank=0)).validate()

    def test_whole_configs(self):
        c = self.two(config=BLPOConfig().training(actor_lr=1e-2))
        assert c.get_config_for_module("p1").get_actor_lr() == 1e-2
        with pytest.raises(ValueError, match="holds a PPOConfig, of which.*BLPOConfig.overrides"):
            self.two(config=PPOConfig()).validate()


def test_table_names_every_argument_of_ppos_training():
    import inspect

    arguments = set(inspect.signature(PPOConfig.training).parameters) - {"self", "kwargs"}
    # Gone from the new API stack, where PPO's validation refuses them.
    arguments -= {"lr_schedule", "entropy_coeff_schedule"}
    rows = [row.name for row in ppo_settings.SETTINGS]
    assert arguments <= set(rows)
    assert len(rows) == len(set(rows))
    table = ppo_settings.markdown()
    assert all(f"| `{name}` |" in table for name in rows)
