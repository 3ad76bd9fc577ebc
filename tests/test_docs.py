"""README.md is short and its links lead somewhere; the site's build fails where one does not."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

from blpo_rllib import BLPOConfig, ppo_settings
from docs import hooks

ROOT = Path(__file__).parents[1]


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8192
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_table_of_ppo_settings_is_the_one_that_validation_follows():
    page = (ROOT / "docs" / "from-ppo.md").read_text()
    assert f"<!-- settings:begin -->\n{ppo_settings.markdown()}\n<!-- settings:end -->" in page


def test_configuration_page_has_every_field_with_its_default():
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| ", page, flags=re.MULTILINE)
    fields = inspect.signature(BLPOConfig.training).parameters.keys() - {"self", "kwargs"}
    config = BLPOConfig()
    assert {name: ast.literal_eval(default) for name, default in rows} == {
        name: getattr(config, name) for name in fields
    }


BROKEN = """
[a page](nowhere.md), [a study](../studies/nowhere/README.md), [a section](algorithm.md#nowhere),
[a function][blpo_rllib.core.nowhere], ![a figure](curves/nowhere.png)
"""


def test_broken_links_of_every_kind_fail_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("blpo_rllib", "studies", "cluster", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = tmp_path / "docs" / "gpu.md"
    page.write_text(page.read_text() + BROKEN)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 5, done.stderr
    assert all("gpu.md" in line and "nowhere" in line for line in warnings)


def test_pages_load_nothing_from_the_network():
    page = SimpleNamespace(url="studies/comparison/index.html", file=SimpleNamespace(src_uri="a page"))
    own = hooks.on_post_page(f'<script src="{hooks.SHIM}"></script>', page, None)
    assert own == '<script src="../../assets/iframe-worker/shim.js"></script>'
    for foreign in (
        '<script src="https://example.com/x.js">',
        '<img alt="x" src=https://example.com/x.png>',
        '<link rel="stylesheet" href="https://example.com/x.css">',
    ):
        with pytest.raises(PluginError, match="a page would load from the network"):
            hooks.on_post_page(foreign, page, None)
    assert hooks.on_post_page('<a href="https://example.com/">', page, None)
