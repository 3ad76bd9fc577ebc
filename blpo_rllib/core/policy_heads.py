"""Action distributions on top of a perceptron: log-probability, entropy, KL divergence and their derivatives per slot.

Arrays are laid out unit by unit, [d, n] for n slots. The derivatives are those in the perceptron's outputs and, where
the policy has one, in a log-std [d, n] that is the same in all slots.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blpo_rllib.core.lowering import CannotRecordError

LOGP, ENTROPY, KL = 0, 1, 2


class HeadTerms(ABC):
    """The three terms [n] of a distribution at given outputs, and the derivatives of each.

    Attributes:
        logp: log π(a|s).
        entropy: Entropy of π(·|s).
        kl: KL(π_old(·|s) ‖ π(·|s)), or None.
    """

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None

    @abstractmethod
    def scores(self, term: int) -> tuple[Tensor, Tensor | None]:
        """Derivatives of one term in the outputs and in the log-std, [d, n] each; None for the latter without one.

        Args:
            term: :data:`LOGP`, :data:`ENTROPY` or :data:`KL`.
        """


PolicyHead = Callable[[Tensor, Tensor | None], HeadTerms]


class AutogradTerms(HeadTerms):
    """Any distribution that treats slots independently, differentiated automatically.

    Args:
        terms: Maps outputs [n, d] and log-std [n, d] (or None) to logp, entropy and KL (or None), [n] each.
        outputs: [d, n].
        log_std: [d, n], or None.
    """

    def __init__(
        self,
        terms: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]],
        outputs: Tensor,
        log_std: Tensor | None,
    ):
        if not torch.is_grad_enabled():
            raise CannotRecordError("the policy's distribution is differentiated automatically")
        self._leaves = [x.T.detach().clone().requires_grad_() for x in (outputs, log_std) if x is not None]
        # A recording of the update runs without gradients.
        with torch.enable_grad():
            logp, entropy, kl = terms(self._leaves[0], self._leaves[1] if log_std is not None else None)
        self._graphs = logp, entropy, kl
        self.logp, self.entropy = logp.detach(), entropy.detach()
        self.kl = None if kl is None else kl.detach()

    def scores(self, term: int) -> tuple[Tensor, Tensor | None]:
        graph = self._graphs[term]
        assert graph is not None
        ones = torch.ones_like(graph)
        gradients = torch.autograd.grad(graph, self._leaves, ones, retain_graph=True, materialize_grads=True)
        return gradients[0].T, gradients[1].T if len(gradients) > 1 else None


@dataclass(frozen=True)
class GaussianTerms(HeadTerms):
    """A diagonal Gaussian with a state-independent log-std, in closed form. Make it with :meth:`at`."""

    logp: Tensor
    entropy: Tensor
    _deviation: Tensor
    _precision: Tensor
    _inside: Tensor
    kl: None = None

    @classmethod
    def at(cls, actions: Tensor, clip: float, mean: Tensor, log_std: Tensor | None) -> GaussianTerms:
        """For actions [n, d], means [d, n], and a log-std [d, n] that is clipped to ±``clip``."""
        assert log_std is not None
        # The same in all slots, [d, 1].
        log_std = log_std[:, :1]
        clipped = log_std.clamp(-clip, clip)
        precision = (-clipped).exp()
        deviation = (actions.T - mean) * precision
        entropy = (clipped + (0.5 + 0.5 * math.log(2 * math.pi))).sum()
        # log π = −½ Σ (deviation² − 1) − entropy
        return cls(
            logp=0.5 * len(mean) - entropy - 0.5 * deviation.square().sum(0),
            entropy=entropy.expand(mean.shape[1]),
            _deviation=deviation,
            _precision=precision,
            _inside=(log_std.abs() <= clip).to(mean.dtype),
        )

    def scores(self, term: int) -> tuple[Tensor, Tensor | None]:
        if term == ENTROPY:
            return torch.zeros_like(self._deviation), self._inside.expand_as(self._deviation)
        return self._deviation * self._precision, (self._deviation.square() - 1) * self._inside


@dataclass(frozen=True)
class CategoricalTerms(HeadTerms):
    """A categorical distribution over the outputs as logits, in closed form. Make it with :meth:`at`."""

    logp: Tensor
    entropy: Tensor
    _log_probabilities: Tensor
    _actions: Tensor
    kl: None = None

    @classmethod
    def at(cls, actions: Tensor, logits: Tensor) -> CategoricalTerms:
        """For actions [n] and logits [d, n]."""
        log_probabilities = logits.log_softmax(0)
        index = actions.long()[None]
        return cls(
            logp=log_probabilities.gather(0, index)[0],
            entropy=-(log_probabilities.exp() * log_probabilities).sum(0),
            _log_probabilities=log_probabilities,
            _actions=index,
        )

    def scores(self, term: int) -> tuple[Tensor, Tensor | None]:
        probabilities = self._log_probabilities.exp()
        if term == ENTROPY:
            return -probabilities * (self._log_probabilities + self.entropy), None
        chosen = torch.zeros_like(probabilities).scatter_(0, self._actions, 1.0)
        return chosen - probabilities, None
