# SPDX-License-Identifier: Apache-2.0
"""Holds every process to what the start has checked.

The front end checks a plan; each worker, and later the front end itself, resolves it again, which
is quicker than handing the table on. Between the two somebody may edit the plan or a checkpoint,
a hub's branch may move, and another machine may have other files.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_mixprec.errors import CheckpointError, PlanError
from vllm_mixprec.routing import RouteTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "mixprec_checked"  # in LoadConfig.model_loader_extra_config, which reaches every worker


# Those whose workers are on this machine, if it is the only one.
_LOCAL_EXECUTORS = ("uni", "mp", "external_launcher")


@dataclass(frozen=True)
class _Checked:
    """What the front end found.

    Attributes:
        digests: what :meth:`RouteTable.digests` says.
        files: the shards, each with its size and the time of its last change; None of one that was
            not here. None where workers may have files of their own.
    """

    digests: dict[str, str]
    files: dict[str, tuple[int, int] | None] | None


def note_checked(vllm_config: "VllmConfig", table: RouteTable) -> None:
    """Have every process compare what it resolves with a table."""
    parallel, load_config = vllm_config.parallel_config, vllm_config.load_config
    is_one_machine = (
        parallel.nnodes == 1
        and parallel.data_parallel_size_local == parallel.data_parallel_size
        and parallel.distributed_executor_backend in _LOCAL_EXECUTORS
    )
    checked = _Checked(table.digests(), _files(table) if is_one_machine else None)
    extra = load_config.model_loader_extra_config or {}
    load_config.model_loader_extra_config = {**extra, _KEY: checked}


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
                "start: the plan, the source's files or the kernels of this process's machine are "
                "others, or a hub's branch has moved; expected the same in every process. Leave "
                "plans and checkpoints alone while they are served, name a hub's commit as the "
                "source's revision, give all machines the same, and start again"
            )


def require_checked_files(vllm_config: "VllmConfig", table: RouteTable) -> None:
    """Make sure that a table's shards are the files that the start checked.

    Told by size and time: a file system may number its files anew for another process.

    Raises:
        CheckpointError: one was replaced or written to since, or is not the one that was checked.
    """
    checked = _checked(vllm_config)
    if checked is None or checked.files is None:
        return
    for file, state in _files(table).items():
        expected = checked.files.get(file, (-1, -1))
        if expected is not None and state != expected:
            raise CheckpointError(
                f"{file}: not the file that was checked at the start, or written to since; its "
                "tensors may be another model's. Leave checkpoints alone while they are loaded, "
                "and start again"
            )


def _checked(vllm_config: "VllmConfig") -> _Checked | None:
    extra = vllm_config.load_config.model_loader_extra_config
    return extra.get(_KEY) if isinstance(extra, dict) else None


def _files(table: RouteTable) -> dict[str, tuple[int, int] | None]:
    stamps = {
        spec.file: spec.stamp for route in table.routes.values() for spec in route.tensors.values()
    }
    return {
        str(file): None if stamp is None else (stamp.size_bytes, stamp.modified_ns)
        for file, stamp in stamps.items()
    }
