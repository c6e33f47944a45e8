from google.colab import errors


class MessageError(errors.Error):
    """The page answers with an error."""
