"""Published weights: where they are looked for, how they are read, and loading that forgives nothing."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.errors import RewardError

MODELS_VARIABLE = "TILTFLOW_MODELS"


def models_folder() -> Path:
    """Return the folder of downloaded weights: `$TILTFLOW_MODELS`, or `models/` where the command is called."""
    return Path(os.environ.get(MODELS_VARIABLE, "models")).expanduser()


def hub_snapshot(repo: str) -> Path | None:
    """Return the folder of what the hub's cache has of a repository, which may be a single file; else None."""
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None


@dataclass(frozen=True)
class WeightsFile:
    """One published file of weights.

    Example: `WeightsFile("HPS_v2.1_compressed.pt", repo="xswu/HPSv2", page="huggingface.co/xswu/HPSv2")`.
    """

    name: str  # in the models folder
    page: str  # where people find it
    repo: str | None = None  # hub repository that holds it
    file: str | None = None  # its name there, when it differs

    @property
    def label(self) -> str:
        """The file's name."""
        return self.name

    def find(self) -> Path | None:
        """Return the file from the models folder, else from the hub's cache, else None."""
        path = models_folder() / self.name
        if path.is_file():
            return path
        if self.repo is None:
            return None
        cached = try_to_load_from_cache(self.repo, self.file or self.name)
        return Path(cached) if isinstance(cached, str) else None

    def require(self) -> Path:
        """Return the file.

        Raises:
            RewardError: It is nowhere; says which file, where to get it and where to put it.
        """
        path = self.find()
        if path is not None:
            return path
        cache = f" or download {self.file or self.name} of {self.repo} into the hub's cache" if self.repo else ""
        raise RewardError(
            f"the weights {self.name} were not found; get them from {self.page} and put them at "
            f"{models_folder() / self.name} (or set {MODELS_VARIABLE}){cache}"
        )


@dataclass(frozen=True)
class WeightsFolder:
    """A model folder in Hugging Face format.

    Example: `WeightsFolder("yuvalkirstain/PickScore_v1")`.
    """

    repo: str  # hub repository, whose last part is the folder's name in the models folder; or the path of a folder

    @property
    def label(self) -> str:
        """The repository."""
        return self.repo

    def find(self) -> Path | None:
        """Return the folder: `repo` itself if it is one, else `models/<last part>`, else the hub's cache, else None."""
        places = [Path(self.repo)]
        if not self._is_path():
            places.append(models_folder() / self.repo.rpartition("/")[2])
        for path in places:
            if (path / "config.json").is_file():
                return path
        cached = hub_snapshot(self.repo)
        return cached if cached is not None and (cached / "config.json").is_file() else None

    def require(self) -> Path:
        """Return the folder.

        Raises:
            RewardError: It is nowhere; says which model, where to get it and where to put it.
        """
        path = self.find()
        if path is not None:
            return path
        if self._is_path():
            raise RewardError(
                f"there is no model at {self.repo} (a folder with a config.json); if a run makes it, let that run end "
                "first: `tiltflow train-reward CONFIG` writes OUTPUT_DIR/model"
            )
        cached = hub_snapshot(self.repo) is not None
        state = "is in the hub's cache without a config.json; download all of" if cached else "was not found; download"
        raise RewardError(
            f"the model {self.repo} {state} it (hf download {self.repo}) or put its folder at "
            f"{models_folder() / self.repo.rpartition('/')[2]} (or set {MODELS_VARIABLE})"
        )

    def _is_path(self) -> bool:
        """Whether no repository can have this name: those are `name` or `owner/name`."""
        return self.repo.count("/") > 1 or self.repo.startswith(("/", ".", "~"))


@dataclass(frozen=True)
class FirstOf:
    """Files of which any one will do.

    Example: `FirstOf((WeightsFile("new.pth", page="..."), WeightsFile("old.pth", page="...")))`.
    """

    files: tuple[WeightsFile, ...]  # the best first

    @property
    def label(self) -> str:
        """The best one's name."""
        return self.files[0].label

    def find(self) -> Path | None:
        """Return the first that is there, or None."""
        return next((path for file in self.files if (path := file.find()) is not None), None)

    def require(self) -> Path:
        """Return the first that is there.

        Raises:
            RewardError: None is; asks for the best.
        """
        return self.find() or self.files[0].require()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights to the CPU: safetensors, or a torch file of tensors only (nothing in it is run).

    A torch file may hold the weights under `state_dict`, as training scripts write them.

    Raises:
        RewardError: The file cannot be read, or holds something else than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise RewardError(f"the weights {path} cannot be read: {error}; download them again") from error
    except Exception as error:  # weights_only=True raises pickle.UnpicklingError for anything that is not a tensor
        raise RewardError(f"the weights {path} hold more than tensors and are not opened: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RewardError(f"the weights {path} are no mapping of names to tensors")
    return {str(name): value for name, value in content.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights into a module; a missing, unexpected or misshapen one is an error.

    Raises:
        RewardError: The two do not fit; names the source and the first differences.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RewardError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(dict(state), strict=True)
