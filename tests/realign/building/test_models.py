"""The models that are asked in a build, as the provenance of rows names them."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from realign.building.models import LocalModel, asked_model
from realign.config import BuildConfig, GeneratorSection


@pytest.mark.parametrize("role", ["inducer", "masker"])
def test_a_model_of_the_hub_has_its_id_and_not_its_snapshot(
    role: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(model_dir))
    section = GeneratorSection(model="org/other") if role == "masker" else None
    for model, name in (("org/vlm", "org/vlm"), (str(model_dir), model_dir.name)):
        config = BuildConfig(source=tmp_path, model=model, out=tmp_path)
        asked = asked_model(section, role, config)
        assert isinstance(asked, LocalModel)
        assert asked.provenance["model"] == ("org/other" if section else name)
