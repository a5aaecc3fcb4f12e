# SPDX-License-Identifier: Apache-2.0
"""Measures the library side by side with Nova, qemu-img, cp and the bare download: `make bench`."""
