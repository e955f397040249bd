"""What a run tells at its end: a table, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import Any


def describe_end(summary: Mapping[str, Any], output: str, val: str | None) -> str:
    """Lines of text. summary: of a run that has finished. val: its held-out shards."""
    rows = list(_validations(summary)) or [("loss", f"{_number(summary['loss'])}, of training")]
    rows += list(_costs(summary))
    rows.append(("folder", output))
    rows.append(("next", f"dr2dist export {quote(output)} --output model.safetensors"))
    if val is not None:
        rows.append(("", f"dr2dist evaluate model.safetensors {quote(val)} --output report.json"))
    rows.append(("", "dr2dist predict model.safetensors FILES... --output predictions.csv"))
    return "\n".join(f"{name:14}{text}" for name, text in rows)


def _validations(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    best, last = summary["best"], summary["last"]
    for name, found in (("last", last), ("best", best)):
        if found is not None and (name == "last" or found["step"] != last["step"]):
            values = [f"{key} {_number(value)}" for key, value in found.items() if key not in _LEFT]
            yield name, f"step {found['step']}: {', '.join(values)}"


_LEFT = ("step", "samples", "skipped")


def _costs(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seconds = summary["seconds"]
    early = ", ended early" if summary["stopped_early"] else ""
    yield "steps", f"{summary['steps']}{early}, {summary['samples']} samples in {seconds:.0f} s"
    if summary["samples"] and seconds:
        yield "speed", f"{summary['samples'] / seconds:.4g} samples a second, validations included"
    yield "peak memory", f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB, the largest of all ranks"
    failures = summary["certificate_failures"]
    yield "certificate", f"{failures} failures" if failures else _proven(summary)
    for key in ("skipped", "bad_batches"):
        if summary[key]:
            yield key.replace("_", " "), str(summary[key])


def _proven(summary: Mapping[str, Any]) -> str:
    if summary["arithmetic"] == "exact":
        return "every step proved its reversal"
    kept = summary["memory"] in ("store", "checkpoint")
    return "nothing was reversed" if kept else "float arithmetic proves nothing"


def _number(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.4g}"
