"""Tests of words: what they are in scripts with and without spaces, their tokens, times and joins."""

from __future__ import annotations

import itertools

import pytest

from src.inference.words import Vocabulary, Word, join_words, place_words, whole_tokens

TEXTS = [
    "My brother bought three kilos of apples and a bottle of milk.",
    "मेरे भाई ने कल बाजार से तीन किलो सेब खरीदा था।",
    "আমার ভাই গতকাল বাজার থেকে তিন কেজি আপেল কিনেছে।",
    "ჩემმა ძმამ გუშინ ბაზარში სამი კილო ვაშლი იყიდა.",
    "اشترى أخي أمس من السوق ثلاثة كيلوغرامات من التفاح.",
    "우리 형은 어제 시장에서 사과 삼 킬로를 샀습니다.",
    "我哥哥昨天在市场上买了三公斤苹果和一瓶牛奶。",
    "天気予報によると、明日の朝、北部では大雨が降るそうです。",
    "พี่ชายของฉันซื้อแอปเปิล สามกิโลกรัมและนมหนึ่งขวด",
    "ကျွန်တော့်အစ်ကိုက မနေ့က ဈေးမှာ ပန်းသီးသုံးကီလို",
    "我用iPhone 15拍照,OK吗",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("space", [" ", ""])
def test_words_join_to_the_text_and_tile_its_tokens_and_times(
    base_vocabulary: Vocabulary, text: str, space: str
) -> None:
    tokens = base_vocabulary._tokenizer.encode(space + text, add_special_tokens=False).ids
    words = place_words(base_vocabulary, tokens, entered_sec=range(len(tokens) + 1), probabilities=[0.5] * len(tokens))
    assert join_words(words) == text
    assert sum(word.tokens for word in words) == len(tokens)
    assert [token for word in words for token in word.token_ids] == tokens
    assert words[0].start_sec == 0 and words[-1].end_sec == len(tokens)
    for before, after in itertools.pairwise(words):
        assert before.start_sec < before.end_sec == after.start_sec
    assert all(word.probability == 0.5 for word in words)
    ends = itertools.accumulate(word.tokens for word in words)
    for i, end in enumerate(ends):
        if words[i].tokens:  # a cut after it leaves whole characters
            assert base_vocabulary.decode(tokens[:end]).strip() == join_words(words[: i + 1])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_words_are_spelled_in_the_tokens_that_were_heard(base_vocabulary: Vocabulary, text: str, piece: int) -> None:
    def encode(part: str) -> list[int]:
        return list(base_vocabulary._tokenizer.encode(part, add_special_tokens=False).ids)

    tokens = [token for at in range(0, len(text), piece) for token in encode(text[at : at + piece])]
    words = place_words(base_vocabulary, tokens)
    for count in range(len(words) + 1):
        whole = whole_tokens(words, count)
        heard = base_vocabulary.spell(words[:whole])
        assert heard == tokens[: sum(word.tokens for word in words[:count])]
        rest = base_vocabulary.words_after(words, len(heard))
        assert (rest, join_words([*words[:whole], *rest])) == (words[whole:], text)
        # words that end within a token have its text, not its tokens
        if whole < count:
            assert base_vocabulary.decode(base_vocabulary.spell(words[:count])).strip() == join_words(words[:count])


def test_what_a_given_beginning_leaves_of_a_word_is_joined_to_it(base_vocabulary: Vocabulary) -> None:
    first, rest, next_word = ([base_vocabulary._tokenizer.token_to_id(name)] for name in ("Ġcat", "s", "Ġsat"))
    words = place_words(base_vocabulary, first + rest + next_word)
    assert [word.text for word in words] == ["cats", "sat"]
    left = base_vocabulary.words_after(words, 1)
    assert [(word.text, word.space, word.token_ids) for word in left] == [
        ("s", False, tuple(rest)), ("sat", True, tuple(next_word))
    ]  # fmt: skip
    half = [base_vocabulary._tokenizer.token_to_id("à")]  # of a character: no text
    assert base_vocabulary.words_after(place_words(base_vocabulary, first + half), 1) == ()


def test_words_without_tokens_end_anywhere() -> None:
    words = [Word(text, 0.0, 1.0, tokens=count) for text, count in zip("abcdef", (1, 0, 0, 2, 0, 0), strict=True)]
    assert [whole_tokens(words, count) for count in range(7)] == [0, 1, 1, 1, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("他说：“你好”。", ["他", "说：", "“你", "好”。"]),
        ("価格は1,200円です。", ["価", "格", "は", "1,200", "円", "で", "す。"]),
        ("ที่นี่ดี", ["ที่", "นี่", "ดี"]),
        ("« Bonjour » dit-il", ["«", "Bonjour", "»", "dit-il"]),
        ("¿Qué tal? ¡Hola!", ["¿Qué", "tal?", "¡Hola!"]),
        ("नमस्ते । आप", ["नमस्ते", "।", "आप"]),
        ("ខ្ញុំ\u200bបាន\u200bទិញ", ["ខ្ញុំ\u200b", "បា", "ន\u200b", "ទិ", "ញ"]),
        ("\u200fשלום\u200f עולם", ["\u200fשלום\u200f", "עולם"]),
    ],
)
def test_punctuation_stays_with_its_word(base_vocabulary: Vocabulary, text: str, words: list[str]) -> None:
    assert [word.text for word in place_words(base_vocabulary, base_vocabulary.encode(text))] == words


def test_graphemes_of_one_token_share_its_time(base_vocabulary: Vocabulary) -> None:
    tokens = base_vocabulary._tokenizer.encode("ございます", add_special_tokens=False).ids
    assert len(tokens) == 1
    words = place_words(base_vocabulary, tokens, entered_sec=[1.0, 2.0], probabilities=[0.9])
    assert [word.text for word in words] == list("ございます")
    assert [round(word.end_sec, 6) for word in words] == [1.2, 1.4, 1.6, 1.8, 2.0]
    assert [word.tokens for word in words] == [0, 0, 0, 0, 1]


def test_no_word_is_lost_after_bytes_that_are_no_character(base_vocabulary: Vocabulary) -> None:
    def encode(text: str) -> list[int]:
        return list(base_vocabulary._tokenizer.encode(text, add_special_tokens=False).ids)

    half = [base_vocabulary._tokenizer.token_to_id("à")]  # E0, of three bytes
    for tokens in (half + encode(" hello there"), encode(" नमस्ते") + half + encode(" दुनिया"), encode(" a \ufffd b c")):
        words = place_words(base_vocabulary, tokens, entered_sec=range(len(tokens) + 1))
        assert join_words(words) == base_vocabulary.decode(tokens).strip()
        assert sum(word.tokens for word in words) == len(tokens)
        assert words[-1].end_sec == len(tokens)
    cut_off = encode(" 我们") + half  # a text that ends at a limit
    assert join_words(place_words(base_vocabulary, cut_off)) == "我们"
