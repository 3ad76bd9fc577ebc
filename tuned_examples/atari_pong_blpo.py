"""BLPO on Atari's Pong: ``python tuned_examples/atari_pong_blpo.py --help``; settings in blpo_rllib/tasks.py."""

from blpo_rllib.experiments.command_line import run_task

if __name__ == "__main__":
    run_task("atari_pong")
