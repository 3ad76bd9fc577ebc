"""Steps of torch's fused Adam from a flat gradient, skipped on the device where the gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blpo_rllib.core.networks import unflatten


class AdamSteps:
    """What ``optimizer.step()`` does, without its bookkeeping, which takes several times as long for small networks.

    State and hyperparameters are the optimizer's own, so checkpoints and schedules see nothing of this.

    Args:
        optimizer: torch's Adam with a single parameter group and neither weight decay nor AMSGrad.
        parameters: Its parameters, in the order of the gradients to come.
    """

    def __init__(self, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]):
        self._optimizer, self._parameters = optimizer, list(parameters)
        self.refresh()

    def refresh(self) -> None:
        """Reads state and hyperparameters anew: due after a checkpoint was restored or a schedule moved on."""
        group = self._optimizer.param_groups[0]
        states = [self._optimizer.state[p] or self._initialise(p) for p in self._parameters]
        self._steps = [state["step"] for state in states]
        self._first = [state["exp_avg"] for state in states]
        self._second = [state["exp_avg_sq"] for state in states]
        # CUDA's kernel reads float32; on CPU float64 keeps the rate exact.
        device = self._steps[0].device
        self._lr = torch.as_tensor(
            group["lr"], dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
        )
        self._betas, self._epsilon = group["betas"], group["eps"]

    def _initialise(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state as torch's Adam makes it before its first step."""
        self._optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
        return self._optimizer.state[parameter]

    def step(self, gradient: Tensor, skip: Tensor) -> None:
        """One step.

        Args:
            gradient: Flat gradient [n].
            skip: Scalar float32; 1 leaves parameters and state as they are, 0 makes the step.
        """
        pieces = unflatten(gradient, self._parameters)
        with torch.no_grad():
            torch._foreach_add_(self._steps, 1 - skip)
            if torch.compiler.is_compiling():
                self._traceable_step(pieces, skip)
            else:
                self._fused_step(pieces, skip)

    def _fused_step(self, gradients: Sequence[Tensor], skip: Tensor) -> None:
        torch._fused_adam_(
            self._parameters,
            [_laid_out(x, p) for x, p in zip(gradients, self._parameters, strict=True)],
            self._first,
            self._second,
            [],
            self._steps,
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

    def _traceable_step(self, gradients: Sequence[Tensor], skip: Tensor) -> None:
        """The fused kernel's arithmetic (Kingma & Ba 2015, algorithm 1) in operations that a compiler can fuse."""
        beta1, beta2 = self._betas
        step = self._steps[0].double().clamp(min=1)
        rate = (self._lr / (1 - beta1**step)).to(gradients[0].dtype)
        correction = (1 - beta2**step).sqrt().to(gradients[0].dtype)
        keep = skip > 0
        for parameter, gradient, first, second in zip(
            self._parameters, gradients, self._first, self._second, strict=True
        ):
            new_first = first + (1 - beta1) * (gradient - first)
            new_second = beta2 * second + (1 - beta2) * gradient * gradient
            change = rate * new_first / (new_second.sqrt() / correction + self._epsilon)
            parameter.copy_(torch.where(keep, parameter, parameter - change))
            first.copy_(torch.where(keep, first, new_first))
            second.copy_(torch.where(keep, second, new_second))


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the parameter's strides: the fused kernel goes through memory, not through indices."""
    return gradient if parameter.is_contiguous() else torch.empty_like(parameter).copy_(gradient)
