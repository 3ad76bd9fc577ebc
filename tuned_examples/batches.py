"""The two sizes of batch of the MuJoCo examples; the rest of their settings does not depend on it."""

from blpo_rllib import BLPOConfig


def small_batches(config: BLPOConfig) -> BLPOConfig:
    """16 environments × 128 steps, 10 epochs of 4 minibatches of 4 segments, for runs of a million steps.

    Of a million steps the published batches make 49 iterations, these 488. They are the default where README.md,
    Results, shows them to be better. As exploration noise shrinks, updates move the policy further (``approx_kl``): a
    longer run needs a schedule for ``actor_lr``, or the published batches.
    """
    return config.env_runners(num_envs_per_env_runner=16).training(
        train_batch_size_per_learner=2048, minibatch_size=512, num_epochs=10
    )


def published_batches(config: BLPOConfig) -> BLPOConfig:
    """32 environments × 640 steps, 4 epochs of 32 minibatches of one segment: the reference's, and BLPOConfig's own."""
    return config.env_runners(num_envs_per_env_runner=32).training(
        train_batch_size_per_learner=20480, minibatch_size=640, num_epochs=4
    )
