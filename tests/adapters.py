"""LoRA folders as users have them, made by peft itself."""

from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_base(folder, text_only: bool = False):
    """A base in float32, of its own class or of its language model's."""
    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
    if not text_only:
        return model
    text = transformers.Gemma4ForCausalLM(config.get_text_config()).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    return text


def make_adapter(base: Path, out: Path, seed: int = 0, text_only: bool = False, **options) -> Path:
    """Train nothing, but leave adapters of a healthy size: ``peft.get_peft_model`` and ``save_pretrained``."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))
    model = load_base(base, text_only)
    towers = any("_tower" in name for name, _ in model.named_modules())
    if isinstance(config.target_modules, set) and towers:
        config.exclude_modules = r".*(vision_tower|audio_tower|embed_vision|embed_audio).*"
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(out)
    return out


def merged_by_peft(base: Path, *adapters: Path, weights=None) -> torch.nn.Module:
    """What ``merge_and_unload`` of each in turn leaves, in float32."""
    model = load_base(base)
    for adapter, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        for module in wrapped.modules():
            if hasattr(module, "lora_A"):
                module.scale_layer(weight)
        model = wrapped.merge_and_unload()
    return model
