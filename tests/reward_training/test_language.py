"""Language reward models in training: exact sums however a batch is cut, what a config may say, and that they learn."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from tests.scorers.tiny_language import save_causal, save_classifier
from tiltflow.errors import ConfigError, DataError
from tiltflow.reward_training import (
    REWARD_MODEL_CLASS_DICT,
    BinaryRankingRewardModel,
    LanguageDataConfig,
    LanguageModelConfig,
    RegressionRewardModel,
    RewardModelType,
    build_language,
)
from tiltflow.scorers import LanguageRewardModel

KEYS = {"loss", "acc", "rewards_chosen_mean", "rewards_rejected_mean", "rewards_all_mean", "rewards_all_std"}
PAIRS = [{"chosen": f"w{n} w{n + 1} " * (n % 5 + 1), "rejected": f"w{n} bad " * (n % 3 + 1)} for n in range(13)]
RATINGS = [{"text": f"w{n} " * (n % 6 + 1), "label": [n % 5, -100 if n % 3 else 1.5]} for n in range(11)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_causal(tmp_path_factory.mktemp("base")))


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    paths = {}
    for name, records in (("pairs", PAIRS), ("ratings", RATINGS)):
        paths[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return paths


def ranking(base, files, *, data=None, **options):
    model = LanguageModelConfig(reward_model_type="binary_ranking", pretrained=base, **options)
    return build_language(model, LanguageDataConfig(train=files["pairs"], **(data or {})))


def regression(base, files, *, data=None, **options):
    options = {"head": {"num_attributes": 2}, **options}
    model = LanguageModelConfig(reward_model_type="regression", pretrained=base, **options)
    return build_language(model, LanguageDataConfig(train=files["ratings"], **(data or {})))


def summed(model, examples, parts):
    """Return loss and metrics over batches, as a trainer sums them up."""
    loss, totals, weight = 0.0, {}, 0.0
    for places, weights in parts:
        batch = examples.batch(places, weights)
        part, sums = model(batch)
        loss += part
        weight += model.weight(batch)
        totals = {key: totals.get(key, 0.0) + value for key, value in sums.items()}
    return loss / weight, model.metrics(totals)


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ranking, regression])
@pytest.mark.parametrize("buckets", [1, 4])
def test_loss_metrics_and_gradient_do_not_depend_on_how_the_data_is_cut(base, files, make, buckets):
    fitting = make(base, files, length_buckets=buckets, bucket_overhead=0)
    model, examples = fitting.model, fitting.train
    count = len(examples)
    everything = [(range(count), [1.0] * count)]
    # Micro-batches of four, the last filled up with rows that count nowhere.
    starts = range(0, count, 4)
    cut = [([min(s + k, count - 1) for k in range(4)], [float(s + k < count) for k in range(4)]) for s in starts]
    gradients, metrics = [], []
    for parts in (everything, cut):
        model.zero_grad()
        loss, found = summed(model, examples, parts)
        loss.backward()
        assert math.isclose(loss.item(), found["loss"], rel_tol=1e-6)
        gradients.append([weight.grad.clone() for weight in model.parameters()])
        metrics.append(found)
    for name, value in metrics[0].items():
        assert math.isclose(metrics[1][name], value, rel_tol=1e-5, abs_tol=1e-6), name
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1, one.abs().max().item()), rtol=1e-4)


def test_metrics_are_those_of_the_rewards(base, files):
    fitting = ranking(base, files)
    model = fitting.model.eval()
    with torch.no_grad():
        _, metrics = summed(model, fitting.train, [(range(13), [1.0] * 13)])
    assert set(metrics) == KEYS == set(model.metric_names)
    chosen, rejected = (model.model.score([pair[side] for pair in PAIRS]) for side in ("chosen", "rejected"))
    both = torch.cat([chosen, rejected])
    expected = {
        "loss": torch.log1p((rejected - chosen).exp()).mean(),
        "acc": (chosen > rejected).float().mean(),
        "rewards_chosen_mean": chosen.mean(),
        "rewards_rejected_mean": rejected.mean(),
        "rewards_all_mean": both.mean(),
        "rewards_all_std": both.std(),
    }
    for name, value in expected.items():
        assert math.isclose(metrics[name], value.item(), rel_tol=1e-4, abs_tol=1e-6), name


def test_mean_loss_and_metrics_of_one_batch(base, files):
    fitting = ranking(base, files)
    model, batch = fitting.model, fitting.train.batch(range(13), [1.0] * 12 + [0.0])
    model.prepare_for_validation_step()
    loss_mean, metrics = model.get_loss_and_metrics(batch=batch, forward_only=True)
    model.finish_validation_step()
    assert set(metrics) == KEYS and math.isclose(metrics["loss"], loss_mean.item(), rel_tol=1e-6)
    assert not loss_mean.requires_grad and all(weight.grad is None for weight in model.parameters())
    rewards = {side: model.eval().model.score([pair[side] for pair in PAIRS[:12]]) for side in ("chosen", "rejected")}
    d = rewards["chosen"] - rewards["rejected"]
    assert math.isclose(loss_mean.item(), torch.nn.functional.softplus(-d).mean().item(), rel_tol=1e-5)
    model.prepare_for_training_step()
    assert model.get_loss_and_metrics(batch, forward_only=False)[0].item() == pytest.approx(loss_mean.item(), rel=1e-5)
    model.finish_training_step()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_batch_needs_nothing_but_texts_and_lengths(base, files):
    fitting = ranking(base, files)
    batch = dict(fitting.train.batch([0, 1], [1.0, 1.0]))
    bare = {key: batch[key] for key in ("chosen", "rejected", "chosen_length", "rejected_length")}
    assert fitting.model.weight(bare) == 2.0
    assert fitting.model(bare)[0].item() == fitting.model(batch)[0].item()


def test_batch_without_weight_has_loss_zero_and_a_gradient(base, files):
    for fitting in (ranking(base, files), regression(base, files)):
        batch = fitting.train.batch([0, 0], [0.0, 0.0])
        loss, totals = fitting.model(batch)
        loss.backward()
        assert fitting.model.weight(batch) == 0.0 and loss.item() == 0.0
        assert all(weight.grad is not None and not weight.grad.any() for weight in fitting.model.parameters())
        assert math.isnan(fitting.model.metrics(totals)["loss"])


def test_margin_scale_and_soft_labels_reach_the_loss(base, tmp_path):
    records = [{**pair, "margin": n % 4, "label": (n % 5) / 4} for n, pair in enumerate(PAIRS)]
    files = {"pairs": str(tmp_path / "margins.jsonl")}
    (tmp_path / "margins.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    chosen, rejected = (
        LanguageRewardModel.from_pretrained(base).score([pair[side] for pair in PAIRS])
        for side in ("chosen", "rejected")
    )
    margin, p = (torch.tensor([float(record[key]) for record in records]) for key in ("margin", "label"))
    d = chosen - rejected
    soft = torch.nn.functional.softplus
    expected = {
        "bradley_terry": p * soft(-d) + (1 - p) * soft(d),
        "margin": p * soft(margin - d) + (1 - p) * soft(margin + d),
        "scaled": margin * (p * soft(-d) + (1 - p) * soft(d)),
    }
    for name, losses in expected.items():
        fitting = ranking(base, files, loss=name, center_rewards_coefficient=0.1)
        loss, _ = summed(fitting.model.eval(), fitting.train, [(range(13), [1.0] * 13)])
        value = losses.mean() + 0.1 * ((chosen + rejected) ** 2).mean()
        assert math.isclose(loss.item(), value.item(), rel_tol=1e-5), name


# --- configs ---------------------------------------------------------------------------------------------------------


def test_types_and_their_classes():
    assert {kind.value: cls for kind, cls in REWARD_MODEL_CLASS_DICT.items()} == {
        "binary_ranking": BinaryRankingRewardModel,
        "regression": RegressionRewardModel,
    }
    assert RewardModelType("regression") is RewardModelType.REGRESSION
    with pytest.raises(ValueError, match="reward_model_type='ranking': use one of binary_ranking, regression"):
        RewardModelType("ranking")
    with pytest.raises(ValidationError, match="Input should be 'binary_ranking' or 'regression'"):
        LanguageModelConfig(reward_model_type="ranking", pretrained="x")  # pyright: ignore[reportArgumentType]


def test_type_chooses_the_reader_of_the_data(base, files):
    with pytest.raises(DataError, match="line 1: missing key: 'chosen' is not among label, text"):
        build_language(
            LanguageModelConfig(reward_model_type="binary_ranking", pretrained=base),
            LanguageDataConfig(train=files["ratings"], layout="pairs"),
        )
    with pytest.raises(DataError, match="line 1: missing key: 'label' is not among chosen, rejected"):
        build_language(
            LanguageModelConfig(reward_model_type="regression", pretrained=base),
            LanguageDataConfig(train=files["pairs"]),
        )


def test_what_does_not_fit_is_said_before_training(base, files):
    with pytest.raises(ConfigError, match="binary_ranking needs one reward for a text, and the head gives 3"):
        ranking(base, files, head={"num_attributes": 3})
    assert ranking(base, files, head={"num_attributes": 3, "merge_attributes": True}).model.model.head.scalar
    with pytest.raises(ConfigError, match="max_length=300: the network reads at most 256 tokens"):
        ranking(base, files, data={"max_length": 300})
    with pytest.raises(ValidationError, match="loss is for reward_model_type: binary_ranking"):
        regression(base, files, loss="margin")
    saved = LanguageModelConfig(reward_model_type="regression", pretrained=base).model_dump(mode="json")
    assert LanguageModelConfig(**saved).model_dump(mode="json") == saved
    with pytest.raises(DataError, match="line 1: missing key: 'margin', which loss: margin reads"):
        ranking(base, files, loss="margin")


def test_notes_tell_what_every_set_lost(base, files, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIRS[0]) + '\n{"chosen"\n' + json.dumps({"chosen": "a", "rejected": "a"}))
    data = {
        "validation": {"easy": files["pairs"], "odd": str(broken)},
        "on_bad_record": "skip",
        "max_length": 7,
        "limit": 10,
    }
    fitting = ranking(base, files, data=data)
    assert set(fitting.validation) == {"easy", "odd"}
    too_long = sum(max(len(pair["chosen"].split()), len(pair["rejected"].split())) >= 7 for pair in PAIRS)
    assert len(fitting.validation["easy"]) == 13 - too_long and len(fitting.validation["odd"]) == 1
    assert fitting.notes["validation easy: longer than 7 tokens, left out"] == too_long
    assert fitting.notes["validation odd: broken JSON, left out"] == 1
    assert fitting.notes["validation odd: identical chosen and rejected, left out"] == 1
    assert len(fitting.train) + fitting.notes["train: longer than 7 tokens, left out"] == 10
    with pytest.raises(DataError, match=r"no example is left \(train: longer than 1 tokens, left out: 13\)"):
        ranking(base, files, data={"max_length": 1})


# --- learning --------------------------------------------------------------------------------------------------------


def fit(fitting, *, steps, lr, batch=16):
    model, examples = fitting.model, fitting.train
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.prepare_for_training_step()
    for _ in range(steps):
        places = torch.randint(len(examples), (batch,), generator=generator).tolist()
        rows = examples.batch(places, [1.0] * batch)
        loss = model(rows)[0] / model.weight(rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.finish_training_step()


def measure(model, examples):
    model.prepare_for_validation_step()
    assert not model.training
    with torch.no_grad():
        metrics = summed(model, examples, [(range(len(examples)), [1.0] * len(examples))])[1]
    model.finish_validation_step()
    assert model.training
    return metrics


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_ranking_learns_and_its_folder_is_a_classifier(base, tmp_path, lora):
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(300):
        words = [f"w{n}" for n in torch.randint(0, 40, (int(torch.randint(2, 9, (1,), generator=generator)),))]
        place = int(torch.randint(0, len(words), (1,), generator=generator))
        sides = [" ".join([*words[:place], word, *words[place:]]) for word in ("good", "bad")]
        lines.append(json.dumps({"chosen": sides[0], "rejected": sides[1]}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:220]))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[220:]))
    data = {"validation": str(tmp_path / "test.jsonl")}
    fitting = ranking(base, {"pairs": str(tmp_path / "train.jsonl")}, data=data, lora=lora)
    before = measure(fitting.model, fitting.validation[""])
    fit(fitting, steps=60, lr=3e-3)
    after = measure(fitting.model, fitting.validation[""])
    assert before["acc"] < 0.9 < 0.95 <= after["acc"]
    fitting.model.save_pretrained(tmp_path / "model")
    texts = [json.loads(line)[side] for line in lines[220:230] for side in ("chosen", "rejected")]
    fitting.model.eval()
    expected = fitting.model.model.score(texts)
    loaded = LanguageRewardModel.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(loaded.score(texts), expected, atol=1e-5, rtol=1e-5)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "adapter" / "adapter_config.json").is_file() == (lora is not None)
    # The folder's own head goes on being trained.
    further = ranking(str(tmp_path / "model"), {"pairs": str(tmp_path / "test.jsonl")})
    assert measure(further.model, further.train)["acc"] >= 0.95


def test_regression_learns_the_attributes_that_are_rated(tmp_path):
    folder = str(save_classifier(tmp_path / "base", labels=2))
    lines = []
    generator = torch.Generator().manual_seed(2)
    for number in range(300):
        goods, bads = (int(n) for n in torch.randint(0, 4, (2,), generator=generator))
        text = " ".join(["w1"] + ["good"] * goods + ["bad"] * bads)
        lines.append(json.dumps({"text": text, "label": [goods, -100 if number % 2 else bads]}))
    (tmp_path / "ratings.jsonl").write_text("\n".join(lines))
    data = {"label_range": (0, 4)}
    fitting = regression(folder, {"ratings": str(tmp_path / "ratings.jsonl")}, data=data)
    fit(fitting, steps=150, lr=3e-3)
    metrics = measure(fitting.model, fitting.train)
    assert tuple(metrics) == fitting.model.metric_names
    assert metrics["loss"] < 0.15 and metrics["mae"] < 0.3
    scores = fitting.model.eval().model.score(["w1 good good good", "w1 bad bad bad"])
    assert scores.shape == (2, 2)
    assert (scores - torch.tensor([[3.0, 0.0], [0.0, 3.0]])).abs().max() < 1.0


def test_gradient_checkpointing_changes_no_number(base, files):
    results = []
    for checkpointing in (False, True):
        fitting = ranking(base, files)
        if checkpointing:
            fitting.model.enable_gradient_checkpointing()
            layers = fitting.model.model.classifier.base_model.layers
            assert all(layer.gradient_checkpointing for layer in layers)
        fitting.model.train()
        loss, _ = summed(fitting.model, fitting.train, [(range(13), [1.0] * 13)])
        loss.backward()
        results.append((loss.item(), [weight.grad for weight in fitting.model.parameters()]))
    assert results[0][0] == results[1][0]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other)


def test_weights_that_are_trained_are_in_float32(base, files):
    with pytest.raises(
        ConfigError, match=r"model.dtype=bfloat16 without LoRA: .* train.precision: bf16, or train LoRA"
    ):
        ranking(base, files, dtype="bfloat16")
    model = ranking(base, files, dtype="bfloat16", lora={"rank": 2}).model
    assert model.model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
