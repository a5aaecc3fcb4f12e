# SPDX-License-Identifier: Apache-2.0
"""Which agents answer by the name of a host, and what of what they say is new. Decides only: no calls.

An agent counts the reports that it sends by itself, and says in each answer which was its last. So a
conductor tells which come twice or late, and which are missing.
"""

from __future__ import annotations

import logging

from imagecache_lib.precache import client, job
from imagecache_lib.precache.calls import Stop, Visit
from imagecache_lib.precache.slots import HostState

LOG = logging.getLogger(__name__)

#: Seconds by which the clocks of an agent and of the conductor may differ without being worth a word.
_SKEW = 60.0


def is_news(state: HostState, report: client.TaskReport) -> bool:
    """Return whether a report that an agent sent by itself is new, and take note of its number.

    Another instance than the last one that answered a call is one that has ended since, or a second one under
    the host's name, which calls find out.
    """
    who = report.agent
    if who is None or report.number <= state.numbers.get(who.instance, 0):
        return False
    if state.instances[-1:] not in ([], [who.instance]):
        return False
    state.numbers[who.instance] = report.number
    state.reports = True
    return True


def is_next(state: HostState, report: client.TaskReport) -> bool:
    """Return whether a report is the one after the last that was heard, so that none is missing."""
    return report.agent is not None and report.number <= state.numbers.get(report.agent.instance, 0) + 1


def compare(state: HostState, report: client.TaskReport, *, listening: bool) -> None:
    """Find out from an answer whether the reports that its agent sends by itself arrive.

    :param listening: whether the conductor has a mailbox.
    """
    who = report.agent
    if who is None or not who.reports or not listening:
        state.reports = False
        return
    # At the begin of a task there is nothing to be heard yet. Later, what it said and was not heard is
    # lost, or on its way: it is asked more often until something is heard.
    state.reports = report.number <= state.numbers.get(who.instance, 0)
    state.numbers[who.instance] = report.number


def note(state: HostState, visit: Visit, clock: float) -> Stop | None:
    """Take note of which agents answered. One that is back after another is a second, not a restarted one.

    Returns how the host ends if several agents have its name, or None to go on with it.

    :param clock: the conductor's, in epoch seconds.
    """
    found = None
    for who in visit.agents:
        skew = who.clock - clock
        if abs(skew) > _SKEW and not state.skew_told:
            state.skew_told = True
            LOG.warning("The clock of host %s is %+.0f s off the conductor's", state.name, skew)
        if state.instances[-1:] == [who.instance]:
            continue
        if found is None and who.instance in state.instances:
            reason = (
                "two agents answer by the name of this host, instances "
                f"{who.instance} and {state.instances[-1]}: stop one of them"
            )
            found = Stop(job.Result.ERROR, reason)
        state.instances.append(who.instance)
    return found
