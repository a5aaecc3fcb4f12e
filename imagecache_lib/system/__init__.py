# SPDX-License-Identifier: Apache-2.0
"""The kernel, wrapped once: locks, durable and sparse files, names that appear whole, clock and limits."""
