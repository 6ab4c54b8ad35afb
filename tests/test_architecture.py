"""The rules of the house, checked on the source: who may import what, where a framework lives, what is forbidden.

Every check is a function of a module name and its source text, so that each is also shown to catch a bad snippet.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "tiltflow"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Room -> what it may import besides itself. An entry with a dot allows that module of the room only.
BASE = {"types", "errors"}
BELOW_TRAINING = BASE | {"flow", "runtime", "data", "policies", "scorers", "rewards", "algorithms"}
BELOW_REPORT = BELOW_TRAINING | {"reward_training", "training", "serving"}
ALLOWED: dict[str, set[str]] = {
    "": BASE,  # tiltflow/__init__.py itself
    "types": set(),
    "errors": set(),
    "flow": BASE,
    "runtime": BASE,
    "data": BASE | {"runtime"},
    "policies": BASE | {"flow", "runtime", "scorers.clip_tokenizer"},  # small models of both rooms read with it
    "scorers": BASE,
    "rewards": BASE
    | {"scorers", "serving.wire", "runtime.pixels"}
    | {"data.preferences", "data.records"},  # texts as in training
    "reward_training": BASE | {"scorers", "data", "runtime"},
    "algorithms": {"types", "flow"},
    "training": BELOW_TRAINING,
    "serving": BASE | {"runtime.malloc", "runtime.pixels"},  # which need no torch
    "serving.builtin": BASE | {"rewards"},
    "evaluation": BELOW_REPORT,
    "report": BELOW_REPORT | {"evaluation"},
    "demo": BASE | {"data", "rewards"},
    "demo.run": BASE | {"data", "rewards", "evaluation", "report", "cli", "runtime.tracking"},
    "testing": BASE | {"flow", "policies.base", "policies.parameters", "rewards.base"},
    "config": BELOW_REPORT | {"evaluation", "report", "demo"},
    "commands": BELOW_REPORT | {"evaluation", "report", "config"},
    "cli": BASE | {"config", "commands", "runtime.malloc", "runtime.overrides"},
    "__main__": {"cli"},
}

# Framework -> the rooms or modules that may import it.
HOMES: dict[str, set[str]] = {
    "diffusers": {"policies"},
    "peft": {"policies", "scorers.language_lora"},
    "tokenizers": {"scorers"},
    "transformers": {"policies", "scorers"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "python_multipart": {"serving.multipart"},
    "prometheus_client": {"serving.prometheus"},
    "ray": {"serving.ray_engine"},
    "openai": {"rewards.judge", "rewards.remote"},
    "httpx": {"rewards.judge", "rewards.remote"},
    "httpx2": {"rewards.judge", "rewards.network", "rewards.remote", "rewards.retries", "rewards.transport"},
    "httpcore2": {"rewards.network"},
    "stamina": {"rewards.retries"},
    "wandb": {"runtime.tracking"},
    "tensorboard": {"runtime.tracking"},
    "torch.utils.tensorboard": {"runtime.tracking"},
    "trackio": {"runtime.tracking"},
    "cv2": {"demo"},
    "accelerate": {"runtime"},
    "rapidocr": {"rewards.ocr"},
    "rapidfuzz": {"rewards.ocr"},
}
HOMES_FOR_TYPES = {"accelerate": {"rewards.base"}}  # under `if TYPE_CHECKING:` only
OPTIONAL = {"wandb", "tensorboard", "torch.utils.tensorboard", "trackio", "openai", "rapidocr", "rapidfuzz"}
OPTIONAL |= {"httpx2", "httpcore2", "stamina"}
OPTIONAL |= {"python_multipart", "prometheus_client", "ray"}
# Modules that subclass what is in optional packages: they import them at their top, and are imported where used.
DEFERRED = {"rewards.network"}

FORBIDDEN_NAMES = {
    "hasattr": "state capabilities as class attributes",
    "inspect.signature": "state capabilities as class attributes",
    "pickle.load": "read safetensors or JSON",
    "pickle.loads": "read safetensors or JSON",
    "pickle.Unpickler": "read safetensors or JSON",
    "eval": "parse the text",
    "exec": "parse the text",
}
FORBIDDEN_FLAGS = {("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True)}


@dataclass(frozen=True)
class Imported:
    """One imported name."""

    target: str  # absolute and dotted, with the name that `from` takes: "tiltflow.flow.sample"
    line: int
    for_types: bool  # under `if TYPE_CHECKING:`
    deferred: bool  # inside a function


def within(name: str, prefix: str) -> bool:
    """Tell whether a dotted name is `prefix` or lies in it."""
    return name == prefix or name.startswith(f"{prefix}.")


def dotted(node: ast.AST) -> str:
    """Return "a.b.c" for such an expression, and "" for any other."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute) if prefix := dotted(value):
            return f"{prefix}.{attribute}"
        case _:
            return ""


def targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Return the absolute names that one node imports, `importlib.import_module("name")` included."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=source, names=names, level=level):
            parts = ["tiltflow", *module.split(".")] if module else ["tiltflow"]
            parents = parts[: len(parts) - level + is_package] if level else []
            return [".".join([*parents, *([source] if source else []), alias.name]) for alias in names]
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            is_import = dotted(func).split(".")[-1] in ("import_module", "__import__")
            return [name.partition(":")[0]] if is_import else []
        case _:
            return []


def imports(module: str, source: str, *, is_package: bool = False) -> list[Imported]:
    """Return every import of a module whose name is given without the leading "tiltflow."."""
    found: list[Imported] = []

    def visit(node: ast.AST, for_types: bool, deferred: bool) -> None:
        found.extend(Imported(name, node.lineno, for_types, deferred) for name in targets(node, module, is_package))
        if isinstance(node, ast.If) and dotted(node.test).split(".")[-1] == "TYPE_CHECKING":
            for child in node.body:
                visit(child, True, deferred)
            for child in node.orelse:
                visit(child, for_types, deferred)
            return
        deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, for_types, deferred)

    visit(ast.parse(source), False, False)
    return found


def check_arrows(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Rule 1: a room is known, and imports only what its row of the table allows."""
    room = module.split(".")[0]
    if room not in ALLOWED:
        return [f"{module}: the room {room!r} is not in the table; add a row that says what it may import"]
    row = ALLOWED[module if module in ALLOWED else room]
    problems = []
    for item in imports(module, source, is_package=is_package):
        if not within(item.target, "tiltflow"):
            continue
        name = item.target.removeprefix("tiltflow").removeprefix(".")
        allowed = name in ("", "__version__") or any(within(name, entry) for entry in row | {room} if entry)
        if not allowed:
            problems.append(f"{module}:{item.line} imports {item.target}; this room may import {sorted(row)}")
    return problems


def check_frameworks(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Rule 2: each framework lives in its rooms, and an optional one is imported where it is used."""
    problems = []
    for item in imports(module, source, is_package=is_package):
        for framework in filter(lambda name: within(item.target, name), HOMES):
            homes = HOMES[framework] | (HOMES_FOR_TYPES.get(framework, set()) if item.for_types else set())
            if not any(within(module, home) for home in homes):
                problems.append(f"{module}:{item.line} imports {framework}, which lives in {sorted(homes)}")
            if framework in OPTIONAL and module not in DEFERRED and not (item.deferred or item.for_types):
                problems.append(f"{module}:{item.line} imports the optional {framework} at the top of the module")
        for name in filter(lambda name: within(item.target, f"tiltflow.{name}"), DEFERRED):
            if not (item.deferred or item.for_types):
                problems.append(f"{module}:{item.line} imports {name} at its top, which needs an optional package")
    return problems


def local_names(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for, so that an alias hides nothing."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                names.update({alias.asname: alias.name for alias in aliases if alias.asname})
            case ast.ImportFrom(module=str(source), names=aliases):
                names.update({alias.asname or alias.name: f"{source}.{alias.name}" for alias in aliases})
    return names


def check_forbidden(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Rule 8: no probing of objects, no star import, nothing that runs code found in data."""
    tree = ast.parse(source)
    names = local_names(tree)
    problems = []
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(names=aliases) if any(alias.name == "*" for alias in aliases):
                problems.append(f"{module}:{node.lineno} has a star import; name what is used")
            case ast.Name() | ast.Attribute():
                head, _, rest = dotted(node).partition(".")
                name = ".".join(filter(None, [names.get(head, head), rest])).removeprefix("builtins.")
                if name in FORBIDDEN_NAMES:
                    problems.append(f"{module}:{node.lineno} uses {name}; {FORBIDDEN_NAMES[name]} instead")
            case ast.keyword(arg=str(flag), value=ast.Constant(value=bool(value))) if (flag, value) in FORBIDDEN_FLAGS:
                problems.append(f"{module}:{node.value.lineno} passes {flag}={value}")
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    pair = (getattr(key, "value", None), getattr(value, "value", None))  # None unless both are literals
                    if isinstance(pair[1], bool) and pair in FORBIDDEN_FLAGS:
                        problems.append(f"{module}:{node.lineno} holds {pair[0]}={pair[1]}")
            case ast.Call(keywords=words) if dotted(node.func) == "torch.load":
                if not any(word.arg == "weights_only" for word in words):
                    problems.append(f"{module}:{node.lineno} calls torch.load without weights_only=True")
    return problems


def check_sizes(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Rule 9: a file or a function that has outgrown its room is split by meaning."""
    problems = []
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        problems.append(f"{module} has {lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(
                    f"{module}:{node.lineno} {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"
                )
    return problems


def check_syntax(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Python 3.10 can read the file."""
    try:
        ast.parse(source, feature_version=(3, 10))
    except SyntaxError as error:
        return [f"{module}:{error.lineno} {error.msg}"]
    return []


Check = Callable[..., list[str]]
CHECKS: list[Check] = [check_arrows, check_frameworks, check_forbidden, check_sizes, check_syntax]


def modules() -> Iterator[tuple[str, str, bool]]:
    """Yield the name (without "tiltflow."), the source and "is a package" of every file of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_keeps_the_rule(check: Check) -> None:
    found = list(modules())
    assert len(found) > 10, f"no package at {PACKAGE}"
    problems = [problem for name, source, is_package in found for problem in check(name, source, is_package=is_package)]
    assert not problems, "\n" + "\n".join(problems)


BAD: list[tuple[Check, str, str, str]] = [
    # rule 1
    (check_arrows, "shop.till", "", "'shop' is not in the table"),
    (check_arrows, "shop", "", "'shop' is not in the table"),
    (check_arrows, "flow.steps", "import tiltflow.policies.base", "imports tiltflow.policies.base"),
    (check_arrows, "flow.steps", "from tiltflow import policies", "imports tiltflow.policies"),
    (check_arrows, "flow.steps", "from ..policies import base", "imports tiltflow.policies.base"),
    (check_arrows, "flow.steps", "from .. import policies", "imports tiltflow.policies"),
    (check_arrows, "flow.steps", "def f():\n    from tiltflow.data import x", "imports tiltflow.data.x"),
    (check_arrows, "flow.steps", "if TYPE_CHECKING:\n    from tiltflow.data import x", "imports tiltflow.data.x"),
    (check_arrows, "flow.steps", "import_module('tiltflow.data')", "imports tiltflow.data"),
    (check_arrows, "flow.steps", "importlib.import_module('tiltflow.data.x:Y')", "imports tiltflow.data.x"),
    (check_arrows, "types", "from tiltflow.errors import DataError", "imports tiltflow.errors"),
    (check_arrows, "algorithms.ram", "from tiltflow.errors import ConfigError", "imports tiltflow.errors"),
    (check_arrows, "algorithms.ram", "from tiltflow.training import x", "imports tiltflow.training"),
    (check_arrows, "data.stream", "from tiltflow.flow import sample", "imports tiltflow.flow"),
    (check_arrows, "scorers.clip", "from tiltflow.rewards.base import x", "imports tiltflow.rewards"),
    (check_arrows, "rewards.remote", "from tiltflow.serving import app", "imports tiltflow.serving.app"),
    (check_arrows, "rewards.remote", "from tiltflow.serving.wired import x", "imports tiltflow.serving.wired"),
    (check_arrows, "serving.batcher", "from tiltflow.rewards import RewardEngine", "imports tiltflow.rewards"),
    (check_arrows, "serving.app", "from tiltflow.rewards import RewardEngine", "imports tiltflow.rewards"),
    (check_arrows, "training.trainer", "from tiltflow.serving import wire", "imports tiltflow.serving"),
    (check_arrows, "training.trainer", "from tiltflow.reward_training import x", "imports tiltflow.reward_training"),
    (check_arrows, "training.trainer", "from tiltflow.evaluation import x", "imports tiltflow.evaluation"),
    (check_arrows, "training.trainer", "from tiltflow.config import RunConfig", "imports tiltflow.config"),
    (check_arrows, "reward_training.trainer", "from tiltflow.rewards import x", "imports tiltflow.rewards"),
    (check_arrows, "evaluation", "from tiltflow.report import x", "imports tiltflow.report"),
    (check_arrows, "cli", "from tiltflow.training import x", "imports tiltflow.training"),
    (check_arrows, "evaluation", "from tiltflow.demo import scenes", "imports tiltflow.demo"),
    (check_arrows, "demo.scenes", "from tiltflow.evaluation import x", "imports tiltflow.evaluation"),
    (check_arrows, "demo.run", "from tiltflow.training import x", "imports tiltflow.training"),
    (check_arrows, "testing", "from tiltflow.rewards.engine import x", "imports tiltflow.rewards.engine"),
    (check_arrows, "config", "from tiltflow.cli import main", "imports tiltflow.cli"),
    (check_arrows, "__main__", "from tiltflow.config import x", "imports tiltflow.config"),
    # rule 2
    (check_frameworks, "training.pretrain", "from diffusers import SD3Transformer2DModel", "imports diffusers"),
    (check_frameworks, "training.pretrain", "def f():\n    import diffusers.utils", "imports diffusers"),
    (check_frameworks, "scorers.clip", "import_module('peft')", "imports peft"),
    (check_frameworks, "policies.sd3", "import tokenizers", "imports tokenizers"),
    (check_frameworks, "rewards.clip", "from transformers import CLIPModel", "imports transformers"),
    (check_frameworks, "rewards.remote", "import fastapi", "imports fastapi"),
    (check_frameworks, "cli", "def f():\n    import uvicorn", "imports uvicorn"),
    (check_frameworks, "rewards.base", "def f():\n    import openai", "imports openai"),
    (check_frameworks, "rewards.judge", "import openai", "optional openai"),
    (check_frameworks, "serving.prometheus", "import prometheus_client", "optional prometheus_client"),
    (check_frameworks, "serving.ray_engine", "import ray", "optional ray"),
    (check_frameworks, "serving.running", "def f():\n    import ray.serve", "imports ray"),
    (check_frameworks, "serving.server", "import httpx", "imports httpx"),
    (check_frameworks, "serving.server", "def f():\n    import httpx2", "imports httpx2"),
    (check_frameworks, "rewards.transport", "import httpx2", "optional httpx2"),
    (check_frameworks, "rewards.transport", "def f():\n    import_module('stamina')", "imports stamina"),
    (check_frameworks, "rewards.transport", "from tiltflow.rewards.network import Network", "imports rewards.network"),
    (check_frameworks, "rewards.network", "import stamina", "imports stamina"),
    (check_frameworks, "rewards.transport", "def f():\n    import httpcore2", "imports httpcore2"),
    (check_frameworks, "training.trainer", "def f():\n    import wandb", "imports wandb"),
    (check_frameworks, "rewards.geneval", "import cv2", "imports cv2"),
    (check_frameworks, "training.trainer", "from accelerate import Accelerator", "imports accelerate"),
    (check_frameworks, "rewards.base", "from accelerate import Accelerator", "imports accelerate"),
    (check_frameworks, "runtime.tracking", "import wandb", "optional wandb"),
    (
        check_frameworks,
        "runtime.tracking",
        "try:\n    import trackio\nexcept ImportError:\n    pass",
        "optional trackio",
    ),
    (check_frameworks, "runtime.tracking", "class A:\n    import tensorboard", "optional tensorboard"),
    (check_frameworks, "runtime.tracking", "from torch.utils import tensorboard", "optional torch.utils.tensorboard"),
    # rule 8
    (check_forbidden, "x", "if hasattr(model, 'vae'): pass", "uses hasattr"),
    (check_forbidden, "x", "list(filter(hasattr, []))", "uses hasattr"),
    (check_forbidden, "x", "import builtins\nbuiltins.hasattr(a, 'b')", "uses hasattr"),
    (check_forbidden, "x", "from tiltflow.flow import *", "star import"),
    (check_forbidden, "x", "import inspect\ninspect.signature(f)", "uses inspect.signature"),
    (check_forbidden, "x", "import inspect as i\ni.signature(f)", "uses inspect.signature"),
    (check_forbidden, "x", "from inspect import signature as s\ns(f)", "uses inspect.signature"),
    (check_forbidden, "x", "import pickle\npickle.loads(b)", "uses pickle.loads"),
    (check_forbidden, "x", "from pickle import load\nload(b)", "uses pickle.load"),
    (check_forbidden, "x", "eval('1')", "uses eval"),
    (check_forbidden, "x", "torch.load(p, weights_only=False)", "passes weights_only=False"),
    (check_forbidden, "x", "torch.load(p)", "torch.load without weights_only=True"),
    (check_forbidden, "x", "AutoModel.from_pretrained(p, trust_remote_code=True)", "passes trust_remote_code=True"),
    (check_forbidden, "x", "options = {'trust_remote_code': True}", "holds trust_remote_code=True"),
    # rule 9
    (check_sizes, "x", "a = 1\n" * 401, "401 lines"),
    (check_sizes, "x", "def f():\n" + "    a = 1\n" * 60, "f has 61 lines"),
    (check_sizes, "x", "class A:\n    async def g(self):\n" + "        a = 1\n" * 60, "g has 61 lines"),
    # Python 3.10
    (check_syntax, "x", "try:\n    pass\nexcept* ValueError:\n    pass", "3.11"),
]

GOOD: list[tuple[Check, str, str]] = [
    (check_arrows, "", "from tiltflow.errors import TiltflowError"),
    (check_arrows, "flow.steps", "from tiltflow.types import Config\nfrom .paths import interpolate\nimport torch"),
    (check_arrows, "flow.steps", "from tiltflow.errors import DataError\nfrom tiltflow import __version__"),
    (check_arrows, "algorithms.ram", "from tiltflow.flow.paths import interpolate\nfrom tiltflow.types import Config"),
    (check_arrows, "rewards.remote", "from tiltflow.serving import wire\nfrom tiltflow.serving.wire import Request"),
    (check_arrows, "serving.builtin", "from tiltflow.rewards import build_reward\nfrom tiltflow.serving import wire"),
    (check_arrows, "demo.run", "from tiltflow.cli import main\nfrom tiltflow.report import write"),
    (check_arrows, "demo.reward", "from tiltflow.rewards.base import PointwiseRewardModel"),
    (check_arrows, "testing", "from tiltflow.policies.base import Policy\nfrom tiltflow.rewards import base"),
    (check_arrows, "cli", "from tiltflow.config import RunConfig\nfrom tiltflow.commands import x"),
    (check_arrows, "__main__", "from tiltflow.cli import main"),
    (check_arrows, "flow.steps", "import tiltflowers"),
    (check_frameworks, "policies.sd3", "import diffusers, peft, transformers"),
    (check_frameworks, "scorers.clip", "from transformers import CLIPModel"),
    (check_frameworks, "demo.scenes", "import cv2"),
    (check_frameworks, "rewards.base", "if TYPE_CHECKING:\n    from accelerate import Accelerator"),
    (check_frameworks, "runtime.tracking", "class A:\n    def __init__(self):\n        import wandb"),
    (check_frameworks, "runtime.tracking", "if TYPE_CHECKING:\n    import trackio"),
    (check_frameworks, "flow.steps", "import peftology"),
    (check_frameworks, "rewards.network", "import httpcore2\nimport httpx2"),
    (check_frameworks, "rewards.transport", "def f():\n    from tiltflow.rewards.network import Network"),
    (check_forbidden, "x", "model.eval()\ntorch.load(p, weights_only=True)\ngetattr(a, 'b')\nself.signature(f)"),
    (check_forbidden, "x", "import json\njson.loads(s)\nf(trust_remote_code=False)\n'hasattr'"),
    (check_sizes, "x", "a = 1\n" * 400),
    (check_sizes, "x", "def f():\n" + "    a = 1\n" * 59),
    (check_syntax, "x", "match a:\n    case int() | str():\n        pass"),
]


@pytest.mark.parametrize(("check", "module", "source", "message"), BAD)
def test_violation_is_caught(check: Check, module: str, source: str, message: str) -> None:
    problems = check(module, source)
    assert len(problems) == 1, problems
    assert message in problems[0]


@pytest.mark.parametrize(("check", "module", "source"), GOOD)
def test_lawful_code_passes(check: Check, module: str, source: str) -> None:
    assert check(module, source) == []


def test_relative_import_in_a_package_file_counts_from_the_package() -> None:
    assert check_arrows("flow", "from .steps import sde_step", is_package=True) == []
    assert len(check_arrows("flow", "from ..data import x", is_package=True)) == 1
