# SPDX-License-Identifier: Apache-2.0
"""What a lease asks for: which base image, what it must prove, and who makes it if it is missing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.store import evidence
from imagecache_lib.store.directory import OpenBase
from imagecache_lib.store.evidence import Requirements, Unmet
from imagecache_lib.store.failures import Awaited, Failure
from imagecache_lib.store.stage import SealedStage
from imagecache_lib.system.retries import RetryBudget
from imagecache_lib.system.waiter import Waiter

#: How often one call may lose what it was working with (a base that leaves the cache, a stage file that is
#: swept) before something outside this library must be removing files.
MOST_RETRIES = 20


class NotPrepared(Exception):
    """What a source says is needed, and it was not asked yet: that is done with no lock held.

    :ivar has_begun: whether a fetch was begun, and another source has to be asked to go on with it.
    """

    def __init__(self, *, has_begun: bool = False) -> None:
        super().__init__()
        self.has_begun = has_begun


class Producer(Protocol):
    """Makes one base image, and checks one that is there."""

    def origins(self) -> tuple[str, ...]:
        """Return digests of where the data may come from, or nothing if it is the same for every caller."""

    def prepare(self) -> None:
        """Ask what has to be asked before :meth:`produce`, with no lock held, so that no caller waits for it.

        What is answered is kept for the other methods, which ask nothing. It is asked anew where it failed.

        :raises: as :meth:`produce`.
        """

    def require_prepared(self) -> None:
        """Raise if :meth:`prepare` was not called since something has to be asked that :meth:`produce` needs.

        :raises NotPrepared: it was not.
        """

    def share(self, failure: Failure) -> None:
        """Raise how a fetch that this caller waited for failed, if it would fail for this caller too.

        :raises NotPrepared: as :meth:`require_prepared`, if that is needed to tell.
        """

    def refuse_impossible(self) -> None:
        """Raise if :meth:`produce` could only fail."""

    def unmet(self, opened: OpenBase) -> Unmet | None:
        """Return why a base image does not serve, whatever its record says, or None if the record decides.

        :raises BackendError: it cannot be read.
        """

    def authorize(self) -> None:
        """Raise if the caller may not have what is in the cache already."""

    def produce(self) -> SealedStage:
        """Make the base image in a stage file, which is the caller's to publish or to discard.

        :raises NotPrepared: as :meth:`require_prepared`, also where another source has to be asked.
        :raises StageGone: the stage file was swept away meanwhile.
        """

    def adopt(self, opened: OpenBase, known: evidence.Record | None) -> evidence.Record | Unmet:
        """Check a base image that is there, and write down that it was checked.

        Returns its record, or why it does not serve.

        :param known: its record, which lacks an inspection under today's rules or the digest that is
            demanded, or None if it has no record because another program made it.
        :raises NotPrepared: as :meth:`require_prepared`, if that is needed for it.
        """


def _retries() -> RetryBudget:
    return RetryBudget(MOST_RETRIES)


@dataclasses.dataclass(frozen=True)
class BaseRequest:
    """One base image that one call needs.

    :param name: its name in the cache.
    :param requirements: what its record must prove.
    :param producer: makes it if it is missing.
    :param waiter: the caller.
    :param image_id: the image that it is made from, or None for a swap area or an ephemeral filesystem.
    :param retries: what is left of the call's retries.
    :param awaited: the fetches of this base that the call has waited for.
    :param publishable: whether what the producer makes may be published; if not, it is for the call alone.
    """

    name: str
    requirements: Requirements
    producer: Producer
    waiter: Waiter
    image_id: str | None = None
    retries: RetryBudget = dataclasses.field(default_factory=_retries)
    awaited: Awaited = dataclasses.field(default_factory=Awaited)
    publishable: bool = True

    @property
    def label(self) -> str:
        """What messages and events call it."""
        return self.image_id or self.name

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Let every error of the body say which image it is about."""
        try:
            yield
        except errors.ImageCacheError as error:
            if error.image is None:
                error.image = self.image_id
            raise
