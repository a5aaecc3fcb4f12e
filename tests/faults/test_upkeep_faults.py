# SPDX-License-Identifier: Apache-2.0
"""The periodic pass where something is unmounted, unreadable, another user's, open in QEMU, or full.

Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.store import layout, trash
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.testing.sources import FakeSource
from imagecache_lib.upkeep.follow import CannotTell, Follower, Looked
from imagecache_lib.upkeep.report import VerifyReport
from tests.lab import filesystems, stale_names
from tests.support import files, needs, recorded_calls, stopping
from tests.support.cache_case import ID

NAME = layout.base_name(ID)
NOBODY = 65534
OLD = 2 * 86400


class Cache:
    """A cache with one base that nobody has used for two days."""

    def __init__(self, instances: pathlib.Path) -> None:
        self.instances = instances
        self.base = instances / "_base" / NAME
        self.trash = instances / "_base" / ".imagecache" / "trash"

    def manager(self, **options: object) -> ic.ImageCacheManager:
        config = ic.CacheConfig(instances_path=str(self.instances), **options)  # type: ignore[arg-type]
        return ic.ImageCacheManager(
            config, FakeSource({ID: b"x" * 65536}), host=ic.System(name="here"), observers=()
        )

    def fill(self, **options: object) -> None:
        self.manager(**options).cache_image(ID)
        self.grow_old()

    def grow_old(self) -> None:
        record = self.base.parent / ".imagecache" / "records" / f"{NAME}.json"
        files.age(self.base, record, seconds=OLD)

    def verify(self, **options: object) -> VerifyReport:
        return self.manager(**options).verify_base_images([])

    def overlay(self, path: pathlib.Path) -> None:
        files.overlay(path, self.base)


@pytest.fixture(autouse=True)
def as_root() -> None:
    needs.root()


@pytest.fixture
def cache() -> Iterator[Cache]:
    # Not below pytest's own directory, which is closed to others.
    with tempfile.TemporaryDirectory(prefix="imagecache-") as directory:
        os.chmod(directory, 0o755)
        instances = pathlib.Path(directory) / "instances"
        instances.mkdir()
        found = Cache(instances)
        found.fill()
        yield found


@contextlib.contextmanager
def mounted(where: pathlib.Path, size: str = "8M", more: str = "") -> Iterator[None]:
    where.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{more}", "tmpfs", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


def fill_up(directory: pathlib.Path) -> None:
    with contextlib.suppress(OSError), open(directory / "filler", "wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()


def as_nobody(function: Callable[[], bool]) -> bool:
    """Run in a child that is nobody, which root's rights would blind to modes and owners."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = 0 if function() else 1
        except BaseException as error:
            print(error, file=sys.stderr)  # noqa: T201  # a forked child has no other way to say it
        finally:
            os._exit(code)
    _pid, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1), "the child failed"
    return os.waitstatus_to_exitcode(status) == 0


def give_to_nobody(path: pathlib.Path) -> None:
    for parent, directories, names in os.walk(path):
        for name in (".", *directories, *names):
            os.chown(os.path.join(parent, name), NOBODY, NOBODY)


def test_an_unmounted_disk_root_keeps_everything(cache: Cache, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "disks"
    roots = (str(cache.instances), str(root))
    with mounted(root):
        cache.overlay(root / "uuid" / "disk")
        cache.verify(disk_roots=roots)
        assert cache.base.exists()
    for _pass in range(2):
        cache.grow_old()
        report = cache.verify(disk_roots=roots)
        assert cache.base.exists()
        assert "another device" in report.problems[0]
    root.rmdir()
    cache.verify(disk_roots=roots)
    root.mkdir()
    cache.verify(disk_roots=roots)
    assert cache.base.exists(), "a mount point that was gone for a while is no other root"
    with mounted(root):
        cache.overlay(root / "uuid" / "disk")
        cache.grow_old()
        assert cache.verify(disk_roots=roots).problems == (), "the right disks vouch for a new device"
        assert cache.base.exists()


def test_an_unreadable_disk_keeps_what_it_is_known_to_need_or_else_everything(cache: Cache) -> None:
    disk = cache.instances / "uuid" / "disk"
    cache.overlay(disk)
    give_to_nobody(cache.instances)

    def kept_with(word: str) -> bool:
        report = cache.verify()
        return cache.base.exists() and word in " ".join(report.problems)

    os.chown(disk, 0, 0)
    disk.chmod(0o600)
    assert as_nobody(lambda: kept_with("Nothing is evicted")), "never read before: everything stays"
    disk.chmod(0o644)
    assert as_nobody(lambda: kept_with(""))
    disk.chmod(0o600)
    cache.grow_old()
    assert as_nobody(lambda: kept_with("what it referred to before stays"))


def test_lost_and_found_stops_nothing(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    lost = cache.instances / "lost+found"
    lost.mkdir(mode=0o700)
    assert as_nobody(lambda: cache.verify().problems == () and not cache.base.exists())


def test_a_base_that_libvirt_gave_to_qemu_can_be_put_back(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    os.chown(cache.base, 12345, 12345)
    inode = cache.base.stat().st_ino
    made = cache.instances.parent / "made"
    cache.overlay(made)
    made.chmod(0o644)
    os.chown(made, NOBODY, NOBODY)

    def appear(point: str) -> None:
        if point == "evict:renamed":
            (cache.instances / "uuid").mkdir()
            shutil.copy(made, cache.instances / "uuid" / "disk")

    def survive() -> bool:
        manager = ic.ImageCacheManager(
            ic.CacheConfig(instances_path=str(cache.instances)),
            FakeSource({}),
            host=ic.System(name="here", trace=appear),
            observers=(),
        )
        manager.verify_base_images([])
        return cache.base.stat().st_ino == inode and list(cache.trash.iterdir()) == []

    assert as_nobody(survive)


def test_what_a_killed_publisher_left_goes_though_libvirt_gave_the_base_to_qemu(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    stage = cache.base.parent / ".imagecache" / "stage" / ("0" * 32)
    os.link(cache.base, stage)
    os.chown(cache.base, 12345, 12345)
    assert as_nobody(lambda: cache.verify() is not None and not stage.exists() and not cache.base.exists())


def test_a_base_that_a_qemu_has_open_stays(cache: Cache) -> None:
    command = ["qemu-io", "-r", "-f", "raw", str(cache.base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None
        qemu.stdin.write(b"read 0 512\n")
        qemu.stdin.flush()
        assert b"read 512/512" in qemu.stdout.readline()
        report = cache.verify()
        assert cache.base.exists()
        assert [base.reason for base in report.bases] == ["open in a running QEMU"]
        qemu.communicate(b"quit\n")
    cache.grow_old()
    cache.verify()
    assert not cache.base.exists()


def test_a_full_filesystem_can_still_be_evicted_from(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path / "instances", "1M"):
        cache = Cache(tmp_path / "instances")
        cache.fill()
        fill_up(cache.instances)
        report = cache.verify()
        assert [base.name for base in report.evicted] == [NAME]


def test_a_filesystem_without_inodes_serves_what_it_has_and_can_be_evicted_from(
    tmp_path: pathlib.Path,
) -> None:
    with mounted(tmp_path / "instances", more=",nr_inodes=100"):
        cache = Cache(tmp_path / "instances")
        cache.fill()
        (cache.instances / "locks" / f"nova-{NAME}").unlink()
        with contextlib.suppress(OSError):
            for number in range(100):
                (cache.instances / f"filler-{number}").touch()
        with cache.manager().fetch_or_reuse(ID) as base:
            assert base.path == str(cache.base)
        cache.grow_old()
        report = cache.verify()
        assert [base.name for base in report.evicted] == [NAME]


def test_on_a_full_shared_filesystem_goes_what_the_other_host_has_cleared(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path / "instances"):
        config = ic.CacheConfig(
            instances_path=str(tmp_path / "instances"), remove_unused_original_minimum_age_seconds=0
        )
        source = FakeSource({"one": b"1" * 65536})

        def host(name: str) -> ic.ImageCacheManager:
            return ic.ImageCacheManager(config, source, host=ic.System(name=name), observers=())

        host("there").verify_base_images([])
        host("here").cache_image("one")
        assert not host("here").verify_base_images([]).evicted
        fill_up(tmp_path / "instances")
        report = host("there").verify_base_images([])
        assert [base.name for base in report.evicted] == [layout.base_name("one")]


def test_a_console_log_of_root_s_stops_nothing(cache: Cache) -> None:
    directory = cache.instances / "uuid"
    directory.mkdir()
    give_to_nobody(cache.instances)
    for name in ("console.log", "console.log.0", "disk.config"):
        (directory / name).write_bytes(b"login:" * 100)
        (directory / name).chmod(0o600)
    assert as_nobody(lambda: cache.verify().problems == () and not cache.base.exists())


def test_an_unreadable_file_of_a_reported_instance_keeps_its_images_and_no_others(cache: Cache) -> None:
    disk = cache.instances / "uuid" / "disk"
    cache.overlay(disk)
    give_to_nobody(cache.instances)
    os.chown(disk, 0, 0)
    disk.chmod(0o600)

    def kept(*images: str) -> bool:
        report = cache.manager().verify_base_images([ic.Instance("uuid", "here", images=images)])
        return cache.base.exists() and f"{disk} cannot be read" in report.problems[0]

    assert as_nobody(lambda: kept(ID))
    cache.grow_old()
    assert as_nobody(kept), "a driver that tells nothing of it does not say that it has no image"
    assert as_nobody(lambda: kept("")), "nor does one that passes on an empty image_ref"
    assert not as_nobody(lambda: kept("another"))


def test_a_directory_of_another_service_stops_nothing(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    (cache.instances / "service").mkdir(mode=0o700)
    assert as_nobody(lambda: len(cache.verify().problems) == 1 and not cache.base.exists())


def test_a_closed_directory_that_may_be_an_instance_s_keeps_everything(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    (cache.instances / "11111111-2222-4333-8444-555555555555").mkdir(mode=0o700)
    assert as_nobody(lambda: "Nothing is evicted" in cache.verify().problems[0] and cache.base.exists())


@contextlib.contextmanager
def append_only(directory: pathlib.Path) -> Iterator[None]:
    """Let no name in a directory be changed or removed during the body."""
    chattr = needs.program("chattr")
    if subprocess.run([chattr, "+a", directory], stderr=subprocess.DEVNULL, check=False).returncode:
        needs.lack("files have no attributes here, or may not be given any")
    try:
        yield
    finally:
        subprocess.run([chattr, "-a", directory], check=True)


@pytest.mark.parametrize("which", ["hosts", "records", "stage"])
def test_what_may_not_be_removed_again_is_not_made(cache: Cache, which: str) -> None:
    cache.manager().evict_image(ID)
    directory = cache.instances / "_base" / ".imagecache" / which
    before = sorted(os.listdir(directory))
    with append_only(directory):
        for _try in range(2):
            if which == "hosts":
                (problem,) = cache.verify().problems
                assert f"{directory}/" in problem
                assert "append-only" in problem
            elif not cache.base.exists():
                with pytest.raises(errors.BackendError, match=f"append-only.*{directory}/.*chattr -a"):
                    cache.manager().cache_image(ID)
        assert [name for name in os.listdir(directory) if name not in before] == []
    cache.manager().cache_image(ID)
    assert cache.verify().problems == ()


def test_what_stays_where_nothing_can_be_removed_stays_once(cache: Cache) -> None:
    instance = cache.instances / "append-only"
    instance.mkdir()
    target = str(instance / "disk")
    with append_only(instance):
        for _try in range(3):
            with pytest.raises(errors.BackendError, match=f"append-only.*{instance}/disk.*chattr -a"):
                cache.manager().create_disk(ID, target)
            assert len(os.listdir(instance)) == 2  # of the first try: its disk, and its disk.info
    cache.manager().create_disk(ID, target)


def test_a_note_that_cannot_be_read_stops_no_call(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    note = cache.base.parent / ".imagecache" / "stage" / f"{'0' * 32}.json"
    note.write_text("{}")
    note.chmod(0o600)

    def go_on() -> bool:
        manager = cache.manager()
        hit = manager.cache_image(ID) is ic.CacheResult.EXISTING
        cache.grow_old()
        manager.verify_base_images([])
        return hit and not cache.base.exists() and manager.cache_image(ID) is ic.CacheResult.CACHED

    assert as_nobody(go_on)


def test_the_note_of_an_image_in_flight_that_cannot_be_read_may_be_of_any_base(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    stage = cache.base.parent / ".imagecache" / "stage" / ("0" * 32)
    stage.write_bytes(b"")
    note = stage.with_suffix(".json")
    note.write_text("{}")
    note.chmod(0o600)
    assert as_nobody(lambda: cache.verify() is not None and cache.base.exists())


def test_a_pin_that_cannot_be_read_keeps_its_base_and_stops_nothing(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    pin = cache.base.parent / ".imagecache" / "pins" / f"{NAME}.json"
    pin.write_text("{}")
    pin.chmod(0o600)

    def kept() -> bool:
        manager = cache.manager()
        report = manager.verify_base_images([])
        listed = [base.name for base in manager.list_bases()] == [NAME]
        return listed and str(pin) in report.bases[0].reason

    assert as_nobody(kept)


def test_what_is_closed_in_the_caches_own_filesystem_is_not_counted(cache: Cache) -> None:
    give_to_nobody(cache.instances)
    for name in ("lost+found", "backup"):
        (cache.base.parent / name).mkdir(mode=0o700)
    assert as_nobody(lambda: cache.manager().get_space().used > 0 and cache.manager().get_disk_usage() > 0)


def test_a_disk_that_is_a_block_device_node_counts(cache: Cache, tmp_path: pathlib.Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * 2**20))
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        cache.overlay(pathlib.Path(device))
        (cache.instances / "uuid").mkdir()
        os.mknod(cache.instances / "uuid" / "disk", 0o660 | stat.S_IFBLK, os.stat(device).st_rdev)
        cache.verify()
        assert cache.base.exists()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_what_a_block_device_lies_on_counts_though_it_may_not_be_opened(cache: Cache) -> None:
    with filesystems.loop_attached(cache.base, "--read-only") as device:
        os.chmod(device, 0o600)
        files.overlay(cache.instances / "uuid" / "disk", device)
        give_to_nobody(cache.instances)
        assert as_nobody(lambda: cache.verify() is not None and cache.base.exists())


def test_a_block_device_that_does_not_answer_holds_up_no_pass(cache: Cache, tmp_path: pathlib.Path) -> None:
    """As multipath's does that has lost all paths. Here a loop device is on a file whose server stops."""
    with contextlib.ExitStack() as stack:
        (mount,) = stack.enter_context(stale_names.mounted(tmp_path, 1, seconds=1.0))
        cache.overlay(tmp_path / "served" / "image")
        command = ["losetup", "--find", "--show", str(mount / "image")]
        device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
        image = os.open(mount / "image", os.O_RDONLY)
        stack.callback(os.close, image)
        (cache.instances / "uuid").mkdir()
        (cache.instances / "uuid" / "disk").symlink_to(device)
        cache.verify()
        assert cache.base.exists()
        (server,) = stale_names.servers_of(mount)
        subprocess.run(["blockdev", "--flushbufs", device], check=True)
        os.posix_fadvise(image, 0, 0, os.POSIX_FADV_DONTNEED)
        stopping.stop(server)
        stack.callback(os.kill, server, signal.SIGCONT)
        begun = time.monotonic()
        cache.grow_old()
        (base,) = cache.verify().bases
        assert f"used by the disk {cache.instances}/uuid/disk" in base.reason, base
        assert time.monotonic() - begun < 60


@contextlib.contextmanager
def mount_that_does_not_answer(hung: pathlib.Path) -> Iterator[None]:
    """Mount something at a path, for the body, of which every question is left open."""
    hung.mkdir()
    connection = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={connection},rootmode=40000,user_id=0,group_id=0".encode()
    try:
        if libc.mount(b"hung", os.fsencode(hung), b"fuse", 0, options):
            pytest.skip(f"no FUSE here: {os.strerror(ctypes.get_errno())}")
        yield
    finally:
        os.close(connection)  # which ends whoever waits for an answer
        libc.umount2(os.fsencode(hung), 2)


def test_what_does_not_answer_hides_no_file_on_another_filesystem(tmp_path: pathlib.Path) -> None:
    """A guest that names it in its disk would have another guest's disk lose its base."""
    with mount_that_does_not_answer(hung := tmp_path / "hung"):
        follower = Follower(0.2)
        files.overlay(between := tmp_path / "between", "/base")
        for name in ("x", "y"):
            assert isinstance(follower.look(str(hung / name)), CannotTell)
        assert isinstance(follower.look(str(between)), Looked)


def test_a_path_in_a_header_that_does_not_answer_stops_no_pass(cache: Cache, tmp_path: pathlib.Path) -> None:
    """A guest may have written it into its raw disk."""
    with mount_that_does_not_answer(hung := tmp_path / "hung"):
        for instance in ("one", "two"):
            disk = cache.instances / instance / "disk"
            disk.parent.mkdir()
            names = ["-F", "raw", "-b", str(hung / "x"), str(disk), "1M"]
            subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *names], check=True)
        begun = time.monotonic()
        cache.verify()
        assert not cache.base.exists()
        assert time.monotonic() - begun < 60


def test_a_disk_root_that_does_not_answer_keeps_everything_and_holds_up_neither_pass_nor_spawn(
    cache: Cache, tmp_path: pathlib.Path
) -> None:
    with mount_that_does_not_answer(hung := tmp_path / "hung"):
        begun = time.monotonic()
        (cache.instances / "uuid").mkdir()
        manager = cache.manager(disk_roots=(str(hung), str(cache.instances)))
        manager.remove_disk(manager.create_disk(ID, str(cache.instances / "uuid" / "disk")))
        cache.grow_old()
        report = cache.verify(disk_roots=(str(cache.instances), str(hung)))
        assert f"{hung} cannot be read (it does not answer)" in report.problems[0]
        assert cache.base.exists()
        assert time.monotonic() - begun < 90
    cache.verify(disk_roots=(str(cache.instances), str(hung)))
    assert not cache.base.exists()


def test_a_mount_below_a_disk_root_that_does_not_answer_holds_up_no_pass(cache: Cache) -> None:
    (cache.instances / "two").mkdir()
    with mount_that_does_not_answer(hung := cache.instances / "one"):
        (cache.instances / "two" / "disk").symlink_to(hung / "disk")
        begun = time.monotonic()
        instances = [ic.Instance(name, "here", images=("another",)) for name in ("one", "two")]
        told = cache.manager().verify_base_images(instances).problems
        for path in (hung, cache.instances / "two" / "disk"):
            assert any(f"{path} cannot be read (it does not answer)" in problem for problem in told), told
        assert not cache.base.exists()
        assert time.monotonic() - begun < 60


def test_a_note_of_a_file_on_a_mount_that_does_not_answer_holds_up_no_start(
    cache: Cache, tmp_path: pathlib.Path
) -> None:
    made = "ab" * 16
    note = cache.base.parent / ".imagecache" / "stage" / f"{made}.outside"
    with mount_that_does_not_answer(hung := tmp_path / "hung"):
        note.write_text(str(hung / f".kernel.{made}.new"))
        files.age(note, seconds=OLD)
        cache.verify()
        assert not cache.base.exists()
        assert note.exists()
    cache.verify()
    assert not note.exists()


@pytest.mark.parametrize("inode_size", ["128", "256"])
def test_a_rename_below_the_first_level_hides_no_disk(tmp_path: pathlib.Path, inode_size: str) -> None:
    """With inodes of 128 bytes ext4 counts whole seconds, so that a second change in one leaves no trace."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-I", inode_size, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        for attempt in range(4):  # the order of a listing is the filesystem's
            cache = Cache(mount / f"instances-{attempt}")
            cache.instances.mkdir()
            rename_while_reading(cache, f"uuid-{attempt}")
    finally:
        subprocess.run(["umount", mount], check=True)


def rename_while_reading(cache: Cache, name: str) -> None:
    """Make a disk between the two readings, and give its directory another name within the second."""
    cache.fill()
    pool = cache.instances / "pool"
    for marker in ("aaa", "zzz"):
        (pool / marker).mkdir(parents=True)
        (pool / marker / f".x.{'0' * 32}.new").write_bytes(b"")
    seen: list[str] = []
    made = cache.instances.parent / "made"
    cache.overlay(made)

    def trace(point: str) -> None:
        seen.append(point)
        if point == "verify:read":
            (pool / name).mkdir()
            shutil.copy(made, pool / name / "disk")
        elif point == "references:unfinished" and "evict:renamed" in seen and (pool / name).exists():
            (pool / name).rename(pool / f"{name}_resize")

    config = ic.CacheConfig(instances_path=str(cache.instances))
    host = ic.System(name="here", trace=trace)
    ic.ImageCacheManager(config, FakeSource({}), host=host, observers=()).verify_base_images([])
    assert cache.base.exists()


def failing(call: str, error: str, path: pathlib.Path, function: Callable[[], object]) -> None:
    """Run a function in a child in which a system call on a path fails each time."""
    options = ["-o", os.devnull, "-e", "signal=none", "-P", str(path), "-e", f"trace={call}"]
    status = recorded_calls.attached(function, [*options, "-e", f"inject={call}:error={error}"])
    assert status == 0


def test_a_damaged_inode_in_the_cache_stops_nothing_else(cache: Cache) -> None:
    damaged = cache.base.with_name("ab" * 20)
    damaged.write_bytes(b"")

    def verify() -> None:
        (told,) = cache.verify().problems
        assert f"{damaged} cannot be looked at (Structure needs cleaning)" in told, told

    failing("newfstatat", "EUCLEAN", damaged, verify)
    assert not cache.base.exists()
    assert damaged.exists()


def test_an_entry_of_the_trash_that_cannot_be_looked_at_stops_nothing_else(cache: Cache) -> None:
    entry = cache.trash / f"{'ab' * 20}.{'0' * 32}"
    entry.mkdir()
    (entry / "base").write_bytes(b"x")
    failing("newfstatat", "EIO", entry / "base", cache.verify)
    assert not cache.base.exists()
    assert (entry / "base").exists()


def test_a_base_in_the_trash_that_cannot_be_looked_at_is_not_fetched_over(cache: Cache) -> None:
    entry = cache.trash / f"{NAME}.{'0' * 32}"
    entry.mkdir()
    os.rename(cache.base, entry / "base")

    def fetch() -> None:
        with pytest.raises(ic.BackendError):
            cache.manager().cache_image(ID)

    failing("newfstatat", "EIO", entry / "base", fetch)
    assert not cache.base.exists()
    cache.manager().cache_image(ID)
    assert not entry.exists()


def test_a_directory_of_pins_that_cannot_be_read_keeps_its_base_and_stops_nothing(cache: Cache) -> None:
    cache.manager().pin(ID, owner="me")
    pins = cache.base.parent / ".imagecache" / "pins" / NAME

    def verify() -> None:
        (base,) = cache.verify().bases
        assert "its pins cannot be read" in base.reason, base

    failing("openat", "EIO", pins, verify)
    assert cache.base.exists()


def test_a_disk_that_is_named_as_a_log_counts_when_it_cannot_be_read_any_more(cache: Cache) -> None:
    disk = cache.instances / "guest" / "redo.log"
    cache.overlay(disk)
    give_to_nobody(cache.instances)

    def survives() -> bool:
        cache.verify()
        return cache.base.exists()

    assert as_nobody(survives)
    os.chown(disk, 0, 0)
    disk.chmod(0o600)
    for _pass in range(2):
        cache.grow_old()
        assert as_nobody(survives)


@pytest.mark.parametrize("lost", [False, True], ids=["alone", "another process is faster"])
def test_a_base_is_put_back_where_nothing_can_be_linked(cache: Cache, lost: bool) -> None:
    """On a filesystem that can neither link nor rename without replacing, as some are."""
    entry = trash.TrashEntry(NAME, str(cache.trash / f"{NAME}.{'0' * 32}"))
    os.mkdir(entry.directory)
    os.rename(cache.base, entry.path)
    config = ic.CacheConfig(instances_path=str(cache.instances))

    def restore() -> None:
        assert trash.restore(CacheStore(config, ic.System(name="here")), entry) is not lost

    options = ["-o", os.devnull, "-e", "signal=none", "-e", "trace=link,linkat,rename,renameat2"]
    options += ["-e", "inject=link,linkat:error=EPERM", "-e", "inject=renameat2:error=EINVAL"]
    options += ["-e", "inject=rename:error=ENOENT"] if lost else []
    assert recorded_calls.attached(restore, options) == 0
    assert cache.base.exists() is not lost
    assert os.path.exists(entry.directory) is lost
