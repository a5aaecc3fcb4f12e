# SPDX-License-Identifier: Apache-2.0
"""A kernel in a few hundred bytes, which shows what it was booted with.

QEMU boots it as any Multiboot kernel (``-kernel``, ``-initrd``, ``-append``). On the first serial port
``KERNEL``, its command line, and the text in its ramdisk, and idles.
"""

from __future__ import annotations

import struct

_LOAD_AT = 0x100000
_MAGIC = 0x1BADB002
#: The header says where to load the file, so that it need not be ELF.
_ADDRESSES = 0x10000
_STACK = 0x90000
_HEADER_BYTES = 32
_GREETING = b"\r\nKERNEL \0"


def kernel() -> bytes:
    """Return the kernel. Its entry finds the Multiboot information in EBX, in flat protected mode."""
    entry = _LOAD_AT + _HEADER_BYTES
    # call print: the offset counts from the instruction after it, filled in below.
    start = b"".join(
        (
            b"\xbc" + struct.pack("<I", _STACK),  # mov esp, stack
            b"\xbe",
            b"GREE",  # mov esi, greeting
            b"\xe8",
            b"CALL",  # call print
            b"\x8b\x73\x10",  # mov esi, [ebx + 16]: the command line
            b"\xe8",
            b"CALL",
            b"\x83\x7b\x14\x00\x74\x0b",  # cmp dword [ebx + 20], 0; jz end: no modules
            b"\x8b\x43\x18",  # mov eax, [ebx + 24]: the table of modules
            b"\x8b\x70\x00",  # mov esi, [eax + 0]: the first one's start
            b"\xe8",
            b"CALL",
            b"\xfa\xf4\xeb\xfd",  # end: cli; hlt; jmp back
        )
    )
    printing = b"\x66\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf4\xc3"  # print: mov dx, 3F8h; lodsb; ...; ret
    while (at := start.find(b"CALL")) >= 0:
        start = start[:at] + struct.pack("<i", len(start) - at - 4) + start[at + 4 :]
    code = start + printing
    code = code.replace(b"GREE", struct.pack("<I", entry + len(code))) + _GREETING
    end = entry + len(code)
    header = struct.pack(
        "<8I", _MAGIC, _ADDRESSES, -(_MAGIC + _ADDRESSES) & 0xFFFFFFFF, _LOAD_AT, _LOAD_AT, end, end, entry
    )
    return header + code


def ramdisk(text: str) -> bytes:
    """Return a ramdisk with a text in it, as :func:`kernel` wants it."""
    return b"\r\nRAMDISK " + text.encode() + b"\r\n\0"
