"""The command line: `pyllamabatch demo`, `pyllamabatch generate`, `pyllamabatch info`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit status."""
    from pyllamabatch.cli import command  # what it needs is loaded only when it is run

    return command.main(argv)
