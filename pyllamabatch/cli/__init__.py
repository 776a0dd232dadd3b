"""The command line, one file a command: `pyllamabatch demo`, `pyllamabatch generate`, …"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status."""
    from pyllamabatch.cli import command  # `import pyllamabatch.cli` stays cheap

    return command.main(argv)
