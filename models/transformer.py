"""The plain pre-norm transformer under the point transformers."""

from collections.abc import Sequence

from timm.models.vision_transformer import Block
from torch import Tensor, nn


class TransformerEncoder(nn.Module):
    """Blocks of attention and MLP (ratio 4, qkv without bias, LayerNorm eps 1e-5, exact GELU, no stochastic depth)."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=4.0, qkv_bias=False, norm_layer=nn.LayerNorm) for _ in range(depth)
        )

    def forward(self, tokens: Tensor, position: Tensor, taken: Sequence[int]) -> list[Tensor]:
        """Run all blocks, the position embedding added to the input of each.

        Args:
            tokens: (B, T, width).
            position: (B, T, width) embedding of where each token lies.
            taken: indices of the blocks whose outputs are returned.

        Returns:
            Outputs of the taken blocks, (B, T, width) each, in block order.
        """
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens + position)
            if index in taken:
                outputs.append(tokens)
        return outputs
