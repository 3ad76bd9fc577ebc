"""The report of a sweep: one table of all trials, the ranking at the terminal, and figures over rank and damping."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from blpo_rllib.experiments.metrics import UPDATE_SECONDS, metric_name
from blpo_rllib.extras import require
from blpo_rllib.sweep.plan import AXES, DAMPING, RANK, SweepPlan
from blpo_rllib.sweep.records import FAILED, TrialFiles

pd = require("pandas", "sweep", "a sweep")
mpl = require("matplotlib", "sweep", "a sweep")
mpl.use("Agg")
plt = require("matplotlib.pyplot", "sweep", "a sweep")

logger = logging.getLogger(__name__)

RESIDUAL = metric_name("ihvp_relative_residual")
BOUND_ACTIVE = metric_name("bound_active_fraction")


def trials_table(files: TrialFiles, fidelity: dict[str, dict[str, float]]) -> Any:
    """All trials that ended, a row each, as a pandas DataFrame; the best return first."""
    measured = {name: {f"exact/{key}": value for key, value in found.items()} for name, found in fidelity.items()}
    rows = [record | measured.get(name, {}) for name, record in files.ended().items()]
    table = pd.DataFrame(rows)
    return table.sort_values("final_return", ascending=False, ignore_index=True) if "final_return" in table else table


def by_point(plan: SweepPlan, table: Any) -> Any:
    """One row per point: means over seeds, the spread of the final return, and the number of seeds; best first."""
    usable = table[(table["status"] != FAILED) & table["final_return"].notna()]
    groups = usable.groupby(list(plan.values), sort=True)
    means = groups.mean(numeric_only=True)
    means["seeds"] = groups.size()
    means["return_min"], means["return_max"] = groups["final_return"].min(), groups["final_return"].max()
    return means.reset_index().sort_values("final_return", ascending=False, ignore_index=True)


def report(
    plan: SweepPlan,
    files: TrialFiles,
    output: Path,
    fidelity: dict[str, dict[str, float]] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Prints the ranking and writes the table and the figures; a figure that fails is left out with a warning.

    Args:
        plan: The sweep.
        files: The files of its trials.
        output: Where to write.
        fidelity: What :func:`~blpo_rllib.sweep.fidelity.measure_fidelity` returned.
        console: Where to print; None for standard output.

    Returns:
        The files written.
    """
    console = console or _console()
    table = trials_table(files, fidelity or {})
    if table.empty or "final_return" not in table or table["final_return"].notna().sum() == 0:
        console.print("no trial has ended with a return yet: nothing to rank")
        return []
    written = [output / "trials.parquet", output / "trials.csv"]
    table.to_parquet(written[0])
    table.to_csv(written[1], index=False)
    points = by_point(plan, table)
    console.print(ranking(plan, points))
    _say_failures(table, console)
    for name, draw in FIGURES.items():
        path = output / "figures" / f"{name}.png"
        try:
            if _save(draw, plan, table, points, path):
                written.append(path)
        except Exception:
            logger.exception("figure %s was not drawn", path)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return written


def _console() -> Console:
    """As wide as the terminal, or, in a log file, as wide as the table."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def ranking(plan: SweepPlan, points: Any, most: int = 15) -> Table:
    """The best points, as a table for the terminal."""
    table = Table(title=f"{plan.name}: mean of the last fifth of {plan.stop_timesteps} steps")
    table.add_column("#", justify="right")
    names = list(plan.values)
    for head in (*(AXES[name].label for name in names), "return", "seeds from–to", "seeds", "minutes"):
        table.add_column(head, justify="right")
    shown = {RESIDUAL: "IHVP residual", BOUND_ACTIVE: "bound active", "exact/hypergradient_cosine": "exact cosine"}
    shown = {column: head for column, head in shown.items() if column in points}
    for head in shown.values():
        table.add_column(head, justify="right")
    for number, point in points.head(most).iterrows():
        table.add_row(
            str(number + 1),
            *(f"{point[name]:g}" for name in names),
            f"{point['final_return']:.1f}",
            f"{point['return_min']:.1f}–{point['return_max']:.1f}",
            f"{point['seeds']:.0f}",
            two_digits(point["seconds"] / 60),
            *(two_digits(point[column]) if np.isfinite(point[column]) else "–" for column in shown),
        )
    return table


def two_digits(value: float) -> str:
    """``35,000``, ``4.6``, ``0.021``: to two significant digits, and without an exponent where that is short."""
    return f"{float(f'{value:.2g}'):,g}"


def _say_failures(table: Any, console: Console) -> None:
    for _, trial in table[table["status"] == FAILED].iterrows():
        console.print(
            f"{trial['name']} failed: {trial['error']} (--resume runs it again)", soft_wrap=True, markup=False
        )


def _save(draw: Callable[..., Any], plan: SweepPlan, table: Any, points: Any, path: Path) -> bool:
    """Draws a figure into a file, unless there is nothing to show."""
    figure = draw(plan, table, points)
    if figure is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return True


def _return_figure(plan: SweepPlan, table: Any, points: Any) -> Any:
    """The return over (rank, damping), and beside it how far the seeds lie apart."""
    plane = _plane(points, table)
    spread = plane["return_max"] - plane["return_min"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    _map(left, plane, plane["final_return"], "final return, mean over seeds", "viridis", "{:.0f}".format)
    _map(right, plane, spread, "final return, best minus worst seed", "magma_r", "{:.0f}".format)
    figure.suptitle(f"BLPO on {plan.task}, {plan.stop_timesteps:,} steps")
    return figure


def _residual_figure(plan: SweepPlan, table: Any, points: Any) -> Any:
    """IHVP residual over (rank, damping), and how often the bound acts: the two reasons why a region fails."""
    if RESIDUAL not in points:
        return None
    plane = _plane(points, table)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    _map(left, plane, plane[RESIDUAL], "‖(H+ρI)x−v‖ / ‖v‖ in training", "cividis_r", two_digits, log=True)
    title = "share of minibatches where the bound acts"
    _map(right, plane, plane[BOUND_ACTIVE], title, "cividis_r", "{:.2f}".format, limits=(0.0, 1.0))
    figure.suptitle(f"BLPO on {plan.task}: how well Nyström solves its system, and how often the bound cuts the result")
    return figure


def _cosine_figure(plan: SweepPlan, table: Any, points: Any) -> Any:
    """Cosines to the exact hypergradient, at the same damping and at the least of the sweep."""
    names = ("exact/hypergradient_cosine", "exact/reference_cosine")
    if not all(name in points for name in names):
        return None
    plane = _plane(points, table)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    least = min(plan.values[DAMPING])
    _map(
        left,
        plane,
        plane[names[0]],
        "cosine to the exact hypergradient at the same damping",
        "RdBu",
        "{:.2f}".format,
        limits=(-1, 1),
    )
    _map(
        right,
        plane,
        plane[names[1]],
        f"cosine to the exact hypergradient at damping {least:g}",
        "RdBu",
        "{:.2f}".format,
        limits=(-1, 1),
    )
    figure.suptitle(f"BLPO on {plan.task}: final modules, exact solution beside Nyström's")
    return figure


def _cost_figure(plan: SweepPlan, table: Any, points: Any) -> Any:
    """Seconds per update phase, and trials' wall-clock time, against rank."""
    ended = table[table["status"] != FAILED]
    if UPDATE_SECONDS not in ended:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, values, label in (
        (left, ended[UPDATE_SECONDS] * 1e3, "update phase, ms"),
        (right, ended["seconds"] / ended["env_steps"] * 1e5 / 60, "minutes per 100,000 steps"),
    ):
        medians = values.groupby(ended[RANK]).median()
        axes.plot(medians.index, medians, "o-", color="tab:blue", label="median")
        axes.plot(ended[RANK], values, ".", color="0.35", alpha=0.6, label="trials")
        axes.set(xlabel="Nyström rank k", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"BLPO on {plan.task}: cost against rank")
    return figure


FIGURES = {
    "return": _return_figure,
    "ihvp_residual": _residual_figure,
    "exact_cosine": _cosine_figure,
    "cost": _cost_figure,
}


def _plane(points: Any, table: Any) -> Any:
    """Means over everything but rank and damping."""
    groups = points.groupby([RANK, DAMPING])
    plane = groups.mean(numeric_only=True)
    plane["return_min"], plane["return_max"] = groups["return_min"].min(), groups["return_max"].max()
    return plane.reset_index()


def _map(
    axes: Any,
    plane: Any,
    values: Any,
    title: str,
    colors: str,
    text: Callable[[float], str],
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Values over rank (across) and damping (up): cells where the points form a grid, dots elsewhere."""
    ranks, dampings = np.unique(plane[RANK]), np.unique(plane[DAMPING])
    norm = _norm(values, log, limits)
    if len(ranks) * len(dampings) <= 2 * len(plane):
        image = _cells(axes, plane, values, ranks, dampings, colors, text, norm)
    else:
        image = axes.scatter(plane[RANK], plane[DAMPING], c=values, cmap=colors, norm=norm, s=120, edgecolors="0.3")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.set(xlabel="Nyström rank k", ylabel="damping ρ", title=title)
    axes.figure.colorbar(image, ax=axes)


def _norm(values: Any, log: bool, limits: tuple[float, float] | None) -> Any:
    """The scale of the colours: ``limits``, or from the least to the largest value."""
    finite = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = limits or ((finite.min(), finite.max()) if len(finite) else (0.0, 1.0))
    if log and 0 < low < high:
        return mpl.colors.LogNorm(low, high)
    return mpl.colors.Normalize(low, high) if low < high else mpl.colors.Normalize(low - 0.5, high + 0.5)


def _cells(
    axes: Any,
    plane: Any,
    values: Any,
    ranks: Any,
    dampings: Any,
    colors: str,
    text: Callable[[float], str],
    norm: Any,
) -> Any:
    cells = np.full((len(dampings), len(ranks)), np.nan)
    cells[np.searchsorted(dampings, plane[DAMPING]), np.searchsorted(ranks, plane[RANK])] = values
    image = axes.imshow(cells, origin="lower", aspect="auto", cmap=colors, norm=norm)
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.set_yticks(range(len(dampings)), [f"{damping:g}" for damping in dampings])
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            axes.text(column, row, text(value), ha="center", va="center", color=_ink(image, value))
        else:
            axes.text(column, row, "–", ha="center", va="center", color="0.5")
    return image


def _ink(image: Any, value: float) -> str:
    """Black on light cells, white on dark ones."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
