"""The page to try a model: in Chromium with mouse, finger and keyboard, and the server against what it must refuse."""

import http.client
import io
import json
import sys
import threading
from contextlib import contextmanager

import pytest
from browser import Browser
from conftest import free_port
from PIL import Image

from data import REV_PROMPTS
from evaluate import Answerer
from tiny.shapes import write_world
from tools import demo

HOSTILE = '</p><img src=x onerror="alert(1)"><script>alert(2)</script> (99, 99, 1, 1) {{7*7}} \u202e\x00\ud800'


@pytest.fixture
def pictures(tmp_path):
    """A folder of two pictures and a clip, beside a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a.png", (100, 80)), ("b.jpg", (64, 64))):
        Image.new("RGB", size, "grey").save(folder / name)
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue", "white")]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:])
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture
def serve(tmp_path, make_model, pictures):
    """Return serve(answer=None, **config): a server of a model with random weights, or one that says answer(question)."""
    servers = []

    def start(answer=None, images=pictures, **config):
        make_model(**config).save_pretrained(tmp_path / "run")
        server = demo.Demo(str(tmp_path / "run"), images and str(images), port=0, max_new_tokens=8)

        def generate(images, questions, on_text, **decoding):
            server.read_images = images
            text = answer(questions[0][0])
            try:
                for end in range(1, len(text), max(1, len(text) // 100)):
                    on_text(0, text[:end])
            except ConnectionError:
                server.unheard.append(questions[0][0])
                raise
            return [[text]]

        if answer:
            server.answerer.model.generate = generate
        servers.append(server)
        server.unheard = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@contextmanager
def connection(server, method, path, body=None, headers=None):
    """Send a request as it is and yield its open reply."""
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    line.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), headers or {})
    try:
        yield line.getresponse()
    finally:
        line.close()


def request(server, method, path, body=None, **headers):
    """Return (status, rows of the reply)."""
    with connection(server, method, path, body, headers) as reply:
        return reply.status, [json.loads(line) for line in reply.read().splitlines()]


def ask(server, question="What?", **more):
    return request(server, "POST", "/ask", {"picture": 0, "form": "own", "question": question} | more)


def upload(server, content):
    return request(server, "POST", "/upload", content)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge():
    """A PNG of 200 megapixels, in a few kilobytes."""
    return encoded(Image.new("1", (20_000, 10_000)))


# ----- the server


def test_a_question_streams_and_its_boxes_come_in_pixels(serve):
    """The picture is twice the size of the model's square in x: bins become pixels."""
    server = serve(lambda question: "It is located at (7, 7, 14, 21), or (99, 9, 3, 3)")
    status, rows = ask(server, "Is it at (0, 0, 14, 14)?")
    assert status == 200 and rows[0] == {"question": "Is it at (0, 0, 14, 14)?", "asked_px": [[0, 0, 50, 40]]}
    assert rows[1] == {"waiting": 0} and rows[2] == {"answer": "I"} and len(rows) > 40
    assert rows[-1]["answer_px"][0] == [25, 20, 50, 60] and rows[-1]["done"]
    assert rows[-1]["notes"][0] == "(25, 20, 50, 60) px" and rows[-1]["notes"][1].endswith("px: corners swapped")


def test_random_weights_answer_as_evaluate_does(serve, pictures):
    server = serve()
    [[answer]] = server.answerer.model.generate([pictures / "a.png"], [["What?"]], max_new_tokens=8)
    status, rows = ask(server)
    assert rows[-1]["answer"] == answer and sum("answer" in row for row in rows) > 4


def test_forms_are_worded_as_in_training(serve):
    server = serve(lambda question: "Yes.")
    box = {"form": "rev", "box_px": [25, 20, 50, 60]}
    assert ask(server, **box)[1][0]["question"] in {p.format(loc="(7, 7, 14, 21)") for p in REV_PROMPTS}
    assert "described red cup" in ask(server, form="loc", names=[" red cup ", ""])[1][0]["question"]
    for form, question in {
        "hal": "Is there an orange in the image?", "left/right": "Which side of the orange is the dog located?",
        "above/below": "Is the dog located above or below the orange?", "own": "What is it?",
    }.items():  # fmt: skip
        assert ask(server, "What\nis it?", form=form, names=["orange", "dog"])[1][0]["question"] == question
    for missing, problem in (
        ({"form": "rev"}, "drag a box first"), ({"form": "rev", "box_px": [1, 2, 3, "x"]}, "drag a box first"),
        ({"form": "rev", "box_px": [50, 20, 25, 60]}, "corners swapped"), ({"form": "loc", "names": [" "]}, "name the object"),
        ({"form": "rev", "box_px": [0, 0, 9, float("nan")]}, "not finite"),
        ({"form": "rev", "box_px": [0, 0, 9, 999]}, "outside"),
        ({"form": "left/right", "names": ["cup", ""]}, "name both"), ({"form": "hal", "names": 7}, "name the object"),
        ({"question": " \n"}, "type a question"), ({"form": []}, "first"), ({"picture": 99}, "no longer kept"),
        ({"picture": "../a.png"}, "no longer kept"), ({"picture": [0]}, "no longer kept"),
    ):  # fmt: skip
        status, [row] = ask(server, **missing)
        assert status in (400, 404) and problem in row["error"], missing


def test_a_model_s_own_refusal_reaches_the_page(serve):
    status, rows = ask(serve(), "long " * 600)
    assert status == 200 and "max_position_embeddings" in rows[-1]["error"]


def test_pictures_have_numbers_and_files_cannot_be_named(serve):
    server = serve(lambda question: "Yes.")
    assert request(server, "GET", "/about")[1][0]["pictures"] == 3
    assert request(server, "GET", "/pictures/2")[1] == [{"size": [40, 30], "frames": 1, "names": []}]
    inside = ("secret.txt", "pictures/secret.txt", "pictures/0/../../secret.txt", "pictures/3", "pictures/0/7")
    for path in ("//etc/passwd", *(f"/{path}" for path in inside)):
        status, [row] = request(server, "GET", path)
        assert status in (400, 404) and row["error"], path


def test_other_sites_are_refused(serve):
    server = serve(lambda question: "Yes.")
    body, port = {"picture": 0, "form": "own", "question": "What?"}, server.server_port
    for headers in ({"Origin": "https://evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "null"}):
        assert request(server, "POST", "/ask", body, **headers)[0] == 403
    assert request(server, "GET", "/about", Host=f"rebound.example:{port}")[0] == 403
    assert request(server, "POST", "/ask", body, Host="localhost:9", Origin="http://localhost:9")[0] == 200, "through a tunnel"


def test_uploads_are_read_by_content_and_limited(serve, monkeypatch):
    server = serve(lambda question: "Yes.")
    red, grey = Image.new("RGB", (30, 20), "red"), Image.new("L", (30, 20))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"):
        [[number]] = [row.values() for row in upload(server, encoded(red, kind))[1]]
        assert request(server, "GET", f"/pictures/{number}")[1][0]["size"] == [30, 20], kind
    for content, problem in (
        (huge(), "more than 64 megapixels"), (encoded(Image.new("1", (9000, 9000))), "more than 64 megapixels"),
        (encoded(grey, "EPS"), "no image or clip"), (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no image or clip"),
        (b"", "no image or clip"), (encoded(red)[:60], "cannot be read"),
    ):  # fmt: skip
        status, [row] = upload(server, content)
        assert status == 400 and problem in row["error"] and server.uploads.name not in row["error"], row
    frames = [Image.new("1", (4000, 3000), i % 2) for i in range(6)]
    assert "frames" in upload(server, encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[1][0]["error"]
    monkeypatch.setattr(demo, "UPLOAD_BYTES", 1000)
    assert "1001 bytes" in upload(server, b"x" * 1001)[1][0]["error"]
    assert request(server, "POST", "/ask", b"[" * 40_000)[0] == request(server, "POST", "/ask", b"[]")[0] == 400


def test_a_video_without_pyav_names_the_package(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    status, [row] = upload(serve(lambda question: "Yes."), b"\0\0\0\x18ftypmp42" + bytes(99))
    assert status == 400 and row["error"] == "the upload is a video file, which needs PyAV: pip install av"


def test_old_uploads_are_forgotten(serve, monkeypatch):
    monkeypatch.setattr(demo, "KEPT", 2)
    server = serve(lambda question: "Yes.")
    for content in (*[encoded(Image.new("RGB", (30, 20)))] * 3, b"refused", encoded(Image.new("RGB", (30, 20)))):
        upload(server, content)
    assert list(server.pictures) == [0, 1, 2, 5, 7] and len(list(server.pictures[7][0].parent.iterdir())) == 2
    assert "upload it again" in ask(server, picture=3)[1][0]["error"] and ask(server, picture=7)[1][-1]["done"]


def test_a_video_is_uploaded_and_its_pixels_counted(serve, monkeypatch):
    av = pytest.importorskip("av", reason="no PyAV: pip install av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            video.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), "red"))))
        video.mux(stream.encode())
    server = serve(lambda question: "Yes.", frames=4)
    [row] = upload(server, file.getvalue())[1]
    assert request(server, "GET", f"/pictures/{row['picture']}")[1][0] == {"size": [64, 48], "frames": 4, "names": []}
    monkeypatch.setattr(demo, "PIXELS", 64 * 48 - 1)
    assert "megapixels" in upload(server, file.getvalue())[1][0]["error"]
    assert "no image or clip" in upload(server, b"\0\0\0\x18ftypmp42" + bytes(99))[1][0]["error"]


def test_questions_wait_in_line_and_one_that_nobody_hears_ends(serve, monkeypatch):
    """One at a time, in order; a full line refuses; a closed connection frees its turn."""
    monkeypatch.setattr(demo, "QUEUED", 3)
    begun, go, running = threading.Semaphore(0), threading.Semaphore(0), []

    def answer(question):
        running.append(question)
        begun.release()
        assert go.acquire(timeout=30)
        return "word " * 9000 if question == "0" else "Yes."

    server = serve(answer)
    body = {"picture": 0, "form": "own"}
    with connection(server, "POST", "/ask", body | {"question": "0"}) as first:
        assert first.readline() and first.readline() == b'{"waiting": 0}\n' and begun.acquire(timeout=30)
        with connection(server, "POST", "/ask", body | {"question": "1"}) as second:
            assert second.readline() and second.readline() == b'{"waiting": 1}\n'
            with connection(server, "POST", "/ask", body | {"question": "2"}) as third:
                assert third.readline() and third.readline() == b'{"waiting": 2}\n' and running == ["0"]
                assert "are waiting already" in ask(server)[1][-1]["error"]
                first.close()  # nobody hears the long answer
                go.release()
                assert begun.acquire(timeout=30) and running == ["0", "1"]
                assert third.readline() == b'{"waiting": 1}\n' and second.readline() == b'{"waiting": 0}\n'
                go.release(2)
                assert json.loads(second.read().splitlines()[-1])["done"] and json.loads(third.read().splitlines()[-1])["done"]
    assert running == ["0", "1", "2"] and server.unheard == ["0"] and not server.waiting


def test_errors_come_before_the_weights_are_read(tmp_path, make_model, pictures, monkeypatch):
    make_model().save_pretrained(tmp_path / "run")
    monkeypatch.setattr(Answerer, "model", property(lambda self: pytest.fail("read")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images or clips in .*empty; pass a folder"):
        demo.main([str(tmp_path / "run"), "--images", str(tmp_path / "empty")])
    taken = demo.Demo(str(tmp_path / "run"), str(pictures), port=free_port())
    for port in (taken.server_port, 99999):
        with pytest.raises(OSError, match=f"port {port} cannot be used .*--port"):
            demo.main([str(tmp_path / "run"), "--images", str(pictures), "--port", str(port)])
    taken.server_close()


# ----- the page


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    browser = Browser(chromium, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def visit(browser):
    """Return visit(server, ...): a tab that shows its page with the first picture."""
    tabs = []

    def visit(server, **options):
        tabs.append(browser.open(server.url, **options))
        tabs[-1].wait("picture && document.querySelector('.frame img').naturalWidth")
        return tabs[-1]

    yield visit
    for tab in tabs:
        assert not tab.problems()
        tab.close()


def boxes(tab, kind):
    """Return the boxes that a tab shows on each frame, in pixels of the picture."""
    keys = "['x', 'y', 'width', 'height']"
    frames = "[...document.querySelectorAll('#frames svg')]"
    of = f"svg => [...svg.querySelectorAll('.{kind}')].map(r => {keys}.map(k => +r.getAttribute(k)))"
    return tab.run(f"{frames}.map({of})")


DONE = "answers.children.length == {} && [...answers.children].every(e => e.ariaBusy == 'false')"


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_drag_a_box_ask_and_see_where(serve, visit, touch):
    def answer(question):
        return "It is located at (7, 7, 14, 21)" if "described cup" in question else "There is a cup."

    tab = visit(serve(answer), width=390 if touch else 1280, touch=touch)
    assert tab.run("document.documentElement.scrollWidth") == (390 if touch else 1280), "nothing is cut off"
    assert tab.run("document.querySelector('[value=rev]').disabled")
    tab.drag(".frame", (0.25, 0.25), (0.75, 0.5), touch)
    [[drawn]] = boxes(tab, "drawn")
    assert drawn == pytest.approx([25, 20, 50, 20], abs=1) and "Box: (" in tab.run("$('box').textContent")
    tab.click("[value=rev]")
    tab.wait(DONE.format(1))
    assert tab.run("document.querySelector('.a').textContent") == "There is a cup." and boxes(tab, "asked")[0]
    tab.type("#first", "cup")
    tab.click("[value=loc]")
    tab.wait(DONE.format(2))
    assert boxes(tab, "found") == [[[25, 20, 25, 40]]] and "(25, 20, 50, 60) px" in tab.run("answers.innerText")
    assert tab.run("scrollY") == 0 or not touch, "the answer is in view"
    tab.drag(".frame", (0.5, 0.5), (0.5, 0.5), touch)
    assert boxes(tab, "drawn") == boxes(tab, "found") == [[]] and tab.run("document.querySelector('[value=rev]').disabled")


def test_the_keyboard_draws_asks_and_types(serve, visit):
    server = serve(lambda question: "There is a cup.")
    tab = visit(server)
    tab.run("document.querySelector('.frame').focus()")
    tab.key("ArrowRight")
    assert boxes(tab, "drawn") == [[[27, 20, 50, 40]]]
    tab.key("ArrowDown", shift=True)
    for _ in range(40):
        tab.key("ArrowLeft")
    assert boxes(tab, "drawn") == [[[0, 20, 50, 42]]], "stays in the picture"
    tab.key("Enter")
    tab.wait(DONE.format(1))
    tab.key("Escape")
    assert boxes(tab, "drawn") == boxes(tab, "asked") == [[]]
    tab.type("#question", "What is\n this?")
    tab.key("Enter", text="\r")
    tab.wait(DONE.format(2))
    assert tab.run("document.querySelector('.q').textContent") == "What is this?"
    tab.run("$('first').focus()")
    tab.key("Enter", text="\r")
    assert tab.wait("$('problem').textContent") == "name the object first" and tab.run("answers.children.length") == 2


def test_a_hostile_answer_and_question_are_only_text(serve, visit):
    tab = visit(serve(lambda question: HOSTILE))
    tab.type("#question", HOSTILE.replace("\x00\ud800", ""))
    tab.click("[value=own]")
    tab.wait(DONE.format(1))
    assert tab.run("document.querySelector('.a').textContent") == HOSTILE
    assert tab.run("answers.querySelectorAll('img, script').length") == 0 and "corners swapped" in tab.run("answers.innerText")
    assert tab.run("document.querySelectorAll('#frames rect').length") == 4, "drawn, corners put in order"
    tab.run("addEventListener('securitypolicyviolation', () => { stopped = true })")
    tab.run("answers.innerHTML = '<img src=x onerror=alert(1)>'")
    assert tab.wait("stopped"), "and were it markup, it could not run"
    tab.browser.events.clear()


def test_uploads_in_the_page(serve, visit, tmp_path):
    tab = visit(serve(lambda question: "Yes."))
    (tmp_path / "huge.png").write_bytes(huge())
    tab.upload("#file", tmp_path / "huge.png")
    assert "more than 64 megapixels" in tab.wait("$('problem').textContent")
    with open(tmp_path / "long.mp4", "wb") as file:
        file.truncate(20_000_001)
    tab.upload("#file", tmp_path / "long.mp4")
    tab.wait("$('problem').textContent.startsWith('long.mp4 has more than 20 MB')")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "<b>&.png")
    tab.upload("#file", tmp_path / "<b>&.png")
    tab.wait("picture.number > 2 && document.querySelector('.frame img').naturalWidth == 300")
    assert tab.run("document.querySelectorAll('#gallery button').length") == 4 and tab.run("$('problem').textContent") == ""


def test_two_tabs_take_turns_and_a_left_picture_stops_its_question(serve, visit):
    go = threading.Semaphore(0)

    def answer(question):
        assert go.acquire(timeout=30)
        return f"{question} Yes. " + "word " * 9000 * (question == "One?")

    server = serve(answer)
    first, second = visit(server), visit(server)
    for tab, question in ((first, "One?"), (second, "Two?")):
        tab.type("#question", question)
        tab.click("[value=own]")
        tab.wait("answers.children.length == 1")
    second.wait("document.querySelector('.a').textContent == 'Questions before this one: 1'")
    first.run("choose(1)")
    first.wait("picture.number == 1")
    go.release(2)
    second.wait(DONE.format(1))
    assert second.run("document.querySelector('.a').textContent") == "Two? Yes. " and first.run("answers.children.length") == 0


def test_a_clip_shows_the_frames_that_are_read(serve, visit):
    server = serve(lambda question: "It is located at (7, 7, 14, 14)", frames=4)
    tab = visit(server)
    tab.run("choose(2)")
    tab.wait("picture.number == 2")
    tab.wait("[...document.querySelectorAll('.frame img')].filter(e => e.naturalWidth == 40).length == 4")
    tab.drag(".frame:nth-child(3)", (0.5, 0.5), (1, 1))
    assert boxes(tab, "drawn") == [[[20, 15, 20, 15]]] * 4
    tab.type("#question", "Where?")
    tab.click("[value=own]")
    tab.wait(DONE.format(1))
    assert len(boxes(tab, "found")) == 4 and server.read_images[0].name == "c.gif", "its frames are chosen as in training"


def test_the_held_out_shapes_come_with_their_names(serve, visit, tmp_path, monkeypatch):
    def use_world(args, config):
        world = write_world(tmp_path / "world", {"val": 3}) or tmp_path / "world"
        args.coco, args.images = world / "instances_val.json", world / "images"

    monkeypatch.setattr(demo, "use_default_data", use_world)
    tab = visit(serve(lambda question: "Yes.", images=None))
    assert tab.run("document.querySelectorAll('#gallery button').length") == 3
    first = tab.run("$('first').value")
    assert first and first in tab.run("[...$('names').children].map(e => e.value)")
    tab.click("[value=hal]")
    tab.wait(DONE.format(1))
    assert first in tab.run("document.querySelector('.q').textContent")
