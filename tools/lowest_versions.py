# SPDX-License-Identifier: Apache-2.0
"""Print pip constraints that hold each requirement at the lowest version that it allows.

Read are requirements.txt, test-requirements.txt and the extras of setup.cfg, without ``lint``, which is for
developers only. A requirement without a lower bound is an error.
"""

from __future__ import annotations

import configparser
import pathlib
import sys
from collections.abc import Iterator

from packaging import requirements

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_FOR_USERS = ("lint",)


def promised() -> Iterator[requirements.Requirement]:
    """Yield what the files require."""
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "test-requirements.txt")]
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read(ROOT / "setup.cfg")
    texts += [text for extra, text in metadata["extras"].items() if extra not in NOT_FOR_USERS]
    for line in "\n".join(texts).splitlines():
        if text := line.partition("#")[0].strip():
            yield requirements.Requirement(text)


def lowest(requirement: requirements.Requirement) -> str:
    """Return the constraint.

    :raises ValueError: it has no lower bound, or several.
    """
    (bound,) = [each for each in requirement.specifier if each.operator in (">=", "~=", "==")]
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}=={bound.version}{marker}"


def main() -> int:
    try:
        print(*(lowest(requirement) for requirement in promised()), sep="\n")
    except ValueError as error:
        raise SystemExit(f"lowest_versions.py: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
