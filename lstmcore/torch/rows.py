"""What PyTorch's side knows of a cell: one row for each, by the name that functional.pack has for it.

A row's functions take every argument that some cell has, in one order (`ARGUMENTS`), and give None
for what theirs has not. `joined` is written for tensors and arrays alike: cat is torch.cat or
np.concatenate.
"""

from collections import namedtuple
from functools import partial

import torch
from torch.nn.functional import linear

from lstmcore import functional
from lstmcore.formats.description import gru_bias
from lstmcore.functional import cell_row

# kernels   the row of functional.cell_row: gates, fed, has_c and so on
# forward   arrays and a dict of options -> y, h_n, c_n and tape, as functional's
# backward  tape, dy, dh_n, dc_n and options -> gradients in the order of ARGUMENTS
# joined    PyTorch's two biases -> the kernels' b
# parted    db -> the gradients of the two
# step      one step (x, W_ih, W_hh, b, h, c, peepholes, W_hr) -> h, c in PyTorch's operations
# widens    whether PyTorch's own operations, under autocast, keep the state's type for the results
Row = namedtuple("Row", "kernels forward backward joined parted step widens")
ARGUMENTS = "x", "W_ih", "W_hh", "b", "h0", "c0", "peepholes", "W_hr"


# LSTM ---------------------------------------------------------------------------------------------

def _lstm_forward(x, W_ih, W_hh, b, h0, c0, peepholes, W_hr, options):
    y, (h_n, c_n), tape = functional.lstm_forward(x, W_ih, W_hh, b, h0, c0, peepholes=peepholes,
                                                  W_hr=W_hr, **options)
    return y, h_n, c_n, tape


def _lstm_backward(tape, dy, dh_n, dc_n, **options):
    g = functional.lstm_backward(tape, dy, dh_n, dc_n, **options)
    return g.dx, g.dW_ih, g.dW_hh, g.db, g.dh0, g.dc0, g.dpeepholes, g.dW_hr


def _lstm_step(x, W_ih, W_hh, b, h, c, peepholes, W_hr):
    p_i, p_f, p_o = (0, 0, 0) if peepholes is None else peepholes
    a_i, a_f, a_g, a_o = linear(x, W_ih, b).addmm(h, W_hh.T).chunk(4, 1)
    c = torch.sigmoid(a_f + p_f * c) * c + torch.sigmoid(a_i + p_i * c) * torch.tanh(a_g)
    h = torch.sigmoid(a_o + p_o * c) * torch.tanh(c)
    return h if W_hr is None else h @ W_hr.T, c


# GRU ----------------------------------------------------------------------------------------------

def _gru_forward(x, W_ih, W_hh, b, h0, _c0, _peepholes, _W_hr, options):
    y, h_n, tape = functional.gru_forward(x, W_ih, W_hh, b, h0, **options)
    return y, h_n, None, tape


def _gru_backward(tape, dy, dh_n, _dc_n, **options):
    return *functional.gru_backward(tape, dy, dh_n, **options), None, None, None


def _gru_parted(db):
    H = db.shape[0] // 4
    return db[:3 * H], torch.cat([db[:2 * H], db[3 * H:]])


def _gru_step(x, W_ih, W_hh, b, h, c, _peepholes, _W_hr):
    b, b_hn = (None, 0) if b is None else b.tensor_split([W_ih.shape[0]])
    (a_r, a_z, a_n), (q_r, q_z, q_n) = linear(x, W_ih, b).chunk(3, 1), (h @ W_hh.T).chunk(3, 1)
    z = torch.sigmoid(a_z + q_z)
    n = torch.tanh(a_n + torch.sigmoid(a_r + q_r) * (q_n + b_hn))
    return (1 - z) * n + z * h, c


# Vanilla RNN --------------------------------------------------------------------------------------

def _rnn_forward(nonlinearity, x, W_ih, W_hh, b, h0, _c0, _peepholes, _W_hr, options):
    y, h_n, tape = functional.rnn_forward(x, W_ih, W_hh, b, h0, nonlinearity=nonlinearity, **options)
    return y, h_n, None, tape


def _rnn_backward(tape, dy, dh_n, _dc_n, **options):
    return *functional.rnn_backward(tape, dy, dh_n, **options), None, None, None


def _rnn_step(activation, x, W_ih, W_hh, b, h, c, _peepholes, _W_hr):
    return activation(linear(x, W_ih, b).addmm(h, W_hh.T)), c


def _sum(b_ih, b_hh, cat):
    return b_ih + b_hh


def _both(db):
    return db, db       # one tensor: autograd copies what becomes the .grad of two parameters


ROWS = {
    "lstm": Row(cell_row("lstm"), _lstm_forward, _lstm_backward, _sum, _both, _lstm_step, True),
    "gru": Row(cell_row("gru"), _gru_forward, _gru_backward, gru_bias, _gru_parted, _gru_step,
               True),
    **{name: Row(cell_row(name), partial(_rnn_forward, name), _rnn_backward, _sum,
                 _both, partial(_rnn_step, getattr(torch, name)), False)
       for name in ("tanh", "relu")},
}
