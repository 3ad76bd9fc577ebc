"""Progress at the terminal, for a single run and for a sweep: a live view, or plain lines in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.progress_reporter import ProgressReporter
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from blpo_rllib.experiments.metrics import ENV_STEPS, ENV_STEPS_PER_SECOND, EPISODE_RETURN, grouped, metric_name

logger = logging.getLogger(__name__)

# The diagnostics worth a glance: column heads by metric.
DIAGNOSTICS = {
    metric_name("ihvp_relative_residual"): "IHVP residual",
    metric_name("bound_active_fraction"): "bound active",
    metric_name("mixed_grad_cosine"): "cosine",
    metric_name("entropy"): "entropy",
}
_ENDED = (Trial.TERMINATED, Trial.ERROR)


class RichReporter(ProgressReporter):
    """Steps, return, speed, time left and key diagnostics of the trials that run, and how many are left.

    Args:
        stop_timesteps: Environment steps of each trial.
        num_trials: Trials in all; None for what Tune says.
        console: Where to; None for standard output.
        seconds: Least time between two plain lines about a trial.
    """

    def __init__(
        self,
        stop_timesteps: int | None,
        num_trials: int | None = None,
        console: Console | None = None,
        seconds: float = 10.0,
    ):
        self._stop_timesteps, self._num_trials, self._seconds = stop_timesteps, num_trials, seconds
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._start = self._last = time.monotonic()
        self._announced: set[str] = set()
        # The latest of each trial: not in every iteration does an episode end.
        self._returns: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of the run's settings; a terminal does not go there.
        return {**self.__dict__, "_live": None, "_console": None}

    def setup(self, total_samples: int | None = None, **kwargs: Any) -> None:
        self._num_trials = self._num_trials or total_samples
        self._start = time.monotonic()

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        ended = {str(t) for t in trials if t.status in _ENDED}
        every = 0.5 if self._console.is_terminal else self._seconds
        return done or not ended <= self._announced or time.monotonic() - self._last >= every

    def report(self, trials: list[Trial], done: bool, *sys_info: str) -> None:
        """Shows the state; a failure to show it is only logged."""
        self._last = time.monotonic()
        for trial in trials:
            metrics = grouped(trial.last_result or {})
            if EPISODE_RETURN in metrics:
                self._returns[str(trial)] = metrics[EPISODE_RETURN]
        try:
            if self._console.is_terminal:
                self._show(trials, done)
            else:
                self._print(trials, done)
        except Exception:
            logger.exception("progress could not be shown; training goes on")

    def _show(self, trials: list[Trial], done: bool) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(self._view(trials), refresh=True)
        if done:
            self._live.stop()
            self._live = None

    def _print(self, trials: list[Trial], done: bool) -> None:
        for trial in trials:
            if trial.status == Trial.RUNNING and trial.last_result:
                self._line(f"{trial}: {self._steps_text(trial)}, {self._numbers_text(trial)}")
            elif trial.status in _ENDED and str(trial) not in self._announced:
                self._announced.add(str(trial))
                how = "failed" if trial.status == Trial.ERROR else "ended"
                self._line(f"{trial}: {how} at {self._steps_text(trial)}, {self._numbers_text(trial)}")
        if (self._num_trials or 1) > 1 or done:
            self._line(self._overview(trials))

    def _line(self, text: str) -> None:
        # One line whatever the width: log files are searched by line.
        self._console.print(text, soft_wrap=True, markup=False)

    def _view(self, trials: list[Trial]) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        table.add_column("trial", no_wrap=True)
        table.add_column("steps", min_width=16)
        for head in ("return", "steps/s", "left", *DIAGNOSTICS.values()):
            table.add_column(head, justify="right")
        for trial in trials:
            if trial.status == Trial.RUNNING:
                metrics = grouped(trial.last_result or {})
                bar = ProgressBar(self._stop_timesteps or 1, metrics.get(ENV_STEPS, 0), width=16)
                table.add_row(str(trial), bar, *self._cells(trial, metrics))
        self._announced |= {str(t) for t in trials if t.status in _ENDED}
        return Group(table, Text(self._overview(trials), style="bold"))

    def _cells(self, trial: Trial, metrics: dict[str, float]) -> list[str]:
        diagnostics = [f"{metrics[name]:.3g}" if name in metrics else "–" for name in DIAGNOSTICS]
        left = self._seconds_left(trial, metrics)
        return [
            f"{self._returns[str(trial)]:.1f}" if str(trial) in self._returns else "–",
            f"{metrics.get(ENV_STEPS_PER_SECOND, 0):.0f}",
            duration(left) if left is not None else "–",
            *diagnostics,
        ]

    def _numbers_text(self, trial: Trial) -> str:
        heads = ("return", "steps/s", "left", *DIAGNOSTICS.values())
        cells = self._cells(trial, grouped(trial.last_result or {}))
        return ", ".join(f"{head} {cell}" for head, cell in zip(heads, cells, strict=True))

    def _steps_text(self, trial: Trial) -> str:
        steps = int(grouped(trial.last_result or {}).get(ENV_STEPS, 0))
        return f"{steps}/{self._stop_timesteps} steps" if self._stop_timesteps else f"{steps} steps"

    def _seconds_left(self, trial: Trial, metrics: dict[str, float]) -> float | None:
        rate, steps = metrics.get(ENV_STEPS_PER_SECOND), metrics.get(ENV_STEPS)
        if not rate or steps is None or not self._stop_timesteps:
            return None
        return max(0.0, self._stop_timesteps - steps) / rate

    def _overview(self, trials: Sequence[Trial]) -> str:
        """How many trials ended, the best of them, and the time that the others will take at the speed so far."""
        total = self._num_trials or len(trials)
        ended = [t for t in trials if t.status in _ENDED]
        running = [t for t in trials if t.status == Trial.RUNNING]
        failed = sum(t.status == Trial.ERROR for t in trials)
        elapsed = time.monotonic() - self._start
        parts = [
            f"{len(ended)}/{total} trials ended ({failed} failed), {len(running)} running, {duration(elapsed)} so far"
        ]
        done = len(ended) + sum(self._share(t) for t in running)
        if 0 < done < total:
            parts.append(f"about {duration(elapsed * (total - done) / done)} left")
        if self._returns:
            best = max(self._returns, key=self._returns.__getitem__)
            parts.append(f"best latest return {self._returns[best]:.1f} ({best})")
        return ", ".join(parts)

    def _share(self, trial: Trial) -> float:
        steps = grouped(trial.last_result or {}).get(ENV_STEPS, 0.0)
        return min(1.0, steps / self._stop_timesteps) if self._stop_timesteps else 0.0


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
