"""Loading of a folder in Hugging Face format: every tensor is the model's and finite, and nothing in it runs code.

transformers initialises weights that a file lacks at random, allocates what config.json says, and passes on the errors
of its libraries. Here config.json is compared with the headers of the weight files before anything is allocated, and
what does not fit is named by a `ModelError`. Only the settings of the network are taken from config.json.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)  # fmt: skip
from transformers import logging as transformers_logging
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS, NON_SPEECH_TOKENS_MULTI

from src.models.dynamic_context import DynamicWhisper
from src.models.folder import (
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILE,
    has_tokenizer,
    missing_part,
    own_settings,
    read_settings,
    weight_files,
)
from src.models.processor import generation_defaults, save_processor, token_rules
from src.utils.errors import ModelError, first_line

logger = logging.getLogger(__name__)

MAX_LAYERS = 100  # of a model that is described although its file has fewer tensors; large has 32
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; others are quantised
ENGLISH_START = 50_257  # default of `WhisperConfig.decoder_start_token_id`
_EMBEDDING, _PROJECTION = "model.decoder.embed_tokens.weight", "proj_out.weight"
_NETWORK = frozenset(WhisperConfig.__annotations__)  # keys of config.json; others may name code, kernels, label counts
# LoRA initialisations that also change the base model: the adapter does not fit the model that it names
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_checkpoint(folder: Path) -> tuple[DynamicWhisper, WhisperProcessor]:
    """Load a model in float32 on the CPU, in evaluation mode, and its processor.

    Folders of transformers 4 and 5 load: weights in one file or in shards, in 16 or 32 bits; a tokenizer with or
    without tokenizer.json. What an absent or old generation_config.json lacks follows from the tokenizer.

    Raises:
        ModelError: a file is absent, damaged or another model's, or a tensor is missing, unexpected, of another shape
            or not finite.
    """
    if problem := missing_part(folder):
        raise ModelError(f"{folder}: not a complete Whisper checkpoint: {problem}")
    transformers_logging.disable_progress_bar()  # one bar per file of weights says nothing
    config = _read_config(folder)
    tensors = _open_weights(folder)
    model = fitting_model(config, {name: tensor.shape for name, tensor in tensors.items()}, folder)
    processor = load_processor(folder, config)
    generation = _read_generation(folder, config, processor.tokenizer)
    with reading(folder, "the weights cannot be read", "fetch the folder again"):
        put_weights(model, {name: tensor.load() for name, tensor in tensors.items()}, folder)
    model.generation_config = generation
    return model.eval(), processor


@contextmanager
def reading(place: Path, what: str, fix: str) -> Iterator[None]:
    """Raise a `ModelError` that names the place, and says what is wrong and how to fix it, for any other error."""
    try:
        yield
    except ModelError:
        raise
    except Exception as err:  # transformers, tokenizers and PEFT raise plain ones, too
        problem = f"{type(err).__name__}: {first_line(err)[:300]}"
        raise ModelError(f"{place}: {what} ({problem}); {fix}") from err


def _read_config(folder: Path) -> WhisperConfig:
    file = folder / CONFIG_FILE
    settings = read_settings(file)
    context, rates = own_settings(settings, file)
    with reading(file, "not the configuration of a Whisper", "fetch it again"):
        config = WhisperConfig(**{key: value for key, value in settings.items() if key in _NETWORK})
    config.audio_context, config.dtype = context, torch.float32
    config.architectures, config.name_or_path = ["WhisperForConditionalGeneration"], str(folder)
    if rates:
        config.tokens_per_sec = rates
    return config


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    load: Callable[[], Tensor]  # in float32; a copy, as the file may be replaced while the model is in use


def _open_weights(folder: Path) -> dict[str, _Tensor]:
    """Return the tensors of a folder by the names of `WhisperForConditionalGeneration`."""
    found: dict[str, _Tensor] = {}
    for file in weight_files(folder):
        found |= _open_tensors(file)
    if not any(name.startswith("model.") for name in found):  # of the plain `WhisperModel`
        found = {f"model.{name}": tensor for name, tensor in found.items()}
    return found


def _open_tensors(file: Path) -> dict[str, _Tensor]:
    """Return the tensors of a safetensors file; only its header is read at this point."""
    found: dict[str, _Tensor] = {}
    with reading(file, "damaged or no weights in safetensors", "fetch the file again"):
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118
            header = opened.get_slice(name)
            if header.get_dtype() not in FLOATS:
                raise ModelError(
                    f"{file}: {name} is stored as {header.get_dtype()}; quantised weights are not read, save the model "
                    "in float16 or float32"
                )
            found[name] = _Tensor((*header.get_shape(),), partial(_load_tensor, opened, name))
    return found


def _load_tensor(opened: Any, name: str) -> Tensor:
    tensor: Tensor = opened.get_tensor(name)
    return tensor.to(torch.float32, copy=True)


def fitting_model(config: WhisperConfig, shapes: Mapping[str, tuple[int, ...]], place: Path) -> DynamicWhisper:
    """Return a model without memory for its weights; `ModelError` if names or shapes do not fit it."""
    with reading(place, f"{CONFIG_FILE} does not describe a Whisper", "fetch the folder again"):
        if max(config.encoder_layers, config.decoder_layers) > max(len(shapes), MAX_LAYERS):
            layers = f"{config.encoder_layers} and {config.decoder_layers} layers"
            raise ModelError(f"{place}: {CONFIG_FILE} says {layers}, the weights have {len(shapes)} tensors in all")
        with torch.device("meta"):
            model = DynamicWhisper(config)
    expected = {name: (*tensor.shape,) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and _PROJECTION not in shapes:
        del expected[_PROJECTION]
    problems = [
        _listed("missing", sorted(expected.keys() - shapes.keys())),
        _listed("not of this model", sorted(shapes.keys() - expected.keys())),
        _listed("of another shape", [
            f"{name} {[*shapes[name]]} instead of {[*shape]}"
            for name, shape in sorted(expected.items()) if shapes.get(name, shape) != shape
        ]),
    ]  # fmt: skip
    if any(problems):
        raise ModelError(
            f"{place}: the weights are not those of the Whisper that {CONFIG_FILE} describes: "
            f"{'; '.join(filter(None, problems))}; take both from one model"
        )
    return model


def put_weights(model: DynamicWhisper, tensors: dict[str, Tensor], place: Path) -> None:
    """Put tensors into a model of `fitting_model`; `ModelError` for nan, infinity, or a projection of its own."""
    check_finite(tensors, place)
    embedding = tensors[_EMBEDDING]
    if model.config.tie_word_embeddings and not torch.equal(tensors.setdefault(_PROJECTION, embedding), embedding):
        raise ModelError(
            f"{place}: {_PROJECTION} differs from {_EMBEDDING}, which is to be the same by tie_word_embeddings of "
            f"{CONFIG_FILE}; save the model again"
        )
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()


def check_finite(tensors: Mapping[str, Tensor], place: Path) -> None:
    """Raise `ModelError` if a tensor has values that are not finite."""
    if wrong := not_finite(tensors):
        raise ModelError(
            f"{place}: {_listed('with nan or infinity', wrong)}; that training diverged or the file is damaged, take "
            "an earlier checkpoint"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with nan or infinity."""
    # the sum first: it takes no memory
    return [name for name, each in tensors.items() if not (each.sum().isfinite() or each.isfinite().all())]


def _listed(what: str, names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors {what} ({', '.join(names[:3])}{more})" if names else ""


def load_processor(folder: Path, config: WhisperConfig) -> WhisperProcessor:
    """Load the tokenizer of a folder that has one, and make the feature extractor that the model needs."""
    fix = "copy tokenizer.json of the model that was fine-tuned there"
    with reading(folder, "its tokenizer cannot be read", fix):
        tokenizer = WhisperTokenizer.from_pretrained(folder, **_added_tokens(folder))
        rules = token_rules(tokenizer)
    end, start = rules["eos_token_id"], rules["decoder_start_token_id"]
    # a config that was made in code may have the defaults, which are those of English
    fits = config.decoder_start_token_id in (start, ENGLISH_START) or config.eos_token_id == end
    if len(tokenizer) > config.vocab_size or not fits:
        raise ModelError(
            f"{folder}: the tokenizer is another model's: {len(tokenizer)} tokens, text ends with {end}; by "
            f"{CONFIG_FILE} {config.vocab_size} and {config.eos_token_id}; {fix}"
        )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer)


def _added_tokens(folder: Path) -> dict[str, Any]:
    """Return the special tokens of a tokenizer of before 2023, which transformers 5 would take for text."""
    added, own = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if (folder / TOKENIZER_FILE).is_file() or not added.is_file() or not own.is_file():
        return {}
    if "added_tokens_decoder" in read_settings(own):
        return {}
    tokens = sorted(read_settings(added).items(), key=lambda token: token[1])
    return {"added_tokens_decoder": {
        at: AddedToken(name, special=not name[2:3].isdigit(), normalized=False) for name, at in tokens  # <|0.00|>
    }}  # fmt: skip


def _read_generation(folder: Path, config: WhisperConfig, tokenizer: Any) -> GenerationConfig:
    """Read generation_config.json, and complete what is absent there: old ones know nothing of languages."""
    file, rules = folder / GENERATION_FILE, token_rules(tokenizer)
    settings = read_settings(file) if file.exists() else {}
    settings.pop("forced_decoder_ids", None)  # of old checkpoints; contradicts language and task
    with reading(file, "not the settings of a Whisper", "fetch it again"):
        generation = GenerationConfig.from_dict(settings)
        languages = settings.get("lang_to_id") or {}  # of added tokens, too
        kept = {name: at for name, at in languages.items() if tokenizer.convert_tokens_to_ids(name) == at}
        for key, value in rules.items():
            setattr(generation, key, value | kept if key == "lang_to_id" else value)
        end, token_id = rules["eos_token_id"], tokenizer.convert_tokens_to_ids
        not_speech = NON_SPEECH_TOKENS_MULTI if rules["is_multilingual"] else NON_SPEECH_TOKENS
        special = [rules["decoder_start_token_id"], *range(token_id("<|translate|>"), rules["no_timestamps_token_id"])]
        standard = {
            "suppress_tokens": config.suppress_tokens or [*(i for i in not_speech if i < end), *special],
            "begin_suppress_tokens": [token_id("Ġ"), end],
            **generation_defaults(end),
        }
        for key, value in standard.items():
            if getattr(generation, key, None) is None:
                setattr(generation, key, value)
        for key in ("suppress_tokens", "begin_suppress_tokens"):
            wrong = [i for i in getattr(generation, key) if type(i) is not int or not 0 <= i < config.vocab_size]
            if wrong:
                raise ValueError(f"{key} has {wrong[0]!r}, which is no token")
        for layer, head in getattr(generation, "alignment_heads", None) or ():
            if type(layer) is not int or type(head) is not int:
                raise ValueError(f"alignment_heads has {[layer, head]}, which is no layer and head")
        if (task := getattr(generation, "task", None)) not in (None, "transcribe", "translate"):
            raise ValueError(f"task is transcribe or translate, got {task!r}")
    absent = sorted(standard.keys() - settings.keys())
    if absent:
        logger.info("%s: %s made from the tokenizer", file, ", ".join(absent))
    return generation


def merge_adapter(folder: Path, base_dir: Path, target: Path) -> None:
    """Merge the adapter that PEFT saved in a folder into its base model, and save the result as a checkpoint.

    Tokenizer, generation config and audio context are those of the adapter's folder where it has them.

    Raises:
        ModelError: the adapter is damaged, of a kind that cannot be merged, or of another model.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict  # only adapters need it
    from peft.tuners.lora import Linear as LoraLinear

    model, processor = load_checkpoint(base_dir)
    file = folder / ADAPTER_WEIGHTS
    tensors = {name: tensor.load() for name, tensor in _open_tensors(file).items()}
    check_finite(tensors, file)
    with reading(folder, f"does not fit {base_dir}", "name the base that it was trained on, or merge it with PEFT"):
        settings = PeftConfig.from_pretrained(str(folder))
        if str(getattr(settings, "init_lora_weights", "")).startswith(_CHANGES_BASE):
            raise ValueError(f"init_lora_weights {settings.init_lora_weights!r} has changed the base model as well")
        if hasattr(settings, "_register_custom_module"):  # else PEFT asks every quantisation library in turn
            settings._register_custom_module({nn.Linear: LoraLinear})
        # on the meta device: what adapter_config.json says is not allocated, and what the file lacks stays there
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
        put: Any = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
        missing = [name for name, parameter in adapted.named_parameters() if parameter.is_meta]
        if missing or put.unexpected_keys:
            problems = (_listed("missing", missing), _listed("not of this model", put.unexpected_keys))
            raise ValueError("; ".join(filter(None, problems)))
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    if has_tokenizer(folder):
        processor = load_processor(folder, merged.config)
    if (folder / GENERATION_FILE).exists():
        merged.generation_config = _read_generation(folder, merged.config, processor.tokenizer)
    if (folder / CONFIG_FILE).exists():
        merged.audio_context, rates = own_settings(read_settings(folder / CONFIG_FILE), folder / CONFIG_FILE)
        if rates:
            merged.config.tokens_per_sec = rates
    merged.save_pretrained(target)
    save_processor(processor, target)
