"""The command ``joint-train``: each of its commands is a module, which ``python -m`` starts as well."""

import importlib.metadata
import runpy
import shlex
import sys

# The module, the arguments that stand before the user's, and what the command does.
COMMANDS = {
    "train": (
        "joint_train",
        [],
        "train a pair on one GPU or the CPU; on several: torchrun … -m joint_train",
    ),
    "plan": ("joint_train.plan", [], "say whether a run fits, how long a step takes and what the bottleneck is"),
    "data": ("joint_train.data", [], "check data files, show what is trained"),
    "regenerate": ("joint_train.data", ["regenerate"], "have the base answer the prompts of a data set"),
    "evaluate": ("joint_train.evaluate", [], "speculative decoding against plain decoding, or a running server"),
    "compare": ("joint_train.evaluate", ["compare"], "compare evaluations with each other"),
    "export": ("joint_train.export", [], "write a checkpoint as two Hugging Face folders"),
    "checkpoint": ("joint_train.checkpoint", [], "list, verify or thin out checkpoints"),
    "drafter": ("joint_train.drafter", [], "make a drafter for a base that has none"),
    "retune": ("joint_train.retune", [], "train the drafter of a fine-tune again, and say what it gained"),
    "loop": ("joint_train.loop", [], "train in rounds, each on answers of the base as it is then"),
    "starter": ("joint_train.starter", [], "make the starter pair and its data"),
    "submit": ("launch.submit", [], "submit a run to Slurm, or write it for Kubernetes or SkyPilot"),
    "preflight": ("launch.preflight", [], "check hosts and network before a run"),
    "summary": ("launch.summary", [], "say how the runs below a folder went"),
}


def main() -> None:
    """Run the command that the first argument names; its exit code is that of ``python -m`` with its module."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h", "help"):
        print("joint-train COMMAND [ARGUMENTS], and joint-train COMMAND --help\n")
        print("\n".join(f"  {command:<12} {does}" for command, (_, _, does) in COMMANDS.items()))
        print("\njoint-train --version prints this version and those of torch and transformers;")
        print('eval "$(joint-train --completion)" in ~/.bashrc completes commands and keys.')
    elif name == "--completion":
        print(completion())
    elif name == "--version":
        print(versions())
    elif name not in COMMANDS:
        sys.exit(_unknown(name))
    else:
        module, before, _ = COMMANDS[name]
        sys.argv[1:] = [*before, *arguments]
        if module != "joint_train":
            from joint_train.command import Parser

            own = next(known for known, (of, words, _) in COMMANDS.items() if of == module and not words)
            Parser.started_as = f"joint-train {own}"
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def versions() -> str:
    """What ``--version`` prints."""
    ours, *others = (f"{name} {importlib.metadata.version(name)}" for name in ("joint-train", "torch", "transformers"))
    return f"{ours} ({', '.join(others)})"


def completion() -> str:
    """What bash (and zsh, after ``bashcompinit``) evaluates to complete commands, keys and prepared settings."""
    from joint_train.config import choices, groups, keys

    words = [*COMMANDS, *(f"{key}=" for group in groups() for key, _, _ in keys(group))]
    words += [f"{group}={name}" for group, names in choices().items() for name in names]
    # Words are broken at "=": of one that has it, what stands after it is completed.
    return f"""_joint_train() {{
    local word=${{COMP_LINE:0:$COMP_POINT}}
    word=${{word##* }}
    mapfile -t COMPREPLY < <(compgen -W {shlex.quote(" ".join(words))} -- "$word")
    [[ $word == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#*=}}")
    return 0
}}
complete -o nospace -o default -F _joint_train joint-train"""


def _unknown(name: str) -> int:
    import difflib

    meant = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f" Did you mean {meant[0]}?" if meant else ""
    print(f"joint-train: there is no command {name}.{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
