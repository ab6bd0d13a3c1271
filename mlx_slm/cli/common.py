"""Options that all commands take, and what a command gets from them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import click


@dataclass
class Session:
    """The options that all commands share, read lazily."""

    workspace_path: str | None
    config_name: str | None
    overrides: tuple[str, ...]
    as_json: bool
    quiet: bool
    yes: bool

    @functools.cached_property
    def workspace(self):
        from mlx_slm.storage.workspace import Workspace

        return Workspace(self.workspace_path)

    @functools.cached_property
    def config(self):
        """`--config`, else the workspace's own config.yaml, else `mac`; with `--set` on top."""
        from mlx_slm.config.files import load_config
        from mlx_slm.project import config_file

        return load_config(config_file(self.workspace, self.config_name), self.overrides)

    @functools.cached_property
    def report(self):
        from mlx_slm.cli.display import RichReport
        from mlx_slm.machine.ranks import ranks
        from mlx_slm.report import Report

        if not ranks().is_first:
            return Report()
        return RichReport(to_stderr=self.as_json, quiet=self.quiet, assume_yes=self.yes)

    @functools.cached_property
    def project(self):
        from mlx_slm.project import Project

        return Project(self.workspace, self.config, self.report)

    def start_computing(self) -> None:
        """Say once what slows this machine down."""
        from mlx_slm.machine import runtime

        for notice in runtime.notices():
            self.report.warn(notice)

    def show(self, result: dict, text: Callable[[], None] | None = None) -> None:
        """Print one JSON object with `--json`, else call `text`; of several ranks the first does."""
        from mlx_slm.machine.ranks import ranks

        if not ranks().is_first:
            return
        if self.as_json:
            click.echo(json.dumps(result, ensure_ascii=False))
        elif text:
            text()


class Place(click.ParamType):
    """A path, or a name where that is meant as well; a ~ in front is the home directory, as in a shell."""

    name = "path"

    def convert(self, value, param, ctx):
        return os.path.expanduser(value)


PLACE = Place()


def common(function: Callable) -> Callable:
    """Give a command the shared options; it gets a `Session` first."""

    @click.option(
        "--workspace",
        "workspace_path",
        type=PLACE,
        metavar="DIR",
        help="Where everything is kept. [default: ./workspace]",
    )
    @click.option(
        "--config",
        "config_name",
        type=PLACE,
        metavar="FILE_OR_NAME",
        help="A YAML file, or mac, paper, laptop, mini.",
    )
    @click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value, such as training.tokens=4M."
    )
    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr.")
    @click.option("-q", "--quiet", is_flag=True, help="Only results, and what went wrong.")
    @click.option("-y", "--yes", is_flag=True, help="Do not ask before long work.")
    @functools.wraps(function)
    def wrapped(workspace_path, config_name, overrides, as_json, quiet, yes, **options):
        return function(Session(workspace_path, config_name, overrides, as_json, quiet, yes), **options)

    return wrapped


class Size(click.ParamType):
    """A number of tokens such as 250k or 1M."""

    name = "size"

    def convert(self, value, param, ctx):
        from mlx_slm.fields import parse_size

        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not size:
            self.fail("it must be more than 0", param, ctx)
        return size


SIZE = Size()


class Numbers(click.ParamType):
    """Numbers and ranges such as 0-15 or 3,7,9-11; a sorted list."""

    name = "numbers"

    def convert(self, value, param, ctx):
        numbers = set()
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
                self.fail(f"{part.strip()!r} is not a number or a range such as 0-15", param, ctx)
            numbers |= set(range(int(first), int(last or first) + 1))
        return sorted(numbers)


NUMBERS = Numbers()


def pretraining_methods() -> list:
    """Those that `pretrain` takes. They are slow to import: asked for when a command runs or shows its help."""
    from mlx_slm.methods import METHODS

    return [method for method in METHODS if method.pretrains]


class MethodType(click.ParamType):
    """The name of a method that can be pretrained."""

    name = "method"

    @property
    def choice(self) -> click.Choice:
        return click.Choice([method.name for method in pretraining_methods()])

    def convert(self, value, param, ctx):
        return self.choice.convert(value, param, ctx)

    def get_metavar(self, param, ctx=None):
        return self.choice.get_metavar(param, ctx)


class MethodOption(click.Option):
    def get_help_record(self, ctx):
        self.help = ", ".join(method.summary for method in pretraining_methods()).capitalize() + "."
        return super().get_help_record(ctx)


METHOD = MethodType()
SEED = click.IntRange(0, 2**32 - 1)


class Number(click.FloatRange):
    """A number in a range; nan is in none."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return number if number == number else self.fail(f"{value!r} is not a number", param, ctx)


HOURS = Number(0, 1e6, min_open=True)
SHARE = Number(0, 1, max_open=True)
