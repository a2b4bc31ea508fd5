"""The process that decodes one untrusted image after another for :mod:`realign.data.image_pool`.

It reads requests from standard input, ``{"where", "path"}`` or ``{"where", "bytes": N}`` with N
bytes after the line, and answers each with one line. With ``shrink_to`` and ``max_pixels`` it
writes a smaller copy of the image and answers about the copy, or with the system's error number if
it cannot be written. It must not import torch or anything else whose import takes longer than
decoding. It ends when its input ends, and so with its parent.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from realign.data.images import RefusedImage, decode_image, read_image
from realign.data.perceptual_hash import perceptual_hash
from realign.runtime.files import write_unsynced


def serve(
    requests: BinaryIO, answers: BinaryIO, cpu_s: float, wall_s: float, memory_bytes: int
) -> None:
    """Answer requests until there are no more.

    Args:
        requests: Stream of requests.
        answers: Stream of answers.
        cpu_s: Longest CPU time for one image, in seconds; then SIGPROF ends the process, also
            inside a decoder.
        wall_s: Longest wall-clock time for one image, in seconds; then SIGALRM ends the process.
        memory_bytes: Limit of the address space, on systems that have one.
    """
    _limit_memory(memory_bytes)
    while line := requests.readline():
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        answer = _inspect(request, requests)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _inspect(request: dict[str, Any], requests: BinaryIO) -> dict[str, Any]:
    where = request["where"]
    try:
        if "path" in request:
            raw = read_image(Path(request["path"]), where)
        else:
            raw = requests.read(request["bytes"])
        if "shrink_to" in request:
            image = decode_image(raw, where, request["max_pixels"])
            raw = _jpeg(image)
            try:
                write_unsynced(Path(request["shrink_to"]), raw)
            except OSError as error:
                return {"errno": error.errno}
        image = decode_image(raw, where)
        return {
            "sha256": hashlib.sha256(raw).hexdigest(),
            "width": image.width,
            "height": image.height,
            "perceptual_hash": perceptual_hash(image),
        }
    except RefusedImage as error:
        return {"reason": error.reason, "code": error.code}
    except MemoryError:
        reason = "image takes too much memory to decode. Shrink it."
        return {"reason": reason, "code": "memory"}


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _limit_memory(memory_bytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    with contextlib.suppress(OSError, ValueError):  # macOS has the constant and refuses the call
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


if __name__ == "__main__":
    # a signal that was blocked or ignored where the parent was started would never come
    for limit in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    # Ctrl-C reaches the whole process group; the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = None  # decode_image checks the size of every image itself
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not be mistaken for an answer
    try:
        serve(
            sys.stdin.buffer,
            answers,
            cpu_s=float(sys.argv[1]),
            wall_s=float(sys.argv[2]),
            memory_bytes=int(sys.argv[3]),
        )
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
