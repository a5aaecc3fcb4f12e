# SPDX-License-Identifier: Apache-2.0
"""What is known of how a base image was made, and whether that is enough for a use. Rules only, no I/O.

A :class:`Record` lies beside each base that we published or adopted. It proves something only for the very
file it was written for; :mod:`imagecache_lib.store.directory` makes sure of that.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator
from typing import Any

from imagecache_lib import model

#: The version of the inspection rules in :mod:`imagecache_lib.formats.inspection`. Raise it when they
#: become stricter: bases that were inspected under older rules are inspected again, where they lie, before
#: their next use. That costs a look at their first bytes, and for one that is in a format of its own a run of
#: qemu-img; nothing is fetched.
#:
#: 2: one file is all of a disk, and the size is what qemu-img reads. 3: more files that are no disks, and
#: text that no digest vouches for.
INSPECTION_RULES = 3

#: Source formats of which other programs may have made something else than the disk, under rules before these
#: (version 2): what such a conversion holds does not show it.
_CONVERTED_ANEW = {"vmdk": 2, "vpc": 2}

#: The version of this file format.
_SCHEMA = 1


class Use(enum.Enum):
    """What a base is wanted for."""

    #: A disk is made from it, so its content must have been inspected as one.
    DISK = "disk"
    #: The bytes as they came: a kernel, a ramdisk.
    FILE = "file"


class Origin(enum.Enum):
    """How a base came into the cache."""

    #: We fetched, checked and published it.
    FETCHED = "fetched"
    #: Another program made it, or its record was lost: how it was made is unknown.
    ADOPTED = "adopted"
    #: We made it: swap, ephemeral.
    GENERATED = "generated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Evidence of one base image.

    :param name: the base's name in the cache.
    :param image_id: the image it was made from, or None for a swap or ephemeral base, which has no image.
    :param base_id: random id that the file carries as an extended attribute.
    :param inode: the file's inode number.
    :param size: the file's apparent size, in bytes.
    :param origin: how it came into the cache.
    :param source_format: what the source's content was found to be (``gpt`` counts as raw).
    :param stored_format: qemu's name of what lies in the cache.
    :param virtual_size: in bytes.
    :param digest: of the source's data. It was checked if ``digest_checked``.
    :param inspected: version of the inspection rules that its content passed, or None if it was not inspected
        as a disk.
    :param certificates: ids of the trusted certificates that lead from the signing one to a root.
    :param signed_by: id of the certificate with which its signature was verified, or None if it was not.
    :param damaged: a scrub found that the disk changed its content.
    """

    name: str
    image_id: str | None
    base_id: str
    inode: int
    size: int
    origin: Origin
    source_format: str
    stored_format: str
    virtual_size: int
    digest: model.Digest | None = None
    digest_checked: bool = False
    inspected: int | None = None
    certificates: tuple[str, ...] = ()
    signed_by: str | None = None
    damaged: bool = False

    @property
    def converted(self) -> bool:
        """Whether the file's bytes are other than the source's."""
        return self.source_format != self.stored_format

    @property
    def content_format(self) -> str:
        """What the source's content was found to be, without how it was packed."""
        return self.source_format.partition("+")[0]

    @property
    def inspectable(self) -> bool:
        """Whether looking at the file can make up for what its inspection lacks.

        A conversion has already done what a bad image asks for: it may hold a file of the host.
        """
        if not self.converted:
            return True
        return self.inspected is not None and self.inspected >= _CONVERTED_ANEW.get(self.content_format, 0)

    def to_json(self) -> bytes:
        """Return the record as it is stored."""
        fields = dataclasses.asdict(self)
        fields["origin"] = self.origin.value
        fields["schema"] = _SCHEMA
        return json.dumps(fields, sort_keys=True).encode() + b"\n"


def parse(data: bytes) -> Record | None:
    """Return the record in ``data``, or None if ``data`` is torn, unknown or of a later schema."""
    try:
        fields: dict[str, Any] = json.loads(data)
        if fields.pop("schema") != _SCHEMA:
            return None
        digest = fields.pop("digest")
        record = Record(
            origin=Origin(fields.pop("origin")),
            digest=None if digest is None else model.Digest(str(digest["algorithm"]), str(digest["value"])),
            certificates=tuple(str(each) for each in fields.pop("certificates")),
            **fields,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if _is_typed(record) else None


def _is_typed(record: Record) -> bool:
    texts = (record.name, record.base_id, record.source_format, record.stored_format)
    numbers = (record.inode, record.size, record.virtual_size)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(record.image_id, str | None)
        and isinstance(record.digest_checked, bool)
        and isinstance(record.signed_by, str | None)
        and isinstance(record.damaged, bool)
        and (record.inspected is None or type(record.inspected) is int)
    )


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a request demands of a base image.

    :param use: what it is wanted for.
    :param stored_format: the format that it must have, or None if any will do.
    :param signed: whether its signature must have been verified.
    :param trusted_certs: certificates that are trusted, or None if no chain is demanded. Every certificate of
        the chain that vouches for the base must be among them.
    :param inspected: False if the operator turned deep inspection off.
    :param digest: what the data that it is made from must have, as far as that is known without asking.
    """

    use: Use
    stored_format: str | None = None
    signed: bool = False
    trusted_certs: tuple[str, ...] | None = None
    inspected: bool = True
    digest: model.Digest | None = None


@dataclasses.dataclass(frozen=True)
class Unmet:
    """Why a base image does not serve.

    :param reason: as a clause.
    :param can_recheck: nothing speaks against it but that it was not inspected under today's rules, and
        inspecting the file can make up for that.
    :param sound: the base is whole, and serves requests for what it is: it stays, used or not.
    :param can_compare: nothing speaks against it but that, and that its bytes were not compared with the
        digest that is demanded. They are the source's as they came, so that reading the file tells.
    """

    reason: str
    can_recheck: bool = False
    sound: bool = False
    can_compare: bool = False


def unmet(record: Record, requirements: Requirements) -> Unmet | None:
    """Return what a base image lacks, or None if it serves."""
    lacks = list(_lacks(record, requirements))
    if not lacks:
        return None
    inspected = dataclasses.replace(record, inspected=INSPECTION_RULES)
    if record.inspectable and not any(_lacks(inspected, requirements)):
        return Unmet(lacks[0], can_recheck=True)
    compared = dataclasses.replace(inspected, digest=requirements.digest, digest_checked=True)
    comparable = not record.converted and not _is_of_other_data(record, requirements.digest)
    return Unmet(lacks[0], can_compare=comparable and not any(_lacks(compared, requirements)))


def _is_of_other_data(record: Record, digest: model.Digest | None) -> bool:
    """Whether a base is known to have been made from other data than has a digest."""
    if record.digest is None or not record.digest_checked or digest is None:
        return False
    return record.digest != digest and record.digest.algorithm == digest.algorithm


def lacks_signature_only(record: Record, requirements: Requirements) -> bool:
    """Whether a base image would serve, had a signature of its bytes been verified."""
    demanded = requirements.signed or requirements.trusted_certs is not None
    if not demanded or record.signed_by is not None or record.certificates:
        return False
    verified = dataclasses.replace(record, signed_by="any", certificates=requirements.trusted_certs or ())
    return not any(_lacks(verified, requirements))


def _lacks(record: Record, requirements: Requirements) -> Iterator[str]:
    """Yield what the base lacks, a clause each, the most telling first."""
    if record.damaged:
        yield "it is damaged on disk"
    needed = requirements.stored_format
    if needed not in (None, record.stored_format):
        yield f"it is stored as {record.stored_format}, and {needed} is needed"
    if requirements.use is Use.FILE:
        if record.converted:
            yield f"it was converted from {record.source_format} to {record.stored_format}"
    elif requirements.inspected and record.inspected is None:
        yield "it was fetched as a plain file and never inspected as a disk"
    elif requirements.inspected and record.inspected != INSPECTION_RULES:
        yield "it was inspected under other rules"
    if requirements.digest is not None:
        yield from _other_content(record, requirements.digest)
    trusted = requirements.trusted_certs
    vouched = bool(record.certificates) and set(record.certificates) <= set(trusted or ())
    if trusted is not None and not vouched:
        if record.origin is Origin.ADOPTED:
            yield "another program made it, so no certificate vouches for it"
        else:
            yield "it was cached without the certificates that this request demands"
    if requirements.signed and record.signed_by is None and not record.certificates:
        yield "its signature was never verified"


def _other_content(record: Record, digest: model.Digest) -> Iterator[str]:
    """Yield why nothing shows that a base was made from the data that has a digest, if nothing does.

    An adopted base is compared when it is adopted, where it has the data as they came. What it was converted
    from cannot be told from it.
    """
    demanded = f"{digest.algorithm} {digest.value} is demanded"
    if record.digest is None or not record.digest_checked:
        if record.origin is Origin.ADOPTED:
            yield f"another program made it, nothing shows from which data, and {demanded}"
        else:
            yield f"it was fetched without a digest, and {demanded}"
    elif record.digest.algorithm != digest.algorithm:
        yield f"its {record.digest.algorithm} was checked, and {demanded}"
    elif record.digest.value.lower() != digest.value.lower():
        yield f"its {digest.algorithm} is {record.digest.value}, and {demanded}"
