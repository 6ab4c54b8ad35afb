"""Settings of every test run: no network, few threads, the same numbers each time."""

import os

# What the machine has must not matter: a proxy, which would be asked for 127.0.0.1 too, tokens, or weights.
os.environ.pop("HTTP_PROXY", None)
os.environ.pop("http_proxy", None)
os.environ.pop("HTTPS_PROXY", None)
os.environ.pop("https_proxy", None)
os.environ.pop("ALL_PROXY", None)
os.environ.pop("all_proxy", None)
os.environ.pop("TILTFLOW_SERVER_TOKEN", None)
os.environ.pop("TILTFLOW_MODELS", None)
os.environ.update(
    {
        "HF_HUB_CACHE": os.path.join(os.path.dirname(__file__), "no_models"),  # there is no such folder
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DIFFUSERS_OFFLINE": "1",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
)
os.environ.setdefault("OMP_NUM_THREADS", "2")

# Only now: the hub reads the environment when it is imported.
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# On a GPU some backward passes, such as that of resizing, have no deterministic kernel.
if not torch.cuda.is_available():
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from one global seed, so that the order of the tests does not matter."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Stable Diffusion 3 of the real classes, made once per run."""
    from tests.tiny import save_random_sd3

    return save_random_sd3(tmp_path_factory.mktemp("random_sd3"))


@pytest.fixture(scope="session")
def isolated_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with only what a reward server needs, made once per run."""
    from tests.isolated import make_environment

    return make_environment(tmp_path_factory.mktemp("isolated"))
