"""Language models and classifiers from folders in Hugging Face format, and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GenericForSequenceClassification

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.language_head import RewardHead
from tiltflow.scorers.language_lora import ADAPTER_FILE, load_lora, plain_state, without_lora

HEAD_KEY: Final = "reward_head"  # in config.json
HEAD_FILE: Final = "reward_head.json"  # beside an adapter
# Tokens that models keep for padding though their tokenizer does not say so.
PADDING: Final = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<PAD>")
NEW_PADDING: Final = "<|pad|>"
FAILURES: Final = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier, maybe with LoRA, its tokenizer, and what its head gives."""

    network: Any
    tokenizer: Any
    head: RewardHead


def load_classifier(
    source: str | Path,
    *,
    head: RewardHead | Mapping[str, Any] | None,
    new_head: bool,
    seed: int,
    append_eos: bool,
    dropout: bool,
    attention: str | None,
    dtype: torch.dtype,
) -> LoadedClassifier:
    """Do the work of `LanguageRewardModel.from_pretrained`.

    Raises:
        RewardError: As there.
    """
    if (Path(source) / ADAPTER_FILE).is_file():
        return _load_adapter(Path(source), head, dropout=dropout, attention=attention, dtype=dtype)
    folder = WeightsFolder(str(source)).require()
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAILURES as error:
        raise RewardError(f"no language model can be loaded from {folder}: {error}") from error
    tokenizer = _tokenizer(folder)
    has_head = not new_head and any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    found = _own_head(config, folder) or RewardHead(num_attributes=config.num_labels if has_head else 1)
    head = _changed(found, head)
    if has_head and head.num_attributes != config.num_labels:
        raise RewardError(
            f"the classifier in {folder} gives {config.num_labels} numbers for num_attributes={head.num_attributes}; "
            "set that, or ask for a new head (new_head: true)"
        )
    config.num_labels = head.num_attributes
    if not dropout:
        _stop_dropout(config)
    classifier = _load(folder, config, has_head=has_head, seed=seed, dtype=dtype, attention=attention)
    if not has_head:
        _new_head(classifier, seed)
        settle_padding(classifier, tokenizer)
    elif tokenizer.pad_token_id is None:
        settle_padding(classifier, tokenizer)
    text_config = classifier.config.get_text_config()
    text_config.pad_token_id = classifier.config.pad_token_id = tokenizer.pad_token_id
    if append_eos:
        end_texts(tokenizer)
    return LoadedClassifier(classifier, tokenizer, head)


def classifier_class(config: Any) -> Any:
    """Return the sequence classifier of an architecture; where transformers has none, one is made in its manner.

    Raises:
        RewardError: The architecture has no text model that a head could be put on.
    """
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return AutoModelForSequenceClassification._model_mapping[type(config)]
    if type(config) not in AutoModel._model_mapping:
        raise RewardError(
            f"{type(config).__name__}: transformers has neither a classifier nor a bare model of this architecture; "
            "use another model"
        )
    network: Any = AutoModel._model_mapping[type(config)]
    name = f"{network.__name__.removesuffix('Model')}ForSequenceClassification"
    attributes = {"__module__": __name__, "base_model_prefix": network.base_model_prefix or "model"}
    return type(name, (GenericForSequenceClassification, network.__bases__[0]), attributes)


def settle_padding(classifier: Any, tokenizer: Any) -> None:
    """Give a tokenizer a padding token of its own, one that no text ends with; the embedding grows if it must.

    transformers finds the last token of a text as the last one that is not padding: were padding the end-of-text token,
    it would look past the end of every text.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        found = next((word for word in PADDING if word in known), NEW_PADDING)
        tokenizer.add_special_tokens({"pad_token": found})
    rows = classifier.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= rows:
        with torch.random.fork_rng(devices=[]):  # the row of padding, which no text attends to, is drawn from it
            torch.manual_seed(0)
            classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def end_texts(tokenizer: Any) -> None:
    """Let a tokenizer end every text with its end-of-text token, also after it was saved and loaded.

    Raises:
        RewardError: It has none, or is not of the kind that can.
    """
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise RewardError(
            f"append_eos: the {type(tokenizer).__name__} of the model has no end-of-text token, or is none of the "
            "tokenizers library; leave append_eos out"
        )
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    # Whatever it puts before a text (or nothing), then the text, then the end.
    before = tokenizer("a")["input_ids"][: -len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    words = [(tokenizer.convert_ids_to_tokens(token), token) for token in [*before, tokenizer.eos_token_id]]
    single = " ".join([*(f"{word}:0" for word, _ in words[:-1]), "$A:0", f"{words[-1][0]}:0"])
    pair = single.replace("$A:0", "$A:0 $B:1")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(dict.fromkeys(words))
    )


def save_classifier(network: Any, tokenizer: Any, head: RewardHead, folder: Path) -> None:
    """Write a plain sequence classifier with its tokenizer; LoRA is merged in what is written."""
    classifier = without_lora(network)
    names = head.attribute_names or (
        ("reward",) if head.num_attributes == 1 else tuple(f"attribute_{place}" for place in range(head.num_attributes))
    )
    config = classifier.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}
    config.problem_type = "regression"
    setattr(config, HEAD_KEY, head.model_dump(mode="json"))
    classifier.save_pretrained(folder, state_dict=plain_state(network))
    tokenizer.save_pretrained(folder)


def write_head(head: RewardHead, folder: Path) -> None:
    """Write what a head gives beside an adapter, whose folder has no `config.json`."""
    (folder / HEAD_FILE).write_text(json.dumps(head.model_dump(mode="json"), indent=2), encoding="utf-8")


def _load_adapter(
    folder: Path,
    changes: RewardHead | Mapping[str, Any] | None,
    *,
    dropout: bool,
    attention: str | None,
    dtype: torch.dtype,
) -> LoadedClassifier:
    """Load what an adapter was trained on, then the adapter, which brings its head and tokenizer."""
    try:
        base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        own = RewardHead.model_validate_json((folder / HEAD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(f"the adapter in {folder} was not written by save_adapter: {error}") from error
    head = _changed(own, changes)
    loaded = load_classifier(
        base, head=head, new_head=True, seed=0, append_eos=False, dropout=dropout, attention=attention, dtype=dtype
    )
    return LoadedClassifier(load_lora(loaded.network, folder), _tokenizer(folder), head)


def _changed(own: RewardHead, head: RewardHead | Mapping[str, Any] | None) -> RewardHead:
    """Return a head with changes, or another one."""
    if isinstance(head, RewardHead):
        return head
    try:
        return RewardHead.model_validate({**own.model_dump(), **(head or {})})
    except ValidationError as error:
        raise RewardError(f"the head of the model: {error.errors()[0]['msg']}") from error


def _own_head(config: Any, folder: Path) -> RewardHead | None:
    """Return the head that a folder's `config.json` describes, if it does."""
    found = config.to_dict().get(HEAD_KEY)
    if found is None:
        return None
    try:
        return RewardHead.model_validate(found)
    except ValidationError as error:
        raise RewardError(f"{folder}: {HEAD_KEY} in config.json is wrong: {error.errors()[0]['msg']}") from error


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAILURES as error:
        raise RewardError(f"no tokenizer can be loaded from {folder}: {error}; put the model's own there") from error


def _load(folder: Path, config: Any, *, has_head: bool, seed: int, dtype: torch.dtype, attention: str | None) -> Any:
    """Load weights strictly: where a head is made, only that may be missing or of another shape."""
    cls = classifier_class(config)
    try:
        with torch.random.fork_rng(devices=[]):  # what is missing is drawn from the global generator
            torch.manual_seed(seed)
            loaded: Any = cls.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                dtype=dtype,
                attn_implementation=attention,
                ignore_mismatched_sizes=not has_head,
                output_loading_info=True,
            )
    except FAILURES as error:
        raise RewardError(f"no language model can be loaded from {folder}: {error}") from error
    classifier, report = loaded
    network = f"{classifier.base_model_prefix}."
    absent = [*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])]
    problems = [name for name in absent if has_head or name.startswith(network)]
    problems += [name for name in report["unexpected_keys"] if name.startswith(network)]
    if problems:
        raise RewardError(
            f"the weights in {folder} do not fit {type(classifier).__name__}: {len(problems)} are missing, misshapen "
            f"or unexpected, the first being {problems[0]}; download them again"
        )
    return classifier


def _new_head(classifier: Any, seed: int) -> None:
    """Draw the head of a causal classifier anew; other classifiers keep what they were made with."""
    if "score" in dict(classifier.named_children()):
        weight = classifier.score.weight
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1)
        with torch.no_grad():
            weight.copy_(drawn)


def _stop_dropout(config: Any) -> None:
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float) and value:
                setattr(part, name, 0.0)
