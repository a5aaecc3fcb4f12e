# SPDX-License-Identifier: Apache-2.0
"""Nova's own image cache, called in an environment of its own, over the same directory."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import imagecache_lib
from tests.lab import nova_service
from tests.lab.environment import environment

HERE = pathlib.Path(__file__).parent


class Nova:
    """Nova with one configuration. Each call is a process of its own.

    :param instances_path: the directory that both use.
    :param site: a directory for a copy of Nova's package with the adapter in it. None: Nova is without it.
    :param under: a command to run Nova's processes under.
    :param options: of nova.conf: ``default_ephemeral_format``, ``virt_mkfs``, ``host``, ``images_type``.
    """

    def __init__(
        self,
        instances_path: str | os.PathLike[str],
        *,
        site: pathlib.Path | None = None,
        under: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._configuration = {"instances_path": os.fspath(instances_path), **options}
        found = environment("nova", HERE / "nova-requirements.txt")
        self._command = [*under, str(found / "bin/python"), "-P", str(HERE / "nova_side.py")]
        self._path = [HERE / "nova_plugin", pathlib.Path(imagecache_lib.__file__).parent.parent]
        if site is not None:
            nova_service.install(found, site)
            self._path.insert(0, site)

    def call(self, action: str, **arguments: Any) -> Any:
        """Return what a function of :mod:`tests.lab.nova_side` returns.

        :param action: the function.
        """
        asked = {"configuration": self._configuration, "action": action, "arguments": arguments}
        sources = os.pathsep.join(map(str, self._path))
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        done = subprocess.run(
            self._command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": sources, "PATH": path},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])
