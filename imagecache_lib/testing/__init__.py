# SPDX-License-Identifier: Apache-2.0
"""For those who test drivers, sources and backends: fakes of the real interfaces, and the suites they pass."""
