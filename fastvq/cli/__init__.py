"""The command line `fastvq`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import fastvq
from fastvq.backends.select import BackendUnavailableError
from fastvq.cli.parser import OneLineParser
from fastvq.data.errors import UserError

COMMANDS = {
    "train": "train a VQ-VAE on images",
    "reconstruct": "encode images and restore them, to see what is lost",
    "encode": "write images as a token file (.fvq)",
    "decode": "restore the images of a token file",
    "evaluate": "measure a run on held-out images: error, codebook, compression",
    "report": "draw a run: reconstructions, curves, codebook, one HTML page",
    "demo": "train on photographs for some two minutes, then report",
    "bench": "time fastvq against plain PyTorch on this machine",
    "profile": "search as the codebook grows: time, limits of the device, memory, a trace",
    "info": "what was built, what was found, which backend serves",
}
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 after one line on standard error, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fastvq":
            raise
        return _complain(arguments, f"needs the package {error.name.split('.')[0]}: pip install 'fastvq[train]'")
    except (UserError, BackendUnavailableError) as error:
        return _complain(arguments, str(error))
    except OSError as error:
        return _complain(arguments, f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _complain(arguments, "interrupted")
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    top = OneLineParser(prog="fastvq", description=fastvq.__doc__, epilog=_summary(), usage="fastvq COMMAND ...")
    top.add_argument("--version", action="version", version=f"fastvq {fastvq.__version__}")
    top.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below; each has its --help")
    command = top.parse_args(arguments[:1]).command
    # Only the command that was asked for is imported, so that each needs no more packages than it uses.
    module: ModuleType = importlib.import_module(f"fastvq.cli.{command}")
    parser = OneLineParser(prog=f"fastvq {command}", description=COMMANDS[command].capitalize() + ".")
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments[1:]))


def _summary() -> str:
    return "commands:\n" + "\n".join(f"  {name:<13}{what}" for name, what in COMMANDS.items())


def _complain(arguments: list[str], message: str) -> int:
    """One line on standard error, whatever the message holds."""
    command = f"fastvq {arguments[0]}" if arguments and arguments[0] in COMMANDS else "fastvq"
    print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
