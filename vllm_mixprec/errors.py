# SPDX-License-Identifier: Apache-2.0
"""The errors that this package raises on purpose.

Each message says where (``file:line`` or a tensor), what was found, what was expected and one
remedy, so that it can be shown to a user without a traceback.
"""


class MixPrecError(Exception):
    """Base of every error that a user can act on."""


class PlanError(MixPrecError):
    """The plan's YAML is malformed or contradicts itself."""


class CheckpointError(MixPrecError):
    """A checkpoint is missing, unreadable, cut short or inconsistent."""


class RouteError(MixPrecError):
    """A plan and its checkpoints do not fit together."""


class UnsupportedError(MixPrecError):
    """The input is well formed, but this version cannot serve it."""


class StatsUnavailableError(MixPrecError):
    """The engine counts no experts: it was told not to, or its model has none."""
