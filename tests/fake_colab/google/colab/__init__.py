"""A stand-in for Google Colab's package, for tests: put `tests/fake_colab` on PYTHONPATH.

Environment variables, all optional:
- FAKE_COLAB_DRIVE: folder that stands for Google Drive, "MyDrive" included; unset, `drive.mount` fails.
- FAKE_COLAB_SECRETS: JSON object of the secrets that `userdata.get` knows.
- FAKE_COLAB_UPLOADS, FAKE_COLAB_DOWNLOADS: folders that stand for the user's disk in `files`.
- FAKE_COLAB_MICROPHONE: WAV file that the browser's microphone hears once; unset, there is no microphone.
- FAKE_COLAB_PERMISSION: "granted" (the default) or "denied", to the microphone.

Signatures and errors are those of googlecolab/colabtools.
"""
