"""What a step measures: sums that add up in any parts, and the metrics that they amount to."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from joint_train.metrics import METRICS, TARGET_METRICS
from joint_train.pair.stats import DraftStats, JointStats, RoutingStats, SourceStats

K, SOURCES = 3, ("long", "short")


def part(seed: int, ordered: bool = True, sources: bool = True) -> JointStats:
    """Sums of one micro-batch on one rank."""
    generator = torch.Generator().manual_seed(seed)

    def sums(*shape: int) -> Tensor:
        return 10 * torch.rand(shape, generator=generator)

    def counts(*shape: int) -> Tensor:
        return torch.randint(1, 9, shape, generator=generator)

    def drafts() -> DraftStats:
        return DraftStats(sums(K), sums(K), sums(K), counts(), counts(), counts())

    return JointStats(
        loss=sums(1 + K),
        ce=sums(1 + K),
        top1=sums(1 + K),
        count=counts(1 + K),
        left_out=counts(),
        full_rows=counts(),
        drafts=drafts(),
        dense=drafts() if ordered else None,
        routing=RoutingStats(sums(K), sums(K)) if ordered else None,
        sources=SourceStats(sums(2), sums(2), counts(2).float(), counts(2).float(), sums(2)) if sources else None,
    )


def expected_means(parts: list[JointStats]) -> dict[str, float]:
    """By the documented meanings, number by number."""

    def total(name: str, i: int | None = None) -> float:
        found = [p.named()[name] for p in parts]
        return sum(float(x if i is None else x[i]) for x in found)

    def mean(name: str, i: int, count: int) -> float:
        return total(name, i) / total("count", count) if total("count", count) else math.nan

    with_targets = [k for k in range(K) if total("count", 1 + k)]

    def over_rounds(name: str) -> float:
        values = [mean(name, 1 + k, 1 + k) for k in with_targets]
        return sum(values) / len(values) if values else math.nan

    of_rounds = sum(total("count", 1 + k) for k in range(K))
    found = {
        "base_loss": mean("loss", 0, 0),
        "base_accuracy": mean("top1", 0, 0),
        "drafter_loss": over_rounds("loss"),
        "drafter_ce": over_rounds("ce"),
        "drafter_targets_left_out": total("left_out") / (total("left_out") + of_rounds),
    }
    heads = {"": "drafts", "dense_": "dense"} if parts[0].dense is not None else {"": "drafts"}
    for prefix, head in heads.items():
        for name, rows in (("accepted", "full_rows"), ("walk_accepted", f"{head}.walk_rows")):
            metric = "walked" if name.startswith("walk") else "expected"
            length = 1 + total(f"{head}.{name}") / total(rows) if total(rows) else math.nan
            found[f"{prefix}accepted_length_{metric}"] = length
    for k in range(K):
        found |= {f"drafter_{name}_{k}": mean(name, 1 + k, 1 + k) for name in ("loss", "ce")}
        for prefix, head in heads.items():
            for name, field in (("agreement", "agree"), *((x, x) for x in ("acceptance_argmax", "acceptance_sampled"))):
                found[f"{prefix}{name}_{k}"] = mean(f"{head}.{field}", k, 1 + k)
        if parts[0].routing is not None:
            found[f"centroid_hit_{k}"] = mean("routing.hit", k, 1 + k)
    if parts[0].sources is not None:
        for i, source in enumerate(SOURCES):
            for model in ("base", "drafter"):
                if count := total(f"sources.{model}_count", i):
                    found[f"{source}/{model}_ce"] = total(f"sources.{model}_ce", i) / count
            if count:
                found[f"{source}/agreement"] = total("sources.agree", i) / count
            found[f"{source}/targets"] = total("sources.base_count", i)
    return found


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("sources", [False, True])
def test_means_are_those_of_all_micro_batches_of_all_ranks(ordered, sources):
    ranks = [[part(10 * rank + i, ordered, sources) for i in range(2)] for rank in range(3)]
    others = [first + second for first, second in ranks[1:]]
    reduced = []

    def all_reduce(flat: Tensor) -> None:
        reduced.append(flat.shape)
        for other in others:
            flat += torch.cat([x.double().flatten() for x in other.named().values()])

    total = (ranks[0][0] + ranks[0][1]).reduced(all_reduce)
    assert reduced == [(sum(x.numel() for x in part(0, ordered, sources).named().values()),)]
    for name, x in part(0, ordered, sources).named().items():
        assert (total.named()[name].dtype, total.named()[name].shape) == (torch.float64, x.shape)
    expected = expected_means([p for parts in ranks for p in parts])
    assert total.means(SOURCES) == pytest.approx(expected, rel=1e-6)


def test_counts_are_exact_where_float32_is_not():
    many = replace(part(0), count=torch.full((1 + K,), 2**24 + 1), top1=torch.full((1 + K,), 2.0**24))
    assert many.reduced(lambda flat: None).means()["base_accuracy"] == 2**24 / (2**24 + 1)


@pytest.mark.parametrize("rounds", [K - 1, 1, 0])
def test_rounds_without_a_target_are_left_out_of_the_means(rounds):
    """Answers too short for the later rounds: what there is to measure is the mean of the earlier ones."""

    def without(x: Tensor, first: int) -> Tensor:
        return torch.cat([x[:first], torch.zeros_like(x[first:])])

    full = part(1)
    short = replace(
        full,
        **{name: without(getattr(full, name), 1 + rounds) for name in ("loss", "ce", "top1", "count")},
        full_rows=torch.tensor(0),
        drafts=full.drafts.map(lambda x: without(x, rounds) if x.ndim else torch.zeros_like(x)),
        dense=None,
        routing=None,
    )
    means = short.means(SOURCES)
    assert means == pytest.approx(expected_means([short]), nan_ok=True)
    assert math.isfinite(means["drafter_loss"]) == math.isfinite(means["drafter_ce"]) == (rounds > 0)
    assert [math.isnan(means[f"drafter_loss_{k}"]) for k in range(K)] == [k >= rounds for k in range(K)]
    assert math.isnan(means["accepted_length_expected"]) and math.isnan(means["accepted_length_walked"])


def test_a_loss_that_is_not_a_number_is_not_taken_for_one_without_targets():
    stats = part(2)
    stats.loss[2] = math.nan
    assert math.isnan(stats.means()["drafter_loss"])


def test_a_source_without_a_target_has_no_mean():
    stats = part(3)
    stats.sources.base_count[1] = stats.sources.drafter_count[1] = 0
    names = {name for name in stats.means(SOURCES) if name.startswith("short/")}
    assert names == {"short/targets"}


def test_an_adapter_has_the_sums_of_its_sources():
    stats = part(4)
    both, means = stats.sources, stats.means(SOURCES, ["a", "a"])
    assert means["adapter/a/agreement"] == pytest.approx(float(both.agree.sum() / both.drafter_count.sum()))
    assert means["adapter/a/base_ce"] == pytest.approx(float(both.base_ce.sum() / both.base_count.sum()))
    assert means["adapter/a/targets"] == both.base_count.sum()
    named = {name: value for name, value in stats.means(SOURCES, [None, "b"]).items() if name.startswith("adapter/")}
    assert named == {
        f"adapter/b/{x}": means[f"{SOURCES[1]}/{x}"] for x in ("base_ce", "drafter_ce", "agreement", "targets")
    }


def test_sums_of_different_kinds_are_not_added():
    with pytest.raises(ValueError, match="JointStats.routing is there in some of the sums only"):
        part(0) + replace(part(1), routing=None)


def test_every_name_is_documented_and_every_documented_name_is_there():
    def template(name: str) -> str:
        name = re.sub(r"_\d+$", "_{k}", name)
        if name.startswith("dense_"):
            assert template(name.removeprefix("dense_")) in METRICS
            return "dense_{metric}"
        source, slash, metric = name.partition("/")
        if source == "adapter":
            adapter, _, metric = metric.rpartition("/")
            assert adapter == "a/b" and f"{{source}}/{metric}" in METRICS
            return "adapter/{adapter}/{metric}"
        return f"{{source}}/{metric}" if slash else source

    assert {template(name) for name in part(0).means(SOURCES, [None, "a/b"])} == TARGET_METRICS.keys() <= METRICS.keys()
