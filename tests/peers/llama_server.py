"""llama-server's own test suite against `pyllamabatch serve`.

    python -m tests.peers.llama_server                    # the files of FILES
    python -m tests.peers.llama_server test_security.py -k key
    python -m tests.peers.llama_server --archive FILE     # the pin's, where it lies here already

The suite is taken from the archive of the pin into a temporary folder, with the chat templates that
it names. It starts a server for each test: `serve` below takes llama-server's flags. The models
that it asks for can't be had here; the embedded one takes their place, so that texts are not
compared (`peer_plugin.py`). `expected_failures.txt` has a reason for each test that can't pass.

Wants: pip install requests filelock wget aiohttp pytest-xdist.
"""

import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.peers import fork_server
from vendor.unpack import HERE as VENDOR
from vendor.unpack import MARKER, Lock, download

ROOT = Path(__file__).resolve().parents[2]
SUITE = "tools/server/tests"
FILES = (
    "test_basic.py", "test_chat_completion.py", "test_compat_anthropic.py",
    "test_compat_oai_responses.py", "test_completion.py", "test_ctx_shift.py", "test_embedding.py",
    "test_ignore_eos.py", "test_metrics.py", "test_security.py", "test_template.py",
    "test_tokenize.py", "test_tool_call.py",
)  # fmt: skip

TAKEN = {
    "--port": "--port", "--host": "--host", "--temp": "--temperature", "--seed": "--seed",
    "--model": "-m", "--alias": "--alias", "--batch-size": "-b", "--threads": "-t",
    "--n-gpu-layers": "-ngl", "--parallel": "-np", "--ctx-size": "-c", "--n-predict": "-n",
    "--pooling": "--pooling", "--api-key": "--api-key", "--cors-origins": "--cors-origins",
    "--chat-template": "--chat-template", "--chat-template-file": "--chat-template",
    "--lora": "--lora", "--reasoning": "--reasoning",
}  # fmt: skip
"""llama-server's flags with a value, and ours."""
SWITCHES = {
    "--embedding": "--embeddings", "--reranking": "--rerank", "--kv-unified": "--kv-unified",
    "--no-slots": "--no-slots", "--no-ui": "--no-page",
}  # fmt: skip
LEFT_OUT = frozenset({"--hf-repo", "--hf-file", "--ubatch-size", "-fa", "-ctk", "-ctv",
                      "--reasoning-format", "--cache-ram", "--tags", "--media-path"})  # fmt: skip
"""With a value that has no say here."""
NOTHING = frozenset({
    "--offline", "--slots", "--jinja", "--no-jinja", "--cont-batching", "--metrics", "--swa-full",
    "--no-cache-idle-slots", "--verbose",
})  # fmt: skip


def flags_of(given: list[str]) -> list[str]:
    """Ours for llama-server's. SystemExit for one that is not known."""
    ours = ["serve", "-t", "1", "--max-waiting", "1000"]
    if "--cors-origins" not in given:
        ours += ["--cors-origins", "*"]
    if "--metrics" not in given:
        ours.append("--no-metrics")
    if "--kv-unified" not in given:
        ours.append("--no-kv-unified")
    left = list(given)
    while left:
        flag = left.pop(0)
        if flag in TAKEN:
            value = left.pop(0)
            if (flag, value) != ("--n-predict", "-1"):  # no limit
                ours += [TAKEN[flag], value]
        elif flag in SWITCHES:
            ours.append(SWITCHES[flag])
        elif flag in LEFT_OUT:
            left.pop(0)
        elif flag not in NOTHING:
            raise SystemExit(f"no such flag here: {flag}")
    return ours


def serve(given: list[str]) -> int:
    """What llama-server's binary does."""
    from pyllamabatch.cli import main

    return main(flags_of(given))


def wait_for_servers(address: str) -> None:
    """The process from which servers are forked (`fork_server.py`)."""
    import pyllamabatch.cli.serve
    import pyllamabatch.server.app
    import pyllamabatch.server.run  # noqa: F401

    fork_server.main(address, serve)


def take_suite(folder: Path, archive: Path | None) -> Path:
    """Unpack the suite and the templates it names. Returns its folder."""
    lock = VENDOR / "llama.cpp.lock"
    archive = archive or download(lock, Lock.read(lock), folder)
    with tarfile.open(archive) as tar:
        for member in tar:
            _, found, path = member.name.partition(MARKER)
            if found and path.startswith((SUITE, "models/templates/")) and member.isfile():
                member.name = path
                tar.extract(member, folder / "llama.cpp", filter="data")
    return folder / "llama.cpp" / SUITE


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = sys.argv[1:]
        archive = None
        if given[:1] == ["--archive"]:
            archive, given = Path(given[1]), given[2:]
        suite = take_suite(folder, archive)
        binary = folder / "llama-server"
        address = folder / "servers"
        client = Path(fork_server.__file__)
        binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{client}" {address} "$@"\n')
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        files = [f"unit/{word}" if word.endswith(".py") else word for word in given]
        if not any(word.endswith(".py") for word in given):
            files += [f"unit/{file}" for file in FILES]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "LLAMA_SERVER_BIN_PATH": str(binary),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        run = [sys.executable, "-m", "pytest", "-p", "tests.peers.peer_plugin", "-q", "-m",
                   "not slow", "--rootdir", str(suite), "-o", "addopts=", *files]  # fmt: skip
        servers = [sys.executable, "-m", "tests.peers.llama_server", "--servers", str(address)]
        with fork_server.started(servers, address):
            return subprocess.run(run, cwd=suite, env=environment, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--servers"]:
        wait_for_servers(sys.argv[2])
    raise SystemExit(main())
