# SPDX-License-Identifier: Apache-2.0
"""What bytes mean: disk image formats, filesystems' superblocks, and the program that converts the rest."""
