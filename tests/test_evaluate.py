"""Catches an evaluation that counts the wrong rows, mixes up domains, or promises a tau that sampling does not give.

The target is the bigram table of tiny_drafts; what a lossless engine does with it can be computed. Shapes: V tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_datasets import Shape, make_dataset
from tiny_drafts import TableDraft, table, write_bigrams, write_target

from distill_pipe.cli import main
from distill_pipe.consume.evaluate import CHAINED, GREEDY, LENGTHS, SAMPLED_TEXT, evaluate, evaluate_draft
from distill_pipe.consume.train import TrainSettings, train
from distill_pipe.errors import UsageError


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigrams(tmp_path_factory.mktemp("bigrams"), 200, tokens=(40, 60))


def noisy_table() -> np.ndarray:
    return table() + np.random.default_rng(5).normal(0, 1, (32, 32)).astype(np.float32)


def true_taus() -> list[float]:
    """Tokens per step in the long run. M: a drafted token is accepted and is y. R: the target puts y behind it."""
    p_VV, q_VV = (torch.from_numpy(t).double().softmax(1).numpy() for t in (table(), noisy_table()))
    accepted_VV = np.minimum(p_VV, q_VV)
    taus = []
    for drafted in LENGTHS:
        powers = [np.linalg.matrix_power(accepted_VV, k) for k in range(drafted + 1)]
        step_VV = sum(m_VV @ (p_VV - accepted_VV) for m_VV in powers[:-1]) + powers[-1] @ p_VV
        anchors_V = np.linalg.matrix_power(step_VV, 200)[0]
        taus.append(1 + float(anchors_V @ sum(m_VV.sum(1) for m_VV in powers[1:])))
    return taus


def test_tau_is_what_a_lossless_engine_reaches_in_the_long_run(root: Path, target: Path) -> None:
    found = evaluate_draft(root, TableDraft(target, known_VV=noisy_table()), 2, temperatures=[1.0]).domains[0]
    assert [length.drafted for length in found.lengths] == list(LENGTHS)
    for length, tau in zip(found.lengths, true_taus(), strict=True):
        assert 0 < length.tau.error < 0.05
        assert length.tau.mean == pytest.approx(tau, abs=4 * length.tau.error)


def test_a_draft_that_copies_the_target_has_everything_accepted(root: Path, target: Path) -> None:
    for domain in evaluate_draft(root, TableDraft(target), 2).domains:
        assert [length.tau.mean for length in domain.lengths] == pytest.approx([k + 1 for k in LENGTHS], abs=1e-3)
        assert [p.alpha.mean for p in domain.positions] == pytest.approx([1] * 8, abs=1e-4)


def test_traces_are_sorted_into_domains_and_only_held_out_ones_counted(root: Path, target: Path) -> None:
    found = evaluate_draft(root, TableDraft(target, known_VV=noisy_table()), 2)
    by_name = {(d.domain, d.temperature): d for d in found.domains}
    assert set(by_name) == {(name, t) for name in (None, "code", "general") for t in (0.0, 1.0)}
    whole, code, general = (by_name[name, 1.0] for name in (None, "code", "general"))
    assert (whole.traces, code.traces, general.traces) == (100, 50, 50)
    for all_rows, one, other in zip(whole.positions, code.positions, general.positions, strict=True):
        assert all_rows.rows == one.rows + other.rows
        assert all_rows.alpha.mean * all_rows.rows == pytest.approx(one.alpha.mean * one.rows
                                                                    + other.alpha.mean * other.rows)
        assert all_rows.lower <= all_rows.alpha.mean + 0.01 <= all_rows.upper + 0.02


def test_greedy_acceptance_is_how_often_both_have_the_same_favourite(root: Path, target: Path) -> None:
    found = evaluate_draft(root, TableDraft(target, known_VV=noisy_table()), 2, temperatures=[0.0]).domains[0]
    same_V = table().argmax(1) == noisy_table().argmax(1)
    assert found.positions[0].alpha.mean == pytest.approx(same_V.mean(), abs=0.1)
    assert found.positions[0].lower == found.positions[0].upper == found.positions[0].alpha.mean


def test_what_tau_rests_on_is_said(root: Path, target: Path, tmp_path: Path) -> None:
    assert evaluate_draft(root, TableDraft(target), 2, temperatures=[0.0, 0.7, 1.0]).assumptions == {
        0.0: GREEDY, 0.7: CHAINED, 1.0: SAMPLED_TEXT}
    make_dataset(tmp_path, 10, Shape(vocab_size=32, hidden_size=32))
    assert evaluate_draft(tmp_path, TableDraft(target), 2, temperatures=[1.0]).assumptions == {1.0: CHAINED}


def test_a_trained_draft_is_evaluated_by_the_command_on_what_it_has_not_seen(
        root: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(arch="medusa", positions=3, steps=25, lr=1e-2, batch_tokens=256, holdout_every=4)
    trained = train(root, target, settings, out=tmp_path)
    found = evaluate(root, tmp_path, target)
    whole = next(d for d in found.domains if d.domain is None and d.temperature == 1)
    assert [p.alpha.mean for p in whole.positions] == pytest.approx([a.alpha for a in trained.after], abs=1e-4)
    assert [length.drafted for length in whole.lengths] == [1, 2, 3]
    monkeypatch.setattr("sys.argv", ["distill-pipe", "evaluate", str(root), "--draft", str(tmp_path), "--target",
                                     str(target), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["domains"][0]["traces"] == 50


def test_what_cannot_be_evaluated_is_refused_with_a_reason(root: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"temperature 1\.5"):
        evaluate_draft(root, TableDraft(target), 2, temperatures=[1.5])
    with pytest.raises(UsageError, match="no trace is held out"):
        evaluate_draft(root, TableDraft(target), 1000)
    with pytest.raises(UsageError, match="not a draft"):
        evaluate(root, tmp_path, target)
    train(root, target, TrainSettings(steps=1, positions=1), out=tmp_path / "draft")
    make_dataset(tmp_path / "other", 10, Shape(vocab_size=48))
    with pytest.raises(UsageError, match="the dataset's has 8 and 48"):
        evaluate(tmp_path / "other", tmp_path / "draft", target)
