"""Secrets in the options of rewards: what is saved, printed or tracked shows stars, and what is built has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pydantic import SecretStr

from tests.rewards.reward_server import Script, serving
from tests.rewards.samples import entry
from tests.tiny import run_values
from tiltflow import cli
from tiltflow.commands import score as score_module
from tiltflow.commands.train import changed_values
from tiltflow.config import dump, run_config
from tiltflow.errors import ConfigError, RewardError
from tiltflow.evaluation import EvaluationResult
from tiltflow.rewards import build_reward_model, check_reward, identity, reward_class, sealed_reward
from tiltflow.rewards.secrets import STARS, secret_keys, secret_names
from tiltflow.serving.builtin import make_scorer, source_of
from tiltflow.serving.jobs import Sample

KEYED = "tests.rewards_for_tests.Keyed"
KEY = "right-k3y"
REMOTE = {"name": "far", "reward_model": "RemotePointwiseRewardModel", "server_url": "http://localhost:1"}
JUDGE = {"name": "judge", "reward_model": "rational_rewards_t2i"}


def config_of(*rewards: Any, **more: Any) -> Any:
    values = {**run_values(Path("model"), Path("out")), "rewards": list(rewards), **more}
    return run_config(values, source="my.yaml")


def test_secrets_are_told_by_their_type() -> None:
    names = {name: secret_names(reward_class(name).Options) for name in (KEYED, "OCR", "vllm_evaluate", "DeQAScore")}
    assert names == {KEYED: ("key", "password"), "OCR": (), "vllm_evaluate": ("api_key",), "DeQAScore": ("api_key",)}
    assert secret_keys(reward_class(KEYED).Options) == {"key", "key_env", "password"}
    assert secret_keys(reward_class("RemotePointwiseRewardModel").Options) == {"token", "token_env"}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (REMOTE | {"token": KEY}, "token"),
        (JUDGE | {"api_key": KEY}, "api_key"),
        ({"reward_model": KEYED, "key": KEY}, "key"),
        ({"reward_model": KEYED, "options": {"password": KEY}}, "password"),
    ],
)
def test_a_config_shows_stars_and_is_refused_with_them(written: dict[str, Any], name: str) -> None:
    for place in ("rewards", "eval_rewards"):
        given = {"rewards": ["OCR"], place: [written]}
        config = config_of(*given.pop("rewards"), **given)
        (reward,) = getattr(config, place)
        assert KEY not in dump(config) + repr(config) + json.dumps(config.model_dump(mode="json")) + identity(reward)
        saved = yaml.safe_load(dump(config))
        assert saved[place][0]["options"][name] == STARS == "**********"
        with pytest.raises(RewardError) as raised:
            run_config(saved, source="saved.yaml")
        assert str(raised.value).startswith(
            f"reward {reward.name!r}: {name}='**********' is what a saved config shows in place of a secret; give the "
            "secret anew"
        )
        assert (f"or name an environment variable with {name}_env" in str(raised.value)) == (name != "password")
        run_config(saved, source="saved.yaml", check_rewards=False)  # as for looking at a checkpoint's images
        check_reward(reward)
        assert reward_class(reward.reward_model).Options.model_validate(dict(reward.options)).__dict__[
            name
        ] == SecretStr(KEY)


def test_what_is_no_secret_stays_readable() -> None:
    config = config_of(
        REMOTE | {"token_env": "FAR_TOKEN"}, JUDGE | {"api_key": "EMPTY"}, {"reward_model": KEYED, "stops": 3}
    )
    saved = yaml.safe_load(dump(config))
    assert [reward["options"] for reward in saved["rewards"]] == [
        {"server_url": "http://localhost:1", "token_env": "FAR_TOKEN"},
        {"api_key": "EMPTY"},
        {"stops": 3},
    ]
    assert run_config(saved, source="saved.yaml") == config


def test_print_config_shows_stars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**run_values(Path("model"), Path("out")), "rewards": [REMOTE | {"token": KEY}]}))
    assert cli.main(["train", str(path), "--print-config"]) == 0
    told = capsys.readouterr().out
    assert f"token: '{STARS}'" in told and KEY not in told


def test_a_sealed_reward_still_opens_its_server() -> None:
    script = Script("length", token=KEY)
    with serving(script) as url:
        options = {"server_url": url, "required_fields": ["prompt"], "token": KEY}
        far: Any = build_reward_model(sealed_reward(entry("far", "RemotePointwiseRewardModel", options=options)))
        assert far(prompt=["abc"]).rewards.tolist() == [3.0]
    assert script.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(far.config) + repr(vars(far))


def test_rewards_of_different_secrets_are_different_rewards() -> None:
    one, same, other = (
        sealed_reward(entry(name, KEYED, options={"key": key}))
        for name, key in (("a", KEY), ("b", KEY), ("c", "right-other"))
    )
    assert identity(one) == identity(same) != identity(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": KEY}, "server_url: Field required"),
        ({"server_url": "http://a", "token": [KEY]}, "token: Input should be a valid string"),
        ({"server_url": "http://a", "tokens": KEY}, "unknown key 'tokens'; did you mean 'token'?"),
        ({"server_url": "http://a", "token": KEY, "token_env": "T"}, "token_env: Value error, give token or token_env"),
        ({"server_url": "http://a", "token": KEY, "retry_attempts": 0}, "retry_attempts: .*; got 0$"),
    ],
)
def test_no_message_about_options_shows_a_secret(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=f"reward 'far': {message}") as raised:
        check_reward(entry("far", "RemotePointwiseRewardModel", options=options))
    assert KEY not in str(raised.value)
    assert raised.value.__suppress_context__
    with pytest.raises(ConfigError, match=r"got the keys name, token$"):
        config_of({"name": "far", "token": KEY})


# --- runs -------------------------------------------------------------------------------------------------------------


def test_another_secret_makes_no_other_run(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    before = config_of(
        REMOTE | {"token": KEY}, JUDGE | {"api_key": KEY}, eval_rewards=[{"reward_model": KEYED, "key": KEY}]
    )
    readable = dump(before).replace(STARS, KEY)  # as earlier versions saved it
    for text in (dump(before), readable):
        saved.write_text(text)
        assert changed_values(saved, before) == []
        assert changed_values(saved, config_of(REMOTE | {"token": "other"}, JUDGE, eval_rewards=[KEYED])) == []
        assert changed_values(saved, config_of(REMOTE | {"token_env": "T"}, JUDGE, eval_rewards=[KEYED])) == []
        with pytest.raises(ConfigError, match=r"holds another run \(rewards: ") as raised:
            changed_values(saved, config_of(REMOTE | {"token": KEY, "model": "other"}, JUDGE))
        assert KEY not in str(raised.value)
        (line,) = changed_values(saved, config_of(REMOTE, JUDGE, eval_rewards=[{"reward_model": KEYED, "stops": 2}]))
        assert line.startswith("eval_rewards: ") and KEY not in line


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_run_leaves_its_secret_nowhere_and_goes_on_with_another(
    random_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(key: str, epochs: int) -> int:
        reward = [{"name": "mine", "reward_model": KEYED, "key": key}]
        values = run_values(random_sd3, tmp_path / "out", rewards=reward, train={"epochs": epochs})
        values["tracking"] = {"tensorboard": True}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return cli.main(["train", str(tmp_path / "run.yaml")])

    assert train(KEY, 1) == 0
    assert train("right-too", 2) == 0
    told = capsys.readouterr()
    assert "goes on with another value" in told.err and "rewards" not in told.err
    written = tmp_path / "out"
    assert files_with(STARS, written) and not files_with(KEY, written) and not files_with("right-", written)
    assert KEY not in told.out + told.err

    checkpoint = ["--checkpoint", str(written / "latest"), "--output_dir", str(tmp_path / "more")]
    assert cli.main(["evaluate", *checkpoint, "--max_prompts", "1"]) == 2
    assert "give the secret anew, or name an environment variable with key_env" in capsys.readouterr().err
    again = ["--rewards", f"{{reward_model: {KEYED}, key: {KEY}}}"]
    assert cli.main(["evaluate", *checkpoint, *again, "--max_prompts", "1", "--name", "again"]) == 0
    result = EvaluationResult.load(tmp_path / "more" / "again.json")
    assert result.settings["rewards"][0]["options"] == {"key": STARS}
    assert not files_with(KEY, tmp_path / "more")


def test_an_interrupted_scoring_keeps_no_secret_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(2):
        Image.new("RGB", (4, 4), (100 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("a\nb\n")

    def score(key: str) -> list[Any]:
        rows = score_module.run_scoring(
            images=str(tmp_path / "*.png"),
            rewards=[f"{{reward_model: {KEYED}, name: k, key: {key}}}"],
            prompts=str(tmp_path / "prompts.txt"),
            output=tmp_path / "out" / "scores.jsonl",
            batch_size=4,
            group_size=1,
        )
        return [row["scores"]["k"] for row in rows]

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score_module, "write_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(KEY)
    assert list((tmp_path / "out").iterdir()) and not files_with(KEY, tmp_path / "out")
    assert score("right-too") == pytest.approx([0.0, 1000 / 255])


def test_a_served_reward_gets_its_secret_and_its_revision_does_not_tell_it() -> None:
    made = [
        make_scorer(**source_of(sealed_reward(entry("k", KEYED, options={"key": key}))).options)
        for key in (KEY, "right-too")
    ]
    assert len({scorer.describe().revision for scorer in made}) == 1
    image = torch.full((3, 2, 2), 0.5).numpy()
    assert made[0].score([Sample(prompt="p", image=image)])[0] == [5.0]
