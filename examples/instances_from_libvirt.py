#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Write the report of this host's instances, for ``imagecache cache verify --instances FILE``, from libvirt.

The report names every domain that libvirt has defined, running or not: uuid, host, the images that Nova noted
in the domain's metadata, and the names of the directories that its disks lie in. It is replaced in one step:
nobody reads half of one. Where libvirt does not answer the old report is removed: no report means that
nothing is evicted, and an old one would say that instances made since do not exist.

It needs ``virsh`` (Debian: libvirt-clients) and Python's own library, and connects read-only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

#: Namespaces of what Nova writes into a domain's metadata: nova/virt/libvirt/config.py.
NOVA = "{http://openstack.org/xmlns/libvirt/nova/1.1}"
OLD_NOVA = "{http://openstack.org/xmlns/libvirt/nova/1.0}"
#: Seconds that libvirt may take for one answer.
PATIENCE = 30


class ReportError(Exception):
    """The instances cannot be told; the text says why."""


class Libvirt:
    """libvirt's domains, by virsh.

    :param uri: which libvirt, such as ``qemu:///system``.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def uuids(self) -> list[str]:
        """Return the uuids of all domains, whatever their state."""
        return self._virsh("list", "--all", "--uuid").split()

    def description(self, uuid: str) -> ET.Element | None:
        """Return a domain's XML. None: it was undefined meanwhile."""
        try:
            return ET.fromstring(self._virsh("dumpxml", uuid))
        except ReportError:
            if uuid not in self.uuids():
                return None
            raise

    def _virsh(self, *words: str) -> str:
        command = ["virsh", "--quiet", "--readonly", "--connect", self._uri, *words]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        try:
            finished = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
                env=environment,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReportError(f"{' '.join(command)}: {error}") from error
        if finished.returncode:
            raise ReportError(f"{' '.join(command)}: {' '.join(finished.stderr.split())}")
        return finished.stdout


def instance(domain: ET.Element, host: str) -> dict[str, Any]:
    """Return a domain as an instance of the report."""
    uuid = domain.findtext("uuid") or ""
    if not uuid:
        raise ReportError("libvirt describes a domain without a uuid")
    found: dict[str, Any] = {"uuid": uuid, "host": host}
    if images := list(dict.fromkeys(_images(domain))):
        found["images"] = images
    if directories := sorted(set(_directories(domain)) - {uuid}):
        found["directories"] = directories
    return found


def _images(domain: ET.Element) -> Iterator[str]:
    for namespace in (NOVA, OLD_NOVA):
        for root in domain.iterfind(f"metadata/{namespace}instance/{namespace}root"):
            # The other type is a volume, whose id is no image's.
            if root.get("type") == "image" and root.get("uuid"):
                yield root.get("uuid", "")


def _directories(domain: ET.Element) -> Iterator[str]:
    """Yield the names of the directories that files of the domain lie in: Nova's is the uuid."""
    for source in domain.iterfind("devices/disk/source"):
        if source.get("file"):
            yield pathlib.PurePath(source.get("file", "")).parent.name


def report(libvirt: Libvirt, host: str) -> list[dict[str, Any]]:
    """Return the report.

    :raises ReportError: libvirt does not answer, or not understandably.
    """
    described = (libvirt.description(uuid) for uuid in libvirt.uuids())
    try:
        return [instance(domain, host) for domain in described if domain is not None]
    except ET.ParseError as error:
        raise ReportError(f"libvirt describes a domain in no XML: {error}") from error


def replace(path: pathlib.Path, text: str) -> None:
    """Give the file that content in one step, readable for all whatever the umask."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connect", default="qemu:///system", metavar="URI", help="default: %(default)s")
    parser.add_argument(
        "--host",
        default=socket.gethostname(),
        help="the host's name, as the option host of the cache has it (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="FILE")
    chosen = parser.parse_args()
    try:
        found = report(Libvirt(chosen.connect), chosen.host)
        replace(chosen.output, json.dumps(found, indent=1) + "\n")
    except (ReportError, OSError) as error:
        chosen.output.unlink(missing_ok=True)
        print(f"imagecache-instances: no report, so nothing is evicted: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
