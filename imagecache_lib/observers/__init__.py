# SPDX-License-Identifier: Apache-2.0
"""Observers of the cache's events: the log, metrics, notifications."""
