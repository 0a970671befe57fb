"""lstmcore info: what runs here, or what a file holds; as a table, as JSON, as a model card."""

import json
import math
import os


HELP = "say what runs here, or what a model is: sizes, vocabulary, training, losses"
EXAMPLE = "lstmcore info m.safetensors --card > README.md"


def options(p):
    """Add the arguments."""
    p.add_argument("model", nargs="?", metavar="M",
                   help="a model or a file of layers; without: version, instructions, threads")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON object instead of a table")
    form.add_argument("--card", action="store_true", help="a model card in Markdown")


def run(args):
    """Print `lstmcore.info()`, or what is known of a file."""
    import lstmcore

    if args.model is None:
        if args.card:
            raise ValueError("card needs a model")
        return _print(lstmcore.info(), args.json)
    model = _load(args.model)
    if not isinstance(model, lstmcore.LanguageModel):
        if args.card:
            raise ValueError(f"{args.model} holds {model}, no language model to write a card of")
        count = sum(p.size for p in model.parameters().values())
        return _print({"file": args.model, "bytes": os.path.getsize(args.model), "holds": repr(model),
                       "parameters": count}, args.json)
    if args.card:
        from lstmcore.models.card import card
        print(card(model, os.path.basename(args.model), os.path.getsize(args.model)), end="")
        return None
    return _print(facts(args.model, model), args.json)


def _load(path):
    """The language model, or else the layers, in a file."""
    import lstmcore

    try:
        return lstmcore.LanguageModel.load(path)
    except ValueError as error:
        try:
            return lstmcore.load(path)
        except ValueError as other:
            raise (other if path.endswith((".pt", ".pth", ".onnx", ".keras", ".h5")) else error) from None


def facts(path, model):
    """What is known of a language model, by the names that are printed."""
    from lstmcore.formats import safetensors
    from lstmcore.models.language import RUN

    with_run = RUN in safetensors.read(path)[1]
    tokens = [str(token) for token in model.vocabulary.tokens]
    said, history = model.training, model.history
    found = {
        "file": path, "bytes": os.path.getsize(path), "holds_a_run_to_resume": with_run,
        **{name: value for name, value in model.config.items() if name not in ("vocab_size", "min_count")},
        "parameters": sum(p.size for p in model.network.parameters().values()),
        "frozen": model.network.head._frozen_in, "vocabulary": len(tokens),
        "tokens": [] if model.level == "byte" else tokens[:200],
        "outcome": model.outcome, "steps": None, "epochs": None, "seconds": None}
    if history:
        last = history[-1]
        best = min((r for r in history if r["validation"] is not None), default=None,
                   key=lambda r: r["validation"])
        found |= {"steps": last["step"], "epochs": last["epoch"], "seconds": last["seconds"],
                  "first_loss": history[0]["loss"], "last_loss": last["loss"],
                  "best_validation": best and best["validation"], "at_step": best and best["step"],
                  "perplexity": best and math.exp(min(best["validation"], 700)),
                  "bits_per_char": best and best["validation"] / math.log(2)
                  if model.level == "char" else None}
    for name in "characters", "tokens", "held_out":
        if name in said:
            found["text_" + name] = said[name]
    return found | {name: {key: value for key, value in said[name].items() if value is not None}
                    for name in ("settings", "budget") if name in said}


def _print(found, as_json):
    if as_json:
        print(json.dumps(found))
        return
    width = max(16, 2 + max(map(len, found)))
    for name, value in found.items():
        if value is None or name == "tokens" and not value:
            continue
        if name == "tokens":
            value = " ".join(repr(token)[1:-1] if token != " " else "' '" for token in value[:40]) \
                + (" ..." if len(value) > 40 else "")
        elif isinstance(value, dict):
            value = ", ".join(f"{key}={item!r}" for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}" if name != "seed" else value
        elif isinstance(value, float):
            value = f"{value:.5g}"
        print(f"{name.replace('_', ' '):{width}}{value}")
