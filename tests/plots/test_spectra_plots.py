import matplotlib
import torch
from readable import assert_readable

from lrf_lightning.plots.spectra import spectra_over_time
from lrf_lightning.solver.layers.spectra import Spectrum


def history(layers, epochs, size=64):
    """Spectra that fall the faster the later it is; layer number i has i weights."""
    return {
        epoch: {
            f"backbone.encoder.layers.{i}.attention.projection": Spectrum(
                i, size, torch.exp(-torch.arange(size, dtype=torch.float64) * epoch / 50), 10.0 + i, 3.0, size, 0.9
            )
            for i in range(layers)
        }
        for epoch in epochs
    }


def test_every_layer_has_a_panel_with_a_line_per_epoch():
    figure = spectra_over_time(history(3, (2, 4, 6)))
    *panels, _ = figure.axes
    assert [ax.get_title(loc="left").split("\n")[1] for ax in panels] == [
        f"effective rank {10 + i}.0 of 64" for i in range(3)
    ]
    for ax in panels:
        *lines, rank = ax.lines
        assert [round(float(line.get_ydata()[1]), 4) for line in lines] == [0.9608, 0.9231, 0.8869]
        assert len({line.get_color() for line in lines}) == 3
        assert rank.get_xdata()[0] == float(ax.get_title(loc="left").split()[-3])


def test_sixty_layers_and_many_epochs_are_readable():
    figure = spectra_over_time(history(60, range(1, 101)))
    *panels, _ = figure.axes
    assert len(panels) == 16
    assert {len(ax.lines) for ax in panels} == {13}
    assert "the 16 largest of 60 layers" in figure.texts[0].get_text()
    assert "44" in panels[0].get_title(loc="left")
    assert_readable(figure)
    assert figure.bbox.height <= 1000


def test_one_epoch_and_a_weight_of_zeros():
    one = history(2, (7,))
    name = next(iter(one[7]))
    one[7][name] = Spectrum(1, 4, torch.zeros(4, dtype=torch.float64), 0.0, 0.0, 0, 1.0)
    figure = spectra_over_time(one)
    assert_readable(figure)
    assert figure.axes[1].lines[0].get_color() == matplotlib.colormaps["cividis"](0), "the latest one is the darkest"
