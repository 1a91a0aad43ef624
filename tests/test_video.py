"""A clip of any kind becomes frames, and frames become the tokens of Video-ChatGPT."""

import struct
import sys
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import VISION
from PIL import Image

import video
from clip_vit import CLIPVisionTower, preprocess
from formats import clips
from formats.eval_folder import require_images
from formats.images import is_clip
from formats.pictures import sheet, still
from tools import frames as command

COLOURS = [(230, 20, 20), (20, 200, 20), (20, 20, 230), (220, 220, 20), (20, 220, 220), (220, 20, 220), (240, 240, 240)]


def pictures(count, size=(33, 21)):
    return [Image.new("RGB", size, COLOURS[i % len(COLOURS)]) for i in range(count)]


def number(image):
    """Which of COLOURS the middle of an image is nearest to."""
    middle = np.array(image)[image.height // 2, image.width // 2].astype(int)
    return int(np.abs(np.array(COLOURS) - middle).sum(1).argmin())


def make_video(path, frames, times=None, kinds=("video",), codec="mpeg4", movflags="", **options):
    """Write a video file with PyAV. `kinds` are its streams: "video" holds the frames, "small video" holds them halved,
    "cover" the first of them doubled; "audio" is silence. times: when each frame is shown, in hundredths of a second."""
    av = pytest.importorskip("av")
    tick = Fraction(1, 100)
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as file:
        made = []  # (stream, its frames)
        for kind in kinds:
            if kind == "audio":
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
                sound.sample_rate, sound.pts = 16000, 0
                made.append((file.add_stream("aac", rate=16000), [sound]))
                continue
            scale = {"small video": 0.5, "video": 1, "cover": 2}[kind]
            stream = file.add_stream("png" if kind == "cover" else codec, rate=10)
            stream.width, stream.height = (int(side * scale) for side in frames[0].size)
            stream.pix_fmt = "rgb24" if kind == "cover" else "yuv420p"
            stream.time_base = stream.codec_context.time_base = tick
            stream.codec_context.options = {} if kind == "cover" else {"g": "4", **options}
            if kind == "cover":
                stream.disposition = av.stream.Disposition.attached_pic
            pictures = frames[:1] if kind == "cover" else frames
            shown = [av.VideoFrame.from_image(picture.resize((stream.width, stream.height))) for picture in pictures]
            for frame, time in zip(shown, times or range(0, 10 * len(shown), 10), strict=True):
                frame.pts, frame.time_base = time, tick
            made.append((stream, shown))
        for stream, shown in made:
            for frame in [*shown, None]:
                file.mux(stream.encode(frame))
    return path


# ----- which frames


def test_segments_are_video_chatgpts():
    """The indices of its load_video, written out."""
    assert video.sample(300, 8) == [18, 56, 93, 131, 168, 205, 243, 280]
    assert video.sample(8, 8) == [0, 1, 2, 3, 4, 4, 5, 6]
    assert video.sample(101, 100)[:3] == [0, 1, 2] and video.sample(101, 100)[-1] == 99
    assert video.sample(1, 3) == [0, 0, 0] and video.sample(10, 1) == [4]


def test_frames_repeat_where_there_are_too_few():
    for total in range(1, 12):
        chosen = video.sample(total, 8)
        assert len(chosen) == 8 and chosen == sorted(chosen) and 0 <= chosen[0] and chosen[-1] < total
    assert video.sample(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("total, count", [(0, 8), (8, 0)])
def test_what_cannot_be_sampled_is_refused(total, count):
    with pytest.raises(ValueError, match="must be at least 1"):
        video.sample(total, count)


# ----- clips that need no PyAV


def test_every_kind_of_clip_gives_the_same_frames(tmp_path, monkeypatch):
    """And without PyAV: a GIF, a WebP, a PNG, a folder (2 before 10) and an array."""
    monkeypatch.setitem(sys.modules, "av", None)
    frames = pictures(11)
    for suffix in (".gif", ".webp", ".png"):
        extra = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(tmp_path / f"c{suffix}", save_all=True, append_images=frames[1:], duration=40, **extra)
    (tmp_path / "c").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "c" / f"f{i}.png")
    (tmp_path / "c" / "._f0.png").write_bytes(b"a Mac was here")
    (tmp_path / "c" / "notes.txt").write_text("not a frame")
    np.save(tmp_path / "c.npy", np.stack([np.array(f) for f in frames]))
    for name in ("c.gif", "c.webp", "c.png", "c", "c.npy"):
        read = video.read_frames(tmp_path / name, 4)
        assert [number(f) for f in read] == [i % 7 for i in video.sample(11, 4)], name
        assert all(f.size == (33, 21) and f.mode == "RGB" for f in read)


def test_what_a_gif_leaves_unchanged_stays(tmp_path):
    """A frame that holds only a moving square is drawn over the one before, or over the background, as it asks."""
    full, small = Image.new("P", (20, 20), 1), Image.new("P", (20, 20), 0)
    for image in (full, small):
        image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0] + [0] * 759)
    small.paste(2, (5, 5, 10, 10))
    full.save(tmp_path / "c.gif", save_all=True, append_images=[small], transparency=0, disposal=1, duration=50)
    first, *_, second = video.read_frames(tmp_path / "c.gif", 4)
    assert first.getpixel((7, 7)) == (200, 0, 0) and second.getpixel((7, 7)) == (0, 200, 0)
    assert second.getpixel((1, 1)) == (200, 0, 0)


def test_one_picture_is_a_clip_of_one_frame(tmp_path, monkeypatch):
    """So that a model of clips can be asked about a benchmark's images: JPEGs, and those in a zip; PyAV is not wanted."""
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("c.png", "c.jpg"):
        pictures(1)[0].save(tmp_path / name)
        with zipfile.ZipFile(tmp_path / "images.zip", "a") as file:
            file.write(tmp_path / name, f"val2014/{name}")
    for name in ("c.png", "c.jpg", "images.zip/val2014/c.png", "images.zip/val2014/c.jpg"):
        assert [f.size for f in video.read_frames(tmp_path / name, 3)] == [(33, 21)] * 3, name
    assert [number(f) for f in video.read_frames(tmp_path / "c.png", 3)] == [0, 0, 0]
    with pytest.raises(FileNotFoundError, match="no image file .*absent.jpg"):
        video.read_frames(tmp_path / "absent.jpg", 3)


def test_frames_that_were_chosen_are_not_chosen_again(tmp_path):
    """evaluate.py opens the frames of a clip and hands them to the model, which reads the clip as training did."""
    (tmp_path / "clip").mkdir()
    for i in range(30):
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(tmp_path / f"clip/{i:02}.png")
    chosen = video.frames_of(tmp_path / "clip", 8)
    assert [frame.getpixel((0, 0))[0] // 8 for frame in chosen] == video.sample(30, 8)
    assert video.frames_of(chosen, 8) == chosen and len(video.frames_of(chosen, 4)) == 4


def test_frames_of_a_folder_keep_their_sizes(tmp_path):
    for i, size in enumerate([(30, 20), (7, 51)]):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    assert [f.size for f in video.read_frames(tmp_path, 4)] == [(30, 20)] * 3 + [(7, 51)]


def test_bad_clips_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.mp4").write_bytes(b"")
    (tmp_path / "text.gif").write_text("not a picture")
    np.save(tmp_path / "floats.npy", np.zeros((2, 4, 4, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "lfs.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    noise = [Image.effect_noise((40, 40), 90) for _ in range(3)]
    noise[0].save(tmp_path / "cut.gif", save_all=True, append_images=noise[1:])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "cut.gif").read_bytes()[:-300])
    hints = {"empty": "no image file", "none.mp4": "an empty file", "floats.npy": "float64", "lfs.mp4": "LFS"}
    for name in ("empty", "none.mp4", "text.gif", "floats.npy", "objects.npy", "lfs.mp4", "cut.gif"):
        with pytest.raises(ValueError, match=f"(?s){name}.*{hints.get(name, 'cannot be read')}.*; "):
            video.read_frames(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match="expected a clip, a .mp4"):
        video.read_frames(tmp_path / "absent.mp4", 8)


def test_a_video_file_without_pyav_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "c.mp4").write_bytes(b"anything")
    with pytest.raises(ImportError, match="pip install av"):
        video.read_frames(tmp_path / "c.mp4", 8)


# ----- video files


@pytest.mark.parametrize(
    "suffix, codec, options",
    [
        (".mp4", "mpeg4", {"bf": "2"}),
        (".mkv", "mpeg4", {"bf": "2"}),
        (".avi", "mpeg4", {"bf": "2"}),
        (".mpg", "mpeg2video", {"bf": "2"}),  # without an index: a seek lands where it lands
        (".webm", "libvpx", {}),
        (".webm", "libvpx-vp9", {}),
        (".mp4", "libx264", {"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=3:b-adapt=0:scenecut=0"}),
    ],
)
def test_seeking_gives_the_frames_of_decoding_all(tmp_path, suffix, codec, options):
    """Whatever the container, the order of its packets, and what comes before a key frame."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    times = [4 * i for i in range(21)] if suffix == ".mpg" else None  # MPEG-2 knows no rate below 24 a second
    path = make_video(tmp_path / f"c{suffix}", pictures(21, (64, 48)), times, codec=codec, **options)
    _, total, indices, frames = video.sample_frames(path, 5)
    _, counted, read = clips.open_frames(path, decode_all=True)
    every = read(range(counted))
    assert total == counted == 21
    assert all(np.array_equal(np.array(every[i]), np.array(f)) for i, f in zip(indices, frames, strict=True))
    assert [number(f) for f in frames] == [i % 7 for i in indices]


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "mmaction2_demo.mp4", "nasa_13013.mp4"])
def test_seeking_gives_the_frames_of_decoding_all_of_a_real_clip(real, name):
    pytest.importorskip("av")
    _, total, indices, frames = video.sample_frames(real(f"videos/{name}"), 3)
    _, counted, read = clips.open_frames(real(f"videos/{name}"), decode_all=True)
    every = read(indices)
    assert total == counted
    assert all(np.array_equal(np.array(every[i]), np.array(f)) for i, f in zip(indices, frames, strict=True))


def test_only_the_way_from_a_key_frame_is_decoded(tmp_path, monkeypatch):
    path = make_video(tmp_path / "c.mp4", pictures(40, (64, 48)))
    shown = []
    decoded = clips.decoded
    monkeypatch.setattr(clips, "decoded", lambda *args: (shown.append(f.pts) or f for f in decoded(*args)))
    video.read_frames(path, 2)
    assert len(shown) <= 8 < 40  # a key frame every four


def test_a_clip_whose_packets_lie_is_decoded_whole(tmp_path, monkeypatch):
    path = make_video(tmp_path / "c.mp4", pictures(9, (64, 48)))

    def lie(*args):
        raise clips.UnseekableError

    monkeypatch.setattr(clips, "seek", lie)
    assert [number(f) for f in video.read_frames(path, 3)] == [i % 7 for i in video.sample(9, 3)]


def test_frames_are_counted_not_timed(tmp_path):
    """Of a clip with a variable frame rate, every frame counts as one, however long it is shown."""
    path = make_video(tmp_path / "c.mkv", pictures(7, (64, 48)), times=[0, 3, 5, 90, 91, 300, 301])
    about, total, indices, frames = video.sample_frames(path, 14)
    assert total == 7 and [number(f) for f in frames] == video.sample(7, 14) and set(indices) == set(range(7)) and "3.51 s" in about


def test_odd_sizes_and_too_few_frames(tmp_path):
    path = make_video(tmp_path / "c.mkv", pictures(3, (67, 45)), codec="ffv1")
    frames = video.read_frames(path, 8)
    assert [f.size for f in frames] == [(67, 45)] * 8 and [number(f) for f in frames] == video.sample(3, 8)


def test_the_largest_stream_is_read_not_the_first(tmp_path):
    path = make_video(tmp_path / "c.mp4", pictures(4, (64, 48)), kinds=("small video", "audio", "video"))
    about, total, _, frames = video.sample_frames(path, 4)
    assert "stream 3 of 3" in about and total == 4 and frames[0].size == (64, 48)
    assert [number(f) for f in frames] == video.sample(4, 4)


def test_the_largest_stream_of_a_real_clip_is_read(real):
    pytest.importorskip("av")
    about, _, _, frames = video.sample_frames(real("videos/nasa_13013.mp4"), 1)
    assert frames[0].size == (480, 270), about  # the first is 320 wide


@pytest.mark.parametrize(
    "matrix, corner, size",
    [
        ((0, 1, -1, 0), (-1, 0), (48, 64)),  # a phone held upright: a quarter to the right, the left top goes right
        ((-1, 0, 0, -1), (-1, -1), (64, 48)),
        ((0, -1, 1, 0), (0, -1), (48, 64)),
        ((-1, 0, 0, 1), (-1, 0), (64, 48)),  # a mirror
        ((1, 0, 0, -1), (0, -1), (64, 48)),
        ((0, 1, 1, 0), (0, 0), (48, 64)),
    ],
)
def test_a_turned_clip_comes_upright(tmp_path, matrix, corner, size):
    """The left top is marked; where it must come to is told by the display matrix in the track's header."""
    frame = Image.new("RGB", (64, 48), "black")
    frame.paste("white", (0, 0, 16, 16))
    path = make_video(tmp_path / "c.mp4", [frame] * 2)
    data, (a, b, c, d) = bytearray(path.read_bytes()), (v << 16 for v in matrix)
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (shown,) = video.read_frames(path, 1)
    assert shown.size == size
    x, y = ((5, size[0] - 6)[corner[0]], (5, size[1] - 6)[corner[1]])
    assert shown.getpixel((x, y))[0] > 200 and shown.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[0] < 60


def test_sound_alone_is_refused(tmp_path):
    path = make_video(tmp_path / "c.mp4", pictures(1), kinds=("audio",))
    with pytest.raises(ValueError, match=r"no video stream \(its streams: audio\)"):
        video.read_frames(path, 8)


def test_a_cover_is_no_video(tmp_path):
    path = make_video(tmp_path / "c.mp4", pictures(4, (64, 48)), kinds=("video", "cover"))
    assert video.read_frames(path, 1)[0].size == (64, 48)
    path = make_video(tmp_path / "song.mp4", pictures(4, (64, 48)), kinds=("audio", "cover"))
    with pytest.raises(ValueError, match="song.mp4 has no video stream"):
        video.read_frames(path, 1)


def test_a_clip_that_breaks_off_gives_what_is_there(tmp_path):
    """And says how many frames it should have. An mp4 whose list of frames stood at its end, and is lost, is refused."""
    noise = [Image.effect_noise((64, 48), 90).convert("RGB") for _ in range(30)]
    for name, movflags, says in (("c.mkv", "", "mpeg4"), ("c.mp4", "faststart", "30 frames in its header")):
        path = make_video(tmp_path / name, noise, movflags=movflags)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        about, total, _, frames = video.sample_frames(path, 4)
        assert 5 < total < 25 and len(frames) == 4 and says in about
    path = make_video(tmp_path / "end.mp4", noise)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="end.mp4 cannot be read"):
        video.read_frames(path, 4)


# ----- tokens


@pytest.mark.parametrize("count, expected", [(8, 264), (100, 356), (1, 257)])
def test_pooling_is_video_chatgpts(count, expected):
    """Four lines of numpy, as its get_spatio_temporal_features: temporal tokens, then spatial."""
    patches = torch.randn(2, count, 256, 6)
    tokens = video.pool(patches)
    assert tokens.shape == (2, expected, 6)
    features = patches[1].numpy()
    temporal_tokens = np.mean(features, axis=1)
    spatial_tokens = np.mean(features, axis=0)
    reference = np.concatenate([temporal_tokens, spatial_tokens], axis=0)
    assert np.allclose(video.pool(patches[1]), reference, atol=1e-6)
    assert torch.equal(tokens[1], video.pool(patches[1]))
    with pytest.raises(ValueError, match=r"not \(T, P, Dv\)"):
        video.pool(patches[0, 0])


def test_frames_in_chunks_equal_all_at_once():
    torch.manual_seed(0)
    tower, frames = CLIPVisionTower(VISION), pictures(7, (31, 40))
    with torch.no_grad():
        reference = video.pool(tower(torch.stack([preprocess(f, VISION, "pad") for f in frames])))
    for chunk in (1, 3, 8):
        tokens = video.encode_clip(tower, frames, "pad", chunk)
        assert tokens.shape == (7 + 4, 32)
        assert (tokens - reference).abs().max() <= 1e-6 * reference.abs().max()
    with pytest.raises(ValueError, match="no frames"):
        video.encode_clip(tower, [])


def test_one_frame_video_equals_its_image():
    """Its patches after their mean."""
    tower, (frame,) = CLIPVisionTower(VISION).requires_grad_(False), pictures(1)
    patches = tower(preprocess(frame, VISION)[None])[0]
    wanted = torch.cat([patches.mean(0, keepdim=True), patches])
    assert torch.allclose(video.encode_clip(tower, [frame]), wanted, atol=1e-6)


def test_an_adapter_learns_from_what_the_tower_saw():
    """And in the dtype of the tower."""
    adapter = torch.nn.Linear(32, 5, dtype=torch.bfloat16)
    adapter(video.encode_clip(CLIPVisionTower(VISION).bfloat16(), pictures(2))).float().sum().backward()
    assert adapter.weight.grad.abs().sum() > 0


# ----- looking


def test_the_command_tells_and_draws(tmp_path, capsys):
    frames = pictures(9)
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=100)
    command.main([str(tmp_path / "c.gif"), "--frames", "3", "--out", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().out
    assert "GIF" in said and "33 x 21, 9 frames" in said and "sampled: " + " ".join(map(str, video.sample(9, 3))) in said
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width < 4 * 280


def test_boxes_are_drawn_on_every_frame(tmp_path):
    boxes = [((20, 20, 90, 80), "lime"), ((120, 20, 200, 80), "blue")]
    sheet(pictures(2, (280, 100)), tmp_path / "s.png", boxes)
    with Image.open(tmp_path / "s.png") as image:
        for left in (8, 8 + 288):
            assert image.getpixel((left + 20, 8 + 50)) == (0, 255, 0) and image.getpixel((left + 120, 8 + 50)) == (
                0,
                0,
                255,
            )


# ----- clips in a zip


@pytest.mark.parametrize("top", ["", "clips/"])
def test_clips_of_every_kind_are_read_inside_a_zip_as_beside_it(tmp_path, top):
    folder, shots = tmp_path / "clips", pictures(5, (32, 32))
    (folder / "frames.v1").mkdir(parents=True)
    for i, shot in enumerate(shots):
        shot.save(folder / f"frames.v1/{i + 8}.png")
    shots[0].save(folder / "anim.gif", save_all=True, append_images=shots[1:])
    np.save(folder / "array.npy", np.stack([np.array(shot) for shot in shots]))
    make_video(folder / "video.mp4", shots)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as file:
        for path in sorted(folder.rglob("*.*")):
            if path.is_file():
                file.write(path, f"{top}{path.relative_to(folder).as_posix()}")
                file.writestr(f"__MACOSX/{top}._{path.name}", "macOS adds such companions")
    beside, inside = clips.find_clips(folder), clips.find_clips(tmp_path / "clips.zip")
    assert inside.keys() == beside.keys() == {
        "frames.v1", "anim", "anim.gif", "array", "array.npy", "video", "video.mp4"}  # fmt: skip
    for name in beside:
        (about, *_, frames), (about_beside, *_, frames_beside) = (video.sample_frames(found[name], 4) for found in (inside, beside))
        assert about == about_beside and [f.tobytes() for f in frames] == [f.tobytes() for f in frames_beside], name
        assert is_clip(inside[name]) and still(inside[name]).size == (32, 32)
    require_images(inside.values(), "q.json", "clips.zip")
    with pytest.raises(FileNotFoundError, match="1 of the 1 images of q.json are not in clips.zip .gone"):
        require_images([tmp_path / "clips.zip/gone"], "q.json", "clips.zip")
    with pytest.raises(FileNotFoundError, match="no file .*clips.zip/gone.mp4"):
        video.sample_frames(tmp_path / "clips.zip/gone.mp4", 1)


def test_two_clips_of_a_zip_with_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as file:
        file.writestr("train/a.mp4", "")
        file.writestr("val/a.mp4", "")
    with pytest.raises(ValueError, match="holds 1 names of clips twice .a.mp4."):
        clips.find_clips(tmp_path / "clips.zip")
