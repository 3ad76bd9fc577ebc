"""BLPO on a game of MinAtar: ``python tuned_examples/minatar_space_invaders_blpo.py --help``; settings in tasks.py."""

from blpo_rllib.experiments.command_line import run_task

if __name__ == "__main__":
    run_task("minatar_space_invaders")
