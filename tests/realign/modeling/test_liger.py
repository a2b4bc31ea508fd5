"""Liger's layers replace those of every family, or are refused; the real package decides.

It changes whole modules of transformers, so it is asked in a process of its own. Its kernels need
a GPU.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics, use_liger_layers
from realign.modeling.identity import ModelFacts
from tests.conftest import running
from tests.realign.modeling.families.family import Family
from tests.realign.modeling.families.registry import FAMILIES


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
        methods = [getattr(part.forward, "__qualname__", "") for part in family.model.modules()]
        assert "LigerRMSNorm.forward" in methods
        assert type(family.model).forward is own  # no loss of Liger's
        assert "forward" not in vars(family.model)
    numerics = Numerics(next(family.model.parameters()).dtype, liger=True)
    facts = ModelFacts(family.save(folder), numerics)
    if refusal:
        with pytest.raises(RefusedError) as caught:
            _ = facts.outline
        assert str(caught.value) == refusal
    else:
        methods = [getattr(part.forward, "__qualname__", "") for part in facts.outline.modules()]
        assert "LigerRMSNorm.forward" in methods
    return refusal


def test_every_family_has_the_layers_or_is_refused(tmp_path: Path) -> None:
    with running([sys.executable, __file__, tmp_path]) as process:
        assert process.wait(300) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == FAMILIES.keys()
    assert not found["llava-1.5"]
    assert sum(not refusal for refusal in found.values()) >= 8
    for refusal in filter(None, found.values()):
        assert refusal.startswith("liger: true requires a ")
        assert refusal.endswith(("Drop it.", "or drop the option."))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    found = {name: outcome(make, root / name) for name, make in FAMILIES.items()}
    (root / "found.json").write_text(json.dumps(found))
