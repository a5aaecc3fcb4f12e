# SPDX-License-Identifier: Apache-2.0
"""The values of a pre-cache job: what is asked, how far it is, how it ended. No I/O."""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from imagecache_lib import errors
from imagecache_lib.store import layout

#: What DNS allows for a name, in characters.
_LONGEST_HOST = 253

#: The most images of one job, and of one host's task: more than any roll-out needs, and too few to fill an
#: agent's memory.
MOST_IMAGES = 1000

#: How often a host tries an image again at most.
MOST_RETRIES = 100

#: Characters of a text for people that are kept. MariaDB's TEXT holds four times as many bytes.
_LONGEST_TEXT = 4000

#: The largest integer of every database that jobs are kept in.
LARGEST = 2**63 - 1


class Result(enum.Enum):
    """How one image on one host ended. The first four are Nova's."""

    #: The image was fetched.
    CACHED = "cached"
    #: The image was in the cache already.
    EXISTING = "existing"
    #: The host has no image cache, or needs none for this image.
    UNSUPPORTED = "unsupported"
    #: The image could not be cached; the cell has the reason.
    ERROR = "error"
    #: The image was not tried: the host was down until the deadline, or the job was cancelled.
    SKIPPED = "skipped"
    #: The job database holds a result that this release does not know; the reason quotes it.
    UNKNOWN = "unknown"

    @property
    def is_failure(self) -> bool:
        """Whether an operator has to look at it. A resume tries these again, except unknown results."""
        return self in (Result.ERROR, Result.SKIPPED, Result.UNKNOWN)


#: The results that a resume takes back.
RETRIED = (Result.ERROR, Result.SKIPPED)


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One image on one host.

    :param result: how the image ended on the host, or None while it has not ended.
    :param reason: why it failed, or what the host is doing, as a clause.
    :param received: bytes that came so far.
    :param total: bytes in all, or None while that is not known.
    """

    result: Result | None = None
    reason: str = ""
    received: int = 0
    total: int | None = None

    def storable(self) -> Cell:
        """Return the cell with a reason that every database can store."""
        reason = storable(self.reason)
        return self if reason is self.reason else dataclasses.replace(self, reason=reason)


def storable(text: str) -> str:
    """Return a text for people as every database can store it: short, valid Unicode, without NUL."""
    if len(text) <= _LONGEST_TEXT and text.isprintable():
        return text
    return text[:_LONGEST_TEXT].replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


#: The cell of which nothing is known yet. Shared: a job of 10,000 hosts has 100,000 of them.
OPEN = Cell()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelayTerms:
    """That the hosts of a job pass images on to each other, and how they are arranged.

    :param heads: how many hosts of each site ask the image service.
    :param sites: the sites of the job's hosts, in the order of the hosts: each site's name, and how many
        hosts in a row are there. Hosts beyond these are of the site without a name.
    :raises ConfigError: a value makes no sense.
    """

    heads: int = 2
    sites: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise errors.ConfigError(
                "without a head, which asks the image service, no image arrives",
                next_step="give 1 head or more",
            )

    def sites_of(self, hosts: Sequence[str]) -> dict[str, str]:
        """Return the site of each host of the job."""
        names = (site for site, count in self.sites for _ in range(count))
        return dict(itertools.zip_longest(hosts, itertools.islice(names, len(hosts)), fillvalue=""))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """Under which terms a job runs.

    :param concurrency: how many hosts work at a time.
    :param host_rate: bytes per second that one host may fetch; 0 for no limit.
    :param total_rate: bytes per second that all hosts together may fetch; 0 for no limit.
    :param deadline: epoch seconds, by the conductor's clock, after which what is not done is given up, or
        None for no deadline.
    :param pin_until: epoch seconds, by the conductor's clock, until which the images stay on the hosts, or
        None not to pin them.
    :param retries: how often a host tries an image again that failed in a way that may pass.
    :param jitter: hosts begin within so many seconds, at random, so that they do not all ask the image
        service at once.
    :param relay: how hosts pass images on to each other, or None if each asks its own image service. Hosts
        that relay are at work all at a time; ``concurrency`` is then for those that cannot.
    :raises ConfigError: a value makes no sense.
    """

    concurrency: int = 1
    host_rate: int = 0
    total_rate: int = 0
    deadline: float | None = None
    pin_until: float | None = None
    retries: int = 3
    jitter: float = 0.0
    relay: RelayTerms | None = None

    def to_json(self) -> str:
        """Return the terms as they are stored. Earlier releases understand those that do not relay."""
        fields = dataclasses.asdict(self)
        if self.relay is None:
            del fields["relay"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Terms:
        """Return the terms that were stored.

        :raises ValueError, TypeError, ConfigError: these are no terms, or those of another release.
        """
        fields = json.loads(text)
        relay = fields.pop("relay", None)
        if relay is not None:
            sites = tuple((str(site), int(count)) for site, count in relay.pop("sites"))
            relay = RelayTerms(sites=sites, **relay)
        return cls(relay=relay, **fields)

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise errors.ConfigError(
                "a concurrency below 1 lets no host work", next_step="give a concurrency of 1 or more"
            )
        # Whatever an agent would refuse is refused before there is a job.
        limits = {"host_rate": LARGEST, "total_rate": LARGEST, "retries": MOST_RETRIES, "jitter": LARGEST}
        for name, most in {**limits, "deadline": LARGEST, "pin_until": LARGEST}.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise errors.ConfigError(f"{name} is {value}", next_step=f"give 0 to {most}")

    def rate(self, hosts: int) -> int:
        """Return how many bytes per second each host of a job of so many may fetch; 0 for no limit.

        The total rate is shared by as many hosts as can be at work at a time.
        """
        share = 0
        if self.total_rate:
            share = max(1, self.total_rate // max(1, min(self.concurrency, hosts)))
        return min((limit for limit in (self.host_rate, share) if limit), default=0)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as it was asked for, with its progress so far.

    :param id: a random id.
    :param aggregate: the name of the host aggregate, which is only for people.
    :param cells: by host, then by image id, in the order in which they were asked for. The cells of a job
        that runs in this process are a view, which goes on changing.
    :param cancelled: whether an operator cancelled the job.
    :param created: when the job was made, in epoch seconds.
    :param attempt: how often its failures were taken back, to be tried again.
    :param problem: why the job cannot be run by this release, as a clause: what the database holds of it was
        written by another release, or is damaged. None for a job that can be run.
    """

    id: str
    aggregate: str
    image_ids: tuple[str, ...]
    terms: Terms
    cells: Mapping[str, Mapping[str, Cell]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    cancelled: bool = False
    created: float = 0.0
    attempt: int = 0
    problem: str | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(self.cells)

    @property
    def is_over(self) -> bool:
        """Whether every image on every host has a result."""
        return all(cell.result is not None for cells in self.cells.values() for cell in cells.values())

    @property
    def has_failed(self) -> bool:
        """Whether an image on a host ended without being there, though it should be."""
        return any(
            cell.result is not None and cell.result.is_failure
            for cells in self.cells.values()
            for cell in cells.values()
        )

    def count(self) -> dict[Result, int]:
        """Return how many cells have each result."""
        counted = dict.fromkeys(Result, 0)
        for cells in self.cells.values():
            for cell in cells.values():
                if cell.result is not None:
                    counted[cell.result] += 1
        return counted

    def pending(self, host: str) -> tuple[str, ...]:
        """Return the images that have no result on a host yet."""
        return tuple(image for image, cell in self.cells[host].items() if cell.result is None)


@dataclasses.dataclass(frozen=True)
class JobSummary:
    """A job in a list: counted, not read.

    :param hosts: how many hosts it has.
    :param images: how many images it has.
    :param counts: how many cells have each result; those that have none are not counted.
    :param problem: why the job cannot be run, as for :class:`Job`.
    """

    id: str
    aggregate: str
    created: float
    hosts: int
    images: int
    cancelled: bool
    counts: Mapping[Result, int]
    problem: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether every image on every host has a result."""
        return sum(self.counts.values()) >= self.hosts * self.images

    @property
    def has_failed(self) -> bool:
        """Whether an image on a host ended without being there, though it should be."""
        return any(count for result, count in self.counts.items() if result.is_failure)


def check(hosts: Sequence[str], image_ids: Sequence[str]) -> None:
    """Refuse a request that makes no sense, as Nova does.

    :raises ConfigError: the request has no image, more than :data:`MOST_IMAGES`, an image or a host twice,
        or no host.
    :raises ImageRejected: the request has an id that no image can have.
    """
    for what, given in (("image", image_ids), ("host", hosts)):
        if not given:
            raise errors.ConfigError(f"a pre-cache job needs a {what}", next_step=f"name one {what}")
        twice = sorted(each for each, times in collections.Counter(given).items() if times > 1)
        if twice:
            raise errors.ConfigError(
                f"a pre-cache job names a {what} twice: {', '.join(twice)}", next_step="name each once"
            )
    if len(image_ids) > MOST_IMAGES:
        raise errors.ConfigError(
            f"a pre-cache job has {MOST_IMAGES} images at most, and {len(image_ids)} are named",
            next_step="start several jobs",
        )
    for name in hosts:
        if not name or not name.isprintable() or len(name) > _LONGEST_HOST:
            raise errors.ConfigError(
                f"{name!r} cannot be the name of a host", next_step="correct the list of hosts"
            )
    for image_id in image_ids:
        layout.base_name(image_id)
