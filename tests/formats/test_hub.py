"""Checkpoints by name, through huggingface_hub itself: from a server on this machine, and from the library's cache."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import save_file

from clip_vit import CLIPVisionTower
from formats.eval_folder import folders_of
from formats.hub import is_name, local
from formats.llava_hf import read_checkpoint

SHA = {"main": "a" * 40, "v1": "b" * 40}


def test_what_reads_like_a_name(tmp_path, monkeypatch):
    """ORG/NAME that is no path; its results do not make it one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/b1").mkdir(parents=True)
    assert all(map(is_name, ("openai/clip-vit-large-patch14", "lmsys/vicuna-7b-v1.5@main", "a/b@refs/pr/1", "runs/b2")))
    assert not any(map(is_name, ("runs/b1", "clip", "./a/b", "../a", "/a/b", "a/b/c", "linear", tmp_path / "x", "")))
    assert local("runs/b1", "*") == Path("runs/b1")
    assert [folders_of(run)["ours"] for run in ("o/m@v1", "runs/b1")] == [Path("runs/o--m@v1/eval"), Path("runs/b1/eval")]


def test_without_the_library_the_error_says_how_to_get_the_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub; or `hf download nobody/model --local-dir FOLDER`"):
        read_checkpoint("nobody/model@v1", None, {}, None, "cpu")


class Hub(BaseHTTPRequestHandler):
    """What the hub answers about the models in `server.models`, {name: {file: bytes}}: their files, and each file's content."""

    def do_GET(self):
        self.server.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, *rest = "/".join(parts[2:4] if is_api else parts[:2]), *parts[4 if is_api else 2 :]
        files, revision = self.server.models.get(name), rest[1] if rest[1:] else "main"
        commit = SHA.get(revision, revision)
        if files is None or commit not in SHA.values():
            code = "RevisionNotFound" if files else "RepoNotFound"
            return self.reply(404, b"", {"X-Error-Code": code, "X-Error-Message": f"no {name} at {revision}"})
        if is_api and "tree" not in parts:
            siblings = [{"rfilename": file} for file in files]
            return self.reply(200, json.dumps({"id": name, "sha": commit, "siblings": siblings, "private": False}).encode())
        content = b"[]" if is_api else files["/".join(rest[2:])]
        etag = hashlib.sha256(content).hexdigest()
        return self.reply(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    do_HEAD = do_GET

    def reply(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": len(content), "Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.models = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(code, home, port, **settings):
    """Run code in a process of its own, for the library reads its settings when it is imported: (what it prints, errors)."""
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    own = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    own["TQDM_POSITION"] = "-1"  # bars, though nobody looks
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | own | settings
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


JOIN = """
from huggingface_hub import constants
from formats import hub
from model import LocVLM

for constants.HF_HUB_OFFLINE in (False, True):
    model = LocVLM.from_parts("org/clip", "org/llama@v1")
    parts = model.vision_tower, model.language_model
    sums = [sum(p.double().sum().item() for p in part.parameters()) for part in parts]
    print(model.config.vision_config.image_mean, len(model.tokenizer), sums)
    hub.snapshot.cache_clear()
    print("--- offline", flush=True)
"""


def test_parts_are_downloaded_by_name_and_then_come_from_the_cache(make_model, tmp_path, hub):
    """Only the files that are read, safetensors before .bin, shards; a revision; offline, the same to the bit."""
    from test_weights import CLIP_PREFIX, LLAMA_PREFIX, named, text_config, write_folder

    model = make_model()
    clip = {"model_type": "clip_vision_model", **{k: v for k, v in vars(model.config.vision_config).items()}}
    write_folder(tmp_path / "clip", named(model.vision_tower, CLIP_PREFIX), clip)
    write_folder(tmp_path / "llama", named(model.language_model, LLAMA_PREFIX), text_config(), "sharded bin")
    (tmp_path / "llama/tokenizer.model").write_bytes(model.tokenizer.path.read_bytes())
    (tmp_path / "clip/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "size": 28, "crop_size": 28}')
    for other in ("clip/pytorch_model.bin", "clip/tf_model.h5", "clip/README.md", "llama/generation_config.json"):
        (tmp_path / other).write_text("not wanted")
    for name in ("clip", "llama"):
        hub.models[f"org/{name}"] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    printed, bars = run(JOIN, tmp_path / "home", hub.server_port)
    online, offline, _ = printed.split("--- offline")
    assert online.startswith("(0.5, 0.5, 0.5) 400 [") and online.strip() == offline.strip()
    assert "model.safetensors: 100%" in bars
    assert len([path for path in hub.asked if path.startswith("/api/models/org")]) == 2  # once for each model
    cached = {str(file.relative_to(tmp_path / "home/hub")) for file in (tmp_path / "home/hub").glob("*/snapshots/*/*")}
    of_clip, of_llama = f"models--org--clip/snapshots/{SHA['main']}/", f"models--org--llama/snapshots/{SHA['v1']}/"
    shards = {f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    assert cached == {of_clip + file for file in ("config.json", "preprocessor_config.json", "model.safetensors")} | {
        of_llama + file for file in {"config.json", "tokenizer.model", "pytorch_model.bin.index.json"} | shards}  # fmt: skip


OPEN_CLIP = """
from clip_vit import CLIPVisionTower
from formats.weights import weights_sha256
print(CLIPVisionTower.from_pretrained("org/timm").config.image_mean, *weights_sha256("org/timm"))
"""


def test_open_clip_is_downloaded_by_name(tmp_path, hub):
    """From a repository as timm's, whose model.safetensors and config.json are for timm: of these the config alone."""
    from test_weights import VISION, openai_state

    file = tmp_path / "open_clip_model.safetensors"
    save_file(openai_state(CLIPVisionTower(VISION)), file)
    vision = {"image_size": VISION.image_size, "layers": 3, "width": VISION.hidden_size, "patch_size": 14}
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.5] * 3}}
    hub.models["org/timm"] = {
        "config.json": b'{"architecture": "vit_base_patch32_clip_224"}', "model.safetensors": b"timm's own",
        "open_clip_config.json": json.dumps(config).encode(), file.name: file.read_bytes(),
        "open_clip_pytorch_model.bin": b"not wanted",
    }  # fmt: skip
    printed, _ = run(OPEN_CLIP, tmp_path / "home", hub.server_port)
    assert printed.split() == ["(0.5,", "0.5,", "0.5)", "open_clip_config.json", file.name]
    cached = {path.name for path in (tmp_path / "home/hub").glob("*/snapshots/*/*")}
    assert cached == {"config.json", "open_clip_config.json", file.name}


TRY = """
from formats.files import read_config
for path in ("org/old", "org/old@v1", "org/other"):
    try:
        print(read_config(path))
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_a_cache_that_others_filled_is_read(tmp_path, hub):
    """Laid out as the library does. Offline, and where the hub does not answer or does not know a name, each case in a line."""
    repo = tmp_path / "home/hub/models--org--old"
    (repo / "snapshots" / SHA["main"]).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(SHA["main"])
    (repo / "snapshots" / SHA["main"] / "config.json").write_text('{"hidden_size": 32}')
    offline = run(TRY, tmp_path / "home", hub.server_port, HF_HUB_OFFLINE="1")[0].splitlines()
    assert offline[0] == "{'hidden_size': 32}" and not hub.asked
    assert offline[1].startswith("FileNotFoundError no model org/old@v1: no folder here, none in ")
    assert offline[2].startswith("FileNotFoundError no model org/other: ") and len(offline) == 3
    hub.models["org/old"] = {}
    hub.models["org/other"] = {"config.json": b'{"hidden_size": 64}'}
    online = run(TRY, tmp_path / "home2", hub.server_port)[0].splitlines()
    assert online[0].startswith("FileNotFoundError no file ") and online[2] == "{'hidden_size': 64}"
    hub.models.clear()
    online = run(TRY, tmp_path / "home", hub.server_port)[0].splitlines()
    assert online[0].startswith(f"org/old is read from the cache ({SHA['main']}), for the hub cannot be reached or does not have it: ")
    assert online[1] == offline[0] and "404" in online[2] and "404" in online[3] and len(online) == 4
