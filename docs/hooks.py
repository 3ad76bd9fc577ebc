"""What the site has beside docs/: the pages of studies, cluster files and project, and an API reference by package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = "blpo_rllib"
# Pages that stand beside what they describe, and their figures.
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "cluster/README.md", "studies/*/*.md", "studies/*/results/**/*.png")
# What the search needs where pages are opened as files: the theme loads it from the network, this site has its own.
SHIM, OWN_SHIM = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker/shim.js"
# Pages whose tables need the room of the table of contents.
WIDE = ("studies/comparison/README.md", "studies/comparison/published_batches.md", "studies/understanding/README.md")
RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|[#/<])([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that stand elsewhere, and one page of API reference per package."""
    for path in sorted(path for pattern in BESIDE for path in ROOT.glob(pattern)):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for package in sorted(path.parent for path in (ROOT / PACKAGE).glob("**/__init__.py")):
        if package.parent in (ROOT, ROOT / PACKAGE):
            files.append(File.generated(config, f"reference/{package.name}.md", content=reference(package)))
    return files


def reference(package: Path) -> str:
    """The page of a package: what its docstring says, and all its modules; of the package at the top, its own alone."""
    modules = package.glob("*.py") if package.name == PACKAGE else package.rglob("*.py")
    names = [dotted(path) for path in sorted(modules) if path.stem != "__init__" and not path.stem.startswith("_")]
    return "\n\n".join([f"# {dotted(package / '__init__.py')}", *directives(dotted(package / "__init__.py"), names)])


def directives(package: str, modules: Iterable[str]) -> Iterator[str]:
    yield f"::: {package}\n    options: {{ members: false, show_root_heading: false, show_root_toc_entry: false }}"
    for module in modules:
        yield f"::: {module}"


def dotted(path: Path) -> str:
    """The name of the module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points relative links, which are right in the repository, to where their targets are in the site."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    source = page.file.abs_src_path
    if source is None:
        return markdown
    folder = Path(source).parent

    def moved(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[1]))
        inside = target.relative_to(DOCS) if target.is_relative_to(DOCS) else target.relative_to(ROOT)
        here = PurePosixPath(page.file.src_uri).parent
        return f"]({os.path.relpath(inside.as_posix(), here)}"

    return RELATIVE_LINK.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Takes the theme's one script from elsewhere from here.

    Raises:
        PluginError: If the page would load anything else from the network.
    """
    output = output.replace(SHIM, get_relative_url(OWN_SHIM, page.url))
    foreign = re.search(
        r"""<(?:script|img|iframe)[^>]*\ssrc="?https?:|<link[^>]*rel="?stylesheet[^>]*https?:""", output
    )
    if foreign:
        raise PluginError(f"{page.file.src_uri} would load from the network: {foreign[0]}")
    return output


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page that is shown where there is none."""
    return output_content.replace(SHIM, OWN_SHIM)
