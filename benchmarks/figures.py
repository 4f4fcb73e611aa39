"""Common look of the benchmarks' figures."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.scans.files import atomic_path


def new_axes(width: float, height: float, columns: int = 1) -> list[Axes]:
    """Axes side by side on a new figure of width x height inches, without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return axes


def save_figure(axes: Axes, path: Path) -> None:
    """Save the figure that the axes belong to."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
