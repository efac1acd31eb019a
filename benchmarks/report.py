"""Tables and pictures from the JSON of a suite."""

import json
import statistics
from pathlib import Path
from typing import Any


def table(path: Path) -> str:
    """Markdown: a row a contender, a column a length; thousand tokens a second or ms a step, and peak GiB.

    A suite on a CPU has a row for each job and contender, after a line about the machine.
    """
    result = json.loads(path.read_text())
    if "rows" in result:
        known = {key.replace("_", " "): value for key, value in result["machine"].items() if key != "settings"}
        facts = ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()
        )
        return f"{facts}\n\n{comparison(result['rows'])}"
    rows = result["loads"] if "loads" in result else result["cases"]
    if "burst" in rows[0]:
        return loads(rows)
    if "causal" in rows[0]:
        return layer_memory(rows)
    lengths = sorted({case["length"] for case in result["cases"]})
    lines = ["| | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, found in contenders(result).items():
        lines.append(
            f"| {name} | " + " | ".join(cell(found.get(n), result.get("unit", "ktokens_per_s")) for n in lengths) + " |"
        )
    return "\n".join(lines)


def compare(old: list[Path], new: list[Path]) -> str:
    """Markdown: the milliseconds of each case in the files of one checkout and of another, medians over the files."""
    found: list[dict[tuple[str, int], list[float]]] = [{}, {}]
    for times, paths in zip(found, (old, new), strict=True):
        for case in (case for path in paths for case in json.loads(path.read_text())["cases"] if "error" not in case):
            times.setdefault((case["name"], case["length"]), []).append(shown(case, "ms"))
    lines = ["| case | length | old, ms | new, ms | new / old |", "|---|---:|---:|---:|---:|"]
    for name, length in (key for key in found[0] if key in found[1]):
        a, b = (statistics.median(times[name, length]) for times in found)
        lines.append(f"| {name} | {length:,} | {a:.3f} | {b:.3f} | {b / a:.3f} |")
    return "\n".join(lines)


def loads(rows: list[dict]) -> str:
    """What a card gives: a row a load."""
    lines = ["| | in a burst | under load | clock, MHz | power, W | held back by |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        digits = 2 if row["unit"] == "TB/s" else 0
        lines.append(
            f"| {row['name']} | {row['burst']:.{digits}f} {row['unit']} | {row['load']:.{digits}f} {row['unit']} | "
            f"{row.get('sm_mhz', 0):,.0f} | {row.get('watts', 0)} | {row.get('held_back_by', '-')} |"
        )
    return "\n".join(lines)


def layer_memory(rows: list[dict]) -> str:
    """Peak memory and time of a SEA layer: a row a case."""
    lines = ["| | peak | time |", "|---|---:|---:|"]
    for row in rows:
        what = f"{'training step' if row['step'] else 'forward'}, {'causal' if row['causal'] else 'bidirectional'}"
        sampled = ", attention losses on 64 sampled rows" if row["step"] else ""
        peak, seconds = f"{row['peak_gib']:.2f} GiB", f"{row['seconds']:.0f} s"
        lines.append(f"| {what}, {row['tokens']:,} tokens{sampled} | {peak} | {seconds} |")
    return "\n".join(lines)


# Size, tokens -> how many times as fast as BERT with SDPA our encoder should be on a CPU, forward, float32.
DANET_AIMS = {("30m", 128): 1.2, ("30m", 4096): 2.5, ("30m", 16384): 6.0} | {
    ("330m", 128): 1.2, ("330m", 4096): 1.4, ("330m", 16384): 2.8,
}  # fmt: skip


def danet_aims(folder: Path) -> str:
    """DANet's aims on a CPU beside what was measured and what the operation counts give, from the JSON in `folder`."""
    lines = ["| parameters | tokens a row | aim | reached (quartiles) | by operations | reached of it |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for (size, length), aim in DANET_AIMS.items():
        rows = json.loads((folder / f"cpu-danet-forward-{size}.json").read_text())["rows"]
        found = [r for r in rows if r["job"].endswith(f" x {length:,} tokens") and r["contender"].startswith("BERT")]
        reached = ["not measured", "", ""]
        for row in found:
            low, high = row["speed_ratio_quartiles"]
            ratio, bound = row["speed_ratio"], row["operations_ratio"]
            reached = [f"{ratio:.2f} ({low:.2f}-{high:.2f})", f"{bound:.2f}", f"{ratio / bound:.0%}"]
        lines.append(f"| {size.upper()} | {length:,} | {aim} | {' | '.join(reached)} |")
    return "\n".join(lines)


def contenders(result: dict) -> dict[str, dict[int, dict]]:
    """Name -> length -> row, in the order of the run."""
    names: dict[str, dict[int, dict]] = {}
    for case in result["cases"]:
        names.setdefault(case["name"], {})[case["length"]] = case
    return names


def cell(case: dict | None, unit: str) -> str:
    """One figure, or why there is none."""
    if case is None:
        return "-"
    if "error" in case:
        return case["error"].split(":")[0]
    value = shown(case, unit)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    memory = f" ({case['peak_gib']:.1f})" if "peak_gib" in case else ""
    return f"{value:,.{digits}f}{memory}"


def shown(case: dict, unit: str) -> float:
    """The number of a row; of a loop that makes tokens, what one more token takes."""
    return case.get("ms_a_token", case["ms"]) if unit == "ms" else case[unit]


def _plain(value: float, position: int) -> str:
    """A tick as a number without a power of ten, where that begins with 1, 2 or 5."""
    return f"{value:,.10g}" if f"{value:e}"[0] in "125" else ""


def picture(path: Path, target: Path) -> None:
    """Speed (with the limit of the matrix units) and peak memory against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    result = json.loads(path.read_text())
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    limits: dict[int, float] = {}
    for number, (name, found) in enumerate(contenders(result).items()):
        style = {"color": f"C{number % 10}", "marker": "os^D"[number // 10], "linestyle": ("-", "--")[number // 10 % 2]}
        rows = [found[n] for n in sorted(found) if "error" not in found[n]]
        for n, row in found.items():  # of contenders that count different operations, the fewest
            limits[n] = max(limits.get(n, 0.0), row.get("limit_ktokens_per_s", 0.0))
        if rows:
            lengths = [row["length"] for row in rows]
            speed.plot(lengths, [shown(row, result["unit"]) for row in rows], label=name, **style)
            if all("peak_gib" in row for row in rows):
                memory.plot(lengths, [row["peak_gib"] for row in rows], **style)
    if any(limits.values()) and result["unit"] == "ktokens_per_s":
        lengths = sorted(limits)
        speed.plot(lengths, [limits[n] for n in lengths], "k:", label="matrix units at 790 TFLOP/s, fewest operations")
    units = {"ktokens_per_s": "thousand tokens a second", "ms": "milliseconds"}
    for axes, label in ((speed, units[result["unit"]]), (memory, "peak memory, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens a row", ylabel=label)
        axes.grid(True, which="both", alpha=0.3)
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(FuncFormatter(_plain))
        axes.tick_params(axis="y", which="minor", labelsize=7)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{result['suite']}: {result['device']}, torch {result['torch']}, {result['date']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def comparison(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; the ratio is ours over theirs, above 1 where we are faster; beside a host below 1.

    Where operations were counted, the ratio stands beside what they alone would give, and divided by that.
    """
    counted = any("operations_ratio" in row for row in rows)
    of_host = "(SDPA)" in rows[0]["contender"]  # the host of converted models comes first, not ours
    ratio = "times the host's time (quartiles)" if of_host else "ours / theirs (quartiles)"
    heading = ["job", "model", "tokens per second (quartiles)", ratio]
    heading += ["by operations", "reached of it"] * counted + ["peak memory"]
    lines = [heading]
    for row in rows:
        low, high = row["tokens_per_second_quartiles"]
        ratio_low, ratio_high = row["speed_ratio_quartiles"]
        line = [row["job"], row["contender"], f"{row['tokens_per_second']:,.0f} ({low:,.0f}-{high:,.0f})"]
        other = row["speed_ratio"] != 1
        line.append(f"{row['speed_ratio']:.2f} ({ratio_low:.2f}-{ratio_high:.2f})" if other else "")
        if counted:
            bound = row.get("operations_ratio")
            line += [f"{bound:.2f}", f"{row['speed_ratio'] / bound:.0%}"] if other and bound else ["", ""]
        line.append("-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:,.0f} MiB")
        lines.append(line)
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---|---|" + "---:|" * (len(heading) - 2), *body])
