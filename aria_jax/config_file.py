"""Settings in files and lists: what `train --config FILE` reads, and what a run writes down.

YAML or JSON with the keys of the command line: `steps: 200`, `optimizer.peak_lr: 1e-4`, or a
section with its settings inside; `task` may be named too. Every run writes its resolved settings
to WORKDIR/config.yaml; given to --config, they make the same run.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aria_jax.config import (
    SECTIONS,
    SETTINGS,
    RunConfig,
    full_name,
    out_of_range,
    to_dict,
    with_settings,
)
from data_pipeline.errors import UserError
from data_pipeline.settings import field_docs

CONFIG_FILE = "config.yaml"
SUFFIXES = (".yaml", ".yml", ".json")


def with_config_file(config: RunConfig, path: str | Path) -> RunConfig:
    """`config` with the settings of a file, which must be of its task.

    Raises:
        UserError: no such file, neither YAML nor JSON, another task, a setting given twice;
            unknown settings and unusable values, all of them together.
    """
    try:
        pairs = list(_pairs(_read(Path(path))))
        tasks = [value for key, value in pairs if key == "task"]
        if tasks and tasks[0] != config.task:
            raise UserError(f"these are settings of task {tasks[0]}, not {config.task}")
        settings = [(key, value) for key, value in pairs if key != "task"]
        changed = with_settings(config, settings)
        names = [full_name(key) for key, _ in settings]
        _refuse_twice(names)
        if wrong := [text for name, text in out_of_range(changed).items() if name in names]:
            raise UserError("; ".join(wrong))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return changed


def write_config(config: RunConfig, workdir: str | Path) -> Path:
    """Writes every setting of a run to WORKDIR/config.yaml, all or nothing."""
    import yaml

    from data_pipeline.artifact import write_atomically

    values = json.loads(json.dumps(to_dict(config)))  # tuples as lists
    path = Path(workdir) / CONFIG_FILE
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
    return path


def _read(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML or JSON file."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML would silently keep the last of two equal keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            _refuse_twice(str(key.value) for key, _ in node.value)
            return super().construct_mapping(node, deep)

    def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(key for key, _ in pairs)
        return dict(pairs)

    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"expected a file of settings that ends in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=json_object)
        else:
            values = yaml.load(text, Loader)
    except FileNotFoundError:
        raise UserError("no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"not {path.suffix[1:].upper()} ({reason[:200]})") from None
    if not isinstance(values, Mapping):
        raise UserError("expected settings by name, e.g. `steps: 200`")
    return values


def _refuse_twice(keys: Iterable[str]) -> None:
    if twice := [key for key, n in Counter(keys).items() if n > 1]:
        raise UserError(f"{', '.join(twice)}: given twice")


def _pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting, sections opened."""
    for key, value in values.items():
        if not isinstance(value, Mapping):
            yield str(key), value
        elif key in SECTIONS:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            raise UserError(f"{key!r} is no section; the sections are {', '.join(SECTIONS)}")


def listed(preset: RunConfig | None = None) -> list[dict[str, Any]]:
    """Name, type, range, default and docstring of every setting, as JSON types.

    Args:
        preset: a run whose values are listed too, as "preset".
    """
    rows = []
    for section, cls in SECTIONS.items():
        docs = field_docs(cls)
        for name, setting in SETTINGS.items():
            if name.startswith(f"{section}."):
                row = {
                    "name": name,
                    "type": setting.type_name,
                    "range": None if setting.range is None else f"must {setting.range}",
                    "default": setting.default,
                    "doc": docs[setting.name],
                }
                if preset is not None:
                    row["preset"] = getattr(getattr(preset, section), setting.name)
                rows.append(row)
    return rows


def settings_text(rows: Sequence[Mapping[str, Any]], preset: str) -> str:
    """What `listed` found, grouped by section, for a person."""
    lines: list[str] = []
    for section, cls in SECTIONS.items():
        lines += ["", f"{section}: {(cls.__doc__ or '').strip().splitlines()[0]}"]
        for row in rows:
            if not row["name"].startswith(f"{section}."):
                continue
            limits = "" if row["range"] is None else f", {row['range']}"
            text = f"  {row['name'].partition('.')[2]}={_shown(row['default'])}"
            if row.get("preset", row["default"]) != row["default"]:
                text += f"  ({preset}: {_shown(row['preset'])})"
            lines.append(f"{text}  [{row['type']}{limits}]")
            lines += textwrap.wrap(
                row["doc"], 96, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines[1:])


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else f"{value}"
