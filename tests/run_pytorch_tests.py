"""PyTorch's own LSTM tests, with lstmcore.torch.LSTM in the place of torch.nn.LSTM.

    python tests/run_pytorch_tests.py CHECKOUT [--theirs] [pytest arguments]

CHECKOUT is a directory with PyTorch's test/ and version.txt, best of the version that is installed.
Nothing of it belongs to this project, so it is not part of the suite; the module tests that PyTorch
ships inside its wheel are, in test_torch_dropin.py. Runs every test of FILES that speaks of an LSTM
or RNN and lists those in which our class computed: passed, failed with its reason, or skipped.
--theirs leaves torch.nn.LSTM in place, to see what fails without us.

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


class LSTMOnly:
    """The pytest plugin that picks the tests and notes what became of those that ran a class."""

    def __init__(self, cls):
        self.calls, self.results = 0, {}
        forward = cls.forward

        def counted(*args, **kwargs):
            self.calls += 1
            return forward(*args, **kwargs)

        cls.forward = counted

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.speaks_of_lstm(item)]

    @staticmethod
    def speaks_of_lstm(item):
        name = item.name.lower()
        if "cuda" in name or "cell" in name:
            return False
        if "lstm" in name or "rnn" in name:
            return True
        try:
            return "LSTM" in inspect.getsource(inspect.unwrap(item.obj))
        except (OSError, TypeError):
            return False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before, self.outcome = self.calls, None
        result = yield
        if self.outcome and (self.calls > before or self.outcome[0] == "failed"
                             or "lstm" in item.name.lower()):
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
    parser.add_argument("--theirs", action="store_true", help="run them with torch.nn.LSTM")
    args, pytest_arguments = parser.parse_known_args()
    folder = args.checkout.resolve() / "test"
    files = [str(folder / name) for name in FILES if (folder / name).exists()]
    if not files:
        parser.error(f"no PyTorch tests in {folder}")
    version = (args.checkout / "version.txt").read_text().strip()
    print(f"tests of PyTorch {version}, torch {torch.__version__} installed")
    cls = torch.nn.LSTM if args.theirs else lstmcore.torch.LSTM
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        module.LSTM = cls
    sys.path.insert(0, str(folder))
    plugin = LSTMOnly(cls)
    pytest.main([*files, "-q", "--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null",
                 f"--rootdir={folder}", "--import-mode=importlib", "--tb=short",
                 "--continue-on-collection-errors", *pytest_arguments],
                plugins=[plugin])
    report(plugin.results)
    return any(outcome == "failed" for outcome, _ in plugin.results.values())


if __name__ == "__main__":
    sys.exit(main())
