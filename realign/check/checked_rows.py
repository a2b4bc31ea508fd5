"""That rows were found good, kept beside a run: whoever continues it need not decode them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.cache import Identity
from realign.check.row_lengths import RowLengths
from realign.errors import RefusedError
from realign.files import canonical_json, content_sha256, read_json, write_json
from realign.numerics import version_of


@dataclass
class CheckedRows:
    """A file that knows the lengths of rows that were good, by what they were found good for.

    Args:
        path: The file.
        identity: Everything that the check depends on, as a hash.
        lengths: What was found, once the rows are known to be good.
    """

    path: Path
    identity: str
    lengths: RowLengths | None = None

    @classmethod
    def of(cls, path: Path, keys: Sequence[str], model: Identity) -> CheckedRows:
        """The file for rows, by their keys as they are read now, and the model that scores them,
        whose processor is part of it.
        """
        return cls(path, content_sha256(canonical_json(model), version_of("jinja2"), *keys))

    def restore(self, lengths: RowLengths) -> bool:
        """Put in the lengths of the same rows; False where there are none, or damaged ones."""
        try:
            stored = read_json(self.path)
            rows, images = stored["rows"], {int(key): n for key, n in stored["images"].items()}
        except (OSError, RefusedError, LookupError, TypeError, AttributeError, ValueError):
            return False
        if stored != self._content(rows, images):
            return False
        lengths.rows, lengths.images = rows, Counter(images)
        return True

    def keep(self) -> None:
        """Write the file, once the run has its folder."""
        if self.lengths is not None:
            write_json(self.path, self._content(self.lengths.rows, self.lengths.images))

    def _content(self, rows: list[int], images: dict[int, int]) -> dict[str, Any]:
        found = {"rows": rows, "images": {str(tokens): images[tokens] for tokens in sorted(images)}}
        return {**found, "sha256": content_sha256(self.identity, canonical_json(found))}
