# SPDX-License-Identifier: Apache-2.0
"""The qcow2 format, after QEMU's docs/interop/qcow2: header, tables, overlays, the streaming decoder."""
