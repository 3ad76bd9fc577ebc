"""Two copies of an RLModule whose policy and value function share parameters: one for each player."""

from __future__ import annotations

import copy
from typing import Any

from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.annotations import override
from torch import Tensor

from blpo_rllib import rllib_private
from blpo_rllib.learning.rl_module import BLPOTorchRLModule

# Entries of the model config, beside those of the module that is copied.
_CLASS, _CATALOG_CLASS = "separated_module_class", "separated_catalog_class"


class SeparatePlayersModule(TorchRLModule, ValueFunctionAPI):
    """Acts by one copy of a module and takes values from another; they start alike.

    The first copy's value function and the second copy's policy are not used, belong to no player and stay as they are.
    """

    @override(RLModule)
    def setup(self) -> None:
        model_config = {k: v for k, v in self.model_config.items() if k not in (_CLASS, _CATALOG_CLASS)}
        module_class: type[RLModule] = self.model_config[_CLASS]
        self.actor = module_class(
            observation_space=self.observation_space,
            action_space=self.action_space,
            inference_only=False,
            model_config=model_config,
            catalog_class=self.model_config[_CATALOG_CLASS],
        )
        if self.actor.is_stateful():
            raise ValueError(
                f"separate_shared_trunk=True makes no copies of recurrent modules such as {module_class.__name__}: "
                "give its policy and value function an encoder each"
            )
        self.critic = copy.deepcopy(self.actor)

    @override(TorchRLModule)
    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self.actor.forward_inference(batch, **kwargs)

    @override(TorchRLModule)
    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self.actor.forward_exploration(batch, **kwargs)

    @override(TorchRLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self.actor.forward_train(batch, **kwargs)

    @override(ValueFunctionAPI)
    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        return self.critic.compute_values(batch)

    @override(TorchRLModule)
    def get_inference_action_dist_cls(self) -> Any:
        return self.actor.get_inference_action_dist_cls()

    @override(TorchRLModule)
    def get_exploration_action_dist_cls(self) -> Any:
        return self.actor.get_exploration_action_dist_cls()

    @override(TorchRLModule)
    def get_train_action_dist_cls(self) -> Any:
        return self.actor.get_train_action_dist_cls()


def separated(spec: RLModuleSpec) -> RLModuleSpec:
    """The spec of two copies of a module, in place of one's own class; BLPO's own networks are separate already."""
    module_class = spec.module_class
    is_own = module_class is None or issubclass(module_class, (BLPOTorchRLModule, SeparatePlayersModule))
    if is_own or not issubclass(module_class, ValueFunctionAPI):
        return spec
    spec.model_config = {
        **rllib_private.full_model_config(spec),
        _CLASS: module_class,
        _CATALOG_CLASS: spec.catalog_class,
    }
    spec.module_class, spec.catalog_class = SeparatePlayersModule, None
    return spec
