"""Small random problems in float64 for the tests of the mathematics."""

import os
import shutil

import pytest
import torch
from torch import nn

from blpo_rllib.core import native
from blpo_rllib.core.curvature import CriticLoss
from blpo_rllib.core.gae import Masks, advantage_operator
from blpo_rllib.core.mlp import MLP, MLPActorPass
from blpo_rllib.core.mlp_native import critic_pass, forward_pass
from blpo_rllib.core.networks import ActorPass, AutogradActorPass, AutogradCriticPass
from blpo_rllib.core.players import Players
from blpo_rllib.core.policy_heads import AutogradTerms, GaussianTerms
from blpo_rllib.core.segments import SegmentBatch

FLOAT64 = torch.float64
OBS_SIZE = 3
NUM_ACTIONS = 2


def compiled_kernels():
    """The kernels; skips the test on a machine without a C++ compiler."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    kernels = native.load()
    assert kernels is not None
    return kernels


def network(*sizes, activation=nn.Tanh):
    """Linear layers of the given sizes, activated in between."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, dtype=FLOAT64), activation()]
    return nn.Sequential(*layers[:-1])


def gaussian_terms(mean, log_std, actions, old_mean=None):
    """logp, entropy and KL [n] of a diagonal Gaussian."""
    distribution = _gaussian(mean, log_std.exp())
    kl = None
    if old_mean is not None:
        kl = torch.distributions.kl_divergence(_gaussian(old_mean, torch.ones_like(old_mean)), distribution)
    return distribution.log_prob(actions), distribution.entropy(), kl


def _gaussian(mean, std):
    """As in RLlib, without checks, which read numbers on the host."""
    normal = torch.distributions.Normal(mean, std, validate_args=False)
    return torch.distributions.Independent(normal, 1, validate_args=False)


class SmallPlayers(Players):
    """A Gaussian actor and a critic, differentiated by hand (by compiled kernels or not) or automatically."""

    def __init__(self, by_hand=False, hidden=(5, 4), activation=nn.Tanh, kernels=None):
        self.critic_network = network(OBS_SIZE, *hidden, 1, activation=activation)
        self.actor_network = network(OBS_SIZE, *hidden, NUM_ACTIONS, activation=activation)
        self.log_std = nn.Parameter(torch.full((NUM_ACTIONS,), -0.2, dtype=FLOAT64))
        self.by_hand, self.kernels = by_hand, kernels
        self.critic_parameters = list(self.critic_network.parameters())
        self.actor_parameters = [*self.actor_network.parameters(), self.log_std]

    @property
    def replayable(self):
        return self.by_hand

    def coordinates(self, indices):
        return MLP.of([self.critic_network]).coordinates(indices) if self.by_hand else super().coordinates(indices)

    def critic(self, obs):
        if self.by_hand:
            return critic_pass(MLP.of([self.critic_network]), obs, self.kernels)
        return AutogradCriticPass(self.critic_network(obs)[:, 0], self.critic_parameters)

    def actor(self, obs, actions, old_dist_inputs) -> ActorPass:
        if self.by_hand:
            terms = lambda mean, log_std: gaussian_terms(mean, log_std, actions, old_dist_inputs)
            clip = float("inf")
            head = lambda outputs, log_std: AutogradTerms(terms, outputs, log_std)
            if old_dist_inputs is None:
                head = lambda outputs, log_std: GaussianTerms.at(actions, clip, outputs, log_std)
            return MLPActorPass(forward_pass(MLP.of([self.actor_network]), obs, self.kernels), self.log_std, head)
        terms = gaussian_terms(self.actor_network(obs), self.log_std, actions, old_dist_inputs)
        return AutogradActorPass(*terms, self.actor_parameters)


def random_batch(num_segments=2, width=9, gamma=0.9, lambda_=0.8, kernels=None):
    """Segments with several pieces, terminated and truncated ends, and padding."""
    step = torch.ones(num_segments, width, dtype=FLOAT64)
    step[:, 3] = 0
    step[:, -1] = 0
    step[0, -2] = 0
    terminated = torch.zeros_like(step)
    terminated[:, 5] = 1
    continues = step.clone()
    continues[:, :-1] *= step[:, 1:]
    continues[:, -1] = 0
    continues[:, 5] = 0
    return SegmentBatch(
        obs=torch.randn(num_segments, width, OBS_SIZE, dtype=FLOAT64),
        actions=torch.randn(num_segments, width, NUM_ACTIONS, dtype=FLOAT64),
        old_logp=torch.randn(num_segments, width, dtype=FLOAT64) * 0.3 - 2.5,
        old_dist_inputs=torch.randn(num_segments, width, NUM_ACTIONS, dtype=FLOAT64),
        rewards=torch.randn(num_segments, width, dtype=FLOAT64),
        step=step,
        advantage=advantage_operator(Masks(step, terminated, continues), gamma, lambda_, kernels),
    )


def flat_obs(batch):
    return batch.obs.flatten(0, 1)


def critic_loss(players, batch, targets=None):
    """The critic's loss on a batch, against random targets unless given."""
    weights = (batch.step / batch.step.sum()).flatten()
    targets = torch.randn(len(weights), dtype=FLOAT64) if targets is None else targets
    return CriticLoss(players.critic(flat_obs(batch)), targets, weights)
