"""BLPO on InvertedDoublePendulum-v5: see ``--help``; settings in blpo_rllib/tasks.py."""

from blpo_rllib.experiments.command_line import run_task

if __name__ == "__main__":
    run_task("inverted_double_pendulum")
