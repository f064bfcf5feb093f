# SPDX-License-Identifier: Apache-2.0
"""HTTP on vLLM's own server, under ``/v1/mixprec``: statistics, the dashboard, generation."""
