"""Liger's layers, flash-attention, 4-bit weights and compiled layers against SDPA in float64.

A small random model of each kind, LLaVA and Qwen2.5-VL, scores one packed batch of pairs.  Its
log-probabilities and the gradients of its loss are compared with those of the same weights in
float64 with SDPA.  The measure is the error of stock layers with SDPA in the variant's dtype: a
variant may have twice that error plus one rounding.  4-bit weights are compared with their
dequantized values.  A package that is not installed gives a cell with the reason.
"""

from __future__ import annotations

import functools
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from benchmarks.gpu.session import Session
from benchmarks.step.compiled import compile_layers
from benchmarks.step.setup import Job, build_model, build_processor, build_records, vision_tower
from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign_kernels import Objective

SHAPES = ("small", "small-qwen")
PAIRS = 3
VARIANTS = {
    "liger": Numerics(torch.bfloat16, liger=True),
    "liger, float32": Numerics(torch.float32, liger=True),
    "flash": Numerics(torch.bfloat16, attention="flash"),
    "flash and liger": Numerics(torch.bfloat16, attention="flash", liger=True),
    "nf4": Numerics(torch.bfloat16, quantization="nf4"),
    "compiled": Numerics(torch.bfloat16),
}
_SCORING = ("q_proj.weight", "k_proj.weight")
# of a log-probability of an answer, and of gradients in the Frobenius norm
LOGPS_FLOOR = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
GRADIENT_FLOOR = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


class Scores(NamedTuple):
    """Results of a model: log-probabilities (C, P), and gradients by name."""

    logps: Tensor
    gradients: dict[str, Tensor]

    def errors(self, exact: Scores) -> tuple[float, float]:
        """Return the largest error of log-probabilities, and that of all gradients together."""
        names = [name for name in self.gradients if name in exact.gradients]
        assert names, "no parameter has a gradient in both"
        off = sum((self.gradients[n] - exact.gradients[n]).square().sum() for n in names)
        size = sum(exact.gradients[name].square().sum() for name in names)
        return (self.logps - exact.logps).abs().max().item(), float((off / size).sqrt())


def compare_layers(session: Session) -> None:
    """Write a cell for every model and variant."""
    with ExitStack() as stack:

        @functools.cache
        def saved(name: str) -> tuple[Path, dict[str, Any]]:
            # made only if some cell is still to be measured
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            return folder, save_model(name, folder)

        for name in SHAPES:
            for variant in VARIANTS:
                session.add(
                    f"layers/{name}/{variant}",
                    lambda name=name, variant=variant: compare(
                        *saved(name), variant, session.device
                    ),
                )


def save_model(name: str, folder: Path) -> dict[str, Any]:
    """Write a model of a shape to a folder, in bfloat16; return a packed batch."""
    job = Job("ours", name, "full", PAIRS, steps=1)
    model = build_model(job)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            # fresh weights attend to everything alike, and a wrong mask would hardly show
            if "language" in weight_name and weight_name.endswith(_SCORING):
                weight.mul_(4)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor = build_processor(job.step_shape)
    batch = PreferenceCollator(processor, 3, shared_prefix=True)(build_records(job))
    del batch["ids"]
    return batch


def compare(
    folder: Path, batch: dict[str, Any], variant: str, device: torch.device
) -> dict[str, Any]:
    """Return a variant's errors and their bounds, as a cell that fails if one is exceeded."""
    numerics = VARIANTS[variant]
    try:
        numerics.check()
    except RefusedError as error:
        return {"status": "unavailable", "reason": str(error)}
    # only 4-bit weights are needed beforehand: other packages may replace layers of later models
    model: Any = None if numerics.quantization is None else load_model(folder, numerics)
    weights = {} if model is None else dequantized(model)
    results: dict[str, Scores] = {}
    reference = None
    for name, dtype in (("exact", torch.float64), ("stock", numerics.dtype)):
        stock: Any = load_model(folder, dtype).to(device)
        _freeze_layers_of(stock, weights)
        _replace_weights(stock, weights)
        results[name] = score(stock, batch, reference, device)
        reference = results["exact"].logps.float() - 1.0
    if model is None:
        try:
            model = load_model(folder, numerics)
        except RefusedError as error:  # the package does not fit the model
            return {"status": "unavailable", "reason": str(error)}
        model.to(device)
    _freeze_layers_of(model, weights)
    if variant == "compiled":
        compile_layers(model, device.type)
    results["variant"] = score(model, batch, reference, device)
    found, stock_found = (results[name].errors(results["exact"]) for name in ("variant", "stock"))
    logps_bound = 2 * (stock_found[0] + LOGPS_FLOOR[numerics.dtype])
    gradient_bound = 2 * (stock_found[1] + GRADIENT_FLOOR[numerics.dtype])
    cell: dict[str, Any] = {
        "status": "ok",
        "logps_error": found[0],
        "logps_bound": logps_bound,
        "gradient_error": found[1],
        "gradient_bound": gradient_bound,
        "parameters_compared": len(results["variant"].gradients),
    }
    # NaN is not within a bound
    if not (found[0] <= logps_bound and found[1] <= gradient_bound):
        cell |= {"status": "failed", "reason": f"errors {found[0]:.1e} and {found[1]:.1e}"}
    return cell


def score(
    model: Any, batch: dict[str, Any], reference: Tensor | None, device: torch.device
) -> Scores:
    """Return log-probabilities and the gradients of the loss.

    Without a reference, the loss takes the model's own log-probabilities minus one nat.
    """
    dtype = model.get_output_embeddings().weight.dtype
    vision_tower(model)[1].requires_grad_(False)
    model.train()  # dropout is off; 4-bit layers have no derivative in evaluation on CPUs
    moved = send_to_device(batch, device)
    for name, value in moved.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            moved[name] = value.to(dtype)
    with torch.no_grad():
        logps = model(**moved).logps
    # the reference is one nat away, so that no margin saturates
    given = logps.float() - 1.0 if reference is None else reference
    steps = torch.linspace(0, 2, given.numel(), device=given.device).view(given.shape)
    loss = model(**moved, ref_logps=given + steps, objective=Objective.rdpo(0.5)).loss
    loss.backward()
    gradients = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Scores(logps.double(), gradients)


def dequantized(model: Any) -> dict[str, Tensor]:
    """Return the dequantized values of 4-bit weights, by name."""
    weights = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weights[name] = dequantize_4bit(parameter.data, parameter.quant_state)
    return weights


def _replace_weights(model: Any, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def _freeze_layers_of(model: Any, weights: dict[str, Tensor]) -> None:
    """Freeze all parameters of layers with 4-bit weights, as training with adapters does."""
    for name in weights:
        model.get_submodule(name.rpartition(".")[0]).requires_grad_(False)
