"""Reports on runs and evaluations: run log, curves, tables, pictures, the HTML page."""
