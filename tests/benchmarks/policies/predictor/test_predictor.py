"""The evaluation and the training, on a made-up set whose lengths follow from the wording."""

import numpy as np
import pytest

from benchmarks.policies.predictor import __main__ as evaluation
from benchmarks.policies.predictor.baselines import BASELINES
from benchmarks.policies.predictor.sources import logs, made_up, read_examples
from benchmarks.policies.predictor.training import matrix, train
from router.estimators.lengths.text_model import TextModel
from serving.gateway.intake.length import weights
from serving.gateway.intake.length.cues import FIRST_WORD

KNOWN, ASKED = made_up(400, 1), made_up(200, 2)


def test_weights_score_as_the_router_scores_them():
    found, _ = train(KNOWN[:100])
    text = TextModel(found.tolist(), FIRST_WORD)
    expected = matrix(ASKED[:20]) @ found
    assert [text.score(each.wording) for each in ASKED[:20]] == pytest.approx(list(expected))


def test_what_is_trained_ranks_what_it_has_not_seen():
    found, prior = train(KNOWN)
    lengths = evaluation._lengths(found, prior)
    figures = evaluation._of_forecasts([lengths.forecast(e.request()) for e in ASKED], ASKED)
    assert figures["tau"] > 0.7
    assert figures["MAE, log tokens"] < 0.45
    learning = evaluation._of_forecasts(evaluation._learning(lengths, ASKED), ASKED)
    assert 0.7 <= learning["80 %"] <= 0.9
    assert learning["pinball"] < figures["pinball"]


def test_baselines_are_judged_alike():
    taus = {
        name: evaluation._of_points(learn(KNOWN)(ASKED), ASKED)["tau"]
        for name, learn in BASELINES.items()
    }
    assert taus["constant"] == 0.0
    assert taus["cues alone"] > 0.5
    assert taus["TF-IDF and ridge"] > 0.5


def test_it_runs_without_data(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["eval", "--folds", "2", "--dry", "--traces", str(tmp_path)])
    assert evaluation.main() == 0
    assert "made-up" in capsys.readouterr().out


def test_weights_are_written_and_read(monkeypatch, tmp_path):
    file = tmp_path / "weights.npz"
    found, prior = train(KNOWN[:100])
    weights.save_weights(found, prior, file)
    monkeypatch.setattr(weights, "FILE", file)
    weights._read.cache_clear()
    try:
        read, read_prior = weights._read()
    finally:
        weights._read.cache_clear()
    assert read_prior == prior
    assert np.abs(np.array(read) - found).max() < 2e-3


def test_examples_are_read(tmp_path):
    line = '{"source": "a", "prompt": "Explain it", "output_tokens": 0, "input_tokens": 3}\n'
    (tmp_path / "some_prompts.jsonl").write_text(line)
    (found,) = read_examples(tmp_path, "some_*")
    assert (found.source, found.num_prompt_tokens, found.num_output_tokens) == ("a", 3, 1)
    assert found.request().wording == found.wording
    assert list(logs([found])) == [0.0]
    assert read_examples(tmp_path, "other_*") == []


def test_the_shipped_weights_are_small():
    assert weights.FILE.stat().st_size < 5 * 2**20
