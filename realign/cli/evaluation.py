"""The command ``realign eval`` and those of its group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realign.cli.app import app
from realign.cli.checks import check_exists, check_out
from realign.cli.sections import SectionGroup, is_for_command, read_options
from realign.errors import RefusedError

if TYPE_CHECKING:
    from realign.config import EvalConfig


eval_app = typer.Typer()
app.add_typer(eval_app, name="eval")


@eval_app.callback(cls=SectionGroup, invoke_without_command=True)
def evaluate(
    ctx: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Instead of asking, write the command of another suite, as `realign eval suite` "
            "does."
        ),
    ] = None,
) -> None:
    """Ask models the same questions, score and compare them.

    Without one of the commands below, it asks the models. Answers are stored, so that no question
    is asked twice. Differences from the first model are paired and have bootstrap intervals. Give
    the options of a command below after its name.
    """
    ctx.obj["suite"] = suite
    if is_for_command(ctx, "to ask models"):
        return
    from realign.data.image_names import check_image_root

    del ctx.obj["suite"]
    options: EvalConfig = read_options(ctx)
    check_out(options.out, *options.models.values())
    if suite is not None:
        _check_suite_flags(ctx.obj)
        _write_suite(suite, options.models, options.data, options.images, options.out)
        return
    check_exists("data", options.data, "a folder of questions")
    if options.images:
        check_image_root(options.images)
    from rich import print as rich_print

    from realign.evaluation.run import evaluate as run
    from realign.evaluation.table import scores_table

    scores = run(options)
    if os.environ.get("RANK", "0") == "0":  # once, however many processes ask
        rich_print(scores_table(scores))


@eval_app.command("score")
def eval_score(
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark, such as pope.")],
    data: Annotated[Path, typer.Option(help="Folder with the benchmark's published files.")],
    answers: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>",
            help="File of answers, in a format of the benchmark; repeatable, also for gradings.",
        ),
    ],
    rule: Annotated[str, typer.Option(help="Rule that scores the answers.")] = "official",
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Score the other answers if some are missing.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(metavar="<int>", min=0, help="Draws behind 95 % intervals; 0 for none.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score answers that any program has written, without a model.

    docs/guides/evaluation.md lists the benchmarks, their files, rules and formats of answers. Rules
    that need a judge read its replies from the files; `realign eval judge` writes such a file.
    """
    check_exists("data", data, "a folder with the benchmark's files")
    from realign.evaluation.answer_scores import score

    scores = score(benchmark, answers, data, rule, allow_subset=allow_subset, bootstrap=bootstrap)
    if as_json:
        from realign.runtime.files import json_text

        typer.echo(json_text(scores, indent=1, ensure_ascii=True))
        return
    from rich import print as rich_print

    from realign.evaluation.answer_table import answer_table

    rich_print(answer_table(scores))


@eval_app.command("compare")
def eval_compare(
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark, such as pope.")],
    data: Annotated[Path, typer.Option(help="Folder with the benchmark's published files.")],
    answers: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help="Model and its file of answers; repeatable. The first is the baseline. Repeat a "
            "name for another training run of that model; NAME@RUN=FILE names the run.",
        ),
    ],
    rule: Annotated[str, typer.Option(help="Rule that scores the answers.")] = "official",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="Metric to compare; repeatable. By default those of published tables.",
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="Split to compare in; repeatable. By default all."),
    ] = None,
    allow_subset: Annotated[
        bool,
        typer.Option(
            "--allow-subset",
            help="If answers are missing, compare on the questions that all models answered.",
        ),
    ] = False,
    bootstrap: Annotated[
        int,
        typer.Option(
            metavar="<int>", min=1, help="Draws of the bootstrap and of the permutation test."
        ),
    ] = 10_000,
    seed: Annotated[int, typer.Option(metavar="<int>", min=0, help="Seed of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare models by stored answers, with intervals and tests.

    No model is loaded. docs/guides/evaluation.md explains the numbers.
    """
    check_exists("data", data, "a folder with the benchmark's files")
    from realign.evaluation.answer_comparison import compare, named_files

    scores = compare(
        benchmark,
        named_files(answers),
        data,
        rule,
        metrics=metric or (),
        splits=split or (),
        allow_subset=allow_subset,
        bootstrap=bootstrap,
        seed=seed,
    )
    if as_json:
        from realign.runtime.files import json_text

        typer.echo(json_text(scores, indent=1, ensure_ascii=True))
        return
    from rich import print as rich_print

    from realign.evaluation.comparison_table import comparison_table

    rich_print(comparison_table(scores))


@eval_app.command("write")
def eval_write(
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark, such as pope.")],
    data: Annotated[Path, typer.Option(help="Folder with the benchmark's published files.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="Format to write, such as official, llava or llava-questions."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New file, or folder if the format has several files.")],
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>", help="File of answers, in any format that is read; repeatable."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Name of the model in LLaVA's files; by default the file's name.")
    ] = "",
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Write the other answers if some are missing.")
    ] = False,
) -> None:
    """Write answers in the formats that published programs read.

    It also writes LLaVA's files of questions. docs/guides/evaluation.md lists the formats.
    """
    check_exists("data", data, "a folder with the benchmark's files")
    from realign.evaluation.answer_writing import write

    report = write(
        benchmark, data, form, out, answers or (), model=model, allow_subset=allow_subset
    )
    for note in report.notes:
        typer.echo(note)
    typer.echo(f"{report.number:,} {'answers' if answers else 'questions'} -> {report.out}")


@eval_app.command("judge")
def eval_judge(
    benchmark: Annotated[
        str,
        typer.Option(help="hallusionbench, mmhal, mm-vet, llava-bench or mmbench."),
    ],
    data: Annotated[Path, typer.Option(help="Folder with the benchmark's published files.")],
    answers: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>", help="File of answers, in a format of the benchmark; repeatable."
        ),
    ],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="Server, such as http://127.0.0.1:8000/v1.")
    ],
    judge: Annotated[str, typer.Option(metavar="MODEL", help="The judge's name on the server.")],
    out: Annotated[
        Path, typer.Option(help="File of answers and replies, which `realign eval score` reads.")
    ],
    prompt: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Template of the prompt, such as the published one; by default this project's.",
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            metavar="<int>",
            min=1,
            help="Number of gradings of every answer; 3 show how much they vary.",
        ),
    ] = 1,
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Judge the other answers if some are missing.")
    ] = False,
    temperature: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|none",
            help="Sampling temperature; by default that of the benchmark's judge. With none, no "
            "temperature is sent, for models that accept only their own.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="<int>",
            min=1,
            help="Longest reply in tokens; by default that of the benchmark's judge.",
        ),
    ] = None,
    length_field: Annotated[
        str,
        typer.Option(
            help="Name of the length limit in a request: max_completion_tokens, or max_tokens for "
            "servers from before 2025."
        ),
    ] = "max_completion_tokens",
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[
        int, typer.Option(metavar="<int>", min=1, help="Concurrent requests.")
    ] = 8,
    timeout_s: Annotated[
        float,
        typer.Option(
            metavar="<float>", min=0.1, help="Seconds after which a request counts as failed."
        ),
    ] = 120.0,
    max_retries: Annotated[
        int,
        typer.Option(
            metavar="<int>", min=0, help="Retries after status 429 or 5xx, or a broken connection."
        ),
    ] = 6,
) -> None:
    """Have a model on a server judge answers.

    The judge reads the question, the reference and the answer, but no image. Its replies are stored
    beside the answers, and `realign eval score` takes the scores from them. Every reply is kept in
    OUT.journal.jsonl as it arrives: a stopped command continues when it is given again, and asks
    nothing twice. Answers to which the judge gave no reply stay unjudged.
    """
    check_exists("data", data, "a folder with the benchmark's files")
    check_exists("prompt", prompt, "a file")
    if length_field not in ("max_completion_tokens", "max_tokens"):
        raise RefusedError(
            f"length-field must be max_completion_tokens or max_tokens, got {length_field!r}. Name "
            "one of them."
        )
    from realign.evaluation.judge import JudgeModel
    from realign.evaluation.judge import judge as run
    from realign.generation.endpoint import Endpoint

    server = Endpoint(endpoint, api_key_env, concurrency, timeout_s, max_retries)
    model = JudgeModel(
        server,
        judge,
        None if temperature in (None, "none") else _temperature(str(temperature)),
        temperature != "none",
        max_tokens,
        length_field,
    )
    done = run(
        benchmark,
        answers,
        data,
        out,
        model,
        prompt=prompt,
        repeat=repeat,
        allow_subset=allow_subset,
    )
    typer.echo(
        f"{done.answers:,} answers, {done.read:,} of them read by {judge} in {repeat} "
        f"{'grading' if repeat == 1 else 'gradings'} ({done.asked:,} requests asked, "
        f"{done.from_journal:,} from the journal); {done.without_verdict:,} without a verdict -> "
        f"{out}"
    )


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise RefusedError(
            f"temperature must be a number from 0 to 2 or none, got {text!r}. Leave it out to use "
            "that of the benchmark's judge."
        )
    return value


def _check_suite_flags(given: dict[str, Any]) -> None:
    """Refuse flags that affect only how models are asked, which the suite decides itself."""
    for name, value in given.items():
        known = name in ("models", "data", "images", "out", "config", "set_")
        if not known and value not in (None, (), []):
            raise RefusedError(
                f"--{name.replace('_', '-')} must not be given with --suite, whose tasks set it "
                f"themselves, got {value}. Leave it out."
            )


def _write_suite(suite: str, *paths: Any, **options: Any) -> None:
    from realign.evaluation.suites.suite import write_suite

    for line in write_suite(suite, *paths, **options):
        typer.echo(line)


@eval_app.command("suite")
def eval_suite(
    suite: Annotated[str, typer.Argument(help="lmms-eval or vlmevalkit.")],
    model: Annotated[
        list[str], typer.Option(metavar="NAME=FOLDER", help="Model or adapter; repeatable.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with the published files of benchmarks.")],
    out: Annotated[Path, typer.Option(help="New folder for the command and its files.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the questions' images; for lmms-eval.")
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Python interpreter of the environment that has the suite."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    backend: Annotated[
        str | None,
        typer.Option(help="Model class of the suite; by default the one for the model's type."),
    ] = None,
) -> None:
    """Write the command with which another suite evaluates models.

    The files that it needs are written too. No model is asked yet: the printed command does that,
    in the suite's own environment. Adapters are merged into their bases. `realign eval read-suite`
    reads what the suite writes.
    """
    from realign.config_file import read_pairs

    check_out(out)
    check_exists("data", data, "a folder with the benchmarks' files")
    models = read_pairs(model, "--model", "NAME=FOLDER")
    _write_suite(suite, models, data, images, out, python=python, device=device, backend=backend)


@eval_app.command("read-suite")
def eval_read_suite(
    folder: Annotated[Path, typer.Argument(help="Folder with the results of a suite.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the benchmarks' published files; by default the one that the command "
            "was written for."
        ),
    ] = None,
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Accept runs that asked only some questions.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(metavar="<int>", min=0, help="Draws behind 95 % intervals; 0 for none.")
    ] = 0,
) -> None:
    """Read and score the results of lmms-eval or VLMEvalKit.

    The suite's own numbers stay as they are. Its answers are scored under every rule that requires
    neither a judge nor further packages, and are stored in the folder, as
    answers/MODEL-BENCHMARK.jsonl for `realign eval score`. All scores are in suite_scores.json.
    """
    check_exists("folder", folder, "a folder with results", "Check the path")
    check_exists("data", data, "a folder with the benchmarks' files")
    from rich import print as rich_print

    from realign.evaluation.suites.suite import read_suite
    from realign.evaluation.suites.suite_table import suite_tables

    scores = read_suite(folder, data, allow_subset=allow_subset, bootstrap=bootstrap)
    rich_print(suite_tables(scores))
