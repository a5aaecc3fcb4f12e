# SPDX-License-Identifier: Apache-2.0
"""The cache directory, and the protocol for changing it."""
