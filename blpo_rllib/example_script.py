"""The command line of the tuned examples: RLlib's own example options plus ``--seed``."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.rllib.examples.utils import add_rllib_example_script_args, run_rllib_example_script_experiment

from blpo_rllib.blpo import BLPOConfig


def run_example(config: BLPOConfig, *, stop_reward: float, stop_timesteps: int) -> Any:
    """Trains ``config`` as the command line says: ``--num-env-runners``, ``--num-learners``, ``--as-test`` and so on.

    Args:
        config: The tuned settings; the command line overrides them.
        stop_reward: Default of ``--stop-reward``, the mean episode return at which training ends.
        stop_timesteps: Default of ``--stop-timesteps``, the number of environment steps at which it ends.

    Returns:
        Tune's results, or with ``--no-tune`` the last result.
    """
    parser = add_rllib_example_script_args(
        default_reward=stop_reward, default_timesteps=stop_timesteps, default_iters=1_000_000
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed; with --num-samples N, trials take seed ... seed+N-1."
    )
    parser.set_defaults(algo="BLPO")
    args = parser.parse_args()
    if args.num_samples > 1 and not args.no_tune:
        config.debugging(seed=tune.grid_search(list(range(args.seed, args.seed + args.num_samples))))
        args.num_samples = 1
    else:
        config.debugging(seed=args.seed)
    return run_rllib_example_script_experiment(config, args)
