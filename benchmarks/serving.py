# SPDX-License-Identifier: Apache-2.0
"""A competitor runs in a process of its own and is asked over pipes, a line of JSON each way.

So every timing is taken inside the process that does the work, after its imports.
Standard library only: Nova's environment loads it too.
"""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


class CompetitorFailed(Exception):
    """It answered with an error, ended, or did not answer in time."""


def serve(operations: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    # Whatever the libraries print must not mix with the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("operation")](**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Competitor:
    """A process that runs one of the modules that call :func:`serve`.

    :param python: interpreter of its environment.
    :param module: name of the module.
    :param path: directories whose modules come before the environment's own.
    """

    def __init__(
        self,
        python: str | pathlib.Path,
        module: str,
        *arguments: str,
        log: pathlib.Path,
        path: Sequence[pathlib.Path] = (),
    ) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))} if path else None,
            )

    def __enter__(self) -> Competitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, operation: str, *, limit: float = 240.0, **arguments: Any) -> dict[str, Any]:
        """Have one thing done and return the answer.

        :param limit: seconds after which it counts as stuck.
        :raises CompetitorFailed: as it says.
        """
        self.begin(operation, **arguments)
        return self.answer(limit=limit)

    def begin(self, operation: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, *, limit: float = 240.0) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], limit)
        line = self._process.stdout.readline() if readable else b""
        if not line:
            why = "ended" if readable else f"did not answer within {limit:.0f} s"
            raise CompetitorFailed(f"{self._process.args!r} {why}\n{self._end_of_log()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CompetitorFailed(answer["error"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _end_of_log(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
