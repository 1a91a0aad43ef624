"""From a clip on disk to the features that the adapter reads (Sec. 3.5, App. D): T frames, each through the image path.

    clip --read_frames--> T PIL RGB --encode_clip: preprocess, CLIPVisionTower, pool--> (T + P, Dv)

A clip is a video file (`pip install av`), an animated GIF, WebP or PNG, a folder of frames, or an .npy of (T, H, W, 3).
There are no new parameters: `pool` takes two means, as Video-ChatGPT. Unlike there, frames come to the square as images do
(`clip_vit.preprocess`), and temporal tokens are not padded with zeros.

    B clips   T frames   P patches per frame   Dv CLIP hidden_size
"""

import torch
from PIL import Image

from clip_vit import preprocess
from formats.clips import UnseekableError, open_frames


def sample(total, count):
    """Choose `count` of `total` frames, the middles of equal parts: indices in order. Some repeat if there are too few.

    The arithmetic is Video-ChatGPT's; halves are rounded to even.
    """
    if total < 1 or count < 1:
        raise ValueError(f"cannot sample {count} frames of {total}; both must be at least 1")
    part = (total - 1) / count
    return [(round(part * i) + round(part * (i + 1))) // 2 for i in range(count)]


def frames_of(clip, count):
    """Return `count` PIL frames of a path, of a list of frames (all, if it has as many), or of one still image."""
    if isinstance(clip, Image.Image):
        return [clip] * count
    if isinstance(clip, list | tuple):
        return list(clip) if len(clip) == count else [clip[i] for i in sample(len(clip), count)]
    return read_frames(clip, count)


def read_frames(path, count):
    """Read `count` frames of a clip, chosen by `sample`: list of PIL RGB images, upright, each of its own size.

    Of a truncated video file, the frames that can be decoded; of several streams, the largest. Pixels that are not square
    stay so. Raise FileNotFoundError, ImportError if PyAV is needed and missing, or ValueError naming the clip.
    """
    *_, frames = sample_frames(path, count)
    return frames


def sample_frames(path, count, decode_all=False):
    """Open a clip and read frames: (its format, its number of frames, the sampled indices, those frames)."""
    file_format, total, read = open_frames(path, decode_all)
    indices = sample(total, count)
    try:
        frames = read(sorted(set(indices)))
    except UnseekableError:  # its packets are not its frames: decode it whole, which needs no seeking
        return sample_frames(path, count, decode_all=True)
    return file_format, total, indices, [frames[i] for i in indices]


def pool(patches):
    """Average patches over space and over time: (T, P, Dv) -> (T + P, Dv), or both with a leading B (App. D).

    The T temporal tokens come first, as in Video-ChatGPT's weights, though both papers name the P spatial ones first.
    """
    if patches.ndim not in (3, 4):
        raise ValueError(f"patches of shape {tuple(patches.shape)}, not (T, P, Dv) or (B, T, P, Dv)")
    return torch.cat([patches.mean(-2), patches.mean(-3)], dim=-2)  # (..., T, Dv) and (..., P, Dv)


def encode_clip(tower, frames, geometry="squash", chunk=8):
    """Run frames through the frozen tower and pool them: T PIL images -> (T + P, Dv), in the tower's dtype.

    The tower sees `chunk` frames at a time; means are taken in float32.
    """
    if not frames:
        raise ValueError("no frames to encode")
    like = next(tower.parameters())
    with torch.no_grad():
        patches = []
        for start in range(0, len(frames), chunk):
            pixels = torch.stack([preprocess(frame, tower.config, geometry) for frame in frames[start : start + chunk]])
            patches.append(tower(pixels.to(like)).float())  # (chunk, 3, S, S) -> (chunk, P, Dv)
        return pool(torch.cat(patches)).to(like.dtype)  # (T, P, Dv) -> (T + P, Dv)
