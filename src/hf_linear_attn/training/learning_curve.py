"""Learning curves as numbers, as a table of runs and as a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling.shared.files.whole_files import write_whole
from .files import write_text_whole


def curve_of(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Trainer's log -> {"training": [{step, loss}], "validation":
    [{step, loss}]}, one point a step, the last one if it came twice.
    """
    points: dict[str, dict[int, float]] = {"training": {}, "validation": {}}
    for entry in log_history:
        for name, key in (("training", "loss"), ("validation", "eval_loss")):
            if key in entry:
                points[name][entry["step"]] = entry[key]
    return {name: [{"step": s, "loss": loss} for s, loss in sorted(run.items())] for name, run in points.items()}


def save_curve(
    curves: Mapping[str, dict], folder: Path, tokens_per_step: Mapping[str, int] | None, title: str
) -> list[Path]:
    """Write learning_curve.json and, where matplotlib is installed, learning_curve.png. Returns the files.

    curves: label -> what `curve_of` returns; several labels share the axes. tokens_per_step: None puts steps on the axis.
    """
    data = folder / "learning_curve.json"
    write_text_whole(data, json.dumps(dict(curves), indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        print("no picture of the learning curve: pip install matplotlib")
        return [data]
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (label, curve) in enumerate(curves.items()):
        colour = f"C{number}"
        for kind, style in (
            ("training", {"alpha": 0.35, "linewidth": 1}),
            ("validation", {"marker": "o", "markersize": 4}),
        ):
            unit = tokens_per_step[label] / 1e6 if tokens_per_step else 1
            tokens = [point["step"] * unit for point in curve[kind]]
            if tokens:
                axes.plot(
                    tokens, [point["loss"] for point in curve[kind]], color=colour, label=f"{label}, {kind}", **style
                )
    words = (
        ("training tokens (million)", "loss (nats per token)")
        if tokens_per_step
        else ("optimizer steps", "loss (nats)")
    )
    axes.set(xlabel=words[0], ylabel=words[1], title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = folder / "learning_curve.png"
    write_whole(picture, lambda part: figure.savefig(part, dpi=130))
    plt.close(figure)
    return [data, picture]


def table(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text; columns: key -> heading. Numbers stand right, text stands left."""
    cells = [list(columns.values())]
    cells += [[str(row.get(key, "-")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        lines.append(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        )
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
