# SPDX-License-Identifier: Apache-2.0
"""Install the project the two ways that packagers do, and look at what arrived.

An sdist, and a ``git archive`` with the version in ``PBR_VERSION``, each into a virtualenv of its own. A file
that is in the repository's package but not in the installed one, or an entry point that does not load, fails.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHIVE_VERSION = "7.8.9"

# Runs inside the new virtualenv, where nothing but the installed package can be imported.
PROBE = """
import importlib.metadata, pathlib, sys
import imagecache_lib
package = pathlib.Path(imagecache_lib.__file__).parent
assert sys.prefix in str(package), package
distribution = importlib.metadata.distribution("imagecache-lib")
print("version", distribution.version)
for path in sorted(package.rglob("*")):
    if path.is_file() and path.suffix != ".pyc":
        print("file", path.relative_to(package))
for entry in distribution.entry_points:
    entry.load()
    print("entry", entry.group, entry.name)
"""


def run(*command: str | os.PathLike[str], **options: object) -> str:
    finished = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True, **options)  # type: ignore[call-overload]
    return str(finished.stdout)


def install(what: str, scratch: pathlib.Path, environment: dict[str, str]) -> list[str]:
    """Install into a new virtualenv and return the probe's lines."""
    run(sys.executable, "-m", "venv", scratch)
    run(scratch / "bin/pip", "install", "--quiet", what, env=os.environ | environment)
    return run(scratch / "bin/python", "-I", "-c", PROBE, cwd=scratch).splitlines()


def verdict(name: str, lines: list[str], version: str | None) -> bool:
    """Compare what was installed with the repository's files, and print the outcome."""
    tracked = run("git", "ls-files", "imagecache_lib", cwd=ROOT).split()
    wanted = {f"file {pathlib.Path(path).relative_to('imagecache_lib')}" for path in tracked}
    found = {line for line in lines if line.startswith("file ")}
    said = lines[0].removeprefix("version ")
    problems = [f"missing {line.removeprefix('file ')}" for line in sorted(wanted - found)]
    problems += [f"unexpected {line.removeprefix('file ')}" for line in sorted(found - wanted)]
    if version is not None and said != version:
        problems.append(f"version is {said}, not {version}")
    entries = sum(line.startswith("entry ") for line in lines)
    print(f"{name}: version {said}, {len(found)} files, {entries} entry points", *problems, sep="\n  ")
    return not problems


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = pathlib.Path(scratch_name)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", scratch / "sdist", ROOT)
        (sdist,) = (scratch / "sdist").glob("*.tar.gz")
        good = verdict("sdist", install(f"{sdist}[cli,glance]", scratch / "from-sdist", {}), None)

        tree = scratch / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
        lines = install(f"{tree}[cli,glance]", scratch / "from-archive", {"PBR_VERSION": ARCHIVE_VERSION})
        good &= verdict("git archive", lines, ARCHIVE_VERSION)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
