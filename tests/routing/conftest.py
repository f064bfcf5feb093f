# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from tests.routing.models import copy_models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a copy of every fixture checkpoint."""
    return copy_models(tmp_path)
