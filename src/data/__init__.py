"""Image folders to batches."""
