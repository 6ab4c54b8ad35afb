"""The public surface: `__all__` tells the truth, and the names and signatures that others rely on stay."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from tiltflow.rewards import PointwiseRewardModel, RewardArguments, RewardModelOutput, build_reward

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "tiltflow"

PINNED = {
    "tiltflow.flow": ["sigma_schedule", "euler_step", "sde_step", "cps_step", "dance_sde_step", "sample"],
    "tiltflow.algorithms": ["ram_target", "ram_loss"],
    "tiltflow.training": ["group_advantages"],
    "tiltflow.reward_training": [
        "preference_kl",
        "bradley_terry",
        "masked_mse",
        "RewardModelType",
        "REWARD_MODEL_CLASS_DICT",
        "PickscoreRewardModel",
        "CLIPRewardModel",
        "get_reward_model",
    ],
    "tiltflow.rewards": [
        "PointwiseRewardModel",
        "GroupwiseRewardModel",
        "RewardModelOutput",
        "RewardArguments",
        "build_reward",
        "RewardEngine",
        "RemotePointwiseRewardModel",
        "RemoteGroupwiseRewardModel",
    ],
    "tiltflow.scorers": [
        "ClipScorer",
        "AestheticScorer",
        "ImageRewardScorer",
        "LanguageRewardModel",
        "clip_preprocess",
        "hps_preprocess",
    ],
    "tiltflow.serving": ["RewardServer"],
    "tiltflow.rewards.geneval": ["Detection", "score_detections"],
    "tiltflow.testing": ["ToyPolicy", "ConstantReward", "QuadraticReward"],
}

# The calls that users write. `...` stands for any default.
STEP = (
    "(sample, velocity, sigma, sigma_next, *, noise_level,"
    " sigma_max=None, noise=None, prev_sample=None, generator=None)"
)
ADVANTAGES = "(scores, groups, *, weights=None, aggregation='sum', std='global', valid=None)"
REWARD = "(self, config, accelerator=None)"
SIGNATURES = {
    "tiltflow.flow:sde_step": STEP,
    "tiltflow.flow:cps_step": STEP,
    "tiltflow.flow:dance_sde_step": STEP,
    "tiltflow.algorithms:ram_target": "(v_ref, v_old, x0, eps, advantages, *, reward_multiplier)",
    "tiltflow.algorithms:ram_loss": "(v_theta, target)",
    "tiltflow.training:group_advantages": ADVANTAGES,
    "tiltflow.reward_training:preference_kl": "(rewards_0, rewards_1, labels)",
    "tiltflow.reward_training:get_reward_model": "(cfg, mbs, gbs)",
    "tiltflow.reward_training:PickscoreRewardModel.get_reward": "(self, images, captions)",
    "tiltflow.reward_training:CLIPRewardModel.get_reward": "(self, images, captions)",
    "tiltflow.rewards:build_reward": "(name_or_python_path, *, device=..., dtype=..., batch_size=..., **options)",
    "tiltflow.rewards:PointwiseRewardModel.__init__": REWARD,
    "tiltflow.rewards:GroupwiseRewardModel.__init__": REWARD,
    "tiltflow.rewards:RemotePointwiseRewardModel.__init__": REWARD,
    "tiltflow.rewards:RemoteGroupwiseRewardModel.__init__": REWARD,
    "tiltflow.serving:RewardServer.compute_reward": (
        "(self, prompts, images=None, videos=None, condition_images=None, condition_videos=None, metadata=None)"
    ),
    "tiltflow.reward_training:bradley_terry": (
        "(rewards_chosen, rewards_rejected, *, margin=None, scale=None, center_coefficient=None, mask=None)"
    ),
    "tiltflow.reward_training:masked_mse": "(predictions, labels, *, ignore_value=-100.0)",
    "tiltflow.scorers:clip_preprocess": "(images, *, size=224)",
    "tiltflow.scorers:hps_preprocess": "(images, *, size=224, antialias=True)",
    "tiltflow.scorers:ClipScorer": "(backbone, *, kind, scale=None, antialias=True)",
    "tiltflow.scorers:ClipScorer.score": "(self, images, prompts)",
    "tiltflow.rewards.geneval:Detection": "(label, x1, y1, x2, y2, score, color=None)",
    "tiltflow.rewards.geneval:score_detections": "(detections, metadata, *, quirks='clean')",
}


def resolve(path: str) -> object:
    """Return the object that "module:Class.attribute" names."""
    module, _, attributes = path.partition(":")
    found: object = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def describe(arguments: ast.arguments) -> list[tuple[str, str, str]]:
    """Return the name, the kind and the default ("" for none) of every argument of a written signature."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    rows = [(a.arg, "positional", ast.unparse(d) if d else "") for a, d in zip(positional, defaults, strict=True)]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    rows += [(a.arg, "keyword", ast.unparse(d) if d else "") for a, d in pairs]
    return rows + ([(arguments.kwarg.arg, "any keyword", "")] if arguments.kwarg else [])


def mismatches(function: object, pinned: str) -> list[str]:
    """Compare a callable with the signature that users rely on; more keyword arguments with defaults are no harm."""
    definition = ast.parse(f"def f{pinned}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    wanted = describe(definition.args)
    assert callable(function)
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
        inspect.Parameter.VAR_KEYWORD: "any keyword",
    }
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    found = {
        p.name: (kinds.get(p.kind, str(p.kind)), "" if p.default is empty else repr(p.default)) for p in parameters
    }
    problems = []
    for name, kind, default in wanted:
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name][0] != kind:
            problems.append(f"{name} is {found[name][0]}, not {kind}")
        elif found[name][1] != default and not (default == "..." and found[name][1]):
            problems.append(f"{name} has the default {found[name][1] or 'nothing'}, not {default or 'nothing'}")
    names = [name for name, kind, _ in wanted if kind == "positional"]
    if [name for name, (kind, _) in found.items() if kind == "positional"] != names:
        problems.append(f"the positional arguments are not {names} in this order")
    extra = set(found) - {name for name, _, _ in wanted}
    return problems + [f"{name} is new and has no default" for name in sorted(extra) if found[name] == ("keyword", "")]


def reading_order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Order constants before classes before the rest, numbers by value: the order that the linter (RUF022) asks for."""
    rank = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    pieces = re.findall(r"\d+|\D+", name)
    return rank, [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]


def surfaces() -> list[str]:
    """Return the rooms whose `__init__` defines `__all__`."""
    files = sorted(PACKAGE.glob("*/__init__.py"))
    return [path.parent.name for path in files if "__all__" in path.read_text(encoding="utf-8")]


def imported_names(source: str) -> set[str]:
    """Return the public names that a module imports at its top level."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name.split(".")[0] for node in nodes for alias in node.names}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("room", surfaces())
def test_all_is_the_truth(room: str) -> None:
    module = importlib.import_module(f"tiltflow.{room}")
    names = list(module.__all__)
    assert len(names) == len(set(names)), "a name stands twice in __all__"
    assert names == sorted(names, key=reading_order)
    assert [name for name in names if getattr(module, name, None) is None] == []
    imported = imported_names((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    assert imported - set(names) == set(), "imported in __init__ but not in __all__"


def test_rooms_with_a_surface_are_found() -> None:
    assert {"flow", "algorithms", "rewards", "training"} <= set(surfaces())


@pytest.mark.parametrize("path", [f"{module}:{name}" for module, names in PINNED.items() for name in names])
def test_pinned_name_is_importable(path: str) -> None:
    found = resolve(path)
    assert callable(found) or (path.endswith("_DICT") and all(map(callable, found.values())))


@pytest.mark.parametrize("path", SIGNATURES)
def test_pinned_signature(path: str) -> None:
    assert mismatches(resolve(path), SIGNATURES[path]) == []


@pytest.mark.parametrize("step", ["sde_step", "cps_step", "dance_sde_step"])
def test_step_result_has_its_four_fields(step: str) -> None:
    latents = torch.zeros(2, 3)
    generator = torch.Generator().manual_seed(0)
    function = getattr(importlib.import_module("tiltflow.flow"), step)
    result = function(latents, latents, 0.5, 0.4, noise_level=0.5, generator=generator)
    assert result.prev_sample.shape == result.mean.shape == latents.shape
    assert result.log_prob.shape == (2,)
    assert torch.as_tensor(result.std).numel() >= 1


class MyReward(PointwiseRewardModel):
    """The documented way to write a reward, to the letter."""

    required_fields = ("prompt",)
    use_tensor_inputs = False

    def __init__(self, config: RewardArguments, accelerator=None):
        super().__init__(config, accelerator)

    @torch.no_grad()
    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        return RewardModelOutput(rewards=torch.zeros(len(prompt), device=self.device))


def test_custom_reward_is_built_from_its_python_path() -> None:
    reward = build_reward("tests.test_public_names.MyReward", device="cpu", batch_size=3)
    assert isinstance(reward, PointwiseRewardModel)
    assert reward.required_fields == ("prompt",)
    assert reward(prompt=["a", "b"]).rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("pinned", "problem"),
    [
        ("(a, b=1, *, c=2)", None),
        ("(a, b=1)", None),
        ("(a, b=..., *, c=...)", None),
        ("(a, b, *, c=2)", "b has the default 1"),
        ("(a, b=2, *, c=2)", "b has the default 1"),
        ("(a, b=1, *, d)", "d is missing"),
        ("(a, b=1, c=2)", "c is keyword"),
        ("(b, a=1)", "in this order"),
        ("(a)", "the positional arguments are not"),
        ("(a=..., b=1)", "a has the default nothing"),
    ],
)
def test_changed_signature_is_caught(pinned: str, problem: str | None) -> None:
    def function(a: int, b: int = 1, *, c: int = 2) -> int:
        return a + b + c

    found = mismatches(function, pinned)
    assert (problem is None) == (found == [])
    assert problem is None or any(problem in line for line in found)


def test_new_required_keyword_is_caught() -> None:
    def function(a: int, *, c: int) -> int:
        return a + c

    assert mismatches(function, "(a)") == ["c is new and has no default"]


def test_imported_names_and_order() -> None:
    assert imported_names("from tiltflow.flow.steps import a, b as c, _d\nimport torch.nn\nx = 1") == {
        "a",
        "c",
        "torch",
    }
    assert sorted(["step10", "step2", "Step", "STEP"], key=reading_order) == ["STEP", "Step", "step2", "step10"]
