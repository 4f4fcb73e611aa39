"""Contrastive loss against its plain form and recorded values, and retrieval against a slow plain form."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GoldenFeatures
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from feature_extractors import reference
from models import build_feature_fusion, contrastive
from models.contrastive import contrastive_loss, retrieval
from models.feature_fusion import FeatureFusion
from utils.errors import InputError
from utils.feature_store import pair_rgb


def heads(rows: int, dim: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Outputs of the heads, correlated so that neither the loss nor its gradient is trivial."""
    generator = torch.Generator().manual_seed(rows)
    xyz = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    rgb = 3 * xyz + torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return xyz.to(dtype).requires_grad_(), rgb.to(dtype).requires_grad_()


def test_loss_of_hand_calculated_pairs() -> None:
    xyz, rgb = torch.tensor([[3.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.5, 0.0], [0.0, 2.0]])
    # q k^T = [[1, 0.6], [0, 0.8]]: each row is one rgb patch against all xyz patches
    expected = math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(-0.8))
    assert contrastive_loss(xyz, rgb).item() == pytest.approx(expected, rel=1e-6)
    swapped = math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-0.2))
    assert contrastive_loss(rgb, xyz).item() == pytest.approx(swapped, rel=1e-6)


@pytest.mark.parametrize("negatives", ["local", "global"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_loss_equals_its_plain_form(rows: int, negatives: str) -> None:
    xyz, rgb = (output.detach() for output in heads(rows, dtype=torch.float64))
    expected = reference.contrastive_loss(xyz, rgb).item()
    assert contrastive_loss(xyz, rgb, negatives).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("entries", [1, 10, 1000, 1 << 24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_value_and_gradient_in_blocks_equal_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, tolerance: float, entries: int
) -> None:
    monkeypatch.setattr(contrastive, "MAX_BLOCK_ENTRIES", entries)
    xyz, rgb = heads(rows, dtype=dtype)
    loss, expected = contrastive_loss(xyz, rgb), reference.contrastive_loss(xyz, rgb)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(5 * loss, (xyz, rgb))  # 5: tests the incoming gradient
    for grad, plain in zip(ours, torch.autograd.grad(5 * expected, (xyz, rgb)), strict=True):
        # At N = 1 the gradient is 0. Otherwise its entries are about 1/N, so the tolerance scales with that.
        torch.testing.assert_close(grad, plain, rtol=tolerance, atol=tolerance / rows)
        assert rows == 1 or plain.abs().max() > 0.05 / rows


@pytest.mark.parametrize("entries", [1, 12, 1 << 24])
def test_gradient_equals_finite_differences(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(contrastive, "MAX_BLOCK_ENTRIES", entries)
    assert torch.autograd.gradcheck(contrastive_loss, heads(5, 3, torch.float64))


@pytest.mark.parametrize("constant", [0, 1])
def test_only_one_side_may_require_a_gradient(constant: int) -> None:
    pair = heads(7, dtype=torch.float64)
    pair[constant].requires_grad_(False)
    contrastive_loss(*pair).backward()
    learning = pair[1 - constant]
    (expected,) = torch.autograd.grad(reference.contrastive_loss(*pair), learning)
    torch.testing.assert_close(learning.grad, expected)


class LargestTensor(TorchDispatchMode):
    """Number of entries of the largest tensor that any operation returns, forward or backward."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *made])
        return result


def test_no_tensor_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dim, limit = 500, 8, 20_000
    monkeypatch.setattr(contrastive, "MAX_BLOCK_ENTRIES", limit)
    xyz, rgb = heads(rows, dim)
    with LargestTensor() as plain:
        reference.contrastive_loss(xyz, rgb).backward()
    assert plain.entries == rows**2  # the plain form makes one, and the check sees it
    with LargestTensor() as ours:
        contrastive_loss(xyz, rgb).backward()
        retrieval(xyz.detach(), rgb.detach())
    assert rows * dim <= ours.entries <= limit


def test_memory_kept_for_the_backward_pass_grows_linearly_with_the_rows() -> None:
    rows, dim = 200, 8
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        contrastive_loss(*heads(rows, dim))
    assert 0 < max(kept) <= rows * dim


def test_loss_of_equal_rows_is_two_log_n() -> None:
    assert contrastive_loss(torch.ones(50, 8), torch.ones(50, 8)).item() == pytest.approx(2 * math.log(50))


def test_loss_of_half_precision_is_computed_in_single_precision() -> None:
    xyz, rgb = torch.randn(300, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    loss = contrastive_loss(xyz, rgb)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.contrastive_loss(xyz.double(), rgb.double()), rel=1e-6)


@pytest.mark.parametrize("negatives", ["local", "global"])
def test_a_batch_without_valid_points_is_an_error(negatives: str) -> None:
    module = FeatureFusion(xyz_dim=5, rgb_dim=3)
    with pytest.raises(InputError, match="without valid points"):
        contrastive_loss(*module(torch.zeros(2, 3, 5), torch.randn(2, 3, 3)), negatives)


# Retrieval


def slow_retrieval(xyz: Tensor, partner: list[int], rgb: Tensor) -> tuple[int, float]:
    """Hits and chance hits of xyz patches whose rgb patches are rows `partner` of an image's distinct rgb patches."""
    hits = 0
    for patch, own in zip(xyz, partner, strict=True):
        cosine = [float(patch @ other / (patch.norm() * other.norm())) for other in rgb]
        hits += max(range(len(rgb)), key=cosine.__getitem__) == own
    return hits, len(xyz) / len(rgb)


@pytest.mark.parametrize("entries", [1, 100, 1 << 24])
@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 1.5, 100.0])
def test_retrieval_equals_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, noise: float, copies: int, entries: int
) -> None:
    monkeypatch.setattr(contrastive, "MAX_BLOCK_ENTRIES", entries)
    generator = torch.Generator().manual_seed(int(noise))
    rgb = torch.randn(16, 5, generator=generator)
    partner = [place // copies for place in range(16 * copies)]
    xyz = 2 * rgb[partner] + noise * torch.randn(16 * copies, 5, generator=generator)
    hits, chance = retrieval(xyz, rgb[partner])
    assert (hits, chance) == slow_retrieval(xyz, partner, rgb)
    assert chance == copies
    if noise == 0.0:
        assert hits == 16 * copies
    else:
        assert hits < 16 * copies * (0.9 if noise == 1.5 else 0.3)


def test_retrieval_counts_rgb_patches_found_by_xyz_patches() -> None:
    xyz, rgb = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[1.0, 0.1], [1.0, 0.0]])
    assert retrieval(xyz, rgb) == (0, 1.0)
    assert retrieval(rgb, xyz)[0] == 1


def test_retrieval_of_one_and_no_patch() -> None:
    assert retrieval(torch.ones(1, 3), torch.ones(1, 3)) == (1, 1.0)
    assert retrieval(torch.ones(0, 3), torch.ones(0, 3))[0] == 0


@pytest.mark.golden
def test_loss_equals_the_original(goldens: Path, golden_weights: Path, golden_features: GoldenFeatures) -> None:
    recorded = json.loads((goldens / "stages_meta.json").read_text())["bagel_test_hole_000"]
    module = build_feature_fusion(golden_weights / "uff.pth", xyz_dim=1152, rgb_dim=768)
    features = golden_features("test/hole/000", "running")
    for pairing, name in [("reference", "saved"), ("aligned", "aligned")]:
        with torch.inference_mode():
            outputs = module(features.xyz, pair_rgb(features.rgb, len(features.xyz), pairing))
        assert len(outputs[0]) == recorded["uff_nonzero_rows"]
        expected = recorded[f"uff_contrastive_loss_on_{name}_patch"]
        assert contrastive_loss(*outputs).item() == pytest.approx(expected, rel=1e-6)
