"""The papers' models at work: `python -m examples.<name> --help`."""
