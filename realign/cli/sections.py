"""Commands whose options are a section of the configuration."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from realign.errors import RefusedError

OPTIONS = "Options"  # heading of the options without a group
_Mixin: Any = object  # lets mypy accept the calls of super(), which typer's classes answer


class _SectionOptions(_Mixin):
    """Flags and grouped help of a command, generated from its section.

    They are generated when they are first needed, so that ``realign --help`` imports no pydantic.
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
    """A command whose options are a section's, with subcommands."""


def read_options(ctx: typer.Context) -> Any:
    """Return the options of a command: YAML file, then ``--set``, then flags."""
    from realign.config import SECTIONS
    from realign.config_file import flag_values, load_config

    section = SECTIONS[str(ctx.command.name)]
    config, overrides = ctx.obj["config"], ctx.obj["set_"] or ()
    return load_config(section, config and Path(config), overrides, flag_values(section, ctx.obj))


def is_for_command(ctx: typer.Context, purpose: str) -> bool:
    """Return whether a subcommand was given. Options before its name are refused: it would not get
    them.

    Args:
        ctx: Context of the group.
        purpose: Purpose of the group without a subcommand, for the message: "to build".
    Raises:
        RefusedError: An option stands before the subcommand.
    """
    command = ctx.invoked_subcommand
    if command is None:
        return False
    if given := [name for name, value in ctx.obj.items() if value not in (None, (), [])]:
        flag = given[0].strip("_").replace("_", "-")
        raise RefusedError(
            f"--{flag} must be given after {command!r} if it is for that command. Move it, or drop "
            f"{command!r} {purpose}."
        )
    return True
