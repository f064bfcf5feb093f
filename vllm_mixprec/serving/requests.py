# SPDX-License-Identifier: Apache-2.0
"""What clients may send; a field that is not listed is an error."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Minutes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Detail = Literal["full", "counts", "none"]

_MAX_PROMPTS = 256


class StatsQuery(BaseModel):
    """Parameters of ``GET expert_stats``.

    ``minutes`` asks for recent activity, of the last hour at most; the answer says what it covers.
    ``detail`` is what each layer says of its experts: an object each, plain arrays, or nothing.
    """

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(10, ge=1, le=1000)
    minutes: Minutes | None = None
    detail: Detail = "full"


class StatsBody(StatsQuery):
    """The same as JSON, where a number in quotes is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ExportQuery(BaseModel):
    """Parameters of ``POST export_expert_stats``.

    ``json`` and ``snapshot`` are one thing, what ``ExpertSnapshot.load`` reads. With ``reset`` a
    new window begins exactly where the exported one ends.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["json", "csv", "snapshot"] = "json"
    minutes: Minutes | None = None
    reset: bool = False


class ExportBody(ExportQuery):
    """The same as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Sampling(BaseModel):
    """How to generate. Greedy without ``do_sample``, and at temperature 0.

    ``top_k`` 0 or -1: all tokens.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    do_sample: bool = True


class GenerateBody(Sampling):
    """Body of ``POST generate``."""

    prompt: str = Field(min_length=1)


class BatchGenerateBody(Sampling):
    """Body of ``POST batch_generate``."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, max_length=_MAX_PROMPTS
    )


class WeightMappingBody(BaseModel):
    """Body of ``POST update_weight_mapping``: name or pattern -> source."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weight_mapping: dict[str, str] = Field(min_length=1)
