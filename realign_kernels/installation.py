"""The version of this package, and a refusal of installations that have overwritten each other.

Two distributions can hold this package: ``realign-kernels``, and ``realign`` where it was installed
from a clone.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

__version__ = "0.2.0"

DISTRIBUTIONS = ("realign", "realign-kernels")
_FOLDER = "realign_kernels/"


def installed_files(name: str) -> dict[str, str]:
    """Return the path and the hash of each file of this package that a distribution installed.

    An editable installation has none but the compiled library.
    """
    try:
        record = distribution(name).read_text("RECORD") or ""
    except PackageNotFoundError:
        return {}
    lines = [line.split(",") for line in record.splitlines() if line.startswith(_FOLDER)]
    return {path: digest for path, digest, _ in lines}


def check_installations() -> None:
    """Refuse a package that is a mixture of two distributions.

    Raises:
        ImportError: Both distributions have installed this package, and their files differ: the
            later one has written over some files of the earlier one.
    """
    sources = []
    for name in DISTRIBUTIONS:
        files = installed_files(name)
        # Compiled libraries may differ; one that does not fit is refused when it is loaded.
        sources.append({path: files[path] for path in files if path.endswith(".py")})
    if all(sources) and sources[0] != sources[1]:
        found = " and ".join(f"{name} {distribution(name).version}" for name in DISTRIBUTIONS)
        raise ImportError(
            f"realign_kernels must come from one distribution, got the files of {found}, which "
            "differ. Run `pip uninstall -y realign realign-kernels`, then install one of the two."
        )


def library_was_removed() -> bool:
    """Return whether a distribution installed the compiled library, which is missing now."""
    library = f"{_FOLDER}_csrc.so"
    return any(library in installed_files(name) for name in DISTRIBUTIONS)


check_installations()  # before other modules, since those of a mixture may not even import
