"""A tokenizer for tests that need labels but not Whisper's: one token a word, special tokens where tiny.en has them."""

from __future__ import annotations

from types import SimpleNamespace


class WordTokenizer:
    eos_token_id = 50256

    @property
    def backend_tokenizer(self) -> WordTokenizer:
        return self

    def encode(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(ids=[1000 + len(word) * word.isalnum() for word in text.split() or [""]])

    def id_to_token(self, token: int) -> str:
        return f"Ġ{token}"

    def token_to_id(self, name: str) -> int | None:
        known = {"<|startoftranscript|>": 50257, "<|startofprev|>": 50360, "<|notimestamps|>": 50362}
        time = name.strip("<|>")
        is_time = time.replace(".", "").isdigit()
        return known.get(name, 50363 + round(float(time) * 50) if is_time else 50358)


def word_processor() -> SimpleNamespace:
    return SimpleNamespace(tokenizer=WordTokenizer())
