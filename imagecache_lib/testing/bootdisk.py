# SPDX-License-Identifier: Apache-2.0
"""A disk that boots in a tenth of a second and says so: for tests and demonstrations without a guest OS.

Its boot sector prints ``HELLO BOOT n`` on the first serial port, where ``n`` is a digit kept in the disk's
second sector, counts the digit up on the disk and resets the machine. Run it with ``-no-reboot``: QEMU then
flushes the disk and exits 0. With an overlay, the count goes to the overlay and the base stays as it was.

One that stays prints ``BOOT n`` with the new count, once that is on the disk, and idles.
"""

from __future__ import annotations

import os

SECTOR = 512
_ORIGIN = 0x7C00
_COUNTER = 0x8000
_GREETING_AT = 0x100
_COUNTER_TEXT = b"BOOT 0\r\n\0"
_SERIAL_PORT = 0x3F8

_PARTITIONS_AT = 0x1BE
#: Bootable, of type 83h (Linux), from the second sector on, 2,047 sectors.
_PARTITION = bytes.fromhex("80000200 83000200 01000000 ff070000")

#: mov al, FEh; out 64h, al: the keyboard controller resets the machine.
_RESET = b"\xb0\xfe\xe6\x64"


def boot_command(disk: str, disk_format: str) -> list[str]:
    """Return the command that boots the disk without KVM, prints what it says, and exits 0.

    :param disk: path; a comma in it is escaped as QEMU wants it.
    :param disk_format: QEMU's name of its format.
    """
    drive = f"file={disk.replace(',', ',,')},format={disk_format},if=ide"
    return [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "64",
        "-display",
        "none",
        "-nodefaults",
        "-no-reboot",
        "-serial",
        "stdio",
        "-drive",
        drive,
    ]


def write_boot_disk(path: str, size_mb: int = 4, *, greeting: str = "HELLO", stays: bool = False) -> None:
    """Write a raw, sparse boot disk.

    :param path: of the file; an existing one is replaced.
    :param size_mb: its size in MiB, at least 1.
    :param greeting: what it says first: at most 32 ASCII characters.
    :param stays: idle at the end, instead of resetting the machine.
    :raises OSError: it cannot be written.
    """
    with open(path, "wb") as disk:
        disk.write(_boot_sector(f"{greeting} ".encode("ascii"), stays=stays))
        disk.write(_COUNTER_TEXT.ljust(SECTOR, b"\0"))
        disk.truncate(size_mb * 2**20)
        disk.flush()
        os.fsync(disk.fileno())


def _boot_sector(greeting: bytes, *, stays: bool) -> bytes:
    """Assemble the 16-bit code. The BIOS loads it at 7C00h with the drive's number in DL."""
    digit = _COUNTER + _COUNTER_TEXT.index(b"0")
    code = b"".join(
        (
            b"\xfa",  # cli: no interrupt while there is no stack
            b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0",  # xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
            b"\xbc" + _ORIGIN.to_bytes(2, "little"),  # mov sp, 7C00h
            b"\x52\xfb",  # push dx; sti
            _disk_access(0x02),
            _print(_ORIGIN + _GREETING_AT),
            _print(_COUNTER),
            b"\xfe\x06" + digit.to_bytes(2, "little"),  # inc byte [digit]
            b"\x5a",  # pop dx
            _disk_access(0x03),
            _print(_COUNTER) if stays else _RESET,
            b"\xf4\xeb\xfd",  # hlt; jmp back
        )
    )
    sector = code.ljust(_GREETING_AT, b"\0") + greeting + b"\0"
    # An inspection of images takes a boot sector without a partition for a broken one.
    return sector.ljust(_PARTITIONS_AT, b"\0") + _PARTITION.ljust(64, b"\0") + b"\x55\xaa"


def _disk_access(function: int) -> bytes:
    """Int 13h on the second sector (cylinder 0, sector 2, head 0): function 2 reads, 3 writes."""
    return (
        b"\xb8\x01"
        + bytes((function,))  # mov ax, function << 8 | 1 sector
        + b"\xbb"
        + _COUNTER.to_bytes(2, "little")  # mov bx, buffer
        + b"\xb9\x02\x00\xb6\x00\xcd\x13"  # mov cx, 2; mov dh, 0; int 13h
    )


def _print(address: int) -> bytes:
    """Send a zero-terminated text to the serial port."""
    return (
        b"\xbe"
        + address.to_bytes(2, "little")  # mov si, text
        + b"\xba"
        + _SERIAL_PORT.to_bytes(2, "little")  # mov dx, port
        + b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # next: lodsb; test al, al; jz end; out dx, al; jmp next
    )
