"""From observations to actions for all environments of a vector at once, as arrays.

RLlib's env-to-module and module-to-env pipelines do the same environment by environment. Order and random numbers are
theirs, so that both ways of sampling give the same episodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.module_to_env import GetActions, NormalizeAndClipActions
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchDiagGaussian
from ray.rllib.core.models.base import ActorCriticEncoder
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.numpy import SMALL_NUMBER, convert_to_numpy
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from torch import nn

from blpo_rllib.core.mlp import ACTIVATIONS, Activation
from blpo_rllib.learning.players import perceptron
from blpo_rllib.rllib_private import common_pass, exploration_pass, running_filter

# Observations [n, ...], RLlib's global timestep and a recurrent module's states [n, ...] (else None) to columns
# [n, ...]: Columns.ACTIONS among them, and Columns.STATE_OUT, which may be nested.
Actor = Callable[[np.ndarray, int, Any], dict[str, Any]]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_ACTIVATIONS: dict[Activation, Callable[[np.ndarray], np.ndarray]] = {
    ACTIVATIONS[nn.Tanh]: np.tanh,
    ACTIVATIONS[nn.ReLU]: lambda z: np.maximum(z, 0),
}


def make_actor(module: TorchRLModule, device: Any, explore: bool) -> Actor:
    """The quickest actor for a module: one in numpy for RLlib's default networks on vectors, else the module itself.

    The actor in numpy copies the module's present weights, so that a new one is due after they have changed.

    Args:
        module: The module.
        device: Where its input belongs.
        explore: Whether actions are drawn, or the most likely ones.
    """
    by_hand = _PerceptronActor.of(module) if explore else None
    return by_hand or _ModuleActor(module, device, explore)


class _ModuleActor:
    """Any module, through its forward pass and the distribution class it names."""

    def __init__(self, module: TorchRLModule, device: Any, explore: bool):
        self._module, self._device, self._explore, self._get_actions = module, device, explore, GetActions()

    def __call__(self, obs: np.ndarray, timestep: int, state_in: Any) -> dict[str, Any]:
        columns = {Columns.OBS: obs}
        if state_in is not None:
            # Recurrent modules take sequences: here of one step.
            columns = {Columns.OBS: obs[:, None], Columns.STATE_IN: state_in}
        batch = convert_to_torch_tensor(columns, device=self._device)
        with torch.no_grad():
            if self._explore:
                outputs = self._module.forward_exploration(batch, t=timestep)
            else:
                outputs = self._module.forward_inference(batch)
            # The connector looks at the first episode's type only, to tell single from multi-agent.
            outputs = self._get_actions(
                rl_module=self._module, batch=outputs, episodes=[None], explore=self._explore, shared_data={}
            )
        outputs = convert_to_numpy(outputs)
        if state_in is None:
            return outputs
        return {name: x if name == Columns.STATE_OUT else x[:, 0] for name, x in outputs.items()}


class _PerceptronActor:
    """Exploring with RLlib's default networks for vectors: a perceptron with categorical or Gaussian actions.

    A vector of environments makes batches so small that dispatching an operation costs more than computing it; numpy
    needs a third of torch's time, and takes no part in its threads' contest for the cores.
    """

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray]], activations: list[Any], head: Any, draw: Any):
        self._layers, self._activations, self._draw = layers, activations, draw
        self._clip = float(head.log_std_clip_param_const) if head.clip_log_std else None
        log_std = getattr(head, "log_std", None)
        self._log_std = None if log_std is None else self._clipped(log_std.detach().numpy())

    @classmethod
    def of(cls, module: TorchRLModule) -> _PerceptronActor | None:
        """The actor of a module, or None if that is something else than a perceptron on the CPU."""
        draws = {TorchCategorical: _draw_categorical, TorchDiagGaussian: _draw_gaussian}
        draw = draws.get(module.get_exploration_action_dist_cls())
        is_default = common_pass(type(module)) is common_pass(DefaultPPOTorchRLModule) and (
            exploration_pass(type(module)) is exploration_pass(TorchRLModule)
        )
        if draw is None or not is_default:
            return None
        if not isinstance(module.encoder, ActorCriticEncoder) or not _is_plain(module):
            return None
        mlp = perceptron(getattr(module.encoder, "actor_encoder", None), module.pi)
        if mlp is None:
            return None
        activations = [_ACTIVATIONS[activation] for activation in mlp.activations]
        return cls([_transposed(layer) for layer in mlp.layers], activations, module.pi, draw)

    def __call__(self, obs: np.ndarray, timestep: int, state_in: None = None) -> dict[str, Any]:
        hidden = obs.astype(np.float32, copy=False)
        for (weight, bias), activation in zip(self._layers, self._activations, strict=False):
            hidden = activation(hidden @ weight + bias)
        weight, bias = self._layers[-1]
        inputs = self._distribution_inputs(hidden @ weight + bias)
        actions, logp = self._draw(inputs)
        return {Columns.ACTION_DIST_INPUTS: inputs, Columns.ACTIONS: actions, Columns.ACTION_LOGP: logp}

    def _distribution_inputs(self, outputs: np.ndarray) -> np.ndarray:
        """What RLlib's policy heads make of their perceptron's outputs."""
        if self._log_std is not None:
            inputs = np.empty((len(outputs), 2 * outputs.shape[1]), outputs.dtype)
            inputs[:, : outputs.shape[1]], inputs[:, outputs.shape[1] :] = outputs, self._log_std
            return inputs
        if self._clip is None:
            return outputs
        mean, log_std = np.split(outputs, 2, -1)
        return np.concatenate([mean, self._clipped(log_std)], -1)

    def _clipped(self, log_std: np.ndarray) -> np.ndarray:
        return log_std if self._clip is None else np.clip(log_std, -self._clip, self._clip)


def _is_plain(module: TorchRLModule) -> bool:
    """Whether all parameters are float32 on the CPU."""
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters())


def _transposed(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(layer.weight.detach().numpy().T), layer.bias.detach().numpy().copy()


def _draw_categorical(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions int32 [n], as RLlib keeps them, and log-probabilities [n]; torch draws, as in its own Categorical."""
    shifted = logits - logits.max(-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / total
    if np.isfinite(total).all():
        # What torch.multinomial does for a single draw, without its checks: exponential races (Yellott 1977).
        races = torch.empty(probabilities.shape).exponential_().numpy()
        actions = (probabilities / races).argmax(-1)[:, None]
    else:
        actions = torch.multinomial(torch.from_numpy(probabilities), 1, True).numpy()
    return actions[:, 0].astype(np.int32), (np.take_along_axis(shifted, actions, -1) - np.log(total))[:, 0]


def _draw_gaussian(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions float32 [n, d] and their log-probabilities [n]; torch draws, as in its own Normal."""
    half = inputs.shape[1] // 2
    mean, log_std = inputs[:, :half], inputs[:, half:]
    std = np.exp(log_std)
    actions = torch.normal(torch.from_numpy(mean), torch.from_numpy(std)).numpy()
    return actions, (-0.5 * ((actions - mean) / std) ** 2 - log_std - _HALF_LOG_TWO_PI).sum(-1)


class Normalizer:
    """What RLlib's filter makes of observations [n, ...] that it meets one after the other.

    Each is normalised by the statistics of all before it and itself. The connector's own statistics are updated, those
    that normalise at once and those it keeps for other EnvRunners by :meth:`flush`, so that its state can be saved,
    merged and set as usual.

    Args:
        connector: RLlib's filter.
        share: Until the next merge each observation counts as this many: of R EnvRunners that each see one of R, the
            statistics then keep pace with those of all of them, as they do with a single EnvRunner. Left to their own
            observations they lag behind what the policy does, and training with them
            (docs/scaling.md, "Several EnvRunners and a filter").
    """

    def __init__(self, connector: MeanStdFilter, share: int = 1):
        (self._stock, self._updates), self._share = running_filter(connector), share
        self._pending: list[np.ndarray] = []

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        stock = self._stock
        if self._updates:
            mean, variance = push(stock.running_stats, obs, self._share)
            self._pending.append(obs)
        else:
            mean, variance = stock.running_stats.mean, stock.running_stats.var
        x = obs
        if stock.demean:
            x = x - mean
        if stock.destd:
            x = x / (np.sqrt(np.maximum(0, variance)) + SMALL_NUMBER)
        if stock.clip:
            x = np.clip(x, -stock.clip, stock.clip)
        return x.astype(obs.dtype)

    def flush(self) -> None:
        """Brings the statistics for other EnvRunners up to date."""
        if not self._pending:
            return
        obs = np.concatenate(self._pending).astype(np.float64)
        self._pending.clear()
        push(self._stock.buffer, obs)
        for stat in (self._stock.running_stats, self._stock.buffer):
            push_delta(stat, obs)


def bound_actions(connector: NormalizeAndClipActions, actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """What RLlib's connector makes of actions [n, ...]: from [-1, 1] to a box, or clipped to it."""
    if not isinstance(space, gym.spaces.Box):
        return actions
    if not connector.normalize_actions:
        return clip_action(actions, space) if connector.clip_actions else actions
    if space.dtype.kind != "f" or not space.is_bounded():
        return unsquash_action(actions, space)
    return np.clip(space.low + (actions + 1.0) * (space.high - space.low) / 2.0, space.low, space.high)


def push(stat: RunningStat, x: np.ndarray, weight: int = 1) -> tuple[np.ndarray, np.ndarray]:
    r"""Updates RLlib's running statistics by [n, ...] values, as ``stat.push`` would one by one, but for its deltas.

    Welford's recurrences for mean and sum of squared deviations, summed up: with :math:`c` values seen before, and each
    new one counted :math:`w` times,

    .. math:: m_i = m_0 + \frac{w}{c + w i} \sum_{j \le i} (x_j - m_0), \qquad
              S_i = S_0 + w \sum_{j \le i} (x_j - m_{j-1})(x_j - m_j).

    Returns:
        Mean (float64) and variance (float32, as in RLlib) after each value, both [n, ...].
    """
    before = stat.num_pushes
    counts = before + weight * np.arange(1.0, len(x) + 1).reshape(-1, *[1] * (x.ndim - 1))
    centred = x - stat.mean_array
    shift = weight * centred.cumsum(0) / counts
    previous = np.concatenate([np.zeros_like(shift[:1]), shift[:-1]])
    squares = weight * ((centred - previous) * (centred - shift)).cumsum(0)
    mean, sum_of_squares = stat.mean_array + shift, stat.sum_sq_diff_array + squares
    stat.mean_array[...], stat.sum_sq_diff_array[...] = mean[-1], sum_of_squares[-1]
    stat.num_pushes += weight * len(x)
    # A single value has no variance: RLlib calls it 0.
    variance = (sum_of_squares / np.maximum(counts - 1, 1)).astype(np.float32)
    if before == 0:
        variance[0] = 0
    return mean, variance


def push_delta(stat: RunningStat, x: np.ndarray) -> None:
    """Adds [n, ...] values to the deltas, from which RLlib merges the statistics of several EnvRunners.

    ``RunningStat.update`` takes them for mean and sum of squared deviations of the values since the last merge (Chan's
    formula), and so they are here. ``RunningStat.push`` leaves changes of the overall mean there instead, whose merge
    is not the statistics of all values (ray/rllib/utils/filter.py).
    """
    before, total = stat.num_pushes_delta, stat.num_pushes_delta + len(x)
    mean = x.mean(0)
    shift = mean - stat.mean_delta_array
    stat.sum_sq_diff_delta_array += ((x - mean) ** 2).sum(0) + shift**2 * (before * len(x) / total)
    stat.mean_delta_array += shift * (len(x) / total)
    stat.num_pushes_delta = total
