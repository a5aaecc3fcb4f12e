# SPDX-License-Identifier: Apache-2.0
"""What a function does to a directory, recorded from its system calls by strace, of all its threads.

The function runs in a forked child, so that nothing has to be imported or set up under strace. What is
recorded are the steps of :mod:`tests.support.crash_states`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from tests.support import needs
from tests.support.crash_states import (
    ROOT,
    Attribute,
    File,
    Mark,
    Names,
    Recording,
    Size,
    Step,
    SyncDirectory,
    SyncFile,
    pieces,
)

#: All calls that change a file, a name or an attribute, or that say which file a descriptor is. One that is
#: not understood ends the recording with an error.
_CALLS = (
    "open,openat,creat,close,dup,dup2,dup3,fcntl,lseek,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,"
    "fallocate,fsync,fdatasync,sync,syncfs,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,"
    "mkdir,mkdirat,rmdir,mknod,mknodat,setxattr,lsetxattr,fsetxattr,removexattr,lremovexattr,fremovexattr,chmod,"
    "fchmod,fchmodat,ioctl,copy_file_range,sendfile,splice,mmap,vfork,fork,clone,clone3"
)

#: The extended attribute's name under which a state keeps the mode of a file.
MODE = "mode"

_MARK = "/mark-of-a-recording/"


def mark(text: str) -> None:
    """Say, in the function that is recorded, how far it has come."""
    # Another error may be injected there.
    with contextlib.suppress(OSError):
        os.unlink(_MARK + text)


def attached(function: Callable[[], object], options: Sequence[str]) -> int:
    """Run a function in a forked child under strace. Returns the child's exit status: 0, or 1 if it raised.

    :param options: of strace.
    """
    strace = needs.program("strace")
    ready, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(go_on)
            with contextlib.suppress(OSError):  # an error may be injected there too
                os.read(ready, 1)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(ready)
    tracer = subprocess.Popen(
        [strace, "-f", "-qq", *options, "-p", str(child)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _await_tracer(child, tracer)
        os.write(go_on, b"x")
        os.close(go_on)
        tracer.wait(120)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        assert tracer.stderr is not None
        tracer.stderr.close()
        if tracer.poll() is None:
            tracer.kill()
            tracer.wait()


def _await_tracer(child: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    status = pathlib.Path(f"/proc/{child}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            assert tracer.stderr is not None
            raise AssertionError(f"strace does not trace: {tracer.stderr.read().decode()}")
        time.sleep(0.002)


def record(root: pathlib.Path, function: Callable[[], object], *, ignored: Sequence[str] = ()) -> Recording:
    """Return what a function does below ``root``.

    :param root: a directory. What is in it now is taken to be durable.
    :param ignored: paths below it, relative, of which nothing is recorded.
    """
    watched = _Watched(root, ignored)
    with tempfile.TemporaryDirectory() as directory:
        log = os.path.join(directory, "log")
        status = attached(
            function, ["-xx", "-s", "100000000", "-e", "signal=none", "-e", f"trace={_CALLS}", "-o", log]
        )
        with open(log, encoding="ascii") as file:
            for name, arguments, result in _calls(file):
                watched.take(name, arguments, result)
    assert status == 0, "the function that was to be recorded failed"
    return watched.recording()


_LINE = re.compile(r"(\d+) +(.*)")
_WHOLE = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(?: .*)?")
_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")


def _calls(lines: Iterator[str]) -> Iterator[tuple[str, list[str], int]]:
    """Yield name, arguments and result of each call that succeeded, as they ended."""
    begun: dict[str, str] = {}
    for line in lines:
        found = _LINE.fullmatch(line.rstrip("\n"))
        assert found is not None, line
        thread, text = found.groups()
        if text.endswith(_UNFINISHED):
            begun[thread] = text.removesuffix(_UNFINISHED)
            continue
        if (resumed := _RESUMED.match(text)) is not None:
            text = begun.pop(thread) + resumed[1]
        whole = _WHOLE.fullmatch(text)
        if whole is None or whole[3] == "?" or (whole[3].startswith("-") and _MARK_HEX not in text):
            continue
        yield whole[1], re.split(r", (?![^{\[]*[}\]])", whole[2]), int(whole[3], 0)


def _hex(text: str) -> str:
    return "".join(f"\\x{each:02x}" for each in os.fsencode(text))


_MARK_HEX = _hex(_MARK)


def _bytes(argument: str) -> bytes:
    assert argument.startswith('"') and argument.endswith('"'), argument
    return bytes.fromhex(argument[1:-1].replace("\\x", ""))


class _Watched:
    """A model of the directory, which follows the calls."""

    def __init__(self, root: pathlib.Path, ignored: Sequence[str]) -> None:
        self._root = os.path.realpath(root)
        self._ignored = {os.path.join(self._root, each) for each in ignored}
        self._directories: dict[int, dict[str, int]] = {ROOT: {}}
        self._files: dict[int, File] = {}
        self._next = ROOT + 1
        self._nodes: dict[int, int] = {}
        self._scan(self._root, ROOT)
        self._first = {node: dict(names) for node, names in self._directories.items()}, dict(self._files)
        self._sizes = {node: len(file.data) for node, file in self._files.items()}
        self._open: dict[int, int] = {}
        self._positions: dict[int, int] = {}
        self._steps: list[Step] = []

    def _scan(self, path: str, node: int) -> None:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.path in self._ignored:
                continue
            inode = entry.inode()
            if entry.is_dir(follow_symlinks=False):
                below = self._new()
                self._directories[node][entry.name] = below
                self._directories[below] = {}
                self._scan(entry.path, below)
                continue
            assert entry.is_file(follow_symlinks=False), entry.path
            if inode not in self._nodes:
                self._nodes[inode] = self._new()
                self._files[self._nodes[inode]] = read(entry.path)
            self._directories[node][entry.name] = self._nodes[inode]

    def _new(self) -> int:
        self._next += 1
        return self._next - 1

    def recording(self) -> Recording:
        return Recording(*self._first, tuple(self._steps))

    # -- the calls -----------------------------------------------------------------------------------

    def take(self, name: str, arguments: list[str], result: int) -> None:
        method = getattr(self, f"_on_{_ALIASES.get(name, name)}", None)
        if method is None:
            raise AssertionError(f"a call that is not understood: {name}({', '.join(arguments)[:200]})")
        if name in _PATH_FIRST:
            arguments = ["AT_FDCWD", *arguments]
        if name in _TWO_PATHS:
            arguments = ["AT_FDCWD", arguments[0], "AT_FDCWD", *arguments[1:]]
        method(arguments, result)

    def _where(self, directory: str, path: str) -> tuple[int, str] | None:
        """Return a name's directory and itself. None: it is none of ours."""
        text = os.fsdecode(_bytes(path))
        if directory != "AT_FDCWD" and not os.path.isabs(text):
            below = self._open.get(int(directory))
            assert below is None or "/" not in text, "a path below a descriptor is not understood"
            return None if below is None else (below, text)
        text = os.path.normpath(text)
        if not text.startswith(self._root + "/") or any(
            text == each or text.startswith(each + "/") for each in self._ignored
        ):
            return None
        *above, name = text[len(self._root) + 1 :].split("/")
        node = ROOT
        for each in above:
            node = self._directories[node][each]
        return node, name

    def _at(self, directory: str, path: str) -> int | None:
        if os.path.normpath(os.fsdecode(_bytes(path))) == self._root:
            return ROOT
        if _bytes(path) == b"." and directory != "AT_FDCWD":
            return self._open.get(int(directory))
        where = self._where(directory, path)
        return None if where is None else self._directories[where[0]].get(where[1])

    def _name(self, *changes: tuple[int, str, int | None], makes: int | None = None) -> None:
        for directory, name, node in changes:
            if node is None:
                del self._directories[directory][name]
            else:
                self._directories[directory][name] = node
        self._steps.append(Names(changes, makes))

    def _on_openat(self, arguments: list[str], result: int) -> None:
        self._open.pop(result, None)
        where = self._where(arguments[0], arguments[1])
        node = self._at(arguments[0], arguments[1])
        flags = set(arguments[2].split("|"))
        assert "O_TMPFILE" not in flags, "files without names are not understood"
        if node is None and where is not None and "O_CREAT" in flags:
            node = self._new()
            self._sizes[node] = 0
            self._name((*where, node))
            self._attribute(node, MODE, b"%o" % (int(arguments[3], 8) & ~0o022))
        elif node is not None and "O_TRUNC" in flags:
            self._resize(node, 0)
        if node is not None:
            self._open[result] = node
            self._positions[result] = self._sizes[node] if "O_APPEND" in flags else 0

    def _on_close(self, arguments: list[str], _result: int) -> None:
        self._open.pop(int(arguments[0]), None)

    def _on_dup(self, arguments: list[str], result: int) -> None:
        self._open.pop(result, None)
        node = self._open.get(int(arguments[0]))
        if node is not None:
            # Of a file that is written through it, both descriptors would have one position.
            assert node in self._directories, "a descriptor of a file is doubled, which is not understood"
            self._open[result] = node

    def _on_fcntl(self, arguments: list[str], result: int) -> None:
        if arguments[1].startswith("F_DUPFD"):
            self._on_dup(arguments, result)

    def _on_lseek(self, arguments: list[str], result: int) -> None:
        self._positions[int(arguments[0])] = result

    def _on_write(self, arguments: list[str], result: int) -> None:
        fd = int(arguments[0])
        if fd in self._open:
            self._written(fd, _bytes(arguments[1])[:result], self._positions[fd])
            self._positions[fd] += result

    def _on_pwrite64(self, arguments: list[str], result: int) -> None:
        self._written(int(arguments[0]), _bytes(arguments[1])[:result], int(arguments[3]))

    def _on_writev(self, arguments: list[str], result: int) -> None:
        fd = int(arguments[0])
        if fd in self._open:
            self._written(fd, _vector(arguments[1])[:result], self._positions[fd])
            self._positions[fd] += result

    def _on_pwritev(self, arguments: list[str], result: int) -> None:
        self._written(int(arguments[0]), _vector(arguments[1])[:result], int(arguments[3]))

    def _written(self, fd: int, data: bytes, offset: int) -> None:
        node = self._open.get(fd)
        if node is not None:
            self._steps.extend(pieces(node, offset, data))
            self._sizes[node] = max(self._sizes[node], offset + len(data))

    def _resize(self, node: int, size: int) -> None:
        self._sizes[node] = size
        self._steps.append(Size(node, size, exact=True))

    def _on_ftruncate(self, arguments: list[str], _result: int) -> None:
        node = self._open.get(int(arguments[0]))
        if node is not None:
            self._resize(node, int(arguments[1]))

    def _on_truncate(self, arguments: list[str], _result: int) -> None:
        node = self._at(arguments[0], arguments[1])
        if node is not None:
            self._resize(node, int(arguments[2]))

    def _on_fallocate(self, arguments: list[str], _result: int) -> None:
        if int(arguments[0]) in self._open:
            assert arguments[1].startswith("FALLOC_FL_KEEP_SIZE"), arguments

    def _on_fsync(self, arguments: list[str], _result: int, *, attributes: bool = True) -> None:
        node = self._open.get(int(arguments[0]))
        if node in self._directories:
            assert node is not None
            self._steps.append(SyncDirectory(node))
        elif node is not None:
            self._steps.append(SyncFile(node, attributes))

    def _on_fdatasync(self, arguments: list[str], result: int) -> None:
        self._on_fsync(arguments, result, attributes=False)

    def _on_renameat(self, arguments: list[str], _result: int) -> None:
        source, target = self._where(*arguments[:2]), self._where(*arguments[2:4])
        if source is None and target is None:
            return
        assert source is not None and target is not None, "something moved into or out of the directory"
        node = self._directories[source[0]][source[1]]
        self._name((*target, node), (*source, None))

    def _on_linkat(self, arguments: list[str], _result: int) -> None:
        node, target = self._at(*arguments[:2]), self._where(*arguments[2:4])
        if target is not None:
            assert node is not None, "something was linked into the directory"
            self._name((*target, node))

    def _on_unlinkat(self, arguments: list[str], _result: int) -> None:
        text = os.fsdecode(_bytes(arguments[1]))
        if text.startswith(_MARK):
            self._steps.append(Mark(text.removeprefix(_MARK)))
            return
        where = self._where(*arguments[:2])
        if where is not None:
            self._name((*where, None))

    def _on_mkdirat(self, arguments: list[str], _result: int) -> None:
        where = self._where(*arguments[:2])
        if where is not None:
            node = self._new()
            self._directories[node] = {}
            self._sizes[node] = 0
            self._name((*where, node), makes=node)

    def _attribute(self, node: int | None, name: str, value: bytes | None) -> None:
        if node is not None and node not in self._directories:
            self._steps.append(Attribute(node, name, value))

    def _on_fsetxattr(self, arguments: list[str], _result: int) -> None:
        node = self._open.get(int(arguments[0]))
        self._attribute(node, os.fsdecode(_bytes(arguments[1])), _bytes(arguments[2]))

    def _on_fremovexattr(self, arguments: list[str], _result: int) -> None:
        self._attribute(self._open.get(int(arguments[0])), os.fsdecode(_bytes(arguments[1])), None)

    def _on_fchmod(self, arguments: list[str], _result: int) -> None:
        self._attribute(self._open.get(int(arguments[0])), MODE, b"%o" % int(arguments[1], 8))

    def _on_fchmodat(self, arguments: list[str], _result: int) -> None:
        self._attribute(self._at(*arguments[:2]), MODE, b"%o" % int(arguments[2], 8))

    def _on_ioctl(self, arguments: list[str], _result: int) -> None:
        assert "FICLONE" not in arguments[1], "run it where extents cannot be shared"

    def _on_mmap(self, arguments: list[str], _result: int) -> None:
        if "MAP_SHARED" in arguments[3] and "PROT_WRITE" in arguments[2]:
            assert int(arguments[4]) not in self._open, "a file is written through memory"

    def _on_clone(self, arguments: list[str], _result: int) -> None:
        assert "CLONE_THREAD" in " ".join(arguments), (
            "another process was started, whose files are not followed"
        )


def _vector(argument: str) -> bytes:
    return b"".join(_bytes(each) for each in re.findall(r'iov_base=("[^"]*")', argument))


#: Calls that mean the same as another.
_ALIASES = {
    "open": "openat",
    "dup2": "dup",
    "dup3": "dup",
    "pwritev2": "pwritev",
    "rename": "renameat",
    "renameat2": "renameat",
    "link": "linkat",
    "unlink": "unlinkat",
    "rmdir": "unlinkat",
    "mkdir": "mkdirat",
    "chmod": "fchmodat",
    "fork": "clone",
    "vfork": "clone",
    "clone3": "clone",
}
_PATH_FIRST = {"open", "unlink", "rmdir", "mkdir", "truncate", "chmod"}
_TWO_PATHS = {"rename", "link"}


def read(path: str | os.PathLike[str]) -> File:
    """Return a file as states have them."""
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    attributes[MODE] = b"%o" % (os.stat(path).st_mode & 0o7777)
    return File(pathlib.Path(path).read_bytes(), tuple(sorted(attributes.items())))
