# SPDX-License-Identifier: Apache-2.0
"""The Debian package is built, and dpkg installs it, into a copy of this machine that goes with the test."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from tests.support import needs

ROOT = pathlib.Path(__file__).parents[2]

#: What it depends on is a matter for apt; here the command needs only what is there.
_INSTALL = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --bind /dev "$1/root/dev"
cp "$2" "$1/root/tmp/imagecache.deb"
chroot "$1/root" bash -ec '
    cd /
    dpkg --install --force-depends /tmp/imagecache.deb
    find /opt/imagecache -name "manager.*.pyc" -printf "compiled: %f\\n"
    mkdir -p /srv/cache
    head -c 1M /dev/urandom > /srv/image
    imagecache --version
    imagecache --instances-path /srv/cache image cache demo --file /srv/image
    imagecache --instances-path /srv/cache image list
    ls /lib/systemd/system /usr/share/imagecache/monitoring
    find /etc/systemd/system -name "imagecache*" -printf "enabled: %p\\n"
    dpkg --purge imagecache
    if [ -e /opt/imagecache ]; then echo left behind; fi
'
"""


def test_it_installs_works_enables_nothing_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    needs.root()
    for program in ("dpkg-buildpackage", "dh", "unshare"):
        needs.program(program)
    # What is tried here is not how small it can be packed, which takes as long as everything else.
    environment = {**os.environ, "DEB_BUILD_PROFILES": "pkg.imagecache-lib.unpacked"}
    subprocess.run([ROOT / "tools/build-deb", sys.prefix, tmp_path], cwd=ROOT, env=environment, check=True)
    (package,) = tmp_path.glob("imagecache_*.deb")
    assert list(tmp_path.glob("*.dsc"))
    (tmp_path / "tree").mkdir()
    # Where an operator installs it Python writes what it compiles, which must go with the package.
    unset = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    done = subprocess.run(
        [*namespaces, "bash", "-c", _INSTALL, "-", str(tmp_path / "tree"), str(package)],
        env=unset,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "compiled: manager." in said
    assert "demo" in said and "young" in said
    assert {"imagecache-agent.service", "imagecache-scrub.timer", "rules.yml"} <= set(said.split())
    assert "enabled:" not in said
    assert "left behind" not in said
