# SPDX-License-Identifier: Apache-2.0
"""Install the project in the ways that packagers and users do, where nothing can be compiled, and use it.

The wheel and the sdist, each without extras and with each extra by itself, and a ``git archive`` with the
version in ``PBR_VERSION``: each into a virtualenv of its own. What fails: a file of the package that does not
arrive, or a test that does; an entry point that does not load; a spawn that fails; the command without
``--version``, or, where its extra is lacking, without one line that says so.
"""

from __future__ import annotations

import concurrent.futures
import configparser
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHIVE_VERSION = "7.8.9"
NOT_FOR_USERS = ("lint",)
#: A module that each extra brings.
BROUGHT = {
    "cli": "cliff",
    "fast": "deflate",
    "glance": "keystoneauth1",
    "jobs": "sqlalchemy",
    "messaging": "oslo_messaging",
    "prometheus": "prometheus_client",
    "signatures": "cursive",
    "zstd": "zstandard",
}
#: Even where there is a compiler.
NO_COMPILER = {"CC": "false", "CXX": "false"}

Command = list[str | os.PathLike[str]]

# Runs inside the new virtualenv, where nothing but what was installed can be imported.
PROBE = """
import importlib, importlib.metadata, importlib.util, pathlib, sys
import imagecache_lib as ic
image, instances, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
package = pathlib.Path(ic.__file__).parent
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
if importlib.util.find_spec("cliff"):
    print("has cliff")  # other extras' requirements require it too
from imagecache_lib.sources.file import FileImage
pathlib.Path(instances, "instance").mkdir(parents=True)
source = ic.FileSource({"image": FileImage(image, "qcow2")})
manager = ic.ImageCacheManager(ic.CacheConfig(instances_path=instances), source, backend="qcow2")
print("spawned", manager.create_disk("image", f"{instances}/instance/disk").target)
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
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ) | (environment or {}),
        cwd=cwd,
        check=False,
    )
    if finished.returncode:
        print(finished.stdout, file=sys.stderr)
        raise SystemExit(f"{command[0]} failed with {finished.returncode}")
    return finished.stdout


def users_extras() -> list[str]:
    """Return the extras that setup.cfg has for who installs the library."""
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read(ROOT / "setup.cfg")
    return [extra for extra in metadata["extras"] if extra not in NOT_FOR_USERS]


@dataclasses.dataclass
class Workshop:
    """A directory with what is installed, and an image to spawn from."""

    scratch: pathlib.Path

    @property
    def house(self) -> pathlib.Path:
        return self.scratch / "wheels"

    def prepare(self) -> tuple[pathlib.Path, pathlib.Path]:
        """Build the sdist and the wheel, and fetch as wheels what they need. Returns both."""
        # A clone, so that nothing uncommitted or left by an earlier build gets in.
        run("git", "clone", "--quiet", ROOT, self.scratch / "clone")
        run(sys.executable, "-m", "build", "--outdir", self.scratch / "dist", self.scratch / "clone")
        (sdist,) = (self.scratch / "dist").glob("*.tar.gz")
        (wheel,) = (self.scratch / "dist").glob("*.whl")
        everything = f"{wheel}[{','.join(users_extras())}]"
        fetch: Command = [
            "wheel",
            "--quiet",
            "--wheel-dir",
            self.house,
            everything,
            "pbr>=6.1.1",
            "setuptools>=77",
        ]
        run(sys.executable, "-m", "pip", *fetch, environment=NO_COMPILER)
        # Else it would be taken for the sdist.
        (self.house / wheel.name).unlink()
        raw = self.scratch / "image.raw"
        raw.write_bytes(os.urandom(2**20) + bytes(2**22))
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, self.scratch / "image.qcow2")
        return sdist, wheel

    def install(self, what: pathlib.Path, extras: str, environment: dict[str, str]) -> pathlib.Path:
        """Install into a new virtualenv and return it."""
        home = pathlib.Path(tempfile.mkdtemp(prefix="venv-", dir=self.scratch))
        run(sys.executable, "-m", "venv", "--without-pip", home)
        pip: Command = [sys.executable, "-m", "pip", "--python", home / "bin/python"]
        wanted = f"{what}[{extras}]" if extras else what
        offline: Command = ["install", "--quiet", "--no-index", "--find-links", self.house, wanted]
        run(*pip, *offline, environment=NO_COMPILER | environment)
        return home

    def problems_of(
        self, what: pathlib.Path, extras: str, *, version: str | None = None
    ) -> tuple[str, list[str]]:
        """Install, use, and compare with the repository. Returns what there is, and what is wrong with it."""
        home = self.install(what, extras, {} if version is None else {"PBR_VERSION": version})
        modules = [BROUGHT[extra] for extra in extras.split(",") if extra]
        # What dependencies announce of their own future is no matter here.
        python: Command = [home / "bin/python", "-I", "-W", "ignore"]
        probe: Command = [*python, "-c", PROBE, self.scratch / "image.qcow2", home / "instances"]
        lines = run(*probe, *modules, cwd=home).splitlines()
        said = lines[0].removeprefix("version ")
        found = {line for line in lines if line.startswith("file ")}
        problems = _compare_files(found) + [line for line in lines if line.startswith("broken ")]
        if version is not None and said != version:
            problems.append(f"version is {said}, not {version}")
        problems += self._compare_disk(home / "instances/instance/disk")
        problems += _use_command(home / "bin/imagecache", said, has_extra="has cliff" in lines)
        entries = sum(line.startswith("entry ") for line in lines)
        return f"version {said}, {len(found)} files, {entries} entry points", problems

    def _compare_disk(self, disk: pathlib.Path) -> list[str]:
        command: Command = [
            "qemu-img",
            "compare",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            self.scratch / "image.qcow2",
            disk,
        ]
        same = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
        return [] if same else ["the disk that was spawned differs from its image"]


def _compare_files(found: set[str]) -> list[str]:
    tracked = run("git", "ls-tree", "-r", "--name-only", "HEAD", "imagecache_lib", cwd=ROOT).split()
    wanted = {f"file {pathlib.Path(path).relative_to('imagecache_lib')}" for path in tracked}
    missing = [f"missing {line.removeprefix('file ')}" for line in sorted(wanted - found)]
    return missing + [f"unexpected {line.removeprefix('file ')}" for line in sorted(found - wanted)]


def _use_command(program: pathlib.Path, version: str, *, has_extra: bool) -> list[str]:
    finished = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    lines = (finished.stdout + finished.stderr).splitlines()
    if has_extra:
        good = finished.returncode == 0 and lines == [f"imagecache {version}"]
    else:
        good = finished.returncode == 1 and len(lines) == 1 and "imagecache-lib[cli]" in lines[0]
    return [] if good else [f"imagecache --version says {lines} and exits with {finished.returncode}"]


def foreign_files(wheel: pathlib.Path) -> list[str]:
    """Return what the wheel holds beside the package and its metadata: tests, say."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    distribution = "-".join(wheel.name.split("-")[:2])
    own = ("imagecache_lib/", f"{distribution}.dist-info/", f"{distribution}.data/data/share/imagecache-lib/")
    return [name for name in names if not name.startswith(own) or "/tests/" in name]


def report(name: str, found: str, problems: list[str]) -> bool:
    print(f"{name}: {found}", *problems, sep="\n  ", flush=True)
    return not problems


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="imagecache-install-") as name:
        workshop = Workshop(pathlib.Path(name))
        sdist, wheel = workshop.prepare()
        good = report("the wheel's files", wheel.name, [f"foreign {each}" for each in foreign_files(wheel)])
        wanted = [(what, extra) for what in (wheel, sdist) for extra in ("", *users_extras())]
        # Most of the time it is one processor that works: pip's, or the probe's.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
            outcomes = workers.map(lambda each: workshop.problems_of(*each), wanted)
            for (what, extra), outcome in zip(wanted, outcomes, strict=True):
                good &= report(f"{what.name}[{extra}]", *outcome)
        tree = workshop.scratch / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
        good &= report("git archive", *workshop.problems_of(tree, "cli,glance", version=ARCHIVE_VERSION))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
