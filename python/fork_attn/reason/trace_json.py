"""Traces as JSON: one line per thread, event and step, so that files can be read and compared."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import (
    Event,
    Injection,
    Span,
    StepRecord,
    ThreadRecord,
    Watching,
)

FORMAT = "fork-attn trace"
VERSION = 1
_TABLES = ("threads", "events", "steps")


def dumps(trace: Trace) -> str:
    """The trace as JSON text; times keep all their digits, so that `loads` gives an equal trace."""
    data = {"format": FORMAT, "version": VERSION, **asdict(trace)}
    tables = {name: data.pop(name) for name in _TABLES}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    for name, rows in tables.items():
        inner = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        lines.append(f'"{name}": [\n  {inner}\n ]' if rows else f'"{name}": []')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def loads(text: str) -> Trace:
    """The trace that `dumps` wrote.

    Raises:
        ValueError: not JSON, not a trace, of another version, or damaged.
    """
    data = json.loads(text)
    found = (data.get("format"), data.get("version")) if isinstance(data, dict) else type(data)
    if found != (FORMAT, VERSION):
        raise ValueError(f"text: expected a {FORMAT!r} of version {VERSION}, got {found!r}")
    del data["format"], data["version"]
    try:
        data["answer"] = tuple(_row(Span, row) for row in data["answer"])
        data["threads"] = tuple(_thread(row) for row in data["threads"])
        data["events"] = tuple(_row(Event, row) for row in data["events"])
        data["steps"] = tuple(_row(StepRecord, row) for row in data["steps"])
        return _row(Trace, data)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"text: expected a whole trace, got one that is damaged: {error}"
        ) from None


def _thread(row: dict[str, Any]) -> ThreadRecord:
    row["context"] = tuple(_row(Span, span) for span in row["context"])
    row["injections"] = tuple(_row(Injection, injection) for injection in row["injections"])
    row["watches"] = tuple(_row(Watching, watching) for watching in row["watches"])
    return _row(ThreadRecord, row)


def _row(cls: Any, row: dict[str, Any]) -> Any:
    """A dataclass from its fields; JSON's lists become tuples."""
    unknown = set(row) - {field.name for field in fields(cls)}
    if unknown:
        raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
