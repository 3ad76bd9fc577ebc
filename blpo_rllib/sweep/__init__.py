"""Sweeps over Nyström rank and damping: which trials, running them so that nothing is lost, and what came of them."""

from blpo_rllib.sweep.plan import SweepPlan
from blpo_rllib.sweep.records import TrialFiles
from blpo_rllib.sweep.report import report
from blpo_rllib.sweep.runner import run_sweep

__all__ = ["SweepPlan", "TrialFiles", "report", "run_sweep"]
