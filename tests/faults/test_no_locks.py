# SPDX-License-Identifier: Apache-2.0
"""A filesystem that has no locks, as an NFS server without lockd: everything works, and more work is done."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

from tests.support import needs

#: fcntl(2) for the OFD commands of linux/fcntl.h, 36 to 38; everything else goes on to libc.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#define SHIM(name) int name(int fd, int cmd, ...) { \
    va_list list; va_start(list, cmd); void *arg = va_arg(list, void *); va_end(list); \
    if (cmd >= 36 && cmd <= 38) { errno = ENOLCK; return -1; } \
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(fd, cmd, arg); }
SHIM(fcntl)
SHIM(fcntl64)
"""

PROGRAM = """
import json, os, sys, time
import imagecache_lib as ic
from imagecache_lib.testing.sources import FakeSource
instances = sys.argv[1]
source = FakeSource({"one": os.urandom(2**20), "two": os.urandom(2**20)})
# The second has no size, so that its reservation is raised as it comes.
unsized = FakeSource({"two": os.urandom(2**20)}, sizes=False)
config = ic.CacheConfig(instances_path=instances, remove_unused_original_minimum_age_seconds=0)
manager = ic.ImageCacheManager(config, source)
manager.create_disk("one", f"{instances}/uuid/disk")
manager.cache_image("two", request=ic.Request(source=unsized))
left = f"{instances}/_base/.imagecache/stage/{'0' * 32}"
open(left, "w").close()
os.utime(left, (time.time() - 7200,) * 2)
report = manager.verify_base_images([])
print(json.dumps([[base.image_id for base in report.evicted], os.path.exists(left)]))
"""


def test_spawn_and_upkeep_need_no_locks(tmp_path: pathlib.Path) -> None:
    shim = tmp_path / "no_locks.so"
    command = [needs.program("cc"), "-shared", "-fPIC", "-xc", "-", "-o", str(shim), "-ldl"]
    subprocess.run(command, input=SHIM, text=True, check=True)
    instances = tmp_path / "instances"
    (instances / "uuid").mkdir(parents=True)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, instances],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "No locks available" in run.stderr
    assert json.loads(run.stdout) == [["two"], False]
