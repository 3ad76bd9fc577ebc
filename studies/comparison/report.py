"""Turns the runs of compare.py into a report: interquartile means, bootstrap intervals, figures and tables.

    python -m studies.comparison.report --results results/compare    # at any moment of the comparison
    python -m studies.comparison.report --pages studies/comparison --readme README.md    # the runs kept here

Reads every ``*.parquet`` in the folder, and writes ``report.md`` and figures beside them. It has two parts
(:data:`PARTS`), which compare contestants with one another: the tuned settings against PPO as it is usually set up, and
the published batches against PPO with the same ones. What is missing is said and left out. Intervals are 95 %
stratified bootstrap intervals over runs (rliable, Agarwal et al. 2021, arXiv:2108.13264) from a fixed seed: the same
runs give the same tables, bit for bit.

Numbers of a run, from its evaluations (deterministic policy, separate episodes):

final return  mean of the evaluations in the last fifth of its steps
mean return   area under the evaluations' curve, divided by the steps
decline       best evaluation less the last one, in units of the score
score         (return - start) / (best - start): 0 is the mean evaluation of the task's untrained policies, 1 the best
              final return of any run on the task in the same part
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from pandas.util import _decorators
from scipy.stats import trim_mean

from blpo_rllib.sweep.records import FINAL_SHARE, write_whole
from studies.comparison.contestants import EVALUATION_EPISODES, NAMES, STRONG, TASKS, TUNING_BUDGET, contestants_of

mpl.use("Agg")
from matplotlib import pyplot as plt


def _import_rliable() -> Any:
    """rliable's library. It needs arch < 8, which uses a decorator of pandas in the form it had before pandas 3."""
    original = _decorators.deprecate_kwarg
    if next(iter(inspect.signature(original).parameters)) == "klass":
        _decorators.deprecate_kwarg = functools.partial(original, FutureWarning)
    try:
        return importlib.import_module("rliable.library")
    except ImportError as error:
        raise ImportError('the report needs rliable: pip install "blpo_rllib[compare]"') from error
    finally:
        _decorators.deprecate_kwarg = original


rly = _import_rliable()

RESULTS = Path(__file__).parent / "results"
BOOTSTRAP_SEED = 0
REPETITIONS = 2000
GRID = 41
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
# By role within a part, whose figures are its own: BLPO blue, nested PPO green, PPO orange.
HUES = (
    "tab:blue",
    "tab:purple",
    "tab:green",
    "tab:orange",
    "navy",
    "darkgreen",
    "tab:red",
    "tab:cyan",
    "tab:pink",
    "tab:blue",
    "tab:purple",
    "tab:olive",
    "tab:green",
    "tab:orange",
    "tab:brown",
)
COLORS = dict(zip(NAMES, HUES, strict=True))

STANDINGS = {"above": "apart, the first above", "below": "apart, the first below", "overlap": "over each other"}


@dataclass(frozen=True)
class Part:
    """Contestants that are compared with one another.

    Attributes:
        page: The file that its summary goes into.
        figures: What the names of its figures begin with.
        algorithms: The contestants.
        subject: The one that others are set beside.
        baseline: The one that probabilities of improvement and steps to a return refer to.
        pairs: Those whose intervals are compared in words.
    """

    page: str
    figures: str
    algorithms: tuple[str, ...]
    subject: str
    baseline: str
    pairs: tuple[tuple[str, str], ...]


TUNED = Part(
    page="README.md",
    figures="",
    algorithms=STRONG,
    subject="blpo_strong",
    baseline="ppo_strong",
    pairs=(("blpo_strong", "ppo_strong"), ("blpo_strong", "nested_strong"), ("blpo_strong", "blpo_strong_512")),
)
PUBLISHED_BATCHES = Part(
    page="published_batches.md",
    figures="published_batches_",
    algorithms=tuple(name for name in NAMES if name not in STRONG),
    subject="blpo",
    baseline="ppo",
    pairs=(("blpo", "ppo"), ("blpo_small", "ppo_small"), ("blpo_small", "blpo"), ("blpo_annealed", "ppo_annealed")),
)
PARTS = (TUNED, PUBLISHED_BATCHES)

# PPO's returns after a million steps as others publish them, on versions 2 to 4 of the tasks: CleanRL's documentation
# (ppo_continuous_action.py, MuJoCo v4; training returns, means of 3 seeds); the benchmark of RL Baselines3 Zoo
# (benchmark.md; one run each, settings tuned per task); Tianshou (examples/mujoco/README.md at f240205; means over 10
# seeds of the best evaluation).
PUBLISHED = {
    "CleanRL": {
        "halfcheetah": 2637,
        "hopper": 2741,
        "walker2d": 2873,
        "reacher": -4.65,
        "pusher": -30.4,
        "humanoid": 583,
        "inverted_double_pendulum": 5626,
    },
    "SB3 Zoo": {"halfcheetah": 5819, "hopper": 2410, "walker2d": 3479, "ant": 1327, "swimmer": 282},
    "Tianshou": {
        "halfcheetah": 5784,
        "hopper": 2609,
        "walker2d": 3589,
        "ant": 3258,
        "swimmer": 66.7,
        "humanoid": 787,
        "reacher": -4.1,
        "inverted_double_pendulum": 9231,
    },
}

# Point, and the ends of its interval.
Estimate = tuple[float, float, float]


class Runs:
    """The evaluations of a part's runs, as numbers per run.

    Args:
        table: A row per evaluation, as compare.py gathers them. Rows of other parts are left out.
        part: One of :data:`PARTS`.
    """

    def __init__(self, table: pd.DataFrame, part: Part):
        self.part = part
        table = table[table["algorithm"].isin(part.algorithms)]
        self.table = table.sort_values(["task", "algorithm", "seed", "env_steps"], ignore_index=True)
        groups = self.table.groupby(["task", "algorithm", "seed"], sort=True)
        self._curves = dict(iter(groups))
        self.tasks = [task for task in TASKS if task in set(self.table["task"])]
        self.algorithms = [name for name in COLORS if name in set(self.table["algorithm"])]
        # Of runs of the same length the last batches may end differently.
        self._steps = {task: min(c["env_steps"].max() for c in self._of(task)) for task in self.tasks}
        self.start = {
            task: float(np.mean([c["evaluation_return"].iloc[0] for c in self._of(task)])) for task in self.tasks
        }
        self.best = {task: max(final_return(c) for c in self._of(task)) for task in self.tasks}

    def _of(self, task: str) -> list[pd.DataFrame]:
        return [curve for key, curve in self._curves.items() if key[0] == task]

    def seeds(self, task: str, algorithm: str) -> list[int]:
        """The seeds that have run."""
        return [seed for t, a, seed in self._curves if (t, a) == (task, algorithm)]

    def numbers(self, task: str, algorithm: str, number: Callable[[pd.DataFrame], float]) -> np.ndarray:
        """A number of each run, by seed."""
        return np.array([number(self._curves[task, algorithm, seed]) for seed in self.seeds(task, algorithm)])

    def curves(self, task: str, algorithm: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """The evaluations along a common axis [GRID], and at its points [runs, GRID]."""
        curves = [self._curves[task, algorithm, seed] for seed in self.seeds(task, algorithm)]
        end = self._steps[task] if axis == "env_steps" else min(curve[axis].max() for curve in curves)
        grid = np.linspace(0, end, GRID)
        return grid, np.array([np.interp(grid, curve[axis], curve["evaluation_return"]) for curve in curves])

    def score(self, task: str, value: np.ndarray) -> np.ndarray:
        """The value between that of untrained policies and the best."""
        return (value - self.start[task]) / self._scale(task)

    def _scale(self, task: str) -> float:
        return max(self.best[task] - self.start[task], 1e-9)

    def decline(self, task: str, algorithm: str) -> float:
        """Mean over the runs of :func:`decline`, in units of the score."""
        return float(self.numbers(task, algorithm, decline).mean() / self._scale(task))

    def missing(self) -> list[str]:
        """What a full comparison would have beside these runs."""
        most = max((len(self.seeds(t, a)) for t in self.tasks for a in self.algorithms), default=0)
        lines = []
        for task in TASKS:
            for algorithm in [name for name in contestants_of(task) if name in self.part.algorithms]:
                count = len(self.seeds(task, algorithm))
                if count < most:
                    lines.append(f"{task}: {algorithm} has {count} of {most} seeds")
        return lines


def final_return(curve: pd.DataFrame) -> float:
    """Mean of the evaluations in the last fifth of a run's steps."""
    last = curve["env_steps"] > (1 - FINAL_SHARE) * curve["env_steps"].max()
    return float(curve.loc[last, "evaluation_return"].mean())


def area(curve: pd.DataFrame) -> float:
    """Area under a run's evaluations, divided by its steps: the mean return on the way."""
    steps = curve["env_steps"].to_numpy(float)
    return float(np.trapezoid(curve["evaluation_return"], steps) / (steps[-1] - steps[0]))


def decline(curve: pd.DataFrame) -> float:
    """How far the last evaluation of a run is below its best one."""
    return float(curve["evaluation_return"].max() - curve["evaluation_return"].iloc[-1])


def seconds_per_100k(curve: pd.DataFrame) -> float:
    """Seconds of training for 100,000 steps."""
    return float(curve["seconds"].max() / curve["env_steps"].max() * 1e5)


def cpu_seconds_per_100k(curve: pd.DataFrame) -> float:
    """The same in seconds of processor time, which pauses of the machine do not lengthen."""
    return float(curve["cpu_seconds"].max() / curve["env_steps"].max() * 1e5)


def steps_to_reach(curve: pd.DataFrame, target: float) -> float:
    """Steps at which the evaluations, joined by straight lines, first reach the target; infinity if they do not."""
    steps, values = curve["env_steps"].to_numpy(float), curve["evaluation_return"].to_numpy(float)
    reached = np.flatnonzero(values >= target)
    if not len(reached):
        return math.inf
    i = reached[0]
    if i == 0:
        return float(steps[0])
    return float(steps[i - 1] + (steps[i] - steps[i - 1]) * (target - values[i - 1]) / (values[i] - values[i - 1]))


def iqm(scores: np.ndarray) -> float:
    """Interquartile mean over all runs and tasks."""
    return float(trim_mean(scores, 0.25, axis=None))


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """P(a run of ours is better than one of theirs), ties counted half, mean over tasks; both [runs, tasks].

    rliable's metric of this name, in one array operation: bootstraps call it thousands of times.
    """
    difference = ours[:, None] - theirs[None]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def bootstrap(scores: Any, function: Callable[..., Any]) -> Any:
    """rliable's point and interval estimates of one array [runs, tasks, ...], or of a list of them.

    Its generator is numpy's global one, seeded anew for each estimate so that none depends on which others are made.
    """
    np.random.seed(BOOTSTRAP_SEED)
    points, intervals = rly.get_interval_estimates({"": scores}, function, reps=REPETITIONS)
    return points[""], intervals[""]


def estimate(scores: Any, function: Callable[..., float]) -> Estimate:
    """A number with its interval, whose ends are NaN where there are single runs."""
    arrays = scores if isinstance(scores, list) else [scores]
    if min(map(len, arrays)) < 2:
        return function(*arrays), math.nan, math.nan
    point, interval = bootstrap(scores, lambda *arrays: np.array([function(*arrays)]))
    return float(point[0]), float(interval[0, 0]), float(interval[1, 0])


def matrix(runs: Runs, tasks: Sequence[str], algorithm: str, number: Callable[[pd.DataFrame], float]) -> np.ndarray:
    """Scores [runs, tasks] of the first seeds of each task, as many as all of the tasks have."""
    columns = [runs.score(task, runs.numbers(task, algorithm, number)) for task in tasks]
    return np.stack([column[: min(map(len, columns))] for column in columns], axis=1)


def shared_tasks(runs: Runs, algorithms: Sequence[str]) -> list[str]:
    """The tasks that all of these algorithms have runs on."""
    return [task for task in runs.tasks if all(runs.seeds(task, algorithm) for algorithm in algorithms)]


def improvement(runs: Runs, tasks: Sequence[str], algorithm: str) -> Estimate | None:
    """Probability that the algorithm's final return is above the baseline's; None without runs of both."""
    baseline = runs.part.baseline
    tasks = [task for task in tasks if runs.seeds(task, algorithm) and runs.seeds(task, baseline)]
    if algorithm == baseline or not tasks:
        return None
    scores = [matrix(runs, tasks, name, final_return) for name in (algorithm, baseline)]
    return estimate(scores, probability_of_improvement)


def overall_table(runs: Runs) -> pd.DataFrame:
    """Interquartile means of scores over the tasks that the subject and the baseline have runs on.

    An algorithm that has runs on some of them only has the subject's score on the same tasks beside its own.
    """
    subject, baseline = runs.part.subject, runs.part.baseline
    shared = shared_tasks(runs, (subject, baseline))
    rows = []
    for algorithm in runs.algorithms:
        tasks = [task for task in shared if runs.seeds(task, algorithm)]
        rows.append(
            {
                "algorithm": algorithm,
                "tasks": len(tasks),
                "seeds": min((len(runs.seeds(task, algorithm)) for task in tasks), default="–"),
                "final score": score_text(runs, tasks, algorithm, final_return),
                "mean score": score_text(runs, tasks, algorithm, area),
                f"{subject}'s there": score_text(runs, tasks, subject, area),
                f"P(better than {baseline})": interval_text(improvement(runs, tasks, algorithm), 2),
            }
        )
    return pd.DataFrame(rows)


def score_text(runs: Runs, tasks: Sequence[str], algorithm: str, number: Callable[[pd.DataFrame], float]) -> str:
    """Interquartile mean and interval of an algorithm's scores over tasks."""
    return interval_text(estimate(matrix(runs, tasks, algorithm, number), iqm), 3) if tasks else "–"


def task_table(runs: Runs) -> pd.DataFrame:
    """A row per task and algorithm: interquartile means of returns, and what they cost."""
    baseline = runs.part.baseline
    rows = []
    for task in runs.tasks:
        target = iqm(runs.numbers(task, baseline, final_return)) if runs.seeds(task, baseline) else None
        for algorithm in runs.algorithms:
            if not runs.seeds(task, algorithm):
                continue
            rows.append(
                {
                    "task": task,
                    "algorithm": algorithm,
                    "seeds": len(runs.seeds(task, algorithm)),
                    "final return": returns_text(runs, task, algorithm, final_return),
                    "mean return": returns_text(runs, task, algorithm, area),
                    "decline": f"{runs.decline(task, algorithm):.2f}",
                    f"P(better than {baseline})": interval_text(improvement(runs, [task], algorithm), 2),
                    f"steps to {baseline}'s final return": reaching_text(runs, task, algorithm, target),
                    "s per 100k steps": f"{np.median(runs.numbers(task, algorithm, seconds_per_100k)):.1f}",
                    "of CPU": f"{np.median(runs.numbers(task, algorithm, cpu_seconds_per_100k)):.1f}",
                }
            )
    return pd.DataFrame(rows)


def published_table(runs: Runs) -> pd.DataFrame:
    """A row per task: final returns of the subject and the baseline beside those of :data:`PUBLISHED`."""
    rows = []
    for task in runs.tasks:
        published = {
            f"PPO of {source}": f"{found[task]:,}" if task in found else "–" for source, found in PUBLISHED.items()
        }
        ours = {
            name: returns_text(runs, task, name, final_return) if runs.seeds(task, name) else "–"
            for name in (runs.part.subject, runs.part.baseline)
        }
        if set(ours.values()) != {"–"}:
            rows.append({"task": task, **ours, **published})
    return pd.DataFrame(rows)


def standing(runs: Runs, tasks: Sequence[str], algorithm: str, other: str) -> str:
    """Whether the interval of an algorithm's mean score lies "above" or "below" another's, or they "overlap"."""
    (_, low, high), (_, other_low, other_high) = (
        estimate(matrix(runs, tasks, name, area), iqm) for name in (algorithm, other)
    )
    # Single runs have NaN for an interval, which is neither.
    return "above" if low > other_high else "below" if high < other_low else "overlap"


def standing_text(runs: Runs, algorithm: str, other: str) -> str:
    """How an algorithm's intervals lie to another's, over all tasks that both have runs on and on each of them."""
    tasks = shared_tasks(runs, (algorithm, other))
    if not tasks:
        return ""
    by_task = {task: standing(runs, [task], algorithm, other) for task in tasks}
    found = [
        f"{word} on {', '.join(task for task in tasks if by_task[task] == word) or 'none'}"
        for word in ("above", "overlap", "below")
    ]
    return (
        f"**{algorithm} against {other}**, intervals of the mean return: over all {len(tasks)} tasks they lie "
        f"{STANDINGS[standing(runs, tasks, algorithm, other)]}; by task: {'; '.join(found)}."
    )


def standing_texts(runs: Runs) -> list[str]:
    """:func:`standing_text` of each pair that has runs on the same tasks."""
    return [text for pair in runs.part.pairs if (text := standing_text(runs, *pair))]


def returns_text(runs: Runs, task: str, algorithm: str, number: Callable[[pd.DataFrame], float]) -> str:
    """Interquartile mean and interval of a number of the runs."""
    return interval_text(estimate(runs.numbers(task, algorithm, number)[:, None], iqm), 1)


def reaching_text(runs: Runs, task: str, algorithm: str, target: float | None) -> str:
    """Median over the runs of the steps to the target, and how many reach it."""
    if target is None:
        return "–"
    steps = runs.numbers(task, algorithm, lambda curve: steps_to_reach(curve, target))
    median, reached = float(np.median(steps)), int(np.isfinite(steps).sum())
    return f"{f'{median / 1e3:.0f}k' if math.isfinite(median) else 'never'} ({reached} of {len(steps)})"


def interval_text(value: Estimate | None, digits: int) -> str:
    """``0.85 (0.80 to 0.91)``."""
    if value is None:
        return "–"
    point, low, high = (f"{x:,.{digits}f}" for x in value)
    return point if math.isnan(value[1]) else f"{point} ({low} to {high})"


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; names stand left, numbers right."""
    rule = ["---" if name in ("task", "algorithm", "design") else "---:" for name in table.columns]
    lines = [list(table.columns), rule, *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin_text(runs: Runs) -> str:
    """Dates, machines, versions and seeds of the runs."""
    values = {name: sorted(map(str, runs.table[name].dropna().unique())) for name in runs.table if name in ORIGIN}
    dates = values.pop("date")
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    seeds = ", ".join(map(str, sorted(runs.table["seed"].unique())))
    versions = ", ".join(f"{name} {' or '.join(found)}" for name, found in values.items() if name != "machine")
    machines = "; ".join(values["machine"])
    return f"Runs of {when} on {machines}, one thread each; {versions}; seeds {seeds}."


ORIGIN = ("date", "machine", "python", "torch", "ray", "envpool", "mujoco", "simulator")


def short_text(runs: Runs) -> str:
    """What README.md shows: a row per algorithm over all tasks, and one per task."""
    parts = [origin_text(runs), markdown(overall_table(runs)), *standing_texts(runs), markdown(published_table(runs))]
    return "\n\n".join(parts)


def summary_text(runs: Runs) -> str:
    """What the comparison's page shows: rows and words per algorithm, over all tasks and on each."""
    missing = runs.missing()
    parts = [
        origin_text(runs),
        f"Interquartile means over runs, 95 % stratified bootstrap intervals. Every contestant had {TUNING_BUDGET} "
        "setting per task, published or default, except `*_strong`, whose settings come from short runs of BLPO on "
        f"other seeds. Evaluations: {EVALUATION_EPISODES} episodes of the deterministic "
        "policy, beside the training.",
        "Score: 0 is the task's untrained policies, 1 the best final return of any run in this table. Decline: how far "
        "a run's last evaluation is below its best one, in units of the score, mean over runs.",
        markdown(overall_table(runs)),
        *standing_texts(runs),
        markdown(task_table(runs)),
        published_text(runs),
        f"**Missing:** {len(missing)} combinations, listed in the report." if missing else "Nothing is missing.",
    ]
    return "\n\n".join(filter(None, parts))


def published_text(runs: Runs) -> str:
    """Final returns of the tuned settings beside published ones, with what to know about them."""
    if runs.part is not TUNED:
        return ""
    return (
        "Final returns beside those that others publish for PPO after a million steps. They are no comparison of "
        "equals: versions 2 to 4 of the tasks, where CleanRL's are training returns of 3 seeds, those of RL "
        "Baselines3 Zoo single runs tuned per task, and Tianshou's the best evaluations of 10 seeds.\n\n"
        f"{markdown(published_table(runs))}"
    )


def learning_curves(runs: Runs, axis: str, label: str) -> Any:
    """Interquartile mean and interval of the evaluations along the way, a panel per task."""
    columns = min(3, len(runs.tasks))
    rows = -(-len(runs.tasks) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    for panel, task in zip(panels.flat, runs.tasks, strict=False):
        for algorithm in runs.algorithms:
            if runs.seeds(task, algorithm):
                grid, values = runs.curves(task, algorithm, axis)
                middle, interval = bootstrap(values[:, None], _iqm_along)
                panel.plot(grid, middle, color=COLORS[algorithm], label=algorithm)
                panel.fill_between(grid, *interval, color=COLORS[algorithm], alpha=0.2, linewidth=0)
        panel.set(title=task, xlabel=label, ylabel="evaluation return")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(runs.tasks) :]:
        panel.remove()
    handles = [mpl.lines.Line2D([], [], color=COLORS[name], label=name) for name in runs.algorithms]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _iqm_along(values: np.ndarray) -> np.ndarray:
    """Interquartile means over the runs, [runs, 1, points] to [points]."""
    return trim_mean(values[:, 0], 0.25, axis=0)


def performance_profiles(runs: Runs) -> Any:
    """Share of runs whose final score is above a threshold, for the algorithms that have runs on all of the tasks that
    the subject and the baseline have."""
    tasks = shared_tasks(runs, (runs.part.subject, runs.part.baseline))
    if not tasks:
        return None
    algorithms = [name for name in runs.algorithms if all(runs.seeds(task, name) for task in tasks)]
    thresholds = np.linspace(0, 1, 51)
    scores = {name: matrix(runs, tasks, name, final_return) for name in algorithms}
    np.random.seed(BOOTSTRAP_SEED)
    profiles, intervals = rly.create_performance_profile(scores, thresholds, reps=REPETITIONS)
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in algorithms:
        panel.plot(thresholds, profiles[name], color=COLORS[name], label=name)
        panel.fill_between(thresholds, *intervals[name], color=COLORS[name], alpha=0.2, linewidth=0)
    panel.set(xlabel="final score τ", ylabel="share of runs above τ", title=f"{len(tasks)} tasks: {', '.join(tasks)}")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


FIGURES: dict[str, Callable[[Runs], Any]] = {
    "learning_curves_steps": lambda runs: learning_curves(runs, "env_steps", "environment steps"),
    "learning_curves_seconds": lambda runs: learning_curves(runs, "seconds", "seconds of training"),
    "learning_curves_cpu_seconds": lambda runs: learning_curves(runs, "cpu_seconds", "processor seconds of training"),
    "performance_profiles": performance_profiles,
}


def report(folder: Path, pages: Path | None = None, readme: Path | None = None) -> list[Path]:
    """Writes the figures and ``report.md`` into the folder, each part's summary into its page, and the tuned settings'
    first tables into another file.

    Args:
        folder: The runs.
        pages: The folder of the parts' pages, whose marked parts the summaries replace.
        readme: The file whose marked part the tables of the tuned settings replace.

    Returns:
        The files written.

    Raises:
        ValueError: If there are no runs, or a file lacks the marker comments.
    """
    tables = [pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))]
    if not tables:
        raise ValueError(f"{folder} has no runs: run studies/comparison/compare.py, and copy its runs.parquet there")
    # A run that was gathered twice counts once.
    table = pd.concat(tables, ignore_index=True).drop_duplicates(["task", "algorithm", "seed", "env_steps"])
    written, texts = [], ["# BLPO against PPO"]
    for part in PARTS:
        runs = Runs(table, part)
        if not runs.tasks:
            continue
        figures = draw_all(runs, folder)
        summary = summary_text(runs)
        texts += [summary, *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in figures)]
        texts += ["## Missing", "\n".join(f"- {line}" for line in runs.missing()) or "nothing"]
        written += figures
        if pages is not None:
            written.append(fill(pages / part.page, summary))
        if readme is not None and part is TUNED:
            written.append(fill(readme, short_text(runs)))
    written.append(folder / "report.md")
    write_whole(written[-1], "\n\n".join(texts) + "\n")
    return written


def draw_all(runs: Runs, folder: Path) -> list[Path]:
    """Draws the part's figures into the folder; those that its runs have something for."""
    written = []
    for name, draw in FIGURES.items():
        figure = draw(runs)
        if figure is not None:
            written.append(folder / f"{runs.part.figures}{name}.png")
            figure.savefig(written[-1], dpi=110)
            plt.close(figure)
    return written


def fill(page: Path, text: str) -> Path:
    """Replaces the marked part of a page, and returns the page."""
    write_whole(page, between_markers(page.read_text(), text))
    return page


def between_markers(text: str, inner: str) -> str:
    """The text with what stands between the marker comments replaced.

    Raises:
        ValueError: If it lacks the markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"a page needs {BEGIN} and {END}, between which its part of the report goes")
    return f"{head}{BEGIN}\n{inner}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", type=Path, help="folder of the pages whose marked parts the summaries replace")
    parser.add_argument(
        "--readme", type=Path, help="file whose marked part the first tables of the tuned settings replace"
    )
    args = parser.parse_args()
    try:
        for path in report(args.results, args.pages, args.readme):
            print(f"wrote {path}")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
