"LSTMs against PyTorch's, five dropouts, ties, states that belong to a pass, Kneser–Ney by brute force, sampling."
import copy
import math
import pickle
import warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import At
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from exp import awd_lstm as A
from exp.callbacks import EMA, GradientAccumulation, GradientClip, Recorder, TerminateOnNaN
from exp.checkpoints import SaveCheckpoint
from exp.exercises import awd_lstm as E
from exp.learner import Callback, CancelBatch, Learner
from exp.mixup import LabelSmoothingCrossEntropy
from exp.optim import adamw
from exp.schedule import lr_find, one_cycle
from exp.testing import test_like
from exp.text import PAD_ID, UNKNOWN_ID, LMDataset, Vocab
from exp.training import SGD

ints = st.integers
WORDS = Vocab.of(["<unk>", "<pad>", *"abcdefghijklmnopqr"])
N = len(WORDS)


def stream(n=150, seed=0): return torch.randint(2, N, (n,), generator=torch.Generator().manual_seed(seed))


def small(seed=0, dropout=1., tie=True, n_layers=2, **chances):
    torch.manual_seed(seed)
    return A.language_model(WORDS, 6, 8, n_layers, dropout, tie, **chances)


def learner(*cbs, net=None, train=None, valid=None, seed=0, **kwargs):
    "Rows of 4, chunks of 5; the last of an epoch is shorter."
    net = net or small(seed)
    torch.manual_seed(seed)
    dls = train or LMDataset(stream(), 4, 5), valid or LMDataset(stream(70, 1), 4, 6)
    kwargs = dict(opt_func=adamw, lr=.01, metrics=A.Perplexity(), quiet=True, device="cpu") | kwargs
    return Learner(net, dls, kwargs.pop("loss", A.flat_cross_entropy), cbs=[A.CarryState(), *cbs], **kwargs)


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def same(a, b): return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


# --- the cell and its layers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1., 100., 1e4])
def test_a_step_is_pytorchs(size):
    cell = nn.LSTMCell(3, 4).double()
    x, h, c = (size*torch.randn(5, n, dtype=torch.float64) for n in (3, 4, 4))
    for ours, theirs in zip(A.lstm_step(x, h, c, *cell.parameters()), cell(x, (h, c))): test_like(ours, theirs)


def pair(n_layers, both, ni=3, nh=4, dtype=torch.float64):
    theirs = nn.LSTM(ni, nh, n_layers, batch_first=True, bidirectional=both).to(dtype)
    ours = A.LSTM(ni, nh, n_layers, both).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@given(n_layers=ints(1, 3), both=st.booleans(), bs=ints(1, 4), seq=ints(1, 5), with_state=st.booleans())
@settings(max_examples=15)
def test_layers_and_directions_are_pytorchs(n_layers, both, bs, seq, with_state):
    ours, theirs = pair(n_layers, both)
    x = torch.randn(bs, seq, 3, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(2, n_layers*(1 + both), bs, 4, dtype=torch.float64)) if with_state else None
    outs = ours(x, state), theirs(x, state)
    test_like(outs[0][0], outs[1][0])
    test_like([*outs[0][1]], [*outs[1][1]])
    grads = [torch.autograd.grad(y.sin().sum() + h.sum() + c.square().sum(), [x, *m.parameters()])
             for (y, (h, c)), m in zip(outs, (ours, theirs))]
    for a, b in zip(*grads): test_like(a, b)


@given(lengths=st.lists(ints(1, 6), min_size=1, max_size=5), both=st.booleans(), n_layers=ints(1, 2), seed=ints(0, 9))
@settings(max_examples=15)
def test_packed_texts_are_pytorchs(lengths, both, n_layers, seed):
    torch.manual_seed(seed)
    ours, theirs = pair(n_layers, both)
    x = torch.randn(len(lengths), max(lengths), 3, dtype=torch.float64)
    for enforce in (False, *[True]*(lengths == sorted(lengths, reverse=True))):
        packed = pack_padded_sequence(x, torch.tensor(lengths), True, enforce)
        (a, sa), (b, sb) = ours(packed), theirs(packed)
        test_like(a.data, b.data)
        test_like([*sa], [*sb])
        test_like(a.batch_sizes, b.batch_sizes)
        test_like(pad_packed_sequence(a, True)[0], pad_packed_sequence(b, True)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="another device is needed")
def test_packed_texts_on_another_device():
    "PyTorch keeps lengths on the CPU, and the order where the texts are."
    ours, theirs = (m.cuda() for m in pair(2, True))
    packed = pack_padded_sequence(torch.randn(3, 5, 3, dtype=torch.float64).cuda(), torch.tensor([2, 5, 1]), True, False)
    for x in (packed, packed.data[None]): test_like([*ours(x)[1]], [*theirs(x)[1]])
    test_like(ours(packed)[0].data, theirs(packed)[0].data)


def test_names_and_numbers_go_both_ways():
    ours, theirs = pair(2, True, dtype=torch.float32)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    theirs.load_state_dict(A.LSTM(3, 4, 2, True).state_dict())
    torch.manual_seed(0)
    fresh = A.LSTM(3, 16)
    assert all(p.abs().max() <= .25 and p.std() > .1 for p in fresh.parameters())


def test_gradients_by_differences():
    ours = A.LSTM(2, 3, 2, True).double()
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ours(x)[0], x)


# --- five dropouts -------------------------------------------------------------------------------------------------------------

@given(p=st.sampled_from([0., .1, .5, .9]), seed=ints(0, 99))
@settings(max_examples=20)
def test_a_mask_holds_zeros_and_a_factor(p, seed):
    torch.manual_seed(seed)
    mask = A.LockedDropout(p)(torch.ones(50, 1, 40, dtype=torch.float64))
    assert mask.dtype == torch.float64 and mask.shape == (50, 1, 40)
    gone = (mask == 0).double().mean().item()
    assert abs(gone - p) < 6*math.sqrt(p*(1 - p)/2000) + 1e-9
    test_like(mask[mask != 0], torch.full_like(mask[mask != 0], 1/(1 - p)))


@pytest.mark.parametrize("p", [0., .1, .5, .9, .9999])
@pytest.mark.parametrize("shape", [(50, 41), (7,), (3, 1, 5)])
def test_weights_drop_by_their_chance(p, shape):
    torch.manual_seed(1)
    w = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    out, share = A.drop_weights(w, p), min(round(256*p), 255)/256
    assert out.shape == w.shape and set(out.detach().flatten().tolist()) <= {0., 1/(1 - share)}
    gone = (out == 0).double().mean().item()
    assert abs(gone - share) < 6*math.sqrt(share*(1 - share)/w.numel()) + 1e-9 and abs(share - p) <= 1/256
    grad, = torch.autograd.grad((out*torch.arange(w.numel()).view(shape)).sum(), w)
    test_like(grad, out.detach()*torch.arange(w.numel()).view(shape))
    def same_lot(w): torch.manual_seed(2); return A.drop_weights(w, p)
    small = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(same_lot, small) and torch.autograd.gradgradcheck(same_lot, small)


def test_neighbouring_weights_have_lots_of_their_own():
    "Eight come from one draw: no two of them go together."
    torch.manual_seed(0)
    gone = (A.drop_weights(torch.ones(4000, 8), .5) == 0).double()
    assert (torch.corrcoef(gone.T) - torch.eye(8)).abs().max() < .1


def test_locked_means_the_same_at_every_word():
    torch.manual_seed(0)
    drop, x = A.LockedDropout(.5), torch.ones(8, 6, 30)
    out = drop(x)
    assert (out == out[:, :1]).all() and len({tuple(row[0].tolist()) for row in out}) == 8
    assert not torch.equal(out, drop(x)) and drop.eval()(x) is x and A.LockedDropout(0.)(x) is x


def test_words_go_as_a_whole_wherever_they_occur():
    torch.manual_seed(0)
    words = torch.randint(0, 20, (6, 30))
    drop, x = A.EmbeddingDropout(.4), torch.ones(6, 30, 5)
    out, gone = drop(x, words, 20), 0
    for w in words.unique():
        kinds = out[words == w].unique()
        assert len(kinds) == 1
        gone += kinds.item() == 0
    assert 1 < gone < 18 and not torch.equal(out, drop(x, words, 20)) and drop.eval()(x, words, 20) is x


@pytest.mark.parametrize("p", [-.1, 1., 2., float("nan")])
@pytest.mark.parametrize("make", [A.LockedDropout, A.EmbeddingDropout, lambda p: A.WeightDropLSTM(2, 3, p), lambda p: small(embed_p=p),
                                  lambda p: small(input_p=p), lambda p: small(hidden_p=p), lambda p: small(weight_p=p), lambda p: small(output_p=p)])
def test_a_chance_is_from_0_to_below_1(make, p):
    with pytest.raises(ValueError, match="dropout is"): make(p)


def test_weight_drop_is_an_lstm_with_other_weights():
    "One mask for all words; the raw weights learn, where they were there."
    layer, plain = A.WeightDropLSTM(3, 4, .5).double(), nn.LSTM(3, 4, batch_first=True).double()
    x, state = torch.randn(2, 7, 3).double(), tuple(torch.randn(2, 1, 2, 4).double())
    for args in ((x,), (x, state)):
        torch.manual_seed(5)
        y, (h, c) = layer(*args)
        torch.manual_seed(5)
        mask = A.drop_weights(torch.ones_like(layer.weight_hh_l0), .5)
        plain.load_state_dict(layer.state_dict() | {"weight_hh_l0": layer.weight_hh_l0.detach()*mask})
        want, (wh, wc) = plain(*args)
        test_like([y, h, c], [want, wh, wc])
        for m, out in ((layer, y), (plain, want)):
            m.zero_grad()
            out.square().sum().backward()
        test_like(layer.weight_hh_l0.grad, plain.weight_hh_l0.grad*mask)
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"): test_like(getattr(layer, name).grad, getattr(plain, name).grad)


def test_weight_drop_in_evaluation_is_pytorchs():
    layer, x = A.WeightDropLSTM(3, 4, .5), torch.randn(2, 7, 3)
    plain = nn.LSTM(3, 4, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x)[0], layer(x)[0])
    test_like(layer.eval()(x)[0], plain(x)[0])
    test_like(A.WeightDropLSTM(3, 4, 0.)(x)[0].shape, plain(x)[0].shape)
    packed = pack_padded_sequence(x, torch.tensor([7, 3]), True)
    test_like(layer(packed)[0].data, plain(packed)[0].data)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))): test_like(again(x)[0], layer(x)[0])


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 4, 4), (1, 8, 4), (1, 4, 5), (1, 4, 3), (1, 1, 4)])
def test_what_does_not_fit_is_refused_in_training_too(shape):
    "torch.lstm itself would read beside its tensors."
    layer, x = A.WeightDropLSTM(3, 4, .5), torch.randn(4, 5, 3)
    for mode in (True, False):
        layer.train(mode)
        with pytest.raises(RuntimeError, match="hidden"): layer(x, (torch.ones(shape), torch.ones(1, 4, 4)))
        with pytest.raises(RuntimeError, match="hidden"): layer(x, (torch.ones(1, 4, 4), torch.ones(shape)))
        for width in (2, 5):
            with pytest.raises(RuntimeError, match="input"): layer(torch.randn(4, 5, width))
    layer.train()
    with pytest.raises(RuntimeError, match="3 dimensions|3-D"): layer(x[0])
    with pytest.raises(TypeError, match="packed"): layer(pack_padded_sequence(x, torch.tensor([5, 4, 3, 3]), True))
    with pytest.raises(RuntimeError, match="hidden"): small()(stream(20).view(4, 5), small().start(1))


# --- the encoder ---------------------------------------------------------------------------------------------------------------

@given(cuts=st.lists(ints(1, 4), min_size=1, max_size=6), n_layers=ints(1, 3), seed=ints(0, 9))
@settings(max_examples=15)
def test_chunks_are_the_text(cuts, n_layers, seed):
    "A chunk of one included."
    model = small(seed, n_layers=n_layers).double().eval()
    words = torch.randint(2, N, (3, sum(cuts)), generator=torch.Generator().manual_seed(seed))
    state, parts = model.start(3), []
    for chunk in words.split(cuts, 1):
        scores, state = model(chunk, state)
        parts.append(scores)
    test_like(torch.cat(parts, 1), model(words))
    test_like([t for layer in state for t in layer], [t for layer in model.encoder(words)[1] for t in layer])


@given(lengths=st.lists(ints(1, 7), min_size=1, max_size=5), seed=ints(0, 9))
@settings(max_examples=15)
def test_a_padded_text_is_the_text_alone(lengths, seed):
    model = small(seed).double().eval()
    g = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, N, (n,), generator=g) for n in lengths]
    batch = nn.utils.rnn.pad_sequence(texts, True, PAD_ID)
    outputs = model.encoder(batch)[0]
    for text, out in zip(texts, outputs): test_like(out[:len(text)], model.encoder(text[None])[0][0])


def test_evaluation_is_deterministic_and_training_is_not():
    model, words = small(), stream(20).view(2, 10)
    assert not torch.equal(model(words), model(words))
    model.eval()
    before = torch.get_rng_state()
    assert torch.equal(model(words), model(words)) and torch.equal(torch.get_rng_state(), before)


def test_sizes_of_layers():
    for n in (1, 2, 4):
        sizes = [(m.input_size, m.hidden_size) for m in A.AWDLSTM(N, 6, 8, n).layers]
        assert sizes == [(a, b) for a, b in zip([6, *[8]*(n - 1)], [*[8]*(n - 1), 6])]
    with pytest.raises(ValueError, match="n_layers"): A.AWDLSTM(N, 6, 8, 0)
    model = A.AWDLSTM(N, 6, 8)
    assert model.embedding.weight.abs().max() <= .1 and (model.embedding.weight == 0).all(1).nonzero().tolist() == [[PAD_ID]]
    state = model.start(2)
    for other in (state[:2], [*state, state[-1]]):
        with pytest.raises(ValueError, match="shorter|longer"): model(stream(6).view(2, 3), other)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("opt", [partial(adamw, weight_decay=.1), partial(SGD, lr=1.), torch.optim.Adam])
def test_paddings_row_stays_zero(tie, opt):
    "Also as the decoder's row, and with padding in the batch."
    model = small(tie=tie).train()
    model.bias.data[PAD_ID] = 0.                # what decay would make of any number that is stored there
    optimizer = opt(model.parameters())
    words = stream(40).view(4, 10)
    words[1, 6:] = PAD_ID
    moved = copy.deepcopy(model.state_dict())
    for _ in range(20):
        targets = words.roll(-1, 1)
        F.cross_entropy(model(words).flatten(0, 1), targets.flatten(), ignore_index=PAD_ID).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not model.encoder.embedding.weight[PAD_ID].any()
    assert model.bias[PAD_ID] == 0 and model(words).softmax(-1)[..., PAD_ID].max() == 0
    rest = [i for i in range(2, N)]
    if tie: assert (model.encoder.embedding.weight[rest] != moved["encoder.embedding.weight"][rest]).any(1).all()


# --- ties and vocabularies -----------------------------------------------------------------------------------------------------

def is_tied(model):
    "Does the embedding decode?"
    model = copy.deepcopy(model).eval()
    words = torch.tensor([[2, 3]])
    out = model.encoder(words)[0]
    with torch.no_grad(): model.encoder.embedding.weight[5] = 3.       # not among the words read
    return torch.allclose(model(words)[..., 5], out.sum(-1)*3 + model.bias[5], atol=1e-5)


def test_a_tie_cannot_break(tmp_path):
    learn = learner(EMA(.5))
    learn.fit(1)
    learn.save(tmp_path/"x.pt")
    other = learner(EMA(.5), seed=3)
    other.load(tmp_path/"x.pt")
    copies = [learn.model, other.model, copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model)), copy.deepcopy(learn.model).double().float()]
    for model in copies:
        assert is_tied(model) and "weight" not in model.state_dict()
        assert sum(p.shape == model.encoder.embedding.weight.shape for p in model.parameters()) == 1
    assert not is_tied(small(tie=False))
    assert same(weights(learn), weights(other))


def test_weights_of_other_words_are_refused(tmp_path):
    "Also of as many words; and the state passes through everything that a state passes through."
    learn, other = learner(), learner(net=A.language_model(Vocab.of(["<unk>", "<pad>", *"bacdefghijklmnopqr"]), 6, 8, 2))
    learn.save(tmp_path/"x.pt")
    with pytest.raises(ValueError, match="another vocabulary"): other.load(tmp_path/"x.pt")
    with pytest.raises(ValueError, match="another vocabulary"): nn.Sequential(other.model).load_state_dict(nn.Sequential(learn.model).state_dict())
    for state in (copy.deepcopy(learn.model.state_dict()), pickle.loads(pickle.dumps(learn.model.state_dict()))): small(3).load_state_dict(state)
    with pytest.raises(ValueError, match="another vocabulary"): learn.model.load_state_dict(A.language_model(Vocab.of(["<unk>", "<pad>", *"rqponmlkjihgfedcba"]), 6, 8, 2).state_dict())


def test_what_a_language_model_refuses():
    with pytest.raises(ValueError, match="20 .* 7|embedding 7"): A.LanguageModel(A.AWDLSTM(7, 4, 4), WORDS)
    with pytest.raises(ValueError, match="no dropout"): A.language_model(WORDS, 4, 4, hiden_p=.1)


def test_one_factor_scales_all_five():
    model = A.language_model(WORDS, 4, 4, 3, dropout=.5, input_p=.2)
    assert (model.encoder.embed_drop.p, model.encoder.input_drop.p, model.output_drop.p) == (.05, .1, .2)
    assert {d.p for d in model.encoder.hidden_drops} == {.1} and {m.p for m in model.encoder.layers} == {.25}
    assert len(model.encoder.hidden_drops) == 2


@pytest.mark.parametrize("tie", [True, False])
def test_groups_are_a_partition(tie):
    learn = learner(net=small(tie=tie), splitter=A.language_model_groups, lr=None)
    assert len(learn.groups) == 2 + 1 + (not tie)
    learn.freeze_to(-1)
    free = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    assert free == ({"encoder.embedding.weight", "bias"} if tie else {"weight", "bias"})


# --- the state belongs to a pass -----------------------------------------------------------------------------------------------

def test_validation_reads_one_text():
    "Perplexity over uneven chunks is that of the rows as a whole."
    learn = learner()
    xs, ys = zip(*learn.dls.valid)
    assert len({x.shape[1] for x in xs}) == 2
    with torch.no_grad(): scores = learn.model.eval()(torch.cat(xs, 1))
    want = A.flat_cross_entropy(scores, torch.cat(ys, 1)).item()
    row = learn.validate()
    test_like(row["valid_loss"], want, rtol=1e-5)
    test_like(row["perplexity"], math.exp(want), rtol=1e-5)
    assert learn.validate() == row
    test_like(learn.predict(xs[0]), scores[:, :6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_backward", "before_step", "after_batch"])
def test_another_pass_leaves_no_trace(event):
    plain = learner(A.ActivityPenalty())
    plain.fit(2)
    def both(learn): learn.validate(); learn.predict(stream(12).view(2, 6))
    for cb in (At(event, both, n=3), At(event, lambda learn: A.generate(learn, ["a", "b"], 3, generator=torch.Generator()), n=3)):
        watched = learner(A.ActivityPenalty(), cb)
        watched.fit(2)
        assert same(weights(plain), weights(watched))
        assert [r["valid_loss"] for r in plain.history] == [r["valid_loss"] for r in watched.history]


class Spy(Callback):
    "What goes in as state: whether all is zero."
    order = 80
    def __init__(self): self.zero, self.weights = [], []
    def before_batch(self, learn):
        parts = [t for layer in learn.xb[1] for t in layer]
        assert not any(t.requires_grad for t in parts)
        self.zero.append(not any(t.any() for t in parts))
        self.weights.append(learn.weight)


def test_each_pass_begins_anew_and_words_are_the_weight():
    spy = Spy()
    learner(spy).fit(2)
    n, m = len(LMDataset(stream(), 4, 5)), len(LMDataset(stream(70, 1), 4, 6))
    assert spy.zero == ([True] + [False]*(n - 1) + [True] + [False]*(m - 1))*2
    assert sum(spy.weights[:n]) == 4*(149//4) and spy.weights[0] == 20


def test_a_cancelled_batch_keeps_the_state():
    spy = Spy()
    def cancel(learn): raise CancelBatch
    learn = learner(spy, At("after_pred", cancel, n=0, order=99))
    learn.fit(1)
    assert spy.zero[:3] == [True, False, False]


def test_rows_must_stay():
    batches = [(x, x) for x in (torch.full((4, 3), 2), torch.full((3, 3), 2))]
    with pytest.raises(ValueError, match="3 rows after 4"): learner(train=batches).fit(1)


def test_a_resumed_run_is_the_same_run(tmp_path):
    "Dropout, lengths and states included."
    def fresh():
        g = torch.Generator().manual_seed(4)
        return learner(GradientClip(.5), A.ActivityPenalty(), A.RateByLength(6), EMA(.9), train=LMDataset(stream(300), 4, 6, vary=True, generator=g))
    whole = fresh()
    whole.fit(3, cbs=SaveCheckpoint(tmp_path/"a"))
    first = fresh()
    def stop(learn):
        if learn.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): first.fit(3, cbs=[SaveCheckpoint(tmp_path/"b"), At("before_pass", stop, n=1)])
    second = fresh()
    second.fit(3, cbs=SaveCheckpoint(tmp_path/"b"), resume=tmp_path/"b"/"last.pt")
    assert same(weights(whole), weights(second))
    assert [r["perplexity"] for r in whole.history] == [r["perplexity"] for r in second.history]


def test_it_lives_with_the_rest_of_the_kit():
    learn = learner(TerminateOnNaN(), Recorder(), GradientAccumulation(2), GradientClip(1.), A.ActivityPenalty())
    learn.fit(2, cbs=one_cycle(.02))
    assert learn.history[-1]["valid_loss"] < math.log(N)*1.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lr_find(learn)
    again = copy.deepcopy(learn)
    again.fit(1)


def test_accumulation_counts_words():
    "Two chunks at a time: the gradient is that of the mean over their words."
    net = small(dropout=0.).double()
    data = LMDataset(stream(4*8 + 1), 4, 5)                     # chunks of 5 and 3
    learn = learner(GradientAccumulation(2), net=net, train=data, opt_func=SGD, lr=1.)
    before = copy.deepcopy(net)
    learn.fit(1)
    xs, ys = zip(*data)
    state, total = before.start(4), 0.
    for x, y in zip(xs, ys):
        scores, state = before(x, [(h.detach(), c.detach()) for h, c in state])
        total = total + F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum")
    (total/32).backward()
    for p, q in zip(net.parameters(), before.parameters()): test_like(p.data, (q - q.grad).detach(), rtol=1e-5, atol=1e-6)


def test_perplexity_counts_the_targets_that_there_are():
    metric, scores, ys = A.Perplexity(), torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    ys[0, 1:] = ys[2] = -100
    for row in range(3): metric.add(scores[row:row + 1], ys[row:row + 1], 4)
    test_like(metric.value(), math.exp(A.flat_cross_entropy(scores, ys).item()), rtol=1e-5)


# --- the loss, and what is added to it -----------------------------------------------------------------------------------------

def test_perplexity_sums_over_processes():
    metric, parts = A.Perplexity(), []
    scores, ys = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    for rows in ([0], [1, 2]):
        part = A.Perplexity()
        part.add(scores[rows], ys[rows], 4*len(rows))
        parts.append(part.state())
    metric.load_state(parts[0] + parts[1])
    test_like(metric.value(), math.exp(F.cross_entropy(scores.transpose(1, 2), ys).item()), rtol=1e-5)
    metric.reset()
    metric.add(scores*1e5, ys, 12)
    assert math.isfinite(metric.value()) and metric.lower_is_better
    test_like(A.flat_cross_entropy(scores.bfloat16(), ys).dtype == torch.float32, True)


def test_ar_and_tar_are_what_the_paper_says():
    seen = []
    class Watch(Callback):
        order = 99
        def after_loss(self, learn):
            if learn.training: seen.append((learn.loss.item(), learn.loss_for_grad.item(), *learn.scratch["outputs"]))
            else: assert learn.loss_for_grad is learn.loss
    learn = learner(A.ActivityPenalty(3., 5.), Watch())
    learn.fit(1)
    for loss, for_grad, raw, dropped in seen:
        want = loss + 3*dropped.square().mean().item() + 5*(raw[:, 1:] - raw[:, :-1]).square().mean().item()
        test_like(for_grad, want, rtol=1e-5)
        assert (dropped == 0).any()
    assert not learn.model.output_drop._forward_hooks


def test_penalties_of_half_precision_are_finite():
    "Their mean, times the scale of the loss, is beyond float16 on the way back."
    raw = (.05*torch.randn(32, 35, 40)).half().requires_grad_()
    grads = []
    for x in (raw, raw.detach().float().requires_grad_()):
        learn = SimpleNamespace(training=True, scratch={"outputs": (x, 1*x)}, loss_for_grad=torch.ones(()))
        A.ActivityPenalty().after_loss(learn)
        assert learn.loss_for_grad.dtype == torch.float32
        grads.append(torch.autograd.grad(learn.loss_for_grad*2.**17, x)[0].float())
    test_like(*grads, rtol=1e-2, atol=1e-2)


def test_a_chunk_of_one_has_no_jump():
    learn = learner(A.ActivityPenalty(1., 100.), TerminateOnNaN(), train=LMDataset(stream(40), 4, 1))
    learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_the_last_window_of_a_pass_has_the_rate_of_its_length():
    "GradientAccumulation steps with what is left after the last batch."
    rates = []
    class Watch(Callback):
        def before_step(self, learn): rates.append(learn.groups[0]["lr"])
    learn = learner(A.RateByLength(5), GradientAccumulation(3), Watch(), train=LMDataset(stream(89), 4, 5), lr=.01)
    learn.fit(1)
    assert len(rates) == 2 and learn.groups[0]["lr"] == .01
    test_like(rates, [.01, .01*2/5], rtol=1e-9)


def test_a_rate_changed_by_others_stays_changed():
    rates = []
    class Halve(Callback):
        def before_step(self, learn): rates.append(learn.groups[0]["lr"])
        def after_step(self, learn): learn.set_lr(learn.groups[0]["lr"]/2)
    learner(A.RateByLength(10), Halve(), lr=.02, train=LMDataset(stream(64), 4, 5)).fit(1)
    test_like(rates, [.01/2**i for i in range(3)], rtol=1e-9)


@pytest.mark.parametrize("tie", [True, False])
def test_label_smoothing_leaves_padding_out(tie):
    "Its row stays 0, and a loss that smooths is near one that does not."
    smooth = LabelSmoothingCrossEntropy()
    learn = learner(net=small(tie=tie), loss=lambda p, y: smooth(p.flatten(0, 1), y.flatten()))
    learn.fit(3)
    assert not learn.model.encoder.embedding.weight[PAD_ID].any()
    gap = learn.history[-1]["valid_loss"] - math.log(learn.history[-1]["perplexity"])
    assert gap < .1*200/N + .2


@pytest.mark.parametrize("tie", [True, False])
def test_a_refused_load_changes_nothing(tmp_path, tie):
    learn = learner(net=small(tie=tie))
    learn.fit(1, cbs=SaveCheckpoint(tmp_path))
    words = Vocab.of(["<unk>", "<pad>", *"rqponmlkjihgfedcba"])
    torch.manual_seed(1)
    other = learner(EMA(.9), net=A.language_model(words, 6, 8, 2, 1., tie))
    other.fit(1)
    before, state = copy.deepcopy(other.model.state_dict()), copy.deepcopy(other.opt.state_dict())
    with pytest.raises(ValueError, match="another vocabulary"): other.load(tmp_path/"last.pt")
    assert all(torch.equal(p, q) for p, q in zip(before.values(), other.model.state_dict().values()))
    assert str(state) == str(other.opt.state_dict())


def test_a_rate_by_length():
    rates = []
    class Watch(Callback):
        def before_step(self, learn): rates.append((learn.groups[0]["lr"], learn.xb[0].shape[1]))
    def cancel(learn): raise CancelBatch
    learn = learner(A.RateByLength(10), Watch(), At("after_pred", cancel, n=1), lr=.02,
                    train=LMDataset(stream(170), 4, 6, vary=True, generator=torch.Generator().manual_seed(0)))
    learn.fit(1)
    assert len({n for _, n in rates}) > 1
    for rate, n in rates: test_like(rate, .02*n/10, rtol=1e-9)
    assert learn.groups[0]["lr"] == .02
    rates.clear()
    learn = learner(A.RateByLength(5), Watch(), lr=.02)
    learn.fit(1, cbs=one_cycle(.02))
    plain = []
    class Plain(Callback):
        def before_step(self, learn): plain.append(learn.groups[0]["lr"])
    learner(Plain(), lr=.02).fit(1, cbs=one_cycle(.02))
    for (rate, n), p in zip(rates, plain, strict=True): test_like(rate, p*n/5, rtol=1e-9)


def test_half_precision():
    try:
        with torch.autocast("cpu", torch.bfloat16): nn.LSTM(6, 8)(torch.rand(3, 2, 6))
    except RuntimeError: pytest.skip("PyTorch's own LSTM does not read bfloat16 on this processor")
    model, words = small(), stream(20).view(2, 10)
    with torch.autocast("cpu", torch.bfloat16):
        scores, state = model(words, model.start(2))
        scores, state = model(words, state)
        loss = A.flat_cross_entropy(scores, words)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


# --- counting ------------------------------------------------------------------------------------------------------------------

def brute(ids, n_words, order):
    "Kneser–Ney by its definition, with dictionaries."
    tables, grams = [], Counter(tuple(ids[i:i + order]) for i in range(len(ids) - order + 1))
    for _ in range(order):
        tables.append(grams)
        grams = Counter({g: 1 for g in grams})
        shorter = Counter()
        for g in tables[-1]: shorter[g[1:]] += 1
        grams = shorter
    def p(words, level=0):
        if level == order: return 1/n_words
        grams, history = tables[level], tuple(words[:-1])
        total = sum(c for g, c in grams.items() if g[:-1] == history)
        shorter = p(words[1:] if len(words) > 1 else words, level + 1)
        if not total: return shorter
        ones, twos = (sum(c == k for c in grams.values()) for k in (1, 2))
        d = ones/(ones + 2*twos) if ones else .5
        kinds = sum(g[:-1] == history for g in grams)
        return (max(grams[tuple(words)] - d, 0) + d*kinds*shorter)/total
    return p


@given(ids=st.lists(ints(0, 4), min_size=3, max_size=30), order=ints(1, 3), seed=ints(0, 9))
@settings(max_examples=30)
def test_counts_by_brute_force(ids, order, seed):
    model, slow = A.KneserNey(torch.tensor(ids), 6, order), brute(ids, 6, order)
    rows = torch.randint(0, 6, (12, order), generator=torch.Generator().manual_seed(seed))
    test_like(model(rows), torch.tensor([slow(row) for row in rows.tolist()], dtype=torch.float64))


@given(ids=st.lists(ints(0, 7), min_size=4, max_size=60), order=ints(1, 4), history=st.lists(ints(0, 8), min_size=3, max_size=3))
def test_probabilities_sum_to_one(ids, order, history):
    model = A.KneserNey(torch.tensor(ids), 9, order)
    rows = torch.tensor([[*history[:order - 1], w] for w in range(9)])
    p = model(rows)
    assert (p > 0).all()
    test_like(p.sum().item(), 1., rtol=1e-9)


def test_a_text_is_its_words():
    ids = stream(60)
    for order in (1, 2, 3, 4):
        model, log_p = A.KneserNey(ids, N, order), None
        log_p = model.log_probs(ids)
        assert log_p.shape == (59,) and log_p.dtype == torch.float64
        rows = ids.unfold(0, order, 1)
        test_like(log_p[max(0, order - 2):], model(rows).log()[order == 1:])
    known = A.KneserNey(ids, N).log_probs(ids).mean()
    assert known > A.KneserNey(ids, N).log_probs(stream(60, 5)).mean() + .5


def test_what_counting_refuses():
    for ids, n, order in ((stream(5), N, 6), (stream(5), N, 0), (stream(50), 100_000, 4)):
        with pytest.raises(ValueError, match="order"): A.KneserNey(ids, n, order)
    with pytest.raises(ValueError, match="from 0 to below n_words, 20"): A.KneserNey(torch.tensor([2, 3, N, 4]), N, 2)
    model = A.KneserNey(stream(), N, 2)
    for rows in ([[2, N]], [[-1, 3]], [[2, 3, 4]], [[2]]):
        with pytest.raises(ValueError, match="they have 2 ids from 0"): model(torch.tensor(rows))
    with pytest.raises(ValueError, match="they have 2 ids"): model.log_probs(torch.tensor([2, 3, N]))
    assert A.KneserNey(torch.zeros(4, dtype=torch.int64), 33_278, 3)(torch.zeros(1, 3, dtype=torch.int64)).item() > .3


# --- writing -------------------------------------------------------------------------------------------------------------------

@given(scores=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), temperature=st.sampled_from([0., .3, 1., 2.]),
       top_k=st.one_of(st.none(), ints(1, 14)), top_p=st.sampled_from([.01, .5, .9, 1.]))
def test_what_is_kept(scores, temperature, top_k, top_p):
    scores = torch.tensor(scores)
    p = A.next_word_probs(scores, temperature, top_k, top_p)
    test_like(p.sum().item(), 1., rtol=1e-5)
    kept = p > 0
    full = F.softmax(scores/temperature, 0) if temperature else None
    if temperature == 0: assert kept.sum() == 1 and scores[p.argmax()] == scores.max(); return
    assert 1 <= kept.sum() <= (top_k or 99) and full[kept].min() >= full[~kept].max() - 1e-6 if (~kept).any() else True
    test_like(p[kept], full[kept]/full[kept].sum(), rtol=1e-4, atol=1e-6)
    if top_k is None and top_p < 1: assert full[kept].sum() >= top_p - 1e-5 and full[kept].sum() - full[kept].min() < top_p + 1e-5
    if top_k is None and top_p == 1: test_like(p, full, rtol=1e-4, atol=1e-7)


def test_rows_are_drawn_alike():
    scores = torch.randn(2, 3, 9)
    p = A.next_word_probs(scores.bfloat16(), .7, 4, .8)
    assert p.shape == scores.shape and p.dtype == torch.float32
    test_like(p[1, 2], A.next_word_probs(scores[1, 2].bfloat16(), .7, 4, .8))
    for bad in (dict(temperature=-1.), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0.), dict(top_p=1.1)):
        with pytest.raises(ValueError, match="temperature"): A.next_word_probs(scores, **bad)


def test_all_of_it_is_all_and_the_likeliest_is_the_likeliest():
    torch.manual_seed(0)
    scores = 3*torch.randn(30_000)
    test_like((A.next_word_probs(scores) > 0).sum(), (scores.softmax(0) > 0).sum())      # sums of many reach 1 early
    close = torch.tensor([0., 1., 1 + 2.**-23, -500.])                                   # one softmax for two scores
    for temperature in (0., 1e-40): assert A.next_word_probs(close, temperature)[2] == 1


def test_generate_gives_tokens():
    "As drawn: readable text may be split otherwise."
    words = Vocab.of(["<unk>", "<pad>", *"it 's ( of ) , - <cap>".split()])
    learn = Learner(A.language_model(words, 4, 4, 1), None, A.flat_cross_entropy, quiet=True, device="cpu")
    def write(**kwargs): return A.generate(learn, ["it", "'s"], 30, generator=torch.Generator().manual_seed(1), **kwargs)
    tokens = write(as_tokens=True)
    assert tokens[:2] == ["it", "'s"] and len(tokens) == 32 and {*tokens} <= {*words.tokens}
    assert words.text(words.encode(tokens)) == write()
    for bad in ([2, 3], torch.tensor([2, 3])):
        with pytest.raises(TypeError, match="no token"): A.generate(learn, bad, 3)


def test_generate_reads_what_it_writes():
    "Greedy, against a model that reads all from the beginning each time."
    learn = learner()
    learn.fit(2)
    learn.model.train()
    learn.model.encoder.layers[0].eval()
    modes = [m.training for m in learn.model.modules()]
    text = A.generate(learn, ["a", "c", "b"], 8, temperature=0)
    assert [m.training for m in learn.model.modules()] == modes
    words, model = WORDS.encode(["a", "c", "b"]), copy.deepcopy(learn.model).eval()
    for _ in range(8):
        scores = model(words[None])[0, -1].detach()
        scores[UNKNOWN_ID] = -math.inf
        words = torch.cat([words, scores.argmax()[None]])
    assert text == WORDS.text(words)
    assert text == A.generate(learn, ["a", "c", "b"], 8, top_k=1) and A.generate(learn, ["a"], 0) == "a"


def test_generate_draws_by_its_generator():
    learn = learner()
    def write(seed): return A.generate(learn, "a b", 20, generator=torch.Generator().manual_seed(seed))
    assert write(1) == write(1) != write(2) and "<unk>" not in write(1).replace("<unk>", "", 1)
    state = torch.get_rng_state()
    write(1)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="nothing to go on from"): A.generate(learn, [], 3)


def test_generate_uses_the_average():
    ema = EMA(.9)
    learn = learner(ema, lr=.1)
    learn.fit(4)
    def write(learn): return A.generate(learn, ["a"], 40, generator=torch.Generator().manual_seed(0))
    def alone(model): return Learner(model, None, A.flat_cross_entropy, quiet=True, device="cpu")
    averaged = copy.deepcopy(learn.model)
    averaged.load_state_dict(averaged.state_dict() | ema.average)
    assert write(learn) == write(alone(averaged)) != write(alone(learn.model))


# --- exercises -----------------------------------------------------------------------------------------------------------------

def refused(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


def gru(x, h, w_ih, w_hh, b_ih, b_hh, swap=False, before=False):
    nh = h.shape[1]
    a, b = x@w_ih.T + b_ih, h@w_hh.T + b_hh
    r, z = (a + b)[:, :nh].sigmoid(), (a + b)[:, nh:2*nh].sigmoid()
    n = torch.tanh(a[:, 2*nh:] + (((r*h)@w_hh[2*nh:].T + b_hh[2*nh:]) if before else r*b[:, 2*nh:]))
    return z*n + (1 - z)*h if swap else n + z*(h - n)


def test_the_gru_checker():
    E.check_gru_step(gru)
    refused(E.check_gru_step, partial(gru, swap=True), "old")
    refused(E.check_gru_step, partial(gru, before=True), "off")
    refused(E.check_gru_step, lambda *a: gru(*a).detach(), "gradients")
    refused(E.check_gru_step, lambda x, h, *w: h.mul_(0), "changed|off")


def test_the_cache_checker():
    def right(h, past, words, n, theta):
        z = theta*(past*h).sum(1)
        e = (z - z.max()).exp()
        return torch.stack([e[words == w].sum() for w in range(n)])/e.sum()
    E.check_cache_probs(right)
    def single(h, past, words, n, theta): return torch.zeros(n).index_add(0, words, F.softmax(theta*(past@h), 0))
    E.check_cache_probs(single)                                  # of a right answer, the dtype is its own
    def overflow(h, past, words, n, theta): e = (theta*(past@h)).float().exp(); return torch.stack([e[words == w].sum() for w in range(n)])/e.sum()
    refused(E.check_cache_probs, overflow, "finite|large")
    def overwrites(h, past, words, n, theta): out = torch.zeros(n); out[words] = F.softmax(theta*(past@h), 0); return out
    refused(E.check_cache_probs, overwrites, "sum")
    refused(E.check_cache_probs, lambda h, past, words, n, theta: right(h, past, words, n, 2*theta), "softmax")


def test_the_zoneout_checker():
    def right(new, old, p, training):
        if not training: return torch.lerp(new, old, p)
        keep = torch.empty_like(new).bernoulli_(p).bool()
        return old*keep + new*~keep
    E.check_zoneout(right)
    refused(E.check_zoneout, lambda new, old, p, training: right(new, old, 1 - p, training), "evaluation")
    refused(E.check_zoneout, lambda new, old, p, training: right(new, old, p, False), "neither|either|unscaled")
    def rows(new, old, p, training):
        if not training: return right(new, old, p, False)
        return torch.where(torch.rand(len(new), 1) < p, old, new)
    refused(E.check_zoneout, rows, "lot|stayed")
    def cut(new, old, p, training): return right(new.detach() if training else new, old, p, training)
    refused(E.check_zoneout, cut, "training = True.*gradient")
    refused(E.check_zoneout, lambda new, old, p, training: right(new, old.detach(), p, training), "gradient")


def test_the_zoneout_checker_does_not_go_by_luck():
    "At p = .2, a row of fifty may well keep none: a right answer."
    def lots(seed, p): return torch.rand(200, 50, generator=torch.Generator().manual_seed(seed)) < p
    unlucky = next(seed for seed in range(9999) if (~lots(seed, .2)).all(1).any())
    def right(new, old, p, training):
        if not training: return p*old + (1 - p)*new
        return torch.where(lots(unlucky, p)[:new.shape[0], :new.shape[1]], old, new)
    E.check_zoneout(right)
    said = set()
    for seed in range(3):
        torch.manual_seed(seed)
        E.check_zoneout(lambda new, old, p, training: said.add(torch.initial_seed()) or right(new, old, p, training))
    assert len(said) == 1


def test_the_other_checkers():
    E.check_predictions(dict(weights=144, surprise=4, left=.366, spared=8.47e-22, discount=.5))
    refused(E.check_predictions, dict(weights=144, surprise=4, left=.366, spared=.5, discount=.5), "half")
    refused(E.check_predictions, dict(weights=128, surprise=4, left=.366, spared=8.47e-22, discount=.5), "biases")
    E.check_bits_per_character(lambda p, w, c: torch.tensor(math.log2(p)*w/c, dtype=torch.float64))
    refused(E.check_bits_per_character, lambda p, w, c: math.log(p)*w/c, "nats")
    refused(E.check_bits_per_character, lambda p, w, c: math.log2(p)*c/w, "costs")
