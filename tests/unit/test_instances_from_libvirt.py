# SPDX-License-Identifier: Apache-2.0
"""The report that the example makes of libvirt's domains is one that the command reads, and a whole one."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from imagecache_lib.cli.instance_report import read_instances

PROGRAM = pathlib.Path(__file__).parents[2] / "examples/instances_from_libvirt.py"
UUID, IMAGE = "6c0d9a6e-5a10-4ac7-9f3c-7a1f5d1f0c11", "11111111-2222-3333-4444-555555555555"
DOMAIN = f"""<domain type='kvm'><name>instance-00000001</name><uuid>{UUID}</uuid>
<metadata><nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
<nova:root type="image" uuid="{IMAGE}"/></nova:instance></metadata>
<devices><disk type='file'><source file='/var/lib/nova/instances/old-name/disk'/></disk>
<disk type='block'><source dev='/dev/vg/volume'/></disk></devices></domain>"""

#: Stands for virsh, which takes its answers from files.
VIRSH = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do [ "$1" = --connect ] && shift; shift; done
exec cat "$ANSWERS/$1"
"""


class TestReport(unittest.TestCase):
    def setUp(self) -> None:
        self.home = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.home / "virsh").write_text(VIRSH)
        (self.home / "virsh").chmod(0o755)
        self.output = self.home / "run" / "instances.json"
        self.output.parent.mkdir()

    def answer(self, command: str, text: str) -> None:
        (self.home / command).write_text(text)

    def run_it(self) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{self.home}:{os.environ['PATH']}", "ANSWERS": str(self.home)}
        command: list[str | pathlib.Path] = [
            sys.executable,
            PROGRAM,
            "--host",
            "compute-7",
            "--output",
            self.output,
        ]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def test_a_domain_is_reported_with_its_image_and_its_directory(self) -> None:
        self.answer("list", f"{UUID}\n\n")
        self.answer("dumpxml", DOMAIN)
        self.assertEqual((0, ""), (self.run_it().returncode, self.run_it().stderr))
        (found,) = read_instances(str(self.output)) or ()
        self.assertEqual((UUID, "compute-7"), (found.uuid, found.host))
        self.assertEqual(((IMAGE,), ("old-name",)), (found.images, found.directories))
        self.assertEqual(["instances.json"], os.listdir(self.output.parent))

    def test_no_domain_is_an_empty_report(self) -> None:
        self.answer("list", "\n")
        self.run_it()
        self.assertEqual([], json.loads(self.output.read_text()))

    def test_a_domain_that_is_undefined_meanwhile_is_passed_over(self) -> None:
        self.answer("list", "")
        virsh = self.home / "virsh"
        # The first list names it, later ones do not, and it has no description.
        virsh.write_text(
            "#!/bin/sh\ncase $* in *list*) cat $ANSWERS/list; : > $ANSWERS/list;; *) exit 1; esac\n"
        )
        self.answer("list", f"{UUID}\n")
        self.assertEqual(0, self.run_it().returncode)
        self.assertEqual([], json.loads(self.output.read_text()))

    def test_a_libvirt_that_does_not_answer_leaves_no_old_report(self) -> None:
        self.output.write_text("[]")
        finished = self.run_it()
        self.assertEqual(1, finished.returncode)
        self.assertIn("no report, so nothing is evicted", finished.stderr)
        self.assertFalse(self.output.exists())

    def test_a_domain_that_cannot_be_read_is_not_left_out_of_the_report(self) -> None:
        self.answer("list", f"{UUID}\n")
        self.answer("dumpxml", "<domain>")
        self.assertEqual(1, self.run_it().returncode)
        self.assertFalse(self.output.exists())
