# SPDX-License-Identifier: Apache-2.0
"""Finds what is wrong with a host's set-up before the first spawn. Nothing is changed or left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import fcntl
import grp
import os
import pwd
import re
import shlex
import shutil
import stat
from collections.abc import Iterator

from imagecache_lib import dates, errors
from imagecache_lib.backends.interface import StorageBackend
from imagecache_lib.formats import program
from imagecache_lib.formats.program import Limits
from imagecache_lib.formats.sandbox import Sandbox
from imagecache_lib.store import base_attributes, layout
from imagecache_lib.store.directory import CacheStore
from imagecache_lib.system import durable, locks
from imagecache_lib.system.descriptor import Descriptor
from imagecache_lib.system.host import System
from imagecache_lib.system.waiter import Waiter
from imagecache_lib.upkeep import inventory

#: The users that distributions run QEMU as.
_QEMU_USERS = ("libvirt-qemu", "qemu")

#: qemu-img convert knows --target-is-zero since this version, without which zeros would be written out.
_OLDEST_QEMU = (5, 0)

#: What a program is run with, and the package that has it.
_RUN_WITH = {"prlimit": "util-linux"} | dict.fromkeys(("timeout", "sh", "head", "tail", "cat"), "coreutils")

_LOOK = Limits(cpu=10, memory=2**32, wall=30)

#: Less free space than this, in bytes, or fewer free inodes are a warning. ``free_space_low`` may ask for
#: more space.
_LITTLE_SPACE = 2**30

#: And less than this an error: hardly any image is smaller.
_NO_SPACE = 128 * 2**20

_FEW_INODES = 1000

#: Clocks further apart than this many seconds confuse the operators who read dates.
_SKEW = 5.0

_ADMINISTRATORS = "/usr/sbin:/sbin"


class Severity(enum.Enum):
    """How bad a finding is."""

    #: Spawns, or eviction, will fail.
    ERROR = "error"
    #: The cache works, but does not keep one of its promises.
    WARNING = "warning"
    #: Something worth knowing.
    INFO = "info"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found.

    :param severity: how bad it is.
    :param text: what was found, as a sentence.
    :param next_step: what to do about it, as a sentence; empty if that is nothing, or the text says it.
    """

    severity: Severity
    text: str
    next_step: str = ""


def examine(cache: CacheStore, backend: StorageBackend) -> list[Finding]:
    """Run all checks, and return the findings, the worst first."""
    found = [_warning(text, "") for text in backend.preflight()]
    for check in (
        _instances,
        _directories,
        _layout,
        _roots,
        _programs,
        _readers,
        _space,
        _filesystem,
        _entries,
    ):
        try:
            found.extend(check(cache))
        except OSError as error:
            path = error.filename or cache.config.base_path
            found.append(_error(f"{path}: {error.strerror}.", "Look into that first."))
        if any(finding.severity is Severity.ERROR for finding in found) and check is _instances:
            break  # without the directory of the instances, the other checks have nothing to look at
    order = list(Severity)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _error(text: str, next_step: str) -> Finding:
    return Finding(Severity.ERROR, text, next_step)


def _warning(text: str, next_step: str) -> Finding:
    return Finding(Severity.WARNING, text, next_step)


# -- directories -----------------------------------------------------------------------------------------


def _instances(cache: CacheStore) -> Iterator[Finding]:
    path = cache.config.instances_path
    try:
        found = os.stat(path)
    except FileNotFoundError:
        yield _error(f"{path} does not exist.", "Create or mount it, owned by the service's user.")
        return
    if not stat.S_ISDIR(found.st_mode):
        yield _error(f"{path} is no directory.", "Correct instances_path.")
    elif os.geteuid() == 0 and found.st_uid != 0:
        yield _error(
            f"{path} belongs to {_user(found.st_uid)}, and this is root, whose files would lock that user "
            "out.",
            f"Run as that user: runuser -u {_user(found.st_uid)} -- ...",
        )
    elif os.statvfs(path).f_flag & os.ST_RDONLY:
        yield _error(f"{path} is mounted read-only.", "Mount it for writing.")
    elif not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        yield _error(
            f"{path} is not writable for {_user(os.geteuid())}; it belongs to {_user(found.st_uid)}.",
            "Correct its owner and mode, or run as its owner.",
        )


def _directories(cache: CacheStore) -> Iterator[Finding]:
    config, where = cache.config, cache.layout
    for path in (where.base_path, where.private, where.locks_path):
        if os.path.lexists(path) and not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            yield _error(f"{path} is not writable for {_user(os.geteuid())}.", "Correct its owner and mode.")
    if cache.exists() and os.stat(where.base_path).st_dev != os.stat(config.instances_path).st_dev:
        yield Finding(
            Severity.INFO,
            f"{where.base_path} is on another filesystem than {config.instances_path}: raw disks are copied, "
            "never reflinked, and the cache's use of space counts as 0 for the instances.",
        )


def _layout(cache: CacheStore) -> Iterator[Finding]:
    try:
        found = durable.read_file(cache.layout.version)
    except PermissionError:
        return  # _directories() has reported that this process may not use the directory
    if found is None or layout.is_known_version(found):
        return
    version = layout.stated_version(found)
    if version is None:
        yield _error(
            f"{cache.layout.version}, the version of the cache's layout, is damaged: it states no version.",
            f"If no newer release uses the cache, write {layout.VERSION} into it.",
        )
    else:
        yield _error(
            f"The cache was written by a newer release: its layout is {version}, and this one knows "
            f"{layout.VERSION}.",
            "Upgrade imagecache_lib on this host.",
        )


def _roots(cache: CacheStore) -> Iterator[Finding]:
    for root in cache.config.disk_roots:
        if not os.path.isdir(root):
            yield _error(
                f"The disk root {root} is not there, so nothing is ever evicted.",
                "Mount it, or take it out of disk_roots.",
            )


def _entries(cache: CacheStore) -> Iterator[Finding]:
    there = inventory.take(cache)
    for base in there.bases:
        with contextlib.suppress(errors.CacheEntryError):
            record = cache.evidence_of(base.name)
            if record is not None and record.damaged:
                yield _error(
                    f"Base image {base.name} is damaged on disk.",
                    "Restore or rebuild the instances that use it, then evict it: imagecache image show "
                    f"{base.name}",
                )
    for name in there.unknown:
        path = cache.layout.base(name)
        yield _warning(f"{path} is nothing that belongs into a cache, and is not touched.", "Move it away.")


# -- programs --------------------------------------------------------------------------------------------


def _programs(cache: CacheStore) -> Iterator[Finding]:
    try:
        yield from _installed(cache.host)
    except program.NotStarted as error:
        yield _error(
            f"Of programs such as qemu-img nothing can be said: {error.cause}.",
            "Look at this process's own limits (ulimit -a), and check again.",
        )


def _installed(host: System) -> Iterator[Finding]:
    lacking = [name for name in _RUN_WITH if shutil.which(name) is None]
    for name in lacking:
        yield _error(
            f"{name} is not installed, without which qemu-img is not run: it would have no limits.",
            f"Install {_RUN_WITH[name]}.",
        )
    if not lacking:
        yield from _converter(host)
    path = f"{os.environ.get('PATH', os.defpath)}:{_ADMINISTRATORS}"
    for name, package, what in (
        ("mkswap", "util-linux", "swap disks"),
        ("mkfs.ext4", "e2fsprogs", "ephemeral disks of Linux guests"),
        ("mkfs.vfat", "dosfstools", "ephemeral disks of guests of unknown type"),
    ):
        if shutil.which(name, path=path) is None:
            yield _warning(f"{name} is not installed, so that {what} cannot be made.", f"Install {package}.")


def _converter(host: System) -> Iterator[Finding]:
    words = ("qemu-img", "--version")
    try:
        said = program.run(words, limits=_LOOK, waiter=Waiter(host), program="qemu-img", subject="qemu-img")
    except program.NotStarted:
        raise  # that says nothing of qemu-img
    except errors.ImageCacheError as error:
        yield _error(
            f"qemu-img cannot be run: {error.cause}.", "Install qemu-utils or qemu-img, and see that it runs."
        )
        return
    match = re.search(r"version (\d+)\.(\d+)", said)
    if match is None:
        yield _warning(
            f"qemu-img does not say which version it is: {said.strip()[:60]!r}.", "Check the installation."
        )
    elif (int(match[1]), int(match[2])) < _OLDEST_QEMU:
        yield _error(
            f"qemu-img is {match[1]}.{match[2]}, and images other than raw and qcow2 need 5.0 to be "
            "converted.",
            "Install a newer QEMU.",
        )
    if problem := Sandbox("qemu-img", host).problem():
        yield _warning(
            f"What converts images is not shut in: {problem}.",
            "Install bubblewrap, and let this user make namespaces; images are checked all the same.",
        )


# -- who reads the bases ---------------------------------------------------------------------------------


def _readers(cache: CacheStore) -> Iterator[Finding]:
    """Check that QEMU, which runs as a user of its own, can open bases by their path."""
    account = next(filter(None, map(_account, _QEMU_USERS)), None)
    if account is None or account.pw_uid == os.geteuid():
        return
    groups = {group.gr_gid for group in grp.getgrall() if account.pw_name in group.gr_mem}
    groups.add(account.pw_gid)
    path = cache.layout.base_path if cache.exists() else cache.config.instances_path
    step = "/"
    for part in ("", *os.path.realpath(path).strip("/").split("/")):
        step = os.path.join(step, part)
        if not _may(os.stat(step), account.pw_uid, groups, stat.S_IXUSR) and not _has_acl(step):
            yield _warning(
                f"{step} cannot be entered by {account.pw_name}, as whom QEMU runs: guests with overlays "
                "will not start.",
                f"chmod o+x {shlex.quote(step)}, or give {account.pw_name} access with an ACL.",
            )
    unreadable = [
        entry.name
        for entry in inventory.take(cache).bases
        if not _is_readable(cache.layout.base(entry.name), account.pw_uid, groups)
    ]
    if unreadable:
        yield _warning(
            f"{len(unreadable)} base images cannot be read by {account.pw_name}, {unreadable[0]} among them.",
            f"chmod 0644 {shlex.quote(cache.layout.base(unreadable[0]))}, and the others.",
        )
    umask = _umask()
    if umask & 0o005 and not cache.exists():
        yield Finding(
            Severity.INFO,
            f"The umask is {umask:04o}. The cache sets its own modes whatever it is; directories that the "
            f"driver makes for its instances may be closed to {account.pw_name}.",
        )


def _account(name: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name)
    return None


def _may(found: os.stat_result, uid: int, groups: set[int], owner_bit: int) -> bool:
    """Return whether the mode allows an account what ``owner_bit`` allows an owner."""
    if uid == 0:
        return True
    if found.st_uid == uid:
        return bool(found.st_mode & owner_bit)
    shift = 3 if found.st_gid in groups else 6
    return bool(found.st_mode & (owner_bit >> shift))


def _is_readable(path: str, uid: int, groups: set[int]) -> bool:
    try:
        return _may(os.stat(path, follow_symlinks=False), uid, groups, stat.S_IRUSR) or _has_acl(path)
    except FileNotFoundError:
        return True


def _has_acl(path: str) -> bool:
    """Return whether the file has an ACL, which then decides and not the mode alone."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False


def _umask() -> int:
    # umask(2) can only be read by setting it, for all threads; proc(5) says it since Linux 4.7.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="latin-1") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


# -- the filesystem --------------------------------------------------------------------------------------


def _space(cache: CacheStore) -> Iterator[Finding]:
    path = _there(cache)
    found = os.statvfs(path)
    free = found.f_bavail * found.f_frsize
    wanted = max(_LITTLE_SPACE, cache.config.free_space_low)
    if free < wanted:
        text = f"{dates.size(free)} are free on the filesystem of {path}, less than {dates.size(wanted)}: "
        if free < _NO_SPACE:
            yield _error(f"{text}no image fits.", "Make room: imagecache prune.")
        else:
            yield _warning(f"{text}images may not fit.", "Make room: imagecache prune.")
    if found.f_files and found.f_favail < _FEW_INODES:
        yield _warning(f"{found.f_favail} inodes are free on the filesystem of {path}.", "Remove files.")
    total = found.f_blocks * found.f_frsize
    if cache.config.free_space_low > total:
        yield _error(
            f"free_space_low is above the {dates.size(total)} that the filesystem has, so nothing is "
            "fetched.",
            "Lower it.",
        )


def _filesystem(cache: CacheStore) -> Iterator[Finding]:
    """Try what the cache needs of the filesystem, on two descriptors of a file that has no name any more."""
    directory = _there(cache)
    probe = os.path.join(directory, f"clock.{durable.new_id()}")  # a crash's is swept like the cache's own
    flags = os.O_RDWR | os.O_NOFOLLOW
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Descriptor(probe, flags | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            second = stack.enter_context(Descriptor(probe, flags))
            skew = os.fstat(first).st_mtime - cache.host.clock()
            attributes = base_attributes.write_id(first, "probe")
        finally:
            os.unlink(probe)
        excluding = _excludes(first, second)
    if abs(skew) > _SKEW:
        yield _warning(
            f"The clock of the filesystem of {directory} is {dates.span(abs(skew))} "
            f"{'ahead of' if skew > 0 else 'behind'} this host's. Ages are measured by the filesystem's, "
            "deadlines and pins as this host sets them are off by that much.",
            "Set both by NTP.",
        )
    if not attributes:
        yield _warning(
            f"The filesystem of {directory} has no user extended attributes: what was checked of a base "
            "image is tied to its inode and size alone, and no certificate is remembered.",
            "Use ext4, xfs, btrfs or NFS 4.2, with user_xattr where the filesystem has that option.",
        )
    if not excluding:
        yield _warning(
            f"Locks do not exclude on the filesystem of {directory}: images may be fetched twice. Nothing is "
            "at risk but time and bytes.",
            "Check the lock service of the file server, and nolock among the mount options.",
        )


def _excludes(first: int, second: int) -> bool:
    try:
        locks.set_lock(first, fcntl.F_WRLCK)
        locks.set_lock(second, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    return False


def _there(cache: CacheStore) -> str:
    """Return a directory on the cache's filesystem, whether there is a cache yet or not."""
    for path in (cache.layout.private, cache.layout.base_path):
        if os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            return path
    return cache.config.instances_path
