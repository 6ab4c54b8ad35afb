"""A real OpenAI-compatible HTTP server over a tiny vision-language model, in a process of its own.

`python -m tests.judge_server --descriptor 3 --model FOLDER`, which is given a listening socket by that number, answers
`POST /v1/chat/completions` as vLLM does, as far as judges ask: images as data URLs, `top_logprobs` up to 20,
`logprob_token_ids`, `return_tokens_as_token_ids`, `logit_bias`, and `POST /tokenize`. `POST /control` makes it
misbehave, and `GET /control` tells what it was asked.
Without a model it only says what it is told to.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageStat

ROOT = Path(__file__).resolve().parents[1]
MOST_LOGPROBS = 20
BRIGHTNESS = "<brightness>"  # in a given reply: the last image's, from 1 (black) to 4 (white)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CORPUS = (
    "user: Is this a picture of a cat and a dog? Answer with one word: Yes or No.",
    "assistant: Yes yes YES No no NO Yes yes YES No no NO",
    "Rate the aspects from 1 to 4: faithfulness, quality, rendering. Score: 3.5 Score: N/A",
)


def save_judge(folder: Path) -> Path:
    """Write a random LLaVA with byte-level BPE, whose words include yes and no in all spellings; return its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([line for line in CORPUS for _ in range(20)] + ["Yes", "No", "yes", "no"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.2,  # so that images differ
    )
    torch.manual_seed(4)  # by which neither yes nor no is among the likeliest words
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token, int)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


# --- the server ------------------------------------------------------------------------------------------------------


@dataclass
class Behaviour:
    """What the server does; all of it can be set by `POST /control`, which also resets the rest."""

    reply: str | None = None  # say this instead of what the model would
    finish_reason: str = "stop"  # of such a reply
    logprobs: bool = True  # tell log-probabilities when asked
    delay: float = 0.0  # seconds before each answer
    status: int = 200  # refuse with this
    times: int = -1  # so many requests; -1: all
    darker_than: float = 1.1  # that have a last image below this brightness
    headers: dict[str, str] = field(default_factory=dict[str, str])  # of refusals
    tokenize: int = 200  # status of /tokenize
    tokenize_delay: float = 0.0  # seconds
    label_tokens: str = "told"  # or "refused", "ignored" (as is how tokens are to be written), "written" (that is not)
    # What was asked since the last reset.
    requests: int = 0
    tokenized: list[str] = field(default_factory=list[str])
    now: int = 0
    most: int = 0  # requests at once
    images: list[list[float]] = field(default_factory=list[list[float]])  # mean colours in the last request
    body: dict[str, Any] = field(default_factory=dict[str, Any])  # the last request, without its images


class Judge:
    """The model and its processor."""

    def __init__(self, folder: Path):
        """Load both; nothing is downloaded."""
        import torch
        from transformers import LlavaForConditionalGeneration, LlavaProcessor

        torch.set_num_threads(1)
        self._torch = torch
        self._model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self._processor: Any = LlavaProcessor.from_pretrained(folder)

    def logprobs(self, body: Mapping[str, Any]) -> Any:
        """Return the log-probabilities of the first token of the answer, `[V]`."""
        turns, images = [], []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            images += [sent for part in parts if (sent := picture(part)) is not None]
            turns.append(
                {
                    "role": message["role"],
                    "content": [{"type": "image"} if part["type"] == "image_url" else part for part in parts],
                }
            )
        text = self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = self._processor(text=[text], images=images or None, return_tensors="pt")
        with self._torch.no_grad():
            logits = self._model(**inputs).logits[0, -1].double()
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        return logits.log_softmax(0)

    def entry(self, token: int, logprob: float, *, as_id: bool) -> dict[str, Any]:
        """Return a token as answers write it."""
        text = self._processor.tokenizer.decode([token])
        return {"token": f"token_id:{token}" if as_id else text, "logprob": logprob, "bytes": None}

    def tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text."""
        return self._processor.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def first_token(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the likeliest first token with the log-probabilities that were asked for."""
        logprobs = self.logprobs(body)
        best = int(logprobs.argmax())
        ids = body.get("logprob_token_ids") or logprobs.topk(body.get("top_logprobs") or 0).indices.tolist()
        as_id = bool(body.get("return_tokens_as_token_ids"))
        top = [self.entry(token, float(logprobs[token]), as_id=as_id) for token in ids]
        return {**self.entry(best, float(logprobs[best]), as_id=as_id), "top_logprobs": top}


def picture(part: Mapping[str, Any]) -> Image.Image | None:
    """Return the image of one part of a message, or None if it is text."""
    if part["type"] != "image_url":
        return None
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def colours(body: Mapping[str, Any]) -> list[list[float]]:
    """Return the mean colours of a request's images, each channel in [0, 1]."""
    parts = [
        part for message in body["messages"] if not isinstance(message["content"], str) for part in message["content"]
    ]
    sent = [image for part in parts if (image := picture(part)) is not None]
    return [[level / 255 for level in ImageStat.Stat(image).mean] for image in sent]


def application(judge: Judge | None) -> Any:
    """Return the ASGI application."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.requests import Request

    app = FastAPI()
    app.state.behaviour = Behaviour()

    async def complete(request: Request) -> JSONResponse:
        state: Behaviour = app.state.behaviour
        body = await request.json()
        state.requests += 1
        state.now += 1
        state.most = max(state.most, state.now)
        try:
            await asyncio.sleep(state.delay)
            return JSONResponse(*answer(state, body))
        finally:
            state.now -= 1

    def answer(state: Behaviour, body: dict[str, Any]) -> tuple[Any, int, dict[str, str]]:
        state.images = colours(body)
        state.body = {**body, "messages": [text_of(message) for message in body["messages"]]}
        level = sum(state.images[-1]) / 3
        if state.status != 200 and state.times != 0 and level < state.darker_than:
            state.times -= 1
            return {"error": {"message": "it was told to refuse"}}, state.status, state.headers
        if (body.get("top_logprobs") or 0) > MOST_LOGPROBS:
            return {"error": {"message": f"top_logprobs is at most {MOST_LOGPROBS}"}}, 400, {}
        if state.label_tokens == "refused" and "logprob_token_ids" in body:
            return {"error": {"message": "logprob_token_ids: extra inputs are not permitted"}}, 400, {}
        if state.label_tokens in ("ignored", "written"):
            unknown = ("logprob_token_ids", "return_tokens_as_token_ids")[: 1 + (state.label_tokens == "ignored")]
            body = {key: value for key, value in body.items() if key not in unknown}
        first = judge.first_token(body) if judge is not None and state.reply is None else None
        text = first["token"] if first else (state.reply or "").replace(BRIGHTNESS, f"{1 + 3 * level:.3f}")
        told = {"content": [first]} if first and state.logprobs and body.get("logprobs") else None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if first else state.finish_reason,
            "logprobs": told,
        }
        return (
            {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]},
            200,
            {},
        )

    async def tokenize(request: Request) -> JSONResponse:
        state: Behaviour = app.state.behaviour
        body = await request.json()
        state.tokenized.append(body["prompt"])
        await asyncio.sleep(state.tokenize_delay)
        if judge is None or state.tokenize != 200:
            return JSONResponse({"detail": "no"}, state.tokenize if state.tokenize != 200 else 404)
        assert set(body) == {"model", "prompt", "add_special_tokens"}
        tokens = judge.tokens(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return JSONResponse({"count": len(tokens), "max_model_len": 512, "tokens": tokens})

    async def control(request: Request) -> JSONResponse:
        app.state.behaviour = Behaviour(**await request.json())
        return JSONResponse({})

    async def report() -> JSONResponse:
        return JSONResponse(vars(app.state.behaviour))

    app.add_api_route("/v1/chat/completions", complete, methods=["POST"])
    app.add_api_route("/tokenize", tokenize, methods=["POST"])
    app.add_api_route("/control", control, methods=["POST"])
    app.add_api_route("/control", report, methods=["GET"])
    return app


def text_of(message: Mapping[str, Any]) -> dict[str, str]:
    """Return a message without its images."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return {"role": message["role"], "content": "".join(parts)}


def main() -> None:
    """Serve until killed."""
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    judge = None if arguments.model is None else Judge(arguments.model)
    listener = socket.socket(fileno=arguments.descriptor)
    uvicorn.Server(uvicorn.Config(application(judge), log_level="warning")).run(sockets=[listener])


# --- the tests' side -------------------------------------------------------------------------------------------------


class JudgeServer:
    """A server process and its address."""

    def __init__(self, folder: Path | None, port: int = 0):
        """Start it and wait until it answers.

        Args:
            folder: Of the model, or None for a server with no words of its own.
            port: Where; 0 finds a free one.
        """
        self.folder = folder
        listener = socket.create_server(("127.0.0.1", port))
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [sys.executable, "-m", "tests.judge_server", "--descriptor", str(listener.fileno())]
        command += [] if folder is None else ["--model", str(folder)]
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._process = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=self._log,
        )
        listener.close()  # the process has it now; when it dies, connections are refused
        deadline = time.monotonic() + 90
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the judge server did not start: {self._told()}")
            time.sleep(0.05)

    def behave(self, **behaviour: Any) -> None:
        """Set what it does from now on, and forget what it was asked."""
        self._call(json.dumps(behaviour).encode())

    def asked(self) -> dict[str, Any]:
        """Return what it was asked since."""
        return self._call(None)

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it and free everything."""
        self.kill()
        self._log.close()

    def _call(self, data: bytes | None) -> dict[str, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/control", data)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def _answers(self) -> bool:
        try:
            self.asked()
        except (urllib.error.URLError, ConnectionError, TimeoutError):  # it takes its time to begin
            return False
        return True

    def _told(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]


@contextlib.contextmanager
def judge_server(folder: Path | None = None, *, port: int = 0) -> Iterator[JudgeServer]:
    """Run a server for the time of the block."""
    server = JudgeServer(folder, port)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    main()
