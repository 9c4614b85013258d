"A language model becomes a classifier: vocabularies matched, pooling without padding, slow thawing, reasons in words, a predictor on disk."
import copy
import json
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.request import Request, urlopen

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import At, equal, history
from torch import nn

from exp import interpret as I
from exp import ulmfit as U
from exp.awd_lstm import AWDLSTM, CarryState, LanguageModel, flat_cross_entropy, language_model
from exp.callbacks import EMA, GradientClip
from exp.checkpoints import SaveCheckpoint
from exp.data import DataBlock, MultiCategorize, func_splitter, get_files, parent_label
from exp.exercises import ulmfit as E
from exp.learner import CancelFit, Learner
from exp.optim import adamw
from exp.setup import set_seed
from exp.testing import test_like
from exp.text import PAD_ID, LMDataset, Numericalize, TokenCache, Vocab, open_text, pad_collate, tokenize
from exp.training import cross_entropy

ints = st.integers
WORDS = Vocab.of(["<unk>", "<pad>", "<begin>", *"abcdefghijklmnopq"])
N = len(WORDS)


def encoder(seed=0, n_words=N, emb=6, nh=8, n_layers=2, **chances):
    torch.manual_seed(seed)
    return AWDLSTM(n_words, emb, nh, n_layers, **chances)


def classifier(seed=0, n_classes=3, **reading):
    model = U.text_classifier(encoder(seed), n_classes, hidden=5, **{"chunk": 4} | reading)
    torch.manual_seed(seed + 1)
    for p in model.parameters(): nn.init.normal_(p, std=.5)
    return model


def texts(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, N, (n,), generator=g) for n in lengths]


def batch(rows): return pad_collate([(row, 0) for row in rows])[0]


# --- WikiText by our rules -----------------------------------------------------------------------------------------------------

WIKI = """ \n = First Title = \n \n The game 's role @-@ playing cost 1 @,@ 000 @.@ 5 <unk> ; it didn 't sell . \n
 = = A part = = \n \n He said " No " . \n \n = Second : One = \n \n NASA has <unk> . \n"""


def test_wikitext_becomes_our_tokens(tmp_path):
    (tmp_path/"w.txt").write_text(WIKI, "utf-8")
    first, second = U.read_wikitext(tmp_path/"w.txt")
    assert " ".join(first) == ("<begin> <cap> first <cap> title <line> <cap> the game 's role - playing cost 1,000.5 <unk> ; it didn 't sell . <line> "
                               '<cap> a part <line> <cap> he said " <cap> no " .')
    assert " ".join(second) == "<begin> <cap> second : <cap> one <line> <up> nasa has <unk> ."
    assert first == [*tokenize("First Title\n\nThe game's role-playing cost 1,000.5 ~ ; it didn't sell .\n\nA part\n\nHe said \" No \" .")[:13],
                     *first[13:]], "the same as of plain text"


@pytest.mark.parametrize("unknown", ["Qzq", "Éa"])
def test_an_unknown_word_is_split_as_any_other(tmp_path, unknown):
    "What follows it, and lines as Windows ends them."
    wiki = " \n = A Title = \n \n Its <unk> 's film and <unk> @-@ like <unk> , said <unk> . \n"
    plain = f"A Title\n\nIts {unknown}'s film and {unknown}-like {unknown}, said {unknown}."
    want = [["<unk>"] if token == unknown.lower() else [] if after == unknown.lower() and token == "<cap>" else [token]
            for token, after in zip(tokenize(plain), [*tokenize(plain)[1:], ""])]
    for ends in ("\n", "\r\n"):
        (tmp_path/"w.txt").write_bytes(wiki.replace("\n", ends).encode())
        assert U.read_wikitext(tmp_path/"w.txt") == [sum(want, [])]


def test_wikitext_errors_name_the_file(tmp_path):
    (tmp_path/"w.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="w.txt"): U.read_wikitext(tmp_path/"w.txt")


# --- vocabularies --------------------------------------------------------------------------------------------------------------

@given(rows=st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), unique=True, min_size=1), wide=st.booleans())
@settings(max_examples=30)
def test_known_words_keep_their_rows_and_new_ones_get_the_mean(rows, wide):
    weight = torch.randn(N, 3, dtype=torch.float64) if wide else torch.randn(N, dtype=torch.float64)
    weight[PAD_ID] = 0
    before, new = weight.clone(), Vocab.of(["<unk>", "<pad>", *rows])
    got = U.match_embeddings(weight, WORDS, new)
    assert torch.equal(weight, before) and got.shape == (len(new), *weight.shape[1:]) and got.dtype == weight.dtype
    mean = torch.cat([weight[:PAD_ID], weight[PAD_ID + 1:]]).mean(0)
    for word, row in zip(new.tokens, got): test_like(row, weight[WORDS.index[word]] if word in WORDS.index else mean)
    assert not got[PAD_ID].any()


def test_matching_needs_the_vocabulary_of_the_rows():
    with pytest.raises(ValueError, match="19 rows for 20 words: give the vocabulary"): U.match_embeddings(torch.zeros(19, 2), WORDS, WORDS)


def is_tied(model):
    "Does the embedding decode?"
    model, words = copy.deepcopy(model).eval(), torch.tensor([[2, 3]])
    out = model.encoder(words)[0]
    with torch.no_grad(): model.encoder.embedding.weight[5] = 3.
    return torch.allclose(model(words)[..., 5], out.sum(-1)*3 + model.bias[5], atol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_a_language_model_goes_on_with_other_words(tie):
    torch.manual_seed(0)
    model = language_model(WORDS, 6, 8, 2, tie=tie)
    nn.init.normal_(model.bias)
    model.encoder.layers[0].weight_hh_l0.requires_grad_(False)
    before, other = copy.deepcopy(model.state_dict()), Vocab.of(["<unk>", "<pad>", "<begin>", *"qponm", "new"])
    model.eval()
    new = U.change_vocab(model, other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values())) and model.vocab is WORDS, "the old one stays"
    assert new.vocab is other and not new.training and len(new.bias) == len(other) and is_tied(new) == tie
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in model.parameters()]
    for name in ("encoder.embedding.weight", "bias", *["weight"]*(not tie)):
        now, old = new.state_dict()[name], before[name]
        test_like(now[other.index["q"]], old[WORDS.index["q"]])
        test_like(now[other.index["new"]], torch.cat([old[:1], old[2:]]).mean(0))
    words = torch.tensor([[WORDS.index[w] for w in "mnq"]])
    test_like(new(torch.tensor([[other.index[w] for w in "mnq"]]))[..., other.index["o"]], model(words)[..., WORDS.index["o"]])
    again = language_model(other, 6, 8, 2, tie=tie)
    again.load_state_dict(new.state_dict())
    for copied in (again, copy.deepcopy(new), pickle.loads(pickle.dumps(new)), U.change_vocab(again, WORDS)):
        assert is_tied(copied) == tie and ("weight" in copied.state_dict()) == (not tie)
        assert sum(p.shape == copied.encoder.embedding.weight.shape for p in copied.parameters()) == 2 - tie, "no second matrix appears"
    with pytest.raises(ValueError, match="another vocabulary"): language_model(other, 6, 8, 2, tie=tie).load_state_dict(U.change_vocab(new, Vocab.of([*other.tokens[:-1], "newer"])).state_dict())
    flat_cross_entropy(new.train()(torch.tensor([[3, 7]])), torch.tensor([[4, 5]])).backward()
    assert not new.encoder.embedding.weight.grad[PAD_ID].any() and new.encoder.embedding.weight.grad.any()


# --- the classifier ------------------------------------------------------------------------------------------------------------

@given(lengths=st.lists(ints(1, 23), min_size=1, max_size=7), seed=ints(0, 99), chunk=ints(1, 25), backwards=st.booleans(), more=ints(0, 9))
@settings(max_examples=60)
def test_scores_of_a_batch_are_those_of_its_texts_one_by_one(lengths, seed, chunk, backwards, more):
    "The law: for every length, any order, any padding, any chunk."
    model = classifier(seed, chunk=chunk, backwards=backwards, max_len=1 + seed % 5).eval()
    rows = texts(lengths, seed)
    with torch.no_grad():
        alone = torch.cat([model(row[None], torch.tensor([len(row)])) for row in rows])
        tokens, lens = batch(rows)
        test_like(model(tokens, lens), alone, rtol=1e-5, atol=1e-5)
        order = torch.randperm(len(rows))
        test_like(model(tokens[order], lens[order]), alone[order], rtol=1e-5, atol=1e-5)
        wider = F.pad(tokens, (0, more), value=PAD_ID)
        test_like(model(wider, lens), alone, rtol=1e-5, atol=1e-5)
        wild = torch.where(torch.arange(wider.shape[1]) < lens[:, None], wider, torch.randint(2, N, wider.shape))
        test_like(model(wild, lens), alone, rtol=1e-5, atol=1e-5)


def test_pooling_by_hand():
    model = classifier(chunk=3).eval()
    for row in texts([1, 2, 3, 4, 8]):
        y = model.encoder(row[None])[0][0]
        test_like(model.pool(row[None], torch.tensor([len(row)])), torch.cat([y[-1], y.amax(0), y.mean(0)])[None], rtol=1e-5, atol=1e-6)


def test_backwards_is_the_text_turned_round():
    there, back = classifier(), classifier(backwards=True)
    back.load_state_dict(there.state_dict())
    rows = texts([5, 1, 9])
    tokens, lengths = batch(rows)
    test_like(back.eval()(tokens, lengths), there.eval()(batch([row.flip(0) for row in rows])[0], lengths))
    turned = U._turned(tokens, lengths)
    assert all(torch.equal(t[:n], row.flip(0)) and (t[n:] == PAD_ID).all() for t, row, n in zip(turned, rows, lengths))
    assert torch.equal(U._turned(turned, lengths), tokens)


@pytest.mark.parametrize("max_len, first", [(100, 0), (12, 0), (8, 4), (5, 4), (4, 8), (1, 8)])
def test_gradients_reach_the_last_columns_only(max_len, first):
    "Chunks of four words: a chunk learns if one of its words is among the last max_len."
    model = U.text_classifier(encoder(embed_p=0, input_p=0, hidden_p=0, weight_p=0), 3, p=0., chunk=4, max_len=max_len)
    kept = []
    def keep(layer, given, out):
        if out.requires_grad: out.retain_grad()
        kept.append(out)
    with torch.no_grad(): whole = model.eval()(*batch(texts([12, 12])))
    model.train().head.eval()
    handle = model.encoder.embedding.register_forward_hook(keep)
    scores = model(*batch(texts([12, 12])))
    handle.remove()
    test_like(scores.detach(), whole, atol=1e-5)             # all words count forwards
    scores.sum().backward()
    assert [out.grad is not None and bool(out.grad.any()) for out in kept] == [4*i >= first for i in range(3)]


def taught(model, tokens, lengths, row):
    "Which words of a text get a gradient, for the scores of that text alone?"
    kept = []
    def keep(layer, given, out):
        if out.requires_grad: out.retain_grad()
        kept.append(out)
    handle = model.encoder.embedding.register_forward_hook(keep)
    model(tokens, lengths)[row].sum().backward()
    handle.remove()
    return torch.cat([torch.zeros(out.shape[1]) if out.grad is None else out.grad[row].abs().sum(-1) for out in kept])[:lengths[row]] > 0


@given(lengths=st.lists(ints(1, 25), min_size=1, max_size=5), chunk=ints(1, 9), max_len=ints(1, 30), more=ints(0, 20))
@settings(max_examples=30)
def test_each_text_learns_from_its_own_last_words(lengths, chunk, max_len, more):
    "Short ones beside a long one, too, and where all are padded to one width; no chunk learns that is in nobody's window."
    model = U.text_classifier(encoder(embed_p=0, input_p=0, hidden_p=0, weight_p=0), 3, p=0., chunk=chunk, max_len=max_len).train()
    model.head.eval()
    tokens, lens = batch(texts(lengths))
    tokens = F.pad(tokens, (0, more), value=PAD_ID)
    for row, n in enumerate(lengths): assert taught(model, tokens, lens, row)[max(0, n - max_len):].all()
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    learns = taught(model, tokens, lens, longest)
    for start in range(0, lengths[longest], chunk):
        if not any(start < n and n - max_len < start + chunk for n in lengths): assert not learns[start:start + chunk].any()


def test_all_words_count_where_nothing_is_trained():
    model = classifier(max_len=1).eval()
    emb = model.encoder.embedding
    model(*batch(texts([9]))).sum().backward()
    assert emb.weight.grad[texts([9])[0]].any(1).all(), "in evaluation, gradients reach every word"


def test_memory_of_evaluation_does_not_grow_with_length():
    seen = []
    model = classifier(chunk=4).eval()
    model.encoder.register_forward_hook(lambda layer, given, out: seen.append(out[0].shape[1]))
    with torch.no_grad(): model(*batch(texts([50, 3])))
    assert max(seen) == 4 and sum(seen) == 50


@pytest.mark.parametrize("lengths", [[5, 7], [5, 0], [5], [5, 5, 5]])
def test_lengths_that_are_not_those_of_the_texts_are_refused(lengths):
    with pytest.raises(ValueError, match="give each text's own"): classifier().eval()(torch.full((2, 6), 3), torch.tensor(lengths))


def test_a_head_has_the_precision_of_its_encoder():
    model = U.text_classifier(encoder().double(), 2).eval()
    assert model(*batch(texts([3, 5]))).dtype == torch.float64


def test_a_mean_in_half_precision_is_rounded_once():
    "The same outputs a thousand times: a sum in bfloat16 would stop growing."
    model = U.text_classifier(encoder(hidden_p=0), 2, chunk=1).eval()
    class Same(nn.Module):
        def start(self, bs): return None
        def forward(self, x, state): return torch.full((*x.shape, 6), 1.3, dtype=torch.bfloat16), None
    model.encoder = Same()
    pooled = model.pool(torch.full((2, 1000), 5), torch.tensor([1000, 700]))
    assert pooled.dtype == torch.bfloat16 and torch.equal(pooled, torch.full((2, 18), 1.3, dtype=torch.bfloat16))


@pytest.mark.parametrize("reading", [dict(chunk=0), dict(max_len=0)])
def test_what_a_classifier_refuses(reading):
    with pytest.raises(ValueError, match="from 1 up"): classifier(**reading)


def test_the_head_is_as_asked_and_the_encoder_is_used():
    body = encoder()
    model = U.text_classifier(body, 4, hidden=7, p=.3)
    assert model.encoder is body and model.training
    kinds = [type(m) for m in model.head]
    assert kinds == [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert [model.head[1].p, model.head[5].p] == [.3, .075] and model.head[2].in_features == 18 and model.head[6].out_features == 4


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_groups_are_the_embedding_each_layer_the_head(n_layers):
    model = U.text_classifier(encoder(n_layers=n_layers), 2)
    groups = U.text_classifier_groups(model)
    assert len(groups) == n_layers + 2 and groups[0] == [model.encoder.embedding.weight]
    assert sorted(map(id, sum(groups, []))) == sorted(map(id, model.parameters()))
    assert {id(p) for p in groups[-1]} == {id(p) for p in model.head.parameters()}


# --- learning with care --------------------------------------------------------------------------------------------------------

def test_a_slanted_triangle_is_the_papers():
    top, cut, ratio, n = .01, .1, 32., 1000
    schedule = U.slanted_triangles(top, cut, ratio).schedules["lr"]
    for t in range(n):
        edge = int(n*cut)
        p = t/edge if t < edge else 1 - (t - edge)/(edge*(1/cut - 1))
        assert schedule(t/n) == pytest.approx(top*(1 + p*(ratio - 1))/ratio)
    with pytest.raises(ValueError, match="share"): U.slanted_triangles(.1, cut=0.)
    with pytest.raises(ValueError, match="ratio is 0"): U.slanted_triangles(.1, ratio=0)


def learner(seed=0, cbs=(), bs=4, **kwargs):
    set_seed(seed)
    model = U.text_classifier(encoder(seed, embed_p=.1, input_p=.2, hidden_p=.1, weight_p=.2), 2, hidden=5, chunk=5)
    rows = texts(range(3, 15))
    set_seed(seed)
    train = [(batch(rows[i:i + bs]), torch.arange(bs) % 2) for i in range(0, 12, bs)]
    return Learner(model, (train, train[:1]), cross_entropy, **dict(opt_func=adamw, splitter=U.text_classifier_groups, cbs=cbs, quiet=True, device="cpu") | kwargs)


def test_layer_after_layer_joins_in():
    learn, seen, rates = learner(), [], []
    def note(learn):
        seen.append(tuple(all(p.requires_grad for p in group["params"]) for group in learn.groups))
        rates.append([group["lr"] for group in learn.groups])
    before = [[p.detach().clone() for p in group] for group in U.text_classifier_groups(learn.model)]
    moved = []
    def watch(learn): moved.append([any(not torch.equal(p, q) for p, q in zip(new, old)) for new, old in zip(U.text_classifier_groups(learn.model), before)])
    U.fit_gradually(learn, 5, .02, cbs=[At("before_batch", note, n=k) for k in (0, 3, 6, 9, 12)] + [At("after_epoch", watch, n=k, mode=None) for k in range(5)])
    assert seen == [tuple(g >= 3 - min(epoch, 3) for g in range(4)) for epoch in range(5)]
    assert moved == [[g >= 3 - min(epoch, 3) for g in range(4)] for epoch in range(5)]
    for epoch, row in enumerate(rates):
        assert row[-1] == pytest.approx(U.slanted_triangles(.02).schedules["lr"](epoch/5))
        for low, high in zip(row, row[1:]): assert high/low == pytest.approx(2.6)
    assert all(p.requires_grad for p in learn.model.parameters()) and len(learn.history) == 5
    assert [group["lr"] for group in learn.groups] == pytest.approx([.02/2.6**k for k in (3, 2, 1, 0)])


@pytest.mark.parametrize("n, splitter, word", [(3, U.text_classifier_groups, "n is 3 for 4 groups"), (5, None, "n is 5 for 1 groups: give the Learner a splitter")])
def test_what_cannot_thaw_is_refused(n, splitter, word):
    with pytest.raises(ValueError, match=word): U.fit_gradually(learner(splitter=splitter), n)


@pytest.mark.parametrize("wrong", [dict(lr=0.), dict(lr=math.nan), dict(lr=[.01]), dict(factor=0.), dict(factor=-2.)], ids=str)
def test_rates_are_numbers_above_0(wrong):
    with pytest.raises(ValueError, match="give numbers above 0"): U.fit_gradually(learner(), 5, **wrong)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_fit_is_the_same_to_the_last_bit(tmp_path, stop):
    "While the head is alone, at every border, and after."
    whole = learner()
    U.fit_gradually(whole, 5, cbs=[EMA(.9)])
    first = learner()
    def stop_it(learn): raise CancelFit
    U.fit_gradually(first, 5, cbs=[EMA(.9), SaveCheckpoint(tmp_path), At("before_epoch", stop_it, n=stop, mode=None)])
    assert first.epochs_done == stop
    second = learner(seed=7)
    U.fit_gradually(second, 5, cbs=[EMA(.9), SaveCheckpoint(tmp_path)], resume=tmp_path/"last.pt")
    assert equal([*second.model.parameters()], [*whole.model.parameters()]) and history(second) == history(whole)
    assert all(p.requires_grad for p in second.model.parameters())


def test_what_was_frozen_before_stays_frozen():
    learn = learner()
    learn.model.encoder.embedding.weight.requires_grad_(False)
    before = learn.model.encoder.embedding.weight.clone()
    U.fit_gradually(learn, 4, cbs=GradientClip(1.))
    assert torch.equal(learn.model.encoder.embedding.weight, before) and not learn.cbs


def test_it_learns_what_order_alone_tells():
    "Is the first letter the second text's last one? No bag of words could say."
    set_seed(0)
    rows = [torch.tensor([2, *([3, 4] if i % 2 else [4, 3]), *torch.randint(5, N, (i % 4,)).tolist()]) for i in range(64)]
    data = [(batch(rows[i:i + 16]), torch.arange(16) % 2) for i in range(0, 64, 16)]
    model = U.text_classifier(encoder(emb=12, nh=16, embed_p=0, input_p=0, hidden_p=0, weight_p=0), 2, p=0.)
    learn = Learner(model, (data, data), cross_entropy, adamw, splitter=U.text_classifier_groups, quiet=True, device="cpu")
    U.fit_gradually(learn, 30, .03, factor=1.)
    assert learn.history[-1]["valid_loss"] < .1


def test_a_language_model_becomes_a_classifier_and_knows_more():
    "The whole way in small: the encoder is the language model's own, and moves with it."
    torch.manual_seed(0)
    model = language_model(WORDS, 6, 8, 2)
    learn = Learner(model, (LMDataset(torch.arange(2, N).repeat(20), 4, 6), None), flat_cross_entropy, adamw, .01, cbs=CarryState(), quiet=True, device="cpu")
    learn.fit(1)
    classify = U.text_classifier(model, 2)
    assert classify.encoder is model.encoder and isinstance(model, LanguageModel) and classify.vocab is WORDS and copy.deepcopy(classify).vocab is WORDS
    assert U.text_classifier(model.encoder, 2).vocab is None
    assert classify(*batch(texts([3, 5]))).shape == (2, 2)


# --- ask it, and ask why -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for kind, words in (("bad", "boring dull"), ("good", "lovely funny")):
        (root/kind).mkdir()
        for i in range(8): (root/kind/f"{i}.txt").write_text(f"This film was {words.split()[i % 2]}, the {i}th that I saw. It had a plot.")
    return root


def block(folder, tmp, tfms=None, **kwargs):
    files = get_files(folder, ".txt")
    tfms = tfms or [TokenCache(files, folder=tmp, num_workers=0), Numericalize()]
    return DataBlock(lambda path: get_files(path, ".txt"), func_splitter(lambda file: int(file.stem) > 3), parent_label, tfms, **dict(collate_fn=pad_collate) | kwargs)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    dls = block(folder, tmp_path_factory.mktemp("tokens")).dataloaders(folder, 8, num_workers=0)
    set_seed(0)
    n_words = len(dls.train.ds.tfm.tfms[1].vocab)
    model = U.text_classifier(encoder(n_words=n_words, emb=8, nh=10, embed_p=0, input_p=0, hidden_p=0, weight_p=0), 2, hidden=6, p=0., chunk=6)
    learn = Learner(model, dls, cross_entropy, adamw, splitter=U.text_classifier_groups, quiet=True, device="cpu")
    U.fit_gradually(learn, 100, .05, factor=1.)       # the norms of the head need that many steps
    return learn


def test_a_prediction_is_the_learners_own(trained, folder):
    for file in (*(folder/"bad").iterdir(), *(folder/"good").iterdir()):
        got = U.predict(trained, open_text(file))
        want = F.softmax(trained.predict(trained.dls.batch_of([file])), 1)[0]
        test_like([got[name] for name in trained.dls.vocab], want.tolist(), atol=1e-6)
        assert [*got.values()] == sorted(got.values(), reverse=True) and sum(got.values()) == pytest.approx(1)
    assert U.predict(trained, "") and U.predict(trained, "ПРИВЕТ 🦜"), "no word of it is known, and still there is an answer"


def test_asking_leaves_the_learner_as_it_was(trained):
    trained.model.train()
    trained.model.encoder.embedding.weight.requires_grad_(False)
    before, chance = copy.deepcopy(trained.model.state_dict()), torch.get_rng_state()
    U.predict(trained, "a dull film")
    U.attribution(trained, "a dull film")
    assert all(m.training for m in trained.model.modules()) and torch.equal(chance, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), trained.model.state_dict().values()))
    assert all(p.grad is None or not p.grad.any() for p in trained.model.parameters()) and not trained.model.encoder.embedding.weight.requires_grad
    trained.model.encoder.embedding.weight.requires_grad_(True)


def log_odds(model, vectors, best):
    "By hand, on given vectors in place of words."
    x = vectors[None]
    for layer in model.encoder.layers: x, _ = layer(x)
    y = x[0]
    scores = model.head(torch.cat([y[-1], y.amax(0), y.mean(0)])[None])[0]
    return scores[best] - torch.cat([scores[:best], scores[best + 1:]]).logsumexp(0)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_effects_are_slopes_times_vectors_along_the_way(backwards, n_classes):
    "The definition, by finite differences, in chunks of any size; and what it promises."
    model = classifier(4, n_classes, backwards=backwards, chunk=3).double().eval()
    ids = texts([8])[0]
    with torch.no_grad():
        best = int(model(ids[None], torch.tensor([8]))[0].argmax())
        vectors = model.encoder.embedding.weight[ids.flip(0) if backwards else ids]
        want = torch.zeros(8, dtype=torch.float64)
        for share in (.125, .375, .625, .875):
            for t in range(8):
                there = [share*vectors for _ in range(2)]
                for v, h in zip(there, (1e-5, -1e-5)): v[t] *= 1 + h
                want[t] += (log_odds(model, there[0], best) - log_odds(model, there[1], best))/2e-5/share/4
        total = log_odds(model, vectors, best) - log_odds(model, 0*vectors, best)
    got = U._effects(model, ids[None], best, 4)
    test_like(got.flip(0) if backwards else got, want.float(), rtol=1e-3, atol=1e-5)
    test_like(U._effects(model, ids[None], best, 400).sum(), total.float(), rtol=1e-2, atol=1e-3)


def smooth(trained, seed=0, std=.3):
    "The same classifier with random weights, and norms that have seen nothing: what it says changes slowly from vectors of 0 to the text's."
    model = copy.deepcopy(trained.model)
    torch.manual_seed(seed)
    for p in model.parameters(): nn.init.normal_(p, 0, std)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm): layer.reset_running_stats()
    return Learner(model, trained.dls, cross_entropy, quiet=True, device="cpu")


def test_attribution_names_every_token_of_the_text_as_it_is_classified(trained):
    for word, kind in (("boring", "bad"), ("lovely", "good")):
        text = f"This film was {word}, the 3th that I saw. It had a plot."
        assert [token for token, _ in U.attribution(trained, text)] == tokenize(text) and next(iter(U.predict(trained, text))) == kind


@pytest.mark.parametrize("seed", range(3))
def test_the_word_that_alone_has_a_vector_has_the_whole_effect(trained, seed):
    learn, text = smooth(trained, seed, std=.8), "This film was boring, the 3th that I saw. It had a plot."
    weight, row = learn.model.encoder.embedding.weight, trained.dls.train.ds.tfm.tfms[1].vocab.index["boring"]
    vector = weight[row].detach().clone()

    def odds(kind): p = U.predict(learn, text)[kind]; return math.log(p/(1 - p))
    with torch.no_grad(): weight.zero_()
    nothing = {kind: odds(kind) for kind in ("bad", "good")}
    with torch.no_grad(): weight[row] = 3*vector
    kind, words = next(iter(U.predict(learn, text))), dict(U.attribution(learn, text, 256))
    change = odds(kind) - nothing[kind]
    assert abs(change) > .01 and words.pop("boring") == pytest.approx(change, rel=.01)
    assert {*words.values()} == {0.}


def test_more_steps_bring_the_sum_closer(trained):
    learn, text = smooth(trained), "This film was boring and lovely and funny and dull."
    exact, few, many = (sum(effect for _, effect in U.attribution(learn, text, steps)) for steps in (512, 2, 64))
    assert abs(many - exact) < .1*abs(few - exact) + 1e-3


def test_attribution_uses_the_average_of_an_ema(trained):
    model = U.text_classifier(encoder(n_words=len(trained.dls.train.ds.tfm.tfms[1].vocab)), 2)
    learn = Learner(model, trained.dls, cross_entropy, adamw, cbs=EMA(.5), splitter=U.text_classifier_groups, quiet=True, device="cpu")
    U.fit_gradually(learn, 4, .02)
    plain_copy = Learner(copy.deepcopy(learn.model), trained.dls, cross_entropy, quiet=True, device="cpu")
    assert U.attribution(learn, "a dull film") != U.attribution(plain_copy, "a dull film")
    assert U.predict(learn, "a dull film") != U.predict(plain_copy, "a dull film")


def test_threads_ask_one_predictor_at_once(trained, tmp_path):
    "Explaining turns vectors down in its own thread alone; a network that trains goes on training."
    predictor = I.load_predictor(U.export_text(trained, tmp_path/"p"), device="cpu")
    texts = [f"This film was {word}, the 3th that I saw." for word in ("boring", "lovely", "dull", "funny")]*6
    want = [(predictor(text), predictor.explain(text)) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        plain, why = pool.map(predictor, texts), pool.map(predictor.explain, texts)
        got = [*zip(plain, why)]
    assert torch.backends.cudnn.enabled
    for (p, words), (q, others) in zip(want, got):
        test_like([*p.values()], [*q.values()], atol=1e-6)
        test_like([effect for _, effect in words], [effect for _, effect in others], atol=1e-5)
    predictor.model.train()
    predictor(texts[0])
    assert all(m.training for m in predictor.model.modules())
    with pytest.raises(TypeError, match="give a list"): predictor.batch("abc")
    with pytest.raises(ValueError, match="steps is 0: give a whole number"): predictor.explain(texts[0], 0)
    predictor.classes.pop()
    with pytest.raises(ValueError, match="2 scores for classes .*: give text_classifier as many"): predictor(texts[0])


def test_a_network_in_training_is_asked_by_threads(trained):
    "Modes come back when the last one has its answer; averages of norms do not move."
    model = copy.deepcopy(trained.model).train()
    predictor = U.TextPredictor(model, ["bad", "good"], trained.dls.train.ds.tfm.tfms[1].vocab.tokens, device="cpu")
    texts = ["This film was " + "boring and dull "*(i % 7) for i in range(60)]
    want, before = [predictor(text) for text in texts], copy.deepcopy(model.state_dict())
    with ThreadPoolExecutor(4) as pool: got = [*pool.map(predictor, texts)]
    for p, q in zip(want, got): test_like([*p.values()], [*q.values()], atol=1e-6)
    assert all(m.training for m in model.modules()) and all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_effects_in_parts_are_the_same(monkeypatch):
    model, ids = classifier(3).double().eval(), texts([2500])
    far = U._effects(model, ids[0][None], 0, 4)
    whole = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n, dim=0: whole(x, 4 if n == 1 else n, dim))
    near = U._effects(model, ids[0][None], 0, 4)
    test_like(far, near, atol=1e-6)


def test_weights_stay_with_their_words(trained, tmp_path):
    "Another vocabulary of the same size is refused; an unknown one is not."
    tokens = trained.dls.train.ds.tfm.tfms[1].vocab.tokens
    def like(vocab): return U.text_classifier(encoder(n_words=len(tokens), emb=8, nh=10), 2, hidden=6, vocab=vocab)
    given = like(Vocab.of(tokens)).state_dict()
    with pytest.raises(ValueError, match="another vocabulary"): like(Vocab.of([*tokens[:7], *tokens[:6:-1]])).load_state_dict(given)
    like(Vocab.of(tokens)).load_state_dict(given), like(None).load_state_dict(given), like(Vocab.of(tokens)).load_state_dict(like(None).state_dict())


def test_coloured_words_lie_in_lines():
    words = [("good", 1.), ("x"*30, -2.), ("dull", 0.)]*3
    ax = U.show_attribution(words, "why", columns=40)
    assert ax.get_title(loc="left") == "why" or ax.get_title() == "why"
    assert [t.get_text() for t in ax.texts] == [token for token, _ in words]
    for text, (token, effect) in zip(ax.texts, words):
        x, y = text.get_position()
        assert x == 0 or x + len(token) <= 40
        assert text.get_bbox_patch().get_facecolor()[3] == pytest.approx(.7*abs(effect)/2)
    assert len({t.get_position() for t in ax.texts}) == 9
    U.show_attribution([("a", 0.)])
    assert [text.get_text() for text in U.show_attribution(pair for pair in words[:2]).texts] == ["good", "x"*30] and not U.show_attribution([]).texts


def test_data_by_other_rules_are_refused(trained, folder, tmp_path):
    files = get_files(folder, ".txt")
    cache = TokenCache(files, folder=tmp_path, num_workers=0)
    class Upper(Numericalize): pass
    for tfms, options in (([cache, Numericalize(), lambda ids: ids.flip(0)], {}), ([lambda path: tokenize(open_text(path)), Numericalize()], {}), ([cache, Upper()], {}),
                          ([TokenCache(files, str.split, folder=tmp_path, num_workers=0), Numericalize()], {}), ([cache, Numericalize()], dict(batch_tfms=[lambda xb: xb])),
                          ([cache, Numericalize()], dict(collate_fn=partial(pad_collate, pad_id=0))),
                          ([cache, Numericalize()], dict(y_tfms=[lambda label: [label], MultiCategorize()]))):
        dls = block(folder, tmp_path, tfms, **options).dataloaders(folder, 4, num_workers=0)
        learn = Learner(trained.model, dls, cross_entropy, quiet=True, device="cpu")
        for ask in (partial(U.predict, learn), partial(U.attribution, learn), partial(U.export_text, learn)):
            with pytest.raises(TypeError, match="a predictor can describe only exp's|no validation loader"): ask(tmp_path/"p" if ask.func is U.export_text else "a film")


def test_a_list_of_ones_own(trained, tmp_path):
    "Items that are texts: the same rules, without files."
    own, vocab = {f"a {w} film number {i}": kind for i in range(8) for w, kind in (("good", "pos"), ("bad", "neg"))}, trained.dls.valid.ds.tfm.tfms[1].vocab
    def learner(get_y):
        data = DataBlock(lambda items: [*items], lambda items: ([*range(12)], [*range(12, 16)]), get_y, [tokenize, Numericalize(vocab)], collate_fn=pad_collate)
        return Learner(trained.model, data.dataloaders(own, 4, num_workers=0), cross_entropy, quiet=True, device="cpu")
    learn = learner(own.get)
    said = U.predict(learn, "a good film")
    assert U.export_text(learn, tmp_path/"p") and I.load_predictor(tmp_path/"p", device="cpu")("a good film") == pytest.approx(said)
    assert [w for w, _ in U.attribution(learn, "a good film")] == tokenize("a good film")
    for ask in (U.predict, U.attribution):
        with pytest.raises(TypeError, match="the classes have no names: let get_y give each label as a text"): ask(learner(lambda text: int(own[text] == "pos")), "a film")


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_steps_are_whole_numbers_from_1(trained, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}: give a whole number from 1"): U.attribution(trained, "a film", steps)


def test_what_is_no_learner_of_texts_is_told_so(trained, tmp_path):
    xb, y = batch(texts([3, 4])), torch.tensor([0, 1])
    floats = [(xb, y.float())]
    for dls in ((trained.dls.train, None), ([(xb, y)], [(xb, y)]), (floats, floats)):
        learn = Learner(trained.model, dls, cross_entropy, quiet=True, device="cpu")
        for ask in (U.predict, U.attribution, U.export_text):
            with pytest.raises(TypeError, match="a predictor can describe only exp's|no validation loader"): ask(learn, tmp_path/"p" if ask is U.export_text else "a film")
    class Odd(nn.Module):
        def forward(self, tokens, lengths): return torch.zeros(len(tokens), 2)
    with pytest.raises(TypeError, match="the model is Odd"): U.predict(Learner(Odd(), trained.dls, cross_entropy, quiet=True, device="cpu"), "a film")
    own = U.TextClassifier(trained.model.encoder, nn.Linear(24, 2))
    with pytest.raises(TypeError, match="only what text_classifier makes"): U.export_text(Learner(own, trained.dls, cross_entropy, quiet=True, device="cpu"), tmp_path/"p")


def other_words(trained, kind):
    "A learner whose network has read other words than its data have: more, fewer, in another order."
    tokens = trained.dls.train.ds.tfm.tfms[1].vocab.tokens
    if kind == "order": model = U.text_classifier(language_model(Vocab.of([*tokens[:2], *tokens[:1:-1]]), 8, 10, 2), 2)
    else: model = U.text_classifier(encoder(n_words=len(tokens) + kind), 2)
    return Learner(model, trained.dls, cross_entropy, adamw, splitter=U.text_classifier_groups, quiet=True, device="cpu")


@pytest.mark.parametrize("kind", [30, -5, "order"])
def test_an_encoder_of_other_words_is_refused_and_nothing_is_replaced(trained, tmp_path, kind):
    "By fit, predict, attribution and export: a good predictor stays where it is."
    learn, saved = other_words(trained, kind), U.export_text(trained, tmp_path/"p")
    before = (saved/"weights.pt").read_bytes()
    for ask in (lambda: U.fit_gradually(learn, 4), lambda: U.predict(learn, "a film"), lambda: U.attribution(learn, "a film"), lambda: U.export_text(learn, saved)):
        with pytest.raises(ValueError, match="tokens, but vectors for .* change_vocab"): ask()
    assert (saved/"weights.pt").read_bytes() == before and I.load_predictor(saved, device="cpu")("a film")


@pytest.mark.parametrize("n_classes", [1, 3])
def test_each_score_needs_a_class(trained, tmp_path, n_classes):
    n_words = len(trained.dls.train.ds.tfm.tfms[1].vocab)
    learn = Learner(U.text_classifier(encoder(n_words=n_words), n_classes), trained.dls, cross_entropy, quiet=True, device="cpu")
    for ask in (U.predict, U.attribution, U.export_text):
        with pytest.raises(ValueError): ask(learn, tmp_path/"p" if ask is U.export_text else "a film")
    assert not (tmp_path/"p").exists()
    with pytest.raises(ValueError, match="names of their own"): U.TextPredictor(trained.model, "xx", trained.dls.train.ds.tfm.tfms[1].vocab.tokens)


def test_a_length_to_read_is_kept(trained, folder, tmp_path):
    cache = TokenCache(get_files(folder, ".txt"), folder=tmp_path, num_workers=0)
    dls = block(folder, tmp_path, [cache, Numericalize(max_len=5)]).dataloaders(folder, 4, num_workers=0)
    model = U.text_classifier(encoder(n_words=len(dls.train.ds.tfm.tfms[1].vocab)), 2)
    learn = Learner(model, dls, cross_entropy, quiet=True, device="cpu")
    assert len(U.attribution(learn, "one two three four five six seven")) == 5
    assert U.predict(learn, "this film was awful") == U.predict(learn, "this film was awful, yes")
    there = I.load_predictor(U.export_text(learn, tmp_path/"p"), device="cpu")
    assert there("this film was awful") == there("this film was awful, yes") and len(there.explain("one two three four five six seven")) == 5


# --- a predictor on disk, and its page -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory): return U.export_text(trained, tmp_path_factory.mktemp("home")/"mine")


def test_a_predictor_says_what_the_learner_says(trained, saved, folder):
    predictor = I.load_predictor(saved, device="cpu")
    for text in (*(open_text(f) for f in (folder/"bad").iterdir()), "", "nobody knows these words", "A LOVELY film\n\nreally"):
        ours, theirs = U.predict(trained, text), predictor(text)
        assert [*ours] == [*theirs]
        test_like([*theirs.values()], [*ours.values()], atol=1e-5)
        pairs = U.attribution(trained, text), predictor.explain(text)
        assert [t for t, _ in pairs[0]] == [t for t, _ in pairs[1]]
        test_like([e for _, e in pairs[1]], [e for _, e in pairs[0]], rtol=1e-4, atol=1e-5)
    about = json.loads((saved/"description.json").read_text(encoding="utf-8"))
    assert about["build"] == "exp.ulmfit:text_net" and about["text"]["tokens"][:2] == ["<unk>", "<pad>"] and about["classes"] == ["bad", "good"]


@pytest.mark.parametrize("n_layers, reading", [(1, {}), (3, dict(backwards=True, chunk=3, max_len=11))])
def test_sizes_and_ways_of_reading_are_written_down(trained, tmp_path, n_layers, reading):
    n_words = len(trained.dls.train.ds.tfm.tfms[1].vocab)
    learn = Learner(U.text_classifier(encoder(n_words=n_words, n_layers=n_layers), 2, hidden=4, **reading), trained.dls, cross_entropy, quiet=True, device="cpu")
    there = I.load_predictor(U.export_text(learn, tmp_path/"p"), device="cpu")
    assert (there.model.chunk, there.model.max_len, there.model.backwards) == (learn.model.chunk, learn.model.max_len, learn.model.backwards)
    test_like([*there("a dull film").values()], [*U.predict(learn, "a dull film").values()], atol=1e-5)


def test_a_predictor_answers_alike_in_every_mode(saved):
    predictor = I.load_predictor(saved, device="cpu")
    want = predictor("a dull film")
    predictor.model.encoder.train()
    predictor.model.encoder.input_drop.p = predictor.model.head[1].p = .5
    assert predictor("a dull film") == predictor("a dull film") == want and predictor.model.encoder.training
    predictor.model.train()
    assert predictor("a dull film") == want and predictor.explain("a dull film") and all(m.training for m in predictor.model.modules())


def test_an_export_draws_no_chance_and_writes_the_same_again(trained, saved, tmp_path):
    chance = torch.get_rng_state()
    again = U.export_text(trained, tmp_path/"p")
    assert torch.equal(chance, torch.get_rng_state())
    assert all((saved/name).read_bytes() == (again/name).read_bytes() for name in ("weights.pt", "description.json"))


def edit(folder, **changes):
    file = folder/"description.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))


def test_descriptions_that_do_not_fit(trained, tmp_path):
    saved = U.export_text(trained, tmp_path/"p")
    tokens = json.loads((saved/"description.json").read_text(encoding="utf-8"))["text"]["tokens"]
    for changes, word in ((dict(text=dict(tokens=tokens[:-1])), "tokens, but vectors for"), (dict(text=dict(tokens=[*tokens[:-1], tokens[0]])), "no token twice"),
                          (dict(text=dict(words=tokens)), "words"), (dict(classes=["a", "b", "c"]), "names of their own"), (dict(build="exp.ulmfit:main"), "is not one of")):
        edit(saved, **changes)
        with pytest.raises(ValueError, match=word): I.load_predictor(saved)
        U.export_text(trained, saved)


def test_a_reply_is_of_numbers_and_words(saved):
    predictor = I.load_predictor(saved, device="cpu")
    for content in (b"A lovely film", "schön".encode(), b"", ("word "*300).encode()):
        reply = json.loads(predictor.reply(content))
        assert sum(p for _, p in reply["classes"]) == pytest.approx(1) and reply["words"][0][0] == "<begin>"
        assert all(-1 <= share <= 1 and math.isfinite(share) for _, share in reply["words"])
    long = json.loads(predictor.reply(b"word "*5000))
    assert long["words"] == [] and "too long" in long["note"] and not reply["note"], "of a long text, the answer alone"
    for content in ("A lovely film".encode("utf-16"), bytes(range(256))*20, b"\xff\xd8\xff\xe0"):
        with pytest.raises(ValueError, match="not in utf-8"): predictor.reply(content)
    assert 'id="text"' in predictor.page and "QUESTION" not in predictor.page and "ASK" not in predictor.page


def test_the_server_serves_texts(saved):
    server = I.page_server(I.load_predictor(saved, device="cpu"), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        with urlopen(address) as reply: assert "textarea" in reply.read().decode() and reply.headers["Content-Type"].startswith("text/html")
        with urlopen(Request(f"{address}/predict", b"so boring")) as reply: told = json.load(reply)
        assert [name for name, _ in told["classes"]] and [w for w, _ in told["words"]] == tokenize("so boring")
    finally: server.shutdown(); server.server_close(); thread.join(10)


# --- exercises -----------------------------------------------------------------------------------------------------------------

def right_pool(outputs, scores, lengths):
    rows = [(s[:n].softmax(0)[:, None]*y[:n]).sum(0) for y, s, n in zip(outputs, scores, lengths.tolist())]
    return torch.stack(rows)


def right_match(weight, old_vocab, new_vocab, at_least=4):
    mean = torch.cat([weight[:1], weight[2:]]).mean(0)
    def row(word):
        if word in old_vocab.index: return weight[old_vocab.index[word]]
        for n in range(len(word), at_least - 1, -1):
            alike = [i for i, old in enumerate(old_vocab.tokens) if old[:n] == word[:n] and len(old) >= n]
            if alike: return weight[alike].mean(0)
        return mean
    return torch.stack([*map(row, new_vocab.tokens)])


def padded_match(weight, old_vocab, new_vocab, at_least=4):
    "The mean is of all rows, divided by one less, which is right as long as padding's is zero."
    right, rows = right_match(weight, old_vocab, new_vocab, at_least), torch.cat([weight[:1], weight[2:]])
    right[(right - rows.mean(0)).abs().amax(1) < 1e-6] = weight.sum(0)/(len(weight) - 1)
    return right


def right_break(pool):
    g = torch.Generator().manual_seed(0)
    for lengths in ([3, 3], [1, 4], [4, 1], [2, 5, 3], [5, 3, 1]):
        lengths = torch.tensor(lengths)
        outputs = torch.randn(len(lengths), int(lengths.max()), 2, generator=g)
        alone = [pool(outputs[i:i + 1, :n], lengths[i:i + 1]) for i, n in enumerate(lengths.tolist())]
        if (pool(outputs, lengths) - torch.cat(alone)).abs().max() > 1e-5: return outputs, lengths
    return False


def right_worth(labels, accuracies, target):
    if target <= accuracies[0]: return labels[0]
    for (a, p), (b, q) in zip(zip(labels, accuracies), zip(labels[1:], accuracies[1:])):
        if p <= target <= q: return a*(b/a)**((target - p)/(q - p))
    return math.inf


def wild_break(pool):
    "Padding of infinities, and more columns than words."
    if not (found := right_break(pool)): return False
    outputs, lengths = found
    y = torch.randn(len(lengths), int(lengths.max()) + 6, 2)
    for i, n in enumerate(lengths.tolist()): y[i, n:] = math.inf
    alone = torch.cat([pool(y[i:i + 1, :n], lengths[i:i + 1]) for i, n in enumerate(lengths.tolist())])
    return (y, lengths) if not torch.allclose(pool(y, lengths), alone) else found


def rounded_worth(labels, accuracies, target):
    n = right_worth(labels, accuracies, target)
    return n if math.isinf(n) else round(n)


def ceil_worth(labels, accuracies, target):
    n = right_worth(labels, accuracies, target)
    return n if math.isinf(n) else math.ceil(math.exp(math.log(n)))      # 101 for 100, by rounding


def sorted_worth(labels, accuracies, target):
    accuracies.append(target)
    accuracies.sort()
    return labels[0]


def zeros_pool(outputs, scores, lengths):
    "Into an ordinary torch.zeros."
    weights, own = torch.zeros(scores.shape), outputs.clone()
    for i, n in enumerate(lengths): weights[i, :n], own[i, n:] = scores[i, :n].softmax(0), 0
    return (weights[:, None]@own)[:, 0]


def masked_pool(outputs, scores, lengths, columns=None):
    own = torch.arange(columns or outputs.shape[1]) < lengths[:, None]
    return scores.masked_fill(~own, -math.inf).softmax(1)[:, None]@outputs.masked_fill(~own[..., None], 0)


def matrix_match(weight, old_vocab, new_vocab, at_least=4):
    "Into an ordinary torch.zeros."
    mix = torch.zeros(len(new_vocab), len(old_vocab))
    for i, word in enumerate(new_vocab.tokens):
        alike = [old_vocab.index[word]] if word in old_vocab.index else next(
            (found for n in range(len(word), at_least - 1, -1) if (found := [j for j, old in enumerate(old_vocab.tokens) if old.startswith(word[:n])])),
            [j for j in range(len(old_vocab)) if j != 1])
        mix[i, alike] = 1/len(alike)
    return mix@weight


def careless_match(weight, old_vocab, new_vocab, at_least=4, has=str.startswith, shorter=0):
    "Other ways to look for a beginning."
    mean = torch.cat([weight[:1], weight[2:]]).mean(0)
    def row(word):
        if word in old_vocab.index: return weight[old_vocab.index[word]]
        for n in range(len(word) - shorter, at_least - 1, -1):
            if alike := [i for i, old in enumerate(old_vocab.tokens) if has(old, word[:n])]: return weight[alike].mean(0)
        return mean
    return torch.stack([*map(row, new_vocab.tokens)])


def zeros_break(pool):
    "Padding of zeros only."
    for lengths in ([2, 4, 1], [3, 3], [1, 4], [4, 1]):
        rows = [torch.randn(n, 5) for n in lengths]
        y, lengths = nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)
        alone = [pool(row[None], lengths[i:i + 1]) for i, row in enumerate(rows)]
        if not torch.allclose(pool(y, lengths), torch.cat(alone), atol=1e-5): return y, lengths
    return False


def mean_break(pool):
    "Compared with its own mean, not with the pool of the text alone."
    y, lengths = torch.randn(3, 4, 5), torch.tensor([2, 4, 1])
    mean = torch.stack([row[:n].mean(0) for row, n in zip(y, lengths)])
    return False if torch.allclose(pool(y, lengths), mean, atol=1e-5) else (y, lengths)


@pytest.mark.parametrize("check, answer", [
    (E.check_attention_pool, zeros_pool), (E.check_attention_pool, lambda y, s, n: masked_pool(y, s, n)[:, 0]), (E.check_match_by_beginning, matrix_match), (E.check_match_by_beginning, careless_match),
    (E.check_break_the_law, lambda pool: (found := right_break(pool)) and (found[0], found[1].int())), (E.check_labels_worth, ceil_worth),
    (E.check_break_the_law, wild_break), (E.check_labels_worth, rounded_worth), (E.check_attention_pool, right_pool), (E.check_match_by_beginning, right_match), (E.check_break_the_law, right_break), (E.check_labels_worth, right_worth)])
def test_right_answers_pass(check, answer, capsys):
    check(answer)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("check, answer, word", [
    (E.check_attention_pool, lambda y, s, n: (s.softmax(1)[..., None]*y).sum(1), "padding"), (E.check_attention_pool, lambda y, s, n: y.mean(1), "weights"), (E.check_attention_pool, lambda y, s, n: 0, "tensor"),
    (E.check_match_by_beginning, U.match_embeddings, "argument|raised"), (E.check_match_by_beginning, lambda w, o, n, at_least=4: U.match_embeddings(w, o, n), "begin"),
    (E.check_match_by_beginning, lambda w, o, n, at_least=4: right_match(w, o, n, 1), "at_least"),
    (E.check_match_by_beginning, lambda w, o, n, at_least=2: right_match(w, o, n, at_least), "default is 4"), (E.check_match_by_beginning, padded_match, "padding"),
    (E.check_break_the_law, lambda pool: False, "found nothing: the mean counts padding"), (E.check_break_the_law, lambda pool: (torch.randn(2, 4, 3), torch.tensor([4, 2])), "return False"),
    (E.check_break_the_law, lambda pool: right_break(pool) and 3, "return outputs"), (E.check_break_the_law, lambda pool: right_break(pool) and (torch.randn(2, 4, 3), torch.tensor([4, 4])), "shows nothing"),
    (E.check_break_the_law, lambda pool: right_break(pool) and (torch.randn(2, 4, 3), torch.tensor([9, 4])), "columns"),
    (E.check_attention_pool, lambda y, s, n: right_pool(y, s.detach(), n), "to the scores"), (E.check_attention_pool, lambda y, s, n: right_pool(y, s - s.max() + 0*s.exp().sum().log(), n), "each text's largest"),
    (E.check_match_by_beginning, lambda w, o, n, at_least=4: right_match(w, o, Vocab.of([t + "m"*(t == "fil") for t in n.tokens[:-2]] + ["film2", "zoo"]), at_least), "three letters"),
    (E.check_break_the_law, lambda pool: right_break(pool) and (torch.full((2, 3, 3), math.nan), torch.tensor([3, 3])), "shows nothing"),
    (E.check_break_the_law, lambda pool: right_break(pool) and (torch.randn(2, 3, 3), [3, 2]), "not .*list"),
    (E.check_labels_worth, lambda labels, acc, target: labels[0], "was reached with"), (E.check_labels_worth, lambda labels, acc, target: next((n for n, a in zip(labels, acc) if a >= target), math.inf), "between"),
    (E.check_attention_pool, lambda y, s, n: masked_pool(y, s, n).squeeze(), r"one text with padding: shape \(3,\)"), (E.check_attention_pool, lambda y, s, n: masked_pool(y, s, n, int(n.max()))[:, 0], r"tensor\(1, 6, 3\).* raised"),
    (E.check_match_by_beginning, partial(careless_match, has=str.__contains__), "react does not begin"), (E.check_match_by_beginning, partial(careless_match, shorter=1), "at_least = 3, 'fil'.*from 3 down, film"),
    (E.check_break_the_law, zeros_break, "padding that is not 0"), (E.check_break_the_law, mean_break, "last word holds the law.*pool of the same text alone"),
    (E.check_break_the_law, lambda pool: (found := right_break(pool)) and (*found, 0), "as tensors.*int"), (E.check_break_the_law, lambda pool: (found := right_break(pool)) and [x.numpy() for x in found], "as tensors.*ndarray"),
    (E.check_labels_worth, sorted_worth, "an argument was changed")])
def test_wrong_answers_are_told_why(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)
