# SPDX-License-Identifier: Apache-2.0
"""What a pass reports: for each base whether it went and why, and what needs an operator."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from imagecache_lib import dates, events
from imagecache_lib.nova import compute_nodes
from imagecache_lib.store.hosts import HostRef
from imagecache_lib.upkeep import evict, members, policy
from imagecache_lib.upkeep.overview import Overview


@dataclasses.dataclass(frozen=True)
class BaseReport:
    """What became of one base.

    :param name: its name in the cache.
    :param evicted: it is gone; in a dry run: it would be.
    :param reason: why, as a clause: in use by what, too young by how much, over which limit.
    :param allocated: bytes on disk.
    :param image_id: the image it was made from, where a record says so.
    """

    name: str
    evicted: bool
    reason: str
    allocated: int
    image_id: str | None = None


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What a pass found and did.

    :param bases: every base, sorted by name.
    :param problems: what needs an operator, a sentence each, the worst first.
    :param dry_run: nothing was changed.
    """

    bases: tuple[BaseReport, ...]
    problems: tuple[str, ...]
    dry_run: bool

    @property
    def evicted(self) -> tuple[BaseReport, ...]:
        """The bases that are gone, or would be."""
        return tuple(base for base in self.bases if base.evicted)

    @property
    def reclaimed(self) -> int:
        """Bytes that eviction gave back, or would."""
        return sum(base.allocated for base in self.evicted)

    def as_event(self) -> events.PassFinished:
        """Return this report as an event, in figures."""
        kept = [base for base in self.bases if not base.evicted]
        return events.PassFinished(
            "",
            kept=len(kept),
            allocated=sum(base.allocated for base in kept),
            evicted=len(self.evicted),
            reclaimed=self.reclaimed,
            problems=self.problems,
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the next pass would do with a base, and why.

    :param base: as a dry run reports it.
    :param obstacles: everything that keeps it: what it is, and what would change it, a clause each.
    :param problems: what needs an operator before anything can go, a sentence each.
    """

    base: BaseReport
    obstacles: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]


def describe_pass(
    overview: Overview, decided: policy.Decided, outcomes: Sequence[evict.Outcome], *, dry_run: bool
) -> VerifyReport:
    """Return what a pass found, and what became of each base.

    :param outcomes: of the victims and of what lay in the trash; in a dry run, as they are foreseen.
    """
    where = overview.reader.cache.layout
    became = {outcome.name: outcome for outcome in outcomes}
    bases = []
    for decision in decided.plan.decisions:
        entry = decision.entry
        outcome = became.pop(entry.name, None)
        evicted = outcome.gone if outcome is not None else decision.evict and dry_run
        reason = dates.plain(outcome.reason if outcome is not None else decision.reason)
        image_id = overview.image_ids.get(entry.name)
        bases.append(BaseReport(entry.name, evicted, reason, entry.allocated, image_id))
    for outcome in became.values():
        image_id = overview.image_ids.get(outcome.name)
        reason = dates.plain(outcome.reason)
        bases.append(BaseReport(outcome.name, outcome.gone, reason, outcome.allocated, image_id))
    unknown = [
        f"{where.base(name)} is nothing that belongs into the cache. Move it away."
        for name in overview.inventory.unknown
    ]
    unknown += [
        f"{where.base(name)} cannot be looked at ({cause}), and stays. Check the filesystem."
        for name, cause in overview.inventory.unreadable
    ]
    problems = (*overview.references.problems, *_silent(outcomes), *unknown)
    told = tuple(dates.plain(problem) for problem in problems)
    return VerifyReport(tuple(sorted(bases, key=lambda base: base.name)), told, dry_run)


def _silent(outcomes: Sequence[evict.Outcome]) -> list[str]:
    """Return a sentence for each host that keeps bases in the trash by silence."""
    held: dict[HostRef, list[int]] = {}
    for outcome in outcomes:
        for host in outcome.blocked_by:
            held.setdefault(host, []).append(outcome.allocated)
    return [
        _says_nothing(host, f"{len(sizes)} evicted base images, which hold {dates.size(sum(sizes))}")
        for host, sizes in sorted(held.items())
    ]


def _says_nothing(host: HostRef, what: str) -> str:
    """Return a sentence on a host that has not looked at bases, and on what an operator can do.

    :param what: the bases, as a phrase.
    """
    if host.id == members.UNTOLD:
        return (
            f"Hosts may not have looked at {what}: {host.name}. Nova writes its registry anew in its next"
            " pass; if no Nova runs here, remove it."
        )
    return (
        f"Host {host.name} has not looked at {what}. Let its periodic pass run; if it will not come back, "
        + _how_to_forget(host)
    )


def _how_to_forget(host: HostRef) -> str:
    if host.id.startswith(members.BY_NOVA):
        return f"take it out of {compute_nodes.NAME}, where Nova last named it within a day"
    return f"run: imagecache host forget {shlex.quote(host.id)}"
