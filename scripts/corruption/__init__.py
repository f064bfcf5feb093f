# SPDX-License-Identifier: Apache-2.0
"""The damage of scripts/corrupt.py, and how its cases are run and judged."""
