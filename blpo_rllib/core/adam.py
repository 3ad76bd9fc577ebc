"""One step of torch's fused Adam from a flat gradient, skipped on the device where the gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blpo_rllib.core.networks import unflatten


def adam_step(optimizer: torch.optim.Adam, parameters: Sequence[Tensor], gradient: Tensor, skip: Tensor) -> None:
    """What ``optimizer.step()`` does, without its bookkeeping, which takes several times as long for small networks.

    State and hyperparameters are the optimizer's own, so checkpoints and schedules see nothing of this.

    Args:
        optimizer: Adam with a single parameter group and neither weight decay nor AMSGrad.
        parameters: Its parameters, in the order of ``gradient``.
        gradient: Flat gradient [n].
        skip: Scalar float32; 1 leaves parameters and state as they are, 0 makes the step.
    """
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] or _initialise(optimizer, p) for p in parameters]
    steps = [state["step"] for state in states]
    beta1, beta2 = group["betas"]
    with torch.no_grad():
        torch._foreach_add_(steps, 1 - skip)
        torch._fused_adam_(
            list(parameters),
            unflatten(gradient, parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=skip,
        )


def _initialise(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """The state as torch's Adam makes it before its first step."""
    optimizer.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
    return optimizer.state[parameter]
