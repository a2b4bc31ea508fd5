"""The ``realign`` command.

A command imports its libraries when it runs, after its options have been checked.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from typer.core import TyperCommand, TyperGroup
except ImportError:
    sys.exit(
        "The realign command needs its pipeline packages. Install them: pip install "
        "'realign[pipeline]'. For the loss alone they are not needed: python -m realign_kernels "
        "shows what it has here."
    )

from realign.errors import RefusedError

if TYPE_CHECKING:
    from realign.config import BuildConfig, CacheConfig, CheckConfig, EvalConfig, TrainConfig

OPTIONS = "Options"  # heading of those that have none
_Mixin: Any = object

# for this process and its workers, before they import any of these libraries
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of transformers too
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Commands(TyperGroup):
    """All commands, in the order of their use.

    A refusal exits with 2, SIGTERM with 143; any other failure keeps its traceback, exits with 1.
    """

    ORDER = (
        *("build", "check", "cache", "train", "eval", "report", "browse", "export", "merge"),
        *("card", "push"),
    )

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the help; typer puts groups last."""
        others = [name for name in super().list_commands(ctx) if name not in self.ORDER]
        return [*self.ORDER, *others]

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the line names."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, KeyboardInterrupt) or stop.code == 143:
                typer.echo("realign: stopped. The same command continues what it began.", err=True)
            raise
        except RefusedError as error:
            typer.secho(f"realign: {error}", fg="red", err=True)
            raise typer.Exit(2) from None


class _SectionOptions(_Mixin):
    """Flags and grouped help of a command, generated from its section.

    They are generated when they are first needed, so that the list of commands needs no pydantic.
    """

    @cached_property
    def section_params(self) -> list[Any]:
        """Return the flags of the section's options, then --config and --set."""
        from realign.config import SECTIONS
        from realign.config_file import flag_name, inner_section, kinds, meaning, metavar, options

        parameters = []

        def add(name: str, kind: Any, *flags: str, **shown: Any) -> None:
            annotation = Annotated[kind | None, typer.Option(*flags, **shown)]
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))

        for group, key, field in options(SECTIONS[self.name]):
            flag, shown = flag_name(key, field), metavar(field)
            info = {"help": meaning(field), "rich_help_panel": group or OPTIONS}
            if bool in kinds(field.annotation):
                add(key, bool, f"{flag}/--no-{flag[2:]}", **info)
            elif {list, dict}.intersection(kinds(field.annotation)):
                add(key, list[str], flag, metavar=f"{shown}...", **info)
            elif not inner_section(field):
                add(key, str, flag, metavar=shown, **info)
        add("config", Path, metavar="FILE", help="YAML file with one section per command.")
        help_ = "Set any option, also a nested one; repeatable."
        add("set_", list[str], "--set", metavar="SECTION.KEY=VALUE", help=help_)

        def command() -> None: ...

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        holder = typer.Typer(add_completion=False)
        holder.command()(command)
        return list(typer.main.get_command(holder).params)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the section's flags and the command's own."""
        return [*self.section_params, *super().get_params(ctx)]

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with the section's flags in ``ctx.obj``."""
        ctx.obj = {param.name: ctx.params.pop(param.name) for param in self.section_params}
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under their headings, nested ones last."""
        from realign.config_file import nested_help

        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            group = getattr(param, "rich_help_panel", None) or OPTIONS
            groups.setdefault(group, []).append(param.get_help_record(ctx))
        for heading, rows in [*groups.items(), *nested_help(self.name)]:
            with formatter.section(heading):
                formatter.write_dl(rows)
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)


class SectionCommand(_SectionOptions, TyperCommand):
    """A command whose options are a section's."""


class SectionGroup(_SectionOptions, TyperGroup):
    """A command whose options are a section's, with commands of its own beside."""


def _options(ctx: typer.Context) -> Any:
    """Return the options of a command: YAML file, then ``--set``, then flags."""
    from realign.config import SECTIONS
    from realign.config_file import flag_values, load_config

    section = SECTIONS[str(ctx.command.name)]
    config, overrides = ctx.obj["config"], ctx.obj["set_"] or ()
    return load_config(section, config and Path(config), overrides, flag_values(section, ctx.obj))


def _check_out(out: Path, *models: str) -> None:
    """Refuse an output folder or a model's folder before heavy libraries are imported."""
    from realign.modeling.folder import check_model
    from realign.runtime.run_folder import check_out

    check_out(out)
    for model in models:
        check_model(model)


def _check_exists(option: str, path: Path | None, kind: str, remedy: str = "") -> None:
    """Refuse a missing file or folder before heavy libraries are imported."""
    if path is not None and not path.exists():
        remedy = remedy or f"Check --{option}"
        raise RefusedError(f"{option} must be {kind}, got {path}, which does not exist. {remedy}.")


def _check_cache(folder: Path | None, remedy: str = "Check the path") -> None:
    _check_exists("cache", folder, "a folder of `realign cache`", remedy)


app = typer.Typer(
    name="realign",
    cls=Commands,
    help="Align a vision-language model: build dual-preference data, train with rDPO, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # tables of rich cut long flags off on 80 columns
    context_settings={"max_content_width": 100},
)

Images = Annotated[Path | None, typer.Option(help="Image folder; required for JSON.")]


@app.command(cls=SectionCommand)
def build(ctx: typer.Context) -> None:
    """Build preference pairs from images and good answers.

    Answers are masked, similar images retrieved, and the model refills the mask while it looks at
    one of them. What it makes up becomes the rejected answer. A stopped build continues when the
    same command is given again.
    """
    from realign.data.formats.layouts import recognise
    from realign.data.image_names import check_image_root

    options: BuildConfig = _options(ctx)
    _check_out(options.out, options.model)
    _check_exists("source", options.source, "a file or folder")
    _check_exists("lexicon", options.lexicon, "a YAML file")
    if options.images is not None:
        check_image_root(options.images)
    if options.format is not None:
        recognise((), options.format, options.source.name)
    from realign.building.run import build as run

    dataset = run(options)
    counts = json.loads((options.out / "funnel.json").read_text())
    by_hand = counts["decisions"]["dropped"]
    and_dropped = f", {by_hand} of them dropped by decisions.jsonl" if by_hand else ""
    typer.echo(f"{counts['accepted']} of {counts['rows']} rows accepted{and_dropped} -> {dataset}")


cache_app = typer.Typer(rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[Path, typer.Argument(help="Folder of `realign cache`, or one in it.")]


def _is_for_command(ctx: typer.Context, purpose: str) -> bool:
    """Return whether a command of a group follows; options before it are refused, as lost."""
    command = ctx.invoked_subcommand
    if command is None:
        return False
    if given := [name for name, value in ctx.obj.items() if value not in (None, (), [])]:
        flag = given[0].strip("_").replace("_", "-")
        raise RefusedError(
            f"--{flag} must stand behind {command!r} if it is for that command. Move it, or drop "
            f"{command!r} {purpose}."
        )
    return True


@cache_app.callback(cls=SectionGroup, invoke_without_command=True)
def cache(ctx: typer.Context) -> None:
    """Compute the reference model's log-probabilities once.

    Without a command it builds a cache. Rows are found by their content, and rows that are there
    are not computed again, so a stopped build continues when the same command is given again.
    Processes of accelerate launch or torchrun share the work. Options of a command below follow
    its name.
    """
    if _is_for_command(ctx, "to build"):
        return
    from realign.data.dataset import check_dataset

    options: CacheConfig = _options(ctx)
    _check_out(options.out, options.model)
    check_dataset(options.data, options.images)
    from realign.reference.run import cache as run

    typer.echo(f"reference log-probabilities -> {run(options)}")


@cache_app.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Check every byte of a cache against its hashes.

    Every damaged file is named. The exit code is 2 if there is one.
    """
    _check_cache(folder)
    from realign.reference.inspect import verify_cache

    for line in verify_cache(folder):
        typer.echo(line)


@cache_app.command("info")
def cache_info(folder: CacheFolder) -> None:
    """Show what a cache was computed from, its size and its probe."""
    _check_cache(folder)
    from realign.reference.inspect import describe_cache

    for line in describe_cache(folder):
        typer.echo(line)


@cache_app.command("merge")
def cache_merge(
    caches: Annotated[list[Path], typer.Argument(help="Caches of the same model and numerics.")],
    out: Annotated[Path, typer.Option(help="Cache folder; rows that it has already are kept.")],
) -> None:
    """Merge caches of the same model and numerics.

    Use it when parts of a dataset were computed on machines without a shared file system. For a
    row that several caches have, the first cache wins.
    """
    _check_out(out)
    for folder in caches:
        _check_cache(folder)
    from realign.reference.merge import merge_caches

    typer.echo(f"reference log-probabilities -> {merge_caches(caches, out)}")


@cache_app.command("import")
def cache_import(
    data: Annotated[Path, typer.Option(help="Parquet dataset that holds the columns.")],
    model: Annotated[str, typer.Option(help="Model that computed them: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Cache folder.")],
) -> None:
    """Make a cache of log-probabilities from another trainer.

    They are columns of the dataset: ref_chosen_logps and ref_rejected_logps, as TRL names them, are
    enough for dpo; rdpo also requires ref_image_rejected_logps. Their numerics are unknown, so
    train accepts them only with --accept-numerics, after it has computed 64 rows again.
    """
    _check_out(out, model)
    _check_exists("data", data, "a dataset file or folder")
    from realign.reference.import_columns import import_columns

    typer.echo(f"reference log-probabilities -> {import_columns(data, model, out)}")


@app.command(cls=SectionCommand)
def train(
    ctx: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would run, and stop.")
    ] = False,
) -> None:
    """Train a model with rDPO on a preference dataset.

    A stopped run continues when the same command is given again, and ends with the same result.
    """
    from realign.data.dataset import check_dataset

    options: TrainConfig = _options(ctx)
    _check_out(options.out, options.model)
    check_dataset(options.data, options.images)
    _check_cache(options.cache, "Check --cache, or leave it out to have the references computed")
    from realign.training.run import train as run

    checkpoint = run(options, dry_run=dry_run)
    if os.environ.get("RANK", "0") == "0":  # once, however many processes train
        typer.echo(f"checkpoint {'would be' if dry_run else '->'} {checkpoint}")


@app.command(cls=SectionCommand)
def check(ctx: typer.Context) -> None:
    """Check a dataset and list every bad row, without a GPU.

    The exit code is 1 if more rows were rejected than --max-reject allows, and 2 if there was
    nothing to check.
    """

    options: CheckConfig = _options(ctx)
    from realign.review.check import check as run

    findings = run(options)
    for line in findings.lines(options.show):
        typer.echo(line)
    if options.out:
        typer.echo(f"all of it -> {options.out}")
    if not findings.has_passed:
        raise typer.Exit(1)


eval_app = typer.Typer()
app.add_typer(eval_app, name="eval")


@eval_app.callback(cls=SectionGroup, invoke_without_command=True)
def evaluate(
    ctx: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(help="Write a suite's command instead, as `realign eval suite` does."),
    ] = None,
) -> None:
    """Ask models the same questions, score and compare them.

    Without a command it asks. Answers are stored, so that no question is asked twice. Differences
    from the first model are paired and have bootstrap intervals. Options of a command below follow
    its name.
    """
    ctx.obj["suite"] = suite
    if _is_for_command(ctx, "to ask models"):
        return
    from realign.data.image_names import check_image_root

    del ctx.obj["suite"]
    options: EvalConfig = _options(ctx)
    _check_out(options.out, *options.models.values())
    if suite is not None:
        _check_suite_flags(ctx.obj)
        _write_suite(suite, options.models, options.data, options.images, options.out)
        return
    _check_exists("data", options.data, "a folder of questions")
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
            help="File of answers, in a format of the benchmark; repeatable, also for gradings."
        ),
    ],
    rule: Annotated[str, typer.Option(help="Rule that scores the answers.")] = "official",
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Score a part where answers are missing.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Draws behind 95 % intervals; 0 for none.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score answers that any program has written, without a model.

    docs/evaluation.md lists the benchmarks, their files, rules and formats of answers. Rules that
    need a judge read its replies from the files; `realign eval judge` writes such a file.
    """
    _check_exists("data", data, "a folder with the benchmark's files")
    from realign.evaluation.answer_scores import score

    scores = score(benchmark, answers, data, rule, allow_subset=allow_subset, bootstrap=bootstrap)
    if as_json:
        from realign.runtime.files import json_text

        typer.echo(json_text(scores, indent=1))
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
            help="Model and its file of answers; repeatable. The first is the baseline. A name "
            "that is repeated holds another training run; NAME@RUN=FILE names the run.",
        ),
    ],
    rule: Annotated[str, typer.Option(help="Rule that scores the answers.")] = "official",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric to compare; repeatable. By default those of published tables."),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Split to compare in; repeatable. By default all.")
    ] = None,
    allow_subset: Annotated[
        bool,
        typer.Option("--allow-subset", help="Compare on what all answered, where some is missing."),
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(min=1, help="Draws of the bootstrap and of the permutation test.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare models by stored answers, with intervals and tests, without a model.

    docs/evaluation.md says what the numbers mean.
    """
    _check_exists("data", data, "a folder with the benchmark's files")
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

        typer.echo(json_text(scores, indent=1))
        return
    from rich import print as rich_print

    from realign.evaluation.comparison_table import comparison_table

    rich_print(comparison_table(scores))


@eval_app.command("write")
def eval_write(
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark, such as pope.")],
    data: Annotated[Path, typer.Option(help="Folder with the benchmark's published files.")],
    form: Annotated[
        str, typer.Option("--format", help="Form to write: official, llava, llava-questions, ...")
    ],
    out: Annotated[Path, typer.Option(help="New file, or folder for forms of several files.")],
    answers: Annotated[
        list[Path] | None,
        typer.Option(help="File of answers, in any format that is read; repeatable."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="What LLaVA's files call the model; by default the file's name.")
    ] = "",
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Write a part where answers are missing.")
    ] = False,
) -> None:
    """Write answers, or LLaVA's questions, as the published programs read them.

    docs/evaluation.md lists the forms.
    """
    _check_exists("data", data, "a folder with the benchmark's files")
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
        list[Path], typer.Option(help="File of answers, in a format of the benchmark; repeatable.")
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
        int, typer.Option(min=1, help="Gradings of every answer; 3 show how far they differ.")
    ] = 1,
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Judge a part where answers are missing.")
    ] = False,
    temperature: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|none",
            help="Sampling temperature; by default the one of the benchmark's judge. none sends "
            "none, for models that accept no other than theirs.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest reply; by default the one of the benchmark's judge."),
    ] = None,
    length_field: Annotated[
        str, typer.Option(help="max_completion_tokens, or max_tokens for servers before 2025.")
    ] = "max_completion_tokens",
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 8,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request counts as failed.")
    ] = 120.0,
    max_retries: Annotated[
        int,
        typer.Option(min=0, help="Retries after status 429 or 5xx, or a broken connection."),
    ] = 6,
) -> None:
    """Have a model behind a server judge answers.

    The judge reads the question, the reference and the answer, but no image. Its replies are
    stored beside the answers, and `realign eval score` takes the scores from them. Every reply is
    kept in OUT.journal.jsonl as it comes: a stopped command continues when it is given again, and
    asks nothing twice. What the judge did not answer is left unjudged.
    """
    _check_exists("data", data, "a folder with the benchmark's files")
    _check_exists("prompt", prompt, "a file")
    if length_field not in ("max_completion_tokens", "max_tokens"):
        raise RefusedError(
            f"length-field must be max_completion_tokens or max_tokens, got {length_field!r}. Name "
            "one of them."
        )
    from realign.evaluation.judge import JudgeModel
    from realign.evaluation.judge import judge as run
    from realign.generation.endpoint import Endpoint

    where = Endpoint(endpoint, api_key_env, concurrency, timeout_s, max_retries)
    model = JudgeModel(
        where,
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
            f"temperature must be a number from 0 to 2 or none, got {text!r}. Leave it out for the "
            "one of the benchmark's judge."
        )
    return value


def _check_suite_flags(given: dict[str, Any]) -> None:
    """Refuse flags that only bear on asking, which a suite does in its own way."""
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
    out: Annotated[Path, typer.Option(help="New folder for the command and what it needs.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the questions' images; for lmms-eval.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter of the environment that has the suite.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    backend: Annotated[
        str | None, typer.Option(help="Model class of the suite; by default that of the type.")
    ] = None,
) -> None:
    """Write the command with which another suite evaluates models, and the files that it needs.

    Nothing is asked: the printed command does that, in the suite's own environment. Adapters are
    merged. `realign eval read-suite` reads what the suite writes.
    """
    from realign.config_file import read_pairs

    _check_out(out)
    _check_exists("data", data, "a folder with the benchmarks' files")
    models = read_pairs(model, "--model", "NAME=FOLDER")
    _write_suite(suite, models, data, images, out, python=python, device=device, backend=backend)


@eval_app.command("read-suite")
def eval_read_suite(
    folder: Annotated[Path, typer.Argument(help="Folder with the results of a suite.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Published files; by default those that the command was written from."),
    ] = None,
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Read runs that asked a part of the questions.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Draws behind 95 % intervals; 0 for none.")
    ] = 0,
) -> None:
    """Read the results of lmms-eval or VLMEvalKit, and score their answers under all rules.

    The suite's own numbers stay as they are. Its answers are stored in the folder, as
    answers/MODEL-BENCHMARK.jsonl for `realign eval score`; all scores are in suite_scores.json.
    """
    _check_exists("folder", folder, "a folder with results", "Check the path")
    _check_exists("data", data, "a folder with the benchmarks' files")
    from rich import print as rich_print

    from realign.evaluation.suites.suite import read_suite
    from realign.evaluation.suites.suite_table import suite_tables

    scores = read_suite(folder, data, allow_subset=allow_subset, bootstrap=bootstrap)
    rich_print(suite_tables(scores))


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run (with dataset/, metrics.jsonl or eval/), or a dataset."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the folder.")
    ] = None,
    images: Images = None,
) -> None:
    """Write one HTML page about a run or a dataset."""
    from realign.review.report import write_report

    typer.echo(f"report -> {write_report(run, out, images)}")


@app.command()
def browse(
    data: Annotated[
        Path,
        typer.Argument(help="Dataset: folder of `realign build`, parquet, or JSON."),
    ],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 is any free one.")] = 8770,
    decisions: Annotated[
        Path | None,
        typer.Option(help="Decision file; by default the dataset's own, which train obeys."),
    ] = None,
    images: Images = None,
) -> None:
    """Look at pairs in the browser; keep, drop or flag them."""
    from realign.review.browse.serve import serve

    serve(data, images=images, decisions=decisions, port=port)


@app.command()
def export(
    data: Annotated[
        Path,
        typer.Option(help="Dataset: parquet, folder of `realign build`, or JSON."),
    ],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="official, ms-swift, llamafactory or trl.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the files.")],
    images: Images = None,
) -> None:
    """Write a dataset in the format of another trainer."""
    from realign.data.export.run import export as run

    exported = run(data, images, to, out)
    for name, count in exported.counts.items():
        typer.echo(f"{count} {name}")
    typer.echo(f"{to} -> {out}: {exported.note}")


@app.command()
def merge(
    model: Annotated[str, typer.Option(help="Adapter: RUN/checkpoint, or a hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the written weights: bfloat16 or float32.")
    ] = "bfloat16",
) -> None:
    """Merge an adapter into its base, for servers without adapters."""
    from realign.modeling.merge import merge as run

    typer.echo(f"model -> {run(model, out, dtype)}")


@app.command()
def card(
    path: Annotated[
        Path,
        typer.Argument(help="Run, folder of a model, or folder with dataset.parquet."),
    ],
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Licence, as the hub names it: apache-2.0, llama2, cc-by-4.0, other. By default "
            "the one that the card of the base model states, if that card is on this machine.",
        ),
    ] = None,
    license_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the licence, with --license other.")
    ] = None,
    license_link: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of the licence's text.")
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Repository that it will have, for the examples."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", help="The base's name on the hub, if it was a local folder."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="The training data's name on the hub."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run that a model comes from, if it is not the folder above it."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Folder of `realign eval`; by default eval/ in the run."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a card that a person has edited.")
    ] = False,
) -> None:
    """Write the card of a model or a dataset for the Hugging Face Hub.

    README.md in the checkpoint of a run says what its base, recipe, data and scores are and how to
    load it; README.md in a dataset says how the pairs were made. All of it comes from the files of
    the run; nothing is looked up on the network. A card that was edited is not replaced.
    """
    from realign.review.cards.card import write_card
    from realign.review.cards.licence import Licence
    from realign.review.cards.model_card import CardOptions

    _check_exists("eval", evaluation, "a folder of `realign eval`")
    licence = Licence.given(license, license_name, license_link)
    options = CardOptions(licence, base_model, dataset, repo, run, evaluation)
    typer.echo(f"card -> {write_card(path, options, overwrite=overwrite)}")


@app.command()
def push(
    path: Annotated[
        Path,
        typer.Argument(help="Run, folder of a model, or folder with dataset.parquet."),
    ],
    repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Repository; made if it is not there.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it; it is private by default.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list what would be uploaded, and stop.")
    ] = False,
) -> None:
    """Upload a model or a dataset with its card to the Hugging Face Hub.

    One commit holds all files. Before anything is sent, the folder is checked: its weights must be
    whole, its card must name a licence, and nothing else may lie there, such as optimizer states or
    paths of this machine. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from rich.filesize import decimal

    from realign.review.cards.push import prepare
    from realign.review.cards.push import push as upload_files

    upload = prepare(path, repo)
    seen = "public" if public else "private"
    total = f"{len(upload.files)} files, {decimal(sum(upload.files.values()))}"
    for name, size in upload.files.items():
        typer.echo(f"{decimal(size):>10}  {name}")
    if upload.left_out:
        typer.echo(f"stays here: {', '.join(upload.left_out)}")
    if dry_run:
        typer.echo(f"{total} would go to the {seen} {upload.repo_type} {repo}")
        return
    typer.echo(f"{total} -> {upload_files(upload, repo, public=public)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of scenes, masks and order of rows.")] = 0,
) -> None:
    """Run every stage on a small embedded model; no GPU, no network."""
    _check_out(out)
    from realign.runtime.spinning import limit_spinning

    limit_spinning()  # before torch is loaded
    from realign.demo.run import run_demo

    run_demo(out, seed)


@app.command()
def doctor() -> None:
    """Show what is installed and what this machine would use, and check the kernels' numbers.

    The exit code is 1 if a number is wrong. `python -m realign_kernels` shows and checks the
    kernels alone; it needs PyTorch only.
    """
    from realign.doctor import diagnosis

    lines, is_sound = diagnosis()
    for line in lines:
        typer.echo(line)
    if not is_sound:
        raise typer.Exit(1)


def main() -> None:
    """Run the console script."""
    app()


if __name__ == "__main__":
    main()
