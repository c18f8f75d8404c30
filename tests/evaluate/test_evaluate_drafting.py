"""Ways of drafting: the sampled text's distribution by enumeration, suppressed tokens, thresholds, confidence."""

import itertools
import json
import math
import random
from collections import defaultdict

import pytest
import torch
from pairs import build_pair, make_pair
from transformers import GenerationConfig

from joint_train import Gemma4WithDrafter
from joint_train.evaluate import calibration, decoding, measure
from joint_train.evaluate.decoding import Decoded, acceptance_steps, decode
from joint_train.evaluate.drafting import Drafting
from joint_train.evaluate.prompts import Prompt
from joint_train.weights.loading import load_model

K = 3
PROMPT = [2, 17, 91, 140, 33, 8, 201, 77, 5, 64]


def pair(shape: str = "31b", **options):
    base, drafter = build_pair(shape, **options)
    base.generation_config = GenerationConfig(pad_token_id=0)
    drafter.generation_config = GenerationConfig()
    return base, drafter


# the distribution of the text


class Dice:
    """Plays every outcome of ``torch.multinomial`` and ``torch.rand_like`` once, and says how probable each play is."""

    def __init__(self, monkeypatch) -> None:
        self.path: list[list] = []  # [choice, probabilities] of the play so far
        monkeypatch.setattr(torch, "multinomial", self.multinomial)
        monkeypatch.setattr(torch, "rand_like", self.rand_like)

    def plays(self):
        """The probability of each play, to be asked after it."""
        while True:
            self.at = 0
            yield lambda: math.prod(probabilities[choice] for choice, probabilities in self.path)
            while self.path and not self.advance(self.path[-1]):
                self.path.pop()
            if not self.path:
                return

    @staticmethod
    def advance(step: list) -> bool:
        step[0] += 1
        while step[0] < len(step[1]) and step[1][step[0]] == 0:
            step[0] += 1
        return step[0] < len(step[1])

    def choose(self, probabilities: list[float]) -> int:
        if self.at == len(self.path):
            self.path.append([-1, probabilities])
            assert self.advance(self.path[-1])
        self.at += 1
        return self.path[self.at - 1][0]

    def multinomial(self, probabilities, num_samples):
        assert num_samples == 1 and len(probabilities) == 1
        return torch.tensor([[self.choose(probabilities[0].double().tolist())]])

    def rand_like(self, ratios):
        """Small enough to be accepted, or not, one draft after the other up to the first that isn't."""
        rolls = torch.full_like(ratios, 2.0)
        for i, ratio in enumerate(ratios.flatten().clamp(max=1).double().tolist()):
            if self.choose([ratio, 1 - ratio]) == 1:
                break
            rolls.view(-1)[i] = 0.0
        return rolls


@pytest.mark.parametrize(
    ("engine", "way"), [(True, "argmax"), (True, "sampled"), (False, "argmax"), (False, "sampled"), (False, "biased")]
)
def test_the_sampled_text_has_the_bases_distribution(engine, way, monkeypatch):
    """Every way that 3 tokens of a vocabulary of 3 can come about after the first, with two drafts at a time."""
    layers = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    base, drafter = pair("31b", vocab_size=3, **layers)
    prompt, new, temperature = [2, 0, 2, 2, 1, 0, 2], 4, 8.0

    dice, found, drafts = Dice(monkeypatch), defaultdict(float), set()
    first = None
    for probability in dice.plays():
        decoded = decode(base, drafter, prompt, 2, new, temperature=temperature, engine=engine, way=way)
        first = decoded.ids[0] if first is None else first
        if decoded.ids[0] != first:  # one first token is enough
            break
        found[tuple(decoded.ids)] += probability()
        drafts.add(tuple(decoded.drafted))
    assert drafts >= {(2, 1), (2,)} and min(found.values()) > 1e-4

    expected = {}
    for text in itertools.product(range(3), repeat=3):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([[*prompt, first, *text]])).logits[0, len(prompt) - 1 : -1]
        p = (logits.double() / temperature).softmax(-1)
        expected[first, *text] = math.prod(p[i, token].item() for i, token in enumerate([first, *text]))
    distance = sum(abs(found[text] - p) for text, p in expected.items()) / sum(expected.values())
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert (distance < 1e-5) == (way != "biased"), distance
    if way == "biased":
        assert distance > 0.05


def test_by_default_engines_draft_the_argmax_and_transformers_rule_is_its_own(monkeypatch):
    base, drafter = pair()
    made = []
    monkeypatch.setattr(decoding, "Drafting", lambda *args: made.append(Drafting(*args)) or made[-1])
    for engine in (True, False):
        decode(base, drafter, PROMPT, K, 4, temperature=0.7, engine=engine)
    assert [(one.way, one.engine, one.temperature) for one in made] == [("argmax", True, 0.7), ("biased", False, 0.7)]


def test_sampled_drafts_are_candidates_of_the_routed_head():
    """Tokens outside of the top centroids have a value in transformers' logits, but no engine drafts them."""
    base, drafter = pair("e2b", drafter_overrides={"centroid_intermediate_top_k": 1})
    made = []
    hook = drafter.register_forward_hook(lambda module, args, out: made.append(out.logits[0, -1]))
    drafted = []
    forward = base.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(kwargs["input_ids"][0, 1:].tolist()), with_kwargs=True
    )
    torch.manual_seed(0)
    decoded = decode(base, drafter, PROMPT, K, 40, temperature=50.0, engine=True, way="sampled")
    hook.remove()
    forward.remove()
    tokens = list(itertools.chain.from_iterable(drafted[1:]))
    assert len(tokens) == len(made) == sum(decoded.drafted) > 50
    for token, logits in zip(tokens, made, strict=True):
        assert (logits > logits.min()).sum() == 16 and logits[token] > logits.min()
    best = [(x[x > x.min()] / 50).softmax(-1).max().item() for x in made]
    assert list(itertools.chain.from_iterable(decoded.confidences)) == pytest.approx(best, rel=1e-5)


# suppressed tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("engine", [True, False])
def test_suppressed_tokens_are_neither_decoded_nor_drafted(engine, temperature):
    base, drafter = pair()

    def run(count):
        drafted = []
        hook = base.register_forward_pre_hook(
            lambda module, args, kwargs: drafted.append(kwargs["input_ids"][0, 1:].tolist()), with_kwargs=True
        )
        torch.manual_seed(0)
        decoded = decode(base, drafter, PROMPT, K, count, temperature=temperature, engine=engine)
        hook.remove()
        return decoded.ids, list(itertools.chain.from_iterable(drafted[1:]))

    text, drafts = run(24)
    base.generation_config.suppress_tokens = suppressed = sorted(set(text))
    drafter.generation_config.suppress_tokens = undrafted = sorted(set(drafts))
    text, drafts = run(24)
    assert len(text) == 24 and not set(text) & set(suppressed)
    assert drafts and not set(drafts) & set(undrafted)
    if temperature:
        torch.manual_seed(0)
        found = measure.sampling(base, drafter, [Prompt(PROMPT, "", "")], K, 64, temperature, engine=engine)
        assert all(way["bases_distribution"] for way in found if way["way"] != "transformers")


def test_exports_keep_suppressed_tokens(tmp_path):
    folders = make_pair(tmp_path / "pair", "31b")
    for folder, tokens in zip(folders, ([7, 9], [11]), strict=True):
        GenerationConfig(suppress_tokens=tokens, pad_token_id=0).save_pretrained(folder)
    model = Gemma4WithDrafter.from_pretrained(*folders, drafter_num_steps=K)
    model.save_pretrained(tmp_path / "export")
    for part, tokens in (("base", [7, 9]), ("drafter", [11])):
        saved = json.loads((tmp_path / "export" / part / "generation_config.json").read_text())
        assert saved["suppress_tokens"] == tokens
        exported = load_model(tmp_path / "export" / part, torch.float32)
        assert exported.generation_config.suppress_tokens == tokens


# confidence


def test_confidence_is_the_drafters_largest_probability_and_drafting_stops_below_the_threshold():
    """Against the joint forward over the text with the drafts: what the drafter would have been sure of, and was."""
    base, drafter = pair()
    joint = Gemma4WithDrafter(base, drafter, drafter_num_steps=K).eval()
    free = decode(base, drafter, PROMPT, K, 32, engine=True)
    sure = sorted(itertools.chain.from_iterable(free.confidences))
    assert [len(c) for c in free.confidences] == free.drafted
    threshold = sure[len(sure) // 2]
    drafted = []
    hook = base.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(kwargs["input_ids"][0, 1:].tolist()), with_kwargs=True
    )
    stopped = decode(base, drafter, PROMPT, K, 32, engine=True, threshold=threshold)
    hook.remove()
    assert stopped.ids == free.ids
    assert stopped.drafted == [len(drafts) for drafts in drafted[1:]] == [len(c) for c in stopped.confidences]
    assert 0 < sum(stopped.drafted) < sum(free.drafted) and 0 in stopped.drafted
    at = len(PROMPT)  # the position of the newest token
    for drafts, confidences, settled in zip(drafted[1:], stopped.confidences, stopped.settled, strict=True):
        room = min(K, len(PROMPT) + 32 - at - 2)
        text = [*PROMPT, *free.ids][: at + 1] + drafts
        rows = joint(torch.tensor([[*text, *[0] * K]])).drafter_logits
        expected = [rows[k][0, at - 1].softmax(-1).max().item() for k in range(room)]
        assert confidences == pytest.approx(expected[: len(drafts)], abs=1e-4)
        assert all(confidence >= threshold for confidence in confidences)
        if len(drafts) < room:
            assert expected[len(drafts)] < threshold + 1e-4
        at += settled
    plain = decode(base, drafter, PROMPT, K, 12, engine=True, threshold=0.9999)
    assert plain.drafted == [0] * 11 and plain.settled == [1] * 11


def made_up(seed: int, count: int = 6) -> list[Decoded]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        drafted = [rng.randint(0, K) for _ in range(rng.randint(2, 30))]
        settled = [rng.randint(1, drafts + 1) for drafts in drafted]
        confidences = [[rng.random() for _ in range(drafts)] for drafts in drafted]
        texts.append(
            Decoded([7] * (1 + sum(settled)), drafted, settled, confidences, rng.random() < 0.5, 1 + rng.random())
        )
    texts[0].confidences[0][:1] = [1.0]
    return texts


def test_reliability_counts_the_drafts_that_were_looked_at():
    texts = made_up(0)
    found = calibration.reliability(texts, 0)
    everything = []
    for text in texts:
        for i, (drafts, settled) in enumerate(zip(text.drafted, text.settled, strict=True)):
            if text.ended and i == len(text.drafted) - 1:
                continue
            for k in range(drafts):
                if settled - 1 < k:  # a draft before it was rejected
                    break
                everything.append((text.confidences[i][k], settled - 1 > k))
    distance = 0.0
    for b, one in enumerate(found["bins"]):
        mine = [x for x in everything if b / 10 <= x[0] < (b + 1) / 10 or (b == 9 and x[0] == 1)]
        assert (one["from"], one["to"], one["drafts"]) == (b / 10, (b + 1) / 10, len(mine))
        confidence, share = (sum(x[i] for x in mine) / len(mine) for i in (0, 1))
        assert one["confidence"] == pytest.approx(confidence)
        assert one["accepted"]["value"] == pytest.approx(share)
        distance += len(mine) * abs(confidence - share)
    assert found["error"] == pytest.approx(distance / len(everything))
    assert calibration.reliability([Decoded([1])], 0)["error"] is None


def test_what_stopping_did_is_counted_over_all_verifications():
    texts = made_up(1)
    found = calibration.stopped(texts, 0.3, 0)
    drafts, verifications = sum(sum(t.drafted) for t in texts), sum(len(t.drafted) for t in texts)
    settled = sum(sum(t.settled) for t in texts)
    assert found["threshold"] == 0.3
    assert found["tokens_per_forward"]["value"] == pytest.approx(settled / verifications)
    assert found["drafts_per_forward"]["value"] == pytest.approx(drafts / verifications)
    assert found["accepted"]["value"] == pytest.approx((settled - verifications) / drafts)
    seconds = sum(t.seconds for t in texts)
    assert found["tokens_per_second"]["value"] == pytest.approx(sum(len(t.ids) for t in texts) / seconds)


def test_measure_decodes_once_for_each_threshold_with_the_last_k(monkeypatch):
    asked = []

    def fake(base, drafter, ids, k, budget, **options):
        asked.append((k, options.get("threshold")))
        stop = options.get("threshold", 0)
        return Decoded([1, k], [k], [2 if stop else 3], [[0.5] * k], seconds=1.0)

    monkeypatch.setattr(measure, "decode", fake)
    monkeypatch.setattr(measure, "difference", lambda *args: None)
    tokenizer = type("Tokenizer", (), {"decode": lambda self, ids, **options: ""})()
    prompts = [Prompt(PROMPT, "", "a")]
    found = measure.measure(None, "drafter", tokenizer, prompts, [1, 4], 32, thresholds=[0.2, 0.6])["calibration"]
    assert [call for call in asked if call[1]] == [(4, 0.2), (4, 0.6)]
    assert [t["threshold"] for t in found["thresholds"]] == [0.0, 0.2, 0.6] and found["num_steps"] == 4
    assert [t["tokens_per_forward"]["value"] for t in found["thresholds"]] == [3, 2, 2]
    assert found["reliability"]["bins"][5]["drafts"] == 3  # two accepted, one rejected, the fourth not looked at
    assert acceptance_steps(Decoded([1], [4], [3])) == [(4, 2)]
