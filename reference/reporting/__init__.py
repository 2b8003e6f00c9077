"""What runs and evaluations leave for people: run log, curves, tables, pictures, the HTML page."""
