"""How is a plot written so that the same data give the same file?"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Plot


def prepare_svg() -> None:
    """Keep text as text, and use no random ids, in all plots from now on."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headway", "font.size": 9})


def save_svg(plot: Plot, path: Path) -> Path:
    """Write the plot without a date, and close it. Return the path."""
    plot.savefig(path, metadata={"Date": None})
    plt.close(plot)
    return path
