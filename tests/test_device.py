"""What the update asks of an accelerator, counted on a device without hardware."""

from collections import Counter
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
import tree
from episodes import OBS_SIZE, episode
from fake_device import DEVICE, fake_device
from ray.rllib.core.columns import Columns
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from blpo_rllib import BLPOConfig
from blpo_rllib.core import mlp
from blpo_rllib.core.ihvp import nystrom
from blpo_rllib.learning.connectors import SEGMENT_CONTINUES, SEGMENT_STEP, BatchSizes, PackSegments
from blpo_rllib.learning.recurrence import max_sequence_length, recurrent_observation, sequences
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG
from blpo_rllib.learning.train_batch import ModuleSegments

MODULE = "default_policy"
FLOAT = 4
# Arrays of all units of a critic of 64 and 64 units that a pass and its derivatives take at a time, per slot.
ACTIVATIONS = 8 * (64 + 64)
BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
VECTOR = gym.spaces.Box(-np.inf, np.inf, (11,), np.float32)
ACTIONS = gym.spaces.Discrete(4)
IMAGE = gym.spaces.Box(-1, 1, (10, 10, 4), np.float32)
LSTM = {"use_lstm": True, "lstm_cell_size": 16, "max_seq_len": 2, "fcnet_hiddens": [16]}
CONVOLUTIONS = {"conv_filters": [[8, 3, 2], [16, 3, 2]], "conv_activation": "relu", "head_fcnet_hiddens": [32]}


def build(observation_space=VECTOR, action_space=BOX, model=None, **training):
    """A learner on the fake device."""
    config = (
        BLPOConfig()
        .environment(observation_space=observation_space, action_space=action_space)
        .rl_module(model_config=REFERENCE_MODEL_CONFIG | (model or {}))
        .training(train_batch_size_per_learner=1024, minibatch_size=128, **training)
        .env_runners(num_envs_per_env_runner=8)
    )
    learner = config.build_learner()
    # RLlib makes it in a way that the fake device does not know.
    learner.curr_kl_coeffs_per_module[MODULE] = torch.zeros((), device=DEVICE)
    return learner


def coordinates(learner, num_segments, width):
    """A batch of segments as the connectors hand it over."""
    module = learner.module[MODULE].unwrapped()
    shape = num_segments, width
    discrete = isinstance(module.action_space, gym.spaces.Discrete)
    outputs = module.action_space.n if discrete else 2 * module.action_space.shape[0]
    actions = torch.zeros(shape, dtype=torch.int64) if discrete else torch.zeros(*shape, *module.action_space.shape)
    floats = {
        Columns.OBS: module.observation_space.shape,
        Columns.ACTION_LOGP: (),
        Columns.ACTION_DIST_INPUTS: (outputs,),
        Columns.REWARDS: (),
        Columns.TERMINATEDS: (),
    }
    batch = {name: torch.zeros(*shape, *size) for name, size in floats.items()} | {Columns.ACTIONS: actions}
    if module.is_stateful():
        place = np.arange(width)[None].repeat(num_segments, 0) % max_sequence_length(module)
        state = tree.map_structure(lambda x: torch.zeros(*shape, *x.shape), module.get_initial_state())
        extra = torch.as_tensor(place), torch.as_tensor(sequences(place))
        batch[Columns.OBS] = recurrent_observation(batch[Columns.OBS], state, *extra)
    batch |= {name: torch.ones(shape, dtype=torch.bool) for name in (SEGMENT_STEP, SEGMENT_CONTINUES)}
    return tree.map_structure(lambda x: x.to(DEVICE), batch)


@dataclass(frozen=True)
class Account:
    """What minibatches cost beyond what a phase costs once, and the memory of a phase.

    Attributes:
        kernels: Kernels per minibatch.
        waits: Reads and copies, in either direction, per phase and minibatch, by line.
        batch: Floats of a batch with all its coordinates and the operators of its advantages.
        peak: Most floats in use during a phase, beyond what is there before it.
        num_parameters: p, of the critic.
    """

    kernels: float
    waits: Counter
    batch: float
    peak: float
    num_parameters: int


def account(change=None, width=128, **settings):
    """Runs a phase of one epoch in two minibatches, then one in four, on the fake device."""
    kernels, waits = [], []
    with fake_device() as books:
        learner = build(**settings)
        if change is not None:
            change(learner)
        before = books.bytes
        batch = coordinates(learner, 4, width)
        segments = learner._segment_batch(MODULE, batch)
        size = (books.bytes - before) / FLOAT
        for num_minibatches in (2, 4):
            before = books.bytes
            books.reset()
            sizes = BatchSizes(num_minibatches, num_steps=4 * width, num_items=4 * width + 4)
            learner._update({MODULE: ModuleSegments(segments, None, sizes, num_epochs=1)})
            kernels.append(sum(books.kernels.values()))
            waits.append(books.reads + books.uploads + books.downloads)
        critic = learner._bilevel_updates[MODULE]._players.critic_parameters
        return Account(
            kernels=(kernels[1] - kernels[0]) / 2,
            waits=waits[1] - waits[0],
            batch=size,
            peak=(books.peak - before) / FLOAT,
            num_parameters=sum(p.numel() for p in critic),
        )


def automatic(learner):
    """No derivatives by hand."""
    players = learner._bilevel_updates[MODULE]._players
    players._critic_mlp = players._actor_mlp = None


def frozen(learner):
    """Convolutions are not trained: a minibatch begins with what they make of its images."""
    learner.module[MODULE].unwrapped().encoder.requires_grad_(False)


# Settings, and the most kernels that a minibatch may take.
CASES = {
    "gaussian": ({}, 490),
    "categorical": ({"action_space": ACTIONS}, 470),
    "free log-std": ({"model": {"free_log_std": False}}, 520),
    "penalties and clipping": ({"entropy_coeff": 0.01, "use_kl_loss": True, "grad_clip": 0.5}, 610),
    "nested PPO": ({"hypergradient": "none"}, 280),
    "scaled identity": ({"hypergradient": "scaled_identity"}, 380),
    "conjugate gradient": ({"hypergradient": "cg"}, 1770),
    "exact": ({"hypergradient": "exact", "model": {"fcnet_hiddens": [8]}}, 390),
    "gauss-newton": ({"curvature": "gauss_newton"}, 450),
    "redrawn": ({"nystrom_redraw": True}, 490),
    "three layers": ({"model": {"fcnet_hiddens": [64, 64, 64]}}, 610),
    "automatic": ({"change": automatic}, 550),
    "convolutions": ({"observation_space": IMAGE, "action_space": ACTIONS, "model": CONVOLUTIONS}, 580),
    "frozen convolutions": (
        {"observation_space": IMAGE, "action_space": ACTIONS, "model": CONVOLUTIONS, "change": frozen},
        320,
    ),
    "convolutions, redrawn": (
        {"observation_space": IMAGE, "action_space": ACTIONS, "model": CONVOLUTIONS, "nystrom_redraw": True},
        # More than that where a draw falls on convolutions.
        700,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_minibatch_stays_on_the_device(name):
    settings, most_kernels = CASES[name]
    found = account(**settings)
    assert not found.waits, "the host waits or copies once per minibatch"
    assert found.kernels <= most_kernels


def bound(found, rank, width, chunk):
    """The most floats a phase may take: rows and batch twice, activations of a minibatch, and a part of the rows."""
    return 2 * (rank * found.num_parameters + found.batch) + ACTIVATIONS * width + chunk / FLOAT


@pytest.mark.parametrize(
    ("curvature", "rank", "width", "chunk"),
    [("hessian", 40, 1000, 2**24), ("hessian", 5, 4000, 2**21), ("gauss_newton", 40, 1000, 2**22)],
    ids=["some rows at a time", "a part of the slots at a time", "gauss-newton"],
)
def test_memory_is_that_of_rows_and_batch(curvature, rank, width, chunk, monkeypatch):
    """The arrays of units per row stay within their budget."""
    settings = {"nystrom_rank": rank, "curvature": curvature, "width": width}
    monkeypatch.setattr(mlp, "BLOCK_BYTES", chunk)
    found = account(**settings)
    assert found.peak <= bound(found, rank, width, chunk)
    monkeypatch.setattr(mlp, "BLOCK_BYTES", 2**40)
    assert account(**settings).peak > bound(found, rank, width, chunk), "rows made at once must be found"


@pytest.mark.parametrize(
    "pixels", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["perceptron", "convolutions"]
)
def test_a_critic_of_a_hundred_million_parameters_streams_its_rows(pixels, monkeypatch):
    """Twenty rows of it would take 8 GB; beside gradient, v and x there are only parts of them."""
    settings = {"nystrom_rank": 20, "model": {"fcnet_hiddens": [10_000, 10_000]}, "width": 16}
    if pixels:
        model = CONVOLUTIONS | {"head_fcnet_hiddens": [10_000, 10_000], "head_fcnet_activation": "tanh"}
        settings |= {"model": model, "observation_space": IMAGE, "action_space": ACTIONS}
    found = account(**settings)
    assert found.num_parameters > 1e8
    # Of an actor that is differentiated automatically, the gradient is there tensor by tensor too.
    most = (7 + pixels) * found.num_parameters + 3 * mlp.BLOCK_BYTES / FLOAT
    assert found.peak <= most
    assert not found.waits
    monkeypatch.setattr(nystrom, "KEPT_NUMBERS", 2**60)
    assert account(**settings).peak > most, "rows kept must be found"


def whole_update(**settings):
    """The books of an update from episodes to metrics, by RLlib's learner."""
    rng = np.random.default_rng(0)
    episodes = [episode(128, rng, **kind) for kind in ({"terminated": True}, {"truncated": True}, {}, {})]
    with fake_device() as books:
        learner = build(observation_space=gym.spaces.Box(-9, 9, (OBS_SIZE,)), action_space=ACTIONS, **settings)
        books.reset()
        learner.update(episodes=episodes, minibatch_size=128, num_epochs=2, timesteps={})
    return books


# An observation of four floats, action, log-probability, distribution of two floats, reward and end of each item; and
# of each slot, of a width that is rounded up, its item, whether it is a step, and whether it goes on.
SENT = (4 * 128 + 4) * (16 + 8 + 4 + 8 + 4 + 1) + 4 * 132 * (8 + 1 + 1)


@pytest.mark.parametrize("horizon", ["segment", "rollout"])
def test_a_batch_is_sent_once_and_never_read_back(horizon, monkeypatch):
    books = whole_update(advantage_horizon=horizon)
    assert not books.downloads
    assert sum(x for line, x in books.sent.items() if "connectors" in line) == SENT
    # Beside it, the order of segments in each epoch and the drawn coordinates.
    assert sum(books.sent.values()) <= SENT + 2 * 4 * 8 + 5 * 4 * 8
    # The metrics, at the end of the phase, and the coefficient of a penalty before it.
    assert {line.split(":")[0] for line in books.reads} == {"core/update.py", "learning/learner.py"}
    assert len(books.reads) == 3
    if horizon == "segment":
        send = PackSegments._send
        monkeypatch.setattr(PackSegments, "_send", lambda self, x: (send(self, x), send(self, x))[1])
        assert sum(whole_update().sent.values()) > 2 * SENT
        pack = PackSegments.__call__
        early = lambda self, batch, **rest: pack(self, batch=convert_to_torch_tensor(batch, device=DEVICE), **rest)
        monkeypatch.setattr(PackSegments, "__call__", early)
        with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
            whole_update()


def recurrent(change=None):
    """Two sequences a minibatch and segment, rows of the Hessian redrawn for each."""
    return account(change, width=4, model=LSTM, nystrom_rank=2, nystrom_redraw=True, num_critic_updates=1)


def test_a_recurrent_minibatch_stays_on_the_device():
    found, kept = recurrent(), []
    num_parameters, num_slots = found.num_parameters, 8
    # Rows and batch twice, four vectors, and for each row and the gradient 30 numbers per unit of the recurrence.
    most = 2 * (2 * num_parameters + found.batch) + 4 * num_parameters + (2 + 1) * 30 * 16 * num_slots
    assert not found.waits
    assert found.kernels <= 900
    assert found.peak <= most

    def fault(weights):
        kept.append(weights.new_empty(2 * num_parameters))
        for _ in range(50):
            weights = weights + 1
        return int(weights.argmax())

    faulty = recurrent(with_fault(fault))
    assert faulty.waits, "sequences whose number or length the device tells"
    assert faulty.kernels > 900
    assert faulty.peak > most, "rows that outlive their minibatch"


def with_fault(fault):
    """A change of the learner by which each minibatch begins with ``fault``."""

    def change(learner):
        update = learner._bilevel_updates[MODULE]._minibatch_update
        critic_loss = update.critic_loss

        def faulty(minibatch):
            fault(minibatch.weights)
            return critic_loss(minibatch)

        update.critic_loss = faulty

    return change


def test_every_check_finds_its_fault():
    waits = {
        "a read": lambda x: float(x[0, 0]),
        "a condition": lambda x: bool((x > 0).all()),
        "a download": lambda x: x.cpu(),
        "an upload": lambda x: torch.zeros(3).to(x.device),
    }
    for fault in waits.values():
        assert account(with_fault(fault)).waits
    with pytest.raises(RuntimeError, match="all tensors to be on the same device|Unhandled FakeTensor Device"):
        account(with_fault(lambda x: x + torch.ones(x.shape)))
    with pytest.raises(DynamicOutputShapeException):
        account(with_fault(lambda x: x[x > 0]))
    sound, settings = account(), CASES["gaussian"]
    assert account(with_fault(lambda x: x + 1)).kernels > sound.kernels
    assert sound.kernels <= settings[1]
