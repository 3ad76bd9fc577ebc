"""BLPO on CartPole-v1 with the reference's settings for discrete control.

python tuned_examples/cartpole_blpo.py --stop-reward 475 --as-test
python tuned_examples/cartpole_blpo.py --output results/cartpole_run --resume  # goes on, or starts
"""

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """4 environments, segments of 128 steps, 5 nested critic steps."""
    return (
        BLPOConfig()
        .environment("CartPole-v1")
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


if __name__ == "__main__":
    run_example(config(), stop_reward=475.0, stop_timesteps=500_000)
