"""Image scores by hand and against their plain form, and blur and maps against recorded ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import Tensor

from feature_extractors import reference
from feature_extractors.memory_bank import MemoryBank
from feature_extractors.scoring import (
    BLUR_SIGMA,
    anomaly_maps,
    box_blur,
    gaussian_blur,
    image_scores,
    top_scores,
)


def score_of(patches: Tensor, rows: Tensor, divisor: float = 1.0, epsilon: float = 0.0) -> float:
    bank = MemoryBank(rows)
    distances, index = bank.nearest(patches)
    scores = image_scores(patches[None], distances[None], index[None], bank, divisor, epsilon)
    assert (scores.shape, scores.dtype) == ((1,), torch.float64)
    return float(scores)


# Points on a line, in four columns so that the root of the width is 2. The row at 0 is nearest to the patch at -1,
# and the rows at 2 and 5 are nearest to the row at 0.
LINE = torch.zeros(4, 4).index_put((torch.arange(4), torch.tensor(0)), torch.tensor([0.0, 2.0, 5.0, 100.0]))
PATCHES = torch.zeros(3, 4).index_put((torch.arange(3), torch.tensor(0)), torch.tensor([2.5, -1.0, 100.2]))


@pytest.mark.parametrize(
    ("divisor", "epsilon", "expected"),
    [
        # s* = 1, neighbors at 3 and 6: 1 - e^0.5 / (e^1.5 + e^3) = 1 - 1.6487213 / 24.5672260
        (1.0, 0.0, 0.9328894),
        # all distances divided by 10: 0.1 (1 - e^0.05 / (e^0.15 + e^0.3)) = 0.1 (1 - 1.0512711 / 2.5116930)
        (10.0, 0.0, 0.05814492),
        # one is added to the sum: 1 - 1.6487213 / 25.5672260
        (1.0, 1.0, 0.9355142),
    ],
)
def test_image_score_by_hand(divisor: float, epsilon: float, expected: float) -> None:
    assert score_of(PATCHES, LINE, divisor, epsilon) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("divisor", "epsilon"), [(1.0, 0.0), (1000.0, 0.0), (1.0, 1e-5), (7.0, 0.3)])
@pytest.mark.parametrize(("patches", "rows", "dim"), [(1, 3, 1), (6, 4, 2), (40, 90, 16)])
def test_image_score_equals_its_plain_form(patches: int, rows: int, dim: int, divisor: float, epsilon: float) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        asked, bank = (3 * torch.randn(count, dim, generator=generator) for count in (patches, rows))
        nearest = reference.nearest_rows(asked, bank, exact_distances=True)
        expected = reference.image_score(asked, *nearest, bank, divisor, epsilon)
        assert score_of(asked, bank, divisor, epsilon) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bank_of_one_row_gives_the_distance() -> None:
    assert score_of(PATCHES, LINE[:1]) == pytest.approx(100.2)
    assert score_of(PATCHES, LINE[:1], divisor=10.0) == pytest.approx(10.02)


def test_bank_of_two_rows_has_one_neighbor() -> None:
    """The patch at 100.2 is nearest to 2, at 98.2; the neighbor 0 is at 100.2: 98.2 (1 - e^((98.2 - 100.2) / 2))."""
    assert score_of(PATCHES, LINE[:2]) == pytest.approx(98.2 * (1 - math.exp(-1.0)), rel=1e-5)


def test_rows_of_the_bank_score_zero() -> None:
    assert score_of(LINE[:2], LINE) == 0.0


def test_huge_distances_do_not_overflow() -> None:
    """exp(1e5) overflows, but the ratio of two is finite: s* = 1e5 + 1, neighbors 1 and 4 farther."""
    rows = torch.tensor([[0.0], [-1.0], [-4.0], [-100.0]])
    patch = torch.tensor([[1e5]])
    expected = (1 - 1 / (math.exp(1) + math.exp(4))) * 1e5
    assert score_of(patch, rows) == pytest.approx(expected, rel=1e-6)
    assert score_of(patch, rows, epsilon=1e-5) == pytest.approx(expected, rel=1e-6)
    apart = torch.tensor([[0.0], [1e6], [2e6]])  # exp overflows for these neighbors
    assert score_of(torch.tensor([[-1e3]]), apart) == pytest.approx(1e3)


@pytest.mark.golden
def test_recorded_image_scores(goldens: Path) -> None:
    recorded = np.load(goldens / "unit.npz")
    expected = json.loads((goldens / "unit_meta.json").read_text())["score_s"]
    patches, distances = (torch.from_numpy(recorded[f"score_{name}"]) for name in ("patch", "minval"))
    index = torch.from_numpy(recorded["score_minidx"]).long()
    bank = MemoryBank(torch.from_numpy(recorded["score_bank"]))
    found, found_index = bank.nearest(patches)
    torch.testing.assert_close(found, distances, rtol=1e-5, atol=0)
    assert torch.equal(found_index, index)
    divisors = {"Double(/1000)": 1000.0, "add": 1.0, "Triple": 1.0}
    found = (patches[None], distances[None], index[None], bank)
    scores = {name: float(image_scores(*found, each)) for name, each in divisors.items()}
    assert scores == pytest.approx(expected, rel=1e-6)


def pil_blur(images: Tensor) -> Tensor:
    """PIL's blur of uint8 images (B, H, W), one by one."""
    blurred = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR_SIGMA)) for image in images.numpy()]
    return torch.from_numpy(np.stack([np.asarray(image) for image in blurred]))


IMAGES = {
    "noise": lambda shape, draw: torch.randint(0, 256, shape, generator=draw),
    "extremes": lambda shape, draw: torch.randint(0, 2, shape, generator=draw) * 255,
    "sparse": lambda shape, draw: (torch.rand(shape, generator=draw) < 0.02).int() * 255,
    "flat": lambda shape, draw: torch.randint(0, 256, (shape[0], 1, 1), generator=draw).expand(shape),
    "white": lambda shape, draw: torch.full(shape, 255),
    "ramps": lambda shape, draw: (torch.arange(math.prod(shape)) * 7 // 3 % 256).view(shape),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_blur_of_the_gpu_is_bit_equal_to_pil(kind: str) -> None:
    """Images start at one pixel and include ones smaller than the blur's box."""
    sides = [(1, 1), (1, 2), (1, 60), (60, 1), (2, 3), (4, 4), (7, 8), (9, 9), (33, 50), (101, 37), (224, 224)]
    for height, width in sides:
        images = IMAGES[kind]((8, height, width), torch.Generator().manual_seed(height + width)).byte()
        before = images.clone()
        blurred = box_blur(images)
        assert blurred.dtype == torch.uint8
        assert torch.equal(blurred, pil_blur(images)), (height, width)
        assert torch.equal(images, before)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (50, 33), (224, 224)])
def test_blur_of_a_batch_matches_pil_and_scipy(height: int, width: int) -> None:
    """Each map has its own maximum; one is empty."""
    planes = torch.rand(4, height, width, generator=torch.Generator().manual_seed(0))
    planes *= torch.tensor([1e-3, 0.0, 7.0, 200.0])[:, None, None]
    for plane, blurred in zip(planes, gaussian_blur(planes), strict=True):
        levels = (plane / plane.max().clamp_min(1e-9) * 255).byte()
        assert torch.equal(blurred, pil_blur(levels[None])[0].float().div(255) * plane.max())
    for plane, blurred in zip(planes, gaussian_blur(planes, float_blur=True), strict=True):
        np.testing.assert_allclose(blurred, gaussian_filter(plane.numpy(), BLUR_SIGMA, mode="nearest"), rtol=1e-6)


def test_top_scores_by_hand() -> None:
    """The mean of the two highest of 200 pixels; of fewer than 100, the highest."""
    maps = torch.zeros(2, 10, 20)
    maps[0, 3, 4:6], maps[1, 0, 0] = torch.tensor([4.0, 8.0]), 1.0
    scores = top_scores(maps)
    assert scores.dtype == torch.float64
    assert scores.tolist() == [6.0, 0.5]
    assert top_scores(maps[:, :4]).tolist() == [8.0, 1.0]


def test_maps_of_several_banks_match_single_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = [torch.rand(2, grid**2, generator=generator) for grid in (7, 14, 14)]
    maps = anomaly_maps(distances, 60)
    assert maps.shape == (3, 2, 60, 60)
    for of_bank, planes in zip(distances, maps, strict=True):
        for each, plane in zip(of_bank, planes, strict=True):
            assert torch.equal(anomaly_maps([each[None]], 60)[0, 0], plane)


@pytest.mark.parametrize("float_blur", [False, True])
def test_scoring_does_not_read_values_back(float_blur: bool) -> None:
    """Tensors on the meta device have no values, so reading one would fail."""
    patches, rows = torch.empty(2, 16, 8, device="meta"), torch.empty(30, 8, device="meta")
    distances, index = torch.empty(2, 16, device="meta"), torch.empty(2, 16, dtype=torch.int64, device="meta")
    assert image_scores(patches, distances, index, MemoryBank(rows), 1.0, 1e-5).is_meta
    assert anomaly_maps([distances] * 3, 32, float_blur).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("float_blur", [False, True])
def test_gpu_computes_the_same_maps(float_blur: bool) -> None:
    distances = [torch.rand(3, grid**2, generator=torch.Generator().manual_seed(grid)) for grid in (28, 56)]
    on_gpu = anomaly_maps([each.cuda() for each in distances], 224, float_blur)
    assert on_gpu.is_cuda
    on_cpu = anomaly_maps(distances, 224, float_blur)
    # A different rounding of the resize may move a pixel by one level.
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-6 if float_blur else 1.01 / 255)


@pytest.mark.golden
def test_recorded_blur(goldens: Path) -> None:
    recorded = np.load(goldens / "unit.npz")
    for plane, levels, scale in zip(recorded["blur_in"], recorded["blur_out_q"], recorded["blur_scale"], strict=True):
        blurred = gaussian_blur(torch.from_numpy(plane)).numpy() / scale * 255
        assert np.abs(blurred - levels.astype(np.float64)).max() <= 1.001


def test_blur_through_8_bits_truncates() -> None:
    """0.9999 of the maximum is level 254.97, truncated to 254. The brightest pixel is in the far corner."""
    plane = torch.full((80, 80), 0.9999 * 3.0)
    plane[-1, -1] = 3.0
    assert float(gaussian_blur(plane)[0, 0]) == pytest.approx(3.0 * 254 / 255, rel=1e-6)
    assert float(gaussian_blur(plane, float_blur=True)[0, 0]) == pytest.approx(0.9999 * 3.0, rel=1e-6)


@pytest.mark.parametrize("float_blur", [False, True])
def test_blur_of_a_zero_map_is_zero(float_blur: bool) -> None:
    blurred = gaussian_blur(torch.zeros(20, 30), float_blur)
    assert blurred.shape == (20, 30)
    assert blurred.dtype == torch.float32
    assert (blurred == 0).all()


def test_float_blur_is_the_gaussian() -> None:
    """Weights are exp(-x^2 / 2 sigma^2) over 4 sigma along each axis with repeated borders; SciPy in fp64 agrees."""
    plane = torch.rand(60, 47, generator=torch.Generator().manual_seed(0))
    blurred = gaussian_blur(plane, float_blur=True)
    offset = np.arange(-16, 17)
    weight = np.exp(-(offset**2) / (2 * 4.0**2))
    expected = np.pad(plane.double().numpy(), 16, mode="edge")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, weight / weight.sum(), mode="valid")
    assert BLUR_SIGMA == 4.0
    assert blurred.dtype == torch.float32
    np.testing.assert_allclose(blurred, expected, rtol=1e-5)
    np.testing.assert_allclose(blurred, gaussian_filter(plane.double().numpy(), 4.0, mode="nearest"), rtol=1e-5)


def test_both_blurs_agree_within_a_few_levels() -> None:
    plane = torch.zeros(100, 100)
    plane[30:60, 20:80] = 2.0
    difference = (gaussian_blur(plane) - gaussian_blur(plane, float_blur=True)).abs().max()
    assert 0 < difference < 2.0 * 5 / 255


@pytest.mark.parametrize("float_blur", [False, True])
@pytest.mark.parametrize(("grid", "size"), [(28, 224), (56, 224), (8, 60), (7, 50)])
def test_hot_patch_appears_at_its_position(grid: int, size: int, float_blur: bool) -> None:
    for row, column in [(1, grid - 3), (grid - 1, 0), (grid // 2, 2)]:
        distances = torch.zeros(grid, grid)
        distances[row, column] = 5.0
        heat = anomaly_maps([distances.view(1, -1)], size, float_blur)[0, 0]
        assert heat.shape == (size, size)
        assert heat.dtype == torch.float32
        positions = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), dim=-1)
        hottest = positions[heat > 0.9 * heat.max()].float()
        middle = torch.tensor([row + 0.5, column + 0.5]) * size / grid - 0.5
        at_border = {row, column} & {0, grid - 1}
        assert (hottest.mean(dim=0) - middle).abs().max() <= (size / grid if at_border else 1.5)


def test_map_is_the_bilinear_resize_then_the_blur() -> None:
    """Patch centers lie at pixels 7.5, 23.5, ..., so a ramp over patches is a ramp over pixels."""
    ramp = torch.arange(4.0).expand(4, 4)  # grows along the columns
    heat = anomaly_maps([ramp.reshape(1, -1)], 64, float_blur=True)[0, 0]
    inner = slice(24, 40)  # the blur reaches 16 pixels, and the ramp ends at the outer patches' centers
    expected = (torch.arange(64.0) - 7.5) / 16
    torch.testing.assert_close(heat[inner, inner], expected[inner].expand(16, 16), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("float_blur", "levels"), [(False, 1), (True, 0)])
def test_map_of_equal_distances_is_flat(float_blur: bool, levels: int) -> None:
    """Through 8 bits it may differ by one level, where the resize rounds below the maximum."""
    heat = anomaly_maps([torch.full((1, 49), 3.0)], 40, float_blur)[0, 0]
    torch.testing.assert_close(heat, torch.full((40, 40), 3.0), rtol=1e-6, atol=3.0 * levels / 255)
