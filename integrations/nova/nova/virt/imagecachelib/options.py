# SPDX-License-Identifier: Apache-2.0
"""The adapter's own options. All others are Nova's or the library's, and are registered by them."""

from __future__ import annotations

from oslo_config import cfg

GROUP = "image_cache"

OPTIONS = [
    cfg.BoolOpt(
        "allow_untested_nova",
        default=False,
        help="Start under a release of Nova that this driver was not tested with. It calls functions that"
        " Nova changes without notice; try it on a host that may fail.",
    ),
    cfg.BoolOpt(
        "glance_computes_digests",
        default=False,
        help="Glance has computed the digests of all images itself: it has no web store with do_secure_hash"
        " off, and no endpoint where users may register locations (show_multiple_locations, and the policy"
        " set_image_location). An image with the digest of another one in the cache is then made from that,"
        " without a download. Where users can state digests, this gives them the content of others' images.",
    ),
]


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Return the options by group: the entry point ``oslo.config.opts``."""
    return [(GROUP, OPTIONS)]
