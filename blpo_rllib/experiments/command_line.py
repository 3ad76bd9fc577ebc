"""The command line of the tuned examples: RLlib's own example options, ``--seed``, and runs that outlive faults."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
from ray import tune
from ray.rllib.examples.utils import add_rllib_example_script_args, run_rllib_example_script_experiment
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_RESULT_FILE

from blpo_rllib import checkpoints
from blpo_rllib.blpo import BLPO, BLPOConfig
from blpo_rllib.core import native
from blpo_rllib.experiments import learning_curve, rllib_options
from blpo_rllib.experiments.faults import Keeper, Signals, Stopper
from blpo_rllib.experiments.progress import RichReporter
from blpo_rllib.experiments.tracking import example_trackers
from blpo_rllib.experiments.tuner import RUN, make_tuner
from blpo_rllib.tasks import TASKS

logger = logging.getLogger(__name__)

# A trial that fails more often than this without a checkpoint in between has a fault that no restart will mend.
MAX_FAILURES_IN_A_ROW = 10
# Trials are named after their seeds.
SEED = "seed_"


def run_task(name: str, options: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """Trains a tuned task as the command line says: :func:`run_example` with its settings."""
    task = TASKS[name]
    return run_example(
        task.config(),
        stop_reward=task.stop_reward,
        stop_timesteps=task.stop_timesteps,
        published=task.reference if task.tune else None,
        options=options,
        prog=prog,
    )


def run_example(
    config: BLPOConfig,
    *,
    stop_reward: float,
    stop_timesteps: int,
    published: Callable[[], BLPOConfig] | None = None,
    options: Sequence[str] | None = None,
    prog: str | None = None,
) -> Any:
    """Trains ``config`` as the command line says: ``--num-env-runners``, ``--num-learners``, ``--as-test`` and so on.

    At the end it says where checkpoints, results and learning curve are, and what the returns were.

    Args:
        config: The tuned settings; the command line overrides them.
        stop_reward: Default of ``--stop-reward``, the mean episode return at which training ends.
        stop_timesteps: Default of ``--stop-timesteps``, the number of environment steps at which it ends.
        published: Makes the published settings, for ``--published-batches``; None: there is no such option.
        options: The command line; None for that of the process.
        prog: What the command is called in its help; None for the script's name.

    Returns:
        Tune's results, or with ``--no-tune`` the last result.

    Raises:
        SystemExit: With status 128 + its number after a signal, once the checkpoint is written.
        ValueError: If ``--as-test`` was given and the return was not reached.
    """
    parser = example_parser(stop_reward, stop_timesteps, published is not None, prog)
    args = parser.parse_args(options)
    _check_options(parser, args)
    if published and args.published_batches:
        config = published()
    if config.native_kernels:
        native.begin()
    ray.init(num_cpus=args.num_cpus or None, ignore_reinit_error=True)
    config = rllib_options.configured(config, args).debugging(seed=args.seed)
    if args.no_tune:
        return run_rllib_example_script_experiment(config, args, keep_config=True)
    # Found here, a wrong setting is an error at once; found by the trial it looks like a fault to recover from.
    config.copy(copy_frozen=False).validate()
    signals, start = Signals(), time.time()
    with signals.caught():
        results = _tuner(config, args, signals).fit()
    seconds = time.time() - start
    ray.shutdown()
    if results.errors:
        raise results.errors[0]
    _report(results, config, args.output)
    if signals.number:
        sys.exit(128 + signals.number)
    if args.as_test:
        rllib_options.check_reward_reached(results, args, seconds)
    return results


def example_parser(
    stop_reward: float, stop_timesteps: int, has_published_batches: bool = False, prog: str | None = None
) -> argparse.ArgumentParser:
    """RLlib's options and ours; arguments as in :func:`run_example`."""
    parser = add_rllib_example_script_args(
        argparse.ArgumentParser(prog=prog, conflict_handler="resolve"),
        default_reward=stop_reward,
        default_timesteps=stop_timesteps,
        default_iters=1_000_000,
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed; with --num-samples N, trials take seed ... seed+N-1."
    )
    # In RLlib's parser this is a folder for episodes (offline data), which BLPO, on-policy, has no use for.
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="Folder or URL (s3://, gs://, az://, ...) for checkpoints and results, which every node must reach "
        "(default: ~/ray_results, a new folder each time).",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from the newest whole checkpoint at --output; start a new run if there is none.",
    )
    parser.add_argument("--checkpoint-keep", type=int, default=3, metavar="N", help="Keep the newest N checkpoints.")
    if has_published_batches:
        parser.add_argument(
            "--published-batches",
            action="store_true",
            help="Batches of 20,480 steps, as published, in place of the example's of 2,048.",
        )
    parser.set_defaults(algo="BLPO", verbose=1, checkpoint_freq=10, checkpoint_at_end=True, tune_max_report_freq=10)
    return parser


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Checks the options against each other and against what lies at ``--output``."""
    rllib_options.check_options(parser, args)
    if args.checkpoint_keep < 1:
        parser.error(f"--checkpoint-keep {args.checkpoint_keep} must be at least 1")
    if args.num_samples < 1:
        parser.error(f"--num-samples {args.num_samples} must be at least 1")
    if args.resume and not args.output:
        parser.error("--resume needs --output PATH, the folder or URL of the run to go on with")
    if not args.output:
        return
    if args.no_tune:
        parser.error("--output and --resume need Tune: leave out --no-tune")
    try:
        filesystem, path = checkpoints.resolve(args.output)
        used = filesystem.get_file_info(f"{path}/{RUN}").type != pyarrow.fs.FileType.NotFound
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"--output {args.output} cannot be used: {error}")
    if used and not args.resume:
        parser.error(f"--output {args.output} holds a run: add --resume to go on with it, or name another place")


def _tuner(config: BLPOConfig, args: argparse.Namespace, signals: Signals) -> tune.Tuner:
    seeds = range(args.seed, args.seed + args.num_samples)
    return make_tuner(
        BLPO,
        args.output,
        _trial_name,
        param_space=config.copy(copy_frozen=False).debugging(seed=tune.grid_search(list(seeds))),
        stop=Stopper(rllib_options.stop_criteria(args), signals),
        max_failures=MAX_FAILURES_IN_A_ROW,
        checkpoint_config=tune.CheckpointConfig(
            checkpoint_frequency=args.checkpoint_freq, checkpoint_at_end=args.checkpoint_at_end
        ),
        callbacks=[Keeper(args.checkpoint_keep), *example_trackers(config, args)],
        reporter=RichReporter(args.stop_timesteps, seconds=args.tune_max_report_freq),
        verbose=args.verbose,
        max_concurrent_trials=args.max_concurrent_trials,
    )


def _trial_name(trial: Trial) -> str:
    return f"{SEED}{trial.config['seed']}"


def _report(results: tune.ResultGrid, config: BLPOConfig, output: str | None) -> None:
    """Writes results and learning curve beside the trials; a failure is logged, since the checkpoints are there."""
    filesystem, folder = checkpoints.resolve(output) if output else (results.filesystem, results.experiment_path)
    try:
        runs = [_run(result) for result in results]
        learning_curve.report(runs, str(config.env), filesystem, folder)
    except Exception:
        logger.exception("the results in %s could not be summed up; the checkpoints there are not affected", folder)


def _run(result: tune.Result) -> dict[str, Any]:
    """A trial's seed, newest checkpoint and rows, from all its starts."""
    with result.filesystem.open_input_stream(f"{result.path}/{EXPR_RESULT_FILE}") as stream:
        rows = [learning_curve.row(json.loads(line)) for line in stream.read().splitlines()]
    newest = checkpoints.newest_valid(result.filesystem, result.path)
    seed = Path(result.path).name.removeprefix(SEED)
    return {"seed": int(seed), "checkpoint": newest and newest[0], "rows": rows}
