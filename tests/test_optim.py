"""Optimizers: every rule against PyTorch's on random data; clipping, schedules, resuming."""

import copy
import json
import pickle
import tracemalloc

import numpy as np
import pytest

import lstmcore
from lstmcore import Linear, clip_grad_norm, clip_grad_value
from lstmcore.dense import adam_step
from lstmcore.optim import (BLOCK, SGD, Adagrad, Adam, AdamW, CosineDecay, Plateau, RMSprop,
                            StepDecay, WarmUp)

RULES = {
    "SGD": (SGD, dict(lr=0.1)),
    "SGD decay": (SGD, dict(lr=0.1, weight_decay=0.2)),
    "SGD momentum": (SGD, dict(lr=0.1, momentum=0.9)),
    "SGD Nesterov": (SGD, dict(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.2)),
    "RMSprop": (RMSprop, dict(lr=0.02)),
    "RMSprop alpha": (RMSprop, dict(lr=0.02, alpha=0.8, eps=1e-2, weight_decay=0.2)),
    "RMSprop centered": (RMSprop, dict(lr=0.02, centered=True, alpha=0.9)),
    "RMSprop all": (RMSprop, dict(lr=0.02, centered=True, momentum=0.7, weight_decay=0.2)),
    "Adagrad": (Adagrad, dict(lr=0.1)),
    "Adagrad decay": (Adagrad, dict(lr=0.1, eps=1e-2, weight_decay=0.2)),
    "Adam": (Adam, dict(lr=0.03)),
    "Adam all": (Adam, dict(lr=0.03, betas=(0.7, 0.95), eps=1e-2, weight_decay=0.2)),
    "AdamW": (AdamW, dict(lr=0.03)),
    "AdamW all": (AdamW, dict(lr=0.03, betas=(0.7, 0.95), eps=1e-2, weight_decay=0.3)),
}
SHAPES = {"vector": (5,), "matrix": (3, 4), "blocks": (2, BLOCK + 7), "none": (0, 3), "scalar": ()}


def by_name(cases):
    return pytest.mark.parametrize("rule, options", cases.values(), ids=cases.keys())


def arrays(seed=0, dtype="float64", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def refill(gradients, seed):
    for name, g in arrays(seed, shapes={name: g.shape for name, g in gradients.items()}).items():
        gradients[name][...] = g


@pytest.mark.parametrize("rule", [Adam, AdamW])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 7, 16, 33, 3 * BLOCK + 5])
def test_adam_is_its_formula_on_every_instruction_set_and_thread(n, dtype, rule, isa, close):
    found = []
    for threads in 1, 2, 3:
        p, g, m, v = (arrays(k, shapes={"p": (n,)}) for k in range(4))
        own, gradient = {"p": p["p"].astype(dtype)}, {"p": g["p"].astype(dtype)}
        optimizer = rule((own, gradient), lr=0.1, betas=(0.7, 0.9), eps=0.01, weight_decay=0.3)
        mean, square = np.zeros(n), np.zeros(n)
        with lstmcore.threads(threads):
            for t in 1, 2, 3:
                optimizer.step()
                decayed = g["p"] + 0.3 * p["p"] if rule is Adam else g["p"]
                p["p"] *= 1 if rule is Adam else 1 - 0.1 * 0.3
                mean, square = 0.7 * mean + 0.3 * decayed, 0.9 * square + 0.1 * decayed**2
                root = np.sqrt(square / (1 - 0.9**t))
                p["p"] -= 0.1 * mean / (1 - 0.7**t) / (root + 0.01)
        close(own["p"], p["p"], "kernel")
        found.append(own["p"])
    assert all((one == found[0]).all() for one in found)


@by_name(RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rule_equals_torch(rule, options, dtype, close):
    torch = pytest.importorskip("torch")
    parameters, gradients = arrays(0, dtype), arrays(1, dtype)
    leaves = {name: torch.tensor(p, requires_grad=True) for name, p in parameters.items()}
    ours = rule((parameters, gradients), **options)
    theirs = getattr(torch.optim, rule.__name__)(list(leaves.values()), **options)
    for n in range(6):
        refill(gradients, n)
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients[name])
        if n == 4:
            ours.lr *= 0.5
            theirs.param_groups[0]["lr"] *= 0.5
        ours.step()
        theirs.step()
    for name, leaf in leaves.items():
        close(parameters[name], leaf.detach(), "torch", name)


@by_name(RULES)
def test_gradients_are_only_read(rule, options):
    parameters, gradients = arrays(0), arrays(1)
    before = copy.deepcopy(gradients)
    optimizer = rule((parameters, gradients), **options)
    optimizer.step()
    assert all((g == before[name]).all() for name, g in gradients.items())


@by_name(RULES)
def test_steps_allocate_nothing_of_the_parameters_size(rule, options):
    shapes = {"large": (10, BLOCK)}
    parameters, gradients = arrays(0, shapes=shapes), arrays(1, shapes=shapes)
    optimizer = rule((parameters, gradients), **options)
    optimizer.step()
    tracemalloc.start()
    optimizer.step()
    clip_grad_value(gradients, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    clip_grad_norm(gradients, 1.0)
    _, clipped = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < BLOCK and clipped < 2 * 8 * BLOCK, (peak, clipped)


@by_name(RULES)
def test_resumed_training_equals_uninterrupted(rule, options):
    parameters, gradients = arrays(0), arrays(1)
    optimizer = rule((parameters, gradients), **options)
    for n in range(3):
        refill(gradients, n)
        optimizer.step()
    optimizer.lr = 0.07
    saved, kept = optimizer.state_dict(), copy.deepcopy(parameters)
    assert all(isinstance(a, np.ndarray) for a in saved.values())
    resumed = rule((kept, copy.deepcopy(gradients)), **options)
    resumed.load_state_dict(saved)
    pickled = pickle.loads(pickle.dumps((optimizer, parameters, gradients)))
    for n in range(3, 6):
        for one, g in ((optimizer, gradients), (resumed, resumed._gradients),
                       (pickled[0], pickled[2])):
            refill(g, n)
            one.step()
    for other in (kept, pickled[1]):
        assert all((p == other[name]).all() for name, p in parameters.items())
    assert saved["lr"] == 0.07 and saved["steps"] == 3


def test_a_module_is_trained_in_place():
    layer = Linear(3, 2, seed=0)
    weight = layer.parameters()["weight"]
    before = weight.copy()
    layer(np.ones((4, 3), "float32"))
    layer.backward(np.ones((4, 2), "float32"))
    SGD(layer, lr=0.25).step()
    assert (weight == before - 0.25 * 4).all()


def test_an_array_and_its_gradient_are_a_model():
    for rule, options in RULES.values():
        named, w, dw = ({"p": np.ones(3)}, {"p": np.array([0.5, -1, 2])}), np.ones(3), np.array([0.5, -1, 2])
        for model in (named, (w, dw)):
            optimizer = rule(model, **options)
            optimizer.step(), optimizer.step()
        assert w.tobytes() == named[0]["p"].tobytes() and w[0] != 1
    assert clip_grad_norm(dw, 1.0) == np.sqrt(5.25) and np.allclose(np.linalg.norm(dw), 1)
    clip_grad_value(dw, 0.1)
    assert abs(dw).max() == 0.1


def test_every_rule_finds_a_minimum():
    target = np.random.default_rng(0).standard_normal(20)
    for rule, options in RULES.values():
        p, g = {"p": np.zeros(20)}, {"p": np.zeros(20)}
        optimizer = rule((p, g), **{**options, "weight_decay": 0.0})
        for _ in range(2000):
            g["p"][...] = p["p"] - target
            optimizer.step()
        # RMSprop goes on in steps of its learning rate
        assert abs(p["p"] - target).max() < 0.05, rule


# ---- clipping ---------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_norm", [0.3, 1e4])
def test_clip_grad_norm_equals_torch(dtype, max_norm, close):
    torch = pytest.importorskip("torch")
    gradients = arrays(3, dtype)
    leaves = [torch.zeros(g.shape, dtype=getattr(torch, dtype), requires_grad=True)
              for g in gradients.values()]
    for leaf, g in zip(leaves, gradients.values()):
        leaf.grad = torch.tensor(g)
    want = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    norm = clip_grad_norm(gradients, max_norm)
    close(np.asarray(norm, dtype), want, "torch")
    for leaf, g in zip(leaves, gradients.values()):
        # torch divides by norm + 1e-6
        np.testing.assert_allclose(g, leaf.grad, rtol=1e-5)


def test_clip_grad_norm_of_a_model_and_of_any_layout():
    layer = Linear(3, 2, seed=0)
    layer(np.ones((4, 3), "float32"))
    layer.backward(np.ones((4, 2), "float32"))
    norm = clip_grad_norm(layer, 0.5)
    assert abs(norm - 4 * 8**0.5) < 1e-5 and abs(clip_grad_norm(layer, 0.5) - 0.5) < 1e-6
    g = np.arange(12.0).reshape(3, 4)
    clip_grad_norm({"turned": g.T[::2]}, 0.0)
    assert not g[:, ::2].any() and g[:, 1::2].all()


def test_clip_grad_norm_beyond_the_range_of_squares():
    g = {"w": np.array([3e30, 4e30], "float32")}
    assert abs(clip_grad_norm(g, 1.0) / 5e30 - 1) < 1e-6
    np.testing.assert_allclose(g["w"], [0.6, 0.8], rtol=1e-6)
    for wrong in (np.nan, np.inf):
        g = {"w": np.array([1.0, wrong])}
        assert not np.isfinite(clip_grad_norm(g, 1.0)) and g["w"][0] == 1
    assert clip_grad_norm({}, 1.0) == 0


def test_clip_grad_value():
    g = {"w": np.array([-3.0, 0.5, 2.0])}
    clip_grad_value(g, 1.0)
    assert (g["w"] == [-1, 0.5, 1]).all()


# ---- schedules --------------------------------------------------------------------------------

def rates(schedule, n, *values):
    found = [schedule.optimizer.lr]
    for _ in range(n):
        schedule.step(*values)
        found.append(schedule.optimizer.lr)
    return found


def plain(lr=0.8):
    return SGD(({}, {}), lr)


def torch_rates(torch, make, n, *values):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    schedule, found = make(torch.optim.lr_scheduler)(optimizer), [optimizer.param_groups[0]["lr"]]
    for k in range(n):
        optimizer.step()
        schedule.step(*(value[k] for value in values))
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_step_and_cosine_equal_torch():
    torch = pytest.importorskip("torch")
    for ours, theirs in (
        (StepDecay(plain(), 3, 0.7), lambda s: lambda o: s.StepLR(o, 3, gamma=0.7)),
        (CosineDecay(plain(), 12, final=0.1), lambda s: lambda o: s.CosineAnnealingLR(o, 12, 0.1)),
        (WarmUp(plain(), 5), lambda s: lambda o: s.LinearLR(o, 1 / 5, total_iters=4)),
    ):
        np.testing.assert_allclose(rates(ours, 12), torch_rates(torch, theirs, 12), rtol=1e-12)


def test_plateau_equals_torch():
    torch = pytest.importorskip("torch")
    losses = [3.0, 2.0, 1.9999, 2.1, 2.2, 1.5, *[1.6] * 6, float("nan"), 1.4, 2.0, 2.0]
    want = torch_rates(torch, lambda s: lambda o: s.ReduceLROnPlateau(
        o, factor=0.5, patience=1, min_lr=0.15), len(losses), losses)
    ours = Plateau(plain(), factor=0.5, patience=1, min_lr=0.15)
    found = [ours.optimizer.lr]
    for loss in losses:
        ours.step(loss)
        found.append(ours.optimizer.lr)
    np.testing.assert_allclose(found, want, rtol=1e-12)
    assert found[-1] == 0.15


def test_step_decay_starts_late():
    found = rates(StepDecay(plain(1.0), 1, 0.5, start=2), 4)
    assert found == [1, 1, 1, 0.5, 0.25]


def test_warm_up_hands_over():
    optimizer = plain()
    found = rates(WarmUp(optimizer, 4, then=CosineDecay(optimizer, 6)), 12)
    np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-12)
    np.testing.assert_allclose(found[4:], (rates(CosineDecay(plain(), 6), 8)), rtol=1e-12)


@pytest.mark.parametrize("make", [
    lambda o: StepDecay(o, 2, 0.5), lambda o: CosineDecay(o, 9), lambda o: WarmUp(o, 3),
    lambda o: WarmUp(o, 3, then=CosineDecay(o, 5)), lambda o: Plateau(o, patience=1),
], ids=["step", "cosine", "warm-up", "warm-up and cosine", "plateau"])
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_resumed_schedule_equals_uninterrupted(make, cut):
    whole, part, late = plain(), plain(), plain(0.3)
    values = [2.0, *[1.0] * 4, *[0.5] * 5] if isinstance(make(plain()), Plateau) else []

    def run(schedule, start, stop):
        found = []
        for n in range(start, stop):
            schedule.step(*values[n:n + 1])
            found.append(schedule.optimizer.lr)
        return found
    want = run(make(whole), 0, 10)
    first = make(part)
    found = run(first, 0, cut)
    resumed = make(late)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert late.lr == part.lr
    assert found + run(resumed, cut, 10) == want


# ---- errors -----------------------------------------------------------------------------------

def pair(**change):
    return {"w": np.zeros((2, 3))}, {"w": np.zeros((2, 3)), **change}


@pytest.mark.parametrize("call, error, words", [
    (lambda: SGD(pair(v=np.zeros(1)), 0.1), ValueError, r"same names, got \['v'\] in one only"),
    (lambda: SGD(pair(w=np.zeros(6)), 0.1), ValueError, r"gradient w must be float64 \(2, 3\)"),
    (lambda: SGD(pair(w=[1.0]), 0.1), TypeError,
     "gradient w must be a float32 or float64 array, got list"),
    (lambda: SGD(pair(w=np.zeros((3, 2)).T), 0.1), ValueError, "gradient w must be C-contiguous"),
    (lambda: SGD(pair(), -1), ValueError, "lr must be at least 0 and finite, got -1"),
    (lambda: SGD(pair(), 0.1, nesterov=True), ValueError, "nesterov needs a momentum above 0"),
    (lambda: Adam(pair(), betas=(0.9, 1.0)), ValueError,
     r"betas\[1\] must be at least 0 and below 1"),
    (lambda: AdamW(pair(), weight_decay=np.nan), ValueError, "weight_decay must be at least 0"),
    (lambda: RMSprop(pair(), alpha=1), ValueError, "alpha must be at least 0 and below 1"),
    (lambda: clip_grad_norm({}, -1), ValueError, "max_norm must be at least 0"),
    (lambda: StepDecay(plain(), 0, 0.5), ValueError, "every must be at least 1, got 0"),
    (lambda: WarmUp(plain(), 3, then=CosineDecay(plain(), 3)), ValueError, "then must be"),
    (lambda: Plateau(plain(), factor=1.5), ValueError, "factor must be at least 0 and below 1"),
    (lambda: Adam(Linear(2, 2), lr="fast"), TypeError, "lr must be a number, got 'fast'"),
    *((lambda model=model: SGD(model, 0.1), TypeError, f"needs a Module, or a pair .* got {got}")
      for model, got in ((np.zeros(3), "ndarray"), (pair()[0], "dict"),
                         ((np.zeros(3), {}), r"\(ndarray, dict"), ([np.zeros(3)], "list"),
                         ((1, 2), r"\(int, int\)"), (None, "NoneType"))),
    (lambda: clip_grad_norm([np.ones(3)], 1.0), TypeError, "needs a Module, a dict of arrays or an array, "
                                                          "got list"),
])
def test_errors_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_state_that_does_not_fit_changes_nothing():
    optimizer = Adam(pair())
    state = optimizer.state_dict()
    other = Adam(({"w": np.zeros(2)}, {"w": np.zeros(2)})).state_dict()
    with pytest.raises(ValueError, match=r"mean.w must be float64 \(2, 3\), got float64 \(2,\)"):
        optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match="the state does not fit Adam"):
        optimizer.load_state_dict(SGD(pair(), 0.1).state_dict())
    assert all((a == state[name]).all() for name, a in optimizer.state_dict().items())


@pytest.mark.parametrize("rule", [lambda m: SGD(m, 0.5), Adam], ids=["SGD", "Adam"])
def test_an_optimizer_of_a_frozen_model_says_so(rule):
    """It must not go on with arrays that are the model's no longer."""
    layer = Linear(3, 2, seed=0)
    before = rule(layer), rule((layer.parameters(), layer.gradients()))
    layer.freeze()
    kept = layer.state_dict()
    for optimizer in before:
        with pytest.raises(ValueError, match=r"parameter weight is frozen: unfreeze\(\)"):
            optimizer.step()
    with pytest.raises(ValueError, match=r"a frozen Linear cannot be trained: unfreeze\(\)"):
        rule(layer)
    with pytest.raises(ValueError, match="parameter weight must be writable"):
        rule((layer.parameters(), layer.gradients()))
    for p in before[0]._parameters.values():
        p.flags.writeable = True
    with pytest.raises(ValueError, match="must be the arrays that this optimizer was made"):
        before[0].step()
    assert all((p == kept[name]).all() for name, p in layer.unfreeze().parameters().items())
    for _, g in layer.gradients().items():
        g[...] = 1
    for optimizer in before:
        optimizer.step()
    assert all((p != kept[name]).all() for name, p in layer.parameters().items())


@pytest.mark.parametrize("rule", [lambda m: SGD(m, 0.5, momentum=0.5), Adam], ids=["SGD", "Adam"])
def test_arrays_that_changed_between_steps_are_refused(rule):
    def replaced(parameters, gradients):
        parameters["w"] = np.zeros((2, 3))

    def other_gradient(parameters, gradients):
        gradients["w"] = np.zeros((2, 3))

    def gone(parameters, gradients):
        del parameters["w"]

    def smaller(parameters, gradients):
        for a in parameters["w"], gradients["w"]:
            a.resize((1, 2), refcheck=False)

    def one_smaller(parameters, gradients):
        gradients["w"].resize((1, 2), refcheck=False)

    for change in replaced, other_gradient, gone, smaller, one_smaller:
        parameters, gradients = {"w": np.ones((2, 3))}, {"w": np.ones((2, 3))}
        optimizer = rule((parameters, gradients))
        optimizer.step()
        change(parameters, gradients)
        with pytest.raises(ValueError, match="(parameter|gradient) w .*must"):
            optimizer.step()
        assert optimizer.steps == 1


def test_arrays_that_moved_are_followed():
    parameters, gradients = {"w": np.ones((200, 3))}, {"w": np.ones((200, 3))}
    optimizer = SGD((parameters, gradients), 0.5)
    optimizer.step()
    parameters["w"].resize((90_000, 3), refcheck=False)
    parameters["w"].resize((200, 3), refcheck=False)
    optimizer.step()
    assert (parameters["w"] == 0).all()


def test_a_state_of_another_kind_is_refused():
    optimizer = Adam(pair())
    state = optimizer.state_dict()
    for change, error, words in (
            ({"mean.w": np.zeros((2, 3), "float32")}, TypeError, "mean.w must be float64"),
            ({"mean.w": [[0.0] * 3]}, ValueError, r"mean.w must be float64 \(2, 3\)"),
            ({"lr": np.array("fast")}, TypeError, "lr must be a number"),
            ({"lr": np.array(np.nan)}, ValueError, "lr must be at least 0"),
            ({"steps": np.array(2.5)}, TypeError, "steps must be an int"),
            ({"steps": np.array(-1)}, ValueError, "steps must be at least 0")):
        with pytest.raises(error, match=words):
            optimizer.load_state_dict({**state, **change})
    assert optimizer.steps == 0 and not optimizer.state_dict()["mean.w"].any()


def test_clipping_writes_to_all_or_none():
    for clip in clip_grad_norm, clip_grad_value:
        first, second = np.full(3, 9.0), np.full(3, 9.0)
        second.flags.writeable = False
        with pytest.raises(ValueError, match="gradient b must be writable"):
            clip({"a": first, "b": second}, 1.0)
        assert (first == 9).all()


def test_arrays_of_an_adam_step_are_apart():
    for place in range(3):
        arrays = list(np.ones((4, 5)))
        arrays[place + 1] = arrays[place]
        with pytest.raises(ValueError, match="must not share memory"):
            adam_step(*arrays, betas=(0.9, 0.99), rate=0.1, eps=1e-8)
