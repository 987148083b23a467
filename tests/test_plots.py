"""Figures hold the numbers they are made of, whatever runs and texts they get."""

import io
import json
import math

import numpy as np
import pytest

from llamagym.buffer import Episode, Turn
from llamagym.plots import column, history_of, mean_and_confidence, plot_episode, plot_run, plot_runs, t_quantile
from llamagym.tiny import tiny_tokenizer
from llamagym.trainer import Run


def made(returns, first=1, **more) -> list[dict]:
    return [dict(update=first + i, mean_return=float(r), seconds=2.0, collect_seconds=1.5, **more) for i, r in enumerate(returns)]


def drawn(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_confidence_holds_as_often_as_it_says():
    """95 of 100 intervals of five normal numbers hold their mean; with 1.96 instead of t it would be 88"""
    numbers = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 20_000))
    mean, half = mean_and_confidence(numbers)
    assert np.mean(np.abs(mean - 3.0) <= half) == pytest.approx(0.95, abs=0.005)
    assert np.mean(np.abs(mean - 3.0) <= half * 1.96 / t_quantile(4)) < 0.9
    assert t_quantile(1, 0.5) == pytest.approx(1.0) and t_quantile(10_000) == pytest.approx(1.95996, abs=3e-4)
    assert math.isnan(mean_and_confidence(numbers[:1])[1][0])
    with pytest.raises(ValueError, match="df=0"):
        t_quantile(0)


def test_plot_runs_takes_what_all_runs_have():
    """Runs of different length, one resumed later than the others; smoothed, and by name"""
    random = np.random.default_rng(1)
    a, b, c = random.normal(size=8), random.normal(size=6), random.normal(size=8)
    runs = dict(one=[made(a), made(b), made(c[2:], first=3)], two=[made(a)])
    figure = plot_runs(runs, references={"random $x_{": 0.0})
    ax = figure.axes[0]
    thick = [line for line in ax.lines if line.get_linewidth() == 2]
    values = np.array([a[2:6], b[2:6], c[2:6]])
    assert thick[0].get_xdata().tolist() == [3, 4, 5, 6] and thick[0].get_ydata() == pytest.approx(values.mean(0))
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((values.mean(0) + t_quantile(2) * values.std(0, ddof=1) / 3**0.5).max())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one: mean of 3 runs", "95% confidence", "two: mean of 1 run"]
    assert drawn(figure)
    smooth = [line for line in plot_runs([made(a)], smooth=3).axes[0].lines if line.get_linewidth() == 2][0]
    assert smooth.get_ydata() == pytest.approx([a[i : i + 3].mean() for i in range(6)]) and smooth.get_xdata()[0] == 3
    with pytest.raises(ValueError, match="0 updates with 'mean_return' in common"):
        plot_runs([made(a), made(b, first=50)])
    with pytest.raises(ValueError, match="smooth=0"):
        plot_runs([made(a)], smooth=0)


def test_plot_run_of_whatever_holds_one(tmp_path):
    """What fit returns, a folder, a file, metrics of an older run; known returns are lines"""
    history = made([0.1, 0.2, 0.3], std_return=0.5, eval_return=0.4, ref_kl=0.01)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)) + "\n")
    run = Run(tmp_path, history, None, False, {"random": -1.0, "optimal": 1.0, "other": 0.0})
    for what in (run, tmp_path, str(tmp_path / "metrics.jsonl"), history):
        assert history_of(what) == history
        figure = plot_run(what)
        assert figure.axes[0].lines[0].get_ydata().tolist() == [0.1, 0.2, 0.3] and drawn(figure)
        assert [text.get_text() for text in figure.axes[0].texts] == (["random -1", "optimal 1"] if what is run else [])
    assert drawn(plot_run(made([0.1])))
    assert column(made([1, 2]) + made([3], x=1.0), "x")[2] == 1.0
    with pytest.raises(ValueError, match="has no updates"):
        plot_run([])


def test_plot_episode_of_any_text():
    """Formulas, control characters and markup that a model said are text"""
    tokenizer = tiny_tokenizer()
    said = "$\\frac{ <b>_^\x1b\n$"
    ids = tokenizer.encode(said, add_special_tokens=False)
    n = len(ids)
    turn = Turn("o", said, ids, reward=-2.0, logprobs=-np.arange(1.0, n + 1), entropy=np.ones(n), valid=False, value=0.5)
    other = Turn("o", "x", reward=1.5, terminated=True)
    figure = plot_episode(Episode([turn, other], env_id="$x_{"), tokenizer)
    above, below = figure.axes
    assert sorted(patch.get_height() for patch in above.patches) == [-2.0, 1.5]
    assert [patch.get_height() for patch in below.patches] == list(range(1, n + 1)) and len(below.get_xticklabels()) == n
    assert drawn(figure)
    assert len(plot_episode(Episode([other])).axes) == 1
