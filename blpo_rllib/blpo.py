"""BLPO (Bi-Level Policy Optimization, Prakash et al. 2025, arXiv:2505.11714) as an RLlib algorithm."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pyarrow.fs
from ray.exceptions import RayActorError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.ppo.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.apis import SelfSupervisedLossAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.rllib.utils.schedules.scheduler import Scheduler
from ray.rllib.utils.typing import LearningRateOrSchedule
from ray.tune import Checkpoint
from ray.tune.result import TIME_TOTAL_S, TRAINING_ITERATION

from blpo_rllib import checkpoints, ppo_settings, rllib_private, solver_settings
from blpo_rllib.core import native
from blpo_rllib.core.advantages import REFRESHES
from blpo_rllib.core.curvature import CURVATURES, Curvature
from blpo_rllib.core.hypergradient import CORRECTION_SAMPLES, CROSS_REDUCTIONS
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.learning.direct import direct_weights
from blpo_rllib.learning.learner import BLPOTorchLearner
from blpo_rllib.learning.players import RLModulePlayers, check_module_class
from blpo_rllib.learning.quick_stats import QUICK_STATS
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG, BLPOTorchRLModule, adapted
from blpo_rllib.learning.separate import separated
from blpo_rllib.sampling.env_runner import BatchedEnvRunner
from blpo_rllib.sampling.envpool import PREFIX, check_task, envpool_task
from blpo_rllib.sampling.evaluation import (
    OneEpisodeEach,
    kept_statistics,
    merge_training_statistics,
    use_training_statistics,
)

logger = logging.getLogger(__name__)

# The reference's; BLPO chooses other minibatches where the batch is smaller.
MINIBATCH_SIZE = 640
ACTOR_LR = 3e-4

_ENV_STEPS = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)

ADVANTAGE_HORIZONS = ("segment", "rollout")


class BLPOConfig(PPOConfig):
    """Configuration of :class:`BLPO`; defaults are the published settings for continuous control.

    .. code-block:: python

        from blpo_rllib import BLPOConfig

        config = (
            BLPOConfig()
            .environment("CartPole-v1")
            .env_runners(num_envs_per_env_runner=4)
            .training(train_batch_size_per_learner=512, minibatch_size=128, num_critic_updates=5)
        )
        algo = config.build_algo()
        algo.train()
    """

    nystrom_rank: int
    nystrom_damping: float
    env_runner_cls: type | None
    # Names of the settings that somebody has set since the config was made, by whatever way.
    set_by_user: frozenset[str] = frozenset()

    def __init__(self, algo_class: type[Algorithm] | None = None):
        super().__init__(algo_class=algo_class or BLPO)

        # PPO's, at the reference's values.
        self.gamma = 0.99
        self.lambda_ = 0.95
        self.clip_param = 0.2
        self.num_epochs = 4
        self.train_batch_size = 20480
        self.minibatch_size = MINIBATCH_SIZE
        self.num_env_runners = 0
        self.num_envs_per_env_runner = 32

        # PPO's, with another meaning here or none: see blpo_rllib.ppo_settings.
        self.lr = None
        self.use_kl_loss = False
        self.vf_clip_param = None

        # BLPO's own.
        self.actor_lr: LearningRateOrSchedule = ACTOR_LR
        self.critic_lr: LearningRateOrSchedule = ppo_settings.CRITIC_RATE_FACTOR * ACTOR_LR
        self.adam_epsilon = 1e-5
        self.log_std_lr_factor = 1.0
        self.max_kl: float | None = None
        self.target_kl: float | None = None
        self.num_critic_updates = 3
        self.segment_length: int | None = None
        self.advantage_horizon = "segment"
        self.advantage_refresh = "minibatch"
        self.standardize_advantages = False
        self.normalize_rewards = False
        self.hypergradient: str | IHVPSolver = "nystrom"
        self.curvature: str | type[Curvature] = "hessian"
        self.hypergradient_bound: float | None = 1.0
        self.cross_clip_param: float | None = 1.0
        self.cross_reduction = "sum"
        self.correction_sample = "minibatch"
        self.nystrom_rank = 5
        self.nystrom_damping = 50.0
        self.stats_cls_lookup = QUICK_STATS
        self.native_kernels = True
        self.cuda_graphs = True
        self.separate_shared_trunk: bool | None = None
        # Deprecated; None: not set.
        for name in solver_settings.OLD_FIELDS:
            setattr(self, name, None)

        # The evaluation's.
        self.evaluation_one_episode_per_env = False
        self.evaluation_seed = 0

        # From here on they count.
        self.set_by_user = frozenset()

    @override(PPOConfig)
    def __setattr__(self, key: str, value: Any) -> None:
        if self._is_made and value != rllib_private.DEPRECATED_VALUE:
            key = ppo_settings.RENAMED.get(key, key)
        super().__setattr__(key, value)
        self._note(key, value)

    @override(PPOConfig)
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._note(key, value)

    @property
    def _is_made(self) -> bool:
        return "set_by_user" in vars(self)

    def _note(self, key: str, value: Any) -> None:
        """Keeps account of what was set, and follows up the settings that stand for others."""
        if not self._is_made or key in ("set_by_user", "_is_frozen"):
            return
        solver_settings.warn_of_old_field(key, value)
        names = self.set_by_user | {key}
        if key == "lr":
            # Whatever was set last holds.
            names -= {"actor_lr"}
            object.__setattr__(self, "actor_lr", ACTOR_LR)
        object.__setattr__(self, "set_by_user", names)
        if key in ("kl_coeff", "kl_target") and value and "use_kl_loss" not in names:
            object.__setattr__(self, "use_kl_loss", True)

    @override(PPOConfig)
    def update_from_dict(self, config_dict: Mapping[str, Any]) -> Self:
        # A dict made of a whole config says which of its entries were set; others of it may have been changed since.
        recorded, default = config_dict.get("set_by_user"), self.copy(copy_frozen=False)
        # First, so that `actor_lr` beside it holds.
        entries = sorted(config_dict.items(), key=lambda entry: entry[0] != "lr")
        super().update_from_dict({key: value for key, value in entries if key != "set_by_user"})
        if recorded is not None:
            changed = {key for key, value in entries if _differs(value, getattr(default, key, None))}
            self.set_by_user = default.set_by_user | recorded | (changed & self.set_by_user)
        return self

    @override(PPOConfig)
    def training(
        self,
        *,
        actor_lr: LearningRateOrSchedule = NotProvided,
        critic_lr: LearningRateOrSchedule = NotProvided,
        adam_epsilon: float = NotProvided,
        log_std_lr_factor: float = NotProvided,
        max_kl: float | None = NotProvided,
        target_kl: float | None = NotProvided,
        num_critic_updates: int = NotProvided,
        segment_length: int | None = NotProvided,
        advantage_horizon: str = NotProvided,
        advantage_refresh: str = NotProvided,
        standardize_advantages: bool = NotProvided,
        normalize_rewards: bool = NotProvided,
        hypergradient: str | IHVPSolver = NotProvided,
        curvature: str | type[Curvature] = NotProvided,
        hypergradient_bound: float | None = NotProvided,
        cross_clip_param: float | None = NotProvided,
        cross_reduction: str = NotProvided,
        correction_sample: str = NotProvided,
        nystrom_rank: int = NotProvided,
        nystrom_damping: float = NotProvided,
        native_kernels: bool = NotProvided,
        cuda_graphs: bool = NotProvided,
        separate_shared_trunk: bool | None = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets the training related configuration.

        Args:
            actor_lr: Adam learning rate of the actor (the leader), > 0, or a schedule ``[[timestep, value], ...]``.
                PPO's ``lr`` stands for it where that was set last.
            critic_lr: Adam learning rate of the critic (the follower), > 0, or a schedule. If only ``lr`` was set, it
                is 4 times that.
            adam_epsilon: Adam's ε of both optimizers, > 0.
            log_std_lr_factor: Learning rate of the log-std of a Gaussian policy whose deviation is a parameter
                (``free_log_std`` in the model config), in units of ``actor_lr``, > 0. Other policies have none.
            max_kl: KL divergence from the policy that sampled, > 0, averaged over an epoch, at which that is the
                iteration's last. None: all epochs, always.
            target_kl: KL divergence > 0, averaged over an iteration, that the actor's learning rate is steered to: the
                rate is divided by 1.5 where the policy moved more than twice as far, multiplied by 1.5 where less than
                half as far, and stays between 1/100 of ``actor_lr`` and ``actor_lr``. None: the rate is ``actor_lr``.
            num_critic_updates: N >= 1, nested critic steps per minibatch, before the actor's step.
            segment_length: Steps per trajectory segment, >= 1. None: the rollout fragment, i.e. all steps an
                environment contributes to a batch. Shorter segments make smaller minibatches possible, but advantages
                are bootstrapped at the end of each, unless ``advantage_horizon="rollout"``.
            advantage_horizon: What advantages extend over: the "segment", as published, or the whole "rollout": they
                are then computed at the start of each epoch over whole rollouts, and only their change with the critic
                since then ends with the segment. Segments can then be as short as a single step.
            advantage_refresh: The critic that the advantages are a function of: that of the "minibatch", as
                published, or that at the start of the "epoch" or "iteration" (PPO's); the hypergradient still goes by
                their derivative in the critic.
            standardize_advantages: Subtract the mean of the batch's advantages and divide by their deviation, as PPO
                does; both are constants to the hypergradient.
            normalize_rewards: Divide rewards by the running standard deviation of the discounted return, in training
                batches only.
            hypergradient: How the inverse-Hessian-vector product is computed: "nystrom", "cg", "exact" (dense, small
                critics only), "scaled_identity" (v/ρ, no curvature), each with its class's defaults, or an
                :class:`~blpo_rllib.core.ihvp.IHVPSolver`, e.g. ``ConjugateGradient(iterations=10, damping=1.0)``.
                "none" leaves the correction out: nested PPO.
            curvature: The follower's curvature: "hessian", "gauss_newton" (positive semi-definite), or a
                :class:`~blpo_rllib.core.curvature.Curvature` class.
            hypergradient_bound: b >= 0: the correction is scaled down to at most b times the norm of the actor's
                gradient. None: no bound.
            cross_clip_param: ε_F >= 0, the clip width of the ratio inside the cross term, for Box actions. None: no
                clip, as always for other actions.
            cross_reduction: "sum" of the cross term over the minibatch's steps, as published, or "mean", as in the
                losses that it belongs to.
            correction_sample: What the correction is computed on: each "minibatch", as published, or the whole "batch",
                once per epoch at its start, for all of the epoch's actor steps. The bound then refers to the norm of
                the batch's gradient.
            nystrom_rank: k >= 1 of the Nyström solver, at most the number of critic parameters. If set, it takes
                precedence over the rank of a :class:`~blpo_rllib.core.ihvp.Nystrom` passed as ``hypergradient``.
            nystrom_damping: ρ > 0 of the Nyström solver; likewise.
            native_kernels: Take perceptrons on a CPU through compiled kernels, built once per machine with g++ (without
                one: a warning, and torch operations instead).
            cuda_graphs: On a GPU, record the work of a minibatch as a CUDA graph, and replay it for the others. Where
                that fails: a warning, and kernel by kernel.
            separate_shared_trunk: Make two copies of RLModules of one's own: one acts and the other gives values. None
                for those whose policy and value function share parameters, with a warning; False to refuse these.
            **kwargs: PPO's and RLlib's own arguments. ``minibatch_size`` counts steps and should be a multiple of the
                segment length. :mod:`blpo_rllib.ppo_settings` says what becomes of each.

        Returns:
            This config.
        """
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        own |= {name: kwargs.pop(name) for name in solver_settings.OLD_FIELDS if name in kwargs}
        super().training(**kwargs)
        for name, value in own.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self

    @override(PPOConfig)
    def evaluation(
        self,
        *,
        evaluation_one_episode_per_env: bool = NotProvided,
        evaluation_seed: int = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets the evaluation's configuration. Observations are normalised by the training's statistics.

        Args:
            evaluation_one_episode_per_env: Evaluate by one whole episode of each evaluation environment, always from
                the same starts, in place of the ``evaluation_duration`` episodes that end first. How many those are is
                up to ``evaluation_config={"num_envs_per_env_runner": ...}`` and ``evaluation_num_env_runners``.
            evaluation_seed: Of their environments; the i-th takes ``evaluation_seed + i``.
            **kwargs: RLlib's own arguments.

        Returns:
            This config.
        """
        super().evaluation(**kwargs)
        if evaluation_one_episode_per_env is not NotProvided:
            self.evaluation_one_episode_per_env = evaluation_one_episode_per_env
        if evaluation_seed is not NotProvided:
            self.evaluation_seed = evaluation_seed
        return self

    @override(PPOConfig)
    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=BLPOTorchRLModule)

    @override(PPOConfig)
    def get_default_learner_class(self) -> type:
        return BLPOTorchLearner

    @property
    @override(PPOConfig)
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return super()._model_config_auto_includes | REFERENCE_MODEL_CONFIG

    @override(PPOConfig)
    def get_rl_module_spec(self, *args: Any, **kwargs: Any) -> RLModuleSpec:
        spec = super().get_rl_module_spec(*args, **kwargs)
        return self._adapted(spec)

    @override(PPOConfig)
    def get_multi_rl_module_spec(self, **kwargs: Any) -> MultiRLModuleSpec:
        multi_spec = super().get_multi_rl_module_spec(**kwargs)
        for spec in multi_spec.rl_module_specs.values():
            self._adapted(spec)
        return multi_spec

    def _adapted(self, spec: RLModuleSpec) -> RLModuleSpec:
        spec.model_config = adapted(rllib_private.full_model_config(spec), spec.action_space)
        return separated(spec, self.separate_shared_trunk)

    @override(PPOConfig)
    def get_config_for_module(self, module_id: str) -> Self:
        if module_id not in self._per_module_overrides and any(self._overrides_of(module_id)):
            self._per_module_overrides[module_id] = self._with_overrides(module_id)
        return self._per_module_overrides.get(module_id, self)

    def _overrides_of(self, module_id: str) -> list[dict[str, Any]]:
        """A module's own settings, by both ways in which RLlib takes them; the last ones hold."""
        policies = self.policies if isinstance(self.policies, dict) else {}
        own = ppo_settings.policy_overrides(policies.get(module_id))
        return [own, self.algorithm_config_overrides_per_module.get(module_id, {})]

    def _with_overrides(self, module_id: str) -> Self:
        config = self.copy(copy_frozen=False)
        for overrides in self._overrides_of(module_id):
            config.update_from_dict(overrides)
        return config

    def get_actor_lr(self) -> LearningRateOrSchedule:
        """The actor's learning rate or schedule: ``actor_lr``, or ``lr`` where only that was set."""
        return self.actor_lr if self.lr is None or "actor_lr" in self.set_by_user else self.lr

    def get_critic_lr(self) -> LearningRateOrSchedule:
        """The critic's learning rate or schedule: ``critic_lr``, or 4 times ``lr`` where only that was set."""
        if self.lr is None or "critic_lr" in self.set_by_user:
            return self.critic_lr
        return ppo_settings.times(ppo_settings.CRITIC_RATE_FACTOR, self.lr)

    def get_segment_length(self) -> int:
        """Steps per segment, with None resolved: the rollout fragment, cut where minibatches are shorter."""
        fragment = self.get_rollout_fragment_length()
        return self.segment_length or min(fragment, self.minibatch_size or fragment)

    def _choose_number_of_envs(self) -> None:
        """One for EnvRunners that are not RLlib's, as in PPO: they may not make environments at all.

        Where one of them collects a single fragment and then waits for new weights, as RLlib's server for external
        environments does, a batch must be one fragment.
        """
        cls, own = self.env_runner_cls, (SingleAgentEnvRunner, MultiAgentEnvRunner)
        if cls is not None and not issubclass(cls, own) and "num_envs_per_env_runner" not in self.set_by_user:
            object.__setattr__(self, "num_envs_per_env_runner", 1)

    def _choose_minibatch_size(self) -> None:
        """The reference's minibatches; in a smaller batch those of the reference's kind, one fragment each."""
        if "minibatch_size" in self.set_by_user or self.in_evaluation:
            return
        batch_size = self.train_batch_size_per_learner
        fits = batch_size >= MINIBATCH_SIZE
        size = MINIBATCH_SIZE if fits else min(batch_size, self.get_rollout_fragment_length())
        object.__setattr__(self, "minibatch_size", size)

    def get_curvature(self) -> type[Curvature]:
        """The class that ``curvature`` names or is.

        Raises:
            ValueError: If it is neither a known name nor a Curvature class.
        """
        if isinstance(self.curvature, type) and issubclass(self.curvature, Curvature):
            return self.curvature
        if self.curvature not in CURVATURES:
            names = ", ".join(map(repr, CURVATURES))
            raise ValueError(f"curvature={self.curvature!r} must be one of {names}, or a Curvature class")
        return CURVATURES[self.curvature]

    def get_ihvp_solver(self) -> IHVPSolver | None:
        """The solver that ``hypergradient`` names or is; None for nested PPO.

        Raises:
            ValueError: If the name is unknown or one of the solver's settings is out of range.
        """
        return solver_settings.solver_of(self)

    @override(PPOConfig)
    def validate(self) -> None:
        self._choose_number_of_envs()
        self._choose_minibatch_size()
        super().validate()
        self._choose_env_runner()
        self._validate_envpool()
        self._validate_learner_class()
        self._validate_evaluation()
        for module_id, config in self._configs_by_module():
            try:
                config._validate_settings()
            except ValueError as error:
                raise ValueError(f"module {module_id!r}: {error}" if module_id else error) from None
        self._validate_segments()
        self._validate_learners()
        self._validate_modules()
        if not self.in_evaluation:
            for message in self._notices():
                logger.warning("%s", message)

    def _configs_by_module(self) -> Iterator[tuple[str | None, Self]]:
        """This config, and that of each module with settings of its own."""
        yield None, self
        for module_id in sorted({*self.policies, *self.algorithm_config_overrides_per_module}):
            if any(self._overrides_of(module_id)):
                yield module_id, self._with_overrides(module_id)

    def _validate_settings(self) -> None:
        """What may differ between modules."""
        self._validate_ranges()
        self._validate_solver()
        self._validate_without_meaning()

    def _notices(self) -> Iterator[str]:
        """What the user should know about how settings were taken."""
        known = vars(BLPOConfig()).keys() | {name for name in dir(type(self)) if not name.startswith("__")}
        yield from ppo_settings.unknown_settings(self, set(known))
        yield from self._size_notices()
        yield from self._shared_layer_notices()
        said: set[str] = set()
        for module_id, config in self._configs_by_module():
            for message in ppo_settings.notices(config):
                if message not in said:
                    said.add(message)
                    yield message if module_id is None else f"module {module_id!r}: {message}"
            own = [] if module_id is None else self._overrides_of(module_id)
            if names := ppo_settings.for_all_modules({name for overrides in own for name in overrides}):
                yield f"module {module_id!r}: {', '.join(names)} cannot differ between modules and is left aside"

    def _size_notices(self) -> Iterator[str]:
        if self.minibatch_size != MINIBATCH_SIZE and "minibatch_size" not in self.set_by_user:
            yield (
                f"minibatch_size={self.minibatch_size}, one rollout fragment, as the batch of "
                f"{self.train_batch_size_per_learner} steps is smaller than the default of {MINIBATCH_SIZE}"
            )
        length, fragment = self.get_segment_length(), self.get_rollout_fragment_length()
        if self.segment_length is None and length < fragment:
            yield (
                f"segment_length={length}, so that each minibatch of {self.minibatch_size} steps gets a whole segment "
                f"(rollout fragments have {fragment} steps); advantages are bootstrapped at each segment's end. More "
                "environments or larger minibatches make longer segments possible"
            )

    def _shared_layer_notices(self) -> Iterator[str]:
        of_modules = {
            f" of module {module_id!r}": rllib_private.full_model_config(spec)
            for module_id, spec in self._specs_by_module()
            if spec.model_config is not None
        }
        for of_module, model_config in {"": self.model_config, **of_modules}.items():
            if model_config.get("vf_share_layers"):
                yield (
                    f"vf_share_layers=True in the model config{of_module} is left aside: BLPO's actor (leader) and "
                    "critic (follower) are separate networks (DefaultModelConfig has it True unless told otherwise)"
                )

    def _validate_learner_class(self) -> None:
        if not issubclass(self.learner_class, BLPOTorchLearner):
            self._value_error(
                f"learner_class={self.learner_class.__name__} does not run BLPO's update but its own: derive it from "
                "blpo_rllib.learning.learner.BLPOTorchLearner, whose docstring says what can be overridden"
            )
        try:
            self.learner_class.check()
        except ValueError as error:
            self._value_error(str(error))

    def _choose_env_runner(self) -> None:
        """Batched sampling by default, where RLlib would take its single-agent EnvRunner."""
        if self.env_runner_cls in (None, BatchedEnvRunner):
            self.env_runner_cls = None if self.is_multi_agent or self.output else BatchedEnvRunner

    def _validate_evaluation(self) -> None:
        """``evaluation_one_episode_per_env`` goes through RLlib's place for an evaluation of one's own."""
        function = self.custom_evaluation_function
        if isinstance(function, OneEpisodeEach):
            function = None
        if self.evaluation_one_episode_per_env:
            runner = self.env_runner_cls
            if runner is None or not issubclass(runner, BatchedEnvRunner):
                name = "RLlib's default" if runner is None else runner.__name__
                self._value_error(
                    f"evaluation_one_episode_per_env=True needs a single-agent BatchedEnvRunner, but the EnvRunner is "
                    f"{name}: leave env_runner_cls, output and multi_agent() unset, or set evaluation_duration instead"
                )
            if function is not None:
                self._value_error(
                    f"evaluation_one_episode_per_env=True with custom_evaluation_function={function!r}: set one of them"
                )
            function = OneEpisodeEach(self.evaluation_seed)
        object.__setattr__(self, "custom_evaluation_function", function)

    def _validate_envpool(self) -> None:
        task = envpool_task(self.env)
        if task is None and isinstance(self.env, str) and self.env.lower().startswith(PREFIX.lower()):
            self._value_error(f"env={self.env!r}: did you mean {PREFIX + self.env[len(PREFIX) :]!r}?")
        if task is None:
            return
        if self.env_runner_cls is None or not issubclass(self.env_runner_cls, BatchedEnvRunner):
            name = "RLlib's default" if self.env_runner_cls is None else self.env_runner_cls.__name__
            self._value_error(
                f"env={self.env!r} needs a single-agent BatchedEnvRunner, but the EnvRunner is {name}: leave "
                f"env_runner_cls, output and multi_agent() unset, or use env=EnvPoolCreator({task!r}) with "
                'gym_env_vectorize_mode="vector_entry_point"'
            )
        try:
            check_task(task, dict(self.env_config))
        except ValueError as error:
            self._value_error(str(error))

    def _validate_ranges(self) -> None:
        for name, rate in (("actor_lr", self.get_actor_lr()), ("critic_lr", self.get_critic_lr())):
            Scheduler.validate(fixed_value_or_schedule=rate, setting_name=name, description="learning rate")
            values = [value for _, value in rate] if isinstance(rate, (list, tuple)) else [rate]
            if not all(_is_number(value) and value >= 0 for value in values) or not any(values):
                self._value_error(f"{name}={rate!r} must be a number > 0, or a schedule of numbers >= 0")
        if not _is_number(self.adam_epsilon) or self.adam_epsilon <= 0:
            self._value_error(f"adam_epsilon={self.adam_epsilon!r} must be > 0 (the reference uses 1e-5)")
        if not _is_number(self.log_std_lr_factor) or self.log_std_lr_factor <= 0:
            self._value_error(f"log_std_lr_factor={self.log_std_lr_factor!r} must be > 0 (1: the actor's rate)")
        for name in ("num_critic_updates", "num_epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                self._value_error(f"{name}={getattr(self, name)!r} must be an integer >= 1")
        for name in ("max_kl", "target_kl"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value <= 0):
                self._value_error(f"{name}={value!r} must be a number > 0, or None for none")
        for name in ("native_kernels", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                self._value_error(f"{name}={getattr(self, name)!r} must be True or False")
        if not isinstance(self.separate_shared_trunk, (bool, type(None))):
            self._value_error(
                f"separate_shared_trunk={self.separate_shared_trunk!r} must be True, False, or None for where needed"
            )
        for name in ("hypergradient_bound", "cross_clip_param"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < 0):
                self._value_error(f"{name}={value!r} must be a number >= 0, or None for none")
        for name, choices in (
            ("cross_reduction", CROSS_REDUCTIONS),
            ("correction_sample", CORRECTION_SAMPLES),
            ("advantage_horizon", ADVANTAGE_HORIZONS),
            ("advantage_refresh", REFRESHES),
            ("standardize_advantages", (True, False)),
        ):
            if getattr(self, name) not in choices:
                self._value_error(f"{name}={getattr(self, name)!r} must be {' or '.join(map(repr, choices))}")
        if self.hypergradient_bound == 0:
            self._value_error(
                "hypergradient_bound=0 computes the correction and throws it away: "
                'use hypergradient="none" for nested PPO'
            )

    def _validate_solver(self) -> None:
        try:
            self.get_ihvp_solver()
            self.get_curvature()
        except ValueError as error:
            self._value_error(str(error))

    def _validate_without_meaning(self) -> None:
        for message in ppo_settings.refusals(self):
            self._value_error(message)
        for name, rate in (("actor_lr", self.get_actor_lr()), ("critic_lr", self.get_critic_lr())):
            if self._torch_lr_scheduler_classes is not None and isinstance(rate, (list, tuple)):
                self._value_error(
                    f"{name}={rate!r} with _torch_lr_scheduler_classes: give rates as schedules [[timestep, value], "
                    "...] or as torch schedulers, not both"
                )
        if self.grad_clip is not None and self.grad_clip_by != "global_norm":
            self._value_error(
                f"grad_clip_by={self.grad_clip_by!r} is not supported by BLPO: use 'global_norm' (per player)"
            )

    def _validate_learners(self) -> None:
        if (self.num_learners or 0) > 1 and 0 < self.num_gpus_per_learner < 1:
            self._value_error(
                f"num_gpus_per_learner={self.num_gpus_per_learner!r} with num_learners={self.num_learners}: NCCL takes "
                "no two learners on one GPU. Use num_gpus_per_learner=1, or num_learners=1"
            )

    def _validate_segments(self) -> None:
        if self.segment_length is not None and (not isinstance(self.segment_length, int) or self.segment_length < 1):
            self._value_error(f"segment_length={self.segment_length!r} must be an integer >= 1, or None")
        if self.minibatch_size is None or self.in_evaluation:
            return
        length, batch_size = self.get_segment_length(), self._steps_per_learner()
        num_segments, num_minibatches = max(1, round(batch_size / length)), round(batch_size / self.minibatch_size)
        if num_segments < num_minibatches:
            self._value_error(
                f"minibatch_size={self.minibatch_size} makes {num_minibatches} minibatches of a batch of {batch_size} "
                f"steps, but it holds only {num_segments} whole trajectory segments of {length} steps. Use "
                f"minibatch_size={length} or more, or segment_length={self.minibatch_size} or less, or leave "
                "segment_length unset"
            )

    def _steps_per_learner(self) -> int:
        """Steps that a batch holds: all EnvRunners sample whole fragments until there are enough."""
        workers = range(1, self.num_env_runners + 1) if self.num_env_runners else [0]
        sampled = self.num_envs_per_env_runner * sum(self.get_rollout_fragment_length(worker) for worker in workers)
        rounds = -(-self.total_train_batch_size // sampled)
        return rounds * sampled // (self.num_learners or 1)

    def _validate_modules(self) -> None:
        for module_id, spec in self._specs_by_module():
            self._validate_module(module_id, spec)

    def _specs_by_module(self) -> Iterator[tuple[str, RLModuleSpec]]:
        """The modules that are trained, as far as that can be known now."""
        spec = self.rl_module_spec
        if isinstance(spec, MultiRLModuleSpec):
            specs = dict(spec.rl_module_specs)
        else:
            specs = dict.fromkeys(self.policies, spec)
        for module_id, module_spec in specs.items():
            if (
                self.policies_to_train is None
                or callable(self.policies_to_train)
                or module_id in self.policies_to_train
            ):
                yield module_id, module_spec

    def _validate_module(self, module_id: str, spec: RLModuleSpec) -> None:
        try:
            if spec.module_class is not None and not issubclass(spec.module_class, ValueFunctionAPI):
                if not self._may_do_without_values(spec.module_class):
                    check_module_class(spec.module_class, module_id)
                return
            self._check_built_module(module_id, spec)
        except ValueError as error:
            self._value_error(str(error))

    def _may_do_without_values(self, module_class: type) -> bool:
        """Whether a module without value function may be left untrained, or be trained by another loss than BLPO's."""
        return (
            callable(self.policies_to_train)
            or issubclass(module_class, SelfSupervisedLossAPI)
            or self.learner_class.has_loss_of_its_own()
        )

    def _check_built_module(self, module_id: str, spec: RLModuleSpec) -> None:
        """Builds the module where its spaces are known already, to find out what only its parameters tell.

        Without spaces the same checks run when the learner is built, before any training.
        """
        policy = self.policies.get(module_id) if isinstance(self.policies, dict) else None
        spaces = [spec, policy] if self.is_multi_agent else [spec, policy, self]
        observation_space, action_space = (
            next((space for x in spaces if (space := getattr(x, name, None)) is not None), None)
            for name in ("observation_space", "action_space")
        )
        solver = self.get_ihvp_solver()
        if observation_space is None or action_space is None:
            return
        own = {} if spec.model_config is None else rllib_private.full_model_config(spec)
        complete = RLModuleSpec(
            module_class=spec.module_class or BLPOTorchRLModule,
            observation_space=observation_space,
            action_space=action_space,
            model_config=self.model_config | own,
            catalog_class=spec.catalog_class,
        )
        module = self._adapted(complete).build()
        players = RLModulePlayers(module, module_id)
        if solver is not None:
            solver.check_size(sum(p.numel() for p in players.critic_parameters))


def _differs(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str, list, tuple, type(None))
    return isinstance(value, plain) and isinstance(default, plain) and value != default


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _end_process() -> None:
    """Ends a trial's process at once, whose learner or EnvRunner died while it was being made: Tune starts another.

    An exception would leave Tune waiting: Ray lets an actor whose constructor failed live until the tasks that it
    submitted end, and the creation of an actor that died meanwhile never does (ray/core/src/ray/core_worker,
    TaskManager::DrainAndShutdown).
    """
    logger.exception("a learner or EnvRunner died while the algorithm was being made; the trial starts anew")
    logging.shutdown()
    os._exit(1)


class BLPO(PPO):
    """PPO's synchronous sample-and-learn loop with :class:`~blpo_rllib.learning.learner.BLPOTorchLearner`.

    Checkpoints are sealed (:mod:`blpo_rllib.checkpoints`), and one that is torn or foreign is refused. In a Tune trial
    the algorithm goes back by itself to the trial's newest whole checkpoint, whenever it is started.
    """

    @classmethod
    @override(PPO)
    def get_default_config(cls) -> AlgorithmConfig:
        return BLPOConfig()

    @override(PPO)
    def setup(self, config: AlgorithmConfig) -> None:
        self._resumed = False
        if config.native_kernels:
            # The learner needs them last of all.
            native.begin()
        try:
            super().setup(config)
            if self._storage is not None:
                self._resume(self._storage)
        except RayActorError as error:
            # One whose constructor raised is a wrong setting, for the user to read.
            if self._storage is not None and not error.actor_init_failed:
                _end_process()
            raise

    def _resume(self, storage: Any) -> None:
        """Goes back to the newest whole checkpoint in the trial's folder, which may be newer than the one Tune knows.

        Tune learns of a checkpoint after it is written, deems it whole without a look, and starts from scratch if it
        cannot be restored (ray/tune/experiment/trial.py, _handle_restore_error).
        """
        filesystem, folder = storage.storage_filesystem, storage.trial_fs_path
        numbers = [checkpoints.index(path) for path in checkpoints.checkpoints(filesystem, folder)]
        # Tune numbers on from what it knows, and would write into a checkpoint that is there already.
        storage.current_checkpoint_index = max([storage.current_checkpoint_index, *numbers])
        found = checkpoints.newest_valid(filesystem, folder)
        if found is None:
            return
        path, about = found
        super().restore(rllib_private.TrainingResult(Checkpoint(path, filesystem), about["progress"]))
        self._resumed = True
        logger.warning("going on from checkpoint %s: %s", path, about["progress"])

    @override(PPO)
    def restore(self, checkpoint_path: Any) -> None:
        """Tune's call on a restarted trial, which is back already; another trial's checkpoint (from PBT) is taken."""
        checkpoint = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        folder = Path(getattr(checkpoint, "path", checkpoint)).parent
        if not (self._resumed and folder == Path(self._storage.trial_fs_path)):
            super().restore(checkpoint_path)

    @override(PPO)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # Without EnvRunners of its own the evaluation borrows the training's.
        borrowed = self.env_runner if self.eval_env_runner_group is None else None
        with kept_statistics(borrowed):
            return super().evaluate(*args, **kwargs)

    @override(PPO)
    def _before_evaluate(self) -> None:
        super()._before_evaluate()
        if self.eval_env_runner_group is None:
            return
        # Beside a training iteration in another thread RLlib's own merge at its end has to do.
        if not self.config.evaluation_parallel_to_training:
            merge_training_statistics(self)
        use_training_statistics(self)

    @override(PPO)
    def training_step(self) -> None:
        self._check_learners()
        with direct_weights(self.env_runner_group, self.learner_group):
            super().training_step()

    def _check_learners(self) -> None:
        """RLlib goes on with the learners that are left (ray/rllib/utils/actor_manager.py, healthy_only), and ignores
        one that dies while it writes its part of a checkpoint (ray/rllib/utils/checkpoints.py, save_to_path).

        Raises:
            RuntimeError: If a learner died; Tune then starts the algorithm anew.
        """
        manager = rllib_private.learner_actors(self.learner_group)
        if manager is not None and manager.num_healthy_actors() < manager.num_actors():
            dead = manager.num_actors() - manager.num_healthy_actors()
            raise RuntimeError(f"{dead} of {manager.num_actors()} learners died; training goes back to a checkpoint")

    @override(PPO)
    def save_to_path(self, path: Any = None, *, filesystem: pyarrow.fs.FileSystem | None = None, **kwargs: Any) -> str:
        path = path or tempfile.mkdtemp()
        filesystem, path = checkpoints.resolve(path, filesystem)
        super().save_to_path(path, filesystem=filesystem, **kwargs)
        self._check_learners()
        progress = {TRAINING_ITERATION: self.training_iteration, TIME_TOTAL_S: self._time_total}
        progress[NUM_ENV_STEPS_SAMPLED_LIFETIME] = int(self.metrics.peek(_ENV_STEPS, default=0))
        checkpoints.seal(filesystem, path, {"progress": progress})
        return path

    @override(PPO)
    def restore_from_path(
        self,
        path: Any,
        *args: Any,
        component: str | None = None,
        filesystem: pyarrow.fs.FileSystem | None = None,
        **kwargs: Any,
    ) -> None:
        if component is not None:
            super().restore_from_path(path, *args, component=component, filesystem=filesystem, **kwargs)
            return
        filesystem, path = checkpoints.resolve(path, filesystem)
        checkpoints.check(filesystem, path)
        self._forget_weights_seq_no()
        # RLlib looks for parts of it on the local disk, whatever the filesystem, and leaves EnvRunners as they are
        # when it finds none (ray/rllib/algorithms/algorithm.py, restore_from_path).
        with Checkpoint(path, filesystem).as_directory() as folder:
            super().restore_from_path(folder, *args, **kwargs)

    def _forget_weights_seq_no(self) -> None:
        """Weights older than those in place are ignored (ray/rllib/core/learner/learner.py and
        ray/rllib/env/single_agent_env_runner.py, set_state), which must not happen to a checkpoint's.
        """
        self.learner_group.foreach_learner(rllib_private.take_older_weights)
        for group in (self.env_runner_group, self.eval_env_runner_group):
            if group is not None:
                group.foreach_env_runner(rllib_private.take_older_weights)

    @classmethod
    @override(PPO)
    def from_checkpoint(cls, path: Any, filesystem: pyarrow.fs.FileSystem | None = None, **kwargs: Any) -> Algorithm:
        checkpoints.check(*checkpoints.resolve(path, filesystem))
        return super().from_checkpoint(path, filesystem=filesystem, **kwargs)
