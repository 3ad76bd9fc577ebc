"""The Hopper example on a cluster of three nodes against the same in one process: do they learn alike?

    python benchmarks/on_cluster.py --seeds 0 1 2 --stop-timesteps 120000
    python benchmarks/on_cluster.py --seeds 3 4 --stop-timesteps 120000 --add

The cluster is a head and two more nodes, each with processes of its own, on this machine (``ray.cluster_utils``):
three EnvRunners and two learners, against a local EnvRunner and a local learner. Environments, batch, minibatches and
segments are as many over all EnvRunners and learners. Printed and kept: the mean return of all episodes that ended in
the last quarter of each run, and the difference of the two groups with its standard error (Welch).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from blpo_rllib.provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tuned_examples"))
from hopper_blpo import config

NUM_RUNNERS, NUM_LEARNERS, NUM_ENVS = 3, 2, 33
BATCH, MINIBATCH = 20_480, 640


def count_return(*, episode: Any, metrics_logger: Any, **_: Any) -> None:
    """RLlib's own mean is over a window of the last episodes, which leaves out those that ended first."""
    metrics_logger.log_value("sum_of_returns", float(episode.get_return()), reduce="sum", clear_on_reduce=True)
    metrics_logger.log_value("returns", 1, reduce="sum", clear_on_reduce=True)


def setup(seed: int, on_cluster: bool) -> Any:
    """The example with segments of 320 steps, of which each of two learners gets one a minibatch."""
    learners = NUM_LEARNERS if on_cluster else 1
    c = config().training(
        train_batch_size_per_learner=BATCH // learners, minibatch_size=MINIBATCH // learners, segment_length=320
    )
    c.env_runners(num_envs_per_env_runner=NUM_ENVS).callbacks(on_episode_end=count_return)
    if on_cluster:
        c.env_runners(num_env_runners=NUM_RUNNERS, num_envs_per_env_runner=NUM_ENVS // NUM_RUNNERS)
        c.learners(num_learners=NUM_LEARNERS, num_cpus_per_learner=1)
    return c.debugging(seed=seed, log_level="ERROR")


def node_of(_: Any) -> str:
    """The node that this runs on."""
    return ray.get_runtime_context().get_node_id()


def train(seed: int, on_cluster: bool, timesteps: int) -> dict[str, Any]:
    """One run: environment steps and mean return of each iteration, and the nodes its processes were on."""
    algo, rows, start = setup(seed, on_cluster).build_algo(), [], time.monotonic()
    nodes = {ray.get_runtime_context().get_node_id()}
    if on_cluster:
        nodes = set(algo.env_runner_group.foreach_env_runner(node_of, local_env_runner=False))
        nodes |= {result.get() for result in algo.learner_group.foreach_learner(node_of)}
    while not rows or rows[-1][0] < timesteps:
        env = algo.train()[ENV_RUNNER_RESULTS]
        if env.get("returns"):
            mean = float(env["sum_of_returns"]) / float(env["returns"])
            rows.append((int(env[NUM_ENV_STEPS_SAMPLED_LIFETIME]), mean, int(env["returns"])))
    algo.stop()
    late = [(value, count) for steps, value, count in rows if steps > 0.75 * timesteps]
    values, counts = zip(*late, strict=True)
    return {
        "seed": seed,
        "nodes": len(nodes),
        "late_return": round(float(np.average(values, weights=counts)), 1),
        "env_steps_per_s": round(rows[-1][0] / (time.monotonic() - start)),
        "env_steps": [steps for steps, _, _ in rows],
        "returns": [round(value, 1) for _, value, _ in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stop-timesteps", type=int, default=200_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "on_cluster.json")
    parser.add_argument("--add", action="store_true", help="keep the runs at --output, with other seeds")
    args = parser.parse_args()
    groups: dict[str, list[dict[str, Any]]] = {"one_process": [], "cluster": []}
    if args.add:
        kept = json.loads(args.output.read_text())
        if kept["timesteps"] != args.stop_timesteps:
            parser.error(f"{args.output} holds runs of {kept['timesteps']} steps, not {args.stop_timesteps}")
        groups = kept["runs"]
    for name in groups:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}) if name == "cluster" else None
        if cluster is not None:
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            cluster.wait_for_nodes()
        address = "local" if cluster is None else cluster.address
        ray.init(address=address, include_dashboard=None if cluster else False, log_to_driver=False)
        for seed in args.seeds:
            groups[name].append(train(seed, cluster is not None, args.stop_timesteps))
            print(name, {k: v for k, v in groups[name][-1].items() if not isinstance(v, list)}, flush=True)
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
    late = {name: np.array([run["late_return"] for run in runs]) for name, runs in groups.items()}
    difference = float(late["cluster"].mean() - late["one_process"].mean())
    error = float(np.sqrt(sum(x.var(ddof=1) / len(x) for x in late.values())))
    summary = {"difference": round(difference, 1), "standard_error": round(error, 1)}
    print(summary)
    report = {**provenance(), "timesteps": args.stop_timesteps, **summary, "runs": groups}
    args.output.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
