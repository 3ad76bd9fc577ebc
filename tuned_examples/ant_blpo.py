"""BLPO on Ant-v5: ``python tuned_examples/ant_blpo.py --help``; settings in blpo_rllib/tasks.py."""

from blpo_rllib.experiments.command_line import run_task

if __name__ == "__main__":
    run_task("ant")
