"""A plain Panoptic FCN with the names of the reference program (detectron2), written from its published description.

Only the network: it is an oracle for imported checkpoints. Nothing of the package is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d


class Conv(nn.Conv2d):
    """detectron2's convolution: norm inside, then ReLU if asked for."""

    def __init__(self, *args, norm: nn.Module | None = None, relu: bool = False, **options) -> None:
        super().__init__(*args, bias=norm is None, **options)
        if norm is not None:
            self.norm = norm
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x = self.norm(x) if hasattr(self, "norm") else x
        return F.relu(x) if self.relu else x


class Bottleneck(nn.Module):
    """With the stride in the first 1 x 1 convolution, as the MSRA weights want it."""

    def __init__(self, before: int, width: int, after: int, stride: int) -> None:
        super().__init__()
        if before != after:
            self.shortcut = Conv(before, after, 1, stride=stride, norm=FrozenBatchNorm2d(after))
        self.conv1 = Conv(before, width, 1, stride=stride, norm=FrozenBatchNorm2d(width), relu=True)
        self.conv2 = Conv(width, width, 3, padding=1, norm=FrozenBatchNorm2d(width), relu=True)
        self.conv3 = Conv(width, after, 1, norm=FrozenBatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        short = self.shortcut(x) if hasattr(self, "shortcut") else x
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + short)


class ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, 64, 7, stride=2, padding=3, norm=FrozenBatchNorm2d(64), relu=True)
        before = 64
        for stage, depth in enumerate(depths):
            width, after = 64 << stage, 256 << stage
            blocks = []
            for k in range(depth):
                blocks.append(Bottleneck(before, width, after, 2 if k == 0 and stage else 1))
                before = after
            setattr(self, f"res{stage + 2}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.stem.conv1(x), 3, stride=2, padding=1)
        outputs = []
        for stage in range(2, 6):
            x = getattr(self, f"res{stage}")(x)
            outputs.append(x)
        return outputs


class Pyramid(nn.Module):
    def __init__(self, depths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.bottom_up = ResNet(depths)
        for k in range(2, 6):
            setattr(self, f"fpn_lateral{k}", nn.Conv2d(64 << k, channels, 1))
            setattr(self, f"fpn_output{k}", nn.Conv2d(channels, channels, 3, padding=1))
        self.top_block = nn.Module()
        self.top_block.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.top_block.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.bottom_up(x)
        above = None
        results: list[Tensor] = []
        for k in range(5, 1, -1):
            here = getattr(self, f"fpn_lateral{k}")(features[k - 2])
            if above is not None:
                here = here + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
            above = here
            results.insert(0, getattr(self, f"fpn_output{k}")(here))
        p6 = self.top_block.p6(results[-1])
        return [*results, p6, self.top_block.p7(p6.clamp(min=0))]


class Deformable(nn.Module):
    def __init__(self, before: int, after: int, norm: bool, groups: int) -> None:
        super().__init__()
        self.offset_mask_conv = nn.Conv2d(before, 27, 3, padding=1)
        self.dcnv2 = nn.Module()
        self.dcnv2.weight = nn.Parameter(torch.randn(after, before, 3, 3) * (before * 9) ** -0.5)
        if norm:
            self.dcnv2.norm = nn.GroupNorm(groups, after)
        else:
            self.dcnv2.bias = nn.Parameter(torch.randn(after) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.offset_mask_conv(x).chunk(3, dim=1)
        bias = getattr(self.dcnv2, "bias", None)
        offset = torch.cat([first, second], dim=1)
        x = deform_conv2d(x, offset, self.dcnv2.weight, bias, padding=1, mask=mask.sigmoid())
        return F.relu(self.dcnv2.norm(x) if bias is None else x)


class Stack(nn.Module):
    def __init__(
        self, name: str, before: int, after: int, depth: int, norm: bool, deform: bool, coord: bool, groups: int
    ) -> None:
        super().__init__()
        self.coord = coord
        for k in range(depth):
            inputs = after if k else before + 2 * coord
            if deform:
                layer: nn.Module = Deformable(inputs, after, norm, groups)
            else:
                layer = Conv(inputs, after, 3, padding=1, norm=nn.GroupNorm(groups, after) if norm else None, relu=True)
            self.add_module(f"{name}_{k + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.coord:
            b, _, h, w = x.shape
            down = torch.linspace(-1, 1, h)[:, None].expand(h, w)
            across = torch.linspace(-1, 1, w)[None].expand(h, w)
            x = torch.cat([x, down.expand(b, 1, h, w), across.expand(b, 1, h, w)], dim=1)
        for layer in self.children():
            x = layer(x)
        return x


class ReferencePanopticFCN(nn.Module):
    def __init__(
        self,
        things: int,
        stuff: int,
        depths: tuple[int, ...] = (1, 1, 1, 1),
        channels: int = 64,
        features: int = 32,
        depth: int = 3,
        deform: bool = True,
        deform_features: bool = False,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.backbone = Pyramid(depths, channels)
        self.semantic_fpn = nn.Module()
        for k in range(2, 6):
            steps: list[nn.Module] = []
            for _ in range(max(1, k - 2)):
                steps.append(Conv(channels, channels, 3, padding=1, norm=nn.GroupNorm(groups, channels), relu=True))
                if k > 2:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.semantic_fpn.add_module(f"p{k}", nn.Sequential(*steps))
        self.position_head, self.kernel_head = nn.Module(), nn.Module()
        stack = Stack("position_head_head", channels, channels, depth, True, deform, False, groups)
        self.position_head.position_head = stack
        self.position_head.out_inst = nn.Conv2d(channels, things, 3, padding=1)
        self.position_head.out_sem = nn.Conv2d(channels, stuff, 3, padding=1)
        self.kernel_head.kernel_head = Stack("kernel_head_head", channels, channels, depth, True, False, True, groups)
        self.kernel_head.out_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.feature_encoder = nn.Module()
        self.feature_encoder.encode_head = Stack(
            "encode_head_head", channels, features, depth, False, deform_features, True, groups
        )
        for kind in ("thing", "stuff"):
            generator = nn.Module()
            generator.embed_extractor = nn.Conv2d(channels, features, 1)
            self.add_module(f"{kind}_generator", generator)
        for name, value in [*self.named_parameters(), *self.named_buffers()]:  # nothing at its neutral value
            if "running_var" in name:
                value.data.uniform_(0.5, 1.5)
            elif value.ndim == 1 and "bias" not in name and "mean" not in name:
                value.data.uniform_(0.8, 1.2)
            elif value.ndim == 1:
                value.data.normal_(std=0.1)

    def forward(self, image: Tensor, mean: tuple[float, ...]) -> dict[str, list[Tensor]]:
        """``image`` (3, H, W) uint8 as detectron2 reads it, BGR; ``mean`` is subtracted in that order."""
        x = (image.float() - torch.tensor(mean).view(3, 1, 1))[None]
        x = F.pad(x, (0, -x.shape[-1] % 32, 0, -x.shape[-2] % 32))
        pyramid = self.backbone(x)
        semantic = sum(getattr(self.semantic_fpn, f"p{k}")(pyramid[k - 2]) for k in range(2, 6))
        position = [self.position_head.position_head(p) for p in pyramid[1:]]
        kernels = [self.kernel_head.out_conv(self.kernel_head.kernel_head(p)) for p in pyramid[1:]]
        return {
            "centers": [self.position_head.out_inst(p) for p in position],
            "regions": [self.position_head.out_sem(p) for p in position],
            "kernels": kernels,
            "features": [self.feature_encoder.encode_head(semantic)],
            "things": [self.thing_generator.embed_extractor(k) for k in kernels],
        }
