# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-mixprec``: one thin module a command over the library.

Exit codes: 0 fine, 1 findings or a failure that the message explains, 2 usage.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import vllm_mixprec
from vllm_mixprec.errors import MixPrecError

# Modules beside this one; each has add_parser(commands) and run(arguments) -> exit code.
COMMANDS = ("inspect", "plan", "check", "compose", "stats", "doctor")


class _Version(argparse.Action):
    """Prints the version, looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{parser.prog} {vllm_mixprec.__version__}")
        parser.exit()


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the command that ``argv`` begins with; of all where it is none.

    The others need not be imported then: ``stats`` brings numpy, for one.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-mixprec",
        description="Serve one MoE model out of several checkpoints of different precision.",
        epilog="Exit codes: 0 fine, 1 findings or a failure, 2 usage. "
        "vllm-mixprec COMMAND --help shows an example of each.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        command = importlib.import_module(f"vllm_mixprec.cli.{name}")
        added = command.add_parser(commands)
        added.formatter_class = argparse.RawDescriptionHelpFormatter
        added.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object on stdout, everything else on stderr",
        )
        added.set_defaults(run=command.run, parser=added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Raises:
        SystemExit: from argparse, with code 2 for wrong usage and 0 for ``--help``.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(argv).parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except MixPrecError as error:
        print(f"error: {error}", file=sys.stderr)
        if arguments.json:
            from vllm_mixprec.cli.output import print_json

            print_json(
                {"ok": False, "error": {"type": type(error).__name__, "message": str(error)}}
            )
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as head, has gone. Keep the interpreter's own flush at exit quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
