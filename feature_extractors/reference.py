"""M3DM in plain PyTorch: one file to read from top to bottom with the paper at hand.

Wang et al., "Multimodal Industrial Anomaly Detection via Hybrid Fusion" (Multi-3D-Memory), CVPR 2023. Headings 3.2 to
3.4 are sections of the paper. A sample is an image and an organized point cloud of the same view, (3, S, S) each.
The shapes below are those of the published configuration: S = 224, ViT-B/8 and Point-MAE.

    Color features                           image -> rgb patches (784, 768)
    3.2 Point Feature Alignment (PFA)        cloud -> xyz patches (3136, 1152)
    3.3 Unsupervised Feature Fusion (UFF)    both -> fusion patches (3136, 1920)
    3.4 Decision Layer Fusion (DLF)          patches -> memory banks -> score and anomaly map

The code computes the published results (`--protocol reference`), regardless of speed. Keywords that are off by default,
and the fields of `config.protocol`, turn on the changes of `--protocol corrected`. Each fast routine of this
repository names its plain form in this file, and tests compare the two.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from feature_extractors.config import DetectorConfig

Patches = Mapping[str, Tensor]  # (P, C) of each bank, by its name: xyz, rgb, fusion

# Color features


def rgb_patches(vit: Any, rgb: Tensor) -> Tensor:
    """F_rgb: the patch tokens (784, 768) of an image (3, S, S), row-major, by a vision transformer of timm."""
    return vit.forward_features(rgb[None])[0, vit.num_prefix_tokens :]  # without the class token


def resize_patches(patches: Tensor, grid: int) -> Tensor:
    """Bring patches (n, C) to another square grid, (grid**2, C), by average pooling; 28 -> 56 repeats each one."""
    side = math.isqrt(len(patches))
    return F.adaptive_avg_pool2d(patches.T.reshape(-1, side, side), grid).flatten(1).T


# 3.2 Point Feature Alignment


def farthest_point_sample(points: Tensor, n: int) -> Tensor:
    """FPS: pick n of points (N, 3), in meters, each the farthest from all picks so far; the lowest index wins a tie.

    As in the usual CUDA operation, the first pick is point 0, and points with |p|^2 <= 1e-3 are never picked later.
    """
    nearest = torch.full((len(points),), 1e10, dtype=points.dtype)  # squared distance to the picks
    nearest[points.square().sum(dim=1) <= 1e-3] = -1.0
    picks = [0]
    while len(picks) < n:
        squared = (points - points[picks[-1]]).square().sum(dim=1)
        nearest = torch.minimum(nearest, squared)
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def knn(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distance (M, k), Euclidean and ascending, and index (M, k) of the k points (N, 3) nearest to queries (M, 3)."""
    return torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False)


class GroupEncoder(nn.Module):
    """Mini-PointNet: the K points of a group become one token.

    Batch norm uses the statistics of the current cloud, as in training; `eval()` switches to those of the checkpoint.
    """

    def __init__(self, dim: int = 384) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1))
        self.second_conv = nn.Sequential(nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, dim, 1))

    def forward(self, groups: Tensor) -> Tensor:
        """Encode groups (G, K, 3), in meters relative to their centers, as tokens (G, 384)."""
        local = self.first_conv(groups.mT)  # (G, 256, K)
        of_group = local.amax(dim=2, keepdim=True).expand_as(local)
        return self.second_conv(torch.cat([of_group, local], dim=1)).amax(dim=2)  # (G, 512, K) -> (G, 384)


def mlp(width: int) -> nn.Sequential:
    """Linear, GELU, Linear with a hidden layer four times as wide."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))


class Block(nn.Module):
    """Pre-norm transformer block on tokens (T, width): attention softmax(q k^T / sqrt(d)) v by head, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v  # (heads, T, d)
        x = x + self.attn["proj"](attended.transpose(0, 1).flatten(1))
        return x + self.mlp(self.norm2(x))


class PointTransformer(nn.Module):
    """F_pt: Point-MAE (Pang et al., ECCV 2022). Parameters have the names of its checkpoint."""

    def __init__(self, groups: int = 1024, size: int = 128, width: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.groups, self.size, self.third = groups, size, depth // 3
        self.encoder = GroupEncoder(width)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(Block(width, heads) for _ in range(depth))})
        self.norm = nn.LayerNorm(width)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Divide points (N, 3), in meters, into groups with features g_i (1024, 1152) and centers c_i (1024, 3)."""
        centers = points[farthest_point_sample(points, self.groups)]
        neighbors = points[knn(centers, points, self.size)[1]]  # (1024, 128, 3)
        tokens, position = self.encoder(neighbors - centers[:, None]), self.pos_embed(centers)
        outputs = []
        for block in self.blocks["blocks"].children():
            tokens = block(tokens + position)
            outputs.append(self.norm(tokens))
        return torch.cat(outputs[self.third - 1 :: self.third], dim=1), centers  # of blocks 4, 8 and 12


def three_nn_interpolate(points: Tensor, centers: Tensor, features: Tensor, exact_distances: bool = False) -> Tensor:
    """Interpolate features g_i (1024, 1152) of centers c_i at points p_j, (N, 1152), by inverse squared distance:

        p'_j = sum_i alpha_i g_i,   alpha_i = 1 / (|c_i - p_j|^2 + eps) / sum_k 1 / (|c_k - p_j|^2 + eps)

    The sums are over the 3 nearest centers; eps is 1e-8. The published results expand the square to
    |c|^2 + |p|^2 - 2 c p, whose rounding error exceeds eps; `exact_distances` does not expand it.
    """
    if exact_distances:
        squared = torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        squared = -2 * points @ centers.T + points.square().sum(dim=1, keepdim=True) + centers.square().sum(dim=1)
    squared, index = squared.sort(dim=1)
    alpha = 1 / (squared[:, :3] + 1e-8)
    alpha = alpha / alpha.sum(dim=1, keepdim=True)
    return (features[index[:, :3]] * alpha[:, :, None]).sum(dim=1)


def project_and_pool(at_points: Tensor, valid: Tensor, grid: int, masked_pooling: bool = False) -> Tensor:
    """Project features p' (N, 1152) to their pixels, the N True ones of valid (S, S), and average over grid**2 patches.

    Pixels without a point count as 0. With `masked_pooling` the border is padded, and only valid pixels count.
    """
    plane = at_points.new_zeros(at_points.shape[1] + 1, *valid.shape)
    plane[:-1, valid], plane[-1, valid] = at_points.T, 1.0
    windows = F.avg_pool2d(plane, 3, stride=1, padding=1 if masked_pooling else 0)
    patches = F.adaptive_avg_pool2d(windows, grid).flatten(1).T
    patches, share = patches[:, :-1], patches[:, -1:]  # (3136, 1152), and (3136, 1) of pixels that are valid
    return torch.where(share > 0, patches / share, 0.0) if masked_pooling else patches


# 3.3 Unsupervised Feature Fusion


class FeatureFusion(nn.Module):
    """UFF: per modality an MLP chi after a LayerNorm and, for training, a linear head sigma."""

    def __init__(self, xyz_dim: int = 1152, rgb_dim: int = 768, head_dim: int = 256) -> None:
        super().__init__()
        self.xyz_norm, self.xyz_mlp = nn.LayerNorm(xyz_dim), mlp(xyz_dim)
        self.rgb_norm, self.rgb_mlp = nn.LayerNorm(rgb_dim), mlp(rgb_dim)
        self.rgb_head, self.xyz_head = nn.Linear(rgb_dim, head_dim), nn.Linear(xyz_dim, head_dim)

    def fuse(self, xyz: Tensor, rgb: Tensor) -> Tensor:
        """f_fs = chi_pt(f_pt) (+) chi_rgb(f_rgb), (+) being concatenation: (n, 1152) and (n, 768) -> (n, 1920)."""
        return torch.cat([self.xyz_mlp(self.xyz_norm(xyz)), self.rgb_mlp(self.rgb_norm(rgb))], dim=1)

    def forward(self, xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """h_pt = sigma_pt(chi_pt(f_pt)) and h_rgb = sigma_rgb(chi_rgb(f_rgb)) of the patches without a zero in xyz."""
        occupied = (xyz != 0).all(dim=1)
        chi_pt, chi_rgb = self.fuse(xyz[occupied], rgb[occupied]).split([xyz.shape[1], rgb.shape[1]], dim=1)
        return self.xyz_head(chi_pt), self.rgb_head(chi_rgb)


def contrastive_loss(h_pt: Tensor, h_rgb: Tensor) -> Tensor:
    """Patch-wise contrastive loss over the n patches of a batch, with h (n, 256) scaled to length 1:

    L_con = mean_i -log(exp(h_rgb_i . h_pt_i) / sum_t exp(h_rgb_i . h_pt_t)), doubled
    """
    similarity = F.normalize(h_rgb, dim=1) @ F.normalize(h_pt, dim=1).T
    return 2 * F.cross_entropy(similarity, torch.arange(len(similarity)))


# 3.4 Decision Layer Fusion


class Bank(NamedTuple):
    """Memory bank M: selected patches (N, C) of good samples, and the scalars that patches are normalized with."""

    rows: Tensor
    mean: float
    std: float


def bank_statistics(rows: Patches, rule: str) -> dict[str, tuple[float, float]]:
    """Mean and deviation over all entries for each bank: its "own", "shared" (xyz mean, rgb deviation) or "none"."""
    if rule == "own":
        return {name: (float(each.mean()), float(each.std())) for name, each in rows.items()}
    shared = (float(rows["xyz"].mean()), float(rows["rgb"].std())) if rule == "shared" else (0.0, 1.0)
    return dict.fromkeys(rows, shared)


def random_projection(rows: Tensor, eps: float, random_state: int | None) -> Tensor:
    """Project rows (N, C) at random with distortion eps; unchanged if that takes more than C columns."""
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    if johnson_lindenstrauss_min_dim(len(rows), eps=eps) > rows.shape[1]:
        return rows
    projection = SparseRandomProjection(eps=eps, random_state=random_state)
    return torch.from_numpy(projection.fit_transform(rows.numpy())).float()


def greedy_coreset(rows: Tensor, n: int, start: int = 0) -> Tensor:
    """Greedy k-center (PatchCore, Roth et al. 2022): pick n rows (N, C), each the farthest from all picks so far."""
    nearest = torch.full((len(rows),), torch.inf, dtype=rows.dtype)  # squared distance to the picks
    picks = [start]
    while len(picks) < min(n, len(rows)):
        squared = (rows - rows[picks[-1]]).square().sum(dim=1)
        nearest = torch.minimum(nearest, squared)
        nearest[picks[-1]] = -torch.inf
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def build_banks(config: DetectorConfig, rows: Patches) -> dict[str, Bank]:
    """Build the method's banks, of M_pt, M_rgb and M_fs, from each bank's patches (N, C) of all training samples."""
    method, protocol = config.method, config.protocol
    if protocol.drop_background and "xyz" in rows:
        rows = {**rows, "xyz": rows["xyz"][(rows["xyz"] != 0).any(dim=1)]}
    banks: dict[str, Bank] = {}
    reduced_xyz = None  # its size determines those of the published rgb and fusion banks
    for name, (mean, std) in bank_statistics(rows, "own" if protocol.own_statistics else method.statistics).items():
        normalized = (rows[name] - mean) / std
        size = len(normalized) if reduced_xyz is None or protocol.own_coreset_size else reduced_xyz
        projected = random_projection(normalized, config.coreset_eps, config.random_state)
        chosen = normalized[greedy_coreset(projected, int(config.f_coreset * size))]
        if name == "xyz":
            reduced_xyz = len(chosen)
            background = chosen.new_zeros(1, chosen.shape[1])
            if protocol.drop_background:
                chosen = torch.cat([chosen, (background - mean) / std])
            elif method.zero_row:  # 0 after normalization is the mean patch, as in the published results
                chosen = torch.cat([chosen[(chosen != 0).all(dim=1)], background])
        banks[name] = Bank(chosen, mean, std)
    return banks


def nearest_rows(patches: Tensor, rows: Tensor, exact_distances: bool = False) -> tuple[Tensor, Tensor]:
    """psi(M, f) = min_{m in M} |f - m| of each patch f (P, C), Euclidean (P,), and the index (P,) of that m.

    The published results expand the square, which cancels where f is close to m; `exact_distances` does not.
    """
    mode = "donot_use_mm_for_euclid_dist" if exact_distances else "use_mm_for_euclid_dist"
    return torch.cdist(patches, rows, compute_mode=mode).min(dim=1)


def image_score(patches: Tensor, distances: Tensor, index: Tensor, rows: Tensor, divisor: float, eps: float) -> float:
    """phi(M, f) = eta |f* - m*|, with the patch f* farthest from its nearest row m*, and PatchCore's weight (Eq. 7)

        eta = 1 - exp(|f* - m*| / sqrt(C)) / (sum_m exp(|f* - m| / sqrt(C)) + eps)

    where m are the 2 rows nearest to m*. All distances (P,), as from `nearest_rows`, are divided by `divisor` first.
    """
    worst = int(distances.argmax())
    s_star = distances[worst].double() / divisor
    around = torch.linalg.vector_norm(rows - rows[index[worst]], dim=1).sort(stable=True).indices[1:3]  # 0 is m* itself
    to_neighbors = torch.linalg.vector_norm(rows[around] - patches[worst], dim=1).double() / divisor
    root = math.sqrt(patches.shape[1])
    eta = 1 - torch.exp(s_star / root) / (torch.exp(to_neighbors / root).sum() + eps)
    return float(eta * s_star)


def anomaly_map(distances: Tensor, size: int, float_blur: bool = False) -> Tensor:
    """Resize distances (P,) of a square grid to a map (size, size), then blur it with sigma 4.

    The published maps are blurred as 8-bit images; `float_blur` computes the same Gaussian in floats.
    """
    side = math.isqrt(len(distances))
    plane = F.interpolate(distances.view(1, 1, side, side), size=(size, size), mode="bilinear")[0, 0]
    if float_blur:
        return torch.from_numpy(gaussian_filter(plane.double().numpy(), sigma=4, mode="nearest")).float()
    peak = plane.max().clamp_min(1e-30)
    levels = Image.fromarray((plane / peak * 255).byte().numpy()).filter(ImageFilter.GaussianBlur(radius=4))
    return torch.from_numpy(np.array(levels)) / 255 * peak


def one_class_svm(config: DetectorConfig, rows: np.ndarray) -> Any:
    """D_a or D_s, fitted on rows (n, K) of the K banks' scores or pixels; `score_samples` is larger for anomalies."""
    from sklearn.linear_model import SGDOneClassSVM

    return SGDOneClassSVM(random_state=42, nu=config.ocsvm_nu, max_iter=config.ocsvm_maxiter).fit(rows)


# The whole method


@torch.inference_mode()
def extract(config: DetectorConfig, networks: Mapping[str, Any], rgb: Tensor, xyz: Tensor) -> Patches:
    """Patches of a sample from the given networks: a ViT "rgb", a PointTransformer "xyz", a FeatureFusion "fusion"."""
    patches = {}
    if "xyz" in networks:
        valid = ((xyz != 0) & xyz.isfinite()).all(dim=0)  # a pixel without a point is exactly 0
        points = xyz[:, valid].T
        features, centers = networks["xyz"](points)
        at_points = three_nn_interpolate(points, centers, features, config.protocol.exact_distances)
        patches["xyz"] = project_and_pool(at_points, valid, config.xyz_grid, config.protocol.masked_pooling)
    if "rgb" in networks:
        patches["rgb"] = rgb_patches(networks["rgb"], rgb)
    if "fusion" in networks:
        patches["fusion"] = networks["fusion"].fuse(patches["xyz"], resize_patches(patches["rgb"], config.xyz_grid))
    return patches


def score_banks(config: DetectorConfig, banks: Mapping[str, Bank], patches: Patches) -> tuple[np.ndarray, np.ndarray]:
    """Scores phi (K,) and maps of psi (S, S, K) of a sample against K banks, float64."""
    divisor = 1.0 if config.protocol.unscaled_scores else config.method.score_divisor
    scores, maps = [], []
    for name, (rows, mean, std) in banks.items():
        normalized = (patches[name] - mean) / std
        distances, index = nearest_rows(normalized, rows, config.protocol.exact_distances)
        scores.append(image_score(normalized, distances, index, rows, divisor, config.method.weight_epsilon))
        maps.append(anomaly_map(distances, config.img_size, config.protocol.float_blur).double().numpy())
    return np.array(scores), np.stack(maps, axis=-1)


def fit_and_score(config: DetectorConfig, good: list[Patches], test: list[Patches]) -> tuple[np.ndarray, np.ndarray]:
    """Fit on good samples and score n test samples: a = D_a(phi) (n,) and S = D_s(psi) (n, S, S)."""
    banks = build_banks(config, {name: torch.cat([each[name] for each in good]) for name in config.method.banks})
    results = (score_banks(config, banks, patches) for patches in [*good, *test])
    scores, maps = (np.stack(each) for each in zip(*results, strict=True))
    if config.method.fusion != "svm":  # one bank, or the sum of two
        return scores[len(good) :].sum(axis=-1), maps[len(good) :].sum(axis=-1)
    score_lambdas, map_lambdas = config.lambdas_of_banks
    good_scores, scores = np.split(scores * score_lambdas, [len(good)])
    good_maps, maps = np.split(maps * map_lambdas, [len(good)])
    d_a = one_class_svm(config, good_scores)
    d_s = one_class_svm(config, good_maps.reshape(-1, len(banks)))
    return d_a.score_samples(scores), d_s.score_samples(maps.reshape(-1, len(banks))).reshape(maps.shape[:-1])
