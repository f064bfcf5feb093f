# SPDX-License-Identifier: Apache-2.0
"""Damage to plans."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

PLAN = """\
version: 1
base: bf16
sources:
  bf16: {path: ./bf16}
  fp8: {path: ./fp8}
  gptq: {path: ./gptq}
rules:
  - {match: "model.layers.*.self_attn.*_proj", source: fp8}
  - {match: "model.layers.*.mlp.experts.{0-2}", source: gptq}
  - {match: "model.layers.0.mlp.experts.{3,4}", source: fp8}
options:
  mixed_fused: widen
  missing_kernel: dequantize
"""

Edit = Callable[[random.Random, int], str | bytes]
"""Called with (its own random numbers, the number of the case); returns the damaged plan."""


@dataclass(frozen=True)
class PlanKind:
    """A kind of damage to a plan, and how many cases of it are made."""

    name: str
    cases: int
    edit: Edit


PLAN_KINDS: list[PlanKind] = []


def kind(cases: int) -> Callable[[Edit], Edit]:
    def add(edit: Edit) -> Edit:
        PLAN_KINDS.append(PlanKind(edit.__name__.replace("_", " "), cases, edit))
        return edit

    return add


def rules(*matches: str) -> str:
    """Return the plan with other rules, each match quoted for YAML."""
    lines = "".join(f"  - {{match: {json.dumps(m)}, source: fp8}}\n" for m in matches)
    return PLAN[: PLAN.index("  - {match")] + lines


@kind(80)
def plan_bytes_flipped(rng: random.Random, number: int) -> bytes:
    raw = bytearray(PLAN.encode())
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw))] ^= rng.randint(1, 255)
    return bytes(raw)


@kind(30)
def plan_truncated(rng: random.Random, number: int) -> str:
    return PLAN[: number * len(PLAN) // 30]


@kind(40)
def plan_value_of_wrong_type(rng: random.Random, number: int) -> str:
    values = ["", "null", "[]", "{}", "1", "-1", "1e400", ".nan", "true", "[[]]", "2024-01-01"]
    values += ["!!binary aGk=", "!!set {a}", '"\\0"', '"\\ud800"', "9" * 5000]
    old = rng.choice(
        [
            "1\n",
            "bf16\n",
            "{path: ./fp8}",
            "./gptq",
            "fp8}\n",
            "widen",
            '"model.layers.0.mlp.experts.{3,4}"',
        ]
    )
    new = values[number % len(values)]
    return PLAN.replace(old, new + "\n" * old.endswith("\n"), 1)


@kind(20)
def plan_is_a_bomb(rng: random.Random, number: int) -> str | bytes:
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        laughs += f"{other}: &{other} [{','.join([f'*{one}'] * 9)}]\n"
    merges = "a: &a {x: 1}\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        merges += f"{other}: &{other} {{<<: [{','.join([f'*{one}'] * 9)}]}}\n"
    bombs: list[str | bytes] = [
        laughs,
        laughs + PLAN,
        merges,
        "a: &a [*a]\n" + PLAN,
        "&a {<<: *a}\n",
        "[" * 1_000_000,
        "{" * 1_000_000,
        "- " * 500_000,
        "? " * 500_000,
        "a: !!python/object/apply:os.system ['touch /tmp/vllm-mixprec-was-here']\n" + PLAN,
        "!!python/object/new:type {args: [x, [], {}]}\n",
        PLAN.replace("./fp8", "!!python/object/apply:os.getcwd []"),
        "---\n".join([PLAN] * 3),
        PLAN + "x: " + "y" * 9_000_000,
        PLAN + "#" * 8_000_000,
        PLAN + "".join(f"a{i}: {i}\n" for i in range(200_000)),
        rules(*(f"model.layers.{i}" for i in range(20_000))),
        "".join(f"&a{i} " for i in range(50_000)),
        "%YAML 9.9\n---\n" + PLAN,
        "%TAG ! tag:example.com,2000:\n---\n" + PLAN.replace("1\n", "!int 1\n", 1),
    ]
    return bombs[number]


@kind(30)
def plan_pattern_is_hostile(rng: random.Random, number: int) -> str:
    patterns = [
        "**.experts.{0-999999999}",
        "**.experts.{0-9999999999999999999999}",
        "{" + ",".join(map(str, range(100_000))) + "}",
        "{" + "0-999999999," * 2000 + "1}",
        "{0-9}" * 300,
        "**e" * 40,
        "*" * 1000,
        "**.*" * 200,
        "**" * 3 + "x",
        "*e" * 30 + "z",
        "{a,*}" * 30,
        "{*,**}" * 20 + "z",
        "{" * 5000,
        "{{0-1}}",
        "{,}",
        "{9-0}",
        "{-1}",
        "{0x10-0x20}",
        "." * 5000,
        "",
        ".weight",
        "model.layers.\u0660",  # an Arabic digit
        "model.layers.{\u0660-\u0669}",
        "\u202emodel",
        "model..layers",
        "x" * 100_000,
        "re:" + "x" * 100_000,
        "model.layers.0\tmlp",
        "/etc/passwd",
        "..",
    ]
    return rules(patterns[number])


@kind(24)
def plan_expression_is_hostile(rng: random.Random, number: int) -> str:
    expressions = [
        "(a+)+b",
        "(.*)*x",
        "(.+)+x",
        "(.|.)*x",
        "([a-z.0-9_]+)*x",
        "(\\w|\\d)*x",
        "(.*e){20}x",
        "(?:e?.){40}x",
        ".*.*.*.*.*.*.*.*x",
        ".*e.*e.*e.*e.*e.*e.*x",
        "(.*)\\1x",
        "(?:(?:(?:.*)?)?)?x",
        "(?=(.+)+x).*",
        "(?<!a)b",
        "(?<=a+)b",
        "(" * 200 + ")" * 200,
        "(" * 5000,
        "a{4294967295}",
        "a{99999999999999999999}",
        "(?:a{1000}){1000}",
        "[",
        "(?P<a>.)(?P<a>.)",
        "\\",
        "(?:" + "|".join(["m.*"] * 900) + ")x",
    ]
    return rules("re:" + expressions[number])


@kind(18)
def plan_path_is_hostile(rng: random.Random, number: int) -> str:
    paths = [
        '""',
        '"\\0"',
        '"./fp8\\0"',
        "x" * 300,
        "x/" * 3000,
        "~nobody-has-this-name/x",
        "~",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "./fp8/config.json",
        "./fp8/../../../../../../../../etc",
        ".",
        "./loop",
        '"\\x1b[2J"',
        '"line\\nbreak"',
        "-rf",
        "owner/no-such-model",
    ]
    return PLAN.replace("./fp8", paths[number])


@kind(12)
def plan_encoding_is_wrong(rng: random.Random, number: int) -> bytes:
    encoded = [
        PLAN.encode("utf-16"),
        PLAN.encode("utf-16-be"),
        PLAN.encode("utf-32"),
        b"\xef\xbb\xbf" + PLAN.encode(),
        b"\xff" + PLAN.encode(),
        PLAN.encode().replace(b"widen", b"w\xefden"),
        PLAN.encode().replace(b"\n", b"\r"),
        PLAN.encode().replace(b"\n", b"\r\n"),
        PLAN.encode().replace(b"\n", b"\xe2\x80\xa8"),
        PLAN.encode() + b"\0",
        PLAN.encode("cp500"),
        bytes(rng.randrange(256) for _ in range(2000)),
    ]
    return encoded[number]
