# SPDX-License-Identifier: Apache-2.0
"""Images on every host before they are needed: one host's agent, and the job that asks a whole aggregate.

A *job* is a set of hosts times a list of images. The conductor's side
(:mod:`~imagecache_lib.precache.precacher`) keeps it in a database and asks each host's *agent*
(:mod:`~imagecache_lib.precache.agent`), through a :class:`~imagecache_lib.precache.client.HostClient`, to
work on its part. An agent works on its own: the conductor only begins the work and looks at it now and then,
so that either side may restart at any time.
"""
