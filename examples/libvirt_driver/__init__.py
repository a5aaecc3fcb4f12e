# SPDX-License-Identifier: Apache-2.0
"""A small, complete virt driver: libvirt runs the domains, imagecache_lib makes their disks.

``guest`` is what a driver is told of an instance, ``disks`` makes its disks, ``domain`` runs it, ``driver`` is
what a compute service calls, and ``migration`` takes an instance to another host.

It leaves out what has nothing to do with images: networks, volumes, quotas, live migration.
"""
