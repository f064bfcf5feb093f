# SPDX-License-Identifier: Apache-2.0
"""Which experts work: counters on the device, snapshots of them, and their exporters.

Importing this package imports neither torch nor vLLM; ``counter``, ``worker``, ``collect`` and
``prometheus`` do.
"""

from vllm_mixprec.experts.snapshot import ExpertLoad, ExpertSnapshot, SnapshotError

__all__ = ["ExpertLoad", "ExpertSnapshot", "SnapshotError"]
