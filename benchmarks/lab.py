# SPDX-License-Identifier: Apache-2.0
"""What the scenarios share: a directory, a Glance with the images, and competitors that talk to it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from benchmarks import dataset, figures, meter, serving
from tests.lab import environment, nova_service
from tests.lab import glance as glance_lab

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    :param data: bytes of real files in the image.
    :param repetitions: how often each competitor runs.
    :param directories: instance directories of the verify pass.
    :param bases: base images of the verify pass.
    """

    quick: bool
    data: int
    virtual_size: int
    repetitions: int
    directories: int
    bases: int
    map_clusters: int

    @classmethod
    def full(cls) -> Scale:
        return cls(False, 986 * 2**20, 4 * 2**30, 5, 10_000, 1_000, 4 * 2**20)

    @classmethod
    def small(cls) -> Scale:
        return cls(True, 96 * 2**20, 384 * 2**20, 2, 500, 50, 2**18)


@dataclasses.dataclass
class Lab:
    """The running parts of one benchmark run.

    :param images: Glance's id of each kind of image.
    :param tell: shows progress.
    """

    home: pathlib.Path
    scale: Scale
    data: dataset.DataSet
    glance: glance_lab.Glance
    images: dict[str, str]
    nova_python: pathlib.Path
    tell: Callable[[str], None]

    def ours(
        self, name: str, *, backend: str = "qcow2", extras: bool = True, instances: pathlib.Path | None = None
    ) -> serving.Competitor:
        """Start this library as a competitor."""
        options = ["--backend", backend] + ([] if extras else ["--without-extras"])
        return self._start(sys.executable, "benchmarks.cache_driver", name, options, instances)

    def nova(self, name: str) -> serving.Competitor:
        return self._start(self.nova_python, "benchmarks.nova_driver", name, [], None)

    def adapted(self, name: str) -> serving.Competitor:
        """Start Nova with the adapter's classes, in Nova's environment, as a competitor."""
        site = self.home / f"{name}-site"
        site.mkdir()
        nova_service.install(self.nova_python.parent.parent, site)
        return self._start(self.nova_python, "benchmarks.nova_driver", name, ["--adapter"], None, path=[site])

    def floor(self) -> serving.Competitor:
        return serving.Competitor(
            sys.executable,
            "benchmarks.floor_driver",
            "--glance",
            self.glance.url,
            "--token",
            glance_lab.MEMBER,
            log=self.home / "floor.log",
        )

    def _start(
        self,
        python: str | pathlib.Path,
        module: str,
        name: str,
        options: list[str],
        instances: pathlib.Path | None,
        path: Sequence[pathlib.Path] = (),
    ) -> serving.Competitor:
        if instances is None:
            instances = self.home / name / "instances"
        instances.mkdir(parents=True, exist_ok=True)
        competitor = serving.Competitor(
            python,
            module,
            "--instances",
            str(instances),
            "--glance",
            self.glance.url,
            "--token",
            glance_lab.MEMBER,
            *options,
            log=self.home / f"{name}.log",
            path=path,
        )
        competitor.ask("ready")
        return competitor


def settle() -> None:
    """Have everything written back, so that one run does not pay for the writes of the one before."""
    os.sync()


def command(*arguments: str | pathlib.Path) -> figures.Sample:
    """Run a command and return what it took, from its start to its end."""
    measured = meter.Meter()
    subprocess.run([str(argument) for argument in arguments], check=True, stdout=subprocess.DEVNULL)
    return measured.read()


def nova_environment() -> pathlib.Path:
    """Return the interpreter of an environment with Nova, making it if need be."""
    return environment.environment("nova", HERE / "nova-requirements.txt") / "bin/python"


@contextlib.contextmanager
def running(home: pathlib.Path, scale: Scale, tell: Callable[[str], None]) -> Iterator[Lab]:
    """Make the data, start Glance, upload, and yield the lab."""
    nova_python = nova_environment()
    for name in ("data", "glance"):
        (home / name).mkdir()
    tell("making the images")
    data = dataset.make(home / "data", data=scale.data, virtual_size=scale.virtual_size)
    with glance_lab.running_glance(home / "glance") as glance:
        images = {}
        for kind, file in data.files.items():
            tell(f"uploading {kind}")
            images[kind] = glance.upload(file.path, disk_format=file.disk_format)
        settle()
        yield Lab(home, scale, data, glance, images, nova_python, tell)
