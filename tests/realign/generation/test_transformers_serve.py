"""The generator against ``transformers serve`` with the embedded model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from realign.demo.drawing import draw
from realign.demo.world import DESCRIBE, free_scene, question
from realign.errors import RefusedError
from realign.generation.endpoint import Endpoint
from realign.generation.endpoint_generator import EndpointGenerator, Sampling
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator
from tests.ports import free_port

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def url(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the embedded model by `transformers serve` on a free port of this machine."""
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_dir)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_until_healthy(health: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(6000):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """Return requests about drawn scenes, some of them photos that are turned by a quarter."""
    folder, rng = tmp_path_factory.mktemp("images"), Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    result = []
    for number in range(12):
        path = folder / f"{number}"
        if number % 3:
            draw(free_scene(rng)).save(path, "PNG")
        else:
            draw(free_scene(rng)).save(path, "JPEG", exif=exif)
        result.append(Request(DESCRIBE if number % 2 else question("ball"), path))
    return result


def test_served_greedy_answers_equal_those_of_the_model_in_process(
    url: str, model_dir: Path, requests: list[Request], tmp_path: Path
) -> None:
    in_process = TransformersGenerator.load(model_dir, torch.float32, max_new_tokens=64)
    sampling = Sampling(str(model_dir), max_new_tokens=64)
    with EndpointGenerator(Endpoint(url), sampling, tmp_path / "journal.jsonl") as generator:
        answers = generator(requests)
        assert (generator.counts.asked, generator.counts.retries) == (12, 0)
        assert generator.counts.completion_tokens > 60
    assert answers == in_process(requests)
    assert len({answer.text for answer in answers}) > 5


def test_a_token_limit_cuts_served_and_in_process_answers_alike(
    url: str, model_dir: Path, requests: list[Request], tmp_path: Path
) -> None:
    in_process = TransformersGenerator.load(model_dir, torch.float32, max_new_tokens=5)
    knows_newer_name = Version(transformers.__version__) >= Version("5.23")
    name = "max_completion_tokens" if knows_newer_name else "max_tokens"
    sampling = Sampling(str(model_dir), max_new_tokens=5, length_field=name)
    with EndpointGenerator(Endpoint(url), sampling, tmp_path / "journal.jsonl") as generator:
        answers = generator(requests[1:2])
    assert answers == in_process(requests[1:2])
    assert answers[0].is_cut


def test_a_model_that_is_not_served_ends_the_run(
    url: str, requests: list[Request], tmp_path: Path
) -> None:
    """The server answers with status 400, as if each request were at fault."""
    prompts = [Request(f"{number}", requests[0].image) for number in range(20)]
    with (
        EndpointGenerator(Endpoint(url), Sampling("other", 5), tmp_path / "journal.jsonl") as ask,
        pytest.raises(RefusedError, match=r"refused 16 requests in a row.*Server is pinned to"),
    ):
        ask(prompts)
