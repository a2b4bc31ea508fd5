"""``realign browse``: show a dataset in this machine's browser until it is stopped."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from realign.data.build_folder import tried_before
from realign.data.dataset import dataset_title, read_records
from realign.data.decisions import decisions_path
from realign.errors import RefusedError
from realign.runtime.progress import announce
from realign.runtime.run_folder import check_out

HOST = "127.0.0.1"


def serve(
    data: Path, *, images: Path | None = None, decisions: Path | None = None, port: int = 0
) -> None:
    """Serve the gallery on the loopback address until SIGINT or SIGTERM.

    Args:
        data: Build folder, parquet file or JSON file.
        images: Folder of the images that a JSON file names.
        decisions: Decision file; None for the one beside the dataset.
        port: Port to listen on; 0 for any free one.
    Raises:
        RefusedError: A package is missing, there is no such dataset, the decision file is damaged,
            or the port is taken.
    """
    try:
        import uvicorn

        from realign.review.browse.app import make_app
    except ImportError as error:
        raise RefusedError(
            f"realign browse needs {str(error.name).partition('.')[0]}. Install "
            "'realign[pipeline,browse]'."
        ) from None
    from realign.review.browse.rows import Rows

    if not 0 <= port <= 65_535:
        raise RefusedError(f"port must be in [0, 65535], got {port}. Choose another, or 0 for any.")
    own = decisions_path(data)
    path = decisions or own
    check_out(path.parent)
    if path.is_dir():
        raise RefusedError(f"decisions must be a file, got the folder {path}. Name a file in it.")
    is_built = data.is_dir() or data.name == "dataset.parquet"
    folder = data if data.is_dir() else data.parent
    rows = Rows(read_records(data, images), path, tried_before(folder) if is_built else {})
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise RefusedError(
            f"port {port} of {HOST} cannot be used ({error}). Give another --port, or 0 for any."
        ) from None
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(24)
    app = make_app(rows, dataset_title(data), token, f"realign-{port}")
    # the address holds the token, so it is printed to the terminal but not logged
    announce(f"{len(rows)} rows; decisions go to {path}")
    if path != own:
        announce(f"training reads {own.name} beside the dataset, not this file")
    announce(f"open http://{HOST}:{port}/?token={token}   (Ctrl-C ends)")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listening])
