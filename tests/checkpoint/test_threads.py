# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from vllm_mixprec.checkpoint import threads


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 4),  # no limit: the cores that the process may run on
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 4),
        (None, 4),  # cgroup v1, or none
    ],
)
def test_a_containers_quota_limits_the_cores_to_read_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: int
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert threads.reading_cores() == cores
