"""Liger's layers replace those of every family, or are refused; the real package decides.

A process of its own asks, since the package changes modules of transformers. Its kernels need a
GPU.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics, use_liger_layers
from realign.modeling.identity import ModelFacts
from tests.conftest import running
from tests.realign.modeling.families.family import Family
from tests.realign.modeling.families.registry import FAMILIES

# by liger-kernel 0.8.5 for transformers 5.23, as docs/guides/training.md says
REFUSED = {"qwen2-vl", "qwen2.5-vl", "qwen3-vl", "idefics3"}


def forwards(model: nn.Module) -> list[str]:
    """Return the names of the functions that compute a model's modules."""
    return [getattr(part.forward, "__qualname__", "") for part in model.modules()]


def outcome(make: Callable[[], Family], folder: Path) -> str:
    """Return the refusal of a family's layers, or nothing; the outline must agree."""
    family = make()
    own = type(family.model).forward
    try:
        use_liger_layers(family.model)
    except RefusedError as error:
        refusal = str(error)
    else:
        refusal = ""
        methods = forwards(family.model)
        assert "LigerRMSNorm.forward" in methods
        assert not [method for method in forwards(make().model) if "Liger" in method]  # nor later
        assert type(family.model).forward is own  # no loss of Liger's
        assert "forward" not in vars(family.model)
    numerics = Numerics(next(family.model.parameters()).dtype, liger=True)
    facts = ModelFacts(family.save(folder), numerics)
    if refusal:
        with pytest.raises(RefusedError) as caught:
            _ = facts.outline
        assert str(caught.value) == refusal
    else:
        assert "LigerRMSNorm.forward" in forwards(facts.outline)
    return refusal


def test_every_family_has_liger_layers_or_is_refused(tmp_path: Path) -> None:
    with running([sys.executable, __file__, tmp_path]) as process:
        assert process.wait(300) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == FAMILIES.keys()
    assert {name for name, refusal in found.items() if refusal} <= REFUSED
    for refusal in filter(None, found.values()):
        assert refusal.startswith("liger: true requires a ")
        assert refusal.endswith(("Drop it.", "or drop the option."))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    found = {name: outcome(make, root / name) for name, make in FAMILIES.items()}
    (root / "found.json").write_text(json.dumps(found))
