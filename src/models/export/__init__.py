"""Exports: Hugging Face, CTranslate2, ONNX and the Hub."""
