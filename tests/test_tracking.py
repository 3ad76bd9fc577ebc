"""Trackers that fail, hang or refuse; the dashboard; progress at a terminal."""

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray.cloudpickle
from ray.air.integrations.wandb import _QueueItem
from ray.tune.logger import LoggerCallback
from rich.console import Console
from wandb_files import Run

from benchmarks.tracker_cost import DISCARD_PORT, Refusing, Silent, serve
from blpo_rllib.experiments import dashboard, metrics, wandb_process
from blpo_rllib.experiments.progress import RichReporter, duration
from blpo_rllib.experiments.tracking import GroupedWandb, InBackground, Mailbox, git_revision

RESULT = {
    "training_iteration": 3,
    "time_this_iter_s": 2.0,
    "time_total_s": 6.0,
    "env_runners": {
        "episode_return_mean": 21.0,
        "num_env_steps_sampled_lifetime": 600,
        "num_env_steps_sampled": 200,
        "num_episodes": 4,
    },
    "learners": {
        "__all_modules__": {"entropy": 9.0},
        "default_policy": {
            "damping": 0.1,
            "mixed_norm": 0.5,
            "entropy": 0.6,
            "mixed_grad_cosine": float("nan"),
            "x": 1.0,
        },
        "second": {"mixed_norm": 0.7},
    },
    "config": {"hypergradient_bound": None},
}


def test_metrics_are_grouped():
    assert metrics.grouped(RESULT) == {
        "returns/episode_return_mean": 21.0,
        "returns/episodes": 4.0,
        "throughput/env_steps": 600.0,
        "throughput/env_steps_per_second": 100.0,
        "throughput/iteration_seconds": 2.0,
        "throughput/seconds": 6.0,
        "bilevel/damping": 0.1,
        "bilevel/mixed_norm": 0.5,
        "bilevel/second/mixed_norm": 0.7,
        "policy/entropy": 0.6,
    }


class Bad(LoggerCallback):
    """Fails, or takes long."""

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error, self.results = seconds, error, 0

    def log_trial_result(self, iteration, trial, result):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        self.results += 1


@pytest.mark.parametrize("inner", [Bad(seconds=60), Bad(error=RuntimeError("refused")), Bad(error=ConnectionError())])
def test_a_bad_tracker_costs_training_next_to_nothing(inner, caplog):
    tracker = InBackground(inner, finish_seconds=0.2)
    start = time.perf_counter()
    tracker.setup()
    for iteration in range(500):
        tracker.log_trial_result(iteration, None, RESULT)
    assert time.perf_counter() - start < 0.2
    tracker.on_experiment_end([])
    assert time.perf_counter() - start < 1.5
    assert "training goes on" in caplog.text or "is left behind" in caplog.text


def test_a_good_tracker_gets_everything_and_a_long_queue_loses_the_rest():
    tracker = InBackground(Bad())
    tracker.setup()
    for iteration in range(300):
        tracker.log_trial_result(iteration, None, RESULT)
    tracker.on_experiment_end([])
    assert tracker._inner.results == 300
    slow = InBackground(Bad(seconds=60), finish_seconds=0.1)
    slow.setup()
    for iteration in range(2000):
        slow.log_trial_result(iteration, None, RESULT)
    slow.on_experiment_end([])
    assert slow._lost > 900


def test_a_result_that_tune_adds_to_is_logged_as_it_was_reported():
    added = threading.Event()

    class Late(LoggerCallback):
        def log_trial_result(self, iteration, trial, result):
            added.wait(5)
            self.seen = dict(result)

    tracker, result = InBackground(Late()), dict(RESULT)
    tracker.setup()
    tracker.log_trial_result(1, None, result)
    result.update(experiment_tag="0")
    added.set()
    tracker.on_experiment_end([])
    assert tracker._inner.seen == RESULT


def test_a_trial_that_is_started_again_has_the_same_wandb_run(tmp_path):
    def run_id(output, name):
        trial = type("Trial", (), {"local_path": f"/tmp/session/{time.time()}/{name}"})()
        return GroupedWandb(task="t", output=output, project="p").run_id(trial)

    assert run_id(tmp_path / "a", "x") == run_id(tmp_path / "a", "x")
    assert len({run_id(tmp_path / folder, name) for folder in "ab" for name in "xy"}) == 4


class Process:
    """A W&B run's process that is none: what is sent to it waits for `run`."""

    def __init__(self, process):
        self.process, self.transfers = process, 0

    @property
    def put(self):
        return self

    def remote(self, items):
        self.transfers += 1
        self.process.put(items)


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # As a W&B run's process changes its own.
    monkeypatch.setattr("os.nice", lambda _: None)
    files = {"dir": str(tmp_path), "mode": "offline", "project": "p", "id": "i", "name": "n"}
    config = {"actor_lr": 0.1, "nystrom_rank": 2}
    return wandb_process.WandbRun(str(tmp_path), None, {"silent": True}, config=config, **files)


def written(run, folder):
    run.run()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return Run(path)


def test_rows_travel_together_and_the_configuration_follows_its_changes(tmp_path, wandb_run):
    process, trial = Process(wandb_run), Trial("a", "RUNNING")
    trial.config = {"actor_lr": 0.1, "nystrom_rank": 2}
    tracker = GroupedWandb(task="t", output=tmp_path, project="p", group="g", excludes=["policy"])
    tracker._trial_logging_actors[trial], tracker._trial_queues[trial] = process, Mailbox(process)
    for iteration in range(1, 101):
        if iteration == 50:
            # What population based training does to a trial: it stops and goes on with another configuration.
            trial.config = {"actor_lr": 0.2, "nystrom_rank": 2, "env": Process}
            tracker.log_trial_start(trial)
        tracker.log_trial_result(iteration, trial, {**RESULT, "training_iteration": iteration, "pid": 7})
    tracker._signal_logging_actor_stop(trial)
    assert 2 <= process.transfers <= 4
    found = written(wandb_run, tmp_path)
    assert [row["training_iteration"] for row in found.history] == list(range(1, 101))
    assert [row["_step"] for row in found.history] == list(range(1, 101))
    expected = {name for name in metrics.grouped(RESULT) if not name.startswith("policy/")}
    assert {name for name in found.history[-1] if "/" in name} == expected
    assert found.history[-1]["bilevel/mixed_norm"] == 0.5
    assert (found.config["actor_lr"], found.config["nystrom_rank"], found.config["pid"]) == (0.2, 2, 7)


def test_checkpoints_become_artifacts_and_a_deleted_one_costs_only_itself(tmp_path, wandb_run, caplog):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state").write_text("weights")
    row = (_QueueItem.RESULT.name, (1, {"a": 1.0}, {}))
    kind = _QueueItem.CHECKPOINT.name
    wandb_run.put([(kind, str(tmp_path / "gone")), (kind, str(tmp_path / "checkpoint")), row])
    wandb_run.put([(_QueueItem.END.name, None)])
    found = written(wandb_run, tmp_path)
    assert "no artifact of" in caplog.text
    assert [(a.name, a.type, [f.path for f in a.manifest.contents]) for a in found.artifacts] == [
        ("checkpoint_n", "model", ["state"])
    ]
    assert found.history[-1]["a"] == 1.0


def test_the_process_of_a_wandb_run_imports_little(tmp_path):
    path = tmp_path / "class.pkl"
    path.write_bytes(ray.cloudpickle.dumps(wandb_process.WandbRun))
    modules = {"torch", "ray.rllib", "ray.tune", "ray.air", "pyarrow", "blpo_rllib"}
    script = f"""
import sys, ray.cloudpickle
found = ray.cloudpickle.loads(open({str(path)!r}, 'rb').read())
init = dict(dir={str(tmp_path)!r}, mode='offline', project='p', id='i', name='n')
run = found({str(tmp_path)!r}, None, {{'silent': True}}, **init)
run.put([('RESULT', (1, {{'a': 1.0}}, {{'b': 2}})), ('END', None)])
run.run()
print(sorted({modules!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_git_revision(tmp_path):
    assert git_revision(tmp_path) is None

    def git(*command):
        about = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        done = subprocess.run(["git", "-C", tmp_path, *about, *command], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--message", "first")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_dashboard_is_valid_and_shows_metrics_that_exist():
    pytest.importorskip("wandb_workspaces")
    specification = dashboard.specification("entity", "project")
    sections = specification["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [
        "Returns",
        "Bilevel diagnostics",
        "Policy",
        "Throughput and faults",
        "Sweep",
    ]
    shown = {
        name
        for section in sections
        for panel in section["panels"]
        if panel["viewType"] == "Run History Line Plot"
        for name in panel["config"]["metrics"]
    }
    learner = {metrics.metric_name(name) for names in metrics.LEARNER_METRICS.values() for name in names}
    assert shown <= learner | set(metrics.RUN_METRICS) | {metrics.ENV_STEPS_PER_SECOND}
    assert learner <= shown
    (parallel,) = [
        panel for section in sections for panel in section["panels"] if panel["viewType"] == "Parallel Coordinates Plot"
    ]
    text = json.dumps(parallel)
    assert "nystrom_rank" in text
    assert "nystrom_damping" in text


def test_dashboard_without_network_goes_to_a_file(tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    path = tmp_path / "dashboard.json"
    monkeypatch.setattr(
        sys, "argv", ["dashboard", "--entity", "e", "--project", "p", "--offline", "--output", str(path)]
    )
    with pytest.raises(SystemExit) as exit_:
        dashboard.main()
    assert exit_.value.code == 0
    assert json.loads(path.read_text()) == dashboard.specification("e", "p") or path.stat().st_size > 10_000
    assert "python -m blpo_rllib.experiments.dashboard --entity e --project p" in capsys.readouterr().err


class Trial:
    """As much of a Tune trial as reporters and trackers look at."""

    local_path = "/a"

    def __init__(self, name, status, result=None):
        self.name, self.trial_id, self.status, self.last_result = name, name, status, result

    def __str__(self):
        return self.name


def test_progress_at_a_terminal_and_in_a_file():
    trials = [Trial("a", "RUNNING", RESULT), Trial("b", "ERROR"), Trial("c", "PENDING")]
    for terminal in (True, False):
        out = io.StringIO()
        reporter = RichReporter(1000, 3, Console(file=out, force_terminal=terminal, width=160))
        reporter.setup()
        assert reporter.should_report(trials)
        reporter.report(trials, False)
        reporter.report(trials, True)
        text = out.getvalue()
        assert ("\x1b" in text) == terminal
        assert "1/3 trials ended (1 failed), 1 running" in text
        assert "21.0" in text
        assert duration(4) in text
    assert text.splitlines()[0].startswith("a: 600/1000 steps, return 21.0, steps/s 100, left 0:04")


# Slow: the real thing, with an endpoint that is dead, and one that never answers.


SCRIPT = """
import sys, time
from pathlib import Path
import ray
from blpo_rllib.sweep import run_sweep
from blpo_rllib.experiments import tracking
from small_sweep import BATCH, Mark, small_config, small_plan
tracking.INIT_SECONDS = 15.0
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
output = Path(sys.argv[1])
(output / "markers").mkdir(parents=True)
plan = small_plan(values={"nystrom_rank": (2,), "nystrom_damping": (5.0,)}, stop_timesteps=200 * BATCH)
callbacks = tracking.trackers("t", "g", output, sys.argv[2] or None)
start = time.monotonic()
run_sweep(small_config(Mark(output / "markers", plan)), plan, output / "sweep", callbacks=callbacks)
print("WHOLE", time.monotonic() - start)
"""


def run_with(endpoint, output, monkeypatch, project="p"):
    output.mkdir(exist_ok=True)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", endpoint)
    monkeypatch.setenv("HOME", str(output))
    command = [sys.executable, "-c", SCRIPT, str(output / "out"), project]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = [row["throughput/iteration_seconds"] for row in rows(output / "out")]
    assert len(seconds) >= 199
    whole = float(done.stdout.split("WHOLE")[1].split()[0])
    return output / "out", sorted(seconds)[len(seconds) // 2], whole


def rows(folder):
    """The rows that the sweep itself kept of its only trial."""
    (path,) = (folder / "sweep" / "trials").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["dead", "refusing"])
def test_runs_that_cannot_begin_go_to_files(tmp_path, monkeypatch, endpoint):
    port = DISCARD_PORT if endpoint == "dead" else serve(Refusing)
    folder, _, _ = run_with(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    # Nothing is lost: the run is in files.
    assert [row["training_iteration"] for row in Run(path).history] == [row["iteration"] for row in rows(folder)]


@pytest.mark.slow
def test_slow_endpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        folder, slow, whole = run_with(f"http://127.0.0.1:{serve(Silent)}", tmp_path / "slow", patch)
    with monkeypatch.context() as patch:
        _, without, whole_without = run_with(
            f"http://127.0.0.1:{DISCARD_PORT}", tmp_path / "without", patch, project=""
        )
    print(f"median iteration {slow:.4f} s beside a silent endpoint, {without:.4f} s without W&B")
    print(f"the whole run {whole:.1f} s and {whole_without:.1f} s")
    # The processors are shared: what is meant to be excluded is waiting for the tracker.
    assert slow < 2 * without + 0.05
    assert whole < whole_without + 90
