"""CLIP networks and tokenizers from files: folders of transformers, checkpoints of open_clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tiltflow.errors import RewardError
from tiltflow.scorers.checkpoints import WeightsFolder, hub_snapshot, models_folder, read_weights
from tiltflow.scorers.clip_backbone import BackboneKey, ClipBackbone, resolve_device, shared_backbone
from tiltflow.scorers.open_clip import HiddenAct, load_open_clip

# Hub repositories with CLIP's tokenizer: one BPE vocabulary of 49408 tokens serves every published CLIP.
TOKENIZER_REPOS: Final = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14")

# Index buffers that transformers wrote into checkpoints before 4.31.
_OLD_BUFFERS: Final = frozenset(
    {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"},
)


def load_clip_folder(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    share: bool = True,
) -> ClipBackbone:
    """Load a CLIP from a folder in transformers' format.

    Args:
        folder: With `config.json` and the weights; with the tokenizer too, or that is looked for elsewhere.
        device: Where it computes.
        dtype: In which it computes.
        tokenizer: Folder or hub repository of the tokenizer; None looks for it.
        share: Return the backbone that this process already has of the same weights; False to train it.

    Raises:
        RewardError: The folder is no CLIP, its weights do not fit, or there is no tokenizer.
    """

    def network() -> CLIPModel:
        return read_clip_folder(folder)

    return _load(folder, (folder,), network, device=device, dtype=dtype, tokenizer=tokenizer, share=share, form="")


def load_clip_checkpoint(
    path: Path,
    *,
    hidden_act: HiddenAct,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    share: bool = True,
) -> ClipBackbone:
    """Load a CLIP from a file in open_clip's layout.

    Args:
        path: The weights, flat or under `state_dict`.
        hidden_act: See `load_open_clip`.
        device: Where it computes.
        dtype: In which it computes.
        tokenizer: Folder or hub repository of the tokenizer; None looks for it.
        share: Return the backbone that this process already has of the same weights; False to train it.

    Raises:
        RewardError: The file cannot be read or is no such CLIP, or there is no tokenizer.
    """

    def network() -> CLIPModel:
        return load_open_clip(read_weights(path), hidden_act=hidden_act, source=str(path))

    return _load(path, (), network, device=device, dtype=dtype, tokenizer=tokenizer, share=share, form=hidden_act)


def read_clip_folder(folder: Path) -> CLIPModel:
    """Read a CLIPModel in float32 on the CPU; missing, unexpected or misshapen weights are an error.

    Raises:
        RewardError: The folder is no CLIP, or its weights cannot be read or do not fit.
    """
    remedy = "download the model again, or name another folder"
    try:
        kind = CLIPConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind != "clip":
            raise RewardError(f"{folder} holds a model of the type {kind!r}, not 'clip'; name the folder of a CLIP")
        loaded: Any = CLIPModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below by name
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RewardError(f"the model in {folder} cannot be read: {error}; {remedy}") from error
    model, report = loaded
    problems = [f"missing {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(set(report["unexpected_keys"]) - _OLD_BUFFERS)]
    problems += [
        f"{name} is {list(found)} instead of {list(own)}" for name, found, own in sorted(report["mismatched_keys"])
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RewardError(f"the weights in {folder} do not fit CLIPModel: {'; '.join(problems[:3])}{more}; {remedy}")
    return model.eval()


def tokenizer_folder(folders: Sequence[Path] = (), *, name: str | None = None) -> Path | None:
    """Return the first folder that has CLIP's tokenizer; the arguments are those of `find_tokenizer`."""
    if name is not None:
        places = [WeightsFolder(name).find(), Path(name), hub_snapshot(name)]
    else:
        repos = [repo.rpartition("/")[2] for repo in TOKENIZER_REPOS]
        places = [*folders, *(models_folder() / repo for repo in repos)]
        places += [hub_snapshot(repo) for repo in TOKENIZER_REPOS]
    return next((place for place in places if place is not None and _has_tokenizer(place)), None)


@dataclass(frozen=True)
class TokenizerFiles:
    """CLIP's tokenizer as something that must be on this machine."""

    name: str | None = None  # folder or hub repository that must have it; None: any place that is looked into

    @property
    def label(self) -> str:
        """What people call it."""
        return f"CLIP's tokenizer ({self.name or TOKENIZER_REPOS[-1]})"

    def find(self) -> Path | None:
        """Return its folder, or None."""
        return tokenizer_folder(name=self.name)


def find_tokenizer(folders: Sequence[Path] = (), *, name: str | None = None) -> CLIPTokenizer:
    """Load CLIP's tokenizer from the first place that has it.

    Args:
        folders: Looked into first, such as the model's own.
        name: Folder or hub repository that must have it; None looks into the models folder and the hub's cache.

    Raises:
        RewardError: There is none; says where it was looked for and what to do.
    """
    folder = tokenizer_folder(folders, name=name)
    if folder is not None:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if name is not None:
        raise RewardError(f"tokenizer={name!r}: it has neither tokenizer.json nor vocab.json and merges.txt")
    beside = "".join(f"beside the model in {folder}, " for folder in folders)
    raise RewardError(
        "CLIP's tokenizer was not found (tokenizer.json, or vocab.json and merges.txt); download it "
        f"(hf download {TOKENIZER_REPOS[-1]} tokenizer.json vocab.json merges.txt) or put its files {beside}"
        f"or at {models_folder() / TOKENIZER_REPOS[-1].rpartition('/')[2]}"
    )


def _has_tokenizer(folder: Path) -> bool:
    pair = (folder / "vocab.json", folder / "merges.txt")
    return (folder / "tokenizer.json").is_file() or all(path.is_file() for path in pair)


def _load(
    source: Path,
    folders: Sequence[Path],
    network: Callable[[], CLIPModel],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    tokenizer: str | None,
    share: bool,
    form: str,
) -> ClipBackbone:
    """Return the shared backbone of these files, or build one."""
    place = resolve_device(device)

    def build() -> ClipBackbone:
        words = find_tokenizer(folders, name=tokenizer)  # before the gigabytes are read
        return ClipBackbone(_cast(network(), dtype), words).to(place)

    if not share:
        return build()
    key = BackboneKey("\n".join((str(source.resolve()), form, tokenizer or "")), place, dtype)
    return shared_backbone(key, build)


def _cast(model: CLIPModel, dtype: torch.dtype) -> CLIPModel:
    """Change the dtype of all but the logit scale: bfloat16 would make 100 of it 98.9."""
    scale = model.logit_scale.data.clone()
    model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    model.logit_scale.data = scale
    return model
