"""How do the policies' figures go over the load? Draws a sweep's CSV file, one line per run.

`python -m benchmarks.report.plot_sweep benchmarks/results/sim.csv` draws its figures again.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from benchmarks.report.svg import prepare_svg, save_svg
from router.simulation.figures import knee
from router.simulation.variant import OURS

_PANELS = {
    "short_ttft_p99_s": "TTFT p99 of short prompts, s",
    "ttft_p99_s": "TTFT p99, s",
    "goodput": "goodput",
}
Lines = dict[str, dict[float, list[float]]]  # by policy and load


def plot_sweep(path: Path) -> list[Path]:
    """Draw figures over the load, one file per size of fleet. Return their paths.

    A dot marks the knee of each curve. Ablations are in the tables only.
    """
    fleets: dict[int, dict[str, dict[str, Lines]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    )
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            workload = row["workload"].partition("/")[0]
            for panel in _PANELS:
                if row[panel] not in ("", "nan") and ":" not in row["variant"]:
                    lines = fleets[int(row["num_engines"])][workload][panel]
                    lines[row["variant"]][float(row["load"])].append(float(row[panel]))
    prepare_svg()
    return [
        _plot(path.with_name(f"{path.stem}-{num_engines}.svg"), num_engines, workloads)
        for num_engines, workloads in fleets.items()
    ]


def _plot(path: Path, num_engines: int, workloads: dict[str, dict[str, Lines]]) -> Path:
    figure, grid = plt.subplots(
        len(workloads),
        len(_PANELS),
        figsize=(4 * len(_PANELS), 3 * len(workloads)),
        layout="constrained",
        squeeze=False,
    )
    for row, (workload, panels) in zip(grid, workloads.items(), strict=True):
        for axes, (name, title) in zip(row, _PANELS.items(), strict=True):
            for number, (policy, by_load) in enumerate(sorted(panels[name].items())):
                loads = sorted(by_load)
                values = [mean(by_load[load]) for load in loads]
                ours = policy == OURS
                color = "black" if ours else f"C{number % 10}"
                axes.plot(
                    loads,
                    values,
                    label=policy,
                    color=color,
                    linewidth=2.5 if ours else 1.2,
                    linestyle="--" if policy == "clairvoyant" else "-",
                    zorder=3 if ours else 2,
                )
                if name == "ttft_p99_s" and (load := knee(loads, values)) is not None:
                    axes.plot(load, values[loads.index(load)], "o", color=color, zorder=4)
            axes.set(title=f"{workload}: {title}", xlabel="load")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            if name != "goodput":
                axes.set_yscale("log")
            axes.grid(which="major", alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.suptitle(f"simulated, {num_engines} engines; dots mark knees")
    return save_svg(figure, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*plot_sweep(Path(name)))
