"""Output folders of exports, which must be empty, and their image files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path, PurePosixPath

from realign.data.image_names import image_suffix
from realign.errors import RefusedError

# Linux takes paths of 4,096 bytes; the folder's own path needs some of them
MAX_NAME_BYTES = 1024


class ImageFolder:
    """Writer of image files. A file gets the requested name if that is safe and not taken, and its
    hash as its name otherwise.

    Args:
        folder: Folder of the images, which is created.

    Attributes:
        renamed: Number of images that did not get the requested name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._contents: dict[PurePosixPath, str] = {}
        self._parents: set[PurePosixPath] = set()
        self.renamed = 0
        folder.mkdir()

    def __len__(self) -> int:
        return len(self._contents)

    def add(self, raw: bytes, requested: str | None) -> str:
        """Write one image and return its name in the folder. Equal bytes with an equal name are
        written once.
        """
        digest = sha256(raw).hexdigest()
        if requested and _is_inside(requested) and self._is_free(PurePosixPath(requested), digest):
            name = requested
        else:
            self.renamed += requested is not None
            name = digest + (image_suffix(raw) or "")
            assert self._is_free(PurePosixPath(name), digest)
        path = PurePosixPath(name)
        if path not in self._contents:
            target = self._folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(raw)
            self._contents[path] = digest
            self._parents.update(path.parents)
        return name

    def _is_free(self, path: PurePosixPath, digest: str) -> bool:
        if path in self._contents:
            return self._contents[path] == digest
        return path not in self._parents and not any(
            parent in self._contents for parent in path.parents
        )


def _is_inside(name: str) -> bool:
    """Return whether a name stays inside its folder and is a file name to every program."""
    if not _is_unicode(name) or "\0" in name or "://" in name or name.startswith("data:"):
        return False
    parts = name.split("/")
    return (
        ".." not in parts
        and parts[0] != ""
        and parts[-1] not in ("", ".")
        and len(name.encode()) <= MAX_NAME_BYTES
        and all(len(part.encode()) <= 255 for part in parts)
    )


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_new(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        RefusedError: The folder is not empty; the message names its files.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names:
        raise RefusedError(
            f"out must be a new or empty folder, got {out} with {', '.join(names[:8])}. Choose "
            "another --out."
        )
