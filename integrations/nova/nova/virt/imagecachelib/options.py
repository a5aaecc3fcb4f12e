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
]


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Return the options by group: the entry point ``oslo.config.opts``."""
    return [(GROUP, OPTIONS)]
