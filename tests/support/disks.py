# SPDX-License-Identifier: Apache-2.0
"""Disks that are files, read and written as QEMU does, for tests of backends."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid

from imagecache_lib import model


class DiskFiles:
    """What the backends' contract asks for where disks are files below ``directory``."""

    directory: str

    def make_target(self) -> str:
        return os.path.join(self._instance(), f"disk{uuid.uuid4().hex[:8]}")

    def everything(self) -> set[str]:
        return set(os.listdir(self._instance()))

    def _instance(self) -> str:
        path = os.path.join(self.directory, "instance")
        os.makedirs(path, exist_ok=True)
        return path

    def read_disk(self, disk: model.Disk, offset: int, length: int) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            out = os.path.join(directory, "out")
            block = 512 if offset % 65536 or length % 65536 else 65536
            subprocess.run(
                [
                    "qemu-img",
                    "dd",
                    "-f",
                    disk.format,
                    "-O",
                    "raw",
                    f"bs={block}",
                    f"skip={offset // block}",
                    f"count={(offset + length) // block}",
                    f"if={disk.target}",
                    f"of={out}",
                ],
                check=True,
            )
            with open(out, "rb") as file:
                return file.read()

    def write_disk(self, disk: model.Disk, offset: int, data: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            subprocess.run(
                [
                    "qemu-io",
                    "-f",
                    disk.format,
                    "-c",
                    f"write -q -s {file.name} {offset} {len(data)}",
                    disk.target,
                ],
                check=True,
            )

    def check_disk(self, disk: model.Disk) -> None:
        if disk.format != "raw":
            subprocess.run(["qemu-img", "check", "-q", "-f", disk.format, disk.target], check=True)
