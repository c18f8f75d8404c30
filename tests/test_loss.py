"""The chunked joint loss against the plain one: all logits, a loop over rows, autograd."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from joint_train.loss import (
    KINDS,
    joint_loss,
    joint_targets,
)

B, S, V, HB, HD, K = 2, 9, 24, 6, 4, 3


def config(drafter="kl", **changes):
    defaults = dict(temperature=1.0, teacher_grad=False, round_weights=None, centroid_weight=0.0, memory_budget_mb=512)
    return SimpleNamespace(drafter=drafter, **(defaults | changes))


def tiny_chunks(rows, dtype=torch.float32, buffers=5):
    """A memory budget for chunks of about that many rows."""
    return rows * buffers * V * dtype.itemsize / 2**20


class Case:
    """Random hidden states and heads, and a batch with several documents, padding and unsupervised tokens."""

    def __init__(self, dtype=torch.float32, pairing="serving", seed=0, supervised=0.7, requires_grad=True):
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

    def ours(self, cfg, **options):
        weights = self.weights.to(torch.float64 if self.base_hidden.dtype == torch.float64 else torch.float32)
        hidden, weight = self.base_hidden, self.base_weight
        return joint_loss(
            hidden, weight, self.drafter_hidden, self.drafter_weight, self.targets, weights, cfg, **options
        )

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
    names = ("loss", "ce", "top1", "agree", "acceptance", "centroid_ce", "centroid_hit", "count")
    stats = {name: [0.0] * (1 + K) for name in names}
    agreement = {}

    for b, p in itertools.product(range(B), range(S)):
        label, doc = case.labels[b, p], case.documents[b, p]
        if label == -100 or p == 0 or doc == 0 or case.documents[b, p - 1] != doc:
            continue
        teacher = base[b, p - 1]
        ce = -teacher.log_softmax(-1)[label]
        stats["loss"][0] += ce
        stats["ce"][0] += ce
        stats["top1"][0] += teacher.argmax() == label
        stats["count"][0] += 1
        seen = teacher if cfg.teacher_grad else teacher.detach()
        for k in range(K):
            t = p - 1 - offset - k
            if t < 0 or case.documents[b, t] != doc:
                continue
            student = rounds[k][b, t]
            stats["loss"][1 + k] += sum(
                weight * reference_row(kind, seen, student, label, cfg.temperature) for kind, weight in mix.items()
            )
            stats["ce"][1 + k] += -student.log_softmax(-1)[label]
            stats["top1"][1 + k] += student.argmax() == label
            stats["count"][1 + k] += 1
            stats["agree"][k] += student.argmax() == teacher.argmax()
            stats["acceptance"][k] += torch.minimum(teacher.softmax(-1), student.softmax(-1)).sum()
            agreement[b, t, k] = bool(student.argmax() == teacher.argmax())
            if centroids is not None:
                scores = up(case.drafter_hidden[k])[b, t] @ up(centroids.weight).T
                tokens = case.ordering.view(len(scores), -1)
                target = next(c for c in range(len(scores)) if label in tokens[c])
                stats["centroid_ce"][k] += -scores.log_softmax(-1)[target]
                stats["centroid_hit"][k] += target in scores.topk(centroids.top_k).indices

    accepted = full_rows = 0
    for b, t in itertools.product(range(B), range(S)):
        if all((b, t, k) in agreement for k in range(K)):
            full_rows += 1
            for k in range(K):
                if not agreement[b, t, k]:
                    break
                accepted += 1
    loss = sum(w * x for w, x in zip(case.weights, stats["loss"], strict=True))
    if centroids is not None:
        loss = loss + cfg.centroid_weight * sum(
            w * x for w, x in zip(case.weights[1:], stats["centroid_ce"][:K], strict=True)
        )
    per_round = ("agree", "acceptance", "centroid_ce", "centroid_hit")
    stats = {
        n: torch.tensor([float(torch.as_tensor(x).detach()) for x in (v[:K] if n in per_round else v)])
        for n, v in stats.items()
    }
    if centroids is None:
        del stats["centroid_ce"], stats["centroid_hit"]
    return loss, stats | {"accepted": torch.tensor(float(accepted)), "full_rows": torch.tensor(full_rows)}


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


@pytest.mark.parametrize("teacher_grad", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("drafter", [*KINDS, MIX], ids=[*KINDS, "mix"])
def test_equals_the_materialised_loss(drafter, temperature, softcap, teacher_grad):
    cfg = config(drafter, temperature=temperature, teacher_grad=teacher_grad, memory_budget_mb=tiny_chunks(4))
    check(Case(), cfg, softcap=softcap, drafter_softcap=None if softcap is None else 3.0)


def test_lk_hybrid_in_a_mix_does_not_take_the_kl_weight_for_its_own():
    check(Case(), config({"kl": 0.5, "lk_hybrid": 0.25}))


@pytest.mark.parametrize("rows", range(1, 12))
def test_chunk_boundaries_are_invisible(rows):
    case = Case(dtype=torch.float64)
    whole, whole_stats = case.ours(config())
    loss, stats = case.ours(config(memory_budget_mb=tiny_chunks(rows, torch.float64)))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(stats, whole_stats)
    torch.testing.assert_close(case.gradients(loss), case.gradients(whole))


@pytest.mark.parametrize("pairing", ["serving", "same_token"])
def test_pairings(pairing):
    check(Case(pairing=pairing, seed=3), config("nla"))
