"""Terms to expect: how they are read, where the bias changes a token, and what it does to real speech."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.audio import load_audio
from src.inference.ct2_engine import CTranslate2Engine
from src.inference.engines import transcribe
from src.inference.files.transcribe import BatchInference
from src.inference.hotwords import HotwordBias, rare_words, read_hotwords
from src.inference.options import DecodingOptions
from src.inference.streaming.session import StreamingASR
from src.inference.torch_engine import TorchEngine
from src.inference.words import Vocabulary
from src.models.export.ctranslate2 import export_ctranslate2
from src.utils.config import load_config
from src.utils.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        ("", ()),
        ("Ogival, flying  buttress,ogival,", ("Ogival", "flying buttress", "ogival")),
        ("one\ntwo; three、四", ("one", "two", "three", "四")),
        ("a.txt\nb", ("a.txt", "b")),
    ],
)
def test_terms_are_separated_by_commas_or_lines(given: str, terms: tuple[str, ...]) -> None:
    assert read_hotwords(given) == terms


def test_terms_of_a_file_have_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("\ufeffWashington, D.C.\r\n\r\n  flying buttress \n", encoding="utf-8")
    assert read_hotwords(str(file)) == ("Washington, D.C.", "flying buttress")
    with pytest.raises(DataError, match=r"there is no file .*missing\.txt; write the terms"):
        read_hotwords(str(tmp_path / "missing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_hotwords(str(tmp_path / "latin.txt"))


def test_rare_words_are_long_and_seldom() -> None:
    texts = ["The buttress of the ogival arch", "the arch, the spire", "Spire and spire"]
    assert rare_words(texts) == ["Spire", "buttress", "ogival", "spire"]


def test_the_bias_begins_and_continues_a_term_and_counts_for_both_sides(base_vocabulary: Vocabulary) -> None:
    encode = base_vocabulary.encode
    term, other = encode("ogival"), encode("oval")
    assert len(term) > 1
    bias = HotwordBias(["ogival"], encode, end=base_vocabulary.end, strength=2.0)

    def change(tokens: list[int], places: int, **scores: float) -> tuple[int, int] | None:
        logits = np.full((places, base_vocabulary.end + 1), -50.0, dtype=np.float32)
        for place in range(places):
            at = len(tokens) + 1 - places + place
            logits[place, tokens[at] if at < len(tokens) else base_vocabulary.end] = 0.0
        logits[0, term[0]] = max(logits[0, term[0]], scores.get("first", -50.0))
        logits[-1, term[1]] = scores.get("second", -50.0)
        return bias.first_change(tokens, logits)

    assert change(other, len(other) + 1) is None
    assert change(other, len(other) + 1, first=-0.9) == (0, term[0])  # half of the strength begins a term
    assert change(other, len(other) + 1, first=-1.1) is None
    assert change(term[:1], 2, second=-1.9) == (1, term[1])
    assert change(term[:1], 2, second=-2.1) is None
    assert change(term[:1], 1, second=-1.9) == (1, term[1])  # the token before was given
    none = HotwordBias(["ogival"], encode, end=base_vocabulary.end, strength=0.0)
    assert none.first_change(term[:1], np.zeros((1, 60_000), dtype=np.float32)) is None


def test_settings_refuse_a_strength_that_is_none() -> None:
    with pytest.raises(ConfigError, match="hotword_strength"):
        load_config(None, overrides={"inference": {"hotword_strength": -1}})


@pytest.mark.slow
def test_terms_are_heard_in_both_engines_and_in_streams(_tiny_en: Any, sample: list[Any], tmp_path: Path) -> None:
    heard = {  # clip: text without terms, and with them
        "012030072": ("Look at my mouse.", "Look at my mouth."),
        "021680379": ("Hence the cycle of the games is brief.",) * 2,
    }
    clips = {u.id: load_audio(u.audio) for u in sample if u.id in heard}
    audios = [clips[name] for name in heard]
    model, processor = copy.deepcopy(_tiny_en[0]), _tiny_en[1]
    folder = export_ctranslate2(model, tmp_path / "ct2", processor=processor, verify_clips=audios[:1])
    plain = DecodingOptions(word_timestamps=True)
    biased = replace(plain, hotwords=("mouth", "buttress"), hotword_strength=6.0)
    for engine in (TorchEngine(model, processor), CTranslate2Engine(folder)):
        without = transcribe(engine, audios, plain)
        results = transcribe(engine, audios, biased)
        assert [(a.text, b.text) for a, b in zip(without, results, strict=True)] == list(heard.values())
        assert results[1].avg_logprob == pytest.approx(without[1].avg_logprob, abs=1e-3)
        assert len(results[0].words or ()) == len(without[0].words or ())
        assert -3 < results[0].avg_logprob < without[0].avg_logprob
        assert [r.text for r in transcribe(engine, audios, replace(biased, hotword_strength=0.0))] == [
            r.text for r in without
        ]
        encoded = engine.encode(audios[:1], plain.trailing_silence_sec)
        spoken = replace(biased, hotwords=("look", "mouth"), word_timestamps=False)
        for beams in (1, 2):  # a text that is cut off
            (short,) = engine.decode(encoded, audios[:1], replace(spoken, num_beams=beams), max_tokens=3)
            assert (short.text, short.truncated) == ("Look at my", True)
        for beams in (1, 2):  # a term takes the place of no time, and no text begins at a term
            (result,) = transcribe(engine, audios[:1], replace(spoken, timestamps=True, num_beams=beams))
            assert result.text == "Look at my mouth."
            assert [token >= engine.vocabulary.timestamp_begin for token in result.tokens] == [
                True, *[False] * (len(result.tokens) - 2), True,
            ]  # fmt: skip
    overrides = {"inference": {"hotwords": "mouth, buttress", "hotword_strength": 6}}
    config = load_config(None, overrides=overrides)
    assert BatchInference(engine=engine, config=config).transcribe_batch(audios[:1])[0].text == "Look at my mouth."
    session = StreamingASR(engine=engine, config=config)
    assert session.stream_audio(audios[0]).text == "Look at my mouth."
