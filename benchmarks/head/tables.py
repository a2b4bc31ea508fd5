"""The tables of docs/results/head.md: errors, and speed on CPU and GPU.  This only formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.head.providers import PROVIDERS
from benchmarks.head.row_classes import ROW_CLASSES
from benchmarks.result_files import load

_MODES = {"forward": "no gradient", "frozen": "frozen head", "trainable": "trainable head"}


def head_block(results: Path) -> str:
    """Return the text between the marks."""
    gpu_files = sorted(path for path in results.glob("gpu_*.json") if path.stem != "gpu_cpu")
    parts = [
        accuracy_tables(load(results / "accuracy_cpu.json")),
        cpu_tables(load(results / "cpu_head.json")),
        *[gpu_table(load(path)) for path in gpu_files],
    ]
    if not gpu_files:
        parts.append("The Triton kernels have not run on a GPU yet: `python -m benchmarks.gpu`.")
    return "\n\n".join(parts)


def accuracy_tables(content: dict[str, Any]) -> str:
    """Return one row per provider: the largest errors by class of rows, a sum, and gradients."""
    cells = content["cells"]
    if not cells:
        return "*Errors have not been measured yet: `python -m benchmarks.head.accuracy`.*"
    kinds = [kind for kind in ROW_CLASSES if any(f"/{kind}/" in key for key in cells)]
    parts = []
    for dtype in _distinct(cells, 0):
        lines = _header(
            f"{dtype} inputs", [*kinds, "sum of 512", "gradient row", "gradient row, confident"]
        )
        for name in _distinct(cells, 2):
            row = {kind: cells.get(f"{dtype}/{kind}/{name}") for kind in kinds}
            reasons = {cell["reason"] for cell in row.values() if cell and "reason" in cell}
            if not any(cell and cell["status"] == "ok" for cell in row.values()):
                lines.append(_absent(name, sorted(reasons), len(kinds) + 3))
                continue
            numbers = [_number(row[kind], "logp", "max") for kind in kinds]
            numbers.append(_number(row.get("ordinary"), "sum_of_512"))
            numbers.append(_number(row.get("ordinary"), "grad_hidden_row", "p50"))
            numbers.append(_number(row.get("confident"), "grad_hidden_row", "max"))
            lines.append(_row(name, numbers))
        parts.append("\n".join(lines))
    run = _run_of(content)
    classes = "; ".join(f"*{kind}*: {ROW_CLASSES[kind].meaning}" for kind in kinds)
    parts.append(
        "Largest |error| of a token's log-probability against float64 from the same rounded "
        f"inputs, over {run['num_rows']} rows per class, D {run['hidden_size']}, "
        f"V {run['vocabulary']}; error of the sum over the ordinary rows; relative error of a "
        "hidden state's gradient, median over ordinary rows and worst of the confident ones. "
        f"{classes}. -: the provider has no such option. {_provenance(run)}"
    )
    return "\n\n".join(parts)


def cpu_tables(content: dict[str, Any]) -> str:
    """Return one row per provider: time as a multiple of one product, memory and error."""
    cells = content["cells"]
    calibration = cells.get("calibration")
    if calibration is None:
        return "*CPU speed has not been measured yet: `python -m benchmarks.head.cpu`.*"
    if calibration["is_busy"]:
        return (
            "*CPU speed was measured on a busy machine and is not shown: "
            "`python -m benchmarks.head.cpu` on an idle one.*"
        )
    keys = [key for key in cells if key.startswith("head/token/")]
    parts = []
    for group in dict.fromkeys(tuple(key.split("/")[2:5]) for key in keys):
        dtype, model, N = group
        measured = [
            cell
            for key, cell in cells.items()
            if f"/{dtype}/{model}/{N}/" in key and cell["status"] == "ok"
        ]
        if not measured:
            continue
        shape = measured[0]
        title = f"{dtype}, N {shape['N']}, D {shape['D']}, V {shape['V']}"
        lines = _header(
            title, [*_MODES.values(), "memory, MiB", "log-prob error", "gradient error"]
        )
        for name in dict.fromkeys(key.split("/")[-1] for key in keys):
            found = [cells.get(f"head/token/{dtype}/{model}/{N}/{m}/{name}") for m in _MODES]
            lines.append(_speed_row(name, [cell for cell in found if cell is not None]))
        parts.append("\n".join(lines))
    parts.append(
        "Milliseconds, and multiples of one plain product `hidden @ W.T` in the dtype of the "
        "inputs, timed in turn with it (medians); peak of what a call allocates (the three modes); "
        "largest error of a log-probability; relative error of the gradients of hidden states and "
        "head. "
        f"{_provenance(_run_of(content, 'calibration'))}"
    )
    return "\n\n".join(parts)


def gpu_table(content: dict[str, Any]) -> str:
    """Return one row per shape and mode: this project beside the fastest other library."""
    cells = {k: c for k, c in content["cells"].items() if k.startswith("head/token/")}
    run = next(iter(content["runs"].values()))
    names = ["mode", "ours", "error", "fastest other", "its time", "its error"]
    lines = _header(f"{run['device']}", names)
    for group in dict.fromkeys(key.rpartition("/")[0] for key in cells):
        measured = {
            key.rpartition("/")[2]: cell
            for key, cell in cells.items()
            if key.rpartition("/")[0] == group and cell["status"] == "ok"
        }
        ours = measured.pop("ours", None)
        if ours is None:
            continue
        measured.pop("eager_ours", None)
        fastest = min(measured, key=lambda name: measured[name]["ms"], default=None)
        other = ["-", "-", "-"]
        if fastest is not None:
            cell = measured[fastest]
            other = [fastest, _time(cell), _short(cell["errors"]["logp_max"])]
        _, _, dtype, model, N, mode = group.split("/")
        label = f"{model}, {N.removeprefix('N')} tokens, {dtype}"
        numbers = [_MODES[mode], _time(ours), _short(ours["errors"]["logp_max"]), *other]
        lines.append(_row(label, numbers))
    note = (
        "Milliseconds and multiples of one plain product (medians); error: the largest of a "
        f"token's log-probability. {_provenance(run)}"
    )
    return "\n".join(lines) + "\n\n" + note


def _speed_row(name: str, found: list[dict[str, Any]]) -> str:
    measured = [cell for cell in found if cell["status"] == "ok"]
    if not measured:
        return _absent(name, sorted({cell["reason"] for cell in found}), 6)
    times = [_time(cell) if cell["status"] == "ok" else cell["status"] for cell in found]
    memory = " / ".join(f"{cell['peak_bytes'] / 2**20:.0f}" for cell in measured)
    errors = measured[-1]["errors"]
    gradients = " / ".join(_short(errors[k]) for k in ("grad_hidden", "grad_weight") if k in errors)
    return _row(name, [*times, memory, _short(errors["logp_max"]), gradients])


def _time(cell: dict[str, Any]) -> str:
    return f"{cell['ms']:.3g} ({cell['ratio_to_gemm']:.2f}x)"


def _number(cell: dict[str, Any] | None, *path: str) -> str:
    if cell is None or cell["status"] != "ok":
        return "-"
    value: Any = cell
    for name in path:
        value = value[name]
    return _short(value)


def _short(error: float) -> str:
    """Return two digits and an exponent: 2.3e-3."""
    digits, _, exponent = f"{error:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def _header(first: str, others: list[str]) -> list[str]:
    return [f"| {first} | {' | '.join(others)} |", "|---|" + "---:|" * len(others)]


def _row(name: str, numbers: list[str]) -> str:
    label = f"**{name}**" if name == "ours" else name
    return f"| {label} | {' | '.join(numbers)} |"


def _absent(name: str, reasons: list[str], width: int) -> str:
    return f"| {name} | {'; '.join(reasons)} |" + " |" * (width - 1)


def _distinct(cells: dict[str, Any], position: int) -> list[str]:
    found = {key.split("/")[position] for key in cells}
    order = [*PROVIDERS, *sorted(found)]
    return [name for name in dict.fromkeys(order) if name in found]


def _run_of(content: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    cell = content["cells"][key] if key else next(iter(content["cells"].values()))
    run: dict[str, Any] = content["runs"][cell["run"]]
    return run


def _provenance(run: dict[str, Any]) -> str:
    peers = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    versions = [f"{name} {run['versions'][name]}" for name in peers if run["versions"].get(name)]
    listed = f" ({', '.join(versions)})" if versions else ""
    return (
        f"Made by `{run['command']}` at {run['commit']}, torch {run['versions']['torch']}, "
        f"{run['device']}, {run['threads']} threads{listed}."
    )
