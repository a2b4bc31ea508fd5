"""The examples for other trainers: the loop of one's own trains, and what the examples for ms-swift
and LLaMA-Factory add to those is `preference_loss` of the right cells.

Neither of the two is installed here. Their classes are stand-ins without a method, so what these do
is not imitated: `docs/guides/trainers` says what was run with them.
"""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign_kernels import Objective

EXAMPLES = Path(__file__).parents[2] / "examples"
PEERS = {
    "swift.rlhf_trainers": ["DPOTrainer"],
    "swift.template": ["Template"],
    "swift.trainers.trainer_factory": ["TrainerFactory"],
    "llamafactory.data": ["collator", "converter", "loader"],
    "llamafactory.extras.constants": ["IGNORE_INDEX"],
    "llamafactory.train.dpo": ["trainer", "workflow"],
    "llamafactory.train.trainer_utils": ["get_batch_logps"],
    "llamafactory.train.tuner": ["run_exp"],
}
CLASSES = {
    "collator": "PairwiseDataCollatorWithPadding",
    "converter": "SharegptDatasetConverter",
    "loader": "PairwiseDatasetProcessor",
    "trainer": "CustomDPOTrainer",
}


@pytest.mark.full
@pytest.mark.parametrize("image_weight", [1.0, 0.5])
def test_the_loss_of_the_own_loop_starts_at_its_known_value_and_falls(image_weight: float) -> None:
    main = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]
    losses = main(steps=8, image_weight=image_weight)
    assert losses[0] == pytest.approx((1 + image_weight) * math.log(2), abs=1e-6)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_the_own_loop_scores_the_answers_on_the_right_images() -> None:
    """The expected values come from the logits of the model and the texts of the pairs."""
    loop = runpy.run_path(str(EXAMPLES / "own_loop.py"))
    pairs, num_pairs = loop["PAIRS"], len(loop["PAIRS"])
    processor = AutoProcessor.from_pretrained(loop["MODEL"])
    inputs, labels = loop["collate"](processor, pairs)
    answers = [processor.tokenizer.decode(row[row != -100]).strip() for row in labels]
    chosen, rejected = ([f"{pair[place]}</s>" for pair in pairs] for place in (1, 2))
    assert answers == [*chosen, *rejected, *chosen]
    original, of_rejected, retrieved = inputs["pixel_values"].split(num_pairs)
    assert torch.equal(original, of_rejected)
    assert all(not torch.equal(one, other) for one, other in zip(original, retrieved, strict=True))

    model = AutoModelForImageTextToText.from_pretrained(loop["MODEL"], dtype=torch.float32)
    with torch.no_grad():
        logps = loop["RdpoModel"](model, 0.1, 1.0)(inputs, labels, None)
        log_probs = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    targets = labels[:, 1:]
    token_logps = log_probs.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    expected = token_logps.where(targets != -100, 0.0).sum(1).view(3, num_pairs)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads an example by its name, with stand-ins for the trainer that it is for."""
    for module, names in PEERS.items():
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
        for name in names:
            value: Any = SimpleNamespace(**{CLASSES.get(name, "name"): type(name, (), {})})
            if name == "IGNORE_INDEX":
                value = -100
            elif name[0].isupper():
                methods = {"_rlhf_encode": None, "_rlhf_data_collator": None}
                value = type(name, (), {"TRAINER_MAPPING": {}, **methods})
            setattr(sys.modules[module], name, value)

    def load(name: str) -> SimpleNamespace:
        return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))

    return load


def sums() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of a policy and its reference, (3, P) each, and the losses that they have."""
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = 3 * torch.randn(2, 3, 4, generator=generator).double() - 20
    (chosen, *rejected), (ref_chosen, *ref_rejected) = logps, ref_logps
    contrasts = [
        chosen - one - (ref_chosen - ref_one)
        for one, ref_one in zip(rejected, ref_rejected, strict=True)
    ]
    losses = sum(-F.logsigmoid(0.1 * contrast) for contrast in contrasts)
    assert isinstance(losses, torch.Tensor)
    return logps.requires_grad_(), ref_logps, losses


def test_llama_factory_example_computes_the_losses_of_three_cells(example: Any) -> None:
    logps, ref_logps, expected = sums()
    trainer = example("llama_factory_rdpo").RdpoTrainer
    self = SimpleNamespace(objective=Objective.rdpo(0.1), logps={False: logps, True: ref_logps})
    losses, *rewards = trainer.compute_preference_loss(self, None, None, None, None)
    torch.testing.assert_close(losses, expected)
    assert losses.requires_grad
    torch.testing.assert_close(torch.stack(rewards), 0.1 * (logps - ref_logps)[:2])
    margins = 0.1 * (logps - ref_logps)[0] - 0.1 * (logps - ref_logps)[2]
    assert self.image_metrics["rewards/image_margins"] == pytest.approx(margins.mean().item())
    assert self.logps == {}  # no graph is kept until the next step


def test_llama_factory_example_orders_sequences_by_cell(example: Any, monkeypatch: Any) -> None:
    module = example("llama_factory_rdpo")
    parent = module.RdpoCollator.__mro__[1]
    grandparent = type("Collator", (), {"__call__": lambda self, sequences: sequences})
    collator = type("RdpoCollator", (parent, grandparent), dict(vars(module.RdpoCollator)))
    monkeypatch.setattr(module.collator, "PairwiseDataCollatorWithPadding", parent)
    rows = [
        {
            **{
                f"{cell}_{key}": f"{cell} {key} {row}"
                for cell in ("chosen", "rejected", "image_rejected")
                for key in ("input_ids", "attention_mask", "labels")
            },
            "images": [f"image {row}"],
            "rejected_images": [f"retrieved {row}"],
            "videos": None,
            "audios": None,
        }
        for row in range(2)
    ]
    sequences = collator()(rows)
    assert [(one["input_ids"], one["images"][0]) for one in sequences] == [
        ("chosen input_ids 0", "image 0"),
        ("chosen input_ids 1", "image 1"),
        ("rejected input_ids 0", "image 0"),
        ("rejected input_ids 1", "image 1"),
        ("image_rejected input_ids 0", "retrieved 0"),
        ("image_rejected input_ids 1", "retrieved 1"),
    ]


def test_llama_factory_example_scores_the_chosen_answer_on_the_retrieved_image(
    example: Any, monkeypatch: Any
) -> None:
    processor = example("llama_factory_rdpo").RdpoProcessor

    def preprocess_dataset(self: Any, examples: dict[str, Any]) -> dict[str, Any]:
        keys = ("chosen_input_ids", "chosen_attention_mask", "chosen_labels")
        return {**dict.fromkeys(keys, examples["_images"]), "images": examples["_images"]}

    monkeypatch.setattr(
        processor.__mro__[1], "preprocess_dataset", preprocess_dataset, raising=False
    )
    ignored = sys.modules["llamafactory.extras.constants"].IGNORE_INDEX
    examples = {"_images": [[ignored, 7]], "_rejected_images": [[ignored, ignored, 7]]}
    rows = processor().preprocess_dataset(examples)
    assert rows["chosen_input_ids"] == rows["images"] == examples["_images"]
    assert rows["image_rejected_input_ids"] == rows["rejected_images"] == [[ignored, ignored, 7]]
    with pytest.raises(ValueError, match=r"cutoff_len must leave the answer whole on both images"):
        processor().preprocess_dataset({**examples, "_rejected_images": [[ignored, 7, 8]]})
    with pytest.raises(ValueError, match=r"Every row must have rejected_images, got a row without"):
        processor().preprocess_dataset({**examples, "_rejected_images": [None]})
    with pytest.raises(ValueError, match=r"dataset must be of the formatting rdpo, got another"):
        processor().preprocess_dataset({"_images": examples["_images"]})


def test_ms_swift_example_computes_the_losses_of_three_cells(example: Any) -> None:
    logps, ref_logps, expected = sums()
    trainer = example("ms_swift_plugin").RdpoTrainer
    stored: dict[str, float] = {}
    self = SimpleNamespace(
        objective=Objective.rdpo(0.1),
        logps={False: logps, True: ref_logps},
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather_for_metrics=lambda value: value),
        store_metrics=lambda metrics, mode: stored.update(metrics, mode=mode),
    )
    losses, *rewards = trainer.dpo_loss(self, None, None, None, None, "sigmoid", {})
    torch.testing.assert_close(losses, expected)
    assert losses.requires_grad
    torch.testing.assert_close(torch.stack(rewards), 0.1 * (logps - ref_logps)[:2])
    assert stored["mode"] == "eval"
    assert stored["eval_logps/image_rejected"] == pytest.approx(logps[2].mean().item())
    assert self.logps == {}


def test_ms_swift_example_scores_the_answers_on_the_right_images(example: Any) -> None:
    module = example("ms_swift_plugin")

    def encode(cell: Any) -> dict[str, Any]:
        return {"input_ids": (cell.answer, cell.images)}

    chosen = SimpleNamespace(answer="good", images=["image"])
    rejected = SimpleNamespace(answer="bad", images=["retrieved"])
    template = SimpleNamespace(_encode_truncated=encode)
    row = module.encode_three_cells(template, SimpleNamespace(chosen=chosen, rejected=rejected))
    assert row == {
        "chosen_input_ids": ("good", ["image"]),
        "rejected_input_ids": ("bad", ["image"]),
        "image_rejected_input_ids": ("good", ["retrieved"]),
    }
    rejected.images = ["image"]
    row = module.encode_three_cells(template, SimpleNamespace(chosen=chosen, rejected=rejected))
    with pytest.raises(ValueError, match=r"must have rejected_response and rejected_images that"):
        module.collate_three_cells(template, [row])


def test_another_version_of_ms_swift_is_refused(example: Any) -> None:
    """A method of another name would not be replaced, and train the answer pair in silence."""
    delattr(sys.modules["swift.template"].Template, "_rlhf_encode")
    with pytest.raises(
        ImportError, match=r"ms-swift must be 4\.6, whose Template has _rlhf_encode"
    ):
        example("ms_swift_plugin")


def test_ms_swift_options_that_change_the_loss_are_refused(example: Any) -> None:
    module = example("ms_swift_plugin")
    for name, value in (("loss_type", ["hinge"]), ("ld_alpha", 0.5), ("label_smoothing", 0.1)):
        arguments = SimpleNamespace(**{name: value})
        with pytest.raises(ValueError, match=rf"{name} must be .* for rDPO, got"):
            module.RdpoTrainer(args=arguments)


def test_llama_factory_options_that_change_the_loss_are_refused(example: Any) -> None:
    module = example("llama_factory_rdpo")
    neutral = {**module.NEUTRAL, "ld_alpha": None}
    for name, value in (("pref_loss", "hinge"), ("pref_bco_weight", 1.0), ("ld_alpha", 0.5)):
        arguments = SimpleNamespace(**{**neutral, name: value})
        with pytest.raises(ValueError, match=rf"{name} must be .* for rDPO, got"):
            module.RdpoTrainer(finetuning_args=arguments)
