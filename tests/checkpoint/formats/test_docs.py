# SPDX-License-Identifier: Apache-2.0
"""The format that docs/formats.md adds as an example is complete."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.formats.compressed import compress, config_of
from tests.checkpoint.formats.stored import write
from vllm_mixprec.checkpoint import formats
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.errors import UnsupportedError

DOCS = Path(__file__).parents[3] / "docs" / "formats.md"
ARGS = {"num_bits": 8, "type": "int", "strategy": "channel"}


def test_the_documented_format_reads_what_the_library_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, read, scheme = compress("int-quantized", (96, 256), ARGS)
    config = config_of(scheme, form="int-quantized")
    with pytest.raises(UnsupportedError, match="a weight stored as I8"):
        write(tmp_path, stored, config)

    source = re.search(r"```python\n(\"\"\"compressed-tensors.*?)```", DOCS.read_text(), re.DOTALL)
    assert source is not None
    namespace: dict[str, Any] = {}
    exec(source[1], namespace)
    entry = namespace["CT_INT8"]
    monkeypatch.setitem(formats.FORMATS, entry.name, entry)
    monkeypatch.setattr(formats, "_RECOGNISERS", (*formats._RECOGNISERS, entry.recognise))
    module, tensors = write(tmp_path, stored, config)
    assert (module.scheme.label, module.shape) == ("ct_int8 channel", (96, 256))
    assert torch.equal(dequantize(module.scheme, tensors, torch.float32), read["weight"])
