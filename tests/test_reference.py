"""The hypergradient against the published JAX implementation's numbers, minibatch by minibatch.

The files named by ``BLPO_REFERENCE_DIR`` (default: ``tests/reference``) hold the inputs, settings and results.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import compiled_kernels
from torch import nn

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.curvature import CriticLoss, Hessian
from blpo_rllib.core.gae import Masks, advantage_operator
from blpo_rllib.core.hypergradient import Correction, LeaderLoss, hypergradient
from blpo_rllib.core.ihvp import ConjugateGradient, IHVPSolver, Nystrom
from blpo_rllib.core.mlp import MLP, MLPActorPass
from blpo_rllib.core.mlp_native import critic_pass, forward_pass
from blpo_rllib.core.networks import AutogradActorPass, AutogradCriticPass, Coordinates, flatten
from blpo_rllib.core.policy_heads import CategoricalTerms, GaussianTerms
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch

REFERENCE = Path(os.environ.get("BLPO_REFERENCE_DIR", Path(__file__).parent / "reference"))
FILES = sorted(REFERENCE.glob("*.npz"))
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
CORE_SHIFT = 1.0


def test_reference_files_exist():
    assert FILES, f"no .npz file in {REFERENCE}: set BLPO_REFERENCE_DIR to the folder that holds them"


class Case:
    """One minibatch of one file."""

    def __init__(self, file, case, dtype, by_hand=False, kernels=None):
        self._by_hand, self._kernels = by_hand, kernels
        self._arrays = {k.removeprefix(case + "/"): v for k, v in file.items() if k.startswith(case + "/")}
        self._dtype = dtype
        self.batch = self._batch(float(file["config/gamma"]), float(file["config/gae_lambda"]))

    def tensor(self, name):
        x = torch.as_tensor(self._arrays[name])
        return x.to(self._dtype) if x.is_floating_point() else x

    def parameters(self, name):
        """The tensors under ``name``, in the file's order."""
        return {k.removeprefix(name + "/"): self.tensor(k) for k in self._arrays if k.startswith(name + "/")}

    def vector(self, name):
        return flatten(list(self.parameters(name).values()))

    def _batch(self, gamma, lambda_):
        dones = self.tensor("dones").to(self._dtype)
        length = len(dones)
        slots = lambda x: torch.cat([x, x[-1:]])[None]
        step = torch.ones(1, length + 1, dtype=self._dtype)
        step[:, -1] = 0
        terminated = slots(dones) * step
        continues = (1 - terminated) * step
        continues[:, -2:] = 0
        return SegmentBatch(
            obs=torch.cat([self.tensor("obs"), self.tensor("last_obs")[None]])[None],
            actions=slots(self.tensor("actions")),
            old_logp=slots(self.tensor("logp")),
            old_dist_inputs=step[..., None],
            rewards=slots(self.tensor("rewards")),
            step=step,
            advantage=advantage_operator(Masks(step, terminated, continues), gamma, lambda_, self._kernels),
        )

    @property
    def discrete(self):
        return "actor/log_std" not in self._arrays

    def perceptron(self, name):
        """The layers of a network, in the file's order, as one of our perceptrons."""
        tensors, modules = list(self.parameters(name).values()), []
        for weight, bias in zip(tensors[:6:2], tensors[1:6:2]):
            layer = nn.Linear(*weight.T.shape, dtype=self._dtype)
            layer.load_state_dict({"weight": weight, "bias": bias})
            modules += [layer, nn.Tanh()]
        return MLP.of([nn.Sequential(*modules[:-1])])

    def coordinates(self, indices):
        if self._by_hand:
            return self.perceptron("critic").coordinates(indices)
        return Coordinates.of(indices, torch.device("cpu"))

    def critic_loss(self):
        weights = {k: v.requires_grad_() for k, v in self.parameters("critic").items()}
        targets = torch.cat([self.tensor("value_targets"), torch.zeros(1, dtype=self._dtype)])
        if self._by_hand:
            critic = critic_pass(self.perceptron("critic"), self.batch.obs[0], self._kernels)
        else:
            critic = AutogradCriticPass(mlp(weights, self.batch.obs[0])[:, 0], weights.values())
        return CriticLoss(critic, targets, (self.batch.step / self.batch.step.sum())[0])

    def actor_pass(self):
        weights = {k: v.requires_grad_() for k, v in self.parameters("actor").items()}
        actions = self.batch.actions[0]
        if self._by_hand:
            clip = torch.tensor(float("inf"))
            head = lambda outputs, log_std: (
                CategoricalTerms.at(actions, outputs)
                if self.discrete
                else GaussianTerms.at(actions, clip, outputs, log_std)
            )
            forward = forward_pass(self.perceptron("actor"), self.batch.obs[0], self._kernels)
            return MLPActorPass(forward, weights.get("log_std"), head)
        outputs = mlp(weights, self.batch.obs[0])
        if self.discrete:
            distribution = torch.distributions.Categorical(logits=outputs)
        else:
            normal = torch.distributions.Normal(outputs, weights["log_std"].exp())
            distribution = torch.distributions.Independent(normal, 1)
        return AutogradActorPass(distribution.log_prob(actions), distribution.entropy(), None, weights.values())


def mlp(weights, x):
    for layer in range(2):
        x = torch.tanh(x @ weights[f"Dense_{layer}.weight"].T + weights[f"Dense_{layer}.bias"])
    return x @ weights["Dense_2.weight"].T + weights["Dense_2.bias"]


def coordinates_of(file, parameters):
    """The file's coordinates (parameter, row, column) as positions in the flat critic vector."""
    offsets = dict(zip(parameters, np.cumsum([0] + [p.numel() for p in parameters.values()]), strict=False))
    coordinates = zip(file["nystrom_param"], file["nystrom_row"], file["nystrom_col"], strict=True)
    return np.array(
        [offsets[name] + (row if col < 0 else row * parameters[name].shape[1] + col) for name, row, col in coordinates]
    )


class Published(IHVPSolver):
    """The file's own product."""

    damping = 0.0

    def __init__(self, ihvp):
        self._ihvp = ihvp

    def solve(self, curvature, v, coordinates, terms):
        return self._ihvp


def solver_of(file, case):
    """The IHVP that made the file: Nyström with its coordinates, or, for CG, the file's own product."""
    if "nystrom_param" not in file:
        return Published(case.vector("ihvp"))
    solver = Nystrom(int(file["config/nystrom_rank"]), float(file["config/nystrom_rho"]), CORE_SHIFT)
    solver.coordinates = coordinates_of(file, case.parameters("critic"))
    return solver


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("how", ["automatic", "by hand", "kernels"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_minibatches_match_published_numbers(path, dtype, how):
    file = dict(np.load(path))
    cases = sorted({k.split("/")[0] for k in file if k.startswith("case")})
    assert cases
    for name in cases:
        case = Case(file, name, dtype, how != "automatic", compiled_kernels() if how == "kernels" else None)
        loss, solver = case.critic_loss(), solver_of(file, case)
        coordinates = case.coordinates(solver.coordinates) if isinstance(solver, Nystrom) else None
        result = hypergradient(
            actor=case.actor_pass(),
            loss=loss,
            batch=case.batch,
            leader=LeaderLoss(float(file["config/clip_eps"])),
            correction=Correction(
                cross_clip=None if case.discrete else float(file["config/clip_f"]),
                bound=float(file["config/ihvp_bound"]),
            ),
            solver=solver,
            curvature=Hessian(loss, Reduction()),
            coordinates=coordinates,
            reduction=Reduction(),
        )
        for published, computed in {
            "grad_actor": result.grad_actor,
            "ihvp": result.ihvp,
            "mixed_product": result.mixed_product,
            "hypergradient": result.direction,
        }.items():
            assert relative_error(computed, case.vector(published)) <= TOLERANCE[dtype], (name, published)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_first_nested_steps_match_published_numbers(path):
    """The critic after N Adam steps in the first minibatch, before which Adam's state is zero; float32's tolerance:
    Adam divides by the gradient's own size, which magnifies rounding where that is near its ε."""
    file = dict(np.load(path))
    case = Case(file, "case0", torch.float64)
    weights = {k: v.clone().requires_grad_() for k, v in case.parameters("critic_before").items()}
    parameters = list(weights.values())
    adam = torch.optim.Adam(parameters, lr=float(file["config/critic_lr"]), eps=1e-5, fused=True)
    steps, step = AdamSteps(adam, parameters), case.batch.step[0]
    targets = torch.cat([case.tensor("value_targets"), torch.zeros(1, dtype=torch.float64)])
    for _ in range(int(file["config/nested_updates"])):
        critic = AutogradCriticPass(mlp(weights, case.batch.obs[0])[:, 0], parameters)
        loss = CriticLoss(critic, targets, step / step.sum())
        steps.step(critic.vjp(loss.cotangent), None)
    moved = case.vector("critic") - case.vector("critic_before")
    error = flatten([p.detach() for p in parameters]) - case.vector("critic")
    assert error.norm() <= 1e-3 * moved.norm()


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("cg")], ids=lambda p: p.stem)
def test_conjugate_gradient_goes_the_published_way(path):
    """20 steps on an indefinite Hessian are chaotic in float32: only direction and residual of the first minibatch are
    compared, loosely."""
    file = dict(np.load(path))
    case = Case(file, "case0", torch.float32)
    loss, published = case.critic_loss(), case.vector("ihvp")
    hessian = Hessian(loss, Reduction())
    result = hypergradient(
        actor=case.actor_pass(),
        loss=loss,
        batch=case.batch,
        leader=LeaderLoss(0.2),
        correction=Correction(None, None),
        solver=ConjugateGradient(20),
        curvature=hessian,
        coordinates=None,
        reduction=Reduction(),
    )
    x, v = result.ihvp, result.grad_critic
    assert float(x @ published / (x.norm() * published.norm())) > 0.8
    mine, theirs = (float((hessian.matvec(y) - v).norm() / v.norm()) for y in (x, published))
    assert mine == pytest.approx(theirs, rel=0.5)
