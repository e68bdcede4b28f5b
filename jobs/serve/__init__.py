"""`docmill serve`: health, metrics and the dashboard over HTTP. Reads a few rows a page, and writes nothing but what an operator clicks."""
