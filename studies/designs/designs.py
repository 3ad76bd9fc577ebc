"""The table of the short runs in which designs of BLPO were tried, on the page beside this file.

python -m studies.comparison.compare --steps 300000 --first-seed 100 --seeds 2 --tasks hopper walker2d halfcheetah
    --algorithms strong_correction strong_no_correction strong_ppo strong_segments_of_8 --output results/designs
python -m studies.designs.designs --results results/designs/runs.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from blpo_rllib.sweep.records import write_whole
from studies.comparison.report import between_markers, final_return, markdown

FOLDER = Path(__file__).parent
DIAGNOSTICS = ("approx_kl", "clip_fraction", "mixed_grad_cosine")


def design_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row per task, design and length: each seed's final return, and means of diagnostics over the first two thirds.

    In the last third the learning rates near 0, and everything that measures steps does too.
    """
    rows = []
    lengths = table.groupby(["task", "algorithm", "seed"])["env_steps"].transform("max")
    for (task, algorithm, length), runs in table.groupby(["task", "algorithm", lengths.round(-5)], sort=True):
        finals = {seed: final_return(run) for seed, run in runs.groupby("seed", sort=True)}
        early = runs[(runs["env_steps"] > 0) & (runs["env_steps"] < runs["env_steps"].max() * 2 / 3)]
        rows.append(
            {
                "task": task,
                "design": algorithm,
                "steps": f"{length / 1000:,.0f}k",
                "final return (seed)": ", ".join(f"{value:,.0f} ({seed})" for seed, value in finals.items()),
                **{name: f"{early[name].mean():.3f}" for name in DIAGNOSTICS},
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "runs.parquet")
    parser.add_argument("--page", type=Path, default=FOLDER / "README.md")
    args = parser.parse_args()
    text = markdown(design_table(pd.read_parquet(args.results)))
    write_whole(args.page, between_markers(args.page.read_text(), text))


if __name__ == "__main__":
    main()
