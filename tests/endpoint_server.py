"""A server on loopback that speaks the protocols of vLLM, SGLang and TGI, with the numbers of a real tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["vllm", "sglang", "tgi", "other"]


class Served:
    """The model, and what a server can be asked."""

    def __init__(
        self, kind: Kind, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, scoring: bool
    ) -> None:
        self.kind, self.model, self.tokenizer, self.scoring = kind, model, tokenizer, scoring
        self.asked: list[tuple[str, Any]] = []

    def get(self, path: str) -> Any:
        answers: dict[tuple[Kind, str], Any] = {
            ("vllm", "/version"): {"version": "0.32.0"},
            ("vllm", "/v1/models"): {"object": "list", "data": [{"id": "/models/tiny", "max_model_len": 64}]},
            ("sglang", "/get_model_info"): {"model_path": "/models/tiny", "is_generation": True},
            ("sglang", "/get_server_info"): {"version": "0.5", "dtype": "float16"},
            ("tgi", "/info"): {"model_id": "/data/tiny", "version": "3.3.5", "model_dtype": "torch.float16"},
        }
        return answers.get((self.kind, path))

    def post(self, path: str, body: Any) -> Any:
        self.asked.append((path, body))
        if path == "/tokenize" and self.kind == "vllm":
            return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        if path == "/tokenize" and self.kind == "tgi":
            return [{"id": token} for token in self.tokenizer.encode(body["inputs"])]
        if self.kind == "vllm" and path == "/v1/completions":
            return self._vllm(body)
        if self.kind == "sglang" and path == "/generate":
            return self._sglang(body)
        if self.kind == "tgi" and path == "/generate":
            return self._tgi(body)
        return None

    @torch.no_grad()
    def _log_probabilities(self, ids: list[int]) -> tuple[list[float], list[int]]:
        scores = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), scores.argmax(-1).tolist()

    @torch.no_grad()
    def _continued(self, ids: list[int], new: int) -> list[int]:
        for _ in range(new):
            ids = [*ids, int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        return ids[-new:]

    def _vllm(self, body: Any) -> Any:
        ids, found = body["prompt"], {"index": 0, "text": "?", "token_ids": None}
        if "prompt_logprobs" in body:
            if not self.scoring:
                return None
            entries: list[Any] = [None]
            for token, chosen, top in zip(ids[1:], *self._log_probabilities(ids), strict=True):
                entry = {str(top): {"logprob": -0.01, "rank": 1, "decoded_token": "?"}}
                entries.append(entry | {str(token): {"logprob": chosen, "rank": 1 if token == top else 9}})
            found["prompt_logprobs"] = entries
        if body.get("return_token_ids"):
            found["token_ids"] = self._continued(ids, body["max_tokens"])
        return {"id": "cmpl-1", "choices": [found]}

    def _sglang(self, body: Any) -> Any:
        ids = body["input_ids"]
        found: dict[str, Any] = {"meta_info": {}}
        if body.get("return_logprob") and self.scoring:
            chosen, tops = self._log_probabilities(ids)
            pairs = [[None, ids[0], None], *([each, token, None] for each, token in zip(chosen, ids[1:], strict=True))]
            likeliest = [None, *([[-0.01, top, None]] for top in tops)]
            found["meta_info"] = {"input_token_logprobs": pairs, "input_top_logprobs": likeliest}
        return found | {"output_ids": self._continued(ids, body["sampling_params"]["max_new_tokens"])}

    def _tgi(self, body: Any) -> Any:
        ids = self.tokenizer.encode(body["inputs"], add_special_tokens=False)
        prefill: list[Any] = []
        if body["parameters"].get("decoder_input_details"):
            if not self.scoring:
                return None
            chosen = [None, *self._log_probabilities(ids)[0]]
            prefill = [{"id": token, "text": "?", "logprob": each} for token, each in zip(ids, chosen, strict=True)]
        tokens = [{"id": token} for token in self._continued(ids, body["parameters"]["max_new_tokens"])]
        return {"generated_text": "?", "details": {"prefill": prefill, "tokens": tokens}}


@contextmanager
def serving(
    kind: Kind, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, scoring: bool = True
) -> Iterator[tuple[str, Served]]:
    """The server's URL, and the model behind it."""
    served = Served(kind, model, tokenizer, scoring=scoring)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(served.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(served.post(self.path, body))

        def _answer(self, found: Any) -> None:
            content = json.dumps({"error": "no"} if found is None else found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
