"""Whether chats are rendered as llama-server does: every template of the pinned llama.cpp, with and
without tools, byte for byte.

    python -m tools.chat_templates [--archive FILE | --templates DIR] [--server FILE] [--only WORD]
                                   [--record]

--server: a llama-server of the same llama.cpp (default: built, which takes minutes). --templates:
a folder of .jinja files (default: `models/templates` of the pinned llama.cpp). For each template
the server is started with the embedded model and that template, and asked for its
`/apply-template`. Prints what differs; ends with 1 where something does. --record: the hashes of
the server's prompts become those that tests/real compares with.
"""

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from bench.cache import cache_folder
from bench.serving import ServerProcess
from bench.tools import tool
from pyllamabatch import Model
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama.chat import ChatTemplate
from pyllamabatch.models import default_model_path
from vendor.unpack import HERE as VENDOR
from vendor.unpack import MARKER, Lock, download

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "real" / "llama_server_prompts.json"
UNPACKED = VENDOR / "llama.cpp" / "models" / "templates"
DATES = ("%Y-%m-%d", "%d %b %Y", "%b %d %Y", "%B %d, %Y")  # as templates write today's
REFUSED = "(refused)"

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


def theirs(client: httpx.Client, body: Mapping[str, Any]) -> str:
    """What llama-server makes of it."""
    answer = client.post("/apply-template", json=dict(body))
    return str(answer.json()["prompt"]) if answer.is_success else REFUSED


@contextmanager
def serving(server: Path, template: Path) -> Iterator[httpx.Client]:
    """A server with the embedded model and this template."""
    command = [
        server, "--model", default_model_path(), "--jinja", "--chat-template-file", template,
        "--ctx-size", 512, "--parallel", 1, "--threads", 1,
    ]  # fmt: skip
    process = ServerProcess([*map(str, command)], cache_folder("logs") / "chat_templates.log")
    try:
        with httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client:
            yield client
    finally:
        process.stop()


def hashes(prompts: Mapping[str, str]) -> dict[str, str]:
    """One for the prompts of each conversation, whichever day it is."""
    now = datetime.now()
    days = {day.strftime(form) for day in (now, now - timedelta(minutes=5)) for form in DATES}
    joined: dict[str, str] = {}
    for name, prompt in prompts.items():
        for day in days:
            prompt = prompt.replace(day, "today")
        conversation = name.partition(" ")[0]
        joined[conversation] = joined.get(conversation, "") + f"{name}\0{prompt}\0"
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in joined.items()}


def prompts_of(model: Model, path: Path) -> dict[str, str]:
    """Ours of each case."""
    template = ChatTemplate(model, path.read_text(encoding="utf-8"))
    return {name: ours(template, body) for name, body in cases()}


def servers_prompts(server: Path, path: Path) -> dict[str, str]:
    """llama-server's of each case."""
    with serving(server, path) as client:
        return {name: theirs(client, body) for name, body in cases()}


def templates(folder: Path, archive: Path | None = None) -> list[Path]:
    """The templates of the pinned llama.cpp: as they were unpacked, or from its archive, which is
    downloaded where it is not given, into `folder`."""
    if archive is None and UNPACKED.is_dir():
        return sorted(UNPACKED.glob("*.jinja"))
    lock = VENDOR / "llama.cpp.lock"
    place = f"{MARKER}models/templates/"
    with tarfile.open(archive or download(lock, Lock.read(lock), folder)) as tar:
        for member in tar:
            _, found, name = member.name.partition(place)
            source = tar.extractfile(member) if found and name.endswith(".jinja") else None
            if source is not None:
                (folder / Path(name).name).write_bytes(source.read())
    return sorted(folder.glob("*.jinja"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--templates", type=Path)
    parser.add_argument("--server", type=Path)
    parser.add_argument("--only", default="", help="templates whose name has this word")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    server = given.server or tool("llama-server")
    n_same = n_other = n_refused = 0
    recorded: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch, Model.default(vocab_only=True) as model:
        if given.templates:
            paths = sorted(given.templates.glob("*.jinja"))
        else:
            paths = templates(Path(scratch), given.archive)
        for path in (path for path in paths if given.only in path.name):
            mine, its = prompts_of(model, path), servers_prompts(server, path)
            other = [name for name in its if mine[name] != its[name]]
            recorded[path.name] = hashes(its)
            n_other += len(other)
            n_same += len(its) - len(other)
            n_refused += sum(its[name] == mine[name] == REFUSED for name in its)
            print(f"{path.name}: {', '.join(other) or 'the same'}", flush=True)
    if given.record:
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    print(
        f"{len(recorded)} templates: {n_same} prompts are the same, {n_other} are not; "
        f"{n_refused} chats are refused by both"
    )
    return 1 if n_other else 0


if __name__ == "__main__":
    sys.exit(main())
