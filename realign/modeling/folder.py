"""Folders of models: their paths, their files, and the base of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from realign.errors import RefusedError
from realign.runtime.files import file_sha256
from realign.runtime.strict_json import read_json

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def check_model(model: str, option: str = "model") -> None:
    """Refuse a model whose folder is missing or holds no model. A hub id is not looked up.

    Args:
        model: Folder or hub id.
        option: Option that named it, for messages.
    Raises:
        RefusedError: The folder does not exist, or has no config.
    """
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise RefusedError(
                f"{option} must be a folder with config.json or adapter_config.json, got {model}. "
                f"Check --{option}."
            )
    elif folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise RefusedError(
            f"{option} must be an existing folder or a hub id, got {model}, which does not exist. "
            f"Check --{option}."
        )


def resolve_model(model: str, option: str = "model") -> Path:
    """Return the folder of a model; a hub id is downloaded.

    Args:
        model: Folder or hub id.
        option: Option that named it, for messages.
    Raises:
        RefusedError: :func:`check_model` refuses it, or neither the hub nor its local cache has it.

    Example::

        >>> from realign import resolve_model
        >>> resolve_model("model").name  # a hub id gives its folder in the hub's cache
        'model'
    """
    check_model(model, option)
    if Path(model).is_dir():
        return Path(model)
    return download(model, MODEL_FILES, option, f"Check --{option}.")


def download(name: str, patterns: Sequence[str], option: str, remedy: str) -> Path:
    """Return the folder of a hub id in the hub's local cache, after downloading what is missing.

    Args:
        name: Hub id.
        patterns: Patterns of the required files.
        option: Option that named it, for messages.
        remedy: Remedy for an id that the hub does not know, for messages.
    Raises:
        RefusedError: The hub does not know the id, refuses this user, or cannot be reached while
            files are missing in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    rule = f"{option} must be a folder or a hub id"
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise RefusedError(
            f"{rule} that may be downloaded, got {name!r} ({first_line(error)}). Ask for access "
            "on its page, and log in with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise RefusedError(f"{rule}, got {name!r} ({first_line(error)}). {remedy}") from None
    except LocalEntryNotFoundError as error:
        raise _not_reached(rule, name, error.__cause__ or error) from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise RefusedError(
                f"{rule} that may be downloaded, got {name!r} ({first_line(error)}). Log in with "
                "`hf auth login`, or correct the token in HF_TOKEN."
            ) from None
        raise _not_reached(rule, name, error) from None
    except Exception as error:
        # errors of the hub's HTTP client, such as a proxy that fails; its name varies by version
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        raise _not_reached(rule, name, error) from None


def _not_reached(rule: str, name: str, error: BaseException) -> RefusedError:
    """Return the error for a hub id that may be correct, when the hub does not answer."""
    return RefusedError(
        f"{rule} in the hub's local cache while the hub cannot be reached, got {name!r}, which is "
        f"not there ({type(error).__name__}: {first_line(error)}). Connect to the network, or "
        "download it elsewhere and give its folder."
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def model_identity(folder: Path, *, generates: bool = False) -> dict[str, str]:
    """Return the SHA-256 of each file of a model, or of an adapter and its base, by its name.

    Args:
        folder: From :func:`resolve_model`.
        generates: Whether the model will generate answers, which depend on
            ``generation_config.json``; log-probabilities do not.
    """
    without = {"README.md"} | (set() if generates else {"generation_config.json"})
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    identity = {path.name: file_sha256(path) for path in files if path.name not in without}
    if is_adapter(folder):
        base = resolve_base(folder)
        of_base = model_identity(base, generates=generates)
        identity |= {f"base/{name}": digest for name, digest in of_base.items()}
    return identity


def is_adapter(folder: Path) -> bool:
    """Return whether a model folder is an adapter on another model."""
    return (folder / "adapter_config.json").is_file()


def adapter_base(folder: Path) -> str:
    """Return the name of an adapter's base from its configuration.

    Raises:
        RefusedError: The configuration is damaged or names no base.
    """
    file = folder / "adapter_config.json"
    config = read_json(file)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise RefusedError(
            f"{file} must name the adapter's base in base_model_name_or_path, got {base!r}. Set it "
            "to the base's folder or hub id."
        )
    return base


def resolve_base(folder: Path) -> Path:
    """Return the folder of an adapter's base.

    Raises:
        RefusedError: The base is not found, or is an adapter itself.
    """
    base = adapter_base(folder)
    try:
        found = resolve_model(base)
    except RefusedError as error:
        raise RefusedError(
            f"adapter {folder} requires its base model, got {base!r}, which was not found. "
            f"Set base_model_name_or_path in {folder / 'adapter_config.json'} to the "
            f"base's folder or hub id.\n{str(error).removesuffix(' Check --model.')}"
        ) from None
    if is_adapter(found):
        raise RefusedError(
            f"adapter {folder} must have a whole model as its base, got {base!r}, an adapter. "
            "`realign merge` that one first, and name the merged model."
        )
    return found


def lasting_name(model: str) -> str:
    """Return a name for an adapter's base that is valid in any directory: a folder's absolute path,
    or a hub id.
    """
    return str(Path(model).absolute()) if Path(model).is_dir() else model
