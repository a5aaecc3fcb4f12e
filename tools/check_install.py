# SPDX-License-Identifier: Apache-2.0
"""Install the project the two ways that packagers do, and look at what arrived.

An sdist, and a ``git archive`` with the version in ``PBR_VERSION``, each into a virtualenv of its own. A file
that is committed in the package but does not arrive, or an entry point that does not load, fails.
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
import importlib.metadata, pathlib
import imagecache_lib
package = pathlib.Path(imagecache_lib.__file__).parent
distribution = importlib.metadata.distribution("imagecache-lib")
print("version", distribution.version)
for path in sorted(package.rglob("*")):
    if path.is_file() and path.suffix != ".pyc":
        print("file", path.relative_to(package))
for entry in distribution.entry_points:
    try:
        entry.load()
        print("entry", entry.group, entry.name)
    except (ImportError, AttributeError) as error:
        print(f"broken entry point {entry.group} {entry.name}: {error}")
"""


def run(
    *command: str | os.PathLike[str],
    cwd: pathlib.Path | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Return the command's output; show it when the command fails."""
    finished = subprocess.run(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=cwd,
        check=False,
    )
    if finished.returncode:
        print(finished.stdout, file=sys.stderr)
        raise SystemExit(f"{command[0]} failed with {finished.returncode}")
    return finished.stdout


def install(what: str, scratch: pathlib.Path, environment: dict[str, str]) -> list[str]:
    """Install into a new virtualenv and return the probe's lines."""
    run(sys.executable, "-m", "venv", scratch)
    run(scratch / "bin/pip", "install", "--quiet", what, environment=dict(os.environ) | environment)
    return run(scratch / "bin/python", "-I", "-c", PROBE, cwd=scratch).splitlines()


def verdict(name: str, lines: list[str], version: str | None) -> bool:
    """Compare what was installed with the repository's files, and print the outcome."""
    tracked = run("git", "ls-tree", "-r", "--name-only", "HEAD", "imagecache_lib", cwd=ROOT).split()
    wanted = {f"file {pathlib.Path(path).relative_to('imagecache_lib')}" for path in tracked}
    found = {line for line in lines if line.startswith("file ")}
    said = lines[0].removeprefix("version ")
    problems = [f"missing {line.removeprefix('file ')}" for line in sorted(wanted - found)]
    problems += [f"unexpected {line.removeprefix('file ')}" for line in sorted(found - wanted)]
    problems += [line for line in lines if line.startswith("broken ")]
    if version is not None and said != version:
        problems.append(f"version is {said}, not {version}")
    entries = sum(line.startswith("entry ") for line in lines)
    print(f"{name}: version {said}, {len(found)} files, {entries} entry points", *problems, sep="\n  ")
    return not problems


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = pathlib.Path(scratch_name)
        # A clone, so that nothing uncommitted or left by an earlier build gets in.
        run("git", "clone", "--quiet", ROOT, scratch / "clone")
        run(sys.executable, "-m", "build", "--sdist", "--outdir", scratch / "sdist", scratch / "clone")
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
