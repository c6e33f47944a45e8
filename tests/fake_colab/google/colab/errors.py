class Error(Exception):
    """Base of Colab's errors."""
