"""What ms-swift and LLaMA-Factory share: images by their paths, one ``<image>`` an image."""

from __future__ import annotations

from realign.export.folder import ImageFolder
from realign.records import IMAGE_TOKEN, Message, Record


def named(record: Record, images: ImageFolder, *, rejected: bool = False) -> list[str]:
    """Write a record's images; return their paths relative to the export."""
    which, key = (
        (record.rejected_images, "retrieved_image") if rejected else (record.images, "image")
    )
    wished = record.source.get(key)
    # provenance names one image
    name = wished if isinstance(wished, str) and len(which) == 1 else None
    return [f"images/{images.add(raw, name)}" for raw in which]


def with_placeholders(record: Record) -> list[Message]:
    """The prompt, with a placeholder for each image in front of its first user turn."""
    turns = [dict(turn) for turn in record.prompt]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first and record.images:
        first["content"] = IMAGE_TOKEN * len(record.images) + first["content"]
    return turns
