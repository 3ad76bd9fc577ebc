"""BLPO's default networks: RLlib's PPO module with the reference's initialisation and an actor-only training pass."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ACTOR, ENCODER_OUT, Model
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.utils.annotations import override
from torch import nn

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
    "initial_log_std": 0.0,
}


def adapted(model_config: dict[str, Any], action_space: gym.Space | None) -> dict[str, Any]:
    """A model config without entries that have no meaning for BLPO, or for these actions.

    Actor and critic are always separate networks, and only continuous actions have a log-std.
    """
    changes: dict[str, Any] = {"vf_share_layers": False}
    if action_space is not None and not isinstance(action_space, gym.spaces.Box):
        changes["free_log_std"] = False
    return {**model_config, **changes}


class BLPOCatalog(PPOCatalog):
    """PPO's catalog with orthogonal heads.

    Three entries of the model config beyond RLlib's: ``policy_head_gain`` and ``value_head_gain``, the gains of the
    heads' last layers, where None leaves RLlib's initialisation; and ``initial_log_std``, where a state-independent
    log-std starts.
    """

    @override(PPOCatalog)
    def build_pi_head(self, framework: str) -> Model:
        head = super().build_pi_head(framework)
        if self._model_config_dict.get("use_lstm") and isinstance(head, TorchFreeLogStdMLPHead):
            head = SequenceFreeLogStdHead(self.pi_head_config)
        _orthogonal_last_layer(head, self._model_config_dict.get("policy_head_gain"))
        if isinstance(head, TorchFreeLogStdMLPHead):
            nn.init.constant_(head.log_std, self._model_config_dict.get("initial_log_std", 0.0))
        return head

    @override(PPOCatalog)
    def build_vf_head(self, framework: str) -> Model:
        head = super().build_vf_head(framework)
        _orthogonal_last_layer(head, self._model_config_dict.get("value_head_gain"))
        return head


class SequenceFreeLogStdHead(TorchFreeLogStdMLPHead):
    """RLlib's head with a state-independent log-std, for any number of leading axes; its own takes just one."""

    @override(TorchFreeLogStdMLPHead)
    def _forward(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super()._forward(inputs.flatten(0, -2), **kwargs).view(*inputs.shape[:-1], -1)


def _orthogonal_last_layer(head: nn.Module, gain: float | None) -> None:
    if gain is None:
        return
    layer = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)


def unit_interval(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as numbers in [0, 1], bits as 0 and 1, numbers as they are."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def _take_images(encoder: nn.Module, arguments: tuple[dict[str, Any]]) -> tuple[dict[str, Any]]:
    """The encoder's arguments with images as :func:`unit_interval` makes them."""
    (batch,) = arguments
    return ({**batch, Columns.OBS: unit_interval(batch[Columns.OBS], next(encoder.parameters()).dtype)},)


class BLPOTorchRLModule(DefaultPPOTorchRLModule):
    """RLlib's default PPO module, except that the training pass leaves the critic out where it is separate.

    ``free_log_std`` in the model config is ignored unless actions are continuous. Images may be bytes or bits, which is
    what travels and is stored; the encoders' device makes numbers in [0, 1] of them.
    """

    def __init__(self, *, action_space: gym.Space, model_config: Any, catalog_class: type | None = None, **kwargs: Any):
        if isinstance(model_config, dict):
            model_config = adapted(model_config, action_space)
        super().__init__(
            action_space=action_space, model_config=model_config, catalog_class=catalog_class or BLPOCatalog, **kwargs
        )

    @override(RLModule)
    def setup(self) -> None:
        super().setup()
        for name in ("actor_encoder", "critic_encoder"):
            encoder = getattr(self.encoder, name, None)
            if encoder is not None and self.observation_space.dtype in (np.uint8, np.bool_):
                encoder.register_forward_pre_hook(_take_images)

    @override(RLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if getattr(self.encoder, "actor_encoder", None) is None:
            return super()._forward_train(batch, **kwargs)
        if self.is_stateful():
            batch = {**batch, Columns.STATE_IN: batch[Columns.STATE_IN][ACTOR]}
        return {Columns.ACTION_DIST_INPUTS: self.pi(self.encoder.actor_encoder(batch)[ENCODER_OUT])}
