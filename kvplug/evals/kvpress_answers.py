"""Answers under a cache that kvpress has pruned; runs in another Python, one that has kvpress.

``python kvpress_answers.py`` with a request as JSON on stdin; imports nothing of kvplug or vLLM. A
reply is one line that starts with ``REPLY``.

The prompt but for its last token is computed densely, then each layer keeps some keys of every KV
head for good, and the last token and the answer see only those. So a method sees the whole question
before it chooses, which is the best case for it (kvpress's own pipeline prunes the context before
it knows the question), and yet no token of the answer comes from dense attention.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import Any


def methods() -> dict[str, Any]:
    """kvpress's classes by our names for them; the keys are those of ``kvplug.evals.peers``."""
    import kvpress

    return {
        "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "knorm": kvpress.KnormPress,
    }


def compression(kept: int, seen: int) -> float:
    """The share to drop of ``seen`` tokens so that ``kept`` stay."""
    # Half a token more: kvpress rounds down.
    return 1 - (kept + 0.5) / seen


def reply(model: Any, tokenizer: Any, press: Any, prompt: str, most: int) -> dict[str, Any]:
    """Greedy tokens after one prompt; ``press`` None keeps everything."""
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    cache, length = DynamicCache(), ids.shape[1]
    start = time.perf_counter()
    with press(model) if press is not None else nullcontext():
        model.model(input_ids=ids[:, :-1], past_key_values=cache)
    token, tokens, first = ids[:, -1:], [], 0.0
    for place in range(most):
        position = torch.tensor([[length - 1 + place]])
        logits = model(input_ids=token, past_key_values=cache, position_ids=position).logits
        token = logits[:, -1:].argmax(-1)
        first = first or time.perf_counter() - start
        tokens.append(int(token))
        if tokens[-1] in ends:
            break
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"output": text, "tokens": tokens, "ttft_s": first, "decode_tok_s": None}


def main() -> None:
    """Answers the request on standard input."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    method = methods()[request["method"]]
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        for number, kept, prompt, most in request["asked"]:
            seen = len(tokenizer(prompt)["input_ids"]) - 1
            press = method(compression_ratio=compression(kept, seen)) if kept < seen else None
            answer = reply(model, tokenizer, press, prompt, most)
            print("REPLY", json.dumps([number, answer]), flush=True)


if __name__ == "__main__":
    main()
