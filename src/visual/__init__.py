"""Pictures of a run: reconstructions, HOG glyphs, curves."""
