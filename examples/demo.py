# SPDX-License-Identifier: Apache-2.0
"""The image cache at work, on this machine alone: ``make demo``.

It makes a bootable image, serves it over HTTP on loopback, has processes and threads ask for disks at once,
boots one in QEMU, and shows what is kept and why, until it ages and goes. Everything is in a temporary
directory. It exits 0 only if every claim that it prints is so.
"""

from __future__ import annotations

import argparse
import collections
import io
import multiprocessing
import os
import pathlib
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid

from demo_console import ClaimFailed, Console, size, span
from demo_crowd import Made, Round, ask
from demo_images import Server, Sizes, allocated, make_image, nginx_program, run, serving, sizes

import imagecache_lib as ic
from imagecache_lib import events
from imagecache_lib.store import layout
from imagecache_lib.testing import bootdisk

MIB, GIB = 2**20, 2**30
PROCESSES, THREADS = 3, 4
DISK_SIZE = 4 * GIB
DAY = 86400
#: Each image's bytes of data, and its virtual size.
IMAGES = {"guest": (256 * MIB, 2 * GIB), "rescue": (48 * MIB, 512 * MIB)}
#: Exits 0 if a qcow2 and another disk have the same content; a longer one ends in zeros.
COMPARE = ("qemu-img", "compare", "-q", "-f", "qcow2", "-F")


class Demo:
    """The steps. Each shows what happened and claims only what it checked."""

    def __init__(self, console: Console, home: pathlib.Path) -> None:
        self.console = console
        self.home = home
        self.images = home / "images"
        self.instances = home / "instances"
        self.images.mkdir()
        self.instances.mkdir()
        self.config = ic.CacheConfig(instances_path=str(self.instances))
        self.layout = layout.Layout(self.config.base_path, self.config.locks_path)
        self.digests: dict[str, ic.Digest] = {}
        self.seen: collections.Counter[type[events.Event]] = collections.Counter()
        self.running: dict[str, ic.Instance] = {}
        self.arrivals: list[events.Progress | events.Fetched] = []
        self._began = 0.0

    def run(self, server_name: str) -> None:
        """All of it, from an empty directory to an empty cache."""
        self.make_images()
        with serving(self.home, self.images, server_name) as server:
            self.console.say(f"{server.name} serves them at {server.url}, slowly: there is a bar to watch")
            cold, warm = self.ask_at_once(server)
            self.boot(warm.made[0].disk, warm.made[1].disk)
            self.show_space(server, len(cold.made) + len(warm.made))
            manager = ic.ImageCacheManager(self.config, self.source(server), observers=[self.observe])
            self.precache(manager, server)
            self.age(manager)
            self.clear(manager)

    # -- the steps -----------------------------------------------------------------------------------

    def make_images(self) -> None:
        self.console.step("Two images, and a web server that has them")
        for image_id, (data, virtual) in IMAGES.items():
            path = self._image(image_id)
            self.digests[image_id] = make_image(path, data, virtual)
            made = sizes(path, "qcow2")
            # Clusters of zeros are left out of the image, and its tables come on top.
            self.console.claim(
                f"{path.name}: {size(made.apparent)} of a boot sector and files of /usr/lib, "
                f"virtual size {size(made.virtual)}",
                made.virtual == virtual and 0.8 * data < made.apparent < 1.01 * data + MIB,
            )

    def _image(self, image_id: str) -> pathlib.Path:
        return self.images / f"{image_id}.qcow2"

    def ask_at_once(self, server: Server) -> tuple[Round, Round]:
        crowd = PROCESSES * THREADS
        self.console.step(f"{crowd} disks at once, from {PROCESSES} processes with {THREADS} threads each")
        cold = self.crowd(server)
        self.claim_arrival("guest")
        cold_downloads = server.downloads("guest.qcow2")
        warm = self.crowd(server)
        warm_downloads = server.downloads("guest.qcow2") - cold_downloads
        rows = [
            self._round_row("the cache is empty", cold, cold_downloads),
            self._round_row("it has the image", warm, warm_downloads),
        ]
        headers = ["", "disks", "misses", "hits", "downloads", "first disk", "last disk"]
        self.console.table(headers, rows, align="lrrrrrr")
        self.console.claim(
            f"one download for {crowd} askers, by the server's own log, and none for the next {crowd}",
            (cold_downloads, warm_downloads) == (1, 0) and cold.seen[events.Fetched] == 1,
        )
        self.console.claim(
            f"the first {crowd} saw one miss, the next {crowd} saw {crowd} hits",
            cold.seen[events.Miss] == 1 and warm.seen[events.Miss] == 0 and warm.seen[events.Hit] == crowd,
        )
        self.console.claim(
            f"with the image in the cache the last disk was there after {span(warm.times[-1])}, "
            f"without it the first one after {span(cold.times[0])}",
            len(warm.times) == len(cold.times) == crowd and warm.times[-1] < cold.times[0],
        )
        original = str(self._image("guest"))
        disks = [made.disk.target for made in (*cold.made, *warm.made) if made.disk is not None]
        for disk in disks:
            run("qemu-img", "check", "-q", "-f", "qcow2", disk)
        run(*COMPARE, "qcow2", original, disks[0])
        run(*COMPARE, "qcow2", original, disks[-1])
        self.console.claim(
            f"qemu-img check passes all {len(disks)} disks, and compare finds the first and the last "
            "equal to the image",
            len(disks) == 2 * crowd,
        )
        return cold, warm

    def _round_row(self, name: str, crowd: Round, downloads: int) -> list[str]:
        counts = (len(crowd.made), crowd.seen[events.Miss], crowd.seen[events.Hit], downloads)
        return [name, *(str(count) for count in counts), span(crowd.times[0]), span(crowd.times[-1])]

    def boot(self, disk: ic.Disk | None, other: ic.Disk | None) -> None:
        assert disk is not None and other is not None  # the crowd's claims would have failed
        self.console.step("One of them boots in QEMU, and says so on its serial console")
        began = time.monotonic()
        said = [self._boot(disk), self._boot(disk), self._boot(other)]
        self.console.quote(said)
        self.console.claim(
            f"two boots of one disk and one of another in {span(time.monotonic() - began)}: "
            "each disk counts its own boots",
            said == ["HELLO BOOT 0", "HELLO BOOT 1", "HELLO BOOT 0"],
        )
        self.console.claim(
            "the base image that they share is still equal to the image",
            run(*COMPARE, "raw", str(self._image("guest")), self.layout.base(disk.base or "")) == "",
        )

    def _boot(self, disk: ic.Disk) -> str:
        lines = run(*bootdisk.boot_command(disk.target, disk.format)).split("\n")
        return next((line.strip() for line in lines if "BOOT" in line), "nothing")

    def show_space(self, server: Server, count: int) -> None:
        self.console.step("Space")
        disks = sorted(self.instances.glob("*/disk"))
        image, base = sizes(self._image("guest"), "qcow2"), sizes(self._base("guest"), "raw")
        disk = sizes(disks[0], "qcow2")
        rows = [
            self._sizes_row("the image, at the server", "qcow2", image),
            self._sizes_row("its base image, in the cache", "raw", base),
            self._sizes_row("one of the disks made from it", "qcow2", disk),
        ]
        self.console.table(["", "format", "virtual", "apparent", "allocated"], rows, align="llrrr")
        virtual = IMAGES["guest"][1]
        self.console.claim(
            f"the virtual sizes are those asked for: the image's {size(virtual)}, "
            f"the disk's {size(DISK_SIZE)}",
            (image.virtual, base.virtual, disk.virtual) == (virtual, virtual, DISK_SIZE),
        )
        self.console.claim(
            "the base image is sparse: as long as its virtual size, and on disk no larger than the image",
            base.apparent == base.virtual and base.allocated < 1.01 * image.apparent + MIB,
        )
        self.console.claim(
            f"the disk is an overlay: {size(disk.allocated)} of tables and of what its own boots wrote",
            disk.allocated < disk.apparent + MIB < 2 * MIB,
        )
        of_disks = sum(allocated(path) for path in disks)
        used = ic.ImageCacheManager(self.config, self.source(server)).get_disk_usage()
        self.console.claim(
            f"{count} disks and the cache allocate {size(of_disks + used)}, where {count} copies "
            f"of the image would take {size(count * base.allocated)}",
            len(disks) == count and base.allocated <= used and of_disks + used < 2 * base.allocated,
        )

    def _sizes_row(self, what: str, format: str, found: Sizes) -> list[str]:
        return [what, format, size(found.virtual), size(found.apparent), size(found.allocated)]

    def precache(self, manager: ic.ImageCacheManager, server: Server) -> None:
        self.console.step("A second image, cached before anybody needs it, and kept while it is used")
        self._began = time.monotonic()
        first, again = manager.cache_image("rescue"), manager.cache_image("rescue")
        self.console.claim(
            f"cache_image says {first.value}, and asked again {again.value}; the server saw one download",
            (first.value, again.value, server.downloads("rescue.qcow2")) == ("cached", "existing", 1),
        )
        self.claim_arrival("rescue")
        disk = manager.create_disk("rescue", self._new_target("rescue"), size=DISK_SIZE)
        self._make_old("rescue")
        self._verify(manager, {"guest": "kept", "rescue": "kept"})
        self.console.claim("two days old, and kept: a disk uses it", self._is_cached("rescue"))
        self.destroy(disk, manager)

    def age(self, manager: ic.ImageCacheManager) -> None:
        self.console.step("Its last disk is removed, and it ages")
        self._verify(manager, {"guest": "kept", "rescue": "kept"})
        self.console.claim("unused, and kept: it is too young", self._is_cached("rescue"))
        self._make_old("rescue")
        taken = allocated(self._base("rescue"))
        dry = manager.verify_base_images(self._reported(), dry_run=True)
        self.console.claim(
            "two days later: a dry run would evict it, and does not",
            len(dry.evicted) == 1 and self._is_cached("rescue"),
        )
        report = self._verify(manager, {"guest": "kept", "rescue": "evicted"})
        self.console.claim(
            f"evicted: {size(report.reclaimed)} came back; the other image stays",
            report.reclaimed == taken and not self._is_cached("rescue") and self._is_cached("guest"),
        )

    def clear(self, manager: ic.ImageCacheManager) -> None:
        self.console.step("All disks are removed")
        for target in sorted(self.instances.glob("*/disk")):
            self.destroy(manager.inspect_disk(str(target)), manager)
        self._make_old("guest")
        self._verify(manager, {"guest": "evicted"})
        left = manager.get_disk_usage()
        self.console.claim(f"the cache is empty but for {size(left)} of its own notes", left < MIB)
        self.console.claim(
            "observers saw each download, hit and eviction of this and the last two steps",
            (self.seen[events.Fetched], self.seen[events.Hit], self.seen[events.Evicted]) == (1, 2, 2),
        )

    # -- what a driver has ---------------------------------------------------------------------------

    def source(self, server: Server) -> ic.HttpSource:
        return ic.HttpSource(
            {
                image_id: ic.HttpImage(f"{server.url}/{image_id}.qcow2", "qcow2", digest)
                for image_id, digest in self.digests.items()
            }
        )

    def _new_target(self, image_id: str) -> str:
        """Make an instance's directory, and from then on report the instance."""
        instance = str(uuid.uuid4())
        (self.instances / instance).mkdir()
        self.running[instance] = ic.Instance(instance, socket.gethostname(), images=(image_id,))
        return str(self.instances / instance / "disk")

    def destroy(self, disk: ic.Disk, manager: ic.ImageCacheManager) -> None:
        manager.remove_disk(disk)
        directory = pathlib.Path(disk.target).parent
        shutil.rmtree(directory)
        del self.running[directory.name]

    def crowd(self, server: Server) -> Round:
        """Have all threads ask at once, show what arrives, and return when each has its disk."""
        context = multiprocessing.get_context("spawn")
        tell, start = context.Queue(), context.Barrier(PROCESSES * THREADS)
        workers = []
        for _process in range(PROCESSES):
            targets = [self._new_target("guest") for _thread in range(THREADS)]
            arguments = (self.config, self.source(server), "guest", targets, DISK_SIZE, start, tell)
            workers.append(context.Process(target=ask, args=arguments, daemon=True))
        for worker in workers:
            worker.start()
        found = Round([], collections.Counter())
        self._began = time.monotonic()
        while len(found.made) < PROCESSES * THREADS:
            try:
                told = tell.get(timeout=0.5)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise ClaimFailed("a process ended before its disks were made") from None
                continue
            if isinstance(told, Made):
                found.made.append(told)
            else:
                found.seen[type(told)] += 1
                self._show(told)
        for worker in workers:
            worker.join()
        for failed in [made.error for made in found.made if made.disk is None]:
            raise ClaimFailed(failed)
        return found

    def observe(self, event: events.Event) -> None:
        """What the manager tells us: any callable is an observer."""
        self.seen[type(event)] += 1
        self._show(event)

    def _show(self, event: events.Event) -> None:
        match event:
            case events.Miss():
                self._began = time.monotonic()
            case events.Progress(received=received, total=int(total)):
                self.arrivals.append(event)
                self.console.progress(received, total, time.monotonic() - self._began)
            case events.Fetched(received=received, allocated=taken, seconds=seconds):
                self.arrivals.append(event)
                self.console.say(
                    f"{event.image_id}: {size(received)} received, checked, stored and synced "
                    f"in {span(seconds)}, {size(taken)} on disk"
                )

    def claim_arrival(self, image_id: str) -> None:
        """Compare what the events of one download said with the server's file and the cache's.

        Not where they are shown: what an observer raises is logged, and ends nothing.
        """
        length, taken = self._image(image_id).stat().st_size, allocated(self._base(image_id))
        arrivals = [event for event in self.arrivals if event.image_id == image_id]
        progress = [event for event in arrivals if isinstance(event, events.Progress)]
        fetched = [event for event in arrivals if isinstance(event, events.Fetched)]
        self.console.claim(
            f"{size(length)} at the server and {size(taken)} on disk, by what the filesystem says too",
            [(event.received, event.allocated) for event in fetched] == [(length, taken)]
            and all(event.received <= length == event.total for event in progress)
            and 0 < fetched[0].seconds <= time.monotonic() - self._began,
        )

    # -- upkeep --------------------------------------------------------------------------------------

    def _reported(self) -> list[ic.Instance]:
        return list(self.running.values())

    def _verify(self, manager: ic.ImageCacheManager, expected: dict[str, str]) -> ic.VerifyReport:
        """Run the periodic pass, show its report, and compare it with what was expected and is on disk."""
        names = {layout.base_name(image_id): image_id for image_id in self.digests}
        taken = {image_id: allocated(self._base(image_id)) for image_id in expected}
        report = manager.verify_base_images(self._reported())
        fates = {names[base.name]: "evicted" if base.evicted else "kept" for base in report.bases}
        rows = [
            [
                names[base.name],
                fates[names[base.name]],
                size(base.allocated),
                base.reason.replace(f"{self.instances}/", ""),
            ]
            for base in report.bases
        ]
        self.console.table(["base image", "", "allocated", "why"], rows, align="llrl")
        for problem in report.problems:
            raise ClaimFailed(problem)
        if fates != expected or taken != {names[base.name]: base.allocated for base in report.bases}:
            raise ClaimFailed(f"the pass was to find {expected} with {taken} bytes")
        return report

    def _make_old(self, image_id: str) -> None:
        """Let a base look as if it was last used two days ago: its own time and our note of it."""
        name = layout.base_name(image_id)
        then = time.time() - 2 * DAY
        for path in (self.layout.base(name), self.layout.record(name)):
            os.utime(path, (then, then))

    def _base(self, image_id: str) -> pathlib.Path:
        return pathlib.Path(self.layout.base(layout.base_name(image_id)))

    def _is_cached(self, image_id: str) -> bool:
        return self._base(image_id).exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "nginx" if nginx_program() else "range_server"
    parser.add_argument("--server", choices=("nginx", "range_server"), default=default)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the signs that lines are drawn with
    chosen = parser.parse_args().server
    missing = [each for each in ("qemu-img", "qemu-system-x86_64") if shutil.which(each) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} not installed; `make demo` installs what it needs")
    console = Console()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="imagecache-demo-") as home:
            Demo(console, pathlib.Path(home)).run(chosen)
    except (ClaimFailed, ic.ImageCacheError, subprocess.CalledProcessError, OSError) as error:
        console.verdict(f"The demonstration failed: {error}", good=False)
        return 1
    console.verdict(f"Everything was as claimed, in {span(time.monotonic() - began)}.", good=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
