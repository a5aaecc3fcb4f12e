# SPDX-License-Identifier: Apache-2.0
"""One directory that several hosts see through FUSE mounts, each of whose kernels trusts names for a time.

As clients of NFS, GlusterFS and CephFS do: what another host renamed or removed meanwhile is still found by
its name, and what another host wrote has its old size, until the time is over. Locks are each mount's own.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.support import needs

_STATUS = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
_SPACE = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_files", "f_ffree", "f_namemax")


@contextlib.contextmanager
def mounted(home: pathlib.Path, hosts: int, *, seconds: float) -> Iterator[list[pathlib.Path]]:
    """Serve one directory, and yield its mount points, one for each host.

    :param home: an existing, empty directory for all it makes.
    :param seconds: for how long names and attributes are trusted.
    """
    needs.root()
    if not os.path.exists("/dev/fuse"):
        needs.lack("the kernel has no FUSE")
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        needs.lack(f"FUSE cannot be used from Python: {error}")
    backing = home / "served"
    backing.mkdir()
    mount_points = [home / f"mount-{number}" for number in range(hosts)]
    with contextlib.ExitStack() as stack:
        for mount_point in mount_points:
            mount_point.mkdir()
            stack.enter_context(_served(backing, mount_point, seconds))
        yield mount_points


@contextlib.contextmanager
def _served(backing: pathlib.Path, mount_point: pathlib.Path, seconds: float) -> Iterator[None]:
    command = [sys.executable, "-m", __name__, str(backing), str(mount_point), str(seconds)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not os.path.ismount(mount_point):
            assert server.poll() is None and time.monotonic() < deadline, "nothing was mounted"
            time.sleep(0.02)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=False)
        server.kill()
        server.wait()


def servers_of(mount_point: pathlib.Path) -> list[int]:
    """Return the ids of the processes that have a path among their arguments."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            words = pathlib.Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            if entry.isdigit() and os.fsencode(mount_point) in words:
                found.append(int(entry))
    return found


def _serve(backing: str, mount_point: str, seconds: str) -> None:
    import mfusepy

    def asked(function: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno) from error

        return answer

    def status(path: str, _file: int | None = None) -> dict[str, Any]:
        found = os.lstat(backing + path)
        times = {name: getattr(found, f"{name}_ns") for name in ("st_mtime", "st_atime", "st_ctime")}
        return {**{name: getattr(found, name) for name in _STATUS}, **times}

    def listing(path: str, _file: int) -> list[tuple[str, dict[str, int], int]]:
        found = [(".", {"st_mode": 0o40755, "st_ino": 1}, 0), ("..", {"st_mode": 0o40755, "st_ino": 1}, 0)]
        with os.scandir(backing + path) as entries:
            for entry in entries:
                mode = 0o40755 if entry.is_dir(follow_symlinks=False) else 0o100644
                found.append((entry.name, {"st_mode": mode, "st_ino": entry.inode()}, 0))
        return found

    class Passthrough(mfusepy.Operations):  # type: ignore[misc]  # it ships no types
        use_ns = True

        getattr = staticmethod(asked(status))
        readdir = staticmethod(asked(listing))
        open = staticmethod(asked(lambda path, flags: os.open(backing + path, flags & ~os.O_CREAT)))
        create = staticmethod(
            asked(
                # A file that another host made meanwhile is opened, unless the caller wants none to be there.
                lambda path, mode, flags: os.open(
                    backing + path, os.O_RDWR | os.O_CREAT | flags & os.O_EXCL, mode
                )
            )
        )
        read = staticmethod(asked(lambda _path, size, offset, file: os.pread(file, size, offset)))
        write = staticmethod(asked(lambda _path, data, offset, file: os.pwrite(file, data, offset)))
        truncate = staticmethod(asked(lambda path, length, _file=None: os.truncate(backing + path, length)))
        fsync = staticmethod(asked(lambda _path, _data, file: os.fsync(file)))
        fsyncdir = staticmethod(asked(lambda _path, _data, _file: 0))
        release = staticmethod(asked(lambda _path, file: os.close(file)))
        mkdir = staticmethod(asked(lambda path, mode: os.mkdir(backing + path, mode)))
        rmdir = staticmethod(asked(lambda path: os.rmdir(backing + path)))
        unlink = staticmethod(asked(lambda path: os.unlink(backing + path)))
        rename = staticmethod(asked(lambda old, new: os.rename(backing + old, backing + new)))
        link = staticmethod(asked(lambda target, source: os.link(backing + source, backing + target)))
        chmod = staticmethod(asked(lambda path, mode: os.chmod(backing + path, mode)))
        chown = staticmethod(asked(lambda path, user, group: os.chown(backing + path, user, group)))
        utimens = staticmethod(
            asked(lambda path, times=None: os.utime(backing + path, ns=times and (times[0], times[1])))
        )
        statfs = staticmethod(
            asked(lambda _path: {name: getattr(os.statvfs(backing), name) for name in _SPACE})
        )
        getxattr = staticmethod(asked(lambda path, name, _position=0: os.getxattr(backing + path, name)))
        setxattr = staticmethod(
            asked(lambda path, name, value, _options, _position=0: os.setxattr(backing + path, name, value))
        )
        listxattr = staticmethod(asked(lambda path: os.listxattr(backing + path)))
        removexattr = staticmethod(asked(lambda path, name: os.removexattr(backing + path, name)))

    mfusepy.FUSE(
        Passthrough(),
        mount_point,
        foreground=True,
        nothreads=False,
        entry_timeout=float(seconds),
        attr_timeout=float(seconds),
        negative_timeout=0,
        use_ino=True,
        default_permissions=True,
        allow_other=True,
    )


if __name__ == "__main__":
    _serve(*sys.argv[1:])
