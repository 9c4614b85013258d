"exp.backprop: laws, agreement with PyTorch, and every fault that the docstrings promise to name."
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn

from exp.backprop import (CrossEntropy, Linear, Module, MSE, ReLU, Sequential, accumulate, check_gradients,
                          finite_difference_grad, init_mlp, minibatches, mlp, train_mlp)
from exp.testing import test_like

sizes, seeds = st.integers(1, 7), st.integers(0, 2**31 - 1)


def rand(*shape, seed=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(ni, nf, bias=True, dtype=torch.float64):
    "Our layer with parameters of another dtype."
    layer = Linear(ni, nf, bias)
    return Linear.wrap(*[p.to(dtype) for p in layer.parameters()])


def twin(layer: Linear) -> nn.Linear:
    "PyTorch's layer with the same parameters."
    nf, ni = layer.weight.shape
    other = nn.Linear(ni, nf, bias=layer.bias is not None, dtype=layer.weight.dtype)
    with torch.no_grad():
        for p, q in zip(other.parameters(), layer.parameters()): p.copy_(q)
    return other


def same_pass(ours: Module, theirs, x, *targets, rtol=None, atol=None):
    "Output, gradient of the input, and gradients of the parameters agree with PyTorch's."
    leaf = x.clone().requires_grad_()
    want = theirs(leaf, *targets)
    got = ours(x, *targets)
    test_like(got, want.detach(), rtol, atol)
    grad = torch.ones(()) if want.ndim == 0 else rand(*want.shape, seed=9).to(want.dtype)
    want.backward(grad.to(want.dtype))
    test_like(ours.backward() if want.ndim == 0 else ours.backward(grad), leaf.grad, rtol, atol)
    for p, q in zip(ours.parameters(), theirs.parameters() if isinstance(theirs, nn.Module) else (), strict=True):
        test_like(p.grad, q.grad, rtol, atol)


# --- equal to PyTorch --------------------------------------------------------------------------------------------------------

@given(sizes, sizes, sizes, st.booleans(), seeds)
def test_linear(n, ni, nf, bias, seed):
    torch.manual_seed(seed)
    layer = linear(ni, nf, bias)
    same_pass(layer, twin(layer), rand(n, ni, seed=seed, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_any_leading_dimensions(shape, bias):
    layer = Linear(4, 3, bias=bias)
    same_pass(layer, twin(layer), rand(*shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype,tol", [(torch.float16, 2e-2), (torch.bfloat16, 6e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_linear_dtypes(dtype, tol):
    layer = linear(8, 5, dtype=dtype)
    same_pass(layer, twin(layer), rand(6, 8).to(dtype), rtol=tol, atol=tol)


def test_linear_start():
    torch.manual_seed(0)
    layer = Linear(400, 300)
    assert layer.weight.shape == (300, 400) and abs(layer.weight.var()*400/2 - 1) < .03 and not layer.bias.any()
    assert Linear(3, 2, bias=False).bias is None
    assert repr(Linear(3, 2)) == repr(nn.Linear(3, 2)) == "Linear(in_features=3, out_features=2, bias=True)"


def test_wrap_shares_its_tensors():
    w, b = rand(2, 3), rand(2)
    layer = Linear.wrap(w, b)
    assert layer.weight is w and layer.bias is b and Linear.wrap(w).bias is None


@pytest.mark.parametrize("scale", [1, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_relu(scale, dtype):
    x = (scale*rand(5, 7)).to(dtype)
    x[0, :3] = torch.tensor([0., -0., 1e-7], dtype=dtype)
    same_pass(ReLU(), nn.ReLU(), x, rtol=0, atol=0)


def test_relu_keeps_nan_and_inf():
    x, grad = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.]), torch.tensor([1., 2., 3., float("inf")])
    leaf, layer = x.clone().requires_grad_(), ReLU()
    F.relu(leaf).backward(grad)
    test_like(layer(x), F.relu(x)); test_like(layer.backward(grad), leaf.grad)
    test_like(ReLU()(torch.tensor([-2, 3])), F.relu(torch.tensor([-2, 3])))


@given(st.lists(sizes, min_size=0, max_size=3), seeds)
def test_mse(shape, seed):
    y = rand(*shape, seed=seed + 1, dtype=torch.float64)
    same_pass(MSE(), nn.MSELoss(), rand(*shape, seed=seed, dtype=torch.float64), y)


@given(sizes, sizes, st.sampled_from([1., 100., 1000.]), seeds)
def test_cross_entropy(n, c, scale, seed):
    logits = scale*rand(n, c, seed=seed, dtype=torch.float64)
    same_pass(CrossEntropy(), nn.CrossEntropyLoss(), logits, torch.randint(c, (n,)))


@pytest.mark.parametrize("dtype,tol", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
def test_losses_in_other_dtypes(dtype, tol):
    x, y = rand(6, 4).to(dtype), rand(6, 4, seed=1).to(dtype)
    same_pass(CrossEntropy(), nn.CrossEntropyLoss(), x, torch.randint(4, (6,)), rtol=tol, atol=tol)
    same_pass(MSE(), nn.MSELoss(), x, y, rtol=tol, atol=tol)


@pytest.mark.parametrize("row", [[100., -100.], [-100., 100.], [1e4, 0.], [-1e30, 1e30], [1000.]*2, [0., 0.]])
def test_cross_entropy_of_hostile_logits_is_finite(row):
    for target in (0, 1):
        loss_func, logits, y = CrossEntropy(), torch.tensor([row]), torch.tensor([target])
        test_like(loss_func(logits, y), F.cross_entropy(logits, y))
        assert loss_func.backward().isfinite().all()


@given(st.lists(sizes, min_size=2, max_size=4), sizes, seeds)
def test_a_whole_mlp(widths, n, seed):
    params = [p.double() for p in init_mlp(tuple(widths), seed)]
    model = mlp(params)
    assert len(model) == 2*(len(widths) - 1) - 1 and all(p is q for p, q in zip(model.parameters(), params, strict=True))
    theirs = nn.Sequential(*[twin(layer) if isinstance(layer, Linear) else nn.ReLU() for layer in model.layers])
    same_pass(model, theirs, rand(n, widths[0], seed=seed, dtype=torch.float64))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_sequential_is_a_list_of_layers():
    a, b = Linear(2, 3), ReLU()
    model = Sequential(a, b)
    assert model[0] is a and model[-1] is b and len(model) == 2
    assert repr(model) == "Sequential(Linear(in_features=2, out_features=3, bias=True), ReLU())"
    x = rand(2, 2)
    test_like(Sequential()(x), x); test_like(Sequential().backward(x), x)
    deep = Sequential(model, Linear(3, 1))
    assert [n for n, _ in deep.named_parameters()] == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    check_gradients(deep, x)


# --- laws ---------------------------------------------------------------------------------------------------------------------

@given(sizes, st.integers(2, 6), seeds)
def test_cross_entropy_gradient_rows_sum_to_zero_and_shift_changes_nothing(n, c, seed):
    loss_func, logits, y = CrossEntropy(), rand(n, c, seed=seed, dtype=torch.float64), torch.randint(c, (n,))
    loss = loss_func(logits, y); grad = loss_func.backward()
    test_like(grad.sum(1), torch.zeros(n, dtype=torch.float64), atol=1e-14)
    test_like(loss_func(logits + 50, y), loss, rtol=1e-9, atol=1e-9)
    test_like(loss_func.backward(), grad, rtol=1e-9, atol=1e-12)


@given(st.integers(2, 8), st.integers(1, 7), seeds)
def test_a_batch_is_the_mean_of_its_rows(n, c, seed):
    x, y = rand(n, 4, seed=seed, dtype=torch.float64), torch.randint(c, (n,))
    def grads(x, y):
        model, loss_func = mlp([p.double() for p in init_mlp((4, 5, c), seed)]), CrossEntropy()
        loss_func(model(x), y); model.backward(loss_func.backward())
        return [p.grad for p in model.parameters()]
    rows = [grads(x[i:i+1], y[i:i+1]) for i in range(n)]
    test_like(grads(x, y), [sum(gs)/n for gs in zip(*rows)], rtol=1e-9, atol=1e-12)


@given(seeds)
def test_backward_is_linear_in_the_gradient(seed):
    model = mlp([p.double() for p in init_mlp((4, 5, 3), seed)])
    x, g1, g2 = rand(6, 4, seed=seed, dtype=torch.float64), rand(6, 3, seed=seed + 1, dtype=torch.float64), rand(6, 3, seed=seed + 2, dtype=torch.float64)
    def back(grad): model(x); return model.backward(grad)
    test_like(back(2*g1 - 3*g2), 2*back(g1) - 3*back(g2), rtol=1e-9, atol=1e-10)
    loss_func = MSE()
    loss_func(g1, g2); one = loss_func.backward(); loss_func(g1, g2)
    test_like(loss_func.backward(3.), 3*one, rtol=1e-12)


@given(seeds)
def test_relu_units_conserve_their_balance(seed):
    w1, b1, w2, b2 = params = [p.double() for p in init_mlp((4, 6, 3), seed)]
    b1 += .1
    model, loss_func = mlp(params), CrossEntropy()
    loss_func(model(rand(9, 4, seed=seed, dtype=torch.float64)), torch.randint(3, (9,))); model.backward(loss_func.backward())
    test_like((w1*w1.grad).sum(1) + b1*b1.grad, (w2*w2.grad).sum(0), rtol=1e-7, atol=1e-12)


def test_gradients_add_up_until_they_are_emptied():
    layer, x, grad = Linear(3, 2), rand(4, 3), rand(4, 2)
    layer(x); layer.backward(grad); once = layer.weight.grad.clone()
    layer(x); layer.backward(grad)
    test_like(layer.weight.grad, 2*once)
    layer.zero_grad()
    assert layer.weight.grad is None and layer.bias.grad is None
    p = torch.zeros(2)
    accumulate(p, torch.ones(2)); accumulate(p, torch.ones(2))
    test_like(p.grad, torch.full((2,), 2.))


def test_nothing_is_taped():
    model, loss_func = mlp(init_mlp((3, 4, 2))), CrossEntropy()
    loss = loss_func(model(rand(5, 3)), torch.tensor([0, 1, 0, 1, 1]))
    grad = model.backward(loss_func.backward())
    assert not any(t.requires_grad for t in (loss, grad, *model.parameters(), *(p.grad for p in model.parameters())))


# --- the judges -----------------------------------------------------------------------------------------------------------------

@given(st.lists(sizes, max_size=3), seeds)
def test_finite_differences(shape, seed):
    x = rand(*shape, seed=seed, dtype=torch.float64)
    kept = x.clone()
    test_like(finite_difference_grad(lambda x: (x.sin() + x**3).sum(), x), kept.cos() + 3*kept**2, rtol=1e-6, atol=1e-7)
    assert torch.equal(x, kept), "x is restored bit for bit"


def test_finite_differences_step_and_empty():
    x = torch.tensor([1.], dtype=torch.float64)
    test_like(finite_difference_grad(lambda x: x**3, x, h=.1).item(), 3 + .1**2, rtol=1e-9)     # h² f'''/6 too large
    assert finite_difference_grad(lambda x: x.sum(), torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 3)


@pytest.mark.parametrize("at", [0., 1e-8, 3., -1e6, 1e12, -1e100])
def test_finite_differences_of_any_size(at):
    x = torch.tensor([at], dtype=torch.float64)
    test_like(finite_difference_grad(lambda x: 3*x, x).item(), 3., rtol=1e-9)
    if abs(at) < 1e20: test_like(finite_difference_grad(lambda x: x**2, x).item(), 2*at, rtol=1e-8, atol=1e-9)


def test_finite_differences_restore_x_when_the_function_fails():
    x = torch.tensor([1., 2.], dtype=torch.float64)
    with pytest.raises(ZeroDivisionError): finite_difference_grad(lambda x: 1/0, x)
    assert x.tolist() == [1., 2.]


@pytest.mark.parametrize("layer,args", [
    (Linear(4, 3), (rand(5, 4),)), (Linear(4, 3, bias=False), (rand(2, 5, 4),)), (ReLU(), (rand(5, 4),)),
    (MSE(), (rand(5, 4), rand(5, 4, seed=1))), (CrossEntropy(), (rand(5, 4), torch.tensor([0, 1, 2, 3, 0]))),
    (mlp(init_mlp((4, 6, 5, 2))), (rand(5, 4),)), (linear(4, 3, dtype=torch.float16), (rand(5, 4).half(),))], ids=lambda v: type(v).__name__)
def test_check_gradients_passes_what_is_right_and_leaves_it_alone(layer, args):
    before = copy.deepcopy([(p, p.grad) for p in layer.parameters()]), [a.clone() for a in args]
    errors = check_gradients(layer, *args)
    assert list(errors) == ["input", *(name for name, _ in layer.named_parameters())] and max(errors.values()) < 1e-8
    for (p, grad), q in zip(before[0], layer.parameters(), strict=True): assert torch.equal(p, q) and p.dtype == q.dtype and q.grad is grad is None
    assert all(map(torch.equal, before[1], args)) and layer._memory is None


def broken(parent, **methods): return type("Broken", (parent,), methods)


def wrong_linear(weight=1., bias=1., back=1.):
    def backward(self, grad):
        x, = self.recall(grad)
        if weight is not None: accumulate(self.weight, weight*grad.T @ x)
        accumulate(self.bias, bias*grad.sum(0))
        return back*grad @ self.weight
    return broken(Linear, backward=backward)(4, 3)


def test_a_backward_that_writes_into_its_gradient_is_caught():
    doubles = broken(ReLU, backward=lambda self, grad: torch.where(self.recall(grad)[0] <= 0, 0, grad.mul_(2)))()
    with pytest.raises(AssertionError, match="'input'"): check_gradients(doubles, rand(5, 4))


def test_what_is_not_finite_is_not_acquitted():
    nan = broken(ReLU, forward=lambda self, x: self.remember(x*float("nan"), x), backward=lambda self, grad: self.recall(grad)[0]*float("nan"))()
    with pytest.raises(AssertionError, match="'input' has no finite slope"): check_gradients(nan, rand(5, 4))


def test_a_shared_weight_is_one_parameter():
    one = Linear.wrap(rand(3, 3, seed=1), rand(3, seed=2))
    two = Linear.wrap(one.weight, torch.zeros(3))
    model = Sequential(one, ReLU(), two)
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in (one.weight, one.bias, two.bias)]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert max(check_gradients(model, rand(4, 3)).values()) < 1e-8


@pytest.mark.parametrize("spoil", [lambda g: g[:1], lambda g: [*g, g[0]], lambda g: [g[0], g[1].sum(), *g[2:]], lambda g: [g[0], g[1][None], *g[2:]]])
def test_no_half_step_is_taken(spoil):
    params = init_mlp((4, 3, 2))
    before = [p.clone() for p in params]
    with pytest.raises((ValueError, RuntimeError)):
        train_mlp(lambda p, x, y: (0., iter(spoil([torch.ones_like(w) for w in p]))), params, rand(5, 4), torch.zeros(5))
    test_like(params, before)


def test_the_walk_leaves_the_slots_empty():
    "An engine that adds to `.grad`, as a layer's backward does, must find nothing there."
    def layers(params, xb, yb):
        model, loss_func = mlp(params), CrossEntropy()
        loss = loss_func(model(xb), yb); model.backward(loss_func.backward())
        return loss, [p.grad for p in params]
    x, y = rand(20, 4), torch.randint(3, (20,))
    added, emptied = init_mlp((4, 5, 3)), init_mlp((4, 5, 3))
    train_mlp(layers, added, x, y, bs=5); train_mlp(engine, emptied, x, y, bs=5)
    test_like(added, emptied, rtol=0, atol=0)
    assert all(p.grad is None for p in added)


@pytest.mark.parametrize("layer,word", [
    (wrong_linear(weight=1 + 1e-4), "'weight'"), (wrong_linear(bias=.5), "'bias'"), (wrong_linear(back=-1.), "'input'"),
    (wrong_linear(weight=None), "'weight'"), (wrong_linear(back=float("nan")), "'input'"),
    (broken(ReLU, backward=lambda self, grad: self.recall(grad) and None)(), "None"),
    (broken(ReLU, backward=lambda self, grad: self.recall(grad)[0].sum(0))(), "shape"),
    (broken(ReLU, backward=lambda self, grad: self.recall(grad) and grad)(), "'input'")])
def test_check_gradients_catches_what_is_wrong(layer, word):
    with pytest.raises(AssertionError, match=word): check_gradients(layer, rand(5, 4))


def test_check_gradients_of_a_used_layer_and_any_strides():
    layer, x = Linear(4, 3), rand(4, 5, dtype=torch.float64).T
    layer(x.float()); layer.backward(rand(5, 3)); kept = layer.weight.grad.clone()
    check_gradients(layer, x); check_gradients(ReLU(), rand(1, 4).expand(5, 4))
    test_like(layer.weight.grad, kept)
    check_gradients(Linear.wrap(rand(4, 3).T), x)


def test_check_gradients_is_not_fooled_by_its_own_numbers():
    slipped = broken(ReLU, backward=lambda self, grad: self.recall(grad) and grad*(grad > 0))()
    for seed in range(3):
        with pytest.raises(AssertionError): check_gradients(slipped, rand(5, 4, seed=seed))


def test_check_gradients_tolerances_and_step():
    layer = wrong_linear(weight=1 + 1e-4)
    check_gradients(layer, rand(5, 4), rtol=1e-3)
    check_gradients(wrong_linear(bias=1 + 1e-4), rand(5, 4), atol=.1)
    with pytest.raises(AssertionError): check_gradients(CrossEntropy(), rand(5, 4), torch.arange(4).repeat(2)[:5], h=.5)


# --- the walk -----------------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 50), st.integers(1, 60), seeds)
def test_minibatches_deal_each_example_once(n, bs, seed):
    batches = list(minibatches(n, bs, seed))
    assert sorted(torch.cat(batches).tolist()) == list(range(n)) and all(b.dtype == torch.int64 for b in batches)
    assert [len(b) for b in batches[:-1]] == [bs]*(len(batches) - 1) and 1 <= len(batches[-1]) <= bs
    again = list(minibatches(n, bs, seed))
    assert all(map(torch.equal, batches, again))


def test_minibatches_and_init_leave_the_global_generator_alone():
    torch.manual_seed(1); want = torch.rand(3)
    torch.manual_seed(1); list(minibatches(9, 2, 5)); init_mlp(seed=7)
    test_like(torch.rand(3), want)
    assert not torch.equal(torch.cat(list(minibatches(50, 50, 0))), torch.cat(list(minibatches(50, 50, 1))))


def test_init_mlp():
    params = init_mlp((50, 40, 30, 2), seed=3)
    assert [tuple(p.shape) for p in params] == [(40, 50), (40,), (30, 40), (30,), (2, 30), (2,)]
    assert all(p.dtype == torch.float32 for p in params) and not any(p.any() for p in params[1::2])
    test_like(params, init_mlp((50, 40, 30, 2), seed=3))
    assert not torch.equal(params[0], init_mlp((50, 40, 30, 2), seed=4)[0])
    assert abs(params[0].var()*50/2 - 1) < .15 and sum(p.numel() for p in init_mlp()) == 79_510


def engine(params, xb, yb):
    model, loss_func = mlp(params), CrossEntropy()
    model.zero_grad(); loss = loss_func(model(xb), yb); model.backward(loss_func.backward())
    return loss, [p.grad for p in params]


def test_train_mlp_takes_the_steps_of_torch_sgd():
    x, y = rand(23, 4, dtype=torch.float64), torch.randint(3, (23,))
    params, theirs = ([p.double() for p in init_mlp((4, 6, 3), 1)] for _ in range(2))
    leaves = [p.requires_grad_() for p in theirs]
    opt, seen, want = torch.optim.SGD(leaves, lr=.3), [], []
    losses = train_mlp(engine, params, x, y, epochs=3, bs=5, lr=.3, seed=2, after_epoch=seen.append)
    for epoch in range(3):
        for i in minibatches(23, 5, 2000 + epoch):
            w1, b1, w2, b2 = leaves
            loss = F.cross_entropy(F.linear(F.relu(F.linear(x[i], w1, b1)), w2, b2), y[i])
            opt.zero_grad(); loss.backward(); opt.step(); want.append(loss.item())
    assert seen == [0, 1, 2] and losses == pytest.approx(want, rel=1e-9) and len(losses) == 15
    test_like(params, [p.detach() for p in leaves], rtol=1e-9, atol=1e-12)


def test_training_learns():
    x = rand(400, 8)
    losses = train_mlp(engine, init_mlp((8, 16, 2)), x, (x[:, 0]*x[:, 1] > 0).long(), epochs=30, bs=20)
    assert sum(losses[-20:]) < .5*sum(losses[:20])


# --- bad input gets a clear word --------------------------------------------------------------------------------------------------------

FAULTS = {
    "relu backward first": (lambda: ReLU().backward(rand(2)), RuntimeError, r"ReLU\(\): every backward needs a forward"),
    "linear backward first": (lambda: Linear(2, 2).backward(rand(1, 2)), RuntimeError, "Linear.* needs a forward before it"),
    "mse backward first": (lambda: MSE().backward(), RuntimeError, r"MSE\(\): every backward"),
    "cross-entropy backward first": (lambda: CrossEntropy().backward(), RuntimeError, r"CrossEntropy\(\): every backward"),
    "model backward first": (lambda: mlp(init_mlp((2, 3, 2))).backward(rand(1, 2)), RuntimeError, "needs a forward before it"),
    "mse shapes": (lambda: MSE()(rand(4, 1), rand(4)), ValueError, r"pred is \(4, 1\), y \(4,\)"),
    "ce vector": (lambda: CrossEntropy()(rand(3), torch.tensor(1)), ValueError, r"logits \(3,\)"),
    "ce lengths": (lambda: CrossEntropy()(rand(3, 2), torch.tensor([1])), ValueError, r"targets \(1,\)"),
    "ce one-hot": (lambda: CrossEntropy()(rand(3, 2), rand(3, 2)), ValueError, r"targets \(3, 2\)"),
    "ce images": (lambda: CrossEntropy()(rand(2, 3, 4), torch.tensor([0, 1])), ValueError, r"logits \(2, 3, 4\)"),
    "ce square one-hot": (lambda: CrossEntropy()(rand(3, 3), torch.eye(3).long()), ValueError, r"targets \(3, 3\)"),
    "fd float32": (lambda: finite_difference_grad(torch.sum, rand(2)), ValueError, "x is torch.float32"),
    "fd strides": (lambda: finite_difference_grad(torch.sum, rand(2, 3).double().T), ValueError, r"strides \(1, 3\)"),
    "mlp odd": (lambda: mlp(init_mlp()[:3]), ValueError, "shorter"),
    "train lengths": (lambda: train_mlp(engine, init_mlp((4, 3, 2)), rand(5, 4), torch.zeros(6).long()), ValueError, "x has 5 examples, y 6"),
    "train, a gradient that would be stretched": (lambda: train_mlp(lambda p, x, y: (0., [p[0]*1, p[1].sum(), *p[2:]]), init_mlp((4, 3, 2)), rand(5, 4), torch.zeros(5)),
                                                  RuntimeError, "grad"),
    "train forgets a gradient": (lambda: train_mlp(lambda p, x, y: (0., [p[0]*1]), init_mlp((4, 3, 2)), rand(5, 4), torch.zeros(5)), ValueError, "zip"),
}


@pytest.mark.parametrize("call,error,word", FAULTS.values(), ids=FAULTS)
def test_faults_are_named(call, error, word):
    with pytest.raises(error, match=word): call()


@pytest.mark.parametrize("call", [
    lambda: Linear(3, 2)(rand(4, 5)), lambda: Linear(3, 2)(torch.tensor(1.)), lambda: Linear(3, 2)(torch.ones(4, 3).long()), lambda: Linear(3, 2)(torch.ones(4, 3).half()),
    lambda: MSE()(torch.ones(3).long(), torch.ones(3).long()), lambda: CrossEntropy()(rand(3, 2), torch.zeros(3)), lambda: CrossEntropy()(rand(2, 0), torch.zeros(2).long()),
    lambda: CrossEntropy()(rand(3, 2), torch.tensor([0, 1, 2])), lambda: CrossEntropy()(rand(3, 2), torch.tensor([0, -1, 1])), lambda: check_gradients(ReLU(), rand(0, 2))])
def test_where_pytorchs_error_is_clear_it_is_ours(call):
    with pytest.raises((RuntimeError, IndexError)): call()


def test_an_empty_batch_is_nan_as_in_pytorch():
    for loss_func, args in ((MSE(), (rand(0, 3), rand(0, 3))), (CrossEntropy(), (rand(0, 3), torch.zeros(0).long()))): assert loss_func(*args).isnan()


def test_each_forward_pays_for_one_backward():
    layer, x = ReLU(), rand(3)
    layer(x); layer.backward(x)
    with pytest.raises(RuntimeError, match="used twice is two objects"): layer.backward(x)
    shared = ReLU()
    model = Sequential(Linear(2, 2), shared, Linear(2, 2), shared)
    model(rand(3, 2))
    with pytest.raises(RuntimeError, match="two objects"): model.backward(rand(3, 2))


def test_a_gradient_of_the_wrong_shape_is_refused_and_nothing_is_lost():
    layer, x = Linear(3, 2), rand(4, 3)
    layer(x)
    with pytest.raises(ValueError, match=r"\(2,\), the output had \(4, 2\)"): layer.backward(rand(2))
    layer.backward(rand(4, 2))
    assert layer.weight.grad.shape == (2, 3)


def test_gradients_that_lie_about_are_not_added():
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    def engine(params, xb, yb):
        with torch.enable_grad(): loss = F.cross_entropy(F.linear(xb, *params), yb)
        loss.backward()
        return loss.detach(), [p.grad for p in params]
    ends = []
    for look in (False, True):
        torch.manual_seed(0); params = [torch.randn(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)]
        if look: engine(params, x, y)
        with torch.no_grad(): train_mlp(engine, params, x, y, epochs=1, bs=4)
        ends.append([p.detach() for p in params])
    for p, q in zip(*ends, strict=True): assert torch.equal(p, q)


def test_numbers_that_share_memory_are_not_nudged_one_by_one():
    for x in (torch.ones(1, dtype=torch.float64).expand(3), torch.ones(3, 2, dtype=torch.float64).T):
        with pytest.raises(ValueError, match="strides .*contiguous"): finite_difference_grad(lambda t: t.sum(), x)
