"""Licences of cards: given by the user or stated by the base model's card, never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.review.cards.place import CARD

# the hub writes all ids of licences in lower case
_ID = re.compile(r"[a-z0-9][a-z0-9.\-]*")
OTHER = "other"


@dataclass(frozen=True)
class Licence:
    """A licence as the metadata of a card states it.

    Attributes:
        id: The hub's id of the licence, such as ``apache-2.0``, or ``other``.
        name: Name of a licence that the hub does not know.
        link: Address of the licence's text.
    Raises:
        RefusedError: The id is not written as the hub writes ids, or ``other`` has no name.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise RefusedError(
                f"license must be an identifier of the hub in small letters, such as apache-2.0, "
                f"got {self.id!r}. See https://huggingface.co/docs/hub/repositories-licenses."
            )
        if self.id == OTHER and not self.name:
            raise RefusedError(
                "license other requires a name, has none. Pass --license-name, and --license-link "
                "with the address of its text."
            )

    def metadata(self) -> dict[str, str]:
        """Return the fields of the licence in the metadata of a card."""
        fields = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in fields.items() if value}

    @classmethod
    def given(cls, id: str | None, name: str | None, link: str | None) -> Licence | None:
        """Return the licence that options give; None without any.

        Raises:
            RefusedError: A name or a link is given without an id.
        """
        if id is not None:
            return cls(id, name, link)
        if name or link:
            raise RefusedError(
                "license-name and license-link require license, which is not given. Pass "
                "--license other, or drop them."
            )
        return None


def licence_of_base(base: str) -> Licence | None:
    """Return the licence that a base model's card states; None if the card is not on this machine.

    Args:
        base: Folder or hub id.
    Raises:
        RefusedError: The card's metadata cannot be read.
    """
    path = _card_of(base)
    if path is None:
        return None
    data = read_metadata(path)
    id, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(id, str) or not _ID.fullmatch(id) or (id == OTHER and not name):
        return None
    if link and "://" not in str(link):  # a file beside the base model's card
        is_on_hub = not Path(base).is_dir()
        link = f"https://huggingface.co/{base}/blob/main/{link}" if is_on_hub else None
    return Licence(id, name and str(name), link and str(link))


def read_metadata(card: Path) -> dict[str, Any]:
    """Return the metadata of a card; empty where it has none.

    Raises:
        RefusedError: They are not YAML.
    """
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RefusedError(
            f"{card} must begin with YAML between two lines of ---, got {reason:.200}. Correct it."
        ) from None


def _card_of(base: str) -> Path | None:
    """Return the card in the base model's folder or in the hub's cache; None without one."""
    if Path(base).is_dir():
        path = Path(base) / CARD
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, CARD)
    except HFValidationError:  # the path of a folder that no longer exists
        return None
    return Path(found) if isinstance(found, str) else None
