"""The comparison with PPO: equal terms, runs end to end and on resume, and the report's numbers computed anew."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ray.rllib.connectors.learner import GeneralAdvantageEstimation
from rliable.metrics import probability_of_improvement as rliable_probability_of_improvement
from scipy.stats import trim_mean

from blpo_rllib import BLPOConfig
from blpo_rllib.experiments import command_line
from blpo_rllib.learning.connectors import DivideRewards, RewardScale
from blpo_rllib.tasks import TASKS
from studies.comparison import compare as compare_script
from studies.comparison import contestants, report
from studies.designs import designs

ROOT = Path(__file__).parent.parent

SHARED = ("gamma", "lambda_", "clip_param", "num_epochs", "train_batch_size_per_learner", "minibatch_size")


def contestant(task, algorithm, simulator="gymnasium"):
    return contestants.contestant(task, algorithm, seed=0, steps=contestants.TASKS[task], simulator=simulator)


# Equal terms.


@pytest.mark.parametrize("task", contestants.TASKS)
def test_all_contestants_of_a_task_are_valid_and_sample_alike(task):
    for algorithm in contestants.contestants_of(task):
        config = contestant(task, algorithm, "envpool")
        config.validate()
        assert config.env_runner_cls is contestants.BatchedEnvRunner
        assert config.env == contestants.example(task, "envpool").env
        assert config.num_env_runners == config.num_learners == 0


PAIRS = [(task, "") for task in contestants.TASKS if task not in contestants.IMAGES] + [
    ("hopper", "_small"),
    ("humanoid", "_small"),
    ("hopper", "_annealed"),
]


@pytest.mark.parametrize(("task", "batches"), PAIRS)
def test_ppo_differs_from_blpo_in_the_algorithm_alone(task, batches):
    blpo, ppo = contestant(task, "blpo" + batches), contestant(task, "ppo" + batches)
    assert blpo.train_batch_size_per_learner == 2048 or not batches
    for name in (
        *SHARED,
        "num_envs_per_env_runner",
        "min_sample_timesteps_per_iteration",
        "entropy_coeff",
        "grad_clip",
    ):
        assert getattr(ppo, name) == getattr(blpo, name), name
    assert (ppo.lr, ppo.use_kl_loss) == (blpo.actor_lr, False)
    assert ppo._env_to_module_connector == contestants.example(task, "gymnasium")._env_to_module_connector or (
        type(ppo._env_to_module_connector(None, None, None)) is type(blpo._env_to_module_connector(None, None, None))
    )
    assert (ppo._learner_class is contestants.PPOWithScaledRewards) == blpo.normalize_rewards


def test_variants_differ_from_blpo_in_the_hypergradient_alone():
    blpo = contestant("walker2d", "blpo").to_dict()
    for algorithm in ("blpo_cg", "nested_ppo"):
        variant = contestant("walker2d", algorithm).to_dict()
        differing = {name for name in blpo if blpo[name] != variant[name] and not callable(blpo[name])}
        assert differing - {"evaluation_config", "set_by_user"} == {"hypergradient"}


def test_networks_and_normalisation_of_ppo_are_those_of_blpo():
    blpo, ppo = (contestant("reacher", name).build_algo() for name in ("blpo", "ppo"))
    try:
        ours, theirs = (algo.learner_group._learner for algo in (blpo, ppo))
        shapes = [{k: v.shape for k, v in x.module["default_policy"].state_dict().items()} for x in (ours, theirs)]
        assert shapes[0] == shapes[1]
        episodes = blpo.env_runner.sample(num_timesteps=1280)
        (scale,) = (c for c in ours._learner_connector.connectors if isinstance(c, RewardScale))
        scale(batch={}, episodes=episodes)
        rewards = np.concatenate([episode.get_rewards() for episode in episodes])
        # Each episode is longer by one step, whose reward is 0.
        batch = theirs._learner_connector(rl_module=theirs.module, batch={}, episodes=episodes, shared_data={})
        scaled = batch["default_policy"]["rewards"].numpy()
        np.testing.assert_allclose(scaled[scaled != 0], rewards / scale.scale("default_policy"), rtol=1e-5)
        assert scale.scale("default_policy") != 1.0
        names = [type(c) for c in theirs._learner_connector.connectors]
        assert names.index(DivideRewards) == names.index(GeneralAdvantageEstimation) - 1
    finally:
        blpo.stop()
        ppo.stop()


def statistics(runner):
    """How many observations a runner's filter has seen, and their mean."""
    (found,) = runner._env_to_module.connectors[0]._filters.values()
    return found.running_stats.num_pushes, found.running_stats.mean.copy()


def test_evaluations_start_alike_and_leave_the_statistics_of_training_alone():
    algo = contestant("inverted_double_pendulum", "ppo").build_algo()
    try:
        algo.evaluate()
        algo.env_runner.sample(num_timesteps=640)
        count, mean = statistics(algo.env_runner)
        assert count > 640
        first, second = (algo.evaluate()["env_runners"]["episode_return_mean"] for _ in range(2))
        assert first == second
        runner = algo.eval_env_runner
        for other in (algo.env_runner, runner):
            assert statistics(other)[0] == count
            np.testing.assert_array_equal(statistics(other)[1], mean)
        episodes = runner.sample_one_each(contestants.EVALUATION_SEED)
        assert len(episodes) == contestants.EVALUATION_EPISODES
        assert all(episode.is_done and episode.t_started == 0 for episode in episodes)
    finally:
        algo.stop()


# End to end.


def compare(output, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "studies.comparison.compare", "--output", output, "--steps", "1024"]
    command += ["--tasks", "cartpole", "--max-concurrent", "1", "--seeds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_runs_end_to_end_and_only_once(tmp_path):
    output = tmp_path / "compare"
    assert compare(output, "--algorithms", "blpo").returncode == 0
    first = pd.read_parquet(output / "runs.parquet")
    assert list(first["env_steps"]) == sorted(first["env_steps"])
    assert first["env_steps"].iloc[0] == 0
    assert first["env_steps"].iloc[-1] >= 1024
    assert first["evaluation_return"].notna().all()
    assert compare(output, "--algorithms", "blpo", "ppo", "--resume").returncode == 0
    both = pd.read_parquet(output / "runs.parquet")
    assert set(both["algorithm"]) == {"blpo", "ppo"}
    pd.testing.assert_frame_equal(both[both["algorithm"] == "blpo"].reset_index(drop=True), first)
    page = tmp_path / "published_batches.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.report(output, tmp_path)
    assert page.read_text().startswith(f"before\n{report.BEGIN}\nRuns of ")
    assert page.read_text().endswith(f"{report.END}\nafter\n")
    assert "| algorithm | tasks | seeds | final score |" in page.read_text()
    assert "| task | algorithm |" in page.read_text()
    assert "hopper: blpo has 0 of 1 seeds" in (output / "report.md").read_text()


def test_a_folder_takes_more_runs_but_none_of_another_kind(tmp_path):
    def take(steps=1024, simulator="envpool", resume=True, tasks=("cartpole",)):
        plan = compare_script.ComparePlan(dict.fromkeys(tasks, steps), ["blpo"], 1, simulator)
        compare_script.take_folder(plan, tmp_path, resume)

    take(resume=False)
    with pytest.raises(ValueError, match="add --resume"):
        take(resume=False)
    for other in ({"steps": 2048}, {"simulator": "gymnasium"}):
        with pytest.raises(ValueError, match="other steps or another simulator"):
            take(**other)
    take(tasks=("cartpole", "acrobot"))


def test_order_is_by_task_and_then_by_seed():
    plan = compare_script.ComparePlan({"cartpole": 1, "acrobot": 1}, ["blpo", "ppo_tuned"], 2, "envpool")
    cartpole = [f"cartpole_{name}_seed{seed}" for seed in (0, 1) for name in ("blpo", "ppo_tuned")]
    assert list(plan.trials()) == [*cartpole, "acrobot_blpo_seed0", "acrobot_blpo_seed1"]
    later = compare_script.ComparePlan({"cartpole": 1}, ["blpo"], 2, "envpool", first_seed=100)
    assert list(later.trials()) == ["cartpole_blpo_seed100", "cartpole_blpo_seed101"]


def test_learning_rates_fall_to_0_at_the_end_of_a_run_of_any_length():
    config = contestants.contestant("hopper", "ppo_strong", seed=0, steps=300_000, simulator="gymnasium")
    assert config.actor_lr == config.critic_lr == [[0, 3e-4], [300_000, 0.0]]
    config = contestants.contestant("hopper", "ppo_annealed", seed=0, steps=300_000, simulator="gymnasium")
    assert config.lr == [[0, 3e-4], [300_000, 0.0]]
    assert contestant("hopper", "blpo").actor_lr == 3e-4


# The report's numbers.


def made_up_runs(seeds, tasks=("cartpole", "hopper"), algorithms=("blpo", "ppo")):
    generator = np.random.default_rng(0)
    origin = dict.fromkeys(report.ORIGIN, "x")
    rows = [
        {
            "task": task,
            "algorithm": algorithm,
            "seed": seed,
            "env_steps": steps,
            "seconds": steps / 100,
            "cpu_seconds": steps / 100,
            **origin,
        }
        | {"evaluation_return": 10.0 * (steps > 0) * (1 + (algorithm == "blpo")) + generator.normal()}
        for task in tasks
        for algorithm in algorithms
        for seed in range(seeds[algorithm])
        for steps in range(0, 1100, 100)
    ]
    return pd.DataFrame(rows)


def curve(table, task, algorithm, seed):
    chosen = table[(table["task"] == task) & (table["algorithm"] == algorithm) & (table["seed"] == seed)]
    return chosen["evaluation_return"].to_numpy()


def test_numbers_are_what_they_are_by_hand():
    table = made_up_runs({"blpo": 6, "ppo": 5})
    runs = report.Runs(table, report.PUBLISHED_BATCHES)
    finals = {
        (task, name): np.array([curve(table, task, name, seed)[-2:].mean() for seed in range(count)])
        for task in ("cartpole", "hopper")
        for name, count in (("blpo", 6), ("ppo", 5))
    }
    areas = [np.trapezoid(curve(table, "hopper", "blpo", seed), dx=0.1) for seed in range(6)]
    np.testing.assert_allclose(runs.numbers("hopper", "blpo", report.final_return), finals["hopper", "blpo"])
    np.testing.assert_allclose(runs.numbers("hopper", "blpo", report.area), areas)
    ends = [(curve(table, "hopper", "blpo", seed).max(), curve(table, "hopper", "blpo", seed)[-1]) for seed in range(6)]
    starts = [curve(table, "hopper", name, s)[0] for name, count in (("blpo", 6), ("ppo", 5)) for s in range(count)]
    best = max(finals["hopper", "blpo"].max(), finals["hopper", "ppo"].max())
    score = (finals["hopper", "ppo"] - np.mean(starts)) / (best - np.mean(starts))
    assert runs.decline("hopper", "blpo") == pytest.approx(-np.diff(ends).mean() / (best - np.mean(starts)))
    np.testing.assert_allclose(report.matrix(runs, ["hopper"], "ppo", report.final_return)[:, 0], score)
    scores = report.matrix(runs, runs.tasks, "blpo", report.final_return)
    point, low, high = report.estimate(scores, report.iqm)
    assert scores.shape == (6, 2)
    assert point == pytest.approx(trim_mean(scores.ravel(), 0.25))
    assert low < point < high
    assert report.improvement(runs, ["hopper"], "blpo")[0] == 1.0
    assert report.improvement(runs, ["hopper"], "ppo") is None


def test_standing_of_intervals():
    table = made_up_runs({"blpo": 5, "ppo": 5})
    ours, hopper = table["algorithm"] == "blpo", table["task"] == "hopper"
    # Cartpole as made up: twice PPO's returns; hopper: PPO's own.
    theirs = table.loc[~ours & hopper, "evaluation_return"].to_numpy()
    table.loc[ours & hopper, "evaluation_return"] = theirs
    runs = report.Runs(table, report.PUBLISHED_BATCHES)
    assert report.standing(runs, ["cartpole"], "blpo", "ppo") == "above"
    assert report.standing(runs, ["hopper"], "blpo", "ppo") == "overlap"
    assert "above on cartpole; overlap on hopper; below on none" in report.standing_text(runs, "blpo", "ppo")
    swapped = table.assign(algorithm=table["algorithm"].map({"blpo": "ppo", "ppo": "blpo"}))
    assert report.standing(report.Runs(swapped, report.PUBLISHED_BATCHES), ["cartpole"], "blpo", "ppo") == "below"
    single = report.Runs(made_up_runs({"blpo": 1, "ppo": 1}), report.PUBLISHED_BATCHES)
    assert report.standing(single, ["cartpole"], "blpo", "ppo") == "overlap", "a single run has no interval"


def test_probability_of_improvement_is_rliables():
    generator = np.random.default_rng(0)
    ours, theirs = generator.integers(0, 5, (6, 3)).astype(float), generator.integers(0, 5, (4, 3)).astype(float)
    expected = rliable_probability_of_improvement(ours, theirs)
    assert report.probability_of_improvement(ours, theirs) == pytest.approx(expected)


STRONG_PAIR = ("blpo_strong", "ppo_strong")


def test_published_returns_stand_beside_those_of_the_same_task():
    runs = report.Runs(made_up_runs(dict.fromkeys(STRONG_PAIR, 2), algorithms=STRONG_PAIR), report.TUNED)
    table = report.published_table(runs).set_index("task")
    assert list(table.index) == ["cartpole", "hopper"]
    assert list(table["PPO of Tianshou"]) == ["–", "2,609"]
    assert table["blpo_strong"]["hopper"] == report.returns_text(runs, "hopper", "blpo_strong", report.final_return)
    assert table["ppo_strong"]["hopper"] == report.returns_text(runs, "hopper", "ppo_strong", report.final_return)


def test_each_part_has_its_own_page_and_its_own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPETITIONS", 50)
    names = ("blpo", "ppo", *STRONG_PAIR)
    made_up_runs(dict.fromkeys(names, 2), algorithms=names).to_parquet(tmp_path / "runs.parquet")
    readme = tmp_path / "readme.md"
    pages = [tmp_path / part.page for part in report.PARTS]
    for path in (*pages, readme):
        path.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.report(tmp_path, tmp_path, readme)
    tuned, published = (path.read_text() for path in pages)
    assert "| hopper | blpo_strong |" in tuned
    assert "| hopper | blpo |" not in tuned
    assert "| hopper | blpo |" in published
    assert "blpo_strong" not in published
    assert "**blpo_strong against ppo_strong**" in readme.read_text()
    assert "| hopper | blpo_strong |" not in readme.read_text(), "a row per task, without one per contestant"
    assert (tmp_path / "learning_curves_steps.png").exists()
    assert (tmp_path / "published_batches_learning_curves_steps.png").exists()


def test_designs_have_a_row_each_with_their_seeds():
    made = made_up_runs({"blpo_strong": 2, "strong_single_steps": 1}, algorithms=("blpo_strong", "strong_single_steps"))
    made = made.assign(**dict.fromkeys(designs.DIAGNOSTICS, made["env_steps"] / 1000))
    table = designs.design_table(made)
    assert list(table["design"]) == ["blpo_strong", "strong_single_steps"] * 2
    finals = [curve(made, "cartpole", "blpo_strong", seed)[-2:].mean() for seed in (0, 1)]
    assert table["final return (seed)"][0] == f"{finals[0]:.0f} (0), {finals[1]:.0f} (1)"
    # Steps 100 to 600 of 1000.
    assert table["approx_kl"][0] == "0.350"


def test_steps_to_reach_interpolate():
    table = pd.DataFrame({"env_steps": [0, 100, 200], "evaluation_return": [0.0, 10.0, 30.0]})
    assert report.steps_to_reach(table, 20.0) == 150.0
    assert report.steps_to_reach(table, -1.0) == 0.0
    assert report.steps_to_reach(table, 31.0) == math.inf


def test_partial_results_are_reported_bit_for_bit(tmp_path, monkeypatch):
    # Bootstrap draws are the report's time, and what is tested does not depend on their number.
    monkeypatch.setattr(report, "REPETITIONS", 50)
    table = made_up_runs({"blpo": 3, "ppo": 1, "nested_ppo": 2}, algorithms=("blpo", "ppo", "nested_ppo"))
    table = table[~((table["algorithm"] == "nested_ppo") & (table["task"] == "hopper"))]
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        table.sample(frac=1, random_state=len(texts)).to_parquet(folder / "runs.parquet")
        report.report(folder)
        texts.append((folder / "report.md").read_text())
    assert texts[0] == texts[1]
    assert "- hopper: nested_ppo has 0 of 3 seeds" in texts[0]
    assert "- hopper: ppo has 1 of 3 seeds" in texts[0]


def test_what_cannot_be_reported_says_why(tmp_path):
    with pytest.raises(ValueError, match="has no runs: run studies/comparison/compare.py"):
        report.report(tmp_path)
    with pytest.raises(ValueError, match="a page needs <!-- compare:begin -->"):
        report.between_markers("nothing here", "table")


def test_all_tuned_tasks_are_compared():
    assert set(contestants.TASKS) == {task for task in TASKS if not task.startswith("atari_")}
    assert all(isinstance(contestants.example(task, "gymnasium"), BLPOConfig) for task in contestants.TASKS)


@pytest.mark.parametrize("task", contestants.IMAGES)
def test_games_have_the_tuned_settings_and_ppos(task):
    blpo, nested, ppo = (contestant(task, name) for name in contestants.contestants_of(task))
    assert set(contestants.contestants_of(task)) <= set(contestants.NAMES)
    assert blpo.env == nested.env == ppo.env == TASKS[task].config().env
    assert (blpo.hypergradient, nested.hypergradient, ppo.hypergradient) == ("nystrom", "none", "none")
    assert blpo.actor_lr[-1] == [contestants.TASKS[task], 0.0]
    assert (ppo.get_segment_length(), ppo.num_critic_updates) == (1, 1)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.tune])
def test_examples_have_the_published_settings_as_an_option(task, monkeypatch):
    seen = []
    monkeypatch.setattr(command_line.ray, "init", lambda **_: None)
    monkeypatch.setattr(command_line.rllib_options, "configured", lambda config, args: config)
    monkeypatch.setattr(
        command_line, "run_rllib_example_script_experiment", lambda config, *_, **__: seen.append(config)
    )
    for options in ([], ["--published-batches"]):
        command_line.run_task(task, ["--no-tune", *options])
    of_batches = ("num_envs_per_env_runner", "train_batch_size_per_learner", "num_epochs", "minibatch_size")
    tuned, published = ([getattr(c, name) for name in of_batches] for c in seen)
    assert tuned == [4 if task == "swimmer" else 16, 2048, 10, 128]
    assert published == [32, 20480, 4, 640] == [getattr(BLPOConfig(), name) for name in of_batches]
    assert (seen[1].actor_lr, seen[1].critic_lr, seen[1].segment_length) == (3e-4, 1.2e-3, None)
    assert seen[1].model_config.get("initial_log_std") == 0.0
    for config in seen:
        config.validate()
