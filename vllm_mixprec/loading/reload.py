# SPDX-License-Identifier: Apache-2.0
"""Takes the sources' files as they are by now, for a reload."""

from collections.abc import Callable, Collection
from pathlib import Path

from vllm_mixprec.checkpoint import TensorSpec
from vllm_mixprec.checkpoint.files import FileStamp, stamp_of
from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.routing import Route, RouteTable


def as_sources_are(
    routes: Collection[Route], resolve: Callable[[], RouteTable]
) -> dict[TensorSpec, TensorSpec]:
    """Map each spec of routes to the same one in a file that may have been written to since.

    Values may be others by now, layouts may not. A part of a fused tensor is told from its
    neighbours by the whole header alone, so where a file changed the plan is resolved again.

    Args:
        resolve: resolves the plan that the routes are of.

    Raises:
        CheckpointError: a file is gone, or a module lies elsewhere or is stored otherwise by now.
        MixPrecError: the sources do not fit the plan any more.
    """
    specs = [spec for route in routes for spec in route.tensors.values()]
    stamps: dict[Path, FileStamp | None] = {spec.file: spec.stamp for spec in specs}
    if all(stamp_of(file) == stamp for file, stamp in stamps.items()):
        return {spec: spec for spec in specs}
    table = resolve()
    moved: dict[TensorSpec, TensorSpec] = {}
    for route in routes:
        now = table.routes.get(route.module)
        tensors = {} if now is None or now.stored != route.stored else now.tensors
        for suffix, spec in route.tensors.items():
            found = tensors.get(suffix)
            if found is None or found._replace(stamp=None) != spec._replace(stamp=None):
                raise CheckpointError(
                    f"{spec.file}: {spec.name} is not {spec.dtype} {list(spec.shape)} of "
                    f"{route.stored.label} at bytes {spec.start} to {spec.end} any more; expected "
                    "the header and the config that the server started with. Put the files back, "
                    "or restart the server"
                )
            moved[spec] = found
    return moved
