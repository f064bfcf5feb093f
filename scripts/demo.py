# SPDX-License-Identifier: Apache-2.0
"""Serve the demo model out of three checkpoints, and say what that costs and gives.

scripts/quickstart.sh runs this in its environment. It goes through the commands a user would type
(inspect, plan, check, compose, vllm serve), sends real requests to the server, and compares the
mixed model with each single-precision one. The server ends with this script, however that ends.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mixprec import Plan, compose
from vllm_mixprec.routing import detect_platform

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"
DEMO = Path("examples/demo-moe")  # this and the next are relative to ROOT, as a user types them
RUNS = Path("runs/quickstart")
MIXED = RUNS / "mixed"
SOURCES = ("bf16", "fp8", "int4")
PLAN_OPTIONS = ["--base", "bf16", "--attention", "fp8", "--experts", "0-3=bf16,4-9=fp8,int4"]

PROMPTS = ("    def __init__(self, name", "def read(self, ")
GENERATED_TOKENS = 200
WINDOWS, WINDOW_TOKENS = 32, 256  # of the held-out text, evenly spaced
MAX_MODEL_LEN = 1024
START_LIMIT_S, STOP_LIMIT_S = 900, 10
# Above this the numbers say that something is broken, not that a precision is low.
MAX_PERPLEXITY_RATIO = 1.25
KV_CACHE_GIB = "1"

out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class DemoError(Exception):
    """Something did not work; the message says what, and where to look."""


# --- the machine ----------------------------------------------------------------------------------


def choose_stages() -> tuple[int, str | None, dict[str, str]]:
    """Return pipeline stages, why there are fewer than two, and the server's extra environment."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if detect_platform().family != "cuda":
        cores = sorted(os.sched_getaffinity(0))[:8]  # more only get in a model's way this small
        stages = min(2, len(cores))
        size = len(cores) // stages
        binds = [cores[i * size : (i + 1) * size] for i in range(stages)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(str(core) for core in bind) for bind in binds
        )
        environment["VLLM_CPU_KVCACHE_SPACE"] = KV_CACHE_GIB
        return stages, None if stages == 2 else "one CPU core", environment
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = len([device for device in visible.split(",") if device.strip()])
    else:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        devices = len(listed.stdout.splitlines())
    return min(2, devices), None if devices > 1 else "one GPU", environment


# --- steps ----------------------------------------------------------------------------------------


class Steps:
    """Numbered headings."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0

    def __call__(self, title: str) -> None:
        self._done += 1
        out.print(Text(f"\n[{self._done}/{self._count}] {title}", style="bold cyan"))


def run_command(arguments: Sequence[str], log: Path) -> None:
    """Run one command of ours where the user sees it, and keep its output in ``log``."""
    show_command(arguments)
    done = subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a") as file:
        file.write(f"$ {shlex.join(arguments)}\n{done.stdout}\n")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    out.print(Text("\n".join(lines)), soft_wrap=True)
    if done.returncode:
        raise DemoError(f"{shlex.join(arguments)}: exit code {done.returncode}")


def show_command(arguments: Sequence[str]) -> None:
    out.print(Text(f"$ {shlex.join(arguments)}", style="bold"), soft_wrap=True)


def describe(source: Path) -> dict[str, Any]:
    """Return what ``vllm-mixprec inspect --json`` says."""
    command = [str(BIN / "vllm-mixprec"), "inspect", str(source), "--json"]
    found: dict[str, Any] = json.loads(subprocess.check_output(command))
    return found


# --- the server -----------------------------------------------------------------------------------


class Server:
    """``vllm serve DIR`` on a free port of this machine, for a ``with`` block."""

    def __init__(self, model: Path, stages: int, environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._environment = environment
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.arguments = ["vllm", "serve", str(model), "--pipeline-parallel-size", str(stages)]
        self.arguments += ["--served-model-name", "demo", "--max-model-len", str(MAX_MODEL_LEN)]
        self.arguments += ["--host", "127.0.0.1", "--port", str(port)]

    def __enter__(self) -> "Server":
        show_command(self.arguments)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(BIN / self.arguments[0]), *self.arguments[1:]],
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        begun = last_line = time.monotonic()
        with out.status("starting the server") as status:
            while True:
                elapsed = time.monotonic() - begun
                if self._process.poll() is not None:
                    raise DemoError(
                        f"the server ended with exit code {self._process.returncode} while it "
                        f"started; {self._log} ends with:\n{read_tail(self._log)}"
                    )
                if is_healthy(self.url):
                    break
                if elapsed > START_LIMIT_S:
                    raise DemoError(
                        f"no answer from the server within {START_LIMIT_S} s; {self._log} ends "
                        f"with:\n{read_tail(self._log)}"
                    )
                doing = read_tail(self._log, lines=1)[: max(out.width - 40, 20)]
                status.update(Text(f"starting the server, {elapsed:.0f} s: {doing}"))
                if not out.is_terminal and time.monotonic() - last_line > 15:
                    last_line = time.monotonic()
                    out.print(f"  starting, {elapsed:.0f} s", markup=False)
                time.sleep(0.5)
        out.print(f"ready after {time.monotonic() - begun:.0f} s at {self.url}", markup=False)

    def complete(self, **request: Any) -> list[dict[str, Any]]:
        """Return the choices of one request to ``/v1/completions``."""
        body = json.dumps({"model": "demo", **request}).encode()
        headers = {"Content-Type": "application/json"}
        ask = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
        try:
            with urllib.request.urlopen(ask, timeout=300) as answer:
                choices: list[dict[str, Any]] = json.load(answer)["choices"]
        except (OSError, KeyError, ValueError) as error:
            detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
            raise DemoError(
                f"{self.url}/v1/completions: {error} {detail}\n{self._log} ends with:\n"
                f"{read_tail(self._log)}"
            ) from error
        return choices

    def stop(self) -> None:
        """End the server and every process it started."""
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # none is left
        self._process.wait()


def _end_with_parent() -> None:
    """Ask Linux to end the server when this script is killed without a chance to end it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def read_tail(log: Path, lines: int = 25) -> str:
    text = log.read_text(errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


# --- closeness ------------------------------------------------------------------------------------


def read_windows() -> list[list[int]]:
    """Return token ids of held-out text; a token of this model is a byte."""
    text = (DEMO / "heldout.txt").read_bytes()
    step = (len(text) - WINDOW_TOKENS) // WINDOWS
    return [list(text[i * step : i * step + WINDOW_TOKENS]) for i in range(WINDOWS)]


def pick_log_probs(window: Sequence[int], entries: Iterable[Any]) -> list[float]:
    """Return the log-probability of each token of a window after its first."""
    found = []
    for token, entry in list(zip(window, entries, strict=True))[1:]:
        found.append(float(entry[str(token)]["logprob"]))
    return found


def measure_server(server: Server, windows: list[list[int]]) -> list[float]:
    """Return log-probabilities of the held-out tokens, from the server."""
    found: list[float] = []
    for i in range(0, len(windows), 8):
        batch = windows[i : i + 8]
        choices = server.complete(prompt=batch, max_tokens=1, temperature=0, prompt_logprobs=0)
        for window, choice in zip(batch, choices, strict=True):
            found += pick_log_probs(window, choice["prompt_logprobs"])
    return found


def measure_sources(environment: dict[str, str]) -> dict[str, list[float]]:
    """Return the same for each single-precision model, from the cache where it is still right.

    BF16 is served by stock vLLM. Stock refuses the other two on a CPU without AMX, so they go
    through a plan that takes all it can from one source.
    """
    cache = RUNS / "single_precision.json"
    key = _cache_key()
    try:
        known = json.loads(cache.read_text())
        if known["key"] == key:
            out.print(f"from an earlier run: {cache}", markup=False)
            log_probs: dict[str, list[float]] = known["log_probs"]
            return log_probs
    except (OSError, ValueError, KeyError):
        pass
    models = {"bf16": DEMO / "bf16"}
    for source in ("fp8", "int4"):
        models[source] = RUNS / f"all-{source}"
        plan = {
            "version": 1,
            "base": "bf16",
            "sources": {name: {"path": str(DEMO / name)} for name in ("bf16", source)},
            "rules": [
                {"match": "model.layers.*.self_attn.*_proj", "source": source},
                {"match": "model.layers.*.mlp.experts", "source": source},
            ],
        }
        compose(Plan.from_dict(plan), models[source])
    found = _measure_offline(models, environment)
    cache.write_text(json.dumps({"key": key, "log_probs": found}))
    return found


def _measure_offline(
    models: dict[str, Path], environment: dict[str, str]
) -> dict[str, list[float]]:
    """Run :func:`measure_models` in a process of its own, and say how far it is."""
    log = RUNS / "single_precision.log"
    answers = {name: RUNS / f"{name}.json" for name in models}
    for answer in answers.values():
        answer.unlink(missing_ok=True)
    pairs = [f"{model}={answers[name]}" for name, model in models.items()]
    environment = {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if "VLLM_CPU_OMP_THREADS_BIND" in environment:  # one process may have the cores of all stages
        cores = environment["VLLM_CPU_OMP_THREADS_BIND"].replace("|", ",")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores
    waiting = list(models)
    begun = time.monotonic()
    with log.open("w") as file, out.status("starting an offline engine") as status:
        process = subprocess.Popen(
            [sys.executable, __file__, "--measure", *pairs],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while waiting:
                ended = process.poll() is not None
                if answers[waiting[0]].exists():
                    out.print(f"{waiting.pop(0)}: {time.monotonic() - begun:.0f} s", markup=False)
                    begun = time.monotonic()
                elif ended:
                    raise DemoError(
                        f"the {waiting[0]} engine failed; {log} ends with:\n{read_tail(log)}"
                    )
                else:
                    elapsed = time.monotonic() - begun
                    status.update(Text(f"{waiting[0]}: offline engine, {elapsed:.0f} s"))
                    time.sleep(0.5)
        finally:
            process.kill()  # it has nothing left to do but to take itself down
            process.wait()
    return {name: json.loads(answer.read_text()) for name, answer in answers.items()}


def _cache_key() -> str:
    """Hash everything that the single-precision numbers depend on."""
    digest = hashlib.sha256(f"{metadata.version('vllm')} {WINDOWS} {WINDOW_TOKENS}".encode())
    package = (ROOT / "vllm_mixprec").rglob("*.py")
    for file in sorted([*package, *(path for path in DEMO.rglob("*") if path.is_file())]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def measure_models(pairs: Iterable[str]) -> None:
    """Measure models with engines of this process, one after the other; what ``--measure`` runs.

    ``pairs`` are MODEL=ANSWER.json.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    windows = read_windows()
    for pair in pairs:
        model, _, answer = pair.partition("=")
        llm = LLM(model, max_model_len=MAX_MODEL_LEN, enforce_eager=True, seed=0)
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=window) for window in windows],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
            use_tqdm=False,
        )
        found = [
            entry[token].logprob
            for window, output in zip(windows, outputs, strict=True)
            for token, entry in list(zip(window, output.prompt_logprobs, strict=True))[1:]
        ]
        written = Path(f"{answer}.tmp")
        written.write_text(json.dumps(found))
        written.rename(answer)
        del llm, outputs
        cleanup_dist_env_and_memory()


def perplexity(log_probs: Sequence[float]) -> float:
    return math.exp(-sum(log_probs) / len(log_probs))


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


# --- what it shows --------------------------------------------------------------------------------


def show_comparison(mixed: list[float], single: dict[str, list[float]]) -> None:
    """Print bytes and closeness of the four models; raise if the mixed one is not itself."""
    sizes = {source: describe(DEMO / source)["bytes"] for source in SOURCES}
    sizes["mixed"] = describe(MIXED)["bytes"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    for column in ("weights", "of BF16", "perplexity", "mean |Δ log-prob| to BF16"):
        table.add_column(column, justify="right")
    for name, log_probs in {**single, "mixed": mixed}.items():
        table.add_row(
            name,
            f"{sizes[name] / 2**20:.2f} MiB",
            f"{sizes[name] / sizes['bf16']:.0%}",
            f"{perplexity(log_probs):.4f}",
            "" if name == "bf16" else f"{mean_difference(log_probs, single['bf16']):.4f}",
            style="bold" if name == "mixed" else "",
        )
    out.print(table)
    out.print(
        f"perplexity per byte over {len(mixed)} bytes of {DEMO / 'heldout.txt'}; differences in "
        "nats.\nmixed comes from the server above, the others from an offline engine.",
        markup=False,
    )
    if not all(map(math.isfinite, mixed)):
        raise DemoError("the server answered log-probabilities that are not finite")
    ratio = perplexity(mixed) / perplexity(single["bf16"])
    if ratio > MAX_PERPLEXITY_RATIO:
        raise DemoError(
            f"the mixed model's perplexity is {ratio:.2f} times BF16's, expected at most "
            f"{MAX_PERPLEXITY_RATIO}: some weights are wrong. Please report this with {RUNS}"
        )


def show_text(server: Server) -> None:
    for prompt in PROMPTS:
        begun = time.monotonic()
        choice = server.complete(
            prompt=prompt, max_tokens=GENERATED_TOKENS, temperature=0.5, seed=2
        )[0]
        elapsed = time.monotonic() - begun
        if not choice["text"].strip():
            raise DemoError(f"the server completed {prompt!r} with nothing")
        text = Text(prompt, style="bold")
        text.append(choice["text"].rstrip(), style="not bold green")
        out.print(f"POST /v1/completions, prompt {prompt!r}, {elapsed:.1f} s:", markup=False)
        for line in text.split(allow_blank=False):
            out.print(Text("  | ").append_text(line), soft_wrap=True)


def demonstrate(keep: bool) -> None:
    stages, fewer, environment = choose_stages()
    step = Steps(8)
    log = RUNS / "commands.log"
    log.write_text("")
    plan = RUNS / "plan.yaml"

    step("the same model in three precisions")
    for source in SOURCES:
        run_command(["vllm-mixprec", "inspect", str(DEMO / source)], log)

    step("a plan: attention in FP8, the experts of every layer in three formats")
    named = [text for source in SOURCES for text in ("--source", f"{source}={DEMO / source}")]
    run_command(["vllm-mixprec", "plan", *named, *PLAN_OPTIONS, "-o", str(plan), "--force"], log)
    out.print(Text(plan.read_text().rstrip()), soft_wrap=True)

    step("check it for this machine")
    run_command(["vllm-mixprec", "check", str(plan), "-pp", str(stages)], log)

    step("compose a directory that vLLM serves as it is")
    run_command(["vllm-mixprec", "compose", str(plan), "-o", str(MIXED)], log)

    step("which source each part of the composed model comes from")
    run_command(["vllm-mixprec", "inspect", str(MIXED)], log)

    step("the single-precision models, to compare with")
    single = measure_sources(environment)

    step(f"serve it with stock vLLM, {stages} pipeline stage{'s' if stages > 1 else ''}")
    if fewer is not None:
        out.print(f"{fewer} here: one pipeline stage instead of two", markup=False)
    with Server(MIXED, stages, environment, RUNS / "server.log") as server:
        show_text(server)
        mixed = measure_server(server, read_windows())

        step("what it costs and gives")
        show_comparison(mixed, single)
        if keep:
            out.print(f"serving at {server.url} until Ctrl-C", markup=False)
            signal.pause()
    out.print(f"the server has stopped; its log is {RUNS / 'server.log'}", markup=False)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep serving until Ctrl-C")
    parser.add_argument("--measure", nargs="+", metavar="DIR=JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.measure:
        measure_models(arguments.measure)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    RUNS.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        demonstrate(arguments.keep)
    except DemoError as error:
        out.print(Text(f"\nfailed: {error}", style="bold red"), soft_wrap=True)
        return 1
    elapsed = time.monotonic() - begun
    out.print(Text(f"everything worked, in {elapsed:.0f} s after the set-up", style="bold green"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
