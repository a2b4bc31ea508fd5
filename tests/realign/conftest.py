"""The embedded model and small datasets of the drawn world, as files."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import datasets
import pytest
import torch
import transformers

from realign.config import BuildConfig
from realign.data.records import Record
from realign.demo.drawing import draw
from realign.demo.run import MODEL
from realign.demo.world import DESCRIBE, KINDS, Scene, Thing, free_scene, question

datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file become longer than ``size`` bytes: writing it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The embedded model: a real LlavaForConditionalGeneration with its processor."""
    return MODEL


def png(scene: Scene) -> bytes:
    """The scene's PNG file."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG")
    return buffer.getvalue()


def make_records(count: int, seed: int = 0) -> list[Record]:
    """Pairs whose rejected answer describes another scene, whose image is the retrieved one."""
    rng = Random(seed)
    records = []
    for number in range(count):
        scene, other = free_scene(rng), free_scene(rng)
        absent = rng.choice([kind for kind in KINDS if kind not in scene.kinds])
        describes = number % 2 == 0
        records.append(
            Record(
                id=f"r{number}",
                images=(png(scene),),
                prompt=({"role": "user", "content": DESCRIBE if describes else question(absent)},),
                chosen=scene.caption() if describes else scene.answer(absent),
                rejected=other.caption()
                if describes
                else f"Yes, there is a {absent} in the image.",
                rejected_images=(png(Scene((*other.things, *_extra(other)), other.tint)),),
            )
        )
    return records


def _extra(scene: Scene) -> tuple[Thing, ...]:
    """One more object, so that no retrieved image equals its original."""
    free = next(cell for cell in range(9) if cell not in {thing.cell for thing in scene.things})
    return (Thing(next(kind for kind in KINDS if kind not in scene.kinds), "red", free),)


def build_config(rows: Sequence[Record], folder: Path, model: Path) -> BuildConfig:
    """Write rows as a source of answer pairs, and return the configuration of its build."""
    lines = []
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(row.images[0])
        pair = {"question": "What is there?", "chosen": row.chosen, "rejected": row.rejected}
        lines.append(json.dumps({"id": row.id, "image": f"{number}.png", **pair}))
    (folder / "source.jsonl").write_text("\n".join(lines) + "\n")
    return BuildConfig(
        source=folder / "source.jsonl",
        images=folder,
        model=str(model),
        out=folder / "out",
        workers=1,
    )


@pytest.fixture(scope="session")
def records() -> Callable[..., list[Record]]:
    """The factory :func:`make_records`."""
    return make_records


@pytest.fixture(scope="session")
def make_reference() -> Callable[..., dict[str, torch.Tensor]]:
    """References of the first rows, computed as the policy is: ``(model_dir, count, dtype)``."""
    from realign.modeling.collate import PreferenceCollator
    from realign.modeling.loading import load_model
    from realign.modeling.packing import choose_layout
    from realign.modeling.processors import load_processor

    def compute(
        model_dir: Path, count: int, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        model, rows = load_model(model_dir, dtype), make_records(count)
        shared = choose_layout(model, None) == "shared prefix"
        batch = PreferenceCollator(load_processor(model_dir), 3, shared_prefix=shared)(rows)
        del batch["ids"]
        with torch.no_grad():
            logps = model(**batch).logps
        return {row.key: logps[:, pair].double() for pair, row in enumerate(rows)}

    return compute


@pytest.fixture
def shifted_logits(monkeypatch) -> None:
    """Let LLaVA add to its logits what its head does not: log-probabilities differ by up to 1."""
    model = transformers.LlavaForConditionalGeneration
    forward = model.forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output

    monkeypatch.setattr(model, "forward", shifted)
