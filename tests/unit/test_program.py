# SPDX-License-Identifier: Apache-2.0
"""An outside program: its limits, how it ended, and whose fault that was."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from typing import Any

from oslo_concurrency import processutils

from imagecache_lib import System, errors
from imagecache_lib.formats import program
from imagecache_lib.formats.program import DataRefused, Limits, NotStarted, StorageFailed
from imagecache_lib.model import CancelToken
from imagecache_lib.system.waiter import Waiter
from tests.support.no_threads import no_more_threads


class LaterCancelled:
    """A token of a caller that waits when the program starts, and not any more when it is looked at next."""

    def __init__(self) -> None:
        self._looks = 0

    def is_set(self) -> bool:
        self._looks += 1
        return self._looks > 1


def _script(script: str, *, wall: int = 60, cancel: CancelToken | None = None) -> str:
    return program.run(
        ("sh", "-c", script),
        limits=Limits(cpu=10, memory=2**31, wall=wall),
        waiter=Waiter(System(name="here"), cancel=cancel),
        program="qemu-img",
        subject="/disk",
        hidden=("/stage/1",),
    )


def _ends(pid: int) -> bool:
    """Whether a process of which nobody here is told has ended, or does so soon."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 10)[0])
    finally:
        os.close(process)


def _true(execute: Callable[..., tuple[str, str]], *words: str, cancel: CancelToken | None = None) -> str:
    return program.run(
        words or ("true",),
        limits=Limits(cpu=10, memory=2**31, wall=60),
        waiter=Waiter(System(name="here", execute=execute), cancel=cancel),
        program="qemu-img",
        subject="/disk",
    )


class TestEndings(unittest.TestCase):
    def test_success_yields_what_it_wrote(self) -> None:
        self.assertEqual("found\n", _script("echo found; echo noise >&2"))

    def test_what_it_says_of_the_data_is_the_fault_of_the_data(self) -> None:
        with self.assertRaises(DataRefused) as caught:
            _script("echo 'qemu-img: qemu-img: '\"'/stage/1' is broken\" >&2; echo 'Try this: x' >&2; exit 1")
        self.assertEqual("qemu-img: the file is broken", caught.exception.cause)

    def test_a_warning_that_there_is_no_timer_is_no_reason(self) -> None:
        warning = "timeout: warning: timer_create: Resource temporarily unavailable"
        with self.assertRaises(DataRefused) as caught:
            _script(f"echo '{warning}' >&2; echo \"qemu-img: '/stage/1' is broken\" >&2; exit 1")
        self.assertEqual("qemu-img: the file is broken", caught.exception.cause)
        with self.assertRaisesRegex(errors.BackendError, "no timer") as caught_alone:
            _script(f"echo 'qemu-img: no timer' >&2; echo '{warning}' >&2; exit 1")
        self.assertNotIsInstance(caught_alone.exception, DataRefused)

    def test_the_host_is_at_fault_for_its_own_limits_and_lacks(self) -> None:
        for script in (
            "kill -9 $$",
            "kill -XCPU $$",
            "kill -ABRT $$",
            "echo 'qemu-img: Cannot allocate memory' >&2; exit 1",
            "echo 'qemu-img: Could not open: Permission denied' >&2; exit 1",
            "while :; do :; done",
        ):
            with self.subTest(script=script), self.assertRaises(errors.BackendError) as caught:
                _script(f"ulimit -t 1; {script}")
            self.assertNotIsInstance(caught.exception, DataRefused)
            self.assertTrue(caught.exception.next_step)

    def test_the_host_is_at_fault_for_a_program_that_cannot_do_what_is_asked(self) -> None:
        for said in (
            "qemu-img: unrecognized option '--target-is-zero'",
            "qemu-img: invalid option -- 'W'",
            "qemu-img: Command not found: measure",
            "qemu-img: Unknown driver 'vhdx'",
            "qemu-img: Driver 'vhdx' is not whitelisted",
            "qemu-img: Block format 'vdi' does not support the option 'backing'",
            "qemu-img: /lib/libc.so.6: version `GLIBC_2.38' not found (required by qemu-img)",
            "qemu-img: Could not open 'json:{}': Can't allocate: Cannot allocate memory",
            "qemu-img: error while reading at byte 0: Remote I/O error",
            "qemu-img: Could not open the file: Required key not available",
        ):
            with self.subTest(said), self.assertRaises(errors.BackendError) as caught:
                _script(f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
            self.assertNotIsInstance(caught.exception, DataRefused)

    def test_nobody_says_that_the_data_are_bad_where_the_program_does_not(self) -> None:
        for script in ("exit 1", "exit 3", "echo 'sh: fork: retry' >&2; exit 1", "exit 255"):
            with self.subTest(script), self.assertRaises(errors.BackendError) as caught:
                _script(script)
            self.assertNotIsInstance(caught.exception, DataRefused)

    def test_a_name_that_an_image_has_does_not_accuse_the_host(self) -> None:
        for name in ("No space left on device", "Permission denied", "Input/output error", "/timed out/1"):
            said = f"qemu-img: Could not open '/stage/1': Bitmap '{name}' is broken"
            with self.subTest(name), self.assertRaises(DataRefused) as caught:
                _script(f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
            self.assertIn(name, caught.exception.cause)

    def test_nor_does_a_name_that_is_written_as_if_it_ended_before(self) -> None:
        for name in ("a' : Permission denied 'b", "a: Permission denied\nb", "a\nqemu-img: Out of memory"):
            said = f"qemu-img: Could not open '/stage/1': Bitmap '{name}' doesn't satisfy the constraints"
            with self.subTest(name), self.assertRaises(DataRefused):
                _script(f"cat >&2 <<'END'\n{said}\nEND\nexit 1")

    def test_a_warning_is_not_what_went_wrong(self) -> None:
        script = (
            "yes 'qemu-img: warning: it is old' | head -9999 >&2; echo 'qemu-img: it is broken' >&2; exit 1"
        )
        with self.assertRaises(DataRefused) as caught:
            _script(script)
        self.assertEqual("qemu-img: it is broken", caught.exception.cause)

    def test_what_an_image_chose_is_shown_within_bounds_and_can_be_shown_anywhere(self) -> None:
        for said in ("\\033[2J\\007", "b\\374ro", "a\\000b", "%9000s' 'x"):
            with self.subTest(said), self.assertRaises(DataRefused) as caught:
                _script(f"printf 'qemu-img: {said}\\n' >&2; exit 1")
            shown = caught.exception.cause
            self.assertTrue(shown.encode() and shown.isprintable())
            self.assertLess(len(shown), 600)

    def test_megabytes_are_no_matter(self) -> None:
        script = (
            "head -c 5000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo 'qemu-img: it is broken' >&2; exit 1"
        )
        with self.assertRaisesRegex(DataRefused, "it is broken"):
            _script(script)

    def test_what_it_says_and_writes_takes_a_bounded_part_of_memory(self) -> None:
        asks = (
            "import re, sys; from tests.unit.test_program import _script, DataRefused\n"
            "try: _script(sys.argv[1]); print('no error')\n"
            "except DataRefused as error: print(error.cause)\n"
            # What getrusage(2) tells counts the process that this one was forked from.
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
        )
        much = "yes 'qemu-img: warning: it is old' | head -n 10000000"
        for script, expected in (
            (f"echo 'qemu-img: first' >&2; {much} >&2; echo 'qemu-img: last' >&2; exit 1", "qemu-img: first"),
            (f"{much} >&2; echo 'qemu-img: last' >&2; exit 1", "qemu-img: last"),
            (f"{much} >&2", "no error"),
            (much, "qemu-img: it wrote more than 4.0 MiB"),
            (f"{much}; echo 'qemu-img: last' >&2; exit 1", "qemu-img: last"),
        ):
            with self.subTest(script):
                command = [sys.executable, "-c", asks, script]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
                self.assertEqual(expected, said[0])
                self.assertLess(int(said[1]), 150)  # MiB, most of which is Python's own

    def test_as_much_as_an_image_may_make_it_write_comes_whole(self) -> None:
        self.assertEqual("x" * 2**22, _script(f"head -c {2**22} /dev/zero | tr '\\0' x"))

    def test_a_line_that_was_cut_in_the_middle_is_none(self) -> None:
        for number in range(12):
            script = f"yes 'qemu-img: {'x' * number}warning: x' | head -c 1000000 >&2; exit 1"
            with self.subTest(number), self.assertRaises(DataRefused) as caught:
                _script(script)
            self.assertEqual(f"qemu-img: {'x' * number}warning: x", caught.exception.cause)

    def test_output_that_nothing_could_read_is_not_taken_for_none(self) -> None:
        programs = self.enterContext(tempfile.TemporaryDirectory())
        for name in ("prlimit", "timeout", "sh", "true", "cat", "tail"):
            os.symlink(shutil.which(name) or "", os.path.join(programs, name))
        before = os.environ["PATH"]
        os.environ["PATH"] = programs
        try:
            with self.assertRaisesRegex(errors.BackendError, "how it ended is not known"):
                _true(processutils.execute)
        finally:
            os.environ["PATH"] = before

    def test_a_hard_limit_of_the_service_that_is_lower_counts(self) -> None:
        asks = "from tests.unit.test_program import _script; print(_script('ulimit -t; ulimit -v'))"
        memory = 3 * 2**29
        limited = ("prlimit", "--cpu=5", f"--as={memory}", "--", sys.executable, "-c", asks)
        said = subprocess.run(limited, capture_output=True, text=True, check=True).stdout
        self.assertEqual(["5", str(memory // 1024)], said.split())

    def test_it_leaves_no_core_file(self) -> None:
        asks = "from tests.unit.test_program import _script; print(_script('ulimit -S -c; ulimit -H -c'))"
        allowed = ("prlimit", "--core=1048576", "--", sys.executable, "-c", asks)
        said = subprocess.run(allowed, capture_output=True, text=True, check=True).stdout
        self.assertEqual(["0", "0"], said.split())

    def test_the_host_is_at_fault_where_it_allows_no_more_programs(self) -> None:
        for number, kind in (
            (errno.EMFILE, NotStarted),
            (errno.EAGAIN, NotStarted),
            (errno.ENOMEM, NotStarted),
            (errno.ENOENT, errors.ConfigError),
        ):

            def execute(*_command: str, number: int = number, **_options: Any) -> tuple[str, str]:
                raise OSError(number, os.strerror(number))

            with self.subTest(errno.errorcode[number]), self.assertRaises(errors.ImageCacheError) as caught:
                _true(execute)
            self.assertIs(kind, type(caught.exception))

    def test_a_program_that_cannot_be_watched_is_not_started(self) -> None:
        started: list[tuple[str, ...]] = []

        def execute(*command: str, **options: Any) -> tuple[str, str]:
            started.append(command)
            return processutils.execute(*command, **options)

        with no_more_threads(), self.assertRaisesRegex(errors.BackendError, "no thread can be started"):
            _true(execute)
        self.assertEqual([], started)
        self.assertEqual("", _true(execute))

    def test_a_caller_that_stops_waiting_while_it_is_started_ends_it(self) -> None:
        cancel = threading.Event()

        def execute(*command: str, **options: Any) -> tuple[str, str]:
            cancel.set()
            while any(each.name == "imagecache-watch" for each in threading.enumerate()):
                time.sleep(0.01)
            return processutils.execute(*command, **options)

        began = time.monotonic()
        with self.assertRaises(errors.CancelledError):
            _true(execute, "sleep", "600", cancel=cancel)
        self.assertLess(time.monotonic() - began, 60)

    def test_what_runs_the_program_is_quoted_where_it_fails(self) -> None:
        def execute(prlimit: str, *words: str, **options: Any) -> tuple[str, str]:
            return processutils.execute(prlimit, "--as=nonsense", *words, **options)

        with self.assertRaisesRegex(errors.BackendError, "prlimit.*AS"):
            program.run(
                ("true",),
                limits=Limits(cpu=10, memory=2**31, wall=60),
                waiter=Waiter(System(name="here", execute=execute)),
                program="qemu-img",
                subject="/disk",
            )

    def test_the_disk_is_told_from_the_rest(self) -> None:
        with self.assertRaises(StorageFailed):
            _script("echo 'qemu-img: Input/output error' >&2; exit 1")
        with self.assertRaises(StorageFailed):
            _script("echo 'qemu-img: error while reading: Structure needs cleaning' >&2; exit 1")
        with self.assertRaises(errors.NoSpaceError):
            _script("echo 'qemu-img: No space left on device' >&2; exit 1")

    def test_a_library_that_a_limit_keeps_from_being_loaded_is_installed(self) -> None:
        said = "qemu-img: error while loading shared libraries: libz.so.1: cannot open shared object file"
        for why in ("Error 24", "Too many open files", "Cannot allocate memory"):
            with self.subTest(why), self.assertRaisesRegex(errors.BackendError, f"{why}.* limits"):
                _script(f"echo '{said}: {why}' >&2; exit 127")

    def test_what_can_be_no_argument_is_not_given_to_a_program(self) -> None:
        for word in ("a\0b", "\ud800"):
            with self.subTest(repr(word)), self.assertRaisesRegex(errors.BackendError, "no argument"):
                _true(processutils.execute, "echo", word)

    def test_text_reaches_a_program_in_utf_8_whatever_the_locale(self) -> None:
        asks = (
            "from tests.unit.test_program import _script, _true, processutils; import sys, os;"
            "from imagecache_lib.formats.disk_file import DiskFile;"
            "from imagecache_lib.system.arguments import in_utf8;"
            "assert sys.getfilesystemencoding() == 'ascii';"
            "print(ascii(_true(processutils.execute, 'printf', '%s', in_utf8('B\\xfcro'))));"
            "print(DiskFile(os.fsdecode(b'/B\\xc3\\xbcro'), 'raw').to_option())"
        )
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment = {**os.environ, **locale}
        command = [sys.executable, "-c", asks]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        self.assertIn("B\\udcc3\\udcbcro", said)
        self.assertIn("/B\\u00fcro", said)

    def test_a_program_that_is_not_there_is_a_matter_of_the_set_up(self) -> None:
        for script in ("exec no-such-program", "exit 127"):
            with self.assertRaises(errors.ConfigError):
                _script(script)

    def test_it_ends_at_the_limit_by_the_clock(self) -> None:
        began = time.monotonic()
        with self.assertRaises(errors.BackendError) as caught:
            _script("sleep 60", wall=1)
        self.assertIn("1 seconds", caught.exception.cause)
        self.assertLess(time.monotonic() - began, 20)

    def test_what_blocks_the_signal_to_end_is_ended_too(self) -> None:
        """The shell ends, and timeout(1) with it; what the shell ran would go on, and nobody know of it."""
        with tempfile.NamedTemporaryFile("r", encoding="ascii") as told:
            with self.assertRaisesRegex(errors.BackendError, "after 1 seconds"):
                script = f"exec >/dev/null 2>&1; trap '' TERM; echo $$ >{told.name}; sleep 60; sleep 60"
                _script(script, wall=1)
            self.assertTrue(_ends(int(told.read())))

    def test_killed_before_its_limit_it_is_not_said_to_have_come_to_that(self) -> None:
        with self.assertRaisesRegex(errors.BackendError, "ended by SIGKILL"):
            _script("kill -9 0")

    def test_it_ends_with_all_its_children_when_nobody_waits(self) -> None:
        began = time.monotonic()
        with self.assertRaises(errors.CancelledError):
            _script("sleep 60 & wait", cancel=LaterCancelled())
        self.assertLess(time.monotonic() - began, 20)

    def test_an_interrupt_ends_it_and_comes_out(self) -> None:
        started: list[subprocess.Popen[bytes]] = []

        def interrupted(
            *command: str, on_execute: Callable[[Any], None], **_options: object
        ) -> tuple[str, str]:
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            on_execute(started[0])
            raise KeyboardInterrupt

        waiter = Waiter(System(name="here", execute=interrupted))
        with self.assertRaises(KeyboardInterrupt):
            program.run(
                ("sleep", "1000"),
                limits=Limits(cpu=10, memory=2**31, wall=2000),
                waiter=waiter,
                program="sleep",
                subject="/disk",
            )
        self.assertLess(started[0].wait(timeout=60), 0)

    def test_it_is_known_how_it_ended_where_child_signals_are_ignored(self) -> None:
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            self.assertEqual("found\n", _script("echo found"))
            with self.assertRaises(DataRefused):
                _script("echo 'qemu-img: broken' >&2; exit 1")
            with self.assertRaises(errors.BackendError):
                _script("kill -9 $$")
        finally:
            signal.signal(signal.SIGCHLD, before)

    def test_an_ending_that_nobody_saw_is_a_failure(self) -> None:
        def execute(*_command: str, **_options: object) -> tuple[str, str]:
            return "", "qemu-img: all is well\n"  # the status that Python makes up is 0

        with self.assertRaises(errors.BackendError) as caught:
            program.run(
                ("qemu-img",),
                limits=Limits(1, 1, 1),
                waiter=Waiter(System(name="here", execute=execute)),
                program="qemu-img",
                subject="/disk",
            )
        self.assertIn("not known", caught.exception.cause)

    def test_what_is_said_behind_the_ending_does_not_hide_it(self) -> None:
        def execute(*command: str, **options: Any) -> tuple[str, str]:
            out, err = processutils.execute(*command, **options)
            return out, f"{err}a library of the shell has something to say, 1\n"

        self.assertEqual("", _true(execute))
        with self.assertRaisesRegex(errors.BackendError, "does not say why"):
            _true(execute, "false")

    def test_no_output_can_pass_for_an_ending(self) -> None:
        script = (
            f'{sys.executable} -c \'import sys; sys.stderr.write("\\n" + "0" * 32 + " 0\\n")\'; kill -9 $$'
        )
        with self.assertRaises(errors.BackendError):
            _script(script)
