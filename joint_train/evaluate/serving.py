"""The command that serves a pair with an engine."""

import json
import shlex
from pathlib import Path

DRAFTS = 4  # to serve with, where neither the command nor the drafter's folder says how many


def serve_command(
    engine: str,
    base: Path,
    drafter: Path,
    num_steps: int | None,
    dtype: str | None,
    temperature: float = 0.0,
    names: tuple[str, str] | None = None,
) -> str:
    """The shell command that serves a pair; for llama.cpp those that convert it come first.

    Args:
        base, drafter: the folders, whose configurations are read.
        num_steps: K; by default the drafter's ``num_assistant_tokens``.
        dtype: of weights and compute; by default that of the base's folder.
        temperature: that of the requests. Above 0, vLLM is told to sample its drafts.
        names: how the command names the folders, if not by their paths.
    """
    if num_steps is None:
        generation = drafter / "generation_config.json"
        saved = json.loads(generation.read_text()).get("num_assistant_tokens") if generation.exists() else None
        num_steps = saved or DRAFTS
    config = json.loads((base / "config.json").read_text())
    if engine == "llamacpp":
        return llamacpp_commands(names or (str(base), str(drafter)), num_steps, dtype)
    overrides = None
    base_name, drafter_name = names or (str(base), str(drafter))
    if "vision_config" in config and config["vision_config"] is None:
        # Both engines build a vision tower for Gemma4ForConditionalGeneration, whatever its configuration.
        overrides = json.dumps({"architectures": ["Gemma4ForCausalLM"]})
    if engine == "vllm":
        spec = {"method": "mtp", "model": drafter_name, "num_speculative_tokens": num_steps}
        if temperature > 0:
            spec["draft_sample_method"] = "probabilistic"
        command = ["vllm", "serve", base_name, "--speculative-config", json.dumps(spec)]
        if overrides:
            command += ["--hf-overrides", overrides]
        if why_text_only(engine, base):
            command += ["--limit-mm-per-prompt", json.dumps({"image": 0, "audio": 0, "video": 0})]
    else:
        command = ["sglang", "serve", "--model-path", base_name, "--speculative-algorithm", "NEXTN"]
        command += ["--speculative-draft-model-path", drafter_name, "--speculative-num-steps", str(num_steps)]
        command += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(num_steps + 1)]
        if overrides:
            command += ["--json-model-override-args", overrides]
    if dtype:
        command += ["--dtype", dtype]
    return shlex.join(command)


def why_text_only(engine: str, base: Path) -> str | None:
    """Why the command lets the engine take text alone, in a sentence; None where it doesn't."""
    config = json.loads((base / "config.json").read_text())
    towers = [name for name in ("vision_config", "audio_config") if config.get(name)]
    if engine != "vllm" or not towers or (base / "processor_config.json").exists():
        return None
    return (
        f"The command turns pictures and sound off (--limit-mm-per-prompt): {base} has a vision or audio tower, but no "
        "processor_config.json, without which vLLM can't prepare them. Copy the original model's processor_config.json "
        "into the folder to serve them."
    )


GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16"}


def llamacpp_commands(folders: tuple[str, str], num_steps: int, dtype: str | None) -> str:
    """Both folders converted by llama.cpp's own script, and served."""
    kind = GGUF_TYPES.get(dtype or "", "auto")
    files = ("base.gguf", "drafter.gguf")
    convert = [
        ["python", "convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", kind]
        for folder, file in zip(folders, files, strict=True)
    ]
    serve = ["llama-server", "-m", files[0], "-md", files[1], "--spec-type", "draft-mtp"]
    # It drafts 3 by default.
    serve += ["--spec-draft-n-max", str(num_steps), "--metrics", "--jinja"]
    return "\n".join(map(shlex.join, [*convert, serve]))
