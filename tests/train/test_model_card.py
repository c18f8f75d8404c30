"""The model card of an export: what it names, and what it keeps to itself."""

import json

import pytest
import yaml
from configs import compose

from joint_train.model_card import model_cards


@pytest.fixture
def sources(tmp_path):
    for part in ("base", "drafter"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
    return tmp_path / "base", tmp_path / "drafter"


def cards(sources, before=None, measured=None, **settings):
    cfg = compose({key.replace("__", "."): value for key, value in settings.items()}, check=False)
    return model_cards(cfg, sources, 1500, before or {}, measured or {})


def test_hub_ids_are_linked_and_in_the_metadata(sources):
    (sources[0] / "README.md").write_text("---\nlicense: gemma\nlanguage: [en]\npipeline_tag: x\n---\nAnother.\n")
    found = cards(
        sources, model__base="google/gemma-4-E2B-it", model__drafter="google/gemma-4-E2B-it-assistant",
        model__revision="1f2e", lora__r=8, data__train=[{"path": "allenai/tulu-3", "subset": "sft", "limit": 9}],
    )  # fmt: skip
    assert found.keys() == {"base", "drafter", "adapter"}
    metadata = {part: yaml.safe_load(card.split("---\n")[1]) for part, card in found.items()}
    assert metadata["base"]["base_model"] == metadata["adapter"]["base_model"] == "google/gemma-4-E2B-it"
    assert metadata["drafter"]["base_model"] == "google/gemma-4-E2B-it-assistant"
    assert metadata["base"]["license"] == "gemma" and "license" not in metadata["drafter"]
    assert "pipeline_tag" not in metadata["base"]
    assert metadata["adapter"]["library_name"] == "peft" and metadata["adapter"]["base_model_relation"] == "adapter"
    assert (
        "(https://huggingface.co/google/gemma-4-E2B-it), revision 1f2e (trained by adapters of rank 8)" in found["base"]
    )
    assert "| train | tulu-3 | allenai/tulu-3 | sft, train | 1 | 9 |" in found["drafter"]
    assert "| optimizer steps | 1,500 |" in found["adapter"]


def test_folders_are_named_without_their_place(sources):
    found = cards(
        sources, model__base="/home/me/models/tuned", model__drafter="/home/me/d/", freeze__base=True,
        data__train=[{"path": "/home/me/private/rows.jsonl"}], data__tokenizer="/home/me/tokens",
    )  # fmt: skip
    assert found.keys() == {"base", "drafter"}
    for card in found.values():
        assert "/home/me" not in card
        assert "`tuned`, a folder (frozen)" in card and "`tokens`, a folder" in card and "| rows.jsonl |" in card


def test_secrets_of_interpolations_are_not_in_it(sources, monkeypatch):
    from joint_train.config import load

    monkeypatch.setenv("A_TOKEN", "hunter2")
    overrides = ["model.base=b", "model.drafter=d", "data.train=[{path: 's3/${oc.env:A_TOKEN}.jsonl'}]"]
    cfg = load([*overrides, "data.chat_template_kwargs={key: '${oc.env:A_TOKEN}'}"], check=False)
    assert cfg.data.chat_template_kwargs == {"key": "hunter2"}
    for card in model_cards(cfg, sources, 1, {}, {}).values():
        assert "hunter2" not in card and "oc.env:A_TOKEN" in card


def test_what_was_measured_stands_beside_what_it_was(sources):
    before, measured = {"val/base_loss": 2.5, "val/agreement_0": None}, {"val/base_loss": 1.25, "val/agreement_0": 0.5}
    card = cards(sources, before, measured | {"val/tokens_per_forward": float("nan")})["base"]
    assert "| base loss | 2.5 | 1.25 |" in card
    assert "| share of the drafts of round 0 that greedy decoding accepts | – | 0.5 |" in card
    assert "| tokens per base forward | – | – |" in card
    assert "Nothing was measured" in cards(sources)["base"]


def test_a_card_speaks_of_its_own_weights(sources):
    """Nothing says of last weights what was measured of their average, or of a frozen base that it was trained."""
    found = cards(
        sources, {}, {"val/base_loss": 1.25}, model__base="b", model__drafter="d", freeze__base_after=0.5,
        optim__drafter_ema=0.98, model__export__drafter_last=True,
    )  # fmt: skip
    assert found.keys() == {"base", "drafter", "drafter_last"}
    assert "| base loss | – | 1.25 |" in found["drafter"] and "1.25" not in found["drafter_last"]
    assert "Nothing was measured of these weights" in found["drafter_last"]
    assert "`b`, a folder (trained, until it was frozen by freeze.base_after=0.5)" in found["base"]
    assert "| `optim.drafter_ema` | `0.98` |" in found["drafter"] and "| `freeze.base_after` | `0.5` |" in found["base"]

    found = cards(sources, model__base="b", model__drafter="d", freeze__base=True)
    assert "It wasn't trained here" in found["base"] and "trained together" not in "".join(found.values())


def test_adapters_on_a_merged_base_say_where_they_belong(sources):
    both = {"model__base": "b", "model__drafter": "d", "model__adapter": ["me/one", "me/two"], "lora__r": 4}
    found = cards(sources, **both)
    assert "belong on the base with the ones above merged into it" in found["adapter"]
    assert "belong on" not in found["base"]
    card = cards(sources, **both, model__continue_adapter=True)["adapter"]
    assert "| adapters merged into the base | [me/one](https://huggingface.co/me/one) (weight 1) |" in card
    assert "| adapter that was trained on | [me/two](https://huggingface.co/me/two) (weight 1) |" in card
    card = cards(sources, **both | {"model__adapter": "me/two"}, model__continue_adapter=True)["adapter"]
    assert "merged into" not in card and "| adapter that was trained on |" in card
