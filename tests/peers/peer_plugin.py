"""A pytest plugin for llama-server's suite: no models are fetched, texts are not compared, and what
`expected_failures.txt` names is expected to fail, for the reason that it gives."""

from pathlib import Path
from typing import Any

import pytest
from requests.structures import CaseInsensitiveDict

EXPECTED = Path(__file__).with_name("expected_failures.txt")


def expected() -> dict[str, str]:
    """Reason by the name of a test, of all of its cases, or of one: `file::test[case]`."""
    reasons: dict[str, str] = {}
    reason = ""
    for line in EXPECTED.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            reason = line[2:]
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons


def pytest_configure(config: pytest.Config) -> None:
    import utils  # type: ignore[import-not-found]  # the suite's

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerProcess.make_request = _case_insensitive(utils.ServerProcess.make_request)
    utils.match_regex = lambda regex, text: isinstance(text, str)


def _case_insensitive(make_request: Any) -> Any:
    """Names of headers are, in HTTP; the suite looks for llama-server's spelling."""

    def request(*args: Any, **options: Any) -> Any:
        response = make_request(*args, **options)
        response.headers = CaseInsensitiveDict(response.headers)
        return response

    return request


def pytest_collection_modifyitems(items: list[Any]) -> None:
    reasons = expected()
    for item in items:
        file = Path(item.fspath).name
        for name in (f"{file}::{item.name}", f"{file}::{item.originalname}", file):
            if name in reasons:
                item.add_marker(pytest.mark.xfail(reason=reasons[name], strict=False))
                break
