from __future__ import annotations

import sys
import unicodedata
from typing import Any

import jiwer
import numpy as np
import pytest
import regex
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from src.evaluation import metrics
from src.evaluation.metrics import PLAIN, WHISPER_BASIC, WHISPER_ENGLISH, Bootstrap, EditCounts, MetricsCalculator
from src.utils.errors import ConfigError, DataError, MissingDependencyError
from src.utils.languages import lower

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hat", "big", "red"]
LOOP = "and the " * 8
FEW_WORDS = st.lists(st.sampled_from(["the", "a", "cat", "dog", "sat"]), max_size=8).map(" ".join)


def corpus(n: int, seed: int = 0, error: float = 0.3) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(n)]
    hypotheses = [
        " ".join(
            str(rng.choice(WORDS)) if rng.random() < error else word
            for word in reference.split()
            if rng.random() > 0.05
        )
        for reference in references
    ]
    return references, hypotheses


def scipy_interval(errors: Any, words: Any) -> tuple[float, float]:
    found = scipy.stats.bootstrap(
        (errors, words), lambda e, w, axis: e.sum(axis) / w.sum(axis), paired=True, vectorized=True,
        n_resamples=9999, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    rate, n = errors.sum() / words.sum(), len(words)
    factor = scipy.stats.t.ppf(0.975, n - 1) / scipy.stats.norm.ppf(0.975) * np.sqrt(n / (n - 1))
    return pytest.approx((rate + factor * (found.low - rate), rate + factor * (found.high - rate)), abs=0.005)


def test_rates_are_those_of_jiwer() -> None:
    references, hypotheses = corpus(200)
    counts = metrics.word_counts(references, hypotheses, PLAIN)
    output = jiwer.process_words(references, hypotheses)
    total = metrics.sum_counts(counts)
    found = (total.substitutions, total.deletions, total.insertions, metrics.error_rate(counts))
    assert found == (output.substitutions, output.deletions, output.insertions, pytest.approx(output.wer))
    rates = MetricsCalculator("en").compute(references, hypotheses)
    assert (rates.wer_plain, rates.cer_plain) == pytest.approx((output.wer, jiwer.cer(references, hypotheses)))
    normalize = metrics.get_normalizer(rates.normalizer)
    words = jiwer.process_words([normalize(text) for text in references], [normalize(text) for text in hypotheses])
    assert (rates.wer, rates.mer, rates.wil) == pytest.approx((words.wer, words.mer, words.wil))


def test_words_on_an_empty_reference_count_as_insertions() -> None:
    references, invented = ["the cat", ""], ["the cat", "thank you for watching"]
    rates = MetricsCalculator("en").compute(references, invented)
    assert (rates.wer, rates.insertions, rates.reference_words, rates.cer) == (2.0, 4, 2, 22 / 7)
    assert MetricsCalculator("en").compare(references, references, invented).difference == pytest.approx(4 / 2)
    assert np.isfinite([rates.wer_low, rates.wer_high]).all()  # draws without a word are left out


def test_shares_of_rows_that_are_wrong_empty_or_loop() -> None:
    rates = MetricsCalculator("en").compute(
        ["the cat", "a dog", "the mat", "", ""], ["the cat", "", "on the " * 9, "thank you", ""]
    )
    assert (rates.sentence_error_rate, rates.empty_rate, rates.loop_rate) == (3 / 5, 1 / 3, 1 / 5)
    assert (rates.empty_references, rates.hallucinated_words, rates.insertions) == (2, 2, 16 + 2)
    two = ["the cat", "a dog"]
    assert MetricsCalculator("en").compute(two, two, durations_sec=[1.0, 1.0], num_tokens=[2, 30]).loop_rate == 1 / 2
    silent = MetricsCalculator("en").compute(["the cat"], [""])
    assert (silent.wer, silent.mer, silent.wil, silent.empty_rate) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "duration_sec", "num_tokens", "expected"),
    [
        ("the cat sat", "the cat sat", 2.0, 4, False),
        ("the cat", LOOP, 10.0, 16, True),
        ("the cat", LOOP, None, None, True),
        (LOOP, LOOP, 10.0, 16, False),  # really said
        ("no", "no no no no", 2.0, 4, False),  # as people do
        ("no", "no no no no no no", 0.5, 6, True),  # twelve per second
        ("the cat", "a b c d e f g h", 1.0, 18, True),  # more tokens than anybody says
        ("the cat", "a b c d e f g h", 1.0, 17, False),
        ("the cat", "", 1.0, 0, False),
        ("", "", 1.0, 0, False),
    ],
)
def test_loops_and_impossible_rates_are_recognised(
    reference: str, hypothesis: str, duration_sec: float | None, num_tokens: int | None, expected: bool
) -> None:
    assert (
        metrics.is_loop(reference, hypothesis, duration_sec=duration_sec, num_tokens=num_tokens, language="en")
        is expected
    )


SPOKEN = {  # tokens of base; seconds of espeak-ng at 175 words per minute, Japanese and Thai as people speak
    "hi": ("मौसम विभाग का कहना है कि कल सुबह देश के उत्तरी भाग में भारी बारिश होगी।", 72, 4.9),
    "ta": ("என் சகோதரர் நேற்று சந்தையில் மூன்று கிலோ ஆப்பிள்களையும் ஒரு பாட்டில் பாலையும் வாங்கினார்.", 76, 5.2),
    "ka": ("ჩემმა ძმამ გუშინ ბაზარში სამი კილო ვაშლი და ერთი ბოთლი რძე იყიდა.", 152, 4.6),
    "my": ("ကျွန်တော့်အစ်ကိုက မနေ့က ဈေးမှာ ပန်းသီးသုံးကီလိုနဲ့ နို့တစ်ပုလင်း ဝယ်ခဲ့တယ်။", 210, 4.9),
    "zh": ("我哥哥昨天在市场上买了三公斤苹果和一瓶牛奶。", 27, 7.2),
    "ja": ("天気予報によると、明日の朝、北部では大雨が降るそうです。", 31, 5.1),
    "th": ("พี่ชายของฉันซื้อแอปเปิลสามกิโลกรัมและนมหนึ่งขวดที่ตลาดเมื่อวานนี้", 55, 3.2),
    "en": ("My brother bought three kilos of apples and a bottle of milk at the market yesterday.", 17, 4.5),
}


@pytest.mark.parametrize("language", SPOKEN)
def test_ordinary_speech_is_no_loop_in_any_language(language: str) -> None:
    text, tokens, sec = SPOKEN[language]
    rates = MetricsCalculator(language).compute([text], [text], durations_sec=[sec], num_tokens=[tokens])
    assert rates.loop_rate == 0
    assert MetricsCalculator().compute([text], [text], durations_sec=[sec], num_tokens=[tokens]).loop_rate == 0
    wrong = text[: len(text) // 2]  # however wrong: the loop must not be found in the reference only
    assert MetricsCalculator(language).compute([wrong], [text], durations_sec=[sec]).loop_rate == 0


@pytest.mark.parametrize(
    ("language", "phrase", "copies"),
    [
        ("zh", "谢谢观看", 8),
        ("zh", "请不吝点赞 订阅 转发 打赏支持明镜与点点栏目", 3),
        ("ja", "ありがとうございました。", 3),
        ("ja", "ご視聴ありがとうございました", 4),
        ("th", "ขอบคุณที่รับชม ", 4),
        ("hi", "धन्यवाद ", 12),
        ("ko", "시청해 주셔서 감사합니다 ", 4),
        ("zh", "Thank you for watching! ", 4),  # words of another language stay words
        ("th", "시청해 주셔서 감사합니다 ", 4),
    ],
)
def test_loops_are_found_in_every_script(language: str, phrase: str, copies: int) -> None:
    rates = MetricsCalculator(language).compute([phrase], [phrase * copies], durations_sec=[20.0])
    assert rates.loop_rate == 1
    many = MetricsCalculator(language).compute([phrase], [phrase], durations_sec=[1.0], num_tokens=[140])
    assert many.loop_rate == 1  # more tokens than the fastest speech has


def test_intervals_are_those_of_scipy_widened_for_few_blocks() -> None:
    references, hypotheses = corpus(200)
    counts = metrics.word_counts(references, hypotheses, PLAIN)
    errors, words = np.array([c.errors for c in counts]), np.array([c.reference_words for c in counts])
    by_clip = metrics.estimate_rate(counts, None, Bootstrap(9999))
    assert (by_clip.low, by_clip.high) == scipy_interval(errors, words)
    assert by_clip.low < by_clip.rate < by_clip.high
    speakers = np.arange(200) // 10
    by_speaker = metrics.estimate_rate(counts, [f"s{i}" for i in speakers], Bootstrap(9999))
    assert (by_speaker.low, by_speaker.high) == scipy_interval(
        np.bincount(speakers, errors), np.bincount(speakers, words)
    )
    half = [EditCounts(c.substitutions // 2, c.deletions, c.insertions, c.reference_words) for c in counts]
    paired = metrics.compare_counts(counts, half, bootstrap=Bootstrap(9999))
    assert paired.difference == pytest.approx(metrics.error_rate(half) - metrics.error_rate(counts))
    assert (paired.low, paired.high) == scipy_interval(np.array([c.errors for c in half]) - errors, words)


@pytest.mark.parametrize("n", [5, 10, 40])
def test_with_blocks_of_one_size_the_interval_is_near_students(n: int) -> None:
    changes = np.random.default_rng(n).normal(3, 10, n)
    student = scipy.stats.ttest_1samp(changes / 100, 0).confidence_interval()
    found = Bootstrap(9999).interval(changes, np.full(n, 100.0), np.arange(n))
    assert found == pytest.approx(student, abs=0.06 * (student.high - student.low))


def paired_counts(speakers: int, change: float, rng: np.random.Generator) -> tuple[Any, Any, list[str]]:
    """Return counts of two systems, summed over 20 clips of each speaker; speakers differ as learners do."""
    words = np.maximum(1, rng.poisson(6.3, (20, speakers))).sum(0)
    voices = rng.beta(2, 8, speakers)
    first, second = (
        rng.binomial(words, np.clip(voices + each + rng.normal(0, 0.03, speakers), 0, 1)) for each in (0, change)
    )
    counts = [
        [EditCounts(int(errors), 0, 0, int(n)) for errors, n in zip(system, words, strict=True)]
        for system in (first, second)
    ]
    return counts[0], counts[1], [f"s{i}" for i in range(speakers)]


@pytest.mark.parametrize("speakers", [3, 5, 10, 40])
def test_few_verdicts_on_equal_systems_are_false(speakers: int) -> None:
    rng = np.random.default_rng(speakers)
    found = []
    for seed in range(800 if speakers >= metrics.MIN_BLOCKS else 50):
        *systems, groups = paired_counts(speakers, 0.0, rng)
        found.append(metrics.compare_counts(*systems, groups, Bootstrap(500, seed=seed)).verdict)
    false = sum(each in ("better", "worse") for each in found) / len(found)
    if speakers < metrics.MIN_BLOCKS:
        assert set(found) == {"too few to tell"}
    else:
        assert 0.03 < false < 0.08  # percentiles alone: 0.16 with 5 speakers


def test_a_difference_of_four_points_is_seen_with_forty_speakers() -> None:
    rng = np.random.default_rng(0)
    found = []
    for seed in range(100):
        *systems, groups = paired_counts(40, 0.04, rng)
        found.append(metrics.compare_counts(*systems, groups, Bootstrap(500, seed=seed)).verdict)
    assert found.count("worse") >= 90


def test_no_end_of_a_rate_is_below_zero() -> None:
    counts = [EditCounts(errors, 0, 0, 10) for errors in (0, 0, 3)]
    found = metrics.estimate_rate(counts, ["a", "b", "c"])
    assert (found.low, found.rate) == (0.0, 0.1)
    assert found.high > 0.3  # by Student's with two degrees of freedom 0.53


def test_speakers_are_resampled_where_two_are_known() -> None:
    for speakers, *blocks in (
        (["anna"] * 5, "clip", 5),
        ([None] * 5, "clip", 5),
        (["anna"] * 2 + [None] * 3, "clip", 5),
        (["anna", "anna", "bob", None, None], "speaker", 4),  # clips without a speaker are blocks of their own
    ):
        rates = MetricsCalculator("en").compute(*corpus(5), speakers)
        assert [rates.blocks, rates.num_blocks] == blocks


def test_paired_comparison_names_better_worse_and_no_difference() -> None:
    references, noisy = corpus(300, error=0.5)
    calculator = MetricsCalculator("en")
    assert calculator.compare(references, noisy, references).verdict == "better"
    assert calculator.compare(references, references, noisy).verdict == "worse"
    same = calculator.compare(references, noisy, noisy)
    assert (same.verdict, same.difference) == ("no difference shown", 0.0)
    one = calculator.compare(["the cat"], ["a dog"], ["the cat"])
    assert (one.difference, one.verdict) == (-1.0, "too few to tell")
    assert np.isnan([one.low, calculator.compute(["the cat"], ["the dog"]).wer_low]).all()
    first, again, other = (MetricsCalculator("en", bootstrap=Bootstrap(seed=n)).compute(*corpus(40)) for n in (1, 1, 2))
    assert first == again != other  # the seed decides


HINDI = ["राम की किताब।", "वह काम करती है"], ["रेम का कुतेब", "वह कोम करते है"]


@pytest.mark.parametrize(
    ("language", "references", "hypotheses", "prepared"),
    [  # "prepared": the same texts as a person writes them for jiwer
        ("hi", *HINDI, (["राम की किताब", "वह काम करती है"], ["रेम का कुतेब", "वह कोम करते है"])),
        ("ta", ["என் பெயர், குமார்!"], ["எனி பெயர் குமார்"], (["என் பெயர் குமார்"], ["எனி பெயர் குமார்"])),
        ("ar", ["السَّلامُ عَلَيْكُمْ؟"], ["السلام عَلَيْكُمْ"], (["السَّلامُ عَلَيْكُمْ"], ["السلام عَلَيْكُمْ"])),
        ("fa", ["می‌خواهم، بروم"], ["می خواهم بروم"], (["می‌خواهم بروم"], ["می خواهم بروم"])),
        (
            "de",
            ["Grüße aus Köln – groß!"],
            ["grüsse aus köln Groß"],
            (["grüße aus köln groß"], ["grüsse aus köln groß"]),
        ),
        ("tr", ["İstanbul’da IŞIK"], ["istanbul'da isik"], (["istanbul'da ışık"], ["istanbul'da isik"])),
        ("el", ["Ο ΔΡΟΜΟΣ ΕΙΝΑΙ"], ["ο δρομος ήταν"], (["ο δρομος ειναι"], ["ο δρομος ήταν"])),
        ("hy", ["Ինչո՞ւ եկար։"], ["ինչու եկավ"], (["ինչու եկար"], ["ինչու եկավ"])),
        ("ka", ["ჩემმა ძმამ, გუშინ"], ["ჩემმა ძმა გუშინ"], (["ჩემმა ძმამ გუშინ"], ["ჩემმა ძმა გუშინ"])),
        ("vi", ["Tôi đi."], ["toi đi"], (["tôi đi"], ["toi đi"])),
        ("ko", ["우리 형은, 어제"], ["우리 형은 오제"], (["우리 형은 어제"], ["우리 형은 오제"])),
        (
            "zh",
            ["今天天氣很好，我們去公園。"],
            ["今天天气很好 我们去公元"],
            (["今天天气很好我们去公园"], ["今天天气很好我们去公元"]),
        ),
        ("yue", ["佢喺邊度呀？", "好"], ["佢係邊度", "好"], (["佢喺边度呀", "好"], ["佢系边度", "好"])),
        ("ja", ["明日の朝、ＮＨＫ"], ["明日 の 麻 nhk"], (["明日の朝nhk"], ["明日の麻nhk"])),
        ("th", ["ที่ นี่ ดี"], ["ทา นา ดู"], (["ที่นี่ดี"], ["ทานาดู"])),
        ("my", ["နို့ တစ်ပုလင်း၊ ဝယ်ခဲ့တယ်။"], ["နို့ တစ်ပုလင် ဝယ်ခဲ့တယ်"], (["နို့တစ်ပုလင်းဝယ်ခဲ့တယ်"], ["နို့တစ်ပုလင်ဝယ်ခဲ့တယ်"])),
    ],
)
def test_the_headline_is_that_of_jiwer_on_texts_prepared_by_hand(
    language: str, references: list[str], hypotheses: list[str], prepared: tuple[list[str], list[str]]
) -> None:
    rates = MetricsCalculator(language).compute(references, hypotheses)
    unspaced = language in ("zh", "yue", "ja", "th", "my")
    assert rates.metric == ("CER" if unspaced else "WER")
    assert rates.rate == pytest.approx((jiwer.cer if unspaced else jiwer.wer)(*prepared))
    assert rates.cer == pytest.approx(jiwer.cer(*prepared))
    assert np.isnan(rates.wer) if unspaced else rates.wer == rates.rate == rates.wer_plain
    assert rates.cer_plain == rates.cer
    if language != "el":
        by_script = MetricsCalculator().compute(references, hypotheses)
        assert by_script.metric == rates.metric


def test_other_vowel_signs_are_other_words_and_decide_a_comparison() -> None:
    right, wrong = HINDI
    calculator = MetricsCalculator("hi")
    assert calculator.compute(right, wrong).errors == 5
    assert calculator.compare(right * 20, wrong * 20, right * 20).verdict == "better"


def test_any_mark_of_a_language_chooses_its_metric() -> None:
    for language, languages in (("zh-TW", None), (None, ["Chinese"]), ("hi", ["cmn"])):
        rates = MetricsCalculator(language).compute(["天氣很好"], ["天气很坏"], languages=languages)
        assert (rates.metric, rates.rate, [*rates.rates_by_language]) == ("CER", 1 / 4, ["zh"])


def test_traditional_against_simplified_characters_decides_nothing() -> None:
    simplified, traditional = ["我们看着乾清宫的后面", "他说什么"] * 10, ["我們看著乾清宮的後面", "他說什麼"] * 10
    for language in ("zh", "yue"):
        calculator = MetricsCalculator(language)
        assert calculator.compute(simplified, traditional).rate == 0
        assert calculator.compare(traditional, simplified, traditional).difference == 0


def test_chinese_without_opencc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opencc", None)
    monkeypatch.setattr(metrics, "get_normalizer", metrics.get_normalizer.__wrapped__)
    for language in ("zh", "yue"):
        with pytest.raises(MissingDependencyError, match="pip install opencc"):
            MetricsCalculator(language).compute(["天气很好"], ["天气很好"])
    assert MetricsCalculator("ja").compute(["天気"], ["天気"]).rate == 0


def test_the_second_column_is_named_and_has_its_own_rate() -> None:
    for language, second in (
        ("en", PLAIN),
        ("hi", WHISPER_BASIC),
        ("zh", metrics.WHISPER_UNSPACED),
        (None, WHISPER_BASIC),
    ):
        assert metrics.second_normalizer(language) == second
    rates = MetricsCalculator("hi").compute(*HINDI)
    normalize = metrics.get_normalizer(WHISPER_BASIC)
    texts = [[normalize(text) for text in side] for side in HINDI]
    assert (rates.second_normalizer, rates.second_rate) == (WHISPER_BASIC, pytest.approx(jiwer.wer(*texts)))
    english = MetricsCalculator("en").compute(*corpus(40))
    assert (english.second_rate, english.second_low) == (english.wer_plain, english.wer_plain_low)


def test_translations_are_english_whatever_is_spoken() -> None:
    rates = MetricsCalculator("zh", task="translate").compute(["The colour of it"], ["the color, of it"])
    assert (rates.metric, rates.rate, rates.normalizer) == ("WER", 0.0, WHISPER_ENGLISH)
    assert list(rates.rates_by_language) == ["zh"]


def test_several_languages_count_alike_each_with_its_own_metric() -> None:
    english = corpus(60, error=0.1)
    chinese = ["今天天气很好", "他昨天买了三本书"] * 10, ["今天天汽很好", "他昨天买了三本书"] * 10
    german = ["guten Morgen"] * 4, ["guten Morgen", "gute Morgen"] * 2
    sides = [english[i] + chinese[i] + german[i] for i in (0, 1)]
    languages = ["en"] * 60 + ["zh"] * 20 + ["de"] * 4
    speakers = [f"s{i % 9}" for i in range(84)]
    rates = MetricsCalculator("fr").compute(*sides, speakers, languages=languages)
    own = {
        language: MetricsCalculator(language).compute(*texts, speakers[start : start + len(texts[0])])
        for language, texts, start in (("de", german, 80), ("en", english, 0), ("zh", chinese, 60))
    }
    assert rates.metric == "mean"
    assert rates.rate == pytest.approx(np.mean([each.rate for each in own.values()]))
    assert rates.low < rates.rate < rates.high
    for language, each in own.items():
        found = rates.rates_by_language[language]
        assert (found.metric, found.rate, found.low, found.high) == (each.metric, each.rate, each.low, each.high)
        assert (found.n, found.reference_words) == (each.n, each.reference_words)
    spaced = [english[i] + german[i] for i in (0, 1)]
    normalize = metrics.get_normalizer(WHISPER_ENGLISH)
    assert rates.wer == pytest.approx(jiwer.wer(*[[normalize(text) for text in side] for side in spaced]))
    assert rates.normalizer == f"{WHISPER_ENGLISH} + {metrics.PLAIN_CHINESE} + {PLAIN}"
    better = MetricsCalculator().compare(sides[0], sides[1], sides[0], speakers, languages=languages)
    assert (better.metric, better.verdict, better.difference) == ("mean", "better", pytest.approx(-rates.rate))


def test_the_interval_of_a_mean_is_that_of_each_language_drawn_by_itself() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(4, 20, 120).astype(float)
    errors = rng.binomial(words.astype(int), np.where(np.arange(120) < 80, 0.1, 0.4)).astype(float)
    strata = (np.arange(120) >= 80).astype(np.int64)
    found = scipy.stats.bootstrap(
        (np.arange(80), np.arange(80, 120)),
        lambda a, b, axis: (
            errors[a].sum(axis) / words[a].sum(axis) + errors[b].sum(axis) / words[b].sum(axis)
        ) / 2,
        vectorized=True, n_resamples=9999, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    low, high = Bootstrap(9999).interval(errors, words, np.arange(120), strata)
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.005)
    short, long = rng.normal(0, 1, 6), rng.normal(0, 9, 30)
    welch = scipy.stats.ttest_ind(short, -long, equal_var=False).confidence_interval()
    few = Bootstrap(9999).interval(np.hstack([short, long]), np.ones(36), np.arange(36), np.repeat([0, 1], [6, 30]))
    assert few == pytest.approx((welch.low / 2, welch.high / 2), abs=0.03 * (welch.high - welch.low) / 2)
    alone = strata.copy()
    alone[:] = 0
    alone[7] = 1  # one clip in its language: nothing to draw
    assert np.isnan(Bootstrap(50).interval(errors, words, np.arange(120), alone)).all()


def test_speakers_of_each_language_are_resampled_where_two_are_known() -> None:
    references = ["the cat"] * 6
    languages = ["en"] * 3 + ["de"] * 3
    for speakers, blocks, number in (
        (["a", "b", "c", "d", "e", "d"], "speaker", 5),
        (["a", "a", "a", "d", "e", "d"], "clip", 5),  # one voice in English: its clips
        (["a", "a", "a", "d", "d", "d"], "clip", 6),
        (["a", "b", "a", "a", "b", "b"], "speaker", 2),  # bilingual
    ):
        rates = MetricsCalculator().compute(references, references, speakers, languages=languages)
        assert (rates.blocks, rates.num_blocks) == (blocks, number)


def test_words_invented_on_silence_count_whatever_language_it_is_taken_for() -> None:
    references, hypotheses = ["मेरा नाम", "", ""], ["मेरा नाम", "thanks for watching", ""]
    rates = MetricsCalculator().compute(references, hypotheses, languages=["hi", "nn", None])
    assert (rates.metric, rates.rate, rates.hallucinated_words) == ("WER", 1.5, 3)
    assert list(rates.rates_by_language) == ["hi"]


def test_what_cannot_be_measured_is_an_error() -> None:
    for references, hypotheses, groups, reason in (
        ([], [], None, "no rows"),
        (["a"], ["a", "b"], None, "1 references but 2 hypotheses"),
        (["", "..."], ["x", "y"], None, "none of the 2 references"),
        (["a", "b"], ["a", "b"], ["s"], "2 rows but 1 groups"),
    ):
        with pytest.raises(DataError, match=reason):
            MetricsCalculator("en").compute(references, hypotheses, groups)
    with pytest.raises(DataError, match="other references"):
        metrics.compare_counts([EditCounts(0, 0, 0, 3)], [EditCounts(0, 0, 0, 4)])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (PLAIN, "Well-known.", "well known"),
        (PLAIN, "BOB'S dog, isn't it?", "bob's dog isn't it"),
        (PLAIN, "the ‘quoted’ word’s", "the quoted word's"),
        (PLAIN, "  spaces\n\tand  tabs ", "spaces and tabs"),
        (PLAIN, "ÉTÉ, naïve — 5 €", "été naïve 5"),
        (PLAIN, "你好，世界", "你好 世界"),
        (PLAIN, "don´t ｄｏ＇ｓ ok` ´a", "don't do's ok a"),
        (PLAIN, "a\u00adb \ufeffc\u200f d\u200d e\u200c", "ab c d\u200d e"),
        (PLAIN, "می‌خواهم رسم‌", "می‌خواهم رسم"),
        (PLAIN, "Straße STRAẞE strasse", "straße straße strasse"),
        (PLAIN, "❤️ 👩‍💻 5℃", "5 c"),
        (PLAIN, "O‘zbek oʻzbek o'zbek ʻōlelo", "o'zbek o'zbek o'zbek ʻōlelo"),
        (PLAIN, "ג׳ירפה ג'ירפה צה״ל", "ג'ירפה ג'ירפה צה ל"),  # a geresh is typed as an apostrophe
        (PLAIN, "५ ٣٫۵ ５ 五 Ⅴ", "5 3 5 5 五 v"),  # digits are spoken alike; numerals that are words stay
        (metrics.PLAIN_UNSPACED, "๒๕๖๗ 2567", "25672567"),
        (metrics.PLAIN_TURKIC, "IĞDIR İl", "ığdır il"),
        (metrics.PLAIN_UNSPACED, "今日は、 OK です！", "今日はokです"),
        (metrics.PLAIN_UNSPACED, "น้ำ ทำ. ນ້ຳ", "น้ำทำນ້ຳ"),
        (metrics.PLAIN_CHINESE, "頭髮 乾燥", "头发干燥"),
        (metrics.WHISPER_UNSPACED, "ที่ นี่", "ทน"),
        ("plain-v1", "Old, runs", "old runs"),
        (PLAIN, "...", ""),
        (WHISPER_ENGLISH, "The colour of Mr. Smith's centre", "the color of mister smith is center"),
        (WHISPER_ENGLISH, "BOB'S one five nine", "bob is 159"),  # its published quirks
        (WHISPER_ENGLISH, "uh [noise] well-known", "well known"),
        (WHISPER_ENGLISH, "hello...", "hello ."),
        (WHISPER_BASIC, "Grüße, Welt!", "grüße welt"),
    ],
)
def test_texts_as_each_normaliser_reads_them(name: str, text: str, expected: str) -> None:
    assert metrics.get_normalizer(name)(text) == expected


def test_language_chooses_whispers_normaliser() -> None:
    assert metrics.headline_normalizer("en") == WHISPER_ENGLISH
    assert metrics.headline_normalizer("de") == metrics.headline_normalizer(None) == PLAIN
    with pytest.raises(ConfigError, match="'plain-v2'"):
        metrics.get_normalizer("plain")


@given(text=st.text(max_size=20))
@pytest.mark.parametrize("name", metrics.NORMALIZERS)
def test_any_text_becomes_words_between_single_spaces(name: str, text: str) -> None:
    normalized = metrics.get_normalizer(name)(text)
    assert normalized == " ".join(normalized.split())
    if name.startswith("plain"):
        assert metrics.get_normalizer(name)(normalized) == normalized


WORD = st.text(st.characters(categories=["L", "M", "N"]), min_size=1, max_size=8)
OTHERS = regex.compile(r"\p{Default_Ignorable_Code_Point}|[\u055B\u055C\u055EʼʻՙͺΣ\s]|[\p{Nd}--[0-9]]", regex.VERSION1)


@given(WORD)
@example("लड़की")
@example("كِتَابٌ")
@example("ที่นี่")
@example("ทำ")
@example("ക്ഷേത്രം")
@example("İstanbul")
def test_a_word_changes_by_its_case_only(word: str) -> None:
    plain = lower(unicodedata.normalize("NFKC", word))
    plain = plain.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3")  # the vowel am is one character
    if OTHERS.search(word + plain) is None and all(unicodedata.category(c)[0] in "LMN" for c in plain):
        assert metrics.get_normalizer(PLAIN)(word) == plain
        assert metrics.get_normalizer(metrics.PLAIN_UNSPACED)(word) == plain


def test_an_alignment_of_characters_joins_to_the_normalised_texts() -> None:
    steps = metrics.align_words("今天 很好。", "今天气好", metrics.PLAIN_CHINESE)
    assert [(step.edit[0], step.reference, step.hypothesis) for step in steps] == [
        ("e", "今", "今"), ("e", "天", "天"), ("s", "很", "气"), ("e", "好", "好"),
    ]  # fmt: skip


def test_an_alignment_done_by_hand() -> None:
    steps = metrics.align_words("The cat sat on the big mat.", "a cat sat the big mat now", PLAIN)
    assert [(step.edit[0], step.reference, step.hypothesis) for step in steps] == [
        ("s", "the", "a"), ("e", "cat", "cat"), ("e", "sat", "sat"), ("d", "on", None), ("e", "the", "the"),
        ("e", "big", "big"), ("e", "mat", "mat"), ("i", None, "now"),
    ]  # fmt: skip


@given(FEW_WORDS, FEW_WORDS)
def test_an_alignment_has_the_counts_of_its_row_and_both_texts(reference: str, hypothesis: str) -> None:
    steps = metrics.align_words(reference, hypothesis, PLAIN)
    (counts,) = metrics.word_counts([reference], [hypothesis], PLAIN)
    edits = [step.edit for step in steps]
    found = (counts.substitutions, counts.deletions, counts.insertions, counts.hits)
    assert tuple(edits.count(edit) for edit in ("substitute", "delete", "insert", "equal")) == found
    assert " ".join(step.reference for step in steps if step.reference is not None) == reference
    assert " ".join(step.hypothesis for step in steps if step.hypothesis is not None) == hypothesis
    assert counts.hypothesis_words == len(hypothesis.split())
