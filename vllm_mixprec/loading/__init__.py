# SPDX-License-Identifier: Apache-2.0
"""vLLM model loader that reads the routed tensors of one rank, in file order."""
