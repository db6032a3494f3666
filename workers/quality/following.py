"""Does the picture follow the prompt? Which biome it shows and which way the camera moves, seen from pixels alone.

The biome is the palette that lies nearest to the pixels, hill shading allowed for; the direction is the shift between
frames with the highest correlation. Both are also asked about true frames, so their own errors are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.worlds.camera import DIRECTIONS
from workers.worlds.terrain import BIOMES

_SHADES = (0.86, 0.93, 1.0, 1.07, 1.14)
_STRIDE = 4  # every fourth pixel is enough to know a palette


def recognise_biome(frames_FCHW: Tensor) -> int:
    """Index into `BIOMES` of the palette that explains the frames best; frames are RGB in [-1, 1]."""
    pixels = frames_FCHW[:, :, ::_STRIDE, ::_STRIDE].movedim(1, -1).reshape(-1, 3).float() / 2 + 0.5
    shades = pixels.new_tensor(_SHADES)[:, None, None]
    errors = []
    for biome in BIOMES:
        palette = pixels.new_tensor(biome.palette) / 255
        shaded = (shades * palette).clamp(0, 1).flatten(0, 1)
        errors.append(torch.cdist(pixels, shaded).amin(1).clamp(max=0.3).mean())
    return int(torch.stack(errors).argmin())


def recognise_direction(frames_FCHW: Tensor, gap: int = 6) -> int:
    """Index into `DIRECTIONS` of the camera's motion, from the shift between frames ``gap`` apart."""
    grey = frames_FCHW.float().mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    window = torch.hann_window(grey.shape[-1], device=grey.device)
    spectrum = torch.fft.fft2(grey * window[:, None] * window[None, :])
    cross = spectrum[:-gap] * spectrum[gap:].conj()
    peak = torch.fft.ifft2(cross / (cross.abs() + 1e-3)).real.mean(0)
    size = peak.shape[-1]
    flat = int(peak.flatten().argmax())
    # The picture moves against the camera, and the first frame is the reference: the peak is the camera's own shift.
    y, x = (value - size if value > size // 2 else value for value in divmod(flat, size))
    vectors = torch.tensor([vector for _, vector in DIRECTIONS], dtype=torch.float32)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return int((vectors @ torch.tensor([float(x), float(y)])).argmax())
