"""The card of a model: its base, its recipe, its scores and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from realign.data.build_folder import read_funnel, taken_rows
from realign.errors import RefusedError
from realign.modeling.folder import adapter_base, is_adapter
from realign.review.cards import serving
from realign.review.cards.eval_scores import EvalScores
from realign.review.cards.licence import Licence, licence_of_base
from realign.review.cards.place import PARQUET, ModelPlace
from realign.review.cards.run_facts import WEIGHTS, RunFacts
from realign.review.cards.template import UNNAMED, code, plain, render
from realign.runtime.files import file_sha256
from realign.runtime.strict_json import read_json

METHODS = {
    "rdpo": "rDPO",
    "dpo": "DPO",
    "vdpo": "the image pair alone (vDPO)",
    "mdpo": "mDPO",
    "symmetric": "the symmetric objective",
    "sft": "SFT on the chosen answers",
}
WITHOUT_IMAGE_PAIR = ("dpo", "sft")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class CardOptions:
    """Facts for a card that the files of the folder do not hold.

    Attributes:
        licence: Licence of the model, if one is given.
        base_model: Hub id of the base; by default the one that the run or the adapter names.
        dataset: Hub id of the training data, if they are published.
        repo: Hub id that the model will have.
        run: Folder of the run, if it is not the one above the model.
        evaluation: Folder of the evaluation; by default ``eval`` in the run.
    """

    licence: Licence | None = None
    base_model: str | None = None
    dataset: str | None = None
    repo: str | None = None
    run: Path | None = None
    evaluation: Path | None = None


@dataclass(frozen=True)
class Base:
    """The model from which training started.

    Attributes:
        name: Hub id, or the name of a folder; empty if unknown.
        hub_id: Hub id, if the model has one.
        place: Folder or hub id at which to look for the model's card.
    """

    name: str
    hub_id: str | None
    place: str

    @classmethod
    def of(cls, place: ModelPlace, facts: RunFacts | None, given: str | None) -> Base:
        """Return the given base, or the one that the adapter or the run names."""
        named = facts.written.get("model", "") if facts else ""
        if is_adapter(place.folder):
            named = adapter_base(place.folder)
        if given is not None:
            return cls(given, given, named or given)
        is_folder = Path(named).is_absolute() or named.startswith(".") or Path(named).is_dir()
        return cls(Path(named).name, None, named) if is_folder else cls(named, named or None, named)


def model_card(place: ModelPlace, options: CardOptions) -> tuple[ModelCard, list[str]]:
    """Return the card, and notes to the person who writes it.

    Args:
        place: Folder of the model.
        options: Facts that the folder does not hold.
    Raises:
        RefusedError: A file of the run or of the base is damaged.
    """
    facts = RunFacts.read(place.run) if place.run else None
    base = Base.of(place, facts, options.base_model)
    licence = options.licence or (licence_of_base(base.place) if base.place else None)
    scores, notes = _find_scores(place, options)
    title = (options.repo or "").rpartition("/")[2] or (place.run or place.folder).resolve().name
    repo = options.repo or UNNAMED
    adapter = read_json(place.folder / "adapter_config.json") if is_adapter(place.folder) else None
    values: dict[str, Any] = {
        "title": title,
        "kind": _kind(adapter),
        "base": _shown_base(base),
        "base_name": base.hub_id or "BASE",
        "repo": repo,
        "served_name": title,
        "is_adapter": adapter is not None,
        "names_to_fill": _names_to_fill(options, base, is_adapter=adapter is not None),
        "scores": scores,
        "baseline": _baseline(scores, facts),
        "obstacles": [],
        "max_lora_rank": None,
        "training": _training(facts, options) if facts else None,
    }
    if adapter is not None:
        values["obstacles"] = serving.obstacles(adapter, serving.weight_names(place.folder))
        if not values["obstacles"]:
            values["max_lora_rank"] = serving.max_lora_rank(adapter)
    data = _metadata(base, licence, options, scores, facts, title, is_adapter=adapter is not None)
    if licence is None:
        notes.append("no licence is known. Pass --license; `realign push` requires one")
    elif options.licence is None:
        notes.append(f"licence {licence.name or licence.id}, as the card of {base.name} says")
    if base.hub_id is None:
        notes.append(
            f"the base {base.name or 'model'} has no name on the hub that is known. Pass "
            "--base-model to name it"
        )
    body = render("model_card.md.j2", values)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"), notes


def _kind(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "A fine-tuned version of"
    return "A LoRA adapter for" if adapter.get("peft_type") == "LORA" else "An adapter for"


def _shown_base(base: Base) -> str:
    if base.hub_id:
        return f"[{base.hub_id}]({HUB}/{base.hub_id})"
    return f"{code(base.name)} (a local folder)" if base.name else "a base that is not recorded"


def _names_to_fill(options: CardOptions, base: Base, *, is_adapter: bool) -> str:
    """Return a sentence that explains the placeholders of the examples; empty without any."""
    meanings = []
    if options.repo is None:
        meanings.append(f"`{UNNAMED}` stands for the name of this repository, or its folder")
    if is_adapter and base.hub_id is None:
        meanings.append(f"`BASE` stands for {_shown_base(base)}")
    return "; ".join(meanings) + "." if meanings else ""


def _find_scores(place: ModelPlace, options: CardOptions) -> tuple[EvalScores | None, list[str]]:
    folder = options.evaluation or (place.run / "eval" if place.run else None)
    if folder is None or (options.evaluation is None and not folder.is_dir()):
        return None, ["no scores: no evaluation is known. Name its folder by --eval"]
    weights = {path.name: file_sha256(path) for path in place.folder.glob(f"*{WEIGHTS}")}
    scores = EvalScores.find(folder, weights)
    if scores is None and options.evaluation is not None:
        raise RefusedError(
            f"eval must be a finished evaluation of the weights in {place.folder}, got {folder}, "
            "which has not measured them. Evaluate them, or drop --eval."
        )
    return scores, [] if scores else [f"no scores: {folder} has not measured these weights"]


def _baseline(scores: EvalScores | None, facts: RunFacts | None) -> str:
    """Return the table's name of the baseline: "base" if training started from it."""
    if scores is None:
        return ""
    is_base = facts is not None and scores.is_of(facts.base_files)
    return "base" if is_base else scores.baseline


def _metadata(
    base: Base,
    licence: Licence | None,
    options: CardOptions,
    scores: EvalScores | None,
    facts: RunFacts | None,
    title: str,
    *,
    is_adapter: bool,
) -> ModelCardData:
    tags = ["realign", *([facts.options["objective"]] if facts else []), *(["lora"] * is_adapter)]
    results = [*scores.results()] if scores else []
    more: dict[str, Any] = licence.metadata() if licence else {}
    if base.hub_id:
        more["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return ModelCardData(
        base_model=base.hub_id,
        datasets=[options.dataset] if options.dataset else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=tags,
        eval_results=results or None,
        model_name=title if results else None,
        **more,
    )


def _training(facts: RunFacts, options: CardOptions) -> dict[str, Any]:
    chosen = facts.options
    method = METHODS.get(chosen["objective"], chosen["objective"])
    if chosen["nll_weight"]:
        method += " and a likelihood term on the chosen answers"
    return {
        "method": method,
        "version": facts.written.get("realign", ""),
        "pairs": facts.written.get("pairs"),
        "facts": [*_facts(facts)],
        "options": yaml.safe_dump({"train": facts.changed}, sort_keys=False).rstrip("\n"),
        "data": [*_data(facts, options)],
    }


def _facts(facts: RunFacts) -> Iterator[tuple[str, str]]:
    chosen, last = facts.options, facts.last
    if revision := facts.written.get("revision"):
        yield "revision of the base", code(revision)
    yield "objective", f"`{chosen['objective']}`"
    if chosen["objective"] != "sft":
        yield "beta", f"{chosen['beta']:g}"
    if chosen["objective"] not in WITHOUT_IMAGE_PAIR:
        yield "beta of the image pair", f"{chosen['image_beta'] or chosen['beta']:g}"
        yield "weight of the image pair", f"{chosen['image_weight']:g}"
    if chosen["nll_weight"]:
        yield "weight of the likelihood term", f"{chosen['nll_weight']:g}"
    if lora := chosen["lora"]:
        targets = (
            lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
        )
        yield "LoRA", f"rank {lora['r']}, alpha {lora['alpha']}, on {plain(targets)}"
    parts = {"vision": "vision tower", "projector": "projector", "language": "language model"}
    frozen = [part for name, part in parts.items() if chosen.get(f"freeze_{name}")]
    yield "parts that did not train", ", ".join(frozen) or "none"
    yield "optimizer", "AdamW"
    yield "learning rate", f"{chosen['learning_rate']:g}, {chosen['schedule']}"
    if "pairs" in facts.written:
        yield "pairs", f"{facts.written['pairs']:,}"
    yield "pairs per step", f"{facts.pairs_per_step:,}"
    if steps := facts.written.get("steps", last.get("step")):
        yield "steps", f"{steps:,}; epochs: {chosen['epochs']:g}"
    yield "seed", f"{chosen['seed']}"
    for name, label in (
        ("loss", "loss, mean over the last logged steps"),
        ("rewards/text_accuracies", "pairs of answers ranked right, the same steps"),
        ("rewards/image_accuracies", "pairs of images ranked right, the same steps"),
    ):
        if isinstance(value := last.get(name), float):
            yield label, f"{value:.3f}"


def _data(facts: RunFacts, options: CardOptions) -> Iterator[str]:
    """Yield sentences about the training data, without their path on this machine."""
    if options.dataset:
        yield f"[{options.dataset}]({HUB}/datasets/{options.dataset})"
    data = facts.written.get("data")
    folder = Path(data) if data else facts.folder / "dataset"
    if data and not options.dataset:
        file = folder.name if folder.is_file() else f"{folder.name}/{PARQUET}"
        yield f"Trained on {code(file)}; no place where it is published is recorded."
    if folder.is_dir() and (counts := read_funnel(folder)):
        pairs = counts["accepted"] - counts["decisions"]["dropped"]
        rows = taken_rows(counts)
        yield f"Built by `realign build`: {pairs:,} pairs from {rows:,} rows."
