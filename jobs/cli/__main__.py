"""Lets `python -m jobs.cli` do what `docmill` does."""

from jobs.cli import main

if __name__ == "__main__":
    main()
