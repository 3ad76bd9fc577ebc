"""The tuned settings by task: what ``python -m blpo_rllib.train TASK`` and ``tuned_examples/TASK_blpo.py`` train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.utils.typing import LearningRateOrSchedule

from blpo_rllib.blpo import BLPOConfig
from blpo_rllib.extras import require


@dataclass(frozen=True)
class Task:
    """An environment with the settings that BLPO was tuned to.

    Attributes:
        reference: Makes a new config with the published settings, or the defaults where none are published.
        stop_reward: Mean episode return at which the task counts as learned.
        stop_timesteps: Environment steps of a whole run.
        tune: Makes the tuned settings of those; None where they are the same.
    """

    reference: Callable[[], BLPOConfig]
    stop_reward: float
    stop_timesteps: int
    tune: Callable[[BLPOConfig], BLPOConfig] | None = None

    def config(self) -> BLPOConfig:
        """A new config with the tuned settings."""
        config = self.reference()
        return config if self.tune is None else self.tune(config)


def small_batches(config: BLPOConfig) -> BLPOConfig:
    """16 environments × 128 steps, 10 epochs of 4 minibatches of 4 segments, for runs of a million steps.

    Of a million steps the published batches make 49 iterations, these 488. As exploration noise shrinks, updates move
    the policy further (``approx_kl``): a longer run needs a schedule for ``actor_lr``, or the published batches.
    """
    return config.env_runners(num_envs_per_env_runner=16).training(
        train_batch_size_per_learner=2048, minibatch_size=512, num_epochs=10
    )


def annealed_batches(
    config: BLPOConfig,
    initial_log_std: float = 0.0,
    kept_advantages: bool = False,
    environments: int = 16,
    steps: int = 1_000_000,
) -> BLPOConfig:
    """:func:`small_batches` with 3 nested steps on all tasks, and rates that fall to 0 over ``steps``.

    16 minibatches an epoch, of 128 steps each: with 4 an epoch exploration noise hardly falls within a million steps. A
    minibatch is made of 4 segments from anywhere in the batch, so that its correction is a direction and not noise.
    Where exploration noise has become small, steps of that rate would move the policy too far: the actor's rate is
    lowered where the KL divergence of an iteration exceeds 0.04.

    Args:
        config: The settings to start from, changed in place.
        initial_log_std: Of the exploration noise.
        kept_advantages: :func:`ppo_advantages` in place of those of the critic as it moves. The hypergradient goes by
            their derivative in the critic. Which of the two a task has was chosen in single runs (``studies/designs``).
        environments: The fewer, the longer is the stretch of each that a batch holds, and that advantages extend over.
        steps: Environment steps until the rates are 0.
    """
    if kept_advantages:
        ppo_advantages(config)
    actor_lr, critic_lr = ([[0, _first(rate)], [steps, 0.0]] for rate in (config.actor_lr, config.critic_lr))
    return (
        small_batches(config)
        .env_runners(num_envs_per_env_runner=environments)
        .training(
            minibatch_size=128,
            segment_length=32,
            num_critic_updates=3,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            target_kl=0.02,
        )
        .rl_module(model_config={"initial_log_std": initial_log_std})
    )


def ppo_advantages(config: BLPOConfig) -> BLPOConfig:
    """Advantages over whole rollouts from the critic at the start of the iteration, standardised."""
    return config.training(advantage_horizon="rollout", advantage_refresh="iteration", standardize_advantages=True)


def _first(rate: LearningRateOrSchedule) -> float:
    """The value of a rate or of its schedule at the start."""
    return float(rate[0][1]) if isinstance(rate, (list, tuple)) else float(rate)


def as_ppo(config: BLPOConfig) -> BLPOConfig:
    """PPO by this project's update: shuffled single steps, advantages kept for the iteration and standardised, a single
    critic step with the actor's rate, no correction. ``tests/test_advantages.py`` shows that the update is PPO's."""
    return ppo_advantages(config).training(
        hypergradient="none",
        segment_length=1,
        num_critic_updates=1,
        critic_lr=config.actor_lr,
        adam_epsilon=1e-8,
        target_kl=None,
        log_std_lr_factor=1.0,
    )


def _classic_control(env: str) -> BLPOConfig:
    """The reference's settings for discrete control: 4 environments, segments of 128 steps, 5 nested critic steps."""
    return (
        BLPOConfig()
        .environment(env)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(
            train_batch_size_per_learner=512,
            minibatch_size=128,
            num_epochs=4,
            actor_lr=2.5e-4,
            critic_lr=1e-3,
            num_critic_updates=5,
            hypergradient_bound=1.0,
        )
    )


def _mujoco(env: str, num_critic_updates: int = 3, bound: float = 1.0, cross_clip: float = 1.0) -> BLPOConfig:
    """:func:`_normalised` settings of a MuJoCo task.

    Raises:
        ImportError: If MuJoCo is not installed.
    """
    require("mujoco", "mujoco", env)
    return _normalised(env, num_critic_updates, bound, cross_clip)


def _box2d(env: str) -> BLPOConfig:
    """:func:`_normalised` settings of a Box2D task.

    Raises:
        ImportError: If Box2D is not installed.
    """
    require("Box2D", "box2d", env)
    return _normalised(env)


def _normalised(env: str, num_critic_updates: int = 3, bound: float = 1.0, cross_clip: float = 1.0) -> BLPOConfig:
    """The reference's settings for continuous control, on normalised observations and scaled rewards.

    RLlib's MeanStdFilter normalises observations on the EnvRunners, the learner scales rewards; both statistics are
    part of checkpoints. The arguments are N, b and ε_F, which the reference chose by task.
    """
    return (
        BLPOConfig()
        .environment(env)
        .env_runners(num_env_runners=0, env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(
            num_critic_updates=num_critic_updates,
            hypergradient_bound=bound,
            cross_clip_param=cross_clip,
            normalize_rewards=True,
        )
    )


def _images(env: str, convolutions: list[list[int | str]], hidden: int, steps: int) -> BLPOConfig:
    """Images, of bytes or bits: convolutions under one hidden layer, PPO's usual batches, rates that fall to 0."""
    return (
        BLPOConfig()
        .environment(env)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=16)
        .rl_module(
            model_config={
                "conv_filters": convolutions,
                "conv_activation": "relu",
                "head_fcnet_hiddens": [hidden],
                "head_fcnet_activation": "relu",
            }
        )
        .training(
            train_batch_size_per_learner=2048,
            minibatch_size=256,
            segment_length=32,
            num_epochs=4,
            num_critic_updates=2,
            actor_lr=[[0, 1e-3], [steps, 0.0]],
            critic_lr=[[0, 2e-3], [steps, 0.0]],
            entropy_coeff=0.01,
        )
    )


def _minatar(game: str) -> BLPOConfig:
    """:func:`_images` settings of a MinAtar game (Young & Tian 2019): 10 × 10 bits for each kind of object.

    Raises:
        ImportError: If MinAtar is not installed.
    """
    require("minatar", "minatar", game)
    return _images(f"blpo_rllib.sampling.minatar:MinAtar/{game}-v1", [[16, 3, 1, "valid"]], hidden=128, steps=1_000_000)


def _atari(game: str) -> BLPOConfig:
    """:func:`_images` settings of an Atari game, four grey frames in half of the usual resolution.

    Raises:
        ImportError: If the emulator is not installed.
    """
    require("ale_py", "atari", game)
    return _images(f"blpo_rllib.sampling.atari:Small{game}-v0", [[16, 4, 2], [32, 4, 2], [32, 3, 2]], 256, 1_000_000)


# The reference has settings of its own for Acrobot, CartPole, HalfCheetah, Hopper, Humanoid and Walker2d.
TASKS: dict[str, Task] = {
    "acrobot": Task(lambda: _classic_control("Acrobot-v1"), stop_reward=-100.0, stop_timesteps=400_000),
    "ant": Task(
        lambda: _mujoco("Ant-v5"),
        stop_reward=3000.0,
        stop_timesteps=1_000_000,
        # With as much noise as usual on 8 joints it learns little but not to fall.
        tune=partial(annealed_batches, initial_log_std=-1.0),
    ),
    "atari_pong": Task(lambda: _atari("Pong"), stop_reward=18.0, stop_timesteps=1_000_000),
    "cartpole": Task(lambda: _classic_control("CartPole-v1"), stop_reward=475.0, stop_timesteps=500_000),
    "halfcheetah": Task(
        lambda: _mujoco("HalfCheetah-v5", num_critic_updates=7, bound=1.4, cross_clip=0.7),
        stop_reward=5000.0,
        stop_timesteps=1_000_000,
        # With as much noise as usual it learns to slide on its back.
        tune=partial(annealed_batches, initial_log_std=-1.0, kept_advantages=True),
    ),
    "hopper": Task(
        lambda: _mujoco("Hopper-v5", num_critic_updates=3, bound=1.4, cross_clip=1.0),
        stop_reward=3000.0,
        stop_timesteps=1_000_000,
        tune=annealed_batches,
    ),
    "humanoid": Task(
        lambda: _mujoco("Humanoid-v5", num_critic_updates=5, bound=1.0, cross_clip=0.8),
        stop_reward=5000.0,
        stop_timesteps=20_000_000,
    ),
    "inverted_double_pendulum": Task(
        lambda: _mujoco("InvertedDoublePendulum-v5"),
        stop_reward=9000.0,
        stop_timesteps=1_000_000,
        tune=partial(annealed_batches, kept_advantages=True),
    ),
    # Discounts and entropy bonus are those that PPO usually has on it.
    "lunarlander": Task(
        lambda: _box2d("LunarLander-v3").training(gamma=0.999, lambda_=0.98, entropy_coeff=0.01),
        stop_reward=240.0,
        stop_timesteps=1_000_000,
        tune=partial(annealed_batches, kept_advantages=True),
    ),
    "minatar_breakout": Task(lambda: _minatar("Breakout"), stop_reward=15.0, stop_timesteps=1_000_000),
    "minatar_space_invaders": Task(lambda: _minatar("SpaceInvaders"), stop_reward=60.0, stop_timesteps=1_000_000),
    "pusher": Task(
        lambda: _mujoco("Pusher-v5"),
        stop_reward=-28.0,
        stop_timesteps=1_000_000,
        tune=annealed_batches,
    ),
    "reacher": Task(
        lambda: _mujoco("Reacher-v5"),
        stop_reward=-4.0,
        stop_timesteps=1_000_000,
        tune=annealed_batches,
    ),
    # A stroke pays off after hundreds of steps: at a discount of 0.99 no algorithm learns to swim. On stretches of 128
    # steps most runs, of BLPO and PPO alike, stop at less than half of the return.
    "swimmer": Task(
        lambda: _mujoco("Swimmer-v5").training(gamma=0.9999, lambda_=0.98),
        stop_reward=280.0,
        stop_timesteps=1_000_000,
        tune=partial(annealed_batches, kept_advantages=True, environments=4),
    ),
    "walker2d": Task(
        lambda: _mujoco("Walker2d-v5", num_critic_updates=3, bound=0.8, cross_clip=0.84),
        stop_reward=4000.0,
        stop_timesteps=1_000_000,
        tune=annealed_batches,
    ),
}
