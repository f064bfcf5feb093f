# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import MODELS

COMMANDS = ("inspect", "plan", "check", "compose", "stats", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert "example" in result.out
    assert f"vllm-mixprec {command}" in result.out
    assert "--json" in result.out


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["check"], ["inspect"], ["compose", "p.yaml"]])
def test_wrong_usage_exits_with_2(run, argv):
    result = run(*argv)
    assert result.code == 2
    assert result.out == ""
    assert "usage:" in result.err


def test_version(run):
    assert run("--version").out.startswith("vllm-mixprec ")


def test_failure_is_one_message_without_a_traceback(run, tmp_path):
    result = run("inspect", tmp_path / "absent")
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "no such directory" in result.err and "Correct the source's path" in result.err
    assert "Traceback" not in result.err


def test_failure_under_json_is_json_on_stdout(run, tmp_path):
    result = run("inspect", tmp_path / "absent", "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    assert result.json["error"]["type"] == "CheckpointError"
    assert "no such directory" in result.err


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_mixprec, vllm_mixprec.cli; "
        "print([m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_dash_m_is_the_same_command():
    command = [sys.executable, "-m", "vllm_mixprec", "inspect", str(MODELS / "fp8")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Qwen3MoeForCausalLM" in done.stdout
    assert "\x1b" not in done.stdout  # no colour in a pipe


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes_away_causes_no_traceback(flags):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "vllm_mixprec", "inspect", str(MODELS / "fp8"), *flags]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 1
    assert done.stderr == ""


def test_console_script_is_installed():
    script = Path(sys.executable).parent / "vllm-mixprec"
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("vllm-mixprec ")
