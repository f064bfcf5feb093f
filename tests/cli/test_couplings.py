# SPDX-License-Identifier: Apache-2.0
import ast
import json
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import vllm_mixprec
from tests.test_unfit_vllm import doctor
from vllm_mixprec.couplings import COUPLINGS, Coupling, couplings_for, find_problem
from vllm_mixprec.couplings.sources import VllmSources

PACKAGE = Path(vllm_mixprec.__file__).parent
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_couplings.py"


def own_files() -> list[Path]:
    """The package's files and the patches; the commands ask, they do not rely."""
    files = [file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(PACKAGE / "cli")]
    return files + sorted((ROOT / "patches").glob("*.py"))


def imported_from_vllm() -> dict[str, list[str]]:
    """Return ``module:name`` -> files of everything that the package imports from vLLM.

    Of ``import vllm.envs as envs`` it is every ``envs.NAME`` of the file.
    """
    found: dict[str, list[str]] = {}
    for file in own_files():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    if (
                        find_spec(f"{node.module}.{alias.name}")
                        if is_package(node.module)
                        else None
                    ):
                        modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    else:
                        found.setdefault(f"{node.module}:{alias.name}", []).append(file.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "vllm":
                        modules[alias.asname or alias.name] = alias.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                if module is not None:
                    found.setdefault(f"{module}:{node.attr}", []).append(file.name)
    return found


@cache
def is_package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def test_every_import_from_vllm_is_in_the_table():
    listed = {coupling.symbol for coupling in COUPLINGS}
    imported = imported_from_vllm()
    assert "vllm.config:VllmConfig" in imported and "vllm.envs:VLLM_MOE_SKIP_PADDING" in imported
    assert "vllm.v1.worker.worker_base:WorkerWrapperBase" in imported
    unlisted = {symbol: files for symbol, files in imported.items() if symbol not in listed}
    assert unlisted == {}, "add them to vllm_mixprec/couplings"


def test_table_lists_nothing_that_the_package_does_not_use():
    imported = imported_from_vllm()
    words = set(
        re.findall(
            r"\w+", "\n".join(f.read_text() for f in own_files() if "couplings" not in f.parts)
        )
    )
    stale = []
    for coupling in COUPLINGS:
        module, _, path = coupling.symbol.partition(":")
        first, *members = path.split(".")
        used = (
            f"{module}:{first}" in imported or (members or coupling.members or [first])[-1] in words
        )
        if not used or not words.issuperset(members):
            stale.append(coupling.symbol)
    assert stale == []


def test_members_of_the_table_are_used():
    words = set(
        re.findall(
            r"\w+", "\n".join(f.read_text() for f in own_files() if "couplings" not in f.parts)
        )
    )
    unused = {
        c.symbol: set(c.members) - words for c in COUPLINGS if not words.issuperset(c.members)
    }
    assert unused == {}


def test_symbols_occur_once():
    symbols = [coupling.symbol for coupling in COUPLINGS]
    assert len(symbols) == len(set(symbols))


def test_only_the_platforms_own_couplings_are_asked_for():
    assert {c.family for c in couplings_for("cpu-avx512")} == {None, "cpu", "cpu-avx512"}
    assert {c.family for c in couplings_for("cpu-other")} == {None, "cpu"}
    assert couplings_for("cpu") == couplings_for("cpu-avx512")  # of a wheel no more is known
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


# The same on sources, which are not imported.


@pytest.fixture(scope="module")
def installed() -> VllmSources:
    """The sources of the vLLM that is installed."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return VllmSources.of(Path(spec.origin).parents[1])


def test_installed_sources_hold(installed):
    family = installed.family
    problems = {c.symbol: installed.find_problem(c) for c in couplings_for(family)}
    assert {symbol: problem for symbol, problem in problems.items() if problem} == {}
    assert len(problems) > 90


WRONG = [
    Coupling("vllm.no_such_module:X", ""),
    Coupling("vllm.config:NoSuchConfig", ""),
    Coupling("vllm.config:VllmConfig.no_such_method", ""),
    Coupling("vllm.config:LoadConfig", "", members=("load_format", "vanished")),
    Coupling("vllm.model_executor.models:ModelRegistry", "", members=("vanished",)),
    Coupling("vllm._custom_ops:int4_scaled_mm_cpu", "", ("x", "vanished")),
    Coupling("vllm.model_executor.layers.linear:LinearBase", "", ("prefix", "vanished")),
    Coupling("torch:ops._C.no_such_operator", "", ("x",)),
    Coupling("torch:ops._C.convert_weight_packed", "", ("other",)),
]


@pytest.mark.parametrize("coupling", WRONG, ids=lambda coupling: coupling.symbol)
def test_sources_and_imports_find_the_same_breaks(installed, coupling):
    if coupling.symbol.startswith("torch") and installed.family != "cpu":
        pytest.skip("the operators are those of vLLM's CPU build")
    found, imported = installed.find_problem(coupling), find_problem(coupling)
    assert found is not None and imported is not None
    assert found.split()[:2] == imported.split()[:2] or {found[:9], imported[:9]} == {"not there"}
    for name in ("vanished", "convert_weight_packed", "no_such_module"):
        if name in coupling.symbol or name in coupling.members + coupling.parameters:
            assert ("weight" if "packed" in name else name) in found


FILES = {
    "vllm/__init__.py": "from .inner import *\nif TYPE_CHECKING:\n    from vllm.lazy import Late\n",
    "vllm/inner/__init__.py": "from .deep import Base as Renamed, registry\nfrom os import Out\n",
    "vllm/inner/deep.py": """
class Root:
    def __init__(self, root): self.of_root = 1
class Left(Root):
    def __init__(self, left, **kwargs): pass
class Right(Root):
    def __init__(self, right, **kwargs): pass
class Base(Left, Right):
    field: int = 0
    def __init__(self, own, **kwargs): pass
    def method(self, a, *, b): self.set_late = 1
@dataclass
class Data:
    x: int
    y: int = 0
registry = Base(1)
Base.patched = None
""",
    "vllm/lazy.py": "class Late: pass\n",
}


@pytest.mark.parametrize(
    ("symbol", "parameters", "members", "problem"),
    [
        ("vllm:Late", (), (), None),
        ("vllm:Renamed", ("own", "left", "right", "root"), ("set_late", "of_root", "field"), None),
        ("vllm:Renamed", ("a",), (), "takes no a, only own, kwargs, left, right, root"),
        ("vllm:Renamed.method", ("a", "b"), (), None),
        ("vllm:Renamed.other", (), (), "not there: vllm has no Renamed.other"),
        ("vllm:registry", (), ("method",), None),
        ("vllm:registry", (), ("other",), "lacks other"),
        ("vllm.inner:Out", ("anything",), ("anything",), None),  # another package's
        ("vllm.inner.deep:Data", ("x", "y"), ("x",), None),
        ("vllm.inner.deep:Data", ("z",), (), "takes no z, only x, y"),
        ("vllm:Gone", (), (), "not there: vllm has no Gone"),
        ("vllm.gone:X", (), (), "vllm.gone cannot be imported: there is no such file"),
    ],
)
def test_names_are_followed_through_imports_and_bases(symbol, parameters, members, problem):
    sources = VllmSources(lambda name: FILES[name].encode() if name in FILES else None)
    assert sources.find_problem(Coupling(symbol, "", parameters, members)) == problem


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=100
    )


def test_script_names_the_coupling_that_a_vllm_breaks(tmp_path):
    file = "model_executor/model_loader/weight_utils.py"
    overlay = doctor(tmp_path, file, "def default_weight_loader(", "def other_weight_loader(")
    done = run_script(overlay, "--json")
    assert done.returncode == 1, done.stderr
    [result] = json.loads(done.stdout)["wheels"]
    [broken] = [item for item in result["couplings"] if item["problem"] is not None]
    assert broken["symbol"].endswith("weight_utils:default_weight_loader")
    assert "not there" in broken["problem"]


def test_script_refuses_what_is_no_wheel(tmp_path):
    file = tmp_path / "vllm.whl"
    file.write_text("no archive")
    done = run_script(file)
    assert done.returncode == 1
    assert "expected a wheel of vLLM" in done.stderr and "Traceback" not in done.stderr
