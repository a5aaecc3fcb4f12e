# SPDX-License-Identifier: Apache-2.0
"""A busy machine is slow: that is no fault of what is tested."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("imagecache", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("imagecache")
