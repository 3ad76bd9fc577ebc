"""The RLlib learner: segments, optimizers, schedules, checkpoints and metrics around the bilevel update."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import torch
import tree
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import AddTimeDimToBatchAndZeroPad, GeneralAdvantageEstimation
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import DEFAULT_OPTIMIZER, LR_KEY, Learner
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.apis import SelfSupervisedLossAPI, ValueFunctionAPI
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.annotations import override

from blpo_rllib.core import native
from blpo_rllib.core.advantages import AdvantageRule, Rollouts
from blpo_rllib.core.gae import AdvantageOperator, Masks, advantage_operator
from blpo_rllib.core.graphs import CudaGraphs
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.minibatch import Counts, UpdateSettings
from blpo_rllib.core.native import Kernels
from blpo_rllib.core.networks import flatten
from blpo_rllib.core.reduction import AllReduce, Reduction
from blpo_rllib.core.segments import SegmentBatch, SegmentPlan
from blpo_rllib.core.update import BilevelUpdate
from blpo_rllib.learning import hooks
from blpo_rllib.learning.connectors import (
    BATCH_SIZES,
    MINIBATCH_SIZE,
    SEGMENT_CONTINUES,
    SEGMENT_INDEX,
    SEGMENT_STEP,
    AddStateOfEachStep,
    BatchSizes,
    PackSegments,
    RewardScale,
    normalize_rewards,
    pack_on_host,
)
from blpo_rllib.learning.direct import run_pipeline
from blpo_rllib.learning.players import (
    RLModulePlayers,
    batch_of,
    blank_action,
    blank_observation,
    check_module_class,
)
from blpo_rllib.learning.separate import SeparatePlayersModule
from blpo_rllib.learning.train_batch import ModuleSegments
from blpo_rllib.rllib_private import lr_scheduler_makers

logger = logging.getLogger(__name__)

ACTOR_OPTIMIZER = "actor"
CRITIC_OPTIMIZER = "critic"
COMPONENT_BILEVEL = "bilevel"
COMPONENT_LEARNER_CONNECTOR = "learner_connector"
COMPONENT_LR_SCHEDULERS = "lr_schedulers"

# Each shape of a batch has a graph of its own: slots per segment are rounded up to keep their number small.
GRAPHED_WIDTH_MULTIPLE = 32
# The same for the CPU's recordings, which take a hundredth of a second.
REPLAYED_WIDTH_MULTIPLE = 4


class BLPOTorchLearner(PPOTorchLearner):
    """Runs BLPO's update phase on episodes. Derive a learner of your own from this class.

    What a subclass may override, besides RLlib's ``build``, ``before_gradient_based_update`` and
    ``after_gradient_based_update``:

    - :meth:`compute_leader_loss_for_module` and :meth:`compute_follower_loss_for_module`, terms added to the leader's
      objective J and to the follower's L; both enter the hypergradient with all their derivatives;
    - :meth:`compute_loss_for_module`, RLlib's own hook: what it adds to ``super()``'s value is added to both
      objectives, and each player goes by its derivative in its own parameters, as each network does in PPO;
    - :meth:`postprocess_gradients_for_module`, called with the direction of each critic step and each actor step;
    - :meth:`configure_optimizers_for_module`, to do more than ``super()`` does.

    Methods of RLlib's that have no place in the update are refused: :data:`blpo_rllib.learning.hooks.WITHOUT_MEANING`.
    Modules without value function are trained as in PPO, if they or a subclass have a loss for them.

    From PPO's learner it keeps the entropy and KL coefficients, the episode handling up to the flat batch, and the
    checks on modules. Two hooks carry the difference: ``_create_iterator_if_necessary`` hands over the whole batch once
    instead of cutting it into minibatches of single steps on the host (RLlib offers no narrower place to keep segments
    whole), and ``_update`` runs all epochs on it, on the device.
    """

    @classmethod
    def has_loss_of_its_own(cls) -> bool:
        """Whether a subclass computes a loss."""
        return "compute_loss_for_module" in cls._overridden()

    @classmethod
    def check(cls) -> None:
        """Raises ValueError if a subclass overrides what has no place in the update."""
        hooks.check(cls, BLPOTorchLearner)

    @classmethod
    def _overridden(cls) -> set[str]:
        names = {"compute_loss_for_module", "compute_leader_loss_for_module", "compute_follower_loss_for_module"}
        names.add("postprocess_gradients_for_module")
        return {name for name in names if hooks.overrides(cls, BLPOTorchLearner, name)}

    @override(Learner)
    def build(self) -> None:
        self.check()
        # The players are made in `configure_optimizers_for_module`, which `super().build()` calls.
        self._bilevel_updates: dict[str, BilevelUpdate] = {}
        self._players: dict[str, RLModulePlayers] = {}
        self._reward_scale: RewardScale | None = None
        # Connectors in which learners exchange numbers: every learner runs them, with or without episodes.
        self._meeting_connectors: list[ConnectorV2] = []
        self._reduction = AllReduce() if self.distributed else Reduction()
        super().build()
        self._check_updates()
        if self._learner_connector is None or not self.config.add_default_connectors_to_learner_pipeline:
            return
        if self.config.normalize_rewards:
            self._reward_scale = normalize_rewards(self._learner_connector, self.config.gamma, self._reduction)
            self._meeting_connectors.append(self._reward_scale)
        # PPO computes advantages once, on the host; here they are a function of the critic, inside the update.
        self._learner_connector.remove(GeneralAdvantageEstimation)
        self._learner_connector.insert_before(AddTimeDimToBatchAndZeroPad, AddStateOfEachStep())
        width_multiple = GRAPHED_WIDTH_MULTIPLE if self._makes_graphs else REPLAYED_WIDTH_MULTIPLE
        pack = PackSegments(self._plan_segments, self._blank_item, width_multiple, self._device)
        self._learner_connector.append(pack)
        self._meeting_connectors.append(pack)

    @override(TorchLearner)
    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self._module[module_id].unwrapped()
        if not isinstance(module, ValueFunctionAPI):
            self._configure_without_values(module_id, module, config)
            return
        if broken := [name for name, p in module.named_parameters() if not torch.isfinite(p).all()]:
            raise ValueError(
                f"module {module_id!r} ({type(module).__name__}) has NaN or infinite weights before training: "
                f"{', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}. Look at how they are initialised"
            )
        if isinstance(module, SeparatePlayersModule) and config.separate_shared_trunk is None:
            logger.warning(
                "module %r (%s) shares parameters between policy and value function, which BLPO's players cannot: it "
                "is trained as two copies, of which one acts and the other gives values (separate_shared_trunk=True "
                "does so without this warning, False refuses it)",
                module_id,
                type(module.actor).__name__,
            )
        players = self._make_players(module_id, config)
        solver = copy.deepcopy(config.get_ihvp_solver())
        if solver is not None:
            solver.check_size(sum(p.numel() for p in players.critic_parameters))
        optimizers = {}
        for name, parameters, lr in (
            (ACTOR_OPTIMIZER, players.actor_members, config.get_actor_lr()),
            (CRITIC_OPTIMIZER, players.critic_members, config.get_critic_lr()),
        ):
            # The update steps it through AdamSteps; fused, so that the state it keeps is that of the kernel used there.
            optimizers[name] = torch.optim.Adam(parameters, eps=config.adam_epsilon, fused=True)
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=optimizers[name],
                params=parameters,
                lr_or_lr_schedule=lr,
            )
        self._make_lr_schedulers(module_id)
        self._players[module_id] = players
        losses = self._overridden() - {"postprocess_gradients_for_module"}
        postprocess = None
        if config.log_gradients or "postprocess_gradients_for_module" in self._overridden():
            postprocess = functools.partial(hooks.postprocessed, self, module_id)
        self._bilevel_updates[module_id] = BilevelUpdate(
            players,
            optimizers[ACTOR_OPTIMIZER],
            optimizers[CRITIC_OPTIMIZER],
            config.get_curvature(),
            solver,
            # The same on all learners, so that they draw the same coordinates; different for each module.
            [config.seed or 0, zlib.crc32(module_id.encode())],
            self._reduction,
            CudaGraphs(self._device) if self._makes_graphs else None,
            self.kernels,
            hooks.LearnerLosses(self, module_id, losses) if losses else None,
            postprocess,
        )

    def _configure_without_values(self, module_id: str, module: Any, config: Any) -> None:
        """Trained by its own loss or a subclass's, with one optimizer as in PPO, or not at all."""
        if self._is_never_trained(module_id):
            return
        if isinstance(module, SelfSupervisedLossAPI) or self.has_loss_of_its_own():
            parameters = self.get_parameters(module)
            self.register_optimizer(
                module_id=module_id,
                optimizer=torch.optim.Adam(parameters),
                params=parameters,
                lr_or_lr_schedule=config.get_actor_lr(),
            )
        elif not callable(self.config.policies_to_train):
            check_module_class(type(module), module_id)

    def _check_updates(self) -> None:
        """A subclass that configures optimizers without ``super()`` would leave its modules untrained."""
        for module_id in self.module.keys():  # noqa: SIM118
            module = self._module[module_id].unwrapped()
            trained = isinstance(module, ValueFunctionAPI) and self.rl_module_is_compatible(self._module[module_id])
            if trained and module_id not in self._bilevel_updates:
                raise ValueError(
                    f"{type(self).__name__} configures optimizers for module {module_id!r} in its own way, but BLPO's "
                    "update steps its own two: call super().configure_optimizers_for_module(), and set learning rates "
                    "by actor_lr and critic_lr"
                )

    def players_of(self, module_id: str) -> RLModulePlayers:
        """The actor and the critic of a module, with the parameters that are trainable now."""
        return self._players[module_id]

    def _make_players(self, module_id: str, config: Any) -> RLModulePlayers:
        module = self._module[module_id].unwrapped()
        return RLModulePlayers(module, module_id, kernels=self.kernels, log_std_lr_factor=config.log_std_lr_factor)

    def _follow_freezing(self, module_id: str) -> None:
        """Makes new players where parameters were frozen or unfrozen (``requires_grad``) since the last update."""
        players = self._players[module_id]
        if players.are_current():
            return
        config = self.config.get_config_for_module(module_id)
        new = self._make_players(module_id, config)
        update = self._bilevel_updates[module_id]
        if list(map(id, new.critic_parameters)) != list(map(id, players.critic_parameters)):
            solver = config.get_ihvp_solver()
            if solver is not None:
                solver.check_size(sum(p.numel() for p in new.critic_parameters))
            update.forget_draw()
        self._players[module_id] = new
        update.take_players(new)

    def compute_leader_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor | None:
        """A term ℓ_J(θ, w) to add to the leader's objective J, which is minimised; None for none.

        Args:
            module_id: The module.
            config: Its configuration.
            batch: The minibatch slot by slot, with RLlib's columns; ``Columns.LOSS_MASK`` says which slots are steps.
            fwd_out: What the module's ``forward_train`` returns for it, with its graph.

        Returns:
            A scalar with its graph: a mean over the steps in the loss mask, or a function of the parameters alone.
        """
        return None

    def compute_follower_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor | None:
        """A term ℓ_L(θ, w) to add to the follower's objective L, as :meth:`compute_leader_loss_for_module` to J.

        It enters the nested steps, the curvature and the cross term.
        """
        return None

    @override(PPOTorchLearner)
    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """0: J and L are differentiated in closed form. What a subclass adds is added to both, see the class."""
        if module_id not in self._bilevel_updates:
            check_module_class(type(self._module[module_id].unwrapped()), module_id)
        return torch.zeros((), device=self._device)

    @override(PPOTorchLearner)
    def postprocess_gradients_for_module(
        self, *, module_id: str, config: Any = None, module_gradients_dict: dict[Any, Any]
    ) -> dict[Any, Any]:
        """Leaves a player's direction as it is; it is clipped (``grad_clip``) as the optimizer steps."""
        if module_id not in self._bilevel_updates:
            return super().postprocess_gradients_for_module(
                module_id=module_id, config=config, module_gradients_dict=module_gradients_dict
            )
        if config.log_gradients:
            for name, optimizer in self.get_optimizers_for_module(module_id):
                if own := self.filter_param_dict_for_optimizer(module_gradients_dict, optimizer):
                    norm = torch.linalg.vector_norm(flatten(list(own.values())))
                    self.metrics.log_value((module_id, f"gradients_{name}_global_norm"), norm, window=1)
        return module_gradients_dict

    def _make_lr_schedulers(self, module_id: str) -> None:
        """Torch's schedulers, for both optimizers; RLlib makes its own where it applies gradients."""
        makers = lr_scheduler_makers(self.config)
        makers = makers.get(module_id) if isinstance(makers, dict) else makers
        if not makers:
            return
        self._lr_schedulers[module_id] = {}
        for name in self._module_optimizers[module_id]:
            optimizer = self.get_optimizer(module_id, name)
            self._lr_schedulers[module_id][name] = [make(optimizer) for make in makers]
            # Updates step it through AdamSteps, of which torch's check for steps before the scheduler's knows nothing.
            optimizer._opt_called = True

    @property
    def kernels(self) -> Kernels | None:
        """The compiled kernels; None on a GPU, where they are turned off, and where they cannot be built."""
        return native.load() if self.config.native_kernels and self._device.type == "cpu" else None

    @property
    def _makes_graphs(self) -> bool:
        """Whether minibatches are recorded as CUDA graphs; sums by another backend than NCCL cannot be part of one."""
        if self.distributed and torch.distributed.get_backend() != "nccl":
            return False
        return self.config.cuda_graphs and self._device.type == "cuda"

    def _is_never_trained(self, module_id: str) -> bool:
        to_train = self.config.policies_to_train
        return to_train is not None and not callable(to_train) and module_id not in to_train

    @override(PPOTorchLearner)
    def remove_module(self, module_id: str, **kwargs: Any) -> Any:
        self._bilevel_updates.pop(module_id, None)
        self._players.pop(module_id, None)
        return super().remove_module(module_id, **kwargs)

    def _plan_segments(self, num_steps: dict[str, int], minibatch_size: int | None) -> dict[str, SegmentPlan]:
        """Agrees with the other learners on how to cut the batch: modules and minibatches are the same on all."""
        module_ids = sorted(self._bilevel_updates)
        own = [num_steps.get(module_id, 0) for module_id in module_ids]
        everyone, rank = self._reduction.gather(own), self._reduction.rank
        return {
            module_id: SegmentPlan.of(
                counts, rank, minibatch_size, self.config.get_config_for_module(module_id).get_segment_length()
            )
            for module_id, *counts in zip(module_ids, *everyone, strict=True)
            if any(counts)
        }

    def _blank_item(self, module_id: str) -> dict[str, Any]:
        """The columns of one item that is no step, [1, ...]."""
        module = self._module[module_id].unwrapped()
        obs, action = blank_observation(module, 1), blank_action(module, 1)
        with torch.no_grad():
            outputs = self._players[module_id].forward_train(batch_of(obs, action))[Columns.ACTION_DIST_INPUTS]
        zero = outputs.new_zeros(1)
        return {
            Columns.OBS: obs,
            Columns.ACTIONS: action,
            Columns.ACTION_DIST_INPUTS: outputs,
            Columns.ACTION_LOGP: zero,
            Columns.REWARDS: zero,
            Columns.TERMINATEDS: zero,
            Columns.LOSS_MASK: zero,
        }

    @override(Learner)
    def _create_iterator_if_necessary(
        self,
        *,
        training_data: TrainingData,
        num_epochs: int = 1,
        minibatch_size: int | None = None,
        **kwargs: Any,
    ) -> Iterable[MultiAgentBatch]:
        if training_data.data_iterators:
            raise ValueError(
                "update(data_iterators=...) was called, but BLPO is on-policy and learns from episodes of its own "
                "policy: call update(episodes=...), and leave offline_data(input_=...) unset"
            )
        if training_data.batch is not None:
            return [training_data.batch]
        assert training_data.episodes is not None
        columns = self._packed_columns(training_data.episodes, minibatch_size)
        num_steps = sum(map(len, training_data.episodes))
        return itertools.chain(
            [self._train_batch(columns, num_steps, num_epochs)],
            self._minibatches_of_others(
                columns, num_steps, num_epochs=num_epochs, minibatch_size=minibatch_size, **kwargs
            ),
        )

    def build_train_batch(
        self, episodes: list[Any], minibatch_size: int | None, num_epochs: int = 1
    ) -> MultiAgentBatch:
        """Turns episodes into trajectory segments, as :meth:`update` does before it trains on them.

        Connectors may change the episodes, and update their own state from them. All learners of a group have to make
        their batches at the same time, because they agree on how to cut them.

        Args:
            episodes: RLlib episodes or fragments; none where this learner got none.
            minibatch_size: Steps per minibatch; None for a single minibatch.
            num_epochs: Passes over the batch, >= 1.

        Returns:
            A :class:`~blpo_rllib.learning.train_batch.ModuleSegments` for each module to be trained that has a value
            function, to be passed to ``update(batch=...)``.
        """
        return self._train_batch(self._packed_columns(episodes, minibatch_size), sum(map(len, episodes)), num_epochs)

    def _train_batch(self, columns: dict[str, dict[str, Any]], num_steps: int, num_epochs: int) -> MultiAgentBatch:
        sizes = {module_id: x.pop(BATCH_SIZES, None) for module_id, x in columns.items()}
        modules = {}
        for module_id in self._to_train(columns, num_steps) & self._bilevel_updates.keys():
            segments = self._segment_batch(module_id, columns[module_id])
            rollouts = self._rollouts(module_id, columns[module_id], segments, sizes[module_id])
            modules[module_id] = ModuleSegments(segments, rollouts, sizes[module_id], num_epochs)
        return MultiAgentBatch(modules, num_epochs * num_steps)

    def _to_train(self, columns: dict[str, dict[str, Any]], num_steps: int) -> set[str]:
        """The modules to be trained, among those in the batch."""
        # What `policies_to_train` may look at.
        batch = MultiAgentBatch({module_id: SampleBatch(x) for module_id, x in columns.items()}, env_steps=num_steps)
        return {module_id for module_id in columns if self.should_module_be_updated(module_id, batch)}

    def _minibatches_of_others(
        self,
        columns: dict[str, dict[str, Any]],
        num_steps: int,
        *,
        num_epochs: int,
        minibatch_size: int | None,
        num_total_minibatches: int = 0,
        **kwargs: Any,
    ) -> Iterable[MultiAgentBatch]:
        """Minibatches of single steps, as PPO makes them, for modules without value function.

        Learners meet in each of them, so that all make the same number, of modules that all have steps of.
        """
        modules = self._to_train(columns, num_steps) - self._bilevel_updates.keys()
        for module_id in modules:
            if not self._module_optimizers[module_id]:
                check_module_class(type(self._module[module_id].unwrapped()), module_id)
        batches = {module_id: SampleBatch(columns[module_id]) for module_id in sorted(modules)}
        own = {module_id: len(batch) for module_id, batch in batches.items()}
        everyone = self._reduction.gather(own) if self._trains_others() else [own]
        common = set.intersection(*map(set, everyone))
        if idle := sorted(set.union(*map(set, everyone)) - common):
            logger.warning("modules %s: not trained on this batch, of which some learner has no step of theirs", idle)
        if not common:
            return []
        longest = max(sizes[module_id] for sizes in everyone for module_id in common)
        minibatch_size = minibatch_size or longest
        if self.distributed:
            num_total_minibatches = num_epochs * -(-longest // minibatch_size)
        # Environment steps are counted with the other modules.
        batch = MultiAgentBatch({module_id: batches[module_id] for module_id in sorted(common)}, env_steps=0)
        return super()._create_iterator_if_necessary(
            training_data=TrainingData(batch=batch),
            num_epochs=num_epochs,
            minibatch_size=minibatch_size,
            num_total_minibatches=num_total_minibatches,
            **kwargs,
        )

    def _trains_others(self) -> bool:
        """Whether there are modules without value function to train, the same on all learners."""
        return any(self._module_optimizers[module_id] for module_id in self._module_optimizers.keys() - self._players)

    def _packed_columns(self, episodes: list[Any], minibatch_size: int | None) -> dict[str, dict[str, Any]]:
        """What the connectors make of the episodes, by module, with :class:`BatchSizes` of segments."""
        assert self._learner_connector is not None
        shared_data: dict[str, Any] = {MINIBATCH_SIZE: minibatch_size, BATCH_SIZES: {}}
        columns: dict[str, Any] = {}
        pack_on_host(self._learner_connector)
        if episodes:
            columns = run_pipeline(self._learner_connector, self.module, episodes, shared_data, self.metrics)
        else:
            # RLlib's own connectors assume that there is an episode.
            for connector in self._meeting_connectors:
                columns = connector(rl_module=self.module, batch=columns, episodes=[], shared_data=shared_data)
        for module_id, sizes in shared_data[BATCH_SIZES].items():
            columns[module_id][BATCH_SIZES] = sizes
        return columns

    @override(TorchLearner)
    def _update(self, batch: dict[str, ModuleSegments], **kwargs: Any) -> tuple[Any, Any, Any]:
        if batch and not batch.keys() & self._bilevel_updates.keys():
            return self._update_others(batch)
        losses = {}
        # In the same order on all learners, because they exchange sums in each module's update.
        for module_id, part in sorted(batch.items()):
            self._follow_freezing(module_id)
            settings = self.update_settings(module_id, part.num_epochs)
            metrics = self._bilevel_updates[module_id].run(part.segments, part.num_minibatches, settings, part.rollouts)
            if any(metrics[name] for name in Counts._fields):
                logger.warning(
                    "module %r: steps were left out of this update for non-finite numbers (%s), and weights stayed as "
                    "they were; NaN or infinite rewards or observations and high learning rates are the usual causes",
                    module_id,
                    ", ".join(f"{name}={metrics[name]:g}" for name in Counts._fields),
                )
            losses[module_id] = _total_loss(metrics, settings.leader)
            # PPO's names: the critic's loss is never clipped, and without a penalty its coefficient is 0.
            metrics["vf_loss_unclipped"] = metrics["vf_loss"]
            if settings.leader.kl_coeff is None:
                metrics["curr_kl_coeff"] = 0.0
            self.metrics.log_dict(metrics, key=module_id, window=1)
        return {}, losses, {}

    def _update_others(self, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
        """RLlib's own update, for modules without value function."""
        fwd_out = self.module.forward_train(batch)
        losses = self.compute_losses(fwd_out=fwd_out, batch=batch)
        gradients = self.compute_gradients(losses)
        postprocessed: dict[Any, Any] = {}
        for module_id in batch:
            own: dict[Any, Any] = {}
            for _, optimizer in self.get_optimizers_for_module(module_id):
                own |= self.filter_param_dict_for_optimizer(gradients, optimizer)
            postprocessed |= self.postprocess_gradients_for_module(
                module_id=module_id,
                config=self.config.get_config_for_module(module_id),
                module_gradients_dict=own,
            )
        self.apply_gradients(postprocessed)
        return fwd_out, losses, {}

    @override(PPOTorchLearner)
    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        super().after_gradient_based_update(timesteps=timesteps)
        for module_id in self._bilevel_updates:
            # What PPO's only optimizer is called; here the actor's.
            lr = self._get_optimizer_lr(self.get_optimizer(module_id, ACTOR_OPTIMIZER))
            self.metrics.log_value((module_id, f"{DEFAULT_OPTIMIZER}_{LR_KEY}"), lr, window=1)

    def _segment_batch(self, module_id: str, columns: dict[str, Any]) -> SegmentBatch:
        if SEGMENT_STEP not in columns:
            raise ValueError(
                f"the train batch of module {module_id!r} holds no segments: leave "
                "add_default_connectors_to_learner_pipeline=True, or end your own learner pipeline in PackSegments"
            )
        config = self.config.get_config_for_module(module_id)
        dtype = next(self._module[module_id].unwrapped().parameters()).dtype

        def cast(x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        step, continues = columns[SEGMENT_STEP].to(dtype), columns[SEGMENT_CONTINUES].to(dtype)
        return SegmentBatch(
            obs=tree.map_structure(cast, columns[Columns.OBS]),
            actions=tree.map_structure(cast, columns[Columns.ACTIONS]),
            old_logp=cast(columns[Columns.ACTION_LOGP]),
            old_dist_inputs=cast(columns[Columns.ACTION_DIST_INPUTS]),
            rewards=cast(columns[Columns.REWARDS]),
            step=step,
            advantage=self._advantage_operator(
                Masks(step, columns[Columns.TERMINATEDS].to(dtype) * step, continues), config
            ),
        )

    def _rollouts(
        self, module_id: str, columns: dict[str, Any], segments: SegmentBatch, sizes: BatchSizes
    ) -> Rollouts | None:
        config = self.config.get_config_for_module(module_id)
        if config.advantage_horizon == "segment":
            return None
        return Rollouts.of(
            columns[SEGMENT_INDEX],
            segments.step,
            columns[Columns.TERMINATEDS].to(segments.step.dtype) * segments.step,
            sizes.num_items,
            lambda masks: self._advantage_operator(masks, config),
        )

    def _advantage_operator(self, masks: Masks, config: Any) -> AdvantageOperator:
        kernels = self.kernels if masks.step.dtype in native.DTYPES else None
        return advantage_operator(masks, config.gamma, config.lambda_, kernels)

    def update_settings(self, module_id: str, num_epochs: int) -> UpdateSettings:
        """The settings of a module's next update, at the present values of the schedules."""
        config = self.config.get_config_for_module(module_id)
        kl_coeff = self.curr_kl_coeffs_per_module[module_id]
        entropy_coeff = self.entropy_coeff_schedulers_per_module[module_id].get_current_value() or None
        if not self._makes_graphs:
            kl_coeff = float(kl_coeff)
        elif entropy_coeff is not None:
            # Schedules move it, and graphs hold no numbers of Python.
            entropy_coeff = torch.full_like(kl_coeff, float(entropy_coeff))
        return UpdateSettings(
            num_epochs=num_epochs,
            num_critic_updates=config.num_critic_updates,
            leader=LeaderLoss(
                clip=config.clip_param,
                entropy_coeff=entropy_coeff,
                kl_coeff=kl_coeff if config.use_kl_loss else None,
            ),
            grad_clip=config.grad_clip,
            correction=Correction(
                self._cross_clip(module_id, config),
                config.hypergradient_bound,
                config.cross_reduction,
                config.correction_sample,
            ),
            advantages=AdvantageRule(config.advantage_refresh, config.standardize_advantages),
            max_kl=config.max_kl,
            target_kl=config.target_kl,
        )

    def _cross_clip(self, module_id: str, config: Any) -> float | None:
        """ε_F; the published cross term clips the ratio for continuous actions only."""
        continuous = isinstance(self._module[module_id].unwrapped().action_space, gym.spaces.Box)
        return config.cross_clip_param if continuous else None

    @override(Learner)
    def get_optimizer(self, module_id: str = DEFAULT_MODULE_ID, optimizer_name: str = DEFAULT_OPTIMIZER) -> Any:
        """One of a module's two optimizers, "actor" or "critic"; RLlib's default name stands for the actor's."""
        name = ACTOR_OPTIMIZER if optimizer_name == DEFAULT_OPTIMIZER else optimizer_name
        return super().get_optimizer(module_id, name)

    @override(Learner)
    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(COMPONENT_BILEVEL, components, not_components):
            state[COMPONENT_BILEVEL] = {
                module_id: update.get_state() for module_id, update in self._bilevel_updates.items()
            }
        if self._learner_connector is not None and self._check_component(
            COMPONENT_LEARNER_CONNECTOR, components, not_components
        ):
            # RLlib does not keep the learner pipeline's state; the reward scale and users' own connectors have some.
            state[COMPONENT_LEARNER_CONNECTOR] = self._learner_connector.get_state()
        if self._lr_schedulers and self._check_component(COMPONENT_LR_SCHEDULERS, components, not_components):
            # Nor that of torch's schedulers.
            state[COMPONENT_LR_SCHEDULERS] = {
                module_id: {name: [x.state_dict() for x in schedulers] for name, schedulers in by_optimizer.items()}
                for module_id, by_optimizer in self._lr_schedulers.items()
            }
        return state

    @override(Learner)
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        for module_id, update_state in state.get(COMPONENT_BILEVEL, {}).items():
            if module_id in self._bilevel_updates:
                self._bilevel_updates[module_id].set_state(update_state)
        for module_id, by_optimizer in state.get(COMPONENT_LR_SCHEDULERS, {}).items():
            for name, scheduler_states in by_optimizer.items():
                schedulers = self._lr_schedulers.get(module_id, {}).get(name, [])
                for scheduler, scheduler_state in zip(schedulers, scheduler_states, strict=False):
                    scheduler.load_state_dict(scheduler_state)
        if self._learner_connector is not None and COMPONENT_LEARNER_CONNECTOR in state:
            self._learner_connector.set_state(state[COMPONENT_LEARNER_CONNECTOR])


def _total_loss(metrics: Mapping[str, float], leader: LeaderLoss) -> float:
    """PPO's total loss, with the value loss at full weight."""
    kl_coeff, entropy_coeff = (0.0 if x is None else float(x) for x in (leader.kl_coeff, leader.entropy_coeff))
    penalties = kl_coeff * metrics["mean_kl_loss"] - entropy_coeff * metrics["entropy"]
    return metrics["policy_loss"] + penalties + metrics["vf_loss"]
