"""Endpoints: each protocol with the numbers of a real model, the estimate against its definition, and bad answers."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase

import factories
from endpoint_server import Kind, serving
from qexport.artifact.served import RuntimeFacts, ServedRecord, confirmation, confirming
from qexport.errors import InputError, QexportError, ResourceError
from qexport.gates.serving import decide_served, fidelity_limit, limits_of_runtime
from qexport.progress import Steps, silent
from qexport.reading.stored_model import open_stored
from qexport.runtimes import RuntimeSettings
from qexport.runtimes.endpoints import open_endpoint
from qexport.runtimes.requests import HttpRequests
from qexport.verifying.sampled import FromEndpoint, kl_estimates, measure_endpoint
from test_verify_served import damaged, folder, kl, quantized, reference, sound  # noqa: F401

KINDS: tuple[Kind, ...] = ("vllm", "sglang", "tgi")
IDS = [1, 40, 90, 41, 77, 30, 2, 8]


def decode(ids: Sequence[int]) -> str:
    return str(factories.tokenizer().decode(list(ids)))


def opened(url: str, **settings: object) -> RuntimeSettings:
    return RuntimeSettings.model_validate({"url": url, "timeout": 20, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_each_server_is_recognised_and_scores_as_its_model(kind: Kind) -> None:
    model, tokenizer = sound(), factories.tokenizer()
    ids = tokenizer.encode(factories.TEXT[0][:60], add_special_tokens=False)
    with serving(kind, model, tokenizer) as (url, served), torch.no_grad():
        endpoint = open_endpoint(opened(url, dtype="float32"), decode)
        found, own = endpoint.scores(ids), model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        continued = endpoint.continued([ids[:9]], 3)
    assert found is not None
    assert found.log_probabilities == pytest.approx(
        own.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=1e-5
    )
    assert found.tops == (None if kind == "tgi" else own.argmax(-1).tolist())
    assert continued == [served._continued(ids[:9], 3)]
    told = {
        "vllm": ("vLLM", "0.32.0", "float32"),
        "sglang": ("SGLang", "0.5", "float16"),
        "tgi": ("TGI", "3.3.5", "float16"),
    }
    assert (endpoint.facts.name, endpoint.facts.version, endpoint.facts.dtype) == told[kind]
    assert "/" not in "".join(endpoint.facts.arguments.values())


def test_a_server_that_makes_other_tokens_of_the_text_has_not_scored_it() -> None:
    with serving("tgi", sound(), factories.tokenizer()) as (url, _):
        assert open_endpoint(opened(url), lambda ids: "something else").scores(IDS) is None


@pytest.mark.parametrize("seed", range(3))
def test_the_estimate_is_unbiased(seed: int) -> None:
    """Against the divergence of two distributions that are known in full."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(50))
    q = 0.7 * p + 0.3 * generator.dirichlet(np.ones(50))
    expected = float((p * np.log(p / q)).sum())
    estimates = kl_estimates(np.log(p), np.log(q))
    assert (estimates >= 0).all()
    assert float((p * estimates).sum()) == pytest.approx(expected, rel=1e-9)


def measured(folder: Path, kind: Kind, model: object, *, scoring: bool = True) -> FromEndpoint:  # noqa: F811
    with (
        serving(kind, model, factories.tokenizer(), scoring=scoring) as (url, _),  # type: ignore[arg-type]
        open_stored(folder, dtype=torch.float32) as artifact,
    ):
        endpoint = open_endpoint(opened(url, dtype="float32"), decode)
        return measure_endpoint(endpoint, artifact, reference(), Steps(silent))


def test_a_sound_endpoint_is_confirmed_and_a_damaged_one_is_not(folder: Path) -> None:  # noqa: F811
    models = {"sound": sound(), "o_proj x 0.9": damaged("o_proj x 0.9")}
    found = {name: measured(folder, "vllm", model) for name, model in models.items()}
    limit = limits_of_runtime(fidelity_limit("float32", None, "bfloat16"), rounds=False)
    decided = {name: decide_served([], each.figures, limit, "x", each.checks) for name, each in found.items()}
    verdicts = {name: {gate.name: gate.verdict for gate in gates} for name, gates in decided.items()}
    assert verdicts == {
        "sound": {"tokenizer through x": "pass", "fidelity_kl through x": "pass"},
        "o_proj x 0.9": {"tokenizer through x": "pass", "fidelity_kl through x": "fail"},
    }
    assert {each.scored for each in found.values()} == {"token"}
    figures = {figure.name: figure.value for figure in found["sound"].figures}
    assert figures.keys() >= {"perplexity_ratio", "top1_agreement", "decisive_flips"}
    assert (figures["fidelity_continuations"], figures["fidelity_top1"]) == (1.0, 1.0)
    merged = torch.nn.Module.float(copy.deepcopy(quantized().model))
    assert figures["mean_kl"] == pytest.approx(kl(merged, sound()), rel=0.5)  # other contexts, and 768 samples


def test_an_endpoint_that_scores_nothing_gives_continuations_and_says_so(folder: Path) -> None:  # noqa: F811
    found = measured(folder, "tgi", sound(), scoring=False)
    assert [figure.name for figure in found.figures] == ["fidelity_continuations"]
    assert (found.scored, found.figures[0].value) == ("nothing", 1.0)
    assert "does not score these prompts" in found.notes[0]
    facts = RuntimeFacts(name="TGI", version="3.3.5", kernels={}, dtype="float16", arguments={})
    record = ServedRecord(
        label="x", runtime=facts, scored=found.scored, figures=found.figures, fidelity_limit=None, notes=found.notes
    )
    gates = decide_served([], found.figures, [], "x", found.checks)
    assert [gate.verdict for gate in gates] == ["pass"]  # its tokenizer
    assert confirmation(record, gates) == "undecided"
    assert confirming([record], gates) == []
    assert confirming([record.model_copy(update={"scored": "token"})], gates) == ["x (TGI 3.3.5)"]
    failed = [gates[0].model_copy(update={"verdict": "fail"})]
    assert confirmation(record, failed) == "fail"
    for kind in ("vllm", "sglang"):
        with serving(kind, sound(), factories.tokenizer(), scoring=False) as (url, _):
            assert open_endpoint(opened(url), decode).scores(IDS) is None


def test_another_tokenizer_is_named(folder: Path) -> None:  # noqa: F811
    other = copy.deepcopy(factories.tokenizer())
    other.backend_tokenizer.normalizer = Lowercase()
    with (
        serving("tgi", sound(), other, scoring=False) as (url, _),
        open_stored(folder, dtype=torch.float32) as artifact,
    ):
        found = measure_endpoint(open_endpoint(opened(url), decode), artifact, reference(), Steps(silent))
    (gate,) = decide_served([], found.figures, [], "x", found.checks)
    assert (gate.name, gate.verdict) == ("tokenizer through x", "fail")
    assert "other tokens of" in gate.reason


@contextmanager
def answering(content: bytes, *, closing: bool = True) -> Iterator[str]:
    """A server that sends these bytes to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            kept = []
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.recv(65536)
                connection.sendall(content)
                kept.append(connection)
                if closing:
                    connection.close()

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"
ANSWERS: dict[str, tuple[bytes, bool, type[QexportError], str]] = {
    "no HTTP": (b"hello\r\n\r\n", True, InputError, "does not answer"),
    "no JSON": (HEAD + b"<html>..", True, InputError, "is not JSON"),
    "cut short": (HEAD + b"{", True, InputError, "is not JSON|does not answer"),
    "never ends": (HEAD + b"{", False, ResourceError, "did not answer within 1 s"),
    "another server": (HEAD + b'{"a": 1}', True, InputError, "neither vLLM nor SGLang nor TGI"),
    "a redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: http://x\r\nContent-Length: 0\r\n\r\n",
        True,
        InputError,
        "neither",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_bad_answers_end_with_one_message(name: str) -> None:
    content, closing, kind, message = ANSWERS[name]
    with answering(content, closing=closing) as url, pytest.raises(kind, match=message):
        open_endpoint(RuntimeSettings(url=url, timeout=1), decode)


def test_an_answer_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.runtimes.requests.MOST_BYTES", 4)
    with answering(HEAD + b'{"a": 1}') as url, pytest.raises(InputError, match="longer than 4 bytes"):
        HttpRequests(url, 5).get("/")


def test_wrong_fields_name_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with serving("vllm", sound(), factories.tokenizer()) as (url, served):
        endpoint = open_endpoint(opened(url), decode)
        for entries in ([None], [None] * 8, [None, *[{"7": {"logprob": "x", "rank": 1}}] * 7]):
            choice = {"prompt_logprobs": entries}
            monkeypatch.setattr(served, "post", lambda path, body, choice=choice: {"choices": [choice]})
            with pytest.raises(
                InputError, match=r"vLLM 0.32.0 answered something else than its protocol says"
            ) as found:
                endpoint.scores(IDS)
            assert found.value.where == url

        def infinite(path: str, body: dict[str, list[int]]) -> object:
            entries = [None, *({str(token): {"logprob": math.inf, "rank": 1}} for token in body["prompt"][1:])]
            return None if path == "/tokenize" else {"choices": [{"prompt_logprobs": entries, "token_ids": [1, 2]}]}

        monkeypatch.setattr(served, "post", infinite)
        scored = endpoint.scores(IDS)
        assert scored is not None
        assert not all(map(math.isfinite, scored.log_probabilities))
        with (
            open_stored(folder, dtype=torch.float32) as artifact,
            pytest.raises(InputError, match="no log-probability for each token") as found,
        ):
            measure_endpoint(endpoint, artifact, reference(), Steps(silent))
        assert (found.value.where, bool(found.value.mend)) == (url, True)
        monkeypatch.setattr(served, "post", lambda path, body: None)
        with pytest.raises(InputError, match="refused a request: HTTP 404") as found:
            endpoint.continued([IDS], 2)
        assert found.value.where == url
