"""Steps that keep their tensors in place give the same texts, and the host reads little while they run."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from src.inference import greedy
from src.inference.engine_base import DecodingResult, transcribe
from src.inference.greedy import Choice, Greedy, StaticDecoder, release_graphs
from src.inference.options import DecodingOptions, gumbel_noise
from src.inference.torch_engine import TorchEngine
from src.models.dynamic_context import DynamicWhisper

NOISE = np.random.default_rng(0).standard_normal((5, 32_000)).astype(np.float32) / 10
OPTIONS = DecodingOptions(word_timestamps=True, no_speech=True, max_tokens_per_sec=10)
READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal")


def as_it_is(step: Callable[[], None]) -> Callable[[], None]:
    return step


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(READS):
            self.places.append("".join(traceback.format_stack(limit=8)[:-1]))
        return func(*args, **(kwargs or {}))


def close(found: DecodingResult, expected: DecodingResult) -> None:
    assert found.tokens == expected.tokens
    assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-4)
    assert found.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-5)
    for word, other in zip(found.words or (), expected.words or (), strict=True):
        assert (word.text, word.start_sec, word.end_sec) == (other.text, other.start_sec, other.end_sec)
        assert word.probability == pytest.approx(other.probability, abs=1e-4)


def test_captured_steps_give_the_same_texts_words_and_certainty_in_any_shape(small: Any) -> None:
    model, processor = small
    model.audio_context = "dynamic"
    plain, static = TorchEngine(model, processor), TorchEngine(model, processor, capture=as_it_is)
    for rows, samples, prefix in ((5, 32_000, ""), (5, 32_000, "And so"), (1, 32_000, ""), (3, 9_000, "")):
        options = DecodingOptions(**{**vars(OPTIONS), "prefix": prefix})
        clips = [noise[:samples] for noise in NOISE[:rows]]
        for found, expected in zip(*(transcribe(e, clips, options) for e in (static, plain)), strict=True):
            close(found, expected)
    kept = greedy._decoders[model][1]
    shapes = [(8, 125, 64, False), (1, 125, 64, False), (8, 75, 64, False)]  # rows, positions, tokens, is masked
    assert list(kept) == shapes
    release_graphs(model)
    assert model not in greedy._decoders


@pytest.mark.parametrize("capture", [None, as_it_is])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clips_of_all_lengths_share_the_steps_of_the_decoder_and_get_what_each_gets_alone(
    small: Any, capture: Any, attention: str
) -> None:
    model, processor = small
    model.audio_context = "dynamic"
    model.set_attn_implementation(attention)
    for layer in model.model.decoder.layers:  # what is heard decides the text, and words have places
        for projection in (layer.encoder_attn.v_proj, layer.encoder_attn.q_proj, layer.encoder_attn.k_proj):
            projection.weight.data *= 30
    engine, steps = TorchEngine(model, processor, capture=capture), list[int]()
    model.model.decoder.layers[0].register_forward_pre_hook(lambda _, args: steps.append(len(args[0])))
    clips = [noise[:samples] for noise, samples in zip(NOISE, (9_000, 32_000, 20_000, 5_000, 20_000), strict=True)]
    alone = [transcribe(engine, [clip], OPTIONS)[0] for clip in clips]
    assert len({result.tokens[:3] for result in alone}) > 1
    release_graphs(model)
    steps.clear()
    for found, expected in zip(transcribe(engine, clips, OPTIONS), alone, strict=True):
        close(found, expected)
    beams = replace(OPTIONS, num_beams=2, no_speech=False)
    one_by_one = [transcribe(engine, [clip], beams)[0] for clip in clips]
    assert [found.tokens for found in transcribe(engine, clips, beams)] == [found.tokens for found in one_by_one]
    if attention == "sdpa":
        assert steps[0] == (8 if capture else 5)
    if attention == "sdpa" and capture:
        assert list(greedy._decoders[model][1]) == [(8, 128, 64, True)]


def test_graphs_of_weights_that_have_moved_are_void(small: Any) -> None:
    model, processor = small
    engine = TorchEngine(model, processor, capture=as_it_is)
    transcribe(engine, NOISE[:1], OPTIONS)
    (before,) = greedy._decoders[model][1].values()
    transcribe(engine, NOISE[:1], OPTIONS)
    assert list(greedy._decoders[model][1].values()) == [before]
    model.model.decoder.layer_norm.weight.data = model.model.decoder.layer_norm.weight.data.clone()
    transcribe(engine, NOISE[:1], OPTIONS)
    assert before not in greedy._decoders[model][1].values()


@pytest.mark.parametrize("broken", ["raises", "says something else"])
def test_a_capture_that_fails_is_said_and_changes_no_text(
    small: Any, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(step: Callable[[], None]) -> Callable[[], None]:
        if broken == "raises":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return lambda: None

    model, processor = small
    (expected,) = transcribe(TorchEngine(model, processor), NOISE[:1], OPTIONS)
    (found,) = transcribe(TorchEngine(model, processor, capture=capture), NOISE[:1], OPTIONS)
    close(found, expected)
    assert "no CUDA graph" in caplog.text


def test_the_host_reads_once_every_eight_tokens(small: Any) -> None:
    model, _ = small
    model.generation_config.suppress_tokens = [50256]  # never ends
    hidden, ids = torch.randn(3, 20, 16), torch.tensor([[50257, 50362]] * 3)

    def reads(tokens: int) -> int:
        found = Greedy(model, 50256, hidden, ids, [tokens] * 3, forced=0, capture=as_it_is)
        with Reads() as counted, torch.inference_mode():
            found.run(OPTIONS)
        assert found.taken == tokens
        return len(counted.places)

    reads(50)  # the graph is made
    assert (reads(8), reads(9), reads(50)) == (0, 1, 6)


def test_a_step_on_a_gpu_reads_nothing(untrained: DynamicWhisper) -> None:
    """On a pretended CUDA device, where a read of a value raises; with clips of all lengths."""
    model, width = copy.deepcopy(untrained).eval(), untrained.config.d_model
    with FakeTensorMode(), torch.inference_mode():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                pretended = torch.empty(weight.shape, dtype=torch.float16, device="cuda")
                module.register_parameter(name, torch.nn.Parameter(pretended, requires_grad=False))
        hidden = torch.zeros(4, 25, width, dtype=torch.float16, device="cuda")
        ids = torch.zeros(4, 2, dtype=torch.long, device="cuda")
        mask = torch.zeros(4, 1, 1, 25, dtype=torch.float16, device="cuda")
        decoder = StaticDecoder(model, 50256, 8, 32, 64, True, hidden)
        for cache in (decoder.cache.self_attention_cache, decoder.cache.cross_attention_cache):
            for layer in cache.layers:  # a constant would be sent to a device that is not there
                layer.cumulative_length = torch.zeros((), dtype=torch.long, device="cuda")
        states = decoder.begin(hidden, mask, ids, [20] * 4, has_forced=False)
        for _ in range(3):
            decoder.step()
        assert (states.device.type, decoder.choice.tokens.device.type) == ("cuda", "cuda")
        assert states.shape == (4, 2, width)
        with pytest.raises(RuntimeError):
            bool(decoder.choice.finished.all())


def test_drawn_tokens_follow_the_softmax_and_are_drawn_alike_in_every_row() -> None:
    logits = np.log([0.6, 0.3, 0.1]).astype(np.float32)
    drawn = [int((logits / 1.0 + gumbel_noise(step, 1.0, 3)).argmax()) for step in range(2000)]
    assert np.bincount(drawn) / 2000 == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert (gumbel_noise(0, 0.2, 3) != gumbel_noise(0, 0.4, 3)).all()


def test_rows_beyond_the_texts_end_at_once(small: Any) -> None:
    choice = Choice(small[0], 50256, 4, 8, torch.device("cpu"))
    choice.begin([2, 1])
    choice.take(torch.zeros(4, small[0].config.vocab_size), is_first=True)
    assert choice.finished.tolist() == [False, True, True, True]
    choice.take(torch.zeros(4, small[0].config.vocab_size))
    assert choice.finished.all()
    assert choice.tokens[1, 1:].tolist() == [50256] * 7


@pytest.mark.gpu
def test_graphs_of_a_gpu_give_the_texts_of_plain_steps(small: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, processor = small
    model.audio_context = "dynamic"
    model.cuda()
    captured, plain = TorchEngine(model, processor), TorchEngine(model, processor)
    plain._capture = None
    for found, expected in zip(*(transcribe(e, NOISE, OPTIONS) for e in (captured, plain)), strict=True):
        close(found, expected)
    (decoder,) = greedy._decoders[model][1].values()
    assert decoder.step != decoder._eager_step
