"""Commands: each runs as `python scripts/NAME.py`, and installed as `whisper-NAME`."""
