"""Who competes in compare.py, on what: the tasks, and for each the configurations of BLPO, its variants and PPO.

Settings. BLPO's are those of ``blpo_rllib/tasks.py``: the published ones where there are any, else the defaults; on
MuJoCo tasks with several sizes of batch (``small_batches`` and ``annealed_batches`` there). Nobody is tuned here but
those of STRONG, whose settings studies/designs chose for BLPO: each contestant has one setting per task
(:data:`TUNING_BUDGET`), so that everyone gets the same effort. Effort before this comparison differs: the paper's
authors chose the nested steps N, the bound b and the cross clip ε_F of six tasks from N in {2, 3, 5, 7, 10}, b in {0.8,
1, 1.2, 1.4, 2}, ε_F in {0.8, 1, 1.2}; what RLlib tried for its own settings is not known. The small batches are PPO's
usual ones for MuJoCo, RLlib's own among them; no others were tried.

============= ========================================================================================
blpo          the published settings
blpo_cg       the same with 20 conjugate-gradient steps on the undamped Hessian instead of Nyström's rows
nested_ppo    the same without the hypergradient: nested critic steps alone
ppo           RLlib's PPO learner with the example's networks, batch, epochs, minibatch size, discounts, clip and
              actor's learning rate (one optimizer, hence also the critic's), without KL penalty and value clipping
blpo_small    the same with batches of 2,048 steps and 10 epochs, on MuJoCo tasks
nested_small  nested_ppo with these batches
ppo_small     ppo with these batches
blpo_annealed blpo_small with an actor's learning rate that falls to 0 over the run's steps
ppo_annealed  ppo_small with the same rate, its critic's too
blpo_strong   the tuned settings: blpo_small in minibatches of 128 steps, 4 segments of 32 from anywhere in the batch,
              3 nested steps, both rates falling to 0 over the run's steps, a target for the KL of an iteration
blpo_strong_512, blpo_strong_64 the same in minibatches of 512 or 64 steps, 4 segments of 128 or 16
nested_strong blpo_strong without the hypergradient
ppo_strong    PPO as CleanRL, Stable-Baselines3 and Tianshou set it up: minibatches of 64 shuffled steps, standardised
              advantages, a rate of 3e-4 that falls to 0; computed by this project's update, whose settings make it PPO
              (blpo_rllib.tasks.as_ppo), in half the time that RLlib's learner takes
ppo_tuned     RLlib's PPO as RLlib publishes it for the task by name (rllib/examples/algorithms/ppo: CartPole, Hopper,
              Walker2d, HalfCheetah, Humanoid): its own networks, batches and rates, rewards as they are
============= ========================================================================================

All of them sample with the same EnvRunner (:class:`~blpo_rllib.sampling.env_runner.BatchedEnvRunner`) from the same
simulator, so that differences in time are differences in learning. ``ppo`` normalises observations and rewards by
BLPO's own connectors. What remains different between ``blpo`` and ``ppo`` is the algorithm: PPO computes advantages
once per iteration, standardises them over the batch, and shuffles single steps into minibatches.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.annotations import override
from torch.nn.init import orthogonal_

from blpo_rllib import BLPOConfig
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.learning.connectors import normalize_rewards
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG, BLPOTorchRLModule
from blpo_rllib.sampling.env_runner import BatchedEnvRunner
from blpo_rllib.sampling.envpool import PREFIX
from blpo_rllib.sampling.evaluation import OneEpisodeEach
from blpo_rllib.tasks import TASKS as TUNED_TASKS
from blpo_rllib.tasks import annealed_batches, as_ppo, small_batches

# A contestant's configuration, from the tuned example of the task.
Contestant = Callable[[BLPOConfig], AlgorithmConfig]

MUJOCO_STEPS = 1_000_000
# Environment steps by tuned example, the cheapest first: that is the order in which they run.
TASKS = {
    "cartpole": 500_000,
    "acrobot": 500_000,
    "inverted_double_pendulum": MUJOCO_STEPS,
    "reacher": MUJOCO_STEPS,
    "hopper": MUJOCO_STEPS,
    "walker2d": MUJOCO_STEPS,
    "halfcheetah": MUJOCO_STEPS,
    "pusher": MUJOCO_STEPS,
    "swimmer": MUJOCO_STEPS,
    "ant": MUJOCO_STEPS,
    "lunarlander": MUJOCO_STEPS,
    "humanoid": MUJOCO_STEPS,
    "minatar_breakout": 2_000_000,
    "minatar_space_invaders": 2_000_000,
}
CLASSIC = ("cartpole", "acrobot")
# Their observations are images. They have the contestants of ON_IMAGES alone, with the tuned settings.
IMAGES = ("minatar_breakout", "minatar_space_invaders")
SIMULATORS = ("envpool", "gymnasium")

# How many settings each algorithm tries on each task in this comparison.
TUNING_BUDGET = 1

# An evaluation is one episode of each of so many environments, which start alike in all evaluations of all runs.
EVALUATION_EPISODES = 10
EVALUATION_SEED = 20_000
# Evaluations per run, beside that of the untrained policy; fewer where an evaluation would be due within a batch.
EVALUATIONS = 12


def example(task: str, simulator: str) -> BLPOConfig:
    """The published settings of a task, or the defaults, on one simulator thread."""
    config = TUNED_TASKS[task].reference()
    if task not in CLASSIC + IMAGES and simulator == "envpool":
        config.environment(f"{PREFIX}{config.env}", env_config={"num_threads": 1})
    return config


def annealed(config: BLPOConfig) -> BLPOConfig:
    """With an actor's learning rate that falls linearly to 0 over the steps of a MuJoCo task."""
    return config.training(actor_lr=[[0, config.actor_lr], [MUJOCO_STEPS, 0.0]])


def ppo(config: BLPOConfig) -> PPOConfig:
    """RLlib's PPO with what a BLPO config shares with it."""
    return (
        _ppo_on_the_same_steps(config)
        .env_runners(
            num_envs_per_env_runner=config.num_envs_per_env_runner,
            env_to_module_connector=config._env_to_module_connector,
        )
        .rl_module(rl_module_spec=RLModuleSpec(BLPOTorchRLModule, model_config=REFERENCE_MODEL_CONFIG))
        .learners(learner_class=PPOWithScaledRewards if config.normalize_rewards else PPOTorchLearner)
        .training(
            lr=config.actor_lr,
            gamma=config.gamma,
            lambda_=config.lambda_,
            clip_param=config.clip_param,
            entropy_coeff=config.entropy_coeff,
            num_epochs=config.num_epochs,
            train_batch_size_per_learner=config.train_batch_size_per_learner,
            minibatch_size=config.minibatch_size,
            use_kl_loss=False,
            vf_clip_param=float("inf"),
        )
    )


def ppo_tuned_classic(config: BLPOConfig) -> PPOConfig:
    """RLlib's cartpole_ppo.py (rllib/examples/algorithms/ppo); its 4 x 16 environments in one EnvRunner."""
    return (
        _ppo_on_the_same_steps(config)
        .env_runners(num_envs_per_env_runner=64)
        .training(lr=3e-4, num_epochs=6, vf_loss_coeff=0.01)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[32], fcnet_activation="linear", vf_share_layers=True))
    )


def ppo_tuned_mujoco(config: BLPOConfig) -> PPOConfig:
    """RLlib's mujoco_ppo.py (rllib/examples/algorithms/ppo); its 4 x 16 environments in one EnvRunner."""
    return (
        _ppo_on_the_same_steps(config)
        .env_runners(num_envs_per_env_runner=64, env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(
            train_batch_size_per_learner=2048,
            minibatch_size=512,
            num_epochs=10,
            lr=3e-4,
            vf_loss_coeff=1.0,
            entropy_coeff=[[0, 0.01], [2_000_000, 0.0]],
            gamma=0.99,
            lambda_=0.95,
            kl_coeff=0.5,
            clip_param=0.2,
            vf_clip_param=10.0,
            grad_clip=50.0,
            grad_clip_by="global_norm",
        )
        .rl_module(
            model_config=DefaultModelConfig(
                vf_share_layers=False,
                fcnet_hiddens=[256, 256],
                fcnet_kernel_initializer=orthogonal_,
                fcnet_activation="tanh",
                head_fcnet_hiddens=[256],
                head_fcnet_activation=None,
                free_log_std=True,
            )
        )
    )


def _ppo_on_the_same_steps(config: BLPOConfig) -> PPOConfig:
    return (
        PPOConfig()
        .environment(config.env, env_config=config.env_config)
        .env_runners(num_env_runners=0, env_runner_cls=BatchedEnvRunner)
    )


ALGORITHMS: dict[str, Contestant] = {
    "blpo": lambda config: config,
    "blpo_cg": lambda config: config.training(hypergradient="cg"),
    "nested_ppo": lambda config: config.training(hypergradient="none"),
    "ppo": ppo,
}
SMALL: dict[str, Contestant] = {
    f"{name}_small": lambda config, make=ALGORITHMS[algorithm]: make(small_batches(config))
    for name, algorithm in (("blpo", "blpo"), ("nested", "nested_ppo"), ("ppo", "ppo"))
}
ANNEALED: dict[str, Contestant] = {
    f"{name}_annealed": lambda config, make=ALGORITHMS[name]: make(annealed(small_batches(config)))
    for name in ("blpo", "ppo")
}
STRONG = ("blpo_strong", "blpo_strong_512", "blpo_strong_64", "nested_strong", "ppo_strong")
NAMES = [*ALGORITHMS, *SMALL, *ANNEALED, *STRONG, "ppo_tuned"]


def four_segments(config: BLPOConfig, minibatch_size: int) -> BLPOConfig:
    """The same in minibatches of another size, still 4 segments from anywhere in the batch."""
    return config.training(minibatch_size=minibatch_size, segment_length=minibatch_size // 4)


def ppo_strong(config: BLPOConfig) -> BLPOConfig:
    """PPO on minibatches of 64, with the rates and the exploration noise of a BLPO config."""
    return as_ppo(config).training(minibatch_size=64)


# What was tried in short runs on the way to STRONG, whose BLPO has a target for the KL divergence besides. Exploration
# starts at a deviation of 1, unless the name says another.
DESIGNS: dict[str, Contestant] = (
    {
        f"strong_{name}": lambda config, settings=settings: four_segments(annealed_batches(config), 64).training(
            target_kl=None, **settings
        )
        for name, settings in {
            "correction": {},
            "no_correction": {"hypergradient": "none"},
            "no_correction_clip_0.4": {"hypergradient": "none", "clip_param": 0.4},
            "bound_0.5": {"hypergradient_bound": 0.5},
            "7_nested_steps": {"num_critic_updates": 7},
            "segments_of_8": {"segment_length": 8},
            "whole_rollouts": {"advantage_horizon": "rollout"},
            "whole_rollouts_7_nested_steps": {"advantage_horizon": "rollout", "num_critic_updates": 7},
            "single_steps": {"advantage_horizon": "rollout", "segment_length": 1},
            "correction_of_the_batch": {"correction_sample": "batch"},
        }.items()
    }
    | {
        f"strong_512_{name}": lambda config, settings=settings: four_segments(annealed_batches(config), 512).training(
            **settings
        )
        for name, settings in {
            "segments_of_32": {"segment_length": 32},
            "log_std_rate_5": {"log_std_lr_factor": 5.0},
            "log_std_rate_10": {"log_std_lr_factor": 10.0},
            "one_nested_step": {"num_critic_updates": 1},
            "discount_0.998": {"gamma": 0.998},
        }.items()
    }
    | {
        f"strong_kept_advantages{name}": lambda config, settings=settings: annealed_batches(
            config, kept_advantages=True
        ).training(**settings)
        for name, settings in {
            "": {},
            "_log_std_rate_2": {"log_std_lr_factor": 2.0},
            "_lambda_0.95": {"lambda_": 0.95},
        }.items()
    }
    | {
        f"strong_kept_advantages{name}_deviation_0.37": lambda config, environments=environments, settings=settings: (
            annealed_batches(config, -1.0, kept_advantages=True, environments=environments).training(**settings)
        )
        for name, (environments, settings) in {
            "": (16, {}),
            "_4_environments": (4, {}),
            "_log_std_rate_2": (16, {"log_std_lr_factor": 2.0}),
            "_single_steps": (16, {"segment_length": 1, "minibatch_size": 64}),
        }.items()
    }
    | {
        "strong_correction_deviation_0.37": lambda config: four_segments(
            annealed_batches(config, initial_log_std=-1.0), 64
        ).training(target_kl=None),
        "strong_512_double_rates_deviation_0.37": lambda config: four_segments(
            annealed_batches(config.training(actor_lr=6e-4, critic_lr=2.4e-3), initial_log_std=-1.0), 512
        ),
        "strong_256": lambda config: four_segments(annealed_batches(config), 256),
        "strong_128": annealed_batches,
        "strong_128_deviation_0.37": lambda config: annealed_batches(config, initial_log_std=-1.0),
        "strong_log_std_rate_3": lambda config: annealed_batches(config).training(log_std_lr_factor=3.0),
        "strong_ppo": lambda config: ppo_strong(annealed_batches(config)),
        "strong_ppo_deviation_0.37": lambda config: ppo_strong(annealed_batches(config, initial_log_std=-1.0)),
        "strong_ppo_advantages_of_each_epoch": lambda config: ppo_strong(annealed_batches(config)).training(
            advantage_refresh="epoch", standardize_advantages=False, adam_epsilon=1e-5
        ),
    }
)
# Published for these by name.
TUNED: dict[str, Contestant] = {"cartpole": ppo_tuned_classic} | dict.fromkeys(
    ("hopper", "walker2d", "halfcheetah", "humanoid"), ppo_tuned_mujoco
)


def strong(task: str) -> dict[str, Contestant]:
    """Those of STRONG: the tuned settings where they are of that kind, else the same sizes of batch."""
    tuned = TUNED_TASKS[task].tune
    blpo = annealed_batches if tuned is None else tuned
    return {
        "blpo_strong": blpo,
        "blpo_strong_512": lambda config: four_segments(blpo(config), 512),
        "blpo_strong_64": lambda config: four_segments(blpo(config), 64),
        "nested_strong": lambda config: blpo(config).training(hypergradient="none"),
        "ppo_strong": lambda config: ppo_strong(blpo(config)),
    }


# Theirs are PPO's minibatches too, of as many steps.
ON_IMAGES: dict[str, Contestant] = {
    "blpo_strong": ALGORITHMS["blpo"],
    "nested_strong": ALGORITHMS["nested_ppo"],
    "ppo_strong": as_ppo,
}


def contestants_of(task: str) -> dict[str, Contestant]:
    """Those that there are settings for, by name."""
    if task in IMAGES:
        return ON_IMAGES
    return (ALGORITHMS if task in CLASSIC else ALGORITHMS | SMALL | ANNEALED | strong(task) | DESIGNS) | (
        {"ppo_tuned": TUNED[task]} if task in TUNED else {}
    )


def contestant(task: str, algorithm: str, seed: int, steps: int, simulator: str) -> AlgorithmConfig:
    """The configuration of a run, with its evaluation.

    Args:
        task: One of TASKS.
        algorithm: One of :func:`contestants_of` the task.
        seed: Seed of everything but the evaluations.
        steps: Environment steps of the run, which its evaluations divide.
        simulator: One of SIMULATORS, for the tasks that EnvPool is quicker at.
    """
    config = contestants_of(task)[algorithm](example(task, simulator))
    _end_schedules(config, steps)
    batch = config.train_batch_size_per_learner
    return (
        config.reporting(min_sample_timesteps_per_iteration=batch * max(1, round(steps / EVALUATIONS / batch)))
        # At no interval: compare.py evaluates between iterations, so that its time is not the training's.
        .evaluation(
            evaluation_interval=10**9,
            evaluation_num_env_runners=0,
            evaluation_config={"explore": False, "num_envs_per_env_runner": EVALUATION_EPISODES},
            custom_evaluation_function=OneEpisodeEach(EVALUATION_SEED),
        )
        .debugging(seed=seed, log_level="ERROR")
    )


def _end_schedules(config: AlgorithmConfig, steps: int) -> None:
    """Lets learning rates that fall to 0 do so at the end of this run, however long it is."""
    for name in ("lr", "actor_lr", "critic_lr"):
        rate = getattr(config, name, None)
        if isinstance(rate, list) and rate[-1][1] == 0.0:
            setattr(config, name, [*rate[:-1], [steps, 0.0]])


class PPOWithScaledRewards(PPOTorchLearner):
    """RLlib's PPO learner with BLPO's reward normalisation: the same connectors at the same places."""

    @override(PPOTorchLearner)
    def build(self) -> None:
        super().build()
        normalize_rewards(self._learner_connector, self.config.gamma, Reduction())
