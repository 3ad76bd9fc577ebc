"""BLPO on Hopper-v5.

Observations are normalised by RLlib's MeanStdFilter on the EnvRunners, rewards by the learner; both statistics are
part of checkpoints, and evaluation uses the observation statistics.

python tuned_examples/hopper_blpo.py --num-env-runners 2 --num-envs-per-env-runner 8 --stop-timesteps 1000000
python tuned_examples/hopper_blpo.py --output results/hopper_run --resume  # goes on, or starts
python tuned_examples/hopper_blpo.py --published-batches    # batches of 20,480 steps
"""

from batches import published_batches, small_batches
from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """The reference's settings but for the batches: 3 nested critic steps, bound 1.4, cross clip 1.0."""
    return small_batches(
        BLPOConfig()
        .environment("Hopper-v5")
        .env_runners(num_env_runners=0, env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(
            actor_lr=3e-4,
            critic_lr=1.2e-3,
            num_critic_updates=3,
            hypergradient_bound=1.4,
            cross_clip_param=1.0,
            normalize_rewards=True,
        )
    )


if __name__ == "__main__":
    run_example(config(), stop_reward=3000.0, stop_timesteps=1_000_000, published=published_batches)
