"""Self-contained HTML pages: the report of a run and the comparison of two; nothing is fetched from a network."""
