"""The two sizes of batch that the MuJoCo examples have; the rest of their settings does not depend on it."""

from blpo_rllib import BLPOConfig


def small_batches(config: BLPOConfig) -> BLPOConfig:
    """16 environments × 128 steps, 10 epochs of 4 minibatches of 4 segments: the examples' default.

    Of a million steps the published batches make 49 iterations, these 488 (README.md, Results, compares them).
    """
    return config.env_runners(num_envs_per_env_runner=16).training(
        train_batch_size_per_learner=2048, minibatch_size=512, num_epochs=10
    )


def published_batches(config: BLPOConfig) -> BLPOConfig:
    """32 environments × 640 steps, 4 epochs of 32 minibatches of one segment: the reference's, and BLPOConfig's own."""
    return config.env_runners(num_envs_per_env_runner=32).training(
        train_batch_size_per_learner=20480, minibatch_size=640, num_epochs=4
    )
