"""``realign check``: find every bad row of a dataset, without a GPU or a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from realign.config import CheckConfig
from realign.data.dataset import read_rows, without_dropped
from realign.data.decisions import positions
from realign.data.image_names import check_image_root
from realign.data.image_pool import DecodedRow, ImagePool, decoded_rows
from realign.data.images import RefusedImage
from realign.data.missing_images import where_missing_images_are
from realign.data.records import (
    COUNTED,
    Problem,
    Record,
    content_problems,
    image_problem,
    special_tokens,
)
from realign.data.unrelated_answers import induced_answers, induced_similarities, unrelated_answers
from realign.errors import RefusedError
from realign.modeling.folder import check_model
from realign.review.findings import Findings
from realign.review.repeats import EvalImages, Repeats, near_images
from realign.runtime.progress import Progress
from realign.runtime.run_folder import check_out


def check(config: CheckConfig) -> Findings:
    """Check a dataset; write the findings if ``config.out`` is given.

    Raises:
        RefusedError: The dataset, model or image folder does not exist, or there are no rows.
    """
    if config.out:
        check_out(config.out)
    if config.model:
        check_model(config.model)
    if config.eval_images:
        check_image_root(config.eval_images)
    read, unreadable = read_rows(config.data, config.images)
    records = without_dropped(read, config.data)
    findings = Findings(
        str(config.data),
        config.max_reject,
        num_rows=len(records) + len(unreadable),
        rejected=list(unreadable),
    )
    if not findings.num_rows:
        raise RefusedError(
            f"data must have at least one row, got none in {config.data}. Add rows or give another "
            "--data."
        )
    model = _Model(config) if config.model else None
    special = special_tokens(model.placeholders if model else ())
    if not model:
        findings.notes.append("special tokens, templates and lengths: not checked without --model")
    evaluation = EvalImages(config.eval_images, config.workers) if config.eval_images else None
    repeats = Repeats()
    without = 0
    similarities: list[float] = []
    with (
        ImagePool(config.workers, timeout_s=config.image_seconds) as pool,
        Progress("check", len(records)) as progress,
    ):
        for row in decoded_rows(_read(records), pool):
            progress.advance()
            if isinstance(row, list):
                findings.rejected.append(row)
                continue
            record = row.record
            without += not record.rejected_images
            similarities += induced_similarities(induced_answers([record]))
            problems = [*content_problems(record, special), *_image_problems(row)]
            problems += repeats.problems(record)
            if config.max_hamming is not None:
                problems += near_images(row, config.max_hamming)
            if model and not problems:
                problems += model.lengths.problems(record, *row.sizes)
            if evaluation:
                leaks, near = evaluation.find(row)
                problems += leaks
                findings.warnings += near
            if problems:
                findings.rejected.append(problems)
    findings.notes += _notes(without, evaluation)
    if note := where_missing_images_are(config.images, findings.problems, findings.num_rows):
        findings.notes.append(note)
    if warning := unrelated_answers(similarities):
        findings.notes.append(f"warning: {warning}")
    if model:
        findings.notes += [model.note] if model.note else []
        findings.prediction = model.prediction()
    if config.out:
        findings.write(config.out)
    return findings


def _read(records: Sequence[Record]) -> Iterator[Record | list[Problem]]:
    for number, position in enumerate(positions(records)):
        try:
            yield records[number]
        except RefusedError as error:  # the message begins with the name of the row
            place = str(error).partition(": ")[0]
            row = place.partition(", row ")[2].removesuffix(COUNTED) or str(position + 1)
            yield [Problem.of(error, row, place)]


def _image_problems(row: DecodedRow) -> Iterator[Problem]:
    for rejected, images in ((False, row.images), (True, row.rejected_images)):
        for image in images:
            if isinstance(image, RefusedImage):
                yield image_problem(row.record, image, rejected=rejected)


def _notes(without: int, evaluation: EvalImages | None) -> Iterator[str]:
    if without:
        yield f"{without} rows have no retrieved image; their image term is dropped"
    if evaluation is None:
        yield "leakage: not checked without --eval-images"
        return
    yield f"leakage: compared with {len(evaluation)} evaluation images"
    for error in evaluation.unreadable:
        yield f"not compared: {error}"


class _Model:
    """A model's processor and configuration.

    The model's weights are never loaded; those of an adapter are, to check them.
    """

    def __init__(self, config: CheckConfig) -> None:
        from realign.modeling.adapter_folder import check_adapter
        from realign.modeling.chat_template import Renderer
        from realign.modeling.folder import resolve_model
        from realign.modeling.lengths import RowLengths, position_limit
        from realign.modeling.model_config import load_model_config
        from realign.modeling.processors import load_processor
        from realign.modeling.vocabulary import Vocabulary

        assert config.model is not None
        folder = resolve_model(config.model)
        check_adapter(folder)
        processor = load_processor(folder)
        self._options, self._config = config, load_model_config(folder)
        limits = {
            "max_length": config.max_length,
            "max_position_embeddings": position_limit(self._config),
        }
        self.placeholders = Renderer(processor).placeholders()
        vocabulary = Vocabulary(processor, self._config)
        self.note = vocabulary.surplus()
        self.lengths = RowLengths(
            processor,
            {name: limit for name, limit in limits.items() if limit is not None},
            vocabulary=vocabulary,
        )

    def prediction(self) -> dict[str, Any]:
        from realign.modeling.memory_forecast import predict_memory

        rows, images = self.lengths.rows, self.lengths.images
        lora = self._options.lora
        return {
            "row_tokens": _spread(rows),
            "image_tokens": _spread([*images.elements()]),
            "is_collated": not self.lengths.is_predicted,
            "memory": predict_memory(
                self._config,
                rank=lora.r,
                alpha=lora.alpha,
                targets=lora.targets,
                freeze_vision=self._options.freeze_vision,
                sequences=self.lengths.cells,
                longest=max(self.lengths.fitting, default=None),
            ),
        }


def _spread(values: Sequence[int]) -> dict[str, float]:
    """Return minimum, median, 95th percentile and maximum."""
    if not values:
        return {}
    points = np.percentile(values, [0, 50, 95, 100], method="higher")
    names = ("min", "median", "p95", "max")
    return dict(zip(names, (float(point) for point in points), strict=True))
