"""A client process under random faults and random ``kill -9``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.realign.generation.conftest import KEY

CLIENT = Path(__file__).with_name("client_process.py")
FAULTS = [
    *("status|429", "status|429|0.05", "status|500", "status|503", "reset", "close_silently"),
    *("truncated", "cut_json", "page", "no_choices", "given_up", "bomb"),
]
SLOW_FAULTS = ("hang", "trickle", "trickle_head", "huge", "huge|500")


def client(
    server: Any,
    image: Path,
    journal: Path,
    num_requests: int,
    concurrency: int,
    timeout_s: float = 30.0,
) -> list[str]:
    arguments = (server.url, image, journal, num_requests, concurrency, timeout_s)
    return [sys.executable, str(CLIENT), *map(str, arguments)]


@pytest.mark.full
def test_500_requests_with_random_faults_are_all_answered(
    server: Any, image: Path, tmp_path: Path
) -> None:
    def fault(prompt: str, attempt: int) -> str:
        rng = Random(f"{prompt}:{attempt}")
        if attempt == 4 or rng.random() > 0.4:
            return ""
        return rng.choice(SLOW_FAULTS if rng.random() < 0.05 else FAULTS)

    server.fault = fault
    result = subprocess.run(
        client(server, image, tmp_path / "journal.jsonl", 500, 16, timeout_s=1.0),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OPENAI_LOG": "debug"},
    )
    report = json.loads(result.stdout)
    assert report["answers"] == [f"answer to prompt {number}" for number in range(500)]
    assert report["asked"] == 500
    assert report["retries"] > 100
    # as often as its faults made it necessary; a timed-out answer was none
    assert sum(server.asked.values()) == 500 + report["retries"]
    journalled = (tmp_path / "journal.jsonl").read_text()
    keys = Counter(json.loads(line)["key"] for line in journalled.splitlines())
    assert len(keys) == keys.total() == 500
    assert "HTTP Request" in result.stderr  # the log was on
    assert not [text for text in (journalled, result.stdout, result.stderr) if KEY in text]


@pytest.mark.parametrize("fault", ["huge", pytest.param("huge|500", marks=pytest.mark.full)])
def test_endless_response_bodies_do_not_fill_memory(
    server: Any, image: Path, tmp_path: Path, fault: str
) -> None:
    server.fault = lambda prompt, attempt: fault if attempt < 4 else ""
    command = client(server, image, tmp_path / "journal.jsonl", 8, 8)
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert report["retries"] == 8 * 4
    # eight bodies of 128 MiB at a time would be a gigabyte
    assert report["grown"] < 100_000_000


def test_a_killed_run_is_resumed_without_lost_answers(
    server: Any, image: Path, tmp_path: Path
) -> None:
    journal, concurrency, num_requests = tmp_path / "journal.jsonl", 8, 300
    command = client(server, image, journal, num_requests, concurrency)
    server.delay_s = 0.02
    rng = Random(0)
    kills = 0
    while True:
        kept = prompts_of(journal)
        before = Counter(server.asked)
        limit = server.answered.total() + rng.randrange(5, 70)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            while process.poll() is None and server.answered.total() < limit:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            if process.poll() is None:
                process.kill()
            output = process.communicate()[0]
        assert not [prompt for prompt in (server.asked - before) if prompt in kept]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL  # or else it would fail for ever
        kills += 1
        lost = server.answered.keys() - prompts_of(journal).keys()
        assert len(lost) <= concurrency
    assert kills >= 4
    report = json.loads(output)
    assert report["answers"] == [f"answer to prompt {number}" for number in range(num_requests)]
    assert prompts_of(journal) == {f"prompt {number}": 1 for number in range(num_requests)}
    again = server.asked.total() - num_requests
    assert again <= kills * concurrency


def test_the_generator_works_in_a_process_pool(server: Any, image: Path, tmp_path: Path) -> None:
    command = [*client(server, image, tmp_path / "journal.jsonl", 20, 4), "pool"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert report["answers"] == [f"answer to prompt {number}" for number in range(20)]


def test_an_interrupt_ends_the_run_at_once_and_keeps_the_answers(
    server: Any, image: Path, tmp_path: Path
) -> None:
    server.delay_s = 0.01
    server.fault = lambda prompt, attempt: "hang" if prompt == "prompt 9" else ""
    journal = tmp_path / "journal.jsonl"
    command = client(server, image, journal, 20, 1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not server.asked["prompt 9"] and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1].decode()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    assert KEY not in error
    assert prompts_of(journal) == {f"prompt {number}": 1 for number in range(9)}


def prompts_of(journal: Path) -> Counter[str]:
    """Prompts of the whole lines of a journal."""
    raw = journal.read_bytes() if journal.exists() else b""
    lines = raw[: raw.rfind(b"\n") + 1].splitlines()
    return Counter(json.loads(line)["request"]["prompt"] for line in lines)
