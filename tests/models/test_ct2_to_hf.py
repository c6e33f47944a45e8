"""The oracle is CTranslate2 itself, running the source of each conversion in float32."""

from __future__ import annotations

import functools
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ctranslate2
import numpy as np
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer, pipeline

from src.data.audio import load_audio
from src.data.utterance import Utterance
from src.models.ct2_to_hf import convert_ct2_to_hf
from src.models.processor import build_processor, save_processor
from src.models.weights import PACKAGED_MODELS, assemble_packaged_model
from src.utils.errors import ModelError


class Converted(NamedTuple):
    """A CTranslate2 folder and what became of it."""

    ct2_dir: Path
    hf_dir: Path
    options: dict[str, str]

    def processor(self) -> Any:
        processor = WhisperProcessor.from_pretrained(self.hf_dir)
        processor.tokenizer.set_prefix_tokens(**self.options)
        return processor


Convert = Callable[[str], Converted]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    @functools.cache
    def convert(variant: str) -> Converted:
        folder = tmp_path_factory.mktemp(variant)
        (folder / "ct2").mkdir()
        assemble_packaged_model(PACKAGED_MODELS[variant], folder / "ct2")
        convert_ct2_to_hf(folder / "ct2", folder / "hf")
        options = {} if ".en" in variant else {"language": "en", "task": "transcribe"}
        return Converted(folder / "ct2", folder / "hf", options)

    return convert


@pytest.fixture
def tiny_copy(converted: Convert, tmp_path: Path) -> Path:
    """A CTranslate2 folder to be damaged."""
    return Path(shutil.copytree(converted("tiny.en").ct2_dir, tmp_path / "copy"))


def to_ct2(hf_dir: Path, ct2_dir: Path, quantization: str) -> None:
    TransformersConverter(str(hf_dir), copy_files=["tokenizer.json"]).convert(str(ct2_dir), quantization=quantization)


def greedy_ct2(folder: Path, features: np.ndarray, prompt: list[int]) -> Any:
    engine = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="float32", intra_threads=1)
    mel = ctranslate2.StorageView.from_array(features)
    return engine.generate(mel, [prompt] * len(features), beam_size=1, return_logits_vocab=True)


def greedy_hf(model: Any, features: np.ndarray, options: dict[str, str]) -> list[list[int]]:
    ended = model.generation_config.eos_token_id
    rows = model.generate(torch.from_numpy(features), num_beams=1, **options).tolist()
    return [[token for token in row if token < ended] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "num_clips"), [("tiny.en", 5), ("base", 2)])
def test_text_and_every_log_probability_equal_ctranslate2_running_the_source(
    converted: Convert, jfk: np.ndarray, sample: list[Utterance], variant: str, num_clips: int
) -> None:
    case = converted(variant)
    processor, model = case.processor(), WhisperForConditionalGeneration.from_pretrained(case.hf_dir).eval()
    prompt = processor.tokenizer.prefix_tokens
    clips = [jfk, *(load_audio(u.audio) for u in sample[: num_clips - 1])]
    features = processor.feature_extractor(clips, sampling_rate=16_000, return_tensors="np").input_features
    results = greedy_ct2(case.ct2_dir, features, prompt)
    assert greedy_hf(model, features[:1], case.options) == [results[0].sequences_ids[0]]

    for row, result in enumerate(results):
        theirs = torch.from_numpy(np.stack([np.asarray(step).reshape(-1) for step in result.logits[0]]))  # (L, vocab)
        with torch.no_grad():
            decoder_input = torch.tensor([prompt + result.sequences_ids[0]])
            ours = model(torch.from_numpy(features[row : row + 1]), decoder_input_ids=decoder_input).logits[0]
        ours = ours[len(prompt) - 1 :]
        suppressed = theirs < -1e9  # CTranslate2 has applied the suppressed ids: the same for ours
        assert len(ours) == len(theirs)
        assert set(suppressed.all(0).nonzero().flatten().tolist()) >= set(model.generation_config.suppress_tokens)
        ours = ours.masked_fill(suppressed, -torch.inf).log_softmax(-1)
        assert (ours - theirs.log_softmax(-1))[~suppressed].abs().max() < 1e-3
        assert ours.argmax(-1).tolist() == [*result.sequences_ids[0], processor.tokenizer.eos_token_id]  # so is greedy


def test_heads_that_stand_for_an_absent_list_do_not_become_one(tiny_copy: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    config["alignment_heads"] = [[layer, head] for layer in (2, 3) for head in range(6)]  # as its converter writes
    (tiny_copy / "config.json").write_text(json.dumps(config))
    back = convert_ct2_to_hf(tiny_copy, tmp_path / "hf")
    assert "alignment_heads" not in json.loads((back / "generation_config.json").read_text())


@pytest.mark.parametrize(("variant", "start"), [("tiny.en", 50257), ("base", 50258)])
def test_generation_config_is_that_of_the_hub(converted: Convert, variant: str, start: int) -> None:
    case = converted(variant)
    config = json.loads((case.hf_dir / "generation_config.json").read_text())
    ct2_config = json.loads((case.ct2_dir / "config.json").read_text())
    expected = {
        "alignment_heads": ct2_config["alignment_heads"],
        "suppress_tokens": ct2_config["suppress_ids"],
        "begin_suppress_tokens": ct2_config["suppress_ids_begin"],
        "decoder_start_token_id": start,
        "no_timestamps_token_id": start + 105,
        "prev_sot_token_id": start + 103,
        "eos_token_id": start - 1,
        "pad_token_id": start - 1,
        "max_length": 448,
        "max_initial_timestamp_index": 50,
        "is_multilingual": variant == "base",
    }
    assert {key: config[key] for key in expected} == expected
    assert "forced_decoder_ids" not in config
    if variant == "base":
        assert config["task_to_id"] == {"translate": 50358, "transcribe": 50359}
        assert sorted(config["lang_to_id"].values()) == ct2_config["lang_ids"]
        assert (config["lang_to_id"]["<|en|>"], config["lang_to_id"]["<|zh|>"]) == (50259, 50260)


@pytest.mark.parametrize(("variant", "first_timestamp"), [("tiny.en", 50363), ("base", 50364)])
def test_tokenizer_is_complete(converted: Convert, variant: str, first_timestamp: int) -> None:
    tokenizer = converted(variant).processor().tokenizer
    assert isinstance(tokenizer, WhisperTokenizer)
    assert {tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token} == {"<|endoftext|>"}
    assert tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|30.00|>"]) == [first_timestamp, first_timestamp + 1500]
    assert tokenizer.timestamp_ids()[50] == first_timestamp + 50
    assert tokenizer.all_special_ids[-1] + 1 == first_timestamp  # where transformers expects the timestamps
    assert tokenizer.get_prompt_ids("names")[0] == tokenizer.convert_tokens_to_ids("<|startofprev|>")
    ids = [*tokenizer.prefix_tokens, first_timestamp, *tokenizer.encode(" Hi.", add_special_tokens=False)]
    assert tokenizer.batch_decode([[*ids, tokenizer.eos_token_id]], skip_special_tokens=True) == [" Hi."]
    assert "<|0.00|>" in tokenizer.decode(ids, decode_with_timestamps=True)
    assert tokenizer.normalize("Mr. Colour won't pay $20") == "mister color will not pay $20"
    if variant == "base":
        tokenizer.set_prefix_tokens(language="german", task="translate")
        names = ["<|startoftranscript|>", "<|de|>", "<|translate|>", "<|notimestamps|>"]
        assert tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens) == names


@pytest.mark.slow
def test_pipeline_transcribes_with_timestamps(converted: Convert, jfk: np.ndarray) -> None:
    recognizer = pipeline("automatic-speech-recognition", model=str(converted("tiny.en").hf_dir))
    sentence = recognizer(jfk.copy(), return_timestamps=True)
    assert "ask not what your country can do for you" in sentence["text"]
    assert sentence["chunks"][-1]["timestamp"][1] == pytest.approx(10.5, abs=1)
    words = recognizer(jfk.copy(), return_timestamps="word")["chunks"]  # needs the alignment heads
    assert len(words) == 22
    assert words[0]["text"] == " And"


@pytest.fixture(scope="module")
def random_folder(converted: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multilingual checkpoint of 128 mel bins and odd sizes; its weights are exact in bfloat16."""
    processor = build_processor(converted("base").ct2_dir / "tokenizer.json", num_mel_bins=128, vocab_size=51865)
    torch.manual_seed(0)
    config = WhisperConfig(
        num_mel_bins=128, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40, vocab_size=51865, pad_token_id=50257,
        bos_token_id=50257, eos_token_id=50257, decoder_start_token_id=50258,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("random")
    WhisperForConditionalGeneration(config).bfloat16().float().save_pretrained(folder)
    save_processor(processor, folder)
    return folder


@pytest.mark.parametrize(("quantization", "levels"), [("float32", 0), ("bfloat16", 0), ("int8", 127), ("int16", 1024)])
def test_weights_come_back_exactly_or_within_half_a_step(
    random_folder: Path, tmp_path: Path, quantization: str, levels: int
) -> None:
    to_ct2(random_folder, tmp_path / "ct2", quantization)
    convert_ct2_to_hf(tmp_path / "ct2", tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (random_folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        step = torch.zeros(())
        if levels and weight.ndim > 1 and "embed_positions" not in name:
            peak = weight.flatten(1).abs().amax(1) if quantization == "int8" else weight.abs().max()
            step = peak.reshape(-1, *[1] * (weight.ndim - 1)) / levels
            step = step * (4 if quantization == "int16" else 1)  # one scale for q, k and v together
        assert ((after[name] - weight).abs() <= 0.5 * step * 1.001).all(), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (random_folder, tmp_path / "hf"))
    sizes = [key for key in theirs if re.search(r"layers$|heads|dim|mel|d_model|vocab|positions", key)]
    assert {key: ours[key] for key in sizes} == {key: theirs[key] for key in sizes}
    assert WhisperProcessor.from_pretrained(tmp_path / "hf").feature_extractor.feature_size == 128


@pytest.mark.parametrize("kept_bytes", [0, 3, 30, 5_000, -1])
def test_truncated_model_is_refused_by_name(tiny_copy: Path, tmp_path: Path, kept_bytes: int) -> None:
    (tiny_copy / "model.bin").write_bytes((tiny_copy / "model.bin").read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match=r"model\.bin"):
        convert_ct2_to_hf(tiny_copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("field", "damaged"),
    [
        (struct.pack("<BIBI", 1, 384, 4, 768), struct.pack("<BIBI", 1, 384, 0, 768)),  # float16 read as float32
        (struct.pack("<BIBI", 1, 384, 4, 768), struct.pack("<BIBI", 129, 384, 4, 768)),  # 129 dimensions
    ],
)
def test_header_that_contradicts_its_bytes_is_refused(
    tiny_copy: Path, tmp_path: Path, field: bytes, damaged: bytes
) -> None:
    content = (tiny_copy / "model.bin").read_bytes()
    assert field in content
    (tiny_copy / "model.bin").write_bytes(content.replace(field, damaged, 1))
    with pytest.raises(ModelError, match=r"model\.bin"):
        convert_ct2_to_hf(tiny_copy, tmp_path / "hf")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" * 100, struct.pack("<IH", 6, 4) + b"\xff\xfe\xfd\0" * 50])
def test_file_that_is_no_model_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.bin"):
        convert_ct2_to_hf(tmp_path, tmp_path / "hf")


def test_weights_that_are_not_those_of_whisper_are_named(tiny_copy: Path, tmp_path: Path) -> None:
    content = (tiny_copy / "model.bin").read_bytes()
    (tiny_copy / "model.bin").write_bytes(content.replace(b"layer_3/ffn/linear_1/bias", b"layer_3/ffn/linear_9/bias"))
    with pytest.raises(ModelError, match=r"layers\.3\.fc2\.bias"):
        convert_ct2_to_hf(tiny_copy, tmp_path / "hf")


def test_absent_files_and_another_tokenizer_are_named(converted: Convert, tiny_copy: Path, tmp_path: Path) -> None:
    for absent in ("model.bin", "config.json", "tokenizer.json"):
        file = (tiny_copy / absent).rename(tmp_path / absent)
        with pytest.raises(ModelError, match=absent):
            convert_ct2_to_hf(tiny_copy, tmp_path / "hf")
        file.rename(tiny_copy / absent)
    shutil.copy(converted("base").ct2_dir / "tokenizer.json", tiny_copy)
    with pytest.raises(ModelError, match=r"51865.*51864"):
        convert_ct2_to_hf(tiny_copy, tmp_path / "hf")


def test_output_folder_with_something_in_it_is_left_alone(converted: Convert, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="hf"):
        convert_ct2_to_hf(converted("tiny.en").ct2_dir, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
