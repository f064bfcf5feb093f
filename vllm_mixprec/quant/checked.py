# SPDX-License-Identifier: Apache-2.0
"""Holds every process to what the start has checked.

The front end checks a plan; each worker, and later the front end itself, resolves it again, which
is quicker than handing the table on. Between the two somebody may edit the plan or a checkpoint,
a hub's branch may move, and another machine may have other files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.files import FileStamp, require_same
from vllm_mixprec.errors import PlanError
from vllm_mixprec.routing import RouteTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "mixprec_checked"  # in LoadConfig.model_loader_extra_config, which reaches every worker


@dataclass(frozen=True)
class _Checked:
    """What the front end found.

    Attributes:
        digests: what :meth:`RouteTable.digests` says.
        stamps: of the shards that were here; of none where workers run on other machines, too.
    """

    digests: dict[str, str]
    stamps: dict[Path, FileStamp]


def note_checked(vllm_config: "VllmConfig", table: RouteTable) -> None:
    """Have every process compare what it resolves with a table."""
    parallel, load_config = vllm_config.parallel_config, vllm_config.load_config
    is_one_machine = (
        parallel.nnodes == 1
        and parallel.data_parallel_size_local == parallel.data_parallel_size
        and not parallel.use_ray
    )
    load_config.model_loader_extra_config = {
        **(load_config.model_loader_extra_config or {}),
        _KEY: _Checked(table.digests(), _stamps(table) if is_one_machine else {}),
    }


def require_checked(vllm_config: "VllmConfig", table: RouteTable) -> None:
    """Make sure that a table routes what the start checked; nothing where no start did.

    Raises:
        PlanError: it does not, with the source that differs.
    """
    checked = _checked(vllm_config)
    if checked is None:
        return
    found = table.digests()
    for source in sorted(found.keys() | checked.digests.keys()):
        if found.get(source) != checked.digests.get(source):
            raise PlanError(
                f"{table.plan.path}: what source {source!r} gives is not what was checked at the "
                "start: the plan, the source's files or this machine's kernels are others; "
                "expected the same in every process. Leave plans and checkpoints alone while they "
                "are served, give all machines the same, and start again"
            )


def require_checked_files(vllm_config: "VllmConfig", table: RouteTable) -> None:
    """Make sure that a table's shards are the files that the start checked, by their stamps.

    Raises:
        CheckpointError: one was replaced or written to since.
    """
    checked = _checked(vllm_config)
    if checked is not None:
        for file, stamp in _stamps(table).items():
            if file in checked.stamps:
                require_same(file, stamp, checked.stamps[file])


def _checked(vllm_config: "VllmConfig") -> _Checked | None:
    extra = vllm_config.load_config.model_loader_extra_config
    return extra.get(_KEY) if isinstance(extra, dict) else None


def _stamps(table: RouteTable) -> dict[Path, FileStamp]:
    specs = (spec for route in table.routes.values() for spec in route.tensors.values())
    return {spec.file: spec.stamp for spec in specs if spec.stamp is not None}
