"""What a run goes on after: a reward that is run in another way; and after what it does not: another reward."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import run_values
from tiltflow import cli
from tiltflow.commands.train import changed_values
from tiltflow.config import dump, run_config
from tiltflow.errors import ConfigError
from tiltflow.evaluation import EvaluationResult

FAR = {"name": "far", "reward_model": "RemotePointwiseRewardModel", "server_url": "http://a", "model": "m"}
JUDGE = {"name": "judge", "reward_model": "rational_rewards_t2i"}
OCR = {"name": "ocr", "reward_model": "OCR"}


def config_of(*rewards: dict[str, Any]) -> Any:
    return run_config({**run_values(Path("model"), Path("out")), "rewards": list(rewards)}, source="my.yaml")


@pytest.mark.parametrize(
    ("before", "changes", "line"),
    [
        (OCR, {"on_error": "mask"}, "reward 'ocr'.on_error: None -> 'mask'"),
        (OCR, {"num_workers": 2}, "reward 'ocr'.num_workers: 1 -> 2"),
        (OCR, {"batch_size": 2}, "reward 'ocr'.batch_size: 16 -> 2"),
        (OCR, {"async_reward": True}, "reward 'ocr'.async_reward: False -> True"),
        (OCR, {"device": "cpu"}, "reward 'ocr'.device: 'auto' -> 'cpu'"),
        (OCR, {"workers": 1}, "reward 'ocr'.options.workers: None -> 1"),
        (FAR, {"timeout": 5}, "reward 'far'.timeout: None -> 5.0"),
        (FAR, {"server_url": "http://b"}, "reward 'far'.options.server_url: 'http://a' -> 'http://b'"),
        (FAR, {"retry_attempts": 9}, "reward 'far'.options.retry_attempts: None -> 9"),
        (JUDGE, {"max_concurrent": 2}, "reward 'judge'.options.max_concurrent: None -> 2"),
        (JUDGE, {"api_base_url": "http://b"}, "reward 'judge'.options.api_base_url: None -> 'http://b'"),
    ],
)
def test_how_a_reward_is_run_may_change(
    tmp_path: Path, before: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config_of(before)))
    assert changed_values(saved, config_of(before)) == []
    assert changed_values(saved, config_of({**before, **changes})) == [line]


@pytest.mark.parametrize(
    "rewards",
    [
        [{**FAR, "model": "other"}, OCR],
        [{**FAR, "weight": 2.0}, OCR],
        [{**FAR, "name": "near"}, OCR],
        [{**FAR, "pixels": "uint8"}, OCR],
        [{**FAR, "model": None}, OCR],
        [FAR, {**OCR, "reward_model": "JPEGCompressibility"}],
        [FAR, {**OCR, "detection_side": 640}],
        [FAR, {**OCR, "dtype": "bfloat16"}],
        [FAR],
        [FAR, OCR, JUDGE],
    ],
)
def test_another_reward_makes_another_run(tmp_path: Path, rewards: list[dict[str, Any]]) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config_of(FAR, OCR)))
    with pytest.raises(ConfigError, match=r"holds another run \(rewards: "):
        changed_values(saved, config_of(*rewards))


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({**FAR, "model": None}, {"server_url": "http://b"}),  # the only model of the server: the address decides
        ({"name": "q", "reward_model": "DeQAScore", "model": "m"}, {"base_url": "http://b/v1"}),  # asked otherwise
    ],
)
def test_an_address_that_decides_what_is_measured_makes_another_run(
    tmp_path: Path, before: dict[str, Any], changes: dict[str, Any]
) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config_of(before)))
    with pytest.raises(ConfigError, match=r"holds another run \(rewards: "):
        changed_values(saved, config_of({**before, **changes}))


def test_the_remedy_that_a_stopped_run_names_can_be_used_on_it(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = {"name": "mine", "reward_model": "tests.rewards_for_tests.BreaksLater"}
    held = {"name": "held", "reward_model": "tests.rewards_for_tests.Brightness"}
    out, path = tmp_path / "out", tmp_path / "run.yaml"

    def train(reward: dict[str, Any], held: dict[str, Any]) -> str:
        values = run_values(random_sd3, out, train={"save_every": 50})
        path.write_text(yaml.safe_dump({**values, "rewards": [reward], "eval_rewards": [held]}))
        assert cli.main(["train", str(path)]) == 2
        return capsys.readouterr().err

    assert "set on_error: mask for this reward to leave such samples out instead; the weights after epoch 1" in train(
        reward, held
    )
    before = (out / "evaluations" / "before.json").stat()
    told = train({**reward, "on_error": "mask", "batch_size": 2}, {**held, "on_error": "mask"})
    assert f"warning: {out} goes on with another value: reward 'mine'.on_error: None -> 'mask'\n" in told
    assert f"resuming {out} after epoch 1\n" in told
    assert "more than train.max_failure_fraction" in told
    again = (out / "evaluations" / "before.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # the same reward: known already


def test_a_result_of_another_reward_is_measured_again(random_sd3: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "run.yaml"
    for reward in ("Brightness", "Redness"):
        values = run_values(random_sd3, out, train={"epochs": 1})
        held = {"name": "held", "reward_model": f"tests.rewards_for_tests.{reward}"}
        path.write_text(yaml.safe_dump({**values, "eval_rewards": [held]}))
        assert cli.main(["train", str(path)]) == 0
        stored = EvaluationResult.load(out / "evaluations" / "before.json")
        assert stored.settings["rewards"][0]["reward_model"] == held["reward_model"]
