"""Drives the public API as a user of another language does: stubs generated from proto/, and nothing of ours besides.

    python3 -m pip install --target target/tools/python -r tests/python/requirements.txt
    PYTHONPATH=target/tools/python python3 tests/python/drive.py 127.0.0.1:7411

Prints a line per check, and ends with 1 where one failed. Serves any model: what it asks for is taken from the
answers themselves.
"""

import math
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "I have a dream"
# Far beyond what any call here takes: a server that hangs fails a check instead of the run.
PATIENCE_S = 120

CHECKS = []


def check(function):
    """A check: a function of the client whose name says what holds."""
    CHECKS.append(function)
    return function


def generate_stubs(out):
    """All packages, also those that this client does not call: their stubs must come out too."""
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto/petek").rglob("*.proto"))
    assert protos, "no protos found"
    words = ["-m", "grpc_tools.protoc", "-I.", f"--python_out={out}", f"--grpc_python_out={out}", *protos]
    subprocess.run([sys.executable, *words], cwd=ROOT / "proto", check=True)
    sys.path.insert(0, out)


class Client:
    """The stub, and requests in short."""

    def __init__(self, endpoint):
        from petek.inference.v1 import chat_pb2, event_pb2, generation_pb2, inference_service_pb2
        from petek.inference.v1 import inference_service_pb2_grpc

        self.calls, self.events = inference_service_pb2, event_pb2
        self.generation, self.chat_messages = generation_pb2, chat_pb2
        self.stub = inference_service_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(endpoint))

    def model(self):
        return self.stub.ListModels(self.calls.ListModelsRequest(), timeout=PATIENCE_S).models[0]

    def spec(self, prompt=PROMPT, options=None, **params):
        """A text or a list of ids, greedy and of 12 tokens unless the parameters say otherwise."""
        params = {"temperature": 0.0, "max_tokens": 12, **params}
        prompt = {"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}}
        return self.generation.GenerationSpec(
            model=self.model().name, params=params, options=options or {}, **prompt
        )

    def generate(self, *args, **params):
        return self.send(self.spec(*args, **params))

    def send(self, spec):
        return self.stub.Generate(self.calls.GenerateRequest(spec=spec), timeout=PATIENCE_S).generation

    def stream(self, *args, **params):
        request = self.calls.StreamGenerateRequest(spec=self.spec(*args, **params))
        return [message.event for message in self.stub.StreamGenerate(request, timeout=PATIENCE_S)]

    def chat_spec(self, text="What is a honeycomb?", **params):
        params = {"temperature": 0.0, "max_tokens": 12, **params}
        messages = [{"role": "user", "content": text}]
        return self.chat_messages.ChatSpec(model=self.model().name, messages=messages, params=params)

    def tokenize(self, text, **fields):
        request = self.calls.TokenizeRequest(model=self.model().name, text=text, **fields)
        return self.stub.Tokenize(request, timeout=PATIENCE_S)


def equal(got, expected):
    assert got == expected, f"got {got!r}, expected {expected!r}"


def joined(events):
    """A stream's started, one joined delta of sequence 0, and finished; checks their order on the way."""
    kinds = [event.WhichOneof("kind") for event in events]
    equal((kinds[0], kinds[-1]), ("started", "finished"))
    deltas = [event.delta for event in events[1:-1]]
    equal({kind for kind in kinds[1:-1]} - {"delta"}, set())
    ids = []
    for delta in deltas:
        equal((delta.index, delta.first_index), (0, deltas[0].first_index + len(ids)))
        ids.extend(delta.token_ids)
    return events[0].started, "".join(delta.text for delta in deltas), ids, events[-1].finished


def refusal(call):
    """How a call is refused: its code, ErrorInfo, and the field that BadRequest names, if any."""
    try:
        call()
    except grpc.RpcError as error:
        trailers = {key: value for key, value in error.trailing_metadata() or ()}
        details = trailers.get("grpc-status-details-bin")
        assert details is not None, f"{error.code()} without details: {error.details()}"
        status = status_pb2.Status.FromString(details)
        equal((status.code, status.message), (error.code().value[0], error.details()))
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        assert status.details[0].Unpack(info), "ErrorInfo comes first"
        equal(info.domain, "petek")
        fields = [
            violation.field
            for detail in status.details[1:]
            if detail.Unpack(bad)
            for violation in bad.field_violations
        ]
        return error.code().name, info, fields
    raise AssertionError("the call was not refused")


@check
def models_are_listed(client):
    model = client.model()
    assert model.name and len(model.revision) == 64 and model.workers_serving >= 1, model
    assert 0 < model.context_tokens and 0 < model.vocabulary_tokens and model.block_size_tokens >= 16, model
    shown = client.stub.GetModel(client.calls.GetModelRequest(model=model.name), timeout=PATIENCE_S)
    equal(shown.model, model)


@check
def text_becomes_ids_and_back(client):
    text = "Çok güzel bir rüya, 蜂蜜 🐝!"
    answer = client.tokenize(text, include_pieces=True)
    equal([piece.token_id for piece in answer.pieces], list(answer.token_ids))
    assert all(piece.raw.decode(errors="replace") == piece.text for piece in answer.pieces)
    equal(answer.context_tokens, client.model().context_tokens)
    request = client.calls.DetokenizeRequest(model=client.model().name, token_ids=answer.token_ids)
    equal(client.stub.Detokenize(request, timeout=PATIENCE_S).text, text)


@check
def a_text_is_continued(client):
    answer = client.generate()
    started, (sequence,), finished = answer.started, answer.sequences, answer.finished
    assert sequence.text and started.worker and len(started.request_id) == 36, answer
    equal(started.prompt_tokens, len(client.tokenize(PROMPT).token_ids))
    equal(finished.usage.prompt_tokens, started.prompt_tokens)
    equal(finished.usage.completion_tokens, len(sequence.token_ids))
    (end,) = finished.sequences
    reasons = client.events.FinishReason
    if end.reason == reasons.Value("FINISH_REASON_LENGTH"):
        equal(len(sequence.token_ids), 12)
    else:
        equal(reasons.Name(end.reason), "FINISH_REASON_STOP_EOS")
    assert 0 < finished.timings.ttft_ms <= finished.timings.total_ms, finished.timings


@check
def a_stream_is_the_unary_answer_in_pieces(client):
    whole = client.generate()
    started, text, ids, finished = joined(client.stream())
    equal((text, ids), (whole.sequences[0].text, list(whole.sequences[0].token_ids)))
    equal(started.prompt_tokens, whole.started.prompt_tokens)
    equal(finished.sequences[0].reason, whole.finished.sequences[0].reason)


@check
def ids_are_a_prompt_too(client):
    by_ids = client.generate(list(client.tokenize(PROMPT).token_ids))
    equal(by_ids.sequences[0], client.generate().sequences[0])


@check
def a_seed_repeats_an_answer(client):
    drawn = client.generate(temperature=1.0)
    again = client.generate(temperature=1.0, seed=drawn.started.seed)
    equal(again.sequences[0], drawn.sequences[0])
    equal(drawn.finished.sequences[0].seed, drawn.started.seed)


@check
def each_of_several_answers_has_its_seed(client):
    several = client.generate(temperature=1.0, n=3, seed=2**64 - 1, min_tokens=12)
    equal([sequence.index for sequence in several.sequences], [0, 1, 2])
    equal(several.finished.usage.completion_tokens, 36)
    seeds = [end.seed for end in several.finished.sequences]
    equal((seeds[0], len(set(seeds))), (2**64 - 1, 3))
    alone = client.generate(temperature=1.0, seed=seeds[2], min_tokens=12)
    equal(alone.sequences[0].token_ids, several.sequences[2].token_ids)


@check
def logprobs_go_with_the_ids(client):
    (sequence,) = client.generate(logprobs=3, ignore_eos=True, skip_special_tokens=False).sequences
    equal([token.token_id for token in sequence.logprobs], list(sequence.token_ids))
    for token in sequence.logprobs:
        # Greedy: the chosen one is the likeliest.
        equal((token.rank, len(token.top), token.top[0].token_id), (1, 3, token.token_id))
        assert token.logprob <= 0 and token.logprob == token.top[0].logprob, token
    equal(b"".join(token.raw for token in sequence.logprobs).decode(errors="replace"), sequence.text)


@check
def a_stop_string_ends_the_text_before_it(client):
    (sequence,) = client.generate().sequences
    stop = sequence.text[2:5]
    cut = client.generate(stop=["\0never", stop])
    equal(cut.sequences[0].text, sequence.text[: sequence.text.index(stop)])
    (end,) = cut.finished.sequences
    equal(end.reason, client.events.FinishReason.Value("FINISH_REASON_STOP_SEQUENCE"))
    equal((end.WhichOneof("matched"), end.stop_string), ("stop_string", stop))
    kept = client.generate(stop=[stop], include_stop=True)
    equal(kept.sequences[0].text, cut.sequences[0].text + stop)


@check
def a_broken_stream_is_resumed(client):
    params = {"temperature": 1.0, "seed": 7, "min_tokens": 12}
    _, text, ids, _ = joined(client.stream(**params))
    deltas = [event.delta for event in client.stream(**params) if event.WhichOneof("kind") == "delta"]
    had = deltas[: len(deltas) // 2]
    resumed_ids = [token_id for delta in had for token_id in delta.token_ids]
    options = client.generation.RequestOptions(resumed_ids=resumed_ids)
    _, rest, rest_ids, finished = joined(client.stream(options=options, **params))
    equal("".join(delta.text for delta in had) + rest, text)
    equal(resumed_ids + rest_ids, ids)
    equal(finished.usage.completion_tokens, 12)


@check
def a_conversation_is_answered(client):
    request = client.calls.ChatRequest(spec=client.chat_spec())
    if not client.model().has_chat_template:
        equal(refusal(lambda: client.stub.Chat(request, timeout=PATIENCE_S))[0], "INVALID_ARGUMENT")
        return
    whole = client.stub.Chat(request, timeout=PATIENCE_S).generation
    stream = client.stub.StreamChat(
        client.calls.StreamChatRequest(spec=client.chat_spec()), timeout=PATIENCE_S
    )
    _, text, ids, _ = joined([message.event for message in stream])
    equal((text, ids), (whole.sequences[0].text, list(whole.sequences[0].token_ids)))
    spec = client.chat_messages.ChatSpec(messages=client.chat_spec().messages)
    request = client.calls.TokenizeRequest(model=client.model().name, chat=spec)
    tokenized = client.stub.Tokenize(request, timeout=PATIENCE_S)
    equal(len(tokenized.token_ids), whole.started.prompt_tokens)
    assert "What is a honeycomb?" in tokenized.rendered, tokenized.rendered


@check
def a_cancelled_stream_harms_nobody(client):
    spec = client.spec(max_tokens=client.model().context_tokens, ignore_eos=True)
    stream = client.stub.StreamGenerate(client.calls.StreamGenerateRequest(spec=spec), timeout=PATIENCE_S)
    next(iter(stream))
    stream.cancel()
    equal(stream.code(), grpc.StatusCode.CANCELLED)
    assert client.generate().sequences[0].text


@check
def bad_values_are_refused_by_name(client):
    for params, field in [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": math.inf}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 65}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"min_tokens": 13}, "min_tokens"),
    ]:
        code, info, fields = refusal(lambda: client.generate(**params))
        expected = ("INVALID_ARGUMENT", "INVALID_FIELD", [f"spec.params.{field}"])
        equal((code, info.reason, fields), expected)
        # A stream is refused alike, before its first event.
        code, info, fields = refusal(lambda: client.stream(**params))
        equal((code, info.reason, fields), expected)


@check
def bad_ids_are_refused_by_place(client):
    _, info, fields = refusal(lambda: client.generate([0, client.model().vocabulary_tokens]))
    equal((info.reason, fields), ("INVALID_FIELD", ["spec.token_ids.ids[1]"]))
    _, info, fields = refusal(lambda: client.generate([]))
    equal((info.reason, fields), ("INVALID_FIELD", ["spec.prompt"]))


@check
def a_prompt_that_fills_the_context_is_refused_with_both_numbers(client):
    context = client.model().context_tokens
    code, info, _ = refusal(lambda: client.generate([1] * context))
    equal((code, info.reason), ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"))
    equal((info.metadata["prompt_tokens"], info.metadata["context_tokens"]), (str(context),) * 2)


@check
def what_is_not_served_is_refused_by_name(client):
    _, info, fields = refusal(lambda: client.generate(repetition_penalty=1.5))
    equal((info.reason, fields), ("UNSUPPORTED_PARAMETER", ["spec.params.repetition_penalty"]))
    spec = client.spec()
    spec.model = "nobody-serves-this"
    code, info, fields = refusal(lambda: client.send(spec))
    equal((code, info.reason, fields), ("NOT_FOUND", "UNKNOWN_MODEL", ["spec.model"]))
    equal(info.metadata["model"].strip('"'), "nobody-serves-this")
    request = client.calls.GetModelRequest(model="nobody-serves-this")
    code, info, _ = refusal(lambda: client.stub.GetModel(request, timeout=PATIENCE_S))
    equal((code, info.reason), ("NOT_FOUND", "UNKNOWN_MODEL"))


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: drive.py HOST:PORT")
    endpoint = sys.argv[1].removeprefix("http://")
    with tempfile.TemporaryDirectory() as stubs:
        generate_stubs(stubs)
        client = Client(endpoint)
        failed = 0
        for function in CHECKS:
            name = function.__name__.replace("_", " ")
            try:
                function(client)
                print(f"ok      {name}")
            except (AssertionError, grpc.RpcError, ValueError) as error:
                failed += 1
                (*_, frame) = traceback.extract_tb(error.__traceback__)
                what = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else error
                print(f"FAILED  {name}: {what} ({frame.name}, line {frame.lineno})")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
