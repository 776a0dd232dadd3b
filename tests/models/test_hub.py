"""Models of a hub: a loopback endpoint in its place."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest

from pyllamabatch import Model
from pyllamabatch.errors import ArgumentError, DownloadError
from pyllamabatch.models import default_model_path
from pyllamabatch.models.hub import choose, hub_file, quant_of

COMMIT = "c" * 40
SPLIT = [f"big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
LISTED = ["README.md", "m-Q4_K_M.gguf", "m-Q5_K_S.gguf", "mmproj-m-f16.gguf", *SPLIT]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs. `break_at`: the first answer with a file
    ends behind so many bytes."""

    files: ClassVar[dict[str, bytes]] = {}
    token: ClassVar[str | None] = None
    break_at: ClassVar[int | None] = None
    asked: ClassVar[list[tuple[str, str, str]]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        span = self.headers.get("Range", "")
        Hub.asked.append((self.command, self.path, span))
        if Hub.token and self.headers.get("Authorization") != f"Bearer {Hub.token}":
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid token")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path.startswith("/api/models/own/tiny"):
            self._json(body)
            return
        data = Hub.files.get(self.path.rpartition("/")[2])
        if not self.path.startswith("/own/tiny/resolve/") or data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(span.removeprefix("bytes=").rstrip("-") or 0)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            end, Hub.break_at = Hub.break_at, None
            self.wfile.write(data[start:end])
            if end is not None:
                self.close_connection = True

    def _json(self, body: bool) -> None:
        files = [{"rfilename": name} for name in Hub.files]
        tree = [
            {"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in Hub.files.items()
        ]
        info = {"id": "own/tiny", "sha": COMMIT, "siblings": files, "tags": [], "private": False}
        data = dumps(tree if "/tree/" in self.path else info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Hub.files = {"README.md": b"x", "tiny-Q8_0.gguf": default_model_path().read_bytes()}
    Hub.token, Hub.break_at, Hub.asked = None, None, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_is_brought_and_cached(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model.from_hub("own/tiny:q8_0", endpoint=endpoint, vocab_only=True) as model:
        assert model.path.endswith("tiny-Q8_0.gguf")
    gets = [path for command, path, _ in Hub.asked if command == "GET" and "resolve" in path]
    assert [path.rpartition("/")[2] for path in gets] == ["tiny-Q8_0.gguf"]  # nothing else
    Hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_file("own/tiny", endpoint=endpoint).read_bytes()[:4] == b"GGUF"
    assert Hub.asked == []


def test_a_download_that_broke_off_goes_on(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    Hub.break_at = 100_000
    path = hub_file("own/tiny", endpoint=endpoint)
    assert path.read_bytes() == Hub.files["tiny-Q8_0.gguf"]
    spans = [span for command, path, span in Hub.asked if command == "GET" and "resolve" in path]
    assert spans == ["", "bytes=100000-"]


def test_all_parts_of_a_split_model(endpoint: str) -> None:
    Hub.files = {name: name.encode() for name in LISTED}
    path = hub_file("own/tiny:Q8_0", endpoint=endpoint)
    assert path.name == SPLIT[0]
    assert sorted(p.name for p in path.parent.iterdir()) == SPLIT


def test_a_token_opens_a_repository(endpoint: str) -> None:
    Hub.token = "secret"
    with pytest.raises(DownloadError, match="can't bring own/tiny"):
        hub_file("own/tiny", endpoint=endpoint, token="wrong")
    assert hub_file("own/tiny", endpoint=endpoint, token="secret").is_file()


def test_no_such_repository_and_no_network(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="can't bring own/other"):
        hub_file("own/other", endpoint=endpoint)
    with socket.socket() as unheard:  # it is bound, and does not listen
        unheard.bind(("127.0.0.1", 0))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its tries
        with pytest.raises(DownloadError, match="can't bring own/tiny"):
            hub_file("own/tiny", endpoint=f"http://127.0.0.1:{unheard.getsockname()[1]}")
        monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="can't bring own/tiny"):
        hub_file("own/tiny", endpoint=endpoint)


def test_which_file_is_taken() -> None:
    assert choose("r", LISTED) == ["m-Q4_K_M.gguf"]
    assert choose("r", LISTED, "q5_k_s") == ["m-Q5_K_S.gguf"]
    assert choose("r", LISTED, "Q8_0") == SPLIT
    both = ["m-Q4_K_XL.gguf", "m-UD-Q4_K_XL.gguf"]
    assert [choose("r", both, word) for word in ("Q4_K_XL", "UD-Q4_K_XL")] == [[m] for m in both]
    assert choose("r", ["sub/x.gguf"]) == ["sub/x.gguf"]
    assert choose("r", ["m.F16.gguf", "m.Q8_0.gguf"]) == ["m.Q8_0.gguf"]
    for given, named in (("Q4_KM", "did you mean Q4_K_M"), ("zzz", "it has Q4_K_M, Q5_K_S, Q8_0")):
        with pytest.raises(ArgumentError, match=named):
            choose("r", LISTED, given)
    with pytest.raises(ArgumentError, match="no GGUF file"):
        choose("r", ["README.md", "mmproj-x.gguf"])


@pytest.mark.parametrize("repository", ["tiny", "a/b/c", "/b", "", "a/"])
def test_a_name_of_another_form(repository: str) -> None:
    with pytest.raises(ArgumentError, match="owner/name"):
        hub_file(repository)


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("model.IQ4_NL.gguf", "IQ4_NL"),
        ("x/gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("m-bf16.gguf", "BF16"),
        ("big-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("plain.gguf", "plain"),
    ],
)
def test_quants_in_names(file: str, quant: str) -> None:
    assert quant_of(file) == quant


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert huggingface_hub.__version__
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"pyllamabatch\[hub\]"):
        hub_file("own/tiny")
