"""What BLPO does with each setting of a PPO script: the table that its validation follows and the docs render.

``python -m blpo_rllib.ppo_settings`` prints it as Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Protocol

from ray.rllib.policy.policy import PolicySpec
from ray.rllib.utils.typing import LearningRateOrSchedule

from blpo_rllib.solver_settings import NYSTROM_FIELDS, OLD_FIELDS, SolverFields, fields_without_effect

CRITIC_RATE_FACTOR = 4

# Old names in configuration dicts, which RLlib stores and does not read.
RENAMED = {"num_sgd_iter": "num_epochs", "sgd_minibatch_size": "minibatch_size"}


class PPOFields(SolverFields, Protocol):
    """The fields of a :class:`~blpo_rllib.blpo.BLPOConfig` that are read here; others are found by their names."""

    lr: LearningRateOrSchedule | None
    use_kl_loss: bool

    def get_actor_lr(self) -> LearningRateOrSchedule: ...

    def get_critic_lr(self) -> LearningRateOrSchedule: ...


class Fate(StrEnum):
    """What BLPO does with a setting of PPO's."""

    SAME = "as in PPO"
    TRANSLATED = "translated"
    LEFT_ASIDE = "left aside, with a warning"
    REFUSED = "refused"


@dataclass(frozen=True)
class PPOSetting:
    """One row of the table.

    Attributes:
        name: The setting, as in ``config.training(...)`` and its sisters.
        fate: What BLPO does with it.
        meaning: What that comes to, and what to set instead if it is left aside or refused.
        neutral: Values with which there is nothing to leave aside or to refuse.
    """

    name: str
    fate: Fate
    meaning: str
    neutral: tuple[Any, ...] = ()


SETTINGS = (
    PPOSetting(
        "lr",
        Fate.TRANSLATED,
        f"a number or schedule: it becomes actor_lr, and critic_lr is {CRITIC_RATE_FACTOR} times as large unless set",
    ),
    PPOSetting("train_batch_size_per_learner", Fate.SAME, "steps of a batch on each learner"),
    PPOSetting("train_batch_size", Fate.SAME, "steps of a batch, shared out among the learners"),
    PPOSetting(
        "minibatch_size",
        Fate.TRANSLATED,
        "counts steps as in PPO, but a minibatch is made of whole trajectory segments: fragments are cut to "
        "segments of this length where they are longer, unless segment_length is set; left unset and above the batch, "
        "it is the rollout fragment",
    ),
    PPOSetting("num_epochs", Fate.SAME, "passes over a batch"),
    PPOSetting("num_sgd_iter", Fate.TRANSLATED, "RLlib's old name of num_epochs"),
    PPOSetting("sgd_minibatch_size", Fate.TRANSLATED, "RLlib's old name of minibatch_size"),
    PPOSetting(
        "shuffle_batch_per_epoch",
        Fate.LEFT_ASIDE,
        "segments are shuffled in every epoch, and their steps stay in order",
        (True,),
    ),
    PPOSetting("gamma", Fate.SAME, "discount"),
    PPOSetting("lambda_", Fate.SAME, "of generalised advantage estimation"),
    PPOSetting("clip_param", Fate.SAME, "clip width of the actor's surrogate"),
    PPOSetting("entropy_coeff", Fate.SAME, "a number or schedule"),
    PPOSetting("use_kl_loss", Fate.SAME, "off by default, PPO's is on"),
    PPOSetting("kl_coeff", Fate.SAME, "setting it switches use_kl_loss on, unless that was set"),
    PPOSetting("kl_target", Fate.SAME, "setting it switches use_kl_loss on, unless that was set"),
    PPOSetting("grad_clip", Fate.SAME, "largest global norm of a gradient, of each player by itself"),
    PPOSetting(
        "vf_loss_coeff",
        Fate.LEFT_ASIDE,
        "the critic has an optimizer of its own, where a factor before its loss changes nothing: set critic_lr",
        (1.0,),
    ),
    PPOSetting(
        "vf_clip_param",
        Fate.LEFT_ASIDE,
        "the critic's loss is the plain squared error, whose curvature the hypergradient needs: lower critic_lr or "
        "num_critic_updates for a slower critic",
        (None, float("inf")),
    ),
    PPOSetting(
        "vf_share_layers",
        Fate.LEFT_ASIDE,
        "(in the model config, where DefaultModelConfig has it True) actor and critic are separate networks",
        (False,),
    ),
    PPOSetting(
        "_torch_lr_scheduler_classes",
        Fate.TRANSLATED,
        "the schedulers drive both optimizers, the actor's from actor_lr and the critic's from critic_lr",
    ),
    PPOSetting("use_critic", Fate.REFUSED, "BLPO needs the critic: leave it True", (True,)),
    PPOSetting("use_gae", Fate.REFUSED, "BLPO differentiates through GAE: leave it True", (True,)),
    PPOSetting(
        "torch_compile_learner",
        Fate.REFUSED,
        "the update records CUDA graphs by itself (cuda_graphs): leave it False",
        (False,),
    ),
    PPOSetting("_torch_grad_scaler_class", Fate.REFUSED, "BLPO trains in one precision: leave it None", (None,)),
    PPOSetting(
        "num_aggregator_actors_per_learner", Fate.REFUSED, "BLPO packs segments on the learner: leave it 0", (0,)
    ),
)

# What differs between modules where a module's own configuration says so; the rest holds for all modules.
PER_MODULE = {
    *(
        "lr",
        "actor_lr",
        "critic_lr",
        "adam_epsilon",
        "log_std_lr_factor",
        "num_critic_updates",
        "segment_length",
        "grad_clip",
    ),
    *("gamma", "lambda_", "clip_param", "entropy_coeff", "use_kl_loss", "kl_coeff", "kl_target"),
    *("hypergradient", "curvature", "hypergradient_bound", "cross_clip_param", "cross_reduction"),
    *("correction_sample", "advantage_horizon", "advantage_refresh", "standardize_advantages", "max_kl", "target_kl"),
    *(*NYSTROM_FIELDS, *OLD_FIELDS, "learner_config_dict"),
    # With a notice of their own.
    *("vf_loss_coeff", "vf_clip_param"),
}


def times(factor: float, rate: LearningRateOrSchedule) -> LearningRateOrSchedule:
    """A learning rate or schedule multiplied by a number."""
    if isinstance(rate, (list, tuple)):
        return [[timestep, factor * value] for timestep, value in rate]
    return factor * rate


def refusals(config: PPOFields) -> list[str]:
    """Why settings cannot be taken, one sentence each."""
    return [
        f"{row.name}={getattr(config, row.name)!r} has no meaning for BLPO: {row.meaning}"
        for row in SETTINGS
        if row.fate is Fate.REFUSED and getattr(config, row.name) not in row.neutral
    ]


def notices(config: PPOFields) -> list[str]:
    """What becomes of settings that BLPO takes otherwise than PPO does, one sentence each."""
    return [
        *_left_aside(config),
        *_learning_rates(config),
        *_without_effect(config),
    ]


def _left_aside(config: PPOFields) -> list[str]:
    return [
        f"{row.name}={getattr(config, row.name)!r} is left aside: {row.meaning}"
        for row in SETTINGS
        if row.fate is Fate.LEFT_ASIDE
        and row.name in config.set_by_user
        and getattr(config, row.name, None) not in row.neutral
    ]


def _learning_rates(config: PPOFields) -> list[str]:
    if config.lr is None:
        return []
    return [f"lr={config.lr!r} stands for actor_lr={config.get_actor_lr()!r}, critic_lr={config.get_critic_lr()!r}"]


def _without_effect(config: PPOFields) -> list[str]:
    """Options that were set and need another one to have an effect."""
    found = []
    penalty = [name for name in ("kl_coeff", "kl_target") if name in config.set_by_user and getattr(config, name)]
    if penalty and not config.use_kl_loss:
        found.append(f"{_assignments(config, penalty)} has no effect without use_kl_loss=True")
    for solver, names in fields_without_effect(config).items():
        found.append(
            f"{_assignments(config, names)} has no effect with hypergradient={config.hypergradient!r}: "
            f"it belongs to hypergradient={solver!r}"
        )
    if config.hypergradient == "none":
        correction = ("curvature", "hypergradient_bound", "cross_clip_param", "cross_reduction", "correction_sample")
        if idle := [name for name in correction if name in config.set_by_user]:
            found.append(f'{_assignments(config, idle)} has no effect with hypergradient="none", nested PPO')
    return found


def _assignments(config: PPOFields, names: Sequence[str]) -> str:
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)


def unknown_settings(config: PPOFields, known: set[str]) -> list[str]:
    """Names that a configuration dict brought and nothing reads, one sentence each."""
    found = []
    for name in sorted(config.set_by_user - known):
        close = get_close_matches(name, known, n=1)
        found.append(
            f"{name!r} is no setting of BLPO's or RLlib's" + (f": did you mean {close[0]!r}?" if close else "")
        )
    return found


def for_all_modules(names: set[str]) -> list[str]:
    """Those of a module's own settings that hold for all modules and cannot differ between them."""
    return sorted(names - PER_MODULE)


def policy_overrides(policy: Any) -> dict[str, Any]:
    """The settings in ``PolicySpec(config=...)``, which RLlib's learners do not look at."""
    config = (
        policy.config if isinstance(policy, PolicySpec) else policy[3] if isinstance(policy, (list, tuple)) else None
    )
    if config is None or isinstance(config, dict):
        return dict(config or {})
    if hasattr(config, "set_by_user"):
        return {name: getattr(config, name) for name in config.set_by_user}
    raise ValueError(
        f"PolicySpec(config=...) holds a {type(config).__name__}, of which it cannot be known what was set: "
        "use a dict, e.g. BLPOConfig.overrides(actor_lr=1e-4)"
    )


def markdown() -> str:
    """The table for the docs."""
    rows = [f"| `{row.name}` | {row.fate} | {row.meaning} |" for row in SETTINGS]
    return "\n".join(["| PPO's setting | BLPO | what it comes to |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown())
