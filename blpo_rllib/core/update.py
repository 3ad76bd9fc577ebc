"""One BLPO update phase: epochs and minibatches over a batch of segments, on one device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import tree
from torch import Tensor

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.added_losses import AddedLosses
from blpo_rllib.core.advantages import Rollouts, anchored, full_advantages
from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.graphs import Graphed, GraphMaker
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.core.minibatch import (
    Counts,
    Epoch,
    MinibatchMeans,
    MinibatchMetrics,
    MinibatchResult,
    MinibatchUpdate,
    Postprocess,
    Step,
    StepMeans,
    UpdateSettings,
)
from blpo_rllib.core.native import Kernels
from blpo_rllib.core.networks import Coordinates
from blpo_rllib.core.players import Minibatch, Players, slots
from blpo_rllib.core.recording import CannotRecordError
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.replay import ReplayedUpdate
from blpo_rllib.core.segments import SegmentBatch

logger = logging.getLogger(__name__)

# In larger minibatches arithmetic takes so much longer than dispatch that a replay gains nothing for its memory.
MAX_REPLAYED_SLOTS = 1 << 14


class BilevelUpdate:
    """Trains two players on batches of segments.

    Args:
        players: Actor and critic.
        actor_optimizer: Adam of ``players.actor_parameters``.
        critic_optimizer: The same for ``players.critic_parameters``.
        curvature: Class of the follower's curvature.
        solver: The inverse-Hessian-vector product; None for nested PPO, which follows g_θ alone.
        seed: Seeds the order of the segments and the solver's coordinates; the same on all processes.
        reduction: Sums over the processes that share each minibatch.
        graphs: Records the work of a minibatch on an accelerator, to be replayed for the others; None for none.
        kernels: Compiled functions for the optimizers' steps on the CPU.
        added: Terms of the objectives besides J and L.
        postprocess: See :class:`MinibatchUpdate`.
    """

    def __init__(
        self,
        players: Players,
        actor_optimizer: torch.optim.Adam,
        critic_optimizer: torch.optim.Adam,
        curvature: type[Curvature],
        solver: IHVPSolver | None,
        seed: int | Sequence[int],
        reduction: Reduction,
        graphs: GraphMaker | None = None,
        kernels: Kernels | None = None,
        added: AddedLosses | None = None,
        postprocess: Postprocess | None = None,
    ):
        self._optimizers, self._curvature, self._solver = (actor_optimizer, critic_optimizer), curvature, solver
        self._undrawn = None if solver is None else solver.get_state()
        # Two generators: for their order, processes with unlike numbers of segments draw unlike amounts of random
        # numbers, but all must draw the same coordinates.
        order, coordinates = np.random.SeedSequence(seed).spawn(2)
        self._order_generator, self._coordinate_generator = (
            np.random.default_rng(order),
            np.random.default_rng(coordinates),
        )
        self._reduction = reduction
        self._graphs, self._kernels, self._added, self._postprocess = graphs, kernels, added, postprocess
        self.take_players(players)
        self._rate_factor = 1.0

    def take_players(self, players: Players) -> None:
        """Trains these players from now on; due where other parameters have become trainable.

        The optimizers keep the moments of all parameters, trainable or not.
        """
        actor_optimizer, critic_optimizer = self._optimizers
        self._players = players
        self._adams = (
            AdamSteps(actor_optimizer, players.actor_parameters, self._kernels, players.actor_rate_factors),
            AdamSteps(critic_optimizer, players.critic_parameters, self._kernels),
        )
        self._minibatch_update = MinibatchUpdate(
            players, *self._adams, self._curvature, self._solver, self._reduction, self._added, self._postprocess
        )
        is_plain = self._added is None and self._postprocess is None
        self._replayed: ReplayedUpdate | None = None
        if self._kernels is not None and is_plain and self._is_replayable():
            self._replayed = ReplayedUpdate(self._minibatch_update, self._adams, self._kernels)
        self._graphed: Graphed | None = None
        replayable = all(part is None or part.replayable for part in (self._curvature, self._solver))
        if self._graphs is not None and is_plain and replayable:
            self._graphed = Graphed(self._take, self._graphs, self._reduction)
        self._drawn: tuple[np.ndarray, Coordinates] | None = None

    def forget_draw(self) -> None:
        """Makes the solver draw new coordinates, due where the critic has other parameters."""
        if self._solver is not None and self._undrawn is not None:
            self._solver.set_state(self._undrawn)

    def run(
        self, batch: SegmentBatch, num_minibatches: int, settings: UpdateSettings, rollouts: Rollouts | None = None
    ) -> dict[str, float]:
        """Runs all epochs and returns the metrics by name.

        Args:
            batch: M segments, ``num_minibatches`` dividing M.
            num_minibatches: Minibatches per epoch.
            settings: Numbers of epochs and nested steps, and the objectives.
            rollouts: What the segments were cut from, for advantages over whole rollouts; None for advantages that end
                with the segment.

        Returns:
            The fields of :class:`StepMeans` and :class:`MinibatchMeans`, averaged over minibatches; those of
            :class:`Counts`, added up over them; ``vf_explained_var``, the share of the value targets' variance that V
            explains; ``vf_loss``, the same as ``vf_loss_after_nesting``; and, with a solver, the relative residual
            ``ihvp_relative_residual`` and the ``damping`` of the last inverse-Hessian-vector product.
        """
        actor_adam, critic_adam = self._adams
        actor_adam.refresh(1.0 if settings.target_kl is None else self._rate_factor)
        critic_adam.refresh()
        if self._graphed is not None:
            self._graphed.start_phase()
        size = len(batch) // num_minibatches
        if self._added is None:
            # Added losses look at observations.
            batch = self._prepared(batch, size)
        values = self._values(batch, size, rollouts)
        adv = full_advantages(batch, values, rollouts)
        all_targets, shared, num_updates = values + adv, None, 0
        segments, targets = batch, all_targets
        lengths = batch.step.sum(1)
        sums: MinibatchMetrics | None = None
        for epoch in range(settings.num_epochs):
            if settings.advantages.is_anchored_at(epoch, rollouts is not None):
                if epoch:
                    values = self._values(batch, size, rollouts)
                    adv = full_advantages(batch, values, rollouts)
                segments = anchored(batch, values, adv, settings.advantages, self._reduction)
                if self._solver is None and settings.advantages.is_kept and not self._players.recurrent:
                    segments, targets = segments.without_bootstrap(all_targets)
            if self._solver is not None and settings.correction.sample == "batch":
                sample = Minibatch.of(segments, targets, self._reduction.sum(segments.step.sum()))
                drawn = next(iter(self._draw_coordinates(1)), None)
                shared = self._minibatch_update.hypergradient(sample, drawn, settings)
            coordinates = self._draw_coordinates(0 if shared is not None else num_minibatches)
            minibatches = Epoch(segments, targets, *self._order(lengths, size), coordinates, settings, shared)
            result = self._run(minibatches)
            sums = result.metrics if sums is None else sums + result.metrics
            num_updates += num_minibatches
            if settings.max_kl is not None and self._kl(result.metrics) > settings.max_kl * num_minibatches:
                break
        assert sums is not None
        target_moments = _moments(all_targets.nan_to_num(0.0, 0.0, 0.0), batch.step)
        metrics = self._metrics(sums, num_updates, target_moments)
        metrics["epochs"] = num_updates / num_minibatches
        if settings.target_kl is not None:
            metrics["actor_rate_factor"] = self._rate_factor
            self._rate_factor = next_rate_factor(self._rate_factor, metrics["approx_kl"], settings.target_kl)
        if self._solver is not None:
            # On the last sample only, for the product it takes.
            residual = None if self._replayed is None else self._replayed.relative_residual(result)
            if residual is None:
                last = sample if shared is not None else minibatches.step(-1).minibatch()
                residual = self._minibatch_update.relative_residual(last, result)
            metrics["ihvp_relative_residual"] = float(residual)
            metrics["damping"] = float(self._solver.damping)
        return metrics

    def get_state(self) -> dict[str, Any]:
        """What the next :meth:`run` depends on besides weights and optimizers: generators and the solver's state."""
        solver = None if self._solver is None else self._solver.get_state()
        return {
            "order_generator": self._order_generator.bit_generator.state,
            "column_generator": self._coordinate_generator.bit_generator.state,
            "solver": solver,
            "rate_factor": self._rate_factor,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`get_state` returned."""
        self._order_generator.bit_generator.state = state["order_generator"]
        self._coordinate_generator.bit_generator.state = state["column_generator"]
        # Absent from checkpoints of before there was one.
        self._rate_factor = state.get("rate_factor", 1.0)
        if self._solver is not None and state["solver"] is not None:
            self._solver.set_state(state["solver"])

    def _draw_coordinates(self, count: int) -> list[Coordinates]:
        """The coordinates that the solver picks for each of the next samples, if any, copied to the device together."""
        if self._solver is None or not count:
            return []
        size = sum(p.numel() for p in self._players.critic_parameters)
        drawn = [self._solver.draw(size, self._coordinate_generator) for _ in range(count)]
        chosen = [indices for indices in drawn if indices is not None]
        if len(chosen) < count:
            return []
        if all(indices is chosen[0] for indices in chosen):
            if self._drawn is None or self._drawn[0] is not chosen[0]:
                self._drawn = chosen[0], self._players.coordinates(chosen[0])
            return [self._drawn[1]] * count
        everything, ends = self._players.coordinates(np.concatenate(chosen)), np.cumsum([len(x) for x in chosen])
        return [everything[end - len(indices) : end] for indices, end in zip(chosen, ends, strict=True)]

    def _prepared(self, batch: SegmentBatch, size: int) -> SegmentBatch:
        """The batch as the players' passes take it, made from ``size`` segments at a time."""
        parts = [slots(part.obs) for part in batch.split(size)]
        prepared = [self._players.prepared(part) for part in parts]
        if prepared[0] is parts[0]:
            return batch
        shape = batch.step.shape
        return replace(batch, obs=tree.map_structure(lambda *x: torch.cat(x).unflatten(0, shape), *prepared))

    def _values(self, batch: SegmentBatch, size: int, rollouts: Rollouts | None) -> Tensor:
        """V under the present critic, [M, S]."""
        if self._players.replayable:
            # Perceptrons: dispatch costs more than memory.
            size = max(size, MAX_REPLAYED_SLOTS // batch.step.shape[1])
        with torch.no_grad():
            if rollouts is None or self._players.recurrent:
                parts = [slots(part.obs) for part in batch.split(size)]
                return torch.cat([self._players.critic(part).values for part in parts]).view_as(batch.step)
            # Where segments are cut, an observation is in two slots.
            every, parts = slots(batch.obs), rollouts.slot.split(size * batch.step.shape[1])
            values = [self._players.critic(tree.map_structure(lambda x, s=s: x[s], every)).values for s in parts]
            return torch.cat(values)[rollouts.index]

    def _order(self, lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """A random order: the segments of each minibatch, int64 [., size], and its steps on all processes.

        Args:
            lengths: The steps of each segment, [M].
            size: Segments per minibatch.
        """
        order = torch.as_tensor(self._order_generator.permutation(len(lengths)), device=lengths.device).view(-1, size)
        # A minibatch may be blank on one process, but is not on all.
        return order, self._reduction.sum(lengths[order].sum(1))

    def _run(self, epoch: Epoch) -> MinibatchResult:
        """Updates the players by the minibatches of an epoch; what the last reports, with the sum of all metrics."""
        if self._replayed is not None and epoch.rows.shape[1] * epoch.batch.step.shape[1] <= MAX_REPLAYED_SLOTS:
            try:
                return self._replayed(epoch)
            except CannotRecordError as error:
                logger.info("the update dispatches its operations one by one (slower), because %s", error)
                self._replayed = None
        results = map(self._graphed or self._take, map(epoch.step, range(len(epoch))))
        result: MinibatchResult = next(results)
        sums = result.metrics
        for result in results:
            sums = sums + result.metrics
        return result._replace(metrics=sums)

    def _take(self, step: Step) -> MinibatchResult:
        return self._minibatch_update(step.minibatch(), step.coordinates, step.settings, step.shared)

    def _is_replayable(self) -> bool:
        """Whether minibatches of one shape take the same operations; sums over processes are not among those."""
        parts = self._players, self._curvature, self._solver
        return type(self._reduction) is Reduction and all(part is None or part.replayable for part in parts)

    def _kl(self, sums: MinibatchMetrics) -> float:
        """``approx_kl``, added up over minibatches and processes."""
        return float(self._reduction.sum(sums.step_means[StepMeans._fields.index("approx_kl")]))

    def _metrics(self, sums: MinibatchMetrics, num_updates: int, target_moments: Tensor) -> dict[str, float]:
        step_means, moments = self._reduction.sum_all([sums.step_means, target_moments])
        # One transfer from the device for all of them.
        numbers = torch.cat([step_means / num_updates, sums.minibatch_means / num_updates, sums.counts, moments])
        names = (*StepMeans._fields, *MinibatchMeans._fields, *Counts._fields)
        *values, count, total, squares = numbers.tolist()
        metrics = dict(zip(names, values, strict=True))
        target_variance = squares / count - (total / count) ** 2
        residual_variance = metrics["vf_loss_after_nesting"] - metrics["vf_residual"] ** 2
        metrics["vf_explained_var"] = 1 - residual_variance / target_variance if target_variance > 0 else float("nan")
        metrics["vf_loss"] = metrics["vf_loss_after_nesting"]
        return metrics


def next_rate_factor(factor: float, kl: float, target: float) -> float:
    """The factor of the actor's rate, in [0.01, 1], after an iteration that moved the policy by ``kl``.

    The rule is that of rsl_rl (Schwarke et al. 2025, arXiv:2509.10771). The rate is divided by 1.5 where the policy
    moved more than twice as far as ``target``, and multiplied by 1.5 where it moved less than half as far. Here the
    schedule is the ceiling: a rate that falls to 0 moves the policy less and less, and is not to be raised for that.
    """
    if kl > 2 * target:
        return max(factor / 1.5, 1e-2)
    if kl < target / 2:
        return min(factor * 1.5, 1.0)
    return factor


def _moments(x: Tensor, step: Tensor) -> Tensor:
    """Σ 1, Σ x and Σ x² over steps, [3]."""
    return torch.stack([step.sum(), (step * x).sum(), (step * x.square()).sum()])
