"""Sweeps: plans, memory on disk, searches, exact hypergradients, reports; interruptions and failures."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from problems import SmallPlayers, random_batch
from rich.console import Console
from small_sweep import BATCH, Mark, lines, small_config, small_plan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import Run

from blpo_rllib import checkpoints
from blpo_rllib.core.curvature import Hessian
from blpo_rllib.core.exact_hypergradient import Oracle
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.ihvp import Exact, Nystrom
from blpo_rllib.core.minibatch import UpdateSettings
from blpo_rllib.experiments.metrics import ENV_STEPS, EPISODE_RETURN, EPISODES
from blpo_rllib.experiments.progress import RichReporter
from blpo_rllib.experiments.tracking import git_revision, trackers
from blpo_rllib.sweep import SweepPlan, TrialFiles, report, run_sweep
from blpo_rllib.sweep.fidelity import measure_fidelity
from blpo_rllib.sweep.records import FAILED, FINISHED, STOPPED
from blpo_rllib.sweep.report import FIGURES
from blpo_rllib.sweep.search import OptunaPoints, Points, scheduler_of

RANDOM = {"nystrom_rank": (1, 20), "nystrom_damping": (0.01, 50.0), "hypergradient_bound": (0.5, 2.0)}


# Plans.


def test_grid_has_all_combinations_and_unique_names():
    plan = SweepPlan("t", {"nystrom_damping": [50, 0.1], "nystrom_rank": [2, 1, 1]}, seeds=2)
    names = [plan.trial_name(point, seed) for point in plan.points() for seed in range(2)]
    assert len(set(names)) == plan.num_trials == 8
    assert names[0] == "rank1_damping0.1_seed0"
    assert SweepPlan.from_json(plan.to_json()) == plan


def test_random_points_are_inside_and_exactly_what_their_names_say():
    plan = SweepPlan("t", RANDOM, search="random", num_points=200)
    points = plan.points()
    assert points == plan.points()
    for name, (low, high) in RANDOM.items():
        values = [point[name] for point in points]
        assert low <= min(values) <= max(values) <= high
    dampings = np.log([point["nystrom_damping"] for point in points])
    assert abs(np.median(dampings) - np.log([0.01, 50]).mean()) < 0.8
    assert all(isinstance(point["nystrom_rank"], int) for point in points)
    for point in points:
        assert float(f"{point['nystrom_damping']:g}") == point["nystrom_damping"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "gird"}, "search='gird' must be one of 'grid', 'random'"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"values": {"nystrom_rank": [1]}}, "must have 'nystrom_damping'"),
        ({"values": {"nystrom_rank": [1.5], "nystrom_damping": [1.0]}}, "must be whole numbers"),
        ({"values": {"nystrom_rank": [1], "nystrom_damping": [0.0]}}, "must be numbers > 0"),
        ({"values": {"nystrom_rank": [1], "nystrom_damping": [1.0], "gamma": [1.0]}}, "'gamma' cannot be swept"),
        ({"objective": "return-and-time"}, "is for search='optuna'"),
    ],
)
def test_wrong_plans(settings, message):
    with pytest.raises(ValueError, match=message):
        SweepPlan(**({"task": "t"} | settings))


# Memory on disk.


def row(iteration, value=1.0, episodes=1.0):
    return {"iteration": iteration, ENV_STEPS: 10.0 * iteration, EPISODE_RETURN: value, EPISODES: episodes}


def test_rows_that_were_come_to_again_count_once(tmp_path):
    files = TrialFiles(tmp_path)
    for number in (1, 2, 3, 4, 2, 3):
        files.append("t", row(number))
    with (tmp_path / "t.jsonl").open("a") as stream:
        stream.write('{"iteration": 4, "torn')
    assert [r["iteration"] for r in files.rows("t")] == [1, 2, 3]
    assert files.ended() == {}


# Searches.


def finish(files, plan, point, value, seconds=10.0, status=FINISHED):
    for seed in range(plan.seeds):
        name = plan.trial_name(point, seed)
        record = {"name": name, "status": status, "seed": seed, **point, "final_return": value, "seconds": seconds}
        files.end(name, record)


@pytest.mark.parametrize("objective", ["return", "return-and-time"])
def test_optuna_finds_the_better_damping_and_remembers_after_an_interruption(tmp_path, objective):
    plan = SweepPlan("t", RANDOM, search="optuna", num_points=30, seeds=2, objective=objective)
    points = Points(tmp_path / "points.json", plan, TrialFiles(tmp_path / "trials"))
    proposals = []
    for number in range(30):
        if number % 10 == 0:
            # A new start: what it knows comes from the files.
            points = Points(tmp_path / "points.json", plan, TrialFiles(tmp_path / "trials"))
            optuna = OptunaPoints(plan)
        optuna.learn(points)
        point = optuna.propose()
        points.extend([point])
        proposals.append(point["nystrom_damping"])
        finish(points.files, plan, point, -abs(np.log(point["nystrom_damping"] / 0.1)))
    assert len(points.points) == 30
    late, early = np.log(proposals[20:]), np.log(proposals[:10])
    assert np.median(abs(late - np.log(0.1))) < np.median(abs(early - np.log(0.1)))


def test_trials_that_ended_are_not_open_and_failed_ones_are(tmp_path):
    plan = small_plan()
    points = Points(tmp_path / "points.json", plan, TrialFiles(tmp_path / "trials"))
    first, second, third, fourth = points.points
    finish(points.files, plan, first, 1.0)
    finish(points.files, plan, second, 1.0, status=STOPPED)
    finish(points.files, plan, third, 1.0, status=FAILED)
    assert [point for point, _ in points.open().values()] == [third, fourth]


def test_asha_goes_on_with_what_it_knew(tmp_path):
    plan = small_plan(search="asha", num_points=6, stop_timesteps=1000)
    points = Points(tmp_path / "points.json", plan, TrialFiles(tmp_path / "trials"))
    for number, point in enumerate(points.points[:5]):
        for iteration in range(1, 101):
            points.files.append(plan.trial_name(point, 0), row(iteration, 100.0 + number))
        finish(points.files, plan, point, 100.0)
    scheduler = scheduler_of(points)
    trial = type("Trial", (), {"trial_id": "new"})()
    scheduler.on_trial_add(None, trial)
    result = {scheduler._time_attr: 100.0, scheduler._metric: 1.0}
    assert scheduler.on_trial_result(None, trial, result) == scheduler.STOP


# The exact hypergradient.


def fidelity(solver, seed=0):
    torch.manual_seed(seed)
    players, batch = SmallPlayers(by_hand=True), random_batch()
    settings = UpdateSettings(1, 1, LeaderLoss(0.2), None, Correction(None, 1.0))
    return Oracle(players, batch, settings, Hessian).compare(solver, 1e-2, np.random.default_rng(0))


def test_the_exact_solver_is_exact():
    found = fidelity(Exact(0.7))
    assert found.ihvp_relative_residual < 1e-9
    for name in ("ihvp_cosine", "correction_cosine", "hypergradient_cosine"):
        assert getattr(found, name) == pytest.approx(1.0, abs=1e-12)
    assert found.reference_cosine < 1.0


def test_nystrom_becomes_exact_with_all_rows():
    size = sum(p.numel() for p in SmallPlayers().critic_parameters)
    full, few = fidelity(Nystrom(size, 0.7, core_shift=0.0)), fidelity(Nystrom(2, 0.7, core_shift=0.0))
    assert full.ihvp_cosine == pytest.approx(1.0, abs=1e-6)
    assert full.hypergradient_cosine == pytest.approx(1.0, abs=1e-6)
    assert few.ihvp_cosine < full.ihvp_cosine
    assert few.ihvp_relative_residual > 1e3 * full.ihvp_relative_residual


# A whole small sweep, with a trial that fails, trackers, exact hypergradients and the report.

# What rows have beside the metrics.
NOT_METRICS = {"iteration", "nystrom_rank", "nystrom_damping"}
FAILING = "rank4_damping0.5_seed0"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    output, markers = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("markers")
    plan, log = small_plan(), io.StringIO()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    files = run_sweep(
        small_config(Mark(markers, plan, FAILING)),
        plan,
        output,
        callbacks=trackers(plan.task, plan.name, output, "test-project"),
        reporter=RichReporter(plan.stop_timesteps, plan.num_trials, Console(file=log, width=200), seconds=0.1),
    )
    started = lines(markers)
    found = measure_fidelity(output, plan, files)
    console = Console(file=io.StringIO(), width=150)
    written = report(plan, files, output, found, console)
    yield {
        "plan": plan, "output": output, "started": started, "files": files, "log": log.getvalue(),
        "report": console.file.getvalue(), "written": written, "fidelity": found,
    }  # fmt: skip
    ray.shutdown()


def test_a_failed_trial_does_not_end_the_sweep(swept):
    status = {name: record["status"] for name, record in swept["files"].ended().items()}
    assert len(status) == 4
    assert {name for name, s in status.items() if s == FAILED} == {FAILING}
    assert "this trial fails on purpose" in swept["files"].ended()[FAILING]["error"]
    assert f"{FAILING} failed: " in swept["report"]


def test_every_table_and_figure_is_there_and_the_numbers_are_those_of_the_trials(swept):
    output, files = swept["output"], swept["files"]
    names = {path.name for path in swept["written"]}
    assert names == {"trials.parquet", "trials.csv", *(f"{name}.png" for name in FIGURES)}
    assert all(path.stat().st_size > 1000 for path in swept["written"] if path.suffix == ".png")
    table = pd.read_parquet(output / "trials.parquet").set_index("name")
    assert len(table) == len(pd.read_csv(output / "trials.csv")) == 4
    for name in table.index.drop(FAILING):
        # From Tune's own file of results, not from ours.
        results = [json.loads(line) for line in (output / "run" / name / "result.json").read_text().splitlines()]
        steps = [r["env_runners"]["num_env_steps_sampled_lifetime"] for r in results]
        assert table.loc[name, "env_steps"] == steps[-1] >= 8 * BATCH
        last = [r for r, s in zip(results, steps) if s > 0.8 * steps[-1]]
        residuals = [r["learners"]["default_policy"]["ihvp_relative_residual"] for r in last]
        assert table.loc[name, "bilevel/ihvp_relative_residual"] == pytest.approx(np.mean(residuals))
        ended = [r["env_runners"] for r in last if "episode_return_mean" in r["env_runners"]]
        ended = [e for e in ended if e.get("num_episodes") and np.isfinite(e["episode_return_mean"])]
        weights = [e["num_episodes"] for e in ended]
        expected = np.average([e["episode_return_mean"] for e in ended], weights=weights)
        assert table.loc[name, "final_return"] == pytest.approx(expected)
        assert f"{expected:.1f}" in swept["report"]
        assert table.loc[name, "exact/ihvp_cosine"] == swept["fidelity"][name]["ihvp_cosine"]
        assert -1 <= table.loc[name, "exact/hypergradient_cosine"] <= 1
    assert len(files.rows(FAILING)) == 0


def test_trials_run_once(swept):
    starts = {name: sum(x["event"] == "start" for x in found) for name, found in swept["started"].items()}
    assert starts == dict.fromkeys(swept["files"].ended(), 1)


def test_another_sweep_does_not_go_into_its_folder(swept, tmp_path):
    config = small_config(Mark(tmp_path, swept["plan"]))
    with pytest.raises(ValueError, match="holds a sweep: add --resume"):
        run_sweep(config, swept["plan"], swept["output"])
    with pytest.raises(ValueError, match="holds another sweep"):
        run_sweep(config, small_plan(seeds=2), swept["output"], resume=True)


def test_progress_in_a_log_file_has_no_control_characters(swept):
    assert "\x1b" not in swept["log"]
    assert "\r" not in swept["log"]
    assert f"{FAILING}: failed at" in swept["log"]
    assert "4/4 trials ended (1 failed)" in swept["log"]
    assert "IHVP residual" in swept["log"]


def test_wandb_run_holds_config_history_summary_and_group(swept):
    name = "rank1_damping0.5_seed0"
    runs = [Run(path) for path in swept["output"].glob("wandb/offline-run-*/run-*.wandb")]
    (run,) = [run for run in runs if run.run.display_name == name]
    rows = swept["files"].rows(name)
    assert (run.run.run_group, run.run.job_type) == (swept["plan"].name, "cartpole")
    assert run.run.project == "test-project"
    assert {"BLPO", "cartpole", swept["plan"].name} <= set(run.run.tags)
    assert run.config["nystrom_damping"] == 0.5
    assert run.config["algorithm"] == "BLPO"
    assert run.config["git_revision"] == git_revision()
    assert len(run.history) == len(rows) > 0
    for logged, expected in zip(run.history, rows):
        for key in expected.keys() - NOT_METRICS:
            assert logged[key] == pytest.approx(expected[key])
    for key in rows[-1].keys() - NOT_METRICS:
        assert run.summary[key] == pytest.approx(rows[-1][key])


def test_tensorboard_holds_the_same_metrics(swept):
    name = "rank1_damping50_seed0"
    events = EventAccumulator(str(swept["output"] / "run" / name)).Reload()
    rows = swept["files"].rows(name)
    for key in set().union(*rows) - NOT_METRICS:
        logged = {e.step: e.value for e in events.Scalars(key)}
        expected = {int(r[ENV_STEPS]): r[key] for r in rows if key in r}
        assert logged == pytest.approx(expected, rel=1e-5)


# Slow: interruptions, and populations.


def start(output, markers, *options):
    script = Path(__file__).with_name("small_sweep.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(output), str(markers), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    output, markers = tmp_path / "sweep", tmp_path / "markers"
    markers.mkdir()
    files, process = TrialFiles(output / "trials"), start(output, markers)
    deadline = time.monotonic() + 300
    # While some have ended and others are under way.
    while len(files.ended()) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = files.ended()
    assert 3 <= len(before) < 8
    names = {path.name for path in (output / "run").iterdir() if path.is_dir()} - set(before)
    under_way = {name for name in names if checkpoints.newest_valid(*checkpoints.resolve(output / "run" / name))}
    again = start(output, markers, "--resume")
    out, _ = again.communicate(timeout=600)
    assert again.returncode == 0, out
    after = files.ended()
    assert len(after) == 8
    assert {record["status"] for record in after.values()} == {FINISHED}
    starts = {name: sum(x["event"] == "start" for x in found) for name, found in lines(markers).items()}
    for name, record in before.items():
        assert starts[name] == 1
        assert after[name] == record
    assert set(starts.values()) <= {1, 2}
    # Those that had got somewhere went on from a checkpoint.
    for name in under_way:
        assert any(x["event"] == "loaded" for x in lines(markers)[name])
    for name in after:
        iterations = [r["iteration"] for r in files.rows(name)]
        assert iterations == sorted(set(iterations))
        assert files.rows(name)[-1][ENV_STEPS] >= 60 * BATCH


@pytest.mark.slow
@pytest.mark.parametrize("search", ["random", "optuna", "asha"])
def test_other_searches(tmp_path, search):
    (tmp_path / "markers").mkdir()
    plan = small_plan(
        search=search, values=RANDOM, num_points=4, seeds=1 + (search == "optuna"), stop_timesteps=20 * BATCH
    )
    ray.shutdown()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    # Which trials ASHA stops depends on the order in which they come to a rung: one after the other it is the same.
    one_by_one = 1 if search == "asha" else None
    config = small_config(Mark(tmp_path / "markers", plan))
    files = run_sweep(config, plan, tmp_path / "sweep", max_concurrent=one_by_one)
    console = Console(file=io.StringIO(), width=150)
    assert report(plan, files, tmp_path / "sweep", {}, console)
    ray.shutdown()
    ended = files.ended()
    assert len(ended) == plan.num_trials
    assert {r["status"] for r in ended.values()} == ({FINISHED, STOPPED} if search == "asha" else {FINISHED})
    assert all((r["env_steps"] < plan.stop_timesteps) == (r["status"] == STOPPED) for r in ended.values())
    assert len({(r["nystrom_rank"], r["nystrom_damping"]) for r in ended.values()}) == 4


@pytest.mark.slow
def test_population_members_go_on_with_their_donors_weights(tmp_path):
    markers = tmp_path / "markers"
    markers.mkdir()
    values = {"nystrom_rank": (2,), "nystrom_damping": (0.1, 50.0), "hypergradient_bound": (0.1, 2.0)}
    plan = small_plan(search="pbt", values=values, num_points=3, stop_timesteps=10 * BATCH)
    ray.shutdown()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    files = run_sweep(small_config(Mark(markers, plan)), plan, tmp_path / "sweep")
    ray.shutdown()
    assert {r["status"] for r in files.ended().values()} == {FINISHED}
    found = lines(markers)
    # The learner's and the EnvRunner's.
    trained = {
        name: {(x["weights"], x["acting"]) for x in seen if x["event"] == "iteration"} for name, seen in found.items()
    }
    taken = 0
    for name, seen in found.items():
        for x in seen:
            if x["event"] != "loaded":
                continue
            donors = [other for other, weights in trained.items() if (x["weights"], x["acting"]) in weights]
            assert donors, "loaded weights that no member ever had"
            taken += name not in donors
    assert taken, "no member took another's weights"
    assert any(len({r["nystrom_damping"] for r in files.rows(name)}) > 1 for name in files.ended())
