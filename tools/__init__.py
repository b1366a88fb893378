"""Command-line tools, one command a file; each has `main(argv) -> int`."""
