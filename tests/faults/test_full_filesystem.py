# SPDX-License-Identifier: Apache-2.0
"""A real filesystem of 64 MiB: fetches beside each other and beside other writers never fill it. As root."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.formats import vdi, vhd, vhdx
from imagecache_lib.formats.reader import Prefix
from imagecache_lib.store import layout, reservations
from imagecache_lib.system.host import System
from imagecache_lib.testing.sources import FakeSource
from tests.lab import filesystems
from tests.support import files, qcow2_images
from tests.support.cache_case import Points, Running

MIB = 2**20
IMAGE_SIZE = 10 * MIB
IDS = [f"image-{number}" for number in range(9)]
#: Longer than any floor age here.
AGED = 90_000


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return {image_id: os.urandom(IMAGE_SIZE) for image_id in IDS}


@pytest.fixture(params=["one filesystem", "a mount of its own"])
def instances(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The instances directory: all of it on the small filesystem, or only the cache."""
    with filesystems.loop_mounted(tmp_path, 64 * MIB, ["mkfs.ext4", "-q", "-m", "0"]) as mount_point:
        if request.param == "one filesystem":
            yield mount_point
            return
        cache = tmp_path / "instances" / "_base"
        cache.mkdir(parents=True)
        subprocess.run(["mount", "--bind", mount_point, cache], check=True)
        try:
            yield cache.parent
        finally:
            subprocess.run(["umount", cache], check=True)


@pytest.fixture
def points() -> Points:
    return Points()


@pytest.fixture
def happened() -> list[events.Event]:
    return []


@pytest.fixture
def make(
    instances: pathlib.Path, images: dict[str, bytes], points: Points, happened: list[events.Event]
) -> Callable[..., ic.ImageCacheManager]:
    def manager(
        source: ic.ImageSource | None = None, *, host: System | None = None, **options: object
    ) -> ic.ImageCacheManager:
        config = ic.CacheConfig(instances_path=str(instances), num_retries=0, **options)  # type: ignore[arg-type]
        return ic.ImageCacheManager(
            config,
            source or FakeSource(images),
            host=host or System(trace=points),
            observers=[happened.append],
        )

    return manager


def free(instances: pathlib.Path) -> int:
    found = os.statvfs(instances / "_base")
    return found.f_bavail * found.f_frsize


def base(instances: pathlib.Path, image_id: str) -> pathlib.Path:
    return instances / "_base" / layout.base_name(image_id)


def age_base(instances: pathlib.Path, image_id: str, seconds: float) -> None:
    """Let a base look as if it was last used so long ago."""
    record = instances / "_base" / ".imagecache" / "records" / f"{layout.base_name(image_id)}.json"
    files.age(base(instances, image_id), record, seconds=seconds)


def test_as_many_fetches_succeed_as_there_is_room_for_and_the_rest_fail_at_once(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    make().get_space()
    before = free(instances)
    room_for = (before - len(IDS) * reservations.ALLOWANCE) // IMAGE_SIZE
    assert 2 < room_for < len(IDS) - 2
    turn = threading.Condition()
    refused: list[ic.NoSpaceError] = []
    lowest: list[int] = []

    def wait_for_the_refused(point: str) -> None:
        # Those that have room hold it, with nothing written, until all others were refused: at once.
        if point == "ingest:reserved":
            with turn:
                assert turn.wait_for(lambda: len(refused) == len(IDS) - room_for, 60)
        if point == "ingest:sealed":
            lowest.append(free(instances))

    def fetch(number: int) -> object:
        try:
            return make(host=System(trace=wait_for_the_refused)).cache_image(IDS[number])
        except ic.NoSpaceError as error:
            with turn:
                refused.append(error)
                turn.notify_all()
            raise

    for each in [Running(functools.partial(fetch, number)) for number in range(len(IDS))]:
        with contextlib.suppress(ic.NoSpaceError):
            assert each.result() is ic.CacheResult.CACHED
    assert len(refused) == len(IDS) - room_for
    assert len(lowest) == room_for
    assert min(lowest) > 0
    report = make().get_space()
    assert report.reserved == 0
    assert report.free == free(instances)
    assert report.used == allocated(instances / "_base")
    assert abs((before - report.free) - room_for * IMAGE_SIZE) < room_for * reservations.ALLOWANCE
    assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []


def allocated(directory: pathlib.Path) -> int:
    """Return what everything but directories takes, as du(1) counts it."""
    total = 0
    for parent, _directories, names in os.walk(directory):
        total += sum(os.lstat(os.path.join(parent, name)).st_blocks * 512 for name in names)
    return total


def fill(make: Callable[..., ic.ImageCacheManager], count: int) -> None:
    for image_id in IDS[:count]:
        make().cache_image(image_id)


def test_the_least_recently_used_makes_room_and_only_as_much_as_is_needed(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], happened: list[events.Event]
) -> None:
    fill(make, 4)
    for number, image_id in enumerate(IDS[:4]):
        age_base(instances, image_id, AGED - number)
    assert make().get_space().reclaimable >= 4 * IMAGE_SIZE
    make().pin(IDS[0], owner="roll-out")
    assert make().get_space().reclaimable < 4 * IMAGE_SIZE
    (instances / "_base" / "another").write_bytes(bytes(range(256)) * (free(instances) // 256 - 4 * 4096))
    assert make().cache_image(IDS[4]) is ic.CacheResult.CACHED
    evicted = [event.name for event in happened if isinstance(event, events.Evicted)]
    # The pinned one is older still, and stays.
    assert evicted == [layout.base_name(IDS[1])]


def test_a_base_a_minute_old_stays_and_the_fetch_is_refused(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    fill(make, 4)
    age_base(instances, IDS[0], 60)
    now = free(instances)
    with pytest.raises(ic.NoSpaceError) as caught:
        make(free_space_low=now).cache_image(IDS[4])
    assert "MiB more" in str(caught.value)
    assert caught.value.image == IDS[4]
    assert base(instances, IDS[0]).exists()
    assert free(instances) == now


def test_nothing_is_evicted_where_the_operator_forbids_it(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    fill(make, 4)
    age_base(instances, IDS[0], AGED)
    with pytest.raises(ic.NoSpaceError):
        make(remove_unused_base_images=False, free_space_low=free(instances)).cache_image(IDS[4])
    assert base(instances, IDS[0]).exists()


def test_a_used_base_is_never_evicted_for_room(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    fill(make, 3)
    (instances / "instance").mkdir()
    make().create_disk(IDS[0], str(instances / "instance" / "disk"))
    for image_id in IDS[:3]:
        age_base(instances, image_id, AGED)
    low = free(instances)
    make(free_space_low=low).cache_image(IDS[3])
    assert base(instances, IDS[0]).exists()
    assert not base(instances, IDS[1]).exists()


def test_a_fetch_beside_somebody_who_fills_the_disk_fails_cleanly(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], points: Points
) -> None:
    make().get_space()
    other = instances / "_base" / ".imagecache" / "another"

    def fill_up() -> None:
        with other.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(MIB))
                file.flush()

    points.at("ingest:reserved", fill_up)
    with pytest.raises(ic.NoSpaceError):
        make().cache_image(IDS[0])
    assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []
    other.unlink()
    assert make().cache_image(IDS[0]) is ic.CacheResult.CACHED


def test_what_is_reserved_counts_beside_what_others_write(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], points: Points
) -> None:
    make().get_space()

    def write_elsewhere() -> None:
        # All but what the first fetch was promised, and too little for another.
        left = free(instances) - IMAGE_SIZE - IMAGE_SIZE // 2
        (instances / "_base" / ".imagecache" / "another").write_bytes(os.urandom(left))
        assert make().get_space().reserved == IMAGE_SIZE
        with pytest.raises(ic.NoSpaceError):
            make().cache_image(IDS[1])

    points.at("ingest:reserved", write_elsewhere)
    assert make().cache_image(IDS[0]) is ic.CacheResult.CACHED


@pytest.mark.parametrize(
    ("disk_format", "options"),
    [
        ("qcow2", []),
        ("qcow2", ["-c"]),
        ("vmdk", []),
        ("vmdk", ["-o", "subformat=streamOptimized"]),
        ("vhdx", []),
    ],
)
def test_a_sparse_image_far_larger_than_the_disk_is_stored(
    instances: pathlib.Path,
    make: Callable[..., ic.ImageCacheManager],
    tmp_path: pathlib.Path,
    disk_format: str,
    options: list[str],
) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    with raw.open("wb") as file:
        file.write(os.urandom(2 * MIB))
        file.truncate(1024 * MIB)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", disk_format, *options, raw, image], check=True)
    source = FakeSource({"sparse": image.read_bytes()}, disk_format=disk_format)
    assert make(source).cache_image("sparse") is ic.CacheResult.CACHED
    found = base(instances, "sparse").stat()
    assert found.st_size == 1024 * MIB
    assert found.st_blocks * 512 < 4 * MIB


def test_data_that_decodes_to_more_than_there_is_room_for_is_refused_before_the_disk_is_full(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], tmp_path: pathlib.Path
) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"compressible" * (100 * MIB // 12))
    for disk_format, options in (("qcow2", ["-c"]), ("vmdk", ["-o", "subformat=streamOptimized"])):
        subprocess.run(
            ["qemu-img", "convert", "-f", "raw", "-O", disk_format, *options, raw, image], check=True
        )
        source = FakeSource({"large": image.read_bytes()}, disk_format=disk_format)
        with pytest.raises(ic.NoSpaceError, match="MiB more"):
            make(source).cache_image("large")
        assert os.listdir(instances / "_base" / ".imagecache" / "stage") == []


def test_what_one_chunk_maps_is_refused_before_the_disk_is_full(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    image = qcow2_images.repeating()
    source = FakeSource({"large": image}, disk_format="qcow2", chunk_size=len(image))
    with pytest.raises(ic.NoSpaceError, match=r"it needs 512\.0 MiB more"):
        make(source).cache_image("large")


#: Where an image's table lies, and how many bytes an entry has.
_TABLES: dict[str, Callable[[Prefix], tuple[int, int]]] = {
    "vdi": lambda image: (vdi.layout(image).map_at, 4),
    "vhd": lambda image: (vhd.layout(image).table_at, 4),
    "vhdx": lambda image: (vhdx.layout(image).table_at, 8),
}


def test_a_table_that_names_one_block_again_and_again_is_refused_before_the_disk_is_full(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], tmp_path: pathlib.Path
) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image"
    with raw.open("wb") as file:
        file.write(b"a block " * (MIB // 8))
        file.truncate(512 * MIB)
    for disk_format, made in (("vdi", "vdi"), ("vhd", "vpc"), ("vhdx", "vhdx")):
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", made, raw, image], check=True)
        data = bytearray(image.read_bytes())
        at, entry = _TABLES[disk_format](Prefix(data, whole=True))
        data[at : at + 128 * entry] = data[at : at + entry] * 128
        source = FakeSource({"large": bytes(data)}, disk_format=disk_format)
        with pytest.raises(ic.NoSpaceError, match="MiB more"):
            make(source).cache_image("large")


def test_with_a_deadline_it_waits_for_those_in_flight(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], points: Points
) -> None:
    make().get_space()
    low = free(instances) - IMAGE_SIZE - IMAGE_SIZE // 2
    lying = FakeSource({IDS[0]: os.urandom(IMAGE_SIZE)})
    lying.change_data(IDS[0], os.urandom(IMAGE_SIZE))
    stop = points.stop_at("ingest:reserved")
    first = Running(lambda: make(lying, free_space_low=low).cache_image(IDS[0]))
    stop.wait()
    second_points = Points()
    second_points.at("space:waiting", stop.go_on)
    host = System(trace=second_points)
    request = ic.Request(deadline=host.clock() + 60)
    manager = make(host=host, free_space_low=low)
    assert manager.cache_image(IDS[1], request=request) is ic.CacheResult.CACHED
    with pytest.raises(ic.ImageRejected):
        first.result()


def test_once_the_deadline_passed_it_says_that_there_was_no_room(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], points: Points
) -> None:
    make().get_space()
    low = free(instances) - IMAGE_SIZE - IMAGE_SIZE // 2
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    stop = points.stop_at("ingest:reserved")
    first = Running(lambda: make(free_space_low=low).cache_image(IDS[0]))
    stop.wait()
    manager = make(host=System(clock=lambda: now[0], sleep=sleep), free_space_low=low)
    with pytest.raises(ic.NoSpaceError):
        manager.cache_image(IDS[1], request=ic.Request(deadline=1010.0))
    assert now[0] == 1010.0
    stop.go_on()
    assert first.result() is ic.CacheResult.CACHED


class _Died(BaseException):
    """Ends a publisher where it stands, as a kill does."""


def _publish_half(make: Callable[..., ic.ImageCacheManager]) -> None:
    """Give a base its name, and die before its record has its own."""

    def die(point: str) -> None:
        if point == "publish:linked":
            raise _Died

    with contextlib.suppress(_Died):
        make(host=System(trace=die)).cache_image(IDS[0])


def _fill_up(path: pathlib.Path) -> None:
    """Take all the room there is, to the last block."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filling:
        for piece in (MIB, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    filling.write(bytes(piece))


def test_the_evidence_of_a_base_outlives_a_full_filesystem(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    _publish_half(make)
    private = instances / "_base" / ".imagecache"
    filling = instances / "_base" / "filling"
    _fill_up(filling)
    files.age_tree(private / "stage", seconds=7200)  # a leftover otherwise
    for _pass in range(2):
        make().verify_base_images([])
    assert not list((private / "records").glob("*.json"))
    filling.unlink()
    make().verify_base_images([])
    found = make().show_base(IDS[0])
    assert found is not None and found.image_id == IDS[0]
    assert found.origin == "fetched"
    assert not list((private / "stage").iterdir())


def test_a_base_whose_evidence_finds_no_room_for_a_day_may_be_evicted_for_room(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager]
) -> None:
    _publish_half(make)
    _fill_up(instances / "_base" / "filling")
    files.age_tree(instances / "_base" / ".imagecache" / "stage", seconds=2 * AGED)
    for _pass in range(2):
        make().verify_base_images([])
    assert not base(instances, IDS[0]).exists()


def test_eviction_ends_where_it_gives_nothing_back(tmp_path: pathlib.Path, images: dict[str, bytes]) -> None:
    with filesystems.loop_mounted(
        tmp_path, filesystems.XFS_SMALLEST, ["mkfs.xfs", "-q", "-m", "reflink=1"]
    ) as mount_point:

        def cache(image_id: str, *, low: int = 0) -> None:
            config = ic.CacheConfig(instances_path=str(mount_point), num_retries=0, free_space_low=low)
            ic.ImageCacheManager(config, FakeSource(images)).cache_image(image_id)

        for number, image_id in enumerate(IDS[:5]):
            cache(image_id)
            # A snapshot keeps the blocks of a base that is evicted.
            copy = mount_point / f"snapshot-{number}"
            subprocess.run(["cp", "--reflink=always", base(mount_point, image_id), copy], check=True)
            age_base(mount_point, image_id, AGED)
        with pytest.raises(ic.NoSpaceError):
            cache(IDS[5], low=free(mount_point) - IMAGE_SIZE // 2)
        assert sum(base(mount_point, image_id).exists() for image_id in IDS[:5]) == 4


def test_what_an_attempt_to_decode_reserved_is_not_reserved_twice(
    instances: pathlib.Path, make: Callable[..., ic.ImageCacheManager], tmp_path: pathlib.Path
) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image"
    with raw.open("wb") as file:
        file.write(b"compressible" * (36 * MIB // 12))
        file.truncate(600 * MIB)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, path], check=True)
    # A second table behind the data, for the same cluster: it can be decoded only as a whole.
    image = bytearray(path.read_bytes())
    level_1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[level_1 : level_1 + 8], "big") & (2**56 - 1)
    image += bytes(-len(image) % 65536)
    image[level_1 + 8 : level_1 + 16] = len(image).to_bytes(8, "big")
    image += image[table : table + 8] + bytes(65536 - 8)
    # It fits once, and not twice.
    assert make(FakeSource({"image": bytes(image)}, disk_format="qcow2")).cache_image("image")
    found = base(instances, "image").stat()
    assert found.st_size == 600 * MIB
    assert found.st_blocks * 512 > 36 * MIB
