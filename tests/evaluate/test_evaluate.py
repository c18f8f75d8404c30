"""Acceptance as it is counted: against independent counts, doubles whose result is known, and sharded models."""

import copy
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from configs import compose
from pairs import build_pair, make_pair
from ranks import run_ranks
from torch import nn
from transformers import GenerationConfig

from joint_train.config import SourceConfig
from joint_train.data import DataError
from joint_train.distributed.mesh import init_mesh
from joint_train.distributed.parallelize import parallelize
from joint_train.evaluate import accepted_length, decoding, measure, report, validation_prompts
from joint_train.evaluate import prompts as prompt_sets
from joint_train.evaluate.__main__ import main, step_list
from joint_train.evaluate.decoding import Decoded, acceptance_steps, decode, tokens_per_forward
from joint_train.evaluate.prompts import Prompt, load_prompts
from joint_train.starter import CHAT_TEMPLATE
from joint_train.weights.composite import Gemma4WithDrafter

K = 3


class FakeTokenizer:
    """Just enough for texts: a token is its number. Its chat prompts are the lengths of the messages."""

    chat_template = None

    def decode(self, ids, **kwargs) -> str:
        return " ".join(map(str, ids))

    def __call__(self, text) -> dict:
        return {"input_ids": [2, *(3 + len(word) for word in text.split())]}


def prompts(count: int = 4) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    return [
        Prompt([2, *torch.randint(3, 240, (3 + 5 * i,), generator=generator).tolist()], f"prompt {i}", "ab"[i % 2])
        for i in range(count)
    ]


def pair(shape: str = "e2b", eos: int | None = None):
    base, drafter = build_pair(shape)
    base.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    drafter.generation_config = GenerationConfig(num_assistant_tokens=7)
    return base.eval(), drafter.eval()


class Gemma4AssistantDouble(nn.Module):
    """A drafter whose logits are the base's own for the first ``right`` drafts, and certain of a wrong token after.

    It reads the text so far from what the generation streams out, and runs a copy of the base on it.
    """

    def __init__(self, base, right: int, monkeypatch) -> None:
        super().__init__()
        self.base, self.right, self.position = copy.deepcopy(base), right, None
        self.config, self.device = base.config, base.device
        self.generation_config = GenerationConfig(num_assistant_tokens=5)
        double = self

        class Streamer(decoding.SettledTokens):
            def put(self, value):
                super().put(value)
                if len(self.counts) == 1:
                    double.text = []
                double.text += value.flatten().tolist()

        monkeypatch.setattr(decoding, "SettledTokens", Streamer)

    def forward(self, inputs_embeds, position_ids, **kwargs):
        if self.position != (len(self.text), int(position_ids)):
            self.position, self.drafts = (len(self.text), int(position_ids)), []
        assert int(position_ids) == len(self.text) - 1
        logits = self.base(input_ids=torch.tensor([self.text + self.drafts]), use_cache=False).logits[:, -1:]
        if len(self.drafts) >= self.right:
            worst = logits.argmin(-1, keepdim=True)
            logits = torch.full_like(logits, -30.0).scatter(-1, worst, 30.0)
        self.drafts.append(int(logits.argmax()))
        state = inputs_embeds[..., : inputs_embeds.shape[-1] // 2]
        return SimpleNamespace(last_hidden_state=state, logits=logits)


# counting


@pytest.mark.parametrize("shape", ["e2b", "26b_a4b", "text"])
def test_accepted_length_equals_a_count_of_the_bases_forwards(shape):
    base, drafter = pair(shape)
    forwards, tokens = 0, 0
    forward = base.forward

    def counted(*args, **kwargs):
        nonlocal forwards
        forwards += 1
        return forward(*args, **kwargs)

    base.forward = counted
    drafter.generation_config.num_assistant_tokens = K
    for prompt in prompts(2):
        ids = torch.tensor([prompt.ids])
        out = base.generate(ids, assistant_model=drafter, max_new_tokens=20, do_sample=False)
        tokens += out.shape[1] - ids.shape[1] - 1  # the first one comes from the prompt's forward
        forwards -= 1
    base.forward = forward
    drafter.generation_config.num_assistant_tokens = 7
    found = accepted_length(base, drafter, FakeTokenizer(), prompts(2), K, 20)
    assert found["tokens_per_forward"] == tokens / forwards
    assert drafter.generation_config.num_assistant_tokens == 7  # as it was


@pytest.mark.parametrize("shape", ["e2b", "31b"])
def test_a_random_drafter_gives_about_1(shape):
    base, drafter = pair(shape)
    found = accepted_length(base, drafter, FakeTokenizer(), prompts(2), K, 32)
    assert 1.0 <= found["tokens_per_forward"] < 1.15


@pytest.mark.parametrize("right", [0, 1, K])
def test_a_double_with_the_bases_logits_gives_k_plus_1(right, monkeypatch):
    base, _ = pair()
    double = Gemma4AssistantDouble(base, right, monkeypatch)
    # Whole verifications: one token from the prompt, then right + 1 at a time.
    found = accepted_length(base, double, FakeTokenizer(), prompts(2), K, 1 + 4 * (right + 1) + (K - right))
    shares = [found[f"accepted_{k}"] for k in range(K)]
    assert shares == pytest.approx([1.0] * right + [0.0] * (K - right), abs=1e-9)
    if right == K:
        assert found["tokens_per_forward"] == K + 1


def test_end_tokens_end_the_text_and_its_count():
    base, drafter = pair()
    prompt = prompts(1)[0]
    free = decode(base, None, prompt.ids, 0, 12)
    end = free.ids[5]
    base.generation_config.eos_token_id = end
    cut = decode(base, drafter, prompt.ids, K, 12)
    assert cut.ids == free.ids[: free.ids.index(end) + 1] and cut.ended
    assert 1 + sum(cut.settled) == len(cut.ids)
    assert decode(base, drafter, prompt.ids, K, 12, ignore_eos=True).ids == free.ids
    assert base.generation_config.eos_token_id == end


def test_acceptance_leaves_out_what_an_end_token_cut_short():
    decoded = Decoded(ids=[9] * 7, drafted=[3, 3, 3], settled=[2, 3, 1], ended=True)
    assert acceptance_steps(decoded) == [(3, 1), (3, 2)]
    assert tokens_per_forward([decoded]) == 2.0
    assert tokens_per_forward([decoded, Decoded(ids=[9] * 5, drafted=[3], settled=[4])]) == 2.5  # over verifications
    assert math.isnan(tokens_per_forward([Decoded(ids=[9])]))


def test_shares_are_of_the_drafts_that_were_made(monkeypatch):
    base, drafter = pair()
    texts = iter([Decoded([1] * 8, [3, 3, 1], [4, 1, 2]), Decoded([2] * 3, [2], [2])])
    monkeypatch.setattr(decoding, "decode", lambda *args: next(texts))
    found = accepted_length(base, drafter, FakeTokenizer(), prompts(2), K, 8)
    assert [found[f"accepted_{k}"] for k in range(K)] == pytest.approx([3 / 4, 1 / 3, 1 / 2])
    assert found["tokens_per_forward"] == 9 / 4
    assert [e["tokens_per_forward"] for e in found["examples"]] == [2.333, 2.0]


@pytest.mark.parametrize("budget", [2, 3, 8])
def test_drafts_are_those_that_were_made(budget):
    """Also where the budget leaves room for fewer than K."""
    base, drafter = pair()
    made = []
    hook = drafter.register_forward_hook(lambda *args: made.append(1))
    for prompt in prompts(2):
        made.clear()
        decoded = decode(base, drafter, prompt.ids, K, budget)
        assert sum(decoded.drafted) == len(made) and max(decoded.drafted, default=0) <= K
        assert 1 + sum(decoded.settled) == len(decoded.ids) == budget
    hook.remove()


def test_training_mode_is_put_back():
    base, drafter = pair()
    base.train()
    accepted_length(base, drafter, FakeTokenizer(), prompts(1), K, 4)
    assert base.training and not drafter.training
    assert not base._forward_hooks and not base._forward_pre_hooks and not drafter._forward_hooks


# sharded


def sharded_length(rank: int, shape: str, count: int) -> tuple[dict, int]:
    base, drafter = pair(shape)
    cfg = compose()
    cfg.drafter.num_steps = K
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=K).train()
    parallelize(model, init_mesh(cfg.parallel), cfg)
    signs = []
    found = accepted_length(
        model.base, model.drafter, FakeTokenizer(), prompts(count), K, 16, lambda: signs.append(rank)
    )
    return found, len(signs)


@pytest.mark.parametrize(("ranks", "count"), [(2, 3), (4, 2)], ids=["shares differ", "ranks without a prompt"])
def test_sharded_models_decode_their_shares_in_lockstep(ranks, count):
    base, drafter = pair()
    expected = accepted_length(base, drafter, FakeTokenizer(), prompts(count), K, 16)
    forwards = set()
    for found, signs in run_ranks(sharded_length, ranks, "e2b", count):
        assert found == expected
        forwards.add(signs)
    assert len(forwards) == 1  # as often on every rank


# what the drafter is shown


@pytest.mark.parametrize(
    ("shape", "engine"),
    [
        ("31b", True),
        ("31b", False),
        ("31b", "llamacpp"),
        ("12b_unified", True),
        ("12b_unified", False),
        ("e2b", "llamacpp"),
    ],
)
def test_as_engines_the_drafter_computes_what_it_is_trained_on(shape, engine, monkeypatch):
    """Also after rejections and past the sliding window (8). transformers' own view isn't that one; llama.cpp's is with
    the next position, a window of one less and the dense head, which the joint forward has."""
    base, drafter = pair(shape)
    texts, drafted = [[]], []  # the text at each verification, and the drafter's logits there

    class Streamer(decoding.SettledTokens):
        def put(self, value):
            super().put(value)
            texts.append(texts[-1] + value.flatten().tolist())

    monkeypatch.setattr(decoding, "SettledTokens", Streamer)
    hook = drafter.register_forward_hook(lambda module, args, out: drafted.append(out.logits[0, -1]))
    prompt = prompts(2)[1].ids
    decode(base, drafter, prompt, K, 16, engine=engine)
    hook.remove()
    position = "next_token" if engine == "llamacpp" else "last_kv"
    joint = Gemma4WithDrafter(base, drafter, drafter_num_steps=K, rope_position=position).eval()
    joint.drafter.config.get_text_config().sliding_window -= engine == "llamacpp"
    worst = 0.0
    whole = [text for text in texts[2:] if len(text) + K < len(prompt) + 16]  # the last drafts are cut to the budget
    for text, logits in zip(whole, torch.stack(drafted).split(K), strict=False):
        forced = text + [int(row.argmax()) for row in logits]
        if max(forced) >= 248:  # placeholders of images: a forward embeds something else for them
            continue
        trained = joint(torch.tensor([forced])).drafter_logits
        for k, row in enumerate(logits):
            worst = max(worst, (trained[k][0, len(text) - 2] - row).abs().max().item())
    assert len(drafted) > 5 * K
    assert (worst < 1e-4) == bool(engine), worst


def test_as_engines_the_text_stays_the_bases():
    base, drafter = pair()
    for prompt in prompts(2):
        plain = decode(base, None, prompt.ids, 0, 16)
        assert decode(base, drafter, prompt.ids, K, 16, engine=True).ids == plain.ids


# what is made of the counts


def test_measure_finds_equal_texts_and_its_numbers_add_up():
    base, drafter = pair()
    results = measure.measure(base, drafter, FakeTokenizer(), prompts(), [1, K], 8)
    for s in results["speculative"]:
        decoded = [decode(base, drafter, p.ids, s["num_steps"], 8) for p in prompts()]
        assert s["tokens_per_forward"]["value"] == pytest.approx(tokens_per_forward(decoded))
        assert s["differences"] == []
        assert s["tokens"] == 4 * 8 and len(s["acceptance"]) == s["num_steps"]
        assert set(s["tokens_per_forward_by_category"]) == {"a", "b"}
        assert s["speedup"]["value"] == pytest.approx(
            s["tokens_per_second"]["value"] / results["plain"]["tokens_per_second"]["value"]
        )
    json.dumps(results, allow_nan=False)


def test_a_difference_is_found_with_the_bases_margin():
    base, _ = pair()
    prompt = prompts(1)[0]
    plain = decode(base, None, prompt.ids, 0, 8)
    other = copy.deepcopy(plain)
    other.ids[3] = (other.ids[3] + 1) % 256
    found = measure.difference(base, FakeTokenizer(), 0, prompt, plain, other)
    ids = torch.tensor([prompt.ids + plain.ids[:3]])
    logits = base(input_ids=ids).logits[0, -1]
    assert found["position"] == 3 and found["margin"] > 0
    assert found["margin"] == pytest.approx((logits[plain.ids[3]] - logits[other.ids[3]]).item(), abs=1e-4)
    assert (found["plain"], found["speculative"]) == (str(plain.ids[3]), str(other.ids[3]))
    assert measure.difference(base, FakeTokenizer(), 0, prompt, other, plain)["margin"] == -found["margin"]
    assert measure.difference(base, FakeTokenizer(), 0, prompt, plain, copy.deepcopy(plain)) is None
    other.ids = plain.ids[:-1]
    for one, two in ((plain, other), (other, plain)):
        found = measure.difference(base, FakeTokenizer(), 0, prompt, one, two)
        assert (found["position"], found["margin"]) == (7, None)


def test_a_summary_counts_every_verification():
    """Against loops over verifications that were made up: with drafts cut by the budget, and texts that ended."""
    rng = random.Random(0)
    plain, decoded, asked = [], [], []
    for i in range(15):
        drafted = [K] * rng.randint(2, 9) + [rng.randint(0, K)]
        settled = [rng.randint(1, drafts + 1) for drafts in drafted]
        ids = [7] * (1 + sum(settled))
        decoded.append(Decoded(ids, drafted, settled, ended=rng.random() < 0.3, seconds=rng.uniform(1, 2)))
        plain.append(Decoded(ids, seconds=rng.uniform(2, 5)))
        asked.append(Prompt([2], "", "abc"[i % 3]))
    found = measure.summary(None, FakeTokenizer(), asked, plain, decoded, K, 0)
    for k in range(K):
        drafts = reached = accepted = 0
        for d in decoded:
            for i, (n, settled) in enumerate(zip(d.drafted, d.settled, strict=True)):
                if n < k + 1 or (d.ended and i == len(d.settled) - 1):
                    continue
                drafts += 1
                reached += settled >= k + 1
                accepted += settled >= k + 2
        at = found["acceptance"][k]
        assert (at["drafted"], at["accepted"]) == (drafts, accepted)
        assert at["share"]["value"] == pytest.approx(accepted / drafts)
        assert at["share_if_reached"]["value"] == pytest.approx(accepted / reached)
    verifications = sum(len(d.settled) for d in decoded)
    assert found["verifications"] == verifications
    tokens, seconds = sum(len(d.ids) for d in decoded), sum(d.seconds for d in decoded)
    assert (found["tokens"], found["seconds"]) == (tokens, pytest.approx(seconds))
    assert found["tokens_per_forward"]["value"] == pytest.approx((tokens - len(decoded)) / verifications)
    assert found["tokens_per_second"]["value"] == pytest.approx(tokens / seconds)
    assert found["speedup"]["value"] == pytest.approx(sum(d.seconds for d in plain) / seconds)
    shorter = [Decoded(d.ids[:-1], seconds=d.seconds) for d in plain]
    other = measure.summary(None, FakeTokenizer(), asked, shorter, decoded, K, 0)
    assert other["tokens_per_second"] == found["tokens_per_second"]
    assert other["speedup"]["value"] / found["speedup"]["value"] == pytest.approx(tokens / (tokens - len(decoded)))
    for category, value in found["tokens_per_forward_by_category"].items():
        own = [d for d, prompt in zip(decoded, asked, strict=True) if prompt.category == category]
        assert value["value"] == pytest.approx(sum(sum(d.settled) for d in own) / sum(len(d.settled) for d in own))


def test_an_interval_is_as_wide_as_the_normal_one_of_many_prompts():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    found = measure.interval([values.tolist(), [1.0] * 1000], lambda a, b: a / b, seed=0)
    half = 1.96 * values.std().item() / 1000**0.5
    assert found["value"] == pytest.approx(values.mean().item(), rel=1e-9)
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.1)
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize("option", ["engine", "ignore_eos"])
def test_measure_decodes_as_it_is_told(option, monkeypatch):
    asked = []

    def fake(base, drafter, ids, k, budget, **options):
        asked.append((drafter, k, budget, options))
        return Decoded([1, k], [k], [1], seconds=1.0)

    monkeypatch.setattr(measure, "decode", fake)
    monkeypatch.setattr(measure, "difference", lambda *args: None)
    found = measure.measure(None, "drafter", FakeTokenizer(), prompts(2), [1, 4], 32, **{option: True})
    counted = [call for call in asked if call[3]]  # those for warming up have none
    assert [call[:3] for call in counted] == [
        *[(None, 0, 32)] * 2, *[("drafter", 1, 32)] * 2, *[("drafter", 4, 32)] * 2
    ]  # fmt: skip
    expected = {"engine": False, "ignore_eos": False, option: True}
    assert all(call[3] == expected for call in counted)
    assert [e["text"] for e in found["examples"]] == ["1 4", "1 4"]  # of the last K


@pytest.mark.parametrize(("deviations", "good"), [((3.0, -3.0), True), ((-4.5, 0.0), False), ((0.0, 4.5), False)])
def test_sampling_is_judged_by_standard_errors_of_both_signs(deviations, good, monkeypatch):
    monkeypatch.setattr(measure, "decode", lambda *args, **options: Decoded([1, 2, 3], [3], [2]))
    sums = torch.tensor([deviations[0] * 2, 4.0, deviations[1] * 3, 9.0], dtype=torch.float64)
    monkeypatch.setattr(measure, "surprise", lambda *args: sums / 2)  # of each of two prompts
    plain, *others = measure.sampling(None, nn.Linear(1, 1), prompts(2), K, 8, 1.0)
    assert plain["tokens_per_forward"] is None and plain["tokens"] == 6
    for found in (plain, *others):
        assert tuple(found["deviation"].values()) == pytest.approx(deviations)
        assert found["bases_distribution"] == good
    assert [found["way"] for found in others] == ["argmax", "sampled", "transformers"]
    assert [found["tokens_per_forward"]["value"] for found in others] == [2.0] * 3
    assert [[p["value"] for p in found["accepted"]] for found in others] == [[1.0, 0.0, 0.0]] * 3


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        steps = torch.randint(5, 40, (30,), generator=generator)
        rate = 1.5 + 0.5 * torch.randn(30, generator=generator)
        found = measure.interval([(steps * rate).tolist(), steps.tolist()], lambda a, b: a / b, seed=trial)
        hits += found["low"] <= 1.5 <= found["high"]
    assert 175 <= hits <= 198  # 190 expected


def test_an_interval_of_one_prompt_or_of_nothing_isnt_made_up():
    assert measure.interval([[6.0], [3.0]], lambda a, b: a / b, 0) == {"value": 2.0, "low": None, "high": None}
    assert measure.interval([[0.0, 0.0], [0.0, 0.0]], lambda a, b: a / b, 0)["value"] is None


def test_sampling_check_tells_a_biased_acceptance_from_an_exact_one(monkeypatch):
    base, _ = pair()
    double = Gemma4AssistantDouble(base, K, monkeypatch)
    plain, exact, sampled, biased = measure.sampling(base, double, prompts(2), K, 48, temperature=1.0)
    # With q = p, transformers accepts the most likely token always, as if it had been drawn.
    assert biased["way"] == "transformers" and not biased["bases_distribution"]
    assert biased["deviation"]["most_likely"] > 4
    assert plain["bases_distribution"] and exact["bases_distribution"] and sampled["bases_distribution"]
    assert exact["tokens_per_forward"]["value"] > 1.0
    assert sampled["tokens_per_forward"]["value"] > 1.0


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_samples_are_of_the_whole_distribution_at_its_temperature(temperature):
    """Without transformers' own top 50, which a flat distribution would show."""
    base, drafter = pair()
    found = measure.sampling(base, drafter, prompts(2), K, 48, temperature=temperature, engine=True)
    assert [way["way"] for way in found] == ["plain", "argmax", "sampled"]
    assert all(way["bases_distribution"] for way in found)


def test_surprise_is_zero_in_expectation():
    logits = 3 * torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    class Base:
        generation_config = GenerationConfig(suppress_tokens=[3, 41])

        def get_input_embeddings(self):
            return nn.Embedding(1, 1)

        def __call__(self, input_ids, logits_to_keep, use_cache):
            assert input_ids.shape == (1, 6) and logits_to_keep == 3  # of 2 new tokens, and of what comes after
            return SimpleNamespace(logits=logits)

    logits[0, :2, [3, 41]] = logits[0, :2, [3, 41]] + 5.0
    p, q = (logits[0, :2] / 0.7).index_fill(-1, torch.tensor([3, 41]), -torch.inf).softmax(-1)
    mean, square = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(50):
        for j in range(50):
            if {i, j} & {3, 41}:
                continue
            row = measure.surprise(Base(), [2, 7, 7, 7], [i, j], 0.7)
            mean += p[i] * q[j] * row
            square += p[i] * q[j] * row.square()
    assert mean[[0, 2]].abs().max() < 1e-9
    assert torch.allclose(square[[0, 2]], mean[[1, 3]])  # the variances


# prompts and the command


def test_the_general_set_has_40_prompts_in_8_categories():
    found = load_prompts("general", FakeTokenizer())
    assert len(found) == 40 and len({p.text for p in found}) == 40
    counts = {c: sum(p.category == c for p in found) for c in {p.category for p in found}}
    assert len(counts) == 8 and set(counts.values()) == {5}


def test_prompts_of_files_stop_before_the_last_answer(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}]},
        {"prompt": "ccc dddd", "response": "e", "category": "own"},
        {"text": "one two three"},
        {
            "messages": [
                {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
            ]
        },
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chat, pair_, text, turns = load_prompts(str(file), FakeTokenizer())
    assert (chat.ids, chat.text, chat.category) == ([2, 4], "a", "mine")
    assert (pair_.text, pair_.category) == ("ccc dddd", "own")
    assert text.ids == [2, 6, 6, 8]
    assert turns.text == "c"
    assert len(load_prompts(str(file), FakeTokenizer(), limit=2)) == 2
    file.write_text('{"messages": 3}\n')
    with pytest.raises(DataError, match="mine.jsonl:1"):
        load_prompts(str(file), FakeTokenizer())


def test_a_text_is_prompted_by_its_beginning(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "word " * 200}) + "\n")
    assert len(load_prompts(str(tmp_path / "t.jsonl"), FakeTokenizer())[0].ids) == 64


def test_starter_prompts_are_held_out_questions_up_to_the_answer(monkeypatch):
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(8)
    ]
    monkeypatch.setattr(prompt_sets, "examples", lambda root: (chats[:4], chats[4:]))
    asked, given = [], []

    class Templated(FakeTokenizer):
        chat_template = "x"

    def prompt_ids(tokenizer, messages, **options):
        asked.append(messages)
        given.append(options)
        return [2]

    monkeypatch.setattr(prompt_sets, "prompt_ids", prompt_ids)
    assert load_prompts("starter", Templated(), limit=1, template_options={"enable_thinking": True})
    assert asked.pop() == chats[4]["messages"][:1] and given.pop() == {"enable_thinking": True}
    found = load_prompts("starter", Templated(), limit=3)
    assert [p.text for p in found] == ["q4", "q5", "q6"]
    assert asked == [chat["messages"][:1] for chat in chats[4:7]]


def test_validation_prompts_are_taken_from_each_source_in_turn(tmp_path):
    for name, count in (("a", 3), ("b", 1)):
        text = "".join(json.dumps({"prompt": f"{name}{i}", "response": "x"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text(text)
    cfg = compose()
    cfg.data.val = [SourceConfig(path=str(tmp_path / "a.jsonl")), SourceConfig(path=str(tmp_path / "b.jsonl"))]
    assert [p.text for p in validation_prompts(cfg.data, FakeTokenizer(), 10)] == ["a0", "b0", "a1", "a2"]
    assert [p.text for p in validation_prompts(cfg.data, FakeTokenizer(), 3)] == ["a0", "b0", "a1"]


@pytest.mark.parametrize(("text", "steps"), [("4", [4]), ("1-8", list(range(1, 9))), ("4,1,2", [1, 2, 4])])
def test_k_as_it_is_written(text, steps):
    assert step_list(text) == steps


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a pair with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base, drafter = make_pair(tmp_path_factory.mktemp("pair"), "e2b")
    vocabulary = {f"w{i}": i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w2", unk_token="w3")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(base)
    return base, drafter


def test_the_command_writes_json_and_page_and_prints_a_table(folders, tmp_path, capsys):
    arguments = ["--limit", "3", "--num-steps", "1,2", "--max-new-tokens", "6", "--temperature", "1"]
    assert main([*map(str, folders), *arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    table = out.splitlines()
    assert all(len(line) <= 80 for line in table if not line.startswith(("sampling", "written")))
    assert table[0].split() == ["K", "tokens/forward", "tokens/s", "speed-up", "same", "text"]
    assert [line.split()[0] for line in table[1:4]] == ["–", "1", "2"] and "3/3" in table[3]
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert [s["num_steps"] for s in results["speculative"]] == [1, 2]
    assert [s["way"] for s in results["sampling"]] == ["plain", "argmax", "sampled", "transformers"]
    page = (tmp_path / "evaluation.html").read_text()
    assert page.count("<svg") >= 3
    assert not re.search(r"""(src|href)=["'](?!#|data:)|url\((?!#)|@import""", page)  # needs nothing from anywhere


def test_prompts_without_turns_and_answers_without_an_end_are_said(folders, tmp_path, capsys):
    plain = shutil.copytree(folders[0], tmp_path / "base")
    arguments = [str(plain), str(folders[1]), "--limit", "1", "--num-steps", "1", "--max-new-tokens", "2"]
    arguments += ["--thresholds", "0", "--out", str(tmp_path / "out")]
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    tokenizer = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "w5"}))
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "doesn't end with w5" in said.err and "Add 5 to eos_token_id" in said.err
    assert "without turns" not in said.err + said.out
    (plain / "chat_template.jinja").unlink()
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "has no chat template: the prompts are plain text, without turns" in said.err
    assert "the prompts were plain text, without turns" in said.out
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["prompts"]["turns"] is False


def test_the_command_hands_its_options_on(folders, tmp_path, monkeypatch):
    asked = {}

    def fake(*args, **options):
        asked["measure"] = args[3:], options
        return {"speculative": []}

    monkeypatch.setattr(measure, "measure", fake)
    monkeypatch.setattr(measure, "sampling", lambda *args: asked.update(sampling=args[2:]))
    monkeypatch.setattr(report, "text", lambda results: "")
    monkeypatch.setattr(report, "page", lambda results: "")
    arguments = ["--limit", "3", "--num-steps", "2,5", "--max-new-tokens", "9", "--temperature", "0.7", "--seed", "4"]
    arguments += ["--ignore-eos", "--serving", "engine", "--dtype", "float32", "--out", str(tmp_path)]
    arguments += ["--thresholds", "0.5,0,0.3"]
    assert main([*map(str, folders), *arguments]) == 0
    (found, steps, budget), options = asked["measure"]
    assert (len(found), steps, budget) == (3, [2, 5], 9)
    assert {name: options[name] for name in ("ignore_eos", "engine", "seed")} == {
        "ignore_eos": True, "engine": True, "seed": 4
    }  # fmt: skip
    assert asked["sampling"][:-1] == (found, 5, 9, 0.7, 4, True)
    assert options["thresholds"] == [0.3, 0.5]


@pytest.mark.parametrize(("margin", "code"), [(1e-6, 0), (-1e-6, 0), (0.01, 1), (-0.01, 1), (None, 1)])
def test_the_command_fails_for_another_text_unless_rounding_explains_it(folders, tmp_path, monkeypatch, margin, code):
    found = {"prompt": 0, "position": 1, "plain": "a", "speculative": "b", "margin": margin}
    monkeypatch.setattr(measure, "difference", lambda *args: found)
    monkeypatch.setattr(report, "plots_available", lambda: False)
    arguments = ["--limit", "1", "--num-steps", "1", "--max-new-tokens", "2", "--out", str(tmp_path)]
    assert main([*map(str, folders), *arguments]) == code


def test_the_command_says_what_is_wrong(folders, tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), str(folders[1])]) == 2
    assert "nothing" in capsys.readouterr().err
    assert main([*map(str, folders), "--prompts", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert main([str(folders[1]), str(folders[0])]) == 2
    assert "give the base first" in capsys.readouterr().err
