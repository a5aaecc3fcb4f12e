# SPDX-License-Identifier: Apache-2.0
"""Nova as a competitor, in Nova's own environment: its image cache against a Glance, with no other service.

With ``--adapter`` the same calls go to the adapter's classes. No database, no libvirt, no privilege daemon
and no Keystone; what is timed is Nova's own code from ``imagebackend.Image.cache`` on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import uuid
import warnings
from typing import Any

from benchmarks import meter, serving

warnings.simplefilter("ignore")
os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"

import nova.conf  # noqa: E402
import nova.image.glance  # noqa: E402
import nova.privsep  # noqa: E402
import requests  # noqa: E402
import requests.adapters  # noqa: E402
from keystoneauth1 import noauth, session  # noqa: E402
from nova import config, context, objects  # noqa: E402, F401
from nova.virt.libvirt import imagebackend, imagecache  # noqa: E402
from nova.virt.libvirt import utils as libvirt_utils  # noqa: E402


class _Token(noauth.NoAuth):  # type: ignore[misc]
    """Authentication that only sends a token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def get_token(self, session: Any, **_options: Any) -> str:
        return self._token


class _NewConnections(requests.adapters.HTTPAdapter):  # type: ignore[misc]
    """Sends each request over a connection of its own.

    uWSGI closes a connection after its answer without saying so. Nova would reuse it, be reset, and sleep for
    a second before it tries again: that is not to be counted against it. A reset of a new connection, which
    happens too, is tried again at once.
    """

    def send(self, request: Any, **options: Any) -> Any:
        self.poolmanager.clear()
        try:
            return super().send(request, **options)
        except requests.ConnectionError:
            self.poolmanager.clear()
            return super().send(request, **options)


class Driver:
    """Nova's cache of one host."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._instances = options.instances
        state = os.path.dirname(options.instances)
        conf = nova.conf.CONF
        conf([], project="nova", default_config_files=[])
        conf.set_override("instances_path", options.instances)
        conf.set_override("state_path", state)
        conf.set_override("lock_path", os.path.join(state, "lock"), "oslo_concurrency")
        conf.set_override("api_servers", [options.glance], "glance")
        conf.set_override("endpoint_override", options.glance, "glance")
        conf.set_override("images_type", "qcow2", "libvirt")
        plugin, connections = _Token(options.token), requests.Session()
        connections.mount("http://", _NewConnections())
        glance_session = session.Session(auth=plugin, session=connections)
        nova.image.glance._session_and_auth = lambda _context: (glance_session, None)
        nova.privsep.sys_admin_pctxt.set_client_mode(False)
        objects.register_all()
        objects.BlockDeviceMappingList.bdms_by_instance_uuid = classmethod(lambda *_arguments: {})
        endpoint = {"publicURL": options.glance, "internalURL": options.glance}
        catalog = [{"type": "image", "name": "glance", "endpoints": [endpoint]}]
        self._context = context.RequestContext(
            "user", "project", is_admin=True, auth_token=options.token, service_catalog=catalog
        )
        self._adapter = options.adapter
        self._begin()

    def _begin(self) -> None:
        """Make what makes disks, and what tends the cache."""
        if self._adapter:
            from nova.virt.imagecachelib import caches, images, sources, upkeep

            from imagecache_lib import opts

            opts.register_opts(nova.conf.CONF)
            owned = caches.Caches(sources.Glance())
            self._backend = images.Backend(True, owned)
            self._upkeep = upkeep.ImageCacheManager(owned)
        else:
            self._backend = imagebackend.Backend(True)
            self._upkeep = imagecache.ImageCacheManager()

    def forget(self) -> dict[str, Any]:
        for name in os.listdir(self._instances):
            shutil.rmtree(os.path.join(self._instances, name))
        self._begin()
        return {}

    def spawn(self, image_id: str, size: int, keep: bool = True) -> dict[str, Any]:
        """Make a disk in a new instance directory."""
        instance = self._instance(image_id)
        directory = os.path.join(self._instances, instance.uuid)
        os.makedirs(directory)
        disk = self._backend.by_name(instance, "disk", "qcow2")
        measured = meter.Meter()
        disk.cache(
            fetch_func=libvirt_utils.fetch_image,
            context=self._context,
            filename=imagecache.get_cache_fname(image_id),
            size=size,
            image_id=image_id,
            trusted_certs=None,
        )
        answer = measured.read()
        base = os.path.join(self._instances, "_base", imagecache.get_cache_fname(image_id))
        answer["allocated"] = meter.allocated(base)
        if not keep:
            shutil.rmtree(directory)
        return answer

    def warm(self, image_id: str, count: int, size: int) -> dict[str, Any]:
        return {"each": [self.spawn(image_id, size, keep=False)["seconds"] for _ in range(count)]}

    def verify(self, image_ids: list[str], directories: list[str]) -> dict[str, Any]:
        """Run the periodic pass over instances whose directories exist."""
        instances = objects.InstanceList(
            objects=[
                self._instance(image_id, directory)
                for image_id, directory in zip(image_ids, directories, strict=True)
            ]
        )
        began = time.monotonic()
        self._upkeep.update(self._context, instances)
        return {"seconds": time.monotonic() - began}

    def _instance(self, image_id: str, name: str | None = None) -> Any:
        return objects.Instance(
            id=1,
            uuid=name or str(uuid.uuid4()),
            image_ref=image_id,
            kernel_id="",
            ramdisk_id="",
            host="host",
            vm_state="active",
            task_state=None,
            system_metadata={"image_base_image_ref": image_id},
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--instances", required=True)
    parser.add_argument("--glance", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--adapter", action="store_true")
    driver = Driver(parser.parse_args())
    serving.serve(
        {
            "ready": dict,
            "forget": driver.forget,
            "spawn": driver.spawn,
            "warm": driver.warm,
            "verify": driver.verify,
        }
    )


if __name__ == "__main__":
    main()
