# SPDX-License-Identifier: Apache-2.0
"""A process that is killed while it fetches an image: ``python -m tests.support.dying``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import imagecache_lib as ic
from imagecache_lib import model
from imagecache_lib.precache import client
from imagecache_lib.precache.passing_on import PassingOn
from imagecache_lib.precache.tasks import Attempt, Moments
from imagecache_lib.sources.parents import Parents
from imagecache_lib.sources.route import Route
from imagecache_lib.testing.sources import FakeSource


class SayingSource(FakeSource):
    """An image service that says more of its images.

    :param says: fields of the descriptions.
    """

    def __init__(self, images: Mapping[str, bytes], says: Mapping[str, Any], **options: Any) -> None:
        super().__init__(images, **options)
        self._says = says

    def describe(self, image_id: str) -> model.Image:
        return dataclasses.replace(super().describe(image_id), **self._says)


class DyingSource(SayingSource):
    """An image service in whose answers this process is killed at a byte."""

    def __init__(self, images: Mapping[str, bytes], dies_at: int, says: Mapping[str, Any]) -> None:
        super().__init__(images, says)
        self._dies_at = dies_at

    @contextlib.contextmanager
    def open(self, image: model.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        with super().open(image, offset) as chunks:
            yield self._until_death(chunks, offset)

    def _until_death(self, chunks: Iterator[bytes], offset: int) -> Iterator[bytes]:
        for chunk in chunks:
            if offset + len(chunk) > self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            offset += len(chunk)
            yield chunk


def die(
    instances: os.PathLike[str], data: os.PathLike[str], image_id: str, dies_at: int, **options: Any
) -> None:
    """Fetch an image, as an agent does, in a process that is killed at a byte of the image's data.

    :param data: path of the image's data.
    :param options: ``disk_format`` and ``compression``, as its description has them; ``relays``, for a host
        that passes it on; others are of the cache's configuration.
    """
    words = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.dying"]
    command += [str(instances), str(data), image_id, str(dies_at), *words]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL, done.returncode


def main(instances: str, data: str, image_id: str, dies_at: str, *words: str) -> None:
    options: dict[str, Any] = dict(word.split("=", 1) for word in words)
    says: dict[str, Any] = {
        name: options.pop(name) for name in ("disk_format", "compression") if name in options
    }
    relays = options.pop("relays", "") == "True"
    options = {name: value == "True" for name, value in options.items()}
    with open(data, "rb") as file:
        source = DyingSource({image_id: file.read()}, int(dies_at), says)
    manager = ic.ImageCacheManager(ic.CacheConfig(instances_path=instances, **options), source)
    request = ic.Request(resume=threading.Event())
    if relays:
        passing_on = PassingOn(manager, manager.spools(), Parents("http://{host}:1", token="x" * 20))
        attempt = Attempt(client.HostTask("job", (image_id,)), Moments(), threading.Event(), image_id, 0)
        request = ic.Request(
            source=passing_on.source(Route((), origin=True), attempt, None), hash_pieces=True
        )
    manager.precache_image(image_id, request=request)


if __name__ == "__main__":
    main(*sys.argv[1:])
