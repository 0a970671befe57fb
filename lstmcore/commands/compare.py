"""lstmcore compare: which of several models predicts a text better, and whether by more than chance."""

import json
import os
import time

from lstmcore.commands import terminal

HELP = "compare models by how well they predict a text"
EXAMPLE = "lstmcore compare a.safetensors b.safetensors other.txt"
PIECES, SHORTEST = 20, 200      # of the text, in characters, whose differences say how sure it is


def options(p):
    """Add the arguments."""
    p.add_argument("models", nargs="+", metavar="M", help="two or more")
    p.add_argument("file", metavar="FILE", help="that none of them was trained on; - for standard input")
    terminal.add_encoding(p)
    terminal.add_precision(p)
    p.add_argument("--json", action="store_true", help="a JSON object instead of a table")


def run(args):
    """Print a line for each model, the best first, and by how much it leads."""
    from lstmcore import LanguageModel
    from lstmcore.models.corpus import Corpus

    if len(args.models) < 2:
        raise ValueError("compare needs two models or more, and a text")
    models = [LanguageModel.load(path) for path in args.models]
    text = terminal.read_text(args.file, args.encoding)
    rows = []
    for path, model in zip(args.models, models):
        if args.precision:
            model.freeze(args.precision)
        start = time.perf_counter()
        found = model.evaluate(Corpus.of_text(text, model.level))
        seconds = time.perf_counter() - start
        rows.append({"model": path, **found._asdict(), "level": model.level,
                     "parameters": sum(p.size for p in model.network.parameters().values()),
                     "bytes": os.path.getsize(path), "tokens_per_second": round(found.tokens / seconds),
                     "pieces": _pieces(model, text)})
    rows.sort(key=lambda row: row["bits_per_char"])
    leads = [_lead(rows[0], row) for row in rows[1:]]
    if args.json:
        print(json.dumps({"models": rows, "leads": leads}))
        return
    width = max(len(row["model"]) for row in rows)
    print(f"{'':{width}}  bits/char  perplexity  per        parameters      tokens/s")
    for row, model in ((row, models[args.models.index(row["model"])]) for row in rows):
        print(f"{row['model']:{width}}  {row['bits_per_char']:9.4f}  {row['perplexity']:10.4g}  "
              f"{terminal.token(model):9}  {row['parameters']:10,}  {row['tokens_per_second']:12,}")
        if row["unknown"]:
            terminal.say(f"{row['model']}: {row['unknown']} of {row['tokens']} tokens are not in its "
                         "vocabulary, and one symbol to it")
    strange = {row["model"] for row in rows if row["unknown"] > 0.01 * row["tokens"]}
    for lead in leads:
        if odd := strange & {lead["better"], lead["worse"]}:
            print(f"{lead['better']} and {lead['worse']} cannot be compared: more than 1 % of the text is "
                  f"not in the vocabulary of {', '.join(sorted(odd))}")
            continue
        sure = "" if lead["error"] is None else f" ± {lead['error']:.4f}"
        print(f"{lead['better']} is better than {lead['worse']} by {lead['bits']:.4f}{sure} bits per "
              "character" + ("" if sure and lead["bits"] > 2 * lead["error"] else
                 ": no more than chance may give" if sure else ""))


def _pieces(model, text):
    """Bits per character of pieces of the text, each read by itself."""
    from lstmcore.models.corpus import Corpus

    size = max(SHORTEST, -(-len(text) // PIECES))
    pieces = [text[at:at + size] for at in range(0, len(text) - size + 1, size)]
    found = []
    for piece in pieces:
        try:
            found.append(model.evaluate(Corpus.of_text(piece, model.level)).bits_per_char)
        except ValueError:          # fewer than two words
            found.append(None)
    return found


def _lead(better, worse):
    """By how many bits per character one is ahead, and the standard error of that."""
    pairs = [(a, b) for a, b in zip(better["pieces"], worse["pieces"]) if None not in (a, b)]
    differences = [b - a for a, b in pairs]
    error = None
    if (n := len(differences)) >= 4:
        mean = sum(differences) / n
        error = (sum((d - mean) ** 2 for d in differences) / (n - 1) / n) ** 0.5
    return {"better": better["model"], "worse": worse["model"],
            "bits": worse["bits_per_char"] - better["bits_per_char"], "error": error}
