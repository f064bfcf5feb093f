# SPDX-License-Identifier: Apache-2.0
"""Measure decode and prefill of mixed models against stock vLLM, side by side in real engines.

    python scripts/bench_decode.py                    # nine engines, seven rounds
    python scripts/bench_decode.py --only bf16,int4   # two of them, and stock's
    python scripts/bench_decode.py --quick            # a two-layer model, three rounds

All engines are started once, compiled as in production, and stay alive; a round measures each of
them once, in an order that changes from round to round, so that what else the machine does hits all
alike. Idle engines use no CPU: after a measurement the script waits until that engine's worker has
stopped polling for work. Ratios are formed within a round; the table shows their median and range.

Sampling is at temperature 1 from a flat head, because greedy decoding of a random model soon
repeats a token, whose experts would then sit in the CPU's cache.

A mixed model's aim is the mean of what its formats reach alone, weighed by their share of the
experts: expected time a token = sum over formats of share x time a token of the run whose experts
are all in that format; ratio = expected / measured. Attention is BF16 in all of these runs.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from synthetic import DEFAULT, ROOT, Shape, compose_mix, write_models

# Worker threads stop polling one second after their last step (vLLM's SpinCondition).
_IDLE_S = 1.3
STOCK = "stock bf16"
# name -> (source of each expert in turn, source of attention)
MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "bf16": (("bf16",), "bf16"),
    "fp8": (("fp8",), "fp8"),
    "int4": (("int4",), "int4"),
    "fp8 experts": (("fp8",), "bf16"),
    "int4 experts": (("int4",), "bf16"),
    "int4 + bf16": (("int4", "bf16"), "bf16"),
    "int4 + fp8": (("int4", "fp8"), "bf16"),
    "int4 + fp8 + bf16": (("int4", "fp8", "bf16"), "bf16"),
}
_ALONE = {"bf16": "bf16", "fp8": "fp8 experts", "int4": "int4 experts"}


def describe_machine() -> dict[str, Any]:
    """The CPU, its cores and the instructions that decide which kernels run."""
    cpu: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    flags = set(cpu.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
    return {
        "cpu": f"{cpu.get('model name', platform.processor())}, family {cpu.get('cpu family')}",
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "flags": {flag: flag in flags for flag in wanted},
        "versions": {
            name: version(name) for name in ("vllm", "torch", "transformers", "vllm-mixprec")
        },
        "python": platform.python_version(),
        "omp_threads_bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    flags = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in machine["flags"].items())
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"{flags}. {versions}. VLLM_CPU_OMP_THREADS_BIND={machine['omp_threads_bind']}."
    )


def start_engine(model: Path, max_model_len: int, plain: bool) -> Any:
    """Start ``LLM(model)``; ``plain``: without any plug-in in the engine's processes."""
    from vllm import LLM

    if plain:  # the engine's processes are spawned and read the environment anew
        os.environ["VLLM_PLUGINS"] = ""
    try:
        return LLM(
            str(model),
            max_model_len=max_model_len,
            max_num_seqs=8,
            seed=0,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            kv_cache_memory_bytes=192 << 20,
        )
    finally:
        os.environ.pop("VLLM_PLUGINS", None)


class Requests:
    """Makes prompts of random tokens that no engine has seen, the same for all of a round."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._made = 0

    def prompts(self, generator: random.Random, count: int, length: int) -> list[list[int]]:
        return [[generator.randrange(self._vocab) for _ in range(length)] for _ in range(count)]

    def run(self, llm: Any, prompts: list[list[int]], max_tokens: int) -> list[float]:
        """Run one batch to its end; return the time from the start to each engine step's end, s."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = SamplingParams(
            max_tokens=max_tokens, temperature=1.0, ignore_eos=True, detokenize=False
        )
        engine = llm.llm_engine
        begun = time.perf_counter()
        for prompt in prompts:
            self._made += 1
            engine.add_request(str(self._made), TokensPrompt(prompt_token_ids=prompt), parameters)
        times = []
        while engine.has_unfinished_requests():
            if engine.step():
                times.append(time.perf_counter() - begun)
        return times


def measure(
    llm: Any, requests: Requests, seed: int, decode_tokens: int, prompt_tokens: int
) -> dict[str, float]:
    """Return milliseconds a decode step at batch 1 and 8, and a prefill of one prompt."""
    found = {}
    generator = random.Random(f"prompts {seed}")  # Random(-1) would repeat Random(1)
    requests.run(llm, requests.prompts(generator, 1, 16), 4)  # wake the workers
    for batch in (1, 8):
        times = requests.run(llm, requests.prompts(generator, batch, 16), decode_tokens + 1)
        steps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        # The mean pays for everything; the median shrugs off a step during which another process
        # had the core.
        found[f"decode{batch}_ms"] = 1e3 * statistics.median(steps)
        found[f"decode{batch}_mean_ms"] = 1e3 * statistics.fmean(steps)
    prefills = [
        requests.run(llm, requests.prompts(generator, 1, prompt_tokens), 1)[-1] for _ in range(3)
    ]
    found["prefill_ms"] = 1e3 * statistics.median(prefills)
    return found


def ratios(rounds: list[dict[str, dict[str, float]]], key: str) -> dict[str, list[float]]:
    """The compared ratios, one number a round, each within its round."""
    found: dict[str, list[float]] = {}
    for times in rounds:
        ms = {name: values[key] for name, values in times.items()}
        for name in ("bf16", "fp8", "int4", "fp8 experts", "int4 experts"):
            if name in ms:
                found.setdefault(f"{name} over {STOCK}", []).append(ms[STOCK] / ms[name])
        for name, (experts, _) in MODELS.items():
            if len(experts) > 1 and {name, *(_ALONE[source] for source in experts)} <= ms.keys():
                expected = statistics.fmean(ms[_ALONE[source]] for source in experts)
                found.setdefault(f"{name} over its formats' mean", []).append(expected / ms[name])
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def aim_of(name: str) -> str:
    if name.startswith("bf16 over"):
        return "1.0"
    if name.startswith("int4 over"):
        return "2 (decode)"
    return "0.9" if "mean" in name else ""


def report(rounds: list[dict[str, dict[str, float]]], prompt_tokens: int) -> str:
    """Both tables, as markdown."""
    lines = ["| model | decode, batch 1 | decode, batch 8 | prefill |", "|---|---|---|---|"]
    for name in rounds[0]:
        median = {
            key: statistics.median(times[name][key] for times in rounds) for key in rounds[0][name]
        }
        lines.append(
            f"| {name} | {1e3 / median['decode1_ms']:.0f} | {8e3 / median['decode8_ms']:.0f} "
            f"| {1e3 * prompt_tokens / median['prefill_ms']:.0f} |"
        )
    lines += ["", "Tokens/s, medians of the rounds.", ""]
    keys = ("decode1_ms", "decode8_ms", "prefill_ms")
    columns = [ratios(rounds, key) for key in keys]
    lines.append("| ratio | aim | decode, batch 1 | decode, batch 8 | prefill |")
    lines.append("|---|---|---|---|---|")
    for name in columns[0]:
        cells = " | ".join(spread(column[name]) for column in columns)
        lines.append(f"| {name} | {aim_of(name)} | {cells} |")
    lines += ["", f"Median and range of {len(rounds)} rounds."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few tokens")
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 3")
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        type=lambda text: text.split(","),
        default=list(MODELS),
        help=f"some of {', '.join(MODELS)}; an engine takes 2 to 3 GB (default all)",
    )
    parser.add_argument("--models", type=Path, help="folder of the models (default runs/synthetic)")
    parser.add_argument("--json", type=Path, help="default runs/bench_decode[_quick].json")
    options = parser.parse_args()
    if unknown := set(options.only) - MODELS.keys():
        parser.error(f"--only {', '.join(unknown)}, expected some of {', '.join(MODELS)}")
    n_rounds = options.rounds or (3 if options.quick else 7)
    decode_tokens, prompt_tokens = (16, 128) if options.quick else (48, 512)
    folder = options.models or (ROOT / "runs" / "synthetic-quick" if options.quick else DEFAULT)
    shape = Shape(layers=2) if options.quick else Shape()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

    paths = write_models(folder, shape)
    served = {STOCK: paths["bf16"]}
    for name in options.only:
        experts, dense = MODELS[name]
        mix = folder / "mixed" / name.replace(" ", "")
        served[name] = compose_mix(mix, paths, experts, dense)
    machine = describe_machine()
    engines: dict[str, Any] = {}
    rounds: list[dict[str, dict[str, float]]] = []
    loads: list[tuple[float, float, float]] = []
    requests = Requests(shape.vocab)
    try:
        # Stock last: the plug-in must be in this process before a plain engine is started.
        for name in [*options.only, STOCK]:
            begun = time.perf_counter()
            engines[name] = start_engine(served[name], prompt_tokens + 64, plain=name == STOCK)
            print(f"{name}: started in {time.perf_counter() - begun:.0f} s", flush=True)
        for number in range(-1, n_rounds):  # the round before the first warms up
            order = list(served)
            random.Random(number).shuffle(order)
            times = {}
            for name in order:
                times[name] = measure(engines[name], requests, number, decode_tokens, prompt_tokens)
                time.sleep(_IDLE_S)
            if number >= 0:
                rounds.append({name: times[name] for name in served})
                loads.append(os.getloadavg())
            print(f"round {number + 1} of {n_rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()
    table = report(rounds, prompt_tokens)
    file = options.json or ROOT / "runs" / f"bench_decode{'_quick' * options.quick}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine,
        "shape": vars(shape),
        "decode_tokens": decode_tokens,
        "prompt_tokens": prompt_tokens,
        "load_average": loads,
        "rounds": rounds,
        "ratios": {
            key: ratios(rounds, key)
            for key in (
                "decode1_ms",
                "decode8_ms",
                "decode1_mean_ms",
                "decode8_mean_ms",
                "prefill_ms",
            )
        },
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{machine_line(machine)}\nLoad average {loads[0][0]:.1f} to {loads[-1][0]:.1f}.\n")
    print(table)
    print(f"\nWritten to {file}")


if __name__ == "__main__":
    main()
