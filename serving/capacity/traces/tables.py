"""How are traces in tables read? A time and two sizes per line (Azure, ServeGen, BurstGPT)."""

import csv
from collections.abc import Iterable, Iterator
from datetime import datetime

from router.simulation.workload.workload import Arrival

# The names in public traces of the same three columns, and of the sender.
_TIME = ("arrival_s", "timestamp", "arrived_at")
_PROMPT = ("input_tokens", "contexttokens", "request tokens", "num_prefill_tokens")
_OUTPUT = ("output_tokens", "generatedtokens", "response tokens", "num_decode_tokens")
_SENDER = ("client", "client_id", "tenant")


def arrivals(lines: Iterable[str]) -> Iterator[Arrival]:
    """Yield the requests of a CSV file with a header line.

    Times are seconds or dates (`2023-11-16 18:15:46.6805900`). Lines without a prompt or without a
    reply (failed requests, in BurstGPT) are left out. Raises `ValueError` where a column is missing
    or is no number.
    """
    rows = csv.DictReader(lines)
    columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
    time, prompt, output = (_column(columns, names) for names in (_TIME, _PROMPT, _OUTPUT))
    sender = next((columns[name] for name in _SENDER if name in columns), None)
    for row in rows:
        num_prompt_tokens, num_output_tokens = int(float(row[prompt])), int(float(row[output]))
        if num_prompt_tokens > 0 and num_output_tokens > 0:
            yield Arrival(
                offset_s=_seconds(row[time]),
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=num_output_tokens,
                tenant=row[sender] if sender else "",
            )


def _column(columns: dict[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if name in columns:
            return columns[name]
    raise ValueError(f"no column {' or '.join(names)} among {', '.join(columns) or 'none'}")


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # Azure's dates have seven decimals; Python reads six.
        whole, point, fraction = text.strip().partition(".")
        digits = fraction.rstrip("Z").split("+")[0]
        seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp()
        return seconds + (float(f"0.{digits}") if point else 0.0)
