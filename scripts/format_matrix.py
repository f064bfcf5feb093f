# SPDX-License-Identifier: Apache-2.0
"""Run the tests of every format and write the table of docs/formats.md from those that passed.

    .venv/bin/python scripts/format_matrix.py

On a CPU with AVX512_BF16 and AVX512_VNNI, in the environment of scripts/setup_env.sh. Exit code 1
if a test failed; the table then has dashes where it did.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- format matrix: begin -->", "<!-- format matrix: end -->"
TESTS = (
    "tests/checkpoint/formats/test_matrix.py",
    "tests/quant/test_formats.py",
    "tests/quant/test_cpu_other.py",
    "tests/engine/test_formats.py",
)
COLUMNS = (
    "recognised",
    "dequantised",
    "cpu linear",
    "cpu experts",
    "AVX512F linear",
    "cuda",
    "engine",
)


class Passed:
    """Collects what passed tests recorded: (case, column) -> what the cell says."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "matrix":
                    case, column, cell = value
                    self.cells[case, column] = cell


def make_table(cells: dict[tuple[str, str], str]) -> str:
    from tests.checkpoint.formats.tools import CASES, tool_of

    columns = (c.replace("cpu", "CPU,").replace("AVX512F", "AVX512F CPU,") for c in COLUMNS)
    header = ("case", "scheme", "tool", *columns)
    rows = [header, ("---",) * len(header)]
    for case, entry in CASES.items():
        found = (cells.get((case, column), "-") for column in COLUMNS)
        rows.append((case, entry.label, tool_of(case), *found))
    lines = [f"| {' | '.join(row)} |".replace("{k}", "K") for row in rows]
    return "\n".join(lines)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    passed = Passed()
    code = pytest.main(["-q", *(str(ROOT / test) for test in TESTS)], plugins=[passed])
    text = DOCS.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCS.write_text(f"{head}{BEGIN}\n{make_table(passed.cells)}\n{END}{tail}")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
