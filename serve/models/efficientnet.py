"""The forward of EfficientNet-lite with its batch normalisations folded away, so that a replica needs only torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from serve.errors import LoadError

_EPSILON = 1e-3


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the family, as its authors scale it.

    Args:
        width: Factor of the channels; stem and head keep theirs.
        depth: Factor of the blocks of a stage; the first and last stage keep theirs.
        resolution: Width and height of the pictures that it was trained on, pixels.
    """

    name: str
    width: float
    depth: float
    resolution: int


VARIANTS = (
    Variant("efficientnet-lite0", 1.0, 1.0, 224),
    Variant("efficientnet-lite1", 1.0, 1.1, 240),
    Variant("efficientnet-lite2", 1.1, 1.2, 260),
    Variant("efficientnet-lite3", 1.2, 1.4, 280),
    Variant("efficientnet-lite4", 1.4, 1.8, 300),
)

#: Of each stage at width and depth 1: blocks, kernel, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class Block:
    """An inverted residual: expand by a 1x1 convolution, filter each channel, project by a 1x1 convolution."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int


def blocks_of(variant: Variant) -> Iterator[Block]:
    """Yield the blocks of a variant, in order."""
    inputs = _STEM_CHANNELS
    for stage, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
        outputs = _scaled(channels, variant.width)
        fixed = stage in (0, len(_STAGES) - 1)
        for index in range(repeats if fixed else math.ceil(repeats * variant.depth)):
            yield Block(kernel, stride if index == 0 else 1, expansion, inputs, outputs)
            inputs = outputs


def _scaled(channels: int, width: float) -> int:
    """Scale to a multiple of 8 that is at least nine tenths of the exact value."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class EfficientNetLite:
    """A network for inference.

    Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019), in the lite
    form without squeeze-and-excitation and with ReLU6.

    Args:
        state: Weights under the names of the published PyTorch port, float32.
        dtype: Type to compute in.

    Raises:
        LoadError: The weights are those of no variant, or some are missing.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], *, device: str, dtype: torch.dtype) -> None:
        self.variant = _recognise(state)
        self._device, self._dtype = device, dtype
        try:
            self._build(state)
        except KeyError as error:
            raise LoadError(f"the weights of {self.variant.name} lack the tensor {error}") from error

    def _build(self, state: Mapping[str, torch.Tensor]) -> None:
        self.classes = int(state["_fc.bias"].shape[0])
        self._stem = self._fold(state, "_conv_stem", "_bn0", stride=2)
        self._blocks = [
            self._fold_block(state, f"_blocks.{index}", block) for index, block in enumerate(blocks_of(self.variant))
        ]
        self._head = self._fold(state, "_conv_head", "_bn1")
        self._weight = self._placed(state["_fc.weight"])
        self._bias = self._placed(state["_fc.bias"])

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [N, classes], of RGB `pictures`, uint8 [N, resolution, resolution, 3]."""
        # The last dimension of the bytes is already the channel: this is the channels_last layout at no cost.
        x = pictures.to(self._device).permute(0, 3, 1, 2).to(self._dtype).sub_(127).div_(128)
        x = self._stem(x, clip=True)
        for block in self._blocks:
            x = block(x)
        x = self._head(x, clip=True).mean(dim=(2, 3))
        return functional.linear(x, self._weight, self._bias).float()

    def _fold_block(self, state: Mapping[str, torch.Tensor], name: str, block: Block) -> _FoldedBlock:
        expand = self._fold(state, f"{name}._expand_conv", f"{name}._bn0") if block.expansion > 1 else None
        channels = block.inputs * block.expansion
        depthwise = self._fold(state, f"{name}._depthwise_conv", f"{name}._bn1", stride=block.stride, groups=channels)
        project = self._fold(state, f"{name}._project_conv", f"{name}._bn2")
        return _FoldedBlock(expand, depthwise, project, skip=block.stride == 1 and block.inputs == block.outputs)

    def _fold(
        self, state: Mapping[str, torch.Tensor], convolution: str, norm: str, *, stride: int = 1, groups: int = 1
    ) -> _Convolution:
        """Fold a batch normalisation into the convolution before it: both are linear at inference."""
        scale = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + _EPSILON).sqrt()
        weight = state[f"{convolution}.weight"].double() * scale[:, None, None, None]
        bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
        placed = self._placed(weight).contiguous(memory_format=torch.channels_last)
        return _Convolution(placed, self._placed(bias), stride, groups)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


@dataclass(frozen=True, slots=True)
class _Convolution:
    weight: torch.Tensor
    bias: torch.Tensor
    stride: int
    groups: int

    def __call__(self, x: torch.Tensor, *, clip: bool) -> torch.Tensor:
        kernel = self.weight.shape[-1]
        rows, columns = (self._padding(size, kernel) for size in x.shape[-2:])
        if rows % 2 or columns % 2:
            padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
            x, rows, columns = functional.pad(x, padding), 0, 0
        half = (rows // 2, columns // 2)
        x = functional.conv2d(x, self.weight, self.bias, self.stride, half, groups=self.groups)
        return functional.hardtanh_(x, 0.0, 6.0) if clip else x

    def _padding(self, size: int, kernel: int) -> int:
        """Return what makes the output ceil(size / stride) long; an odd amount has its larger half at the end."""
        return max((math.ceil(size / self.stride) - 1) * self.stride + kernel - size, 0)


@dataclass(frozen=True, slots=True)
class _FoldedBlock:
    expand: _Convolution | None
    depthwise: _Convolution
    project: _Convolution
    skip: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else self.expand(x, clip=True)
        y = self.project(self.depthwise(y, clip=True), clip=False)
        return y.add_(x) if self.skip else y


def _recognise(state: Mapping[str, torch.Tensor]) -> Variant:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for variant in VARIANTS:
        if all(shapes.get(name) == shape for name, shape in _shapes(variant)):
            return variant
    names = ", ".join(variant.name for variant in VARIANTS)
    raise LoadError(f"the weights are none of {names}: {len(shapes)} tensors, first {', '.join(sorted(shapes)[:3])}")


def _shapes(variant: Variant) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what tells variants apart, and apart from other networks: the filters of stem, blocks and head."""
    yield "_conv_stem.weight", (_STEM_CHANNELS, 3, 3, 3)
    blocks = list(blocks_of(variant))
    for index, block in enumerate(blocks):
        channels = block.inputs * block.expansion
        yield f"_blocks.{index}._depthwise_conv.weight", (channels, 1, block.kernel, block.kernel)
        yield f"_blocks.{index}._project_conv.weight", (block.outputs, channels, 1, 1)
    yield "_conv_head.weight", (1280, blocks[-1].outputs, 1, 1)
