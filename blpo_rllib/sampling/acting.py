"""From observations to actions for all environments of a vector at once, as arrays.

RLlib's env-to-module and module-to-env pipelines do the same environment by environment. Order and random numbers are
theirs, so that both ways of sampling give the same episodes.
"""

from __future__ import annotations

import math
import weakref
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
from torch import Tensor

from blpo_rllib.core.mlp import MLP
from blpo_rllib.core.mlp_native import forward_pass
from blpo_rllib.core.native import Kernels
from blpo_rllib.core.recording import Recorder
from blpo_rllib.learning.players import perceptron
from blpo_rllib.rllib_private import common_pass, exploration_pass, running_filter

# Observations [n, ...], RLlib's global timestep and a recurrent module's states [n, ...] (else None) to columns
# [n, ...]: Columns.ACTIONS among them, and Columns.STATE_OUT, which may be nested.
Actor = Callable[[np.ndarray, int, Any], dict[str, Any]]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def make_actor(
    module: TorchRLModule, device: Any, explore: bool, kernels: Kernels | None, num_envs: int, before: Any = None
) -> Actor:
    """The quickest actor for a module: recorded for RLlib's default networks on vectors.

    Args:
        module: The module.
        device: Where it is.
        explore: Whether actions are drawn.
        kernels: Compiled functions, if there are any.
        num_envs: Environments that act together.
        before: What this function returned last time, to be used again if it still fits.
    """
    if isinstance(before, _RecordedActor) and explore and before.is_of(module, num_envs):
        return before
    recorded = None if kernels is None or not explore else _RecordedActor.of(module, kernels, num_envs)
    return recorded or _ModuleActor(module, device, explore)


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


class _RecordedActor:
    """Exploring with RLlib's default networks for vectors: a perceptron with categorical or Gaussian actions.

    A vector of environments makes batches so small that dispatching an operation costs more than computing it: the
    operations are recorded once and replayed (:mod:`blpo_rllib.core.recording`). Random numbers are torch's, drawn as
    its own distributions draw them.
    """

    def __init__(self, module: TorchRLModule, mlp: MLP, kernels: Kernels, num_envs: int):
        self._module, self._num_envs = weakref.ref(module), num_envs
        head = module.pi
        log_std = getattr(head, "log_std", None)
        self._parameters = [*mlp.parameters, *([] if log_std is None else [log_std])]
        self._addresses = self._present_addresses()
        self._categorical = module.get_exploration_action_dist_cls() is TorchCategorical
        clip = float(head.log_std_clip_param_const) if head.clip_log_std else float("inf")
        draw = _draw_categorical if self._categorical else _draw_gaussian

        def act(obs: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            outputs = forward_pass(mlp, obs, kernels).output.T
            inputs = _distribution_inputs(outputs, log_std, clip, not self._categorical).contiguous()
            actions, logp = draw(inputs, noise)
            return inputs, actions, logp, logp.sum()

        size = mlp.sizes[-1] // (1 if self._categorical or log_std is not None else 2)
        obs, self._noise = torch.zeros(num_envs, mlp.sizes[0]), torch.ones(num_envs, size)
        with torch.no_grad(), Recorder(kernels, torch.float32, [obs], [*self._parameters, self._noise]) as recorder:
            outputs = act(obs, self._noise)
        self._replay = recorder.finish(outputs)
        assert self._replay.inputs[0] is not None
        self._obs = self._replay.inputs[0].numpy()
        self._inputs, self._actions, self._logp, self._total = (x.numpy() for x in self._replay.outputs)

    @classmethod
    def of(cls, module: TorchRLModule, kernels: Kernels, num_envs: int) -> _RecordedActor | None:
        """The actor of a module, or None if that is something else than a perceptron on the CPU."""
        is_default = common_pass(type(module)) is common_pass(DefaultPPOTorchRLModule) and (
            exploration_pass(type(module)) is exploration_pass(TorchRLModule)
        )
        if not is_default or module.get_exploration_action_dist_cls() not in (TorchCategorical, TorchDiagGaussian):
            return None
        if not isinstance(module.encoder, ActorCriticEncoder) or not _is_plain(module):
            return None
        mlp = perceptron(getattr(module.encoder, "actor_encoder", None), module.pi)
        return None if mlp is None else cls(module, mlp, kernels, num_envs)

    def is_of(self, module: TorchRLModule, num_envs: int) -> bool:
        """Whether it acts as this module does in so many environments."""
        same = self._module() is module and self._num_envs == num_envs
        return same and self._addresses == self._present_addresses()

    def _present_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self._parameters]

    def __call__(self, obs: np.ndarray, timestep: int, state_in: None = None) -> dict[str, Any]:
        self._obs[...] = obs
        if self._categorical:
            self._noise.exponential_()
        else:
            self._noise.normal_()
        self._replay.run()
        if self._categorical and not math.isfinite(self._total.item()):
            # It says what is wrong.
            torch.multinomial(torch.from_numpy(self._inputs).softmax(-1), 1, True)
        # Copies, because the next step overwrites them; integers as RLlib keeps them.
        actions = self._actions.astype(np.int32) if self._categorical else self._actions.copy()
        return {
            Columns.ACTION_DIST_INPUTS: self._inputs,
            Columns.ACTIONS: actions,
            Columns.ACTION_LOGP: self._logp,
        }


def _distribution_inputs(outputs: Tensor, log_std: Tensor | None, clip: float, gaussian: bool) -> Tensor:
    """What RLlib's policy heads make of their perceptron's outputs [n, .]."""
    if not gaussian or (log_std is None and math.isinf(clip)):
        return outputs
    mean, log_std = outputs.chunk(2, -1) if log_std is None else (outputs, log_std.detach().expand_as(outputs))
    return torch.cat([mean, log_std if math.isinf(clip) else log_std.clamp(-clip, clip)], -1)


def _is_plain(module: TorchRLModule) -> bool:
    """Whether all parameters are float32 on the CPU."""
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters())


def _draw_categorical(logits: Tensor, races: Tensor) -> tuple[Tensor, Tensor]:
    """Actions int64 [n] and their log-probabilities [n], given exponential numbers [n, a].

    What torch.multinomial does for a single draw: exponential races (Yellott 1977).
    """
    logp = logits.log_softmax(-1)
    actions = (logp.exp() / races).argmax(-1)
    return actions, logp.gather(-1, actions[:, None])[:, 0]


def _draw_gaussian(inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions [n, d] and their log-probabilities [n], given standard normal numbers [n, d]."""
    half = inputs.shape[1] // 2
    mean, log_std = inputs[:, :half], inputs[:, half:]
    std = log_std.exp()
    actions = mean + std * noise
    # Of the actions as they were rounded, as the learner takes them.
    deviations = (actions - mean) / std
    return actions, (-0.5 * deviations.square() - log_std - _HALF_LOG_TWO_PI).sum(-1)


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
        kernels: Compiled functions, if there are any.
    """

    def __init__(self, connector: MeanStdFilter, share: int = 1, kernels: Kernels | None = None):
        (self._stock, self._updates), self._share, self._kernels = running_filter(connector), share, kernels
        self._pending: list[np.ndarray] = []
        self._count = np.zeros(1)
        self._in = self._out = np.empty(0)
        self._normalise: Callable[[], None] | None = None

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        stock = self._stock
        if self._updates and self._kernels is not None and obs.dtype in (np.float32, np.float64):
            return self._by_kernel(obs, self._kernels)
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

    def _by_kernel(self, obs: np.ndarray, kernels: Kernels) -> np.ndarray:
        stat = self._stock.running_stats
        if self._normalise is None:
            self._in, self._out = np.empty_like(obs), np.empty_like(obs)
            switches = bool(self._stock.demean), bool(self._stock.destd), float(self._stock.clip or 0), SMALL_NUMBER
            statistics = stat.mean_array, stat.sum_sq_diff_array, self._count, float(self._share)
            dtype = torch.float32 if obs.dtype == np.float32 else torch.float64
            shape = len(obs), obs[0].size
            self._normalise = kernels.prepared("normalise", dtype, self._in, *shape, *statistics, *switches, self._out)
        self._in[...], self._count[0] = obs, stat.num_pushes
        self._normalise()
        stat.num_pushes += self._share * len(obs)
        self._pending.append(obs)
        return self._out.copy()

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
