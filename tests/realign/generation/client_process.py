"""A process that asks a server:
``client_process.py URL IMAGE JOURNAL NUM_REQUESTS CONCURRENCY TIMEOUT_S``.

Prints the counters, the answers and by how many bytes its peak memory grew. With ``pool`` for a
last argument it does so in a worker of a process pool.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from realign.errors import RefusedError
from realign.generation.endpoint import Endpoint
from realign.generation.endpoint_generator import EndpointGenerator, Sampling
from realign.generation.generator import Request


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(
    url: str, image: str, journal: str, num_requests: str, concurrency: str, timeout_s: str
) -> str:
    endpoint = Endpoint(
        url, concurrency=int(concurrency), timeout_s=float(timeout_s), backoff_s=0.01
    )
    requests = [Request(f"prompt {n}", Path(image)) for n in range(int(num_requests))]
    with EndpointGenerator(endpoint, Sampling("m", 16), Path(journal)) as generator:
        before = peak_bytes()
        try:
            answers = [answer.text for answer in generator(requests)]
        except RefusedError as error:
            answers = [f"refused: {error}"]
        result = {"answers": answers, "grown": peak_bytes() - before}
        return json.dumps({**result, **asdict(generator.counts)})


if __name__ == "__main__":
    # a suite that runs in the background has it ignored, and its children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[7:] == ["pool"]:
        with ProcessPoolExecutor(1) as pool:
            print(pool.submit(work, *sys.argv[1:7]).result())  # noqa: T201
    else:
        print(work(*sys.argv[1:]))  # noqa: T201
