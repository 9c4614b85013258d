"The tape: every operation against PyTorch's tape and against finite differences, laws, hazards, memory, depth, errors."
import copy
import gc
import operator
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from exp.autograd import Node, Tensor, draw_graph, gradcheck, no_grad, tape_size, taped, toposort, unbroadcast
from exp.testing import test_like

F64 = torch.float64


def normal(*shape, seed=0): return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed + 7*sum(shape)))


def positive(*shape): return normal(*shape).abs() + .5


def both(func, *arrays, torch_func=None, rtol=1e-10, atol=1e-12):
    "Run a function on both tapes with the same random gradient; values, gradients, shapes and dtypes must agree."
    ours = [Tensor(a.clone(), requires_grad=a.is_floating_point()) for a in arrays]
    theirs = [a.clone().requires_grad_(a.is_floating_point()) for a in arrays]
    y, expected = func(*ours), (torch_func or func)(*theirs)
    test_like(y.data, expected, rtol=rtol, atol=atol)
    g = torch.linspace(-1, 2, expected.numel(), dtype=F64).reshape(expected.shape).to(expected.dtype)
    y.backward(g); expected.backward(g)
    for o, t in zip(ours, theirs):
        if t.grad is None: assert o.grad is None or not o.grad.any()
        else:
            test_like(o.grad, t.grad, rtol=rtol, atol=atol)
            assert o.grad.is_contiguous() or o.data.stride() == o.grad.stride()


CASES = {
    "0-d times a vector": (lambda a, b: a*b - b/a, positive(), normal(3)), "0-d index": (lambda a: a[()]*a[...]*a[None], normal()),
    "0-d power": (lambda a, b: a**b, positive(), normal()), "one in all": (lambda a: a.sum((0, 1)) + a.mean(-1).sum(), normal(1, 1)),
    "add": (lambda a, b: a + b, normal(2, 3), normal(3)), "add number": (lambda a: 1 + a + 2., normal(3)),
    "subtract": (lambda a, b: a - b, normal(2, 1), normal(1, 3)), "subtract from": (lambda a: 1 - a - 2, normal(3)),
    "multiply": (lambda a, b: a*b, normal(4, 1, 3), normal(2, 1)), "multiply number": (lambda a: 2*a*3., normal(3)),
    "divide": (lambda a, b: a/b, positive(2, 3), positive(2, 1)), "divide number": (lambda a: 1/a + a/3, positive(3)),
    "negate": (lambda a: -a, normal(3)),
    "power": (lambda a, b: a**b, positive(2, 3), normal(3)), "square": (lambda a: a**2, normal(3)),
    "cube": (lambda a: a**3, normal(3)), "root": (lambda a: a**.5, positive(3)), "inverse": (lambda a: a**-1., positive(3)),
    "power 0": (lambda a: a**0, normal(3)), "base 2": (lambda a: 2**a, normal(3)), "base 0": (lambda a: 0**a, positive(3)),
    "matmul": (lambda a, b: a @ b, normal(2, 3), normal(3, 4)), "matmul vector": (lambda a, b: a @ b, normal(2, 3), normal(3)),
    "vector matmul": (lambda a, b: a @ b, normal(3), normal(3, 2)), "dot": (lambda a, b: a @ b, normal(3), normal(3)),
    "matmul stack": (lambda a, b: a @ b, normal(5, 1, 2, 3), normal(4, 3, 2)),
    "matmul stack vector": (lambda a, b: a @ b, normal(5, 2, 3), normal(3)),
    "vector matmul stack": (lambda a, b: a @ b, normal(3), normal(5, 3, 2)),
    "matmul shared weight": (lambda a, b: a @ b, normal(5, 2, 3), normal(3, 2)),
    "exp": (lambda a: a.exp(), normal(3)), "log": (lambda a: a.log(), positive(3)), "tanh": (lambda a: a.tanh(), normal(3)),
    "relu": (lambda a: a.relu(), normal(9)), "relu at 0": (lambda a: a.relu(), torch.tensor([0., -0., 1.], dtype=F64)),
    "sum": (lambda a: a.sum(), normal(2, 3)), "sum 0": (lambda a: a.sum(0), normal(2, 3)),
    "sum -1 keep": (lambda a: a.sum(-1, keepdim=True), normal(2, 3)), "sum two": (lambda a: a.sum((0, 2)), normal(2, 3, 4)),
    "sum two keep": (lambda a: a.sum(dim=(2, 0), keepdim=True), normal(2, 3, 4)), "sum scalar": (lambda a: a.sum(0), normal()),
    "mean": (lambda a: a.mean(), normal(2, 3)), "mean 1": (lambda a: a.mean(dim=1), normal(2, 3)),
    "mean two keep": (lambda a: a.mean((0, 1), keepdim=True), normal(2, 3, 4)), "mean scalar": (lambda a: a.mean(), normal()),
    "reshape": (lambda a: a.reshape(3, -1), normal(2, 3)), "reshape tuple": (lambda a: a.reshape((6,)), normal(2, 3)),
    "transpose": (lambda a: a.transpose(0, -1), normal(2, 3, 4)), "T": (lambda a: a.T*1, normal(2, 3)),
    "item": (lambda a: a[1], normal(3)), "row": (lambda a: a[-1], normal(2, 3)), "slice": (lambda a: a[1:, ::2], normal(3, 4)),
    "ellipsis": (lambda a: a[..., None, 1:], normal(2, 3)), "list": (lambda a: a[[2, 0, 0]], normal(3, 2)),
    "pairs": (lambda a: a[[0, 1, 1], [2, 2, 2]], normal(2, 3)), "mask": (lambda a: a[a > 0], normal(9)),
    "index tensor": (lambda a: a[torch.tensor([[1, 1], [0, 1]])], normal(2, 3)), "index mixed": (lambda a: a[:, torch.tensor([1, 1, 0])], normal(2, 3)),
    "negative index": (lambda a: a[torch.tensor([-1, 0, -1])], normal(4)), "numpy index": (lambda a: a[np.array([1, 1])], normal(3)),
}


@pytest.mark.parametrize("name", CASES)
def test_operation_matches_pytorch_and_finite_differences(name):
    func, *arrays = CASES[name]
    both(func, *arrays)
    if name not in ("relu at 0", "base 0"): assert gradcheck(func, *arrays) < 1e-6


MAX = {"all": {}, "all keep": dict(keepdim=True), "0": dict(dim=0), "-1 keep": dict(dim=-1, keepdim=True), "two": dict(dim=(0, 2))}


@pytest.mark.parametrize("options", MAX.values(), ids=MAX)
@pytest.mark.parametrize("ties", [False, True])
def test_max_is_amax(options, ties):
    a = normal(2, 3, 4)
    if ties: a = (2*a).round()
    theirs = {"dim": (), **options}
    both(lambda a: a.max(**options), a, torch_func=lambda a: torch.amax(a, **theirs))
    if not ties: gradcheck(lambda a: a.max(**options), a)


def test_every_operation_of_the_tape_is_covered():
    taped_names = {v.__name__.strip("_") for v in vars(Tensor).values() if hasattr(v, "__wrapped__") and not isinstance(v, classmethod)}
    seen = {"max"}
    for func, *arrays in CASES.values():
        seen |= {node.name for node in toposort(func(*(Tensor(a, True) for a in arrays)).node)}
    assert taped_names == seen - {"leaf"} and len(taped_names) == 17


DTYPES = [(torch.float32, torch.float64), (torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float32, torch.int64),
          (torch.float16, torch.float16), (torch.bfloat16, torch.int64), (torch.float64, torch.uint8)]


@pytest.mark.parametrize("left,right", DTYPES)
def test_dtypes_promote_and_gradients_come_home(left, right):
    a, b = torch.tensor([[1, 2], [3, 4]]).to(left), torch.tensor([4, 5]).to(right)
    both(lambda a, b: (a*b + a - b/a).sum(), a, b, rtol=2e-2, atol=1e-2)
    both(lambda a, b: (a**2).mean(0) + b, a, b, rtol=2e-2, atol=1e-2)
    both(lambda a: a.max(), a, rtol=1e-2, atol=1e-3)
    both(lambda a: a[[0, 0, 1]], a, rtol=1e-2, atol=1e-3)
    both(lambda a, b: (a @ a)*b, a, b, rtol=2e-2, atol=1e-2)    # the wide gradient must be narrowed before the matmul


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_do_not_widen(dtype):
    a = Tensor(torch.ones(2, dtype=dtype), True)
    for y in (a + 1, 1.5*a, a/3, 2 - a, a**2, 2**a, a**.5, a.mean()): assert y.dtype == dtype
    (2**(a*1.5/3)).sum().backward()
    assert a.grad.dtype == dtype


HOSTILE = torch.tensor([-100., -1., -0., 0., 1., 100.])


@pytest.mark.parametrize("name", ["exp", "tanh", "relu", "log", "cube", "sum", "mean", "divide number", "base 2", "root", "inverse"])
def test_hostile_values_as_pytorch(name):
    func, *_ = CASES[name]
    with np.errstate(all="ignore"): both(func, HOSTILE.clone(), rtol=1e-6, atol=0)


def test_nan_and_inf_flow_as_in_pytorch():
    a = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.])
    for name in ("relu", "tanh", "exp", "multiply number"): both(CASES[name][0], a, rtol=1e-6, atol=0)


@pytest.mark.parametrize("base,exponent", [(0., 0.), (0., 1.), (0., 2.), (0., .5), (2., 0.), (-2., 2.), (-2., 3.)])
def test_corners_of_power(base, exponent):
    both(lambda a, b: a**b, torch.tensor([base], dtype=F64), torch.tensor([exponent], dtype=F64))
    both(lambda a: a**exponent, torch.tensor([base], dtype=F64))


@pytest.mark.parametrize("name", ["add", "matmul", "relu", "sum 0", "slice"])
def test_batch_of_one_and_empty_batch(name):
    func, *arrays = CASES[name]
    both(func, arrays[0][:1], *arrays[1:])
    both(func, arrays[0][:0], *arrays[1:])


def test_max_of_nothing_is_refused_as_in_pytorch():
    for call in (lambda t: t.max(), lambda t: t.max(dim=0)):
        with pytest.raises((RuntimeError, IndexError)): call(Tensor(torch.empty(0, 3)))
    both(lambda a: a.max(dim=1), normal(0, 3), torch_func=lambda a: a.amax(1))


# -- laws ----------------------------------------------------------------------------------------

@given(mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=3))
def test_broadcasting_is_summed_back(shapes):
    (one, two), _ = shapes.input_shapes, shapes.result_shape
    both(lambda a, b: a*b + a - b, normal(*one), normal(*two, seed=1))


@given(mutually_broadcastable_shapes(num_shapes=1, base_shape=(2, 3, 1, 4), max_dims=4, max_side=4))
def test_unbroadcast_is_sum_to_size(shapes):
    (shape,), result = shapes.input_shapes, shapes.result_shape
    g = normal(*result)
    test_like(unbroadcast(g, shape), g.sum_to_size(shape))


@given(st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(1, 3), max_size=3))
def test_unbroadcast_refuses_what_sum_to_size_refuses(one, two):
    g = torch.ones(one)
    try: want = g.sum_to_size(two)
    except RuntimeError: want = None
    if want is None:
        with pytest.raises(ValueError): unbroadcast(g, tuple(two))
    else: test_like(unbroadcast(g, tuple(two)), want)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))
def test_backward_is_linear_in_the_gradient(seed, p, q):
    x, g, h = normal(2, 3, seed=seed), normal(2, 3, seed=seed + 1), normal(2, 3, seed=seed + 2)
    def pull(gradient):
        t = Tensor(x, True)
        ((t.tanh()*t).exp() + t/3).backward(gradient)
        return t.grad
    test_like(pull(p*g + q*h), p*pull(g) + q*pull(h), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_batch_size_does_not_matter(seed, bs):
    w, x = normal(3, 2, seed=seed), normal(bs, 3, seed=seed + 1)
    def grad(rows):
        t = Tensor(w, True)
        (rows @ t).tanh().sum().backward()
        return t.grad
    test_like(grad(x), sum(grad(row[None]) for row in x), rtol=1e-10, atol=1e-10)


@given(st.permutations(range(5)))
def test_permuting_rows_permutes_gradients(order):
    x, w = normal(5, 3), normal(5, 3, seed=1)
    def grad(rows, weights):
        t = Tensor(rows, True)
        (t.exp()*weights).sum().backward()
        return t.grad
    order = torch.tensor(order)
    test_like(grad(x[order], w[order]), grad(x, w)[order])


OPERATIONS = [lambda a, b: a + b, lambda a, b: a*b, lambda a, b: a - b, lambda a, b: a.tanh(), lambda a, b: a.relu() + b, lambda a, b: (a*.1).exp(),
              lambda a, b: a @ b.T, lambda a, b: a[[1, 0, 1]]*b, lambda a, b: a.sum(0)*b, lambda a, b: a/(b*b + 1)]


@given(st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_random_programs_match_pytorch(program):
    "Values are shared freely between steps, so that the graph has every kind of meeting point."
    def run(*values):
        values = list(values)
        for which, i, j in program:
            values.append(OPERATIONS[which](values[i % len(values)], values[j % len(values)])*.5)
        return values[-1]
    both(run, normal(3, 3), normal(3, 3, seed=1), rtol=1e-9, atol=1e-11)


@given(st.data())
def test_getitem_accumulates_repeats(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    index = torch.tensor(data.draw(st.lists(st.integers(-shape[0], shape[0] - 1), min_size=0, max_size=8)), dtype=torch.int64)
    both(lambda a: a[index]*2, normal(*shape))
    expected = torch.zeros(shape, dtype=F64).index_put_((index,), torch.ones(len(index), *shape[1:], dtype=F64), accumulate=True)
    t = Tensor(normal(*shape), True); t[index].sum().backward()
    test_like(t.grad, expected)


# -- backward ------------------------------------------------------------------------------------

def test_shared_subexpressions():
    u = Tensor([1., 2., 3.], True)
    s = u*u
    (s*(s + u) + s).sum().backward()
    test_like(u.grad, 4*u.data**3 + 3*u.data**2 + 2*u.data)


def test_diamonds_cost_one_visit_a_node():
    calls = []
    @taped
    def double(a):
        def vjp(g): calls.append(1); return 2*g
        return 2*a, vjp
    x = t = Tensor(1., True)
    for _ in range(20): t = double(t) + 0*t      # 2**20 paths, 20 nodes
    t.backward()
    assert len(calls) == 20 and x.grad == 2**20


def test_grad_starts_none_accumulates_and_owns_its_memory():
    a, b = Tensor(torch.ones(2), True), Tensor(torch.ones(2), True)
    assert a.grad is None
    g = torch.ones(2)
    (a + b).backward(g)
    assert a.grad.data_ptr() not in (b.grad.data_ptr(), g.data_ptr())
    held = a.grad
    a.sum().backward()                            # an expanded gradient, added in place
    assert held is a.grad and held.tolist() == [2., 2.] and b.grad.tolist() == [1., 1.]
    c = Tensor(torch.ones(3), True); c.sum().backward(); c.grad.zero_()


def test_a_leaf_is_its_own_result():
    a = Tensor(3., True); a.backward(); assert a.grad == 1


def test_gradient_argument():
    a = Tensor([1., 2.], True)
    for g in ([1., 2.], torch.tensor([1., 2.], dtype=F64), np.array([1., 2.]), Tensor([1., 2.])):
        a.grad = None; (a*2).backward(g); test_like(a.grad, [2., 4.])
    one = Tensor([[3.]], True); (one*2).backward(); test_like(one.grad, [[2.]])
    with pytest.raises(ValueError, match=r"shape \(2,\) needs a gradient"): (a*2).backward()
    with pytest.raises(ValueError, match=r"gradient is \(1,\), the tensor \(2,\)"): (a*2).backward([1.])
    with pytest.raises(ValueError, match="no tape"): Tensor([1.]).backward()


def test_constants_and_torch_tensors_mix():
    a, plain = Tensor([1., 2.], True), torch.tensor([3., 4.])
    for y in (plain*a, a*plain, plain + a, plain - a, plain/a, plain**a, np.array([3., 4.])*a, np.float64(3)*a, a*np.array([1., 1.])):
        assert isinstance(y, Tensor) and y.requires_grad
    y = torch.eye(2) @ a; assert isinstance(y, Tensor); y.sum().backward(); test_like(a.grad, [1., 1.])
    foreign = plain.clone().requires_grad_()
    assert not (a*foreign).data.requires_grad and not Tensor(foreign).data.requires_grad
    assert sum([a, a], start=0).requires_grad


def test_gradients_of_constants_are_never_computed():
    @taped
    def spoiled(a, b): return a*b, lambda g: g*b, lambda g: 1/0
    a = Tensor(2., True)
    spoiled(a, Tensor(3.)).backward(); spoiled(a, torch.tensor(3.)).backward(); spoiled(a, 3.).backward()
    assert a.grad == 9


def test_second_backward_refuses_unless_retained():
    a = Tensor([1., 2.], True)
    y = a.exp().sum()
    y.backward(retain_graph=True); y.backward()
    test_like(a.grad, 2*a.data.exp())
    with pytest.raises(RuntimeError, match="'sum' was freed by an earlier backward: say retain_graph=True"): y.backward()
    t = torch.tensor([1., 2.], requires_grad=True).exp().sum(); t.backward()
    with pytest.raises(RuntimeError): t.backward()
    trunk = a*2
    trunk.sum().backward()
    with pytest.raises(RuntimeError, match="'mul' was freed"): (trunk*3).sum().backward()


# -- what is recorded ----------------------------------------------------------------------------

def test_requires_grad():
    a = Tensor([1., 2.])
    assert not a.requires_grad and a.requires_grad_() is a and a.requires_grad
    node = a.node
    assert a.requires_grad_().node is node
    assert not a.requires_grad_(False).requires_grad
    a.requires_grad_(); y = a*2
    assert y.requires_grad_() is y and y.node.name == "mul"
    z = a*3; assert not z.requires_grad_(False).requires_grad and a.requires_grad
    (y + z).sum().backward(); test_like(a.grad, [2., 2.])           # z was told to be a constant
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64):
        with pytest.raises(TypeError, match="has no derivatives"): Tensor(torch.ones(2, dtype=dtype), requires_grad=True)
    ints = Tensor(torch.arange(3)); assert (ints.sum() + 1).item() == 4 and not (ints*2).requires_grad


def test_detach_and_no_grad():
    a = Tensor(3., True)
    (a*a.detach()).backward(); assert a.grad == 3 and a.detach().data.data_ptr() == a.data.data_ptr()
    with no_grad():
        assert not (a*a).requires_grad
        with no_grad(): pass
        assert not (a*a).requires_grad
    assert (a*a).requires_grad
    with pytest.raises(KeyError):
        with no_grad(): raise KeyError
    assert (a*a).requires_grad
    @no_grad()
    def quiet(): return a*a
    assert not quiet().requires_grad and not quiet().requires_grad and (a*a).requires_grad


def test_no_grad_is_a_matter_of_one_thread():
    a, seen = Tensor(3., True), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((a*a).requires_grad)); thread.start(); thread.join()
    assert seen == [True]


def test_comparisons_are_plain():
    a, b = Tensor([1., 2., 3.], True), torch.tensor([2., 2., 2.])
    for sign in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
        for other in (2, b, Tensor(b)):
            got = sign(a, other)
            assert type(got) is torch.Tensor; test_like(got, sign(a.data, b))
    assert len({a, a, Tensor(b)}) == 2            # still hashable, by identity


def test_a_tensor_behaves():
    a = Tensor([[1., 2.], [3., 4.]], True)
    assert a.shape == (2, 2) and a.ndim == 2 and a.dtype == torch.float32 and len(a) == 2 and a[1, 1].item() == 4
    assert [row.sum().item() for row in a] == [3, 7]
    assert repr(Tensor([1.])) == "Tensor([1.])" and repr(Tensor([1.], True)) == "Tensor([1.], requires_grad=True)"
    assert repr(Tensor([1.], True)*2) == "Tensor([2.], mul)"
    assert Tensor(1) and not Tensor(0) and Tensor(a).data is a.data
    with pytest.raises(RuntimeError): bool(a)
    with pytest.raises(TypeError): iter(list(Tensor(1.)))
    for shape in ((), (2,), (2, 2, 2)):
        with pytest.raises(ValueError, match="T: .* is no matrix; use .transpose"): _ = Tensor(torch.ones(shape)).T
    with pytest.raises(TypeError): a + "a"
    array = torch.ones(2); shared = Tensor(array); array += 1; assert shared.data.tolist() == [2., 2.]


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_has_a_gradient_of_its_own(clone):
    a = Tensor([1., 2.], True)
    b = clone(a)
    (b*2).sum().backward()
    assert a.grad is None and b.grad.tolist() == [2., 2.]
    assert not clone(a*2).requires_grad


# -- arrays that change --------------------------------------------------------------------------

CHANGES = {"exp": (lambda a: a.exp(), "result"), "tanh": (lambda a: a.tanh(), "result"), "relu": (lambda a: a.relu(), "result"),
           "log": (lambda a: a.log(), "input"), "multiply": (lambda a: a*a, "input"), "max": (lambda a: a.max(dim=0), "input"),
           "power": (lambda a: a**3, "input"), "matmul": (lambda a: a @ a, "input"), "through a view": (lambda a: a.reshape(4).exp().reshape(2, 2), "result")}


@pytest.mark.parametrize("name", CHANGES)
def test_changing_a_saved_array_is_refused(name):
    func, what = CHANGES[name]
    a, bystander = Tensor(torch.rand(2, 2) + 1, True), Tensor(1., True)
    y = func(a)
    (y if what == "result" else a).data.add_(1)
    with pytest.raises(RuntimeError, match="needs an array .* that was changed in place"): (y.sum() + bystander).backward()
    assert a.grad is None and bystander.grad is None      # refused before anything was delivered


@pytest.mark.parametrize("keep", [list, tuple, lambda arrays: arrays[0], lambda arrays: (lambda g: g*arrays[0])])
def test_a_rule_may_keep_its_arrays_in_any_of_these(keep):
    @taped
    def square(a):
        held = keep([a*2])
        def vjp(g): return held(g) if callable(held) and not torch.is_tensor(held) else g*(held if torch.is_tensor(held) else held[0])
        return a*a, vjp
    a = Tensor([1., 2.], True)
    y = square(a)
    assert tape_size(y)[1] == 8
    y.sum().backward(); test_like(a.grad, [2., 4.])


def test_changing_an_index_is_refused():
    a, index = Tensor([1., 2., 3.], True), torch.tensor([0, 1])
    y = a[index]; index += 1
    with pytest.raises(RuntimeError, match="'getitem' needs an array"): y.sum().backward()


@pytest.mark.parametrize("func", [lambda a: a + 1, lambda a: 2*a, lambda a: a.sum(0), lambda a: a.mean(), lambda a: a.T, lambda a: a.reshape(-1), lambda a: a[1:], lambda a: -a])
def test_what_is_not_saved_may_change(func):
    a = Tensor(torch.ones(2, 2), True); y = func(a)
    assert tape_size(y)[1] == 0
    y.data.add_(1); a.data.add_(1)
    y.sum().backward(); assert a.grad is not None


def test_rebinding_data_is_safe():
    a = Tensor([1., 2.], True); y = a.exp()
    expected = y.data.clone(); a.data, y.data = torch.zeros(2), torch.zeros(2)
    y.sum().backward(); test_like(a.grad, expected)


def test_update_after_backward_is_fine():
    w = Tensor([1., 2.], True)
    for _ in range(3):
        w.grad = None; (w*w).sum().backward(); w.data -= .1*w.grad
    test_like(w.data, torch.tensor([1., 2.])*.8**3)


@pytest.mark.parametrize("step", [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul])
def test_a_leaf_is_not_updated_by_a_new_tensor_under_its_name(step):
    w = Tensor(torch.ones(2), True)
    for other in (2., torch.ones(2), Tensor(torch.ones(2)), Tensor(torch.ones(2), True)):
        with pytest.raises(TypeError, match="write w.data -= …"): step(w, other)
    assert w.data.tolist() == [1., 1.] and w.requires_grad


def test_sums_in_a_loop_live():
    w, total, plain = Tensor([1., 2.], True), 0., Tensor([0., 0.])
    for _ in range(3): total += w*w; plain += w; plain *= 2.; plain -= 1; plain /= 2
    (total + plain).sum().backward(); test_like(w.grad, 6*w.data + 1 + 1 + 1)


# -- depth and memory ----------------------------------------------------------------------------

def chain(t, n):
    for _ in range(n): t = t*1.
    return t


def test_fifty_thousand_operations():
    a = Tensor([1., 2.], True)
    limit = sys.getrecursionlimit()
    y = chain(a, 50_000); y.sum().backward()
    test_like(a.grad, [1., 1.])
    abandoned = chain(a, 50_000); del abandoned, y        # freeing it must not overflow the C stack
    assert sys.getrecursionlimit() == limit


def test_backward_and_forgetting_free_memory_without_the_collector():
    gc.disable()
    try:
        a = Tensor(torch.rand(10), True)
        y = (h := a.exp()).tanh().sum()
        array, node = weakref.ref(h.data), weakref.ref(h.node); del h
        assert array() is not None                        # saved
        y.backward()
        assert array() is None and node() is None and y.requires_grad
        t = a.exp(); node = weakref.ref(t.node); del t; assert node() is None
        leaf, node = weakref.ref(a), weakref.ref(a.node); del a, y; assert leaf() is None and node() is None
    finally: gc.enable()


def test_intermediate_arrays_are_not_kept():
    a = Tensor(torch.rand(10), True)
    y = ((t := a + 1) + 1).sum(); array = weakref.ref(t.data); del t
    assert array() is None; y.backward(); test_like(a.grad, torch.ones(10))


def test_a_forgotten_leaf_is_no_trouble():
    b = Tensor(2., True)
    (Tensor(3., True)*b).backward(); assert b.grad == 3


def test_tape_size():
    a = Tensor(torch.ones(10, 10), True)
    assert tape_size(Tensor([1.])) == (0, 0) and tape_size(a) == (1, 0)
    assert tape_size(a*a) == (2, 400) and tape_size(a.exp()*a) == (3, 800) and tape_size(a.T*a.T) == (4, 400)


# -- tools ---------------------------------------------------------------------------------------

def test_taped():
    @taped
    def scale(a, by=2.):
        "Doc."
        return a*by, lambda g: g*by
    a = Tensor([1., 2.], True)
    y = scale(a, by=3.)
    assert y.node.name == scale.__name__ == "scale" and scale.__doc__ == "Doc."
    y.sum().backward(); test_like(a.grad, [3., 3.])
    assert gradcheck(scale, normal(3)) < 1e-9
    @taped
    def floor(a): return a.long(), lambda g: g
    assert not floor(a).requires_grad                     # an integer result has no tape


def test_gradcheck_convicts():
    with pytest.raises(AssertionError, match="input 1"):
        gradcheck(taped(lambda a, b: (a - b, lambda g: g, lambda g: g)), normal(2), normal(2))
    with pytest.raises(AssertionError, match="input 0"): gradcheck(lambda a: a.detach()*a, normal(2))
    with pytest.raises(AssertionError, match="input 0"): gradcheck(taped(lambda a: (a*1, lambda g: g*torch.nan)), normal(2))
    assert 0 < gradcheck(lambda a: a.exp(), normal(2), tol=1e-3) < 1e-8
    slightly = taped(lambda a: (a*1, lambda g: g*1.001))
    assert gradcheck(slightly, torch.ones(2), tol=1e-2) > 1e-5
    with pytest.raises(AssertionError): gradcheck(slightly, torch.ones(2))
    x = torch.ones(2, 3).T; assert gradcheck(lambda a: a*a, x) < 1e-8 and x.eq(1).all()   # strided, float32, left alone
    assert gradcheck(lambda a, b: a.sum() + b.sum(), torch.empty(0), normal(2)) < 1e-8
    with pytest.raises(AssertionError, match="input 1"): gradcheck(lambda a, b: a + b.detach(), normal(2), normal(2))


def test_gradcheck_is_not_fooled_by_a_vjp_that_writes_into_what_it_gets():
    wrong = taped(lambda a: (a*1, lambda g: g.mul_(2)))
    with pytest.raises(AssertionError, match="input 0"): gradcheck(wrong, normal(3))


@pytest.mark.parametrize("func, x", [(lambda a: a.log(), -torch.ones(2)), (lambda a: a*torch.nan, torch.ones(2)), (lambda a: a.exp(), torch.full((1,), 1e4))])
def test_gradcheck_acquits_nothing_that_is_not_finite(func, x):
    with pytest.raises(AssertionError, match="input 0: func has no finite slope"): gradcheck(func, x)


def test_gradcheck_leaves_the_gradients_of_others_alone():
    w, v = Tensor([1., 2.], True), Tensor([1., 2.], True)
    w.grad = held = torch.tensor([7., 7.])
    gradcheck(lambda a: a*w*v, normal(2))
    assert w.grad is held and held.tolist() == [7., 7.] and v.grad is None
    with pytest.raises(ZeroDivisionError): gradcheck(lambda a: taped(lambda a: (a, lambda g: 1/0))(a)*w, normal(2))
    assert w.grad is held and held.tolist() == [7., 7.] and v.grad is None


def test_a_tensor_that_would_lose_its_gradient_is_refused():
    @taped
    def cat(parts, more=0.): return torch.ones(2), lambda g: g
    a, b = Tensor([1.], True), Tensor([2.])
    for call in (lambda: cat([b, a]), lambda: cat((a,)), lambda: cat(a, more=a), lambda: cat(b, more=a*2)):
        with pytest.raises(TypeError, match="cat: a Tensor in a tuple, list or keyword, or without a vjp, gets no gradient"): call()
    cat([a.detach(), b], more=b)
    with no_grad(): cat([a], more=a)


@pytest.mark.parametrize("call, name", [(torch.exp, "exp"), (torch.relu, "relu"), (torch.nn.functional.softplus, "softplus"), (lambda a: torch.stack([a, a]), "stack"),
                                        (lambda a: torch.ones(2).add_(a), "add_"), (lambda a: torch.matmul(torch.ones(2), a), "matmul")])
def test_functions_of_torch_say_that_they_have_no_tape(call, name):
    with pytest.raises(TypeError, match=f"torch's {name} has no tape: use t's methods"): call(Tensor([1., 2.], True))


def test_an_array_without_a_vjp_is_not_forgotten():
    @taped
    def half_done(a, b): return a*b, lambda g: g*b
    a, b = Tensor([1., 2.], True), Tensor([3., 4.], True)
    with pytest.raises(TypeError, match="half_done: .* without a vjp"): half_done(a, b)
    half_done(a, b.detach()).sum().backward(); test_like(a.grad, [3., 4.])
    with no_grad(): test_like(half_done(a, b).data, [3., 8.])


def test_a_rule_sees_arrays_wherever_a_tensor_was_given():
    "In a list, a tuple and a keyword: what was detached, as the refusal advises, must work there."
    @taped
    def weigh(a, parts, by=1.): return a*torch.cat(parts)*by, lambda g: g*torch.cat(parts)*by
    a, b, c = Tensor([1., 2.], True), Tensor([3.]), Tensor([4.], True)
    for parts in ([b, c.detach()], (b, c.detach())):
        a.grad = None
        weigh(a, parts, by=c.detach()).sum().backward(); test_like(a.grad, [12., 16.])
    with no_grad(): test_like(weigh(a, [b, c], by=c).data, [12., 32.])
    assert a.reshape(torch.Size([2, 1])).shape == (2, 1) and a.sum([0]).item() == 3


def test_toposort():
    a, b = Tensor(1., True), Tensor(2., True)
    s = a*b; y = s*a + s
    order = toposort(y.node)
    assert order[0] is y.node and len(order) == len(set(order)) == 5 and all(isinstance(n, Node) for n in order)
    place = {node: i for i, node in enumerate(order)}
    assert all(place[parent] > place[node] for node in order for parent, _ in node.edges)
    y.backward()
    with pytest.raises(RuntimeError, match="freed"): toposort(y.node)


def test_draw_graph():
    import matplotlib.pyplot as plt
    w, b = Tensor(normal(3, 2), True), Tensor(normal(2), True)
    h = (normal(8, 3) @ w + b).tanh()
    loss = (h*h).mean() + .1*(w*w).sum()
    ax = draw_graph(loss, {"w": w, "b": b})
    texts = [t.get_text() for t in ax.texts if t.get_text()]
    assert len(texts) == len(toposort(loss.node)) and {"w\n(3, 2)", "b\n(2,)", "tanh\n(8, 2)"} <= set(texts)
    arrows = [t for t in ax.texts if not t.get_text()]
    assert len(arrows) >= sum(len(n.edges) for n in toposort(loss.node))
    _, mine = plt.subplots(); assert draw_graph(w*2, ax=mine) is mine and draw_graph(w) is not mine
    plt.close("all")
    with pytest.raises(ValueError, match="no tape"): draw_graph(Tensor([1.]))


def test_the_mlp_of_lesson_02_gets_the_same_gradients():
    from exp.backprop import CrossEntropy, init_mlp, mlp
    params = [p.double() for p in init_mlp((12, 9, 5))]
    x, y = normal(16, 12)*30, torch.arange(16) % 5        # logits in the hundreds
    model, loss_func = mlp(params), CrossEntropy()
    expected = loss_func(model(x), y); model.backward(loss_func.backward())
    w1, b1, w2, b2 = leaves = [Tensor(p, True) for p in params]
    logits = (x @ w1.T + b1).relu() @ w2.T + b2
    shifted = logits - logits.data.amax(1, keepdim=True)
    log_probs = shifted - shifted.exp().sum(1, keepdim=True).log()
    loss = -log_probs[torch.arange(16), y].mean(); loss.backward()
    test_like(loss.data, expected, rtol=1e-12)
    for leaf, p in zip(leaves, params): test_like(leaf.grad, p.grad, rtol=1e-10, atol=1e-12)


def test_lists_are_data_and_never_hide_a_tape():
    assert torch.equal(Tensor([np.ones(2), np.zeros(2)]).data, torch.tensor([[1., 1.], [0., 0.]], dtype=torch.float64))
    assert torch.equal(Tensor([[1, 2], [3, 4]]).data, torch.tensor([[1, 2], [3, 4]]))
    a = Tensor(2., True)
    with pytest.raises(TypeError): Tensor([a*2, a*3])
