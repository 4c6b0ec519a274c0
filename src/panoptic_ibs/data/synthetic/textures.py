"""Noise, skies and the grain of surfaces: everything done per pixel rather than per stroke."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from .camera import Camera, Light

Plane = NDArray[np.float32]

# Per class: strength of fine grain, and of blotches a few pixels wide.
GRAIN: dict[str, tuple[float, float]] = {
    "road": (0.05, 0.03), "sidewalk": (0.05, 0.04), "building": (0.05, 0.05), "wall": (0.08, 0.1),
    "fence": (0.06, 0.05),
    "pole": (0.04, 0.02), "vegetation": (0.12, 0.3), "terrain": (0.14, 0.18), "sky": (0.008, 0.0),
    "person": (0.05, 0.06), "rider": (0.05, 0.06),
}  # fmt: skip
DEFAULT_GRAIN = (0.03, 0.02)


def value_noise(rng: np.random.Generator, size: tuple[int, int], cell: float) -> Plane:
    """Smooth noise (H, W) in about [-1, 1] whose blotches are ``cell`` pixels wide."""
    h, w = (max(2, int(np.ceil(s / cell)) + 1) for s in size)
    coarse = rng.random((h, w), dtype=np.float32) * 2 - 1
    return np.asarray(cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def paint_sky(image: NDArray[np.uint8], rng: np.random.Generator, camera: Camera, light: Light) -> None:
    """Fill the picture down to the horizon with a gradient, a glow around the sun, and clouds."""
    h, w = image.shape[:2]
    rows = max(2, min(h, int(camera.horizon) + 2))
    t = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** 1.3
    sky = np.asarray(light.sky_top, np.float32) * (1 - t) + np.asarray(light.sky_low, np.float32) * t
    sky = np.repeat(sky, w, axis=1)
    cell = 0.16 * w
    # Clouds lie flat: noise in a frame squeezed towards the horizon.
    cloud = sum(value_noise(rng, (rows, w), cell / 2**i) * 0.5**i for i in range(4))
    dense = {"day": 0.28, "overcast": -0.1, "dusk": 0.22}[light.kind]
    cover = np.clip((np.asarray(cloud, np.float32) - dense) * 1.6, 0, 0.85)[..., None] * (1 - 0.5 * t)
    white = {"day": (250, 250, 250), "overcast": (202, 206, 210), "dusk": (250, 176, 142)}[light.kind]
    sky += cover * (np.asarray(white, np.float32) - sky)
    image[:rows] = np.clip(sky, 0, 255).astype(np.uint8)
    image[rows:] = np.asarray(light.sky_low, np.float32).astype(np.uint8)


def grain_ground(
    image: NDArray[np.uint8], rng: np.random.Generator, camera: Camera, tiled: NDArray[np.bool_], tile: float
) -> None:
    """Texture the ground in perspective: patches and grain of asphalt; slabs of ``tile`` metres where ``tiled``."""
    h, w = image.shape[:2]
    top = max(0, int(np.ceil(camera.horizon + 0.004 * h)))
    if top >= h:
        return
    y = np.arange(top, h, dtype=np.float32)[:, None] + 0.5
    z = camera.focal * camera.height / (y - camera.horizon)
    x = (np.arange(w, dtype=np.float32)[None] + 0.5 - camera.cx) * (z / camera.focal)
    noise = 0.6 * value_noise(rng, (256, 256), 22) + 0.4 * value_noise(rng, (256, 256), 5)
    depth = np.broadcast_to(z * 4 % 256, x.shape).astype(np.float32)
    patches = cv2.remap(noise, (x * 12 % 256).astype(np.float32), depth, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    fade = np.clip(1.2 - z / 45, 0, 1)
    factor = 1 + 0.07 * fade * patches
    # A joint is 3 cm wide; where a pixel covers more than that it fades instead of flickering.
    wide = np.maximum(0.03, z / camera.focal)
    joint = (np.abs(x % tile - tile / 2) > tile / 2 - wide) | (np.abs(z % tile - tile / 2) > tile / 2 - wide)
    clear = np.clip(1.4 - z / (0.12 * tile * camera.focal), 0, 1)
    factor -= np.where(joint & tiled[top:], 0.2 * clear, 0)
    image[top:] = np.clip(image[top:] * factor[..., None], 0, 255).astype(np.uint8)


def cast_shadows(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """Darken the picture where ``mask`` (255: full shade) says, with soft and slightly blue edges."""
    h = image.shape[0]
    soft = cv2.blur(mask, (max(1, h // 170) * 2 + 1,) * 2)
    lut = 255 - np.arange(256)[:, None] * np.asarray((1.0, 0.97, 0.88))
    kept = cv2.LUT(cv2.merge((soft, soft, soft)), np.rint(lut).astype(np.uint8)[:, None])
    image[:] = cv2.multiply(image, kept, scale=1 / 255)


def finish(
    image: NDArray[np.uint8],
    rng: np.random.Generator,
    class_map: NDArray[np.uint8],
    names: list[str],
    light: Light,
) -> NDArray[np.uint8]:
    """Grain by class, vignette and sensor noise; the last step of a picture.

    Args:
        image: (H, W, 3) uint8.
        rng: for the noise.
        class_map: (H, W) uint8, position in ``names``.
        names: class names ("" for void).
        light: of the picture.
    """
    h, w = image.shape[:2]
    unit = h / 512
    table = np.asarray([GRAIN.get(n, DEFAULT_GRAIN) for n in names], np.float32)
    coarse = 0.6 * value_noise(rng, (h, w), max(1.5, 11 * unit)) + 0.6 * value_noise(rng, (h, w), max(1.0, 4 * unit))
    factor = rng.random((h, w), dtype=np.float32) * 2 - 1
    factor *= table[:, 0][class_map]
    factor += 1
    factor += table[:, 1][class_map] * coarse
    yy = np.linspace(-1, 1, h, dtype=np.float32)[:, None] ** 2
    xx = np.linspace(-1, 1, w, dtype=np.float32)[None] ** 2
    factor *= 1.03 - 0.07 * (xx + yy)
    factor *= {"day": 1.02, "overcast": 0.97, "dusk": 0.98}[light.kind]
    out = image * factor[..., None]
    np.clip(out, 0, 255, out=out)
    return out.astype(np.uint8)
