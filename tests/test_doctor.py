"""`tiltflow doctor`: every built-in reward, whether or not it could run here."""

import subprocess
import sys
from pathlib import Path

import pytest

from tiltflow import cli
from tiltflow.commands import doctor as doctor_module
from tiltflow.commands.doctor import examine
from tiltflow.rewards import REWARDS
from tiltflow.scorers.mask2former import GENEVAL_WEIGHTS


def test_every_reward_is_listed_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path))
    absent = ("rapidocr", "openai")
    monkeypatch.setattr(doctor_module, "find_spec", lambda name: None if name in absent else object())
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    versions, table = text.split("\n\n")
    assert "diffusers" in versions and "GPU" in versions
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert sorted(rows) == sorted(REWARDS)
    assert "missing: sac+logos+ava1-l14-linearMSE.pth, openai/clip-vit-large-patch14" in rows["AestheticScore"]
    assert "missing: mask2former_swin-s" in rows["Geneval"]
    assert "no: needs rapidocr" in rows["OCR"] and "none needed" in rows["OCR"]
    assert "missing: HPS_v2.1_compressed.pt, CLIP's tokenizer (openai/clip-vit-large-patch14)" in rows["HPSv2"]
    assert "yes, but base_url: needs openai" in rows["DeQAScore"] and "needs option model" in rows["DeQAScore"]
    assert "needs option server_url" in rows["RemotePointwiseRewardModel"]
    assert rows["JPEGCompressibility"].split()[1:] == ["yes", "none", "needed", "cpu"]


def test_weights_that_are_there_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path))
    (tmp_path / "PickScore_v1").mkdir()
    (tmp_path / "PickScore_v1" / "config.json").write_text("{}")
    findings = {each.reward: each for each in examine()}
    assert (findings["PickScore"].weights, findings["PickScore_Rank"].weights) == ("found", "found")
    assert findings["CLIP"].weights == "missing: openai/clip-vit-large-patch14"


def test_files_of_which_any_one_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path))
    (tmp_path / "bert-base-uncased").mkdir()
    for name in ("ImageReward.pt", "bert-base-uncased/tokenizer.json", GENEVAL_WEIGHTS[1].name):
        (tmp_path / name).write_text("")
    (tmp_path / "clip-vit-large-patch14").mkdir()
    (tmp_path / "clip-vit-large-patch14" / "tokenizer.json").write_text("{}")
    findings = {each.reward: each.weights for each in examine()}
    assert findings["ImageReward"] == "found"
    assert findings["Geneval"] == "missing: openai/clip-vit-large-patch14"  # the tokenizer alone is not the network
    assert findings["HPSv2"] == "missing: HPS_v2.1_compressed.pt"


def test_a_tokenizer_in_the_hub_s_cache_is_not_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTFLOW_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--openai--clip-vit-large-patch14"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").write_text("{}")
    findings = {each.reward: each.weights for each in examine()}
    assert findings["CLIP"] == "missing: openai/clip-vit-large-patch14"
    assert "openai/clip-vit-large-patch14" in findings["AestheticScore"]
    assert findings["HPSv2"] == "missing: HPS_v2.1_compressed.pt"  # the tokenizer is found
    (snapshot / "config.json").write_text("{}")
    assert {each.reward: each.weights for each in examine()}["CLIP"] == "found"


def test_rewards_that_compute_on_the_cpu_say_so_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    devices = {each.reward: each.device for each in examine()}
    assert (devices["OCR"], devices["JPEGCompressibility"], devices["PickScore"]) == ("cpu", "cpu", "cuda")


def test_doctor_has_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--rewards", "OCR"]) == 2
    assert "--rewards is no option of doctor" in capsys.readouterr().err


def test_a_package_that_cannot_be_imported_is_named() -> None:
    code = "import sys; sys.modules['diffusers'] = None; from tiltflow import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "tiltflow doctor: a package that tiltflow needs cannot be imported: " in done.stderr
    assert "diffusers" in done.stderr and "Traceback" not in done.stderr
