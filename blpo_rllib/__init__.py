"""BLPO: bi-level policy optimization with Nyström hypergradients, as an RLlib algorithm.

Importing this package registers the trainable "BLPO" with Ray Tune.
"""

from ray.tune.registry import register_trainable

from blpo_rllib.blpo import BLPO, BLPOConfig

__version__ = "0.1.0"
__all__ = ["BLPO", "BLPOConfig"]

register_trainable("BLPO", BLPO)
