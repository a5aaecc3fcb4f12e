# SPDX-License-Identifier: Apache-2.0
"""The periodic pass, in call order: inventory, references, policy, evict; recover, for what crashes left."""
