# SPDX-License-Identifier: Apache-2.0
"""Where Nova's images come from: Glance, as a request may reach it, and the caches of other compute hosts."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import nova.conf
from nova import service_auth, utils

import imagecache_lib as ic
from imagecache_lib.backends.librbd import LibrbdCluster
from imagecache_lib.ingest.rbd_source import RbdSource
from imagecache_lib.sources.interface import CannotResume
from imagecache_lib.store import layout

CONF = nova.conf.CONF

_CHUNK = 2**20


class Glance:
    """Glance, and one connection to the cluster in which it keeps its images."""

    def __init__(self) -> None:
        options = CONF.glance
        # Connects when it is first asked.
        self._cluster = LibrbdCluster(
            options.rbd_ceph_conf,
            options.rbd_user or None,
            connect_timeout=options.rbd_connect_timeout,
            op_timeout=CONF.image_cache.rbd_op_timeout,
        )

    def source(self, context) -> ic.ImageSource:
        """Return Glance as a request may use it, with ``enable_rbd_download`` past its API where that can be.

        The adapter that Nova makes of ``[glance]`` brings its interface, region and endpoint; the
        authentication sends the service's token beside the user's where ``[service_user]`` says so; and the
        request's global id goes along, so that Glance's log can be read beside Nova's.

        :param context: the request's ``nova.context.RequestContext``.
        """
        adapter = utils.get_ksa_adapter(
            "image",
            ksa_auth=service_auth.get_service_user_token_auth_plugin(context),
            ksa_session=service_auth.get_service_auth_session(nova.conf.glance.glance_group.name),
        )
        adapter.global_request_id = context.global_id
        source = ic.GlanceSource(
            CONF.glance.api_servers or (),
            adapter=adapter,
            computes_digests=CONF.image_cache.glance_computes_digests,
        )
        return RbdSource(source, self._cluster) if CONF.glance.enable_rbd_download else source


class HostSource(ic.ImageSource):
    """The base image in the cache of another compute host, read over ssh, which hosts that migrate have.

    Nothing tells what the image was before that host converted it, so that its base serves as a disk only.

    :param host: its name or address.
    :param base_path: absolute path of its cache.
    """

    def __init__(self, host: str, base_path: str) -> None:
        self._host = host
        self._base_path = base_path

    def describe(self, image_id: str) -> ic.Image:
        return ic.Image(image_id, disk_format=None, converted_from="unknown")

    @contextlib.contextmanager
    def open(self, image: ic.Image, offset: int = 0) -> Iterator[Iterator[bytes]]:
        if offset:
            raise CannotResume("a copy from another host starts at its first byte", image=image.id)
        # The name is hex digits, and the path is this host's own configuration.
        path = os.path.join(self._base_path, layout.base_name(image.id))
        command = ["ssh", "-C", "-o", "BatchMode=yes", "--", self._host, "cat", path]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
            try:
                yield self._chunks(running, image.id)
            finally:
                running.kill()

    def _chunks(self, running: subprocess.Popen[bytes], image_id: str) -> Iterator[bytes]:
        assert running.stdout is not None
        while chunk := running.stdout.read(_CHUNK):
            yield chunk
        if running.wait():
            raise ic.SourceError(
                f"the copy from {self._host} ended with {running.returncode}",
                image=image_id,
                next_step=f"see whether ssh from here to {self._host} works, and the image is cached there",
            )
