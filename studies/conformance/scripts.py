"""RLlib's example scripts that use PPO, and how BLPO takes PPO's place in each: by one line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import ray.rllib.examples

EXAMPLES = Path(ray.rllib.examples.__file__).parent

# Scripts that have "PPO" in them and are no program that trains PPO from nothing.
LEFT_OUT = {
    "multi_agent/shared_encoder_cartpole.py": "trains VPG",
    "rl_modules/migrate_modelv2_to_new_api_stack_by_policy_checkpoint.py": "loads a checkpoint of the old API stack",
}

# Beside the options that all share.
OPTIONS = {
    "envs/agents_act_in_sequence.py": ["--num-agents=2"],
    "envs/agents_act_simultaneously.py": ["--num-agents=2"],
    "envs/env_connecting_to_rllib_w_tcp_client.py": ["--use-dummy-client"],
    "multi_agent/custom_heuristic_policy.py": ["--num-agents=2"],
    "multi_agent/multi_agent_cartpole.py": ["--num-agents=2"],
    "multi_agent/multi_agent_pendulum.py": ["--num-agents=2"],
    "multi_agent/pettingzoo_independent_learning.py": ["--num-agents=2"],
    "multi_agent/pettingzoo_parameter_sharing.py": ["--num-agents=2"],
    "multi_agent/rock_paper_scissors_heuristic_vs_learned.py": ["--num-agents=2"],
    "multi_agent/rock_paper_scissors_learned_vs_learned.py": ["--num-agents=2"],
    "multi_agent/self_play_league_based_with_open_spiel.py": ["--num-episodes-human-play=0"],
    "multi_agent/self_play_with_open_spiel.py": ["--num-episodes-human-play=0"],
    "multi_agent/two_step_game_with_grouped_agents.py": ["--num-agents=2"],
    "offline_rl/cartpole_recording.py": ["--stop-timesteps=500"],
    "ray_serve/ray_serve_with_rllib.py": ["--no-render"],
    "rl_modules/pretraining_single_agent_training_multi_agent.py": ["--num-agents=2", "--stop-reward-pretraining=10"],
}

# Run once more with several agents.
WITH_AGENTS = (
    "connectors/flatten_observations_dict_space.py",
    "connectors/frame_stacking.py",
    "connectors/mean_std_filtering.py",
    "connectors/prev_actions_prev_rewards.py",
    "envs/custom_env_render_method.py",
    "rl_modules/custom_lstm_rl_module.py",
)

_IMPORT = re.compile(r"^from ray\.rllib\.algorithms\.ppo(\.ppo)? import PPOConfig$", re.M)
_FIRST_RAY_IMPORT = re.compile(r"^(?=from ray|import ray)", re.M)


@dataclass(frozen=True)
class Script:
    """One run of an example script.

    Attributes:
        path: Relative to ``ray/rllib/examples``.
        options: Command line, beside the options that all share.
    """

    path: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.path, *self.options))

    @property
    def source(self) -> str:
        return (EXAMPLES / self.path).read_text()

    @property
    def takes_algo(self) -> bool:
        """Whether the script looks its algorithm up by the name that ``--algo`` gives."""
        return "get_trainable_cls(args.algo)" in self.source

    @property
    def takes_examples_options(self) -> bool:
        return "run_rllib_example_script_experiment(" in self.source

    @property
    def needs_tune(self) -> bool:
        """Whether the script reads results that only Ray Tune gives."""
        return "results.get_best_result(" in self.source and "--num-episodes-human-play=0" not in self.options

    @property
    def change(self) -> str:
        """The line that puts BLPO in PPO's place."""
        return "`import blpo_rllib`, `--algo=BLPO`" if self.takes_algo else "the import of `PPOConfig`"

    def with_blpo(self) -> str:
        """The source with that line changed."""
        if self.takes_algo:
            return _FIRST_RAY_IMPORT.sub("import blpo_rllib\n", self.source, count=1)
        changed, count = _IMPORT.subn("from blpo_rllib import BLPOConfig as PPOConfig", self.source)
        if count != 1:
            raise ValueError(f"{self.path} imports PPOConfig in {count} lines, where one was expected")
        return changed


def scripts() -> list[Script]:
    """All that use PPO, by what their sources say."""
    found = []
    for path in sorted(EXAMPLES.rglob("*.py")):
        name, source = str(path.relative_to(EXAMPLES)), path.read_text()
        folder = name.split("/")[0]
        if folder == "_old_api_stack" or "classes" in name or "__main__" not in source or name in LEFT_OUT:
            continue
        if re.search(r"\bPPOConfig\b|args\.algo\b", source):
            found.append(Script(name, tuple(OPTIONS.get(name, ()))))
            if name in WITH_AGENTS:
                found.append(Script(name, ("--num-agents=2",)))
    return found
