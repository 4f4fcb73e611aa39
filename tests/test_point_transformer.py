"""Group encoder and transformer block against their plain forms, and the point transformer at small sizes."""

import pytest
import torch
from torch import Tensor, nn

from feature_extractors import reference
from models.group_encoder import GroupEncoder
from models.point_ops import farthest_point_sample
from models.point_transformer import PointTransformer
from utils.choices import POINT_NORMS

SMALL = {"num_group": 16, "group_size": 8, "width": 24, "depth": 3, "num_heads": 2, "encoder_dim": 24}


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter and running statistic a random value, because fresh norms are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point():
                scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
                value.normal_(1.0 if value.ndim == 1 and name.endswith("weight") else 0.0, scale, generator=generator)


def cloud(points: int, seed: int = 0) -> Tensor:
    """Cloud (points, 3) half a meter from the camera, outside the radius that the sampling ignores."""
    return torch.rand(points, 3, generator=torch.Generator().manual_seed(seed)) + torch.tensor([0.0, 0.0, 0.5])


def plain_tokens(encoder: GroupEncoder, groups: Tensor) -> Tensor:
    plain = reference.GroupEncoder(20)
    plain.load_state_dict(encoder.state_dict())
    return plain.train(encoder.point_norm == "cloud")(groups)


@pytest.fixture(params=POINT_NORMS)
def encoder(request: pytest.FixtureRequest) -> GroupEncoder:
    encoder = GroupEncoder(20, request.param)
    randomize(encoder)
    return encoder.eval()


@pytest.fixture(params=[False, True], ids=["without class token", "with class token"])
def transformer(request: pytest.FixtureRequest) -> PointTransformer:
    module = PointTransformer(**SMALL, class_token=request.param)
    randomize(module)
    return module.eval()


# Group encoder


@pytest.mark.parametrize(("groups", "points"), [(1, 2), (1, 32), (2, 1), (5, 8), (16, 3)])
def test_group_encoder_equals_its_plain_form(encoder: GroupEncoder, groups: int, points: int) -> None:
    neighborhoods = torch.randn(groups, points, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = encoder(neighborhoods)
        assert tokens.shape == (groups, 20)
        # Batch norm divides by the standard deviation; that of two points may be tiny and amplify rounding.
        rounding = 1e-3 if groups * points == 2 else 1e-4
        expected = plain_tokens(encoder, neighborhoods)
        torch.testing.assert_close(tokens, expected, rtol=rounding, atol=rounding / 10)


def test_group_encoder_in_half_precision_is_close(encoder: GroupEncoder) -> None:
    """Only the wide products are rounded, not the coordinates or the statistics of the norms."""
    groups = torch.randn(40, 16, 3, generator=torch.Generator().manual_seed(1)) * 5e-3 + 0.5
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(groups)
    assert tokens.dtype == torch.float32
    expected = plain_tokens(encoder, groups)
    assert 1e-5 < (tokens - expected).norm() / expected.norm() < 1e-2


def test_negative_variance_by_rounding_gives_finite_tokens() -> None:
    """Hidden values are almost equal and the next layer removes their mean, so bf16 loses the rest."""
    torch.manual_seed(1)
    encoder = GroupEncoder(20).eval()
    with torch.no_grad():
        encoder.first_conv[1].bias.fill_(2.0)
        weight = encoder.first_conv[0].weight
        weight.copy_(weight[:1] + 1e-2 * torch.randn(128, 3, 1))
        weights = 0.3 * torch.randn(256, 128, 1)
        encoder.first_conv[3].weight.copy_(weights - weights.mean(dim=1, keepdim=True))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert encoder(5e-3 * torch.randn(64, 128, 3)).isfinite().all()


def test_group_encoder_does_not_depend_on_the_order_of_points(encoder: GroupEncoder) -> None:
    groups = torch.randn(6, 9, 3, generator=torch.Generator().manual_seed(1))
    order = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    shuffled = groups.gather(1, order[:, :, None].expand_as(groups))
    assert not torch.equal(shuffled, groups)
    torch.testing.assert_close(encoder(shuffled), encoder(groups), rtol=1e-5, atol=1e-5)


def test_only_running_statistics_keep_groups_independent() -> None:
    """With the statistics of the cloud, each group changes the result of all others."""
    groups = torch.randn(6, 9, 3, generator=torch.Generator().manual_seed(1))
    for point_norm, independent in (("running", True), ("cloud", False)):
        encoder = GroupEncoder(20, point_norm)
        randomize(encoder)
        alone, together = encoder(groups[:3]), encoder(groups)[:3]
        assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5) == independent, point_norm


def test_forward_does_not_change_running_statistics(encoder: GroupEncoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(torch.randn(4, 5, 3))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [False, True])
def test_point_norm_ignores_the_training_mode(encoder: GroupEncoder, training: bool) -> None:
    groups = torch.randn(4, 5, 3)
    expected = encoder(groups)
    torch.testing.assert_close(encoder.train(training)(groups), expected)


def test_unknown_point_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"point_norm is 'eval', expected one of \('cloud', 'running'\)"):
        GroupEncoder(20, "eval")


# Groups


def test_groups_are_neighborhoods_relative_to_their_centers(transformer: PointTransformer) -> None:
    points = cloud(50)
    (groups,), (centers,) = transformer.group([points])
    assert groups.shape == (16, 8, 3)
    assert torch.equal(centers, points[farthest_point_sample(points[None], 16)[0]])
    for group, center in zip(groups, centers, strict=True):
        nearest = points[(points - center).norm(dim=1).argsort()[:8]]
        torch.testing.assert_close(group, nearest - center)
        assert torch.equal(group[0], torch.zeros(3))  # the center is its own nearest point


@pytest.mark.parametrize(("num_group", "group_size", "needed"), [(16, 8, 16), (4, 30, 30), (12, 12, 12)])
def test_too_few_points_are_refused(num_group: int, group_size: int, needed: int) -> None:
    module = PointTransformer(**SMALL | {"num_group": num_group, "group_size": group_size}).eval()
    assert module.min_points == needed
    with torch.no_grad():
        assert module([cloud(needed)])[0].features.shape[0] == num_group
    expected = f"{needed - 1} valid points, but {num_group} groups of {group_size} points need at least {needed}"
    with pytest.raises(ValueError, match=expected):
        module([cloud(needed - 1)])


# Transformer


@torch.no_grad()
def test_features_equal_their_plain_form() -> None:
    """Batch norm uses the statistics of the cloud."""
    module = PointTransformer(**SMALL)
    randomize(module)
    plain = reference.PointTransformer(groups=16, size=8, width=24, depth=3, heads=2)
    plain.load_state_dict(module.state_dict())
    features, centers = plain(cloud(60))
    (found,) = module.eval()([cloud(60)])
    assert torch.equal(found.centers, centers)
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_forward_equals_its_steps(transformer: PointTransformer) -> None:
    """Outputs of three blocks, each after the final norm, are concatenated; the position enters every block."""
    points = cloud(60)
    (groups,), (centers,) = transformer.group([points])
    tokens, position = transformer.encoder(groups), transformer.pos_embed(centers)
    if transformer.cls_token is not None:
        tokens = torch.cat([transformer.cls_token[0], tokens])
        position = torch.cat([transformer.cls_pos[0], position])
    taken = []
    for block in transformer.blocks.blocks:
        plain = reference.Block(24, heads=2)
        plain.load_state_dict(block.state_dict())
        tokens = plain(tokens + position)
        normed = transformer.norm(tokens)
        taken.append(normed[1:] if transformer.cls_token is not None else normed)
    (features,) = transformer([points])
    torch.testing.assert_close(features.features, torch.cat(taken, dim=1), rtol=1e-4, atol=1e-4)
    assert torch.equal(features.centers, centers)


@torch.no_grad()
def test_batch_of_clouds_matches_single_clouds(transformer: PointTransformer) -> None:
    """The clouds differ in size, so the shorter ones are padded before sampling."""
    clouds = [cloud(60), 1.5 * cloud(41), cloud(16)]
    for together, points in zip(transformer(clouds), clouds, strict=True):
        (alone,) = transformer([points])
        assert torch.equal(together.centers, alone.centers)
        torch.testing.assert_close(together.features, alone.features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_class_token_changes_features_and_is_dropped() -> None:
    module = PointTransformer(**SMALL, class_token=True)
    randomize(module)
    module.eval()
    before = module([cloud(60)])[0].features
    assert before.shape == (16, 72)  # one row per group, none for the class token
    change = torch.randn(24, generator=torch.Generator().manual_seed(3))  # norms remove a constant
    module.cls_token += change
    assert not torch.allclose(module([cloud(60)])[0].features, before, rtol=1e-2, atol=1e-2)
    module.cls_token -= change
    torch.testing.assert_close(module([cloud(60)])[0].features, before, rtol=1e-4, atol=1e-4)
    module.cls_pos += change
    assert not torch.allclose(module([cloud(60)])[0].features, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("depth", "taken"), [(12, (3, 7, 11)), (3, (0, 1, 2)), (6, (1, 3, 5))])
def test_taken_blocks(depth: int, taken: tuple[int, ...]) -> None:
    module = PointTransformer(**SMALL | {"depth": depth})
    assert module.taken == taken
    assert len(module.blocks.blocks) == depth


@pytest.mark.parametrize("width", [24, 36])
def test_embed_dim_is_the_width_of_the_features(width: int) -> None:
    module = PointTransformer(**SMALL | {"width": width, "encoder_dim": 10}).eval()  # 10 -> width by reduce_dim
    assert isinstance(module.reduce_dim, nn.Linear)
    assert module.embed_dim == 3 * width
    with torch.no_grad():
        assert module([cloud(60)])[0].features.shape == (16, module.embed_dim)


def test_defaults_are_the_reference_numbers() -> None:
    with torch.device("meta"):
        module = PointTransformer()
    assert (module.num_group, module.group_size, module.embed_dim) == (1024, 128, 1152)
    assert module.encoder.point_norm == "cloud"
    assert isinstance(module.reduce_dim, nn.Identity)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 1
    assert {norm.eps for norm in norms} == {1e-5}  # the recorded numbers do not detect the ViT's 1e-6
    assert not any(block.attn.qkv.bias is not None for block in module.blocks.blocks)


@torch.no_grad()
def test_point_norm_changes_the_features() -> None:
    features = []
    for point_norm in POINT_NORMS:
        module = PointTransformer(**SMALL, point_norm=point_norm)
        randomize(module)
        features.append(module.eval()([cloud(60)])[0].features)
    assert not torch.allclose(*features, rtol=1e-2)


@torch.no_grad()
def test_extraction_is_bit_reproducible(transformer: PointTransformer) -> None:
    """There is no stochastic depth, dropout or state."""
    (first,), (second,) = transformer([cloud(60)]), transformer([cloud(60)])
    assert torch.equal(first.features, second.features)
    assert torch.equal(transformer.train()([cloud(60)])[0].features, first.features)
