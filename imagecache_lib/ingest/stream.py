# SPDX-License-Identifier: Apache-2.0
"""The stages that an image's bytes pass one after the other, and what comes out at the end."""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

Result_co = TypeVar("Result_co", covariant=True)


@dataclasses.dataclass(frozen=True)
class VerifiedSignature:
    """Who signed an image's bytes, as far as that was verified.

    :param signed_by: id of the certificate whose key signed them, or None if the signature was not verified.
    :param chain: ids of the trusted certificates that lead from there to a root, which is trusted itself. It
        is empty if the call did not ask whether the certificate is trusted.
    """

    signed_by: str | None = None
    chain: tuple[str, ...] = ()


UNVERIFIED = VerifiedSignature()


@dataclasses.dataclass(frozen=True)
class Content:
    """What a pass over an image's bytes found.

    :param source_format: what the source's content is (``gpt`` counts as raw); ``raw+gzip`` if it came
        compressed.
    :param stored_format: qemu's name of what the stage file holds.
    :param virtual_size: in bytes.
    :param received: bytes that the source sent, or 0 if the content was in the cache already.
    :param inspected: version of the inspection rules that the content passed, or None if it was not inspected
        as a disk.
    :param signature: who signed it, as far as that was verified.
    """

    source_format: str
    stored_format: str
    virtual_size: int
    received: int = 0
    inspected: int | None = None
    signature: VerifiedSignature = UNVERIFIED


class Consumer(Protocol[Result_co]):
    """Takes the chunks of one image in order: a digest, an inspection, what unpacks, what decodes."""

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk, which does not change afterwards."""

    def finish(self) -> Result_co:
        """Return what became of the chunks. Called once, after the last chunk."""

    def close(self) -> None:
        """Let go of everything, whether finished or not. Called once or more."""
