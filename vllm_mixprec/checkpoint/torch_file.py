# SPDX-License-Identifier: Apache-2.0
"""Reads where the tensors of one PyTorch file (``.bin``) lie: no data, and no pickle's code.

Such a file is a zip archive (torch/serialization.py, ``_save``): ``data.pkl`` names the tensors,
and each storage is an uncompressed record ``data/KEY``. The pickle is read by
``torch.load(weights_only=True)`` alone, which builds tensors and nothing else, onto the "meta"
device, where it allocates nothing and notes each storage's offset in the file.
"""

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vllm_mixprec.checkpoint.files import open_file
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record; the lengths of its name and extra field

_REMEDY = "Convert the checkpoint to safetensors, or choose another source."


def read_torch_header(path: str | os.PathLike[str]) -> dict[str, TensorSpec]:
    """Read the tensor specs of one ``.bin`` file, none of its data.

    Tensors that share memory get specs whose byte ranges overlap.

    Returns:
        Tensor name -> spec, in the order of the file.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or its pickle asks for more than
            tensors, as malicious ones do.
        UnsupportedError: the file is older than torch 1.6's zip archives, is no dict of tensors,
            or holds a tensor that is not contiguous, negates what is stored, or is of a dtype
            that is not read.
    """
    file = Path(path)
    try:
        descriptor, stamp = open_file(file)
    except OSError as error:
        raise _unreadable(file, str(error)) from error
    with open(descriptor, "rb") as stream:
        records = _find_records(file, stream)
        tensors = _load_meta(file, stream)
    return {
        name: _make_spec(file, name, tensor, records)._replace(stamp=stamp)
        for name, tensor in tensors.items()
    }


def _find_records(file: Path, stream: BinaryIO) -> dict[int, int]:
    """Return offset -> bytes of each record of the archive.

    Raises:
        CheckpointError, UnsupportedError: as :func:`read_torch_header` does.
    """
    try:
        if not zipfile.is_zipfile(stream):
            raise UnsupportedError(
                f"{file}: no zip archive, expected a file that torch 1.6 or later wrote; older "
                f"ones are not read, and one that is cut short looks like them. {_REMEDY}"
            )
        records = {}
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED:
                    raise UnsupportedError(
                        f"{file}: record {info.filename} is compressed, expected it stored as "
                        f"torch writes it. {_REMEDY}"
                    )
                stream.seek(info.header_offset)
                name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
                begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
                records[begin] = info.file_size
            # Read when nothing is compressed: no decompressor sees what a stranger wrote.
            order = [info for info in infos if info.filename.endswith("/byteorder")]
            if any(archive.read(info).strip() != b"little" for info in order):
                raise UnsupportedError(f"{file}: big-endian, expected little-endian. {_REMEDY}")
    # What zipfile raises over names, flags and offsets that are damaged.
    except (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise _unreadable(file, str(error)) from error
    return records


def _load_meta(file: Path, stream: BinaryIO) -> dict[str, Any]:
    """Let torch read the pickle, tensors only, onto the "meta" device."""
    import torch

    stream.seek(0)
    try:
        content = torch.load(stream, map_location="meta", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{file}: refused, its pickle holds more than tensors ({reason}): it could run code. "
            "Expected a dict of tensors that torch.load(weights_only=True) reads. Do not load this "
            "file; choose another source."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle ends in any of them
        reason = str(error).strip().partition("\n")[0]
        raise _unreadable(file, f"{type(error).__name__}: {reason}") from error
    if not isinstance(content, dict) or not all(type(name) is str for name in content):
        raise UnsupportedError(
            f"{file}: a {type(content).__name__}, expected a dict of tensor names. {_REMEDY}"
        )
    return content


def _unreadable(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot be read ({reason}), expected a PyTorch file. Download it again."
    )


def _make_spec(
    file: Path, name: str, tensor: "torch.Tensor | object", records: dict[int, int]
) -> TensorSpec:
    import torch

    from vllm_mixprec.checkpoint.stored import DTYPES  # it imports torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UnsupportedError(
            f"{file}: {name!r} is a {kind}, expected a dense tensor: this is no model's state "
            f"dict. {_REMEDY}"
        )
    dtype = next((spelt for spelt, known in DTYPES.items() if known == tensor.dtype), None)
    if dtype is None or tensor.is_quantized:
        raise UnsupportedError(
            f"{file}: tensor {name!r}: dtype is {tensor.dtype}, expected one of "
            f"{', '.join(sorted(map(str, DTYPES.values())))}. {_REMEDY}"
        )
    if tensor.is_neg():
        raise UnsupportedError(
            f"{file}: tensor {name!r}: a view that negates what is stored, expected the values "
            f"themselves. {_REMEDY}"
        )
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"{file}: tensor {name!r}: shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}, expected a contiguous tensor. {_REMEDY}"
        )
    storage = tensor.untyped_storage()
    begin: int = getattr(storage, "_checkpoint_offset", 0)  # no storage lies at 0
    start = tensor.storage_offset() * tensor.itemsize
    end = start + tensor.numel() * tensor.itemsize
    if end > records.get(begin, -1):
        raise CheckpointError(
            f"{file}: tensor {name!r}: bytes {start} to {end} of its storage, expected a record of "
            f"the archive with as many ({records.get(begin, 'none')}). The file is damaged: "
            "download it again."
        )
    return TensorSpec(name, dtype, tuple(tensor.shape), file, begin + start, begin + end)
