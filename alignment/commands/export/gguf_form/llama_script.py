"""Reads a GGUF file with llama.cpp: ``PYTHON llama_script.py REQUEST.json REPLY.json``.

It runs in an environment of its own, with llama-cpp-python and without this project, so it imports nothing of ours. A
request has ``model`` (a path), ``threads``, ``wide_cache`` (keys and values in float32), ``texts`` (to be cut into
tokens), ``rows`` (token ids; the likeliest next token at each position is wanted) and ``prompts`` (token ids, to be
answered greedily by at most ``max_new_tokens`` tokens, up to one of ``stops``). A reply has the same lists as ``ids``,
``likeliest``, ``answers`` and ``margins``: at each token of an answer the second likeliest token, and how many nats it
is behind.
"""

from __future__ import annotations

import json
import sys
from typing import Any

F32 = 0
"""ggml's number of float32, as a type of the cache."""


def main(request_file: str, reply_file: str) -> None:
    """Answers a request."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    reply = answer(request)
    with open(reply_file, "w", encoding="utf-8") as file:
        json.dump(reply, file)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request."""
    import llama_cpp

    longest = max(map(len, request["rows"] + request["prompts"]), default=1) + request["max_new_tokens"]
    llama = llama_cpp.Llama(
        request["model"],
        n_ctx=longest + 8,
        n_batch=longest + 8,
        n_ubatch=longest + 8,
        n_gpu_layers=0,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        logits_all=True,
        verbose=False,
        **({"type_k": F32, "type_v": F32} if request["wide_cache"] else {}),
    )
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    answers = [greedy(llama, row, request["max_new_tokens"], set(request["stops"])) for row in request["prompts"]]
    return {
        "version": llama_cpp.__version__,
        "ids": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]],
        "likeliest": [likeliest(llama, row) for row in request["rows"]],
        "answers": [[token for token, *_ in tokens] for tokens in answers],
        "margins": [[second for _, *second in tokens] for tokens in answers],
        "ends": [token for token in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)],
        "adds_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
    }


def likeliest(llama: Any, row: list[int]) -> list[int]:
    """The likeliest next token at each position."""
    llama.reset()
    llama.eval(row)
    return [int(scores.argmax()) for scores in llama.scores[: len(row)]]


def greedy(llama: Any, row: list[int], max_new_tokens: int, stops: set[int]) -> list[tuple[int, int, float]]:
    """The likeliest token each time, with the second likeliest one and the distance between their logits."""
    llama.reset()
    tokens: list[tuple[int, int, float]] = []
    ids = row
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1][0] in stops):
        llama.eval(ids)
        scores = llama.scores[llama.n_tokens - 1]
        best = int(scores.argmax())
        others = scores.copy()
        others[best] = float("-inf")
        second = int(others.argmax())
        tokens.append((best, second, float(scores[best] - scores[second])))
        ids = [best]
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
