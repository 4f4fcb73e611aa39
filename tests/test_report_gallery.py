"""Gallery of a report: choice of samples, their images and packed clouds."""

import base64
import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image
from report_pages import SIDE, made_up_cloud, made_up_image, made_up_sample, made_up_samples

from utils.reporting.html_report.gallery import (
    CLOUD_POINTS,
    CORRECT_PASS,
    FALSE_ALARM,
    HIT,
    MISS,
    UNDECIDED,
    VIEW_SIDE,
    Decision,
    choose_samples,
    gallery,
    outcome,
    pack_cloud,
    spread_order,
)
from utils.reporting.visualization import MARGIN, NEUTRAL, PREDICTED, TRUTH

AT_HALF = Decision(0.5, "made up", 0.6)
MAP = np.zeros((SIDE, SIDE), dtype=np.float32)


def shown(
    samples: list, limit: int, decision: Decision | None = AT_HALF, image: bool = True, cloud: bool = True
) -> list:
    return gallery(
        samples,
        [sample.prediction.score / 0.5 for sample in samples],
        decision,
        limit,
        lambda i: made_up_image(i) if image else None,
        lambda i: made_up_cloud(i) if cloud else None,
    )


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


@pytest.mark.parametrize(
    ("label", "score", "threshold", "expected"),
    [
        (1, 0.6, 0.5, HIT),
        (1, 0.5, 0.5, MISS),  # a score equal to the threshold is good
        (0, 0.6, 0.5, FALSE_ALARM),
        (0, 0.5, 0.5, CORRECT_PASS),
        (1, 0.6, None, UNDECIDED),
    ],
)
def test_outcomes(label: int, score: float, threshold: float | None, expected: str) -> None:
    assert outcome(label, score, threshold) == expected


# Choice of samples


def test_worst_samples_come_first_then_the_nearest_to_the_threshold() -> None:
    scores = {"hole/0": 0.1, "hole/1": 0.45, "good/0": 0.8, "good/1": 0.1, "good/2": 0.4, "hole/2": 0.9, "hole/3": 0.55}
    samples = [made_up_sample(f"test/{path}", score) for path, score in scores.items()]
    chosen = [samples[i].path.removeprefix("test/") for i in choose_samples(samples, AT_HALF, 7)]
    assert chosen == ["hole/0", "good/0", "hole/1", "hole/3", "good/2", "good/1", "hole/2"]


def test_wrong_samples_leave_room_for_right_ones() -> None:
    wrong = [made_up_sample(f"test/hole/{i:03d}", 0.4 - i / 100) for i in range(20)]
    right = [made_up_sample(f"test/good/{i:03d}", 0.1 + i / 100) for i in range(20)]
    chosen = choose_samples(wrong + right, AT_HALF, 8)
    assert chosen[:6] == [19, 18, 17, 16, 15, 14]
    assert all(i >= 20 for i in chosen[6:])
    assert len(choose_samples(wrong + right[:1], AT_HALF, 8)) == 8
    assert choose_samples(wrong, AT_HALF, 8) == list(range(19, 11, -1))


def test_choice_covers_every_defect_and_the_range_of_scores() -> None:
    samples = [made_up_sample(f"test/{defect}/{i:03d}", 0.6 + i / 100) for defect in ("cut", "dent") for i in range(30)]
    chosen = [samples[i] for i in choose_samples(samples, AT_HALF, 6)]
    for defect in ("cut", "dent"):
        scores = [sample.prediction.score for sample in chosen if f"/{defect}/" in sample.path]
        assert scores == pytest.approx([0.6, 0.74, 0.89])


def test_every_sample_is_shown_once_within_the_limit() -> None:
    samples = made_up_samples(13)
    for limit in (13, 14, 1000):
        assert sorted(choose_samples(samples, AT_HALF, limit)) == list(range(13))
    for limit in range(13):
        chosen = choose_samples(samples, AT_HALF, limit)
        assert len(set(chosen)) == len(chosen) == limit


def test_outcomes_without_a_threshold_are_undecided() -> None:
    samples = made_up_samples(10)
    views = shown(samples, 10, decision=None)
    assert {view["outcome"] for view in views} == {UNDECIDED}
    assert len({view["path"] for view in views}) == 10


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 24, 25])
def test_spread_order_is_a_permutation_from_the_ends_inwards(count: int) -> None:
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    assert order[:3] == [0, count - 1, (count - 1) // 2][:count]


# Views of a sample


def test_view_is_plain_data() -> None:
    samples = [made_up_sample("test/hole/007", 0.7), made_up_sample("test/good/001", 0.2)]
    view, good = shown(samples, 2)
    if view["path"] != samples[0].path:
        view, good = good, view
    json.dumps(view, allow_nan=False)
    assert (view["path"], view["defect"], view["label"], view["score"]) == ("test/hole/007", "hole", 1, 0.7)
    assert (view["severity"], good["severity"]) == (1.4, 0.4)
    assert (view["outcome"], good["outcome"]) == (HIT, CORRECT_PASS)
    assert list(view["maps"]) == ["fused", "xyz", "rgb"]
    assert view["scores"] == {"xyz": 0.35, "rgb": 0.35}
    assert (view["truth"], good["truth"]) == (True, False)
    assert view["bar"] == ["0", "threshold", "2"]
    for uri in (view["view"]["image"], view["lines"], *view["maps"].values()):
        assert opened(uri).size == tuple(view["size"]) == (VIEW_SIDE, VIEW_SIDE)


def test_the_map_of_a_single_bank_is_shown_once() -> None:
    (view,) = shown([made_up_sample("test/hole/000", 0.7, banks=["rgb"])], 1)
    assert list(view["maps"]) == ["fused"]
    assert view["scores"] == {}


def test_views_without_a_cloud_keep_the_aspect_ratio_of_the_image() -> None:
    image = np.zeros((60, 120, 3), dtype=np.uint8)
    image[:, :60, 0] = 255
    samples = [made_up_sample("test/hole/000", 0.7)]
    (view,) = gallery(samples, [None], AT_HALF, 1, lambda i: image, lambda i: None)
    assert tuple(view["size"]) == (VIEW_SIDE, VIEW_SIDE // 2)
    shot = np.asarray(opened(view["view"]["image"]))
    assert shot[50, 20, 0] > 240 > 15 > shot[50, 200, 0]
    assert opened(view["maps"]["fused"]).size == opened(view["lines"]).size == (VIEW_SIDE, VIEW_SIDE // 2)


def test_views_are_cropped_to_the_points_of_the_cloud() -> None:
    """The disk of image and cloud fills 84 % of the view, and 1 / MARGIN of the crop."""
    (cropped,) = shown([made_up_sample("test/hole/000", 0.7)], 1)
    (whole,) = shown([made_up_sample("test/hole/000", 0.7)], 1, cloud=False)
    for view, share in ((cropped, 1 / MARGIN), (whole, 0.84)):
        shot = np.asarray(opened(view["view"]["image"]).convert("L"))
        assert (shot[VIEW_SIDE // 2] > 40).sum() == pytest.approx(share * VIEW_SIDE, abs=6)
    heat = np.asarray(opened(cropped["maps"]["fused"])).astype(int)
    assert np.abs(heat[4, 4] - NEUTRAL).max() < 8  # no point there


def test_the_outlines_are_those_of_the_map_and_the_ground_truth() -> None:
    sample = made_up_sample("test/hole/000", 0.7)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[:16, 32:48] = 1  # at the upper edge
    (view,) = shown([sample._replace(mask=sample.mask.new_tensor(mask))], 1, cloud=False)
    lines = np.asarray(opened(view["lines"]).convert("RGBA"))
    below, middle = VIEW_SIDE * 16 // SIDE, VIEW_SIDE * 40 // SIDE
    assert tuple(lines[below - 1, middle]) == tuple(lines[0, middle]) == (*bytes.fromhex(TRUTH[1:]), 255)
    assert lines[below // 2, middle, 3] == 0
    assert (lines == (*bytes.fromhex(PREDICTED[1:]), 255)).all(axis=2).any()
    sample = sample._replace(mask=None)  # a class without a test split
    (view,) = shown([sample], 1, decision=None)
    assert (view["truth"], view["lines"]) == (False, None)


def test_one_color_scale_for_all_samples_of_a_class() -> None:
    weak, strong = made_up_sample("test/hole/000", 0.1), made_up_sample("test/hole/001", 0.9)
    for decision in (AT_HALF, None):
        views = {
            view["path"]: np.asarray(opened(view["maps"]["fused"])).astype(int)
            for view in shown([weak, strong], 2, decision, cloud=False)
        }
        assert views[strong.path].max() > 1.5 * views[weak.path].max()


def test_depth_is_shown_without_an_image() -> None:
    (view,) = shown([made_up_sample("test/hole/000", 0.7)], 1, image=False)
    assert view["view"]["name"] == "depth"
    depth = np.asarray(opened(view["view"]["image"]).convert("L")).astype(int)
    assert depth[VIEW_SIDE // 2, VIEW_SIDE // 2] > depth[VIEW_SIDE // 2, VIEW_SIDE // 8] > depth[2, 2]
    assert view["cloud"]["colored"] is False


def test_maps_are_shown_without_image_and_cloud() -> None:
    (view,) = shown([made_up_sample("test/hole/000", 0.7)], 1, image=False, cloud=False)
    assert view["view"] is view["cloud"] is None
    assert opened(view["maps"]["fused"]).size == (VIEW_SIDE, VIEW_SIDE)


def test_nothing_is_read_with_limit_0() -> None:
    def refuse(number: int) -> None:
        raise AssertionError("read")

    assert gallery(made_up_samples(4), [None] * 4, AT_HALF, 0, refuse, refuse) == []


def test_files_are_read_by_the_index_of_the_sample() -> None:
    samples, read = made_up_samples(8), []
    views = gallery(samples, [None] * 8, AT_HALF, 3, read.append, lambda i: None)  # type: ignore[arg-type, func-returns-value]
    assert [samples[i].path for i in read] == [view["path"] for view in views]


# Clouds


def unpacked(cloud: dict) -> dict[str, np.ndarray]:
    data, n = gzip.decompress(base64.b64decode(cloud["data"])), cloud["points"]
    whole = np.frombuffer(data, dtype="<i2", count=3 * n).reshape(3, n).T
    planes = 5 if cloud["colored"] else 2
    colors = np.frombuffer(data, dtype=np.uint8, offset=6 * n, count=planes * n).reshape(planes, n)
    bits = np.frombuffer(data, dtype=np.uint8, offset=(6 + planes) * n)
    grid = np.unpackbits(bits)[: np.prod(cloud["grid"])].reshape(cloud["grid"])
    points = np.array(cloud["origin"]) + cloud["step"] * whole
    return {"xyz": points / 1000, "score": colors[0], "defect": colors[1], "rgb": colors[2:].T, "grid": grid}


def test_packed_cloud_keeps_positions_colors_and_scores() -> None:
    side = 40
    row, column = np.mgrid[:side, :side].astype(np.float32)
    cloud = np.stack([column * 0.001 - 0.0105, row * 0.001 + 0.001, 0.5 + 0 * row], axis=-1)
    cloud[:10] = 0  # not measured
    image = np.stack([6 * row, 6 * column, 0 * row], axis=-1).astype(np.uint8)
    packed = pack_cloud(cloud, image, row / side, (0.0, 1.0), row >= 15)
    assert packed is not None
    read = unpacked(packed)
    assert packed["points"] == 30 * side
    found_column, found_row = (read["xyz"][:, :2] * 1000 - [-10.5, 1]).round().astype(int).T
    assert np.abs(read["xyz"] - cloud[found_row, found_column]).max() < 1e-6
    assert (read["rgb"] == image[found_row, found_column]).all()
    assert (np.argwhere(read["grid"]) == np.stack([found_row, found_column], axis=1)).all()
    assert (read["defect"] == (found_row >= 15)).all()
    assert np.abs(read["score"] / 255 - found_row / side).max() < 0.01


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("size", [(300, 300), (150, 600), (90, 88)])
def test_cloud_is_thinned_close_to_the_limit(size: tuple[int, int], share: float) -> None:
    cloud = np.random.default_rng(0).uniform(0.1, 0.2, (*size, 3)).astype(np.float32)
    cloud[int(size[0] * share) :] = 0
    packed = pack_cloud(cloud, None, MAP, (0.0, 1.0))
    assert packed is not None
    valid = int(size[0] * share) * size[1]
    assert min(0.9 * CLOUD_POINTS, 0.97 * valid) <= packed["points"] <= min(CLOUD_POINTS, valid)
    assert packed["colored"] is False
    assert unpacked(packed)["rgb"].size == 0


def test_image_and_map_of_other_sizes_are_aligned_with_the_cloud() -> None:
    cloud = np.full((80, 80, 3), 0.1, dtype=np.float32)
    image = np.zeros((400, 400, 3), dtype=np.uint8)
    image[200:] = 200
    plane = np.zeros((20, 20), dtype=np.float32)
    plane[10:] = 1
    packed = pack_cloud(cloud, image, plane, (0.0, 1.0))
    assert packed is not None
    read = unpacked(packed)
    assert ((read["score"] == 255) == (read["rgb"][:, 0] == 200)).all()
    assert (read["score"] == 255).mean() == 0.5


@pytest.mark.parametrize("side", [800, 801, 90])
def test_thinned_cloud_keeps_colors_and_scores_of_its_points(side: int) -> None:
    row, column = np.mgrid[:side, :side] / side
    cloud = np.stack([row + 1, column + 1, row + 1], axis=-1).astype(np.float32)
    image = np.stack([255 * row, 255 * column, 0 * row], axis=-1).astype(np.uint8)
    packed = pack_cloud(cloud, image, row, (0.0, 1.0))
    assert packed is not None
    read = unpacked(packed)
    places = read["xyz"][:, :2] - 1
    assert np.abs(read["rgb"][:, :2] - 255 * places).max() < 1.01
    assert np.abs(read["score"] - 255 * places[:, 0]).max() < 0.6


def test_empty_cloud_is_none() -> None:
    assert pack_cloud(np.zeros((8, 8, 3), dtype=np.float32), None, MAP, (0.0, 1.0)) is None


def test_single_point_is_packed() -> None:
    cloud = np.zeros((8, 8, 3), dtype=np.float32)
    cloud[3, 3] = 0.1, 0.2, 0.3
    packed = pack_cloud(cloud, None, MAP, (0.0, 1.0))
    assert packed is not None
    assert unpacked(packed)["xyz"] == pytest.approx(np.array([[0.1, 0.2, 0.3]]), abs=1e-6)
