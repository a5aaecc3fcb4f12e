# SPDX-License-Identifier: Apache-2.0
"""Where image bytes come from."""
