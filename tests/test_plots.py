"""Figures show the numbers of their runs and episodes and render any text."""

import io
import json
import math

import numpy as np
import pytest

from llamagym.episodes.episode import Episode, Turn
from llamagym.models.tiny import tiny_tokenizer
from llamagym.trainer import TrainingRun
from llamagym.widgets.plots import (
    column,
    history_of,
    mean_and_confidence,
    plot_episode,
    plot_run,
    plot_runs,
    t_quantile,
)


def make_history(returns, first=1, **metrics) -> list[dict]:
    return [
        dict(update=first + i, mean_return=float(r), seconds=2.0, collect_seconds=1.5, **metrics)
        for i, r in enumerate(returns)
    ]


def render_png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_confidence_intervals_have_the_nominal_coverage():
    """95% of the intervals contain the mean; with 1.96 instead of the t quantile, only 88% do"""
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 20_000))
    mean, half_width = mean_and_confidence(samples)
    assert np.mean(np.abs(mean - 3.0) <= half_width) == pytest.approx(0.95, abs=0.005)
    assert np.mean(np.abs(mean - 3.0) <= half_width * 1.96 / t_quantile(4)) < 0.9
    assert t_quantile(1, 0.5) == pytest.approx(1.0) and t_quantile(10_000) == pytest.approx(
        1.95996, abs=3e-4
    )
    assert math.isnan(mean_and_confidence(samples[:1])[1][0])
    with pytest.raises(ValueError, match="df=0"):
        t_quantile(0)


def test_plot_runs_uses_the_common_updates():
    """Runs may have different lengths, and one may be resumed later than the others"""
    rng = np.random.default_rng(1)
    a, b, c = rng.normal(size=8), rng.normal(size=6), rng.normal(size=8)
    runs = dict(
        one=[make_history(a), make_history(b), make_history(c[2:], first=3)], two=[make_history(a)]
    )
    figure = plot_runs(runs, references={"random $x_{": 0.0})
    ax = figure.axes[0]
    thick = [line for line in ax.lines if line.get_linewidth() == 2]
    values = np.array([a[2:6], b[2:6], c[2:6]])
    assert thick[0].get_xdata().tolist() == [3, 4, 5, 6] and thick[0].get_ydata() == pytest.approx(
        values.mean(0)
    )
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(
        (values.mean(0) + t_quantile(2) * values.std(0, ddof=1) / 3**0.5).max()
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "one: mean of 3 runs",
        "95% confidence",
        "two: mean of 1 run",
    ]
    assert render_png(figure)
    smooth = [
        line
        for line in plot_runs([make_history(a)], smooth=3).axes[0].lines
        if line.get_linewidth() == 2
    ][0]
    assert (
        smooth.get_ydata() == pytest.approx([a[i : i + 3].mean() for i in range(6)])
        and smooth.get_xdata()[0] == 3
    )
    with pytest.raises(ValueError, match="0 updates with 'mean_return' in common"):
        plot_runs([make_history(a), make_history(b, first=50)])
    with pytest.raises(ValueError, match="smooth=0"):
        plot_runs([make_history(a)], smooth=0)


def test_plot_run_accepts_run_folder_file_and_metrics(tmp_path):
    """Reference returns of a training run are drawn as lines"""
    history = make_history([0.1, 0.2, 0.3], std_return=0.5, eval_return=0.4, ref_kl=0.01)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)) + "\n")
    run = TrainingRun(
        tmp_path, history, None, False, {"random": -1.0, "optimal": 1.0, "other": 0.0}
    )
    for source in (run, tmp_path, str(tmp_path / "metrics.jsonl"), history):
        assert history_of(source) == history
        figure = plot_run(source)
        assert figure.axes[0].lines[0].get_ydata().tolist() == [0.1, 0.2, 0.3] and render_png(
            figure
        )
        assert [text.get_text() for text in figure.axes[0].texts] == (
            ["random -1", "optimal 1"] if source is run else []
        )
    assert render_png(plot_run(make_history([0.1])))
    assert column(make_history([1, 2]) + make_history([3], x=1.0), "x")[2] == 1.0
    with pytest.raises(ValueError, match="'mean_length' is called 'mean_episode_length' now"):
        column(make_history([1, 2]), "mean_length")
    with pytest.raises(ValueError, match="has no updates"):
        plot_run([])


def test_plot_episode_renders_any_text():
    """Formulas, control characters and markup in a response are drawn as text"""
    tokenizer = tiny_tokenizer()
    response = "$\\frac{ <b>_^\x1b\n$"
    ids = tokenizer.encode(response, add_special_tokens=False)
    n = len(ids)
    turn = Turn(
        "o",
        response,
        ids,
        reward=-2.0,
        logprobs=-np.arange(1.0, n + 1),
        entropy=np.ones(n),
        valid=False,
        value=0.5,
    )
    other = Turn("o", "x", reward=1.5, terminated=True)
    figure = plot_episode(Episode([turn, other], env_id="$x_{"), tokenizer)
    top, bottom = figure.axes
    assert sorted(patch.get_height() for patch in top.patches) == [-2.0, 1.5]
    assert [patch.get_height() for patch in bottom.patches] == list(range(1, n + 1)) and len(
        bottom.get_xticklabels()
    ) == n
    assert render_png(figure)
    assert len(plot_episode(Episode([other])).axes) == 1
