"""Live captions for other programs and for a web page."""
