"""Adam on one flat vector of parameters, with steps that are skipped on the device where the gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blpo_rllib.core.native import DTYPES, Kernels
from blpo_rllib.core.networks import flatten, unflatten


class AdamSteps:
    """What ``optimizer.step()`` does, without its bookkeeping, which takes several times as long for small networks.

    Parameters and Adam's moments are laid out as views of one vector each, so that a step is a single kernel. The
    optimizer stays their owner: its state dict, checkpoints and schedules work as ever.

    Args:
        optimizer: torch's Adam with a single parameter group and neither weight decay nor AMSGrad.
        parameters: Its parameters, in the order of the gradients to come.
        kernels: Compiled functions to step with, used on the CPU in float32 or float64.
        rate_factors: Each parameter's learning rate in units of the optimizer's; None for 1 throughout.
    """

    def __init__(
        self,
        optimizer: torch.optim.Adam,
        parameters: Sequence[Tensor],
        kernels: Kernels | None = None,
        rate_factors: Sequence[float] | None = None,
    ):
        self._optimizer, self._parameters = optimizer, list(parameters)
        first = self._parameters[0]
        self._kernels = kernels if first.device.type == "cpu" and first.dtype in DTYPES else None
        self._vector, self._first, self._second = (flatten(self._parameters).detach() for _ in range(3))
        # Each parameter's part of those three.
        self._views = [unflatten(x, self._parameters) for x in (self._vector, self._first, self._second)]
        self._step = torch.zeros((), dtype=torch.float32, device=first.device)
        # An accelerator's kernel reads float32; on CPU float64 keeps the rate exact.
        rate_type = torch.float64 if first.device.type == "cpu" else torch.float32
        self._lr = torch.zeros((), dtype=rate_type, device=first.device)
        self._lay_out()
        self.refresh()
        factors = [1.0] * len(self._parameters) if rate_factors is None else rate_factors
        parts = self._vector.split([p.numel() for p in self._parameters])
        self._other_rates = [(part, f) for part, f in zip(parts, factors, strict=True) if f != 1]

    def refresh(self, rate_factor: float = 1.0) -> None:
        """Reads parameters, state and hyperparameters anew: due after a checkpoint was restored or a schedule moved.

        Args:
            rate_factor: What the optimizer's learning rate is multiplied by.
        """
        group = self._optimizer.param_groups[0]
        self._betas, self._epsilon = group["betas"], group["eps"]
        if not self._is_laid_out():
            self._lay_out()
        self._lr.fill_(rate_factor * float(group["lr"]))

    @property
    def memory(self) -> list[Tensor]:
        """What a step reads and writes besides the gradient: the same arrays until the layout changes."""
        return [self._vector, self._first, self._second, self._step, self._lr]

    def _is_laid_out(self) -> bool:
        """Whether parameters and state are still the views that :meth:`_lay_out` made of them."""
        states = [self._optimizer.state[p] for p in self._parameters]
        return (
            all(state.get("step") is self._step for state in states)
            and _share_memory(self._parameters, self._views[0])
            and _share_memory([state["exp_avg"] for state in states], self._views[1])
            and _share_memory([state["exp_avg_sq"] for state in states], self._views[2])
        )

    def _lay_out(self) -> None:
        """Copies into the vectors, which stay where they are: recordings of the update hold their addresses."""
        states = [self._optimizer.state[p] for p in self._parameters]
        zeros = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        with torch.no_grad():
            self._vector.copy_(flatten(self._parameters))
            self._first.copy_(flatten([s.get("exp_avg", z) for s, z in zip(states, zeros, strict=True)]))
            self._second.copy_(flatten([s.get("exp_avg_sq", z) for s, z in zip(states, zeros, strict=True)]))
            self._step.copy_(states[0].get("step", torch.zeros_like(self._step)))
        for parameter, value, first, second in zip(self._parameters, *self._views, strict=True):
            parameter.data = value
            self._optimizer.state[parameter] = {"step": self._step, "exp_avg": first, "exp_avg_sq": second}

    def step(self, gradient: Tensor, max_norm: float | None) -> Tensor:
        """One step, unless the gradient is not finite, which leaves parameters and state as they are.

        Args:
            gradient: Flat gradient [n].
            max_norm: What a longer gradient is scaled down to; None for no clipping.

        Returns:
            Scalar on the device: 1 if the step was skipped, else 0.
        """
        with torch.no_grad():
            before = [part.clone() for part, _ in self._other_rates]
            if self._kernels is not None:
                skip = self._native_step(self._kernels, gradient.contiguous(), max_norm)
            else:
                skip = self._plain_step(gradient, max_norm)
            # Adam's step is proportional to the rate.
            for (part, factor), old in zip(self._other_rates, before, strict=True):
                part += (part - old) * (factor - 1)
            return skip

    def _plain_step(self, gradient: Tensor, max_norm: float | None) -> Tensor:
        norm = torch.linalg.vector_norm(gradient)
        skip = torch.isfinite(norm).logical_not().to(torch.float32)
        if max_norm is not None:
            gradient = gradient * (max_norm / norm).clamp(max=1.0)
        self._step += 1 - skip
        self._fused_step(gradient, skip)
        return skip

    def _native_step(self, kernels: Kernels, gradient: Tensor, max_norm: float | None) -> Tensor:
        skip = torch.empty((), dtype=gradient.dtype)
        numbers = map(float, (*self._betas, self._epsilon, -1 if max_norm is None else max_norm))
        arrays = self._vector, gradient, self._first, self._second, len(gradient), self._step, self._lr
        kernels("adam", gradient.dtype, *arrays, *numbers, skip)
        return skip

    def _fused_step(self, gradient: Tensor, skip: Tensor) -> None:
        torch._fused_adam_(
            [self._vector],
            [gradient],
            [self._first],
            [self._second],
            [],
            [self._step],
            lr=self._lr,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=0.0,
            eps=self._epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=skip,
        )


def _share_memory(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether each of ``tensors`` stands where the one of ``others`` does."""
    return all(x.data_ptr() == y.data_ptr() for x, y in zip(tensors, others, strict=True))
