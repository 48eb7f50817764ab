"""Lets requests have wishes of their own: checked in the front end, heeded in workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvplug.errors import KvplugError
from kvplug.patches.record import Patch
from kvplug.patches.request_usage import Counting
from kvplug.selection import is_selected, options_of

if TYPE_CHECKING:
    from kvplug.knobs import Knobs
    from kvplug.windows import Asked, Ints


def _wrap_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _checked(self.vllm_config, params)
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _wrap_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        # Here, and not in the front end, which a request made elsewhere does not pass.
        knobs = _checked(self.vllm_config, request.sampling_params)
        if knobs is not None:
            request.cache_salt = knobs.salt(request.cache_salt)
        return original(self, request)

    return preprocess_add_request


def _checked(vllm_config: Any, params: Any) -> Knobs | None:
    """What a request asks for that the engine would not do anyhow.

    Raises:
        VLLMValidationError: Something that it cannot do. The server answers 400 with the sentence.
    """
    extra = getattr(params, "extra_args", None)
    if not extra or not is_selected(vllm_config):
        return None
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    from kvplug.knobs import Knobs

    page, longest = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
    try:
        knobs = Knobs.parse(extra)
        if knobs is not None and not current_platform.is_cpu():
            raise KvplugError("Requests cannot ask kvplug for anything on GPUs yet.")
        return None if knobs is None else knobs.within(options_of(vllm_config), page, longest)
    except KvplugError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _wrap_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _build_attention_metadata(
        self: Any, num_tokens: int, num_reqs: int, *args: Any, **kwargs: Any
    ) -> Any:
        if is_selected(self.vllm_config):
            tell_wishes(self, num_reqs)
        return original(self, num_tokens, num_reqs, *args, **kwargs)

    return _build_attention_metadata


def tell_wishes(runner: Any, num_reqs: int) -> None:
    """Tells every planner what the requests of the next step ask for.

    Args:
        runner: vLLM's model runner, its batch in order.
        num_reqs: Requests of the step.
    """
    names = runner.input_batch.req_ids[:num_reqs]
    asked = _asked(runner, names)
    wishes = [knobs for knobs in asked if knobs is not None]
    steered = any(knobs.steers for knobs in wishes)
    counting = None
    if any(knobs.usage for knobs in wishes):
        counting = Counting([bool(knobs and knobs.usage) for knobs in asked], names)
        counting.begin(runner)
    for groups in runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder(0)
            if not hasattr(builder, "asked"):
                continue
            builder.asked = _rows(builder.pipeline, asked, num_reqs) if steered else None
            builder.counts = None if counting is None else counting.of_group()
            if builder.pipeline.trace is not None:
                builder.pipeline.trace.names = names
                builder.pipeline.trace.tokens_of = functools.partial(_tokens, runner)


def _tokens(runner: Any, row: int) -> Ints:
    """Token ids that vLLM's batch knows of a row's request, over its memory."""
    batch = runner.input_batch
    known: Ints = batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]]
    return known


def _asked(runner: Any, names: list[str]) -> list[Knobs | None]:
    """What the named requests ask for."""
    from kvplug.knobs import Knobs

    found = [getattr(runner.requests[name].sampling_params, "extra_args", None) for name in names]
    return [Knobs.parse(extra) if extra else None for extra in found]


def _rows(pipeline: Any, asked: list[Knobs | None], rows: int) -> Asked:
    """What each request asks for."""
    from kvplug.windows import Asked

    pages = np.full(rows, pipeline.geometry.budget_pages, np.int32)
    targets = np.full(rows, np.nan)
    for row, knobs in enumerate(asked):
        if knobs is not None:
            pages[row] = pipeline.budget_pages(knobs)
            if knobs.recall_target is not None:
                targets[row] = knobs.recall_target
    return Asked(pages, targets)


_VLLM = ">=0.32,<0.33"
_UPSTREAM = "https://github.com/vllm-project/vllm/issues/57566"

PATCHES = [
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        vllm=_VLLM,
        why="Extra arguments of a request are checked by nobody before the engine has them.",
        upstream=_UPSTREAM,
        remove_when="A plugin can check a request's extra arguments.",
        fingerprint="e22b5f772979054c",
        wrap=_wrap_inputs,
    ),
    Patch(
        target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        vllm=_VLLM,
        why="Requests with budgets of their own must not share cached pages with others: what "
        "earlier layers attended to is in the keys and values of later ones.",
        upstream=_UPSTREAM,
        remove_when="A plugin can add to what tells prefixes apart.",
        fingerprint="a8b386db3f85cf76",
        wrap=_wrap_requests,
    ),
    Patch(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        vllm=_VLLM,
        why="A metadata builder sees lengths and pages of a batch, but not whose they are.",
        upstream=_UPSTREAM,
        remove_when="CommonAttentionMetadata carries the requests' extra arguments.",
        fingerprint="6015ffa2b3ec7cd3",
        wrap=_wrap_metadata,
    ),
]
