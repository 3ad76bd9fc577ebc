"""BLPO on HalfCheetah-v5 with the reference's settings, on RLlib's normalised observations and scaled rewards.

python tuned_examples/halfcheetah_blpo.py --stop-timesteps 1000000
"""

from ray.rllib.connectors.env_to_module import MeanStdFilter

from blpo_rllib import BLPOConfig
from blpo_rllib.example_script import run_example


def config() -> BLPOConfig:
    """The defaults, which are the reference's for continuous control; 7 nested steps, bound 1.4, cross clip 0.7."""
    return (
        BLPOConfig()
        .environment("HalfCheetah-v5")
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .training(num_critic_updates=7, hypergradient_bound=1.4, cross_clip_param=0.7, normalize_rewards=True)
    )


if __name__ == "__main__":
    run_example(config(), stop_reward=5000.0, stop_timesteps=20_000_000)
