"""Show which frames of a clip a model reads.

    python -m tools.frames CLIP --frames 8 --out frames.png
"""

import argparse
import sys

from formats.pictures import sheet
from video import RULES, look


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("clip", help="video file, animation, folder of frames, or .npy")
    add("--frames", type=int, default=8, help="how many to sample (default: 8, as LocVLM-Vid-B+)")
    add("--rule", choices=RULES, default="segments", help="how (default: segments, Video-ChatGPT's)")
    add("--out", help="PNG to write the frames to")
    args = parser.parse_args(argv)
    about, total, indices, frames = look(args.clip, args.frames, args.rule)
    print(f"{args.clip}: {about}, {frames[0].width} x {frames[0].height}, {total} frames")
    print(f"sampled: {' '.join(map(str, indices))}")
    if args.out:
        sheet(frames, args.out, lines=[f"frame {index}" for index in indices])
        print(f"written: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"tools.frames: {error}")
