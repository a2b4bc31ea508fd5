"""The native path on models whose images come in tiles, patches or several a row: what it logs is
what TRL's own trainer logs of the answer pair, and of rows that show the retrieved images.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PromptTuningConfig
from transformers import (
    PrinterCallback,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from trl import DPOTrainer

from realign.errors import RefusedError
from realign.integrations.trl import RdpoTrainer
from realign.modeling.adapters import quiet_peft
from tests.realign.integrations.trl.stock import (
    Step,
    config,
    distance,
    ours,
    reference_model,
    step,
    stock,
    text_half,
)
from tests.realign.modeling.families.pairs import (
    BROAD,
    LONG,
    SHORT,
    SQUARE,
    TALL,
    WIDE,
    pair,
)
from tests.realign.modeling.families.registry import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# whose retrieved images are of other shapes than the original ones
ROWS = [
    pair("a", "Describe the image.", (WIDE,), SHORT, LONG, (TALL,)),
    pair("b", "Is there a boat?", (WIDE,), LONG, SHORT, (SQUARE,)),
    pair("c", "Where is it?", (TALL,), LONG + " " + SHORT, LONG, (BROAD,)),
    pair("d", "What is it?", (SQUARE,), SHORT, LONG, (WIDE,)),
]


def dataset(*, shows_retrieved: bool = False) -> datasets.Dataset:
    images = datasets.List(datasets.Image())
    rows = []
    for row in ROWS:
        shown = row.rejected_images if shows_retrieved else row.images
        rows.append(
            {
                "images": [{"bytes": raw, "path": None} for raw in shown],
                "rejected_images": [{"bytes": raw, "path": None} for raw in row.rejected_images],
                "prompt": list(row.prompt),
                "chosen": [{"role": "assistant", "content": row.chosen}],
                "rejected": [{"role": "assistant", "content": row.rejected}],
            }
        )
    made = datasets.Dataset.from_list(rows)
    return made.cast_column("images", images).cast_column("rejected_images", images)


@pytest.mark.parametrize("name", ["llava-1.6-mistral", "qwen2.5-vl", "idefics3", "gemma-3"])
def test_the_native_path_logs_the_metrics_of_stock_dpo(tmp_path: Path, name: str) -> None:
    found: dict[str, dict[str, float]] = {}
    for kind, trainer, rows in (
        ("native", RdpoTrainer, dataset()),
        ("own", RdpoTrainer, dataset()),
        ("answers", DPOTrainer, dataset()),
        ("retrieved", DPOTrainer, dataset(shows_retrieved=True)),
    ):
        family, reference = FAMILIES[name](), FAMILIES[name]()
        options: dict[str, Any] = {"data_path": kind} if trainer is RdpoTrainer else {}
        made = trainer(
            family.model.float(), reference.model.float(), args=config(tmp_path),
            train_dataset=rows, processing_class=family.processor, **options,
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        found[kind] = step(made).metrics
    for metric in ("logps/chosen", "logps/rejected", "rewards/margins", "entropy", "logits/chosen"):
        expected = pytest.approx(found["answers"][metric], abs=1e-4, rel=1e-6)
        assert found["native"][metric] == expected, metric
    expected = pytest.approx(found["retrieved"]["logps/chosen"], abs=1e-4, rel=1e-6)
    assert found["native"]["logps/image_rejected"] == expected
    assert found["native"]["logps/image_rejected"] != found["native"]["logps/chosen"]
    # TRL scores what the template writes after the end of the turn, too
    assert found["own"].keys() == found["native"].keys()
    assert found["own"]["logps/chosen"] > found["native"]["logps/chosen"]


def test_virtual_tokens_are_cut_off_on_the_native_path_as_in_stock(tmp_path: Path) -> None:
    def metrics(trainer: Any, **options: Any) -> dict[str, float]:
        model = reference_model()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(model.config, name, getattr(model.config.text_config, name))  # peft asks it
        torch.manual_seed(0)
        tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        options |= {"ref_model": None, "peft_config": tuning}
        with quiet_peft():
            return step(trainer(tmp_path, model=model, **options)).metrics

    found = metrics(ours, data_path="native", objective=text_half())
    assert found == pytest.approx(metrics(stock), abs=1e-6)


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_added(tmp_path: Path) -> None:
    """The loss is added on the native path as in TRL; the own path has none and refuses it."""
    family = FAMILIES["qwen3-vl"]()
    parts = family.model.config.to_dict()
    skipped = ("model_type", "transformers_version", "architectures")
    text, vision = (
        {name: value for name, value in parts[part].items() if name not in skipped}
        for part in ("text_config", "vision_config")
    )
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text |= {"decoder_sparse_step": 1, "router_aux_loss_coef": 0.5, "output_router_logits": True}
    tokens = {name: value for name, value in parts.items() if name.endswith("_token_id")}
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens)
    ).float()

    def run(trainer: Any, coefficient: float | None = None, **options: Any) -> Step:
        options |= {"model": copy.deepcopy(model), "ref_model": copy.deepcopy(model)}
        options |= {"train_dataset": dataset(), "processing_class": family.processor}
        training = {"router_aux_loss_coef": coefficient}
        return step(trainer(tmp_path, **options, training=training))

    found = run(ours, data_path="native", objective=text_half())
    expected = run(stock)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5)
    assert found.metrics["aux_loss"] > 1
    assert distance(found.gradients, expected.gradients) < 2e-6
    with pytest.raises(RefusedError, match="router_aux_loss_coef must be 0 with data_path='own'"):
        run(ours)
    assert run(ours, 0.0).loss == pytest.approx(2 * math.log(2), abs=1e-5)
