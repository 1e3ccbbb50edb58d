"""How do memory and queue go in an overload? Draws what its monitor wrote, one line per second.

`python -m benchmarks.report.plot_overload benchmarks/results/overload.csv` draws `overload.svg`
again.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.report.svg import prepare_svg, save_svg

_MIN_LABELLED = 0.05  # of the whole time: shorter phases have no room for their name


def plot_overload(path: Path, bound_mb: float | None = None) -> Path:
    """Draw memory and queue over time, phases shaded. Return the figure's path.

    `bound_mb` is the gateway's stated bound.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    at_s = [float(row["at_s"]) for row in rows]
    prepare_svg()
    figure, (memory, queue) = plt.subplots(
        2, 1, figsize=(9, 5), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    for name, label, color in (
        ("gateway_mb", "gateway", "black"),
        ("engines_mb", "emulated engines together", "C0"),
    ):
        memory.plot(at_s, [float(row[name]) for row in rows], label=label, color=color)
    if bound_mb is not None:
        memory.axhline(bound_mb, color="C3", linestyle="--", label="bound of the gateway")
    memory.set(ylabel="resident memory, MB", ylim=(0, None))
    memory.legend(loc="center right")
    queue.plot(at_s, [int(row["num_held"]) for row in rows], color="black", label="held")
    queue.plot(at_s, [int(row["num_placed"]) for row in rows], color="C0", label="at engines")
    queue.set(ylabel="requests", xlabel="seconds", ylim=(0, None))
    queue.legend(loc="upper right")
    starts = [0, *(n for n in range(1, len(rows)) if rows[n]["phase"] != rows[n - 1]["phase"])]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(rows) - 1], strict=True)):
        for panel in (memory, queue):
            panel.axvspan(at_s[start], at_s[end], color="C7", alpha=0.12 * (number % 2), lw=0)
        if at_s[end] - at_s[start] > _MIN_LABELLED * at_s[-1]:
            memory.annotate(
                rows[start]["phase"],
                (at_s[start], 1.01),
                xycoords=("data", "axes fraction"),
                fontsize=7,
            )
    for panel in (memory, queue):
        panel.grid(alpha=0.3)
    return save_svg(figure, path.with_suffix(".svg"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(plot_overload(Path(name)))
