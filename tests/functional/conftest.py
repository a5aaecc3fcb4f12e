# SPDX-License-Identifier: Apache-2.0
"""The servers of the functional tests, one of each per run, and filesystems, one per test."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import pytest

from tests.lab import bindings, filesystems
from tests.lab import ceph as ceph_lab
from tests.lab import glance as glance_lab
from tests.lab import libvirt as libvirt_lab
from tests.lab import nginx as nginx_lab
from tests.lab import relay as relay_lab

MIB = 2**20


@pytest.fixture(scope="session", autouse=True)
def _what_was_imported_is_no_garbage() -> None:
    gc.freeze()  # a collection after each test then takes milliseconds


@pytest.fixture(autouse=True)
def _what_a_test_leaves_open_is_its_own() -> Iterator[None]:
    """Find it now: the next test would fail for it, and what the last one left would fail without a name."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[glance_lab.Glance]:
    """A running Glance. Tests share it: they look at their own images only."""
    with glance_lab.running_glance(tmp_path_factory.mktemp("glance")) as running:
        yield running


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nginx_lab.Nginx]:
    """A running nginx. Tests share it: they serve files of names of their own."""
    with nginx_lab.running_nginx(tmp_path_factory.mktemp("nginx")) as running:
        yield running


@pytest.fixture
def tls_nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nginx_lab.Nginx]:
    """A running nginx with https and a certificate that nobody trusts by default."""
    with nginx_lab.running_nginx(tmp_path_factory.mktemp("nginx"), tls=True) as running:
        yield running


@pytest.fixture
def relay_to() -> Iterator[Callable[[str], relay_lab.Relay]]:
    """Start a relay in front of an ``http://host:port``."""
    with contextlib.ExitStack() as stack:
        yield lambda url: stack.enter_context(relay_lab.running_relay(url))


@pytest.fixture(scope="session")
def libvirt() -> Iterator[libvirt_lab.Libvirt]:
    """A running libvirtd. Tests share it: their domains have names of their own."""
    # Not below pytest's directory, which only its user may enter: QEMU runs as another.
    with tempfile.TemporaryDirectory(prefix="imagecache-", dir="/var/tmp") as name:
        home = pathlib.Path(name)
        home.chmod(0o755)
        with libvirt_lab.running_libvirt(home) as running:
            yield running


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ceph_lab.Ceph]:
    """A running Ceph cluster. Tests share it: their images have names of their own."""
    bindings.load(tmp_path_factory.mktemp("bindings"), "python3-rados", ["rados"])
    bindings.load(tmp_path_factory.mktemp("bindings"), "python3-rbd", ["rbd"])
    # Not below pytest's directory: the path of a Unix socket may have 107 bytes at most.
    with (
        tempfile.TemporaryDirectory(prefix="ceph-", dir="/var/tmp") as home,
        ceph_lab.running_ceph(pathlib.Path(home)) as running,
    ):
        yield running


@pytest.fixture(scope="session")
def ceph_glance(ceph: ceph_lab.Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[glance_lab.Glance]:
    """A running Glance with a store in that cluster. Tests share it: they look at their own images only."""
    with glance_lab.running_glance(tmp_path_factory.mktemp("ceph-glance"), ceph=ceph) as running:
        yield running


@pytest.fixture
def xfs(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An xfs that can reflink, 1 GiB."""
    mkfs = ["mkfs.xfs", "-q", "-m", "reflink=1,crc=1"]
    with filesystems.loop_mounted(tmp_path, 1024 * MIB, mkfs) as mount_point:
        yield mount_point


@pytest.fixture
def small_ext4(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An ext4 of 64 MiB that is soon full; none of it is reserved for root."""
    with filesystems.loop_mounted(tmp_path, 64 * MIB, ["mkfs.ext4", "-q", "-m", "0"]) as mount_point:
        yield mount_point


@pytest.fixture
def tmpfs(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A tmpfs of 256 MiB: no reflinks; other limits than a disk."""
    with filesystems.tmpfs_mounted(tmp_path, 256 * MIB) as mount_point:
        yield mount_point
