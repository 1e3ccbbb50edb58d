"""Trains the weights that come with the package.

    python -m benchmarks.policies.predictor.train --traces DIR

From the instruction set alone, so that other sources can judge what was learned. Licences:
`sources.LICENCES`.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

from rich.console import Console

from benchmarks.policies.predictor.sources import INSTRUCTIONS, LICENCES, read_examples
from benchmarks.policies.predictor.training import train
from serving.gateway.intake.length.weights import FILE, save_weights

console = Console()


def main() -> int:
    options = parse_traces(__doc__ or "")
    examples = read_examples(options.traces, INSTRUCTIONS) if options.traces else []
    if not examples:
        console.print(f"no {INSTRUCTIONS} in {options.traces}: --traces DIR (docs/predictor.md)")
        return 1
    save_weights(*train(examples))
    for source, number in Counter(each.source for each in examples).items():
        console.print(f"{source}: {number:,} ({LICENCES.get(source, 'licence unknown')})")
    console.print(f"{FILE.name}: {FILE.stat().st_size / 2**20:.2f} MiB")
    return 0


def parse_traces(doc: str, *further: tuple[str, object]) -> argparse.Namespace:
    """Return the command line's options: where the data is, and `further` ones with defaults."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    environment = os.environ.get("HEADWAY_TRACES")
    default = Path(environment) if environment else None
    parser.add_argument("--traces", type=Path, metavar="DIR", default=default)
    for name, value in further:
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--dry", action="store_true", help="show the tables, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
