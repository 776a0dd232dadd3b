"""Whether chats are rendered as llama-server does: every template of the pinned llama.cpp, with and
without tools, byte for byte.

    python -m tools.chat_templates [--archive FILE | --templates DIR] [--server FILE] [--only WORD]

`--server`: a llama-server of the same llama.cpp (default: built, which takes minutes). --templates:
a folder of .jinja files (default: `models/templates` of the archive that the lock names). For each
template the server is started with the embedded model and that template, and asked for its
`/apply-template`. Prints what differs; ends with 1 where something does.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.tools import tool
from pyllamabatch import Model
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama.chat import ChatTemplate
from pyllamabatch.models import default_model_path

LOCK = Path(__file__).resolve().parents[1] / "vendor" / "llama.cpp.lock"
PLACE = "thirdparty/llama.cpp/models/templates/"
REFUSED = "(refused)"
START_SECONDS = 120

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it raining in Paris?\n"}
AGAIN = {
    "role": "user",
    "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}],
}
ANSWER = {"role": "assistant", "content": "No. <b>é</b>"}
THOUGHT = {**ANSWER, "reasoning_content": "I look outside."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "id": "call12345",
            "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
        }
    ],
}
RESULT = {
    "role": "tool",
    "tool_call_id": "call12345",
    "name": "weather",
    "content": '{"rain": true}',
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "time")
]
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, THOUGHT, AGAIN],
    "called": [USER, CALL, RESULT],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "tools": {"tools": TOOLS},
    "required": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True},
    "plain": {"chat_template_kwargs": {"enable_thinking": False}},
    "schema": {"json_schema": {"type": "object", "properties": {"rain": {"type": "boolean"}}}},
}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and the bodies of requests to `/apply-template`."""
    for conversation, messages in CONVERSATIONS.items():
        for option, given in OPTIONS.items():
            yield f"{conversation} {option}".strip(), {"messages": messages, **given}


def ours(template: ChatTemplate, body: Mapping[str, Any]) -> str:
    """What we make of such a body."""
    options = {name: value for name, value in body.items() if name != "messages"}
    kwargs = options.pop("chat_template_kwargs", {})
    try:
        prompt = template.render(body["messages"], **options, **kwargs, template_kwargs=kwargs)
    except PyllamabatchError:
        return REFUSED
    return str(prompt)


def theirs(url: str, body: Mapping[str, Any]) -> str:
    """What llama-server makes of it."""
    request = urllib.request.Request(
        f"{url}/apply-template", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["prompt"])
    except urllib.error.HTTPError:
        return REFUSED


@contextmanager
def serving(server: Path, template: Path) -> Iterator[str]:
    """A server with the embedded model and this template; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        server, "--model", default_model_path(), "--jinja", "--chat-template-file", template,
        "--host", "127.0.0.1", "--port", port, "--ctx-size", 512, "--parallel", 1, "--threads", 1,
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen([*map(str, command)], stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process)
            yield url
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        if _healthy(url):
            return
        time.sleep(0.1)
    raise SystemExit(f"the server did not start: it ended with {process.poll()}")


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def differences(model: Model, server: Path, path: Path) -> list[str]:
    """The cases in which the two prompts of a template are not the same."""
    template = ChatTemplate(model, path.read_text(encoding="utf-8"))
    with serving(server, path) as url:
        return [name for name, body in cases() if ours(template, body) != theirs(url, body)]


def extract(archive: Path, folder: Path) -> Path:
    """The templates of an archive, in `folder`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, found, name = member.name.partition(PLACE)
            source = tar.extractfile(member) if found and name.endswith(".jinja") else None
            if source is not None:
                (folder / Path(name).name).write_bytes(source.read())
    return folder


def download(folder: Path) -> Path:
    """The archive that the lock names, by pip."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-r",
        LOCK,
        "--no-deps",
        "--no-binary",
        ":all:",
    ]
    subprocess.run([*map(str, command), "--require-hashes", "-d", str(folder)], check=True)
    return next(folder.glob("*.tar.gz"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--templates", type=Path)
    parser.add_argument("--server", type=Path)
    parser.add_argument("--only", default="", help="templates whose name has this word")
    given = parser.parse_args()
    server = given.server or tool("llama-server")
    n_same = n_other = 0
    with tempfile.TemporaryDirectory() as scratch, Model.default(vocab_only=True) as model:
        folder = given.templates
        if folder is None:
            folder = Path(scratch, "templates")
            folder.mkdir()
            extract(given.archive or download(Path(scratch)), folder)
        for path in sorted(folder.glob("*.jinja")):
            if given.only in path.name:
                other = differences(model, server, path)
                n_other += len(other)
                n_same += len([*cases()]) - len(other)
                print(f"{path.name}: {', '.join(other) or 'the same'}", flush=True)
    print(f"{n_same} prompts are the same, {n_other} are not")
    return 1 if n_other else 0


if __name__ == "__main__":
    sys.exit(main())
