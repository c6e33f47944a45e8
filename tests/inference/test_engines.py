"""The two engines on the same weights, audio and options; and when a text is decoded again, with a scripted engine."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.inference.ct2_engine import CTranslate2Engine, find_device
from src.inference.engine_base import DecodingResult, Engine, batch_samples, padding_groups, transcribe
from src.inference.engines import _engine_of_gpu, decode_with_fallback, load_engine
from src.inference.options import DecodingOptions
from src.inference.torch_engine import TorchEngine
from src.inference.words import Vocabulary, join_words
from src.models.dynamic_context import DynamicWhisper
from src.models.export.ctranslate2 import export_ctranslate2
from src.utils.config import Config, InferenceConfig, load_config
from src.utils.errors import ConfigError, DeviceError, ModelError

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(sample: list[Any], jfk: Waveform) -> list[Waveform]:
    return [jfk, *(load_audio(u.audio) for u in sample[400:500:33])]


@pytest.fixture(scope="module")
def folder(_tiny_en: Any, tmp_path_factory: pytest.TempPathFactory, jfk: Waveform) -> Path:
    model, processor = _tiny_en
    target = tmp_path_factory.mktemp("engines") / "float32"
    return export_ctranslate2(model, target, processor=processor, quantization="float32", verify_clips=[jfk])


@pytest.fixture(scope="module")
def engines(_tiny_en: Any, folder: Path) -> tuple[Engine, Engine]:
    return TorchEngine(copy.deepcopy(_tiny_en[0]), _tiny_en[1]), CTranslate2Engine(folder)


@slow
@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(word_timestamps=True, no_speech=True),
        DecodingOptions(timestamps=True),
        DecodingOptions(num_beams=3, word_timestamps=True),
        DecodingOptions(prompt="He said.", hotwords=("Americans",), prefix="And so"),
        DecodingOptions(prefix="And so", prefix_tokens=(1052, 67, 523)),  # " An", "d", " so"
        DecodingOptions(max_tokens_per_sec=1.0),
    ],
    ids=["words", "timestamps", "beams", "context", "tokens", "cap"],
)
def test_both_engines_give_the_same_text_times_and_probabilities(
    engines: tuple[Engine, Engine], clips: Sequence[Waveform], options: DecodingOptions
) -> None:
    apart_sec = []
    for expected, found in zip(*(transcribe(engine, clips, options) for engine in engines), strict=True):
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        assert found.tokens[: len(options.prefix_tokens)] == options.prefix_tokens
        if options.num_beams == 1 and options.max_tokens_per_sec is None:  # the engines divide by different lengths
            assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
        if options.no_speech:
            assert found.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-3)
        for ours, theirs in zip(found.words or (), expected.words or (), strict=True):
            assert ours.text == theirs.text
            assert ours.probability == pytest.approx(theirs.probability, abs=0.01)
            apart_sec.append(abs(ours.end_sec - theirs.end_sec))
    if options.word_timestamps:  # where two paths through the attention cost the same, each takes its own
        assert len(apart_sec) > 40
        assert np.quantile(apart_sec, 0.8) <= 0.021
        assert max(apart_sec) < 0.3
    if options.max_tokens_per_sec == 1:
        assert len(found.tokens) <= 8 + math.ceil(len(clips[-1]) / SAMPLE_RATE)


@slow
def test_both_place_a_known_text_in_any_mode(engines: tuple[Engine, Engine], tiny_en: Any, jfk: Waveform) -> None:
    training = TorchEngine(tiny_en[0].train(), tiny_en[1])
    for engine in (*engines, training):
        tokens = engine.vocabulary.encode("And so my fellow Americans")
        (words,) = engine.align(engine.encode([jfk], 0.5), [jfk], [tokens], DecodingOptions())
        assert [word.text for word in words] == ["And", "so", "my", "fellow", "Americans"]
        assert words[3].end_sec == pytest.approx(1.76, abs=0.1)
        assert engine.first_token(jfk, DecodingOptions()) == tokens[0]
    assert all(module.training for module in tiny_en[0].modules())


@slow
def test_own_length_reaches_both_encoders(_tiny_en: Any, tmp_path: Path, jfk: Waveform) -> None:
    model, processor = copy.deepcopy(_tiny_en[0]), _tiny_en[1]
    model.audio_context = "dynamic"
    export = {"processor": processor, "quantization": "float32", "verify_clips": [jfk]}
    ct2 = CTranslate2Engine(export_ctranslate2(model, tmp_path / "own", **export))
    encoded = np.array(ct2.encode([jfk], 0.5))
    expected = TorchEngine(model, processor).encode([jfk], 0.5).last_hidden_state.numpy()
    assert encoded.shape == expected.shape == (1, 575, 384)
    np.testing.assert_allclose(encoded, expected, atol=2e-3)


@slow
def test_multilingual_clips_are_detected_and_aligned_row_by_row(base: Any, tmp_path: Path, jfk: Waveform) -> None:
    folder = export_ctranslate2(base[0], tmp_path / "base", processor=base[1], quantization="int8", verify_clips=[jfk])
    assert len(json.loads((folder / "config.json").read_text())["lang_ids"]) == 99
    silence = np.zeros(32_000, dtype=np.float32)  # of any language
    speech, _ = transcribe(CTranslate2Engine(folder), [jfk, silence], DecodingOptions(word_timestamps=True))
    assert speech.language == "en"
    assert (speech.words or ())[-1].text.strip(".") == "country"
    options = DecodingOptions(word_timestamps=True)
    for engine in (CTranslate2Engine(folder), TorchEngine(*base)):
        encoded = engine.encode([jfk, jfk], 0.5)
        (code, probability), _ = engine.detect(encoded)
        assert code == "en"
        assert 0.8 < probability < 1
        english, german = engine.decode(encoded, [jfk, jfk], options, languages=["en", "de"])
        assert (english.language, german.language) == ("en", "de")
        assert english.text != german.text
        (alone,) = transcribe(engine, [jfk], replace(options, language="en"))
        assert english.text == alone.text
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"language": "klingon"}))
    with pytest.raises(ModelError, match=r"base/config\.json: .*klingon"):
        CTranslate2Engine(folder)
        times, expected = ([word.end_sec for word in result.words or ()] for result in (english, alone))
        assert times == pytest.approx(expected, abs=0.05)


GEORGIAN = (
    "ამინდის პროგნოზის მიხედვით ხვალ დილით ქვეყნის ჩრდილოეთით ძლიერი წვიმა იქნება. "
    "ჩემმა ძმამ გუშინ ბაზარში სამი კილო ვაშლი და ერთი ბოთლი რძე იყიდა. "
    "მატარებელი დილის რვა საათზე გადის."
)


@pytest.fixture(scope="module")
def reciters(base: Any, tmp_path_factory: pytest.TempPathFactory, jfk: Waveform) -> tuple[Engine, Engine]:
    """A model that says GEORGIAN whatever it hears: each position asks for the next token of it, and nothing else."""
    processor, torch_of = base[1], torch.Generator().manual_seed(0)
    tokens = Vocabulary.of(processor.tokenizer).encode(GEORGIAN, language="ka")
    assert 400 < len(tokens) < 444
    small = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 64)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    config = WhisperConfig(vocab_size=51_865, encoder_layers=1, decoder_layers=1, **small, **heads)
    model = DynamicWhisper(config).eval()
    for name, weight in model.named_parameters():
        if "decoder.layers" in name:
            weight.data.zero_()
    directions = torch.nn.functional.normalize(torch.randn(51_865, 64, generator=torch_of), dim=1)
    model.model.decoder.embed_tokens.weight.data = directions
    ending = [50257] * (448 - 3 - len(tokens))
    model.model.decoder.embed_positions.weight.data = 10 * directions[[50258] * 3 + tokens + ending]
    model.generation_config = copy.deepcopy(base[0].generation_config)
    model.generation_config.alignment_heads = [[0, 0]]
    folder = tmp_path_factory.mktemp("reciter") / "ct2"
    export_ctranslate2(model, folder, processor=processor, quantization="float32", verify_clips=[jfk])
    return TorchEngine(model, processor), CTranslate2Engine(folder)


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(word_timestamps=True),
        DecodingOptions(num_beams=3),
        DecodingOptions(temperature=0.01),
        DecodingOptions(prefix=GEORGIAN.partition(".")[0] + "."),
    ],
    ids=["greedy", "beams", "temperature", "prefix"],
)
def test_a_long_text_is_whole_in_both_engines_and_ends_at_the_cap_of_its_clip(
    reciters: tuple[Engine, Engine], options: DecodingOptions
) -> None:
    clips = [np.zeros(round(16_000 * sec), dtype=np.float32) for sec in (15.0, 2.0)]
    options = replace(options, language="ka")
    for engine in reciters:
        long, short = transcribe(engine, clips, options)
        assert (long.text, long.truncated) == (GEORGIAN, False)
        assert GEORGIAN.startswith(short.text)
        assert short.truncated
        assert len(short.tokens) - len(engine.vocabulary.encode(options.prefix)) == 8 + 195
        assert long.avg_logprob == pytest.approx(short.avg_logprob, abs=0.5)
        if options.word_timestamps:
            assert join_words(long.words or ()) == GEORGIAN
    ours, theirs = (transcribe(engine, clips[:1], options)[0].avg_logprob for engine in reciters)
    if options.num_beams == 1:
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_words_of_a_text_that_fills_the_decoder_are_placed(reciters: tuple[Engine, Engine]) -> None:
    clip, options = np.zeros(16_000, dtype=np.float32), DecodingOptions(language="ka")
    for engine in reciters:
        tokens = engine.vocabulary.encode("one " * 444)
        (words,) = engine.align(engine.encode([clip], 0.5), [clip], [tokens[:444]], options)
        assert (len(words), sum(word.tokens for word in words)) == (444, 444)
        assert words[-1].end_sec <= 1.0


def test_the_text_before_gives_way_to_the_text_that_is_expected(reciters: tuple[Engine, Engine]) -> None:
    clip, prompt = np.zeros(480_000, dtype=np.float32), "one two three " * 100
    for engine in reciters:
        tokens = engine.vocabulary.encode(GEORGIAN, language="ka")
        (whole,) = transcribe(engine, [clip], DecodingOptions(language="ka", prompt=prompt))
        assert list(whole.tokens) == tokens  # nothing came before it
        (rest,) = transcribe(engine, [clip], DecodingOptions(language="ka", prompt=prompt, max_tokens_per_sec=15))
        assert list(rest.tokens) == tokens[224:]


def times(result: DecodingResult) -> list[tuple[str, float, float]]:
    return [(word.text, word.start_sec, word.end_sec) for word in result.words or ()]


@slow
def test_a_text_does_not_depend_on_its_neighbours(
    _tiny_en: Any, sample: list[Any], jfk: Waveform, tmp_path: Path
) -> None:
    """In both engines, drawn or not; stock weights at their own length loop, where the smallest difference shows."""
    model, processor = copy.deepcopy(_tiny_en[0]), _tiny_en[1]
    model.audio_context = "dynamic"
    export = {"processor": processor, "quantization": "float32", "verify_clips": [jfk[:16_000]]}
    ct2 = CTranslate2Engine(export_ctranslate2(model, tmp_path / "dynamic", **export))
    clips = [jfk[:16_000], *(load_audio(u.audio) for u in sample[400:428:7])]
    shuffled = np.random.default_rng(0).permutation(len(clips))
    drawn: list[list[str]] = []
    for engine in (TorchEngine(model, processor), ct2):
        for temperature, hotwords in ((0.0, ""), (0.6, "Americans")):
            options = DecodingOptions(
                max_tokens_per_sec=2, temperature=temperature, hotwords=hotwords, word_timestamps=True
            )
            alone = [transcribe(engine, [clip], options)[0] for clip in clips]
            together = transcribe(engine, [clips[i] for i in shuffled], options)
            for i, found in zip(shuffled, together, strict=True):
                assert found.tokens == alone[i].tokens
                assert found.avg_logprob == pytest.approx(alone[i].avg_logprob, abs=1e-3)
                assert times(found) == times(alone[i])
        drawn.append([result.text for result in alone])
    assert drawn[0] == drawn[1]  # the engines draw alike


@slow
def test_clips_of_all_lengths_and_languages_get_what_each_gets_alone(base: Any, sample: list[Any]) -> None:
    model = copy.deepcopy(base[0])
    model.audio_context = "dynamic"
    engine = TorchEngine(model, base[1])
    clips = [load_audio(u.audio) for u in sample[400:428:7]]
    assert len({len(encoded.last_hidden_state[0]) for encoded in (engine.encode([clip], 0.5) for clip in clips)}) > 2
    languages = [None, "de", "ja", None]
    for extra in ({}, {"hotwords": ("Amerika", "アメリカ")}, {"timestamps": True}, {"prompt": "So it is."}):
        options = DecodingOptions(max_tokens_per_sec=2, word_timestamps=True, no_speech=True, **extra)
        alone = [
            transcribe(engine, [clip], options, languages=[code])[0]
            for clip, code in zip(clips, languages, strict=True)
        ]
        for found, expected in zip(transcribe(engine, clips, options, languages=languages), alone, strict=True):
            assert (found.tokens, found.language) == (expected.tokens, expected.language)
            assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
            assert found.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)
            assert times(found) == times(expected)


def test_clips_are_padded_by_their_own_length_alone() -> None:
    lengths = [16_000, 23_999, 24_000, 24_001, 8_000]
    assert padding_groups(lengths, 0.5, "full") == [([0, 1, 2, 3, 4], 0.5)]
    groups = padding_groups(lengths, 0.5, "dynamic")
    assert [rows for rows, _ in groups] == [[0], [1, 2], [3], [4]]
    for rows, silence_sec in groups:
        padded = batch_samples([lengths[i] for i in rows], silence_sec, "dynamic")
        assert all(0.5 <= (padded - lengths[i]) / 16_000 < 1.0 for i in rows)
    with pytest.raises(ModelError, match="empty"):
        padding_groups([], 0.5, "dynamic")


@pytest.mark.parametrize("problem", [None, "RuntimeError: Library libcublas.so.12 is not found or cannot be loaded"])
def test_auto_takes_ctranslate2_on_a_gpu_where_its_libraries_load(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.inference.engines.ctranslate2_cuda_problem", lambda: problem)
    monkeypatch.setattr("src.inference.ct2_engine.ctranslate2_cuda_problem", lambda: problem)
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 1)
    engine, reason = _engine_of_gpu("cuda", "auto")
    if problem is None:
        assert (engine, find_device("auto"), find_device("cuda")) == ("ctranslate2", ("cuda", 0), ("cuda", 0))
        assert "float16" in reason
    else:
        assert (engine, find_device("auto")) == ("torch", ("cpu", 0))
        assert problem in reason
        assert "nvidia-cublas-cu12" in reason
        with pytest.raises(DeviceError, match="nvidia-cublas-cu12"):
            find_device("cuda")
    assert _engine_of_gpu("mps", "auto")[0] == "torch"


@slow
def test_auto_logs_its_choice_and_converts_once(
    folder: Path, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = load_engine(folder, config)
    assert (engine.name, engine.precision) == ("ctranslate2", "float32")
    assert "a CTranslate2 folder" in caplog.text
    assert load_engine("tiny.en", config, engine="torch").name == "torch"
    cached = load_config(None, overrides={"device": "cpu", "paths": {"cache_dir": str(tmp_path)}})
    assert load_engine("tiny.en", cached).precision == "int8_float32"
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.bin")}
    load_engine("tiny.en", cached)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.bin")} == made


@slow
@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_the_language_of_the_settings_is_not_the_checkpoints(base: Any, engine: Any) -> None:
    config = load_config(None, overrides={"device": "cpu", "model.language": "de"})
    assert load_engine("base", config, engine=engine).language is None


@slow
def test_what_cannot_be_loaded_is_named(tmp_path: Path, folder: Path, config: Config) -> None:
    with pytest.raises(ModelError, match=r"model\.bin"):
        CTranslate2Engine(tmp_path)
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:1_000_000])
    for content in (None, "{", '{"layer_norm_epsilon": 1e-5}'):
        if content is not None:
            (broken / "config.json").write_text(content)
        with pytest.raises(ModelError, match="broken"):
            CTranslate2Engine(broken)
    with pytest.raises(DeviceError, match="compute_type"):
        CTranslate2Engine(folder, compute_type="int3")
    with pytest.raises(ConfigError, match="'onnx'"):
        load_engine(folder, config, engine="onnx")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="int8"):
        load_engine("tiny.en", config, engine="torch", compute_type="int8")
    with pytest.raises(ModelError, match="mps"):
        find_device("mps")


GOOD = DecodingResult("Ask not what your country can do for you.", (1, 2), -0.3, no_speech_prob=0.01)
LOOP = replace(GOOD, text="no no no " * 40)
GUESS = replace(GOOD, text="You can see it.", avg_logprob=-1.5)
RULES = InferenceConfig(temperatures=(0.0, 0.4, 0.8), logprob_threshold=-1.0)


class Scripted:
    """Gives, for a clip of k samples, what the script has for it at each temperature."""

    audio_context = "full"

    def __init__(self, script: dict[int, list[DecodingResult]]) -> None:
        self._script, self.asked = script, list[tuple[float, int, list[int]]]()
        self.encode = lambda audios, trailing_silence_sec: None

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        sizes = [len(audio) for audio in audios]
        self.asked.append((options.temperature, options.num_beams, sizes))
        step = RULES.temperatures.index(options.temperature)
        return [replace(self._script[size][step], temperature=options.temperature) for size in sizes]


def decoded(engine: Scripted, *sizes: int, rules: InferenceConfig = RULES, vad: Any = None) -> list[DecodingResult]:
    clips = [np.zeros(size, dtype=np.float32) for size in sizes]
    return decode_with_fallback(engine, clips, DecodingOptions(num_beams=3), rules, vad=vad)  # type: ignore[arg-type]


def test_only_what_fails_is_decoded_again_without_beams_and_the_likeliest_is_taken_where_all_fail() -> None:
    loops = [replace(LOOP, avg_logprob=value) for value in (-0.6, -0.1, -0.5)]
    guesses = [replace(GUESS, avg_logprob=value) for value in (-1.5, -1.1)]
    engine = Scripted({1: [GOOD], 2: [LOOP, GOOD], 3: [GUESS, LOOP, GOOD], 4: loops, 5: [loops[1], *guesses]})
    results = decoded(engine, 1, 2, 3, 4, 5)
    assert engine.asked == [(0.0, 3, [1, 2, 3, 4, 5]), (0.4, 1, [2, 3, 4, 5]), (0.8, 1, [3, 4, 5])]
    assert [result.temperature for result in results] == [0.0, 0.4, 0.8, 0.4, 0.8]
    assert [result.text for result in results] == [GOOD.text] * 3 + [LOOP.text, GUESS.text]


@pytest.mark.parametrize(
    "text",
    [
        "The weather forecast says it will rain heavily tomorrow morning in the north of the country.",
        "Die Wettervorhersage sagt, dass es morgen früh im Norden des Landes stark regnen wird.",
        "मौसम विभाग का कहना है कि कल सुबह देश के उत्तरी भाग में भारी बारिश होगी।",
        "আবহাওয়া অধিদপ্তর জানিয়েছে যে আগামীকাল সকালে দেশের উত্তরাঞ্চলে ভারী বৃষ্টি হবে।",
        "நாளை காலை நாட்டின் வடக்குப் பகுதியில் கனமழை பெய்யும் என்று வானிலை ஆய்வு மையம் தெரிவித்துள்ளது.",
        "ამინდის პროგნოზის მიხედვით ხვალ დილით ქვეყნის ჩრდილოეთით ძლიერი წვიმა იქნება.",
        "မနက်ဖြန် မနက်ပိုင်းတွင် နိုင်ငံမြောက်ပိုင်း၌ မိုးသည်းထန်စွာ ရွာသွန်းမည်ဟု မိုးလေဝသဌာနက ပြောသည်။",
        "กรมอุตุนิยมวิทยาบอกว่าพรุ่งนี้เช้าทางภาคเหนือของประเทศจะมีฝนตกหนัก",
        "天气预报说明天早上北方地区会下大雨，请大家出门记得带伞。",
        "天気予報によると、明日の朝、北部では大雨が降るそうです。",
        "일기예보에 따르면 내일 아침 북부 지방에 많은 비가 내릴 것이라고 합니다.",
    ],
)
def test_ordinary_text_is_no_loop_and_a_loop_is_one_in_every_script(text: str) -> None:
    limit = InferenceConfig().compression_ratio_threshold or 0
    assert replace(GOOD, text=text).compression_ratio < 1.6 < limit
    assert replace(GOOD, text=text + text[-6:] * 30).compression_ratio > limit
    assert replace(GOOD, text=text[:8] * 10).compression_ratio > limit
    if text.isascii():  # as openai/whisper
        assert replace(GOOD, text=text).compression_ratio == len(text) / len(zlib.compress(text.encode()))


def test_more_characters_than_bytes_are_no_loop_either() -> None:
    many = "".join(chr(0x4E00 + 37 * i % 5000) for i in range(400))
    assert replace(GOOD, text=many).compression_ratio < 1.6
    assert replace(GOOD, text=many[:150] + many[:10] * 60).compression_ratio > 2.4


def test_a_guess_on_likely_silence_has_no_text_and_nothing_is_decoded_twice_without_thresholds() -> None:
    engine = Scripted({1: [replace(GUESS, no_speech_prob=0.9)], 2: [replace(GOOD, no_speech_prob=0.9)]})
    silent, confident = decoded(engine, 1, 2)
    assert (silent.text, silent.tokens) == ("", ())
    assert confident.text == GOOD.text  # the model trusts it
    without = InferenceConfig(temperatures=RULES.temperatures, compression_ratio_threshold=None)
    decoded(unchecked := Scripted({1: [LOOP], 2: [GUESS]}), 1, 2, rules=without)
    assert len(engine.asked) == len(unchecked.asked) == 1


@pytest.mark.parametrize(("speech", "text"), [([], ""), (["a stretch"], GOOD.text)])
def test_the_detector_decides_where_the_model_doubts(speech: list[str], text: str) -> None:
    heard: list[int] = []

    def segments(audios: Sequence[Waveform]) -> list[list[str]]:
        heard.extend(len(audio) for audio in audios)
        return [speech for _ in audios]

    doubts = [replace(each, no_speech_prob=0.5) for each in (GOOD, GUESS)]
    engine = Scripted({1: [GOOD], 2: [doubts[0]], 3: [doubts[1], GOOD]})
    results = decoded(engine, 1, 2, 3, vad=SimpleNamespace(speech_segments_batch=segments))
    assert heard == [2, 3]  # a guess without speech is not decoded again
    assert [result.text for result in results] == [GOOD.text, text, text]
    assert len(engine.asked) == 1 + bool(speech)
