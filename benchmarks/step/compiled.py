"""Compiled layers of the language model: ``torch.compile`` on each, in place."""

from __future__ import annotations

from typing import Any


def compile_layers(model: Any, device_type: str) -> None:
    """Compile every decoder layer; on a CPU without code generation, which would take minutes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    backend = "inductor" if device_type == "cuda" else "aot_eager"
    for layer in inner.model.get_decoder().layers:
        layer.compile(backend=backend, dynamic=True)
