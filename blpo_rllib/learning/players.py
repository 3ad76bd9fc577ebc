"""An RLModule as the two players of the bilevel game: which parameters, values and distributions are whose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchDiagGaussian
from ray.rllib.core.models.base import ENCODER_OUT
from ray.rllib.core.models.torch.encoder import TorchCNNEncoder, TorchMLPEncoder
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead, TorchMLPHead
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.utils.spaces.space_utils import get_dummy_batch_for_space
from torch import Tensor, nn

from blpo_rllib.core.convolutions import ConvolutionalCritic
from blpo_rllib.core.mlp import MLP, MLPActorPass
from blpo_rllib.core.mlp_native import critic_pass, forward_pass
from blpo_rllib.core.native import Kernels
from blpo_rllib.core.networks import ActorPass, AutogradActorPass, AutogradCriticPass, Coordinates, CriticPass
from blpo_rllib.core.players import Players
from blpo_rllib.core.policy_heads import AutogradTerms, CategoricalTerms, GaussianTerms, PolicyHead
from blpo_rllib.learning.recurrence import SlotwiseModule, recurrent_observation, sequences, slotwise
from blpo_rllib.learning.rl_module import BLPOTorchRLModule, unit_interval
from blpo_rllib.rllib_private import training_pass

# Stand for an observation where frozen networks have been applied to it; see `RLModulePlayers.prepared`.
ACTOR_INPUT, CRITIC_INPUT = "actor_input", "critic_input"

_HEADS = (TorchMLPHead, TorchFreeLogStdMLPHead)


class SharedParametersError(ValueError):
    """Actor and critic have parameters in common."""


class RLModulePlayers(Players):
    """An RLModule as the two players of the bilevel game.

    A parameter is the critic's if V depends on it and the actor's if the action distribution does, unless it is frozen
    (``requires_grad=False``) as these players are made.

    Args:
        module: A torch RLModule with a value function and nothing shared between it and the policy. If it is recurrent,
            its observations are :func:`~blpo_rllib.learning.recurrence.recurrent_observation`.
        module_id: Its name, for error messages.
        kernels: Compiled functions, used for perceptrons on a CPU in float32 or float64.
        log_std_lr_factor: The learning rate of a state-independent log-std in units of the actor's.

    Raises:
        ValueError: If the module lacks a value function.
        SharedParametersError: If the players share parameters.
    """

    def __init__(self, module: Any, module_id: str, kernels: Kernels | None = None, log_std_lr_factor: float = 1.0):
        check_module_class(type(module), module_id)
        self._module, self._kernels, self.recurrent = slotwise(module), kernels, module.is_stateful()
        self._distribution = module.get_train_action_dist_cls()
        self._old_distribution = module.get_exploration_action_dist_cls()
        self._values_first = _needs_values_first(self._module, blank_observation(module, 2), blank_action(module, 2))
        critic, actor = self._members(module)
        if shared := sorted(name for name in critic.keys() & actor.keys() if critic[name].requires_grad):
            raise SharedParametersError(
                f"module {module_id!r} ({type(module).__name__}) shares {len(shared)} parameters between actor and "
                f"critic ({', '.join(shared[:3])}, ...), but BLPO's leader and follower must be separate: give each an "
                "encoder of its own, or leave separate_shared_trunk=None in config.training(), which makes two copies "
                "of the module, one for each player"
            )
        # All of a player, frozen ones included: its optimizer holds them, because they may be unfrozen later.
        self.actor_members = [p for name, p in actor.items() if name not in critic]
        self.critic_members = [p for name, p in critic.items() if name not in actor]
        self._critic_mlp: MLP | None = None
        self._critic_cnn: ConvolutionalCritic | None = None
        self._actor_mlp: MLP | None = None
        self._log_std: Tensor | None = None
        # Frozen encoders under trainable perceptrons.
        self._critic_trunk: nn.Module | None = None
        self._actor_trunk: nn.Module | None = None
        self._find_networks()
        # Frozen ones belong to neither.
        self.actor_parameters, self.critic_parameters = map(_trainable, (self.actor_members, self.critic_members))
        log_std = getattr(getattr(module, "pi", None), "log_std", None)
        self.actor_rate_factors = [log_std_lr_factor if p is log_std else 1.0 for p in self.actor_parameters]
        for player, found in {"critic": self.critic_parameters, "actor": self.actor_parameters}.items():
            if not found:
                raise ValueError(
                    f"module {module_id!r} ({type(module).__name__}) has no trainable {player} parameters: unfreeze "
                    "some of them (requires_grad), or take the module out of policies_to_train"
                )

    def _members(self, module: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters that V depends on and those that the action distribution does, frozen ones included."""
        parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
        frozen = [p for p in parameters.values() if not p.requires_grad]
        obs, actions = blank_observation(module, 2), blank_action(module, 2)
        try:
            for p in frozen:
                p.requires_grad_(True)
            critic = _depends_on(self._module.compute_values(batch_of(obs)), parameters)
            actor = _depends_on(self.forward_train(batch_of(obs, actions))[Columns.ACTION_DIST_INPUTS], parameters)
        finally:
            for p in frozen:
                p.requires_grad_(False)
        return critic, actor

    def forward_train(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The module's training pass; ``compute_values`` runs first where the pass needs what that adds."""
        if self._values_first:
            with torch.no_grad():
                self._module.compute_values(batch)
        return self._module.forward_train(batch)

    @property
    def replayable(self) -> bool:  # type: ignore[override]
        return self._critic_mlp is not None and self._actor_mlp is not None

    def _find_networks(self) -> None:
        """Recognises the networks of RLlib's default PPO module whose derivatives are then taken by hand."""
        cls, encoder = type(self._module), getattr(self._module, "encoder", None)
        default_values = getattr(cls, "compute_values", None) is DefaultPPOTorchRLModule.compute_values
        mlp = perceptron(getattr(encoder, "critic_encoder", None), self._module.vf) if default_values else None
        if mlp is not None and _same(mlp.parameters, self.critic_members):
            self.critic_members = mlp.parameters
            self._critic_mlp = mlp if _all_trainable(self.critic_members) else None
        cnn = convolutional(getattr(encoder, "critic_encoder", None), self._module.vf) if default_values else None
        if cnn is not None and _same(cnn.parameters, self.critic_members):
            self.critic_members = cnn.parameters
            self._critic_cnn = cnn if _all_trainable(self.critic_members) else None
        if default_values:
            trunk, mlp = frozen_trunk(encoder, "critic_encoder"), head_perceptron(self._module.vf)
            if trunk is not None and mlp is not None and _same(mlp.parameters, _trainable(self.critic_members)):
                self._critic_trunk, self._critic_mlp = trunk, mlp
                self.critic_members = _frozen(self.critic_members) + mlp.parameters
        default_policy = training_pass(cls) in map(training_pass, (BLPOTorchRLModule, DefaultPPOTorchRLModule))
        if not default_policy:
            return
        log_std = getattr(self._module.pi, "log_std", None)
        mlp = perceptron(getattr(encoder, "actor_encoder", None), self._module.pi)
        if mlp is not None:
            found = mlp.parameters + ([] if log_std is None else [log_std])
            if _same(found, self.actor_members):
                self.actor_members = found
                self._take_actor_mlp(mlp if _all_trainable(found) else None)
        trunk, mlp = frozen_trunk(encoder, "actor_encoder"), head_perceptron(self._module.pi)
        if trunk is not None and mlp is not None:
            found = mlp.parameters + ([] if log_std is None else [log_std])
            if _same(found, _trainable(self.actor_members)):
                self._actor_trunk = trunk
                self.actor_members = _frozen(self.actor_members) + found
                self._take_actor_mlp(mlp)

    def _take_actor_mlp(self, mlp: MLP | None) -> None:
        self._log_std_clip = _log_std_clip(self._module.pi)
        if mlp is not None:
            self._actor_mlp, self._log_std = mlp, getattr(self._module.pi, "log_std", None)

    @torch.no_grad()
    def prepared(self, obs: Any) -> Any:
        """What stands for observations [n, ...] while frozen encoders stay as they are: what these make of them."""
        if self._critic_trunk is None and self._actor_trunk is None:
            return obs
        if self._critic_trunk is self._actor_trunk:
            return {CRITIC_INPUT: _apply(self._critic_trunk, obs)}
        return {CRITIC_INPUT: _apply(self._critic_trunk, obs), ACTOR_INPUT: _apply(self._actor_trunk, obs)}

    def _input(self, player: str, trunk: nn.Module | None, obs: Any) -> Any:
        """What a player's trainable networks take."""
        if isinstance(obs, dict) and CRITIC_INPUT in obs:
            return obs.get(player, obs[CRITIC_INPUT])
        with torch.no_grad():
            return _apply(trunk, obs)

    def coordinates(self, indices: np.ndarray) -> Coordinates:
        network = self._critic_mlp or self._critic_cnn
        return super().coordinates(indices) if network is None else network.coordinates(indices)

    def critic(self, obs: Any) -> CriticPass:
        obs = self._input(CRITIC_INPUT, self._critic_trunk, obs)
        if self._critic_mlp is not None:
            return critic_pass(self._critic_mlp, obs, self._kernels)
        if self._critic_cnn is None:
            return self._automatic_critic(obs)
        images = unit_interval(obs, self.critic_parameters[0].dtype)
        return self._critic_cnn.forward(images, lambda: self._automatic_critic(obs))

    def _automatic_critic(self, obs: Any) -> AutogradCriticPass:
        values = self._module.compute_values(batch_of(obs))
        return AutogradCriticPass(values, self.critic_parameters, batched=isinstance(self._module, SlotwiseModule))

    def are_current(self) -> bool:
        """Whether the same parameters are trainable as when these players were made."""
        trainable = _trainable([*self.actor_members, *self.critic_members])
        return _same(trainable, [*self.actor_parameters, *self.critic_parameters])

    def actor(self, obs: Any, actions: Any, old_dist_inputs: Tensor | None) -> ActorPass:
        obs = self._input(ACTOR_INPUT, self._actor_trunk, obs)
        if self._actor_mlp is None:
            inputs = self.forward_train(batch_of(obs, actions))[Columns.ACTION_DIST_INPUTS]
            terms = self._terms(inputs, actions, old_dist_inputs)
            return AutogradActorPass(*terms, self.actor_parameters)
        head = self._policy_head(actions, old_dist_inputs)
        return MLPActorPass(forward_pass(self._actor_mlp, obs, self._kernels), self._log_std, head)

    def _policy_head(self, actions: Any, old_dist_inputs: Tensor | None) -> PolicyHead:
        """In closed form for the usual distributions, unless the KL divergence is asked for too."""
        if old_dist_inputs is None and self._distribution is TorchCategorical:
            return lambda logits, _: CategoricalTerms.at(actions, logits)
        if old_dist_inputs is None and self._distribution is TorchDiagGaussian and self._log_std is not None:
            return lambda mean, log_std: GaussianTerms.at(actions, self._log_std_clip, mean, log_std)

        def terms(outputs: Tensor, log_std: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return self._terms(self._distribution_inputs(outputs, log_std), actions, old_dist_inputs)

        return lambda outputs, log_std: AutogradTerms(terms, outputs, log_std)

    def _distribution_inputs(self, outputs: Tensor, log_std: Tensor | None) -> Tensor:
        """What RLlib's policy heads make of their perceptron's outputs [n, d]: the distribution's inputs."""
        if log_std is None and not self._module.pi.clip_log_std:
            return outputs
        mean, log_std = outputs.chunk(2, -1) if log_std is None else (outputs, log_std)
        return torch.cat([mean, log_std.clamp(-self._log_std_clip, self._log_std_clip)], -1)

    def _terms(
        self, dist_inputs: Tensor, actions: Any, old_dist_inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability, entropy and KL divergence [n], as functions of the distribution's inputs."""
        distribution = self._distribution.from_logits(dist_inputs)
        kl = None
        if old_dist_inputs is not None:
            kl = self._old_distribution.from_logits(old_dist_inputs).kl(distribution)
        return distribution.logp(actions), distribution.entropy(), kl


def check_module_class(module_class: type, module_id: str) -> None:
    """Raises ValueError unless RLModules of this class have a value function."""
    if not issubclass(module_class, ValueFunctionAPI):
        raise ValueError(
            f"module {module_id!r} ({module_class.__name__}) has no value function, which BLPO differentiates: derive "
            "it from ray.rllib.core.rl_module.apis.ValueFunctionAPI and implement compute_values(), or take the module "
            "out of policies_to_train"
        )


def _needs_values_first(module: Any, obs: Any, actions: Any) -> bool:
    """Whether the training pass gives other results where ``compute_values`` ran on the batch before, as in PPO."""
    with torch.no_grad():
        batch = batch_of(obs, actions)
        module.compute_values(batch)
        after_values = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
        try:
            alone = module.forward_train(batch_of(obs, actions))[Columns.ACTION_DIST_INPUTS]
        except Exception:
            # Whatever the module raises where it misses what it expects in the batch.
            return True
    return not torch.equal(alone, after_values)


def batch_of(obs: Any, actions: Any = None) -> dict[str, Any]:
    """A batch that a module may change, nested observations included; with actions as a training pass gets it."""
    batch = {Columns.OBS: obs if isinstance(obs, Tensor) else tree.map_structure(lambda x: x, obs)}
    return batch if actions is None else {**batch, Columns.ACTIONS: actions}


def blank_observation(module: Any, count: int) -> Any:
    """``count`` observations of the module's space, all zero, on the module's device; each a sequence of its own."""
    obs = _blank(module.observation_space, module, count)
    if not module.is_stateful():
        return obs
    initial = tree.map_structure(torch.as_tensor, module.get_initial_state())
    state_in = tree.map_structure(lambda x: torch.stack([x] * count), initial)
    place = np.zeros((count, 1), np.int64)
    parts = state_in, place[:, 0], sequences(place)[:, 0]
    return recurrent_observation(obs, *(_tensors(x, module) for x in parts))


def blank_action(module: Any, count: int) -> Any:
    """``count`` actions of the module's space, all zero, on the module's device."""
    return _blank(module.action_space, module, count)


def _blank(space: gym.Space, module: Any, count: int) -> Any:
    return _tensors(get_dummy_batch_for_space(space, count, fill_value=0), module)


def _tensors(arrays: Any, module: Any) -> Any:
    """Arrays or tensors as tensors on the module's device, floating-point numbers in its precision."""
    parameter = next(module.parameters())

    def tensor(array: np.ndarray | Tensor) -> Tensor:
        x = torch.as_tensor(array, device=parameter.device)
        return x.to(parameter.dtype) if x.is_floating_point() else x

    return tree.map_structure(tensor, arrays)


def _depends_on(output: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that ``output`` depends on."""
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name: p for (name, p), g in zip(parameters.items(), gradients, strict=True) if g is not None}


def perceptron(encoder: Any, head: Any) -> MLP | None:
    """RLlib's MLP encoder and head as one perceptron, or None if they are something else."""
    if type(encoder) is not TorchMLPEncoder or type(head) not in _HEADS:
        return None
    return MLP.of([encoder.net, head.net])


def head_perceptron(head: Any) -> MLP | None:
    """One of RLlib's heads alone, or None if it is something else."""
    return MLP.of([head.net]) if type(head) in _HEADS else None


def frozen_trunk(encoder: Any, name: str) -> nn.Module | None:
    """The part of RLlib's encoder with that name, or that of both players, if it has parameters but none is trained."""
    found = getattr(encoder, name, None) or getattr(encoder, "encoder", None)
    if found is None or type(found) not in (TorchMLPEncoder, TorchCNNEncoder):
        return None
    parameters = list(found.parameters())
    return found if parameters and not _trainable(parameters) else None


def _apply(trunk: nn.Module | None, obs: Any) -> Any:
    return obs if trunk is None else trunk(batch_of(obs))[ENCODER_OUT]


def convolutional(encoder: Any, head: Any) -> ConvolutionalCritic | None:
    """RLlib's CNN encoder under a head, or None if they are something else."""
    if type(encoder) is not TorchCNNEncoder or type(head) is not TorchMLPHead:
        return None
    return ConvolutionalCritic.of([encoder.net], MLP.of([head.net]))


def _all_trainable(parameters: list[Tensor]) -> bool:
    return all(p.requires_grad for p in parameters)


def _trainable(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.requires_grad]


def _frozen(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if not p.requires_grad]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return {id(p) for p in found} == {id(p) for p in expected}


def _log_std_clip(head: Any) -> float:
    """RLlib's heads clip the log-std to ± this."""
    return float(head.log_std_clip_param_const) if head.clip_log_std else float("inf")
