"""Losses: against PyTorch, by finite differences, at the extremes, and what a mask does."""

import numpy as np
import pytest
from problems import bfloat16_sums
from slopes import assert_gradients

import lstmcore
from lstmcore import (Linear, bce_with_logits, dense, functional, linear_cross_entropy, mse_loss,
                      reference, softmax_cross_entropy)


def normal(*shape, seed=0, dtype="float64", scale=2.0):
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(dtype)


def classes(*shape, V=7, seed=0):
    return np.random.default_rng([seed, *shape]).integers(0, V, shape)


def weights(*shape):
    """Random weights of which some are zero."""
    drawn = np.random.default_rng(5).random(shape)
    return np.where(drawn < 0.3, 0, drawn)


CASES = {
    "cross-entropy": (softmax_cross_entropy, normal(5, 3, 7), classes(5, 3), (5, 3)),
    "squares": (mse_loss, normal(5, 3, 2), normal(5, 3, 2, seed=1), (5, 3, 2)),
    "squares by row": (mse_loss, normal(5, 3, 2), normal(5, 3, 2, seed=1), (5, 3)),
    "binary": (bce_with_logits, normal(5, 3), (normal(5, 3, seed=1) > 0).astype(float), (5, 3)),
    "binary, soft": (bce_with_logits, normal(5, 3), weights(5, 3), (5, 3)),
}


def by_name(cases):
    return pytest.mark.parametrize("loss, given, target, masked", cases.values(), ids=cases.keys())


@by_name(CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_gradient_is_the_slope(loss, given, target, masked, reduction, with_mask, close):
    options = dict(reduction=reduction, mask=weights(*masked) if with_mask else None)
    _, gradient = loss(given, target, **options)
    assert_gradients(close, lambda: np.sum(loss(given, target, **options)[0]),
                     {"given": given}, {"given": gradient})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@by_name(CASES)
def test_equals_torch(loss, given, target, masked, reduction, dtype, close):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    given = given.astype(dtype)
    target = target.astype(dtype) if target.dtype.kind == "f" else target
    z = torch.from_numpy(given).requires_grad_()
    if loss is softmax_cross_entropy:
        want = F.cross_entropy(z.movedim(-1, 1), torch.from_numpy(target), reduction=reduction)
    else:
        name = F.mse_loss if loss is mse_loss else F.binary_cross_entropy_with_logits
        want = name(z, torch.from_numpy(target), reduction=reduction)
    want.sum().backward()
    got, gradient = loss(given, target, reduction=reduction)
    close(np.asarray(got, dtype), want.detach(), "torch")
    close(gradient, z.grad, "torch")


def test_ignore_index_equals_torch(close):
    torch = pytest.importorskip("torch")
    given, target = normal(5, 3, 7), classes(5, 3)
    target[1:3, 1], target[4] = -100, -100
    z = torch.from_numpy(given).requires_grad_()
    want = torch.nn.functional.cross_entropy(z.movedim(-1, 1), torch.from_numpy(target))
    want.backward()
    got, gradient = softmax_cross_entropy(given, target, ignore_index=-100)
    close(got, want.detach(), "torch")
    close(gradient, z.grad, "torch")
    assert (softmax_cross_entropy(given, target, mask=target >= 0, ignore_index=-100)[0] == got)


@by_name(CASES)
def test_a_mask_is_the_same_as_leaving_out(loss, given, target, masked, close):
    there = weights(*masked) > 0
    got, gradient = loss(given, target, mask=there)
    kept = given[there], target[there]
    want, dkept = loss(*kept)
    close(got, want, "identity")
    close(gradient[there], dkept, "identity")
    assert not gradient[~there].any() and gradient[there].any()


@by_name(CASES)
def test_weights_average(loss, given, target, masked, close):
    w = weights(*masked)
    single, dsingle = loss(given, target, reduction="none")
    w_all = np.broadcast_to(w[..., None], single.shape) if w.ndim < single.ndim else w
    got, gradient = loss(given, target, mask=w)
    close(got, (w_all * single).sum() / w_all.sum(), "identity")
    scale = w_all[..., None] if gradient.ndim > single.ndim else w_all
    close(gradient, dsingle * scale / w_all.sum(), "identity")


def test_half_sum_is_the_textbooks():
    y, target = normal(4, 3), normal(4, 3, seed=1)
    loss, dy = mse_loss(y, target, reduction="half_sum")
    assert abs(loss - 0.5 * ((y - target) ** 2).sum()) < 1e-12 and (dy == y - target).all()


@by_name(CASES)
def test_nothing_that_counts_costs_nothing(loss, given, target, masked):
    for arguments, mask in (((given, target), np.zeros(masked)), ((given[:0], target[:0]), None)):
        value, gradient = loss(*arguments, mask=mask)
        assert value == 0 and gradient.shape == arguments[0].shape and not gradient.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits_are_exact(dtype):
    far = np.array([[1e4, 0, -1e4], [-1e4, 0, 1e4]], dtype)
    loss, gradient = softmax_cross_entropy(far, np.array([0, 0]), reduction="none")
    assert (loss == [0, 2e4]).all() and (gradient == [[0, 0, 0], [-1, 0, 1]]).all()
    loss, gradient = bce_with_logits(far, (far < 0).astype(dtype), reduction="none")
    assert (loss == [[1e4, np.log(np.array(2, dtype)), 1e4]] * 2).all()
    assert (gradient == [[1, 0.5, -1], [-1, 0.5, 1]]).all()
    wide = np.zeros((1, 40), dtype)
    wide[0, 5] = 1e4            # the largest, within a full vector
    loss, gradient = softmax_cross_entropy(wide, np.array([5]))
    assert loss == 0 and not gradient.any()
    small, _ = bce_with_logits(np.array([40.0]), np.array([1.0]))
    assert abs(small / np.exp(-40) - 1) < 1e-14


def test_a_forbidden_class_gets_nothing():
    z = np.array([[0.5, -np.inf, 1.5]])
    loss, gradient = softmax_cross_entropy(z, [2])
    assert np.isfinite(loss) and gradient[0, 1] == 0
    assert softmax_cross_entropy(z, [1])[0] == np.inf


def test_what_is_not_finite_shows_unless_it_is_masked():
    z = normal(3, 4)
    z[1, 2] = np.nan
    for loss, target in ((softmax_cross_entropy, [0, 1, 2]), (mse_loss, normal(3, 4, seed=1)),
                         (bce_with_logits, np.ones((3, 4)))):
        assert np.isnan(loss(z, target)[0])
        value, gradient = loss(z, target, mask=[1.0, 0, 1] if loss is softmax_cross_entropy else
                               np.array([[1.0], [0], [1]]) * np.ones(4))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_out_may_be_the_logits():
    z, target = normal(5, 3, 7), classes(5, 3)
    loss, want = softmax_cross_entropy(z, target)
    kept = z.copy()
    assert (softmax_cross_entropy(z, target)[1] == want).all() and (z == kept).all()
    again, d = softmax_cross_entropy(z, target, out=z)
    assert again == loss and d is z and (z == want).all()


@by_name(CASES)
def test_any_layout_will_do(loss, given, target, masked):
    mask = weights(*masked)
    want, gradient = loss(given, target, mask=mask)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2],
                   lambda a: a.swapaxes(0, 1).copy().swapaxes(0, 1)):
        a, b, m = layout(given), layout(target), layout(mask)
        for array in (a, b, m):
            array.flags.writeable = False
        got, found = loss(a, b, mask=m)
        np.testing.assert_allclose(got, want, rtol=1e-13)       # sums in another order
        np.testing.assert_allclose(found, gradient, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("V", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 200])
def test_cross_entropy_is_its_definition_in_every_width(V, dtype, isa, close):
    z, target = normal(5, V, dtype=dtype, scale=9.0), classes(5, V=V)
    e = np.exp(z.astype("float64") - z.max(axis=1, keepdims=True))
    share, at = e / e.sum(axis=1, keepdims=True), (np.arange(5), target)
    loss, gradient = softmax_cross_entropy(z, target, reduction="none")
    share[at] -= 1
    close(gradient, share, "kernel")
    want = np.log(e.sum(axis=1)) - (z[at].astype("float64") - z.max(axis=1))
    close(loss, want, "kernel")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy_has_the_same_bits_for_any_rows_and_threads(dtype, isa):
    z, target = normal(700, 257, dtype=dtype), classes(700, V=257)
    with lstmcore.threads(1):
        want, gradient = softmax_cross_entropy(z, target, reduction="none")
    for n in 2, 3, 4:
        with lstmcore.threads(n):
            got, found = softmax_cross_entropy(z, target, reduction="none")
        assert (got == want).all() and (found == gradient).all()
    got, found = softmax_cross_entropy(z[69:70], target[69:70], reduction="none")
    assert got[0] == want[69] and (found[0] == gradient[69]).all()


# ---- the head of a softmax ---------------------------------------------------------------------------

def head_problem(n, V, I, dtype, bias=True):
    """x, W, b, targets, weights, of which some are zero."""
    x, W, b = (normal(*shape, dtype=dtype, scale=scale)
               for shape, scale in (((n, I), 1), ((V, I), I**-0.5), ((V,), 1)))
    w = np.where(np.arange(n) % 3 == 1, 0, weights(n) + 0.1).astype(dtype)
    return x, W, b if bias else None, classes(n, V=V), w


def in_three_calls(x, W, b, targets, w, n_threads=1, compute=None):
    z = dense.linear_forward(x, W, b, n_threads=n_threads, compute=compute)
    losses = dense.cross_entropy(z, targets, w, z, n_threads=n_threads)
    return losses, *dense.linear_backward(x, W, z, n_threads=n_threads, compute=compute)


def dtype_of(compute):
    return "float64" if compute == "float64" else "float32"


def same_bits(got, want):
    return all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


FORMATS = ["float32", "float64", "bfloat16"]


# rows: within a block of 256 and past it; classes: within a chunk of 512, and of 2 and of 3 chunks
@pytest.mark.parametrize("compute", FORMATS)
@pytest.mark.parametrize("n, V, I, bias", [
    (1, 1, 1, True), (5, 1, 3, False), (3, 700, 5, True), (255, 33, 9, True), (256, 7, 40, False),
    (257, 512, 19, True), (600, 70, 33, True), (300, 513, 7, False), (513, 1030, 5, True)])
def test_a_head_in_blocks_has_the_bits_of_three_calls(n, V, I, bias, compute, isa, share_small_work):
    problem = head_problem(n, V, I, dtype_of(compute), bias)
    x, W, b, targets, w = problem
    want = in_three_calls(*problem, compute=compute)
    assert all(np.isfinite(a).all() for a in want)
    packed = functional.pack("linear", W, precision=compute)
    for n_threads in 1, 2, 3, 5, 9:
        common = dict(n_threads=n_threads, compute=compute)
        losses, g = dense.linear_cross_entropy(*problem, **common)
        assert same_bits((losses, *g), want)
        assert same_bits(in_three_calls(*problem, **common), want)
        losses, g = dense.linear_cross_entropy(*problem, packed=packed, n_threads=n_threads)
        assert same_bits((losses, *g), want)
        losses, g = dense.linear_cross_entropy(*problem, gradients=False, **common)
        assert g is None and same_bits((losses,), want[:1])


# Sums of bfloat16 products differ from float64's as those of float32 do, but gradients are rounded in
# between: one that lies near the middle of two neighbors may fall to the other side.
@pytest.mark.parametrize("compute", FORMATS)
@pytest.mark.parametrize("n, V, I", [(1, 1, 3), (37, 11, 5), (300, 600, 9)])
def test_a_head_is_its_definition(n, V, I, compute, close):
    x, W, b, targets, w = head_problem(n, V, I, dtype_of(compute))
    round_ = reference.rounded if compute == "bfloat16" else np.asarray
    x_, W_, b_, w_ = (a.astype("float64") for a in (round_(x), round_(W), b, w))
    z = x_ @ W_.T + b_
    top = z.max(axis=1, keepdims=True)
    p = np.exp(z - top)
    total = p.sum(axis=1, keepdims=True)
    losses = (np.log(total) + top)[:, 0] - z[np.arange(n), targets]
    dz = p / total
    dz[np.arange(n), targets] -= 1
    dz *= w_[:, None]
    dz_ = round_(dz.astype(x.dtype)).astype("float64")
    got, g = dense.linear_cross_entropy(x, W, b, targets, w, compute=compute)
    close(got, losses.astype(x.dtype), "kernel")
    close(g.db, dz.sum(axis=0).astype(x.dtype), "kernel")
    why = "bfloat16" if compute == "bfloat16" else "kernel"
    close(g.dx, (dz_ @ W_).astype(x.dtype), why)
    close(g.dW, (dz_.T @ x_).astype(x.dtype), why)


@pytest.mark.parametrize("n, V, I", [(5, 3, 4), (37, 11, 5), (513, 1030, 5)])
def test_a_head_in_bfloat16_has_the_sums_of_numpy(n, V, I, isa, share_small_work):
    x, W, b, targets, w = head_problem(n, V, I, "float32")
    z = bfloat16_sums(x, W.T, b)
    want = dense.cross_entropy(z, targets, w, z)
    dx, dW = bfloat16_sums(z, W), bfloat16_sums(z[:256].T, x[:256])
    for k in range(256, n, 256):                # a gradient is cut into blocks of 256 rows
        dW += bfloat16_sums(z[k:k + 256].T, x[k:k + 256])
    db = dense.linear_backward(x, W, z).db      # no product: not rounded
    losses, g = dense.linear_cross_entropy(x, W, b, targets, w, compute="bfloat16", n_threads=2)
    assert same_bits((losses, *g), (want, dx, dW, db))


@pytest.mark.parametrize("n, V, I", [(3, 7, 5), (513, 1030, 5)])
def test_a_head_packed_as_int8_has_losses_alone(n, V, I, isa, share_small_work):
    x, W, b, targets, w = problem = head_problem(n, V, I, "float32")
    packed = functional.pack("linear", W, precision="int8")
    z = dense.linear_forward(x, W, b, packed=packed)
    want = dense.cross_entropy(z, targets, w, z)
    for n_threads in 1, 2, 5:
        losses, g = dense.linear_cross_entropy(*problem, packed=packed, gradients=False,
                                               n_threads=n_threads)
        assert g is None and same_bits((losses,), (want,))
    with pytest.raises(ValueError, match="int8 are for inference: gradients must be False"):
        dense.linear_cross_entropy(*problem, packed=packed)


def test_more_logits_than_one_block_have_their_bits_without_gradients(share_small_work):
    problem = head_problem(530, 16000, 3, "float32")        # 34 MB
    x, W, b, targets, w = problem
    z = dense.linear_forward(x, W, b)
    want = dense.cross_entropy(z, targets, w, z)
    for n_threads in 1, 2, 5:
        losses, g = dense.linear_cross_entropy(*problem, gradients=False, n_threads=n_threads)
        assert g is None and same_bits((losses,), (want,))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_head_over_blas_has_the_bits_of_three_calls(dtype, plan, share_small_work):
    problem = head_problem(530, 1100, 18, dtype)
    want = in_three_calls(*problem)
    for n_threads in 1, 2, 3:
        losses, g = dense.linear_cross_entropy(*problem, n_threads=n_threads)
        assert same_bits((losses, *g), want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_stays_in_its_row_of_a_head(dtype):
    x, *others = head_problem(300, 600, 9, dtype)
    want, g = dense.linear_cross_entropy(x, *others)
    x[1], x[4], x[271] = np.nan, np.inf, np.nan     # of weight 0
    losses, spoilt = dense.linear_cross_entropy(x, *others)
    rows = np.isfinite(losses)
    assert np.flatnonzero(~rows).tolist() == [1, 4, 271]
    assert (losses[rows] == want[rows]).all() and (spoilt.dx == g.dx).all()
    assert (spoilt.db == g.db).all() and np.isnan(spoilt.dW).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, V, I", [(3, 512, 7), (5, 513, 20), (260, 1100, 9)])
def test_a_layer_of_many_outputs_is_its_definition(n, V, I, dtype, plan, close):
    x, W, b, targets, w = head_problem(n, V, I, dtype)
    dy = normal(n, V, dtype=dtype)
    x_, W_, b_, dy_ = (a.astype("float64") for a in (x, W, b, dy))
    close(dense.linear_forward(x, W, b), (x_ @ W_.T + b_).astype(dtype), "kernel")
    for got, want in zip(dense.linear_backward(x, W, dy), (dy_ @ W_, dy_.T @ x_, dy_.sum(axis=0))):
        close(got, want.astype(dtype), "kernel")


@pytest.mark.parametrize("compute", FORMATS)
@pytest.mark.parametrize("n", [0, 3, 300])
def test_gradients_are_added_into_those_of_the_caller(n, compute, plan, close):
    dtype, common = dtype_of(compute), dict(compute=compute)
    x, W, b, targets, w = head_problem(n, 70, 9, dtype)
    dy = normal(n, 70, dtype=dtype)
    for call in (lambda into: dense.linear_cross_entropy(x, W, b, targets, w, into=into, **common)[1],
                 lambda into: dense.linear_backward(x, W, dy, into=into, **common)):
        start = normal(70, 9, dtype=dtype, seed=3), normal(70, dtype=dtype, seed=4)
        alone, (dW, db) = call(None), (a.copy() for a in start)
        g = call((dW, db))
        assert g.dW is dW and g.db is db and (g.dx == alone.dx).all()
        close(dW, start[0] + alone.dW, "kernel")
        close(db, start[1] + alone.db, "kernel")
        zeros = np.zeros_like(dW)
        assert call((zeros, None)).db is None and (zeros == alone.dW).all()


@pytest.mark.parametrize("into, words", [
    (lambda x, W: (W, np.zeros(7)), "dW must not share memory"),
    (lambda x, W: (np.zeros((7, 3)), W[0]), r"db must be \(7,\), got \(3,\)"),
    (lambda x, W: (np.zeros((7, 3)), x.reshape(-1)[:7]), "db must not share memory"),
    (lambda x, W: (np.zeros((3, 7)).T, None), "dW must be C-contiguous"),
    (lambda x, W: (np.zeros((7, 3), "f4"), None), "dW must be float64, got float32")])
def test_gradients_that_must_not_be_added_into_are_refused(into, words):
    x, W = normal(5, 3), normal(7, 3)
    for call in (lambda into: dense.linear_cross_entropy(x, W, None, classes(5), np.ones(5), into=into),
                 lambda into: dense.linear_backward(x, W, normal(5, 7), into=into)):
        with pytest.raises((ValueError, TypeError), match=words):
            call(into(x, W))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, dict(mask=weights(5, 3)), dict(ignore_index=2)])
def test_a_linear_head_is_the_layer_and_the_loss(options, reduction, close):
    head, twin = (Linear(4, 7, dtype="float64", seed=1) for _ in range(2))
    x, targets = normal(5, 3, 4), classes(5, 3)
    options = dict(options, reduction=reduction)
    loss, dlogits = softmax_cross_entropy(twin(x), targets, **options)
    dx = twin.backward(dlogits)
    got, found = linear_cross_entropy(head, x, targets, **options)
    assert np.array_equal(got, loss) and (found == dx).all()
    assert all((g == twin.gradients()[name]).all() for name, g in head.gradients().items())
    assert_gradients(close, lambda: np.sum(linear_cross_entropy(twin, x, targets, **options)[0]),
                     {"x": x, **twin.parameters()}, {"x": found, **head.gradients()})
    kept = {name: g.copy() for name, g in head.gradients().items()}
    for frozen in head.eval(), head.freeze():
        value, nothing = linear_cross_entropy(frozen, x, targets, **options)
        assert nothing is None and np.array_equal(value, loss)
    assert all((g == kept[name]).all() for name, g in head.gradients().items())


def test_a_linear_head_computes_in_the_format_of_its_layer():
    head, twin = (Linear(9, 70, compute="bfloat16", seed=1) for _ in range(2))
    x, targets = normal(300, 9, dtype="float32"), classes(300, V=70)
    loss, dlogits = softmax_cross_entropy(twin(x), targets)
    dx = twin.backward(dlogits)
    got, found = linear_cross_entropy(head, x, targets)
    assert got == loss and same_bits((found, *head.gradients().values()),
                                     (dx, *twin.gradients().values()))
    losses = []
    for precision in "float32", "bfloat16", "int8":
        losses.append(linear_cross_entropy(head.freeze(precision), x, targets)[0])
        assert losses[-1] == softmax_cross_entropy(head(x), targets)[0]
    assert losses[1] == loss and len(set(losses)) == 3


def test_a_head_takes_any_layout():
    x, W, b, targets, w = head_problem(6, 7, 4, "float32")
    want = dense.linear_cross_entropy(x, W, b, targets, w)
    for lay in np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]:
        got = dense.linear_cross_entropy(*map(lay, (x, W, b, targets, w)))
        assert same_bits((got[0], *got[1]), (want[0], *want[1]))
    head = Linear(4, 7, seed=1)
    loss, dx = linear_cross_entropy(head, x.reshape(3, 2, 4), targets.reshape(3, 2))
    wide = np.swapaxes(np.ascontiguousarray(np.swapaxes(x.reshape(3, 2, 4), 0, 1)), 0, 1)
    assert not wide.flags.c_contiguous
    got, found = linear_cross_entropy(head, wide, targets.reshape(3, 2).tolist())
    assert got == loss and (found == dx).all()


def test_a_head_without_rows_costs_nothing():
    head = Linear(4, 7, bias=False)
    loss, dx = linear_cross_entropy(head, np.zeros((0, 3, 4), "float32"), np.zeros((0, 3), int))
    assert loss == 0 and dx.shape == (0, 3, 4) and not head.gradients()["weight"].any()


@pytest.mark.parametrize("call, error, words", [
    (lambda head: linear_cross_entropy(np.ones((7, 4)), normal(5, 4), classes(5)), TypeError,
     "linear must be a Linear, got ndarray"),
    (lambda head: linear_cross_entropy(head, normal(5, 3), classes(5)), ValueError,
     r"x must be \(..., 4\), got \(5, 3\)"),
    (lambda head: linear_cross_entropy(head, normal(5, 4), [1]), ValueError,
     r"targets must be \(5,\), as x \(5, 4\) without their last axis, got \(1,\)"),
    (lambda head: linear_cross_entropy(head, normal(1, 4), [7]), ValueError,
     "targets must be in 0..6, got 7..7"),
    (lambda head: linear_cross_entropy(head, normal(1, 4), [0], reduction="avg"), ValueError,
     "reduction must be one of mean, sum, none, got 'avg'"),
    (lambda head: dense.linear_cross_entropy(normal(1, 4), np.ones((0, 4)), None, [], []), ValueError,
     r"W must be \(O, I\) with O >= 1, got \(0, 4\)"),
    (lambda head: dense.linear_cross_entropy(normal(1, 4), normal(7, 4), None, [7], np.ones(1)),
     ValueError, "targets must be in 0..6, got 7..7"),
    (lambda head: dense.linear_cross_entropy(normal(2, 4), normal(7, 4), None, [1, 2], np.ones(1)),
     ValueError, r"weights must be \(n,\) = \(2,\), got \(1,\)"),
    (lambda head: dense.linear_cross_entropy(normal(1, 4), normal(7, 4), None, [1], np.ones(1),
                                             compute="bfloat16"), TypeError,
     "compute='bfloat16' needs float32 arrays, got float64"),
    (lambda head: dense.linear_cross_entropy(normal(0, 4), normal(7, 4), None, [], np.ones(0),
                                             compute="int8"), ValueError,
     "compute must be 'float32', 'float64' or 'bfloat16', got 'int8'")])
def test_a_head_says_what_it_expects(call, error, words):
    with pytest.raises(error, match=words):
        call(Linear(4, 7, dtype="float64"))


def test_out_may_be_another_view_of_the_logits():
    z, target = normal(5, 7), classes(5)
    want = softmax_cross_entropy(z.copy(), target)[1]
    for out in z.copy(), z[:]:
        assert softmax_cross_entropy(z, target, out=out)[1] is out
        assert (out == want).all()
    assert (z == want).all()


def _read_only(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("out, words", [
    (lambda z, t, m: np.frombuffer(bytes(z.nbytes)).reshape(z.shape), "out must be writable"),
    (lambda z, t, m: _read_only(z.copy()), "out must be writable"),
    (lambda z, t, m: np.zeros(z.nbytes + 1, "i1")[1:].view(float).reshape(z.shape),
     "out must be aligned"),
    (lambda z, t, m: z.base[1:], "out must not share memory"),
    (lambda z, t, m: t.base.view(float), "out must not share memory"),
    (lambda z, t, m: m.base[:35].reshape(z.shape), "out must not share memory"),
], ids=["bytes", "read-only", "unaligned", "logits", "targets", "mask"])
def test_out_that_must_not_be_written_to_is_refused(out, words):
    logits = normal(6, 7)[:5]
    targets = np.zeros((5, 7), np.int64)[:, 3]
    mask = normal(40)[33:38]
    given = logits.copy(), targets.copy(), mask.copy()
    with pytest.raises(ValueError, match=words):
        softmax_cross_entropy(logits, targets, mask=mask, out=out(logits, targets, mask))
    assert all((a == b).all() for a, b in zip(given, (logits, targets, mask)))


@pytest.mark.parametrize("dtype", [bool, object, str, complex])
def test_an_empty_mask_may_be_of_any_type(dtype):
    loss, d = mse_loss(np.ones((5, 0)), np.ones((5, 0)), mask=np.empty((5, 0), dtype))
    assert loss == 0.0 and d.shape == (5, 0)


def test_gradient_may_lie_over_no_weights():
    both, targets = np.ones(3 + 3 * 4), np.array([0, 3, 1])
    with pytest.raises(ValueError, match="dlogits must not share memory"):
        dense.cross_entropy(np.zeros((3, 4)), targets, both[:3], both[2:14].reshape(3, 4))
    with pytest.raises(ValueError, match="targets must be in 0..3, got 0..4"):
        dense.cross_entropy(np.zeros((3, 4)), targets + (targets > 2), np.ones(3), np.ones((3, 4)))


def test_long_float32_sums_stay_exact():
    """A million equal losses: a float32 sum would be off in the third digit."""
    y = np.full(1_000_000, 0.1, "float32")
    loss, _ = mse_loss(y, np.zeros_like(y))
    assert abs(loss / float(np.float32(0.1)) ** 2 - 1) < 1e-6


@pytest.mark.parametrize("call, error, words", [
    (lambda: softmax_cross_entropy(normal(5, 7), [[1]]), ValueError,
     r"targets must be \(5,\), as logits \(5, 7\) without their last axis, got \(1, 1\)"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1, 7]), ValueError,
     r"targets must be in 0..6, got 1..7"),
    (lambda: softmax_cross_entropy(normal(2, 7), [-1, 0]), ValueError, r"in 0..6, got -1..0"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1.0, 0.0]), TypeError,
     "targets must be integers"),
    (lambda: softmax_cross_entropy(np.ones((2, 7), int), [1, 0]), TypeError,
     "logits must be float32"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1, 0], reduction="avg"), ValueError,
     "reduction must be one of mean, sum, none, got 'avg'"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1, 0], mask=[1]), ValueError,
     r"mask must be \(2,\), got \(1,\)"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1, 0], out=np.zeros((2, 6))), ValueError,
     r"out must be \(2, 7\), got \(2, 6\)"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1, 0], out=np.zeros((2, 7), "float32")),
     TypeError, "out must be float64, got float32"),
    (lambda: softmax_cross_entropy(normal(2, 7), [1, 0], out=normal(7, 2).T), ValueError,
     "out must be C-contiguous"),
    (lambda: mse_loss(normal(5), normal(5, 1)), ValueError,
     r"target must be \(5,\), as y, got \(5, 1\)"),
    (lambda: mse_loss(normal(5), normal(5, dtype="float32")), TypeError, "target must be float64"),
    (lambda: bce_with_logits(normal(2), np.array([0.0, 1.5])), ValueError,
     r"targets must be in 0..1, got 0.0..1.5"),
    (lambda: bce_with_logits(normal(2), np.array([0.0, np.nan])), ValueError, r"in 0..1, got nan"),
    (lambda: bce_with_logits(normal(2), np.ones(2), reduction="half_sum"), ValueError, "reduction"),
])
def test_errors_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()
