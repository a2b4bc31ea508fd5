"""`realign eval judge` against a server on this machine with scripted replies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.judge import JudgeModel, judge
from realign.generation.endpoint import Endpoint
from tests.realign.generation.conftest import KEY

Say = Callable[[str, dict[str, Any]], str | int]


class Server:
    """A judge that says what :attr:`say` returns about a prompt, or fails with that status."""

    def __init__(self) -> None:
        self.say: Say = lambda prompt, body: "correct"
        self.bodies: list[dict[str, Any]] = []
        self.delay_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if not raw:  # the client was killed
                    return
                body = json.loads(raw)
                server.bodies.append(body)
                time.sleep(server.delay_s)
                answer = server.say(prompt_of(body), body)
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": answer}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply = {"choices": [choice]} if status == 200 else {"error": {"message": "no"}}
                raw = json.dumps(reply).encode()
                with suppress(ConnectionError):  # the client may be killed
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *arguments: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def model(self, **options: Any) -> JudgeModel:
        return JudgeModel(Endpoint(self.url, timeout_s=10.0, backoff_s=0.01), "judge-1", **options)


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"][-1]["text"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A judge that finds everything correct where a test does not set its replies."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    own = Server()
    yield own
    own.close()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_mm_vet(folder: Path, number: int) -> tuple[Path, Path]:
    """Write questions and answers; return the folder of data and the file of answers."""
    questions = {
        f"v1_{i}": {
            "imagename": "a.png",
            "question": f"What is {i}?",
            "answer": "one<AND>two",
            "capability": ["ocr"],
        }
        for i in range(number)
    }
    (folder / "data").mkdir()
    (folder / "data" / "mm-vet.json").write_text(json.dumps(questions))
    answers = [{"id": f"v1_{i}", "answer": f" answer {i} "} for i in range(number)]
    return folder / "data", write_lines(folder / "answers.jsonl", answers)


def data_of(name: str, folder: Path) -> tuple[Path, Path]:
    """Write one question of a benchmark and its answer."""
    if name == "mm-vet":
        return write_mm_vet(folder, 1)
    data = folder / "data"
    if name == "hallusionbench":
        keys = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
        row = dict(zip(keys, ("VD", "math", "0", "0", "0", "1"), strict=True))
        row |= {"question": "Is it?", "gt_answer": "1", "filename": "a.png"}
        row |= {"gt_answer_details": "It is, {really}."}
        write_lines(data / "HallusionBench.json", [row])
        answer_id = "VD_math_0_0_0"
    elif name == "mmhal":
        row = {"image_id": "i", "question": "Is it?", "question_type": "other"}
        row |= {"gt_answer": "It is, {really}.", "image_content": ["Cat", "Dog"]}
        write_lines(data / "response_template.json", [row])
        answer_id = "i"
    elif name == "llava-bench":
        question = {"question_id": 7, "image": "1.jpg", "text": "Is it?", "category": "conv"}
        write_lines(data / "questions.jsonl", [question])
        write_lines(data / "context.jsonl", [{"image": "1.jpg", "caption": ["One.", "Two."]}])
        reference = {"question_id": 7, "text": "It is, {really}."}
        write_lines(data / "answers_gpt4.jsonl", [reference])
        answer_id = "7"
    else:
        data.mkdir()
        (data / "MMBench_DEV_EN.tsv").write_text(
            "index\tquestion\tA\tB\tanswer\n1\tIs it?\tIt is, {really}.\tnot\tA\n"
        )
        answer_id = "1"
    answers = write_lines(folder / "answers.jsonl", [{"id": answer_id, "answer": "Perhaps {it}."}])
    return data, answers


@pytest.mark.parametrize(
    ("name", "reply", "rule", "metric", "value", "body"),
    [
        ("hallusionbench", "Correct", "official", "aacc", 100.0, {"temperature": 1.0}),
        ("mmhal", "Good.\nRating: 4", "official", "mean_score", 4.0, {"temperature": 0.0}),
        (
            "mm-vet",
            "0.7",
            "official",
            "score",
            70.0,
            {"temperature": 0.0, "max_completion_tokens": 3},
        ),
        (
            "llava-bench",
            "8 9\nWell.",
            "official",
            "relative_score",
            112.5,
            {"temperature": 0.2, "max_completion_tokens": 1024},
        ),
        ("mmbench", "A", "judged", "accuracy", 100.0, {"temperature": 0.0}),
    ],
)
def test_every_benchmark_is_judged(
    server: Server,
    tmp_path: Path,
    name: str,
    reply: str,
    rule: str,
    metric: str,
    value: float,
    body: dict[str, Any],
) -> None:
    data, answers = data_of(name, tmp_path)
    server.say = lambda prompt, body: reply
    out = tmp_path / "judged.jsonl"
    done = judge(name, [answers], data, out, server.model())
    assert done == (1, 1, 0, 1, 0)
    (asked,) = server.bodies
    assert {key: asked[key] for key in body} == body
    assert asked.keys() - body.keys() == {"model", "messages", "seed"}
    shown = prompt_of(asked)
    reference, answer = "It is, {really}.", "Perhaps {it}."
    if name == "mm-vet":
        reference, answer = "one <AND> two", "answer 0"
    assert reference in shown
    assert answer in shown
    assert len(asked["messages"]) == (2 if name == "llava-bench" else 1)
    (record,) = read_lines(out)
    (given,) = read_lines(answers)
    assert {**given, "judge_reply": reply} == {k: v for k, v in record.items() if k != "judge"}
    scores = score(name, out, data, rule)
    assert scores["splits"]["all"][metric] == value
    (found,) = scores["judging"]["judges"]
    assert (found["model"], found["prompt"]) == ("judge-1", f"realign {name} 1")
    assert len(found["prompt_sha256"]) == 64
    stored = out.read_text() + (tmp_path / "judged.jsonl.journal.jsonl").read_text()
    assert KEY not in stored


def test_a_reply_without_a_verdict_is_requested_again_and_then_stored(
    server: Server, tmp_path: Path
) -> None:
    data, answers = write_mm_vet(tmp_path, 3)

    def say(prompt: str, body: dict[str, Any]) -> str:
        if "What is 0?" in prompt:
            return "high"
        return "0.5" if "What is 1?" in prompt or body["temperature"] == 1.0 else "1.5"

    server.say = say
    out = tmp_path / "judged.jsonl"
    done = judge("mm-vet", [answers], data, out, server.model())
    assert (done.without_verdict, done.asked) == (1, 5 + 1 + 3)
    tries = [body for body in server.bodies if "What is 0?" in prompt_of(body)]
    assert [body["temperature"] for body in tries] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [prompt_of(body).endswith("| ") for body in tries] == [True, *[False] * 4]
    assert [record["judge_reply"] for record in read_lines(out)] == ["high", "0.5", "0.5"]
    scores = score("mm-vet", out, data)
    assert scores["splits"]["all"]["score"] == pytest.approx(100 / 3)
    assert scores["judging"]["unparsed"]["ids"] == ["v1_0"]
    strict = score("mm-vet", out, data, "strict")
    assert strict["bounds"]["all"]["score"] == pytest.approx([100 / 3, 200 / 3])
    asked = len(server.bodies)
    assert judge("mm-vet", [answers], data, out, server.model()).asked == 0
    assert len(server.bodies) == asked


def test_gradings_are_requested_one_by_one(server: Server, tmp_path: Path) -> None:
    data, answers = write_mm_vet(tmp_path, 2)
    seeds: list[int] = []

    def say(prompt: str, body: dict[str, Any]) -> str:
        seeds.append(body["seed"])
        return f"0.{body['seed'] // 5}"

    server.say = say
    out = tmp_path / "judged.jsonl"
    judge("mm-vet", [answers], data, out, server.model(), repeat=3)
    assert sorted(seeds) == [0, 0, 5, 5, 10, 10]
    assert read_lines(out)[0]["judge_reply"] == ["0.0", "0.1", "0.2"]
    scores = score("mm-vet", out, data)
    runs = [run["splits"]["all"]["score"] for run in scores["judging"]["gradings"]]
    assert runs == pytest.approx([0.0, 10.0, 20.0])
    assert scores["judging"]["spread"]["all"]["score"]["sd"] == pytest.approx(10.0)


def test_transient_failures_are_retried_and_refused_requests_are_reported(
    server: Server, tmp_path: Path
) -> None:
    data, answers = write_mm_vet(tmp_path, 3)
    failures = iter([500, 503, 500])

    def say(prompt: str, body: dict[str, Any]) -> str | int:
        return 400 if "What is 2?" in prompt else next(failures, 0) or "1.0"

    server.say = say
    out = tmp_path / "judged.jsonl"
    done = judge("mm-vet", [answers], data, out, server.model())
    assert (done.asked, done.without_verdict) == (3, 1)
    refused = read_lines(out)[2]
    assert refused["judge_reply"] is None
    assert refused["judge"]["problems"] == ["refused by the server: no"]
    scores = score("mm-vet", out, data)
    assert scores["unjudged"]["ids"] == ["v1_2"]
    assert scores["bounds"]["all"]["score"] == pytest.approx([200 / 3, 100.0])


def test_a_failing_server_stops_the_command_which_can_be_resumed(
    server: Server, tmp_path: Path
) -> None:
    data, answers = write_mm_vet(tmp_path, 2)
    server.say = lambda prompt, body: 500 if "What is 1?" in prompt else "1.0"
    out = tmp_path / "judged.jsonl"
    endpoint = Endpoint(server.url, concurrency=1, max_retries=1, backoff_s=0.01)
    with pytest.raises(
        RefusedError, match="failed 2 times for one request, the last time with 500"
    ):
        judge("mm-vet", [answers], data, out, JudgeModel(endpoint, "judge-1"))
    assert not out.exists()  # and no verdict of another answer in the place of this one
    server.say = lambda prompt, body: "0.0"
    done = judge("mm-vet", [answers], data, out, JudgeModel(endpoint, "judge-1"))
    assert (done.asked, done.from_journal) == (1, 1)
    assert [record["judge_reply"] for record in read_lines(out)] == ["1.0", "0.0"]


def test_a_killed_command_repeats_no_request(server: Server, tmp_path: Path) -> None:
    data, answers = write_mm_vet(tmp_path, 40)
    server.say = lambda prompt, body: "0.5"
    server.delay_s = 0.02
    out, concurrency = tmp_path / "judged.jsonl", 4
    command = [
        *(sys.executable, "-m", "realign", "eval", "judge", "--benchmark", "mm-vet"),
        *("--data", str(data), "--answers", str(answers), "--endpoint", server.url),
        *("--judge", "judge-1", "--out", str(out), "--concurrency", str(concurrency)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(server.bodies) < 15:
            time.sleep(0.001)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "40 answers, 40 of them read by judge-1 in 1 grading" in run.stdout
    assert 40 <= len(server.bodies) <= 40 + concurrency
    assert score("mm-vet", out, data)["splits"]["all"]["score"] == pytest.approx(50.0)


def test_the_mmbench_judge_gets_only_answers_without_a_choice(
    server: Server, tmp_path: Path
) -> None:
    data, answers = data_of("mmbench", tmp_path)
    write_lines(answers, [{"id": 1, "answer": "A"}])
    out = tmp_path / "new" / "judged.jsonl"
    assert judge("mmbench", [answers], data, out, server.model()) == (1, 0, 0, 0, 0)
    assert server.bodies == []
    assert read_lines(out) == [{"id": "1", "answer": "A"}]
    before = out.read_bytes()
    assert judge("mmbench", [answers], data, out, server.model()) == (1, 0, 0, 0, 0)
    assert out.read_bytes() == before


def test_a_finished_command_can_be_repeated_after_an_unjudged_first_answer(
    server: Server, tmp_path: Path
) -> None:
    data, answers = data_of("mmbench", tmp_path)
    table = data / "MMBench_DEV_EN.tsv"
    table.write_text(f"{table.read_text()}2\tWas it?\tIt was.\tnot\tA\n")
    write_lines(answers, [{"id": 1, "answer": "A"}, {"id": 2, "answer": "Perhaps."}])
    server.say = lambda prompt, body: "A"
    out = tmp_path / "judged.jsonl"
    assert judge("mmbench", [answers], data, out, server.model()) == (2, 1, 0, 1, 0)
    before = out.read_bytes()
    assert judge("mmbench", [answers], data, out, server.model()) == (2, 1, 0, 0, 1)
    assert out.read_bytes() == before
    with pytest.raises(RefusedError, match="one that judge-2 judged"):
        judge("mmbench", [answers], data, out, JudgeModel(server.model().endpoint, "judge-2"))


def test_the_grading_rule_of_the_data_is_part_of_the_prompt(server: Server, tmp_path: Path) -> None:
    data, answers = data_of("llava-bench", tmp_path)
    server.say = lambda prompt, body: "8 9"
    judge("llava-bench", [answers], data, tmp_path / "a.jsonl", server.model())
    rules = {
        f"llava_bench_{name}": {"role": "Assistant", "prompt": f"Score {name} {{so}}."}
        for name in ("conv", "detail", "complex")
    }
    (data / "rule.json").write_text(json.dumps(rules))
    judge("llava-bench", [answers], data, tmp_path / "b.jsonl", server.model())
    ours, theirs = (read_lines(tmp_path / f"{name}.jsonl")[0]["judge"] for name in "ab")
    assert theirs["prompt"] == "realign llava-bench 1 with the data's rule"
    assert theirs["prompt_sha256"] != ours["prompt_sha256"]
    assert prompt_of(server.bodies[1]).endswith("[System]\nScore conv {so}.")


def test_a_prompt_template_of_the_user_is_filled_in(server: Server, tmp_path: Path) -> None:
    data, answers = write_mm_vet(tmp_path, 1)
    server.say = lambda prompt, body: "1.0"
    path = tmp_path / "published.txt"
    path.write_text("Be fair.\n--- user ---\n{{0}} {question} / {reference} / {answer} = \n")
    out = tmp_path / "judged.jsonl"
    judge("mm-vet", [answers], data, out, server.model(), prompt=path)
    system, user = server.bodies[0]["messages"]
    assert system == {"role": "system", "content": "Be fair."}
    assert user["content"][0]["text"] == "{0} What is 0? / one <AND> two / answer 0 = "
    assert read_lines(out)[0]["judge"]["prompt"] == "file published.txt"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {answer}", r"must have the placeholders .*\{reference\} is missing"),
        ("{question} {reference} {answer} {image}", r"no placeholders but .*, got \{image\}\."),
        ("{question} {reference} {answer} {}", r"no placeholders but .*, got \{\}\."),
        ("{question.upper} {reference} {answer}", r"got \{question.upper\}"),
        ("{question[0]} {reference} {answer}", r"got \{question\[0\]\}"),
        ("{question:>9} {reference} {answer}", r"got \{question\} with a format"),
        ("{question!r} {reference} {answer}", r"got \{question\} with a format"),
        ("{question} {reference} {answer} {", "must have braces around placeholders alone"),
        ("", "is missing"),
    ],
)
def test_a_template_with_other_placeholders_is_refused_before_any_request(
    server: Server, tmp_path: Path, template: str, message: str
) -> None:
    data, answers = write_mm_vet(tmp_path, 1)
    path = tmp_path / "prompt.txt"
    path.write_text(template)
    with pytest.raises(RefusedError, match=message):
        judge("mm-vet", [answers], data, tmp_path / "o.jsonl", server.model(), prompt=path)
    assert server.bodies == []


def test_missing_context_is_refused_before_any_request(server: Server, tmp_path: Path) -> None:
    data, answers = data_of("llava-bench", tmp_path)
    (data / "context.jsonl").unlink()
    with pytest.raises(RefusedError, match=r"questions\.jsonl, line 1 requires context"):
        judge("llava-bench", [answers], data, tmp_path / "o.jsonl", server.model())
    with pytest.raises(RefusedError, match=r"one that a judge scores \(hallusionbench, mmbench"):
        judge("pope", [answers], data, tmp_path / "o.jsonl", server.model())
    assert server.bodies == []


def test_an_output_path_in_use_is_refused(server: Server, tmp_path: Path) -> None:
    data, answers = write_mm_vet(tmp_path, 1)
    server.say = lambda prompt, body: "1.0"
    other = write_lines(tmp_path / "other.jsonl", [{"id": "v1_0", "answer": "x"}])
    for out in (answers, other, data):
        with pytest.raises(RefusedError, match="out must be a new file"):
            judge("mm-vet", [answers], data, out, server.model())
    out = tmp_path / "out.jsonl"
    judge("mm-vet", [answers], data, out, server.model())
    with pytest.raises(RefusedError, match="one that judge-2 judged"):
        judge("mm-vet", [answers], data, out, JudgeModel(server.model().endpoint, "judge-2"))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--temperature", "hot"], "temperature must be a number from 0 to 2 or none"),
        (["--temperature", "nan"], "temperature must be a number from 0 to 2 or none"),
        (["--length-field", "length"], "length-field must be max_completion_tokens or"),
        (["--endpoint", "ftp://x"], "endpoint must be an http or https URL"),
        (["--prompt", "none.txt"], "prompt must be a file, got none.txt"),
    ],
)
def test_options_of_the_command_that_do_not_fit_are_refused(
    server: Server, tmp_path: Path, given: list[str], message: str
) -> None:
    data, answers = write_mm_vet(tmp_path, 1)
    command = [
        *("eval", "judge", "--benchmark", "mm-vet", "--data", str(data), "--answers", str(answers)),
        *("--endpoint", server.url, "--judge", "m", "--out", str(tmp_path / "o.jsonl"), *given),
    ]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())
    assert server.bodies == []
    plain = [*command[: -len(given)], "--temperature", "none", "--max-tokens", "9"]
    server.say = lambda prompt, body: "1.0"
    assert CliRunner().invoke(app, plain).exit_code == 0
    assert "temperature" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 9
