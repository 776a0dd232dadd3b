"""Runs that no other process disturbs: `pyllamabatch.report.meters`."""

from pyllamabatch.report.meters import undisturbed, wait_for_quiet

__all__ = ["undisturbed", "wait_for_quiet"]
