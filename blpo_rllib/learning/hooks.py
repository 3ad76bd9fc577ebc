"""RLlib's hooks of a learner, as BLPO's update takes them: losses that a subclass adds, and directions it changes."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from torch import Tensor

from blpo_rllib.core.added_losses import AddedLosses
from blpo_rllib.core.networks import flatten, unflatten
from blpo_rllib.core.players import Minibatch
from blpo_rllib.learning.players import RLModulePlayers, batch_of

_LOSSES = "compute_leader_loss_for_module(), compute_follower_loss_for_module() or compute_loss_for_module()"

# Methods that have no place in the update, and what to override instead.
WITHOUT_MEANING = {
    "compute_losses": f"add a loss in {_LOSSES}, called for each module",
    "compute_gradients": (
        "the update takes rows and products of second derivatives, not the gradient of one loss: add a loss in "
        f"{_LOSSES}, or change directions in postprocess_gradients_for_module()"
    ),
    "postprocess_gradients": "override postprocess_gradients_for_module(), called for each player's direction",
    "apply_gradients": "each player has an Adam of its own: change directions in postprocess_gradients_for_module()",
}


class HookedLearner(Protocol):
    """What is asked of a :class:`~blpo_rllib.learning.learner.BLPOTorchLearner` here, beside the methods of losses."""

    config: Any

    def players_of(self, module_id: str) -> RLModulePlayers: ...

    def postprocess_gradients_for_module(
        self, *, module_id: str, config: Any, module_gradients_dict: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]: ...


class LearnerLosses(AddedLosses):
    """The terms that a learner's methods add to the objectives of one module.

    Args:
        learner: The learner.
        module_id: The module.
        names: Names of the methods that a subclass overrides.
    """

    def __init__(self, learner: HookedLearner, module_id: str, names: set[str]):
        self._learner, self._module_id, self._names = learner, module_id, names

    def leader(self, batch: Minibatch) -> Tensor | None:
        return self._call("compute_leader_loss_for_module", batch)

    def follower(self, batch: Minibatch) -> Tensor | None:
        return self._call("compute_follower_loss_for_module", batch)

    def both(self, batch: Minibatch) -> Tensor | None:
        return self._call("compute_loss_for_module", batch)

    def _call(self, name: str, minibatch: Minibatch) -> Tensor | None:
        if name not in self._names:
            return None
        players = self._learner.players_of(self._module_id)
        batch = _columns(minibatch, players)
        fwd_out = players.forward_train(batch)
        loss = getattr(self._learner, name)(
            module_id=self._module_id,
            config=self._learner.config.get_config_for_module(self._module_id),
            batch=batch,
            fwd_out=fwd_out,
        )
        if loss is not None and not (isinstance(loss, Tensor) and loss.dim() == 0):
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(
                f"{type(self._learner).__name__}.{name}() returned {shape} for module {self._module_id!r}: return a "
                "scalar tensor, or None for nothing to add"
            )
        return loss


def _columns(minibatch: Minibatch, players: RLModulePlayers) -> dict[str, Any]:
    """RLlib's train batch, slot by slot; the loss mask says which slots are steps."""
    segments = minibatch.segments
    with torch.no_grad():
        values = players.critic(minibatch.obs).values.view_as(segments.step)
        advantages = segments.advantage.advantages(segments.rewards, values)
    return {
        **batch_of(minibatch.obs),
        Columns.ACTIONS: minibatch.actions,
        Columns.ACTION_LOGP: segments.old_logp.flatten(),
        Columns.ACTION_DIST_INPUTS: minibatch.old_dist_inputs,
        Columns.REWARDS: segments.rewards.flatten(),
        Columns.LOSS_MASK: segments.step.flatten() > 0,
        Postprocessing.ADVANTAGES: advantages.flatten(),
        Postprocessing.VALUE_TARGETS: minibatch.targets.flatten(),
    }


def postprocessed(learner: HookedLearner, module_id: str, player: str, gradient: Tensor) -> Tensor:
    """A player's direction [n] as ``postprocess_gradients_for_module`` leaves it."""
    players = learner.players_of(module_id)
    parameters = players.actor_parameters if player == "actor" else players.critic_parameters
    # A copy, because the method may write into what it gets.
    gradients = dict(zip(parameters, unflatten(gradient.clone(), parameters), strict=True))
    found = learner.postprocess_gradients_for_module(
        module_id=module_id,
        config=learner.config.get_config_for_module(module_id),
        module_gradients_dict=gradients,
    )
    return flatten([torch.zeros_like(p) if found.get(p) is None else found[p] for p in parameters])


def overrides(learner_class: type, base: type, name: str) -> bool:
    """Whether a subclass has a method of its own under this name.

    Ray wraps all methods of a class that it makes an actor of (ray/util/tracing/tracing_helper.py,
    _inject_tracing_into_class), so that the objects differ where nothing is overridden. The wrapped functions tell.
    """
    own, inherited = (inspect.unwrap(getattr(cls, name)) for cls in (learner_class, base))
    return (own.__module__, own.__qualname__) != (inherited.__module__, inherited.__qualname__)


def check(learner_class: type, base: type) -> None:
    """Raises ValueError if a subclass overrides what has no place in the update."""
    for name, remedy in WITHOUT_MEANING.items():
        if overrides(learner_class, base, name):
            raise ValueError(f"{learner_class.__name__} overrides {name}(), which BLPO never calls: {remedy}")
