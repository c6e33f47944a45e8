"""Transcription of files."""
