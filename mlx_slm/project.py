"""What the functions that orchestrate share: where everything lies, the settings, and whom to tell."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlx_slm.config.schema import Config
from mlx_slm.report import Report
from mlx_slm.storage.workspace import Workspace


@dataclass(frozen=True)
class Project:
    workspace: Workspace
    config: Config
    report: Report = dataclasses.field(default_factory=Report)

    def having(self, **sections) -> Project:
        """The same with other sections of the configuration."""
        return dataclasses.replace(self, config=self.config.model_copy(update=sections))
