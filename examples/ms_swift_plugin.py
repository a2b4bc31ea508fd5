"""rDPO in ms-swift 4.6: a DPO trainer with three cells, as an external plugin.

    swift rlhf --rlhf_type dpo --external_plugins examples/ms_swift_plugin.py --strict true \\
        --model MODEL --dataset rdpo.jsonl

A row has both answers and both images. `realign export --to ms-swift` writes it to rdpo.jsonl:

    {"messages": [...], "images": ["a.png"],
     "rejected_response": "...", "rejected_images": ["b.png"]}

ms-swift itself would compare the good answer on its image with the bad answer on the retrieved
image. Here, each row becomes three sequences: the good answer, the bad answer on the same image,
and the good answer on the retrieved image. `docs/guides/trainers/ms-swift.md` lists what was run.
"""

from __future__ import annotations

import copy
from typing import Any

from swift.rlhf_trainers import DPOTrainer
from swift.template import Template
from swift.trainers.trainer_factory import TrainerFactory
from torch import Tensor

from realign_kernels import Objective, preference_loss

IMAGE_WEIGHT = 1.0
# Options of `swift rlhf` that would also change the loss, and their neutral values.
NEUTRAL = {
    "loss_type": ("sigmoid", ["sigmoid"]),
    "loss_weights": (None,),
    "label_smoothing": (0, 0.0),
    "f_divergence_type": ("reverse_kl", None),
    "reference_free": (False, None),
    "ld_alpha": (None,),
    "use_weighting": (False, None),
    "precompute_ref_log_probs": (False, None),
}


def encode_three_cells(template: Any, inputs: Any, check_rejected: bool = True) -> dict[str, Any]:
    """Encode a row as three sequences; replaces `Template._rlhf_encode`."""
    chosen, rejected = inputs.chosen, inputs.rejected
    cells = {"chosen": copy.deepcopy(chosen)}
    if rejected is not None:
        cells["rejected"] = copy.deepcopy(rejected)
        cells["rejected"].images = copy.deepcopy(chosen.images)
        if rejected.images != chosen.images:
            cells["image_rejected"] = copy.deepcopy(chosen)
            cells["image_rejected"].images = copy.deepcopy(rejected.images)
    return {
        f"{name}_{key}": value
        for name, cell in cells.items()
        for key, value in template._encode_truncated(cell).items()
    }


def collate_three_cells(
    template: Any, batch: list[dict[str, Any]], *, padding_to: int | None = None, **_: Any
) -> dict[str, Any]:
    """Order the sequences cell by cell; replaces `Template._rlhf_data_collator`."""
    # Not raised while encoding, where ms-swift would silently use another row instead.
    if any("image_rejected_input_ids" not in row for row in batch):
        raise ValueError(
            "Every row must have rejected_response and rejected_images that differ from images, "
            "got a row without. Leave such rows out, or train it without this plugin."
        )
    rows = [
        row
        for prefix in ("chosen_", "rejected_", "image_rejected_")
        for row in template._fetch_inputs_startswith(batch, prefix)
    ]
    return template._data_collator(rows, padding_to=padding_to)


class RdpoTrainer(DPOTrainer):
    """Trainer of DPO on the answers plus DPO on the images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, neutral in NEUTRAL.items():
            value = getattr(kwargs["args"], name, neutral[0])
            if value not in neutral:
                raise ValueError(
                    f"{name} must be {neutral[0]} for rDPO, got {value}. Leave it out."
                )
        template = kwargs["template"]
        if template.padding_free or template.packing or template.sequence_parallel_size > 1:
            raise ValueError(
                "rDPO needs padded rows of its own, got padding_free, packing or "
                "sequence_parallel_size. Leave them out."
            )
        super().__init__(*args, **kwargs)
        self.objective = Objective.rdpo(self.beta, image_weight=IMAGE_WEIGHT)
        # Sums of the policy (False) and the reference (True); the parent passes on only two cells.
        self.logps: dict[bool, Tensor] = {}

    def get_per_token_logps(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the scores that the parent's `concatenated_forward` cuts into halves."""
        self.token_scores = super().get_per_token_logps(*args, **kwargs)
        return self.token_scores

    def concatenated_forward(
        self, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Return sums and metrics of both answers, and keep the sums of all three cells."""
        output = super().concatenated_forward(model, batch, is_ref_model)
        token_logps, mean_logits, is_answer = self.token_scores
        del self.token_scores
        logps = self.logps[is_ref_model] = token_logps.float().sum(dim=-1).view(3, -1)
        logits, answers = mean_logits.chunk(3), is_answer.chunk(3)
        output |= {
            "chosen_logps": logps[0],
            "rejected_logps": logps[1],
            "mean_chosen_logits": logits[0][answers[0]].mean(),
            "mean_rejected_logits": logits[1][answers[1]].mean(),
        }
        if not is_ref_model:  # for --rpo_alpha
            output["nll_loss"] = -token_logps.chunk(3)[0][answers[0]].mean()
        return output

    def dpo_loss(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (P,) and the rewards of both answers, (P,) each."""
        logps, ref_logps = self.logps.pop(False), self.logps.pop(True)
        output = preference_loss(logps, ref_logps, self.objective)
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        metrics = {
            "rewards/image_margins": output.image_margins,
            "rewards/image_accuracies": (output.image_margins > 0).float(),
            "logps/image_rejected": logps[2].detach(),
        }
        gathered = self.accelerator.gather_for_metrics
        self.store_metrics(
            {f"{prefix}{name}": gathered(value).mean().item() for name, value in metrics.items()},
            mode,
        )
        return output.losses, output.rewards[0], output.rewards[1]


# Names of 4.6.0. If a version lacks one of them, replacing it would silently have no effect.
for name, function in (
    ("_rlhf_encode", encode_three_cells),
    ("_rlhf_data_collator", collate_three_cells),
):
    if not hasattr(Template, name):
        raise ImportError(
            f"ms-swift must be 4.6, whose Template has {name}. Install ms-swift==4.6.*."
        )
    setattr(Template, name, function)
TrainerFactory.TRAINER_MAPPING["dpo"] = f"{__name__}.RdpoTrainer"
