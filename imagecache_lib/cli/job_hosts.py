# SPDX-License-Identifier: Apache-2.0
"""The hosts of a job as operators name them: each with the site that it is at, if hosts relay."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from imagecache_lib import errors


class Placed(NamedTuple):
    """A host, and the site that it is at; all hosts without one are at one site."""

    name: str
    site: str = ""


def sites_of(hosts: Sequence[Placed]) -> tuple[tuple[str, int], ...]:
    """Return the sites of hosts as :class:`~imagecache_lib.precache.job.RelayTerms` has them."""
    runs = itertools.groupby(hosts, key=lambda host: host.site)
    return tuple((site, len(list(run))) for site, run in runs)


def in_a_row(hosts: Iterable[Placed]) -> list[Placed]:
    """Return hosts in their order, but those of a site behind the first of them."""
    found = list(hosts)
    sites = {host.site: number for number, host in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda host: sites[host.site])


def read(path: str) -> list[Placed]:
    """Return the hosts in a file: a name on each line, and behind it the site if there is one.

    :raises ConfigError: the file cannot be read, names no host, or says more of one.
    """
    try:
        # What Windows writes begins with a mark.
        with open(path, encoding="utf-8-sig") as stream:
            lines = [line.partition("#")[0].strip() for line in stream]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise errors.ConfigError(
            f"the list of hosts cannot be read: {why}", path=path, next_step="correct --hosts-file"
        ) from error
    found = [_placed(line, path) for line in lines if line]
    if not found:
        raise errors.ConfigError("the list of hosts names none", path=path, next_step="correct --hosts-file")
    return found


def _placed(line: str, path: str) -> Placed:
    words = line.split()
    if len(words) > 2:
        raise errors.ConfigError(
            f"{line!r} is more than a host and its site", path=path, next_step="correct the file"
        )
    return Placed(*words)
