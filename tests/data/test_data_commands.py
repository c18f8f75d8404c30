"""``python -m joint_train.data``: rows in colour, and answers of the base that resume to the example."""

import io
import json

import pytest
import torch
from data_helpers import chat, make_config, make_tokenizer, numbered, write_jsonl
from gemma4_templates import VARIANTS, template
from pairs import build_pair
from rich.console import Console

from joint_train.config import SourceConfig, load
from joint_train.data import DataError, build_loader
from joint_train.data import __main__ as command
from joint_train.data import regenerate as answering
from joint_train.data.json_files import Record
from joint_train.data.readers import sources_of
from joint_train.data.regenerate import Answered, Base, Sampling, answer_batch, prompts
from joint_train.data.rows import Walk
from joint_train.data.show import CUT, TRAINED, UNTRAINED, show
from joint_train.data.sources import parse

TOKENIZER = make_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<turn|>")


@pytest.fixture
def printed(tmp_path):
    """What ``show`` prints for one row of two documents, with terminal colours."""

    def of(at=None, pairing="serving", **options):
        path = write_jsonl(tmp_path / "a.jsonl", [chat("ask", "answer"), chat("more", "and more")])
        cfg = make_config(tmp_path, [path], mixture="epoch", shuffle=False, max_length=80, **options)
        cfg.drafter.num_steps, cfg.drafter.pairing = 2, pairing
        sequence = build_loader(cfg, TOKENIZER, "train", 0, 1).dataset.sequence
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
        show(console, cfg.drafter, sequence, TOKENIZER, 0, 1, at)
        return console.file.getvalue(), sequence.row(next(Walk(sequence)), 80)

    return of


def styled(text: str, style: str) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    console.print(f"[{style}]{text}[/]", end="", highlight=False)
    return console.file.getvalue()


def test_show_colours_what_is_trained_on_and_where_documents_are_cut(printed, tmp_path):
    text, row = printed()
    start = int((row["document_ids"] == 2).argmax())
    assert styled("answer<turn|>", TRAINED) in text and styled("and more<turn|>", TRAINED) in text
    assert styled("<bos><|turn>user↵", UNTRAINED) in text
    assert f"document 2 · positions {start}–" in text and f"{tmp_path}/a.jsonl:2" in text
    assert styled("── ", CUT)[:8] in text and "positions of padding" in text


def test_show_without_colours_brackets_what_is_trained_on(tmp_path):
    lines = [chat("ask", "answer"), {"messages": []}, {"messages": [{"role": "user", "content": "no answer"}]}]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    cfg = make_config(tmp_path, [path], mixture="epoch", shuffle=False, on_error="skip", max_length=80)
    sequence = build_loader(cfg, TOKENIZER, "train", 0, 1).dataset.sequence
    console = Console(file=io.StringIO(), width=200)
    show(console, cfg.drafter, sequence, TOKENIZER, 0, 1, None)
    text = console.file.getvalue()
    assert "model↵\n⟦answer<turn|>⟧↵" in text and "⟦trained on⟧  not trained on" in text
    assert text.count("⟦") == 2
    (line,) = [line for line in text.splitlines() if " a " in line and "100" not in line][:1]
    assert line.replace("│", " ").split()[-1] == "2", "a bad record and one without a target are skipped"


CHECKED = [
    {**chat("ask", "answer"), "id": 1},
    {"prompt": "q", "response": "a"},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"messages": [{"role": "witch", "content": "x"}]},
    {"messages": [{"role": "user", "content": "no answer"}]},
    chat("long", "x" * 100),
]


@pytest.mark.parametrize("workers", [0, 1])
def test_check_reports_on_whole_files(tmp_path, capsys, workers):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    bad, good = write_jsonl(tmp_path / "bad.jsonl", CHECKED), write_jsonl(tmp_path / "good.jsonl", [chat("q", "a")])
    options = [f"data.tokenizer={tmp_path}/tokenizer", f"data.num_workers={workers}", "data.max_length=64"]
    assert command.main(["check", bad, good, "--json", f"{tmp_path}/out.json", *options]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "columns used: messages, prompt, response; unused: id" in printed
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert (first["rows"], first["bad_rows"], first["documents"]) == (6, 3, 4)
    assert first["formats"] == {"messages": 3, "prompt_response": 1}
    assert (first["columns_used"], first["columns_unused"]) == (["messages", "prompt", "response"], ["id"])
    kinds = {found["first"].split(": ", 1)[1]: found["rows"] for found in first["bad"]}
    assert list(kinds.values()) == [2, 1] and list(kinds)[0].startswith("message 0 has the unknown role 'wizard'")
    assert list(kinds)[1] == "no target: nothing in it was written by the assistant"
    tokens = [len(TOKENIZER.apply_chat_template(example["messages"])["input_ids"]) for example in CHECKED[:1]]
    assert first["length_quantiles"]["100"] > 64 and first["longer_than_max_length"] == 1
    assert tokens[0] in first["length_quantiles"].values()
    assert second["bad"] == [] and 0 < second["supervised_share"] < 1
    assert second["supervised_tokens"] == len(TOKENIZER("a<turn|>")["input_ids"])

    assert command.main(["check", good, *options]) == 0
    assert "good" in capsys.readouterr().out
    assert command.main(["check", good, "--json", "-"]) == 0  # without a tokenizer: are the rows understood?
    out = capsys.readouterr()
    assert json.loads(out.out)[0]["rows"] == 1 and "no tokenizer" in out.err
    assert command.main(["check", good, "--format", "orca"]) == 2
    assert "format='orca' is not one of auto, messages" in capsys.readouterr().err
    assert command.main(["check", f"data.train=[{{path: {bad}}}]"]) == 1
    columns = write_jsonl(tmp_path / "c.jsonl", [{"problem": "q", "solution": "a"}])
    assert command.main(["check", columns]) == 1
    assert command.main(["check", columns, "--columns", "prompt=problem", "response=solution", "--json", "-"]) == 0
    assert command.main(["check", f"{tmp_path}/missing.jsonl"]) == 2
    assert command.main(["check"]) == 2
    (tmp_path / "empty.jsonl").touch()
    capsys.readouterr()
    assert command.main(["check", good, f"{tmp_path}/empty.jsonl"]) == 1
    assert "empty: there are no rows, and a run is refused" in capsys.readouterr().out


def test_check_counts_duplicates_options_and_what_cutting_loses(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # paths stay on one line
    make_tokenizer(template(VARIANTS["spring, large"])).save_pretrained(tmp_path / "tokenizer")
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    rows = [chat("q", "a"), {**chat("q", "b"), **on}, chat("q", "a"), {**chat("q", "x" * 200), **on}, chat("</s>", "a")]
    rows += [chat("q", "a"), chat("q" * 200, "a")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = [f"data.tokenizer={tmp_path}/tokenizer", "data.num_workers=0", "data.max_length=128"]
    assert command.main(["check", path, "--json", f"{tmp_path}/out.json", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["duplicate_rows"] == 2 and f"2 rows are the same as an earlier one (first: {path}:3)" in printed
    assert found["template_options"] == {"enable_thinking=true": 2} and "enable_thinking=true (2 rows)" in printed
    assert (found["answers"], found["answers_lost"], found["answers_cut"]) == (7, 1, 1)
    assert found["longer_than_max_length"] == 2 and found["longer_share"] == pytest.approx(2 / 7)
    assert {"kind": "control token in the text: </s>", "count": 1, "first": f"{path}:5"} in found["notices"]
    for overlong, lost in (("drop", (2, 0)), ("split", (0, 0))):
        assert command.main(["check", path, "--json", "-", f"data.overlong={overlong}", *options]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["answers_lost"], found["answers_cut"]) == lost
    assert command.main(["check", path, "--json", "-"]) == 0  # without a tokenizer
    assert json.loads(capsys.readouterr().out)[0]["duplicate_rows"] == 2


def test_show_takes_files(tmp_path, capsys):
    make_tokenizer(template(VARIANTS["spring, large"])).save_pretrained(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", [{"ask": f"q{n}", "say": f"a{n}"} for n in range(3)])
    options = [f"data.tokenizer={tmp_path}/tokenizer", f"data.cache_dir={tmp_path}/cache", "data.max_length=64"]
    options += ["data.packing=false", "data.num_workers=0"]
    columns = ["--columns", "prompt=ask", "response=say"]
    assert command.main(["show", path, "--rows", "3", *columns, *options]) == 0
    printed = capsys.readouterr().out
    assert [printed.index(f"⟦a{n}<turn|>⟧") for n in range(3)] == sorted(printed.index(f"⟦a{n}<turn") for n in range(3))
    assert command.main(["show", path, "--row", "1000000", *columns, *options]) == 2
    assert "--row=1000000: there are 3 documents, and so at most as many rows" in capsys.readouterr().err


def test_options_of_the_template_from_the_command_line_and_a_file(tmp_path, capsys):
    """For all data, for a source, in YAML; and one that the template never reads is an error by its name."""
    make_tokenizer(template(VARIANTS["spring, large"])).save_pretrained(tmp_path / "tokenizer")
    row = {"messages": [*chat("q", "a")["messages"]]}
    row["messages"][1]["reasoning"] = "hm"
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    options = [f"data.tokenizer={tmp_path}/tokenizer", f"data.cache_dir={tmp_path}/cache", "data.max_length=64"]
    options += ["data.num_workers=0", "--rows", "1"]
    source = f"path: {path}, chat_template_kwargs: {{enable_thinking: true}}"
    for arguments in (
        [path, "data.chat_template_kwargs={enable_thinking: true}"],
        [path, "data.chat_template_kwargs.enable_thinking=true"],
        [f"data.train=[{{{source}}}]"],
        [f"data.train=[{{{source}}}]", "data.chat_template_kwargs={enable_thinking: false}"],
    ):
        assert command.main(["show", *arguments, *options]) == 0, capsys.readouterr().err
        assert "⟦<|channel>thought↵\nhm↵\n<channel|>a<turn|>⟧" in capsys.readouterr().out
    assert command.main(["show", path, "data.chat_template_kwargs={enable_thinkin: true}", *options]) == 2
    assert "never reads enable_thinkin (did you mean enable_thinking?)" in capsys.readouterr().err
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        f"# @package _global_\ndata:\n  train:\n    - path: {path}\n"
        "      chat_template_kwargs: {enable_thinking: true}\n"
    )
    cfg = load(["+experiment=own", f"hydra.searchpath=[file://{tmp_path}]"], check=False)
    assert cfg.data.train[0].chat_template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize("pairing, offset", [("serving", 1), ("same_token", 0)])
def test_show_spells_out_what_each_round_predicts(printed, pairing, offset):
    text, row = printed(at=14, pairing=pairing)
    lines = [line for line in text.splitlines() if "round" in line and "x[" in line]
    assert len(lines) == 2
    for k, line in enumerate(lines):
        target = 15 + offset + k
        assert f"x[{14 + offset + k}]" in line and f"x[{target}]" in line
        assert ("yes" in line) == bool(row["labels"][target] != -100)


def test_prompts_end_with_the_last_user_message(tmp_path):
    examples = [chat("a", "b", "c", "d"), chat("e"), {"messages": [{"role": "assistant", "content": "x"}]}]
    cfg = make_config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", examples)])
    with pytest.raises(DataError, match="a.jsonl:3: no user message to answer"):
        list(prompts(cfg.data.train, cfg.data))
    cfg.data.on_error = "skip"
    assert list(prompts(cfg.data.train, cfg.data)) == [chat("a", "b", "c"), chat("e")]


def test_context_stays_context(base, tmp_path, monkeypatch):
    """What wasn't to be trained in the dataset isn't in what regenerate makes of it, and options stay with the row."""
    row = {"messages": [*chat("a", "b", "c", "d")["messages"]]}
    row["messages"][1]["weight"] = row["messages"][3]["weight"] = 0
    spec = {"path": write_jsonl(tmp_path / "a.jsonl", [row]), "chat_template_kwargs": {"enable_thinking": True}}
    cfg = make_config(tmp_path, [spec], chat_template_kwargs={"style": "short"})
    (example,) = prompts(sources_of(cfg.data, "train"), cfg.data)
    asked = []

    def answer(examples, *args):
        asked.extend(examples)
        return [Answered({"role": "assistant", "content": "e"})]

    monkeypatch.setattr("joint_train.data.regenerate.answer_batch", answer)
    regenerate([example], base, TOKENIZER, tmp_path / "out.jsonl")
    (made,) = read(tmp_path / "out.jsonl")
    assert made["chat_template_kwargs"] == {"style": "short", "enable_thinking": True}
    source = SourceConfig(path="out.jsonl")
    again = parse(Record("out.jsonl", 1, json.dumps(made).encode()), source)
    assert again["messages"] == chat("a", "b", "c", "e")["messages"] and again["context"] == [1]


def regenerate(examples, base, tokenizer, output, batch_size=8, rank=0, world_size=1, **sampling):
    """The base in this process answers."""
    answerer = Base(base, tokenizer, Sampling(**sampling), batch_size)
    return answering.regenerate(examples, answerer, output, rank=rank, world_size=world_size)


@pytest.fixture(scope="module")
def base():
    model, _ = build_pair("e2b", vocab_size=400, vocab_size_per_layer_input=400)
    return model


COUNT = 10
EXAMPLES = [chat(f"{example['messages'][0]['content']}{'?' * i}") for i, example in enumerate(numbered(7))]


@pytest.fixture(scope="module")
def continuations(base):
    """Greedy decoding of each prompt alone, without a cache and without an end."""
    rows = []
    for example in EXAMPLES:
        ids = TOKENIZER.apply_chat_template(example["messages"], add_generation_prompt=True, return_dict=True)
        ids = prompt = ids["input_ids"]
        for _ in range(COUNT):
            with torch.no_grad():
                ids = [*ids, int(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        rows.append(ids[len(prompt) :])
    return rows


@pytest.fixture
def expected(base, continuations):
    """The whole output, with end tokens that the base emits sooner, later or not at all."""
    base.generation_config.eos_token_id = ends = [END, continuations[0][6], continuations[3][3]]
    lines = []
    for example, tokens in zip(EXAMPLES, continuations, strict=True):
        if ends_at := [index for index, token in enumerate(tokens) if token in ends]:
            answer = {"role": "assistant", "content": TOKENIZER.decode(tokens[: ends_at[0]]).strip()}
            lines.append({"messages": [*example["messages"], answer]})
    assert 0 < len(lines) < len(EXAMPLES)
    return lines


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_plain_greedy_decoding(base, expected, tmp_path):
    counts = regenerate(EXAMPLES, base, TOKENIZER, tmp_path / "out.jsonl", batch_size=4, max_new_tokens=COUNT)
    assert read(tmp_path / "out.jsonl") == expected
    assert counts.pop("seconds") > 0 and counts.pop("tokens") > COUNT
    assert counts == {"answered": 7, "unfinished": 7 - len(expected), "refused": {}, "missing": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_it_goes_on_where_it_was_stopped_on_other_ranks(base, expected, tmp_path, monkeypatch):
    output, answered = tmp_path / "out.jsonl", []

    def counting(examples, *args):
        if len(answered) >= 4:
            raise KeyboardInterrupt
        answered.extend(examples)
        return answer_batch(examples, *args)

    monkeypatch.setattr("joint_train.data.regenerate.answer_batch", counting)
    options = dict(batch_size=2, max_new_tokens=COUNT)
    with pytest.raises(KeyboardInterrupt):
        regenerate(EXAMPLES, base, TOKENIZER, output, **options)
    (part,) = (tmp_path / "out.jsonl.parts").iterdir()
    lines = part.read_text().splitlines()
    lines = lines[1:]
    assert len(lines) == 4
    part.write_text("\n".join(lines[:3]) + "\n" + lines[3][:9])  # killed in the middle of a line
    part.rename(part.with_name("elsewhere-1-0.jsonl"))

    monkeypatch.setattr("joint_train.data.regenerate.answer_batch", answer_batch)
    first = regenerate(EXAMPLES, base, TOKENIZER, output, rank=0, world_size=2, **options)
    assert not output.exists() and first["missing"] > 0
    second = regenerate(EXAMPLES, base, TOKENIZER, output, rank=1, world_size=2, **options)
    assert first["answered"] + second["answered"] == 4 and second["missing"] == 0
    assert read(output) == expected
    assert regenerate(EXAMPLES, base, TOKENIZER, output, **options)["answered"] == 0, "done is done"


def test_nothing_that_could_be_kept_is_an_error_and_more_tokens_answer_again(base, expected, tmp_path):
    output, options = tmp_path / "out.jsonl", dict(batch_size=7)
    ends, base.generation_config.eos_token_id = base.generation_config.eos_token_id, -1
    try:
        with pytest.raises(DataError, match="none of 7 answers ended within --max-new-tokens=3: .*Raise it"):
            regenerate(EXAMPLES, base, TOKENIZER, output, max_new_tokens=3, **options)
    finally:
        base.generation_config.eos_token_id = ends
    assert not output.exists()
    counts = regenerate(EXAMPLES, base, TOKENIZER, output, max_new_tokens=COUNT, **options)
    assert counts["answered"] == 7 and read(output) == expected
    with pytest.raises(DataError, match="no prompt to answer"):
        regenerate([], base, TOKENIZER, tmp_path / "none.jsonl", max_new_tokens=3, **options)


def test_sampling_is_a_function_of_the_seed(base, tmp_path):
    base.generation_config.eos_token_id = list(range(200))
    outputs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = dict(batch_size=4, max_new_tokens=COUNT, temperature=5.0, seed=seed)
        regenerate(EXAMPLES, base, TOKENIZER, tmp_path / name, **options)
        outputs.append(read(tmp_path / name))
    assert outputs[0] == outputs[1] != outputs[2]


def test_answers_to_other_prompts_are_not_taken_over(base, expected, tmp_path, monkeypatch):
    """The dataset changed between two runs: an answer must not land under another prompt."""
    output, options = tmp_path / "out.jsonl", dict(batch_size=7, max_new_tokens=COUNT)
    changed = [chat("not there any more"), *EXAMPLES[1:4]]
    regenerate(changed, base, TOKENIZER, output, rank=0, world_size=2, **options)
    assert regenerate(EXAMPLES, base, TOKENIZER, output, **options)["answered"] == 6, "all but the one that is the same"
    assert read(output) == expected


def test_half_a_line_of_a_killed_run_does_not_spoil_the_next(base, expected, tmp_path, monkeypatch):
    """Where the name of a part comes again: in a container host and process number do."""
    parts, options = tmp_path / "out.jsonl.parts", dict(batch_size=7, max_new_tokens=COUNT)
    regenerate(EXAMPLES, base, TOKENIZER, tmp_path / "out.jsonl", rank=1, world_size=2, **options)
    (part,) = parts.iterdir()
    again = part.with_name(part.name.replace("-1.jsonl", "-0.jsonl"))
    part.rename(again)
    again.write_text(again.read_text()[:-20])
    assert regenerate(EXAMPLES, base, TOKENIZER, tmp_path / "out.jsonl", **options)["missing"] == 0
    assert read(tmp_path / "out.jsonl") == expected


def test_thinking_is_kept_apart(base, monkeypatch):
    text = "<|channel>thought\nhm<channel|>yes<turn|>"
    monkeypatch.setattr(
        base, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([TOKENIZER.encode(text)])], 1)
    )
    base.generation_config.eos_token_id = END
    (answer,) = answer_batch([chat("q")], base, TOKENIZER, Sampling(9))
    assert answer.message == {"role": "assistant", "content": "yes", "reasoning": "hm"}


def test_regenerate_without_a_template_is_refused_before_the_base_is_loaded(base, tmp_path, capsys):
    make_tokenizer(None).save_pretrained(tmp_path / "base")
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1))
    assert (
        command.main(["regenerate", f"{tmp_path}/o", f"model.base={tmp_path}/base", f"data.train=[{{path: {path}}}]"])
        == 2
    )
    assert "has no chat template: set data.tokenizer" in capsys.readouterr().err


def test_regenerated_answers_end_as_the_template_ends_them(base, tmp_path, monkeypatch, capsys):
    from joint_train.data import regenerate as module

    base.generation_config.eos_token_id = 7
    for part in (base, TOKENIZER):
        part.save_pretrained(tmp_path / "base")
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1))
    found = []

    def regenerating(examples, answerer, *args, **options):
        found.append(answerer.model.generation_config.eos_token_id)
        (tmp_path / "o").write_text("{}\n" * (len(found) == 1))
        return {"answered": 0, "tokens": 0, "unfinished": 0, "refused": {}, "missing": 0}

    monkeypatch.setattr(module, "regenerate", regenerating)
    arguments = ["regenerate", f"{tmp_path}/o", f"model.base={tmp_path}/base", f"data.train=[{{path: {path}}}]"]
    assert command.main(arguments) == 0
    assert found == [[7, END, TOKENIZER.eos_token_id]]
    out = capsys.readouterr().out
    assert "answers also end with <turn|>, <eos>" in out and "is complete (1 row)" in out
    assert command.main(arguments) == 1  # no answer was kept: there is nothing to train on
    assert "0 answers hit --max-new-tokens=" in (out := capsys.readouterr().out) and "is complete (0 rows)" in out


def test_the_commands(base, tmp_path, capsys):
    base.generation_config.eos_token_id = list(range(400))  # whatever comes first ends it
    for part in (base, TOKENIZER):
        part.save_pretrained(tmp_path / "base")
    path = write_jsonl(tmp_path / "a.jsonl", numbered(3))
    overrides = [
        f"model.base={tmp_path}/base",
        f"data.train=[{{path: {path}}}]",
        f"data.cache_dir={tmp_path}/cache",
        "data.max_length=128",
        "data.num_workers=0",
    ]
    command.main(["show", "--rows", "1", *overrides])
    assert "position" in capsys.readouterr().out
    assert command.main(["regenerate", f"{tmp_path}/out.jsonl", "--max-new-tokens", "4", *overrides]) == 0
    assert "3 of 3 prompts answered now" in capsys.readouterr().out
    assert [line["messages"][0] for line in read(tmp_path / "out.jsonl")] == [e["messages"][0] for e in numbered(3)]
    for arguments, message in (
        (["show"], "model.base is not set"),
        (["show", "data.max_len=3", *overrides], "max_len"),
        (["show", "--at=x", *overrides], None),
        (["show", f"model.base={tmp_path}/base"], "data.train has no source"),
    ):
        if message is None:
            with pytest.raises(SystemExit) as stopped:
                command.main(arguments)
            assert stopped.value.code == 2
        else:
            assert command.main(arguments) == 2
            assert message in capsys.readouterr().err
