# SPDX-License-Identifier: Apache-2.0
"""The adapter's wheel in Nova's environment: it is loaded as Nova loads a driver, and makes real disks."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

import imagecache_lib
from tests.lab import bindings
from tests.lab import ceph as ceph_lab
from tests.lab import glance as glance_lab
from tests.lab.environment import environment

LAB = pathlib.Path(__file__).parent.parent / "lab"
SOURCES = pathlib.Path(imagecache_lib.__file__).parent.parent
#: Test cases of tests/lab.
SUITES = (
    "nova_files.Qcow2Disks",
    "nova_files.FlatDisks",
    "nova_files.LvmDisks",
    "nova_files.FetchToRaw",
    "nova_files.ImageCache",
    "nova_files.Concurrency",
    "nova_certificates.Certificates",
    "nova_situations.Situations",
    "nova_operators.Operators",
)


def run(*command: str | os.PathLike[str], **environment: str) -> str:
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def nova(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A Python with Nova, into which both wheels were installed as an operator does it."""
    made = environment("nova-suites", LAB / "nova-suites-requirements.txt")
    # Beside the original, since its files are linked: there are some ten thousand, of which pip changes none.
    with tempfile.TemporaryDirectory(prefix="nova-", dir=made.parent) as name:
        work = pathlib.Path(name)
        shutil.copytree(made, work / "venv", symlinks=True, copy_function=_link)
        ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "tests", "doc", "releasenotes")
        # Building leaves files beside the sources.
        shutil.copytree(SOURCES, work / "library", ignore=ignored)
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work / "wheels")
        run(*pip, work / "library", PBR_VERSION="99")
        run(*pip, work / "library/integrations/nova")
        wheels = sorted((work / "wheels").glob("*.whl"))
        assert [wheel.name.split("-")[0] for wheel in wheels] == ["imagecache_lib", "imagecache_lib_nova"]
        python = work / "venv/bin/python"
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *wheels)
        (site,) = (work / "venv/lib").glob("python3.*/site-packages")
        bindings.link(site, "python3-libvirt", ["libvirt", "libvirtmod"])
        bindings.link(site, "python3-rados", ["rados"])
        bindings.link(site, "python3-rbd", ["rbd"])
        yield python


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


Loaded = subprocess.CompletedProcess[str]

LOADED = """
import warnings; warnings.simplefilter("ignore")
from nova import monkey_patch; monkey_patch.patch(backend="threading")
import nova.conf
from nova import config, objects
from nova.virt import driver, fake
from nova.virt.libvirt import driver as theirs
config.parse_args(["nova-compute", "--config-file", CONFIGURATION])
objects.register_all()
loaded = driver.load_compute_driver(fake.FakeVirtAPI())
from nova.virt import imagecachelib
assert type(loaded) is imagecachelib.LibvirtDriver and isinstance(loaded, theirs.LibvirtDriver)
print(imagecachelib.__file__)
print(type(loaded.image_backend).__module__, type(loaded.image_cache_manager).__module__)
"""


def load(
    nova: pathlib.Path, tmp_path: pathlib.Path, options: str, before: str = "", **environment: str
) -> Loaded:
    """Start a process that loads the driver that nova.conf names, and ends."""
    configuration = tmp_path / "nova.conf"
    configuration.write_text(
        f"[DEFAULT]\ncompute_driver = imagecachelib.LibvirtDriver\nstate_path = {tmp_path}\n{options}"
    )
    script = before + LOADED.replace("CONFIGURATION", repr(str(configuration)))
    return subprocess.run(
        [nova, "-I", "-c", script + "import os, sys; sys.stdout.flush(); os._exit(0)"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_nova_loads_the_driver_that_its_configuration_names(
    nova: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = load(nova, tmp_path, "")
    assert done.returncode == 0, done.stderr[-3000:]
    where, *modules = done.stdout.split()
    assert pathlib.Path(where).is_relative_to(nova.parent.parent)
    assert modules == ["nova.virt.imagecachelib.images", "nova.virt.imagecachelib.upkeep"]
    # Nothing runs at the start of every Python of the environment.
    assert not [each for each in nova.parent.parent.rglob("*.pth") if "imagecache" in each.read_text()]


_CLONES = "[libvirt]\nimages_type = rbd\n[workarounds]\nnever_download_image_if_on_rbd = true\n[glance]\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            f"{_CLONES}verify_glance_signatures = true\n",
            ("never_download_image_if_on_rbd", "verify_glance_signatures"),
        ),
        (
            f"{_CLONES}enable_certificate_validation = true\n",
            ("never_download_image_if_on_rbd", "enable_certificate_validation"),
        ),
        ("force_raw_images = false\n[libvirt]\nimages_type = rbd\n", ("images_type", "force_raw_images")),
        ("[image_cache]\ndisk_roots = /srv/disks\n", ("disk_roots", "instances_path")),
        (
            "[image_cache]\nfree_space_low = 1000\nfree_space_high = 10\n",
            ("free_space_high", "free_space_low"),
        ),
        ("[image_cache]\nsubdirectory_name = bases/of/images\n", ("subdirectory_name", "bases/of/images")),
    ],
)
def test_options_that_cannot_work_are_refused_by_their_names(
    nova: pathlib.Path, tmp_path: pathlib.Path, options: str, named: tuple[str, str]
) -> None:
    done = load(nova, tmp_path, options)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("imagecache_lib.errors.ConfigError"), done.stderr[-3000:]
    assert all(name in last for name in named), last


def test_a_process_that_eventlet_patched_is_refused(nova: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = load(nova, tmp_path, "", OS_NOVA_DISABLE_EVENTLET_PATCHING="false")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError" in last and "eventlet" in last and "concurrency_backend" in last, done.stderr[-3000:]


def test_a_release_of_nova_that_was_not_tested_is_refused_unless_an_option_allows_it(
    nova: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    later = "from nova import version; version.version_string = lambda: '35.1.0'\n"
    done = load(nova, tmp_path, "", later)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError" in last and "35.1.0" in last and "allow_untested_nova" in last, done.stderr[-3000:]
    done = load(nova, tmp_path, "[image_cache]\nallow_untested_nova = true\n", later)
    assert done.returncode == 0, done.stderr[-3000:]


def documented(heading: str) -> list[str]:
    """Return the commands that an operator is shown first below a heading of the page on Nova."""
    page = (SOURCES / "doc/source/admin/with-nova.rst").read_text()
    section = page.partition(f"\n{heading}\n{'-' * len(heading)}\n")[2]
    block = section.partition("::\n\n")[2].splitlines()
    shown = itertools.takewhile(lambda line: not line or line.startswith("    "), block)
    return [line.removeprefix("    ") for line in shown]


def test_the_documented_package_has_what_the_driver_needs_and_nothing_of_novas(
    nova: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    make_wheels, *commands = documented("From a distribution package")
    assert make_wheels.startswith("pip wheel ")  # which made those that are installed
    shutil.copytree(nova.parents[2] / "wheels", tmp_path / "wheels")
    script = "set -eu\n" + "\n".join(commands)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    (package,) = tmp_path.glob("*.deb")
    root = tmp_path / "root"
    run("dpkg-deb", "-x", package, root)
    packages = root / "usr/lib/python3/dist-packages"
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    places = "(imagecache_lib|nova/virt/imagecachelib|imagecache_lib(_nova)?-[0-9.]+[.]dist-info)"
    assert [file for file in files if not re.match(f"usr/lib/python3/dist-packages/{places}/", file)] == []
    mine = packages / "nova/virt/imagecachelib"
    (theirs,) = nova.parents[1].glob("lib/python3.*/site-packages/nova")
    shutil.copytree(
        theirs,
        packages / "nova",
        copy_function=os.symlink,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("tests", "imagecachelib"),
    )
    done = load(nova, tmp_path, "", f"import sys; sys.path.insert(0, {str(packages)!r})\n")
    assert done.returncode == 0, done.stderr[-3000:]
    assert pathlib.Path(done.stdout.split()[0]).parent == mine


def outcomes(nova: pathlib.Path, tmp_path: pathlib.Path, *suites: str, **environment: str) -> dict[str, str]:
    """Run test cases of tests/lab, and return what became of each test, by id."""
    support = tmp_path / "support"
    support.mkdir()
    (support / "tests").symlink_to(SOURCES / "tests")  # and not the sources: what was installed is tried
    answer = tmp_path / "outcomes"
    environment |= {"IMAGECACHE_ADAPTER_OFF": "1", "PYTHONPATH": str(support), "TMPDIR": str(tmp_path)}
    names = [f"tests.lab.{suite}" for suite in suites]
    run(nova, "-P", LAB / "nova_suites.py", answer, "0/1", *names, **environment)
    found: dict[str, str] = json.loads(answer.read_text())
    assert found
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_real_files(nova: pathlib.Path, tmp_path: pathlib.Path, suite: str) -> None:
    found = outcomes(nova, tmp_path, suite)
    assert {name: outcome for name, outcome in found.items() if outcome != "ok"} == {}


def test_real_ceph(
    nova: pathlib.Path, tmp_path: pathlib.Path, ceph: ceph_lab.Ceph, ceph_glance: glance_lab.Glance
) -> None:
    servers = {
        "IMAGECACHE_CEPH": f"{ceph.conf},{ceph.fsid},{ceph.daemons['osd']}",
        "IMAGECACHE_GLANCE": f"{ceph_glance.url},{ceph_glance.home}",
    }
    found = outcomes(nova, tmp_path, "nova_ceph.RbdDisks", "nova_ceph.GlanceOnCeph", **servers)
    assert {name: outcome for name, outcome in found.items() if outcome != "ok"} == {}
