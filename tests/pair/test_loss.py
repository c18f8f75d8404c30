"""The chunked joint loss against the plain one: all logits, a loop over rows, autograd."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pairs import build_pair
from torch._inductor.scheduler import Scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import joint_train.pair.loss as loss_module
from joint_train.config import LossConfig
from joint_train.config.values import KINDS, parse_drafter_loss, round_weights, teacher_grad
from joint_train.pair.centroids import Centroids, routed, token_centroids
from joint_train.pair.distribution import Distribution
from joint_train.pair.loss import joint_loss
from joint_train.pair.targets import joint_targets, sum_weights
from joint_train.pair.terms import Compiled, Mix

B, S, V, HB, HD, K = 2, 9, 24, 6, 4, 3


def config(drafter="kl", **changes):
    defaults = dict(temperature=1.0, teacher_grad=False, round_weights=None, centroid_weight=0.0, memory_budget_mb=512,
                    compile=False)  # fmt: skip
    return SimpleNamespace(drafter=drafter, **(defaults | changes))


def tiny_chunks(rows, dtype=torch.float32, buffers=5):
    """A memory budget for chunks of about that many rows."""
    return rows * buffers * V * dtype.itemsize / 2**20


class Case:
    """Random hidden states and heads, and a batch with several documents, padding and unsupervised tokens."""

    def __init__(self, dtype=torch.float32, pairing="serving", seed=3, supervised=0.85, requires_grad=True):
        g = torch.Generator().manual_seed(seed)

        def rand(*shape, scale=1.0):
            t = (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)
            return t.requires_grad_(requires_grad)

        self.base_hidden, self.base_weight = rand(B, S, HB), rand(V, HB)
        self.drafter_hidden, self.drafter_weight = [rand(B, S, HD) for _ in range(K)], rand(V, HD)
        self.centroid_weight = rand(6, HD)
        self.ordering = torch.randperm(V, generator=g)
        self.documents = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 0, 0]])
        ids = torch.randint(V, (B, S), generator=g)
        self.labels = torch.where(torch.rand(B, S, generator=g) < supervised, ids, -100)
        self.pairing = pairing
        self.weights = torch.tensor([0.5, 0.3, 0.2, 0.4], dtype=torch.float64)

    @property
    def inputs(self):
        return {
            "base_hidden": self.base_hidden,
            "base_weight": self.base_weight,
            "drafter_weight": self.drafter_weight,
            **{f"drafter_hidden[{k}]": h for k, h in enumerate(self.drafter_hidden)},
        }

    @property
    def targets(self):
        return joint_targets(self.labels, self.documents, K, self.pairing)

    def ours(self, cfg, targets=None, **options):
        """The loss, and its sums by name."""
        loss, stats = joint_loss(
            self.base_hidden,
            self.base_weight,
            self.drafter_hidden,
            self.drafter_weight,
            targets or self.targets,
            self.weights,
            cfg,
            **options,
        )
        return loss, stats.named()

    def gradients(self, loss, extra=()):
        wanted = [(n, t) for n, t in [*self.inputs.items(), *extra] if t.requires_grad]
        grads = torch.autograd.grad(loss, [t for _, t in wanted], allow_unused=True)
        return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted, grads, strict=True)}


def reference_row(kind, teacher, student, label, temperature):
    """The loss of one row, from its logits `[V]`, as the definitions have it."""
    if kind == "ce":
        return -student.log_softmax(-1)[label]
    if kind == "ce_argmax":
        return -student.log_softmax(-1)[teacher.argmax()]
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q)).sum()
    tv = (p - q).abs().sum() / 2
    if kind == "kl":
        return kl
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    if kind == "js":
        log_m = ((p + q) / 2).log()
        return ((p * (log_p - log_m)).sum() + (q * (log_q - log_m)).sum()) / 2
    if kind == "tv":
        return tv
    if kind == "nla":
        return -(1 - tv).log()
    share = torch.exp(-3 * (1 - tv)).detach()
    return share * kl + (1 - share) * tv


def reference(case, cfg, softcap=None, drafter_softcap=None, centroids=None):
    """The joint loss with every logit materialised."""

    def logits(hidden, weight, cap):
        out = hidden @ weight.T
        return out if cap is None else cap * torch.tanh(out / cap)

    # Half precision: the same inputs, the rest in fp32.
    up = (lambda t: t) if case.base_hidden.dtype == torch.float64 else (lambda t: t.float())
    base = logits(up(case.base_hidden), up(case.base_weight), softcap)
    rounds = [logits(up(h), up(case.drafter_weight), drafter_softcap) for h in case.drafter_hidden]
    offset = {"serving": 1, "same_token": 0}[case.pairing]
    mix = {cfg.drafter: 1.0} if isinstance(cfg.drafter, str) else cfg.drafter
    heads = ("drafts.",) if centroids is None else ("drafts.", "dense.")
    drafts = [head + name for head in heads for name in ("agree", "acceptance_argmax", "acceptance_sampled")]
    routing = () if centroids is None else ("routing.ce", "routing.hit")
    stats = {name: [0.0] * (1 + K) for name in ("loss", "ce", "top1", *drafts, *routing, "count")}
    agreement = {head: {} for head in heads}
    left_out = 0

    def draft(head, where, teacher, student):
        """How drafts from the student's logits fare; those of tokens that can't be drafted are -inf."""
        p, q, k = teacher.softmax(-1), student.softmax(-1), where[-1]
        agreement[head][where] = bool(q.argmax() == p.argmax())
        stats[head + "agree"][k] += agreement[head][where]
        stats[head + "acceptance_argmax"][k] += p[q.argmax()]
        stats[head + "acceptance_sampled"][k] += torch.minimum(p, q).sum()

    def is_target(b, p):
        doc = case.documents[b, p]
        return case.labels[b, p] != -100 and p > 0 and doc != 0 and case.documents[b, p - 1] == doc

    for b, p in itertools.product(range(B), range(S)):
        label, doc = case.labels[b, p], case.documents[b, p]
        if not is_target(b, p):
            continue
        teacher = base[b, p - 1]
        ce = -teacher.log_softmax(-1)[label]
        stats["loss"][0] += ce
        stats["ce"][0] += ce
        stats["top1"][0] += teacher.argmax() == label
        stats["count"][0] += 1
        share = float(cfg.teacher_grad)
        seen = share * teacher + (1 - share) * teacher.detach()
        for k in range(K):
            t = p - 1 - offset - k
            if t < 0 or case.documents[b, t] != doc:
                continue
            if case.pairing == "serving" and -100 in case.labels[b, t + 1 : p]:
                left_out += 1
                continue
            student = rounds[k][b, t]
            stats["loss"][1 + k] += sum(
                weight * reference_row(kind, seen, student, label, cfg.temperature) for kind, weight in mix.items()
            )
            stats["ce"][1 + k] += -student.log_softmax(-1)[label]
            stats["top1"][1 + k] += student.argmax() == label
            stats["count"][1 + k] += 1
            draft(heads[-1], (b, t, k), teacher, student)
            if centroids is not None:
                scores = up(case.drafter_hidden[k])[b, t] @ up(centroids.weight).T
                tokens = case.ordering.view(len(scores), -1)
                candidates = tokens[scores.topk(centroids.top_k).indices].flatten()
                routed = torch.full_like(student, -torch.inf).scatter(0, candidates, student[candidates])
                draft("drafts.", (b, t, k), teacher, routed)
                target = next(c for c in range(len(scores)) if label in tokens[c])
                stats["routing.ce"][k] += -scores.log_softmax(-1)[target]
                stats["routing.hit"][k] += target in scores.topk(centroids.top_k).indices

    target_rows = {(b, p - 1) for b, p in itertools.product(range(B), range(1, S)) if is_target(b, p)}
    rows = {"left_out": left_out}
    for head, agreed in agreement.items():

        def right(b, t, agreed=agreed):
            return sum(itertools.takewhile(bool, (agreed.get((b, t, k), False) for k in range(K))))

        full = [(b, t) for b, t in itertools.product(range(B), range(S)) if all((b, t, k) in agreed for k in range(K))]
        walk = []
        for b, t in sorted(target_rows):
            if (b, t - 1) in target_rows:
                continue
            while (b, t) in target_rows:  # from the row before an answer's first token on, as decoding goes
                walk += [(b, t)] if (b, t) in full else []
                t += right(b, t) + 1
        rows |= {head + "accepted": sum(right(*row) for row in full), "full_rows": len(full)}
        rows |= {head + "walk_accepted": sum(right(*row) for row in walk), head + "walk_rows": len(walk)}
    loss = sum(w * x for w, x in zip(case.weights, stats["loss"], strict=True))
    if centroids is not None:
        loss = loss + cfg.centroid_weight * sum(
            w * x for w, x in zip(case.weights[1:], stats["routing.ce"][:K], strict=True)
        )
    stats = {
        n: torch.tensor([float(torch.as_tensor(x).detach()) for x in (v[:K] if n in (*drafts, *routing) else v)])
        for n, v in stats.items()
    }
    return loss, stats | {name: torch.tensor(count) for name, count in rows.items()}


def check(case, cfg, tolerance=1e-5, extra=(), ours_options=None, **options):
    expected, expected_stats = reference(case, cfg, **options)
    expected_grads = case.gradients(expected, extra)
    loss, stats = case.ours(cfg, **options, **(ours_options or {}))
    grads = case.gradients(loss, extra)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert stats.keys() == expected_stats.keys()
    for name, value in expected_stats.items():
        assert not stats[name].requires_grad
        torch.testing.assert_close(
            stats[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert grads[name].dtype == grad.dtype
        torch.testing.assert_close(
            grads[name], grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


MIX = {"ce": 0.1, "nla": 0.5, "js": 0.7, "ce_argmax": 0.2, "reverse_kl": 0.3, "kl": 0.4, "lk_hybrid": 0.6, "tv": 0.8}


@pytest.mark.parametrize("teacher_grad", [False, 0.3, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("drafter", [*KINDS, MIX], ids=[*KINDS, "mix"])
def test_equals_the_materialised_loss(drafter, temperature, softcap, teacher_grad):
    cfg = config(drafter, temperature=temperature, teacher_grad=teacher_grad, memory_budget_mb=tiny_chunks(4))
    check(Case(), cfg, softcap=softcap, drafter_softcap=None if softcap is None else 3.0)


def test_lk_hybrid_in_a_mix_does_not_take_the_kl_weight_for_its_own():
    check(Case(), config({"kl": 0.5, "lk_hybrid": 0.25}))


@pytest.mark.parametrize("drafter", ["kl", MIX], ids=["kl", "mix"])
def test_chunk_boundaries_are_invisible(drafter, monkeypatch):
    """With a boundary in every place: chunks of 1, 2, … targets."""
    case = Case(dtype=torch.float64, supervised=1.0)
    buffers = 5 if drafter == "kl" else 9  # more for the teacher and js
    centroids = Centroids(case.centroid_weight, token_centroids(case.ordering, 6), top_k=2)
    starts, chunk = [], loss_module.Pass._chunk
    monkeypatch.setattr(
        loss_module.Pass, "_chunk", lambda self, part, *rest: (starts.append(part.start), chunk(self, part, *rest))
    )

    def run(**budget):
        starts.clear()
        cfg = config(drafter, teacher_grad=drafter == MIX, centroid_weight=0.3, **budget)
        loss, stats = case.ours(cfg, softcap=2.0, centroids=centroids)
        return loss, stats, case.gradients(loss, [("centroids", case.centroid_weight)])

    whole, total = run(), len(case.targets.rows)
    assert starts == [0] and total == 12
    for rows in range(1, total + 1):
        torch.testing.assert_close(run(memory_budget_mb=tiny_chunks(rows + 0.1, torch.float64, buffers)), whole)
        equal = -(-total // -(-total // rows))
        assert starts == [*range(0, total, equal)]


@pytest.mark.parametrize("pairing", ["serving", "same_token"])
def test_pairings(pairing):
    check(Case(pairing=pairing, seed=3), config("nla"))


@pytest.mark.parametrize("centroid_weight", [0.0, 0.7])
def test_ordered_embeddings(centroid_weight):
    case = Case(seed=5)
    token_centroid = token_centroids(case.ordering, 6)
    centroids = Centroids(case.centroid_weight, token_centroid, top_k=2)
    cfg = config("kl", centroid_weight=centroid_weight, memory_budget_mb=tiny_chunks(4))
    check(case, cfg, extra=[("centroids", case.centroid_weight)], centroids=centroids)


def test_the_routed_head_is_the_one_that_transformers_serves():
    _, drafter = build_pair("e2b")
    embedder, weight = drafter.masked_embedding, drafter.lm_head.weight
    hidden = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        served = embedder(hidden[None], weight)[0]
        q, scores = Distribution.of(hidden @ weight.T), embedder.centroids(hidden)
        centroid = token_centroids(embedder.token_ordering, embedder.num_centroids)
        before = [x.clone() for x in (q.logits, q.probs)]
        found = routed(
            q, scores, Centroids(scores, centroid, embedder.centroid_intermediate_top_k), torch.empty(50, 256)
        )
    served = served.masked_fill(served == served.min(), -torch.inf)  # what it gives to all other tokens
    assert served.isfinite().sum(-1).tolist() == [4 * 16] * 50
    torch.testing.assert_close(found.probs, served.softmax(-1))
    torch.testing.assert_close(found.logsumexp, served.logsumexp(-1))
    assert found.argmax.equal(served.argmax(-1)) and not found.argmax.equal(q.argmax)
    torch.testing.assert_close([q.logits, q.probs], before, rtol=0, atol=0)


def test_token_centroids_needs_a_permutation():
    assert token_centroids(torch.tensor([5, 0, 3, 1, 4, 2]), 3).tolist() == [0, 1, 2, 1, 2, 0]
    for ordering, count in ((torch.zeros(6), 3), (torch.arange(6), 4)):
        with pytest.raises(ValueError, match="token_ordering"):
            token_centroids(ordering, count)


@pytest.mark.parametrize("drafter", KINDS)
def test_what_is_not_a_target_changes_nothing(drafter):
    """Rows that no target reads may hold NaN and infinities: no value, no gradient and no sum sees them."""
    case, cfg = Case(supervised=0.4), config(drafter, teacher_grad=True)
    loss, stats = case.ours(cfg)
    grads = case.gradients(loss)
    targets = case.targets
    used = [targets.rows, *(targets.rows[v] - 1 - k for k, v in enumerate(targets.valid.T[1:]))]
    with torch.no_grad():
        for hidden, rows in zip([case.base_hidden, *case.drafter_hidden], used, strict=True):
            other = torch.ones(B * S, dtype=torch.bool)
            other[rows] = False
            assert other.any()
            hidden.view(B * S, -1)[other] = float("nan")
            hidden.view(B * S, -1)[other.nonzero()[::2, 0]] = float("inf")
    again, again_stats = case.ours(cfg)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(again_stats, stats, rtol=0, atol=0)
    torch.testing.assert_close(case.gradients(again), grads, rtol=0, atol=0)


@pytest.mark.parametrize("drafter", [*KINDS, MIX], ids=[*KINDS, "mix"])
def test_a_row_without_a_target(drafter):
    for row in range(B):
        case = Case()
        case.labels[row] = -100
        check(case, config(drafter, teacher_grad=True, memory_budget_mb=tiny_chunks(2)), softcap=2.0)


@pytest.mark.parametrize("drafter", [*KINDS, MIX], ids=[*KINDS, "mix"])
def test_no_target_gives_zero_loss_and_zero_gradients(drafter):
    case = Case()
    case.labels.fill_(-100)
    weights = sum_weights(case.targets.counts, [1.0] * K, 1.0)
    assert weights.tolist() == [0.0] * (1 + K)
    case.weights = weights
    centroids = Centroids(case.centroid_weight, token_centroids(case.ordering, 6), top_k=2)
    loss, stats = case.ours(config(drafter, teacher_grad=True, centroid_weight=1.0), centroids=centroids)
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    for tensor in [*case.inputs.values(), case.centroid_weight]:
        assert tensor.grad.abs().max() == 0
    assert all(value.abs().sum() == 0 for value in stats.values())


def test_extreme_logits_stay_finite():
    """Disjoint supports: alpha and most probabilities are 0 in fp32."""
    for drafter in KINDS:
        case = Case()
        with torch.no_grad():
            case.base_weight.mul_(200)
            case.drafter_weight.mul_(-200)
        loss, stats = case.ours(config(drafter, teacher_grad=True))
        assert loss.isfinite() and all(value.isfinite().all() for value in stats.values()), drafter
        assert all(grad.isfinite().all() for grad in case.gradients(loss).values()), drafter


@pytest.mark.parametrize("pairing", ["serving", "same_token"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("drafter", [*KINDS, MIX], ids=[*KINDS, "mix"])
def test_bf16(drafter, softcap, pairing):
    """The values are those of fp32 arithmetic on the same bf16 inputs; a gradient differs by at most 1/64 of its
    tensor's largest entry: the logits' gradient is rounded to bf16 (2^-9 of each entry) before the matmuls, whose sums
    cancel, and the result is rounded again."""
    case = Case(dtype=torch.bfloat16, pairing=pairing)
    cfg = config(drafter, teacher_grad=pairing == "serving", memory_budget_mb=tiny_chunks(4))
    expected, expected_stats = reference(case, cfg, softcap=softcap)
    loss, stats = case.ours(cfg, softcap=softcap)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for name, value in expected_stats.items():
        torch.testing.assert_close(stats[name].double(), value.double(), rtol=1e-5, atol=1e-5)
    grads, expected_grads = case.gradients(loss), case.gradients(expected)
    for name, grad in expected_grads.items():
        assert grads[name].dtype == torch.bfloat16
        assert (grads[name].float() - grad.float()).abs().max() <= grad.float().abs().max() / 64, name


def test_head_gradients_are_summed_in_fp32():
    """1024 equal contributions, one a chunk: a bf16 sum would stop growing at 256 of them."""
    rows = 1024
    labels = torch.zeros(1, rows + 1, dtype=torch.int64)
    hidden = torch.ones(1, rows + 1, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    cfg = config("ce", memory_budget_mb=0)
    loss, _ = joint_loss(
        hidden, weight, [], weight.detach(), joint_targets(labels, None, 0, "serving"), torch.ones(1), cfg
    )
    loss.backward()
    assert weight.grad.flatten().tolist() == [-rows / 2, rows / 2]


class Fresh(torch.autograd.Function):
    """The values of one function and, taken anew in each backward, the gradients of another: gradcheck calls the
    backward many times."""

    @staticmethod
    def forward(ctx, values, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return values(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            return None, None, *torch.autograd.grad(ctx.function(*inputs), inputs, grad)


def gradcheck_case(drafter):
    """A small case: inputs, and the loss as a function of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 5, 2), (7, 2), (7, 2), (2, 2), (1, 5, 2), (1, 5, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    cfg = config(drafter, temperature=1.3, teacher_grad=True, centroid_weight=0.5, memory_budget_mb=0)
    targets = joint_targets(torch.tensor([[-100, 4, 0, 6, 2]]), None, 2, "same_token")
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def function(base_hidden, base_weight, drafter_weight, centroid_weight, *hidden):
        centroids = Centroids(centroid_weight, torch.arange(7) // 4, 1)
        loss, _ = joint_loss(
            base_hidden, base_weight, hidden, drafter_weight, targets, weights, cfg, 2.0, 3.0, centroids=centroids
        )
        return loss

    return inputs, function


@pytest.mark.parametrize("drafter", [kind for kind in KINDS if kind != "lk_hybrid"])
def test_gradcheck(drafter):
    inputs, function = gradcheck_case(drafter)
    assert torch.autograd.gradcheck(lambda *x: Fresh.apply(function, function, *x), inputs)


def test_gradcheck_of_lk_hybrid_with_its_share_held_constant():
    """Its share of the KL is a constant to the gradient: the values are a plain loss with the shares of one point."""
    inputs, function = gradcheck_case("lk_hybrid")
    _, rest = gradcheck_case({"ce": 1e-30})  # the base's loss and the routing

    def rounds(base_hidden, base_weight, drafter_weight, _, *hidden):
        """KL and TV of each valid row of each round, with its weight."""
        teacher = 2.0 * torch.tanh(base_hidden[0] @ base_weight.T / 2.0) / 1.3
        for k, weight in enumerate((0.3, 0.2)):
            student = 3.0 * torch.tanh(hidden[k][0] @ drafter_weight.T / 3.0) / 1.3
            # Position p's teacher is row p - 1, its student of round k is row p - 1 - k.
            log_p, log_q = teacher[k:4].log_softmax(-1), student[: 4 - k].log_softmax(-1)
            yield weight, (log_p.exp() * (log_p - log_q)).sum(-1), (log_p.exp() - log_q.exp()).abs().sum(-1) / 2

    with torch.no_grad():
        shares = [torch.exp(-3 * (1 - tv)) for _, _, tv in rounds(*inputs)]

    def values(*x):
        parts = zip(rounds(*x), shares, strict=True)
        return rest(*x) + sum(w * (share * kl + (1 - share) * tv).sum() for (w, kl, tv), share in parts)

    torch.testing.assert_close(values(*inputs), function(*inputs))
    assert torch.autograd.gradcheck(lambda *x: Fresh.apply(values, function, *x), inputs)


@pytest.mark.parametrize("frozen", ["base_hidden", "base_weight", "drafter_weight", "drafter_hidden", "all"])
def test_frozen_inputs(frozen):
    """What is frozen gets no gradient; the rest gets what it got before."""
    cfg = config("js", teacher_grad=True)
    expected_loss, _ = reference(Case(), cfg)
    expected = Case()
    expected = expected.gradients(reference(expected, cfg)[0])
    case = Case()
    chosen = {n: t for n, t in case.inputs.items() if frozen == "all" or n.startswith(frozen)}
    for tensor in chosen.values():
        tensor.requires_grad_(False)
    loss, _ = case.ours(cfg)
    torch.testing.assert_close(loss, expected_loss.float(), rtol=1e-5, atol=1e-5)
    assert loss.requires_grad == (frozen != "all")
    if frozen != "all":
        loss.backward()
    for name, tensor in case.inputs.items():
        if name in chosen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-5, atol=1e-5)


def test_train_base_false_makes_the_base_a_constant():
    case, constant = Case(), Case()
    constant.base_hidden.requires_grad_(False)
    constant.base_weight.requires_grad_(False)
    cfg = config("kl", teacher_grad=True)
    loss, _ = case.ours(cfg, train_base=False)
    loss.backward()
    other, _ = constant.ours(cfg)
    other.backward()
    assert case.base_hidden.grad is None and case.base_weight.grad is None
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(case.drafter_weight.grad, constant.drafter_weight.grad)


def test_no_grad_takes_no_gradients():
    case = Case()
    expected, expected_stats = case.ours(config())
    with torch.no_grad():
        loss, stats = case.ours(config())
    assert not loss.requires_grad
    torch.testing.assert_close((loss, stats), (expected.detach(), expected_stats))


def test_tied_heads_and_a_scaled_loss():
    """One parameter as both heads, and a loss that is multiplied before its backward."""
    case = Case()
    case.drafter_hidden = [torch.randn(B, S, HB).requires_grad_() for _ in range(K)]
    case.drafter_weight = case.base_weight
    expected, _ = reference(case, config("kl", teacher_grad=True))
    (3 * expected).backward()
    grads = [t.grad.clone() for t in case.inputs.values()]
    for tensor in case.inputs.values():
        tensor.grad = None
    loss, _ = case.ours(config("kl", teacher_grad=True))
    (3 * loss).backward()
    torch.testing.assert_close([t.grad for t in case.inputs.values()], grads, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused():
    loss, _ = Case().ours(config())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


def test_parts_of_a_batch_add_up():
    """The rows of a batch one by one, with the weights of the whole batch: the same loss, sums and gradients."""
    case = Case()
    whole, whole_stats = case.ours(config("lk_hybrid"))
    whole_grads = case.gradients(whole)
    parts, stats, grads = 0.0, None, {}
    for b in range(B):
        targets = joint_targets(case.labels[b : b + 1], case.documents[b : b + 1], K, case.pairing)
        hidden = [h[b : b + 1] for h in case.drafter_hidden]
        loss, part = joint_loss(
            case.base_hidden[b : b + 1], case.base_weight, hidden, case.drafter_weight, targets,
            case.weights.float(), config("lk_hybrid"),
        )  # fmt: skip
        parts = parts + loss.detach()
        stats = part if stats is None else stats + part
        grads = {name: grads.get(name, 0) + grad for name, grad in case.gradients(loss).items()}
    torch.testing.assert_close(parts, whole.detach())
    torch.testing.assert_close(stats.named(), whole_stats)
    torch.testing.assert_close(grads, whole_grads)


def test_sums_by_group():
    case = Case()
    targets = case.targets
    groups = torch.arange(len(targets.rows)) % 3
    _, stats = case.ours(config(memory_budget_mb=tiny_chunks(4)), groups=groups, num_groups=3)
    for group in range(3):
        mine = groups == group
        part = replace(targets, rows=targets.rows[mine], labels=targets.labels[mine], valid=targets.valid[mine])
        _, expected = case.ours(config(), targets=part)
        torch.testing.assert_close(stats["sources.base_ce"][group], expected["ce"][0])
        torch.testing.assert_close(stats["sources.drafter_ce"][group], expected["ce"][1:].sum())
        assert stats["sources.agree"][group] == expected["drafts.agree"].sum()
        assert stats["sources.base_count"][group] == expected["count"][0]
        assert stats["sources.drafter_count"][group] == expected["count"][1:].sum()


def test_accepted_counts_only_leading_rounds_that_agree():
    """Heads that read the argmax off one-hot states, so that each round agrees with the base just where it should."""
    length, vocabulary = 12, 8
    generator = torch.Generator().manual_seed(0)
    base_tokens = torch.randint(vocabulary, (length,), generator=generator)
    agree = torch.rand(length, K, generator=generator) < 0.6
    full = range(length - K - 1)  # rows t whose last target, t + 1 + K, is in the row (pairing "serving")
    assert any(not agree[t, 0] and agree[t, 1:].any() for t in full) and any(agree[t].all() for t in full)
    draft = torch.stack([base_tokens.roll(-1 - k) for k in range(K)], dim=1)  # the base's row for it is t + 1 + k
    draft = torch.where(agree, draft, (draft + 1) % vocabulary)
    eye = torch.eye(vocabulary)
    targets = joint_targets(torch.zeros(1, length, dtype=torch.int64), None, K, "serving")
    hidden = [eye[draft[:, k]][None] for k in range(K)]
    _, stats = joint_loss(eye[base_tokens][None], eye, hidden, eye, targets, torch.ones(1 + K), config())
    assert stats.full_rows == len(full)
    assert stats.drafts.accepted == sum(len(list(itertools.takewhile(bool, agree[t]))) for t in full)
    visited = [0]  # a verification settles the accepted drafts and a token of the base's own
    while (row := visited[-1] + 1 + len(list(itertools.takewhile(bool, agree[visited[-1]])))) in full:
        visited.append(row)
    assert 1 < len(visited) < len(full)
    assert stats.drafts.walk_rows == len(visited)
    assert stats.drafts.walk_accepted == sum(len(list(itertools.takewhile(bool, agree[t]))) for t in visited)


class Watch(TorchDispatchMode):
    """Records the operators of a region and the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.operators, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operators.add(function.overloadpacket.__name__)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("drafter", [*KINDS, MIX], ids=[*KINDS, "mix"])
def test_memory_is_that_of_a_chunk_and_nothing_waits_for_the_device(drafter):
    vocabulary, positions, rows = 3000, 50, 2
    hidden = torch.randn(1, positions, 2).requires_grad_()
    weight = torch.randn(vocabulary, 2).requires_grad_()
    targets = joint_targets(torch.randint(vocabulary, (1, positions)), None, 2, "serving")
    budget = 16 * rows * vocabulary * 4
    cfg = config(drafter, temperature=1.5, teacher_grad=True, memory_budget_mb=budget / 2**20)
    centroids = Centroids(torch.randn(10, 2).requires_grad_(), torch.arange(vocabulary) // 300, top_k=3)
    cfg.centroid_weight = 1.0
    with Watch() as watch:
        loss, _ = joint_loss(
            hidden, weight, [hidden, hidden], weight, targets, torch.ones(3), cfg, softcap=30.0, centroids=centroids
        )
    assert watch.largest <= budget < positions * vocabulary * 4
    # Operators whose result, or its shape, has to be read back from the device.
    assert not watch.operators & {"_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal"}


class Copies(TorchDispatchMode):
    """Operators that wait while they copy to the device: of a tensor, or of a Python number that is put by index, which
    on a GPU is made on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        blocking = function is torch.ops.aten._to_copy.default and not (kwargs or {}).get("non_blocking", False)
        number = function.overloadpacket.__name__.startswith("index_put") and args[2].dim() == 0
        if number or (any(not x.is_meta for x in tensors) and (len(tensors) > 1 or blocking)):
            found.append(str(function))
        return function(*args, **(kwargs or {}))


found: list[str] = []


def test_nothing_is_copied_to_the_device_and_waited_for():
    hidden = torch.randn(1, 50, 2, device="meta").requires_grad_()
    weight = torch.randn(30, 2, device="meta").requires_grad_()
    targets = joint_targets(torch.zeros(1, 50, dtype=torch.int64), None, 2, "serving").to("meta")
    centroids = Centroids(torch.randn(5, 2, device="meta"), torch.zeros(30, dtype=torch.int64, device="meta"), 3)
    found.clear()
    with Copies():
        weights = sum_weights(targets.counts, [1.0, 1.0], 1.0)
        joint_loss(
            hidden, weight, [hidden, hidden], weight, targets, weights, config(MIX, teacher_grad=True, temperature=1.5),
            softcap=30.0, centroids=centroids, groups=torch.zeros(49, dtype=torch.int64, device="meta"), num_groups=2,
        )[0].backward()  # fmt: skip
    assert not found


def both_ways(drafter, dtype, **changes):
    """Losses, sums and gradients without and with loss.compile; several chunks, the last of them smaller."""
    results = []
    for compiled in (False, True):
        case = Case(dtype)
        centroids = Centroids(case.centroid_weight, token_centroids(case.ordering, 6), top_k=2)
        cfg = config(drafter, memory_budget_mb=tiny_chunks(12, torch.float32, 8), compile=compiled,
                     centroid_weight=0.3, **changes)  # fmt: skip
        loss, stats = case.ours(cfg, softcap=5.0, centroids=centroids)
        results.append((loss, stats, case.gradients(loss, [("centroids", case.centroid_weight)])))
    return results


def assert_same_both_ways(drafter, dtype=torch.float32, **changes):
    (loss, stats, gradients), compiled = both_ways(drafter, dtype, **changes)
    for ours, other in zip((loss, stats), compiled, strict=False):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    # In half precision a gradient is rounded once either way, of numbers that may differ in their last digit.
    rounding = {} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[2][name], gradient, **({"rtol": 1e-5, "atol": 1e-6} | rounding))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_compiled_terms_equal_the_plain_ones():
    mix = dict.fromkeys(KINDS, 0.2)
    assert_same_both_ways(mix, teacher_grad=True, temperature=1.5)


@pytest.mark.slow
def test_compiled_terms_in_half_precision():
    assert_same_both_ways("lk_hybrid", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("teacher_grad", [False, True])
@pytest.mark.parametrize("drafter", KINDS)
def test_compiled_terms_of_every_kind(drafter, teacher_grad):
    torch._dynamo.reset()
    assert_same_both_ways(drafter, teacher_grad=teacher_grad)


@pytest.mark.parametrize("drafter", ["kl", "lk_hybrid", pytest.param("js", marks=pytest.mark.slow)])
def test_a_compiled_round_reads_both_logits_and_writes_the_gradient(drafter, monkeypatch):
    """Kernels and bytes of a round of 64 rows, as a GPU's kernels are fused (for a CPU exponentials are kept)."""
    kernels, codegen = [], Scheduler.codegen
    monkeypatch.setattr(torch._inductor.ir, "is_cpu", lambda _: False)
    monkeypatch.setattr(
        Scheduler,
        "codegen",
        lambda self: (kernels.extend(n.get_read_write_buffers_sizes() for n in self.nodes), codegen(self))[1],
    )
    torch._dynamo.reset()
    rows, vocabulary = 64, 4096
    numbers = torch.ones(rows)
    labels = torch.randint(vocabulary, (rows,))
    terms = Compiled(
        Mix({drafter: 1.0}, 0.0, 0.0, 1.0, 0.0), None, (30.0, None), torch.randn(2, rows, vocabulary),
        (torch.bfloat16, torch.bfloat16),
    )  # fmt: skip
    base, product = terms.product_buffers(rows)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        terms.base(base, labels, numbers)
        kernels.clear()
        terms.round(product, labels, numbers, None, None)
    least = rows * vocabulary * (4 + 4 + 2)
    assert least <= sum(kernels) <= 1.3 * least
    assert len(kernels) <= 5


def test_chunks_are_equal_and_of_whole_tiles():
    for most, total, expected in [
        (170, 2047, 128), (700, 2047, 512), (600, 1300, 512), (12, 100, 12), (12, 25, 9), (0, 7, 1), (300, 0, 1),
        (300, 5, 128), (5000, 2047, 2048),
    ]:  # fmt: skip
        rows = loss_module.chunk_rows(most, total)
        assert rows == expected <= max(most, 1)
        assert -(-total // rows) <= -(-total // max(1, most // 128 * 128 or most))


def decoded(labels, documents, rounds, offset):
    """(b, target, round) of all drafts that decoding the answers could make, whatever is accepted.

    An answer is a run of supervised tokens of one document, after its first token. Decoding starts at the row before
    it, which samples its first token, and goes on to any row of it. Each drafts `rounds` tokens, as far as the answer
    goes.
    """
    drafts = set()
    for b, (row_labels, row_documents) in enumerate(zip(labels.tolist(), documents.tolist(), strict=True)):
        for start in range(len(row_labels) - 1):
            supervised = [
                row_labels[p] != -100 and row_documents[p] == row_documents[start] != 0
                for p in range(start + 1, len(row_labels))
            ]
            length = len(list(itertools.takewhile(bool, supervised)))
            drafts |= {(b, start + 1 + offset + k, k) for k in range(rounds) if offset + k < length}
    return drafts


@pytest.mark.parametrize("prompt_rows", [None, False, True])
@pytest.mark.parametrize("pairing", ["serving", "same_token"])
@pytest.mark.parametrize("rounds", [0, 1, 3, 12])
def test_targets(pairing, rounds, prompt_rows):
    """Against the definition, position by position, for random documents, padding and labels."""
    generator = torch.Generator().manual_seed(rounds)
    offset = {"serving": 1, "same_token": 0}[pairing]
    rows, length = 5, 11
    starts = torch.rand(rows, length, generator=generator) < 0.3
    documents = starts.long().cumsum(1) + 1
    documents[torch.arange(length) >= torch.tensor([11, 9, 1, 0, 6])[:, None]] = 0
    tokens = torch.randint(50, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.6, tokens, -100)
    drafts = decoded(labels, documents, rounds, offset)
    everywhere = pairing == "same_token" if prompt_rows is None else prompt_rows
    expected, left_out = [], 0
    for b, p in itertools.product(range(rows), range(length)):
        same = [t >= 0 and documents[b, t] == documents[b, p] != 0 for t in range(p - 1, p - 2 - offset - rounds, -1)]
        if labels[b, p] != -100 and same[0]:
            valid = [bool(same[offset + k]) for k in range(rounds)]
            reached = [ok and (b, p, k) in drafts for k, ok in enumerate(valid)]
            left_out += 0 if everywhere else sum(valid) - sum(reached)
            expected.append((b * length + p - 1, int(labels[b, p]), [True, *(valid if everywhere else reached)]))
    targets = joint_targets(labels, documents, rounds, pairing, prompt_rows)
    assert targets.rows.tolist() == [row for row, _, _ in expected]
    assert targets.labels.tolist() == [label for _, label, _ in expected]
    assert targets.valid.tolist() == [valid for _, _, valid in expected]
    assert targets.counts.tolist() == [sum(v[i] for _, _, v in expected) for i in range(1 + rounds)]
    assert targets.batch_rows == rows * length
    assert targets.left_out == left_out
    if rounds > 1 and not everywhere:
        assert left_out > 0


@pytest.mark.parametrize(("answer", "share"), [(2, 0.875), (4, 0.625), (8, 0.3125)])
def test_the_shorter_an_answer_the_more_targets_lie_where_no_decoding_comes(answer, share):
    """With K = 4 drafts and a prompt that is longer."""
    labels = torch.full((1, 40), -100)
    labels[0, -answer:] = 1
    targets = joint_targets(labels, None, 4, "serving")
    assert targets.left_out / (4 * answer) == share
    assert targets.counts.tolist() == [answer, *(max(0, answer - 1 - k) for k in range(4))]
    assert joint_targets(labels, None, 4, "serving", True).counts.tolist() == [answer] * 5


def test_targets_without_documents_are_one_document_a_row():
    labels = torch.randint(9, (2, 7))
    one = joint_targets(labels, None, 2, "serving")
    two = joint_targets(labels, torch.ones_like(labels), 2, "serving")
    assert one.rows.equal(two.rows) and one.valid.equal(two.valid)
    with pytest.raises(ValueError, match="drafter.pairing='both'"):
        joint_targets(labels, None, 2, "both")


def test_sum_weights():
    weights = sum_weights(torch.tensor([10, 5, 0]), [0.5, 1.0], loss_weight=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.1, 0.2, 0.0]))


def test_drafter_loss_from_the_configuration():
    def parse(choice):
        return parse_drafter_loss(LossConfig(drafter=choice))

    assert parse("nla") == {"nla": 1.0}
    assert parse({"ce": 0.1, "nla": 0.9, "kl": 0}) == {"ce": 0.1, "nla": 0.9}
    for choice in ("mse", {"ce": 1, "mse": 1}, ["ce"], None, 3):
        with pytest.raises(ValueError, match="loss.drafter=.*ce_argmax.*lk_hybrid"):
            parse(choice)
    for weight in (-1, "a", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="loss.drafter: the weight of ce"):
            parse({"ce": weight})
    with pytest.raises(ValueError, match="loss.drafter="):
        parse({"ce": 0})


def test_teacher_grad_from_the_configuration():
    for choice, number in ((False, 0.0), (True, 1.0), (0, 0.0), (0.3, 0.3), (2, 2.0)):
        assert teacher_grad(LossConfig(teacher_grad=choice)) == number
    for choice in (-0.1, "some", None, float("nan"), float("inf"), [1]):
        with pytest.raises(ValueError, match="loss.teacher_grad"):
            teacher_grad(LossConfig(teacher_grad=choice))


def test_round_weights_from_the_configuration():
    def parse(choice):
        return round_weights(LossConfig(round_weights=choice), 3)

    assert parse(None) == [1.0, 1.0, 1.0]
    assert parse([1, 0.5, 0]) == [1.0, 0.5, 0.0]
    assert parse({"decay": 0.5}) == [1.0, 0.5, 0.25]
    bad = (
        [1, 1],
        [1, 1, -1],
        [1, 1, "a"],
        {"decay": -1},
        {"beta": 0.5},
        {"decay": 1, "beta": 1},
        "decay",
        0.5,
        [0, 0, 0],
    )
    for choice in bad:
        with pytest.raises(ValueError, match="loss.round_weights"):
            parse(choice)
