"""Docstrings' reStructuredText roles as Markdown: links to what they name, and equations."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`(~?)([\w.]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
# The directive's line, and the lines indented below it.
DIRECTIVE = re.compile(r"^( *)\.\. (math|code-block)::(.*)\n?((?:\1 +.*\n?|[ ]*\n)*)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded, when every name in it can be looked up."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        rewrite(pkg, loader.modules_collection)


def rewrite(obj: griffe.Object, known: griffe.ModulesCollection) -> None:
    """Rewrites the docstrings of an object and of all that it contains."""
    if obj.docstring:
        obj.docstring.value = markdown(obj.docstring.value, obj, known)
    for member in obj.members.values():
        if not member.is_alias:
            rewrite(member, known)


def markdown(text: str, obj: griffe.Object, known: griffe.ModulesCollection) -> str:
    """A docstring with roles and directives as Markdown."""

    def link(match: re.Match[str]) -> str:
        name = match[2]
        shown = name.rpartition(".")[2] if match[1] else name
        path = full_path(name, obj, known)
        return f"[`{shown}`][{path}]" if path else f"`{shown}`"

    text = DIRECTIVE.sub(directive, text)
    text = INLINE_MATH.sub(lambda match: rf"\({match[1]}\)", text)
    return ROLE.sub(link, text)


def directive(match: re.Match[str]) -> str:
    """A display equation, or a fenced block of code."""
    indent, kind, argument, body = match.groups()
    body = textwrap.dedent(body).strip("\n")
    if kind == "math":
        lines = ["\\[", *filter(None, map(str.strip, [argument, *body.splitlines()])), "\\]"]
    else:
        lines = [f"```{argument.strip()}", *body.splitlines(), "```"]
    return "".join(f"{indent}{line}\n" for line in lines) + "\n"


def full_path(name: str, obj: griffe.Object, known: griffe.ModulesCollection) -> str | None:
    """The canonical path of a name, looked up from the object outwards; None if no page has it."""
    scope: griffe.Object | None = obj
    while scope is not None:
        for path in (f"{scope.path}.{name}", name):
            try:
                found = known[path]
                # What has no docstring, or a private name, is not on any page.
                return found.canonical_path if found.has_docstring and not found.name.startswith("_") else None
            except (KeyError, griffe.AliasResolutionError):
                continue
        scope = scope.parent
    return None
