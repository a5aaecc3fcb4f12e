# SPDX-License-Identifier: Apache-2.0
"""For tests of drivers, sources and backends: fakes of the real interfaces, and the suites they pass."""
