"""Trains CartPole on a cluster of processes while EnvRunners, learners and whole nodes are killed, and reports.

python tests/chaos.py --seconds 90 --interval 20 --stop-timesteps 40000 --output /tmp/chaos

The nodes are real Ray nodes (raylets with workers of their own) on this machine; a killed node is replaced by a new
one. The training is the tuned example in a process of its own. Nothing here helps it along.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ray.cluster_utils import Cluster

# isort: split
# Ray brings its own, and finds it once it is imported itself.
import psutil

from blpo_rllib.experiments.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
NODES = 3
# What Ray calls the processes of these actors.
TITLES = {"env_runner": "EnvRunner", "learner": "ray::_WrappedExecutable"}


class Nodes:
    """A head without work and ``NODES`` nodes; only these and their processes are ever killed."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.workers = [self._add() for _ in range(NODES)]

    def _add(self):
        return self.cluster.add_node(num_cpus=2, include_dashboard=False)

    @property
    def address(self) -> str:
        return self.cluster.address

    def processes(self, kind: str) -> list[psutil.Process]:
        return [p for node in self.workers for p in descendants(_raylet(node), kind)]

    def strike(self, chance: random.Random) -> str:
        """Kills one of a kind that is there at the moment; says which."""
        found = {kind: self.processes(kind) for kind in TITLES}
        kind = chance.choice(["node", *(kind for kind in TITLES if found[kind])])
        if kind == "node":
            self._replace(chance.randrange(len(self.workers)))
        else:
            chance.choice(found[kind]).kill()
        return kind

    def _replace(self, position: int) -> None:
        node = self.workers[position]
        _raylet(node).kill()
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers[position] = self._add()

    def shutdown(self) -> None:
        self.cluster.shutdown()


def _raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def descendants(process: psutil.Process, kind: str) -> list[psutil.Process]:
    """The processes under this one that are EnvRunners or learners, as ``kind`` says."""
    return [p for p in _children(process) if TITLES[kind] in _title(p)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def start_training(address: str, output: Path, stop_timesteps: int, num_learners: int, log) -> subprocess.Popen:
    command = [sys.executable, "tuned_examples/cartpole_blpo.py", "--output", str(output / "run")]
    command += ["--num-env-runners", "2", "--num-learners", str(num_learners), "--num-gpus-per-learner", "0"]
    # No mean of a hundred episodes exceeds 500: the number of steps is what ends it.
    command += ["--stop-timesteps", str(stop_timesteps), "--stop-reward", "501"]
    environment = os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def strikes(nodes: Nodes, training: subprocess.Popen, seconds: float, interval: float, seed: int) -> Iterator[dict]:
    """Strikes until ``seconds`` have passed or training is over."""
    chance, start = random.Random(seed), time.monotonic()
    for due in np.arange(interval, seconds, interval):
        # On the clock: replacing a node takes a while itself.
        if not _runs_until(training, start + due):
            return
        fault = {"kind": nodes.strike(chance), "second": round(time.monotonic() - start, 1)}
        print(fault, flush=True)
        yield fault


def _runs_until(training: subprocess.Popen, moment: float) -> bool:
    """Waits; whether training still runs then."""
    try:
        training.wait(timeout=max(0.0, moment - time.monotonic()))
    except subprocess.TimeoutExpired:
        return True
    return False


def wait_for_first_checkpoint(training: subprocess.Popen, output: Path, timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while not list(output.glob("run/run/seed_0/checkpoint_*/blpo_checkpoint.json")):
        if training.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no checkpoint was written: see {output / 'log.txt'}")
        time.sleep(0.5)


def read_rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "run/run/seed_0/result.json").read_text().splitlines()]


def steps(row: dict) -> int:
    return int(row["env_runners"]["num_env_steps_sampled_lifetime"])


def report(output: Path, faults: list[dict], exit_code: int, seconds: float) -> dict:
    """What happened, from the log and the rows that the run left."""
    rows, log = read_rows(output), (output / "log.txt").read_text()
    returns = [row["env_runners"].get("episode_return_mean", np.nan) for row in rows[-20:]]
    return {
        **provenance(),
        "seconds": round(seconds),
        "faults": dict(Counter(fault["kind"] for fault in faults)),
        "restarts_from_checkpoint": log.count("going on from checkpoint"),
        "lost_env_steps": [int(n) for n in re.findall(r"(\d+) environment steps are done again", log)],
        "env_steps": steps(rows[-1]),
        "iterations_without_gap": [row["training_iteration"] for row in rows] == list(range(1, len(rows) + 1)),
        "steps_monotone": all(np.diff([steps(row) for row in rows]) > 0),
        "final_return": round(float(np.nanmean(returns)), 1),
        "exit_code": exit_code,
        "sequence": faults,
    }


def run(output: Path, seconds: float, interval: float, stop_timesteps: int, num_learners: int, seed: int = 0) -> dict:
    """One experiment; the report is also written to ``output``/chaos.json."""
    output.mkdir(parents=True, exist_ok=True)
    # Short, for Ray's sockets; and its own, so that no other Ray on this machine joins the cluster that is shot at.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    nodes = Nodes()
    with (output / "log.txt").open("w") as log:
        training = start_training(nodes.address, output, stop_timesteps, num_learners, log)
        try:
            wait_for_first_checkpoint(training, output)
            start = time.monotonic()
            faults = list(strikes(nodes, training, seconds, interval, seed))
            exit_code = training.wait(timeout=600)
            result = report(output, faults, exit_code, time.monotonic() - start)
        finally:
            if training.poll() is None:
                training.kill()
            nodes.shutdown()
            shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)
    (output / "chaos.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--interval", type=float, default=20)
    parser.add_argument("--stop-timesteps", type=int, default=200_000)
    parser.add_argument("--num-learners", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder")
    args = parser.parse_args()
    print(json.dumps(run(args.output, args.seconds, args.interval, args.stop_timesteps, args.num_learners), indent=2))


if __name__ == "__main__":
    main()
