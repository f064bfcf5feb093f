# SPDX-License-Identifier: Apache-2.0
from tests.loading.serving import needs_cpu
from vllm_mixprec.models.dsa import has_sparse_attention


@needs_cpu
def test_cpu_has_no_sparse_attention() -> None:
    assert has_sparse_attention() is False
