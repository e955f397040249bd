"""What was measured, as a Markdown table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dr2dist.bench.measure import Found, error_of, largest
from dr2dist.pictures import save_picture

MIB = 2**20


def table(results: dict[str, Any]) -> str:
    """The page: where and how it was measured, and a row for each case."""
    columns = _columns(results)
    cases = [case for case in results["cases"] if any(case in found for _, found in columns)]
    lines = [
        f"{results['model']}, {'bf16' if results['bf16'] else 'fp32'}, alpha "
        f"{results['alpha']:g}, beta {results['beta']:g}, {results['size']} pixels"
        f"{_options(results)}; slices of "
        f"{results['chunk_size']} samples, of one image {results['chunk_tokens']} tokens; a "
        f"sample's tokens have {results['elements']} elements. {results['machine']}, "
        f"{results['threads']} threads, torch {results['torch']}.",
        "",
        *(f"    {command}" for command in results["commands"]),
        "",
        f"| | {' | '.join(title for title, _ in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for case in cases:
        lines.append(f"| {case} | {' | '.join(found.get(case, '') for _, found in columns)} |")
    return "\n".join([*lines, ""])


def _options(results: dict[str, Any]) -> str:
    said = results.get("options")  # which results of versions before do not have
    return f", {said}" if said else ""


def _columns(results: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """(title, text by case)."""
    columns = []
    elements = results["elements"]
    for depth, lines in _by_depth(results):
        low, high = results["batches"]
        title = f"depth {depth}: memory of batch {high}"
        columns.append((title, _texts(lines, lambda x: f"{x['growth'][1] / MIB:.0f} MiB")))
        title = f"depth {depth}: bytes an element of a sample's tokens (slope {low} to {high})"
        columns.append((title, _texts(lines, lambda x: _slope(x, elements, 1))))
    columns += _depth_column(results)
    if times := results.get("time"):
        for base in ("checkpoint per block", "conventional"):
            key = f"to {base}"
            columns.append((f"step time, {base} = 1", _texts(times, lambda x, k=key: _ratio(x, k))))
    if shares := results.get("arithmetic"):
        columns.append(("exact arithmetic", _texts(shares, lambda x: f"{x['share']:.1%}")))
    if batches := results.get("batch"):
        title = f"largest batch in {results['limit'] / 2**30:g} GiB"
        columns.append((title, _texts(batches, lambda x: f"{x['batch']}")))
    columns += _resolution_columns(results)
    return columns


def _by_depth(results: dict[str, Any]) -> list[tuple[str, dict[str, Found]]]:
    """The measurements of memory, from the shallowest network to the deepest."""
    found = results.get("memory", {})
    return sorted(found.items(), key=lambda item: 0 if item[0] == "own" else int(item[0]))


def _depth_column(results: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    if len(results.get("memory", {})) < 2:
        return []
    (low, first), *_, (high, last) = _by_depth(results)
    unit = (int(high) - int(low)) * results["elements"]
    known = set(_sound(last)) & set(_sound(first))
    both = {
        case: {
            "slope": last[case]["slope"] - first[case]["slope"],
            "error": error_of(last[case]) + error_of(first[case]),
        }
        for case in known
    }
    return [("bytes an element and block", _texts(both, lambda x: _slope(x, unit, 2)))]


def _resolution_columns(results: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    lines = results.get("resolution")
    if not lines:
        return []
    limit, patch = results["size_limit"], results["patch"]
    low, high = results["sizes"]

    def side(line: Found) -> str:
        return f"{int(largest(line, limit) ** 0.5) * patch}"

    return [
        (
            f"bytes per token, one image of {low} to {high} pixels",
            _texts(lines, lambda x: _slope(x, 1, 0)),
        ),
        (f"largest square image in {limit / 2**30:g} GiB (predicted)", _texts(lines, side)),
    ]


def _slope(line: Found, unit: float, digits: int) -> str:
    """In bytes a unit; below its own error it says nothing but that."""
    slope, error = line["slope"] / unit, error_of(line) / unit
    return f"{slope:.{digits}f}" if slope > error else f"under {error:.{digits}f}"


def _ratio(found: Found, key: str) -> str:
    return f"{found[key]:.2f}" if key in found else ""


def _sound(found: dict[str, Found]) -> list[str]:
    return [case for case, value in found.items() if "failed" not in value]


def _texts(found: dict[str, Found], text: Any) -> dict[str, str]:
    return {case: "failed" if "failed" in value else text(value) for case, value in found.items()}


def plot(results: dict[str, Any], path: Path) -> None:
    """Growth over the batch, step time, growth over the image: a panel for each measured."""
    from matplotlib.figure import Figure

    panels = []
    for depth, lines in _by_depth(results):
        panels.append((_draw_lines, lines, f"samples, depth {depth}"))
    if "time" in results:
        panels.append((_draw_times, results["time"], "seconds a step"))
    if "resolution" in results:
        panels.append((_draw_lines, results["resolution"], "tokens of one image"))
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (draw, found, label) in zip(axes[0], panels, strict=True):
        draw(axis, {case: found[case] for case in _sound(found)})
        axis.set_xlabel(label)
    save_picture(figure, path)


def _draw_lines(axis: Any, found: dict[str, Found]) -> None:
    for case, line in found.items():
        axis.plot(line["at"], [value / MIB for value in line["growth"]], marker="o", label=case)
    axis.set_ylabel("growth of peak memory, MiB")
    axis.set_yscale("log")
    axis.legend(fontsize="small")


def _draw_times(axis: Any, found: dict[str, Found]) -> None:
    names = list(found)[::-1]
    axis.barh(names, [found[name]["seconds"] for name in names])
