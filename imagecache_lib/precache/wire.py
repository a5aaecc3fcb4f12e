# SPDX-License-Identifier: Apache-2.0
"""What conductor and agents say to each other, as plain values. Nothing that arrives is trusted.

A request names images and limits; any other field is refused, so that no sender of messages chooses
where a host fetches from or what it writes. An answer is ``{"result": ...}`` or ``{"error": ...}``: an error
travels as the kind that says who must act, with its text, and without a traceback. Beside either, an agent
that speaks version 1.1 says who it is: ``"agent": {"instance": ..., "clock": ...}``. Version 1.0 knows
neither that nor a task's ``deadline_in`` and ``pin_for``, which a conductor leaves out for such an agent.

Since version 1.2 a task may name the conductor's mailbox in ``report_to``, and the agent sends to it what
changed: ``{"host": ..., "job_id": ..., "attempt": ..., "number": ..., "agent": ..., "cells": ...}``. The
answer to ``poll`` has ``attempt`` and ``number`` beside its result. A conductor that does not know these
fields ignores them.

Since version 1.3 an agent that passes images on says ``"relays": true`` of itself, and a task for it may have
a route, ``"relay": {"parents": [...], "origin": ...}``: names of hosts, which the agent makes addresses of by
its own configuration, and whether it may ask its image service. Reports and answers to ``poll`` then have
``"relay": {"parent": ..., "wants_origin": ..., "wrong": [...], "mismatched": ...}``, and ``release`` ends
what is kept for others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from imagecache_lib import errors
from imagecache_lib.precache import client, job
from imagecache_lib.precache.chains import HostRoute
from imagecache_lib.sources.parents import HOST_NAME
from imagecache_lib.sources.route import ORIGIN, RouteState
from imagecache_lib.store import layout

LOG = logging.getLogger(__name__)

#: Errors by the name under which they travel. Others travel as the nearest of their ancestors here.
_KINDS: dict[str, type[errors.ImageCacheError]] = {
    kind.__name__: kind
    for kind in (
        client.UnknownTask,
        client.HostUnsupported,
        client.HostBusy,
        errors.ImageNotFound,
        errors.ImageRejected,
        errors.SourceError,
        errors.NoSpaceError,
        errors.LockTimeoutError,
        errors.CancelledError,
        errors.BackendError,
        errors.ConfigError,
        errors.CacheEntryError,
    )
}

_LONGEST_ID = 128

#: Raise the minor number for what an older side may ignore, the major for what it must not.
VERSION = "1.3"

#: Fields of a task that earlier versions do not know and refuse, with the first that knows them.
_SINCE = {"deadline_in": "1.1", "pin_for": "1.1", "report_to": "1.2", "relay": "1.3"}

#: The versions of agents, the newest first.
VERSIONS = ("1.3", "1.2", "1.1", "1.0")

#: A mailbox is a random id. It becomes part of a queue's name, so it is nothing else.
_MAILBOX = re.compile("[0-9a-f]{32}")

#: The most hosts of a route, and of those that are said to have sent wrong bytes.
_MOST_PARENTS = 16


class Malformed(errors.BackendError):
    """What arrived is not what should be said."""


def from_task(task: client.HostTask, *, version: str = VERSION) -> dict[str, Any]:
    """Return a task as it travels.

    :param version: the version that the agent speaks, one of :data:`VERSIONS`.
    """
    fields = {**dataclasses.asdict(task), "image_ids": list(task.image_ids)}
    if task.relay is not None:
        fields["relay"] = {"parents": list(task.relay.parents), "origin": task.relay.origin}
    return {name: value for name, value in fields.items() if _SINCE.get(name, version) <= version}


def to_task(found: Any) -> client.HostTask:
    """Return the task that arrived.

    :raises Malformed: it is not a task, or says more than a task may.
    """
    fields = dict(_mapping(found, "a task"))
    known = {field.name for field in dataclasses.fields(client.HostTask)}
    if unknown := fields.keys() - known:
        raise Malformed(
            f"a task may not have {min(map(str, unknown))!r}", next_step="name images and limits only"
        )
    return client.HostTask(
        job_id=to_job_id(fields.get("job_id")),
        image_ids=to_image_ids(fields.get("image_ids")),
        attempt=_integer(fields.get("attempt", 0), "attempt"),
        rate=_integer(fields.get("rate", 0), "rate"),
        deadline=_moment(fields.get("deadline"), "deadline"),
        pin_until=_moment(fields.get("pin_until"), "pin_until"),
        retries=_integer(fields.get("retries", 0), "retries", most=job.MOST_RETRIES),
        deadline_in=_moment(fields.get("deadline_in"), "deadline_in"),
        pin_for=_moment(fields.get("pin_for"), "pin_for"),
        report_to=_mailbox(fields.get("report_to")),
        relay=_route(fields.get("relay")),
    )


def to_job_id(found: Any) -> str:
    """Return the job's id that arrived.

    :raises Malformed: what arrived is not a job's id.
    """
    if not isinstance(found, str) or not 0 < len(found) <= _LONGEST_ID or not found.isprintable():
        raise Malformed("the request has no valid job id", next_step="upgrade the conductor")
    return found


def to_image_ids(found: Any) -> tuple[str, ...]:
    """Return the image ids that arrived.

    :raises Malformed: what arrived is not a list of different ids.
    :raises ImageRejected: one of the ids is one that no image can have.
    """
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Malformed("the request has no list of image ids", next_step="upgrade the conductor")
    if not 0 < len(found) <= job.MOST_IMAGES or len(set(found)) != len(found):
        raise Malformed(
            f"a task has 1 to {job.MOST_IMAGES} images, each once", next_step="ask for fewer images"
        )
    for image_id in found:
        layout.base_name(image_id)
    return tuple(found)


def from_survey(survey: client.Survey) -> dict[str, Any]:
    """Return a survey as it travels."""
    return {
        "present": list(survey.present),
        "missing": dict(survey.missing),
        "free": survey.free,
        "problems": dict(survey.problems),
    }


def to_survey(found: Any) -> client.Survey:
    """Return the survey that arrived.

    :raises Malformed: what arrived is not a survey.
    """
    fields = _mapping(found, "a survey")
    present = fields.get("present")
    if not isinstance(present, list):
        raise Malformed("the agent's survey has no list of present images", next_step="upgrade the agent")
    return client.Survey(
        tuple(str(each) for each in present),
        {
            str(key): None if size is None else _integer(size, "size")
            for key, size in _mapping(fields.get("missing"), "a table of missing images").items()
        },
        _integer(fields.get("free"), "free"),
        {
            str(key): str(text)
            for key, text in _mapping(fields.get("problems"), "a table of problems").items()
        },
    )


def from_cells(cells: Mapping[str, job.Cell]) -> dict[str, Any]:
    """Return cells as they travel."""
    return {
        image_id: {**dataclasses.asdict(cell), "result": cell.result.value if cell.result else None}
        for image_id, cell in cells.items()
    }


def to_cells(found: Any) -> dict[str, job.Cell]:
    """Return the cells that arrived.

    :raises Malformed: what arrived are not cells.
    """
    return {str(key): _cell(fields) for key, fields in _mapping(found, "a progress report").items()}


def from_report(told: client.HostReport) -> dict[str, Any]:
    """Return a report that an agent sends by itself, as it travels."""
    assert told.report.agent is not None
    return {
        "host": told.host,
        "job_id": told.job_id,
        "attempt": told.report.attempt,
        "number": told.report.number,
        "agent": dataclasses.asdict(told.report.agent),
        "cells": from_cells(told.report.cells),
        **from_route_state(told.report.relay),
    }


def from_route_state(state: RouteState | None) -> dict[str, Any]:
    """Return how a host gets on along its route, as the field that it travels in, or no field for None."""
    if state is None:
        return {}
    return {"relay": {**dataclasses.asdict(state), "wrong": list(state.wrong)}}


def to_report(found: Any) -> client.HostReport:
    """Return the report that arrived.

    :raises Malformed: what arrived is not a report, or does not say which agent it is from.
    """
    fields = _mapping(found, "a report")
    host, who = fields.get("host"), agent_of(fields)
    if not isinstance(host, str) or who is None:
        raise Malformed("the report does not say who sent it", next_step="upgrade the agent")
    return client.HostReport(
        host, to_job_id(fields.get("job_id")), _task_report(fields, to_cells(fields.get("cells")), who)
    )


def to_poll(answer: Any) -> client.TaskReport:
    """Return what an agent answered to a poll.

    :raises UnknownTask: the agent does not know the task.
    :raises ImageCacheError: the agent answered with another error.
    :raises Malformed: what arrived is not an answer to a poll.
    """
    who = agent_of(answer)
    try:
        cells = to_cells(result_of(answer))
    except client.UnknownTask as error:
        error.agent = who
        raise
    return _task_report(answer, cells, who)


def _task_report(
    fields: Mapping[str, Any], cells: Mapping[str, job.Cell], who: client.AgentInfo | None
) -> client.TaskReport:
    attempt, number = (_integer(fields.get(name, 0), name) for name in ("attempt", "number"))
    return client.TaskReport(cells, who, attempt, number, _route_state(fields.get("relay")))


def _cell(found: Any) -> job.Cell:
    fields = _mapping(found, "a result")
    result, total = fields.get("result"), fields.get("total")
    try:
        known = None if result is None else job.Result(result)
        if known is job.Result.UNKNOWN:
            raise ValueError(result)
    except ValueError:
        raise Malformed(
            f"the agent reports the unknown result {result!r}", next_step="upgrade the conductor"
        ) from None
    return job.Cell(
        known,
        str(fields.get("reason", "")),
        _integer(fields.get("received", 0), "received"),
        None if total is None else _integer(total, "total"),
    ).storable()


@contextlib.contextmanager
def answering(who: client.AgentInfo) -> Iterator[dict[str, Any]]:
    """Yield an answer as it travels, for the body to put its ``result`` into.

    What the body raises becomes the answer's ``error``, and goes no further.

    :param who: the agent that answers.
    """
    answer: dict[str, Any] = {"agent": dataclasses.asdict(who)}
    try:
        yield answer
    except errors.ImageCacheError as error:
        answer["error"] = _from_error(error)
    except Exception as error:
        LOG.exception("A call failed")
        unforeseen = errors.BackendError(
            f"the agent failed with {type(error).__name__}", next_step="read its log"
        )
        answer["error"] = _from_error(unforeseen)


def agent_of(answer: Any) -> client.AgentInfo | None:
    """Return which agent an answer is from, or None for an agent that speaks version 1.0."""
    told = answer.get("agent") if isinstance(answer, Mapping) else None
    if not isinstance(told, Mapping):
        return None
    instance, clock = told.get("instance"), told.get("clock")
    if not isinstance(instance, str) or not _is_moment(clock):
        return None
    return client.AgentInfo(
        instance[:_LONGEST_ID], float(clock or 0), told.get("reports") is True, told.get("relays") is True
    )


def result_of(answer: Any) -> Any:
    """Return the result that an answer holds, or raise the error that it holds.

    :raises ImageCacheError: the agent raised an error, which is raised again as its own kind.
    :raises Malformed: what arrived is not an answer.
    """
    fields = _mapping(answer, "an answer")
    if "error" not in fields:
        return fields.get("result")
    told = _mapping(fields["error"], "an error")
    kind = _KINDS.get(str(told.get("kind")), errors.BackendError)
    more = {name: str(told[name]) for name in ("image", "path", "next_step") if told.get(name) is not None}
    raise kind(str(told.get("cause", "the agent failed")), **more)


def _from_error(error: errors.ImageCacheError) -> dict[str, Any]:
    kind = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS or each is Exception)
    return {
        "kind": kind,
        "cause": error.cause,
        "image": error.image,
        "path": error.path,
        "next_step": error.next_step,
    }


def _mapping(found: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(found, Mapping):
        raise Malformed(
            f"the message is not {what}, it is a {type(found).__name__}",
            next_step="upgrade the side that sent it",
        )
    return found


def _integer(found: Any, what: str, *, most: int = job.LARGEST) -> int:
    if type(found) is not int or not 0 <= found <= most:
        raise Malformed(f"{what} is {found!r:.100}", next_step="upgrade the side that sent it")
    return found


def _mailbox(found: Any) -> str | None:
    if found is None or (isinstance(found, str) and _MAILBOX.fullmatch(found)):
        return found
    raise Malformed("report_to is no mailbox", next_step="upgrade the side that sent it")


def _route(found: Any) -> HostRoute | None:
    if found is None:
        return None
    fields = _mapping(found, "a route")
    if unknown := fields.keys() - {"parents", "origin"}:
        raise Malformed(
            f"a route may not have {min(map(str, unknown))!r}", next_step="name hosts, and no addresses"
        )
    if type(fields.get("origin")) is not bool:
        raise Malformed("the route does not say whether to ask the image service", next_step="upgrade")
    return HostRoute(_host_names(fields.get("parents")), fields["origin"])


def _route_state(found: Any) -> RouteState | None:
    if found is None:
        return None
    fields = _mapping(found, "the state of a route")
    parent = fields.get("parent")
    if parent not in (None, ORIGIN):
        (parent,) = _host_names([parent])
    wants_origin, mismatched = (fields.get(name) is True for name in ("wants_origin", "mismatched"))
    return RouteState(parent, wants_origin, _host_names(fields.get("wrong")), mismatched)


def _host_names(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or len(found) > _MOST_PARENTS:
        raise Malformed("a list of hosts is none, or too long", next_step="upgrade the side that sent it")
    for name in found:
        if not isinstance(name, str) or not HOST_NAME.fullmatch(name):
            raise Malformed(f"{name!r:.100} is no name of a host", next_step="upgrade the side that sent it")
    return tuple(found)


def _moment(found: Any, what: str) -> float | None:
    if found is None:
        return None
    if not _is_moment(found):
        raise Malformed(f"{what} is {found!r:.100}", next_step="upgrade the side that sent it")
    return float(found)


def _is_moment(found: Any) -> bool:
    # An integer may be too large for a float, which math.isfinite() answers with an OverflowError.
    return type(found) in (int, float) and 0 <= found <= job.LARGEST and math.isfinite(found)
