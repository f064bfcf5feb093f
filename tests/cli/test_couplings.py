# SPDX-License-Identifier: Apache-2.0
import ast
from pathlib import Path

import pytest

import vllm_mixprec
from vllm_mixprec.couplings import COUPLINGS, Coupling, couplings_for, find_problem

PACKAGE = Path(vllm_mixprec.__file__).parent


def imported_from_vllm() -> dict[str, list[str]]:
    """Return ``module:name`` -> files of everything that the package imports from vLLM."""
    found: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        if file.is_relative_to(PACKAGE / "cli"):
            continue  # doctor asks, it does not rely
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    symbol = f"{node.module}:{alias.name}"
                    found.setdefault(symbol, []).append(str(file.relative_to(PACKAGE)))
    return found


def test_every_import_from_vllm_is_in_the_table():
    listed = {coupling.symbol for coupling in COUPLINGS}
    unlisted = {s: files for s, files in imported_from_vllm().items() if s not in listed}
    assert unlisted == {}, "add them to vllm_mixprec/couplings.py"


def test_table_lists_nothing_that_the_package_no_longer_imports():
    imported = imported_from_vllm()
    stale = [
        coupling.symbol
        for coupling in COUPLINGS
        # Methods stand for their class; operators and _custom_ops' functions for their module.
        if coupling.symbol.split(".")[0] == "vllm"
        and not coupling.symbol.startswith("vllm._custom_ops:")
        and f"{(parts := coupling.symbol.split(':'))[0]}:{parts[1].split('.')[0]}" not in imported
    ]
    stale = [symbol for symbol in stale if not symbol.endswith(":_custom_ops")]
    assert stale == []


def test_symbols_occur_once():
    symbols = [coupling.symbol for coupling in COUPLINGS]
    assert len(symbols) == len(set(symbols))


def test_only_the_platforms_own_couplings_are_asked_for():
    cpu = {coupling.family for coupling in couplings_for("cpu-avx512")}
    assert cpu == {None, "cpu"}
    assert {coupling.family for coupling in couplings_for("cuda")} == {None, "cuda"}


# The probes themselves, on the standard library: they know nothing of vLLM.


@pytest.mark.parametrize(
    "coupling",
    [
        Coupling("pathlib:Path", "", members=("exists", "parent")),
        Coupling("shutil:copyfile", "", ("src", "dst")),
        Coupling("threading:Timer", "", ("interval",), ("interval", "daemon")),
        Coupling("argparse:ArgumentParser.add_argument", ""),
    ],
)
def test_coupling_that_holds(coupling):
    assert find_problem(coupling) is None


@pytest.mark.parametrize(
    ("coupling", "said"),
    [
        (Coupling("no_such_module:X", ""), "cannot be imported: ModuleNotFoundError"),
        (Coupling("pathlib:Puth", ""), "not there: AttributeError"),
        (Coupling("pathlib:Path", "", members=("vanished",)), "lacks vanished"),
        (Coupling("shutil:copyfile", "", ("src", "target")), "takes no target, only src, dst"),
    ],
)
def test_coupling_that_does_not_hold(coupling, said):
    assert said in find_problem(coupling)
