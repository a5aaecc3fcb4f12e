# SPDX-License-Identifier: Apache-2.0
"""Run the README's two commands where nothing is: ``bare.py SUITE TARGET... --results DIR``, as root.

SUITE is a Debian release's code name. A root filesystem that holds its essential packages, git, make and
nothing else is made once and kept outside of the checkout, with the packages that were downloaded, under a
hash of all that decides what is needed. Each run unpacks it afresh, clones the commit that is checked out
here, and installs everything as a new user would: with sudo as a user, and as root, who then makes the
targets, such as ``test``. Before that the page on installing is pasted into a tree of its own.

It happens in a mount and a process namespace, on a filesystem in a file that has no name any more: the kernel
clears up, however this ends.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import machine_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
USER = "newcomer"
HOMES = {"root": "/root", USER: f"/home/{USER}"}
SHELL = ("bash", "-euo", "pipefail", "-c")
#: Ends all that runs in it, and unmounts all that it mounted, with the program that started it.
NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"),
    *("--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"),
)
#: A tree that was not used for so long is removed, in seconds.
UNUSED = 7 * 86400
#: Its blocks of bash are run, in the order in which they are read.
INSTALL_PAGE = "doc/source/admin/installing.rst"
#: What a line begins with that tells of a part of the set-up.
SET_UP = re.compile(r"^(Making|Installing) ", re.MULTILINE)
#: What a root filesystem holds; sudo is for the user, and removed for root.
CONTENT = ("--variant=minbase", "--include=git,make,sudo")
#: Decide what is installed, and so what a kept tree is worth.
INPUTS = (
    "bindep.txt",
    "requirements.txt",
    "test-requirements.txt",
    "doc/requirements.txt",
    "setup.cfg",
)


@contextlib.contextmanager
def kept_tree(suite: str) -> Iterator[pathlib.Path]:
    """Yield the directory with the packed root filesystem and the downloads, making it if need be.

    Nobody else uses it meanwhile: apt would not share its downloads.
    """
    sources = machine_config.apt_sources(suite)
    inputs = [(ROOT / name).read_text() for name in INPUTS]
    decided = "\0".join([*inputs, *sources, *CONTENT, machine_config.apt_options()])
    key = hashlib.sha256(decided.encode()).hexdigest()[:12]
    trees = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        / "imagecache-lib/bare"
    )
    tree = trees / f"{suite}-{key}"
    tree.mkdir(parents=True, exist_ok=True)
    os.utime(tree)
    for other in trees.glob(f"{suite}-*"):
        if time.time() - other.stat().st_mtime > UNUSED:
            shutil.rmtree(other)
    with (tree / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tree / "root.tar").exists():
            print(f"{suite}: making a root filesystem, kept in {tree}", flush=True)
            (tree / "options").write_text(machine_config.apt_options())
            run(
                "mmdebstrap",
                "--quiet",
                *CONTENT,
                f"--aptopt={tree / 'options'}",
                suite,
                tree / "new.tar",
                *sources,
            )
            (tree / "new.tar").rename(tree / "root.tar")
        yield tree


def run(*command: str | os.PathLike[str]) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt behind the block if a SIGINT came during it."""
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


# -- inside of the namespaces ------------------------------------------------------------------------


class Tree:
    """An unpacked root filesystem, in which programs run."""

    def __init__(self, root: pathlib.Path, kept: pathlib.Path, suite: str) -> None:
        self.root = root
        self.suite = suite
        run("tar", "--extract", "--file", kept / "root.tar", "--directory", root, "--numeric-owner")
        for directory in machine_config.lend(root, suite):
            self.lend(directory, directory, "--read-only")
        for name in ("dev", "sys"):
            run("mount", "--rbind", f"/{name}", root / name)
        run("mount", "-t", "proc", "proc", root / "proc")
        run("mount", "-t", "tmpfs", "tmpfs", root / "dev/shm")
        (kept / "archives/partial").mkdir(parents=True, exist_ok=True)
        self.lend(kept / "archives", pathlib.Path("/var/cache/apt/archives"))
        run("chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", USER)
        for user, home in HOMES.items():
            cache = kept / f"pip-{user}"
            cache.mkdir(exist_ok=True)
            (root / home[1:] / ".cache").mkdir()
            self.lend(cache, pathlib.Path(home, ".cache/pip"))
            run("chroot", root, "chown", "--recursive", f"{user}:", f"{home}/.cache")

    def lend(self, source: pathlib.Path, where: pathlib.Path, *options: str) -> None:
        """Let the tree have a directory of this machine."""
        target = self.root / where.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", *options, source, target)

    def execute(self, user: str, script: str) -> tuple[int, str]:
        """Run a shell script in the user's home, and show what it says. Returns its exit code and output."""
        environment = {
            "CI": "true",
            "HOME": HOMES[user],
            "LANG": "C.UTF-8",
            "LOGNAME": user,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "USER": user,
            **machine_config.proxies(),
        }
        chroot = ["chroot", f"--userspec={user}:", "--groups=", str(self.root)]
        words = [f"{name}={value}" for name, value in environment.items()]
        said = []
        with subprocess.Popen(
            [*chroot, "env", "--ignore-environment", *words, *SHELL, f"cd; {script}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            # On an interrupt, who runs in the tree has more to say.
            with deferred_interrupt():
                for line in process.stdout:
                    said.append(line)
                    print(line, end="", flush=True)
                process.wait()
        return process.returncode, "".join(said)


@contextlib.contextmanager
def unpacked(kept: pathlib.Path, suite: str) -> Iterator[Tree]:
    """Unpack the root filesystem onto one that has no name."""
    with tempfile.TemporaryDirectory(prefix="imagecache-bare-") as scratch:
        image, root = pathlib.Path(scratch, "image"), pathlib.Path(scratch, "root")
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(24 * 2**30)
        # It need not outlive a crash, and the tests sync a lot.
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", image)
        run("mount", "-o", "loop,discard,noatime,nobarrier", image, root)
        image.unlink()
        try:
            yield Tree(root, kept, suite)
        finally:
            run("umount", "--recursive", "--lazy", root)


class Checks:
    """What is tried in one release's trees."""

    def __init__(self, suite: str, targets: list[str], commit: pathlib.Path, results: pathlib.Path) -> None:
        self.suite = suite
        self.targets = targets
        self.commit = commit
        self.results = results
        self.failed: list[str] = []

    def check(self, tree: Tree, user: str, script: str) -> str:
        """Run a script in the clone, and remember whether it failed. Returns what it said."""
        title = f"{self.suite}, {user}: {' '.join(script.split())[:60]}"
        began = time.monotonic()
        code, said = self._execute(title, tree, user, script)
        print(f"-- {title}: {'failed' if code else 'ok'}, {time.monotonic() - began:.1f} s", flush=True)
        if code:
            self.failed.append(title)
        return said

    def refusal(self, tree: Tree, user: str, script: str, reason: str) -> None:
        """Run a script that has to fail, with one line at its end that says why; make adds one of its own."""
        title = f"{self.suite}, {user}: {script}"
        code, said = self._execute(f"{title}, which cannot work", tree, user, script)
        if not code or reason not in "".join(said.splitlines()[-2:-1]):
            self.failed.append(f"{title}: does not end with {reason!r}")

    def _execute(self, title: str, tree: Tree, user: str, script: str) -> tuple[int, str]:
        print(f"-- {title}", flush=True)
        running = self.results / "bare.running"
        running.write_text(f"{title}\n")
        finished = tree.execute(user, f"cd imagecache-lib; {script}")
        running.unlink()
        return finished

    def clone(self, tree: Tree, user: str) -> None:
        shutil.copyfile(self.commit, tree.root / "commit.bundle")
        code, said = tree.execute(user, "git clone --quiet /commit.bundle imagecache-lib 2>&1")
        if code:
            self.failed.append(f"{self.suite}, {user}: git clone: {said}")

    def as_operator(self, tree: Tree) -> None:
        """The page on installing, pasted by root."""
        self.clone(tree, "root")
        self.check(tree, "root", pasted(ROOT / INSTALL_PAGE))

    def as_user(self, tree: Tree) -> None:
        """The demonstration, without rights, and by somebody who may become root with sudo."""
        self.clone(tree, USER)
        self.refusal(tree, USER, "make demo", "only root can install")
        (tree.root / "etc/sudoers.d/newcomer").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
        self.check(tree, USER, "make demo")

    def as_root(self, tree: Tree) -> None:
        """The demonstration and the targets. Root has no sudo here, and needs none."""
        run("chroot", tree.root, "env", "SUDO_FORCE_REMOVE=yes", "dpkg", "--purge", "sudo")
        self.clone(tree, "root")
        # What ran is there even when the tree goes before its time.
        tree.lend(self.results, pathlib.Path("/root/imagecache-lib/build/results/here"))
        self.refusal(tree, "root", "unshare --net make demo", "is there a network?")
        self.check(tree, "root", "make demo")
        self.demo_again(tree, "root")
        for target in self.targets:
            self.check(tree, "root", f"make --keep-going {target}")
        self.check(tree, "root", "for each in cc gcc g++ clang; do ! type $each || exit; done 2>/dev/null")

    def demo_again(self, tree: Tree, user: str) -> None:
        """All is set up: nothing is made or installed before the demonstration."""
        began = time.monotonic()
        said = self.check(tree, user, "make demo")
        took = time.monotonic() - began
        shown = re.search(r"Everything was as claimed, in ([0-9.]+) s", said)
        if shown is None or SET_UP.search(said):
            self.failed.append(f"{self.suite}, {user}: set up again")
        else:
            print(f"   {took - float(shown[1]):.1f} s beside the demonstration itself", flush=True)


def pasted(page: pathlib.Path) -> str:
    """Return what a reader pastes from a page: its blocks of bash, one after the other."""
    lines, taking = [], False
    for line in page.read_text().splitlines():
        if line and not line.startswith(" "):
            taking = line == ".. code-block:: bash"
        elif taking:
            lines.append(line.removeprefix("    "))
    return "\n".join(lines)


def inside(chosen: argparse.Namespace) -> int:
    kept, commit = chosen.inside
    checks = Checks(chosen.suite, chosen.targets, commit, chosen.results)
    for attempt in (checks.as_operator, checks.as_user, checks.as_root):
        with unpacked(kept, chosen.suite) as tree:
            attempt(tree)
    for failure in checks.failed:
        print(f"failed: {failure}")
    return 1 if checks.failed else 0


def outside(chosen: argparse.Namespace) -> int:
    """Make what is missing, and go on in namespaces that end with this process."""
    if os.geteuid() != 0:
        raise SystemExit("bare.py: only root can make a root filesystem")
    results = chosen.results.resolve()
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    with (
        kept_tree(chosen.suite) as kept,
        tempfile.TemporaryDirectory(prefix="imagecache-commit-") as scratch,
    ):
        commit = pathlib.Path(scratch, "commit.bundle")
        run("git", "-C", ROOT, "bundle", "create", "--quiet", commit, "HEAD")
        again = [sys.executable, __file__, chosen.suite, *chosen.targets, "--results", str(results)]
        again += ["--inside", str(kept), str(commit)]
        # On an interrupt, which all in the tree get too, they end with reports of what they did.
        with deferred_interrupt():
            return subprocess.run([*NAMESPACES, *again], stdin=subprocess.DEVNULL, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite")
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument(
        "--inside", nargs=2, type=pathlib.Path, metavar=("KEPT", "COMMIT"), help=argparse.SUPPRESS
    )
    chosen = parser.parse_args()
    try:
        return inside(chosen) if chosen.inside else outside(chosen)
    except (machine_config.ConfigurationError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"bare.py: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
