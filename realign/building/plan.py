"""The plan of a build, shown before anything is asked: requests, tokens and time of each model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from PIL import Image

from realign.building.masking.masker import MaskRules, mask_rows
from realign.building.models import Asked, LocalModel, ServedModel
from realign.building.prompts import completion_request, masking_request
from realign.building.source import with_image_files
from realign.building.staging import Staging
from realign.config import BuildConfig
from realign.data.formats.source_row import SourceRow
from realign.data.images import decode_image, image_size
from realign.generation.generator import Request
from realign.modeling.folder import resolve_model
from realign.modeling.lengths import ImageTokens
from realign.modeling.processors import load_processor

EXAMPLES = 32  # number of rows whose lengths are measured
# a test batch grows to the build's batch size only while it takes less than this
LONGEST_BATCH_S = 10.0


@dataclass(frozen=True)
class Part:
    """The requests to one model.

    Attributes:
        role: ``annotator``, ``masker`` or ``inducer``.
        asked: The model.
        least: Number of requests if the first one of each row succeeds.
        most: Number of requests if none succeeds.
        why: Condition under which there are more than ``least``.
        rows: Evenly spaced rows among those that are asked about, at most ``EXAMPLES``.
    """

    role: str
    asked: Asked
    least: int
    most: int
    why: str
    rows: list[SourceRow]


class Example(NamedTuple):
    """A request like those of the build, and its numbers of tokens.

    Attributes:
        request: The request.
        text: Tokens of the prompt without its image.
        image: Tokens of the image.
        answer: Tokens of the row's answer, as an estimate for the reply; None without an answer.
    """

    request: Request
    text: int
    image: int
    answer: int | None


class Probed(NamedTuple):
    """Measurements of a model.

    Attributes:
        seconds: Time per request, with others running at the same time.
        how: Description of the measurement.
        image: Tokens of the image as the server counts them; None if it does not.
        answer: Tokens of an answer; None if they were not counted.
        problem: Reason why the request has no answer; empty if it has one.
    """

    seconds: float | None
    how: str = ""
    image: int | None = None
    answer: int | None = None
    problem: str = ""


def parts_of(config: BuildConfig, staging: Staging, rows: Sequence[SourceRow]) -> list[Part]:
    """Return the requests to each model that has something to do."""
    unanswered = [row for row in rows if not row.answer]
    induced = [row for row in rows if not row.rejected]
    retries = config.mask_retries
    found = (
        ("annotator", staging.annotator, unanswered, 1, ""),
        ("masker", staging.masker, induced, 1 + retries, "if it changes other words each time"),
        ("inducer", staging.inducer, induced, config.top_k, "if every retrieved image is refused"),
    )
    return [
        Part(role, asked, len(which), times * len(which), why, _spread(which, role))
        for role, asked, which, times, why in found
        if asked is not None and which
    ]


def _spread(rows: Sequence[SourceRow], role: str) -> list[SourceRow]:
    known = [row for row in rows if row.answer] if role != "annotator" else rows
    number = min(len(known), EXAMPLES)
    return [known[place * len(known) // number] for place in range(number)]


def make_plan(
    config: BuildConfig,
    staging: Staging,
    rows: Sequence[SourceRow],
    rules: MaskRules,
    parts: Sequence[Part],
    scratch: Path,
    *,
    asks: bool,
    loads: bool,
) -> Iterator[str]:
    """Yield the lines of the plan.

    Args:
        config: The build.
        staging: Models of the build.
        rows: Rows of the build.
        rules: Settings of masking.
        parts: Requests to each model, from :func:`parts_of`.
        scratch: Folder for the images of examples, and for the answers of servers: ``ROLE.jsonl``,
            as in the build's ``journal/``.
        asks: Whether to ask each server one question, to measure the time.
        loads: Whether to load models of this process and ask them about a few rows, likewise.
    """
    yield f"{len(rows):,} rows, {len({row.path for row in rows}):,} image files"
    aligned = resolve_model(config.model)
    times: dict[LocalModel, Probed] = {}
    for part in parts:
        read_by = part.asked.folder if isinstance(part.asked, LocalModel) else aligned
        examples = list(_examples(config, part, rules, read_by, scratch))
        probed = Probed(None)
        if examples and asks and isinstance(part.asked, ServedModel):
            probed = _ask_one(part.asked, examples, scratch / f"{part.role}.jsonl")
        elif examples and loads and isinstance(part.asked, LocalModel):
            # a model may have several roles, whose requests take about the same time
            probed = times.get(part.asked) or _load_and_ask(part.asked, examples)
            times[part.asked] = probed
        yield from _lines(config, staging, part, examples, probed)
    if parts:
        yield (
            f"tokens are estimates from up to {EXAMPLES} rows: {config.model} counts text, and it "
            "or the server counts images; a completion is assumed to be as long as the answer. "
            "Prices are not known here"
        )


def _examples(
    config: BuildConfig, part: Part, rules: MaskRules, read_by: Path, scratch: Path
) -> Iterator[Example]:
    """Yield requests about the part's rows; the inspection reports images that are unreadable."""
    processor = load_processor(read_by)
    reader = ImageTokens(processor)
    rows = with_image_files(config, part.rows, scratch)
    by_rule = replace(rules, mask="rule")
    masked = mask_rows([row for row in rows if row.answer], by_rule, None, lambda *_: True)
    masks = iter(masked)
    for row in rows:
        mask = next(masks).text if row.answer else ""
        prompt = {
            "annotator": config.annotation_prompt.replace("{instruction}", row.instruction),
            "masker": masking_request(row.answer),
            "inducer": completion_request(row.instruction, mask or row.answer),
        }[part.role]
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            yield Example(
                Request(prompt, row.path),
                len(reader.prompt_ids(prompt)),
                reader(image_size(row.path)),
                len(processor.tokenizer(row.answer, add_special_tokens=False).input_ids)
                if row.answer
                else None,
            )


def _ask_one(asked: ServedModel, examples: Sequence[Example], journal: Path) -> Probed:
    """Ask a server the first question whose image can be sent."""
    from realign.generation.endpoint_generator import EndpointGenerator

    for example in examples:
        path = example.request.image
        assert path is not None
        try:
            decode_image(path.read_bytes(), path.name)
        except (OSError, ValueError):
            continue
        with replace(asked, journal=journal).open() as (generator, _):
            assert isinstance(generator, EndpointGenerator)
            started = time.monotonic()
            (answer,) = generator([example.request])
            seconds, counts = time.monotonic() - started, generator.counts
        if answer.problem:
            return Probed(None, problem=answer.problem)
        of_image = counts.prompt_tokens - example.text
        at_a_time = asked.section.concurrency
        return Probed(
            seconds / at_a_time,
            f"{at_a_time} at a time, if each takes {seconds:.1f} s as one did",
            max(of_image, 0) if counts.prompt_tokens else None,
            counts.completion_tokens or None,
        )
    return Probed(None)


def _load_and_ask(asked: LocalModel, examples: Sequence[Example]) -> Probed:
    """Time batches of a model in this process, of two rows and then of more while that is quick."""
    size, seconds = min(2, asked.batch_size), 0.0
    with asked.open() as (generator, fits):
        requests = [
            request
            for request, *_ in examples
            if request.image and fits(request.prompt, request.image)
        ]
        if not requests:
            return Probed(None)
        while True:
            batch = [*islice(cycle(requests), size)]
            started = time.monotonic()
            try:
                generator(batch)
            except ValueError:  # an unreadable image, which the inspection reports
                return Probed(None)
            seconds = time.monotonic() - started
            if size >= asked.batch_size or seconds > LONGEST_BATCH_S:
                return Probed(seconds / size, f"a batch of {size} took {seconds:.1f} s")
            size = min(4 * size, asked.batch_size)


def _lines(
    config: BuildConfig, staging: Staging, part: Part, examples: Sequence[Example], probed: Probed
) -> Iterator[str]:
    asked = part.asked
    where = asked.section.endpoint if isinstance(asked, ServedModel) else "loaded here"
    more = f", up to {part.most:,} {part.why}" if part.most > part.least else ""
    requests = f"{part.least:,} request{'s' * (part.least > 1)}"
    yield f"{part.role} {asked.name} ({where}): {requests}{more}"
    journal = config.out / "journal" / f"{part.role}.jsonl"
    if isinstance(asked, ServedModel) and journal.is_file():
        with journal.open("rb") as lines:
            known = sum(1 for _ in lines)
        yield f"  {known:,} answers are in {journal} and are not asked for again"
    if examples:
        yield f"  tokens: {_tokens(config, part, examples, probed)}"
    if probed.problem:
        yield f"  a question about one row got no answer: {probed.problem}"
    elif probed.seconds is not None:
        workers = 1
        if isinstance(asked, LocalModel):
            workers = staging.engine(asked).num_workers(len(staging.shards(part.least)))
        least, most = (duration(n * probed.seconds / workers) for n in (part.least, part.most))
        by = f" by {workers} workers" if workers > 1 else ""
        yield f"  time: about {least if least == most else f'{least} to {most}'}{by}, {probed.how}"
    elif isinstance(asked, LocalModel):
        before = "before the model is loaded; --dry-run loads it for a few rows"
        yield f"  time: not known {before if part.rows else 'before there are answers'}"


def _tokens(config: BuildConfig, part: Part, examples: Sequence[Example], probed: Probed) -> str:
    """Return the expected tokens of prompts and of answers, and how they were determined."""
    text = fmean(example.text for example in examples)
    image = fmean(example.image for example in examples) if probed.image is None else probed.image
    by = ", as the server says" if probed.image is not None else ""
    prompts = f"about {_range(part, text + image)} of prompts ({text:,.0f} of text and "
    prompts += f"{image:,.0f} of the image each{by}"
    lengths = [example.answer for example in examples if example.answer is not None]
    answer = fmean(lengths) if lengths else probed.answer
    if answer is None:
        return f"{prompts}), and answers of at most {config.max_new_tokens:,}"
    return f"{prompts}), about {_range(part, answer)} of answers ({answer:,.0f} each)"


def _range(part: Part, each: float) -> str:
    least, most = _rounded(part.least * each), _rounded(part.most * each)
    return least if least == most else f"{least} to {most}"


def _rounded(number: float) -> str:
    """Return an estimate with three digits."""
    number = float(f"{number:.3g}")
    return f"{number / 1e6:,.3g} million" if number >= 1e6 else f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Return a time as text, in its two largest units."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min")]
    parts = [f"{count} {name}" for count, name in units if count]
    return " ".join(parts[:2])
