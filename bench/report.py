"""Views of records: `pyllamabatch.report`, for all benches."""

from pyllamabatch.report.medians import median_of, median_speeds, paired_ratios, spread
from pyllamabatch.report.tables import failures, in_words, speed_table

__all__ = [
    "failures", "in_words", "median_of", "median_speeds", "paired_ratios", "spread",
    "table",
]  # fmt: skip

table = speed_table
