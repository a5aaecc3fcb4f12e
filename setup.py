# SPDX-License-Identifier: Apache-2.0
"""Everything is in setup.cfg; pbr reads it."""

import setuptools

setuptools.setup(setup_requires=["pbr>=6.1.1"], pbr=True)
