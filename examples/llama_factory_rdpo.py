"""rDPO in LLaMA-Factory 0.9.5: its DPO stage with three cells.

    python examples/llama_factory_rdpo.py train.yaml

`train.yaml` is a configuration of `llamafactory-cli train` with `stage: dpo` and
`dataset: realign_rdpo`. `realign export --to llamafactory` writes this dataset: `sharegpt` rows
with `rejected_images` beside `images`, and `"formatting": "rdpo"` in dataset_info.json.
LLaMA-Factory itself would drop that column. Here, each row becomes three sequences: the good
answer, the bad answer on the same image, and the good answer on the retrieved image.
`docs/guides/trainers/llama-factory.md` lists what was run.
"""

from __future__ import annotations

from typing import Any

from llamafactory.data import collator, converter, loader
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.train.dpo import trainer, workflow
from llamafactory.train.trainer_utils import get_batch_logps
from llamafactory.train.tuner import run_exp
from torch import Tensor

from realign_kernels import Objective, preference_loss

IMAGE_WEIGHT = 1.0
CELLS = ("chosen", "rejected", "image_rejected")
# Options that would also change the loss, and their neutral values.
NEUTRAL = {"pref_loss": "sigmoid", "dpo_label_smoothing": 0.0, "pref_bco_weight": 0.0}


class RdpoConverter(converter.SharegptDatasetConverter):
    """Converter that keeps the retrieved images of a row."""

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        row = super().__call__(example)
        row["_rejected_images"] = self._find_medias(example.get("rejected_images"))
        return row


class RdpoProcessor(loader.PairwiseDatasetProcessor):
    """Processor that also tokenizes the good answer on the retrieved images."""

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "_rejected_images" not in examples:
            raise ValueError(
                "dataset must be of the formatting rdpo, got another one. Name realign_rdpo, as in "
                "dataset_info.json."
            )
        retrieved = examples["_rejected_images"]
        if not all(retrieved):
            raise ValueError(
                "Every row must have rejected_images, got a row without. Leave such rows out."
            )
        rows = super().preprocess_dataset(examples)
        others = super().preprocess_dataset({**examples, "_images": retrieved})
        for one, other in zip(rows["chosen_labels"], others["chosen_labels"], strict=True):
            if answer_of(one) != answer_of(other):
                raise ValueError(
                    "cutoff_len must leave the answer whole on both images, got one that it cuts. "
                    "Raise it."
                )
        for key in ("input_ids", "attention_mask", "labels"):
            rows[f"image_rejected_{key}"] = others[f"chosen_{key}"]
        rows["rejected_images"] = others["images"]
        return rows


def answer_of(labels: list[int]) -> list[int]:
    """Return the scored tokens."""
    return [label for label in labels if label != IGNORE_INDEX]


class RdpoCollator(collator.PairwiseDataCollatorWithPadding):
    """Collator that orders the sequences cell by cell."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [
            {
                **{key: row[f"{cell}_{key}"] for key in ("input_ids", "attention_mask", "labels")},
                "images": row["rejected_images" if cell == "image_rejected" else "images"],
                "videos": row["videos"],
                "audios": row["audios"],
            }
            for cell in CELLS
            for row in features
        ]
        # Skip the parent, which makes pairs, and call the collator of single sequences.
        return super(collator.PairwiseDataCollatorWithPadding, self).__call__(sequences)


class RdpoTrainer(trainer.CustomDPOTrainer):
    """Trainer of DPO on the answers plus DPO on the images."""

    def __init__(self, *args: Any, finetuning_args: Any, **kwargs: Any) -> None:
        for name, neutral in NEUTRAL.items():
            value = getattr(finetuning_args, name)
            if value != neutral:
                raise ValueError(f"{name} must be {neutral} for rDPO, got {value}. Leave it out.")
        if finetuning_args.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha must be null for rDPO, got {finetuning_args.ld_alpha}. Leave it out."
            )
        super().__init__(*args, finetuning_args=finetuning_args, **kwargs)
        self.objective = Objective.rdpo(self.beta, image_weight=IMAGE_WEIGHT)
        # Sums of the policy (False) and the reference (True); the parent passes on only two cells.
        self.logps: dict[bool, Tensor] = {}

    def concatenated_forward(
        self, model: Any, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Return sums and logits of both answers, and keep the sums of all three cells."""
        inputs = {**batch}
        labels = inputs.pop("labels")
        logits = model(**inputs, return_dict=True, use_cache=False).logits.float()
        logps, lengths = get_batch_logps(logits=logits, labels=labels)
        logps = self.logps[is_ref_model] = logps.view(3, -1)
        return {
            "chosen_logps": logps[0],
            "rejected_logps": logps[1],
            "chosen_logits": logits.chunk(3)[0],
            "rejected_logits": logits.chunk(3)[1],
            "chosen_logps_avg": logps[0] / lengths.chunk(3)[0],
        }

    def compute_preference_loss(self, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (P,) and the rewards of both answers, (P,) each."""
        logps, ref_logps = self.logps.pop(False), self.logps.pop(True)
        output = preference_loss(logps, ref_logps, self.objective)
        self.image_metrics = {
            "rewards/image_margins": output.image_margins.mean().item(),
            "rewards/image_accuracies": (output.image_margins > 0).float().mean().item(),
            "logps/image_rejected": logps[2].mean().item(),
        }
        return output.losses, output.rewards[0], output.rewards[1]

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """Add the metrics of the image pair."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        prefix = "eval_" if train_eval == "eval" else ""
        metrics |= {f"{prefix}{name}": value for name, value in self.image_metrics.items()}
        return loss, metrics


def main() -> None:
    """Replace LLaMA-Factory's own classes by these, and run it."""
    converter.register_dataset_converter("rdpo", RdpoConverter)
    # Names of 0.9.5. If a version lacks one of them, replacing it would have no effect.
    for module, name, replacement in (
        (loader, "PairwiseDatasetProcessor", RdpoProcessor),
        (workflow, "PairwiseDataCollatorWithPadding", RdpoCollator),
        (trainer, "CustomDPOTrainer", RdpoTrainer),
    ):
        if not hasattr(module, name):
            raise ImportError(f"{module.__name__} must have {name}. Install llamafactory==0.9.5.")
        setattr(module, name, replacement)
    run_exp()


if __name__ == "__main__":
    main()
