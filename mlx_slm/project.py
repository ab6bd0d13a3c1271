"""What the functions that orchestrate share: where everything lies, the settings, and whom to tell."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from mlx_slm.config.files import find_config, load_config
from mlx_slm.config.schema import Config
from mlx_slm.report import Report
from mlx_slm.storage.workspace import Workspace

DEFAULT_CONFIG = "mac"


@dataclass(frozen=True)
class Project:
    workspace: Workspace
    config: Config
    report: Report = dataclasses.field(default_factory=Report)

    @classmethod
    def open(
        cls,
        workspace: str | os.PathLike | None = None,
        config: str | None = None,
        changes: tuple[str, ...] = (),
        report: Report | None = None,
    ) -> Project:
        """A project in a directory (default: $MLX_SLM_WORKSPACE, else ./workspace).

        `config`: a YAML file or the name of a shipped one, by default the workspace's own config.yaml, else `mac`;
        `changes` as for `--set`: "training.tokens=4M". Raises SlmError with every problem of a configuration.
        """
        place = Workspace(workspace)
        return cls(place, load_config(config_file(place, config), changes), report or Report())

    def having(self, **sections) -> Project:
        """The same with other sections of the configuration."""
        return dataclasses.replace(self, config=self.config.model_copy(update=sections))


def config_file(workspace: Workspace, named: str | None) -> Path:
    """The file of the configuration that is named, else of the workspace's own, else of the default one."""
    if named:
        return find_config(named)
    return workspace.config_file if workspace.config_file.exists() else find_config(DEFAULT_CONFIG)
