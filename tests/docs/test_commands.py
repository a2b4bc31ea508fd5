"""Every command line in the documentation is one that ``realign`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from realign.cli import app
from realign.config import SECTIONS
from realign.config_file import flag_values, load_config
from realign.data.formats.parquet import write_parquet
from realign.demo.run import MODEL
from tests.docs.pages import ROOT, Command, commands
from tests.realign.conftest import make_records

COMMANDS = list(dict.fromkeys(commands()))
WHOLE = [command for command in COMMANDS if command.is_whole]
TRIED = [command for command in WHOLE if command.words[0] in ("train", "check")]
# what a command is refused for here, by a word of it: the package of a tracker is not installed
REFUSED = {"wandb": "train.report_to must name trackers that are installed, got 'wandb'"}
# inline code that begins with the program's name and is no command line
NO_COMMANDS = {
    ("mmhal", "1"): "the name of a judge's prompt",
    ("COMMAND", "--help"): "any command",
}
# configurations that a page asks the reader to write
UNWRITTEN = {"run.yaml"}


def resolve(words: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Return the command that a line names, also within a group, and its arguments."""
    command, arguments = typer.main.get_command(app), list(words)
    while arguments and arguments[0] in getattr(command, "commands", ()):
        command = command.commands[arguments.pop(0)]
    return command, arguments


def flags(command: Any) -> set[str]:
    """Return the flags of a command."""
    context = command.context_class(command, info_name=command.name)
    return {"--help"}.union(*(param.opts for param in command.get_params(context))).union(
        *(param.secondary_opts for param in command.get_params(context))
    )


def test_the_pages_contain_enough_commands() -> None:
    assert len(WHOLE) >= 35
    assert len(COMMANDS) - len(WHOLE) >= 70
    assert {command.words[0] for command in WHOLE} >= {*SECTIONS, "card", "push", "merge", "demo"}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_and_its_options_exist(command: Command) -> None:
    found, arguments = resolve(command.words)
    if found.name == "realign" and arguments and not arguments[0].startswith("-"):
        assert NO_COMMANDS[command.words]
        return
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert given <= flags(found)


@pytest.mark.parametrize("command", WHOLE, ids=str)
def test_a_complete_command_is_accepted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from there
    found, arguments = resolve(command.words)
    context = found.make_context(found.name, arguments)
    section = SECTIONS.get(str(found.name))
    config = context.params.get("config")  # a path, or before typer 0.29 its name
    if section and str(config) not in UNWRITTEN:
        options = load_config(
            section,
            config and Path(config),
            context.params["set_"] or (),
            flag_values(section, context.params),
        )
        assert isinstance(options, section)


@pytest.mark.parametrize("command", TRIED, ids=str)
def test_commands_that_need_no_gpu_run_on_the_embedded_model(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ``train`` command (as ``--dry-run``) and ``check`` command runs on a few pairs."""
    write_parquet(make_records(4), tmp_path / "dataset.parquet")
    (tmp_path / "run.yaml").write_text("train: {}\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    words = [*command.words]
    for option in ("--cache", "--images"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    words += ["--model", str(MODEL), "--data", "dataset.parquet"]
    if words[0] == "train":
        words += ["--out", "out", "--dry-run"]
    result = CliRunner().invoke(app, words)
    refusal = next((refusal for word, refusal in REFUSED.items() if word in str(command)), None)
    assert result.exit_code == (2 if refusal else 0), result.output
    assert (
        refusal or "checkpoint would be out/checkpoint" * (words[0] == "train")
    ) in result.output
    assert not (tmp_path / "out").exists()
