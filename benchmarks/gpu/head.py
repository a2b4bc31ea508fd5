"""The head table: every provider at every shape, and how far the aims are reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.session import Cell, Session
from benchmarks.head.providers import MODES, PROVIDERS, Inputs, why_not
from benchmarks.measure import Exact, exact, measure_cell
from benchmarks.promises import DTYPES
from benchmarks.shapes import HEADS, HeadShape, make_inputs


class Aim(NamedTuple):
    """The time that a call may take, in GEMMs, from 1024 tokens and a hidden size on."""

    hidden_size: int
    frozen: float
    trainable: float


AIMS = (Aim(3584, 2.3, 3.4), Aim(2048, 2.5, 3.6))
_PLAIN = ("torch_logits", "torch_logits_fp32")
_PEERS = ("trl", "trl_plain", "liger_flce", "liger_flsce", "cce", "torch_lce", "torch_lce_chunked")


def head_table(session: Session, shapes: list[HeadShape], names: Sequence[str], dtype: str) -> None:
    """Measure providers, one shape and one job at a time."""
    reasons = {n: why_not(PROVIDERS[n], session.device, DTYPES[dtype]) for n in names}
    for shape in shapes:
        for job in ("token", "mean", "dpo"):
            wanted = [name for name in names if PROVIDERS[name].job == job]
            _job_table(session, shape, job, wanted, reasons, dtype)


def _job_table(
    session: Session,
    shape: HeadShape,
    job: str,
    names: list[str],
    reasons: dict[str, str | None],
    dtype: str,
) -> None:
    prepared: list[tuple[Inputs, Exact]] = []

    def prepare() -> tuple[Inputs, Exact]:
        # drawn only if some cell is still to be measured: the float64 truth takes seconds
        if not prepared:
            inputs = make_inputs(shape, job, DTYPES[dtype], session.device)
            prepared.append((inputs, exact(inputs, job)))
        return prepared[0]

    def measure(name: str, mode: str) -> Cell:
        if reasons[name] is not None:
            return {"status": "unavailable", "reason": reasons[name]}
        inputs, truth = prepare()
        cell = measure_cell(PROVIDERS[name], mode, shape, inputs, truth)
        return {"status": "ok", "dtype": dtype, **shape._asdict(), **cell}

    for name in names:
        for mode in MODES if job == "token" else MODES[1:]:
            key = f"head/{job}/{dtype}/{shape.key}/{mode}/{name}"
            session.add(key, lambda name=name, mode=mode: measure(name, mode))


def aims_table(cells: dict[str, dict[str, Any]], dtype: str) -> str:
    """Return one line per shape and mode: our time in GEMMs, the aim, and the quickest peer."""
    prefix = f"head/token/{dtype}/"
    groups = {key.rpartition("/")[0] for key in cells if key.startswith(prefix)}
    lines = [f"{'head, tokens, mode':38}{'x GEMM':>8}{'aim':>6}  {'reached':8}quickest peer"]
    for group in sorted(groups, key=lambda group: _order(group.removeprefix(prefix))):
        ours = cells.get(f"{group}/ours", {})
        model, tokens, mode = group.removeprefix(prefix).split("/")
        if ours.get("status") != "ok" or mode not in ("frozen", "trainable"):
            continue
        peers = _measured(cells, group, _PEERS)
        quickest = min(peers, key=lambda name: peers[name], default=None)
        aim = aim_of(ours["N"], ours["D"], mode)
        if aim is None:  # few tokens: not slower than plain PyTorch
            plain = min(_measured(cells, group, _PLAIN).values(), default=None)
            reached = None if plain is None else ours["ms"] <= plain
        else:
            reached = ours["ratio_to_gemm"] <= aim
        reached_text = {None: "", True: "yes", False: "no"}[reached]
        peer = "" if quickest is None else f"{quickest} {peers[quickest] / ours['ms']:.2f}x ours"
        name = f"{model}, {tokens[1:]}, {mode}"
        aimed = "" if aim is None else f"{aim:.1f}"
        lines.append(f"{name:38}{ours['ratio_to_gemm']:8.2f}{aimed:>6}  {reached_text:8}{peer}")
    return "\n".join(lines)


def aim_of(num_tokens: int, hidden_size: int, mode: str) -> float | None:
    """Return the time that a mode may take, in GEMMs, or None where another aim holds."""
    for aim in AIMS:
        if num_tokens >= 1024 and hidden_size >= aim.hidden_size:
            return aim.frozen if mode == "frozen" else aim.trainable
    return None


def _measured(
    cells: dict[str, dict[str, Any]], group: str, names: Sequence[str]
) -> dict[str, float]:
    found = {name: cells.get(f"{group}/{name}", {}) for name in names}
    return {name: cell["ms"] for name, cell in found.items() if cell.get("status") == "ok"}


def _order(key: str) -> tuple[int, int, str]:
    model, tokens, mode = key.split("/")
    models = list(HEADS)
    return int(tokens[1:]), models.index(model) if model in models else len(models), mode
