"""What a device charges for a step, and what fits in it."""
