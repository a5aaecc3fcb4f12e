# SPDX-License-Identifier: Apache-2.0
"""Names of this project in the documentation: whatever they are called by, they must be there.

A class has a public name, ``imagecache_lib.Disk``, and a home, ``imagecache_lib.model.Disk``. Docstrings and
signatures use both, and the documentation describes it under one. This links the other to it. A name that no
page describes stays without a link. One that does not exist is a warning, by Sphinx's ``-n``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import imagecache_lib

PACKAGE = "imagecache_lib"


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Return a link to what a name stands for, its text where no page describes it, or None."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    is_there = False
    for name in _candidates(node):
        if _exists(name):
            is_there = True
            for also in (name, *_other_names(name)):
                found = domain.resolve_xref(
                    env, node["refdoc"], app.builder, node["reftype"], also, node, content
                )
                if found is not None:
                    return found
    return content if is_there else None


def _candidates(node: addnodes.pending_xref) -> Iterator[str]:
    """Yield what a name may be short for: in its class, in its module, in the package."""
    target: str = node["reftarget"]
    module, owner = node.get("py:module"), node.get("py:class")
    yield target
    if module and owner:
        yield f"{module}.{owner}.{target}"
    if module:
        yield f"{module}.{target}"
    yield f"{PACKAGE}.{target}"


def _other_names(name: str) -> Iterator[str]:
    """Yield the home of a public name, and the public name of what has that home."""
    for public, home in imagecache_lib._HOMES.items():
        names = f"{PACKAGE}.{public}", f"{PACKAGE}.{home}.{public}"
        for one, other in (names, names[::-1]):
            if name == one or name.startswith(f"{one}."):
                yield other + name.removeprefix(one)


def _exists(name: str) -> bool:
    """Whether a name in the package leads to a module or to something in one."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return False
    found: Any = imagecache_lib
    for number, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:number]))
            except ImportError:
                # What a dataclass has no default for is known by its annotation alone.
                return number == len(parts) and part in getattr(found, "__annotations__", {})
    return True


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
