"""Recurrent modules: sequences, their states, and the hypergradient through the recurrence."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from episodes import OBS_SIZE, episode
from host_graphs import HostGraphs
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.examples.rl_modules.classes.lstm_containing_rlm import LSTMContainingRLModule
from test_data_parallel import Meeting, ThreadReduction
from test_learner import assert_equal
from test_update import SETTINGS
from torch import nn

from blpo_rllib import BLPOConfig
from blpo_rllib.core.curvature import CriticLoss, Hessian
from blpo_rllib.core.gae import BlockwiseAdvantage, Masks
from blpo_rllib.core.hypergradient import Correction, LeaderLoss, hypergradient
from blpo_rllib.core.ihvp import ConjugateGradient, Exact, Nystrom
from blpo_rllib.core.networks import flatten, unflatten
from blpo_rllib.core.players import slots
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch, SegmentPlan, layout_segments
from blpo_rllib.core.update import BilevelUpdate
from blpo_rllib.learning.connectors import MINIBATCH_SIZE, PackSegments
from blpo_rllib.learning.players import RLModulePlayers
from blpo_rllib.learning.recurrence import PLACE, Sequences, places, recurrent_observation, sequences
from studies.recurrence import stateless_cartpole

FLOAT64 = torch.float64
NUM_ACTIONS, CELL = 2, 2


class TwoLSTMs(TorchRLModule, ValueFunctionAPI):
    """An actor and a critic of one LSTM and a linear head each."""

    def setup(self):
        size = self.observation_space.shape[0]
        self.actor, self.critic = (nn.LSTM(size, CELL, batch_first=True) for _ in range(2))
        self.logits, self.value = nn.Linear(CELL, int(self.action_space.n)), nn.Linear(CELL, 1)

    def get_initial_state(self):
        zeros = np.zeros(CELL, np.float32)
        return {player: {"h": zeros, "c": zeros} for player in ("actor", "critic")}

    def _run(self, player, batch):
        state = batch[Columns.STATE_IN][player]
        hidden, (h, c) = getattr(self, player)(batch[Columns.OBS], (state["h"][None], state["c"][None]))
        return hidden, {"h": h[0], "c": c[0]}

    def _forward(self, batch, **kwargs):
        hidden, actor = self._run("actor", batch)
        critic = self._run("critic", batch)[1]
        return {
            Columns.ACTION_DIST_INPUTS: self.logits(hidden),
            Columns.STATE_OUT: {"actor": actor, "critic": critic},
        }

    def _forward_train(self, batch, **kwargs):
        # RLlib's training batches have actions too, and there are modules that read them.
        assert batch[Columns.ACTIONS].shape == batch[Columns.OBS].shape[:2]
        return self._forward(batch, **kwargs)

    def compute_values(self, batch, embeddings=None):
        return self.value(self._run("critic", batch)[0])[..., 0]


def test_places():
    is_step = np.array([True] * 5 + [False] + [True] * 2 + [False])
    terminated = np.array([False] * 7 + [True] + [False])
    layout = layout_segments(is_step, terminated, 1, width_multiple=4, num_rows=2)
    # A cut episode of five steps with its bootstrap slot, then a terminated one of two steps, then padding.
    assert layout.age.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [-1] * 8]
    # A row without a step still is a sequence, since a minibatch may hold no other.
    assert places(layout.age, layout.step, 2).tolist()[1] == [0] + [-1] * 7
    assert places(layout.age, layout.step, 2).tolist()[0] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert places(layout.age, layout.step, 5).tolist()[0] == [0, 1, 2, 3, 4, 5, 0, 1]
    # A bootstrap slot never starts a sequence: it goes on from the last step.
    assert places(layout.age, layout.step, 1).tolist()[0] == [0, 0, 0, 0, 0, 1, 0, 0]


def test_sequences_and_back():
    place = np.array([[0, 1, 2, 0, -1, -1], [0, 1, 0, 1, 0, 1]])
    own = sequences(place)
    assert own.tolist() == [[[[0, 1, 2], [3, -1, -1], [-1] * 3]], [[[0, 1, -1], [2, 3, -1], [4, 5, -1]]]]
    x = torch.arange(1, 13)
    found = Sequences.of(torch.as_tensor(place).flatten(), torch.as_tensor(own).flatten(0, 1))
    assert found.pad(x).tolist() == [[1, 2, 3], [4, 0, 0], [0] * 3, [7, 8, 0], [9, 10, 0], [11, 12, 0]]
    assert x[found.starts].tolist() == [1, 4, 1, 7, 9, 11]
    assert found.lengths.tolist() == [3, 1, 1, 2, 2, 2]
    assert found.unpad(found.pad(x))[place.flatten() >= 0].tolist() == [1, 2, 3, 4, *range(7, 13)]
    # Batches of about the same size have one shape.
    assert sequences(np.arange(17)[None], width_multiple=32).shape == (1, 1, 1, 18)


def config(cls=None, max_seq_len=4, **training):
    base = (
        BLPOConfig()
        .environment(
            observation_space=gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32),
            action_space=gym.spaces.Discrete(2),
        )
        .env_runners(num_envs_per_env_runner=4)
        .training(train_batch_size_per_learner=64, minibatch_size=16, num_epochs=2, nystrom_rank=2, **training)
        .debugging(seed=3)
    )
    model_config = {"max_seq_len": max_seq_len, "lstm_cell_size": 6}
    if cls is None:
        return base.rl_module(model_config=model_config | {"use_lstm": True, "fcnet_hiddens": [5]})
    return base.rl_module(rl_module_spec=RLModuleSpec(module_class=cls, model_config=model_config))


def play(module, length, rng, **kwargs):
    """An episode whose states, log-probabilities and action distributions are those of the module, step by step.

    With ``t_started`` > 0 it goes on from a state that the step before has left.
    """
    made = episode(length, rng, **kwargs).to_numpy()
    obs = torch.as_tensor(made.get_observations())
    state = batched(module.get_initial_state())
    if kwargs.get("t_started"):
        torch.manual_seed(int(1e6 * abs(float(obs[0, 0]))))
        state = torch.utils._pytree.tree_map(lambda x: torch.randn(x.shape), state)
    states, inputs, values = [state], [], []
    with torch.no_grad():
        for o in obs:
            batch = {Columns.OBS: o[None, None], Columns.STATE_IN: states[-1]}
            out = module.forward_exploration(batch)
            inputs.append(out[Columns.ACTION_DIST_INPUTS][0, 0])
            values.append(float(module.compute_values(batch)[0, 0]))
            states.append(out[Columns.STATE_OUT])
        inputs = torch.stack(inputs)
        logp = inputs[:length].log_softmax(-1)[range(length), made.get_actions()]
    lookback = 1 if kwargs.get("t_started") else 0
    kept = states[1 - lookback : length + 1]
    made.extra_model_outputs = {
        Columns.ACTION_DIST_INPUTS: InfiniteLookbackBuffer(inputs[:length].numpy()),
        Columns.ACTION_LOGP: InfiniteLookbackBuffer(logp.numpy()),
        Columns.STATE_OUT: InfiniteLookbackBuffer(
            torch.utils._pytree.tree_map(lambda *x: torch.cat(x).numpy(), *kept), lookback=lookback
        ),
    }
    return made, values


def batched(state):
    return torch.utils._pytree.tree_map(lambda x: torch.as_tensor(x)[None], state)


@pytest.mark.parametrize("cls", [None, TwoLSTMs, LSTMContainingRLModule], ids=["use_lstm", "custom", "two copies"])
@pytest.mark.parametrize("max_seq_len", [1, 4, 100])
@pytest.mark.parametrize(("num_segments", "segment_length"), [(1, 1000), (9, 9)])
def test_values_and_policies_of_slots_are_those_met_while_sampling(cls, max_seq_len, num_segments, segment_length):
    """With the weights that sampled: wherever episodes are cut, each step meets the state that it met then, so that V
    is the same, log π the recorded one, and V behind a cut or truncated end that of the next observation."""
    learner = config(cls, max_seq_len, segment_length=segment_length).build_learner()
    module = learner.module["default_policy"]
    for p in module.parameters():
        # Two copies of a module start alike.
        p.data += 0.1 * torch.randn_like(p)
    rng = np.random.default_rng(0)
    kinds = [{"terminated": True}, {"truncated": True}, {}, {"t_started": 7}, {"t_started": 3, "terminated": True}]
    played = [play(module, n, rng, **kind) for n, kind in zip((30, 9, 21, 14, 5), kinds, strict=True)]
    batch = learner.build_train_batch([copy.deepcopy(e) for e, _ in played], minibatch_size=80 // num_segments)
    segments = batch.policy_batches["default_policy"].segments
    assert (len(segments) == 1) == (num_segments == 1)
    assert (segments.obs[PLACE] == 0).sum() >= max(5, 79 // max_seq_len)
    players = learner._bilevel_updates["default_policy"]._players
    obs = slots(segments.obs)
    values = players.critic(obs).values.view_as(segments.step)
    actor = players.actor(obs, slots(segments.actions), None)
    difference = actor.logp.view_as(segments.step) - segments.old_logp
    assert difference[segments.step > 0].abs().max() < 1e-5
    expected = {tuple(map(float, o)): v for e, vs in played for o, v in zip(e.get_observations(), vs, strict=True)}
    used = segments.obs[PLACE] >= 0
    found = zip(segments.obs[Columns.OBS][used].tolist(), values[used].tolist(), strict=True)
    assert used.sum() > 79
    for o, v in found:
        assert v == pytest.approx(expected[tuple(o)], abs=1e-5)


def test_checkpointed_learner_makes_the_same_next_update_bit_for_bit(tmp_path):
    learner = config().build_learner()
    rng = np.random.default_rng(0)
    module = learner.module["default_policy"]
    batches = [[play(module, 16, rng, t_started=t)[0] for t in (0, 3)] for _ in range(2)]
    learner.update(episodes=copy.deepcopy(batches[0]), minibatch_size=16, num_epochs=2, timesteps={})
    learner.save_to_path(tmp_path)
    restored = config().build_learner()
    restored.restore_from_path(tmp_path)
    states = []
    for each in (learner, restored):
        each.update(episodes=copy.deepcopy(batches[1]), minibatch_size=16, num_epochs=2, timesteps={})
        states.append(each.get_state(not_components="metrics_logger"))
    assert_equal(*states)


def test_a_learner_without_a_step_takes_part():
    learner = config().build_learner()
    pack = PackSegments(lambda *_: {"default_policy": SegmentPlan(2, 0)}, learner._blank_item)
    columns = pack(rl_module=learner.module, batch={}, shared_data={MINIBATCH_SIZE: 4})["default_policy"]
    segments = learner._segment_batch("default_policy", columns)
    assert len(segments) == 2
    assert segments.step.sum() == 0
    for part in segments.split(1):
        values = learner._bilevel_updates["default_policy"]._players.critic(slots(part.obs)).values
        assert values.isfinite().all()


def test_two_learners_make_the_update_of_one():
    torch.manual_seed(0)
    batch, _ = recurrent_batch()
    shares, after = batch.split(1), []
    settings = replace(SETTINGS, num_epochs=2)
    for size in (1, 2):
        meeting = Meeting(size)
        modules = [two_lstms() for _ in range(size)]

        def run(rank, size=size, meeting=meeting, modules=modules):
            players = RLModulePlayers(modules[rank], "m")
            optimizers = [torch.optim.Adam(p, lr=1e-2) for p in (players.actor_parameters, players.critic_parameters)]
            update = BilevelUpdate(
                players, *optimizers, Hessian, Nystrom(3, 0.5, 1.0), 0, ThreadReduction(meeting, rank)
            )
            update.run(batch if size == 1 else shares[rank], 1, settings)

        with ThreadPoolExecutor(size) as pool:
            list(pool.map(run, range(size)))
        after.append([flatten([p.detach() for p in module.parameters()]) for module in modules])
    ((one,), (first, second)) = after
    assert (one - flatten([p.detach() for p in two_lstms().parameters()])).norm() > 0.1
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, one, rtol=1e-9, atol=1e-11)


def test_minibatches_are_replayed_as_graphs():
    results, recorder = [], HostGraphs()
    for graphs in (None, recorder):
        torch.manual_seed(0)
        module = two_lstms()
        players = RLModulePlayers(module, "m")
        optimizers = [
            torch.optim.Adam(p, lr=1e-2, fused=True) for p in (players.actor_parameters, players.critic_parameters)
        ]
        update = BilevelUpdate(players, *optimizers, Hessian, Nystrom(3, 0.5, 1.0), 0, Reduction(), graphs)
        metrics = [update.run(recurrent_batch()[0], 2, SETTINGS) for _ in range(2)]
        results.append((flatten([p.detach() for p in module.parameters()]), metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert recorder.recordings == 1


def test_what_a_recurrent_module_must_say():
    learner = config(TwoLSTMs, max_seq_len=None).build_learner()
    played, _ = play(learner.module["default_policy"], 9, np.random.default_rng(0))
    with pytest.raises(ValueError, match="max_seq_len=None.*TwoLSTMs must be an integer >= 1"):
        learner.update(episodes=[played], minibatch_size=4, num_epochs=1, timesteps={})


# --- The hypergradient against finite differences -----------------------------------------------------------------


def recurrent_batch():
    """Two segments of nine slots: a cut piece with its bootstrap slot, a terminated one, padding; and another cut."""
    step = torch.ones(2, 9, dtype=FLOAT64)
    step[0, 4] = step[0, 8] = step[1, 8] = 0
    terminated = torch.zeros_like(step)
    terminated[0, 7] = 1
    continues = torch.zeros_like(step)
    continues[0, [0, 1, 2, 5, 6]] = 1
    continues[1, :7] = 1
    # Sequences of at most three steps, and the last slots of the pieces that go on.
    place = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, -1], [0, 1, 2, 0, 1, 2, 0, 1, 2]])
    own = torch.as_tensor(sequences(place.numpy()))
    state = {
        player: {name: torch.randn(2, 9, CELL, dtype=FLOAT64) for name in ("h", "c")} for player in ("actor", "critic")
    }
    masks = Masks(step, terminated, continues)
    return SegmentBatch(
        obs=recurrent_observation(torch.randn(2, 9, OBS_SIZE, dtype=FLOAT64), state, place, own),
        actions=torch.randint(NUM_ACTIONS, (2, 9)),
        old_logp=0.3 * torch.randn(2, 9, dtype=FLOAT64) - 0.7,
        old_dist_inputs=torch.randn(2, 9, NUM_ACTIONS, dtype=FLOAT64),
        rewards=torch.randn(2, 9, dtype=FLOAT64),
        step=step,
        advantage=BlockwiseAdvantage.of(masks, 0.9, 0.8),
    ), masks


class Loops:
    """The same objectives slot by slot, with LSTM equations written out: functions of θ and w."""

    def __init__(self, module, batch, masks, targets):
        self.batch, self.masks, self.targets = batch, masks, targets
        self.shapes = {
            player: [*getattr(module, player).parameters(), *head.parameters()]
            for player, head in (("actor", module.logits), ("critic", module.value))
        }

    def outputs(self, player, vector):
        """The head's outputs in all slots, [B, S, d]; 0 in padding."""
        w_ih, w_hh, b_ih, b_hh, weight, bias = unflatten(vector, self.shapes[player])
        obs, state = self.batch.obs[Columns.OBS], self.batch.obs[Columns.STATE_IN][player]
        rows = []
        for row, row_places in enumerate(self.batch.obs[PLACE].tolist()):
            outputs = []
            for t, place in enumerate(row_places):
                if place == 0:
                    h, c = state["h"][row, t], state["c"][row, t]
                if place >= 0:
                    i, f, g, o = (w_ih @ obs[row, t] + b_ih + w_hh @ h + b_hh).chunk(4)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                outputs.append(weight @ h + bias if place >= 0 else torch.zeros_like(bias))
            rows.append(torch.stack(outputs))
        return torch.stack(rows)

    def values(self, w):
        return self.outputs("critic", w)[..., 0]

    def advantages(self, w):
        values, step = self.values(w), self.masks.step
        rows = []
        for row in range(len(step)):
            adv, advs = 0.0, []
            for t in reversed(range(step.shape[1])):
                follows = values[row, t + 1] if t + 1 < step.shape[1] else 0.0
                delta = (
                    self.batch.rewards[row, t] + 0.9 * (1 - self.masks.terminated[row, t]) * follows - values[row, t]
                )
                adv = step[row, t] * (delta + 0.9 * 0.8 * self.masks.continues[row, t] * adv)
                advs.append(adv)
            rows.append(torch.stack(advs[::-1]))
        return torch.stack(rows)

    def surrogate(self, theta, w, clip):
        logits = self.outputs("actor", theta)
        logp = logits.log_softmax(-1).gather(-1, self.batch.actions[..., None])[..., 0]
        ratio, adv = (logp - self.batch.old_logp).exp(), self.advantages(w)
        return torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv) if clip else ratio * adv

    def leader(self, theta, w):
        return -(self.surrogate(theta, w, 0.2) * self.masks.step).sum() / self.masks.step.sum()

    def follower(self, w):
        return (self.masks.step * (self.targets - self.values(w)) ** 2).sum() / self.masks.step.sum()

    def cross(self, theta, w):
        return -2 * (self.masks.step * self.surrogate(theta, w, None) * (self.targets - self.values(w))).sum()


def differences(function, x, h=1e-6):
    """Central differences of a function of a vector, one row for each of its coordinates."""
    units = h * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * h) for e in units])


def gradient(function, x):
    return torch.autograd.grad(function(x.requires_grad_()), x)[0]


def two_lstms():
    """In float64, always with the same weights."""
    torch.manual_seed(1)
    return TwoLSTMs(
        observation_space=gym.spaces.Box(-1, 1, (OBS_SIZE,), np.float32),
        action_space=gym.spaces.Discrete(NUM_ACTIONS),
        model_config={"max_seq_len": 3},
    ).double()


@pytest.fixture(scope="module")
def oracle():
    """A float64 module, its batch, and by finite differences g_θ, v, the Hessian and the mixed derivative."""
    module = two_lstms()
    players = RLModulePlayers(module, "m")
    batch, masks = recurrent_batch()
    targets = torch.randn(2, 9, dtype=FLOAT64)
    loops = Loops(module, batch, masks, targets)
    w, theta = (flatten([p.detach() for p in ps]) for ps in (players.critic_parameters, players.actor_parameters))
    # The order of the loops' parameters is that of the players.
    for name, parameters in (("critic", players.critic_parameters), ("actor", players.actor_parameters)):
        assert [id(p) for p in loops.shapes[name]] == [id(p) for p in parameters]
    with torch.no_grad():
        expected = {
            "grad_actor": differences(lambda x: loops.leader(x, w), theta),
            "grad_critic": differences(lambda x: loops.leader(theta, x), w),
        }
    expected["hessian"] = differences(lambda x: gradient(loops.follower, x.detach()), w)
    expected["mixed"] = differences(lambda x: gradient(lambda t: loops.cross(t, x), theta.detach()), w)
    return players, batch, targets, expected


SOLVERS = {
    "exact": lambda p: Exact(0.5),
    "nystrom": lambda p: Nystrom(p, 0.5, 1e-9),
    "cg": lambda p: ConjugateGradient(p, 0.5),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_hypergradient_through_the_recurrence(oracle, solver):
    players, batch, targets, expected = oracle
    weights = (batch.step / batch.step.sum()).flatten()
    p = sum(x.numel() for x in players.critic_parameters)
    made = SOLVERS[solver](p)
    indices = made.draw(p, np.random.default_rng(0))
    obs = slots(batch.obs)
    loss = CriticLoss(players.critic(obs), targets.flatten(), weights)
    result = hypergradient(
        actor=players.actor(obs, slots(batch.actions), None),
        loss=loss,
        batch=batch,
        leader=LeaderLoss(clip=0.2),
        correction=Correction(cross_clip=None, bound=0.7),
        solver=made,
        curvature=Hessian(loss, Reduction()),
        coordinates=None if indices is None else players.coordinates(indices),
        reduction=Reduction(),
    )
    x = torch.linalg.solve(expected["hessian"] + 0.5 * torch.eye(p, dtype=FLOAT64), expected["grad_critic"])
    mixed, g = x @ expected["mixed"], expected["grad_actor"]
    assert mixed.norm() > 0.7 * g.norm(), "the bound must act in this test"
    for actual, wanted in (
        (result.grad_actor, g),
        (result.grad_critic, expected["grad_critic"]),
        (result.ihvp, x),
        (result.mixed_product, mixed),
        (result.direction, g - 0.7 * g.norm() / mixed.norm() * mixed),
    ):
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()


def test_rows_of_the_hessian_in_one_pass_are_those_one_by_one(oracle):
    players, batch, targets, expected = oracle
    weights = (batch.step / batch.step.sum()).flatten()
    critic = players.critic(slots(batch.obs))
    loss = CriticLoss(critic, targets.flatten(), weights)
    coordinates = players.coordinates(np.array([3, 20, 41]))
    rows = critic.second_order_rows(coordinates, loss.cotangent, 2 * weights)
    critic._batched = False
    torch.testing.assert_close(rows, critic.second_order_rows(coordinates, loss.cotangent, 2 * weights))
    assert (rows - expected["hessian"][coordinates.index]).norm() <= 1e-7 * rows.norm()


def test_the_table_in_the_docs_is_that_of_the_results():
    page = stateless_cartpole.PAGE.read_text()
    between = page[
        page.index(stateless_cartpole.BEGIN) + len(stateless_cartpole.BEGIN) : page.index(stateless_cartpole.END)
    ]
    assert between.strip() == stateless_cartpole.table(stateless_cartpole.load())


@pytest.mark.slow
def test_learns_a_task_that_needs_memory():
    curve = stateless_cartpole.run("blpo", 0, 300_000, stateless_cartpole.SUCCESS)["curve"]
    ray.shutdown()
    assert curve[-1][1] >= stateless_cartpole.SUCCESS
    assert curve[-1][0] <= 300_000 + 1100
