"""Control inputs in the public form, small: grey pictures that grow brighter."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_video(path: Path, num_frames: int = 81, width: int = 32, height: int = 16, fps: int = 16) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(num_frames):
            picture = np.full((height, width, 3), 40 + 2 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_control(
    folder: Path, num_clips: int, *, num_named: int | None = None, width: int = 32, height: int = 16
) -> Path:
    """A folder as it is published; the list may name more clips than there are files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_clips):
        write_video(folder / f"depth_{i:02}.mp4", width=width, height=height)
        write_video(folder / f"track_{i:02}.mp4", width=width, height=height, fps=8)
    entries = [
        {"text": f"prompt {i}", "depth": f"./elsewhere/depth_{i:02}.mp4", "track": f"./elsewhere/track_{i:02}.mp4"}
        for i in range(num_named or num_clips)
    ]
    (folder / "cond.json").write_text(json.dumps(entries))
    Image.new("RGB", (width, height), (200, 10, 10)).save(folder / "first.png")
    return folder
