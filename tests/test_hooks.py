"""What users of PPO do to learners and modules: hooks, frozen parameters, auxiliary modules, PPO's order of calls."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from episodes import OBS_SIZE, episode, mixed_episodes
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.examples.learners.classes.intrinsic_curiosity_learners import (
    ICM_MODULE_ID,
    add_intrinsic_curiosity_connectors,
)
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule
from ray.rllib.examples.rl_modules.classes.intrinsic_curiosity_model_rlm import IntrinsicCuriosityModel
from ray.rllib.examples.rl_modules.classes.random_rlm import RandomRLModule

from blpo_rllib import BLPOConfig
from blpo_rllib.core.mlp import MLPActorPass, MLPCriticPass
from blpo_rllib.core.networks import AutogradActorPass, AutogradCriticPass
from blpo_rllib.learning.learner import ACTOR_OPTIMIZER, CRITIC_OPTIMIZER, BLPOTorchLearner
from blpo_rllib.learning.players import RLModulePlayers

MODULE = "default_policy"
SPACE = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)


def config(learner_class=None, observation_space=SPACE, action_space=None, **training):
    return (
        BLPOConfig()
        .environment(observation_space=observation_space, action_space=action_space or gym.spaces.Discrete(2))
        .env_runners(num_envs_per_env_runner=4)
        .training(train_batch_size=256, minibatch_size=64, num_epochs=1, nystrom_rank=3, **training)
        .rl_module(model_config={"fcnet_hiddens": [6, 5]})
        .learners(learner_class=learner_class)
        .debugging(seed=3)
    )


def built(c):
    c.validate()
    return c.build_learner()


def update(learner, minibatch_size=None, episodes=None):
    episodes = episodes or mixed_episodes(np.random.default_rng(0))
    return learner.update(episodes=episodes, minibatch_size=minibatch_size, timesteps={})


def weights(learner, module_id=MODULE):
    return {name: p.detach().clone() for name, p in learner.module[module_id].named_parameters()}


def moved(learner, before, module_id=MODULE):
    after = weights(learner, module_id)
    assert all(torch.isfinite(x).all() for x in after.values())
    return {name for name in before if not torch.equal(before[name], after[name])}


class Recording(BLPOTorchLearner):
    """Keeps the directions that its players step along."""

    def postprocess_gradients_for_module(self, *, module_id, config, module_gradients_dict):
        self.directions = [*getattr(self, "directions", []), dict(module_gradients_dict)]
        return super().postprocess_gradients_for_module(
            module_id=module_id, config=config, module_gradients_dict=module_gradients_dict
        )


class TestLosses:
    """On one minibatch the first directions of plain and changed learners are at the same weights."""

    COEFFICIENT = 0.7

    def directions(self, learner_class, **settings):
        learner = built(config(learner_class, num_critic_updates=1, **settings))
        update(learner)
        critic, actor = learner.directions
        return learner, critic, actor

    def test_regulariser_of_rllibs_example(self):
        """rllib/examples/learners/classes/custom_ppo_loss_fn_learner.py, derived from BLPO's learner."""
        coefficient = self.COEFFICIENT

        class Regularised(Recording):
            def compute_loss_for_module(self, *, module_id, config, batch, fwd_out):
                base = super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)
                parameters = self.get_parameters(self.module[module_id])
                mean_weight = torch.mean(torch.stack([w.mean() for w in parameters]))
                self.metrics.log_value((module_id, "mean_weight"), mean_weight, window=1)
                return base + coefficient * mean_weight

        # The critic hardly moves, so that the actor's directions are at the same critic too.
        settings = {"hypergradient": "none", "critic_lr": 1e-12}
        _, *plain = self.directions(Recording, **settings)
        learner, *changed = self.directions(Regularised, **settings)
        count = len(list(learner.module[MODULE].parameters()))
        for before, after in zip(plain, changed):
            for g, (p, h) in zip(before.values(), after.items()):
                expected = torch.full_like(p, coefficient / (count * p.numel()))
                torch.testing.assert_close(h - g, expected, atol=2e-5, rtol=1e-3)
        assert np.isfinite(update(learner)[MODULE]["mean_weight"].peek())

    def test_leaders_loss(self):
        """An entropy bonus written as a loss is that of the settings."""

        class Bonus(Recording):
            def compute_leader_loss_for_module(self, *, module_id, config, batch, fwd_out):
                mask = batch[Columns.LOSS_MASK]
                entropy = torch.distributions.Categorical(logits=fwd_out[Columns.ACTION_DIST_INPUTS]).entropy()
                assert mask.dtype == torch.bool
                assert not mask.all()
                return -0.3 * entropy[mask].mean()

        *_, expected = self.directions(Recording, entropy_coeff=0.3)
        *_, actor = self.directions(Bonus)
        *_, plain = self.directions(Recording)
        assert any(not torch.allclose(a, b) for a, b in zip(plain.values(), expected.values()))
        for a, b in zip(actor.values(), expected.values()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_followers_loss(self):
        """A second squared error doubles the follower's gradient; curvature doubled too, the IHVP changes with it."""

        class Twice(Recording):
            def compute_follower_loss_for_module(self, *, module_id, config, batch, fwd_out):
                mask = batch[Columns.LOSS_MASK]
                values = self.module[module_id].unwrapped().compute_values({Columns.OBS: batch[Columns.OBS]})
                return (values - batch[Postprocessing.VALUE_TARGETS])[mask].square().mean()

        _, plain, _ = self.directions(Recording)
        learner, critic, _ = self.directions(Twice)
        for a, b in zip(plain.values(), critic.values()):
            torch.testing.assert_close(2 * a, b, atol=1e-5, rtol=1e-4)
        assert update(learner, 64)[MODULE]["hypergradient_fallbacks"].peek() == 0

    def test_what_is_no_scalar_is_refused(self):
        class Wrong(BLPOTorchLearner):
            def compute_leader_loss_for_module(self, *, module_id, config, batch, fwd_out):
                return batch[Columns.REWARDS]

        with pytest.raises(ValueError, match=r"Wrong.compute_leader_loss_for_module\(\) returned a tensor of shape"):
            update(built(config(Wrong)))


class TestDirections:
    def test_of_each_step_of_each_player(self):
        learner = built(config(Recording, num_critic_updates=3))
        update(learner, 64)
        num_steps = sum(map(len, mixed_episodes(np.random.default_rng(0))))
        num_minibatches = learner._plan_segments({MODULE: num_steps}, 64)[MODULE].num_minibatches
        critic, actor = (
            set(learner.get_optimizer(MODULE, name).param_groups[0]["params"])
            for name in (CRITIC_OPTIMIZER, ACTOR_OPTIMIZER)
        )
        expected = ([critic] * 3 + [actor]) * num_minibatches
        assert [set(gradients) for gradients in learner.directions] == expected

    def test_changed_ones_are_stepped_along(self):
        """Without a gradient Adam's first steps leave a parameter where it is."""

        class Masked(BLPOTorchLearner):
            def postprocess_gradients_for_module(self, *, module_id, config, module_gradients_dict):
                names = {p: name for name, p in self.module[module_id].named_parameters()}
                for p, gradient in module_gradients_dict.items():
                    if "bias" in names[p]:
                        gradient.zero_()
                return module_gradients_dict

        learner = built(config(Masked))
        before = weights(learner)
        update(learner, 64)
        assert moved(learner, before) == {name for name in before if "bias" not in name}

    def test_norms_are_logged(self):
        results = update(built(config().reporting(log_gradients=True)))[MODULE]
        norm = results["gradients_actor_global_norm"].peek()
        assert norm == pytest.approx(results["hypergradient_norm"].peek(), rel=1e-5)
        assert results["gradients_critic_global_norm"].peek() > 0


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("compute_losses", "add a loss in compute_leader_loss"),
        ("compute_gradients", "rows and products of second derivatives"),
        ("postprocess_gradients", "override postprocess_gradients_for_module"),
        ("apply_gradients", "each player has an Adam of its own"),
    ],
)
def test_hooks_without_meaning_are_refused(name, remedy):
    mine = type("Mine", (BLPOTorchLearner,), {name: lambda self, *args, **kwargs: None})
    for refused in (lambda: config(mine).validate(), lambda: config(mine).build_learner()):
        with pytest.raises(ValueError, match=rf"Mine overrides {name}\(\), which BLPO never calls: .*{remedy}"):
            refused()


def test_optimizers_of_a_subclass_are_refused():
    class Mine(BLPOTorchLearner):
        def configure_optimizers_for_module(self, module_id, config=None):
            parameters = list(self.module[module_id].parameters())
            self.register_optimizer(module_id=module_id, optimizer=torch.optim.SGD(parameters), params=parameters)

    with pytest.raises(ValueError, match="Mine configures optimizers for module 'default_policy' in its own way"):
        config(Mine).build_learner()


def first_layers(module):
    return {name: p for name, p in module.named_parameters() if ".mlp.0." in name and "encoder" in name}


class TestFrozen:
    def test_after_building(self):
        learner = built(config())
        update(learner, 64)
        module = learner.module[MODULE]
        frozen = first_layers(module)
        assert len(frozen) == 4
        size = sum(p.numel() for p in learner.players_of(MODULE).critic_parameters)
        for p in frozen.values():
            p.requires_grad_(False)
        before = weights(learner)
        results = update(learner, 64)[MODULE]
        assert moved(learner, before) == before.keys() - frozen.keys()
        assert results["hypergradient_fallbacks"].peek() == results["skipped_actor_updates"].peek() == 0
        assert results["mixed_norm"].peek() > 0
        players = learner.players_of(MODULE)
        smaller = size - (OBS_SIZE + 1) * 6
        assert sum(p.numel() for p in players.critic_parameters) == smaller
        assert learner._bilevel_updates[MODULE]._solver.coordinates.max() < smaller
        # The others' moments go on from where they were, and those of the frozen wait.
        steps = {
            name: float(learner.get_optimizer(MODULE, ACTOR_OPTIMIZER).state[p]["step"])
            for name, p in (
                ("moving", module.pi.net.mlp[-1].weight),
                ("frozen", module.encoder.actor_encoder.net.mlp[0].weight),
            )
        }
        assert steps["moving"] == 2 * steps["frozen"] > 0
        for p in frozen.values():
            p.requires_grad_(True)
        before = weights(learner)
        update(learner, 64)
        assert moved(learner, before) == before.keys()
        assert isinstance(learner.players_of(MODULE).critic(torch.zeros(2, OBS_SIZE)), MLPCriticPass)

    def test_in_the_module(self):
        class Frozen(DefaultPPOTorchRLModule):
            def setup(self):
                super().setup()
                for p in first_layers(self).values():
                    p.requires_grad_(False)

        learner = built(config().rl_module(rl_module_spec=RLModuleSpec(Frozen)))
        before = weights(learner)
        update(learner, 64)
        frozen = first_layers(learner.module[MODULE]).keys()
        assert moved(learner, before) == before.keys() - frozen

    def test_checkpoint_of_other_freezing(self):
        """The optimizers' states fit whatever is frozen."""
        learner, restored = built(config()), built(config())
        update(learner, 64)
        for p in first_layers(restored.module[MODULE]).values():
            p.requires_grad_(False)
        restored.set_state(learner.get_state())
        before = weights(restored)
        update(restored, 64)
        assert moved(restored, before) == before.keys() - first_layers(restored.module[MODULE]).keys()

    def test_a_frozen_trunk_may_be_shared(self):
        class Shared(DefaultPPOTorchRLModule):
            def setup(self):
                super().setup()
                self.encoder.critic_encoder = self.encoder.actor_encoder
                for p in self.encoder.parameters():
                    p.requires_grad_(False)

        learner = built(config().rl_module(rl_module_spec=RLModuleSpec(Shared)))
        before = weights(learner)
        update(learner, 64)
        assert moved(learner, before) == {name for name in before if name.startswith(("pi.", "vf."))}

    def test_a_whole_player(self):
        learner = built(config())
        for p in learner.module[MODULE].vf.parameters():
            p.requires_grad_(False)
        for p in learner.module[MODULE].encoder.critic_encoder.parameters():
            p.requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable critic parameters: unfreeze some of them"):
            update(learner, 64)

    def test_nothing_frozen_goes_by_hand(self):
        players = built(config()).players_of(MODULE)
        obs, actions = torch.zeros(2, OBS_SIZE), torch.zeros(2, dtype=torch.int64)
        assert isinstance(players.critic(obs), MLPCriticPass)
        assert isinstance(players.actor(obs, actions, None), MLPActorPass)


@pytest.mark.parametrize("action_space", [gym.spaces.Discrete(2), gym.spaces.MultiDiscrete([2, 3])])
@pytest.mark.parametrize("base", [DefaultPPOTorchRLModule, type("Mine", (DefaultPPOTorchRLModule,), {})])
def test_rllibs_default_module(action_space, base):
    c = config(action_space=action_space).rl_module(rl_module_spec=RLModuleSpec(base))
    learner = built(c)
    assert not learner.module[MODULE].model_config["free_log_std"]
    if isinstance(action_space, gym.spaces.Discrete):
        before = weights(learner)
        update(learner, 64)
        assert moved(learner, before) == before.keys()
    box = config(action_space=gym.spaces.Box(-1, 1, (2,), np.float32)).rl_module(rl_module_spec=RLModuleSpec(base))
    assert built(box).module[MODULE].model_config["free_log_std"]


class SharedTrunk(TorchRLModule, ValueFunctionAPI):
    """Policy and values on one layer."""

    def setup(self):
        self.trunk = torch.nn.Linear(OBS_SIZE, self.model_config.get("size", 6))
        self.policy, self.values = torch.nn.Linear(6, 2), torch.nn.Linear(6, 1)
        # Some modules keep tensors of their last pass, which have a graph and cannot be copied deeply.
        self.last = torch.tanh(self.trunk.weight)

    def _forward(self, batch, **kwargs):
        return {Columns.ACTION_DIST_INPUTS: self.policy(torch.tanh(self.trunk(batch[Columns.OBS])))}

    def compute_values(self, batch, embeddings=None):
        return self.values(torch.tanh(self.trunk(batch[Columns.OBS])))[..., 0]


class TwoLayers(SharedTrunk):
    """Values have a layer of their own, and the training pass reads actions, as those of some modules of RLlib's do."""

    def setup(self):
        super().setup()
        self.own = torch.nn.Linear(OBS_SIZE, 1)

    def _forward_train(self, batch, **kwargs):
        logits = self._forward(batch)[Columns.ACTION_DIST_INPUTS]
        logp = torch.distributions.Categorical(logits=logits).log_prob(batch[Columns.ACTIONS])
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.ACTION_LOGP: logp}

    def compute_values(self, batch, embeddings=None):
        return self.own(batch[Columns.OBS])[..., 0]


def test_nan_weights():
    class Broken(DefaultPPOTorchRLModule):
        def setup(self):
            super().setup()
            self.vf.net.mlp[0].bias.data[:] = float("nan")

    with pytest.raises(ValueError, match=r"\(Broken\) has NaN or infinite weights before training: vf.net.mlp.0.bias"):
        config().rl_module(rl_module_spec=RLModuleSpec(Broken)).build_learner()


class TestSharedTrunk:
    def test_is_refused_with_what_to_do(self):
        c = config(separate_shared_trunk=False).rl_module(rl_module_spec=RLModuleSpec(SharedTrunk))
        with pytest.raises(ValueError, match=r"shares 2 parameters.*trunk.*separate_shared_trunk=None in config.train"):
            c.validate()
        with pytest.raises(ValueError, match="separate_shared_trunk='yes' must be True, False, or None"):
            config(separate_shared_trunk="yes").validate()

    @pytest.mark.parametrize("wanted", [True, None])
    def test_two_copies(self, wanted, caplog):
        c = config(separate_shared_trunk=wanted).rl_module(rl_module_spec=RLModuleSpec(SharedTrunk))
        learner = built(c)
        assert ("(SharedTrunk) shares parameters between policy and value function" in caplog.text) == (wanted is None)
        before = weights(learner)
        for name in ("trunk", "policy", "values"):
            assert torch.equal(before[f"actor.{name}.weight"], before[f"critic.{name}.weight"])
        update(learner, 64)
        idle = {f"{owner}.{kind}" for owner in ("actor.values", "critic.policy") for kind in ("weight", "bias")}
        assert moved(learner, before) == before.keys() - idle
        # The module on an EnvRunner takes the learner's weights and acts as the actor does.
        runner_module = c.get_rl_module_spec(inference_only=True).build()
        runner_module.set_state(learner.module[MODULE].get_state(inference_only=True))
        obs = torch.randn(5, OBS_SIZE)
        found = runner_module.forward_exploration({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
        actor = learner.module[MODULE].actor
        torch.testing.assert_close(found, actor.policy(torch.tanh(actor.trunk(obs))).detach())

    def test_other_modules_stay_one(self):
        learner = built(config(separate_shared_trunk=True))
        assert type(learner.module[MODULE]).__name__ == "BLPOTorchRLModule"

    def test_nothing_shared_nothing_copied(self):
        """The search for shared parameters leaves the weights as they would have been."""
        found = []
        for wanted in (None, False):
            c = config(separate_shared_trunk=wanted).rl_module(rl_module_spec=RLModuleSpec(TwoLayers))
            torch.manual_seed(0)
            found.append(c.get_rl_module_spec().build())
        assert [type(module) for module in found] == [TwoLayers] * 2
        learner = built(c)
        before = weights(learner)
        update(learner, 64)
        assert moved(learner, before) == {name for name in before if not name.startswith("values.")}
        for a, b in zip(*(module.parameters() for module in found)):
            assert torch.equal(a, b)


class TestOrderOfCalls:
    """RLlib's action masking takes the mask out of the batch as it computes values, and uses it in the policy."""

    SPACE = gym.spaces.Dict({"action_mask": gym.spaces.Box(0, 1, (3,), np.float32), "observations": SPACE})

    def config(self):
        c = config(observation_space=self.SPACE, action_space=gym.spaces.Discrete(3))
        return c.rl_module(rl_module_spec=RLModuleSpec(ActionMaskingTorchRLModule))

    def episodes(self, module, rng):
        for length in (64, 60):
            observations = [
                {"action_mask": np.array([1, i % 2, 1], np.float32), "observations": x.astype(np.float32)}
                for i, x in enumerate(rng.normal(size=(length + 1, OBS_SIZE)))
            ]
            stacked = {k: torch.as_tensor(np.stack([o[k] for o in observations[:-1]])) for k in observations[0]}
            logits = module.forward_exploration({Columns.OBS: stacked})[Columns.ACTION_DIST_INPUTS].detach()
            distribution = torch.distributions.Categorical(logits=logits)
            actions = distribution.sample()
            yield SingleAgentEpisode(
                observations=observations,
                observation_space=self.SPACE,
                actions=list(actions.numpy()),
                rewards=list(rng.normal(size=length)),
                extra_model_outputs={
                    Columns.ACTION_LOGP: list(distribution.log_prob(actions).numpy()),
                    Columns.ACTION_DIST_INPUTS: list(logits.numpy()),
                },
                len_lookback_buffer=0,
            ).to_numpy()

    def test_action_masking(self):
        learner = built(self.config())
        module = learner.module[MODULE]
        before = weights(learner)
        results = update(learner, None, list(self.episodes(module, np.random.default_rng(0))))[MODULE]
        assert moved(learner, before) == before.keys()
        # Before the actor's only step its policy is that which sampled, masks included.
        assert results["approx_kl"].peek() == pytest.approx(0, abs=1e-5)
        assert results["clip_fraction"].peek() == 0
        assert results["hypergradient_fallbacks"].peek() == 0

    def test_observations_stay_whole(self):
        module = self.config().build_learner().module[MODULE]
        players = RLModulePlayers(module, "m")
        obs = {"action_mask": torch.tensor([[1.0, 0.0, 1.0]]), "observations": torch.zeros(1, OBS_SIZE)}
        for _ in range(2):
            values = players.critic(obs)
            actor = players.actor(obs, torch.tensor([1]), None)
        assert set(obs) == {"action_mask", "observations"}
        assert isinstance(values, AutogradCriticPass)
        assert isinstance(actor, AutogradActorPass)
        assert float(actor.logp) < -1e30


class PolicyOnly(TorchRLModule):
    """Neither value function nor loss."""

    def setup(self):
        self.layer = torch.nn.Linear(OBS_SIZE, 2)

    def _forward(self, batch, **kwargs):
        return {Columns.ACTION_DIST_INPUTS: self.layer(batch[Columns.OBS])}


class TestModulesWithoutValues:
    def two(self, other, learner_class=None, **kwargs):
        specs = {MODULE: RLModuleSpec(), "other": other}
        return config(learner_class, **kwargs).rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs=specs))

    @pytest.mark.parametrize("module_class", [PolicyOnly, RandomRLModule])
    def test_left_alone_by_a_callable(self, module_class):
        spec = RLModuleSpec(module_class, observation_space=SPACE, action_space=gym.spaces.Discrete(2))
        c = self.two(spec).multi_agent(policies_to_train=lambda module_id, batch: module_id == MODULE)
        learner = built(c)
        before = weights(learner)
        update(learner, 64)
        assert moved(learner, before)
        with pytest.raises(ValueError, match="has no value function, which BLPO differentiates"):
            self.two(spec).validate()

    def test_wanted_after_all_by_a_callable(self):
        spec = RLModuleSpec(PolicyOnly, observation_space=SPACE, action_space=gym.spaces.Discrete(2))
        learner = built(self.two(spec).multi_agent(policies_to_train=lambda module_id, batch: True))
        with pytest.raises(ValueError, match=r"'other' \(PolicyOnly\) has no value function"):
            list(learner._minibatches_of_others({"other": {}}, 0, num_epochs=1, minibatch_size=None))

    def test_intrinsic_curiosity(self):
        """RLlib's example: a model without value function, trained by a loss of its own, adds to the rewards."""

        class Curious(BLPOTorchLearner):
            def build(self):
                super().build()
                add_intrinsic_curiosity_connectors(self)

        icm = RLModuleSpec(
            IntrinsicCuriosityModel,
            observation_space=SPACE,
            action_space=gym.spaces.Discrete(2),
            learner_only=True,
            model_config={"feature_dim": 4, "feature_net_hiddens": (8,), "feature_net_activation": "relu"},
        )
        specs = MultiRLModuleSpec(rl_module_specs={MODULE: RLModuleSpec(), ICM_MODULE_ID: icm})
        c = config(Curious, actor_lr=1e-3).rl_module(rl_module_spec=specs)
        c.training(learner_config_dict={"forward_loss_weight": 0.2, "intrinsic_reward_coeff": 0.5})
        learner = built(c)
        before = {module_id: weights(learner, module_id) for module_id in (MODULE, ICM_MODULE_ID)}
        episodes = [episode(64, np.random.default_rng(i)) for i in range(4)]
        results = learner.update(episodes=episodes, minibatch_size=65, num_epochs=2, timesteps={})
        for module_id, weights_before in before.items():
            assert moved(learner, weights_before, module_id) == weights_before.keys()
        assert results[ICM_MODULE_ID]["default_optimizer_learning_rate"].peek() == 1e-3
        assert results[MODULE]["num_module_steps_trained"].peek() == 2 * 256
        # 4 fragments with their last observations are 4 minibatches of single steps in each of 2 epochs.
        (optimizer,) = (x for _, x in learner.get_optimizers_for_module(ICM_MODULE_ID))
        assert {int(state["step"]) for state in optimizer.state.values()} == {8}
        assert results[ICM_MODULE_ID]["total_loss"].peek() > 0
