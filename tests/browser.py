"""A headless Chromium for tests, driven through its debugging pipe: no driver and no package beside it."""

import base64
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
OPTIONS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --remote-debugging-pipe".split()


class Browser:
    """The process. Messages are JSON that ends in a zero byte: it reads them at descriptor 3 and writes them at 4."""

    def __init__(self, path, profile):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        words = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), path, *OPTIONS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(words, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.input, self.output, self.numbers = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb", 0), itertools.count(1)
        self.rest, self.events = b"", []

    def call(self, method, session=None, **params):
        """Call a method of the DevTools protocol and return its result. Events on the way are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self.output.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = self.input.read1(1 << 20)
                if not part:
                    raise RuntimeError(f"Chromium ended during {method}")
                self.rest += part
            text, _, self.rest = self.rest.partition(b"\0")
            reply = json.loads(text)
            if reply.get("id") == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def open(self, url, width=1280, height=900, touch=False):
        return Tab(self, url, width, height, touch)

    def close(self):
        self.output.close()  # which ends it
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.input.close()


class Tab:
    """A page of its own size. Places are pixels of its window."""

    def __init__(self, browser, url, width, height, touch):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def run(self, expression):
        """Evaluate JavaScript and return its value."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"):
                return value
            time.sleep(0.03)
        raise AssertionError(f"never true: {expression}\n{self.run('document.body.innerText')[:2000]}\n{self.problems()}")

    def problems(self):
        """Return this tab's uncaught exceptions, alerts and violations of its policy. (A refused request is no problem.)"""
        kinds = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Log.entryAdded")
        events = [e for e in self.browser.events if e.get("sessionId") == self.session and e["method"] in kinds]
        return [e for e in events if e["params"].get("entry", {}).get("source") != "network"]

    def place(self, selector, x=0.5, y=0.5):
        """Return a place in an element, by fractions of its size, after scrolling it into view."""
        rectangle = "(e => { e.scrollIntoView({block: 'nearest'}); return e.getBoundingClientRect().toJSON() })"
        r = self.run(f"{rectangle}(document.querySelector({json.dumps(selector)}))")
        return r["x"] + x * r["width"], r["y"] + y * r["height"]

    def drag(self, selector, start, end, touch=False):
        """Drag the mouse, or a finger, between two places of an element."""
        self.call("Page.bringToFront")  # a hidden tab takes seconds over each event
        places = [self.place(selector, *start), *[self.place(selector, *end)] * 2]
        kinds = ("touchStart", "touchMove", "touchEnd") if touch else ("mousePressed", "mouseMoved", "mouseReleased")
        for kind, (x, y) in zip(kinds, places, strict=True):
            if touch:
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}] * (kind != "touchEnd"))
            else:
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector):
        self.drag(selector, (0.5, 0.5), (0.5, 0.5))

    def key(self, key, shift=False, text=None):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **more)

    def type(self, selector, text):
        """Replace the text of a field, as typed."""
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def upload(self, selector, path):
        """Choose a file in a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(Path(path).resolve())])

    def screenshot(self, path):
        """Write the window as a PNG."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)
