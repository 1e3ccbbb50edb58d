"""How long do requests wait under each policy? Draws a comparison's CSV, one line per request.

`python -m benchmarks.report.plot_ttft benchmarks/results/real.csv` draws `real.svg` again.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.report.svg import prepare_svg, save_svg
from router.simulation.variant import OURS

_PANELS = ("short", "long")


def plot_ttft(path: Path) -> Path:
    """Draw which share of requests waits longer than each time. Return the figure's path."""
    ttft_s: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in _PANELS}
    policies: dict[str, None] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            policies[row["policy"]] = None
            if row["ttft_s"]:
                ttft_s[row["kind"]][row["policy"]].append(float(row["ttft_s"]))
    prepare_svg()
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(10, 4), layout="constrained")
    for panel, kind in zip(panels, _PANELS, strict=True):
        for number, policy in enumerate(sorted(policies)):
            values = sorted(ttft_s[kind][policy])
            if not values:
                continue
            left = [1.0 - rank / len(values) for rank in range(len(values))]
            ours = policy == OURS
            panel.step(
                values,
                left,
                where="post",
                label=policy,
                color="black" if ours else f"C{number % 10}",
                linewidth=2.5 if ours else 1.2,
                zorder=3 if ours else 2,
            )
        panel.set(
            title=f"{kind} prompts",
            xlabel="time to first token, s",
            ylabel="share of requests that wait longer",
            xscale="log",
            yscale="log",
        )
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        panel.grid(which="major", alpha=0.3)
    panels[0].legend(fontsize=8)
    return save_svg(figure, path.with_suffix(".svg"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(plot_ttft(Path(name)))
