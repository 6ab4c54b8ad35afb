"""Every example in the documentation is run: Python blocks executed, YAML blocks and commands parsed."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tiltflow.cli import _parser
from tiltflow.commands import find_kind
from tiltflow.config import (
    EvaluateConfig,
    PretrainConfig,
    RunConfig,
    SampleConfig,
    normalise_rewards,
    resolve_key,
)
from tiltflow.reward_training.fit_config import FitConfig, FitRunConfig
from tiltflow.rewards import RewardArguments, check_reward
from tiltflow.runtime.overrides import NO_VALUE, read_overrides

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {
    "train": RunConfig,
    "train-reward": FitRunConfig,
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
}
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def blocks(language):
    found = []
    for page in PAGES:
        for index, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(text, id=f"{page.name}-{index}"))
    assert found
    return found


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs(source):
    exec(compile(source, "documentation", "exec"), {})


@pytest.mark.parametrize("source", blocks("yaml"))
def test_yaml_is_valid(source):
    values = yaml.safe_load(source)
    if values.keys() == {"train"}:
        assert FitConfig.model_validate(values["train"])
        return
    if "model" in values:
        assert find_kind(values["model"]["reward_model_type"]).config.model_validate(values)
        return
    for entry in normalise_rewards(values["rewards"]):
        assert check_reward(RewardArguments.model_validate(entry))


@pytest.mark.parametrize("source", blocks("bash"))
def test_commands_parse_and_their_overrides_exist(source):
    commands = [line for line in source.splitlines() if "tiltflow " in line and not line.startswith("#")]
    for line in commands:
        words = shlex.split(line, comments=True)
        known, rest = _parser().parse_known_args(words[words.index("tiltflow") + 1 :])
        overrides = read_overrides(rest)
        assert not overrides or known.command in SCHEMAS
        for key, value in overrides:
            assert resolve_key(key, SCHEMAS[known.command])
            assert value != NO_VALUE


def test_links_to_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_tree_names_every_source_file():
    tree = (ROOT / "README.md").read_text()
    folders = ("src/tiltflow", "benchmarks", "examples", "scripts")
    files = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".sh")}
    files = {*files, *(path.name for path in (ROOT / "docs").glob("*.md"))} - {"__init__.py"}
    assert [name for name in sorted(files) if f" {name} " not in tree] == []
