"""Show which frames of a clip a model reads.

    python -m tools.frames CLIP --frames 8 --out frames.png

clip    video file, animation, folder of frames, or .npy
frames  how many to sample; LocVLM-Vid-B+ reads 8
out     PNG to write the frames to
"""

from formats.pictures import sheet
from tools import command
from video import sample_frames


def show_frames(clip, /, frames=8, out=None):
    file_format, total, indices, pictures = sample_frames(clip, frames)
    print(f"{clip}: {file_format}, {pictures[0].width} x {pictures[0].height}, {total} frames")
    print("sampled:", *indices)
    if out:
        sheet(pictures, out, lines=[f"frame {index}" for index in indices])
        print(f"written: {out}")


main = command(__name__, show_frames)
