"""Properties of text in the scripts of Whisper's languages, from labels to words and rates."""

from __future__ import annotations

import copy
import random
import unicodedata
from functools import cache
from pathlib import Path

import jiwer
import langcodes
import pytest
import regex

from src.data.labels import IGNORE_INDEX, LabelEncoder, text_tokens
from src.data.loader import create_dataloaders
from src.data.preparation import prepare_datasets
from src.data.vad import VoiceActivityDetector
from src.evaluation.data_checks import fill_languages
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.metrics import (
    PLAIN,
    PLAIN_CHINESE,
    PLAIN_TURKIC,
    PLAIN_UNSPACED,
    get_normalizer,
    headline_normalizer,
)
from src.inference.engines import load_engine
from src.inference.files.transcribe import BatchInference
from src.inference.streaming.session import StreamingASR
from src.inference.words import Vocabulary, join_words, place_words
from src.models.export.ctranslate2 import export_ctranslate2
from src.training.trainer import WhisperTrainer
from src.utils.config import load_config
from src.utils.errors import DataError
from src.utils.languages import UNSPACED, WHISPER_LANGUAGES, join_texts, language_name, parse_language

SCRIPTS = {  # by the language whose rules they are tried with; points of some are of the script Inherited
    "en": "Latin", "ru": "Cyrillic", "el": "Greek", "ar": "Arabic", "he": "Hebrew", "hi": "Devanagari", "bn": "Bengali",
    "pa": "Gurmukhi", "gu": "Gujarati", "ta": "Tamil", "te": "Telugu", "kn": "Kannada", "ml": "Malayalam",
    "si": "Sinhala", "th": "Thai", "lo": "Lao", "my": "Myanmar", "km": "Khmer", "ka": "Georgian", "hy": "Armenian",
    "am": "Ethiopic", "zh": "Han", "ja": "Hiragana", "ko": "Hangul", "bo": "Tibetan",
}  # fmt: skip
TEXTS = 40  # per script
SPEECH = Path(__file__).parent / "data" / "speech"
_MARKS = {"Arabic": "\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652", "Latin": "\u0301\u0308\u0323"}


@cache
def characters(script: str) -> tuple[str, str]:
    """Return the letters and the combining marks of a script that have a glyph and that NFKC leaves as they are."""
    visible = regex.compile(rf"[\p{{Script={script}}}--\p{{Default_Ignorable_Code_Point}}]", regex.VERSION1)
    found = [chr(code) for code in range(0x20000) if visible.match(chr(code))]
    if script == "Hiragana":
        found += [chr(code) for code in range(0x30A1, 0x30FB)]  # Katakana
    stable = [c for c in found if unicodedata.normalize("NFKC", c) == c]
    letters = [c for c in stable if unicodedata.category(c) in ("Ll", "Lu", "Lo")]
    marks = [c for c in stable if unicodedata.category(c)[0] == "M"]
    return "".join(letters), "".join(marks) + _MARKS.get(script, "")


def random_word(script: str, rng: random.Random) -> str:
    letters, marks = characters(script)
    clusters = [
        rng.choice(letters) + "".join(rng.choices(marks or [""], k=rng.choice((0, 0, 1, 2))))
        for _ in range(rng.randint(1, 6))
    ]
    return unicodedata.normalize("NFKC", "".join(clusters))


def random_text(script: str, rng: random.Random) -> str:
    """Return words with punctuation after some, which no rule of joining moves."""
    words = [random_word(script, rng) + rng.choice(("", "", "", ",", "?")) for _ in range(rng.randint(1, 8))]
    return " ".join(words)


def texts_of(language: str) -> list[str]:
    rng = random.Random(language)
    return [random_text(SCRIPTS[language], rng) for _ in range(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer(base: tuple[object, object]) -> object:
    return base[1].tokenizer


@pytest.mark.parametrize("language", SCRIPTS)
def test_labels_decode_to_the_text(language: str, tokenizer: object) -> None:
    encoder = LabelEncoder(tokenizer)
    for text in texts_of(language):
        labels = [token for token in encoder.encode(text, language).labels if token != IGNORE_INDEX]
        assert labels[-1] == encoder.end_token
        assert tokenizer.decode(labels[:-1]).strip() == text


@pytest.mark.parametrize("language", SCRIPTS)
def test_labels_never_begin_with_a_token_that_decoding_suppresses(language: str, base: tuple[object, object]) -> None:
    model, processor = base
    never = {*model.generation_config.suppress_tokens, *model.generation_config.begin_suppress_tokens}
    encoder = LabelEncoder(processor.tokenizer)
    first = {encoder.tokenize(text, language)[0] for text in texts_of(language)}
    assert not first & never


@pytest.mark.parametrize("language", SCRIPTS)
def test_words_joined_give_the_text(language: str, tokenizer: object) -> None:
    vocabulary = Vocabulary.of(tokenizer)
    for text in texts_of(language):
        tokens = text_tokens(tokenizer.backend_tokenizer, text)
        words = place_words(vocabulary, tokens)
        assert join_words(words) == text
        assert sum(word.tokens for word in words) == len(tokens)


@pytest.mark.parametrize("name", [PLAIN, PLAIN_TURKIC, PLAIN_UNSPACED, PLAIN_CHINESE])
@pytest.mark.parametrize("language", SCRIPTS)
def test_normalising_twice_is_normalising_once(name: str, language: str) -> None:
    normalize = get_normalizer(name)
    for text in texts_of(language):
        assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize("language", SCRIPTS)
def test_distinct_words_stay_distinct(language: str) -> None:
    """But for case; a word with one letter or mark replaced, left out or added is another word."""
    normalize = get_normalizer(PLAIN if language not in UNSPACED else PLAIN_UNSPACED)
    assert language in ("en", "zh") or normalize is get_normalizer(headline_normalizer(language))
    rng = random.Random(language)
    alphabet = "".join(characters(SCRIPTS[language]))
    for _ in range(TEXTS * 5):
        word = random_word(SCRIPTS[language], rng)
        at = rng.randrange(len(word))
        other = word[:at] + rng.choice(("", rng.choice(alphabet), word[at] + rng.choice(alphabet))) + word[at + 1 :]
        if fold(word) != fold(other):
            assert normalize(word) != normalize(other), (word, other)


def fold(word: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).lower())


def test_joining_texts_is_associative() -> None:
    rng = random.Random(0)
    for _ in range(500):
        a, b, c = (rng.choice(("", random_text(rng.choice(list(SCRIPTS.values())), rng))) for _ in range(3))
        assert join_texts([join_texts([a, b]), c]) == join_texts([a, join_texts([b, c])]) == join_texts([a, b, c])


@pytest.mark.parametrize("code", WHISPER_LANGUAGES)
def test_every_language_is_known_by_its_codes_and_its_name(code: str) -> None:
    language = langcodes.Language.get({"jw": "jv"}.get(code, code))
    marks = {code, code.upper(), language_name(code), language.display_name(), language.to_alpha3()}
    marks.add(language.to_alpha3(variant="B"))
    assert {mark: parse_language(mark) for mark in marks} == dict.fromkeys(marks, code)


@pytest.mark.parametrize(
    ("mark", "code"),
    [
        ("arz", "ar"),
        ("Egyptian Arabic", "ar"),
        ("apc-LB", "ar"),
        ("wuu", "zh"),
        ("yue-HK", "yue"),
        ("nn", "nn"),
        ("ind", "id"),
    ],
)
def test_members_of_a_macrolanguage_without_a_token_of_their_own_take_its_token(mark: str, code: str) -> None:
    assert parse_language(mark) == code


@pytest.mark.parametrize("mark", ["Hindi, English", "hi/en", "German English", "Malayalm", "Klingon", "xx", ""])
def test_marks_of_no_one_language_are_refused(mark: str) -> None:
    with pytest.raises(DataError, match="language"):
        parse_language(mark)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_stock_base_hears_the_language_of_real_speech(engine: str, base: tuple[object, object]) -> None:
    """Prompts in which an operator is promised; see tests/data/speech/README.md."""
    said = {"es": "representantes", "fr": "représentant", "it": "operator", "ru": "операторы заняты"}
    config = load_config(None, overrides={"device": "cpu", "model": {"variant": "base", "language": "auto"}})
    chosen = {} if engine == "torch" else {"engine": load_engine("base", config)}
    inference = BatchInference(*base, config) if not chosen else BatchInference(config=config, **chosen)
    found = inference.transcribe_batch([SPEECH / f"{code}.ogg" for code in said])
    assert [each.language for each in found] == list(said)
    for word, each in zip(said.values(), found, strict=True):
        assert word in each.text.lower()


@pytest.mark.slow
@pytest.mark.parametrize(("code", "mark"), [("hi", "Hindi"), ("zh", "cmn")])
def test_a_folder_in_another_language_is_trained_measured_streamed_and_exported(
    code: str, mark: str, base: tuple[object, object], tmp_path: Path
) -> None:
    paths = {f"{name}_dir": str(tmp_path / name) for name in ("runs", "checkpoints")}
    config = load_config(
        None,
        overrides={
            "device": "cpu", "paths": paths, "augmentation.enabled": False,
            "model": {"variant": "base", "language": mark},
            "data": {"source": "folder", "path": str(SPEECH / code), "num_workers": 0},
            "training": {"batch_size": 5, "epochs": 6, "full_context_prob": 0.0, "learning_rate": 5e-5},
        },
    )  # fmt: skip
    model, processor = copy.deepcopy(base[0]), base[1]
    splits = fill_languages(prepare_datasets(config), model, processor, config)
    assert {clip.language for clip in splits.utterances} == {code}
    loaders = create_dataloaders(splits, processor, config)
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config)
    trainer.train()

    # the headline is jiwer's, of words or of characters, and no text ended at a limit
    tuned = trainer.merged_model()
    result = ModelEvaluator(tuned, processor, config).evaluate_dataset(loaders.test)
    normalize = get_normalizer(result.normalizer)
    texts = [
        [normalize(text) for text in each]
        for each in zip(*((r.reference, r.hypothesis) for r in result.rows), strict=True)
    ]
    assert result.metric == ("CER" if code in UNSPACED else "WER")
    assert result.rate == pytest.approx((jiwer.cer if code in UNSPACED else jiwer.wer)(*texts))
    assert result.truncated == 0
    assert result.rate < 0.5

    # the export is saved, knows its language, and hears what the model hears in files and streams
    exported = load_engine(export_ctranslate2(trainer.best_model_dir, tmp_path / "int8"), config)
    assert exported.language == code
    unsaid = config.model_copy(update={"model": config.model.model_copy(update={"language": None})})
    (transcription,) = BatchInference(engine=exported, config=unsaid).transcribe_batch([splits.test[0].audio])
    assert transcription.language == code
    streamed = StreamingASR(engine=exported, vad=VoiceActivityDetector(config.vad), config=unsaid).stream_from_file(
        splits.test[0].audio
    )
    rates = [
        result.rate,
        *(
            (jiwer.cer if code in UNSPACED else jiwer.wer)(texts[0][0], normalize(t))
            for t in (transcription.text, streamed.text)
        ),
    ]
    assert max(rates) < 0.5
