import dataclasses
import math
import struct

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from readable import assert_readable
from tiny_result import budgets_result, frontier_result, timed, tiny_result, with_certificate, with_layers

from lrf_lightning.plots.changes import changes_figures, draw_samples, samples_figure
from lrf_lightning.plots.layers import curves_figures, spectra_figures
from lrf_lightning.plots.pictures import PICTURES, draw, frontier_figures, layers_figures, probes_figures, ranks_figures
from lrf_lightning.plots.style import largest_layers


def size_of_png(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("picture", PICTURES)
def test_every_picture_is_a_png_of_readable_size(picture):
    (name,) = pictures = draw(frontier_result(), picture)
    assert name == picture
    width, height = size_of_png(pictures[name])
    assert 600 <= width <= 1300
    assert 200 <= height <= 2000


@pytest.mark.parametrize("draw_figures", [layers_figures, ranks_figures, spectra_figures])
@pytest.mark.parametrize("count", [3, 60])
def test_texts_do_not_overlap_with_many_layers(draw_figures, count):
    result = tiny_result() if count == 3 else with_layers(frontier_result(), count)
    assert_readable(draw_figures(result)[0])


@pytest.mark.parametrize("picture", PICTURES)
def test_sixty_layers_fit_on_a_screen(picture):
    """W&B enlarges a picture to the size of the screen and no further: what is taller is shown smaller."""
    for page in draw(with_layers(frontier_result(), 60), picture).values():
        width, height = size_of_png(page)
        assert width <= 1800
        assert height <= 1000


def test_texts_of_the_other_pictures_do_not_overlap():
    for figure in (*frontier_figures(frontier_result()), *probes_figures(frontier_result())):
        assert_readable(figure)


def test_the_frontier_shows_loss_and_score_with_errors_and_the_chosen_point():
    result = frontier_result()
    (figure,) = frontier_figures(result)
    loss, score = figure.axes
    x = [100 * point.params_model / result.params_model[0] for point in result.frontier]
    for ax, name in ((loss, "loss"), (score, "score")):
        changes = [getattr(point, f"{name}_change") for point in result.frontier]
        errors = [getattr(point, f"{name}_change_error") for point in result.frontier]
        (container,) = ax.containers
        line, _, (bars,) = container
        assert line.get_xdata() == pytest.approx(x), "a smaller model has a lower loss than the original"
        assert list(line.get_ydata()) == changes
        spans = [segment[:, 1] for segment in bars.get_segments()]
        assert [(high - low) / 2 for low, high in spans] == pytest.approx(errors)
        (chosen,) = [line for line in ax.lines if line.get_label() == "chosen"]
        assert list(chosen.get_xdata()) == pytest.approx([x[1]])
        assert list(chosen.get_ydata()) == [changes[1]]
    (margin,) = [line for line in score.lines if line.get_label() == "margin of the verdict"]
    assert set(margin.get_ydata()) == {-result.certificate.score_margin}


def test_budgets_are_drawn_with_front_knee_and_verification():
    result = budgets_result()
    (figure,) = frontier_figures(result)
    assert_readable(figure)
    for ax in figure.axes:
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        assert {"Pareto front, std. error", "not on the front", "knee of the front", "chosen"} <= set(handles)
        front = handles["Pareto front, std. error"].lines[0].get_xdata()
        assert [round(x) for x in front] == [80, 50, 20, 10]
        assert [round(x) for x in handles["not on the front"].lines[0].get_xdata()] == [30]
        assert [round(x) for x in handles["knee of the front"].get_xdata()] == [20]
        assert len(handles["verification, with its bound"].lines[0].get_xdata()) == 5


def test_timed_budgets_have_a_panel_of_speed():
    result = budgets_result()
    assert len(frontier_figures(result)[0].axes) == 2
    (figure,) = frontier_figures(timed(result))
    assert_readable(figure)
    _, height = size_of_png(draw(timed(result), "frontier")["frontier"])
    assert height <= 1000
    *_, panel = figure.axes
    lines = {container.get_label(): container for container in panel.containers}
    line, _, (bars,) = lines["large batch, 95 % interval"]
    assert line.get_ydata().tolist() == [1.25, 1.5, 1.75, 2.0, 2.25]
    assert next(segment[:, 1].tolist() for segment in bars.get_segments()) == [1.0, 2.0]
    assert lines["a single sample, 95 % interval"][0].get_ydata().tolist() == [0.75, 0.5, 0.25, 0.5, 0.75]


def test_large_and_small_changes_are_both_seen():
    """The last point loses 70 times the margin; linear axes would put the first three into one spot."""
    (figure,) = frontier_figures(frontier_result())
    FigureCanvasAgg(figure).draw()
    ax = figure.axes[0]
    heights = [ax.transData.transform((50, change))[1] for change in (0.002, 0.01)]
    assert heights[1] - heights[0] > 10
    assert "0" in [label.get_text() for label in ax.get_yticklabels()]


def test_the_layers_picture_holds_all_entries():
    result = tiny_result()
    (figure,) = layers_figures(result)
    before, after = figure.axes[0].containers
    usable = [layer for layer in result.layers if layer.curve is not None]
    assert [bar.get_width() for bar in before] == [layer.params_before for layer in usable]
    assert [bar.get_width() for bar in after] == [layer.params_after for layer in usable]


def test_many_layers_stand_in_columns():
    result = with_layers(tiny_result(), 50)
    (figure,) = layers_figures(result)
    widths = [bar.get_width() for ax in figure.axes for bar in ax.containers[0]]
    assert widths == [layer.params_before for layer, _ in largest_layers(result)]
    assert [len(ax.containers[0]) for ax in figure.axes] == [25, 25]


def test_changed_predictions_are_counted():
    result = tiny_result()
    (figure,) = changes_figures(result)
    ax = figure.axes[0]
    classes = [int(label.get_text()) for label in ax.get_yticklabels()]
    counts = ax.images[0].get_array()
    for change in result.changes:
        expected = sum(
            (other.predicted_before, other.predicted_after) == (change.predicted_before, change.predicted_after)
            for other in result.changes
        )
        place = classes.index(change.predicted_before), classes.index(change.predicted_after)
        assert counts[place] == expected
    assert counts.sum() == len(result.changes) > 0
    assert ax.get_title(loc="left") == f"{len(result.changes)} of 300 predictions changed"


def test_of_very_many_classes_those_that_changed_most_are_shown():
    result = tiny_result()
    change = result.changes[0]
    changes = [
        dataclasses.replace(change, predicted_before=i, predicted_after=i + 1) for i in range(100) for _ in range(2)
    ]
    (figure,) = changes_figures(dataclasses.replace(result, changes=changes))
    assert figure.axes[0].images[0].get_array().shape == (20, 20)
    assert "of them shown" in figure.axes[0].get_title(loc="left")
    assert_readable(figure)


def test_changed_samples_are_shown_with_their_images():
    result = tiny_result()
    samples = [change.sample for change in result.changes]
    images = {sample: torch.full((8, 8, 1), i, dtype=torch.uint8) for i, sample in enumerate(samples[1:])}
    figure = samples_figure(result, images)
    assert [int(ax.images[0].get_array()[0, 0]) for ax in figure.axes] == list(range(len(images)))
    first = result.changes[1]
    title = f"{first.predicted_before}→{first.predicted_after}\nright: {first.target}"
    assert figure.axes[0].get_title() == title
    assert_readable(figure)
    assert draw_samples(result, {}) == {}


def test_only_the_largest_of_very_many_layers_are_drawn():
    result = with_layers(tiny_result(), 200)
    (figure,) = layers_figures(result)
    assert figure.axes[0].get_title(loc="left") == "Factorizable layers, the 72 largest of 200"
    assert len(largest_layers(result)) == 72


def test_the_heat_map_holds_rank_shares():
    result = frontier_result()
    (figure,) = ranks_figures(result)
    values = figure.axes[0].images[0].get_array()
    usable = [layer for layer in result.layers if layer.curve is not None]
    assert values.shape == (3, 5)
    for row, layer in zip(values, usable, strict=True):
        rank = result.frontier[0].ranks.get(layer.name, layer.full_rank)
        assert row[0] == pytest.approx(100 * rank / layer.full_rank)


def test_curves_show_predictions_probes_and_the_chosen_rank():
    result = tiny_result()
    (figure,) = curves_figures(result)
    usable = [layer for layer in result.layers if layer.curve is not None]
    for ax, layer in zip(figure.axes, usable, strict=True):
        assert list(ax.lines[0].get_ydata()) == layer.curve.predicted
        measured = [container[0].get_xydata()[0].tolist() for container in ax.containers]
        assert measured == [[rank, change] for rank, _, change, _ in layer.curve.probes]
        upright = [line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]]
        assert upright == ([] if layer.rank is None else [layer.rank])


def test_what_is_not_finite_is_left_out():
    result = frontier_result()
    broken = dataclasses.replace(result.frontier[0], loss_change=math.inf, score_change=math.nan, predicted=math.nan)
    layer = result.layers[0]
    curve = dataclasses.replace(
        layer.curve, probes=[(1, math.nan, math.inf, math.inf)], predicted=[math.nan] * len(layer.curve.ranks)
    )
    layers = [dataclasses.replace(layer, curve=curve), *result.layers[1:]]
    result = dataclasses.replace(result, frontier=[broken, *result.frontier[1:]], layers=layers)
    for picture in PICTURES:
        assert draw(result, picture), picture
    (figure,) = frontier_figures(result)
    assert len(figure.axes[0].containers[0][0].get_xdata()) == 4


def test_without_layers_frontier_or_certificate_nothing_fails():
    empty = dataclasses.replace(tiny_result(), ranks={}, layers=[], frontier=[], changes=[])
    assert [PICTURES[picture](empty) for picture in PICTURES] == [[]] * 7
    result = dataclasses.replace(tiny_result(), certificate=None)
    assert all(draw(result, picture) for picture in PICTURES)
    scoreless = with_certificate(frontier_result(), score_change=None)
    points = [dataclasses.replace(p, score=None, score_change=None) for p in scoreless.frontier]
    dense = dataclasses.replace(scoreless.dense, score=None)
    (figure,) = frontier_figures(dataclasses.replace(scoreless, frontier=points, dense=dense))
    assert len(figure.axes) == 1


def test_the_users_matplotlib_stays_as_it_is():
    from matplotlib import pyplot

    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True, "font.size": 30}):
        before = dict(matplotlib.rcParams)
        styled = draw(tiny_result(), "frontier")["frontier"]
        assert dict(matplotlib.rcParams) == before
    assert styled == draw(tiny_result(), "frontier")["frontier"]
    assert pyplot.get_fignums() == []


def test_dollars_in_names_are_no_formula():
    result = tiny_result()
    layers = [dataclasses.replace(layer, name=f"$x_{i}^$") for i, layer in enumerate(result.layers)]
    assert draw(dataclasses.replace(result, layers=layers), "layers")
