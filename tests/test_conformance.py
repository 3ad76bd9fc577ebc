"""RLlib's example scripts that use PPO, with BLPO in PPO's place: what the table in docs/conformance.md says holds."""

import pytest
import ray

from studies.conformance import run
from studies.conformance.scripts import scripts

OUTCOMES = run.load()


def test_the_table_in_the_docs_is_that_of_the_results():
    text = run.PAGE.read_text()
    assert text[text.index(run.BEGIN) + len(run.BEGIN) : text.index(run.END)].strip() == run.table()


def test_one_line_is_changed_in_every_script():
    for script in scripts():
        changed = [line for line in script.with_blpo().splitlines() if line not in script.source.splitlines()]
        assert len(changed) == 1, script.name


@pytest.fixture(scope="module")
def one_ray():
    for package in ("ale_py", "pettingzoo", "pyspiel", "supersuit"):
        pytest.importorskip(package, reason="needs the extra blpo_rllib[conformance]")
    ray.init(num_cpus=run.NUM_CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("script", [x for x in scripts() if run.counts(OUTCOMES, x)], ids=lambda script: script.name)
def test_script(script, one_ray):
    """It trains, with BLPO's learner and nobody else's, or is refused; never does it fail or train PPO."""
    outcome = run.run_script(script, "BLPO")
    expected = OUTCOMES[script.name]["BLPO"]["kind"]
    assert (outcome.kind, outcome.detail if expected == "trained" else "") == (expected, "")
