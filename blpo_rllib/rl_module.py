"""BLPO's default networks: RLlib's PPO module with the reference's initialisation and an actor-only training pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ENCODER_OUT, Model
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.utils.annotations import override
from torch import Tensor, nn

from blpo_rllib.core.update import Players, PolicyTerms

# The published networks: separate 64-64 tanh actor and critic, orthogonal weights, zero biases, state-independent
# log-std that starts at 0 (used for continuous actions only).
REFERENCE_MODEL_CONFIG: dict[str, Any] = {
    "vf_share_layers": False,
    "fcnet_hiddens": [64, 64],
    "fcnet_activation": "tanh",
    "fcnet_kernel_initializer": "orthogonal_",
    "fcnet_kernel_initializer_kwargs": {"gain": math.sqrt(2)},
    "fcnet_bias_initializer": "zeros_",
    "free_log_std": True,
    "policy_head_gain": 0.01,
    "value_head_gain": 1.0,
}


class BLPOCatalog(PPOCatalog):
    """PPO's catalog with orthogonal heads.

    Two entries of the model config beyond RLlib's: ``policy_head_gain`` and ``value_head_gain``, the gains of the
    heads' last layers; None leaves RLlib's initialisation.
    """

    @override(PPOCatalog)
    def build_pi_head(self, framework: str) -> Model:
        head = super().build_pi_head(framework)
        _orthogonal_last_layer(head, self._model_config_dict.get("policy_head_gain"))
        return head

    @override(PPOCatalog)
    def build_vf_head(self, framework: str) -> Model:
        head = super().build_vf_head(framework)
        _orthogonal_last_layer(head, self._model_config_dict.get("value_head_gain"))
        return head


def _orthogonal_last_layer(head: nn.Module, gain: float | None) -> None:
    if gain is None:
        return
    layer = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)


class BLPOTorchRLModule(DefaultPPOTorchRLModule):
    """RLlib's default PPO module, except that the training pass leaves the critic out where it is separate.

    ``free_log_std`` in the model config is ignored unless actions are continuous.
    """

    def __init__(self, *, action_space: gym.Space, model_config: Any, catalog_class: type | None = None, **kwargs: Any):
        if isinstance(model_config, dict) and not isinstance(action_space, gym.spaces.Box):
            model_config = {**model_config, "free_log_std": False}
        super().__init__(
            action_space=action_space, model_config=model_config, catalog_class=catalog_class or BLPOCatalog, **kwargs
        )

    @override(RLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if getattr(self.encoder, "actor_encoder", None) is None or self.is_stateful():
            return super()._forward_train(batch, **kwargs)
        return {Columns.ACTION_DIST_INPUTS: self.pi(self.encoder.actor_encoder(batch)[ENCODER_OUT])}


class RLModulePlayers(Players):
    """An RLModule as the two players of the bilevel game.

    A parameter is the critic's if V depends on it and the actor's if the action distribution does.

    Args:
        module: A torch RLModule with a value function and nothing shared between it and the policy.
        module_id: Its name, for error messages.

    Raises:
        ValueError: If the module is recurrent, lacks a value function, or shares parameters between the players.
    """

    def __init__(self, module: Any, module_id: str):
        check_module_class(type(module), module_id)
        if module.is_stateful():
            raise ValueError(
                f"module {module_id!r} ({type(module).__name__}) is recurrent, which BLPO does not support: its segments "
                "hold several episodes. Use a feed-forward module (use_lstm=False), for instance on stacked frames"
            )
        self._module = module
        self._distribution = module.get_train_action_dist_cls()
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        obs = _example_observations(module)
        critic = _depends_on(self.values(obs), parameters)
        actor = _depends_on(module.forward_train({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS], parameters)
        if shared := sorted(critic.keys() & actor.keys()):
            raise ValueError(
                f"module {module_id!r} ({type(module).__name__}) shares {len(shared)} parameters between actor and "
                f"critic ({', '.join(shared[:3])}, ...), but BLPO's leader and follower must be separate: set "
                "vf_share_layers=False in the model config"
            )
        for player, found in {"critic": critic, "actor": actor}.items():
            if not found:
                raise ValueError(f"module {module_id!r} ({type(module).__name__}) has no trainable {player} parameters")
        self.actor_parameters, self.critic_parameters = list(actor.values()), list(critic.values())

    def values(self, obs: Any) -> Tensor:
        return self._module.compute_values({Columns.OBS: obs})

    def policy(self, obs: Any, actions: Any, old_dist_inputs: Tensor | None) -> PolicyTerms:
        inputs = self._module.forward_train({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
        distribution = self._distribution.from_logits(inputs)
        kl = None
        if old_dist_inputs is not None:
            kl = self._module.get_exploration_action_dist_cls().from_logits(old_dist_inputs).kl(distribution)
        return PolicyTerms(distribution.logp(actions), distribution.entropy(), kl)


def check_module_class(module_class: type, module_id: str) -> None:
    """Raises ValueError unless RLModules of this class have a value function."""
    if not issubclass(module_class, ValueFunctionAPI):
        raise ValueError(
            f"module {module_id!r} ({module_class.__name__}) has no value function, which BLPO differentiates: derive "
            "it from ray.rllib.core.rl_module.apis.ValueFunctionAPI and implement compute_values(), or take the module "
            "out of policies_to_train"
        )


def _example_observations(module: Any) -> Any:
    """Two observations of the module's space, on the module's device."""
    space, parameter = module.observation_space, next(module.parameters())

    def tensor(*xs: Any) -> Tensor:
        x = torch.as_tensor(np.stack(xs), device=parameter.device)
        return x.to(parameter.dtype) if x.is_floating_point() else x

    return tree.map_structure(tensor, *[_zeros(space) for _ in range(2)])


def _zeros(space: gym.Space) -> Any:
    return gym.spaces.utils.unflatten(space, np.zeros(gym.spaces.utils.flatdim(space), np.float32))


def _depends_on(output: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that ``output`` depends on."""
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name: p for (name, p), g in zip(parameters.items(), gradients, strict=True) if g is not None}
