"""Faults stop a run before a weight changes.

They are numbers that are not finite, a policy that is not its reference, and full memory.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from realign.errors import RefusedError
from realign.modeling.adapters import add_adapter
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.memory import Footprint
from realign.modeling.processors import load_processor
from realign.training.guards import gradients_are_finite, off_reference
from realign.training.objectives import OBJECTIVES, ObjectiveOptions, make_objective
from realign.training.out_of_memory import out_of_memory
from realign.training.trainer import RDPOConfig, RDPOTrainer
from realign_kernels import Objective, RdpoOutput, Term, preference_loss


@pytest.fixture(scope="module")
def reference(model_dir: Path, make_reference) -> dict[str, torch.Tensor]:
    return make_reference(model_dir, 8)


@pytest.fixture
def trainer(tmp_path: Path, model_dir: Path, records):
    """A factory: eight rows, two micro-batches a step, two steps."""

    def make(reference, model=None, processor=None, **options) -> RDPOTrainer:
        args = RDPOConfig(
            output_dir=str(tmp_path / "steps"), report_to="none", use_cpu=True,
            disable_tqdm=True,
            **{
                "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3, "lr_scheduler_type": "constant", "num_train_epochs": 1,
                "logging_steps": 1, "save_strategy": "no", **options,
            },
        )  # fmt: skip
        made = RDPOTrainer(
            model or load_model(model_dir, torch.float32),
            args,
            records(8),
            processor or load_processor(model_dir),
            reference,
        )
        made.remove_callback(PrinterCallback)
        return made

    return make


class KeepWeights(TrainerCallback):
    """The weights as they were when the last step began."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}


def assert_stopped(trained: RDPOTrainer, message: str, *, steps: int = 0) -> str:
    """The run stops with the message in the step after ``steps``, which changes no weight."""
    keep = KeepWeights()
    trained.add_callback(keep)
    with pytest.raises(FloatingPointError, match=message) as caught:
        trained.train()
    for name, value in trained.model.state_dict().items():
        assert value.equal(keep.weights[name]) or not value.isfinite().all(), name
    assert trained.state.global_step == steps
    assert [line["step"] for line in trained.state.log_history] == list(range(1, steps + 1))
    return str(caught.value)


@pytest.mark.parametrize(
    ("cell", "name", "value"),
    [
        (0, "chosen", math.nan),
        (2, "image_rejected", -math.inf),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (0, "chosen", math.inf),
                (0, "chosen", -math.inf),
                (2, "image_rejected", math.nan),
                (2, "image_rejected", math.inf),
            )
        ),
    ],
)
def test_a_non_finite_reference_stops_training(trainer, reference, value, cell, name) -> None:
    broken = {key: logps.clone() for key, logps in reference.items()}
    list(broken.values())[5][cell] = value  # the sixth row
    trained = trainer(broken, num_train_epochs=2)
    message = assert_stopped(
        trained, rf"^step \d: ref_logps \({name}\) must be finite, got {value} for row r5\. ",
        steps=_step_of(trained, "r5"),
    )  # fmt: skip
    assert "No weight was changed by this step." in message


def _step_of(trained: RDPOTrainer, row: str) -> int:
    """Whole steps before the one that reads the row."""
    ids = [id for batch in trained.get_train_dataloader() for id in batch["ids"]]
    return ids.index(row) // 4


def test_a_non_finite_image_stops_training(trainer, reference, model_dir) -> None:
    processor = load_processor(model_dir)
    processor.image_processor.rescale_factor = math.inf
    assert_stopped(
        trainer(reference, processor=processor),
        r"^step 1: pixel_values must be finite, got (-?inf|nan) for one of the rows r\d, r\d\. L",
    )


def test_a_non_finite_loss_in_a_later_step_stops_training(trainer, reference) -> None:
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                model.lm_head.weight.data[:, 0] = math.nan

    trained = trainer(reference)
    trained.add_callback(Break())
    assert_stopped(
        trained, r"^step 2: logps \(chosen\) must be finite, got nan for .*row.* r\d", steps=1
    )


@pytest.mark.parametrize(
    ("value", "clip"),
    [
        pytest.param(math.nan, 1.0, id="nan-clipped"),
        pytest.param(math.inf, 0.0, id="inf-unclipped"),
        pytest.param(math.nan, 0.0, id="nan-unclipped", marks=pytest.mark.full),
        pytest.param(math.inf, 1.0, id="inf-clipped", marks=pytest.mark.full),
    ],
)
def test_a_non_finite_gradient_stops_training(trainer, reference, value, clip) -> None:
    trained = trainer(reference, max_grad_norm=clip)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weight = trained.model.get_parameter(name)
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # the first micro-batch of the second step
            gradient = gradient.clone()
            gradient[1, 2] = value
        return gradient

    weight.register_hook(spoil)
    message = assert_stopped(
        trained, rf"^step 2: the gradient must be finite, got {name}, {value}, for rows", steps=1
    )
    assert sum(f"r{number}" in message for number in range(8)) == 4  # those of the step


def test_an_overflowing_gradient_norm_stops_training(trainer, reference) -> None:
    trained = trainer(reference)
    trained.model.lm_head.weight.register_hook(lambda gradient: gradient * 1e30)
    assert_stopped(
        trained, r"^step 1: the gradient's norm must be finite, got inf\. .* not changed"
    )


def test_the_first_step_is_checked_before_weights_change(trainer, reference, model_dir) -> None:
    moved = {key: logps.clone() for key, logps in reference.items()}
    list(moved.values())[2][1] += 0.01
    with pytest.raises(RefusedError, match=r"must be 1\.386294.*text_rejected of row r2 is 0\.01"):
        trainer(moved, num_train_epochs=1, gradient_accumulation_steps=4).train()
    trained = trainer(moved, check_first_step=False)
    trained.train()
    assert trained.state.global_step == 2
    other = load_model(model_dir, torch.float32)
    other.model.language_model.layers[0].mlp.up_proj.weight.data *= 1.1
    with pytest.raises(
        RefusedError, match="Likely causes: the reference was computed with other weights"
    ):
        trainer(reference, other).train()


def test_a_resumed_run_skips_the_first_step_check(trainer, reference, tmp_path: Path) -> None:
    trainer(reference, save_strategy="steps", save_steps=1, max_steps=1).train()
    moved = {key: logps + torch.tensor([1.0, 0.0, 0.0]) for key, logps in reference.items()}
    trained = trainer(moved, save_strategy="steps", save_steps=1)
    trained.train(resume_from_checkpoint=True)
    assert trained.state.global_step == 2


class Probed(dict):
    """A reference whose cache recorded what batching changes."""

    batch_variance = 0.02


def test_16_bit_training_may_differ_by_the_probed_variance(
    trainer, model_dir, make_reference
) -> None:
    exact = make_reference(model_dir, 8, torch.bfloat16)
    for shift, fits in ((0.05, True), (0.5, False)):
        moved = {key: logps + torch.tensor([shift, 0, 0]) for key, logps in exact.items()}
        trained = trainer(Probed(moved), load_model(model_dir, torch.bfloat16))
        if fits:
            trained.train()
        else:
            with pytest.raises(RefusedError, match=r"rounding explains at most 0\.12"):
                trained.train()


def test_an_adapter_must_start_at_zero_or_be_its_own_reference(
    trainer, reference, model_dir, make_reference, tmp_path: Path
) -> None:
    def adapted():
        base = load_model(model_dir, torch.float32, name=str(model_dir))
        return add_adapter(base, rank=4, alpha=8, targets="all-linear", freeze_vision=True)

    trained = trainer(reference, adapted(), save_strategy="steps", save_steps=2, learning_rate=0.01)
    trained.train()
    folder = tmp_path / "steps" / "checkpoint-2"
    its_own = make_reference(folder, 8)
    again = load_model(folder, torch.float32, trainable_adapter=True)
    with pytest.raises(RefusedError, match="a new adapter does not begin at zero"):
        trainer(reference, again).train()
    again = load_model(folder, torch.float32, trainable_adapter=True)
    fresh = trainer(its_own, again)
    fresh.train()
    assert fresh.state.global_step == 2


def output_of(logps: torch.Tensor, ref: torch.Tensor, tokens, objective: Objective) -> RdpoOutput:
    found = preference_loss(logps, ref, objective, num_tokens=tokens)
    return RdpoOutput(
        found.loss, logps, tokens, found.rewards, found.text_margins, found.image_margins
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_loss_is_checked_for_every_objective(name) -> None:
    objective = make_objective(ObjectiveOptions(name, beta=0.3, nll_weight=0.5))
    ref = -20 * torch.rand(4, 3, dtype=torch.float64) - 1
    tokens = torch.full((4, 3), 7)
    tokens[2:, 1] = 0  # the second pair has no retrieved image
    ref[tokens == 0] = 0
    exact = output_of(ref, ref, tokens, objective)
    assert off_reference(exact, objective, "abc", is_exact=True) is None
    moved = ref.clone()
    moved[1, 2] += 3e-4
    off = output_of(moved, ref, tokens, objective)
    refusal = off_reference(off, objective, "abc", is_exact=True)
    assert f"must be {exact.loss.item():.6f}" in str(refusal)
    assert "text_rejected of row c is -0.0003 nats, where rounding explains at most 0.0001" in str(
        refusal
    )
    assert off_reference(off, objective, "abc", is_exact=False) is None
    assert off_reference(off, objective, "abc", is_exact=False, batch_variance=0.0) is None


def test_a_first_loss_inconsistent_with_its_margins_is_detected() -> None:
    """The loss is scaled or composed wrongly although the margins are 0."""
    objective = Objective.rdpo()
    ref = torch.full((3, 2), -5.0)
    good = output_of(ref, ref, torch.ones(3, 2).long(), objective)
    for factor, fits in ((1 + 5e-6, True), (1 + 2e-5, False), (0.5, False)):
        bad = good._replace(loss=good.loss * factor)
        assert (off_reference(bad, objective, "ab", is_exact=True) is None) == fits


def test_other_links_are_checked_by_their_margins() -> None:
    objective = Objective((Term((1, -1), link="ipo"),))
    ref = torch.full((2, 2), -5.0)
    tokens = torch.full((2, 2), 3)
    moved = ref + torch.tensor([[0.0], [1e-3]])
    for logps, fits in ((ref, True), (moved, False)):
        output = output_of(logps, ref, tokens, objective)
        assert (off_reference(output, objective, "ab", is_exact=True) is None) == fits


def test_longer_answers_have_a_larger_rounding_tolerance() -> None:
    objective = Objective.rdpo()
    ref = torch.full((3, 1), -1000.0)
    off = output_of(ref + torch.tensor([[0.0], [9e-4], [0.0]]), ref, torch.ones(3, 1), objective)
    assert off_reference(off, objective, "a", is_exact=True) is None


def test_an_out_of_memory_error_is_refused_with_a_smaller_batch(
    trainer, reference, monkeypatch
) -> None:
    trained = trainer(reference, gradient_accumulation_steps=1, per_device_train_batch_size=4)
    # more than any machine has: the allocator's own error
    trained.model.register_forward_pre_hook(lambda *_: torch.empty(2**52, dtype=torch.uint8))
    with pytest.raises(
        RefusedError,
        match=r"batch_size to 2, which accumulates 2 .* its 4 pairs",
    ):
        trained.train()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")

    monkeypatch.setattr(RDPOTrainer, "compute_loss", fail)
    trained = trainer(reference, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    with pytest.raises(
        RefusedError, match=r"2\.7 GB more did not fit.*\n.*\nNo smaller micro-batch"
    ):
        trained.train()


def test_other_errors_are_raised_unchanged(trainer, reference, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(RDPOTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer(reference).train()


GB = 10**9


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "allocated", "capacity", "safe"),
    [
        # 20 GB before; 8 pairs took 60 GB at least: 7.5 GB a pair
        (8, 1, 80 * GB, 80 * GB, "is 4: set batch_size to 4, which accumulates 2 "),
        (8, 1, 80 * GB, 40 * GB, "is 2: set batch_size to 2, which accumulates 4 "),
        (6, 2, 80 * GB, 72 * GB, "is 4: set batch_size to 4, which accumulates 3 "),
        (8, 1, 80 * GB, 26 * GB, "No smaller micro-batch is sure to fit"),
        (8, 1, 80 * GB, 10 * GB, "No smaller micro-batch is sure to fit"),
        (5, 1, None, None, "is 1: set batch_size to 1, which accumulates 5 "),
    ],
)
def test_the_suggested_batch_size_keeps_the_pairs_per_step(
    batch_size, accumulation, allocated, capacity, safe
) -> None:
    message = str(
        out_of_memory(
            torch.OutOfMemoryError("no"),
            Footprint(14 * GB, 2 * GB, 4 * GB),
            batch_size=batch_size,
            accumulation=accumulation,
            allocated=allocated,
            capacity=capacity,
        )
    )
    assert "peak = weights 14.0 GB + gradients 2.0 GB + optimizer state 4.0 GB" in message
    assert safe in message


def test_auto_find_batch_size_is_refused(trainer, reference) -> None:
    with pytest.raises(RefusedError, match="auto_find_batch_size must be false"):
        trainer(reference, auto_find_batch_size=True)


def test_a_disabled_adapter_gives_the_base_and_only_adapters_have_gradients(
    trainer, reference, model_dir, records
) -> None:
    model = load_model(model_dir, torch.float32)
    batch = PreferenceCollator(load_processor(model_dir), 3)(records(4))
    del batch["ids"]
    with torch.no_grad():
        before = model(**batch).logps
    model = add_adapter(model, rank=4, alpha=8, targets="all-linear", freeze_vision=True)
    has_gradient = set()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            has_gradient.update(n for n, p in model.named_parameters() if p.grad is not None)

    trained = trainer(reference, model, learning_rate=0.01)
    trained.add_callback(Look())
    trained.train()
    with torch.no_grad():
        assert not trained.model(**batch).logps.equal(before)
        with trained.model.disable_adapter():
            assert trained.model(**batch).logps.equal(before)
    assert has_gradient
    assert all("lora_" in name and "vision_tower" not in name for name in has_gradient)


def test_an_empty_gradient_shard_is_accepted() -> None:
    empty, full = (torch.nn.Parameter(torch.zeros(n, 2)) for n in (0, 3))
    empty.grad, full.grad = torch.zeros(0, 2), torch.ones(3, 2)
    assert gradients_are_finite([empty])
    assert gradients_are_finite([empty, full])
    full.grad[1, 1] = math.inf
    assert not gradients_are_finite([empty, full])
