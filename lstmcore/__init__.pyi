# Every public name and the module where it lives, a line each: type checkers, editors and
# lstmcore/__init__.py read these lines.

from lstmcore import functional as functional
from lstmcore import distributed as distributed
from lstmcore import files as files
from lstmcore import formats as formats
from lstmcore import gradflow as gradflow
from lstmcore import inspect as inspect
from lstmcore import keras as keras
from lstmcore import layers as layers
from lstmcore import losses as losses
from lstmcore import models as models
from lstmcore import optim as optim
from lstmcore import reference as reference
from lstmcore import torch as torch
from lstmcore.files import convert as convert
from lstmcore.files import load as load
from lstmcore.files import save as save
from lstmcore.functional import gru_backward as gru_backward
from lstmcore.functional import gru_forward as gru_forward
from lstmcore.functional import info as info
from lstmcore.functional import lstm_backward as lstm_backward
from lstmcore.functional import lstm_forward as lstm_forward
from lstmcore.functional import rnn_backward as rnn_backward
from lstmcore.functional import rnn_forward as rnn_forward
from lstmcore.layers import GRU as GRU
from lstmcore.layers import LSTM as LSTM
from lstmcore.layers import RNN as RNN
from lstmcore.layers import Dropout as Dropout
from lstmcore.layers import Embedding as Embedding
from lstmcore.layers import LastStep as LastStep
from lstmcore.layers import Linear as Linear
from lstmcore.layers import MaxOverTime as MaxOverTime
from lstmcore.layers import MeanOverTime as MeanOverTime
from lstmcore.layers import Module as Module
from lstmcore.layers import ReLU as ReLU
from lstmcore.layers import Sequential as Sequential
from lstmcore.layers import Sigmoid as Sigmoid
from lstmcore.layers import Stack as Stack
from lstmcore.layers import Tanh as Tanh
from lstmcore.layers import sequence_mask as sequence_mask
from lstmcore.losses import bce_with_logits as bce_with_logits
from lstmcore.losses import linear_cross_entropy as linear_cross_entropy
from lstmcore.losses import mse_loss as mse_loss
from lstmcore.losses import softmax_cross_entropy as softmax_cross_entropy
from lstmcore.models.estimators import LSTMClassifier as LSTMClassifier
from lstmcore.models.estimators import LSTMRegressor as LSTMRegressor
from lstmcore.models.forecasting import Forecaster as Forecaster
from lstmcore.models.language import LanguageModel as LanguageModel
from lstmcore.optim import clip_grad_norm as clip_grad_norm
from lstmcore.optim import clip_grad_value as clip_grad_value
from lstmcore.threads import get_num_threads as get_num_threads
from lstmcore.threads import set_num_threads as set_num_threads
from lstmcore.threads import threads as threads

__version__: str
