"""Declares which private names of Ray the package relies on, and reaches those that are not inherited.

Ray changes private names without notice. :data:`NAMES` has each of them, with where Ray defines it and what the package
uses it for. Only the functions below touch private names of objects of Ray's. A subclass of one of Ray's classes cannot
but use, and replace, private names that it inherits: it does so as ``self._name``, where the class is declared here.
``make private-names`` lists where, and ``tests/test_private_names.py`` fails for a use that is not declared and for a
name that Ray no longer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray._common.deprecation import DEPRECATED_VALUE
from ray.air.util.node import _force_on_current_node as on_current_node
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.train._internal.session import _TrainingResult as TrainingResult
from ray.tune.registry import ENV_CREATOR, _global_registry

__all__ = [
    "DEPRECATED_VALUE",
    "NAMES",
    "PrivateName",
    "TrainingResult",
    "all_filters",
    "common_pass",
    "count_episodes",
    "env_to_module_pipeline",
    "exploration_pass",
    "freeze",
    "full_model_config",
    "give_weights",
    "is_multi_agent",
    "is_updating",
    "learner_actors",
    "local_learner",
    "lr_scheduler_makers",
    "note_steps",
    "on_current_node",
    "registered_env",
    "running_filter",
    "set_updating",
    "steps_as_rllib",
    "take_older_weights",
    "training_pass",
    "wandb_queue_items",
]


@dataclass(frozen=True)
class PrivateName:
    """A private name of Ray.

    Attributes:
        name: The name.
        owner: The module that defines it, and after a colon its class if it has one.
        purpose: What the package uses it for.
    """

    name: str
    owner: str
    purpose: str


_CONFIG = "ray.rllib.algorithms.algorithm_config:AlgorithmConfig"
_MODULE = "ray.rllib.core.rl_module.rl_module:RLModule"
_RUNNER = "ray.rllib.env.single_agent_env_runner:SingleAgentEnvRunner"
_EPISODE = "ray.rllib.env.single_agent_episode:SingleAgentEpisode"
_LEARNER = "ray.rllib.core.learner.learner:Learner"
_TORCH_LEARNER = "ray.rllib.core.learner.torch.torch_learner:TorchLearner"
_FILTER = "ray.rllib.connectors.env_to_module.mean_std_filter:MeanStdFilter"
_WANDB = "ray.air.integrations.wandb:WandbLoggerCallback"

NAMES = (
    # Reached through the functions below, or imported above.
    PrivateName("_worker_manager", "ray.rllib.core.learner.learner_group:LearnerGroup", "to see that a learner died"),
    PrivateName(
        "_learner", "ray.rllib.core.learner.learner_group:LearnerGroup", "a local learner's players, for sweeps"
    ),
    PrivateName("_weights_seq_no", _LEARNER, "a checkpoint's weights are taken, although older ones"),
    PrivateName(
        "_weights_seq_no", _RUNNER, "a checkpoint's weights are taken, although older ones; a column of episodes"
    ),
    PrivateName(
        "_get_model_config", "ray.rllib.core.rl_module.rl_module:RLModuleSpec", "a module's settings, for checks"
    ),
    PrivateName("_torch_lr_scheduler_classes", _CONFIG, "schedulers"),
    PrivateName("_torch_grad_scaler_class", _CONFIG, "a setting that is refused"),
    PrivateName("_is_frozen", _CONFIG, "an attribute that is no setting"),
    PrivateName("_update_stats", _FILTER, "statistics that stand still"),
    PrivateName("_multi_agent", _FILTER, "only filters of one agent are batched"),
    PrivateName("_filters", _FILTER, "the statistics, for batched observations"),
    PrivateName("_init_new_filters", _FILTER, "the statistics, before the first observation"),
    PrivateName("_start_time", _EPISODE, "clock of an episode that is filled in one go"),
    PrivateName("_last_step_time", _EPISODE, "clock of an episode that is filled in one go"),
    PrivateName("_last_added_observation", _EPISODE, "RLlib checks that the next fragment begins with it"),
    PrivateName("_last_added_infos", _EPISODE, "RLlib checks that the next fragment begins with it"),
    PrivateName("DEPRECATED_VALUE", "ray._common.deprecation", "settings that RLlib deprecates"),
    PrivateName("_TrainingResult", "ray.train._internal.session", "going back to a checkpoint of a Tune trial"),
    PrivateName("_global_registry", "ray.tune.registry", "environments that are registered with Tune"),
    PrivateName("_QueueItem", "ray.air.integrations.wandb", "kinds of what goes to a W&B run"),
    PrivateName("_force_on_current_node", "ray.air.util.node", "a W&B run's process is on Tune's node"),
    # The process of a W&B run imports nothing of this package.
    PrivateName("_run_wandb_process_run_info_hook", "ray.air.integrations.wandb", "Ray's hook for W&B runs"),
    # Inherited by our subclasses of Ray's classes, which use them or have methods in their place.
    *(
        PrivateName(name, _RUNNER, purpose)
        for name, purpose in {
            "_cached_to_module": "observations with which RLlib's loop goes on",
            "_callbacks": "which callbacks users override",
            "_device": "where the module is",
            "_done_episodes_for_metrics": "metrics of episodes",
            "_env_to_module": "pipeline whose steps are batched",
            "_increase_sampled_metrics": "metrics of steps",
            "_log_env_steps": "metrics of steps",
            "_make_on_episode_callback": "callbacks of episodes",
            "_metrics_num_env_steps_sampled": "metrics of steps",
            "_module_to_env": "pipeline whose steps are batched",
            "_needs_initial_reset": "whether episodes go on from the last call",
            "_new_episode": "callbacks of episodes",
            "_ongoing_episodes": "episodes that go on",
            "_ongoing_episodes_for_metrics": "metrics of episodes",
            "_reset_envs_and_episodes": "the first observations, and those after a failed step",
            "_sample": "replaced; RLlib's own loop where batching is not possible",
            "_shared_data": "what RLlib's connectors remember between steps",
        }.items()
    ),
    PrivateName(
        "_try_env_step", "ray.rllib.env.env_runner:EnvRunner", "a step, or a restart of environments that fail"
    ),
    PrivateName("_metrics_num_try_env_step", "ray.rllib.env.env_runner:EnvRunner", "metrics of steps"),
    PrivateName(
        "_quiet_nanmean", "ray.rllib.utils.metrics.stats.ema:EmaStats", "replaced: the mean of one number is the number"
    ),
    PrivateName("_seed", "ray.rllib.env.env_runner:EnvRunner", "an evaluation's own starts of episodes"),
    PrivateName("_update", _LEARNER, "replaced: BLPO's update in place of a loss and its gradients"),
    PrivateName("_create_iterator_if_necessary", _LEARNER, "replaced: a batch of segments is not cut into minibatches"),
    PrivateName("_check_component", _LEARNER, "which parts of the state are asked for"),
    PrivateName("_get_optimizer_lr", _TORCH_LEARNER, "learning rates as metrics"),
    PrivateName("_learner_connector", _LEARNER, "connectors from episodes to segments"),
    PrivateName("_module", _LEARNER, "the modules"),
    PrivateName("_module_optimizers", _LEARNER, "the two optimizers of a module"),
    PrivateName("_device", _TORCH_LEARNER, "where the modules are"),
    PrivateName("_lr_schedulers", _TORCH_LEARNER, "torch's schedulers of both optimizers"),
    PrivateName("_storage", "ray.tune.trainable.trainable:Trainable", "a trial's folder, to go back to its checkpoint"),
    PrivateName("_time_total", "ray.tune.trainable.trainable:Trainable", "training's time, in a checkpoint's seal"),
    PrivateName("_per_module_overrides", _CONFIG, "settings of modules, for checks"),
    PrivateName("_model_config_auto_includes", _CONFIG, "replaced: the published networks as defaults"),
    PrivateName("_value_error", _CONFIG, "errors of validation"),
    PrivateName("_before_evaluate", "ray.rllib.algorithms.algorithm:Algorithm", "replaced: the training's statistics"),
    PrivateName("_forward", "ray.rllib.core.models.base:Model", "replaced: a log-std for sequences of steps"),
    *(
        PrivateName(name, _MODULE, "replaced, as RLlib asks of modules; to tell default modules")
        for name in ("_forward", "_forward_exploration", "_forward_inference", "_forward_train")
    ),
    PrivateName("_model_config_dict", "ray.rllib.core.models.catalog:Catalog", "settings of the networks"),
    *(
        PrivateName(name, _WANDB, "a W&B run's process in place of Ray's")
        for name in (
            "_logging_future_to_trial",
            "_signal_logging_actor_stop",
            "_start_logging_actor",
            "_trial_logging_actors",
            "_trial_logging_futures",
            "_trial_queues",
        )
    ),
    PrivateName(
        "_trial_writer", "ray.tune.logger.tensorboardx:TBXLoggerCallback", "TensorBoard with metrics in groups"
    ),
    PrivateName(
        "_trial_result", "ray.tune.logger.tensorboardx:TBXLoggerCallback", "TensorBoard with metrics in groups"
    ),
)


def local_learner(group: LearnerGroup) -> Learner | None:
    """The learner in this process; None if learners are actors."""
    return group._learner


def learner_actors(group: LearnerGroup) -> FaultTolerantActorManager | None:
    """The manager of the learners that are actors; None if the learner is in this process."""
    return group._worker_manager


def take_older_weights(worker: Any) -> None:
    """Lets a learner or EnvRunner take weights whatever their number in the sequence."""
    worker._weights_seq_no = 0


def give_weights(learner: Learner, runner: Any) -> None:
    """Notes that an EnvRunner has the weights of a learner's last update."""
    runner._weights_seq_no = learner._weights_seq_no


def steps_as_rllib(runner: Any) -> bool:
    """Whether an EnvRunner's class leaves it to RLlib what happens around a step of its environments."""
    return type(runner)._try_env_step is EnvRunner._try_env_step


def full_model_config(spec: Any) -> dict[str, Any]:
    """The model config of a module's specification as a dictionary."""
    return spec._get_model_config()


def training_pass(module_class: type) -> Callable[..., Any] | None:
    """What a module class does in a training pass, to tell whether it is another's; None if it has no such pass."""
    return getattr(module_class, "_forward_train", None)


def exploration_pass(module_class: type) -> Callable[..., Any] | None:
    """The same of a pass for exploring."""
    return getattr(module_class, "_forward_exploration", None)


def common_pass(module_class: type) -> Callable[..., Any] | None:
    """The same of the pass that stands for all that a class has no method of its own for."""
    return getattr(module_class, "_forward", None)


def lr_scheduler_makers(config: Any) -> Any:
    """Makers of torch's learning rate schedulers, for all modules or by module."""
    return config._torch_lr_scheduler_classes


def freeze(connector: MeanStdFilter) -> None:
    """Lets a filter's statistics stand still."""
    connector._update_stats = False


def set_updating(connector: MeanStdFilter, updating: bool) -> None:
    """Whether observations change a filter's statistics."""
    connector._update_stats = updating


def is_updating(connector: MeanStdFilter) -> bool:
    """Whether observations change a filter's statistics."""
    return connector._update_stats


def all_filters(connector: MeanStdFilter) -> list[Any]:
    """The statistics of a filter, of each agent; none before the first observation."""
    return list((connector._filters or {}).values())


def env_to_module_pipeline(runner: Any) -> Any:
    """An EnvRunner's connectors from environments to the module; None if it has none."""
    return getattr(runner, "_env_to_module", None)


def count_episodes(runner: Any, episodes: list[Any]) -> None:
    """Adds whole episodes to what an EnvRunner's metrics report."""
    runner._increase_sampled_metrics(sum(map(len, episodes)), len(episodes))
    runner._done_episodes_for_metrics.extend(episodes)


def is_multi_agent(connector: MeanStdFilter) -> bool:
    """Whether a filter has statistics by agent."""
    return connector._multi_agent


def running_filter(connector: MeanStdFilter) -> tuple[Any, bool]:
    """The statistics of a filter of one agent, and whether observations change them."""
    if connector._filters is None:
        connector._init_new_filters()
    (found,) = connector._filters.values()
    return found, connector._update_stats


def note_steps(episode: Any, first_time: float, last_time: float) -> None:
    """Tells an episode of steps that were put into its buffers in one go.

    Args:
        episode: RLlib's.
        first_time: When the fragment began.
        last_time: When its last step ended.
    """
    # RLlib's clock of an episode's fragment starts at its reset or else at its first step.
    episode._start_time = episode._start_time or first_time
    episode._last_step_time = last_time
    episode._last_added_observation = episode.observations.data[-1]
    episode._last_added_infos = episode.infos.data[-1]


def wandb_queue_items() -> Any:
    """The kinds of what goes to a W&B run, as an enumeration."""
    # Here, because it imports wandb, which importing blpo_rllib need not.
    from ray.air.integrations.wandb import _QueueItem

    return _QueueItem


def registered_env(name: Any) -> Callable[..., Any] | None:
    """What makes the environment that is registered with Tune under a name; None if none is."""
    if isinstance(name, str) and _global_registry.contains(ENV_CREATOR, name):
        return _global_registry.get(ENV_CREATOR, name)
    return None
