"""Pool of processes that read, hash and decode untrusted images, within limits of time and memory.

An image that hangs, crashes or fills the memory affects no other image: its worker is replaced.
Workers are new interpreters (:mod:`realign.data.image_worker`), neither forks nor children of
``multiprocessing``, so that they import nothing of the caller and share only two pipes with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.data.images import ImageFacts, RefusedImage, Size
from realign.data.records import Problem, Record
from realign.runtime.memory import usable_cores
from realign.runtime.write_errors import explain_write_errors

# Limits are of CPU time, so that a busy machine refuses no image that an idle one accepts. The
# limit of wall-clock time, for a file whose reading hangs, is this many times as long.
WALL_FACTOR = 10
# A worker ends by itself at its time limits; one that cannot (stuck in the kernel, stopped) is
# abandoned this much later.
GRACE_SECONDS = 5.0
START_SECONDS = 60.0  # time for a worker's imports, on a busy machine
# images that a worker may decode ahead of the reader of the facts
_AHEAD = 8
_ENVIRONMENT = {
    # one thread pool per core would exhaust the address space before the first image
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # glibc would return the pages of every image and fault them in again for the next one
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}

Inspected = ImageFacts | RefusedImage


@dataclass(frozen=True)
class DecodedRow:
    """A record and the facts, or the refusal, of each of its images."""

    record: Record
    images: tuple[Inspected, ...]
    rejected_images: tuple[Inspected, ...]

    @property
    def sizes(self) -> tuple[list[Size], list[Size]]:
        """Return the widths and heights of the original and the retrieved images that are good."""
        images, rejected_images = (
            [(facts.width, facts.height) for facts in found if isinstance(facts, ImageFacts)]
            for found in (self.images, self.rejected_images)
        )
        return images, rejected_images


def inspect_images(
    paths: Sequence[Path], *, workers: int, timeout_s: float = 10, memory_bytes: int = 2 << 30
) -> Iterator[ImageFacts | RefusedImage]:
    """Decode image files and yield their facts or refusals, in the order of ``paths``.

    Args:
        paths: The files. A repeated path is decoded again.
        workers: Number of processes; 0 starts one per usable core.
        timeout_s: Longest CPU time for one image, in seconds. Its wall-clock time may be ten times
            as long. A refusal has the code ``timeout``.
        memory_bytes: Largest address space of a worker; a refusal has the code ``memory``, or
            ``crashed`` if the decoder crashes.
    """
    with ImagePool(workers, timeout_s=timeout_s, memory_bytes=memory_bytes) as pool:
        asked: deque[Future[ImageFacts | RefusedImage]] = deque()
        for path in paths:
            asked.append(pool.submit(path, str(path)))
            if len(asked) >= pool.ahead:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()


class ImagePool:
    """Context manager of worker processes, each of which decodes one image at a time.

    Arguments and codes are those of :func:`inspect_images`.

    Attributes:
        ahead: Number of images to submit in advance so that no worker waits.
    """

    def __init__(self, workers: int, *, timeout_s: float = 10, memory_bytes: int = 2 << 30) -> None:
        self._crew = [
            _Worker(timeout_s, memory_bytes)
            for _ in range(workers if workers > 0 else usable_cores())
        ]
        self.ahead = _AHEAD * len(self._crew)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._crew:
            self._idle.put(worker)
        # one thread per worker, which waits for it; the work is in the processes
        self._threads = ThreadPoolExecutor(len(self._crew))

    def __enter__(self) -> ImagePool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._crew:
            worker.close()
        self._threads.shutdown()

    def submit(self, image: Path | bytes, where: str) -> Future[ImageFacts | RefusedImage]:
        """Inspect an image file or its bytes; ``where`` names it in a refusal."""
        return self._threads.submit(self._inspect, image, where, {})

    def shrink(
        self, image: Path, where: str, target: Path, max_pixels: int
    ) -> Future[ImageFacts | RefusedImage]:
        """Write an image of more than ``MAX_PIXELS`` pixels as a smaller JPEG, and inspect that.

        Args:
            image: The image file.
            where: Name of the image in a refusal.
            target: The JPEG file, in an existing folder.
            max_pixels: Largest number of pixels of an image that is decoded.
        Raises:
            RefusedError: The JPEG cannot be written; the future raises it.
        """
        more = {"shrink_to": str(target), "max_pixels": max_pixels}
        return self._threads.submit(self._inspect, image, where, more)

    def _inspect(
        self, image: Path | bytes, where: str, more: dict[str, Any]
    ) -> ImageFacts | RefusedImage:
        worker = self._idle.get()
        try:
            return worker.inspect(where, image, more)
        finally:
            self._idle.put(worker)


def decoded_rows(
    rows: Iterable[Record | list[Problem]], pool: ImagePool
) -> Iterator[DecodedRow | list[Problem]]:
    """Decode every distinct image once; rows that could not be read are passed on."""
    known: dict[str, Inspected] = {}
    asked: dict[str, Future[Inspected]] = {}
    waiting: deque[list[Problem] | tuple[Record, list[str], list[str]]] = deque()

    def ask(raw: bytes) -> str:
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in known and digest not in asked:
            asked[digest] = pool.submit(raw, "image")
        return digest

    def answer(digest: str) -> Inspected:
        if digest not in known:
            known[digest] = asked.pop(digest).result()
        return known[digest]

    def next_row() -> DecodedRow | list[Problem]:
        row = waiting.popleft()
        if isinstance(row, list):
            return row
        record, images, rejected = row
        return DecodedRow(record, tuple(map(answer, images)), tuple(map(answer, rejected)))

    for row in rows:
        if isinstance(row, Record):
            waiting.append(
                (row, [ask(raw) for raw in row.images], [ask(raw) for raw in row.rejected_images])
            )
        else:
            waiting.append(row)
        if len(waiting) >= pool.ahead:
            yield next_row()
    while waiting:
        yield next_row()


class _Worker:
    """One process, started when it is first needed and again after it has died."""

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._wall_s = WALL_FACTOR * float(timeout_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def inspect(
        self, where: str, image: Path | bytes, more: dict[str, Any]
    ) -> ImageFacts | RefusedImage:
        if self._is_closed:
            return RefusedImage(where, "image was not looked at. Start again.", "crashed")
        is_new = self._process is None
        self._process = process = self._process or self._start()
        extra_s = START_SECONDS if is_new else 0.0
        line = self._ask(process, {"where": where, **more}, image, extra_s)
        if self._is_closed:  # by another thread in the meantime; nobody waits for the answer
            _end(process)
        if line:
            answer = json.loads(line)
            if "errno" in answer:  # a failure of the disk, not of the image
                with explain_write_errors(Path(more["shrink_to"])):
                    raise OSError(answer["errno"], os.strerror(answer["errno"]))
            if "code" in answer:
                return RefusedImage(where, answer["reason"], answer["code"])
            return ImageFacts(**answer)
        self._process = None
        return self._refusal_of_death(process, where)

    def close(self) -> None:
        """End the process at once."""
        self._is_closed = True
        if self._process is not None:
            _end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: files in the current folder are not importable
        return subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "realign.data.image_worker"),
                *(str(float(self._timeout_s)), str(self._wall_s), str(self._memory_bytes)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
            | _ENVIRONMENT,
        )

    def _ask(
        self,
        process: subprocess.Popen[bytes],
        request: dict[str, Any],
        image: Path | bytes,
        extra_s: float,
    ) -> bytes:
        """Return the line of the answer; empty if the process died or does not answer in time."""
        assert process.stdin is not None
        assert process.stdout is not None
        raw = b"" if isinstance(image, Path) else image
        named = {"path": str(image)} if isinstance(image, Path) else {"bytes": len(image)}
        try:
            process.stdin.write(json.dumps(request | named).encode() + b"\n" + raw)
            process.stdin.flush()
        except OSError:  # the worker died before it read the request
            return b""
        # answers are short and come one at a time, so no part of this one is buffered yet
        limit_s = self._wall_s + GRACE_SECONDS + extra_s
        ready = select.poll()  # select() takes only the first 1024 descriptors
        ready.register(process.stdout, select.POLLIN | select.POLLHUP)
        return process.stdout.readline() if ready.poll(limit_s * 1000) else b""

    def _refusal_of_death(self, process: subprocess.Popen[bytes], where: str) -> RefusedImage:
        try:
            status = process.wait(timeout=GRACE_SECONDS)  # the pipe closes a moment earlier
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        _end(process)
        limits = {
            -signal.SIGPROF: f"decode in {self._timeout_s:g} seconds of CPU time",
            -signal.SIGALRM: f"be read and decoded in {self._wall_s:g} seconds",
        }
        if status in limits:
            reason = f"image must {limits[status]}, and takes longer. Replace it or remove the row."
            return RefusedImage(where, reason, "timeout")
        how = f"ended the process that decoded it (status {status})"
        reason = f"image {how}. Replace it or remove the row."
        return RefusedImage(where, reason, "crashed")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_SECONDS)
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # closing tries to send what is still buffered
            if pipe:
                pipe.close()
