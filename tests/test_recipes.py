"""docs/recipes.md: value and every gradient of each recipe, as the page has it, beside its dense definition in float64."""

import copy
import inspect
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from gcl_kernels import MemoryBank, backends, pairwise_logsumexp
from gcl_kernels.distributed import first_column
from tests.counting import counted_products
from tests.test_docs import blocks
from tests.test_views import assert_same, peer

N, D = 24, 6


@pytest.fixture(scope="module")
def recipe():
    """The functions that the page defines."""
    names = {}
    for block in blocks("python"):
        page, line, code = block.values
        if page.name == "recipes.md":
            exec(compile("\n" * line + code, page, "exec"), names)
    return names


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


X, Y = (unit(N, D, seed=k).requires_grad_() for k in range(2))
T = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
IDS = torch.arange(N) % 9
EYE = torch.eye(N, dtype=torch.bool)
DIAGONAL = torch.arange(N)
PAST = unit(15, D, seed=2)
MINED = unit(N, 3, D, seed=3).requires_grad_()
SCALES = (5 + 10 * torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).requires_grad_()
TEACHER = unit(N, 4, seed=5), unit(N, 4, seed=6)
Q = torch.rand(N, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.1
LABELS = torch.tensor([[i, (i + 1) % N, -1 if i % 3 else (i + 5) % N, (i + 7) % N] for i in range(N)])
GRADES = torch.randint(0, 4, LABELS.shape, generator=torch.Generator().manual_seed(8)).masked_fill(LABELS < 0, -1)


def logits(x, y, t):
    s = t * x @ y.T
    return s, s.diagonal(), s.masked_fill(EYE, -math.inf)


def all_positives(x, y, t):
    same = (IDS[:, None] == IDS).double()
    return -((t * x @ y.T).log_softmax(dim=1) * same / same.sum(dim=1, keepdim=True)).sum() / N


def mil_nce(x, y, t):
    s, same = t * x @ y.T, IDS[:, None] == IDS
    return (s.logsumexp(dim=1) - s.masked_fill(~same, -math.inf).logsumexp(dim=1)).mean()


def dcl(x, y, t):
    _, positive, negatives = logits(x, y, t)
    return ((negatives.logsumexp(dim=1) + negatives.logsumexp(dim=0)) / 2 - positive).mean()


def dcl_of_views(x, y, t):
    z, n = torch.cat([x, y]), 2 * N
    other = (torch.arange(n) + N) % n
    hidden = torch.eye(n, dtype=torch.bool) | torch.eye(n, dtype=torch.bool)[other]
    s = t * z @ z.T
    return (s.masked_fill(hidden, -math.inf).logsumexp(dim=1) - s[torch.arange(n), other]).mean()


def debiased(x, y, t, tau):
    _, positive, negatives = logits(x, y, t)
    n = N - 1
    g = ((negatives.exp().sum(dim=1) / n - tau * positive.exp()) / (1 - tau)).clamp(min=0)
    g = torch.where(g > (-t).exp(), g, (-t).exp())
    return -(positive.exp() / (positive.exp() + n * g)).log().mean()


def hard_negatives(x, y, t, beta):
    _, positive, negatives = logits(x, y, t)
    weight = (beta * negatives).exp().masked_fill(EYE, 0.0)
    weight = weight / (weight.sum(dim=1, keepdim=True) / (N - 1))
    total = (weight * negatives.exp()).sum(dim=1)
    return -(positive.exp() / (positive.exp() + total)).log().mean()


def hardness(x, y, t, alpha):
    s, _, _ = logits(x, y, t)
    return F.cross_entropy(s + (alpha * (x @ y.T).detach()).masked_fill(EYE, 0.0), DIAGONAL)


def margin(x, y, t, m, angular):
    cos = x @ y.T
    target = (cos.acos() + m).cos() if angular else cos - m
    return F.cross_entropy(t * torch.where(EYE, target, cos), DIAGONAL)


def row_scales(x, y, scales):
    return F.cross_entropy(scales[:, None] * (x @ y.T), DIAGONAL)


def moving_average(x, y, t, u, gamma):
    """u: the batch's averages before, 0 where an example is new."""
    _, positive, negatives = logits(x, y, t)
    g = (negatives - positive[:, None]).exp().sum(dim=1) / (N - 1)
    u = torch.where(u == 0, g, (1 - gamma) * u + gamma * g).detach()
    return (g / u).mean() / t.detach()


def with_queue(x, y, t, in_batch):
    if in_batch:
        return F.cross_entropy(t * x @ torch.cat([y, PAST]).T, DIAGONAL)
    return F.cross_entropy(t * torch.cat([(x * y).sum(dim=1, keepdim=True), x @ PAST.T], dim=1), torch.zeros_like(IDS))


def own_negatives(x, y, t, mined):
    own = (x[:, None] * mined).sum(dim=2)
    return F.cross_entropy(t * torch.cat([x @ y.T, own], dim=1), DIAGONAL)


def gte(x, y, t):
    s, positive, negatives = logits(x, y, t)
    sides = [(t * v @ v.T).masked_fill(EYE, -math.inf) for v in (x, y)]
    return (torch.cat([s, negatives.T, *sides], dim=1).logsumexp(dim=1) - positive).mean()


def same_group(x, y, t):
    other = (DIAGONAL % 3)[:, None] != DIAGONAL % 3
    s = (t * x @ y.T).masked_fill(other, -math.inf)
    return (F.cross_entropy(s, DIAGONAL) + F.cross_entropy(s.T, DIAGONAL)) / 2


def below(x, y, t):
    hidden = (x @ y.T > 0.3) & ~EYE
    assert hidden.any()
    return F.cross_entropy((t * x @ y.T).masked_fill(hidden, -math.inf), DIAGONAL)


def log_q(x, y, t):
    return F.cross_entropy(t * x @ y.T - Q.log(), DIAGONAL)


def distil(x, y, t):
    target = (0.5 * TEACHER[0] @ TEACHER[1].T).softmax(dim=1)
    return F.cross_entropy(t * x @ y.T, target)


def matryoshka(x, y, t):
    total = 0.0
    for d in (2, 4, 6):
        s = t * F.normalize(x[:, :d], dim=1) @ F.normalize(y[:, :d], dim=1).T
        total = total + (F.cross_entropy(s, DIAGONAL) + F.cross_entropy(s.T, DIAGONAL)) / 2
    return total


def row_by_row(loss_of_row):
    """The mean over rows of a loss of the logits and grades of a row's own documents."""

    def loss(s, grades):
        return torch.stack([loss_of_row(a[g >= 0], g[g >= 0].double()) for a, g in zip(s, grades, strict=True)]).mean()

    return loss


def listnet(s, grades):
    return -(grades.softmax(dim=0) * s.log_softmax(dim=0)).sum()


def pairs_of_row(s, grades, weight=lambda i, j: 1.0):
    better = [(i, j) for i in range(len(s)) for j in range(len(s)) if grades[i] > grades[j]]
    return sum(-weight(i, j) * torch.sigmoid(s[i] - s[j]).log() for i, j in better), len(better)


def ranknet(s, grades):
    totals, counts = zip(*(pairs_of_row(a[g >= 0], g[g >= 0]) for a, g in zip(s, grades, strict=True)), strict=True)
    return sum(totals) / sum(counts)


def dcg(order, grades):
    return sum((2.0 ** float(grades[i]) - 1) / math.log2(place + 2) for place, i in enumerate(order))


def lambda_loss(s, grades):
    """The weight of a pair: how much NDCG changes when the two are exchanged in the present order."""
    total, count = 0.0, 0
    for a, g in zip(s, grades, strict=True):
        a, g = a[g >= 0], g[g >= 0]
        order = a.detach().argsort(descending=True).tolist()
        best = dcg(g.argsort(descending=True).tolist(), g)

        def change(i, j, order=order, best=best, g=g):
            exchanged = [{i: j, j: i}.get(k, k) for k in order]
            return abs(dcg(exchanged, g) - dcg(order, g)) / best

        of_row, pairs = pairs_of_row(a, g, change)
        total, count = total + of_row, count + pairs
    return total / count


def graded(x, y, t, listwise):
    s = t * x @ y.T
    judged = torch.zeros(N, N + 1, dtype=torch.bool).scatter(1, LABELS % (N + 1), True)[:, :N]
    own = torch.gather(s, 1, LABELS.clamp(min=0))
    best = own.gather(1, GRADES.argmax(dim=1, keepdim=True))
    softmax = torch.cat([best, s.masked_fill(judged, -math.inf)], dim=1).log_softmax(dim=1)[:, 0]
    return listwise(own, GRADES) - softmax.mean()


XYT = (X, Y, T)
CASES = {
    "all_positives": (XYT, (IDS, IDS), all_positives, ()),
    "mil_nce": (XYT, (torch.stack([IDS, IDS + 9, torch.where(IDS + 18 < N, IDS + 18, -1)], dim=1),), mil_nce, ()),
    "dcl": (XYT, (), dcl, ()),
    "dcl_of_views": (XYT, (), dcl_of_views, ()),
    "debiased": (XYT, (0.1,), debiased, (0.1,)),
    "debiased, at its least": (XYT, (0.8,), debiased, (0.8,)),
    "hard_negatives": (XYT, (0.5,), hard_negatives, (0.5,)),
    "hardness": (XYT, (5.0,), hardness, (5.0,)),
    "margin, CosFace": (XYT, (0.2,), margin, (0.2, False)),
    "margin, ArcFace": (XYT, (0.2, True), margin, (0.2, True)),
    "row_scales": ((X, Y, SCALES), (), row_scales, ()),
    "own_negatives": ((X, Y, T, MINED), (), own_negatives, ()),
    "gte": (XYT, (), gte, ()),
    "same_group": (XYT, (DIAGONAL % 3,), same_group, ()),
    "below": (XYT, (0.3,), below, ()),
    "log_q": (XYT, (Q,), log_q, ()),
    "distil": (XYT, (*TEACHER, 0.5), distil, ()),
    "matryoshka": (XYT, ((2, 4, 6),), matryoshka, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_recipe_is_the_dense_loss(recipe, name):
    inputs, more, dense, constants = CASES[name]
    function = recipe[name.partition(",")[0]]
    with backends.settings(tile=(7, 16)):
        assert_same(lambda: function(*inputs, *more), lambda: dense(*inputs, *constants), inputs)


@pytest.mark.parametrize("in_batch", [True, False])
def test_queue(recipe, in_batch):
    bank = MemoryBank(20, D, dtype=torch.float64)
    bank.push(PAST)
    assert_same(lambda: recipe["with_queue"](*XYT, bank, in_batch), lambda: with_queue(*XYT, in_batch), XYT)


@pytest.mark.parametrize(
    ("name", "dense"), [("listnet", row_by_row(listnet)), ("ranknet", ranknet), ("lambda_loss", lambda_loss)]
)
def test_listwise(recipe, name, dense):  # fmt: skip
    assert_same(lambda: recipe["graded"](*XYT, LABELS, GRADES, recipe[name]), lambda: graded(*XYT, dense), XYT)


def test_moving_average(recipe):
    """Two steps: examples that are new, and some that were there before."""
    log_u, dense_u = torch.full((40,), -math.inf, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for step, index in enumerate((torch.arange(N), torch.arange(N) + 10)):
        x = unit(N, D, seed=30 + step).requires_grad_()
        inputs, before = (x, Y, T), log_u.clone()

        def loss(inputs=inputs, before=before, index=index):
            log_u.copy_(before)
            return recipe["moving_average"](*inputs, log_u, index, 0.6)

        assert_same(loss, lambda inputs=inputs, index=index: moving_average(*inputs, dense_u[index], 0.6), inputs)
        with torch.no_grad():
            _, positive, negatives = logits(*inputs)
            g = (negatives - positive[:, None]).exp().sum(dim=1) / (N - 1)
            dense_u[index] = torch.where(dense_u[index] == 0, g, 0.4 * dense_u[index] + 0.6 * g)
        torch.testing.assert_close(log_u.exp(), dense_u)


def test_fashion(recipe):
    image, title, *queries = (unit(N, D, seed=50 + k).requires_grad_() for k in range(6))
    names, scores = ("description", "title", "colour", "keywords"), 1 + DIAGONAL.double()
    has = IDS > 2
    own = (IDS[:, None] == IDS) & ~EYE

    def both_ways(s, weights=1.0):
        rows = F.cross_entropy(s, torch.arange(len(s)), reduction="none")
        return (weights * (rows + F.cross_entropy(s.T, torch.arange(len(s)), reduction="none"))).mean() / 2

    def dense():
        document = F.normalize(0.9 * F.normalize(image, dim=1) + 0.1 * F.normalize(title, dim=1), dim=1)
        description, name, colour, keywords = (T * q @ document.T for q in queries)
        of_keywords = keywords[has]
        to_row = F.cross_entropy(of_keywords, DIAGONAL[has])
        to_column = F.cross_entropy(of_keywords.T[has], torch.arange(int(has.sum())))
        loss = 0.5 * both_ways(description) + both_ways(name, (1 + scores).log())
        return loss + 0.2 * both_ways(colour.masked_fill(own, -math.inf)) + 0.3 * (to_row + to_column) / 2

    def ours():
        given = dict(zip(names, queries, strict=True))
        return recipe["fashion"](given, {"image": image, "title": title}, T, scores, IDS, has)

    assert_same(ours, dense, (image, title, *queries, T))


def test_every_recipe_is_tested(recipe):
    defined = {
        name: value
        for name, value in recipe.items()
        if inspect.isfunction(value) and value.__code__.co_filename.endswith("recipes.md")
    }
    others = {"with_queue", "graded", "listnet", "ranknet", "lambda_loss", "moving_average", "fashion"}
    assert set(defined) == others | {name.partition(",")[0] for name in CASES}


# As the page says, in N M D (here N = M): of calls of the primitive 8, of `gcl_loss` in one direction 6.
COSTS = {
    "all_positives": 6, "mil_nce": 8, "dcl": 8, "dcl_of_views": 32, "debiased": 8, "hard_negatives": 16, "hardness": 8,
    "margin, CosFace": 8, "row_scales": 6, "own_negatives": 8, "gte": 24, "below": 8, "log_q": 6, "distil": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_is_as_the_page_says(recipe, name):
    inputs, more, *_ = CASES[name]
    with counted_products() as flops, backends.settings(tile=(7, 16)):
        recipe[name.partition(",")[0]](*inputs, *more).backward()
    for x in inputs:
        x.grad = None
    assert sum(flops) == COSTS[name] * N * N * D


def test_decoupled_is_lightly_s(recipe):
    theirs = peer("lightly.loss.dcl_loss", "DCLLoss")(temperature=1 / 9)
    assert_same(lambda: recipe["dcl_of_views"](F.normalize(X), F.normalize(Y), 9.0), lambda: theirs(X, Y), (X, Y))


def test_queue_is_lightly_s(recipe):
    theirs = peer("lightly.loss.ntx_ent_loss", "NTXentLoss")(temperature=1 / 9, memory_bank_size=(30, D)).double()
    bank = MemoryBank(30, D, dtype=torch.float64)
    bank.push(theirs.memory_bank.bank.T if theirs.memory_bank.bank.shape[0] == D else theirs.memory_bank.bank)
    start = copy.deepcopy(theirs)
    assert_same(
        lambda: recipe["with_queue"](F.normalize(X), F.normalize(Y), 9.0, bank, in_batch=False),
        lambda: copy.deepcopy(start)(X, Y),
        (X,),
    )


def test_distillation_is_open_clip_s(recipe):
    theirs = peer("open_clip.loss", "DistillClipLoss")()
    (tx, ty), ts = TEACHER, torch.tensor(0.5, dtype=torch.float64)

    def ours():
        return (recipe["distil"](X, Y, T, tx, ty, 0.5) + recipe["distil"](Y, X, T, ty, tx, 0.5)) / 2

    assert_same(ours, lambda: theirs(X, Y, T, tx, ty, ts)[1], XYT)


ROWS = {"equal": (5, 5, 5), "unequal": (2, 7, 4)}


def gte_on_rank(group, rows):
    """GTE's loss by what the page says about ranks."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    x, y = (v.detach()[mine].requires_grad_() for v in (X, Y))
    own = torch.arange(len(x)) + first_column(x, group)
    out = pairwise_logsumexp(x, y, 9.0, positives="apart", process_group=group)
    options = {"labels": torch.full_like(own, -1), "lhs_ids": own, "rhs_ids": own, "directions": "lhs_to_rhs"}
    sides = [pairwise_logsumexp(v, v, 9.0, **options, process_group=group).row for v in (x, y)]
    losses = torch.stack([out.row, out.col, *sides, out.positive]).logsumexp(dim=0) - out.positive
    loss = losses.mean() if len(set(rows)) == 1 else world * losses.sum() / sum(rows)
    loss.backward()
    return loss.detach(), x.grad, y.grad


@pytest.mark.parametrize("rows", ROWS)
def test_over_ranks(pool, recipe, rows):
    losses, *gradients = zip(*pool.run(3, gte_on_rank, ROWS[rows]), strict=True)
    x, y = (v.detach()[: sum(ROWS[rows])].requires_grad_() for v in (X, Y))
    loss = recipe["gte"](x, y, 9.0)
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach())
    for parts, expected in zip(gradients, torch.autograd.grad(loss, (x, y)), strict=True):
        torch.testing.assert_close(torch.cat(parts) / 3, expected)
