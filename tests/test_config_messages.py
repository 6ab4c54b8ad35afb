"""What is said of a config that is wrong: the key and where it was typed, never a secret, never a whole section."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import run_values
from tiltflow import cli
from tiltflow.commands import load_reward_config
from tiltflow.config import PACKAGED, load_run_config, packaged_configs, run_config
from tiltflow.errors import ConfigError, TiltflowError

JUDGE = {"reward_model": "vllm_evaluate", "name": "fits", "api_key": "sk-SECRET", "base_url": "http://a", "model": "m"}
SIZES = {"image_size": 32, "patch_size": 8}


def write(path: Path, values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def values(**sections: Any) -> dict[str, Any]:
    return run_values(Path("model"), Path("out"), **sections)


def image_text(**sections: Any) -> dict[str, Any]:
    """Return the config of a reward model of images whose optional sections are left out."""
    model = {"reward_model_type": "image_text", "from_scratch": SIZES}
    return {"model": model, "data": {"train": {"drawn": {"pairs": 10}}}, **sections}


def language(**sections: Any) -> dict[str, Any]:
    model = {"reward_model_type": "binary_ranking", "pretrained": "somewhere"}
    return {"model": model, "data": {"train": "pairs.jsonl"}, **sections}


def message(given: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        run_config(given, source="my.yaml")
    return str(raised.value)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command says that must end with status 2."""
    assert cli.main(list(words)) == 2
    return capsys.readouterr().err.rstrip("\n").removeprefix(f"tiltflow {words[0]}: ")


# --- secrets and sections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"weight": "heavy"}, "my.yaml: rewards.0.weight='heavy': Input should be a valid number"),
        ({"batch_size": 0}, "my.yaml: rewards.0.batch_size=0: Input should be greater than or equal to 1"),
        ({"weight": {"api_key": "sk-SECRET"}}, "my.yaml: rewards.0.weight: Input should be a valid number; got a mapp"),
        ({"name": ["sk-SECRET"]}, "my.yaml: rewards.0.name: Input should be a valid string; got a list"),
        ({"options": ["sk-SECRET"]}, "rewards: options=a list of 'fits' must be a mapping of the reward's own keys"),
    ],
)
def test_a_wrong_value_in_a_reward_shows_no_secret(wrong: dict[str, Any], expected: str) -> None:
    found = message(values(rewards=[{**JUDGE, **wrong}]))
    assert found.startswith(expected)
    assert "sk-" not in found and "\n" not in found


def test_entries_that_are_no_mappings_show_no_secret() -> None:
    assert "sk-" not in message(values(rewards=[[JUDGE]]))
    with pytest.raises(ConfigError, match=r"^--rewards is not a valid YAML value: line 1: ") as raised:
        load_run_config("shapes_ram", [("rewards", "[{reward_model: vllm_evaluate, api_key: sk-SECRET")])
    assert "sk-" not in str(raised.value)


def test_an_entry_without_its_braces_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    typed = "reward_model: vllm_evaluate, api_key: sk-SECRET"
    found = refused(capsys, "score", "--images", "/tmp", "--rewards", typed)
    assert found.startswith("--rewards is not a valid YAML value: line 1: ") and "sk-" not in found


def test_a_list_that_is_too_short_is_still_told() -> None:
    assert message(values(rewards=[])).startswith("my.yaml: rewards=[]: Tuple should have at least 1 item")


@pytest.mark.parametrize(
    ("section", "own", "expected"),
    [
        ("train", {"early_stop": 2}, "my.yaml: train.early_stop=2 compares evaluations of held-out rewards"),
        ("train", {"advantage_aggregation": "gdpo", "advantage_std": "group"}, "my.yaml: train: "),
        ("policy", {"precision": "fp32", "frozen_dtype": "bf16"}, "my.yaml: policy: precision=fp32 cannot compute"),
    ],
)
def test_what_does_not_fit_together_is_told_without_the_section(
    section: str, own: dict[str, Any], expected: str
) -> None:
    found = message(values(**{section: {**values()[section], **own}}))
    assert found.startswith(expected)
    assert "Value error" not in found and "{" not in found


def test_a_model_with_two_starts_is_told_without_the_section(tmp_path: Path) -> None:
    path = write(tmp_path / "rm.yaml", image_text())
    with pytest.raises(ConfigError) as raised:
        load_reward_config(path, [("model.pretrained", "foo")])
    assert str(raised.value).startswith(f"{path}: model: give either pretrained (a folder or hub repository) or ")


# --- any key can be overridden ----------------------------------------------------------------------------------------


def test_keys_of_sections_that_a_config_leaves_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rm.yaml", image_text())
    typed = [("keep_best.metric", "validation/acc"), ("data.train.drawn.pairs", "100"), ("vision_width", "32")]
    _, config = load_reward_config(path, [*typed, ("train.keep_best.mode", "max")])
    found = config.model_dump()
    assert found["train"]["keep_best"] == {"metric": "validation/acc", "mode": "max", "count": 1}
    assert found["data"]["train"]["drawn"]["pairs"] == 100
    assert (found["model"]["from_scratch"]["vision_width"], found["model"]["from_scratch"]["patch_size"]) == (32, 8)


def test_a_bare_source_is_a_set_of_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "rm.yaml", image_text(data={"train": "a.jsonl", "validation": {"b": "b.jsonl"}}))
    for typed, train in ((), "a.jsonl"), ([("data.train", "pairs/train.jsonl")], "pairs/train.jsonl"):
        data = load_reward_config(path, typed)[1].model_dump()["data"]
        assert (data["train"]["source"], data["train"]["drawn"]) == (train, None)
        assert data["validation"]["b"]["source"] == "b.jsonl"


def test_a_section_that_may_be_left_out_makes_no_other_key_ambiguous(tmp_path: Path) -> None:
    path = write(tmp_path / "lm.yaml", language())
    _, config = load_reward_config(path, [("lora.rank", "8"), ("dropout", "true"), ("lora.dropout", "0.1")])
    model = config.model_dump()["model"]
    assert (model["lora"]["rank"], model["lora"]["dropout"], model["dropout"]) == (8, 0.1, True)


def test_keys_of_mappings(tmp_path: Path) -> None:
    config = load_run_config("shapes_ram", [("tag_shares.colors", "3"), ("data.tag_shares.position", "4e0")])
    shares = load_run_config("shapes_ram").data.tag_shares
    assert config.data.tag_shares == {**(shares or {}), "colors": 3.0, "position": 4.0}
    path = write(tmp_path / "rm.yaml", image_text())
    typed = [("data.validation.mine.source", "1e5"), ("validation.mine.columns.prompt", "yes")]
    held = load_reward_config(path, typed)[1].model_dump()["data"]["validation"]["mine"]
    assert (held["source"], held["columns"]) == ("1e5", {"prompt": "yes"})  # texts stay texts


@pytest.mark.parametrize("key", ["tag_shares.colors.deep", "train.lr.deep", "data.tag_shares.", "lora.rang"])
def test_keys_that_lead_nowhere(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{key} is not a key of the config; "):
        load_run_config("shapes_ram", [(key, "1")])


# --- where a wrong value was typed ------------------------------------------------------------------------------------


def test_a_wrong_value_is_blamed_on_whoever_gave_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", values(train={"lr": "slow"}, sampler={"num_steps": 0}))
    with pytest.raises(TiltflowError) as raised:
        load_run_config(path, [("lr", "abc"), ("rank", "0")])
    assert [line.partition("=")[0] for line in str(raised.value).split("\n")] == [
        "--rank: policy.lora.rank",
        "--lr: train.lr",
        f"{path}: sampler.num_steps",
    ]


def test_a_key_of_training_is_none_of_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "evaluate", "--model_name", "tiny_sd3", "--lr", "1")
    assert said == "--lr: evaluate takes keys of policy and evaluation only"
    said = refused(capsys, "sample", "--model_name", "tiny_sd3", "--prompt", "a star", "--train.epochs", "1")
    assert said == "--train.epochs: sample takes keys of policy and sampler only"


# --- words of the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["score", "--rewards", "OCR", "--images", "imgs/a.png", "imgs/b.png"], "'imgs/b.png' belongs to no option; "),
        (["sample", "--prompt", "a", "photo"], "'photo' belongs to no option; "),
        (["train", "shapes_ram", "--rewards", "[Geneval,", "OCR]"], "'OCR]' belongs to no option; "),
        (["train", "shapes_ram", "--dry-run"], "--dry-run is not a key of the config; "),
        (["train", "shapes_ram", "--lr"], "--lr needs a value"),
        (["train", "shapes_ram", "--rewards"], "--rewards needs a value"),
        (["train-reward", "shapes_preference", "--reward_model_type"], "--reward_model_type needs a value"),
        (["doctor", "--foo"], "--foo is no option of doctor; "),
        (["score", "--rewards", "OCR", "--images", "a", "--foo"], "--foo is no option of score; `tiltflow score "),
        (["serve", "OCR", "--prot", "1"], "--prot is no option of serve; did you mean --port? `tiltflow serve --help`"),
        (
            ["evaluate-reward", "model", "data", "--max_lenght", "3"],
            "--max_lenght is no option of evaluate-reward; did you mean --max_length? `tiltflow ",
        ),
    ],
)
def test_words_that_belong_nowhere(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert refused(capsys, *words).startswith(expected)


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5"])
def test_sizes_that_are_no_sizes(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["score", "--rewards", "OCR", "--images", "a", f"--batch_size={text}"])
    assert f"argument --batch_size: '{text}': use a whole number from 1" in capsys.readouterr().err


def test_print_config_with_an_underscore(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "shapes_ram", "--print_config"]) == 0
    underscore = capsys.readouterr().out
    assert cli.main(["train", "--print-config", "shapes_ram"]) == 0
    assert capsys.readouterr().out == underscore


@pytest.mark.parametrize("command", ["train", "train-reward", "pretrain", "evaluate", "sample"])
def test_help_tells_of_overrides_and_names_the_packaged_configs(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "can be set too" in said
    assert all(name in said for name in cli.WITH_CONFIG.get(command, ()))


def test_help_knows_every_packaged_config() -> None:
    assert sorted(name for names in cli.WITH_CONFIG.values() for name in names) == packaged_configs()
    for command, names in cli.WITH_CONFIG.items():
        for name in names:
            own = yaml.safe_load((PACKAGED / f"{name}.yaml").read_text())
            kind = "train" if "policy" in own else "train-reward" if "data" in own else "pretrain"
            assert kind == command
