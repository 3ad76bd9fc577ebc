"""BLPO on Reacher-v5 on RLlib's normalised observations and scaled rewards.

python tuned_examples/reacher_blpo.py --stop-timesteps 1000000
python tuned_examples/reacher_blpo.py --published-batches    # batches of 20,480 steps
"""

from batches import published_batches, small_batches
from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """The defaults but for the batches: the reference has no settings of its own for this task."""
    return small_batches(
        BLPOConfig()
        .environment("Reacher-v5")
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(normalize_rewards=True)
    )


if __name__ == "__main__":
    run_example(config(), stop_reward=-6.0, stop_timesteps=1_000_000, published=published_batches)
