# SPDX-License-Identifier: Apache-2.0
"""What instance disks are made of."""
