"""lstmcore info: what runs here."""

import json

HELP = "say what runs here: version, instructions, threads"
EXAMPLE = "lstmcore info --json"


def options(p):
    """Add the arguments."""
    p.add_argument("--json", action="store_true", help="a JSON object instead of a table")


def run(args):
    """Print `lstmcore.info()`."""
    import lstmcore

    found = lstmcore.info()
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        value = ", ".join(value) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' '):16}{value}")
