"""BLPO on LunarLander-v3: ``python tuned_examples/lunarlander_blpo.py --help``; settings in blpo_rllib/tasks.py."""

from blpo_rllib.experiments.command_line import run_task

if __name__ == "__main__":
    run_task("lunarlander")
