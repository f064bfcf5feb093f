# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_mixprec``: the same as ``vllm-mixprec``."""

import sys

from vllm_mixprec.cli import main

if __name__ == "__main__":
    sys.exit(main())
