# SPDX-License-Identifier: Apache-2.0
"""How this machine's apt and pip reach their servers, for a root filesystem that shall reach them too.

All of it is asked of the tools themselves: mirrors, proxies, certificates and checks are whatever ``apt-get
indextargets``, ``apt-config dump`` and ``pip config list`` show (what ``pip config debug`` shows, merged).
No path and no host of the machine is written down here.
"""

from __future__ import annotations

import ast
import configparser
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import urllib.parse

#: Handed to programs that run in the root filesystem.
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class ConfigurationError(Exception):
    """The machine is none that can lend its configuration; the text says why."""


def apt_sources(suite: str) -> list[str]:
    """Return lines of sources.list for a Debian, from the servers of this machine's own packages.

    :param suite: the release's code name.
    :raises ConfigurationError: this machine is no Debian, or has no package lists.
    """
    release = platform.freedesktop_os_release()
    own = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not own:
        raise ConfigurationError("only a Debian knows where Debian's packages are")
    wanted = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    told = _output("apt-get", "indextargets", "--format", wanted, "Created-By: Packages")
    lines = [
        f"deb {uri} {suite}{name.removeprefix(own)} {component}"
        for uri, name, component in map(str.split, told.splitlines())
        if re.fullmatch(rf"{re.escape(own)}(-updates|-security)?", name)
    ]
    if not lines:
        raise ConfigurationError("apt-get knows no package lists of Debian's; run apt-get update")
    return list(dict.fromkeys(lines))


def apt_options() -> str:
    """Return how apt acquires files here, as text of apt.conf."""
    told = _output("apt-config", "dump", "--format", '%F "%v";%n')
    lines = [line for line in told.splitlines() if line.startswith("Acquire::")]
    return "".join(
        f"{line}\n" for line in lines if not line.startswith(("Acquire::IndexTargets", "Acquire::Changelogs"))
    )


def pip_options() -> dict[str, dict[str, str]]:
    """Return pip's settings by section. What environment variables say comes last, as pip has it."""
    sections: dict[str, dict[str, str]] = {}
    told = _output(sys.executable, "-m", "pip", "config", "list").splitlines()
    for line in sorted(told, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        sections.setdefault("global" if section == ":env:" else section, {})[key] = ast.literal_eval(value)
    return sections


def lend(root: pathlib.Path, suite: str) -> list[pathlib.Path]:
    """Write this machine's configuration into a root filesystem.

    :returns: directories that the configuration names, to be bound into it.
    """
    lender = _Lender(root)
    (root / "etc/apt/sources.list").write_text("".join(f"{line}\n" for line in apt_sources(suite)))
    (root / "etc/apt/apt.conf.d/90machine").write_text(lender.lend(apt_options()))
    parser = configparser.RawConfigParser()
    for section, values in pip_options().items():
        parser[section] = {key: lender.lend(value) for key, value in values.items()}
    with (root / "etc/pip.conf").open("w") as file:
        parser.write(file)
    for name in ("resolv.conf", "hosts"):
        shutil.copyfile(f"/etc/{name}", root / "etc" / name)
    return sorted(lender.directories)


class _Lender:
    """Brings what settings name into a root filesystem.

    A file is copied to a place that no package has: ca-certificates, for one, would write its own bundle over
    that of the machine.
    """

    COPIES = pathlib.Path("/usr/local/share/lent")

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self.directories: set[pathlib.Path] = set()

    def lend(self, text: str) -> str:
        """Return the setting as it has to be in the root filesystem."""
        return re.sub(r'(?:file://)?/[^\s";]+', self._bring, text)

    def _bring(self, found: re.Match[str]) -> str:
        word = found[0]
        path = pathlib.Path(urllib.parse.unquote(word.removeprefix("file://")))
        if path.is_file():
            copy = self.COPIES / path.relative_to("/")
            (self._root / copy.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._root / copy.relative_to("/"))
            return f"file://{copy}" if word.startswith("file://") else str(copy)
        if path.is_dir() and len(path.parts) > 2:
            # The pages of an index link to files beside its directory.
            self.directories.add(path.parent if word.startswith("file://") else path)
        return word


def proxies() -> dict[str, str]:
    """Return the variables that say which proxy to use."""
    return {name: os.environ[name] for name in PROXY_VARIABLES if name in os.environ}


def _output(*command: str) -> str:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=True
    ).stdout
