"""lstmcore gradflow: how far back the gradient reaches."""

import json

from lstmcore.commands import terminal

HELP = "measure how a gradient vanishes in RNN and LSTM"
EXAMPLE = "lstmcore gradflow --out flow.png"


def options(p):
    """Add the arguments."""
    p.add_argument("--out", metavar="PNG", help="draw it (needs matplotlib)")
    p.add_argument("--hidden-size", "--hidden", type=int, default=64, metavar="N", help="(default: 64)")
    p.add_argument("--steps", type=int, default=100, metavar="N", help="(default: 100)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    p.add_argument("--json", action="store_true", help="a JSON object instead of a table")


def run(args):
    """Print, and draw, the norms of `lstmcore.gradflow.compare`."""
    from lstmcore import gradflow, scalars

    if args.out:
        terminal.check_picture(args.out)
    flows = gradflow.compare(args.hidden_size, args.steps, seed=scalars.size("seed", args.seed, 0))
    if args.out:
        gradflow.plot(flows, args.out)
        terminal.say(f"saved {args.out}")
    if args.json:
        print(json.dumps({name: norms.tolist() for name, norms in flows.items()}))
        return
    print("norm of dL/dh(t-k)".ljust(24) + "".join(f"{name:>22}" for name in flows))
    for k in range(0, args.steps + 1, max(1, args.steps // 10)):
        print(f"k = {k}".ljust(24) + "".join(f"{norms[k]:22.3e}" for norms in flows.values()))
