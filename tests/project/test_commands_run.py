"""Every command of every page is run as it stands there, in the order of the pages and in one folder, on the CPU.

The folder has what the pages speak of, under the names that they use: files, models, a run. What is run otherwise than
it is printed stands in ``INSTEAD`` and ``APPENDED``; what can't be run on a CPU in minutes in ``COMPOSED_ONLY``, of
which ``test_documented_commands.py`` checks what is given."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapters import make_adapter
from documented import PAGES, ROOT, alternatives, commands
from gemma4_templates import VARIANTS, template
from quantised_folders import quantise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# What isn't run, and why.
COMPOSED_ONLY = {
    r"^pip ": "network; tests/project/test_wheel.py installs the package into an environment of its own",
    r"^make (test|docs)": "the suites themselves, and the pages that tests/project/test_docs.py makes",
    r"--url ": "a running engine; make test-vllm has one",
    r"benchmarks\.gpu --(out|against)": "GPU; make test-gpu runs it",
    r"benchmarks\.recipes": "it rewrites conf/recipe; tests/plan/test_recipes.py plans each of them",
    r"--multirun": "cluster; make test-slurm submits sweeps",
}

# What is run otherwise than it is printed: in which commands, which words, and what stands there instead.
MAIN = r"-m joint_train (?!--help)"
OURS = rf"{MAIN}|joint_train\.data (check|show|regenerate) |launch\.submit nodes|joint-train loop --"
INSTEAD = [
    (r"^(?!.* --to )", r"(?<![\w/.])/(data|runs|models|adapters)/", r"{folder}/\1/"),  # absolute paths
    (r"torchrun", r"--nproc-per-node \d+", "--nproc-per-node 2"),
    (OURS, r"model=gemma4_\w+", r"\g<0> model.base=BASE model.drafter=DRAFTER"),  # models of the hub
    (MAIN, r"\+recipe=\w+", r"\g<0> model.base=BASE model.drafter=DRAFTER"),
    (r"retune", r"google/gemma-4-E4B-it", "BASE"),
    (MAIN, r"me/law-lora", "{folder}/adapters/law"),
    (MAIN, r"\bdata=tulu3_magicoder", "data.train=train.jsonl"),  # a data set of the hub
    (r"^make train", r"^make", "make -C {root} -o .venv/.installed OVERRIDES=stop_after=2 OUT={folder}/made"),
    (r"^make .* OUT=/some", r"OUT=\S+made (.*) OUT=/some/folder", r"\1 OUT={folder}/some"),
    (r"launch\.submit nodes|submit --to \w", r"submit ", "submit --dry-run "),
    (r"^joint-train loop", r"--rounds 4 --steps 500", "--rounds 1 --steps 2"),
    (r"joint_train\.(data|evaluate)", r"--max-new-tokens \d+", "--max-new-tokens 16"),
    (r"joint_train\.evaluate", r"--limit \d+", ""),
    (r"joint_train\.evaluate --chat", r"joint_train.evaluate", r"\g<0> BASE DRAFTER"),  # only an option is named
    (r"joint_train\.export out/", r"out/checkpoints/step_\d+", "CHECKPOINT"),
    (MAIN, r"path: answers\.jsonl", "path: train.jsonl"),
    (r"benchmarks\.joint ", r"--steps 200 --start-steps 600", "--steps 4 --start-steps 4 --starts 0"),
    (r"benchmarks\.joint ", r"--decoded 32", "--decoded 2"),
    (r"benchmarks\.scale .* 512", r"--ranks [\d ]+--lengths [\d ]*\d", "--models gemma4_e4b --ranks 8 --lengths 2048"),
    (r"benchmarks\.optimizers", r"--steps 60", "--steps 2 --seeds 0 1 --names adamw"),
    (r"benchmarks\.quantised", r"DIR", "DIR --starts 0 --forms int8 --start-steps 4 --steps 2 --prompts 8 --decoded 2"),
    (r"(benchmarks\.\w+) DIR\b", r"(benchmarks\.\w+) DIR", r"\1 \1"),
    (r"regenerate", r"model\.base=DIR", "model.base=BASE"),
    (r"FILE", r"\bFILE\b", "train.jsonl"),
    (r"compare RUN", r"RUN RUN", "RUN OTHER_RUN"),
    (r"--help [A-Z]+$", r"[A-Z]+$", "optim"),
    (r"--to$", r"--to$", "--to kubernetes --help"),
]  # fmt: skip
STEPS = 60  # of the pair's training
FILES = ["train", "val", "prompts", "math", "law", "chat", "math-val", "law-val", "chats", "code"]
ADAPTERS = ["models/my-lora", "models/support-lora", "models/legal-lora", "adapters/math", "adapters/law"]
SMALL = "data.max_length=256 eval.batches=1 eval.prompts=2 eval.max_new_tokens=4 tracking.wandb=disabled"
APPENDED = [
    (MAIN, f"stop_after=2 {SMALL}"),
    (
        r"-m joint_train max_steps=1800",
        "output_dir=frozen model.base=BASE model.drafter=DRAFTER data.train=train.jsonl",
    ),
    (r"joint_train\.retune BASE|joint-train loop --", SMALL),
    (
        r"joint_train\.retune BASE",
        "--drafter DRAFTER --nproc-per-node 1 --held-out 2 --eval-tokens 4 --max-new-tokens 16 max_steps=2",
    ),
    (r"joint_train\.evaluate (?!compare|.*--engine)", "--limit 2 --max-new-tokens 4"),
    (r"joint_train\.plan (--suggest$|parallel)", "model=gemma4_31b"),
]


def as_run(words: list[str], folder: Path) -> list[str] | None:
    """What is run for a command; None if it is only composed."""
    line = shlex.join(words)
    if any(re.search(pattern, line) for pattern in COMPOSED_ONLY):
        return None
    if re.fullmatch(r"python -m \w+\.\w+( [a-z]+)?|joint-train [a-z]+", line):
        return [*words, "--help"]  # it is only named
    for where, pattern, other in INSTEAD:
        if re.search(where, line):
            line = re.sub(pattern, other.replace("{folder}", str(folder)).replace("{root}", str(ROOT)), line)
    return shlex.split(" ".join([line, *(more for where, more in APPENDED if re.search(where, line))]))


@pytest.fixture(scope="module")
def run(starter_dir, tmp_path_factory):
    """Runs a command in the folder; commands that have been run before aren't run again."""
    folder = tmp_path_factory.mktemp("documented")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "USER": "me",
        "HF_HUB_OFFLINE": "1", "COLUMNS": "100",
    }  # fmt: skip
    done: dict[str, float] = {}

    def run(words: list[str]) -> None:
        line = shlex.join(words)
        if line in done:
            return
        began = time.monotonic()
        found = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        done[line] = time.monotonic() - began
        print(f"{done[line]:6.1f} s  {line}")
        assert found.returncode == 0, (
            f"{line}\nexit code {found.returncode}\n{found.stdout[-3000:]}\n{found.stderr[-4000:]}"
        )
        assert "Traceback" not in found.stdout + found.stderr, f"{line}\n{found.stderr[-4000:]}"

    def row(number: int, names: tuple[str, str] | None = None) -> str:
        said = [f"Is {number} a number?", "Yes."]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        return json.dumps(dict(zip(names, said, strict=True)) if names else {"messages": turns}) + "\n"

    for place in (folder, folder / "data"):
        place.mkdir(exist_ok=True)
        for number, name in enumerate(FILES):
            names = ("question", "answer") if name == "code" else None
            (place / f"{name}.jsonl").write_text("".join(row(10 * number + n, names) for n in range(10)))
    # A pair that has learned to end its answers, with a chat template of Gemma 4's.
    shutil.copytree(starter_dir, folder / "pair")
    (folder / "pair/base/chat_template.jinja").write_text(template(VARIANTS["spring, large"]))
    run([sys.executable, "-m", "joint_train", "model.base=pair/base", "model.drafter=pair/drafter",
         "data.train=train.jsonl", "data.val=val.jsonl", "output_dir=RUN",
         f"max_steps={STEPS}", "optim.lr=4e-3", "optim.drafter_lr=4e-3", "optim.warmup_steps=5",
         "data.micro_batch_size=4", *SMALL.split()])  # fmt: skip
    shutil.copytree(folder / "RUN", folder / "OTHER_RUN")
    for name, part in (("BASE", "base"), ("DRAFTER", "drafter"), ("OTHER_DRAFTER", "drafter")):
        shutil.copytree(folder / "RUN/export" / part, folder / name)
    for name in ("gemma-4", "my-base", "gemma-4-31B-it-FP8"):
        shutil.copytree(folder / "BASE", folder / "models" / name)
    quantise(folder / "models/gemma-4-31B-it-FP8", "fp8")
    (folder / "models/gemma-4-31B-it-FP8/joint_train_export.json").unlink()  # no export of ours any more
    for number, name in enumerate(ADAPTERS):
        make_adapter(folder / "BASE", folder / name, seed=number)
    (folder / "DIR").symlink_to("RUN")
    (folder / "EXPORT").symlink_to("RUN/export")
    (folder / "CHECKPOINT").symlink_to(f"RUN/checkpoints/step_{STEPS:08d}")
    run.folder = folder
    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_commands_of_a_page_run(page, run):
    for name, text in re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", page.read_text(), re.S):
        text = re.sub(
            r"/(data|runs)/", rf"{run.folder}/\1/", text.replace("gemma4_e4b ", "{base: BASE, drafter: DRAFTER} ")
        )
        (run.folder / name).write_text(text)  # a file that the page shows
    failed = []
    for command in dict.fromkeys(commands(page)):
        for words in alternatives(shlex.split(command)):
            if instead := as_run(words, run.folder):
                try:
                    run(instead)
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    failed.append(f"{command}\n{error}")
                    print("FAILED", failed[-1])
    assert not failed, "\n\n".join(failed)
