"""Pictures of a run: galleries and curves."""
