"""Reports of a run: tables, an HTML page, a model card."""
