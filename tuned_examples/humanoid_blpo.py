"""BLPO on Humanoid-v5 on RLlib's normalised observations and scaled rewards.

python tuned_examples/humanoid_blpo.py --stop-timesteps 1000000
"""

from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """The reference's settings: 5 nested steps, bound 1.0, cross clip 0.8."""
    return (
        BLPOConfig()
        .environment("Humanoid-v5")
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(num_critic_updates=5, hypergradient_bound=1.0, cross_clip_param=0.8, normalize_rewards=True)
    )


if __name__ == "__main__":
    run_example(config(), stop_reward=5000.0, stop_timesteps=20_000_000)
