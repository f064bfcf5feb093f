# SPDX-License-Identifier: Apache-2.0
"""The figure of a snapshot, drawn without a display and without pyplot."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib import image
from matplotlib.colors import LogNorm

from tests.experts.test_snapshot import make
from vllm_mixprec.errors import MixPrecError
from vllm_mixprec.experts import ExpertSnapshot, SnapshotError
from vllm_mixprec.experts.plot import draw

PNG = b"\x89PNG\r\n"


def skewed(layers: int, experts: int) -> ExpertSnapshot:
    """Counts that fall from 10,000 to 0 along the experts."""
    row = np.geomspace(10_000, 1, experts).astype(np.int64)
    row[-1] = 0
    return make(np.tile(row, (layers, 1)))


@pytest.mark.parametrize("shape", [(1, 1), (4, 16), (60, 256), (94, 512)])
def test_labels_stay_readable(tmp_path: Path, shape: tuple[int, int]) -> None:
    figure = make(np.ones(shape)).plot(tmp_path / "x.png")
    pixels = image.imread(tmp_path / "x.png")
    assert max(pixels.shape[:2]) < 3000
    heatmap = figure.axes[0]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axis in (heatmap.xaxis, heatmap.yaxis):
        shown = [label for label in axis.get_ticklabels() if label.get_text()]
        assert shown
        boxes = [label.get_window_extent(renderer) for label in shown]
        for box, following in zip(boxes, boxes[1:], strict=False):
            assert not box.overlaps(following)
    # A cell is at least three pixels each way, or neighbours run together.
    box = heatmap.get_window_extent(renderer)
    assert box.height / shape[0] > 3 and box.width / shape[1] > 3 or shape[1] == 512


def test_heatmap_shows_the_counts() -> None:
    snapshot = make()
    [shown] = draw(snapshot).axes[0].get_images()
    array = np.ma.filled(shown.get_array(), 0)
    np.testing.assert_array_equal(array, snapshot.counts)
    # Experts that never ran have a colour that no count has.
    assert shown.get_array().mask.tolist() == (snapshot.counts == 0).tolist()
    never = shown.cmap(np.ma.masked)
    assert min(np.abs(np.subtract(shown.cmap(x), never)).max() for x in np.linspace(0, 1)) > 0.1


def test_scale_is_logarithmic_when_the_range_is_wide() -> None:
    figure = draw(skewed(3, 8))
    assert isinstance(figure.axes[0].get_images()[0].norm, LogNorm)
    assert any("(log)" in axes.get_ylabel() for axes in figure.axes)
    narrow = draw(make())
    assert not isinstance(narrow.axes[0].get_images()[0].norm, LogNorm)


def test_curve_has_a_line_a_layer_sorted_their_mean_and_the_even_load() -> None:
    curve = draw(make()).axes[1]
    first, second, mean, even = (line.get_ydata() for line in curve.get_lines())
    assert list(first) == [3, 1, 0, 0]
    assert list(second) == [1, 1, 1, 1]
    assert list(mean) == [2, 1, 0.5, 0.5]
    assert list(even) == [1, 1]


def test_layers_without_activations_are_said_to_have_none() -> None:
    figure = draw(make(np.zeros((2, 4))))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["no activations in this window"]
    partly = draw(make(((3, 1, 0, 0), (0, 0, 0, 0)))).axes[1]
    assert len(partly.get_lines()) == 3  # one layer, the mean, the even load


@pytest.mark.parametrize(
    ("name", "magic"), [("x.png", PNG), ("x.PNG", PNG), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")]
)
def test_suffix_chooses_the_format(tmp_path: Path, name: str, magic: bytes) -> None:
    make().plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert os.listdir(tmp_path) == [name]


def test_other_suffixes_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="x.doc: suffix '.doc', expected .png, .svg, .pdf"):
        make().plot(tmp_path / "x.doc")
    with pytest.raises(SnapshotError, match="cannot be written .No such file"):
        make().plot(tmp_path / "absent" / "x.png")


def test_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    snapshot = make(model="org/$x_{$", layers=("$a_{$", "$b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot.plot(tmp_path / "x.png")


def test_a_notebook_shows_the_figure() -> None:
    data, _ = DisplayFormatter().format(make().plot())
    assert data["image/png"].startswith(PNG)


def test_neither_a_display_nor_pyplot_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from vllm_mixprec.experts import ExpertSnapshot; "
        "ExpertSnapshot.load('s.json').plot('x.png'); print('matplotlib.pyplot' in sys.modules)"
    )
    make().save(tmp_path / "s.json")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False"
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_missing_matplotlib_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_mixprec.experts.plot")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(MixPrecError, match=r"expected matplotlib. pip install 'vllm-mixprec\["):
        make().plot()
