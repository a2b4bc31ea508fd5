"""One row of the source of a dataset, independent of its file format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realign.data.records import Message


@dataclass(frozen=True)
class SourceRow:
    """One instruction about one image, with the parts of the pair that the source has.

    Attributes:
        id: Unique in the source.
        image: The image as the source names it.
        path: The image file.
        prompt: Turns before the answer, string contents, no image placeholders; the last is the
            user's.
        answer: The good answer y_w; empty if it is still to be generated.
        rejected: The bad answer y_l of a source of text pairs; empty if it is still to be induced.
        source: The source's own names, index and unknown keys, for provenance and export.
        place: File and line or row, as messages name it.
        is_annotated: Whether the answer was generated.
        is_image_pair: Whether the row compares two images and no answers, as rows of ms-swift with
            ``rejected_images`` alone do.
    """

    id: str
    image: str
    path: Path
    prompt: tuple[Message, ...]
    answer: str = ""
    rejected: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    is_annotated: bool = False
    is_image_pair: bool = False

    @property
    def instruction(self) -> str:
        """The last user turn: x in the paper."""
        return self.prompt[-1]["content"]
