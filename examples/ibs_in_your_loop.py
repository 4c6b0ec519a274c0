"""IBS in a plain PyTorch loop, with a network that is not of this package.

python examples/ibs_in_your_loop.py [STEPS]

The network makes a mask as the product of an object's embedding and the features of every pixel. Each crop shows two
discs; on the one crop alone nothing keeps the mask of a disc from covering the discs of other crops, too. IBS does.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.structures import SegmentEmbeddings


class Network(nn.Module):
    """Features of every pixel, and an embedding of the pixel at the middle of an object."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(5, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.embed = nn.Linear(width, width)

    def forward(self, images: Tensor, crop: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), and of N objects the crop (N,) and the middle (N, 2) as y, x."""
        size = images.shape[-2:]
        place = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij"))
        features = self.features(torch.cat([images, place.expand(len(images), -1, -1, -1)], dim=1))
        return features, self.embed(features[crop, :, middles[:, 0], middles[:, 1]])


def batch(crops: int, generator: torch.Generator, size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops with two bright discs each: images, the crop and middle of every object, and its mask (N, H, W)."""
    crop = torch.arange(crops).repeat_interleave(2)
    middles = torch.randint(6, size - 6, (2 * crops, 2), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = ((y - middles[:, 0, None, None]) ** 2 + (x - middles[:, 1, None, None]) ** 2 < 25).float()
    images = 0.1 * torch.rand(crops, 3, size, size, generator=generator)
    images.index_add_(0, crop, masks[:, None].expand(-1, 3, -1, -1))
    return images, crop, middles, masks


def main(steps: int = 200, seed: int = 0) -> list[tuple[float, float]]:
    """Train; returns the loss of the masks and that of IBS at every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network()
    ibs = IntraBatchSupervision(weight=1.0, partners="random")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        images, crop, middles, masks = batch(4, generator)
        features, embeddings = network(images, crop, middles)
        logits = torch.einsum("nc,nchw->nhw", embeddings, features[crop])
        mask_loss = F.binary_cross_entropy_with_logits(logits, masks)
        is_thing = torch.ones(len(crop), dtype=torch.bool)
        ibs_loss = ibs(SegmentEmbeddings(embeddings, features, crop, is_thing))
        optimizer.zero_grad()
        (mask_loss + ibs_loss).backward()
        optimizer.step()
        history.append((float(mask_loss), float(ibs_loss)))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: masks {history[-1][0]:.3f}, IBS {history[-1][1]:.3f}")
    return history


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
