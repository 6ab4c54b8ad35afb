"""Language models and classifiers from folders in Hugging Face format, and back."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GenericForSequenceClassification

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import WeightsFolder
from tiltflow.scorers.language_head import RewardHead
from tiltflow.scorers.language_lora import ADAPTER_FILE, load_lora, plain_state, without_lora
from tiltflow.types import DTYPES

HEAD_KEY: Final = "reward_head"  # in config.json
HEAD_FILE: Final = "reward_head.json"  # beside an adapter
# Tokens that models keep for padding though their tokenizer does not say so.
PADDING: Final = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<PAD>")
NEW_PADDING: Final = "<|pad|>"
# How heads are called that transformers' classifiers do not know.
FOREIGN_HEAD: Final = re.compile(r"v_head|rm_head|.*(score|value|reward|regress|critic|rank|classif)")
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
    require_head: bool,
    seed: int,
    append_eos: bool,
    dropout: bool,
    attn_implementation: str | None,
    dtype: torch.dtype,
) -> LoadedClassifier:
    """Do the work of `LanguageRewardModel.from_pretrained`.

    Raises:
        RewardError: As there.
    """
    options = {"dropout": dropout, "attn_implementation": attn_implementation, "dtype": dtype}
    if (Path(source) / ADAPTER_FILE).is_file():
        if new_head:
            raise RewardError(f"new_head=True: the adapter in {source} brings its head; load the model that it is for")
        loaded = _load_adapter(Path(source), head, **options)
    else:
        loaded = _load_folder(
            WeightsFolder(str(source)).require(),
            head,
            new_head=new_head,
            require_head=require_head,
            seed=seed,
            **options,
        )
    if append_eos:
        end_texts(loaded.tokenizer)
        if loaded.tokenizer.eos_token_id == unread_token(without_lora(loaded.network)):
            raise RewardError(
                f"append_eos: the classifier in {source} takes its end-of-text token for padding and does not read it; "
                "leave append_eos out, or begin with a new head (new_head: true)"
            )
    return loaded


def unread_token(classifier: Any) -> int | None:
    """Return the token that a causal classifier of transformers skips at the end of a text; others skip none."""
    return padding_of(classifier.config) if _has_score(classifier) else None


def padding_of(config: Any) -> int | None:
    """Return the token that a config calls padding, if it does."""
    return config.get_text_config().to_dict().get("pad_token_id")


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


def settle_padding(classifier: Any, tokenizer: Any, *, pad: int | None) -> None:
    """Let a classifier and its tokenizer agree on padding, a token that no text ends with.

    transformers finds the last token of a text as the last one that is not padding: were padding the end-of-text token,
    it would look past the end of every text. A classifier that was trained so, with a `pad` of its own, keeps it.
    """
    keeps = pad is not None and 0 <= pad < classifier.get_input_embeddings().num_embeddings
    if keeps and pad in tokenizer.all_special_ids:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    elif tokenizer.pad_token_id is None or (not keeps and tokenizer.pad_token_id == tokenizer.eos_token_id):
        known = tokenizer.get_vocab()
        found = next((word for word in PADDING if word in known), NEW_PADDING)
        tokenizer.add_special_tokens({"pad_token": found})
    _set_padding(classifier, tokenizer, pad if keeps else tokenizer.pad_token_id)


def _set_padding(classifier: Any, tokenizer: Any, pad: int | None) -> None:
    """Write into a config which token is padding; the embedding grows if the tokenizer's has no row."""
    if tokenizer.pad_token_id >= classifier.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):  # the row of padding, which no text attends to, is drawn from it
            torch.manual_seed(0)
            classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    classifier.config.get_text_config().pad_token_id = classifier.config.pad_token_id = pad


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
    config = classifier.config
    names = head.attribute_names or _names(config.id2label, head.num_attributes)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}
    config.problem_type = "regression"
    setattr(config, HEAD_KEY, head.model_dump(mode="json"))
    classifier.save_pretrained(folder, state_dict=plain_state(network))
    tokenizer.save_pretrained(folder)


def _names(id2label: Mapping[int, str], count: int) -> tuple[str, ...]:
    """Return the names that a folder gives its attributes, or better ones than transformers' LABEL_0, LABEL_1."""
    own = tuple(str(id2label[place]) for place in range(count))
    if own != tuple(f"LABEL_{place}" for place in range(count)):
        return own
    return ("reward",) if count == 1 else tuple(f"attribute_{place}" for place in range(count))


def write_head(head: RewardHead, config: Any, folder: Path) -> None:
    """Write what a head gives, and the padding it knows, beside an adapter, whose folder has no `config.json`."""
    content = {**head.model_dump(mode="json"), "pad_token_id": padding_of(config)}
    (folder / HEAD_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _load_folder(
    folder: Path,
    changes: RewardHead | Mapping[str, Any] | None,
    *,
    new_head: bool,
    require_head: bool,
    seed: int,
    dropout: bool,
    attn_implementation: str | None,
    dtype: torch.dtype,
) -> LoadedClassifier:
    """Load a classifier or a causal language model, which gets a new head."""
    config, tokenizer = _config(folder), _tokenizer(folder)
    pad = padding_of(config)
    known = not new_head and _is_classifier(config)
    found = _own_head(config, folder) or RewardHead(num_attributes=config.num_labels if known else 1)
    head = _changed(found, changes)
    if known and head.num_attributes != config.num_labels:
        raise RewardError(
            f"the classifier in {folder} gives {config.num_labels} numbers for num_attributes={head.num_attributes}; "
            "set that, or ask for a new head (new_head: true)"
        )
    config.num_labels = head.num_attributes
    if not dropout:
        _stop_dropout(config)
    classifier, has_head = _load(
        folder,
        config,
        new_head=new_head,
        head_dtype=DTYPES[head.dtype],
        seed=seed,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    if require_head and not has_head:
        raise RewardError(
            f"{folder} holds {', '.join(config.architectures or ['a model'])}, which has no trained head: its rewards "
            "would be random; make a reward model of it with `tiltflow train-reward`, or name a sequence classifier"
        )
    if not has_head:
        _draw_head(classifier, seed)
    settle_padding(classifier, tokenizer, pad=pad if known else None)
    return LoadedClassifier(classifier, tokenizer, head)


def _load_adapter(
    folder: Path,
    changes: RewardHead | Mapping[str, Any] | None,
    *,
    dropout: bool,
    attn_implementation: str | None,
    dtype: torch.dtype,
) -> LoadedClassifier:
    """Load what an adapter was trained on, then the adapter, which brings its head, tokenizer and padding."""
    try:
        base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        own = json.loads((folder / HEAD_FILE).read_text(encoding="utf-8"))
        pad = own.pop("pad_token_id")
        head = _changed(RewardHead.model_validate(own), changes)
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(f"the adapter in {folder} was not written by save_adapter: {error}") from error
    found, tokenizer = WeightsFolder(base).require(), _tokenizer(folder)
    config = _config(found)
    config.num_labels = head.num_attributes
    if not dropout:
        _stop_dropout(config)
    classifier, _ = _load(
        found,
        config,
        new_head=True,
        head_dtype=DTYPES[head.dtype],
        seed=0,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    _set_padding(classifier, tokenizer, pad)
    return LoadedClassifier(load_lora(classifier, folder), tokenizer, head)


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAILURES as error:
        raise RewardError(f"no language model can be loaded from {folder}: {error}") from error


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


def _load(
    folder: Path,
    config: Any,
    *,
    new_head: bool,
    head_dtype: torch.dtype,
    seed: int,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> tuple[Any, bool]:
    """Load weights strictly, and tell whether the head was among them; only a new one may be missing or misshapen."""
    cls, strict = classifier_class(config), not new_head and _is_classifier(config)
    try:
        with torch.random.fork_rng(devices=[]):  # what is missing is drawn from the global generator
            torch.manual_seed(seed)
            loaded: Any = cls.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                dtype=dtype,
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=not strict,
                output_loading_info=True,
            )
    except FAILURES as error:
        raise RewardError(f"no language model can be loaded from {folder}: {error}") from error
    classifier, report = loaded
    network = f"{classifier.base_model_prefix}."
    misshapen = [str(key[0]) for key in report["mismatched_keys"]]
    absent = [*report["missing_keys"], *misshapen]
    problems = [name for name in absent if strict or name.startswith(network)]
    problems += [name for name in report["unexpected_keys"] if name.startswith(network)]
    if problems:
        raise RewardError(
            f"the weights in {folder} do not fit {type(classifier).__name__}: {len(problems)} are missing, misshapen "
            f"or unexpected, the first being {problems[0]}; download them again"
        )
    if _has_score(classifier):
        classifier.score.to(head_dtype)
    if new_head:
        return classifier, False
    foreign = [name for name in report["unexpected_keys"] if FOREIGN_HEAD.match(name.partition(".")[0])] + misshapen
    own_name = f"{config.to_dict().get('value_head_prefix') or 'value_head'}.weight"  # OpenRLHF's, of the same layer
    renamed = not strict and foreign == [own_name]
    read = _read_head(classifier, folder, own_name if renamed else "score.weight")
    if foreign and not strict and not (renamed and read):
        raise RewardError(
            f"{folder} has a head of its own that does not fit {type(classifier).__name__}: {foreign[0]}; "
            "where a new one shall be trained instead, say so (new_head: true)"
        )
    return classifier, strict or renamed or not absent


def _has_score(classifier: Any) -> bool:
    """Return whether the head is a layer of its own, as in all causal classifiers."""
    return "score" in dict(classifier.named_children())


@torch.no_grad()
def _read_head(classifier: Any, folder: Path, name: str) -> bool:
    """Load a head as exactly as it is stored, not rounded to the network's precision, and tell if it is there."""
    if not _has_score(classifier):
        return False
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118  # it is no dictionary
                found = weights.get_tensor(name)
                if found.shape == classifier.score.weight.shape:
                    classifier.score.weight.copy_(found)
                    return True
    return False


def _draw_head(classifier: Any, seed: int) -> None:
    """Draw the head of a causal classifier anew; other classifiers keep what they were made with."""
    if _has_score(classifier):
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
