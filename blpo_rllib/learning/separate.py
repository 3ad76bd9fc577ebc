"""Two copies of an RLModule whose policy and value function share parameters: one for each player."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ACTOR, CRITIC
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.annotations import override
from torch import Tensor

from blpo_rllib import rllib_private
from blpo_rllib.learning.players import RLModulePlayers, SharedParametersError
from blpo_rllib.learning.rl_module import BLPOTorchRLModule

logger = logging.getLogger(__name__)

# Entries of the model config, beside those of the module that is copied.
_CLASS, _CATALOG_CLASS = "separated_module_class", "separated_catalog_class"


class SeparatePlayersModule(TorchRLModule, ValueFunctionAPI):
    """Acts by one copy of a module and takes values from another; they start alike.

    The first copy's value function and the second copy's policy are not used, belong to no player and stay as they are.
    A recurrent module has two states, one for each copy, and both are recorded while sampling.
    """

    @override(RLModule)
    def setup(self) -> None:
        model_config = {k: v for k, v in self.model_config.items() if k not in (_CLASS, _CATALOG_CLASS)}
        module_class: type[RLModule] = self.model_config[_CLASS]
        self.actor, self.critic = (
            module_class(
                observation_space=self.observation_space,
                action_space=self.action_space,
                inference_only=False,
                model_config=model_config,
                catalog_class=self.model_config[_CATALOG_CLASS],
            )
            for _ in range(2)
        )
        # Not a deep copy: modules may keep tensors of their last pass, which cannot be copied.
        self.critic.load_state_dict(self.actor.state_dict())

    @override(RLModule)
    def get_initial_state(self) -> dict[str, Any]:
        if not self.actor.is_stateful():
            return {}
        return {ACTOR: self.actor.get_initial_state(), CRITIC: self.critic.get_initial_state()}

    @override(TorchRLModule)
    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._with_both_states(batch, self.actor.forward_inference(_of(ACTOR, batch), **kwargs))

    @override(TorchRLModule)
    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._with_both_states(batch, self.actor.forward_exploration(_of(ACTOR, batch), **kwargs))

    def _with_both_states(self, batch: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        """The actor's outputs, with the critic's next state beside its own."""
        if Columns.STATE_OUT not in outputs:
            return outputs
        critic = self.critic.forward_inference(_of(CRITIC, batch))
        states = {ACTOR: outputs[Columns.STATE_OUT], CRITIC: critic[Columns.STATE_OUT]}
        return {**outputs, Columns.STATE_OUT: states}

    @override(TorchRLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self.actor.forward_train(_of(ACTOR, batch), **kwargs)

    @override(ValueFunctionAPI)
    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        return self.critic.compute_values(_of(CRITIC, batch))

    @override(TorchRLModule)
    def get_inference_action_dist_cls(self) -> Any:
        return self.actor.get_inference_action_dist_cls()

    @override(TorchRLModule)
    def get_exploration_action_dist_cls(self) -> Any:
        return self.actor.get_exploration_action_dist_cls()

    @override(TorchRLModule)
    def get_train_action_dist_cls(self) -> Any:
        return self.actor.get_train_action_dist_cls()


def _of(player: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with one player's states; the same batch where there are none, since modules may change it."""
    if Columns.STATE_IN not in batch:
        return batch
    return {**batch, Columns.STATE_IN: batch[Columns.STATE_IN][player]}


def separated(spec: RLModuleSpec, wanted: bool | None) -> RLModuleSpec:
    """The spec of two copies of a module, in place of one's own class; BLPO's own networks are separate already.

    Args:
        spec: The module's.
        wanted: Whether there are to be two copies; None where policy and value function share parameters, which can
            be seen once the spec has its spaces.
    """
    module_class = spec.module_class
    is_own = module_class is None or issubclass(module_class, (BLPOTorchRLModule, SeparatePlayersModule))
    if wanted is False or is_own or not issubclass(module_class, ValueFunctionAPI):
        return spec
    if wanted is None and not _shares_parameters(spec):
        return spec
    spec.model_config = {
        **rllib_private.full_model_config(spec),
        _CLASS: module_class,
        _CATALOG_CLASS: spec.catalog_class,
    }
    spec.module_class, spec.catalog_class = SeparatePlayersModule, None
    return spec


def _shares_parameters(spec: RLModuleSpec) -> bool:
    if spec.observation_space is None or spec.action_space is None:
        return False
    alike = RLModuleSpec(
        module_class=spec.module_class,
        observation_space=spec.observation_space,
        action_space=spec.action_space,
        model_config=rllib_private.full_model_config(spec),
        catalog_class=spec.catalog_class,
    )
    # The module itself is to have the weights that it would have had.
    with torch.random.fork_rng(devices=[]):
        module = alike.build()
    try:
        RLModulePlayers(module, "probe")
    except SharedParametersError:
        return True
    except Exception:
        # Whatever else stands in the way of training is said where the learner makes its players.
        logger.debug("%s cannot be trained", module, exc_info=True)
    return False
