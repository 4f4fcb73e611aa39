"""Fast Point Feature Histograms (Rusu et al., ICRA 2009) as a 3D backbone that needs no weights.

FPFH is the 3D half of BTF (Horwitz and Hoshen, CVPRW 2023), the baseline that M3DM builds on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.point_transformer import PointBackbone, PointFeatures

NORMAL_RADIUS, NORMAL_NEIGHBORS = 0.01, 30  # meters, points
FEATURE_RADIUS, FEATURE_NEIGHBORS = 0.02, 100
# Scales FPFH to the standard deviation of rgb features (about 4), by which the reference protocol divides all banks.
SCALE = 0.1
MEAN_ENTRY = 200 * SCALE / 11  # each of open3d's histograms has 11 bins, which sum to 200


class FpfhBackbone(PointBackbone):
    """Network with 33 features per point: three 11-bin histograms of the angles between the normals around it.

    The mean entry is subtracted. This changes no distance. It keeps empty bins from being exactly zero, which would
    mark a patch without points.
    """

    embed_dim = 33
    min_points = 4  # a normal cannot be fitted to fewer

    def forward(self, clouds: Sequence[Tensor]) -> list[PointFeatures]:
        """Features (N, 33), a row for each point, of clouds (N, 3) float32, meters, camera frame, valid points only."""
        return [PointFeatures(self._describe(points), None) for points in clouds]

    def _describe(self, points: Tensor) -> Tensor:
        import open3d as o3d

        cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points.cpu().double().numpy()))
        cloud.estimate_normals(o3d.geometry.KDTreeSearchParamHybrid(NORMAL_RADIUS, NORMAL_NEIGHBORS))
        cloud.orient_normals_towards_camera_location(np.zeros(3))
        search = o3d.geometry.KDTreeSearchParamHybrid(FEATURE_RADIUS, FEATURE_NEIGHBORS)
        fpfh = o3d.pipelines.registration.compute_fpfh_feature(cloud, search)  # type: ignore[call-arg]
        histograms = np.asarray(fpfh.data).T
        return torch.from_numpy(SCALE * histograms - MEAN_ENTRY).to(points)
