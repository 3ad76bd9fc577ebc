"""Wrong settings fail in ``validate()``, naming field, value and remedy."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule

from blpo_rllib import BLPOConfig
from blpo_rllib.core.curvature import GaussNewton
from blpo_rllib.core.ihvp import IHVP_SOLVERS, ConjugateGradient, Exact, Nystrom, ScaledIdentity
from blpo_rllib.learning.learner import BLPOTorchLearner


def config():
    return BLPOConfig().environment("CartPole-v1")


def with_spaces():
    return config().environment(
        observation_space=gym.spaces.Box(-1, 1, (4,), np.float32), action_space=gym.spaces.Discrete(2)
    )


class PolicyOnlyModule(TorchRLModule):
    """No value function."""


def test_defaults_are_the_reference():
    c = config()
    c.validate()
    assert (c.gamma, c.lambda_, c.clip_param, c.num_epochs) == (0.99, 0.95, 0.2, 4)
    assert (c.actor_lr, c.critic_lr, c.adam_epsilon, c.grad_clip, c.entropy_coeff) == (3e-4, 1.2e-3, 1e-5, None, 0.0)
    assert (c.num_envs_per_env_runner, c.get_segment_length(), c.minibatch_size) == (32, 640, 640)
    solver = c.get_ihvp_solver()
    assert isinstance(solver, Nystrom)
    assert (solver.rank, solver.damping, solver.core_shift, solver.redraw) == (5, 50.0, 1.0, False)
    assert c.get_default_learner_class() is BLPOTorchLearner


def test_importing_registers_the_trainable():
    # In a process of its own: Ray forgets registrations when it is shut down, as other tests do.
    code = (
        "import blpo_rllib; from ray.tune.registry import get_trainable_cls; "
        "assert get_trainable_cls('BLPO') is blpo_rllib.BLPO"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_sets_its_own_fields_and_passes_the_others_on():
    c = config().training(num_critic_updates=7, hypergradient="cg", nystrom_damping=0.5, gamma=0.9, num_epochs=2)
    assert (c.num_critic_updates, c.nystrom_damping, c.gamma, c.num_epochs) == (7, 0.5, 0.9, 2)
    assert isinstance(c.get_ihvp_solver(), ConjugateGradient)
    assert c.actor_lr == 3e-4
    assert config().training(curvature="gauss_newton").get_curvature() is GaussNewton
    assert config().training(curvature=GaussNewton).get_curvature() is GaussNewton
    solver = Exact(2.0)
    assert config().training(hypergradient=solver).get_ihvp_solver() is solver
    assert config().training(hypergradient="none").get_ihvp_solver() is None
    assert isinstance(config().training(hypergradient="scaled_identity").get_ihvp_solver(), ScaledIdentity)


def attributes(solver):
    """What a solver was made with."""
    return type(solver), {k: v for k, v in vars(solver).items() if not k.startswith("_")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"nystrom_core_shift": 0.5}, Nystrom(core_shift=0.5)),
        ({"nystrom_redraw": True, "nystrom_rank": 3}, Nystrom(rank=3, redraw=True)),
        ({"hypergradient": "cg", "cg_iterations": 7}, ConjugateGradient(iterations=7)),
        ({"hypergradient": "cg", "cg_damping": 0.5}, ConjugateGradient(damping=0.5)),
        ({"hypergradient": "exact", "exact_damping": 2.0}, Exact(damping=2.0)),
        ({"hypergradient": "scaled_identity", "scaled_identity_damping": 3.0}, ScaledIdentity(damping=3.0)),
    ],
)
def test_fields_that_are_arguments_of_solvers_now(old, new):
    """They are taken with a warning that says what to write instead, by training(), overrides and dicts alike."""
    with pytest.warns(DeprecationWarning, match=r"write hypergradient=\w+\(\w+=.*\) instead"):
        c = config().training(**old)
    assert attributes(c.get_ihvp_solver()) == attributes(new)
    assert f"{type(new).__name__}(" in repr(c.get_ihvp_solver()) == repr(new)
    with pytest.warns(DeprecationWarning, match=r"write hypergradient=\w+\(\w+=.*\) instead"):
        again = BLPOConfig.from_dict(c.to_dict())
    assert attributes(again.get_ihvp_solver()) == attributes(new)
    overrides = BLPOConfig.overrides(**old)
    with pytest.warns(DeprecationWarning, match="is deprecated: write"):
        assert attributes(config().update_from_dict(overrides).get_ihvp_solver()) == attributes(new)


def test_old_fields_at_their_defaults_are_silent(recwarn):
    """As in dicts and checkpoints of version 0.1.0, which hold all of them."""
    fields = {"nystrom_core_shift": 1.0, "nystrom_redraw": False, "cg_iterations": 20, "cg_damping": 0.0}
    fields |= {"exact_damping": 50.0, "scaled_identity_damping": 50.0}
    defaults = {name: config().training(hypergradient=name).get_ihvp_solver() for name in IHVP_SOLVERS}
    for name, solver in defaults.items():
        c = config().update_from_dict(fields | {"hypergradient": name})
        assert attributes(c.get_ihvp_solver()) == attributes(solver)
    assert not [w for w in recwarn if "write hypergradient=" in str(w.message)]
    assert {name: solver.damping for name, solver in defaults.items()} == {
        "nystrom": 50.0,
        "cg": 0.0,
        "exact": 50.0,
        "scaled_identity": 50.0,
    }


def test_rank_and_damping_vary_a_nystrom_that_was_passed():
    passed = Nystrom(rank=7, damping=3.0, core_shift=0.0, redraw=True)
    assert config().training(hypergradient=passed).get_ihvp_solver() is passed
    solver = config().training(hypergradient=passed, nystrom_damping=0.1).get_ihvp_solver()
    assert attributes(solver) == attributes(Nystrom(7, 0.1, 0.0, True))
    with pytest.raises(ValueError, match="nystrom_damping=-1"):
        config().training(hypergradient=passed, nystrom_damping=-1).validate()


def test_search_spaces_and_round_trips():
    c = config().training(nystrom_damping=tune.loguniform(0.1, 100), nystrom_rank=tune.randint(1, 20))
    assert BLPOConfig.from_dict(config().training(nystrom_rank=3).to_dict()).nystrom_rank == 3
    assert c.copy().nystrom_damping is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actor_lr": 0}, "actor_lr=0 must be a number > 0"),
        ({"critic_lr": -1e-3}, "critic_lr=-0.001"),
        ({"actor_lr": [[10, 1e-3], [20, 1e-4]]}, "first timestep must be 0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0"),
        ({"log_std_lr_factor": 0}, "log_std_lr_factor=0 must be > 0"),
        ({"num_critic_updates": 0}, "num_critic_updates=0 must be an integer >= 1"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"hypergradient": "newton"}, "'newton' must be one of 'nystrom', 'cg', 'exact', 'scaled_identity', 'none'"),
        ({"curvature": "fisher"}, "curvature='fisher' must be one of 'hessian', 'gauss_newton'"),
        ({"hypergradient_bound": -1}, "hypergradient_bound=-1 must be a number >= 0"),
        ({"hypergradient_bound": 0}, 'use hypergradient="none"'),
        ({"cross_clip_param": -0.1}, "cross_clip_param=-0.1"),
        ({"cross_reduction": "max"}, "cross_reduction='max' must be 'sum' or 'mean'"),
        ({"max_kl": 0}, "max_kl=0 must be a number > 0, or None for none"),
        ({"target_kl": -0.01}, "target_kl=-0.01 must be a number > 0, or None for none"),
        ({"correction_sample": "epoch"}, "correction_sample='epoch' must be 'minibatch' or 'batch'"),
        ({"advantage_horizon": "episode"}, "advantage_horizon='episode' must be 'segment' or 'rollout'"),
        ({"advantage_refresh": "step"}, "advantage_refresh='step' must be 'minibatch' or 'epoch' or 'iteration'"),
        ({"standardize_advantages": 2}, "standardize_advantages=2 must be True or False"),
        ({"hypergradient": "scaled_identity", "scaled_identity_damping": 0}, "ScaledIdentity.damping=0"),
        ({"nystrom_rank": 0}, "nystrom_rank=0 must be an integer >= 1"),
        ({"nystrom_damping": 0.0}, "nystrom_damping=0.0 must be a finite number > 0"),
        ({"nystrom_core_shift": float("inf")}, "Nystrom.core_shift=inf"),
        ({"hypergradient": "cg", "cg_iterations": 0}, "ConjugateGradient.iterations=0"),
        ({"lr": 0.0}, "actor_lr=0.0 must be a number > 0"),
        ({"use_critic": False}, "use_critic=False"),
        ({"use_gae": False}, "use_gae=False|[Vv]alue"),
        ({"grad_clip": 1.0, "grad_clip_by": "value"}, "grad_clip_by='value' is not supported"),
        ({"cuda_graphs": 1}, "cuda_graphs=1 must be True or False"),
        ({"segment_length": 0}, "segment_length=0 must be an integer >= 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        config().training(**settings).validate()


def test_compiling_the_learner_is_refused():
    with pytest.raises(ValueError, match="torch_compile_learner=True has no meaning.*records CUDA graphs by itself"):
        config().framework(torch_compile_learner=True).validate()


def test_several_learners_on_one_gpu():
    with pytest.raises(ValueError, match=r"num_gpus_per_learner=0.5 with num_learners=2: NCCL takes no two learners"):
        config().learners(num_learners=2, num_gpus_per_learner=0.5).validate()
    config().learners(num_learners=1, num_gpus_per_learner=0.5).validate()


def test_fewer_segments_than_minibatches():
    few = config().env_runners(num_envs_per_env_runner=2).training(train_batch_size_per_learner=512, minibatch_size=64)
    few.training(segment_length=256)
    with pytest.raises(ValueError, match="minibatch_size=64 makes 8 minibatches.*only 2 whole.*segment_length=64"):
        few.validate()
    few.training(segment_length=64).validate()
    few.training(segment_length=None, minibatch_size=256).validate()


def test_rank_above_the_critics_size():
    model = {"fcnet_hiddens": [2]}
    with pytest.raises(ValueError, match="nystrom_rank=100 exceeds the critic's 13 parameters: use a rank between 1"):
        with_spaces().rl_module(model_config=model).training(nystrom_rank=100).validate()
    with_spaces().rl_module(model_config=model).training(nystrom_rank=13).validate()


def test_module_without_value_function():
    spec = RLModuleSpec(module_class=PolicyOnlyModule)
    with pytest.raises(ValueError, match=r"PolicyOnlyModule\) has no value function.*compute_values"):
        config().rl_module(rl_module_spec=spec).validate()


def test_recurrent_modules_are_taken():
    with_spaces().rl_module(model_config={"use_lstm": True}).validate()


def test_validation_can_be_switched_off_as_everywhere_in_rllib():
    config().training(hypergradient_bound=-1).experimental(_validate_config=False).validate()
