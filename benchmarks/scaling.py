"""What EnvRunners and learners add, measured here, and a model of larger clusters calibrated on that.

    python -m benchmarks.scaling --num-env-runners 1 2 --num-learners 2

Measured: environment steps per second against remote EnvRunners, with the time that passes outside them (calls,
transport of episodes, weights); one update of the same global batch against learners, with the number and bytes of the
sums they exchange; and the time of such a sum against its size. The model adds these up for synchronous training,

    T = steps / (R · rate) + R · call + steps · transport + steps · connectors / L
        + M · (compute(L) + sums · exchange(L)),

for R EnvRunners and L learners, and prints T's parts for clusters up to 1000 EnvRunners and 16 learners. Its
extrapolations are arithmetic on numbers of this machine, not measurements; docs/scaling.md says more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sampling import sampler
from benchmarks.update_phase import SHAPES, configure, random_episodes
from blpo_rllib import BLPOConfig
from blpo_rllib.experiments.provenance import provenance

SHAPE = SHAPES["hopper"]
NUM_MINIBATCHES = 32
SUM_SIZES = (1, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Costs:
    """Seconds and numbers per unit, as measured or as you set them.

    Attributes:
        rate: Environment steps per second of one EnvRunner while it samples.
        call: Seconds per EnvRunner and iteration outside sampling: calls, metrics, weights.
        transport: Seconds per environment step to bring episodes to the learner.
        connectors: Seconds per environment step to turn episodes into a train batch, on the learner that has them.
        compute: Seconds of one learner for one minibatch of the whole global minibatch's steps.
        fixed: The part of ``compute`` that does not shrink with the learner's share.
        sums: Sums exchanged per minibatch.
        sum_bytes: Bytes per such sum.
        latency: Seconds of a small sum between two learners.
        bandwidth: Bytes per second of large sums.
    """

    rate: float
    call: float
    transport: float
    connectors: float
    compute: float
    fixed: float
    sums: float
    sum_bytes: float
    latency: float
    bandwidth: float


def iteration_parts(costs: Costs, runners: int, learners: int, steps: int, minibatches: int) -> dict[str, float]:
    """Seconds of the parts of one synchronous iteration."""
    share = (costs.compute - costs.fixed) / learners + costs.fixed
    exchange = 0.0
    if learners > 1:
        # A ring: every byte crosses about twice, and latency grows with the logarithm of the learners.
        exchange = costs.latency * math.log2(2 * learners) / 2 + 2 * costs.sum_bytes / costs.bandwidth
    return {
        "sampling": steps / (runners * costs.rate),
        "calls": runners * costs.call,
        "transport": steps * costs.transport,
        "connectors": steps * costs.connectors / learners,
        "compute": minibatches * share,
        "sums": minibatches * costs.sums * exchange,
    }


def time_sample(runner: Any) -> tuple[list[Any], float]:
    """On an EnvRunner: its episodes and the seconds they took."""
    start = time.perf_counter()
    episodes = runner.sample()
    return episodes, time.perf_counter() - start


def measure_runners(env: str, num_env_runners: int, rounds: int) -> dict[str, float]:
    """Rates of a group of EnvRunners with 16 environments each."""
    steps = 2048 * num_env_runners
    group, _ = sampler("batched", env, 16 * num_env_runners, num_env_runners, steps)
    rows = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        group.sync_weights(inference_only=True)
        results = group.foreach_env_runner(time_sample, local_env_runner=False)
        wall = time.perf_counter() - start
        inside = [seconds for _, seconds in results]
        count = sum(len(episode) for episodes, _ in results for episode in episodes)
        rows.append((count / wall, count / sum(inside), wall - max(inside), count))
    group.stop()
    total, each, outside, count = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return {
        "num_env_runners": num_env_runners,
        "env_steps_per_s": round(total),
        "env_steps_per_s_of_one_while_sampling": round(each),
        "ms_outside_sampling": round(1e3 * outside, 2),
        "env_steps": int(count),
    }


def time_update(learner: Any, share: int) -> dict[str, float]:
    """On a learner: one update phase of one in ``share`` of the global batch, and the sums it exchanged."""
    torch.set_num_threads(1)
    episodes = random_episodes(SHAPE, seed=0)[learner._reduction.rank :: share]
    minibatch_size = SHAPE.num_envs * SHAPE.length // share // NUM_MINIBATCHES
    start = time.perf_counter()
    batch = learner.build_train_batch(episodes, minibatch_size)
    connected = time.perf_counter()
    before = getattr(learner._reduction, "calls", 0), getattr(learner._reduction, "bytes", 0)
    learner.update(batch=batch, minibatch_size=minibatch_size, num_epochs=1, timesteps={})
    end = time.perf_counter()
    return {
        "connectors_us_per_step": 1e6 * (connected - start) / (SHAPE.num_envs * SHAPE.length / share),
        "ms_per_minibatch": 1e3 * (end - connected) / NUM_MINIBATCHES,
        "sums_per_minibatch": (getattr(learner._reduction, "calls", 0) - before[0]) / NUM_MINIBATCHES,
        "kilobytes_per_minibatch": (getattr(learner._reduction, "bytes", 0) - before[1]) / NUM_MINIBATCHES / 1e3,
    }


def time_sums(learner: Any) -> dict[int, float]:
    """On a learner: microseconds of one sum by how many float32 it has."""
    found = {}
    for size in SUM_SIZES:
        x, seconds = torch.zeros(size), []
        for _ in range(12):
            start = time.perf_counter()
            learner._reduction.sum(x)
            seconds.append(time.perf_counter() - start)
        found[size] = 1e6 * statistics.median(seconds[2:])
    return found


def measure_learners(num_learners: int, share: int, rounds: int) -> dict[str, Any]:
    """The update of one in ``share`` of a batch by each of some learners with a thread each; 1 is a local learner."""
    remote = 0 if num_learners == 1 else num_learners
    config = configure(BLPOConfig(), SHAPE, "cpu", nystrom_rank=5, num_critic_updates=SHAPE.num_critic_updates)
    group = config.learners(num_learners=remote, num_cpus_per_learner=1).build_learner_group()
    rounds_of = [
        [result.get() for result in group.foreach_learner(partial(time_update, share=share))] for _ in range(rounds + 1)
    ]
    slowest = [max(results, key=lambda r: r["ms_per_minibatch"]) for results in rounds_of[1:]]
    row = {name: round(statistics.median(r[name] for r in slowest), 3) for name in slowest[0]}
    sums = [result.get() for result in group.foreach_learner(time_sums)][0] if remote else {}
    group.shutdown()
    return {
        "num_learners": num_learners,
        "share": f"1/{share}",
        **row,
        "microseconds_per_sum": {k: round(v, 1) for k, v in sums.items()},
    }


def calibrate(runners: list[dict], learners: list[dict]) -> Costs:
    """The model's constants from the measured tables."""
    one, most = runners[0], runners[-1]
    outside = [1e-3 * row["ms_outside_sampling"] for row in (one, most)]
    # Two unknowns from the smallest and the largest group: seconds per call and per step.
    call, transport = outside[0] / 2, outside[0] / 2 / one["env_steps"]
    if most is not one:
        added = most["num_env_runners"] - one["num_env_runners"]
        grown = max(0.0, outside[1] - outside[0])
        # All runners sample as many steps here, so both grow alike; half of it is booked on each.
        call, transport = grown / added / 2, grown / (most["env_steps"] - one["env_steps"]) / 2
    alone, half, several = learners[0], learners[1], learners[-1]
    sums = {int(k): 1e-6 * v for k, v in several["microseconds_per_sum"].items()}
    small, large = SUM_SIZES[0], SUM_SIZES[-1]
    count = max(several["sums_per_minibatch"], 1.0)
    # From a learner alone on a whole and on half a batch: learners that share this machine's cores would tell less.
    compute = 1e-3 * alone["ms_per_minibatch"]
    fixed = max(0.0, 2e-3 * half["ms_per_minibatch"] - compute)
    return Costs(
        rate=one["env_steps_per_s_of_one_while_sampling"],
        call=call,
        transport=transport,
        connectors=1e-6 * alone["connectors_us_per_step"],
        compute=compute,
        fixed=fixed,
        sums=count,
        sum_bytes=1e3 * several["kilobytes_per_minibatch"] / count,
        latency=sums.get(small, 0.0),
        bandwidth=2 * 4 * large / max(1e-9, sums.get(large, 0.0) - sums.get(small, 0.0)),
    )


def show_models(costs: Costs, learner_speedup: float, console: Console) -> dict[str, list[dict]]:
    """The model for these costs, and for learners that compute faster by a factor."""
    faster = replace(costs, compute=costs.fixed + (costs.compute - costs.fixed) / learner_speedup)
    title = f"model, not measured: learners' arithmetic {learner_speedup:g} times as fast"
    return {
        "model": show_model(costs, "model, not measured", console),
        "model_faster_learners": show_model(faster, title, console),
    }


def show_model(costs: Costs, title: str, console: Console) -> list[dict]:
    """T's parts for clusters of several sizes: 640 steps per EnvRunner and iteration, 32 minibatches x 4 epochs."""
    rows = []
    for runners in (10, 100, 1000):
        for learners in (1, 4, 16):
            steps = 640 * runners
            # Minibatches grow with the batch, and with them what is not fixed of a learner's time.
            scale = max(1.0, steps / (SHAPE.num_envs * SHAPE.length))
            larger = replace(costs, compute=costs.fixed + scale * (costs.compute - costs.fixed))
            parts = iteration_parts(larger, runners, learners, steps, 4 * NUM_MINIBATCHES)
            total = sum(parts.values())
            rows.append(
                {"env_runners": runners, "learners": learners, "env_steps_per_s": round(steps / total)}
                | {name: f"{100 * seconds / total:.0f} %" for name, seconds in parts.items()}
                | {"bottleneck": max(parts, key=lambda name: parts[name])}
            )
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--num-env-runners", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-learners", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--learner-speedup",
        type=float,
        default=20.0,
        help="also show the model for learners whose arithmetic is so much faster, as a GPU's may be: an assumption",
    )
    parser.add_argument(
        "--costs-from", type=Path, metavar="JSON", help="only show the model, for an earlier run's costs"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    args = parser.parse_args()
    if args.costs_from:
        show_models(Costs(**json.loads(args.costs_from.read_text())["costs"]), args.learner_speedup, Console())
        return
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    console = Console()
    runners = [measure_runners(args.env, n, args.rounds) for n in args.num_env_runners]
    learners = [measure_learners(1, share, args.rounds) for share in (1, 2)]
    learners += [measure_learners(n, n, args.rounds) for n in args.num_learners]
    for row in runners + learners:
        console.print(row)
    costs = calibrate(runners, learners)
    console.print(costs)
    report = {**provenance(), "env": args.env, "runners": runners, "learners": learners, "costs": asdict(costs)}
    models = show_models(costs, args.learner_speedup, console)
    args.output.write_text(json.dumps({**report, **models}, indent=2) + "\n")


if __name__ == "__main__":
    main()
