"""The ``realign`` command. Imports what a verb needs only when it runs, so that help is instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from typer.core import TyperCommand, TyperGroup
except ImportError:
    sys.exit(
        "The realign command needs its pipeline packages. Install them: pip install "
        "'realign[pipeline]'"
    )

from realign.errors import RefusedError

if TYPE_CHECKING:
    from realign.config import BuildConfig, CacheConfig, CheckConfig, EvalConfig, TrainConfig


class SectionCommand(TyperCommand):
    """A verb whose help ends with the options of its section, read when help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the command's help, then its section's options."""
        super().format_help(ctx, formatter)
        from realign.config_file import option_list

        assert self.name is not None
        formatter.write(option_list(self.name))


class SectionGroup(TyperGroup):
    """The same for a verb that has commands of its own beside."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the verb's help, then its section's options."""
        super().format_help(ctx, formatter)
        from realign.config_file import option_list

        assert self.name is not None
        formatter.write(option_list(self.name))


class Verbs(TyperGroup):
    """All verbs in the order of their use; typer puts those with commands of their own last."""

    ORDER = ("build", "check", "cache", "train", "eval", "report", "browse", "export", "merge")

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, for the help."""
        others = [name for name in super().list_commands(ctx) if name not in self.ORDER]
        return [*self.ORDER, *others]


app = typer.Typer(
    name="realign",
    cls=Verbs,
    help="Align a vision-language model: build dual-preference data, train with rDPO, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with a section a verb.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set any option; repeatable."),
]
# they may also stand in the YAML file, so typer must not ask for them itself
REQUIRED = " Required, here or in --config."
Model = Annotated[str | None, typer.Option(help="Model folder or hub id." + REQUIRED)]
Data = Annotated[
    Path | None,
    typer.Option(help="Dataset: parquet, build folder, or the authors' JSON." + REQUIRED),
]
Images = Annotated[Path | None, typer.Option(help="Image folder of the authors' JSON.")]
NeededImages = Annotated[Path | None, typer.Option(help="Image folder." + REQUIRED)]
Out = Annotated[Path | None, typer.Option(help="Output folder." + REQUIRED)]


@contextmanager
def _exit_codes() -> Iterator[None]:
    """2 for refused input, 143 for SIGTERM; any other failure keeps its traceback and exits with
    1.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _quiet_libraries()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        stopped = stop.code == 143 if isinstance(stop, SystemExit) else True
        if stopped:
            typer.echo("realign: stopped. The same command continues what it began.", err=True)
        raise
    except RefusedError as error:
        typer.secho(f"realign: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


def _quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # for worker processes, which inherit them
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _build_config(
    config: Path | None, overrides: list[str] | None, flags: dict[str, Any]
) -> BuildConfig:
    from realign.config import BuildConfig
    from realign.config_file import load_config

    return load_config(BuildConfig, config, overrides or (), flags)


@app.command(cls=SectionCommand)
def build(
    source: Annotated[
        Path | None,
        typer.Option(
            help="What to build from: JSONL, LLaVA-Instruct JSON, parquet, or text pairs."
            + REQUIRED
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Image folder; not needed where parquet has the images.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The VLM to be aligned: folder or hub id." + REQUIRED)
    ] = None,
    out: Out = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Layout of the source; recognised by default.")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="Who masks: rule or model.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Whose embeddings retrieve: model, or a CLIP or SigLIP model."),
    ] = None,
    similarity: Annotated[
        str | None, typer.Option(help="lexical, or a sentence-transformers model.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="process or ray.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes or Ray actors; one a GPU by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the masking draw.")] = None,
    config: Config = None,
    set_: Overrides = None,
) -> None:
    """Images and good answers -> preference dataset: mask, retrieve, induce, filter."""
    with _exit_codes():
        flags = {"source": source, "images": images, "model": model, "out": out, "mask": mask}
        flags |= {"format": format, "encoder": encoder, "similarity": similarity, "engine": engine}
        options = _build_config(config, set_, flags | {"workers": workers, "seed": seed})
        from realign.building.run import build as run

        dataset = run(options)
        counts = json.loads((options.out / "funnel.json").read_text())
        by_hand = counts["decisions"]["dropped"]
        and_dropped = f", {by_hand} of them dropped by decisions.jsonl" if by_hand else ""
        typer.echo(
            f"{counts['accepted']} of {counts['rows']} rows accepted{and_dropped} -> {dataset}"
        )


cache_app = typer.Typer()
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[Path, typer.Argument(help="Folder of `realign cache`, or one in it.")]


@cache_app.callback(cls=SectionGroup, invoke_without_command=True)
def cache(
    ctx: typer.Context,
    model: Model = None,
    data: Data = None,
    images: Images = None,
    out: Out = None,
    config: Config = None,
    set_: Overrides = None,
) -> None:
    """Dataset and VLM -> reference log-probabilities, keyed by content.

    Without a command it builds. After a stop the same line goes on where it was;
    rows that are there are not computed again. Several processes share the work
    when accelerate launch or torchrun start them. Options of a command stand
    behind its name.
    """
    flags = {"model": model, "data": data, "images": images, "out": out}
    command = ctx.invoked_subcommand
    with _exit_codes():
        if command:
            given = [f"--{name}" for name, value in flags.items() if value is not None]
            given += [f"--{n}" for n, v in (("config", config), ("set", set_)) if v is not None]
            if given:
                raise RefusedError(
                    f"{given[0]} must stand behind {command!r} if it is for that command. Move it, "
                    f"or drop {command!r} to build."
                )
            return
        from realign.config import CacheConfig
        from realign.config_file import load_config

        options: CacheConfig = load_config(CacheConfig, config, set_ or (), flags)
        from realign.reference.run import cache as run

        typer.echo(f"reference log-probabilities -> {run(options)}")


@cache_app.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Check every byte of a cache against its hashes.

    Exit code 2 if anything is wrong; every file that is gets named.
    """
    with _exit_codes():
        from realign.reference.inspect import verify_cache

        for line in verify_cache(folder):
            typer.echo(line)


@cache_app.command("info")
def cache_info(folder: CacheFolder) -> None:
    """What a cache was computed from, its rows and size, and what its probe measured."""
    with _exit_codes():
        from realign.reference.inspect import describe_cache

        for line in describe_cache(folder):
            typer.echo(line)


@cache_app.command("merge")
def cache_merge(
    caches: Annotated[list[Path], typer.Argument(help="Caches of one identity.")],
    out: Annotated[Path, typer.Option(help="Cache folder; what it has already is kept.")],
) -> None:
    """Several caches of the same model and numerics -> one.

    For parts of a dataset that were computed on machines without a common file
    system. Of a row in several the first one's values are taken.
    """
    with _exit_codes():
        from realign.reference.merge import merge_caches

        typer.echo(f"reference log-probabilities -> {merge_caches(caches, out)}")


@cache_app.command("import")
def cache_import(
    data: Annotated[Path, typer.Option(help="Parquet with the rows and the columns.")],
    model: Annotated[str, typer.Option(help="The model they are of: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Cache folder.")],
) -> None:
    """Log-probabilities of another trainer, columns of the dataset -> a cache.

    The columns are TRL's, ref_chosen_logps and ref_rejected_logps, which is
    enough for dpo, and ref_image_rejected_logps for rdpo. How they were computed
    is not known, so train takes them only with --accept-numerics, after it has
    computed 64 rows again.
    """
    with _exit_codes():
        from realign.reference.import_columns import import_columns

        typer.echo(f"reference log-probabilities -> {import_columns(data, model, out)}")


@app.command(cls=SectionCommand)
def train(
    model: Model = None,
    data: Data = None,
    images: Images = None,
    out: Out = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of `realign cache`; computed if not given.")
    ] = None,
    accept_numerics: Annotated[
        bool | None,
        typer.Option(
            "--accept-numerics",
            help="Use a cache of another machine or of imported values if 64 rows agree.",
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="rdpo, dpo, mdpo, symmetric or sft.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of rows.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and say what would be, then stop.")
    ] = False,
    config: Config = None,
    set_: Overrides = None,
) -> None:
    """Dataset and VLM -> aligned checkpoint and metrics, with rDPO."""
    with _exit_codes():
        from realign.config import TrainConfig
        from realign.config_file import load_config

        flags: dict[str, Any] = {
            "model": model,
            "data": data,
            "images": images,
            "out": out,
            "cache": cache,
            "accept_numerics": accept_numerics,
            "objective": objective,
        }
        flags |= {"learning_rate": learning_rate, "epochs": epochs, "seed": seed}
        options: TrainConfig = load_config(TrainConfig, config, set_ or (), flags)
        from realign.training.run import train as run

        checkpoint = run(options, dry_run=dry_run)
        if os.environ.get("RANK", "0") == "0":  # once, however many processes train
            typer.echo(f"checkpoint {'would be' if dry_run else '->'} {checkpoint}")


@app.command(cls=SectionCommand)
def check(
    data: Data = None,
    images: Images = None,
    model: Annotated[
        str | None,
        typer.Option(help="Also check for this model: folder or hub id; weights are not loaded."),
    ] = None,
    eval_images: Annotated[
        Path | None, typer.Option(help="Folder of an evaluation's images, for leakage.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for problems.json and rejected.jsonl.")
    ] = None,
    max_reject: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Rejected rows that pass: 0.001 or 0.1%; none if not given."
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.")] = None,
    config: Config = None,
    set_: Overrides = None,
) -> None:
    """Dataset -> every bad row, as text and JSON, without a GPU.

    Exit code 1 when more rows were rejected than may be, 2 when there was nothing to check.
    """
    with _exit_codes():
        from realign.config import CheckConfig
        from realign.config_file import load_config

        flags: dict[str, Any] = {"data": data, "images": images, "model": model, "out": out}
        flags |= {"eval_images": eval_images, "max_reject": max_reject, "max_length": max_length}
        options: CheckConfig = load_config(CheckConfig, config, set_ or (), flags)
        from realign.review.check import check as run

        findings = run(options)
        for line in findings.lines(options.show):
            typer.echo(line)
        if options.out:
            typer.echo(f"all of it -> {options.out}")
        if not findings.has_passed:
            raise typer.Exit(1)


@app.command(name="eval", cls=SectionCommand)
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="Repeatable; the first is the baseline." + REQUIRED
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with files of benchmarks." + REQUIRED)
    ] = None,
    images: NeededImages = None,
    out: Out = None,
    config: Config = None,
    set_: Overrides = None,
) -> None:
    """Models and benchmarks -> raw answers, scores, paired differences with intervals."""
    with _exit_codes():
        from realign.config import EvalConfig
        from realign.config_file import load_config

        pairs = [name.partition("=") for name in model or []]
        if bad := [name for name, separator, folder in pairs if not (separator and folder)]:
            raise RefusedError(
                f"--model must be NAME=FOLDER, got {bad[0]!r}. Put a name before it."
            )
        models = {name: folder for name, _, folder in pairs} or None
        if len(models or ()) < len(pairs):
            names = [name for name, *_ in pairs]
            again = next(name for name in names if names.count(name) > 1)
            raise RefusedError(
                f"--model must have different names, got {again!r} twice. Rename it."
            )
        options: EvalConfig = load_config(
            EvalConfig,
            config,
            set_ or (),
            {"models": models, "data": data, "images": images, "out": out},
        )
        from rich import print as rich_print

        from realign.evaluation.run import evaluate as run
        from realign.evaluation.table import scores_table

        rich_print(scores_table(run(options)))


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run's folder (dataset/, metrics.jsonl, eval/ where they exist), or a dataset."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the folder by default.")
    ] = None,
    images: Images = None,
) -> None:
    """A run's folder or a dataset -> one self-contained HTML page."""
    with _exit_codes():
        from realign.review.report import write_report

        typer.echo(f"report -> {write_report(run, out, images)}")


@app.command()
def browse(
    data: Annotated[
        Path, typer.Argument(help="Dataset: build folder, parquet, or the authors' JSON.")
    ],
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; 0 for any free one.")] = 8770,
    decisions: Annotated[
        Path | None,
        typer.Option(help="Decision file; the dataset's own by default, which train honours."),
    ] = None,
    images: Images = None,
) -> None:
    """A dataset -> a local page to keep, drop or flag its pairs."""
    with _exit_codes():
        from realign.review.browse.serve import serve

        serve(data, images=images, decisions=decisions, port=port)


@app.command()
def export(
    data: Annotated[
        Path, typer.Option(help="Dataset: parquet, build folder, or the authors' JSON.")
    ],
    to: Annotated[str, typer.Option(help="official, ms-swift, llamafactory or trl.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    images: Images = None,
) -> None:
    """Dataset -> the files that another trainer reads."""
    with _exit_codes():
        from realign.data.export.run import export as run

        exported = run(data, images, to, out)
        for name, count in exported.counts.items():
            typer.echo(f"{count} {name}")
        typer.echo(f"{to} -> {out}: {exported.note}")


@app.command()
def merge(
    model: Annotated[str, typer.Option(help="An adapter: RUN/checkpoint, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    dtype: Annotated[
        str, typer.Option(help="Of the written weights: bfloat16 or float32.")
    ] = "bfloat16",
) -> None:
    """Adapter and its base -> one model, for servers that take no adapters."""
    with _exit_codes():
        from realign.modeling.merge import merge as run

        typer.echo(f"model -> {run(model, out, dtype)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of scenes, masks and order of rows.")] = 0,
) -> None:
    """All of it on the embedded world and model: CPU, minutes, no network."""
    with _exit_codes():
        from realign.demo.run import run_demo

        run_demo(out, seed)


@app.command()
def doctor() -> None:
    """What is installed, and what this machine would use."""
    with _exit_codes():
        from realign.doctor import diagnosis

        for line in diagnosis():
            typer.echo(line)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
