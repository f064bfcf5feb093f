# SPDX-License-Identifier: Apache-2.0
"""``register()``: the only place that touches vLLM's registries.

vLLM calls it in the front end, the engine core and every worker, maybe more than once, and logs
and swallows what it raises; so it imports no model and registers classes that explain themselves.
"""

import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_registered = False


def register() -> None:
    """Entry point ``vllm.general_plugins``: quantization method, load format, start-up check.

    On a vLLM that it cannot work with, a mixed model is refused with the reason, and others start.
    """
    global _registered
    if _registered:
        return
    if Path(sys.argv[0]).name == "vllm":
        _say_errors_plainly()
    try:
        _register()
    except Exception as error:  # whatever a vLLM raises that has moved things
        _refuse_mixed_models(error)
    _registered = True


def _register() -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models import ModelRegistry

    from vllm_mixprec.loading.loader import MixPrecLoader
    from vllm_mixprec.models.dsa import DENSE
    from vllm_mixprec.patches import worker_hook
    from vllm_mixprec.quant.config import LOAD_FORMAT, METHOD, MixPrecConfig

    register_quantization_config(METHOD)(MixPrecConfig)
    register_model_loader(LOAD_FORMAT)(MixPrecLoader)
    for name in set(DENSE.values()):
        ModelRegistry.register_model(name, f"vllm_mixprec.models.dense_dsa:{name}")
    _hook_start()
    worker_hook.apply()
    _bound_configs()
    _mend_engine_core()


def _bound_configs() -> None:
    """Have a config of gigabytes refused, which is read before a plan is looked for.

    Any model must start where this cannot be done: then it is read.
    """
    try:
        from vllm_mixprec.patches import config_size

        if config_size.needed():
            config_size.apply()
    except Exception:
        from vllm.logger import init_logger

        init_logger("vllm.mixprec").exception("a config.json is read whatever its size")


def _mend_engine_core() -> None:
    """Have an engine core, which registers plug-ins as it is built, not wait for statistics.

    Any model must start where this cannot be done: then it waits.
    """
    if "vllm.v1.engine.core" not in sys.modules:
        return
    try:
        from vllm_mixprec.patches import engine_core_wait

        if engine_core_wait.needed():
            engine_core_wait.apply()
    except Exception:
        from vllm.logger import init_logger

        init_logger("vllm.mixprec").exception("expert statistics are read between steps")


def _refuse_mixed_models(error: Exception) -> None:
    """Register, in place of what could not be, a method that names the coupling that is broken.

    Raises:
        Exception: ``error`` itself, where every coupling holds and so none explains it.
    """
    from vllm_mixprec.couplings import COUPLINGS, find_unfit
    from vllm_mixprec.routing import detect_platform

    unfit = find_unfit(detect_platform().family, COUPLINGS)
    if unfit is None:
        raise error
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_mixprec.quant.unfit import make_refusal

    register_quantization_config("mixprec")(make_refusal(unfit))


def _say_errors_plainly() -> None:
    """Let the ``vllm`` command end with our message alone where a plan cannot be served.

    Only that command's own process: a program that uses ``LLM`` keeps its tracebacks.
    """
    from vllm_mixprec.errors import MixPrecError

    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if isinstance(error, MixPrecError):
            print(f"vllm-mixprec: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = excepthook


def _hook_start() -> None:
    """See every model's ``VllmConfig`` before its engine starts.

    vLLM looks an architecture up in ``MODELS_CONFIG_MAP`` (models/config.py) and calls what it
    finds with the whole config: each entry is extended by :func:`prepare`.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from vllm_mixprec.models.dsa import INDEXER_KEY

    class PrepareMixPrec(VerifyAndUpdateConfig):
        @classmethod
        def verify_and_update_model_config(cls, model_config: "ModelConfig") -> None:
            super().verify_and_update_model_config(model_config)
            from vllm_mixprec.start import prepare_model

            prepare_model(model_config)

        @classmethod
        def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
            # vLLM's own for DeepSeek-V3.2 insists on the index_topk that serve_dense takes away.
            if not hasattr(vllm_config.model_config.hf_config, INDEXER_KEY):
                super().verify_and_update_config(vllm_config)
            from vllm_mixprec.start import prepare, prepare_counters, prepare_metrics

            if vllm_config.model_config.quantization == "mixprec":
                prepare(vllm_config)
            prepare_counters(vllm_config)
            prepare_metrics()

    hooks: dict[type, Any] = {VerifyAndUpdateConfig: PrepareMixPrec}
    for architecture in ModelRegistry.get_supported_archs():
        stock = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if stock not in hooks:
            hooks[stock] = type(f"MixPrec{stock.__name__}", (PrepareMixPrec, stock), {})
        MODELS_CONFIG_MAP[architecture] = hooks[stock]
