"""From bodies to samples, in this process."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from tests.serving.http.servers import b64, levels, picture
from tiltflow.serving import multipart
from tiltflow.serving.jobs import Sample
from tiltflow.serving.requests import Parsed, RequestReader
from tiltflow.serving.wire import JSON, SAFETENSORS, Item, Limits, Media, ScoreRequest, WireError, pack_safetensors


def allowed(_: Any) -> None:
    """Let everything pass."""


def read(body: Any, content_type: str = JSON, **limits: Any) -> Parsed:
    """Read a body, which may be given as what it is JSON of."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def go() -> Parsed:
        reader = RequestReader(Limits(**limits))
        try:
            return await reader.read(data, content_type, admit=allowed, hold=allowed)
        finally:
            reader.close()

    return asyncio.run(go())


def packed(items: list[Item], arrays: dict[str, Any]) -> bytes:
    return pack_safetensors(ScoreRequest(items=items), arrays)


def sound(parsed: Parsed) -> list[Sample]:
    assert all(isinstance(sample, Sample) for sample in parsed.samples), parsed.samples
    return [sample for sample in parsed.samples if isinstance(sample, Sample)]


def test_every_field_arrives() -> None:
    video = np.stack([levels(3)] * 2)
    item = Item(
        id="a",
        prompt="p",
        image=Media(ref="images", index=1),
        video=Media(ref="video"),
        condition_images=[Media(ref="images", index=0), Media(ref="images", index=2)],
        condition_videos=[[Media(ref="images", index=0), Media(ref="images", index=1)]],
        group_id="g",
        meta={"key": [1, None]},
    )
    (sample,) = sound(read(packed([item], {"images": levels(3), "video": video[0]}), SAFETENSORS))
    assert (sample.prompt, sample.meta) == ("p", {"key": [1, None]})
    np.testing.assert_array_equal(sample.image, levels(3)[1])
    np.testing.assert_array_equal(sample.video, video[0])
    assert sample.condition_images is not None and sample.condition_videos is not None
    np.testing.assert_array_equal(sample.condition_images[1], levels(3)[2])
    np.testing.assert_array_equal(sample.condition_videos[0], levels(3)[:2])


def test_empty_metadata_is_there_and_absent_metadata_is_not() -> None:
    body = b'{"items":[{"prompt":"p"},{"prompt":"p","meta":null},{"prompt":"p","meta":{}}]}'
    assert [sample.meta for sample in sound(read(body, JSON))] == [None, None, {}]
    again = packed([Item(prompt="p", meta={}), Item(prompt="p")], {})
    assert [sample.meta for sample in sound(read(again, SAFETENSORS))] == [{}, None]


def test_groups_of_different_requests_are_different() -> None:
    async def go() -> list[Parsed]:
        reader = RequestReader(Limits())
        body = json.dumps({"items": [{"prompt": "p", "group_id": "g"}]}).encode()
        return [await reader.read(body, JSON, admit=allowed, hold=allowed) for _ in range(2)]

    first, second = asyncio.run(go())
    assert sound(first)[0].group != sound(second)[0].group


def test_an_absent_prompt_is_not_the_empty_one() -> None:
    parsed = read({"items": [{"prompt": ""}, {}]})
    assert [item.prompt for item in parsed.request.items] == ["", None]
    assert [sample.prompt for sample in sound(parsed)] == ["", ""]


def test_videos_of_encoded_frames() -> None:
    item = {"prompt": "p", "video": [b64(picture(0)), b64(picture(255))]}
    (sample,) = sound(read({"items": [item]}))
    assert sample.video is not None and sample.video.shape == (2, 8, 8, 3)
    assert sample.video[:, 0, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("video", "param"),
    [
        ([], "items[0].video"),
        ([b64(picture()), b64(picture(side=9))], "items[0].video"),
        ([b64(picture()), b64(b"broken")], "items[0].video[1]"),
    ],
)
def test_videos_that_are_none_fail_their_item(video: Any, param: str) -> None:
    parsed = read({"items": [{"prompt": "p", "video": video}, {"prompt": "q"}]})
    error = parsed.samples[0]
    assert isinstance(error, WireError) and error.param == param
    assert isinstance(parsed.samples[1], Sample)


def test_a_file_is_no_video() -> None:
    with pytest.raises(WireError, match="a video is a tensor"):
        read({"items": [{"video": b64(picture())}]})


def test_a_part_may_be_used_twice_and_fails_each_item_by_its_own_name() -> None:
    request = {"items": [{"image": {"ref": "a"}}, {"image": {"ref": "a"}}]}
    for data, kind in ((picture(), Sample), (b"broken", WireError)):
        body = (
            b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n' + json.dumps(request).encode()
            + b'\r\n--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + data + b"\r\n--x--\r\n"
        )  # fmt: skip
        parsed = read(body, "multipart/form-data; boundary=x")
        assert [type(sample) for sample in parsed.samples] == [kind, kind]
    assert [error.param for error in parsed.samples if isinstance(error, WireError)] == [
        "items[0].image",
        "items[1].image",
    ]


def test_each_use_of_a_tensor_counts() -> None:
    items = [Item(image=Media(ref="a")) for _ in range(4)]
    body = packed(items, {"a": np.zeros((10, 10, 3), np.uint8)})
    assert len(sound(read(body, SAFETENSORS, decoded_bytes=1200))) == 4
    with pytest.raises(WireError) as caught:
        read(body, SAFETENSORS, decoded_bytes=1199)
    assert (caught.value.code, caught.value.param) == ("payload_too_large", "items[3]")


def test_large_bodies_are_read_in_threads() -> None:
    request = {"items": [{"prompt": "p" * 60_000, "image": b64(picture(level))} for level in (0, 255)]}
    assert [sample.image[0, 0, 0] for sample in sound(read(request)) if sample.image is not None] == [0, 255]


def test_multipart_without_its_package_is_an_unsupported_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(multipart, "import_module", absent)
    with pytest.raises(WireError, match="pip install 'tiltflow\\[serve\\]'") as caught:
        read(b"--x--", "multipart/form-data; boundary=x")
    assert caught.value.status == 415


def test_too_many_parts() -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n'
    body = b"".join(part % index for index in range(multipart.MAX_PARTS + 1)) + b"--x--\r\n"
    with pytest.raises(WireError, match="more than 4096 parts"):
        read(body, "multipart/form-data; boundary=x")


def test_a_boundary_is_needed() -> None:
    with pytest.raises(WireError, match="no boundary"):
        read(b"--x--", "multipart/form-data")


def test_a_picture_that_is_a_frame_many_times_is_refused_before_it_is_copied() -> None:
    item = Item(prompt="p", video=[Media(ref="a")] * 50)
    with pytest.raises(WireError) as caught:
        read(packed([item], {"a": levels(1)[0]}), SAFETENSORS, decoded_bytes=20 * levels(1).nbytes)
    assert (caught.value.code, caught.value.param) == ("payload_too_large", "items[0].video")


def test_the_format_of_a_picture_in_base64_may_be_told() -> None:
    item = {"prompt": "p", "image": {**b64(picture(1)), "format": "png"}}
    assert sound(read({"items": [item]}))[0].image is not None
    for wrong in ({"b64": "", "format": "gif"}, {"ref": "a", "format": "png"}):
        with pytest.raises(WireError) as caught:
            read({"items": [{"prompt": "p", "image": wrong}]})
        assert caught.value.code == "invalid_request"


def test_nothing_is_decoded_for_a_request_that_would_not_be_taken() -> None:
    def refuse(request: Any) -> None:
        raise WireError("overloaded", f"no room for {len(request.items)}")

    broken = {"items": [{"prompt": "p", "image": b64(b"no picture")}] * 2}
    reader = RequestReader(Limits())
    with pytest.raises(WireError, match="no room for 2"):
        asyncio.run(reader.read(json.dumps(broken).encode(), JSON, admit=refuse, hold=allowed))
    reader.close()


def test_pixels_are_counted_before_they_exist() -> None:
    held: list[int] = []
    body = {
        "items": [{"prompt": "p", "image": b64(picture(1, side=8))}, {"prompt": "p", "video": [b64(picture(1))] * 3}]
    }
    reader = RequestReader(Limits())
    asyncio.run(reader.read(json.dumps(body).encode(), JSON, admit=allowed, hold=held.append))
    assert sorted(held) == [8 * 8 * 3] * 4 + [3 * 8 * 8 * 3]  # each picture, and the video that is made of three

    def full(count: int) -> None:
        raise WireError("overloaded", "full")

    with pytest.raises(WireError, match="full"):
        asyncio.run(reader.read(json.dumps(body).encode(), JSON, admit=allowed, hold=full))
    reader.close()
