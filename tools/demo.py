"""Serve a page to try a model: choose or upload a picture, drag a box, ask; answers stream, and their boxes are drawn.

    python -m tools.demo runs/b2 --images val2017 --port 8080

The page is demo.html. The server is the standard library's, listens on this machine only, and refuses what other web pages
send. A browser names a picture by its number, never by a path. Questions are answered one at a time, in order of arrival.

run     run folder, or any checkpoint that LocVLM.from_pretrained takes
images  folder or zip of images or clips to choose from (default: the held-out shapes)
port    of the page's address; 0 takes any free port
"""

import base64
import hashlib
import io
import itertools
import json
import random
import re
import tempfile
import threading
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from coords import fault
from data import REV_PROMPTS, Object, loc_question
from evaluate import Answerer, ask_presence, boxes_to_draw, parse, side_question, use_default_data, wording_of
from formats.annotations import read_file
from formats.images import ANIMATIONS, IMAGES, PIL_ERRORS, is_clip, names_in
from formats.pictures import still
from formats.schema import are_numbers
from tools import command, positive
from tools.report import drawable, place
from video import frames_of

UPLOAD_BYTES, QUESTION_BYTES = 20_000_000, 50_000
PIXELS = 64_000_000  # of an uploaded image or video frame, or of all frames of an animation together
SHOWN, KEPT, QUEUED = 24, 16, 16  # pictures to choose from, uploads kept, questions that may wait
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not all of Pillow's: EPS runs a program
VIDEO = re.compile(rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)  # MP4, Matroska, AVI; not playlists, which name files


def suffix_of(content):
    """Return the suffix that fits an upload's content. Raise ValueError if it is no image or clip, or has too many pixels."""
    pixels, suffix = PIXELS + 1, ".mp4"
    try:
        if VIDEO.match(content):
            pixels = 0
            with suppress(ImportError):  # read_frames names the package to install
                import av
                with av.open(io.BytesIO(content)) as video:
                    pixels = max((stream.width * stream.height for stream in video.streams.video), default=0)
        else:
            with suppress(Image.DecompressionBombError), Image.open(io.BytesIO(content), formats=FORMATS) as image:
                is_animation = f".{image.format.lower()}" in ANIMATIONS
                suffix = f".{image.format.lower()}" if is_animation else ".jpg"
                pixels = image.width * image.height * (image.n_frames if is_animation and image.is_animated else 1)
    except PIL_ERRORS:  # PyAV's errors are among them
        raise ValueError("this is no image or clip that can be read; use JPEG, PNG, WebP, GIF or MP4") from None
    if pixels > PIXELS:
        raise ValueError(f"more than {PIXELS // 10**6} megapixels, all frames of an animation counted; scale it down")
    return suffix


def gallery(images, args, config):
    """List the pictures to choose from, [(path, names of what is in it)], and every name that the data knows."""
    if images:
        paths = (Path(images) / name for name in sorted(names_in(images)))
        shown = list(itertools.islice((path for path in paths if path.suffix.lower() in IMAGES or is_clip(path)), SHOWN))
        if not shown:
            raise FileNotFoundError(f"no images or clips in {images}; pass a folder or zip of them with --images")
        return [(path, ()) for path in shown], []
    use_default_data(args, config)
    records, _ = read_file(args.coco, args.images)
    names = sorted({name for record in records for name in record.present + record.absent})
    return [(record.image, record.present) for record in records if record.image][:SHOWN], names


class Demo(ThreadingHTTPServer):
    """The server: the model, the pictures by number, and the queue of questions."""

    def __init__(self, run, images=None, vision=None, port=8000, max_new_tokens=64):
        args = parse([run, f"--max-new-tokens={max_new_tokens}", *([f"--vision={vision}"] if vision else [])])
        self.answerer = Answerer(args, 1)
        config, self.wording = self.answerer.config, wording_of(args, self.answerer.config)
        shown, names = gallery(images, args, config)
        self.pictures, self.numbers = dict(enumerate(shown)), itertools.count(len(shown))
        self.uploads = tempfile.TemporaryDirectory()
        # path -> what the model reads of a picture, as PIL images: the frames of a clip, or one image
        self.read = lru_cache(maxsize=4)(lambda path: frames_of(path, config.frames) if config.frames else [still(path)])
        self.waiting, self.changed = [], threading.Condition()
        side, kind = config.vision_config.image_size, config.kind
        reads = f"clips of {config.frames} frames" if config.frames else "images"
        about = f"{Path(run).resolve().name}: reads {reads} of {side} x {side} pixels, writes coordinates as {kind}"
        self.about = {"about": about, "pictures": len(shown), "names": names, "bytes": UPLOAD_BYTES}
        self.page = Path(__file__).with_suffix(".html").read_bytes()
        script = hashlib.sha256(re.search(rb"<script>(.*)</script>", self.page, re.DOTALL)[1]).digest()
        self.policy = (  # the page's own script runs, nothing that an answer might smuggle in
            f"default-src 'none'; script-src 'sha256-{base64.b64encode(script).decode()}'; style-src 'unsafe-inline'; "
            "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise OSError(f"port {port} cannot be used ({error}); choose another with --port") from None

    def server_close(self):
        super().server_close()
        self.uploads.cleanup()

    def look(self, number):
        """Return (path, frames, names) of a picture by its number."""
        path, names = self.pictures.get(number if isinstance(number, int) else None, (None, ()))
        if not path:
            raise LookupError("this picture is no longer kept; upload it again")
        return path, self.read(path), names

    def add(self, content):
        """Keep an upload, if it can be read, and forget the oldest one beyond KEPT. Returns its number."""
        number = next(self.numbers)
        path = Path(self.uploads.name, f"{number}{suffix_of(content)}")
        path.write_bytes(content)
        try:
            self.read(path)
        except (OSError, ValueError, ImportError) as error:
            path.unlink()
            raise ValueError(str(error).replace(str(path), "the upload")) from None
        with self.changed:
            self.pictures[number] = path, ()
            for old in [n for n in self.pictures if n >= self.about["pictures"]][:-KEPT]:
                self.pictures.pop(old)[0].unlink()
        return number

    def word(self, request, size):
        """Return the question of a request: a form in the words of training and evaluation, or the visitor's own words."""
        match request:
            case {"form": "own", "question": str(question)} if question.strip():
                return " ".join(question.split())
            case {"form": "rev", "box_px": box_px} if are_numbers(box_px, 4):
                return random.choice(REV_PROMPTS).format(loc=self.wording.place(box_px, size))
            case {"form": "loc", "names": [str(name), *_]} if name.strip():
                return loc_question(name.strip(), self.wording, random)
            case {"form": "hal", "names": [str(name), *_]} if name.strip():
                return ask_presence(name.strip(), self.wording.medium)
            case {"form": "left/right" | "above/below" as form, "names": [str(one), str(two)]} if one.strip() and two.strip():
                return side_question(form, Object(one.strip(), None), Object(two.strip(), None))
        missing = {"own": "type a question", "rev": "drag a box", "loc": "name the object", "hal": "name the object"}
        raise ValueError(f"{missing.get(str(request.get('form')), 'name both objects')} first")

    @contextmanager
    def turn(self, on_wait):
        """Wait until every earlier question is answered. on_wait: called with how many there are, whenever that changes."""
        me, ahead = object(), None
        with self.changed:
            if len(self.waiting) >= QUEUED:
                raise ValueError(f"{QUEUED} questions are waiting already; ask again when some are answered")
            self.waiting.append(me)
        try:
            while ahead != 0:
                with self.changed:
                    while self.waiting.index(me) == ahead:
                        self.changed.wait()
                    ahead = self.waiting.index(me)
                on_wait(ahead)
            yield
        finally:
            with self.changed:
                self.waiting.remove(me)
                self.changed.notify_all()

    def answer(self, request, send):
        """Answer a request, sending rows: the question, how many are before it, the answer as it grows, then its boxes."""
        path, frames, _ = self.look(request.get("picture"))
        size, fmt = frames[0].size, self.wording.fmt
        question = self.word(request, size)
        asked = drawable([list(box_px) for box_px in boxes_to_draw(question, fmt, size)])
        send({"question": question, "asked_px": asked})
        with self.turn(lambda ahead: send({"waiting": ahead})):
            images = [path if self.answerer.config.frames else frames[0]]  # a path: its frames as in training
            how = self.answerer.decoding | {"on_text": lambda row, text: send({"answer": text})}
            [[answer]] = self.answerer.model.generate(images, [[question]], **how)
        found = [list(box_px) for box_px in boxes_to_draw(answer, fmt, size)]
        notes = [f"{place(box_px)} px" + (f": {why}" if (why := fault(box_px, size)) else "") for box_px in found]
        send({"answer": answer, "answer_px": drawable(found), "notes": notes, "done": True})


class Handler(BaseHTTPRequestHandler):
    """One request. Every reply is the page, a PNG, or JSON; a problem is JSON {error}."""

    timeout = 60  # seconds that a browser may neither send nor take anything

    def log_request(self, *args):
        pass

    def do_GET(self):
        """Answer unless another site asks (also one that names this machine as its own: Host)."""
        host, origin, self.is_begun = self.headers.get("Host", ""), self.headers.get("Origin"), False
        try:
            if host.split(":")[0] not in ("127.0.0.1", "localhost") or origin not in (None, f"http://{host}"):
                raise PermissionError("only the page that this server sent may ask it")
            self.reply()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the browser is gone, and its question is not answered further
        except (ValueError, OSError, ImportError, LookupError, ArithmeticError, RecursionError) as error:
            self.send_row({"error": str(error)}, {PermissionError: 403, LookupError: 404}.get(type(error), 400))

    do_POST = do_GET

    def send(self, content, kind="application/json", status=200):
        """Send a reply, or more of it."""
        if not self.is_begun:
            self.is_begun = True
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Security-Policy": self.server.policy, "Cache-Control": "no-store"}
            for name, value in (headers | {"X-Content-Type-Options": "nosniff"}).items():
                self.send_header(name, value)
            self.end_headers()
        self.wfile.write(content)

    def send_row(self, row, status=200):
        self.send(json.dumps(row).encode() + b"\n", status=status)

    def reply(self):
        match self.command, *self.path.strip("/").split("/"):
            case "GET", "":
                self.send(self.server.page, "text/html; charset=utf-8")
            case "GET", "about":
                self.send_row(self.server.about)
            case "GET", "pictures", number:
                _, frames, names = self.server.look(int(number))
                self.send_row({"size": frames[0].size, "frames": len(frames), "names": names})
            case "GET", "pictures", number, frame:
                image, file = self.server.look(int(number))[1][int(frame)].copy(), io.BytesIO()
                image.thumbnail((1280, 1280))
                image.save(file, "PNG", compress_level=1)
                self.send(file.getvalue(), "image/png")
            case "POST", "upload":
                self.send_row({"picture": self.server.add(self.content(UPLOAD_BYTES))})
            case "POST", "ask":
                request = json.loads(self.content(QUESTION_BYTES))
                if not isinstance(request, dict):
                    raise ValueError("a question is a JSON object")
                self.server.answer(request, self.send_row)
            case _:
                raise LookupError("no such page")

    def content(self, limit):
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length <= limit:
            raise ValueError(f"{length} bytes; send at most {limit / 1e6:g} MB")
        content = self.rfile.read(length)
        if len(content) < length:
            raise ConnectionError
        return content


def demo(run, /, images=None, vision=None, port=8000, max_new_tokens: positive = 64):
    with Demo(run, images, vision, port, max_new_tokens) as server:
        _ = server.answerer.model  # loaded before the first question
        print(f"http://127.0.0.1:{server.server_port}  (Ctrl+C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


main = command(__name__, demo)
