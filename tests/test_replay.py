"""Replayed minibatches against the operations they were recorded from, dispatched one by one."""

import copy
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from problems import FLOAT64, NUM_ACTIONS, SmallPlayers, compiled_kernels, random_batch
from test_update import SETTINGS, make, optimizers_of, weights
from torch import nn

from blpo_rllib.core import native
from blpo_rllib.core.advantages import REFRESHES, AdvantageRule
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.ihvp import Exact, Nystrom, ScaledIdentity
from blpo_rllib.core.lowering import CannotRecordError
from blpo_rllib.core.minibatch import Counts
from blpo_rllib.core.mlp import MLP, MLPActorPass
from blpo_rllib.core.mlp_native import forward_pass
from blpo_rllib.core.policy_heads import CategoricalTerms
from blpo_rllib.core.recording import Recorder


class DiscretePlayers(SmallPlayers):
    """A categorical actor in place of the Gaussian one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.actor_parameters = list(self.actor_network.parameters())

    def actor(self, obs, actions, old_dist_inputs):
        mlp = MLP.of([self.actor_network])
        return MLPActorPass(
            forward_pass(mlp, obs, self.kernels), None, lambda logits, _: CategoricalTerms.at(actions, logits)
        )


def players_and_batch(discrete=False, dtype=FLOAT64, hidden=(5, 4), activation=nn.Tanh, num_segments=6, width=9):
    """Players by compiled kernels, and a batch for them."""
    torch.manual_seed(0)
    kernels = compiled_kernels()
    cls = DiscretePlayers if discrete else SmallPlayers
    players = cls(by_hand=True, hidden=hidden, activation=activation, kernels=kernels)
    batch = random_batch(num_segments, width, kernels=kernels).to(dtype)
    if discrete:
        actions = torch.randint(NUM_ACTIONS, batch.step.shape, dtype=torch.int32)
        batch = replace(batch, actions=actions, old_logp=torch.log(0.3 + 0.4 * torch.rand_like(batch.old_logp)))
    with torch.no_grad():
        for parameter in (*players.actor_parameters, *players.critic_parameters):
            parameter.data = parameter.data.to(dtype)
    return players, batch


def copy_of(players):
    """Equal players with parameters of their own."""
    kernels, players.kernels = players.kernels, None
    again = copy.deepcopy(players)
    again.kernels = players.kernels = kernels
    again.critic_parameters = list(again.critic_network.parameters())
    again.actor_parameters = list(again.actor_network.parameters())
    if not isinstance(players, DiscretePlayers):
        again.actor_parameters.append(again.log_std)
    return again


def twice(players, solver, curvature=Hessian):
    """Two equal updates: one that replays, one that does not."""
    again = copy_of(players)
    replayed, plain = (make(x, copy.deepcopy(solver), curvature) for x in (players, again))
    plain._replayed = None
    return (replayed, players), (plain, again)


def check(update, batch, num_minibatches, settings, rtol=1e-9, atol=1e-11):
    """Runs both updates on a batch; weights, metrics and moments agree."""
    (replayed, mine), (plain, theirs) = update
    metrics, expected = (x.run(batch, num_minibatches, settings) for x in (replayed, plain))
    assert replayed._replayed is not None
    assert replayed._replayed._plans, "nothing was replayed"
    torch.testing.assert_close(weights(mine), weights(theirs), rtol=rtol, atol=atol)
    assert metrics == pytest.approx(expected, rel=max(rtol, 1e-8), abs=max(atol, 1e-10), nan_ok=True)
    for a, b in zip(optimizers_of(replayed), optimizers_of(plain), strict=True):
        for x, y in zip(a.state.values(), b.state.values(), strict=True):
            for name in x:
                torch.testing.assert_close(x[name], y[name], rtol=10 * rtol, atol=atol)
    return metrics


LEADERS = [LeaderLoss(0.2), LeaderLoss(0.05, entropy_coeff=0.02)]
CORRECTIONS = [
    Correction(cross_clip, bound, reduction)
    for cross_clip, bound, reduction in itertools.product((None, 0.3), (None, 0.7), ("sum", "mean"))
]


@pytest.mark.parametrize("discrete", [False, True], ids=["gaussian", "categorical"])
@pytest.mark.parametrize(
    ("solver", "curvature"),
    [
        (None, Hessian),
        (Nystrom(3, 0.1), Hessian),
        (Nystrom(5, 50.0, core_shift=0.0), GaussNewton),
        (Nystrom(4, 1.0, redraw=True), Hessian),
        (ScaledIdentity(2.0), Hessian),
    ],
    ids=["none", "nystrom", "gauss-newton", "redrawn", "identity"],
)
def test_replayed_equals_plain_for_every_switch(discrete, solver, curvature):
    for leader, correction, grad_clip in itertools.product(LEADERS, CORRECTIONS, (None, 0.05)):
        players, batch = players_and_batch(discrete)
        settings = replace(SETTINGS, leader=leader, correction=correction, grad_clip=grad_clip)
        updates = twice(players, solver, curvature)
        check(updates, batch, 3, settings)
        _, plan = updates[0][0]._replayed._latest
        assert (plan.relative_residual() is None) == (solver is None), "the residual is replayed as well"


@pytest.mark.parametrize("sample", ["minibatch", "batch"])
@pytest.mark.parametrize("rule", [AdvantageRule(x, y) for x in REFRESHES for y in (False, True)], ids=str)
def test_replayed_equals_plain_for_every_advantage(rule, sample):
    players, batch = players_and_batch()
    correction = replace(SETTINGS.correction, sample=sample)
    settings = replace(SETTINGS, num_epochs=3, advantages=rule, correction=correction)
    check(twice(players, Nystrom(3, 0.1)), batch, 3, settings)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("hidden", [(), (7,), (33, 9), (6, 5, 4)], ids=str)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_replayed_equals_plain_for_networks_and_precisions(dtype, hidden, activation):
    players, batch = players_and_batch(dtype=dtype, hidden=hidden, activation=activation)
    tolerances = {} if dtype == FLOAT64 else {"rtol": 2e-3, "atol": 2e-5}
    check(twice(players, Nystrom(3, 1.0)), batch, 2, SETTINGS, **tolerances)


def test_what_changes_between_phases_is_taken_up():
    """Batches and their shapes, learning rates, coefficients, and parameters laid out anew."""
    players, batch = players_and_batch()
    updates = twice(players, Nystrom(3, 0.1))
    check(updates, batch, 3, SETTINGS)
    check(updates, players_and_batch()[1], 3, SETTINGS)
    for update, _ in updates:
        for optimizer in optimizers_of(update):
            optimizer.param_groups[0]["lr"] *= 0.1
    check(updates, batch, 3, SETTINGS)
    check(updates, batch, 2, replace(SETTINGS, leader=LeaderLoss(0.2, entropy_coeff=0.5)))
    num_plans = len(updates[0][0]._replayed._plans)
    check(updates, batch, 2, replace(SETTINGS, leader=LeaderLoss(0.2, entropy_coeff=0.1)))
    assert len(updates[0][0]._replayed._plans) == num_plans, "a coefficient of another value was recorded anew"
    check(updates, players_and_batch(width=11)[1], 3, SETTINGS)
    for _, own in updates:
        for parameters in (own.actor_parameters, own.critic_parameters):
            for parameter in parameters:
                parameter.data = parameter.data.clone() + 0.01
    check(updates, batch, 3, SETTINGS)


def test_bad_numbers_are_left_out_as_without_replay():
    players, batch = players_and_batch()
    rewards = batch.rewards.clone()
    rewards[0, 1] = float("inf")
    updates = twice(players, Nystrom(3, 0.1))
    metrics = check(updates, replace(batch, rewards=rewards), 3, SETTINGS)
    assert metrics["skipped_actor_updates"] == SETTINGS.num_epochs
    assert not any(check(updates, batch, 3, SETTINGS)[name] for name in Counts._fields)


def test_every_minibatch_is_replayed_so_that_it_does_not_matter_which_was_recorded():
    """A run that goes on from a checkpoint records another minibatch than one that never stopped."""
    players, batch = players_and_batch(dtype=torch.float32, hidden=(16, 16))
    first = make(players, Nystrom(3))
    first.run(batch, 3, SETTINGS)
    again = copy_of(players)
    second = make(again, Nystrom(3))
    second.set_state(copy.deepcopy(first.get_state()))
    for mine, theirs in zip(optimizers_of(second), optimizers_of(first), strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    first.run(batch, 3, SETTINGS)
    second.run(batch, 3, SETTINGS)
    assert torch.equal(weights(players), weights(again))


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        (Exact(1.0), SETTINGS),
        (Nystrom(3), replace(SETTINGS, leader=LeaderLoss(0.2, kl_coeff=0.1))),
    ],
    ids=["solver", "penalty"],
)
def test_what_cannot_be_replayed_runs_as_before(solver, settings, caplog):
    players, batch = players_and_batch()
    update = make(players, solver)
    with caplog.at_level(logging.INFO):
        metrics = update.run(batch, 3, settings)
    assert update._replayed is None
    assert not any(metrics[name] for name in Counts._fields)


def recorded(function, *inputs):
    """What ``function`` returns for the inputs, replayed twice after it was recorded on others."""
    kernels = compiled_kernels()
    others = [x if x.dtype == torch.int64 else torch.rand_like(x) for x in inputs]
    with Recorder(kernels, inputs[0].dtype, others, []) as recorder:
        out = function(*others)
    replay = recorder.finish([out])
    for _ in range(2):
        for own, x in zip(replay.inputs, inputs, strict=True):
            own.copy_(x)
        replay.run()
    return replay.outputs[0].to(out.dtype)


INDEX = torch.tensor([2, 0, 1, 2, 0])
FUNCTIONS = {
    "arithmetic": lambda a, b: (2 * a - b / 3 + a * b - (1 - a)).neg() + a.reciprocal(),
    "functions": lambda a, b: a.exp() + a.abs().log() + b.abs().sqrt() + a**2,
    "comparisons": lambda a, b: torch.stack([(a > b), (a <= b), (a == b), (a < 0.1), (a >= 0.1), (a != 0.1)]) * 1.0,
    "conditions": lambda a, b: torch.where((a > 0) & ~(b > 0), a, b).masked_fill(a > 1, 7.0).clamp(-0.5, 3),
    "broadcast": lambda a, b: (a[:, None, :] * b[:1, :, None].expand(1, -1, 5) - a[0]).sum(1),
    "strides": lambda a, b: (a.T[1:, ::2] + b.T[1:, ::2]).contiguous() * a.T[1:, ::2],
    "padding": lambda a, b: nn.functional.pad(a, (1, 2)) * 2 + nn.functional.pad(b, (3, 0, 1, 1), value=4.0)[1:4],
    "sums": lambda a, b: a.sum(0) + b.sum(1).sum() + (a[:, :, None] * b[:, None]).sum((0, 2)),
    "products": lambda a, b: (a @ b.T) @ b + torch.addmm(b, a @ a.T, b) + (a @ b[0])[:, None],
    "norms": lambda a, b: torch.linalg.vector_norm(a) + a.flatten() @ b.flatten(),
    "system": lambda a, b: torch.linalg.solve_ex(a @ a.T + b @ b.T, a[:, 1])[0],
    "softmax": lambda a, b: torch.cat([a.log_softmax(0), b.log_softmax(1)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name, dtype):
    function = FUNCTIONS[name]
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, dtype=dtype)
    torch.testing.assert_close(recorded(function, a, b), function(a, b))


def test_operations_at_indices():
    def function(x, index):
        return x.gather(1, index.view(1, -1).expand(3, -1)) + torch.zeros_like(x).scatter_(0, index[None], 1.5)

    x = torch.randn(3, 5, dtype=FLOAT64)
    torch.testing.assert_close(recorded(function, x, INDEX), function(x, INDEX))
    picked = recorded(lambda x, index: x.index_select(1, index), x, INDEX)
    torch.testing.assert_close(picked, x.index_select(1, INDEX))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 90.0, -90.0, -200.0, 88.6, -87.2])
def test_exponentials_at_the_edges(value):
    x = torch.full((3, 40), value)
    torch.testing.assert_close(recorded(torch.exp, x), x.exp(), equal_nan=True, rtol=1e-5, atol=1e-37)


def test_arrays_that_may_change_are_refused():
    outside = torch.randn(3, dtype=FLOAT64)
    with pytest.raises(CannotRecordError, match="not known to stay"):
        recorded(lambda x: x * outside, torch.randn(3, dtype=FLOAT64))
    with pytest.raises(CannotRecordError, match="no compiled counterpart"):
        recorded(torch.erfinv, torch.randn(3, dtype=FLOAT64))
    with pytest.raises(CannotRecordError, match="integers"):
        recorded(lambda x, i: x + i, torch.randn(5, dtype=FLOAT64), INDEX)


def test_kernels_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="no C\\+\\+ file has a function 'nonsense'"):
        native.load()("nonsense", torch.float32)


def test_the_quicker_number_of_threads_is_found_and_does_not_matter():
    before = torch.get_num_threads()
    players, batch = players_and_batch()
    updates = twice(players, Nystrom(3, 0.1))
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            check(updates, batch, 3, SETTINGS)
        (plan,) = updates[0][0]._replayed._plans.values()
        assert set(plan._replay._quickest) == {1, 2}
    finally:
        torch.set_num_threads(before)


def test_a_rate_of_its_own_for_the_log_std_is_replayed():
    players, batch = players_and_batch()
    start = players.log_std.detach().clone()
    rates = [1.0] * (len(players.actor_parameters) - 1)
    moved = []
    for factor in (1.0, 4.0):
        mine = copy_of(players)
        mine.actor_rate_factors = [*rates, factor]
        updates = twice(mine, Nystrom(3))
        updates[1][1].actor_rate_factors = mine.actor_rate_factors
        updates[1][0].take_players(updates[1][1])
        updates[1][0]._replayed = None
        # One minibatch: what follows depends on the log-std.
        check(updates, batch, 1, replace(SETTINGS, num_epochs=1))
        moved.append(mine.log_std.detach() - start)
    torch.testing.assert_close(moved[1], 4 * moved[0])
