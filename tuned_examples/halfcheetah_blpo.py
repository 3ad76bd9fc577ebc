"""BLPO on HalfCheetah-v5 on RLlib's normalised observations and scaled rewards.

python tuned_examples/halfcheetah_blpo.py --stop-timesteps 1000000
python tuned_examples/halfcheetah_blpo.py --published-batches    # batches of 20,480 steps
"""

from batches import published_batches, small_batches
from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """The reference's settings but for the batches: 7 nested steps, bound 1.4, cross clip 0.7."""
    return small_batches(
        BLPOConfig()
        .environment("HalfCheetah-v5")
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(num_critic_updates=7, hypergradient_bound=1.4, cross_clip_param=0.7, normalize_rewards=True)
    )


if __name__ == "__main__":
    run_example(config(), stop_reward=5000.0, stop_timesteps=1_000_000, published=published_batches)
