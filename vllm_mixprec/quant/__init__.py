# SPDX-License-Identifier: Apache-2.0
"""vLLM quantization config: which method runs each layer, and the methods vLLM does not have."""
