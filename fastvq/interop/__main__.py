"""`python -m fastvq.interop`: the classes that fastvq knows, and whether the installed ones are those."""

from __future__ import annotations

from fastvq.interop.patching import LIBRARIES, Client, differs, library, version


def _line(client: Client) -> str:
    try:
        return f"  {'another' if differs(client) else 'known':7}  {client.found_digest()}  {client.path}"
    except ImportError as error:
        return f"  missing  {error}  {client.path}"


def main() -> None:
    """A line for each class: known or not, the digest of the installed one, its path."""
    for package in LIBRARIES:
        print(package, version(package))
        try:
            clients = library(package).CLIENTS.values()
        except ImportError as error:
            print(f"  missing  {error}")
        else:
            print(*map(_line, clients), sep="\n")


if __name__ == "__main__":
    main()
