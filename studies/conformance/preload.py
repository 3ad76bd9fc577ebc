"""What the processes of scripts would all import: they are forked from one that has."""

# ruff: noqa: F401
import ray.rllib.algorithms.ppo
import ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module
import ray.rllib.algorithms.ppo.torch.ppo_torch_learner
import ray.rllib.connectors.learner
import ray.rllib.connectors.module_to_env
import ray.rllib.env.multi_agent_env_runner
import ray.rllib.env.single_agent_env_runner
import ray.rllib.examples.utils
import ray.tune
import torch
