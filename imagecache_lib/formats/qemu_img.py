# SPDX-License-Identifier: Apache-2.0
"""The only caller of qemu-img. Formats are always explicit and resources always limited.

The limits are set with util-linux's prlimit(1), since oslo.concurrency's own ``ProcessLimits`` starts another
Python interpreter for the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

from oslo_concurrency import processutils

from imagecache_lib import errors
from imagecache_lib.config import CacheConfig
from imagecache_lib.system.host import System

#: Seconds between two looks whether anybody still waits for a conversion.
_LOOK_EVERY = 0.25

#: Messages are matched, so they must not be translated.
_ENVIRONMENT = {**os.environ, "LC_ALL": "C"}


class StorageFailed(errors.BackendError):
    """qemu-img met an I/O error: the disk is at fault and not the image."""


class QemuImg:
    """Runs qemu-img within the limits of the configuration."""

    def __init__(self, config: CacheConfig, host: System) -> None:
        self._config = config
        self._host = host

    def info(self, path: str, format: str) -> dict[str, Any]:
        """Return ``qemu-img info`` of a disk, opened as the given format and without its backing chain.

        :raises BackendError: it cannot be read as that.
        """
        out = self._run(
            path,
            "info",
            "--force-share",
            "--output=json",
            "-f",
            format,
            path,
            cpu=self._config.images_cpu_time_limit,
            memory=self._config.images_address_space_limit,
        )
        found: dict[str, Any] = json.loads(out)
        return found

    def mapped_bytes(self, path: str, format: str) -> int:
        """Return how many bytes of a disk are data, in clusters of 64 KiB: the most it takes as a raw file.

        :raises BackendError: it cannot be read as that.
        """
        # For raw, measure says the virtual size; for qcow2 it counts data, and some bytes of tables for each
        # 64 KiB. The map would be exact, and has a line for each extent: a vmdk of two megabytes, whose grain
        # tables are all one, fills gigabytes with it.
        out = self._run(
            path,
            "measure",
            "--output=json",
            "-f",
            format,
            "-O",
            "qcow2",
            path,
            cpu=self._config.convert_cpu_time_limit,
            memory=self._config.convert_address_space_limit,
        )
        return int(json.loads(out)["required"])

    def convert_to_raw(
        self, source: str, source_format: str, target: str, *, check: Callable[[], None]
    ) -> None:
        """Convert into an existing, empty raw file that has the virtual size already; zeros stay holes.

        :param check: raises once nobody waits any more; that ends the conversion, and is raised.
        :raises ImageRejected: the source is damaged.
        :raises NoSpaceError: the filesystem is full.
        :raises StorageFailed: the disk failed.
        """
        try:
            with _watched(check) as watch:
                self._run(
                    source,
                    "convert",
                    "-n",
                    "--target-is-zero",
                    "-W",
                    "-m",
                    "8",
                    "-f",
                    source_format,
                    "-O",
                    "raw",
                    source,
                    target,
                    cpu=self._config.convert_cpu_time_limit,
                    memory=self._config.convert_address_space_limit,
                    on_execute=watch,
                )
        except StorageFailed:
            raise
        except errors.BackendError as error:
            raise errors.ImageRejected(
                f"it cannot be converted from {source_format}: {error.cause}",
                next_step="have its owner upload a good image under a new id",
            ) from error

    def convert(self, source: str, source_format: str, target: str, target_format: str) -> None:
        """Convert a disk without a backing file into an existing, empty file; zeros stay holes.

        :raises BackendError: qemu-img failed.
        :raises NoSpaceError: the filesystem is full.
        """
        self._work(
            target, "convert", "-W", "-m", "8", "-f", source_format, "-O", target_format, source, target
        )

    def resize(self, path: str, format: str, size: int) -> None:
        """Grow a disk to ``size`` bytes.

        :raises BackendError: qemu-img failed.
        :raises NoSpaceError: the filesystem is full.
        """
        self._work(path, "resize", "-q", "-f", format, path, str(size))

    def flatten(self, path: str, format: str) -> None:
        """Copy into an overlay what its backing file has, and forget the backing file.

        :raises BackendError: qemu-img failed; the overlay still has its backing file.
        :raises NoSpaceError: the filesystem is full.
        """
        self._work(path, "rebase", "-f", format, "-b", "", path)

    def _work(self, path: str, *arguments: str) -> None:
        self._run(
            path,
            *arguments,
            cpu=self._config.convert_cpu_time_limit,
            memory=self._config.convert_address_space_limit,
        )

    def _run(
        self,
        path: str,
        *arguments: str,
        cpu: int,
        memory: int,
        on_execute: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> str:
        command = ("prlimit", f"--cpu={cpu}", f"--as={memory}", "--", "qemu-img", *arguments)
        try:
            out, _err = self._host.execute(*command, env_variables=_ENVIRONMENT, on_execute=on_execute)
        except processutils.ProcessExecutionError as error:
            raise _translated(error, path) from error
        except OSError as error:
            raise errors.ConfigError(
                f"qemu-img cannot be run: {error}", next_step="install qemu-utils (qemu-img) and util-linux"
            ) from error
        return out


@contextlib.contextmanager
def _watched(check: Callable[[], None]) -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Yield what watches a process from its start, and kills it once ``check`` raises; that is raised."""
    over = threading.Event()
    watchers: list[threading.Thread] = []
    reasons: list[errors.ImageCacheError] = []

    def watch(process: subprocess.Popen[bytes]) -> None:
        while not over.wait(_LOOK_EVERY):
            try:
                check()
            except errors.ImageCacheError as reason:
                reasons.append(reason)
                process.kill()
                return

    def start(process: subprocess.Popen[bytes]) -> None:
        watchers.append(threading.Thread(target=watch, args=(process,), name="imagecache-watch", daemon=True))
        watchers[-1].start()

    try:
        yield start
    except errors.ImageCacheError as error:
        if reasons:
            raise reasons[0] from error
        raise
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()


def _translated(error: processutils.ProcessExecutionError, path: str) -> errors.ImageCacheError:
    said = str(error.stderr or error.stdout or "").strip()
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return errors.NoSpaceError("the filesystem is full", path=path, next_step="make room, then ask again")
    if "Input/output error" in said:
        return StorageFailed(f"qemu-img: {said.splitlines()[-1]}", path=path, next_step="check the disk")
    if error.exit_code == 127:
        return errors.ConfigError(
            f"qemu-img cannot be run: {said}", next_step="install qemu-utils (qemu-img)"
        )
    if isinstance(error.exit_code, int) and error.exit_code < 0:
        said = f"ended by signal {-error.exit_code}, which may be its resource limit"
    return errors.BackendError(f"qemu-img: {said.splitlines()[-1] if said else 'failed'}", path=path)
