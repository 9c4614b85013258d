"Lesson 07: the promise of `lsuv_` on every kind of model, what it must leave alone, and what it says on a bad day."
import copy
import gc
import math
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exp import lsuv
from exp.conv import Conv2d
from exp.exercises import lsuv as E7
from exp.hooks import GeneralReLU, Hooks, as_found, find_layers
from exp.init import gaussian_mean, orthogonal_
from exp.lsuv import lsuv_
from exp.testing import test_like


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


class Do(nn.Module):
    "A function as a module."
    def __init__(self, func): super().__init__(); self.func = func
    def forward(self, x): return self.func(x)


class Model(nn.Module):
    "Layers by name, and any forward(self, x)."
    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items(): setattr(self, name, layer)
        self.run = run
    def forward(self, x): return self.run(self, x)


def chain(depth=4, width=24, act=nn.ReLU, ni=24, **kwargs):
    layers = []
    for i in range(depth): layers += [nn.Linear(ni if i == 0 else width, width, **kwargs), act()]
    return nn.Sequential(*layers)


def outputs(model, xb, layers=None, mode=False):
    "Every output of each layer in one forward pass, by plain PyTorch hooks: the oracle."
    layers = layers or {name: m for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1}
    call = (lambda: model(**xb)) if isinstance(xb, dict) else (lambda: model(*xb)) if isinstance(xb, tuple) else lambda: model(xb)
    seen, handles = {}, []
    for name, m in layers.items():
        handles.append(m.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, []).append(o.detach().flatten())))
    was = [(m, m.training) for m in model.modules()]
    model.train(mode)
    with torch.no_grad(): call()
    for h in handles: h.remove()
    for m, t in was: m.training = t
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def check_unit(model, xb, tol=1e-3, layers=None, mean=0., std=1.):
    found = outputs(model, xb, layers)
    assert found
    for name, y in found.items():
        assert abs(y.std() - std) <= 1.02*tol*std + 1e-6, f"{name}: std {y.std()}"
        if mean is not None: assert abs(y.mean() - mean) <= 1.02*tol*std + 1e-6, f"{name}: mean {y.mean()}"


def state(model): return copy.deepcopy(dict(model.state_dict()))


def no_hooks(model): return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


# ---- the promise ----------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 30), st.integers(2, 40), st.floats(1e-3, 100.), st.floats(-100, 100),
       st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.SELU, nn.Sigmoid, nn.Identity]), st.integers(0, 99))
def test_any_chain_any_input(depth, width, bs, scale, shift, act, seed):
    torch.manual_seed(seed)
    model, xb = chain(depth, width, act, ni=7), torch.randn(bs, 7)*scale + shift
    assert lsuv_(model, xb) is model
    check_unit(model, xb)


CONVS = {"Conv1d": (nn.Conv1d(3, 5, 3), (4, 3, 9)), "Conv2d": (nn.Conv2d(3, 5, 3, stride=2), (4, 3, 9, 9)),
         "Conv3d": (nn.Conv3d(2, 3, 2), (4, 2, 5, 5, 5)), "grouped": (nn.Conv2d(4, 8, 3, groups=4), (4, 4, 6, 6)),
         "ConvTranspose1d": (nn.ConvTranspose1d(3, 5, 3), (4, 3, 9)), "ConvTranspose2d": (nn.ConvTranspose2d(3, 5, 3, stride=2), (4, 3, 5, 5)),
         "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 2), (4, 2, 3, 3, 3)), "our Conv2d": (Conv2d(3, 5, 3), (4, 3, 9, 9)),
         "Linear on sequences": (nn.Linear(6, 5), (4, 3, 6)), "Linear on one vector": (nn.Linear(6, 50), (6,))}


@pytest.mark.parametrize("kind", CONVS)
def test_every_kind_of_layer(kind):
    layer, shape = CONVS[kind]
    model, xb = nn.Sequential(copy.deepcopy(layer), nn.Tanh()), 5*torch.randn(shape) + 3
    lsuv_(model, xb)
    check_unit(model, xb)


def test_bilinear():
    model = Model(lambda m, x: m.b(x, x.flip(0)), b=nn.Bilinear(5, 5, 4))
    xb = torch.randn(30, 5)
    lsuv_(model, xb)
    y = model(xb).detach()
    assert abs(y.mean()) < 1e-3 and abs(y.std() - 1) < 1e-3


def test_one_layer_exactly():
    layer, x = nn.Linear(20, 10), torch.randn(50, 20) + 1
    y = layer(x).detach()
    lsuv_(layer, x, orthogonal=False)
    test_like(layer(x).detach(), (y - y.mean())/y.std(), atol=2e-6)


def test_equals_the_single_pass_through_a_chain():
    model, xb = chain(5), torch.randn(60, 24)
    by_hand = copy.deepcopy(model)
    torch.manual_seed(3); lsuv_(model, xb)
    torch.manual_seed(3)
    with torch.no_grad():
        x = xb
        for layer in by_hand:
            if isinstance(layer, nn.Linear):
                orthogonal_(layer.weight); layer.bias.zero_()
                y = layer(x)
                m, s = y.mean(), y.std()
                layer.weight.div_(s); layer.bias.sub_(m).div_(s)
            x = layer(x)
    test_like(state(model), dict(by_hand.state_dict()), rtol=1e-4, atol=1e-5)


def test_weights_are_orthogonal_up_to_a_factor():
    model = lsuv_(chain(), torch.randn(60, 24))
    for layer in model[::2]:
        gram = layer.weight.detach() @ layer.weight.detach().T
        test_like(gram/gram[0, 0], torch.eye(24), atol=1e-4)


def test_a_deep_net_learns_only_with_it():
    act = lambda: Do(lambda z: torch.tanh(z/2)/2)
    x = torch.randn(256, 24); y = (x[:, 0]*x[:, 1] > 0).long()
    def end(start):
        torch.manual_seed(1); model = nn.Sequential(*chain(30, 24, act), nn.Linear(24, 2)); start(model)
        opt = torch.optim.SGD(model.parameters(), lr=.1)
        for _ in range(40): loss = F.cross_entropy(model(x), y); loss.backward(); opt.step(); opt.zero_grad()
        return loss.item()
    assert end(lambda m: None) > .68 and end(lambda m: lsuv_(m, x)) < .6


# ---- models that are no chains --------------------------------------------------------------------------------------

@pytest.mark.parametrize("times", range(1, 9))
@pytest.mark.parametrize("act", [F.relu, torch.tanh, F.gelu, lambda z: z])
def test_a_layer_that_runs_several_times(times, act):
    def run(m, x):
        for _ in range(times): x = act(m.again(x))
        return m.out(x)
    model, xb = Model(run, again=nn.Linear(20, 20), out=nn.Linear(20, 3)), torch.randn(50, 20)
    lsuv_(model, xb)
    check_unit(model, xb)


def test_used_side_by_side():
    model, xb = Model(lambda m, x: m.a(x) + m.a(-3*x) + m.a(x + 2), a=nn.Linear(9, 9)), torch.randn(40, 9)
    lsuv_(model, xb); check_unit(model, xb)


def test_two_layers_that_need_each_other():
    def run(m, x):
        for _ in range(3): x = F.relu(m.b(torch.tanh(m.a(x))))
        return x
    model, xb = Model(run, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), torch.randn(60, 16)
    lsuv_(model, xb); check_unit(model, xb)


def test_tied_weights_stay_tied():
    model, xb = Model(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 2)), torch.randn(60, 16)
    model.b.weight = model.a.weight
    lsuv_(model, xb)
    assert model.b.weight is model.a.weight
    found = outputs(model, xb)
    both = torch.cat([found["a"], found["b"]])
    assert abs(both.mean()) < 2e-3 and abs(both.std() - 1) < 2e-3 and abs(found["c"].std() - 1) < 2e-3


def test_a_bias_shared_by_two_layers_is_an_impossible_wish_or_fulfilled():
    model, xb = Model(lambda m, x: m.b(m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.rand(60, 8)
    model.b.bias = model.a.bias
    before = state(model)
    try: lsuv_(model, xb)
    except ValueError as error:
        assert "out of reach" in str(error)
        test_like(state(model), before, rtol=0, atol=0)
    else: check_unit(model, xb)


def test_order_of_running_not_of_definition():
    model = Model(lambda m, x: m.first_defined(torch.tanh(m.second(x))), first_defined=nn.Linear(8, 4), second=nn.Linear(6, 8))
    xb = 10*torch.randn(50, 6)
    lsuv_(model, xb); check_unit(model, xb)


def test_branches_and_residuals():
    def run(m, x):
        h = torch.relu(m.stem(x))
        return m.out(h + m.b(torch.relu(m.a(h))) + m.short(h))
    model = Model(run, stem=nn.Linear(10, 16), a=nn.Linear(16, 16), b=nn.Linear(16, 16), short=nn.Linear(16, 16, bias=False), out=nn.Linear(16, 3))
    xb = torch.randn(60, 10)
    lsuv_(model, xb)
    check_unit(model, xb, mean=None)
    assert all(abs(y.mean()) < 1.02e-3 for name, y in outputs(model, xb).items() if name != "short")


def test_without_biases_only_the_std_is_set():
    model, xb = chain(bias=False), torch.rand(50, 24) + 3
    lsuv_(model, xb)
    check_unit(model, xb, mean=None)


def test_a_transformer_layer():
    model, xb = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(6, 5, 16)
    attention = state(model.self_attn)
    lsuv_(model, xb)
    check_unit(model, xb, layers={"linear1": model.linear1, "linear2": model.linear2}, tol=2e-3)
    test_like(state(model.self_attn), attention, rtol=0, atol=0)      # its linear layer runs unseen: left alone


def test_layers_that_do_not_run_are_left_alone():
    model, xb = Model(lambda m, x: m.a(x), a=nn.Linear(4, 4), spare=nn.Linear(4, 4)), torch.randn(20, 4)
    spare = state(model.spare)
    lsuv_(model, xb)
    test_like(state(model.spare), spare, rtol=0, atol=0)


def test_in_place_activations_do_not_disturb():
    model, xb = nn.Sequential(nn.Linear(9, 9), nn.ReLU(inplace=True), nn.Linear(9, 9), nn.ReLU(inplace=True)), torch.randn(50, 9)
    lsuv_(model, xb)
    check_unit(nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU()), xb)     # measured where nothing is overwritten


# ---- `layers` -------------------------------------------------------------------------------------------------------

def test_layers_as_list_dict_part_and_pairs():
    xb = torch.randn(60, 24)
    for choose in (lambda m: [m[2]], lambda m: {"mine": m[2]}, lambda m: m[2], lambda m: (x for x in [m[2]]), lambda m: [(m[2], m[2])]):
        model = chain()
        before = state(model)
        lsuv_(model, xb, layers=choose(model))
        changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {"2"}
        check_unit(model, xb, layers={"2": model[2]})
    model = Model(lambda m, x: m.tail(m.body(x)), body=chain(2), tail=nn.Linear(24, 2))
    before = state(model.tail)
    lsuv_(model, xb, layers=model.body)
    check_unit(model.body, xb)
    test_like(state(model.tail), before, rtol=0, atol=0)


@pytest.mark.parametrize("act, mean, std", [(nn.ReLU, None, 1.), (nn.GELU, None, 1.), (nn.Tanh, 0., .6), (nn.SELU, 0., 1.), (nn.ELU, 0., 1.), (nn.Sigmoid, .5, .3),
                                            (lambda: Do(lambda z: F.relu(z)**2), None, 1.), (lambda: Do(lambda z: z**3), None, 1.),
                                            (lambda: GeneralReLU(.1, .4), 0., 1.), (lambda: nn.LeakyReLU(.1), 0., 1.)])
def test_measured_behind_the_activation(act, mean, std):
    model, xb = chain(3, 32, act, ni=32), torch.randn(200, 32)
    lsuv_(model, xb, layers=list(zip(model[::2], model[1::2])), mean=mean, std=std)
    check_unit(model, xb, layers={str(i): m for i, m in enumerate(model[1::2])}, mean=mean, std=std)


def test_a_block_that_holds_its_layer():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3)])
    xb = torch.randn(80, 12)
    lsuv_(model, xb, layers=[(block[0], block) for block in model], mean=None)
    check_unit(model, xb, layers=dict(model.named_children()), mean=None)


def test_one_activation_module_behind_several_layers():
    act = nn.ReLU()
    model, xb = nn.Sequential(nn.Linear(12, 12), act, nn.Linear(12, 12), act), torch.randn(80, 12)
    pairs = [(model[0], act), (model[2], act)]
    lsuv_(model, xb, layers=pairs, mean=None)
    first = act(model[0](xb))
    assert all(abs(y.std() - 1) < 1.02e-3 for y in (first, act(model[2](first))))


def test_the_same_layer_twice_in_the_list():
    model, xb = chain(2), torch.randn(50, 24)
    lsuv_(model, xb, layers=[model[0], model[0], model[2]]); check_unit(model, xb)


# ---- options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mean", [0., .5, -2.])
@pytest.mark.parametrize("std", [.1, 1., 3.])
def test_mean_and_std(mean, std):
    model, xb = chain(act=nn.Tanh), torch.randn(60, 24)
    lsuv_(model, xb, mean=mean, std=std); check_unit(model, xb, mean=mean, std=std)


def test_mean_none_leaves_biases_at_zero():
    model, xb = chain(), torch.rand(60, 24) + 2
    lsuv_(model, xb, mean=None)
    check_unit(model, xb, mean=None)
    assert all((layer.bias == 0).all() for layer in model[::2])


@pytest.mark.parametrize("tol", [.2, 1e-3, 1e-5])
def test_tol(tol):
    model, xb = chain(act=nn.GELU).double(), torch.randn(60, 24).double()
    lsuv_(model, xb, layers=list(zip(model[::2], model[1::2])), mean=None, tol=tol)
    worst = max(abs(y.std() - 1) for y in outputs(model, xb, layers=dict(enumerate(model[1::2]))).values())
    assert worst <= tol and (tol < .1 or worst > 1e-5)       # a loose tolerance stops early


def test_without_orthogonal_start_directions_are_kept():
    model, xb = chain(), torch.randn(60, 24)
    before = state(model)
    lsuv_(model, xb, orthogonal=False); check_unit(model, xb)
    for i in (0, 2, 4, 6):
        ratio = model[i].weight.detach()/before[f"{i}.weight"]
        test_like(ratio, torch.full_like(ratio, ratio[0, 0]), rtol=1e-4)


def test_twice_is_once():
    model, xb = chain(), torch.randn(60, 24)
    lsuv_(model, xb); before = state(model)
    lsuv_(model, xb, orthogonal=False)
    test_like(state(model), before, rtol=0, atol=0)


def test_scale_of_the_old_weights_does_not_matter():
    model, xb = chain(), torch.randn(60, 24)
    tripled = copy.deepcopy(model)
    with torch.no_grad(): [p.mul_(3) for p in tripled.parameters()]
    lsuv_(model, xb, orthogonal=False); lsuv_(tripled, xb, orthogonal=False)
    test_like(state(tripled), state(model), rtol=1e-3, atol=1e-4)


def test_generator_and_global_seed():
    xb = torch.randn(60, 24)
    def weights(**kwargs): return lsuv_(chain(), xb, **kwargs)[0].weight.detach().clone()
    a, b, c = (weights(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    test_like(a, b, rtol=0, atol=0); assert not torch.equal(a, c)
    rng = torch.get_rng_state(); model = chain(); rng = torch.get_rng_state()
    lsuv_(model, xb, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(5); d = weights(); torch.manual_seed(5); e = weights(); f = weights()
    test_like(d, e, rtol=0, atol=0); assert not torch.equal(e, f)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 1e-2)])
def test_dtypes(dtype, tol):
    model, xb = chain().to(dtype), torch.randn(60, 24, dtype=dtype)
    lsuv_(model, xb, tol=tol); check_unit(model, xb, tol=tol)
    assert all(p.dtype == dtype for p in model.parameters())


def test_batch_of_one():
    model, xb = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24)), torch.randn(1, 24)
    lsuv_(model, xb); check_unit(model, xb)


def test_large_biases_of_ones_own():
    layer, xb = nn.Linear(20, 30), .01*torch.randn(50, 20)
    nn.init.constant_(layer.bias, 1000.)
    lsuv_(layer, xb, orthogonal=False)
    assert abs(layer(xb).mean()) < 2e-3 and abs(layer(xb).std() - 1) < 2e-3


def test_whole_number_inputs_behind_an_embedding():
    model, xb = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)), torch.randint(9, (40, 3))
    before = model[0].weight.detach().clone()
    lsuv_(model, xb)
    assert abs(model(xb).std() - 1) < 2e-3 and torch.equal(model[0].weight, before)


def test_outputs_in_tuples():
    pair = Model(lambda m, x: (m.a(x), x), a=nn.Linear(6, 6))
    model, xb = Model(lambda m, x: m.b(m.pair(x)[0]), pair=pair, b=nn.Linear(6, 2)), torch.randn(40, 6)
    lsuv_(model, xb, layers=[(pair.a, pair), model.b]); check_unit(model, xb)


# ---- what is left alone ---------------------------------------------------------------------------------------------

def test_modes_buffers_gradients_and_identity_are_kept():
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout(.5), nn.ReLU(), nn.Linear(12, 12))
    xb = torch.randn(30, 12)
    model(xb).sum().backward()
    model.train(); model[2].eval(); model[0].requires_grad_(False)
    params, grads = list(model.parameters()), [p.grad.clone() for p in model.parameters()]
    buffers, modes = copy.deepcopy(dict(model.named_buffers())), [m.training for m in model.modules()]
    assert lsuv_(model, xb) is model
    test_like(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes and no_hooks(model)
    assert all(p is q for p, q in zip(model.parameters(), params))
    test_like([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())


def test_frozen_layers_are_set_too_unless_left_out():
    model, xb = chain(3), torch.randn(60, 24)
    model[2].requires_grad_(False)
    frozen = state(model[2])
    lsuv_(model, xb, layers=[m for m in (model[0], model[4]) if m.weight.requires_grad])
    test_like(state(model[2]), frozen, rtol=0, atol=0)
    lsuv_(model, xb); check_unit(model, xb)
    assert not torch.equal(model[2].weight, frozen["weight"]) and not model[2].weight.requires_grad and "Frozen" in lsuv_.__doc__


def test_memory_layout_is_kept():
    model, xb = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last), torch.randn(6, 3, 9, 9)
    lsuv_(model, xb.to(memory_format=torch.channels_last)); check_unit(model, xb)
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in model[::2])


def test_gradients_and_hooks_are_as_before_after_an_error():
    model, xb, heard = chain(2), torch.full((9, 24), math.nan), []
    model(torch.randn(9, 24)).sum().backward()
    handle = model[0].register_forward_hook(lambda *args: heard.append(1))
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="dead or NaN"): lsuv_(model, xb)
    test_like([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    assert len(model[0]._forward_hooks) == 1 and heard and torch.is_grad_enabled()
    handle.remove()


def test_random_state_is_kept_where_nothing_is_drawn():
    class Noisy(nn.Module):
        def forward(self, x): return x + torch.randn_like(x)*.01
    model, xb = nn.Sequential(nn.Linear(6, 6), Noisy(), nn.Linear(6, 6)), torch.randn(50, 6)
    rng = torch.get_rng_state()
    lsuv_(model, xb, orthogonal=False, tol=.1)
    assert torch.equal(torch.get_rng_state(), rng)


def test_all_runs_see_the_same_dice_whoever_throws_them():
    class Fickle(nn.Module):
        def forward(self, x): return x*random.choice([1, 2, 3])*np.random.choice([1, 4])
    random.seed(0); np.random.seed(0)
    model, xb = nn.Sequential(nn.Linear(6, 6), Fickle(), nn.Linear(6, 6)), torch.randn(50, 6)
    lsuv_(model, xb); check_unit(model, xb)


def test_hooks_of_others_stay():
    model, xb, heard = chain(1), torch.randn(20, 24), []
    model[0].register_forward_hook(lambda *args: heard.append(1))
    lsuv_(model, xb)
    assert heard and len(model[0]._forward_hooks) == 1


def test_grad_mode_is_kept():
    model, xb = chain(1), torch.randn(20, 24)
    lsuv_(model, xb); assert torch.is_grad_enabled() and model(xb).requires_grad
    with torch.no_grad(): lsuv_(model, xb); assert not torch.is_grad_enabled()


def test_nothing_keeps_the_model_alive():
    model, xb = chain(), torch.randn(20, 24)
    lsuv_(model, xb)
    ref = weakref.ref(model)
    del model; gc.collect()
    assert ref() is None


# ---- bad days: the layer's name, and nothing half-done --------------------------------------------------------------

def refused(model, xb, match, kind=ValueError, **kwargs):
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(kind, match=match): lsuv_(model, xb, **kwargs)
    test_like(state(model), before, rtol=0, atol=0)
    assert no_hooks(model) and [m.training for m in model.modules()] == modes


def test_dead_layers():
    model = Model(lambda m, x: m.body(x), body=nn.Sequential(nn.Linear(6, 6), Do(lambda x: x*0), nn.Linear(6, 6)))
    refused(model, torch.randn(20, 6), r"'body\.2' has mean .*std 0 after 0 steps: dead")
    refused(chain(2), torch.zeros(20, 24), "'0' has mean .* after 0 steps: dead")
    zero = chain(2); nn.init.zeros_(zero[2].weight); nn.init.zeros_(zero[2].bias)
    refused(zero, torch.randn(20, 24), "'2' has mean .* after 0 steps: dead", orthogonal=False)
    refused(nn.Sequential(nn.Linear(6, 6), Do(lambda x: x*0 + 7.), nn.Linear(6, 1)), torch.randn(20, 6), "'2' has mean .* after 0 steps: dead")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf(bad):
    xb = torch.randn(20, 24); xb[3, 4] = bad
    refused(chain(), xb, "'0' has mean (nan|inf|-inf).*dead or NaN")
    refused(nn.Sequential(nn.Linear(24, 24), Do(lambda x: x + bad), nn.Linear(24, 24)), torch.randn(20, 24), "'2' has mean (nan|inf|-inf).*dead or NaN")
    with torch.no_grad():
        broken = chain(); broken[4].weight[0, 0] = bad
    before = state(broken)
    with pytest.raises(ValueError, match="'4' has mean (nan|inf|-inf).*dead or NaN"): lsuv_(broken, torch.randn(20, 24), orthogonal=False)
    test_like(state(broken), before, rtol=0, atol=0)
    lsuv_(broken, torch.randn(20, 24))           # an orthogonal start forgets it


def test_a_std_out_of_reach():
    model = chain(3, act=nn.Sigmoid)
    refused(model, torch.randn(50, 24), r"'0' has .*std 0\.[45].* after 50 steps.*out of reach.*mean=None", layers=list(zip(model[::2], model[1::2])))


def test_a_mean_out_of_reach():
    model = chain(3)
    refused(model, torch.randn(50, 24), "'0' has mean 0.*after 50 steps.*out of reach.*mean=None", layers=list(zip(model[::2], model[1::2])))
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    refused(model, torch.randn(50, 8), "'0' has .*out of reach", layers=[(model[0], model[1])], std=2.)


def test_max_iter():
    model = chain(3, act=nn.GELU)
    pairs = list(zip(model[::2], model[1::2]))
    refused(model, torch.randn(50, 24), "after 1 steps", layers=pairs, mean=None, max_iter=1)
    lsuv_(model, torch.randn(50, 24), layers=pairs, mean=None, max_iter=10)
    lsuv_(chain(), torch.randn(50, 24), max_iter=1)          # a layer's own output takes one step


def test_no_layers():
    refused(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), torch.randn(9, 4), "layers is empty")
    refused(chain(), torch.randn(9, 24), "layers is empty", layers=[])
    refused(chain(), torch.randn(9, 24), "layers is empty", layers={})


def test_an_empty_batch_or_a_single_number():
    refused(chain(), torch.randn(0, 24), "'0' has mean nan.*see .*xb")
    refused(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.randn(0, 1, 5, 5), "'0' has mean nan.*see .*xb")
    refused(nn.Sequential(nn.Linear(4, 1)), torch.randn(1, 4), "'0' has .*std nan.*see .*xb")


def test_layers_that_do_not_run_when_asked_for():
    model = Model(lambda m, x: m.a(x), a=nn.Linear(4, 4), spare=nn.Linear(4, 4))
    refused(model, torch.randn(9, 4), "'spare'.*do not run", layers=[model.spare])
    refused(model, torch.randn(9, 4), "'a'.*do not run, or not before", layers=[(model.a, model.spare)])
    refused(nn.Sequential(nn.Identity(), Model(lambda m, x: x, b=nn.Linear(4, 4))), torch.randn(9, 4), "'1.b'.*do not run")


def test_layers_of_the_wrong_kind():
    model, xb = chain(), torch.randn(9, 24)
    refused(model, xb, r"Linear.*give layers of this model", layers=[nn.Linear(24, 24)])
    refused(model, xb, r"Linear.*give layers of this model", layers=[model[0], (model[2], nn.ReLU())])
    refused(model, xb, r"3 in `layers`.*pairs", layers=[3])
    refused(model, xb, "ReLU.*weight of their own", layers=[model[1]])
    refused(model, xb, "unpack", layers=[(model[0], model[1], model[2])])
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    refused(normed, torch.randn(9, 4), "n_out", layers=[normed[1]])       # orthogonal_ says what it needs


def test_weights_that_are_computed_are_refused():
    from torch.nn.utils.parametrizations import weight_norm
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)))
    refused(model, torch.randn(9, 4), "weight of their own")


def test_lazy_layers_learn_their_shape_first():
    model, xb = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)), torch.randn(40, 5)
    lsuv_(model, xb); check_unit(model, xb)


@pytest.mark.parametrize("kwargs, match", [(dict(std=-1.), "another std"), (dict(std=math.inf), "another std"), (dict(std=math.nan), "another std"),
                                           (dict(tol=0.), "out of reach"), (dict(tol=math.nan), "out of reach"), (dict(mean=math.nan), "out of reach")])
def test_options_nobody_can_fulfil(kwargs, match): refused(chain(), torch.randn(9, 24), match, **kwargs)


def test_models_without_hooks():
    for model in (nn.Linear, lambda x: x, None):
        with pytest.raises((TypeError, AttributeError)): lsuv_(model, torch.randn(9, 4))


def test_the_models_own_error_passes_and_nothing_is_half_done():
    refused(chain(), torch.randn(9, 5), "shapes", kind=RuntimeError)
    odd = nn.Sequential(nn.Linear(4, 4), Do(lambda x: {"not": "a tensor"}))
    refused(odd, torch.randn(9, 4), "str where a tensor", kind=TypeError, layers=[(odd[0], odd[1])])


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_ctrl_c_in_any_run(at):
    runs = []
    def stop(x):
        runs.append(1)
        if len(runs) == at: raise KeyboardInterrupt
        return x
    refused(nn.Sequential(*chain(4), Do(stop)), torch.randn(30, 24), None, kind=KeyboardInterrupt)
    assert len(runs) == at


def test_a_layer_that_runs_last_does_not_mislead_the_next_run():
    layer, act = nn.Linear(24, 24), nn.Tanh()
    m = Model(lambda self, x: self.layer(self.act(self.layer(self.act(x)))), layer=layer, act=act)
    x = torch.randn(200, 24)
    lsuv_(m, x, [(m.layer, m.act)], std=.5, mean=None)
    seen = []
    act.register_forward_hook(lambda module, inp, out: seen.append(out.std(correction=0)))
    m(x)
    assert abs(seen[1] - .5) < 1e-3          # the activation that follows the layer


# ---- several inputs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_several_inputs(kind):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 2)
        def forward(self, left, right): return self.out(torch.tanh(self.a(left) + self.b(right)))
    model, left, right = Two(), 3*torch.randn(60, 5), torch.randn(60, 3) - 2
    xb = dict(right=right, left=left) if kind == "dict" else (left, right)
    lsuv_(model, list(xb) if kind == "list" else xb)
    check_unit(model, xb)


def test_everything_public_is_tested(): assert set(lsuv.__all__) == {"lsuv_"}


# --- the exercises' checkers -------------------------------------------------------------------------------------------

def refuses(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


@torch.no_grad()
def per_channel(layers, x, one=False, at_once=False, early=False, shift=True, divide=True, fresh=False):
    y, ys = x, []
    for layer in layers: ys.append(y := layer(y))
    for layer, old in zip(layers, ys):
        if hasattr(layer, "weight"):
            if fresh: orthogonal_(layer.weight)
            y = (old if at_once else layer(x)).transpose(0, 1).flatten(1)
            m, s = (y.mean().expand(len(y)), y.std().expand(len(y))) if one else (y.mean(1), y.std(1))
            layer.weight.div_(s.view(-1, *[1]*(layer.weight.ndim - 1)))
            if shift: layer.bias.sub_(m)
            if divide: layer.bias.div_(s)
        x = layer(x)
    return ys[-1] if early else x


def test_per_channel_judges_behaviour(capsys):
    def new_parameters(layers, x):
        for layer in layers:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                y = layer(x).detach(); axes = [d for d in range(y.ndim) if d != 1]
                m, s = y.mean(axes), y.var(axes, correction=0).sqrt()
                layer.weight = nn.Parameter(torch.einsum("o...,o->o...", layer.weight.detach(), 1/s))
                layer.bias = nn.Parameter((layer.bias.detach() - m)/s)
            x = layer(x)
        return x
    for answer in (per_channel, new_parameters): E7.check_per_channel_(answer)
    assert capsys.readouterr().out.count("✓") == 2
    for options, word in ((dict(one=True), "its own channel"), (dict(at_once=True), "channel has"), (dict(early=True), "after all has been set"), (dict(shift=False), "shift each bias"),
                          (dict(divide=False), "divide it as well"), (dict(fresh=True), "direction")): refuses(E7.check_per_channel_, lambda l, x: per_channel(l, x, **options), word)
    refuses(E7.check_per_channel_, lambda l, x: x, "unchanged")
    refuses(E7.check_per_channel_, lambda l, x: per_channel(l, x.div_(3)), "x was changed")


def calm(act, power=15, low=1/3, high=3., squared=True, tenths=range(40, 0, -1)):
    def slope(z): return torch.autograd.grad(act(z.requires_grad_()).sum(), z)[0]
    for s in (t/10 for t in tenths):
        chi = (s*s if squared else 1)*gaussian_mean(lambda z: slope(z)**2, std=s)/gaussian_mean(lambda z: act(z).detach()**2, std=s)
        if low <= chi**power <= high: return s
    raise ValueError("no std is calm")


def test_calm_std_judges_behaviour(capsys):
    def by_sums(act):
        "No gaussian_mean: a fine grid of z, and autograd over all of it at once."
        z, best = torch.linspace(-8, 8, 4001, dtype=torch.float64), None
        p = torch.exp(-z*z/2); p = p/p.sum()
        for s in torch.arange(1, 41)/10:
            y = (s.double()*z).requires_grad_(); out = act(y)
            slopes = torch.autograd.grad(out.sum(), y)[0]
            if 1/3 <= (s**2*(p*slopes**2).sum()/(p*out.detach()**2).sum())**15 <= 3: best = s
        if best is None: raise ValueError("none")
        return best
    for answer in (calm, by_sums): E7.check_calm_std(answer)
    assert capsys.readouterr().out.count("✓") == 2
    for options, word in ((dict(power=14), "outside"), (dict(power=30), "still calm"), (dict(low=0), "no σ in the list"), (dict(high=9e9), "outside"), (dict(squared=False), "σ"),
                          (dict(tenths=range(1, 41)), "largest down")): refuses(E7.check_calm_std, lambda act: calm(act, **options), word)
    def upwards(act):
        last = None
        for t in range(1, 41):
            try: last = calm(act, tenths=[t])
            except ValueError: break
        if last is None: raise ValueError("none")
        return last
    refuses(E7.check_calm_std, upwards, "try all of them")


def first_dead(model, xb, share=1e-3, nan=True, std=True, inputs=True, order=True, last=False, fixed=False, evaluate=True, lost=None, power=1, inside=True):
    dead, layers = [], find_layers(model, nn.Linear)
    if not inside: layers = {name: layer for name, layer in layers.items() if "." not in name}
    def look(hook, module, inp, out):
        part = out.var(0, correction=0).mean()/out.var(correction=0)
        bad = nan and (lost(out).any() if lost else not math.isfinite(out.mean())) or std and out.std() == 0 or inputs and part**power < (1e-3 if fixed else share)
        if bad: dead.append(hook.name)
    with torch.no_grad(), as_found(model), Hooks(layers, look): (model.eval() if evaluate else model)(xb)
    if not order: dead = [name for name in layers if name in dead]
    return dead[-1 if last else 0] if dead else ""


def test_first_dead_judges_behaviour(capsys):
    def by_torchs_hooks(model, xb, share=1e-3):
        outs, modes = [], [(m, m.training) for m in model.modules()]
        hooks = [m.register_forward_hook(lambda m, inp, out, name=name: outs.append((name, out.double()))) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        with torch.no_grad(): model.eval()(xb)
        for hook in hooks: hook.remove()
        for m, mode in modes: m.training = mode
        for name, y in outs:
            if not (y.isfinite().all() and y.std() > 0 and y.var(0, correction=0).mean() >= share*y.var(correction=0)): return name
        return ""
    for answer in (first_dead, by_torchs_hooks): E7.check_first_dead(answer)
    assert capsys.readouterr().out.count("✓") == 2
    for options, word in ((dict(nan=False), "not finite"), (dict(std=False), "std of 0"), (dict(inputs=False), "inputs"), (dict(order=False), "order of running"), (dict(last=True), "the answer is"),
                          (dict(fixed=True), "use the argument"), (dict(evaluate=False), "evaluation mode"), (dict(lost=torch.isnan), "bias of inf"), (dict(lost=torch.isinf), "bias of NaN"),
                          (dict(inside=False), "any depth"), (dict(power=.5), "not stds")): refuses(E7.check_first_dead, lambda m, x, share=1e-3: first_dead(m, x, share, **options), word)
    def trains(m, x, share=1e-3): name = first_dead(m, x, share); m.train(); return name
    refuses(E7.check_first_dead, trains, "mode has changed")
    refuses(E7.check_first_dead, lambda m, x, share=1e-3: first_dead(m, x, share) or None, "returned None")
    def leaves(m, x, share=1e-3): m[0].register_forward_hook(lambda *a: None) if isinstance(m, nn.Sequential) else None; return first_dead(m, x, share)
    refuses(E7.check_first_dead, leaves, "left behind")


def test_predictions_of_07(capsys):
    left = .5 - 1/(2*math.pi)
    right = dict(all_at_once=1024, tripled=1, behind=left**.5, bounded=2, centred=(.5/left)**14)
    for answer in (right, right | dict(behind=torch.tensor(.58), centred="214")): E7.check_predictions(answer)
    for key, value, word in (("all_at_once", 1, "all five"), ("tripled", 3, "does not know"), ("behind", .707, "mean square"), ("bounded", 4, "half"), ("centred", 1, "slope")):
        refuses(E7.check_predictions, right | {key: value}, word)
    names = {"sigmoid", "softplus", "tanh"}
    for answer in (names, sorted(names)): E7.check_centred(answer)
    assert capsys.readouterr().out.count("✓") == 4
    for answer, word in ((names | {"relu"}, "relu"), (names - {"tanh"}, "tanh"), (names | {"exp"}, "exp"), ({"x", 1}, "none of"), ([["a"]], "none of"), ("tanh", "set of names")):
        refuses(E7.check_centred, answer, word)
