# SPDX-License-Identifier: Apache-2.0
"""Downloading: passing over an image's data, over again if need be, until a stage file is filled."""

from __future__ import annotations

import contextlib
import dataclasses
import logging

from imagecache_lib import errors
from imagecache_lib.formats.qcow2.decoder import Unstreamable
from imagecache_lib.ingest.call import Call
from imagecache_lib.ingest.certificates import CertificateStore
from imagecache_lib.ingest.decode import Work
from imagecache_lib.ingest.pipeline import Pipeline
from imagecache_lib.ingest.stream import Content
from imagecache_lib.sources.transfer import StartAgain
from imagecache_lib.store.evidence import Requirements
from imagecache_lib.system.trace import TracePoint

LOG = logging.getLogger(__name__)


def fill(
    work: Work, call: Call, requirements: Requirements, certificate_store: CertificateStore | None
) -> Content:
    """Fill a stage file with an image's content. Returns what is in it.

    A clean restart is granted where a resumed transfer may be to blame for what looks like a bad image.

    :param certificate_store: for images whose signature must be verified.
    :raises ImageNotFound, ImageRejected, SourceError, NoSpaceError, CancelledError: the stage is not filled.
    """
    transfer, resumption = call.transfer(), work.resumption
    work.reservation.raise_to(transfer.sure_size or 0)
    work.cache.host.trace(TracePoint.INGEST_RESERVED)
    while True:  # every pass draws on the transfer's one retry budget
        work.stage.clear()
        image = transfer.image  # the answer with the data may have told another length
        kept = None if resumption is None else resumption.begin_pass(work.stage)
        try:
            pipeline = Pipeline(
                image,
                requirements,
                work,
                certificate_store=certificate_store,
                disk_size=call.size,
                hash_pieces=call.request.hash_pieces,
            )
            with contextlib.closing(pipeline), contextlib.closing(transfer.chunks(kept)) as chunks:
                for number, chunk in enumerate(chunks):
                    if number == 0:  # the answer with the data has come, and with it the length
                        pipeline.expect(transfer.sure_size)
                    pipeline.feed(chunk)
                content = pipeline.finish()
                return dataclasses.replace(content, received=content.received - transfer.kept)
        except StartAgain:
            continue
        except Unstreamable as error:
            LOG.info(
                "Image %s is fetched once more, to be converted as a whole: %s", call.image_id, error.cause
            )
            work = dataclasses.replace(work, whole=True)
        except errors.ImageRejected:
            if resumption is not None:
                resumption.void(work.stage)
            if not transfer.grant_clean_pass():
                raise
        except errors.DiskTooSmallError:
            if not transfer.doubt_length():
                raise
