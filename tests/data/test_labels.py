from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.audio import load_audio
from src.data.labels import (
    IGNORE_INDEX,
    MAX_LABEL_TOKENS,
    LabelEncoder,
    LabelStyle,
    TimedTokens,
    apply_case,
    resolve_case,
    restyle,
    suppressed_first,
)
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.utterance import TimedText, Utterance
from src.utils.errors import DataError


def fed_by_generate(model: Any, **options: Any) -> list[int]:
    """The tokens that `generate` gives the decoder before the first one of its own."""
    seen: list[torch.Tensor] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"])

    handle = model.model.decoder.register_forward_pre_hook(record, with_kwargs=True)
    model.generate(torch.zeros(1, model.config.num_mel_bins, 3000), max_new_tokens=1, **options)
    handle.remove()
    return seen[-1][0].tolist()


@pytest.mark.slow
def test_prefixes_are_what_generate_feeds(tiny_en: tuple[Any, Any], base: tuple[Any, Any]) -> None:
    english = LabelEncoder(tiny_en[1].tokenizer)
    assert english.prefix == fed_by_generate(tiny_en[0]) == [50257, 50362]
    assert list(english.prefix_for(timestamps=True)) == fed_by_generate(tiny_en[0], return_timestamps=True) == [50257]
    spoken = {"language": "de", "task": "transcribe"}
    german = LabelEncoder(base[1].tokenizer, **spoken)
    assert german.prefix == fed_by_generate(base[0], **spoken) == [50258, 50261, 50359, 50363]
    times = fed_by_generate(base[0], return_timestamps=True, **spoken)
    assert list(german.prefix_for(timestamps=True)) == times == [50258, 50261, 50359]


@pytest.mark.slow
def test_multilingual_without_or_with_unknown_language_is_refused(base: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"model\.language"):
        LabelEncoder(base[1].tokenizer).encode("hello")
    with pytest.raises(DataError, match="xx"):
        LabelEncoder(base[1].tokenizer, language="xx")


@pytest.mark.slow
def test_label_has_one_start_token_a_leading_space_its_end_and_448_tokens_at_most(_tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(_tiny_en[1].tokenizer)
    encoded = encoder.encode("hello world")
    assert encoded.decoder_input_ids[:2] == (50257, 50362)
    assert _tiny_en[1].tokenizer.decode(encoded.decoder_input_ids[2:]) == " hello world"
    assert encoded.labels == (IGNORE_INDEX, *encoded.decoder_input_ids[2:], 50256)
    assert len(encoder.encode("a " * (MAX_LABEL_TOKENS - 3)).labels) == MAX_LABEL_TOKENS - 1
    with pytest.raises(DataError, match="449 tokens"):
        encoder.encode("a " * (MAX_LABEL_TOKENS - 2))


@pytest.mark.slow
def test_a_text_with_times_is_written_as_generate_writes_it(tiny_en: tuple[Any, Any], sample: list[Utterance]) -> None:
    model, processor = tiny_en
    encoder = LabelEncoder(processor.tokenizer)
    pause = np.zeros(12_800, np.float32)
    audio = np.concatenate([load_audio(SAMPLE_CLIP), pause, load_audio(sample[0].audio)])
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    written = model.generate(features, return_timestamps=True)[0].tolist()
    text = processor.tokenizer.decode(written, decode_with_timestamps=True)
    segments = re.findall(r"<\|([\d.]+)\|>([^<]+)<\|([\d.]+)\|>", text)
    assert len(segments) >= 2  # some of them without a pause between, some with one
    parts = [TimedTokens(encoder.tokenize(said), float(start), float(end)) for start, said, end in segments]
    label = encoder.timed_label(parts)
    assert label.labels == (*written, encoder.end_token)
    assert label.decoder_input_ids == (50257, *written)


@pytest.mark.slow
def test_times_go_in_steps_of_an_encoder_position_up_to_30_s(_tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(_tiny_en[1].tokenizer)
    label = encoder.timed_label([TimedTokens((1,), 0.0, 3.735), TimedTokens((2,), 4.11, 30.0)])
    assert label.labels == (50363, 1, 50363 + 187, 50363 + 206, 2, 50363 + 1500, 50256)  # 3.74 s, 4.12 s
    with pytest.raises(DataError, match=r"30\.02 s"):
        encoder.timed_label([TimedTokens((1,), 0.0, 30.02)])


@pytest.mark.slow
def test_a_prompt_is_cut_to_its_end_and_to_the_room_that_the_label_leaves(_tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(_tiny_en[1].tokenizer)
    before = tuple(range(1000, 1400))
    for tokens, kept in ((10, 223), (300, 448 - 303 - 1), (443, 1), (444, 0), (445, 0)):
        label = encoder.label([7] * tokens, previous=before)
        prompt = [50360, *before[-kept:]] if kept else []
        assert list(label.decoder_input_ids) == [*prompt, *encoder.prefix, *[7] * tokens]
        assert len(label.labels) + 1 == len(prompt) + 3 + tokens <= MAX_LABEL_TOKENS
        assert label.labels[-tokens - 1 :] == (*[7] * tokens, 50256)
        assert set(label.labels[: -tokens - 1]) == {IGNORE_INDEX}


@pytest.mark.parametrize(
    ("texts", "asked", "case"),
    [(["HELLO THERE", "I AM"], "auto", "sentence"), (["Hello NASA", "I am"], "auto", "keep"),
     (["HELLO"], "keep", "keep"), (["你好"], "auto", "keep")],
)  # fmt: skip
def test_a_corpus_in_capitals_is_recased_and_others_are_kept(texts: list[str], asked: Any, case: str) -> None:
    assert resolve_case(texts, asked) == case


@pytest.mark.parametrize(
    ("text", "expected"),
    [("WHERE AM I", "Where am I."), ("I'M HERE AND I KNOW", "I'm here and I know."), ("WHY?", "Why?"), ("", "")],
)
def test_sentence_case(text: str, expected: str) -> None:
    assert apply_case(text, "sentence") == expected


def test_chinese_with_some_latin_capitals_and_georgian_are_no_corpus_in_capitals() -> None:
    assert resolve_case(["他在ABC公司工作"], "auto") == "keep"
    assert resolve_case(["ძმამ იყიდა ვაშლი"], "auto") == "keep"
    assert resolve_case(["ПРИВЕТ ВСЕМ"], "auto") == "sentence"


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("IŞIK VE İZMİR", "tr", "Işık ve izmir."),
        ("İYİ IŞIK", "az", "İyi ışık."),
        ("I\u0307YI\u0307 IS\u0327IK", "tr", "İyi ışık."),  # decomposed
        ("İSTANBUL", "en", "Istanbul."),  # no stray U+0307
        ("I DZIECI I JA", "pl", "I dzieci i ja."),
        ("TU ED I MIEI AMICI", "it", "Tu ed i miei amici."),
        ("DER HUND BELLT", "de", "Der hund bellt."),  # nouns cannot be known
        ("IJS IS KOUD", "nl", "IJs is koud."),
        ("¿QUÉ HORA ES?", "es", "¿Qué hora es?"),
        ("ΚΑΛΗΜΕΡΑ ΣΑΣ", "el", "Καλημερα σας."),
        ("ძმამ იყიდა", "ka", "ძმამ იყიდა."),  # no sentence begins with a capital
        ("天气很好", "zh", "天气很好。"),
        ("天气很好", "yue", "天气很好。"),
        ("今日は", "ja", "今日は。"),
        ("我的电脑是 MAC", "zh", "我的电脑是 mac。"),
        ("मेरा नया PHONE", "hi", "मेरा नया phone।"),
        ("आज मौसम अच्छा है", "hi", "आज मौसम अच्छा है।"),
        ("আজ ভালো", "bn", "আজ ভালো।"),
        ("ਮੀਂਹ ਪਵੇਗਾ", "pa", "ਮੀਂਹ ਪਵੇਗਾ।"),
        ("بارش ہوگی", "ur", "بارش ہوگی۔"),
        ("سيهطل المطر", "ar", "سيهطل المطر."),
        ("Եղբայրս գնեց", "hy", "Եղբայրս գնեց։"),
        ("ወንድሜ ገዛ", "am", "ወንድሜ ገዛ።"),
        ("ฝนตกหนัก", "th", "ฝนตกหนัก"),
        ("ຝົນຕົກໜັກ", "lo", "ຝົນຕົກໜັກ"),
        ("និយាយថា", "km", "និយាយថា"),
        ("ဝယ်ခဲ့တယ်", "my", "ဝယ်ခဲ့တယ်"),
        ("비가 내린다", "ko", "비가 내린다."),
    ],
)  # fmt: skip
def test_sentences_are_written_as_their_language_does(text: str, language: str, expected: str) -> None:
    assert apply_case(text, "sentence", language) == expected


# letters of 20 scripts, with a language that is written in each
SCRIPTS = [
    ("de", "aäbcßZÖ"), ("ru", "абвгЖя"), ("el", "αβγςΩά"), ("hy", "աբգԵւ"), ("ka", "აბგდეყ"), ("he", "אבגדשת"),
    ("ar", "ابتثجحَُّ"), ("hi", "कखगािीुेैं्"), ("bn", "কখগািীেৈ্"), ("pa", "ਕਖਗਾਿੀੰ"), ("gu", "કખગાિીે્"),
    ("ta", "கஙசாிீெொ்"), ("te", "కఖగాిీ్"), ("kn", "ಕಖಗಾಿೀ್"), ("ml", "കഖഗാിീ്"), ("si", "කඛගාිී්"),
    ("th", "กขคงาิีุ้่"), ("lo", "ກຂຄງາິີ"), ("km", "កខគាិី្"), ("my", "ကခဂာိီ်"), ("bo", "ཀཁགངིུ"), ("am", "ሀሁሂሃለሉ"),
    ("ko", "가나다라힣"), ("ja", "あいうアイウ漢"), ("zh", "我你他很好们"), ("yue", "佢哋喺嘅"),
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SCRIPTS), st.data())
def test_labels_decode_to_the_text_in_every_script_and_begin_as_decoding_may(
    base: tuple[Any, Any], spoken: tuple[str, str], data: st.DataObject
) -> None:
    language, alphabet = spoken
    text = data.draw(st.text(alphabet + "  ", min_size=1, max_size=30).map(str.strip).filter(bool))
    rules, tokenizer = base[0].generation_config, base[1].tokenizer
    for space in (None, True, False):
        tokens = LabelEncoder(tokenizer, language=language).tokenize(text, space=space)
        assert tokenizer.decode(tokens).strip() == text
        assert tokens[0] not in {*rules.suppress_tokens, *rules.begin_suppress_tokens}
        following = LabelEncoder(tokenizer, language=language).tokenize(text, space=space, first=False)
        assert tokenizer.decode(following).strip() == text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "_tiny_en"])
def test_the_tokens_that_no_label_begins_with_are_those_that_decoding_suppresses(
    name: str, request: pytest.FixtureRequest
) -> None:
    model, processor = request.getfixturevalue(name)
    rules = model.generation_config
    suppressed = {t for t in (*rules.suppress_tokens, *rules.begin_suppress_tokens) if t < rules.eos_token_id}
    assert suppressed_first(processor.tokenizer.backend_tokenizer) == suppressed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text", "written"),
    [("zh", "你好", "你好"), ("de", "Hallo", " Hallo"), ("bn", "আমার", "আমার"),
     ("en", '"Hello" he said', ' Hello" he said'),
     ("en", "-Hello", "-Hello"), ("en", "(x) y", " x) y"), ("ja", "「はい」と", "はい」と"), ("en", "♪♪", "")],
)  # fmt: skip
def test_the_space_is_that_of_the_language_and_no_label_begins_with_a_suppressed_token(
    base: tuple[Any, Any], language: str, text: str, written: str
) -> None:
    encoder = LabelEncoder(base[1].tokenizer, language=language)
    assert base[1].tokenizer.decode(encoder.tokenize(text)) == written


@pytest.mark.slow
def test_names_of_special_tokens_in_a_text_stay_text(base: tuple[Any, Any]) -> None:
    tokenizer = base[1].tokenizer
    tokens = LabelEncoder(tokenizer, language="en").tokenize("a <|endoftext|> b <|0.00|> <|en|>")
    assert max(tokens) < tokenizer.eos_token_id
    assert tokenizer.backend_tokenizer.decode(tokens) == " a <|endoftext|> b <|0.00|> <|en|>"


@pytest.mark.slow
def test_each_text_has_the_prefix_of_its_language_and_translations_are_english(base: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(base[1].tokenizer, language="de")
    assert encoder.prefix_for("hi") == (50258, 50276, 50359, 50363)
    assert encoder.prefix_for("yue") == encoder.prefix_for("zh")  # before large-v3
    assert encoder.encode("नमस्ते", "hi").decoder_input_ids[:4] == encoder.prefix_for("hi")
    translated = LabelEncoder(base[1].tokenizer, language="zh", task="translate")
    assert base[1].tokenizer.decode(translated.tokenize("Hello")) == " Hello"
    assert translated.prefix == [50258, 50260, 50358, 50363]


@pytest.mark.slow
def test_an_english_model_takes_no_other_language(_tiny_en: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"English only, the speech is Hindi \(hi\).*multilingual"):
        LabelEncoder(_tiny_en[1].tokenizer).encode("नमस्ते", "hi")


def test_times_in_a_transcript_are_parts_and_no_text() -> None:
    timed = "<|0.00|> HELLO THERE<|2.00|><|2.50|> I AM<|4.00|>"
    clip = Utterance("a", b"", timed, language="en", duration_sec=3.8)
    kept, sentence = (restyle(clip, LabelStyle(case)) for case in ("keep", "sentence"))  # type: ignore[arg-type]
    assert kept.text == "HELLO THERE I AM"
    assert kept.parts == (TimedText("HELLO THERE", 0.0, 2.0), TimedText("I AM", 2.5, 3.8))
    assert sentence.text == "Hello there I am."
    assert [part.text for part in sentence.parts] == ["Hello there", "I am."]
    assert restyle(sentence, LabelStyle("keep")) == kept
    unspaced = restyle(replace(clip, text="<|0.00|>你好<|1.00|><|1.00|>再见", language="zh"), LabelStyle("keep"))
    assert (unspaced.text, unspaced.parts[1]) == ("你好再见", TimedText("再见", 1.0, 3.8))
    for wrong, message in (
        ("hello <|0.00|> there<|2.00|>", "begins before its first time"),
        ("<|2.00|> hello<|1.00|>", "go back, from 2.00 to 1.00 s"),
        ("<|0.00|> hello<|9.00|>", "last time is 9.00 s, the recording ends at 3.80 s"),
    ):
        with pytest.raises(DataError, match=message):
            restyle(replace(clip, text=wrong), LabelStyle("keep"))
