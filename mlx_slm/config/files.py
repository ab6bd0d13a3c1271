"""Configurations on disk: those that come with the package, a workspace's own, and `--set` on top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, StrictFloat, StrictStr, ValidationError
from pydantic_core import ErrorDetails

from mlx_slm.config.schema import HORIZONS, RENAMED, Config
from mlx_slm.errors import SlmError, nearest
from mlx_slm.fields import Form
from mlx_slm.files import parse_yaml, read_yaml, require_form


def shipped_configs() -> dict[str, Path]:
    """Names and paths of the configurations that come with the package."""
    here = Path(__file__).resolve().parents[1]
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """Return the file for `--config FILE_OR_NAME`; raises SlmError with the names that exist."""
    shipped = {key: path for key, path in shipped_configs().items() if key != "domains"}
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    if name in shipped:
        return shipped[name]
    raise SlmError(
        f"--config {name}: no such file, and no shipped configuration{nearest(name, shipped)}; "
        f"shipped: {', '.join(shipped)}"
    )


class KnownSet(Form):
    """An entry of the shipped domains.yaml."""

    sources: list[StrictStr]
    license: StrictStr
    cost: StrictFloat
    """Megabytes of text for a million tokens."""
    opt_in: StrictStr | None = None
    """Why it is read only where its source is named."""


def known_sets() -> dict[str, KnownSet]:
    """The sets of the shipped domains.yaml."""
    path = shipped_configs().get("domains")
    if path is None:
        return {}
    return {name: require_form(entry, KnownSet, path) for name, entry in read_yaml(path).items()}


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `--set a.b=c` overrides, and check it; raises one SlmError with every problem."""
    raw = read_yaml(path) or {}
    if not isinstance(raw, dict):
        raise SlmError(f"{path}: expected sections ({', '.join(Config.model_fields)}), found a {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    return _checked(raw, f"{path} with {' '.join(f'--set {each}' for each in overrides)}" if overrides else str(path))


def _checked(raw: dict, where: str) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors()]
        head = f"{where}: " if len(problems) == 1 else f"{where}: {len(problems)} problems:\n  "
        raise SlmError(head + "\n  ".join(problems)) from error


def changed_config(config: Config, settings: Mapping[str, Any], where: str) -> Config:
    """The configuration with other values of some keys, such as `{"training.cooldown": 0.2}`; raises SlmError for
    those that are none."""
    raw = config.model_dump(mode="json", exclude_none=True)
    for key, value in settings.items():
        _override(raw, f"{key}={value}")
    return _checked(raw, where)


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


EITHER = (set(HORIZONS), *map(set, RENAMED.items()))
"""Keys of `training` that stand in each other's place."""


def _override(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise SlmError(f"--set {override}: write it as section.key=value, such as --set training.tokens=4M")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise SlmError(f"--set {override}: {section} is a value, not a section")
    for keys in EITHER:
        if sections == ["training"] and last in keys:
            for other in keys:
                raw.pop(other, None)
    raw[last] = parse_yaml(value, f"--set {override}")


def _explain(item: ErrorDetails) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{location}: unknown key{nearest(str(item['loc'][-1]), _keys(item['loc'][:-1]))}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{location}: {message[0].lower() + message[1:] if message else message}"


def _keys(location: tuple) -> list[str]:
    fields = Config.model_fields
    for part in location:
        model = fields[part].annotation if part in fields else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        fields = model.model_fields
    return list(fields)
