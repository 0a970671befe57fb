"""Gradient flow: against products of Jacobians, finite differences, and the story it tells."""

import numpy as np
import pytest

import lstmcore
from lstmcore import gradflow
from lstmcore.layers import GRU, LSTM, RNN


def noise(T, B, I, seed=3):
    return np.random.default_rng(seed).standard_normal((T, B, I))


def direction(B, P, seed=0):
    r = np.random.default_rng(seed).standard_normal((B, P))
    return r / np.linalg.norm(r, axis=1, keepdims=True)


def test_flow_of_rnn_is_product_of_jacobians():
    T, B, H = 9, 4, 6
    layer = RNN(3, H, dtype="float64", seed=1)
    x = noise(T, B, 3)
    y, _ = layer.eval()(x)
    flow = gradflow.gradient_flow(layer, x)
    dh, want = direction(B, H), []
    for t in reversed(range(T)):
        want.append(np.linalg.norm(dh, axis=1).mean())
        dh = (dh * (1 - y[t] ** 2)) @ layer.parameters()["weight_hh_l0"]
    want.append(np.linalg.norm(dh, axis=1).mean())
    np.testing.assert_allclose(flow[:, 0], want, rtol=1e-12)  # the same sums in float64


@pytest.mark.parametrize("kind, options", [
    (LSTM, {}), (LSTM, dict(num_layers=2, peepholes=True)), (LSTM, dict(num_layers=2, proj_size=3)),
    (GRU, dict(num_layers=2)), (GRU, dict(reset_after=False))])
def test_flow_agrees_with_differences_of_the_initial_state(kind, options):
    T, B, H, step = 5, 2, 4, 1e-5
    layer = kind(3, H, dtype="float64", seed=1, **options).eval()
    x = noise(T, B, 3)
    L, P = layer.num_layers, options.get("proj_size", H)
    r = direction(B, P)

    def losses(h0):
        y, _ = layer(x, (h0, np.zeros((L, B, H))) if kind is LSTM else h0)
        return (y[-1] * r).sum(axis=1)

    dh0 = np.empty((L, B, P))
    for layer_, j in np.ndindex(L, P):
        h0 = np.zeros((L, B, P))
        h0[layer_, :, j] = step
        dh0[layer_, :, j] = (losses(h0) - losses(-h0)) / (2 * step)
    want = np.linalg.norm(dh0, axis=2).mean(axis=1)
    # Central differences at 1e-5 are good to about 1e-10; the norms are near 1e-2.
    np.testing.assert_allclose(gradflow.gradient_flow(layer, x)[-1], want, rtol=1e-6)


def test_flow_leaves_the_layer_alone_and_knows_batch_first():
    x = noise(7, 3, 5)
    options = dict(num_layers=2, dropout=0.5, dtype="float64", seed=2)
    layer, turned = LSTM(5, 4, **options), LSTM(5, 4, batch_first=True, **options)
    before = layer.state_dict()
    flow = gradflow.gradient_flow(layer, x)
    np.testing.assert_array_equal(flow, gradflow.gradient_flow(turned, x.swapaxes(0, 1)))
    assert flow.shape == (8, 2)
    assert layer.training and layer.dropout == 0.5
    assert all(not g.any() for g in layer.gradients().values())
    assert all((before[name] == p).all() for name, p in layer.parameters().items())


def test_flow_of_no_steps_is_the_loss_alone():
    flow = gradflow.gradient_flow(LSTM(2, 3, num_layers=2, seed=0), np.zeros((0, 4, 2), "float32"))
    np.testing.assert_allclose(flow, [[0, 1]], rtol=1e-6)  # float32 rounding of |r|


def test_rnn_forgets_and_forget_bias_decides_how_far_the_gradient_reaches():
    flows = gradflow.compare(hidden_size=32, steps=60)
    assert list(flows) == ["RNN"] + [f"LSTM, forget bias {b}" for b in (0, 1, 3)]
    ends = [norms[60] for norms in flows.values()]
    assert ends == sorted(ends)
    rnn, lstm0, _, lstm3 = ends
    assert rnn < 1e-9 and lstm3 > 1e-3 and lstm3 > 1e6 * lstm0
    assert all(norms.shape == (61,) and abs(norms[0] - 1) < 1e-12 for norms in flows.values())


@pytest.mark.parametrize("layer, error, words", [
    (LSTM(2, 3, bidirectional=True), ValueError, "one direction"),
    (lstmcore.Linear(2, 3), TypeError, "got Linear")])
def test_flow_refuses_what_has_no_last_step(layer, error, words):
    with pytest.raises(error, match=words):
        gradflow.gradient_flow(layer, np.zeros((4, 1, 2), "float32"))


def test_plot_takes_arrays_and_is_not_stretched_by_zeros():
    pytest.importorskip("matplotlib")
    flow = gradflow.gradient_flow(LSTM(3, 4, num_layers=2, dtype="float64", seed=0), noise(9, 2, 3))
    axes = gradflow.plot(flow).axes[0]
    assert [line.get_label() for line in axes.lines] == ["l0", "l1"]
    assert axes.get_ylim()[0] > flow[flow > 0].min() / 10        # flow[0, 0] is 0
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), flow[:, 1])
    assert np.isnan(axes.lines[0].get_ydata()[0])
    axes = gradflow.plot([1.0, 0.5, 0.0]).axes[0]
    assert len(axes.lines) == 1 and axes.get_ylim()[0] > 0.1
    for wrong in (np.zeros((2, 2, 2)), {"a": np.zeros((3, 2))}, 3.0):
        with pytest.raises(ValueError, match="got the shape"):
            gradflow.plot(wrong)


def test_plot_draws_every_line_and_writes_png(tmp_path):
    pytest.importorskip("matplotlib")
    flows = gradflow.compare(hidden_size=4, steps=12, forget_biases=(1,))
    figure = gradflow.plot(flows, tmp_path / "flow.png", title="a title")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["RNN", "LSTM, forget bias 1"]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), flows["LSTM, forget bias 1"])
    assert axes.get_yscale() == "log" and axes.get_title() == "a title"
    assert (tmp_path / "flow.png").read_bytes()[:4] == b"\x89PNG"
