"""The Hopper example with several EnvRunners, several learners, and both on a cluster: do they learn alike?

    python -m benchmarks.on_cluster --seeds 0 1 2 --stop-timesteps 120000
    python -m benchmarks.on_cluster --seeds 3 4 --stop-timesteps 120000 --add
    python -m benchmarks.on_cluster --groups env_runners learners --seeds 0 1 2 --stop-timesteps 120000 --add

=========== =========== ======== =====================================================
group       EnvRunners  learners where
=========== =========== ======== =====================================================
one_process 1, local    1, local this process
env_runners 3           1, local processes of their own
learners    1, local    2        processes of their own
cluster     3           2        three nodes (``ray.cluster_utils``) on this machine
=========== =========== ======== =====================================================

Environments, batch, minibatches and segments are as many over all EnvRunners and learners. Printed and kept: the mean
return of all episodes that ended in the last quarter of each run; each group's difference to ``one_process``; and over
all groups the effect of EnvRunners and that of learners (2 x 2 design); with standard errors (Welch).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from blpo_rllib.experiments.provenance import provenance
from blpo_rllib.tasks import TASKS

NUM_ENVS = 33
# EnvRunners and learners by group; 0 is a local one.
GROUPS = {"one_process": (0, 0), "env_runners": (3, 0), "learners": (0, 2), "cluster": (3, 2)}
BATCH, MINIBATCH = 20_480, 640


def count_return(*, episode: Any, metrics_logger: Any, **_: Any) -> None:
    """RLlib's own mean is over a window of the last episodes, which leaves out those that ended first."""
    metrics_logger.log_value("sum_of_returns", float(episode.get_return()), reduce="sum", clear_on_reduce=True)
    metrics_logger.log_value("returns", 1, reduce="sum", clear_on_reduce=True)


def setup(seed: int, num_env_runners: int, num_learners: int) -> Any:
    """The example with segments of 320 steps, of which each of two learners gets one a minibatch."""
    parts = max(1, num_learners)
    c = (
        TASKS["hopper"]
        .reference()
        .training(train_batch_size_per_learner=BATCH // parts, minibatch_size=MINIBATCH // parts, segment_length=320)
    )
    c.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=NUM_ENVS // max(1, num_env_runners))
    c.learners(num_learners=num_learners, num_cpus_per_learner=1).callbacks(on_episode_end=count_return)
    return c.debugging(seed=seed, log_level="ERROR")


def node_of(_: Any) -> str:
    """The node that this runs on."""
    return ray.get_runtime_context().get_node_id()


def train(seed: int, group: str, timesteps: int) -> dict[str, Any]:
    """One run: environment steps and mean return of each iteration, and the nodes its processes were on."""
    algo, rows, start = setup(seed, *GROUPS[group]).build_algo(), [], time.monotonic()
    nodes = set(algo.env_runner_group.foreach_env_runner(node_of, local_env_runner=GROUPS[group][0] == 0))
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


def run_group(group: str, seeds: list[int], timesteps: int) -> list[dict[str, Any]]:
    """The runs of one group, one after the other."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}) if group == "cluster" else None
    if cluster is None:
        ray.init(address="local", num_cpus=sum(GROUPS[group]) + 1, include_dashboard=False, log_to_driver=False)
    else:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
    runs = []
    for seed in seeds:
        runs.append(train(seed, group, timesteps))
        print(group, {k: v for k, v in runs[-1].items() if not isinstance(v, list)}, flush=True)
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()
    return runs


def contrast(late: dict[str, np.ndarray], plus: list[str], minus: list[str]) -> tuple[float, float]:
    """Mean over the groups in ``plus`` less that over those in ``minus``, and its standard error."""
    value = np.mean([late[g].mean() for g in plus]) - np.mean([late[g].mean() for g in minus])
    variances = [late[g].var(ddof=1) / len(late[g]) / len(side) ** 2 for side in (plus, minus) for g in side]
    return round(float(value), 1), round(float(np.sqrt(sum(variances))), 1)


def summary(groups: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Differences with their standard errors, by name."""
    late = {name: np.array([run["late_return"] for run in runs]) for name, runs in groups.items()}
    found = {name: contrast(late, [name], ["one_process"]) for name in late if "one_process" in set(late) - {name}}
    if set(late) == set(GROUPS):
        found["effect of EnvRunners"] = contrast(late, ["env_runners", "cluster"], ["one_process", "learners"])
        found["effect of learners"] = contrast(late, ["learners", "cluster"], ["one_process", "env_runners"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["one_process", "cluster"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stop-timesteps", type=int, default=200_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "on_cluster.json")
    parser.add_argument("--add", action="store_true", help="keep the runs at --output, with other seeds or groups")
    args = parser.parse_args()
    groups: dict[str, list[dict[str, Any]]] = {}
    if args.add:
        kept = json.loads(args.output.read_text())
        if kept["timesteps"] != args.stop_timesteps:
            parser.error(f"{args.output} holds runs of {kept['timesteps']} steps, not {args.stop_timesteps}")
        groups = kept["runs"]
    for group in args.groups:
        groups.setdefault(group, []).extend(run_group(group, args.seeds, args.stop_timesteps))
    found = summary(groups)
    for name, (difference, error) in found.items():
        print(f"{name}: {difference:+} ± {error}")
    report = {**provenance(), "timesteps": args.stop_timesteps, "differences": found, "runs": groups}
    args.output.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
