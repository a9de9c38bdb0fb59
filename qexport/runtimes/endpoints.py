"""Endpoints that serve an artifact: which kind of server it is, and what it says of token ids.

vLLM (`/v1/completions` with `prompt_logprobs`), SGLang (`/generate` with `return_logprob`), TGI (`/generate` with
`decoder_input_details`); the fields are those of their documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from qexport.artifact.served import RuntimeFacts
from qexport.errors import InputError
from qexport.runtimes import RuntimeSettings
from qexport.runtimes.requests import HttpRequests, Refused

_DTYPE: Final = "bfloat16"
"""What most servers compute in unless told otherwise, and the widest limit."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class TokenScores:
    """What an endpoint says of one text.

    Attributes:
        log_probabilities: of each token but the first, natural logarithms.
        tops: the likeliest token in place of each of them; None if the endpoint does not tell it.
    """

    log_probabilities: Sequence[float]
    tops: Sequence[int] | None


class Endpoint(Protocol):
    """A server that has a model, at a URL."""

    facts: RuntimeFacts
    where: str

    def scores(self, ids: Sequence[int]) -> TokenScores | None:
        """Of one text; None if the server cannot score prompts, or cannot be given these very tokens."""
        ...

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, perhaps up to an end of text."""
        ...

    def tokenized(self, text: str) -> list[int] | None:
        """The tokens that the server makes of a text, perhaps with its special ones; None if it does not tell."""
        ...


def open_endpoint(settings: RuntimeSettings, decode: Decode) -> Endpoint:
    """Finds out what answers at the URL.

    Args:
        settings: an entry of `verify.through` with a URL.
        decode: from token ids to text, for servers that take only text.

    Raises:
        InputError: nobody answers, or something else than these servers.
    """
    assert settings.url is not None
    requests, dtype = HttpRequests(settings.url, settings.timeout), settings.dtype or _DTYPE
    info = _asked(requests, "/info")
    if {"model_id", "version"} <= info.keys():
        return _Tgi(requests, _facts("TGI", info, dtype), decode)
    info = _asked(requests, "/get_model_info")
    if "model_path" in info:
        return _Sglang(requests, _facts("SGLang", {**info, **_asked(requests, "/get_server_info")}, dtype))
    info, models = _asked(requests, "/version"), _asked(requests, "/v1/models")
    names = [each["id"] for each in models.get("data", ()) if isinstance(each, dict) and "id" in each]
    if "version" in info and names:
        return _Vllm(requests, _facts("vLLM", {**info, "model": names[0]}, dtype), str(names[0]))
    raise InputError(
        "the endpoint is neither vLLM nor SGLang nor TGI", where=settings.url, mend="give the address of such a server"
    )


def _asked(requests: HttpRequests, path: str) -> Mapping[str, Any]:
    try:
        found = requests.get(path)
    except Refused:
        return {}
    return found if isinstance(found, dict) else {}


_TOLD: Final = ("model", "model_id", "model_path", "quantization", "quantize", "max_input_tokens", "tp_size")


def _facts(name: str, told: Mapping[str, Any], dtype: str) -> RuntimeFacts:
    """A model's path is cut to its last component: reports name no folders of a machine."""
    arguments = {key: str(told[key]).rpartition("/")[2] for key in _TOLD if told.get(key) is not None}
    own = told.get("model_dtype") or told.get("dtype")
    known = next((each for each in ("bfloat16", "float16", "float32") if own and each in str(own)), dtype)
    return RuntimeFacts(
        name=name, version=str(told.get("version") or "unknown"), kernels={}, dtype=known, arguments=arguments
    )


class _Vllm:
    def __init__(self, requests: HttpRequests, facts: RuntimeFacts, model: str) -> None:
        self._requests, self.facts, self.where, self._model = requests, facts, requests.url, model

    def scores(self, ids: Sequence[int]) -> TokenScores | None:
        choice = self._complete(ids, max_tokens=1, prompt_logprobs=1)
        if choice is None or not isinstance(entries := choice.get("prompt_logprobs"), list):
            return None
        with _shape(self.facts, self.where):
            known = list(zip(ids[1:], entries[1:], strict=True))
            chosen = [float(entry[str(token)]["logprob"]) for token, entry in known]
            tops = [next(int(key) for key, each in entry.items() if each["rank"] == 1) for _, entry in known]
            return TokenScores(chosen, tops)

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        found = [self._complete(ids, max_tokens=new_tokens, return_token_ids=True) for ids in prompts]
        with _shape(self.facts, self.where):
            return [_tokens(each["token_ids"]) for each in found if each is not None]

    def tokenized(self, text: str) -> list[int] | None:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return _made(self._requests, self.facts, body, lambda answer: answer["tokens"])

    def _complete(self, ids: Sequence[int], **options: Any) -> dict[str, Any] | None:
        body = {"model": self._model, "prompt": list(ids), "temperature": 0, **options}
        try:
            answer = self._requests.post("/v1/completions", body)
        except Refused as refusal:
            if "prompt_logprobs" in options:
                return None
            raise _failed(self.facts, self.where, refusal) from refusal
        with _shape(self.facts, self.where):
            choice: dict[str, Any] = answer["choices"][0]
            return choice


class _Sglang:
    def __init__(self, requests: HttpRequests, facts: RuntimeFacts) -> None:
        self._requests, self.facts, self.where = requests, facts, requests.url

    def scores(self, ids: Sequence[int]) -> TokenScores | None:
        options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
        told = self._generate(ids, 1, **options).get("meta_info", {})
        if not isinstance(entries := told.get("input_token_logprobs"), list):
            return None
        with _shape(self.facts, self.where):
            if [each[1] for each in entries] != list(ids):
                return None
            tops = told.get("input_top_logprobs")
            likeliest = None if not tops else [int(each[0][1]) for each in tops[1:]]
            return TokenScores([float(each[0]) for each in entries[1:]], likeliest)

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        with _shape(self.facts, self.where):
            return [_tokens(self._generate(ids, new_tokens)["output_ids"]) for ids in prompts]

    def tokenized(self, text: str) -> list[int] | None:
        return None

    def _generate(self, ids: Sequence[int], new: int, **options: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": new, "temperature": 0}
        try:
            answer = self._requests.post("/generate", {"input_ids": list(ids), "sampling_params": sampling, **options})
        except Refused as refusal:
            raise _failed(self.facts, self.where, refusal) from refusal
        with _shape(self.facts, self.where):
            found: dict[str, Any] = answer[0] if isinstance(answer, list) else dict(answer)
            return found


class _Tgi:
    """It takes text: what it scores counts only where it has made the same tokens of it."""

    def __init__(self, requests: HttpRequests, facts: RuntimeFacts, decode: Decode) -> None:
        self._requests, self.facts, self.where, self._decode = requests, facts, requests.url, decode

    def scores(self, ids: Sequence[int]) -> TokenScores | None:
        details = self._generate(ids, 1, decoder_input_details=True)
        if details is None:
            return None
        with _shape(self.facts, self.where):
            entries = details["prefill"]
            if [each["id"] for each in entries] != list(ids):
                return None
            return TokenScores([float(each["logprob"]) for each in entries[1:]], None)

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        found = [self._generate(ids, new_tokens) for ids in prompts]
        with _shape(self.facts, self.where):
            return [_tokens([each["id"] for each in details["tokens"]]) for details in found if details is not None]

    def tokenized(self, text: str) -> list[int] | None:
        return _made(self._requests, self.facts, {"inputs": text}, lambda answer: [each["id"] for each in answer])

    def _generate(self, ids: Sequence[int], new: int, **options: Any) -> dict[str, Any] | None:
        parameters = {"max_new_tokens": new, "details": True, "do_sample": False, **options}
        try:
            answer = self._requests.post("/generate", {"inputs": self._decode(ids), "parameters": parameters})
        except Refused as refusal:
            if "decoder_input_details" in options:
                return None
            raise _failed(self.facts, self.where, refusal) from refusal
        with _shape(self.facts, self.where):
            details: dict[str, Any] = answer["details"]
            return details


def _made(
    requests: HttpRequests, facts: RuntimeFacts, body: Mapping[str, Any], tokens: Callable[[Any], Any]
) -> list[int] | None:
    try:
        answer = requests.post("/tokenize", body)
    except Refused:
        return None
    with _shape(facts, requests.url):
        return _tokens(tokens(answer))


class _shape:
    """Turns what an unexpected answer raises into an error that names the server."""

    def __init__(self, facts: RuntimeFacts, where: str) -> None:
        self._name, self._where = f"{facts.name} {facts.version}", where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyError | IndexError | TypeError | ValueError | AttributeError | StopIteration):
            raise InputError(
                f"{self._name} answered something else than its protocol says ({type(error).__name__}: {error})",
                where=self._where,
                mend="check the server's version",
            ) from error


def _failed(facts: RuntimeFacts, where: str, refusal: Refused) -> InputError:
    return InputError(
        f"{facts.name} {facts.version} refused a request: {refusal}", where=where, mend="read the server's log"
    )


def _tokens(value: Any) -> list[int]:
    if not all(type(each) is int for each in value):
        raise TypeError("tokens that are no numbers")
    return list(value)
