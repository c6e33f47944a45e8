"""Captions: every word once, nothing overlaps, lines fit; a live file says what the whole text would."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.faults import files_up_to
from src.inference import captions
from src.inference.captions import CaptionOptions, Cue, LiveCaptionWriter, make_cues, to_json, to_srt, to_vtt
from src.inference.streaming.commit import Event
from src.inference.words import Word, join_words
from src.utils.errors import ConfigError, DataError, WriteError
from src.utils.languages import graphemes, is_unspaced_character

# Words of the bundled clip and their ends, as stock tiny.en gives them: no gap anywhere, pauses are inside words.
JFK = (
    "And 0.76, so 1.06, my 1.46, fellow 1.76, Americans 2.26, ask 3.88, not 4.58, what 5.68, your 6.02, country 6.36, "
    "can 6.76, do 7.02, for 7.26, you, 8.30, ask 8.66, what 8.94, you 9.28, can 9.50, do 9.72, for 9.92, your 10.22, "
    "country. 10.74"
)
CHINESE = "我们今天来讨论一个非常重要的问题，就是怎样让语音识别系统在没有网络的情况下也能工作。但是答案并不简单！"
TIME = r"(\d\d):(\d\d):(\d\d)[,.](\d\d\d)"
BLOCK = re.compile(rf"(?:(\d+)\n)?{TIME} --> {TIME}\n((?:.+\n)+)\n")


def words_of(rows: Iterable[tuple[str, int, int]]) -> list[Word]:
    """Words from their texts, and the ms before each and of each."""
    words, at_ms = [], 0
    for text, gap_ms, long_ms in rows:
        words.append(Word(text, (at_ms + gap_ms) / 1000, (at_ms + gap_ms + long_ms) / 1000, 0.5))
        at_ms += gap_ms + long_ms
    return words


letters = st.text("abcdefghij,.!世界。ーab", min_size=1, max_size=12)
gaps_ms, lengths_ms = st.sampled_from([0] * 12 + [300, 900]), st.one_of(st.integers(0, 400), st.just(3000))
word_lists = st.lists(st.tuples(st.one_of(letters, st.just("x" * 50)), gaps_ms, lengths_ms), max_size=40).map(words_of)


def said(text: str, *, word_sec: float = 0.3) -> list[Word]:
    return [Word(word, i * word_sec, (i + 1) * word_sec, 0.9) for i, word in enumerate(text.split())]


def shown(words: Sequence[Word], **options: Any) -> list[str]:
    return [" / ".join(cue.lines) for cue in make_cues(words, CaptionOptions(**options))]


def times(words: Sequence[Word], **options: Any) -> list[tuple[float, float]]:
    return [(cue.start_sec, cue.end_sec) for cue in make_cues(words, CaptionOptions(**options))]


def parsed(text: str) -> list[tuple[float, float, tuple[str, ...]]]:
    """Read SRT or WebVTT that a strict parser accepts: numbers in order, and nothing but cues."""
    body = text.removeprefix("WEBVTT\n\n")
    blocks = list(BLOCK.finditer(body))
    assert "".join(block[0] for block in blocks) == body
    if body is text:
        assert [block[1] for block in blocks] == [str(number) for number in range(1, len(blocks) + 1)]
    cues = []
    for block in blocks:
        h1, m1, s1, ms1, h2, m2, s2, ms2 = map(int, block.groups()[1:9])
        start, end = (h1 * 3600 + m1 * 60 + s1 + ms1 / 1000, h2 * 3600 + m2 * 60 + s2 + ms2 / 1000)
        cues.append((round(start, 3), round(end, 3), tuple(block[10].splitlines())))
    return cues


def event(kind: str, words: Sequence[Word], audio_sec: float = 0.0) -> Event:
    return Event(kind, tuple(words), join_words(words), audio_sec, 0.0, 0)  # type: ignore[arg-type]


@given(words=word_lists)
@example(words=[Word("x" * 30, 1.0, 1.0, 0.5)] * 5)
def test_any_words_appear_once_in_order_in_lines_that_fit_and_cues_that_do_not_overlap(words: list[Word]) -> None:
    options = CaptionOptions(max_line_chars=20)
    cues = make_cues(words, options)
    assert "".join("".join(cue.lines) for cue in cues).replace(" ", "") == "".join(word.text for word in words)
    assert "".join(word.text for cue in cues for word in cue.words) == "".join(word.text for word in words)
    for cue in cues:
        assert cue.end_sec > cue.start_sec
        assert 1 <= len(cue.lines) <= options.max_lines
        assert all(len(line) + len(re.findall("[世界。ー]", line)) <= 20 or " " not in line for line in cue.lines)
    assert all(second.start_sec >= first.end_sec for first, second in itertools.pairwise(cues))
    assert parsed(to_srt(cues)) == parsed(to_vtt(cues)) == [(cue.start_sec, cue.end_sec, cue.lines) for cue in cues]
    whole = json.loads(to_json(cues))
    spelt = "".join(word["word"] for segment in whole["segments"] for word in segment["words"])
    assert whole["text"] == "".join(segment["text"] for segment in whole["segments"]) == spelt


@given(words=word_lists, sizes=st.lists(st.integers(1, 9), min_size=1))
def test_a_live_file_is_valid_at_any_time_and_ends_as_that_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, words: list[Word], sizes: list[int]
) -> None:
    path, whole, rest = tmp_path_factory.mktemp("live") / "live.srt", to_srt(make_cues(words)), iter(words)
    with LiveCaptionWriter(path) as writer:
        for size in itertools.cycle(sizes):
            if not (chunk := list(itertools.islice(rest, size))):
                break
            writer.write(event("partial", said("never written")))
            writer.write(event("commit", chunk))
            assert whole.startswith(path.read_text())
            parsed(path.read_text())
    assert path.read_text() == whole


def test_on_a_full_disk_a_live_file_keeps_whole_cues_and_gets_the_others_later(tmp_path: Path) -> None:
    words, path = said("one two three. " * 40), tmp_path / "live.srt"
    whole = to_srt(make_cues(words))
    writer = LiveCaptionWriter(path)
    for at in range(0, len(words), 10):
        with contextlib.suppress(WriteError), files_up_to(len(whole) // 2):
            writer.write(event("commit", words[at : at + 10]))
        assert whole.startswith(path.read_text())
        parsed(path.read_text())
    with pytest.raises(WriteError, match=str(path)), files_up_to(0):
        writer.write(event("commit", ()))
    writer.close()
    assert path.read_text() == whole


def test_a_live_file_is_laid_out_as_its_language_is(tmp_path: Path) -> None:
    words = [
        replace(word, space=False) for word in said(" ".join("天気予報によると明日の朝北部では大雨が降るそうです"))
    ]
    for language, options in (("ja", None), (None, None), ("ja", CaptionOptions.of("zh"))):
        with LiveCaptionWriter(tmp_path / "live.srt", options) as writer:
            writer.write(replace(event("commit", words), language=language))
        assert (tmp_path / "live.srt").read_text() == to_srt(make_cues(words, options or CaptionOptions.of(language)))


def test_cues_end_with_sentences_then_at_commas_and_lines_not_after_short_words() -> None:
    ends_sec = [(text, float(sec)) for text, sec in re.findall(r"(\S+) ([\d.]+)", JFK)]
    starts_sec = [0.0, *(sec for _, sec in ends_sec)]
    speech = [Word(text, start, end, 0.9) for (text, end), start in zip(ends_sec, starts_sec, strict=False)]
    assert parsed(to_srt(make_cues(speech))) == [
        (0.0, 2.88, ("And so my fellow Americans",)),
        (2.88, 8.3, ("ask not what your country can do for you,",)),
        (8.3, 10.74, ("ask what you can do for your country.",)),
    ]
    text = (
        "The committee met in the morning and agreed on a plan. It was cold. Nobody wanted to leave the building, "
        "although the heating had failed two hours before, and the caretaker went looking for a man who could mend it."
    )
    assert shown(said(text, word_sec=0.25)) == [
        "The committee met in the morning / and agreed on a plan.",
        "It was cold. / Nobody wanted to leave the building,",
        "although the heating / had failed two hours before,",
        "and the caretaker went looking / for a man who could mend it.",
    ]
    title = "Yesterday at the station we met Mr. Quilter again"
    assert shown(said(title, word_sec=0.25)) == ["Yesterday at the station / we met Mr. Quilter again"]
    few_lines = "ab abc, ab ab ab ab ab abc, abcdefg"
    assert shown(said(few_lines), max_line_chars=20) == ["ab abc, ab ab ab / ab ab abc, abcdefg"]


def test_no_cue_flashes_by_and_none_waits_for_more_than_two() -> None:
    rest = "Nobody wanted to leave the building while the heating that had failed was being mended"
    options = CaptionOptions(max_line_chars=44, max_cue_sec=7.0)
    assert min(len(cue.words) for cue in make_cues(said(f"No. {rest}"), options)) > 3
    builder, written = captions.CueBuilder(), 0
    for spoken, word in enumerate(said("and then we said that " * 60)):
        written += sum(len(cue.words) for cue in builder.add([word]))
        assert (spoken - written) * 0.3 <= 2 * CaptionOptions().max_cue_sec


def test_a_cue_stays_until_it_can_be_read_but_not_over_the_next_and_a_pause_is_not_part_of_a_word() -> None:
    yes, no, long = Word("Yes.", 1.0, 1.2), Word("No.", 5.0, 5.2), Word("x" * 40, 0.0, 0.5)
    assert times([yes, no]) == [(1.0, 2.0), (5.0, 6.0)]
    assert times([yes, Word("No.", 1.7, 1.9)], max_gap_sec=0.4) == [(1.0, 1.7), (1.7, 2.7)]
    assert times([long]) == [(0.0, 40 / CaptionOptions().max_chars_per_sec)]
    assert times([long], max_chars_per_sec=5.0) == [(0.0, CaptionOptions().max_cue_sec)]
    pauses = [Word("Stop.", 0.0, 4.0), Word("go", 4.0, 4.3), Word("on", 4.3, 9.0)]  # after a mark, else before the word
    assert times(pauses) == [(0.0, 1.0), (4.0, 5.0), (8.0, 9.0)]


def test_scripts_without_spaces_are_cut_by_character_and_others_keep_their_words_and_spaces() -> None:
    whole = make_cues([Word(CHINESE, 0.0, 12.0, 0.5)])
    assert ["".join(cue.lines) for cue in whole] == re.findall(".+?[，。！]", CHINESE)
    assert whole[1].start_sec == pytest.approx(12.0 * CHINESE.index("就") / len(CHINESE), abs=0.001)
    one_by_one = [word for cue in whole for word in cue.words]
    assert [word.text for word in one_by_one[-2:]] == ["简", "单！"]
    assert make_cues(one_by_one) == whole
    (cue,) = make_cues([Word("「ちょっと,待ってー」とiPhoneで言った。", 0.0, 3.0, 0.5)])
    assert [word.text for word in cue.words] == ["「ちょっ", "と,", "待っ", "てー」", "とiPhoneで", "言っ", "た。"]
    mixed = "我用 iPhone 手机 你好, 世界 네 그래요 สวัสดี ครับ"
    assert shown(said(mixed)) == ["我用 iPhone 手机你好, / 世界 네 그래요 สวัสดี ครับ"]


def heard(text: str, *, word_sec: float = 0.2) -> list[Word]:
    """Words as an engine gives them: graphemes in scripts without spaces, and where a space is."""
    pieces, words = re.findall(r"\s*\S+", text), []
    for piece in pieces:
        space = piece[0] == " "
        chunk = piece.strip()
        for part in graphemes(chunk) if is_unspaced_character(chunk[0]) else [chunk]:
            words.append(Word(part, len(words) * word_sec, (len(words) + 1) * word_sec, 0.5, space=space))
            space = False
    return words


SPOKEN = {
    "th": "วันนี้อากาศดีมาก เราไปเที่ยวสวนสาธารณะกันเถอะ แล้วก็กินข้าวเย็นที่ร้านอาหารใกล้ ๆ บ้านของเพื่อน เก้าอี้ตัวนี้กำลังจะพัง",
    "zh": "今天天气很好 我们去公园吧，然后在 iPhone 商店买东西。你说好不好？对 对 对",
    "ja": "今日はとても良い天気ですね。公園に行きましょう、そして、チョコレートケーキを食べたいと思っているんです。",
    "hi": "भारत सरकार ने कहा है कि इस साल किसानों को फसल के नुकसान का पूरा मुआवजा दिया जाएगा। इसके लिए नई योजना शुरू की जाएगी।",
    "ar": "ذهبتُ إلى المدرسةِ صباحَ اليومِ، وكانَ الطقسُ جميلاً جدّاً. ثم عدتُ إلى البيتِ؟",
    "ko": "오늘은 날씨가 아주 좋습니다. 공원에 가서 산책을 하고, 맛있는 점심을 먹읍시다.",
    "my": "မြန်မာနိုင်ငံသည် အရှေ့တောင်အာရှတွင် တည်ရှိသည်။ ရန်ကုန်မြို့သည် အကြီးဆုံးမြို့ဖြစ်သည်။",
    "km": "ប្រទេសកម្ពុជាជាប្រទេសមួយនៅអាស៊ីអាគ្នេយ៍។ រាជធានីគឺភ្នំពេញដែលជាទីក្រុងធំជាងគេ។",
    "lo": "ປະເທດລາວຕັ້ງຢູ່ໃນອາຊີຕາເວັນອອກສຽງໃຕ້ ນະຄອນຫຼວງແມ່ນວຽງຈັນ ເປັນເມືອງທີ່ໃຫຍ່ທີ່ສຸດ",
    "bo": "བོད་ནི་ཨེ་ཤེ་ཡའི་ནང་གི་ས་ཁུལ་ཞིག་ཡིན། ལྷ་ས་ནི་རྒྱལ་ས་ཡིན། མི་མང་པོ་ཞིག་འདིར་སྡོད་ཀྱི་ཡོད་པ་རེད།",
}


@pytest.mark.parametrize("language", SPOKEN)
@pytest.mark.parametrize("columns", [42, 12])
def test_in_every_script_the_text_stays_exact_and_no_line_begins_inside_a_character(
    language: str, columns: int
) -> None:
    text, options = SPOKEN[language], CaptionOptions(max_line_chars=columns)
    for words in (heard(text), [Word(text, 0.0, 12.0, 0.5)]):
        cues = make_cues(words, options)
        lines = [line for cue in cues for line in cue.lines]
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert not [line for line in lines if unicodedata.category(line[0])[0] == "M" or line[0] in "ๆำา。、，っー"]
        assert not [line for line in lines if line[-1] in "เแโใไ\u17d2\u1039"]
        whole = json.loads(to_json(cues, language=language))
        spelt = "".join(word["word"] for segment in whole["segments"] for word in segment["words"])
        assert whole["text"] == text == spelt == "".join(segment["text"] for segment in whole["segments"])
        rows = [row.split("\t")[2] for row in captions.to_tsv(cues).splitlines()[1:]]
        assert rows == [segment["text"].strip() for segment in whole["segments"]]


def test_lines_end_at_phrases_of_scripts_without_spaces_and_have_the_width_of_the_language() -> None:
    def lines(language: str) -> list[str]:
        options = CaptionOptions.of(language)
        return [line for cue in make_cues(heard(SPOKEN[language]), options) for line in cue.lines]

    assert lines("th")[:3] == ["วันนี้อากาศดีมาก", "เราไปเที่ยวสวนสาธารณะกันเถอะ", "แล้วก็กินข้าวเย็นที่ร้านอาหารใกล้ ๆ"]
    assert lines("ja")[:2] == ["今日はとても", "良い天気ですね。"]  # 13 characters at most
    assert lines("zh")[:2] == ["今天天气很好 我们去公园吧，", "然后在 iPhone 商店买东西。"]
    assert lines("ko")[:2] == ["오늘은 날씨가 아주 좋습니다.", "공원에 가서 산책을 하고,"]
    texts = ("ที่", "กำ", "한국", "\u1112\u1161\u11ab", "日本", "ﾊﾝ")
    assert list(map(captions.columns_of, texts)) == [1, 2, 4, 2, 4, 2]
    words = ("បងប្រុស", "របស់", "ខ្ញុំ", "បាន", "ទិញ", "ផ្លែប៉ោម", "បី", "គីឡូក្រាម", "នៅ", "ផ្សារ", "កាលពី", "ម្សិលមិញ។")
    for narrow in range(12, 30):
        found = make_cues(heard("\u200b".join(words)), CaptionOptions(max_line_chars=narrow))
        assert [w for cue in found for line in cue.lines for w in line.split("\u200b") if w] == list(words)
    assert CaptionOptions.of(None) == CaptionOptions.of("en") == CaptionOptions()


def test_segments_open_cues_and_share_their_time_by_characters() -> None:
    sentence = "Ask not what your country can do for you."
    long, short = (f"{sentence} " * 4, 0.0, 8.0), ("Yes.", 8.0, 9.0)
    segments: list[Any] = [SimpleNamespace(text=t, start_sec=a, end_sec=b) for t, a, b in (long, short)]
    assert captions.cues_of_segments(segments) == (
        Cue(0.0, 4.0, (sentence, sentence)), Cue(4.0, 8.0, (sentence, sentence)), Cue(8.0, 9.0, ("Yes.",)),
    )  # fmt: skip


def test_text_cannot_break_the_formats() -> None:
    cue = Cue(3661.5, 3662.0, ("a\t--->  b\r\n", " ", "x\n\n<i> & 1"))
    assert to_srt([cue]) == "1\n01:01:01,500 --> 01:01:02,000\na -> b\nx <i> & 1\n\n"
    assert to_vtt([cue]) == ("WEBVTT\n\n01:01:01.500 --> 01:01:02.000\na ---&gt; b\nx &lt;i&gt; &amp; 1\n\n")
    assert captions.to_tsv([cue]) == "start\tend\ttext\n3661500\t3662000\ta ---> b x <i> & 1\n"
    assert (to_srt(()), to_vtt(())) == ("", "WEBVTT\n\n")
    assert "words" not in json.loads(to_json([cue]))["segments"][0]


@pytest.mark.parametrize("suffix", [".srt", ".vtt", ".tsv", ".json"])
def test_no_control_character_or_lone_surrogate_reaches_a_file(tmp_path: Path, suffix: str) -> None:
    text = "a\x1b[2J\x00 \ud83d b\u2028c\u2029d\x85e\x1cf\tg\rh"
    segment = SimpleNamespace(text=text, start_sec=0.0, end_sec=3.0)
    for cues in (captions.cues_of_segments([segment]), [Cue(0.0, 1.0, (text,))], [Cue(0.0, 1.0, (text,), text=text)]):
        written = captions.write_captions(tmp_path / f"a{suffix}", cues).read_text()
        assert "a[2J b c d e f g h" in written.replace("\n", " ")
        assert not {c for c in written if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")} - {"\n", "\t"}
    if suffix in (".srt", ".vtt"):
        with LiveCaptionWriter(tmp_path / f"live{suffix}") as writer:
            writer.write(Event("commit", (Word(text, 0.0, 1.0),), text, 1.0, 1.0, 0))
        assert "\x1b" not in (tmp_path / f"live{suffix}").read_text()


def test_json_has_whispers_shape_and_no_number_for_an_unknown_probability() -> None:
    cues = make_cues([Word("Hello", 0.0, 0.5, 0.25), Word("there.", 0.5, 1.2)])
    words = [
        {"word": "Hello", "start": 0.0, "end": 0.5, "probability": 0.25},
        {"word": " there.", "start": 0.5, "end": 1.2, "probability": None},
    ]
    segment = {"id": 0, "start": 0.0, "end": 1.2, "text": "Hello there.", "words": words}
    assert json.loads(to_json(cues, language="en")) == {"text": "Hello there.", "language": "en", "segments": [segment]}


def test_the_suffix_chooses_the_format_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    for name, begins in (("a.srt", "1\n"), ("a.VTT", "WEBVTT\n"), ("a.tsv", "start\t"), ("a.json", "{")):
        path = captions.write_captions(tmp_path / "new" / name, make_cues(said("Hello there.")))
        assert path.read_bytes().decode("utf-8").startswith(begins)
    with pytest.raises(DataError, match=r"a\.str.*\.srt"):
        captions.write_captions(tmp_path / "a.str", ())
    with pytest.raises(DataError, match=r"a\.json"):
        LiveCaptionWriter(tmp_path / "a.json")


def test_a_final_writes_everything_and_the_next_cue_begins_no_earlier(tmp_path: Path) -> None:
    path, yes = tmp_path / "live.vtt", [Word("Yes.", 1.0, 1.2, 0.9)]
    with pytest.raises(RuntimeError), LiveCaptionWriter(path) as writer:
        writer.write(event("commit", yes))
        assert path.read_text() == "WEBVTT\n\n"
        writer.write(event("final", yes, audio_sec=1.7))
        assert parsed(path.read_text()) == [(1.0, 1.7, ("Yes.",))]
        writer.write(event("commit", [Word("No.", 1.5, 2.0, 0.9)]))
        raise RuntimeError  # what was committed is written when the session fails
    assert parsed(path.read_text()) == [(1.0, 1.7, ("Yes.",)), (1.7, 2.7, ("No.",))]
    writer.close()
    with pytest.raises(DataError, match=r"live\.vtt"):
        writer.write(event("commit", said("more")))


def test_times_out_of_order_and_impossible_options_are_refused() -> None:
    for words in ([Word("a", 2.0, 2.5), Word("b", 1.0, 1.5)], [Word("b", float("nan"), 1.0)]):
        with pytest.raises(DataError, match="'b'"):
            make_cues(words)
    with pytest.raises(ConfigError, match=r"max_lines is 0.*min_cue_sec 7\.0"):
        CaptionOptions(max_lines=0, min_cue_sec=7.0)
