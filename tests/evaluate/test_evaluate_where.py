"""Where drafts are accepted, how many to draft, before and after: against plain loops and a simulated engine."""

import io
import json
import logging
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from adapters import make_adapter, merged_by_peft
from pairs import build_pair, make_pair
from test_evaluate import FakeTokenizer, Gemma4AssistantDouble, folders, pair, prompts  # noqa: F401
from test_evaluate_served import serve  # noqa: F401
from transformers import AutoConfig

from joint_train import progress
from joint_train.evaluate import against, cost, recommend
from joint_train.evaluate.__main__ import columns_of, main
from joint_train.evaluate.cost import Roofline, measured_factors
from joint_train.evaluate.decoding import Decoded, decode, tokens_per_forward
from joint_train.evaluate.prompts import Prompt, load_prompts
from joint_train.evaluate.recommend import Trace, walk
from joint_train.evaluate.where import CALLS, CODE, PLAIN, THINKING, bucket, spans_of, where
from joint_train.plan.machine import CARDS
from joint_train.weights import placing
from joint_train.weights.loading import build_meta

K = 3

# where


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids, **kwargs) -> str:
        return "".join(map(chr, ids))


def spans(answer: str, prompt: str = "") -> list[str]:
    return spans_of([ord(c) for c in prompt], [ord(c) for c in answer], Characters())


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", [("ab", PLAIN), ("<|channel>thought\nx```\n<channel|>", THINKING), ("cd", PLAIN)]),
        ("", [("<think>x</think>", THINKING), ("y", PLAIN), ("<tool_call>{}</tool_call>", CALLS), ("z", PLAIN)]),
        ("…<|channel>thought\n", [("xy<channel|>", THINKING), ("z", PLAIN)]),
        ("…<|channel>thought\n<channel|>", [("xy", PLAIN)]),
        ("", [("a\n", PLAIN), ("```py\nx\n```", CODE), ("\nb", PLAIN)]),
        ("", [("a ``` b", PLAIN)]),
        ("", [("<think>\n```\nx\n```\n</think>", THINKING), ("\n", PLAIN), ("```\ny\n```", CODE)]),
        ("", [("a", PLAIN), ("<|tool_call>call:f{x", CALLS)]),
        ("", [("~~~\n```\n~~~", CODE), ("\nc", PLAIN)]),
    ],
)
def test_spans_of_an_answer(prompt, parts):
    expected = [name for text, name in parts for _ in text]
    assert spans("".join(text for text, _ in parts), prompt) == expected


def test_where_counts_each_verification_once_and_as_a_loop_does():
    rng = random.Random(1)
    asked, decoded = [], []
    for i in range(12):
        drafted = [rng.randint(0, K) for _ in range(rng.randint(3, 30))]
        settled = [rng.randint(1, drafts + 1) for drafts in drafted]
        answer = "".join(rng.choice("ab") for _ in range(1 + sum(settled)))
        at = rng.randrange(len(answer))
        answer = (answer[:at] + "<think>")[: len(answer)].ljust(len(answer), "x")
        decoded.append(Decoded([ord(c) for c in answer], drafted, settled, ended=rng.random() < 0.5))
        asked.append(Prompt([65] * rng.randint(1, 300), "", "", source="ab"[i % 2], language=["de", None][i % 2]))
    found = where(asked, decoded, Characters(), 0)
    names = {
        "position": lambda p, d, at: bucket(at + 1, 16)[1],
        "context": lambda p, d, at: bucket(len(p.ids) + at, 128)[1],
        "span": lambda p, d, at: THINKING if "<think>" in "".join(map(chr, d.ids)) and at >= "".join(
            map(chr, d.ids)).index("<think>") else PLAIN,
        "source": lambda p, d, at: p.source,
        "language": lambda p, d, at: p.language,
    }  # fmt: skip
    for way, name_of in names.items():
        counted: dict[str, list[int]] = {}
        for p, d in zip(asked, decoded, strict=True):
            at = 1
            for number, (drafts, settled) in enumerate(zip(d.drafted, d.settled, strict=True)):
                sums = counted.setdefault(name_of(p, d, at), [0, 0, 0, 0])
                sums[0] += 1
                sums[1] += settled
                if drafts and not (d.ended and number == len(d.settled) - 1):
                    sums[2] += 1
                    sums[3] += settled > 1
                at += settled
        counted.pop(None, None)
        assert {part["name"] for part in found[way]} == counted.keys()
        for part in found[way]:
            verifications, settled, drafted, accepted = counted[part["name"]]
            assert part["verifications"] == verifications
            assert part["tokens_per_forward"]["value"] == pytest.approx(settled / verifications)
            assert drafted == 0 or part["first"]["value"] == pytest.approx(accepted / drafted)
    assert [part["name"] for part in found["position"]][:3] == ["1 to 16", "17 to 32", "33 to 64"]


def test_prompts_without_answers_and_with_sources_and_languages(tmp_path):
    lines = [
        {"prompt": "one two", "language": "de"},
        {"prompt": [{"role": "user", "content": "a b c"}], "source": "faq"},
        {"instruction": "do it", "input": "now"},
        {"messages": [{"role": "user", "content": "q"}], "dataset": "chat"},
        {"prompt": "asked", "response": "answered"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_prompts(str(file), FakeTokenizer())
    assert [p.text for p in found] == ["one two", "a b c", "do it\nnow", "q", "asked"]
    assert [(p.source, p.language) for p in found[:4]] == [(None, "de"), ("faq", None), (None, None), ("chat", None)]
    both = load_prompts([str(file), "general"], FakeTokenizer(), limit=2)
    assert [p.source for p in both] == ["mine", "faq", "general", "general"]


# how many


class Clock:
    """What a step of the simulated engine takes: rows are free up to a point."""

    def verify(self, rows, batch):
        return 1.0 + 0.02 * max(0.0, rows - 20) + 0.003 * rows

    def draft(self, batch):
        return 0.11 + 0.001 * batch


def made_up(rng, length: int) -> Trace:
    """An answer that gets harder towards its end, with a confidence that says something of it."""
    matches, confidences = [], []
    for at in range(length):
        right = 0.92 - 0.5 * at / length
        run = 0
        while run < 8 and rng.random() < right:
            run += 1
        sure = [min(0.99, max(0.01, (0.75 if k < run else 0.35) + rng.uniform(-0.3, 0.3))) for k in range(8)]
        matches.append(min(run, length - at))
        confidences.append(sure[: length - at])
    return Trace(matches, confidences)


def simulate(traces, n, threshold, batch, clock, seconds_wanted=4000.0):
    """An engine that decodes `batch` answers together, one verification of all of them at a time; tokens/s."""
    rng = random.Random(5)
    sequences = [[rng.randrange(len(traces)), 0] for _ in range(batch)]
    now, tokens = 0.0, 0
    while now < seconds_wanted:
        rows, passes = 0, 0
        for sequence in sequences:
            trace, at = traces[sequence[0]], sequence[1]
            drafts, made = 0, 0
            for confidence in trace.confidences[at][:n]:
                made += 1
                if confidence < threshold:
                    break
                drafts += 1
            rows, passes = rows + 1 + drafts, max(passes, made)
            settled = min(1 + min(drafts, trace.matches[at]), len(trace.matches) - at)
            tokens += settled
            sequence[1] += settled
            if sequence[1] == len(trace.matches):
                sequence[:] = [rng.randrange(len(traces)), 0]
        now += clock.verify(rows, batch) + passes * clock.draft(batch)
    return tokens / now


def test_the_recommendation_is_that_of_brute_force_on_a_simulated_engine():
    rng = random.Random(0)
    traces, clock = [made_up(rng, 60) for _ in range(12)], Clock()
    thresholds = (0.3, 0.5, 0.7)
    found = recommend.recommend(traces, clock, range(1, 9), thresholds, [1, 8], 0)
    assert len(found["policies"]) == 1 + 8 * 4
    for policy in found["policies"]:  # alone, an engine's clock gives exactly this
        n, threshold, tokens, seconds, verifications = policy["num_steps"], policy["threshold"], 0, 0.0, 0
        for trace in traces:
            at = 0
            while at < len(trace.matches):
                drafts = made = 0
                for confidence in trace.confidences[at][:n]:
                    made += 1
                    if confidence < threshold:
                        break
                    drafts += 1
                settled = min(1 + min(drafts, trace.matches[at]), len(trace.matches) - at)
                tokens, at, verifications = tokens + settled, at + settled, verifications + 1
                seconds += clock.verify(1 + drafts, 1) + made * clock.draft(1)
        assert policy["tokens_per_second"]["1"] == pytest.approx(tokens / seconds)
        assert policy["tokens_per_forward"]["value"] == pytest.approx(tokens / verifications)
    brute = {
        (p["num_steps"], p["threshold"]): simulate(traces, p["num_steps"], p["threshold"], 8, clock)
        for p in found["policies"]
        if p["num_steps"] in (0, 1, 3, 4, 5, 8)
    }
    for (n, threshold), speed in brute.items():
        policy = recommend.find(found, {"num_steps": n, "threshold": threshold})
        assert policy["tokens_per_second"]["8"] == pytest.approx(speed, rel=0.03)
    for batch, tolerance in (("1", 1e-9), ("8", 0.03)):
        best = recommend.find(found, found["best"][batch])["tokens_per_second"][batch]
        measured = {k: p["tokens_per_second"][batch] for k, p in (
            ((p["num_steps"], p["threshold"]), p) for p in found["policies"])}  # fmt: skip
        assert best == max(measured.values())
        if batch == "8":
            assert brute.get(tuple(found["best"][batch].values()), best) >= max(brute.values()) * (1 - tolerance)
    plain = found["best_without_threshold"]
    assert plain["1"]["threshold"] == 0 and 1 < plain["1"]["num_steps"] < 8  # it turns
    assert found["best"]["1"]["threshold"] > 0
    assert recommend.still_rising(found) == ""
    fewer = recommend.recommend(traces, clock, range(1, plain["1"]["num_steps"]), (), [1], 0)
    assert recommend.still_rising(fewer).startswith("At batch 1 it still rises at K = ")


class Gemma4AssistantMoody(Gemma4AssistantDouble):
    """Right for 0, 1, 2 or 3 drafts, depending on where in the text it is."""

    def forward(self, inputs_embeds, position_ids, **kwargs):
        self.right = (7 * len(self.text)) // 3 % 4
        return super().forward(inputs_embeds, position_ids, **kwargs)


def test_a_trace_replays_every_number_of_drafts_and_threshold(monkeypatch):
    """One pass of plain decoding with drafts at each token says what speculative decoding does with any policy."""
    base, _ = pair()
    double, prompt = Gemma4AssistantMoody(base, 0, monkeypatch), prompts(2)[1]
    scout = decode(base, double, prompt.ids, K, 24, scout=True)
    assert scout.ids == decode(base, None, prompt.ids, 0, 24).ids and set(scout.drafted) == {0}
    trace = Trace.of(scout)
    assert set(trace.matches[:20]) == {0, 1, 2, 3}
    threshold = sorted(c for of_token in scout.confidences for c in of_token)[20]
    for n, stop in ((1, 0.0), (K, 0.0), (K, threshold)):
        real = decode(base, double, prompt.ids, n, 24, threshold=stop)
        rounds = walk(trace, n, stop)
        assert [r.settled for r in rounds] == real.settled
        assert [r.kept for r in rounds] == real.drafted
    assert len(set(real.drafted)) > 2  # the threshold did something


def test_a_trace_of_a_drafter_that_is_right_for_a_while(monkeypatch):
    base, _ = pair()
    double = Gemma4AssistantDouble(base, 2, monkeypatch)
    trace = Trace.of(decode(base, double, prompts(1)[0].ids, K, 13, scout=True))
    assert trace.matches == [2] * 10 + [1, 1] or trace.matches[:10] == [2] * 10
    assert [r.settled for r in walk(trace, K, 0.0)] == [3, 3, 3, 3]
    assert [r.settled for r in walk(trace, 1, 0.0)] == [2] * 6
    ended = Trace.of(Decoded([5, 6, 7], [0, 0], [1, 1], [[0.9] * 2] * 2, ended=True, drafts=[[6, 7], [7, 9]]))
    assert ended.matches == [2, 1] and [r.settled for r in walk(ended, 2, 0.0)] == [2]


@pytest.mark.parametrize("shape", ["e2b", "26b_a4b"])
def test_the_roofline_reads_every_weight_once_and_more_experts_for_more_rows(shape):
    base, drafter = build_pair(shape)
    cost = Roofline(base, drafter, CARDS["h100"], 5)
    text = base.model.language_model
    linear = sum(m.weight.numel() for m in text.modules() if isinstance(m, torch.nn.Linear))
    counted = sum(a * b for a, b in cost.base.products)
    assert counted == linear + base.lm_head.weight.numel()
    assert len(cost.base.attention) == len(text.layers) and all(a[3] == 5 for a in cost.base.attention)
    experts = [m for m in text.modules() if type(m).__name__ == "Gemma4TextExperts"]
    assert len(cost.base.experts) == len(experts) == (len(text.layers) if shape == "26b_a4b" else 0)
    assert cost.verify(1, 1) < cost.verify(20_000, 1) and cost.draft(1) < cost.verify(1, 1)
    if experts:
        assert cost.base.experts[0][:2] == (3, 2)
    else:  # only the top centroids' tokens are scored: 4 of 16
        assert cost.drafter.products[-2:] == [(32, 16), (32, 64)]


def test_the_roofline_of_a_released_pair():
    """E4B on an H100: 4.2 ms would be reading 8 GB at 2,900 GB/s less what isn't read (per-layer table)."""
    from joint_train.weights.released import released_config

    configs = [released_config(name, {}) for name in ("google/gemma-4-E4B-it", "google/gemma-4-E4B-it-assistant")]
    models = [build_meta(config, torch.bfloat16) for config in configs]
    cost = Roofline(*models, CARDS["h100"], 1024)
    weights = sum(a * b for a, b in cost.base.products) * 2 / 2.9e12
    assert weights < cost.verify(1, 1) < 2.5 * weights
    assert cost.verify(8, 1) < 1.05 * cost.verify(1, 1)  # memory-bound: drafts are free
    assert cost.verify(64 * 8, 64) > 1.2 * cost.verify(64, 64)  # and then they aren't
    slower = Roofline(*models, CARDS["l4"], 1024)
    assert slower.verify(1, 1) > 5 * cost.verify(1, 1)


def test_a_servers_times_scale_the_roofline():
    clock = Clock()
    measured = {1: (2.0, 3.0), 8: (10.0, 3.0)}
    factors = measured_factors(clock, 4, measured)
    assert factors[1] == pytest.approx(3 / 2 / (clock.verify(5, 1) + 4 * clock.draft(1)))
    scaled = SimpleNamespace(
        verify=lambda rows, b: clock.verify(rows, b) * factors[b], draft=lambda b: clock.draft(b) * factors[b]
    )
    served = {"acceptance": [{"share": {"value": v}} for v in (0.8, 0.6, 0.4, 0.2)]}
    found = recommend.recommend_served(served, scaled, measured)
    four = recommend.find(found, {"num_steps": 4, "threshold": 0.0})
    assert four["tokens_per_forward"]["value"] == pytest.approx(3.0)
    assert four["tokens_per_second"] == {"1": pytest.approx(2.0), "8": pytest.approx(10.0)}  # what was measured
    assert recommend.find(found, recommend.NO_DRAFTS)["tokens_per_forward"]["value"] == 1


def test_the_number_of_drafts_is_written_beside_what_is_there_and_into_the_checksums(tmp_path):
    out = tmp_path / "drafter"
    placing.staged(out).mkdir()
    (placing.staged(out) / "generation_config.json").write_text('{"suppress_tokens": [3], "num_assistant_tokens": 7}')
    placing.place([out])
    assert placing.verify(out) == []
    recommend.set_num_assistant_tokens(str(out), 4)
    assert json.loads((out / "generation_config.json").read_text()) == {
        "suppress_tokens": [3],
        "num_assistant_tokens": 4,
    }
    assert placing.verify(out) == []
    with pytest.raises(ValueError, match="isn't a folder"):
        recommend.set_num_assistant_tokens("google/gemma", 4)


# before and after


def measurement(rng, easy, gain):
    of = {"tokens": [], "seconds": [], "settled": [], "verifications": [], "drafted": [], "accepted": []}
    for ease in easy:
        verifications = 20
        accepted = round(verifications * min(3.9, ease + gain + rng.uniform(-0.1, 0.1)))
        of["verifications"].append(verifications)
        of["accepted"].append(accepted)
        of["drafted"].append(4 * verifications)
        of["settled"].append(accepted + verifications)
        of["tokens"].append(accepted + verifications + 1)
        of["seconds"].append(verifications * 1.2)
    of |= {"first_drafted": of["verifications"], "first_accepted": [min(a, 20) for a in of["accepted"]]}
    plain = {"of_prompts": {"tokens": of["tokens"], "seconds": [float(t) for t in of["tokens"]]}}
    return {"plain": plain, "speculative": [{"num_steps": 4, "of_prompts": of}]}


def test_paired_intervals_are_of_the_difference_and_narrower_than_those_of_each():
    rng = random.Random(2)
    easy = [rng.uniform(0.2, 3.0) for _ in range(60)]
    before, after = measurement(rng, easy, 0.0), measurement(rng, easy, 0.3)
    (row,) = against.compare(after, before, 0)
    change = row["tokens_per_forward"]
    one, two = (m["speculative"][0]["of_prompts"] for m in (before, after))
    rates = [sum(of["settled"]) / sum(of["verifications"]) for of in (one, two)]
    assert change["before"]["value"] == pytest.approx(rates[0]) and change["after"]["value"] == pytest.approx(rates[1])
    assert change["difference"]["value"] == pytest.approx(rates[1] - rates[0])

    def width(of):
        return of["high"] - of["low"]

    assert width(change["difference"]) < 0.3 * width(change["before"])
    assert change["difference"]["low"] > 0.2  # of no use unpaired: the intervals of the two overlap
    assert change["after"]["low"] < change["before"]["high"]
    ratio = sum(two["tokens"]) / sum(two["seconds"]) / (sum(one["tokens"]) / sum(one["seconds"]))
    assert row["speedup"]["ratio"]["value"] == pytest.approx(ratio)
    with pytest.raises(ValueError, match="same prompts"):
        against.compare(after, measurement(rng, easy[1:], 0.0), 0)


def test_the_table_goes_into_the_card_once_and_into_its_checksums(tmp_path):
    out = tmp_path / "drafter"
    placing.staged(out).mkdir()
    card = "---\nlicense: x\n---\n\n# drafter\n\n## Serve\n\n```\nvllm\n```\n"
    (placing.staged(out) / "README.md").write_text(card)
    placing.place([out])
    for table in ("| a |", "| b |"):
        against.put_into_card(str(out), table)
    assert (out / "README.md").read_text() == f"{card}\n## {against.TITLE}\n\n| b |\n"
    (out / "README.md").write_text((out / "README.md").read_text() + "\n## More\n\ntext\n")
    against.put_into_card(str(out), "| c |")
    assert (out / "README.md").read_text() == f"{card}\n## {against.TITLE}\n\n| c |\n\n## More\n\ntext\n"
    assert placing.verify(out) == []


# the command


def test_options_and_adapters_make_columns():
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    assert [c.name for c in columns_of([{}], [])] == [""]
    assert [c.name for c in columns_of([on, off], [])] == ["enable_thinking=true", "enable_thinking=false"]
    assert [(c.name, c.adapter) for c in columns_of([on], ["A"])] == [("the base alone", None), ("A", "A")]
    assert [c.name for c in columns_of([on, {}], ["A"])][1:3] == [
        "enable_thinking=true, A",
        "no options, the base alone",
    ]


def test_the_whole_command(folders, tmp_path, capsys):  # noqa: F811
    """An adapter on the base, another drafter, and the number of drafts, in one run."""
    base, drafter = folders
    adapter = make_adapter(base, tmp_path / "lora")
    mine = shutil.copytree(drafter, tmp_path / "mine")
    other = make_pair(tmp_path / "other", "e2b", seed=3)[1]
    (mine / "generation_config.json").write_text('{"num_assistant_tokens": 9}')
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i} w7", "language": "de"}) + "\n" for i in (9, 8))
    )
    arguments = [str(base), str(mine), "--prompts", str(tmp_path / "p.jsonl"), "--prompts", "general", "--limit", "1"]
    arguments += ["--num-steps", "2", "--max-new-tokens", "6", "--ignore-eos", "--thresholds", "0.5"]
    arguments += ["--adapters", f"mine={adapter}", "--against", str(other), "--write-card"]
    arguments += [
        "--recommend",
        "--gpu",
        "l4",
        "--batch-sizes",
        "1,8",
        "--set-drafts",
        "8",
        "--out",
        str(tmp_path / "out"),
    ]
    code = main(arguments)
    said = capsys.readouterr()
    assert code == 0, said.err
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [c["name"] for c in found["columns"]] == ["the base alone", "mine"]
    assert [part["name"] for part in found["where"]["source"]] == ["general", "p"]
    assert [part["name"] for part in found["where"]["language"]] == ["de"]
    assert found["prompts"]["count"] == 2 and found["recommend"]["batches"] == [1, 8]
    assert {row["num_steps"] for row in found["against"]["rows"]} == {2}
    texts = (tmp_path / "out/evaluation.html").read_text()
    for title in ("Side by side", "Where drafts are accepted", "How many drafts", against.TITLE):
        assert title in texts
    card = (mine / "README.md").read_text()
    assert card.startswith(f"## {against.TITLE}") and "| tokens per base forward |" in card
    assert str(tmp_path) not in card and "2 prompts (p.jsonl, general)" in card
    assert "K = 2: 2 of 2 prompts" in said.err and "drafts at each token: 2 of 2 prompts" in said.err
    assert "plain decoding is the fastest" in said.err  # with a random drafter; so nothing is set
    assert json.loads((mine / "generation_config.json").read_text()) == {"num_assistant_tokens": 9}
    # With the adapter, the text is that of the merged base.
    merged = merged_by_peft(base, adapter)
    merged.generation_config.eos_token_id = None
    ids = [p.ids for p in load_prompts([str(tmp_path / "p.jsonl"), "general"], _tokenizer(base), 1)]
    plain = [decode(merged, None, row, 0, 6, ignore_eos=True).ids for row in ids]
    unchanged = [decode(merged_by_peft(base), None, row, 0, 6, ignore_eos=True).ids for row in ids]
    assert plain != unchanged
    texts = [[e["text"] for e in column["examples"]] for column in found["columns"]]
    assert texts == [
        [_tokenizer(base).decode(row, skip_special_tokens=True) for row in of] for of in (unchanged, plain)
    ]
    column = found["columns"][1]["speculative"][0]["of_prompts"]
    assert column["tokens"] == [6] * 2
    from joint_train.weights.loading import load_model

    own = [decode(merged, load_model(mine, torch.float32), row, 2, 6, ignore_eos=True) for row in ids]
    assert tokens_per_forward(own) == pytest.approx(sum(column["settled"]) / sum(column["verifications"]), rel=1e-6)


def _tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_a_running_server_is_told_how_many_to_draft(folders, serve, tmp_path, capsys):  # noqa: F811
    server, mine = serve("sglang"), shutil.copytree(folders[1], tmp_path / "mine")
    server.delay = 0.02
    arguments = ["--engine", "sglang", "--url", server.url, "--concurrency", "1,4", "--limit", "4"]
    arguments += ["--max-new-tokens", "9", "--recommend", "--gpu", "l4", "--out", str(tmp_path / "out")]
    assert main([str(folders[0]), str(mine), *arguments, "--set-drafts", "4"]) == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    rows = {row["concurrency"]: row for row in found["concurrency"]}
    assert found["recommend"]["batches"] == [1, 4]
    for batch, row in rows.items():  # with the server's own number, what was measured of it
        policy = recommend.find(found["recommend"], {"num_steps": 3, "threshold": 0.0})
        forward = 1 + sum(p["share"]["value"] for p in found["speculative"][0]["acceptance"])
        expected = row["tokens_per_second"] * forward / row["tokens_per_forward"]
        assert policy["tokens_per_second"][str(batch)] == pytest.approx(expected, rel=1e-6)
    set_to = found["recommend"]["best_without_threshold"]["4"]["num_steps"]
    assert json.loads((mine / "generation_config.json").read_text())["num_assistant_tokens"] == set_to > 0
    said = capsys.readouterr().out
    assert "Measured times are these multiples of the roofline's" in said
    assert "How many drafts" in (tmp_path / "out/recommendation.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--write-card"], "give the other drafter"),
        (["--against", "{drafter}"], "is DRAFTER itself"),
        (["--set-drafts", "1"], "needs --recommend"),
        (["--recommend", "--set-drafts", "3"], "not one of --batch-sizes"),
        (["--device", "nothing"], "--device=nothing can't be used here"),
        (["--engine", "vllm", "--against", "x"], "a server has one pair"),
        (["--engine", "vllm", "--recommend"], "measures a running server"),
        (
            ["--chat-template-kwargs", "{{}}", "--chat-template-kwargs", "{{}}"],
            "--chat-template-kwargs: {} is given twice",
        ),
        (["--prompts", "general", "--prompts", "general"], "--prompts: general is given twice"),
        (["--adapters", "a", "--adapters", "a"], "--adapters: a is given twice"),
    ],
)
def test_options_that_dont_go_together(folders, arguments, said, capsys):  # noqa: F811
    arguments = [argument.format(drafter=folders[1]) for argument in arguments]
    assert main([*map(str, folders), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert main(["google/base", "google/drafter", "--recommend", "--set-drafts", "1"]) == 2  # before anything is read
    assert "--set-drafts: google/drafter isn't a folder on this machine" in capsys.readouterr().err


def test_progress_in_a_log_is_a_line_when_something_is_done_or_takes_long(caplog, monkeypatch):
    caplog.set_level("INFO")
    now = iter([0.0, 4.0, 11.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    show = progress.Lines("prompts")
    for done in range(5):
        show("plain", done, 4)
    assert caplog.messages == ["plain: 2 of 4 prompts, 11 s", "plain: 4 of 4 prompts, 13 s"]


def test_progress_on_a_terminal_is_a_bar_for_each_thing_that_is_measured(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress.log, "level", logging.INFO)
    with progress.shown_progress("prompts") as show:
        for what, total in (("plain", 2), ("K = 1", 3)):
            for done in range(total + 1):
                show(what, done, total)
    assert all(text in out.getvalue() for text in ("plain", "2/2", "K = 1", "3/3"))


def test_configs_of_a_pair_are_enough_for_the_roofline(folders):  # noqa: F811
    models = [build_meta(AutoConfig.from_pretrained(folder), torch.bfloat16) for folder in folders]
    assert Roofline(*models, CARDS["h100"], 64).verify(1, 1) > 0


def test_experts_are_read_as_rows_choose_them():
    """A forward that does nothing but read experts takes the time of those that its rows chose, in the mean."""
    machine, rng, weights = CARDS["h100"], random.Random(0), 10**8
    for rows in (1, 4, 40):
        chosen = [{e for _ in range(rows) for e in rng.sample(range(128), 8)} for _ in range(400)]
        expected = sum(map(len, chosen)) / 400 * weights * 2 / machine.hbm_gb_per_second / 1e9
        found = cost._Work(experts=[(128, 8, weights)]).seconds(rows, 1, machine)
        assert found == pytest.approx(expected, rel=0.01), rows
