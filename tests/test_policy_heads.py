"""Closed forms of action distributions against torch.distributions."""

import pytest
import torch
from problems import FLOAT64, gaussian_terms

from blpo_rllib.core.policy_heads import ENTROPY, LOGP, AutogradTerms, CategoricalTerms, GaussianTerms

N, D = 7, 3


def check(closed, automatic, has_log_std):
    torch.testing.assert_close(closed.logp, automatic.logp)
    torch.testing.assert_close(closed.entropy, automatic.entropy)
    for term in (LOGP, ENTROPY):
        mine, theirs = closed.scores(term), automatic.scores(term)
        torch.testing.assert_close(mine[0], theirs[0])
        if has_log_std:
            torch.testing.assert_close(mine[1], theirs[1])


@pytest.mark.parametrize("clip", [float("inf"), 0.4])
def test_gaussian(clip):
    actions, mean = torch.randn(N, D, dtype=FLOAT64), torch.randn(D, N, dtype=FLOAT64)
    log_std = torch.tensor([-0.9, 0.1, 0.7], dtype=FLOAT64)[:, None].expand(-1, N)
    automatic = AutogradTerms(lambda m, s: gaussian_terms(m, s.clamp(-clip, clip), actions), mean, log_std)
    check(GaussianTerms.at(actions, clip, mean, log_std), automatic, has_log_std=True)


def test_categorical():
    actions, logits = torch.randint(D, (N,)), 3 * torch.randn(D, N, dtype=FLOAT64)

    def terms(logits, _):
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(actions), distribution.entropy(), None

    check(CategoricalTerms.at(actions, logits), AutogradTerms(terms, logits, None), has_log_std=False)
