# SPDX-License-Identifier: Apache-2.0
"""Couplings of the expert statistics and of the routes under ``/v1/mixprec``."""

from vllm_mixprec.couplings.base import Coupling

_CAPTURER = "vllm.model_executor.layers.fused_moe.routed_experts_capturer"
_ROUTER = "vllm.model_executor.layers.fused_moe.router"

STATISTICS: tuple[Coupling, ...] = (
    # The counters on the device: experts/counter.py, experts/worker.py.
    Coupling(
        f"{_ROUTER}.base_router:BaseRouter",
        "calls capture_fn with the logical ids of every batch",
        members=("capture_fn", "set_capture_fn"),
    ),
    Coupling(
        f"{_ROUTER}.zero_expert_router:ZeroExpertRouter",
        "reports zero experts as expert 0, and is not counted",
    ),
    Coupling(
        f"{_CAPTURER}:RoutedExpertsSink",
        "has a kernel that routes by itself tell what it chose",
        ("moe_config", "capture_fn"),
    ),
    Coupling(
        f"{_CAPTURER}:RoutedExpertsCaptureSource",
        "tells layers that report their routing without vLLM's runner",
        members=("capture_fn",),
    ),
    Coupling(
        "vllm.forward_context:get_forward_context",
        "says which rows of a batch are padding (is_padding, slot_mapping, dp_metadata)",
    ),
    Coupling(
        "vllm.v1.worker.ubatching:dbo_current_ubatch_id",
        "tells the micro-batches of one step apart",
    ),
    Coupling("vllm.envs:VLLM_MOE_SKIP_PADDING", "says whether padding is marked as such"),
    Coupling("vllm.triton_utils:HAS_TRITON", "says whether the counting kernel can be had"),
    Coupling(
        "vllm.model_executor.models.utils:extract_layer_index",
        "finds a layer's number in its name",
        ("layer_name",),
    ),
    Coupling(
        "vllm.distributed:get_tp_group",
        "says which rank of a tensor-parallel group answers",
    ),
    Coupling(
        "vllm.v1.worker.worker_base:WorkerBase",
        "loads, warms up and executes through methods that one worker can have wrapped",
        members=(
            "load_model",
            "compile_or_warm_up_model",
            "execute_model",
            "get_model",
            "vllm_config",
            "device",
        ),
    ),
    # The front end: experts/collect.py, experts/prometheus.py.
    Coupling(
        "vllm:LLM",
        "reaches its workers",
        members=("collective_rpc", "llm_engine"),
    ),
    Coupling(
        "vllm.engine.protocol:EngineClient",
        "has the engines' client (engine_core.call_utility_all_async, engine_ranks_managed)",
        members=("collective_rpc", "generate", "abort", "check_health", "errored", "dead_error"),
    ),
    Coupling(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "starts its output handler when it can be asked",
        ("vllm_config", "log_stats"),
        ("_run_output_handler", "logger_manager", "output_handler"),
    ),
    Coupling(
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
        "is built once a front-end process, by a plug-in's entry point",
        ("vllm_config", "engine_indexes"),
        ("record", "log_engine_initialized"),
    ),
    Coupling("vllm.v1.engine.exceptions:EngineDeadError", "ends the polling"),
    Coupling(
        "vllm.v1.engine.core:EngineCoreProc",
        "answers a call when its Future is done, and says when it comes to rest",
        members=("collective_rpc", "_invoke_utility_method", "_notify_idle_state_callbacks"),
    ),
    Coupling(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor",
        "asks its workers without waiting, and hears them in the order of its questions",
        members=("collective_rpc",),
    ),
    # The routes: serving.
    Coupling("vllm:__version__", "is the version that model_info tells"),
    Coupling("vllm.v1.engine.exceptions:EngineGenerateError", "is one request's failure"),
    Coupling(
        "vllm:SamplingParams",
        "takes what a request asks for",
        members=("temperature", "top_p", "top_k", "max_tokens"),
    ),
    Coupling("vllm.sampling_params:RequestOutputKind", "asks for the whole text at once"),
    Coupling("vllm.outputs:RequestOutput", "has the text", members=("outputs", "prompt_token_ids")),
    Coupling("vllm.renderers.inputs.preprocess:parse_model_prompt", "turns a text into a prompt"),
    Coupling(
        "vllm.entrypoints.serve.utils.api_utils:with_cancellation",
        "stops a request whose client has gone",
    ),
    Coupling("vllm.exceptions:GracefulHTTPError", "carries an HTTP status"),
    Coupling("vllm.exceptions:VLLMClientError", "is the client's mistake"),
    Coupling("vllm.exceptions:VLLMUnprocessableEntityError", "is a value that cannot be taken"),
)
