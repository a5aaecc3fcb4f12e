# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: Nova's tests with the adapter's classes in the place of Nova's.

Called with the file that the answer goes to, with which part of how many is to be run, as in ``0/2``, and
with the ids of tests, or of modules of tests. The answer is one JSON object, of each test's outcome by id.
Only tests patch: a service loads the adapter by ``compute_driver`` alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import unittest
import warnings

warnings.simplefilter("ignore")
os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"

import nova.conf  # noqa: E402
import nova.tests.unit  # noqa: E402  forbids eventlet, before anything loads it
import nova.virt  # noqa: E402
import testtools  # noqa: E402
import yaml  # noqa: E402
from nova import exception  # noqa: E402
from nova.virt.libvirt import driver, imagebackend, imagecache  # noqa: E402

import imagecache_lib as ic  # noqa: E402
from imagecache_lib import opts  # noqa: E402
from imagecache_lib.sources.interface import CannotResume, NotPermitted  # noqa: E402

# Where pip would have put it, unless it did.
nova.virt.__path__.extend(filter(None, [os.environ.get("IMAGECACHE_ADAPTER")]))

from nova.virt.imagecachelib import caches, images, upkeep  # noqa: E402
from nova.virt.imagecachelib import driver as adapted  # noqa: E402


class ImageApi:
    """In the place of the adapter's Glance."""

    def source(self, context):
        return ImageApiSource(context)


class CachesOfTheMoment(caches.Caches):
    """What a driver has that was started with the configuration as it is now: each test changes it."""

    def manager(self, subdirectory=None):
        if self.config != caches.configuration():
            self.config = caches.configuration()
            self.start()
        return super().manager(subdirectory)


class ImageApiSource(ic.ImageSource):
    """``nova.image.glance.API``, which is what Nova's tests put fakes in the place of."""

    def __init__(self, context):
        self._context = context

    def describe(self, image_id):
        try:
            found = imagebackend.IMAGE_API.get(self._context, image_id, include_locations=True)
        except exception.ImageNotFound as error:
            raise ic.ImageNotFound(str(error), image=image_id) from error
        except exception.ImageNotAuthorized as error:
            raise NotPermitted(str(error), image=image_id) from error
        return ic.Image(
            image_id,
            disk_format=found.get("disk_format"),
            container_format=found.get("container_format"),
            status=found.get("status") or "active",
            properties=found.get("properties", {}),
        )

    @contextlib.contextmanager
    def open(self, image, offset=0):
        if offset:
            raise CannotResume("nova.image.glance has no ranges", image=image.id)
        yield iter(imagebackend.IMAGE_API.download(self._context, image.id))


def install():
    """Put the adapter's classes where the tests look for Nova's.

    Two classes keep their names and get methods: one says ``super(ImageCacheManager, self)``, which would
    recurse for ever, and tests patch static methods of the other, which a subclass would not show. Tests make
    objects of these classes without a driver of the adapter's, from which they would have their caches.
    """
    opts.register_opts(nova.conf.CONF)
    shared = CachesOfTheMoment(ImageApi())
    for each in (images.Cached, imagecache.ImageCacheManager, driver.LibvirtDriver):
        each.caches = shared
    backend = imagebackend.Backend
    own = {"Flat": images.Flat, "Qcow2": images.Qcow2, "Rbd": images.Rbd}

    def init(self, use_cow):
        original(self, use_cow)
        kinds = {getattr(imagebackend, name): kind for name, kind in own.items()}
        self.BACKEND = {name: kinds.get(kind, kind) for name, kind in self.BACKEND.items()}

    original = backend.__init__
    for name, kind in own.items():
        setattr(imagebackend, name, kind)
    backend.__init__ = init
    for ours, theirs, names in (
        (upkeep.ImageCacheManager, imagecache.ImageCacheManager, ("update", "get_disk_usage")),
        (adapted.LibvirtDriver, driver.LibvirtDriver, ("cache_image", "_try_fetch_image")),
    ):
        for name in names:
            setattr(theirs, name, vars(ours)[name])
    fetch = driver.LibvirtDriver._try_fetch_image_cache

    def _try_fetch_image_cache(self, image, *args, fallback_from_host=None):
        args, fallback = (args[:6], args[6]) if len(args) > 6 else (args, fallback_from_host)
        if isinstance(image, images.Cached):
            image.fallback_host, fallback = fallback, None
        fetch(self, image, *args, fallback_from_host=fallback)

    driver.LibvirtDriver._try_fetch_image_cache = _try_fetch_image_cache


class Outcomes(testtools.TestResult):
    """What became of each test, by id: ``ok``, ``skipped``, or the last line of its error."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def _failed(self, test, err=None, details=None):
        # Beside the traceback the details hold what the test logged, at length.
        told = {name: each.as_text() for name, each in (details or {}).items() if "traceback" in name}
        text = str(err[1]) if err else "\n".join(told.values())
        lines = [line for line in text.strip().splitlines() if line]
        self.found[test.id()] = lines[-1][:300] if lines else "failed"
        if os.environ.get("IMAGECACHE_TRACEBACKS"):
            sys.stderr.write(f"{test.id()}\n{text}\n")

    addError = addFailure = addUnexpectedSuccess = _failed

    def addSkip(self, test, reason=None, details=None):
        self.found.setdefault(test.id(), "skipped")

    def addSuccess(self, test, details=None):
        self.found.setdefault(test.id(), "ok")

    addExpectedFailure = addSuccess


def each_test(suite):
    for found in suite:
        if isinstance(found, unittest.TestSuite):
            yield from each_test(found)
        else:
            yield found


def main():
    # Each test has all of Nova's policy read anew, for which PyYAML's own parser takes as long as the test.
    yaml.safe_load = functools.partial(yaml.load, Loader=yaml.CSafeLoader)
    answer, part, *names = sys.argv[1:]
    number, parts = map(int, part.split("/"))
    if os.environ.get("IMAGECACHE_ADAPTER_OFF") != "1":
        install()
    result = Outcomes()
    found = list(each_test(unittest.TestLoader().loadTestsFromNames(names)))
    unittest.TestSuite(found[number::parts]).run(result)
    with open(answer, "w") as file:
        json.dump(result.found, file)
    os._exit(0)  # Nova's threads do not end by themselves


if __name__ == "__main__":
    main()
