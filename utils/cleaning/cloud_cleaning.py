"""Cleaning of a raw scan: remove the plane, keep the largest cluster, pad to a square.

Pure and deterministic functions of arrays. Clouds (H, W, 3) are organized, float32, in meters and the camera's frame;
a missing pixel is exactly (0, 0, 0).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from utils.errors import InputError
from utils.scans.organized_pc import MAX_COORDINATE, valid_mask


@dataclass(frozen=True)
class CleaningRule:
    """Parameters of the cleaning, lengths in meters. The defaults are those of the reference."""

    border: int = 10  # pixels: width of the frame along the image border that the plane is fitted to
    fit_distance: float = 0.004  # border points nearer to a candidate plane than this support it
    fit_sample: int = 50  # border points for one candidate plane
    fit_iterations: int = 1000  # candidates at most
    fit_confidence: float = 1 - 1e-8  # stop early once a sample of supporters alone was drawn with this probability
    seed: int = 0  # of the samples, the same for each scan
    plane_distance: float = 0.005  # points nearer to the plane than this are removed
    cluster_eps: float = 0.006  # radius of a point's neighborhood
    cluster_min_points: int = 30  # size of a core point's neighborhood, itself included
    side_multiple: int = 100  # pixels: the padded side is the larger image side rounded up to a multiple
    least_support: float = 0.1  # share of the measured border points on the plane; with less, a scan is refused
    min_border: float = 0.25  # share of the border pixels with a measurement; a scan with less is doubtful
    min_support: float = 0.5  # share of the measured border points on the plane; a scan with at most this is doubtful
    strict: bool = False  # refuse doubtful scans
    empty_margins: bool = False  # use the border of the measured area instead of the image border
    keep_rgb: bool = False  # keep the removed pixels in the image
    mask_unmeasured: bool = False  # set the image to 0 where there is no measurement

    def settings(self) -> dict[str, Any]:
        """Parameters that results depend on, for the manifest; those left out only decide which scans are refused."""
        left_out = {"least_support", "min_border", "min_support", "strict"}
        used = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {"max_extent": MAX_COORDINATE} | used  # the limit of `checked_cloud`


class CleanScan(NamedTuple):
    """Cleaned and padded scan of side S. Removed pixels and padding are 0."""

    xyz: np.ndarray  # (S, S, 3)
    rgb: np.ndarray  # (S, S, C)
    gt: np.ndarray | None  # (S, S)
    doubt: str = ""  # about the plane


def clean_scan(xyz: np.ndarray, rgb: np.ndarray, gt: np.ndarray | None, rule: CleaningRule) -> CleanScan:
    """Remove the plane of a scan, keep its largest cluster, and pad it to a square.

    Takes the cloud (H, W, 3), the uint8 image (H, W, C) of the same view, and the ground truth (H, W) of any dtype,
    which is only padded. Dtypes stay as given. As in the reference, the image keeps its pixels without a measurement,
    unless `rule.mask_unmeasured` is set.

    Raises InputError if sizes differ, the border shows no plane (see `fit_border_plane`), nothing is left, or the scan
    is doubtful and `rule.strict` is set.
    """
    for name, image in (("image", rgb), ("ground truth", gt)):
        if image is not None and image.shape[:2] != xyz.shape[:2]:
            found, expected = (" x ".join(map(str, each.shape[:2])) for each in (image, xyz))
            problem = f"The {name} is {found} (H x W), but the point cloud {expected}"
            raise InputError(f"{problem}. Map the {name} to the pixels of the cloud.")
    measured = valid_mask(xyz)
    plane, doubt = fit_border_plane(xyz, np.random.default_rng(rule.seed), rule)
    if doubt and rule.strict:
        raise InputError(f"{doubt}. If the scan was cleaned before, use the original; otherwise leave it out.")
    part = largest_cluster(remove_plane(xyz, plane, rule.plane_distance), rule)
    clean_xyz = np.where(part[..., None], xyz, xyz.dtype.type(0))
    black = np.zeros_like(part) if rule.keep_rgb else measured & ~part
    if rule.mask_unmeasured:
        black |= ~measured
    clean_rgb = np.where(black[..., None], rgb.dtype.type(0), rgb)
    padded_gt = None if gt is None else pad_to_square(gt, rule.side_multiple)
    padded = pad_to_square(clean_xyz, rule.side_multiple), pad_to_square(clean_rgb, rule.side_multiple)
    return CleanScan(*padded, padded_gt, doubt)


def fit_border_plane(xyz: np.ndarray, rng: np.random.Generator, rule: CleaningRule) -> tuple[np.ndarray, str]:
    """Fit the plane under the object to the measurements in a frame along the border (RANSAC).

    The best of many planes through small random samples is refitted to its supporting points until these no longer
    change. (The reference refits once.) The result does not depend on the samples, which `rng` draws, unless the object
    covers more than about a quarter of the border.

    Returns the plane n . p + d = 0 as (4,) float64, unit normal n of either sign and offset d, and the reason to doubt
    that it is the table, or an empty string. Raises InputError if the border has fewer measurements than a
    sample, as in a cleaned scan, or too few of them lie on the plane.
    """
    area, remedy = "image border", "if its margins are empty, give --empty_margins"
    if rule.empty_margins:
        area, remedy = "border of the measured area", "otherwise leave it out"
        rows, columns = (np.flatnonzero(valid_mask(xyz).any(axis=axis)) for axis in (1, 0))
        xyz = xyz[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    frame = _border_frame(xyz, rule)
    points = xyz[frame & valid_mask(xyz)].astype(np.float64)
    place = f"within {rule.border} pixels of the {area}"
    measured = f"{len(points)} of the {frame.sum()} pixels {place} have a measurement, expected"
    original = "If the scan was cleaned before, use the original"
    if len(points) < rule.fit_sample:
        raise InputError(f"{measured} at least {rule.fit_sample}. {original}; {remedy}.")
    support = _best_support(points, rng, rule)
    for _ in range(rule.fit_iterations):
        if support.sum() < 3:
            break
        plane = _least_squares_plane(points[support])
        previous, support = support, _distance(points, plane) < rule.fit_distance
        if np.array_equal(support, previous):
            break
    on_plane = f"{support.mean():.0%} of the {len(points)} measurements {place} lie on one plane, expected"
    if support.sum() < 3 or support.mean() < rule.least_support:
        raise InputError(f"{on_plane} at least {rule.least_support:.0%}. {original}; otherwise leave it out.")
    across = float(np.sqrt(np.linalg.eigvalsh(np.cov(points[support].T))[1].clip(0)))
    line = f"The measurements {place} lie on a line or a point, {across:.2g} m wide, expected at least"
    doubts = {
        f"{measured} {rule.min_border:.0%}": len(points) < rule.min_border * frame.sum(),
        f"{on_plane} more than {rule.min_support:.0%}": support.mean() <= rule.min_support,
        f"{line} {rule.fit_distance:g} m": across < rule.fit_distance,
    }
    return plane, ". ".join(doubt for doubt, holds in doubts.items() if holds)


def shows_table(xyz: np.ndarray, rule: CleaningRule) -> bool:
    """True for a raw cloud (H, W, 3): unlike a cleaned one, it has a table along its border, without doubt."""
    try:
        return not fit_border_plane(xyz, np.random.default_rng(rule.seed), rule)[1]
    except InputError:
        return False


def is_cleaned(xyz: np.ndarray, rule: CleaningRule) -> bool:
    """True for a cloud (H, W, 3) with too few measurements along its border for a table, as in a cleaned scan.

    With `rule.empty_margins` a raw cloud has such a border as well, and the answer is False.
    """
    return not rule.empty_margins and int((_border_frame(xyz, rule) & valid_mask(xyz)).sum()) < rule.fit_sample


def _border_frame(xyz: np.ndarray, rule: CleaningRule) -> np.ndarray:
    """Return the mask (H, W) of the pixels within `rule.border` of the image border."""
    frame = np.ones(xyz.shape[:2], dtype=bool)
    frame[rule.border : -rule.border, rule.border : -rule.border] = False
    return frame


def remove_plane(xyz: np.ndarray, plane: np.ndarray, distance: float) -> np.ndarray:
    """Return a copy of `xyz` (H, W, 3) with every pixel nearer than `distance` meters to `plane` (4,) set to 0."""
    near = _distance(xyz.astype(np.float64), plane) < distance
    return np.where(near[..., None], xyz.dtype.type(0), xyz)


def largest_cluster(xyz: np.ndarray, rule: CleaningRule) -> np.ndarray:
    """Return the mask (H, W) of the largest cluster of a cloud (H, W, 3); the first by rows if several are as large.

    Raises InputError if no pixel is left, or all of them are noise.
    """
    present = valid_mask(xyz)
    labels = cluster_labels(xyz[present].astype(np.float64), rule.cluster_eps, rule.cluster_min_points)
    sizes = np.bincount(labels[labels >= 0])
    if not sizes.size:
        raise InputError(
            f"Nothing is left of the scan: {len(labels)} pixels lie off the plane and none has "
            f"{rule.cluster_min_points} neighbors within {rule.cluster_eps:g} m. Check that the coordinates are in "
            "meters and the object is in view."
        )
    mask = np.zeros_like(present)
    mask[present] = labels == sizes.argmax()
    return mask


def pad_to_square(image: np.ndarray, multiple: int) -> np.ndarray:
    """Pad (H, W, ...) on all sides with zeros to (S, S, ...), S = the larger side rounded up to `multiple`.

    An odd pixel goes to the bottom or right.
    """
    side = math.ceil(max(image.shape[:2]) / multiple) * multiple
    (top, left) = ((side - length) // 2 for length in image.shape[:2])
    padded = np.zeros((side, side, *image.shape[2:]), dtype=image.dtype)
    padded[top : top + image.shape[0], left : left + image.shape[1]] = image
    return padded


def crop_padding(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Undo `pad_to_square`: the middle (H, W, ...) of (S, S, ...), with `size` = (H, W)."""
    top, left = ((padded - length) // 2 for padded, length in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def cluster_labels(points: np.ndarray, eps: float, min_points: int) -> np.ndarray:
    """Cluster points by density (DBSCAN), exactly, with the label order of open3d's `cluster_dbscan`.

    A core point has at least `min_points` points within `eps`, itself counted. Core points within `eps` of each
    other share a cluster, numbered by its first core point. Another point joins the lowest cluster with a core point
    within `eps`. The usual algorithm visits every pair of neighbors, hundreds for each point of a dense scan. This one
    divides space into cells so small that all points of a cell are neighbors. All points of a cell with at least
    `min_points` are core points, and clusters grow cell by cell.

    `points` are (N, 3) float64, finite, within a million `eps` (meters) of each other. Returns the (N,) int64 cluster
    number of each point, -1 for noise.
    """
    from scipy.spatial import KDTree

    labels = np.full(len(points), -1)
    if not len(points):
        return labels
    cell = np.floor((points - points.min(axis=0)) / (eps / math.sqrt(3) * (1 - 1e-9))).astype(np.int64)
    cell_id = np.ravel_multi_index(tuple(cell.T), tuple(cell.max(axis=0) + 1))
    _, inverse, counts = np.unique(cell_id, return_inverse=True, return_counts=True)
    tree = KDTree(points)
    core = counts[inverse] >= min_points
    sparse = np.flatnonzero(~core)
    core[sparse] = tree.query_ball_point(points[sparse], eps, return_length=True) >= min_points
    if not core.any():
        return labels
    labels[core] = _core_labels(points[core], cell[core], cell_id[core], eps)
    edge = KDTree(points[~core]).sparse_distance_matrix(tree, eps, output_type="ndarray")
    edge = edge[core[edge["j"]]]
    lowest = np.full(len(points) - core.sum(), labels.max() + 1)
    np.minimum.at(lowest, edge["i"], labels[edge["j"]])
    labels[~core] = np.where(lowest > labels.max(), -1, lowest)
    return labels


def _core_labels(points: np.ndarray, cell: np.ndarray, cell_id: np.ndarray, eps: float) -> np.ndarray:
    """Label core points (N, 3) of cells (N, 3) by connected component, numbered in order of their first point."""
    from scipy.spatial import KDTree

    _, first, inverse = np.unique(cell_id, return_index=True, return_inverse=True)
    # Cells three or more apart along an axis are further apart than eps.
    pairs = KDTree(cell[first]).query_pairs(2, p=np.inf, output_type="ndarray")
    # One point of each cell joins most of them; only cells still apart after that need all their points compared.
    near = np.linalg.norm(points[first[pairs[:, 0]]] - points[first[pairs[:, 1]]], axis=1) <= eps
    component = _components(pairs[near], len(first))
    apart = pairs[component[pairs[:, 0]] != component[pairs[:, 1]]]
    members = np.split(points[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
    reach = np.nextafter(eps, np.inf)
    bridges = [
        (one, other)
        for one, other in apart
        if (KDTree(members[one]).query(members[other], distance_upper_bound=reach)[0] <= eps).any()
    ]
    joined = np.concatenate([pairs[near], np.reshape(bridges, (-1, 2)).astype(pairs.dtype)])
    component = _components(joined, len(first))[inverse]
    _, first_point, renumbered = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_point))[renumbered]


def _components(edges: np.ndarray, n: int) -> np.ndarray:
    """Return the component number (n,) of each node of an undirected graph with edges (E, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _best_support(points: np.ndarray, rng: np.random.Generator, rule: CleaningRule) -> np.ndarray:
    """Return the mask (N,) of the points that support the best sampled plane: most points, then least error."""
    best, best_support = (-1, 0.0), np.ones(len(points), dtype=bool)
    needed = float(rule.fit_iterations)
    iteration = 0
    while iteration < needed:
        iteration += 1
        sample = points[rng.choice(len(points), rule.fit_sample, replace=False)]
        distance = _distance(points, _least_squares_plane(sample))
        support = distance < rule.fit_distance
        quality = (int(support.sum()), -float(np.square(distance[support]).sum()))
        if quality > best:
            best, best_support = quality, support
            missed = 1 - support.mean() ** rule.fit_sample  # probability that a sample holds a point off the plane
            if missed < 1:
                enough = 0.0 if missed == 0 else math.log(1 - rule.fit_confidence) / math.log(missed)
                needed = min(needed, enough)
    return best_support


def _least_squares_plane(points: np.ndarray) -> np.ndarray:
    """Return the plane (4,) of least squared distance to points (N, 3); they vary least along its normal."""
    center = points.mean(axis=0)
    offset = points - center
    normal = np.linalg.eigh(offset.T @ offset)[1][:, 0]
    return np.append(normal, -normal @ center)


def _distance(points: np.ndarray, plane: np.ndarray) -> np.ndarray:
    return np.abs(points @ plane[:3] + plane[3])
