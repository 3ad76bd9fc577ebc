"""BLPO's Weights & Biases dashboard, as code.

python -m blpo_rllib.experiments.dashboard --entity ENTITY --project PROJECT
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import blpo_rllib.experiments.metrics as m
from blpo_rllib.extras import require
from blpo_rllib.sweep.plan import AXES

SPECIFICATION = Path("blpo_dashboard.json")


def workspace(entity: str, project: str) -> Any:
    """The dashboard as a ``wandb_workspaces.workspaces.Workspace``; nothing is sent.

    Raises:
        ImportError: If wandb-workspaces is not installed.
    """
    wr, ws = (
        require(f"wandb_workspaces.{module}", "dashboard", "the dashboard") for module in ("reports.v2", "workspaces")
    )

    def line(title: str, *names: str, log: bool = False, **kwargs: Any) -> Any:
        return wr.LinePlot(title=title, x=m.ENV_STEPS, y=list(names), log_y=log or None, **kwargs)

    def bilevel(title: str, *names: str, **kwargs: Any) -> Any:
        return line(title, *map(m.metric_name, names), **kwargs)

    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name), display_name=axis.label, log=axis.log)
        for name, axis in AXES.items()
    ]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(m.EPISODE_RETURN), display_name="return"))
    residual = m.metric_name("ihvp_relative_residual")

    def scatter(title: str, z: str) -> Any:
        x, y = wr.Config("nystrom_rank"), wr.Config("nystrom_damping")
        return wr.ScatterPlot(title=title, x=x, y=y, z=wr.SummaryMetric(z), log_y=True)

    sections = {
        "Returns": [
            line("Episode return", m.EPISODE_RETURN),
            line("Episode return by group", m.EPISODE_RETURN, groupby="Group", groupby_rangefunc="minmax"),
            line("Least and largest return", "returns/episode_return_min", "returns/episode_return_max"),
            line("Evaluation return", "returns/evaluation_return_mean"),
            line("Episode length", "returns/episode_len_mean"),
        ],
        "Bilevel diagnostics": [
            bilevel("Critic loss and nesting", "vf_loss_before_nesting", "vf_loss_after_nesting", log=True),
            bilevel("Norms in the actor's step", "actor_grad_norm", "mixed_norm", "hypergradient_norm"),
            bilevel("Norm of the correction before the bound", "mixed_norm_unbounded", log=True),
            bilevel("Cosine of correction and actor gradient", "mixed_grad_cosine", range_y=(-1, 1)),
            bilevel("Share of minibatches where the bound acts", "bound_active_fraction", range_y=(0, 1)),
            bilevel("IHVP relative residual", "ihvp_relative_residual", log=True),
            line("Damping and bound", "bilevel/damping", "bilevel/bound", log=True),
        ],
        "Policy": [bilevel(name, name) for name in m.LEARNER_METRICS["policy"]],
        "Throughput and faults": [
            line("Environment steps per second", m.ENV_STEPS_PER_SECOND),
            line("Seconds per iteration", "throughput/sampling_seconds", m.UPDATE_SECONDS),
            bilevel("Numbers that were not finite", *m.LEARNER_METRICS["faults"]),
            line("EnvRunners", "faults/healthy_env_runners", "faults/env_runner_restarts"),
        ],
        "Sweep": [
            wr.ParallelCoordinatesPlot(title="Rank, damping and return", columns=columns),
            wr.ParameterImportancePlot(with_respect_to=m.EPISODE_RETURN),
            scatter("Return over rank and damping", m.EPISODE_RETURN),
            scatter("IHVP residual over rank and damping", residual),
        ],
    }  # fmt: skip
    return ws.Workspace(
        entity=entity,
        project=project,
        name="BLPO",
        sections=[
            ws.Section(name=name, panels=panels, is_open=name in ("Returns", "Bilevel diagnostics"))
            for name, panels in sections.items()
        ],
    )


def specification(entity: str, project: str) -> dict[str, Any]:
    """What W&B would be sent, as JSON values."""
    return json.loads(workspace(entity, project)._to_model().model_dump_json(by_alias=True, exclude_none=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", required=True)
    parser.add_argument("--output", type=Path, default=SPECIFICATION, help="file for the specification, if need be")
    parser.add_argument("--offline", action="store_true", help="only write the specification")
    args = parser.parse_args()
    try:
        view = workspace(args.entity, args.project)
    except ImportError as error:
        parser.error(str(error))
    try:
        if args.offline:
            raise ConnectionError("--offline")
        print(view.save().url)
    except Exception as error:
        # Whatever the network or W&B has against it: the user gets a file and the way to go on.
        args.output.write_text(json.dumps(specification(args.entity, args.project), indent=1))
        print(
            f"The dashboard was not created: {error}\nIts specification is in {args.output}. To apply it, log in "
            "(`wandb login`) where there is a network and run\n"
            f"    python -m blpo_rllib.experiments.dashboard --entity {args.entity} --project {args.project}",
            file=sys.stderr,
        )
        sys.exit(0 if args.offline else 1)


if __name__ == "__main__":
    main()
