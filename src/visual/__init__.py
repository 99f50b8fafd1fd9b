"""Pictures of a run: reconstructions, HOG glyphs, curves; parts of HTML pages."""
