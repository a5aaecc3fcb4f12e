# SPDX-License-Identifier: Apache-2.0
"""A disk that the last pass saw and that is not to be seen now: what proves that it was removed, and what
does not.

Mounts are real, which needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import layout
from imagecache_lib.store.identity import identity_now
from imagecache_lib.testing.sources import FakeSource
from imagecache_lib.upkeep.report import VerifyReport
from tests.lab import stale_names
from tests.support import files, recorded_calls

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ID = "11111111-aaaa-4bbb-8ccc-0123456789ab"
NAME = layout.base_name(ID)
OTHER_ID = "22222222-aaaa-4bbb-8ccc-0123456789ab"
OTHER_NAME = layout.base_name(OTHER_ID)
UUID = "abcdef12-aaaa-4bbb-8ccc-0123456789ab"
OLD = 2 * 86400

#: A pass of a process of its own, whose first argument is the directory of instances.
VERIFY = (
    "import sys, imagecache_lib as ic\n"
    "from imagecache_lib.testing.sources import FakeSource\n"
    "config = ic.CacheConfig(instances_path=sys.argv[1])\n"
    "host = ic.System(name='here')\n"
    "ic.ImageCacheManager(config, FakeSource({}), host=host, observers=()).verify_base_images([])\n"
)


class Host:
    """A host with a base that nobody has used for long, and disks on it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.instances = directory / "instances"
        self.instances.mkdir()
        self.base = self.instances / "_base" / NAME
        self.other_base = self.instances / "_base" / OTHER_NAME
        self.private = self.instances / "_base" / ".imagecache"
        self.manager().cache_image(ID)

    def manager(self, name: str = "here", **options: Any) -> ic.ImageCacheManager:
        config = ic.CacheConfig(instances_path=str(self.instances), **options)
        source = FakeSource({ID: b"x" * 65536, OTHER_ID: b"y" * 65536})
        return ic.ImageCacheManager(config, source, host=ic.System(name=name), observers=())

    def disk(self, path: pathlib.Path) -> pathlib.Path:
        files.overlay(path, self.base)
        return path

    def disk_on_another(self, path: pathlib.Path) -> pathlib.Path:
        if not self.other_base.exists():
            self.manager().cache_image(OTHER_ID)
        files.overlay(path, self.other_base)
        return path

    def verify(self, report: Sequence[ic.Instance] | None = (), **options: Any) -> VerifyReport:
        for name in (NAME, OTHER_NAME):
            for path in (self.base.with_name(name), self.private / "records" / f"{name}.json"):
                if path.exists():
                    files.age(path, seconds=OLD)
        return self.manager(**options).verify_base_images(report)

    def keeps(self, report: Sequence[ic.Instance] | None = (), **options: Any) -> bool:
        """Whether two passes leave the base, the second of which sees no more than the first."""
        for _pass in range(2):
            self.verify(report, **options)
        return self.base.exists()


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Host:
    return Host(tmp_path)


@contextlib.contextmanager
def mounted(where: pathlib.Path, *source: str | pathlib.Path) -> Iterator[None]:
    where.mkdir(parents=True, exist_ok=True)
    what = ["--bind", *map(str, source)] if source else ["-t", "tmpfs", "tmpfs"]
    command = ["mount", *what, str(where)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


@contextlib.contextmanager
def mounted_file(where: pathlib.Path, source: pathlib.Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", source, where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


# -- what proves nothing -----------------------------------------------------------------------------


@needs_root
def test_a_volume_that_is_not_mounted_on_an_instance_directory_is_no_deletion(host: Host) -> None:
    with mounted(host.instances / "uuid"):
        host.disk(host.instances / "uuid" / "disk")
        host.verify()
    report = host.verify()
    assert host.keeps()
    assert "uuid/disk is not to be seen now" in report.problems[0]
    assert "imagecache disk forget" in report.problems[0]


def test_a_directory_that_cannot_be_listed_to_its_end_is_no_deletion(host: Host) -> None:
    """Such as one with a bad block. That the driver reports its instance with other images proves nothing."""
    directory = host.instances / "uuid"
    host.disk(directory / "disk")
    report = [ic.Instance("uuid", "here", images=("another",))]
    host.verify(report)
    failing = ["-o", os.devnull, "-P", str(directory), "-e", "inject=getdents64:error=EIO"]
    assert recorded_calls.attached(lambda: host.verify(report), [*failing, "-e", "trace=getdents64"]) == 0
    assert host.base.exists()
    host.verify(report)
    assert host.base.exists()


@needs_root
def test_a_bind_mount_of_the_same_filesystem_that_is_missing_is_no_deletion(host: Host) -> None:
    real = host.directory / "real"
    real.mkdir()
    with mounted(host.instances / "pool", real):
        host.disk(host.instances / "pool" / "uuid" / "disk")
        host.verify()
    assert host.keeps()


@needs_root
def test_a_disk_root_whose_bind_mount_is_missing_keeps_everything(host: Host) -> None:
    real, root = host.directory / "real", host.directory / "root"
    real.mkdir()
    roots = (str(host.instances), str(root))
    with mounted(root, real):
        host.disk(root / "uuid" / "disk")
        host.verify(disk_roots=roots)
    assert host.keeps(disk_roots=roots)
    assert "another directory" in host.verify(disk_roots=roots).problems[0]


@needs_root
def test_something_mounted_over_an_instance_directory_is_no_deletion(host: Host) -> None:
    host.disk(host.instances / "uuid" / "disk")
    host.verify()
    with mounted(host.instances / "uuid"):
        assert host.keeps()


@needs_root
def test_a_mount_namespace_that_lacks_a_mount_deletes_nothing(host: Host) -> None:
    with mounted(host.instances / "uuid"):
        host.disk(host.instances / "uuid" / "disk")
        host.verify()
        files.age(host.base, host.private / "records" / f"{NAME}.json", seconds=OLD)
        script = 'umount "$1" && shift && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", script, "sh", str(host.instances / "uuid")]
        subprocess.run([*command, sys.executable, "-c", VERIFY, str(host.instances)], check=True)
        assert host.base.exists()


@needs_root
def test_a_link_to_a_volume_that_is_not_mounted_is_no_deletion(host: Host) -> None:
    volume = host.directory / "volume"
    volume.mkdir()
    (host.instances / "uuid").symlink_to(volume)
    with mounted(volume):
        host.disk(host.instances / "uuid" / "disk")
        host.verify()
    assert host.keeps()


def test_a_link_below_a_mount_point_that_leads_nowhere_is_no_deletion(host: Host) -> None:
    volume = host.directory / "volume"
    (volume / "inner").mkdir(parents=True)
    (host.instances / "uuid").symlink_to(volume / "inner")
    host.disk(host.instances / "uuid" / "disk")
    host.verify()
    volume.rename(host.directory / "elsewhere")
    assert host.keeps()


@needs_root
def test_a_link_to_a_disk_on_a_volume_that_is_not_mounted_is_no_deletion(host: Host) -> None:
    disk, volume = host.instances / "uuid" / "disk", host.directory / "volume"
    disk.parent.mkdir()
    disk.symlink_to(volume / "disk")
    with mounted(volume):
        host.disk(volume / "disk")
        host.verify()
    assert host.keeps()
    assert "leads nowhere" in host.verify().problems[0]
    (volume / "disk").write_bytes(b"what the volume is mounted over")
    assert host.keeps()
    assert "what is there refers to no base image" in host.verify().problems[0]


@needs_root
def test_a_node_whose_device_was_detached_is_no_deletion(host: Host) -> None:
    disk, other = host.instances / "uuid" / "disk", host.directory / "other"
    host.disk(other)
    os.truncate(other, 2**20)
    disk.parent.mkdir()
    command = ["losetup", "--find", "--show", str(other)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        os.mknod(disk, 0o600 | stat.S_IFBLK, os.stat(device).st_rdev)
        host.verify()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert host.keeps()
    disk.unlink()
    assert not host.keeps()


@needs_root
def test_a_disk_that_is_itself_a_mount_and_is_not_mounted_is_no_deletion(host: Host) -> None:
    disk, other = host.instances / "uuid" / "disk", host.directory / "other"
    disk.parent.mkdir()
    disk.touch()
    with mounted_file(disk, host.disk(other / "disk")):
        host.verify()
    assert host.keeps()
    report = host.verify()
    assert "uuid/disk is not to be seen now" in report.problems[0]
    with mounted_file(disk, other / "disk"):
        assert host.verify().problems == ()
    host.manager().forget_disks(str(disk.parent))
    assert not host.keeps()


#: The path of a disk, that of a disk which has it where the first is not mounted, and what mounts it.
Hidden = tuple[pathlib.Path, pathlib.Path, contextlib.AbstractContextManager[None]]


def _has_a_volume(host: Host) -> Hidden:
    """Make an instance whose directory is a volume."""
    real = host.directory / "real"
    host.disk(real / "disk")
    directory = host.instances / "uuid"
    return directory / "disk", directory / "disk", mounted(directory, real)


def _has_a_linked_disk(host: Host) -> Hidden:
    """Make an instance with a link to a disk on a volume."""
    real, volume = host.directory / "real", host.directory / "volume"
    host.disk(real / "disk")
    disk = host.instances / "uuid" / "disk"
    disk.parent.mkdir()
    disk.symlink_to(volume / "disk")
    return disk, volume / "disk", mounted(volume, real)


def _has_a_mounted_disk(host: Host) -> Hidden:
    """Make an instance with a disk that is itself a mount."""
    disk = host.instances / "uuid" / "disk"
    disk.parent.mkdir()
    disk.touch()
    return disk, disk, mounted_file(disk, host.disk(host.directory / "real"))


@needs_root
@pytest.mark.parametrize("kind", [_has_a_volume, _has_a_linked_disk, _has_a_mounted_disk])
def test_another_disk_where_one_is_not_mounted_is_no_deletion(
    host: Host, kind: Callable[[Host], Hidden]
) -> None:
    disk, below, mount = kind(host)
    with mount:
        host.verify()
    below.unlink(missing_ok=True)
    host.disk_on_another(below)
    assert host.keeps()
    report = host.verify()
    told = f"{disk} is not to be seen now, since what has its path now may be another disk"
    assert told in report.problems[0]
    below.write_bytes(b"a raw disk")
    assert host.keeps()
    assert host.manager().forget_disks(str(disk)) == 1 + (kind is _has_a_linked_disk)
    assert not host.keeps()


@needs_root
def test_what_is_mounted_again_is_seen_as_before_and_what_it_covers_stays_too(host: Host) -> None:
    directory, real = host.instances / "uuid", host.directory / "real"
    host.disk(real / "disk")
    for _time in range(3):
        with mounted(directory, real):
            assert host.keeps()
        host.disk_on_another(directory / "disk")
        assert host.keeps()
        assert host.other_base.exists()
    with mounted(directory, real):
        host.verify()
        (real / "disk").unlink()
        assert not host.keeps()
        assert host.other_base.exists()
    (directory / "disk").unlink()
    host.verify()
    assert not host.other_base.exists()
    assert not host.verify().problems


@needs_root
@pytest.mark.parametrize("through_a_link", [False, True])
def test_what_is_mounted_on_a_disk_hides_it_and_is_no_deletion(host: Host, through_a_link: bool) -> None:
    disk, raw = host.instances / "uuid" / "disk", host.directory / "raw"
    raw.write_bytes(b"a raw disk")
    host.disk(disk)
    root = host.directory / "root"
    if through_a_link:
        root.symlink_to(host.instances)
    roots: dict[str, Any] = {"disk_roots": (str(root),)} if through_a_link else {}
    host.verify(**roots)
    with mounted_file(disk, raw):
        assert host.keeps(**roots)
    assert host.keeps(**roots)
    disk.unlink()
    assert not host.keeps(**roots)


@needs_root
def test_two_namespaces_that_see_different_disks_at_one_path_keep_the_bases_of_both(host: Host) -> None:
    directory, real = host.instances / "uuid", host.directory / "real"
    host.disk(real / "disk")
    host.disk_on_another(directory / "disk")
    python = shlex.join([sys.executable, "-c", VERIFY, str(host.instances)])
    inside = f"mount --bind {real} {directory} && exec {python}"
    # Both bases are too young at first.
    host.manager().verify_base_images([])
    for _turn in range(2):
        subprocess.run(["unshare", "--mount", "sh", "-c", inside], check=True)
        host.verify()
        assert host.base.exists()
        assert host.other_base.exists()


@needs_root
def test_a_base_that_is_mounted_itself_in_an_instance_directory_is_in_use(host: Host) -> None:
    kernel = host.instances / "uuid" / "kernel"
    kernel.parent.mkdir()
    kernel.touch()
    with mounted_file(kernel, host.base):
        assert host.keeps()
    assert host.keeps(), "what is mounted at a boot may not be mounted yet"
    host.manager().forget_disks(str(kernel))
    assert not host.keeps()


@pytest.mark.parametrize("named", ["instances", "tenant"])
def test_an_instance_named_as_a_directory_above_others_takes_nothing_with_it(host: Host, named: str) -> None:
    """Users name instances as they like: as a directory above the disk root, or as one above instances."""
    volume = host.directory / "volume"
    volume.mkdir()
    (host.instances / "tenant").mkdir()
    (host.instances / "tenant" / "uuid").symlink_to(volume)
    host.disk(host.instances / "tenant" / "uuid" / "disk")
    there = ic.Instance("uuid", "here")
    host.verify([there, ic.Instance("another", "here", directories=(named,))])
    volume.rename(host.directory / "elsewhere")
    assert host.keeps([there])


def test_an_instance_that_is_reported_by_another_uuid_takes_nothing_with_it(host: Host) -> None:
    """Such as after a driver was changed, which reported names or capitals before."""
    volume = host.directory / "volume"
    volume.mkdir()
    (host.instances / "web").symlink_to(volume)
    host.disk(host.instances / "web" / "disk")
    host.verify([ic.Instance("web", "here")])
    volume.rename(host.directory / "elsewhere")
    assert host.keeps([ic.Instance("uuid", "here", directories=("web",))])
    assert not host.keeps([ic.Instance("uuid", "here")])


def test_an_instance_whose_uuid_is_reported_in_capitals_takes_nothing_with_it(host: Host) -> None:
    """It was reported in small letters before."""
    volume = host.directory / "volume"
    volume.mkdir()
    (host.instances / UUID).symlink_to(volume)
    host.disk(host.instances / UUID / "disk")
    host.verify([ic.Instance(UUID, "here")])
    volume.rename(host.directory / "elsewhere")
    assert host.keeps([ic.Instance(UUID.upper(), "here")])
    assert not host.keeps([ic.Instance("another", "here")])


def test_an_image_that_is_reported_in_capitals_is_in_use(host: Host) -> None:
    assert host.keeps([ic.Instance(UUID, "elsewhere", (ID.upper(),))])


def test_a_root_that_is_another_directory_of_the_same_filesystem_is_no_deletion(host: Host) -> None:
    root = host.directory / "root"
    root.mkdir()
    host.disk(root / "uuid" / "disk")
    host.verify(disk_roots=(str(root),))
    root.rename(host.directory / "root.real")
    root.mkdir()
    assert host.keeps(disk_roots=(str(root),))


def test_a_root_that_the_configuration_no_longer_names_is_read_all_the_same(host: Host) -> None:
    other = host.directory / "other"
    other.mkdir()
    disk = host.disk(host.instances / "uuid" / "disk")
    host.verify()
    assert host.keeps(disk_roots=(str(other),))
    disk.unlink()
    host.verify(disk_roots=(str(other),))
    assert not host.base.exists(), "a root without disks is forgotten"


def test_a_root_that_the_configuration_no_longer_names_and_that_is_gone_keeps_its_disks(host: Host) -> None:
    other = host.directory / "other"
    host.disk(other / "uuid" / "disk")
    host.verify(disk_roots=(str(host.instances), str(other)))
    other.rename(host.directory / "unmounted")
    assert host.keeps()


def test_two_processes_with_different_roots_do_not_blind_each_other(host: Host) -> None:
    other = host.directory / "other"
    host.disk(other / "uuid" / "disk")
    host.verify(disk_roots=(str(host.instances), str(other)))
    with pytest.raises(errors.BackendError, match="other/uuid/disk"):
        host.manager().evict_image(ID)
    host.verify()
    other.rename(host.directory / "unmounted")
    assert host.keeps()


@needs_root
def test_a_root_that_no_pass_has_read_and_that_is_not_mounted_any_more_is_no_deletion(host: Host) -> None:
    root = host.directory / "root"
    with mounted(root):
        host.manager(disk_roots=(str(root),)).create_disk(ID, str(root / "disk"))
    assert host.keeps()
    with pytest.raises(errors.BaseInUseError, match="not the directory in which"):
        host.manager().evict_image(ID)
    host.manager().forget_disks(str(root))
    assert not host.keeps()


@needs_root
@pytest.mark.parametrize("kind", ["volume", "bind mount", "link"])
def test_a_volume_below_a_root_that_no_pass_has_read_is_no_deletion(host: Host, kind: str) -> None:
    volume = host.directory / "elsewhere" if kind == "link" else host.instances / "uuid"
    source = [host.directory / "real"] if kind == "bind mount" else []
    for each in source:
        each.mkdir()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted(volume, *source))
        if kind == "link":
            (host.instances / "uuid").symlink_to(volume)
        host.manager().create_disk(ID, str(host.instances / "uuid" / "disk"))
    assert host.keeps()
    assert f"at {volume} is not what was mounted there" in host.verify().problems[0]
    with pytest.raises(errors.BaseInUseError, match="mounted there"):
        host.manager().evict_image(ID)
    host.manager().forget_disks(str(volume))
    assert not host.keeps()


@needs_root
def test_a_volume_below_a_root_that_is_mounted_again_stops_nothing(host: Host) -> None:
    real, where = host.directory / "real", host.instances / "uuid"
    real.mkdir()
    with mounted(where, real):
        disk = host.manager().create_disk(ID, str(where / "disk"))
    assert host.keeps()
    with mounted(where, real):
        assert host.verify().problems == ()
        assert host.base.exists()
        os.unlink(disk.target)
        assert not host.keeps()


@needs_root
def test_a_mount_namespace_that_lacks_a_volume_below_a_root_deletes_nothing(host: Host) -> None:
    """A process there makes the passes, and none of them has ever seen the disk."""
    where = host.instances / "uuid"
    with mounted(where):
        host.manager().create_disk(ID, str(where / "disk"))
        files.age(host.base, host.private / "records" / f"{NAME}.json", seconds=OLD)
        program = (
            "import sys, imagecache_lib as ic;"
            "ic.ImageCacheManager(ic.CacheConfig(instances_path=sys.argv[1]), ic.FileSource({}),"
            " host=ic.System(name='here')).verify_base_images([])"
        )
        python = [sys.executable, "-c", program, str(host.instances)]
        lacking = ["sh", "-c", 'umount "$0" && exec "$@"', str(where), *python]
        subprocess.run(["unshare", "-m", *lacking], check=True)
    assert host.base.exists()


@needs_root
def test_a_filesystem_that_keeps_no_births_is_asked_each_time_which_one_it_is(tmp_path: pathlib.Path) -> None:
    """Its device's number may have been another's, whose top had the same inode."""
    with stale_names.mounted(tmp_path, 1, seconds=0) as (mount,):
        now = identity_now(str(mount), None)
        assert now.born == 0
        assert identity_now(str(mount), dataclasses.replace(now, fsid=now.fsid + 1)) == now


@needs_root
def test_what_fsck_put_aside_is_no_deletion(host: Host) -> None:
    """A lost+found is root's, and the service's user cannot look into it."""
    with contextlib.ExitStack() as stack:
        os.chmod(host.directory, 0o755)
        host.disk(host.instances / "uuid" / "disk")
        give_to(host.instances, 65534)
        stack.enter_context(open_to_others(host.directory))
        assert as_user(65534, lambda: host.verify() is not None and host.base.exists())
        (host.instances / "lost+found").mkdir(mode=0o700)
        (host.instances / "uuid").rename(host.instances / "lost+found" / "#12")
        assert as_user(65534, host.keeps)


@contextlib.contextmanager
def open_to_others(directory: pathlib.Path) -> Iterator[None]:
    """Let other users reach what is below a directory of pytest's."""
    closed = {above: above.stat().st_mode & 0o7777 for above in directory.parents if above.stat().st_uid == 0}
    opened = [above for above, mode in closed.items() if mode & 0o005 != 0o005]
    for above in opened:
        above.chmod(closed[above] | 0o055)
    try:
        yield
    finally:
        for above in opened:
            above.chmod(closed[above])


def give_to(directory: pathlib.Path, user: int) -> None:
    for parent, directories, names in os.walk(directory):
        for name in (".", *directories, *names):
            os.chown(os.path.join(parent, name), user, user)


def as_user(user: int, function: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            code = 0 if function() else 1
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1), "the child failed"
    return status == 0


# -- what proves that it was removed ------------------------------------------------------------------


def test_a_disk_that_is_gone_from_the_same_directory_was_removed(host: Host) -> None:
    disk = host.disk(host.instances / "uuid" / "disk")
    host.verify()
    disk.unlink()
    assert not host.keeps()


def test_a_link_that_was_removed_is_a_deletion(host: Host) -> None:
    disk, other = host.instances / "uuid" / "disk", host.directory / "other"
    disk.parent.mkdir()
    disk.symlink_to(host.disk(other / "disk"))
    host.verify()
    disk.unlink()
    assert not host.keeps()


def test_an_instance_directory_that_is_gone_was_removed(host: Host) -> None:
    host.disk(host.instances / "pool" / "uuid" / "disk")
    host.verify()
    shutil.rmtree(host.instances / "pool")
    assert not host.keeps()


def test_a_rebuild_proves_that_the_former_disk_was_removed(host: Host) -> None:
    host.disk(host.instances / "uuid" / "disk")
    host.verify()
    shutil.rmtree(host.instances / "uuid")
    (host.instances / "uuid").mkdir()
    (host.instances / "uuid" / "disk").write_bytes(bytes(4096))
    assert not host.keeps()


def test_an_evacuation_and_the_way_back_prove_that_the_former_disk_was_removed(host: Host) -> None:
    host.disk(host.instances / "uuid" / "disk")
    host.verify([ic.Instance("uuid", "here")])
    shutil.rmtree(host.instances / "uuid")
    host.verify([ic.Instance("uuid", "there")])
    (host.instances / "uuid").mkdir()
    assert not host.keeps([ic.Instance("uuid", "here")])


def test_a_resize_and_the_way_back_leave_one_disk_remembered(host: Host) -> None:
    host.disk(host.instances / "uuid" / "disk")
    host.verify()
    (host.instances / "uuid").rename(host.instances / "uuid_resize")
    assert host.keeps(), "the disk is there under its directory's other name"
    (host.instances / "uuid_resize").rename(host.instances / "uuid")
    host.verify()
    shutil.rmtree(host.instances / "uuid")
    assert not host.keeps()


@needs_root
def test_an_instance_that_left_the_report_proves_that_its_volume_is_not_wanted(host: Host) -> None:
    with mounted(host.instances / "uuid"):
        host.disk(host.instances / "uuid" / "disk")
        host.verify([ic.Instance("uuid", "here")])
    assert host.keeps([ic.Instance("uuid", "here")])
    assert host.keeps(None)
    assert not host.keeps([ic.Instance("another", "there")])


@needs_root
def test_an_operator_says_that_a_volume_is_gone_for_good(host: Host) -> None:
    with mounted(host.instances / "uuid"):
        host.disk(host.instances / "uuid" / "disk")
        host.verify()
    assert host.manager().forget_disks(str(host.instances / "elsewhere")) == 0
    assert host.keeps()
    assert host.manager().forget_disks(str(host.instances / "uuid")) == 1
    assert not host.keeps()


def test_an_operator_says_that_a_root_was_replaced(host: Host) -> None:
    root = host.directory / "root"
    host.disk(root / "uuid" / "disk")
    roots = (str(host.instances), str(root))
    host.verify(disk_roots=roots)
    shutil.rmtree(root)
    root.mkdir()
    assert host.keeps(disk_roots=roots)
    host.manager(disk_roots=roots).forget_disks(str(root))
    assert not host.keeps(disk_roots=roots)


# -- what is kept on disk ------------------------------------------------------------------------------


def kept_file(host: Host, ending: str) -> pathlib.Path:
    (found,) = (host.private / "hosts").glob(f"*.{ending}")
    return found


@needs_root
def test_one_damaged_file_forgets_nothing(host: Host) -> None:
    for ending in ("scan", "readings"):
        with mounted(host.instances / "uuid"):
            host.disk(host.instances / "uuid" / "disk")
            host.verify()
        kept_file(host, ending).write_bytes(b"{")
        assert host.keeps(), ending


@needs_root
def test_everything_stays_while_all_that_was_seen_is_damaged(host: Host) -> None:
    with mounted(host.instances / "uuid"):
        host.disk(host.instances / "uuid" / "disk")
        host.verify()
    for ending in ("scan", "readings"):
        kept_file(host, ending).write_bytes(b"{")
    assert host.keeps()
    report = host.verify()
    assert str(kept_file(host, "scan")) in report.problems[0]
    for ending in ("scan", "readings"):
        kept_file(host, ending).unlink()
    host.verify()
    assert not host.base.exists(), "an operator who removes them says that nothing is missing"


@needs_root
def test_what_only_the_release_before_saw_counts(host: Host) -> None:
    host.verify([])
    host.manager().cache_image(ID)
    missing = str(host.instances / "uuid" / "disk")
    kept_file(host, "readings").write_text(json.dumps({missing: [NAME]}))
    assert host.keeps()
    host.manager().forget_disks(missing)
    assert not host.keeps()


@needs_root
def test_the_release_before_is_told_of_disks_that_are_not_to_be_seen_now(host: Host) -> None:
    with mounted(host.instances / "uuid"):
        disk = host.disk(host.instances / "uuid" / "disk")
        host.verify()
    host.verify()
    told = json.loads(kept_file(host, "readings").read_text())
    assert told == {"": [], str(disk): [NAME]}  # the empty path says who wrote it


@needs_root
def test_a_base_that_is_mounted_on_a_disk_is_never_grown(host: Host) -> None:
    disk = host.instances / "uuid" / "disk"
    disk.parent.mkdir()
    disk.touch()
    before = host.base.read_bytes()
    with mounted_file(disk, host.base):
        manager = host.manager()
        with pytest.raises(errors.BackendError, match="file of the cache"):
            manager.resize_disk(ic.Disk(str(disk), "raw", len(before)), 8 * len(before))
        with pytest.raises(errors.BackendError, match="file of the cache"):
            manager.create_disk(ID, str(disk), size=8 * len(before), if_exists="reuse", backend="raw")
    assert host.base.read_bytes() == before
