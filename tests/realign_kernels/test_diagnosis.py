"""The report of the kernels: installed backends, and an alarm where numbers are wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import realign_kernels
from realign_kernels import diagnose, diagnosis
from realign_kernels.backends import torch as plain


def test_the_report_names_versions_backends_and_errors():
    lines, is_sound = diagnose()
    assert is_sound
    text = "\n".join(lines)
    assert f"realign_kernels {realign_kernels.__version__} in " in text
    assert f"torch {torch.__version__}" in text
    for name, state in realign_kernels.describe_backends().items():
        assert f"kernel backend {name}: {state}" in lines
    checks = [line for line in lines if line.startswith("check of ")]
    assert len(checks) >= 2
    assert all(line.endswith(": right") for line in checks)
    assert [line for line in checks if line.startswith("check of eager on cpu, bfloat16")]


@pytest.mark.parametrize("wrong", [1 + 1e-4, float("nan")])
def test_wrong_numbers_are_reported_and_exit_with_1(monkeypatch, capsys, wrong):
    product = plain.product
    monkeypatch.setattr(
        plain, "product", lambda out, a, b, *, adds: product(out, a * wrong, b, adds=adds)
    )
    with pytest.raises(SystemExit) as stop:
        diagnosis.main()
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    wrong_checks = {line.split(",")[0]: line for line in lines if line.endswith(": WRONG")}
    assert "check of eager on cpu" in wrong_checks


def test_the_diagnosis_command_runs_with_the_kernels_package_only():
    code = (
        "import runpy, sys\n"
        "for name in ('realign', 'transformers', 'typer', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "runpy.run_module('realign_kernels', run_name='__main__')\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"realign_kernels {realign_kernels.__version__} in ")
    assert result.stdout.count(": right") >= 2
