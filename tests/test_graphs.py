"""Recordings of a minibatch, replayed, against running each minibatch as it is."""

import copy
from dataclasses import replace

import pytest
import torch
from host_graphs import HostGraphs
from problems import random_batch
from test_update import SETTINGS, make, optimizers_of, twins, weights

from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.graphs import MOST_GRAPHS, Graphed
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.ihvp import ConjugateGradient, Nystrom
from blpo_rllib.core.reduction import Reduction

PENALTIES = replace(SETTINGS, leader=LeaderLoss(0.1, torch.tensor(0.01), torch.tensor(0.5)), grad_clip=0.1)


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "automatic"])
@pytest.mark.parametrize(
    ("solver", "curvature", "settings"),
    [
        (None, Hessian, SETTINGS),
        (Nystrom(3, 0.1), Hessian, PENALTIES),
        (Nystrom(3, 0.1), GaussNewton, SETTINGS),
        (ConjugateGradient(3, 0.1), Hessian, SETTINGS),
        (Nystrom(3, 0.1), Hessian, replace(SETTINGS, correction=Correction(1.0, 1.0, sample="batch"))),
    ],
    ids=["none", "nystrom", "gauss-newton", "cg", "whole batch"],
)
def test_replayed_equals_plain(solver, curvature, settings, by_hand):
    """To the bit, over phases between which batches, learning rates and coefficients change."""
    results = []
    for recorder in (None, HostGraphs()):
        torch.manual_seed(0)
        players = twins()[by_hand]
        update = make(players, copy.deepcopy(solver), curvature, recorder)
        for phase in range(3):
            for optimizer in optimizers_of(update):
                optimizer.param_groups[0]["lr"] *= 0.7
            if settings.leader.kl_coeff is not None:
                settings.leader.kl_coeff.fill_(0.5 + phase)
            metrics = update.run(random_batch(num_segments=4), 2, settings)
        results.append((weights(players), metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert (recorder.warm_ups, recorder.recordings) == (1, 1), "one recording serves all phases"


@pytest.mark.parametrize(("by_hand", "recordings"), [(True, 1), (False, 0)], ids=["by hand", "automatic"])
def test_drawn_coordinates_are_inputs_of_a_recording(by_hand, recordings):
    """Automatic differentiation looks them up on the host: no draw may run by the recording of another."""
    results, recorder = [], HostGraphs()
    for how in (None, recorder):
        torch.manual_seed(0)
        players = twins()[by_hand]
        update = make(players, Nystrom(3, 0.1, redraw=True), Hessian, how)
        for _ in range(2):
            update.run(random_batch(num_segments=4), 4, SETTINGS)
        results.append(weights(players))
    assert torch.equal(*results)
    assert recorder.recordings == recordings


def test_a_restored_optimizer_is_seen_by_recordings():
    batch, results = random_batch(num_segments=4), []
    for recorder in (None, HostGraphs()):
        torch.manual_seed(0)
        update = make(players := twins()[1], Nystrom(3), Hessian, recorder)
        update.run(batch, 2, SETTINGS)
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers_of(update)]
        update.run(batch, 2, SETTINGS)
        for optimizer, state in zip(optimizers_of(update), states, strict=True):
            optimizer.load_state_dict(state)
        update.run(batch, 2, SETTINGS)
        results.append(weights(players))
    assert torch.equal(*results)


def test_each_shape_has_its_recording_and_old_ones_are_dropped():
    recorder = HostGraphs()
    update = make(twins()[1], Nystrom(3), Hessian, recorder)
    for width in range(9, 9 + MOST_GRAPHS + 2):
        for _ in range(2):
            update.run(random_batch(num_segments=2, width=width), 1, SETTINGS)
    assert recorder.recordings == MOST_GRAPHS + 2
    assert len(update._graphed._graphs) == MOST_GRAPHS


class BrokenGraphs(HostGraphs):
    def record(self, function):
        raise RuntimeError("no graphs here")


def test_what_cannot_be_recorded_runs_as_it_is_with_one_warning(caplog):
    batch, results = random_batch(num_segments=4), []
    for recorder in (None, BrokenGraphs()):
        torch.manual_seed(0)
        players = twins()[1]
        make(players, Nystrom(3), Hessian, recorder).run(batch, 2, SETTINGS)
        results.append(weights(players))
    assert torch.equal(*results)
    assert caplog.text.count("cannot be recorded as a graph") == 1
    assert "no graphs here" in caplog.text


class TwoProcesses(Reduction):
    """This one, and another whose layout, or obstacle, is told."""

    def __init__(self, other):
        self.other = other

    def gather(self, x):
        return [x, self.other.pop(0)]


def test_processes_record_and_replay_together():
    recorder = HostGraphs()
    x = torch.zeros(3)
    # The other's layouts in three phases, and its success in recording.
    function = Graphed(lambda y: (x.add_(y), x)[1:], recorder, TwoProcesses([1, False, 2, 1]))
    for phase in range(3):
        function.start_phase()
        for _ in range(3 if phase == 0 else 1):
            function(torch.ones(3))
    assert (recorder.warm_ups, recorder.recordings) == (2, 1)
    assert torch.equal(x, torch.full((3,), 5.0))
    lonely = Graphed(lambda y: (y + 1,), HostGraphs(), TwoProcesses([1, True]))
    assert all(torch.equal(lonely(torch.ones(3))[0], torch.full((3,), 2.0)) for _ in range(3))
    assert lonely._maker is None, "what one process cannot record, none replays"


def test_a_recording_holds_no_numbers_of_python():
    """What the tests above would not notice if the host's recordings ran Python again."""
    factor = [2.0]
    function = Graphed(lambda x: (x * factor[0],), HostGraphs(), Reduction())
    for x in (1.0, 2.0):
        function(torch.tensor(x))
    factor[0] = 3.0
    assert function(torch.tensor(5.0))[0] == 10.0


def test_a_read_on_the_host_is_no_part_of_a_recording(caplog):
    function = Graphed(lambda x: (x * float(x),), HostGraphs(), Reduction())
    assert [float(function(torch.tensor(x))[0]) for x in (2.0, 3.0, 4.0)] == [4.0, 9.0, 16.0]
    assert caplog.text.count("read on the host") == 1
