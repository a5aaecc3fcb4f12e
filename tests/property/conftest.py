# SPDX-License-Identifier: Apache-2.0
"""A busy machine is slow: that is no fault of what is tested. Only a campaign chooses examples at random."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support import campaign

settings.register_profile(
    "imagecache",
    deadline=None,
    derandomize=not campaign.WHOLE,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("imagecache")
