"""One iteration with thousands of environments in one vector: what it takes in time and memory.

    python -m benchmarks.large_vector --output benchmarks/results/large_vector.json

EnvPool steps 4,096 environments for 64 steps, and BLPO updates networks of 256-256-256 on the batch once, in
minibatches of 512 segments of 64 steps: the shape ``large`` of ``benchmarks/update_phase.py``, from sampling on. Memory
is the peak of the process; what it had before its environments were made stands beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import ray
import torch

from benchmarks.update_phase import _WIDE
from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG
from blpo_rllib.sampling.envpool import PREFIX


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(task: str, num_envs: int, length: int, threads: int) -> dict:
    """Seconds and megabytes of one iteration."""
    before = peak_mb()
    config = (
        BLPOConfig()
        .environment(f"{PREFIX}{task}", env_config={"num_threads": threads})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=num_envs)
        .rl_module(model_config=REFERENCE_MODEL_CONFIG | _WIDE)
        .training(
            train_batch_size_per_learner=num_envs * length,
            minibatch_size=512 * length,
            segment_length=length,
            num_epochs=1,
        )
    )
    algorithm = config.build_algo()
    start, cpu = time.perf_counter(), time.process_time()
    result = algorithm.train()
    cpu, seconds, timers = time.process_time() - cpu, time.perf_counter() - start, result["timers"]
    return {
        "steps": result["env_runners"]["num_env_steps_sampled_lifetime"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "of_sampling": round(timers["env_runner_sampling_timer"], 1),
        "of_update": round(timers["learner_update_timer"], 1),
        "peak_mb": round(peak_mb()),
        "peak_mb_before": round(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="Hopper-v5")
    parser.add_argument("--envs", type=int, default=4096)
    parser.add_argument("--length", type=int, default=64, help="steps of each environment")
    parser.add_argument("--threads", type=int, default=2, help="of the environments and of torch")
    parser.add_argument("--output", type=Path, help="where to write the result too, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    found = {"task": args.task, "environments": args.envs, "length": args.length}
    found |= measure(args.task, args.envs, args.length, args.threads)
    report = json.dumps({**provenance(), **found}, indent=2)
    print(report)
    if args.output:
        args.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
