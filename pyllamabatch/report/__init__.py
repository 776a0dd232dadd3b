"""What a measurement leaves: records in JSONL files; tables, pages and plots are views of them."""
