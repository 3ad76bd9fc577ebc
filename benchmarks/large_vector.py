"""One iteration with thousands of environments in one vector: what it takes in time and memory.

    python -m benchmarks.large_vector --output benchmarks/results/large_vector.json

EnvPool steps 4,096 environments for 64 steps, and BLPO updates networks of 256-256-256 on the batch once, in
minibatches of 512 segments of 64 steps: the shape ``large`` of ``benchmarks/update_phase.py``, from sampling on, in one
process without Ray. Memory is the peak of the process; what it had before its environments were made stands beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from benchmarks.update_phase import SHAPES, Shape, configure, time_round, train_batch
from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.sampling.env_runner import BatchedEnvRunner
from blpo_rllib.sampling.envpool import PREFIX


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(task: str, shape: Shape, threads: int) -> dict:
    """Seconds and megabytes of one iteration, by its two halves."""
    before = peak_mb()
    config = configure(BLPOConfig(), shape, "cpu", segment_length=shape.segment_length)
    config.environment(
        f"{PREFIX}{task}", env_config={"num_threads": threads}, observation_space=None, action_space=None
    )
    runner = BatchedEnvRunner(config=config)
    learner = config.build_learner(spaces=runner.get_spaces())
    marks = [_now()]
    episodes = runner.sample(num_timesteps=shape.num_envs * shape.length)
    marks.append(_now())
    batch = train_batch(learner, episodes, shape)
    marks.append(_now())
    time_round(learner, batch, shape)
    marks.append(_now())
    spent = {
        name: {"seconds": round(end[0] - start[0], 1), "cpu_seconds": round(end[1] - start[1], 1)}
        for name, start, end in zip(("sampling", "connectors", "update"), marks, marks[1:], strict=False)
    }
    return spent | {"peak_mb": round(peak_mb()), "peak_mb_before": round(before)}


def _now() -> tuple[float, float]:
    """Seconds on the clock, and of this process's processor time."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="Hopper-v5")
    parser.add_argument("--threads", type=int, default=2, help="of the environments and of torch")
    parser.add_argument("--output", type=Path, help="where to write the result too, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = json.dumps(
        {**provenance(), "task": args.task, **measure(args.task, SHAPES["large"], args.threads)}, indent=2
    )
    print(report)
    if args.output:
        args.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
