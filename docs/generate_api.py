"""Writes docs/api.md from the docstrings of the public names: `make api-docs`."""

import inspect
import re
import sys
from pathlib import Path

import aria_jax
from aria_jax import api
from aria_jax.presets import listed, settings_text

HEAD = """\
# The public names

Generated from the docstrings by `make api-docs`. `import aria_jax` takes milliseconds; each name is
imported when it is first used. Everything that goes wrong by a mistake of yours is a `UserError`
whose message says what was expected.
"""


def text() -> str:
    """All of docs/api.md."""
    parts = [HEAD]
    for section, names in aria_jax.SECTIONS.items():
        parts.append(f"## {section}\n")
        parts += [_entry(name, module) for name, module in names.items()]
    parts += ["## All settings of a run\n", f"```\n{settings_text(listed(), '')}\n```\n"]
    return "\n".join(parts)


def _entry(name: str, module: str) -> str:
    found = getattr(api if module == api.__name__ else aria_jax, name)
    kind = "class " if inspect.isclass(found) else ""
    signature = _signature(found)
    doc = inspect.getdoc(found) or ""
    lines = [f"### {name}\n", f"```python\n{kind}aria_jax.{name}{signature}\n```\n"]
    return "\n".join([*lines, f"```text\n{doc}\n```\n"])


def _signature(found: object) -> str:
    """One parameter a line, without the modules of types."""
    try:
        signature = inspect.signature(found)
    except ValueError:  # built-in exceptions have none
        return "(message)"
    lines, kind = [], None
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and kind not in (one.KEYWORD_ONLY, one.VAR_POSITIONAL):
            lines.append("*")
        kind = one.kind
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(kind, "")
        default = "" if one.default is one.empty else f" = {one.default!r}"
        lines.append(f"{stars}{one.name}{_type(one.annotation, ': ')}{default}")
    body = "".join(f"    {line},\n" for line in lines)
    return f"(\n{body})" + ("" if inspect.isclass(found) else _type(signature.return_annotation))


def _type(annotation: object, before: str = " -> ") -> str:
    if annotation is inspect.Signature.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = text.replace("NoneType", "None")
    return before + re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "api.md").write_text(
        text(), encoding="utf-8"
    )
