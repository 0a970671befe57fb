"""PyTorch's own tests of recurrent modules, with those of lstmcore.torch in the place of torch.nn's.

    python tests/run_pytorch_tests.py CHECKOUT [--theirs] [pytest arguments]

CHECKOUT is a directory with PyTorch's test/ and version.txt, best of the version that is installed.
Nothing of it belongs to this project, so it is not part of the suite; the module tests that PyTorch
ships inside its wheel are, in test_torch_dropin.py. Runs every test of FILES that speaks of an LSTM,
GRU, RNN or their cells and lists those in which one of our classes computed: passed, failed with its
reason, or skipped. --theirs leaves torch.nn's in place, to see what fails without us.

What fails with us and the tests of PyTorch 2.13, and why:
    export/test_export.py   test_export_dynamo_config and test_export_rnn_variants_with_warning want
                            a refusal and a warning that torch.nn.LSTM gives, and ours does not
    whatever scripts it     torch.jit.script is refused
"""

import argparse
import inspect
import pathlib
import sys

import pytest
import torch

import lstmcore.torch

FILES = """
test_nn.py test_modules.py nn/test_packed_sequence.py nn/test_pruning.py nn/test_module_hooks.py
nn/test_parametrization.py nn/test_load_state_dict.py test_expanded_weights.py test_autograd.py
test_fake_tensor.py test_autocast.py test_stateless.py test_decomp.py test_jit.py jit/test_models.py
export/test_export.py
""".split()


CLASSES = "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"


class RecurrentOnly:
    """The pytest plugin that picks the tests and notes what became of those that ran a class."""

    def __init__(self, classes):
        self.calls, self.results = 0, {}
        for cls in classes:
            self.count(cls, cls.forward)

    def count(self, cls, forward):
        def counted(*args, **kwargs):
            self.calls += 1
            return forward(*args, **kwargs)

        cls.forward = counted

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.speaks_of_one(item)]

    @staticmethod
    def names_one(item):
        return any(word in item.name.lower() for word in ("lstm", "gru", "rnn"))

    def speaks_of_one(self, item):
        if "cuda" in item.name.lower():
            return False
        if self.names_one(item):
            return True
        try:
            source = inspect.getsource(inspect.unwrap(item.obj))
            return any(cls in source for cls in CLASSES)
        except (OSError, TypeError):
            return False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before, self.outcome = self.calls, None
        result = yield
        if self.outcome and (self.calls > before or self.outcome[0] == "failed"
                             or self.names_one(item)):
            self.results[item.nodeid.split("/")[-1]] = self.outcome
        return result

    def pytest_runtest_logreport(self, report):
        if self.outcome and self.outcome[0] == "failed":  # by a part of the test
            return
        if report.when == "call" or (self.outcome is None and not report.passed):
            reason = ""
            if report.failed:
                reason = report.longreprtext.strip().splitlines()[-1]
                reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", reason)
            elif report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected"
            self.outcome = report.outcome, reason.splitlines()[0] if reason else ""


def report(results):
    for outcome in ("passed", "failed", "skipped"):
        chosen = {name: why for name, (what, why) in results.items() if what == outcome}
        print(f"\n{outcome}: {len(chosen)}")
        for name, why in sorted(chosen.items()):
            print(f"  {name}" + (f"\n      {why}" if why else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--theirs", action="store_true", help="run them with torch.nn's")
    args, pytest_arguments = parser.parse_known_args()
    folder = args.checkout.resolve() / "test"
    files = [str(folder / name) for name in FILES if (folder / name).exists()]
    if not files:
        parser.error(f"no PyTorch tests in {folder}")
    version = (args.checkout / "version.txt").read_text().strip()
    print(f"tests of PyTorch {version}, torch {torch.__version__} installed")
    classes = [getattr(torch.nn if args.theirs else lstmcore.torch, name) for name in CLASSES]
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        for name, cls in zip(CLASSES, classes):
            setattr(module, name, cls)
    sys.path.insert(0, str(folder))
    plugin = RecurrentOnly(classes)
    pytest.main([*files, "-q", "--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null",
                 f"--rootdir={folder}", "--import-mode=importlib", "--tb=short",
                 "--continue-on-collection-errors", *pytest_arguments],
                plugins=[plugin])
    report(plugin.results)
    return any(outcome == "failed" for outcome, _ in plugin.results.values())


if __name__ == "__main__":
    sys.exit(main())
