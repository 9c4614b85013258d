"exp.plots: values are never stretched, layouts agree, bands are sample standard deviations, bad input is named."
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from exp import plots
from hypothesis import given, settings, strategies as st


@pytest.fixture(autouse=True)
def close(): yield; plt.close("all")


def drawn(ax): return np.asarray(ax.get_images()[0].get_array())


@given(st.sampled_from([1, 3]), st.integers(5, 8), st.integers(5, 8))
def test_layouts_agree(c, h, w):
    im = torch.rand(c, h, w)
    same = [im, im.permute(1, 2, 0), im.numpy()] if c == 3 else [im, im[0], im.permute(1, 2, 0)]
    results = [drawn(plots.show_image(x)) for x in same]
    plt.close("all")
    for r in results: assert r.shape[:2] == (h, w) and np.array_equal(r, results[0])


def test_values_are_not_stretched():
    ax = plots.show_image(torch.full((3, 3), .25))
    assert ax.get_images()[0].get_clim() == (0, 1) and (drawn(ax) == .25).all()
    assert (drawn(plots.show_image(torch.full((3, 3), 255, dtype=torch.uint8))) == 1).all()
    assert drawn(plots.show_image(torch.tensor([[-1., 2.]]))).tolist() == [[0, 1]]
    assert drawn(plots.show_image(torch.tensor([[True, False]]))).tolist() == [[1, 0]]
    assert drawn(plots.show_image(torch.rand(3, 4, dtype=torch.half))).dtype == np.float32


@pytest.mark.parametrize("shape", [(784,), (2, 3, 4, 5), (5, 8, 8), (0, 3), ()])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match=re.escape(f"not {shape}")): plots.show_image(torch.rand(shape))


def test_a_tensor_that_needs_gradients_is_drawn(): plots.show_image(torch.rand(2, 2, requires_grad=True))


def test_grids():
    axes = plots.show_images(torch.rand(5, 4, 4), titles=list("abcde"), ncols=3, suptitle="five")
    assert len(axes) == 5 and len(axes[0].figure.axes) == 6 and [a.get_title() for a in axes] == list("abcde")
    some = plots.show_images((im for im in torch.rand(3, 4, 4)), titles=torch.arange(3))
    assert [a.get_title() for a in some] == list("012")
    with pytest.raises(ValueError, match="got 0 images"): plots.show_images([])
    with pytest.raises(ValueError, match="2 images and 1 titles"): plots.show_images(torch.rand(2, 3, 3), ["x"])


@given(st.integers(2, 6), st.integers(2, 9))
def test_bands_are_sample_sd(seeds, n):
    rows = torch.randn(seeds, n)
    ax = plots.plot_lines({"a": rows}, xlabel="x", ylabel="y", title="t")
    vertices = ax.collections[0].get_paths()[0].vertices
    low = np.array([vertices[vertices[:, 0] == i, 1].min() for i in range(n)])
    expected = (rows.double().mean(0) - rows.double().std(0)).numpy()
    plt.close("all")
    np.testing.assert_allclose(low, expected, atol=1e-6)


@pytest.mark.parametrize("y", [[1, 2, 3], (1., 2., 3.), np.array([1., 2, 3]), torch.tensor([1., 2, 3]), [torch.tensor(1.), torch.tensor(2.), 3],
                               [torch.tensor([1.]), torch.tensor([2.]), torch.tensor([3.])]])
def test_one_row_has_no_band(y):
    ax = plots.plot_lines({"a": y}, xlabel="x", ylabel="y", title="t")
    assert ax.get_lines()[0].get_ydata().tolist() == [1, 2, 3] and not ax.collections and ax.get_legend() is None


@pytest.mark.parametrize("ys", [[[1, 2], [3, 4]], [torch.tensor([1., 2]), torch.tensor([3., 4])], [np.array([1., 2]), [3, 4]]])
def test_rows_in_any_container(ys):
    ax = plots.plot_lines({"a": ys, "b": [1, 2]}, x=[10, 20], xlabel="x", ylabel="y", title="t", logy=True, logx=True)
    assert ax.get_lines()[0].get_ydata().tolist() == [2, 3] and ax.get_legend() is not None
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("x", "y", "t")


def test_bad_curves_are_named():
    with pytest.raises(ValueError, match="'loss' has 3 points but x has 2"): plots.plot_lines({"loss": [1, 2, 3]}, x=[1, 2], xlabel="x", ylabel="y", title="t")
    with pytest.raises(TypeError): plots.plot_lines({"a": [1]})
    for nothing in ([], np.zeros(0), torch.zeros(2, 0), [[], []]):
        for x in (None, []):
            with pytest.raises(ValueError, match="'nothing' has 0 points"): plots.plot_lines({"nothing": nothing}, x, xlabel="x", ylabel="y", title="t")


@settings(max_examples=12)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=20), st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.int64]), st.booleans())
def test_whole_numbers_are_bytes(levels, dtype, tensor):
    im = np.array([levels], dtype)
    got = drawn(plots.show_image(torch.from_numpy(im) if tensor else im))
    plt.close("all")
    np.testing.assert_array_equal(got, np.float32([levels])/np.float32(255))


@pytest.mark.parametrize("im", [np.uint16([[1000, 2000]]), np.int64([[0, 256]]), np.float32([[0, 252]]), torch.tensor([[17.]]), np.array([[3, 70_000]])])
def test_a_range_that_is_none_of_an_image_is_refused(im):
    "Everything beyond 1 would be white: bytes as floats, 16-bit pictures."
    with pytest.raises(ValueError, match="divide it first"): plots.show_image(im)


def test_a_photo_of_pillow_is_drawn():
    from PIL import Image
    assert drawn(plots.show_image(Image.new("RGB", (3, 2), (255, 0, 51)))).tolist() == [[[1., 0., np.float32(.2)]]*3]*2


@pytest.mark.parametrize("mode, colour, grey", [("P", (255, 0, 51), None), ("CMYK", (255, 0, 51), None), ("LA", None, 51), ("L", None, 51), ("1", None, 255)])
def test_photos_of_any_mode_keep_their_colours(mode, colour, grey):
    from PIL import Image
    im = Image.new("RGB", (5, 6), colour).convert(mode) if colour else Image.new("L", (5, 6), grey).convert(mode)
    got = drawn(plots.show_image(im))
    assert got.shape[:2] == (6, 5)
    for pixel in got.reshape(30, -1): np.testing.assert_allclose(pixel, np.float32(colour or grey)/255, atol=.02)


@pytest.mark.parametrize("bright", [[[np.nan, 200.]], [[np.inf, 0.]], [[-np.inf, 17.]]])
def test_nan_hides_no_wrong_range(bright):
    with pytest.raises(ValueError, match="divide it first"): plots.show_image(np.float32(bright))


def test_one_point_a_row_stays_rows():
    for y in (torch.tensor([[1.], [3.]]), [[1.], [3.]]):
        ax = plots.plot_lines({"a": y}, xlabel="x", ylabel="y", title="t")
        assert ax.get_lines()[0].get_ydata().tolist() == [2] and ax.collections


def test_positions_may_be_a_generator():
    ax = plots.plot_lines({"a": [1, 2], "b": (v for v in (3, 4))}, (10*i for i in range(2)), xlabel="x", ylabel="y", title="t")
    assert [line.get_xdata().tolist() for line in ax.get_lines()] == [[0, 10]]*2 and ax.get_lines()[1].get_ydata().tolist() == [3, 4]


def test_positions_are_one_row():
    with pytest.raises(ValueError, match="unpack"): plots.plot_lines({"a": [1, 2]}, [[1, 2], [3, 4]], xlabel="x", ylabel="y", title="t")


def test_nothing_given_is_changed():
    im, y = torch.tensor([[-1., 2.]]), np.array([[1., 2.], [3., 4.]])
    plots.show_image(im); plots.plot_lines({"y": y}, xlabel="x", ylabel="y", title="t")
    assert im.tolist() == [[-1, 2]] and y.tolist() == [[1, 2], [3, 4]]


def test_the_global_style_is_left_alone():
    before = dict(plt.rcParams)
    plots.subplots(2, 2)
    assert dict(plt.rcParams) == before
