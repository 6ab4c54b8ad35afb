"""The run schema: packaged configs, overrides, and a helpful message for everything that can be wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import run_values
from tiltflow.config import (
    PACKAGED,
    RunConfig,
    dump,
    find_config,
    load_pretrain_config,
    load_run_config,
    packaged_configs,
    read_yaml,
    resolve_key,
    run_config,
)
from tiltflow.errors import ConfigError, TiltflowError
from tiltflow.policies.sd3 import ATTENTION_TARGETS
from tiltflow.rewards import reward_class
from tiltflow.scorers.checkpoints import models_folder

RUN_CONFIGS = ["geneval_sd3", "ocr_sd3", "pickscore_sd3", "shapes_pickscore", "shapes_ram", "words_ram"]
PRETRAIN_CONFIGS = ["tiny_sd3", "tiny_words"]
REWARD_CONFIGS = ["shapes_preference"]  # loaded in tests/reward_training
PUBLISHED = {
    "geneval_sd3": (100.0, 4.5, "Geneval", "geneval"),
    "ocr_sd3": (100.0, 4.5, "OCR", "ocr"),
    "pickscore_sd3": (1000.0, 2.0, "PickScore", "pickscore"),
}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def values(**sections: Any) -> dict[str, Any]:
    return run_values(Path("model"), Path("out"), **sections)


def message(source: str, *overrides: tuple[str, str]) -> str:
    """Return what a config's error says, without its file."""
    with pytest.raises(TiltflowError) as raised:
        load_run_config(source, overrides)
    return str(raised.value).replace(str(PACKAGED / f"{source}.yaml"), "FILE")


def shapes(*overrides: tuple[str, str]) -> RunConfig:
    return load_run_config("shapes_ram", overrides)


# --- packaged configs -------------------------------------------------------------------------------------------------


def test_every_packaged_config_loads() -> None:
    assert packaged_configs() == sorted([*RUN_CONFIGS, *PRETRAIN_CONFIGS, *REWARD_CONFIGS, "tiny_sd3_phase2"])
    for name in RUN_CONFIGS:
        assert load_run_config(name).output_dir == f"outputs/{name}"
    for name in PRETRAIN_CONFIGS:
        config = load_pretrain_config(name)
        assert (config.name, config.output_dir) == (name, f"outputs/{name}")
    assert load_pretrain_config("tiny_sd3_phase2").init_from == "outputs/tiny_sd3/model"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_of_ram_on_stable_diffusion_3_5(name: str) -> None:
    multiplier, eval_guidance, reward, prompts = PUBLISHED[name]
    config = load_run_config(name)
    assert config.policy.model_name == "stabilityai/stable-diffusion-3.5-medium"
    assert (config.policy.height, config.policy.width) == (512, 512)
    assert config.policy.finetune == "lora"
    assert (config.policy.lora.rank, config.policy.lora.alpha) == (32, 64)
    assert config.policy.lora.targets == ATTENTION_TARGETS
    assert len(ATTENTION_TARGETS) == 8
    assert config.algorithm.reward_multiplier == multiplier
    assert (config.algorithm.num_noisings, config.algorithm.time_sampling, config.algorithm.time_power) == (
        8,
        "grid",
        1,
    )
    assert (config.algorithm.old_decay_rate, config.algorithm.old_decay_max) == (0.01, 0.9)
    train = config.train
    assert (train.trainer_type, train.num_prompts_per_epoch, train.group_size) == ("ram", 48, 24)
    assert (train.lr, train.betas, train.weight_decay, train.ema_decay) == (3e-4, (0.9, 0.99), 1e-4, 0.9)
    assert train.max_grad_norm is None
    assert (train.advantage_aggregation, train.advantage_std) == ("sum", "global")
    assert (config.sampler.num_steps, config.sampler.guidance_scale) == (20, 2.0)
    assert (config.evaluation.num_steps, config.evaluation.guidance_scale) == (40, eval_guidance)
    assert [(entry.reward_model, entry.weight) for entry in config.rewards] == [(reward, 1.0)]
    assert (config.data.prompts, config.data.eval_prompts) == (prompts, prompts)


def test_geneval_is_trained_on_the_partial_score() -> None:
    assert load_run_config("geneval_sd3").rewards[0].options == {}  # the default
    from tiltflow.rewards.geneval_reward import GenevalOptions

    assert GenevalOptions().score == "partial"


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train.lr", "lr"])
@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E-3", 2e-3), ("0.5", 0.5), ("1", 1.0)])
def test_dotted_name_or_unambiguous_last_part(key: str, text: str, value: float) -> None:
    assert shapes((key, text)).train.lr == value


def test_a_nested_section() -> None:
    config = shapes(("rank", "4"), ("policy.lora.alpha", "8"), ("num_noisings", "2"))
    assert (config.policy.lora.rank, config.policy.lora.alpha, config.algorithm.num_noisings) == (4, 8, 2)


def test_the_last_override_wins() -> None:
    assert shapes(("lr", "1e-3"), ("train.lr", "1e-4")).train.lr == 1e-4


def test_list_mapping_and_null_values() -> None:
    config = shapes(
        ("betas", "[0.8, 9e-1]"), ("tag_shares", "{colors: 1, position: 2.5}"), ("blocklist", "[gun, 'a knife']")
    )
    assert config.train.betas == (0.8, 0.9)
    assert config.data.tag_shares == {"colors": 1.0, "position": 2.5}
    assert config.data.blocklist == ("gun", "a knife")
    assert shapes(("max_grad_norm", "1.0"), ("max_grad_norm", "null")).train.max_grad_norm is None


def test_a_whole_section() -> None:
    assert shapes(("sampler", "{num_steps: 5, guidance_scale: 1}")).sampler.model_dump() == {
        **load_run_config("geneval_sd3").sampler.model_dump(),
        "num_steps": 5,
        "guidance_scale": 1.0,
    }


@pytest.mark.parametrize("name", ["ram-on-shapes", "2024", "1e5", "yes", "[a]", "a: b"])
def test_text_stays_text(name: str) -> None:
    assert shapes(("wandb_project", name)).tracking.wandb_project == name
    assert shapes(("output_dir", name)).output_dir == name


def test_a_text_can_be_taken_back() -> None:
    assert shapes(("wandb_project", "null")).tracking.wandb_project is None
    assert shapes(("output_dir", "null")).output_dir == "outputs/shapes_ram"


@pytest.mark.parametrize("text", ["[Geneval]", "Geneval", "[geneval]"])
def test_a_bare_name_in_an_override_stands_for_the_file_s_own_entry(text: str) -> None:
    assert shapes(("rewards", text)).rewards == shapes().rewards
    (reward,) = shapes(("eval_rewards", text)).eval_rewards
    assert (reward.name, reward.options) == ("geneval", {"detector": "shapes"})


def test_a_reward_written_out_in_an_override_is_taken_as_written() -> None:
    (reward,) = shapes(("rewards", "[{reward_model: Geneval, weight: 2}]")).rewards
    assert (reward.name, reward.weight, reward.options) == ("Geneval", 2.0, {})


def test_an_override_of_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    text = "policy: {model_name: tiny_sd3}\ndata: {prompts: a.txt, eval_prompts: b.txt}\nrewards: OCR\ntrain:\n"
    assert load_run_config(write(tmp_path / "a.yaml", text), [("lr", "1e-2")]).train.lr == 1e-2


def test_a_packaged_config_is_not_changed_by_overrides() -> None:
    before = shapes()
    shapes(("lr", "1"), ("rank", "7"))
    assert shapes() == before


# --- keys that are wrong ----------------------------------------------------------------------------------------------


def test_an_ambiguous_key_lists_the_candidates() -> None:
    assert message("shapes_ram", ("batch_size", "4")) == (
        "--batch_size is ambiguous; it could be: train.batch_size, sampler.batch_size, evaluation.batch_size"
    )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lrr", "train.lr"),
        ("reward_multiplyer", "algorithm.reward_multiplier"),
        ("group_sise", "train.group_size"),
        ("wandb_projekt", "tracking.wandb_project"),
        ("training.lr", "train.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    text = message("shapes_ram", (key, "1"))
    assert text.startswith(f"--{key} is not a key of the config; nearest: ")
    assert nearest in text.partition("nearest: ")[2].split(", ")


def test_a_key_like_no_other_lists_all() -> None:
    text = message("shapes_ram", ("zzz", "1"))
    assert text.startswith("--zzz is not a key of the config; keys: seed, output_dir, policy, policy.family")
    assert "tracking.wandb_project" in text


def test_a_pretraining_key_is_none_of_training() -> None:
    assert resolve_key("lr", RunConfig) == "train.lr"
    assert "is not a key of the config" in message("shapes_ram", ("warmup_steps", "1"))


@pytest.mark.parametrize(
    ("sections", "unknown", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"train": {"lrr": 1}}, "train.lrr", "train.lr"),
        ({"sampler": {"batch_sizes": 1}}, "sampler.batch_sizes", "sampler.batch_size"),
        ({"policy": {"lora": {"rang": 1}}}, "policy.lora.rang", "policy.lora.rank"),
        ({"train": {"reward_multiplier": 1}}, "train.reward_multiplier", "algorithm.reward_multiplier"),
        ({"evaluation": {"num_step": 1}}, "evaluation.num_step", "evaluation.num_steps"),
    ],
)
def test_an_unknown_key_of_the_file_names_the_nearest(sections: dict[str, Any], unknown: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^my.yaml: unknown key '{unknown}'; did you mean '{nearest}'"):
        run_config({**values(), **{key: _merged(key, value) for key, value in sections.items()}}, source="my.yaml")


def _merged(key: str, value: Any) -> Any:
    return {**values().get(key, {}), **value} if isinstance(value, dict) else value


def test_an_unknown_key_like_no_other_lists_those_of_its_section() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'checkpoint\.zzz'; keys of checkpoint: keep$"):
        run_config({**values(), "checkpoint": {"zzz": 1}}, source="my.yaml")


@pytest.mark.parametrize(("missing", "name"), [("policy", "policy"), ("data", "data"), ("rewards", "rewards")])
def test_a_missing_key(missing: str, name: str) -> None:
    rest = {key: value for key, value in values().items() if key != missing}
    with pytest.raises(ConfigError, match=f"^my.yaml: key '{name}' is missing; it has no default$"):
        run_config(rest, source="my.yaml")


def test_a_missing_key_of_a_section() -> None:
    with pytest.raises(ConfigError, match=r"key 'data\.eval_prompts' is missing"):
        run_config({**values(), "data": {"prompts": "shapes"}}, source="my.yaml")


# --- values that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("lr", "fast", "--lr: train.lr='fast': Input should be a valid number"),
        ("lr", "nan", "--lr: train.lr=nan: Input should be a finite number"),
        ("lr", ".nan", "--lr: train.lr=nan: Input should be a finite number"),
        ("lr", "-inf", "--lr: train.lr=-inf: Input should be a finite number"),
        ("betas", "[0.9, .nan]", "--betas: train.betas.1=nan: Input should be a finite number"),
        ("tag_shares", "{colors: .inf}", "--tag_shares: data.tag_shares.colors=inf: Input should be a finite number"),
        (
            "tag_shares",
            "{colors: -1}",
            "--tag_shares: data.tag_shares.colors=-1: Input should be greater than or equal to 0",
        ),
        ("epochs", "1.5", "--epochs: train.epochs=1.5: Input should be a valid integer"),
        ("epochs", "-1", "--epochs: train.epochs=-1: Input should be greater than or equal to"),
        ("keep", "0", "--keep: checkpoint.keep=0: Input should be greater than or equal to 1"),
        (
            "sampler.num_steps",
            "0",
            "--sampler.num_steps: sampler.num_steps=0: Input should be greater than or equal to 1",
        ),
        ("finetune", "half", "--finetune: policy.finetune='half': Input should be 'lora' or 'full'"),
        ("betas", "0.9", "--betas: train.betas=0.9: Input should be a valid tuple"),
        ("betas", "[0.9]", "--betas: key 'train.betas.1' is missing"),
        ("train", "3", "--train: train=3: Input should be a valid dictionary"),
        ("rewards", "[]", "--rewards: rewards=[]: Tuple should have at least 1 item"),
        ("rewards", "3", "--rewards=3: write a list of rewards, one mapping, or names such as '[Geneval]'"),
        (
            "rewards",
            "[{name: a}]",
            "--rewards: an entry needs `reward_model` (a built-in name or a Python path); got the keys name",
        ),
        ("rewards", "[3]", "--rewards: an entry needs `reward_model` (a built-in name or a Python path); got 3"),
        ("rewards", "[Genevall]", "reward_model='Genevall' is not a built-in reward; did you mean 'Geneval'?"),
        ("lr", "[1", "--lr '[1' is not a valid YAML value: line 1: expected ',' or ']'"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_legal(key: str, text: str, expected: str) -> None:
    found = message("shapes_ram", (key, text))
    assert found.startswith(expected)
    assert "\n" not in found


def test_an_override_inside_something_that_is_no_section(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", yaml.safe_dump({**values(), "train": 5}))
    assert message(path, ("lr", "1")) == "--train.lr: train must be a mapping of keys in the config; it is 5"


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError) as raised:
        run_config({**values(), "sead": 1, "train": {"lr": "fast"}}, source="my.yaml")
    assert str(raised.value).split("\n") == [
        "my.yaml: train.lr='fast': Input should be a valid number, unable to parse string as a number",
        "my.yaml: unknown key 'sead'; did you mean 'seed'?",
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_packaged_configs() -> None:
    assert message("no/such.yaml") == (
        "config 'no/such.yaml': no such file; packaged: geneval_sd3, ocr_sd3, pickscore_sd3, shapes_pickscore, "
        "shapes_preference, shapes_ram, tiny_sd3, tiny_sd3_phase2, tiny_words, words_ram"
    )


@pytest.mark.parametrize("name", ["shapes_rem", "shapes", "shapes-ram", "shapes_ram.yaml"])
def test_a_mistyped_packaged_name_suggests_the_nearest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = message(name)
    assert text.startswith(f"config '{name}': no such file")
    assert "; did you mean 'shapes_ram'?; packaged: geneval_sd3, " in text


def test_malformed_yaml_names_the_line_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\ntrain:\n  lr: [1, 2\nsampler: {}\n")
    found = message(path)
    assert found.startswith(f"config {path} is not valid YAML: line 4: ")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty; it must hold a mapping of keys"),
        ("# empty\n", "is empty; it must hold a mapping of keys"),
        ("- a\n- b\n", "must hold a mapping of keys; it holds list"),
        ("just text\n", "must hold a mapping of keys; it holds str"),
    ],
)
def test_a_file_that_holds_no_mapping(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert message(path) == f"config {path} {problem}"


def test_keys_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", yaml.safe_dump(values()) + "on: 3\n")
    assert message(path) == f"config {path}: key True is no text; put it in quotes"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("seed: 1 # fenêtre\n".encode("latin-1"))
    assert message(str(path)).startswith(f"config {path} cannot be read: 'utf-8' codec can't decode")


def test_a_folder_called_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").mkdir()
    assert "no such file" in message(str(tmp_path / "a.yaml"))


def test_the_output_folder_is_called_like_the_file(tmp_path: Path) -> None:
    rest = {key: value for key, value in values().items() if key != "output_dir"}
    path = write(tmp_path / "my_run.yaml", yaml.safe_dump(rest))
    assert load_run_config(path).output_dir == "outputs/my_run"


# --- dumping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_a_dumped_config_loads_to_an_equal_one(name: str, tmp_path: Path) -> None:
    config = load_run_config(name)
    again = load_run_config(write(tmp_path / "again.yaml", dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_a_dumped_config_keeps_awkward_values(tmp_path: Path) -> None:
    config = run_config(
        values(
            data={"prompts": "a: b.txt", "eval_prompts": "日本.txt", "blocklist": ["no", "1e5"]},
            train={"lr": 1e-7, "max_grad_norm": None},
            tracking={"wandb_project": "2024", "run_name": "on"},
        ),
        source="my.yaml",
    )
    assert run_config(read_yaml(Path(write(tmp_path / "a.yaml", dump(config)))), source="again") == config


def test_the_pretraining_config_survives_the_round_trip(tmp_path: Path) -> None:
    config = load_pretrain_config("tiny_sd3", [("warmup_steps", "8"), ("autoencoder.lr", "1e-3")])
    assert (config.warmup_steps, config.autoencoder.lr) == (8, 1e-3)
    assert load_pretrain_config(write(tmp_path / "a.yaml", dump(config))) == config


def test_a_config_cannot_be_changed() -> None:
    config: Any = load_run_config("shapes_ram")
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0


# --- paths in the home folder -----------------------------------------------------------------------------------------


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = {**values(), "output_dir": "~/out", "data": {"prompts": "~/a.txt", "eval_prompts": "shapes"}}
    own["policy"] = {**own["policy"], "model_name": "~/sd3"}
    config = run_config(own, source="my.yaml")
    assert (config.output_dir, config.policy.model_name) == (f"{tmp_path}/out", f"{tmp_path}/sd3")
    assert (config.data.prompts, config.data.eval_prompts) == (f"{tmp_path}/a.txt", "shapes")
    with pytest.raises(ConfigError, match="output_dir='': String should have at least 1 character"):
        run_config({**values(), "output_dir": ""}, source="my.yaml")
    assert run_config({**values(), "output_dir": None}, source="my.yaml").output_dir is None


def test_models_and_configs_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TILTFLOW_MODELS", "~/models")
    for reward, key in {
        "PickScore": "model_name_or_path",
        "CLIP": "model_name_or_path",
        "AestheticScore": "model_name_or_path",
        "HPSv2": "tokenizer",
        "Geneval": "weights",
        "DeQAScore": "model",
        "LanguageReward": "model",
    }.items():
        options = reward_class(reward).Options.model_validate({key: "~/models/mine"})
        assert options.model_dump()[key] == f"{tmp_path}/models/mine"
    assert models_folder() == tmp_path / "models"
    write(tmp_path / "mine.yaml", "")
    assert find_config("~/mine.yaml") == tmp_path / "mine.yaml"
