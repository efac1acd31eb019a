"""Print the JSON of a GPU benchmark as a Markdown table: thousand tokens a second (peak GiB), a column a length.

python -m benchmarks.gpu_table docs/data/h200-encoder.json
"""

import json
import sys
from pathlib import Path


def table(path: str) -> str:
    """Rows are contenders, columns lengths."""
    cases = json.loads(Path(path).read_text())["cases"]
    lengths = list(dict.fromkeys(case["length"] for case in cases))
    lines = ["| | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name in dict.fromkeys(case["name"] for case in cases):
        found = {case["length"]: case for case in cases if case["name"] == name}
        cells = [cell(found.get(length)) for length in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(case: dict | None) -> str:
    """One figure, or why there is none."""
    if case is None:
        return "-"
    return case.get("error") or f"{case['ktokens_per_s']:.0f} ({case['peak_gib']:.1f})"


if __name__ == "__main__":
    print(table(sys.argv[1]))
