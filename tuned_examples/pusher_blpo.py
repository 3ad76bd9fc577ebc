"""BLPO on Pusher-v5 on RLlib's normalised observations and scaled rewards.

python tuned_examples/pusher_blpo.py --stop-timesteps 1000000
"""

from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """The defaults, which are the published batches: the reference has no settings of its own for this task."""
    return (
        BLPOConfig()
        .environment("Pusher-v5")
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(normalize_rewards=True)
    )


if __name__ == "__main__":
    run_example(config(), stop_reward=-45.0, stop_timesteps=1_000_000)
