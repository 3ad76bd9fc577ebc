"""GAE and its adjoint and tangent against a step-by-step loop."""

import pytest
import torch
from problems import compiled_kernels

from blpo_rllib.core.gae import BlockwiseAdvantage, Masks, RecurrentAdvantage, advantage_operator

GAMMA, LAMBDA = 0.97, 0.9


@pytest.fixture(params=[BlockwiseAdvantage, RecurrentAdvantage], ids=lambda kind: kind.__name__)
def operator_of(request):
    """Makes the operator of given masks."""
    kernels = compiled_kernels() if request.param is RecurrentAdvantage else None

    def make(step, terminated, continues, gamma, lambda_):
        operator = advantage_operator(Masks(step, terminated, continues), gamma, lambda_, kernels)
        assert type(operator) is request.param
        return operator

    return make


def random_masks(num_segments, width, seed):
    """Random pieces: step, terminated, continues."""
    generator = torch.Generator().manual_seed(seed)
    step = (torch.rand(num_segments, width, generator=generator) > 0.15).double()
    step[:, -1] = 0
    ends = (torch.rand(num_segments, width, generator=generator) < 0.2).double()
    terminated = ends * step * (torch.rand(num_segments, width, generator=generator) < 0.5)
    following = torch.nn.functional.pad(step[:, 1:], (0, 1))
    return step, terminated, step * following * (1 - ends)


def loop_advantages(step, terminated, continues, rewards, values, gamma=GAMMA, lambda_=LAMBDA):
    """Equation 16 of the GAE paper as written, one step after the other."""
    advantages = torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        running = 0.0
        for t in reversed(range(rewards.shape[1])):
            if not step[b, t]:
                running = 0.0
                continue
            following = 0.0 if terminated[b, t] else values[b, t + 1]
            delta = rewards[b, t] + gamma * following - values[b, t]
            running = delta + gamma * lambda_ * running * continues[b, t]
            advantages[b, t] = running
    return advantages


@pytest.mark.parametrize("width", [2, 3, 5, 16, 17, 50, 130])
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_tangent_and_adjoint_match_a_loop(operator_of, width, seed):
    step, terminated, continues = random_masks(3, width, seed)
    operator = operator_of(step, terminated, continues, GAMMA, LAMBDA)
    rewards, tangent, cotangent = torch.randn(3, 3, width, dtype=torch.float64)
    values = torch.randn(3, width, dtype=torch.float64, requires_grad=True)

    def loop(values):
        return loop_advantages(step, terminated, continues, rewards, values)

    expected = loop(values)
    torch.testing.assert_close(operator.advantages(rewards, values.detach()), expected.detach(), rtol=1e-12, atol=1e-12)
    _, expected_tangent = torch.autograd.functional.jvp(loop, values.detach(), tangent)
    torch.testing.assert_close(operator.tangent(tangent), expected_tangent, rtol=1e-12, atol=1e-12)
    (expected_adjoint,) = torch.autograd.grad(expected, values, cotangent * step)
    adjoint = operator.adjoint(cotangent * step)
    torch.testing.assert_close(adjoint, expected_adjoint, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lambda_"), [(0.0, 0.9), (0.9, 0.0), (1.0, 1.0)])
def test_extreme_discounts(operator_of, gamma, lambda_):
    step, terminated, continues = random_masks(2, 20, 3)
    rewards, values = torch.randn(2, 2, 20, dtype=torch.float64)
    operator = operator_of(step, terminated, continues, gamma, lambda_)
    expected = loop_advantages(step, terminated, continues, rewards, values, gamma, lambda_)
    torch.testing.assert_close(operator.advantages(rewards, values), expected, rtol=1e-12, atol=1e-12)


def test_selected_rows_act_as_the_whole(operator_of):
    step, terminated, continues = random_masks(4, 12, 5)
    rewards, values = torch.randn(2, 4, 12, dtype=torch.float64)
    operator = operator_of(step, terminated, continues, GAMMA, LAMBDA)
    rows = torch.tensor([2, 0])
    selected = operator.permuted(rows)
    torch.testing.assert_close(
        selected.advantages(rewards[rows], values[rows]), operator.advantages(rewards, values)[rows]
    )
    second = operator.split(2)[1]
    torch.testing.assert_close(second.advantages(rewards[2:], values[2:]), operator.advantages(rewards, values)[2:])


def test_many_rows_are_shared_out_between_threads():
    step, terminated, continues = random_masks(300, 300, 7)
    rewards, values = torch.randn(2, 300, 300, dtype=torch.float64)
    masks = Masks(step, terminated, continues)
    plain, fast = (advantage_operator(masks, GAMMA, LAMBDA, kernels) for kernels in (None, compiled_kernels()))
    torch.testing.assert_close(fast.advantages(rewards, values), plain.advantages(rewards, values))
    torch.testing.assert_close(fast.adjoint(rewards * step), plain.adjoint(rewards * step))
