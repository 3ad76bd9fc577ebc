"""RLlib's statistics of metrics, with a way past numpy where there is a single number.

An iteration reduces some hundred metrics three times, at the EnvRunner or learner, where they are merged and in the
result, and most hold one number: ``numpy.nanmean`` of it takes longer than all else that is done with it.
"""

from __future__ import annotations

from typing import Any

from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics.metrics_logger import DEFAULT_STATS_CLS_LOOKUP
from ray.rllib.utils.metrics.stats import EmaStats, MeanStats
from ray.rllib.utils.metrics.stats.series import SeriesStats


class QuickMeanStats(MeanStats):
    """RLlib's mean of a window; that of a single number is the number."""

    @override(SeriesStats)
    def window_reduce(self, values: Any = None) -> list[Any]:
        own = self.values if values is None else values
        return [own[0]] if len(own) == 1 and isinstance(own[0], float) else super().window_reduce(values)


class QuickEmaStats(EmaStats):
    """RLlib's exponential moving average; that of a single one is this one."""

    @override(EmaStats)
    def _quiet_nanmean(self, values: list[Any]) -> Any:
        return values[0] if len(values) == 1 and isinstance(values[0], float) else super()._quiet_nanmean(values)


# What AlgorithmConfig calls its ``stats_cls_lookup``.
QUICK_STATS = {**DEFAULT_STATS_CLS_LOOKUP, "mean": QuickMeanStats, "ema": QuickEmaStats}
