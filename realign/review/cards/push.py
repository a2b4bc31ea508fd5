"""``realign push``: upload a model or a dataset with its card to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from realign.errors import RefusedError
from realign.review.cards.card import check_repo_id
from realign.review.cards.place import CARD, find_place
from realign.review.cards.template import UNNAMED
from realign.review.cards.upload import Upload
from realign.runtime.files import read_utf8
from realign.runtime.progress import announce

LOGIN = "Run `hf auth login`, or set HF_TOKEN to a token that may write"


def prepare(path: Path, repo: str) -> Upload:
    """Check the files to upload, without the network, and return them.

    Args:
        path: A run, whose checkpoint is uploaded; another folder of a model; or a folder with
            ``dataset.parquet``.
        repo: Name of the repository, ``user/name``.
    Raises:
        RefusedError: Something is missing, damaged or must not leave this machine.
    """
    check_repo_id(repo, "repo")
    upload = Upload.of(find_place(path))
    if f'"{UNNAMED}"' in read_utf8(upload.folder / CARD):
        announce(f"the card's examples say {UNNAMED}: realign card --repo {repo} writes the name")
    return upload


def push(upload: Upload, repo: str, *, public: bool = False) -> str:
    """Upload files in one commit and return its address; create the repository if necessary.

    Args:
        upload: From :func:`prepare`.
        repo: Name of the repository, ``user/name``.
        public: Whether everybody may see the repository.
    Raises:
        RefusedError: There is no token or no network, the repository is public instead of private
            or the reverse, or the hub does not take the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise RefusedError("push requires the network, got HF_HUB_OFFLINE. Unset it.")
    if get_token() is None:
        raise RefusedError(f"push requires a token of the hub, has none. {LOGIN}.")
    api = HfApi()
    with _explained(api.endpoint, repo):
        api.create_repo(repo, repo_type=upload.repo_type, private=not public, exist_ok=True)
        is_private = bool(api.repo_info(repo, repo_type=upload.repo_type).private)
    if is_private == public:
        seen, remedy = ("private", "drop --public") if is_private else ("public", "pass --public")
        raise RefusedError(
            f"{repo} must be {'public' if public else 'private'} as asked, is {seen} already. "
            f"Change it in its settings on the hub, or {remedy}."
        )
    with _explained(api.endpoint, repo):
        # not upload_folder, which may make several commits of a folder
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, upload.folder / name) for name in upload.files],
            commit_message="Upload with realign push",
            repo_type=upload.repo_type,
        )
        present = {*api.list_repo_files(repo, repo_type=upload.repo_type)}
    if missing := sorted(upload.files.keys() - present):
        raise RefusedError(
            f"{repo} must take every file, has left out {', '.join(missing)}, which its .gitignore "
            "names. Remove them from that file on the hub, and give the same command again."
        )
    return commit.commit_url


@contextmanager
def _explained(endpoint: str, repo: str) -> Iterator[None]:
    """Turn errors of the hub or the network into refusals of one line with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError

    # the base class of the HTTP client's errors, such as a refused connection or an unknown host
    http_error: type[Exception] = next(
        kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"
    )
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = " ".join((error.server_message or str(error)).split())[:300]
        if status == 401:
            raise RefusedError(
                f"push requires a valid token of the hub, got 401 ({reason}). {LOGIN}."
            ) from None
        if status in (403, 404):
            raise RefusedError(
                f"the token must be allowed to write to {repo}, got {status} ({reason}). Use one "
                "that may, or another --repo."
            ) from None
        raise RefusedError(
            f"the hub must take {repo}, got {status} ({reason}). Correct that, or give the same "
            "command again later; no file was changed there."
        ) from None
    except (http_error, ConnectionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RefusedError(
            f"push requires the hub, got {endpoint}, which was not reached ({reason}). Check the "
            "network and HF_ENDPOINT, and give the same command again."
        ) from None
    except (ValueError, RuntimeError) as error:  # invalid metadata of the card; a failed upload
        causes = (error, error.__cause__) if isinstance(error, RuntimeError) else (error,)
        reason = ": ".join(" ".join(str(cause).split())[:300] for cause in causes if cause)
        raise RefusedError(
            f"the hub must take {repo}, got {reason.rstrip('.')}. Correct that, or give the same "
            "command again; no file was changed there."
        ) from None
