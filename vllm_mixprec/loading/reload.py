# SPDX-License-Identifier: Apache-2.0
"""What a reload may find in the sources: new values, where and as the old ones lay at the start.

A front end compares hashes before anything is changed, a worker what it reads itself. Both mean by
"as they lay" what :func:`fixed_of` says.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from vllm_mixprec.checkpoint import Scheme, TensorSpec
from vllm_mixprec.checkpoint.files import FileStamp, stamp_of
from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.routing import Route, RouteTable

Fixed = tuple[Scheme, Scheme, TensorSpec]
"""How a tensor's module is stored and served, and where the tensor lies, whoever wrote it when."""


def fixed_of(route: Route) -> dict[str, Fixed]:
    """Return suffix -> what of that tensor must not change while it is served."""
    return {
        suffix: (route.stored, route.served, spec._replace(stamp=None))
        for suffix, spec in route.tensors.items()
    }


def hash_fixed(routes: Mapping[str, Route]) -> str:
    """Hash what must not change of a table's routes, for one who would keep them for that alone."""
    digest = hashlib.sha256()
    for module, route in routes.items():
        digest.update(repr((module, fixed_of(route))).encode())
    return digest.hexdigest()


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
        found = {} if now is None else fixed_of(now)
        for suffix, fixed in fixed_of(route).items():
            spec = route.tensors[suffix]
            if now is None or found.get(suffix) != fixed:
                raise CheckpointError(
                    f"{spec.file}: {spec.name} is not {spec.dtype} {list(spec.shape)} of "
                    f"{route.stored.label} at bytes {spec.start} to {spec.end}, served as "
                    f"{route.served.label}, any more; expected the header and the config that the "
                    "server started with. Put the files back, or restart the server"
                )
            moved[spec] = now.tensors[suffix]
    return moved
