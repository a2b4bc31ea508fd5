"""The card of a dataset: how its pairs were made, counts, columns and metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from realign.data.build_folder import candidate_lines, read_funnel, row_lines
from realign.data.dataset import read_records
from realign.data.formats.parquet import read_metadata
from realign.data.records import Record, texts_of
from realign.errors import RefusedError
from realign.review.cards.licence import Licence
from realign.review.cards.place import PARQUET, DatasetPlace
from realign.review.cards.template import UNNAMED, code, plain, render
from realign.runtime.files import json_text
from realign.runtime.strict_json import read_json

COLUMNS = {
    "id": "name of the row",
    "images": "the original images",
    "prompt": "turns before the answer, as role and content",
    "chosen": "the preferred answer, one turn of the assistant",
    "rejected": "the rejected answer, one turn of the assistant",
    "rejected_images": "retrieved images, the rejected side of the image pair; may be empty",
    "meta": "how the row was made, as JSON",
}
# the hub's names of sizes, by the number of rows from which the next one holds
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)
LARGEST = "100M<n<1B"


@dataclass
class Provenance:
    """Facts about how rows were made.

    Attributes:
        first: First row, without images.
        induced: Number of rows whose rejected answer was induced by a model.
        masked_by: Model or rule that masked the answer to its number of rows.
        models: Role, such as generator, to the models in it, with engine and decoding.
        sources: Names of the files that rows come from.
        similarities: Similarities of rejected to chosen answers.
    """

    first: Record | None = None
    induced: int = 0
    masked_by: Counter[str] = field(default_factory=Counter)
    models: dict[str, dict[str, None]] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    similarities: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Provenance:
        """Read the texts of all rows; no image is read."""
        found = cls()
        for record in texts_of(records):
            found.first = found.first or record
            found._add(record)
        return found

    def _add(self, record: Record) -> None:
        meta = record.meta
        if isinstance(meta.get("masked_by"), str):
            self.induced += 1
            self.masked_by[meta["masked_by"]] += 1
        for role in ("annotator", "masker", "generator"):
            if isinstance(model := meta.get(role), dict):
                self._play(role, _shown_model(model))
        retrieval, similarity = meta.get("retrieval"), meta.get("similarity")
        if isinstance(retrieval, dict) and isinstance(retrieval.get("encoder"), str):
            self._play("encoder", plain(retrieval["encoder"]))
        if isinstance(similarity, dict):
            if isinstance(similarity.get("model"), str):
                self._play("similarity", plain(similarity["model"]))
            if isinstance(value := similarity.get("value"), int | float):
                self.similarities.append(value)
        if isinstance(file := record.source.get("file"), str):
            self.sources[code(Path(file).name)] = None

    def _play(self, role: str, model: str) -> None:
        self.models.setdefault(role, {})[model] = None

    def named(self, role: str) -> str:
        """Return the models of a role as text; empty if no row names one."""
        return " and ".join(self.models.get(role, {}))


def _shown_model(model: Mapping[str, Any]) -> str:
    how = [str(model[key]) for key in ("engine", "decoding") if isinstance(model.get(key), str)]
    return code(model.get("model", "a model")) + (f" ({', '.join(how)})" if how else "")


def dataset_card(
    place: DatasetPlace, licence: Licence | None, repo: str | None
) -> tuple[DatasetCard, list[str]]:
    """Return the card, and notes to the person who writes it.

    Args:
        place: Folder of the dataset.
        licence: Licence of the dataset, if one is given.
        repo: Hub id that the dataset will have.
    Raises:
        RefusedError: The dataset has no rows or is damaged.
    """
    file = place.folder / PARQUET
    records = read_records(file, None)
    if not len(records):
        raise RefusedError(f"data {file} must have at least one row, got none. Give another.")
    found = Provenance.of(records)
    schema = read_metadata(file).schema.to_arrow_schema()
    with_image_pair = _count_image_pairs(file)
    config, counts = _config(place.folder), read_funnel(place.folder)
    title = (repo or "").rpartition("/")[2] or _title(place.folder)
    body = render(
        "dataset_card.md.j2",
        {
            "title": title,
            "repo": repo or UNNAMED,
            "is_named": repo is not None,
            "rows": len(records),
            "with_image_pair": with_image_pair,
            "columns": [(name, COLUMNS.get(name, "of the source")) for name in schema.names],
            "example": _example(found.first),
            "steps": [*_steps(config, found, len(records))] if config else [],
            "rows_counted": row_lines(counts) if counts else [],
            "candidates_counted": candidate_lines(counts) if counts and found.induced else [],
            "sources": [*found.sources],
            "is_induced": found.induced > 0,
            "similarities": median(found.similarities) if found.similarities else None,
            "by_hand": counts["decisions"]["dropped"] if counts else 0,
        },
    )
    data = _metadata(found, licence, len(records), _features(schema), title, file.name)
    notes = []
    if licence is None:
        notes.append("no licence is known. Pass --license; `realign push` requires one")
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}"), notes


def _title(folder: Path) -> str:
    """Return the folder's name, preceded by the run's if the folder is called ``dataset``."""
    return f"{folder.parent.name}-{folder.name}" if folder.name == "dataset" else folder.name


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "build.json"
    build = read_json(path) if path.is_file() else {}
    config = build.get("config") if isinstance(build, dict) else None
    return config if isinstance(config, dict) else {}


def _count_image_pairs(file: Path) -> int:
    """Count the rows with retrieved images by the lengths of their lists; no image is read."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    count = 0
    with pq.ParquetFile(file) as parquet:
        if "rejected_images" not in parquet.schema_arrow.names:
            return 0
        for batch in parquet.iter_batches(columns=["rejected_images.list.element.path"]):
            lengths = pc.list_value_length(batch.column(0)).fill_null(0)
            count += pc.sum(pc.greater(lengths, 0)).as_py() or 0
    return count


def _example(record: Record | None) -> str:
    assert record is not None
    shown = {
        "id": record.id,
        "prompt": list(record.prompt),
        "chosen": record.chosen,
        "rejected": record.rejected,
    }
    return json_text(shown, indent=2)


def _steps(config: Mapping[str, Any], found: Provenance, rows: int) -> Iterator[str]:
    """Yield how the pairs were made, a sentence or two per stage."""
    if annotators := found.named("annotator"):
        yield f"**Answers** that the source lacks were given by {annotators}."
    if found.induced:
        yield "".join(_masks(config, found))
    yield "".join(_retrieval(config, found))
    if given := rows - found.induced:
        yield (
            f"**Rejected answers** of {given:,} rows are those of the source; their rejected image "
            "is the nearest one."
        )
    if found.induced:
        generator = found.named("generator") or "the model"
        yield (
            f"**Rejected answers** of {found.induced:,} rows: {generator} filled the masks in "
            "sight of a retrieved image, the nearest first; the first completion that passed "
            "became the rejected answer, and its image the rejected image."
        )
        yield "".join(_filters(config, found))


def _masks(config: Mapping[str, Any], found: Provenance) -> Iterator[str]:
    is_sentence = config["mask_level"] == "sentence"
    kind = "sentences with visual content" if is_sentence else "visual phrases"
    by = ", ".join(f"{masker} {count:,}" for masker, count in found.masked_by.most_common())
    yield f"**Masks.** In the chosen answer {kind} were replaced by `[MASK]` (rows: {plain(by)})"
    if rates := config["mask_rates"]:
        shares = ", ".join(f"{plain(name)} {100 * rate:g} %" for name, rate in rates.items())
        yield f", of these categories a share each: {shares}"
    if maskers := found.named("masker"):
        yield f"; the masking model was {maskers}"
    yield "."


def _retrieval(config: Mapping[str, Any], found: Provenance) -> Iterator[str]:
    yield f"**Retrieval.** The {config['top_k']} nearest other images by the cosine of embeddings"
    if encoders := found.named("encoder"):
        yield f" (encoder: {encoders})"
    low, high = config["min_cosine"], config["max_cosine"]
    if low is not None or high is not None:
        band = [f"at least {low:g}"] if low is not None else []
        band += [f"at most {high:g}"] if high is not None else []
        yield f", {' and '.join(band)}"
    if (bits := config["max_hamming"]) is not None:
        yield f"; images whose perceptual hashes differ in at most {bits} of 64 bits count as one"
    yield "."


def _filters(config: Mapping[str, Any], found: Provenance) -> Iterator[str]:
    low, high = config["min_length_ratio"], config["max_length_ratio"]
    yield "**Filters.** A completion was refused if it was cut, empty, a refusal or chatter, "
    yield "repeated the prompt, left a mask unfilled or held special tokens; if it had less than "
    yield f"{low:.2g} or more than {high:.2g} times the words of the chosen answer"
    if config["keep_unmasked"]:
        yield "; if it changed a word that was not masked"
    yield f"; or if its similarity to the chosen answer ({found.named('similarity')}) was "
    yield f"{config['threshold']:g} or more."


def _metadata(
    found: Provenance,
    licence: Licence | None,
    rows: int,
    features: list[dict[str, Any]] | None,
    title: str,
    file: str,
) -> DatasetCardData:
    more: dict[str, Any] = licence.metadata() if licence else {}
    if features is not None:
        splits = [{"name": "train", "num_examples": rows}]
        more["dataset_info"] = {"features": features, "splits": splits}
    return DatasetCardData(
        pretty_name=title,
        task_categories=["image-text-to-text"],
        size_categories=[size_category(rows)],
        annotations_creators=["machine-generated"] if found.induced else None,
        tags=["realign", "preference", "dpo", "vision-language"],
        **more,
        configs=[
            {"config_name": "default", "data_files": [{"split": "train", "path": file}]},
        ],
    )


def size_category(rows: int) -> str:
    """Return the hub's name of a number of rows."""
    return next((name for limit, name in SIZES if rows < limit), LARGEST)


def _features(schema: Any) -> list[dict[str, Any]] | None:
    """Return the columns in the form of a card's metadata; None if the file has no description of
    them for ``datasets``.
    """
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    features = json.loads(raw)["info"]["features"]
    shown = [{"name": name, **_feature(feature)} for name, feature in features.items()]
    return shown if all(len(column) == 2 for column in shown) else None


def _feature(feature: Any) -> dict[str, Any]:
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Value":
        return {"dtype": feature["dtype"]}
    if kind == "Image":
        return {"dtype": "image"}
    if kind in ("List", "Sequence"):
        inner = feature["feature"]
        if inner.get("_type"):
            known = _feature(inner)
            return {"list": known["dtype"]} if "dtype" in known else {}
        return {"list": [{"name": name, **_feature(one)} for name, one in inner.items()]}
    return {}
