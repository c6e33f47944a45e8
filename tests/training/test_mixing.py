from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.report.summary import describe_mix, summarize_run
from src.models.dynamic_context import DynamicWhisper
from src.models.export.huggingface import read_provenance
from src.training.methods import prepare_model
from src.training.mixing import choose_mix, load_mix
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from src.utils.tracking import ExperimentLogger


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    short = sorted((check_utterance(u, Config().data) for u in sample[400:500:10]), key=lambda u: u.duration_sec or 0)
    return short[:1]


def mixing_at(config: Config, *shares: float) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"mix_shares": shares})})


@pytest.fixture
def stock(request: pytest.FixtureRequest) -> DynamicWhisper:
    """Real weights where rates are measured, else random ones."""
    name = "_tiny_en" if "loader" in request.fixturenames else "_small"
    return copy.deepcopy(request.getfixturevalue(name)[0])


@pytest.fixture
def loader(_tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> Any:
    return create_loader(clips, _tiny_en[1], config)


def shifted(model: DynamicWhisper, amount: float, seed: int = 0) -> DynamicWhisper:
    """Return a copy with noise on its layers, as a share of their spread; opposite amounts give opposite noise."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += amount * parameter.std() * noise
    return moved


def assert_same_weights(model: DynamicWhisper, expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def clone(model: DynamicWhisper) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def fake_rates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Give each share a rate without decoding, and return what is measured."""

    def use(rates: dict[str, float]) -> list[str]:
        measured: list[str] = []

        def evaluate(self: ModelEvaluator, loader: Any, *, name: str) -> Any:
            context = self._model.audio_context
            measured.append(f"{name}, {context}")
            if name not in rates:
                raise KeyboardInterrupt
            return SimpleNamespace(metric="CER", rate=rates[name], n=40, audio_context=context)

        monkeypatch.setattr(ModelEvaluator, "evaluate_dataset", evaluate)
        return measured

    return use


def test_share_0_is_exactly_stock_and_share_1_exactly_tuned(stock: DynamicWhisper) -> None:
    tuned, model = shifted(stock, 0.1), copy.deepcopy(stock)
    first, last = stock.state_dict(), tuned.state_dict()
    for share, expected in ((1.0, last), (0.0, first)):
        load_mix(model, first, last, share)
        assert_same_weights(model, expected)
    load_mix(model, first, last, 0.25)
    name = "model.decoder.layers.0.fc1.weight"
    torch.testing.assert_close(model.state_dict()[name], 0.75 * first[name] + 0.25 * last[name])


def test_adapters_the_same_model_and_no_clips_are_refused(
    stock: DynamicWhisper, _tiny_en: tuple[Any, Any], config: Config
) -> None:
    processor = _tiny_en[1]
    with pytest.raises(ModelError, match="initialize_model"):
        choose_mix(stock, stock, processor, [], config)
    tuned = copy.deepcopy(stock)
    with pytest.raises(DataError, match="no clip"):
        choose_mix(tuned, stock, processor, [], config)
    prepare_model(tuned, config.training.model_copy(update={"method": "lora"}))
    with pytest.raises(ModelError, match="merged_model"):
        choose_mix(tuned, stock, processor, [], config)


def test_the_stock_model_has_its_own_context(
    stock: DynamicWhisper, _tiny_en: tuple[Any, Any], config: Config, fake_rates: Callable[..., list[str]]
) -> None:
    tuned = shifted(stock, 0.01)
    tuned.audio_context = "dynamic"
    measured = fake_rates({"stock": 0.4, "mix 0.25": 0.3, "mix 0.75": 0.35, "mix 1": 0.32})
    result = choose_mix(tuned, stock, _tiny_en[1], [], mixing_at(config, 0.75, 0.25))
    assert measured == ["stock, full", "mix 0.25, dynamic", "mix 0.75, dynamic", "mix 1, dynamic"]
    frame = result.to_frame()
    assert frame["share"].tolist() == [0.0, 0.25, 0.75, 1.0]
    assert frame["rate"].tolist() == [0.4, 0.3, 0.35, 0.32]
    assert frame["audio_context"].tolist() == ["full", "dynamic", "dynamic", "dynamic"]
    assert list(frame.columns) == ["share", "metric", "rate", "audio_context", "clips", "chosen"]
    assert frame[frame["chosen"]]["share"].tolist() == [result.best_share] == [0.25]
    assert result.saved_to is None
    expected = copy.deepcopy(stock)
    load_mix(expected, stock.state_dict(), shifted(stock, 0.01).state_dict(), 0.25)
    assert_same_weights(tuned, expected.state_dict())


@pytest.mark.usefixtures("quick_exports")
@pytest.mark.parametrize(
    ("rates", "best"),
    [((0.3, 0.3, 0.3), 0.0), ((0.4, 0.3, 0.3), 0.5), ((0.4, 0.35, 0.3), 1.0), ((0.3, 0.35, 0.3), 0.0)],
)
def test_of_equal_rates_the_one_with_more_stock_weights_wins(
    stock: DynamicWhisper, _tiny_en: tuple[Any, Any], config: Config, fake_rates: Callable[..., list[str]],
    rates: tuple[float, ...], best: float,
) -> None:  # fmt: skip
    fake_rates(dict(zip(("stock", "mix 0.5", "mix 1"), rates, strict=True)))
    folder = config.paths.checkpoints_dir / "mix"
    result = choose_mix(copy.deepcopy(stock), stock, _tiny_en[1], [], mixing_at(config, 0.5), output_dir=folder)
    assert (result.best_share, result.keep_stock) == (best, best == 0)
    assert "40" in result.describe()
    assert folder.exists() == (result.saved_to is not None) == (best == 0.5)


def test_an_interrupted_sweep_leaves_the_model_as_it_was_tuned(
    stock: DynamicWhisper, _tiny_en: tuple[Any, Any], config: Config, fake_rates: Callable[..., list[str]]
) -> None:
    tuned = shifted(stock, 0.05)
    expected = clone(tuned)
    fake_rates({"stock": 0.5, "mix 0.25": 0.5})
    with pytest.raises(KeyboardInterrupt):
        choose_mix(tuned, stock, _tiny_en[1], [], config)
    assert_same_weights(tuned, expected)


@pytest.mark.slow
def test_a_mix_that_wins_is_loaded_and_saved(
    stock: DynamicWhisper, _tiny_en: tuple[Any, Any], loader: Any, config: Config, tmp_path: Path
) -> None:
    # the true weights lie half way between two models with opposite noise
    below, above = shifted(stock, -0.5), shifted(stock, 0.5)
    with ExperimentLogger(config, run_id="r") as experiment:
        result = choose_mix(
            above,
            below,
            _tiny_en[1],
            loader,
            mixing_at(config, 0.5),
            output_dir=tmp_path / "mix",
            experiment=experiment,
        )
    assert describe_mix(summarize_run(experiment.dir).mix) == result.describe()
    stock_wer, mix_wer, tuned_wer = result.to_frame()["rate"]
    assert mix_wer < min(stock_wer, tuned_wer)
    assert (result.best_share, result.keep_stock, result.saved_to) == (0.5, False, tmp_path / "mix")
    assert_same_weights(above, stock.state_dict(), rtol=0.0, atol=1e-5)
    reloaded = DynamicWhisper.from_pretrained(tmp_path / "mix")
    assert_same_weights(reloaded, above.state_dict())
    assert read_provenance(tmp_path / "mix") == {"mix": list(result.rows)}
