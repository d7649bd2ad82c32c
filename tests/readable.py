"""Whether the texts of a picture can be read."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg


def assert_readable(figure):
    """No two texts outside of the axes overlap, and none is cut off by the edge of the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays everything out
    shown = [text for text in (*labels(figure), *figure.texts) if text.get_visible() and text.get_text()]
    found = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown]
    for (_, a), (_, b) in itertools.combinations(found, 2):
        assert not a.overlaps(b)
    for text, box in found:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text


def labels(figure):
    for ax in figure.axes:
        yield from (ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label)
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    yield tick.label1
