"Lesson 01: each rung of the ladder, and what stands beside it, against the laws of the matrix product and against PyTorch."
import ast
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from house import NBS, read, source

# --- the lesson's own functions: its cells without what they run -----------------------------------------------------------

WANTED = ("matmul_", "sizes", "stretch", "address", "einsum_loops", "sum_", "intensity")
FUNCTIONS = [node for cell in read(NBS/"01_matmul.ipynb")["cells"]
             if cell["cell_type"] == "code" and not source(cell).startswith("#|")
             for node in ast.parse(source(cell)).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith(WANTED)]
space = dict(torch=torch, np=np, product=itertools.product, prod=math.prod)
exec(compile(ast.Module(FUNCTIONS, type_ignores=[]), "01_matmul", "exec"), space)

RUNGS = {name: func for name, func in space.items() if name.startswith("matmul_")}
GUARDED = [name for name in RUNGS if name != "matmul_blas"]
rungs = pytest.mark.parametrize("name", RUNGS)


def test_the_ladder_is_whole():
    assert set(RUNGS) == {f"matmul_{x}" for x in ("loops", "rowcol", "broadcast", "cube", "einsum", "blas", "lists")}


# --- laws ------------------------------------------------------------------------------------------------------------------

SIZE = st.integers(0, 4)
SEED = st.integers(0, 2**32 - 1)


def gamma(depth, u=2**-24): return depth*u/(1 - depth*u)       # Higham (1993): the bound of a sum of that depth


def drawn(seed, *shapes, dtype=torch.float64, scale=1.):
    g = torch.Generator().manual_seed(seed)
    return [(scale*torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for s in shapes]


def near(x, y, scale=1.): torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10*scale)


@rungs
@given(n=SIZE, k=SIZE, m=SIZE, seed=SEED)
def test_equals_torch_whatever_the_sizes(name, n, k, m, seed):
    a, b = drawn(seed, (n, k), (k, m))
    near(RUNGS[name](a, b), a @ b)


@rungs
@given(n=SIZE, k=SIZE, m=SIZE, seed=SEED, s=st.floats(-100, 100))
def test_linear_in_both_factors(name, n, k, m, seed, s):
    f = RUNGS[name]
    a, c, b, d = drawn(seed, (n, k), (n, k), (k, m), (k, m))
    near(f(a + s*c, b), f(a, b) + s*f(c, b), 100)
    near(f(a, b + s*d), f(a, b) + s*f(a, d), 100)


@rungs
@given(n=SIZE, k=SIZE, m=SIZE, seed=SEED)
def test_transpose_turns_the_factors_around(name, n, k, m, seed):
    a, b = drawn(seed, (n, k), (k, m))
    near(RUNGS[name](a, b).T, RUNGS[name](b.T, a.T))


@rungs
@given(n=SIZE, k=SIZE, m=SIZE, p=SIZE, seed=SEED)
def test_associative_up_to_rounding(name, n, k, m, p, seed):
    f = RUNGS[name]
    a, b, c = drawn(seed, (n, k), (k, m), (m, p))
    near(f(f(a, b), c), f(a, f(b, c)), 10)


@rungs
@given(n=SIZE, k=SIZE, seed=SEED)
def test_identity_changes_nothing(name, n, k, seed):
    a, = drawn(seed, (n, k))
    assert torch.equal(RUNGS[name](a, torch.eye(k, dtype=a.dtype)), a)
    assert torch.equal(RUNGS[name](torch.eye(n, dtype=a.dtype), a), a)


@rungs
@given(k=st.integers(1, 6), seed=SEED)
def test_permuting_the_inner_axis_changes_only_rounding(name, k, seed):
    a, b = drawn(seed, (3, k), (k, 2))
    p = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    near(RUNGS[name](a[:, p], b[p]), RUNGS[name](a, b))


@rungs
@pytest.mark.parametrize("dtype, u", [(torch.float32, 2**-24), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@given(k=st.integers(0, 6), seed=SEED, scale=st.sampled_from([1e-2, 1., 40.]))
def test_error_stays_below_the_bound(name, dtype, u, k, seed, scale):
    a, b = drawn(seed, (3, k), (k, 2), dtype=dtype, scale=scale)
    got, exact = RUNGS[name](a, b), a.double() @ b.double()
    assert got.dtype == dtype
    tiny = torch.finfo(dtype).tiny*(k + 1)                       # below it, half precision has fewer digits
    bound = gamma(k + 1, u)*(a.double().abs() @ b.double().abs()) + tiny
    assert ((got.double() - exact).abs() <= bound).all()


@rungs
def test_integers_are_exact_and_stay_integers(name):
    a, b = torch.arange(-6, 6).reshape(3, 4), torch.arange(8).reshape(4, 2)*1000
    got = RUNGS[name](a, b)
    assert got.dtype == torch.int64 and torch.equal(got, a @ b)


@rungs
def test_large_and_hostile_numbers(name):
    a, b = torch.tensor([[100., -100., 1e-6]]), torch.tensor([[100.], [100.], [1.]])
    torch.testing.assert_close(RUNGS[name](a, b), torch.tensor([[1e-6]]))
    assert RUNGS[name](torch.tensor([[torch.inf, 1.]]), torch.tensor([[0.], [1.]])).isnan().all()


@rungs
def test_does_not_touch_its_arguments_and_takes_views(name):
    a, b = torch.randn(4, 3).T, torch.randn(5, 8)[:4, ::2]
    before = a.clone(), b.clone()
    torch.testing.assert_close(RUNGS[name](a, b), a @ b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("one, two", [((2, 3), (4, 5)), ((2, 3), (2, 3)), ((3,), (3, 2)), ((2, 3), (3,)), ((1, 2, 3), (3, 2))])
def test_sizes_that_do_not_fit_are_refused(name, one, two):
    with pytest.raises(ValueError, match="cannot multiply"): RUNGS[name](torch.ones(one), torch.ones(two))


def test_the_laws_can_fail():
    def wrong(a, b): return (a @ b).abs()
    RUNGS["wrong"] = wrong
    try:
        with pytest.raises(AssertionError): test_linear_in_both_factors.hypothesis.inner_test("wrong", 2, 2, 2, 0, -1.)
        with pytest.raises(AssertionError): test_equals_torch_whatever_the_sizes.hypothesis.inner_test("wrong", 2, 2, 2, 0)
    finally: del RUNGS["wrong"]


# --- broadcasting, einsum, sums ----------------------------------------------------------------------------------------------

AXIS = st.tuples(st.integers(0, 3), st.booleans())


@given(axes=st.lists(AXIS, max_size=4), missing=st.integers(0, 4))
def test_stretch_is_broadcast_to(axes, missing):
    shape = tuple(n for n, _ in axes)
    own = tuple(1 if one else n for n, one in axes)[min(missing, len(axes)):]
    x = torch.randn(own)
    got, want = space["stretch"](x, shape), torch.broadcast_to(x, shape)
    assert torch.equal(got, want)
    if got.numel(): assert got.data_ptr() == x.data_ptr() and all(s == t for n, s, t in zip(shape, got.stride(), want.stride()) if n > 1)


@pytest.mark.parametrize("own, shape", [((3,), (4,)), ((2, 3), (3, 3)), ((3, 1), (2, 5))])
def test_stretch_refuses(own, shape):
    with pytest.raises(ValueError, match="cannot stretch"): space["stretch"](torch.ones(own), shape)


@given(seed=SEED)
def test_address_finds_every_number(seed):
    line = torch.randn(60, generator=torch.Generator().manual_seed(seed))
    for view in (line.reshape(5, 12), line.reshape(5, 12).T, line[7:31].reshape(4, 6)[:, ::2]):
        for i, j in itertools.product(*map(range, view.shape)): assert line[space["address"](view, i, j)] == view[i, j]


@given(spec=st.permutations("ijk").flatmap(lambda p: st.tuples(
    st.just("".join(p[:2])), st.permutations("jkl").map(lambda q: "".join(q[:2])), st.permutations("".join(p[:2]) + "l"))), seed=SEED)
def test_einsum_by_loops_is_einsum(spec, seed):
    one, two, letters = spec
    out = "".join(x for x in letters if x in one + two)[:2]
    size = dict(i=2, j=3, k=1, l=4)
    a, b = drawn(seed, [size[x] for x in one], [size[x] for x in two])
    near(space["einsum_loops"](f"{one},{two}->{out}", a, b), torch.einsum(f"{one},{two}->{out}", a, b))


@given(power=st.integers(0, 12), seed=SEED)
def test_sums_keep_their_bounds(power, seed):
    x = torch.rand(2**power, generator=torch.Generator().manual_seed(seed)) - .5
    exact, size = x.double().sum(), x.double().abs().sum()
    for name, depth in (("sum_left_to_right", 2**power - 1), ("sum_pairs", power)):
        assert abs(space[name](x).double() - exact) <= gamma(depth)*size


def test_pairs_beat_left_to_right():
    x = torch.rand(2**18, generator=torch.Generator().manual_seed(0))
    error = {name: abs(space[name](x).double() - x.double().sum()) for name in ("sum_left_to_right", "sum_pairs")}
    assert error["sum_pairs"]*10 < error["sum_left_to_right"]


def test_intensity_counts_each_matrix_once():
    assert space["intensity"](240, 240, 240) == pytest.approx(40)
    assert space["intensity"](1, 10**9, 1) == pytest.approx(.25)          # a dot product: 2 operations on 8 bytes


# --- the exercises' checkers: several right answers pass, and wrong ones hear why -------------------------------------------------

def pairwise(*shapes):
    def two(s, t):
        n = max(len(s), len(t))
        axes = list(zip((1,)*(n - len(s)) + s, (1,)*(n - len(t)) + t))
        if any(x != y and 1 not in (x, y) for x, y in axes): raise ValueError("no")
        return tuple(y if x == 1 else x for x, y in axes)
    return functools.reduce(two, shapes)


def from_the_left(*shapes): return pairwise(*[s + (1,)*(max(map(len, shapes)) - len(s)) for s in shapes])


def zeros_stretched(*shapes): return pairwise(*[tuple(1 if n == 0 else n for n in s) for s in shapes])


def by_assert(*shapes):
    try: return pairwise(*shapes)
    except ValueError: raise AssertionError("no") from None


def by_neighbours(*shapes):
    n = max(map(len, shapes))
    axes = list(zip(*[(1,)*(n - len(s)) + s for s in shapes]))
    if any(x != y and 1 not in (x, y) for axis in axes for x, y in zip(axis, axis[1:])): raise ValueError("no")
    return tuple(next((x for x in axis if x != 1), 1) for axis in axes)


def row_by_row(a, b): return torch.stack([(a[..., i, :, None]*b).sum(-2) for i in range(a.shape[-2])], -2)
def by_lists(a, b): return a.new_tensor([[sum(p*q for p, q in zip(r, c)) for c in b.mT.tolist()] for r in a.tolist()])


def by_letters(spec, a, b, order=True):
    inputs, out = spec.split("->")
    p, q = inputs.split(",")
    letters = sorted(set(p + q))
    def up(names, x):
        x = x.permute([names.index(k) for k in letters if k in names])
        for i, k in enumerate(letters): x = x if k in names else x.unsqueeze(i)
        return x
    full = up(p, a)*up(q, b)
    for i in reversed(range(len(letters))): full = full if letters[i] in out else full.sum(i)
    left = [k for k in letters if k in out]
    return full.permute([left.index(k) for k in out]) if order else full


def turned(spec, a, b, entry=False, exit=False):
    "By the alphabet, with a permutation the wrong way round at the entry or at the exit."
    inputs, out = spec.split("->")
    p, q = inputs.split(",")
    letters = sorted(set(p + q))
    order = lambda old, new, wrong: [new.index(k) for k in old] if wrong else [old.index(k) for k in new]
    def up(names, x):
        x = x.permute(order(list(names), sorted(names), entry))
        there = dict(zip(sorted(names), x.shape))
        return x.reshape([there.get(k, 1) for k in letters])
    full = up(p, a)*up(q, b)
    for i in reversed(range(len(letters))): full = full if letters[i] in out else full.sum(i)
    return full.permute(order([k for k in letters if k in out], list(out), exit))


def sum_over_nothing(spec, a, b):
    inputs, out = spec.split("->")
    every = out + "".join(sorted(set(inputs) - set(out) - {","}))
    return by_letters(f"{inputs}->{every}", a, b).sum(tuple(range(len(out), len(every))))   # of (): all axes


def blocks(a, b, size, kernel, dtype=None, add=True, whole=False):
    c, end = torch.zeros(len(a), b.shape[1], dtype=dtype or a.dtype), size - 1 if whole else 0
    for k, i, j in itertools.product(*[range(0, n - end, size) for n in (a.shape[1], len(a), b.shape[1])]):
        part = kernel(a[i:i+size, k:k+size], b[k:k+size, j:j+size])
        c[i:i+size, j:j+size] = c[i:i+size, j:j+size]*add + part
    return c


def split_blocks(a, b, size, kernel):
    return torch.cat([torch.cat([sum(map(kernel, rows.split(size, 1), columns.split(size, 0))) for columns in b.split(size, 1)], 1)
                      for rows in a.split(size, 0)])


def strassen(a, b, kernel, sign=1, out=None, in_place=False):
    h = len(a)//2
    (a11, a12), (a21, a22) = [rows.split(h, 1) for rows in a.split(h)]
    (b11, b12), (b21, b22) = [rows.split(h, 1) for rows in b.split(h)]
    m2, m3, m4 = kernel(a21 + a22, b11), kernel(a11, b12 - b22), kernel(a22, b21 - b11)
    m5, m6, m7 = kernel(a11 + a12, b22), kernel(a21 - a11, b11 + b12), kernel(a12 - a22, b21 + b22)
    if in_place: a[:h, :h] += a22
    m1 = kernel(a[:h, :h] if in_place else a11 + a22, b11 + b22)
    c = out(a) if out else torch.empty_like(a)
    c[:h, :h], c[:h, h:], c[h:, :h], c[h:, h:] = m1 + m4 - sign*m5 + m7, m3 + m5, m2 + m4, m1 - m2 + m3 + m6
    return c


def by_cat(a, b, kernel): return torch.cat([row for row in strassen(a, b, kernel).split(1)])


def eight(a, b, kernel):
    h = len(a)//2
    return torch.cat([torch.cat([kernel(a[i:i+h, :h], b[:h, j:j+h]) + kernel(a[i:i+h, h:], b[h:, j:j+h]) for j in (0, h)], 1) for i in (0, h)])


def naive_blocks(a, b, size, kernel): return kernel(a[:size, :size], b[:size, :size])


def forgets_a_block(a, b, kernel):
    h = len(a)//2
    for _ in range(7): kernel(a[:h, :h], b[:h, :h])
    return torch.zeros_like(a)


PREDICTED = {
    "x.stride()": (12, 4, 1), "x.transpose(0, 2).stride()": (1, 4, 12), "x[:, 1].stride()": (12, 1), "x[..., ::2].stride()": (12, 4, 2),
    "torch.zeros(3).expand(5, 3).stride()": (0, 1), "(torch.zeros(8, 1, 6, 1) + torch.zeros(7, 1, 5)).shape": (8, 7, 6, 5),
    "(x[:, None] @ torch.zeros(5, 4, 7)).shape": (2, 5, 3, 7), "bytes in memory of torch.zeros(1000, 1).expand(1000, 1000)": 4000,
    "smallest n for which a float32 product n × n reaches 40 FLOP per byte": 240}


@pytest.mark.parametrize("checker, answer", [
    ("broadcast_shapes", pairwise), ("broadcast_shapes", lambda *shapes: np.broadcast_shapes(*shapes)),
    ("batch_matmul", lambda a, b: (a.unsqueeze(-1)*b.unsqueeze(-3)).sum(-2)),
    ("batch_matmul", lambda a, b: (a[..., :, None, :]*b.transpose(-1, -2)[..., None, :, :]).sum(-1)),
    ("einsum2", by_letters), ("einsum2", turned), ("einsum2", lambda spec, a, b: by_letters(spec.split("->")[0][::-1] + "->" + spec.split("->")[1], b.permute(*range(b.ndim)[::-1]), a.permute(*range(a.ndim)[::-1]))),
    ("matmul_blocked", blocks), ("matmul_blocked", split_blocks),
    ("predictions", PREDICTED), ("predictions", {k: list(v) if isinstance(v, tuple) else float(v) for k, v in PREDICTED.items()}),
    ("predictions", {k: np.array(v) for k, v in PREDICTED.items()}), ("predictions", {k: torch.tensor(v) for k, v in PREDICTED.items()}),
    ("strassen", strassen), ("strassen", by_cat),
])
def test_checkers_accept_every_right_answer(checker, answer, capsys):
    from exp.exercises import matmul
    getattr(matmul, f"check_{checker}")(answer)
    assert capsys.readouterr().out == f"✓ {checker}\n"


@pytest.mark.parametrize("checker, answer, word", [
    ("broadcast_shapes", lambda *shapes: max(shapes, key=len), "from the right"),
    ("broadcast_shapes", from_the_left, "do fit, to"),
    ("broadcast_shapes", by_assert, "not AssertionError"),
    ("broadcast_shapes", zeros_stretched, "even 0"),
    ("broadcast_shapes", lambda *shapes: list(shapes[0]), "tuple"),
    ("broadcast_shapes", lambda *shapes: tuple(max(axis) for axis in itertools.zip_longest(*[s[::-1] for s in shapes], fillvalue=1))[::-1], "even 0"),
    ("broadcast_shapes", by_neighbours, "no 1 to stretch"),
    ("batch_matmul", lambda a, b: a @ b, "not allowed"),
    ("batch_matmul", lambda a, b: torch.from_numpy(np.asarray(a) @ np.asarray(b)), "not allowed"),
    ("batch_matmul", lambda a, b: torch.tensor(np.matmul(a, b)), "not allowed"),
    ("batch_matmul", lambda a, b: torch.linalg.vecdot(a[..., :, None, :], b.mT[..., None, :, :]), "not allowed"),
    ("batch_matmul", torch.bmm, "not allowed"),
    ("batch_matmul", torch.linalg.matmul, "not allowed"),
    ("batch_matmul", lambda a, b: torch.from_numpy(a.numpy() @ b.numpy()), "not allowed"),
    ("batch_matmul", by_lists, "not allowed"),
    ("batch_matmul", row_by_row, "you loop over numbers"),
    ("batch_matmul", lambda a, b: (a.unsqueeze_(-1)*b.unsqueeze_(-3)).sum(-2), "has changed"),
    ("batch_matmul", lambda a, b: (a[..., None]*b[..., None, :, :]).sum(-2).float(), "dtype"),
    ("batch_matmul", lambda a, b: (a[:, :, None]*b[None]).sum(1), "raised"),
    ("batch_matmul", lambda a, b: (a[..., None]*b[..., None, :, :]).mean(-2), "wrong numbers"),
    ("batch_matmul", lambda a, b: (a[..., None]*b[..., None, :, :]).sum(-1), "which axis"),
    ("batch_matmul", lambda a, b: a.new_zeros(a.shape[0], b.shape[1]), "wrong numbers"),
    ("einsum2", lambda spec, a, b: a[..., None]*b, "shape"),
    ("einsum2", lambda spec, a, b: a.new_zeros(3, 4), "the matrix product"),
    ("einsum2", functools.partial(by_letters, order=False), "order on the right"),
    ("einsum2", functools.partial(turned, entry=True), "new order"),
    ("einsum2", functools.partial(turned, exit=True), "new order"),
    ("einsum2", lambda spec, a, b: torch.as_tensor(np.einsum(spec, a, b)), "not allowed"),
    ("einsum2", sum_over_nothing, "nothing is summed"),
    ("einsum2", space["einsum_loops"], "you loop over numbers"),
    ("einsum2", lambda spec, a, b: 1, "return a tensor"),
    ("matmul_blocked", lambda a, b, size, kernel: a @ b, "calls of the kernel"),
    ("matmul_blocked", naive_blocks, "is due"),
    ("matmul_blocked", functools.partial(blocks, add=False), r"\*add\*"),
    ("matmul_blocked", functools.partial(blocks, dtype=torch.float32), "new_zeros"),
    ("matmul_blocked", functools.partial(blocks, whole=True), "calls of the kernel"),
    ("strassen", forgets_a_block, "C11"),
    ("strassen", functools.partial(strassen, sign=-1), "C11"),
    ("strassen", eight, "seven"),
    ("strassen", functools.partial(strassen, out=lambda a: torch.zeros(a.shape)), "dtype"),
    ("strassen", functools.partial(strassen, in_place=True), "has changed"),
    ("predictions", [1], "dict"),
    *[("predictions", PREDICTED | {question: wrong}, "is not") for question, wrong in zip(
        PREDICTED, [torch.tensor([4, 3, 2]), (12, 4, 1), np.array([4, 1]), (6, 2, 1), (3, 1), (8, 7, 6, 1), (2, 3, 5, 7), 4_000_000, 241])],
])
def test_checkers_say_what_is_wrong(checker, answer, word):
    from exp.exercises import matmul
    with pytest.raises(AssertionError, match=word): getattr(matmul, f"check_{checker}")(answer)
