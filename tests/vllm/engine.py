"""Runs in vLLM's own environment: decodes prompts with several pairs, one after another, and writes what each step did.

usage: engine.py JOBS.json RESULTS.json

A job has ``options`` (of ``vllm.LLM``), ``prompts`` (token ids), ``max_tokens`` and ``ignore_eos``. A result has, for
each prompt, the tokens that each engine step settled (``steps``), and the engine's counters; or ``error``.
"""

import gc
import json
import sys
import traceback


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    jobs, results = json.load(open(sys.argv[1])), {}
    without_cuda_graphs()
    without_amx()
    for name, job in jobs.items():
        try:
            results[name] = decode(job)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        gc.collect()
        cleanup_dist_env_and_memory()
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


def without_cuda_graphs() -> None:
    """Let ordered embeddings work on CPU: vLLM 0.32 captures CUDA graphs for their head whatever the device is.

    Without them, the function that the graphs would have captured is called.
    """
    from vllm.v1.spec_decode.gemma4 import Gemma4Proposer

    dense = Gemma4Proposer._greedy_sample

    def greedy(self, hidden):
        ordered = getattr(self.model, "masked_embedding", None) is not None
        return self.model.get_top_tokens(hidden) if ordered else dense(self, hidden)

    Gemma4Proposer._setup_centroids_cuda_graphs = lambda self: None
    Gemma4Proposer._greedy_sample = greedy


def without_amx() -> None:
    """Let all machines compute alike: those with AMX round the inputs of int4 layers to 8 bits (VLLM_CPU_INT4_W4A8),
    and some say that they have it, and end a process that uses it."""
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False


def decode(job: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(disable_log_stats=False, skip_tokenizer_init=True, **job["options"])
    params = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        ignore_eos=job["ignore_eos"],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,  # what each step settled, by itself
    )
    engine, steps = llm.llm_engine, [[] for _ in job["prompts"]]
    for i, prompt in enumerate(job["prompts"]):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if tokens := list(output.outputs[0].token_ids):
                steps[int(output.request_id.split("-")[0])].append(tokens)
    counters = {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in llm.get_metrics()
        if metric.name in ("vllm:generation_tokens", "vllm:spec_decode_num_drafts")
    }
    engine.engine_core.shutdown()
    return {"steps": steps, **counters}


if __name__ == "__main__":
    main()
