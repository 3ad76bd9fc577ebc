"""BLPO (Bi-Level Policy Optimization, Prakash et al. 2025, arXiv:2505.11714) as an RLlib algorithm."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pyarrow.fs
from ray.exceptions import RayActorError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.ppo.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.rllib.utils.schedules.scheduler import Scheduler
from ray.rllib.utils.typing import LearningRateOrSchedule
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.result import TIME_TOTAL_S, TRAINING_ITERATION

from blpo_rllib import checkpoints
from blpo_rllib.core.advantages import REFRESHES
from blpo_rllib.core.curvature import CURVATURES, Curvature
from blpo_rllib.core.hypergradient import CORRECTION_SAMPLES, CROSS_REDUCTIONS
from blpo_rllib.core.ihvp import ConjugateGradient, Exact, IHVPSolver, Nystrom, ScaledIdentity
from blpo_rllib.learning.players import RLModulePlayers, check_module_class
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG, BLPOTorchRLModule
from blpo_rllib.sampling.env_runner import BatchedEnvRunner
from blpo_rllib.sampling.envpool import check_task, envpool_task

logger = logging.getLogger(__name__)

_ENV_STEPS = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)

ADVANTAGE_HORIZONS = ("segment", "rollout")

# The solvers that `hypergradient` knows by name, made from the config's fields.
IHVP_SOLVERS: dict[str, Callable[[BLPOConfig], IHVPSolver | None]] = {
    "nystrom": lambda config: Nystrom(
        config.nystrom_rank, config.nystrom_damping, config.nystrom_core_shift, config.nystrom_redraw
    ),
    "cg": lambda config: ConjugateGradient(config.cg_iterations, config.cg_damping),
    "exact": lambda config: Exact(config.exact_damping),
    "scaled_identity": lambda config: ScaledIdentity(config.scaled_identity_damping),
    "none": lambda config: None,
}


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
    nystrom_core_shift: float
    nystrom_redraw: bool
    cg_iterations: int
    cg_damping: float
    exact_damping: float
    scaled_identity_damping: float
    env_runner_cls: type | None

    def __init__(self, algo_class: type[Algorithm] | None = None):
        super().__init__(algo_class=algo_class or BLPO)

        # PPO's, at the reference's values.
        self.gamma = 0.99
        self.lambda_ = 0.95
        self.clip_param = 0.2
        self.num_epochs = 4
        self.train_batch_size_per_learner = 20480
        self.minibatch_size = 640
        self.num_env_runners = 0
        self.num_envs_per_env_runner = 32

        # PPO's, without meaning here.
        self.lr = None
        self.use_kl_loss = False
        self.vf_clip_param = None

        # BLPO's own.
        self.actor_lr: LearningRateOrSchedule = 3e-4
        self.critic_lr: LearningRateOrSchedule = 1.2e-3
        self.adam_epsilon = 1e-5
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
        self.nystrom_core_shift = 1.0
        self.nystrom_redraw = False
        self.cg_iterations = 20
        self.cg_damping = 0.0
        self.exact_damping = 50.0
        self.scaled_identity_damping = 50.0
        self.native_kernels = True

    @override(PPOConfig)
    def training(
        self,
        *,
        actor_lr: LearningRateOrSchedule = NotProvided,
        critic_lr: LearningRateOrSchedule = NotProvided,
        adam_epsilon: float = NotProvided,
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
        nystrom_core_shift: float = NotProvided,
        nystrom_redraw: bool = NotProvided,
        cg_iterations: int = NotProvided,
        cg_damping: float = NotProvided,
        exact_damping: float = NotProvided,
        scaled_identity_damping: float = NotProvided,
        native_kernels: bool = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets the training related configuration.

        Args:
            actor_lr: Adam learning rate of the actor (the leader), > 0, or a schedule ``[[timestep, value], ...]``.
            critic_lr: Adam learning rate of the critic (the follower), > 0, or a schedule.
            adam_epsilon: Adam's ε of both optimizers, > 0.
            max_kl: KL divergence from the policy that sampled, > 0, averaged over an epoch, at which that is the
                iteration's last. None: all epochs, always.
            target_kl: KL divergence > 0, averaged over an iteration, that the actor's learning rate is steered to: the
                rate is divided by 1.5 where the policy moved more than twice as far, multiplied by 1.5 where less than
                half as far, and stays between 1/100 and 10 times ``actor_lr``. None: the rate is ``actor_lr``.
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
                critics only), "scaled_identity" (v/ρ, no curvature), or an
                :class:`~blpo_rllib.core.ihvp.IHVPSolver`. "none" leaves the correction out: nested PPO.
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
            nystrom_rank: k >= 1, at most the number of critic parameters.
            nystrom_damping: ρ > 0.
            nystrom_core_shift: δ, added to the diagonal of the Nyström core; 0 is the textbook formula.
            nystrom_redraw: Draw new coordinates for each minibatch instead of keeping the first draw.
            cg_iterations: Conjugate-gradient steps, >= 1.
            cg_damping: ρ >= 0 of the conjugate-gradient solver.
            exact_damping: ρ >= 0 of the exact solver.
            scaled_identity_damping: ρ > 0 of the solver without curvature.
            native_kernels: Take perceptrons on a CPU through compiled kernels, built once per machine with g++ (without
                one: a warning, and torch operations instead). They give way to ``torch_compile_learner``.
            **kwargs: PPO's and RLlib's own arguments. ``minibatch_size`` counts steps and should be a multiple of the
                segment length; ``lr``, ``vf_clip_param``, ``vf_loss_coeff``, ``use_critic`` and ``use_gae`` have no
                meaning here and are refused by :meth:`validate`.

        Returns:
            This config.
        """
        super().training(**kwargs)
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self

    @override(PPOConfig)
    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=BLPOTorchRLModule)

    @override(PPOConfig)
    def get_default_learner_class(self) -> type:
        from blpo_rllib.learning.learner import BLPOTorchLearner

        return BLPOTorchLearner

    @property
    @override(PPOConfig)
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return super()._model_config_auto_includes | REFERENCE_MODEL_CONFIG

    def get_segment_length(self) -> int:
        """Steps per segment, with None resolved to the rollout fragment."""
        return self.segment_length or self.get_rollout_fragment_length()

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
        if isinstance(self.hypergradient, IHVPSolver):
            return self.hypergradient
        if self.hypergradient not in IHVP_SOLVERS:
            raise ValueError(
                f"hypergradient={self.hypergradient!r} must be one of {', '.join(map(repr, IHVP_SOLVERS))}, "
                "or an IHVPSolver"
            )
        return IHVP_SOLVERS[self.hypergradient](self)

    @override(PPOConfig)
    def validate(self) -> None:
        super().validate()
        self._choose_env_runner()
        self._validate_envpool()
        self._validate_ranges()
        self._validate_solver()
        self._validate_without_meaning()
        self._validate_segments()
        self._validate_modules()

    def _choose_env_runner(self) -> None:
        """Batched sampling by default, where RLlib would take its single-agent EnvRunner."""
        if self.env_runner_cls in (None, BatchedEnvRunner):
            self.env_runner_cls = None if self.is_multi_agent or self.output else BatchedEnvRunner

    def _validate_envpool(self) -> None:
        task = envpool_task(self.env)
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
        for name in ("actor_lr", "critic_lr"):
            rate = getattr(self, name)
            Scheduler.validate(fixed_value_or_schedule=rate, setting_name=name, description="learning rate")
            values = [value for _, value in rate] if isinstance(rate, (list, tuple)) else [rate]
            if not all(_is_number(value) and value >= 0 for value in values) or not any(values):
                self._value_error(f"{name}={rate!r} must be a number > 0, or a schedule of numbers >= 0")
        if not _is_number(self.adam_epsilon) or self.adam_epsilon <= 0:
            self._value_error(f"adam_epsilon={self.adam_epsilon!r} must be > 0 (the reference uses 1e-5)")
        for name in ("num_critic_updates", "num_epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                self._value_error(f"{name}={getattr(self, name)!r} must be an integer >= 1")
        for name in ("max_kl", "target_kl"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value <= 0):
                self._value_error(f"{name}={value!r} must be a number > 0, or None for none")
        if not isinstance(self.native_kernels, bool):
            self._value_error(f"native_kernels={self.native_kernels!r} must be True or False")
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

        if self.torch_compile_learner and self.nystrom_redraw:
            self._value_error(
                "nystrom_redraw=True with torch_compile_learner=True would compile the update anew for every draw: "
                "set one of them to False"
            )

    def _validate_without_meaning(self) -> None:
        for name, neutral, remedy in (
            ("lr", None, "set actor_lr and critic_lr (the reference takes critic_lr = 4 * actor_lr)"),
            ("use_critic", True, "BLPO needs the critic: leave it True"),
            ("use_gae", True, "BLPO differentiates through GAE: leave it True"),
            ("vf_loss_coeff", 1.0, "the critic has an optimizer of its own: set critic_lr"),
            ("vf_clip_param", None, "the critic's loss is the plain squared error: leave it None"),
            ("_torch_grad_scaler_class", None, "BLPO trains in one precision: leave it None"),
            ("_torch_lr_scheduler_classes", None, "give actor_lr and critic_lr as schedules [[timestep, value], ...]"),
            ("num_aggregator_actors_per_learner", 0, "BLPO packs segments on the learner: leave it 0"),
        ):
            if getattr(self, name) != neutral:
                self._value_error(f"{name}={getattr(self, name)!r} has no meaning for BLPO: {remedy}")
        if self.grad_clip is not None and self.grad_clip_by != "global_norm":
            self._value_error(
                f"grad_clip_by={self.grad_clip_by!r} is not supported by BLPO: use 'global_norm' (per player)"
            )

    def _validate_segments(self) -> None:
        if self.segment_length is not None and (not isinstance(self.segment_length, int) or self.segment_length < 1):
            self._value_error(f"segment_length={self.segment_length!r} must be an integer >= 1, or None")
        if self.minibatch_size is None:
            return
        length, batch_size = self.get_segment_length(), self.train_batch_size_per_learner
        num_segments, num_minibatches = max(1, batch_size // length), round(batch_size / self.minibatch_size)
        if num_segments < num_minibatches:
            self._value_error(
                f"minibatch_size={self.minibatch_size} makes {num_minibatches} minibatches of a batch of {batch_size} "
                f"steps, but it holds only {num_segments} whole trajectory segments of {length} steps. Use "
                f"minibatch_size={length} or more, or more environments (num_env_runners * num_envs_per_env_runner >= "
                f"{num_minibatches}), or cut segments with segment_length={self.minibatch_size}"
            )

    def _validate_modules(self) -> None:
        spec = self.rl_module_spec
        specs = spec.rl_module_specs if isinstance(spec, MultiRLModuleSpec) else {"default_policy": spec}
        for module_id, module_spec in (specs or {}).items():
            if callable(self.policies_to_train) or module_id in (self.policies_to_train or specs):
                self._validate_module(module_id, module_spec)

    def _validate_module(self, module_id: str, spec: RLModuleSpec) -> None:
        model_config = self.model_config if spec.model_config is None else spec.model_config
        shared = isinstance(model_config, dict) and model_config.get("vf_share_layers")
        if shared or getattr(model_config, "vf_share_layers", False):
            self._value_error(
                f"vf_share_layers=True in the model config of module {module_id!r}: BLPO's actor (leader) and critic "
                "(follower) must be separate networks: set vf_share_layers=False (DefaultModelConfig sets it True)"
            )
        try:
            if spec.module_class is not None:
                check_module_class(spec.module_class, module_id)
            self._check_built_module(module_id, spec)
        except ValueError as error:
            self._value_error(str(error))

    def _check_built_module(self, module_id: str, spec: RLModuleSpec) -> None:
        """Builds the module where its spaces are known already, to find out what only its parameters tell.

        Without spaces the same checks run when the learner is built, before any training.
        """
        observation_space = spec.observation_space or self.observation_space
        action_space = spec.action_space or self.action_space
        solver = self.get_ihvp_solver()
        if observation_space is None or action_space is None:
            return
        module = RLModuleSpec(
            module_class=spec.module_class or BLPOTorchRLModule,
            observation_space=observation_space,
            action_space=action_space,
            model_config=self.model_config if spec.model_config is None else spec.model_config,
            catalog_class=spec.catalog_class,
        ).build()
        players = RLModulePlayers(module, module_id)
        if solver is not None:
            solver.check_size(sum(p.numel() for p in players.critic_parameters))


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
        super().restore(_TrainingResult(Checkpoint(path, filesystem), about["progress"]))
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
    def training_step(self) -> None:
        self._check_learners()
        super().training_step()

    def _check_learners(self) -> None:
        """RLlib goes on with the learners that are left (ray/rllib/utils/actor_manager.py, healthy_only), and ignores
        one that dies while it writes its part of a checkpoint (ray/rllib/utils/checkpoints.py, save_to_path).

        Raises:
            RuntimeError: If a learner died; Tune then starts the algorithm anew.
        """
        manager = self.learner_group._worker_manager
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

        def forget(worker: Any) -> None:
            worker._weights_seq_no = 0

        self.learner_group.foreach_learner(forget)
        for group in (self.env_runner_group, self.eval_env_runner_group):
            if group is not None:
                group.foreach_env_runner(forget)

    @classmethod
    @override(PPO)
    def from_checkpoint(cls, path: Any, filesystem: pyarrow.fs.FileSystem | None = None, **kwargs: Any) -> Algorithm:
        checkpoints.check(*checkpoints.resolve(path, filesystem))
        return super().from_checkpoint(path, filesystem=filesystem, **kwargs)
