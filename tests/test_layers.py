"""Modules and the layers around the recurrent ones: gradients, modes, state, pooling, errors."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from slopes import assert_copied, assert_gradients, by_name, normal

from lstmcore import (LSTM, RNN, Dropout, Embedding, LastStep, Linear, MaxOverTime, MeanOverTime,
                      Module, ReLU, Sequential, Sigmoid, Tanh, sequence_mask)

RAGGED = [4, 0, 6, 1, 3]        # of T = 6: unsorted, with an empty and a full sequence

PLAIN = {
    "Linear": lambda: Linear(5, 3, dtype="float64", seed=1),
    "Linear without bias": lambda: Linear(5, 3, bias=False, dtype="float64", seed=1),
    "Dropout": lambda: Dropout(0.3, seed=1),
    "Tanh": Tanh,
    "Sigmoid": Sigmoid,
    "ReLU": ReLU,
    "Sequential": lambda: Sequential(Linear(5, 4, dtype="float64", seed=1), Tanh(),
                                     Dropout(0.3, seed=2), Linear(4, 2, dtype="float64", seed=3)),
}
POOLS = {
    "last": LastStep,
    "last both ways": lambda **options: LastStep(bidirectional=True, **options),
    "mean": MeanOverTime,
    "max": MaxOverTime,
}


# ---- gradients ----------------------------------------------------------------------------------

@by_name(PLAIN)
def test_plain_gradients_are_slopes(make, close):
    layer, x = make(), normal(4, 3, 5)
    rng = layer.rng_state()
    dy = normal(*layer(x).shape, seed=1)

    def loss():
        layer.load_rng_state(rng)
        return (layer(x) * dy).sum()
    loss()
    dx = layer.backward(dy)
    assert_gradients(close, loss, {"x": x, **layer.parameters()},
                     {"x": dx, **layer.gradients()})


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["dense", "ragged"])
@by_name(POOLS)
def test_pool_gradients_are_slopes(make, lengths, batch_first, close):
    pool = make(batch_first=batch_first)
    y, dpooled = normal(*((5, 6, 4) if batch_first else (6, 5, 4))), normal(5, 4, seed=2)

    def loss():
        return (pool(y, lengths) * dpooled).sum()
    loss()
    assert_gradients(close, loss, {"y": y}, {"y": pool.backward(dpooled)})


@pytest.mark.parametrize("V", [7, 4, 1])
def test_embedding_gradient_is_the_slope(V, close):
    table, tokens = Embedding(V, 3, dtype="float64", seed=0), np.array([[1, 5, 1], [0, 1, 6]]) % V
    dy = normal(2, 3, 3)

    def loss():
        return (table(tokens) * dy).sum()
    loss()
    assert table.backward(dy) is None
    assert_gradients(close, loss, table.parameters(), table.gradients())
    table(np.zeros((2, 0), int))
    table.backward(np.zeros((2, 0, 3)))


def test_embedding_and_linear_equal_torch(close):
    torch = pytest.importorskip("torch")
    nn = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3), torch.nn.Tanh(),
                             torch.nn.Linear(3, 2), torch.nn.Sigmoid())
    net = Sequential(Embedding(9, 4), Linear(4, 3), Tanh(), Linear(3, 2), Sigmoid())
    net.load_state_dict(nn.state_dict())
    tokens, dy = np.array([[3, 3, 8], [0, 3, 1]]), normal(2, 3, 2, dtype="float32")
    want = nn(torch.from_numpy(tokens))
    want.backward(torch.from_numpy(dy))
    close(net(tokens), want.detach(), "torch")
    net.backward(dy)
    for name, p in nn.named_parameters():
        close(net.gradients()[name], p.grad, "torch", name)


@by_name({**PLAIN, **POOLS})
def test_any_layout_will_do(make, close):
    x, results = normal(6, 4, 5), []
    for layout in (np.array, np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]):
        layer = make()
        y = layer(layout(x))
        dx = layer.backward(layout(normal(*y.shape, seed=1)))
        results.append((y, dx, *layer.gradients().values()))
    for other in results[1:]:
        close(other, results[0], "identity")


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_frozen_net_gives_the_same_bits(rows, isa):
    net, x = Sequential(Linear(5, 70, seed=1), Tanh(), Linear(70, 130, seed=3)), normal(rows, 5)
    x = x.astype("float32")
    want = net.eval()(x)
    assert (net.freeze()(x) == want).all() and (copy.deepcopy(net)(x) == want).all()
    with pytest.raises(ValueError, match="a frozen Sequential cannot be trained: unfreeze"):
        net.train()
    net.unfreeze().layers[0].parameters()["weight"][...] = 0
    assert (net(x) != want).any()


def test_gradients_add_up_and_go_to_zero():
    layer, x = LSTM(3, 4, seed=0), normal(5, 2, 3, dtype="float32")
    once = []
    for _ in range(2):
        y, _ = layer(x)
        layer.backward(y)
        once.append({name: g.copy() for name, g in layer.gradients().items()})
    assert all((once[1][name] == 2 * g).all() and g.any() for name, g in once[0].items())
    held = layer.gradients()
    layer.zero_grad()
    assert not any(g.any() for g in held.values())


# ---- modes and dropout --------------------------------------------------------------------------

@by_name({"LSTM": lambda: LSTM(3, 4), "Linear": lambda: Linear(3, 2), "Tanh": Tanh,
          "Dropout": Dropout, "MeanOverTime": MeanOverTime})
def test_backward_needs_one_training_call(make):
    layer, x = make(), normal(5, 2, 3, dtype="float32")

    def output(result):
        return result[0] if isinstance(result, tuple) else result
    y = output(layer(x))
    layer.backward(y)
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(y)
    layer(x)
    layer.eval()
    layer(x)
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(y)


def test_a_refused_dy_leaves_the_tape():
    layer = Linear(3, 2)
    y = layer(normal(5, 3, dtype="float32"))
    with pytest.raises(ValueError, match=r"dy must have the shape of the output, \(5, 2\)"):
        layer.backward(y[:4])
    with pytest.raises(TypeError, match="dy must be float32, got float64"):
        layer.backward(y.astype("float64"))
    assert layer.backward(y).shape == (5, 3)


def test_dropout_drops_its_share_and_keeps_the_mean():
    layer, x = Dropout(0.3, seed=0), np.ones((200, 500), "float32")
    y = layer(x)
    assert set(np.unique(y)) == {np.float32(0), y.max()}
    # 100000 draws: the share's standard deviation is 0.0015
    assert abs((y == 0).mean() - 0.3) < 0.006 and abs(y.max() - 1 / 0.7) < 1e-4
    assert (layer.backward(x) == y).all()
    assert (layer(x) != y).any()
    assert (layer.eval()(x) == x).all()
    assert (Dropout(1.0)(x) == 0).all() and (Dropout(0.0)(x) == x).all()


def test_first_values_are_torchs():
    p = Sequential(Linear(100, 60, seed=0), Embedding(80, 90, seed=1)).parameters()
    for name in ("0.weight", "0.bias"):
        # The extremes of n draws from U(-0.1, 0.1), n >= 60, are within a fifth of its bounds.
        assert 0.08 < p[name].max() <= 0.1 and -0.1 <= p[name].min() < -0.08, name
    # 7200 draws from N(0, 1): mean and standard deviation are known to 0.012 and 0.008.
    assert abs(p["1.weight"].mean()) < 0.05 and abs(p["1.weight"].std() - 1) < 0.035
    assert (Linear(3, 2, seed=5).parameters()["weight"]
            == Linear(3, 2, seed=5).parameters()["weight"]).all()


def test_random_numbers_resume():
    layer, x = LSTM(3, 4, 2, dropout=0.5, seed=0), normal(5, 2, 3, dtype="float32")
    model = Sequential(Dropout(0.5, seed=1), Dropout(0.5, seed=2))
    for module, run in ((layer, lambda: layer(x)[0]), (model, lambda: model(x))):
        run()
        state = copy.deepcopy(module.rng_state())
        wanted = run()
        assert (run() != wanted).any()
        module.load_rng_state(state)
        assert (run() == wanted).all()


# ---- parameters, state, copies ------------------------------------------------------------------

class Tagger(Module):
    def __init__(self):
        self.embed, self.layers = Embedding(9, 3, seed=0), [LSTM(3, 4, seed=1), LSTM(4, 4, seed=2)]
        self.again = self.layers[0]
        self.head = Sequential(Dropout(0.5, seed=3), Linear(4, 2, seed=4))


def test_modules_within_modules():
    model = Tagger()
    names = list(model.parameters())
    assert names == list(model.gradients()) and len(names) == 9
    assert names[0] == "embed.weight" and names[-1] == "head.1.bias"
    assert names[1] == "layers.0.weight_ih_l0" and names[4] == "layers.1.weight_ih_l0"
    assert list(model.rng_state()) == ["layers.0.rng", "layers.1.rng", "head.0.rng"]
    model.eval()
    assert not model.layers[1].training and not model.head.layers[0].training
    assert model.train() is model and model.head.layers[0].training


def test_state_dict_is_a_copy_and_goes_back_in():
    model, other = Tagger(), Tagger()
    for p in other.parameters().values():
        p += 1
    state = model.state_dict()
    held = other.parameters()
    other.load_state_dict(state)
    assert all((held[name] == p).all() for name, p in state.items())
    state["embed.weight"] += 1
    assert (model.parameters()["embed.weight"] != state["embed.weight"]).all()


def test_state_dict_that_does_not_fit_changes_nothing():
    layer = Linear(3, 2, seed=0)
    before = layer.state_dict()
    for state, error, words in [
        ({"weight": np.zeros((2, 3))}, ValueError, r"missing \['bias'\], unexpected \[\]"),
        ({**before, "w": before["bias"]}, ValueError, r"unexpected \['w'\]"),
        ({"weight": np.zeros((2, 3)), "bias": np.zeros(3)}, ValueError, r"bias must be \(2,\)"),
        ({"weight": np.zeros((2, 3)), "bias": np.zeros(2, int)}, TypeError,
         "bias must hold floats"),
    ]:
        with pytest.raises(error, match=words):
            layer.load_state_dict(state)
    assert all((p == before[name]).all() for name, p in layer.parameters().items())
    lstm = LSTM(3, 2)
    state = lstm.state_dict() | {"bias_ih_l0": np.zeros(8), "bias_hh_l0": np.float32(1000)}
    del state["bias_l0"]
    with pytest.raises(ValueError, match=r"bias_hh_l0 must be \(8,\) as bias_ih_l0, got \(\)"):
        lstm.load_state_dict(state)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@by_name(COPIES, "copied")
@by_name({"Tagger": Tagger, **PLAIN})
def test_copies_are_whole_and_apart(make, copied):
    model = make()

    def run(module):
        if isinstance(module, Tagger):
            return module.layers[0](module.embed([[1], [2]]))[0]
        return module(normal(4, 5))
    assert_copied(model, copied, run)


def test_repr_says_what_is_not_plain():
    assert repr(LSTM(3, 5)) == "LSTM(3, 5)"
    assert (repr(LSTM(3, 5, 2, dropout=0.5, init="glorot", dtype="float64", seed=1))
            == "LSTM(3, 5, num_layers=2, dropout=0.5, init='glorot', dtype='float64')")
    assert repr(Sequential(RNN(3, 5, nonlinearity="relu"), Dropout(0.1), Linear(2, 3), Tanh())) == (
        "Sequential(RNN(3, 5, nonlinearity='relu'), Dropout(p=0.1), Linear(2, 3), Tanh())")
    assert repr(MeanOverTime(batch_first=True)) == "MeanOverTime(batch_first=True)"


# ---- pooling ------------------------------------------------------------------------------------

def test_pools_by_hand():
    y = normal(6, 5, 4)
    for make, want in ((LastStep, lambda a: a[-1]), (MeanOverTime, lambda a: a.mean(0)),
                       (MaxOverTime, lambda a: a.max(0))):
        pooled = make()(y, RAGGED)
        assert (pooled[1] == 0).all()
        for b in (0, 2, 3, 4):
            np.testing.assert_allclose(pooled[b], want(y[:RAGGED[b], b]), rtol=1e-14)
        assert (make(batch_first=True)(y.swapaxes(0, 1), RAGGED) == pooled).all()
        assert (make()(y) == make()(y, [6] * 5)).all()
        assert (make()(y[:0]) == 0).all() and make()(y[:, :0]).shape == (0, 4)


# ---- errors -------------------------------------------------------------------------------------

def f32(*shape):
    return np.zeros(shape, "float32")


@pytest.mark.parametrize("call, error, words", [
    (lambda: Linear(3, 4)(np.zeros((5, 3))), TypeError, "x must be float32, got float64"),
    (lambda: Linear(3, 4)(f32(5, 2)), ValueError, r"x must be \(..., 3\), got \(5, 2\)"),
    (lambda: Embedding(5, 4)([0, 5]), ValueError, r"tokens must be in 0..4, got 0..5"),
    (lambda: Embedding(5, 4)([-1, 2]), ValueError, r"tokens must be in 0..4, got -1..2"),
    (lambda: Embedding(5, 4)([0.5]), TypeError, "tokens must be integers, got float64"),
    (lambda: Tanh()([1, 2]), TypeError, "x must be float32 or float64, got int64"),
    (lambda: LastStep()(f32(5, 2)), ValueError, r"y must be \(T, B, W\), got \(5, 2\)"),
    (lambda: MeanOverTime()(f32(5, 2, 3), [1, 6]), ValueError, r"lengths must be in 0..T = 0..5"),
    (lambda: MaxOverTime()(f32(5, 2, 3), [1.0, 2.0]), TypeError, "lengths must be integers"),
    (lambda: sequence_mask([1, -1], 3), ValueError, r"lengths must be in 0..T"),
    (lambda: Linear(3, 2, dtype=None), TypeError, "dtype must be 'float32' or 'float64', got None"),
])
def test_errors_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_tokens_changed_after_the_call_do_not_matter():
    table, tokens = Embedding(10, 3, dtype="float64", seed=0), np.array([1, 4, 4])
    table(tokens)
    tokens[:] = 10**7
    table.backward(np.ones((3, 3)))
    assert table.gradients()["weight"][[1, 4]].tolist() == [[1] * 3, [2] * 3]


def test_a_table_that_was_resized_is_refused():
    table = Embedding(5000, 3, seed=0)
    table(np.full(9, 4999))
    table.gradients()["weight"].resize((2, 3), refcheck=False)
    with pytest.raises(ValueError, match=r"the gradient of weight must be \(5000, 3\), got \(2, 3\)"):
        table.backward(np.ones((9, 3), "float32"))


def test_lengths_changed_after_the_call_do_not_matter():
    for make in LastStep, MeanOverTime, MaxOverTime:
        layer, lengths, y = make(), np.array([3, 1]), normal(4, 2, 3)
        layer(y, lengths)
        want = layer.backward(np.ones((2, 3)))
        layer(y, lengths)
        lengths[:] = 10**7
        assert (layer.backward(np.ones((2, 3))) == want).all()


@pytest.mark.parametrize("make", [lambda: Linear(4, 4, dtype="float64", seed=0), Tanh, ReLU])
def test_kept_arrays_of_another_shape_are_refused(make):
    """They are the caller's, who may change them in place; the kernels would read past the end."""
    def smaller(a):
        a.resize((1, 4), refcheck=False)

    def turned(a):
        a.shape = (2, 8)

    def retyped(a):
        a.dtype = np.int64

    for change in smaller, turned, retyped:
        layer, x = make(), normal(4, 4)
        y = layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # newer NumPys deprecate both assignments
            change(x if isinstance(layer, Linear) else y)
        with pytest.raises(ValueError, match="an array that backward needs must stay as it was"):
            layer.backward(np.ones((4, 4)))


def test_frozen_parameters_cannot_be_changed():
    layer, x = Linear(3, 2, seed=0).eval(), normal(5, 3).astype("float32")
    view, weight, want = layer.parameters()["weight"][:], layer.parameters()["weight"], layer(x)
    layer.freeze().freeze()
    frozen = layer.parameters()["weight"]
    with pytest.raises(ValueError, match="WRITEABLE"):
        frozen.setflags(write=True)
    with pytest.raises(ValueError, match="WRITEABLE"):
        frozen.base.setflags(write=True)
    with pytest.raises(ValueError, match="read-only"):
        weight[...] = 0
    view[...] = 0                                   # a view from before reaches nothing
    assert (layer(x) == want).all()
    assert all((p == layer.state_dict()[name]).all() for name, p in layer.parameters().items())
    for copied in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer):
        assert (copied(x) == want).all()
        assert (copied.parameters()["weight"] == frozen).all()
    view[...] = 0
    assert layer.unfreeze().unfreeze().parameters()["weight"] is weight
    assert (layer(x) == want).all() and (view == frozen).all()
    weight[...] = 0
    assert (layer(x) != want).any() and layer.train().training


def test_a_copy_of_a_frozen_net_can_be_trained():
    net = Sequential(Linear(3, 4, seed=0), LSTM(4, 2, seed=1)).freeze()
    for copied in copy.deepcopy(net), pickle.loads(pickle.dumps(net)):
        copied.train()
        copied.freeze().unfreeze().train()
        for name, p in copied.parameters().items():
            p += 1
            assert (p == net.parameters()[name] + 1).all() and p.flags.owndata
        assert not net.training
        with pytest.raises(ValueError, match="unfreeze"):
            net.train()


def test_a_shallow_copy_of_a_frozen_layer_is_apart_from_it():
    layer, x = Linear(3, 2, seed=0).freeze(), normal(5, 3).astype("float32")
    want, copied = layer(x), copy.copy(layer).train()
    copied.parameters()["weight"][...] = 0
    assert (layer(x) == want).all() and (layer.unfreeze()(x) == want).all()


@pytest.mark.parametrize("copied", COPIES)
def test_what_was_copied_can_be_frozen_and_thawed(copied):
    # NumPy keeps unpickled arrays beyond 1000 bytes in the memory of bytes.
    layer = COPIES[copied](Linear(50, 20, seed=0)).freeze().unfreeze().train()
    layer.parameters()["weight"][...] = 0


def test_dropout_at_rest_gives_a_copy():
    x = np.ones(3)
    assert not np.shares_memory(Dropout(0.5).eval()(x), x)


def test_a_part_may_be_frozen_alone():
    net = Sequential(Linear(3, 4, seed=0), Tanh(), Linear(4, 2, seed=1))
    net.layers[0].freeze()
    with pytest.raises(ValueError, match="a frozen Sequential cannot be trained"):
        net.train()
    net.freeze().unfreeze().train()
