"""The norms, as Flax modules for any model: `from jaxnorm.norms import PixelNorm`.

Batch, group and layer norm are Flax's own; each of the others is one of Flax's with the axes that
the name stands for. All map f32[N, H, W, C] to the same shape.
"""

from collections.abc import Sequence

import flax.linen as nn

BatchNorm = nn.BatchNorm
"""(x - mean) / sqrt(var + epsilon) * scale + bias over N, H and W (Ioffe and Szegedy, "Batch
Normalization", 2015, arXiv 1502.03167). Running averages of mean and variance, the biased one, lie
in `batch_stats`.
"""
GroupNorm = nn.GroupNorm
"""The same over H, W and the channels of a group of each image (Wu and He, "Group Normalization",
2018, arXiv 1803.08494).
"""
InstanceNorm = nn.InstanceNorm
"""The same over H and W of each channel of each image (Ulyanov, Vedaldi and Lempitsky, "Instance
Normalization", 2016, arXiv 1607.08022).
"""


class LayerNorm(nn.LayerNorm):
    """The same over H, W and C of each image, scale and bias for each channel (Ba, Kiros and
    Hinton, "Layer Normalization", 2016, arXiv 1607.06450).
    """

    reduction_axes: int | Sequence[int] = (-3, -2, -1)


class PixelNorm(nn.LayerNorm):
    """The same over the channels of each pixel: Flax's default of `nn.LayerNorm`, and ConvNeXt's
    (Liu et al., "A ConvNet for the 2020s", 2022, arXiv 2201.03545).
    """


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * scale over H, W and C of each image (Zhang and Sennrich,
    "Root Mean Square Layer Normalization", 2019, arXiv 1910.07467).
    """

    reduction_axes: int | Sequence[int] = (-3, -2, -1)
