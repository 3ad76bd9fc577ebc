"""Several learners compute the update that one learner computes on the joined batch, and every sum is needed."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from episodes import OBS_SIZE
from problems import SmallPlayers, compiled_kernels, random_batch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import SelfSupervisedLossAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from test_update import SETTINGS, weights

from blpo_rllib import BLPOConfig
from blpo_rllib.core.added_losses import AddedLosses
from blpo_rllib.core.advantages import AdvantageRule
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.gae import Masks, advantage_operator
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.ihvp import ConjugateGradient, Exact, Nystrom
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch, SegmentPlan
from blpo_rllib.core.update import BilevelUpdate
from blpo_rllib.learning.learner import BLPOTorchLearner
from blpo_rllib.learning.rl_module import BLPOTorchRLModule

NUM_UPDATES = 20
SHUFFLED_STEPS = {"advantage_horizon": "rollout", "segment_length": 1}


class Meeting:
    """Where N threads sum tensors, each as if it were a process; ``leave_out`` names an exchange that is skipped."""

    def __init__(self, size, leave_out=None):
        self._barrier, self._slots = threading.Barrier(size, timeout=60), [None] * size
        self.leave_out = leave_out

    def exchange(self, rank, x):
        self._slots[rank] = x
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone


class ThreadReduction(Reduction):
    def __init__(self, meeting, rank):
        self._meeting, self.rank, self.calls = meeting, rank, 0

    def sum_all(self, tensors):
        call, self.calls = self.calls, self.calls + 1
        everyone = self._meeting.exchange(self.rank, list(tensors))
        if self._meeting.leave_out is not None and self._meeting.leave_out(call):
            return list(tensors)
        return [torch.stack(parts).sum(0) for parts in zip(*everyone)]


def shares(batch, masks, cuts, kernels):
    """The batch cut into consecutive shares, one a process."""
    bounds = [0, *cuts, len(batch)]
    parts = []
    for a, b in zip(bounds, bounds[1:]):
        tensors = {name: getattr(batch, name)[a:b] for name in batch._tensors}
        own = Masks(masks.step[a:b], masks.terminated[a:b], masks.continues[a:b])
        parts.append(SegmentBatch(**tensors, advantage=advantage_operator(own, 0.9, 0.8, kernels)))
    return parts


def masked_batch(num_segments, seed):
    """Random segments of very unequal lengths, one of them blank."""
    torch.manual_seed(seed)
    batch = random_batch(num_segments=num_segments)
    step = batch.step.clone()
    step[1, 4:] = 0
    step[-1] = 0
    terminated = torch.zeros_like(step)
    terminated[:, 5] = step[:, 5]
    continues = step * torch.nn.functional.pad(step[:, 1:], (0, 1)) * (1 - terminated)
    return replace(batch, step=step), Masks(step, terminated, continues)


def shared_batch(seed, cuts, dtype, kernels):
    batch, masks = masked_batch(6, seed)
    batch = replace(batch, **{name: x.to(dtype) for name, x in batch._tensors.items()})
    masks = Masks(*(getattr(masks, name).to(dtype) for name in ("step", "terminated", "continues")))
    return shares(batch, masks, cuts, kernels)


class StepMeans(AddedLosses):
    """Means over steps, NaN where there is none, and functions of the parameters alone."""

    def __init__(self, players):
        self.players = players

    def _mean(self, batch, function):
        actions, values = self.players.actor_network(batch.obs), self.players.critic_network(batch.obs)[:, 0]
        return function(actions, values)[batch.segments.step.flatten() > 0].mean()

    def leader(self, batch):
        return self._mean(batch, lambda mean, v: 0.3 * mean.square().sum(1) * v)

    def follower(self, batch):
        decay = 0.1 * sum(p.square().sum() for p in self.players.critic_parameters)
        return decay + self._mean(batch, lambda mean, v: 0.3 * v**4 + 0.2 * v * mean.sum(1))

    def both(self, batch):
        return self._mean(batch, lambda mean, v: 0.2 * (mean.sum(1) * v).square())


def train(solver, curvature, settings, cuts, dtype, kernels=None, leave_out=None, added=lambda players: None):
    """Weights after NUM_UPDATES updates on whole batches, shared between len(cuts) + 1 processes."""
    size = len(cuts) + 1
    meeting = Meeting(size, leave_out)
    torch.manual_seed(0)
    players = [SmallPlayers(by_hand=True)]
    for network in (players[0].critic_network, players[0].actor_network):
        network.to(dtype)
    players[0].log_std.data = players[0].log_std.data.to(dtype)
    players += [copy.deepcopy(players[0]) for _ in range(size - 1)]
    for p in players:
        p.kernels = kernels
        p.critic_parameters = list(p.critic_network.parameters())
        p.actor_parameters = [*p.actor_network.parameters(), p.log_std]
    reductions = [ThreadReduction(meeting, rank) for rank in range(size)]
    batches = [shared_batch(number, cuts, dtype, kernels) for number in range(NUM_UPDATES // settings.num_epochs)]

    def run(rank):
        optimizers = [
            torch.optim.Adam(parameters, lr=lr, eps=1e-5, fused=True)
            for parameters, lr in ((players[rank].actor_parameters, 3e-3), (players[rank].critic_parameters, 1e-2))
        ]
        update = BilevelUpdate(
            players[rank],
            *optimizers,
            curvature,
            copy.deepcopy(solver),
            0,
            reductions[rank],
            kernels=kernels,
            added=added(players[rank]),
        )
        for batch in batches:
            metrics = update.run(batch[rank], 1, settings)
        return weights(players[rank]), metrics

    with ThreadPoolExecutor(size) as pool:
        results = [future.result() for future in [pool.submit(run, rank) for rank in range(size)]]
    for other, other_metrics in results[1:]:
        assert torch.equal(other, results[0][0]) or leave_out is not None, "learners must stay equal to the bit"
        assert other_metrics == pytest.approx(results[0][1]) or leave_out is not None
    return *results[0], reductions[0].calls


def error(a, b):
    return float((a - b).norm() / b.norm())


SOLVERS = {
    "nystrom": Nystrom(3, 0.1),
    "redrawn": Nystrom(3, 0.1, redraw=True),
    "cg": ConjugateGradient(4, 1.0),
    "exact": Exact(1.0),
    "none": None,
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Processes are threads here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
@pytest.mark.parametrize("solver", SOLVERS)
def test_unequal_shards_change_nothing(solver, curvature):
    alone, metrics, _ = train(SOLVERS[solver], curvature, SETTINGS, (), torch.float64)
    # Two, three, and two of which one has nothing but a blank segment.
    for cuts in ((1,), (1, 3), (5,)):
        shared, shared_metrics, _ = train(SOLVERS[solver], curvature, SETTINGS, cuts, torch.float64)
        assert error(shared, alone) < 1e-10, cuts
        assert shared_metrics == pytest.approx(metrics, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_single_precision(kernels):
    kernels = compiled_kernels() if kernels else None
    alone, *_ = train(Nystrom(3, 50.0), Hessian, SETTINGS, (), torch.float32, kernels)
    shared, *_ = train(Nystrom(3, 50.0), Hessian, SETTINGS, (1, 2), torch.float32, kernels)
    assert error(shared, alone) < 1e-5


def test_penalties_and_clipping():
    settings = replace(SETTINGS, leader=LeaderLoss(0.1, entropy_coeff=0.01, kl_coeff=0.5), grad_clip=0.1)
    alone, *_ = train(Nystrom(3, 0.1), Hessian, settings, (), torch.float64)
    shared, *_ = train(Nystrom(3, 0.1), Hessian, settings, (2,), torch.float64)
    assert error(shared, alone) < 1e-10


@pytest.mark.parametrize("cross_reduction", ["mean", "sum"])
@pytest.mark.parametrize("solver", ["nystrom", "cg"])
def test_added_losses(solver, cross_reduction):
    """Of the last share, which has nothing but a blank segment, they are NaN."""
    settings = replace(SETTINGS, correction=Correction(1.0, 0.7, cross_reduction))
    alone, *_ = train(SOLVERS[solver], Hessian, settings, (), torch.float64, added=StepMeans)
    without, *_ = train(SOLVERS[solver], Hessian, settings, (), torch.float64)
    assert error(alone, without) > 1e-3
    for cuts in ((1, 3), (5,)):
        shared, metrics, _ = train(SOLVERS[solver], Hessian, settings, cuts, torch.float64, added=StepMeans)
        assert error(shared, alone) < 1e-10, cuts
        assert metrics["hypergradient_fallbacks"] == 0


@pytest.mark.parametrize("rule", [AdvantageRule("minibatch", True), AdvantageRule("epoch", True)])
def test_standardised_advantages_and_a_correction_of_the_batch(rule):
    settings = replace(SETTINGS, advantages=rule, correction=Correction(1.0, 0.7, sample="batch"))
    alone, *_ = train(Nystrom(3, 0.1), Hessian, settings, (), torch.float64)
    for cuts in ((2,), (1, 3), (5,)):
        shared, *_ = train(Nystrom(3, 0.1), Hessian, settings, cuts, torch.float64)
        assert error(shared, alone) < 1e-10, cuts


def test_limits_on_the_kl_divergence():
    """An iteration ends, and the rate falls, by the divergence of all shares: here after the first of two epochs."""
    settings = replace(SETTINGS, max_kl=1e-9, target_kl=1e-9)
    alone, metrics, _ = train(Nystrom(3, 0.1), Hessian, settings, (), torch.float64)
    assert metrics["epochs"] == 1
    assert metrics["actor_rate_factor"] < 1
    for cuts in ((2,), (1, 3), (5,)):
        shared, shared_metrics, _ = train(Nystrom(3, 0.1), Hessian, settings, cuts, torch.float64)
        assert error(shared, alone) < 1e-10, cuts
        assert shared_metrics["actor_rate_factor"] == metrics["actor_rate_factor"]


@pytest.mark.parametrize("solver", ["nystrom", "cg", "none"])
def test_without_any_one_of_its_sums_the_result_is_another(solver):
    """Mutation: skip the i-th exchange of every update phase, for each i that touches the weights."""
    settings = replace(SETTINGS, num_epochs=1)
    alone, *_ = train(SOLVERS[solver], Hessian, settings, (), torch.float64)
    _, _, calls = train(SOLVERS[solver], Hessian, settings, (2,), torch.float64)
    per_phase = calls // NUM_UPDATES
    # Steps per minibatch; N nested gradients; g_θ, v and rows in one; CG's products; the mixed product.
    expected = 1 + settings.num_critic_updates + {"nystrom": 2, "cg": 2 + SOLVERS["cg"].iterations, "none": 1}[solver]
    # Behind those, what only enters metrics: the sums of the phase, and one product for the residual.
    assert per_phase == expected + (1 if solver == "none" else 2)
    for site in range(expected):
        mutated, *_ = train(
            SOLVERS[solver],
            Hessian,
            settings,
            (2,),
            torch.float64,
            leave_out=lambda call, s=site: call % per_phase == s,
        )
        assert not error(mutated, alone) < 1e-6, f"exchange {site} of {expected} does nothing"


@pytest.mark.parametrize("seed", range(20))
def test_plans_agree(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 400, rng.integers(1, 6)).tolist()
    counts[0] += 1
    size, length = int(rng.integers(1, 200)), int(rng.integers(1, 200))
    plans = [SegmentPlan.of(counts, rank, size, length) for rank in range(len(counts))]
    assert len({plan.num_minibatches for plan in plans}) == 1
    for plan, count in zip(plans, counts):
        assert plan.num_segments <= count
        assert (plan.num_segments > 0) == (count > 0)
        assert plan.num_rows % plan.num_minibatches == 0
        assert plan.num_rows >= max(1, plan.num_segments)
    assert max(plan.num_segments for plan in plans) >= plans[0].num_minibatches


def test_single_steps_are_rows_of_their_own():
    plan = SegmentPlan.of([249], 0, 64, 1)
    assert (plan.num_segments, plan.num_rows) == (249, 4 * 63)
    # Two rows would be blank, which might meet in one minibatch.
    assert SegmentPlan.of([4], 0, 1, 1) == SegmentPlan(4, 4)
    assert SegmentPlan.of([4], 0, 2, 1).num_segments == 4
    assert SegmentPlan.of([4, 2], 0, 1, 1).num_segments == 3


class DoubleModule(BLPOTorchRLModule):
    """In float64."""

    def setup(self):
        super().setup()
        self.double()


def group_config(num_learners, modules, **training):
    space = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
    spec = RLModuleSpec(
        module_class=DoubleModule,
        observation_space=space,
        action_space=gym.spaces.Discrete(2),
        model_config={"fcnet_hiddens": [8, 8], "vf_share_layers": False},
    )
    return (
        BLPOConfig()
        .environment(observation_space=space, action_space=gym.spaces.Discrete(2))
        .multi_agent(policies=set(modules), policy_mapping_fn=lambda agent_id, episode, **kw: agent_id)
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs=dict.fromkeys(modules, spec)))
        .learners(num_learners=num_learners, num_cpus_per_learner=0.3)
        .training(minibatch_size=None, num_epochs=2, normalize_rewards=True, **({"segment_length": 1000} | training))
        .debugging(seed=5)
    )


def module_episode(module_id, length, rng):
    """An episode of one agent under the module of its own name."""
    return SingleAgentEpisode(
        agent_id=module_id,
        module_id=module_id,
        observations=list(rng.normal(size=(length + 1, OBS_SIZE)).astype(np.float32)),
        actions=list(rng.integers(2, size=length)),
        rewards=list(rng.normal(size=length)),
        extra_model_outputs={
            Columns.ACTION_LOGP: list(np.full(length, -0.7, np.float32)),
            Columns.ACTION_DIST_INPUTS: list(np.zeros((length, 2), np.float32)),
        },
        terminated=bool(rng.integers(2)),
        len_lookback_buffer=0,
    ).to_numpy()


def iteration_episodes(number):
    """Of module a many episodes, of module b a single one: some learner gets none of it."""
    rng = np.random.default_rng(number)
    return [module_episode("a", int(n), rng) for n in rng.integers(5, 41, 5)] + [module_episode("b", 40, rng)]


def parameters_of(learner):
    """RLlib's own get_state() would round to float32."""
    return {f"{m}.{n}": p for m in ("a", "b") for n, p in learner.module[m].unwrapped().named_parameters()}


def set_weights(learner):
    """Equal weights whatever a learner's build has drawn before."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters_of(learner).values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def get_weights(learner):
    return {name: p.detach().numpy().copy() for name, p in parameters_of(learner).items()}


def update_learner(learner, shards, minibatch_size=None):
    learner.update(episodes=shards[learner._reduction.rank], num_epochs=2, minibatch_size=minibatch_size, timesteps={})


def group_weights(num_learners, **training):
    """Weights of both modules after NUM_UPDATES updates by a learner group, each learner given every n-th episode."""
    config = group_config(num_learners, ("a", "b"), **training)
    group = config.build_learner_group()
    group.foreach_learner(set_weights)
    for number in range(NUM_UPDATES // 2):
        episodes = iteration_episodes(number)
        shards = [episodes[i :: max(1, num_learners)] for i in range(max(1, num_learners))]
        if number % 4 == 3:
            # Nothing at all for the last learner.
            shards = [episodes, *([] for _ in shards[1:])]
        results = group.foreach_learner(partial(update_learner, shards=shards))
        assert all(result.ok for result in results), [result.get() for result in results]
    everyone = [result.get() for result in group.foreach_learner(get_weights)]
    group.shutdown()
    for other in everyone[1:]:
        for name, value in other.items():
            np.testing.assert_array_equal(value, everyone[0][name])
    vector = np.concatenate([np.ravel(x) for x in everyone[0].values()])
    assert vector.dtype == np.float64
    return vector


@pytest.fixture(scope="module")
def ray_instance():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_instance")
@pytest.mark.parametrize(
    "training",
    [
        {"hypergradient": "nystrom"},
        # Single steps, because rollouts that are cut at other places have other advantages.
        dict(SHUFFLED_STEPS, standardize_advantages=True, correction_sample="batch"),
        pytest.param({"hypergradient": ConjugateGradient(4, 1.0)}, marks=pytest.mark.slow),
        pytest.param({"hypergradient": "none"}, marks=pytest.mark.slow),
    ],
    ids=lambda training: "_".join(map(str, training.values())),
)
def test_learner_groups_of_any_size_agree(training):
    """Real processes meeting over gloo; two modules, one of which some learner has no step of; scaled rewards."""
    alone = group_weights(0, **training)
    for num_learners in (2, 3):
        shared = group_weights(num_learners, **training)
        assert np.linalg.norm(shared - alone) < 1e-10 * np.linalg.norm(alone), num_learners


class AddingLearner(BLPOTorchLearner):
    """The gradient of V in w through the leader's loss, an entropy through the follower's; NaN without a step."""

    def compute_leader_loss_for_module(self, *, module_id, config, batch, fwd_out):
        values = self.module[module_id].unwrapped().compute_values({Columns.OBS: batch[Columns.OBS]})
        return -0.1 * (values * self._entropy(fwd_out))[batch[Columns.LOSS_MASK]].mean()

    def compute_follower_loss_for_module(self, *, module_id, config, batch, fwd_out):
        values = self.module[module_id].unwrapped().compute_values({Columns.OBS: batch[Columns.OBS]})
        return (values.square() * self._entropy(fwd_out))[batch[Columns.LOSS_MASK]].mean()

    def _entropy(self, fwd_out):
        return torch.distributions.Categorical(logits=fwd_out[Columns.ACTION_DIST_INPUTS]).entropy()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_learner_groups_of_any_size_agree_with_added_losses():
    alone = group_weights(0, learner_class=AddingLearner)
    assert np.linalg.norm(alone - group_weights(0)) > 1e-3 * np.linalg.norm(alone)
    shared = group_weights(2, learner_class=AddingLearner)
    assert np.linalg.norm(shared - alone) < 1e-10 * np.linalg.norm(alone)


class RewardModel(TorchRLModule, SelfSupervisedLossAPI):
    """Neither policy nor value function: predicts rewards, by a loss of its own."""

    def setup(self):
        self.layer = torch.nn.Linear(OBS_SIZE, 1, dtype=torch.float64)

    def _forward(self, batch, **kwargs):
        return {"prediction": self.layer(batch[Columns.OBS].double())[..., 0]}

    def compute_self_supervised_loss(self, *, learner, module_id, config, batch, fwd_out):
        return (fwd_out["prediction"] - batch[Columns.REWARDS]).square().mean()


def weights_beside_a_model(shares, minibatch_size=None):
    """Weights after one update of a module "a" and a model "b", by a learner for each share: its episodes' modules."""
    config = group_config(0 if len(shares) == 1 else len(shares), ("a", "b"))
    model = RLModuleSpec(RewardModel, observation_space=config.observation_space, action_space=config.action_space)
    specs = {"a": config.rl_module_spec.rl_module_specs["a"], "b": model}
    config.rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs=specs))
    rng = {module_id: np.random.default_rng(number) for number, module_id in enumerate("ab")}
    shards = [[module_episode(module_id, 20, rng[module_id]) for module_id in share] for share in shares]
    group = config.build_learner_group()
    group.foreach_learner(set_weights)
    results = group.foreach_learner(partial(update_learner, shards=shards, minibatch_size=minibatch_size))
    assert all(result.ok for result in results), [result.get() for result in results]
    everyone = [result.get() for result in group.foreach_learner(get_weights)]
    group.shutdown()
    for other in everyone[1:]:
        for name, value in other.items():
            np.testing.assert_array_equal(value, everyone[0][name])
    return everyone[0]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_models_without_values_beside_others_in_learner_groups():
    start, alone, shared = (weights_beside_a_model(shares) for shares in (["a"], ["abab"], ["ab", "ab"]))
    for name, value in alone.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-9, atol=1e-12)
    assert np.abs(alone["b.layer.weight"] - start["b.layer.weight"]).min() > 1e-6
    # Shares that would make unequal numbers of minibatches, and a learner with nothing for the model.
    uneven = weights_beside_a_model(["abbb", "ab"], 10)
    assert np.abs(uneven["b.layer.weight"] - start["b.layer.weight"]).min() > 1e-6
    one_sided = weights_beside_a_model(["ab", "a"])
    np.testing.assert_array_equal(one_sided["b.layer.weight"], start["b.layer.weight"])
