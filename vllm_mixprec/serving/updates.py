# SPDX-License-Identifier: Apache-2.0
"""The routes that change a running model, for operators who asked for them."""

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_mixprec.errors import MixPrecError
from vllm_mixprec.loading.reload import hash_fixed
from vllm_mixprec.serving.errors import ApiError, MixPrecRoute
from vllm_mixprec.serving.model_info import has_plan, load_served_table

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.mixprec")

VARIABLE = "VLLM_MIXPREC_ALLOW_UPDATES"

_DRAIN_S = 120.0
_RELOAD_S = 1800.0
_ANSWER_S = 60.0


def updates_allowed() -> bool:
    """Whether the operator lets clients change the model."""
    return os.environ.get(VARIABLE) == "1"


class UpdateRoute(MixPrecRoute):
    """A route that changes the model: refused before its body is looked at, unless allowed."""

    def admit(self) -> None:
        if not updates_allowed():
            raise ApiError(
                403,
                "forbidden",
                f"this server does not allow changes to its model; start it with {VARIABLE}=1",
            )


class Reloader:
    """Reads the weights again, from the sources that the plan names.

    The workers know where in its file each tensor lies, since they started. So a source may get
    new values, but not another layout.
    """

    def __init__(self, client: EngineClient, fingerprint: str | None = None) -> None:
        self._client, self._fingerprint = client, fingerprint
        self._busy = asyncio.Lock()

    @classmethod
    async def create(cls, client: EngineClient) -> "Reloader":
        """Remember how the sources lie now, if reloads are allowed at all.

        Raises:
            MixPrecError: the plan or its sources cannot be read.
        """
        config = client.vllm_config
        if not updates_allowed() or not has_plan(config):
            return cls(client)
        return cls(client, await asyncio.to_thread(_fingerprint_sources, config))

    async def reload(self) -> dict[str, Any]:
        """Let running requests end, hold new ones back, read the weights, go on.

        Raises:
            ApiError: 501 where vLLM cannot reload; 409 when the sources are not as they were, or
                during another reload; 504 when running requests do not end; 500 when the reload
                fails midway: then the engine stays paused, because its weights are half old and
                half new, and vLLM cannot take up a reload that broke off.
        """
        if not has_plan(self._client.vllm_config) and current_platform.is_cpu():
            raise ApiError(
                501,
                "not_implemented",
                "vLLM's reload corrupts the experts of a model without a plan on the CPU (it does "
                "not prepack them again). Restart the server, or serve the model through a plan",
            )
        if self._busy.locked():
            raise ApiError(409, "conflict", "the weights are being reloaded. Wait for that")
        async with self._busy:
            begun = time.monotonic()
            await self._check_sources()
            await self._pause()
            await self._load()
            await asyncio.wait_for(self._client.reset_prefix_cache(), _ANSWER_S)
            await asyncio.wait_for(self._client.resume_generation(), _ANSWER_S)
            return {"status": "reloaded", "seconds": round(time.monotonic() - begun, 3)}

    async def _check_sources(self) -> None:
        """Find what can be found before anything is changed."""
        if self._fingerprint is None:
            return
        try:
            found = await asyncio.to_thread(_fingerprint_sources, self._client.vllm_config)
        except MixPrecError as error:
            raise ApiError(409, "conflict", f"nothing was reloaded: {error}") from error
        if found != self._fingerprint:
            raise ApiError(
                409,
                "conflict",
                "nothing was reloaded: the plan, or the headers of its sources, are not what they "
                "were when the server started; expected new values in the same layout. Restart it",
            )

    async def _pause(self) -> None:
        if await asyncio.wait_for(self._client.is_paused(), _ANSWER_S):
            raise ApiError(
                409,
                "conflict",
                "generation is paused: another front end reloads the weights, or a reload failed. "
                "Wait, or restart the server",
            )
        try:
            await asyncio.wait_for(self._client.pause_generation(mode="wait"), _DRAIN_S)
        except asyncio.TimeoutError:
            await asyncio.wait_for(self._client.resume_generation(), _ANSWER_S)
            raise ApiError(
                504,
                "timeout",
                f"running requests did not end within {_DRAIN_S:g} s; nothing was reloaded. Try "
                "again when the server is less busy",
            ) from None

    async def _load(self) -> None:
        try:
            await asyncio.wait_for(self._client.collective_rpc("reload_weights"), _RELOAD_S)
        except EngineDeadError:
            raise
        except Exception as error:
            logger.exception("reload_weights failed; generation stays paused")
            reason = str(error) or f"it took more than {_RELOAD_S:g} s"
            raise ApiError(
                500,
                "internal",
                f"the reload failed midway: {reason}. Generation stays paused, because the weights "
                "are half replaced. Mend the cause and restart the server",
            ) from error


def _fingerprint_sources(vllm_config: "VllmConfig") -> str:
    """Tell how the sources lie by now.

    Raises:
        MixPrecError: a source is missing, cut short or does not fit the plan any more.
    """
    return hash_fixed(load_served_table(vllm_config).routes)
