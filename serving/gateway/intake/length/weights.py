"""The weights that come with the package: trained by `make train-predictor`."""

import array
import functools
from pathlib import Path

import numpy as np

from router.estimators.lengths.predicted import PredictedLengths
from router.estimators.lengths.text_model import TextModel
from serving.gateway.intake.length.cues import FIRST_WORD

FILE = Path(__file__).with_name("weights.npz")


def save_weights(weights: np.ndarray, prior_log_tokens: float, file: Path = FILE) -> None:
    """Write weights in half precision, [num_features]: a thousandth of each is enough."""
    np.savez_compressed(
        file, weights=weights.astype(np.float16), prior_log_tokens=np.float64(prior_log_tokens)
    )


@functools.cache
def _read() -> "tuple[array.array[float], float]":
    with np.load(FILE) as found:
        weights = array.array("d", found["weights"].astype(np.float64).tobytes())
        return weights, float(found["prior_log_tokens"])


def shipped_lengths() -> PredictedLengths:
    """Return a source of forecasts that knows what the package knows, and nothing of its users."""
    weights, prior_log_tokens = _read()
    return PredictedLengths(TextModel(weights, FIRST_WORD), prior_log_tokens)
