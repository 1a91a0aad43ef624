"""From a clip on disk to the tokens that LLaMA reads (Sec. 3.5, App. D): some frames, each through the image path.

    clip --read_frames--> T PIL RGB --encode: preprocess, CLIPVisionTower, pool--> (T + P, Dv) --model.Adapter--> (T + P, D)

    python video.py clip.mp4 --frames 8 --out sheet.png

A clip is a video file (`pip install av`), an animated GIF, WebP or PNG, a folder of frames, or an .npy of (T, H, W, 3).
No parameter is new: `pool` takes two means, as Video-ChatGPT. Unlike there, frames come to the square as images do
(`clip_vit.preprocess`, not the nearest pixel), and temporal tokens are not filled up with zeros.
"""

import argparse
import pickle
import re
import sys
import textwrap
from bisect import bisect_right
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageSequence

from checkpoint import require_file, write_whole
from clip_vit import in_zip, open_image, preprocess

RULES = ("segments", "linspace")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
IMAGES = (*ANIMATIONS, ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff")
FAULTS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what PIL and numpy raise


def sample(total, count, rule="segments"):
    """Choose `count` of `total` frames: their indices in order, some of them twice where there are too few.

    segments  the middles of `count` equal parts, as Video-ChatGPT reckons them
    linspace  evenly spaced, the first and the last included
    Halves are rounded to even.
    """
    if total < 1 or count < 1:
        raise ValueError(f"{count} frames of {total}; expected at least one of at least one; ask for more")
    if rule == "segments":
        part = (total - 1) / count
        return [(round(part * i) + round(part * (i + 1))) // 2 for i in range(count)]
    if rule == "linspace":
        return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
    raise ValueError(f"rule {rule!r}; expected {' or '.join(RULES)}; choose one")


def is_clip(path):
    """Say whether a path is a clip's, and not a still image's: a folder, or a file whose name says so."""
    return Path(path).is_dir() or Path(path).suffix.lower() not in IMAGES or Path(path).suffix.lower() == ".gif"


def frames_of(clip, count):
    """Bring what a model is asked about to `count` PIL frames: a path, a list of frames, or one still image again and again."""
    if isinstance(clip, Image.Image):
        return [clip] * count
    if isinstance(clip, list | tuple):
        return [clip[i] for i in sample(len(clip), count)]
    return read_frames(clip, count)


def read_frames(path, count, rule="segments"):
    """Read `count` frames of a clip, as `sample` chooses them: list of PIL RGB images, upright, each of its own size.

    Of a video file that breaks off, the frames that are there; of several streams, the largest. Pixels that are not
    square stay so. Raises FileNotFoundError, ImportError where PyAV is needed and absent, or ValueError naming the clip.
    """
    return look(path, count, rule)[3]


def look(path, count, rule="segments"):
    """Open a clip and read frames: (what it is, how many it has, the indices sampled, those frames)."""
    for whole in (False, True):  # the second time, where its packets turn out not to be its frames
        about, total, read = open_clip(path, whole)
        indices = sample(total, count, rule)
        try:
            frames = read(sorted(set(indices)))
        except Unseekable:
            continue
        return about, total, indices, [frames[i] for i in indices]


# ----- clips on disk: each open_ gives (what it is, how many frames, read), and read(places) gives {place: PIL RGB}


@contextmanager
def naming(path, *errors):
    """Turn what a reader raises into one line that names the clip."""
    try:
        yield
    except errors as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({why}); expected a whole file; replace it or leave it out") from None


def open_clip(path, whole=False):
    """Open a clip of any kind, told by its name; a still image, which may lie in a zip, is a clip of one frame."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() in IMAGES and (path.suffix.lower() not in ANIMATIONS or in_zip(path)[0]):
        return "still image", 1, lambda places: {0: open_image(path)}
    if not require_file(path, "a video file, an animation, a folder of frames, or an .npy").stat().st_size:
        raise ValueError(f"{path} is empty; expected a clip; replace it or leave it out")
    if path.suffix.lower() == ".npy":
        return open_array(path)
    return open_animation(path) if path.suffix.lower() in ANIMATIONS else open_container(path, whole)


def open_folder(folder):
    """Open a folder of frames: image files in the order of the numbers in their names, 2 before 10."""
    names = [p.name for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
    names.sort(key=lambda name: (re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name), name))
    if not names:
        raise ValueError(f"{folder} holds no image file; expected frames ({', '.join(IMAGES)}); check the folder")
    return "folder", len(names), lambda places: {place: open_image(folder / names[place]) for place in places}


def open_array(path):
    """Open an .npy of frames, uint8 (T, H, W, 3); only the frames that are wanted are read."""
    with naming(path, *FAULTS):
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"{path} holds {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3); save it so")
    return "array", len(frames), lambda places: {place: Image.fromarray(np.array(frames[place])) for place in places}


def open_animation(path):
    """Open a GIF, WebP or PNG, animated or still: each frame is what a viewer shows, its transparency dropped."""
    spans = []
    with naming(path, *FAULTS), Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()  # WebP knows its span only then
            spans.append(frame.info.get("duration", 0))
        about = image.format + (f", {sum(spans) / 1000:.2f} s" if sum(spans) else "")

    def read(places):
        if len(spans) == 1:
            return {0: open_image(path)}
        frames = {}
        with naming(path, *FAULTS), Image.open(path) as image:
            for place in places:
                image.seek(place)
                frames[place] = image.convert("RGB")
        return frames

    return about, len(spans), read


# ----- video files


class Unseekable(Exception):
    """Raised where decoding from a key frame gives other frames than the packets promise."""


def open_container(path, whole=False):
    """Open a video file by PyAV, without decoding it: its packets' times, sorted, are its frames in the order shown.

    `read` decodes from the key frame before each frame wanted. What comes on the way must be what was listed, or it
    raises Unseekable. With `whole`, or where packets say too little, all is decoded, once to count and once to read.
    """
    try:
        import av
    except ImportError:
        raise ImportError(f"{path} needs PyAV; expected it, or a folder of frames; pip install av") from None
    with opened(path) as file:
        covers = av.stream.Disposition.attached_pic
        streams = [s for s in file.streams.video if s.codec_context and not s.disposition & covers]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in file.streams})) or "none"
            raise ValueError(f"{path} has no video stream (streams: {kinds}); expected one; leave it out")
        listed = {s.index: [] for s in streams}
        for packet in packets(file, streams):
            if not packet.is_discard:  # by the edit list: decoded, never shown
                listed[packet.stream_index].append((packet.pts, packet.dts, packet.is_keyframe))
        best = max(streams, key=lambda s: (s.width * s.height, len(listed[s.index])))
        number, unit, promised, codec = best.index, best.time_base, best.frames, best.codec_context.name
        about = f"{codec}, stream {number + 1} of {len(file.streams)}"

    times, keys = [pts for pts, _, _ in listed[number]], {}
    if not whole and None not in times and len(set(times)) == len(times) and codec != "vp8":  # vp8 hides frames
        times.sort()
        keys = {bisect_right(times, pts) - 1: pts if dts is None else dts for pts, dts, key in listed[number] if key}
    if 0 not in keys:
        keys = {}
        with opened(path) as file:
            times = [frame.pts for frame in decoded(file, number)]
    if not times:
        raise ValueError(
            f"{path} holds no frame that can be decoded; expected a whole file; replace it or leave it out"
        )
    if promised not in (0, len(times)):
        about += f", {promised} frames in its header"
    if len(times) > 1 and None not in times:  # the last frame lasts as long as the mean of the others
        about += f", {float((times[-1] - times[0]) * unit) * len(times) / (len(times) - 1):.2f} s"

    def read(places):
        with opened(path) as file:
            coming = seek(file, number, times, keys, places) if keys else enumerate(decoded(file, number))
            return {place: upright(frame) for place, frame in coming if place in places}

    return about, len(times), read


@contextmanager
def opened(path):
    import av

    with naming(path, av.FFmpegError), av.open(str(path)) as file:
        yield file


def packets(file, streams):
    """Give the whole packets up to where the file ends or breaks off."""
    import av

    try:
        for packet in file.demux(streams):
            if packet.size and not packet.is_corrupt:
                yield packet
    except av.FFmpegError:
        return


def decoded(file, number):
    """Give a stream's frames from here on, in the order shown; a packet that cannot be decoded gives none."""
    import av

    stream = file.streams[number]
    for packet in chain(packets(file, stream), [None]):  # None asks for what the decoder holds back
        try:
            yield from stream.decode(packet)
        except av.FFmpegError:
            continue


def seek(file, number, times, keys, places):
    """Give (place, frame) of the places wanted and of those on the way. keys: {place of a key frame: where to seek}"""
    starts, place = sorted(keys), -1
    for wanted in places:
        start = starts[bisect_right(starts, wanted) - 1]
        if not start <= place <= wanted:  # what comes next is not on the way from the key frame
            file.seek(keys[start], stream=file.streams[number])
            place, coming = start, decoded(file, number)
        while place <= wanted:
            frame = next(coming, None)
            if frame is None or frame.pts is None or frame.pts > times[place]:
                raise Unseekable
            if frame.pts == times[place]:  # earlier ones belong before the key frame
                yield place, frame
                place += 1


def upright(frame):
    """Make a decoded frame a PIL RGB image, turned and mirrored as its display matrix says."""
    image, matrix = frame.to_image(), frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.sign(np.frombuffer(matrix, np.int32))  # x' = a x + c y, y' = b x + d y; y down
        image = image if a else image.transpose(Image.Transpose.TRANSPOSE)
        image = image if a + c > 0 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image if b + d > 0 else image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


# ----- tokens


def pool(patches):
    """Average patches over space and over time: (T, P, Dv) -> (T + P, Dv), or both with B before (App. D).

    The T temporal tokens come first, then the P spatial ones: so Video-ChatGPT's weights were trained, though both
    papers name them the other way round.
    """
    if patches.ndim not in (3, 4):
        raise ValueError(f"patches of shape {tuple(patches.shape)}; expected (T, P, Dv) or (B, T, P, Dv); see encode")
    return torch.cat([patches.mean(-2), patches.mean(-3)], dim=-2)


def encode(tower, frames, side, geometry="squash", chunk=8):
    """Bring frames through the frozen tower and average them as `pool` does: T PIL images -> (T + P, Dv), in the tower's dtype.

    `chunk` frames are in the tower at a time; beside them, only sums are kept, in float32.
    """
    if not frames:
        raise ValueError("no frames; expected one or more; see read_frames")
    weight, over_space, over_time = tower.pre_layrnorm.weight, [], 0
    with torch.inference_mode():
        for start in range(0, len(frames), chunk):
            pixels = torch.stack([preprocess(frame, side, geometry) for frame in frames[start : start + chunk]])
            patches = tower(pixels.to(weight.device, weight.dtype)).float()  # (chunk, P, Dv)
            over_space.append(patches.mean(1))
            over_time = over_time + patches.sum(0)
        tokens = torch.cat([*over_space, over_time / len(frames)]).to(weight.dtype)
    return tokens.clone()  # an adapter that learns from it could not save what inference mode made


def read_features(path):
    """Read what `pool` gave before, saved by np.save (.npy) or by Video-ChatGPT (.pkl): float32 (T + P, Dv).

    Of a pickle nothing is built but the one array. Raises FileNotFoundError, or ValueError naming the file.
    """
    path = require_file(path, "pooled features, .npy or .pkl")
    with naming(path, Exception), open(path, "rb") as file:  # a pickle that is no array can fail in any way
        array = np.load(file, allow_pickle=False) if path.suffix == ".npy" else FloatArray(file).read()
        if array.ndim != 2 or array.dtype.kind != "f":
            raise ValueError(f"it holds {array.dtype} {array.shape}, not floats (tokens, width)")
        return torch.from_numpy(array.astype(np.float32))


class PlainPickle(pickle.Unpickler):
    """Read a pickle of lists, dicts, texts and numbers; one that wants anything else built is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which could run any code, so it is not run")


class FloatArray(PlainPickle):
    """Read the pickle of a numpy array of floats: what it calls of numpy is noted down, not called."""

    class Call:
        def __init__(self, *args):
            self.args = args

        def __setstate__(self, state):
            self.state = state

    def find_class(self, module, name):
        known = ("ndarray", "dtype", "_reconstruct", "_frombuffer", "encode")
        if name in known and module.split(".")[0] in ("numpy", "_codecs"):
            return self.Call
        return super().find_class(module, name)

    def read(self):
        array = self.load()
        if not isinstance(array, self.Call):
            raise ValueError(f"it holds {type(array).__name__}, not an array")
        if len(array.args) == 4:  # _frombuffer, of pickle's protocol 5
            data, dtype, shape, order = array.args
        else:
            _, shape, dtype, order, data = array.state
        if dtype.args[0] not in ("f2", "f4", "f8"):
            raise ValueError(f"it holds {dtype.args[0]}, not floats")
        if isinstance(data, self.Call):  # of protocol 2 and before
            data = data.args[0].encode("latin1")
        array = np.frombuffer(data, dtype.state[1] + dtype.args[0])
        return array.reshape(shape, order="F" if order in (True, "F") else "C")


# ----- looking


def card(image, boxes, lines=(), width=280):
    """Scale an image to `width`, draw boxes, write lines under it. boxes: (box_px, colour) in the image's pixels."""
    scale = width / image.width
    picture = image.resize((width, max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box_px, colour in boxes:
        corners = [min(max(v * scale, -9), 9999) for v in box_px]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            pen.rectangle(corners, outline=colour, width=3)
    wrapped = [line for text in lines for line in textwrap.wrap(text, width // 6) or [""]]
    card = Image.new("RGB", (width, picture.height + 13 * len(wrapped) + 6), "white")
    card.paste(picture)
    for i, line in enumerate(wrapped):
        ImageDraw.Draw(card).text((2, picture.height + 2 + 13 * i), line, fill="black")
    return card


def contact_sheet(cards, path, columns=4):
    """Lay cards out in rows and write them as one PNG."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (columns * (cards[0].width + 8) + 8, sum(heights) + 8 * (len(rows) + 1)), "white")
    y = 8
    for row, height in zip(rows, heights, strict=True):
        for i, card in enumerate(row):
            sheet.paste(card, (8 + i * (card.width + 8), y))
        y += height + 8
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


def sheet(frames, path, boxes=(), lines=()):
    """Write frames side by side as a PNG, the same boxes on each. boxes: (box_px, colour); lines: a text for each frame."""
    cards = [card(frame, boxes, lines[i : i + 1]) for i, frame in enumerate(frames)]
    contact_sheet(cards, path, columns=min(4, len(cards)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", help="video file, animation, folder of frames, or .npy")
    parser.add_argument("--frames", type=int, default=8, help="how many to sample (default: 8, as LocVLM-Vid-B+)")
    parser.add_argument("--rule", choices=RULES, default="segments", help="how (default: segments, Video-ChatGPT's)")
    parser.add_argument("--out", help="PNG to write the frames to")
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
        sys.exit(f"video.py: {error}")
