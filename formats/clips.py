"""Clips on disk: video files (PyAV), animations, folders of frames, arrays. An open_* function returns (format, number of
frames, read), and read(places) returns {place: PIL RGB} for sorted places."""

import math
import re
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from formats import images
from formats.files import import_package, naming, require_file, some
from formats.images import ANIMATIONS, CLIP_SUFFIXES, IMAGES, PIL_ERRORS, image_file, open_image, split_zip

FRAMES = {*IMAGES} - {*CLIP_SUFFIXES}
CLIP_KINDS = f"a {' '.join(CLIP_SUFFIXES)} or a folder of frames"


def find_clips(folder):
    """Find the clips in a folder, or anywhere in a zip: {file name, with and without its suffix: path}.
    A folder of frames goes before a file of its name. Two clips of a zip with one name are refused."""
    if Path(folder).is_dir():
        paths = list(Path(folder).iterdir())
        files, folders = [path for path in paths if not path.is_dir()], list(filter(Path.is_dir, paths))
    elif split_zip(Path(folder) / "_")[0] == Path(folder):
        held = images.zip_folders(Path(folder)).items()
        files = [Path(folder, at, name) for at, names in held for name in names]
        folders = [Path(folder, at) for at, names in held if at and FRAMES & {Path(name).suffix.lower() for name in names}]
    else:
        raise FileNotFoundError(f"no folder or zip {folder} of clips, each {CLIP_KINDS}")
    files = [path for path in files if path.suffix.lower() in CLIP_SUFFIXES]
    files.sort(key=lambda path: (CLIP_SUFFIXES.index(path.suffix.lower()), path), reverse=True)  # the first suffix overwrites
    if doubled := [name for name, count in Counter(path.name for path in files + folders).items() if count > 1]:
        raise ValueError(f"{folder} holds {len(doubled)} names of clips twice ({some(doubled)}); unpack what you need")
    return {path.stem: path for path in files} | {path.name: path for path in files + folders}


def ratio_problem(path, frame, size):
    """Return a clip's problem if its frames have another aspect ratio than the annotations, else None. Sizes may differ."""
    if size and all(size) and abs(math.log(frame.width * size[1] / (frame.height * size[0]))) > 0.1:
        return f"{path} has frames of {frame.width} x {frame.height}, not the aspect ratio of the annotations, {size[0]} x {size[1]}"


def open_frames(path, decode_all=False):
    """Open a clip of any kind, by its name; it may lie in a zip. A still image is a clip of one frame."""
    path, suffix = Path(path), Path(path).suffix.lower()
    if path.is_dir() or suffix not in (*IMAGES, *CLIP_SUFFIXES) and images.names_in(path):
        return open_folder(path)
    if suffix in IMAGES and suffix not in ANIMATIONS:
        return "still image", 1, lambda places: {0: open_image(path)}
    is_in_zip = split_zip(path)[0] and images.has_image(path)
    if not is_in_zip and not require_file(path, f"a clip, {CLIP_KINDS}").stat().st_size:
        raise ValueError(f"{path} is an empty file; replace it")
    if suffix == ".npy":
        return open_array(path)
    return open_animation(path) if suffix in ANIMATIONS else open_video(path, decode_all)


def open_folder(folder):
    """Open a folder of frames: image files in the order of the numbers in their names, 2 before 10."""
    names = [name for name in images.names_in(folder) if Path(name).suffix.lower() in IMAGES]
    names.sort(key=lambda name: (re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name), name))
    if not names:
        raise ValueError(f"{folder} holds no image file; its frames must be {', '.join(IMAGES)}")
    return "folder", len(names), lambda places: {place: open_image(folder / names[place]) for place in places}


def open_array(path):
    """Open an .npy of frames, uint8 (T, H, W, 3). Only the requested frames are read."""
    with naming(path, *PIL_ERRORS):
        in_zip = split_zip(path)[0]  # which cannot be mapped
        frames = np.load(image_file(path) if in_zip else path, None if in_zip else "r", allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"{path} holds {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3); save the frames so")
    return "array", len(frames), lambda places: {place: Image.fromarray(np.array(frames[place])) for place in places}


def open_animation(path):
    """Open a GIF, WebP or PNG, animated or still. Frames are as a viewer shows them, without transparency."""
    spans = []
    with naming(path, *PIL_ERRORS), image_file(path) as file, Image.open(file) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()  # WebP knows its span only then
            spans.append(frame.info.get("duration", 0))
        about = image.format + (f", {sum(spans) / 1000:.2f} s" if sum(spans) else "")

    def read(places):
        if len(spans) == 1:
            return {0: open_image(path)}
        with naming(path, *PIL_ERRORS), image_file(path) as file, Image.open(file) as image:
            return {place: ImageSequence.Iterator(image)[place].convert("RGB") for place in places}
    return about, len(spans), read


class UnseekableError(Exception):
    """Raised if decoding from a key frame yields other frames than the packets listed."""


def open_video(path, decode_all=False):
    """Open a video file with PyAV, without decoding it: its packets' timestamps, sorted, are its frames in display order.
    `read` decodes from the key frame before each requested frame; it raises UnseekableError if decoded timestamps differ from
    the packets'. With `decode_all`, or if the packets say too little, everything is decoded, once to count and once to read."""
    av = import_package("av", f"{path} is a video file, which needs PyAV")
    with opened(path) as file:
        streams = [s for s in file.streams.video if s.codec_context and not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError(f"{path} has no video stream (its streams: {', '.join(sorted({s.type for s in file.streams}))})")
        listed = {s.index: [] for s in streams}
        for packet in packets(file, streams):
            if not packet.is_discard:  # by the edit list: decoded, never shown
                listed[packet.stream_index].append((packet.pts, packet.dts, packet.is_keyframe))
        best = max(streams, key=lambda s: (s.width * s.height, len(listed[s.index])))
        number, unit, promised, codec = best.index, best.time_base, best.frames, best.codec_context.name
        about = f"{codec}, stream {number + 1} of {len(file.streams)}"
    times, keys = [pts for pts, _, _ in listed[number]], {}
    if not decode_all and None not in times and len(set(times)) == len(times) and codec != "vp8":  # vp8 hides frames
        times.sort()
        keys = {bisect_right(times, pts) - 1: pts if dts is None else dts for pts, dts, key in listed[number] if key}
    if 0 not in keys:
        keys = {}
        with opened(path) as file:
            times = [frame.pts for frame in decoded(file, number)]
    if not times:
        raise ValueError(f"{path} holds no frame that can be decoded; replace the file")
    if promised not in (0, len(times)):
        about += f", {promised} frames in its header"
    if len(times) > 1 and None not in times:  # the last frame lasts as long as the mean of the others
        about += f", {float((times[-1] - times[0]) * unit) * len(times) / (len(times) - 1):.2f} s"

    def read(places):
        with opened(path) as file:
            frames = seek(file, number, times, keys, places) if keys else enumerate(decoded(file, number))
            return {place: upright(frame) for place, frame in frames if place in places}
    return about, len(times), read


@contextmanager
def opened(path):
    import av
    source = image_file(path) if split_zip(path)[0] else str(path)
    with naming(path, av.FFmpegError, *images.ZIP_ERRORS), av.open(source) as file:
        yield file


def packets(file, streams):
    """Yield the complete packets, up to where the file ends or is cut off."""
    import av
    with suppress(av.FFmpegError):
        yield from (packet for packet in file.demux(streams) if packet.size and not packet.is_corrupt)


def decoded(file, number):
    """Yield a stream's frames from the current position, in display order. Undecodable packets are skipped."""
    import av
    stream = file.streams[number]
    for packet in chain(packets(file, stream), [None]):  # None flushes the decoder
        with suppress(av.FFmpegError):
            yield from stream.decode(packet)


def seek(file, number, times, keys, places):
    """Yield (place, frame) of the requested places and of those on the way. keys: {place of a key frame: where to seek}"""
    starts, place = sorted(keys), -1
    for wanted in places:
        start = starts[bisect_right(starts, wanted) - 1]
        if not start <= place <= wanted:  # the next decoded frame is not between the key frame and the wanted one
            file.seek(keys[start], stream=file.streams[number])
            place, frames = start, decoded(file, number)
        while place <= wanted:
            frame = next(frames, None)
            if frame is None or frame.pts is None or frame.pts > times[place]:
                raise UnseekableError
            if frame.pts == times[place]:  # earlier ones belong before the key frame
                yield place, frame
                place += 1


def upright(frame):
    """Turn a decoded frame into a PIL RGB image, rotated and mirrored as its display matrix says."""
    image, matrix = frame.to_image(), frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.sign(np.frombuffer(matrix, np.int32))  # x' = a x + c y, y' = b x + d y; y down
        image = image if a else image.transpose(Image.Transpose.TRANSPOSE)
        image = image if a + c > 0 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image if b + d > 0 else image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image
