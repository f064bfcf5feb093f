# SPDX-License-Identifier: Apache-2.0
"""``vllm-mixprec stats``: which experts a running server, or saved snapshots, kept busy."""

import argparse
import functools
import http.client
import importlib.util
import json
import math
import operator
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from vllm_mixprec.cli.output import Progress, print_json, print_table
from vllm_mixprec.errors import MixPrecError
from vllm_mixprec.experts.describe import describe
from vllm_mixprec.experts.snapshot import (
    MAX_FILE_BYTES,
    PLOT_SUFFIXES,
    ExpertSnapshot,
    SnapshotError,
)

_DESCRIPTION = """\
Show how busy each expert was: of a running server since its last reset or start, or in snapshots
that were saved. Several sources, such as the replicas of one model, are added up."""

_EXAMPLE = """\
examples:
  vllm-mixprec stats http://localhost:8000 --top 10 --plot heat.png
  vllm-mixprec stats http://localhost:8000 --minutes 5 --export last5.json
  vllm-mixprec stats replica-a.json replica-b.json --export both.csv"""

_ROUTE = "/v1/mixprec/export_expert_stats"
_KEY_VARIABLE = "VLLM_API_KEY"
_PLUGINS = "VLLM_PLUGINS=mixprec,mixprec_metrics,mixprec_endpoints"

_TIMEOUT_S = 30.0  # the server itself gives up asking its engines after 10
_MAX_MESSAGE_BYTES = 65536
_MAX_MESSAGE_CHARACTERS = 500
_MAX_TOP = 100_000

_EXPORT_SUFFIXES = (".json", ".csv")


class ServerError(MixPrecError):
    """A server could not be reached, or did not answer with statistics."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "stats",
        help="expert statistics of a running server or a saved snapshot",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "sources",
        metavar="URL_OR_FILE",
        nargs="+",
        type=_source,
        help="the address of vllm serve, or a snapshot that was exported or saved",
    )
    parser.add_argument(
        "--top",
        metavar="K",
        type=_top,
        default=10,
        help="how many of the busiest and of the idlest experts; default: 10",
    )
    parser.add_argument(
        "--minutes", metavar="M", type=_minutes, help="of a server: only the last M minutes"
    )
    parser.add_argument(
        "--plot", metavar="PNG", type=_file(PLOT_SUFFIXES), help="draw a heatmap (also .svg, .pdf)"
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        type=_file(_EXPORT_SUFFIXES),
        help="save as a snapshot (.json) or as a table (.csv)",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"the server's API key; default: ${_KEY_VARIABLE}"
    )
    return parser


def _source(text: str) -> SplitResult | Path:
    """Return the address of a server's root, or a file."""
    if "://" not in text:
        return Path(text)
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r}, expected http://HOST:PORT or https://HOST")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an address in ASCII without blanks")
    if parts.username is not None:
        raise argparse.ArgumentTypeError("an address with a user in it; pass --api-key instead")
    # What a user has at hand may be the base of OpenAI's routes or of ours.
    path = parts.path.rstrip("/").removesuffix("/dashboard")
    path = path.removesuffix("/mixprec").removesuffix("/v1").rstrip("/")
    return SplitResult(parts.scheme, parts.netloc, path, "", "")


def _top(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:10]) <= _MAX_TOP:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 1 to {_MAX_TOP}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return minutes


def _file(suffixes: Sequence[str]) -> Any:
    def parse(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a name in {', '.join(suffixes)}")
        return Path(text)

    return parse


def run(arguments: argparse.Namespace) -> int:
    """Read the sources, print what they say, write the files that were asked for."""
    if arguments.minutes is not None and any(isinstance(s, Path) for s in arguments.sources):
        arguments.parser.error("--minutes goes with servers only; a file holds one window")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        arguments.parser.error(
            "--plot draws with matplotlib, which is not installed: "
            "pip install 'vllm-mixprec[notebook]'"
        )
    key = arguments.api_key or os.environ.get(_KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable()):
        arguments.parser.error("the API key holds characters that no HTTP header can")
    with Progress() as progress:
        snapshots = []
        for done, source in enumerate(arguments.sources):
            progress(f"reading {_spell(source)}", done, len(arguments.sources))
            snapshots.append(_read(source, arguments.minutes, key))
    snapshot = functools.reduce(operator.add, snapshots)
    written = _write(snapshot, arguments)
    if arguments.json:
        described = describe(snapshot, arguments.top)
        names = [_spell(source) for source in arguments.sources]
        print_json({"sources": names, **described, "written": written})
    else:
        _print(snapshot, arguments.top)
        for file in written:
            print(f"wrote {file}")
    return 0


def _spell(source: SplitResult | Path) -> str:
    return str(source) if isinstance(source, Path) else urlunsplit(source)


def _read(source: SplitResult | Path, minutes: float | None, key: str | None) -> ExpertSnapshot:
    if isinstance(source, SplitResult):
        return fetch_snapshot(urlunsplit(source), minutes=minutes, api_key=key)
    if not source.exists() and ":" in source.name:
        raise SnapshotError(
            f"{source}: no such file; expected a snapshot or an address. "
            f"For a server write http://{source}"
        )
    return ExpertSnapshot.load(source)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects as errors: urllib would send the API key on to the other host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch_snapshot(
    base: str, *, minutes: float | None = None, api_key: str | None = None
) -> ExpertSnapshot:
    """Ask a server for its expert statistics.

    Args:
        base: address of its root, such as ``http://localhost:8000``.
        minutes: only the last that many; None for the window since the last reset.

    Raises:
        ServerError: it cannot be reached, refuses, or answers with something else.
    """
    body: dict[str, Any] = {"format": "snapshot"}
    if minutes is not None:
        body["minutes"] = minutes
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(
        base + _ROUTE, data=json.dumps(body).encode(), headers=headers, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            content = answer.read(MAX_FILE_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise ServerError(_explain_status(base, error, sent_key=bool(api_key))) from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(_explain_failure(base, error)) from None
    try:
        return ExpertSnapshot.from_json(content)
    except SnapshotError as error:
        # The error's own remedy, to save again, does not fit an answer.
        found = str(error).split(". ")[0]
        raise ServerError(
            f"{base}: the answer is no snapshot: {found}. Check that this is the address of "
            "vllm serve, and that vllm-mixprec has one version on both sides."
        ) from None


def _explain_failure(base: str, error: OSError | http.client.HTTPException) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ConnectionRefusedError):
        return (
            f"{base}: connection refused, expected a running server. "
            "Start vllm serve, or correct the address."
        )
    if isinstance(reason, TimeoutError):
        return (
            f"{base}: no answer within {_TIMEOUT_S:g} s, expected one. "
            "Look at the server's log, and try again."
        )
    if isinstance(reason, socket.gaierror):
        return f"{base}: unknown host ({reason.strerror}). Correct the address."
    said = _one_line(str(reason)) or type(reason).__name__
    return f"{base}: no answer over HTTP ({said}), expected vllm serve. Correct the address."


def _explain_status(base: str, error: urllib.error.HTTPError, *, sent_key: bool) -> str:
    status, said = error.code, _message(error)
    if status == 401:
        found = "refused the API key" if sent_key else "wants an API key"
        return (
            f"{base}: the server {found} (401). Pass its key with --api-key, or in {_KEY_VARIABLE}."
        )
    if status == 404:
        return (
            f"{base}: the server has no {_ROUTE} (404); expected one that runs with {_PLUGINS}. "
            "Start it so, with vllm-mixprec installed."
        )
    if 300 <= status < 400:
        target = _one_line(error.headers.get("Location", "elsewhere"))
        return f"{base}: the server redirects to {target} ({status}). Write that address instead."
    if status in (503, 504):  # what our server says of itself ends with a remedy
        advice = "" if said else " Look at the server's log."
    elif status == 422:
        advice = " Correct the option."
    else:
        advice = " Check that this is the address of vllm serve, and look at its log."
    reason = _one_line(error.reason or "") or "no message"
    return f"{base}: the server answered {status}: {said or reason}.{advice}"


def _message(error: urllib.error.HTTPError) -> str:
    """Return what the server says is wrong, in one printable line without a full stop, or ""."""
    try:
        content = error.read(_MAX_MESSAGE_BYTES)
    except (OSError, http.client.HTTPException):
        content = b""
    try:
        parsed = json.loads(content)
        found = parsed["error"] if isinstance(parsed, dict) else None
        said = found["message"] if isinstance(found, dict) else found
        field = found.get("field") if isinstance(found, dict) else None
        said = f"{field}: {said}" if field else said
    except (ValueError, KeyError, RecursionError):
        said = None
    return _one_line(said) if isinstance(said, str) else ""


def _one_line(said: str) -> str:
    """Return what a server said, short and without what could drive a terminal."""
    said = "".join(c if c.isprintable() else " " for c in " ".join(said.split()))
    return said[:_MAX_MESSAGE_CHARACTERS].rstrip(". ")


def _write(snapshot: ExpertSnapshot, arguments: argparse.Namespace) -> list[str]:
    """Write the export and the plot; return the files."""
    written = []
    if arguments.export is not None:
        if arguments.export.suffix.lower() == ".csv":
            snapshot.to_csv(arguments.export)
        else:
            snapshot.save(arguments.export)
        written.append(str(arguments.export))
    if arguments.plot is not None:
        snapshot.plot(arguments.plot)
        written.append(str(arguments.plot))
    return written


def _print(snapshot: ExpertSnapshot, top: int, heading: str = "") -> None:
    described = describe(snapshot, top)
    summary = described["summary"]
    rates = ""
    if snapshot.seconds > 0:
        rates = (
            f", {summary['tokens_per_s']:.1f} tokens and "
            f"{summary['activations_per_s']:.1f} activations a second"
        )
    print(f"{heading}{snapshot.model}")
    print(f"  window       {snapshot.seconds:.1f} s since {summary['window']['since']}{rates}")
    print(f"  tokens       {snapshot.tokens:,} routed, {_count(snapshot.requests, 'request')}")
    print(
        f"  experts      {snapshot.num_experts} in each of {len(snapshot.layers)} layers, "
        f"{snapshot.experts_per_token} a token"
    )
    print(f"  activations  {snapshot.activations:,}")
    if not snapshot.activations:
        print("No activations in this window. Send the server a request and ask again.")
    else:
        _print_layers(described["layers"])
        _print_loads(described["busiest"], "busiest experts")
        _print_loads(described["idlest"], "idlest experts")
    if snapshot.draft is not None:
        _print(snapshot.draft, top, heading="draft of ")


def _print_layers(layers: list[dict[str, Any]]) -> None:
    columns = ["layer", "total", "active", "a second", "fairness", "busiest/mean", "busiest"]
    rows = [
        [
            layer["layer"],
            f"{layer['total']:,}",
            f"{layer['active_experts']}/{layer['experts']}",
            _number(layer["rate_per_s"], ".1f"),
            _number(layer["jain_fairness"], ".3f"),
            _number(layer["busiest_over_mean"], ".2f"),
            _number(layer["busiest_expert"], "d"),
        ]
        for layer in layers
    ]
    print_table(columns, rows, right=columns, title="layers (fairness: Jain's index, 1 = even)")


def _print_loads(loads: list[dict[str, Any]], title: str) -> None:
    columns = ["layer", "expert", "count", "share of layer", "last activation"]
    rows = [
        [
            load["layer"],
            str(load["expert"]),
            f"{load['count']:,}",
            f"{load['share']:.2%}",
            load["last_activation"] or "-",
        ]
        for load in loads
    ]
    print_table(columns, rows, right=columns[:-1], title=title)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
