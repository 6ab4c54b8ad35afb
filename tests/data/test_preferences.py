"""Pairs and ratings from files: every layout, every defect with its line, and nothing that vanishes uncounted."""

import json
import sys
from pathlib import Path

import pytest

from tiltflow.data.preferences import Preference, read_preferences
from tiltflow.data.ratings import read_ratings
from tiltflow.data.records import BadRecord, LeftOut, checked_number, read_records
from tiltflow.errors import DataError

ASK = [{"role": "user", "content": "2 + 2?"}]
RIGHT, WRONG = ([{"role": "assistant", "content": text}] for text in ("4", "5"))


def write(path: Path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def pairs(source: str, on_bad="error", **options) -> tuple[list[Preference], dict[str, int]]:
    left_out = LeftOut(on_bad)
    found = read_preferences(source, left_out=left_out, **options)
    return found, dict(left_out.counts)


def ratings(source: str, on_bad="error", **options):
    left_out = LeftOut(on_bad)
    found = read_ratings(source, left_out=left_out, **options)
    return found, dict(left_out.counts)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_texts_with_and_without_prompt(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        {"chosen": "yes", "rejected": "no"},
        "",
        {"prompt": "Q: ", "chosen": "yes", "rejected": "no", "margin": 2, "label": 0.75, "subset": "easy", "id": 7},
    )
    found, left_out = pairs(source)
    assert found == [
        Preference("yes", "no", f"{source}, line 1"),
        Preference("Q: yes", "Q: no", f"{source}, line 3", margin=2.0, label=0.75, subset="easy"),
    ]
    assert left_out == {}


def test_conversations_with_and_without_prompt(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        {"chosen": ASK + RIGHT, "rejected": ASK + WRONG},
        {"prompt": ASK, "chosen": RIGHT, "rejected": WRONG},
    )
    (implicit, explicit), _ = pairs(source)
    assert implicit.chosen == explicit.chosen == tuple(ASK + RIGHT)
    assert implicit.rejected == explicit.rejected == tuple(ASK + WRONG)


def test_prompt_and_answers_become_conversations_if_asked(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    (found,), _ = pairs(source, as_conversation=True)
    assert found.chosen == tuple(ASK + RIGHT) and found.rejected == tuple(ASK + WRONG)


@pytest.mark.parametrize("as_conversation", [False, True, "prompted"])
def test_messages_that_hold_the_prompt_stay_as_they_are(tmp_path, as_conversation):
    system = [{"role": "system", "content": "Be brief."}]
    source = write(
        tmp_path / "a.jsonl",
        {"prompt": "2 + 2?", "chosen": ASK + RIGHT, "rejected": ASK + WRONG},
        {"prompt": "2 + 2?", "chosen": system + ASK + RIGHT, "rejected": system + ASK + WRONG},
        {"prompt": ASK, "chosen": ASK + RIGHT, "rejected": ASK + WRONG},
    )
    found, left_out = pairs(source, as_conversation=as_conversation)
    assert [each.chosen for each in found] == [tuple(ASK + RIGHT), tuple(system + ASK + RIGHT), tuple(ASK + RIGHT)]
    assert [each.rejected for each in found] == [tuple(ASK + WRONG), tuple(system + ASK + WRONG), tuple(ASK + WRONG)]
    assert left_out == {}


def test_a_prompt_before_messages_of_another_user_turn_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "3 + 3?", "chosen": ASK + RIGHT, "rejected": ASK + WRONG})
    for as_conversation in (False, True, "prompted"):
        with pytest.raises(
            DataError, match=r"line 1: mixed kinds: .*another turn of the user; .*columns: \{prompt: ''"
        ):
            pairs(source, as_conversation=as_conversation)
    source = write(tmp_path / "b.jsonl", {"prompt": "2 + 2?", "chosen": RIGHT, "rejected": WRONG})
    assert pairs(source, as_conversation=True)[0][0].chosen == tuple(ASK + RIGHT)
    with pytest.raises(DataError, match="as_conversation: true makes messages"):
        pairs(source)


def test_adjacent_lines(tmp_path):
    source = write(tmp_path / "a.jsonl", *({"text": text} for text in ("good", "bad", "right", "wrong")))
    found, _ = pairs(source)
    assert [(each.chosen, each.rejected, each.place) for each in found] == [
        ("good", "bad", f"{source}, line 1"),
        ("right", "wrong", f"{source}, line 3"),
    ]


def test_own_names_of_columns(tmp_path):
    source = write(tmp_path / "a.jsonl", {"better": "yes", "worse": "no", "chosen": "not this"})
    (found,), _ = pairs(source, columns={"chosen": "better", "rejected": "worse"})
    assert (found.chosen, found.rejected) == ("yes", "no")


def test_names_of_columns_that_nobody_reads_or_has_are_told(tmp_path):
    lines = {"instruction": "2 + 2?", "better": "4", "worse": "5", "agreement": 0.5}
    source = write(tmp_path / "a.jsonl", lines)
    columns = {"chosen": "better", "rejected": "worse", "prompt": "instruction", "label": "agreement"}
    (found,), _ = pairs(source, columns=columns)
    assert (found.chosen, found.label) == ("2 + 2?4", 0.5)
    for name, own in (("prompt", "instrution"), ("label", "agre")):
        with pytest.raises(DataError, match=f"no record has '{own}', which {name} is to be read from"):
            pairs(source, columns={**columns, name: own})
    with pytest.raises(DataError, match="columns: 'chosn' is none of prompt, chosen, rejected, margin, label"):
        pairs(source, columns={"chosn": "better"})
    source = write(tmp_path / "b.jsonl", {"response": "4", "kind": 3})
    (found,), _ = ratings(source, attributes=1, names=("helpful",), columns={"text": "response", "helpful": "kind"})
    assert found.labels == (3.0,)
    with pytest.raises(DataError, match="'chosen' is none of text, prompt, response, label, helpful"):
        ratings(source, attributes=1, names=("helpful",), columns={"chosen": "response"})


def test_a_prompt_can_be_left_out(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "3 + 3?", "chosen": ASK + RIGHT, "rejected": ASK + WRONG})
    (found,), _ = pairs(source, columns={"prompt": ""})
    assert found.chosen == tuple(ASK + RIGHT) and found.rejected == tuple(ASK + WRONG)


def test_tables_and_folders_give_what_lines_give(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"chosen": f"yes {n}", "rejected": "no", "prompt": None} for n in range(3)]
    table = pa.Table.from_pylist(rows)
    folder = tmp_path / "shards"
    folder.mkdir()
    pq.write_table(table.slice(0, 2), folder / "0.parquet")
    pq.write_table(table.slice(2, 1), folder / "1.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    expected = [(row["chosen"], row["rejected"]) for row in rows]
    for source in (
        folder,
        folder / "*.parquet",
        tmp_path / "file.arrow",
        tmp_path / "stream.arrow",
        tmp_path / "saved",
    ):
        found, _ = pairs(str(source))
        assert [(each.chosen, each.rejected) for each in found] == expected
    assert found[2].place == f"{tmp_path / 'saved'}, row 3"


def test_ratings_as_lists_and_by_name(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        {"text": "a", "label": [1, -100]},
        {"prompt": "b", "response": "c", "kind": 2.5, "long": None},
        {"text": ASK + RIGHT, "label": [None, 3]},
    )
    found, left_out = ratings(source, attributes=2, names=("kind", "long"), label_range=(0, 4))
    assert [each.labels for each in found] == [(1.0, -100.0), (2.5, -100.0), (-100.0, 3.0)]
    assert [each.text for each in found] == ["a", "bc", tuple(ASK + RIGHT)]
    assert left_out == {}
    (one,), _ = ratings(write(tmp_path / "b.jsonl", {"text": "a", "label": 3}), attributes=1)
    assert one.labels == (3.0,)


# --- defects ---------------------------------------------------------------------------------------------------------

GOOD = {"chosen": "yes", "rejected": "no"}
BAD_PAIRS = [
    ('{"chosen": "yes", ', "broken JSON", "not valid JSON: Expecting property name"),
    ("[1, 2]", "broken JSON", "an object is needed"),
    ({"chosen": "yes"}, "missing key", "'rejected' is not among chosen"),
    ({"chosen": "yes", "rejected": 3}, "no text", "'rejected' must be a text, or messages"),
    ({"chosen": "yes", "rejected": [{"role": "user"}]}, "no text", "'rejected' must be a text, or messages"),
    ({"chosen": "same", "rejected": "same"}, "identical chosen and rejected", "nothing can be learnt"),
    ({"chosen": "", "rejected": "no"}, "empty text", "chosen"),
    ({"chosen": "yes", "rejected": ASK}, "mixed kinds", "chosen and rejected must both be texts"),
    ({**GOOD, "prompt": ASK}, "mixed kinds", "prompt and answers must all be texts"),
    ({**GOOD, "label": 1.5}, "label out of range", "label is 1.5; legal: 0 to 1"),
    ({**GOOD, "margin": "much"}, "no number", "margin is 'much'"),
    ({**GOOD, "margin": float("nan")}, "no number", "margin is nan"),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_PAIRS)
def test_bad_pair_is_an_error_with_its_line_or_a_counted_skip(tmp_path, line, kind, message):
    source = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as error:
        pairs(source)
    assert str(error.value).startswith(f"{source}, line 2: {kind}: ")
    assert message in str(error.value) and "on_bad_record: skip" in str(error.value)
    found, left_out = pairs(source, on_bad="skip")
    assert [each.place for each in found] == [f"{source}, line 1", f"{source}, line 3"]
    assert left_out == {kind: 1}


def test_a_bad_adjacent_line_takes_its_partner_with_it_and_no_other(tmp_path):
    lines = [{"text": text} for text in ("good", "bad", "right", "wrong", "up", "down", "alone")]
    source = write(tmp_path / "a.jsonl", *lines[:3], "broken", *lines[4:])
    with pytest.raises(DataError, match=r"line 4: broken JSON"):
        pairs(source)
    found, left_out = pairs(source, on_bad="skip")
    assert [(each.chosen, each.rejected) for each in found] == [("good", "bad"), ("up", "down")]
    assert left_out == {"broken JSON": 1, "no partner": 1}


def test_partners_follow_each_other_in_one_file(tmp_path):
    def adjacent(*texts, on_bad="skip"):
        lines = [{"text": text} if text else "" for text in texts]
        found, left_out = pairs(write(tmp_path / "a.jsonl", *lines), on_bad)
        return [(each.chosen, each.rejected) for each in found], left_out.get("no partner", 0)

    # Which of the three lines after a gap belong together is not known.
    assert adjacent("good 1", "", "good 2", "bad 2", "good 3", "") == ([], 4)
    with pytest.raises(DataError, match="line 1: no partner: a chosen line and the rejected one must follow"):
        adjacent("good 1", "", "good 2", "bad 2", "good 3", "", on_bad="error")
    assert adjacent("good 1", "bad 1", "", "good 2", "bad 2", "") == ([("good 1", "bad 1"), ("good 2", "bad 2")], 0)
    assert adjacent("good 1", "", "good 2", "bad 2") == ([], 3)
    assert adjacent("good 1", "", "bad 1", "good 2", "", "bad 2") == ([], 4)
    assert adjacent("", "bad 1", "good 2", "bad 2") == ([], 3)
    assert adjacent("good 1", "bad 1", "good 2") == ([("good 1", "bad 1")], 1)


SHARDS = [
    (["g1 b1 g2", "b2 g3 b3"], ["g1 b1"]),
    (["g1 b1 g2", "b2 g3 b3 g4", "b4 g5 b5"], ["g1 b1"]),
    (["g1 b1", "g2 b2 g3", "b3 g4", "b4"], ["g1 b1"]),
    (["g1 b1", "g2 b2 g3 b3"], ["g1 b1", "g2 b2", "g3 b3"]),
]


@pytest.mark.parametrize(("shards", "kept"), SHARDS)
@pytest.mark.parametrize("blank", [False, True])
def test_behind_an_odd_number_of_lines_no_more_pairs_are_made(tmp_path, shards, kept, blank):
    folder = tmp_path / "shards"
    folder.mkdir()
    blocks = [[{"text": text} for text in shard.split()] for shard in shards]
    for place, block in enumerate(blocks):
        write(folder / f"{place}.jsonl", *block)
    if blank:  # the same blocks in one file
        folder = write(tmp_path / "a.jsonl", *[line for block in blocks for line in (*block, "")])
    found, left_out = pairs(str(folder), "skip")
    assert [f"{each.chosen} {each.rejected}" for each in found] == kept
    alone = sum(len(block) for block in blocks) - 2 * len(kept)
    assert left_out == ({"no partner": alone} if alone else {})


UNREADABLE = [
    (b'{"chosen": "\xff", "rejected": "no"}', "'utf-8' codec can't decode byte 0xff"),
    (b'{"chosen": "yes", "rejected": "no", "margin": ' + b"9" * 5000 + b"}", "integer"),
    (b'{"chosen": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    (rb'{"chosen": "cut \ud83d", "rejected": "no"}', "surrogates not allowed"),
]


@pytest.mark.parametrize(("line", "message"), UNREADABLE, ids=["no UTF-8", "digits", "depth", "half a character"])
def test_a_line_that_no_reader_can_read_is_one_bad_record(tmp_path, line, message):
    good = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + line + b"\n" + good)
    with pytest.raises(DataError, match=f"line 2: broken JSON: not valid JSON: .*{message}"):
        pairs(str(tmp_path / "a.jsonl"))
    found, left_out = pairs(str(tmp_path / "a.jsonl"), "skip")
    assert [each.place[-6:] for each in found] == ["line 1", "line 3"]
    assert left_out == {"broken JSON": 1}


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), 10**20])
def test_numbers_beyond_all_bounds_are_out_of_range(value):
    with pytest.raises(BadRecord, match="margin out of range: margin is"):
        checked_number(value, "margin", low=-1e6, high=1e6)


BAD_RATINGS = [
    ({"text": "a"}, "missing key", "'label' is not among text"),
    ({"label": [1, 2]}, "missing key", "'text' is not among label"),
    ({"text": "a", "label": [1]}, "wrong number of ratings", "num_attributes=2 numbers are needed"),
    ({"text": "a", "label": [1, 5]}, "label out of range", "label[1] is 5; legal: 0 to 4"),
    ({"text": "a", "label": [1, "x"]}, "no number", "label[1] is 'x'"),
    ({"text": "a", "label": [-100, None]}, "no rating", "all of them are missing"),
    ({"text": "", "label": [1, 2]}, "empty text", ""),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_RATINGS)
def test_bad_rating_is_an_error_with_its_line_or_a_counted_skip(tmp_path, line, kind, message):
    good = {"text": "b", "label": [0, 4]}
    source = write(tmp_path / "a.jsonl", good, line)
    with pytest.raises(DataError) as error:
        ratings(source, attributes=2, label_range=(0, 4))
    assert str(error.value).startswith(f"{source}, line 2: {kind}")
    assert message in str(error.value)
    found, left_out = ratings(source, on_bad="skip", attributes=2, label_range=(0, 4))
    assert len(found) == 1 and left_out == {kind: 1}


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is empty: it holds no record"):
        read_records(write(tmp_path / "empty.jsonl", "", " "))
    for missing in ("no.jsonl", "./nowhere", "nowhere"):
        with pytest.raises(DataError, match="a data set of the hub is written owner/name@"):
            read_records(missing)
    with pytest.raises(DataError, match=r"ends in '\.csv'; it must be one of \.jsonl, \.parquet, \.arrow"):
        read_records(write(tmp_path / "a.csv", "chosen,rejected"))
    with pytest.raises(DataError, match="the folder has no file that ends in"):
        (tmp_path / "folder").mkdir()
        read_records(str(tmp_path / "folder"))
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match="cannot be read"):
            read_records(write(tmp_path / name, "nonsense"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'tiltflow\[datasets\]'"):
        read_records("owner/name@test")


def test_hub_data_sets_are_asked_for_by_name_config_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name@test", "owner/name:small@test[:10%]"):
        (record,) = read_records(source)
        assert (record.place, dict(record.values)) == (f"{source}, row 1", GOOD)
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", None, "test"),
        ("owner/name", "small", "test[:10%]"),
    ]


def test_splits_of_a_saved_folder_are_named(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"holds the splits test; give one, as .*saved@test"):
        read_records(str(tmp_path / "saved"))
    assert read_records(f"{tmp_path / 'saved'}@test")[0].values == GOOD
