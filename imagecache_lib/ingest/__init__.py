# SPDX-License-Identifier: Apache-2.0
"""Bytes in flight: from a source to a sealed stage."""
