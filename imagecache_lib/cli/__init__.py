# SPDX-License-Identifier: Apache-2.0
"""The ``imagecache`` command, for operators. An extra: ``pip install imagecache-lib[cli]``."""
