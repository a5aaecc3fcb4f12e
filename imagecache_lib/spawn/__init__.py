# SPDX-License-Identifier: Apache-2.0
"""From a request to a disk, in call order: locks, ingest, decode, publish."""
