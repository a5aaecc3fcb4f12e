# SPDX-License-Identifier: Apache-2.0
"""Reports for people: what is wrong with a host, what does not fit together, what the cache holds."""
