# SPDX-License-Identifier: Apache-2.0
"""A small, complete virt driver: libvirt runs the domains, imagecache_lib makes their disks.

``guest`` is what a driver is told of an instance, ``disks`` makes its disks, ``domain`` runs it. A compute
service calls ``driver``, and ``migration`` to take an instance to another host.

It leaves out what has nothing to do with images: networks, volumes, quotas, live migration.
"""
